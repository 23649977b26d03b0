"""The process around a run: signals that stop it in order, memory that runs out, memory that is kept."""

from __future__ import annotations

import ctypes
import platform
import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Ctrl-C (or a cluster's SIGTERM) lets the batch at hand finish; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        print(
            "\nfinishing the batch at hand, then stopping (Ctrl-C again: at once)",
            file=sys.stderr,
            flush=True,
        )

    def leave(self) -> None:
        """End the run the way the signal asked for."""
        if self.requested == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def is_fatal(error: Exception) -> bool:
    """Whether an error has broken the device, so that every later call would fail as well."""
    return not is_out_of_memory(error) and (
        type(error).__name__ == "AcceleratorError"
        or "CUDA error" in str(error)
        or "cuDNN error" in str(error)
    )


def free_memory() -> None:
    """Give back what a failed batch held."""
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def raise_malloc_thresholds() -> bool:
    """Let glibc keep large buffers between batches instead of fetching them from the system each time.

    Returns
    -------
    bool
        Whether it had any effect; False on systems without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # numbers from malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
    return all(libc.mallopt(option, size) for option, size in ((-3, 1 << 30), (-1, 1 << 30), (-2, 64 << 20)))
