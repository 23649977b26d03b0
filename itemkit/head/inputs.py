"""Features on their way into the network: layout checked, standardised, moved to the device once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from itemkit.errors import InputError
from itemkit.head.sets import SET_POOLINGS

BLOCK = 256  # rows that stay in the processor's cache between two steps; five times quicker than whole arrays


def check_slots(pooling: str | None, slots: tuple[int, int] | None, X: np.ndarray) -> None:
    """Refuse a layout that the columns do not have."""
    if (pooling is None) != (slots is None) or pooling not in (None, *SET_POOLINGS):
        raise InputError(
            f"pooling={pooling!r} with slots={slots!r}; expected None for both, or "
            f"{' or '.join(SET_POOLINGS)} with (places, width): RepresentationConfig(...).head_options(dim) "
            "gives both"
        )
    if slots is None:
        return
    places, width = slots
    mask = X[:, places * width : places * (width + 1)]
    if X.shape[1] < places * (width + 1) or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"slots={tuple(slots)} says that {places * width} columns of objects are followed by {places} of "
            f"zeros and ones; got {X.shape[1]} columns without them. represent() with a learned pooling "
            "makes such features"
        )


def moments(X: np.ndarray, slots: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; all places of a set share those of the objects there are.

    Returns
    -------
    tuple of float32 arrays
        A constant column has deviation 1: it stays zero instead of being divided by its rounding error.
    """
    mean, scale = _column_moments(torch.from_numpy(X))
    if slots is not None:
        places, width = slots
        there = X[:, places * width : places * (width + 1)].reshape(-1) > 0
        objects = X[:, : places * width].reshape(-1, width)[there]
        if len(objects):
            one = _column_moments(torch.from_numpy(objects))
            mean[: places * width], scale[: places * width] = (np.tile(v, places) for v in one)
        mean[places * width : places * (width + 1)] = 0
        scale[places * width : places * (width + 1)] = 1
    scale[scale <= 1e-6 * np.maximum(1e-6, np.abs(mean))] = 1
    return mean.astype(np.float32), scale.astype(np.float32)


def _column_moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    centre = x[:BLOCK].mean(0)  # near enough to the mean for a large mean to cost no digits
    total, square = torch.zeros((2, x.shape[1]), dtype=torch.float64)
    for block in x.split(BLOCK):
        off = block - centre
        total += off.sum(0)
        square += off.square_().sum(0)
    mean = total / len(x)
    return (mean + centre).numpy(), (square / len(x) - mean**2).clamp_min(0).sqrt().numpy()


def place(
    X: np.ndarray, mean: np.ndarray, scale: np.ndarray, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Standardised copy of the features on a device, written once in the number format of the training."""
    shift, factor = torch.from_numpy(mean).to(device), torch.from_numpy(1 / scale).to(device)
    out = torch.empty(X.shape, dtype=dtype, device=device)
    for into, block in zip(out.split(BLOCK), torch.from_numpy(X).split(BLOCK), strict=True):
        into.copy_((block.to(device) - shift).mul_(factor))
    return out


def hold_out(codes: np.ndarray, fraction: float, seed: int, names: np.ndarray) -> np.ndarray:
    """Mask of the rows held out for early stopping, class by class, at least one of each."""
    held = np.zeros(len(codes), bool)
    rng = np.random.default_rng(seed)
    for label in (0, 1):
        rows = np.flatnonzero(codes == label)
        if len(rows) < 2:
            raise InputError(
                f"class {names[label]!r} has {len(rows)} row; holding some out for early "
                f"stopping needs 2. Give X_val and y_val, or validation_fraction=0"
            )
        take = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held[rng.permutation(rows)[:take]] = True
    return held
