"""Rows of LLaMA-Factory's datasets as a run's trainer is given them, and what they must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.model import load_tokenizer
from llamafactory.train import tuner

from derta_plugins.adapters import llamafactory_patch as patch
from derta_plugins.adapters.llamafactory import config_of
from derta_plugins.adapters.llamafactory_data import get_dataset
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from tests.adapters.llamafactory_runs import helpful_examples, make_config, rows_of_core
from tests.conftest import byte_level_bpe

STREAMING = {"streaming": True, "dataloader_num_workers": 1}
"""The host cuts a file into as many shards as there are workers, so with none a stream is empty."""


def arguments_of(folder: Path, **overrides: Any) -> tuple[tuple, Any]:
    """What the host's `get_dataset` is called with in a run, and the run's fine-tuning arguments."""
    patch.apply(tuner)
    model_args, data_args, training_args, finetuning_args, _ = tuner.get_train_args(make_config(folder, **overrides))
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    return (template, model_args, data_args, training_args, "sft", tokenizer), finetuning_args


def load(folder: Path, *, processor: Any = None, **overrides: Any) -> dict[str, Any]:
    """What the run's trainer is given."""
    arguments, finetuning_args = arguments_of(folder, **overrides)
    return get_dataset(*arguments, processor, config=config_of(finetuning_args, arguments[3]))


def triples_of(dataset: Any) -> list[tuple]:
    """(input_ids, labels, rto_mask) of the rows that are not one of the host's ordinary ones."""
    helpful = {tuple(row["input_ids"]) for row in ordinary_rows()}
    rows = [(row["input_ids"], row["labels"], row["rto_mask"]) for row in dataset]
    return [row for row in rows if tuple(row[0]) not in helpful]


def ordinary_rows() -> list[dict[str, list[int]]]:
    """The ordinary rows as their text says: the prompt without targets, then the answer and the end of its turn."""
    tokenizer, rows = byte_level_bpe(), []
    for record in helpful_examples():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": record["instruction"]}], add_generation_prompt=True, tokenize=False
        )
        start, answer = tokenizer(prompt)["input_ids"], tokenizer(record["output"] + "<|im_end|>\n")["input_ids"]
        rows.append({"input_ids": start + answer, "labels": [IGNORE_INDEX] * len(start) + answer})
    return rows


def core(records: list[dict[str, Any]], config: DeRTaConfig | None = None, **options: Any) -> list[tuple]:
    """The same of core."""
    return [(row.input_ids, row.labels, row.rto_mask) for row in rows_of_core(records, config, **options)]
