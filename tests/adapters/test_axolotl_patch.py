"""The patch of Axolotl: short forms, and an end of every run that asked for DeRTa and did not get it."""

import copy
import logging
import subprocess
import sys

import pytest
from axolotl.cli import config as host_config
from axolotl.integrations.base import BasePlugin, PluginManager

from derta_plugins import adapters
from derta_plugins.adapters import axolotl_names
from derta_plugins.adapters import axolotl_patch as patch
from derta_plugins.adapters.axolotl import DeRTaPlugin
from derta_plugins.adapters.axolotl_names import DATASET_TYPE, PLUGIN
from derta_plugins.core.config import ConfigError
from tests.adapters.axolotl_configs import entry, make_config, make_folder, our_plugin, own_plugins, validated

OTHER = f"{__name__}.OtherPlugin"


class OtherPlugin(BasePlugin):
    """Somebody else's."""


@pytest.fixture(autouse=True)
def _own_plugins():
    with own_plugins():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("patch"))


@pytest.fixture
def ordinary(folder):
    """A config without anything of ours."""
    return lambda **changes: make_config(
        folder,
        **{"plugins": None, "derta": None, "datasets": [entry(folder, "helpful", type="chat_template")], **changes},
    )


SHORT = {  # what `plugins` is, and what the host is given
    "bare": ("derta", [PLUGIN]),
    "bare, in capitals": ("DeRTa", [PLUGIN]),
    "bare, with blanks": (" derta ", [PLUGIN]),
    "bare and long": (PLUGIN, [PLUGIN]),
    "a list": (["derta"], [PLUGIN]),
    "a list, long": ([PLUGIN], [PLUGIN]),
    "both forms": (["derta", PLUGIN], [PLUGIN]),
    "among others": ([OTHER, "derta"], [OTHER, PLUGIN]),
    "before others": (["derta", OTHER], [PLUGIN, OTHER]),
}


@pytest.mark.parametrize("name", SHORT)
def test_short_forms_turn_derta_on(folder, name):
    given, expected = SHORT[name]
    cfg = validated(make_config(folder, plugins=given))
    assert cfg.plugins == expected
    assert list(PluginManager.get_instance().plugins) == expected
    assert type(our_plugin()) is DeRTaPlugin
    assert our_plugin().is_on(cfg)


@pytest.mark.parametrize("plugins", [[OTHER], [OTHER, OTHER], "my.Plugin", [], None, {"my": 1}, (OTHER,)])
def test_what_is_not_ours_is_given_to_the_host_as_it_is(plugins):
    assert patch.long_names(plugins) is plugins


@pytest.mark.parametrize("plugins", [None, [], [OTHER]])
def test_a_config_without_anything_of_ours_is_as_without_the_patch(ordinary, plugins):
    with_us, without_us = ordinary(plugins=plugins), ordinary(plugins=plugins)
    before = copy.deepcopy(with_us)
    host_config.prepare_plugins(with_us)
    patch.undo()
    host_config.prepare_plugins(without_us)
    assert with_us == without_us == before
    assert list(PluginManager.get_instance().plugins) == (plugins or [])


TYPOS = [
    "derta_plugin.adapters.axolotl.DeRTaPlugin",
    "derta_plugins.adapters.axolotl2.DeRTaPlugin",
    "derta_plugins.adapters.DeRTa.Plugin",
    "derta-plugins.adapters.axolotl.DeRTaPlugin",
]


@pytest.mark.parametrize("name", TYPOS)
def test_a_misspelt_module_that_the_host_goes_on_without_ends_the_run(ordinary, folder, name):
    for cfg in (ordinary(plugins=[OTHER, name]), make_config(folder, plugins=[name])):
        with pytest.raises(ConfigError, match=f"could not load the plugin '{name}'"):
            host_config.prepare_plugins(cfg)


@pytest.mark.parametrize("name", ["dertaa", "derta_plugins", *TYPOS])
def test_a_misspelt_bare_string_ends_the_run(ordinary, name):
    with pytest.raises(ConfigError, match=f"`plugins: {name}` names no plugin; write `plugins: derta`"):
        host_config.prepare_plugins(ordinary(plugins=name))


def test_a_misspelt_class_ends_the_run(ordinary):
    with pytest.raises((AttributeError, ConfigError), match="DeRTaPlugim"):
        host_config.prepare_plugins(ordinary(plugins=["derta_plugins.adapters.axolotl.DeRTaPlugim"]))


def test_a_misspelt_name_ends_the_run_though_an_earlier_config_loaded_us(folder):
    validated(make_config(folder))
    for plugins in (TYPOS[:1], None, [OTHER]):
        with pytest.raises(ConfigError):
            host_config.prepare_plugins(make_config(folder, plugins=plugins))


USES = {  # what is of ours in the config, and what the message calls it
    "a block": ({"derta": {"rto_weight": 0.5}}, "a block `derta:`"),
    "an empty block": ({"derta": {}}, "a block `derta:`"),
    "an entry": ({"datasets": "ours"}, f"`type: {DATASET_TYPE}` in `datasets`"),
    "an entry by its function": ({"datasets": "function"}, f"`type: {DATASET_TYPE}` in `datasets`"),
    "an entry of the test set": ({"test_datasets": "ours"}, f"`type: {DATASET_TYPE}` in `test_datasets`"),
}


@pytest.mark.parametrize("plugins", [None, [], [OTHER]], ids=["none", "empty", "another"])
@pytest.mark.parametrize("name", USES)
def test_what_needs_the_plugin_ends_the_run_without_it(ordinary, folder, name, plugins):
    entries = {"ours": [entry(folder)], "function": [entry(folder, type=f"{DATASET_TYPE}.load")]}
    changes, message = USES[name]
    changes = {key: entries[value] if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(ConfigError, match=f"{message}, but `plugins` does not turn DeRTa on"):
        host_config.prepare_plugins(ordinary(plugins=plugins, **changes))


def test_a_block_that_is_null_ends_the_run_too(ordinary):
    cfg = ordinary()
    cfg["derta"] = None
    with pytest.raises(ConfigError, match="a block `derta:`"):
        host_config.prepare_plugins(cfg)


def test_a_plugin_of_another_class_under_our_name_is_not_ours(folder, monkeypatch):
    monkeypatch.setattr("axolotl.integrations.base.load_plugin", lambda name: OtherPlugin())
    with pytest.raises(ConfigError, match="does not turn DeRTa on"):
        host_config.prepare_plugins(make_config(folder))


@pytest.fixture
def not_imported(monkeypatch):
    """The adapter as in a process that did not import it yet."""
    monkeypatch.delitem(sys.modules, "derta_plugins.adapters.axolotl")
    monkeypatch.delattr(adapters, "axolotl")


@pytest.mark.parametrize("missing", ["axolotl_plugin", "axolotl_args", "axolotl_names", "trainer_mixins"])
def test_an_adapter_that_does_not_import_ends_the_run(folder, not_imported, monkeypatch, missing):
    """The host swallows an ImportError, so it must be none."""
    for module in ("axolotl_plugin", "axolotl_trainer"):
        monkeypatch.delitem(sys.modules, f"derta_plugins.adapters.{module}", raising=False)
        monkeypatch.delattr(adapters, module, raising=False)
    monkeypatch.setitem(sys.modules, f"derta_plugins.adapters.{missing}", None)
    with pytest.raises(RuntimeError, match=r"its Axolotl adapter does not import .* Reinstall it"):
        host_config.prepare_plugins(make_config(folder))
    patch.undo()
    with pytest.raises(RuntimeError, match="its Axolotl adapter does not import"):
        host_config.prepare_plugins(make_config(folder))


def test_without_axolotl_the_adapter_is_absent_and_not_broken(not_imported, monkeypatch):
    monkeypatch.setitem(sys.modules, "axolotl", None)
    with pytest.raises(ImportError):
        __import__("derta_plugins.adapters.axolotl")


@pytest.mark.parametrize("number", ["0.18.9", "0.20.0", "0.20.0rc1", "1.0", "0.19.0.dev0"])
def test_another_version_refuses_to_be_a_plugin(folder, not_imported, monkeypatch, number):
    monkeypatch.setattr(axolotl_names, "version", lambda name: number)
    with pytest.raises(RuntimeError, match=rf"needs axolotl>=0.19.0,<0.20, got {number}"):
        host_config.prepare_plugins(make_config(folder))


@pytest.mark.parametrize("number", ["0.19.0", "0.19.7", "0.19.0.post1", "0.19.0+cpu"])
def test_versions_of_this_line_fit(monkeypatch, number):
    monkeypatch.setattr(axolotl_names, "version", lambda name: number)
    assert patch.missing_points() == []


def test_apply_undo_and_apply_twice():
    patch.undo()
    host = host_config.prepare_plugins
    assert not patch.is_applied()
    patch.apply(host_config)
    applied = host_config.prepare_plugins
    patch.apply(host_config)
    assert patch.is_applied()
    assert host_config.prepare_plugins is applied, "a second time changes nothing"
    assert (applied.__name__, applied.__doc__) == (host.__name__, host.__doc__)
    assert patch.missing_points() == [], "also of a host that is extended already"
    patch.undo()
    patch.undo()
    assert not patch.is_applied()
    assert host_config.prepare_plugins is host


def test_this_host_has_every_patch_point():
    patch.undo()
    assert patch.missing_points() == []


def another_signature(cfg, strict):
    """Of a host that changed."""


def without(name):
    return lambda monkeypatch: monkeypatch.delattr(host_config, name)


def instead(name, value):
    return lambda monkeypatch: monkeypatch.setattr(host_config, name, value)


def as_version(number):
    return lambda monkeypatch: monkeypatch.setattr(axolotl_names, "version", lambda name: number)


UNFIT = {
    "newer": (as_version("0.20.0"), "DeRTa needs axolotl>=0.19.0,<0.20, got 0.20.0"),
    "older": (as_version("0.18.0"), "got 0.18.0"),
    "no function": (without("prepare_plugins"), r"axolotl.cli.config.prepare_plugins(cfg) is not there"),
    "other arguments": (instead("prepare_plugins", another_signature), "prepare_plugins(cfg) is not there"),
    "not called": (instead("load_cfg", lambda config: config), "load_cfg does not call prepare_plugins"),
    "no load_cfg that can be read": (instead("load_cfg", print), "load_cfg does not call prepare_plugins"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_host_that_does_not_fit_is_left_as_it_was_with_one_warning(monkeypatch, caplog, name):
    patch.undo()
    break_it, message = UNFIT[name]
    break_it(monkeypatch)
    before = dict(vars(host_config))
    with caplog.at_level(logging.WARNING):
        patch.apply(host_config)
    (record,) = [record for record in caplog.records if record.name == patch.__name__]
    assert message in record.getMessage()
    assert "runs as it did" in record.getMessage()
    assert not patch.is_applied()
    assert dict(vars(host_config)) == before
    (problem,) = patch.missing_points()
    assert message in problem


def test_a_version_that_is_not_installed_is_said(monkeypatch):
    def absent(name):
        raise axolotl_names.PackageNotFoundError

    monkeypatch.setattr(axolotl_names, "version", absent)
    assert "got none" in axolotl_names.version_problem()


def test_the_patch_imports_neither_torch_nor_the_host():
    code = "import sys, derta_plugins.adapters.axolotl_patch as p; p.is_applied(); p.undo(); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "derta_plugins" in loaded
    assert not loaded & {"torch", "axolotl", "transformers", "datasets", "pydantic"}
