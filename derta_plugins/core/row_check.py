"""
What a training row may hold, whoever built it: after the whole prompt anything as context, and as targets the refusal
token and the beginning of the safe answer alone.

The rows of `core.transform` are so by construction. Those of a third party's transform are checked here, one by one,
before they are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.transform import Row


class UnsafeRowError(ValueError):
    """A row could train something else than a refusal, or does not fit the run."""


def check_rows(
    rows: Sequence[Row], triple: TokenizedTriple, *, refusal_token_id: int, max_length: int | None = None
) -> None:
    """
    Check all rows that were built from one triple.

    A label other than the refusal token must be the token at its own place, and that place must lie in the safe answer:
    `chosen_ids` and `end_ids`, standing in `input_ids` after the prompt, whole or cut by the end of the row alone. So a
    token that the harmful response shares with the safe one is no target where the harmful response stands. Only a
    harmful text whose last tokens read like a cut safe answer cannot be told from one.

    Args:
        rows: What a transform returned.
        triple: What it was given.
        refusal_token_id: Target of RTO.
        max_length: Longest row; None sets no limit.

    Raises:
        UnsafeRowError: At the first row that is not so, or if there is no row; names the row, its place and the reason.

    Example:
        >>> triple = TokenizedTriple((1, 2), (5, 6), (7, 8), end_ids=(0,))
        >>> check_rows([Row([1, 2, 7, 5, 6, 0], [-100, -100, 5, 5, 6, 0], [False] * 6, "mle", 1)], triple,
        ...            refusal_token_id=5)
        >>> check_rows([Row([1, 2, 7, 8], [-100, -100, 7, 8], [False] * 4, "mle", 0)], triple, refusal_token_id=5)
        Traceback (most recent call last):
        derta_plugins.core.row_check.UnsafeRowError: Row 0 trains token 7 at place 2, which is no part of the safe ...
    """
    if not isinstance(rows, Sequence) or not rows:
        raise UnsafeRowError(f"Expected at least one row of a triple, got {rows!r}.")
    for number, row in enumerate(rows):
        if not isinstance(row, Row):
            raise UnsafeRowError(f"Row {number} must be a core.transform.Row, got {type(row).__name__}.")
        if reason := _misshapen(row, triple, max_length) or _mistrained(row, triple, refusal_token_id):
            raise UnsafeRowError(f"Row {number} {reason}.")


def _misshapen(row: Row, triple: TokenizedTriple, max_length: int | None) -> str:
    """What is wrong with the lists of a row; empty if nothing is."""
    columns = {"input_ids": (row.input_ids, int), "labels": (row.labels, int), "rto_mask": (row.rto_mask, bool)}
    for name, (values, kind) in columns.items():
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            return f"must have a list of {kind.__name__} in `{name}`, got {_shortened(values)}"
    lengths = [len(values) for values, _ in columns.values()]
    if len(set(lengths)) > 1:
        return f"must have lists of one length, got {', '.join(map(str, lengths))} ({', '.join(columns)})"
    length, start = lengths[0], len(triple.prompt_ids)
    if max_length is not None and length > max_length:
        return f"must have at most max_length={max_length} tokens, got {length}"
    if row.input_ids[:start] != list(triple.prompt_ids):
        return f"must begin with the {start} tokens of the prompt, got {_shortened(row.input_ids[:start])}"
    if row.objective not in ("mle", "rto"):
        return f"must have the objective 'mle' or 'rto', got {row.objective!r}"
    if type(row.prefix_length) is not int or not 0 <= row.prefix_length <= length - start:
        return f"must have a prefix_length in 0..{length - start}, got {row.prefix_length!r}"
    return ""


def _mistrained(row: Row, triple: TokenizedTriple, refusal_token_id: int) -> str:
    """What is wrong with the targets of a well-shaped row; empty if nothing is."""
    for place, (label, is_rto) in enumerate(zip(row.labels, row.rto_mask, strict=True)):
        if is_rto and label != refusal_token_id:
            return f"has `rto_mask` at place {place}, whose label {label} is not the refusal token {refusal_token_id}"
    # no model predicts the first token of a row
    if all(label == IGNORE_INDEX for label in row.labels[1:]):
        return "trains nothing"
    places = [place for place, label in enumerate(row.labels) if label not in (IGNORE_INDEX, refusal_token_id)]
    for place in places:
        if row.labels[place] != row.input_ids[place]:
            return f"trains token {row.labels[place]} at place {place}, where token {row.input_ids[place]} stands"
    if places and not _in_safe_answer(row.input_ids, places[0], places[-1], triple):
        return f"trains token {row.labels[places[0]]} at place {places[0]}, which is no part of the safe answer there"
    return ""


def _in_safe_answer(input_ids: list[int], first: int, last: int, triple: TokenizedTriple) -> bool:
    """Whether the safe answer stands in `input_ids` behind the prompt and holds both places."""
    answer, length = [*triple.chosen_ids, *triple.end_ids], len(input_ids)
    starts = range(max(len(triple.prompt_ids), last + 1 - len(answer)), first + 1)
    return any(input_ids[start : start + len(answer)] == answer[: length - start] for start in starts)


def _shortened(values: Any) -> str:
    text = repr(values)
    return text if len(text) <= 60 else f"{text[:57]}..."
