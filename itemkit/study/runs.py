"""One run of a study: the scores of one contender, trained on one generator with one seed."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from itemkit import schema
from itemkit.calibrate import best_threshold, fit_calibrator, threshold_at_fpr


@dataclass
class Run:
    """Scores of one contender, trained on one generator with one seed.

    Attributes
    ----------
    detector, train_generator, seed : what was run
    threshold : on the score, from the calibration half of the validation images
    val_scores, val_labels : of that half
    test_scores : of every test image, in the order of ``Study.test``
    scale, offset : p(fake) = sigmoid(scale * score + offset), fitted on that half
    n_train, seconds, key, config : how it was made
    """

    detector: str
    train_generator: str
    seed: int
    threshold: float
    scale: float
    offset: float
    val_scores: list[float]
    val_labels: list[int]
    test_scores: list[float]
    n_train: int
    seconds: float
    key: str
    config: dict

    def probability(self) -> np.ndarray:
        """Calibrated p(fake) of every test image."""
        return expit(self.scale * np.asarray(self.test_scores) + self.offset)


def run_name(detector: str, train_generator: str, seed: int) -> str:
    """File name of a run; characters that a file system may not like are replaced."""
    return f"{_file_name(detector)}--{_file_name(train_generator)}--s{seed}.json"


def _file_name(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)
    # two names that lose the difference between them must not share a file
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def finish_run(
    detector: str,
    train_generator: str,
    seed: int,
    val_scores: np.ndarray,
    test_scores: np.ndarray,
    val_labels: np.ndarray,
    options: dict,
    config: dict,
    n_train: int = 0,
    seconds: float = 0.0,
    key: str = "",
) -> Run:
    """Choose threshold and calibration on validation scores, and make the record of a run."""
    # seven digits on disk and in memory alike, so that a run read back gives the same table to the last bit
    val, test = ([float(f"{v:.7g}") for v in scores] for scores in (val_scores, test_scores))
    arrays = np.asarray(val), np.asarray(val_labels, int)
    if options["threshold"] == "fpr":
        threshold = threshold_at_fpr(arrays[0][arrays[1] == schema.REAL], options["fpr"]).value
    else:
        threshold = best_threshold(arrays[1], arrays[0])
    platt = fit_calibrator(arrays[1], arrays[0], "platt")
    return Run(
        detector, train_generator, seed, float(threshold), platt.scale, platt.offset,
        val, arrays[1].tolist(), test, n_train, seconds, key, config,
    )  # fmt: skip
