"""
Adapter tests run models of a few thousand parameters, for which threads cost more than they give.

Each environment has one host, and only that host's tests are collected; `test_host.py` checks that it is the one that
the session is for.
"""

from importlib.util import find_spec

import pytest
import torch

# Axolotl and LLaMA-Factory bring a TRL of their own, so they are asked for first.
HOSTS = ("axolotl", "llamafactory", "trl")
HOST = next(host for host in HOSTS if find_spec(host))
collect_ignore_glob = [f"{start}{host}_*.py" for host in HOSTS if host != HOST for start in ("", "test_")]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
