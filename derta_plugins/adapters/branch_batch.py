"""From a collated batch of the branch layout to what the model is called with, and to rows where a model cannot."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from derta_plugins.adapters.branch_model import why_not
from derta_plugins.core.config import DeRTaConfig

logger = logging.getLogger(__name__)

# What flash attention is told of the sequences in a row: not of branches, so it must not reach a model.
_SEQUENCE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def layout_for(config: DeRTaConfig, model_config: Any) -> DeRTaConfig:
    """`config` with a layout that a model of `model_config` can train; says so if that is not the one asked for."""
    reason = why_not(model_config) if config.layout == "branch" else ""
    if not reason:
        return config
    logger.warning("layout='branch' is not for this model: %s Its rows are trained apart (layout='rows').", reason)
    return replace(config, layout="rows")


def flatten_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """
    A batch of the branch layout as one row of its tokens, without padding; position and branch ids tell rows apart.

    Args:
        batch: Has (B, S) `labels`, `position_ids` and `branch_ids`; (B, S) tensors are flattened, others kept. An
            `attention_mask` tells which tokens are padding; it is dropped, and with it what flash attention is told.

    Returns:
        (1, T) tensors, T the number of real tokens.
    """
    shape = batch["labels"].shape
    mask = batch.get("attention_mask")
    is_token = torch.ones(shape, dtype=torch.bool, device=batch["labels"].device) if mask is None else mask != 0
    dropped = ("attention_mask", *_SEQUENCE_LENGTHS)
    return {
        name: value[is_token][None] if isinstance(value, torch.Tensor) and value.shape == shape else value
        for name, value in batch.items()
        if name not in dropped
    }
