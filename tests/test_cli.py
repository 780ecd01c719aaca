"""The command `derta`: its help, its exit codes, and one readable sentence for each mistake."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from typer.testing import CliRunner

import derta_plugins
from derta_plugins import cli
from tests.conftest import byte_level_bpe, helpful_records, safety_records

DERTA = Path(sys.executable).with_name("derta")
COMMANDS = ("show", "doctor", "demo", "plugins")


@pytest.fixture(autouse=True)
def no_progress_bars():
    """`main` switches them off by the environment, which is too late in a process that runs tests."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def derta(*arguments, **environment):
    """Run the command in this process."""
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "120", **environment})


def run_script(*arguments, **options):
    """Run the installed script as a user does."""
    assert DERTA.exists(), "the command is not installed: pip install -e ."
    return subprocess.run([DERTA, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with good and bad files, and saved tokenizers."""
    folder = tmp_path_factory.mktemp("records")
    contents = {
        "triples.json": json.dumps(safety_records(5)),
        "mixed.json": json.dumps([*safety_records(2), {"prompt": "q", "chosen": "a", "rejected": ""}]),
        "ordinary.json": json.dumps(helpful_records(2)),
        "questions.json": json.dumps([{"question": "q"}]),
        "authors.json": json.dumps([{"prefix": "[INST] q [/INST]", "text": " Sorry , no .", "safe": "false"}]),
        "empty.json": "",
        "broken.json": '{"prompt": [1,}',
        "notes.txt": "hello",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    byte_level_bpe().save_pretrained(folder / "bpe")
    byte_level_bpe(chat_template=None).save_pretrained(folder / "no-template")
    (folder / "no-tokenizer").mkdir()
    return folder


def test_version_is_that_of_the_package():
    assert derta("--version").stdout == f"derta {derta_plugins.__version__}\n"


def test_help_names_every_command():
    shown = derta("--help")
    assert shown.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"│ {command} ", shown.stdout)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", ["80", "120"])
def test_help_lists_and_explains_every_option(command, width):
    import typer.main

    shown = derta(command, "--help", COLUMNS=width).stdout
    options = [
        parameter
        for parameter in typer.main.get_command(cli.app).commands[command].params
        if parameter.opts[0][0] == "-"
    ]
    assert options
    for parameter in options:
        assert re.search(rf"│ {parameter.opts[0]} +\S", shown), parameter.opts[0]
        assert parameter.help
        assert parameter.help.split()[0] in shown


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from derta_plugins.cli import app;"
        "assert CliRunner().invoke(app, ['show', '--help']).exit_code == 0;"
        "print(*sorted({'torch', 'transformers', 'datasets', 'trl', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_defaults_are_those_of_the_config():
    import inspect

    from derta_plugins.core.config import DeRTaConfig

    defaults = {name: parameter.default for name, parameter in inspect.signature(cli.show).parameters.items()}
    names = set(defaults) & set(DeRTaConfig.__dataclass_fields__)
    assert len(names) >= 10
    differing = {name for name in names if defaults[name] != getattr(DeRTaConfig, name)}
    assert differing == {"zero_prefix_ratio", "on_bad_record"}, "the first is text, the second explains instead"
    assert cli._ratio(defaults["zero_prefix_ratio"]) == DeRTaConfig.zero_prefix_ratio


def test_show_prints_rows_and_summary(folder):
    shown = derta("show", folder / "triples.json", "--tokenizer", folder / "bpe", "--limit", "2")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("row 1 of 2: MLE") == 2
    assert "⟦Sorry , I will not help with the castle wall .<|im_end|>⟧" in shown.stdout
    assert "5 triples, none bad" in shown.stdout
    assert "one token per word" not in shown.stdout
    assert shown.stderr == ""


def test_show_without_tokenizer_says_so(folder):
    shown = derta("show", folder / "triples.json")
    assert shown.stdout.startswith("no --tokenizer: one token per word; pass yours to see what your model sees\n")
    assert "trained to be 'Sorry'" in shown.stdout


def test_some_good_records_are_enough(folder):
    shown = derta("show", folder / "mixed.json")
    assert shown.exit_code == 0
    assert "2 triples, 1 bad" in shown.stdout


def test_ordinary_records_are_training_records(folder):
    assert derta("show", folder / "ordinary.json").exit_code == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "recaug"], "5: 5 MLE, 0 RTO"),
        (["--num-prefixes", "3"], "20: 15 MLE, 5 RTO"),
        (["--rto-ratio", "0"], "5: 5 MLE, 0 RTO"),
        (["--refusal-text", "Sorry"], "from --refusal-text"),
        (["--zero-prefix-ratio", "1"], r"prefix k +0 5 █"),
        (["--zero-prefix-ratio", "none"], "5 triples"),
        (["--prefix-unit", "word"], "5 triples"),
        (["--rto-turns", "all"], "5 triples"),
        (["--rto-keep-ratio", "0.01"], r"\d+ MLE, 5 RTO"),
        (["--max-length", "30"], r"cut to fit +[1-9]\d* rows \(--max-length 30\)"),
        (["--max-records", "2"], "the first 2 of 5 records"),
        (["--index", "4"], "record 4: triple"),
        (["--limit", "0"], "^summary of 5 records"),
        (["--epoch", "3", "--seed", "7"], "5 triples"),
        (["--no-chat-template"], r"prompt +\d+ How do I paint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_change_what_is_shown(folder, options, expected):
    shown = derta("show", folder / "triples.json", "--tokenizer", folder / "bpe", *options)
    assert shown.exit_code == 0, shown.output
    assert re.search(expected, shown.stdout, re.MULTILINE)


BAD_INPUT = {
    "missing file": (["./missing.json"], "./missing.json: no such file or folder."),
    "empty file": (["{}/empty.json"], "empty.json: the file is empty."),
    "wrong suffix": (["{}/notes.txt"], "notes.txt: expected a file ending in .json, .*got '.txt'"),
    "broken JSON": (["{}/broken.json"], "broken.json: cannot be loaded"),
    "no training record": (["{}/questions.json"], "questions.json: no training record among 1"),
    "unknown split": (["{}/triples.json", "--split", "tset"], "cannot be loaded.*tset"),
    "unknown method": (
        ["{}/triples.json", "--method", "dertta"],
        "--method must be one of 'derta', 'vanilla', .*dertta",
    ),
    "unknown unit": (["{}/triples.json", "--prefix-unit", "letter"], "--prefix-unit must be one of .*'letter'"),
    "ratio no number": (["{}/triples.json", "--zero-prefix-ratio", "half"], "--zero-prefix-ratio must be a number"),
    "ratio over 1": (["{}/triples.json", "--zero-prefix-ratio", "3/2"], r"--zero-prefix-ratio must be .* got 1\.5"),
    "ratio by zero": (["{}/triples.json", "--zero-prefix-ratio", "1/0"], "--zero-prefix-ratio must be a number"),
    "keep nothing": (["{}/triples.json", "--rto-keep-ratio", "0"], r"--rto-keep-ratio must be a number in \(0, 1\]"),
    "index outside": (["{}/triples.json", "--index", "5"], "--index must be in 0 to 4, got 5"),
    "no such tokenizer": (["{}/triples.json", "--tokenizer", "./nope"], "--tokenizer ./nope: no such folder"),
    "no tokenizer in it": (["{}/triples.json", "--tokenizer", "{}/no-tokenizer"], "no-tokenizer: cannot be loaded"),
    "unknown hub name": (["{}/triples.json", "--tokenizer", "nobody/nothing"], "nobody/nothing: cannot be loaded"),
    "no template": (["{}/triples.json", "--tokenizer", "{}/no-template"], "no chat template.* --no-chat-template"),
    "several tokens": (
        ["{}/triples.json", "--tokenizer", "{}/bpe", "--refusal-text", "Sorry, no"],
        "'Sorry, no' must be one token, got 4: .*--allow-first-piece .*--refusal-text auto",
    ),
    "unknown word": (["{}/triples.json", "--refusal-text", "Entschuldigung"], "not in the tokenizer's vocabulary"),
    "error mode": (
        ["{}/mixed.json", "--on-bad-record", "error"],
        "Record 2, field `rejected`: is empty.*--on-bad-record skip",
    ),
    "baseline of fixed rows": (["{}/authors.json", "--method", "vanilla"], "--method vanilla needs triples"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_sentence(folder, case):
    arguments, message = BAD_INPUT[case]
    shown = derta("show", *(argument.replace("{}", str(folder)) for argument in arguments))
    assert shown.exit_code == 2, shown.output
    assert "Traceback" not in shown.output
    assert re.fullmatch(rf"derta: .*{message}.*\n", shown.stderr), shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["x.json", "--limit", "-1"], "--limit"),
        (["x.json", "--seed", "one"], "--seed"),
        (["x.json", "--metod", "derta"], "No such option"),
    ],
)
def test_misused_options_are_usage_errors(arguments, message):
    shown = derta("show", *arguments)
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert "Traceback" not in shown.output


def test_a_missing_library_names_its_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    shown = derta("show", folder / "triples.json")
    assert shown.exit_code == 2
    assert "`datasets` is not installed; it comes with pip install 'derta-plugins[trl]'." in shown.stderr


def test_an_unexpected_error_keeps_its_traceback(folder, monkeypatch):
    def fail(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "load_records", fail)
    assert isinstance(derta("show", folder / "triples.json").exception, ValueError)


@pytest.mark.parametrize("is_interrupted_at", ["load_records"])
def test_an_interrupt_is_quiet(folder, monkeypatch, is_interrupted_at):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, is_interrupted_at, interrupt)
    shown = derta("show", folder / "triples.json")
    assert shown.exit_code == 130
    assert shown.stderr == ""


def test_our_own_warnings_are_kept_back_only_while_the_command_runs(folder):
    import logging

    before = logging.getLogger("derta_plugins").level
    derta("show", folder / "triples.json")
    assert logging.getLogger("derta_plugins").level == before


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`num_prefixes` must be", "--num-prefixes must be"),
        ("or refusal_text='auto'.", "or --refusal-text auto."),
        ("set `on_bad_record='skip'` to", "set --on-bad-record skip to"),
        ("`apply_chat_template=False`.", "--no-chat-template."),
        ("field `prompt`: is empty", "field `prompt`: is empty"),
    ],
)
def test_messages_speak_of_options(message, expected):
    assert cli._in_command_words(message) == expected


def test_demo_hands_its_options_on(monkeypatch, tmp_path):
    import types

    calls = []
    module = types.ModuleType("derta_plugins.demo.run")
    module.run_demo = lambda **options: calls.append(options) or {}
    monkeypatch.setitem(sys.modules, "derta_plugins.demo.run", module)
    shown = derta("demo", "--seed", "3", "--output-dir", tmp_path / "out", "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    (options,) = calls
    assert (options["seed"], options["output_dir"], options["device"]) == (3, tmp_path / "out", "cpu")
    assert options["console"].print


def test_the_script_shows_a_file_in_a_pipe(folder):
    done = run_script("show", folder / "triples.json", "--limit", "1")
    assert done.returncode == 0, done.stderr
    assert "⟦Sorry , I will not help with the castle wall .<|im_end|>⟧" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_the_script_says_what_is_wrong_on_stderr(folder):
    done = run_script("show", folder / "broken.json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"derta: .*broken\.json: cannot be loaded.*\n", done.stderr)


def test_the_script_shows_help():
    done = run_script("show", "--help")
    assert done.returncode == 0
    assert "--rto-keep-ratio" in done.stdout


def test_the_script_ends_quietly_when_interrupted(folder):
    assert DERTA.exists(), "the command is not installed: pip install -e ."
    many = folder / "many.jsonl"
    Dataset.from_list(safety_records(1) * 20_000).to_json(many)
    running = subprocess.Popen(
        [DERTA, "show", many],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell ignores SIGINT, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stdout.readline().startswith("no --tokenizer")  # now it is reading
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
