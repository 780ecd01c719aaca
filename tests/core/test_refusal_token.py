"""Which id "sorry" is, for tokenizers of every family, and what is said when it is not one id."""

import logging
from collections import Counter

import pytest

from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.refusal_token import (
    RefusalToken,
    RefusalTokenError,
    auto_refusal_token,
    resolve_refusal_token,
    resolve_refusal_token_id,
    resolve_target,
    warn_if_unfit,
)
from tests.conftest import SAFE, byte_level_bpe, metaspace_unigram, word_level

LOGGER = "derta_plugins.core.refusal_token"


def id_of(tokenizer, piece):
    token_id = tokenizer.convert_tokens_to_ids(piece)
    assert token_id is not None
    assert token_id != tokenizer.unk_token_id
    return token_id


def first_id_after_generation_prompt(tokenizer, text):
    """What a model has to generate first to answer with `text`, as the template renders that answer."""
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}]
    prompt = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    prompt_ids, joint = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompt, whole))
    assert joint[: len(prompt_ids)] == prompt_ids
    return joint[len(prompt_ids)]


@pytest.mark.parametrize("maker", [byte_level_bpe, metaspace_unigram, word_level], ids=lambda maker: maker.__name__)
def test_the_target_is_what_a_refusal_starts_with(maker):
    tokenizer = maker()
    token = resolve_refusal_token(tokenizer, "Sorry")
    assert token.id == first_id_after_generation_prompt(tokenizer, SAFE)
    assert token.text == tokenizer.decode([token.id])
    assert token.share is None
    assert resolve_refusal_token_id(tokenizer, "Sorry") == resolve_refusal_token_id(tokenizer) == token.id


def test_byte_level_bpe_has_two_ids_and_says_so(caplog):
    tokenizer = byte_level_bpe()
    token = resolve_refusal_token(tokenizer, "Sorry")
    start, middle = id_of(tokenizer, "Sorry"), id_of(tokenizer, "ĠSorry")
    assert start != middle
    assert token == RefusalToken(start, "Sorry", middle)
    (record,) = caplog.records
    assert (record.name, record.levelno) == (LOGGER, logging.WARNING)
    assert f"'Sorry' is id {start} ('Sorry') right after the generation prompt but id {middle} in" in record.message
    assert record.message.endswith(f"RTO uses id {start} everywhere, as safe responses begin with it.")


def test_one_id_everywhere_is_no_cause_for_a_warning(caplog):
    tokenizer = word_level()
    token = resolve_refusal_token(tokenizer, "Sorry")
    assert token.id == token.mid_answer_id == id_of(tokenizer, "Sorry")
    assert not caplog.records


def test_a_lower_casing_tokenizer_finds_the_word_in_any_case(caplog):
    tokenizer = word_level(lowercase=True)
    for text in ("Sorry", "sorry", "SORRY"):
        assert resolve_refusal_token(tokenizer, text) == RefusalToken(
            id_of(tokenizer, "sorry"), "sorry", id_of(tokenizer, "sorry")
        )
    assert not caplog.records


def test_metaspace_takes_the_marked_piece_only_where_a_refusal_starts_with_it(caplog):
    """After "[/INST] " a word has a marker, as in the middle of an answer; behind a header without a space, none."""
    tokenizer = metaspace_unigram()
    marked = id_of(tokenizer, "▁Sorry")
    assert resolve_refusal_token(tokenizer, "Sorry") == RefusalToken(marked, "Sorry", marked)
    tokenizer.chat_template = None  # the text then starts an input of its own, which is marked too
    assert resolve_refusal_token(tokenizer, "Sorry") == RefusalToken(marked, "Sorry", marked)
    assert not caplog.records

    no_space = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = no_space + "{% if add_generation_prompt %}assistant:{% endif %}"
    assert resolve_refusal_token(tokenizer, "Sorry") == RefusalToken(id_of(tokenizer, "Sorry"), "Sorry", marked)
    assert len(caplog.records) == 1


def test_the_target_stands_behind_what_a_template_puts_before_an_answer():
    """White space belongs to the answer's first token; other text, such as an empty thinking block, is context."""
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", "{{ ' ' }}{{ m.content }}")
    assert resolve_refusal_token_id(tokenizer, "Sorry") == id_of(tokenizer, "ĠSorry")

    tokenizer = metaspace_unigram()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] "
        "{% else %}note:{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    assert resolve_refusal_token_id(tokenizer, "Sorry") == id_of(tokenizer, "Sorry")


def test_several_pieces_are_listed_with_their_ids():
    tokenizer = byte_level_bpe()
    pieces = tokenizer("Unfortunately", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    listed = ", ".join(f"{piece} {tokenizer.decode([piece])!r}" for piece in pieces)
    with pytest.raises(RefusalTokenError) as caught:
        resolve_refusal_token(tokenizer, "Unfortunately")
    assert f"'Unfortunately' must be one token, got {len(pieces)}: {listed}. " in str(caught.value)
    assert "allow_first_piece=True" in str(caught.value)
    assert "refusal_text='auto'" in str(caught.value)


def test_the_first_of_several_pieces_on_request(caplog):
    tokenizer = byte_level_bpe()
    pieces = tokenizer("Unfortunately", add_special_tokens=False)["input_ids"]
    middle = tokenizer("this. Unfortunately", add_special_tokens=False)["input_ids"]
    token = resolve_refusal_token(tokenizer, "Unfortunately", allow_first_piece=True)
    assert token.id == resolve_refusal_token_id(tokenizer, "Unfortunately", allow_first_piece=True) == pieces[0]
    assert token.text == tokenizer.decode(pieces[:1])
    assert token.mid_answer_id in middle
    assert token.mid_answer_id != token.id
    assert caplog.records


def test_one_piece_at_the_start_and_several_in_the_middle(caplog):
    tokenizer = byte_level_bpe()
    token = resolve_refusal_token(tokenizer, "rst")
    assert token == RefusalToken(id_of(tokenizer, "rst"), "rst", None)
    assert "but several tokens in the middle of an answer" in caplog.text


def test_an_unknown_word_is_refused_even_if_the_first_piece_would_do():
    for allow_first_piece in (False, True):
        with pytest.raises(
            RefusalTokenError, match=r"'Pardon' is not in the tokenizer's vocabulary \(it reads as '\[UNK\]'\)"
        ):
            resolve_refusal_token(word_level(), "Pardon", allow_first_piece=allow_first_piece)


def test_text_without_a_token_is_refused():
    with pytest.raises(RefusalTokenError, match=r"must be one token, got 0: none"):
        resolve_refusal_token(word_level(), " ", allow_first_piece=True)


# --- auto ------------------------------------------------------------------------------------------------------------


def test_a_host_with_templates_of_its_own_says_how_an_answer_begins():
    tokenizer = byte_level_bpe()

    def encode_answer(text):
        return tokenizer(f" {text}")["input_ids"]

    token = resolve_refusal_token(tokenizer, "Sorry", encode_answer=encode_answer)
    assert (token.id, token.text) == (id_of(tokenizer, "ĠSorry"), " Sorry")
    config = DeRTaConfig(refusal_text="Sorry")
    assert resolve_target(tokenizer, config, Counter(), Counter(), encode_answer=encode_answer).id == token.id
    assert resolve_target(tokenizer, config, Counter(), Counter()).id == id_of(tokenizer, "Sorry")


def test_auto_takes_the_commonest_first_token_with_its_share():
    tokenizer = byte_level_bpe()
    sorry, step = id_of(tokenizer, "Sorry"), id_of(tokenizer, "Step")
    token = auto_refusal_token(tokenizer, iter([step, sorry, sorry, step, sorry]))
    assert token == RefusalToken(sorry, "Sorry", id_of(tokenizer, "ĠSorry"), 3 / 5)


@pytest.mark.parametrize("first_ids", [[9, 300, 9, 300], [300, 9, 300, 9], [300, 9, 9, 300]])
def test_auto_takes_the_smallest_id_among_equals(first_ids):
    """Not the first seen: the target must not depend on the order of the records."""
    token = auto_refusal_token(byte_level_bpe(), first_ids)
    assert (token.id, token.share) == (9, 0.5)


@pytest.mark.parametrize("piece", ["Ġ", "<|im_end|>"], ids=["blank", "special"])
def test_auto_refuses_a_first_token_that_is_no_word(piece):
    tokenizer = byte_level_bpe()
    with pytest.raises(RefusalTokenError, match=r"is no word: .*Set refusal_text to the first word"):
        auto_refusal_token(tokenizer, [id_of(tokenizer, piece)])


def test_auto_refuses_the_unknown_token():
    tokenizer = word_level()
    with pytest.raises(RefusalTokenError, match=r"'\[UNK\]'"):
        auto_refusal_token(tokenizer, [tokenizer.unk_token_id])


def test_auto_needs_a_safe_response():
    with pytest.raises(RefusalTokenError, match=r"needs at least one triple, got none .*Set refusal_text"):
        auto_refusal_token(byte_level_bpe(), [])


# --- the target of a run ---------------------------------------------------------------------------------------------


def target_of(knobs, chosen, rejected):
    tokenizer = byte_level_bpe()
    ids = [
        Counter({id_of(tokenizer, piece): count for piece, count in counts.items()}) for counts in (chosen, rejected)
    ]
    return resolve_target(tokenizer, DeRTaConfig(**knobs), *ids)


@pytest.mark.parametrize(("common", "rare"), [("Sorry", "Step"), ("Step", "Sorry")])
def test_auto_looks_at_safe_responses_alone(common, rare):
    target = target_of({}, {common: 3, rare: 1}, {rare: 9, common: 1})
    assert (target.text, target.share, target.share_of_harmful) == (common, 0.75, 0.1)


def test_a_named_text_goes_before_the_commonest():
    target = target_of({"refusal_text": "Sorry"}, {"Sorry": 1, "Step": 3}, {"Step": 1})
    assert (target.text, target.share, target.share_of_harmful) == ("Sorry", 0.25, 0.0)


def test_a_named_text_needs_no_triple_and_knows_no_share():
    target = target_of({"refusal_text": "Sorry"}, {}, {})
    assert (target.text, target.share, target.share_of_harmful) == ("Sorry", None, None)
    with pytest.raises(RefusalTokenError, match=r"needs at least one triple"):
        target_of({}, {}, {"Step": 1})


def test_the_first_piece_on_request_of_the_config():
    with pytest.raises(RefusalTokenError, match=r"must be one token"):
        target_of({"refusal_text": "Unfortunately"}, {}, {})
    target = target_of({"refusal_text": "Unfortunately", "allow_first_piece": True}, {}, {})
    assert "Unfortunately".startswith(target.text)


@pytest.mark.parametrize(
    ("share", "warns"), [(0.0, True), (0.25, True), (0.499, True), (0.5, False), (1.0, False), (None, False)]
)
def test_a_target_that_few_safe_responses_begin_with_is_warned_of(caplog, share, warns):
    warn_if_unfit(RefusalToken(285, "Sorry", None, share))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warns
    if warns:
        assert (
            f"Only {100 * share:.0f} % of the safe responses begin with the RTO target 'Sorry' (id 285)" in caplog.text
        )
        assert "refusal_text='auto'" in caplog.text


@pytest.mark.parametrize(("share", "warns"), [(0.0, False), (0.5, False), (0.501, True), (1.0, True), (None, False)])
def test_a_target_that_most_harmful_responses_begin_with_is_warned_of(caplog, share, warns):
    warn_if_unfit(RefusalToken(285, "<", None, 1.0, share))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warns
    if warns:
        assert f"{100 * share:.0f} % of the harmful responses begin with the RTO target '<' (id 285) too" in caplog.text
        assert "take common markup off both sides" in caplog.text
