"""`DeRTaFinetuningArguments`: LLaMA-Factory's `FinetuningArguments` with `stage: derta` and the `derta_` keys."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from llamafactory.extras.misc import is_env_enabled
from llamafactory.hparams import FinetuningArguments

from derta_plugins.core.config import ConfigError, DeRTaConfig

STAGE = "derta"
PREFIX = "derta_"
# knob: why this host cannot have it
_REFUSED_KNOBS = {
    "resample_each_epoch": "rows are built once, before training. Leave the key out",
    "boundary_ratio": "boundary rows are an ordinary dataset. Name it in `dataset`, with as many rows as you want",
    "apply_chat_template": "every record is laid out with `template`. Leave the key out, or set "
    "`template: empty` for text without one",
}
# host key: why a run with it would not be DeRTa's
_REFUSED_KEYS = {
    "use_hyper_parallel": "that back end has a training loop of its own",
    "use_mca": "that back end has a training loop of its own",
}


@dataclass(frozen=True)
class _NotGiven:
    """Default of a `derta_` key: told apart from the same value given by the user, and printed like it by `--help`."""

    default: Any

    def __str__(self) -> str:
        return str(self.default)


def _help_texts() -> dict[str, str]:
    """What the docstring of `DeRTaConfig` says of each knob; argparse wants its per cent signs doubled."""
    attributes = (inspect.getdoc(DeRTaConfig) or "").partition("Attributes:")[2].partition("Raises:")[0]
    entries = re.findall(r"^ {4}(\w+): (.+?)(?=^ {4}\w|\Z)", attributes, flags=re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}


def _fields() -> list[tuple[str, Any, Any]]:
    """The host's `stage` with one more choice, and a field for each knob."""
    hints, texts = get_type_hints(DeRTaConfig), _help_texts()
    (stage,) = (item for item in dataclasses.fields(FinetuningArguments) if item.name == "stage")
    choices = (*get_args(get_type_hints(FinetuningArguments)["stage"]), STAGE)
    made = [("stage", Literal[choices], dataclasses.field(default=stage.default, metadata=stage.metadata))]
    for knob in dataclasses.fields(DeRTaConfig):
        default, hint = knob.default, hints[knob.name]
        if knob.name == "seed":
            default = "`data_seed`, or `seed`"
        if hint == float | None:
            hint = float | str | None  # argparse then leaves it text, so that the command line can say `none`
        metadata = {"help": texts.get(knob.name, "")}
        made.append((PREFIX + knob.name, hint, dataclasses.field(default=_NotGiven(default), metadata=metadata)))
    return made


@dataclass
class DeRTaFinetuningArguments(dataclasses.make_dataclass("_Fields", _fields(), bases=(FinetuningArguments,))):
    """
    The host's arguments; with `stage: derta` also the knobs of `DeRTaConfig`, each as `derta_<knob>`.

    The host validates and dispatches such a run as "sft", which it is to it: `stage` reads so, and `is_derta` tells.

    Raises:
        ConfigError: If a knob is out of its range or cannot be had in this host, a back end would bypass DeRTa, or a
            `derta_` key is given without `stage: derta`.
    """

    is_derta: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = self._given_knobs()
        self.is_derta = self.stage == STAGE
        if given and not self.is_derta:
            keys = ", ".join(f"`{PREFIX}{name}`" for name in given)
            raise ConfigError(f"{keys} given with `stage: {self.stage}`: set `stage: derta`, or leave them out.")
        if self.is_derta:
            self.stage = "sft"
        super().__post_init__()
        if self.is_derta:
            self._knobs = given
            self._refuse()
            config = self.derta_config(seed=0)
            for knob in dataclasses.fields(config):
                if knob.name != "seed" or "seed" in given:
                    setattr(self, PREFIX + knob.name, getattr(config, knob.name))

    def derta_config(self, *, seed: int) -> DeRTaConfig:
        """
        The knobs, checked.

        Args:
            seed: Seed of the draws where `derta_seed` is not given: the run's `data_seed` or `seed`.
        """
        try:
            return DeRTaConfig(**{"seed": seed, **self._knobs})
        except ConfigError as error:
            names = "|".join(knob.name for knob in dataclasses.fields(DeRTaConfig))
            raise ConfigError(re.sub(rf"`({names})`", rf"`{PREFIX}\1`", str(error))) from None

    def to_dict(self) -> dict[str, Any]:
        """For the host's loggers; without our keys in runs that are not ours."""
        values = super().to_dict()
        kept = {name: values[name] for name in values if not isinstance(getattr(self, name), _NotGiven)}
        return {**kept, "stage": STAGE} if self.is_derta else kept

    def _given_knobs(self) -> dict[str, Any]:
        """Knobs that the user gave, even if at their default."""
        knobs = {knob.name: getattr(self, PREFIX + knob.name) for knob in dataclasses.fields(DeRTaConfig)}
        return {name: _number_or_none(name, value) for name, value in knobs.items() if not isinstance(value, _NotGiven)}

    def _refuse(self) -> None:
        if is_env_enabled("ALLOW_EXTRA_ARGS"):
            raise ConfigError(
                "ALLOW_EXTRA_ARGS is set, so a misspelt `derta_` key would pass unseen. Unset it for `stage: derta`."
            )
        for name, why in _REFUSED_KEYS.items():
            if getattr(self, name):
                raise ConfigError(f"`{name}` cannot be used with `stage: derta`: {why}.")
        for name, why in _REFUSED_KNOBS.items():
            default = getattr(DeRTaConfig, name)
            if self._knobs.get(name, default) != default:
                raise ConfigError(f"`{PREFIX}{name}` cannot be used in LLaMA-Factory: {why}.")


def _number_or_none(name: str, value: Any) -> Any:
    """A knob that may be null arrives as text from the command line; what is no number is left for the config."""
    if not isinstance(value, str) or get_type_hints(DeRTaConfig)[name] != float | None:
        return value
    if value.strip().lower() in ("none", "null"):
        return None
    try:
        return float(value)
    except ValueError:
        return value
