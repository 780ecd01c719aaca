"""
Cost of the start-up file: an interpreter's start in environments that differ in that file alone.

    python -m tests.benchmarks.startup [--starts 300] [--beside SITE_PACKAGES]

Each environment holds this package as its wheel installs it, compiled, beside what `--beside` holds (as links; by
default what is installed for this Python), since a start looks through all of it. Starts take turns, so noise of the
machine hits all; the table shows quartiles of the time from exec to exit, and the difference of the medians.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import derta_plugins
from derta_plugins.doctor import STARTUP_FILE

PACKAGE = Path(derta_plugins.__file__).parent
WITHOUT, WITH, OFF = "without the file", "with it", "with it, DERTA_AUTOLOAD=0"


def make_environment(folder: Path, beside: Path, *, has_file: bool) -> str:
    """Interpreter of a new environment with this package in it, and the start-up file if asked for."""
    venv.create(folder, with_pip=False)
    python = str(folder / "bin" / "python")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for entry in beside.iterdir():
        if "derta_plugins" not in entry.name:
            (site / entry.name).symlink_to(entry)
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pth"))
    compileall.compile_dir(site / PACKAGE.name, quiet=1)
    if has_file:
        shutil.copy(PACKAGE / "startup" / STARTUP_FILE, site)
    return python


def milliseconds(python: str, environment: dict[str, str]) -> float:
    """Time of one interpreter that does nothing."""
    start = time.perf_counter()
    subprocess.run([python, "-c", "pass"], env=environment, check=True, cwd="/")
    return (time.perf_counter() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=300)
    parser.add_argument("--beside", type=Path, default=Path(sysconfig.get_path("purelib")))
    args = parser.parse_args()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DERTA_"))}
    with tempfile.TemporaryDirectory() as folder:
        without, with_it = (
            make_environment(Path(folder, name), args.beside, has_file=name == "with") for name in ("without", "with")
        )
        runs = {WITHOUT: (without, plain), WITH: (with_it, plain), OFF: (with_it, {**plain, "DERTA_AUTOLOAD": "0"})}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(args.starts + 3):
            order = list(runs) if number % 2 else list(reversed(runs))
            for name in order:
                times[name].append(milliseconds(*runs[name]))
    print(f"{args.starts} starts of Python {sys.version.split()[0]} each, ms, {args.beside}")
    print(f"{'':28}{'quartile':>10}{'median':>10}{'quartile':>10}{'difference':>12}")
    base = statistics.median(times[WITHOUT][3:])
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found[3:], n=4)
        print(f"{name:28}{low:10.2f}{middle:10.2f}{high:10.2f}{middle - base:+12.2f}")


if __name__ == "__main__":
    main()
