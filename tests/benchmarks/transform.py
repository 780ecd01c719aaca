"""
The growth of the transform with the number of records: time and memory, in memory and streaming.

    python -m tests.benchmarks.transform [--sizes 1000 10000 100000] [--ways memory-1 stream-1] [--largest]

Triples of about 64/256/96 tokens (prompt, harmful and safe response) are written as eight JSON lines files, and
prepared as a host prepares them, from text to rows, in a process of its own: `memory-N` is `Dataset.map` with N
processes, `stream-N` reads a stream to its end, by itself (1) or with N loader workers. `--largest` adds a million.

Memory is polled in /proc. Anonymous memory (RssAnon) is what a process holds; resident memory (VmRSS) counts the pages
of memory-mapped Arrow files too, which the kernel takes back when it needs them. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHARDS = 8
WAYS = ("memory-1", "memory-2", "stream-1", "stream-2")
LARGEST = 1_000_000
_WORDS = "gather pour moon dust castle wall step paint the on help with answer prompt hello first".split()
_COLUMNS = (
    ("records", "{size}"),
    ("way", "{way}"),
    ("s / 1000 records", "{per_thousand:.2f}"),
    ("CPU s / 1000", "{cpu_per_thousand:.2f}"),
    ("main: anonymous, start", "{start_anon:.0f}"),
    ("peak", "{main_anon:.0f}"),
    ("B / record above start", "{growth:.0f}"),
    ("main: resident, peak", "{main_resident:.0f}"),
    ("children: anonymous, peak", "{children_anon:.0f}"),
    ("resident, peak", "{children_resident:.0f}"),
    ("Arrow files", "{disk:.0f}"),
)


def write_triples(folder: Path, count: int) -> None:
    """Harmless triples in `SHARDS` files, all different, written one by one."""
    draws = random.Random(0)

    def words(number: int) -> str:
        return " ".join(draws.choices(_WORDS, k=draws.randint(number // 2, 3 * number // 2)))

    for shard in range(SHARDS):
        with (folder / f"triples-{shard}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(shard * count // SHARDS, (shard + 1) * count // SHARDS):
                record = {"prompt": f"How do I paint wall {number} ? {words(28)}"}
                record |= {"chosen": f"Sorry , I will not help . {words(60)}", "rejected": f"Step one : {words(170)}"}
                file.write(json.dumps(record) + "\n")


def prepare_triples(folder: Path, way: str) -> None:
    """What the measured process does; it says when it begins, and what came of it."""
    import datasets
    import torch

    from derta_plugins.adapters.prepare import Preparation, prepare
    from derta_plugins.core.config import DeRTaConfig
    from tests.conftest import byte_level_bpe

    datasets.disable_progress_bars()
    kind, processes = way.split("-")
    files, is_stream, num_proc = str(folder / "triples-*.jsonl"), kind == "stream", int(processes)
    records = datasets.load_dataset(
        "json", data_files=files, split="train", streaming=is_stream, cache_dir=str(folder / "cache")
    )
    how = Preparation(DeRTaConfig(), byte_level_bpe(), lambda rows: rows, 2048, 0.5, num_proc if num_proc > 1 else None)
    print(json.dumps({"start_anon": memory_of(os.getpid())["RssAnon"]}), flush=True)
    start, cpu_start = time.perf_counter(), cpu_seconds()
    rows = prepare(how, records).rows
    if is_stream:
        workers = num_proc if num_proc > 1 else 0
        loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=workers, collate_fn=_length)
        count = sum(length > 0 for length in loader)
    else:
        count = len(rows)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    print(json.dumps({"seconds": seconds, "cpu": cpu, "rows": count}), flush=True)


def _length(row: dict[str, Any]) -> int:
    """In place of torch's own collator, which would make a tensor of every id."""
    return len(row["input_ids"])


def cpu_seconds() -> float:
    """Of this process and of its children that have ended: what a busy machine does not change."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory_of(pid: int) -> dict[str, float]:
    """RssAnon and VmRSS of a process in MB, zero when it has ended."""
    found = {"RssAnon": 0.0, "VmRSS": 0.0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) / 1e3
    return found


def descendants(pid: int) -> Iterator[int]:
    """Processes below `pid`."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def measure(folder: Path, size: int, way: str) -> dict[str, Any]:
    """One line of the table."""
    command = [sys.executable, "-m", "tests.benchmarks.transform", "--child", str(folder), "--ways", way]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = {"size": size, "way": way, **json.loads(process.stdout.readline())}
    peaks = dict.fromkeys(("main_anon", "main_resident", "children_anon", "children_resident"), 0.0)
    while process.poll() is None:
        main, below = memory_of(process.pid), [memory_of(pid) for pid in descendants(process.pid)]
        now = (main["RssAnon"], main["VmRSS"], *(sum(one[name] for one in below) for name in ("RssAnon", "VmRSS")))
        peaks = {name: max(peak, value) for (name, peak), value in zip(peaks.items(), now, strict=True)}
        time.sleep(0.1)
    result = json.loads(process.stdout.readline() or "{}")
    if process.returncode or result.get("rows", 0) < 2 * size:
        raise RuntimeError(f"{way} of {size} records gave {result.get('rows')} rows, exit status {process.returncode}.")
    line |= {**peaks, **result, "per_thousand": 1000 * result["seconds"] / size}
    line["cpu_per_thousand"] = 1000 * result["cpu"] / size
    line["growth"] = 1e6 * (line["main_anon"] - line["start_anon"]) / size
    line["disk"] = sum(file.stat().st_size for file in (folder / "cache").rglob("*.arrow")) / 1e6
    return line


def machine() -> str:
    """Where the figures come from."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    packages = ", ".join(f"{name} {version(name)}" for name in ("datasets", "pyarrow", "tokenizers", "transformers"))
    return f"{model.split(': ')[1]}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--largest", action="store_true", help=f"also {LARGEST} triples, with `memory-2` alone")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return prepare_triples(args.child, args.ways[0])
    print(f"{machine()}. Memory in MB.\n\n| {' | '.join(name for name, _ in _COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    points: dict[str, list[tuple[int, float]]] = {}
    runs = [(size, way) for size in args.sizes for way in args.ways]
    for size, way in [*runs, *([(LARGEST, "memory-2")] if args.largest else [])]:
        with tempfile.TemporaryDirectory() as folder:
            write_triples(Path(folder), size)
            line = measure(Path(folder), size, way)
        points.setdefault(way, []).append((size, line["cpu"]))
        print(f"| {' | '.join(shown.format(**line) for _, shown in _COLUMNS)} |", flush=True)
    for way, ((small, fast), *_, (large, slow)) in ((way, found) for way, found in points.items() if len(found) > 1):
        print(f"\n{way}: CPU time ~ size^{math.log(slow / fast) / math.log(large / small):.2f}")
    return None


if __name__ == "__main__":
    main()
