"""Runs of `stage: derta` through the host's `run_exp`: the loss, what is learnt and logged, and what ends a run."""

import json
import math

import pytest
import torch
from llamafactory.train import tuner
from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from derta_plugins.adapters import llamafactory as adapter
from derta_plugins.adapters import llamafactory_patch as patch
from derta_plugins.adapters.collator import RowCollator
from derta_plugins.core.config import ConfigError, DeRTaConfig
from tests.adapters.llamafactory_runs import (
    COMPONENTS,
    LEARN,
    TRIPLES,
    history,
    logged,
    make_config,
    make_folder,
    rows_of_core,
    train,
)
from tests.adapters.refusals import refusal_probability
from tests.conftest import safety_records

TOKENS_OF_AN_EPOCH = {
    kind: sum(
        sum(label != -100 and is_rto == (kind == "rto") for label, is_rto in zip(row.labels, row.rto_mask, strict=True))
        for row in rows_of_core(safety_records(TRIPLES))
    )
    for kind in ("mle", "rto")
}


@pytest.fixture(scope="module", autouse=True)
def _patched():
    was_applied = patch.is_applied()
    patch.apply(tuner)
    yield
    if not was_applied:
        patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def learnt(folder):
    """Log and folder of a run that learns, with its evaluation."""
    output = folder / "learnt"
    options = {"eval_dataset": "triples", "do_eval": True, "eval_strategy": "steps", "eval_steps": 30}
    return train(folder, output_dir=str(output), compute_accuracy=True, **LEARN, **options), output


def test_every_step_trains_the_targets_that_core_gives(learnt):
    steps = [entry for entry in learnt[0] if "loss" in entry]
    assert len(steps) == LEARN["max_steps"]
    assert all(COMPONENTS <= set(entry) for entry in steps)
    assert {entry["rto_tokens"] for entry in steps} == {TOKENS_OF_AN_EPOCH["rto"]}
    assert all(entry["mle_tokens"] > TOKENS_OF_AN_EPOCH["mle"] for entry in steps), "with the ordinary rows'"


def test_logged_components_make_up_the_logged_loss(learnt):
    for entry in [entry for entry in learnt[0] if "loss" in entry]:
        mle, rto = entry["mle_tokens"], entry["rto_tokens"]
        mean = (entry["mle_loss"] * mle + entry["rto_loss"] * rto) / (mle + rto)
        assert entry["loss"] == pytest.approx(mean, rel=1e-4)


def test_evaluation_logs_its_components_and_the_hosts_accuracy(learnt):
    evaluations = [entry for entry in learnt[0] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [30, 60]
    for entry in evaluations:
        assert {f"eval_{name}" for name in COMPONENTS} <= set(entry)
        assert entry["eval_rto_tokens"] == TOKENS_OF_AN_EPOCH["rto"]
        assert entry["eval_accuracy"] > 0
    assert evaluations[-1]["eval_p_refusal"] > evaluations[0]["eval_p_refusal"]


def test_the_saved_model_refuses_where_it_was_made_to_go_on(learnt, folder):
    _, output = learnt
    assert refusal_probability(AutoModelForCausalLM.from_pretrained(folder / "model")) < 0.02
    assert refusal_probability(AutoModelForCausalLM.from_pretrained(output)) > 0.5
    assert AutoTokenizer.from_pretrained(output).chat_template, "the template is saved with the model"


def test_the_baseline_does_not(folder):
    output = folder / "vanilla"
    log = train(folder, output_dir=str(output), derta_method="vanilla", derta_num_prefixes=2, **LEARN)
    assert set(logged(log, "rto_tokens")) == {0}
    assert refusal_probability(AutoModelForCausalLM.from_pretrained(output)) < 0.2


@pytest.mark.parametrize("kind", ["lora", "freeze"])
def test_other_ways_to_fine_tune_learn_too_and_leave_the_rest(tmp_path, kind):
    folder = make_folder(tmp_path, initializer_range=0.3)  # a frozen head must be able to say something
    options = {"lora": {"lora_rank": 8, "lora_target": "all"}, "freeze": {"freeze_trainable_layers": 1}}[kind]
    log = train(folder, finetuning_type=kind, **options, **LEARN)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before, frozen = refusal_probability(base), {name: value.clone() for name, value in base.named_parameters()}
    if kind == "lora":
        trained = PeftModel.from_pretrained(base, folder / "out")
        assert all(not value.requires_grad for name, value in trained.named_parameters() if "lora_" not in name)
    else:
        trained = AutoModelForCausalLM.from_pretrained(folder / "out")
        changed = {name for name, value in trained.named_parameters() if not torch.equal(value, frozen[name])}
        assert changed
        assert all(".layers.1." in name for name in changed)
    assert logged(log, "p_refusal")[-1] > 5 * logged(log, "p_refusal")[0]
    assert refusal_probability(trained) > 5 * before


def one_step(folder, **options):
    """The loss of the first step over the same eight rows, and the weights after it."""
    sgd = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    output = folder / f"step-{'-'.join(map(str, options.values()))}"
    log = train(
        folder, output_dir=str(output), max_steps=1, disable_shuffling=True, dataset="triples", max_samples=4,
        derta_rto_weight=0.7, **sgd, **options,
    )  # fmt: skip
    return logged(log, "loss")[0], AutoModelForCausalLM.from_pretrained(output).state_dict()


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_sum", "component_mean"])
def test_a_step_over_branch_rows_is_the_step_over_rows(folder, normalization):
    """Four triples in one step: eight rows, or four that hold them."""
    options = {"derta_normalization": normalization, "per_device_train_batch_size": 8}
    loss, apart = one_step(folder, **options)
    folded_loss, folded = one_step(folder, derta_layout="branch", **options)
    assert folded_loss == pytest.approx(loss, rel=1e-3)  # the host rounds it
    difference = sum((apart[name] - folded[name]).double().square().sum() for name in apart)
    assert math.sqrt(difference / sum(value.double().square().sum() for value in apart.values())) < 1e-6


def test_branch_rows_without_the_accuracy_of_logits(folder):
    with pytest.raises(ConfigError, match="`compute_metrics` needs the logits of separate rows"):
        train(folder, output_dir=str(folder / "accuracy"), derta_layout="branch", compute_accuracy=True, max_steps=1)


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_sum", "component_mean"])
def test_a_step_does_not_depend_on_its_micro_batches(folder, normalization):
    loss, whole = one_step(folder, per_device_train_batch_size=8, derta_normalization=normalization)
    split_loss, split = one_step(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=4, derta_normalization=normalization
    )
    assert split_loss == pytest.approx(loss, rel=1e-3)  # the host rounds it
    difference = sum((whole[name] - split[name]).double().square().sum() for name in whole)
    assert math.sqrt(difference / sum(value.double().square().sum() for value in whole.values())) < 1e-6


def test_the_first_loss_is_the_one_of_core(folder):
    """By the model's own logits, one target at a time."""
    loss, _ = one_step(folder, per_device_train_batch_size=8, derta_normalization="token_mean")
    model, nats, targets = AutoModelForCausalLM.from_pretrained(folder / "model"), 0.0, 0
    for row in rows_of_core(safety_records(4), DeRTaConfig(seed=3)):
        with torch.no_grad():
            logps = model(torch.tensor([row.input_ids])).logits[0].log_softmax(dim=-1)
        for place, (label, is_rto) in enumerate(zip(row.labels, row.rto_mask, strict=True)):
            if label != -100:
                nats -= (0.7 if is_rto else 1.0) * logps[place - 1, label].item()
                targets += 1
    assert loss == pytest.approx(nats / targets, rel=1e-3)


def test_evaluation_alone_scores_a_model(learnt, folder):
    log, model = learnt
    tuner.run_exp(
        make_config(
            folder, model_name_or_path=str(model), output_dir=str(folder / "scored"), do_train=False, do_eval=True,
            dataset=None, eval_dataset="triples", compute_accuracy=True,
        )
    )  # fmt: skip
    scores = json.loads((folder / "scored" / "eval_results.json").read_text())
    (last,) = (entry for entry in log if entry.get("step") == 60 and "eval_loss" in entry)
    for name in ("eval_loss", "eval_rto_loss", "eval_p_refusal", "eval_accuracy"):
        assert scores[name] == pytest.approx(last[name], rel=1e-4), name


def test_streams_train(folder):
    options = {"streaming": True, "dataloader_num_workers": 1, "buffer_size": 8, "max_steps": 4}
    log = train(folder, output_dir=str(folder / "stream"), **options)
    assert sum(logged(log, "rto_tokens")) > 0
    assert len(logged(log, "loss")) == 4


def test_the_model_is_loaded_as_for_a_stage_that_needs_logits_and_all_is_as_before_afterwards(folder, monkeypatch):
    seen, load_model = [], workflow.load_model

    def spying(tokenizer, model_args, finetuning_args, *args):
        seen.append(finetuning_args)
        assert finetuning_args.stage == "derta"
        return load_model(tokenizer, model_args, finetuning_args, *args)

    monkeypatch.setattr(workflow, "load_model", spying)
    before = workflow.get_dataset, workflow.CustomSeq2SeqTrainer
    train(folder, output_dir=str(folder / "spied"), max_steps=1)
    assert seen[0].stage == "sft", "as the host dispatched it"
    assert (workflow.get_dataset, workflow.CustomSeq2SeqTrainer) == before


# --- fails closed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_step(monkeypatch):
    """Fails the test if a step is taken."""
    monkeypatch.setattr(
        adapter.LLaMAFactoryDeRTaTrainer, "training_step", lambda *args, **kwargs: pytest.fail("a step was taken")
    )


CONFLICTS = {
    "packing": {"packing": True},
    "neat_packing": {"neat_packing": True},
    "ignore_pad_token_for_loss": {"ignore_pad_token_for_loss": False},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "use_dft_loss": {"use_dft_loss": True},
    "use_asft_loss": {"use_asft_loss": True},
    "use_eaft_loss": {"use_eaft_loss": True},
    "shift_attn": {"shift_attn": True},
    "moe_aux_loss_coef": {"moe_aux_loss_coef": 0.1},
}
# the host asks for packages that are not here before it comes to us
CONFLICTS_OF_PACKAGES = {"predict_with_generate": True, "do_predict": True, "use_unsloth": True, "use_kt": True}


@pytest.mark.parametrize("name", CONFLICTS)
@pytest.mark.usefixtures("no_step")
def test_a_setting_that_excludes_derta_is_refused_with_a_sentence(folder, name, tmp_path):
    with pytest.raises(ConfigError, match=rf"`{name}` must be .* with `stage: derta`, got .*: .*\."):
        train(folder, output_dir=str(tmp_path / "out"), **CONFLICTS[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CONFLICTS_OF_PACKAGES)
@pytest.mark.usefixtures("no_step")
def test_so_is_one_that_needs_a_package_once_the_host_has_it(folder, name, monkeypatch):
    monkeypatch.setattr("llamafactory.hparams.parser.check_version", lambda *args, **kwargs: None)
    config = make_config(folder, val_size=2, **{name: CONFLICTS_OF_PACKAGES[name]})
    if name == "do_predict":
        config["predict_with_generate"] = True
    with pytest.raises(ConfigError, match=rf"`({name}|predict_with_generate)` must be .* with `stage: derta`"):
        tuner.run_exp(config)


def test_every_conflict_is_tested():
    assert {key for _, key, _, _ in adapter._CONFLICTS} == {*CONFLICTS, *CONFLICTS_OF_PACKAGES}


def dropping(column):
    def get_dataset(*args, **kwargs):
        module = original(*args, **kwargs)
        return {name: dataset.remove_columns(column) for name, dataset in module.items()}

    original = adapter.get_dataset
    return get_dataset


@pytest.mark.usefixtures("no_step")
def test_rows_that_lost_our_column_are_refused(folder, monkeypatch):
    original = adapter.get_dataset

    def dropping(*args, **kwargs):
        return {name: dataset.remove_columns("rto_mask") for name, dataset in original(*args, **kwargs).items()}

    monkeypatch.setattr(adapter, "get_dataset", dropping)
    with pytest.raises(ValueError, match="The train dataset has no column `rto_mask`"):
        train(folder)


def test_a_batch_that_lost_our_column_ends_the_run_before_the_first_step(folder, monkeypatch):
    original, output = RowCollator.__call__, folder / "dropped"

    def dropping(self, features):
        batch = original(self, features)
        del batch["rto_mask"]
        return batch

    monkeypatch.setattr(RowCollator, "__call__", dropping)
    with pytest.raises(ValueError, match="rto_mask"):
        train(folder, output_dir=str(output))
    assert not (output / "trainer_state.json").exists()


def run_with_own(monkeypatch, folder, **names):
    """A run whose workflow keeps its own `names`, as in a later release that asks for them in another way."""
    monkeypatch.setattr(adapter, "replaced", lambda module, **values: patch.replaced(module, **{**values, **names}))
    return train(folder, output_dir=str(folder / "own"))


def test_a_half_replaced_workflow_takes_no_step(folder, monkeypatch):
    monkeypatch.setattr(CustomSeq2SeqTrainer, "training_step", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="not applicable in the current training stage"):
        run_with_own(monkeypatch, folder, get_dataset=workflow.get_dataset)


def test_rows_of_ours_do_not_fit_the_hosts_own_trainer(folder, monkeypatch):
    """Its collator cannot pad `rto_mask`. If it could, the labels would still be refusals only."""
    with pytest.raises(ValueError, match="Unable to create tensor"):
        run_with_own(monkeypatch, folder, CustomSeq2SeqTrainer=CustomSeq2SeqTrainer)
    assert not (folder / "own" / "trainer_state.json").exists()


# --- interruption -----------------------------------------------------------------------------------------------------


class _Interruption(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise InterruptedError


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resuming_an_interrupted_run_ends_like_an_uninterrupted_one(folder, kind):
    options = {
        **{"finetuning_type": kind, "max_steps": 12, "learning_rate": 1e-2},
        **{"save_strategy": "steps", "save_steps": 6, "overwrite_output_dir": None},
    }
    whole = train(folder, output_dir=str(folder / f"{kind}-whole"), **options)
    config = make_config(folder, output_dir=str(folder / f"{kind}-halves"), **options)
    with pytest.raises(InterruptedError):
        tuner.run_exp(config, callbacks=[_Interruption()])
    tuner.run_exp(config)  # the host finds the checkpoint by itself
    halves = history(folder / f"{kind}-halves")
    assert len(logged(halves, "loss")) == 12
    for name in ("loss", *sorted(COMPONENTS)):
        assert logged(halves, name) == pytest.approx(logged(whole, name), rel=1e-6), name
