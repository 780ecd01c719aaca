"""
What holds for the rows of every triple, over thousands of generated ones.

Prompt, safe and harmful ids come from vocabularies that share no id, so that a harmful id in `labels` shows at once.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.transform import Row, build_rows

NUM_CASES = 4000
PROMPT, EARLIER, SAFE, HARMFUL, END = (range(start, start + 100) for start in (100, 200, 300, 400, 500))
SORRY = 7  # in none of them: an RTO target cannot be mistaken for anything else


@dataclass(frozen=True)
class Case:
    triple: TokenizedTriple
    config: DeRTaConfig
    max_length: int | None
    index: int
    epoch: int

    def rows(self, **changes) -> list[Row]:
        case = replace(self, **changes)
        options = {"max_length": case.max_length, "index": case.index, "epoch": case.epoch}
        return build_rows(case.triple, case.config, refusal_token_id=SORRY, **options)


def make_triple(rng: random.Random) -> TokenizedTriple:
    """A prompt of some earlier turns, whose answers stand in a vocabulary of their own, and two responses."""
    prompt, spans = rng.choices(PROMPT, k=rng.randint(1, 6)), []
    for _ in range(rng.choice([0, 0, 1, 2])):
        start = len(prompt)
        prompt += rng.choices(EARLIER, k=rng.randint(1, 4))
        spans.append((start, len(prompt)))
        prompt += rng.choices(PROMPT, k=rng.randint(1, 4))
    length = rng.choice([0, 1, 2, 5, 12, 30])
    words = sorted({rng.randint(1, length) for _ in range(rng.randint(0, length))} | {length}) if length else []
    return TokenizedTriple(
        prompt_ids=tuple(prompt),
        chosen_ids=tuple(rng.choices(SAFE, k=rng.randint(1, 8))),
        rejected_ids=tuple(rng.choices(HARMFUL, k=length)),
        end_ids=tuple(rng.choices(END, k=rng.choice([1, 1, 1, 2, 3]))),
        word_ends=tuple(words),
        earlier_turns=tuple(spans),
    )


def make_case(seed: int) -> Case:
    rng = random.Random(seed)
    triple = make_triple(rng)
    config = DeRTaConfig(
        method=rng.choice(["derta", "derta", "derta", "vanilla", "recaug"]),
        prefix_unit=rng.choice(["token", "word"]),
        zero_prefix_ratio=rng.choice([None, 0.0, 1 / 3, 1.0]),
        num_prefixes=rng.choice([1, 1, 2, 3]),
        rto_ratio=rng.choice([0.0, 0.5, 1.0, 1.0]),
        rto_keep_ratio=rng.choice([0.01, 0.3, 1.0, 1.0]),
        rto_turns=rng.choice(["last", "all"]),
        seed=rng.randint(0, 5),
    )
    whole = len(triple.prompt_ids) + len(triple.rejected_ids) + len(triple.chosen_ids) + len(triple.end_ids)
    max_length = rng.choice([None, rng.randint(len(triple.prompt_ids) + 1, whole + 2)])
    return Case(triple, config, max_length, index=rng.randint(0, 1000), epoch=rng.randint(0, 3))


CASES = [make_case(seed) for seed in range(NUM_CASES)]
ROWS = [(case, row) for case in CASES for row in case.rows()]


def test_the_cases_are_not_all_of_one_kind():
    """Else the properties below would hold for want of a counter-example."""
    seen = Counter()
    for case, row in ROWS:
        seen[row.objective] += 1
        seen["cut"] += row.num_truncated > 0
        seen["prefix"] += row.objective == "mle" and row.prefix_length > 0
        seen["no prefix"] += row.objective == "mle" and row.prefix_length == 0
        seen["RTO on earlier turns"] += any(row.rto_mask[: len(case.triple.prompt_ids)])
        seen["RTO positions left out"] += row.objective == "rto" and IGNORE_INDEX in row.labels[-2:]
        seen["RTO at max_length"] += row.objective == "rto" and len(row.input_ids) == case.max_length
    assert min(seen.values()) > 100, seen


def test_no_harmful_id_ever_stands_in_the_labels():
    forbidden = {*HARMFUL, *EARLIER, *PROMPT}
    for case, row in ROWS:
        assert forbidden.isdisjoint(row.labels), case


def test_the_check_above_can_fail():
    forbidden = {*HARMFUL, *EARLIER, *PROMPT}
    assert not forbidden.isdisjoint(
        next(row for _, row in ROWS if row.objective == "rto" and row.prefix_length).input_ids
    )


def test_the_three_lists_have_one_length_of_at_most_max_length():
    for case, row in ROWS:
        assert len(row.input_ids) == len(row.labels) == len(row.rto_mask), case
        assert case.max_length is None or len(row.input_ids) <= case.max_length, case


def test_every_label_is_ignored_or_the_refusal_token_or_the_safe_answer_itself():
    for case, row in ROWS:
        answer_start = len(case.triple.prompt_ids) + row.prefix_length
        for place, (token, label, is_rto) in enumerate(zip(row.input_ids, row.labels, row.rto_mask, strict=True)):
            if row.objective == "rto":
                assert label == (SORRY if is_rto else IGNORE_INDEX), case
            else:
                assert not is_rto, case
                assert label == (token if place >= answer_start else IGNORE_INDEX), case


def test_the_prompt_is_never_shortened():
    for case, row in ROWS:
        assert tuple(row.input_ids[: len(case.triple.prompt_ids)]) == case.triple.prompt_ids, case


def test_the_seam_between_prefix_and_refusal_is_not_tokenised_again():
    for case, row in ROWS:
        triple = case.triple
        seam = len(triple.prompt_ids) + row.prefix_length
        context = [*triple.prompt_ids, *triple.rejected_ids]
        assert row.input_ids[:seam] == context[:seam], case
        after = [*triple.chosen_ids, *triple.end_ids] if row.objective == "mle" else [triple.end_ids[0]]
        tail = row.input_ids[seam:]
        assert tail == after[: len(tail)], case
        # nothing is lost but what `num_truncated` counts, from the end
        harmful_cut = len(triple.rejected_ids) - row.prefix_length if row.objective == "rto" else 0
        assert len(after) - len(tail) + harmful_cut == row.num_truncated, case


def test_nothing_is_cut_that_would_have_fitted():
    for case, row in ROWS:
        if row.num_truncated:
            assert len(row.input_ids) == case.max_length, case


def test_an_mle_row_always_trains_the_start_of_the_refusal():
    for case, row in ROWS:
        if row.objective == "mle":
            trained = [label for label in row.labels if label != IGNORE_INDEX]
            assert trained[0] == case.triple.chosen_ids[0], case
            assert row.prefix_length == 0 or len(trained) == len(case.triple.chosen_ids) + len(case.triple.end_ids), (
                case
            )


def test_a_word_prefix_ends_with_a_word():
    for case, row in ROWS:
        if row.objective == "mle" and case.config.prefix_unit == "word":
            assert row.prefix_length in (0, *case.triple.word_ends), case


def test_rto_stands_on_the_harmful_answer_its_end_and_the_asked_for_turns_and_nowhere_else():
    for case, row in ROWS:
        start = len(case.triple.prompt_ids)
        allowed = set(range(start, len(row.input_ids)))
        if case.config.rto_turns == "all":
            allowed |= {place for span in case.triple.earlier_turns for place in range(*span)}
        places = {place for place, is_rto in enumerate(row.rto_mask) if is_rto}
        if row.objective == "mle":
            assert not places, case
        elif case.config.rto_keep_ratio == 1.0:
            assert places == allowed, case
        else:
            assert places, case
            assert places <= allowed, case


def test_number_and_kinds_of_rows():
    for case in CASES:
        objectives = [row.objective for row in case.rows()]
        mle, rest = objectives[: case.config.num_prefixes], objectives[case.config.num_prefixes :]
        assert mle == ["mle"] * case.config.num_prefixes, case
        assert rest in ([], ["rto"]), case
        if case.config.method != "derta" or case.config.rto_ratio == 0.0:
            assert rest == [], case
        elif case.config.rto_ratio == 1.0:
            assert rest == ["rto"], case


def test_rows_are_the_same_for_the_same_seed_epoch_and_index():
    for case in CASES:
        assert case.rows() == case.rows(), case


def test_the_number_of_rows_does_not_depend_on_the_epoch():
    """A sampler that is told the number of rows once must stay right in every epoch."""
    for case in CASES:
        numbers = {len(case.rows(epoch=epoch)) for epoch in range(4)}
        assert len(numbers) == 1, case


def test_another_epoch_draws_other_prefixes():
    same = different = 0
    for case in CASES:
        if case.config.method != "vanilla" and case.config.zero_prefix_ratio == 0.0 and case.max_length is None:
            lengths = [
                [row.prefix_length for row in case.rows(epoch=epoch) if row.objective == "mle"] for epoch in (0, 1)
            ]
            same += lengths[0] == lengths[1]
            different += lengths[0] != lengths[1]
    assert different > same > 0  # lengths 0 and 1 leave no choice


@pytest.mark.parametrize("knob", ["rto_keep_ratio", "rto_ratio", "rto_turns"])
def test_rto_knobs_do_not_move_the_prefixes(knob):
    """Runs that differ in RTO alone train the same MLE rows."""
    values = {"rto_keep_ratio": 0.5, "rto_ratio": 0.0, "rto_turns": "all"}
    for case in CASES[:500]:
        plain, changed = (
            [row for row in case.rows(config=config) if row.objective == "mle"]
            for config in (case.config, replace(case.config, **{knob: values[knob]}))
        )
        assert plain == changed, case
