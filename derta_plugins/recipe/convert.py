"""Write a recipe as the config of one host, and say what that host has no counterpart for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from derta_plugins import __version__
from derta_plugins.recipe import axolotl, llamafactory, trl
from derta_plugins.recipe.checks import RecipeError
from derta_plugins.recipe.host import Draft, Host
from derta_plugins.recipe.schema import Recipe

HOSTS: dict[str, Host] = {"trl": trl.HOST, "axolotl": axolotl.HOST, "llamafactory": llamafactory.HOST}


@dataclass(frozen=True)
class Conversion:
    """
    A recipe in a host's words.

    Attributes:
        config: The host's keys with their values.
        files: Text of each file to write, by name.
        remarks: Lines that say how to start the run, what the host has no counterpart for, what it does otherwise, and
            which of its own defaults are replaced; they stand on top of the config too.
    """

    config: dict[str, Any]
    files: dict[str, str]
    remarks: list[str]


def convert(recipe: Recipe, host_name: str, *, output_dir: str = ".", source: str = "a recipe") -> Conversion:
    """
    The files of `recipe` for one host.

    Args:
        recipe: The recipe.
        host_name: `trl`, `axolotl` or `llamafactory`.
        output_dir: Folder the files go to, from where the host is started.
        source: Name of the recipe, for the comment on top of the config.

    Raises:
        RecipeError: If the host is unknown, or cannot do something without which the run would train otherwise.
    """
    if host_name not in HOSTS:
        raise RecipeError(f"Unknown host {host_name!r}: expected one of {', '.join(HOSTS)}.")
    host = HOSTS[host_name]
    made = host.draft(recipe, output_dir)
    _add_host_block(made, recipe.hosts.get(host_name, {}), host, host_name)
    remarks = _remarks(recipe, made, host, output_dir)
    first = f"Written from {source} by `derta recipe convert` (derta-plugins {__version__}) for {host.title}."
    head = "".join(f"# {line}\n" for line in [first, *remarks])
    body = yaml.safe_dump(made.config, sort_keys=False, allow_unicode=True, width=120)
    files = {host.config_file: f"{head}\n{body}"}
    files |= {name: json.dumps(content, indent=2) + "\n" for name, content in made.other_files.items()}
    return Conversion(made.config, files, remarks)


def write(conversion: Conversion, output_dir: str | Path, *, is_forced: bool = False) -> list[Path]:
    """
    Write the files of a conversion.

    Raises:
        RecipeError: If one of them exists already, unless `is_forced`; nothing is written then.
    """
    folder = Path(output_dir)
    paths = {folder / name: content for name, content in conversion.files.items()}
    existing = [str(path) for path in paths if path.exists()]
    if existing and not is_forced:
        raise RecipeError(f"{', '.join(existing)} exists already: give another --output-dir, or --force to overwrite.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in paths.items():
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return list(paths)


def _add_host_block(made: Draft, block: dict[str, Any], host: Host, name: str) -> None:
    """Put the keys for this host alone into its config, where they win; what is trained stays the recipe's."""
    for key, value in block.items():
        if key in host.reserved or key.startswith("derta"):
            raise RecipeError(f"`hosts.{name}.{key}` says what is trained: say it in the recipe's own keys.")
        old = made.config.get(key)
        if key == "plugins":
            if not isinstance(value, list):
                raise RecipeError(f"`hosts.{name}.plugins` must be a list, got {value!r}.")
            value = [*old, *value]
        elif key in made.config and old != value:
            made.notes.append(f"`{key}: {_inline(value)}` of `hosts.{name}` stands in place of {_inline(old)}.")
        made.config[key] = value


def _remarks(recipe: Recipe, made: Draft, host: Host, output_dir: str) -> list[str]:
    devices, rows, steps = recipe.num_devices, recipe.per_device_batch_size, recipe.accumulation_steps
    changed = [
        f"`{key}: {_inline(made.config[key])}` (its own: {own})"
        for key, own in host.own_defaults.items()
        if key in made.config and made.config[key] != own.value
    ]
    parts = {
        f"No counterpart in {host.title}:": made.missing,
        f"Otherwise in {host.title}:": made.notes,
        f"Set because {host.title}'s own default is another:": changed,
    }
    lines = [
        f"Start it with: {host.command(str(Path(output_dir) / host.config_file), devices)}",
        f"Rows per step: {devices} device(s) x {rows} x {steps} = {devices * rows * steps}.",
    ]
    for title, part in parts.items():
        lines += [title, *(f"- {line}" for line in part)] if part else []
    return lines


def _inline(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
