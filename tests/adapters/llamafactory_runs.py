"""Small DeRTa runs in LLaMA-Factory: its folder of inputs, its command, and its `run_exp` in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from llamafactory.train import tuner

from derta_plugins.core.chat import RecordTokenizer
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.records import parse_record
from derta_plugins.core.refusal_token import resolve_refusal_token_id
from derta_plugins.core.transform import Row, build_rows
from tests.conftest import byte_level_bpe, safety_records, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
TRIPLES, HELPFUL = 6, 8
ROWS = HELPFUL + 2 * TRIPLES
LEARN = {"max_steps": 60, "per_device_train_batch_size": ROWS, "learning_rate": 1e-2}
COMPONENTS = {"mle_loss", "rto_loss", "p_refusal", "mle_tokens", "rto_tokens"}
ALPACA = {"columns": {"prompt": "instruction", "response": "output"}}
RANKING = {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}


def helpful_examples(count: int = HELPFUL) -> list[dict[str, str]]:
    """Ordinary rows in the host's alpaca format."""
    return [
        {"instruction": f"Hello there {'more ' * (number % 3)}", "output": f"answer words {'and more ' * (number % 6)}"}
        for number in range(count)
    ]


def make_folder(folder: Path, **model_options: Any) -> Path:
    """A tiny model, and datasets under the names `helpful` and `triples`."""
    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(len(tokenizer), **model_options).save_pretrained(folder / "model")
    add_dataset(folder, "helpful", helpful_examples(), **ALPACA)
    add_dataset(folder, "triples", safety_records(TRIPLES), **RANKING)
    return folder


def add_dataset(folder: Path, name: str, records: list[dict[str, Any]], **entry: Any) -> None:
    """Write a dataset and its entry of dataset_info.json."""
    (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    registry = folder / "dataset_info.json"
    entries = json.loads(registry.read_text(encoding="utf-8")) if registry.is_file() else {}
    registry.write_text(json.dumps({**entries, name: {"file_name": f"{name}.json", **entry}}), encoding="utf-8")


def make_config(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Config of a quick run on the CPU, as a YAML file has it; a key that is None is left out."""
    config = {
        "stage": "derta",
        "model_name_or_path": str(folder / "model"),
        "cache_dir": str(folder / "cache"),
        "dataset_dir": str(folder),
        "dataset": "helpful,triples",
        "template": "chatml",
        "cutoff_len": 256,
        "output_dir": str(folder / "out"),
        "overwrite_output_dir": True,
        "do_train": True,
        "finetuning_type": "full",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **overrides,
    }
    return {key: value for key, value in config.items() if value is not None}


def train(folder: Path, **overrides: Any) -> list[dict[str, Any]]:
    """What the host's `run_exp` logs, called in this process as its command calls it."""
    config = make_config(folder, **overrides)
    tuner.run_exp(config)
    return history(Path(config["output_dir"]))


def command(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The host's own command, unmodified, in a process of its own."""
    return subprocess.run(
        [Path(sys.executable).parent / "llamafactory-cli", *arguments],
        cwd=folder,
        env=environment_of_command(**(environment or {})),
        capture_output=True,
        text=True,
        timeout=300,
    )


def environment_of_command(**others: str) -> dict[str, str]:
    """Environment in which the command runs offline, with one thread, and finds what it starts beside it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **others}


def write_yaml(folder: Path, **overrides: Any) -> str:
    """Write `run.yaml` with `make_config` and return its path."""
    (folder / "run.yaml").write_text(yaml.safe_dump(make_config(folder, **overrides)), encoding="utf-8")
    return str(folder / "run.yaml")


def history(output: Path) -> list[dict[str, Any]]:
    """The log of a run that has ended."""
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def logged(entries: list[dict[str, Any]], name: str) -> list[float]:
    """Values of one metric, in the order they were logged."""
    return [entry[name] for entry in entries if name in entry]


def rows_of_core(records: list[dict[str, Any]], config: DeRTaConfig | None = None, max_length: int = 256) -> list[Row]:
    """Rows that core gives for these records with the tokenizer's own chat template."""
    tokenizer, config = byte_level_bpe(), config or DeRTaConfig(seed=3)
    tokenize = RecordTokenizer.for_config(tokenizer, config)
    options = {"refusal_token_id": resolve_refusal_token_id(tokenizer, "Sorry"), "max_length": max_length}
    triples = [tokenize.triple(parse_record(record)) for record in records]
    return [row for index, triple in enumerate(triples) for row in build_rows(triple, config, index=index, **options)]
