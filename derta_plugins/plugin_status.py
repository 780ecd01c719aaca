"""`derta plugins`: what each installed plugin is, whose, and whether it works."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from derta_plugins.plugin_manager import (
    HostMissingError,
    PluginError,
    distribution_of,
    installed_plugins,
    kinds_of,
    load_hooks,
    offer_of,
    owner,
)

Status = Literal["ok", "host missing", "broken", "conflict"]
_STYLES: dict[Status, str] = {"ok": "green", "host missing": "dim", "broken": "red", "conflict": "red"}


@dataclass(frozen=True)
class PluginStatus:
    """
    One installed plugin, as it is here.

    Attributes:
        name: Name of its entry point.
        kinds: What it is: adapter, reader, transform, attack, judge; empty if it could not be loaded.
        distribution: Name of the distribution that offers it.
        version: Version of that distribution.
        module: What its entry point names.
        status: `host missing` is no fault of the plugin; `broken` and `conflict` are.
        reason: What is wrong, or with whom it is in conflict; empty if it is ok.
    """

    name: str
    kinds: tuple[str, ...]
    distribution: str
    version: str
    module: str
    status: Status
    reason: str = ""

    @property
    def is_faulty(self) -> bool:
        """Whether something must be mended before this plugin can be used."""
        return self.status in ("broken", "conflict")


def plugin_statuses() -> list[PluginStatus]:
    """State of every installed plugin, by name. Loads each on its own, but for those that share a name."""
    plugins = installed_plugins()
    return [
        _plugin_status(plugin, [other for other in plugins if other.name == plugin.name and other is not plugin])
        for plugin in plugins
    ]


def faults(statuses: list[PluginStatus]) -> str:
    """One sentence about the plugins that are broken or in conflict; empty if there is none."""
    faulty = sorted({f"{plugin.name} ({plugin.status})" for plugin in statuses if plugin.is_faulty})
    return f"These plugins cannot be used: {', '.join(faulty)}." if faulty else ""


def print_plugins(statuses: list[PluginStatus], console: Console) -> None:
    """Print the table of plugins."""
    table = Table()
    for name in ("name", "kind", "distribution", "version"):
        table.add_column(name, overflow="fold", style="bold" if name == "name" else "")
    table.add_column("status", overflow="fold", ratio=1)
    for plugin in statuses:
        status = Text(plugin.status, _STYLES[plugin.status]).append(plugin.reason and f": {plugin.reason}")
        cells = (plugin.name, ", ".join(plugin.kinds) or "?", plugin.distribution, plugin.version)
        table.add_row(*map(Text, cells), status)
    console.print(table)


def as_json(statuses: list[PluginStatus]) -> str:
    """The same as a JSON list."""
    return json.dumps([asdict(plugin) for plugin in statuses], indent=2)


def _plugin_status(plugin: EntryPoint, rivals: list[EntryPoint]) -> PluginStatus:
    facts = (*distribution_of(plugin), plugin.value)
    if rivals:
        return PluginStatus(plugin.name, (), *facts, "conflict", f"also offered by {' and '.join(map(owner, rivals))}")
    kinds: list[str] = []
    try:
        # what a plugin prints while it loads must not stand in our JSON
        with redirect_stdout(sys.stderr):
            hooks = load_hooks(plugin)
            kinds = kinds_of(hooks)
            for kind in kinds:
                offer_of(plugin, hooks, kind)
    except PluginError as error:
        status: Status = "host missing" if isinstance(error, HostMissingError) else "broken"
        return PluginStatus(plugin.name, tuple(kinds), *facts, status, error.reason)
    return PluginStatus(plugin.name, tuple(kinds), *facts, "ok")
