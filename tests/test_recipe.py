"""What the host of this environment reads in its config for a recipe, with its own parser."""

from dataclasses import MISSING, fields

import pytest
import yaml

from derta_plugins.core.config import DeRTaConfig
from derta_plugins.recipe import schema
from derta_plugins.recipe.convert import HOSTS, convert
from derta_plugins.recipe.schema import Recipe
from tests.adapters.conftest import HOST
from tests.host_parsers import parse, train_script
from tests.recipes import LORA, recipe

VALIDATION = {"validation_ratio": 0.2, "eval_steps": 4}

# changes of the recipe, then key and value in TRL, Axolotl and LLaMA-Factory; None where a host has no such key
SETTINGS = {
    "model": ({"model": "my-model"}, ("model_name_or_path", "my-model"), ("base_model", "my-model"),
              ("model_name_or_path", "my-model")),
    "output_dir": ({"output_dir": "there"}, *[("output_dir", "there")] * 3),
    "tokenizer": ({"tokenizer": "my-model"}, None, ("tokenizer_config", "my-model"), None),
    "chat_template": ({"chat_template": "it.jinja"}, ("chat_template_path", "it.jinja"),
                      ("chat_template_jinja", "it.jinja"), ("template", "chatml")),
    "its own template": ({}, ("chat_template_path", None), ("chat_template", "tokenizer_default"),
                         ("template", "chatml")),
    "lora": ({"lora": LORA}, ("use_peft", True), ("adapter", "lora"), ("finetuning_type", "lora")),
    "no lora": ({}, ("use_peft", False), ("adapter", None), ("finetuning_type", "full")),
    "rank": ({"lora": LORA}, ("lora_r", 6), ("lora_r", 6), ("lora_rank", 6)),
    "alpha": ({"lora": LORA}, *[("lora_alpha", 3)] * 3),
    "dropout": ({"lora": {**LORA, "dropout": 0.2}}, *[("lora_dropout", 0.2)] * 3),
    "no dropout": ({"lora": LORA}, *[("lora_dropout", 0.0)] * 3),
    "target_modules": ({"lora": {**LORA, "target_modules": ["q_proj", "v_proj"]}},
                       ("lora_target_modules", ["q_proj", "v_proj"]), ("lora_target_modules", ["q_proj", "v_proj"]),
                       ("lora_target", ["q_proj", "v_proj"])),
    "all modules": ({"lora": LORA}, ("lora_target_modules", "all-linear"), ("lora_target_linear", True),
                    ("lora_target", ["all"])),
    "learning_rate": ({"learning_rate": 3e-4}, *[("learning_rate", 3e-4)] * 3),
    "lr_scheduler": ({"lr_scheduler": "constant"}, ("lr_scheduler_type", "constant"), ("lr_scheduler", "constant"),
                     ("lr_scheduler_type", "constant")),
    # Transformers takes `warmup_steps` below 1 for a share of the steps
    "warmup_ratio": ({"warmup_ratio": 0.07}, ("warmup_steps", 0.07), ("warmup_ratio", 0.07), ("warmup_steps", 0.07)),
    "no warm-up": ({}, ("warmup_steps", 0.0), ("warmup_ratio", 0.0), ("warmup_steps", 0.0)),
    "weight_decay": ({"weight_decay": 0.3}, *[("weight_decay", 0.3)] * 3),
    "num_epochs": ({"num_epochs": 1.5}, ("num_train_epochs", 1.5), ("num_epochs", 1.5), ("num_train_epochs", 1.5)),
    "max_steps": ({"max_steps": 7}, *[("max_steps", 7)] * 3),
    "max_length": ({"max_length": 77}, ("max_length", 77), ("sequence_len", 77), ("cutoff_len", 77)),
    "longer rows are cut": ({}, ("truncation_mode", "keep_start"), ("excess_length_strategy", "truncate"), None),
    "batch_size": ({"batch_size": 48}, *[("gradient_accumulation_steps", 6)] * 3),
    "per_device_batch_size": ({"per_device_batch_size": 3}, ("per_device_train_batch_size", 3), ("micro_batch_size", 3),
                              ("per_device_train_batch_size", 3)),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 5}, *[("gradient_accumulation_steps", 5)] * 3),
    "num_devices": ({"num_devices": 2, "batch_size": 48}, *[("gradient_accumulation_steps", 3)] * 3),
    "bf16": ({"precision": "bf16"}, *[("bf16", True)] * 3),
    "no fp16": ({"precision": "bf16"}, *[("fp16", False)] * 3),
    "fp16": ({"precision": "fp16"}, *[("fp16", True)] * 3),
    "no bf16": ({"precision": "fp32"}, *[("bf16", False)] * 3),
    "precision of products": ({"precision": "fp32"}, ("tf32", None), ("tf32", False), ("tf32", None)),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, ("gradient_checkpointing", True),
                               ("gradient_checkpointing", True), ("disable_gradient_checkpointing", False)),
    "no checkpointing": ({"gradient_checkpointing": False}, ("gradient_checkpointing", False),
                         ("gradient_checkpointing", False), ("disable_gradient_checkpointing", True)),
    "seed": ({"seed": 9}, *[("seed", 9)] * 3),
    "packing": ({"packing": True}, ("packing", True), ("sample_packing", True), ("packing", False)),
    "no packing": ({}, ("packing", False), ("sample_packing", False), ("packing", False)),
    "shuffle": ({}, ("train_sampling_strategy", "random"), ("shuffle_merged_datasets", True),
                ("disable_shuffling", False)),
    "no shuffle": ({"shuffle": False}, ("train_sampling_strategy", "sequential"), ("shuffle_merged_datasets", False),
                   ("disable_shuffling", True)),
    "no shuffle by the sampler": ({"shuffle": False}, None, ("curriculum_sampling", True), None),
    "validation_ratio": (VALIDATION, None, ("val_set_size", 0.2), ("val_size", 0.2)),
    "eval_steps": (VALIDATION, None, ("eval_steps", 4), ("eval_steps", 4)),
    "no validation": ({}, ("eval_strategy", "no"), ("val_set_size", 0.0), ("eval_strategy", "no")),
    "logging_steps": ({"logging_steps": 13}, *[("logging_steps", 13)] * 3),
    "save_steps": ({"save_steps": 14}, *[("save_steps", 14)] * 3),
    "save_strategy": ({"save_steps": 14}, *[("save_strategy", "steps")] * 3),
    "no save_steps": ({"save_steps": None}, *[("save_strategy", "no")] * 3),
}  # fmt: skip
KNOBS = {
    "method": "recaug", "refusal_text": "Sorry", "allow_first_piece": True, "apply_chat_template": False,
    "prefix_unit": "word", "zero_prefix_ratio": None, "num_prefixes": 2, "rto_ratio": 0.4, "rto_keep_ratio": 0.3,
    "rto_turns": "all", "resample_each_epoch": True, "normalization": "sequence_sum", "rto_weight": 2.5,
    "layout": "branch",
    "boundary_ratio": 0.5, "transform": "everything", "on_bad_record": "skip", "seed": 17,
}  # fmt: skip
NO_COUNTERPART = {
    "trl": set(),
    "axolotl": {"resample_each_epoch", "boundary_ratio"},
    "llamafactory": {"resample_each_epoch", "boundary_ratio", "apply_chat_template"},
}


@pytest.fixture
def run_folder(user_folder, monkeypatch):
    """A folder with model, data and a chat template, as current directory."""
    monkeypatch.chdir(user_folder)
    (user_folder / "it.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return user_folder


def read_by_host(folder, **changes) -> dict:
    """What the host reads in the files that a recipe is written to."""
    conversion = convert(recipe(**{"precision": "fp32", **changes}), HOST, output_dir=str(folder))
    for name, content in conversion.files.items():
        (folder / name).write_text(content)
    return parse(yaml.safe_load((folder / HOSTS[HOST].config_file).read_text()), folder)


def cell(setting):
    return SETTINGS[setting][1 + schema.HOSTS.index(HOST)]


@pytest.mark.parametrize("setting", [name for name in SETTINGS if cell(name) is not None])
def test_the_host_reads_each_setting_under_its_own_key(setting, run_folder):
    key, value = cell(setting)
    found = read_by_host(run_folder, **SETTINGS[setting][0]).get(key)
    found = getattr(found, "value", found)
    assert (sorted(found) if isinstance(value, list) else found) == value


@pytest.mark.parametrize("knob", [name for name in KNOBS if name not in NO_COUNTERPART[HOST]])
def test_the_host_reads_each_knob(knob, run_folder):
    assert getattr(read_by_host(run_folder, derta={knob: KNOBS[knob]})["derta_config"], knob) == KNOBS[knob]


def test_a_recipe_without_knobs_leaves_the_host_with_their_defaults(run_folder):
    assert read_by_host(run_folder, seed=5)["derta_config"] == DeRTaConfig(seed=5)


def test_the_rows_above_are_all_settings_and_all_knobs():
    elsewhere = {"data", "derta", "hosts", "deepspeed", "fsdp_config"}
    assert {key for changes, *_ in SETTINGS.values() for key in changes} | elsewhere == {
        setting.name for setting in fields(Recipe)
    }
    defaults = {knob.name: knob.default for knob in fields(DeRTaConfig)}
    assert KNOBS.keys() == defaults.keys()
    assert not [name for name, value in KNOBS.items() if value == defaults[name]]


def test_no_key_is_written_that_the_host_does_not_know():
    """Axolotl drops such a key without a word; two of these settings no parser takes on a CPU."""
    lora = {**LORA, "target_modules": ["q_proj"]}
    changes = {"lora": lora, "max_steps": 7, "shuffle": False, "packing": True, **VALIDATION}
    for path in ({"deepspeed": "zero3.json"}, {"fsdp_config": "fsdp.json"}, {"chat_template": "it.jinja"}):
        written = convert(recipe(**changes, **path), HOST).config
        assert set(written) - known_keys() == set()


@pytest.mark.parametrize("key", HOSTS[HOST].own_defaults)
def test_what_is_said_of_the_hosts_own_defaults_is_so(key):
    if HOST == "axolotl":
        from axolotl.utils.schemas.config import AxolotlInputConfig

        default = AxolotlInputConfig.model_fields[key].default
    else:
        (default,) = [knob.default for kind in argument_classes() for knob in fields(kind) if knob.name == key]
    assert default is not MISSING
    assert default == HOSTS[HOST].own_defaults[key].value


def test_the_host_reads_the_data(run_folder):
    found = read_by_host(run_folder)
    if HOST == "trl":
        assert (found["safety"], found["helpful"], found["boundary"]) == ("triples.jsonl", "helpful.jsonl", None)
        assert found["assistant_only_loss"] is True
    elif HOST == "axolotl":
        assert [(entry["path"], entry["type"]) for entry in found["datasets"]] == [
            ("triples.jsonl", "derta_plugins.adapters.axolotl"),
            ("helpful.jsonl", "chat_template"),
        ]
    else:
        triples, helpful = found["datasets"]
        assert (triples.load_from, triples.dataset_name, triples.ranking) == ("file", "triples.jsonl", True)
        assert (triples.prompt, triples.chosen, triples.rejected) == ("prompt", "chosen", "rejected")
        assert (triples.query, triples.response) == (None, None)
        assert (helpful.dataset_name, helpful.ranking, helpful.messages) == ("helpful.jsonl", False, "messages")
        assert (helpful.role_tag, helpful.user_tag, helpful.assistant_tag) == ("role", "user", "assistant")


def argument_classes():
    """Dataclasses of the arguments of a host that has them."""
    if HOST == "trl":
        from trl import ModelConfig

        from derta_plugins.adapters.trl import DeRTaSFTConfig

        return DeRTaSFTConfig, ModelConfig, train_script().DataArguments
    from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments, TrainingArguments

    return DataArguments, FinetuningArguments, ModelArguments, TrainingArguments


def known_keys() -> set[str]:
    if HOST == "axolotl":
        from axolotl.utils.schemas.config import AxolotlInputConfig

        from derta_plugins.adapters.axolotl_args import DeRTaArgs

        return {*AxolotlInputConfig.model_fields, *DeRTaArgs.model_fields}
    return {knob.name for kind in argument_classes() for knob in fields(kind)}


if HOST == "trl":

    def test_a_recipe_has_the_defaults_of_trl():
        """So a recipe's default is written out where, and only where, another host has another one."""
        from derta_plugins.adapters.trl import DeRTaSFTConfig

        ours, args = recipe(), {knob.name: knob.default for knob in fields(DeRTaSFTConfig)}
        names = {
            "learning_rate", "weight_decay", "max_length", "gradient_checkpointing", "seed", "packing", "logging_steps",
            "save_steps", "eval_steps",
        }  # fmt: skip
        assert {name: getattr(ours, name) for name in names} == {name: args[name] for name in names}
        assert ours.lr_scheduler == args["lr_scheduler_type"]
        assert ours.warmup_ratio == args["warmup_steps"]
        assert ours.num_epochs == args["num_train_epochs"]
        assert ours.per_device_batch_size == args["per_device_train_batch_size"]
        assert ours.accumulation_steps == args["gradient_accumulation_steps"]
