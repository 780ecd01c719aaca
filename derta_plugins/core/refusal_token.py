"""The refusal token ("sorry" in Eq. 2): which id it is for a tokenizer. Never a literal."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from derta_plugins.core.chat import ResponseEncoder, render_prompt, turn_layout

if TYPE_CHECKING:
    from derta_plugins.core.config import DeRTaConfig

logger = logging.getLogger(__name__)

AUTO = "auto"
_MIDDLE_OF_AN_ANSWER = "First, do this."


class RefusalTokenError(ValueError):
    """The refusal text is not one token of the tokenizer."""


@dataclass(frozen=True)
class RefusalToken:
    """
    The target of RTO.

    Attributes:
        id: The target: the id that a refusal starts with right after the generation prompt. Safe responses are
            tokenised there, so that RTO asks for the very token that the prefix rows go on from.
        text: What that id reads as.
        mid_answer_id: The id that the same text has in the middle of an answer, after a space; None if it is several
            there. Byte-level BPE gives another id than `id`, SentencePiece and WordPiece mostly the same.
        share: Share of the safe responses seen that begin with `id`; None where none were looked at.
        share_of_harmful: The same of the harmful responses.
    """

    id: int
    text: str
    mid_answer_id: int | None
    share: float | None = None
    share_of_harmful: float | None = None


def resolve_refusal_token_id(tokenizer: Any, text: str = "Sorry", *, allow_first_piece: bool = False) -> int:
    """
    Id that a refusal beginning with `text` starts with; see `resolve_refusal_token`, which tells more.

    Source:
        Yuan et al. 2024, arXiv 2407.09121, Eq. 2; the authors' code holds the literal id of "Sorry" in LLaMA-3.
    """
    return resolve_refusal_token(tokenizer, text, allow_first_piece=allow_first_piece).id


def resolve_refusal_token(
    tokenizer: Any,
    text: str = "Sorry",
    *,
    allow_first_piece: bool = False,
    encode_answer: Callable[[str], list[int]] | None = None,
) -> RefusalToken:
    """
    The refusal token that `text` names, for byte-level BPE, SentencePiece and WordPiece tokenizers alike.

    Args:
        tokenizer: A `transformers` tokenizer. Its chat template, where it has one, decides what "right after the
            generation prompt" is.
        text: First word of a refusal.
        allow_first_piece: Take the first piece when `text` is several tokens.
        encode_answer: Ids of an answer right after the generation prompt, for hosts with templates of their own; None
            takes the tokenizer's chat template.

    Raises:
        RefusalTokenError: If `text` is several tokens (the pieces are listed) or unknown to the tokenizer.
    """
    pieces = encode_answer(text) if encode_answer else _pieces_at_start(tokenizer, text)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in pieces[:1]:
        raise RefusalTokenError(
            f"The refusal text {text!r} is not in the tokenizer's vocabulary (it reads as {tokenizer.unk_token!r}). "
            "Take the first word of your safe responses, or refusal_text='auto'."
        )
    if not pieces or (len(pieces) > 1 and not allow_first_piece):
        shown = ", ".join(f"{piece} {tokenizer.decode([piece])!r}" for piece in pieces)
        raise RefusalTokenError(
            f"The refusal text {text!r} must be one token, got {len(pieces)}: {shown or 'none'}. Take a word that is "
            "one token, allow_first_piece=True for the first of these, or refusal_text='auto'."
        )
    middle = _pieces_mid_answer(tokenizer, text)
    mid_answer_id = middle[0] if len(middle) == 1 or (middle and allow_first_piece) else None
    token = RefusalToken(pieces[0], tokenizer.decode([pieces[0]]), mid_answer_id)
    if mid_answer_id != token.id:
        _warn_of_two_ids(tokenizer, text, token)
    return token


def auto_refusal_token(tokenizer: Any, first_ids: Iterable[int]) -> RefusalToken:
    """
    The commonest first token of the safe responses, with its share; the smallest id among equals.

    Raises:
        RefusalTokenError: If there is no safe response.
    """
    counts = Counter(first_ids)
    if not counts:
        raise RefusalTokenError(
            "refusal_text='auto' needs at least one triple, got none (the authors' prefix / text / safe rows do not "
            "tell safe responses from helpful ones). Set refusal_text to the first word of your refusals."
        )
    chosen, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    text = tokenizer.decode([chosen])
    if chosen in tokenizer.all_special_ids or not text.strip():
        raise RefusalTokenError(
            f"Most safe responses begin with {tokenizer.convert_ids_to_tokens(chosen)!r} (id {chosen}), which is no "
            "word: a special or unknown token, or white space. Set refusal_text to the first word of your refusals."
        )
    middle = _pieces_mid_answer(tokenizer, text.strip()) if text.strip() else []
    return RefusalToken(chosen, text, middle[0] if len(middle) == 1 else None, count / counts.total())


def resolve_target(
    tokenizer: Any,
    config: DeRTaConfig,
    chosen_first_ids: Counter[int],
    rejected_first_ids: Counter[int],
    *,
    encode_answer: Callable[[str], list[int]] | None = None,
) -> RefusalToken:
    """
    The RTO target of a run: what `refusal_text` names, or the commonest first token of the safe responses for `auto`.

    Args:
        tokenizer: The run's tokenizer.
        config: Knobs.
        chosen_first_ids: First tokens of the triples' safe responses. The authors' training rows do not count: their
            MLE rows may be helpful ones.
        rejected_first_ids: The same of the harmful responses.
        encode_answer: See `resolve_refusal_token`.

    Raises:
        RefusalTokenError: If `refusal_text` is not one token, or is `auto` and there is no triple.
    """
    if config.refusal_text == AUTO:
        token = auto_refusal_token(tokenizer, chosen_first_ids.elements())
    else:
        token = resolve_refusal_token(
            tokenizer, config.refusal_text, allow_first_piece=config.allow_first_piece, encode_answer=encode_answer
        )
    return replace(
        token, share=_share(token.id, chosen_first_ids), share_of_harmful=_share(token.id, rejected_first_ids)
    )


def _share(token_id: int, first_ids: Counter[int]) -> float | None:
    return first_ids[token_id] / first_ids.total() if first_ids else None


def warn_if_unfit(token: RefusalToken) -> None:
    """
    Warn of an RTO target that trains malformed refusals: fewer than half of the safe responses begin with it, or more
    than half of the harmful ones do too (common markup, say), so that it breaks nothing off.
    """
    if token.share is not None and token.share < 0.5:
        logger.warning(
            "Only %.0f %% of the safe responses begin with the RTO target %r (id %d): the model learns to break off "
            "with a token that no refusal goes on from. Set refusal_text='auto', or rewrite the safe responses to "
            "begin alike.",
            100 * token.share,
            token.text,
            token.id,
        )
    if token.share_of_harmful is not None and token.share_of_harmful > 0.5:
        logger.warning(
            "%.0f %% of the harmful responses begin with the RTO target %r (id %d) too: it does not tell a refusal "
            "from an answer. Set refusal_text to the first word of your refusals, and take common markup off both "
            "sides.",
            100 * token.share_of_harmful,
            token.text,
            token.id,
        )


def _pieces_at_start(tokenizer: Any, text: str) -> list[int]:
    encode = ResponseEncoder(tokenizer, add_special_tokens=False)
    if getattr(tokenizer, "chat_template", None):
        layout = turn_layout(tokenizer)
        prompt = render_prompt(tokenizer, [{"role": "user", "content": "Hello"}]) + layout.context
        return encode.after(prompt, encode(prompt), layout.answer(text))
    return encode(text)


def _pieces_mid_answer(tokenizer: Any, text: str) -> list[int]:
    encode = ResponseEncoder(tokenizer, add_special_tokens=False)
    before, joint = encode(_MIDDLE_OF_AN_ANSWER), encode(f"{_MIDDLE_OF_AN_ANSWER} {text}")
    return joint[len(before) :] if joint[: len(before)] == before else []


def _warn_of_two_ids(tokenizer: Any, text: str, token: RefusalToken) -> None:
    middle = "several tokens" if token.mid_answer_id is None else f"id {token.mid_answer_id}"
    logger.warning(
        "The refusal text %r is id %d (%r) right after the generation prompt but %s in the middle of an answer. RTO "
        "uses id %d everywhere, as safe responses begin with it.",
        text,
        token.id,
        token.text,
        middle,
        token.id,
    )
