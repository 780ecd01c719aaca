"""`DeRTaLossMixin` with branch rows, and its ways to the loss: in the head, from logits, fused by the model."""

import functools
import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from derta_plugins.adapters.scoring_head import ScoringHead
from derta_plugins.core.branch_layout import fold_rows
from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.transform import build_rows
from tests.adapters import test_trainer_mixins as mixins
from tests.adapters.test_trainer_mixins import NORMALIZATIONS, VOCABULARY, make_trainer
from tests.adapters.tiny_models import forget_branches, losses_of_logits
from tests.conftest import tiny_llama

TRIPLES, PREFIXES = 4, 2


def rows_of_triples(layout: str) -> Dataset:
    """Four triples and two ordinary rows: 12 + 2 rows, or 4 + 2."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, VOCABULARY, (length,), generator=generator).tolist())

    made = []
    for index in range(TRIPLES):
        triple = TokenizedTriple(ids(3 + index), ids(5), ids(9 - index), end_ids=(2,))
        rows = build_rows(triple, DeRTaConfig(num_prefixes=PREFIXES), refusal_token_id=7, index=index)
        for row in fold_rows(rows) if layout == "branch" else rows:
            made.append({"input_ids": row.input_ids, "labels": row.labels, "rto_mask": row.rto_mask})
            if layout == "branch":
                made[-1]["branch_starts"] = row.branch_starts
    for length in (4, 7):
        answer = list(ids(length))
        row = {"input_ids": [5, 6, *answer], "labels": [-100, -100, *answer], "rto_mask": None}
        made.append({**row, **({"branch_starts": None} if layout == "branch" else {})})
    for row in made:
        row["attention_mask"] = [1] * len(row["input_ids"])
    return Dataset.from_list(made)


@pytest.fixture
def trainer_of(tmp_path, monkeypatch):
    """A trainer over the rows of one layout, all of them in one step."""

    def make(layout, *, normalization="token_mean", rto_weight=0.7, **options):
        dataset = rows_of_triples(layout)
        monkeypatch.setattr(mixins, "rows", lambda: dataset.to_list())
        config = DeRTaConfig(layout=layout, normalization=normalization, rto_weight=rto_weight)
        options = {"per_device_train_batch_size": len(dataset), "per_device_eval_batch_size": 3, **options}
        return make_trainer(tmp_path / layout, config, **options)

    return make


def parameters_of(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_over_branch_rows_is_the_step_over_rows(trainer_of, normalization, accumulation):
    apart = trainer_of("rows", normalization=normalization)
    folded = trainer_of(
        "branch",
        normalization=normalization,
        per_device_train_batch_size=6 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    before = parameters_of(apart)
    for trainer in (apart, folded):
        trainer.train()
    assert len(folded.train_dataset) == 6
    assert (parameters_of(apart) - before).norm() > 1e-2
    assert (parameters_of(apart) - parameters_of(folded)).norm() < 1e-6 * parameters_of(apart).norm()
    logged = [next(entry for entry in one.state.log_history if "rto_loss" in entry) for one in (apart, folded)]
    for name in ("mle_loss", "rto_loss", "mle_tokens", "rto_tokens", "p_refusal"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-5), name


def test_an_evaluation_over_branch_rows_is_that_over_rows(trainer_of):
    logged = [trainer_of(layout) for layout in ("rows", "branch")]
    for trainer in logged:
        trainer.evaluate()
    ours, expected = logged[1].state.log_history[-1], logged[0].state.log_history[-1]
    for name in ("eval_mle_loss", "eval_rto_loss", "eval_rto_tokens"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_fused_loss_trains_branch_rows_too(trainer_of):
    """The labels alone say everything: the model's own shifted loss over a branch row is DeRTa's."""
    known = trainer_of("rows", rto_weight=1.0)
    fused = trainer_of("branch", rto_weight=1.0, fused=True, model=mixins.without_logits())
    for trainer in (known, fused):
        trainer.train()
    assert (parameters_of(known) - parameters_of(fused)).norm() < 1e-6 * parameters_of(known).norm()


def test_metrics_of_logits_are_refused_with_branch_rows(trainer_of):
    trainer = trainer_of("branch")
    trainer.compute_metrics = len
    with pytest.raises(ConfigError, match="`compute_metrics` needs the logits of separate rows"):
        trainer._finish_layout()


def test_attention_that_another_tool_changed_is_noticed_before_the_first_step(trainer_of, monkeypatch):
    trainer = trainer_of("branch")
    before = parameters_of(trainer)
    forget_branches(monkeypatch)
    with pytest.raises(ConfigError, match="does not attend as branch rows need it"):
        trainer.train()
    assert torch.equal(parameters_of(trainer), before)


def test_a_batch_without_branch_ids_is_refused(trainer_of):
    trainer = trainer_of("branch")
    batch = next(iter(trainer.get_train_dataloader()))
    del batch["branch_ids"]
    with pytest.raises(ValueError, match="The batch has no `branch_ids`"):
        trainer.compute_loss(trainer.model, batch)


def test_training_builds_no_logits(trainer_of, monkeypatch):
    asked = []
    original = ScoringHead.forward
    monkeypatch.setattr(ScoringHead, "forward", lambda self, hidden: asked.append(1) or original(self, hidden))
    trainer = trainer_of("rows")
    trainer.train()
    assert len(asked) == 1
    trainer.evaluate()
    assert len(asked) == 1 + 5  # 14 rows in batches of 3


def test_predictions_have_logits(trainer_of):
    trainer = trainer_of("rows", per_device_eval_batch_size=14)
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions.shape[-1] == VOCABULARY


def test_predictions_are_refused_with_branch_rows(trainer_of):
    trainer = trainer_of("branch")
    with pytest.raises(ConfigError, match="`predict` needs the logits of separate rows"):
        trainer.predict(trainer.eval_dataset)


VIRTUAL = {
    "prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefixes": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_trained_in_rows(trainer_of, kind):
    """They are no targets, and move no target."""
    model = get_peft_model(tiny_llama(VOCABULARY), VIRTUAL[kind])
    trainer = trainer_of("rows", model=model, learning_rate=0.0)
    trainer.train()
    expected = losses_of_logits(model, rows_of_triples("rows"))
    for name in ("mle_loss", "rto_loss"):
        assert trainer.state.log_history[0][name] == pytest.approx(expected[name], rel=1e-5), name


def test_virtual_tokens_are_refused_in_branches(trainer_of):
    with pytest.raises(ConfigError, match="Virtual tokens have no place in branch rows: set layout='rows'"):
        trainer_of("branch", model=get_peft_model(tiny_llama(VOCABULARY), VIRTUAL["prompts"]))


def test_a_loss_that_is_not_a_number_is_not_blamed_on_the_host(trainer_of):
    model = tiny_llama(VOCABULARY)
    model.lm_head.weight.data[7] = float("nan")
    trainer = trainer_of("rows", model=model)
    trainer.train()
    assert math.isnan(trainer.state.log_history[0]["mle_loss"])


@pytest.mark.parametrize("is_known", [True, False], ids=["known beforehand", "noticed"])
def test_a_model_that_changes_its_logits_is_trained_from_them(trainer_of, caplog, monkeypatch, is_known):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, **size))
    if not is_known:
        monkeypatch.setattr("derta_plugins.adapters.scoring_head.logit_changes", lambda config: set())
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of("rows", model=model, learning_rate=0.0)
        trainer.train()
    assert ("taken from full logits" in caplog.text) != is_known
    assert not trainer._scores_in_head
    expected = losses_of_logits(model, rows_of_triples("rows"))
    for name in ("mle_loss", "rto_loss"):
        assert trainer.state.log_history[0][name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_model_that_reshapes_its_logits_is_trained_from_them(trainer_of, caplog):
    model = tiny_llama(VOCABULARY)
    forward = model.forward

    @functools.wraps(forward)
    def reshaped(*args, input_ids=None, **kwargs):
        outputs = forward(*args, input_ids=input_ids, **kwargs)
        outputs.logits = outputs.logits.view(*input_ids.shape, -1)
        return outputs

    model.forward = reshaped
    plain, trainer = trainer_of("rows"), trainer_of("rows", model=model)
    for one in (plain, trainer):
        one.train()
    assert "The model takes no loss from its head for logits" in caplog.text
    assert (parameters_of(plain) - parameters_of(trainer)).norm() < 1e-6 * parameters_of(plain).norm()


def test_the_loss_from_logits_is_the_same(trainer_of):
    in_head, from_logits = trainer_of("rows"), trainer_of("rows", model=tiny_llama(VOCABULARY))
    from_logits._scores_in_head = False
    for trainer in (in_head, from_logits):
        trainer.train()
    assert (parameters_of(in_head) - parameters_of(from_logits)).norm() < 1e-6 * parameters_of(in_head).norm()
