"""What Axolotl makes of a dataset of safety records, an entry with `type: derta_plugins.adapters.axolotl`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config
from axolotl.utils.logging import get_logger
from datasets import Dataset, DatasetDict, Features, List, Value

from derta_plugins.adapters.axolotl_names import DATASET_TYPE, entries_of, is_ours
from derta_plugins.adapters.prepare import Preparation, prepare
from derta_plugins.adapters.row_datasets import columns_of, is_streaming
from derta_plugins.core.config import ConfigError
from derta_plugins.core.records import AUTHORS_ROW_COLUMNS, TOKENIZED_COLUMNS, TRIPLE_FORMATS

if TYPE_CHECKING:
    from derta_plugins.adapters.axolotl_plugin import DeRTaPlugin

# Axolotl's console shows INFO of its own loggers alone
logger = get_logger("axolotl.derta_plugins")

# As `datasets` types the columns of Axolotl's own rows, beside which ours must stand.
_HOST_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": List(Value("int64")),
        "rto_mask": List(Value("bool")),
    }
)
# Columns whose harmful response another strategy would train, whatever it is told.
_NEVER_ORDINARY = [
    TRIPLE_FORMATS["DeRTa authors' triples"],
    frozenset({"is_response_0_safe", "is_response_1_safe"}),
    AUTHORS_ROW_COLUMNS,
    frozenset({"completion", "label"}),  # unpaired preference rows, of which some completions are undesired
]


class TripleStrategy(DatasetWrappingStrategy):
    """
    Makes rows of one dataset of safety records, no longer than the run's sequences.

    Args:
        plugin: The run's plugin, which has the knobs.
        tokenizer: The run's tokenizer.
        cfg: Axolotl's validated config.
        entry: The dataset's entry in it.
    """

    def __init__(self, plugin: DeRTaPlugin, tokenizer: Any, cfg: Any, entry: Mapping[str, Any]) -> None:
        self._plugin, self._cfg, self._entry = plugin, cfg, entry
        self._split = plugin.split_of(entry)
        self._tokenizer = with_chat_template(tokenizer, cfg, entry)

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Dataset:
        """
        Rows of all records of `dataset`.

        Raises:
            BadRecordError: If a record cannot be trained and `on_bad_record` is `error`.
            ConfigError: If it is no dataset of safety records, or its RTO target differs from that of another.
        """
        if is_streaming(dataset):
            raise ConfigError(f"{self._name} is a stream; DeRTa makes rows in memory alone. Unset `streaming`.")
        if self._split == "datasets":
            check_entries(self._cfg)
        how = Preparation(
            self._plugin.config,
            self._tokenizer,
            self._refuse_ordinary,
            max_length(self._cfg, self._split),
            safety_probability=1.0,
            num_proc=process_count,
        )
        prepared = prepare(how, dataset)
        self._plugin.agree_on(prepared.target, self._name)
        logger.info("DeRTa rows of %s: %s", self._name, prepared.counts)
        branches = {name: List(Value("int32")) for name in prepared.rows.column_names if name == "branch_starts"}
        features = Features({**_HOST_FEATURES, **branches})
        return prepared.rows.map(
            _add_attention_mask, batched=True, features=features, keep_in_memory=bool(keep_in_memory)
        )

    @property
    def _name(self) -> str:
        return f"the dataset {self._entry.get('path')!r} of `{self._split}`"

    def _refuse_ordinary(self, group: Any) -> Any:
        raise ConfigError(
            f"{self._name.capitalize()} holds ordinary rows (columns {', '.join(columns_of(group)) or 'none'}), but "
            f"`type: {DATASET_TYPE}` is for safety records. Give them as an entry of their own with a type of Axolotl, "
            "such as `chat_template`."
        )


def max_length(cfg: Mapping[str, Any], split: str) -> int | None:
    """Longest row that Axolotl keeps whole in one of its splits."""
    of_test = cfg.get("eval_sequence_len") if split == "test_datasets" else None
    return of_test or cfg.get("sequence_len")


def with_chat_template(tokenizer: Any, cfg: Mapping[str, Any], entry: Mapping[str, Any]) -> Any:
    """A tokenizer that lays conversations out as Axolotl does for this entry; `tokenizer` itself is not changed."""
    if not (entry.get("chat_template") or cfg.get("chat_template") or tokenizer.chat_template):
        return tokenizer
    template = get_chat_template_from_config(cfg, entry, tokenizer)
    copied, options = copy.copy(tokenizer), dict(cfg.get("chat_template_kwargs") or {})
    copied.chat_template = template
    copied.apply_chat_template = functools.partial(tokenizer.apply_chat_template, chat_template=template, **options)
    return copied


def check_entries(cfg: Any) -> None:
    """
    Look at the columns of all datasets, before one is trained: those of Axolotl's own strategies, and ours, which
    Axolotl takes as they are if they are tokenised.

    Raises:
        ConfigError: If one holds triples whose harmful response its strategy would train as an answer, or is to hold
            triples and is tokenised.
    """
    for entry in datasets_with_name_generator([one for one in entries_of(cfg, "datasets") if one.type != "_synthetic"]):
        loaded = load_dataset_with_config(entry, cfg.hf_use_auth_token)
        parts = loaded.values() if isinstance(loaded, DatasetDict) else [loaded]
        for part in parts:
            is_unpaired = (part.features or {}).get("label") == Value("bool")
            _check_columns(entry, set(part.column_names or []), is_unpaired=is_unpaired)


def _check_columns(entry: Any, columns: set[str], *, is_unpaired: bool) -> None:
    if is_ours(entry):
        if columns & TOKENIZED_COLUMNS:
            raise ConfigError(
                f"The dataset {entry.path!r} is tokenised already (columns {', '.join(sorted(columns))}), but "
                f"`type: {DATASET_TYPE}` is for safety records. Give it their text."
            )
    elif is_unpaired or any(harmful <= columns for harmful in _NEVER_ORDINARY) or _reads_rejected(entry, columns):
        raise ConfigError(
            f"The dataset {entry.path!r} has the columns of safety records ({', '.join(sorted(columns))}), and "
            f"`type: {entry.type}` would train its harmful responses. Give it `type: {DATASET_TYPE}`, or take the "
            "harmful column out."
        )


def _reads_rejected(entry: Mapping[str, Any], columns: set[str]) -> bool:
    """Whether an ordinary entry names the harmful side of preference rows as what it reads."""
    kind = entry.get("type")
    settings = [*entry.values(), *(kind.values() if isinstance(kind, Mapping) else ())]
    return "rejected" in columns and "rejected" in settings


def _add_attention_mask(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, "attention_mask": [[1] * len(ids) for ids in batch["input_ids"]]}
