"""The patch of LLaMA-Factory: all of it or nothing, undoable, and nothing of it in other stages."""

import functools
import logging
import sys

import pytest
from llamafactory.data import loader
from llamafactory.hparams import parser
from llamafactory.train import tuner
from llamafactory.train.sft import run_sft as host_run_sft
from llamafactory.train.sft import workflow

from derta_plugins.adapters import llamafactory_patch as patch
from derta_plugins.adapters.llamafactory_args import DeRTaFinetuningArguments
from tests.adapters.llamafactory_runs import logged, make_config, make_folder, train


@pytest.fixture(autouse=True)
def _host_as_it_was():
    was_applied = patch.is_applied()
    yield
    (patch.apply if was_applied else lambda module: patch.undo())(tuner)


@pytest.fixture
def untouched():
    """The host without us."""
    patch.undo()
    assert tuner.run_sft is host_run_sft
    assert parser._TRAIN_ARGS.count(parser.FinetuningArguments) == 1
    return list(parser._TRAIN_ARGS)


def test_apply_undo_and_apply_twice(untouched):
    held = parser._TRAIN_ARGS
    assert not patch.is_applied()
    patch.apply(tuner)
    applied = tuner.run_sft
    patch.apply(tuner)
    assert patch.is_applied()
    assert tuner.run_sft is applied, "a second time changes nothing"
    assert parser._TRAIN_ARGS is held, "the host's functions hold this list"
    replaced = [mine for mine, theirs in zip(parser._TRAIN_ARGS, untouched, strict=True) if mine is not theirs]
    assert replaced == [DeRTaFinetuningArguments]
    assert tuner.run_sft.__name__ == "run_sft"
    patch.undo()
    patch.undo()
    assert not patch.is_applied()
    assert parser._TRAIN_ARGS == untouched
    assert tuner.run_sft is host_run_sft


def test_a_dispatcher_that_was_loaded_anew_is_patched_again(untouched):
    patch.apply(tuner)
    tuner.run_sft = host_run_sft
    patch.apply(tuner)
    assert patch.is_applied()
    assert tuner.run_sft is not host_run_sft
    assert parser._TRAIN_ARGS.count(DeRTaFinetuningArguments) == 1


def test_this_host_has_every_patch_point():
    assert patch.missing_points() == []


def as_version(number):
    return lambda monkeypatch: monkeypatch.setattr(patch, "version", lambda name: number)


def without(module, name):
    return lambda monkeypatch: monkeypatch.delattr(module, name)


def without_stage(monkeypatch):
    fields = {name: item for name, item in parser.FinetuningArguments.__dataclass_fields__.items() if name != "stage"}
    monkeypatch.setattr(parser.FinetuningArguments, "__dataclass_fields__", fields)


UNFIT = {
    "newer": (as_version("0.10.0"), "llamafactory 0.10.0 is installed, which is not supported"),
    "older": (as_version("0.9.4"), "llamafactory 0.9.4 is installed, which is not supported"),
    "a version before ours": (as_version("0.9.5.dev0"), "llamafactory 0.9.5.dev0 is installed"),
    "no workflow": (without(workflow, "get_dataset"), "llamafactory.train.sft.workflow.get_dataset is missing"),
    "no alignment": (without(loader, "align_dataset"), "llamafactory.data.loader.align_dataset is missing"),
    "other arguments": (
        lambda monkeypatch: monkeypatch.setattr(parser, "_TRAIN_ARGS", [parser.ModelArguments]),
        "_TRAIN_ARGS does not hold FinetuningArguments",
    ),
    "no stage": (without_stage, "FinetuningArguments.stage is missing"),
    "our arguments do not import": (
        lambda monkeypatch: monkeypatch.setitem(sys.modules, "derta_plugins.adapters.llamafactory_args", None),
        "derta_plugins.adapters.llamafactory_args does not import",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_host_that_does_not_fit_is_left_as_it_was_and_refuses_the_stage(
    name, untouched, monkeypatch, caplog, tmp_path
):
    break_it, message = UNFIT[name]
    break_it(monkeypatch)
    before = list(parser._TRAIN_ARGS)
    with caplog.at_level(logging.WARNING):
        patch.apply(tuner)
    (record,) = [record for record in caplog.records if record.name == patch.__name__]
    assert message in record.getMessage()
    assert "Supported: llamafactory" in record.getMessage()
    assert not patch.is_applied()
    assert tuner.run_sft is host_run_sft
    assert before == parser._TRAIN_ARGS
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Unknown task: derta"):
        tuner.run_exp(make_config(tmp_path))
    with pytest.raises(ValueError, match="derta_rto_weight"):
        tuner.run_exp(make_config(tmp_path, derta_rto_weight=0.5))
    assert not (tmp_path / "out").exists()


def test_even_where_unknown_keys_are_allowed_the_host_refuses_the_stage(untouched, monkeypatch, tmp_path):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    with pytest.raises(ValueError, match="Unknown task: derta"):
        tuner.run_exp(make_config(tmp_path, derta_rto_weight=0.5))


def test_megatron_does_not_know_the_stage(monkeypatch, tmp_path):
    """With `USE_MCA` the host parses argument classes of another list, and has another trainer for each stage."""
    patch.apply(tuner)
    theirs = [parser.FinetuningArguments if kind is DeRTaFinetuningArguments else kind for kind in parser._TRAIN_ARGS]
    monkeypatch.setattr(parser, "_TRAIN_MCA_ARGS", theirs)
    monkeypatch.setenv("USE_MCA", "1")
    with pytest.raises(ValueError, match="Unknown task: derta"):
        tuner.run_exp(make_config(tmp_path))
    with pytest.raises(ValueError, match="derta_rto_weight"):
        tuner.run_exp(make_config(tmp_path, derta_rto_weight=0.5))


def test_a_stage_that_does_not_load_ends_the_run(monkeypatch, tmp_path):
    patch.apply(tuner)
    monkeypatch.setitem(sys.modules, "derta_plugins.adapters.llamafactory", None)
    with pytest.raises(RuntimeError, match=r"`stage: derta` was asked for, but .* no step was taken. Reinstall"):
        tuner.run_exp(make_config(tmp_path))
    assert not (tmp_path / "out").exists()


def test_another_stage_is_the_same_run_with_and_without_us(untouched, tmp_path):
    make_folder(tmp_path)
    run = functools.partial(train, tmp_path, stage="sft", dataset="helpful")
    without_us = run(output_dir=str(tmp_path / "without"))
    patch.apply(tuner)
    with_us = run(output_dir=str(tmp_path / "with"))
    assert logged(with_us, "loss") == logged(without_us, "loss")
    assert len(logged(with_us, "loss")) == 3
    assert {key for entry in with_us for key in entry} == {key for entry in without_us for key in entry}
    with pytest.raises(ValueError, match="not applicable in the current training stage"):
        run(dataset="triples")


def test_a_replacement_ends_with_the_run_that_it_is_for():
    before = workflow.get_dataset, workflow.CustomSeq2SeqTrainer
    seen = []

    def failing_run():
        with patch.replaced(workflow, get_dataset=1, CustomSeq2SeqTrainer=2):
            seen.extend((workflow.get_dataset, workflow.CustomSeq2SeqTrainer))
            raise KeyError

    with pytest.raises(KeyError):
        failing_run()
    assert seen == [1, 2]
    assert (workflow.get_dataset, workflow.CustomSeq2SeqTrainer) == before
