"""
Triples as token ids by LLaMA-Factory's own templates, as its ordinary rows and its inference have them.

One difference is meant: in multi-turn rows a reasoning template puts an empty thinking block into every turn, at
inference and here into the last alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llamafactory.data.template import ReasoningTemplate, Template

from derta_plugins.core.chat import ChatTemplateError, ResponseEncoder, TokenizedTriple, as_messages
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.records import BadRecordError, Message, Triple

_PROBE = "derta0probe"


@dataclass(frozen=True)
class TemplateTokenizer:
    """
    Turns triples into token ids with a template of the host; the counterpart of `core.chat.RecordTokenizer`.

    Attributes:
        template: The run's template, as `get_template_and_fix_tokenizer` returns it.
        tokenizer: The run's tokenizer.
        need_word_ends: Fill `TokenizedTriple.word_ends`; needs a fast tokenizer.
        need_earlier_turns: Fill `TokenizedTriple.earlier_turns`.

    Raises:
        ChatTemplateError: If the template's way to lay out an answer cannot be told from its parts.
        BadRecordError: If a triple has no place in the template.
    """

    template: Template
    tokenizer: Any
    need_word_ends: bool = False
    need_earlier_turns: bool = False

    @classmethod
    def for_config(cls, template: Template, tokenizer: Any, config: DeRTaConfig) -> TemplateTokenizer:
        """Build the one that `config` needs."""
        return cls(
            template,
            tokenizer,
            need_word_ends=config.prefix_unit == "word" and config.method != "vanilla",
            need_earlier_turns=config.rto_turns == "all" and config.method == "derta",
        )

    def triple(self, triple: Triple) -> TokenizedTriple:
        """Token ids of a triple. A leading system message of the prompt is the template's system text."""
        messages = as_messages(triple.prompt)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        if {message["role"] for message in messages} - {"user", "assistant"}:
            raise BadRecordError("prompt", "has roles other than system (first), user and assistant.")
        answers = [self._spoken(answer) for answer in (triple.chosen, triple.rejected)]
        prompts, encoded = zip(*(self._encode(messages, answer, system) for answer in answers), strict=True)
        if prompts[0] != prompts[1]:
            raise BadRecordError("chosen", "and the harmful response must both have a thinking block, or neither.")
        # what the template puts before both answers is context: the model is given it, or generates it in any answer
        context = min(self._context_length(ids) for ids in encoded)
        for name, ids in zip(("chosen", "rejected"), encoded, strict=True):
            if len(ids) <= context:
                raise BadRecordError(name, "is no token to this tokenizer.")
        prompt_ids = [*prompts[0], *encoded[0][:context]]
        return TokenizedTriple(
            prompt_ids=tuple(prompt_ids),
            chosen_ids=tuple(encoded[0][context:]),
            rejected_ids=tuple(encoded[1][context:]),
            end_ids=self.end_ids,
            word_ends=self._word_ends(answers[1], context) if self.need_word_ends else (),
            earlier_turns=self._earlier_turns(messages, system, prompt_ids) if self.need_earlier_turns else (),
        )

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer right after what the template puts before any answer."""
        ids = self._ids_before_end(answer)
        return ids[self._context_length(ids) :]

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """What closes an assistant's turn, without white space after it; the end token if nothing does."""
        ids = list(self._tail_ids)
        if self.template.efficient_eos or not self._without_space(ids):
            ids.append(self.tokenizer.eos_token_id)
        return tuple(self._without_space(ids))

    @cached_property
    def _layout(self) -> tuple[list[Any], str, str, list[Any]]:
        """The assistant's slots: those before the one with the answer, the texts around the answer, those after."""
        slots = self.template.format_assistant.apply(content=_PROBE)
        places = [place for place, slot in enumerate(slots) if isinstance(slot, str) and _PROBE in slot]
        if len(places) != 1:
            raise ChatTemplateError(f"The template's assistant slots {slots!r} must hold the answer once.")
        head, tail = slots[places[0]].split(_PROBE)
        return slots[: places[0]], head, tail, slots[places[0] + 1 :]

    @cached_property
    def _tail_ids(self) -> list[int]:
        _, _, tail, after = self._layout
        return self._ids([tail, *after])

    @cached_property
    def _head_ids(self) -> list[int]:
        before, head, _, _ = self._layout
        return self._ids([*before, head])

    def _ids(self, slots: list[Any]) -> list[int]:
        return self.template._convert_elements_to_ids(self.tokenizer, slots)

    def _without_space(self, ids: list[int]) -> list[int]:
        """White space after the end token is layout that no model has to generate."""
        is_word = [bool(self.tokenizer.decode([token]).strip()) for token in ids]
        places = [place for place, word in enumerate(is_word) if word]
        return ids[: places[-1] + 1] if places else []

    def _spoken(self, answer: str) -> str:
        """`answer` as the template prints it: without an end token of its own, or thinking that is switched off."""
        if isinstance(self.template, ReasoningTemplate) and self.template.enable_thinking is False:
            answer = self.template.remove_thought(answer)
        return answer.removesuffix(self.tokenizer.eos_token or "")

    def _encode(self, messages: Sequence[Message], answer: str, system: str | None) -> tuple[list[int], list[int]]:
        """Ids before the assistant's slots, and of these up to the end of the answer."""
        turn = {"role": "assistant", "content": answer}
        prompt_ids, response_ids = self.template.encode_oneturn(self.tokenizer, [*messages, turn], system)
        before, head, tail, after = self._layout
        whole = self._ids([*before, head + answer + tail, *after])
        if response_ids[len(response_ids) - len(whole) :] != whole:
            raise ChatTemplateError(
                "The template lays an answer out otherwise than its assistant slots say, so DeRTa cannot tell where it "
                f"ends: {self.tokenizer.decode(response_ids)!r:.120}. Choose another template."
            )
        # an empty thinking block that the template adds is context, whether or not the host trains it in ordinary rows
        thought = response_ids[: len(response_ids) - len(whole)]
        return [*prompt_ids, *thought], self._ids_before_end(answer)

    def _ids_before_end(self, answer: str) -> list[int]:
        """Ids of the assistant's slots up to the end of the answer."""
        before, head, _, _ = self._layout
        return self._ids([*before, head + answer])

    def _context_length(self, ids: Sequence[int]) -> int:
        """Number of leading `ids` that the template gives any answer; white space may merge into the answer."""
        length = 0
        while length < min(len(ids), len(self._head_ids)) and ids[length] == self._head_ids[length]:
            length += 1
        return length

    def _word_ends(self, answer: str, context: int) -> tuple[int, ...]:
        before, head, _, _ = self._layout
        skipped = context - len(self._ids(before))
        ends = ResponseEncoder(self.tokenizer, add_special_tokens=False).word_ends("", [], head + answer)
        return tuple(end - skipped for end in ends if end > skipped)

    def _earlier_turns(
        self, messages: Sequence[Message], system: str | None, prompt_ids: list[int]
    ) -> tuple[tuple[int, int], ...]:
        """Spans of `prompt_ids` that earlier assistant turns fill, each with the slot that ends it."""
        spans = []
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # as `Template` has it: a reasoning template adds its empty thinking block to the last turn alone
            start = len(Template.encode_oneturn(self.template, self.tokenizer, messages[: position + 1], system)[0])
            turn = self._ids_before_end(message["content"])
            if prompt_ids[start : start + len(turn)] != turn:
                raise BadRecordError(
                    "prompt",
                    f"rto_turns='all' cannot find the answer of message {position} in what the template renders; use "
                    "rto_turns='last'.",
                )
            spans.append((start + self._context_length(turn), start + len(turn) + 1))
        return tuple(spans)
