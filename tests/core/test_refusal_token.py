"""Which id "sorry" is, for tokenizers of every family, and what is said when it is not one id."""

import logging

import pytest

from derta_plugins.core.refusal_token import (
    RefusalToken,
    RefusalTokenError,
    auto_refusal_token,
    resolve_refusal_token,
    resolve_refusal_token_id,
    warn_if_rare,
)
from tests.conftest import SAFE, byte_level_bpe, metaspace_unigram, word_level

LOGGER = "derta_plugins.core.refusal_token"


def id_of(tokenizer, piece):
    token_id = tokenizer.convert_tokens_to_ids(piece)
    assert token_id is not None
    assert token_id != tokenizer.unk_token_id
    return token_id


def first_id_after_generation_prompt(tokenizer, text):
    """What a model has to generate first to answer with `text`."""
    conversation = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    prompt_ids, joint = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompt, prompt + text))
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
    """After "[/INST]" without a space a word has no marker; after one it has, as in the middle of an answer."""
    no_space = metaspace_unigram()
    token = resolve_refusal_token(no_space, "Sorry")
    assert (token.id, token.mid_answer_id) == (id_of(no_space, "Sorry"), id_of(no_space, "▁Sorry"))
    assert len(caplog.records) == 1

    caplog.clear()
    raw = metaspace_unigram()
    raw.chat_template = None  # the text then starts an input of its own, which is marked
    token = resolve_refusal_token(raw, "Sorry")
    assert token.id == token.mid_answer_id == id_of(raw, "▁Sorry")
    assert not caplog.records


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


def test_auto_does_not_mistake_a_blank_first_token():
    tokenizer = byte_level_bpe()
    token = auto_refusal_token(tokenizer, [id_of(tokenizer, "Ġ")])
    assert token == RefusalToken(id_of(tokenizer, "Ġ"), " ", None, 1.0)


def test_auto_needs_a_safe_response():
    with pytest.raises(RefusalTokenError, match=r"needs at least one safe response, got none\. Set refusal_text"):
        auto_refusal_token(byte_level_bpe(), [])


@pytest.mark.parametrize(
    ("share", "warns"), [(0.0, True), (0.25, True), (0.499, True), (0.5, False), (1.0, False), (None, False)]
)
def test_a_target_that_few_safe_responses_begin_with_is_warned_of(caplog, share, warns):
    warn_if_rare(RefusalToken(285, "Sorry", None, share))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * warns
    if warns:
        assert (
            f"Only {100 * share:.0f} % of the safe responses begin with the RTO target 'Sorry' (id 285)" in caplog.text
        )
        assert "refusal_text='auto'" in caplog.text
