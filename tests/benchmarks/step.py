"""
Cost of DeRTa's step over that of a host's own SFT trainer, on the same tokenised rows, in one run.

    python -m tests.benchmarks.step [--host trl|axolotl|llamafactory] [--steps 30] [--vocab 8192] [--device cpu]

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
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, Trainer

from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.transform import build_rows
from tests.benchmarks.peak_memory import measured
from tests.conftest import byte_level_bpe


def make_rows(count: int, vocab_size: int) -> list[dict]:
    """Rows of random triples, q/h/r about 69/277/104 tokens on average, of scattered lengths."""
    draws = random.Random(0)

    def ids(mean: int) -> tuple[int, ...]:
        return tuple(draws.randrange(10, vocab_size) for _ in range(max(8, round(draws.lognormvariate(0, 0.4) * mean))))

    triples = [TokenizedTriple(ids(64), ids(96), ids(256), end_ids=(2,)) for _ in range(count)]
    rows = [
        row
        for index, triple in enumerate(triples)
        for row in build_rows(triple, DeRTaConfig(), refusal_token_id=5, max_length=1024, index=index)
    ]
    return [
        {
            "input_ids": row.input_ids, "labels": row.labels, "rto_mask": row.rto_mask,
            "attention_mask": [1] * len(row.input_ids),
        }
        for row in rows
    ]  # fmt: skip


def trl_trainers() -> tuple[Callable[..., Trainer], Callable[..., Trainer]]:
    """How TRL's own trainer is made, and ours."""
    from trl import SFTConfig, SFTTrainer

    from derta_plugins.adapters.trl import DeRTaSFTConfig, DeRTaSFTTrainer

    def make(trainer_class: Any, config_class: Any, **options: Any) -> Callable[..., Trainer]:
        def made(folder: str, model: Any, dataset: Dataset, **arguments: Any) -> Trainer:
            args = config_class(folder, max_length=None, **options, **arguments)
            return trainer_class(model, args, processing_class=byte_level_bpe(), train_dataset=dataset)

        return made

    return make(SFTTrainer, SFTConfig), make(DeRTaSFTTrainer, DeRTaSFTConfig)


def axolotl_trainers() -> tuple[Callable[..., Trainer], Callable[..., Trainer]]:
    """How Axolotl's own trainer is made, and ours."""
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.utils.collators import DataCollatorForSeq2Seq as AxolotlCollator

    from derta_plugins.adapters.axolotl_trainer import AxolotlDeRTaTrainer

    def make(trainer_class: Any) -> Callable[..., Trainer]:
        def made(folder: str, model: Any, dataset: Dataset, **arguments: Any) -> Trainer:
            options = {"average_tokens_across_devices": True, "remove_unused_columns": False}
            args = AxolotlTrainingArguments(folder, **arguments, **options)
            tokenizer = byte_level_bpe()
            collators = {name: AxolotlCollator(tokenizer) for name in ("data_collator", "eval_data_collator")}
            return trainer_class(model, args, train_dataset=dataset, processing_class=tokenizer, **collators)

        return made

    ours = AxolotlDeRTaTrainer.for_run(DeRTaConfig(), is_loss_fused=False, evaluates_triples=False)
    return make(AxolotlTrainer), make(ours)


def llamafactory_trainers() -> tuple[Callable[..., Trainer], Callable[..., Trainer]]:
    """How LLaMA-Factory's own trainer is made, and ours."""
    from llamafactory.hparams import TrainingArguments
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    from derta_plugins.adapters.llamafactory import LLaMAFactoryDeRTaTrainer
    from derta_plugins.adapters.llamafactory_args import DeRTaFinetuningArguments

    def make(trainer_class: Any) -> Callable[..., Trainer]:
        def made(folder: str, model: Any, dataset: Dataset, **arguments: Any) -> Trainer:
            args, tokenizer = TrainingArguments(folder, **arguments, remove_unused_columns=False), byte_level_bpe()
            return trainer_class(
                model=model, args=args, train_dataset=dataset, tokenizer=tokenizer,
                finetuning_args=DeRTaFinetuningArguments(stage="derta"), processor=None,
                data_collator=DataCollatorForSeq2Seq(tokenizer),
            )  # fmt: skip

        return made

    return make(CustomSeq2SeqTrainer), make(LLaMAFactoryDeRTaTrainer)


HOSTS = {"trl": trl_trainers, "axolotl": axolotl_trainers, "llamafactory": llamafactory_trainers}


def make_trainers(rows: list[dict], args: argparse.Namespace, folder: str) -> dict[str, Trainer]:
    """The host's trainer and ours, each with its own copy of one model."""
    options = {
        "per_device_train_batch_size": args.batch, "use_cpu": args.device == "cpu", "bf16": args.device != "cpu",
        "gradient_checkpointing": False, "report_to": "none", "max_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    trainers = {}
    for name, make in zip(("stock", "derta"), HOSTS[args.host](), strict=True):
        torch.manual_seed(0)
        dataset = Dataset.from_list(rows)
        dataset = dataset if name == "derta" else dataset.remove_columns("rto_mask")
        trainers[name] = make(f"{folder}/{name}", LlamaForCausalLM(config), dataset, **options)
        trainers[name].create_optimizer_and_scheduler(1)
        trainers[name].current_gradient_accumulation_steps = 1  # as `train` sets it
    return trainers


def collate(trainer: Trainer, rows: list[dict], size: int) -> list[dict[str, torch.Tensor]]:
    """The same batches for both trainers; the host's has no use for the masks."""
    known = trainer.train_dataset.column_names
    features = [{name: row[name] for name in known if name in row} for row in rows]
    return [trainer.data_collator(features[start : start + size]) for start in range(0, len(rows), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=HOSTS, default="trl")
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
        batches = {name: collate(trainer, rows, args.batch) for name, trainer in trainers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        peaks: dict[str, list[int]] = {name: [] for name in trainers}
        losses: dict[str, list[float]] = {name: [] for name in trainers}
        for step in range(args.steps + 2):
            order = list(trainers) if step % 2 else list(reversed(trainers))
            for name in order:
                trainer, batch = trainers[name], dict(batches[name][step % len(batches[name])])
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
    if worst > (2e-2 if args.device == "cuda" else 1e-5):
        raise SystemExit(f"The trainers do not train the same: losses differ by {worst:.1e}.")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {args.host} {version(args.host)}, {args}"
    )
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
