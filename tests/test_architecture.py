"""The direction of imports, read from the sources and checked by importing in a fresh interpreter."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path

import pytest

import derta_plugins
from derta_plugins import hookspecs

HOSTS = {"trl", "axolotl", "llamafactory", "transformers", "datasets", "peft", "matplotlib", "lm_eval"}
ADAPTERS = {"trl", "axolotl", "llamafactory"}
# What every interpreter or host command starts with: the standard library alone.
START_UP = ["_autoload", "startup", "launch"]
# Each may import itself and what stands before it: a new module needs a place here. `hookspecs` is the contract between
# the plugin manager and the plugins, which it loads by name; `readers` and `transforms` use plugins where the built-in
# ones are not asked for; from `survey` to `plugin_status` is what the commands of `cli` do.
LEVELS = [
    *START_UP,
    *("core", "hookspecs", "plugin_manager", "judges", "attacks", "readers", "transforms", "adapters", "recipe"),
    *("survey", "show", "doctor", "plugin_status", "demo", "cli"),
]

PACKAGE = Path(derta_plugins.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
HOST_FREE = [name for name in MODULES if not name.startswith("derta_plugins.adapters.")]


def imports_of(source: str, *, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a source imports; `from a import b` gives `a` and `a.b`."""
    tree, names = ast.parse(source), set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def level_of(name: str) -> int:
    """Level of a module of the package; -1 for the package itself and for a module without a level."""
    part = name.removeprefix("derta_plugins").lstrip(".").partition(".")[0]
    return LEVELS.index(part) if part in LEVELS else -1


# --- by reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", HOST_FREE)
def test_no_module_outside_adapters_imports_a_host_at_its_top(module):
    assert not roots(imports_of(MODULES[module].read_text(), top_level_only=True)) & HOSTS


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("derta_plugins.core")])
def test_core_imports_torch_and_the_standard_library_alone(module):
    """Anywhere in its sources, inside functions too."""
    imported = imports_of(MODULES[module].read_text())
    assert roots(imported) <= {"derta_plugins", "torch", *sys.stdlib_module_names}
    ours = {name for name in imported if name.startswith("derta_plugins")}
    assert all(name.startswith("derta_plugins.core.") for name in ours - {"derta_plugins.core"})


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.removeprefix("derta_plugins.").split(".")[0] in START_UP]
)
def test_start_up_code_imports_the_standard_library_alone(module):
    """Anywhere in its sources; the package itself, which comes with it, imports nothing at its top."""
    imported = imports_of(MODULES[module].read_text()) - {"sitecustomize"}  # the user's own, which ours stands before
    assert roots(imported) <= {"derta_plugins", *sys.stdlib_module_names}
    assert not imports_of(MODULES["derta_plugins"].read_text(), top_level_only=True)


@pytest.mark.parametrize("module", [name for name in MODULES if ".adapters" not in name])
def test_only_recipe_and_demo_import_from_adapters(module):
    """All others have adapters loaded through their entry points, so that an absent host harms nobody else."""
    found = {name for name in imports_of(MODULES[module].read_text()) if name.startswith("derta_plugins.adapters")}
    assert not found or module.split(".")[1] in ("recipe", "demo"), f"{module} imports {found}"


def test_the_package_says_which_way():
    (said,) = re.findall(r"`(cli > [^`]*)`", derta_plugins.__doc__)
    levels = [[LEVELS.index(name) for name in level.split(", ")] for level in " ".join(said.split()).split(" > ")]
    for higher, lower in pairwise(levels):
        assert min(higher) > max(lower), said
    assert sum(map(len, levels)) == len(set(LEVELS) - {*START_UP, "hookspecs"})


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    assert module == "derta_plugins" or level_of(module) >= 0, f"give {module} a place in LEVELS"
    if module == "derta_plugins":  # its lazy names are type-checked against core
        assert not imports_of(MODULES[module].read_text(), top_level_only=True) & set(MODULES)
        return
    for name in imports_of(MODULES[module].read_text()):
        if name in MODULES:
            assert level_of(name) <= level_of(module), f"{module} imports {name} upwards"


def host_of(module: str) -> str:
    """Host that a module of `adapters` is for, by its name; empty for any other module."""
    name = module.removeprefix("derta_plugins.adapters.").partition("_")[0]
    return name if module.startswith("derta_plugins.adapters.") and name in ADAPTERS else ""


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("derta_plugins.adapters.")])
def test_no_adapter_imports_another(module):
    imported = imports_of(MODULES[module].read_text())
    assert {host_of(name) for name in imported & set(MODULES)} <= {"", host_of(module)}
    others = ADAPTERS - {host_of(module)}
    # Axolotl and LLaMA-Factory are built on TRL, and bring it
    assert not roots(imported) & (others - {"trl"} if host_of(module) else others)


def test_every_adapter_that_is_offered_has_a_host_of_its_own():
    ours = [entry for entry in distribution("derta-plugins").entry_points if entry.group == hookspecs.PROJECT]
    offered = {entry.name: entry.module for entry in ours if ".adapters." in entry.module}
    assert {name: host_of(module) for name, module in offered.items()} == {name: name for name in offered}
    assert set(offered) == ADAPTERS
    assert host_of("derta_plugins.adapters.axolotl_rows") == "axolotl"
    assert host_of("derta_plugins.adapters.prepare") == host_of("derta_plugins.recipe.trl") == ""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import trl", {"trl"}),
        ("import os, datasets.features as f", {"os", "datasets"}),
        ("from transformers.utils import x", {"transformers"}),
        ("import os\ndef f():\n    import trl", {"os"}),
        ("if TYPE_CHECKING:\n    import trl", set()),
    ],
)
def test_reading_finds_imports_at_the_top(source, found):
    assert roots(imports_of(source, top_level_only=True)) == found


def test_reading_finds_imports_everywhere():
    source = "def f():\n    import trl\nif x:\n    from derta_plugins.adapters import prepare"
    assert imports_of(source) == {"trl", "derta_plugins.adapters", "derta_plugins.adapters.prepare"}
    assert level_of("derta_plugins.adapters.prepare") > level_of("derta_plugins.core.losses")


# --- by importing ----------------------------------------------------------------------------------------------------

FIND_HOSTS = f"""
import importlib, json, sys
found, seen = {{}}, set()
for name in sys.argv[1:]:
    importlib.import_module(name)
    found[name] = sorted(({HOSTS!r} & set(sys.modules)) - seen)
    seen |= set(found[name])
print(json.dumps(found))
"""


def hosts_that_come_with(modules, path=PACKAGE.parent):
    """Hosts that each module is the first to pull in, all imported by one fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", FIND_HOSTS, *modules], capture_output=True, text=True, check=True, cwd=path
    )
    return json.loads(run.stdout)


def test_importing_everything_but_adapters_brings_no_host():
    assert hosts_that_come_with(HOST_FREE) == {module: [] for module in HOST_FREE}


def test_the_import_check_can_fail(tmp_path):
    (tmp_path / "harmless.py").write_text("import json")
    (tmp_path / "harmful.py").write_text("def load():\n    import trl\nload()")
    (tmp_path / "trl.py").write_text("")
    found = hosts_that_come_with(["harmless", "harmful", "harmless"], path=tmp_path)
    assert found == {"harmless": [], "harmful": ["trl"]}


# --- public names ----------------------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch():
    code = "import sys, derta_plugins; print([name for name in ('torch', 'pluggy', 'rich') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("name", derta_plugins.__all__)
def test_public_names_load_on_use(name):
    value = getattr(derta_plugins, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("derta_plugins.core.")


def test_every_lazy_name_is_public():
    assert {*derta_plugins._HOME, "__version__"} == set(derta_plugins.__all__)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'derta_plugins' has no attribute 'rto_los'"):
        derta_plugins.rto_los  # noqa: B018


def test_version_is_the_distributions():
    assert derta_plugins.__version__ == distribution("derta-plugins").version
