"""Metrics with intervals: one vectorised implementation gives the number and all its bootstrap replicates.

Every metric is computed from a *ladder*: the distinct scores in descending order with the weight of fake and
of real images on each rung. A resample of the images is only another set of weights, so a thousand resamples
are a thousand columns of one array. Label 1 is fake and a higher score means "more likely fake" everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit, logit

from itemkit.errors import InputError

RANK_METRICS = ("ap", "auroc", "tpr_at_fpr01", "tpr_at_fpr05", "accuracy_oracle")
THRESHOLD_METRICS = ("accuracy", "accuracy_real", "accuracy_fake", "balanced_accuracy")
PROBABILITY_METRICS = ("ece", "brier")
SMALLER_IS_BETTER = PROBABILITY_METRICS
METRICS = RANK_METRICS + THRESHOLD_METRICS + PROBABILITY_METRICS
ECE_BINS = 15  # Guo et al. 2017 (arXiv 1706.04599)

METRIC_TITLES = {
    "ap": "average precision",
    "auroc": "area under the ROC curve",
    "tpr_at_fpr01": "fakes found at 1 % false alarms",
    "tpr_at_fpr05": "fakes found at 5 % false alarms",
    "accuracy": "accuracy",
    "accuracy_oracle": "accuracy at the oracle threshold (chosen on the test images: a bound, not a result)",
    "accuracy_real": "accuracy on real images",
    "accuracy_fake": "accuracy on fake images",
    "balanced_accuracy": "balanced accuracy",
    "ece": "expected calibration error",
    "brier": "Brier score",
    "called_fake": "share of the images called fake",
    "above_half": "share of the images with p(fake) above one half",
}


def check_scores(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Validate labels and scores; clear errors for one class, other labels, NaN or unequal lengths."""
    y, s = np.asarray(y), np.asarray(s, np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise InputError(f"labels have shape {y.shape}, scores {s.shape}; expected two vectors of one length")
    if not np.isfinite(s).all():
        bad = np.flatnonzero(~np.isfinite(s))
        raise InputError(f"{len(bad)} of {len(s)} scores are not finite, the first is row {bad[0]}")
    values = set(np.unique(y).tolist())
    if not values <= {0, 1}:
        raise InputError(f"labels are {sorted(values)}; expected 0 (real) and 1 (fake)")
    if len(values) < 2:
        what = {0: "only real", 1: "only fake"}[values.pop()] if values else "no"
        raise InputError(f"{what} images among {len(y)}; these metrics need both real and fake ones")
    return y.astype(np.int64), s


class _Ladder:
    """Distinct scores, descending; sums of image weights on each rung, apart for fake and real."""

    def __init__(self, y: np.ndarray, s: np.ndarray) -> None:
        self.y = y
        self.order = np.argsort(-s, kind="stable")
        ordered = s[self.order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self.values = ordered[self.starts]

    def weigh(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (n, b) -> fake and real weight per rung, each (rungs, b)."""
        weights = weights[self.order]
        fake = self.y[self.order] == 1
        both = []
        for mask in (fake, ~fake):
            part = weights * mask[:, None]
            both.append(
                part if len(self.starts) == len(weights) else np.add.reduceat(part, self.starts, axis=0)
            )
        return both[0], both[1]


def _rank_metrics(names: Sequence[str], fake: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    tp, fp = np.cumsum(fake, axis=0, dtype=np.float64), np.cumsum(real, axis=0, dtype=np.float64)
    n_fake, n_real = tp[-1], fp[-1]
    out = {}
    for name in names:
        if name == "ap":
            seen = tp + fp
            # Sum over distinct thresholds, no interpolation: scikit-learn's definition.
            out[name] = np.sum(fake * tp / np.maximum(seen, 1e-12), axis=0) / n_fake
        elif name == "auroc":
            out[name] = np.sum(real * (tp - fake / 2), axis=0) / (n_fake * n_real)  # ties count one half
        elif name.startswith("tpr_at_fpr"):
            allowed = fp <= int(name[-2:]) / 100 * n_real + 1e-6
            out[name] = np.max(tp * allowed, axis=0) / n_fake
        elif name == "accuracy_oracle":  # calling nothing fake is a threshold, too
            out[name] = (n_real + np.maximum((tp - fp).max(axis=0), 0)) / (n_fake + n_real)
    return out


def _threshold_metrics(
    names: Sequence[str], values: np.ndarray, fake: np.ndarray, real: np.ndarray, threshold: float
) -> dict[str, np.ndarray]:
    called = (values > threshold)[:, None]
    n_fake, n_real = fake.sum(0), real.sum(0)
    hit, right = (fake * called).sum(0), (real * ~called).sum(0)
    every = {
        "accuracy": (hit + right) / (n_fake + n_real),
        "accuracy_real": right / n_real,
        "accuracy_fake": hit / n_fake,
        "balanced_accuracy": (hit / n_fake + right / n_real) / 2,
    }
    return {name: every[name] for name in names}


def _probability_metrics(
    names: Sequence[str], values: np.ndarray, fake: np.ndarray, real: np.ndarray, balanced: bool, n_bins: int
) -> dict[str, np.ndarray]:
    if values[0] > 1 or values[-1] < 0:
        raise InputError(f"probabilities run from {values[-1]:.4g} to {values[0]:.4g}; expected 0 to 1")
    if balanced:  # both classes count one half, as in the prior the probabilities were calibrated to
        fake, real = fake / fake.sum(0) / 2, real / real.sum(0) / 2
    else:
        total = fake.sum(0) + real.sum(0)
        fake, real = fake / total, real / total
    out = {}
    if "brier" in names:
        out["brier"] = np.sum(fake * (1 - values[:, None]) ** 2 + real * values[:, None] ** 2, axis=0)
    if "ece" in names:
        which = np.minimum((values * n_bins).astype(int), n_bins - 1)
        gap = np.zeros((n_bins, fake.shape[1]))
        np.add.at(gap, which, fake - (fake + real) * values[:, None])
        out["ece"] = np.abs(gap).sum(0)
    return out


def replicate(
    y: np.ndarray,
    s: np.ndarray,
    weights: np.ndarray,
    metrics: Sequence[str] = ("ap", "auroc"),
    threshold: float | None = None,
    probability: np.ndarray | None = None,
    balanced: bool = False,
    n_bins: int = ECE_BINS,
) -> dict[str, np.ndarray]:
    """Every metric under every column of image weights.

    Parameters
    ----------
    y, s : vectors of length n
        Labels (1 fake) and scores (higher: more likely fake).
    weights : array, shape (n, b)
        How often each image occurs in each of b resamples; a column of ones is the sample itself.
    metrics : names out of `METRICS`
        Threshold metrics need ``threshold``, calibration metrics ``probability``.
    threshold : float, optional
        An image is called fake when its score is *above* it.
    probability : vector of length n, optional
        Calibrated p(fake), for "ece" and "brier".
    balanced : bool
        Give both classes half of the weight in "ece" and "brier".
    n_bins : int
        Equal-width bins of "ece".

    Returns
    -------
    dict of float arrays, shape (b,).
    """
    y, s = check_scores(y, s)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise InputError(f"unknown metric {unknown[0]!r}; expected one of {', '.join(METRICS)}")
    out: dict[str, np.ndarray] = {}
    ladder = _Ladder(y, s)
    fake, real = ladder.weigh(weights)
    if rank := [name for name in metrics if name in RANK_METRICS]:
        out |= _rank_metrics(rank, fake, real)
    if cut := [name for name in metrics if name in THRESHOLD_METRICS]:
        if threshold is None:
            raise InputError(f"{cut[0]} needs a threshold, chosen on validation images")
        out |= _threshold_metrics(cut, ladder.values, fake, real, threshold)
    if calibration := [name for name in metrics if name in PROBABILITY_METRICS]:
        if probability is None:
            raise InputError(f"{calibration[0]} needs calibrated probabilities")
        ladder = _Ladder(*check_scores(y, probability))
        fake, real = ladder.weigh(weights)
        out |= _probability_metrics(calibration, ladder.values, fake, real, balanced, n_bins)
    return {name: np.asarray(out[name], np.float64) for name in metrics}


def average_precision(y: np.ndarray, s: np.ndarray) -> float:
    """Area under the precision-recall curve as a step function; equals scikit-learn's."""
    return float(replicate(y, s, np.ones((len(s), 1)), ["ap"])["ap"][0])


def auroc(y: np.ndarray, s: np.ndarray) -> float:
    """Chance that a random fake scores above a random real, ties counting one half."""
    return float(replicate(y, s, np.ones((len(s), 1)), ["auroc"])["auroc"][0])


def draw_weights(n: int, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """How often each image is drawn in each resample with replacement, shape (n, n_boot)."""
    drawn = rng.integers(n, size=(n_boot, n)) + np.arange(n_boot)[:, None] * n
    counts = np.bincount(drawn.ravel(), minlength=n * n_boot).reshape(n_boot, n)
    return np.ascontiguousarray(counts.T, dtype=np.float32)


def stratified_weights(y: np.ndarray, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap weights that keep the numbers of real and of fake images, shape (n, n_boot)."""
    weights = np.empty((len(y), n_boot), np.float32)
    for label in (0, 1):
        weights[y == label] = draw_weights(int((y == label).sum()), n_boot, rng)
    return weights


def bootstrap_chunks(n: int, n_boot: int) -> Iterator[int]:
    """Sizes of the portions in which ``n_boot`` resamples of n images are computed, to bound memory."""
    size = max(1, int(4e6 // max(n, 1)))  # about 16 MB per float32 array
    for start in range(0, n_boot, size):
        yield min(size, n_boot - start)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Central interval of bootstrap replicates; not a number without any."""
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def metric_interval(
    metric: str, value: float, replicates: np.ndarray, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of a metric.

    Percentiles, but for "ece": an image drawn twice looks like miscalibration, so resamples lie too high and
    their percentiles may miss the value itself. There the upper end is the percentile and the lower one its
    mirror image, which errs on the wide side.
    """
    low, high = percentile_interval(replicates, level)
    return (max(0.0, 2 * value - high), max(value, high)) if metric == "ece" else (low, high)


def two_sided_p(gap: np.ndarray) -> float:
    """Twice the smaller share of replicates of a difference on one side of zero, never below 1 / (n + 1)."""
    if not len(gap):
        return float("nan")
    return float(min(1.0, 2 * (1 + min((gap <= 0).sum(), (gap >= 0).sum())) / (len(gap) + 1)))


def bootstrap(
    y: np.ndarray,
    s: np.ndarray,
    threshold: float | None = None,
    probability: np.ndarray | None = None,
    metrics: Sequence[str] | None = None,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    balanced: bool = False,
) -> pd.DataFrame:
    """Metrics with stratified percentile bootstrap intervals over images.

    Parameters
    ----------
    y, s, threshold, probability, balanced
        See `replicate`.
    metrics : names, optional
        All that the inputs allow by default.
    n_boot, level, seed
        Resamples, coverage asked for, seed of the resamples.

    Returns
    -------
    DataFrame
        One row per metric: ``metric, value, low, high, n_real, n_fake``.
    """
    y, s = check_scores(y, s)
    names = list(metrics or RANK_METRICS)
    if metrics is None:
        names += THRESHOLD_METRICS if threshold is not None else ()
        names += PROBABILITY_METRICS if probability is not None else ()
    rng = np.random.default_rng(seed)
    options = (names, threshold, probability, balanced)
    point = replicate(y, s, np.ones((len(s), 1)), *options)
    parts = [
        replicate(y, s, stratified_weights(y, b, rng), *options) for b in bootstrap_chunks(len(y), n_boot)
    ]
    rows = []
    for name in names:
        value, replicates = float(point[name][0]), np.concatenate([part[name] for part in parts])
        low, high = metric_interval(name, value, replicates, level)
        rows.append({"metric": name, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows).assign(n_real=int((y == 0).sum()), n_fake=int((y == 1).sum()))


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
    quantile = float(stats.norm.ppf((1 + level) / 2))
    half = quantile * math.sqrt((n_r + n_f) / (n_r * n_f) + d * d / (2 * (n_r + n_f)))
    ranks = stats.rankdata(np.r_[real, fake])
    # of each real the share of fakes below it, of each fake the share of reals above it (DeLong et al. 1988)
    below = (ranks[:n_r] - stats.rankdata(real)) / n_f
    above = 1 - (ranks[n_r:] - stats.rankdata(fake)) / n_r
    a, variance = float(below.mean()), float(below.var(ddof=1) / n_r + above.var(ddof=1) / n_f)
    if 0 < a < 1 and variance > 0:
        step = quantile * math.sqrt(variance) / (a * (1 - a))
        low, high = (float(expit(logit(a) + sign * step)) for sign in (-1, 1))
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
    low, high = percentile_interval(np.array(drawn), level)
    about = {"value": value, "n_a": len(a), "n_b": len(b)}
    return about | {"low": float(np.maximum(0, 2 * value - high)), "high": 2 * value - low}
