"""
A `transformers` causal language model that scores its targets instead of building logits, for one forward pass.

The head is asked for its output as always, so that whatever hooks it has run (DDP, FSDP2, ZeRO-3), but its `forward` is
replaced meanwhile: it gathers the supervised positions and returns their loss. The loss reaches its caller where the
logits would, since sharded models watch their outputs for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.linear_nll import LinearNLL, linear_nll, logit_stats

# What models of transformers do to their logits, and the value that does nothing.
_AFTER_HEAD = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
    "logits_soft_cap": None,
    "output_logit_soft_cap": None,
    "unpadded_vocab_size": None,
}
# What a changed logit shows by, on every rank alike: exact in half precision, large, small, of both signs.
_MARKS = (1024.0, 2.0**-7, -1024.0, 255 / 128)


class HeadNotScorableError(RuntimeError):
    """The model does something to its logits, or around its head, that scoring in the head would skip."""


@dataclass(frozen=True)
class ScoredTargets:
    """
    What the head found.

    Attributes:
        total: Scalar, the sum of weights times losses; differentiable, and an output of the model.
        nll: (B, S) nats, detached, zero without a target. At `t` that of the token after `t`.
        entropy: (B, S) nats, likewise; None unless asked for.
        is_top1: (B, S) bool, likewise; None unless asked for.
    """

    total: Tensor
    nll: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None


def logit_changes(config: Any) -> set[str]:
    """
    What of a `config` tells that its model changes its logits after the head; empty where nothing is known.

    Known beforehand it is the same on every rank. What is not known is noticed at the first step (`ScoringHead.read`).
    """
    text_config = config.get_text_config()
    return {name for name, neutral in _AFTER_HEAD.items() if getattr(text_config, name, None) not in (None, neutral)}


def is_prompt_learning(model: Any) -> bool:
    """Whether PEFT puts virtual tokens, or keys of them, before those of `model`."""
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def cannot_score(model: Any, *, compiles: bool = False) -> bool:
    """
    Whether it is known beforehand, on every rank alike, that the head of `model` cannot score its targets.

    Args:
        model: A causal language model, PEFT around it or not.
        compiles: Whether its trainer will compile it.
    """
    # a compiled forward pass would be compiled anew at every step
    is_compiled = compiles or getattr(model, "_compiled_call_impl", None) is not None
    return bool(logit_changes(model.config)) or is_prompt_learning(model) or is_compiled


class ScoringHead:
    """The head of one forward pass; see `scoring`."""

    def __init__(self, head: nn.Module, targets: Tensor, token_weights: Tensor, *, stats: bool) -> None:
        self._head, self._targets, self._token_weights, self._stats = head, targets, token_weights, stats
        self._original, self._marks, self._found, self._is_read = head.forward, None, None, False

    @property
    def awaits_reading(self) -> bool:
        """Whether the head has answered, and what the model made of that was not read yet."""
        return self._found is not None and not self._is_read

    def forward(self, hidden: Tensor) -> Tensor:
        """(1, 1, V): the total, and marks, so that it has the shape of logits and shows what is done to them."""
        if self._found is not None or hidden.shape[:-1] != self._targets.shape:
            raise HeadNotScorableError(
                f"The head must be called once, with a hidden state for each of the {tuple(self._targets.shape)} "
                f"targets; got {tuple(hidden.shape)}."
            )
        places = (self._targets != IGNORE_INDEX).to(hidden.device)
        targets, weights = (of[places.to(of.device)].to(hidden.device) for of in (self._targets, self._token_weights))
        self._found, self._is_read = self._score(hidden[places], targets, weights), False
        total, vocabulary = self._found.total, getattr(self._head, "out_features", None) or len(self._head.weight)
        self._marks = total.detach().new_tensor(_MARKS).repeat(vocabulary // len(_MARKS) + 1)[: vocabulary - 1]
        # no view: FSDP2 wants to hook its outputs
        return torch.cat([total[None], self._marks])[None, None].clone()

    def _score(self, hidden: Tensor, targets: Tensor, token_weights: Tensor) -> LinearNLL:
        if self._is_plain(hidden):
            weight, bias = self._head.weight, self._head.bias
            return linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias, stats=self._stats)
        logits = self._original(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nll = nn.functional.cross_entropy(logits, targets, reduction="none")
        total = (nll * token_weights.to(nll.dtype)).sum()
        return LinearNLL(total, nll.detach(), *(logit_stats(logits, targets) if self._stats else ()))

    def _is_plain(self, hidden: Tensor) -> bool:
        """Whether `linear_nll` may do the head's work; otherwise the logits of these positions are built."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # an adapter, a quantised or a sharded head knows best what it computes; float16 wants scaled gradients
        is_linear = type(self._head) is nn.Linear and type(self._head.weight) in (nn.Parameter, Tensor)
        return is_linear and dtype != torch.float16

    def read(self, outputs: Any) -> ScoredTargets:
        """
        What was found, from the model's outputs.

        Raises:
            HeadNotScorableError: If the model did not call its head, or changed what it returned by more than the
                rounding of its outputs, or if those are float16.
        """
        self._is_read, got = True, getattr(outputs, "logits", None)
        if self._found is None or got is None:
            raise HeadNotScorableError("The model did not ask its head for logits.")
        if got.dtype == torch.float16:
            raise HeadNotScorableError("The model's outputs are cast to float16, in which a scaled loss overflows.")
        # of the marks alone, whatever a rank's total is; they are exact in bfloat16, to which FSDP2 casts outputs
        if got.shape != (1, 1, len(self._marks) + 1) or not torch.equal(got[0, 0, 1:].detach(), self._marks.to(got)):
            raise HeadNotScorableError(
                "The model changes its logits after the head (a soft-cap, a scale), so its loss cannot be had there."
            )
        places = self._targets != IGNORE_INDEX
        per_token = (self._found.nll, self._found.entropy, self._found.is_top1)
        laid_out = (None if of is None else of.new_zeros(places.shape).masked_scatter(places, of) for of in per_token)
        total = got[0, 0, 0].to(self._found.total.dtype, copy=True)
        with torch.no_grad():  # the value as exact as it was found; its gradient goes through the outputs
            total.copy_(self._found.total)
        return ScoredTargets(total, *laid_out)


@contextmanager
def scoring(model: Any, targets: Tensor, token_weights: Tensor, *, stats: bool = False) -> Iterator[ScoringHead]:
    """
    While this is open, a call of `model` without labels scores `targets`; `read` takes the result out of its outputs.

    Args:
        model: A causal language model, PEFT around it or not. Distributed training may call it through a wrapper.
        targets: (B, S) int64, shifted: at `t` what the hidden state `t` predicts, or -100.
        token_weights: (B, S), from `core.losses.token_weights`.
        stats: Also find entropy and accuracy.

    Raises:
        HeadNotScorableError: If the model has no head of its own, or is scoring already, or fails with what its head
            returns (it may want the shape of its inputs).
    """
    head = model.get_output_embeddings()
    if head is None or "forward" in vars(head):
        why = "has no head" if head is None else "has a head whose `forward` another tool replaced"
        raise HeadNotScorableError(f"{type(model).__name__} {why}.")
    scored = ScoringHead(head, targets, token_weights, stats=stats)
    head.forward = scored.forward
    try:
        yield scored
    except (RuntimeError, TypeError, ValueError) as error:
        if not scored.awaits_reading or isinstance(error, HeadNotScorableError | torch.OutOfMemoryError):
            raise
        raise HeadNotScorableError(f"The model takes no loss from its head for logits: {error}") from error
    finally:
        del head.forward
