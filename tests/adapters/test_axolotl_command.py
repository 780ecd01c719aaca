"""What `axolotl train` and `axolotl preprocess` do with DeRTa: each test reads what a real run has left."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters.axolotl_runs import (
    COMPONENTS,
    PLUGIN,
    log_of,
    prepared_rows,
    rows_of_core,
    succeed,
    train,
    values,
)
from tests.adapters.refusals import refusal_probability
from tests.conftest import byte_level_bpe, helpful_records, safety_records, tiny_llama

STEPS = 20
HERE = ("--launcher", "python")
ON_CPU = "tests.adapters.axolotl_on_cpu"
LORA = {
    "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_linear": True,
    "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,  # they are Triton's
}  # fmt: skip


def make_folder(folder, **model_options):
    """A model with its tokenizer, and the files that `tiny.yml` names."""
    from datasets import Dataset

    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(folder / "my-model")
    tiny_llama(len(tokenizer), **model_options).save_pretrained(folder / "my-model")
    Dataset.from_list(safety_records(6)).to_json(folder / "triples.jsonl")
    Dataset.from_list(helpful_records(8)).to_json(folder / "helpful.jsonl")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("axolotl"))


@pytest.fixture(scope="module")
def learnt(folder):
    """Output of the example config, whole, through Axolotl's default launcher."""
    succeed(folder, output_dir="full")
    return folder / "full"


def targets_of_core(kind):
    """Targets of one kind in all rows of the triples; the first place of a row is never predicted."""
    return sum(
        label != -100 and is_rto == (kind == "rto")
        for row in rows_of_core()
        for label, is_rto in zip(row.labels[1:], row.rto_mask[1:], strict=True)
    )


def test_every_component_is_logged_and_every_rto_target_counted(learnt):
    log = [entry for entry in log_of(learnt) if "loss" in entry]
    assert len(log) == STEPS
    assert all({"mle_tokens", "rto_tokens"} <= set(entry) for entry in log)
    assert any(COMPONENTS <= set(entry) for entry in log)
    assert sum(values(log, "rto_tokens")) == 4 * targets_of_core("rto")
    assert sum(values(log, "mle_tokens")) > 4 * targets_of_core("mle"), "with those of the ordinary rows"


def test_the_components_make_up_the_loss(learnt):
    for entry in log_of(learnt):
        if "mle_tokens" in entry:
            mle, rto = entry["mle_tokens"], entry["rto_tokens"]
            mean = (entry.get("mle_loss", 0) * mle + entry.get("rto_loss", 0) * rto) / (mle + rto)
            assert entry["loss"] == pytest.approx(mean, abs=6e-5)


def test_the_saved_model_refuses_where_it_was_made_to_go_on(learnt, folder):
    before = refusal_probability(AutoModelForCausalLM.from_pretrained(folder / "my-model"))
    after = refusal_probability(AutoModelForCausalLM.from_pretrained(learnt))
    assert after > 20 * before
    assert after > 0.1
    assert AutoTokenizer.from_pretrained(learnt).chat_template, "the template is saved with the model"


def test_a_run_that_died_goes_on_to_the_same_weights(learnt, folder):
    options = {"output_dir": "died", "plugins": [PLUGIN, f"{ON_CPU}.DieAtStep"]}
    died = train(folder, *HERE, env={"DIE_AT_STEP": "13"}, **options)
    assert died.returncode != 0
    assert (folder / "died" / "checkpoint-10").is_dir()
    assert not (folder / "died" / "model.safetensors").exists()
    succeed(folder, *HERE, env={"DIE_AT_STEP": "0"}, auto_resume_from_checkpoints=True, **options)
    whole, resumed = (load_file(path / "model.safetensors") for path in (learnt, folder / "died"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)
    assert values(log_of(folder / "died"), "loss") == pytest.approx(values(log_of(learnt), "loss"), rel=1e-5)


@pytest.mark.parametrize("layout", ["rows", "branch"])
def test_lora_with_packing_and_evaluation(tmp_path, layout):
    """One run with what is easily lost: packed rows keep their RTO targets, evaluation logs its own components."""
    folder = make_folder(tmp_path, initializer_range=0.3)  # a frozen head must be able to say something
    output = succeed(
        folder,
        *HERE,
        adapter="lora",
        **LORA,
        derta={"refusal_text": "Sorry", "layout": layout},
        sample_packing=True,
        eval_sample_packing=False,
        test_datasets=[
            {"path": "triples.jsonl", "ds_type": "json", "split": "train", "type": PLUGIN.rpartition(".")[0]}
        ],
        eval_strategy="steps",
        eval_steps=10,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        num_epochs=12,
        learning_rate=0.03,
        max_steps=30,
    )
    assert "sample_packing" in output
    log = log_of(folder / "my-safe-model")
    steps = [entry for entry in log if "loss" in entry]
    assert max(values(steps, "rto_tokens")) > max(sum(row.rto_mask) for row in rows_of_core()), "several rows in a pack"
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert len(evaluations) >= 2
    assert {entry["eval_rto_tokens"] for entry in evaluations} == {targets_of_core("rto")}
    assert evaluations[-1]["eval_p_refusal"] > 5 * evaluations[0]["eval_p_refusal"] or (
        evaluations[-1]["eval_p_refusal"] > 0.3
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "my-model")
    before = refusal_probability(base)
    assert refusal_probability(PeftModel.from_pretrained(base, folder / "my-safe-model")) > 5 * before


def test_ligers_fused_loss_is_the_same_loss_without_components(learnt, folder):
    """Liger's own kernel, interpreted where there is no GPU."""
    plugins = [PLUGIN, "axolotl.integrations.liger.LigerPlugin"]
    off = dict.fromkeys(("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm"), False)
    options = {"plugins": plugins, "liger_fused_linear_cross_entropy": True, "output_dir": "liger", **off}
    output = succeed(folder, *HERE, env={"TRITON_INTERPRET": "1"}, **options)
    assert "builds no logits" in output
    fused, known = ([entry for entry in log_of(path) if "loss" in entry] for path in (folder / "liger", learnt))
    assert values(fused, "loss") == pytest.approx(values(known, "loss"), rel=1e-4)
    assert values(fused, "rto_tokens") == values(known, "rto_tokens")
    assert not {"mle_loss", "rto_loss", "p_refusal"} & {name for entry in fused for name in entry}


def test_qlora_learns(tmp_path):
    folder = make_folder(tmp_path, initializer_range=0.3, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    succeed(folder, *HERE, adapter="qlora", load_in_4bit=True, **LORA)
    learnt = values(log_of(folder / "my-safe-model"), "p_refusal")
    assert learnt[-1] > 20 * learnt[0]
    assert (folder / "my-safe-model" / "adapter_model.safetensors").is_file()


def test_prepared_rows_are_used_again_but_not_for_other_knobs(folder):
    options = {"dataset_prepared_path": "prepared", "max_steps": 1, "save_steps": 1, "output_dir": "cached"}
    succeed(folder, verb="preprocess", **options)
    assert len(prepared_rows(folder / "prepared")) == 1
    assert "Loading prepared dataset from disk" in succeed(folder, *HERE, **options)
    changed = {**options, "derta": {"refusal_text": "Step"}}
    assert "Loading prepared dataset from disk" not in succeed(folder, *HERE, **changed)
    rows = prepared_rows(folder / "prepared")
    assert len(rows) == 2
    targets = [
        {
            label
            for row in part
            if row["rto_mask"]
            for label, rto in zip(row["labels"], row["rto_mask"], strict=True)
            if rto
        }
        for part in rows
    ]
    tokenizer = byte_level_bpe()
    assert targets == [{tokenizer("Sorry")["input_ids"][0]}, {tokenizer("Step")["input_ids"][0]}]


AUTHORS = {"instruction": "How do I paint?", "output": "Step one : gather .", "safe_response": "Sorry , no ."}
TYPO = ["derta_plugin.adapters.axolotl.DeRTaPlugin"]
OURS, AS_ORDINARY = (
    {"path": f"{name}.jsonl", "ds_type": "json", "type": kind}
    for name, kind in (("triples", "derta_plugins.adapters.axolotl"), ("authors", "alpaca"))
)
FAILS = {  # what is changed, the environment, what is said
    "a typo in the plugin": ({"plugins": TYPO}, {}, "could not load the plugin"),
    "a typo, without the start-up file": ({"plugins": TYPO}, {"DERTA_AUTOLOAD": "0"}, "needs the plugin"),
    "triples as ordinary rows": ({"datasets": [OURS, AS_ORDINARY]}, {}, "would train its harmful responses"),
}


@pytest.mark.parametrize("name", FAILS)
def test_no_step_is_taken(folder, name):
    from datasets import Dataset

    changes, environment, message = FAILS[name]
    shutil.rmtree(folder / "closed", ignore_errors=True)
    Dataset.from_list([AUTHORS]).to_json(folder / "authors.jsonl")
    result = train(folder, *HERE, env=environment, output_dir="closed", save_steps=1, **changes)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "'loss'" not in result.stdout
    assert not list((folder / "closed").glob("checkpoint-*"))
