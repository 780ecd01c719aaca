"""
What `derta_plugins.launch` puts before any other `sitecustomize`: installs the finder, then runs the one behind it.

Python imports it by this name, through the PYTHONPATH that `launch` sets, in the command and in its Python children.
"""

import os
import sys


def install_finder() -> None:
    """Install the finder, unless it is switched off; say so where this package is not there."""
    if os.environ.get("DERTA_AUTOLOAD") == "0":
        return
    try:
        from derta_plugins._autoload import install
    except ImportError as error:
        sys.stderr.write(f"derta_plugins.launch: no DeRTa in {sys.executable}: {error}\n")
    else:
        install()


def run_shadowed() -> None:
    """Run the `sitecustomize` that Python would have found without ours, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry != here]
    ours = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", ours)


if __name__ == "sitecustomize":
    try:
        install_finder()
    finally:
        run_shadowed()
