"""The table for the terminal, and the files of a finished run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from derta_plugins.demo import charts
from derta_plugins.demo.page import html_page

Results = Mapping[str, Any]


def attack_table(results: Results) -> Table:
    """Attack success rate in percent, one row per method, one column per attack."""
    count = results["attacked_requests"]
    table = Table(title=f"Attacks that succeed, % of {count} held-out harmful requests", title_justify="left")
    table.add_column("trained with")
    table.add_column("direct", justify="right")
    for depth in results["prefill_tokens"]:
        table.add_column(depth if depth.endswith("%") else f"{depth} tok", justify="right")
    table.add_column("document", justify="right")
    for method, measured in _rows(results).items():
        asr = measured["asr"]
        rates = [asr["direct"], *asr["prefill"].values(), asr["completion"]]
        table.add_row(_name(method), *map(_percent, rates), style="bold" if method == "derta" else None)
    return table


def quality_table(results: Results) -> Table:
    """What the models keep and what is not stopped, in percent, and what the training took."""
    table = Table(title="The rest of the picture, %", title_justify="left")
    for column in ("trained with", "benign\nanswered", "look-alikes\nrefused", "well-formed\nrefusals",
                   "two-persona\nattack", "benign document\nrefused", "rows", "target\ntokens", "seconds"):  # fmt: skip
        table.add_column(column, justify="left" if column == "trained with" else "right")
    for method, measured in _rows(results).items():
        flanks, training = measured["not_stopped"], measured["training"]
        rates = (measured["helpfulness"], measured["over_refusal"], measured["well_formed_refusal"],
                 flanks["two_persona"], flanks["declarative_lookalike_refusal"])  # fmt: skip
        cost = (str(training["rows"]), str(training["supervised_tokens"]), f"{training['seconds']:.0f}")
        table.add_row(_name(method), *map(_percent, rates), *cost, style="bold" if method == "derta" else None)
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
