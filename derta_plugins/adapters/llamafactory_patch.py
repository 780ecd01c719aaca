"""
How `stage: derta` gets into LLaMA-Factory, which offers no hook: two names replaced in memory, nothing on disk.

Its argument classes are widened by ours, and `run_sft` of its dispatcher hands a `stage: derta` run over. All other
stages run the host's own functions. On a host that lacks a patch point nothing is replaced, and the host itself
refuses `stage: derta`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

HOST = "llamafactory"
OLDEST_TESTED = NEWEST_TESTED = "0.9.5"
SUPPORTED = SpecifierSet(">=0.9.5,<0.10")

_PARSER, _TUNER = "llamafactory.hparams.parser", "llamafactory.train.tuner"
_ARGUMENTS, _STAGE = "derta_plugins.adapters.llamafactory_args", "derta_plugins.adapters.llamafactory"
# What `apply` replaces, and what a run replaces or calls (see `llamafactory.py`, `llamafactory_data.py`).
_PATCH_POINTS: dict[str, tuple[str, ...]] = {
    _PARSER: ("FinetuningArguments", "_TRAIN_ARGS", "get_train_args"),
    _TUNER: ("run_sft", "_training_function"),
    "llamafactory.train.sft.workflow": ("run_sft", "CustomSeq2SeqTrainer", "get_dataset"),
    "llamafactory.data.loader": (
        "get_dataset",
        "get_dataset_list",
        "align_dataset",
        "SupervisedDatasetProcessor",
        "_get_dataset_processor",
        "_get_preprocessed_dataset",
    ),
    "llamafactory.data.converter": ("get_dataset_converter",),
}


def apply(module: ModuleType) -> None:
    """
    Put `stage: derta` into the host. Does nothing if it is there; leaves a host that lacks a patch point as it is.

    Args:
        module: `llamafactory.train.tuner`, loaded.
    """
    if is_applied():
        return
    missing = missing_points()
    try:
        ours = None if missing else importlib.import_module(_ARGUMENTS).DeRTaFinetuningArguments
    except Exception as error:  # half installed, or the host's arguments cannot be widened: the host goes on as it is
        missing = [f"{_ARGUMENTS} does not import ({type(error).__name__}: {error})"]
    if missing:
        logger.warning(
            "DeRTa is not active in LLaMA-Factory, and `stage: derta` will be refused: %s. Supported: llamafactory%s.",
            "; ".join(missing),
            SUPPORTED,
        )
        return
    parser = importlib.import_module(_PARSER)
    dispatch = _dispatch(module.run_sft)
    if _ours(parser._TRAIN_ARGS) is None:  # else the dispatcher alone was loaded anew
        _swap(parser._TRAIN_ARGS, parser.FinetuningArguments, ours)
    module.run_sft = dispatch


def undo() -> None:
    """Put the host's own functions back. Does nothing if they are there."""
    tuner, parser = sys.modules.get(_TUNER), sys.modules.get(_PARSER)
    if is_applied():
        tuner.run_sft = tuner.run_sft.derta_replaces
        _swap(parser._TRAIN_ARGS, _ours(parser._TRAIN_ARGS), parser.FinetuningArguments)


def is_applied() -> bool:
    """Whether this process's LLaMA-Factory knows `stage: derta`. Imports nothing."""
    tuner, parser = sys.modules.get(_TUNER), sys.modules.get(_PARSER)
    if tuner is None or parser is None:
        return False
    return hasattr(getattr(tuner, "run_sft", None), "derta_replaces") and _ours(parser._TRAIN_ARGS) is not None


def missing_points() -> list[str]:
    """What the installed host lacks for `apply`, as names or sentences; empty if nothing. Imports the host."""
    try:
        installed = version(HOST)
    except PackageNotFoundError:
        return ["llamafactory is not installed"]
    if installed not in SUPPORTED:
        return [f"llamafactory {installed} is installed, which is not supported"]
    missing = []
    for name, attributes in _PATCH_POINTS.items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} does not import ({error})")
        else:
            missing += [f"{name}.{attribute} is missing" for attribute in attributes if not hasattr(module, attribute)]
    return missing or _unfit_arguments()


@contextmanager
def replaced(module: ModuleType, **replacements: Any) -> Iterator[None]:
    """Names of a host module replaced for one run, and put back also if it fails."""
    originals = {name: getattr(module, name) for name in replacements}
    try:
        for name, value in replacements.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(module, name, value)


def _unfit_arguments() -> list[str]:
    """What keeps the host's argument classes from being widened."""
    parser = importlib.import_module(_PARSER)
    if parser.FinetuningArguments not in parser._TRAIN_ARGS and _ours(parser._TRAIN_ARGS) is None:
        return [f"{_PARSER}._TRAIN_ARGS does not hold FinetuningArguments"]
    fields = getattr(parser.FinetuningArguments, "__dataclass_fields__", {})
    return [] if "stage" in fields else ["FinetuningArguments.stage is missing"]


def _dispatch(host_run_sft: Callable[..., None]) -> Callable[..., None]:
    """The host's `run_sft`, which hands the runs that are ours over."""

    @functools.wraps(host_run_sft)
    def run_sft(model_args, data_args, training_args, finetuning_args, *args, **kwargs):
        run = host_run_sft
        if getattr(finetuning_args, "is_derta", False):
            run = _load_stage()
        return run(model_args, data_args, training_args, finetuning_args, *args, **kwargs)

    run_sft.derta_replaces = host_run_sft
    return run_sft


def _load_stage() -> Callable[..., None]:
    """By name, so that this module stays light: it is loaded in every LLaMA-Factory process."""
    try:
        return importlib.import_module(_STAGE).run_derta
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"`stage: derta` was asked for, but {_STAGE} cannot be loaded ({error}); no step was taken. Reinstall: "
            "pip install --force-reinstall 'derta-plugins[llamafactory]'"
        ) from error


def _ours(kinds: list[Any]) -> Any:
    return next((kind for kind in kinds if hasattr(kind, "is_derta")), None)


def _swap(kinds: list[Any], old: Any, new: Any) -> None:
    """In place: the host's functions hold the list itself."""
    kinds[kinds.index(old)] = new
