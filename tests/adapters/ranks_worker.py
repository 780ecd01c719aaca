"""
Started by torchrun: many one-step trainings on this rank's share of the rows, one after another; rank 0 saves what
the parameters became.

    torchrun --nproc_per_node=2 ranks_worker.py OUTPUT KIND

KIND is `ddp`, `fsdp`, `fsdp_bf16` or `zero2` / `zero3`; for FSDP2 on a CPU see tests/data/fsdp_on_cpu.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from derta_plugins.adapters.trainer_mixins import DeRTaLossMixin
from derta_plugins.core.config import DeRTaConfig
from tests.adapters.ranks_cases import ACCUMULATION, CASES, OPTIONS, VOCABULARY, rows_of
from tests.conftest import byte_level_bpe, tiny_llama

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class DeRTaTrainer(DeRTaLossMixin, Trainer):
    """The bare `Trainer`, on which Axolotl and LLaMA-Factory build."""

    host_version = "transformers"

    def __init__(self, config, **kwargs):
        self._start_derta(config)
        super().__init__(**kwargs)
        self._finish_derta()


class KeepParameters(TrainerCallback):
    """The whole parameters after the step, before anything is torn down."""

    parameters = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        named = {name.removeprefix("module."): value for name, value in model.named_parameters()}
        # ZeRO-2 shards what the optimizer holds
        self.optimizer = type(kwargs["optimizer"].optimizer).__name__
        self.kinds = sorted({"ZeRO-3" if hasattr(value, "ds_id") else type(value).__name__ for value in named.values()})
        self.parameters = {name: whole(value).clone() for name, value in named.items()}


def whole(parameter):
    """A parameter that may be sharded by FSDP2 or ZeRO-3."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def train(output, name, *, kind="ddp", world_size=1):
    """One step over the rows of a case, split over ranks and two micro-batches."""
    case = CASES[name]
    dataset = Dataset.from_list(rows_of(case.rows, layout=case.layout))
    size = len(dataset) // (world_size * ACCUMULATION)
    options = {**OPTIONS, "per_device_train_batch_size": size, "gradient_accumulation_steps": ACCUMULATION}
    if world_size > 1 and kind == "ddp":
        options["ddp_backend"] = "gloo"
    if kind.startswith("fsdp"):
        options |= {"fsdp": "full_shard", "fsdp_config": FSDP, "ddp_backend": "gloo"}
    options["bf16"] = kind.endswith("bf16")
    if kind.startswith("zero"):
        options["deepspeed"] = str(EXAMPLES / f"{kind}.json")
    config = DeRTaConfig(normalization=case.normalization, rto_weight=case.rto_weight, layout=case.layout)
    keep = KeepParameters()
    trainer = DeRTaTrainer(
        config,
        model=tiny_llama(VOCABULARY),
        args=TrainingArguments(str(output), **options),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(byte_level_bpe()),
        callbacks=[keep],
    )
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(dataset)
    trainer.train()
    keep.kinds += ["scored in the head"] * trainer._scores_in_head
    return keep


def main():
    """All cases in one start: starting processes is what costs."""
    output, kind = Path(sys.argv[1]), sys.argv[2]
    kinds = {}
    for name in CASES:
        keep = train(output / "run", name, kind=kind, world_size=2)
        kinds[name] = [keep.optimizer, *keep.kinds]
        if dist.get_rank() == 0:
            torch.save(keep.parameters, output / f"{name}.pt")
        dist.barrier()
    if dist.get_rank() == 0:
        (output / "kinds.json").write_text(json.dumps(kinds), encoding="utf-8")
    dist.barrier()
    # all is written; threads of torch sometimes abort a rank that ends in the ordinary way while another still does
    os._exit(0)


if __name__ == "__main__":
    main()
