"""
What DeRTa adds to a `transformers.Trainer`, whichever host it belongs to: layout, counts of the whole step, loss, log.

`DeRTaStepMixin` lays out, counts and logs, for hosts that compute the loss in their own way (TRL). `DeRTaLossMixin`
also computes it, for hosts that leave that to `Trainer` (Axolotl, LLaMA-Factory).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset

from derta_plugins.adapters.branch_batch import flatten_batch
from derta_plugins.adapters.branch_model import BranchAttention
from derta_plugins.adapters.collator import RowCollator
from derta_plugins.adapters.scoring_head import (
    HeadNotScorableError,
    ScoredTargets,
    ScoringHead,
    cannot_score,
    is_prompt_learning,
    scoring,
)
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.losses import (
    DeRTaLoss,
    count_targets,
    derta_loss,
    fused_denominator,
    loss_components,
    per_token_nll,
    token_weights,
)

logger = logging.getLogger(__name__)


class DeRTaStepMixin:
    """
    Keeps DeRTa's columns, lays out batches and masks, counts the targets of an optimizer step and logs the components
    of its loss; stands before a `Trainer` among the base classes.

    Attributes:
        host_version: Host and version, for error messages.
        is_loss_fused: Whether the model computes its loss without logits, so that the components are not known.
    """

    host_version = "the host"
    is_loss_fused = False
    _eval_prefix = "eval"
    _derta: DeRTaConfig
    _sums: dict[str, torch.Tensor]
    _attention: BranchAttention | None = None

    def _start_derta(self, config: DeRTaConfig) -> None:
        """Set what this class needs; call it before the host's `__init__`."""
        self._derta, self._sums = config, {}
        self._contract_checked = self._attention_checked = False

    def _finish_layout(self) -> None:
        """Set the model's attention for the layout; call it after the host's `__init__`."""
        if self._derta.layout != "branch":
            return
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            raise ConfigError(
                "`compute_metrics` needs the logits of separate rows: leave it out, or set layout='rows'."
            )
        if is_prompt_learning(self.model):
            raise ConfigError("Virtual tokens have no place in branch rows: set layout='rows', or train with LoRA.")
        self._attention = BranchAttention.of(self.model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = [name for name in ("rto_mask", "branch_starts") if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *ours]

    def _laid_out(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as the layout wants it: branch rows in one row of tokens, where the model's attention can."""
        if self._attention is None:
            return dict(batch)
        if "branch_ids" not in batch:
            raise ValueError(
                f"The batch has no `branch_ids` (it has {sorted(batch)}): another collator replaced DeRTa's."
            )
        return flatten_batch(batch) if self._attention.flattens else dict(batch)

    def _check_attention(self, model: Any) -> None:
        """Once a run, with the model as it is trained."""
        if self._attention is not None and not self._attention_checked:
            self._attention.check(model, self.args.device)
            self._attention_checked = True

    def _with_masks(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with: in the branch layout, who sees whom as its attention takes it."""
        if self._attention is None:
            return inputs
        inputs, branch_ids = dict(inputs), inputs["branch_ids"]
        del inputs["branch_ids"]
        dtype = self.model.get_input_embeddings().weight.dtype
        inputs["attention_mask"] = self._attention.masks(inputs["position_ids"], branch_ids, dtype)
        return inputs

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
            equal_nan=True,
            msg=lambda text: f"{self.host_version} changed DeRTa's loss; this version is not supported. {text}",
        )
        self._contract_checked = True

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # `predict` logs nothing; its sums must not go into the next evaluation
        self._sums.pop("eval", None)
        self._eval_prefix = kwargs.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        """The host's, for losses; in the branch layout there are no logits of rows to predict with."""
        if self._attention is not None and not prediction_loss_only:
            raise ConfigError("`predict` needs the logits of separate rows: set layout='rows'.")
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

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


class DeRTaLossMixin(DeRTaStepMixin):
    """
    `Trainer` with DeRTa's loss, through its own `compute_loss_func`, and a collator that carries `rto_mask`.

    Where the model computes a fused loss and builds no logits (`is_loss_fused`), the targets are left to it: they are
    DeRTa's already, and only the denominator is ours. The components are not separate then.
    """

    _scores_in_head = True
    _is_loss_only = True

    def _finish_derta(self) -> None:
        """Take over loss and collators; call it after the host's `__init__`."""
        self._finish_layout()
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
            if collator is not None and not isinstance(collator, RowCollator):
                setattr(self, name, RowCollator(collator, self._derta.layout))
        self._scores_in_head = not (self.is_loss_fused or cannot_score(self.model, compiles=self.args.torch_compile))
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
        self._check_attention(model)
        counts = count_batch(inputs) if num_items_in_batch is None else num_items_in_batch
        inputs, is_step = self._with_masks(self._laid_out(inputs)), num_items_in_batch is not None
        rto_mask = inputs.pop("rto_mask")
        if self.is_loss_fused:
            mle_tokens, rto_tokens, _ = count_targets(inputs["labels"], rto_mask)
            self._add_to_log(torch.stack([zero := mle_tokens * 0, zero, mle_tokens, rto_tokens, zero]))
            step = fused_denominator(counts, self._derta) if is_step else None
            return super().compute_loss(model, inputs, return_outputs, step)
        self._micro_batch, self._scored = MicroBatch.of(inputs["labels"], rto_mask, counts, self._derta), None
        result = self._compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._scored is None:
            raise RuntimeError(f"{self.host_version} did not compute DeRTa's loss; this version is not supported.")
        self._check_contract(self._scored.loss, result[0] if return_outputs else result, is_step=is_step)
        self._add_to_log(self._scored.sums)
        return result

    def _compute_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """The host's `compute_loss`, with the targets scored in the model's head where logits are not asked for."""
        self._head = None
        if self._scores_in_head and (self.model.training or self._is_loss_only):
            try:
                with self._micro_batch.scoring(self.model) as self._head:
                    return super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
            except HeadNotScorableError as reason:
                logger.warning("DeRTa's loss is taken from full logits, which costs memory: %s", reason)
                self._scores_in_head, self._head = False, None
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        self._is_loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._is_loss_only = True

    def _score(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """`Trainer`'s `compute_loss_func`."""
        if getattr(outputs, "logits", None) is None:
            raise RuntimeError("The model built no logits: turn its fused loss off, or tell DeRTa of it.")
        if self._head is None:
            # virtual tokens stand before those of the batch
            self._scored = self._micro_batch.loss(per_token_nll(outputs.logits[:, -labels.shape[1] :], labels))
        else:
            self._scored = self._micro_batch.loss_of_head(self._head.read(outputs))
        return self._scored.loss.clone()  # the host scales it in place


@dataclass(frozen=True)
class MicroBatch:
    """
    The targets of one forward pass, and how they are weighed.

    Attributes:
        labels: (B, S) final targets.
        rto_mask: (B, S) bool.
        counts: (3,) of the whole step; see `count_targets`.
        config: Knobs.
    """

    labels: torch.Tensor
    rto_mask: torch.Tensor
    counts: torch.Tensor
    config: DeRTaConfig

    @classmethod
    def of(cls, labels: torch.Tensor, rto_mask: torch.Tensor, counts: torch.Tensor, config: DeRTaConfig) -> MicroBatch:
        """All on the device of the labels."""
        return cls(labels, rto_mask.to(labels.device), counts.to(labels.device), config)

    @property
    def label_mask(self) -> torch.Tensor:
        """(B, S - 1) bool, true where the next token is a target."""
        return self.labels[:, 1:] != IGNORE_INDEX

    @property
    def _reduction(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "normalization": self.config.normalization,
            "rto_weight": self.config.rto_weight,
        }

    def loss(self, nll: torch.Tensor) -> DeRTaLoss:
        """DeRTa's loss from (B, S - 1) losses of each next token."""
        masks = (mask.to(nll.device) for mask in (self.label_mask, self.rto_mask[:, 1:]))
        return derta_loss(nll, *masks, **{**self._reduction, "counts": self.counts.to(nll.device)})

    def scoring(self, model: Any, *, stats: bool = False) -> AbstractContextManager[ScoringHead]:
        """Let the head of `model` score these targets; see `adapters.scoring_head`."""
        targets = F.pad(self.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        rto_mask = F.pad(self.rto_mask[:, 1:], (0, 1))
        weights = token_weights(targets != IGNORE_INDEX, rto_mask, **self._reduction)
        return scoring(model, targets, weights, stats=stats)

    def loss_of_head(self, found: ScoredTargets) -> DeRTaLoss:
        """DeRTa's loss as the head has it, with its components."""
        return replace(self.loss(found.nll[:, :-1]), loss=found.total)


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
    branch_ids = batch.get("branch_ids")
    return count_targets(batch["labels"], batch["rto_mask"], position_ids=position_ids, branch_ids=branch_ids)
