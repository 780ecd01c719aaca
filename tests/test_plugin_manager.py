"""Loading plugins through entry points of distributions that exist only on disk (`tests/data/fake_adapters`)."""

import importlib.util
import pickle
import subprocess
import sys
from importlib.metadata import distribution

import pluggy
import pytest

from derta_plugins import hookspecs, plugin_manager
from derta_plugins.hookspecs import Adapter, AttackPrompt, Reader, Verdict
from derta_plugins.plugin_manager import (
    KINDS,
    HostMissingError,
    OtherKindError,
    PluginError,
    get_adapter,
    get_attack,
    get_judge,
    get_reader,
    get_transform,
    plugin_names,
)
from tests.third_party import install

FAKES = {"absent_host", "clash", "empty", "everything", "quits", "typo", "working"}
GETTERS = {
    "adapter": get_adapter,
    "reader": get_reader,
    "transform": get_transform,
    "attack": get_attack,
    "judge": get_judge,
}


def refused(get, name, match, error=PluginError):
    with pytest.raises(PluginError, match=match) as caught:
        get(name)
    assert type(caught.value) is error
    return caught.value


# --- the contract ----------------------------------------------------------------------------------------------------


def test_every_hook_has_a_kind_a_getter_and_an_example():
    hooks = {name.removeprefix("derta_") for name in vars(hookspecs) if name.startswith("derta_")}
    assert hooks == set(KINDS) == set(GETTERS)
    for kind in KINDS:
        assert ">>> " in getattr(hookspecs, f"derta_{kind}").__doc__
        assert ">>> @hookimpl" in getattr(hookspecs, f"derta_{kind}").__doc__


@pytest.mark.parametrize("label", ["harmful", "", None, "Safe"])
def test_a_verdict_has_one_of_three_labels(label):
    with pytest.raises(ValueError, match=rf"must be one of 'safe', 'unsafe', 'unparseable', got {label!r}"):
        Verdict(label, "why")


def test_only_text_can_go_without_a_template():
    messages = ({"role": "user", "content": "How do I bake it?"},)
    assert AttackPrompt(messages).is_templated
    assert AttackPrompt("I will explain how to bake it. Step 1:", is_templated=False).prefix == ""
    with pytest.raises(ValueError, match="`prompt` must be text when `is_templated` is false, got tuple"):
        AttackPrompt(messages, is_templated=False)


@pytest.mark.parametrize("name", ["c", "", "my:db", "my/db", "my\\db"])
def test_a_reader_has_a_name_that_no_path_begins_with(name):
    with pytest.raises(ValueError, match="`name` of a reader must have two characters or more"):
        Reader(name, "one triple", print)


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_listed_without_importing_any_plugin():
    assert set(plugin_names()) >= FAKES
    assert plugin_names() == sorted(set(plugin_names()))
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/data/fake_adapters']; from derta_plugins.plugin_manager import *; "
        "print('working' in plugin_names(), {'torch', 'trl', 'fake_working_adapter'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "True set()"


def test_our_own_plugins_are_offered_and_exist():
    offered = [entry for entry in distribution("derta-plugins").entry_points if entry.group == hookspecs.PROJECT]
    assert {"trl", "content"} <= {entry.name for entry in offered}
    for entry in offered:
        assert entry.name in plugin_names()
        assert entry.module.startswith(("derta_plugins.adapters.", "derta_plugins.attacks.", "derta_plugins.judges."))
        assert importlib.util.find_spec(entry.module) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_name_suggests_and_lists_the_known_ones(kind):
    match = rf"^Unknown {kind} 'workin'\. Did you mean 'working'\? Installed plugins: .*typo, working \(`derta plugins`"
    refused(GETTERS[kind], "workin", match)


def test_unknown_name_that_resembles_none_only_lists():
    refused(get_adapter, "zzz", r"^Unknown adapter 'zzz'\. Installed plugins: absent_host, ")


@pytest.mark.parametrize("name", ["", "Working", "work", "working ", "*"])
def test_a_name_must_be_the_whole_name(name):
    refused(get_adapter, name, "^Unknown adapter")


# --- loading one -----------------------------------------------------------------------------------------------------


def test_one_adapter_loads_although_another_host_is_absent():
    assert get_adapter("working") == Adapter("working", "fake-host", "1.0", "1.2", "set `plugins: working`")


def test_no_other_plugin_is_imported():
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/data/fake_adapters']; from derta_plugins.plugin_manager import *; "
        "get_judge('everything'); print(*sorted(name for name in sys.modules if name.startswith('fake_')))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "fake_everything_plugin"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adapter"])
def test_one_module_may_be_several_kinds(kind):
    found = GETTERS[kind]("everything")
    assert type(found) is KINDS[kind]
    assert found.name == "everything"


def test_a_plugin_of_another_kind_says_what_it_is():
    match = (
        r"^Plugin 'everything' of fake-adapters 1\.0 \(fake_everything_plugin\) is no adapter; it is: reader, "
        r"transform, attack, judge\.$"
    )
    refused(get_adapter, "everything", match, OtherKindError)
    for kind in ("reader", "transform", "attack", "judge"):
        refused(GETTERS[kind], "working", rf"is no {kind}; it is: adapter\.$", OtherKindError)


def test_only_the_hook_that_is_asked_for_is_called(monkeypatch, tmp_path):
    source = (
        "from derta_plugins.hookspecs import *\n@hookimpl\ndef derta_reader(): return Reader('half', 'd', print)\n"
        "@hookimpl\ndef derta_judge(): raise LookupError('no key')"
    )
    install(monkeypatch, tmp_path, {"half": "half_working"}, {"half_working.py": source})
    assert get_reader("half").read is print
    refused(get_judge, "half", r"^Plugin 'half' of third-party 1\.0 \(half_working\) is broken: LookupError: no key\.$")


def test_an_object_in_a_module_can_be_a_plugin(monkeypatch, tmp_path):
    source = (
        "from derta_plugins.hookspecs import *\nclass Plugin:\n  @hookimpl\n"
        "  def derta_reader(self): return Reader('object', 'd', print)\nplugin = Plugin()"
    )
    install(monkeypatch, tmp_path, {"object": "holder:plugin"}, {"holder.py": source})
    assert get_reader("object").description == "d"


# --- what does not load ----------------------------------------------------------------------------------------------


def test_absent_host_says_what_failed_and_what_to_install():
    match = (
        r"^Plugin 'absent_host' of fake-adapters 1\.0 \(fake_absent_host_adapter\) does not import: "
        r"No module named 'a_host_that_is_not_installed'\. It needs its host: "
        r"pip install 'fake-adapters\[absent_host\]'$"
    )
    error = refused(get_adapter, "absent_host", match, HostMissingError)
    assert isinstance(error.__cause__, ImportError)
    assert error.reason == "No module named 'a_host_that_is_not_installed'"


MISSING = {
    # what a module imports, what its distribution says it needs: the error, and what its message holds
    "an optional package": (
        "import no_such_host",
        ["Requires-Dist: torch"],
        HostMissingError,
        "pip install the package",
    ),
    "one of another extra": (
        "import no_such_host",
        ["Provides-Extra: x", 'Requires-Dist: no-such-host; extra == "x"'],
        HostMissingError,
        "pip install the package that has this module",
    ),
    "a requirement": ("import no_such_host", ["Requires-Dist: No.Such_Host>=2,<3"], PluginError, "is broken: Module"),
    "a part of what is installed": ("import json.no_such_part", [], PluginError, "No module named 'json.no_such_part'"),
    "a name of what is installed": ("from json import no_such_name", [], PluginError, "cannot import name"),
    "a part of ours": ("import derta_plugins.no_such_part", [], PluginError, "derta_plugins.no_such_part"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_package_is_the_plugins_fault_unless_it_is_optional(monkeypatch, tmp_path, case):
    source, metadata, error, match = MISSING[case]
    install(monkeypatch, tmp_path, {"lacking": "lacking_it"}, {"lacking_it.py": source}, metadata=metadata)
    refused(get_adapter, "lacking", match, error)


def test_a_host_of_another_version_is_no_fault_of_the_plugin(monkeypatch, tmp_path):
    source = "from derta_plugins.hookspecs import *\nraise HostVersionError('trl>=9 is needed, got 8.')"
    install(monkeypatch, tmp_path, {"newer": "newer_trl"}, {"newer_trl.py": source})
    match = r"^Plugin 'newer' of third-party 1\.0 \(newer_trl\) does not import: trl>=9 is needed, got 8\.$"
    assert refused(get_adapter, "newer", match, HostMissingError).reason == "trl>=9 is needed, got 8."


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("no_such_module", "is broken: ModuleNotFoundError: No module named 'no_such_module'"),
        ("no_such_module.part:plugin", "is broken: ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:no_such_name", "is broken: AttributeError: .*no_such_name"),
        ("not a module", r"^Plugin 'wrong' of third-party 1\.0 \(not a module\) is broken: "),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_broken(monkeypatch, tmp_path, value, match):
    install(monkeypatch, tmp_path, {"wrong": value}, {})
    refused(get_adapter, "wrong", match)


FAILURES = {
    "raise RuntimeError('odd drivers.\\nmore')": r"is broken: RuntimeError: odd drivers\.$",
    "raise SystemExit": r"is broken: SystemExit\.$",
    "raise SystemExit(0)": r"is broken: SystemExit: 0\.$",
    "class Panic(BaseException): pass\nraise Panic('thread main')": r"is broken: Panic: thread main\.$",
    "def f(:": "is broken: SyntaxError: ",
    "from derta_plugins.hookspecs import *\n@hookimpl\ndef derta_judge(path): pass": "is broken: PluginValidationError",
}


@pytest.mark.parametrize("source", FAILURES)
def test_whatever_a_plugin_raises_names_the_plugin(monkeypatch, tmp_path, source):
    install(monkeypatch, tmp_path, {"bad": "bad_plugin"}, {"bad_plugin.py": source})
    error = refused(get_reader, "bad", r"^Plugin 'bad' of third-party 1\.0 \(bad_plugin\) ")
    assert error.__cause__ is not None
    refused(get_reader, "bad", FAILURES[source])


def test_an_interrupt_is_no_failure_of_a_plugin(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, {"slow": "slow_plugin"}, {"slow_plugin.py": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        get_reader("slow")


def test_misspelt_hook_is_refused():
    match = (
        r"^Plugin 'typo' of fake-adapters 1\.0 \(fake_typo_adapter\) is broken: unknown hook 'derta_adaptor', expected "
        r"some of `derta_adapter`, `derta_reader`, "
    )
    refused(get_adapter, "typo", match)


def test_a_misspelt_hook_beside_a_good_one_is_refused(monkeypatch, tmp_path):
    source = (
        "from derta_plugins.hookspecs import *\n@hookimpl\ndef derta_reader(): return Reader('both', 'd', print)\n"
        "@hookimpl\ndef derta_juge(): pass"
    )
    install(monkeypatch, tmp_path, {"both": "both_hooks"}, {"both_hooks.py": source})
    refused(get_reader, "both", "unknown hook 'derta_juge'")


def test_a_module_without_any_hook_is_refused():
    refused(get_adapter, "empty", "is broken: it has no hook, expected some of `derta_adapter`")


DESCRIPTIONS = {
    "None": r"`derta_reader` must return a hookspecs\.Reader, got NoneType",
    "{'name': 'mine'}": r"`derta_reader` must return a hookspecs\.Reader, got dict",
    "Judge('mine', '1', 'me', print)": r"must return a hookspecs\.Reader, got Judge",
    "[Reader('mine', 'd', print)]": r"must return a hookspecs\.Reader, got list",
    "Reader('yours', 'd', print)": r"`derta_reader` calls itself 'yours', its entry point 'mine'",
    "Reader('mine', ' ', print)": r"`description` of its reader must be a text, got ' '",
    "Reader('mine', None, print)": r"`description` of its reader must be a text, got None",
    "Reader('mine', 'd', 'print')": r"`read` of its reader must be a function, got 'print'",
    "Reader('m', 'd', print)": r"ValueError: `name` of a reader must have two characters",
}


@pytest.mark.parametrize("returned", DESCRIPTIONS)
def test_a_wrong_description_is_refused(monkeypatch, tmp_path, returned):
    source = f"from derta_plugins.hookspecs import *\n@hookimpl\ndef derta_reader(): return {returned}"
    install(monkeypatch, tmp_path, {"mine": "my_reader"}, {"my_reader.py": source})
    refused(
        get_reader, "mine", rf"^Plugin 'mine' of third-party 1\.0 \(my_reader\) is broken: .*{DESCRIPTIONS[returned]}"
    )


@pytest.mark.parametrize(
    ("kind", "returned", "match"),
    [
        ("attack", "Attack('mine', '', 'me', print)", "`version` of its attack must be a text, got ''"),
        ("attack", "Attack('mine', '1', '', print)", "`source` of its attack must be a text, got ''"),
        ("attack", "Attack('mine', 1, 'me', print)", "`version` of its attack must be a text, got 1"),
        (
            "attack",
            "Attack('mine', '1', 'me', print, None)",
            "`higher_is_better` of .* must be true or false, got None",
        ),
        ("attack", "Attack('mine', '1', 'me', None)", "`apply` of its attack must be a function, got None"),
        ("judge", "Judge('mine', '1', '', print)", "`source` of its judge must be a text"),
        ("judge", "Judge('mine', '1', 'me', 'print')", "`judge` of its judge must be a function"),
        ("transform", "Transform('mine', 'd', [])", r"`build_rows` of its transform must be a function, got \[\]"),
        ("adapter", "Adapter('mine', 'my-host', '1', None, 'so')", "`newest_tested` of its adapter must be a text"),
    ],
)
def test_every_kind_is_checked(monkeypatch, tmp_path, kind, returned, match):
    source = f"from derta_plugins.hookspecs import *\n@hookimpl\ndef derta_{kind}(): return {returned}"
    install(monkeypatch, tmp_path, {"mine": "my_plugin"}, {"my_plugin.py": source})
    refused(GETTERS[kind], "mine", match)


def test_errors_survive_the_way_out_of_a_worker_process():
    error = refused(get_adapter, "absent_host", "does not import", HostMissingError)
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.reason) == (HostMissingError, str(error), error.reason)


# --- conflicts -------------------------------------------------------------------------------------------------------


def test_a_plugin_that_two_distributions_offer_is_refused_and_neither_is_loaded(monkeypatch):
    monkeypatch.setattr(plugin_manager, "load_hooks", lambda entry_point: pytest.fail(f"loads {entry_point}"))
    assert plugin_names().count("clash") == 1
    match = (
        r"^Plugin 'clash' is offered by fake-adapters 1\.0 \(fake_working_adapter\) and other-adapters 2\.0 "
        r"\(fake_typo_adapter\): uninstall all but one\.$"
    )
    for get in GETTERS.values():
        refused(get, "clash", match)


def test_a_third_party_cannot_take_the_place_of_one_of_ours(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, {"trl": "evil_trl"}, {"evil_trl.py": "raise AssertionError"})
    refused(get_adapter, "trl", r"offered by derta-plugins .* and third-party 1\.0 \(evil_trl\)")


def test_a_distribution_that_offers_a_name_twice_is_refused(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, [("twice", "json"), ("twice", "ast")], {})
    refused(get_adapter, "twice", r"offered by third-party 1\.0 \((json|ast)\) and third-party 1\.0 \((json|ast)\)")


def test_pluggy_itself_does_not_guard_a_failing_entry_point():
    """Why plugins are loaded by name: one absent host would take all others with it."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    with pytest.raises((ImportError, SystemExit)):
        manager.load_setuptools_entrypoints(hookspecs.PROJECT)
