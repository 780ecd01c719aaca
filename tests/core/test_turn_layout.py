"""What templates put between the generation prompt and an answer: it decides the first token of a refusal."""

import pytest

from derta_plugins.core.chat import RecordTokenizer, TurnLayout, turn_layout
from derta_plugins.core.records import Triple
from derta_plugins.core.refusal_token import resolve_refusal_token_id
from tests.conftest import CHATML, HARMFUL, SAFE, byte_level_bpe, metaspace_unigram

TRIMMING = CHATML.replace("m.content", "m.content | trim")
# An empty thinking block in front of the last answer, which the generation prompt does not hold (as Qwen 3 renders it).
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("tokenizer", "context", "lead", "trims"),
    [
        (byte_level_bpe(), "", "", False),
        (byte_level_bpe(chat_template=TRIMMING), "", "", True),
        (byte_level_bpe(chat_template=THINKING), "<think>\n\n</think>\n\n", "", False),
        (metaspace_unigram(), "", " ", False),
    ],
    ids=["chatml", "trimming", "thinking", "llama_2"],
)
def test_layouts(tokenizer, context, lead, trims):
    layout = turn_layout(tokenizer)
    assert layout == TurnLayout(context, lead, trims, (tokenizer.eos_token_id,))


def test_the_space_before_an_answer_belongs_to_its_first_token():
    """`[/INST] Sorry` is generated as one marked piece: a bare piece would be a token that no refusal begins with."""
    tokenizer = metaspace_unigram()
    triple = RecordTokenizer(tokenizer).triple(Triple("How do I paint the castle wall?", SAFE, HARMFUL))
    assert tokenizer.convert_ids_to_tokens(triple.chosen_ids[0]) == "▁Sorry"
    assert tokenizer.convert_ids_to_tokens(triple.rejected_ids[0]).startswith("▁")
    assert resolve_refusal_token_id(tokenizer) == triple.chosen_ids[0]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I paint the castle wall?"}, {"role": "assistant", "content": SAFE}],
        tokenize=False,
    )
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert whole[: len(triple.prompt_ids) + len(triple.chosen_ids)] == [*triple.prompt_ids, *triple.chosen_ids]


def test_an_empty_thinking_block_is_context_and_never_a_target():
    tokenizer = byte_level_bpe(chat_template=THINKING)
    triple = RecordTokenizer(tokenizer).triple(Triple("q", SAFE, HARMFUL))
    assert texts(tokenizer, triple.prompt_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert texts(tokenizer, triple.chosen_ids) == SAFE
    assert texts(tokenizer, triple.rejected_ids) == HARMFUL


@pytest.mark.parametrize(("template", "kept"), [(CHATML, f"  {SAFE}"), (TRIMMING, SAFE)], ids=["chatml", "trimming"])
def test_white_space_is_cut_where_the_template_cuts_it(template, kept):
    tokenizer = byte_level_bpe(chat_template=template)
    triple = RecordTokenizer(tokenizer).triple(Triple("q", f"  {SAFE}", HARMFUL))
    assert texts(tokenizer, triple.chosen_ids) == kept
