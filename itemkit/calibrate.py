"""From a raw score to a probability, a threshold and a verdict, all from validation images only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy  # its parts are loaded when they are used: a verdict needs neither fits nor distributions
from scipy.special import betaincinv, expit

from itemkit import schema
from itemkit.errors import InputError
from itemkit.metrics import check_scores


@dataclass(frozen=True)
class Calibrator:
    """Monotone map from a score to p(fake) = sigmoid(scale * score + offset).

    It assumes that real and fake are equally frequent. ``method`` is "temperature" (one scale, Guo et al.
    2017), "platt" (scale and offset, Platt 1999) or "none" (the score's own log-odds).
    """

    method: str = "none"
    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf or not math.isfinite(self.offset):
            raise InputError("a number of the calibration is not finite, or turns scores upside down")

    def logit(self, score: np.ndarray) -> np.ndarray:
        """Calibrated log-odds; finite also where a sigmoid rounds to 0 or 1."""
        return self.scale * np.asarray(score, np.float64) + self.offset

    def __call__(self, score: np.ndarray) -> np.ndarray:
        """Probability of fake for each score."""
        return expit(self.logit(score))


def fit_calibrator(y: np.ndarray, s: np.ndarray, method: str = "temperature") -> Calibrator:
    """Fit the map from score to probability on validation images.

    ``y, s`` are labels (1 fake) and scores of images that neither trained nor will test the detector. Both
    classes are given half of the weight; ``method`` is "temperature" or "platt".
    """
    y, s = check_scores(y, s)
    # Platt's targets (n+1)/(n+2) instead of 0 and 1: without them separable validation scores would drive the
    # scale to infinity and every probability to exactly 0 or 1, which no finite sample can justify.
    n = np.bincount(y, minlength=2)
    target = np.where(y == 1, (n[1] + 1) / (n[1] + 2), 1 / (n[0] + 2))
    weight = 0.5 / n[y]

    def log_loss(log_odds: np.ndarray) -> float:
        return float(np.sum(weight * (np.logaddexp(0, log_odds) - target * log_odds)))

    if method == "temperature":
        found = scipy.optimize.minimize_scalar(
            lambda k: log_loss(math.exp(k) * s), bounds=(-8, 8), method="bounded"
        )
        return Calibrator(method, scale=math.exp(found.x))
    if method != "platt":
        raise InputError(f"method={method!r}: expected temperature or platt")
    centre, spread = float(np.mean(s)), float(np.std(s)) or 1.0
    z = (s - centre) / spread

    def gradient(w: np.ndarray) -> np.ndarray:
        error = weight * (expit(w[0] * z + w[1]) - target)
        return np.array([error @ z, error.sum()])

    exact = {"method": "L-BFGS-B", "options": {"gtol": 1e-8, "ftol": 1e-15}}  # BFGS takes six times as long
    found = scipy.optimize.minimize(lambda w: log_loss(w[0] * z + w[1]), [1.0, 0.0], jac=gradient, **exact)
    scale = max(float(found.x[0]), 0.0)  # never turn a detector upside down
    return Calibrator(method, scale=scale / spread, offset=float(found.x[1]) - scale * centre / spread)


def _rank(rate: float, n: int) -> int:
    """Which of n calibration scores, counted from the wrong end, keeps a rate of errors; 0 if none does.

    With the k-th of n exchangeable scores as threshold, the true rate follows Beta(k, n + 1 - k), of mean
    k / (n + 1), whatever the scores' distribution is (ties only lower it).
    """
    return math.floor(rate * (n + 1) + 1e-9)


def lacking(rate: float, n: int, label: int) -> str | None:
    """Why ``n`` calibration images of a class cannot promise a rate of errors; None if they can.

    The rate is of false positives (label 0, option fpr) or of missed fakes (label 1, option fnr); an
    InputError if it is no number between 0 and 1.
    """
    option, what = (("fpr", "false-positive rate"), ("fnr", "rate of missed fakes"))[label]
    if not 0 < rate < 1:
        raise InputError(f"{option}={rate}: expected a rate between 0 and 1, such as 0.05")
    if _rank(rate, n):
        return None
    least = math.ceil(1000 / (n + 1)) / 1000  # the smallest rate that n images can promise, rounded up
    less = f"; --{option} {least:g} asks for less" if n else ""
    return (
        f"a {what} of {rate:g} needs at least {math.ceil(1 / rate - 1e-9) - 1} {schema.LABEL_NAMES[label]} "
        f"validation images to calibrate on, got {n}{less}"
    )


@dataclass(frozen=True)
class Threshold:
    """A score above ``value`` is called fake."""

    value: float
    fpr: float  # share of reals that is called fake at most, on average over draws of validation images
    n_real: int  # validation reals
    low: float  # 95 % interval of the true rate for reals like these
    high: float

    @property
    def statement(self) -> str:
        """The finite-sample statement in one sentence."""
        return (
            f"Of real images like the {self.n_real} validation ones, on average at most {self.fpr:.2%} are "
            f"called fake; with this validation set the rate lies between {self.low:.2%} and {self.high:.2%} "
            "(95%)."
        )


def threshold_at_fpr(real_scores: np.ndarray, fpr: float = 0.05) -> Threshold:
    """Threshold at a requested false-positive rate, with a promise that needs no assumption on the scores.

    ``real_scores`` are those of real validation images that the detector was not trained on; if they are too
    few for this rate, an InputError says how many it takes.
    """
    scores = np.sort(np.asarray(real_scores, np.float64))[::-1]
    n = len(scores)
    if reason := lacking(fpr, n, schema.REAL):
        raise InputError(reason)
    rank = _rank(fpr, n)
    low, high = betaincinv(rank, n + 1 - rank, [0.025, 0.975])  # quantiles of Beta
    return Threshold(float(scores[rank - 1]), fpr, n, float(low), float(high))


def best_threshold(y: np.ndarray, s: np.ndarray) -> float:
    """Threshold with the highest balanced accuracy on these images, in the middle of its gap.

    Of several that are equally good, the middle one. On validation images this is how a detector without a
    requested rate decides. On the images it is judged on it is an oracle: print it only under that name.
    """
    from sklearn.metrics import roc_curve  # only here: a verdict does not wait for it

    fpr, tpr, scores = roc_curve(*check_scores(y, s), drop_intermediate=False)  # descending; first infinity
    gain = tpr - fpr
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    k = best[len(best) // 2]  # scores[k] and all above are called fake
    if k == len(scores) - 1:
        return float(min(scores[k] - 1, np.nextafter(scores[k], -np.inf)))
    above, below = float(scores[k]), float(scores[k + 1])
    middle = below + (above - below) / 2
    return middle if middle < above < math.inf else below  # of neighbouring floats the lower one


def logit_shift(
    known: np.ndarray,
    known_y: np.ndarray,
    target: np.ndarray,
    target_y: np.ndarray | None = None,
    share_fake: float = 0.5,
) -> float:
    """One number to add to a detector's log-odds on images of another world than it was calibrated in.

    The assumption is that this world moves all log-odds alike: an order that is lost does not come back.

    Parameters
    ----------
    known, known_y : vectors
        Calibrated log-odds and labels (1 fake) of the validation images.
    target, target_y : vectors
        Those of some images of the other world. With labels: the shift of largest likelihood, each class
        given half of the weight. Without: the one that brings their median to that of the known images mixed
        so that ``share_fake`` are fake; the fakes must then lie where the known ones do.

    References
    ----------
    One scalar correction of the logit with few or no labels: arXiv 2602.01973.
    """
    known_y, known = check_scores(known_y, known)
    target = np.asarray(target, np.float64)
    if not len(target) or not np.isfinite(target).all() or not 0 < share_fake < 1:
        raise InputError(
            f"{len(target)} log-odds and share_fake={share_fake}; expected finite ones, and a share in 0..1"
        )
    if target_y is None:
        n = np.bincount(known_y)
        weights = np.where(known_y == schema.FAKE, share_fake / n[1], (1 - share_fake) / n[0])
        order = np.argsort(known)
        middle = order[np.searchsorted(np.cumsum(weights[order]), 0.5 - 1e-9)]
        return float(known[middle] - np.median(target))
    y, target = check_scores(target_y, target)
    weights, far = 0.5 / np.bincount(y)[y], np.abs(target).max() + 50
    return float(
        scipy.optimize.brentq(lambda shift: weights @ (expit(target + shift) - y), -far, far, xtol=1e-4)
    )


def conformal_p(calibration: np.ndarray, scores: np.ndarray, label: int) -> np.ndarray:
    """Split-conformal p-value of "this image belongs to that class", one class at a time.

    Returns
    -------
    float array, of the shape of ``scores``
        (1 + count) / (n + 1), where count is how many of the n ``calibration`` scores of the class look at
        least as fake (label 0) or as real (label 1). For a new image exchangeable with the calibration ones,
        P(p <= a) <= a for every a (Vovk et al. 2005; class-conditional form: Vovk 2012).
    """
    ordered = np.sort(np.asarray(calibration, np.float64))
    below = np.searchsorted(ordered, scores, side="left" if label == schema.REAL else "right")
    count = len(ordered) - below if label == schema.REAL else below
    return (1 + count) / (len(ordered) + 1)


def three_way(like_real: np.ndarray, like_fake: np.ndarray, fpr: float, fnr: float) -> np.ndarray:
    """Real, fake or unsure from the two conformal p-values.

    "fake" rules out real at level ``fpr`` and not fake; "real" the other way round at ``fnr``; everything
    else, be it like both classes or like neither, is "unsure". So at most a share ``fpr`` of reals is called
    fake and at most a share ``fnr`` of fakes *of the kinds seen in validation* is called real.
    """
    no_real, no_fake = like_real <= fpr, like_fake <= fnr
    return np.select([no_real & ~no_fake, no_fake & ~no_real], ["fake", "real"], "unsure")


def because(verdict: str, like_real: float, like_fake: float, fpr: float, fnr: float) -> str:
    """Reason of a three-way verdict in one sentence."""
    real = f"{like_real:.1%} of real validation images look at least this fake"
    fake = f"{like_fake:.1%} of fake ones look at least this real"
    if verdict == "fake":
        return f"{real} (limit {fpr:.1%})"
    if verdict == "real":
        return f"{fake} (limit {fnr:.1%})"
    return f"{real}, {fake}: {'like both' if like_real > fpr else 'like neither'}"


def proportion_interval(count: int, n: int) -> tuple[float, float]:
    """95 % Clopper-Pearson interval of a share: covers the truth at least as often as it says."""
    interval = scipy.stats.binomtest(count, n).proportion_ci(0.95, "exact") if n else (0.0, 1.0)
    return float(interval[0]), float(interval[1])


def check_promises(
    real_calibration: np.ndarray, fake_calibration: np.ndarray, real_new: np.ndarray, fake_new: np.ndarray
) -> pd.DataFrame:
    """Compare what thresholds and conformal verdicts promise with what happens on new images.

    The promises hold on average over calibration sets, so with one calibration set the realised rate may lie
    beyond its bound by chance. For exchangeable images the number of errors follows a beta-binomial
    distribution whatever the scores are; a realised rate above its central 95 % says that the new images are
    not like the calibration ones.

    Parameters
    ----------
    real_calibration, fake_calibration, real_new, fake_new : vectors
        Scores of the validation images that set thresholds, and of images that nothing was chosen on.

    Returns
    -------
    DataFrame
        For each class and each rate at which it is to be ruled out at most (1 and 5 %): ``label, requested,
        realised, low, high`` (Clopper-Pearson), ``likely_low, likely_high`` (beta-binomial), ``n_new,
        n_calibration, kept`` (not above what is likely), ``note`` (why there is no promise, or nothing to
        hold it against; then numbers are empty).
    """
    rows = []
    for label, known, new in ((0, real_calibration, real_new), (1, fake_calibration, fake_new)):
        for rate in (0.01, 0.05):
            n, m, numbers = len(new), len(known), np.full(5, np.nan)
            reason = lacking(rate, m, label)
            if n and not reason:
                errors = int((conformal_p(known, new, label) <= rate).sum())
                rank = _rank(rate, m)
                likely = scipy.stats.betabinom(n, rank, m + 1 - rank).ppf([0.025, 0.975]) / n
                numbers = np.array([errors / n, *proportion_interval(errors, n), *likely])
            kept = not numbers[0] > numbers[4] + 1e-12
            note = f"not promised: {reason}" if reason else "" if n else "no new images of this class"
            rows.append((schema.LABEL_NAMES[label], rate, *numbers, n, m, kept, note))
    names = "label requested realised low high likely_low likely_high n_new n_calibration kept note"
    return pd.DataFrame(rows, columns=names.split())


def promise_sentences(table: pd.DataFrame) -> list[str]:
    """One sentence per row of `check_promises`."""
    errors = {"real": "false positives", "fake": "fakes ruled out"}
    return [
        f"{errors[row.label]} at a requested {row.requested:.0%}: "
        + (
            row.note
            or f"{row.realised:.1%} ({row.low:.1%}-{row.high:.1%}) of {row.n_new} new {row.label} images; "
            f"likely with {row.n_calibration} calibration images: {row.likely_low:.1%}-{row.likely_high:.1%}"
            + ("" if row.kept else "; NOT KEPT: the new images are not like the calibration ones")
        )
        for row in table.itertuples()
    ]
