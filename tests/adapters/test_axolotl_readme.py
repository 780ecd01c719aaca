"""The README's Axolotl section, as a reader would run it."""

import json

import yaml

from tests.readme_blocks import blocks, run

SECTION = "## Use it in Axolotl"
# what a machine without a GPU needs besides
ON_CPU = {"bf16": False, "tf32": False, "save_steps": 2, "logging_steps": 1, "num_epochs": 2}


def test_the_config_trains(user_folder):
    (config,) = blocks("yaml", under=SECTION)
    install, train = blocks("bash", under=SECTION)
    assert install.strip() == "pip install 'derta-plugins[axolotl]'"
    (user_folder / "config.yml").write_text(yaml.safe_dump({**yaml.safe_load(config), **ON_CPU}), encoding="utf-8")
    result = run(train.strip(), user_folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (*_, state) = sorted((user_folder / "my-safe-model").glob("checkpoint-*/trainer_state.json"))
    logged = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    assert sum(entry.get("rto_tokens", 0) for entry in logged) > 0
    assert any("rto_loss" in entry and "p_refusal" in entry for entry in logged)
    assert (user_folder / "my-safe-model" / "model.safetensors").is_file()
