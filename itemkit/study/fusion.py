"""Fusion of misalignment with visual evidence: early (one head sees both) or late (two scores become one).

The two have opposite weaknesses: misalignment misses fakes that keep the meaning, pixels and raw embeddings
miss families they were not trained on. Whether joining them helps is a question for the worst cell of the
whole matrix, see `itemkit.study`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from itemkit.baselines import MisalignmentScorer, Scorer
from itemkit.calibrate import fit_calibrator
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.metrics import SMALLER_IS_BETTER
from itemkit.misalignment import RepresentationConfig

if TYPE_CHECKING:
    from itemkit.study.results import Study

FUSIONS = ("mean", "max", "stack")


def late_fusion(
    val_scores: Sequence[np.ndarray], y_val: np.ndarray, scores: Sequence[np.ndarray], how: str = "mean"
) -> np.ndarray:
    """Join the scores of several detectors; whatever is fitted is fitted on validation images.

    Parameters
    ----------
    val_scores, y_val : one vector of scores per detector, and the labels of those images
    scores : one vector per detector for the images to be judged
    how : {"mean", "max", "stack"}
        Mean of the calibrated log-odds (Platt), so that no detector speaks louder for its scale; their
        maximum ("fake if anyone says so"); or logistic regression on them.

    Returns
    -------
    float64 array, one joint log-odds per image.
    """
    if how not in FUSIONS:
        raise InputError(f"how={how!r}: expected one of {', '.join(FUSIONS)}")
    if len(val_scores) != len(scores) or len(scores) < 2:
        raise InputError(
            f"{len(val_scores)} validation and {len(scores)} test score vectors; expected two or more each"
        )
    maps = [fit_calibrator(y_val, s, "platt") for s in val_scores]
    test = np.stack([m.logit(s) for m, s in zip(maps, scores, strict=True)], axis=1)
    if how == "mean":
        return test.mean(1)
    if how == "max":
        return test.max(1)
    val = np.stack([m.logit(s) for m, s in zip(maps, val_scores, strict=True)], axis=1)
    # few inputs that agree with each other: the usual strength of the penalty keeps both weights apart from
    # zero
    return LogisticRegression(class_weight="balanced").fit(val, y_val).decision_function(test)


class LateFusion:
    """Several scorers, each trained by itself, joined by `late_fusion` on the validation images.

    Parameters
    ----------
    parts : Scorers
        Untrained.
    how : str
        See `late_fusion`.
    """

    def __init__(self, parts: Sequence[Scorer], how: str = "mean") -> None:
        self.parts, self.how = list(parts), how

    def fit(self, train: Features, val: Features) -> LateFusion:
        """Train each part, and remember their scores on the validation images."""
        for part in self.parts:
            part.fit(train, val)
        self.val_scores_ = [part.decision_function(val) for part in self.parts]
        self.y_val_ = val.labels
        return self

    def decision_function(self, features: Features) -> np.ndarray:
        """Joint log-odds of fake."""
        scores = [part.decision_function(features) for part in self.parts]
        return late_fusion(self.val_scores_, self.y_val_, scores, self.how)


def early_fusion(
    representation: RepresentationConfig | str = "absolute", head: MisalignmentMLP | None = None
) -> MisalignmentScorer:
    """One head on the misalignment vector and the image embedding side by side."""
    head = head if head is not None else MisalignmentMLP()
    return MisalignmentScorer(representation, head, beside=lambda features: features.image_emb)


def fusion_report(
    study: Study, fused: Mapping[str, Sequence[str]], metric: str = "auroc"
) -> tuple[pd.DataFrame, list[str]]:
    """Is a fusion ever worse than the better of its parts? Judged by every unseen cell of the matrix.

    Parameters
    ----------
    study : Study
        Holds the fusions and their parts.
    fused : dict
        Fusion -> its parts.
    metric : str

    Returns
    -------
    tuple
        ``Study.fusion_gain`` of every fusion over the unseen cells, with the column ``fusion``; and one
        sentence per fusion that answers the question and compares worst cells.
    """
    tables, answers = [], []
    for name, parts in fused.items():
        gain = study.fusion_gain(name, parts, metric)
        gain = gain[~gain["seen"]].assign(fusion=name)
        if gain.empty:
            continue
        tables.append(gain)
        # how much worse, whichever direction is better
        sign = 1 if metric in SMALLER_IS_BETTER else -1
        loss, surely = sign * gain["difference"], gain["low" if sign > 0 else "high"] * sign > 0
        below = loss > 0
        worst = study.summary([metric]).set_index("detector")
        weakest = worst.loc[name]
        means = [f"{value:.3f}" for value in worst.loc[list(parts), "unseen_mean"]]
        kept = max(parts, key=lambda part: -sign * worst.loc[part, "worst"])
        answer = (
            f"{name}: worse than the better of its parts ({', '.join(parts)}) in {int(below.sum())} of "
            f"{len(gain)} unseen cells, in {int(surely.sum())} of them beyond its "
            f"{100 * study.options['level']:.0f} % interval"
        )
        if below.any():
            cell = gain.loc[loss.idxmax()]
            answer += (
                f", at most by {loss.max():.3f} ({cell['train_generator']} → "
                f"{cell['test_generator']}, better part {cell['best_part']})"
            )
        answers.append(
            f"{answer}. Worst cell {weakest['worst']:.3f} ({weakest['worst_train']} → "
            f"{weakest['worst_test']}); the part with the best worst cell, {kept}, has "
            f"{worst.loc[kept, 'worst']:.3f}. Mean over unseen cells {weakest['unseen_mean']:.3f}, "
            f"of its parts {', '.join(means)}."
        )
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return table, answers
