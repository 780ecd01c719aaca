"""Rows of LLaMA-Factory's datasets: triples beside ordinary records, in which order, mixed, cut and cached."""

import logging
from dataclasses import replace

import pytest
from llamafactory.data.formatter import StringFormatter
from llamafactory.data.template import TEMPLATES

from derta_plugins.adapters import llamafactory_data
from derta_plugins.core.config import ConfigError, DeRTaConfig
from tests.adapters.llamafactory_rows import STREAMING, core, load, ordinary_rows, triples_of
from tests.adapters.llamafactory_runs import HELPFUL, RANKING, TRIPLES, add_dataset, make_folder
from tests.conftest import byte_level_bpe, safety_records

COLUMNS = {"input_ids", "attention_mask", "labels", "rto_mask", "images", "videos", "audios"}


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """For tests that only read it."""
    return make_folder(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def folder(tmp_path):
    """For tests that add datasets."""
    return make_folder(tmp_path)


def test_triples_become_the_rows_of_core_and_ordinary_records_those_of_the_host(shared_folder):
    module = load(shared_folder)
    assert set(module) == {"train_dataset"}
    rows = module["train_dataset"]
    assert set(rows.column_names) == COLUMNS
    ordinary, triples = list(rows)[:HELPFUL], list(rows)[HELPFUL:]
    assert [{name: row[name] for name in ("input_ids", "labels")} for row in ordinary] == ordinary_rows()
    assert all(row["rto_mask"] == [False] * len(row["input_ids"]) for row in ordinary)
    assert triples_of(triples) == core(safety_records(TRIPLES))
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in rows)


KNOBS = {
    "as is": {},
    "words": {"prefix_unit": "word", "num_prefixes": 3, "zero_prefix_ratio": None},
    "kept": {"rto_keep_ratio": 0.2, "rto_ratio": 0.5, "seed": 9},
    "no RTO": {"method": "recaug"},
}


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("template", ["chatml", None], ids=["registered", "the tokenizer's own"])
def test_knobs_and_length_reach_the_rows(shared_folder, name, template):
    # a key that is None is one that the config leaves out
    knobs = {f"derta_{knob}": "none" if value is None else value for knob, value in KNOBS[name].items()}
    module = load(shared_folder, dataset="triples", template=template, cutoff_len=60, **knobs)
    expected = core(safety_records(TRIPLES), DeRTaConfig(**{"seed": 3, **KNOBS[name]}), max_length=60)
    assert triples_of(module["train_dataset"]) == expected
    assert max(len(row[0]) for row in expected) <= 60


@pytest.mark.parametrize("text", ["Sorry", "auto"])
def test_the_target_is_the_token_that_an_answer_begins_with_in_the_template(shared_folder, monkeypatch, text):
    """Not in the tokenizer's chat template, which the host leaves as it is unless it is told to replace it."""
    slots = StringFormatter(slots=[" {{content}}<|im_end|>"])
    spaced = replace(TEMPLATES["chatml"], format_assistant=slots, replace_jinja_template=False)
    monkeypatch.setitem(TEMPLATES, "spaced", spaced)
    rows = load(shared_folder, dataset="triples", template="spaced", derta_refusal_text=text)["train_dataset"]
    targets = {label for row in rows for label, is_rto in zip(row["labels"], row["rto_mask"], strict=True) if is_rto}
    assert targets == {byte_level_bpe()(" Sorry")["input_ids"][0]}


def test_a_target_that_few_refusals_begin_with_is_warned_of(shared_folder, caplog):
    with caplog.at_level(logging.WARNING):
        load(shared_folder, derta_refusal_text="Step")
    assert "Only 0 % of the safe responses begin with the RTO target 'Step'" in caplog.text


def test_another_knob_is_never_served_the_rows_of_a_cache(shared_folder):
    seen = [load(shared_folder, derta_rto_keep_ratio=share)["train_dataset"]["labels"][:] for share in (1.0, 0.3, 1.0)]
    assert seen[0] == seen[2] != seen[1]


def test_rows_of_another_release_are_never_taken_from_a_cache(shared_folder, monkeypatch):
    """Neither what is tokenised nor the rows; with ordinary records alone there are only the rows."""
    tokenized, map_tokenized = [], llamafactory_data.map_tokenized

    def spying(*args, **kwargs):
        tokenized.append(map_tokenized(*args, **kwargs))
        return tokenized[-1]

    def fingerprints():
        rows = load(shared_folder, eval_dataset="helpful")["eval_dataset"]
        return tokenized[-1]._fingerprint, rows._fingerprint

    monkeypatch.setattr(llamafactory_data, "map_tokenized", spying)
    before = fingerprints()
    assert fingerprints() == before
    monkeypatch.setattr(llamafactory_data, "_CODE", "another")
    assert not set(fingerprints()) & set(before)


def test_the_hosts_options_for_maps_reach_ours(shared_folder, monkeypatch):
    seen, map_tokenized = [], llamafactory_data.map_tokenized

    def spying(dataset, tokenize, *, skipped, **options):
        seen.append(options)
        return map_tokenized(dataset, tokenize, skipped=skipped)

    monkeypatch.setattr(llamafactory_data, "map_tokenized", spying)
    load(shared_folder, overwrite_cache=True, preprocessing_num_workers=2)
    load(shared_folder)
    assert seen == [
        {"num_proc": 2, "load_from_cache_file": False},
        {"num_proc": None, "load_from_cache_file": True},
    ]


def test_the_seed_of_the_draws_is_the_keys_or_the_datas_or_the_runs(shared_folder):
    def rows(**seeds):
        return triples_of(load(shared_folder, **seeds)["train_dataset"])

    assert rows(seed=3) == rows(seed=5, data_seed=3) == rows(seed=5, data_seed=6, derta_seed=3) != rows(seed=5)


def test_rows_stand_in_the_merged_order(shared_folder):
    """One ordinary record, one triple (two rows), and so on; the shorter set ends it."""
    rows = load(shared_folder, mix_strategy="interleave_under")["train_dataset"]
    kinds = ["rto" if any(row["rto_mask"]) else "mle" for row in rows]
    assert kinds[: 3 * TRIPLES] == ["mle", "mle", "rto"] * TRIPLES
    assert [row["input_ids"] for row in rows][: 3 * TRIPLES : 3] == [
        row["input_ids"] for row in ordinary_rows()[:TRIPLES]
    ]


def test_batches_and_workers_of_the_map_change_nothing(shared_folder):
    plain = load(shared_folder)["train_dataset"]
    for options in ({"preprocessing_batch_size": 3}, {"preprocessing_num_workers": 2}, {"overwrite_cache": True}):
        other = load(shared_folder, **options)["train_dataset"]
        assert list(other) == list(plain), options


def test_samples_are_limited_as_the_host_does(shared_folder):
    rows = load(shared_folder, max_samples=2)["train_dataset"]
    assert [row["input_ids"] for row in rows][:2] == [row["input_ids"] for row in ordinary_rows()[:2]]
    assert triples_of(rows) == core(safety_records(TRIPLES)[:2])


def test_a_validation_share_is_cut_off_the_records(shared_folder):
    module = load(shared_folder, dataset="triples", val_size=2)
    parts = [triples_of(module[name]) for name in ("train_dataset", "eval_dataset")]
    assert list(map(len, parts)) == [2 * (TRIPLES - 2), 2 * 2]
    assert sorted(parts[0] + parts[1]) == sorted(core(safety_records(TRIPLES)))


@pytest.mark.parametrize("each", [True, False])
def test_evaluation_sets_have_rows_and_the_target_of_the_training_set(folder, each):
    others = [{**record, "chosen": "First, do this."} for record in safety_records(2 * TRIPLES)]
    add_dataset(folder, "others", others, **RANKING)
    module = load(folder, eval_dataset="helpful,others", eval_on_each_dataset=each)
    evaluated = module["eval_dataset"]
    rows = [row for part in ("helpful", "others") for row in evaluated[part]] if each else list(evaluated)
    assert triples_of(rows) == core(others), "whose target is Sorry"


def test_evaluation_alone_has_a_target_of_its_own_or_needs_none(folder):
    module = load(folder, do_train=False, do_eval=True, dataset=None, eval_dataset="triples")
    assert triples_of(module["eval_dataset"]) == core(safety_records(TRIPLES))
    module = load(folder, do_train=False, do_eval=True, dataset=None, eval_dataset="helpful")
    assert [row["input_ids"] for row in module["eval_dataset"]] == [row["input_ids"] for row in ordinary_rows()]


@pytest.mark.parametrize("names", ["helpful,triples", "triples,helpful", "triples"])
@pytest.mark.parametrize("mix", ["concat", "interleave_over"])
def test_streams_have_the_same_rows(shared_folder, names, mix):
    options = {"dataset": names, "mix_strategy": mix, "derta_rto_turns": "all", **STREAMING}
    rows = list(load(shared_folder, **options)["train_dataset"])
    assert all(set(row) == COLUMNS for row in rows), "no column of ours is left for the model"
    assert {str(row) for row in triples_of(rows)} == {str(row) for row in core(safety_records(TRIPLES))}
    if mix == "concat" or names == "triples":
        assert len(triples_of(rows)) == 2 * TRIPLES
    else:
        assert len(triples_of(rows)) > 2 * TRIPLES, "the shorter set begins again"


def test_a_processor_is_refused(shared_folder):
    with pytest.raises(ConfigError, match="trains text only, and this model has a processor"):
        load(shared_folder, processor=object())
