"""
A host's datasets become one dataset of training rows: ordinary rows by the host itself, safety records by DeRTa.

The host says how it tokenises an ordinary group (`host_rows`); everything else here is the same in every host.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from derta_plugins.adapters.row_datasets import (
    INDEX,
    ROW_COUNTS,
    TOKENIZED,
    TOKENIZED_FEATURES,
    BuildRows,
    ResampledRows,
    arrow_batches,
    as_row_stream,
    as_rows,
    build_dataset,
    columns_of,
    concatenate,
    count_values,
    is_streaming,
    tokenize_records,
)
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.records import (
    HELPFUL_FORMATS,
    KNOWN_COLUMNS,
    BadRecordError,
    present_columns,
    record_kind,
)
from derta_plugins.core.refusal_token import RefusalToken, resolve_target, warn_if_unfit

logger = logging.getLogger(__name__)

SAFETY_COLUMNS = KNOWN_COLUMNS - frozenset().union(*HELPFUL_FORMATS.values())
"""A dataset with one of these is read record by record; without, it is ordinary and its host's own."""

STREAM_PEEK = 1000
"""Records of a stream by which its RTO target is chosen."""

_NOT_ORDINARY = {
    ("seq_lengths",): "it is packed already. Give the rows before packing.",
    ("completion", "label"): "unpaired preference rows, whose undesired completions would be trained. Keep the desired "
    "ones and drop `label`.",
}

AnyDataset = Dataset | IterableDataset


@dataclass
class RowCounts:
    """
    What a training set was made of.

    `branch_rows` are sequences that hold several of the MLE and RTO rows (`layout="branch"`). `truncated_rows` lost
    tokens to `max_length`; `limited_prefixes` are MLE rows whose k could not reach the whole harmful response because
    of it; `skipped` counts the left-out records by field and reason.
    """

    triples: int = 0
    mle_rows: int = 0
    rto_rows: int = 0
    branch_rows: int = 0
    helpful_rows: int = 0
    boundary_rows: int = 0
    truncated_rows: int = 0
    limited_prefixes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        named = {name: value for name, value in asdict(self).items() if name != "skipped"}
        if not self.branch_rows:
            del named["branch_rows"]
        parts = [f"{value} {name.replace('_', ' ')}" for name, value in named.items()]
        skipped = "; ".join(f"{count} x {reason}" for reason, count in self.skipped.most_common())
        return ", ".join(parts) + (f"; skipped records: {skipped}" if skipped else "; no record skipped")


@dataclass(frozen=True)
class Preparation:
    """
    How one dataset is prepared; see `prepare`.

    Attributes:
        config: DeRTa's knobs.
        tokenizer: The run's tokenizer.
        host_rows: Turns a group of ordinary records into rows with `input_ids` and `labels`, as the host does.
        max_length: Longest row, or None.
        safety_probability: Streams: share of safety rows.
        num_proc: Processes for tokenising.
    """

    config: DeRTaConfig
    tokenizer: Any
    host_rows: Callable[[AnyDataset], AnyDataset]
    max_length: int | None
    safety_probability: float
    num_proc: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Rows, the RTO target they were built with (None without safety records), and what they were made of."""

    rows: AnyDataset | ResampledRows
    target: RefusalToken | None
    counts: RowCounts


def prepare(
    how: Preparation,
    dataset: AnyDataset,
    *,
    safety: AnyDataset | None = None,
    boundary: Dataset | None = None,
    target: RefusalToken | None = None,
    resample: bool = False,
) -> Prepared:
    """
    Training rows of `dataset` (ordinary rows, safety records, or both), `safety` and `boundary` together.

    Args:
        how: Settings of the run.
        dataset: Records of any kind.
        safety: Safety records only.
        boundary: Benign look-alikes, ordinary rows.
        target: RTO target to use; None resolves it from the safety records.
        resample: Return rows whose draws are made anew every epoch, if there are safety records.

    Raises:
        BadRecordError: If a record cannot be trained safely and `on_bad_record` is `error`.
        ValueError: If there are no rows, or the datasets cannot be mixed; says what to do.
    """
    counts = RowCounts()
    ordinary, triples = _read_groups(how, dataset, safety, counts)
    if boundary is not None:
        ordinary += _boundary_rows(how, boundary, triples, counts)
    kept = [part for part in triples if is_streaming(part) or len(part)]
    if not kept and (triples or safety is not None or counts.skipped):
        raise ValueError(f"No safety record is left of those given ({counts}). Mend the records, or leave them out.")
    if not kept:
        return Prepared(_join(ordinary, how.config), None, counts)
    tokenized = concatenate_datasets(kept) if len(kept) > 1 else kept[0]
    target = target or _resolve_target(tokenized, how.tokenizer, how.config)
    build = BuildRows(how.config, target.id, how.max_length)
    counts.triples += _length(tokenized)
    if any(map(is_streaming, (tokenized, *ordinary))):
        if resample:
            raise ConfigError("`resample_each_epoch` needs datasets in memory: a stream is not told its epoch.")
        return Prepared(_interleave(how, ordinary, build_dataset(tokenized, build)), target, counts)
    rows = build_dataset(tokenized, build, num_proc=how.num_proc)
    count_rows(rows, counts)
    if resample:
        joined = _join(ordinary, how.config) if ordinary else None
        return Prepared(ResampledRows(joined, tokenized, build), target, counts)
    return Prepared(_join([*ordinary, rows], how.config), target, counts)


def split_by_format(
    dataset: AnyDataset, config: DeRTaConfig, skipped: Counter[str]
) -> dict[frozenset[str], AnyDataset]:
    """
    Sub-datasets of one record format each, keyed by the known columns they use; foreign known columns are removed.

    A dataset without safety columns is one group under the empty key: it is its host's to read. A stream cannot be
    split; its first record tells the format of all, and a later one of another format is a bad record.

    Raises:
        BadRecordError: If a record fits no format and `on_bad_record` is `error`.
    """
    columns = columns_of(dataset)
    if not SAFETY_COLUMNS & set(columns):
        return {frozenset(): dataset}
    if is_streaming(dataset):
        record_kind(first := next(iter(dataset)))
        return {present_columns(first): dataset}
    known = [name for name in columns if name in KNOWN_COLUMNS]

    @cache
    def fault_of(present: frozenset[str]) -> BadRecordError | None:
        return _fault({name: name if name in present else None for name in known}, columns)

    places: dict[frozenset[str], array[int]] = {}
    batches = dataset.select_columns(known).iter(batch_size=1000)
    records = chain.from_iterable(zip(*(batch[name] for name in known), strict=True) for batch in batches)
    for index, values in enumerate(records):
        present = present_columns(dict(zip(known, values, strict=True)))
        if fault := fault_of(present):
            _skip_or_raise(fault.at(index), config, skipped)
        else:
            places.setdefault(present, array("q")).append(index)
    foreign = {present: [name for name in known if name not in present] for present in places}
    if [len(indices) for indices in places.values()] == [len(dataset)]:
        # left as it lies on disk, where a selection would be written again, and a column kept in memory
        return {present: dataset.remove_columns(names) for present, names in foreign.items()}
    return {
        present: dataset.select(indices).remove_columns(foreign[present]).add_column(INDEX, indices)
        for present, indices in places.items()
    }


def first_records(tokenized: AnyDataset) -> Dataset:
    """A dataset as it is; the first `STREAM_PEEK` records of a stream."""
    if not is_streaming(tokenized):
        return tokenized
    records = list(tokenized.take(STREAM_PEEK))
    columns = {name: [record[name] for record in records] for name in TOKENIZED_FEATURES}
    return Dataset.from_dict(columns, features=TOKENIZED_FEATURES)


def count_first_ids(tokenized: Dataset) -> tuple[Counter[int], Counter[int]]:
    """First tokens of the safe and of the harmful responses of triples."""
    counts: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for batch in arrow_batches(tokenized, TOKENIZED):
        records = batch[TOKENIZED]
        triples = records.filter(pc.invert(pc.struct_field(records, "is_authors_row")))
        for count, name in zip(counts, ("chosen_ids", "rejected_ids"), strict=True):
            ids = pc.struct_field(triples, name)
            count.update(count_values(pc.list_element(ids.filter(pc.greater(pc.list_value_length(ids), 0)), 0)))
    return counts


def _resolve_target(tokenized: AnyDataset, tokenizer: Any, config: DeRTaConfig) -> RefusalToken:
    """The RTO target for these records (of a stream: by its first `STREAM_PEEK` records)."""
    seen = first_records(tokenized)
    if not len(seen):
        raise ValueError(f"No record among the first {STREAM_PEEK} of the safety stream can be trained.")
    token = resolve_target(tokenizer, config, *count_first_ids(seen))
    warn_if_unfit(token)
    return token


def _read_groups(
    how: Preparation, dataset: AnyDataset, safety: AnyDataset | None, counts: RowCounts
) -> tuple[list[AnyDataset], list[AnyDataset]]:
    """Ordinary rows, and tokenised safety records, of both datasets."""
    ordinary: list[AnyDataset] = []
    triples: list[AnyDataset] = []
    for records in [dataset] if safety is None else [dataset, safety]:
        for columns, group in split_by_format(records, how.config, counts.skipped).items():
            if SAFETY_COLUMNS & columns:
                options = {"max_length": how.max_length, "skipped": counts.skipped, "num_proc": how.num_proc}
                triples.append(tokenize_records(group, how.tokenizer, how.config, **options))
            elif records is safety:
                raise ValueError("`safety_dataset` holds ordinary rows, no triples; give those as `train_dataset`.")
            else:
                ordinary.append(_host_rows(how, group))
                counts.helpful_rows += _length(ordinary[-1])
    return ordinary, triples


def _host_rows(how: Preparation, group: AnyDataset) -> AnyDataset:
    """Ordinary records as rows of the host; says how many the host dropped."""
    columns = columns_of(group)
    for names, reason in _NOT_ORDINARY.items():
        if set(names) <= set(columns):
            raise ValueError(f"A dataset of ordinary rows has the column(s) {', '.join(names)}: {reason}")
    if "labels" in columns and "input_ids" not in columns:
        raise ValueError("A text dataset has a column `labels`, which would be trained as token ids. Rename it.")
    if "input_ids" in columns and "labels" not in columns:
        raise ValueError(
            "A tokenised dataset has `input_ids` but no `labels`, so every token of it would be trained. Add `labels` "
            "(-100 where nothing is trained), or give the records as text."
        )
    if INDEX in columns:
        group = group.remove_columns(INDEX)
    rows = how.host_rows(group.map(_check_ordinary) if is_streaming(group) else group)
    if not is_streaming(rows) and len(rows) < len(group):
        dropped = len(group) - len(rows)
        logger.warning("The host dropped %d of %d ordinary rows: no target fits max_length.", dropped, len(group))
        if not len(rows):
            raise ValueError(f"None of {len(group)} ordinary rows has a target within max_length={how.max_length}.")
    return as_rows(rows, how.config)


def _boundary_rows(
    how: Preparation, boundary: AnyDataset, triples: list[AnyDataset], counts: RowCounts
) -> list[Dataset]:
    if is_streaming(boundary):
        raise ValueError("`boundary_dataset` must be in memory; mix a stream into `train_dataset` instead.")
    if SAFETY_COLUMNS & set(columns_of(boundary)):
        raise ValueError("`boundary_dataset` must hold benign prompts with helpful answers, got safety records.")
    if how.config.boundary_ratio is not None and any(map(is_streaming, triples)):
        raise ConfigError("`boundary_ratio` needs triples in memory, to count them; leave it out to take all rows.")
    sample = _sample_boundary(boundary, how.config, sum(map(_length, triples)))
    if not len(sample):
        return []
    rows = _host_rows(how, sample)
    counts.boundary_rows += len(rows)
    return [rows]


def _sample_boundary(dataset: Dataset, config: DeRTaConfig, num_triples: int) -> Dataset:
    """
    `boundary_ratio` benign look-alikes per triple, drawn with the seed; all of them when it is None.

    Raises:
        ValueError: If there are fewer than asked for.
    """
    if config.boundary_ratio is None:
        return dataset
    wanted = round(config.boundary_ratio * num_triples)
    if wanted > len(dataset):
        raise ValueError(
            f"boundary_ratio={config.boundary_ratio:g} asks for {wanted} boundary rows ({num_triples} triples), got "
            f"{len(dataset)}. Give more, lower the ratio, or leave it out to take all."
        )
    return dataset.shuffle(seed=config.seed).select(range(wanted))


def _join(parts: list[AnyDataset], config: DeRTaConfig) -> AnyDataset:
    if not parts:
        raise ValueError("No row is left to train on.")
    if any(map(is_streaming, parts)):
        if len(parts) > 1:
            raise ValueError("Several streams of ordinary rows: mix them with `datasets.interleave_datasets` first.")
        return parts[0]
    return concatenate(parts, config)


def _interleave(how: Preparation, ordinary: list[AnyDataset], safety: AnyDataset) -> IterableDataset:
    """Both kinds in one stream, drawn with the seed; the shorter one starts again until both are through."""
    if not ordinary:
        return as_row_stream(safety, how.config)
    share, parts = how.safety_probability, [_join(ordinary, how.config), safety]
    # as many shards as the stream has, or ranks and loader workers could not be given shards of their own
    shards = max(part.num_shards for part in parts if is_streaming(part))
    return interleave_datasets(
        [as_row_stream(part, how.config, num_shards=shards) for part in parts],
        probabilities=[1 - share, share],
        seed=how.config.seed,
        stopping_strategy="all_exhausted",
    )


def count_rows(rows: Dataset, counts: RowCounts) -> int:
    """Add the rows of triples to `counts`, warn if `max_length` limits their prefixes, return how many they are."""
    total: Counter[str] = Counter()
    for batch in arrow_batches(rows, *ROW_COUNTS):
        held = pc.add(batch["mle_rows"], batch["rto_rows"])
        batch = batch.append_column("ours", pc.greater(held, 0)).append_column("branch", pc.greater(held, 1))
        total.update({name: pc.sum(batch[name]).as_py() for name in batch.column_names})
    counts.mle_rows += total["mle_rows"]
    counts.rto_rows += total["rto_rows"]
    counts.truncated_rows += total["truncated_rows"]
    counts.limited_prefixes += total["limited_rows"]
    counts.branch_rows += total["branch"]
    if counts.limited_prefixes:
        logger.warning(
            "max_length keeps the harmful prefix of %d of %d MLE rows short: refusals deep in an answer are trained "
            "less than asked for. Raise max_length.",
            counts.limited_prefixes,
            counts.mle_rows,
        )
    return total["ours"]


def _skip_or_raise(error: BadRecordError, config: DeRTaConfig, skipped: Counter[str]) -> None:
    if config.on_bad_record == "error":
        raise error
    skipped[f"`{error.field}` {error.reason}"] += 1


def _fault(record: Mapping[str, Any], columns: list[str]) -> BadRecordError | None:
    """What is wrong with a record by its columns; a row of the authors' file that lost two looks like ordinary text."""
    try:
        record_kind(record)
    except BadRecordError as error:
        return error
    if present_columns(record) == {"text"} and {"prefix", "safe"} & set(columns):
        return BadRecordError("safe", "is null, and so is `prefix`; give ordinary text as a dataset of its own.")
    return None


def _check_ordinary(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Ends a stream of ordinary records at one that has safety columns, which the first record did not show."""
    found = sorted(name for name in SAFETY_COLUMNS if record.get(name) is not None)
    if found:
        raise BadRecordError(found[0], "stands in a stream whose first record was ordinary; give safety records apart.")
    return record


def _length(dataset: AnyDataset) -> int:
    """Records of a dataset; 0 for a stream, which does not know."""
    return 0 if is_streaming(dataset) else len(dataset)
