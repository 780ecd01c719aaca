"""`DeRTaLossMixin` on the bare `transformers.Trainer`, which Axolotl and LLaMA-Factory build on."""

import functools
import math

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from derta_plugins.adapters.collator import RowCollator
from derta_plugins.adapters.trainer_mixins import DeRTaLossMixin, count_batch
from derta_plugins.core.config import ConfigError, DeRTaConfig
from tests.conftest import byte_level_bpe, tiny_llama

NORMALIZATIONS = ["token_mean", "sequence_sum", "component_mean"]
VOCABULARY = 420


class DeRTaTrainer(DeRTaLossMixin, Trainer):
    host_version = "transformers"

    def __init__(self, config, *args, fused=False, **kwargs):
        self._start_derta(config)
        super().__init__(*args, **kwargs)
        self.is_loss_fused = fused
        self._finish_derta()


def rows():
    """Eight rows of unequal lengths; every other one is RTO, one has no target at all."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(8):
        length = 5 + number
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        is_rto = number % 2 == 1
        labels = [-100] * 3 + ([7] * (length - 3) if is_rto else ids[3:])
        if number == 6:
            labels = [-100] * length
        mask = [place >= 3 and is_rto for place in range(length)]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels, "rto_mask": mask})
    return made


def make_trainer(folder, config=None, *, fused=False, model=None, **options):
    arguments = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1,
        "per_device_train_batch_size": 8, "logging_steps": 1, "seed": 3, "dataloader_pin_memory": False,
    }  # fmt: skip
    return DeRTaTrainer(
        config or DeRTaConfig(),
        fused=fused,
        model=model or tiny_llama(VOCABULARY),
        args=TrainingArguments(str(folder), **{**arguments, **options}),
        train_dataset=Dataset.from_list(rows()),
        eval_dataset=Dataset.from_list(rows()),
        data_collator=DataCollatorForSeq2Seq(byte_level_bpe(), pad_to_multiple_of=8),
    )


def oracle(config):
    """Eq. 2 of the paper, one position at a time, with the denominators that `normalization` names."""
    model, sums, counts, sequences = tiny_llama(VOCABULARY), {False: 0.0, True: 0.0}, {False: 0, True: 0}, 0
    for row in rows():
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        sequences += any(label != -100 for label in row["labels"])
        for place, (label, is_rto) in enumerate(zip(row["labels"], row["rto_mask"], strict=True)):
            if place and label != -100:
                sums[is_rto] = sums[is_rto] - torch.log_softmax(logits[place - 1], dim=-1)[label]
                counts[is_rto] += 1
    if config.normalization == "component_mean":
        loss = sums[False] / counts[False] + config.rto_weight * sums[True] / counts[True]
    else:
        divisor = sum(counts.values()) if config.normalization == "token_mean" else sequences
        loss = (sums[False] + config.rto_weight * sums[True]) / divisor
    return loss, model, sums, counts


def after_a_step(folder, config=None, **options):
    trainer = make_trainer(folder, config, **options)
    trainer.train()
    return torch.cat([parameter.detach().flatten().double() for parameter in trainer.model.parameters()]), trainer


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_value_step_and_log_match_the_oracle(tmp_path, normalization):
    config = DeRTaConfig(normalization=normalization, rto_weight=0.7)
    loss, model, sums, counts = oracle(config)
    loss.backward()
    expected = torch.cat([(p - 0.5 * p.grad).detach().flatten().double() for p in model.parameters()])

    parameters, trainer = after_a_step(tmp_path, config)
    assert (parameters - expected).norm() / expected.norm() < 1e-6
    (entry,) = [entry for entry in trainer.state.log_history if "mle_loss" in entry]
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)  # `Trainer` rounds it
    assert entry["mle_loss"] == pytest.approx(sums[False].item() / counts[False], rel=1e-5)
    assert entry["rto_loss"] == pytest.approx(sums[True].item() / counts[True], rel=1e-5)
    assert (entry["mle_tokens"], entry["rto_tokens"]) == (counts[False], counts[True])
    assert 0 < entry["p_refusal"] < 1


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_the_step_does_not_depend_on_its_split(tmp_path, normalization, accumulation):
    config = DeRTaConfig(normalization=normalization, rto_weight=0.7)
    whole, _ = after_a_step(tmp_path / "whole", config)
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    split, _ = after_a_step(tmp_path / "split", config, **options)
    assert (whole - split).norm() / whole.norm() < 1e-6


def test_the_split_test_sees_a_mean_per_micro_batch(tmp_path, monkeypatch):
    whole, _ = after_a_step(tmp_path / "whole")
    monkeypatch.setattr(
        DeRTaTrainer, "_get_num_items_in_batch", lambda self, batches, device: 4 * count_batch(batches[0])
    )
    split, _ = after_a_step(tmp_path / "split", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (whole - split).norm() / whole.norm() > 1e-4


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_sum"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_fused_loss_takes_the_same_step(tmp_path, normalization, accumulation):
    """The model's own loss over our labels and our denominator is DeRTa's loss; the components are not known then."""
    config = DeRTaConfig(normalization=normalization)
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    known, trainer = after_a_step(tmp_path / "known", config, **options)
    fused, fused_trainer = after_a_step(tmp_path / "fused", config, fused=True, model=without_logits(), **options)
    assert (known - fused).norm() / known.norm() < 1e-6
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    (fused_entry,) = [entry for entry in fused_trainer.state.log_history if "loss" in entry]
    assert fused_entry["loss"] == pytest.approx(entry["loss"], rel=1e-4)
    assert fused_entry["rto_tokens"] == entry["rto_tokens"] > 0
    assert not {"mle_loss", "rto_loss", "p_refusal"} & set(fused_entry)


@pytest.mark.parametrize("knobs", [{"rto_weight": 2.0}, {"normalization": "component_mean"}], ids=str)
def test_a_fused_loss_refuses_what_one_denominator_cannot_say(tmp_path, knobs):
    trainer = make_trainer(tmp_path, DeRTaConfig(**knobs), fused=True)
    with pytest.raises(ConfigError, match="Turn the fused loss off"):
        trainer.train()


def without_logits(*, always=False):
    """A tiny Llama that, like one patched for a fused loss, returns no logits when it computes the loss."""
    model = tiny_llama(VOCABULARY)
    forward = model.forward

    @functools.wraps(forward)
    def fused(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if always or kwargs.get("labels") is not None:
            outputs.logits = None
        return outputs

    model.forward = fused
    return model


def test_a_model_without_logits_is_refused_unless_told(tmp_path):
    with pytest.raises(RuntimeError, match="built no logits"):
        make_trainer(tmp_path, model=without_logits(always=True)).train()


def test_evaluation_logs_its_own_components(tmp_path):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    _, _, sums, counts = oracle(DeRTaConfig())
    entry = trainer.state.log_history[-1]
    assert entry["eval_rto_loss"] == pytest.approx(sums[True].item() / counts[True], rel=1e-5)
    assert entry["eval_rto_tokens"] == counts[True]
    assert math.isfinite(metrics["eval_loss"])


def test_each_evaluation_set_has_a_name_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.evaluate({"one": trainer.eval_dataset, "other": trainer.eval_dataset})
    logged = set().union(*trainer.state.log_history)
    assert {"eval_one_rto_loss", "eval_other_rto_loss"} <= logged
    assert "eval_rto_loss" not in logged


def test_the_collator_is_wrapped_once(tmp_path):
    trainer = make_trainer(tmp_path)
    wrapped = trainer.data_collator
    trainer.compute_loss_func = None
    trainer._finish_derta()
    assert isinstance(wrapped, RowCollator)
    assert trainer.data_collator is wrapped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"average_tokens_across_devices": False}, "over all ranks"),
    ],
    ids=str,
)
def test_settings_that_would_replace_the_loss_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, **options)


def test_a_router_loss_is_refused(tmp_path):
    model = tiny_llama(VOCABULARY)
    model.config.output_router_logits = True
    with pytest.raises(ConfigError, match="router loss"):
        make_trainer(tmp_path, model=model)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ConfigError, match="one process per GPU"):
        trainer._finish_derta()


def test_a_host_that_changes_the_loss_is_noticed(tmp_path, monkeypatch):
    original = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *args, **kwargs: original(self, *args, **kwargs) * 1.01)
    with pytest.raises(AssertionError, match="transformers changed DeRTa's loss"):
        make_trainer(tmp_path).train()


def test_a_host_that_ignores_the_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, model, inputs, *args, **kwargs: model(**inputs).loss)
    with pytest.raises(RuntimeError, match="did not compute DeRTa's loss"):
        make_trainer(tmp_path).train()


def test_a_batch_without_the_mask_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    host, trainer.data_collator = trainer.data_collator.collator, None
    trainer.data_collator = lambda rows: host([{k: row[k] for k in row if k != "rto_mask"} for row in rows])
    with pytest.raises(ValueError, match="no `rto_mask`"):
        trainer.train()


def test_a_dataset_without_rows_of_ours_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="train dataset has no column `rto_mask`"):
        trainer._check_has_rows("train", Dataset.from_list(rows()).remove_columns("rto_mask"))
    trainer._check_has_rows("train", trainer.train_dataset)


def test_a_packed_batch_counts_its_sequences():
    batch = {
        "labels": torch.tensor([[-100, 5, -100, 6, 6, -100, -100, 4]]),
        "rto_mask": torch.tensor([[False, False, False, True, True, False, False, False]]),
    }
    assert count_batch(batch).tolist() == [2, 2, 1]
    batch["position_ids"] = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2]])
    assert count_batch(batch).tolist() == [2, 2, 3]
    batch["position_ids"] = torch.zeros(3, 1, 8, dtype=torch.long)  # multimodal positions tell no sequences
    assert count_batch(batch).tolist() == [2, 2, 1]
