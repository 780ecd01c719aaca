"""`DeRTaSFTConfig`: TRL's `SFTConfig` with the DeRTa knobs, the TRL versions it is for, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import trl
from packaging.version import Version
from trl import SFTConfig

from derta_plugins.core.config import (
    ConfigError,
    DeRTaConfig,
    Layout,
    Method,
    Normalization,
    OnBadRecord,
    PrefixUnit,
    RTOTurns,
)
from derta_plugins.hookspecs import HostVersionError

OLDEST_TESTED, NEWEST_TESTED = "1.9.0", "1.16.0"

# Older ones build labels in their collator, after our rows.
if Version(trl.__version__) < Version(OLDEST_TESTED):
    raise HostVersionError(
        f"trl>={OLDEST_TESTED} is needed, got {trl.__version__}: pip install -U 'derta-plugins[trl]'"
    )

# From 1.15 on SFTTrainer has the model score its targets without building logits; before, the logits are built.
HAS_FUSED_LM_HEAD = Version(trl.__version__) >= Version("1.15.0")
# What that head does to logits as the model would; for anything else the loss is taken from the model's own logits.
FUSED_HEAD_KNOWS = {
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
}


def _knob(name: str, help_text: str) -> Any:
    """Dataclass field with the default that `DeRTaConfig` has."""
    return field(default=getattr(DeRTaConfig, name), metadata={"help": help_text})


@dataclass
class DeRTaSFTConfig(SFTConfig):
    """
    `SFTConfig` with the knobs of `DeRTaConfig`, whose docstring explains them.

    The draws' seed is `data_seed`, or `seed` where that is not set. `safety_probability` is for streams alone.
    """

    method: Method = _knob("method", "'derta', or a baseline from the same triples: 'vanilla', 'recaug'.")
    refusal_text: str = _knob("refusal_text", "Text of the RTO target; 'auto' takes what safe responses begin with.")
    allow_first_piece: bool = _knob("allow_first_piece", "Take the first piece of a refusal text of several tokens.")
    apply_chat_template: bool = _knob("apply_chat_template", "Put plain-text triples into the chat template.")
    prefix_unit: PrefixUnit = _knob("prefix_unit", "What the length of the harmful prefix counts: 'token', 'word'.")
    zero_prefix_ratio: float | None = _knob("zero_prefix_ratio", "Share of MLE rows without a harmful prefix.")
    num_prefixes: int = _knob("num_prefixes", "MLE rows per triple.")
    rto_ratio: float = _knob("rto_ratio", "Share of triples that give an RTO row.")
    rto_keep_ratio: float = _knob("rto_keep_ratio", "Share of the RTO positions that keep their target.")
    rto_turns: RTOTurns = _knob("rto_turns", "'last', or 'all' for RTO on earlier assistant turns too.")
    resample_each_epoch: bool = _knob("resample_each_epoch", "Draw prefixes and kept positions anew every epoch.")
    normalization: Normalization = _knob("normalization", "'token_mean', 'sequence_sum' or 'component_mean'.")
    rto_weight: float = _knob("rto_weight", "Weight of the RTO positions.")
    layout: Layout = _knob("layout", "'rows', or 'branch' to train the rows of a triple in one sequence.")
    boundary_ratio: float | None = _knob("boundary_ratio", "Benign look-alike rows per triple; all when not set.")
    transform: str | None = _knob("transform", "Installed plugin that turns triples into rows; ours when not set.")
    on_bad_record: OnBadRecord = _knob("on_bad_record", "'error', or 'skip' to drop, count and report bad records.")
    safety_probability: float = field(
        default=6000 / 66000,
        metadata={"help": "Streams: share of safety rows. The authors mixed 6 K of them with 60 K helpful rows."},
    )

    def __post_init__(self) -> None:
        if self.loss_type in (
            None,
            "chunked_nll",
        ):  # TRL's names for "nll by the cheapest way", which is ours to choose
            self.loss_type = "nll"
        super().__post_init__()
        self.derta_config()
        for name, value, wanted, why in self._conflicts():
            raise ConfigError(f"`{name}` must be {wanted} with DeRTa, got {value!r}: {why}.")

    def derta_config(self) -> DeRTaConfig:
        """The DeRTa knobs, checked."""
        names = [knob.name for knob in fields(DeRTaConfig) if knob.name != "seed"]
        seed = self.seed if self.data_seed is None else self.data_seed
        return DeRTaConfig(seed=seed, **{name: getattr(self, name) for name in names})

    def _conflicts(self) -> list[tuple[str, Any, str, str]]:
        """Host settings under which loss or rows would not be what they say: name, value, what it must be, why."""
        skips = (self.dataset_kwargs or {}).get("skip_prepare_dataset", False)
        checks = {
            "loss_type": (self.loss_type == "nll", "'nll'", "another loss replaces DeRTa's"),
            "label_smoothing_factor": (not self.label_smoothing_factor, "0", "smoothing replaces DeRTa's loss"),
            "average_tokens_across_devices": (
                self.average_tokens_across_devices,
                "True",
                "targets must be counted over all ranks",
            ),
            "remove_unused_columns": (self.remove_unused_columns, "True", "record columns must not reach the model"),
            "truncation_mode": (self.truncation_mode == "keep_start", "'keep_start'", "it would cut prompts off"),
            "packing_strategy": (
                not (self.packing or self.eval_packing) or self.packing_strategy == "bfd",
                "'bfd'",
                "the others cut a refusal off its context",
            ),
            "packing": (
                not (self.packing and self.resample_each_epoch),
                "False",
                "`resample_each_epoch` changes the lengths of rows",
            ),
            "use_liger_kernel": (
                HAS_FUSED_LM_HEAD or not self.use_liger_kernel,
                "False",
                "before TRL 1.15 Liger's loss replaces DeRTa's",
            ),
            "safety_probability": (0 < self.safety_probability < 1, "in (0, 1)", "it is a share of rows"),
            "dataset_kwargs": (
                not skips,
                "without `skip_prepare_dataset`",
                "tokenised datasets with `labels` are used as they are anyway",
            ),
        }
        return [(name, getattr(self, name), wanted, why) for name, (fine, wanted, why) in checks.items() if not fine]
