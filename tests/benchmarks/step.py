"""
Cost of DeRTa's step over the stock `SFTTrainer` step, on the same tokenised rows, in one run.

    python -m tests.benchmarks.step [--steps 30] [--vocab 8192] [--device cpu]

Both trainers step over the same batches in turn, so noise of the machine hits both; the table shows medians and their
ratio. Time is of `training_step` (forward, loss, backward); memory is the peak above what was in use before the step.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time

import datasets
import torch
import transformers
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from derta_plugins.adapters.trl import DeRTaSFTConfig, DeRTaSFTTrainer
from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.transform import build_rows
from tests.benchmarks.peak_memory import measured
from tests.conftest import byte_level_bpe


def make_rows(count: int, vocab_size: int) -> list[dict]:
    """Rows of random triples, q/h/r about 64/256/96 tokens as in BeaverTails-like data."""
    draws = random.Random(0)

    def ids(mean: int) -> tuple[int, ...]:
        return tuple(draws.randrange(10, vocab_size) for _ in range(max(8, round(draws.lognormvariate(0, 0.4) * mean))))

    triples = [TokenizedTriple(ids(64), ids(96), ids(256), end_ids=(2,)) for _ in range(count)]
    rows = [
        row
        for index, triple in enumerate(triples)
        for row in build_rows(triple, DeRTaConfig(), refusal_token_id=5, max_length=1024, index=index)
    ]
    return [{"input_ids": row.input_ids, "labels": row.labels, "rto_mask": row.rto_mask} for row in rows]


def make_trainers(rows: list[dict], args: argparse.Namespace, folder: str) -> dict[str, SFTTrainer]:
    """The stock trainer and ours, each with its own copy of one model."""
    options = {
        "per_device_train_batch_size": args.batch, "use_cpu": args.device == "cpu", "bf16": args.device != "cpu",
        "gradient_checkpointing": False, "report_to": "none", "max_steps": 1, "max_length": None,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    trainers = {}
    for name, trainer_class, config_class in (
        ("stock", SFTTrainer, SFTConfig),
        ("derta", DeRTaSFTTrainer, DeRTaSFTConfig),
    ):
        torch.manual_seed(0)
        dataset = Dataset.from_list(rows)
        trainers[name] = trainer_class(
            LlamaForCausalLM(config), config_class(f"{folder}/{name}", **options), processing_class=byte_level_bpe(),
            train_dataset=dataset if name == "derta" else dataset.remove_columns("rto_mask"),
        )  # fmt: skip
        trainers[name].create_optimizer_and_scheduler(1)
    return trainers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that processor time is the cost of the step, whatever else the machine does
    datasets.disable_progress_bars()
    rows = make_rows(args.batch * 4, args.vocab)
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(rows, args, folder)
        batches = {name: [trainer.data_collator(rows[i : i + args.batch]) for i in range(0, len(rows), args.batch)]
                   for name, trainer in trainers.items()}  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        peaks: dict[str, list[int]] = {name: [] for name in trainers}
        losses: dict[str, list[float]] = {name: [] for name in trainers}
        for step in range(args.steps + 2):
            order = list(trainers) if step % 2 else list(reversed(trainers))
            for name in order:
                trainer, batch = trainers[name], dict(batches[name][step % len(batches[name])])
                if name == "stock":
                    batch.pop("rto_mask", None)
                gc.collect()
                samples: list[int] = []
                with measured(samples, args.device):
                    start = time.process_time() if args.device == "cpu" else time.perf_counter()
                    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
                    loss = trainer.training_step(trainer.model, batch, count)
                    if args.device == "cuda":
                        torch.cuda.synchronize()
                    end = time.process_time() if args.device == "cpu" else time.perf_counter()
                trainer.model.zero_grad()
                if step >= 2:  # warm-up
                    seconds[name].append(end - start)
                    peaks[name].append(samples[0])
                    losses[name].append(loss.item())
    worst = max(abs(a - b) / a for a, b in zip(losses["stock"], losses["derta"], strict=True))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, {args}")
    print(f"same loss in both: largest relative difference {worst:.1e}")
    print("| | stock SFT | DeRTa | ratio of medians |\n|---|---|---|---|")
    for label, values, unit in (("time of a step, ms", seconds, 1e3), ("peak memory of a step, MB", peaks, 1e-6)):
        stock, derta = (statistics.median(values[name]) * unit for name in ("stock", "derta"))
        print(f"| {label} | {stock:.1f} | {derta:.1f} | {derta / stock:.3f} |")
    pairs = sorted(b / a for a, b in zip(seconds["stock"], seconds["derta"], strict=True))
    print(f"time ratio step by step: median {statistics.median(pairs):.3f}, quartiles "
          f"{pairs[len(pairs) // 4]:.3f} to {pairs[3 * len(pairs) // 4]:.3f}, {len(pairs)} steps")  # fmt: skip


if __name__ == "__main__":
    main()
