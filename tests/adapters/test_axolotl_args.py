"""The `derta:` block of an Axolotl config, through the host's own validation, and the settings that exclude DeRTa."""

import dataclasses

import pytest
import yaml
from axolotl.cli import config as host_config

from derta_plugins.adapters.axolotl_args import (
    _AT_MOST_ONE,
    _REFUSED,
    _REFUSED_KNOBS,
    DeRTaArgs,
    DeRTaKnobs,
    check_settings,
    derta_config,
    fused_loss,
)
from derta_plugins.core.config import ConfigError, DeRTaConfig
from tests.adapters.axolotl_configs import PLUGIN, entry, make_config, make_folder, our_plugin, own_plugins, validated

KNOBS = {knob.name: knob for knob in dataclasses.fields(DeRTaConfig)}


@pytest.fixture(autouse=True)
def _own_plugins():
    with own_plugins():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("args"))


@pytest.fixture
def cfg(folder):
    return lambda **changes: make_config(folder, **changes)


def test_the_block_has_every_knob_with_its_default():
    assert set(DeRTaKnobs.model_fields) == set(KNOBS)
    for name, field in DeRTaKnobs.model_fields.items():
        assert field.default == (None if name == "seed" else KNOBS[name].default), name
    assert DeRTaArgs().derta is None


def test_a_config_without_a_block_has_the_defaults_of_the_core(cfg):
    for read in (cfg(derta=None), validated(cfg(derta=None)), validated(cfg(derta={}))):
        assert derta_config(read) == DeRTaConfig(seed=1)


EVERY_KNOB = {
    "method": "recaug",
    "refusal_text": "No",
    "allow_first_piece": True,
    "apply_chat_template": False,
    "prefix_unit": "word",
    "zero_prefix_ratio": 0.25,
    "num_prefixes": 3,
    "rto_ratio": 0.5,
    "rto_keep_ratio": 0.05,
    "rto_turns": "all",
    "normalization": "sequence_sum",
    "rto_weight": 0.7,
    "layout": "branch",
    "on_bad_record": "skip",
    "seed": 11,
}


def test_every_knob_reaches_the_plugin_and_survives_validation(cfg):
    assert set(EVERY_KNOB) | {"transform"} | set(_REFUSED_KNOBS) == set(KNOBS)
    assert not any(value == KNOBS[name].default for name, value in EVERY_KNOB.items())
    read = validated(cfg(derta=EVERY_KNOB))
    assert our_plugin().config == derta_config(read) == DeRTaConfig(**EVERY_KNOB)
    # the launcher's processes and Ray's workers are given a config that was validated before
    assert derta_config(validated(read)) == DeRTaConfig(**EVERY_KNOB)


def test_the_name_of_a_transform_is_kept(cfg):
    read = host_config.validate_config
    host_config.prepare_plugins(plain := cfg(derta={}))
    plain["derta"] = {"transform": "mine"}
    assert derta_config(read(plain)).transform == "mine"


def test_a_null_of_ours_survives_a_dump_without_nulls(cfg):
    read = validated(cfg(derta={"zero_prefix_ratio": None}))
    assert read["derta"]["zero_prefix_ratio"] is None
    assert derta_config(read).zero_prefix_ratio is None
    assert derta_config(validated(cfg(derta={}))).zero_prefix_ratio == KNOBS["zero_prefix_ratio"].default


@pytest.mark.parametrize(
    ("block", "host", "expected"), [({}, 5, 5), ({"seed": 7}, 5, 7), ({}, None, 42), ({"seed": 0}, 5, 0), ({}, 0, 0)]
)
def test_the_seed_is_the_blocks_or_axolotls(cfg, block, host, expected):
    assert derta_config(validated(cfg(derta=block, seed=host))).seed == expected
    assert our_plugin().config.seed == expected


BAD_BLOCKS = {
    "a misspelt knob": ({"rto_wieght": 0.5}, r"Unknown DeRTa knob `rto_wieght`: did you mean `rto_weight`\?"),
    "a share out of range": ({"rto_keep_ratio": 7}, r"`rto_keep_ratio` must be a number in \(0, 1\], got 7"),
    "text for a number": ({"rto_weight": "much"}, "`rto_weight` must be a number .* 'much'"),
    "a choice": ({"method": "dpo"}, "`method` must be one of 'derta', 'vanilla', 'recaug', got 'dpo'"),
    "a bool for a count": ({"num_prefixes": True}, "`num_prefixes` must be a whole number"),
    "a fraction for a count": ({"num_prefixes": 1.5}, "`num_prefixes` must be a whole number"),
    "a negative seed": ({"seed": -1}, "`seed` must be a whole number"),
    "an empty refusal": ({"refusal_text": " "}, "`refusal_text` must be a word"),
    "drawn anew": ({"resample_each_epoch": True}, r"`derta.resample_each_epoch` is not for Axolotl: .*`num_prefixes`"),
    "a boundary share": ({"boundary_ratio": 0.5}, r"`derta.boundary_ratio` is not for Axolotl: .*ordinary dataset"),
    "no mapping": ("Sorry", "`derta:` must hold knobs, .* got 'Sorry'"),
    "a list": ([{"rto_weight": 1}], "`derta:` must hold knobs"),
    "true": (True, "`derta:` must hold knobs, .* got True"),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_what_the_block_cannot_have_ends_both_steps_of_the_host(cfg, name):
    """Where plugins are registered, and where the config is validated, which is all that a plugin of an API sees."""
    block, message = BAD_BLOCKS[name]
    with pytest.raises(ConfigError, match=message):
        host_config.prepare_plugins(cfg(derta=block))
    host_config.prepare_plugins(late := cfg(derta={}))
    late["derta"] = block
    with pytest.raises(ValueError, match=message if isinstance(block, dict) else "derta"):
        host_config.validate_config(late)


def test_refused_knobs_may_stand_there_at_their_default(cfg):
    block = {name: KNOBS[name].default for name in _REFUSED_KNOBS}
    assert set(block) == {"resample_each_epoch", "boundary_ratio"}
    assert derta_config(validated(cfg(derta=block))) == DeRTaConfig(seed=1)


def test_the_host_reads_the_block_from_its_file(cfg, folder, monkeypatch):
    """`load_cfg` whole but for what it does to this process: the user's error comes out of it."""
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(cfg(derta={"rto_ratoi": 1}).to_dict()), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean `rto_ratio`"):
        host_config.load_cfg(str(path))
    for name in ("prepare_debug_log", "prepare_optim_env", "normalize_config"):
        monkeypatch.setattr(host_config, name, lambda cfg: None)
    path.write_text(yaml.safe_dump(cfg(plugins="derta", derta={"rto_ratio": 0.5}).to_dict()), encoding="utf-8")
    read = host_config.load_cfg(str(path))
    assert read.plugins == [PLUGIN]
    assert derta_config(read).rto_ratio == 0.5


# a value that turns the setting on; the tables hold the reasons
ON = {
    "rl": "dpo",
    "reward_model": True,
    "process_reward_model": True,
    "trainer_cls": "my.Trainer",
    "orpo_alpha": 0.1,
    "use_eaft": True,
    "kd_trainer": True,
    "liger_use_token_scaling": True,
    "streaming": True,
    "pretraining_dataset": [{"path": "corpus"}],
    "skip_prepare_dataset": True,
    "push_dataset_to_hub": "me/rows",
    "processor_type": "AutoProcessor",
    "context_parallel_size": 2,
    "sequence_parallel_degree": 2,
}


@pytest.mark.parametrize("name", sorted(ON))
def test_settings_that_exclude_derta_end_the_run_before_anything_is_loaded(cfg, name):
    reason = {**_REFUSED, **_AT_MOST_ONE}[name]
    with pytest.raises(ConfigError, match=f"`{name}` cannot be used with DeRTa: ") as failure:
        host_config.prepare_plugins(cfg(**{name: ON[name]}))
    assert reason in str(failure.value)


def test_every_refused_setting_is_tried_and_known_to_the_host():
    assert set(ON) == {*_REFUSED, *_AT_MOST_ONE}
    from axolotl.integrations.kd import KDArgs
    from axolotl.integrations.liger import LigerArgs
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = {*AxolotlInputConfig.model_fields, *KDArgs.model_fields, *LigerArgs.model_fields}
    assert set(ON) <= known


def test_a_refused_setting_may_stand_there_switched_off(cfg):
    off = {**dict.fromkeys(_REFUSED, False), **dict.fromkeys(_AT_MOST_ONE, 1)}
    check_settings(cfg(**off), DeRTaConfig())


ALLOWED = {
    "packing": {"sample_packing": True, "eval_sample_packing": False},
    "lora": {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
    "qlora": {"adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
    "a validation share": {"val_set_size": 0.1},
    "deepspeed": {"deepspeed": "deepspeed_configs/zero3.json"},
    "fsdp": {"fsdp_version": 2, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    "deduplication": {"dataset_exact_deduplication": True},
    "one rank of a sequence": {"context_parallel_size": 1},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_people_train_with_is_not_refused(cfg, name):
    read = validated(cfg(**ALLOWED[name]))
    check_settings(read, our_plugin().config)
    for key in ALLOWED[name]:
        assert read[key] is not None


def test_a_mamba_model_is_known_after_validation(cfg):
    read = validated(cfg())
    read["model_config_type"] = "mamba"
    with pytest.raises(ConfigError, match=r"`base_model` cannot be used with DeRTa: .*mamba"):
        check_settings(read, DeRTaConfig())


@pytest.mark.parametrize("split", ["datasets", "test_datasets"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("field_messages", "conversations"),
        ("roles_to_train", ["user"]),
        ("train_on_eos", "all"),
        ("message_property_mappings", {"role": "from", "content": "value"}),
        ("drop_system_message", True),
        ("temperature", 0.5),
    ],
)
def test_settings_that_our_entry_does_not_read_are_refused(cfg, folder, split, name, value):
    entries = [entry(folder, "helpful", type="chat_template"), entry(folder, **{name: value})]
    changes = {split: entries, **({"val_set_size": None} if split == "test_datasets" else {})}
    with pytest.raises(ConfigError, match=rf"`{split}\[1\].{name}` cannot be used .*does not read it"):
        host_config.prepare_plugins(cfg(**changes))


def test_settings_that_our_entry_does_read_are_not(cfg, folder):
    read = {
        **{"name": "default", "revision": "main", "trust_remote_code": True, "data_files": ["triples.jsonl"]},
        **{"shards": 2, "shards_idx": 0, "chat_template": "chatml"},
    }
    config = cfg(datasets=[entry(folder, **read)])
    check_settings(validated(config), DeRTaConfig())


LIGER, CUT = "axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
FUSED = {
    "neither": ({}, None),
    "liger, all on": (
        {"plugins": [LIGER], "liger_fused_linear_cross_entropy": True},
        "liger_fused_linear_cross_entropy",
    ),
    "liger, kernels only": ({"plugins": [LIGER], "liger_rope": True}, None),
    "the setting without its plugin": ({"plugins": [], "liger_fused_linear_cross_entropy": True}, None),
    "cut": ({"plugins": [CUT], "cut_cross_entropy": True}, "cut_cross_entropy"),
    "cut by default": ({"plugins": [CUT]}, "cut_cross_entropy"),
    "cut, off": ({"plugins": [CUT], "cut_cross_entropy": False}, None),
    "cut's setting without its plugin": ({"plugins": [LIGER], "cut_cross_entropy": True}, None),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_loss_is_known_by_its_plugin_and_setting(name):
    settings, expected = FUSED[name]
    assert fused_loss(settings) == expected


def test_the_fused_losses_are_the_hosts_own_names():
    from importlib import import_module

    for name in (LIGER, CUT):
        module, _, plugin = name.rpartition(".")
        assert hasattr(import_module(module), plugin)


@pytest.mark.parametrize("knobs", [{"normalization": "component_mean"}, {"rto_weight": 0.5}])
@pytest.mark.parametrize("settings", [{"plugins": [CUT]}, {"plugins": [LIGER], **FUSED["liger, all on"][0]}])
def test_a_fused_loss_cannot_weigh_the_components(knobs, settings):
    with pytest.raises(ConfigError, match=f"`{fused_loss(settings)}`: "):
        check_settings(settings, DeRTaConfig(**knobs))
    check_settings(settings, DeRTaConfig())
    check_settings({}, DeRTaConfig(**knobs))
