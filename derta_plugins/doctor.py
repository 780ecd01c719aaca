"""`derta doctor`: which hosts are here, whether DeRTa works in them, and what a tokenizer means for DeRTa."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import derta_plugins
from derta_plugins._autoload import PATCHES, is_installed
from derta_plugins.core.chat import ChatTemplateError, turn_layout
from derta_plugins.core.refusal_token import AUTO, RefusalTokenError, resolve_refusal_token
from derta_plugins.hookspecs import Adapter
from derta_plugins.launch import STARTUP
from derta_plugins.plugin_manager import HostMissingError, OtherKindError, get_adapter, plugin_names

HOSTS = ("trl", "axolotl", "llamafactory")
NOT_INSTALLED = "not installed"
STARTUP_FILE = "derta_plugins_autoload.pth"
_LIBRARIES = ("torch", "transformers", "datasets")


@dataclass(frozen=True)
class HostStatus:
    """
    One host framework, as it is here.

    Attributes:
        name: Name of the adapter.
        installed: Version of the host, or `not installed`.
        tested: Versions that the adapter's tests run, or that its extra asks for.
        status: `ok`, or what is wrong.
        how_to_use: How DeRTa is switched on in it.
    """

    name: str
    installed: str
    tested: str
    status: str
    how_to_use: str


@dataclass(frozen=True)
class Finding:
    """One line about a tokenizer or a host; `problem` is empty if all is well."""

    name: str
    value: str
    problem: str = ""


def host_statuses() -> Iterator[HostStatus]:
    """State of every known host and of every further installed adapter. Imports the hosts that are there."""
    names = plugin_names()
    for name in [*HOSTS, *(name for name in names if name not in HOSTS)]:
        try:
            yield _host_status(name, has_adapter=name in names)
        except OtherKindError:  # a reader, a judge ...: `derta plugins` lists them
            continue


def startup_finding() -> Finding:
    """How hosts learn of DeRTa in this Python: by the start-up file, by `derta_plugins.launch`, or not at all."""
    name, launch = "start-up code", "put `python -m derta_plugins.launch` before the command"
    file = next((path for entry in sys.path if (path := Path(entry, STARTUP_FILE)).is_file()), None)
    is_off = os.environ.get("DERTA_AUTOLOAD") == "0"
    if is_installed():
        by_launch = STARTUP in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        way = "derta_plugins.launch" if by_launch else file if file and not is_off else "a call of its `install`"
        return Finding(name, f"active, by {way}")
    if is_off:
        return Finding(name, f"switched off by DERTA_AUTOLOAD=0; {launch} where DeRTa is wanted")
    state = f"{file} is there, but this Python does not run it" if file else f"no {STARTUP_FILE} in this environment"
    return Finding(name, state, f"reinstall derta-plugins, or {launch}")


def patch_findings() -> Iterator[Finding]:
    """For each installed host that is extended at its import: whether it has what is extended there."""
    for module, patch in PATCHES.items():
        host = module.partition(".")[0]
        if _installed(host) == NOT_INSTALLED:
            continue
        try:
            missing = ", ".join(import_module(patch).missing_points())
        except Exception as error:  # as with an adapter: anything may fail in it
            missing = f"broken: {_cause(error)}"
        problem = f"DeRTa does not work in this {host}" if missing else ""
        yield Finding(f"{host} patch points", missing or "all found", problem)


def tokenizer_findings(tokenizer: Any, refusal_text: str, *, allow_first_piece: bool = False) -> list[Finding]:
    """What DeRTa needs of a tokenizer: chat template, end of turn, padding, and the refusal token."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    no_template = "" if has_template else "the tokenizer has no chat template; set `tokenizer.chat_template`."
    pad = tokenizer.pad_token
    findings = [
        Finding("kind", f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens"),
        Finding("chat template", "yes" if has_template else "missing", no_template),
        Finding(
            "pad token", "missing (most hosts then pad with the end token)" if pad is None else _named(tokenizer, pad)
        ),
    ]
    if has_template:
        findings.append(_end_of_turn(tokenizer))
    return [*findings, *_refusal_token(tokenizer, refusal_text, allow_first_piece)]


def print_environment(console: Console) -> None:
    """Print versions and the table of hosts."""
    versions = {"derta-plugins": derta_plugins.__version__, "python": platform.python_version()}
    versions |= {name: _installed(name) for name in _LIBRARIES}
    console.print(Text(", ".join(f"{name} {found}" for name, found in versions.items())))
    with console.status("Loading adapters"):
        statuses = list(host_statuses())
        findings = [startup_finding(), *patch_findings()]
    table = Table(show_lines=False)
    table.add_column("host", no_wrap=True, style="bold")
    table.add_column("installed", overflow="fold")
    table.add_column("tested", overflow="fold")
    table.add_column("adapter", overflow="fold", ratio=1)
    for host in statuses:
        style = {"ok": "green"}.get(host.status.split(",")[0], "red" if host.status.startswith("broken") else "dim")
        table.add_row(host.name, host.installed, host.tested, Text(host.status, style))
    console.print(table)
    for host in statuses:
        if host.how_to_use:
            console.print(Text(f"{host.name}: ", "bold").append(host.how_to_use, "default not bold"))
    for finding in findings:
        text = f"{finding.value}; {finding.problem}" if finding.problem else finding.value
        style = "red not bold" if finding.problem else "default not bold"
        console.print(Text(f"{finding.name}: ", "bold").append(text, style))


def print_tokenizer(name: str, findings: list[Finding], console: Console) -> None:
    """Print what was found out about the tokenizer `name`."""
    table = Table(title=Text(f"tokenizer {name}", "bold"), title_justify="left", show_header=False, expand=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(finding.name, Text(finding.value, "red" if finding.problem else ""))
    console.print()
    console.print(table)


def _host_status(name: str, *, has_adapter: bool) -> HostStatus:
    if not has_adapter:
        status = "broken: not registered; reinstall derta-plugins"
        return HostStatus(name, _installed(name), _extra_range(name), status, "")
    try:
        adapter = get_adapter(name)
    except OtherKindError:
        raise
    except Exception as error:  # an adapter, or the host it imports, may fail in any way; doctor says how
        is_absent = isinstance(error, HostMissingError) and _installed(name) == NOT_INSTALLED
        status = "host missing" if is_absent else f"broken: {_cause(error)}"
        install = f"pip install 'derta-plugins[{name}]'" if is_absent and name in HOSTS else ""
        return HostStatus(name, _installed(name), _extra_range(name), status, install)
    installed = _installed(adapter.host)
    tested = " to ".join(dict.fromkeys((adapter.oldest_tested, adapter.newest_tested)))
    return HostStatus(name, installed, tested, _compare(installed, adapter), adapter.how_to_use)


def _compare(installed: str, adapter: Adapter) -> str:
    """`ok`, with a word of warning outside the tested versions; a newer patch release counts as tested."""
    here, oldest, newest = (_release(text) for text in (installed, adapter.oldest_tested, adapter.newest_tested))
    if here[:2] > newest[:2]:
        return "ok, but newer than tested"
    return "ok, but older than tested" if here < oldest else "ok"


def _release(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match.group().split("."))) if match else ()


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return NOT_INSTALLED


def _extra_range(name: str) -> str:
    """Versions of the host that our extra of the same name asks for; empty if there is none."""
    try:
        lines = requires("derta-plugins") or []
    except PackageNotFoundError:
        return ""
    for line in lines:
        requirement, _, marker = line.partition(";")
        if re.search(rf"extra == ['\"]{name}['\"]", marker) and (
            match := re.match(rf"{name}\s*([<>=!~].*)", requirement)
        ):
            return ", ".join(sorted(match.group(1).strip().split(","), reverse=True))
    return ""


def _cause(error: BaseException) -> str:
    reason = error.__cause__ or error
    return f"{str(reason).strip() or type(reason).__name__}".splitlines()[0]


def _named(tokenizer: Any, token: str) -> str:
    return f"{token!r} (id {tokenizer.convert_tokens_to_ids(token)})"


def _end_of_turn(tokenizer: Any) -> Finding:
    try:
        ids = turn_layout(tokenizer).end_ids
    except ChatTemplateError as error:
        return Finding("end of turn", "missing", str(error))
    return Finding("end of turn", ", ".join(f"{tokenizer.decode([one])!r} (id {one})" for one in ids))


def _refusal_token(tokenizer: Any, text: str, allow_first_piece: bool) -> list[Finding]:
    if text == AUTO:
        return [Finding("refusal token", "taken from your records: see `derta show`")]
    try:
        token = resolve_refusal_token(tokenizer, text, allow_first_piece=allow_first_piece)
    except (RefusalTokenError, ChatTemplateError) as error:
        return [Finding("refusal token", str(error), str(error))]
    middle = "several tokens" if token.mid_answer_id is None else f"id {token.mid_answer_id}"
    return [
        Finding("refusal token", f"{token.text!r} (id {token.id}) for {text!r}, where an answer starts"),
        Finding("in mid-answer", f"{middle}; RTO trains id {token.id} at every place"),
    ]
