"""Code blocks of the README, and how its commands are run: in a user's folder, offline, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, *, under: str = "") -> list[str]:
    """Code blocks of one language, of the whole README or of the section below the heading `under`."""
    text = README
    if under:
        assert README.count(f"\n{under}\n") == 1, f"the README has no heading {under!r}"
        text = re.split(r"\n##+ ", README.split(f"\n{under}\n", 1)[1], maxsplit=1)[0]
    return [
        body for kind, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if kind == language
    ]


def run(command: str | list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the README in `folder`, with this environment's programs first on the path."""
    given = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **environment,
    }
    arguments = {"cwd": folder, "env": given, "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command, shell=isinstance(command, str), **arguments)
