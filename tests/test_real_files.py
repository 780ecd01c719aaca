"""
Files that other people published, read as they are: what they become, and what is said of those that train nothing.

The files lie outside the package and some hold unsafe text, so an assertion never prints what a command put out.
"""

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from derta_plugins import cli
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.records import Triple, parse_record
from derta_plugins.readers import load_records
from derta_plugins.survey import View, survey

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_files = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the published files are not here ({FOLDER})")

TRIPLES = [
    {"instruction": f"How do I paint wall {n} ?", "output": "Step one : moon dust .", "safe_response": "Sorry , no ."}
    for n in range(4)
]


@pytest.fixture(autouse=True)
def no_progress_bars():
    """`main` switches them off by the environment, which is too late in a process that runs tests."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def show(path, *options):
    shown = CliRunner().invoke(cli.app, ["show", str(path), *options], env={"COLUMNS": "120"})
    assert "Traceback" not in shown.output
    return shown


def has(shown, pattern):
    """Whether the output has `pattern`; the output itself never gets into a failed assertion."""
    return re.search(pattern, " ".join(shown.stdout.split())) is not None


def parsed(path):
    return [parse_record(record) for record in load_records(str(path))]


@needs_files
def test_the_authors_training_rows_keep_their_objectives():
    path = FOLDER / "official" / "train_format_example.json"
    assert Counter(row.objective for row in parsed(path)) == {"mle": 3, "rto": 1}
    shown = show(path, "--limit", "4")
    assert shown.exit_code == 0
    assert has(shown, r"records +4 rows of the authors' file, none bad")
    assert has(shown, r"rows +4: 3 MLE, 1 RTO")
    assert shown.stdout.count("row 1 of 1: MLE") == 3
    assert shown.stdout.count("row 1 of 1: RTO") == 1
    assert has(shown, r"is assumed: these rows do not tell which responses are refusals")
    assert not has(shown, r"\x1b")


@needs_files
def test_the_flag_of_the_authors_file_marks_the_harmful_response():
    path = FOLDER / "official" / "train_format_example.json"
    flags = [json.loads(line)["safe"] for line in path.read_text().splitlines()]
    assert [row.objective == "rto" for row in parsed(path)] == [flag == "true" for flag in flags]


@needs_files
@pytest.mark.parametrize("name", ["illegal_instructions_200", "completionattack", "codeattack"])
def test_evaluation_questions_are_explained(name):
    shown = show(FOLDER / "official" / f"safety_{name}.json")
    assert shown.exit_code == 2
    assert has(shown, r"No training record: its columns are question\. .*prompts for evaluation")
    assert has(shown, r"records +197 bad")
    assert re.fullmatch(rf"derta: .*{name}\.json: no training record among 197; .*\n", shown.stderr)


@needs_files
def test_attack_prompts_are_explained():
    shown = show(FOLDER / "system2" / "wildjailbreak_mini_test.json")
    assert shown.exit_code == 2
    assert has(shown, r"No training record: its columns are adversarial, label, data_type\. .*prompts for evaluation")
    assert "no training record among 381" in shown.stderr


@needs_files
def test_model_outputs_are_explained_and_not_printed():
    path = FOLDER / "calibration" / "responses.jsonl"
    shown = show(path)
    assert shown.exit_code == 2
    assert has(shown, r"No training record: its columns are model, attack, prompt, response")
    assert has(shown, r"one response per prompt, as in model outputs")
    assert has(shown, r"records +1,270 bad")
    responses = [json.loads(line)["response"] for line in path.read_text().splitlines()]
    leaked = sum(len(response) > 40 and response[:40] in shown.stdout for response in responses)
    assert leaked == 0


@needs_files
def test_preference_rows_are_triples():
    path = FOLDER / "system2" / "dpo_head40.json"
    records = parsed(path)
    assert len(records) == 40
    assert all(isinstance(record, Triple) for record in records)
    shown = show(path, "--limit", "1")
    assert shown.exit_code == 0
    assert has(shown, r"records +40 triples, none bad")
    assert has(shown, r"rows +80: 40 MLE, 40 RTO")
    assert has(shown, r"more tokens \(--full\)")


@needs_files
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/*.json*")), ids=lambda path: path.name)
def test_every_record_is_read_or_refused_with_a_reason(path, word_tokenizer):
    records = load_records(str(path))
    found = survey(records, View(word_tokenizer, DeRTaConfig(on_bad_record="skip"), None), limit=0)
    assert found.kinds.total() + sum(map(len, found.bad.values())) == len(records)
    assert all(field and reason for field, reason in found.bad)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_authors_triples_load_from_json_and_json_lines(tmp_path, suffix):
    path = tmp_path / f"triples{suffix}"
    lines = [json.dumps(row) for row in TRIPLES]
    path.write_text("\n".join(lines))  # the authors' file is JSON Lines under the name .json
    assert parsed(path)[0] == Triple("How do I paint wall 0 ?", "Sorry , no .", "Step one : moon dust .")
    shown = show(path, "--limit", "1", "--zero-prefix-ratio", "1")
    assert shown.exit_code == 0
    assert has(shown, r"⟦Sorry , no \.<\|im_end\|>⟧")
    assert has(shown, r"⟪Step one : moon dust \.<\|im_end\|>⟫")
    assert has(shown, r"rows +8: 4 MLE, 4 RTO")
