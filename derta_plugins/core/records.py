"""
What a user's record is: a triple, a row of the authors' training file, or an ordinary (helpful) row.

A record is told by its columns alone. Columns that are null count as absent, since a concatenated dataset fills what a
source does not have with nulls; columns with other names (ids, categories) are ignored. A set of known columns that
fits no format is refused: a safety record that lost a column must never be trained as an ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, str]
RecordKind = Literal["triple", "authors_row", "helpful"]

TRIPLE_FORMATS: dict[str, frozenset[str]] = {
    "preference": frozenset({"prompt", "chosen", "rejected"}),
    "preference, prompt inside": frozenset({"chosen", "rejected"}),
    "DeRTa authors' triples": frozenset({"instruction", "output", "safe_response"}),
    "PKU-SafeRLHF": frozenset({"prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"}),
}
AUTHORS_ROW_COLUMNS = frozenset({"prefix", "text", "safe"})
HELPFUL_FORMATS: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
KNOWN_COLUMNS = frozenset().union(*TRIPLE_FORMATS.values(), AUTHORS_ROW_COLUMNS, *HELPFUL_FORMATS.values())
# Training rows always carry these; a record that has one of them was tokenised elsewhere.
TOKENIZED_COLUMNS = frozenset({"input_ids", "labels", "rto_mask"})


class BadRecordError(ValueError):
    """
    A record that cannot be trained safely.

    Attributes:
        index: Position of the record in its dataset, from 0; None when not known.
        field: The column at fault.
        reason: What was expected and what was got.
    """

    def __init__(self, field: str, reason: str, index: int | None = None) -> None:
        self.index, self.field, self.reason = index, field, reason
        where = "Record" if index is None else f"Record {index}"
        super().__init__(
            f"{where}, field `{field}`: {reason} Mend the record, or set `on_bad_record='skip'` to drop such records."
        )

    def __reduce__(self) -> tuple[type[BadRecordError], tuple[str, str, int | None]]:
        # The default would call the constructor with the finished message; worker processes send errors by pickle.
        return BadRecordError, (self.field, self.reason, self.index)

    def at(self, index: int) -> BadRecordError:
        """Return the same error with the position of its record."""
        return BadRecordError(self.field, self.reason, index)


@dataclass(frozen=True)
class Triple:
    """
    A harmful prompt with its safe and its harmful response (q, r and the harmful response of Eq. 2).

    Attributes:
        prompt: Messages, the last one from the user; or plain text, which becomes one user turn of a chat template.
        chosen: Safe response.
        rejected: Harmful response. It is read as context only; no label ever comes from it.
    """

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class AuthorsRow:
    """
    One row of the authors' own training file, already in its template.

    Attributes:
        prefix: Prompt, with the harmful prefix where there is one. Never a target.
        text: Response to train.
        objective: `rto` when `safe` was "true", which in that file marks the *harmful* response; else `mle`.
    """

    prefix: str
    text: str
    objective: Literal["mle", "rto"]


def present_columns(record: Mapping[str, Any]) -> frozenset[str]:
    """Known columns of `record` that are not null."""
    return frozenset(name for name in KNOWN_COLUMNS if record.get(name) is not None)


def record_kind(record: Mapping[str, Any]) -> RecordKind:
    """
    Tell what a record is, from its columns.

    Raises:
        BadRecordError: If its known columns fit no format; says which are missing or too many.
    """
    if not isinstance(record, Mapping):
        raise BadRecordError("record", f"expected a mapping of columns, got {type(record).__name__}.")
    columns = present_columns(record)
    if columns in TRIPLE_FORMATS.values():
        return "triple"
    if columns == AUTHORS_ROW_COLUMNS:
        return "authors_row"
    if columns in HELPFUL_FORMATS.values():
        return "helpful"
    raise BadRecordError(*_misfit(columns, record))


def parse_record(record: Mapping[str, Any]) -> Triple | AuthorsRow | None:
    """
    Read one record.

    Returns:
        A `Triple`, an `AuthorsRow`, or None for an ordinary (helpful) record, which is its host's to tokenise.

    Raises:
        BadRecordError: If the record fits no format, or is no triple: an empty side, equal sides, no safe side or no
            harmful side, a wrong type, a prompt that does not end with the user's turn.

    Example:
        >>> parse_record({"prompt": "q", "chosen": "Sorry, no.", "rejected": "Step 1 ..."}).chosen
        'Sorry, no.'
        >>> parse_record({"prompt": "q", "chosen": "Sorry, no.", "rejected": ""})
        Traceback (most recent call last):
        derta_plugins.core.records.BadRecordError: Record, field `rejected`: is empty. ...
    """
    kind = record_kind(record)
    if kind == "helpful":
        return None
    if kind == "authors_row":
        return _parse_authors_row(record)
    columns = present_columns(record)
    for name in ("tools", "chat_template_kwargs"):
        if record.get(name):
            raise BadRecordError(name, "is not carried by a safety record.")
    if "response_0" in columns:
        prompt, chosen, rejected, names = _read_pku(record)
    elif "safe_response" in columns:
        names = ("instruction", "safe_response", "output")
        prompt, chosen, rejected = (record[name] for name in names)
    else:
        names = ("prompt", "chosen", "rejected")
        prompt, chosen, rejected = _read_preference(record)
    triple = Triple(
        _read_prompt(prompt, names[0]), _read_response(chosen, names[1]), _read_response(rejected, names[2])
    )
    if triple.chosen.strip() == triple.rejected.strip():
        raise BadRecordError(names[2], "is the same text as the safe response.")
    return triple


def _misfit(columns: frozenset[str], record: Mapping[str, Any]) -> tuple[str, str]:
    """Field and reason for columns that fit no format: names the format that lacks or exceeds the fewest columns."""
    tokenized = TOKENIZED_COLUMNS & set(record)
    if not columns:
        seen = ", ".join(sorted(map(str, record))) or "none"
        what = "is tokenised already" if tokenized else "no known column has a value"
        return "record", f"{what}; its columns are: {seen}. Expected {_formats()}."
    formats = {**TRIPLE_FORMATS, "authors' training rows": AUTHORS_ROW_COLUMNS, **HELPFUL_FORMATS}
    name = min(formats, key=lambda name: len(formats[name] ^ columns))
    missing, extra = sorted(formats[name] - columns), sorted(columns - formats[name])
    parts = [f"misses {', '.join(f'`{m}`' for m in missing)}"] if missing else []
    parts += [f"has {', '.join(f'`{e}`' for e in extra)} besides"] if extra else []
    return (missing or extra)[0], f"the record looks like the {name} format but {' and '.join(parts)}."


def _formats() -> str:
    triples = "; ".join(" / ".join(sorted(columns)) for columns in TRIPLE_FORMATS.values())
    return f"a triple ({triples}), {' / '.join(sorted(AUTHORS_ROW_COLUMNS))}, or messages, prompt / completion, text"


def _read_preference(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected; a prompt that stands inside both sides is their common leading messages."""
    chosen, rejected = record["chosen"], record["rejected"]
    if record.get("prompt") is not None:
        return record["prompt"], chosen, rejected
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not _is_list(side):
            raise BadRecordError(name, "is plain text without a `prompt` column, so the prompt cannot be told apart.")
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    return chosen[:length], chosen[length:], rejected[length:]


def _read_pku(record: Mapping[str, Any]) -> tuple[Any, Any, Any, tuple[str, str, str]]:
    """Prompt, safe and harmful side of a PKU-SafeRLHF pair, which is a triple only if exactly one side is safe."""
    flags = (record["is_response_0_safe"], record["is_response_1_safe"])
    for side, flag in enumerate(flags):
        if not isinstance(flag, bool):
            raise BadRecordError(f"is_response_{side}_safe", f"expected true or false, got {flag!r}.")
    if flags[0] == flags[1]:
        both = "both responses are safe" if flags[0] else "no response is safe"
        raise BadRecordError("is_response_0_safe", f"{both}; a triple needs exactly one safe side.")
    safe, harmful = (0, 1) if flags[0] else (1, 0)
    names = ("prompt", f"response_{safe}", f"response_{harmful}")
    return record["prompt"], record[names[1]], record[names[2]], names


def _parse_authors_row(record: Mapping[str, Any]) -> AuthorsRow:
    safe = record["safe"]
    flag = safe if isinstance(safe, bool) else {"true": True, "false": False}.get(str(safe).strip().lower())
    if flag is None:
        raise BadRecordError("safe", f'expected "true" (an RTO row) or "false", got {safe!r}.')
    prefix, text = _text(record["prefix"], "prefix"), _text(record["text"], "text")
    return AuthorsRow(prefix, text, "rto" if flag else "mle")


def _read_prompt(prompt: Any, field: str) -> str | tuple[Message, ...]:
    if not _is_list(prompt):
        return _text(prompt, field)
    messages = tuple(_message(message, field) for message in prompt)
    if not messages or messages[-1]["role"] != "user":
        last = messages[-1]["role"] if messages else "no message"
        raise BadRecordError(field, f"must end with a user message, ends with {last}.")
    return messages


def _read_response(response: Any, field: str) -> str:
    if not _is_list(response):
        return _text(response, field)
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in response]
    if roles != ["assistant"]:
        raise BadRecordError(field, f"expected one assistant message, got roles {roles}.")
    return _message(response[0], field)["content"]


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRecordError(field, f"expected messages with `role` and `content`, got {message!r:.60}.")
    if any(message.get(name) for name in ("tool_calls", "tools")):
        raise BadRecordError(field, "has tool calls, which a triple cannot carry.")
    return {"role": message["role"], "content": _text(message.get("content"), field)}


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(field, f"expected text, got {type(value).__name__} {value!r:.60}.")
    if not value.strip():
        raise BadRecordError(field, "is empty.")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
