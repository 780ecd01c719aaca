"""What a host reads in its config: each host's own parser, behind one function."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from tests.adapters.conftest import HOST

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def parse(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """
    Keys and values that the host of this environment reads in `config`, its own defaults included; DeRTa's knobs as the
    adapter takes them are under `derta_config`.
    """
    return {"trl": _trl, "axolotl": _axolotl, "llamafactory": _llamafactory}[HOST](config, folder)


def train_script():
    """`examples/trl/train_derta.py` as a module, without running it."""
    spec = importlib.util.spec_from_file_location("train_derta", EXAMPLES / "trl" / "train_derta.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _trl(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    from trl import ModelConfig, TrlParser

    from derta_plugins.adapters.trl import DeRTaSFTConfig

    path = folder / "parsed.yaml"
    path.write_text(yaml.safe_dump(config))
    parser = TrlParser((train_script().DataArguments, DeRTaSFTConfig, ModelConfig))
    data, args, model = parser.parse_args_and_config(["--config", str(path)])
    return {**vars(data), **vars(args), **vars(model), "derta_config": args.derta_config()}


def _axolotl(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from derta_plugins.adapters.axolotl_args import derta_config

    cfg = DictDefault(config)
    prepare_plugins(cfg)
    cfg = validate_config(cfg)
    return {**cfg.to_dict(), "derta_config": derta_config(cfg)}


def _llamafactory(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.train import tuner

    from derta_plugins.adapters import llamafactory_patch

    llamafactory_patch.apply(tuner)
    model, data, training, finetuning, _ = tuner.get_train_args(dict(config))
    return {
        **{name: value for part in (training, model, data, finetuning) for name, value in vars(part).items()},
        "datasets": get_dataset_list(data.dataset, data.dataset_dir),
        "derta_config": finetuning.derta_config(
            seed=training.seed if training.data_seed is None else training.data_seed
        ),
    }
