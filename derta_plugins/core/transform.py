"""
The dataset transform: one triple in, training rows out. Pure functions of token ids; every draw has an explicit seed.

Targets are final when a row is built. The harmful response stands in `input_ids` as context; in `labels` its places
hold `IGNORE_INDEX` or the refusal token, never its own ids. So whatever happens to a row later (a dropped `rto_mask`
column, packing, a foreign collator, a fused loss), it can only ever train refusals.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from derta_plugins.core.chat import TokenizedAuthorsRow, TokenizedTriple
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.records import BadRecordError


@dataclass(frozen=True)
class Row:
    """
    One training row. The three lists have one length S and go to the model.

    Attributes:
        input_ids: What the model reads.
        labels: Final targets aligned with `input_ids` (`labels[t]` is predicted at `t - 1`), `IGNORE_INDEX` elsewhere.
        rto_mask: True where the target is the refusal token because of RTO. Only for weights and logging: the targets
            do not depend on it.
        objective: What the row trains; `branch` is an RTO row with MLE rows folded into it (`core.branch_layout`).
        prefix_length: Tokens of the harmful response in front of the safe one (k of Eq. 2); all of them in an RTO row.
        num_truncated: Tokens left out to fit `max_length`.
        is_limited: Whether `max_length` kept k from reaching the whole harmful response, in an MLE row that draws k.
        branch_starts: S numbers in a branch row (see `fold_rows`), empty in others.
        sources: The rows that a branch row was folded from.
    """

    input_ids: list[int]
    labels: list[int]
    rto_mask: list[bool]
    objective: Literal["mle", "rto", "branch"]
    prefix_length: int
    num_truncated: int = 0
    is_limited: bool = False
    branch_starts: list[int] = field(default_factory=list)
    sources: tuple[Row, ...] = ()


def build_rows(
    triple: TokenizedTriple,
    config: DeRTaConfig,
    *,
    refusal_token_id: int,
    max_length: int | None = None,
    index: int = 0,
    epoch: int = 0,
) -> list[Row]:
    r"""
    Training rows of one triple: `num_prefixes` MLE rows, then the RTO row if the triple has one.

    MLE row: prompt, first k harmful tokens, safe response; targets are the safe response and its end-of-turn.
    RTO row: prompt, harmful response; the target of each of its places, from the first (predicted by the last prompt
    token) to the end-of-turn slot, is the refusal token.

    Args:
        triple: Tokenised record.
        config: Knobs. `method` other than `derta` gives no RTO row; `vanilla` has k = 0 in every MLE row.
        refusal_token_id: Target of RTO, from `resolve_refusal_token_id`.
        max_length: Longest row. The harmful response is shortened first, then the end of the safe response; the prompt
            never is. None sets no limit.
        index: Position of the record in its dataset, for the draws.
        epoch: Epoch, for the draws of k and of the kept RTO positions. The number of rows does not depend on it.

    Raises:
        BadRecordError: If the prompt leaves no room for an answer within `max_length`.

    Source:
        Yuan et al. 2024, arXiv 2407.09121, Eq. 2. The authors cut the prefix at words and tokenise again; here it is
        always a prefix of the harmful response's tokens, with `prefix_unit` telling where it may end.

    Example:
        >>> triple = TokenizedTriple((1, 2), (5, 6), (7, 8, 9), end_ids=(0,))
        >>> mle, rto = build_rows(triple, DeRTaConfig(zero_prefix_ratio=1.0), refusal_token_id=5)
        >>> mle.input_ids, mle.labels
        ([1, 2, 5, 6, 0], [-100, -100, 5, 6, 0])
        >>> rto.input_ids, rto.labels
        ([1, 2, 7, 8, 9, 0], [-100, -100, 5, 5, 5, 5])
    """
    room = math.inf if max_length is None else max_length - len(triple.prompt_ids)
    if room < 1:
        raise BadRecordError(
            "prompt",
            f"is {len(triple.prompt_ids)} tokens, which leaves no room for an answer in max_length={max_length}.",
        )
    draws = random.Random(f"{config.seed}-{epoch}-{index}")
    rows = [_mle_row(triple, config, room, draws) for _ in range(config.num_prefixes)]
    if has_rto_row(config, index):
        rows.append(_rto_row(triple, config, room, refusal_token_id, draws))
    return rows


def has_rto_row(config: DeRTaConfig, index: int) -> bool:
    """Whether the triple at `index` gives an RTO row; the same in every epoch."""
    if config.method != "derta":
        return False
    return config.rto_ratio >= 1.0 or random.Random(f"{config.seed}-rto-{index}").random() < config.rto_ratio


def build_authors_row(
    row: TokenizedAuthorsRow,
    config: DeRTaConfig,
    *,
    refusal_token_id: int,
    max_length: int | None = None,
    index: int = 0,
    epoch: int = 0,
) -> list[Row]:
    """
    The one training row of a row of the authors' file, whose prefix is already drawn.

    Raises:
        BadRecordError: If the prefix leaves no room within `max_length`.
        ConfigError: If `method` is a baseline: these rows hold no triple to build it from.
    """
    if config.method != "derta":
        raise ConfigError(
            f"method={config.method!r} needs triples: the authors' prefix / text / safe rows have their prefixes and "
            "objectives fixed. Give the records they were made from (instruction / output / safe_response)."
        )
    room = len(row.text_ids) if max_length is None else max_length - len(row.prefix_ids)
    if room < 1:
        raise BadRecordError("prefix", f"is {len(row.prefix_ids)} tokens, too many for max_length={max_length}.")
    text_ids = row.text_ids[:room]
    start, cut = len(row.prefix_ids), len(row.text_ids) - len(text_ids)
    input_ids = [*row.prefix_ids, *text_ids]
    if not row.is_rto:
        labels = [*[IGNORE_INDEX] * start, *text_ids]
        return [Row(input_ids, labels, [False] * len(input_ids), "mle", 0, cut)]
    kept = _kept_positions(range(start, len(input_ids)), config, random.Random(f"{config.seed}-{epoch}-{index}"))
    # the last id of `text_ids` ends the answer and is no token of it
    prefix_length = min(len(text_ids), len(row.text_ids) - 1)
    return [_relabelled(input_ids, kept, refusal_token_id, prefix_length, cut)]


def _mle_row(triple: TokenizedTriple, config: DeRTaConfig, room: float, draws: random.Random) -> Row:
    """Prompt + harmful prefix (context) + safe response (targets)."""
    answer = [*triple.chosen_ids, *triple.end_ids]
    longest = max(0, min(len(triple.rejected_ids), room - len(answer)))
    k = _draw_prefix_length(triple, config, int(longest), draws)
    cut = max(0, len(answer) - int(min(room, len(answer))))
    context = [*triple.prompt_ids, *triple.rejected_ids[:k]]
    answer = answer[: len(answer) - cut]
    labels = [*[IGNORE_INDEX] * len(context), *answer]
    is_limited = config.method != "vanilla" and longest < len(triple.rejected_ids)
    return Row([*context, *answer], labels, [False] * len(labels), "mle", k, cut, is_limited)


def _draw_prefix_length(triple: TokenizedTriple, config: DeRTaConfig, longest: int, draws: random.Random) -> int:
    """k of Eq. 2: tokens of the harmful response that precede the safe one, 0..longest."""
    if config.method == "vanilla":
        return 0
    if config.prefix_unit == "word":
        nonzero: Sequence[int] = [end for end in triple.word_ends if end <= longest]
    else:
        nonzero = range(1, longest + 1)
    is_zero = config.zero_prefix_ratio is not None and draws.random() < config.zero_prefix_ratio
    if is_zero or not nonzero:
        return 0
    return draws.choice(nonzero if config.zero_prefix_ratio is not None else [0, *nonzero])


def _rto_row(
    triple: TokenizedTriple, config: DeRTaConfig, room: float, refusal_token_id: int, draws: random.Random
) -> Row:
    """Prompt + harmful response, every place of it (and the slot that ends it) with the refusal token as target."""
    # one end-of-turn id is the slot; further ids of a template's tail are layout
    answer = [*triple.rejected_ids, *triple.end_ids[:1]]
    cut = max(0, len(answer) - int(min(room, len(answer))))
    answer = answer[: len(answer) - cut]
    input_ids = [*triple.prompt_ids, *answer]
    places = [*range(len(triple.prompt_ids), len(input_ids))]
    if config.rto_turns == "all":
        places = [*(place for start, stop in triple.earlier_turns for place in range(start, stop)), *places]
    kept = _kept_positions(places, config, draws)
    return _relabelled(input_ids, kept, refusal_token_id, min(len(answer), len(triple.rejected_ids)), cut)


def _kept_positions(places: Sequence[int], config: DeRTaConfig, draws: random.Random) -> Sequence[int]:
    """The share `rto_keep_ratio` of the RTO places, at least one."""
    if config.rto_keep_ratio >= 1.0:
        return places
    return draws.sample(places, math.ceil(config.rto_keep_ratio * len(places)))


def _relabelled(
    input_ids: list[int], places: Sequence[int], refusal_token_id: int, prefix_length: int, cut: int
) -> Row:
    labels, rto_mask = [IGNORE_INDEX] * len(input_ids), [False] * len(input_ids)
    for place in places:
        labels[place], rto_mask[place] = refusal_token_id, True
    return Row(input_ids, labels, rto_mask, "rto", prefix_length, cut)
