"""What a detector reaches that sees no content: file bytes, border, noise level, histogram, spectrum.

Real and fake leave the laboratory through one codec at one size. What is left in these is the generators' own
doing; it is reported, so that nobody takes it for an effect of misalignment. Each guard is a pair of
detectors: one has seen the fakes it is asked about, the other has seen real images alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.preprocessing import StandardScaler

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


LEVELS = (5, 250)
"""Grey levels at or beyond which a value counts as nearly black or white."""


def histogram(pictures: np.ndarray) -> np.ndarray:
    """Ends and quantiles of each channel's values, and the shares that are nearly black or white.

    Parameters
    ----------
    pictures : uint8 array, shape (n, side, side, 3)

    Returns
    -------
    float array, shape (n, 33)
    """
    x = pictures.reshape(len(pictures), -1, 3).astype(float)
    quantiles = np.quantile(x, (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1), axis=1)
    ends = np.stack([(x <= LEVELS[0]).mean(1), (x >= LEVELS[1]).mean(1)])
    return np.concatenate([quantiles, ends]).transpose(1, 0, 2).reshape(len(x), -1)


N_RINGS = 12


def spectrum(pictures: np.ndarray) -> np.ndarray:
    """Logarithm of the mean power in rings of frequency, of brightness, from the mean to the corners.

    Parameters
    ----------
    pictures : uint8 array, shape (n, side, side, 3)

    Returns
    -------
    float array, shape (n, 12)
    """
    grey = pictures.astype(float).mean(-1)
    side = grey.shape[1]
    power = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))) ** 2
    f = np.fft.fftfreq(side)
    ring = np.minimum(np.hypot(f[:, None], f) / 0.5**0.5 * N_RINGS, N_RINGS - 1).astype(int)
    return np.log1p(np.stack([power[:, ring == k].mean(1) for k in range(N_RINGS)], axis=1))


GUARDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "file bytes": file_bytes,
    "border pixels": border,
    "noise level": noise_level,
    "histogram": histogram,
    "spectrum": spectrum,
}


def leaks(table: pd.DataFrame, pictures: np.ndarray, seeds: Sequence[int] = range(5)) -> pd.DataFrame:
    """Try every guard on every generator of a data set.

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
        ``guard, classes, generator, value, low, high``: AUROC on the test split with its 95 % bootstrap
        interval; ``classes`` is 2 for trees trained on reals and this generator, 1 for the distance from
        training reals.
    """
    name, split = table[schema.GENERATOR].to_numpy(), table[schema.SPLIT].to_numpy()
    real, known, test = name == schema.REAL_GENERATOR, np.isin(split, ("train", "val")), split == "test"
    rows = []
    for guard, measure in GUARDS.items():
        x = measure(pictures)
        far = strangeness(x[real & known], x)
        for generator in dict.fromkeys(name[~real]):
            of = real | (name == generator)
            at = of & test
            told = [
                HistGradientBoostingClassifier(max_iter=60, random_state=seed)
                .fit(x[of & known], ~real[of & known])
                .predict_proba(x[at])[:, 1]
                for seed in seeds
            ]
            for classes, score in ((2, np.mean(told, axis=0)), (1, far[at])):
                found = bootstrap((~real[at]).astype(int), score, metrics=("auroc",)).iloc[0]
                rows.append(
                    {"guard": guard, "classes": classes, "generator": generator}
                    | dict(found[["value", "low", "high"]])
                )
    return pd.DataFrame(rows)


def strangeness(known: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance of measurements from those of real images, in their own spread (Mahalanobis).

    Parameters
    ----------
    known : float array, shape (m, d)
        Of real images alone.
    x : float array, shape (n, d)

    Returns
    -------
    float array, shape (n,)
    """
    scale = StandardScaler().fit(known)
    return LedoitWolf().fit(scale.transform(known)).mahalanobis(scale.transform(x))
