"""How Axolotl's config names DeRTa, and the versions of Axolotl that the adapter is for. Needs no host and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PLUGIN = "derta_plugins.adapters.axolotl.DeRTaPlugin"
DATASET_TYPE = "derta_plugins.adapters.axolotl"
BLOCK = "derta"
SPLITS = ("datasets", "test_datasets")
OLDEST_TESTED = NEWEST_TESTED = "0.19.0"
UNSUPPORTED_FROM = "0.20"


def version_problem() -> str:
    """Why the installed Axolotl cannot be used; empty if it can."""
    from packaging.specifiers import SpecifierSet

    try:
        installed = version("axolotl")
    except PackageNotFoundError:
        installed = "none"
    supported = f">={OLDEST_TESTED},<{UNSUPPORTED_FROM}"
    # a release candidate of what is not supported is not below it
    if installed != "none" and SpecifierSet(supported).contains(installed, prereleases=True):
        return ""
    return f"DeRTa needs axolotl{supported}, got {installed}: pip install 'axolotl{supported}'"


def entries_of(cfg: Mapping[str, Any], split: str) -> list[Any]:
    """Entries of one of `SPLITS` in a config, validated or not."""
    entries = cfg.get(split)
    return list(entries) if isinstance(entries, list | tuple) else []


def is_ours(entry: Any) -> bool:
    """Whether a dataset entry holds safety records for DeRTa."""
    kind = entry.get("type") if isinstance(entry, Mapping) else getattr(entry, "type", None)
    # Axolotl also takes the name of the function
    return kind in (DATASET_TYPE, f"{DATASET_TYPE}.load")


def our_entries(cfg: Mapping[str, Any], split: str) -> list[Any]:
    """Entries of one split that hold safety records for DeRTa."""
    return [entry for entry in entries_of(cfg, split) if is_ours(entry)]
