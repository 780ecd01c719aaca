"""
Train 20 steps in one host, in several ways, and write the losses: `python -m tests.equivalence.run trl DIR`.

Run it in each host's environment with the same DIR; `test_equivalence.py` compares what lies there. Every run is the
host's own command in a process of its own: the TRL script of the examples, `axolotl train`, `llamafactory-cli train`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tests.equivalence.inputs import ROWS_PER_STEP, STEPS, code_digest, make_inputs

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Way:
    """How a step is split, and what its rows look like."""

    processes: int = 1
    accumulation: int = 1
    fsdp: bool = False
    layout: str = "rows"

    @property
    def batch(self) -> int:
        """Sequences of a micro-batch."""
        return ROWS_PER_STEP // (self.processes * self.accumulation)


WAYS = {
    "1 process": Way(),
    "accumulation 4": Way(accumulation=4),
    "2 processes": Way(processes=2),
    "FSDP2": Way(processes=2, fsdp=True),
    "branch": Way(layout="branch"),
    "branch FSDP2": Way(processes=2, fsdp=True, layout="branch"),
}
FSDP_CONFIG = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
SEED, LEARNING_RATE, WARMUP_STEPS, MAX_LENGTH = 3, 5e-3, 2, 96
REFUSAL_TEXT = "Sorry"


def main() -> None:
    """Run one host and write `HOST.json` into the folder of results."""
    host, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    work = folder / host
    shutil.rmtree(work, ignore_errors=True)
    (folder / f"{host}.json").unlink(missing_ok=True)
    work.mkdir(parents=True)
    digest = make_inputs(work)
    losses = {}
    for name, way in WAYS.items():
        print(f"{host}: {name}", flush=True)
        output = work / name.replace(" ", "-")
        command, environment = HOSTS[host](work, output, way)
        if way.fsdp:
            environment = {**environment, **_fsdp_environment(output)}
        run = subprocess.run(
            command,
            cwd=work,
            env={**os.environ, **_ENVIRONMENT, **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )
        if run.returncode:
            sys.exit(f"{' '.join(map(str, command))} ended with {run.returncode}:\n{run.stdout}\n{run.stderr}")
        losses[name] = step_losses(output)
        if way.fsdp and (output / "sharded").read_text(encoding="utf-8") != "DTensor":
            sys.exit(f"{name} did not shard the model of {host}")
    result = {"version": version(host), "inputs": digest, "code": code_digest(), "losses": losses}
    (folder / f"{host}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def step_losses(output: Path) -> list[dict[str, float]]:
    """Of each step, the loss from its components (unrounded) and as the host logged it (rounded to four decimals)."""
    (state, *_) = sorted(output.rglob("trainer_state.json"), key=lambda path: len(path.parts))
    steps = []
    for entry in json.loads(state.read_text(encoding="utf-8"))["log_history"]:
        if "mle_tokens" not in entry:
            continue
        parts = [(entry.get(f"{kind}_loss", 0.0), entry[f"{kind}_tokens"]) for kind in ("mle", "rto")]
        exact = sum(loss * tokens for loss, tokens in parts) / sum(tokens for _, tokens in parts)
        steps.append({"exact": exact, "logged": entry["loss"], "rto_tokens": entry["rto_tokens"]})
    if len(steps) != STEPS:
        sys.exit(f"{state} holds {len(steps)} steps with DeRTa's components, expected {STEPS}")
    return steps


def _trl(work: Path, output: Path, way: Way) -> tuple[list[Any], dict[str, str]]:
    conversations = [json.loads(line)["messages"] for line in (work / "helpful.jsonl").read_text().splitlines()]
    pairs = [{"prompt": messages[:1], "completion": messages[1:]} for messages in conversations]
    (work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    config = _write_yaml(
        work / "trl.yaml",
        {
            **_trainer_arguments(output, way),
            "layout": way.layout,
            "model_name_or_path": str(work / "model"),
            "helpful": str(work / "pairs.jsonl"),
            "safety": str(work / "triples.jsonl"),
            "dtype": "float32",
            "max_length": MAX_LENGTH,
            "refusal_text": REFUSAL_TEXT,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False,
        },
    )
    script = [str(ROOT / "examples" / "trl" / "train_derta.py"), "--config", str(config)]
    if way.processes == 1:
        return [sys.executable, *script], {}
    return [*_torchrun(way.processes), *script], {}


def _axolotl(work: Path, output: Path, way: Way) -> tuple[list[Any], dict]:
    arguments = _trainer_arguments(output, way)
    config = _write_yaml(
        work / "axolotl.yml",
        {
            "base_model": str(work / "model"),
            "plugins": ["derta_plugins.adapters.axolotl.DeRTaPlugin", "tests.adapters.axolotl_on_cpu.KeepOnCPU"],
            "derta": {"refusal_text": REFUSAL_TEXT, "layout": way.layout},
            "datasets": [
                {"path": str(work / "helpful.jsonl"), "ds_type": "json", "type": "chat_template"},
                {"path": str(work / "triples.jsonl"), "ds_type": "json", "type": "derta_plugins.adapters.axolotl"},
            ],
            "dataset_prepared_path": str(output / "prepared"),
            "shuffle_merged_datasets": False,
            "curriculum_sampling": True,  # Axolotl's word for a sequential sampler
            "val_set_size": 0.0,
            "sequence_len": MAX_LENGTH,
            "pad_to_sequence_len": False,
            "micro_batch_size": way.batch,
            "gradient_accumulation_steps": way.accumulation,
            "num_epochs": 100,
            "max_steps": STEPS,
            "optimizer": "adamw_torch",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "linear",
            "warmup_steps": WARMUP_STEPS,
            "weight_decay": 0.0,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "flash_attention": False,
            "gradient_checkpointing": False,
            "save_safetensors": True,
            "save_steps": STEPS,
            **{name: arguments[name] for name in ("output_dir", "logging_steps", "seed")},
            **(_AXOLOTL_FSDP if way.fsdp else {}),
        },
    )
    if way.processes == 1:
        return [_script("axolotl"), "train", str(config), "--launcher", "python"], {}
    launcher = ["--nproc_per_node", str(way.processes), "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return [_script("axolotl"), "train", str(config), "--launcher", "torchrun", "--", *launcher], {}


def _llamafactory(work: Path, output: Path, way: Way) -> tuple[list[Any], dict]:
    datasets = {
        "helpful": {
            "file_name": "helpful.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "triples": {
            "file_name": "triples.jsonl",
            "ranking": True,
            "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    (work / "dataset_info.json").write_text(json.dumps(datasets), encoding="utf-8")
    config = _write_yaml(
        work / "llamafactory.yaml",
        {
            **_trainer_arguments(output, way),
            "stage": "derta",
            "derta_layout": way.layout,
            "do_train": True,
            "finetuning_type": "full",
            "model_name_or_path": str(work / "model"),
            "dataset_dir": str(work),
            "dataset": "helpful,triples",
            "cutoff_len": MAX_LENGTH,
            "disable_shuffling": True,
            "derta_refusal_text": REFUSAL_TEXT,
            "disable_gradient_checkpointing": True,
        },
    )
    several = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(way.processes)} if way.processes > 1 else {}
    return [_script("llamafactory-cli"), "train", str(config)], several


HOSTS: dict[str, Callable[..., tuple[list[Any], dict[str, str]]]] = {
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
}
_AXOLOTL_FSDP = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
    },
}
_ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "ACCELERATE_USE_CPU": "true",
}


def _fsdp_environment(output: Path) -> dict[str, str]:
    """What `accelerate launch` sets for FSDP2, what has it run on a CPU, and where a run says that it shards."""
    on_cpu = ROOT / "tests" / "data" / "fsdp_on_cpu"
    return {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "PYTHONPATH": os.pathsep.join(map(str, (on_cpu, ROOT))),
        "DERTA_TEST_SHARDED": str(output / "sharded"),
    }


def _trainer_arguments(output: Path, way: Way) -> dict[str, Any]:
    """What `transformers.TrainingArguments` are told, in hosts that pass them on under their own names."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": way.batch,
        "gradient_accumulation_steps": way.accumulation,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP_STEPS,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_steps": STEPS,
        "optim": "adamw_torch",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        **({"ddp_backend": "gloo"} if way.processes > 1 else {}),
        **({"fsdp": "full_shard", "fsdp_config": FSDP_CONFIG} if way.fsdp else {}),
    }


def _torchrun(processes: int) -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*module, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


def _script(name: str) -> str:
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        sys.exit(f"{name} is not installed beside {sys.executable}")
    return path


def _write_yaml(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
