"""What DeRTa's rows depend on is in the key of Axolotl's prepared datasets."""

import os

import pytest
from axolotl.utils.data import shared
from axolotl.utils.schemas.datasets import SFTDataset
from datasets import Dataset

from derta_plugins.adapters import axolotl_cache, axolotl_rows
from derta_plugins.adapters.axolotl_cache import entry_mark, mark_entries
from derta_plugins.core.config import DeRTaConfig
from tests.adapters.axolotl_configs import entry, make_config, make_folder, our_plugin, own_plugins, validated
from tests.adapters.test_axolotl_args import EVERY_KNOB
from tests.conftest import safety_records


@pytest.fixture(autouse=True)
def _own_plugins():
    with own_plugins():
        yield


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def mark(folder, *, settings=None, split="datasets", **changes):
    return entry_mark(make_config(folder, **changes), entry(folder, **(settings or {})), DeRTaConfig(), split)


def host_key(cfg):
    """As the host's `_load_tokenized_prepared_datasets` computes it."""
    return shared.generate_dataset_hash_from_config(cfg, cfg.datasets, "tokenizer")


@pytest.mark.parametrize("name", [*EVERY_KNOB])
def test_every_knob_changes_the_mark_and_the_hosts_key(folder, name):
    plain, changed = (validated(make_config(folder, derta=block)) for block in ({}, {name: EVERY_KNOB[name]}))
    assert plain.datasets[0]["conversation"] != changed.datasets[0]["conversation"]
    assert host_key(plain) != host_key(changed)
    assert host_key(plain) == host_key(validated(make_config(folder, derta={}))), "the same again is the same"


@pytest.mark.parametrize("changes", [{"sequence_len": 64}, {"split": "test_datasets"}], ids=lambda one: next(iter(one)))
def test_lengths_and_split_change_it(folder, changes):
    assert mark(folder, **changes) != mark(folder)


def test_the_hosts_seed_changes_it(folder):
    keys = {host_key(validated(make_config(folder, derta={}, seed=seed))) for seed in (1, 2, None)}
    assert len(keys) == 3
    own = {host_key(validated(make_config(folder, derta={"seed": 5}, seed=seed))) for seed in (1, 2)}
    assert len(own) == 1, "which is not DeRTa's if the block has one"


def test_the_length_is_that_of_the_split(folder):
    lengths = {"sequence_len": 128, "eval_sequence_len": 32}
    assert axolotl_rows.max_length(lengths, "datasets") == 128
    assert axolotl_rows.max_length(lengths, "test_datasets") == 32
    assert axolotl_rows.max_length({"sequence_len": 128}, "test_datasets") == 128
    assert mark(folder, eval_sequence_len=32) == mark(folder)
    assert mark(folder, eval_sequence_len=32, split="test_datasets") != mark(folder, split="test_datasets")


@pytest.mark.parametrize(
    "changes",
    [{"output_dir": "elsewhere"}, {"learning_rate": 0.5}, {"num_epochs": 9}, {"micro_batch_size": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_rows_do_not_depend_on_leaves_it(folder, changes):
    assert mark(folder, **changes) == mark(folder)


def test_the_same_name_size_and_time_with_other_records_changes_it(folder):
    path, before = folder / "triples.jsonl", mark(folder)
    stat, text = path.stat(), path.read_text(encoding="utf-8")
    path.write_text(text.replace("moon", "noon"), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert mark(folder) != before
    path.write_text(text, encoding="utf-8")
    assert mark(folder) == before


def records_elsewhere(folder):
    (folder / "records").mkdir()
    Dataset.from_list(safety_records(2)).to_json(folder / "records" / "part.jsonl")
    return folder / "records" / "part.jsonl"


PLACES = {
    "a folder": lambda folder: {"path": str(folder / "records")},
    "a pattern": lambda folder: {"path": str(folder / "records" / "*.jsonl")},
    "data_files": lambda folder: {"path": "json", "data_files": str(folder / "records" / "part.jsonl")},
    "a list of data_files": lambda folder: {"path": "json", "data_files": [str(folder / "records" / "part.jsonl")]},
}


@pytest.mark.parametrize("name", PLACES)
def test_records_are_found_where_the_host_finds_them(folder, name):
    part = records_elsewhere(folder)
    before = mark(folder, settings=PLACES[name](folder))
    part.write_text(part.read_text(encoding="utf-8").replace("moon", "noon"), encoding="utf-8")
    assert mark(folder, settings=PLACES[name](folder)) != before


TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
FILES_BESIDE = ["added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "my.jinja"]


@pytest.mark.parametrize("name", [*TOKENIZER_FILES, *FILES_BESIDE])
def test_every_file_of_a_tokenizer_changes_it(folder, name):
    before = mark(folder)
    with (folder / "my-model" / name).open("a", encoding="utf-8") as stream:
        stream.write(" ")
    assert mark(folder) != before


@pytest.mark.parametrize(
    "changes",
    [{"tokens": ["<tool>"]}, {"tokenizer_type": "LlamaTokenizer"}, {"tokenizer_use_fast": False}],
    ids=lambda one: next(iter(one)),
)
def test_settings_of_the_tokenizer_change_it(folder, changes):
    assert mark(folder, **changes) != mark(folder)


def test_weights_do_not_change_it(folder):
    before = mark(folder)
    (folder / "my-model" / "model.safetensors").write_bytes(b"weights")
    assert mark(folder) == before


@pytest.mark.parametrize("key", ["tokenizer_config", "base_model_config"])
def test_a_tokenizer_of_another_folder_is_the_one_that_counts(folder, key):
    other = make_folder(folder / "other") / "my-model"
    before = mark(folder, **{key: str(other)})
    (other / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert mark(folder, **{key: str(other)}) != before


@pytest.mark.parametrize("of_entry", [True, False])
def test_a_template_file_changes_it_by_what_it_says(folder, of_entry):
    template = folder / "mine.jinja"
    template.write_text("one", encoding="utf-8")
    key = {"chat_template_jinja": str(template)}
    options = {"settings": key} if of_entry else key
    before = mark(folder, **options)
    template.write_text("two", encoding="utf-8")
    assert mark(folder, **options) != before


def test_a_template_in_the_config_is_no_file(folder):
    for template in ("{{ messages }}\n", "x" * 2000):
        assert mark(folder, chat_template_jinja=template) == mark(folder)


def test_the_code_that_makes_rows_changes_it(folder, monkeypatch):
    before = mark(folder)
    with monkeypatch.context() as patched:
        patched.setattr(axolotl_cache.BuildRows, "code", "another")
        assert mark(folder) != before
    with monkeypatch.context() as patched:
        patched.setattr(axolotl_cache, "transform_code", lambda config: "another release of a plugin")
        assert mark(folder) != before
    source = folder / "axolotl_rows.py"
    source.write_text("# another release", encoding="utf-8")
    monkeypatch.setattr(axolotl_cache, "_SOURCES", (source,))
    assert mark(folder) != before


def test_both_splits_are_marked_and_nothing_else(folder):
    ordinary = entry(folder, "helpful", type="chat_template")
    cfg = make_config(
        folder, datasets=[ordinary, entry(folder)], test_datasets=[entry(folder), ordinary], val_set_size=None
    )
    mark_entries(cfg, DeRTaConfig())
    marks = [one.get("conversation") for split in ("datasets", "test_datasets") for one in cfg[split]]
    assert marks[0] is marks[3] is None
    assert marks[1].startswith("derta-datasets-")
    assert marks[2].startswith("derta-test_datasets-")


def test_a_mark_of_the_users_is_replaced(folder):
    cfg = validated(make_config(folder, datasets=[entry(folder, conversation="chatml")]))
    assert cfg.datasets[0].conversation == entry_mark(cfg, entry(folder), our_plugin().config, "datasets")


def test_entries_that_the_host_made_objects_of_are_marked_too(folder):
    """Its validation does that to the config it is given, which may be registered again."""
    cfg = make_config(folder, datasets=[entry(folder)])
    expected = validated(cfg).datasets[0].conversation
    cfg.datasets[0].conversation = None
    assert isinstance(cfg.datasets[0], SFTDataset)
    mark_entries(cfg, DeRTaConfig(seed=1))
    assert cfg.datasets[0].conversation == expected


def test_a_host_that_does_not_key_by_it_is_refused(folder, monkeypatch):
    fields = tuple(name for name in shared.DATASET_HASH_BASE_DATASET_FIELDS if name != "conversation")
    assert len(fields) == len(shared.DATASET_HASH_BASE_DATASET_FIELDS) - 1
    monkeypatch.setattr(shared, "DATASET_HASH_BASE_DATASET_FIELDS", fields)
    with pytest.raises(RuntimeError, match="does not key its prepared datasets by `conversation`"):
        validated(make_config(folder))
