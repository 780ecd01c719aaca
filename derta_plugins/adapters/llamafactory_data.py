"""
LLaMA-Factory's `get_dataset` for `stage: derta`: `ranking: true` datasets become triples, beside its ordinary ones.

The host loads, mixes, splits and maps. Four names of `llamafactory.data.loader` are replaced meanwhile: triples are
tokenised where the host aligns a dataset's columns, and become rows where it tokenises the merged dataset, in its
order.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from llamafactory.data import loader
from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.loader import SupervisedDatasetProcessor
from llamafactory.data.parser import DatasetAttr
from llamafactory.extras.logging import get_logger
from llamafactory.extras.misc import has_tokenized_data

from derta_plugins.adapters.llamafactory_patch import replaced
from derta_plugins.adapters.llamafactory_registry import (
    HOW_TO_REGISTER,
    ReadRanking,
    TriplesAttr,
    check_ordinary,
    check_triples,
)
from derta_plugins.adapters.llamafactory_saved import SavedRows
from derta_plugins.adapters.llamafactory_template import TemplateTokenizer
from derta_plugins.adapters.prepare import RowCounts, count_first_ids, count_rows, first_records
from derta_plugins.adapters.row_datasets import (
    CODE_DIGEST,
    ROW_COUNTS,
    TOKENIZED,
    BuildRows,
    TokenizeRecord,
    arrow_batches,
    columns_of,
    is_streaming,
    map_tokenized,
)
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.records import BadRecordError
from derta_plugins.core.refusal_token import RefusalToken, resolve_target, warn_if_unfit
from derta_plugins.transforms import transform_code

# below the host's own, whose handler and level it takes
logger = get_logger("llamafactory.derta")

AnyDataset = Dataset | IterableDataset

_SOURCES = sorted(Path(__file__).parent.glob("llamafactory*.py"))
_CODE = hashlib.sha256(CODE_DIGEST.encode() + b"".join(source.read_bytes() for source in _SOURCES)).hexdigest()
_MEDIA = ("images", "videos", "audios")


def get_dataset(
    template: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    stage: str,
    tokenizer: Any,
    processor: Any = None,
    *,
    config: DeRTaConfig,
) -> dict[str, Any]:
    """
    The host's `get_dataset`, whose rows also have `rto_mask`.

    Raises:
        BadRecordError: If a record of a `ranking: true` dataset is no triple and `derta_on_bad_record` is `error`.
        ConfigError: If the model is multimodal, or `tokenized_path` holds rows that were made with other settings.
        ValueError: If a dataset is not registered as what it is, or there is no triple to train.
    """
    if processor is not None:
        raise ConfigError("`stage: derta` trains text only, and this model has a processor for images or sound.")
    path = data_args.tokenized_path
    saved = SavedRows.of_run(data_args, tokenizer, config, _CODE + transform_code(config)) if path else None
    is_saved = saved is not None and has_tokenized_data(path)
    if is_saved:
        saved.check()
    datasets = _Datasets(config, TemplateTokenizer.for_config(template, tokenizer, config), data_args, training_args)
    with replaced(loader, **datasets.replacements()):
        module = loader.get_dataset(template, model_args, data_args, training_args, stage, tokenizer, processor)
    if saved is not None and not is_saved and training_args.should_save:
        saved.write()
    return module


class _Datasets:
    """What stands in the host's loader for one run, and what is known of its triples so far."""

    def __init__(self, config: DeRTaConfig, tokenizer: TemplateTokenizer, data_args: Any, training_args: Any) -> None:
        self._config, self._tokenizer, self._max_length = config, tokenizer, data_args.cutoff_len
        self._train_names: list[str] = data_args.dataset or []
        self._first_ids: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._target: RefusalToken | None = None
        self._host = {name: getattr(loader, name) for name in self.replacements()}
        self._map_options = {
            "num_proc": data_args.preprocessing_num_workers,
            "load_from_cache_file": not data_args.overwrite_cache or training_args.local_process_index != 0,
        }

    def replacements(self) -> dict[str, Any]:
        return {
            "get_dataset_list": self._get_dataset_list,
            "align_dataset": self._align_dataset,
            "_get_dataset_processor": self._get_dataset_processor,
            "_get_preprocessed_dataset": self._get_preprocessed_dataset,
        }

    def _get_dataset_list(self, dataset_names: list[str] | None, dataset_dir: Any) -> list[DatasetAttr]:
        attrs = self._host["get_dataset_list"](dataset_names, dataset_dir)
        named = zip(dataset_names or [], attrs, strict=True)
        return [TriplesAttr.of(attr, name) if attr.ranking else attr for name, attr in named]

    def _align_dataset(
        self, dataset: AnyDataset, dataset_attr: DatasetAttr, data_args: Any, training_args: Any
    ) -> AnyDataset:
        """The host's columns for ordinary datasets; for triples their token ids, in a private column beside them."""
        if not isinstance(dataset_attr, TriplesAttr):
            check_ordinary(dataset_attr, columns_of(dataset))
            return self._host["align_dataset"](dataset, dataset_attr, data_args, training_args)
        attr, name = dataset_attr.as_registered(), dataset_attr.name
        check_triples(attr, name, columns_of(dataset))
        read = ReadRanking(get_dataset_converter(attr.formatting, attr, data_args))
        try:
            return self._tokenize(dataset, name, read)
        except BadRecordError as error:
            error.add_note(f"It stands in dataset `{name}`; in LLaMA-Factory the key is `derta_on_bad_record: skip`.")
            raise

    def _tokenize(self, dataset: AnyDataset, name: str, read: ReadRanking) -> AnyDataset:
        skipped: Counter[str] = Counter()
        tokenize = TokenizeRecord(self._tokenizer, self._config, self._max_length, read, _CODE)
        tokenized = map_tokenized(dataset, tokenize, skipped=skipped, **self._map_options)
        for reason, count in skipped.most_common():
            logger.warning_rank0("DeRTa skipped %d records of %s: %s", count, name, reason)
        firsts = count_first_ids(first_records(tokenized))
        if not firsts[0]:
            raise ValueError(f"No safety record is left of dataset `{name}`. Mend the records, or leave it out.")
        if name in self._train_names or not self._train_names:
            for counter, ids in zip(self._first_ids, firsts, strict=True):
                counter.update(ids)
        return tokenized

    def _get_dataset_processor(
        self, data_args: Any, stage: str, template: Any, tokenizer: Any, processor: Any, do_generate: bool = False
    ) -> DeRTaDatasetProcessor:
        build = None if self._target is None else BuildRows(self._config, self._target.id, self._max_length)
        return DeRTaDatasetProcessor(template, tokenizer, processor, data_args, build, _CODE)

    def _get_preprocessed_dataset(self, dataset: AnyDataset | None, *args: Any, is_eval: bool = False) -> Any:
        if dataset is None:
            return None
        if self._target is None:
            self._resolve_target(is_eval=is_eval)
        rows = self._host["_get_preprocessed_dataset"](dataset, *args, is_eval=is_eval)
        if not is_streaming(rows):
            _say_counts(dataset, rows, "eval" if is_eval else "train")
        return rows.remove_columns(list(ROW_COUNTS))

    def _resolve_target(self, *, is_eval: bool) -> None:
        """The RTO target of the run, by the triples named in `dataset`; evaluation alone needs none."""
        if not self._first_ids[0] and is_eval:
            return
        if not self._first_ids[0]:
            raise ValueError(
                f"`stage: derta` needs safety triples, and `dataset` names none: {', '.join(self._train_names)}. "
                f"If one of them holds triples, {HOW_TO_REGISTER}; else train with `stage: sft`."
            )
        tokenizer, encode_answer = self._tokenizer.tokenizer, self._tokenizer.answer_ids
        self._target = resolve_target(tokenizer, self._config, *self._first_ids, encode_answer=encode_answer)
        warn_if_unfit(self._target)
        logger.info_rank0("DeRTa's refusal token: %r (id %d).", self._target.text, self._target.id)


@dataclass
class DeRTaDatasetProcessor(SupervisedDatasetProcessor):
    """
    The host's processor of SFT records, which also builds the rows of triples, where they stand among them.

    Attributes:
        build: Builds the rows of triples; None where there are none.
        code: Digest of the sources, for the cache of `datasets`.
    """

    build: BuildRows | None = None
    code: str = ""

    def preprocess_dataset(self, examples: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Rows of a batch of records, with `rto_mask` and what is counted."""
        rows = defaultdict(list)
        triples = examples.get(TOKENIZED) or [None] * len(examples["_prompt"])
        for place, triple in enumerate(triples):
            if triple is None:
                made = super().preprocess_dataset({name: examples[name][place : place + 1] for name in examples})
                made = {**made, **self._without_rto(made.get("input_ids", []))}
            else:
                made = self._rows_of_triple(triple, examples["index"][place])
            for name, values in made.items():
                rows[name] += values
        return rows

    def _rows_of_triple(self, triple: Mapping[str, Any], index: int) -> dict[str, list[Any]]:
        rows = self.build.rows(triple, index)
        made = self.build.columns(rows)
        made["attention_mask"] = [[1] * len(row.input_ids) for row in rows]
        return {**made, **{name: [None] * len(rows) for name in _MEDIA}}

    def _without_rto(self, input_ids: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
        """Our columns of ordinary rows."""
        made = {"rto_mask": [[False] * len(ids) for ids in input_ids]}
        made |= {name: [0] * len(input_ids) for name in ROW_COUNTS}
        if self.build is not None and self.build.config.layout == "branch":
            made["branch_starts"] = [[0] * len(ids) for ids in input_ids]
        return made


def _say_counts(dataset: Dataset, rows: Dataset, name: str) -> None:
    counts = RowCounts()
    safety_rows = count_rows(rows, counts)
    if "index" in dataset.column_names:
        counts.triples = sum(len(batch) - batch["index"].null_count for batch in arrow_batches(dataset, "index"))
    counts.helpful_rows = len(rows) - safety_rows
    logger.info_rank0("DeRTa rows (%s): %s", name, counts)
