"""Checks of a recipe's values. A check takes the key and its value, and returns the value or raises `RecipeError`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from derta_plugins.core.config import ConfigError

Check = Callable[[str, Any], Any]
Settings = TypeVar("Settings")


class RecipeError(ConfigError):
    """A recipe has a wrong key or value, or asks a host for what it cannot do."""


def number(lowest: float, highest: float = math.inf, *, is_whole: bool = False, is_open: bool = False) -> Check:
    """A finite number from `lowest` to `highest`; `is_open` leaves the two ends out."""
    kinds, kind = (int, "a whole number") if is_whole else ((int, float), "a number")
    ends = "()" if is_open else "[]"
    allowed = f"{ends[0]}{lowest:g}, {highest:g}{')' if math.isinf(highest) else ends[1]}"

    def check(key: str, value: Any) -> Any:
        # `bool` is an `int` in Python, and NaN compares false with everything
        fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not (lowest < value < highest if is_open else lowest <= value <= highest):
            raise RecipeError(f"`{key}` must be {kind} in {allowed}, got {value!r}.")
        return value

    return check


def choice(*names: str) -> Check:
    """One of `names`."""

    def check(key: str, value: Any) -> Any:
        if value not in names:
            allowed = ", ".join(map(repr, names))
            raise RecipeError(f"`{key}` must be one of {allowed}, got {value!r}.{near(value, names)}")
        return value

    return check


def boolean(key: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise RecipeError(f"`{key}` must be true or false, got {value!r}.")
    return value


def text(key: str, value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"`{key}` must be text, got {value!r}.")
    return value


def mapping(key: str, value: Any) -> dict[str, Any]:
    """Keys with values; null is an empty block."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise RecipeError(f"`{key}` must be a block of keys and values, got {value!r}.")
    return dict(value)


def optional(check: Check) -> Check:
    """Null, or what `check` takes."""
    return lambda key, value: None if value is None else check(key, value)


def build(kind: type[Settings], values: Any, where: str = "") -> Settings:
    """
    Make a dataclass, whose fields are annotated with their checks, from a block of YAML.

    Args:
        kind: The dataclass; each field is `Annotated[type, check]`.
        values: The block.
        where: What stands before its keys in messages, such as `lora.`.

    Raises:
        RecipeError: If a key is unknown (the nearest known key is suggested) or missing, or a value is wrong.
    """
    values = mapping(where.rstrip(".") or "the recipe", values)
    checks = {name: hint.__metadata__[0] for name, hint in get_type_hints(kind, include_extras=True).items()}
    for key in values:
        if key not in checks:
            raise RecipeError(f"Unknown key `{where}{key}`.{near(key, checks) or known(checks)}")
    for knob in fields(kind):
        if knob.default is MISSING and knob.default_factory is MISSING and values.get(knob.name) is None:
            raise RecipeError(f"`{where}{knob.name}` is missing; it has no default.")
    return kind(**{key: checks[key](f"{where}{key}", value) for key, value in values.items()})


def near(name: Any, names: Iterable[str]) -> str:
    """Sentence that suggests the nearest of `names`; empty if none is near."""
    found = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean `{found[0]}`?" if found else ""


def known(names: Iterable[str]) -> str:
    """Sentence that lists `names`."""
    return f" Known: {', '.join(names)}."
