"""Many records and many ranks: what a process holds does not grow with them, and a stream is shared out."""

import gc
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import asdict

import pytest
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader

from derta_plugins.adapters.prepare import Preparation, RowCounts, count_first_ids, count_rows, prepare, split_by_format
from derta_plugins.adapters.row_datasets import (
    INDEX,
    ROW_COUNTS,
    TOKENIZED,
    TOKENIZED_FEATURES,
    BuildRows,
    ResampledRows,
    concatenate,
    map_tokenized,
    tokenize_records,
)
from derta_plugins.core.chat import RecordTokenizer, TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from tests.adapters.trl_stream_worker import main as see_the_stream
from tests.benchmarks.transform import measure, write_triples
from tests.conftest import byte_level_bpe, helpful_records, safety_records
from tests.readme_blocks import ROOT, run

CONFIG = DeRTaConfig()
SHARDS = 4


def how(**knobs):
    def host_rows(group):
        return group.map(lambda record: {"input_ids": [1, 2], "labels": [-100, 2]}, remove_columns=["messages"])

    return Preparation(DeRTaConfig(**knobs), byte_level_bpe(), host_rows, 128, 0.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve triples and twelve helpful records, in four files of each; all triples differ."""
    folder = tmp_path_factory.mktemp("files")
    for shard in range(SHARDS):
        triples, helpful = safety_records(3), helpful_records(3)
        for number in range(3):
            triples[number]["prompt"] += f" {shard} {number}"
            triples[number]["rejected"] += f" {shard} {number} {'and more words' * (shard + number)}"
            helpful[number]["messages"][0]["content"] += f" {shard} {number}"
        for name, records in (("triples", triples), ("helpful", helpful)):
            (folder / f"{name}-{shard}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def read(folder, name, *, streaming):
    return load_dataset(
        "json", data_files=str(folder / f"{name}-*.jsonl"), split="train", streaming=streaming,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip


def texts(rows):
    return sorted(str((row["input_ids"], row["labels"], row["rto_mask"])) for row in rows)


# Streams


def test_two_ranks_share_a_stream_out(files, monkeypatch):
    """As `accelerate` does it for TRL: each record is tokenised by one rank, and drawn for as by one process."""
    monkeypatch.setattr(RecordTokenizer, "triple", RecordTokenizer.triple)  # the worker replaces it
    see_the_stream(str(files))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    worker = [str(ROOT / "tests" / "adapters" / "trl_stream_worker.py"), str(files)]
    ranked = subprocess.run(
        [*command, "--rdzv_endpoint=localhost:0", *worker], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ranked.returncode == 0, ranked.stderr[-3000:]
    names = ("1-0", "2-0", "2-1")
    alone, *ranks = [json.loads((files / f"seen-{name}.json").read_text()) for name in names]
    tokenized = [set(seen["tokenized"]) for seen in (alone, *ranks)]
    assert len(tokenized[0]) == 12
    assert not tokenized[1] & tokenized[2]
    assert tokenized[1] | tokenized[2] == tokenized[0]
    rows = [set(map(str, seen["rows"])) for seen in (alone, *ranks)]
    assert len(rows[0]) == 36, "12 helpful rows, and two of each triple"
    assert not rows[1] & rows[2]
    assert rows[1] | rows[2] == rows[0]


@pytest.mark.parametrize("workers", [0, 2], ids=["shards", "loader_workers"])
def test_draws_of_a_stream_do_not_depend_on_who_reads_a_shard(files, workers):
    stream = prepare(how(rto_keep_ratio=0.5), read(files, "triples", streaming=True)).rows
    whole = texts(stream)
    parts = [stream.shard(2, 0), stream.shard(2, 1)] if not workers else [DataLoader(stream, None, num_workers=workers)]
    assert whole == sorted(text for part in parts for text in texts(part))
    assert len(set(whole)) == 24


def test_draws_of_a_stream_differ_from_record_to_record(files):
    tokenized = tokenize_records(
        read(files, "triples", streaming=True), byte_level_bpe(), CONFIG, max_length=None, skipped=Counter()
    )
    draws = [record["index"] for record in tokenized]
    assert len(set(draws)) == len(draws) == 12
    assert 2**40 < max(draws) < 2**56, "places, or too long for the column"


@pytest.mark.parametrize("streamed", ["helpful", "triples"])
def test_rows_in_memory_are_cut_into_the_shards_of_the_stream(files, streamed):
    """Or the mixed stream had one shard, and every rank would read and tokenise all of it."""
    ordinary, safety = (read(files, name, streaming=name == streamed) for name in ("helpful", "triples"))
    rows = prepare(how(), ordinary, safety=safety).rows
    assert rows.num_shards == SHARDS
    parts = [texts(rows.shard(SHARDS, index)) for index in range(SHARDS)]
    assert {text for part in parts for text in part} == set(texts(rows))
    safety_rows = [{text for text in part if "True" in text} for part in parts]
    assert sum(map(len, safety_rows)) == len(set.union(*safety_rows)) == 12


# Memory


def stored(folder, records, features=None):
    """Records in a file that is mapped into memory."""
    Dataset.from_dict(records, features=features).save_to_disk(folder)
    return Dataset.load_from_disk(folder)


def tokenized_triples(folder, count):
    triple = {name: [] for name in ("end_ids", "word_ends", "earlier_turns")}
    triple |= {"prompt_ids": [1, 2, 3], "is_authors_row": False, "is_authors_rto": False}
    triples = [{**triple, "chosen_ids": [5 + place % 3], "rejected_ids": [7] * 9} for place in range(count)]
    columns = {TOKENIZED: triples, "index": list(range(count)), "skipped": [""] * count}
    return stored(folder, columns, TOKENIZED_FEATURES)


def plain_triples(folder, count):
    numbers = range(count)
    sides = {"chosen": [f"no {place}" for place in numbers], "rejected": [f"step {place}" for place in numbers]}
    return stored(folder, {"prompt": [f"wall {place}" for place in numbers], **sides})


def tokenize_quickly(record, index):
    return {
        TOKENIZED: dict.fromkeys(TOKENIZED_FEATURES[TOKENIZED]) | {"is_authors_row": False}, "index": index,
        "skipped": "",
    }  # fmt: skip


GROWING = {
    "telling formats apart": (plain_triples, lambda records: split_by_format(records, CONFIG, Counter())),
    "tokenising": (plain_triples, lambda records: map_tokenized(records, tokenize_quickly, skipped=Counter())),
    "the target": (tokenized_triples, count_first_ids),
    "building": (tokenized_triples, lambda tokenized: ResampledRows(None, tokenized, BuildRows(CONFIG, 5, 64))),
    "counting rows": (
        lambda folder, count: stored(folder, {name: [1] * count for name in ROW_COUNTS}),
        lambda rows: count_rows(rows, RowCounts()),
    ),
}


@pytest.mark.parametrize("name", GROWING)
def test_what_python_holds_grows_by_a_few_bytes_per_record(tmp_path, name):
    make, step = GROWING[name]
    few, many = 3000, 12000
    peaks = {}
    for count in (few, few, many):  # the first time fills caches
        records = make(tmp_path / f"{len(peaks)}-{count}", count)
        gc.collect()
        tracemalloc.start()
        step(records)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[many] - peaks[few]) / (many - few) < 24


def test_rows_are_not_copied_where_nothing_is_left_out(tmp_path):
    records = plain_triples(tmp_path / "triples", 5)
    (group,) = split_by_format(records, CONFIG, Counter()).values()
    assert group.column_names == records.column_names, "a column of places would be kept in memory"
    tokenized = map_tokenized(group, tokenize_quickly, skipped=Counter())
    assert tokenized._indices is None, "a table of places makes every later read slow"
    rows = prepare(how(), records).rows
    assert concatenate([rows], CONFIG).cache_files == rows.cache_files != []


def test_records_of_a_mixed_set_keep_their_places():
    bad = {"chosen": "no"}
    records = [*helpful_records(1), *safety_records(2), bad, *helpful_records(1), *safety_records(1), bad]
    columns = ("messages", "prompt", "chosen", "rejected")
    dataset = Dataset.from_list([{name: record.get(name) for name in columns} for record in records])
    skipped = Counter()
    groups = split_by_format(dataset, DeRTaConfig(on_bad_record="skip"), skipped)
    assert [group[INDEX][:] for group in groups.values()] == [[0, 4], [1, 2, 5]]
    assert skipped.total() == 2


def test_first_ids_are_those_of_triples_with_an_answer(tmp_path):
    records = tokenized_triples(tmp_path / "triples", 7).to_list()
    records[0][TOKENIZED]["is_authors_row"] = True
    records[1][TOKENIZED]["chosen_ids"] = []
    chosen, rejected = count_first_ids(Dataset.from_list(records, features=TOKENIZED_FEATURES))
    assert chosen == {7: 2, 5: 2, 6: 1}
    assert rejected == {7: 6}


def test_rows_are_counted_by_what_they_hold():
    held = {"mle_rows": [1, 0, 1, 2, 0], "rto_rows": [0, 1, 1, 0, 0], "truncated_rows": [1, 0, 0, 0, 0]}
    counts = RowCounts(mle_rows=1)
    assert count_rows(Dataset.from_dict({**held, "limited_rows": [0, 0, 0, 2, 0]}), counts) == 4
    assert counts == RowCounts(mle_rows=5, rto_rows=2, branch_rows=2, truncated_rows=1, limited_prefixes=2)


# The page and the benchmark


PAGE = (ROOT / "examples" / "scale.md").read_text(encoding="utf-8")
ARITHMETIC, PREPARE, TRAIN = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_says_what_its_arithmetic_prints(tmp_path):
    result = run([sys.executable, "-c", ARITHMETIC], tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 7
    assert [line for line in lines if line not in PAGE.splitlines()] == []


def test_the_speed_that_the_page_counts_with_is_the_one_that_it_shows():
    (speed,) = re.findall(r"^core_ms = ([\d.]+) ", ARITHMETIC, re.MULTILINE)
    titles, *lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    (measured,) = [line for line in lines if line[:2] == ["100000", "memory-1"]]
    assert measured[titles.index("CPU s / 1000")] == speed


def test_the_formula_of_the_page_is_what_the_rows_hold():
    triple = TokenizedTriple((1,) * 64, (5,) * 96, (7,) * 256, end_ids=(0,))
    for layout, by_formula in (("rows", 64 + 256 / 3 + 96 + 64 + 256), ("branch", 64 + 256 + 96)):
        build = BuildRows(DeRTaConfig(layout=layout), 5, None)
        asked = [build.rows({**asdict(triple), "is_authors_row": False}, index) for index in range(300)]
        held = sum(len(row.input_ids) for rows in asked for row in rows) / len(asked)
        assert held == pytest.approx(by_formula, rel=0.02), layout


def test_the_blocks_of_the_page_prepare_and_train(user_folder):
    (user_folder / "rows").mkdir()
    prepared = run([sys.executable, "-c", PREPARE, "triples.jsonl", "rows/0.parquet"], user_folder)
    assert prepared.returncode == 0, prepared.stderr[-3000:]
    block = TRAIN.replace("output_dir=", "use_cpu=True, bf16=False, logging_steps=1, output_dir=")
    trained = run([sys.executable, "-c", block], user_folder)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "'rto_loss'" in trained.stdout


def test_the_benchmark_measures(tmp_path):
    write_triples(tmp_path, 40)
    line = measure(tmp_path, 40, "memory-2")
    assert line["rows"] == 80
    assert line["children_anon"] > 50
    assert 0 < line["cpu"]
    assert line["main_resident"] > line["main_anon"] > 50
