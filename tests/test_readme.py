"""What a reader can copy from the README is run: its Python blocks here, its shell blocks here or in `.ci/run`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "bash"]


def run(command, folder):
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("number", range(2), ids=["before", "after"])
def test_python_blocks_train(user_folder, number):
    assert len(PYTHON) == 2, "the README has another number of Python blocks: run them here"
    assert "Without a GPU add `use_cpu=True, bf16=False` to either config" in README
    block = PYTHON[number].replace("output_dir=", "use_cpu=True, bf16=False, output_dir=")
    result = run([sys.executable, "-c", block], user_folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'train_loss'" in result.stdout
    assert ("'rto_loss'" in result.stdout) is (number == 1)


def test_derta_commands_run(user_folder):
    (block,) = [text for text in SHELL if "derta show" in text]
    for line in block.strip().splitlines():
        result = run(line.split(), user_folder)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Sorry" in result.stdout


def test_the_two_commands_are_those_of_ci():
    """`.ci/run` takes the first code block under these headings, so what CI runs is what the reader copies."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for heading, word in (("## Try it", "derta demo"), ("## Run all tests", "nox -f tests/noxfile.py")):
        assert f'command_after "{heading}"' in ci
        section = README.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]
        block = re.search(r"^```bash\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL).group(1)
        assert word in block
        assert len(block.strip().splitlines()) == 1


def test_every_module_has_its_line():
    package = ROOT / "derta_plugins"
    for path in package.rglob("*.py"):
        if path.name != "__init__.py" and "demo" not in path.parts:
            assert path.name in README, f"{path.relative_to(ROOT)} is not in the README's list"


def test_knobs_named_in_the_readme_exist():
    from derta_plugins.adapters.trl import DeRTaSFTConfig

    section = README.split("### Knobs", 1)[1].split("\n## ", 1)[0]
    for name in [*re.findall(r"`(\w+)=", section), "num_prefixes", "rto_keep_ratio", "resample_each_epoch"]:
        assert name in DeRTaSFTConfig.__dataclass_fields__, name
