"""From a raw score to a probability, a threshold and a verdict, all from validation images only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats
from scipy.special import expit, logit

from itemkit import schema
from itemkit.errors import InputError
from itemkit.metrics import check_scores

METHODS = ("temperature", "platt", "isotonic", "none", "auto")
VERDICTS = ("real", "fake", "unsure")


@dataclass(frozen=True)
class Calibrator:
    """Monotone map from a score to p(fake), under the assumption that real and fake are equally frequent.

    Attributes
    ----------
    method : {"temperature", "platt", "isotonic", "none"}
        One scale (Guo et al. 2017); scale and offset (Platt 1999); a step function drawn as a line; logistic
        as is.
    scale, offset : float
        p = sigmoid(scale * score + offset); temperature is 1 / scale.
    knots : tuple of (score, p) pairs
        Isotonic only, ascending.
    """

    method: str = "none"
    scale: float = 1.0
    offset: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()

    def __call__(self, score: np.ndarray) -> np.ndarray:
        """Probability of fake for each score."""
        score = np.asarray(score, np.float64)
        if self.method == "isotonic":
            x, p = np.array(self.knots).T
            return np.interp(score, x, p)
        return expit(self.scale * score + self.offset)

    def logit(self, score: np.ndarray) -> np.ndarray:
        """Calibrated log-odds; finite also where a sigmoid rounds to 0 or 1."""
        if self.method == "isotonic":
            return logit(self(score))
        return self.scale * np.asarray(score, np.float64) + self.offset

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Calibrator:
        """Inverse of `to_dict`."""
        return cls(**{**data, "knots": tuple((float(x), float(p)) for x, p in data.get("knots", ()))})


def _targets(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed targets and weights that give both classes one half.

    Platt's targets (n+1)/(n+2) instead of 0 and 1: without them separable validation scores would drive the
    scale to infinity and every probability to exactly 0 or 1, which no finite sample can justify.
    """
    n = np.array([(y == 0).sum(), (y == 1).sum()])
    target = np.where(y == 1, (n[1] + 1) / (n[1] + 2), 1 / (n[0] + 2))
    return target, 0.5 / n[y]


def _log_loss(y: np.ndarray, score: np.ndarray) -> float:
    """Class-balanced loss of log-odds against smoothed targets."""
    target, weight = _targets(y)
    return float(np.sum(weight * (np.logaddexp(0, score) - target * score)))


def _fit(y: np.ndarray, s: np.ndarray, method: str) -> Calibrator:
    if method == "temperature":
        found = optimize.minimize_scalar(
            lambda k: _log_loss(y, math.exp(k) * s), bounds=(-8, 8), method="bounded"
        )
        return Calibrator("temperature", scale=math.exp(found.x))
    if method == "platt":
        centre, spread = float(np.mean(s)), float(np.std(s)) or 1.0
        z = (s - centre) / spread
        target, weight = _targets(y)

        def gradient(w: np.ndarray) -> np.ndarray:
            error = weight * (expit(w[0] * z + w[1]) - target)
            return np.array([error @ z, error.sum()])

        found = optimize.minimize(lambda w: _log_loss(y, w[0] * z + w[1]), [1.0, 0.0], jac=gradient)
        scale = max(float(found.x[0]), 0.0)  # never turn a detector upside down
        return Calibrator("platt", scale=scale / spread, offset=float(found.x[1]) - scale * centre / spread)
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        target, weight = _targets(y)
        curve = IsotonicRegression(y_min=target.min(), y_max=target.max()).fit(s, target, weight)
        pairs = zip(curve.X_thresholds_, curve.y_thresholds_, strict=True)
        return Calibrator("isotonic", knots=tuple((float(x), float(p)) for x, p in pairs))
    return Calibrator("none")


def fit_calibrator(y: np.ndarray, s: np.ndarray, method: str = "temperature", seed: int = 0) -> Calibrator:
    """Fit the map from score to probability on validation images.

    Parameters
    ----------
    y, s : vectors
        Labels (1 fake) and scores of images that neither trained nor will test the detector.
    method : str
        "temperature", "platt", "isotonic", "none", or "auto": temperature or isotonic, whichever has the
        lower loss in 5-fold cross-validation over these images.
    seed : int
        Of the folds of "auto".

    Returns
    -------
    Calibrator
        Both classes are given half of the weight, so p(fake) means: if a real and a fake image are equally
        likely.
    """
    if method not in METHODS:
        raise InputError(f"calibration={method!r}: expected one of {', '.join(METHODS)}")
    y, s = check_scores(y, s)
    if method != "auto":
        return _fit(y, s, method)
    folds = 5
    if min(np.bincount(y)) < 2 * folds:
        return _fit(y, s, "temperature")  # too few images for steps
    fold = np.empty(len(y), int)
    for label in (0, 1):
        rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(y == label))
        fold[rows] = np.arange(len(rows)) % folds

    def held_out(name: str) -> float:
        score = np.empty(len(y))
        for k in range(folds):
            score[fold == k] = _fit(y[fold != k], s[fold != k], name).logit(s[fold == k])
        return _log_loss(y, score)

    return _fit(y, s, min(("temperature", "isotonic"), key=held_out))


@dataclass(frozen=True)
class Threshold:
    """A score above ``value`` is called fake; what that promises about real images is in ``statement``.

    Attributes
    ----------
    value : float
        Threshold on the raw score.
    fpr : float
        Requested false-positive rate.
    n_real, rank : int
        Validation reals, and the rank (from the top) of the one whose score is the threshold.
    low, high : float
        Interval in which the true false-positive rate lies for reals drawn like the validation ones.
    confidence : float
        Coverage of that interval.
    guarantee : {"average", "confident"}
        "average": the rate is at most ``fpr`` on average over validation draws. "confident": the rate is at
        most ``fpr`` with probability ``confidence``.
    """

    value: float
    fpr: float
    n_real: int
    rank: int
    low: float
    high: float
    confidence: float
    guarantee: str

    @property
    def statement(self) -> str:
        """The finite-sample statement in one sentence."""
        promise = (
            f"on average at most {self.fpr:.2%}"
            if self.guarantee == "average"
            else f"with {self.confidence:.0%} confidence at most {self.fpr:.2%}"
        )
        return (
            f"Of real images like the {self.n_real} validation ones, {promise} are called fake; with this "
            f"validation set the rate lies between {self.low:.2%} and {self.high:.2%} "
            f"({self.confidence:.0%})."
        )


def threshold_at_fpr(
    real_scores: np.ndarray, fpr: float = 0.05, guarantee: str = "average", confidence: float = 0.95
) -> Threshold:
    """Threshold at a requested false-positive rate, with a guarantee that needs no assumption on the scores.

    With the k-th largest of n exchangeable real scores as threshold, the true false-positive rate follows a
    Beta(k, n + 1 - k) distribution whatever the scores' distribution is (ties only lower the rate). Its mean
    is k / (n + 1): "average" takes the largest k for which that is at most ``fpr``, "confident" the largest
    for which the rate is at most ``fpr`` with probability ``confidence``.

    Parameters
    ----------
    real_scores : vector
        Scores of real validation images; images the detector was not trained on.
    fpr, guarantee, confidence
        See `Threshold`.

    Returns
    -------
    Threshold

    Raises
    ------
    InputError
        Too few real images for this rate; the message says how many it takes.
    """
    if not 0 < fpr < 1:
        raise InputError(f"fpr={fpr}: expected a rate between 0 and 1, such as 0.01")
    if guarantee not in ("average", "confident"):
        raise InputError(f"guarantee={guarantee!r}: expected 'average' or 'confident'")
    scores = np.sort(np.asarray(real_scores, np.float64))[::-1]
    if not np.isfinite(scores).all():
        raise InputError("some validation scores are not finite")
    n = len(scores)
    if guarantee == "average":
        rank, needed = int(math.floor(fpr * (n + 1) + 1e-9)), math.ceil(1 / fpr - 1e-9) - 1
    else:
        ranks = np.arange(1, n + 1)
        rank = int((stats.beta.ppf(confidence, ranks, n + 1 - ranks) <= fpr).sum())
        needed = math.ceil(math.log(1 - confidence) / math.log(1 - fpr))
    if rank < 1:
        raise InputError(
            f"a false-positive rate of {fpr:g} needs at least {needed} real validation images, got {n}; "
            "add some or ask for a higher rate"
        )
    low, high = stats.beta.ppf([(1 - confidence) / 2, (1 + confidence) / 2], rank, n + 1 - rank)
    value = float(scores[rank - 1])
    return Threshold(value, fpr, n, rank, float(low), float(high), confidence, guarantee)


def best_threshold(y: np.ndarray, s: np.ndarray) -> float:
    """Threshold with the highest balanced accuracy on these images, in the middle of its gap.

    On validation images this is how a detector without a requested rate decides. On the images it is judged
    on it is an oracle: print it only under that name.
    """
    y, s = check_scores(y, s)
    values = np.unique(s)
    cuts = np.r_[values[0] - 1, (values[1:] + values[:-1]) / 2, values[-1] + 1]
    real, fake = np.sort(s[y == 0]), np.sort(s[y == 1])
    right = np.searchsorted(real, cuts, side="right") / len(real)
    found = 1 - np.searchsorted(fake, cuts, side="right") / len(fake)
    total = right + found
    return float(np.mean(cuts[total >= total.max() - 1e-12][[0, -1]]))


def conformal_p(calibration: np.ndarray, scores: np.ndarray, label: int) -> np.ndarray:
    """Split-conformal p-value of "this image belongs to that class", one class at a time.

    Parameters
    ----------
    calibration : vector
        Scores of validation images of the class.
    scores : vector
        Scores of new images.
    label : {0, 1}
        0: how many calibration reals look at least as fake. 1: how many calibration fakes look at least as
        real.

    Returns
    -------
    float array
        (1 + count) / (n + 1). For a new image exchangeable with the calibration ones, P(p <= a) <= a for
        every a (Vovk et al. 2005; class-conditional form: Vovk 2012).
    """
    ordered = np.sort(np.asarray(calibration, np.float64))
    scores = np.asarray(scores, np.float64)
    if label == 0:
        count = len(ordered) - np.searchsorted(ordered, scores, side="left")
    else:
        count = np.searchsorted(ordered, scores, side="right")
    return (1 + count) / (len(ordered) + 1)


def check_fnr(fnr: float, n_fake: int) -> None:
    """Refuse a rate of missed fakes that ``n_fake`` calibration images cannot promise."""
    if not 0 < fnr < 1:
        raise InputError(f"fnr={fnr}: expected a rate between 0 and 1, such as 0.05")
    if fnr * (n_fake + 1) < 1:
        raise InputError(
            f"a rate of missed fakes of {fnr:g} needs at least {int(np.ceil(1 / fnr)) - 1} fake calibration "
            f"images, got {n_fake}; ask for a higher one"
        )


def three_way(p_real: np.ndarray, p_fake: np.ndarray, fpr: float, fnr: float) -> np.ndarray:
    """Real, fake or unsure from the two conformal p-values.

    "fake" rules out real at level ``fpr`` and keeps fake; "real" the other way round at ``fnr``; everything
    else, be it like both classes or like neither, is "unsure". So at most a share ``fpr`` of reals is called
    fake and at most a share ``fnr`` of fakes *of the kinds seen in validation* is called real.
    """
    verdict = np.full(len(p_real), "unsure", dtype=object)
    verdict[(p_real <= fpr) & (p_fake > fnr)] = "fake"
    verdict[(p_fake <= fnr) & (p_real > fpr)] = "real"
    return verdict


def because(verdict: str, like_real: float, like_fake: float, fpr: float, fnr: float) -> str:
    """Reason of a three-way verdict in one sentence."""
    real = f"{like_real:.1%} of real validation images look at least this fake"
    fake = f"{like_fake:.1%} of fake ones look at least this real"
    if verdict == "fake":
        return f"{real} (limit {fpr:.1%})"
    if verdict == "real":
        return f"{fake} (limit {fnr:.1%})"
    return f"{real}, {fake}: {'like both' if like_real > fpr else 'like neither'}"


def split_validation(y: np.ndarray, fraction: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Divide validation rows into those that stop the training and those that calibrate, class by class.

    Early stopping picks the weights that look best on its images, so calibrating on the same ones would be
    optimistic and void the conformal guarantee.

    Returns
    -------
    tuple of int arrays
        Rows for selection (``fraction`` of each class) and rows for calibration.
    """
    y = np.asarray(y)
    chosen = []
    for label in (0, 1):
        rows = np.flatnonzero(y == label)
        if len(rows) < 2:
            raise InputError(
                f"{len(rows)} {('real', 'fake')[label]} validation images; at least 2 of each class are "
                f"needed (one to stop the training, one to calibrate), some hundreds for useful thresholds"
            )
        take = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        chosen.append(np.random.default_rng([seed, label]).permutation(rows)[:take])
    select = np.sort(np.concatenate(chosen))
    return select, np.setdiff1d(np.arange(len(y)), select)


COLUMNS = ("promise", "label", "requested", "bound", "realised", "low", "high", "likely_low", "likely_high",
           "n_new", "n_calibration", "kept", "note")  # fmt: skip


def proportion_interval(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share: covers the truth at least as often as it says, for every n.

    Parameters
    ----------
    count, n : int
        Successes among n independent trials.
    level : float

    Returns
    -------
    tuple of float
        (0, 1) if n is 0.
    """
    if not 0 <= count <= n:
        raise InputError(f"{count} of {n}: expected 0 to {n}")
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, count, n - count + 1) if count else 0.0
    high = stats.beta.ppf(1 - tail, count + 1, n - count) if count < n else 1.0
    return float(low), float(high)


def check_promises(
    real_calibration: np.ndarray,
    fake_calibration: np.ndarray,
    real_new: np.ndarray,
    fake_new: np.ndarray,
    rates: Sequence[float] = (0.01, 0.05),
    level: float = 0.95,
) -> pd.DataFrame:
    """Compare what thresholds and conformal verdicts promise with what happens on new images.

    The promises hold on average over calibration sets, so with one calibration set the realised rate may lie
    beyond its bound by chance. For exchangeable images the number of errors follows a beta-binomial
    distribution whatever the scores are; ``likely_low, likely_high`` are its central ``level``. A realised
    rate beyond that says that the new images are not like the calibration ones.

    Parameters
    ----------
    real_calibration, fake_calibration : vectors
        Scores of the validation images that set thresholds.
    real_new, fake_new : vectors
        Scores of images of the same kinds that nothing was chosen on.
    rates : floats
        Requested rates of error.
    level : float
        Of the intervals.

    Returns
    -------
    DataFrame
        One row per promise, class and rate: ``promise`` ("false positives" of `threshold_at_fpr`, to be *at
        most* ``bound``; "coverage" of `conformal_p`, to be *at least* ``bound``), ``label, requested, bound,
        realised, low, high`` (Clopper-Pearson), ``likely_low, likely_high, n_new, n_calibration, kept`` (not
        beyond the likely range on the wrong side), ``note`` (why a rate cannot be promised).
    """
    rows = []
    for label, known, new in ((0, real_calibration, real_new), (1, fake_calibration, fake_new)):
        known, new = np.asarray(known, np.float64), np.asarray(new, np.float64)
        for rate in rates:
            about = {"label": schema.LABEL_NAMES[label], "requested": rate, "n_new": len(new),
                     "n_calibration": len(known)}  # fmt: skip
            note = "" if rate * (len(known) + 1) >= 1 - 1e-9 else "too few of this class to ever rule it out"
            wrong = int((conformal_p(known, new, label) <= rate).sum())
            shares = _shares(wrong, len(new), len(known), rate, level)
            cover = {"low": 1 - shares["high"], "high": 1 - shares["low"], "realised": 1 - shares["realised"]}
            cover |= {"likely_low": 1 - shares["likely_high"], "likely_high": 1 - shares["likely_low"]}
            rows.append(about | shares | cover | {"promise": "coverage", "bound": 1 - rate, "note": note})
            if label == schema.REAL:
                row = about | {"promise": "false positives", "bound": rate}
                try:
                    called = int((new > threshold_at_fpr(known, rate).value).sum())
                    row |= _shares(called, len(new), len(known), rate, level) | {"note": ""}
                except InputError as reason:
                    row |= {"kept": True, "note": f"not promised: {reason}"}
                rows.append(row)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    order = ["promise", "label", "requested"]
    return table.sort_values(order, ascending=[False, False, True], ignore_index=True)


def _shares(count: int, n: int, n_known: int, rate: float, level: float) -> dict:
    """Realised share with its interval, and what a threshold of that rank makes likely."""
    low, high = proportion_interval(count, n, level)
    rank = int(np.floor(rate * (n_known + 1) + 1e-9))
    likely = (0.0, 0.0)
    if rank and n:
        tails = [(1 - level) / 2, (1 + level) / 2]
        likely = stats.betabinom(n, rank, n_known + 1 - rank).ppf(tails) / n
    realised = count / n if n else float("nan")
    return {"realised": realised, "low": low, "high": high, "likely_low": float(likely[0]),
            "likely_high": float(likely[1]), "kept": not realised > likely[1] + 1e-12}  # fmt: skip


def told(table: pd.DataFrame) -> list[str]:
    """One sentence per row of `check_promises`."""
    lines = []
    for row in table.itertuples():
        of_reals = row.promise == "false positives"
        what = (
            f"false positives at a requested {row.requested:.0%}"
            if of_reals
            else f"{row.label} images covered at a requested {1 - row.requested:.0%}"
        )
        if pd.isna(row.realised):
            lines.append(f"{what}: {row.note or 'no new images of this class'}")
            continue
        lines.append(
            f"{what}: {row.realised:.1%} ({row.low:.1%}-{row.high:.1%}) of {row.n_new} new ones; promised on "
            f"average: {'at most' if of_reals else 'at least'} {row.bound:.0%}, likely with "
            f"{row.n_calibration} calibration images: {row.likely_low:.1%}-{row.likely_high:.1%}"
            + ("" if row.kept else "; NOT KEPT: the new images are not like the calibration ones")
            + (f"; {row.note}" if row.note else "")
        )
    return lines
