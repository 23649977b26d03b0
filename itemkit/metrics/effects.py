"""Comparisons with an interval: two detectors, two classes of a quantity, two sets of embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd

from itemkit.errors import InputError
from itemkit.metrics import (
    bootstrap_chunks,
    check_scores,
    percentile_interval,
    replicate,
    stratified_weights,
    two_sided_p,
)


def compare(
    y: np.ndarray,
    s_a: np.ndarray,
    s_b: np.ndarray,
    metrics: Sequence[str] = ("ap", "auroc"),
    n_boot: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Difference of two detectors on the same images, by paired bootstrap.

    Returns
    -------
    DataFrame
        One row per metric: ``metric, a, b, difference, low, high, p_value``. The p-value is twice the smaller
        share of resamples on one side of zero, never below 1 / (n_boot + 1).
    """
    y, s_a = check_scores(y, s_a)
    _, s_b = check_scores(y, s_b)
    rng = np.random.default_rng(seed)
    ones = np.ones((len(y), 1))
    point = [replicate(y, s, ones, metrics) for s in (s_a, s_b)]
    gaps: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for b in bootstrap_chunks(len(y), n_boot):
        weights = stratified_weights(y, b, rng)
        first, second = (replicate(y, s, weights, metrics) for s in (s_a, s_b))
        for name in metrics:
            gaps[name].append(first[name] - second[name])
    rows = []
    for name in metrics:
        gap = np.concatenate(gaps[name])
        low, high = percentile_interval(gap, level)
        a, b_ = float(point[0][name][0]), float(point[1][name][0])
        rows.append(
            {"metric": name, "a": a, "b": b_, "difference": a - b_, "low": low, "high": high,
             "p_value": two_sided_p(gap)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _midranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _delong_parts(y: np.ndarray, scores: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of each detector and the covariance matrix of the estimates."""
    n_fake, n_real = int((y == 1).sum()), int((y == 0).sum())
    over_fake, over_real = [], []
    for s in scores:
        fake, real = s[y == 1], s[y == 0]
        ranks = _midranks(np.concatenate([fake, real]))
        over_fake.append((ranks[:n_fake] - _midranks(fake)) / n_real)
        over_real.append(1 - (ranks[n_fake:] - _midranks(real)) / n_fake)
    value = np.array([v.mean() for v in over_fake])
    spread = [
        np.atleast_2d(np.cov(v)) if len(v[0]) > 1 else np.zeros((len(v),) * 2) for v in (over_fake, over_real)
    ]
    return value, spread[0] / n_fake + spread[1] / n_real


def delong(y: np.ndarray, s_a: np.ndarray, s_b: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Test of DeLong et al. (1988) for two AUROCs on the same images.

    Returns
    -------
    dict
        ``auroc_a, auroc_b, difference, low, high, z, p_value``. Equal score orders give z = 0 and p = 1.
    """
    y, s_a = check_scores(y, s_a)
    _, s_b = check_scores(y, s_b)
    value, cov = _delong_parts(y, [s_a, s_b])
    gap = float(value[0] - value[1])
    se = math.sqrt(max(float(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]), 0.0))
    z = gap / se if se > 1e-12 else (0.0 if abs(gap) < 1e-12 else math.copysign(math.inf, gap))
    half = NormalDist().inv_cdf((1 + level) / 2) * se
    return {
        "auroc_a": float(value[0]), "auroc_b": float(value[1]), "difference": gap,
        "low": gap - half, "high": gap + half, "z": z, "p_value": math.erfc(abs(z) / math.sqrt(2)),
    }  # fmt: skip


def effect_size(real: np.ndarray, fake: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """How far a measured quantity (a cosine, say) differs between real and fake images, sign kept.

    Positive d, and AUROC above one half, mean that the *real* images have the larger values.

    Parameters
    ----------
    real, fake : vectors
        The quantity for each image; lengths may differ, at least 2 each.
    level : float
        Coverage of the intervals.

    Returns
    -------
    dict
        ``d, d_low, d_high`` (Cohen's d with pooled standard deviation; normal approximation of Hedges and
        Olkin 1985), ``auroc, auroc_low, auroc_high`` (chance that a real value exceeds a fake one; DeLong
        variance on the logit scale, so it stays inside 0..1; exact 0 or 1 gives the rule-of-three bound),
        ``n_real, n_fake``.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    n_r, n_f = len(real), len(fake)
    if min(n_r, n_f) < 2:
        raise InputError(f"{n_r} real and {n_f} fake values; an effect size needs at least 2 of each")
    pooled = math.sqrt(((n_r - 1) * real.var(ddof=1) + (n_f - 1) * fake.var(ddof=1)) / (n_r + n_f - 2))
    if not pooled > 0:
        raise InputError("all values of each class are equal; an effect size needs some spread")
    d = float(real.mean() - fake.mean()) / pooled
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    half = quantile * math.sqrt((n_r + n_f) / (n_r * n_f) + d * d / (2 * (n_r + n_f)))
    larger = np.r_[np.ones(n_r, int), np.zeros(n_f, int)]
    value, cov = _delong_parts(larger, [np.r_[real, fake]])
    a = float(value[0])
    if 0 < a < 1 and cov[0, 0] > 0:
        middle, step = math.log(a / (1 - a)), quantile * math.sqrt(cov[0, 0]) / (a * (1 - a))
        low, high = (1 / (1 + math.exp(-(middle + sign * step))) for sign in (-1, 1))
    else:
        bound = min(1.0, -math.log(1 - level) / min(n_r, n_f))
        low, high = (max(0.0, a - bound), min(1.0, a + bound))
    return {
        "d": d, "d_low": d - half, "d_high": d + half,
        "auroc": a, "auroc_low": low, "auroc_high": high, "n_real": n_r, "n_fake": n_f,
    }  # fmt: skip


def _frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # the eigenvalues of cov_a cov_b are those of the symmetric root cov_b root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_distance(
    a: np.ndarray, b: np.ndarray, n_boot: int = 50, level: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Fréchet distance between two sets of embeddings, each summarised as a Gaussian.

    The estimate is biased upwards for small sets, so compare sets of equal size only. The interval is the
    *basic* bootstrap one (reflected percentiles), which shifts against that bias and may therefore lie below
    ``value``.

    Parameters
    ----------
    a, b : float array, shape (n_a, d) and (n_b, d)
        Embeddings in one space.
    n_boot, level, seed
        Resamples of both sets (0: no interval), coverage, seed.

    Returns
    -------
    dict
        ``value, low, high, n_a, n_b``.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"embeddings have shapes {a.shape} and {b.shape}; expected (n, d) with n >= 2 and one d"
        )

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        cov = [np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y)]
        return _frechet(x.mean(0), cov[0], y.mean(0), cov[1])

    value = distance(a, b)
    rng = np.random.default_rng(seed)
    drawn = [
        distance(a[rng.integers(len(a), size=len(a))], b[rng.integers(len(b), size=len(b))])
        for _ in range(n_boot)
    ]
    low, high = percentile_interval(np.array(drawn), level) if drawn else (math.nan, math.nan)
    return {
        "value": value,
        "low": max(0.0, 2 * value - high),
        "high": 2 * value - low,
        "n_a": len(a),
        "n_b": len(b),
    }
