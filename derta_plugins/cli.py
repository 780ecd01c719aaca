"""The command `derta`: parses, calls, prints. No logic, and no import that `--help` would have to wait for."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from derta_plugins import __version__
from derta_plugins.core.chat import ChatTemplateError
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.records import BadRecordError
from derta_plugins.core.refusal_token import RefusalTokenError
from derta_plugins.plugin_manager import PluginError
from derta_plugins.readers import RecordsNotFoundError, load_records
from derta_plugins.recipe.checks import RecipeError

app = typer.Typer(
    help="DeRTa safety training: refuse at any position, not only at the first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipe_app = typer.Typer(help="One recipe for every host.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
_KNOBS = "Knobs of DeRTaConfig (change the rows)"
# the extra of this package that brings a missing module
_EXTRAS = {**dict.fromkeys(("datasets", "transformers", "tokenizers", "jinja2", "trl", "peft"), "trl")}
_EXTRAS |= {"matplotlib": "demo", "yaml": "trl"}
_EXPECTED_ERRORS = (
    BadRecordError,
    ChatTemplateError,
    ConfigError,
    PluginError,
    RecordsNotFoundError,
    RefusalTokenError,
)
# what the messages call a knob, where the command line has another form for it
_FLAGS = {"apply_chat_template=False": "--no-chat-template", "allow_first_piece=True": "--allow-first-piece"}


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why."""


def main() -> None:
    """Run the command line; the entry point of the script `derta`."""
    # the libraries' own chatter would stand between our lines
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"derta {__version__}")
        raise typer.Exit


def _ratio(text: str) -> float | None:
    """A number such as `0.25` or `1/3`; None for `none`."""
    if text.strip().lower() == "none":
        return None
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"`zero_prefix_ratio` must be a number in [0, 1], or none, got {text!r}.") from error


def _knob(flag: str, help_text: str) -> Any:
    return typer.Option(flag, help=help_text, rich_help_panel=_KNOBS)


_RefusalText = Annotated[str, _knob("--refusal-text", "Word whose token is the RTO target; auto: the commonest.")]
_FirstPiece = Annotated[bool, _knob("--allow-first-piece", "Take the first piece of a longer refusal text.")]
_TokenizerName = Annotated[str | None, typer.Option("--tokenizer", help="Folder or hub name of your tokenizer.")]


@app.callback()
def derta(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """DeRTa safety training: refuse at any position, not only at the first."""


@app.command()
def show(
    source: Annotated[
        str, typer.Argument(help="File (json, jsonl, csv, parquet), folder, hub name, or reader:source.")
    ],
    tokenizer: _TokenizerName = None,
    limit: Annotated[int, typer.Option(help="Records to print.", min=0)] = 3,
    index: Annotated[int | None, typer.Option(help="Print the record at this position (from 0) instead.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Print long texts whole.")] = False,
    max_records: Annotated[int, typer.Option(help="Records to read for the summary.", min=1)] = 20_000,
    max_length: Annotated[int, typer.Option(help="Longest row, in tokens.", min=1)] = 1024,
    split: Annotated[str, typer.Option(help="Split of a folder or hub name.")] = "train",
    epoch: Annotated[int, typer.Option(help="Epoch whose draws to show (resample_each_epoch).", min=0)] = 0,
    method: Annotated[str, _knob("--method", "derta, vanilla or recaug.")] = DeRTaConfig.method,
    refusal_text: _RefusalText = DeRTaConfig.refusal_text,
    allow_first_piece: _FirstPiece = False,
    prefix_unit: Annotated[str, _knob("--prefix-unit", "What k counts: token or word.")] = DeRTaConfig.prefix_unit,
    zero_prefix_ratio: Annotated[str, _knob("--zero-prefix-ratio", "Share of k = 0; none: k uniform.")] = "1/3",
    num_prefixes: Annotated[int, _knob("--num-prefixes", "MLE rows per triple.")] = DeRTaConfig.num_prefixes,
    rto_ratio: Annotated[float, _knob("--rto-ratio", "Share of triples with RTO.")] = DeRTaConfig.rto_ratio,
    rto_keep_ratio: Annotated[
        float, _knob("--rto-keep-ratio", "Share of RTO places that are trained.")
    ] = DeRTaConfig.rto_keep_ratio,
    rto_turns: Annotated[str, _knob("--rto-turns", "RTO on the last answer, or all.")] = DeRTaConfig.rto_turns,
    no_chat_template: Annotated[bool, _knob("--no-chat-template", "Use plain-text prompts as they are.")] = False,
    transform: Annotated[str | None, _knob("--transform", "Installed transform that builds the rows.")] = None,
    on_bad_record: Annotated[str, _knob("--on-bad-record", "skip (and explain), or error.")] = "skip",
    seed: Annotated[int, _knob("--seed", "Seed of every draw.")] = DeRTaConfig.seed,
) -> None:
    """Print records as the model will see them, what each token trains, and a summary of the whole file."""
    given = dict(locals())
    with _readable_errors(), _quiet():
        knobs = {knob.name: given[knob.name] for knob in fields(DeRTaConfig) if knob.name in given}
        knobs |= {"zero_prefix_ratio": _ratio(zero_prefix_ratio), "apply_chat_template": not no_chat_template}
        config = DeRTaConfig(**knobs)

        from derta_plugins.show import show_records, with_progress
        from derta_plugins.survey import View, word_tokenizer

        console = Console(highlight=False)
        records = load_records(source, split=split)
        if tokenizer is None:
            console.print("no --tokenizer: one token per word; pass yours to see what your model sees", style="dim")
            used = word_tokenizer(with_progress(records, max_records, "Reading words"))
        else:
            used = _load_tokenizer(tokenizer)
        view = View(used, config, max_length, epoch)
        options = {"limit": limit, "index": index, "max_records": max_records, "is_full": full}
        show_records(records, view, console, source=source, **options)


@app.command()
def doctor(
    tokenizer: _TokenizerName = None,
    refusal_text: Annotated[str, typer.Option(help="Word to look up in the tokenizer.")] = "Sorry",
    allow_first_piece: Annotated[
        bool, typer.Option("--allow-first-piece", help="Take the first piece of a longer refusal text.")
    ] = False,
) -> None:
    """Print which hosts are here, whether their adapters work, and what a tokenizer means for DeRTa."""
    from derta_plugins.doctor import print_environment, print_tokenizer, tokenizer_findings

    console = Console(highlight=False)
    with _readable_errors(), _quiet():
        loaded = None if tokenizer is None else _load_tokenizer(tokenizer)
        print_environment(console)
        if loaded is None:
            return
        findings = tokenizer_findings(loaded, refusal_text, allow_first_piece=allow_first_piece)
        print_tokenizer(str(tokenizer), findings, console)
        if problems := [finding.problem for finding in findings if finding.problem]:
            raise UsageError(f"{tokenizer}: {' '.join(problems)}")


@app.command()
def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of the table.")] = False,
) -> None:
    """Print every installed plugin, what it is, whose, and whether it works; exit code 2 if one is broken."""
    from derta_plugins import plugin_status

    console = Console(highlight=False)
    with _readable_errors():
        with nullcontext() if as_json else console.status("Loading plugins"):
            statuses = plugin_status.plugin_statuses()
        if as_json:
            typer.echo(plugin_status.as_json(statuses))
        else:
            plugin_status.print_plugins(statuses, console)
        if sentence := plugin_status.faults(statuses):
            raise UsageError(sentence)


@recipe_app.command("convert")
def convert_recipe(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    to: Annotated[str, typer.Option("--to", help="The host: trl, axolotl or llamafactory.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the host's files.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> None:
    """Write a recipe as a host's config, and say what the host has no counterpart for."""
    with _readable_errors():
        from derta_plugins.recipe.convert import convert, write
        from derta_plugins.recipe.reading import read_recipe

        conversion = convert(read_recipe(recipe), to, output_dir=str(output_dir), source=recipe.name)
        for path in write(conversion, output_dir, is_forced=force):
            typer.echo(f"wrote {path}")
        typer.echo("\n".join(conversion.remarks))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of data, weights and draws.", min=0)] = 0,
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("derta-demo"),
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1 ...")] = "cpu",
    layout: Annotated[str, typer.Option(help="Layout of DeRTa's rows: rows or branch.")] = DeRTaConfig.layout,
) -> None:
    """Train a tiny model with and without DeRTa, attack both, and print what changed."""
    with _readable_errors():
        from derta_plugins.demo.run import run_demo
        from derta_plugins.demo.training import Recipe

        recipe, console = Recipe(layout=DeRTaConfig(layout=layout).layout), Console(highlight=False)
        run_demo(seed=seed, output_dir=output_dir, device=device, console=console, recipe=recipe)


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    if not Path(name).exists() and name.startswith((".", "/", "~")):
        raise UsageError(f"--tokenizer {name}: no such folder.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises many kinds; the cause is kept
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"--tokenizer {name}: cannot be loaded ({reason}); give a folder with a saved tokenizer or a hub name."
        ) from error


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors with a known cause become one sentence on stderr and exit code 2; others keep their traceback."""
    try:
        yield
    except RecipeError as error:  # speaks of keys in a file, not of options
        _fail(str(error))
    except (*_EXPECTED_ERRORS, UsageError) as error:
        _fail(_in_command_words(str(error)))
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        _fail(f"`{module}` is not installed; it comes with pip install 'derta-plugins[{_EXTRAS[module]}]'.")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(message: str) -> None:
    typer.echo(f"derta: {message}", err=True)
    raise typer.Exit(2) from None


def _in_command_words(message: str) -> str:
    """`message` with the knobs of `DeRTaConfig` written as the options of this command."""
    for knob, flag in _FLAGS.items():
        message = message.replace(f"`{knob}`", knob).replace(knob, flag)
    names = "|".join(knob.name for knob in fields(DeRTaConfig))
    option = lambda found: f"--{found[1].replace('_', '-')}"  # noqa: E731
    message = re.sub(rf"`?\b({names})='?(\w+)'?`?", lambda found: f"{option(found)} {found[2]}", message)
    return re.sub(rf"`({names})`", option, message)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep our own log lines back: what they warn of is in the tables, in context."""
    logger = logging.getLogger("derta_plugins")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
