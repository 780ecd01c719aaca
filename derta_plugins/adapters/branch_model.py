"""
The branch layout in a `transformers` model, through its public ways to bring attention and masks along.

A model is handed what its `attention_mask` argument takes in four dimensions "as it is": a table of segments for
attention of our own (`derta_segments`), FlexAttention's block mask, or a dense mask.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig

from derta_plugins.core.branch_attention import branch_mask, branch_rule, segment_attention, segment_table
from derta_plugins.core.branch_layout import positions
from derta_plugins.core.config import ConfigError

logger = logging.getLogger(__name__)

Way = Literal["segments", "flex", "dense"]
SEGMENTS = "derta_segments"
_LAYERS = {"full_attention", "sliding_attention"}
# Arguments of attention that only some models give, and that segments do not know.
_FOREIGN = ("softcap", "s_aux", "position_bias", "indices")
# Models that put their window into a mask of their own, or have one that they do not use.
_WINDOW_UNTOLD = ("doge", "moshi", "phimoe", "qwen2_moe")


def why_not(config: PreTrainedConfig) -> str:
    """One sentence on why a causal model of `config` cannot train branch rows; empty if it can."""
    if not isinstance(config, PreTrainedConfig):
        return "transformers does not know it."
    name = config.model_type
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return f"{name} is no plain causal language model."
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return f"{name} is no model of transformers' own, so its attention is not known."
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if foreign := set(getattr(config, "layer_types", None) or ()) - _LAYERS:
        return f"{name} has layers that take no mask ({', '.join(sorted(foreign))})."
    if model_class._is_stateful or not model_class._supports_attention_backend:
        return f"{name} has layers whose attention takes no mask of others."
    if getattr(config, "rope_parameters", None) is None:
        return f"{name} does not number positions by rotation, so a branch might not go on from where it leaves."
    if name in _WINDOW_UNTOLD and getattr(config, "sliding_window", None):
        return f"{name} does not tell its attention of its sliding window."
    if getattr(config, "output_router_logits", False):
        return f"{name} trains a router loss, which would count shared tokens once."
    return ""


class BranchAttention:
    """
    How one model attends in the branch layout. Made by `of`.

    Attributes:
        way: `segments`, `flex` or `dense`.
        flattens: Whether it wants the batch as one row without padding.
    """

    def __init__(self, way: Way, config: PreTrainedConfig, is_eager: bool = False) -> None:
        self.way, self._config, self._is_eager = way, config, is_eager
        self.flattens = way != "dense"

    @classmethod
    def of(cls, model: Any, way: Way | None = None) -> BranchAttention:
        """
        Set the attention of `model`, which may be wrapped by PEFT.

        Args:
            model: A `transformers` model on the device it will be trained on.
            way: None takes segments on a CPU, FlexAttention on a GPU, and a dense mask where the model has neither.

        Raises:
            ConfigError: If the model cannot train branch rows, or not in this way.
        """
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if reason := why_not(model.config):
            raise ConfigError(f"layout='branch' is not for this model: {reason} Set layout='rows'.")
        ways = _ways(model)
        way = way or ways[0]
        if way not in ways:
            raise ConfigError(
                f"{model.config.model_type} can attend by {', '.join(ways)} in branch rows, not by {way}."
            )
        names = {"segments": SEGMENTS, "flex": "flex_attention", "dense": _dense_implementation(model)}
        if way == "segments":
            _register()
        before = model.config._attn_implementation
        model.set_attn_implementation(names[way])
        if model.config._attn_implementation != names[way]:
            raise ConfigError(f"{type(model).__name__} kept its attention {before!r}: set layout='rows'.")
        logger.info("Branch rows attend by %s (was %s).", names[way], before)
        return cls(way, model.config, is_eager=names[way] == "eager")

    def masks(self, position_ids: torch.Tensor, branch_ids: torch.Tensor, dtype: torch.dtype) -> Any:
        """
        What the model's `attention_mask` must be.

        Args:
            position_ids: (B, S); B is 1 for segments.
            branch_ids: (B, S).
            dtype: Of the model's hidden states.

        Returns:
            One mask, or one for each kind of layer, for models that have several.
        """
        if self.way == "segments":
            return segment_table(position_ids, branch_ids)
        window = getattr(self._config, "sliding_window", None)
        if "sliding_attention" in (getattr(self._config, "layer_types", None) or ()):
            windows = {"full_attention": None, "sliding_attention": window}
            return {name: self._mask(position_ids, branch_ids, dtype, of) for name, of in windows.items()}
        is_full = getattr(self._config, "layer_types", None) is not None
        return self._mask(position_ids, branch_ids, dtype, None if is_full else window)

    @torch.no_grad()
    def check(self, model: Any, device: torch.device) -> None:
        """
        See that a branch row and its rows apart have the same logits, whatever a host or kernel has made of the model.

        Args:
            model: As it is trained, wrapped for many ranks or not; every rank must call this.
            device: Where its inputs go.

        Raises:
            ConfigError: If they differ by more than rounding, or the model fails with a branch row.
        """
        was_training, dtype = model.training, next(model.parameters()).dtype
        model.eval()
        try:
            ours, apart, behind_all = self._logits_of_branch(model, device, dtype)
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"This model does not take branch rows: set layout='rows'. ({error})") from error
        finally:
            model.train(was_training)
        error, mistake = (ours - apart).abs().max(), (behind_all - apart).abs().max()
        rounding = (1e-4 if dtype in (torch.float32, torch.float64) else 3e-2) * apart.abs().max()
        if not error <= torch.maximum(rounding, 0.1 * mistake):
            raise ConfigError(
                f"This model does not attend as branch rows need it (logits are off by {error:.2g}, rounding would be "
                f"{rounding:.2g}): a kernel or another plugin has changed its attention. Set layout='rows'."
            )

    def _logits_of_branch(self, model: Any, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        """(3, V) logits of a branch: in a branch row, in its own row, and mistaken, behind the whole trunk."""
        trunk, branch, parent_end = [11, 12, 13, 14, 15, 16, 17, 18], [21, 22, 23], 4
        position_ids, branch_ids = (
            torch.tensor([ids], device=device) for ids in positions([0] * len(trunk) + [parent_end] + [0] * len(branch))
        )
        masks = self.masks(position_ids, branch_ids, dtype)
        rows = (
            ([*trunk, trunk[parent_end - 1], *branch], {"position_ids": position_ids, "attention_mask": masks}),
            ([*trunk[:parent_end], *branch], {}),
            ([*trunk, *branch], {}),
        )
        return [
            model(input_ids=torch.tensor([ids], device=device), use_cache=False, **given)
            .logits[0, -len(branch) :]
            .float()
            for ids, given in rows
        ]

    def _mask(
        self, position_ids: torch.Tensor, branch_ids: torch.Tensor, dtype: torch.dtype, window: int | None
    ) -> Any:
        if self.way == "flex":
            batch, length = position_ids.shape
            rule = branch_rule(position_ids, branch_ids, sliding_window=window)
            device = position_ids.device
            # uncompiled it has S * S numbers of 8 bytes on the way
            return create_block_mask(rule, batch, None, length, length, device, _compile=device.type == "cuda")
        mask = branch_mask(position_ids, branch_ids, sliding_window=window)
        if not self._is_eager:
            return mask
        # eager attention adds its mask to the scores: a bool would add 1
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _ways(model: Any) -> list[Way]:
    """Ways that a model can attend in, the best for its device first."""
    ways: list[Way] = []
    if model._supports_sdpa and getattr(model.config, "attn_logit_softcapping", None) is None:
        ways.append("segments")
    has_dropout = any(getattr(model.config, name, 0) for name in ("attention_dropout", "attn_pdrop"))
    if model._supports_flex_attn and not has_dropout:
        # FlexAttention has no backward pass on a CPU
        ways.insert(0 if model.device.type == "cuda" else len(ways), "flex")
    if model.device.type == "cuda":
        return [*ways, "dense"]
    return [way for way in (*ways, "dense") if way != "flex"] + ["flex"] * ("flex" in ways)


def _dense_implementation(model: Any) -> str:
    """The model's own way, if that takes dense masks."""
    now = model.config._attn_implementation
    return now if now in ("sdpa", "eager") else "sdpa" if model._supports_sdpa else "eager"


def _register() -> None:
    """Make `derta_segments` known to transformers; without a table of segments it is `sdpa`."""
    AttentionInterface.register(SEGMENTS, _segments_forward)
    AttentionMaskInterface.register(SEGMENTS, AttentionMaskInterface()["sdpa"])


def _segments_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is None or attention_mask.dtype != torch.int32:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    given = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if kwargs.get("is_causal") is False:
        given.append("is_causal")
    if "sliding_window" not in kwargs and getattr(module.config, "sliding_window", None):
        given.append("a sliding window that it is not told of")
    if given:
        raise ConfigError(f"{type(module).__name__} attends with {given}, which segments cannot: set layout='rows'.")
    window = kwargs.get("sliding_window")
    options = {"scaling": scaling, "sliding_window": window, "dropout": dropout}
    return segment_attention(query, key, value, attention_mask, **options), None
