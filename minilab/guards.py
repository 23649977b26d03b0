"""What a detector reaches that sees no content: file bytes, border pixels, noise level.

Real and fake leave the laboratory through one codec at one size. What is left in these three is the
generators' own doing; it is reported, so that nobody takes it for an effect of misalignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier

from itemkit import schema
from itemkit.metrics import bootstrap
from minilab.fakes import png

BORDER_PX = 2


def file_bytes(pictures: np.ndarray) -> np.ndarray:
    """Length of each picture's PNG file.

    Parameters
    ----------
    pictures : uint8 array, shape (n, side, side, 3)

    Returns
    -------
    float array, shape (n, 1)
    """
    return np.array([[len(png(p))] for p in pictures], dtype=float)


def border(pictures: np.ndarray) -> np.ndarray:
    """Mean and spread of the frame of pixels along each edge, for each channel.

    Parameters
    ----------
    pictures : uint8 array, shape (n, side, side, 3)

    Returns
    -------
    float array, shape (n, 24)
    """
    x, k = pictures.astype(float), BORDER_PX
    edges = (x[:, :k], x[:, -k:], x[:, :, :k], x[:, :, -k:])
    return np.concatenate([f(e, axis=(1, 2)) for e in edges for f in (np.mean, np.std)], axis=1)


def noise_level(pictures: np.ndarray) -> np.ndarray:
    """Robust standard deviation of each channel's noise, in grey levels.

    Median absolute diagonal detail of the Haar wavelet, divided by 0.6745 (Donoho and Johnstone 1994).

    Parameters
    ----------
    pictures : uint8 array, shape (n, side, side, 3)

    Returns
    -------
    float array, shape (n, 3)
    """
    x = pictures.astype(float)
    detail = (x[:, ::2, ::2] - x[:, 1::2, ::2] - x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 2
    return np.median(np.abs(detail), axis=(1, 2)) / 0.6745


GUARDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "file bytes": file_bytes,
    "border pixels": border,
    "noise level": noise_level,
}


def leaks(table: pd.DataFrame, pictures: np.ndarray, seeds: Sequence[int] = range(5)) -> pd.DataFrame:
    """Train a detector on each of the three, for each generator, and test it on the test split.

    Parameters
    ----------
    table : DataFrame, n rows
        With ``generator`` and ``split``.
    pictures : uint8 array, shape (n, side, side, 3)
    seeds : sequence of int
        Of the boosted trees; their probabilities are averaged.

    Returns
    -------
    DataFrame
        ``guard, generator, value, low, high``: AUROC on the test split with its 95 % bootstrap interval.
    """
    name, split = table[schema.GENERATOR].to_numpy(), table[schema.SPLIT].to_numpy()
    real = name == schema.REAL_GENERATOR
    rows = []
    for guard, measure in GUARDS.items():
        x = measure(pictures)
        for generator in dict.fromkeys(name[~real]):
            of = real | (name == generator)
            train, test = of & np.isin(split, ("train", "val")), of & (split == "test")
            score = np.mean(
                [
                    HistGradientBoostingClassifier(max_iter=60, random_state=seed)
                    .fit(x[train], ~real[train])
                    .predict_proba(x[test])[:, 1]
                    for seed in seeds
                ],
                axis=0,
            )
            found = bootstrap((~real[test]).astype(int), score, metrics=("auroc",)).iloc[0]
            rows.append({"guard": guard, "generator": generator, **found[["value", "low", "high"]]})
    return pd.DataFrame(rows)
