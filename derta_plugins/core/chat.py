"""
From text to token ids, the way inference will see them.

A response is what follows the generation prompt, so its ids are those that the tokenizer gives after the prompt's ids,
and a harmful prefix is a prefix of the harmful response's *ids*. Nothing is ever tokenised across the seam between a
prefix and the refusal after it: at inference the prefix was generated token by token.

The tokenizer is used through `__call__`, `apply_chat_template`, `chat_template` and `eos_token` alone (the interface of
`transformers.PreTrainedTokenizerBase`), so that this module needs no host.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from derta_plugins.core.records import AuthorsRow, BadRecordError, Message, Triple

if TYPE_CHECKING:
    from derta_plugins.core.config import DeRTaConfig

logger = logging.getLogger(__name__)

AUTHORS_END_OF_TEXT = "<|end_of_text|>"
"""What closes `text` in the authors' training file: LLaMA-3's end token, written out."""

_PROBE = "derta0probe"


class ChatTemplateError(ValueError):
    """The tokenizer cannot lay out a conversation."""


@dataclass(frozen=True)
class TokenizedTriple:
    """
    A triple as token ids.

    Attributes:
        prompt_ids: q with the template around it, up to and with the generation prompt.
        chosen_ids: Safe response r, as it follows `prompt_ids`.
        rejected_ids: Harmful response, as it follows `prompt_ids`.
        end_ids: What the template closes an assistant turn with (one id for most tokenizers).
        word_ends: Numbers of leading `rejected_ids` that end with a whole word, ascending; empty if not asked for.
        earlier_turns: Spans `[start, stop)` of `prompt_ids` that earlier assistant turns fill, their end-of-turn slot
            included; empty if not asked for.
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    word_ends: tuple[int, ...] = ()
    earlier_turns: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TokenizedAuthorsRow:
    """An authors' row as token ids: `prefix_ids` are context, `text_ids` (its end token included) are trained."""

    prefix_ids: tuple[int, ...]
    text_ids: tuple[int, ...]
    is_rto: bool


@dataclass(frozen=True)
class RecordTokenizer:
    """
    Turns parsed records into token ids with one tokenizer.

    Attributes:
        tokenizer: A `transformers` tokenizer, or anything with its interface.
        apply_chat_template: Put a plain-text prompt into the chat template as one user turn. Messages always need the
            template.
        need_word_ends: Fill `TokenizedTriple.word_ends`; needs a fast tokenizer.
        need_earlier_turns: Fill `TokenizedTriple.earlier_turns`.

    Raises:
        ChatTemplateError: If the tokenizer has no chat template, no end-of-turn, or (word ends) no offsets.
        BadRecordError: If the template refuses a prompt, or an earlier turn cannot be found in what it renders.
    """

    tokenizer: Any
    apply_chat_template: bool = True
    need_word_ends: bool = False
    need_earlier_turns: bool = False

    @classmethod
    def for_config(cls, tokenizer: Any, config: DeRTaConfig) -> RecordTokenizer:
        """Build the one that `config` needs."""
        is_derta = config.method == "derta"
        return cls(
            tokenizer,
            apply_chat_template=config.apply_chat_template,
            need_word_ends=config.prefix_unit == "word" and config.method != "vanilla",
            need_earlier_turns=config.rto_turns == "all" and is_derta,
        )

    @cached_property
    def _layout(self) -> TurnLayout:
        return turn_layout(self.tokenizer)

    def triple(self, triple: Triple) -> TokenizedTriple:
        """Token ids of a triple."""
        templated = self.apply_chat_template or not isinstance(triple.prompt, str)
        messages = as_messages(triple.prompt) if templated else []
        text = str(triple.prompt)
        chosen, rejected = (self._without_end(answer) for answer in (triple.chosen, triple.rejected))
        if templated:
            text = render_prompt(self.tokenizer, messages) + self._layout.context
            chosen, rejected = self._layout.answer(chosen), self._layout.answer(rejected)
        encode = ResponseEncoder(self.tokenizer, add_special_tokens=not templated)
        prompt_ids = encode(text)
        chosen_ids, rejected_ids = (encode.after(text, prompt_ids, answer) for answer in (chosen, rejected))
        for name, ids in (("chosen", chosen_ids), ("rejected", rejected_ids)):
            if not ids:
                raise BadRecordError(name, "is no token to this tokenizer.")
        earlier_turns: Sequence[tuple[int, int]] = ()
        if self.need_earlier_turns and messages:
            earlier_turns = _earlier_turns(self.tokenizer, self._layout, messages, prompt_ids)
        return TokenizedTriple(
            prompt_ids=tuple(prompt_ids),
            chosen_ids=tuple(chosen_ids),
            rejected_ids=tuple(rejected_ids),
            end_ids=self._layout.end_ids if templated else tuple(_eos_ids(self.tokenizer)),
            word_ends=tuple(encode.word_ends(text, prompt_ids, rejected)) if self.need_word_ends else (),
            earlier_turns=tuple(earlier_turns),
        )

    def _without_end(self, answer: str) -> str:
        """`answer` without an end token written out at its end: it gets one anyway."""
        return answer.removesuffix(self.tokenizer.eos_token) if self.tokenizer.eos_token else answer

    def authors_row(self, row: AuthorsRow) -> TokenizedAuthorsRow:
        """Token ids of a row of the authors' file: raw, since it brings its template; closed by the tokenizer's end."""
        encode = ResponseEncoder(self.tokenizer, add_special_tokens=True)
        text = row.text
        for end in (self.tokenizer.eos_token, AUTHORS_END_OF_TEXT):
            if end and text.endswith(end):
                text = text[: -len(end)]
                break
        if not text.strip():
            raise BadRecordError("text", "is empty but for its end token.")
        prefix_ids = encode(row.prefix)
        text_ids = encode.after(row.prefix, prefix_ids, text)
        return TokenizedAuthorsRow(tuple(prefix_ids), (*text_ids, *_eos_ids(self.tokenizer)), row.objective == "rto")


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """Messages of a prompt; plain text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """
    Text of the conversation up to and with the generation prompt.

    Raises:
        ChatTemplateError: If the tokenizer has no chat template.
        BadRecordError: If the template refuses the conversation.
    """
    _require_template(tokenizer)
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like; the cause is kept
        raise BadRecordError("prompt", f"the tokenizer's chat template refuses it: {error}.") from error


@dataclass(frozen=True)
class TurnLayout:
    """
    What a chat template puts around an assistant's answer.

    Attributes:
        context: Text between the generation prompt and the answer that is not white space, such as an empty thinking
            block. It is context, never a target.
        lead: White space between the generation prompt and the answer, such as the space of `[/INST] Sorry`. It belongs
            to the answer's first token, which the model generates.
        trims: Whether the template cuts white space off the ends of an answer.
        end_ids: Ids that close the turn; the tokenizer's end token if the template closes it with nothing.
    """

    context: str
    lead: str
    trims: bool
    end_ids: tuple[int, ...]

    def answer(self, text: str) -> str:
        """`text` as it stands behind the generation prompt."""
        return self.lead + (text.strip() if self.trims or self.lead else text)


def turn_layout(tokenizer: Any) -> TurnLayout:
    """
    Layout of an assistant's turn, found by rendering a probe.

    Raises:
        ChatTemplateError: If the template does not render an assistant turn, or nothing closes it.
    """
    _require_template(tokenizer)
    user = {"role": "user", "content": "Hello"}
    before = render_prompt(tokenizer, [user])
    conversation = [user, {"role": "assistant", "content": f" {_PROBE} "}]
    rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=False, tokenize=False)
    _, found, tail = rendered.rpartition(_PROBE)
    if not found:
        raise ChatTemplateError(
            f"The chat template does not print the assistant's answer: {rendered!r:.120}. Set a template that does."
        )
    conversation[1]["content"] = _PROBE
    bare = tokenizer.apply_chat_template(conversation, add_generation_prompt=False, tokenize=False)
    if not bare.startswith(before):
        logger.warning(
            "The chat template renders the generation prompt (%r) otherwise than a finished answer: responses are "
            "trained right after the generation prompt, which may differ from your ordinary rows.",
            before[-40:],
        )
    between = bare.rpartition(_PROBE)[0].removeprefix(before) if bare.startswith(before) else ""
    # White space around the end token is layout that no model has to generate.
    encode, end = ResponseEncoder(tokenizer, add_special_tokens=False), tail.strip()
    return TurnLayout(
        context=between if between.strip() else "",
        lead="" if between.strip() else between,
        trims=rendered == bare,
        end_ids=tuple(encode(end) if end else _eos_ids(tokenizer)),
    )


class ResponseEncoder:
    """Calls the tokenizer with one setting for special tokens, and drops an end token it may add by itself."""

    def __init__(self, tokenizer: Any, *, add_special_tokens: bool) -> None:
        self._tokenizer, self._special = tokenizer, add_special_tokens

    def __call__(self, text: str) -> list[int]:
        """Ids of `text`."""
        ids = list(self._tokenizer(text, add_special_tokens=self._special)["input_ids"])
        eos = self._tokenizer.eos_token
        if self._special and eos and ids and ids[-1] == self._tokenizer.eos_token_id and not text.endswith(eos):
            ids.pop()
        return ids

    def after(self, text: str, ids: list[int], response: str) -> list[int]:
        """Ids of `response` after `text`; tokenised alone where the tokenizer would merge across the seam."""
        joint = self(text + response)
        if len(joint) > len(ids) and joint[: len(ids)] == ids:
            return joint[len(ids) :]
        return list(self._tokenizer(response, add_special_tokens=False)["input_ids"])

    def word_ends(self, text: str, ids: list[int], response: str) -> list[int]:
        """Numbers of leading ids of `after(...)` that end with a whole word."""
        joint = self(text + response)
        is_joint = len(joint) > len(ids) and joint[: len(ids)] == ids
        # an end token that the tokenizer adds by itself has no place in the text: it would break the order of `ends`
        source, kept = (text + response, slice(len(ids), len(joint))) if is_joint else (response, slice(None))
        try:
            encoding = self._tokenizer(
                source, add_special_tokens=self._special and is_joint, return_offsets_mapping=True
            )
        except NotImplementedError as error:
            raise ChatTemplateError(
                f"prefix_unit='word' needs a fast tokenizer, got {type(self._tokenizer).__name__}. Use "
                "prefix_unit='token'."
            ) from error
        ends = [end for _, end in encoding["offset_mapping"]][kept]
        start = len(source) - len(response)
        words = [start + word.end() for word in re.finditer(r"\S+", response)]
        counts = set()
        for word in words:
            # the token that holds the end of the word may go on with white space, but not with the next word
            place = bisect_left(ends, word)
            if place < len(ends) and not source[word : ends[place]].strip():
                counts.add(bisect_right(ends, ends[place]))
        return sorted(counts)


def _earlier_turns(
    tokenizer: Any, layout: TurnLayout, messages: Sequence[Message], prompt_ids: list[int]
) -> list[tuple[int, int]]:
    """Spans of `prompt_ids` that earlier assistant turns fill, each with the slot that ends it."""
    encode, spans = ResponseEncoder(tokenizer, add_special_tokens=False), []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_prompt(tokenizer, messages[:position])
        start_ids = encode(before)
        turn = encode.after(before, start_ids, layout.answer(message["content"]))
        start, stop = len(start_ids), len(start_ids) + len(turn)
        if prompt_ids[:start] != start_ids or prompt_ids[start:stop] != turn:
            raise BadRecordError(
                "prompt",
                f"rto_turns='all' cannot find the answer of message {position} in what the chat template renders; use "
                "rto_turns='last'.",
            )
        spans.append((start, stop + 1))
    return spans


def _require_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            "The tokenizer has no chat template, and safety records are laid out with it. Set "
            "`tokenizer.chat_template` (TRL: `chat_template_path`), or, for plain-text prompts that need none, "
            "`apply_chat_template=False`."
        )


def _eos_ids(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ChatTemplateError(
            "Nothing ends an answer: the chat template closes the assistant turn with nothing and the tokenizer has no "
            "`eos_token`. Set one of them, or the model never learns to stop."
        )
    return [tokenizer.eos_token_id]
