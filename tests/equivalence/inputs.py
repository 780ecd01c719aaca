"""One folder of inputs for all hosts: a tiny model with weights drawn from their names, a tokenizer, two files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import derta_plugins
from tests.conftest import HARMFUL, SAFE, byte_level_bpe, tiny_llama

# Nothing between the end token and the next turn: hosts differ in whether they train a line break there.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS, ROWS_PER_STEP = 20, 8
HELPFUL, TRIPLES = 16, 8
"""Rows: 16 + 2 * 8 = 32, and 16 + 8 = 24 in the branch layout: whole steps of 8, of which the first two have no RTO."""


def make_inputs(folder: Path) -> str:
    """Write `model/`, `helpful.jsonl` and `triples.jsonl` into `folder`; return the digest of all of it."""
    tokenizer = byte_level_bpe(chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder / "model")
    model = tiny_llama(len(tokenizer), max_position_embeddings=512)
    _set_weights(model)
    model.save_pretrained(folder / "model")
    helpful, triples = helpful_records(), safety_records()
    _write(folder / "helpful.jsonl", helpful)
    _write(folder / "triples.jsonl", triples)
    weights = b"".join(value.numpy().tobytes() for _, value in sorted(model.state_dict().items()))
    ids = [tokenizer(json.dumps(record))["input_ids"] for record in (*helpful, *triples)]
    return hashlib.sha256(weights + json.dumps([helpful, triples, ids]).encode()).hexdigest()


def code_digest() -> str:
    """Digest of the package's sources: results of other code are not compared."""
    sources = sorted(Path(derta_plugins.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def helpful_records() -> list[dict[str, Any]]:
    """Conversations, of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Hello there{' and more' * (number % 4)}"},
                {"role": "assistant", "content": f"answer words{' and more words' * (number % 5)}"},
            ]
        }
        for number in range(HELPFUL)
    ]


def safety_records() -> list[dict[str, str]]:
    """Harmless stand-ins for triples, of different lengths."""
    return [
        {
            "prompt": f"How do I paint the castle wall{' again' * (number % 3)}?",
            "chosen": SAFE + " I cannot do it." * (number % 2),
            "rejected": HARMFUL + " moon dust" * (number % 5),
        }
        for number in range(TRIPLES)
    ]


def _set_weights(model: Any) -> None:
    """Weights drawn from each parameter's name: the versions of transformers draw initial weights in other orders."""
    import numpy as np
    import torch

    for name, parameter in model.named_parameters():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        values = np.random.default_rng(seed).standard_normal(tuple(parameter.shape)) * 0.05
        if parameter.dim() == 1:
            values += 1.0
        parameter.data.copy_(torch.from_numpy(values.astype(np.float32)))


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
