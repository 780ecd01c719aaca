"""
Who sees whom in the branch layout, from position ids and branch ids alone: as a mask, as a FlexAttention rule, and as
attention segment by segment, which needs no mask over the whole row.

A *document* (a row of the dataset, or padding) begins where position and branch are 0; a *segment* is its trunk
(branch 0) or one of its branches. A token sees the tokens of its own segment up to itself, and those of the trunk that
come before the position at which its branch begins. In plain, packed and padding-free rows without a branch that is
causal attention within each row.

Shape letters used in this file: B batch, S sequence, H heads, D size of a head, N segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def branch_mask(position_ids: Tensor, branch_ids: Tensor, *, sliding_window: int | None = None) -> Tensor:
    """
    Mask for attention that takes one.

    Args:
        position_ids: (B, S) int64, from `core.branch_layout.positions`.
        branch_ids: (B, S) int64, likewise.
        sliding_window: How many positions a token looks back over, itself included; positions, not places in the row,
            in which a branch may stand far behind its parent. None: all.

    Returns:
        (B, 1, S, S) bool, true where the query of dimension 2 sees the key of dimension 3.
    """
    sees = branch_rule(position_ids, branch_ids, sliding_window=sliding_window)
    batch, places = torch.arange(len(position_ids)), torch.arange(position_ids.shape[1])
    batch, places = batch.to(position_ids.device), places.to(position_ids.device)
    return sees(batch[:, None, None], None, places[None, :, None], places[None, None, :])[:, None]


def branch_rule(
    position_ids: Tensor, branch_ids: Tensor, *, sliding_window: int | None = None
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """
    The rule of `branch_mask` as a `mask_mod` for `torch.nn.attention.flex_attention.create_block_mask`.

    Args:
        position_ids: As in `branch_mask`.
        branch_ids: As in `branch_mask`.
        sliding_window: As in `branch_mask`.
    """
    place = _Places.of(position_ids, branch_ids)

    def sees(batch: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        is_own = (place.segment[batch, query] == place.segment[batch, key]) & (key <= query)
        is_trunk = (place.document[batch, query] == place.document[batch, key]) & (branch_ids[batch, key] == 0)
        seen = is_own | (is_trunk & (position_ids[batch, key] < place.departure[batch, query]))
        if sliding_window is None:
            return seen
        return seen & (position_ids[batch, query] - position_ids[batch, key] < sliding_window)

    return sees


def segment_table(position_ids: Tensor, branch_ids: Tensor) -> Tensor:
    """
    The segments of one row, for `segment_attention`.

    Args:
        position_ids: (1, S) int64.
        branch_ids: (1, S) int64.

    Returns:
        (1, 1, N, 4) int32: where a segment starts, its length, where its document starts, and how many tokens of its
        trunk it sees. Four dimensions, so that `transformers` hands it to attention as it does a mask of its user's.

    Raises:
        ValueError: If there is more than one row: flatten the batch.

    Example:
        >>> segment_table(torch.tensor([[0, 1, 2, 1, 2, 0, 1]]), torch.tensor([[0, 0, 0, 1, 1, 0, 0]])).tolist()
        [[[[0, 3, 0, 0], [3, 2, 0, 1], [5, 2, 5, 0]]]]
    """
    if position_ids.shape[0] != 1 or position_ids.shape != branch_ids.shape:
        raise ValueError(
            f"Segments are of one flattened row, got position_ids {tuple(position_ids.shape)} and branch_ids "
            f"{tuple(branch_ids.shape)}; both must be (1, S)."
        )
    place = _Places.of(position_ids, branch_ids)
    starts = place.segment_start[0].unique()
    lengths = torch.diff(starts, append=starts.new_tensor([position_ids.shape[1]]))
    columns = (starts, lengths, place.document_start[0, starts], place.departure[0, starts])
    return torch.stack(columns, dim=-1).to(torch.int32)[None, None]


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """
    Attention of one row, segment by segment: as much work as its tokens need, and no mask over the row.

    The keys of a branch, the trunk's part and its own, follow one another without a gap, so that a causal mask and a
    sliding window over them are those of the separate row.

    Args:
        query: (1, H, S, D).
        key: (1, H_kv, S, D) with H a multiple of H_kv.
        value: (1, H_kv, S, D).
        table: (1, 1, N, 4), from `segment_table`.
        scaling: Factor of the scores; None is 1 / sqrt(D).
        sliding_window: As in `branch_mask`.
        dropout: Probability of dropping an attention weight.

    Returns:
        (1, S, H, D), as the projection behind it wants it.
    """
    is_grouped = query.shape[1] != key.shape[1]
    segments = table[0, 0].tolist()
    # split once: the gradient of a slice is as large as what it is a slice of
    queries, all_keys, all_values = (
        part.split([length for _, length, _, _ in segments], dim=2) for part in (query, key, value)
    )
    outputs, trunk = [], 0
    for place, (start, length, trunk_start, trunk_length) in enumerate(segments):
        trunk = place if start == trunk_start else trunk
        keys, values = (
            torch.cat([parts[trunk][:, :, :trunk_length], parts[place]], dim=2) if trunk_length else parts[place]
            for parts in (all_keys, all_values)
        )
        mask = _causal_mask(length, trunk_length, sliding_window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[place],
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=is_grouped,
            )
        )
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


@dataclass(frozen=True)
class _Places:
    """Of each token, (B, S): number of its document and segment, where they start, the position a branch begins at."""

    document: Tensor
    segment: Tensor
    document_start: Tensor
    segment_start: Tensor
    departure: Tensor

    @classmethod
    def of(cls, position_ids: Tensor, branch_ids: Tensor) -> _Places:
        starts_document = (position_ids == 0) & (branch_ids == 0)
        starts_segment = starts_document.clone()
        starts_segment[:, 1:] |= branch_ids[:, 1:] != branch_ids[:, :-1]
        places = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
        document_start = torch.where(starts_document, places, 0).cummax(dim=1).values
        segment_start = torch.where(starts_segment, places, 0).cummax(dim=1).values
        departure = torch.where(branch_ids == 0, 0, position_ids.gather(1, segment_start))
        return cls(
            starts_document.cumsum(dim=1), starts_segment.cumsum(dim=1), document_start, segment_start, departure
        )


def _causal_mask(length: int, trunk_length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """(length, trunk_length + length) bool, aligned at the ends; None where plain causal attention is the same."""
    reaches_all = sliding_window is None or trunk_length + length <= sliding_window
    if reaches_all and trunk_length == 0:
        return None
    mask = torch.ones(length, trunk_length + length, dtype=torch.bool, device=device).tril_(trunk_length)
    return mask if reaches_all else mask.triu_(trunk_length - sliding_window + 1)
