"""
A note beside the rows of LLaMA-Factory's `tokenized_path`, which it loads whatever the settings are by then: it says
what they were made with.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.transforms import transform_code

NOTE = "derta.json"
_SHAPE_ROWS = (
    *("template", "cutoff_len", "default_system", "enable_thinking", "preserve_thinking"),
    *("mask_history", "train_on_prompt"),
)


@dataclass(frozen=True)
class SavedRows:
    """
    What the rows of a `tokenized_path` were made with.

    Attributes:
        folder: The path.
        made_with: Knobs, the host's settings that shape rows, and digests of tokenizer and code.
    """

    folder: Path
    made_with: dict[str, Any]

    @classmethod
    def of_run(cls, data_args: Any, tokenizer: Any, config: DeRTaConfig, code: str) -> SavedRows:
        """What this run would make."""
        words = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
        made_with = {
            **{f"derta_{name}": value for name, value in asdict(config).items()},
            **{name: getattr(data_args, name) for name in _SHAPE_ROWS},
            "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
            "code": code,
            "transform": transform_code(config),
        }
        return cls(Path(data_args.tokenized_path), made_with)

    def write(self) -> None:
        """Leave the note beside the rows, which the host has saved."""
        (self.folder / NOTE).write_text(json.dumps(self.made_with, indent=1), encoding="utf-8")

    def check(self) -> None:
        """
        Compare this run with what made the rows that are there.

        Raises:
            ConfigError: If there is no note, or it differs; names what does.
        """
        if not (self.folder / NOTE).is_file():
            raise ConfigError(
                f"`tokenized_path` {self.folder} was not saved by `stage: derta`, or not to the end: it has no {NOTE}. "
                "Delete it, or name another."
            )
        saved = json.loads((self.folder / NOTE).read_text(encoding="utf-8"))
        other = sorted(name for name in self.made_with if saved.get(name) != self.made_with[name])
        if other:
            raise ConfigError(
                f"`tokenized_path` {self.folder} holds rows that were made with other settings: {', '.join(other)}. "
                "Delete it, or name another."
            )
