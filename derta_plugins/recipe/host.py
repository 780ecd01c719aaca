"""What a host's converter has to say: its name, the keys that are the recipe's alone, its own defaults, its draft."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from derta_plugins.core.config import DeRTaConfig
from derta_plugins.recipe.checks import RecipeError
from derta_plugins.recipe.schema import Recipe


@dataclass(frozen=True)
class OwnDefault:
    """What a host does with a key that its config leaves out: the value in its schema, and what comes of it."""

    value: Any
    meaning: str = ""

    def __str__(self) -> str:
        return self.meaning or f"{self.value}"


@dataclass
class Draft:
    """
    A host's config for a recipe, before it is written.

    Attributes:
        config: The host's keys with their values.
        missing: What the recipe says and the host has no counterpart for.
        notes: What the host does otherwise than the other hosts, where no key changes it.
        other_files: Files that stand beside the config, by name.
    """

    config: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    other_files: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Host:
    """
    One host.

    Attributes:
        title: Its name as people write it.
        config_file: Name of the config file that is written.
        draft: Makes its config from a recipe, for files that go to the folder of the second argument.
        reserved: Keys that say what is trained: the recipe's `hosts` block must not replace them.
        own_defaults: What the host does where its config leaves a key out.
        command: Line that starts the run, from the config's path and the number of devices.
    """

    title: str
    config_file: str
    draft: Callable[[Recipe, str], Draft]
    reserved: Collection[str]
    own_defaults: dict[str, OwnDefault]
    command: Callable[[str, int], str]


def shared_training_keys(recipe: Recipe) -> dict[str, Any]:
    """Settings of the training that all hosts have under one name, which is that of `transformers`."""
    config: dict[str, Any] = {
        "gradient_accumulation_steps": recipe.accumulation_steps,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "bf16": recipe.precision == "bf16",
        "fp16": recipe.precision == "fp16",
        "seed": recipe.seed,
        "logging_steps": recipe.logging_steps,
        "save_strategy": "no" if recipe.save_steps is None else "steps",
    }
    optional = {"max_steps": recipe.max_steps, "save_steps": recipe.save_steps, "deepspeed": recipe.deepspeed}
    return config | {name: value for name, value in optional.items() if value is not None}


def refuse_knobs(recipe: Recipe, names: tuple[str, ...], host: str, reason: str) -> None:
    """
    End the conversion if one of these knobs is not at its default.

    Raises:
        RecipeError: Names the knob, its value, and why the host cannot do it.
    """
    config = recipe.derta_config()
    for name in names:
        value, default = getattr(config, name), getattr(DeRTaConfig, name)
        if value != default:
            raise RecipeError(
                f"`derta.{name}: {value}` has no counterpart in {host}: {reason}. Leave it out, or train with TRL."
            )


def refuse_file(file_path: str, what: str, host: str, instead: str) -> RecipeError:
    """Error for a data file that a host cannot read."""
    return RecipeError(f"{file_path}: {what} has no counterpart in {host}. {instead}")
