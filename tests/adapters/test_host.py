"""No session passes without its host: what `tests/noxfile.py` expects is imported, in the version it expects."""

import os
from importlib import import_module
from importlib.metadata import version

from derta_plugins.plugin_manager import get_adapter
from tests.adapters.conftest import HOST


def test_this_environment_has_the_host_that_the_session_is_for():
    expected = {name: value for name, value in os.environ.items() if name.startswith("DERTA_EXPECT_")}
    assert import_module(HOST).__name__ == HOST
    assert expected in ({}, {f"DERTA_EXPECT_{HOST.upper()}": version(HOST)})


def test_its_adapter_loads_and_says_how_it_is_used():
    adapter = get_adapter(HOST)
    assert adapter.host == HOST
    assert adapter.how_to_use
