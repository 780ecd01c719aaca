"""The loss that `DeRTaSFTTrainer` trains: against core, and over every split of a step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl

from derta_plugins.adapters import trl as adapter
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.losses import rto_loss
from tests.adapters.trl_runs import make_trainer, one_sgd_step, relative_difference

NORMALIZATIONS = ["token_mean", "sequence_sum", "component_mean"]
ROOT = Path(__file__).resolve().parents[2]


def test_the_host_is_really_there():
    assert issubclass(adapter.DeRTaSFTTrainer, trl.SFTTrainer)
    assert issubclass(adapter.DeRTaSFTConfig, trl.SFTConfig)


def oracle(logits, batch, normalization, rto_weight):
    """The objective read aloud, one target at a time, from the batch's own labels."""
    mle, rto, sequences = [], [], set()
    for b in range(logits.size(0)):
        for t in range(1, logits.size(1)):
            target = int(batch["labels"][b, t])
            if target == IGNORE_INDEX:
                continue
            nll = -torch.log_softmax(logits[b, t - 1], dim=-1)[target]
            (rto if batch["rto_mask"][b, t] else mle).append(nll)
            sequences.add(b)
    total, weighted = len(mle) + len(rto), sum(mle) + rto_weight * sum(rto)
    if normalization == "component_mean":
        return sum(mle) / len(mle) + rto_weight * sum(rto) / len(rto)
    return weighted / (total if normalization == "token_mean" else len(sequences))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("is_training", [True, False], ids=["step", "evaluation"])
def test_value_and_gradient_match_the_oracle(tmp_path, normalization, is_training):
    trainer = make_trainer(tmp_path, normalization=normalization, rto_weight=0.7, per_device_train_batch_size=20)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["rto_mask"].any()
    assert (~batch["rto_mask"] & (batch["labels"] != IGNORE_INDEX)).any()
    model = trainer.model.train(is_training)
    counts = trainer._get_num_items_in_batch([batch], torch.device("cpu")) if is_training else None
    loss = trainer.compute_loss(model, batch, num_items_in_batch=counts)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = oracle(logits, batch, normalization, 0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # float32 model, another order of summation
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=2e-6 * scale)


def test_default_loss_is_the_reference_of_core(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=20)
    batch = next(iter(trainer.get_train_dataloader()))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # the labels are final already: relabelling them again must change nothing
    expected = rto_loss(logits, batch["labels"], batch["rto_mask"], refusal_token_id=trainer.refusal_token.id)
    counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=counts)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_step_does_not_depend_on_its_micro_batches(tmp_path, normalization):
    options = {"normalization": normalization, "rto_weight": 0.7}
    whole = one_sgd_step(tmp_path / "1", per_device_train_batch_size=8, **options)
    for size in (1, 2, 4):
        split = one_sgd_step(
            tmp_path / f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **options
        )
        assert relative_difference(whole, split) < 1e-6


def test_the_split_test_sees_a_mean_per_micro_batch(tmp_path, monkeypatch):
    whole = one_sgd_step(tmp_path / "1", per_device_train_batch_size=8)
    monkeypatch.setattr(
        adapter.DeRTaSFTTrainer,
        "_get_num_items_in_batch",
        lambda self, batches, device: 4 * torch.stack([adapter.count_batch(batch) for batch in batches[:1]]).sum(dim=0),
    )
    split = one_sgd_step(tmp_path / "4", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert relative_difference(whole, split) > 1e-4


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_two_ranks_train_like_one(tmp_path, normalization):
    whole = one_sgd_step(tmp_path / "1", normalization=normalization, rto_weight=0.7, per_device_train_batch_size=8)
    output = tmp_path / "2"
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    worker = [str(ROOT / "tests" / "adapters" / "trl_ddp_worker.py"), str(output), normalization, "2"]
    run = subprocess.run(
        [*command, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *worker],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    ranked = torch.load(output / "parameters.pt")
    assert relative_difference(whole, ranked) < 1e-6


def test_packed_and_padding_free_rows_give_the_padded_loss(tmp_path):
    """Same rows, one batch each: the layout must not change the loss, nor the number of sequences that divides it."""
    losses = {}
    for name, options in {
        "padded": {"per_device_train_batch_size": 20},
        "padding_free": {"per_device_train_batch_size": 20, "padding_free": True, "max_length": None},
        "packed": {"per_device_train_batch_size": 20, "packing": True, "max_length": 128},
    }.items():
        trainer = make_trainer(tmp_path, normalization="sequence_sum", rto_weight=0.7, **options)
        batch = next(iter(trainer.get_train_dataloader()))
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        losses[name] = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=counts).item()
        assert counts[2] == 8 + 12, name
    assert losses["padding_free"] == pytest.approx(losses["padded"], rel=1e-5)
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-5)


def test_a_batch_without_any_target_has_a_zero_loss_with_a_gradient(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=counts)
    loss.backward()
    assert loss.item() == 0.0


def test_a_host_that_changes_the_loss_is_noticed(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1)
    original = trl.SFTTrainer.compute_loss

    def doubled(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", doubled)
    with pytest.raises(AssertionError, match="changed DeRTa's loss; this version is not supported"):
        trainer.train()
