"""
`check_rows`: every row that the core builds passes, and no row that trains harmful text does.

The generated triples draw all their ids from few, so that safe and harmful responses share tokens, begin alike and hold
the refusal token; where a test must tell harmful ids, their vocabularies are apart.
"""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.row_check import UnsafeRowError, check_rows
from derta_plugins.core.transform import Row, build_rows

SORRY = 3
MANY = settings(max_examples=400, deadline=None, derandomize=True, database=None)


@st.composite
def triples(draw, safe=range(6), harmful=range(6)):
    """A triple with earlier turns and word ends; `safe` and `harmful` are the ids to draw the responses from."""

    def ids(vocabulary, low, high):
        return tuple(draw(st.lists(st.sampled_from(vocabulary), min_size=low, max_size=high)))

    prompt, rejected = ids(range(6), 1, 6), ids(harmful, 0, 8)
    cuts = draw(st.sets(st.integers(0, len(prompt)), max_size=2))
    turns = (tuple(sorted(cuts)),) if len(cuts) == 2 else ()
    words = draw(st.sets(st.integers(1, len(rejected)))) if rejected else ()
    return TokenizedTriple(prompt, ids(safe, 1, 5), rejected, ids(safe, 1, 3), tuple(sorted(words)), turns)


CONFIGS = st.builds(
    DeRTaConfig,
    method=st.sampled_from(["derta", "derta", "vanilla", "recaug"]),
    prefix_unit=st.sampled_from(["token", "word"]),
    zero_prefix_ratio=st.sampled_from([None, 0.0, 1 / 3, 1.0]),
    num_prefixes=st.integers(1, 3),
    rto_ratio=st.sampled_from([0.0, 0.5, 1.0]),
    rto_keep_ratio=st.sampled_from([0.01, 0.5, 1.0]),
    rto_turns=st.sampled_from(["last", "all"]),
    seed=st.integers(0, 3),
)
ROOM = st.none() | st.integers(1, 16)


def built(triple, config, room, **draws):
    max_length = None if room is None else len(triple.prompt_ids) + room
    return build_rows(triple, config, refusal_token_id=SORRY, max_length=max_length, **draws), max_length


def is_accepted(rows, triple, max_length=None):
    try:
        check_rows(rows, triple, refusal_token_id=SORRY, max_length=max_length)
    except UnsafeRowError:
        return False
    return True


@MANY
@given(triples(), CONFIGS, ROOM, st.integers(0, 50), st.integers(0, 2))
def test_every_row_of_the_core_passes(triple, config, room, index, epoch):
    rows, max_length = built(triple, config, room, index=index, epoch=epoch)
    check_rows(rows, triple, refusal_token_id=SORRY, max_length=max_length)


@MANY
@given(triples(harmful=range(10, 16)), CONFIGS, st.data())
def test_a_harmful_token_in_the_labels_is_always_refused(triple, config, data):
    """As its own target where it stands, and anywhere else."""
    assume(triple.rejected_ids)
    rows, _ = built(triple, config, None)
    number = data.draw(st.integers(0, len(rows) - 1))
    row = rows[number]
    standing = [place for place, token in enumerate(row.input_ids) if token >= 10]
    place = data.draw(st.sampled_from(standing or range(len(row.labels))) | st.integers(0, len(row.labels) - 1))
    token = row.input_ids[place] if place in standing else data.draw(st.sampled_from(triple.rejected_ids))
    labels, rto_mask = list(row.labels), list(row.rto_mask)
    labels[place], rto_mask[place] = token, False
    assert not is_accepted(
        [*rows[:number], replace(row, labels=labels, rto_mask=rto_mask), *rows[number + 1 :]], triple
    )


@MANY
@given(triples(harmful=range(10, 16)), CONFIGS)
def test_rows_that_train_the_harmful_answer_are_always_refused(triple, config):
    """What fine-tuning on the wrong column would do, with the mask forgotten or kept."""
    assume(triple.rejected_ids)
    for row in built(triple, config, None)[0]:
        labels = [label if token < 10 else token for token, label in zip(row.input_ids, row.labels, strict=True)]
        if labels != row.labels:
            assert not is_accepted([replace(row, labels=labels)], triple)
            assert not is_accepted([replace(row, labels=labels, rto_mask=[False] * len(labels))], triple)


def is_explained(row, triple):
    """Read aloud: in one place the safe answer stands, to its end or the row's, and holds all targets but SORRY."""
    answer, start = [*triple.chosen_ids, *triple.end_ids], len(triple.prompt_ids)
    targets = {place: label for place, label in enumerate(row.labels) if label not in (IGNORE_INDEX, SORRY)}
    if not targets:
        return True
    for begin in range(start, len(row.input_ids)):
        standing = dict(zip(range(begin, len(row.input_ids)), answer, strict=False))
        if all(row.input_ids[place] == token for place, token in standing.items()):
            if all(standing.get(place) == label for place, label in targets.items()):
                return True
    return False


@MANY
@given(triples(), st.data())
def test_a_row_of_any_make_passes_if_the_safe_answer_explains_it_and_only_then(triple, data):
    piece = st.sampled_from([triple.chosen_ids, triple.rejected_ids, triple.end_ids, (1,), ()])
    tail = [token for part in data.draw(st.lists(piece, max_size=4)) for token in part]
    input_ids = [*triple.prompt_ids, *tail, *triple.chosen_ids]
    kinds = data.draw(st.lists(st.sampled_from("iiitr"), min_size=len(input_ids), max_size=len(input_ids)))
    labels = [{"i": IGNORE_INDEX, "t": token, "r": SORRY}[kind] for token, kind in zip(input_ids, kinds, strict=True)]
    assume(any(label != IGNORE_INDEX for label in labels[1:]))
    row = Row(input_ids, labels, [False] * len(labels), "mle", 0)
    assert is_accepted([row], triple) == is_explained(row, triple)


# --- by hand ---------------------------------------------------------------------------------------------------------

TRIPLE = TokenizedTriple((1, 2), (3, 4, 5), (6, 4, 5, 7), end_ids=(0,))
MLE = Row([1, 2, 6, 3, 4, 5, 0], [-100, -100, -100, 3, 4, 5, 0], [False] * 7, "mle", 1)
RTO = Row([1, 2, 6, 4, 5, 7, 0], [-100, -100, 3, 3, 3, 3, 3], [False, False, *[True] * 5], "rto", 4)


def refused(row, match, triple=TRIPLE, **options):
    with pytest.raises(UnsafeRowError, match=match):
        check_rows([MLE, row] if triple is TRIPLE else [row], triple, refusal_token_id=SORRY, **options)


def test_the_rows_below_are_good_before_they_are_changed():
    check_rows([MLE, RTO], TRIPLE, refusal_token_id=SORRY, max_length=7)


def test_ids_that_came_out_of_a_dataset_are_lists():
    lists = TokenizedTriple(list(TRIPLE.prompt_ids), list(TRIPLE.chosen_ids), list(TRIPLE.rejected_ids), [0])
    check_rows([MLE, RTO], lists, refusal_token_id=SORRY)


@pytest.mark.parametrize(
    ("input_ids", "labels"),
    [
        ([1, 2, 3, 4], [-100, -100, 3, 4]),  # cut to fit
        ([1, 2, 3, 4, 5, 0], [-100, -100, -100, -100, 5, 0]),  # the beginning left out
        ([1, 2, 3, 4, 5, 0], [-100, -100, 3, -100, 5, -100]),  # with gaps
        ([1, 2, 3, 4, 6, 3, 4, 5, 0], [-100, -100, -100, -100, 3, 3, 4, 5, 0]),  # RTO and a second start in one row
        ([1, 2, 9, 9, 3, 4, 5, 0], [-100, -100, -100, -100, 3, 4, 5, 0]),  # foreign text as context
    ],
)
def test_other_ways_to_train_the_safe_answer_pass(input_ids, labels):
    check_rows([Row(input_ids, labels, [False] * len(labels), "mle", 0)], TRIPLE, refusal_token_id=SORRY)


def test_tokens_that_both_answers_share_are_no_targets_in_the_harmful_one():
    labels = [-100, -100, -100, 4, 5, -100, -100]
    refused(replace(RTO, labels=labels, rto_mask=[False] * 7), "^Row 1 trains token 4 at place 3, which is no part of")


def test_a_harmful_text_that_holds_the_beginning_of_the_safe_one_is_no_target_either():
    triple = TokenizedTriple((1, 2), (8, 4, 5), (8, 4, 7, 8, 9), end_ids=(0,))
    row = Row([1, 2, 8, 4, 7, 8, 9, 0], [-100] * 8, [False] * 8, "mle", 0)
    for places in ([2], [2, 3], [5]):
        labels = [token if place in places else -100 for place, token in enumerate(row.input_ids)]
        refused(replace(row, labels=labels), f"trains token 8 at place {places[0]}, which is no part", triple)


def test_the_safe_answer_in_the_prompt_is_no_target():
    triple = TokenizedTriple((3, 4, 5, 2), (3, 4, 5), (6,), end_ids=(0,))
    row = Row([3, 4, 5, 2, 3, 4], [-100, 4, 5, -100, -100, -100], [False] * 6, "mle", 0)
    refused(row, "trains token 4 at place 1, which is no part", triple)


def test_a_label_that_is_not_the_token_at_its_place_is_refused():
    refused(
        replace(MLE, labels=[-100, -100, 3, 4, 5, 0, -100]), "^Row 1 trains token 4 at place 3, where token 3 stands"
    )


BAD_SHAPES = {
    "no list": (replace(MLE, input_ids=tuple(MLE.input_ids)), "must have a list of int in `input_ids`"),
    "no whole numbers": (replace(MLE, labels=[-100.0] * 7), "must have a list of int in `labels`"),
    "true for one": (replace(MLE, labels=[*MLE.labels[:-1], False]), "must have a list of int in `labels`"),
    "no booleans": (replace(MLE, rto_mask=[0] * 7), "must have a list of bool in `rto_mask`"),
    "short labels": (replace(MLE, labels=MLE.labels[:-1]), r"lists of one length, got 7, 6, 7 \(input_ids, labels"),
    "short mask": (replace(MLE, rto_mask=[False] * 6), "lists of one length, got 7, 7, 6"),
    "prompt cut": (replace(MLE, input_ids=[2, 1, *MLE.input_ids[2:]]), r"begin with the 2 tokens of .* got \[2, 1\]"),
    "objective": (replace(MLE, objective="dpo"), "the objective 'mle' or 'rto', got 'dpo'"),
    "prefix too long": (replace(MLE, prefix_length=6), r"a prefix_length in 0\.\.5, got 6"),
    "prefix below 0": (replace(MLE, prefix_length=-1), r"a prefix_length in 0\.\.5, got -1"),
    "mask on a safe token": (
        replace(MLE, rto_mask=[*[False] * 4, True, False, False]),
        "has `rto_mask` at place 4, whose label 4 is not the refusal token 3",
    ),
    "mask on context": (
        replace(MLE, rto_mask=[*[False] * 2, True, *[False] * 4]),
        "has `rto_mask` at place 2, whose label -100 is not",
    ),
    "no target": (replace(MLE, labels=[-100] * 7), "trains nothing"),
    "a target that nothing predicts": (replace(MLE, labels=[3, *[-100] * 6]), "trains nothing"),
    "no row": ("row", "must be a core.transform.Row, got str"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_a_row_of_another_shape_is_refused(case):
    row, match = BAD_SHAPES[case]
    refused(row, rf"^Row 1 .*{match}")


def test_a_row_over_the_length_is_refused():
    check_rows([MLE], TRIPLE, refusal_token_id=SORRY, max_length=7)
    with pytest.raises(UnsafeRowError, match=r"^Row 0 must have at most max_length=6 tokens, got 7\.$"):
        check_rows([MLE], TRIPLE, refusal_token_id=SORRY, max_length=6)


@pytest.mark.parametrize("rows", [[], None, (), iter([MLE])], ids=["list", "none", "tuple", "iterator"])
def test_a_triple_without_rows_is_refused(rows):
    """Else a safety record would vanish without a word."""
    with pytest.raises(UnsafeRowError, match=r"^Expected at least one row of a triple"):
        check_rows(rows, TRIPLE, refusal_token_id=SORRY)
