"""Read a recipe from a YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from derta_plugins.recipe.checks import RecipeError, build
from derta_plugins.recipe.schema import Recipe


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that takes `2e-5` for a number, as YAML 1.2 does, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise RecipeError(f"`{key}` stands there twice (line {node.value[place][0].start_mark.line + 1}).")
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_recipe(path: str | Path) -> Recipe:
    """
    The recipe in a YAML file.

    Raises:
        RecipeError: If there is no such file, it is no YAML, or a key or value of it is wrong.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
        if values is None:
            raise RecipeError("the file is empty.")
        return build(Recipe, values)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
