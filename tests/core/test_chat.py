"""Records as token ids, with tokenizers like byte-level BPE, SentencePiece and WordPiece (`tests.conftest`)."""

import pytest
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from derta_plugins.core.chat import (
    AUTHORS_END_OF_TEXT,
    ChatTemplateError,
    RecordTokenizer,
    ResponseEncoder,
    as_messages,
    render_prompt,
    turn_layout,
)
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.records import AuthorsRow, BadRecordError, Triple
from tests.conftest import CHATML, HARMFUL, SAFE, byte_level_bpe, metaspace_unigram, word_level

Q = "How do I paint the castle wall ?"
TRIPLE = Triple(Q, SAFE, HARMFUL)
TURN = {"role": "user", "content": Q}
MULTI_TURN = (
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "First, do this."},
    {"role": "user", "content": "and more words"},
    {"role": "assistant", "content": HARMFUL},
    TURN,
)
MAKERS = {"byte-level BPE": byte_level_bpe, "metaspace": metaspace_unigram, "word level": word_level}
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
TRIMMING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
THINKING = CHATML.replace("{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}")
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(params=MAKERS, scope="module")
def tokenizer(request):
    return MAKERS[request.param]()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class SlowTokenizer:
    """A tokenizer without offsets, as `transformers.PreTrainedTokenizer` is one: same interface, same error."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, text, **options):
        if options.pop("return_offsets_mapping", False):
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers.")
        return self._tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


# --- prompt and responses --------------------------------------------------------------------------------------------


def test_ids_of_a_triple_are_those_that_inference_sees(tokenizer):
    """The prompt with the generation prompt, as the template renders them; then what it renders the answer to."""
    tokenized = RecordTokenizer(tokenizer).triple(TRIPLE)
    assert list(tokenized.prompt_ids) == ids_of(tokenizer, render_prompt(tokenizer, [TURN]))
    for response, response_ids in ((SAFE, tokenized.chosen_ids), (HARMFUL, tokenized.rejected_ids)):
        whole = tokenizer.apply_chat_template([TURN, {"role": "assistant", "content": response}], tokenize=False)
        ours = [*tokenized.prompt_ids, *response_ids]
        assert ours == ids_of(tokenizer, whole)[: len(ours)]
        assert tokenizer.decode(response_ids).strip() == tokenizer.decode(ids_of(tokenizer, response))
    assert list(tokenized.end_ids) == [tokenizer.eos_token_id]
    assert (tokenized.word_ends, tokenized.earlier_turns) == ((), ())


def test_messages_and_plain_text_give_the_same_ids(tokenizer):
    tokenize = RecordTokenizer(tokenizer)
    assert tokenize.triple(TRIPLE) == tokenize.triple(Triple((TURN,), SAFE, HARMFUL))


@pytest.mark.parametrize("maker", [*MAKERS, "byte-level BPE with special tokens"])
def test_the_prompt_ids_are_those_of_apply_chat_template_with_tokenize(maker):
    """A template prints its own start token; a second one must not come from the tokenizer."""
    tokenizer = MAKERS[maker]() if maker in MAKERS else with_special_tokens(byte_level_bpe())
    tokenized = RecordTokenizer(tokenizer, need_word_ends=True).triple(Triple(MULTI_TURN, SAFE, HARMFUL))
    encoded = tokenizer.apply_chat_template(list(MULTI_TURN), add_generation_prompt=True, return_dict=True)
    assert list(tokenized.prompt_ids) == encoded["input_ids"]
    assert tokenized.word_ends[-1] == len(tokenized.rejected_ids)


def test_raw_prompts_are_taken_as_they_are():
    tokenizer = with_special_tokens(byte_level_bpe(chat_template=None))
    tokenized = RecordTokenizer(tokenizer, apply_chat_template=False).triple(Triple(f"Q: {Q}\nA:", " " + SAFE, HARMFUL))
    bos, eos = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert list(tokenized.prompt_ids) == [bos, *ids_of(tokenizer, f"Q: {Q}\nA:")]
    assert list(tokenized.chosen_ids) == ids_of(tokenizer, " " + SAFE)
    assert tokenized.end_ids == (eos,)


def test_messages_take_the_template_even_when_plain_text_does_not():
    tokenizer = byte_level_bpe()
    raw = RecordTokenizer(tokenizer, apply_chat_template=False)
    assert raw.triple(Triple((TURN,), SAFE, HARMFUL)) == RecordTokenizer(tokenizer).triple(TRIPLE)
    assert raw.triple(TRIPLE).prompt_ids == tuple(ids_of(tokenizer, Q))


def with_special_tokens(tokenizer):
    """A tokenizer that puts a start and an end token around a text by itself, as Llama's and T5's do."""
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_end|>")],
    )
    return tokenizer


def test_an_end_token_that_the_tokenizer_adds_is_dropped_but_not_one_of_the_text():
    tokenizer = with_special_tokens(byte_level_bpe())
    bos, eos = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert tokenizer("Sorry")["input_ids"] == [bos, *ids_of(tokenizer, "Sorry"), eos]
    assert ResponseEncoder(tokenizer, add_special_tokens=True)("Sorry") == [bos, *ids_of(tokenizer, "Sorry")]
    assert ResponseEncoder(tokenizer, add_special_tokens=False)("Sorry") == ids_of(tokenizer, "Sorry")
    adds_nothing = ResponseEncoder(byte_level_bpe(), add_special_tokens=True)
    assert adds_nothing("Sorry<|im_end|>") == [*ids_of(tokenizer, "Sorry"), eos]


@pytest.mark.parametrize("prompt", ["Q: paint the", "paint the cas"], ids=["joint", "merges"])
def test_special_tokens_do_not_move_the_word_ends(prompt):
    tokenizer = with_special_tokens(byte_level_bpe(chat_template=None))
    tokenize = RecordTokenizer(tokenizer, apply_chat_template=False, need_word_ends=True)
    tokenized = tokenize.triple(Triple(prompt, SAFE, "tle wall" if prompt.endswith("cas") else " castle wall"))
    assert tokenizer.bos_token_id not in tokenized.rejected_ids
    prefixes = [tokenizer.decode(tokenized.rejected_ids[:end]) for end in tokenized.word_ends]
    assert prefixes == (["tle", "tle wall"] if prompt.endswith("cas") else [" castle", " castle wall"])
    assert tokenized.word_ends[-1] == len(tokenized.rejected_ids)


def test_a_response_that_merges_with_the_prompt_is_tokenised_alone():
    """The prompt's ids are what the model reads before it answers, whatever comes after."""
    tokenizer = byte_level_bpe()
    prompt, response = "paint the cas", "tle wall"
    assert ids_of(tokenizer, prompt + response)[: len(ids_of(tokenizer, prompt))] != ids_of(tokenizer, prompt)
    triple = Triple(prompt, "tle, no", response)
    tokenized = RecordTokenizer(tokenizer, apply_chat_template=False, need_word_ends=True).triple(triple)
    assert list(tokenized.prompt_ids) == ids_of(tokenizer, prompt)
    assert list(tokenized.rejected_ids) == ids_of(tokenizer, response)
    assert list(tokenized.chosen_ids) == ids_of(tokenizer, "tle, no")
    assert [tokenizer.decode(tokenized.rejected_ids[:end]) for end in tokenized.word_ends] == ["tle", "tle wall"]


def test_a_response_that_does_not_merge_keeps_the_ids_of_its_place():
    """Metaspace marks a word after a prompt's end differently from one at the start of a text."""
    tokenizer = metaspace_unigram()
    encode = ResponseEncoder(tokenizer, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(encode("Sorry")) == ["▁Sorry"]
    after = encode.after("castle:", encode("castle:"), "Sorry")
    assert tokenizer.convert_ids_to_tokens(after) == ["Sorry"]


@pytest.mark.parametrize("prompt", [Q, (TURN,), [TURN]], ids=["text", "tuple", "list"])
def test_as_messages(prompt):
    assert as_messages(prompt) == [TURN]


# --- word ends -------------------------------------------------------------------------------------------------------

TEXTS = [
    HARMFUL,
    "Step one: gather, then   pour\n\nthe moon-dust.\nDone!",
    "  leading and trailing white space  ",
    "Grüße 🏰 日本 done",
    "one",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("maker", [byte_level_bpe, word_level], ids=lambda maker: maker.__name__)
def test_word_prefixes_end_on_whole_words(maker, text):
    tokenizer = maker()
    tokenized = RecordTokenizer(tokenizer, need_word_ends=True).triple(Triple(Q, SAFE, text))
    words = text.split()
    assert len(tokenized.word_ends) == len(words)
    assert list(tokenized.word_ends) == sorted(set(tokenized.word_ends))
    assert tokenized.word_ends[-1] <= len(tokenized.rejected_ids)
    if maker is byte_level_bpe:
        prefixes = [tokenizer.decode(tokenized.rejected_ids[:end]).split() for end in tokenized.word_ends]
        assert prefixes == [words[: number + 1] for number in range(len(words))]
    else:  # unknown words and spaces are not decoded; count instead
        for number, end in enumerate(tokenized.word_ends):
            assert end == len(ids_of(tokenizer, " ".join(words[: number + 1])))


def test_word_prefixes_of_metaspace_end_on_whole_words():
    tokenizer = metaspace_unigram()
    tokenized = RecordTokenizer(tokenizer, need_word_ends=True).triple(TRIPLE)
    words = HARMFUL.split()
    pieces = tokenizer.convert_ids_to_tokens(tokenized.rejected_ids)
    assert len(tokenized.word_ends) == len(words)
    for end, following in zip(tokenized.word_ends, [*tokenized.word_ends[1:], None], strict=True):
        assert (end == len(pieces)) == (following is None)
        assert following is None or pieces[end].startswith("▁")


def test_a_token_that_spans_two_words_ends_none_of_them():
    """Tokenizers that merge across spaces exist; a prefix that stops inside such a token would split a word."""
    vocabulary = ["<unk>", "go", " to", " the w", "all", "."]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=0))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")
    tokenize = RecordTokenizer(fast, apply_chat_template=False, need_word_ends=True)
    tokenized = tokenize.triple(Triple("go", ".", " to the wall."))
    assert fast.convert_ids_to_tokens(tokenized.rejected_ids) == [" to", " the w", "all", "."]
    assert tokenized.word_ends == (1, 4)


def test_a_token_may_go_on_with_white_space_after_the_word_it_ends():
    """LLaMA-3 and Qwen have one token for a full stop and the line breaks after it."""
    vocabulary = ["<unk>", "go", " on", ".\n\n", "stop"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=0))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")
    tokenize = RecordTokenizer(fast, apply_chat_template=False, need_word_ends=True)
    tokenized = tokenize.triple(Triple("go", ".", " on.\n\nstop"))
    assert fast.convert_ids_to_tokens(tokenized.rejected_ids) == [" on", ".\n\n", "stop"]
    assert tokenized.word_ends == (2, 3)


def test_a_word_that_the_tokenizer_drops_ends_nothing():
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("🏰", "")
    tokenize = RecordTokenizer(tokenizer, need_word_ends=True)
    for text, words in (("the wall 🏰", ["the", "wall"]), ("the 🏰 wall", ["the", "wall"])):
        tokenized = tokenize.triple(Triple(Q, SAFE, text))
        decoded = [tokenizer.decode(tokenized.rejected_ids[:end]).split() for end in tokenized.word_ends]
        assert decoded == [words[: number + 1] for number in range(len(words))]


def test_word_ends_need_a_fast_tokenizer():
    slow = SlowTokenizer(byte_level_bpe())
    message = r"prefix_unit='word' needs a fast tokenizer, got SlowTokenizer\. Use prefix_unit='token'"
    with pytest.raises(ChatTemplateError, match=message):
        RecordTokenizer(slow, need_word_ends=True).triple(TRIPLE)
    assert RecordTokenizer(slow).triple(TRIPLE) == RecordTokenizer(byte_level_bpe()).triple(TRIPLE)


@pytest.mark.parametrize(
    ("knobs", "wanted"),
    [
        ({}, (True, False, False)),
        ({"apply_chat_template": False}, (False, False, False)),
        ({"prefix_unit": "word"}, (True, True, False)),
        ({"prefix_unit": "word", "method": "recaug"}, (True, True, False)),
        ({"prefix_unit": "word", "method": "vanilla"}, (True, False, False)),
        ({"rto_turns": "all"}, (True, False, True)),
        ({"rto_turns": "all", "method": "recaug"}, (True, False, False)),
    ],
    ids=str,
)
def test_a_config_asks_only_for_what_it_needs(knobs, wanted):
    made = RecordTokenizer.for_config("a tokenizer", DeRTaConfig(**knobs))
    assert (made.apply_chat_template, made.need_word_ends, made.need_earlier_turns) == wanted


# --- earlier turns ---------------------------------------------------------------------------------------------------


def with_spaces(messages):
    """The same conversation with white space around every answer."""
    return tuple({**m, "content": f" {m['content']} "} if m["role"] == "assistant" else m for m in messages)


@pytest.mark.parametrize("template", [CHATML, TRIMMING], ids=["as it is", "trimmed"])
@pytest.mark.parametrize("maker", [byte_level_bpe, word_level], ids=lambda maker: maker.__name__)
def test_earlier_turns_are_the_assistants_answers_with_the_slot_after_each(maker, template):
    tokenizer, messages = maker(chat_template=template), with_spaces(MULTI_TURN)
    tokenized = RecordTokenizer(tokenizer, need_earlier_turns=True).triple(Triple(messages, SAFE, HARMFUL))
    spans = [list(tokenized.prompt_ids[start:stop]) for start, stop in tokenized.earlier_turns]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if template is TRIMMING:
        answers = [answer.strip() for answer in answers]
    assert spans == [[*ids_of(tokenizer, answer), tokenizer.eos_token_id] for answer in answers]


def test_earlier_turns_of_llama_2_begin_with_the_marked_piece_that_the_model_generated():
    tokenizer = metaspace_unigram(chat_template=LLAMA_2)
    tokenized = RecordTokenizer(tokenizer, need_earlier_turns=True).triple(Triple(MULTI_TURN, SAFE, HARMFUL))
    spans = [tokenized.prompt_ids[start:stop] for start, stop in tokenized.earlier_turns]
    answers = [message["content"] for message in MULTI_TURN if message["role"] == "assistant"]
    assert [tokenizer.decode(span[:-1]).strip() for span in spans] == answers
    assert all(tokenizer.convert_ids_to_tokens(span[0]).startswith("▁") for span in spans)


def test_without_an_earlier_answer_there_is_no_span(tokenizer):
    tokenize = RecordTokenizer(tokenizer, need_earlier_turns=True)
    assert tokenize.triple(TRIPLE).earlier_turns == ()
    assert tokenize.triple(Triple((TURN, TURN), SAFE, HARMFUL)).earlier_turns == ()


def test_an_earlier_answer_that_the_template_leaves_out_is_refused():
    """Reasoning models' templates drop earlier thoughts; some drop or rewrite whole answers."""
    template = CHATML.replace(
        "{{ m.content }}", "{{ '...' if m.role == 'assistant' and not loop.last else m.content }}"
    )
    tokenize = RecordTokenizer(byte_level_bpe(chat_template=template), need_earlier_turns=True)
    with pytest.raises(BadRecordError, match=r"rto_turns='all' cannot find the answer of message 1") as caught:
        tokenize.triple(Triple(MULTI_TURN, SAFE, HARMFUL))
    assert caught.value.field == "prompt"


# --- layout of a turn ------------------------------------------------------------------------------------------------


def end_ids(tokenizer):
    return list(turn_layout(tokenizer).end_ids)


def test_end_of_turn_of_chatml_is_one_token_without_the_line_break():
    tokenizer = byte_level_bpe()
    assert end_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_end_of_turn_of_llama_2_is_the_end_token():
    tokenizer = metaspace_unigram(chat_template=LLAMA_2)
    assert end_ids(tokenizer) == [tokenizer.eos_token_id]


def test_end_of_turn_of_a_template_goes_before_the_tokenizers_end_token():
    """LLaMA-3's base tokenizer ends a text with another token than its template ends a turn with."""
    tokenizer = byte_level_bpe()
    tokenizer.eos_token = "<|endoftext|>"
    assert end_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert list(RecordTokenizer(tokenizer).triple(TRIPLE).end_ids) == end_ids(tokenizer)


def test_a_template_that_closes_with_nothing_takes_the_tokenizers_end_token():
    tokenizer = byte_level_bpe(chat_template=BARE)
    assert end_ids(tokenizer) == [tokenizer.eos_token_id]
    tokenizer = byte_level_bpe(chat_template=BARE.replace("{{ m.content }}", "{{ m.content }}\n"))
    assert end_ids(tokenizer) == [tokenizer.eos_token_id]


def test_an_end_of_turn_of_several_tokens_is_kept_whole():
    tokenizer = byte_level_bpe(chat_template=CHATML.replace("<|im_end|>\n", "<|im_end|><|pad|>\n"))
    assert tokenizer.convert_ids_to_tokens(end_ids(tokenizer)) == ["<|im_end|>", "<|pad|>"]


def test_no_end_at_all_is_refused():
    tokenizer = byte_level_bpe(chat_template=BARE)
    tokenizer.eos_token = None
    with pytest.raises(ChatTemplateError, match=r"Nothing ends an answer.*the model never learns to stop"):
        turn_layout(tokenizer)
    with pytest.raises(ChatTemplateError, match=r"Nothing ends an answer"):
        RecordTokenizer(tokenizer, apply_chat_template=False).triple(TRIPLE)


# template: context, lead, whether it trims, and how the answer "  Sorry " stands in it
LAYOUTS = {
    "ChatML": (CHATML, "", "", False, "  Sorry "),
    "ChatML that trims, as LLaMA-3": (TRIMMING, "", "", True, "Sorry"),
    "space before the answer, as Llama 2": (LLAMA_2, "", " ", False, " Sorry"),
    "empty thinking block, as Qwen 3": (THINKING, "<think>\n\n</think>\n\n", "", False, "  Sorry "),
    "another header than the generation prompt": (BARE, "", "", False, "  Sorry "),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_stands_around_an_answer(name):
    template, context, lead, trims, answer = LAYOUTS[name]
    tokenizer = (metaspace_unigram if template is LLAMA_2 else byte_level_bpe)(chat_template=template)
    layout = turn_layout(tokenizer)
    assert (layout.context, layout.lead, layout.trims) == (context, lead, trims)
    assert layout.answer("  Sorry ") == answer
    assert layout.answer("Sorry") == lead + "Sorry"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_triple_is_laid_out_as_the_template_lays_it_out(name):
    template, context, lead, _, _ = LAYOUTS[name]
    tokenizer = (metaspace_unigram if template is LLAMA_2 else byte_level_bpe)(chat_template=template)
    tokenized = RecordTokenizer(tokenizer).triple(TRIPLE)
    assert list(tokenized.prompt_ids) == ids_of(tokenizer, render_prompt(tokenizer, [TURN]) + context)
    joint = ids_of(tokenizer, render_prompt(tokenizer, [TURN]) + context + lead + SAFE)
    assert [*tokenized.prompt_ids, *tokenized.chosen_ids] == joint


# --- templates that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, ""], ids=repr)
def test_a_tokenizer_without_template_says_what_to_set(template):
    tokenizer = byte_level_bpe(chat_template=template)
    for call in (
        lambda: RecordTokenizer(tokenizer).triple(TRIPLE),
        lambda: render_prompt(tokenizer, [TURN]),
        lambda: turn_layout(tokenizer),
    ):
        with pytest.raises(
            ChatTemplateError, match=r"no chat template.*`chat_template_path`.*`apply_chat_template=False`"
        ):
            call()


def test_a_template_that_refuses_a_record_is_a_bad_record():
    tokenizer = metaspace_unigram(chat_template=LLAMA_2)
    system = {"role": "system", "content": "Be kind."}
    with pytest.raises(BadRecordError, match=r"chat template refuses it: System role not supported") as caught:
        RecordTokenizer(tokenizer).triple(Triple((system, TURN), SAFE, HARMFUL))
    assert caught.value.field == "prompt"
    assert "System role" in str(caught.value.__cause__)


def test_a_template_that_does_not_print_answers_is_refused():
    template = CHATML.replace("{{ m.content }}", "{{ '' if m.role == 'assistant' else m.content }}")
    with pytest.raises(ChatTemplateError, match=r"does not print the assistant's answer: '<\|im_start\|>user"):
        turn_layout(byte_level_bpe(chat_template=template))


# --- rows of the authors' file ---------------------------------------------------------------------------------------

PREFIX = f"[INST] {Q} [/INST] Step one:"


@pytest.mark.parametrize("end", ["", AUTHORS_END_OF_TEXT, "<|im_end|>"])
def test_an_authors_row_is_closed_by_the_tokenizers_end_token_once(end):
    """Their file has LLaMA-3's end token written out, which another tokenizer would read as eleven pieces of text."""
    tokenizer = byte_level_bpe()
    tokenized = RecordTokenizer(tokenizer).authors_row(AuthorsRow(PREFIX, f" {SAFE}{end}", "mle"))
    assert list(tokenized.prefix_ids) == ids_of(tokenizer, PREFIX)
    assert list(tokenized.text_ids) == [*ids_of(tokenizer, f" {SAFE}"), tokenizer.eos_token_id]
    assert not tokenized.is_rto


def test_an_authors_row_takes_the_tokenizers_own_start_token():
    tokenizer = with_special_tokens(byte_level_bpe())
    tokenized = RecordTokenizer(tokenizer).authors_row(AuthorsRow(PREFIX, f" {HARMFUL}", "rto"))
    bos, eos = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert list(tokenized.prefix_ids) == [bos, *ids_of(tokenizer, PREFIX)]
    assert list(tokenized.text_ids) == [*ids_of(tokenizer, f" {HARMFUL}"), eos]
    assert tokenized.is_rto


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_an_end_token_inside_the_text_stays(end):
    tokenizer = byte_level_bpe()
    row = AuthorsRow(PREFIX, f" Sorry<|im_end|> Sorry{end}", "mle")
    assert RecordTokenizer(tokenizer).authors_row(row).text_ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("text", ["<|im_end|>", f"  {AUTHORS_END_OF_TEXT}"])
def test_an_authors_row_of_an_end_token_alone_is_refused(text):
    with pytest.raises(BadRecordError, match=r"field `text`: is empty but for its end token"):
        RecordTokenizer(byte_level_bpe()).authors_row(AuthorsRow(PREFIX, text, "mle"))


def test_an_authors_row_needs_no_template_but_an_end_token():
    tokenizer = byte_level_bpe(chat_template=None)
    row = AuthorsRow(PREFIX, SAFE, "mle")
    assert RecordTokenizer(tokenizer).authors_row(row).text_ids[-1] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ChatTemplateError, match="Nothing ends an answer"):
        RecordTokenizer(tokenizer).authors_row(row)
