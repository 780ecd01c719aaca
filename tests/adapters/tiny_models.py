"""Tiny random models of several families in float64, with what transformers fixes to float32 left in float64."""

from __future__ import annotations

from contextlib import contextmanager
from statistics import mean

import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from derta_plugins.adapters.branch_model import SEGMENTS

VOCABULARY = 60
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
BOTH = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": LlamaConfig(**SIZE),
    "qwen2": Qwen2Config(**SIZE),
    "qwen3": Qwen3Config(**SIZE),
    "mistral": MistralConfig(**SIZE, sliding_window=8),
    "gemma3": Gemma3TextConfig(**SIZE, **BOTH),
    "gemma2": Gemma2Config(**SIZE, **BOTH),
}

WAYS = {family: ["dense"] if family == "gemma2" else ["segments", "dense"] for family in FAMILIES}


def tiny_model(family: str, *, attention: str = "eager", seed: int = 0):
    """A random float64 model in training mode, whose logits depend on their context."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=attention).double()
    for parameter in model.parameters():  # the initial weights are so small that attention hardly matters
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
    return model.train()


def losses_of_logits(model, rows) -> dict[str, float]:
    """What DeRTa logs of rows, from the logits of each alone; virtual tokens may stand before those of a row."""
    nll, hits = {True: [], False: []}, []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, -len(row["labels"]) :]
        for place, label in enumerate(row["labels"]):
            if place and label != -100:
                is_rto = bool(row["rto_mask"] and row["rto_mask"][place])
                nll[is_rto].append(-logits[place - 1].log_softmax(dim=-1)[label].item())
                hits.append(logits[place - 1].argmax().item() == label)
    return {"mle_loss": mean(nll[False]), "rto_loss": mean(nll[True]), "mean_token_accuracy": mean(hits)}


def plain_flex_attention(monkeypatch) -> None:
    """
    FlexAttention on a CPU: it refuses to differentiate there, and wants a compiler; without one it is plain torch.
    """
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *args: None)
    monkeypatch.setattr("transformers.integrations.flex_attention.WrappedFlexAttention", Uncompiled)


def forget_branches(monkeypatch) -> None:
    """What another tool's attention would do: plain causal attention over the whole row."""
    causal = AttentionInterface()["sdpa"]
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        SEGMENTS,
        lambda module, query, key, value, mask, **options: causal(module, query, key, value, None, **options),
    )


class Uncompiled:
    """Stands for the singleton of transformers, which compiles."""

    def __init__(self, *args):
        pass

    def __call__(self):
        return flex_attention


@contextmanager
def all_in_float64():
    """
    Make float32 mean float64 while a model runs: norms, rotary tables and softmax of transformers upcast to float32 by
    name, which would be a downcast here.
    """
    to_float, cast, single = torch.Tensor.float, torch.Tensor.to, torch.float32
    softmax = torch.nn.functional.softmax

    def widened(tensor, *args, **kwargs):
        args = tuple(torch.float64 if value is single else value for value in args)
        kwargs = {name: torch.float64 if value is single else value for name, value in kwargs.items()}
        return cast(tensor, *args, **kwargs)

    def wide_softmax(*args, **kwargs):
        kwargs = {name: torch.float64 if value is single else value for name, value in kwargs.items()}
        return softmax(*args, **kwargs)

    torch.Tensor.float, torch.Tensor.to, torch.nn.functional.softmax = torch.Tensor.double, widened, wide_softmax
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to, torch.nn.functional.softmax = to_float, cast, softmax
