"""Every record format that is read, and every wrong record with the message it gives."""

import copy
import pickle

import pytest

from derta_plugins.core.records import (
    HELPFUL_FORMATS,
    KNOWN_COLUMNS,
    TRIPLE_FORMATS,
    AuthorsRow,
    BadRecordError,
    Triple,
    parse_record,
    present_columns,
    record_kind,
)

Q, SAFE, HARMFUL = "How do I paint the wall?", "Sorry, I will not.", "Step one: take the brush."
USER = {"role": "user", "content": Q}
SAFE_TURN = {"role": "assistant", "content": SAFE}
HARMFUL_TURN = {"role": "assistant", "content": HARMFUL}
SYSTEM = {"role": "system", "content": "Be kind."}
EARLIER = [SYSTEM, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there"}]

PREFERENCE = {"prompt": Q, "chosen": SAFE, "rejected": HARMFUL}
AUTHORS_TRIPLE = {"instruction": Q, "output": HARMFUL, "safe_response": SAFE}
AUTHORS_ROW = {"prefix": f"[INST] {Q} [/INST]", "text": SAFE, "safe": "false"}
PKU = {
    "prompt": Q,
    "response_0": SAFE,
    "response_1": HARMFUL,
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}
PKU_SWAPPED = {
    "prompt": Q,
    "response_0": HARMFUL,
    "response_1": SAFE,
    "is_response_0_safe": False,
    "is_response_1_safe": True,
}

TRIPLES = {
    "preference": (PREFERENCE, Q),
    "preference, conversational": ({"prompt": [USER], "chosen": [SAFE_TURN], "rejected": [HARMFUL_TURN]}, (USER,)),
    "preference, messages as prompt, text as sides": ({**PREFERENCE, "prompt": [USER]}, (USER,)),
    "preference, multi-turn": (
        {"prompt": [*EARLIER, USER], "chosen": [SAFE_TURN], "rejected": [HARMFUL_TURN]},
        (*EARLIER, USER),
    ),
    "preference, prompt inside": ({"chosen": [USER, SAFE_TURN], "rejected": [USER, HARMFUL_TURN]}, (USER,)),
    "preference, prompt inside, multi-turn": (
        {"chosen": [*EARLIER, USER, SAFE_TURN], "rejected": [*EARLIER, USER, HARMFUL_TURN]},
        (*EARLIER, USER),
    ),
    "authors' triple": (AUTHORS_TRIPLE, Q),
    "PKU-SafeRLHF, first side safe": (PKU, Q),
    "PKU-SafeRLHF, second side safe": (PKU_SWAPPED, Q),
}
HELPFUL = {
    "messages": {"messages": [USER, {"role": "assistant", "content": "With a brush."}]},
    "prompt-completion": {"prompt": Q, "completion": "With a brush."},
    "text": {"text": "With a brush."},
}


@pytest.mark.parametrize("name", TRIPLES)
def test_triple_formats(name):
    record, prompt = TRIPLES[name]
    assert record_kind(record) == "triple"
    assert parse_record(record) == Triple(prompt, chosen=SAFE, rejected=HARMFUL)


def test_every_triple_format_that_core_declares_stands_in_the_table():
    assert {present_columns(record) for record, _ in TRIPLES.values()} == set(TRIPLE_FORMATS.values())
    assert {present_columns(record) for record in HELPFUL.values()} == set(HELPFUL_FORMATS.values())


@pytest.mark.parametrize(
    ("safe", "objective"),
    [
        ("true", "rto"),
        ("false", "mle"),
        ("True", "rto"),
        ("FALSE", "mle"),
        (" true ", "rto"),
        (True, "rto"),
        (False, "mle"),
    ],
)
def test_in_the_authors_file_safe_true_marks_the_harmful_response(safe, objective):
    record = {**AUTHORS_ROW, "safe": safe}
    assert record_kind(record) == "authors_row"
    assert parse_record(record) == AuthorsRow(AUTHORS_ROW["prefix"], SAFE, objective)


@pytest.mark.parametrize("name", HELPFUL)
def test_helpful_records_are_left_to_the_host(name):
    assert record_kind(HELPFUL[name]) == "helpful"
    assert parse_record(HELPFUL[name]) is None


ALL = {
    **{name: record for name, (record, _) in TRIPLES.items()},
    "authors' row": AUTHORS_ROW,
    **{f"helpful, {name}": record for name, record in HELPFUL.items()},
}


@pytest.mark.parametrize("name", ALL)
def test_null_columns_count_as_absent_and_unknown_columns_are_ignored(name):
    record = ALL[name]
    with_nulls = {**dict.fromkeys(KNOWN_COLUMNS), **record, "id": 7, "category": "walls", "score": None}
    assert present_columns(with_nulls) == set(record)
    assert record_kind(with_nulls) == record_kind(record)
    assert parse_record(with_nulls) == parse_record(record)


@pytest.mark.parametrize("name", ALL)
def test_reading_does_not_modify_the_record(name):
    before = copy.deepcopy(ALL[name])
    parse_record(ALL[name])
    assert ALL[name] == before


def test_message_columns_beyond_role_and_content_do_not_reach_the_template():
    prompt = [{**USER, "tool_calls": None, "name": None, "weight": 1}]
    assert parse_record({**PREFERENCE, "prompt": prompt}).prompt == (USER,)


def test_prompt_inside_stops_before_the_last_message_of_the_shorter_side():
    """The same answer on both sides is an answer, not prompt."""
    record = {"chosen": [USER, SAFE_TURN], "rejected": [USER, SAFE_TURN]}
    with pytest.raises(BadRecordError, match=r"field `rejected`: is the same text as the safe response"):
        parse_record(record)


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


TOOL_CALL = {**USER, "tool_calls": [{"name": "search"}]}

# name: (record, field at fault, what the message says)
BAD = {
    "chosen empty": ({**PREFERENCE, "chosen": ""}, "chosen", r"is empty\."),
    "rejected white space": ({**PREFERENCE, "rejected": " \n\t"}, "rejected", r"is empty\."),
    "prompt empty": ({**PREFERENCE, "prompt": ""}, "prompt", r"is empty\."),
    "message empty": ({**PREFERENCE, "prompt": [{**USER, "content": " "}]}, "prompt", r"is empty\."),
    "safe_response empty": ({**AUTHORS_TRIPLE, "safe_response": ""}, "safe_response", r"is empty\."),
    "output empty": ({**AUTHORS_TRIPLE, "output": ""}, "output", r"is empty\."),
    "instruction empty": ({**AUTHORS_TRIPLE, "instruction": ""}, "instruction", r"is empty\."),
    "prefix empty": ({**AUTHORS_ROW, "prefix": ""}, "prefix", r"is empty\."),
    "text of authors' row empty": ({**AUTHORS_ROW, "text": " "}, "text", r"is empty\."),
    "PKU response empty, named by its column": ({**PKU_SWAPPED, "response_0": ""}, "response_0", r"is empty\."),
    "equal sides": ({**PREFERENCE, "rejected": SAFE}, "rejected", r"same text as the safe response"),
    "equal but for white space": ({**PREFERENCE, "rejected": f"  {SAFE}\n"}, "rejected", r"same text as the safe"),
    "equal sides, authors": ({**AUTHORS_TRIPLE, "output": SAFE}, "output", r"same text as the safe response"),
    "PKU both safe": (
        {**PKU, "is_response_1_safe": True},
        "is_response_0_safe",
        r"both responses are safe; a triple needs exactly one safe side",
    ),
    "PKU none safe": (
        {**PKU, "is_response_0_safe": False},
        "is_response_0_safe",
        r"no response is safe; a triple needs exactly one safe side",
    ),
    "PKU flag as text": (
        {**PKU, "is_response_1_safe": "false"},
        "is_response_1_safe",
        r"expected true or false, got 'false'",
    ),
    "PKU flag as number": ({**PKU, "is_response_0_safe": 1}, "is_response_0_safe", r"expected true or false, got 1"),
    "chosen a number": ({**PREFERENCE, "chosen": 7}, "chosen", r"expected text, got int 7"),
    "chosen a mapping": ({**PREFERENCE, "chosen": SAFE_TURN}, "chosen", r"expected text, got dict"),
    "prompt a number": ({**PREFERENCE, "prompt": 0.5}, "prompt", r"expected text, got float 0\.5"),
    "prompt a list of texts": ({**PREFERENCE, "prompt": [Q]}, "prompt", r"expected messages with `role` and `content`"),
    "prompt as bytes": ({**PREFERENCE, "prompt": b"ab"}, "prompt", r"expected messages .* got 97"),
    "message without role": ({**PREFERENCE, "prompt": [{"content": Q}]}, "prompt", r"expected messages with `role`"),
    "role a number": ({**PREFERENCE, "prompt": [{**USER, "role": 1}]}, "prompt", r"expected messages with `role`"),
    "message without content": ({**PREFERENCE, "prompt": [{"role": "user"}]}, "prompt", r"expected text, got NoneType"),
    "content of parts": (
        {**PREFERENCE, "prompt": [{"role": "user", "content": [{"type": "text", "text": Q}]}]},
        "prompt",
        r"expected text, got list",
    ),
    "prompt ends with assistant": (
        {**PREFERENCE, "prompt": EARLIER},
        "prompt",
        r"must end with a user message, ends with assistant",
    ),
    "prompt ends with system": (
        {**PREFERENCE, "prompt": [SYSTEM]},
        "prompt",
        r"must end with a user message, ends with system",
    ),
    "prompt without message": ({**PREFERENCE, "prompt": []}, "prompt", r"ends with no message"),
    "prompt inside, but none there": (
        {"chosen": [SAFE_TURN], "rejected": [HARMFUL_TURN]},
        "prompt",
        r"must end with a user message, ends with no message",
    ),
    "prompt inside, sides part too early": (
        {"chosen": [USER, SAFE_TURN], "rejected": [{**USER, "content": "Other"}, HARMFUL_TURN]},
        "prompt",
        r"ends with no message",
    ),
    "prompt inside, plain text": (without(PREFERENCE, "prompt"), "chosen", r"is plain text without a `prompt` column"),
    "prompt inside, rejected plain text": (
        {"chosen": [USER, SAFE_TURN], "rejected": HARMFUL},
        "rejected",
        r"is plain text without a `prompt` column",
    ),
    "answer of two messages": (
        {"prompt": [USER], "chosen": [SAFE_TURN, USER], "rejected": [HARMFUL_TURN]},
        "chosen",
        r"expected one assistant message, got roles \['assistant', 'user'\]",
    ),
    "answer after other messages": (
        {"prompt": [USER], "chosen": [USER, SAFE_TURN], "rejected": [HARMFUL_TURN]},
        "chosen",
        r"expected one assistant message, got roles \['user', 'assistant'\]",
    ),
    "prompt inside, sides part turns before their end": (
        {"chosen": [USER, SAFE_TURN, USER, SAFE_TURN], "rejected": [USER, HARMFUL_TURN]},
        "chosen",
        r"expected one assistant message, got roles \['assistant', 'user', 'assistant'\]",
    ),
    "answer from the user": (
        {"prompt": [USER], "chosen": [SAFE_TURN], "rejected": [USER]},
        "rejected",
        r"expected one assistant message, got roles \['user'\]",
    ),
    "answer without message": (
        {"prompt": [USER], "chosen": [], "rejected": [HARMFUL_TURN]},
        "chosen",
        r"expected one assistant message, got roles \[\]",
    ),
    "answer a list of texts": ({**PREFERENCE, "chosen": [SAFE]}, "chosen", r"got roles \[None\]"),
    "tool calls in the prompt": ({**PREFERENCE, "prompt": [TOOL_CALL]}, "prompt", r"has tool calls"),
    "tool calls in an answer": (
        {"prompt": [USER], "chosen": [SAFE_TURN], "rejected": [{**HARMFUL_TURN, "tool_calls": [{"name": "x"}]}]},
        "rejected",
        r"has tool calls, which a triple cannot carry",
    ),
    "safe neither true nor false": (
        {**AUTHORS_ROW, "safe": "yes"},
        "safe",
        r'expected "true" \(an RTO row\) or "false", got \'yes\'',
    ),
    "safe a number": ({**AUTHORS_ROW, "safe": 1}, "safe", r'expected "true".*got 1'),
    "safe lost": (without(AUTHORS_ROW, "safe"), "safe", r"looks like the authors' training rows .* misses `safe`"),
    "safe null": ({**AUTHORS_ROW, "safe": None}, "safe", r"misses `safe`"),
    "prefix lost": (without(AUTHORS_ROW, "prefix"), "prefix", r"misses `prefix`"),
    "text lost": (without(AUTHORS_ROW, "text"), "text", r"misses `text`"),
    "safe_response lost": (
        without(AUTHORS_TRIPLE, "safe_response"),
        "safe_response",
        r"looks like the DeRTa authors' triples format but misses `safe_response`",
    ),
    "output lost": (without(AUTHORS_TRIPLE, "output"), "output", r"misses `output`"),
    "chosen lost": (without(PREFERENCE, "chosen"), "chosen", r"looks like the preference format but misses `chosen`"),
    "rejected lost": (without(PREFERENCE, "rejected"), "rejected", r"misses `rejected`"),
    "rejected null": ({**PREFERENCE, "rejected": None}, "rejected", r"misses `rejected`"),
    "PKU flag lost": (
        without(PKU, "is_response_1_safe"),
        "is_response_1_safe",
        r"looks like the PKU-SafeRLHF format but misses `is_response_1_safe`",
    ),
    "prompt alone": ({"prompt": Q}, "completion", r"looks like the prompt-completion format but misses `completion`"),
    "two formats at once": (
        {**PREFERENCE, "text": SAFE},
        "text",
        r"looks like the preference format but has `text` besides",
    ),
    "one column lost, one of another format": (
        {"prompt": Q, "chosen": SAFE, "text": SAFE},
        "rejected",
        r"looks like the preference format but misses `rejected` and has `text` besides",
    ),
    "no known column": (
        {"question": Q, "id": 7},
        "record",
        r"no known column has a value; its columns are: id, question",
    ),
    "all null": (dict.fromkeys(PREFERENCE), "record", r"no known column has a value; its columns are: chosen, prompt"),
    "no column": ({}, "record", r"its columns are: none\. Expected a triple \(chosen / prompt / rejected"),
    "tokenised": ({"input_ids": [1], "labels": [1]}, "record", r"is tokenised already; its columns are: input_ids"),
    "a text": ("Sorry", "record", r"expected a mapping of columns, got str"),
    "a list": ([Q, SAFE, HARMFUL], "record", r"expected a mapping of columns, got list"),
    "none": (None, "record", r"expected a mapping of columns, got NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    record, field, message = BAD[name]
    with pytest.raises(BadRecordError, match=message) as caught:
        parse_record(record)
    assert caught.value.field == field
    assert caught.value.index is None
    assert str(caught.value).startswith(f"Record, field `{field}`: ")
    assert str(caught.value).endswith("Mend the record, or set `on_bad_record='skip'` to drop such records.")


@pytest.mark.parametrize("base", TRIPLES)
def test_a_triple_that_lost_any_column_is_never_an_ordinary_record(base):
    record = TRIPLES[base][0]
    for name in record:
        short = without(record, name)
        with pytest.raises(BadRecordError):
            parse_record(short)


def test_long_values_are_shortened_in_messages():
    with pytest.raises(BadRecordError) as caught:
        parse_record({**PREFERENCE, "prompt": [["very long"] * 1000]})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("index", [0, 41])
def test_position_of_the_record_is_added_later(index):
    error = BadRecordError("chosen", "is empty.")
    placed = error.at(index)
    assert str(placed).startswith(f"Record {index}, field `chosen`: is empty. ")
    assert (placed.field, placed.reason, placed.index) == ("chosen", "is empty.", index)
    assert error.index is None


@pytest.mark.parametrize("index", [None, 0, 41])
def test_errors_cross_worker_processes(index):
    error = BadRecordError("chosen", "is empty.", index)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is BadRecordError
    assert (str(back), back.field, back.reason, back.index) == (str(error), "chosen", "is empty.", index)
