"""Batched greedy decoding with a key-value cache and left padding. Shape letters: B batch, S sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Generated:
    """Token ids written after one prompt, without the end token; `ended` is False if the limit cut them off."""

    ids: list[int]
    ended: bool


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    batch_size: int = 256,
) -> list[Generated]:
    """
    Continue every prompt with the most probable token until the end token or `max_new_tokens`.

    Args:
        model: A causal language model whose forward returns `logits` and `past_key_values`. Left in its mode.
        prompts: Token ids, none empty. Prompts of any length may be mixed.
        max_new_tokens: Most tokens written per prompt, the end token included.
        eos_token_id: The token that ends a turn.
        pad_token_id: The token that fills shorter prompts on the left; never attended to.
        batch_size: Prompts decoded together.

    Returns:
        One result per prompt, in the order of `prompts`.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[Generated | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            written = _greedy_ids(
                model,
                [prompts[i] for i in chosen],
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
            )
            for i, ids in zip(chosen, written, strict=True):
                results[i] = _cut_at_end(ids, eos_token_id=eos_token_id)
    finally:
        model.train(was_training)
    return results


@torch.inference_mode()
def _greedy_ids(model, prompts, *, max_new_tokens: int, eos_token_id: int, pad_token_id: int) -> list[list[int]]:
    input_ids, attention_mask = _left_pad(prompts, pad_token_id=pad_token_id, device=next(model.parameters()).device)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=input_ids.device)
    cache, written = None, []
    for _ in range(max_new_tokens):
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        next_ids = output.logits[:, -1].argmax(dim=-1).masked_fill(finished, eos_token_id)
        written.append(next_ids)
        finished |= next_ids == eos_token_id
        if bool(finished.all()):
            break
        input_ids = next_ids[:, None]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return torch.stack(written, dim=1).tolist()


def _left_pad(prompts, *, pad_token_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, each (B, S), with every prompt ending in the last column."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        attention_mask[row, length - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _cut_at_end(ids: list[int], *, eos_token_id: int) -> Generated:
    if eos_token_id in ids:
        return Generated(ids[: ids.index(eos_token_id)], ended=True)
    return Generated(ids, ended=False)
