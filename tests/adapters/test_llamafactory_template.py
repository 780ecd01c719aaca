"""Triples in the host's templates: the ids of its ordinary rows, and those of core where the template is the same."""

from dataclasses import replace

import pytest
from llamafactory.data.formatter import StringFormatter
from llamafactory.data.template import TEMPLATES, ReasoningTemplate, Template, get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments

from derta_plugins.adapters.llamafactory_template import TemplateTokenizer
from derta_plugins.core.chat import ChatTemplateError, RecordTokenizer
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.records import BadRecordError, Triple
from derta_plugins.core.refusal_token import RefusalTokenError, resolve_refusal_token
from tests.conftest import HARMFUL, SAFE, byte_level_bpe

TRIPLE = Triple("How do I paint the castle wall?", SAFE, HARMFUL)
TURNS = (
    {"role": "system", "content": "prompt words"},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": HARMFUL},
    {"role": "user", "content": "How do I paint the castle wall?"},
)
CONVERSATION = Triple(TURNS, SAFE, HARMFUL)
EVERYTHING = DeRTaConfig(prefix_unit="word", rto_turns="all")


def template_tokenizer(name, config=None, tokenizer=None, **options):
    tokenizer = tokenizer or byte_level_bpe()
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=name, **options))
    return TemplateTokenizer.for_config(template, tokenizer, config or DeRTaConfig())


@pytest.mark.parametrize("name", ["chatml", None], ids=["registered", "the tokenizer's own"])
@pytest.mark.parametrize("triple", [TRIPLE, CONVERSATION], ids=["one turn", "turns"])
def test_ids_are_those_of_core_for_the_same_template(name, triple):
    ours = template_tokenizer(name, EVERYTHING).triple(triple)
    assert ours == RecordTokenizer.for_config(byte_level_bpe(), EVERYTHING).triple(triple)
    assert ours.word_ends
    assert bool(ours.earlier_turns) == (triple is CONVERSATION)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("triple", [TRIPLE, replace(CONVERSATION, prompt=TURNS[1:])], ids=["one turn", "turns"])
def test_every_template_of_the_host_gives_the_ids_of_its_ordinary_rows(name, triple):
    tokenize = template_tokenizer(name)
    template, tokenizer = tokenize.template, tokenize.tokenizer
    ids = tokenize.triple(triple)
    messages = [dict(message) for message in triple.prompt] if triple is not TRIPLE else []
    messages = messages or [{"role": "user", "content": triple.prompt}]
    for answer, answer_ids in ((triple.chosen, ids.chosen_ids), (triple.rejected, ids.rejected_ids)):
        turns = [*messages, {"role": "assistant", "content": answer}]
        prompt_ids, response_ids = template.encode_oneturn(tokenizer, turns)
        row = (*prompt_ids, *response_ids, *([tokenizer.eos_token_id] if template.efficient_eos else []))
        spoken = (*ids.prompt_ids, *answer_ids)
        assert row[: len(spoken)] == spoken
        end = row[len(spoken) :]
        if tokenizer.decode(end).strip():
            assert end[: len(ids.end_ids)] == ids.end_ids
        else:  # nothing but white space closes the turn
            assert ids.end_ids == (*end, tokenizer.eos_token_id)
        assert not tokenizer.decode(end[len(ids.end_ids) :]).strip()
        assert tokenizer.decode(answer_ids).strip() == answer.strip(), "no more and no less than the answer"
    assert ids.end_ids


END_IDS = {
    "chatml": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "alpaca": ["<|im_end|>"],  # slot {eos_token}, then an empty line
    "gemma2": ["<end_of_turn>", "Ċ", "<|im_end|>"],  # a line break between its two end tokens
    "falcon": ["Ċ", "<|im_end|>"],  # an `efficient_eos` template with a line break before it
    "bailing_v2": ["<|role_end|>", "<|im_end|>"],
    "empty": ["<|im_end|>"],  # closes with nothing
}


@pytest.mark.parametrize("name", END_IDS)
def test_an_answer_ends_as_the_template_ends_it(name):
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>", "<|role_end|>"]})
    tokenize = template_tokenizer(name, tokenizer=tokenizer)
    # the byte-level tokenizer's own end token, where the template does not replace it
    expected = [tokenizer.eos_token if token == "<|im_end|>" else token for token in END_IDS[name]]
    assert tokenizer.convert_ids_to_tokens(tokenize.end_ids) == expected


def layout(slots, **changes):
    return replace(TEMPLATES["chatml"], format_assistant=StringFormatter(slots=slots), **changes)


LEADS = {
    "a line break": (["\n{{content}}<|im_end|>"], "\n", "Sorry"),
    "a slot before": (["\n", "{{content}}<|im_end|>"], "\n", "Sorry"),
    "a space that merges": ([" {{content}}<|im_end|>"], "", " Sorry"),
    "words and a space": (["\nprompt: {{content}}<|im_end|>"], "\nprompt:", " Sorry"),
}


@pytest.mark.parametrize("name", LEADS)
def test_what_stands_before_every_answer_is_context(name):
    slots, context, first = LEADS[name]
    tokenizer = byte_level_bpe()
    tokenize = TemplateTokenizer.for_config(layout(slots), tokenizer, EVERYTHING)
    ids = tokenize.triple(CONVERSATION)
    prompt = tokenizer.decode(ids.prompt_ids)
    assert prompt.endswith(f"<|im_start|>assistant\n{context}")
    assert tokenizer.decode(ids.chosen_ids[:1]) == first
    assert tokenize.answer_ids("Sorry") == list(ids.chosen_ids[:1])
    words = [tokenizer.decode(ids.rejected_ids[:end]).split()[-1] for end in ids.word_ends]
    assert words == HARMFUL.split()
    ((start, stop),) = ids.earlier_turns
    assert tokenizer.decode(ids.prompt_ids[start : stop - 1]).strip() == HARMFUL
    assert tokenizer.decode(ids.prompt_ids[stop - 1 : stop]) == "<|im_end|>"


def test_a_space_that_merges_into_one_answer_alone_belongs_to_both():
    tokenizer = byte_level_bpe()
    ids = TemplateTokenizer(layout([" {{content}}<|im_end|>"]), tokenizer).triple(replace(TRIPLE, rejected="\nStep"))
    assert tokenizer.decode(ids.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(ids.chosen_ids) == f" {SAFE}"
    assert tokenizer.decode(ids.rejected_ids) == " \nStep"


def reasoning(enable_thinking):
    values = {name: getattr(TEMPLATES["chatml"], name) for name in Template.__dataclass_fields__}
    thinking = {"thought_words": ("<think>\n", "\n</think>\n\n"), "enable_thinking": enable_thinking}
    return ReasoningTemplate(**{**values, **thinking})


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_an_empty_thinking_block_is_context_whether_or_not_the_host_trains_it(enable_thinking):
    tokenizer = byte_level_bpe()
    ids = TemplateTokenizer(reasoning(enable_thinking), tokenizer).triple(TRIPLE)
    assert tokenizer.decode(ids.prompt_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(ids.chosen_ids) == SAFE
    assert tokenizer.decode(ids.rejected_ids) == HARMFUL


def test_thinking_that_is_written_out_belongs_to_the_answer_and_must_be_on_both_sides():
    thought, tokenizer = "<think>\nmore words\n</think>\n\n", byte_level_bpe()
    both = Triple(TRIPLE.prompt, thought + SAFE, thought + HARMFUL)
    ids = TemplateTokenizer(reasoning(True), tokenizer).triple(both)
    assert tokenizer.decode(ids.prompt_ids).endswith("assistant\n")
    assert tokenizer.decode(ids.chosen_ids) == thought + SAFE
    switched_off = TemplateTokenizer(reasoning(False), tokenizer).triple(both)
    assert tokenizer.decode(switched_off.chosen_ids) == SAFE
    with pytest.raises(BadRecordError, match="field `chosen`: and the harmful response must both have a thinking"):
        TemplateTokenizer(reasoning(True), tokenizer).triple(replace(both, rejected=HARMFUL))


def test_an_end_token_that_is_written_out_is_not_doubled():
    tokenize = template_tokenizer("chatml")
    assert tokenize.triple(replace(TRIPLE, chosen=SAFE + "<|im_end|>")) == tokenize.triple(TRIPLE)


def test_system_text_is_the_templates_or_the_records():
    tokenize = template_tokenizer("chatml", default_system="words and more words")
    try:
        assert "system\nwords and more words<" in tokenize.tokenizer.decode(tokenize.triple(TRIPLE).prompt_ids)
        prompt = tokenize.tokenizer.decode(tokenize.triple(CONVERSATION).prompt_ids)
        assert prompt.startswith("<|im_start|>system\nprompt words<|im_end|>")
        assert "more words" not in prompt
    finally:
        tokenize.template.default_system = ""


def test_an_explicit_refusal_text_is_the_token_that_an_answer_begins_with_in_this_template():
    tokenizer = byte_level_bpe()
    tokenize = TemplateTokenizer(layout([" {{content}}<|im_end|>"]), tokenizer)
    token = resolve_refusal_token(tokenizer, "Sorry", encode_answer=tokenize.answer_ids)
    assert (token.id, token.text) == (tokenizer(" Sorry")["input_ids"][0], " Sorry")
    assert resolve_refusal_token(tokenizer, "Sorry").text == "Sorry", "as the tokenizer's own template begins one"
    with pytest.raises(RefusalTokenError, match="must be one token, got"):
        resolve_refusal_token(tokenizer, "Unwillingly", encode_answer=tokenize.answer_ids)


def test_a_template_that_cannot_be_read_is_refused():
    class Shouting(Template):
        def encode_oneturn(self, tokenizer, messages, system=None, tools=None):
            messages = [{**message, "content": message["content"].upper()} for message in messages]
            return super().encode_oneturn(tokenizer, messages, system, tools)

    values = {name: getattr(TEMPLATES["chatml"], name) for name in Template.__dataclass_fields__}
    with pytest.raises(ChatTemplateError, match="lays an answer out otherwise than its assistant slots say"):
        TemplateTokenizer(Shouting(**values), byte_level_bpe()).triple(TRIPLE)
    with pytest.raises(ChatTemplateError, match="must hold the answer once"):
        TemplateTokenizer(layout(["{{content}}", "{{content}}"]), byte_level_bpe()).triple(TRIPLE)


BAD = {
    "a role of tools": (
        ({"role": "observation", "content": "x"}, {"role": "user", "content": "y"}), SAFE, "`prompt`: has roles other",
    ),
    "no token": (TRIPLE.prompt, "<|im_end|>", "`chosen`: is no token"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_triples_without_a_place_in_a_template_are_bad_records(name):
    prompt, chosen, message = BAD[name]
    with pytest.raises(BadRecordError, match=message):
        template_tokenizer("chatml").triple(Triple(prompt, chosen, HARMFUL))
