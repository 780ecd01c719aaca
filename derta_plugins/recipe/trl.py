"""A recipe as the YAML file of `examples/trl/train_derta.py`, that is of `DeRTaSFTConfig` and `trl.ModelConfig`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from derta_plugins.core.config import DeRTaConfig
from derta_plugins.recipe.checks import RecipeError
from derta_plugins.recipe.host import Draft, Host, OwnDefault, refuse_file, shared_training_keys
from derta_plugins.recipe.schema import DataFile, Recipe

_TITLE = "TRL"
_ORDER = ("helpful", "boundary", "safety")
_KNOBS = tuple(knob.name for knob in fields(DeRTaConfig) if knob.name != "seed")


def draft(recipe: Recipe, output_dir: str) -> Draft:
    """
    TRL's config; every key has a counterpart but the held-out rows, which the script does not split off.

    Raises:
        RecipeError: If the run would train on other tokens or rows than the recipe says.
    """
    if recipe.tokenizer is not None:
        raise RecipeError(f"`tokenizer` has no counterpart in {_TITLE}'s script: save that tokenizer with the model.")
    made = Draft({"model_name_or_path": recipe.model, "output_dir": recipe.output_dir})
    if recipe.chat_template is not None:
        made.config["chat_template_path"] = recipe.chat_template
    made.config |= _data(recipe)
    made.config |= _training(recipe)
    if recipe.lora is not None:
        made.config |= {
            "use_peft": True,
            "lora_r": recipe.lora.rank,
            "lora_alpha": recipe.lora.alpha,
            "lora_dropout": recipe.lora.dropout,
            "lora_target_modules": recipe.lora.target_modules or ["all-linear"],
        }
    made.config |= {name: value for name, value in recipe.derta.items() if name != "seed"}
    if "seed" in recipe.derta:
        made.config["data_seed"] = recipe.derta["seed"]
        made.notes.append("`derta.seed` becomes `data_seed`, which seeds the order of the rows too.")
    kinds = [file.kind for file in recipe.data]
    if not recipe.shuffle and kinds != sorted(kinds, key=_ORDER.index):
        made.notes.append(
            f"Without `shuffle` rows come in the order {', '.join(_ORDER)}, whatever the order of `data`."
        )
    if "assistant_only_loss" in made.config:
        made.notes.append("`format: messages` needs {% generation %} marks in a chat template that TRL does not know.")
    if recipe.eval_steps is not None:
        made.missing.append(
            f"`validation_ratio: {recipe.validation_ratio}` and `eval_steps: {recipe.eval_steps}`: the script trains "
            "on every row."
        )
    return made


def _data(recipe: Recipe) -> dict[str, str]:
    config: dict[str, str] = {}
    for file in recipe.data:
        _check_file(file)
        if file.kind in config:
            what = f"a second file of `kind: {file.kind}`"
            raise refuse_file(file.path, what, f"{_TITLE}'s script", "Join the two, or give a folder.")
        config[file.kind] = file.path
    return config


def _check_file(file: DataFile) -> None:
    if file.format == "alpaca":
        raise refuse_file(file.path, "`format: alpaca`", _TITLE, "Write its rows as messages.")
    if file.columns:
        raise refuse_file(file.path, "`columns`", f"{_TITLE}'s script", "Rename the columns in the file.")
    if file.split != "train":
        raise refuse_file(file.path, f"`split: {file.split}`", f"{_TITLE}'s script", "It reads the split train.")


def _training(recipe: Recipe) -> dict[str, Any]:
    config = shared_training_keys(recipe) | {
        "per_device_train_batch_size": recipe.per_device_batch_size,
        "num_train_epochs": recipe.num_epochs,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": recipe.warmup_ratio,  # below 1 it is a share of the steps
        "max_length": recipe.max_length,
        "packing": recipe.packing,
        "gradient_checkpointing": recipe.gradient_checkpointing,
    }
    if any(file.format == "messages" for file in recipe.data):
        config["assistant_only_loss"] = True
    if not recipe.shuffle:
        config["train_sampling_strategy"] = "sequential"
    if recipe.fsdp_config is not None:
        config |= {"fsdp": "full_shard auto_wrap", "fsdp_config": recipe.fsdp_config}
    return config


def command(path: str, num_devices: int) -> str:
    """Line that starts the run."""
    launcher = "python" if num_devices == 1 else f"accelerate launch --num_processes {num_devices}"
    return f"{launcher} train_derta.py --config {path}"


HOST = Host(
    title=_TITLE,
    config_file="train_derta.yaml",
    draft=draft,
    reserved=(*_ORDER, *_KNOBS),
    own_defaults={
        "assistant_only_loss": OwnDefault(False, "user turns are trained too"),
        "lora_r": OwnDefault(16),
        "lora_alpha": OwnDefault(32),
        "lora_dropout": OwnDefault(0.05),
        "lora_target_modules": OwnDefault(None, "PEFT's list for the architecture"),
    },
    command=command,
)
