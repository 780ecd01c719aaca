"""The `derta_` keys: from YAML, from the command line, and what is refused before anything is loaded."""

import dataclasses
import pickle

import pytest
from llamafactory.hparams import FinetuningArguments
from transformers import HfArgumentParser

from derta_plugins.adapters.llamafactory_args import DeRTaFinetuningArguments
from derta_plugins.core.config import ConfigError, DeRTaConfig

KNOBS = {f"derta_{knob.name}": knob for knob in dataclasses.fields(DeRTaConfig)}


def from_yaml(**values):
    (arguments,) = HfArgumentParser(DeRTaFinetuningArguments).parse_dict(values)
    return arguments


def from_command_line(*words):
    (arguments,) = HfArgumentParser(DeRTaFinetuningArguments).parse_args_into_dataclasses(list(words))
    return arguments


def test_a_run_without_keys_has_the_defaults_of_the_core_and_its_own_seed():
    for arguments in (from_yaml(stage="derta"), from_command_line("--stage", "derta")):
        assert arguments.derta_config(seed=7) == DeRTaConfig(seed=7)
        assert arguments.is_derta
        assert arguments.stage == "sft"


EVERY_KNOB = {
    "derta_method": "recaug",
    "derta_refusal_text": "No",
    "derta_allow_first_piece": True,
    "derta_prefix_unit": "word",
    "derta_zero_prefix_ratio": 0.25,
    "derta_num_prefixes": 3,
    "derta_rto_ratio": 0.5,
    "derta_rto_keep_ratio": 0.05,
    "derta_rto_turns": "all",
    "derta_normalization": "sequence_sum",
    "derta_rto_weight": 0.7,
    "derta_layout": "branch",
    "derta_on_bad_record": "skip",
    "derta_transform": "mine",
    "derta_seed": 11,
}


def test_every_knob_comes_from_yaml_and_from_the_command_line():
    refused = {"derta_apply_chat_template", "derta_resample_each_epoch", "derta_boundary_ratio"}
    assert set(EVERY_KNOB) | refused == set(KNOBS)
    expected = DeRTaConfig(**{key.removeprefix("derta_"): value for key, value in EVERY_KNOB.items()})
    words = [word for key, value in EVERY_KNOB.items() for word in (f"--{key}", str(value))]
    assert from_yaml(stage="derta", **EVERY_KNOB).derta_config(seed=0) == expected
    assert from_command_line("--stage", "derta", *words).derta_config(seed=0) == expected


def test_the_ratio_that_may_be_null_can_be_so_from_both():
    assert from_yaml(stage="derta", derta_zero_prefix_ratio=None).derta_config(seed=0).zero_prefix_ratio is None
    for word in ("none", "null", "None"):
        arguments = from_command_line("--stage", "derta", "--derta_zero_prefix_ratio", word)
        assert arguments.derta_config(seed=0).zero_prefix_ratio is None
    arguments = from_command_line("--stage", "derta", "--derta_zero_prefix_ratio", "0.5")
    assert arguments.derta_config(seed=0).zero_prefix_ratio == 0.5


REFUSED = {
    "a knob out of its range": ({"derta_rto_keep_ratio": 7}, r"`derta_rto_keep_ratio` must be a number in \(0, 1\]"),
    "text for a number": ({"derta_zero_prefix_ratio": "much"}, "`derta_zero_prefix_ratio` must be a number .* 'much'"),
    "text where null has no meaning": ({"derta_rto_weight": "none"}, "`derta_rto_weight` must be a number"),
    "an unknown choice": ({"derta_method": "dpo"}, "`derta_method` must be one of 'derta', 'vanilla', 'recaug'"),
    "rows drawn anew": ({"derta_resample_each_epoch": True}, "`derta_resample_each_epoch` cannot be used .* once"),
    "a boundary share": ({"derta_boundary_ratio": 0.5}, "`derta_boundary_ratio` cannot be used .* ordinary dataset"),
    "raw prompts": ({"derta_apply_chat_template": False}, "`derta_apply_chat_template` cannot be .*template: empty"),
    "another back end": ({"use_hyper_parallel": True}, "`use_hyper_parallel` cannot be used with `stage: derta`"),
    "Megatron": ({"use_mca": True}, "`use_mca` cannot be used with `stage: derta`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_with_a_sentence(name):
    values, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        from_yaml(stage="derta", **values)


def test_a_refused_knob_may_stand_there_at_its_default():
    values = {"derta_resample_each_epoch": False, "derta_boundary_ratio": None, "derta_apply_chat_template": True}
    assert from_yaml(stage="derta", **values).derta_config(seed=0) == DeRTaConfig()


@pytest.mark.parametrize("stage", ["sft", "dpo", "dertaa"])
def test_a_key_of_ours_in_another_stage_ends_the_run_even_at_its_default(stage):
    for key, value in (("derta_rto_weight", 0.5), ("derta_method", "derta"), ("derta_zero_prefix_ratio", None)):
        with pytest.raises(ConfigError, match=f"`{key}` given with `stage: {stage}`: set `stage: derta`"):
            from_yaml(stage=stage, **{key: value})


def test_a_misspelt_key_is_refused_by_the_host():
    with pytest.raises(ValueError, match="derta_rto_wieght"):
        from_yaml(stage="derta", derta_rto_wieght=0.5)


def test_the_host_must_not_be_told_to_ignore_keys(monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    with pytest.raises(ConfigError, match="misspelt `derta_` key would pass unseen"):
        DeRTaFinetuningArguments(stage="derta")
    assert not DeRTaFinetuningArguments(stage="sft").is_derta


def test_other_stages_are_the_hosts_own():
    for values in ({"stage": "dpo"}, {"stage": "sft", "finetuning_type": "full"}, {}):
        ours, theirs = from_yaml(**values), FinetuningArguments(**values)
        assert not ours.is_derta
        assert ours.to_dict() == theirs.to_dict()
        assert {name: value for name, value in vars(ours).items() if not name.startswith(("derta_", "is_"))} == vars(
            theirs
        )


def test_the_hosts_own_checks_still_run():
    with pytest.raises(ValueError, match="`use_dora` is only valid for LoRA"):
        from_yaml(stage="derta", finetuning_type="full", use_dora=True)


def test_loggers_see_the_knobs_of_a_run():
    seen = from_yaml(stage="derta", derta_rto_weight=0.5).to_dict()
    assert (seen["stage"], seen["derta_rto_weight"], seen["derta_method"]) == ("derta", 0.5, "derta")
    assert "derta_seed" not in seen, "it is the run's until then"
    assert pickle.loads(pickle.dumps(from_yaml(stage="derta"))).is_derta


def test_help_names_every_knob_with_its_default_and_what_it_is():
    text = " ".join(HfArgumentParser(DeRTaFinetuningArguments).format_help().split())
    for key, knob in KNOBS.items():
        default = "`data_seed`, or `seed`" if knob.name == "seed" else str(knob.default)
        (_, _, entry) = text.rpartition(f"--{key.replace('_', '-')} ")
        assert f"(default: {default})" in entry.partition(" --")[0], key
    assert "from 64 % to 18 %" in text
    assert "{pt,sft,rm,ppo,dpo,kto,derta}" in text
    assert all(item.metadata["help"] for item in dataclasses.fields(DeRTaFinetuningArguments) if item.name in KNOBS)
