"""What a host adapter must provide. The whole contract between DeRTa and a training framework is in this file."""

from __future__ import annotations

from dataclasses import dataclass

import pluggy

PROJECT = "derta_plugins"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Adapter:
    """
    One host framework and how DeRTa is switched on in it.

    Attributes:
        name: Name of the entry point.
        host: Distribution name of the host.
        oldest_tested: Oldest host version that the tests run.
        newest_tested: Newest host version that the tests run.
        how_to_use: One line for `derta doctor`.
    """

    name: str
    host: str
    oldest_tested: str
    newest_tested: str
    how_to_use: str


@hookspec(firstresult=True)
def derta_adapter() -> Adapter | None:
    """
    Return the description of the one host framework this plugin connects.

    A distribution offers an adapter with an entry point of the group `derta_plugins` that names a module; the module
    imports its host at the top and holds this hook.

    Example:
        >>> @hookimpl
        ... def derta_adapter():
        ...     return Adapter("myhost", "my-host", "1.0", "1.2", "set `plugins: derta` in its config")
        >>> derta_adapter().host
        'my-host'
    """
