"""Every knob of DeRTa: its default in one place, with the sentence of the paper or of the authors' code beside it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Method = Literal["derta", "vanilla", "recaug"]
PrefixUnit = Literal["token", "word"]
RTOTurns = Literal["last", "all"]
OnBadRecord = Literal["error", "skip"]
Normalization = Literal["token_mean", "sequence_sum", "component_mean"]
Layout = Literal["rows", "branch"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "prefix_unit": get_args(PrefixUnit),
    "rto_turns": get_args(RTOTurns),
    "on_bad_record": get_args(OnBadRecord),
    "normalization": get_args(Normalization),
    "layout": get_args(Layout),
}
# name: (lowest, highest, lowest is allowed); all numbers must be finite
_BOUNDS: dict[str, tuple[float, float, bool]] = {
    "zero_prefix_ratio": (0.0, 1.0, True),
    "num_prefixes": (1, 64, True),
    "rto_ratio": (0.0, 1.0, True),
    "rto_keep_ratio": (0.0, 1.0, False),
    "rto_weight": (0.0, 1e6, True),
    "boundary_ratio": (0.0, 1e6, True),
    "seed": (0, 2**63 - 1, True),
}
_OPTIONAL = {"zero_prefix_ratio", "boundary_ratio"}
_INTEGERS = {"num_prefixes", "seed"}
_BOOLEANS = {"allow_first_piece", "apply_chat_template", "resample_each_epoch"}


class ConfigError(ValueError):
    """A knob has a wrong name or a wrong value."""


@dataclass(frozen=True, kw_only=True)
class DeRTaConfig:
    """
    The knobs of DeRTa, checked once, here. Quotes are from Yuan et al. 2024, arXiv 2407.09121 ("paper"), or tell what
    the authors' released scripts do ("code").

    Attributes:
        method: `derta` (prefix MLE and RTO), or one of the paper's baselines from the same triples: `vanilla` (safe
            response right after the prompt) and `recaug` (prefix MLE only).
        refusal_text: Text whose token is the RTO target, "sorry" in Eq. 2. `auto` takes the commonest first token of
            the safe responses. Code: the literal id of "Sorry" in LLaMA-3.
        allow_first_piece: Take the first piece of a `refusal_text` of several tokens, instead of an error.
        apply_chat_template: Put plain-text triples into the tokenizer's chat template as one user turn. False trains
            on the raw prompt.
        prefix_unit: What k counts. Eq. 2 counts tokens (the default); code: cuts the harmful response at words.
        zero_prefix_ratio: Share of MLE rows with k = 0; the other k are uniform in 1..L. None draws k uniform in 0..L
            as Eq. 2 says. Code: one safety row in three has no prefix.
        num_prefixes: MLE rows per triple, each with its own k. Paper: one.
        rto_ratio: Share of triples that give an RTO row too. Paper: all.
        rto_keep_ratio: Share of an RTO row's positions that keep their target. 1 is Eq. 2 and the authors' LoRA
            script; their full-parameter script keeps about 0.05.
        rto_turns: `last` puts RTO on the harmful response only; `all` also on every earlier assistant turn of the
            prompt (for multi-turn records whose earlier answers are harmful too).
        resample_each_epoch: Draw k and the kept RTO positions again in every epoch, from seed, epoch and record
            index. Code: drawn once, before training.
        normalization: What the loss is divided by, over the whole optimizer step. `token_mean`: target tokens (code).
            `sequence_sum`: rows, each the sum of its tokens (Eq. 2, whose expectation runs over responses).
            `component_mean`: MLE mean plus `rto_weight` times RTO mean.
        rto_weight: Weight of RTO positions. Paper: 1.
        layout: `rows` trains the rows of a triple apart, as the paper. `branch` trains the same in one sequence that
            holds prompt and harmful response once (`core.branch_layout`): less to compute, above all with
            `num_prefixes` of more than one.
        boundary_ratio: Benign look-alike rows per triple. None takes every row given. Paper (ACL version): XSTest
            refusals fell from 64 % to 18 % with 200 boundary samples.
        transform: Name of an installed plugin that turns triples into rows in place of `core.transform`. Its rows are
            checked before they are trained. None takes the built-in transform, the paper's.
        on_bad_record: `error` stops at the first record that is no triple; `skip` drops, counts and reports them.
        seed: Seed of every draw.

    Raises:
        ConfigError: If a value is out of its range; the message names the knob, the range and the value.
    """

    method: Method = "derta"
    refusal_text: str = "auto"
    allow_first_piece: bool = False
    apply_chat_template: bool = True
    prefix_unit: PrefixUnit = "token"
    zero_prefix_ratio: float | None = 1 / 3
    num_prefixes: int = 1
    rto_ratio: float = 1.0
    rto_keep_ratio: float = 1.0
    rto_turns: RTOTurns = "last"
    resample_each_epoch: bool = False
    normalization: Normalization = "token_mean"
    rto_weight: float = 1.0
    layout: Layout = "rows"
    boundary_ratio: float | None = None
    transform: str | None = None
    on_bad_record: OnBadRecord = "error"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for name, bounds in _BOUNDS.items():
            _check_number(name, getattr(self, name), bounds)
        for name in sorted(_BOOLEANS):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        if not isinstance(self.refusal_text, str) or not self.refusal_text.strip():
            raise ConfigError(f"`refusal_text` must be a word such as 'Sorry', or 'auto', got {self.refusal_text!r}.")
        if self.transform is not None and not (isinstance(self.transform, str) and self.transform.strip()):
            raise ConfigError(
                f"`transform` must be the name of an installed transform (`derta plugins` lists them) or null, got "
                f"{self.transform!r}."
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DeRTaConfig:
        """
        Build a config from the block of a host's config file.

        Raises:
            ConfigError: If a key is unknown (the nearest known key is suggested) or a value is out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"known knobs: {', '.join(known)}."
                raise ConfigError(f"Unknown DeRTa knob `{key}`: {hint}")
        return cls(**values)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_number(name: str, value: Any, bounds: tuple[float, float, bool]) -> None:
    lowest, highest, closed = bounds
    if value is None and name in _OPTIONAL:
        return
    kind = "a whole number" if name in _INTEGERS else "a number"
    kinds = int if name in _INTEGERS else (int, float)
    # `bool` is an `int` in Python, and NaN compares false with everything
    inside = not isinstance(value, bool) and isinstance(value, kinds) and lowest <= value <= highest
    if not inside or (value == lowest and not closed):
        allowed = f"{'[' if closed else '('}{lowest:g}, {highest:g}]" + (" or null" if name in _OPTIONAL else "")
        raise ConfigError(f"`{name}` must be {kind} in {allowed}, got {value!r}.")
