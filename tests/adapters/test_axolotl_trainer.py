"""Axolotl's trainer with DeRTa's loss: which rows it takes, and that no other trainer takes its place."""

import functools
import logging
from types import SimpleNamespace

import pytest
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
from datasets import Dataset, concatenate_datasets

from derta_plugins.adapters.axolotl_plugin import DeRTaPlugin
from derta_plugins.adapters.axolotl_rows import _HOST_FEATURES
from derta_plugins.adapters.axolotl_trainer import AxolotlDeRTaTrainer, RowTally
from derta_plugins.adapters.collator import RowCollator
from derta_plugins.core.branch_layout import fold_rows
from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.transform import build_rows
from tests.adapters.axolotl_configs import PLUGIN, entry, make_config, make_folder, our_plugin, own_plugins, validated
from tests.conftest import byte_level_bpe, tiny_llama

VOCABULARY, TARGET = 420, 7
LABELS = {"mle": [-100, 5, 6], "rto": [-100, TARGET, TARGET]}


class ForeignTrainer(AxolotlTrainer):
    """Of another plugin."""


class ForeignPlugin(BasePlugin):
    """Brings a trainer if the config asks for it."""

    def get_trainer_cls(self, cfg):
        return ForeignTrainer if cfg.get("foreign") else None


FOREIGN = f"{__name__}.ForeignPlugin"


@pytest.fixture(autouse=True)
def _own_plugins():
    with own_plugins():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("trainer"))


def safety(*rows):
    """Rows of DeRTa's, from (labels, mask)."""
    columns = [{"input_ids": [9] * len(labels), "labels": labels, "rto_mask": mask} for labels, mask in rows]
    return Dataset.from_list([{**row, "attention_mask": [1] * len(row["labels"])} for row in columns]).cast(
        _HOST_FEATURES
    )


def mle(count=1):
    return safety(*[(LABELS["mle"], [False] * 3)] * count)


def rto(count=1, target=TARGET):
    return safety(*[([-100, target, target], [False, True, True])] * count)


def ordinary(count=1):
    return mle(count).remove_columns("rto_mask")


def mixed(*parts):
    """As the host merges them: rows without a mask get a null."""
    return concatenate_datasets(list(parts))


TALLIES = {
    "all kinds": (mixed(ordinary(3), mle(2), rto(4)), ({TARGET}, 3, 2, 4)),
    "in another order": (mixed(rto(1), ordinary(2), mle(1), ordinary(1)), ({TARGET}, 3, 1, 1)),
    "no ordinary row": (mixed(mle(2), rto(1)), ({TARGET}, 0, 2, 1)),
    "ordinary rows alone": (mixed(ordinary(2), mle(1)).select([0, 1]), (set(), 2, 0, 0)),
    "no row": (mle(1).select([]), (set(), 0, 0, 0)),
    "a mask here and there": (safety(([-100, 5, TARGET], [False, False, True])), ({TARGET}, 0, 0, 1)),
    "two targets": (mixed(rto(1), rto(1, 8), rto(1, 9)), ({7, 8, 9}, 0, 0, 3)),
    "more than a batch": (mixed(mle(1500), ordinary(700), rto(1300)), ({TARGET}, 700, 1500, 1300)),
    "shuffled": (mixed(mle(20), ordinary(30), rto(40)).shuffle(seed=0), ({TARGET}, 30, 20, 40)),
    "with other columns": (mixed(mle(1), rto(1)).add_column("length", [3, 3]), ({TARGET}, 0, 1, 1)),
}


@pytest.mark.parametrize("name", TALLIES)
def test_rows_are_tallied_by_kind(name):
    rows, (targets, *counts) = TALLIES[name]
    assert RowTally.of(rows) == RowTally(frozenset(targets), *counts)


def test_masks_that_do_not_fit_their_labels_are_refused():
    rows = safety((LABELS["rto"], [False, True, True]), (LABELS["rto"], [True, True]))
    with pytest.raises(ValueError, match="`labels` and `rto_mask` of prepared rows differ in length"):
        RowTally.of(rows)


def test_masks_that_make_up_for_one_another_are_refused():
    rows = safety((LABELS["rto"], [True] * 4), (LABELS["rto"], [True] * 2))
    with pytest.raises(ValueError, match="differ in length"):
        RowTally.of(rows)


def make_trainer(path, rows, *, config=None, fused=False, evaluates=False, model=None, evaluation=None, **options):
    arguments = {
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"},
        **{"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "remove_unused_columns": False},
        **{"average_tokens_across_devices": True, "dataloader_pin_memory": False},
    }
    made = AxolotlDeRTaTrainer.for_run(config or DeRTaConfig(), is_loss_fused=fused, evaluates_triples=evaluates)
    return made(
        model=model or tiny_llama(VOCABULARY),
        args=AxolotlTrainingArguments(output_dir=str(path), **{**arguments, **options}),
        train_dataset=rows,
        eval_dataset=evaluation,
        processing_class=byte_level_bpe(),
        data_collator=DataCollatorForSeq2Seq(byte_level_bpe()),
        eval_data_collator=DataCollatorForSeq2Seq(byte_level_bpe()),
    )


def test_a_step_over_all_kinds_of_rows_counts_them(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(tmp_path, mixed(ordinary(1), mle(1), rto(2)), evaluation=mixed(mle(1), rto(1)))
    assert "DeRTa's training rows: 1 ordinary, 1 MLE, 2 RTO" in caplog.text
    assert "DeRTa's evaluation rows: 0 ordinary, 1 MLE, 1 RTO" in caplog.text
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "mle_loss" in entry]
    assert (log["mle_tokens"], log["rto_tokens"]) == (4, 4)
    assert trainer.evaluate()["eval_rto_tokens"] == 2


BAD_ROWS = {
    "several targets": (mixed(rto(1), rto(1, 8)), {}, r"several RTO targets: \[7, 8\]. Set `derta.refusal_text`"),
    "a target of the test set": (mixed(rto(1)), {"evaluation": rto(1, 8)}, r"several RTO targets: \[7, 8\]"),
    "a target that the model lacks": (rto(1, VOCABULARY), {}, r"id 420, but the model has 420 tokens"),
    "a target below all": (rto(1, -100), {}, "id -100, but the model has 420 tokens"),
    "no target": (mle(3), {}, "No training row has RTO targets, though every triple gives some"),
    "no target but of the test set": (mle(1), {"evaluation": rto(1)}, "No training row has RTO targets"),
    "ordinary rows alone": (ordinary(2), {}, "The training dataset has no column `rto_mask`"),
    "an evaluation that lost its masks": (
        mixed(mle(1), rto(1)),
        {"evaluation": ordinary(1), "evaluates": True},
        "The evaluation dataset has no column `rto_mask`",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_are_not_of_the_run_end_it(tmp_path, name):
    rows, options, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows, **options)


@pytest.mark.parametrize(
    "config", [DeRTaConfig(method="recaug"), DeRTaConfig(rto_ratio=0.5)], ids=["recaug", "a share"]
)
def test_rows_without_targets_are_fine_where_none_is_promised(tmp_path, config):
    assert make_trainer(tmp_path, mle(2), config=config).train().training_loss > 0


@pytest.mark.parametrize("target", [0, VOCABULARY - 1])
def test_the_first_and_the_last_token_can_be_the_target(tmp_path, target):
    make_trainer(tmp_path, rto(1, target))


def test_an_evaluation_of_ordinary_rows_is_one_without_targets(tmp_path):
    """They have no column, and get one, since the loss reads it."""
    trainer = make_trainer(tmp_path, rto(2), evaluation=ordinary(3))
    logged = trainer.evaluate()
    assert (logged["eval_mle_tokens"], logged["eval_rto_tokens"]) == (6, 0)
    assert logged["eval_loss"] == pytest.approx(logged["eval_mle_loss"], rel=1e-4)


def fused_model(*, divides):
    """A model that computes its loss itself, with dropout, and counts its calls."""
    model = tiny_llama(VOCABULARY, attention_dropout=0.3).train()
    host = model.forward

    @functools.wraps(host)
    def forward(*args, num_items_in_batch=None, **kwargs):
        forward.divisors.append(num_items_in_batch)
        assert "rto_mask" not in kwargs
        return host(*args, **kwargs, **({"num_items_in_batch": num_items_in_batch} if divides else {}))

    forward.divisors, model.forward = [], forward
    return model


def batch():
    ids = torch.tensor([[5, 6, 8, 9]])
    return {"input_ids": ids, "labels": ids.clone(), "rto_mask": torch.zeros_like(ids, dtype=torch.bool)}


def test_a_fused_loss_that_divides_by_what_it_is_given_is_trained_and_asked_once(tmp_path):
    model = fused_model(divides=True)
    rows = mixed(ordinary(1), mle(3), rto(4))
    trainer = make_trainer(tmp_path, rows, fused=True, model=model, max_steps=2)
    trainer.train()
    assert [float(divisor) for divisor in model.forward.divisors] == [1.0, 2.0, 8.0, 8.0]


def test_a_fused_loss_that_does_not_divide_ends_the_run_before_a_step(tmp_path):
    model = fused_model(divides=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path, mixed(mle(3), rto(5)), fused=True, model=model)
    with pytest.raises(RuntimeError, match="fused loss of this model does not divide by the targets of the whole step"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("as_tuple", [True, False])
def test_the_check_reads_outputs_of_either_kind_and_takes_no_random_number(as_tuple):
    calls = []

    def model(input_ids, labels, num_items_in_batch):
        calls.append(torch.rand(1).item())
        loss = torch.tensor(3.0) / num_items_in_batch
        return (loss, None) if as_tuple else {"loss": loss}

    state = torch.get_rng_state()
    rows = SimpleNamespace(_laid_out=dict, _with_masks=dict)
    AxolotlDeRTaTrainer._check_fused_divides(rows, model, batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert calls[0] == calls[1], "the same dropout twice, or the losses differ for that"


def test_an_evaluation_before_the_first_step_asks_it_too(tmp_path):
    model = fused_model(divides=True)
    trainer = make_trainer(tmp_path, rto(2), fused=True, model=model, evaluation=rto(3))
    trainer.evaluate()
    trainer.train()
    assert [float(divisor) for divisor in model.forward.divisors] == [1.0, 2.0, 6.0, 4.0]


def test_the_class_of_a_run_has_its_settings_and_leaves_those_of_others(folder):
    config = DeRTaConfig(rto_weight=0.5)
    first = AxolotlDeRTaTrainer.for_run(config, is_loss_fused=True, evaluates_triples=True)
    second = AxolotlDeRTaTrainer.for_run(DeRTaConfig(), is_loss_fused=False, evaluates_triples=False)
    assert (first.derta_config, first.is_loss_fused, first.evaluates_triples) == (config, True, True)
    assert (second.derta_config.rto_weight, second.is_loss_fused, second.evaluates_triples) == (1.0, False, False)
    assert not hasattr(AxolotlDeRTaTrainer, "derta_config")
    assert first.__name__ == "AxolotlDeRTaTrainer"
    assert "derta" in first.tag_names


def test_the_plugin_gives_the_trainer_of_its_config(folder):
    cut = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
    plain = validated(make_config(folder, derta={"rto_weight": 0.5}))
    trainer = PluginManager.get_instance().get_trainer_cls(plain)
    assert issubclass(trainer, AxolotlDeRTaTrainer)
    assert (trainer.derta_config, trainer.is_loss_fused) == (DeRTaConfig(rto_weight=0.5, seed=1), False)
    assert not trainer.evaluates_triples
    tested = validated(make_config(folder, test_datasets=[entry(folder)], val_set_size=None))
    assert our_plugin().get_trainer_cls(tested).evaluates_triples
    fused = validated(make_config(folder))
    fused["plugins"] = [PLUGIN, cut]
    assert our_plugin().get_trainer_cls(fused).is_loss_fused
    assert our_plugin().get_training_args(plain) == {"average_tokens_across_devices": True}


@pytest.mark.parametrize("plugins", [[FOREIGN, PLUGIN], [PLUGIN, FOREIGN]])
def test_a_trainer_of_another_plugin_is_refused_in_either_order(folder, plugins):
    cfg = validated(make_config(folder, plugins=plugins))
    assert issubclass(our_plugin().get_trainer_cls(cfg), AxolotlDeRTaTrainer)
    cfg["foreign"] = True
    with pytest.raises(ConfigError, match=f"The plugin {FOREIGN} brings a trainer of its own"):
        our_plugin().get_trainer_cls(cfg)


def test_a_trainer_that_is_not_ours_is_refused_when_it_is_made(folder):
    cfg = validated(make_config(folder))
    with pytest.raises(ConfigError, match="Axolotl made a SimpleNamespace, not DeRTa's trainer"):
        our_plugin().post_trainer_create(cfg, SimpleNamespace())
    with pytest.raises(ConfigError, match="made a ForeignTrainer"):
        our_plugin().post_trainer_create(cfg, object.__new__(ForeignTrainer))
    our_plugin().post_trainer_create(cfg, object.__new__(AxolotlDeRTaTrainer))


def test_settings_that_validation_brought_in_are_refused_with_the_trainer(folder):
    cfg = validated(make_config(folder))
    cfg["model_config_type"] = "mamba"
    with pytest.raises(ConfigError, match="mamba"):
        our_plugin().get_trainer_cls(cfg)


@pytest.mark.parametrize("split", ["datasets", "test_datasets"])
def test_an_entry_that_lost_its_mark_ends_the_run_though_its_rows_come_from_a_cache(folder, split):
    cfg = validated(make_config(folder, test_datasets=[entry(folder)], val_set_size=None))
    cfg[split][0].pop("conversation")
    with pytest.raises(RuntimeError, match="lost DeRTa's mark"):
        our_plugin().get_trainer_cls(cfg)


@pytest.mark.parametrize("preprocess", [True, False])
def test_a_run_without_safety_records_is_refused_before_data_is_loaded(folder, preprocess):
    ours = [entry(folder)]
    ordinary_entries = [entry(folder, "helpful", type="chat_template")]
    for changes in ({}, {"test_datasets": ours, "val_set_size": None}):
        cfg = validated(make_config(folder, datasets=ordinary_entries, **changes))
        with pytest.raises(ConfigError, match="no entry of `datasets` has `type: derta_plugins"):
            PluginManager.get_instance().load_datasets(cfg, preprocess=preprocess)
    cfg = validated(make_config(folder, datasets=ours))
    assert PluginManager.get_instance().load_datasets(cfg, preprocess=preprocess) is None


def test_a_plugin_that_a_config_does_not_name_does_nothing(folder):
    """Axolotl also asks the plugins of earlier configs of its process."""
    validated(make_config(folder))
    plugin, other = our_plugin(), {"plugins": [FOREIGN], "rl": "dpo", "datasets": [], "derta": {"rto_weight": "x"}}
    before = plugin.config
    plugin.register(other)
    assert plugin.config is before
    assert plugin.get_trainer_cls(other) is None
    assert plugin.get_training_args(other) is None
    assert plugin.load_datasets(other) is None
    assert plugin.post_trainer_create(other, SimpleNamespace()) is None
    assert type(plugin) is DeRTaPlugin


# --- the branch layout -----------------------------------------------------------------------------------------------


def rows_of(layout):
    """Three triples, and two ordinary rows that the host made."""
    config = DeRTaConfig(num_prefixes=2)
    made = []
    for index in range(3):
        triple = TokenizedTriple((10, 11, 12 + index), (20, 21, 22), tuple(range(30, 37 + index)), end_ids=(2,))
        rows = build_rows(triple, config, refusal_token_id=TARGET, index=index)
        for row in fold_rows(rows) if layout == "branch" else rows:
            starts = {"branch_starts": row.branch_starts} if layout == "branch" else {}
            made.append({"input_ids": row.input_ids, "labels": row.labels, "rto_mask": row.rto_mask, **starts})
    for length in (3, 6):
        ids = list(range(40, 40 + length))
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]], "rto_mask": None, "branch_starts": None})
        if layout == "rows":
            del made[-1]["branch_starts"]
    return Dataset.from_list([{**row, "attention_mask": [1] * len(row["labels"])} for row in made])


@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("normalization", ["token_mean", "sequence_sum", "component_mean"])
def test_the_hosts_batches_of_branch_rows_have_the_loss_of_rows(tmp_path, normalization, is_packed):
    losses = {}
    for layout in ("rows", "branch"):
        config = DeRTaConfig(layout=layout, normalization=normalization, rto_weight=0.7)
        rows = rows_of(layout)
        trainer = make_trainer(tmp_path / layout, rows, config=config)
        features = rows.to_list()
        for place, feature in enumerate(features):
            feature["position_ids"] = list(range(len(feature["labels"])))  # as the host adds before it packs
            feature["length"] = place
        if is_packed and layout == "branch":
            host = V2BatchSamplerDataCollatorForSeq2Seq(byte_level_bpe(), padding=True, pad_to_multiple_of=16)
            batch = RowCollator(host, "branch")([features])
            assert batch["labels"].shape[0] == 1
        else:
            batch = trainer.data_collator(
                [{k: f[k] for k in f if k not in ("position_ids", "length")} for f in features]
            )
        trainer.model.train()
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        losses[layout] = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counts).item()
    assert losses["branch"] == pytest.approx(losses["rows"], rel=1e-5)


def test_folded_rows_are_tallied():
    tally = RowTally.of(rows_of("branch"))
    assert (tally.ordinary, tally.mle, tally.rto, tally.branches) == (2, 0, 3, 6)
