"""
Cost of one training step over the same triples, in the authors' layout and in ours: one command, one table.

    python -m tests.benchmarks.layouts [--lengths 64/256/96] [--prefixes 1 2 4] [--vocab 8192] [--device cuda]

Compared, forward and backward, with the same loss in all (checked at every step):

- `authors`: what their script does, re-stated: rows padded to the longest, logits of every position, made float32,
  shifted by a copy, then cross-entropy. Their mean per micro-batch is left out of it: the loss is that of the others.
- `stock`: the stock path of a `transformers` trainer on the same padded rows: `model(labels=...)`.
- `rows`: our separate rows, packed without padding, targets scored in the head.
- `branch`: the branch layout, packed, targets scored in the head.

and the physical floor: the time that the matrix products of one pass over each distinct token take on this machine,
measured apart (`floor`). Variants take turns, so noise of the machine hits all; the table shows medians and ratios of
medians. On a CPU time is processor time of one thread, and memory is the peak resident memory above that before.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from derta_plugins.adapters.branch_batch import flatten_batch
from derta_plugins.adapters.branch_model import BranchAttention
from derta_plugins.adapters.collator import RowCollator
from derta_plugins.adapters.trainer_mixins import MicroBatch, count_batch
from derta_plugins.core.branch_layout import fold_rows
from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.transform import Row, build_rows
from tests.benchmarks.peak_memory import measured

SHAPES = {
    # name: (settings of the model, triples of a step)
    "toy": ({"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2}, 4),
    "1b": ({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64}, 16),
    "8b": ({"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8}, 8),
}  # fmt: skip
VARIANTS = ("authors", "stock", "rows", "branch")


def make_triples(count: int, lengths: tuple[int, ...], vocab_size: int, seed: int) -> list[TokenizedTriple]:
    """Triples of random tokens, each part lognormal (sigma 0.4) around its length, as in BeaverTails-like data."""
    draws = random.Random(seed)

    def ids(mean: int) -> tuple[int, ...]:
        length = max(8, round(draws.lognormvariate(-0.08, 0.4) * mean))
        return tuple(draws.randrange(10, vocab_size) for _ in range(length))

    q, h, r = lengths
    return [TokenizedTriple(ids(q), ids(r), ids(h), end_ids=(2,)) for _ in range(count)]


def pad(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The plainest collator: padded on the right."""
    width = max(len(row["input_ids"]) for row in features)
    columns = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in features])
        for name, fill in columns.items()
    }


def collate(rows: list[Row], layout: str) -> dict[str, torch.Tensor]:
    """Rows as one padded batch."""
    features = [
        {
            "input_ids": row.input_ids, "labels": row.labels, "rto_mask": row.rto_mask,
            "attention_mask": [1] * len(row.input_ids), "branch_starts": row.branch_starts or [0] * len(row.input_ids),
        }
        for row in rows
    ]  # fmt: skip
    return RowCollator(pad, layout)(features)


def authors_loss(model: Any, batch: dict[str, torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
    """As in their `MyLlamaForCausalLM.forward`, but for the relabelling, which costs nothing."""
    logits = model(**inputs).logits.float()
    shift_logits, shift_labels = logits[..., :-1, :].contiguous(), batch["labels"][..., 1:].contiguous()
    return F.cross_entropy(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1))


def stock_loss(model: Any, batch: dict[str, torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
    """The model's own."""
    return model(**inputs, labels=batch["labels"]).loss


class Steps:
    """One step of each variant over the same triples."""

    def __init__(self, args: argparse.Namespace, vocab: int, lengths: str, prefixes: int) -> None:
        options, self._count = SHAPES[args.model]
        self._args, self._vocab, self._prefixes = args, vocab, prefixes
        self._lengths = tuple(map(int, lengths.split("/")))
        self._count = args.triples or self._count
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=vocab, max_position_embeddings=8192, **options)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        with torch.device(args.device):
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if args.checkpointing:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if args.lora:
            self._model = with_lora(self._model)

    def batches(self, seed: int) -> dict[str, dict[str, torch.Tensor]]:
        """The same triples in each variant's layout."""
        triples = make_triples(self._count, self._lengths, self._vocab, seed)
        config = DeRTaConfig(num_prefixes=self._prefixes)
        rows, folded = [], []
        for index, triple in enumerate(triples):
            of_triple = build_rows(triple, config, refusal_token_id=5, index=index)
            rows += of_triple
            folded += fold_rows(of_triple)
        layouts = {"rows": collate(rows, "branch"), "branch": collate(folded, "branch")}
        made = {"authors": collate(rows, "rows"), **{name: flatten_batch(batch) for name, batch in layouts.items()}}
        made["stock"] = made["authors"]
        device = self._args.device
        return {name: {key: value.to(device) for key, value in made[name].items()} for name in VARIANTS}

    def loss(self, variant: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The step's loss, one call of the model."""
        if variant in ("authors", "stock"):
            self._base.set_attn_implementation("sdpa")
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return (authors_loss if variant == "authors" else stock_loss)(self._model, batch, inputs)
        attention = BranchAttention.of(self._model)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        masks = attention.masks(batch["position_ids"], batch["branch_ids"], self._base.dtype)
        micro_batch = MicroBatch.of(batch["labels"], batch["rto_mask"], count_batch(batch), DeRTaConfig())
        with micro_batch.scoring(self._model) as head:
            return micro_batch.loss_of_head(head.read(self._model(**inputs, attention_mask=masks))).loss

    @property
    def _base(self) -> Any:
        return self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model

    def seconds(self, variant: str, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Loss and seconds of a forward and backward pass."""
        gc.collect()
        start = clock(self._args.device)
        loss = self.loss(variant, batch)
        loss.backward()
        seconds = clock(self._args.device) - start
        self._model.zero_grad(set_to_none=True)
        return loss.item(), seconds

    def peak(self, variant: str, batch: dict[str, torch.Tensor]) -> int:
        """Bytes of a forward and backward pass, gradients included."""
        gc.collect()
        peaks: list[int] = []
        with measured(peaks, self._args.device):
            self.loss(variant, batch).backward()
        self._model.zero_grad(set_to_none=True)
        return peaks[0]

    def floor_work(self, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
        """The matrix products alone, three each (forward and two backward), of one pass over each distinct token."""
        config, device, dtype = self._base.config, self._args.device, self._base.dtype
        tokens, pairs = batch["labels"].numel() - self._count * self._prefixes, int((batch["labels"] != -100).sum())
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        heads = head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
        shapes = [(tokens, config.hidden_size, heads), (tokens, config.hidden_size, 3 * config.intermediate_size)]
        products = [*shapes * config.num_hidden_layers, (pairs, config.hidden_size, config.vocab_size)]

        def work() -> None:
            for rows, inner, outer in products:
                left, weight = (torch.empty(of, dtype=dtype, device=device) for of in ((rows, inner), (outer, inner)))
                product = left @ weight.T
                product @ weight
                if not self._args.lora:
                    product.T @ left

        return work


def with_lora(model: Any) -> Any:
    """LoRA of rank 16 on all linear layers but the head."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@dataclass
class Found:
    """What was measured of one setting, by variant, a value for each step."""

    seconds: dict[str, list[float]]
    tokens: dict[str, list[int]]
    floor: list[float] = field(default_factory=list)
    peaks: dict[str, list[int]] = field(default_factory=dict)


def measure(steps: Steps, args: argparse.Namespace) -> Found:
    """All variants in turn, over the same triples; the first two steps warm up."""
    found = Found(*({name: [] for name in VARIANTS} for _ in range(2)))
    for step in range(-2, args.steps):
        batches = steps.batches(seed=step)
        order = VARIANTS if step % 2 else tuple(reversed(VARIANTS))
        results = {name: steps.seconds(name, batches[name]) for name in order}
        check_same_loss({name: loss for name, (loss, _) in results.items()}, args.device)
        floor = floor_seconds(steps.floor_work(batches["branch"]), args.device)
        print(f"step {step + 1} of {args.steps} ", end="\r", file=sys.stderr, flush=True)
        if step < 0:
            continue
        found.floor.append(floor)
        for name, (_, seconds) in results.items():
            found.seconds[name].append(seconds)
            found.tokens[name].append(batches[name]["labels"].numel())
    return found


def measure_memory(steps: Steps, args: argparse.Namespace) -> dict[str, list[int]]:
    """Peak bytes of each variant, over a few of the same steps."""
    found = {name: [] for name in VARIANTS}
    for step in range(min(args.steps, 5)):
        batches = steps.batches(seed=step)
        for name in VARIANTS:
            found[name].append(steps.peak(name, batches[name]))
    return found


def memory_of(args: argparse.Namespace, settings: list[tuple[int, str, int]]) -> list[dict[str, list[int]]]:
    """
    `measure_memory` of all settings; on a CPU in a process whose C library gives back what is freed at once, so that
    resident memory is what is in use. That costs time, so time is measured apart.
    """
    if args.device != "cpu" or args.only_memory:
        return [measure_memory(Steps(args, *setting), args) for setting in settings]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.benchmarks.layouts", *sys.argv[1:], "--only-memory"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


def floor_seconds(work: Callable[[], None], device: str) -> float:
    start = clock(device)
    with torch.no_grad():
        work()
    return clock(device) - start


def check_same_loss(losses: dict[str, float], device: str) -> None:
    tolerance = 2e-2 if device == "cuda" else 1e-5
    worst = max(abs(loss - losses["rows"]) / losses["rows"] for loss in losses.values())
    if worst > tolerance:
        raise SystemExit(f"The variants do not train the same: {losses}")


def report(setting: tuple[int, str, int], found: Found) -> None:
    """The rows of the table for one setting."""
    vocab, lengths, prefixes = setting
    medians = [{name: statistics.median(of[name]) for name in VARIANTS} for of in (found.seconds, found.peaks)]
    seconds, peaks = medians
    for name in VARIANTS:
        cells = [
            lengths, str(prefixes), f"{vocab // 1000}k", name, f"{statistics.mean(found.tokens[name]):.0f}",
            f"{seconds[name] * 1e3:.0f}", f"{seconds['authors'] / seconds[name]:.2f}",
            f"{seconds['rows'] / seconds[name]:.2f}", f"{seconds[name] / statistics.median(found.floor):.2f}",
            f"{peaks[name] / 1e6:.0f}", f"{peaks['authors'] / peaks[name]:.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=["64/256/96"])
    parser.add_argument("--prefixes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--vocab", nargs="+", type=int, default=[8192])
    parser.add_argument("--model", choices=SHAPES, default="toy")
    parser.add_argument("--triples", type=int, help="of a step; each model has its own")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = list(itertools.product(args.vocab, args.lengths, args.prefixes))
    if args.only_memory:
        print(json.dumps(memory_of(args, settings)))
        return
    if args.device == "cpu":
        torch.set_num_threads(1)  # so that processor time is the cost of the step, whatever else the machine does
    where = platform.processor() or platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {where}, `python -m tests.benchmarks.layouts {' '.join(sys.argv[1:])}`\n")
    times = "ms | authors / it | rows / it | it / floor"
    print(f"| q/h/r | m | vocabulary | variant | tokens | {times} | peak MB | authors / it |\n|" + "---|" * 11)
    found = {setting: measure(Steps(args, *setting), args) for setting in settings}
    for setting, peaks in zip(settings, memory_of(args, settings), strict=True):
        report(setting, replace(found[setting], peaks=peaks))


if __name__ == "__main__":
    main()
