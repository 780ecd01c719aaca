"""Load records from what users have: local JSON, JSON Lines, CSV or Parquet files, folders, and hub names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}


class RecordsNotFoundError(ValueError):
    """The path or name does not lead to any record."""


def load_records(source: str, *, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """
    Records of `source`, through the `datasets` library.

    Args:
        source: Path of a file (`.json`, `.jsonl`, `.ndjson`, `.parquet`, `.csv`) or of a folder of them, a folder
            written by `Dataset.save_to_disk`, or a name on the hub.
        split: Split of a hub name or folder; a single file has all its records in `train`.
        streaming: Read lazily, as an `IterableDataset`.

    Raises:
        RecordsNotFoundError: If there is nothing at `source`, or it holds no record.
    """
    import datasets

    path = Path(source)
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


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
