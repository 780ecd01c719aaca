"""A third party's transform in a training run: its rows are trained, and only its safe ones."""

import pytest
from datasets import Dataset

from derta_plugins import transforms
from derta_plugins.adapters.row_datasets import BuildRows, ResampledRows, TokenizeRecord
from derta_plugins.core.chat import RecordTokenizer
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.plugin_manager import PluginError
from tests.adapters.trl_runs import make_trainer
from tests.conftest import byte_level_bpe, safety_records
from tests.third_party import install

MODULE = """
from dataclasses import replace
from derta_plugins.core.transform import build_rows
from derta_plugins.hookspecs import Transform, hookimpl

def build(triple, config, **options):
    rows = build_rows(triple, config, **options)
    {body}

@hookimpl
def derta_transform():
    return Transform("mine", "for a test", build)
"""
ONLY_SAFETY = {"train_dataset": Dataset.from_list(safety_records(6)), "safety_dataset": None}


@pytest.fixture
def transform(monkeypatch, tmp_path):
    """Installs the transform `mine` with the given last lines."""
    transforms._loaded.cache_clear()
    folder = tmp_path / "site-packages"
    folder.mkdir()
    yield lambda body: install(
        monkeypatch, folder, {"mine": "my_transform"}, {"my_transform.py": MODULE.format(body=body)}
    )
    transforms._loaded.cache_clear()


@pytest.mark.parametrize(("resample", "is_streaming"), [(False, False), (True, False), (False, True)])
def test_the_rows_of_a_transform_are_trained(tmp_path, resample, is_streaming):
    records = ONLY_SAFETY["train_dataset"]
    options = {**ONLY_SAFETY, "train_dataset": records.to_iterable_dataset() if is_streaming else records}
    knobs = {"transform": "everything", "resample_each_epoch": resample, "max_steps": 2}
    trainer = make_trainer(tmp_path, trainer_options=options, **knobs)
    rows = list(trainer.train_dataset)
    assert len(rows) == 6
    assert all(any(row["rto_mask"]) for row in rows), "`everything` leaves the MLE rows out"
    trainer.train()


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_transform_that_trains_harmful_text_ends_the_run_before_a_step(tmp_path, transform, on_bad_record):
    transform("return [replace(rows[1], labels=list(rows[1].input_ids), rto_mask=[False] * len(rows[1].labels))]")
    with pytest.raises(PluginError, match=r"The transform 'mine' of third-party 1\.0 .* UnsafeRowError: Row 0 trains"):
        make_trainer(tmp_path, trainer_options=ONLY_SAFETY, transform="mine", on_bad_record=on_bad_record)


@pytest.mark.parametrize("name", ["everythin", "working", "absent_host"])
def test_a_transform_that_cannot_be_had_ends_the_run(tmp_path, name):
    with pytest.raises(PluginError, match=rf"'{name}'"):
        make_trainer(tmp_path, trainer_options=ONLY_SAFETY, transform=name)


def test_authors_rows_are_not_trained_by_another_transform_than_asked_for(tmp_path):
    rows = Dataset.from_list([{"prefix": "[INST] q [/INST]", "text": " Sorry , no .", "safe": "false"}])
    options = {"train_dataset": rows, "safety_dataset": None}
    with pytest.raises(ConfigError, match="transform='everything' needs triples"):
        make_trainer(tmp_path, trainer_options=options, transform="everything", refusal_text="Sorry")


def test_a_transform_must_give_as_many_rows_in_every_epoch(tmp_path, transform):
    transform("return rows[: 2 - options['epoch'] % 2]")
    knobs = {"transform": "mine", "resample_each_epoch": True}
    rows = make_trainer(tmp_path, trainer_options=ONLY_SAFETY, **knobs).train_dataset
    assert isinstance(rows, ResampledRows)
    assert len(rows) == 12
    rows.set_epoch(1)
    with pytest.raises(PluginError, match="as many rows in every epoch, gave record 0 2 in epoch 0 and 1 in epoch 1"):
        rows[0]


def test_a_changed_transform_is_another_cache_key(transform, tmp_path):
    from datasets.fingerprint import Hasher

    transform("return rows")
    config, tokenizer = DeRTaConfig(transform="mine"), byte_level_bpe()

    def keys():
        return [
            Hasher.hash(BuildRows(config, 1, 9)),
            Hasher.hash(TokenizeRecord(RecordTokenizer.for_config(tokenizer, config), config, 9)),
        ]

    before = keys()
    assert keys() == before
    module = tmp_path / "site-packages" / "my_transform.py"
    module.write_text(module.read_text() + "\n")
    assert all(new != old for new, old in zip(keys(), before, strict=True))
