"""
What DeRTa adds to a `transformers.Trainer`, whichever host it belongs to: counts of the whole step, the loss, its log.

`DeRTaLogMixin` counts and logs, for hosts that compute the loss in their own way (TRL). `DeRTaLossMixin` also computes
it, for hosts that leave that to `Trainer` (Axolotl, LLaMA-Factory).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from derta_plugins.adapters.collator import RTOMaskCollator
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.losses import (
    DeRTaLoss,
    count_targets,
    derta_loss,
    fused_denominator,
    loss_components,
    per_token_nll,
)

logger = logging.getLogger(__name__)


class DeRTaLogMixin:
    """
    Keeps `rto_mask`, counts the targets of an optimizer step and logs the components of its loss; stands before a
    `Trainer` among the base classes.

    Attributes:
        host_version: Host and version, for error messages.
        is_loss_fused: Whether the model computes its loss without logits, so that the components are not known.
    """

    host_version = "the host"
    is_loss_fused = False
    _eval_prefix = "eval"
    _derta: DeRTaConfig
    _sums: dict[str, torch.Tensor]

    def _start_derta(self, config: DeRTaConfig) -> None:
        """Set what this class needs; call it before the host's `__init__`."""
        self._derta, self._sums, self._contract_checked = config, {}, False

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "rto_mask" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "rto_mask"]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """(3,) counts of the whole optimizer step, over its micro-batches and all ranks; see `count_targets`."""
        if not batch_samples:
            return None
        counts = torch.stack([count_batch(batch) for batch in batch_samples]).sum(dim=0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.unsqueeze(0)).sum(dim=0)
        # ranks that are given the same batch count it once
        return counts / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def _check_contract(self, expected: torch.Tensor, loss: torch.Tensor, *, is_step: bool) -> None:
        """Once a run: the host must return the loss that it was given, times its factor for ranks."""
        if self._contract_checked:
            return
        factor = self.accelerator.num_processes // self.get_tp_size() if is_step else 1
        torch.testing.assert_close(
            loss.detach().float(),
            expected.detach().float() * factor,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text: f"{self.host_version} changed DeRTa's loss; this version is not supported. {text}",
        )
        self._contract_checked = True

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # `predict` logs nothing; its sums must not go into the next evaluation
        self._sums.pop("eval", None)
        self._eval_prefix = kwargs.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*args, **kwargs)

    def _add_to_log(self, sums: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        # Counts outgrow what float32 holds exactly within one logging window of a large run.
        sums = sums if sums.device.type == "mps" else sums.double()
        self._sums[mode] = sums if mode not in self._sums else self._sums[mode] + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `mle_loss`, `rto_loss`, `p_refusal`, `mle_tokens`, `rto_tokens` since the last log, over all ranks."""
        mode = "train" if self.model.training else "eval"
        sums = self._sums.pop(mode, None)
        if sums is not None:
            components = loss_components(self.accelerator.reduce(sums, reduction="sum"))
            if self.is_loss_fused:
                components = {name: components[name] for name in ("mle_tokens", "rto_tokens")}
            prefix = f"{self._eval_prefix}_" if mode == "eval" else ""
            logs.update({f"{prefix}{name}": value for name, value in components.items()})
        super().log(logs, start_time)


class DeRTaLossMixin(DeRTaLogMixin):
    """
    `Trainer` with DeRTa's loss, through its own `compute_loss_func`, and a collator that carries `rto_mask`.

    Where the model computes a fused loss and builds no logits (`is_loss_fused`), the targets are left to it: they are
    DeRTa's already, and only the denominator is ours. The components are not separate then.
    """

    def _finish_derta(self) -> None:
        """Take over loss and collators; call it after the host's `__init__`."""
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs in one process: `nn.DataParallel` cannot count the targets of a step. Start "
                "one process per GPU (torchrun, accelerate), or show this one a single GPU."
            )
        if getattr(self.model.config, "output_router_logits", False):
            raise ConfigError("`output_router_logits` adds a router loss, which DeRTa's loss would lose. Turn it off.")
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ConfigError("The host sets another loss (or label smoothing), which would replace DeRTa's. Unset it.")
        if not self.args.average_tokens_across_devices:
            raise ConfigError("`average_tokens_across_devices` must be true with DeRTa: targets count over all ranks.")
        self.compute_loss_func = None if self.is_loss_fused else self._score
        # `Trainer` hands the counts of the step to the model as they are; only a fused loss may be given them, by us
        self.model_accepts_loss_kwargs = self.is_loss_fused
        for name in ("data_collator", "eval_data_collator", "train_data_collator"):
            collator = getattr(self, name, None)
            if collator is not None and not isinstance(collator, RTOMaskCollator):
                setattr(self, name, RTOMaskCollator(collator))
        if self.is_loss_fused:
            logger.warning(
                "The model computes a fused loss and builds no logits: the loss is DeRTa's, but `mle_loss`, `rto_loss` "
                "and `p_refusal` are not logged apart. Turn the fused loss off to see them."
            )

    def _check_has_rows(self, name: str, dataset: Any) -> None:
        """Refuse a dataset of rows that lost their `rto_mask`."""
        if isinstance(dataset, Dataset) and "rto_mask" not in dataset.column_names:
            raise ValueError(
                f"The {name} dataset has no column `rto_mask` (it has {dataset.column_names}): none of its rows comes "
                "from DeRTa's safety records. Name them in the host's config, or train without DeRTa."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """DeRTa's loss, inside the host's own `compute_loss`."""
        check_batch(inputs)
        counts = count_batch(inputs) if num_items_in_batch is None else num_items_in_batch
        inputs, is_step = dict(inputs), num_items_in_batch is not None
        rto_mask = inputs.pop("rto_mask")
        if self.is_loss_fused:
            mle_tokens, rto_tokens, _ = count_targets(inputs["labels"], rto_mask)
            self._add_to_log(torch.stack([zero := mle_tokens * 0, zero, mle_tokens, rto_tokens, zero]))
            step = fused_denominator(counts, self._derta) if is_step else None
            return super().compute_loss(model, inputs, return_outputs, step)
        self._micro_batch, self._scored = (rto_mask, counts), None
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._scored is None:
            raise RuntimeError(f"{self.host_version} did not compute DeRTa's loss; this version is not supported.")
        self._check_contract(self._scored.loss, result[0] if return_outputs else result, is_step=is_step)
        self._add_to_log(self._scored.sums)
        return result

    def _score(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """`Trainer`'s `compute_loss_func`."""
        rto_mask, counts = self._micro_batch
        if getattr(outputs, "logits", None) is None:
            raise RuntimeError("The model built no logits: turn its fused loss off, or tell DeRTa of it.")
        self._scored: DeRTaLoss | None = derta_loss(
            per_token_nll(outputs.logits, labels),
            labels[:, 1:] != IGNORE_INDEX,
            rto_mask[:, 1:],
            counts=counts.to(labels.device),
            normalization=self._derta.normalization,
            rto_weight=self._derta.rto_weight,
        )
        return self._scored.loss.clone()  # the host scales it in place


def check_batch(batch: Mapping[str, Any]) -> None:
    """Refuse a batch that lost its `rto_mask`."""
    if "rto_mask" not in batch:
        raise ValueError(f"The batch has no `rto_mask` (it has {sorted(batch)}): another collator replaced DeRTa's.")


def count_batch(batch: Mapping[str, Any]) -> torch.Tensor:
    """`count_targets` of a collated batch, whose sequences begin where positions do, if it is packed or flattened."""
    check_batch(batch)
    position_ids = batch.get("position_ids")
    if position_ids is not None and position_ids.shape != batch["labels"].shape:
        position_ids = None
    return count_targets(batch["labels"], batch["rto_mask"], position_ids=position_ids)
