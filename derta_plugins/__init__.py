"""
DeRTa safety training for existing fine-tuning frameworks: refuse at any position, not only at the first.

Imports go one way: `cli > demo > plugin_status, doctor, show, survey > recipe > adapters > transforms, readers >
attacks, judges > plugin_manager > core`. Each level may import those to its right; only `adapters` may import a host
framework, and `core` needs torch and the standard library alone. The plugin manager loads adapters, attacks and judges
by the names of their entry points, never by import. What hosts start with (`_autoload`, `launch`) needs the standard
library alone.
"""

# Loaded at the start of every interpreter (`_autoload`), so no import here: `typing` alone would cost several ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from derta_plugins.core.config import ConfigError, DeRTaConfig
    from derta_plugins.core.losses import derta_loss, rto_loss
    from derta_plugins.core.records import BadRecordError, Triple, parse_record
    from derta_plugins.core.refusal_token import resolve_refusal_token, resolve_refusal_token_id
    from derta_plugins.core.transform import build_rows

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "config",
    "DeRTaConfig": "config",
    "derta_loss": "losses",
    "rto_loss": "losses",
    "BadRecordError": "records",
    "Triple": "records",
    "parse_record": "records",
    "resolve_refusal_token": "refusal_token",
    "resolve_refusal_token_id": "refusal_token",
    "build_rows": "transform",
}

__all__ = [
    "BadRecordError",
    "ConfigError",
    "DeRTaConfig",
    "Triple",
    "__version__",
    "build_rows",
    "derta_loss",
    "parse_record",
    "resolve_refusal_token",
    "resolve_refusal_token_id",
    "rto_loss",
]


def __getattr__(name: str) -> object:
    # Public names load on first use, so that `derta --help` and host start-up do not pay for importing torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"derta_plugins.core.{_HOME[name]}"), name)
