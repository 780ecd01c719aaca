"""Hosts and patches that exist only on disk, for tests that import them in other interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HOSTS = {"axolotl": "axolotl.cli.config", "llamafactory": "llamafactory.train.tuner"}

HOST = '''"""A host."""

LOADERS = __loader__, __spec__.loader


def run():
    return "host"
'''
PATCH = """
extended = []


def apply(module):
    extended.append(f"{module.__name__} that answers {module.run()}")
    module.run = lambda: "DeRTa"
"""
# says which patches the finder calls, where there is a finder; puts none there
FAKES = f"""
from derta_plugins import _autoload

_autoload.PATCHES.update({ {module: f"patch_{host}" for host, module in HOSTS.items()}!r})
"""
# what the tests run in children of all kinds
WORKER = """
import fakes, llamafactory.train.tuner as tuner, os
os.write(1, f"worker: {tuner.run()}\\n".encode())  # one write: lines of several workers stay whole
"""


def write_hosts(folder: Path) -> Path:
    """Write both hosts, `patch_axolotl`, `patch_llamafactory`, `fakes` and `worker` as modules of `folder`."""
    for host, module in HOSTS.items():
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True)
        for package in (path.parent, path.parent.parent):
            (package / "__init__.py").write_text("")
        path.write_text(HOST)
        (folder / f"patch_{host}.py").write_text(PATCH)
    (folder / "fakes.py").write_text(FAKES)
    (folder / "worker.py").write_text(WORKER)
    return folder


def run_python(*arguments, path=(), python=sys.executable, check=True, cwd=None, **environment):
    """Run an interpreter with `path` on PYTHONPATH; environment variables that are None are removed."""
    entries = [os.fspath(entry) for entry in ([path] if isinstance(path, (str, Path)) else path)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(entries), **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    run = subprocess.run(
        [python, *map(str, arguments)], env=variables, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or run.returncode == 0, run.stderr
    return run
