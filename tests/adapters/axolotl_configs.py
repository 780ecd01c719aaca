"""Axolotl configs in this process: what the host makes of one, and a plugin manager that is given back."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli import config as host_config
from axolotl.integrations.base import PluginManager
from axolotl.telemetry.manager import TelemetryManager
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from derta_plugins.adapters import axolotl_patch as patch
from derta_plugins.adapters.axolotl_names import DATASET_TYPE, PLUGIN
from tests.conftest import byte_level_bpe, helpful_records, safety_records, tiny_llama
from tests.readme_blocks import ROOT

TINY = ROOT / "examples" / "axolotl" / "tiny.yml"
TRIPLES = 6


@contextlib.contextmanager
def own_plugins() -> Iterator[None]:
    """The host's plugin manager, one per process, without plugins; it is as it was afterwards, and so is the host."""
    TelemetryManager.get_instance().enabled = False
    manager = PluginManager.get_instance()
    before, was_applied = (manager.plugins, manager.cfg), patch.is_applied()
    manager.plugins, manager.cfg = collections.OrderedDict(), None
    try:
        patch.apply(host_config)
        yield
    finally:
        manager.plugins, manager.cfg = before
        (patch.apply if was_applied else lambda module: patch.undo())(host_config)


def make_folder(folder: Path) -> Path:
    """The files that `tiny.yml` names; of the model, its tokenizer and its config."""
    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(folder / "my-model")
    tiny_llama(len(tokenizer)).config.save_pretrained(folder / "my-model")
    Dataset.from_list(safety_records(TRIPLES)).to_json(folder / "triples.jsonl")
    Dataset.from_list(helpful_records(8)).to_json(folder / "helpful.jsonl")
    return folder


def make_config(folder: Path, **changes: Any) -> DictDefault:
    """`tiny.yml` as the host reads it, with some keys changed (None takes one out)."""
    tiny = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    here = {"base_model": str(folder / "my-model"), "output_dir": str(folder / "out")}
    datasets = [{**entry, "path": str(folder / entry["path"])} for entry in tiny["datasets"]]
    config = {**tiny, **here, "datasets": datasets, **changes}
    return DictDefault({key: value for key, value in config.items() if value is not None})


def entry(folder: Path, name: str = "triples", **settings: Any) -> dict[str, Any]:
    """A dataset entry of safety records, if `type` says nothing else."""
    return {
        "path": str(folder / f"{name}.jsonl"),
        "ds_type": "json",
        "split": "train",
        "type": DATASET_TYPE,
        **settings,
    }


def validated(config: Mapping[str, Any]) -> DictDefault:
    """A config after the host's own functions, in the order of its `load_cfg`."""
    host_config.prepare_plugins(config)
    return host_config.validate_config(config, capabilities={"bf16": False, "n_gpu": 1}, env_capabilities={})


def our_plugin() -> Any:
    """The plugin that the host made for the config it read last."""
    return PluginManager.get_instance().plugins[PLUGIN]
