"""Who sees whom: mask, rule and segments against the rule read aloud, and attention against separate rows."""

import math
from itertools import chain

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from derta_plugins.core.branch_attention import branch_mask, branch_rule, segment_attention, segment_table
from derta_plugins.core.branch_layout import positions

# two documents with branches, an ordinary one, padding, and a branch that leaves after the first token
ROWS = {
    "packed": [[0, 0, 0, 0, 3, 0, 0, 1, 0], [0, 0, 0], [0, 0, 0, 0, 0, 2, 0, 5, 0, 0], [0, 0]],
    "one of each": [[0, 0, 0, 0, 0, 4, 0, 0]],
    "no branch": [[0, 0, 0], [0]],
}


def ids_of(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = zip(*(positions(starts) for starts in rows), strict=True)
    return tuple(torch.tensor([list(chain.from_iterable(of_rows))]) for of_rows in parts)


def sees(query: int, key: int, rows: list[list[int]], window: int | None) -> bool:
    """The rule read aloud, from the rows themselves."""
    place = 0
    for starts in rows:
        here = range(place, place + len(starts))
        place += len(starts)
        if query not in here:
            continue
        if key not in here:
            return False
        position_ids, branch_ids = positions(starts)
        q, k = query - here.start, key - here.start
        if branch_ids[q] == branch_ids[k]:
            seen = k <= q
        else:
            leaves = position_ids[branch_ids.index(branch_ids[q])]
            seen = branch_ids[k] == 0 and position_ids[k] < leaves
        return seen and (window is None or position_ids[q] - position_ids[k] < window)
    raise AssertionError(query)


@pytest.mark.parametrize("window", [None, 1, 2, 3])
@pytest.mark.parametrize("name", ROWS)
def test_the_mask_is_the_rule_read_aloud(name, window):
    rows = ROWS[name]
    position_ids, branch_ids = ids_of(rows)
    mask = branch_mask(position_ids, branch_ids, sliding_window=window)
    length = position_ids.shape[1]
    assert mask.shape == (1, 1, length, length)
    expected = [[sees(query, key, rows, window) for key in range(length)] for query in range(length)]
    assert mask[0, 0].tolist() == expected
    assert mask[0, 0].diagonal().all()  # no query without a key, which would be NaN


def test_rows_of_a_batch_do_not_mix():
    both = [ids_of(ROWS["one of each"]), ids_of([[0, 0, 0, 2, 0, 0, 3, 0]])]
    position_ids, branch_ids = (torch.cat(parts) for parts in zip(*both, strict=True))
    mask = branch_mask(position_ids, branch_ids)
    for row, (positions_of_row, branches_of_row) in enumerate(both):
        assert torch.equal(mask[row], branch_mask(positions_of_row, branches_of_row)[0])


@pytest.mark.parametrize("window", [None, 2])
def test_flex_attention_is_given_the_same_rule(window):
    position_ids, branch_ids = ids_of(ROWS["packed"])
    length = position_ids.shape[1]
    rule = branch_rule(position_ids, branch_ids, sliding_window=window)
    made = create_mask(rule, 1, 1, length, length, device="cpu")
    assert torch.equal(made, branch_mask(position_ids, branch_ids, sliding_window=window))


def test_the_table_lists_the_segments():
    table = segment_table(*ids_of(ROWS["packed"]))
    assert table.dtype == torch.int32
    assert table[0, 0].tolist() == [
        *([0, 4, 0, 0], [4, 3, 0, 2], [7, 2, 0, 0]),
        [9, 3, 9, 0],
        *([12, 5, 12, 0], [17, 2, 12, 1], [19, 3, 12, 4]),
        [22, 2, 22, 0],
    ]


def test_segments_are_of_one_row():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"of one flattened row, got position_ids \(2, 3\)"):
        segment_table(ids, ids)
    with pytest.raises(ValueError, match=r"branch_ids \(1, 2\)"):
        segment_table(ids[:1], ids[:1, :2])


def plain_attention(query, key, value, mask, scaling):
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2) * scaling
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_segments_attend_as_under_the_mask(name, heads, window):
    torch.manual_seed(0)
    position_ids, branch_ids = ids_of(ROWS[name])
    length = position_ids.shape[1]
    inputs = [torch.randn(1, count, length, 8, dtype=torch.float64, requires_grad=True) for count in (*heads, heads[1])]
    table, mask = segment_table(position_ids, branch_ids), branch_mask(position_ids, branch_ids, sliding_window=window)
    outputs = [
        segment_attention(*inputs, table, scaling=0.3, sliding_window=window).transpose(1, 2),
        plain_attention(*inputs, mask, 0.3),
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-14)
    upstream = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, inputs, upstream) for output in outputs]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_dropout_reaches_the_weights():
    torch.manual_seed(0)
    table = segment_table(*ids_of(ROWS["packed"]))
    query = torch.ones(1, 1, table[0, 0, -1, :2].sum(), 4)
    dropped = segment_attention(query, query, query, table, dropout=0.5)
    kept = segment_attention(query, query, query, table)
    assert torch.equal(kept.transpose(1, 2), query)
    assert not torch.equal(dropped, kept)
