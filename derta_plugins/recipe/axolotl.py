"""A recipe as an Axolotl config, with DeRTa's plugin and its `derta` block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from derta_plugins.adapters.axolotl_names import BLOCK, DATASET_TYPE, PLUGIN
from derta_plugins.recipe.host import Draft, Host, OwnDefault, refuse_file, refuse_knobs, shared_training_keys
from derta_plugins.recipe.schema import DataFile, Recipe

_TITLE = "Axolotl"
_FILE_TYPES = {".csv": "csv", ".parquet": "parquet"}


def draft(recipe: Recipe, output_dir: str) -> Draft:
    """
    Axolotl's config.

    Raises:
        RecipeError: If the run would train on other tokens or rows than the recipe says.
    """
    refuse_knobs(recipe, ("resample_each_epoch",), _TITLE, "rows are prepared once, before training")
    refuse_knobs(recipe, ("boundary_ratio",), _TITLE, "boundary rows are an ordinary dataset there")
    made = Draft({"base_model": recipe.model, "output_dir": recipe.output_dir})
    if recipe.tokenizer is not None:
        made.config["tokenizer_config"] = recipe.tokenizer
    if recipe.chat_template is None:
        made.config["chat_template"] = "tokenizer_default"
    else:
        made.config |= {"chat_template": "jinja", "chat_template_jinja": recipe.chat_template}
    made.config["plugins"] = [PLUGIN]
    made.config[BLOCK] = dict(recipe.derta)
    made.config["datasets"] = [_dataset(file) for file in recipe.data]
    made.config |= _rows(recipe)
    if recipe.lora is not None:
        made.config |= _lora(recipe)
    made.config |= _training(recipe)
    if recipe.fsdp_config is not None:
        made.missing.append(
            f"`fsdp_config: {recipe.fsdp_config}`: {_TITLE} takes no file; write its `fsdp_config` block under "
            "`hosts: {axolotl: …}`."
        )
    made.notes += _differences(recipe)
    return made


def _dataset(file: DataFile) -> dict[str, Any]:
    dataset: dict[str, Any] = {"path": file.path, "split": file.split}
    if suffix := Path(file.path).suffix:
        dataset["ds_type"] = _FILE_TYPES.get(suffix, "json")
    if file.kind == "safety":
        if file.columns:
            raise refuse_file(file.path, "`columns` of safety records", _TITLE, "Rename the columns in the file.")
        return dataset | {"type": DATASET_TYPE}
    names = file.column_names
    if file.format == "messages":
        return dataset | {"type": "chat_template", "field_messages": names[0], "roles_to_train": ["assistant"]}
    if file.format == "text":
        return dataset | {"type": "completion", "field": names[0]}
    if file.format == "prompt-completion":
        raw = {"format": "{instruction}", "no_input_format": "{instruction}"}
        return dataset | {"type": {"field_instruction": names[0], "field_output": names[1], **raw}}
    if file.columns:
        raise refuse_file(file.path, "`columns` of `format: alpaca`", _TITLE, "Rename the columns in the file.")
    return dataset | {"type": "alpaca"}


def _rows(recipe: Recipe) -> dict[str, Any]:
    config: dict[str, Any] = {
        "shuffle_merged_datasets": recipe.shuffle,
        "val_set_size": recipe.validation_ratio,
        "sequence_len": recipe.max_length,
        "excess_length_strategy": "truncate",
        "sample_packing": recipe.packing,
        "pad_to_sequence_len": recipe.packing,
    }
    if not recipe.shuffle:
        config["curriculum_sampling"] = True
    return config


def _lora(recipe: Recipe) -> dict[str, Any]:
    config: dict[str, Any] = {
        "adapter": "lora",
        "lora_r": recipe.lora.rank,
        "lora_alpha": recipe.lora.alpha,
        "lora_dropout": recipe.lora.dropout,
    }
    if recipe.lora.target_modules is None:
        return config | {"lora_target_linear": True}
    return config | {"lora_target_modules": recipe.lora.target_modules}


def _training(recipe: Recipe) -> dict[str, Any]:
    config = shared_training_keys(recipe) | {
        "micro_batch_size": recipe.per_device_batch_size,
        "num_epochs": recipe.num_epochs,
        "lr_scheduler": recipe.lr_scheduler,
        "warmup_ratio": recipe.warmup_ratio,
        "tf32": False,
        "gradient_checkpointing": recipe.gradient_checkpointing,
    }
    if recipe.eval_steps is not None:
        config |= {"eval_strategy": "steps", "eval_steps": recipe.eval_steps}
    return config


def _differences(recipe: Recipe) -> list[str]:
    notes = []
    if recipe.precision != "fp32":
        notes.append(f"`precision: {recipe.precision}` is the type of the weights too, not of the computation alone.")
    if recipe.warmup_ratio:
        notes.append("Warm-up is rounded down to whole steps, and one step becomes two; the others round up.")
    if any(file.format == "alpaca" for file in recipe.data):
        notes.append("`format: alpaca` is laid out in Axolotl's own words (### Instruction:), not the chat template.")
    if any(file.kind == "boundary" for file in recipe.data):
        notes.append("`kind: boundary` is an ordinary dataset: all of its rows are taken.")
    return notes


def command(path: str, num_devices: int) -> str:
    """Line that starts the run."""
    return f"axolotl train {path}" + (f" -- --num_processes {num_devices}" if num_devices > 1 else "")


HOST = Host(
    title=_TITLE,
    config_file="cfg.yml",
    draft=draft,
    reserved=("datasets", BLOCK),
    own_defaults={
        "shuffle_merged_datasets": OwnDefault(True),
        "val_set_size": OwnDefault(0.0),
        "sequence_len": OwnDefault(512),
        "excess_length_strategy": OwnDefault(None, "longer rows are dropped"),
        "lora_dropout": OwnDefault(0.0),
        "micro_batch_size": OwnDefault(1),
        "num_epochs": OwnDefault(1.0),
        "lr_scheduler": OwnDefault("cosine"),
        "warmup_ratio": OwnDefault(None, "3 % of the steps, at most 100"),
        "weight_decay": OwnDefault(0.0),
        "bf16": OwnDefault("auto"),
        "tf32": OwnDefault("auto"),
        "gradient_checkpointing": OwnDefault(False),
        "seed": OwnDefault(None, "42"),
        "logging_steps": OwnDefault(None, "every 0.5 % of the steps, at most 10"),
        "save_strategy": OwnDefault(None, "each epoch"),
    },
    command=command,
)
