"""Table, figures and page of a small results dict."""

import io
import json
import re
from html.parser import HTMLParser

from matplotlib.figure import Figure
from rich.console import Console

from derta_plugins.demo import charts
from derta_plugins.demo.page import html_page
from derta_plugins.demo.report import attack_table, quality_table, write_report

VOID = {"meta", "br", "use", "path", "rect"}


def rendered(table):
    console = Console(file=io.StringIO(), width=80)  # a terminal of the usual width must show every figure
    console.print(table)
    return console.file.getvalue()


def cells(text, name):
    """Cells of the row that starts with `name`."""
    (line,) = [line for line in text.splitlines() if name in line]
    return re.findall(r"\d+", line)


def drawn(panel, results):
    axes = Figure().subplots()
    charts.PANELS[panel](axes, results)
    return axes


def test_attack_table_has_every_cell(results):
    results["methods"]["derta"]["asr"]["prefill"]["75%"] = 0.04
    results["methods"]["derta"]["asr"]["completion"] = 0.5
    text = rendered(attack_table(results))
    assert cells(text, "DeRTa") == ["0", "0", "0", "0", "0", "0", "4", "0", "50"]
    assert cells(text, "vanilla SFT") == ["0", *["88"] * 8]
    assert cells(text, "base") == ["0", *["100"] * 8]
    assert "10 held-out" in text


def test_quality_table_has_every_cell(results):
    lines = rendered(quality_table(results)).splitlines()
    assert re.findall(r"base \(before\)|vanilla SFT|RecAug|DeRTa", lines[2]) == [
        "base (before)", "vanilla SFT", "RecAug", "DeRTa",
    ]  # fmt: skip
    last_column = [re.findall(r"\d+", line)[-1] for line in lines if re.search(r"\d", line)]
    assert last_column == ["97", "4", "91", "58", "22", "800", "22544", "10"]


def test_attack_chart_plots_every_rate_at_its_token(results):
    results["methods"]["recaug"]["asr"]["prefill"]["25%"] = 0.5
    lines = {line.get_label(): line for line in drawn("attacks", results).get_lines()}
    assert list(lines["RecAug"].get_xdata()) == [0, 1, 5, 7, 10, 14, 21, 26]
    assert list(lines["RecAug"].get_ydata()) == [0, 33, 33, 50, 33, 33, 33, 33]
    assert set(lines["DeRTa"].get_ydata()) == {0}


def test_refusal_chart_adds_up_to_all_answers(results):
    """80 answers of DeRTa: 10 refused at once, 60 from token 5, 10 from token 26; of vanilla 70 never."""
    axes = drawn("refusal_positions", results)
    rows = {0: [], 1: [], 2: []}
    for bar in axes.patches:
        rows[round(bar.get_y() + bar.get_height() / 2)].append(round(bar.get_width(), 3))
    assert rows[0] == [12.5, 0, 0, 0, 0, 87.5]
    assert rows[1] == [12.5, 50, 0, 0, 0, 37.5]
    assert rows[2] == [12.5, 75, 0, 0, 12.5, 0]


def test_bar_charts_show_every_value(results):
    heights = [round(bar.get_height()) for bar in drawn("helpfulness", results).patches]
    assert heights == [97, 93, 4] * 3
    heights = [round(bar.get_height()) for bar in drawn("flanks", results).patches]
    assert heights == [88, 99, 22, 33, 77, 22, 0, 58, 22]


def test_png_is_a_png(results):
    image = charts.png(results)
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(image[16:20], "big") > 1000, "the image is too narrow to read"


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.seen = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def test_page_is_one_well_formed_file_that_loads_nothing(results):
    page = html_page(results)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("svg") == len(charts.PANELS)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.seen)
    assert "http://" not in page
    assert "https://" not in page
    assert "url(//" not in page
    assert "@import" not in page
    references = [value for name, value in tags.attributes if name in ("href", "src", "xlink:href")]
    assert references, "the figures refer to their own markers"
    assert all(reference.startswith("#") for reference in references)


def test_page_says_what_was_measured(results):
    page = html_page(results)
    assert "succeeds against DeRTa in 58 %" in page
    assert "22 % of the benign look-alikes" in page
    assert "379,296 weights" in page
    assert "Seed 7, 93 seconds" in page
    for shown in ("88 %", "33 %", "0 %", "97 %"):
        assert f"<b>{shown}</b>" in page


def test_page_follows_the_numbers(results):
    results["methods"]["derta"]["asr"]["prefill"]["90%"] = 0.61
    results["methods"]["derta"]["not_stopped"]["two_persona"] = 0.05
    page = html_page(results)
    assert "<b>61 %</b>" in page
    assert "succeeds against DeRTa in 5 %" in page


def test_what_a_model_wrote_is_escaped(results):
    page = html_page(results)
    assert "<b>sorry</b>" not in page
    assert "&lt;b&gt;sorry&lt;/b&gt; , i cannot help with that ." in page


def test_svg_takes_the_ink_of_the_page(results):
    svg = charts.svg("attacks", results)
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "xmlns" not in svg
    assert charts.METHOD_COLORS["derta"] in svg
    assert "#1f2328" not in svg


def test_write_report_writes_three_files(results, tmp_path):
    paths = write_report(results, tmp_path)
    assert [path.name for path in paths] == ["results.json", "report.png", "report.html"]
    assert json.loads(paths[0].read_text()) == results
    assert paths[1].read_bytes()[:4] == b"\x89PNG"
    assert paths[2].read_text().startswith("<!DOCTYPE html>")
