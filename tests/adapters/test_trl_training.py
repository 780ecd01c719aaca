"""Whole runs of `DeRTaSFTTrainer`: what is logged, learnt, saved and loaded again; the example script as a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tests.adapters.trl_runs import logged, make_trainer
from tests.conftest import HARMFUL, byte_level_bpe, safety_records, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
LEARN = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 10}
COMPONENTS = {"mle_loss", "rto_loss", "p_refusal", "mle_tokens", "rto_tokens"}


def refusal_probability(model, tokenizer, refusal_token_id):
    """Mean probability of the refusal token over the places of a harmful answer."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I paint the castle wall ?"}], add_generation_prompt=True, tokenize=False
    )
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + HARMFUL)["input_ids"]])
    with torch.no_grad():
        probabilities = model.eval()(ids).logits[0, start - 1 :].softmax(dim=-1)
    return probabilities[:, refusal_token_id].mean().item()


def test_training_raises_the_refusal_probability_at_every_place(tmp_path):
    trainer = make_trainer(tmp_path, **LEARN)
    before = refusal_probability(trainer.model, trainer.processing_class, trainer.refusal_token.id)
    trainer.train()
    after = refusal_probability(trainer.model, trainer.processing_class, trainer.refusal_token.id)
    assert before < 0.02
    assert after > 0.5
    assert logged(trainer, "p_refusal")[-1] > 0.5 > logged(trainer, "p_refusal")[0]
    assert logged(trainer, "rto_loss")[-1] < logged(trainer, "rto_loss")[0]


def test_vanilla_does_not(tmp_path):
    trainer = make_trainer(tmp_path, method="vanilla", num_prefixes=2, **LEARN)
    trainer.train()
    assert refusal_probability(trainer.model, trainer.processing_class, trainer.refusal_token.id) < 0.2


def test_components_reach_every_logger(tmp_path):
    """What W&B, TensorBoard and Trackio see is what `on_log` sees."""
    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    trainer = make_trainer(
        tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=5,
        trainer_options={"callbacks": [Logger()], "eval_dataset": Dataset.from_list(safety_records(3))},
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert all(COMPONENTS <= names for names in seen[:3])
    assert {f"eval_{name}" for name in COMPONENTS} <= seen[-1]


def test_logged_components_make_up_the_logged_loss(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:4]:
        mle, rto = entry["mle_tokens"], entry["rto_tokens"]
        mean = (entry.get("mle_loss", 0) * mle + entry.get("rto_loss", 0) * rto) / (mle + rto)
        assert entry["loss"] == pytest.approx(mean, rel=1e-5)


def test_lora_trains_only_its_adapter_and_loads_again(tmp_path):
    tokenizer = byte_level_bpe()
    wide = {"initializer_range": 0.3}  # a frozen head must be able to say something
    base = tiny_llama(len(tokenizer), **wide)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    options = {"peft_config": LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])}
    trainer = make_trainer(tmp_path, model=base, tokenizer=tokenizer, trainer_options=options, **LEARN)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for name, value in trainer.model.base_model.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name
    loaded = PeftModel.from_pretrained(tiny_llama(len(tokenizer), **wide), str(tmp_path / "adapter"))
    target = trainer.refusal_token.id
    trained = refusal_probability(trainer.model, tokenizer, target)
    assert refusal_probability(loaded, tokenizer, target) == pytest.approx(trained, abs=1e-6)
    assert trained > 5 * refusal_probability(tiny_llama(len(tokenizer), **wide), tokenizer, target)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    plain = make_trainer(tmp_path / "plain", **options)
    checkpointed = make_trainer(tmp_path / "checkpointed", **{**options, "gradient_checkpointing": True})
    plain.train()
    checkpointed.train()
    assert logged(plain, "loss") == pytest.approx(logged(checkpointed, "loss"), rel=1e-6)


def run_script(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "trl" / "train_derta.py"), *arguments, *quiet],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_example_script_trains_and_saves(user_folder):
    run = run_script(
        user_folder, "--model_name_or_path", "my-model", "--safety", "triples.jsonl", "--helpful", "helpful.jsonl",
        "--output_dir", "my-safe-model", "--max_steps", "80", "--learning_rate", "1e-2", "--logging_steps", "5",
        "--rto_weight", "0.9", "--dtype", "float32",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "6 triples, 6 mle rows, 6 rto rows, 8 helpful rows" in run.stdout
    assert "p_refusal" in run.stdout
    tokenizer = AutoTokenizer.from_pretrained(user_folder / "my-safe-model")
    target = tokenizer("Sorry")["input_ids"][0]
    trained = AutoModelForCausalLM.from_pretrained(user_folder / "my-safe-model")
    assert tokenizer.chat_template, "the template is saved with the model"
    assert refusal_probability(trained, tokenizer, target) > 0.3


def test_a_bad_option_of_the_script_is_refused(user_folder):
    run = run_script(
        user_folder, "--model_name_or_path", "my-model", "--safety", "triples.jsonl", "--output_dir", "out",
        "--rto_keep_ratio", "7",
    )  # fmt: skip
    assert run.returncode != 0
    assert "`rto_keep_ratio` must be a number in (0, 1], got 7.0" in run.stderr
    assert not (user_folder / "out").exists()
