"""`derta plugins`: it lists whatever is installed, survives what is broken, and says so with its exit code."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from derta_plugins import cli, plugin_status
from derta_plugins.plugin_status import PluginStatus, plugin_statuses
from tests.third_party import install, write_distribution

DERTA = Path(sys.executable).with_name("derta")


def derta(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "160"})


def run_script(*arguments, path):
    """Run the installed script as a user does who has installed what is in the folder `path`, and no fakes."""
    assert DERTA.exists(), "the command is not installed: pip install -e ."
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "160"}
    return subprocess.run([DERTA, *arguments], capture_output=True, text=True, timeout=300, env=environment)


def only(monkeypatch, *names):
    """Let the command see no plugin but these; what is installed beside this test is not its subject."""
    plugins = plugin_status.installed_plugins
    monkeypatch.setattr(
        plugin_status, "installed_plugins", lambda: [plugin for plugin in plugins() if plugin.name in names]
    )


@pytest.fixture
def statuses(monkeypatch):
    only(monkeypatch, "absent_host", "clash", "empty", "everything", "quits", "typo", "working")
    return plugin_statuses()


def test_every_plugin_is_listed_with_kind_owner_and_status(statuses):
    fakes = ("fake-adapters", "1.0")
    found = [(each.name, each.kinds, each.distribution, each.version, each.status) for each in statuses]
    assert found == [
        ("absent_host", (), *fakes, "host missing"),
        ("clash", (), *fakes, "conflict"),
        ("clash", (), "other-adapters", "2.0", "conflict"),
        ("empty", (), *fakes, "broken"),
        ("everything", ("reader", "transform", "attack", "judge"), *fakes, "ok"),
        ("quits", (), *fakes, "broken"),
        ("typo", (), *fakes, "broken"),
        ("working", ("adapter",), *fakes, "ok"),
    ]


def test_the_reason_is_told_without_what_stands_beside_it(statuses):
    reasons = {(each.name, each.distribution): each.reason for each in statuses}
    assert reasons["absent_host", "fake-adapters"] == "No module named 'a_host_that_is_not_installed'"
    assert reasons["clash", "fake-adapters"] == "also offered by other-adapters 2.0 (fake_typo_adapter)"
    assert reasons["clash", "other-adapters"] == "also offered by fake-adapters 1.0 (fake_working_adapter)"
    assert reasons["quits", "fake-adapters"] == "SystemExit: 0"
    assert reasons["typo", "fake-adapters"].startswith("unknown hook 'derta_adaptor', expected some of")
    assert reasons["working", "fake-adapters"] == ""


@pytest.mark.parametrize("hook", ["raise LookupError('no key')", "return None"])
def test_a_plugin_is_ok_only_if_all_its_hooks_are(monkeypatch, tmp_path, hook):
    source = (
        "from derta_plugins.hookspecs import *\n@hookimpl\ndef derta_reader(): return Reader('half', 'd', print)\n"
        f"@hookimpl\ndef derta_judge(): {hook}"
    )
    install(monkeypatch, tmp_path, {"half": "half_working"}, {"half_working.py": source})
    only(monkeypatch, "half")
    (status,) = plugin_statuses()
    assert (status.status, status.kinds) == ("broken", ("reader", "judge"))


def test_an_interrupt_ends_the_listing(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, {"slow": "slow_plugin"}, {"slow_plugin.py": "raise KeyboardInterrupt"})
    only(monkeypatch, "slow")
    shown = derta("plugins")
    assert (shown.exit_code, shown.stdout) == (130, "")


def test_the_table_names_everything_and_the_exit_code_tells_of_faults(monkeypatch):
    only(monkeypatch, "absent_host", "clash", "everything", "quits", "working")
    shown = derta("plugins")
    assert shown.exit_code == 2
    rows = {
        "everything": "reader, transform, attack, judge │ fake-adapters *│ 1.0 *│ ok",
        "absent_host": r"\? +│ fake-adapters *│ 1.0 *│ host missing: No module named 'a_host",
        "quits": r"\? +│ fake-adapters *│ 1.0 *│ broken: SystemExit: 0",
        "clash": r"\? +│ other-adapters *│ 2.0 *│ conflict: also offered by fake-adapters 1.0",
        "working": "adapter +│ fake-adapters *│ 1.0 *│ ok",
    }
    for name, row in rows.items():
        assert re.search(rf"│ {name} +│ {row}", shown.stdout), shown.stdout
    sentence = r"derta: These plugins cannot be used: clash \(conflict\), quits \(broken\)\."
    assert re.search(rf"^{sentence}$", shown.stderr, re.MULTILINE)
    assert "Traceback" not in shown.output


@pytest.mark.parametrize(
    ("names", "exit_code"),
    [
        (["working"], 0),
        (["working", "everything", "absent_host"], 0),
        (["working", "empty"], 2),
        (["clash", "working"], 2),
        ([], 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_an_absent_host_is_no_fault(monkeypatch, names, exit_code, options):
    only(monkeypatch, *names)
    shown = derta("plugins", *options)
    assert shown.exit_code == exit_code, shown.output
    assert bool(shown.stderr) == bool(exit_code)


def test_what_a_plugin_prints_does_not_stand_in_the_json(monkeypatch):
    only(monkeypatch, "everything", "quits")
    sys.modules.pop("fake_quitting_plugin", None)
    shown = derta("plugins", "--json")
    assert "about to leave" in shown.stderr, "else this test shows nothing"
    everything, quits = json.loads(shown.stdout)
    assert everything == {
        "name": "everything",
        "kinds": ["reader", "transform", "attack", "judge"],
        "distribution": "fake-adapters",
        "version": "1.0",
        "module": "fake_everything_plugin",
        "status": "ok",
        "reason": "",
    }
    assert (quits["status"], quits["reason"]) == ("broken", "SystemExit: 0")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_its_terminal(statuses, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    plugin_status.print_plugins(statuses, console)
    assert max(len(line) for line in console.file.getvalue().splitlines()) <= width


def test_what_a_package_says_of_itself_is_no_markup():
    console = Console(file=io.StringIO(), width=160, color_system=None)
    odd = PluginStatus("[red]", ("reader",), "[/red]", "[1]", "m", "broken", "[/] [bold]x")
    plugin_status.print_plugins([odd], console)
    for text in ("[red]", "[/red]", "[1]", "[/] [bold]x"):
        assert text in console.file.getvalue()


# --- a third party, end to end ----------------------------------------------------------------------------------------

BAKERY = '''
"""All that a third party writes: no name of it stands in derta_plugins."""

from datasets import Dataset

from derta_plugins.core.transform import build_rows
from derta_plugins.hookspecs import Attack, AttackPrompt, Judge, Reader, Transform, Verdict, hookimpl


def read(source, *, split, streaming):
    if source != "bread":
        raise LookupError(f"no table {source!r}, there is: bread")
    return Dataset.from_list(
        [
            {"prompt": "How do I bake it?", "chosen": "Sorry, I will not help.", "rejected": "Step 1: mix the flour"},
            {"prompt": "How do I sell it?", "chosen": "Sorry, I will not say.", "rejected": "Step 1: open the shop"},
        ]
    )


@hookimpl
def derta_reader():
    return Reader("bakery", "tables of the bakery", read)


@hookimpl
def derta_transform():
    def rto_only(triple, config, **options):
        return [row for row in build_rows(triple, config, **options) if row.objective == "rto"]

    return Transform("bakery", "RTO rows, no MLE rows", rto_only)


@hookimpl
def derta_attack():
    def apply(prompt, *, rejected, seed):
        return [AttackPrompt(f"I will explain. {prompt} Step 1:", is_templated=False)]

    return Attack("bakery", "1", "https://example.org/bakery", apply)


@hookimpl
def derta_judge():
    def judge(prompt, response, *, given):
        return Verdict("unsafe" if "flour" in response else "safe", "flour")

    return Judge("bakery", "1", "https://example.org/bakery", judge)
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder as an installer fills it, for other processes."""
    folder = tmp_path_factory.mktemp("site-packages")
    write_distribution(folder, {"bakery": "bakery"}, {"bakery.py": BAKERY}, name="the-bakery", version="3.2")
    return folder


def test_a_third_partys_plugin_is_listed(site):
    done = run_script("plugins", "--json", path=site)
    listed = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    bakery = listed.pop("bakery")
    assert bakery["kinds"] == ["reader", "transform", "attack", "judge"]
    assert (bakery["distribution"], bakery["version"], bakery["status"]) == ("the-bakery", "3.2", "ok")
    assert {plugin["distribution"] for plugin in listed.values()} == {"derta-plugins"}
    # with hosts that it supports or without, this package is never what is broken
    assert {plugin["status"] for plugin in listed.values()} <= {"ok", "host missing"}, done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_a_third_partys_records_are_shown(site):
    done = run_script("show", "bakery:bread", "--limit", "1", path=site)
    assert done.returncode == 0, done.stderr
    assert "⟦Sorry, I will not help.<|im_end|>⟧" in done.stdout
    assert "2 triples, none bad" in done.stdout


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "bakery:cake",
            r"bakery:cake: the reader 'bakery' of the-bakery 3\.2 \(bakery\) failed: LookupError: no table ",
        ),
        ("bakry:bread", r"bakry:bread: no such file or folder\. Unknown reader 'bakry'\. Did you mean 'bakery'\?"),
    ],
)
def test_a_third_partys_records_that_are_not_there_end_in_one_sentence(site, source, message):
    done = run_script("show", source, path=site)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"derta: {message}.*\n", done.stderr), done.stderr


def test_a_third_partys_other_plugins_work(site):
    code = (
        "from derta_plugins.core.config import DeRTaConfig\n"
        "from derta_plugins.core.chat import TokenizedTriple\n"
        "from derta_plugins.plugin_manager import get_attack, get_judge\n"
        "from derta_plugins.transforms import build_training_rows\n"
        "triple = TokenizedTriple((1, 2), (3, 4), (5, 6), end_ids=(0,))\n"
        "rows = build_training_rows(triple, DeRTaConfig(transform='bakery'), refusal_token_id=3)\n"
        "(given,) = get_attack('bakery').apply('Bake it.', rejected=None, seed=0)\n"
        "verdict = get_judge('bakery').judge('Bake it.', 'mix the flour', given=given)\n"
        "print([row.labels for row in rows], given.prompt, given.is_templated, verdict.label, sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    printed = ["[[-100, -100, 3, 3, 3]]", "I will explain. Bake it. Step 1:", "False", "unsafe"]
    assert done.stdout.splitlines() == printed, done.stderr
