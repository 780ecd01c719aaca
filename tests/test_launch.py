"""`python -m derta_plugins.launch`: the command, its children of every kind, and what it refuses."""

import json
import re
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

from derta_plugins import launch
from tests.fake_hosts import run_python, write_hosts

LAUNCH = ("-m", "derta_plugins.launch")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python that has what this one has, but not the start-up file: such a file runs only where it was installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(launch.__file__).parents[1])}
    Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}), "places.pth").write_text("\n".join(places))
    return folder / "bin" / "python"


@pytest.fixture
def hosts(tmp_path):
    return write_hosts(tmp_path / "hosts")


@pytest.fixture
def start(hosts, python):
    """Run a command through `launch`, with start-up code switched off besides."""

    def start_command(*command, path=(), **options):
        options = {"DERTA_AUTOLOAD": "0", "OMP_NUM_THREADS": "1", **options}
        return run_python(*LAUNCH, *command, path=[hosts, *path], python=python, **options)

    return start_command


# --- the command and its children ------------------------------------------------------------------------------------


def test_the_command_is_extended_where_nothing_else_does_it(hosts, start, python):
    done = start("python", "-m", "worker")
    assert (done.stdout, done.stderr) == ("worker: DeRTa\n", "")
    for switch in ("0", "1"):
        assert run_python("-m", "worker", path=hosts, python=python, DERTA_AUTOLOAD=switch).stdout == "worker: host\n"


def test_a_start_up_file_besides_does_no_harm(hosts):
    """In the Python of this test, which has it: both ways install the one finder."""
    code = "import sys, worker; print([type(finder).__name__ for finder in sys.meta_path].count('HostFinder'))"
    done = run_python(*LAUNCH, "python", "-c", code, path=hosts)
    assert (done.stdout, done.stderr) == ("worker: DeRTa\n1\n", "")


@pytest.mark.parametrize("kind", ["subprocess", "spawn", "fork"])
def test_children_are_extended(start, tmp_path, kind):
    script = tmp_path / "parent.py"
    script.write_text(
        f"""
import importlib, multiprocessing, subprocess, sys

if __name__ == "__main__":
    if {kind!r} == "subprocess":
        subprocess.run([sys.executable, "-m", "worker"], check=True)
    else:
        child = multiprocessing.get_context({kind!r}).Process(target=importlib.import_module, args=("worker",))
        child.start()
        child.join()
"""
    )
    assert start("python", script).stdout == "worker: DeRTa\n"


def test_torchrun_workers_are_extended(hosts, start):
    torchrun = ("python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0")
    done = start(*torchrun, hosts / "worker.py")
    assert done.stdout == "worker: DeRTa\n" * 2


@pytest.mark.skipif(find_spec("llamafactory") is None, reason="Ray belongs to the session of LLaMA-Factory")
def test_ray_workers_are_extended(start, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        "import ray\nray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "@ray.remote\ndef work():\n    import fakes, llamafactory.train.tuner as tuner\n    return tuner.run()\n"
        "print(ray.get(work.remote()))"
    )
    assert start("python", script, RAY_AUTH_MODE="disabled").stdout == "DeRTa\n"


def test_a_child_can_be_switched_off(start, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'worker'], env={**os.environ, 'DERTA_AUTOLOAD': '0'}, check=True)"
    )
    assert start("python", script).stdout == "worker: host\n"


def test_arguments_folder_and_exit_status_are_the_commands_own(start, tmp_path):
    script = tmp_path / "command.py"
    script.write_text("import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd()])); sys.exit(3)")
    arguments = ["train", "a b.yaml", "--", "-h", "--stage=derta", "'quoted'", ""]
    done = start("python", script, *arguments, cwd=tmp_path, check=False)
    assert json.loads(done.stdout) == [arguments, str(tmp_path)]
    assert done.returncode == 3


def test_the_process_is_replaced_not_wrapped(python, tmp_path):
    """So that signals of a scheduler reach the command."""
    script = tmp_path / "command.py"
    script.write_text("import os; print(os.getpid())")
    starter = "import os; print(os.getpid(), flush=True); from derta_plugins.launch import main; main()"
    done = run_python("-c", starter, "python", script, python=python)
    first, second = done.stdout.split()
    assert first == second


# --- other `sitecustomize` -------------------------------------------------------------------------------------------

SEES = """
import sys, worker
print(sys.modules["sitecustomize"].__file__, getattr(sys, "they_ran", []))
print([entry for entry in sys.path if "startup" in entry])
"""


def test_a_sitecustomize_that_ours_shadows_runs_too(start, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    file = theirs / "sitecustomize.py"
    file.write_text("import sys; sys.they_ran = [*getattr(sys, 'they_ran', []), __name__]")
    done = start("python", "-c", SEES, path=[theirs])
    assert done.stdout.splitlines() == ["worker: DeRTa", f"{file} ['sitecustomize']", "[]"]


def test_without_another_ours_stands_alone(start, python):
    done = start("python", "-c", SEES)
    code = "import sys; print(getattr(sys.modules.get('sitecustomize'), '__file__', ''))"
    plain = run_python("-c", code, python=python)
    file = plain.stdout.strip() or f"{launch.STARTUP}/sitecustomize.py"  # some systems come with one
    assert done.stdout.splitlines() == ["worker: DeRTa", f"{file} []", "[]"]


@pytest.mark.parametrize("failure", ["1 / 0", "import an_absent_module"])
def test_a_sitecustomize_that_fails_is_reported_by_python_as_ever(start, python, tmp_path, failure):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text(failure)
    done = start("python", "-m", "worker", path=[theirs])
    report = run_python("-c", "pass", path=theirs, python=python).stderr
    assert report.startswith("Error in sitecustomize; set PYTHONVERBOSE for traceback:\n")
    assert done.stdout == "worker: DeRTa\n"
    assert done.stderr == report * 2, "once when `launch` starts, once when the command does"


def test_a_python_without_this_package_says_so_and_goes_on(tmp_path):
    """The command may start interpreters of other environments."""
    venv.create(tmp_path / "other", with_pip=False)
    other = tmp_path / "other" / "bin" / "python"
    done = run_python("-c", "print('ran')", path=launch.STARTUP, python=other, DERTA_AUTOLOAD="1")
    assert done.stdout == "ran\n"
    message = rf"derta_plugins\.launch: no DeRTa in {re.escape(str(other))}: No module named 'derta_plugins'\n"
    assert re.fullmatch(message, done.stderr)


# --- PYTHONPATH ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, launch.STARTUP),
        ({"PYTHONPATH": ""}, launch.STARTUP),
        ({"PYTHONPATH": "/a:/b"}, f"{launch.STARTUP}:/a:/b"),
        ({"PYTHONPATH": ":/a"}, f"{launch.STARTUP}::/a"),
        ({"PYTHONPATH": f"/a:{launch.STARTUP}"}, f"{launch.STARTUP}:/a"),
        ({"DERTA_AUTOLOAD": "0"}, launch.STARTUP),
    ],
)
def test_the_folder_is_first_on_pythonpath_and_what_was_there_stays(before, after):
    before = {"HOME": "/root", **before}
    given = dict(before)
    assert launch.with_startup(before) == {"HOME": "/root", "PYTHONPATH": after, "DERTA_AUTOLOAD": "1"}
    assert before == given


def test_the_folder_holds_what_python_looks_for():
    assert Path(launch.STARTUP, "sitecustomize.py").is_file()


# --- which command ---------------------------------------------------------------------------------------------------


def executable(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_the_command_beside_python_comes_before_the_one_on_path(tmp_path, monkeypatch):
    beside, on_path = (executable(tmp_path / folder / "tool") for folder in ("beside", "path"))
    only_there = executable(tmp_path / "path" / "other")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert launch._find("tool") == beside != on_path
    assert launch._find("other") == only_there
    assert launch._find(only_there) == only_there


@pytest.mark.parametrize("command", launch.HOST_COMMANDS)
def test_a_command_whose_host_is_not_here_is_refused_though_path_has_one(tmp_path, monkeypatch, command):
    """It would be another environment's, where there is no DeRTa."""
    host = launch.HOST_COMMANDS[command]
    executable(tmp_path / "bin" / command)
    (tmp_path / host).mkdir()  # nor does a folder of that name make a host
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, host, raising=False)
    expected = f"`{command}` needs {host}, which {sys.executable} does not have: pip install 'derta-plugins[{host}]'"
    with pytest.raises(LookupError, match=rf"^{re.escape(expected)}$"):
        launch._find(command)


@pytest.mark.parametrize("command", launch.HOST_COMMANDS)
def test_a_command_whose_host_is_here_is_found(tmp_path, monkeypatch, command):
    monkeypatch.syspath_prepend(write_hosts(tmp_path / "hosts"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.delitem(sys.modules, launch.HOST_COMMANDS[command], raising=False)
    file = executable(tmp_path / "bin" / command)
    assert launch._find(command) == file


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "no command; give one, e.g. llamafactory-cli train cfg.yaml"),
        (["llamafactory-clu"], "no command `llamafactory-clu` beside {python} or on PATH; check its spelling."),
    ],
)
def test_bad_commands_end_in_one_sentence(start, python, command, message):
    done = start(*command, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: {message.format(python=python)}\n")
    assert "Traceback" not in done.stderr


def test_a_file_that_cannot_be_run_ends_in_one_sentence(start, tmp_path):
    file = Path(executable(tmp_path / "bin" / "tool"))
    file.write_bytes(b"\x00no program")
    done = start(file, check=False)
    assert done.returncode == 2
    assert re.search(rf"error: .*Exec format error: '{file}'\n$", done.stderr), done.stderr


def test_help_names_both_hosts(start):
    assert "Axolotl and LLaMA-Factory" in " ".join(start("-h").stdout.split())
