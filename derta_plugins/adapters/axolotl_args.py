"""The `derta:` block of an Axolotl config, and the settings of Axolotl that exclude DeRTa."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

import torch
from axolotl.utils.schemas.datasets import SFTDataset
from pydantic import BaseModel, ConfigDict, create_model, model_serializer, model_validator

from derta_plugins.adapters.axolotl_names import BLOCK, DATASET_TYPE, SPLITS, entries_of, is_ours
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.losses import fused_denominator

# what Axolotl trains with where its config sets none
HOST_SEED = 42

_REFUSED_KNOBS = {
    "resample_each_epoch": "Axolotl prepares rows once; set `num_prefixes` to draw several prefixes per triple",
    "boundary_ratio": "boundary rows are an ordinary dataset entry; take as many as you want with its `split`, such as "
    "`train[:200]`",
}

_REFUSED = {
    "rl": "it trains another loss. DeRTa reads preference triples itself, as supervised rows",
    "reward_model": "it trains a reward model",
    "process_reward_model": "it trains a reward model",
    "trainer_cls": "DeRTa brings its own trainer",
    "orpo_alpha": "it trains another loss",
    "use_eaft": "it trains another loss",
    "kd_trainer": "it trains another loss",
    "liger_use_token_scaling": "it weighs targets by their probability, which is another loss",
    "streaming": "rows are prepared once, in memory",
    "pretraining_dataset": "rows are prepared once, in memory",
    "skip_prepare_dataset": "no row would be made of the safety records",
    "push_dataset_to_hub": "it would upload harmful responses, and train rows from there that this run did not make",
    "processor_type": "DeRTa trains text only",
}
_AT_MOST_ONE = {
    "context_parallel_size": "it cuts sequences after their targets are counted",
    "sequence_parallel_degree": "it cuts sequences after their targets are counted",
}

_ENTRY_SETTINGS = {
    *("path", "type", "name", "split", "data_files", "ds_type", "revision", "trust_remote_code"),
    *("shards", "shards_idx", "preprocess_shards", "chat_template", "chat_template_jinja", "conversation"),
}


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check(cls, values: Any) -> Any:
        _config(values, host_seed=None)
        return values

    # Axolotl dumps its config without what is null, and a null of ours means something
    @model_serializer
    def _dump(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields}


def _fields() -> dict[str, Any]:
    types = get_type_hints(DeRTaConfig)
    fields = {knob.name: (types[knob.name], knob.default) for knob in dataclasses.fields(DeRTaConfig)}
    return {**fields, "seed": (int | None, None)}


DeRTaKnobs = create_model("DeRTaKnobs", __base__=_Block, **_fields())


class DeRTaArgs(BaseModel):
    """What DeRTa adds to Axolotl's config: one block, with the knobs of `DeRTaConfig`."""

    derta: DeRTaKnobs | None = None


def derta_config(cfg: Mapping[str, Any]) -> DeRTaConfig:
    """
    The knobs of a config, validated or not, checked. The seed is Axolotl's own where the block sets none.

    Raises:
        ConfigError: If a knob is unknown, out of its range, or means nothing in Axolotl.
    """
    return _config(cfg.get(BLOCK), host_seed=cfg.get("seed"))


def _config(block: Any, *, host_seed: Any) -> DeRTaConfig:
    if isinstance(block, _Block):
        block = block.model_dump()
    if not isinstance(block, Mapping | None):
        raise ConfigError(f"`{BLOCK}:` must hold knobs, such as `refusal_text: Sorry`, got {block!r}.")
    knobs = dict(block or {})
    if knobs.get("seed") is None:
        knobs["seed"] = HOST_SEED if host_seed is None else host_seed
    config = DeRTaConfig.from_mapping(knobs)
    for name, instead in _REFUSED_KNOBS.items():
        if getattr(config, name):
            raise ConfigError(f"`{BLOCK}.{name}` is not for Axolotl: {instead}.")
    return config


def fused_loss(cfg: Mapping[str, Any]) -> str | None:
    """Name of the setting by which the model computes its loss without logits; None if logits are built."""
    plugins = [str(name) for name in cfg.get("plugins") or []]
    if cfg.get("liger_fused_linear_cross_entropy") and any(name.endswith(".LigerPlugin") for name in plugins):
        return "liger_fused_linear_cross_entropy"
    is_on = cfg.get("cut_cross_entropy") is not False  # Axolotl's own default
    return "cut_cross_entropy" if is_on and any(name.endswith(".CutCrossEntropyPlugin") for name in plugins) else None


def check_settings(cfg: Mapping[str, Any], config: DeRTaConfig) -> None:
    """
    Refuse settings of Axolotl under which loss or rows would not be what they say.

    Args:
        cfg: Axolotl's config, validated or not.
        config: DeRTa's knobs.

    Raises:
        ConfigError: Names the setting, and why DeRTa excludes it.
    """
    for name, why in _conflicts(cfg):
        raise ConfigError(f"`{name}` cannot be used with DeRTa: {why}. Remove it, or the plugin.")
    if setting := fused_loss(cfg):
        try:
            fused_denominator(torch.ones(3), config)
        except ConfigError as error:
            raise ConfigError(f"`{setting}`: {error}") from error


def _conflicts(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((name, why) for name, why in _REFUSED.items() if cfg.get(name))
    yield from ((name, why) for name, why in _AT_MOST_ONE.items() if (cfg.get(name) or 1) > 1)
    if cfg.get("model_config_type") == "mamba":
        yield "base_model", "Axolotl trains a mamba model in a trainer of its own"
    for split in SPLITS:
        for place, entry in enumerate(entries_of(cfg, split)):
            for name in sorted(_unread_settings(entry)) if is_ours(entry) else ():
                yield f"{split}[{place}].{name}", f"`type: {DATASET_TYPE}` does not read it"


def _unread_settings(entry: Any) -> set[str]:
    """Settings of our entry that would do nothing; what Axolotl's validation fills in by itself is none."""
    filled_in = SFTDataset(type=DATASET_TYPE).model_dump()
    return {name for name, value in dict(entry).items() if value != filled_in.get(name)} - _ENTRY_SETTINGS
