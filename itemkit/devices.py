"""Where models run and with how many bits: chosen in one place, stated, and recorded with the features."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from itemkit.errors import InputError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
THREADS_VARIABLE = "ITEMKIT_THREADS"


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Turn a wish into a device, or raise `InputError` where a device that was named is not there.

    "auto" is the current CUDA device where there is one, else the CPU; not "mps", where nothing was verified.
    """
    import torch

    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = "use 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device {device!r} is unknown; {known}") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {device!r} is not supported; {known}")
    mps = int(torch.backends.mps.is_available())
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": mps}[chosen.type]
    if (chosen.index or 0) < count:
        return chosen
    lacks = f"torch {torch.__version__} sees {count} of that kind"
    if chosen.type == "cuda":
        lacks += "; check CUDA_VISIBLE_DEVICES, and that torch is a CUDA build"
    raise InputError(f"device '{device}' was asked for, but {lacks}. Use 'cpu' or 'auto'.")


def set_threads(n: int | None) -> None:
    """Bound the threads of this process and of those it starts: of torch, and of decoding; None: as it is.

    Two processes with two threads each on two cores slow each other down twentyfold: on a busy machine, and
    with several processes, one thread each is the safe choice.
    """
    if n is None:
        return
    if n < 1:
        raise InputError(f"got {n} threads; expected 1 or more")
    # first, since some libraries read them when they are imported; processes started later inherit them
    os.environ |= {"OMP_NUM_THREADS": str(n), THREADS_VARIABLE: str(n)}
    import torch

    torch.set_num_threads(n)


def choose_precision(precision: str = "auto", device: str | torch.device = "cpu") -> torch.dtype:
    """Turn a wish into the number format of a model's weights.

    Parameters
    ----------
    precision : {"auto", "float32", "bfloat16", "float16"}
        "auto" is bfloat16 where the processor computes in it, else float32:

        - CUDA: bfloat16 from compute capability 8.0 on (A100, RTX 30 and newer).
        - CPU: bfloat16 with AMX or AVX512_BF16; without them it is emulated and slow. Measured on one core
          with AVX512_BF16: ViT-B/32 took 50 instead of 98 ms per image, at cosine 0.9999 or better.

        In bfloat16 an embedding's last bits depend on the size of the batch (cosine still above 0.999).
    """
    import torch

    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    kind = torch.device(device).type
    if precision == "float16" and kind == "cpu":
        raise InputError("precision 'float16' is not for the CPU; use 'auto', 'bfloat16' or 'float32'")
    if precision != "auto":
        return getattr(torch, precision)
    if kind == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        # private in torch 2.13, and the only way to ask without parsing /proc/cpuinfo; a missing one is a no
        questions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = kind == "cpu" and any(getattr(torch.cpu, name, bool)() for name in questions)
    return torch.bfloat16 if fast else torch.float32


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor; to CUDA from pinned memory, so that the processor goes on meanwhile."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or in the machine; CUDA's libraries say so in a text alone."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = r"(?i)out of memory|can't allocate memory|bad_alloc|\b(CUBLAS|CUDNN)_STATUS_\w*ALLOC"
    return bool(re.search(said, str(error)))


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, "float32"."""
    return str(dtype).removeprefix("torch.")
