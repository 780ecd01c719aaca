"""Find the adapter of one host framework, and load no other."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

import pluggy

from derta_plugins import hookspecs


class AdapterError(RuntimeError):
    """An adapter is unknown, or its host framework cannot be imported."""


def adapter_names() -> list[str]:
    """Names of the installed adapters, read from package metadata. Imports no host."""
    return sorted({entry_point.name for entry_point in entry_points(group=hookspecs.PROJECT)})


def get_adapter(name: str) -> hookspecs.Adapter:
    """
    Load one adapter by name.

    Raises:
        AdapterError: If no installed package offers `name`, if two do, if its host framework does not import, or if its
            module has no hook.
    """
    offers = entry_points(group=hookspecs.PROJECT, name=name)
    if len(offers) > 1:
        owners = ", ".join(sorted(offer.dist.name if offer.dist else "?" for offer in offers))
        raise AdapterError(f"Adapter {name!r} is offered by {owners}: uninstall all but one.")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        found = manager.load_setuptools_entrypoints(hookspecs.PROJECT, name=name)
    except ImportError as error:
        raise AdapterError(
            f"Adapter {name!r} does not import ({error}). It needs its host: pip install 'derta-plugins[{name}]'"
        ) from error
    if not found:
        near = difflib.get_close_matches(name, adapter_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise AdapterError(f"Unknown adapter {name!r}.{hint} Installed: {', '.join(adapter_names()) or 'none'}.")
    manager.check_pending()
    adapter = manager.hook.derta_adapter()
    if adapter is None:
        raise AdapterError(f"Adapter {name!r} has no hook `derta_adapter`: its entry point names the wrong module.")
    return adapter
