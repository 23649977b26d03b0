"""Metrics with intervals: one vectorised implementation gives the number and all its bootstrap replicates.

A resample of the images is only another set of weights, so a thousand resamples are a thousand columns of one
array; every metric is a sum over the fakes of what lies above each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import scipy  # its statistics are loaded when they are used: a verdict does not wait for them
from scipy.special import expit, logit

from itemkit.errors import InputError

PROBABILITY_METRICS = ("ece", "brier")  # of these the largest is the worst
METRICS = (
    "ap", "auroc", "tpr_at_fpr01", "tpr_at_fpr05", "accuracy", "accuracy_real", "accuracy_fake",
    "accuracy_oracle", "balanced_accuracy", "balanced_accuracy_oracle", *PROBABILITY_METRICS,
)  # fmt: skip
RANKED = {"ap", "auroc", "tpr_at_fpr01", "tpr_at_fpr05", "accuracy_oracle", "balanced_accuracy_oracle"}
ECE_BINS = 15  # Guo et al. 2017 (arXiv 1706.04599)
LEVEL = 0.95  # coverage of the intervals


def check_scores(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores, of one length, finite, and of both classes."""
    y, s = np.asarray(y), np.asarray(s, np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise InputError(f"labels have shape {y.shape}, scores {s.shape}; expected two vectors of one length")
    if not np.isfinite(s).all():
        bad = np.flatnonzero(~np.isfinite(s))
        raise InputError(f"{len(bad)} of {len(s)} scores are not finite, the first is row {bad[0]}")
    if (values := np.unique(y).tolist()) != [0, 1]:
        raise InputError(f"labels are {values or 'none'}; expected both 0 (real) and 1 (fake)")
    return y.astype(np.int64), s


def _calibration(p: np.ndarray, fake: np.ndarray, weights: np.ndarray, balanced: bool) -> dict:
    """Calibration metrics of probabilities."""
    if p.min() < 0 or p.max() > 1:
        raise InputError(f"probabilities run from {p.min():.4g} to {p.max():.4g}; expected 0 to 1")
    share = weights / weights.sum(axis=0)
    if balanced:
        share = np.where(fake[:, None], weights / weights[fake].sum(0), weights / weights[~fake].sum(0)) / 2
    bins = np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)
    gap = (bins == np.arange(ECE_BINS)[:, None]) @ (share * (fake - p)[:, None])
    return {"ece": np.abs(gap).sum(axis=0), "brier": (fake - p) ** 2 @ share}


def replicate(
    y: np.ndarray,
    s: np.ndarray,
    weights: np.ndarray,
    threshold: float | None = None,
    probability: np.ndarray | None = None,
    balanced: bool = False,
    metrics: Sequence[str] = METRICS,
) -> dict[str, np.ndarray]:
    """Every metric that the inputs allow under every column of image weights, each an array (b,).

    Parameters
    ----------
    y, s : vectors of length n
        Labels (1 fake) and scores (higher: more likely fake).
    weights : array, shape (n, b)
        How often each image occurs in each of b resamples; a column of ones is the sample itself.
    threshold : float, for accuracies
        An image is called fake when its score is *above* it.
    probability : vector of length n, for "ece" and "brier"
        Calibrated p(fake).
    balanced : bool
        Give both classes half of the weight in "ece" and "brier", as in the prior p(fake) is calibrated to.
    metrics : names out of `METRICS`
        Which are wanted.
    """
    y, s = check_scores(y, s)
    weights = np.asarray(weights, np.float64)
    order = np.argsort(-s, kind="stable")
    fake, real = order[y[order] == 1], order[y[order] == 0]
    w, n_fake, n_real = weights[fake], weights[fake].sum(axis=0), weights[real].sum(axis=0)

    def called(rows: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
        """Weight of these rows at ("right") or above ("left") the score of every fake, shape (fakes, b)."""
        total = np.cumsum(np.r_[np.zeros((1, weights.shape[1])), weights[rows]], axis=0)
        return total[np.searchsorted(-s[rows], -s[fake], side)]

    # thresholds between two fakes call more reals fake and no fake, so the fakes' own scores are enough
    out: dict[str, np.ndarray] = {}
    if not RANKED.isdisjoint(metrics):
        fp = called(real, "right")
    if "auroc" in metrics:  # ties count one half
        out["auroc"] = 1 - np.sum(w * (fp + called(real, "left")), axis=0) / (2 * n_fake * n_real)
    for name, rate in (("tpr_at_fpr01", 0.01), ("tpr_at_fpr05", 0.05)):
        if name in metrics:
            out[name] = np.sum(w * (fp <= rate * n_real + 1e-6), axis=0) / n_fake
    if not {"ap", "accuracy_oracle", "balanced_accuracy_oracle"}.isdisjoint(metrics):
        tp = called(fake, "right")
        # a sum over distinct thresholds, no interpolation: scikit-learn's definition
        out["ap"] = np.sum(w * tp / np.maximum(tp + fp, 1e-12), axis=0) / n_fake
        # calling nothing fake is a threshold, too
        out["accuracy_oracle"] = (n_real + np.maximum((tp - fp).max(axis=0), 0)) / (n_fake + n_real)
        gain = (tp / n_fake - fp / n_real).max(axis=0)
        out["balanced_accuracy_oracle"] = (1 + np.maximum(gain, 0)) / 2
    if threshold is not None:
        hit, right = (s[fake] > threshold) @ w, (s[real] <= threshold) @ weights[real]
        out["accuracy"] = (hit + right) / (n_fake + n_real)
        out["accuracy_real"], out["accuracy_fake"] = right / n_real, hit / n_fake
        out["balanced_accuracy"] = (out["accuracy_real"] + out["accuracy_fake"]) / 2
    if probability is not None and not set(PROBABILITY_METRICS).isdisjoint(metrics):
        out |= _calibration(check_scores(y, np.asarray(probability))[1], y == 1, weights, balanced)
    return {name: out[name] for name in METRICS if name in out and name in metrics}


def average_precision(y: np.ndarray, s: np.ndarray) -> float:
    """Area under the precision-recall curve as a step function; equals scikit-learn's."""
    return float(replicate(y, s, np.ones((len(s), 1)))["ap"][0])


def resample(strata: np.ndarray, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap weights (n, n_boot): how often each image is drawn, with replacement within its stratum."""
    weights = np.empty((len(strata), n_boot), np.uint8)  # no image is drawn 256 times
    for name in np.unique(strata):
        rows = np.flatnonzero(strata == name)
        for b, drawn in enumerate(rng.integers(len(rows), size=(n_boot, len(rows)))):
            weights[rows, b] = np.bincount(drawn, minlength=len(rows))
    return weights


def interval(replicates: np.ndarray, metric: str = "", value: float = math.nan) -> tuple[float, float]:
    """95 % percentiles of bootstrap replicates; not a number without any.

    But for "ece": an image drawn twice looks like miscalibration, so resamples lie too high and may miss the
    value itself. There the lower end is the mirror image of the upper one, which errs on the wide side.
    """
    if not len(replicates):
        return math.nan, math.nan
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return (max(0.0, 2 * value - high), max(value, high)) if metric == "ece" else (low, high)


def p_value(drawn: np.ndarray) -> float:
    """Two-sided p of a difference, from its replicates: never below 2 / (n + 1); nan without any."""
    if not np.isfinite(drawn).all() or not len(drawn):
        return math.nan
    one_side = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return min(1.0, 2 * (1 + int(one_side)) / (len(drawn) + 1))


def holm(p: np.ndarray) -> np.ndarray:
    """P-values of all comparisons of one table, corrected for their number (Holm 1979); nan stays nan."""
    every = pd.Series(p, dtype=float)
    known = every.dropna().sort_values()
    return (known * np.arange(len(known), 0, -1)).cummax().clip(upper=1).reindex(every.index).to_numpy()


def bootstrap(
    y: np.ndarray,
    s: np.ndarray,
    threshold: float | None = None,
    probability: np.ndarray | None = None,
    metrics: Sequence[str] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    balanced: bool = False,
) -> pd.DataFrame:
    """Metrics with stratified percentile bootstrap intervals (95 %) over images.

    Parameters
    ----------
    y, s, threshold, probability, balanced
        See `replicate`.
    metrics : names, optional
        All that the inputs allow by default.

    Returns
    -------
    DataFrame
        One row per metric: ``metric, value, low, high, n_real, n_fake``.
    """
    y, s = check_scores(y, s)
    rng = np.random.default_rng(seed)
    size = max(1, int(4e6 // len(y)))  # resamples at a time, to bound memory: 32 MB per array
    draws = (resample(y, min(size, n_boot - start), rng) for start in range(0, n_boot, size))
    every, about = np.ones((len(y), 1)), (threshold, probability, balanced)
    parts = [replicate(y, s, weights, *about, metrics or METRICS) for weights in (every, *draws)]
    if unknown := [name for name in metrics or () if name not in parts[0]]:
        what = "accuracies need a threshold, chosen on validation images, ece and brier probabilities"
        known = ", ".join(replicate(y, s, every, *about))
        raise InputError(f"no {unknown[0]!r}; expected one of {known}; {what}")
    rows = []
    for name in metrics or parts[0]:
        value, *drawn = np.concatenate([part[name] for part in parts]).tolist()
        low, high = interval(np.array(drawn), name, value)
        rows.append({"metric": name, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows).assign(n_real=int((y == 0).sum()), n_fake=int((y == 1).sum()))


def effect_size(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """How far a quantity (a cosine, say) differs between real and fake images, sign kept.

    Positive d, and AUROC above one half, mean that the *real* images have the larger values. With fewer than
    two images of a class, or no spread in both, nothing can be said: all but the counts is nan.

    Returns
    -------
    dict
        ``d, d_low, d_high`` (Cohen's d with pooled standard deviation; normal approximation of Hedges and
        Olkin 1985), ``auroc, auroc_low, auroc_high`` (DeLong variance on the logit scale, so it stays inside
        0..1; exact 0 or 1 gives the rule-of-three bound), ``n_real, n_fake``.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    n_r, n_f = len(real), len(fake)
    names = ("d", "d_low", "d_high", "auroc", "auroc_low", "auroc_high")
    if min(n_r, n_f) < 2 or max(np.ptp(real), np.ptp(fake)) == 0:
        return {**dict.fromkeys(names, math.nan), "n_real": n_r, "n_fake": n_f}
    pooled = math.sqrt(((n_r - 1) * real.var(ddof=1) + (n_f - 1) * fake.var(ddof=1)) / (n_r + n_f - 2))
    d = float(real.mean() - fake.mean()) / pooled
    quantile = float(scipy.stats.norm.ppf((1 + LEVEL) / 2))
    half = quantile * math.sqrt((n_r + n_f) / (n_r * n_f) + d * d / (2 * (n_r + n_f)))
    ranks = scipy.stats.rankdata(np.r_[real, fake])
    # of each real the share of fakes below it, of each fake the share of reals above it (DeLong et al. 1988)
    below = (ranks[:n_r] - scipy.stats.rankdata(real)) / n_f
    above = 1 - (ranks[n_r:] - scipy.stats.rankdata(fake)) / n_r
    a, variance = float(below.mean()), float(below.var(ddof=1) / n_r + above.var(ddof=1) / n_f)
    if 0 < a < 1 and variance > 0:
        step = quantile * math.sqrt(variance) / (a * (1 - a))
        low, high = (float(expit(logit(a) + sign * step)) for sign in (-1, 1))
    else:
        bound = min(1.0, -math.log(1 - LEVEL) / min(n_r, n_f))
        low, high = (max(0.0, a - bound), min(1.0, a + bound))
    values = (d, d - half, d + half, a, low, high)
    return {**dict(zip(names, values, strict=True)), "n_real": n_r, "n_fake": n_f}
