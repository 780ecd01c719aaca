"""Started by torchrun: what each rank tokenises and sees of a stream in four shards, written to a file per rank."""

import json
import os
import sys

import torch
from datasets import load_dataset

from derta_plugins.core.chat import RecordTokenizer
from tests.adapters.trl_runs import make_trainer


def unpadded(batch: dict[str, torch.Tensor]) -> list[list[list[int]]]:
    """`[input_ids, labels, rto_mask]` of each row."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    columns = [batch[name].int().tolist() for name in ("input_ids", "labels", "rto_mask")]
    return [
        [values[:length] for values in row] for length, row in zip(lengths, zip(*columns, strict=True), strict=True)
    ]


def main(folder: str) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    files = {"train_dataset": f"{folder}/helpful-*.jsonl", "safety_dataset": f"{folder}/triples-*.jsonl"}
    streams = {
        name: load_dataset("json", data_files=pattern, split="train", streaming=True, cache_dir=f"{folder}/{rank}")
        for name, pattern in files.items()
    }
    options = {"per_device_train_batch_size": 2, "max_steps": 2, "ddp_backend": "gloo" if world_size > 1 else None}
    trainer = make_trainer(f"{folder}/output", trainer_options=streams, shuffle_dataset=False, **options)
    trainer.train()

    tokenized, tokenize = [], RecordTokenizer.triple
    RecordTokenizer.triple = lambda self, triple: tokenized.append(triple.rejected) or tokenize(self, triple)
    rows = [row for batch in trainer.get_train_dataloader() for row in unpadded(batch)]
    with open(f"{folder}/seen-{world_size}-{rank}.json", "w", encoding="utf-8") as file:
        json.dump({"tokenized": tokenized, "rows": rows}, file)
    if world_size > 1:
        # a rank that ends while the other still talks to it is aborted now and then
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
