"""
`derta demo`: DeRTa on a toy world, offline and on a CPU, in about two minutes.

run > report > page > charts; run > evaluation > attacks, generation, judge; run > training > records, model;
all of these > world > words.
"""
