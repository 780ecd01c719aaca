"""
The DeRTa training loss, in plain PyTorch.

Targets are relabelled before the loss sees them (`core.transform`), so what is left here is a next-token negative
log-likelihood, its two components, and *one* division by counts of the whole optimizer step.

Shape letters used in this file: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from derta_plugins.core.config import ConfigError
from derta_plugins.core.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

    from derta_plugins.core.config import DeRTaConfig, Normalization


def rto_labels(labels: Tensor, rto_mask: Tensor, *, refusal_token_id: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return (B, S) `labels` with the refusal token wherever `rto_mask` is true; ignored positions stay ignored."""
    return torch.where(rto_mask & (labels != ignore_index), refusal_token_id, labels)


def rto_loss(
    logits: Tensor,
    labels: Tensor,
    rto_mask: Tensor,
    *,
    refusal_token_id: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    r"""
    Next-token cross-entropy whose target is the refusal token on RTO positions and the label on all others.

    $$\mathcal{L}(\theta) = -\mathbb{E}\,\log P_\theta(r \mid q, \hat r_{<k})
    \;-\; \mathbb{E} \sum_{t=1}^{|\hat r|} \log P_\theta(\text{sorry} \mid q, \hat r_{<t})$$

    The first term is plain cross-entropy (`rto_mask` false). The second, Reinforced Transition Optimization, asks for
    the refusal token after *every* prefix of the harmful response (`rto_mask` true on the whole response). Both share
    one denominator, as in the authors' code, so a row weighs in proportion to its number of target tokens.

    Args:
        logits: (B, S, V), output of the language-model head, not shifted: `logits[:, t]` predicts token `t + 1`. Half
            precision is upcast to float32; float32 and float64 are used as they are.
        labels: (B, S) integer target ids aligned with `input_ids`. `ignore_index` (prompt, padding) adds nothing. Not
            modified.
        rto_mask: (B, S) bool, true on the response tokens of RTO rows. Per token, so that it survives packing.
        refusal_token_id: Id of the "sorry" token, in `[0, V)`. It belongs to a tokenizer: see
            `resolve_refusal_token_id`.
        num_items_in_batch: Target tokens in the whole optimizer step, over all micro-batches and ranks. None counts the
            target tokens of this call.
        ignore_index: Label value that is left out of the loss.

    Returns:
        Scalar loss in nats per target token. Zero, and still attached to the graph of `logits`, without any target.

    Raises:
        ValueError: If `refusal_token_id` is outside `[0, V)`.

    Source:
        Yuan et al. 2024, arXiv 2407.09121, Eq. 2. The authors' `run_clm_lora_derta_llama.py` takes every response
        position, as here; their `run_clm_llms_derta_llama_drop_5_percent.py` keeps a random 5 %.

    Example:
        >>> logits = torch.zeros(1, 4, 8)  # uniform over 8 tokens: every target costs log(8) nats
        >>> labels = torch.tensor([[-100, -100, 5, 6]])
        >>> round(rto_loss(logits, labels, labels != -100, refusal_token_id=7).item(), 4)
        2.0794
    """
    vocab_size = logits.size(-1)
    if not 0 <= refusal_token_id < vocab_size:
        raise ValueError(
            f"`refusal_token_id` must be in [0, {vocab_size}), the vocabulary of `logits`, got {refusal_token_id}. "
            "Resolve it from the tokenizer of this model."
        )
    targets = rto_labels(labels, rto_mask, refusal_token_id=refusal_token_id, ignore_index=ignore_index)
    nll = per_token_nll(logits, targets, ignore_index=ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (targets[:, 1:] != ignore_index).sum()
    # One sum, one division: a mean per micro-batch would weigh micro-batches instead of tokens. A host may count 0.
    return nll.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)


def per_token_nll(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """
    Negative log-likelihood of each next-token label, from full logits.

    Hosts that compute it without building the logits (TRL's fused head) pass theirs to `derta_loss` instead.

    Args:
        logits: (B, S, V), not shifted. Half precision is upcast to float32.
        labels: (B, S) final targets aligned with `input_ids`.
        ignore_index: Label value without a target.

    Returns:
        (B, S - 1) in nats: entry `t` is the loss of `labels[:, t + 1]`, zero where ignored. Attached to the graph even
        without any target, so that no rank of a distributed run skips its backward pass and leaves the others waiting.
    """
    # Shift by padding the labels: slicing the logits instead would copy a (B, S, V) tensor.
    shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    # Upcast only what needs it: an unconditional `.float()` would downcast float64 and break gradcheck.
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    nll = F.cross_entropy(
        logits.reshape(-1, logits.size(-1)), shift_labels.reshape(-1), ignore_index=ignore_index, reduction="none"
    )
    return nll.view(shift_labels.shape)[:, :-1]


def count_targets(
    labels: Tensor,
    rto_mask: Tensor,
    *,
    position_ids: Tensor | None = None,
    branch_ids: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """
    What one micro-batch adds to the denominators of its optimizer step.

    Args:
        labels: (B, S) final targets, not shifted; column 0 is never predicted and is not counted.
        rto_mask: (B, S) bool.
        position_ids: (B, S) for packed or padding-free batches, where a position of 0 begins a new sequence. None: each
            row of the batch is one sequence.
        branch_ids: (B, S) for the branch layout (`core.branch_layout`), with `position_ids`: each branch is a sequence,
            and a label belongs to that of the token before it, which predicts it.
        ignore_index: Label value without a target.

    Returns:
        (3,) int64: MLE targets, RTO targets, sequences with at least one target. Sum these over micro-batches and
        ranks, and give the sum to `derta_loss` for each of them.

    Raises:
        ValueError: If there are `branch_ids` without `position_ids`.
    """
    if branch_ids is not None and position_ids is None:
        raise ValueError("`branch_ids` needs `position_ids`: without them branches are not counted as sequences.")
    is_target = labels[:, 1:] != ignore_index
    is_rto = is_target & rto_mask[:, 1:].bool()
    if position_ids is None:
        sequences = is_target.any(dim=1).sum()
    else:
        # number the sequences 0, 1, ... over the whole batch, then see which of them hold a target
        starts = position_ids == 0
        starts[:, 0] = True
        branch_starts = torch.zeros_like(starts)
        if branch_ids is not None:
            branch_starts[:, 1:] = (branch_ids[:, 1:] != branch_ids[:, :-1]) & (branch_ids[:, 1:] != 0)
        numbers = (starts | branch_starts).flatten().cumsum(0).view_as(starts)
        # the label where a branch begins is the last one of the segment before it
        numbers = (numbers - branch_starts.long())[:, 1:]
        sequences = numbers[is_target].unique().numel()
        sequences = torch.as_tensor(sequences, device=labels.device)
    return torch.stack([is_target.sum() - is_rto.sum(), is_rto.sum(), sequences.to(torch.int64)])


@dataclass(frozen=True)
class DeRTaLoss:
    """
    The loss of one micro-batch, and the sums from which its components are logged.

    Attributes:
        loss: Scalar to back-propagate. Over the micro-batches and ranks of a step these *add up* to the step's loss.
        sums: (5,) detached, for adding up over micro-batches and ranks: MLE nats, RTO nats, MLE targets, RTO targets,
            probability of the refusal token summed over RTO targets. See `loss_components`.
    """

    loss: Tensor
    sums: Tensor


def derta_loss(
    per_token_nll: Tensor,
    target_mask: Tensor,
    rto_mask: Tensor,
    *,
    counts: Tensor | None = None,
    normalization: Normalization = "token_mean",
    rto_weight: float = 1.0,
) -> DeRTaLoss:
    r"""
    DeRTa's loss from per-token losses: the one function that every adapter calls.

    With S_A, S_B the summed nats of MLE and RTO targets, N_A, N_B their numbers, n the sequences, all over the whole
    optimizer step, and w = `rto_weight`:

    - `token_mean`: (S_A + w S_B) / (N_A + N_B), the authors' choice, taken over the step instead of the micro-batch;
    - `sequence_sum`: (S_A + w S_B) / n, Eq. 2 up to the constant factor between rows and triples;
    - `component_mean`: S_A / N_A + w S_B / N_B.

    Args:
        per_token_nll: (B, T) nats, from `per_token_nll` or a host's fused head (minus its log-probabilities).
        target_mask: (B, T) bool, true where `per_token_nll` has a target. Aligned with `per_token_nll`, so shifted.
        rto_mask: (B, T) bool, true on RTO targets. Shifted likewise.
        counts: (3,) from `count_targets`, summed over the step. None: this call is the whole step, each row a sequence.
        normalization: Denominator, see above.
        rto_weight: Weight w of RTO targets.

    Returns:
        `DeRTaLoss`. Its loss is zero and attached to the graph when there is no target.

    Raises:
        ValueError: If the shapes differ, or `normalization` is unknown.

    Source:
        Yuan et al. 2024, arXiv 2407.09121, Eq. 2. The authors' code divides by the targets of each micro-batch, which
        makes the gradient depend on how a step is split.
    """
    if not per_token_nll.shape == target_mask.shape == rto_mask.shape:
        raise ValueError(
            "`per_token_nll`, `target_mask` and `rto_mask` must have one shape (B, T), got "
            f"{tuple(per_token_nll.shape)}, {tuple(target_mask.shape)}, {tuple(rto_mask.shape)}."
        )
    if per_token_nll.dtype in (torch.bfloat16, torch.float16):
        per_token_nll = per_token_nll.float()
    target_mask = target_mask.bool()
    is_rto = target_mask & rto_mask.bool()
    nll = torch.where(target_mask, per_token_nll, torch.zeros_like(per_token_nll))
    rto_sum = torch.where(is_rto, nll, torch.zeros_like(nll)).sum()
    mle_sum = torch.where(is_rto, torch.zeros_like(nll), nll).sum()
    num_rto, num_targets = is_rto.sum(), target_mask.sum()
    if counts is None:
        counts = torch.stack([num_targets - num_rto, num_rto, target_mask.any(dim=1).sum()])
    mle_denominator, rto_denominator = _denominators(counts.to(nll.dtype), normalization)
    loss = mle_sum / mle_denominator + rto_weight * rto_sum / rto_denominator
    with torch.no_grad():
        p_refusal = torch.where(is_rto, (-nll).exp(), torch.zeros_like(nll)).sum()
        sums = torch.stack([mle_sum, rto_sum, (num_targets - num_rto).to(nll.dtype), num_rto.to(nll.dtype), p_refusal])
    return DeRTaLoss(loss, sums)


def token_weights(
    target_mask: Tensor,
    rto_mask: Tensor,
    *,
    counts: Tensor,
    normalization: Normalization = "token_mean",
    rto_weight: float = 1.0,
) -> Tensor:
    """
    What each target's loss is multiplied by, so that the sum over a batch is the loss of `derta_loss`: for heads that
    make their gradient while they score.

    Args:
        target_mask: (B, T) bool, as in `derta_loss`.
        rto_mask: (B, T) bool, as in `derta_loss`.
        counts: (3,) from `count_targets`, summed over the step.
        normalization: As in `derta_loss`.
        rto_weight: As in `derta_loss`.

    Returns:
        (B, T) float64 (float32 on MPS), zero where there is no target.

    Example:
        >>> weights = token_weights(torch.tensor([[True, True, False]]), torch.tensor([[False, True, False]]),
        ...                         counts=torch.tensor([3, 1, 2]), rto_weight=0.5)
        >>> weights.tolist()
        [[0.25, 0.125, 0.0]]
    """
    exact = torch.float32 if counts.device.type == "mps" else torch.float64  # which MPS has not
    mle_denominator, rto_denominator = _denominators(counts.to(exact), normalization)
    weights = torch.where(rto_mask.bool(), rto_weight / rto_denominator, 1 / mle_denominator)
    return torch.where(target_mask.bool(), weights, torch.zeros_like(weights))


def loss_components(sums: Tensor) -> dict[str, float]:
    """
    What to log, from `DeRTaLoss.sums` added up over micro-batches and ranks.

    Returns:
        `mle_loss`, `rto_loss` (nats per target), `mle_tokens`, `rto_tokens`, `p_refusal` (mean probability of the
        refusal token on RTO targets). A component without any target is left out: it has no mean.
    """
    mle_sum, rto_sum, mle_tokens, rto_tokens, p_refusal = sums.tolist()
    components = {"mle_tokens": mle_tokens, "rto_tokens": rto_tokens}
    if mle_tokens:
        components["mle_loss"] = mle_sum / mle_tokens
    if rto_tokens:
        components["rto_loss"] = rto_sum / rto_tokens
        components["p_refusal"] = p_refusal / rto_tokens
    return components


def fused_denominator(counts: Tensor, config: DeRTaConfig) -> Tensor:
    """
    The one number that the summed nats of a whole step are divided by, for hosts that compute the loss fused.

    Args:
        counts: (3,) from `count_targets`, summed over the step.
        config: Knobs.

    Raises:
        ConfigError: If the loss has two denominators or a weight, so that one number cannot give it.
    """
    if config.normalization == "component_mean" or config.rto_weight != 1.0:
        raise ConfigError(
            f"A fused loss weighs all targets alike, got normalization={config.normalization!r} and "
            f"rto_weight={config.rto_weight:g}. Turn the fused loss off, or take 'token_mean' or 'sequence_sum' with "
            "rto_weight=1."
        )
    return _denominators(counts, config.normalization)[0]


def _denominators(counts: Tensor, normalization: Normalization) -> tuple[Tensor, Tensor]:
    """Divisors of the MLE and of the RTO sum; at least 1, so that a step without one component divides by no zero."""
    mle_tokens, rto_tokens, sequences = counts.clamp(min=0).unbind()
    if normalization == "token_mean":
        total = (mle_tokens + rto_tokens).clamp(min=1)
        return total, total
    if normalization == "sequence_sum":
        return sequences.clamp(min=1), sequences.clamp(min=1)
    if normalization == "component_mean":
        return mle_tokens.clamp(min=1), rto_tokens.clamp(min=1)
    raise ValueError(
        f"`normalization` must be 'token_mean', 'sequence_sum' or 'component_mean', got {normalization!r}."
    )
