"""
DeRTa in TRL: `DeRTaSFTTrainer` and `DeRTaSFTConfig`, drop-ins for `SFTTrainer` and `SFTConfig`.

What is ours: safety records become rows, a collator carries `rto_mask`, and the loss is reduced by `derta_loss`. All
else (model loading, PEFT, ordinary rows, packing, the fused LM head, metrics, checkpoints) is TRL's own code.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain, islice
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedConfig, TrainerCallback
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from derta_plugins.adapters import row_datasets
from derta_plugins.adapters.branch_batch import layout_for
from derta_plugins.adapters.collator import lay_out, lay_out_branches, row_branch_starts, row_mask
from derta_plugins.adapters.prepare import SAFETY_COLUMNS, Preparation, RowCounts, prepare
from derta_plugins.adapters.row_datasets import ResampledRows
from derta_plugins.adapters.scoring_head import HeadNotScorableError, cannot_score, logit_changes
from derta_plugins.adapters.trainer_mixins import DeRTaStepMixin, MicroBatch, check_batch, count_batch
from derta_plugins.adapters.trl_config import (
    FUSED_HEAD_KNOWS,
    HAS_FUSED_LM_HEAD,
    NEWEST_TESTED,
    OLDEST_TESTED,
    DeRTaSFTConfig,
)
from derta_plugins.core.config import ConfigError, Layout
from derta_plugins.core.linear_nll import logit_stats
from derta_plugins.core.losses import per_token_nll
from derta_plugins.hookspecs import Adapter, hookimpl

if TYPE_CHECKING:
    from derta_plugins.core.losses import DeRTaLoss

__all__ = ["DeRTaDataCollator", "DeRTaSFTConfig", "DeRTaSFTTrainer", "derta_adapter"]

logger = logging.getLogger(__name__)


@hookimpl
def derta_adapter() -> Adapter:
    """TRL, for `derta doctor`."""
    how = "from derta_plugins.adapters.trl import DeRTaSFTConfig, DeRTaSFTTrainer"
    return Adapter("trl", "trl", OLDEST_TESTED, NEWEST_TESTED, how)


@dataclass
class DeRTaDataCollator(DataCollatorForLanguageModeling):
    """
    TRL's collator, which also pads or flattens DeRTa's columns. Rows without final labels are refused.

    Attributes:
        layout: Layout of the rows; the trainer sets it.
    """

    layout: Layout = "rows"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch with `rto_mask` (B, S) bool beside `labels`; in the branch layout see `lay_out_branches` too."""
        masks = [row_mask(example) for example in examples]
        starts = [_branch_starts_of_pack(example, self.layout) for example in examples]
        batch = super().torch_call(examples)
        if self.padding_free:
            masks, starts = [list(chain.from_iterable(masks))], [list(chain.from_iterable(starts))]
        batch["rto_mask"] = lay_out(masks, batch["labels"])
        if self.layout == "branch":
            lay_out_branches(batch, starts)
        return batch


def _branch_starts_of_pack(example: dict[str, Any], layout: Layout) -> list[list[int]]:
    """`branch_starts` of each row that TRL packed into an example."""
    starts = iter(row_branch_starts(example, layout))
    return [list(islice(starts, length)) for length in example.get("seq_lengths") or [len(example["input_ids"])]]


class DeRTaSFTTrainer(DeRTaStepMixin, SFTTrainer):
    """
    `SFTTrainer` that trains safety triples with DeRTa, beside ordinary rows.

    Args:
        model: As in `SFTTrainer`: a path, a name, or a model.
        args: `DeRTaSFTConfig`.
        train_dataset: Ordinary rows in any format of `SFTTrainer`, safety records (see `core.records`), or both in one
            in-memory dataset; told apart record by record.
        safety_dataset: Safety records, where they are a dataset of their own.
        boundary_dataset: Benign look-alikes of harmful prompts with helpful answers, in any format of `SFTTrainer`.
            They keep the model from refusing what only sounds harmful; `boundary_ratio` sets how many are taken.
        **kwargs: Everything else of `SFTTrainer`.

    Attributes:
        row_counts: What the training set was made of (in memory; a stream is not counted).
        refusal_token: The RTO target; None while there was no safety record.

    Raises:
        BadRecordError: If a safety record cannot be trained and `on_bad_record` is `error`.
        ConfigError: If a setting of the host and DeRTa exclude each other.
        ValueError: If a dataset is empty or a tokenised dataset has no `labels`.
    """

    host_version = f"TRL {trl.__version__}"
    _tag_names: ClassVar[list[str]] = ["trl", "sft", "derta"]
    _name = "DeRTa"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Refuse Whenever You Feel Unsafe: Improving Safety in LLMs via Decoupled Refusal Training",
        "id": "2407.09121",
    }

    def __init__(
        self,
        model: Any,
        args: DeRTaSFTConfig | None = None,
        *,
        train_dataset: Dataset | IterableDataset | None = None,
        safety_dataset: Dataset | IterableDataset | None = None,
        boundary_dataset: Dataset | None = None,
        data_collator: DeRTaDataCollator | None = None,
        **kwargs: Any,
    ) -> None:
        args = DeRTaSFTConfig("derta") if args is None else args
        if not isinstance(args, DeRTaSFTConfig):
            raise TypeError(f"`args` must be a `DeRTaSFTConfig`, got {type(args).__name__}: it holds the DeRTa knobs.")
        if data_collator is not None and not isinstance(data_collator, DeRTaDataCollator):
            raise TypeError(f"`data_collator` must be a `DeRTaDataCollator`, got {type(data_collator).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigError("`compute_loss_func` would replace DeRTa's loss; leave it out, or use `SFTTrainer`.")
        if train_dataset is None:
            train_dataset, safety_dataset = safety_dataset, None
        for name in ("train_dataset", "safety_dataset", "boundary_dataset"):
            _check_dataset(name, locals()[name])
        self.row_counts, self.refusal_token = RowCounts(), None
        self._start_derta(layout_for(args.derta_config(), _config_of(model, args)))
        self._extra_datasets, self._train_is_prepared = (safety_dataset, boundary_dataset), False
        super().__init__(model, args, data_collator=data_collator, train_dataset=train_dataset, **kwargs)
        self.data_collator = DeRTaDataCollator(**{**vars(self.data_collator), "layout": self._derta.layout})
        self._finish_layout()
        # Our loss divides by counts of the whole step: `Trainer` must count, and must not divide by its steps again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        # TRL's fused head scores the targets alone on a GPU, but every position on a CPU
        self._scores_in_head = HAS_FUSED_LM_HEAD and self.args.device.type == "cpu" and not self.aux_loss_enabled
        self._scores_in_head &= not cannot_score(self.model, compiles=self.args.torch_compile)
        self._needs_logits = bool(logit_changes(self.model.config) - FUSED_HEAD_KNOWS)
        self._check_target_is_in_vocabulary()
        if self.aux_loss_enabled and not HAS_FUSED_LM_HEAD:
            raise ConfigError("Before TRL 1.15 the router loss of a mixture of experts would get lost: upgrade TRL.")
        if isinstance(self.train_dataset, ResampledRows):
            self.add_callback(_SetEpoch(self.train_dataset))
        logger.info("DeRTa rows: %s", self.row_counts)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Rows of one dataset: ordinary records by TRL itself, safety records by DeRTa, packed by TRL."""
        columns = set(row_datasets.columns_of(dataset))
        if formatting_func is not None and SAFETY_COLUMNS & columns:
            raise ConfigError(
                "`formatting_func` would make ordinary text of safety records; give those as safety_dataset."
            )
        host = super()._prepare_dataset

        def host_rows(group: Dataset | IterableDataset) -> Dataset | IterableDataset:
            if args.completion_only_loss is None:  # TRL decides by the first record of one dataset; here are several
                self.completion_only_loss = {"prompt", "completion"} <= set(row_datasets.columns_of(group))
            return host(group, processing_class, args, False, formatting_func, dataset_name)

        how = Preparation(
            self._derta, self._tokenizer, host_rows, args.max_length, args.safety_probability, args.dataset_num_proc
        )
        # an evaluation set may be called "train" too
        is_train = dataset_name == "train" and not self._train_is_prepared
        safety, boundary = self._extra_datasets if is_train else (None, None)
        resample = is_train and self._derta.resample_each_epoch
        prepared = prepare(how, dataset, safety=safety, boundary=boundary, target=self.refusal_token, resample=resample)
        self.refusal_token = prepared.target or self.refusal_token
        if prepared.counts.skipped:
            logger.warning("Of the %s dataset: %s", dataset_name, prepared.counts)
        if is_train:
            self.row_counts, self._train_is_prepared = prepared.counts, True
        return self._pack_and_shuffle(prepared.rows, args, packing)

    @staticmethod
    def _pack_and_shuffle(rows, args, packing):
        if isinstance(rows, ResampledRows):  # shuffled by the sampler; packing is refused in the config
            return rows
        if args.shuffle_dataset:
            rows = rows.shuffle(seed=args.seed)
        return pack_dataset(rows, args.max_length, args.packing_strategy) if packing else rows

    def _check_target_is_in_vocabulary(self) -> None:
        size = self.model.config.get_text_config().vocab_size
        if self.refusal_token is not None and self.refusal_token.id >= size:
            raise ValueError(
                f"The refusal token {self.refusal_token.text!r} has id {self.refusal_token.id}, but the model has "
                f"{size} tokens: tokenizer and model do not belong together."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """DeRTa's loss, inside TRL's own `compute_loss`, which goes on to do the forward pass, metrics and scaling."""
        check_batch(inputs)
        self._check_attention(model)
        counts = count_batch(inputs) if num_items_in_batch is None else num_items_in_batch
        inputs, is_step = self._laid_out(inputs), num_items_in_batch is not None
        micro_batch = MicroBatch.of(inputs["labels"], inputs.pop("rto_mask"), counts, self._derta)
        scored = _ScoredModel(self, model, micro_batch, is_step=is_step)
        # `_ScoredModel` divides already, by the counts of the step: TRL is left to divide by one
        one = torch.ones((), device=self.args.device) if is_step else None
        result = super().compute_loss(scored, inputs, return_outputs, one)
        if scored.result is None:
            raise RuntimeError(f"{self.host_version} did not ask the model for a loss: this version is not supported.")
        if not self.aux_loss_enabled:
            self._check_contract(scored.result.loss, result[0] if return_outputs else result, is_step=is_step)
        self._add_to_log(scored.result.sums)
        return result


class _ScoredModel:
    """
    The model as TRL's `compute_loss` calls it, with DeRTa's loss in place of the model's own on the way out.

    TRL from 1.15 on takes minus the sum of `log_probs` over a divisor for the loss, so one number in their place, minus
    DeRTa's loss, becomes that loss. Before, TRL takes the model's `loss`. Entropy, accuracy and the auxiliary loss of
    experts stay TRL's.
    """

    def __init__(self, trainer: DeRTaSFTTrainer, model: Any, micro_batch: MicroBatch, *, is_step: bool) -> None:
        self._trainer, self._model, self._micro_batch, self._is_step = trainer, model, micro_batch, is_step
        self.result: DeRTaLoss | None = None

    def __getattr__(self, name: str) -> Any:  # TRL before 1.15 asks for the virtual tokens of PEFT
        return getattr(self._model, name)

    def __call__(self, **kwargs: Any) -> Any:
        kwargs = self._trainer._with_masks(kwargs)
        if kwargs.get("fused_lm_head"):
            outputs = self._scored_in_head(kwargs) or self._scored_from_logits(kwargs) or self._scored_by_trl(kwargs)
            # without a count for the step (evaluation), TRL divides by the targets of the batch
            divisor = 1 if self._is_step else outputs.label_mask.sum().clamp(min=1)
            outputs.log_probs = -self.result.loss * divisor
            return outputs
        if HAS_FUSED_LM_HEAD or "labels" not in kwargs:  # TRL wants the logits, for metrics
            return self._model(**kwargs)
        labels = kwargs.pop("labels")
        kwargs.pop("num_items_in_batch", None)
        outputs = self._model(**kwargs)
        self.result = self._micro_batch.loss(per_token_nll(outputs.logits[:, -labels.shape[1] :], labels))
        outputs["loss"] = self.result.loss.clone()  # the host scales it in place
        return outputs

    def _scored_by_trl(self, kwargs: dict[str, Any]) -> Any:
        outputs = self._model(**kwargs)
        # virtual tokens stand before those of the batch
        self.result = self._micro_batch.loss(-outputs.log_probs[:, -self._micro_batch.label_mask.shape[1] :])
        return outputs

    def _scored_from_logits(self, kwargs: dict[str, Any]) -> Any:
        """What TRL reads, from full logits, which a model may change as it likes; None where TRL's head is right."""
        if not self._trainer._needs_logits:
            return None
        labels, mask = kwargs["labels"], self._micro_batch.label_mask
        outputs = self._model(**_without_loss(kwargs))
        logits = outputs.logits[:, -labels.shape[1] :]
        self.result = self._micro_batch.loss(per_token_nll(logits, labels))
        entropy, is_top1 = logit_stats(logits[:, :-1], labels[:, 1:])
        outputs.label_mask, outputs.entropy, outputs.is_top1 = mask, entropy * mask, is_top1 & mask
        return outputs

    def _scored_in_head(self, kwargs: dict[str, Any]) -> Any:
        """What TRL reads of its outputs, from our own head; None where that cannot score."""
        if not self._trainer._scores_in_head:
            return None
        try:
            with self._micro_batch.scoring(self._trainer.model, stats=True) as head:
                found = head.read(self._model(**_without_loss(kwargs)))
        except HeadNotScorableError as reason:
            logger.warning("DeRTa's loss is taken from full logits, which costs memory: %s", reason)
            self._trainer._scores_in_head, self._trainer._needs_logits = False, True
            return None
        self.result = self._micro_batch.loss_of_head(found)
        return SimpleNamespace(label_mask=self._micro_batch.label_mask, entropy=found.entropy, is_top1=found.is_top1)


def _without_loss(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the model is called with, without that by which it would compute a loss of its own."""
    return {name: value for name, value in kwargs.items() if name not in ("fused_lm_head", "labels")}


def _config_of(model: Any, args: DeRTaSFTConfig) -> PreTrainedConfig:
    """The config of a model, or of the one that TRL will load."""
    if not isinstance(model, str):
        return model.config
    known = ("revision", "trust_remote_code", "subfolder", "cache_dir", "token", "code_revision")
    options = {name: value for name, value in (args.model_init_kwargs or {}).items() if name in known}
    return AutoConfig.from_pretrained(model, **options)


class _SetEpoch(TrainerCallback):
    """Tells the rows their epoch. Loaders forward it to a dataset only in some set-ups, a callback always."""

    def __init__(self, rows: ResampledRows) -> None:
        self._rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._rows.set_epoch(int((state.epoch or 0) + 1e-6))


def _check_dataset(name: str, dataset: Any) -> None:
    if dataset is None:
        return
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty: give at least one record, or leave it out.")
    if {"image", "images"} & set(first):
        raise ValueError(f"`{name}` has images: DeRTa trains text only.")
