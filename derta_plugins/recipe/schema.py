"""What a recipe says: every key, its default, and what its value must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.recipe.checks import (
    RecipeError,
    boolean,
    build,
    choice,
    known,
    mapping,
    near,
    number,
    optional,
    text,
)

HOSTS = ("trl", "axolotl", "llamafactory")
SAFETY_FORMATS: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "conversational-preference": ("prompt", "chosen", "rejected"),
    "authors-triples": ("instruction", "safe_response", "output"),
    "authors-rows": ("prefix", "text", "safe"),
    "pku-saferlhf": ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
}
"""Formats of safety records with their columns, in the order prompt, safe response, harmful response."""
ORDINARY_FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "text": ("text",),
}
"""Formats of helpful and boundary rows with their columns."""

_count = number(1, is_whole=True)


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """
    One file or hub dataset of the run.

    Attributes:
        path: Path of a file or folder, from where the host is started; or a name on the hub.
        kind: `safety` (triples), `helpful` (ordinary rows) or `boundary` (benign look-alikes of harmful prompts).
        format: One of `SAFETY_FORMATS`, or of `ORDINARY_FORMATS`.
        columns: Names that the file gives to the columns of its format, where they are others.
        split: Split of a folder or hub name.
    """

    path: Annotated[str, text]
    kind: Annotated[str, choice("safety", "helpful", "boundary")]
    format: Annotated[str, choice(*SAFETY_FORMATS, *ORDINARY_FORMATS)]
    columns: Annotated[dict[str, str], mapping] = field(default_factory=dict)
    split: Annotated[str, text] = "train"

    def __post_init__(self) -> None:
        formats = SAFETY_FORMATS if self.kind == "safety" else ORDINARY_FORMATS
        choice(*formats)(f"format` of {self.path}, a file of `kind: {self.kind}", self.format)
        for name, column in self.columns.items():
            choice(*formats[self.format])(f"columns` of {self.path}, a file of `format: {self.format}", name)
            text(f"columns.{name}", column)

    @property
    def column_names(self) -> list[str]:
        """The file's columns, in the order in which its format lists them."""
        formats = SAFETY_FORMATS if self.kind == "safety" else ORDINARY_FORMATS
        return [self.columns.get(name, name) for name in formats[self.format]]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters; `target_modules` of None adapts every linear layer but the output layer."""

    rank: Annotated[int, _count]
    alpha: Annotated[int, _count]
    dropout: Annotated[float, number(0, 1)] = 0.0
    target_modules: Annotated[list[str] | None, optional(_names)] = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """
    A training run, in no host's words. Defaults are TRL's, so that a short recipe means the same everywhere.

    The loss is taken over responses alone, as in the paper: of an ordinary row, over its assistant's turns.

    Attributes:
        model: Folder or hub name of the model.
        output_dir: Where checkpoints and the tuned model go.
        data: The files to train on.
        tokenizer: Folder or hub name of another tokenizer than the model's own.
        chat_template: Path of a Jinja file; None takes the tokenizer's own template.
        derta: Knobs of `DeRTaConfig`, as given.
        lora: Train adapters of this shape; None trains all parameters.
        learning_rate: Highest learning rate.
        lr_scheduler: How it goes on after warm-up.
        warmup_ratio: Share of the steps for warm-up.
        weight_decay: Decoupled weight decay.
        num_epochs: Passes over the data.
        max_steps: Optimizer steps, instead of `num_epochs`.
        max_length: Longest row, in tokens.
        batch_size: Rows per optimizer step over all devices; None follows from the next three.
        per_device_batch_size: Rows per forward pass and device.
        gradient_accumulation_steps: Forward passes per step; None follows from `batch_size`.
        num_devices: Processes to start.
        precision: `bf16`, `fp16` or `fp32`.
        gradient_checkpointing: Recompute activations in the backward pass.
        seed: Seed of initialisation, order and, unless `derta.seed` is set, of DeRTa's draws.
        packing: Put several rows into one sequence.
        shuffle: Train in random order; False keeps the order of `data`.
        validation_ratio: Share of the rows to hold out.
        logging_steps: Steps between two log lines.
        save_steps: Steps between two checkpoints; None keeps only the final model.
        eval_steps: Steps between two evaluations of the held-out rows.
        deepspeed: Path of a DeepSpeed config.
        fsdp_config: Path of a Transformers FSDP config; turns FSDP on.
        hosts: Keys for one host alone, by host, in its own words. They win over the recipe's.
    """

    model: Annotated[str, text]
    output_dir: Annotated[str, text]
    data: Annotated[tuple[DataFile, ...], _data]
    tokenizer: Annotated[str | None, optional(text)] = None
    chat_template: Annotated[str | None, optional(text)] = None
    derta: Annotated[dict[str, Any], _knobs] = field(default_factory=dict)
    lora: Annotated[Lora | None, optional(_lora)] = None
    learning_rate: Annotated[float, number(0, 1, is_open=True)] = 2e-5
    lr_scheduler: Annotated[str, choice("linear", "cosine", "constant", "constant_with_warmup")] = "linear"
    warmup_ratio: Annotated[float, number(0, 0.99)] = 0.0
    weight_decay: Annotated[float, number(0, 1)] = 0.0
    num_epochs: Annotated[float, number(0, is_open=True)] = 3.0
    max_steps: Annotated[int | None, optional(_count)] = None
    max_length: Annotated[int, number(8, is_whole=True)] = 1024
    batch_size: Annotated[int | None, optional(_count)] = None
    per_device_batch_size: Annotated[int, _count] = 8
    gradient_accumulation_steps: Annotated[int | None, optional(_count)] = None
    num_devices: Annotated[int, _count] = 1
    precision: Annotated[str, choice("bf16", "fp16", "fp32")] = "bf16"
    gradient_checkpointing: Annotated[bool, boolean] = True
    seed: Annotated[int, number(0, 2**32 - 1, is_whole=True)] = 42
    packing: Annotated[bool, boolean] = False
    shuffle: Annotated[bool, boolean] = True
    validation_ratio: Annotated[float, number(0, 0.99)] = 0.0
    logging_steps: Annotated[int, _count] = 10
    save_steps: Annotated[int | None, optional(_count)] = 500
    eval_steps: Annotated[int | None, optional(_count)] = None
    deepspeed: Annotated[str | None, optional(text)] = None
    fsdp_config: Annotated[str | None, optional(text)] = None
    hosts: Annotated[dict[str, dict[str, Any]], _hosts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.eval_steps is None) != (self.validation_ratio == 0):
            raise RecipeError("`eval_steps` and `validation_ratio` need each other: give both, or neither.")
        if self.deepspeed and self.fsdp_config:
            raise RecipeError("`deepspeed` and `fsdp_config` exclude each other: give one.")
        rows = self.per_device_batch_size * self.num_devices
        if self.batch_size is None:
            return
        if self.batch_size % rows or self.gradient_accumulation_steps not in (None, self.batch_size // rows):
            parts = f"`per_device_batch_size` {self.per_device_batch_size} x `num_devices` {self.num_devices}"
            if self.gradient_accumulation_steps is not None:
                parts += f" x `gradient_accumulation_steps` {self.gradient_accumulation_steps}"
            raise RecipeError(f"`batch_size` {self.batch_size} must be {parts}, or a multiple where that is not set.")

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per optimizer step."""
        if self.batch_size is not None:
            return self.batch_size // (self.per_device_batch_size * self.num_devices)
        return self.gradient_accumulation_steps or 1

    def derta_config(self) -> DeRTaConfig:
        """The knobs, with the recipe's seed where they have none of their own."""
        return DeRTaConfig.from_mapping({"seed": self.seed, **self.derta})


def _knobs(key: str, value: Any) -> dict[str, Any]:
    knobs = mapping(key, value)
    try:
        DeRTaConfig.from_mapping(knobs)
    except ConfigError as error:
        raise RecipeError(f"In `{key}`: {error}") from error
    return knobs


def _names(key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"`{key}` must be a list of names, got {value!r}.")
    return [text(key, name) for name in value]


def _data(key: str, value: Any) -> tuple[DataFile, ...]:
    if not isinstance(value, list):
        raise RecipeError(f"`{key}` must be a list of files, got {value!r}.")
    files = tuple(build(DataFile, entry, f"{key}[{place}].") for place, entry in enumerate(value))
    if not any(file.kind == "safety" for file in files):
        raise RecipeError(f"`{key}` has no file of `kind: safety`: there is nothing for DeRTa to train.")
    return files


def _hosts(key: str, value: Any) -> dict[str, dict[str, Any]]:
    blocks = mapping(key, value)
    for name in blocks:
        if name not in HOSTS:
            raise RecipeError(f"Unknown host `{key}.{name}`.{near(name, HOSTS) or known(HOSTS)}")
    return {name: mapping(f"{key}.{name}", block) for name, block in blocks.items()}


def _lora(key: str, value: Any) -> Lora:
    return build(Lora, value, f"{key}.")
