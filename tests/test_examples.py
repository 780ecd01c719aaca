"""Every file under examples/ is checked here, in the environment of its host, or run by a test that this one names."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from derta_plugins.core.config import DeRTaConfig
from derta_plugins.recipe.convert import convert
from derta_plugins.recipe.reading import read_recipe
from derta_plugins.recipe.schema import Recipe
from tests.adapters.conftest import HOST
from tests.conftest import CHATML, byte_level_bpe
from tests.host_parsers import EXAMPLES, parse

# each recipe, and what stands written from it under examples/, by host
RECIPES = {
    "recipe.yaml": {"axolotl": "axolotl/tiny.yml", "llamafactory": "llamafactory/tiny.yml"},
    **{
        f"{name}.yaml": {
            "trl": f"trl/{name}.yaml",
            "axolotl": f"axolotl/{name}.yml",
            "llamafactory": f"llamafactory/{name}.yaml",
        }
        for name in ("llama3_8b_full", "llama3_70b_lora")
    },
}
WRITTEN = {(recipe, host): file for recipe, files in RECIPES.items() for host, file in files.items()}
OTHERS = {
    "trl/train_derta.py",  # run in tests/adapters/test_trl_training.py
    "trl/llama3_base_template.jinja",
    "llamafactory/dataset_info.json",
    *("zero2.json", "zero3.json"),  # train in tests/adapters/test_ranks.py
    "scale.md",  # runs in tests/adapters/test_trl_scale.py
    "judges.md",  # its figures, in tests/judges/test_calibration.py
}
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# What the authors' commands and scripts say, as each host calls it, in the order of `NAMES`.
PAPER = {
    "llama3_8b_full": (2e-5, 2e-5, 0.03, "cosine", 1024, 2, 16, 1),
    "llama3_70b_lora": (1e-4, 0.0, 0.0, "linear", 512, 2, 8, 2),
}
NAMES = {
    "trl": ("learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "max_length", "num_train_epochs",
            "per_device_train_batch_size", "gradient_accumulation_steps"),
    "axolotl": ("learning_rate", "weight_decay", "warmup_ratio", "lr_scheduler", "sequence_len", "num_epochs",
                "micro_batch_size", "gradient_accumulation_steps"),
    "llamafactory": ("learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "cutoff_len",
                     "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
}  # fmt: skip
KNOBS = {"refusal_text": "Sorry", "prefix_unit": "word", "zero_prefix_ratio": 1 / 3, "seed": 1}
KEPT = {"llama3_8b_full": 0.05, "llama3_70b_lora": 1.0}
LORA = {
    "trl": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "axolotl": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "llamafactory": ("lora_rank", "lora_alpha", "lora_dropout", "lora_target"),
}
ON_CPU = {"trl": {"use_cpu": True}, "axolotl": {}, "llamafactory": {"use_cpu": True}}


def example(file) -> dict:
    return yaml.safe_load((EXAMPLES / file).read_text())


def test_no_example_is_unchecked():
    found = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*") if path.is_file()}
    assert {name for name in found if "__pycache__" not in name} == {*RECIPES, *WRITTEN.values(), *OTHERS}


# --- recipes and what was written from them ---------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "host"), [pair for pair in WRITTEN if pair[1] != "trl"])
def test_an_example_is_what_its_recipe_becomes(recipe, host):
    conversion = convert(read_recipe(EXAMPLES / recipe), host)
    assert example(WRITTEN[recipe, host]) == conversion.config
    if host == "llamafactory":
        registered = json.loads((EXAMPLES / "llamafactory" / "dataset_info.json").read_text())
        assert registered | json.loads(conversion.files["dataset_info.json"]) == registered


def test_dataset_info_registers_no_other_file():
    registered = json.loads((EXAMPLES / "llamafactory" / "dataset_info.json").read_text())
    named = {
        name
        for recipe in RECIPES
        for name in convert(read_recipe(EXAMPLES / recipe), "llamafactory").config["dataset"].split(",")
    }
    assert set(registered) == named


def test_the_recipe_names_every_key():
    text = (EXAMPLES / "recipe.yaml").read_text()
    keys = re.findall(r"^#?(\w+):", text, flags=re.MULTILINE)
    assert sorted(keys) == sorted(setting.name for setting in fields(Recipe))


def test_what_the_recipe_leaves_out_is_recipe_too(tmp_path):
    """Each line right behind a sign, taken in: it is still a recipe, and nothing was said twice."""
    lines = (EXAMPLES / "recipe.yaml").read_text().splitlines()
    left_out = [place for place, line in enumerate(lines) if re.match(r" *#\S", line)]
    assert len(left_out) == 14
    for place in left_out:
        taken = [*lines[:place], lines[place].replace("#", "", 1), *lines[place + 1 :]]
        partner = {"#validation_ratio": "eval_steps: 5", "#eval_steps": "validation_ratio: 0.1"}
        (tmp_path / "recipe.yaml").write_text("\n".join([*taken, partner.get(lines[place].split(":")[0], "")]))
        read_recipe(tmp_path / "recipe.yaml")


# --- as the host reads them -------------------------------------------------------------------------------------------


@pytest.fixture
def example_folder(user_folder, monkeypatch):
    """
    The current directory for the examples of this environment's host: the repository's root, as their comments say, but
    for LLaMA-Factory's, which want `dataset_info.json` beside them.
    """
    monkeypatch.chdir(EXAMPLES / "llamafactory" if HOST == "llamafactory" else EXAMPLES.parent)
    return user_folder


def read_by_host(file, folder) -> dict:
    return parse({**example(file), **ON_CPU[HOST], "bf16": False, "output_dir": str(folder / "out")}, folder)


@pytest.mark.parametrize("name", PAPER)
def test_the_host_reads_the_papers_settings(name, example_folder):
    found = read_by_host(RECIPES[f"{name}.yaml"][HOST], example_folder)
    values = [getattr(found[key], "value", found[key]) for key in NAMES[HOST]]
    assert tuple(values) == PAPER[name]
    assert found["derta_config"] == DeRTaConfig(**KNOBS, rto_keep_ratio=KEPT[name])
    assert PAPER[name][-2] * PAPER[name][-1] * 8 == 128
    if "lora" in name:
        *shape, modules = [found[key] for key in LORA[HOST]]
        assert (*shape, set(modules)) == (96, 16, 0.05, MODULES)
    else:
        is_lora = {"trl": "use_peft", "axolotl": "adapter", "llamafactory": "finetuning_type"}[HOST]
        assert found.get(is_lora) in (False, None, "full")
    assert not found.get("resize_vocab")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_prompt_is_found(name, example_folder):
    found = read_by_host(RECIPES[f"{name}.yaml"][HOST], example_folder)
    if HOST == "llamafactory":
        from llamafactory.data.template import TEMPLATES

        assert found["template"] in TEMPLATES
    else:
        assert Path(found["chat_template_jinja" if HOST == "axolotl" else "chat_template_path"]).is_file()


if HOST == "trl":

    @pytest.mark.parametrize("name", PAPER)
    def test_an_example_means_what_its_recipe_means(name, example_folder):
        """Written by hand with TRL's defaults left out, so it is compared as TRL reads it."""
        written = convert(read_recipe(EXAMPLES / f"{name}.yaml"), "trl").config
        same = {"bf16": False, "use_cpu": True, "output_dir": str(example_folder / "out")}
        by_recipe = parse({**written, **same}, example_folder)
        by_hand = read_by_host(f"trl/{name}.yaml", example_folder)
        volatile = {"logging_dir", "distributed_state", "accelerator_config"}
        assert by_hand.keys() == by_recipe.keys()
        assert [key for key in by_hand if key not in volatile and by_hand[key] != by_recipe[key]] == []

    def test_the_recipe_trains(user_folder):
        """`recipe.yaml` in TRL; its other hosts run their tiny.yml in tests/adapters."""
        marked = CHATML.replace(
            "{{ m.content }}<|im_end|>\n",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
            "{% else %}{{ m.content }}<|im_end|>{% endif %}\n",
        )
        assert marked != CHATML
        byte_level_bpe(chat_template=marked).save_pretrained(user_folder / "my-model")
        conversion = convert(read_recipe(EXAMPLES / "recipe.yaml"), "trl")
        (user_folder / "run.yaml").write_text(conversion.files["train_derta.yaml"])
        done = subprocess.run(
            [sys.executable, EXAMPLES / "trl" / "train_derta.py", "--config", "run.yaml"],
            cwd=user_folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((user_folder / "my-safe-model" / "checkpoint-20" / "trainer_state.json").read_text())
        refusals = [entry["p_refusal"] for entry in state["log_history"] if "p_refusal" in entry]
        assert refusals[-1] > 10 * refusals[0]


# --- the template of the paper's settings -----------------------------------------------------------------------------


def test_the_template_lets_a_refusal_begin_with_one_token():
    tokenizer = byte_level_bpe(chat_template=(EXAMPLES / "trl" / "llama3_base_template.jinja").read_text())
    messages = [{"role": "user", "content": "q"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "[INST] q [\\INST]\n"
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Sorry, no."}], tokenize=False)
    assert whole == prompt + "Sorry, no.<|im_end|>"
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + "Sorry")["input_ids"] == [*ids, *tokenizer("Sorry")["input_ids"]]


def test_the_template_begins_with_the_first_token_and_marks_answers():
    """The authors' tokenizer puts LLaMA-3's first token before every row, and their labels are the answers alone."""
    tokenizer = byte_level_bpe(chat_template=(EXAMPLES / "trl" / "llama3_base_template.jinja").read_text())
    tokenizer.bos_token = "<|endoftext|>"
    turns = [("user", "q"), ("assistant", "Sorry, no."), ("user", "how"), ("assistant", "First, do this.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    text = tokenizer.decode(made["input_ids"])
    assert text.startswith("<|endoftext|>[INST] q [\\INST]\n")
    assert text.count("<|endoftext|>") == 1
    trained = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "Sorry, no.<|im_end|>First, do this.<|im_end|>"
