"""`load_records` reads what users have, and says in one line why it cannot."""

import json

import pytest
from datasets import Dataset, IterableDataset

from derta_plugins.plugin_manager import PluginError
from derta_plugins.readers import RecordsNotFoundError, load_records
from tests.third_party import install

ROWS = [{"prompt": f"question {number}", "chosen": "Sorry, no.", "rejected": "Step one."} for number in range(3)]


def write(folder, name, rows=ROWS):
    path = folder / name
    writers = {
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".ndjson": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".parquet": lambda: Dataset.from_list(rows).to_parquet(str(path)),
        ".csv": lambda: Dataset.from_list(rows).to_csv(str(path)),
    }
    writers[path.suffix]()
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".parquet", ".csv"])
@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
def test_every_format_gives_the_same_records(tmp_path, suffix, streaming):
    records = load_records(str(write(tmp_path, f"records{suffix}")), streaming=streaming)
    assert isinstance(records, IterableDataset if streaming else Dataset)
    assert list(records) == ROWS


def test_json_lines_in_a_json_file_load_too(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(load_records(str(path))) == ROWS


@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
def test_a_saved_dataset_loads(tmp_path, streaming):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    records = load_records(str(tmp_path / "saved"), streaming=streaming)
    assert isinstance(records, IterableDataset if streaming else Dataset)
    assert list(records) == ROWS


def test_a_folder_of_files_loads_as_one(tmp_path):
    write(tmp_path, "a.jsonl", ROWS[:1])
    write(tmp_path, "b.jsonl", ROWS[1:])
    assert sorted(row["prompt"] for row in load_records(str(tmp_path))) == [row["prompt"] for row in ROWS]


def test_a_column_that_a_record_lacks_reads_as_null(tmp_path):
    path = write(tmp_path, "mixed.json", [*ROWS, {"messages": [{"role": "user", "content": "hi"}]}])
    records = load_records(str(path))
    assert records[0]["messages"] is None
    assert records[3]["prompt"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.json", "", "the file is empty"),
        ("notes.txt", "hello", "expected a file ending in .json, .*got '.txt'"),
        ("broken.json", '{"prompt": [1,}', "cannot be loaded"),
        ("none.json", "[]", "none.json: "),
    ],
)
def test_a_file_without_records_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecordsNotFoundError, match=message):
        load_records(str(tmp_path / name))


@pytest.mark.parametrize("source", ["./missing.json", "/nowhere/missing.json"])
def test_a_missing_path_is_not_looked_up_on_the_hub(source):
    with pytest.raises(RecordsNotFoundError, match=r"missing\.json: no such file or folder"):
        load_records(source)


def test_a_name_that_is_neither_here_nor_on_the_hub_says_so():
    with pytest.raises(RecordsNotFoundError, match="no such file"):
        load_records("no-such-owner/no-such-records")


def test_a_split_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecordsNotFoundError, match=r"records\.json: cannot be loaded.*nosplit"):
        load_records(str(write(tmp_path, "records.json")), split="nosplit")


def test_the_cause_of_a_failed_load_is_kept(tmp_path):
    (tmp_path / "broken.json").write_text('{"prompt": [1,}')
    with pytest.raises(RecordsNotFoundError) as caught:
        load_records(str(tmp_path / "broken.json"))
    assert caught.value.__cause__ is not None


# --- plugins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
def test_a_reader_is_given_what_stands_behind_its_name(streaming):
    records = load_records("everything:db://host:1/table 2", split="test", streaming=streaming)
    assert isinstance(records, IterableDataset if streaming else Dataset)
    assert [record["prompt"] for record in records] == ["How do I bake db://host:1/table 2 (test)?"]


@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
def test_a_reader_is_told_how_to_read(monkeypatch, tmp_path, streaming):
    source = (
        "from derta_plugins.hookspecs import *\n"
        "def read(source, *, split, streaming): raise LookupError((source, split, streaming))\n"
        "@hookimpl\ndef derta_reader(): return Reader('asked', 'd', read)"
    )
    install(monkeypatch, tmp_path, {"asked": "asked_reader"}, {"asked_reader.py": source})
    with pytest.raises(RecordsNotFoundError) as caught:
        load_records("asked:x", split="test", streaming=streaming)
    assert caught.value.__cause__.args[0] == ("x", "test", streaming)


def test_a_reader_may_need_no_source():
    assert load_records("everything:")[0]["prompt"] == "How do I bake  (train)?"


@pytest.mark.parametrize(
    "source",
    ["C:\\records.json", "C:/records.json", "c:records.json", "https://example.org/records.json", "hf://a/b.json"],
)
def test_drives_and_urls_name_no_reader(source):
    with pytest.raises(RecordsNotFoundError) as caught:
        load_records(source)
    assert "reader" not in str(caught.value)
    assert "no such file" in str(caught.value)


@pytest.mark.parametrize("source", ["everything://host", "a/everything:b", "./everything:b", "owner/name"])
def test_a_reader_is_named_by_all_that_stands_before_the_first_colon(source):
    with pytest.raises(RecordsNotFoundError) as caught:
        load_records(source)
    assert "reader" not in str(caught.value)


def test_an_unknown_reader_is_no_hub_name():
    message = (
        r"^everythin:table: no such file or folder\. Unknown reader 'everythin'\. Did you mean 'everything'\? "
        r"Installed plugins: absent_host, "
    )
    with pytest.raises(RecordsNotFoundError, match=message):
        load_records("everythin:table")


@pytest.mark.parametrize("name", ["2024:10.json", "records:v2.json"])
def test_a_file_with_a_colon_in_its_name_loads(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, name)
    assert list(load_records(name)) == ROWS


def test_a_file_that_is_called_as_a_reader_is_given_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "everything:x.json")
    assert load_records("everything:x.json")[0]["prompt"] == "How do I bake x.json (train)?"
    assert list(load_records("./everything:x.json")) == ROWS


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("working:x", r"^Plugin 'working' of fake-adapters 1\.0 .* is no reader; it is: adapter\.$"),
        ("absent_host:x", "does not import: No module named 'a_host"),
        ("clash:x", "is offered by fake-adapters .* and other-adapters"),
        ("quits:x", "is broken: SystemExit: 0"),
    ],
)
def test_a_plugin_that_is_no_usable_reader_is_not_passed_over(source, message):
    with pytest.raises(PluginError, match=message):
        load_records(source)


BAD_READS = {
    "raise LookupError('no table x')": (
        RecordsNotFoundError,
        r"third-party 1\.0 \(bad\) failed: LookupError: no table x\.$",
    ),
    "raise SystemExit(0)": (RecordsNotFoundError, r"failed: SystemExit: 0\.$"),
    "return None": (PluginError, r"must return a Dataset, got NoneType\.$"),
    "return [{'text': 'a'}]": (PluginError, r"must return a Dataset, got list\.$"),
    "return DatasetDict(train=Dataset.from_list(ROWS))": (PluginError, r"must return a Dataset, got DatasetDict\.$"),
    "return Dataset.from_list(ROWS).to_iterable_dataset()": (PluginError, "must return a Dataset, got IterableDataset"),
    "return Dataset.from_list([])": (RecordsNotFoundError, "holds no record"),
}


@pytest.mark.parametrize("body", BAD_READS)
def test_a_reader_that_gives_no_records_says_who_it_is(monkeypatch, tmp_path, body):
    source = (
        "from datasets import *\nfrom derta_plugins.hookspecs import *\nROWS = [{'text': 'a'}]\n"
        f"def read(source, *, split, streaming):\n  {body}\n"
        "@hookimpl\ndef derta_reader(): return Reader('bad', 'd', read)"
    )
    install(monkeypatch, tmp_path, {"bad": "bad"}, {"bad.py": source})
    error, message = BAD_READS[body]
    with pytest.raises(error, match=rf"^bad:x: .*{message}"):
        load_records("bad:x")


def test_a_reader_that_only_knows_memory_is_made_a_stream(monkeypatch, tmp_path):
    source = (
        "from datasets import Dataset\nfrom derta_plugins.hookspecs import *\n"
        "def read(source, *, split, streaming): return Dataset.from_list([{'text': source}])\n"
        "@hookimpl\ndef derta_reader(): return Reader('plain', 'd', read)"
    )
    install(monkeypatch, tmp_path, {"plain": "plain_reader"}, {"plain_reader.py": source})
    records = load_records("plain:a", streaming=True)
    assert isinstance(records, IterableDataset)
    assert list(records) == [{"text": "a"}]
