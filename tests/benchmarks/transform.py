"""
Throughput of the transform and its growth with the number of records.

    python -m tests.benchmarks.transform [--sizes 1000 4000 16000] [--num-proc 1]

For each size: records a second from text to rows, the two stages apart (tokenising, building), and the peak of resident
memory above what was in use before. The last line fits time ~ size^p; p = 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter

import datasets
from datasets import Dataset

from derta_plugins.adapters.row_datasets import BuildRows, build_dataset, tokenize_records
from derta_plugins.core.config import DeRTaConfig
from tests.benchmarks.peak_memory import measured
from tests.conftest import HARMFUL, SAFE, byte_level_bpe


def make_records(count: int) -> Dataset:
    """Records of about 30/120/60 words, all different."""

    def generate():
        for number in range(count):
            yield {
                "prompt": f"How do I paint the castle wall number {number} ? " * 3,
                "chosen": f"{SAFE} " * 5,
                "rejected": f"{HARMFUL} " * (3 + number % 6),
            }

    return Dataset.from_list(list(generate()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--num-proc", type=int, default=None)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer, config, points = byte_level_bpe(), DeRTaConfig(), []
    print("| records | tokenise, records/s | build, records/s | whole, s | peak memory, MB |\n|---|---|---|---|---|")
    for size in args.sizes:
        records, peaks = make_records(size), []
        with measured(peaks, "cpu"):
            start = time.perf_counter()
            tokenized = tokenize_records(
                records, tokenizer, config, max_length=1024, skipped=Counter(), num_proc=args.num_proc
            )
            middle = time.perf_counter()
            rows = build_dataset(tokenized, BuildRows(config, 5, 1024), num_proc=args.num_proc)
            end = time.perf_counter()
        assert len(rows) == 2 * size
        points.append((size, end - start))
        print(
            f"| {size} | {size / (middle - start):.0f} | {size / (end - middle):.0f} | {end - start:.2f} "
            f"| {peaks[0] / 1e6:.0f} |"
        )
    (small, fast), (large, slow) = points[0], points[-1]
    if len(points) > 1:
        print(f"growth: time ~ size^{math.log(slow / fast) / math.log(large / small):.2f}")


if __name__ == "__main__":
    main()
