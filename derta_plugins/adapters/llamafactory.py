"""
DeRTa in LLaMA-Factory: `stage: derta` of its own command.

A run is the host's `run_sft` with two names of its workflow replaced: the trainer, whose loss is DeRTa's, and
`get_dataset`, which knows triples. All else (model loading, LoRA, templates, ordinary rows, checkpoints, export) is the
host's own code. `llamafactory_patch.py` brings the stage into the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from llamafactory.extras.env import VERSION
from llamafactory.model import load_config
from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from derta_plugins.adapters.branch_batch import layout_for
from derta_plugins.adapters.llamafactory_args import STAGE, DeRTaFinetuningArguments
from derta_plugins.adapters.llamafactory_data import get_dataset
from derta_plugins.adapters.llamafactory_patch import HOST, NEWEST_TESTED, OLDEST_TESTED, replaced
from derta_plugins.adapters.trainer_mixins import DeRTaLossMixin
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.hookspecs import Adapter, hookimpl

# (arguments, key, value it must have, why); arguments are named as `run_derta` has them
_CONFLICTS: list[tuple[str, str, Any, str]] = [
    ("data_args", "neat_packing", False, "LLaMA-Factory packs records, before there are DeRTa's rows"),
    ("data_args", "packing", False, "LLaMA-Factory packs records, before there are DeRTa's rows"),
    ("data_args", "ignore_pad_token_for_loss", True, "padding would be trained"),
    ("training_args", "predict_with_generate", False, "it scores generated text instead of DeRTa's loss"),
    ("training_args", "do_predict", False, "it scores generated text instead of DeRTa's loss"),
    ("training_args", "label_smoothing_factor", 0, "smoothing replaces DeRTa's loss"),
    ("training_args", "average_tokens_across_devices", True, "targets are counted over all ranks"),
    ("finetuning_args", "use_dft_loss", False, "another loss replaces DeRTa's"),
    ("finetuning_args", "use_asft_loss", False, "another loss replaces DeRTa's"),
    ("finetuning_args", "use_eaft_loss", False, "another loss replaces DeRTa's"),
    ("model_args", "use_unsloth", False, "it computes a loss of its own and builds no logits"),
    ("model_args", "use_kt", False, "it computes a loss of its own"),
    ("model_args", "shift_attn", False, "a position would not see the whole harmful prefix before it"),
    ("model_args", "moe_aux_loss_coef", None, "the router loss would get lost"),
]


@hookimpl
def derta_adapter() -> Adapter:
    """LLaMA-Factory, for `derta doctor`."""
    how = "llamafactory-cli train cfg.yaml, with `stage: derta` in it"
    return Adapter("llamafactory", HOST, OLDEST_TESTED, NEWEST_TESTED, how)


class LLaMAFactoryDeRTaTrainer(DeRTaLossMixin, CustomSeq2SeqTrainer):
    """The host's SFT trainer with DeRTa's loss."""

    host_version = f"LLaMA-Factory {VERSION}"

    def __init__(self, *, model: Any, args: Any, finetuning_args: DeRTaFinetuningArguments, **kwargs: Any) -> None:
        self._start_derta(layout_for(config_of(finetuning_args, args), model.config))
        super().__init__(model=model, args=args, finetuning_args=finetuning_args, **kwargs)
        self._finish_derta()
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            self._check_has_rows(name, dataset)


def run_derta(
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: DeRTaFinetuningArguments,
    generating_args: Any,
    callbacks: list[Any] | None = None,
) -> None:
    """
    The host's `run_sft`, as a run of `stage: derta`.

    Raises:
        ConfigError: If a setting of the host and DeRTa exclude each other; no step was taken.
    """
    arguments = {
        "model_args": model_args,
        "data_args": data_args,
        "training_args": training_args,
        "finetuning_args": finetuning_args,
    }
    for group, key, wanted, why in _CONFLICTS:
        value = getattr(arguments[group], key)
        if (value or None) != (wanted or None):
            raise ConfigError(f"`{key}` must be {wanted} with `stage: derta`, got {value!r}: {why}.")
    config = config_of(finetuning_args, training_args)
    if config.layout == "branch":
        config = layout_for(config, load_config(model_args))
    replacements = {
        "CustomSeq2SeqTrainer": LLaMAFactoryDeRTaTrainer,
        "get_dataset": partial(get_dataset, config=config),
    }
    with _named_stage(finetuning_args), replaced(workflow, **replacements):
        workflow.run_sft(model_args, data_args, training_args, finetuning_args, generating_args, callbacks)


def config_of(finetuning_args: DeRTaFinetuningArguments, training_args: Any) -> DeRTaConfig:
    """The knobs of a run; the draws' seed is `derta_seed`, or else `data_seed`, or else `seed`."""
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    return finetuning_args.derta_config(seed=seed)


@contextmanager
def _named_stage(finetuning_args: DeRTaFinetuningArguments) -> Iterator[None]:
    """`stage` reads "derta" during the run: for an SFT run the host would load a model that builds no logits."""
    finetuning_args.stage, dispatched_as = STAGE, finetuning_args.stage
    try:
        yield
    finally:
        finetuning_args.stage = dispatched_as
