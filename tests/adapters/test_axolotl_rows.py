"""Rows that Axolotl's own loading makes of safety records, and records that it must not be given as something else."""

import copy

import pytest
from axolotl.utils.data.sft import _load_and_process_single_dataset
from axolotl.utils.data.shared import merge_datasets
from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.dict import DictDefault
from datasets import Dataset

from derta_plugins.adapters.axolotl import load
from derta_plugins.adapters.axolotl_names import PLUGIN
from derta_plugins.adapters.axolotl_rows import _HOST_FEATURES, check_entries, max_length
from derta_plugins.core.chat import RecordTokenizer
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.records import BadRecordError, parse_record
from derta_plugins.core.refusal_token import resolve_refusal_token_id
from derta_plugins.core.transform import build_rows
from tests.adapters.axolotl_configs import TRIPLES, entry, make_config, make_folder, our_plugin, own_plugins, validated
from tests.conftest import HARMFUL, SAFE, byte_level_bpe, safety_records

LLAMA = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(autouse=True)
def _own_plugins():
    with own_plugins():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With records that are named in the tests."""
    folder = make_folder(tmp_path_factory.mktemp("rows"))
    conversational = safety_records(TRIPLES, conversational=True)
    authors = {"instruction": "How do I paint ?", "output": HARMFUL, "safe_response": SAFE}
    pku = {"prompt": "How do I paint ?", "response_0": HARMFUL, "response_1": SAFE}
    text = [{"instruction": "Say hello .", "input": "", "output": "answer words"}]
    files = {
        "conversational": conversational,
        "inside": [{side: one["prompt"] + one[side] for side in ("chosen", "rejected")} for one in conversational],
        "authors": [authors],
        "pku": [{**pku, "is_response_0_safe": False, "is_response_1_safe": True}],
        "authors_rows": [{"prefix": "How ? ", "text": HARMFUL, "safe": "true"}],
        "others": [{**one, "chosen": "First, do this."} for one in safety_records(TRIPLES)],
        "bad": [*safety_records(2), {"prompt": "How ?", "chosen": SAFE, "rejected": " "}],
        "rejected_only": [{"q": "How ?", "rejected": HARMFUL}],
        "unpaired": [{"prompt": "How ?", "completion": HARMFUL, "label": 0}],
        "unpaired_talks": [{"messages": conversational[0]["prompt"] + conversational[0]["rejected"], "label": False}],
        "alpaca": text,
        "mixed": [{**text[0], "safe": True, "prefix": "a"}],
    }
    for name, records in files.items():
        Dataset.from_list(records).to_json(folder / f"{name}.jsonl")
    tokens = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6], "rto_mask": [False, False]}
    marked = Dataset.from_list([tokens]).cast(_HOST_FEATURES)
    marked.to_parquet(folder / "marked.parquet")
    marked.remove_columns("rto_mask").to_parquet(folder / "tokens.parquet")
    return folder


def host_rows(folder, entries, *, split="datasets", tokenizer=None, **changes):
    """What the host makes of these entries, by its own functions, in this process alone."""
    changes = {split: entries, "shuffle_merged_datasets": False, **changes}
    if split == "test_datasets":
        changes["val_set_size"] = None
    cfg = validated(make_config(folder, **changes))
    cfg.dataset_num_proc = changes.get("dataset_num_proc")
    side, tokenizer = ("test" if split == "test_datasets" else "train"), tokenizer or byte_level_bpe()
    parts = [_load_and_process_single_dataset(one, cfg, tokenizer, side, cfg.seed)[0] for one in cfg[split]]
    return handle_long_seq_in_dataset(merge_datasets(parts, cfg), max_length(cfg, split), cfg)


def as_tuples(rows):
    return [(row["input_ids"], row["labels"], row["rto_mask"]) for row in rows]


def core(records, *, tokenizer=None, max_length=128, text="Sorry", **knobs):
    """The same of core."""
    tokenizer, config = tokenizer or byte_level_bpe(), DeRTaConfig(**{"seed": 1, **knobs})
    tokenize = RecordTokenizer.for_config(tokenizer, config)
    options = {"refusal_token_id": resolve_refusal_token_id(tokenizer, text), "max_length": max_length}
    triples = [tokenize.triple(parse_record(record)) for record in records]
    rows = [row for index, triple in enumerate(triples) for row in build_rows(triple, config, index=index, **options)]
    return [(list(row.input_ids), list(row.labels), list(row.rto_mask)) for row in rows]


@pytest.mark.parametrize("name", ["triples", "conversational", "inside"])
def test_triples_become_the_rows_of_core(folder, name):
    rows = host_rows(folder, [entry(folder, name)])
    assert set(rows.column_names) == {"input_ids", "attention_mask", "labels", "rto_mask"}
    assert as_tuples(rows) == core(safety_records(TRIPLES, conversational=name != "triples"))
    assert len(rows) == 2 * TRIPLES
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in rows)


KNOBS = {
    "words": {"prefix_unit": "word", "num_prefixes": 3, "zero_prefix_ratio": None},
    "kept": {"rto_keep_ratio": 0.2, "rto_ratio": 0.5, "seed": 9},
    "no RTO": {"method": "recaug"},
    "raw prompts": {"apply_chat_template": False},
}


@pytest.mark.parametrize("name", KNOBS)
def test_knobs_reach_the_rows(folder, name):
    expected = core(safety_records(TRIPLES), **KNOBS[name])
    assert expected != core(safety_records(TRIPLES))
    assert as_tuples(host_rows(folder, [entry(folder)], derta=KNOBS[name])) == expected


@pytest.mark.parametrize("length", [48, 64])
def test_rows_are_never_longer_than_the_sequences_and_keep_their_refusal(folder, length):
    """The host would cut or drop them; a cut refusal is what is not trained."""
    rows = as_tuples(host_rows(folder, [entry(folder)], sequence_len=length, excess_length_strategy="raise"))
    expected = core(safety_records(TRIPLES), max_length=length)
    assert rows == expected != core(safety_records(TRIPLES))
    assert max(len(row[0]) for row in rows) == length
    refusal = byte_level_bpe()(SAFE)["input_ids"]
    kept = [[label for label in labels if label != -100] for _, labels, mask in rows if not any(mask)]
    assert len(kept) == TRIPLES
    assert all(labels[: len(refusal)] == refusal for labels in kept)


def test_rows_of_the_test_set_have_its_length(folder):
    rows = host_rows(folder, [entry(folder)], split="test_datasets", eval_sequence_len=60)
    assert as_tuples(rows) == core(safety_records(TRIPLES), max_length=60)


def test_rows_stand_beside_ordinary_ones_which_have_no_mask(folder):
    rows = host_rows(folder, [entry(folder, "helpful", type="chat_template", field_messages="messages"), entry(folder)])
    ordinary, triples = list(rows)[:8], list(rows)[8:]
    assert as_tuples(triples) == core(safety_records(TRIPLES))
    assert [row["rto_mask"] for row in ordinary] == [None] * 8
    assert any(label != -100 for label in ordinary[0]["labels"])


def test_the_template_of_an_entry_or_of_the_config_lays_its_records_out(folder):
    """The targets of both are one token, and neither changes the run's tokenizer."""
    tokenizer = byte_level_bpe()
    other = byte_level_bpe(chat_template=LLAMA)
    of_llama = core(safety_records(TRIPLES), tokenizer=other)
    assert of_llama != core(safety_records(TRIPLES))
    both = host_rows(folder, [entry(folder, chat_template_jinja=LLAMA), entry(folder)], tokenizer=tokenizer)
    assert as_tuples(both) == of_llama + core(safety_records(TRIPLES))
    assert tokenizer.chat_template == byte_level_bpe().chat_template
    template = {"chat_template": "jinja", "chat_template_jinja": LLAMA}
    assert as_tuples(host_rows(folder, [entry(folder)], **template)) == of_llama


def test_options_of_the_template_reach_it(folder):
    template = LLAMA.replace("<{{ m.role }}>", "<{{ m.role }}{{ mark }}>")
    rows = host_rows(folder, [entry(folder, chat_template_jinja=template)], chat_template_kwargs={"mark": "moon"})
    expected = core(
        safety_records(TRIPLES), tokenizer=byte_level_bpe(chat_template=template.replace("{{ mark }}", "moon"))
    )
    assert as_tuples(rows) == expected


def test_without_any_template_prompts_are_raw_if_that_is_asked_for(folder):
    plain, raw = byte_level_bpe(chat_template=None), {"apply_chat_template": False}
    rows = host_rows(folder, [entry(folder)], chat_template=None, tokenizer=plain, derta=raw)
    assert as_tuples(rows) == core(safety_records(TRIPLES), tokenizer=plain, **raw)
    with pytest.raises(ValueError, match="has no chat template"):
        host_rows(folder, [entry(folder)], chat_template=None, tokenizer=plain)


def test_the_hosts_processes_change_nothing(folder):
    rows = host_rows(folder, [entry(folder)], dataset_num_proc=2, dataset_keep_in_memory=True)
    assert as_tuples(rows) == core(safety_records(TRIPLES))


def test_bad_records_stop_the_run_or_are_left_out(folder):
    with pytest.raises(BadRecordError, match="Record 2, field `rejected`: is empty"):
        host_rows(folder, [entry(folder, "bad")])
    rows = host_rows(folder, [entry(folder, "bad")], derta={"on_bad_record": "skip"})
    assert as_tuples(rows) == core(safety_records(2))


def test_ordinary_rows_are_not_of_our_type(folder):
    with pytest.raises(ConfigError, match=r"helpful.jsonl' of `datasets` holds ordinary rows \(columns messages\)"):
        host_rows(folder, [entry(folder, "helpful")])
    with pytest.raises(BadRecordError, match="misses `safe_response`"):
        host_rows(folder, [entry(folder, "alpaca")])
    with pytest.raises(ValueError, match="No safety record is left"):
        host_rows(folder, [entry(folder, "alpaca")], derta={"on_bad_record": "skip"})


@pytest.mark.parametrize("name", ["tokens", "marked"])
def test_tokenised_rows_are_not_of_our_type(folder, name):
    """The host gives those to the trainer as they are, and asks no strategy."""
    tokenised = entry(folder, path=str(folder / f"{name}.parquet"), ds_type="parquet")
    for entries in ([entry(folder), tokenised], [tokenised, entry(folder)]):
        with pytest.raises(ConfigError, match=f"{name}.parquet' is tokenised already"):
            host_rows(folder, entries)


def test_streams_are_refused(folder):
    cfg = validated(make_config(folder))
    strategy = load(byte_level_bpe(), cfg, cfg.datasets[0])
    with pytest.raises(ConfigError, match=r"triples.jsonl' of `datasets` is a stream; .* Unset `streaming`"):
        strategy.wrap_dataset(Dataset.from_list(safety_records(2)).to_iterable_dataset())


def test_one_target_for_all_datasets(folder):
    with pytest.raises(ConfigError, match=r"RTO target of .*others.jsonl' .* 'Fi'.*another.*'Sorry'.*refusal_text"):
        host_rows(folder, [entry(folder), entry(folder, "others")])
    rows = host_rows(folder, [entry(folder), entry(folder, "others")], derta={"refusal_text": "Sorry"})
    assert len(rows) == 4 * TRIPLES
    assert our_plugin().target.id == byte_level_bpe()("Sorry")["input_ids"][0]


def test_the_next_run_of_this_process_has_a_target_of_its_own(folder):
    host_rows(folder, [entry(folder)])
    host_rows(folder, [entry(folder, "others")])
    assert our_plugin().target.text == "Fi"
    our_plugin().register(make_config(folder))
    assert our_plugin().target is None


HARMFUL_ENTRIES = {
    "the authors' triples": {"name": "authors", "type": "alpaca"},
    "the authors' triples, chosen by field": {
        "name": "authors",
        "type": {"field_instruction": "instruction", "field_output": "output", "format": "{instruction}"},
    },
    "the harmful side alone": {"name": "rejected_only", "type": "completion", "field": "rejected"},
    "unpaired preferences": {"name": "unpaired", "type": "completion", "field": "completion"},
    "unpaired talks": {"name": "unpaired_talks", "type": "chat_template", "field_messages": "messages"},
    "PKU": {"name": "pku", "type": "completion", "field": "response_0"},
    "the authors' rows": {"name": "authors_rows", "type": "completion"},
    "the harmful side": {"name": "triples", "type": "completion", "field": "rejected"},
    "the harmful side as messages": {
        "name": "conversational",
        "type": "chat_template",
        "field_messages": "rejected",
    },
    "the harmful side by a format": {
        "name": "triples",
        "type": {"field_instruction": "prompt", "field_output": "rejected", "format": "{instruction}"},
    },
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", HARMFUL_ENTRIES)
def test_triples_are_not_trained_by_another_type(folder, name, is_first):
    settings = dict(HARMFUL_ENTRIES[name])
    theirs = entry(folder, settings.pop("name"), **settings)
    entries = [theirs, entry(folder)] if is_first else [entry(folder), theirs]
    with pytest.raises(ConfigError, match=r"has the columns of safety records .* would train its harmful responses"):
        host_rows(folder, entries)


HARMLESS_ENTRIES = {
    "conversations": {"name": "helpful", "type": "chat_template", "field_messages": "messages"},
    "instructions": {"name": "alpaca", "type": "alpaca"},
    "the safe side": {"name": "conversational", "type": "chat_template", "field_messages": "chosen"},
    "the safe side as text": {"name": "triples", "type": "completion", "field": "chosen"},
    "columns of other names": {"name": "mixed", "type": "alpaca"},
    "already tokenised": {"name": "tokens", "type": "completion", "ds_type": "parquet"},
}


@pytest.mark.parametrize("name", HARMLESS_ENTRIES)
def test_harmless_entries_are_the_hosts(folder, name):
    settings = dict(HARMLESS_ENTRIES[name])
    theirs = entry(folder, settings.pop("name"), **settings)
    theirs["path"] = theirs["path"].replace("tokens.jsonl", "tokens.parquet")
    rows = host_rows(folder, [theirs, entry(folder)])
    assert len(rows) > 2 * TRIPLES
    assert {row["rto_mask"] is None for row in list(rows)[: -2 * TRIPLES]} == {True}


def test_the_splits_of_a_folder_are_looked_at(folder):
    """The host is given all of them, and takes one by its name later."""
    (folder / "parts").mkdir()
    (folder / "parts" / "train.jsonl").write_bytes((folder / "authors.jsonl").read_bytes())
    with pytest.raises(ConfigError, match="parts' has the columns of safety records"):
        host_rows(folder, [{"path": str(folder / "parts"), "type": "alpaca"}, entry(folder)])


def test_a_synthetic_entry_has_no_file_to_look_at(folder):
    check_entries(DictDefault(datasets=[{"type": "_synthetic", "length": 4}]))


def test_a_test_set_is_not_trained(folder):
    """So what the host evaluates of its own is its own; and training data is looked at with the training set."""
    theirs = entry(folder, "authors", type="alpaca")
    rows = host_rows(folder, [theirs, entry(folder)], split="test_datasets")
    assert len(rows) == 1 + 2 * TRIPLES


@pytest.mark.parametrize("plugins", [None, [], ["my.Plugin"]])
def test_without_the_plugin_no_row_is_made(folder, plugins):
    cfg = validated(make_config(folder))
    other = DictDefault({**cfg, "plugins": plugins})
    with pytest.raises(ConfigError, match=r"needs the plugin that trains it. Add `derta_plugins"):
        load(byte_level_bpe(), other, cfg.datasets[0])


def test_a_plugin_of_another_config_is_not_that_of_this_one(folder):
    cfg = validated(make_config(folder))
    plugin = our_plugin()
    assert load(byte_level_bpe(), cfg, cfg.datasets[0])
    assert plugin.is_on(cfg)
    assert not plugin.is_on({"plugins": ["my.Plugin"]})
    assert not copy.deepcopy(plugin).is_on({"plugins": [PLUGIN]})


def test_an_entry_that_lost_its_mark_is_refused(folder):
    cfg = validated(make_config(folder))
    for mark in (None, "derta-datasets-of-another-run"):
        with pytest.raises(RuntimeError, match=r"triples.jsonl' lost DeRTa's mark"):
            load(byte_level_bpe(), cfg, {**cfg.datasets[0], "conversation": mark})
