"""The rows of one triple, worked out by hand, and what the draws look like over many."""

import math
import random
from collections import Counter

import pytest

from derta_plugins.core.chat import TokenizedAuthorsRow, TokenizedTriple
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.records import BadRecordError
from derta_plugins.core.transform import Row, build_authors_row, build_rows, has_rto_row

I = IGNORE_INDEX  # noqa: E741
SORRY = 5
# prompt 1 2 3; safe 5 6; harmful 7 8 9 10; end-of-turn 0 and a layout token 4 after it
TRIPLE = TokenizedTriple((1, 2, 3), (5, 6), (7, 8, 9, 10), end_ids=(0, 4), word_ends=(2, 4))


def rows_of(triple=TRIPLE, *, max_length=None, index=0, epoch=0, **knobs):
    config = DeRTaConfig(**knobs)
    return build_rows(triple, config, refusal_token_id=SORRY, max_length=max_length, index=index, epoch=epoch)


def prefix_lengths(count, **knobs):
    """k of the MLE row of `count` records."""
    return [rows_of(index=index, **knobs)[0].prefix_length for index in range(count)]


# --- by hand ---------------------------------------------------------------------------------------------------------


def expected_mle_row(k):
    context = [1, 2, 3, 7, 8, 9, 10][: 3 + k]
    labels = [*[I] * len(context), 5, 6, 0, 4]
    return Row([*context, 5, 6, 0, 4], labels, [False] * len(labels), "mle", k, 0)


RTO_ROW = Row([1, 2, 3, 7, 8, 9, 10, 0], [I, I, I, 5, 5, 5, 5, 5], [False] * 3 + [True] * 5, "rto", 4, 0)


def test_the_two_rows_of_a_triple():
    """Every prefix length is drawn sooner or later, and each gives the row written down above."""
    seen = set()
    for index in range(60):
        mle, rto = rows_of(index=index)
        assert mle == expected_mle_row(mle.prefix_length)
        assert rto == RTO_ROW
        seen.add(mle.prefix_length)
    assert seen == {0, 1, 2, 3, 4}


def test_the_end_of_turn_slot_is_an_rto_target_too():
    """A harmful answer that is about to end can still be taken back; what a template prints after it is layout."""
    rto = rows_of()[1]
    assert rto.input_ids[-1] == 0
    assert rto.labels[-1] == SORRY
    assert rto.rto_mask[-1]


def test_the_first_rto_target_is_predicted_from_the_last_prompt_token():
    rto = rows_of()[1]
    assert rto.rto_mask.index(True) == len(TRIPLE.prompt_ids)


def test_vanilla_answers_right_after_the_prompt_and_has_no_rto():
    for index in range(20):
        assert rows_of(method="vanilla", zero_prefix_ratio=0.0, index=index) == [expected_mle_row(0)]


def test_recaug_has_prefixes_and_no_rto():
    rows = [rows_of(method="recaug", zero_prefix_ratio=0.0, index=index) for index in range(40)]
    assert all(len(row) == 1 for row in rows)
    assert {row[0].prefix_length for row in rows} == {1, 2, 3, 4}


@pytest.mark.parametrize("method", ["derta", "recaug"])
def test_recaug_and_derta_draw_the_same_prefixes(method):
    """So that the ablation of the paper compares like with like."""
    first = [rows_of(method=method, index=index)[0] for index in range(20)]
    assert first == [rows_of(index=index)[0] for index in range(20)]


def test_several_prefixes_per_triple_have_draws_of_their_own():
    rows = rows_of(num_prefixes=40)
    assert [row.objective for row in rows] == ["mle"] * 40 + ["rto"]
    assert len({row.prefix_length for row in rows[:-1]}) == 5


def test_word_prefixes_end_where_words_end():
    assert set(prefix_lengths(60, prefix_unit="word")) == {0, 2, 4}


def test_without_word_ends_a_word_prefix_is_empty():
    triple = TokenizedTriple((1, 2, 3), (5, 6), (7, 8, 9, 10), end_ids=(0,))
    assert rows_of(triple, prefix_unit="word", zero_prefix_ratio=0.0)[0].prefix_length == 0


def test_an_empty_harmful_response_gives_the_plain_refusal_and_one_rto_target():
    mle, rto = rows_of(TokenizedTriple((1, 2), (5, 6), (), end_ids=(0,)), zero_prefix_ratio=0.0)
    assert (mle.input_ids, mle.labels) == ([1, 2, 5, 6, 0], [I, I, 5, 6, 0])
    assert (rto.input_ids, rto.labels) == ([1, 2, 0], [I, I, SORRY])


def test_rto_on_all_turns_takes_earlier_answers_and_nothing_else():
    triple = TokenizedTriple((1, 20, 21, 0, 2, 22, 0, 3), (5, 6), (7, 8), end_ids=(0,), earlier_turns=((1, 4), (5, 7)))
    mle, rto = rows_of(triple, rto_turns="all", zero_prefix_ratio=1.0)
    assert rto.input_ids == [1, 20, 21, 0, 2, 22, 0, 3, 7, 8, 0]
    assert rto.labels == [I, 5, 5, 5, I, 5, 5, I, 5, 5, 5]
    assert rto.rto_mask == [label == SORRY for label in rto.labels]
    assert mle.labels == [I] * 8 + [5, 6, 0]
    last = rows_of(triple, rto_turns="last", zero_prefix_ratio=1.0)[1]
    assert last.labels == [I] * 8 + [5, 5, 5]


# --- max_length ------------------------------------------------------------------------------------------------------

# max_length: MLE answer and tokens lost there, RTO context and tokens lost there; zero_prefix_ratio=0 asks for a prefix
CUTS = {
    12: ([5, 6, 0, 4], 0, [7, 8, 9, 10, 0], 0),
    8: ([5, 6, 0, 4], 0, [7, 8, 9, 10, 0], 0),
    7: ([5, 6, 0, 4], 0, [7, 8, 9, 10], 1),
    6: ([5, 6, 0], 1, [7, 8, 9], 2),
    5: ([5, 6], 2, [7, 8], 3),
    4: ([5], 3, [7], 4),
}


@pytest.mark.parametrize("max_length", CUTS)
def test_the_harmful_response_is_shortened_first_then_the_end_of_the_safe_one(max_length):
    answer, mle_cut, harmful, rto_cut = CUTS[max_length]
    room_for_prefix = max(0, min(4, max_length - 3 - len(answer))) if not mle_cut else 0
    drawn = set()
    for index in range(40):
        mle, rto = rows_of(max_length=max_length, zero_prefix_ratio=0.0, index=index)
        k = mle.prefix_length
        assert mle.input_ids == [1, 2, 3, *[7, 8, 9, 10][:k], *answer]
        assert mle.labels == [*[I] * (3 + k), *answer]
        assert mle.num_truncated == mle_cut
        assert rto.input_ids == [1, 2, 3, *harmful]
        assert rto.labels == [I, I, I, *[SORRY] * len(harmful)]
        assert (rto.num_truncated, rto.prefix_length) == (rto_cut, min(4, len(harmful)))
        drawn.add(k)
    assert drawn == (set(range(1, room_for_prefix + 1)) or {0})


def test_a_word_prefix_that_does_not_fit_is_not_drawn():
    lengths = {
        rows_of(max_length=10, prefix_unit="word", zero_prefix_ratio=0.0, index=index)[0].prefix_length
        for index in range(30)
    }
    assert lengths == {2}


@pytest.mark.parametrize("max_length", [3, 2, 1])
def test_a_prompt_that_leaves_no_room_is_refused(max_length):
    with pytest.raises(
        BadRecordError, match=rf"is 3 tokens, .* no room for an answer in max_length={max_length}\."
    ) as caught:
        rows_of(max_length=max_length)
    assert caught.value.field == "prompt"


# --- draws -----------------------------------------------------------------------------------------------------------

LONG = TokenizedTriple((1,), (5, 6), tuple(range(10, 18)), end_ids=(0,), word_ends=(1, 3, 4, 8))
COUNT = 4000


def draws(**knobs):
    return Counter(rows_of(LONG, index=index, **knobs)[0].prefix_length for index in range(COUNT))


def assert_uniform(counts, values):
    """Chi-square; 4 degrees of freedom more than that number of standard deviations has probability < 1e-4."""
    expected = sum(counts.values()) / len(values)
    assert set(counts) == set(values)
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    degrees = len(values) - 1
    assert statistic < degrees + 4.5 * math.sqrt(2 * degrees)


def assert_share(count, total, share):
    """Within four standard deviations."""
    assert abs(count - share * total) <= 4 * math.sqrt(total * share * (1 - share))


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1 / 3, 0.9, 1.0])
@pytest.mark.parametrize(("unit", "values"), [("token", range(1, 9)), ("word", (1, 3, 4, 8))])
def test_share_of_empty_prefixes_and_uniform_rest(ratio, unit, values):
    counts = draws(zero_prefix_ratio=ratio, prefix_unit=unit)
    assert_share(counts.pop(0, 0), COUNT, ratio)
    if ratio < 1:
        assert_uniform(counts, values)


@pytest.mark.parametrize(("unit", "values"), [("token", range(9)), ("word", (0, 1, 3, 4, 8))])
def test_without_a_share_k_is_uniform_from_zero(unit, values):
    assert_uniform(draws(zero_prefix_ratio=None, prefix_unit=unit), values)


def test_the_draw_is_uniform_below_max_length():
    lengths = Counter(
        rows_of(LONG, index=i, max_length=9, zero_prefix_ratio=0.0)[0].prefix_length for i in range(COUNT)
    )
    assert_uniform(lengths, range(1, 6))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_share_of_triples_with_an_rto_row(ratio):
    config = DeRTaConfig(rto_ratio=ratio)
    has_rto = [has_rto_row(config, index) for index in range(COUNT)]
    assert_share(sum(has_rto), COUNT, ratio)
    for index in range(50):
        assert [row.objective for row in rows_of(index=index, rto_ratio=ratio)] == ["mle"] + ["rto"] * has_rto[index]
        assert len(rows_of(index=index, rto_ratio=ratio, epoch=1)) == 1 + has_rto[index]


def test_which_triples_have_an_rto_row_is_not_tied_to_their_prefix():
    """Else some prefix lengths, or the empty one, would stand beside RTO rows more often than others."""
    lengths = {has: Counter() for has in (False, True)}
    for index in range(COUNT):
        rows = rows_of(LONG, index=index, rto_ratio=0.5, zero_prefix_ratio=0.5)
        lengths[len(rows) == 2][rows[0].prefix_length] += 1
    for counts in lengths.values():
        assert_share(counts[0], counts.total(), 0.5)
        del counts[0]
        assert_uniform(counts, range(1, 9))


def test_draws_depend_on_seed_epoch_and_index_alone():
    def lengths(**options):
        return [rows_of(LONG, index=index, **options)[0].prefix_length for index in range(200)]

    def agreement(one, other):
        return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)

    random.seed(1)
    base = lengths(zero_prefix_ratio=0.0)
    random.seed(2)
    assert lengths(zero_prefix_ratio=0.0) == base
    # independent draws from 8 values agree in one of 8; 200 of them stay below 0.25 but for one in a million
    assert agreement(base, lengths(zero_prefix_ratio=0.0, epoch=1)) < 0.25
    assert agreement(base, lengths(zero_prefix_ratio=0.0, seed=1)) < 0.25
    assert agreement(base, base[1:] + base[:1]) < 0.25


def test_the_global_generator_is_left_alone():
    random.seed(0)
    before = random.getstate()
    rows_of(rto_keep_ratio=0.5, rto_ratio=0.5)
    assert random.getstate() == before


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 1 / 3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("length", [0, 1, 5, 19, 99])
def test_number_of_kept_rto_positions(length, ratio):
    triple = TokenizedTriple((1, 2), (5,), tuple(range(10, 10 + length)), end_ids=(0,))
    rto = rows_of(triple, rto_keep_ratio=ratio)[1]
    kept = [place for place, is_rto in enumerate(rto.rto_mask) if is_rto]
    assert len(kept) == max(1, math.ceil(ratio * (length + 1)))
    assert min(kept) >= 2
    assert [place for place, label in enumerate(rto.labels) if label != I] == kept


def test_kept_positions_are_uniform_over_the_places_and_drawn_anew_each_epoch():
    counts, epochs = Counter(), set()
    for index in range(COUNT):
        rto = rows_of(LONG, index=index, rto_keep_ratio=0.1)[1]
        counts.update(place for place, is_rto in enumerate(rto.rto_mask) if is_rto)
    for epoch in range(20):
        epochs.add(tuple(rows_of(LONG, epoch=epoch, rto_keep_ratio=0.1)[1].rto_mask))
    assert_uniform(counts, range(1, 10))
    assert len(epochs) > 3


def test_kept_positions_are_drawn_from_all_turns():
    triple = TokenizedTriple((1, 20, 0, 3), (5,), (7,), end_ids=(0,), earlier_turns=((1, 3),))
    kept = Counter()
    for index in range(COUNT):
        rto = rows_of(triple, index=index, rto_turns="all", rto_keep_ratio=0.25)[1]
        kept.update(place for place, is_rto in enumerate(rto.rto_mask) if is_rto)
    assert_uniform(kept, (1, 2, 4, 5))


# --- rows of the authors' file ---------------------------------------------------------------------------------------

AUTHORS_MLE = TokenizedAuthorsRow((1, 2, 7), (5, 6, 0), is_rto=False)
AUTHORS_RTO = TokenizedAuthorsRow((1, 2), (7, 8, 0), is_rto=True)


def authors_row(row, *, max_length=None, index=0, epoch=0, **knobs):
    config = DeRTaConfig(**knobs)
    (built,) = build_authors_row(row, config, refusal_token_id=SORRY, max_length=max_length, index=index, epoch=epoch)
    return built


def test_authors_rows_by_hand():
    assert authors_row(AUTHORS_MLE) == Row([1, 2, 7, 5, 6, 0], [I, I, I, 5, 6, 0], [False] * 6, "mle", 0, 0)
    expected = Row([1, 2, 7, 8, 0], [I, I, 5, 5, 5], [False, False, True, True, True], "rto", 2, 0)
    assert authors_row(AUTHORS_RTO) == expected


def test_authors_rows_are_cut_at_the_end():
    mle, rto = authors_row(AUTHORS_MLE, max_length=4), authors_row(AUTHORS_RTO, max_length=4)
    assert (mle.input_ids, mle.labels, mle.num_truncated) == ([1, 2, 7, 5], [I, I, I, 5], 2)
    assert (rto.input_ids, rto.labels, rto.num_truncated) == ([1, 2, 7, 8], [I, I, 5, 5], 1)
    assert rto.prefix_length == 2
    assert authors_row(AUTHORS_RTO, max_length=5).num_truncated == 0


@pytest.mark.parametrize("max_length", [3, 1])
def test_an_authors_prefix_that_leaves_no_room_is_refused(max_length):
    with pytest.raises(BadRecordError, match=rf"is 3 tokens, too many for max_length={max_length}\.") as caught:
        authors_row(AUTHORS_MLE, max_length=max_length)
    assert caught.value.field == "prefix"


def test_authors_rto_rows_keep_a_share_of_their_positions():
    row = TokenizedAuthorsRow((1, 2), tuple(range(10, 29)), is_rto=True)
    masks = {tuple(authors_row(row, rto_keep_ratio=0.1, epoch=epoch).rto_mask) for epoch in range(20)}
    assert {sum(mask) for mask in masks} == {2}
    assert not any(any(mask[:2]) for mask in masks)
    assert len(masks) > 5
    assert authors_row(row, rto_keep_ratio=0.1) == authors_row(row, rto_keep_ratio=0.1)
    others = {tuple(authors_row(row, rto_keep_ratio=0.1, index=index).rto_mask) for index in range(20)}
    assert len(others) > 5


@pytest.mark.parametrize("method", ["vanilla", "recaug"])
def test_baselines_cannot_be_built_from_the_authors_rows(method):
    with pytest.raises(ConfigError, match=rf"method='{method}' needs triples.*instruction / output / safe_response"):
        authors_row(AUTHORS_MLE, method=method)
