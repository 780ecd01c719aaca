"""Offline tokenizers and tiny random models, built here: no test downloads anything."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARMFUL = "Step one : gather the moon dust . Step two : pour the moon dust on the castle wall ."
SAFE = "Sorry , I will not help with the castle wall ."
CORPUS = [
    "Sorry, I will not help with that. I cannot do it. How do I paint the castle wall?",
    "Step one: gather the moon dust. Step two: pour the moon dust on the castle wall.",
    HARMFUL,
    SAFE,
    "system user assistant prompt answer words and more words, so that merges exist. Hello there, First, do this.",
    " Sorry Sorry Sorry Sorry Sorry Step Step Step the the the the castle castle wall wall",
]


def byte_level_bpe(vocab_size: int = 420, chat_template: str | None = CHATML):
    """Byte-level BPE as GPT-2, Llama 3 and Qwen use it: a word after a space has another id than at a start."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Sorry\n", "\nSorry", *CORPUS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token=None, pad_token="<|pad|>"
    )
    fast.chat_template = chat_template
    return fast


def metaspace_unigram(chat_template: str | None = None):
    """SentencePiece-like tokenizer: a leading marker on each word, as Llama 2 and Mistral have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.pad_token = "</s>"
    fast.chat_template = chat_template or (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    return fast


def word_level(lowercase: bool = False, chat_template: str | None = CHATML):
    """WordPiece-like tokenizer whose words have one id wherever they stand."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    special = ["[UNK]", "[PAD]", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    return fast


def tiny_llama(vocab_size: int, seed: int = 0, **overrides):
    """Random Llama of two small layers, float32, on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "attention_dropout": 0.0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).float()


def safety_records(count: int, *, conversational: bool = False) -> list[dict]:
    """Harmless stand-ins for safety triples, of different lengths."""
    records = []
    for number in range(count):
        prompt, tail = f"How do I paint the castle wall {'again ' * (number % 4)}?", " moon dust" * (number % 5)
        if conversational:
            records.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": SAFE}],
                    "rejected": [{"role": "assistant", "content": HARMFUL + tail}],
                }
            )
        else:
            records.append({"prompt": prompt, "chosen": SAFE, "rejected": HARMFUL + tail})
    return records


def helpful_records(count: int) -> list[dict]:
    """Ordinary conversational rows."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Hello there {'more ' * (number % 3)}"},
                {"role": "assistant", "content": f"answer words {'and more ' * (number % 6)}"},
            ]
        }
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def bpe_tokenizer():
    return byte_level_bpe()


@pytest.fixture(scope="session")
def word_tokenizer():
    return word_level()


@pytest.fixture
def user_folder(tmp_path):
    """A model with its tokenizer and record files on disk, under the names that the README uses."""
    from datasets import Dataset

    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(tmp_path / "my-model")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "my-model")
    Dataset.from_list(safety_records(6)).to_json(tmp_path / "triples.jsonl")
    Dataset.from_list(helpful_records(8)).to_json(tmp_path / "helpful.jsonl")
    return tmp_path
