"""The whole demo: build the world, train, attack, report."""

import importlib
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from derta_plugins.demo import attacks, records
from derta_plugins.demo.charts import METHOD_NAMES
from derta_plugins.demo.evaluation import Probes, answer_all, attack_suite, draw_probes, evaluate, is_direct_or_prefill
from derta_plugins.demo.isolation import isolated
from derta_plugins.demo.model import build_model, build_tokenizer
from derta_plugins.demo.report import attack_table, quality_table, write_report
from derta_plugins.demo.training import METHODS, Recipe, TrainingCost, safety_tuned, train_base
from derta_plugins.demo.world import World, answer, build_world

_NEEDED = ("trl", "transformers", "datasets", "tokenizers", "matplotlib")
_EXAMPLE_DEPTHS = ("5", "50%")


def run_demo(
    *,
    seed: int = 0,
    output_dir: str | Path = "derta-demo",
    device: str = "cpu",
    console: Console | None = None,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """
    Train a toy model, safety-tune it with three methods, attack all, and report. Nothing is downloaded.

    Args:
        seed: Decides the world, the held-out requests, the initial weights and the order of the rows.
        output_dir: Where results.json, report.png and report.html are written; made if it does not exist.
        device: "cpu", or "cuda".
        console: Where progress and tables are shown. None shows them on the standard output.
        recipe: How the models are trained. None is the recipe whose numbers are documented.

    Returns:
        What results.json holds; rates in 0..1, times in seconds.

    Raises:
        ImportError: If TRL or matplotlib is not installed.
        ValueError: If `output_dir` is a file or `device` cannot be used.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    output_dir = _checked_output_dir(output_dir)
    _check_device(device)
    _check_imports()
    console = Console() if console is None else console
    with isolated():
        results = _measure(seed=seed, device=device, recipe=recipe or Recipe(), console=console)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    results = {"seed": seed, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), **results}
    paths = write_report(results, output_dir)
    console.print(attack_table(results))
    console.print(quality_table(results))
    console.print(f"{results['seconds']:.0f} s. Open {paths[-1]}", soft_wrap=True, highlight=False)
    return results


@dataclass(frozen=True, slots=True)
class _Stage:
    """What all four models of a run share."""

    world: World
    tokenizer: Any
    probes: Probes
    recipe: Recipe
    seed: int
    device: str
    progress: Progress


def _measure(*, seed: int, device: str, recipe: Recipe, console: Console) -> dict[str, Any]:
    world = build_world(seed)
    with _progress(console) as progress:
        stage = _Stage(world, build_tokenizer(), draw_probes(world), recipe, seed, device, progress)
        base = build_model(stage.tokenizer, seed=seed, device=device)
        results = _facts(stage, base)
        results["base"] = _base(stage, base)
        for method in METHODS:
            results["methods"][method] = _tuned(stage, base, method)
    return results


def _base(stage: _Stage, base: Any) -> dict[str, Any]:
    bar = _Bar(stage.progress, "base model")
    texts = records.base_texts(stage.world, stage.recipe.base_rows)
    cost = train_base(
        base, stage.tokenizer, texts, recipe=stage.recipe, seed=stage.seed, device=stage.device, on_step=bar.on_step
    )
    return _evaluated(stage, base, cost, bar)


def _tuned(stage: _Stage, base: Any, method: str) -> dict[str, Any]:
    bar = _Bar(stage.progress, METHOD_NAMES[method])
    tuned, cost = safety_tuned(
        base,
        stage.tokenizer,
        method=method,
        helpful=records.helpful_records(stage.world, stage.recipe.helpful_rows),
        boundary=records.boundary_records(stage.world, stage.recipe.boundary_rows),
        triples=records.safety_triples(stage.world, stage.recipe.triples),
        recipe=stage.recipe,
        seed=stage.seed,
        device=stage.device,
        on_step=bar.on_step,
    )
    return _evaluated(stage, tuned, cost, bar)


def _evaluated(stage: _Stage, model: Any, cost: TrainingCost, bar: "_Bar") -> dict[str, Any]:
    measured = evaluate(model, stage.tokenizer, stage.world, stage.probes, on_attack=bar.on_attack)
    return {**measured, "training": asdict(cost), "examples": _example_answers(stage, model)}


def _facts(stage: _Stage, base: Any) -> dict[str, Any]:
    """Sizes and versions, with room for what is measured."""
    num_tokens = len(answer(stage.world, stage.probes.harmful[0]).split())
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "parameters": base.num_parameters(),
        "vocabulary": len(stage.tokenizer),
        "attacked_requests": len(stage.probes.harmful),
        "plain_requests": len(stage.probes.plain),
        "lookalike_requests": len(stage.probes.lookalikes),
        "attacks_per_method": len(stage.probes.harmful) * sum(map(is_direct_or_prefill, attack_suite())),
        "answer_tokens": num_tokens,
        "prefill_tokens": {depth: attacks.prefill_length(depth, num_tokens) for depth in attacks.PREFILL_DEPTHS},
        "recipe": asdict(stage.recipe),
        "base": {},
        "methods": {},
    }


def _example_answers(stage: _Stage, model: Any) -> list[dict[str, Any]]:
    """What `model` writes on the first attacked request, at a few prefill depths."""
    request = stage.probes.harmful[0]
    given = [attacks.prefill_attack(stage.world, request, depth=depth) for depth in _EXAMPLE_DEPTHS]
    return [
        {
            "depth": depth,
            "user": said.given.user,
            "prefill": " ".join(said.given.prefill),
            "text": " ".join(said.tokens),
            "outcome": said.verdict.outcome,
        }
        for depth, said in zip(_EXAMPLE_DEPTHS, answer_all(model, stage.tokenizer, given), strict=True)
    ]


class _Bar:
    """Progress of one model: its optimizer steps, then its attacks."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._task = progress.add_task(f"{name}: prepare", total=None)

    def on_step(self, done: int, total: int) -> None:
        self._progress.update(self._task, description=f"{self._name}: train", completed=done, total=total)

    def on_attack(self, done: int, total: int) -> None:
        self._progress.update(self._task, description=f"{self._name}: attack", completed=done, total=total)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _checked_output_dir(output_dir: str | Path) -> Path:
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir must be a folder, but {output_dir} is a file: remove it or name another folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    return output_dir


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device: use device='cpu'")


def _check_imports() -> None:
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"the demo needs {name}: pip install 'derta-plugins[demo]'") from error
