"""A short recipe, and changes to it, for the tests of recipes."""

from __future__ import annotations

from derta_plugins.recipe.checks import build
from derta_plugins.recipe.schema import Recipe

SAFETY = {"path": "triples.jsonl", "kind": "safety", "format": "preference"}
HELPFUL = {"path": "helpful.jsonl", "kind": "helpful", "format": "messages"}
BOUNDARY = {"path": "lookalikes.jsonl", "kind": "boundary", "format": "messages"}
BASE = {
    "model": "my-model",
    "output_dir": "out",
    "data": [SAFETY, HELPFUL],
    "hosts": {"trl": {"use_cpu": True}, "llamafactory": {"template": "chatml", "use_cpu": True}},
}
LORA = {"rank": 6, "alpha": 3}


def recipe(**changes) -> Recipe:
    """The short recipe with some keys changed."""
    return build(Recipe, {**BASE, **changes})
