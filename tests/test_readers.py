"""`load_records` reads what users have, and says in one line why it cannot."""

import json

import pytest
from datasets import Dataset, IterableDataset

from derta_plugins.readers import RecordsNotFoundError, load_records

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
