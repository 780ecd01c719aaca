"""
The tables of steps in RESULTS.md as a picture: how much less time and memory a step takes than in the authors' layout.

    python -m tests.benchmarks.picture  # writes RESULTS.svg beside RESULTS.md
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLORS = {"stock": "#8c959f", "rows": "#e6a100", "branch": "#2f83c4"}
PANELS = {"time": "time of the authors' step / time of it", "peak memory": "memory of the authors' step / memory of it"}


def steps_of(text: str) -> dict[tuple[str, str, str], dict[str, tuple[float, float]]]:
    """Of (vocabulary, q/h/r, m) and variant: the authors' time and memory over its own."""
    found: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = {}
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 11 and cells[3] in COLORS:
            lengths, prefixes, vocabulary, variant = cells[:4]
            ratios = float(cells[6]), float(cells[10])
            found.setdefault((vocabulary, lengths, prefixes), {})[variant] = ratios
    return found


def draw(steps: dict[tuple[str, str, str], dict[str, tuple[float, float]]]) -> Figure:
    """A panel for time and one for memory; a group of bars for each setting, longer is better."""
    figure = Figure(figsize=(9, 1 + 0.42 * len(steps)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (title, label) in enumerate(PANELS.items()):
        axes = panels[panel]
        for number, (variant, color) in enumerate(COLORS.items()):
            rows = [row + 0.27 * (number - 1) for row in range(len(steps))]
            values = [ratios[variant][panel] for ratios in steps.values()]
            bars = axes.barh(rows, values, height=0.25, color=color, label=variant)
            axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=6, padding=2)
        axes.axvline(1, color="#1f2328", linewidth=0.8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(steps)), [f"{v}, {lengths}, m = {m}" for v, lengths, m in steps], fontsize=8)
    panels[0].set_ylim(len(steps) - 0.5, -0.5)
    panels[1].legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def main(path: Path = HERE / "RESULTS.svg") -> None:
    """Text stays text, and the same tables give the same file."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "RESULTS"}):
        draw(steps_of((HERE / "RESULTS.md").read_text(encoding="utf-8"))).savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
