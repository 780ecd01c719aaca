"""Folding rows into a branch row: each target after exactly the tokens that come before it in its own row."""

import random
from collections import Counter

import pytest

from derta_plugins.core.branch_layout import fold_rows, positions
from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.transform import Row, build_rows

REFUSAL = 5


def random_rows(seed: int, **knobs) -> tuple[list[Row], int | None]:
    """Rows of a random triple, and the max_length that they were built with."""
    draws = random.Random(seed)

    def ids(lowest: int, highest: int) -> tuple[int, ...]:
        return tuple(draws.randrange(6, 99) for _ in range(draws.randint(lowest, highest)))

    triple = TokenizedTriple(ids(1, 6), ids(1, 8), ids(1, 12), end_ids=(2, 3)[: draws.randint(1, 2)])
    max_length = draws.choice([None, None, len(triple.prompt_ids) + draws.randint(1, 20)])
    config = DeRTaConfig(
        num_prefixes=draws.choice([1, 2, 4, 7]), rto_keep_ratio=draws.choice([1.0, 0.3]), seed=seed, **knobs
    )
    return build_rows(triple, config, refusal_token_id=REFUSAL, max_length=max_length), max_length


def targets_in_context(row: Row) -> Counter:
    """Each target with all that its prediction sees, and the position that it is predicted at."""
    starts = row.branch_starts or [0] * len(row.input_ids)
    position_ids, branch_ids = positions(starts)
    found: Counter = Counter()
    for place in range(1, len(row.input_ids)):
        if row.labels[place] == IGNORE_INDEX:
            continue
        seen = visible(place - 1, position_ids, branch_ids)
        context = tuple((position_ids[other], row.input_ids[other]) for other in seen)
        found[row.labels[place], row.rto_mask[place], position_ids[place - 1], tuple(sorted(context))] += 1
    return found


def visible(place: int, position_ids: list[int], branch_ids: list[int]) -> list[int]:
    """Places that a token sees, by the rule read aloud: its own branch up to itself, the trunk before its branch."""
    branch = branch_ids[place]
    own = [other for other in range(place + 1) if branch_ids[other] == branch]
    if branch == 0:
        return own
    begins = position_ids[own[0]]
    return [other for other in range(place) if branch_ids[other] == 0 and position_ids[other] < begins] + own


@pytest.mark.parametrize("block", range(4))
def test_every_target_keeps_its_context_and_position(block):
    folded_rows = 0
    for seed in range(500 * block, 500 * (block + 1)):
        rows, max_length = random_rows(seed)
        folded = fold_rows(rows, max_length=max_length)
        before, after = Counter(), Counter()
        for row in rows:
            before += targets_in_context(row)
        for row in folded:
            after += targets_in_context(row)
        assert before == after, seed
        assert all(max_length is None or len(row.input_ids) <= max_length for row in folded)
        folded_rows += sum(row.objective == "branch" for row in folded)
    assert folded_rows > 200


def test_the_contexts_are_those_of_plain_rows():
    """The check above reads contexts by a rule; in a row without branches that must be all tokens before."""
    row = Row([1, 2, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 7, 8], [False] * 4, "mle", 0)
    assert targets_in_context(row) == Counter(
        {(7, False, 1, ((0, 1), (1, 2))): 1, (8, False, 2, ((0, 1), (1, 2), (2, 7))): 1}
    )


def test_a_branch_row_holds_what_is_shared_once():
    triple = TokenizedTriple(tuple(range(10, 74)), tuple(range(100, 196)), tuple(range(200, 456)), end_ids=(2,))
    rows = build_rows(triple, DeRTaConfig(num_prefixes=4), refusal_token_id=REFUSAL)
    (row,) = fold_rows(rows)
    # per branch the repeated parent; the last segment alone keeps its end token
    assert len(row.input_ids) == 64 + 256 + 4 * (96 + 1) + 1
    assert sum(label != IGNORE_INDEX for label in row.labels) == 257 + 4 * 97
    assert sum(row.rto_mask) == 257
    assert row.sources == (rows[-1], *rows[:-1])


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["k of all lengths", "no prefix"])
def test_branches_leave_at_the_ends_too(share):
    seen = set()
    triple = TokenizedTriple((1, 2), (6, 7), (8, 9, 10), end_ids=(3,))
    for seed in range(40):
        rows = build_rows(triple, DeRTaConfig(zero_prefix_ratio=share, seed=seed), refusal_token_id=REFUSAL)
        (row,) = fold_rows(rows)
        seen |= {start - 2 for start in row.branch_starts if start}
    assert seen == ({0} if share else {1, 2, 3})


def test_what_does_not_fit_stays_a_row_of_its_own():
    triple = TokenizedTriple((1, 2), (6, 7), (8, 9, 10), end_ids=(3,))
    rows = build_rows(triple, DeRTaConfig(num_prefixes=3), refusal_token_id=REFUSAL)
    for max_length, apart in ((9, 2), (11, 2), (12, 1), (14, 1), (15, 0), (None, 0), (8, 3)):
        folded = fold_rows(rows, max_length=max_length)
        assert len(folded) == apart + 1, max_length
        assert [row.objective for row in folded[:-1]] == ["mle"] * apart
        assert folded[-1].objective == ("branch" if apart < 3 else "rto")


@pytest.mark.parametrize(
    "rows",
    [
        [Row([1, 7], [IGNORE_INDEX, 7], [False] * 2, "mle", 0)] * 2,
        [Row([1, 8], [IGNORE_INDEX, 5], [False, True], "rto", 1)] * 2,
        [
            Row([4, 7], [IGNORE_INDEX, 7], [False] * 2, "mle", 0),
            Row([1, 8], [IGNORE_INDEX, 5], [False, True], "rto", 1),
        ],
        [Row([7, 1], [7, 1], [False] * 2, "mle", 0), Row([7, 8], [IGNORE_INDEX, 5], [False, True], "rto", 1)],
        [
            Row([1, 8, 7], [IGNORE_INDEX, IGNORE_INDEX, 7], [False] * 3, "mle", 0),
            Row([1, 8], [IGNORE_INDEX, 5], [False, True], "rto", 1),
        ],
        [Row([1, 8], [IGNORE_INDEX, 5], [False, True], "rto", 1)],
        [],
    ],
    ids=["no trunk", "two trunks", "another prompt", "a target at the start", "goes on from the end", "alone", "none"],
)
def test_rows_that_share_nothing_stay_as_they_are(rows):
    assert fold_rows(rows) == rows


def test_positions_number_branches_and_go_on_from_the_parent():
    assert positions([0, 0, 0, 2, 0, 3, 0, 0, 1]) == ([0, 1, 2, 1, 2, 2, 3, 4, 0], [0, 0, 0, 1, 1, 2, 2, 2, 3])
    assert positions([0, 0, 0]) == ([0, 1, 2], [0, 0, 0])
    assert positions([]) == ([], [])
