"""Peak memory of a piece of work, above what was in use before it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


@contextmanager
def measured(bytes_used: list[int], device: str) -> Iterator[None]:
    """Append the peak bytes of the block: allocated on a GPU, resident (Linux) on the CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        bytes_used.append(torch.cuda.max_memory_allocated() - before)
        return
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be reused unseen
    _RESET.write_text("5")  # resets the peak of resident memory
    before = _resident("VmRSS")
    yield
    bytes_used.append(_resident("VmHWM") - before)
