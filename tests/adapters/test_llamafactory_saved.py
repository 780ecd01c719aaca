"""`tokenized_path`: rows that a run has saved are loaded by the same run alone."""

import json

import pytest
from llamafactory.data import loader

from derta_plugins.core.config import ConfigError
from tests.adapters.llamafactory_rows import arguments_of, load
from tests.adapters.llamafactory_runs import make_folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.fixture
def saved(folder):
    """Where a run has saved its rows, and the rows."""
    path = folder / "rows"
    return path, load(folder, tokenized_path=str(path))["train_dataset"]


def test_saved_rows_are_loaded_by_the_same_run(folder, saved):
    path, rows = saved
    (folder / "triples.json").unlink()  # they are not made again
    assert list(load(folder, tokenized_path=str(path))["train_dataset"]) == list(rows)


OTHER_SETTINGS = {
    "a knob": ({"derta_rto_keep_ratio": 0.5}, "derta_rto_keep_ratio"),
    "a seed": ({"seed": 4}, "derta_seed"),
    "a length": ({"cutoff_len": 255}, "cutoff_len"),
    "a system text": ({"default_system": ""}, "default_system"),
    "trained prompts": ({"train_on_prompt": True}, "train_on_prompt"),
    "a template": ({"template": "qwen"}, "template"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_saved_rows_of_other_settings_are_refused(folder, saved, name):
    options, named = OTHER_SETTINGS[name]
    with pytest.raises(ConfigError, match=f"holds rows that were made with other settings: .*{named}.*Delete it"):
        load(folder, tokenized_path=str(saved[0]), **options)


@pytest.mark.parametrize("key", ["code", "tokenizer", "transform"])
def test_saved_rows_of_another_release_or_tokenizer_are_refused(folder, saved, key):
    note = saved[0] / "derta.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), key: "other"}))
    with pytest.raises(ConfigError, match=f"made with other settings: {key}. Delete it"):
        load(folder, tokenized_path=str(saved[0]))


def test_rows_that_another_stage_saved_are_refused(folder):
    path = str(folder / "rows")
    arguments, _ = arguments_of(folder, stage="sft", dataset="helpful", tokenized_path=path)
    loader.get_dataset(*arguments)
    with pytest.raises(ConfigError, match="was not saved by `stage: derta`, or not to the end"):
        load(folder, tokenized_path=path)
