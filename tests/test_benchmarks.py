"""The benchmarks run as the README says, and compare what is the same training."""

import re
import sys
from importlib.util import find_spec

import pytest

from tests.readme_blocks import ROOT, run

HOST = next(host for host in ("axolotl", "llamafactory", "trl") if find_spec(host))


def output_of(name: str, *options: str) -> str:
    result = run([sys.executable, "-m", f"tests.benchmarks.{name}", *options], ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_layouts_are_measured():
    options = ("--steps", "1", "--triples", "2", "--lengths", "20/40/30", "--vocab", "512", "--prefixes", "2")
    lines = [
        line.strip("| ").split(" | ") for line in output_of("layouts", *options).splitlines() if "20/40/30" in line
    ]
    rows = {cells[3]: cells for cells in lines if len(cells) == 11}
    assert set(rows) == {"authors", "stock", "rows", "branch"}
    tokens, milliseconds = ({name: float(cells[place]) for name, cells in rows.items()} for place in (4, 5))
    assert tokens["authors"] == tokens["stock"] > tokens["rows"] > tokens["branch"]
    assert min(milliseconds.values()) > 0


def test_ways_through_the_head_are_measured():
    text = output_of("head", "--steps", "1", "--shapes", "40/16/300")
    ways = {cells[1]: float(cells[2]) for cells in (line.strip("| ").split(" | ") for line in text.splitlines()[4:])}
    assert {"products", "all logits", "linear_nll, chunks of 256"} < set(ways)
    assert min(ways.values()) > 0


@pytest.mark.skipif(not find_spec("matplotlib"), reason="comes with the demo")
def test_the_picture_is_that_of_the_tables(tmp_path):
    from tests.benchmarks.picture import HERE, main, steps_of

    steps = steps_of((HERE / "RESULTS.md").read_text(encoding="utf-8"))
    assert len(steps) == 3 * (1 + 3 + 3)
    main(tmp_path / "new.svg")
    texts = [
        re.findall(r"<text[^>]*>([^<]+)<", path.read_text()) for path in (tmp_path / "new.svg", HERE / "RESULTS.svg")
    ]
    assert texts[0] == texts[1]
    assert f"{steps['8k', '64/256/96', '1']['branch'][0]:.1f}" in texts[0]


def test_steps_of_the_host_are_compared_at_the_same_loss():
    text = output_of("step", "--host", HOST, "--steps", "1", "--batch", "2", "--vocab", "512")
    (difference,) = re.findall(r"same loss in both: largest relative difference (\S+)", text)
    assert float(difference) < 1e-5
    (milliseconds,) = re.findall(r"^\| time of a step, ms \| (\S+) \| (\S+) \|", text, re.MULTILINE)
    assert min(map(float, milliseconds)) > 0


def test_the_ways_to_start_are_measured():
    assert len(re.findall(r"[+-]\d+\.\d+$", output_of("startup", "--starts", "3"), re.MULTILINE)) == 3
