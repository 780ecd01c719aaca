"""
All checks, each in an environment that is made for it: `nox -f tests/noxfile.py` (README, "Run all tests").

The hosts cannot share an environment, so there is one session per host, pinned by a constraint file, and each says
which version it expects to have imported. Environments are kept in `.nox/` and made anew when they are missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "tests" / "constraints"

nox.options.default_venv_backend = "uv"
nox.options.envdir = str(ROOT / ".nox")
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "core", "trl_oldest", "trl", "demo"]


def prepare(session: nox.Session, *requirements: str, constraints: str) -> None:
    """Install the checkout and `requirements` into the session's environment, and go to the checkout."""
    session.chdir(ROOT)
    # uv does not read pip's variable; wheels that a machine keeps for pip are found through it
    environment = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if os.environ.get("PIP_FIND_LINKS") else {}
    session.install(*requirements, "-c", str(CONSTRAINTS / constraints), env=environment)
    session.env.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})


def pinned(name: str, constraints: str) -> str:
    """Version of `name` in a constraint file."""
    for line in (CONSTRAINTS / constraints).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}=="):
            return line.partition("==")[2]
    raise LookupError(f"{name} is not pinned in {constraints}")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, imports, docstrings."""
    prepare(session, "ruff", constraints="trl.txt")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def core(session: nox.Session) -> None:
    """The core without any host: no extra installed, and nothing in it may need one."""
    prepare(session, "-e", ".", "pytest", constraints="trl.txt")
    session.run(
        "python", "-c", "import importlib.util as u; assert not (u.find_spec('trl') or u.find_spec('datasets'))"
    )
    tests = ["config", "records", "transform", "transform_properties", "losses", "losses_distributed"]
    session.run("pytest", "derta_plugins/core", *(f"tests/core/test_{name}.py" for name in tests))


@nox.session
def trl_oldest(session: nox.Session) -> None:
    """The TRL adapter on the oldest supported TRL."""
    prepare(session, "-e", ".[trl]", "pytest", constraints="trl-oldest.txt")
    session.env["DERTA_EXPECT_TRL"] = pinned("trl", "trl-oldest.txt")
    session.run("pytest", "tests/adapters")


@nox.session
def trl(session: nox.Session) -> None:
    """Everything but the demo, on the newest supported TRL."""
    prepare(session, "-e", ".[demo]", "pytest", constraints="trl.txt")
    session.env["DERTA_EXPECT_TRL"] = pinned("trl", "trl.txt")
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The whole demo for three seeds, with the bounds that its results must keep."""
    prepare(session, "-e", ".[demo]", "pytest", constraints="trl.txt")
    session.run("pytest", "-m", "slow", "tests", *session.posargs)
