"""`derta doctor`: what it says of hosts that are here, absent or broken, and of tokenizers."""

import io
import re
from importlib.metadata import PackageNotFoundError

import pytest
from rich.console import Console
from typer.testing import CliRunner

from derta_plugins import cli, doctor
from derta_plugins.hookspecs import Adapter
from derta_plugins.plugin_manager import AdapterError
from tests.conftest import byte_level_bpe, metaspace_unigram

ADAPTER = Adapter("myhost", "my-host", "1.0.0", "1.2.0", "set `plugins: derta`")


@pytest.fixture
def installed(monkeypatch):
    """Installed distributions, adapters and what loading each gives; tests fill them in."""
    versions, adapters = {}, {}

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    def get_adapter(name):
        if isinstance(adapters[name], Exception):
            raise adapters[name]
        return adapters[name]

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "adapter_names", lambda: sorted(adapters))
    monkeypatch.setattr(doctor, "get_adapter", get_adapter)
    return versions, adapters


def statuses():
    return {host.name: host for host in doctor.host_statuses()}


def caused(cause):
    error = AdapterError("Adapter 'trl' does not import (...)")
    error.__cause__ = cause
    return error


def test_a_host_without_adapter_is_named_with_the_versions_its_extra_asks_for(installed):
    host = statuses()["axolotl"]
    assert host.status == "no adapter in this version"
    assert host.installed == "not installed"
    assert re.match(r">=\d", host.tested)


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("1.0.0", "ok"),
        ("1.1.5", "ok"),
        ("1.2.9", "ok"),
        ("1.3.0", "ok, but newer than tested"),
        ("1.3.0.dev0", "ok, but newer than tested"),
        ("0.9.9", "ok, but older than tested"),
    ],
)
def test_a_working_adapter_is_compared_with_what_was_tested(installed, version, status):
    versions, adapters = installed
    versions["my-host"], adapters["myhost"] = version, ADAPTER
    host = statuses()["myhost"]
    assert (host.status, host.installed, host.tested) == (status, version, "1.0.0 to 1.2.0")
    assert host.how_to_use == "set `plugins: derta`"


def test_an_absent_host_is_no_fault_of_its_adapter(installed):
    _, adapters = installed
    adapters["trl"] = caused(ModuleNotFoundError("No module named 'trl'"))
    host = statuses()["trl"]
    assert host.status == "host missing"
    assert host.how_to_use == "pip install 'derta-plugins[trl]'"


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (caused(ImportError("trl>=1.15.0 is needed, got 1.8.0\nmore")), "broken: trl>=1.15.0 is needed, got 1.8.0"),
        (AdapterError("Adapter 'trl' is offered by a, b"), "broken: Adapter 'trl' is offered by a, b"),
        (RuntimeError("CUDA is odd"), "broken: CUDA is odd"),
        (ValueError(), "broken: ValueError"),
        (None, "broken: it does not describe its host"),
    ],
)
def test_a_broken_adapter_says_why_and_harms_no_other(installed, offer, reason):
    versions, adapters = installed
    versions |= {"trl": "1.8.0", "my-host": "1.1.0"}
    adapters |= {"trl": offer, "myhost": ADAPTER}
    found = statuses()
    assert found["trl"].status == reason
    assert found["myhost"].status == "ok"


def test_the_adapters_of_this_package_are_described():
    host = statuses()["trl"]
    assert host.status.startswith("ok")
    assert "DeRTaSFTTrainer" in host.how_to_use


@pytest.mark.parametrize("width", [80, 120])
def test_the_environment_fits_its_terminal(installed, width):
    versions, adapters = installed
    versions |= {"trl": "1.16.0", "torch": "2.13.0"}
    adapters["trl"] = caused(ImportError("a very long reason " * 10))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    doctor.print_environment(console)
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert re.search(r"│ trl +│ 1\.16\.0 +│", text)
    assert "torch 2.13.0, transformers not installed" in text.replace("\n", "")


def findings(tokenizer, text="Sorry", **options):
    return {finding.name: finding for finding in doctor.tokenizer_findings(tokenizer, text, **options)}


def test_a_good_tokenizer_has_no_problem(bpe_tokenizer):
    found = findings(bpe_tokenizer)
    assert not any(finding.problem for finding in found.values())
    start, middle = (bpe_tokenizer(text)["input_ids"][0] for text in ("Sorry", " Sorry"))
    assert start != middle, "else this test shows nothing"
    assert found["refusal token"].value == f"'Sorry' (id {start}) for 'Sorry', where an answer starts"
    assert found["in mid-answer"].value.startswith(f"id {middle};")
    assert found["end of turn"].value == f"'<|im_end|>' (id {bpe_tokenizer.eos_token_id})"
    assert found["pad token"].value == "'<|pad|>' (id 3)"


def test_what_is_missing_is_a_problem_unless_a_host_makes_up_for_it():
    tokenizer = byte_level_bpe(chat_template=None)
    tokenizer.pad_token = None
    found = findings(tokenizer)
    assert found["chat template"].value == "missing"
    assert "set `tokenizer.chat_template`" in found["chat template"].problem
    assert found["pad token"].value.startswith("missing")
    assert not found["pad token"].problem


def test_a_template_that_prints_no_answer_is_a_problem():
    tokenizer = byte_level_bpe(chat_template="{{ messages[0].content }}")
    assert "does not print the assistant's answer" in findings(tokenizer)["end of turn"].problem


@pytest.mark.parametrize("make", [byte_level_bpe, metaspace_unigram])
def test_a_refusal_text_of_several_tokens_is_a_problem_unless_the_first_will_do(make):
    tokenizer = make()
    assert "must be one token" in findings(tokenizer, "Sorry Step")["refusal token"].problem
    assert not findings(tokenizer, "Sorry Step", allow_first_piece=True)["refusal token"].problem


def test_auto_needs_records(bpe_tokenizer):
    assert "derta show" in findings(bpe_tokenizer, "auto")["refusal token"].value


def run_doctor(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)], env={"COLUMNS": "120"})


def test_doctor_alone_ends_well():
    shown = run_doctor()
    assert shown.exit_code == 0
    for word in ("trl", "axolotl", "llamafactory", "python 3", "torch 2", "derta-plugins"):
        assert word in shown.stdout


def test_doctor_shows_a_tokenizer(tmp_path):
    byte_level_bpe().save_pretrained(tmp_path / "bpe")
    shown = run_doctor("--tokenizer", tmp_path / "bpe")
    assert shown.exit_code == 0, shown.output
    assert re.search(r"refusal token +│ 'Sorry' \(id \d+\)", shown.stdout)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere", [], r"nowhere: no such folder"),
        ("plain", [], r"no chat template; set `tokenizer\.chat_template`"),
        ("bpe", ["--refusal-text", "Sorry, no"], r"'Sorry, no' must be one token.*--allow-first-piece"),
    ],
)
def test_doctor_ends_with_2_when_the_tokenizer_will_not_do(tmp_path, name, options, message):
    byte_level_bpe().save_pretrained(tmp_path / "bpe")
    byte_level_bpe(chat_template=None).save_pretrained(tmp_path / "plain")
    shown = run_doctor("--tokenizer", tmp_path / name, *options)
    assert shown.exit_code == 2
    assert re.fullmatch(rf"derta: .*{message}.*\n", shown.stderr), shown.stderr
    assert "Traceback" not in shown.output
