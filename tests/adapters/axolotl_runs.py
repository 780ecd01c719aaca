"""Small DeRTa runs in Axolotl: a user's folder, the config of the examples, the real command, and what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_from_disk

from derta_plugins.core.chat import RecordTokenizer
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.records import parse_record
from derta_plugins.core.refusal_token import resolve_refusal_token_id
from derta_plugins.core.transform import Row, build_rows
from tests.conftest import byte_level_bpe, safety_records
from tests.readme_blocks import ROOT, run

TINY = ROOT / "examples" / "axolotl" / "tiny.yml"
TRIPLES = 6
COMPONENTS = {"mle_loss", "rto_loss", "p_refusal", "mle_tokens", "rto_tokens"}
PLUGIN = "derta_plugins.adapters.axolotl.DeRTaPlugin"


def train(folder: Path, *launch: str, env: dict[str, str] | None = None, verb: str = "train", **changes: Any):
    """`axolotl train` on `tiny.yml` with some keys changed (None takes one out), in `folder`; the finished process."""
    config = {**yaml.safe_load(TINY.read_text(encoding="utf-8")), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return run(["axolotl", verb, "config.yml", *launch], folder, **(env or {}))


def succeed(folder: Path, *launch: str, **options: Any) -> str:
    """`train`, which must succeed; its output."""
    result = train(folder, *launch, **options)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def log_of(output: Path) -> list[dict[str, Any]]:
    """Log of a run, from its last checkpoint."""
    states = output.glob("checkpoint-*/trainer_state.json")
    last = max(states, key=lambda path: int(path.parent.name.partition("-")[2]))
    return json.loads(last.read_text(encoding="utf-8"))["log_history"]


def values(log: list[dict[str, Any]], name: str) -> list[float]:
    """Values of one metric, in the order they were logged."""
    return [entry[name] for entry in log if name in entry]


def prepared_rows(folder: Path) -> list[Dataset]:
    """Prepared datasets under a folder, oldest first."""
    found = sorted(folder.glob("*/dataset_info.json"), key=lambda path: path.stat().st_mtime)
    return [load_from_disk(str(path.parent)) for path in found]


def rows_of_core(config: DeRTaConfig | None = None, max_length: int = 128) -> list[Row]:
    """Rows that core gives for the folder's triples."""
    tokenizer, config = byte_level_bpe(), config or DeRTaConfig(seed=1)
    tokenize = RecordTokenizer.for_config(tokenizer, config)
    options = {"refusal_token_id": resolve_refusal_token_id(tokenizer, "Sorry"), "max_length": max_length}
    triples = [tokenize.triple(parse_record(record)) for record in safety_records(TRIPLES)]
    return [row for index, triple in enumerate(triples) for row in build_rows(triple, config, index=index, **options)]
