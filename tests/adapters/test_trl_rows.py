"""What `DeRTaSFTTrainer` makes of datasets: every format, mixing, packing, streams, epochs; and what it refuses."""

import itertools
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from derta_plugins.adapters import trl as adapter
from derta_plugins.adapters.trl import DeRTaSFTConfig, DeRTaSFTTrainer
from derta_plugins.core.config import ConfigError
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.records import BadRecordError
from tests.adapters.trl_runs import make_config, make_trainer, mixed_records
from tests.conftest import HARMFUL, SAFE, byte_level_bpe, helpful_records, safety_records, tiny_llama

PKU = {
    "prompt": "How do I paint the castle wall?",
    "response_0": HARMFUL,
    "response_1": SAFE,
    "is_response_0_safe": False,
    "is_response_1_safe": True,
}
AUTHORS = {"instruction": "How do I paint the castle wall?", "output": HARMFUL, "safe_response": SAFE}
PREFERENCE = {"prompt": "How do I paint the castle wall?", "chosen": SAFE, "rejected": HARMFUL}


def only_safety(*records):
    return {"train_dataset": Dataset.from_list(list(records)), "safety_dataset": None}


def decoded_targets(trainer, rows):
    """Texts of what MLE rows and of what RTO rows train."""
    texts = {False: [], True: []}
    for row in rows:
        targets = [label for label in row["labels"] if label != IGNORE_INDEX]
        texts[any(row["rto_mask"])].append(trainer.processing_class.decode(targets))
    return texts


@pytest.mark.parametrize(
    "record",
    [PREFERENCE, PKU, AUTHORS, safety_records(1, conversational=True)[0]],
    ids=["preference", "pku", "authors", "conversational"],
)
def test_each_triple_format_trains_the_refusal_only(tmp_path, record):
    trainer = make_trainer(tmp_path, trainer_options=only_safety(record))
    texts = decoded_targets(trainer, trainer.train_dataset)
    assert texts[False] == [f"{SAFE}<|im_end|>"]
    (rto,) = texts[True]
    assert set(rto.replace("Sorry", "|")) == {"|"}
    assert trainer.row_counts.triples == trainer.row_counts.mle_rows == trainer.row_counts.rto_rows == 1


def test_authors_training_rows_keep_their_objective(tmp_path):
    rows = [
        {"prefix": "[INST] q [\\INST]", "text": f" {SAFE}<|end_of_text|>", "safe": "false"},
        {"prefix": "[INST] q [\\INST]", "text": f" {HARMFUL}<|end_of_text|>", "safe": "true"},
    ]
    trainer = make_trainer(tmp_path, trainer_options=only_safety(*rows), refusal_text="Sorry")
    texts = decoded_targets(trainer, trainer.train_dataset)
    assert texts[False] == [f" {SAFE}<|im_end|>"]
    assert set(texts[True][0].replace("Sorry", "|")) == {"|"}


def test_mixed_records_are_told_apart_one_by_one(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_options={"train_dataset": Dataset.from_list(mixed_records()), "safety_dataset": None}
    )
    counts = trainer.row_counts
    assert (counts.helpful_rows, counts.triples, counts.mle_rows, counts.rto_rows) == (2, 3, 3, 3)
    assert len(trainer.train_dataset) == 8


def test_ordinary_rows_are_those_of_the_stock_trainer(tmp_path):
    """A drop-in: without a safety record, rows and losses are TRL's own."""
    tokenizer = byte_level_bpe()
    # prompts are not trained, as older hosts also count the first token of a row, which nothing predicts
    records = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in helpful_records(8)]
    dataset = Dataset.from_list(records)
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options |= {
        "loss_type": "nll",
        "logging_steps": 1,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "seed": 5,
    }
    stock = SFTTrainer(
        tiny_llama(len(tokenizer)), SFTConfig(str(tmp_path / "a"), **options), train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    ours = DeRTaSFTTrainer(
        tiny_llama(len(tokenizer)), DeRTaSFTConfig(str(tmp_path / "b"), **options), train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    assert ours.train_dataset["labels"][:] == stock.train_dataset["labels"][:]
    stock.train()
    ours.train()
    for left, right in zip(stock.state.log_history, ours.state.log_history, strict=True):
        assert left.get("loss", 0) == pytest.approx(right.get("loss", 0), rel=1e-6)
        assert left.get("entropy", 0) == pytest.approx(right.get("entropy", 0), rel=1e-6)


def test_prompt_completion_rows_train_the_completion_beside_triples(tmp_path):
    """TRL decides `completion_only_loss` by the first record; a triple first must not make it train prompts."""
    helpful = Dataset.from_list([{"prompt": "Hello there", "completion": " answer words"}])
    trainer = make_trainer(
        tmp_path, trainer_options={"train_dataset": Dataset.from_list([PREFERENCE]), "boundary_dataset": helpful,
                                   "safety_dataset": None},
    )  # fmt: skip
    (row,) = [row for row in trainer.train_dataset if "Hello" in trainer.processing_class.decode(row["input_ids"])]
    targets = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert trainer.processing_class.decode(targets) == " answer words<|im_end|>"
    assert trainer.row_counts.boundary_rows == 1


@pytest.mark.parametrize(("method", "expected"), [("derta", (6, 6)), ("recaug", (6, 0)), ("vanilla", (6, 0))])
def test_methods_give_their_rows(tmp_path, method, expected):
    trainer = make_trainer(tmp_path, method=method)
    assert (trainer.row_counts.mle_rows, trainer.row_counts.rto_rows) == expected


def test_boundary_rows_are_taken_at_their_ratio(tmp_path):
    options = {"boundary_dataset": Dataset.from_list(helpful_records(9))}
    assert make_trainer(tmp_path, trainer_options=options).row_counts.boundary_rows == 9
    assert make_trainer(tmp_path, trainer_options=options, boundary_ratio=0.5).row_counts.boundary_rows == 3
    with pytest.raises(ValueError, match=r"asks for 12 boundary rows \(6 triples\), got 9"):
        make_trainer(tmp_path, trainer_options=options, boundary_ratio=2.0)


def test_packing_keeps_labels_and_mask_together(tmp_path):
    trainer = make_trainer(tmp_path, packing=True, max_length=128)
    packed = trainer.train_dataset
    assert len(packed) < trainer.row_counts.mle_rows + trainer.row_counts.rto_rows
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["rto_mask"]) == sum(row["seq_lengths"])
        on_rto = {label for label, is_rto in zip(row["labels"], row["rto_mask"], strict=True) if is_rto}
        assert on_rto <= {trainer.refusal_token.id}
    assert sum(map(sum, packed["rto_mask"][:])) == sum(map(sum, make_trainer(tmp_path).train_dataset["rto_mask"][:]))


# Streams


def stream_of(records):
    return Dataset.from_list(records).to_iterable_dataset()


def test_streams_are_mixed_and_trained(tmp_path):
    options = {"train_dataset": stream_of(helpful_records(8)), "safety_dataset": stream_of(safety_records(6))}
    trainer = make_trainer(tmp_path, trainer_options=options, max_steps=2, safety_probability=0.5)
    assert isinstance(trainer.train_dataset, IterableDataset)
    rows = list(itertools.islice(trainer.train_dataset, 16))
    assert {any(row["rto_mask"]) for row in rows} == {True, False}
    trainer.train()
    assert trainer.state.log_history[0]["mle_tokens"] > 0


def test_a_stream_says_each_record_it_skips(tmp_path, caplog):
    records = [*safety_records(2), {"prompt": "q", "chosen": "c", "rejected": ""}]
    options = {"train_dataset": stream_of(records), "safety_dataset": None}
    trainer = make_trainer(tmp_path, trainer_options=options, max_steps=1, on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        assert len(list(trainer.train_dataset)) == 4
    assert "Skipped record 2: `rejected` is empty." in caplog.text


# Epochs


def epoch_rows(trainer, epoch):
    trainer.train_dataset.set_epoch(epoch)
    return [trainer.train_dataset[place] for place in range(len(trainer.train_dataset))]


def test_resampled_rows_change_with_the_epoch_and_come_back(tmp_path):
    trainer = make_trainer(tmp_path, resample_each_epoch=True)
    first, second = epoch_rows(trainer, 0), epoch_rows(trainer, 1)
    assert first != second
    assert first == epoch_rows(trainer, 0)
    assert len(first) == len(second) == 8 + 12
    assert first[:8] == second[:8], "ordinary rows do not change"
    static = make_trainer(tmp_path, resample_each_epoch=False)
    assert first == [{name: row[name] for name in first[0]} for row in static.train_dataset]


@pytest.mark.parametrize("workers", [0, 2], ids=["in_process", "persistent_workers"])
def test_loader_workers_draw_for_the_epoch_they_are_in(tmp_path, workers):
    seen = []

    class Spy(DeRTaSFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append((int(self.state.epoch or 0), {tuple(ids) for ids in inputs["input_ids"].tolist()}))
            return super().compute_loss(model, inputs, *args, **kwargs)

    tokenizer = byte_level_bpe()
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": bool(workers)}
    options |= {"num_train_epochs": 2, "per_device_train_batch_size": 12, "learning_rate": 0.0}
    trainer = Spy(
        tiny_llama(len(tokenizer)), make_config(tmp_path, resample_each_epoch=True, **options),
        train_dataset=Dataset.from_list(safety_records(6)), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    pad, expected = tokenizer.pad_token_id, {}
    for epoch in (0, 1):
        rows = [row["input_ids"] for row in epoch_rows(trainer, epoch)]
        width = max(map(len, rows))
        expected[epoch] = {tuple([*row, *[pad] * (width - len(row))]) for row in rows}
    assert expected[0] != expected[1]
    assert [rows for _, rows in seen] == [expected[0], expected[1]]


def test_a_resumed_run_goes_on_with_the_rows_it_would_have_had(tmp_path):
    options = {"resample_each_epoch": True, "num_train_epochs": 3, "per_device_train_batch_size": 4}
    options |= {"save_strategy": "steps", "save_steps": 7, "learning_rate": 1e-2, "rto_keep_ratio": 0.5}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    assert whole.state.global_step == 15
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    after = {entry["step"]: entry["loss"] for entry in whole.state.log_history if "loss" in entry}
    again = {entry["step"]: entry["loss"] for entry in resumed.state.log_history if "loss" in entry}
    assert set(again) == set(after)
    assert [again[step] for step in range(8, 16)] == pytest.approx([after[step] for step in range(8, 16)], rel=1e-6)
    for (name, left), right in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7, msg=name)


# What is refused


def tokenized(**columns):
    return Dataset.from_dict({"input_ids": [[4, 5, 6]], **columns})


BAD_DATASETS = {
    "empty": ({"train_dataset": Dataset.from_dict({"messages": []})}, ValueError, "`train_dataset` is empty"),
    "no dataset": ({"train_dataset": None, "safety_dataset": None}, ValueError, "`train_dataset` is required"),
    "not a dataset": ({"train_dataset": [PREFERENCE]}, TypeError, "must be a `datasets.Dataset`"),
    "a lost column": (
        only_safety({"instruction": "q", "output": HARMFUL}), BadRecordError, "misses `safe_response`",
    ),
    "an empty side": (
        only_safety({**PREFERENCE, "rejected": " "}), BadRecordError, "Record 0, field `rejected`: is empty",
    ),
    "equal sides": (only_safety({**PREFERENCE, "rejected": SAFE}), BadRecordError, "is the same text"),
    "both sides safe": (only_safety({**PKU, "is_response_0_safe": True}), BadRecordError, "both responses are safe"),
    "ordinary rows as safety": (
        {"safety_dataset": Dataset.from_list(helpful_records(2))}, ValueError, "holds ordinary rows",
    ),
    "safety records as boundary": (
        {"boundary_dataset": Dataset.from_list(safety_records(2))}, ValueError, "must hold benign prompts",
    ),
    "tokenised without labels": ({"train_dataset": tokenized()}, ValueError, "`input_ids` but no `labels`"),
    "images": (
        {"train_dataset": Dataset.from_dict({"images": [["a"]], "prompt": ["q"]})}, ValueError, "trains text only",
    ),
    "a formatting function for safety records": (
        {**only_safety(PREFERENCE), "formatting_func": lambda record: record["rejected"]}, ConfigError,
        "would make ordinary text of safety records",
    ),
    "a foreign loss": (
        {"compute_loss_func": lambda *args, **kwargs: 0}, ConfigError, "would replace DeRTa's loss",
    ),
    "a foreign collator": (
        {"data_collator": DataCollatorForLanguageModeling(pad_token_id=0)}, TypeError, "must be a `DeRTaDataCollator`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_bad_datasets_are_refused_with_a_sentence(tmp_path, name):
    options, error, message = BAD_DATASETS[name]
    with pytest.raises(error, match=message.replace("(", r"\(")):
        make_trainer(tmp_path, trainer_options=options)


BAD_SETTINGS = {
    "a knob": ({"rto_keep_ratio": 0.0}, ConfigError, r"`rto_keep_ratio` must be a number in \(0, 1\], got 0.0"),
    "a choice": ({"method": "dertaa"}, ConfigError, "`method` must be one of 'derta', 'vanilla', 'recaug'"),
    "another loss": ({"loss_type": "dft"}, ConfigError, "`loss_type` must be 'nll'"),
    "smoothing": ({"label_smoothing_factor": 0.1}, ConfigError, "`label_smoothing_factor` must be 0"),
    "counting per rank": (
        {"average_tokens_across_devices": False}, ConfigError, "must be True with DeRTa, got False: targets must be",
    ),
    "unused columns": ({"remove_unused_columns": False}, ConfigError, "record columns must not reach the model"),
    "wrapped packing": ({"packing": True, "packing_strategy": "wrapped"}, ConfigError, "cut a refusal off its context"),
    "packing and new draws": ({"packing": True, "resample_each_epoch": True}, ConfigError, "changes the lengths"),
    "skipped preparation": (
        {"dataset_kwargs": {"skip_prepare_dataset": True}}, ConfigError, "without `skip_prepare_dataset`",
    ),
    "a share of one": ({"safety_probability": 1.0}, ConfigError, r"must be in \(0, 1\)"),
    "no room": ({"max_length": 12}, BadRecordError, "leaves no room for an answer in max_length=12"),
    "several tokens": ({"refusal_text": "Sorry friend"}, ValueError, "must be one token, got"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_with_a_sentence(tmp_path, name):
    options, error, message = BAD_SETTINGS[name]
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **options)


def test_plain_sft_config_is_refused(tmp_path):
    tokenizer = byte_level_bpe()
    with pytest.raises(TypeError, match="must be a `DeRTaSFTConfig`, got TrainingArguments"):
        DeRTaSFTTrainer(
            tiny_llama(len(tokenizer)), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list(safety_records(2)), processing_class=tokenizer,
        )  # fmt: skip


def test_tokenizer_without_a_chat_template_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no chat template.*`apply_chat_template=False`"):
        make_trainer(tmp_path, tokenizer=byte_level_bpe(chat_template=None), trainer_options=only_safety(PREFERENCE))


def test_missing_pad_token_becomes_the_end_token_as_in_trl(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.pad_token = None
    trainer = make_trainer(tmp_path, tokenizer=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.processing_class.pad_token == "<|im_end|>"
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all(), "padding is never trained"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has id \d+, but the model has 20 tokens"):
        make_trainer(tmp_path, model=tiny_llama(20))


def test_a_batch_without_its_mask_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    del batch["rto_mask"]
    with pytest.raises(ValueError, match=r"no `rto_mask`.*another collator replaced"):
        trainer.compute_loss(trainer.model, batch)


def test_rows_that_lost_a_column_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    for column in ("labels", "rto_mask"):
        with pytest.raises(ValueError, match=rf"A row lost \['{column}'\] before batching"):
            trainer.data_collator([{k: v for k, v in trainer.train_dataset[0].items() if k != column}])


def test_what_a_foreign_pipeline_makes_of_our_rows_trains_no_harm(tmp_path):
    """`rto_mask` lost, TRL's own collator, TRL's own loss: the labels that are left hold refusals only."""
    trainer = make_trainer(tmp_path, trainer_options=only_safety(*safety_records(6)))
    stripped = trainer.train_dataset.remove_columns("rto_mask")
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(list(stripped))
    allowed = set(trainer.processing_class(SAFE)["input_ids"]) | {trainer.refusal_token.id}
    allowed |= {trainer.processing_class.eos_token_id, IGNORE_INDEX}
    assert set(batch["labels"].flatten().tolist()) <= allowed
    assert set(batch["input_ids"].flatten().tolist()) > allowed - {IGNORE_INDEX}, (
        "the harmful text is there, as context"
    )


def test_skipped_records_are_counted_by_reason(tmp_path):
    records = [*safety_records(2), {**PREFERENCE, "rejected": ""}, {**PREFERENCE, "rejected": SAFE}]
    trainer = make_trainer(tmp_path, trainer_options=only_safety(*records), on_bad_record="skip")
    assert trainer.row_counts.triples == 2
    assert dict(trainer.row_counts.skipped) == {
        "`rejected` is empty.": 1,
        "`rejected` is the same text as the safe response.": 1,
    }
    assert "skipped records: 1 x `rejected` is empty." in str(trainer.row_counts)


def test_nothing_left_after_skipping_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"No safety record is left of those given .*1 x `rejected` is empty"):
        make_trainer(tmp_path, trainer_options=only_safety({**PREFERENCE, "rejected": ""}), on_bad_record="skip")


def test_lora_on_the_head_is_trained_or_refused(tmp_path):
    """The fused head reads the head's weight alone and would pass its adapter by; TRL refuses that, and so do we."""
    options = {"peft_config": LoraConfig(target_modules=["q_proj", "lm_head"])}
    if adapter.HAS_FUSED_LM_HEAD:
        with pytest.raises(ValueError, match="lm_head"):
            make_trainer(tmp_path, trainer_options=options)
        return
    trainer = make_trainer(tmp_path, trainer_options=options, max_steps=1, learning_rate=0.1)
    trainer.train()
    (adapter_weight,) = [p for name, p in trainer.model.named_parameters() if "lm_head.lora_B" in name]
    assert adapter_weight.abs().max() > 0
