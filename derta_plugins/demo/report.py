"""The table for the terminal, and the files of a finished run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from derta_plugins.demo import charts
from derta_plugins.demo.page import html_page

Results = Mapping[str, Any]


def attack_table(results: Results) -> Table:
    """Attack success rate in percent, one row per method, one column per attack."""
    count = results["attacked_requests"]
    depths = [depth if depth.endswith("%") else f"{depth} tok" for depth in results["prefill_tokens"]]
    title = f"Attacks that succeed, % of {count} held-out harmful requests"
    table = _table(title, "trained with", "direct", *depths, "document")
    for method, measured in _rows(results).items():
        asr = measured["asr"]
        rates = [asr["direct"], *asr["prefill"].values(), asr["completion"]]
        table.add_row(_name(method), *map(_percent, rates), style="bold" if method == "derta" else None)
    return table


def quality_table(results: Results) -> Table:
    """What the models keep and what is not stopped, in percent, and what the training took; one column per method."""
    rows = _rows(results)
    table = _table("The rest of the picture, %", "measured", *map(_name, rows))
    flanks = {method: measured["not_stopped"] for method, measured in rows.items()}
    training = {method: measured["training"] for method, measured in rows.items()}
    lines = {
        "benign requests answered": [_percent(measured["helpfulness"]) for measured in rows.values()],
        "benign look-alikes refused": [_percent(measured["over_refusal"]) for measured in rows.values()],
        "refusals that are well-formed": [_percent(measured["well_formed_refusal"]) for measured in rows.values()],
        "not stopped: two-persona attack": [_percent(flank["two_persona"]) for flank in flanks.values()],
        "benign documents refused": [_percent(flank["declarative_lookalike_refusal"]) for flank in flanks.values()],
        "training rows": [str(cost["rows"]) for cost in training.values()],
        "target tokens": [str(cost["supervised_tokens"]) for cost in training.values()],
        "training seconds": [f"{cost['seconds']:.0f}" for cost in training.values()],
    }
    for name, values in lines.items():
        table.add_row(name, *values)
    return table


def _table(title: str, first: str, *others: str) -> Table:
    """Table that fits 80 columns: a left column, and right-aligned ones."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def write_report(results: Results, output_dir: Path) -> list[Path]:
    """Write results.json, report.png and report.html into `output_dir`; return their paths."""
    paths = [output_dir / name for name in ("results.json", "report.png", "report.html")]
    paths[0].write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    paths[1].write_bytes(charts.png(results))
    paths[2].write_text(html_page(results), encoding="utf-8")
    return paths


def _rows(results: Results) -> dict[str, Any]:
    return {"base": results["base"], **results["methods"]}


def _name(method: str) -> str:
    return charts.METHOD_NAMES.get(method, "base (before)")


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f}"
