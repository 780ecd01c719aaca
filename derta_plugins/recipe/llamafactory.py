"""A recipe as a LLaMA-Factory training config with `stage: derta`, and the `dataset_info.json` that names its data."""

from __future__ import annotations

import os
import re
from itertools import count
from pathlib import Path
from typing import Any

from derta_plugins.recipe.checks import RecipeError
from derta_plugins.recipe.host import Draft, Host, OwnDefault, refuse_file, refuse_knobs, shared_training_keys
from derta_plugins.recipe.schema import DataFile, Recipe

_TITLE = "LLaMA-Factory"
_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
_DATA_FILES = {".json", ".jsonl", ".csv", ".parquet", ".arrow"}


def draft(recipe: Recipe, output_dir: str) -> Draft:
    """
    LLaMA-Factory's config, with `dataset_info.json`.

    Raises:
        RecipeError: If the run would train on other tokens or rows than the recipe says.
    """
    refuse_knobs(recipe, ("resample_each_epoch",), _TITLE, "rows are prepared once, before training")
    refuse_knobs(recipe, ("boundary_ratio",), _TITLE, "boundary rows are an ordinary dataset there")
    refuse_knobs(recipe, ("apply_chat_template",), _TITLE, "every record is laid out with `template`")
    if recipe.tokenizer is not None:
        raise RecipeError(f"`tokenizer` has no counterpart in {_TITLE}: save that tokenizer with the model.")
    names = _dataset_names(recipe.data)
    made = Draft({"model_name_or_path": recipe.model, "output_dir": recipe.output_dir, "stage": "derta"})
    made.config |= {"do_train": True, "dataset_dir": output_dir, "dataset": ",".join(names)}
    made.config |= _template(recipe, made.missing)
    made.config |= {f"derta_{name}": value for name, value in recipe.derta.items()}
    made.config |= _method(recipe)
    made.config |= _training(recipe)
    entries = {name: _dataset(file, output_dir) for name, file in zip(names, recipe.data, strict=True)}
    made.other_files["dataset_info.json"] = entries
    if recipe.packing:
        made.missing.append("`packing`: every row is a sequence of its own, so a batch holds fewer tokens.")
    if any(file.kind == "boundary" for file in recipe.data):
        made.notes.append("`kind: boundary` is an ordinary dataset: all of its rows are taken.")
    made.notes.append("It goes on from the last checkpoint in `output_dir` if there is one.")
    return made


def _template(recipe: Recipe, missing: list[str]) -> dict[str, Any]:
    """
    The prompt template: LLaMA-Factory takes no Jinja, only a template of its own by name.

    Left out, it takes the tokenizer's template apart by a rule that fails without a word for some, and uses none at all
    where the tokenizer has none; so the name must be given, or null to say that this is wanted.
    """
    block = recipe.hosts.get("llamafactory", {})
    if "template" not in block:
        raise RecipeError(
            f"{_TITLE} takes no Jinja: name one of its templates under `hosts: {{llamafactory: {{template: llama3}}}}`,"
            " or null there to let it take the tokenizer's own apart."
        )
    if recipe.chat_template is None:
        return {"template": block["template"]}
    if block["template"] is None:
        raise RecipeError(
            f"`chat_template: {recipe.chat_template}` has no counterpart in {_TITLE}, and `template: null` would take "
            "the tokenizer's own instead: save the file's text as the tokenizer's chat template, and leave "
            "`chat_template` out."
        )
    missing.append(f"`chat_template: {recipe.chat_template}`: the template {block['template']!r} stands in its place.")
    return {"template": block["template"]}


def _dataset_names(files: tuple[DataFile, ...]) -> list[str]:
    """A name for each file, from its own; `dataset` takes no comma or blank."""
    names: list[str] = []
    for file in files:
        stem = re.sub(r"\W+", "_", Path(file.path).stem)
        numbered = (f"{stem}_{number}" for number in count(2))
        names.append(stem if stem not in names else next(name for name in numbered if name not in names))
    return names


def _dataset(file: DataFile, output_dir: str) -> dict[str, Any]:
    """Entry of `dataset_info.json`; file names in it start from the folder it lies in."""
    is_local = Path(file.path).suffix in _DATA_FILES or file.path.startswith((".", "/")) or Path(file.path).exists()
    entry: dict[str, Any] = {"hf_hub_url": file.path}
    if is_local:
        entry = {"file_name": file.path if os.path.isabs(file.path) else os.path.relpath(file.path, output_dir)}
    if file.split != "train":
        entry["split"] = file.split
    names = file.column_names
    if file.format in ("preference", "authors-triples"):
        return entry | {"ranking": True, "columns": dict(zip(("prompt", "chosen", "rejected"), names, strict=True))}
    if file.format == "messages":
        return entry | {"formatting": "sharegpt", "columns": {"messages": names[0]}, "tags": _TAGS}
    if file.format == "alpaca":
        return entry | {"columns": dict(zip(("prompt", "query", "response"), names, strict=True))}
    instead = {
        "conversational-preference": "Write the triples as plain text (`format: preference`).",
        "authors-rows": "Give the triples that the rows were made of (`format: authors-triples`).",
        "pku-saferlhf": "Write its pairs as prompt, chosen and rejected (`format: preference`).",
        "prompt-completion": "It would put the chat template around raw text; give messages, or `format: alpaca`.",
        "text": "Its `stage: sft` has no raw text; give messages.",
    }
    raise refuse_file(file.path, f"`format: {file.format}`", _TITLE, instead[file.format])


def _method(recipe: Recipe) -> dict[str, Any]:
    if recipe.lora is None:
        return {"finetuning_type": "full"}
    modules = recipe.lora.target_modules
    return {
        "finetuning_type": "lora",
        "lora_rank": recipe.lora.rank,
        "lora_alpha": recipe.lora.alpha,
        "lora_dropout": recipe.lora.dropout,
        "lora_target": "all" if modules is None else ",".join(modules),
    }


def _training(recipe: Recipe) -> dict[str, Any]:
    config = shared_training_keys(recipe) | {
        "cutoff_len": recipe.max_length,
        "packing": False,
        "disable_shuffling": not recipe.shuffle,
        "per_device_train_batch_size": recipe.per_device_batch_size,
        "num_train_epochs": recipe.num_epochs,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_ratio": recipe.warmup_ratio,
        "disable_gradient_checkpointing": not recipe.gradient_checkpointing,
    }
    if recipe.eval_steps is not None:
        config |= {"val_size": recipe.validation_ratio, "eval_strategy": "steps", "eval_steps": recipe.eval_steps}
    if recipe.fsdp_config is not None:
        config |= {"fsdp": "full_shard auto_wrap", "fsdp_config": recipe.fsdp_config}
    return config


def command(path: str, num_devices: int) -> str:
    """Line that starts the run."""
    launcher = f"FORCE_TORCHRUN=1 NPROC_PER_NODE={num_devices} " if num_devices > 1 else ""
    return f"{launcher}llamafactory-cli train {path}"


HOST = Host(
    title=_TITLE,
    config_file="train.yaml",
    draft=draft,
    reserved=("stage", "do_train", "dataset", "dataset_dir", "packing", "neat_packing"),
    own_defaults={
        "cutoff_len": OwnDefault(2048),
        "disable_shuffling": OwnDefault(False),
        "finetuning_type": OwnDefault("lora"),
        "lora_rank": OwnDefault(8),
        "lora_alpha": OwnDefault(None, "twice the rank"),
        "lora_dropout": OwnDefault(0.0),
        "lora_target": OwnDefault("all"),
        "per_device_train_batch_size": OwnDefault(8),
        "learning_rate": OwnDefault(5e-5),
        "bf16": OwnDefault(False),
        "disable_gradient_checkpointing": OwnDefault(False),
        "seed": OwnDefault(42),
        "logging_steps": OwnDefault(500),
        "save_strategy": OwnDefault("steps"),
        "save_steps": OwnDefault(500),
    },
    command=command,
)
