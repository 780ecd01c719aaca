"""What `derta show` prints of a row, and that its counts are those of the rows that training gets."""

import contextlib
import copy
import io
import re

import pytest
from datasets import Dataset
from rich.console import Console

from derta_plugins.core.chat import RecordTokenizer
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.records import BadRecordError, parse_record
from derta_plugins.core.refusal_token import RefusalTokenError
from derta_plugins.core.transform import Row, build_rows
from derta_plugins.readers import RecordsNotFoundError
from derta_plugins.show import (
    ASCII,
    NoTrainingRecordError,
    histogram,
    parts,
    runs,
    show_records,
    visible,
)
from derta_plugins.survey import View, survey, target_of, word_tokenizer
from tests.conftest import metaspace_unigram

TRIPLE = {"prompt": "How do I paint ?", "chosen": "Sorry , no .", "rejected": "Step one ."}
HELPFUL = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "answer words"}]}
BAD = {"prompt": "q", "chosen": "Sorry , no .", "rejected": ""}


def as_dataset(records):
    """Records of several formats in one dataset, as a JSON file of them is read: what one lacks is null."""
    columns = {name: None for record in records for name in record}
    return Dataset.from_list([columns | record for record in records])


def printed(records, tokenizer, *, error=None, color=False, width=120, encoding="utf-8", max_length=None, **options):
    """Output of `show_records`, which must raise `error` if one is given."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    terminal = {"force_terminal": True, "color_system": "standard"} if color else {"color_system": None}
    console = Console(file=file, width=width, highlight=False, no_color=not color, **terminal)
    config = DeRTaConfig(on_bad_record="skip", **options.pop("knobs", {}))
    view = View(tokenizer, config, max_length)
    with pytest.raises(error) if error else contextlib.nullcontext():
        show_records(as_dataset(records), view, console, source="records.json", **options)
    text = file.buffer.getvalue().decode(encoding)
    return "\n".join(line.rstrip() for line in text.splitlines())


def without_prefix(**knobs):
    return {"knobs": {"zero_prefix_ratio": 1.0, **knobs}}


def test_trained_text_stands_in_brackets_and_context_does_not(bpe_tokenizer):
    text = printed([TRIPLE], bpe_tokenizer, **without_prefix())
    assert re.search(r"MLE +\d+ ⟦Sorry , no \.<\|im_end\|>⟧", text)
    assert re.search(r"RTO +\d+ ⟪Step one \.<\|im_end\|>⟫", text)
    assert re.search(
        r"prompt +\d+ <\|im_start\|>user⏎\n +How do I paint \?<\|im_end\|>⏎\n +<\|im_start\|>assistant⏎", text
    )
    assert text.count("⟦") == 2, "the legend and one trained part"


def test_colours_tell_what_a_token_trains(bpe_tokenizer):
    text = printed([TRIPLE], bpe_tokenizer, color=True, **without_prefix())
    green, magenta, dim = "\x1b[32m", "\x1b[35m", "\x1b[2m"
    assert f"{green}Sorry , no .<|im_end|>" in text
    assert f"{magenta}Step one .<|im_end|>" in text
    assert f"{dim}How do I paint ?<|im_end|>⏎" in text


def test_the_harmful_prefix_is_its_own_part(bpe_tokenizer):
    text = printed([TRIPLE], bpe_tokenizer, color=True, knobs={"zero_prefix_ratio": 0.0})
    k = int(re.search(r"k = (\d+)", text)[1])
    assert "\x1b[33mStep" in text
    assert re.search(rf"prefix +{k} Step", printed([TRIPLE], bpe_tokenizer, knobs={"zero_prefix_ratio": 0.0}))
    assert "prefix" not in printed([TRIPLE], bpe_tokenizer, **without_prefix()).split("row 1")[1].split("summary")[0]


def test_places_that_rto_leaves_out_are_outside_the_brackets(bpe_tokenizer):
    text = printed([TRIPLE], bpe_tokenizer, **without_prefix(rto_keep_ratio=0.2))
    row = text.split("row 2")[1].split("summary")[0]
    assert ", 1 trained" in row or ", 2 trained" in row
    assert re.sub(r"[⟪⟫]", "", row).count("Step one .<|im_end|>") == 1
    assert "⟪Step one .<|im_end|>⟫" not in row


def test_earlier_turns_are_marked_inside_the_prompt(bpe_tokenizer):
    prompt = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Step one"},
        {"role": "user", "content": "more words"},
    ]
    sides = {side: [{"role": "assistant", "content": TRIPLE[side]}] for side in ("chosen", "rejected")}
    text = printed([{"prompt": prompt, **sides}], bpe_tokenizer, knobs={"rto_turns": "all"})
    assert "⟪Step one<|im_end|>⟫" in text.split("row 2")[1]


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(bpe_tokenizer, width):
    long = {**TRIPLE, "rejected": "Step one . " * 300 + "x" * 200}
    text = printed([long, BAD, HELPFUL], bpe_tokenizer, width=width, is_full=True)
    assert max(map(len, text.splitlines())) <= width


def test_long_parts_are_shortened_unless_asked_for_whole(bpe_tokenizer):
    long = {**TRIPLE, "rejected": "Step one . " * 300 + "castle end ."}
    short = printed([long], bpe_tokenizer)
    assert re.search(r"[\d,]+ more tokens \(--full\)", short)
    assert "castle end ." in short, "the end of a part is always shown"
    assert "--full" not in printed([long], bpe_tokenizer, is_full=True)


def test_user_text_is_no_markup_and_cannot_steer_the_terminal(bpe_tokenizer):
    record = {**TRIPLE, "prompt": "[bold red]x[/] \x1b[31m \u202e tab\t", "chosen": "Sorry [/nope] no"}
    text = printed([record, {**BAD, "prompt": "[/x]"}], bpe_tokenizer)
    assert r"[bold red]x[/] \x1b[31m \u202e tab\t" in text
    assert "Sorry [/nope] no" in text
    assert "\x1b" not in text


def test_an_ascii_terminal_gets_ascii(bpe_tokenizer):
    text = printed([{**TRIPLE, "prompt": "paint é 😀"}], bpe_tokenizer, encoding="ascii", **without_prefix())
    assert text.isascii()
    assert "[[Sorry , no .<|im_end|>]]" in text
    assert "<<Step one .<|im_end|>>>" in text
    assert r"paint \xe9 \U0001f600" in text


@pytest.mark.parametrize(
    ("text", "glyphs", "expected"),
    [
        ("a\nb", None, "a⏎\nb"),
        ("a\r\tb\x00", None, r"a\r\tb\x00"),
        ("é 😀", None, "é 😀"),
        ("a\nb", ASCII, "a\\n\nb"),
        ("\u200b\u2028", None, r"\u200b\u2028"),
    ],
)
def test_visible(text, glyphs, expected):
    assert (visible(text, glyphs) if glyphs else visible(text)) == expected


def test_runs_and_parts_cover_a_row_without_overlap():
    labels, mask = [-100, -100, 7, 7, -100, 7], [False, False, True, True, False, True]
    row = Row([1, 2, 3, 4, 5, 6], labels, mask, "rto", 3)
    assert parts(row, 2) == [("prompt", 0, 2), ("RTO", 2, 6)]
    assert list(runs(row, 0, 6)) == [("read", 0, 2), ("rto", 2, 4), ("read", 4, 5), ("rto", 5, 6)]
    mle = Row([1, 2, 3, 4], [-100, -100, 3, 4], [False] * 4, "mle", 1)
    assert parts(mle, 1) == [("prompt", 0, 1), ("prefix", 1, 2), ("MLE", 2, 4)]


@pytest.mark.parametrize("values", [[0, 0], [0, 1, 2, 3], [5, 100, 999, 0, 1]])
def test_a_histogram_counts_every_value_once(values):
    bins = histogram(values)
    assert sum(count for _, count in bins) == len(values)
    assert bins[0] == ("0", values.count(0))
    assert len(bins) <= 9


def test_the_summary_counts_what_training_gets(bpe_tokenizer):
    records = [{**TRIPLE, "rejected": "Step one . " * (number + 1)} for number in range(12)]
    config = DeRTaConfig(num_prefixes=2)
    reader = RecordTokenizer.for_config(bpe_tokenizer, config)
    rows = []
    for index, record in enumerate(records):
        options = {"refusal_token_id": 1, "max_length": 40, "index": index}
        rows += build_rows(reader.triple(parse_record(record)), config, **options)
    places = [is_rto for row in rows for is_rto, label in zip(row.rto_mask, row.labels, strict=True) if label != -100]
    trained = {"mle": places.count(False), "rto": places.count(True)}
    lengths = sorted(len(row.input_ids) for row in rows)
    cut = sum(row.num_truncated > 0 for row in rows)
    assert cut, "the case needs a row that does not fit"

    text = printed(records, bpe_tokenizer, max_length=40, knobs={"num_prefixes": 2})
    assert re.search(r"records +12 triples, none bad", text)
    assert re.search(r"rows +36: 24 MLE, 12 RTO", text)
    assert f"{sum(trained.values()):,} tokens: {trained['mle']:,} MLE, {trained['rto']:,} RTO" in text
    assert f"min {lengths[0]}, median {(lengths[17] + lengths[18]) / 2:,.0f}, max {lengths[-1]} tokens" in text
    assert f"{cut} rows (--max-length 40)" in text
    assert "100% of 12 safe responses begin with it" in text
    histogram_lines = re.findall(r"^(?:prefix k)? +[\d-]+ +(\d+)(?: █+)?$", text.split("prefix k")[1], re.MULTILINE)
    assert sum(map(int, histogram_lines)) == 24


def test_a_record_draws_by_its_place_in_the_file(bpe_tokenizer):
    """As in training, where a mixed file is split by format but its records keep their places."""
    records = [{**TRIPLE, "rejected": "Step one . " * 9} for _ in range(6)]
    mixed = [row for record in records for row in (record, HELPFUL)]
    view = View(bpe_tokenizer, DeRTaConfig())
    apart = [survey([HELPFUL] * (2 * place) + records[:1], view, limit=0).prefix_lengths[0] for place in range(6)]
    assert survey(mixed, view, limit=0).prefix_lengths == apart


def test_epoch_and_seed_change_the_draws_and_not_the_counts(bpe_tokenizer):
    records = [{**TRIPLE, "rejected": "Step one . " * 20} for _ in range(8)]
    configs = [(0, 0), (0, 0), (0, 1), (1, 0)]
    views = [View(bpe_tokenizer, DeRTaConfig(seed=seed), None, epoch) for seed, epoch in configs]
    seen = [survey(records, view, limit=0) for view in views]
    draws = [found.prefix_lengths for found in seen]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3]
    assert len({(found.rows["mle"], found.rows["rto"], found.targets["rto"]) for found in seen}) == 1


@pytest.mark.parametrize(("method", "rto_rows"), [("derta", 3), ("vanilla", 0), ("recaug", 0)])
def test_a_baseline_has_no_rto_row(bpe_tokenizer, method, rto_rows):
    found = survey([TRIPLE] * 3, View(bpe_tokenizer, DeRTaConfig(method=method)), limit=0)
    assert (found.rows["mle"], found.rows["rto"]) == (3, rto_rows)


def test_bad_records_are_grouped_with_their_places(bpe_tokenizer):
    text = printed([TRIPLE, *[BAD] * 7, {**TRIPLE, "rejected": TRIPLE["chosen"]}], bpe_tokenizer)
    assert re.search(r"7 │ 1, 2, 3, 4, … │ rejected │ is empty\.", text)
    assert re.search(r"1 │ 8 +│ rejected │ is the same text as the safe response\.", text)
    assert re.search(r"records +1 triple, 8 bad", text)


def test_many_reasons_are_cut_with_a_count(bpe_tokenizer):
    bad = [{**TRIPLE, "prompt": "long " * (200 + number)} for number in range(12)]
    text = printed([TRIPLE, *bad], bpe_tokenizer, max_length=64)
    assert "and 4 more for 4 other reasons" in text


def test_index_shows_that_record_even_beyond_the_cap(bpe_tokenizer):
    records = [{**TRIPLE, "prompt": f"How do I paint {number} ?"} for number in range(5)]
    text = printed(records, bpe_tokenizer, index=3, max_records=2)
    assert "record 3: triple" in text
    assert "How do I paint 3 ?" in text
    assert "record 0:" not in text
    assert "the first 4 of 5 records (--max-records reads more)" in text


def test_index_of_a_bad_record_leads_its_group(bpe_tokenizer):
    assert re.search(r"6 │ 5, 1, 2, 3, … │ rejected", printed([TRIPLE, *[BAD] * 6], bpe_tokenizer, index=5))


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_outside_is_refused(bpe_tokenizer, index):
    with pytest.raises(RecordsNotFoundError, match=rf"in 0 to 1, got {index}"):
        printed([TRIPLE] * 2, bpe_tokenizer, index=index)


def test_an_ordinary_row_is_left_to_its_host(bpe_tokenizer):
    text = printed([HELPFUL, TRIPLE], bpe_tokenizer)
    assert "your host tokenises it and decides which are trained" in text
    assert re.search(r"host +\d+ <\|im_start\|>user⏎\n +Hello<\|im_end\|>⏎", text)
    assert re.search(r"rows +2: 1 MLE, 1 RTO, and 1 of your host", text)


@pytest.mark.parametrize(
    "record",
    [
        {"text": "some text"},
        {"prompt": "some ", "completion": "text"},
        {"prompt": [{"role": "user", "content": "some"}], "completion": [{"role": "assistant", "content": "text"}]},
        {"messages": [{"role": "user", "content": "some text"}]},
    ],
    ids=["text", "prompt-completion", "conversational", "messages"],
)
def test_a_file_of_ordinary_rows_is_no_error(bpe_tokenizer, record):
    text = printed([record], bpe_tokenizer)
    assert "there is no safety record here" in text
    assert "some" in text
    assert "MLE" not in text


def test_a_template_that_refuses_an_ordinary_row_is_said(word_tokenizer):
    text = printed([{"messages": [{"role": "user", "content": "Hello"}]}], _refusing(word_tokenizer))
    assert "chat template refuses it: no users here" in text


def _refusing(tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('no users here') }}"
    return refusing


@pytest.mark.parametrize(
    ("record", "likeness"),
    [
        ({"question": "q"}, "There is no response in it: it looks like prompts for evaluation."),
        ({"prompt": "q", "response": "r"}, "That is one response per prompt, as in model outputs"),
        ({"input_ids": [1, 2]}, ""),
    ],
)
def test_a_file_without_training_record_is_explained(bpe_tokenizer, record, likeness):
    text = printed([record] * 4, bpe_tokenizer, error=NoTrainingRecordError, width=200)
    assert f"No training record: its columns are {', '.join(record)}." in text
    assert likeness in text
    assert re.search(r"4 │ 0, 1, 2, 3 │", text)
    assert re.search(r"DeRTa authors' triples +instruction, output, safe_response", text)


def test_error_mode_stops_at_the_first_bad_record(bpe_tokenizer):
    with pytest.raises(BadRecordError, match="Record 1, field `rejected`"):
        survey([TRIPLE, BAD], View(bpe_tokenizer, DeRTaConfig()), limit=0)


def test_a_rare_refusal_text_is_remarked_on(bpe_tokenizer):
    records = [TRIPLE, *[{**TRIPLE, "chosen": "I will not ."}] * 3]
    text = printed(records, bpe_tokenizer, knobs={"refusal_text": "Sorry"})
    assert "from --refusal-text; 25% of 4 safe responses begin with it" in text
    assert "few: RTO would train a token that most refusals do not go on from" in text
    assert "'I'" in printed(records, bpe_tokenizer)


def test_a_refusal_text_of_several_tokens_is_refused(bpe_tokenizer):
    found = survey([TRIPLE], View(bpe_tokenizer, DeRTaConfig()), limit=0)
    with pytest.raises(RefusalTokenError, match="must be one token"):
        target_of(View(bpe_tokenizer, DeRTaConfig(refusal_text="Sorry , no")), found)


def test_authors_rows_show_their_fixed_objective(bpe_tokenizer):
    rows = [
        {"prefix": "[INST] paint [/INST]", "text": " Sorry , no .", "safe": "false"},
        {"prefix": "[INST] paint [/INST]", "text": " Step one .", "safe": "true"},
    ]
    text = printed(rows, bpe_tokenizer)
    assert "record 1: row of the authors' file" in text
    assert "⟦ Sorry , no .<|im_end|>⟧" in text
    assert "⟪ Step one .<|im_end|>⟫" in text
    with pytest.raises(ConfigError, match="needs triples"):
        printed(rows, bpe_tokenizer, knobs={"method": "vanilla"})


def test_the_word_tokenizer_reads_text_back_unchanged():
    texts = ["Sorry, I won't.\n\nStep  one:\tgather", " é 😀 x"]
    records = [{**TRIPLE, "chosen": texts[0]}, {**TRIPLE, "prompt": [{"role": "user", "content": texts[1]}]}]
    tokenizer = word_tokenizer(records)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(tokenizer("Sorry, I won't")["input_ids"]) == ["Sorry", ",", " I", " won't"]


def test_a_part_keeps_the_space_that_a_tokenizer_drops_when_it_decodes_alone():
    tokenizer = metaspace_unigram()
    alone = tokenizer.decode(tokenizer("the castle wall")["input_ids"][-2:])
    assert not alone.startswith(" "), "else this test shows nothing"
    triple = {"prompt": "castle", "chosen": "Sorry , I will not", "rejected": "Step one : gather the moon dust ."}
    text = printed([{**triple, "prompt": "How"}], tokenizer, knobs={"rto_keep_ratio": 0.4, "prefix_unit": "word"})
    row = re.sub("[⟪⟫]", "", text.split("row 2")[1])
    assert "Step one : gather the moon dust ." in row
