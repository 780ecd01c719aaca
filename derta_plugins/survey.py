"""
What a file of records becomes in training, counted over all of it; `derta show` prints it.

Rows come from the functions of `core` that training uses, with the same seed and the same positions, so what is
counted is what is trained. Only ordinary rows are not built here: their host tokenises them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from derta_plugins.core.chat import RecordTokenizer, TokenizedAuthorsRow, TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.records import (
    KNOWN_COLUMNS,
    BadRecordError,
    RecordKind,
    Triple,
    parse_record,
    record_kind,
)
from derta_plugins.core.refusal_token import AUTO, RefusalToken, resolve_refusal_token, resolve_target
from derta_plugins.core.transform import Row
from derta_plugins.transforms import build_training_rows


@dataclass(frozen=True)
class View:
    """How records are looked at: the tokenizer and the knobs of the training run they are meant for."""

    tokenizer: Any
    config: DeRTaConfig
    max_length: int | None = 1024
    epoch: int = 0


ASSUMED_TEXT = "Sorry"


@dataclass(frozen=True)
class Example:
    """
    One good record, tokenised.

    Attributes:
        index: Position in the file, from 0.
        kind: What the record is.
        record: The record.
        tokenized: Its token ids; None for an ordinary row.
    """

    index: int
    kind: RecordKind
    record: Mapping[str, Any]
    tokenized: TokenizedTriple | TokenizedAuthorsRow | None


@dataclass
class Survey:
    """
    What the records of a file become.

    Attributes:
        num_records: Records read, bad ones included.
        kinds: Good records by kind.
        rows: Training rows by objective; ordinary rows are their host's and not counted.
        targets: Supervised tokens by objective.
        lengths: Tokens of each row.
        prefix_lengths: k of each MLE row that was made from a triple.
        num_truncated: Rows that were cut to fit `max_length`.
        chosen_first_ids: First tokens of the triples' safe responses.
        rejected_first_ids: First tokens of their harmful responses.
        bad: Positions of bad records by field and reason.
        examples: The records to print.
    """

    num_records: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    prefix_lengths: list[int] = field(default_factory=list)
    num_truncated: int = 0
    chosen_first_ids: Counter[int] = field(default_factory=Counter)
    rejected_first_ids: Counter[int] = field(default_factory=Counter)
    bad: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def add(self, example: Example, rows: list[Row]) -> None:
        """Count one good record and its rows."""
        self.kinds[example.kind] += 1
        if isinstance(example.tokenized, TokenizedTriple):
            self.chosen_first_ids.update(example.tokenized.chosen_ids[:1])
            self.rejected_first_ids.update(example.tokenized.rejected_ids[:1])
        for row in rows:
            self.rows[row.objective] += 1
            self.targets[row.objective] += sum(label != IGNORE_INDEX for label in row.labels)
            self.lengths.append(len(row.input_ids))
            self.num_truncated += row.num_truncated > 0
            if example.kind == "triple" and row.objective == "mle":
                self.prefix_lengths.append(row.prefix_length)


def survey(records: Iterable[Mapping[str, Any]], view: View, *, limit: int, index: int | None = None) -> Survey:
    """
    Read all of `records`, and keep the first `limit` good ones (or the one at `index`) as examples.

    Raises:
        BadRecordError: At the first bad record, if `on_bad_record` is `error`.
    """
    found = Survey()
    reader = RecordTokenizer.for_config(view.tokenizer, view.config)
    for place, record in enumerate(records):
        found.num_records += 1
        try:
            example = Example(place, record_kind(record), record, _tokenize(record, reader))
            # no count depends on which token the refusal token is, and it is not known before the last record
            rows = training_rows(example, view, refusal_token_id=0)
        except BadRecordError as error:
            if view.config.on_bad_record == "error":
                raise error.at(place) from error
            found.bad.setdefault((error.field, error.reason), []).append(place)
            continue
        found.add(example, rows)
        if place == index or (index is None and len(found.examples) < limit):
            found.examples.append(example)
    return found


def training_rows(example: Example, view: View, *, refusal_token_id: int) -> list[Row]:
    """Rows that training makes of the record; none for an ordinary one."""
    options = {
        "refusal_token_id": refusal_token_id,
        "max_length": view.max_length,
        "index": example.index,
        "epoch": view.epoch,
    }
    if example.tokenized is None:
        return []
    return build_training_rows(example.tokenized, view.config, **options)


def target_of(view: View, found: Survey) -> RefusalToken | None:
    """
    The RTO target of these records; None if there is no safety record.

    Training refuses `auto` for a file of authors' rows alone, which do not tell safe responses from helpful ones. To
    look at them, "Sorry" stands in, as in the authors' code; its share is None then.

    Raises:
        RefusalTokenError: If the refusal text is not one token.
    """
    if not found.rows:
        return None
    if view.config.refusal_text == AUTO and not found.chosen_first_ids:
        return resolve_refusal_token(view.tokenizer, ASSUMED_TEXT, allow_first_piece=True)
    return resolve_target(view.tokenizer, view.config, found.chosen_first_ids, found.rejected_first_ids)


def word_tokenizer(records: Iterable[Mapping[str, Any]]) -> Any:
    """Tokenizer with one token per word of `records` (with the space before it), and a ChatML template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words = Regex(r" ?[\w'’]+| ?[^\s\w'’]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = ["[UNK]", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.WordLevelTrainer(vocab_size=10_000_000, special_tokens=special, show_progress=False)
    texts = (text for record in records for name in sorted(KNOWN_COLUMNS) for text in _texts(record.get(name)))
    scaffold = [f"user\nassistant\n{ASSUMED_TEXT}"]
    tokenizer.train_from_iterator((text for part in (scaffold, texts) for text in part), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for part in value.values() for text in _texts(part))
    elif isinstance(value, list):
        yield from (text for part in value for text in _texts(part))


def _tokenize(record: Mapping[str, Any], reader: RecordTokenizer) -> TokenizedTriple | TokenizedAuthorsRow | None:
    parsed = parse_record(record)
    if parsed is None:
        return None
    return reader.triple(parsed) if isinstance(parsed, Triple) else reader.authors_row(parsed)


def prompt_length(tokenized: TokenizedTriple | TokenizedAuthorsRow) -> int:
    """Tokens in front of a response and of its harmful prefix, if any."""
    return len(tokenized.prompt_ids if isinstance(tokenized, TokenizedTriple) else tokenized.prefix_ids)
