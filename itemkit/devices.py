"""Where models run and with how many bits: chosen in one place, stated, and recorded with the features."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from itemkit.errors import InputError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
THREADS_VARIABLE = "ITEMKIT_THREADS"


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Turn a wish into a device; never falls back from a device that was asked for by name.

    Parameters
    ----------
    device : str or torch.device
        "auto" is the current CUDA device where there is one, else the CPU. "cpu", "cuda", "cuda:1", "mps" are
        taken at their word. "auto" does not pick "mps": nothing was verified there.

    Returns
    -------
    torch.device

    Raises
    ------
    InputError
        Unknown name, or the device is not there.
    """
    import torch

    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(
            f"device {device!r} is unknown; use 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'"
        ) from None
    if chosen.type == "cuda":
        if torch.version.cuda is None:
            raise InputError(
                f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) is built "
                "without CUDA. Use device='cpu' or 'auto', or install a CUDA build of torch."
            )
        count = torch.cuda.device_count()
        if not count or (chosen.index or 0) >= count:
            raise InputError(
                f"device {str(device)!r} was asked for, but torch sees {count} CUDA device(s). "
                "Use device='cpu' or 'auto', or check `nvidia-smi` and CUDA_VISIBLE_DEVICES."
            )
    elif chosen.type not in ("cpu", "mps"):
        raise InputError(f"device {str(device)!r} is not supported; use 'auto', 'cpu', 'cuda' or 'mps'")
    elif chosen.index:
        raise InputError(
            f"device {str(device)!r} was asked for, but there is one '{chosen.type}' only. Use "
            f"device='{chosen.type}'; --threads says on how many cores"
        )
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' was asked for, but torch sees none here. Use device='cpu' or 'auto'.")
    return chosen


def set_threads(n: int | None) -> None:
    """Bound the threads of this process and of those it starts: of torch, and of decoding; None: as it is.

    Two processes with two threads each on two cores slow each other down twentyfold: on a busy machine, and
    with several processes, one thread each is the safe choice.

    Raises
    ------
    InputError
        Less than one.
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

        In bfloat16 an embedding's last bits depend on the size of the batch (cosine still above 0.999), so a
        comparison to the last digit wants "float32". The preset "mini" asks for float32.
    device : str or torch.device
        Where the model will run.

    Returns
    -------
    torch.dtype
    """
    import torch

    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    kind = torch.device(device).type
    if precision == "float16" and kind == "cpu":
        raise InputError("precision 'float16' is not for the CPU; use 'auto', 'bfloat16' or 'float32'")
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if kind == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = kind == "cpu" and _cpu_has("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return torch.bfloat16 if fast else torch.float32


def _cpu_has(*questions: str) -> bool:
    # Private in torch 2.13 and the only way to ask without parsing /proc/cpuinfo: a missing one means "no".
    import torch

    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in questions)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as it is recorded: "float32", "bfloat16", "float16"."""
    return str(dtype).removeprefix("torch.")
