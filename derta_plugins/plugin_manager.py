"""Find the plugin that is asked for by name, and load no other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from derta_plugins import hookspecs

KINDS = {
    "adapter": hookspecs.Adapter,
    "reader": hookspecs.Reader,
    "transform": hookspecs.Transform,
    "attack": hookspecs.Attack,
    "judge": hookspecs.Judge,
}
"""What a plugin can be, and what its hook `derta_<kind>` returns."""

_HOOKS = ", ".join(f"`derta_{kind}`" for kind in KINDS)


class PluginError(RuntimeError):
    """
    A plugin is unknown, offered twice, broken, or of another kind.

    Attributes:
        reason: The message without the plugin's name and distribution, for where those stand already.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        self.reason = reason or message
        super().__init__(message)


class HostMissingError(PluginError):
    """A plugin does not import because its host is not installed, or only in a version that the plugin is not for."""


class OtherKindError(PluginError):
    """A plugin works, but is not of the kind asked for."""


def installed_plugins() -> list[EntryPoint]:
    """Entry points of the installed plugins, by name; read from package metadata. Imports none of them."""
    return sorted(entry_points(group=hookspecs.PROJECT), key=lambda offer: (offer.name, *distribution_of(offer)))


def plugin_names() -> list[str]:
    """Names of the installed plugins of every kind. Imports none of them."""
    return sorted({entry_point.name for entry_point in installed_plugins()})


def get_adapter(name: str) -> hookspecs.Adapter:
    """
    Load one host adapter by name.

    Raises:
        PluginError: If no installed package offers `name`, if two do, if it fails to load, or if it is no adapter.
    """
    return _get("adapter", name)


def get_reader(name: str) -> hookspecs.Reader:
    """Load one dataset reader by name; raises as `get_adapter`."""
    return _get("reader", name)


def get_transform(name: str) -> hookspecs.Transform:
    """Load one transform by name; raises as `get_adapter`."""
    return _get("transform", name)


def get_attack(name: str) -> hookspecs.Attack:
    """Load one attack by name; raises as `get_adapter`."""
    return _get("attack", name)


def get_judge(name: str) -> hookspecs.Judge:
    """Load one judge by name; raises as `get_adapter`."""
    return _get("judge", name)


def find_plugin(name: str, kind: str = "plugin") -> EntryPoint:
    """
    The one entry point called `name`; `kind` is for the message alone.

    Raises:
        PluginError: If no installed package offers `name`, or if two do.
    """
    offers = [entry_point for entry_point in installed_plugins() if entry_point.name == name]
    if not offers:
        near = difflib.get_close_matches(name, plugin_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PluginError(
            f"Unknown {kind} {name!r}.{hint} Installed plugins: {', '.join(plugin_names()) or 'none'} (`derta plugins` "
            "tells their kinds)."
        )
    if len(offers) > 1:
        owners = " and ".join(map(owner, offers))
        raise PluginError(f"Plugin {name!r} is offered by {owners}: uninstall all but one.")
    return offers[0]


def load_hooks(entry_point: EntryPoint) -> pluggy.HookRelay:
    """
    Import one plugin, apart from all others, and return its hooks.

    Raises:
        HostMissingError: If its host is not installed.
        PluginError: If it fails in any other way, has a hook that does not exist, or has none.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    with _blaming(entry_point):
        manager.register(entry_point.load(), name=entry_point.name)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        unknown, _, _ = str(error).partition(" in plugin ")
        raise _broken(entry_point, f"{unknown}, expected some of {_HOOKS}") from error
    if not kinds_of(manager.hook):
        raise _broken(entry_point, f"it has no hook, expected some of {_HOOKS}")
    return manager.hook


def kinds_of(hooks: pluggy.HookRelay) -> list[str]:
    """Kinds that a plugin is, by the hooks it has."""
    return [kind for kind in KINDS if getattr(hooks, f"derta_{kind}").get_hookimpls()]


def offer_of(entry_point: EntryPoint, hooks: pluggy.HookRelay, kind: str) -> Any:
    """
    What the plugin describes itself as, checked against the contract of `kind`.

    Raises:
        PluginError: If its hook fails, or returns something else.
    """
    with _blaming(entry_point):
        offer = getattr(hooks, f"derta_{kind}")()
    if mistake := _mistake(offer, kind, entry_point.name):
        raise _broken(entry_point, mistake)
    return offer


def distribution_of(entry_point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that offers a plugin."""
    metadata = entry_point.dist.metadata if entry_point.dist else {}
    return metadata.get("Name") or "unknown", metadata.get("Version") or "unknown"


def owner(entry_point: EntryPoint) -> str:
    """Distribution, its version, and what the entry point names; for messages."""
    return f"{' '.join(distribution_of(entry_point))} ({entry_point.value})"


def cause_of(error: BaseException) -> str:
    """Kind and first line of what a plugin raised; without the full stop, for use in a sentence."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _get(kind: str, name: str) -> Any:
    entry_point = find_plugin(name, kind)
    hooks = load_hooks(entry_point)
    kinds = kinds_of(hooks)
    if kind not in kinds:
        raise OtherKindError(f"{_described(entry_point)} is no {kind}; it is: {', '.join(kinds)}.")
    return offer_of(entry_point, hooks, kind)


@contextmanager
def _blaming(entry_point: EntryPoint) -> Iterator[None]:
    """Whatever a plugin's code raises becomes a `PluginError` that names the plugin, and so ends nothing unseen."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, and the panics of extension modules, are no `Exception`
        raise _failure(entry_point, error) from error


def _failure(entry_point: EntryPoint, error: BaseException) -> PluginError:
    """What an error in a plugin's code means: that its host is not here, or that the plugin is broken."""
    if isinstance(error, hookspecs.HostVersionError):
        return HostMissingError(f"{_described(entry_point)} does not import: {error}", str(error))
    if isinstance(error, ModuleNotFoundError) and _is_optional(entry_point, error.name or ""):
        message = f"{_described(entry_point)} does not import: {error}. {_install_hint(entry_point)}"
        return HostMissingError(message, str(error))
    return _broken(entry_point, cause_of(error))


def _broken(entry_point: EntryPoint, reason: str) -> PluginError:
    return PluginError(f"{_described(entry_point)} is broken: {reason}.", reason)


def _is_optional(entry_point: EntryPoint, module: str) -> bool:
    """Whether a missing `module` is a package that the plugin's distribution can be installed without."""
    is_whole_package = module and "." not in module
    if not is_whole_package or module in (hookspecs.PROJECT, re.split(r"[.:\s]", entry_point.value)[0]):
        return False
    requires = (entry_point.dist.requires if entry_point.dist else None) or []
    always = [line for line in requires if "extra ==" not in line]
    return _normalized(module) not in [_normalized(re.split(r"[^\w.-]", line)[0]) for line in always]


def _install_hint(entry_point: EntryPoint) -> str:
    distribution, _ = distribution_of(entry_point)
    extras = entry_point.dist.metadata.get_all("Provides-Extra") if entry_point.dist else None
    has_extra = _normalized(entry_point.name) in map(_normalized, extras or [])
    wanted = f"'{distribution}[{entry_point.name}]'" if has_extra else "the package that has this module"
    return f"It needs its host: pip install {wanted}"


def _mistake(offer: Any, kind: str, name: str) -> str:
    """What is wrong with what a hook returned; empty if nothing is."""
    contract = KINDS[kind]
    if not isinstance(offer, contract):
        return f"`derta_{kind}` must return a hookspecs.{contract.__name__}, got {type(offer).__name__}"
    if offer.name != name:
        return f"`derta_{kind}` calls itself {offer.name!r}, its entry point {name!r}"
    for field in fields(offer):
        value = getattr(offer, field.name)
        wanted, is_fine = {
            "str": ("a text", isinstance(value, str) and bool(value.strip())),
            "bool": ("true or false", isinstance(value, bool)),
        }.get(str(field.type), ("a function", callable(value)))
        if not is_fine:
            return f"`{field.name}` of its {kind} must be {wanted}, got {value!r}"
    return ""


def _described(entry_point: EntryPoint) -> str:
    return f"Plugin {entry_point.name!r} of {owner(entry_point)}"


def _normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
