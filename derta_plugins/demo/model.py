"""The demo's language model: a word-level tokenizer with a chat template, and a Llama of about 380 thousand weights."""

from typing import TYPE_CHECKING

import torch

from derta_plugins.demo.attacks import AttackInput
from derta_plugins.demo.world import vocabulary

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_SPECIAL_TOKENS = ("<pad>", "<s>", "<end>", "<user>", "<assistant>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for turn in messages %}{{ ' <' + turn['role'] + '> ' + turn['content'] + ' ' + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)
MAX_LENGTH = 128


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer with one token per word of the world, padding on the right, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((*_SPECIAL_TOKENS, "<unk>", *vocabulary()))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        model_max_length=MAX_LENGTH,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: "PreTrainedTokenizerFast", *, seed: int, device: str) -> "LlamaForCausalLM":
    """An untrained Llama (3 layers, width 96, 4 heads) for the vocabulary of `tokenizer`, in float32 on `device`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        # wider than the usual 0.02, which suits far wider models: this one learns the look-ups in half the steps
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device)


def copy_model(model: "LlamaForCausalLM") -> "LlamaForCausalLM":
    """
    A model of its own with the weights of `model`.

    Not `copy.deepcopy`: TRL puts a wrapped `forward` on the instances it trains, and a copy of that wrapper would run
    the weights of the original.
    """
    with torch.random.fork_rng():
        copy = type(model)(model.config).to(model.device)
    copy.load_state_dict(model.state_dict())
    return copy


def encode_chat(tokenizer: "PreTrainedTokenizerFast", user: str) -> list[int]:
    """Ids of a chat in which the assistant is to answer `user`."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_words(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """
    Ids of the words of `text`, nothing added.

    Raises:
        ValueError: If a word is not in the vocabulary.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"a word of {text!r} is not in the vocabulary of the demo")
    return ids


def encode_attack(tokenizer: "PreTrainedTokenizerFast", attack: AttackInput) -> list[int]:
    """Ids the model continues under `attack`: the chat up to the assistant's turn, or raw text; then the prefill."""
    if attack.user is None:
        start = [tokenizer.bos_token_id, *encode_words(tokenizer, attack.opening)]
    else:
        start = encode_chat(tokenizer, attack.user)
    return start + encode_words(tokenizer, " ".join(attack.prefill))
