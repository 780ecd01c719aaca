"""Load records from what users have: local JSON, JSON Lines, CSV or Parquet files, folders, hub names, and readers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from derta_plugins.plugin_manager import PluginError, cause_of, find_plugin, get_reader, owner, plugin_names

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# `mydb:table`, but no Windows drive, no URL, and no path with a colon in a file's name
_READER_SOURCE = re.compile(r"([^:/\\]{2,}):(?!//)(.*)", re.DOTALL)
_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}


class RecordsNotFoundError(ValueError):
    """The path or name does not lead to any record."""


def load_records(source: str, *, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """
    Records of `source`, through the `datasets` library.

    Args:
        source: Path of a file (`.json`, `.jsonl`, `.ndjson`, `.parquet`, `.csv`) or of a folder of them, a folder
            written by `Dataset.save_to_disk`, a name on the hub, or `name:...` for the installed reader `name` (a file
            whose own name begins so is given as `./name:...`).
        split: Split of a hub name or folder; a single file has all its records in `train`.
        streaming: Read lazily, as an `IterableDataset`.

    Raises:
        PluginError: If the reader cannot be used.
        RecordsNotFoundError: If there is nothing at `source`, or it holds no record.
    """
    import datasets

    path = Path(source)
    if found := _READER_SOURCE.fullmatch(source):
        name, rest = found.groups()
        if name in plugin_names():
            return _read_with_plugin(name, rest, split=split, streaming=streaming)
        if not path.exists():
            raise RecordsNotFoundError(f"{source}: no such file or folder. {_why_no_reader(name)}")
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise RecordsNotFoundError(
                f"{source}: expected a file ending in {', '.join(_FORMATS)}, got {path.suffix!r}."
            )
        if path.stat().st_size == 0:
            raise RecordsNotFoundError(f"{source}: the file is empty.")
        load = {"path": _FORMATS[path.suffix], "data_files": str(path)}
    elif path.is_dir() and (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        saved = datasets.load_from_disk(source)
        return saved.to_iterable_dataset() if streaming else saved
    elif not path.exists() and (path.suffix in _FORMATS or source.startswith(("./", "/", "../"))):
        raise RecordsNotFoundError(f"{source}: no such file or folder.")
    else:
        load = {"path": source}
    try:
        records = datasets.load_dataset(**load, split=split, streaming=streaming)
    except Exception as error:  # `datasets` raises many kinds; the cause is kept
        hint = "" if path.exists() else " (and there is no such file here)"
        raise RecordsNotFoundError(f"{source}: cannot be loaded{hint}: {_first_line(error)}") from error
    if not streaming and len(records) == 0:
        raise RecordsNotFoundError(f"{source}: holds no record.")
    return records


def _read_with_plugin(name: str, source: str, *, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Records that the reader `name` gives, in the form that was asked for."""
    import datasets

    reader, whose = get_reader(name), f"the reader {name!r} of {owner(find_plugin(name))}"
    try:
        records = reader.read(source, split=split, streaming=streaming)
    except (Exception, SystemExit) as error:  # a reader may raise anything; it must not end the run without a word
        raise RecordsNotFoundError(f"{name}:{source}: {whose} failed: {cause_of(error)}.") from error
    if streaming and isinstance(records, datasets.Dataset):
        return records.to_iterable_dataset()
    wanted = datasets.IterableDataset if streaming else datasets.Dataset
    if not isinstance(records, wanted):
        raise PluginError(f"{name}:{source}: {whose} must return a {wanted.__name__}, got {type(records).__name__}.")
    if not streaming and len(records) == 0:
        raise RecordsNotFoundError(f"{name}:{source}: holds no record.")
    return records


def _why_no_reader(name: str) -> str:
    try:
        find_plugin(name, "reader")
    except PluginError as error:
        return str(error)
    return ""


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
