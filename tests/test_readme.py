"""What a reader can copy from the README is run: here, in `tests/adapters/test_HOST_readme.py` or in `.ci/run`."""

import re
import shutil
import sys

import pytest

from tests.readme_blocks import README, ROOT, blocks, run

PYTHON = blocks("python")


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
    (block,) = [text for text in blocks("bash") if "derta show" in text]
    for line in block.strip().splitlines():
        result = run(line.split(), user_folder)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Sorry" in result.stdout


def test_the_recipe_becomes_a_config_for_every_host(user_folder):
    (block,) = blocks("bash", under="## One recipe for all three")
    shutil.copy(ROOT / "examples" / "recipe.yaml", user_folder / "recipe.yaml")
    hosts = set()
    for line in block.strip().splitlines():
        result = run(line, user_folder)
        assert result.returncode == 0, result.stdout + result.stderr
        hosts.add(line.split()[-1])
        assert list((user_folder / line.split()[-1]).glob("*.y*ml"))
    assert hosts == {"trl", "axolotl", "llamafactory"}
    assert (user_folder / "llamafactory" / "dataset_info.json").is_file()


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
