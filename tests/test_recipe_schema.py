"""What a recipe takes, and how it is read from its file."""

import re

import pytest
import yaml

from derta_plugins.core.config import DeRTaConfig
from derta_plugins.recipe.checks import RecipeError, number
from derta_plugins.recipe.reading import read_recipe
from tests.recipes import BASE, HELPFUL, LORA, SAFETY, recipe

# --- what a recipe takes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1e-4}, "Unknown key `learning_rat`. Did you mean `learning_rate`?"),
        ({"qqq": 1}, "Unknown key `qqq`. Known: model, output_dir, data,"),
        ({"model": None}, "`model` is missing; it has no default."),
        ({"model": " "}, "`model` must be text, got ' '."),
        ({"lora": {"alpha": 3}}, "`lora.rank` is missing"),
        ({"lora": {**LORA, "dropuot": 0.1}}, "Unknown key `lora.dropuot`. Did you mean `dropout`?"),
        ({"lora": {**LORA, "dropout": 1.5}}, "`lora.dropout` must be a number in [0, 1], got 1.5."),
        (
            {"lora": {**LORA, "target_modules": "q_proj"}},
            "`lora.target_modules` must be a list of names, got 'q_proj'.",
        ),
        ({"lora": {**LORA, "target_modules": []}}, "`lora.target_modules` must be a list of names"),
        ({"lora": 96}, "`lora` must be a block of keys and values, got 96."),
        ({"learning_rate": "fast"}, "`learning_rate` must be a number in (0, 1), got 'fast'."),
        ({"learning_rate": 0}, "`learning_rate` must be a number in (0, 1), got 0."),
        ({"learning_rate": True}, "`learning_rate` must be a number"),
        ({"weight_decay": float("nan")}, "`weight_decay` must be a number in [0, 1], got nan."),
        ({"num_epochs": float("inf")}, "`num_epochs` must be a number in (0, inf), got inf."),
        ({"num_epochs": 0}, "`num_epochs` must be a number in (0, inf), got 0."),
        ({"max_steps": 1.5}, "`max_steps` must be a whole number in [1, inf), got 1.5."),
        ({"max_steps": 0}, "`max_steps` must be a whole number in [1, inf), got 0."),
        ({"warmup_ratio": 1.0}, "`warmup_ratio` must be a number in [0, 0.99], got 1.0."),
        ({"precision": "bf8"}, "`precision` must be one of 'bf16', 'fp16', 'fp32', got 'bf8'."),
        ({"lr_scheduler": "cosin"}, "'constant_with_warmup', got 'cosin'. Did you mean `cosine`?"),
        ({"lr_scheduler": None}, "`lr_scheduler` must be one of"),
        ({"packing": "yes"}, "`packing` must be true or false, got 'yes'."),
        ({"derta": {"rto_wieght": 2}}, "In `derta`: Unknown DeRTa knob `rto_wieght`: did you mean `rto_weight`?"),
        ({"derta": {"rto_weight": -1}}, "In `derta`: `rto_weight` must be a number in [0, 1e+06], got -1."),
        ({"derta": [1]}, "`derta` must be a block of keys and values"),
        ({"hosts": {"axolot": {}}}, "Unknown host `hosts.axolot`. Did you mean `axolotl`?"),
        ({"hosts": {"axolotl": 3}}, "`hosts.axolotl` must be a block"),
        ({"data": SAFETY}, "`data` must be a list of files"),
        ({"data": ["triples.jsonl"]}, "`data[0]` must be a block of keys and values, got 'triples.jsonl'."),
        ({"data": [HELPFUL]}, "`data` has no file of `kind: safety`"),
        ({"data": [SAFETY, {**HELPFUL, "kind": "harmful"}]}, "`data[1].kind` must be one of"),
        ({"data": [{"path": "x", "kind": "safety"}]}, "`data[0].format` is missing"),
        (
            {"data": [{**SAFETY, "format": "messages"}]},
            "`format` of triples.jsonl, a file of `kind: safety` must be one",
        ),
        (
            {"data": [SAFETY, {**HELPFUL, "format": "preference"}]},
            "a file of `kind: helpful` must be one of 'messages'",
        ),
        (
            {"data": [{**SAFETY, "columns": {"choosen": "x"}}]},
            "`columns` of triples.jsonl, a file of `format: preference` must be one of 'prompt', 'chosen', 'rejected', "
            "got 'choosen'. Did you mean `chosen`?",
        ),
        ({"data": [{**SAFETY, "columns": {"chosen": 3}}]}, "`columns.chosen` must be text, got 3."),
        ({"eval_steps": 5}, "`eval_steps` and `validation_ratio` need each other"),
        ({"validation_ratio": 0.1}, "`eval_steps` and `validation_ratio` need each other"),
        ({"deepspeed": "a.json", "fsdp_config": "b.json"}, "`deepspeed` and `fsdp_config` exclude each other"),
        ({"batch_size": 12}, "`batch_size` 12 must be `per_device_batch_size` 8 x `num_devices` 1, or a multiple"),
        (
            {"batch_size": 32, "gradient_accumulation_steps": 2},
            "`batch_size` 32 must be `per_device_batch_size` 8 x `num_devices` 1 x `gradient_accumulation_steps` 2",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(changes, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(**changes)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, True, "1"])
def test_a_number_without_a_highest_is_finite_all_the_same(value):
    with pytest.raises(RecipeError, match=r"`x` must be a number in \[0, inf\), got"):
        number(0)("x", value)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 1),
        ({"gradient_accumulation_steps": 4}, 4),
        ({"batch_size": 64}, 8),
        ({"batch_size": 64, "num_devices": 2, "per_device_batch_size": 4}, 8),
        ({"batch_size": 64, "gradient_accumulation_steps": 8}, 8),
    ],
)
def test_accumulation_follows_from_the_batch(changes, steps):
    assert recipe(**changes).accumulation_steps == steps


def test_the_seed_of_the_draws_is_the_recipes_unless_it_has_its_own():
    assert recipe(seed=3).derta_config() == DeRTaConfig(seed=3)
    assert recipe(seed=3, derta={"seed": 4}).derta_config() == DeRTaConfig(seed=4)


# --- how it is read ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


@pytest.mark.parametrize("number", ["2e-5", "2E-5", "2.0e-05", "0.00002", "+2e-5"])
def test_exponents_are_numbers(recipe_file, number):
    """PyYAML takes `2e-5` for text, and every other reader of the file for a number."""
    recipe_file.write_text(recipe_file.read_text() + f"learning_rate: {number}\n")
    assert read_recipe(recipe_file).learning_rate == 2e-5


def test_text_with_an_e_stays_text(recipe_file):
    recipe_file.write_text(recipe_file.read_text() + "tokenizer: 2e-5-models\n")
    assert read_recipe(recipe_file).tokenizer == "2e-5-models"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty."),
        ("- model", "`the recipe` must be a block"),
        ("model: [", "is no YAML: while parsing"),
        ("model: a\noutput_dir: b\nmodel: c\n", "`model` stands there twice (line 3)."),
        ("derta:\n  rto_weight: 1\n  rto_weight: 2\n", "`rto_weight` stands there twice (line 3)."),
        ("model: !!python/object/apply:os.getcwd []", "is no YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(RecipeError, match=rf"bad\.yaml: .*{re.escape(message)}"):
        read_recipe(tmp_path / "bad.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")
