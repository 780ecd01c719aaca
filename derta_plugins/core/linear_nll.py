"""
Next-token loss of gathered positions through a linear language-model head, a few rows of logits at a time.

The gradient is made while a chunk's logits are there, as in Liger's fused loss and in torch's `F.linear_cross_entropy`:
three matrix products in all, and never more logits than one chunk has. Unlike there, the loss of each token comes out
too, from which the components are logged, and tokens have weights.

Shape letters used in this file: N gathered tokens, D size of a hidden state, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows of logits at a time. 256 is where a CPU is fastest (tests/benchmarks/head.py); on a GPU 1024 rows keep the matrix
# products large, and are 0.5 GB of float32 logits at a vocabulary of 128 K.
CPU_CHUNK_SIZE, GPU_CHUNK_SIZE = 256, 1024


@dataclass(frozen=True)
class LinearNLL:
    """
    What `linear_nll` finds.

    Attributes:
        total: Scalar, sum of `token_weights` times the losses; differentiable.
        nll: (N,) loss of each token in nats, detached.
        entropy: (N,) entropy of each prediction in nats, detached; None unless asked for.
        is_top1: (N,) bool, whether the target is the likeliest token; None unless asked for.
    """

    total: Tensor
    nll: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    stats: bool = False,
) -> LinearNLL:
    """
    Weighted negative log-likelihood of `targets` under `softmax(hidden @ weight.T + bias)`.

    Args:
        hidden: (N, D) hidden states, of supervised positions only.
        weight: (V, D) of the head.
        targets: (N,) int64, what each hidden state predicts, in [0, V).
        token_weights: (N,) what each loss is multiplied by, from `core.losses.token_weights`. Not differentiated.
        bias: (V,) of the head, if it has one.
        chunk_size: Rows of logits at a time; None takes what suits the device.
        stats: Also find entropy and accuracy, which costs a pass over the logits.

    Returns:
        `LinearNLL`, in float32, or float64 where the inputs are. With N = 0 the total is zero, and its gradients too.

    Raises:
        ValueError: If shapes do not fit; if a target is no token (on a GPU too, at the price of a synchronisation); if
            gradients are wanted in float16, where they would get lost: they are made before the loss is scaled.

    Example:
        >>> hidden, weight = torch.ones(2, 3), torch.zeros(8, 3)  # uniform over 8 tokens: log(8) nats each
        >>> found = linear_nll(hidden, weight, torch.tensor([1, 5]), token_weights=torch.tensor([1.0, 0.5]))
        >>> round(found.total.item(), 4), [round(nats, 4) for nats in found.nll.tolist()]
        (3.1192, [2.0794, 2.0794])
    """
    _check(hidden, weight, targets, token_weights, bias)
    if torch.is_autocast_enabled(hidden.device.type):
        half = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(half), weight.to(half)
        bias = None if bias is None else bias.to(half)
    if not torch.is_grad_enabled():  # a Function is not told, and would make the gradients for nothing
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    elif hidden.dtype == torch.float16 and any(of is not None and of.requires_grad for of in (hidden, weight, bias)):
        raise ValueError("Gradients in float16 want a scaled loss: train in bfloat16, or build the logits.")
    if chunk_size is None:
        chunk_size = CPU_CHUNK_SIZE if hidden.device.type == "cpu" else GPU_CHUNK_SIZE
    found = _LinearNLL.apply(hidden, weight, bias, targets, token_weights, chunk_size, stats)
    return LinearNLL(*found)


@torch.no_grad()
def logit_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """
    Entropy and accuracy where logits are there anyway.

    Args:
        logits: (..., V) in any precision.
        targets: (...) int64, what each of them predicts; what is no token is never the likeliest.

    Returns:
        (...) entropy in nats, float32 (float64 of float64), and (...) bool, whether the target is the likeliest token.

    Example:
        >>> entropy, is_top1 = logit_stats(torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0]))
        >>> round(entropy[0].item(), 4), is_top1.tolist()
        (0.6931, [True, False])
    """
    log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
    return torch.special.entr(log_probs.exp()).sum(dim=-1), log_probs.argmax(dim=-1) == targets


class _LinearNLL(torch.autograd.Function):
    """`linear_nll`, with the gradients of its total made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, token_weights, chunk_size, stats):
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Chunks(hidden, weight, bias, ctx.needs_input_grad[:3])
            for start in range(0, len(targets), chunk_size):
                work.add(slice(start, start + chunk_size), targets, token_weights, stats)
        ctx.save_for_backward(work.grad_hidden, _as(work.grad_weight, weight), _as(work.grad_bias, bias))
        found = (work.nll, work.entropy, work.is_top1) if stats else (work.nll,)
        ctx.mark_non_differentiable(*found)
        return (torch.dot(work.nll, token_weights.to(work.nll.dtype)), *found)

    @staticmethod
    def backward(ctx: Any, grad_total, *_):
        grads = ctx.saved_tensors
        if grad_total != 1:  # as in most runs; the head's gradient is too large to be copied for nothing
            grads = (None if grad is None else grad * grad_total.to(grad.dtype) for grad in grads)
        return (*grads, None, None, None, None)


class _Chunks:
    """Losses and gradients so far."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: tuple[bool, ...]) -> None:
        self._hidden, self._weight, self._bias = hidden, weight, bias
        # half precision is summed over chunks in single precision
        self._dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count = hidden.new_zeros(len(hidden), dtype=self._dtype)
        self.nll, self.entropy = count, torch.zeros_like(count)
        self.is_top1 = torch.zeros_like(count, dtype=torch.bool)
        self.grad_hidden = torch.zeros_like(hidden) if needs_grad[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=self._dtype) if needs_grad[1] else None
        self.grad_bias = torch.zeros_like(bias, dtype=self._dtype) if bias is not None and needs_grad[2] else None

    def add(self, rows: slice, targets: Tensor, token_weights: Tensor, stats: bool) -> None:
        hidden, target = self._hidden[rows], targets[rows, None]
        scores = torch.nn.functional.linear(hidden, self._weight, self._bias).to(self._dtype)
        at_target = scores.gather(1, target)
        if stats:
            self.is_top1[rows] = scores.argmax(dim=1) == targets[rows]
        highest = scores.amax(dim=1, keepdim=True)
        scores.sub_(highest)
        # a bias of minus infinity has a probability of zero, and no part in the entropy
        shifted = scores.clamp(min=torch.finfo(self._dtype).min) if stats else None
        total = scores.exp_().sum(dim=1, keepdim=True)
        self.nll[rows] = (total.log() + highest - at_target)[:, 0]
        if stats:
            self.entropy[rows] = total.log()[:, 0] - (scores * shifted).sum(dim=1) / total[:, 0]
        if any(grad is not None for grad in (self.grad_hidden, self.grad_weight, self.grad_bias)):
            weights = token_weights[rows, None].to(self._dtype)
            # weight times (softmax - one at the target), in the place of the scores
            self._add_gradients(rows, hidden, scores.mul_(weights / total).scatter_add_(1, target, -weights))

    def _add_gradients(self, rows: slice, hidden: Tensor, grad_logits: Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(dim=0)
        grad_logits = grad_logits.to(hidden.dtype)
        if self.grad_hidden is not None:
            torch.mm(grad_logits, self._weight, out=self.grad_hidden[rows])
        if self.grad_weight is None:
            return
        if hidden.dtype == self._dtype:
            self.grad_weight.addmm_(grad_logits.T, hidden)
        else:
            self.grad_weight += grad_logits.T @ hidden


def _as(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, bias: Tensor | None) -> None:
    count, size, vocabulary = len(targets), weight.shape[-1], weight.shape[0]
    shapes = {
        "hidden": (hidden, (count, size)),
        "weight": (weight, (vocabulary, size)),
        "targets": (targets, (count,)),
        "token_weights": (token_weights, (count,)),
        **({} if bias is None else {"bias": (bias, (vocabulary,))}),
    }
    for name, (value, wanted) in shapes.items():
        if tuple(value.shape) != wanted:
            raise ValueError(f"`{name}` must have the shape {wanted}, got {tuple(value.shape)}.")
    lowest, highest = torch.stack(targets.aminmax()).tolist() if count else (0, 0)
    if not 0 <= lowest <= highest < vocabulary:
        raise ValueError(
            f"`targets` must be in [0, {vocabulary}), got {lowest} to {highest}: tokenizer and "
            "model do not belong together."
        )
