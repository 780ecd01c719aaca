"""
The branch layout: the rows of a triple in one sequence, which holds what they share only once.

The RTO row is the trunk: prompt and harmful response, with its targets. Each MLE row leaves it as a branch after its
harmful prefix, begins with the token that it leaves at, *repeated*, and goes on with the safe response. The repeated
parent gives every position one target, so that the ordinary shifted loss over `labels` is exactly that of the rows:
the label in its place is the last one of the segment before it, whose own last token nothing needs to see.

A token sees what it would see in its own row: of the trunk its prefix, of the branches its own. `core.branch_attention`
makes that of the position ids and branch ids of `positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.transform import Row


def fold_rows(rows: Sequence[Row], *, max_length: int | None = None) -> list[Row]:
    r"""
    The same rows with as many MLE rows as fit folded into the RTO row.

    Args:
        rows: Rows of one triple, as a transform made them.
        max_length: Longest row. A branch row is longer than the rows in it; those that would make it too long stay
            rows of their own. None sets no limit.

    Returns:
        Rows with the same targets after the same tokens. Without exactly one RTO row, or where no MLE row begins as it
        does, they are as they were, the RTO row last. `branch_starts` of a branch row is the length of the trunk's
        part that a branch goes on from (at least 1), at the branch's first token, and 0 elsewhere.

    Source:
        Our own; the paper trains the rows apart. Shared prefixes with one departure: Wang and Hegde 2024, arXiv
        2410.20305.

    Example:
        >>> mle = Row([1, 2, 7, 5, 6, 0], [-100, -100, -100, 5, 6, 0], [False] * 6, "mle", 1)
        >>> rto = Row([1, 2, 7, 8, 0], [-100, -100, 5, 5, 5], [False] * 2 + [True] * 3, "rto", 2)
        >>> (row,) = fold_rows([mle, rto])
        >>> row.input_ids  # trunk without its end, then the repeated parent 7 and the safe response
        [1, 2, 7, 8, 7, 5, 6, 0]
        >>> row.labels  # behind 8 the end-of-turn slot of the trunk, whose target is the refusal token 5
        [-100, -100, 5, 5, 5, 5, 6, 0]
        >>> row.branch_starts
        [0, 0, 0, 0, 3, 0, 0, 0]
    """
    trunks = [row for row in rows if row.objective == "rto"]
    if len(trunks) != 1:
        return list(rows)
    folded, apart = trunks[0], []
    for row in rows:
        if row is trunks[0]:
            continue
        parent_end = _departure(row, trunks[0])
        grown = None if parent_end is None else _with_branch(folded, row, parent_end)
        if grown is None or (max_length is not None and len(grown.input_ids) > max_length):
            apart.append(row)
        else:
            folded = grown
    return [*apart, folded]


def positions(branch_starts: Sequence[int]) -> tuple[list[int], list[int]]:
    """
    Position ids and branch ids of one row.

    Args:
        branch_starts: (S,) as in `fold_rows`; all zero in an ordinary row.

    Returns:
        Two lists of S: positions, which a branch counts on from its parent, and the number of the branch, 1 and up in
        the order of the row; 0 on the trunk.

    Example:
        >>> positions([0, 0, 0, 0, 3, 0, 0, 0])
        ([0, 1, 2, 3, 2, 3, 4, 5], [0, 0, 0, 0, 1, 1, 1, 1])
    """
    position_ids, branch_ids = [], []
    position, branch = 0, 0
    for start in branch_starts:
        if start:
            position, branch = start - 1, branch + 1
        position_ids.append(position)
        branch_ids.append(branch)
        position += 1
    return position_ids, branch_ids


def _departure(row: Row, trunk: Row) -> int | None:
    """Tokens up to and including the one that the row's first target follows; None if the trunk begins otherwise."""
    first = next((place for place, label in enumerate(row.labels) if label != IGNORE_INDEX), 0)
    # the trunk's last token is dropped, so it can be no parent
    is_shared = 0 < first < len(trunk.input_ids) and row.input_ids[:first] == trunk.input_ids[:first]
    return first if is_shared else None


def _with_branch(folded: Row, row: Row, parent_end: int) -> Row:
    """`folded` and one branch more, whose first label is the last one of the segment before it."""
    place = parent_end - 1
    return replace(
        folded,
        input_ids=[*folded.input_ids[:-1], *row.input_ids[place:]],
        labels=[*folded.labels, *row.labels[parent_end:]],
        rto_mask=[*folded.rto_mask, *row.rto_mask[parent_end:]],
        branch_starts=[
            *(folded.branch_starts or [0] * len(folded.input_ids))[:-1],
            parent_end,
            *[0] * (len(row.input_ids) - parent_end),
        ],
        objective="branch",
        sources=(*(folded.sources or (folded,)), row),
    )
