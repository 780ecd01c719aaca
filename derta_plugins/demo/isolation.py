"""What training changes in the process around it, and how it is put back: random state, threads, bars, warnings."""

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def isolated() -> Iterator[None]:
    """Keep the hosts quiet, errors excepted, and put back their settings and the random state afterwards."""
    with ExitStack() as stack:
        stack.enter_context(_random_state())
        stack.enter_context(_one_thread())
        stack.enter_context(_quiet_hosts())
        stack.enter_context(warnings.catch_warnings())
        # what the hosts say about their own coming releases does not concern who runs a demo
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield


@contextmanager
def _random_state() -> Iterator[None]:
    # `Trainer` seeds the global generators of Python, NumPy and torch.
    import numpy

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Matrices this small gain a third from a second core, and lose a factor of ten when that core is busy elsewhere.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _quiet_hosts() -> Iterator[None]:
    import datasets
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    trl_logger = logging.getLogger("trl")
    level = trl_logger.level
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    trl_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars[0]:
            transformers.logging.enable_progress_bar()
        if not bars[1]:
            datasets.enable_progress_bars()
        trl_logger.setLevel(level)
