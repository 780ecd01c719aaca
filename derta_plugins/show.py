"""
`derta show`: records as the model will see them, what each token trains, and a summary of the whole file.

Everything is legible without colour: trained tokens stand in brackets, and each part of a row has its name beside it.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import track
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.records import AUTHORS_ROW_COLUMNS, HELPFUL_FORMATS, TRIPLE_FORMATS, present_columns
from derta_plugins.core.refusal_token import AUTO, RefusalToken
from derta_plugins.core.transform import Row
from derta_plugins.readers import RecordsNotFoundError
from derta_plugins.survey import Example, Survey, View, prompt_length, survey, target_of, training_rows

if TYPE_CHECKING:
    from datasets import Dataset

State = Literal["read", "mle", "rto"]
_STYLES = {"prompt": "dim", "prefix": "yellow", "host": "", "MLE": "green", "RTO": "magenta"}
_KINDS = {
    "triple": ("triple", "triples"),
    "authors_row": ("row of the authors' file", "rows of the authors' file"),
    "helpful": ("ordinary row", "ordinary rows"),
}
# tokens from which a part is shortened, and how many of its first and last ones stay
_LONG_PART, _HEAD, _TAIL = 160, 100, 40
_MANY_RECORDS = 2000  # from here on, reading takes long enough for a progress bar
_MAX_REASONS, _MAX_INDICES, _MAX_BINS, _BAR_WIDTH = 8, 4, 8, 24
_ANSWER_COLUMNS = ("response", "output", "completion", "answer", "text", "messages", "chosen", "rejected")


class NoTrainingRecordError(RecordsNotFoundError):
    """A file that reads well but holds nothing to train on."""


class Glyphs(NamedTuple):
    """The signs of a terminal that has them, or their ASCII stand-ins."""

    newline: str
    dots: str
    separator: str
    bar: str
    brackets: dict[State, tuple[str, str]]


UNICODE = Glyphs("⏎", "…", " · ", "█", {"read": ("", ""), "mle": ("⟦", "⟧"), "rto": ("⟪", "⟫")})
ASCII = Glyphs("\\n", "...", ", ", "#", {"read": ("", ""), "mle": ("[[", "]]"), "rto": ("<<", ">>")})


def show_records(
    records: Dataset,
    view: View,
    console: Console,
    *,
    source: str,
    limit: int = 3,
    index: int | None = None,
    max_records: int = 20_000,
    is_full: bool = False,
) -> None:
    """
    Print examples and the summary of `records`.

    Args:
        records: What to show.
        view: Tokenizer and knobs.
        console: Where to.
        source: Name of the records, for messages.
        limit: Number of examples.
        index: Print this record instead of the first ones.
        max_records: Records that the summary reads.
        is_full: Print long parts whole.

    Raises:
        NoTrainingRecordError: If no record can be trained; what the file holds instead is printed before.
        RecordsNotFoundError: If there is no record at `index`.
    """
    if index is not None and not 0 <= index < len(records):
        raise RecordsNotFoundError(f"{source}: --index must be in 0 to {len(records) - 1}, got {index}.")
    wanted = min(len(records), max(max_records, 0 if index is None else index + 1))
    found = survey(with_progress(records, wanted, "Reading records"), view, limit=limit, index=index)
    target = target_of(view, found)
    printer = _Printer(console, view, target, is_full)
    if found.examples and target is not None:
        console.print(printer.legend(target))
    for example in found.examples:
        printer.example(example)
    printer.summary(found, total=len(records))
    printer.bad_records(found, index)
    if not found.kinds:
        printer.explain(records.column_names)
        raise NoTrainingRecordError(
            f"{source}: no training record among {found.num_records:,}; give records in one of the formats above."
        )


def with_progress(records: Dataset, wanted: int, what: str) -> Iterable[Mapping[str, Any]]:
    """The first `wanted` of `records`; when they are many, with a bar on stderr if someone sees it."""
    wanted = min(wanted, len(records))
    is_hidden = wanted < _MANY_RECORDS or not sys.stderr.isatty()
    console = Console(stderr=True)
    return track(records.select(range(wanted)), what, wanted, console=console, transient=True, disable=is_hidden)


def visible(text: str, glyphs: Glyphs = UNICODE) -> str:
    """`text` with a sign at each line end, and with control and invisible characters written as escapes."""
    return "".join(_visible_character(character, glyphs) for character in text)


def runs(row: Row, start: int, stop: int) -> Iterator[tuple[State, int, int]]:
    """Longest stretches of `row` from `start` to `stop` whose tokens train the same thing."""
    for state, places in groupby(range(start, stop), key=lambda place: _state(row, place)):
        first, *rest = places
        yield state, first, (rest[-1] if rest else first) + 1


def parts(row: Row, prompt_end: int) -> list[tuple[str, int, int]]:
    """The named parts of a row: prompt, harmful prefix where there is one, and what is trained."""
    end = len(row.input_ids)
    if row.objective == "rto":
        return [("prompt", 0, prompt_end), ("RTO", prompt_end, end)]
    prefix_end = prompt_end + row.prefix_length
    prefix = [("prefix", prompt_end, prefix_end)] if row.prefix_length else []
    return [("prompt", 0, prompt_end), *prefix, ("MLE", prefix_end, end)]


def histogram(values: list[int]) -> list[tuple[str, int]]:
    """Counts of `values` in bins of equal width, with 0 on its own."""
    width = max(1, -(-max(values) // _MAX_BINS))
    bins = [("0", sum(value == 0 for value in values))]
    for low in range(1, max(values) + 1, width):
        high = low + width - 1
        bins.append((str(low) if width == 1 else f"{low}-{high}", sum(low <= value <= high for value in values)))
    return bins


def helpful_text(tokenizer: Any, record: Mapping[str, Any]) -> str:
    """An ordinary record as text, through the chat template if it is a conversation."""
    columns = present_columns(record)
    if "text" in columns:
        return str(record["text"])
    sides = [record["messages"]] if "messages" in columns else [record["prompt"], record["completion"]]
    if all(isinstance(side, str) for side in sides):
        return "".join(sides)
    return tokenizer.apply_chat_template([message for side in sides for message in side], tokenize=False)


class _Printer:
    """Lays out rows and counts for one console."""

    def __init__(self, console: Console, view: View, target: RefusalToken | None, is_full: bool) -> None:
        self.console, self.view, self.target, self.is_full = console, view, target, is_full
        self.glyphs = ASCII if console.options.ascii_only else UNICODE

    def legend(self, target: RefusalToken) -> Text:
        """What the brackets and the names of parts mean."""
        mle, rto = ("".join(self.glyphs.brackets[state]) for state in ("mle", "rto"))
        legend = Text().append(f"MLE {mle}", "bold green").append(" trained as written    ")
        legend.append(f"RTO {rto}", "bold magenta").append(f" trained to be {_named(target, self.glyphs)}\n")
        legend.append("prompt", "dim").append(" and ").append("prefix", "yellow").append(" (of k harmful tokens) are ")
        return legend.append(f"read, never trained    {self.glyphs.newline} line end")

    def example(self, example: Example) -> None:
        """Print all rows of one record."""
        self._heading(f"record {example.index}: {_KINDS[example.kind][0]}")
        if example.tokenized is None:
            self._host_row(example)
            return
        rows = training_rows(example, self.view, refusal_token_id=0 if self.target is None else self.target.id)
        for number, row in enumerate(rows, start=1):
            self.console.print(self._headline(row, number, len(rows)))
            self.console.print(self._grid(row, parts(row, prompt_length(example.tokenized))))

    def summary(self, found: Survey, *, total: int) -> None:
        """Print what all records together become."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in self._facts(found):
            grid.add_row(name, value)
        read = _count(found.num_records, "record")
        if found.num_records < total:
            read = f"the first {found.num_records:,} of {total:,} records (--max-records reads more)"
        self._heading(f"summary of {read}")
        self.console.print(grid)

    def bad_records(self, found: Survey, index: int | None) -> None:
        """Print why records are left out, the commonest reason first; only that of `index` if it is bad."""
        groups = sorted(found.bad.items(), key=lambda item: (-len(item[1]), item[1]))
        if not groups:
            return
        table = Table(title="Bad records (left out of training)", title_justify="left", title_style="bold", expand=True)
        table.add_column("count", justify="right", no_wrap=True)
        table.add_column("at index", no_wrap=True)
        table.add_column("field", overflow="fold", min_width=6)
        table.add_column("reason", overflow="fold", ratio=1)
        for (name, reason), places in groups[:_MAX_REASONS]:
            here = [index] if index in places else []
            firsts = (here + [place for place in places if place != index])[:_MAX_INDICES]
            more = self.glyphs.dots if len(places) > len(firsts) else ""
            # without any training record, the formats are listed below
            reason = reason if found.kinds else reason.partition(" Expected a triple")[0]
            cells = (f"{len(places):,}", ", ".join(map(str, firsts)) + (more and f", {more}"), name, reason)
            table.add_row(*(Text(visible(cell, self.glyphs)) for cell in cells))
        if rest := groups[_MAX_REASONS:]:
            table.caption = f"and {sum(len(places) for _, places in rest):,} more for {len(rest)} other reasons"
        self.console.print()
        self.console.print(table)

    def explain(self, columns: list[str]) -> None:
        """Say in plain words what a file without any training record looks like, and what was expected."""
        names = ", ".join(visible(name, self.glyphs) for name in columns)
        self.console.print()
        self.console.print(Text(f"No training record: its columns are {names}. {_likeness(columns)}".strip()))
        grid = Table.grid(padding=(0, 2))
        ordinary = {f"ordinary, {name}": wanted for name, wanted in HELPFUL_FORMATS.items()}
        for name, wanted in {**TRIPLE_FORMATS, "DeRTa authors' rows": AUTHORS_ROW_COLUMNS, **ordinary}.items():
            grid.add_row(Text(name, "bold"), Text(", ".join(sorted(wanted))))
        self.console.print(Group(Text("Expected the columns of one of:"), Padding(grid, (0, 0, 0, 2))))

    def _heading(self, text: str) -> None:
        self.console.print()
        self.console.print(Rule(Text(text, "bold"), align="left", style="dim"))

    def _host_row(self, example: Example) -> None:
        try:
            text = helpful_text(self.view.tokenizer, example.record)
        except Exception as error:  # templates raise what they like
            refused = f"the tokenizer's chat template refuses it: {error}"
            self.console.print(Text(visible(refused, self.glyphs), "yellow"))
            return
        ids = list(self.view.tokenizer(text, add_special_tokens=False)["input_ids"])
        row = Row(ids, [IGNORE_INDEX] * len(ids), [False] * len(ids), "mle", 0)
        say = f"{_count(len(ids), 'token')} here; your host tokenises it and decides which are trained"
        self.console.print(Text(say, "dim"))
        self.console.print(self._grid(row, [("host", 0, len(ids))]))

    def _headline(self, row: Row, number: int, count: int) -> Text:
        trained = sum(label != IGNORE_INDEX for label in row.labels)
        name = row.objective.upper()
        head = Text(f"row {number} of {count}: ").append(name, f"bold {_STYLES[name]}")
        facts = [f"{len(row.input_ids):,} tokens, {trained:,} trained"]
        if row.objective == "rto" and self.target is not None:
            facts.append(f"target {_named(self.target, self.glyphs)}")
        elif row.prefix_length:
            facts.append(f"k = {row.prefix_length:,}")
        if row.num_truncated:
            facts.append(f"{row.num_truncated:,} cut to fit --max-length {self.view.max_length}")
        return head.append(self.glyphs.separator + self.glyphs.separator.join(facts))

    def _grid(self, row: Row, named: list[tuple[str, int, int]]) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", min_width=8, no_wrap=True)
        grid.add_column(justify="right", min_width=4, style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, start, stop in named:
            grid.add_row(
                Text(name, f"bold {_STYLES[name]}".strip()), f"{stop - start:,}", self._part(row, name, start, stop)
            )
        return grid

    def _part(self, row: Row, name: str, start: int, stop: int) -> Text:
        text = Text()
        if self.is_full or stop - start <= _LONG_PART:
            return self._tokens(text, row, name, start, stop)
        self._tokens(text, row, name, start, start + _HEAD)
        hidden = stop - start - _HEAD - _TAIL
        text.append(f" {self.glyphs.dots} {hidden:,} more tokens (--full) {self.glyphs.dots} ", "reverse")
        return self._tokens(text, row, name, stop - _TAIL, stop)

    def _tokens(self, text: Text, row: Row, name: str, start: int, stop: int) -> Text:
        for state, first, last in runs(row, start, stop):
            opening, closing = self.glyphs.brackets[state]
            # in an RTO row, a place that `rto_keep_ratio` left out is context like the prompt
            style = _STYLES["prompt" if name == "RTO" else name] if state == "read" else _STYLES[state.upper()]
            shown = visible(_decode(self.view.tokenizer, row.input_ids, first, last), self.glyphs)
            text.append(opening, f"bold {style}".strip()).append(shown, style).append(closing, f"bold {style}".strip())
        text.rstrip()
        return text

    def _facts(self, found: Survey) -> Iterator[tuple[str, str | Text]]:
        """Names and values of the summary."""
        kinds = [_count(found.kinds[kind], *names) for kind, names in _KINDS.items() if found.kinds[kind]]
        bad = sum(map(len, found.bad.values()))
        yield "records", ", ".join([*kinds, f"{bad:,} bad" if bad or not kinds else "none bad"])
        if not found.rows:
            if found.kinds:
                yield "rows", "your host's: there is no safety record here, so nothing for DeRTa to change"
            return
        host = f", and {found.kinds['helpful']:,} of your host" if found.kinds["helpful"] else ""
        yield "rows", f"{found.rows.total():,}: {found.rows['mle']:,} MLE, {found.rows['rto']:,} RTO{host}"
        targets = found.targets
        yield "trained", f"{targets.total():,} tokens: {targets['mle']:,} MLE, {targets['rto']:,} RTO"
        low, middle, high = min(found.lengths), median(found.lengths), max(found.lengths)
        yield "row length", f"min {low:,}, median {middle:,.0f}, max {high:,} tokens"
        limit = "no --max-length" if self.view.max_length is None else f"--max-length {self.view.max_length:,}"
        yield "cut to fit", f"{_count(found.num_truncated, 'row')} ({limit})"
        if self.target is not None:
            yield "refusal", self._refusal(found, self.target)
        if found.prefix_lengths:
            yield "prefix k", self._bars(found.prefix_lengths)

    def _refusal(self, found: Survey, target: RefusalToken) -> Text:
        share, is_auto = target.share, self.view.config.refusal_text == AUTO
        how = "the commonest first token" if is_auto else "from --refusal-text"
        text = Text(f"{_named(target, self.glyphs)}, {how}")
        if share is None and is_auto:
            text = Text(
                f"{_named(target, self.glyphs)} is assumed: these rows do not tell which responses are refusals"
            )
            return text.append("\ntraining them needs refusal_text (here: --refusal-text)", "yellow")
        if share is None:
            return text.append("; no triple to compare it with")
        text.append(f"; {share:.0%} of {_count(found.chosen_first_ids.total(), 'safe response')} begin with it")
        if share < 0.5:
            text.append("\nfew: RTO would train a token that most refusals do not go on from", "yellow")
        if target.share_of_harmful is not None and target.share_of_harmful > 0.5:
            text.append(f"\nso do {target.share_of_harmful:.0%} of the harmful ones: it breaks nothing off", "yellow")
        return text

    def _bars(self, values: list[int]) -> Table:
        grid, bins = Table.grid(padding=(0, 1)), histogram(values)
        grid.add_column(justify="right")
        grid.add_column(justify="right")
        most = max(count for _, count in bins)
        for label, count in bins:
            length = max(round(_BAR_WIDTH * count / most), count > 0)
            grid.add_row(label, f"{count:,}", Text(self.glyphs.bar * length, "cyan"))
        return grid


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _named(target: RefusalToken, glyphs: Glyphs) -> str:
    return f"'{visible(target.text, glyphs)}' (id {target.id})"


def _visible_character(character: str, glyphs: Glyphs) -> str:
    if character == "\n":
        return f"{glyphs.newline}\n"
    invisible = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    if invisible or (glyphs is ASCII and not character.isascii()):
        return character.encode("unicode_escape").decode()
    return character


def _state(row: Row, place: int) -> State:
    if row.labels[place] == IGNORE_INDEX:
        return "read"
    return "rto" if row.rto_mask[place] else "mle"


def _decode(tokenizer: Any, ids: list[int], start: int, stop: int) -> str:
    """Text of `ids[start:stop]` as it follows what stands before: alone, many tokenizers drop a leading space."""
    options = {"clean_up_tokenization_spaces": False}
    before = tokenizer.decode(ids[max(0, start - 1) : start], **options) if start else ""
    joint = tokenizer.decode(ids[max(0, start - 1) : stop], **options)
    return joint[len(before) :] if joint.startswith(before) else tokenizer.decode(ids[start:stop], **options)


def _likeness(columns: list[str]) -> str:
    if "prompt" in columns and "response" in columns:
        return "That is one response per prompt, as in model outputs; training needs a safe and a harmful one."
    if not set(columns) & set(_ANSWER_COLUMNS):
        return "There is no response in it: it looks like prompts for evaluation."
    return ""
