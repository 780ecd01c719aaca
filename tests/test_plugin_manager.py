"""Loading adapters through entry points of a distribution that exists only on disk (`tests/data/fake_adapters`)."""

import importlib.util
import subprocess
import sys
from importlib.metadata import distribution

import pluggy
import pytest

from derta_plugins import hookspecs
from derta_plugins.hookspecs import Adapter
from derta_plugins.plugin_manager import AdapterError, adapter_names, get_adapter

FAKES = {"absent_host", "empty", "typo", "working"}


def test_names_are_listed_without_importing_any_adapter():
    assert set(adapter_names()) >= FAKES
    assert adapter_names() == sorted(set(adapter_names()))
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/data/fake_adapters']; from derta_plugins.plugin_manager import *; "
        "print('working' in adapter_names(), {'torch', 'trl', 'fake_working_adapter'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "True set()"


def test_our_own_adapters_are_offered_and_exist():
    offered = [entry for entry in distribution("derta-plugins").entry_points if entry.group == hookspecs.PROJECT]
    assert "trl" in {entry.name for entry in offered}
    for entry in offered:
        assert entry.name in adapter_names()
        assert entry.module == f"derta_plugins.adapters.{entry.name}"
        assert importlib.util.find_spec(entry.module) is not None


def test_one_adapter_loads_although_another_host_is_absent():
    assert get_adapter("working") == Adapter("working", "fake-host", "1.0", "1.2", "set `plugins: working`")


def test_absent_host_says_what_failed_and_what_to_install():
    message = (
        r"^Adapter 'absent_host' does not import \(No module named 'a_host_that_is_not_installed'\)\. "
        r"It needs its host: pip install 'derta-plugins\[absent_host\]'$"
    )
    with pytest.raises(AdapterError, match=message) as caught:
        get_adapter("absent_host")
    assert isinstance(caught.value.__cause__, ImportError)


def test_unknown_name_suggests_and_lists_the_known_ones():
    with pytest.raises(
        AdapterError, match=r"^Unknown adapter 'workin'\. Did you mean 'working'\? Installed: .*typo, working\.$"
    ):
        get_adapter("workin")


def test_unknown_name_that_resembles_none_only_lists():
    with pytest.raises(AdapterError, match=r"^Unknown adapter 'zzz'\. Installed: absent_host, "):
        get_adapter("zzz")


def test_misspelt_hook_is_refused():
    with pytest.raises(pluggy.PluginValidationError, match="derta_adaptor"):
        get_adapter("typo")


def test_an_adapter_that_two_distributions_offer_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "other_adapters-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-adapters\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[derta_plugins]\nworking = fake_typo_adapter\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert adapter_names().count("working") == 1
    message = r"^Adapter 'working' is offered by fake-adapters, other-adapters: uninstall all but one\.$"
    with pytest.raises(AdapterError, match=message):
        get_adapter("working")


def test_pluggy_itself_does_not_guard_a_failing_entry_point():
    """Why adapters are loaded by name: one absent host would take all others with it."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    with pytest.raises(ImportError):
        manager.load_setuptools_entrypoints(hookspecs.PROJECT)


def test_a_module_without_the_hook_is_refused():
    with pytest.raises(AdapterError, match="has no hook `derta_adapter`"):
        get_adapter("empty")
