"""The wheel, and the one that an editable install makes: built here, put into a new environment, used, removed."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.fake_hosts import run_python, write_hosts

ROOT = Path(__file__).resolve().parents[1]
STARTUP_FILE = "derta_plugins_autoload.pth"
ON_START = """
import sys
ours = sorted(name for name in sys.modules if name.startswith("derta_plugins"))
print(ours, any(type(finder).__name__ == "HostFinder" for finder in sys.meta_path))
"""
STARTED = "['derta_plugins', 'derta_plugins._autoload'] True\n"
NOT_STARTED = "[] False\n"


class Environment:
    """A new environment without pip, and the pip of another one for it."""

    def __init__(self, folder: Path, pip: Path):
        venv.create(folder)
        self.folder, self._pip = folder, pip
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (self.site / "neighbour.py").touch()  # pip would remove an empty folder
        self.files_before = self.files()

    def python(self, *arguments, path=(), autoload=None, **options):
        python = self.folder / "bin" / "python"
        return run_python(*arguments, python=python, path=path, cwd="/", DERTA_AUTOLOAD=autoload, **options)

    def pip(self, *arguments):
        run_python("-m", "pip", "--python", self.folder, "--quiet", *arguments, python=self._pip)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Build a wheel of a kind, once."""
    wheels = {}

    def build_once(kind):
        if kind not in wheels:
            folder = tmp_path_factory.mktemp("wheel")
            command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
            subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
            (wheels[kind],) = folder.glob("*.whl")
        return wheels[kind]

    return build_once


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    """A Python that has pip; the one that runs the tests may have none."""
    folder = tmp_path_factory.mktemp("pip")
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture(params=["wheel", "wheel:editable"])
def environment(request, build, pip, tmp_path):
    made = Environment(tmp_path / "environment", pip)
    made.pip("install", "--no-index", "--no-deps", build(request.param))
    return made


def test_the_start_up_file_is_one_import_line_beside_the_package(build):
    with zipfile.ZipFile(build("wheel")) as archive:
        names = archive.namelist()
        assert [name for name in names if name.endswith(".pth")] == [STARTUP_FILE]
        assert "derta_plugins/startup/sitecustomize.py" in names
        (line,) = archive.read(STARTUP_FILE).decode("ascii").splitlines()
    assert line.startswith("import ")


def test_an_editable_install_puts_the_folder_on_the_path_before_the_line_runs(build):
    """Python reads `.pth` files in the order of their names."""
    with zipfile.ZipFile(build("wheel:editable")) as archive:
        first, second = sorted(name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(first).decode().strip() == str(ROOT)
        assert second == STARTUP_FILE


def test_every_start_has_the_finder_unless_it_is_switched_off(environment):
    assert environment.python("-c", ON_START).stdout == STARTED
    assert environment.python("-I", "-c", ON_START).stdout == STARTED
    assert environment.python("-c", ON_START, autoload="0").stdout == NOT_STARTED
    assert environment.python("-S", "-c", ON_START).stdout == NOT_STARTED


def test_children_of_torchrun_have_the_finder(environment, tmp_path):
    """Torch comes from the environment of this test; a start-up file beside it does not run from there."""
    hosts = write_hosts(tmp_path / "hosts")
    options = {"path": [hosts, sysconfig.get_path("purelib")], "OMP_NUM_THREADS": "1"}
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", hosts / "worker.py")
    assert environment.python(*torchrun, **options).stdout == "worker: DeRTa\n" * 2


def test_a_half_installed_package_starts_in_silence(environment):
    """Left behind by an uninstall that was interrupted, or by a checkout that was deleted."""
    package = environment.site / "derta_plugins"
    if package.exists():
        module = package / "_autoload.py"
        for damage in (lambda: module.write_text("def install(:"), lambda: module.write_text(""), module.unlink):
            damage()
            done = environment.python("-c", ON_START)
            assert done.stdout.endswith(" False\n")
            assert done.stderr == ""
        shutil.rmtree(package)
    else:
        (environment.site / "_editable_impl_derta_plugins.pth").write_text("/a/checkout/that/was/deleted")
    assert (environment.site / STARTUP_FILE).exists()
    done = environment.python("-c", ON_START)
    assert (done.stdout, done.stderr) == (NOT_STARTED, "")


def test_uninstalling_leaves_nothing(environment):
    environment.python("-c", "import derta_plugins.hookspecs", PYTHONDONTWRITEBYTECODE=None, check=False)
    added = {Path(path).name for path in environment.files() - environment.files_before}
    assert {STARTUP_FILE, "derta"} <= added
    environment.pip("uninstall", "--yes", "derta-plugins")
    assert environment.files() == environment.files_before
    done = environment.python("-c", ON_START)
    assert (done.stdout, done.stderr) == (NOT_STARTED, "")
