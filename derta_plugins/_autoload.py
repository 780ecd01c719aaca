"""
Extends a host when it is imported, so that its own command knows DeRTa.

`startup/derta_plugins_autoload.pth` and `startup/sitecustomize.py` call `install` at the start of every interpreter:
importing this module must cost next to nothing and may need no other.
"""

# no `from __future__ import annotations`: at start-up that is one more module to load
import sys

# host module -> the module whose `apply` extends it
PATCHES = {
    "axolotl.cli.config": "derta_plugins.adapters.axolotl_patch",
    "llamafactory.train.tuner": "derta_plugins.adapters.llamafactory_patch",
}


class HostFinder:
    """Finds the modules of `PATCHES` where the other finders do, and has them extended each time they are executed."""

    def __init__(self):
        self._is_searching = False

    def find_spec(self, name: str, path=None, target=None):
        """Spec that the other finders give, with a loader that extends the module; None for any other module."""
        if name not in PATCHES or self._is_searching:
            return None
        self._is_searching = True  # another finder may ask all finders, this one too
        try:
            finds = [finder.find_spec for finder in sys.meta_path if hasattr(finder, "find_spec")]
            spec = next(filter(None, (find(name, path, target) for find in finds)), None)
        finally:
            self._is_searching = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ExtendingLoader(spec.loader)
        return spec


class _ExtendingLoader:
    """The host's own loader up to the end of `exec_module`; then the module has its own again and is extended."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        if name.startswith("_"):  # also while this is unpickled, when there is no `_loader` yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module):
        for owner, attribute in ((module, "__loader__"), (module.__spec__, "loader")):
            if getattr(owner, attribute, None) is self:
                setattr(owner, attribute, self._loader)
        self._loader.exec_module(module)
        _extend(module)


def _extend(module) -> None:
    host, patch = module.__name__.partition(".")[0], PATCHES[module.__name__]
    try:
        from importlib import import_module

        apply = import_module(patch).apply
    except Exception as error:  # half installed, whatever is missing: nothing is patched yet, so the host can go on
        import logging

        message = "%s does not import (%s: %s): %s runs without DeRTa. Reinstall derta-plugins."
        logging.getLogger(__name__).warning(message, patch, type(error).__name__, error, host)
        return
    try:
        apply(module)
    except Exception as error:  # the host may be half patched: its import fails, and with it the run
        error.add_note(f"{patch} could not extend {host}. To run {host} without DeRTa, set DERTA_AUTOLOAD=0.")
        raise


def install() -> None:
    """Put the finder on `sys.meta_path`, once, and extend host modules that are imported already."""
    if not is_installed():
        sys.meta_path.insert(0, HostFinder())
    for name in PATCHES:
        if sys.modules.get(name) is not None:
            _extend(sys.modules[name])


def is_installed() -> bool:
    """Whether this interpreter extends hosts that it imports."""
    return any(isinstance(finder, HostFinder) for finder in sys.meta_path)
