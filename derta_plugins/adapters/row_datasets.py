"""
Safety records in a `datasets` dataset become training rows, in memory or streaming: tokenise, then build.

Rows have the columns `input_ids`, `labels`, `rto_mask`, and `branch_starts` in the branch layout. Shared by the
adapters, whose hosts all bring `datasets`.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from derta_plugins import core, transforms
from derta_plugins.core.branch_layout import fold_rows
from derta_plugins.core.chat import RecordTokenizer, TokenizedAuthorsRow, TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.records import AuthorsRow, BadRecordError, Triple, parse_record
from derta_plugins.core.transform import Row, has_rto_row
from derta_plugins.plugin_manager import PluginError
from derta_plugins.transforms import build_training_rows, transform_code

logger = logging.getLogger(__name__)

TOKENIZED = "derta_tokenized"
INDEX = "derta_index"
"""Column with the place that a record had in the user's dataset, where that dataset was split."""

# Part of what is mapped over a dataset, and so of the key that `datasets` caches its result under: rows that an older
# release of this code built are never taken from a cache.
_SOURCES = [*sorted(Path(core.__file__).parent.glob("*.py")), Path(transforms.__file__), Path(__file__)]
CODE_DIGEST = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES)).hexdigest()

_IDS, _LABELS = List(Value("int32")), List(Value("int64"))
# Written out: inferred types would follow the first records, whose lists may all be empty.
TOKENIZED_FEATURES = Features(
    {
        TOKENIZED: {
            "prompt_ids": _IDS,
            "chosen_ids": _IDS,
            "rejected_ids": _IDS,
            "end_ids": _IDS,
            "word_ends": _IDS,
            "earlier_turns": List(_IDS),
            "is_authors_row": Value("bool"),
            "is_authors_rto": Value("bool"),
        },
        "index": Value("int64"),
        "skipped": Value("string"),
    }
)
_ROW_FEATURES = {"input_ids": _LABELS, "labels": _LABELS, "rto_mask": List(Value("bool"))}
ROW_COUNTS = ("mle_rows", "rto_rows", "truncated_rows", "limited_rows")
"""Columns of built rows that count the transform's rows in each of them (a branch row holds several)."""


def row_features(config: DeRTaConfig) -> Features:
    """Columns that a row goes to the collator with."""
    return Features({**_ROW_FEATURES, **({"branch_starts": _IDS} if config.layout == "branch" else {})})


def is_streaming(dataset: Any) -> bool:
    """Whether `dataset` is read lazily."""
    return isinstance(dataset, IterableDataset)


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Column names; a stream that does not know them is asked for its first record."""
    return list(dataset.column_names or next(iter(dataset), {}))


def arrow_batches(dataset: Dataset, *columns: str) -> Iterator[Any]:
    """Columns as Arrow tables of a thousand rows: what is counted over these needs no memory per row."""
    return dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=1000)


def count_values(values: Any) -> Counter[Any]:
    """How often each value is in an Arrow array."""
    return Counter({item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist()})


def tokenize_records(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    config: DeRTaConfig,
    *,
    max_length: int | None,
    skipped: Counter[str],
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Safety records as token ids, in one private column that no model and no collator takes for input.

    Raises:
        BadRecordError: If a record is bad and `on_bad_record` is `error`.
    """
    tokenize = TokenizeRecord(RecordTokenizer.for_config(tokenizer, config), config, max_length)
    if is_streaming(dataset):
        tokenize = replace(tokenize, draws_by_content=True)
    return map_tokenized(dataset, tokenize, skipped=skipped, num_proc=num_proc)


def map_tokenized(
    dataset: Dataset | IterableDataset, tokenize: TokenizeRecord, *, skipped: Counter[str], **options: Any
) -> Dataset | IterableDataset:
    """
    Records mapped by `tokenize`, without those that it skips; `options` go to `Dataset.map` (a stream has none).

    Raises:
        BadRecordError: If a record is bad and `on_bad_record` is `error`.
    """
    columns = columns_of(dataset)
    if is_streaming(dataset):
        # types come last: datasets 4.0 cannot filter a stream that has them
        stream = dataset.map(tokenize, with_indices=True, remove_columns=columns).filter(_keep_and_say_skipped)
        return stream.cast(TOKENIZED_FEATURES)
    tokenized = dataset.map(
        tokenize,
        with_indices=True,
        remove_columns=columns,
        features=TOKENIZED_FEATURES,
        desc="Tokenizing safety records",
        **options,
    )
    reasons: Counter[str] = Counter()
    for batch in arrow_batches(tokenized, "skipped"):
        reasons.update(count_values(batch["skipped"]))
    del reasons[""]
    skipped.update(reasons)
    # what is filtered is read through a table of places, row by row
    return tokenized.filter(operator.not_, input_columns="skipped", **options) if reasons else tokenized


def build_dataset(
    tokenized: Dataset | IterableDataset, build: BuildRows, *, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Training rows of tokenised records, drawn once (epoch 0)."""
    features = Features({**row_features(build.config), **{name: Value("int32") for name in ROW_COUNTS}})
    options: dict[str, Any] = {"batched": True, "remove_columns": columns_of(tokenized), "features": features}
    if is_streaming(tokenized):
        return tokenized.map(build, **options)
    return tokenized.map(build, num_proc=num_proc, desc="Building DeRTa rows", **options)


@dataclass(frozen=True)
class BuildRows:
    """Maps tokenised records to rows. Picklable, and hashed with its knobs into the cache key of `datasets`."""

    config: DeRTaConfig
    refusal_token_id: int
    max_length: int | None
    code: str = CODE_DIGEST
    transform: str = field(init=False)

    def __post_init__(self) -> None:
        # a part of the cache key; and a transform that cannot be had ends the run before a record is read
        object.__setattr__(self, "transform", transform_code(self.config))

    def rows(self, tokenized: Mapping[str, Any], index: int, epoch: int = 0) -> list[Row]:
        """Rows of one tokenised record, in the config's layout."""
        options = {"refusal_token_id": self.refusal_token_id, "max_length": self.max_length}
        rows = _build(tokenized, self.config, index=index, epoch=epoch, **options)
        return fold_rows(rows, max_length=self.max_length) if self.config.layout == "branch" else rows

    def columns(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        """Rows as columns, with `ROW_COUNTS`."""
        made = {name: [getattr(row, name) for row in rows] for name in _ROW_FEATURES}
        if self.config.layout == "branch":
            made["branch_starts"] = [row.branch_starts or [0] * len(row.input_ids) for row in rows]
        counts = [_count(row.sources or (row,)) for row in rows]
        return {**made, **{name: [count[place] for count in counts] for place, name in enumerate(ROW_COUNTS)}}

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        records = zip(batch[TOKENIZED], batch["index"], strict=True)
        return self.columns([row for record, index in records for row in self.rows(record, index)])


def _count(rows: Sequence[Row]) -> tuple[int, ...]:
    """`ROW_COUNTS` of some rows."""
    rto_rows = sum(row.objective == "rto" for row in rows)
    truncated, limited = sum(row.num_truncated > 0 for row in rows), sum(row.is_limited for row in rows)
    return len(rows) - rto_rows, rto_rows, truncated, limited


class ResampledRows(torch.utils.data.Dataset):
    """
    Ordinary rows, and rows of triples whose draws are made anew in every epoch, when they are read.

    The epoch lives in shared memory, so loader workers see it change, persistent ones too. A row depends on seed, epoch
    and record index alone: an interrupted epoch goes on with the rows it would have had.
    """

    def __init__(self, ordinary: Dataset | None, tokenized: Dataset, build: BuildRows) -> None:
        self._ordinary, self._tokenized, self._build = ordinary, tokenized, build
        self._num_ordinary = 0 if ordinary is None else len(ordinary)
        # where the rows of each record begin, and the end: 8 bytes a record, as there may be many
        self._starts = np.zeros(len(tokenized) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(self._rows_of, tokenized), np.int64, len(tokenized)), out=self._starts[1:])
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def _rows_of(self, record: Mapping[str, Any]) -> int:
        if record[TOKENIZED]["is_authors_row"]:
            return 1
        if self._build.config.transform is not None or self._build.config.layout == "branch":
            return len(self._build.rows(record[TOKENIZED], record["index"]))
        return self._build.config.num_prefixes + has_rto_row(self._build.config, record["index"])

    def set_epoch(self, epoch: int) -> None:
        """Draw for `epoch` from now on."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return self._num_ordinary + int(self._starts[-1])

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        if place < 0:
            place += len(self)
        if place < self._num_ordinary:
            return self._ordinary[place]
        if place >= len(self):
            raise IndexError(f"Row {place} was asked for, of {len(self)}.")
        place -= self._num_ordinary
        record_place = int(np.searchsorted(self._starts, place, side="right")) - 1
        start, end = map(int, self._starts[record_place : record_place + 2])
        record = self._tokenized[record_place]
        rows = self._build.rows(record[TOKENIZED], record["index"], int(self._epoch))
        if len(rows) != end - start:
            raise PluginError(
                f"The transform {self._build.config.transform!r} must give a record as many rows in every epoch, gave "
                f"record {record['index']} {end - start} in epoch 0 and {len(rows)} in epoch "
                f"{int(self._epoch)}. Leave `resample_each_epoch` out."
            )
        columns = self._build.columns([rows[place - start]])
        return {name: columns[name][0] for name in row_features(self._build.config)}


def as_rows(dataset: Dataset | IterableDataset, config: DeRTaConfig) -> Dataset | IterableDataset:
    """
    The host's own labelled rows: `rto_mask` is filled in (no RTO) or cut as the host cut the rest; no branch.

    Raises:
        ValueError: If the rows have branches, which a host's never have. In the layout `rows` a safe response would be
            trained behind the whole harmful one.
    """
    is_branch = config.layout == "branch"
    if "branch_starts" in columns_of(dataset):
        raise ValueError("A tokenised dataset has a column `branch_starts`: branch rows are DeRTa's to make. Drop it.")
    return dataset.map(_complete_row, fn_kwargs={"is_branch": is_branch}).select_columns(list(row_features(config)))


def as_row_stream(dataset: Dataset | IterableDataset, config: DeRTaConfig, *, num_shards: int = 1) -> IterableDataset:
    """Rows as a stream with the row columns alone; rows in memory are cut into `num_shards`, in their order."""
    if not is_streaming(dataset):
        num_shards = max(1, min(num_shards, len(dataset)))
    stream = dataset if is_streaming(dataset) else dataset.to_iterable_dataset(num_shards=num_shards)
    features = row_features(config)
    return stream.select_columns(list(features)).cast(features)


def concatenate(parts: list[Dataset], config: DeRTaConfig) -> Dataset:
    """One dataset of rows; their integer widths are made one, as hosts differ in them."""
    features = row_features(config)
    parts = [part.select_columns(list(features)) for part in parts]
    # a cast writes all rows again, even where it changes nothing
    return concatenate_datasets([part if part.features == features else part.cast(features) for part in parts])


class TripleTokenizer(Protocol):
    """What lays a triple out as token ids: `RecordTokenizer`, or a host's own template."""

    def triple(self, triple: Triple) -> TokenizedTriple:
        """Token ids of a triple."""


@dataclass(frozen=True)
class TokenizeRecord:
    """
    Maps a safety record to its token ids, under `TOKENIZED`, with its index and the reason why it is skipped, if it is.
    Picklable, and hashed with its knobs into the cache key of `datasets`.

    Attributes:
        tokenizer: Lays triples out; the authors' training rows need a `RecordTokenizer`.
        config: Knobs.
        max_length: Longest row, or None.
        read: Parses a record, for hosts with record formats of their own.
        code: Digest of the sources.
        draws_by_content: Draw by a key of the record's tokens, and not by its index: in a stream of several shards the
            index begins anew in every rank and loader worker.

    Raises:
        BadRecordError: When called, if the record is bad and `on_bad_record` is `error`.
    """

    tokenizer: RecordTokenizer | TripleTokenizer
    config: DeRTaConfig
    max_length: int | None
    read: Callable[[Mapping[str, Any]], Triple | AuthorsRow | None] = parse_record
    code: str = CODE_DIGEST
    draws_by_content: bool = False
    transform: str = field(init=False)

    def __post_init__(self) -> None:
        # as in `BuildRows`
        object.__setattr__(self, "transform", transform_code(self.config))

    def __call__(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        index = record.get(INDEX, index)
        try:
            tokenized = self._tokenize(record)
            draw = _content_key(tokenized) if self.draws_by_content else index
            # what cannot be built is told here, where bad records are counted; id 0 stands for any refusal token
            _build(tokenized, self.config, index=draw, epoch=0, refusal_token_id=0, max_length=self.max_length)
        except BadRecordError as error:
            if self.config.on_bad_record == "error":
                raise error.at(index) from error
            return {TOKENIZED: _EMPTY, "index": index, "skipped": f"`{error.field}` {error.reason}"}
        return {TOKENIZED: tokenized, "index": draw, "skipped": ""}

    def _tokenize(self, record: Mapping[str, Any]) -> dict[str, Any]:
        parsed = self.read(record)
        if parsed is None:
            raise BadRecordError(
                "record", "is an ordinary row in a stream of safety records; give it as its own dataset."
            )
        if isinstance(parsed, Triple):
            # not `asdict`, which copies every id and takes half of the time
            tokenized = {**_EMPTY, **vars(self.tokenizer.triple(parsed))}
        else:
            row = self.tokenizer.authors_row(parsed)
            tokenized = {**_EMPTY, "prompt_ids": row.prefix_ids, "rejected_ids": row.text_ids, "is_authors_row": True}
            tokenized["is_authors_rto"] = row.is_rto
            if not row.is_rto:
                tokenized["chosen_ids"], tokenized["rejected_ids"] = row.text_ids, ()
        return tokenized


_EMPTY: dict[str, Any] = {
    "prompt_ids": (),
    "chosen_ids": (),
    "rejected_ids": (),
    "end_ids": (),
    "word_ends": (),
    "earlier_turns": (),
    "is_authors_row": False,
    "is_authors_rto": False,
}


def _content_key(tokenized: Mapping[str, Any]) -> int:
    """A number of 56 bits, the same wherever the record stands."""
    sides = [list(tokenized[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return int.from_bytes(hashlib.sha256(repr(sides).encode()).digest()[:7], "big")


def _build(tokenized: Mapping[str, Any], config: DeRTaConfig, **options: Any) -> list[Row]:
    if tokenized["is_authors_row"]:
        is_rto = tokenized["is_authors_rto"]
        text_ids = tokenized["rejected_ids"] if is_rto else tokenized["chosen_ids"]
        return build_training_rows(TokenizedAuthorsRow(tokenized["prompt_ids"], text_ids, is_rto), config, **options)
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "end_ids", "word_ends", "earlier_turns")
    return build_training_rows(TokenizedTriple(**{name: tokenized[name] for name in names}), config, **options)


def _keep_and_say_skipped(record: Mapping[str, Any]) -> bool:
    """Filter of a stream that keeps good records and says each bad one as it passes."""
    if record["skipped"]:
        logger.warning("Skipped record %d: %s", record["index"], record["skipped"])
    return not record["skipped"]


def _complete_row(row: Mapping[str, Any], *, is_branch: bool) -> dict[str, list[Any]]:
    length = len(row["input_ids"])
    mask = row.get("rto_mask")
    completed = {"rto_mask": [False] * length if mask is None else mask[:length]}
    return {**completed, "branch_starts": [0] * length} if is_branch else completed
