"""One step on two ranks, replicated (DDP) and sharded (FSDP2, ZeRO-2, ZeRO-3), is the step of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.adapters.ranks_cases import CASES, VOCABULARY
from tests.adapters.ranks_worker import train
from tests.conftest import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
# kind: classes of parameters and of the optimizer, by which it is known that ranks share what they are to share
KINDS = {
    "ddp": ["SGD", "Parameter"],
    "fsdp": ["SGD", "DTensor"],
    "fsdp_bf16": ["SGD", "DTensor"],
    "zero2": ["DeepSpeedZeroOptimizer", "Parameter"],
    "zero3": ["DeepSpeedZeroOptimizer_Stage3", "ZeRO-3"],
}
# DeepSpeed has a session of its own: where it is installed, other tests of hosts take other paths
HERE = os.environ.get("DERTA_TEST_RANKS", "ddp fsdp fsdp_bf16").split()


@pytest.fixture(scope="module", params=HERE)
def ranked(request, tmp_path_factory):
    """Kind, and the folder with the parameters after each case's step on two ranks, all in one start of torchrun."""
    kind, output = request.param, tmp_path_factory.mktemp(request.param)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if kind.startswith("fsdp"):
        environment |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "PYTHONPATH": os.pathsep.join((str(ROOT / "tests" / "data" / "fsdp_on_cpu"), str(ROOT))),
            "DERTA_TEST_SHARDED": str(output / "sharded"),
        }
    if kind.startswith("zero"):
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    worker = [str(ROOT / "tests" / "adapters" / "ranks_worker.py"), str(output), kind]
    run = subprocess.run(
        [*launcher, "--rdzv_endpoint=localhost:0", *worker],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return kind, output


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Parameters after each case's step in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(folder / "run", name).parameters for name in CASES}


def distance(left, right) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_step_like_one(ranked, alone, name):
    kind, output = ranked
    parameters = torch.load(output / f"{name}.pt")
    assert set(parameters) == set(alone[name])
    moved = distance(alone[name], dict(tiny_llama(VOCABULARY).named_parameters()))
    rounding = 0.02 * moved if kind.endswith("bf16") else 2e-6
    assert distance(alone[name], parameters) <= rounding
    assert (moved > 1e-3) == (name != "no target anywhere")


def test_the_model_was_replicated_or_sharded_as_asked(ranked):
    kind, output = ranked
    kinds = list(json.loads((output / "kinds.json").read_text()).values())
    assert kinds == [[*KINDS[kind], "scored in the head"]] * len(CASES)
