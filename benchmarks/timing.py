"""Times that can be told from chance: repeated for some seconds, with their spread, on an idle device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SECONDS = 3.0  # least time for which anything is repeated


@dataclass(frozen=True)
class Timing:
    """Median of several runs in seconds, its spread (largest less least, over the median), how many runs."""

    median: float
    spread: float
    runs: int


def wait(device: torch.device) -> None:
    """Let the device finish what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    run: Callable[[], object],
    device: torch.device,
    seconds: float = SECONDS,
    least: int = 2,
    warm: Callable[[], object] | None = None,
) -> Timing:
    """Time runs until they have taken so many seconds, at least ``least`` of them, warmed up by one."""
    (warm or run)()
    found: list[float] = []
    while len(found) < least or sum(found) < seconds:
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - start)
    median = statistics.median(found)
    return Timing(median, (max(found) - min(found)) / median, len(found))


def best_batch(
    run: Callable[[Sequence[Any]], object],
    items: Sequence[Any],
    sizes: Sequence[int],
    device: torch.device,
    seconds: float = SECONDS,
) -> tuple[float, int, Timing]:
    """Items per second at the batch size that gives most, that size, and how it was timed."""

    def rate(size: int, seconds: float, least: int) -> tuple[float, int, Timing]:
        chunks = [items[i : i + size] for i in range(0, len(items) - len(items) % size or len(items), size)]
        all_of_it, one = (lambda: [run(chunk) for chunk in chunks]), lambda: run(chunks[0])
        timing = timed(all_of_it, device, seconds, least, one)
        return sum(map(len, chunks)) / timing.median, size, timing

    fitting = [size for size in sizes if size <= len(items)] or [min(sizes)]
    best = max(rate(size, 0.0, 1) for size in fitting)[1] if len(fitting) > 1 else fitting[0]
    return rate(best, seconds, 2)
