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
EQUIVALENCE = ROOT / ".nox" / "losses"

nox.options.default_venv_backend = "uv"
nox.options.envdir = str(ROOT / ".nox")
nox.options.error_on_missing_interpreters = True
nox.options.sessions = [
    *("lint", "core", "trl_oldest", "trl", "axolotl", "llamafactory", "equivalence", "zero", "demo"),
]

# doctests are collected from every module, and a host's adapter cannot be imported without it
OTHER_ADAPTERS = tuple(f"--ignore-glob=derta_plugins/adapters/{host}*.py" for host in ("axolotl", "llamafactory"))
# What depends on the host that is installed, beside its own adapter; the rest runs once, with the newest TRL.
HOST_TESTS = (
    *("tests/adapters", "tests/test_recipe.py", "tests/test_examples.py"),
    "tests/test_benchmarks.py::test_steps_of_the_host_are_compared_at_the_same_loss",
)


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
    prepare(session, "-e", ".", "pytest", "hypothesis", constraints="trl.txt")
    session.run(
        "python", "-c", "import importlib.util as u; assert not (u.find_spec('trl') or u.find_spec('datasets'))"
    )
    rows = ["config", "records", "transform", "transform_properties", "row_check"]
    tests = [*rows, "losses", "losses_distributed", "linear_nll", "branch_layout", "branch_attention"]
    session.run("pytest", "derta_plugins/core", *(f"tests/core/test_{name}.py" for name in tests))


def run_host_tests(
    session: nox.Session, host: str, *requirements: str, constraints: str, tests: tuple[str, ...]
) -> None:
    """Run `tests` in an environment of one host, which they assert to be there in its pinned version."""
    prepare(session, *requirements, "pytest", constraints=constraints)
    session.env[f"DERTA_EXPECT_{host.upper()}"] = pinned(host, constraints)
    session.run("pytest", "-m", "not slow", *tests, *session.posargs)


def leave_losses(session: nox.Session, host: str) -> None:
    """Train the same 20 steps as the other hosts, for the session `equivalence` to compare."""
    session.run("python", "-m", "tests.equivalence.run", host, str(EQUIVALENCE))


@nox.session
def trl_oldest(session: nox.Session) -> None:
    """The TRL adapter on the oldest supported TRL."""
    run_host_tests(session, "trl", "-e", ".[trl]", constraints="trl-oldest.txt", tests=("tests/adapters",))


@nox.session
def trl(session: nox.Session) -> None:
    """Everything but the demo and the other hosts, on the newest supported TRL."""
    tests = ("tests", "derta_plugins", "--ignore=tests/equivalence", *OTHER_ADAPTERS)
    # what builds the wheel that `tests/test_wheel.py` installs, without a network
    requirements = ("-e", ".[demo]", "hypothesis", "hatchling", "editables")
    run_host_tests(session, "trl", *requirements, constraints="trl.txt", tests=tests)
    leave_losses(session, "trl")


@nox.session
def axolotl(session: nox.Session) -> None:
    """The Axolotl adapter, through `axolotl train`."""
    run_host_tests(session, "axolotl", "-e", ".[axolotl]", constraints="axolotl.txt", tests=HOST_TESTS)
    leave_losses(session, "axolotl")


@nox.session
def llamafactory(session: nox.Session) -> None:
    """The LLaMA-Factory adapter, through `llamafactory-cli train`."""
    # three versions of torch's that belong together, and what the host runs on several machines with
    requirements = ("-e", ".[llamafactory]", "torch", "torchvision", "torchaudio", "ray")
    tests = (*HOST_TESTS, "tests/test_launch.py")
    run_host_tests(session, "llamafactory", *requirements, constraints="llamafactory.txt", tests=tests)
    leave_losses(session, "llamafactory")


@nox.session
def equivalence(session: nox.Session) -> None:
    """Losses of the three hosts, which their sessions have left, compared step by step."""
    prepare(session, "-e", ".[demo]", "pytest", constraints="trl.txt")
    session.env["DERTA_EQUIVALENCE"] = str(EQUIVALENCE)
    session.run("pytest", "tests/equivalence", *session.posargs)


@nox.session
def zero(session: nox.Session) -> None:
    """DeepSpeed's ZeRO-2 and ZeRO-3 on two ranks, which run on a CPU too."""
    prepare(session, "-e", ".[trl]", "pytest", "deepspeed", constraints="trl.txt")
    session.env["DERTA_TEST_RANKS"] = "zero2 zero3"
    session.run("pytest", "tests/adapters/test_ranks.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The whole demo for three seeds, with the bounds that its results must keep."""
    prepare(session, "-e", ".[demo]", "pytest", "hypothesis", constraints="trl.txt")
    session.run("pytest", "-m", "slow", "tests", "--ignore=tests/equivalence", *session.posargs)
