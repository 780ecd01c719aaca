"""Ways a run could go wrong unseen, found by trying to break the trainer: each is refused or said aloud."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from derta_plugins.adapters import trl as adapter
from derta_plugins.core.config import ConfigError
from derta_plugins.core.records import BadRecordError
from tests.adapters.trl_runs import make_trainer
from tests.conftest import HARMFUL, SAFE, byte_level_bpe, helpful_records, safety_records, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
LOST = {"prompt": "q", "chosen": SAFE}


def dataset(*records):
    return Dataset.from_list(list(records))


def test_safety_records_that_are_all_bad_are_not_skipped_into_an_ordinary_run(tmp_path):
    with pytest.raises(ValueError, match="No safety record is left"):
        make_trainer(tmp_path, trainer_options={"safety_dataset": dataset(LOST, LOST)}, on_bad_record="skip")


def test_a_safety_stream_that_is_all_bad_is_refused(tmp_path):
    bad = dataset(*[{**LOST, "rejected": ""}] * 4).to_iterable_dataset()
    options = {"train_dataset": dataset(*helpful_records(4)).to_iterable_dataset(), "safety_dataset": bad}
    with pytest.raises(ValueError, match="No record among the first 1000"):
        make_trainer(tmp_path, trainer_options=options, on_bad_record="skip", refusal_text="Sorry", max_steps=1)


def test_skips_are_said_at_the_default_log_level(tmp_path, caplog):
    bad = {**LOST, "rejected": ""}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path, trainer_options={"safety_dataset": dataset(*safety_records(2), bad)}, on_bad_record="skip"
        )
        trainer.evaluate(dataset(*safety_records(2), bad))
    for name in ("train", "eval"):
        assert f"Of the {name} dataset: 2 triples" in caplog.text
    assert "skipped records: 1 x `rejected` is empty." in caplog.text


def test_an_authors_row_that_lost_two_columns_is_no_ordinary_text(tmp_path):
    rows = [
        {"prefix": "a q", "text": SAFE, "safe": "false"},
        {"prefix": None, "text": HARMFUL, "safe": None},
    ]
    options = {"train_dataset": dataset(*rows), "safety_dataset": None}
    with pytest.raises(BadRecordError, match="Record 1, field `safe`: is null, and so is `prefix`"):
        make_trainer(tmp_path, trainer_options=options, refusal_text="Sorry")


ORDINARY = helpful_records(1)[0]
REFUSED_COLUMNS = {
    "labels beside text": ([{**ORDINARY, "labels": [1, 0, 1]}], "column `labels`, which would be trained as token ids"),
    "packed rows": ([{"input_ids": [4, 5], "labels": [4, 5], "seq_lengths": [1, 1]}], "it is packed already"),
    "unpaired preference": ([{"prompt": "q", "completion": HARMFUL, "label": False}], "unpaired preference rows"),
}


@pytest.mark.parametrize("name", REFUSED_COLUMNS)
def test_ordinary_datasets_with_a_dangerous_column_are_refused(tmp_path, name):
    records, message = REFUSED_COLUMNS[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, trainer_options={"train_dataset": dataset(*records)})


def test_a_row_with_columns_of_different_lengths_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="columns of different lengths"):
        trainer.data_collator([{"input_ids": [4, 5, 6], "labels": [4, 5], "rto_mask": [False] * 3}])


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_what_a_triple_cannot_carry_is_refused(tmp_path, column):
    record = {**safety_records(1)[0], column: "something"}
    with pytest.raises(BadRecordError, match=f"field `{column}`: is not carried"):
        make_trainer(tmp_path, trainer_options={"safety_dataset": dataset(record)})


def test_a_response_that_is_no_token_is_refused(tmp_path):
    record = {**safety_records(1)[0], "chosen": "<|im_end|>"}
    with pytest.raises(BadRecordError, match="field `chosen`: is no token"):
        make_trainer(tmp_path, trainer_options={"safety_dataset": dataset(record)})


def test_a_max_length_that_keeps_prefixes_short_is_said(tmp_path, caplog):
    options = {"safety_dataset": dataset(*safety_records(3)), "train_dataset": dataset(*helpful_records(2))}
    with caplog.at_level(logging.WARNING):
        assert make_trainer(tmp_path, trainer_options=options).row_counts.limited_prefixes == 0
        assert "max_length keeps" not in caplog.text
        trainer = make_trainer(tmp_path, trainer_options=options, max_length=50)
    assert trainer.row_counts.limited_prefixes == 3
    assert "max_length keeps the harmful prefix of 3 of 3 MLE rows short" in caplog.text


def test_boundary_rows_that_do_not_fit_are_said_or_refused(tmp_path, caplog):
    long = {"prompt": "word " * 200, "completion": " yes"}
    fits = {"prompt": "Hello there", "completion": " yes"}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, trainer_options={"boundary_dataset": dataset(long, fits)}, max_length=120)
    assert trainer.row_counts.boundary_rows == 1
    assert "The host dropped 1 of 2 ordinary rows" in caplog.text
    with pytest.raises(ValueError, match="None of 2 ordinary rows has a target within max_length=120"):
        make_trainer(tmp_path, trainer_options={"boundary_dataset": dataset(long, long)}, max_length=120)


def test_no_boundary_row_is_a_ratio_too_and_a_stream_cannot_be_counted(tmp_path):
    boundary = {"boundary_dataset": dataset(*helpful_records(4))}
    assert make_trainer(tmp_path, trainer_options=boundary, boundary_ratio=0.0).row_counts.boundary_rows == 0
    options = {**boundary, "safety_dataset": dataset(*safety_records(4)).to_iterable_dataset()}
    with pytest.raises(ConfigError, match="`boundary_ratio` needs triples in memory"):
        make_trainer(tmp_path, trainer_options=options, boundary_ratio=0.5, max_steps=1)


def test_lora_on_the_embeddings_trains(tmp_path):
    tokenizer = byte_level_bpe()
    options = {"peft_config": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])}
    trainer = make_trainer(
        tmp_path, model=tiny_llama(len(tokenizer)), tokenizer=tokenizer, trainer_options=options, max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning")
def test_prediction_does_not_leak_into_the_next_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, trainer_options={"eval_dataset": dataset(*safety_records(3))})
    trainer.evaluate()
    before = trainer.state.log_history[-1]["eval_rto_tokens"]
    trainer.predict(trainer.eval_dataset)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_rto_tokens"] == before


def test_wrapped_evaluation_packing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`packing_strategy` must be 'bfd'"):
        make_trainer(tmp_path, eval_packing=True, packing_strategy="wrapped")


def test_a_mixture_of_experts_keeps_its_router_loss_or_is_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = byte_level_bpe()
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        )
    )  # fmt: skip
    options = {"model": model, "tokenizer": tokenizer, "router_aux_loss_coef": 5.0, "max_steps": 1}
    if not adapter.HAS_FUSED_LM_HEAD:
        with pytest.raises(ConfigError, match="router loss of a mixture of experts"):
            make_trainer(tmp_path, **options)
        return
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    entry = trainer.state.log_history[0]
    plain = entry["mle_loss"] * entry["mle_tokens"] + entry["rto_loss"] * entry["rto_tokens"]
    plain /= entry["mle_tokens"] + entry["rto_tokens"]
    assert entry["loss"] == pytest.approx(plain + 5.0 * entry["aux_loss"], rel=1e-4)


CACHED_RUN = """
import sys
from derta_plugins.adapters import row_datasets
if sys.argv[3] == "changed":
    row_datasets.BuildRows.__dataclass_fields__["code"].default = "another release"
    row_datasets.BuildRows.__init__.__defaults__ = ("another release",)
from datasets import load_dataset
from tests.conftest import byte_level_bpe
from derta_plugins.core.config import DeRTaConfig
from collections import Counter
records = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
tokenized = row_datasets.tokenize_records(records, byte_level_bpe(), DeRTaConfig(), max_length=64, skipped=Counter())
rows = row_datasets.build_dataset(tokenized, row_datasets.BuildRows(DeRTaConfig(), int(sys.argv[4]), 64))
print(rows.cache_files[0]["filename"])
"""


def test_rows_of_another_knob_or_of_another_release_are_not_taken_from_the_cache(tmp_path):
    dataset(*safety_records(3)).to_json(tmp_path / "triples.jsonl")

    def cache_file(release, refusal_token_id):
        arguments = [str(tmp_path / "triples.jsonl"), str(tmp_path / "cache"), release, refusal_token_id]
        run = subprocess.run(
            [sys.executable, "-c", CACHED_RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr[-2000:]
        return run.stdout.strip().splitlines()[-1]

    first = cache_file("same", "5")
    assert cache_file("same", "5") == first, "or this test could not fail"
    assert cache_file("same", "6") != first
    assert cache_file("changed", "5") != first
