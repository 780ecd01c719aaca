"""
Cost of the loss through a language-model head, by ways to have it: why `core/linear_nll.py` is there, and its chunks.

    python -m tests.benchmarks.head [--shapes 1280/256/8192 1280/256/32768 512/2048/32768] [--device cuda]

Shapes are tokens, size of a hidden state, vocabulary. Forward and backward, for the gradients of both hidden states and
weight, in turns; medians over `--steps`. `products` are the three matrix products alone, which no way can do without.
Torch's `linear_cross_entropy` (2.12 and later) is shown with its fastest reduction, which loses the losses of single
tokens, and with the one that has them. On a CPU time is processor time of one thread.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from derta_plugins.core.linear_nll import linear_nll
from tests.benchmarks.peak_memory import measured

Way = Callable[[Tensor, Tensor, Tensor], Tensor | None]


def products(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def ours(chunk_size: int) -> Way:
    def way(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        token_weights = torch.ones(len(targets), dtype=torch.float64, device=targets.device)
        return linear_nll(hidden, weight, targets, token_weights=token_weights, chunk_size=chunk_size).total

    return way


def of_torch(reduction: str, chunk_size: int) -> Way:
    def way(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
        return F.linear_cross_entropy(hidden, weight, targets, reduction=reduction, options=options).sum()

    return way


WAYS: dict[str, Way] = {
    "products": products,
    "all logits": all_logits,
    **{f"linear_nll, chunks of {size}": ours(size) for size in (64, 256, 1024)},
}
if hasattr(F, "linear_cross_entropy"):
    WAYS |= {f"torch, {reduction}, chunks of 256": of_torch(reduction, 256) for reduction in ("sum", "none")}


def step(way: Way, tensors: tuple[Tensor, Tensor, Tensor]) -> float | None:
    """Forward and backward; the loss."""
    loss = way(*tensors)
    if loss is None:
        return None
    loss.backward()
    for tensor in tensors[:2]:
        tensor.grad = None
    return loss.item()


def seconds(way: Way, tensors: tuple[Tensor, Tensor, Tensor], device: str) -> tuple[float | None, float]:
    clock = time.process_time if device == "cpu" else time.perf_counter
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    loss = step(way, tensors)
    if device == "cuda":
        torch.cuda.synchronize()
    return loss, clock() - start


def measure(shape: str, args: argparse.Namespace) -> None:
    """Print the rows of the table for one shape."""
    tokens, size, vocabulary = map(int, shape.split("/"))
    torch.manual_seed(0)
    options = {"device": args.device, "dtype": torch.bfloat16 if args.device == "cuda" else torch.float32}
    hidden, weight = torch.randn(tokens, size, **options), torch.randn(vocabulary, size, **options) / size**0.5
    tensors = (hidden.requires_grad_(), weight.requires_grad_(), torch.arange(tokens, device=args.device) % vocabulary)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(args.steps + 1):
        order = list(WAYS) if number % 2 else list(reversed(WAYS))
        found = {name: seconds(WAYS[name], tensors, args.device) for name in order}
        losses = [loss for loss, _ in found.values() if loss is not None]
        if max(losses) - min(losses) > 1e-2 * max(losses):
            raise SystemExit(f"The ways differ: {found}")
        for name, (_, spent) in found.items():
            times[name] += [spent] if number else []
    for name, way in WAYS.items():
        peaks: list[int] = []
        with measured(peaks, args.device):
            step(way, tensors)
        spent = statistics.median(times[name])
        ratio = spent / statistics.median(times["products"])
        print(f"| {shape} | {name} | {spent * 1e3:.1f} | {ratio:.2f} | {peaks[0] / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1280/256/8192", "1280/256/32768", "512/2048/32768"])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {args.device}\n")
    print(f"| tokens/size/vocabulary | way | ms | it / products | peak MB |\n|{'---|' * 5}")
    for shape in args.shapes:
        measure(shape, args)


if __name__ == "__main__":
    main()
