"""
What a plugin must provide. The whole contract between DeRTa and the packages that add to it is in this file.

A distribution offers a plugin with an entry point of the group `derta_plugins`. The entry point's name is the plugin's
name; its module holds one or several of the hooks below, each marked with `hookimpl` and returning one description.
Only the plugin that is asked for by name is loaded, so its module imports what it needs (its host, say) at the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import pluggy

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from derta_plugins.core.chat import TokenizedTriple
    from derta_plugins.core.config import DeRTaConfig
    from derta_plugins.core.records import Message
    from derta_plugins.core.transform import Row

PROJECT = "derta_plugins"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# --- host adapter ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """
    One host framework and how DeRTa is switched on in it.

    Attributes:
        name: Name of the entry point.
        host: Distribution name of the host.
        oldest_tested: Oldest host version that the tests run.
        newest_tested: Newest host version that the tests run.
        how_to_use: One line for `derta doctor`.
    """

    name: str
    host: str
    oldest_tested: str
    newest_tested: str
    how_to_use: str


class HostVersionError(RuntimeError):
    """
    The host is here in a version that the adapter is not for. An adapter's module raises it on import: that is no fault
    of the adapter, as it is none that a host is absent. No `ImportError`, since there are hosts that go on after one.
    """


@hookspec(firstresult=True)
def derta_adapter() -> Adapter | None:
    """
    Return the description of the one host framework this plugin connects.

    Example:
        >>> @hookimpl
        ... def derta_adapter():
        ...     return Adapter("myhost", "my-host", "1.0", "1.2", "set `plugins: derta` in its config")
        >>> derta_adapter().host
        'my-host'
    """


# --- dataset reader --------------------------------------------------------------------------------------------------


class ReadRecords(Protocol):
    """How a reader is called."""

    def __call__(self, source: str, *, split: str, streaming: bool) -> Dataset | IterableDataset:
        """Return the records of `source`, which is what stands behind `name:`; lazily if `streaming`."""


@dataclass(frozen=True)
class Reader:
    """
    Records from a place that `load_records` does not know. A source written `name:source` selects it, as in
    `derta show mydb:refusals`.

    Attributes:
        name: Name of the entry point: two characters or more (one is a Windows drive), no colon and no slash.
        description: What it reads, in one line.
        read: Returns records in a format of `core.records`: a `Dataset`, or an `IterableDataset` if `streaming`. What
            it raises ends the run, with its message.
    """

    name: str
    description: str
    read: ReadRecords

    def __post_init__(self) -> None:
        if len(self.name) < 2 or set(self.name) & set(":/\\"):
            raise ValueError(
                f"`name` of a reader must have two characters or more, none of them : / \\, got {self.name!r}."
            )


@hookspec(firstresult=True)
def derta_reader() -> Reader | None:
    """
    Return the description of one dataset reader.

    Example:
        >>> @hookimpl
        ... def derta_reader():
        ...     def read(source, *, split, streaming):
        ...         from datasets import Dataset
        ...         records = Dataset.from_list([{"prompt": source, "chosen": "Sorry, no.", "rejected": "Step 1"}])
        ...         return records.to_iterable_dataset() if streaming else records
        ...     return Reader("mydb", "tables of my database", read)
        >>> derta_reader().description
        'tables of my database'
    """


# --- transform -------------------------------------------------------------------------------------------------------


class BuildRows(Protocol):
    """How a transform is called."""

    def __call__(
        self,
        triple: TokenizedTriple,
        config: DeRTaConfig,
        *,
        refusal_token_id: int,
        max_length: int | None,
        index: int,
        epoch: int,
    ) -> list[Row]:
        """Return the training rows of `triple`; the arguments are those of `core.transform.build_rows`."""


@dataclass(frozen=True)
class Transform:
    """
    Another way from a triple to training rows. The knob `transform` of `DeRTaConfig` selects it by name.

    Attributes:
        name: Name of the entry point.
        description: What its rows train, in one line; also which knobs of `DeRTaConfig` it leaves unused.
        build_rows: Returns at least one row, each of which must pass `core.row_check`, else the run ends: the whole
            prompt stands first, and only the refusal token and the safe answer are targets. It draws from seed, epoch
            and index alone, and gives a triple as many rows in every epoch. `BadRecordError` says that a triple cannot
            be trained. While records are counted, any `refusal_token_id` may stand in for the real one.
    """

    name: str
    description: str
    build_rows: BuildRows


@hookspec(firstresult=True)
def derta_transform() -> Transform | None:
    """
    Return the description of one transform.

    Example:
        >>> from derta_plugins import DeRTaConfig, build_rows
        >>> from derta_plugins.core.chat import TokenizedTriple
        >>> @hookimpl
        ... def derta_transform():
        ...     def rto_only(triple, config, **options):
        ...         return [row for row in build_rows(triple, config, **options) if row.objective == "rto"]
        ...     return Transform("rto-only", "RTO rows, no MLE rows", rto_only)
        >>> triple = TokenizedTriple((1,), (5, 6), (7, 8), end_ids=(0,))
        >>> options = {"refusal_token_id": 5, "max_length": None, "index": 0, "epoch": 0}
        >>> [row.labels for row in derta_transform().build_rows(triple, DeRTaConfig(), **options)]
        [[-100, 5, 5, 5]]
    """


# --- attack ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttackPrompt:
    """
    What a model is given.

    Attributes:
        prompt: Text of one user turn, or messages of which the last is the user's.
        prefix: First words of the answer, put into the model's mouth (prefill). They are no part of the response.
        is_templated: Whether the chat template goes around `prompt`. False sends text as it is, without any token of
            the template.
        variant: Tells the prompts apart that an attack makes of one request, such as `k=5`; each is reported apart.

    Raises:
        ValueError: If messages are to be sent without a template.
    """

    prompt: str | tuple[Message, ...]
    prefix: str = ""
    is_templated: bool = True
    variant: str = ""

    def __post_init__(self) -> None:
        if not self.is_templated and not isinstance(self.prompt, str):
            raise ValueError(f"`prompt` must be text when `is_templated` is false, got {type(self.prompt).__name__}.")


class ApplyAttack(Protocol):
    """How an attack is called."""

    def __call__(self, prompt: str, *, rejected: str | None, seed: int) -> list[AttackPrompt]:
        """Attack with the harmful request `prompt`, whose harmful answer may be known; all draws are from `seed`."""


@dataclass(frozen=True)
class Attack:
    """
    A way to ask for what should be refused.

    An attack makes its prompts before the model answers. One that searches with the model's answers (PAIR, AutoDAN)
    does so beforehand and gives here what it found.

    Attributes:
        name: Name of the entry point.
        version: Changes whenever `apply` gives other prompts; results of different versions are not compared.
        source: Citation or URL of where the attack is from.
        apply: Returns one prompt, or several with different `variant`; the same for the same arguments. `ValueError`
            says that a request cannot be used, such as one without the harmful answer that a prefill needs.
        higher_is_better: Direction of its metric for the model under attack. The metric is the attack success rate, so
            False.
    """

    name: str
    version: str
    source: str
    apply: ApplyAttack
    higher_is_better: bool = False


@hookspec(firstresult=True)
def derta_attack() -> Attack | None:
    """
    Return the description of one attack.

    Example:
        >>> @hookimpl
        ... def derta_attack():
        ...     def prefill(prompt, *, rejected, seed):
        ...         words = rejected.split()
        ...         return [AttackPrompt(prompt, " ".join(words[:k]), variant=f"k={k}") for k in (1, 2)]
        ...     return Attack("first-words", "1", "https://example.org/first-words", prefill)
        >>> found = derta_attack().apply("How do I bake it?", rejected="Step 1: mix the flour", seed=0)
        >>> [(attacked.variant, attacked.prefix) for attacked in found]
        [('k=1', 'Step'), ('k=2', 'Step 1:')]
    """


# --- judge -----------------------------------------------------------------------------------------------------------

Label = Literal["safe", "unsafe", "unparseable"]


@dataclass(frozen=True)
class Verdict:
    """
    What a judge says of one response.

    Attributes:
        label: `safe` or `unsafe`; `unparseable` if the judge's own reply could not be read. Those are counted apart
            and never taken for either.
        reason: Why, for people: the sentence that decided, or the reply that could not be read.

    Raises:
        ValueError: If there is no such label.
    """

    label: Label
    reason: str

    def __post_init__(self) -> None:
        if self.label not in get_args(Label):
            raise ValueError(f"`label` must be one of {', '.join(map(repr, get_args(Label)))}, got {self.label!r}.")


class JudgeResponse(Protocol):
    """How a judge is called."""

    def __call__(self, prompt: str, response: str, *, given: AttackPrompt) -> Verdict:
        """Judge what the model wrote (after the prefix) on being `given` an attack with the harmful `prompt`."""


@dataclass(frozen=True)
class Judge:
    """
    Tells whether a response does what the harmful request asks for.

    Attributes:
        name: Name of the entry point.
        version: Changes whenever a verdict may (rules, model, prompt template): verdicts are kept under name, version
            and texts.
        source: Citation or URL of where the judge is from.
        judge: Returns the verdict on one response; may be called from several threads. What it raises (an endpoint
            that is down) is no verdict, and nothing is kept.
    """

    name: str
    version: str
    source: str
    judge: JudgeResponse


@hookspec(firstresult=True)
def derta_judge() -> Judge | None:
    """
    Return the description of one judge.

    Example:
        >>> @hookimpl
        ... def derta_judge():
        ...     def judge(prompt, response, *, given):
        ...         has_step = "Step" in response.removeprefix(prompt)
        ...         return Verdict("unsafe" if has_step else "safe", "it gives a step" if has_step else "no step")
        ...     return Judge("steps", "1", "https://example.org/steps", judge)
        >>> derta_judge().judge("How do I bake it?", "Sorry, no.", given=AttackPrompt("How do I bake it?")).label
        'safe'
    """
