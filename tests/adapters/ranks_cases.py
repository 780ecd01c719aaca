"""What the ranks of a distributed step are given, shared by the tests and the worker that torchrun starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from derta_plugins.core.branch_layout import fold_rows
from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.transform import build_rows

VOCABULARY, REFUSAL = 420, 7
ACCUMULATION = 2  # micro-batches of each rank
OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "seed": 3,
    "dataloader_pin_memory": False,
}


@dataclass(frozen=True)
class Case:
    """
    One step.

    Attributes:
        rows: A letter for each row: m an MLE row, r an RTO row, b both of a triple (a branch row in that layout), o an
            ordinary row, n a row without any target. Micro-batches are dealt to the ranks in turn.
    """

    rows: str
    normalization: str = "token_mean"
    rto_weight: float = 0.7
    layout: str = "rows"


MIXED = "mror" + "mmoo"
CASES = {
    **{how: Case(MIXED, how) for how in ("token_mean", "sequence_sum", "component_mean")},
    # accelerate deals micro-batches of two: rank 0 gets the first and the third, rank 1 the others
    "a rank without safety rows": Case("mroo" + "rmoo", "component_mean"),
    "a rank without any target": Case("mrnn" + "ornn", "token_mean"),
    "a micro-batch without any target": Case("nnmr" + "mron", "component_mean"),
    "no target anywhere": Case("nnnnnnnn"),
    "branch rows": Case("bobo" + "bbob", "sequence_sum", layout="branch"),
    "a rank without branch rows": Case("bboo" + "bbno", "component_mean", layout="branch"),
}


def rows_of(letters: str, *, layout: str) -> list[dict]:
    """Rows of unequal lengths, the same whatever the split."""
    generator = torch.Generator().manual_seed(0)
    return [_row(letter, place, generator, layout) for place, letter in enumerate(letters)]


def _row(letter: str, place: int, generator: torch.Generator, layout: str) -> dict:
    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, VOCABULARY, (length,), generator=generator).tolist())

    triple = TokenizedTriple(ids(3), ids(4 + place % 3), ids(5 + place % 4), end_ids=(2,))
    mle, rto = build_rows(triple, DeRTaConfig(), refusal_token_id=REFUSAL, index=place)
    (row,) = {"b": lambda: fold_rows([mle, rto]), "r": lambda: [rto]}.get(letter, lambda: [mle])()
    labels = [-100] * len(row.labels) if letter == "n" else row.labels
    made = {"input_ids": row.input_ids, "labels": labels, "attention_mask": [1] * len(labels)}
    made["rto_mask"] = row.rto_mask if letter in "br" else None
    if layout == "branch":
        made["branch_starts"] = row.branch_starts or None
    return made
