"""Entries of LLaMA-Factory's dataset_info.json: `ranking: true` ones are read as triples, others must not be any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llamafactory.data.converter import DatasetConverter
from llamafactory.data.parser import DatasetAttr

from derta_plugins.core.records import AUTHORS_ROW_COLUMNS, BadRecordError, Triple, parse_record

HOW_TO_REGISTER = (
    'register it in dataset_info.json with "ranking": true and "columns" that name `prompt`, `chosen` (the safe '
    "response) and `rejected` (the harmful one)"
)
# A set with one of these has harmful responses; `instruction` and `output` alone are the host's everyday columns.
_PAIR_COLUMNS = {
    *("chosen", "rejected", "safe_response"),
    *("response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
}
_MEDIA = ("images", "videos", "audios")


@dataclass(repr=False)
class TriplesAttr(DatasetAttr):
    """
    A `ranking: true` entry that reads `ranking: false`, since the host refuses the others in an SFT run.

    Attributes:
        name: Name of the entry.
    """

    name: str = ""

    @classmethod
    def of(cls, attr: DatasetAttr, name: str) -> TriplesAttr:
        """The entry `name` of dataset_info.json."""
        values = {item.name: getattr(attr, item.name) for item in fields(DatasetAttr)}
        return cls(**{**values, "ranking": False, "name": name})

    def as_registered(self) -> DatasetAttr:
        """The host's own entry."""
        values = {item.name: getattr(self, item.name) for item in fields(DatasetAttr)}
        return DatasetAttr(**{**values, "ranking": True})


@dataclass(frozen=True)
class ReadRanking:
    """
    Parses a record of a `ranking: true` dataset, whose format and columns the host's converter knows.

    Raises:
        BadRecordError: When called, if the record is no triple. Fields are named as the `columns` of dataset_info.json.
    """

    converter: DatasetConverter

    def __call__(self, record: Mapping[str, Any]) -> Triple:
        attr = self.converter.dataset_attr
        try:
            aligned = self.converter(record)
        except (AttributeError, KeyError, TypeError) as error:
            reason = f"does not fit `formatting: {attr.formatting}` and its `tags` ({type(error).__name__}: {error})."
            raise BadRecordError("record", reason) from error
        prompt, response = aligned["_prompt"], aligned["_response"]
        if len(response) != 2:
            # the converter takes a pair that lost a side for an ordinary example: its one response may be harmful
            for name in ("chosen", "rejected"):
                if not record[getattr(attr, name)]:
                    raise BadRecordError(name, "is empty.")
            raise BadRecordError("record", f"is no `formatting: {attr.formatting}` pair: check its roles and types.")
        for name in _MEDIA:
            if aligned[f"_{name}"]:
                raise BadRecordError(name, "is not carried by a safety record.")
        if aligned["_system"]:
            prompt = [{"role": "system", "content": aligned["_system"]}, *prompt]
        chosen, rejected = ([message] for message in response)
        return parse_record({"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": aligned["_tools"]})


def check_triples(attr: DatasetAttr, name: str, columns: list[str]) -> None:
    """
    Refuse a `ranking: true` entry that does not name its columns, or names what the dataset lacks.

    Raises:
        ValueError: Says what is missing and how to register it.
    """
    if attr.kto_tag:
        raise ValueError(f"Dataset `{name}` has a `kto_tag` and is `ranking: true`; a triple has no tag. Leave it out.")
    if not (attr.chosen and attr.rejected):
        raise ValueError(f"Dataset `{name}` is `ranking: true` without saying which columns: {HOW_TO_REGISTER}.")
    used = ("prompt", "query", "history") if attr.formatting == "alpaca" else ("messages",)
    named = [getattr(attr, key) for key in (*used, "chosen", "rejected", "system", "tools", *_MEDIA)]
    missing = sorted({column for column in named if column} - set(columns))
    if missing:
        raise ValueError(
            f"Dataset `{name}` has no column {', '.join(f'`{column}`' for column in missing)} (it has "
            f"{', '.join(sorted(columns))}): {HOW_TO_REGISTER}."
        )


def check_ordinary(attr: DatasetAttr, columns: list[str]) -> None:
    """
    Refuse an ordinary entry with the columns of safety records: the host would train its response, harmful or not.

    Raises:
        ValueError: Names the columns and says how to register them.
    """
    if attr.kto_tag or {"completion", "label"} <= set(columns):
        raise ValueError(
            f"Dataset `{attr}` tags its responses as desired or not ({attr.kto_tag or 'label'}), and the undesired "
            "could be trained. Keep the desired ones, in a dataset without a tag."
        )
    named = {name for name in (attr.chosen, attr.rejected) if name}
    if found := sorted(named | (_PAIR_COLUMNS & set(columns))):
        raise ValueError(
            f"Dataset `{attr}` has the columns of safety triples ({', '.join(found)}) but is registered as an ordinary "
            f"one, so that its harmful side could be trained. If it holds triples, {HOW_TO_REGISTER}; if all that it "
            "holds is helpful, remove those columns."
        )
    if AUTHORS_ROW_COLUMNS <= set(columns):
        raise ValueError(
            f"Dataset `{attr}` looks like the authors' prefix / text / safe rows, which LLaMA-Factory's formats cannot "
            f"carry. Give the triples they were made from: {HOW_TO_REGISTER}."
        )
