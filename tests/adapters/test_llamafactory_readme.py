"""The README's LLaMA-Factory section, as a reader would run it."""

import json

import pytest
import yaml

from tests.readme_blocks import blocks, run

SECTION = "## Use it in LLaMA-Factory"
# what a machine without a GPU needs besides
ON_CPU = {"use_cpu": True, "logging_steps": 1, "report_to": "none"}


@pytest.fixture
def configured(user_folder):
    (config,), (datasets,) = blocks("yaml", under=SECTION), blocks("json", under=SECTION)
    (user_folder / "config.yaml").write_text(yaml.safe_dump({**yaml.safe_load(config), **ON_CPU}), encoding="utf-8")
    (user_folder / "dataset_info.json").write_text(datasets, encoding="utf-8")
    return user_folder


def check(result, folder):
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    logged = json.loads((folder / "my-safe-model" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert sum(entry.get("rto_tokens", 0) for entry in logged) > 0
    assert any("rto_loss" in entry and "p_refusal" in entry for entry in logged)
    assert (folder / "my-safe-model" / "adapter_model.safetensors").is_file()


def test_the_config_trains(configured):
    install, train = blocks("bash", under=SECTION)
    assert install.strip() == "pip install 'derta-plugins[llamafactory]'"
    check(run(train.strip(), configured), configured)


def test_without_the_start_up_file_it_is_said_with_the_command(configured):
    (command,) = blocks("bash", under="### How it gets there")
    switched_off = run("llamafactory-cli train config.yaml", configured, DERTA_AUTOLOAD="0")
    assert switched_off.returncode != 0
    assert "derta" in switched_off.stderr
    assert not (configured / "my-safe-model").exists()
    check(run(command.strip(), configured), configured)
