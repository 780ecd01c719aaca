"""Tokenised records to training rows, by the transform that the config asks for: the built-in one, or a plugin's."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import fields
from functools import cache
from pathlib import Path

from derta_plugins.core.chat import TokenizedAuthorsRow, TokenizedTriple
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.records import BadRecordError
from derta_plugins.core.row_check import check_rows
from derta_plugins.core.transform import Row, build_authors_row, build_rows
from derta_plugins.hookspecs import Transform
from derta_plugins.plugin_manager import PluginError, cause_of, find_plugin, get_transform, owner


def build_training_rows(
    tokenized: TokenizedTriple | TokenizedAuthorsRow,
    config: DeRTaConfig,
    *,
    refusal_token_id: int,
    max_length: int | None = None,
    index: int = 0,
    epoch: int = 0,
) -> list[Row]:
    """
    Training rows of one record. Those of a plugin's transform are checked, and end the run if they are not safe.

    Args:
        tokenized: A triple, or a row of the authors' file.
        config: Knobs; `transform` names the plugin.
        refusal_token_id: Target of RTO.
        max_length: Longest row; None sets no limit.
        index: Position of the record in its dataset, for the draws.
        epoch: Epoch, for the draws.

    Raises:
        BadRecordError: If the record cannot be trained.
        ConfigError: If `method` or `transform` needs triples and this is a row of the authors' file.
        PluginError: If the transform cannot be loaded, fails, or returns a row that could train harmful text.
    """
    options = {"refusal_token_id": refusal_token_id, "max_length": max_length, "index": index, "epoch": epoch}
    if isinstance(tokenized, TokenizedAuthorsRow):
        if config.transform is not None:
            raise ConfigError(
                f"transform={config.transform!r} needs triples: the authors' prefix / text / safe rows are rows "
                "already. Give the records they were made from (instruction / output / safe_response)."
            )
        return build_authors_row(tokenized, config, **options)
    if config.transform is None:
        return build_rows(tokenized, config, **options)
    transform, triple = _loaded(config.transform), _as_tuples(tokenized)
    try:
        rows = transform.build_rows(triple, config, **options)
        check_rows(rows, triple, refusal_token_id=refusal_token_id, max_length=max_length)
    except BadRecordError:
        raise
    except (Exception, SystemExit) as error:  # whatever it is, no row of this transform may be trained
        whose = f"The transform {config.transform!r} of {owner(find_plugin(config.transform))}"
        raise PluginError(f"{whose} failed at record {index}: {cause_of(error)}.") from error
    return rows


def transform_code(config: DeRTaConfig) -> str:
    """
    What a cache of rows must know of the transform beside the knobs: its distribution and a hash of its sources, so
    that rows of an older release are never trained. Empty for the built-in transform.

    Raises:
        PluginError: If the transform cannot be loaded.
    """
    if config.transform is None:
        return ""
    _loaded(config.transform)
    entry_point = find_plugin(config.transform, "transform")
    digest = hashlib.sha256()
    for source in _sources(entry_point.module):
        digest.update(source.read_bytes())
    return f"{owner(entry_point)} {digest.hexdigest()}"


@cache
def _loaded(name: str) -> Transform:
    # called for each record: finding a plugin reads the metadata of every installed distribution
    return get_transform(name)


def _as_tuples(triple: TokenizedTriple) -> TokenizedTriple:
    """`triple` as its class says, where it came out of a dataset, which keeps lists."""
    ids = {field.name: tuple(getattr(triple, field.name)) for field in fields(triple)}
    return TokenizedTriple(**{**ids, "earlier_turns": tuple(map(tuple, triple.earlier_turns))})


def _sources(module: str) -> list[Path]:
    """Files of the package that `module` is in, or its own file if it is in none."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec.submodule_search_locations:
        return sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.py"))
    return [Path(spec.origin)] if spec.origin and Path(spec.origin).is_file() else []
