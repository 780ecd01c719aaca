"""`DeRTaSFTTrainer` with `layout="branch"`: the training that rows give, however batches are made."""

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaForCausalLM,
)

from derta_plugins.adapters.scoring_head import logit_changes
from derta_plugins.adapters.trl import DeRTaDataCollator
from derta_plugins.adapters.trl_config import FUSED_HEAD_KNOWS, HAS_FUSED_LM_HEAD
from derta_plugins.core.config import ConfigError
from tests.adapters.tiny_models import losses_of_logits
from tests.adapters.trl_runs import logged, make_trainer, mixed_records, relative_difference
from tests.conftest import byte_level_bpe, safety_records, tiny_llama

NORMALIZATIONS = ["token_mean", "sequence_sum", "component_mean"]
BATCHES = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 160},
}
ONLY_SAFETY = {"train_dataset": Dataset.from_list(safety_records(6)), "safety_dataset": None}


def step(folder, **options):
    """Parameters after a step of gradient descent over all rows of two helpful records and three triples."""
    trainer = make_trainer(
        folder,
        trainer_options={"train_dataset": Dataset.from_list(mixed_records()), "safety_dataset": None},
        **{
            **{"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
            **{"num_train_epochs": 1, "rto_weight": 0.7, "num_prefixes": 3, "per_device_train_batch_size": 16},
            **options,
        },
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return trainer, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("batches", BATCHES)
def test_a_step_is_that_over_rows(tmp_path, normalization, batches):
    apart, expected = step(tmp_path / "rows", normalization=normalization)
    folded, parameters = step(tmp_path / "branch", layout="branch", normalization=normalization, **BATCHES[batches])
    assert relative_difference(expected, parameters) < 1e-6
    untrained = dict(tiny_llama(len(byte_level_bpe())).named_parameters())
    assert relative_difference(expected, untrained) > 1e-3
    for name in ("mle_tokens", "rto_tokens", "rto_loss", "p_refusal", "entropy", "mean_token_accuracy"):
        assert logged(folded, name)[0] == pytest.approx(logged(apart, name)[0], rel=1e-4), name
    assert folded.row_counts.branch_rows == folded.row_counts.triples == 3
    assert (folded.row_counts.mle_rows, folded.row_counts.rto_rows) == (9, 3)
    assert logged(folded, "num_tokens")[0] < 0.8 * logged(apart, "num_tokens")[0]


def test_a_step_does_not_depend_on_its_micro_batches(tmp_path):
    _, whole = step(tmp_path / "1", layout="branch", normalization="sequence_sum")
    _, split = step(
        tmp_path / "5",
        layout="branch",
        normalization="sequence_sum",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=5,
    )
    assert relative_difference(whole, split) < 1e-6


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="before TRL 1.15 there is no fused head to leave the loss to")
def test_trls_own_head_gives_the_same_step(tmp_path, monkeypatch):
    """What trains on a GPU, where the loss is left to TRL's fused head."""
    ours, expected = step(tmp_path / "ours", layout="branch")
    monkeypatch.setattr("derta_plugins.adapters.trl.cannot_score", lambda model, **options: True)
    theirs, parameters = step(tmp_path / "trl", layout="branch")
    assert (ours._scores_in_head, theirs._scores_in_head, theirs._needs_logits) == (True, False, False)
    assert relative_difference(expected, parameters) < 1e-6


class Scaled(LlamaForCausalLM):
    """Its logits are three times what its head makes."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits *= 3
        return outputs


@pytest.mark.parametrize("is_known", [True, False], ids=["known beforehand", "noticed"])
def test_logits_changed_in_a_way_that_trl_does_not_know_are_trained_as_they_are(tmp_path, monkeypatch, is_known):
    model = tiny_llama(len(byte_level_bpe()))
    model.__class__ = Scaled
    if is_known:
        monkeypatch.setattr("derta_plugins.adapters.trl.cannot_score", lambda model, **options: True)
        monkeypatch.setattr("derta_plugins.adapters.trl.logit_changes", lambda config: {"logits_soft_cap"})
    check_losses_are_those_of_logits(step(tmp_path, model=model, learning_rate=0.0)[0])


def check_losses_are_those_of_logits(trainer):
    for name, expected in losses_of_logits(trainer.model, trainer.train_dataset).items():
        assert logged(trainer, name)[0] == pytest.approx(expected, rel=1e-4), name


SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 420}
CHANGED = {
    "final_logit_softcapping": Gemma2Config(**SIZE, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0),
    "logit_scale": CohereConfig(**SIZE, logit_scale=3.0),
    "logits_scaling": GraniteConfig(**SIZE, logits_scaling=0.2),
    "lm_head_multiplier": FalconH1Config(
        **SIZE, lm_head_multiplier=3.0, num_key_value_heads=1, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8
    ),
}


@pytest.mark.skipif(not HAS_FUSED_LM_HEAD, reason="before TRL 1.15 there is no fused head to leave the loss to")
@pytest.mark.parametrize("name", CHANGED)
def test_trls_head_changes_logits_as_the_model_does(tmp_path, name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CHANGED[name])
    model.get_output_embeddings().weight.data.mul_(30)  # so that what is done to logits shows
    assert logit_changes(model.config) == {name}
    assert name in FUSED_HEAD_KNOWS
    trainer, _ = step(tmp_path, model=model, learning_rate=0.0)
    assert (trainer._scores_in_head, trainer._needs_logits) == (False, False)
    check_losses_are_those_of_logits(trainer)


def test_evaluation_and_checkpointing(tmp_path):
    losses = {}
    for layout in ("rows", "branch"):
        trainer = make_trainer(
            tmp_path / layout,
            layout=layout,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            trainer_options={"eval_dataset": Dataset.from_list(safety_records(5))},
            per_device_train_batch_size=20,
            max_steps=1,
        )
        trainer.train()
        trainer.evaluate()
        losses[layout] = (
            logged(trainer, "rto_loss") + logged(trainer, "eval_rto_loss") + logged(trainer, "eval_mle_loss")
        )
    assert losses["branch"] == pytest.approx(losses["rows"], rel=1e-5)


def test_prefixes_are_drawn_anew_in_each_epoch(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_options=ONLY_SAFETY, layout="branch", resample_each_epoch=True, num_prefixes=2, max_steps=3
    )
    first = [trainer.train_dataset[place]["branch_starts"] for place in range(6)]
    assert all(sum(map(bool, starts)) == 2 for starts in first)
    trainer.train()
    trainer.train_dataset.set_epoch(1)
    assert first != [trainer.train_dataset[place]["branch_starts"] for place in range(6)]


def test_a_stream_of_records_is_trained_in_branches(tmp_path):
    options = {**ONLY_SAFETY, "train_dataset": ONLY_SAFETY["train_dataset"].to_iterable_dataset()}
    trainer = make_trainer(tmp_path, trainer_options=options, layout="branch", max_steps=2)
    assert all(any(row["branch_starts"]) for row in trainer.train_dataset)
    trainer.train()
    assert len(logged(trainer, "rto_loss")) == 2


def test_rows_longer_than_max_length_stay_apart(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_options=ONLY_SAFETY, layout="branch", num_prefixes=4, max_length=70, max_steps=1
    )
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) <= 70
    counts = trainer.row_counts
    assert (counts.mle_rows, counts.rto_rows) == (24, 6)
    assert 0 < counts.branch_rows < len(trainer.train_dataset)
    trainer.train()


def test_a_model_that_cannot_is_trained_in_rows(tmp_path, caplog):
    model = AutoModelForCausalLM.from_config(
        GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=len(byte_level_bpe()))
    )
    trainer = make_trainer(tmp_path, trainer_options=ONLY_SAFETY, model=model, layout="branch", max_steps=1)
    assert "gpt2 does not number positions by rotation" in caplog.text
    assert "branch_starts" not in trainer.train_dataset.column_names
    assert trainer.row_counts.branch_rows == 0
    trainer.train()


def test_a_model_that_is_loaded_by_name_is_asked_first(tmp_path, user_folder, caplog):
    options = {"trainer_options": ONLY_SAFETY, "layout": "branch"}
    trainer = make_trainer(tmp_path / "out", model=str(user_folder / "my-model"), **options)
    assert trainer.row_counts.branch_rows == 6
    size = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": len(byte_level_bpe())}
    AutoModelForCausalLM.from_config(GPT2Config(**size)).save_pretrained(tmp_path / "gpt2")
    trainer = make_trainer(tmp_path / "out", model=str(tmp_path / "gpt2"), **options)
    assert "gpt2 does not number positions by rotation" in caplog.text
    assert trainer.row_counts.branch_rows == 0


def test_predictions_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, trainer_options=ONLY_SAFETY, layout="branch")
    with pytest.raises(ConfigError, match="`predict` needs the logits of separate rows"):
        trainer.predict(trainer.train_dataset)


def test_virtual_tokens_are_trained_in_rows(tmp_path):
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_llama(len(byte_level_bpe())), virtual)
    model.prompt_encoder.default.embedding.weight.data.mul_(30)  # so that they matter
    check_losses_are_those_of_logits(step(tmp_path, model=model, learning_rate=0.0)[0])


def test_metrics_of_logits_are_refused(tmp_path):
    options = {**ONLY_SAFETY, "compute_metrics": lambda predictions: {}}
    with pytest.raises(ConfigError, match="`compute_metrics` needs the logits of separate rows"):
        make_trainer(tmp_path, trainer_options=options, layout="branch")


@pytest.mark.parametrize("layout", ["rows", "branch"])
def test_rows_with_branches_of_their_own_are_refused(tmp_path, layout):
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "branch_starts": [0, 0, 1]}
    options = {"train_dataset": Dataset.from_list([row]), "safety_dataset": Dataset.from_list(safety_records(2))}
    with pytest.raises(ValueError, match="branch rows are DeRTa's to make"):
        make_trainer(tmp_path, trainer_options=options, layout=layout)


def test_a_collator_of_the_user_gets_the_layout(tmp_path):
    options = {**ONLY_SAFETY, "data_collator": DeRTaDataCollator(pad_token_id=3, pad_to_multiple_of=16)}
    trainer = make_trainer(tmp_path, trainer_options=options, layout="branch", per_device_train_batch_size=6)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape[1] % 16 == 0
    assert batch["branch_ids"].max() == 1
    trainer.compute_loss(trainer.model, batch)


def test_a_step_over_padding_alone_has_a_zero_loss_with_a_gradient(tmp_path):
    trainer = make_trainer(tmp_path, trainer_options=ONLY_SAFETY, layout="branch")
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=counts)
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())
