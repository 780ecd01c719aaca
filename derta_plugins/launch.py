"""
Run a command with DeRTa where no start-up file is wanted: `python -m derta_plugins.launch axolotl train cfg.yml`.

The command and all its Python children find `startup/sitecustomize.py` through PYTHONPATH, as with `ddtrace-run` and
`opentelemetry-instrument`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

STARTUP = str(Path(__file__).resolve().parent / "startup")
# commands of the hosts that are extended, and the package that each needs (our extra has its name)
HOST_COMMANDS = {"axolotl": "axolotl", "llamafactory-cli": "llamafactory", "lmf": "llamafactory"}


def main() -> None:
    """Replace this process by the command of `sys.argv`, with DeRTa in it."""
    parser = argparse.ArgumentParser(
        prog="python -m derta_plugins.launch",
        description="Run a command so that Axolotl and LLaMA-Factory know DeRTa in it and in all its Python children.",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="e.g. llamafactory-cli train cfg.yaml")
    command = parser.parse_args().command
    if not command:
        parser.error("no command; give one, e.g. llamafactory-cli train cfg.yaml")
    try:
        file = _find(command[0])
        os.execve(file, [file, *command[1:]], with_startup(os.environ))
    except (LookupError, OSError) as error:
        parser.error(str(error))


def with_startup(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with the start-up folder first in PYTHONPATH and the start-up code switched on."""
    others = environment["PYTHONPATH"].split(os.pathsep) if environment.get("PYTHONPATH") else []
    path = [STARTUP, *(entry for entry in others if entry != STARTUP)]
    return {**environment, "PYTHONPATH": os.pathsep.join(path), "DERTA_AUTOLOAD": "1"}


def _find(command: str) -> str:
    """File of `command`: beside this Python, else on PATH."""
    host = HOST_COMMANDS.get(command)
    if host and getattr(find_spec(host), "origin", None) is None:  # a mere folder of that name has no origin
        raise LookupError(
            f"`{command}` needs {host}, which {sys.executable} does not have: pip install 'derta-plugins[{host}]'"
        )
    found = shutil.which(command, path=os.path.dirname(sys.executable)) or shutil.which(command)
    if found is None:
        raise LookupError(f"no command `{command}` beside {sys.executable} or on PATH; check its spelling.")
    return found


if __name__ == "__main__":
    main()
