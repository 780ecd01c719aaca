"""Entries of dataset_info.json: the formats that triples come in, and the records and datasets that are refused."""

import logging

import pytest
from llamafactory.data import loader

from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.records import BadRecordError
from tests.adapters.llamafactory_rows import STREAMING, core, load, triples_of
from tests.adapters.llamafactory_runs import ALPACA, RANKING, add_dataset, helpful_examples, make_folder
from tests.conftest import HARMFUL, SAFE, safety_records

GOOD = safety_records(1)[0]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


SHAREGPT = {
    "formatting": "sharegpt",
    "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "system": "system"},
}
TURNS = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": HARMFUL},
    {"role": "user", "content": "How do I paint the castle wall?"},
]


def sharegpt(**changes):
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    sides = {"chosen": {"from": "gpt", "value": SAFE}, "rejected": {"from": "gpt", "value": HARMFUL}}
    return {"conversations": turns, **sides, "system": "prompt words", **changes}


@pytest.mark.parametrize("turns", ["last", "all"])
def test_conversations_keep_their_turns_and_their_system_text(folder, turns):
    add_dataset(folder, "talks", [sharegpt()], **SHAREGPT)
    record = {"prompt": [{"role": "system", "content": "prompt words"}, *TURNS], "chosen": SAFE, "rejected": HARMFUL}
    rows = triples_of(load(folder, dataset="talks", derta_rto_turns=turns)["train_dataset"])
    assert rows == core([record], DeRTaConfig(seed=3, rto_turns=turns))


def test_an_alpaca_history_becomes_turns_and_its_query_part_of_the_prompt(folder):
    columns = {**RANKING["columns"], "query": "input", "history": "history", "system": "system"}
    record = {
        **{"prompt": "How do I paint", "input": "the castle wall?", "history": [["Hello there", HARMFUL]]},
        **{"system": "prompt words", "chosen": SAFE, "rejected": HARMFUL},
    }
    add_dataset(folder, "talks", [record], ranking=True, columns=columns)
    turns = [TURNS[0], TURNS[1], {"role": "user", "content": "How do I paint\nthe castle wall?"}]
    expected = {"prompt": [{"role": "system", "content": "prompt words"}, *turns], "chosen": SAFE, "rejected": HARMFUL}
    assert triples_of(load(folder, dataset="talks")["train_dataset"]) == core([expected])


def test_the_authors_triples_are_ranking_rows_under_their_own_names(folder):
    authors = [
        {"instruction": record["prompt"], "output": record["rejected"], "safe_response": record["chosen"]}
        for record in safety_records(3)
    ]
    columns = {"prompt": "instruction", "chosen": "safe_response", "rejected": "output"}
    add_dataset(folder, "authors", authors, ranking=True, columns=columns)
    assert triples_of(load(folder, dataset="authors")["train_dataset"]) == core(safety_records(3))


# --- refused records --------------------------------------------------------------------------------------------------

NO_PAIR = "`record`: is no `formatting: sharegpt` pair"


def ranking(**columns):
    """A `ranking: true` entry with more columns, or others."""
    return {"ranking": True, "columns": {**RANKING["columns"], **columns}}


BAD_RECORDS = {
    "a safe side that is null": (RANKING, {**GOOD, "chosen": None}, "`chosen`: is empty"),
    # the host's converter takes these for ordinary examples whose answer is the harmful one
    "null beside a response": (ranking(response="rejected"), {**GOOD, "chosen": None}, "`chosen`: is empty"),
    "a message that is null": (SHAREGPT, sharegpt(chosen=None), "`chosen`: is empty"),
    "a harmful side that is null": (RANKING, {**GOOD, "rejected": None}, "`rejected`: is empty"),
    "white space": (RANKING, {**GOOD, "chosen": "  "}, "`chosen`: is empty"),
    "equal sides": (RANKING, {**GOOD, "rejected": SAFE}, "`rejected`: is the same text as the safe response"),
    "no prompt": (RANKING, {**GOOD, "prompt": ""}, "`prompt`: is empty"),
    "two turns of one side": (SHAREGPT, sharegpt(conversations=[{"from": "human", "value": "a"}] * 3), NO_PAIR),
    "a talk that the assistant ends": (SHAREGPT, sharegpt(conversations=sharegpt()["conversations"][:2]), NO_PAIR),
    "a side of the user": (
        SHAREGPT, sharegpt(chosen={"from": "human", "value": SAFE}), "`chosen`: expected one assistant message",
    ),
    "tags that it does not have": (
        {**SHAREGPT, "columns": {**SHAREGPT["columns"], "system": None}},
        {**sharegpt(), "chosen": {"role": "assistant", "content": SAFE}},
        "`record`: does not fit `formatting: sharegpt`",
    ),
    "too long a prompt": (RANKING, {**GOOD, "prompt": "word " * 300}, "`prompt`: is .* no room for an answer"),
    "tools": (ranking(tools="tools"), {**GOOD, "tools": "[]"}, "`tools`: is not carried"),
    "an image": (ranking(images="images"), {**GOOD, "images": ["a.png"]}, "`images`: is not carried"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_is_no_triple_is_told_with_its_place_or_skipped(folder, name, caplog):
    entry, bad, message = BAD_RECORDS[name]
    good = sharegpt() if "formatting" in entry else {**dict.fromkeys(bad), **GOOD}
    add_dataset(folder, "mixed", [good, bad], **entry)
    with pytest.raises(BadRecordError, match=f"Record 1, field {message}") as raised:
        load(folder, dataset="helpful,mixed")
    assert raised.value.__notes__ == [
        "It stands in dataset `mixed`; in LLaMA-Factory the key is `derta_on_bad_record: skip`."
    ]
    logging.getLogger("llamafactory").propagate = True
    with caplog.at_level(logging.WARNING):
        rows = load(folder, dataset="helpful,mixed", derta_on_bad_record="skip")["train_dataset"]
    logging.getLogger("llamafactory").propagate = False
    assert len(triples_of(rows)) == 2
    assert "DeRTa skipped 1 records of mixed" in caplog.text


def test_a_bad_record_of_a_worker_process_keeps_its_place(folder):
    add_dataset(folder, "mixed", [*safety_records(3), {**GOOD, "chosen": ""}], **RANKING)
    with pytest.raises(BadRecordError, match="Record 3, field `chosen`"):
        load(folder, dataset="mixed", preprocessing_num_workers=2)


def test_a_set_of_bad_records_is_not_skipped_into_an_ordinary_run(folder):
    add_dataset(folder, "bad", [{**GOOD, "chosen": ""}], **RANKING)
    for streaming in ({}, STREAMING):
        with pytest.raises(ValueError, match="No safety record is left of dataset `bad`"):
            load(folder, dataset="helpful,bad", derta_on_bad_record="skip", **streaming)


# --- refused datasets -------------------------------------------------------------------------------------------------

AUTHORS = {"instruction": "q", "output": HARMFUL, "safe_response": SAFE}
REFUSED_DATASETS = {
    "the authors' triples as ordinary rows": (ALPACA, AUTHORS, r"columns of safety triples \(safe_response\)"),
    "pairs as ordinary rows": (
        {"columns": {"prompt": "prompt", "response": "rejected"}}, GOOD, r"of safety triples \(chosen, rejected\)",
    ),
    "PKU's pairs": (
        {"columns": {"prompt": "prompt", "response": "response_0"}},
        {"prompt": "q", "response_0": HARMFUL, "response_1": SAFE},
        r"columns of safety triples \(response_0, response_1\)",
    ),
    "the authors' rows": (
        {"columns": {"prompt": "prefix", "response": "text"}}, {"prefix": "q", "text": HARMFUL, "safe": "true"},
        "looks like the authors' prefix / text / safe rows",
    ),
    "ranking without columns": ({"ranking": True}, GOOD, "`ranking: true` without saying which columns"),
    "ranking with a column it lacks": (ranking(chosen="better"), GOOD, r"has no column `better` \(it has chosen"),
    "ranking with a tag": (ranking(kto_tag="tag"), {**GOOD, "tag": True}, "has a `kto_tag`"),
    "an ordinary set with tags": (
        {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "wanted"}},
        {"instruction": "q", "output": HARMFUL, "wanted": "False"}, r"desired or not \(wanted\)",
    ),
    "unpaired preferences": (
        {"columns": {"prompt": "prompt", "response": "completion"}},
        {"prompt": "q", "completion": HARMFUL, "label": False}, r"desired or not \(label\)",
    ),
    "ranking forgotten, other names": (
        {"columns": {"prompt": "instruction", "response": "bad", "chosen": "good", "rejected": "bad"}},
        {"instruction": "q", "good": SAFE, "bad": HARMFUL}, r"columns of safety triples \(bad, good\)",
    ),
    "nothing but ordinary rows": (ALPACA, helpful_examples(1)[0], "needs safety triples, and `dataset` names none: it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_DATASETS)
@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
def test_a_dataset_that_is_not_what_it_is_registered_as_is_refused(folder, name, streaming):
    entry, record, message = REFUSED_DATASETS[name]
    add_dataset(folder, "it", [record], **entry)
    with pytest.raises(ValueError, match=message):
        load(folder, dataset="it", **(STREAMING if streaming else {}))


def test_the_host_is_as_it_was_after_a_failure(folder):
    names = ("get_dataset_list", "align_dataset", "_get_dataset_processor", "_get_preprocessed_dataset")
    before = [getattr(loader, name) for name in names]
    add_dataset(folder, "bad", [{**GOOD, "chosen": ""}], **RANKING)
    with pytest.raises(BadRecordError):
        load(folder, dataset="bad")
    assert [getattr(loader, name) for name in names] == before
