"""The finder that extends hosts at their import, in fresh interpreters with hosts that exist only on disk."""

import re
import sys
import textwrap
import zipfile

import pytest

from derta_plugins import _autoload
from tests.fake_hosts import HOSTS, run_python, write_hosts

START_UP = ("derta_plugins", "derta_plugins._autoload")
BOUND_US = 1000  # about 600 here, most of it looking through folders; `import typing` alone would break it
INSTALL = "from derta_plugins import _autoload; _autoload.install(); import fakes\n"


@pytest.fixture
def hosts(tmp_path):
    return write_hosts(tmp_path)


@pytest.fixture
def run(hosts):
    """Run code after `install()`, or without it; the start-up file of this environment is switched off."""

    def run_code(code, *, install=True, path=hosts, **options):
        code = (INSTALL if install else "") + textwrap.dedent(code)
        return run_python("-c", code, path=path, DERTA_AUTOLOAD="0", **options)

    return run_code


def answers(run, code, **options):
    """What code prints, with nothing on stderr."""
    done = run(code, **options)
    assert done.stderr == ""
    return done.stdout.strip()


# --- what a start costs ----------------------------------------------------------------------------------------------


def test_a_start_adds_two_small_modules_and_no_other():
    """In this environment, where the start-up file stands since the package was installed."""
    code = "import sys; print(*sys.modules)"
    without, with_it = (set(run_python("-c", code, DERTA_AUTOLOAD=off).stdout.split()) for off in ("0", None))
    assert with_it - without == set(START_UP), "no start-up file: reinstall the checkout (pip install -e .)"
    assert "typing" not in with_it, "else this test does not see whether we import it"


def test_a_start_costs_less_than_a_millisecond(tmp_path):
    """The fastest of 20, as `-X importtime` has them: other work of the machine can only add to it."""
    environment = {"DERTA_AUTOLOAD": None, "PYTHONDONTWRITEBYTECODE": None, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    times = []
    for _ in range(21):  # the first one compiles
        report = run_python("-X", "importtime", "-c", "pass", **environment).stderr
        times += re.findall(rf"(\d+) \| +{re.escape(START_UP[-1])}$", report, re.MULTILINE)[:1]
    assert len(times) == 21
    assert min(map(int, times)) < BOUND_US, times


def test_install_imports_nothing(run):
    code = "import sys; before = set(sys.modules); _autoload.install(); print(set(sys.modules) - before)"
    assert answers(run, code) == "set()"


# --- extending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "module"), HOSTS.items())
def test_a_host_is_extended_after_it_was_executed(run, host, module):
    code = f"import {module} as m, patch_{host}; print(m.run(), patch_{host}.extended)"
    assert answers(run, code) == f"DeRTa ['{module} that answers host']"
    assert answers(run, f"import fakes, {module} as m; print(m.run())", install=False) == "host"


def test_the_patches_are_those_of_the_adapters():
    assert {module: f"derta_plugins.adapters.{host}_patch" for host, module in HOSTS.items()} == _autoload.PATCHES


def test_no_other_module_is_touched(run, hosts):
    for name in ("config", "tuner"):
        (hosts / f"{name}.py").write_text("")
    code = """
        import sys, json, llamafactory.train, axolotl.cli, patch_axolotl, xml.dom, config, tuner
        finder = next(finder for finder in sys.meta_path if isinstance(finder, _autoload.HostFinder))
        names = ["axolotl", "axolotl.cli", "llamafactory.train", "tuner", "config", "json", "torch"]
        print([name for name in names if finder.find_spec(name)])
        modules = json, llamafactory.train, axolotl.cli, xml.dom, config, tuner
        print([m.__name__ for m in modules if isinstance(m.__loader__, _autoload._ExtendingLoader)])
        print(patch_axolotl.extended, "patch_llamafactory" in sys.modules)
    """
    assert answers(run, code).split("\n") == ["[]", "[]", "[] False"]


def test_installing_twice_puts_one_finder_there(run):
    code = "import sys; _autoload.install(); print([type(f).__name__ for f in sys.meta_path].count('HostFinder'))"
    assert answers(run, code) == "1"


def test_a_host_that_is_imported_already_is_extended_at_once(run):
    code = """
        import fakes, llamafactory.train.tuner as m
        from derta_plugins import _autoload
        before = m.run()
        _autoload.install()
        print(before, m.run())
    """
    assert answers(run, code, install=False) == "host DeRTa"


def test_a_host_whose_import_is_blocked_stays_blocked(run):
    code = """
        import sys
        from derta_plugins import _autoload
        sys.modules["llamafactory.train.tuner"] = None
        _autoload.install()
        try:
            import llamafactory.train.tuner
        except ImportError as error:
            print(error)
    """
    assert "llamafactory.train.tuner halted" in answers(run, code, install=False)


# --- the host's module is as it would be -----------------------------------------------------------------------------

DESCRIBE = """
    import axolotl.cli.config as m, inspect
    spec = m.__spec__
    print(type(m.__loader__), spec.loader is m.__loader__, [type(loader) for loader in m.LOADERS], vars(m.__loader__))
    print(spec.name, spec.origin, spec.cached, spec.has_location, spec.parent, spec.submodule_search_locations)
    print(m.__name__, m.__file__, m.__cached__, m.__package__, m.__doc__, sorted(vars(m)))
    print(inspect.getsource(m), m.__loader__.get_code(m.__name__).co_filename)
"""


def test_spec_loader_and_source_are_the_hosts_own(run):
    plain = answers(run, DESCRIBE, install=False)
    assert "SourceFileLoader" in plain
    assert answers(run, DESCRIBE) == plain


def test_a_probe_does_not_use_the_finder_up_and_shows_the_hosts_loader(run):
    code = """
        import copy, pickle, sys, patch_axolotl
        from importlib.util import find_spec
        spec = [find_spec("axolotl.cli.config") for _ in range(3)][0]
        loader = spec.loader
        print(loader.path == spec.origin, loader.is_package(spec.name), "def run" in loader.get_source(spec.name))
        print(copy.copy(loader).path == loader.path, pickle.loads(pickle.dumps(loader)).path == loader.path)
        print(hasattr(loader, "no_such_name"), spec.name in sys.modules, patch_axolotl.extended)
        import axolotl.cli.config as m
        print(m.run(), len(patch_axolotl.extended))
    """
    assert answers(run, code).split("\n") == ["True False True", "True True", "False False []", "DeRTa 1"]


def test_a_reloaded_host_is_extended_again(run):
    code = """
        import importlib, axolotl.cli.config as m, patch_axolotl
        print(importlib.reload(m) is m, m.run(), len(patch_axolotl.extended), type(m.__loader__).__name__)
    """
    assert answers(run, code) == "True DeRTa 2 SourceFileLoader"


@pytest.mark.parametrize("wrap", ["", "spec.loader = LazyLoader(spec.loader)"], ids=["by hand", "lazily"])
def test_other_ways_of_loading_extend_too(run, wrap):
    code = f"""
        import sys, patch_axolotl
        from importlib.util import LazyLoader, find_spec, module_from_spec
        spec = find_spec("axolotl.cli.config")
        {wrap}
        m = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(m)
        print(m.run(), len(patch_axolotl.extended), type(m.__loader__).__name__)
    """
    assert answers(run, code) == "DeRTa 1 SourceFileLoader"


def test_a_host_in_a_zip_file_is_extended(run, hosts):
    with zipfile.ZipFile(hosts / "host.zip", "w") as archive:
        for path in sorted((hosts / "axolotl").rglob("*.py")):
            archive.write(path, path.relative_to(hosts))
    code = "import axolotl.cli.config as m; print(m.run(), type(m.__loader__).__name__, 'host.zip' in m.__file__)"
    assert answers(run, code, path=[hosts / "host.zip", hosts]) == "DeRTa zipimporter True"


@pytest.mark.parametrize("place", ["0", "ours + 1"], ids=["before ours", "behind ours"])
def test_it_goes_with_a_finder_that_asks_all_finders(run, place):
    """
    As wrapt's and others' do: each asks the rest, so a search comes back to ours while it is under way, and each has a
    loader of its own.
    """
    code = f"""
        import sys, patch_axolotl
        from importlib.util import find_spec

        class Asking:
            is_busy, asked = False, 0
            def find_spec(self, name, path, target=None):
                if self.is_busy or name != "axolotl.cli.config":
                    return None
                self.is_busy, Asking.asked = True, self.asked + 1
                try:
                    spec = find_spec(name)
                finally:
                    self.is_busy = False
                spec.loader = Theirs(spec.loader)
                return spec

        class Theirs:
            def __init__(self, loader):
                self.create_module, self.run = loader.create_module, loader.exec_module
            def exec_module(self, module):
                self.run(module)

        class Old:
            def find_module(self, name, path=None):
                return None

        ours = [type(finder).__name__ for finder in sys.meta_path].index("HostFinder")
        sys.meta_path[{place}:{place}] = [Asking(), Old()]
        import axolotl.cli.config as m
        print(m.run(), len(patch_axolotl.extended), Asking.asked, m.__spec__.loader is m.__loader__, type(m.__loader__))
    """
    assert answers(run, code) == "DeRTa 1 1 True <class '__main__.Theirs'>"


# --- failures --------------------------------------------------------------------------------------------------------


def test_an_absent_host_is_as_absent_as_before(run, hosts):
    (hosts / "axolotl" / "cli" / "config.py").unlink()
    code = """
        try:
            import axolotl.cli.config
        except ImportError as error:
            print(type(error).__name__, error.name, error)
    """
    message = "ModuleNotFoundError axolotl.cli.config No module named 'axolotl.cli.config'"
    assert answers(run, code) == answers(run, code, install=False) == message


def test_a_host_that_fails_by_itself_is_not_extended(run, hosts):
    (hosts / "axolotl" / "cli" / "config.py").write_text("raise ImportError('no GPU')")
    code = """
        import sys, patch_axolotl
        for _ in range(2):
            try:
                import axolotl.cli.config
            except ImportError as error:
                print(error, "axolotl.cli.config" in sys.modules, patch_axolotl.extended)
    """
    assert answers(run, code).split("\n") == ["no GPU False []"] * 2


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (None, r"ModuleNotFoundError: No module named 'patch_llamafactory'"),
        ("import absent_requirement", r"ModuleNotFoundError: No module named 'absent_requirement'"),
        ("def apply(module):\n    (", r"SyntaxError: '\(' was never closed \(patch_llamafactory\.py, line 2\)"),
        ("", r"AttributeError: module 'patch_llamafactory' has no attribute 'apply'"),
    ],
    ids=["absent", "incomplete", "cut off", "empty"],
)
def test_a_half_installed_package_warns_by_name_and_leaves_the_host_alone(run, hosts, patch, reason):
    file = hosts / "patch_llamafactory.py"
    file.unlink() if patch is None else file.write_text(patch)
    done = run("import llamafactory.train.tuner as m; print(m.run(), m.__spec__.loader is m.__loader__)")
    assert done.stdout == "host True\n"
    warning = rf"patch_llamafactory does not import \({reason}\): llamafactory runs without DeRTa\. Reinstall .*\n"
    assert re.fullmatch(warning, done.stderr), done.stderr


def test_a_patch_that_fails_ends_the_import_and_says_how_to_go_without(run, hosts):
    """A host that is half patched must not train, and a second try must not find it there."""
    (hosts / "patch_axolotl.py").write_text("def apply(module):\n    module.run = None\n    module.run()")
    code = """
        import sys
        for _ in range(2):
            try:
                import axolotl.cli.config
            except TypeError as error:
                print(*error.__notes__, "axolotl.cli.config" in sys.modules)
        import axolotl.cli.config
    """
    done = run(code, check=False)
    note = "patch_axolotl could not extend axolotl. To run axolotl without DeRTa, set DERTA_AUTOLOAD=0."
    assert done.stdout.splitlines() == [f"{note} False"] * 2
    assert done.returncode == 1
    assert done.stderr.endswith(f"TypeError: 'NoneType' object is not callable\n{note}\n")


def test_a_patch_that_fails_in_a_host_imported_before_is_not_hidden(run, hosts):
    (hosts / "patch_axolotl.py").write_text("def apply(module):\n    raise RuntimeError('half done')")
    code = "import axolotl.cli.config, fakes; from derta_plugins import _autoload; _autoload.install()"
    done = run(code, install=False, check=False)
    assert done.returncode == 1
    assert "RuntimeError: half done" in done.stderr


def test_is_installed_can_say_no(monkeypatch):
    others = [finder for finder in sys.meta_path if not isinstance(finder, _autoload.HostFinder)]
    monkeypatch.setattr(sys, "meta_path", others)
    assert not _autoload.is_installed()
