"""Every knob of DeRTa: its default against the paper, and the values it refuses."""

import dataclasses
import re

import pytest

from derta_plugins.core.config import ConfigError, DeRTaConfig

NAN, INF = float("nan"), float("inf")

# knob: what the paper (arXiv 2407.09121) or, where it is silent, the authors' code does; a new knob needs a line here
DEFAULTS = {
    "method": "derta",
    "refusal_text": "auto",  # the authors' literal id is that of the word their safe responses begin with
    "allow_first_piece": False,
    "apply_chat_template": True,
    "prefix_unit": "token",  # k of Eq. 2 counts tokens
    "zero_prefix_ratio": 1 / 3,  # authors' code: one safety row in three has no prefix
    "num_prefixes": 1,  # one prefix per triple
    "rto_ratio": 1.0,  # every triple
    "rto_keep_ratio": 1.0,  # every position, the sum over t = 1..L of Eq. 2
    "rto_turns": "last",
    "resample_each_epoch": False,  # authors' code: drawn once, before training
    "normalization": "token_mean",  # authors' code: mean over target tokens
    "rto_weight": 1.0,  # Eq. 2 adds the two terms
    "layout": "rows",  # the paper trains rows apart
    "boundary_ratio": None,
    "transform": None,  # that of the paper
    "on_bad_record": "error",
    "seed": 0,
}


def test_defaults_are_the_papers():
    assert dataclasses.asdict(DeRTaConfig()) == DEFAULTS


NOT_NUMBERS = [True, False, "0.5", "1", [1], NAN]
# knob: values it refuses, and the words that tell what it takes
BAD_VALUES = {
    "method": (["DeRTa", "", "sft", None, True, 1, ["derta"]], "one of 'derta', 'vanilla', 'recaug'"),
    "prefix_unit": (["tokens", "words", "character", None, 1], "one of 'token', 'word'"),
    "rto_turns": (["first", "ALL", None, True, 2], "one of 'last', 'all'"),
    "on_bad_record": (["raise", "ignore", None, False], "one of 'error', 'skip'"),
    "normalization": (["mean", "sum", None, 1.0], "one of 'token_mean', 'sequence_sum', 'component_mean'"),
    "layout": (["row", "branches", None, True], "one of 'rows', 'branch'"),
    "refusal_text": (["", "  \n", None, 19701, True, ["Sorry"]], "a word such as 'Sorry', or 'auto'"),
    "transform": (["", "  \n", 0, True, False, ["mine"]], "the name of an installed transform"),
    "allow_first_piece": ([None, 0, 1, "true", "no"], "true or false"),
    "apply_chat_template": ([None, 0, 1, "true", "no"], "true or false"),
    "resample_each_epoch": ([None, 0, 1, "true", "no"], "true or false"),
    "zero_prefix_ratio": ([*NOT_NUMBERS, INF, -INF, -0.01, 1.01], "a number in [0, 1] or null"),
    "boundary_ratio": ([*NOT_NUMBERS, INF, -INF, -0.01, 2e6], "a number in [0, 1e+06] or null"),
    "rto_ratio": ([*NOT_NUMBERS, None, INF, -INF, -0.01, 1.01], "a number in [0, 1]"),
    "rto_keep_ratio": ([*NOT_NUMBERS, None, INF, -INF, 0, 0.0, -0.01, 1.01], "a number in (0, 1]"),
    "rto_weight": ([*NOT_NUMBERS, None, INF, -INF, -0.01, 2e6], "a number in [0, 1e+06]"),
    "num_prefixes": ([*NOT_NUMBERS, None, INF, 0, -1, 65, 1.0, 1.5], "a whole number in [1, 64]"),
    "seed": ([*NOT_NUMBERS, None, INF, -1, 2**63, 1.0], "a whole number in [0, "),
}


def test_every_knob_stands_in_the_table_of_bad_values():
    assert set(BAD_VALUES) == set(DEFAULTS)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, (values, allowed) in BAD_VALUES.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_bad_values_are_refused_with_knob_range_and_value(name, value, allowed):
    wanted = rf"^`{name}` must be {re.escape(allowed)}.*, got {re.escape(repr(value))}\.$"
    with pytest.raises(ConfigError, match=wanted):
        DeRTaConfig(**{name: value})
    with pytest.raises(ConfigError, match=wanted):
        DeRTaConfig.from_mapping({name: value})


GOOD_VALUES = {
    "method": ["derta", "vanilla", "recaug"],
    "refusal_text": ["Sorry", "auto", "I"],
    "allow_first_piece": [True],
    "apply_chat_template": [False],
    "prefix_unit": ["token", "word"],
    "zero_prefix_ratio": [None, 0, 0.0, 0.5, 1, 1.0],
    "num_prefixes": [1, 2, 64],
    "rto_ratio": [0, 0.0, 0.5, 1],
    "rto_keep_ratio": [1e-9, 0.05, 1],
    "rto_turns": ["last", "all"],
    "resample_each_epoch": [True],
    "normalization": ["token_mean", "sequence_sum", "component_mean"],
    "layout": ["rows", "branch"],
    "rto_weight": [0, 0.5, 1, 1e6],
    "boundary_ratio": [None, 0, 0.1, 1, 3.5],
    "transform": [None, "mine", "rto-only"],
    "on_bad_record": ["error", "skip"],
    "seed": [0, 1, 2**63 - 1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in GOOD_VALUES for value in GOOD_VALUES[name]], ids=repr
)
def test_limits_and_choices_are_taken_as_they_are(name, value):
    config = DeRTaConfig.from_mapping({name: value})
    assert getattr(config, name) == value
    assert config == dataclasses.replace(DeRTaConfig(), **{name: value})


def test_every_knob_stands_in_the_table_of_good_values():
    assert set(GOOD_VALUES) == set(DEFAULTS)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("rto_wieght", "did you mean `rto_weight`?"),
        ("zero_prefix", "did you mean `zero_prefix_ratio`?"),
        ("normalisation", "did you mean `normalization`?"),
        ("Seed", "did you mean `seed`?"),
        ("learning_rate_of_the_host", "known knobs: method, refusal_text, "),
        (7, "known knobs: method, refusal_text, "),
    ],
)
def test_unknown_key_suggests_the_nearest_or_lists_all(key, hint):
    with pytest.raises(ConfigError, match=rf"^Unknown DeRTa knob `{key}`: {re.escape(hint)}"):
        DeRTaConfig.from_mapping({"seed": 1, key: 1})


def test_empty_block_is_the_default():
    assert DeRTaConfig.from_mapping({}) == DeRTaConfig()


def test_config_cannot_change_after_the_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DeRTaConfig().seed = -1


def test_errors_are_value_errors():
    """Hosts turn `ValueError` of an argument class into a usage message."""
    assert issubclass(ConfigError, ValueError)
