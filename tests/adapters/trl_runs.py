"""Small DeRTa runs in TRL, shared by the tests of this folder and by the worker that the multi-process tests start."""

from __future__ import annotations

import math

import torch
from datasets import Dataset

from derta_plugins.adapters.trl import DeRTaSFTConfig, DeRTaSFTTrainer
from tests.conftest import byte_level_bpe, helpful_records, safety_records, tiny_llama

QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 3,
}


def make_config(output_dir, **overrides) -> DeRTaSFTConfig:
    """Config of a quick quiet run on the CPU."""
    return DeRTaSFTConfig(str(output_dir), **{**QUIET, **overrides})


def make_trainer(output_dir, *, trainer_options=None, model=None, tokenizer=None, **overrides) -> DeRTaSFTTrainer:
    """Trainer over 8 helpful rows and 6 triples, unless `trainer_options` says otherwise."""
    tokenizer = tokenizer or byte_level_bpe()
    options = {
        "train_dataset": Dataset.from_list(helpful_records(8)),
        "safety_dataset": Dataset.from_list(safety_records(6)),
        **(trainer_options or {}),
    }
    model = model or tiny_llama(len(tokenizer))
    return DeRTaSFTTrainer(model, make_config(output_dir, **overrides), processing_class=tokenizer, **options)


def one_sgd_step(output_dir, **overrides) -> dict[str, torch.Tensor]:
    """Parameters after one step of plain gradient descent over the same 8 rows, however the step is split."""
    trainer = make_trainer(
        output_dir,
        trainer_options={"train_dataset": Dataset.from_list(mixed_records()), "safety_dataset": None},
        **{
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": 1,
            **overrides,
        },
    )
    assert len(trainer.train_dataset) == 8
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def mixed_records() -> list[dict]:
    """Two helpful records and three triples, of unequal lengths: eight rows."""
    columns = ("messages", "prompt", "chosen", "rejected")
    records = [*helpful_records(2), *safety_records(3)]
    return [{name: record.get(name) for name in columns} for record in records]


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two sets of parameters, over the norm of the first."""
    difference = sum((left[name].double() - right[name].double()).square().sum() for name in left)
    return math.sqrt(difference / sum(value.double().square().sum() for value in left.values()))


def logged(trainer, name: str) -> list[float]:
    """Values of one metric, in the order they were logged."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
