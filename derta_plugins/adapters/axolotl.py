"""
DeRTa in Axolotl: a plugin, a `derta:` block, and a dataset type for safety records.

```yaml
plugins: [derta_plugins.adapters.axolotl.DeRTaPlugin]
derta:
  refusal_text: Sorry
datasets:
  - {path: triples.jsonl, type: derta_plugins.adapters.axolotl}
  - {path: helpful.jsonl, type: chat_template}
```

This module is what the config names. Axolotl prints an ImportError of a plugin and trains on without it; from here such
an error ends the run.
"""

from __future__ import annotations

import axolotl  # noqa: F401  (without Axolotl itself this fails as an adapter of an absent host does)

try:
    from derta_plugins.adapters.axolotl_names import NEWEST_TESTED, OLDEST_TESTED, version_problem
    from derta_plugins.hookspecs import Adapter, HostVersionError, hookimpl

    if problem := version_problem():
        raise HostVersionError(problem)
    from derta_plugins.adapters.axolotl_args import DeRTaArgs
    from derta_plugins.adapters.axolotl_plugin import DeRTaPlugin, load
except ImportError as error:
    raise RuntimeError(
        f"DeRTa was asked for, and its Axolotl adapter does not import ({error}). Reinstall it: pip install "
        "--force-reinstall 'derta-plugins[axolotl]'"
    ) from error

__all__ = ["DeRTaArgs", "DeRTaPlugin", "derta_adapter", "load"]


@hookimpl
def derta_adapter() -> Adapter:
    """Axolotl, for `derta doctor`."""
    return Adapter("axolotl", "axolotl", OLDEST_TESTED, NEWEST_TESTED, "set `plugins: derta` in its config")
