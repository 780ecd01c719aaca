"""
What DeRTa's rows depend on, in the key of Axolotl's prepared datasets.

Axolotl keys them by settings of its own, so another refusal token would be trained on the rows of the old one. The
dataset field `conversation` is part of that key and, for our entries, of nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import Any

import axolotl
from axolotl.utils.data.shared import generate_dataset_hash_from_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset

from derta_plugins.adapters import axolotl_rows, prepare
from derta_plugins.adapters.axolotl_names import SPLITS, our_entries
from derta_plugins.adapters.row_datasets import BuildRows
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.transforms import transform_code

_TOKENIZER_FILES = (
    *("tokenizer*", "*.jinja", "chat_template*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model"),
)
# of those that change token ids, the ones that Axolotl's key leaves out
_TOKENIZER_SETTINGS = ("tokens", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy")
_SOURCES = (Path(axolotl_rows.__file__), Path(prepare.__file__))


def mark_entries(cfg: Any, config: DeRTaConfig) -> None:
    """
    Write what the rows depend on into each of our dataset entries.

    Args:
        cfg: Axolotl's config, which is changed.
        config: DeRTa's knobs.

    Raises:
        RuntimeError: If Axolotl's key does not change with it.
    """
    for split in SPLITS:
        for entry in our_entries(cfg, split):
            mark = entry_mark(cfg, entry, config, split)
            if isinstance(entry, Mapping):
                entry["conversation"] = mark
            else:
                entry.conversation = mark
            _check_host_keys_it(cfg, dict(entry))


def entry_mark(cfg: Mapping[str, Any], entry: Any, config: DeRTaConfig, split: str) -> str:
    """Digest of knobs, code, lengths, and the tokenizer and local files that an entry's rows are made from."""
    entry = dict(entry)
    known = {
        "config": asdict(config),
        "code": [BuildRows.code, transform_code(config), *(_sha256(source) for source in _SOURCES)],
        "max_length": axolotl_rows.max_length(cfg, split),
        "tokenizer": {name: cfg.get(name) for name in _TOKENIZER_SETTINGS},
        "files": {str(file): _sha256(file) for file in _files(cfg, entry)},
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return f"derta-{split}-{digest[:32]}"


def _files(cfg: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[Path]:
    """Local files of records, of the chat template and of the tokenizer."""
    data_files = entry.get("data_files") or []
    names = [entry.get("path"), *([data_files] if isinstance(data_files, str) else data_files)]
    names += [source.get("chat_template_jinja") for source in (entry, cfg)]
    for name in names:
        if isinstance(name, str) and "\n" not in name and len(name) < 1024:  # a template may stand in the config
            yield from _under(name)
    folder = cfg.get("tokenizer_config") or cfg.get("base_model_config") or cfg.get("base_model")
    if isinstance(folder, str) and Path(folder).is_dir():
        for pattern in _TOKENIZER_FILES:
            yield from sorted(file for file in Path(folder).glob(pattern) if file.is_file())


def _under(name: str) -> list[Path]:
    """Files that a local path, a folder or a pattern stands for; none for the name of a hub dataset."""
    if Path(name).is_dir():
        return sorted(file for file in Path(name).rglob("*") if file.is_file())
    return sorted(Path(file) for file in glob(name, recursive=True) if Path(file).is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_host_keys_it(cfg: Any, entry: dict[str, Any]) -> None:
    marks = (entry["conversation"], "derta-other")
    entry = {name: value for name, value in entry.items() if value is not None}
    # as Axolotl's validation leaves them
    entries = [SFTDataset(**{**entry, "conversation": mark}).model_dump(exclude_none=True) for mark in marks]
    keys = {generate_dataset_hash_from_config(cfg, [DictDefault(one)], "tokenizer") for one in entries}
    if len(keys) != len(marks):
        raise RuntimeError(
            f"Axolotl {axolotl.__version__} does not key its prepared datasets by `conversation`: it could train rows "
            "of other knobs from its cache. This version is not supported."
        )
