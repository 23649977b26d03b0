"""Are promises kept? Realised false-positive rate and conformal coverage on images nobody has chosen on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from itemkit import schema
from itemkit.calibrate import conformal_p, threshold_at_fpr
from itemkit.errors import InputError

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
