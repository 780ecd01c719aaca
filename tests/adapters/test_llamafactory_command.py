"""The unmodified `llamafactory-cli`, in processes of its own: from YAML and the command line, one process or more."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters.llamafactory_runs import (
    COMPONENTS,
    LEARN,
    TRIPLES,
    command,
    environment_of_command,
    history,
    logged,
    make_config,
    make_folder,
    rows_of_core,
    train,
    write_yaml,
)
from tests.adapters.refusals import refusal_probability
from tests.conftest import safety_records

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "llamafactory"


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path, initializer_range=0.3)


def test_the_example_trains_and_its_model_refuses(user_folder):
    """The README's files, the example's YAML as it is, and one key of the command line over it."""
    for name in ("tiny.yml", "dataset_info.json"):
        shutil.copy(EXAMPLE / name, user_folder)
    run = command(user_folder, "train", "tiny.yml", "num_train_epochs=12")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "DeRTa's refusal token: 'Sorry'" in run.stdout
    assert "DeRTa rows (train): 6 triples, 6 mle rows, 6 rto rows, 8 helpful rows" in run.stdout
    steps = [entry for entry in history(user_folder / "my-safe-model") if "loss" in entry]
    assert len(steps) == 60
    assert all({"mle_tokens", "rto_tokens"} <= set(entry) for entry in steps), "a step may have but one component"
    assert COMPONENTS <= {name for entry in steps for name in entry}
    epoch = sum(sum(row.rto_mask) for row in rows_of_core(safety_records(TRIPLES)))
    assert sum(logged(steps, "rto_tokens")) == 12 * epoch
    assert refusal_probability(AutoModelForCausalLM.from_pretrained(user_folder / "my-model")) < 0.02
    assert refusal_probability(AutoModelForCausalLM.from_pretrained(user_folder / "my-safe-model")) > 0.3
    assert AutoTokenizer.from_pretrained(user_folder / "my-safe-model").chat_template, "saved with the model"


def test_the_command_line_trains_a_lora_that_exports(folder):
    keys = {**make_config(folder, finetuning_type="lora", **LEARN), "derta_rto_keep_ratio": 0.5}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    run = command(folder, "train", *words, "--derta_zero_prefix_ratio", "none")
    assert run.returncode == 0, run.stderr[-3000:]
    tokens = set(logged(history(folder / "out"), "rto_tokens"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = refusal_probability(base)
    trained = refusal_probability(PeftModel.from_pretrained(base, folder / "out"))
    assert trained > 5 * before
    export = {
        **{"model_name_or_path": str(folder / "model"), "adapter_name_or_path": str(folder / "out")},
        **{"template": "chatml", "export_dir": str(folder / "merged"), "infer_dtype": "float32"},
        **{"export_device": "cpu", "trust_remote_code": False},
    }
    (folder / "export.yaml").write_text(yaml.safe_dump(export))
    run = command(folder, "export", str(folder / "export.yaml"))
    assert run.returncode == 0, run.stderr[-3000:]
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="float32")
    assert refusal_probability(merged) == pytest.approx(trained, abs=1e-4)
    every = sum(sum(row.rto_mask) for row in rows_of_core(safety_records(TRIPLES)))
    assert max(tokens) < 0.6 * every, "half of the positions were kept"


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_like_an_uninterrupted_one(folder):
    options = {"max_steps": 300, "save_strategy": "steps", "save_steps": 100, "overwrite_output_dir": None}
    path = write_yaml(folder, **options)
    script = [Path(sys.executable).parent / "llamafactory-cli", "train", path]
    with subprocess.Popen(script, cwd=folder, env=environment_of_command(), stdout=subprocess.DEVNULL) as run:
        wait_for(lambda: (folder / "out" / "checkpoint-100" / "trainer_state.json").exists() or run.poll() is not None)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL, "it was still training"
    assert not (folder / "out" / "checkpoint-300").exists()
    resumed = command(folder, "train", path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "Resuming training from" in resumed.stdout
    whole = train(folder, **{**options, "output_dir": str(folder / "whole"), "save_strategy": "no"})
    halves = history(folder / "out")
    assert logged(halves, "loss")[-100:] == pytest.approx(logged(whole, "loss")[-100:], rel=1e-5)


def test_two_processes_train_like_one(folder):
    several = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    options = {"max_steps": 6, "learning_rate": 1e-2}
    path = write_yaml(folder, per_device_train_batch_size=2, ddp_backend="gloo", **options)
    run = command(folder, "train", path, environment=several)
    assert run.returncode == 0, run.stderr[-3000:]
    alone = train(folder, output_dir=str(folder / "alone"), per_device_train_batch_size=4, **options)
    together = history(folder / "out")
    for name in ("loss", *sorted(COMPONENTS)):
        assert logged(together, name) == pytest.approx(logged(alone, name), rel=1e-4), name
    assert len(logged(together, "loss")) == 6


def test_a_ray_worker_trains_like_a_process(folder):
    """The host's own worker class; its placement asks for ten CPUs per device that it sees, and CPUs are devices."""
    config = make_config(folder, max_steps=4, learning_rate=1e-2)
    (folder / "run.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("llamafactory_ray.py"), folder / "run.json", str(free_port())],
        cwd=folder, env=environment_of_command(USE_RAY="1"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    alone = train(folder, **{**config, "output_dir": str(folder / "alone")})
    assert logged(history(folder / "out"), "loss") == pytest.approx(logged(alone, "loss"), rel=1e-5)


def test_the_next_generation_of_the_host_refuses_the_config(folder):
    """`USE_V1` starts another program with other keys, which does not know us and trains nothing."""
    run = command(folder, "train", write_yaml(folder), environment={"USE_V1": "1"})
    assert run.returncode != 0
    assert "Some keys are not used by the HfArgumentParser" in run.stderr
    assert not (folder / "out").exists()


def test_without_the_start_up_file_the_host_refuses_the_stage_even_where_unknown_keys_are_allowed(folder):
    off = {"DERTA_AUTOLOAD": "0", "ALLOW_EXTRA_ARGS": "1"}
    run = command(folder, "train", write_yaml(folder, derta_rto_weight=0.5), environment=off)
    assert run.returncode != 0
    assert "Unknown task: derta" in run.stderr
    assert not (folder / "out").exists()


def test_the_web_interface_starts(tmp_path):
    port, script = free_port(), Path(sys.executable).parent / "llamafactory-cli"
    served = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    with subprocess.Popen(
        [script, "webui"], cwd=tmp_path, env=environment_of_command(**served), start_new_session=True
    ) as server:
        try:
            wait_for(lambda: answers(port) or server.poll() is not None)
            assert answers(port)
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
