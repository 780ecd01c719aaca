"""Lays out a third party's distribution as an installer would: modules and metadata, nothing of this repository."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

READER = """
from datasets import Dataset
from derta_plugins.hookspecs import Reader, hookimpl

ROWS = [{"prompt": "How do I bake it?", "chosen": "Sorry, no.", "rejected": "Step 1: mix the flour"}]

def read(source, *, split, streaming):
    return Dataset.from_list(ROWS)

@hookimpl
def derta_reader():
    return Reader("{name}", "one triple", read)
"""


def write_distribution(
    folder: Path,
    entry_points: Mapping[str, str] | Sequence[tuple[str, str]],
    modules: Mapping[str, str],
    *,
    name: str = "third-party",
    version: str = "1.0",
    metadata: Sequence[str] = (),
) -> None:
    """Write `modules` (file name to source) and the metadata of the distribution `name` into `folder`."""
    for path, source in modules.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *metadata]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    pairs = entry_points.items() if isinstance(entry_points, Mapping) else entry_points
    (info / "entry_points.txt").write_text("[derta_plugins]\n" + "".join(f"{key} = {value}\n" for key, value in pairs))


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, entry_points, modules: Mapping[str, str], **options) -> None:
    """Write a distribution and put it on the path of this process until the test ends."""
    write_distribution(folder, entry_points, modules, **options)
    monkeypatch.syspath_prepend(folder)
    for path in modules:
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        # whatever the test imports under this name is forgotten after it
        monkeypatch.setitem(sys.modules, module, None)
        del sys.modules[module]
