"""
A host's collator, with DeRTa's columns carried through it: padded, packed or flattened as the host does with `labels`.

`rto_mask` marks the RTO targets. In the branch layout `branch_starts` becomes `position_ids` and `branch_ids`, by which
the model sees who may see whom (`core.branch_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch

from derta_plugins.core.branch_layout import positions
from derta_plugins.core.config import Layout
from derta_plugins.core.constants import IGNORE_INDEX

_OUR_COLUMNS = frozenset({"rto_mask", "branch_starts"})


class RowCollator:
    """
    Calls the host's collator without DeRTa's columns, and lays them out like its `labels`.

    Hosts pad, pack and flatten in their own ways; what is common to all is that `labels` come out as one row per
    example, per pack of examples, or as a single row of everything.

    Args:
        collator: The host's collator. Its `tokenizer.padding_side`, where it has one, tells where it pads.
        layout: `branch` makes position ids and branch ids for all rows.

    Raises:
        ValueError: When called, if a row has no final labels or no `rto_mask`, if branch rows come without the branch
            layout, or the host's `labels` do not fit the rows.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]], layout: Layout = "rows") -> None:
        self.collator, self.layout = collator, layout

    def __getattr__(self, name: str) -> Any:
        # hosts look at attributes of their collator, such as `tokenizer`; `collator` is missing while unpickling
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    @property
    def _padding_side(self) -> str:
        # a collator that flattens has no tokenizer, and nothing to pad
        return getattr(getattr(self.collator, "tokenizer", None), "padding_side", "right")

    def __call__(self, features: list[Any], *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Batch of the host with `rto_mask` (B, S) bool, and in the branch layout the ids of `lay_out_branches`."""
        packs = [feature if isinstance(feature, list) else [feature] for feature in features]
        masks = [list(chain.from_iterable(map(row_mask, pack))) for pack in packs]
        starts = [[row_branch_starts(row, self.layout) for row in pack] for pack in packs]
        rows = [[{key: row[key] for key in row if key not in _OUR_COLUMNS} for row in pack] for pack in packs]
        is_packed = bool(features) and isinstance(features[0], list)
        batch = self.collator(rows if is_packed else [row for (row,) in rows], *args, **kwargs)
        if len(batch["labels"]) == 1:
            masks, starts = [list(chain.from_iterable(masks))], [list(chain.from_iterable(starts))]
        batch["rto_mask"] = lay_out(masks, batch["labels"], side=self._padding_side)
        if self.layout == "branch":
            lay_out_branches(batch, starts, side=self._padding_side)
        return batch


def row_mask(row: Mapping[str, Any]) -> list[bool]:
    """
    The row's own `rto_mask`; an ordinary row, whose mask is None, has no RTO.

    Raises:
        ValueError: If the row lost a column, or its columns differ in length.
    """
    missing = [name for name in ("input_ids", "labels", "rto_mask") if name not in row]
    if missing:
        raise ValueError(
            f"A row lost {missing} before batching; it has {sorted(row)}. DeRTa trains final labels only: keep the "
            "columns input_ids, labels and rto_mask."
        )
    length = len(row["input_ids"])
    if row["rto_mask"] is None:
        return [False] * length
    if len(row["rto_mask"]) != length or len(row["labels"]) != length:
        lengths = {name: len(row[name]) for name in ("input_ids", "labels", "rto_mask")}
        raise ValueError(f"A row has columns of different lengths: {lengths}. They must be one token each.")
    return [bool(value) for value in row["rto_mask"]]


def row_branch_starts(row: Mapping[str, Any], layout: Layout) -> list[int]:
    """
    The row's own `branch_starts`; an ordinary row, whose `rto_mask` or `branch_starts` is None, has no branch.

    Raises:
        ValueError: If the layout and the row do not fit together, or the row's columns differ in length.
    """
    length, starts = len(row["input_ids"]), row.get("branch_starts")
    if layout == "branch" and starts is None and any(row["rto_mask"] or ()):
        raise ValueError(
            f"A row of the branch layout lost `branch_starts` before batching; it has {sorted(row)}. Without it a safe "
            "response would follow the whole harmful one."
        )
    if starts is None:
        return [0] * length
    if len(starts) != length:
        raise ValueError(f"A row has {length} tokens, but {len(starts)} `branch_starts`. They must be one token each.")
    if layout != "branch" and any(starts):
        raise ValueError(
            "A row has branches, but the layout is 'rows': prepare the rows again, or set layout='branch'."
        )
    return [int(start) for start in starts]


def lay_out(values: Sequence[Sequence[bool]], labels: torch.Tensor, *, side: str = "right") -> torch.Tensor:
    """
    (B, S) bool tensor of RTO masks, padded on `side` to the width of the (B, S) `labels`.

    Raises:
        ValueError: If the masks do not fit the labels, or an RTO position has no target in them.
    """
    laid_out = torch.zeros_like(labels, dtype=torch.bool)
    for row, mask, place in _places(values, labels, side):
        laid_out[row, place] = torch.tensor(mask, dtype=torch.bool)
    if (labels[laid_out] == IGNORE_INDEX).any():
        raise ValueError("The host's collator moved or dropped labels: an RTO position has no target any more.")
    return laid_out


def lay_out_branches(
    batch: MutableMapping[str, Any], starts: Sequence[Sequence[Sequence[int]]], *, side: str = "right"
) -> None:
    """
    Put `position_ids` and `branch_ids`, (B, S) int64, into a collated batch.

    A row's positions begin at 0 with branch 0, also within a pack; padding is a row of its own. The first token of a
    row is no target, whatever stands before it.

    Args:
        batch: Has (B, S) `labels`, which are changed in place.
        starts: For each row of the batch the `branch_starts` of each row packed into it.
        side: Where the padding is.

    Raises:
        ValueError: If the rows do not fit the labels.
    """
    labels = batch["labels"]
    position_ids, branch_ids = torch.zeros_like(labels), torch.zeros_like(labels)
    flat = [list(chain.from_iterable(pack)) for pack in starts]
    for row, tokens, place in _places(flat, labels, side):
        position_ids[row] = torch.arange(labels.shape[1]) - (len(tokens) if side == "right" else 0)
        ids = [positions(of_row) for of_row in starts[row]]
        for target, values in zip((position_ids, branch_ids), zip(*ids, strict=True), strict=True):
            target[row, place] = torch.tensor(list(chain.from_iterable(values)))
    labels[(position_ids == 0) & (branch_ids == 0)] = IGNORE_INDEX
    batch["position_ids"], batch["branch_ids"] = position_ids, branch_ids


def _places(
    values: Sequence[Sequence[Any]], labels: torch.Tensor, side: str
) -> Iterator[tuple[int, Sequence[Any], slice]]:
    """For each row of a batch its number, the values of its tokens, and where they stand among its padding."""
    width = labels.shape[1]
    if len(values) != len(labels) or any(len(row) > width for row in values):
        raise ValueError(
            f"The host's collator made labels of shape {tuple(labels.shape)} of {len(values)} rows of lengths "
            f"{[len(row) for row in values]}: DeRTa cannot tell which of them are RTO targets."
        )
    for number, row in enumerate(values):
        yield number, row, slice(width - len(row), None) if side == "left" else slice(len(row))
