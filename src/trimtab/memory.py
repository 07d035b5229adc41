"""Peak memory of a piece of work: the accelerator's, or on a CPU the process's resident set where Linux tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yields a list that holds the peak in bytes once the block has ended; empty where it cannot be measured."""
    peak: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append(torch.cuda.max_memory_allocated())
        return
    try:
        _CLEAR.write_text("5")  # resets the high-water mark
    except OSError:
        yield peak
        return
    yield peak
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            peak.append(int(line.split()[1]) * 1024)
