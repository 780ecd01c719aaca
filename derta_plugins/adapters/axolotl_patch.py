"""
The short forms `plugins: derta` and `plugins: [derta]`, and a stop where DeRTa was asked for but not loaded.

One function of Axolotl is wrapped: `axolotl.cli.config.prepare_plugins`, which loads what `plugins:` names. It reads a
bare string letter by letter, and prints an ImportError of a plugin and trains on without it. Nothing here imports torch
or the trainer.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from derta_plugins.adapters.axolotl_names import BLOCK, DATASET_TYPE, PLUGIN, SPLITS, our_entries, version_problem
from derta_plugins.core.config import ConfigError

logger = logging.getLogger(__name__)

HOST_MODULE = "axolotl.cli.config"
_HOST_FUNCTION = "_derta_host_function"


def apply(module: ModuleType) -> None:
    """
    Wrap `prepare_plugins` of `module`, once. An Axolotl that this does not fit is left as it was, with a warning.

    Args:
        module: `axolotl.cli.config`.
    """
    problems = _problems(module)
    if problems:
        logger.warning(
            "DeRTa does not extend this Axolotl, which runs as it did (`plugins: derta` is unknown to it): %s.",
            "; ".join(problems).rstrip("."),
        )
    elif not hasattr(module.prepare_plugins, _HOST_FUNCTION):
        module.prepare_plugins = _wrapped(module.prepare_plugins)


def undo() -> None:
    """Give Axolotl its own function back."""
    module = sys.modules.get(HOST_MODULE)
    if module is not None and is_applied():
        module.prepare_plugins = getattr(module.prepare_plugins, _HOST_FUNCTION)


def is_applied() -> bool:
    """Whether Axolotl is extended in this interpreter."""
    return hasattr(getattr(sys.modules.get(HOST_MODULE), "prepare_plugins", None), _HOST_FUNCTION)


def missing_points() -> list[str]:
    """What the installed Axolotl lacks, or why its version is not supported; empty if all is there. Imports Axolotl."""
    return _problems(import_module(HOST_MODULE))


def _problems(module: ModuleType) -> list[str]:
    if problem := version_problem():
        return [problem]
    prepare = inspect.unwrap(getattr(module, "prepare_plugins", None) or (lambda: None))
    if list(inspect.signature(prepare).parameters) != ["cfg"]:
        return [f"{HOST_MODULE}.prepare_plugins(cfg) is not there"]
    loads = getattr(inspect.unwrap(getattr(module, "load_cfg", prepare)), "__code__", None)
    if loads is None or "prepare_plugins" not in loads.co_names:
        return [f"{HOST_MODULE}.load_cfg does not call prepare_plugins"]
    return []


def _wrapped(host: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(host)
    def prepare_plugins(cfg: Any) -> None:
        if cfg.get("plugins"):
            cfg["plugins"] = long_names(cfg["plugins"])
        host(cfg)
        _check_is_loaded(cfg)

    setattr(prepare_plugins, _HOST_FUNCTION, host)
    return prepare_plugins


def long_names(plugins: Any) -> Any:
    """
    `plugins:` with the short forms of DeRTa written out; other names are left as they are.

    Raises:
        ConfigError: If it is one bare string that is no name of DeRTa, but looks like one.

    Example:
        >>> long_names(["my.Plugin", "derta"])
        ['my.Plugin', 'derta_plugins.adapters.axolotl.DeRTaPlugin']
    """
    if isinstance(plugins, str):
        if _is_name_of_ours(plugins):
            return [PLUGIN]
        if _looks_like_ours(plugins):
            raise ConfigError(
                f"`plugins: {plugins}` names no plugin; write `plugins: derta`, or a list with `{PLUGIN}`."
            )
        return plugins
    if not isinstance(plugins, list | tuple) or not any(map(_is_name_of_ours, plugins)):
        return plugins
    return list(dict.fromkeys(PLUGIN if _is_name_of_ours(name) else name for name in plugins))


def _is_name_of_ours(name: Any) -> bool:
    return isinstance(name, str) and (name.strip().lower() == BLOCK or name.strip() == PLUGIN)


def _looks_like_ours(name: Any) -> bool:
    return isinstance(name, str) and BLOCK in name.lower()


def _check_is_loaded(cfg: Any) -> None:
    """End the run if the config asks for DeRTa, however spelt, and Axolotl did not load it."""
    names = [name for name in cfg.get("plugins") or [] if isinstance(name, str)]
    uses = [f"`type: {DATASET_TYPE}` in `{split}`" for split in SPLITS if our_entries(cfg, split)]
    uses += [f"a block `{BLOCK}:`"] if BLOCK in cfg else []
    if not uses and not any(map(_looks_like_ours, names)):
        return
    from axolotl.integrations.base import PluginManager

    loaded = PluginManager.get_instance().plugins
    for name in names:
        if _looks_like_ours(name) and name not in loaded:
            raise ConfigError(
                f"Axolotl could not load the plugin {name!r} (its error stands above) and would train without it. "
                f"DeRTa is `plugins: derta`, or `{PLUGIN}`: check the spelling, or reinstall derta-plugins."
            )
    adapter = sys.modules.get(PLUGIN.rpartition(".")[0])
    if uses and not any(adapter and isinstance(loaded.get(name), adapter.DeRTaPlugin) for name in names):
        raise ConfigError(
            f"The config has {' and '.join(uses)}, but `plugins` does not turn DeRTa on: got {names}. Add "
            "`plugins: derta`."
        )
