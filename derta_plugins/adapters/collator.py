"""A host's collator, with `rto_mask` carried through it: padded, packed or flattened as the host does with `labels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch

from derta_plugins.core.constants import IGNORE_INDEX


class RTOMaskCollator:
    """
    Calls the host's collator without `rto_mask`, and lays the mask out like its `labels`.

    Hosts pad, pack and flatten in their own ways; what is common to all is that `labels` come out as one row per
    example, per pack of examples, or as a single row of everything.

    Args:
        collator: The host's collator. Its `tokenizer.padding_side`, where it has one, tells where it pads.

    Raises:
        ValueError: When called, if a row has no final labels or no `rto_mask`, or the host's `labels` do not fit them.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

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
        """Batch of the host with `rto_mask` (B, S) bool beside `labels`."""
        packs = [feature if isinstance(feature, list) else [feature] for feature in features]
        masks = [list(chain.from_iterable(map(row_mask, pack))) for pack in packs]
        rows = [[{key: row[key] for key in row if key != "rto_mask"} for row in pack] for pack in packs]
        is_packed = bool(features) and isinstance(features[0], list)
        batch = self.collator(rows if is_packed else [row for (row,) in rows], *args, **kwargs)
        labels = batch["labels"]
        if len(labels) == 1:
            masks = [list(chain.from_iterable(masks))]
        batch["rto_mask"] = lay_out(masks, labels, side=self._padding_side)
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


def lay_out(masks: list[list[bool]], labels: torch.Tensor, *, side: str = "right") -> torch.Tensor:
    """
    (B, S) bool tensor of `masks`, padded on `side` to the width of the (B, S) `labels`.

    Raises:
        ValueError: If the masks do not fit the labels, or an RTO position has no target in them.
    """
    if len(masks) != len(labels) or any(len(mask) > labels.shape[1] for mask in masks):
        raise ValueError(
            f"The host's collator made labels of shape {tuple(labels.shape)} of {len(masks)} rows of lengths "
            f"{[len(mask) for mask in masks]}: DeRTa cannot tell which of them are RTO targets."
        )
    laid_out = torch.zeros_like(labels, dtype=torch.bool)
    for row, mask in zip(laid_out, masks, strict=True):
        place = slice(len(row) - len(mask), None) if side == "left" else slice(len(mask))
        row[place] = torch.tensor(mask, dtype=torch.bool)
    if (labels[laid_out] == IGNORE_INDEX).any():
        raise ValueError("The host's collator moved or dropped labels: an RTO position has no target any more.")
    return laid_out
