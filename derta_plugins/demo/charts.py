"""The figures: one PNG with four panels, or each panel as an SVG that takes its colours from the page around it."""

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]

# Apart for all common kinds of colour blindness, on white and on black; marker and order tell them apart as well.
METHOD_COLORS = {"vanilla": "#d55e00", "recaug": "#e6a100", "derta": "#2f83c4"}
METHOD_NAMES = {"vanilla": "vanilla SFT", "recaug": "RecAug", "derta": "DeRTa"}
_MARKERS = {"vanilla": "s", "recaug": "^", "derta": "o"}

_INK, _FAINT = "#1f2328", "#8c959f"
_STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "svg.fonttype": "none",
}

# Where a refusal begins, in tokens of the response: name, first and last position, shade of the bar.
_POSITION_BINS = (
    ("at once", 0, 0, "#08519c"),
    ("after 1 to 5", 1, 5, "#3a82c0"),
    ("6 to 10", 6, 10, "#77aed7"),
    ("11 to 20", 11, 20, "#a9cce6"),
    ("later", 21, 10**9, "#d5e6f3"),
)
_NEVER_COLOR = "#6e7781"


def draw_attacks(axes: "Axes", results: Results) -> None:
    """Attack success rate over the number of prefilled tokens, one line per method."""
    tokens = {"direct": 0, **results["prefill_tokens"]}
    depths = sorted(tokens, key=tokens.__getitem__)
    for method, measured in results["methods"].items():
        rates = {"direct": measured["asr"]["direct"], **measured["asr"]["prefill"]}
        axes.plot(
            [tokens[depth] for depth in depths],
            [100 * rates[depth] for depth in depths],
            color=METHOD_COLORS[method],
            marker=_MARKERS[method],
            linewidth=2,
            markersize=5,
            label=METHOD_NAMES[method],
            clip_on=False,
        )
    axes.set(
        title="Attack success", ylabel="attacks that succeed, %", ylim=(0, 103), xlim=(-0.5, results["answer_tokens"]),
        xlabel=f"harmful tokens already written, of {results['answer_tokens']} (0: direct request)",
    )  # fmt: skip
    axes.set_xticks([tokens[depth] for depth in depths])
    axes.grid(axis="y")
    axes.legend(frameon=False, loc="center right")


def draw_refusal_positions(axes: "Axes", results: Results) -> None:
    """Where the refusal begins, or that it never does, as shares of all direct and prefill attacks."""
    methods = list(results["methods"])
    for row, method in enumerate(methods):
        positions = results["methods"][method]["refusal_position"]
        total = results["attacks_per_method"]
        shares = [
            (name, sum(low <= position <= high for position in positions) / total, color)
            for name, low, high, color in _POSITION_BINS
        ]
        shares.append(("never", 1 - len(positions) / total, _NEVER_COLOR))
        _stack(axes, row, shares, with_labels=row == 0)
    axes.set_yticks(range(len(methods)), [METHOD_NAMES[method] for method in methods])
    axes.invert_yaxis()
    axes.set(title="Where the refusal begins", xlabel="answers to direct and prefill attacks, %", xlim=(0, 100))
    axes.legend(frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.44, -0.2), handlelength=0.9,
                columnspacing=0.9, handletextpad=0.4, fontsize=8.5)  # fmt: skip


def draw_helpfulness(axes: "Axes", results: Results) -> None:
    """Exact answers to benign requests, and benign look-alikes refused."""
    _draw_groups(
        axes,
        results,
        {
            "plain requests\nanswered": lambda measured: measured["helpfulness"],
            "look-alikes\nanswered": lambda measured: measured["lookalike_helpfulness"],
            "look-alikes\nrefused": lambda measured: measured["over_refusal"],
        },
    )
    axes.set(title="Helpfulness and over-refusal", ylabel="benign requests, %")


def draw_flanks(axes: "Axes", results: Results) -> None:
    """The attacks of another form, and the price of stopping one of them."""
    _draw_groups(
        axes,
        results,
        {
            "document attack\nsucceeds": lambda measured: measured["asr"]["completion"],
            "two-persona\nattack succeeds": lambda measured: measured["not_stopped"]["two_persona"],
            "benign document\nrefused": lambda measured: measured["not_stopped"]["declarative_lookalike_refusal"],
        },
    )
    axes.set(title="Other forms: what is stopped, and what is not", ylabel="%")


PANELS: dict[str, Callable[["Axes", Results], None]] = {
    "attacks": draw_attacks,
    "refusal_positions": draw_refusal_positions,
    "helpfulness": draw_helpfulness,
    "flanks": draw_flanks,
}


def png(results: Results) -> bytes:
    """All panels in one image on white."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure = _figure(12.5, 8.4)
        for axes, draw in zip(figure.subplots(2, 2).flat, PANELS.values(), strict=True):
            draw(axes, results)
        title = f"DeRTa demo, seed {results['seed']}: {results['attacked_requests']} held-out requests per attack"
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def svg(panel: str, results: Results) -> str:
    """One panel of `PANELS` as an `<svg>` element; text and lines take `currentColor` of the page."""
    from matplotlib import rc_context

    with rc_context({**_STYLE, "svg.hashsalt": panel, "axes.titlesize": 0.01}):
        figure = _figure(7.6, 3.7)
        axes = figure.subplots()
        PANELS[panel](axes, results)
        axes.set_title("")  # the page has headings of its own
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue())


def _figure(width: float, height: float) -> "Figure":
    # not `pyplot`, which would choose a backend and keep the figure for the whole process
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _stack(axes: "Axes", row: int, shares: list[tuple[str, float, str]], *, with_labels: bool) -> None:
    left = 0.0
    for name, share, color in shares:
        axes.barh(row, 100 * share, left=left, height=0.62, color=color, label=name if with_labels else None)
        if share >= 0.06:
            dark = color in ("#08519c", "#3a82c0", _NEVER_COLOR)
            axes.text(left + 50 * share, row, f"{100 * share:.3g}", ha="center", va="center",
                      color="white" if dark else "#111111", fontsize=9)  # fmt: skip
        left += 100 * share


def _draw_groups(axes: "Axes", results: Results, groups: Mapping[str, Callable[[Any], float]]) -> None:
    """Bars side by side, one group per measurement, with the value on top of each bar."""
    width = 0.26
    for place, (method, measured) in enumerate(results["methods"].items()):
        values = [100 * read(measured) for read in groups.values()]
        centers = [group + (place - 1) * width for group in range(len(groups))]
        bars = axes.bar(centers, values, width * 0.92, color=METHOD_COLORS[method], label=METHOD_NAMES[method])
        axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=2, fontsize=9)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 25))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, ncols=3, loc="upper right", fontsize=9)


def _for_page(text: str) -> str:
    """The bare `<svg>` element: no prolog, metadata or namespace addresses, and the page's ink instead of ours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    return text.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)")
