"""`derta doctor`: what it says of hosts that are here, absent or broken, and of tokenizers."""

import io
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from derta_plugins import cli, doctor
from derta_plugins._autoload import HostFinder
from derta_plugins.hookspecs import Adapter
from derta_plugins.launch import STARTUP
from derta_plugins.plugin_manager import HostMissingError, OtherKindError, PluginError
from tests.conftest import byte_level_bpe, metaspace_unigram
from tests.fake_hosts import run_python

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
    monkeypatch.setattr(doctor, "plugin_names", lambda: sorted(adapters))
    monkeypatch.setattr(doctor, "get_adapter", get_adapter)
    return versions, adapters


def statuses():
    return {host.name: host for host in doctor.host_statuses()}


def caused(cause, kind=PluginError):
    error = kind("Plugin 'trl' does not import (...)")
    error.__cause__ = cause
    return error


def test_a_host_whose_adapter_is_not_registered_is_named_with_the_versions_its_extra_asks_for(installed):
    """As after an upgrade of an editable install, whose entry points are those of the day it was made."""
    host = statuses()["axolotl"]
    assert host.status == "broken: not registered; reinstall derta-plugins"
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


def test_one_tested_version_is_named_once(installed):
    versions, adapters = installed
    versions["my-host"], adapters["myhost"] = "1.2.0", replace(ADAPTER, oldest_tested="1.2.0")
    assert statuses()["myhost"].tested == "1.2.0"


def test_an_absent_host_is_no_fault_of_its_adapter(installed):
    _, adapters = installed
    adapters["trl"] = caused(ModuleNotFoundError("No module named 'trl'"), HostMissingError)
    host = statuses()["trl"]
    assert host.status == "host missing"
    assert host.how_to_use == "pip install 'derta-plugins[trl]'"


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (caused(ImportError("trl>=1.15.0 is needed, got 1.8.0\nmore")), "broken: trl>=1.15.0 is needed, got 1.8.0"),
        (PluginError("Plugin 'trl' is offered by a and b"), "broken: Plugin 'trl' is offered by a and b"),
        (caused(ModuleNotFoundError("No module named 'peft'"), HostMissingError), "broken: No module named 'peft'"),
        (RuntimeError("CUDA is odd"), "broken: CUDA is odd"),
        (ValueError(), "broken: ValueError"),
    ],
)
def test_a_broken_adapter_says_why_and_harms_no_other(installed, offer, reason):
    versions, adapters = installed
    versions |= {"trl": "1.8.0", "my-host": "1.1.0"}
    adapters |= {"trl": offer, "myhost": ADAPTER}
    found = statuses()
    assert found["trl"].status == reason
    assert found["myhost"].status == "ok"


def test_a_broken_adapter_of_others_is_not_taken_for_an_absent_host(installed):
    _, adapters = installed
    adapters |= {"yours": PluginError("it is odd"), "theirs": caused(ModuleNotFoundError("x"), HostMissingError)}
    found = statuses()
    assert (found["yours"].status, found["theirs"].status) == ("broken: it is odd", "host missing")
    assert found["theirs"].how_to_use == ""


def test_plugins_that_are_no_adapters_are_no_hosts(installed):
    _, adapters = installed
    adapters |= {"a-judge": OtherKindError("it is a judge"), "myhost": ADAPTER}
    assert list(statuses()) == [*doctor.HOSTS, "myhost"]


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


# --- start-up code and patch points ----------------------------------------------------------------------------------


@pytest.fixture
def start_up(monkeypatch, tmp_path):
    """Set how this Python was started: which site folder holds the start-up file, and the state of the finder."""

    def set_up(*, has_file=True, has_finder=True, **environment):
        site = tmp_path / "site"
        site.mkdir()
        if has_file:
            (site / "derta_plugins_autoload.pth").touch()
        monkeypatch.setattr("sys.path", ["", "/nowhere", str(site)])
        monkeypatch.setattr("sys.meta_path", [HostFinder()] if has_finder else [])
        for name in ("PYTHONPATH", "DERTA_AUTOLOAD"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return site / "derta_plugins_autoload.pth"

    return set_up


def test_the_start_up_file_is_named_with_its_place(start_up):
    file = start_up()
    assert doctor.startup_finding() == doctor.Finding("start-up code", f"active, by {file}")


@pytest.mark.parametrize("has_file", [True, False])
def test_launch_is_named_although_there_is_a_file_too(start_up, has_file):
    start_up(has_file=has_file, PYTHONPATH=f"{STARTUP}:/a", DERTA_AUTOLOAD="1")
    assert doctor.startup_finding().value == "active, by derta_plugins.launch"


@pytest.mark.parametrize("options", [{"has_file": False}, {"DERTA_AUTOLOAD": "0"}])
def test_a_finder_that_neither_has_installed_was_installed_by_hand(start_up, options):
    start_up(**options)
    assert doctor.startup_finding().value == "active, by a call of its `install`"


def test_switched_off_is_a_choice_and_no_problem(start_up):
    start_up(has_finder=False, DERTA_AUTOLOAD="0")
    found = doctor.startup_finding()
    assert found.value.startswith("switched off by DERTA_AUTOLOAD=0; put `python -m derta_plugins.launch`")
    assert not found.problem


@pytest.mark.parametrize("has_file", [True, False])
def test_a_file_that_is_not_there_or_does_not_run_is_a_problem(start_up, has_file):
    file = start_up(has_file=has_file, has_finder=False)
    found = doctor.startup_finding()
    there, absent = f"{file} is there, but this Python does not run it", f"no {file.name} in this environment"
    assert found.value == (there if has_file else absent)
    assert found.problem == "reinstall derta-plugins, or put `python -m derta_plugins.launch` before the command"


@pytest.fixture
def patches(installed, monkeypatch):
    """What `missing_points` of each host's patch gives; both hosts are installed."""
    versions, _ = installed
    versions |= {"axolotl": "0.19.0", "llamafactory": "0.9.5"}
    answers = {}

    def import_module(name):
        answer = answers[name.rpartition(".")[2]]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(missing_points=answer)

    monkeypatch.setattr(doctor, "import_module", import_module)
    return answers


def test_patch_points_are_found_or_named(patches):
    patches |= {"axolotl_patch": list, "llamafactory_patch": lambda: ["tuner.run_sft is missing", "loader is missing"]}
    whole, lacking = doctor.patch_findings()
    assert whole == doctor.Finding("axolotl patch points", "all found")
    assert (lacking.name, lacking.value) == (
        "llamafactory patch points",
        "tuner.run_sft is missing, loader is missing",
    )
    assert lacking.problem == "DeRTa does not work in this llamafactory"


def test_patches_that_are_absent_or_fail_are_broken_and_harm_no_other(patches):
    def failing():
        raise RuntimeError("no GPU\nmore")

    patches |= {"axolotl_patch": ModuleNotFoundError("No module named 'pydantic'"), "llamafactory_patch": failing}
    first, second = doctor.patch_findings()
    assert (first.value, second.value) == ("broken: No module named 'pydantic'", "broken: no GPU")
    assert first.problem
    assert second.problem


def test_patch_points_of_absent_hosts_are_not_looked_for(installed):
    versions, _ = installed
    assert list(doctor.patch_findings()) == []
    versions["axolotl-contribs"] = "1"
    assert list(doctor.patch_findings()) == []


def test_doctor_prints_them(patches, start_up):
    start_up(has_finder=False)
    patches |= {"axolotl_patch": list, "llamafactory_patch": lambda: ["run_sft is missing"]}
    console = Console(file=io.StringIO(), width=300, color_system=None)
    doctor.print_environment(console)
    printed = console.file.getvalue().splitlines()
    assert printed[-3].startswith("start-up code: ")
    assert printed[-3].endswith("before the command")
    assert printed[-2:] == [
        "axolotl patch points: all found",
        "llamafactory patch points: run_sft is missing; DeRTa does not work in this llamafactory",
    ]


def test_doctor_sees_how_its_python_was_started():
    """In real interpreters of this environment."""
    code = "from derta_plugins.doctor import startup_finding; print(startup_finding())"
    started = run_python("-c", code, DERTA_AUTOLOAD=None).stdout
    assert re.search(r"active, by /.*/derta_plugins_autoload\.pth", started), "reinstall the checkout"
    assert "switched off" in run_python("-c", code, DERTA_AUTOLOAD="0").stdout
    launched = run_python("-m", "derta_plugins.launch", "python", "-c", code, DERTA_AUTOLOAD="0").stdout
    assert "active, by derta_plugins.launch" in launched


# --- tokenizer -------------------------------------------------------------------------------------------------------


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
