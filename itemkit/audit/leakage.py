"""How well one property alone tells real from fake, on images that the scoring was not fitted to."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.tree import DecisionTreeClassifier

from itemkit import metrics

FOLDS = 5


def held_out_auroc(
    values: pd.Series, y: np.ndarray, groups: pd.Series, kind: str, n_boot: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """AUROC of "fake" that one property reaches on images which the scoring was not fitted to.

    Each fold is scored by what was fitted to the other folds, and images are compared within their fold only.
    Pooling the scores of all folds instead would count against the property: where a fold happens to hold
    more fakes of a category, the rest holds fewer, and their common score is lower.

    Parameters
    ----------
    values : Series
        The property.
    y : int array
        1 fake, 0 real.
    groups : Series
        Images of one group are kept in one fold.
    kind : {"category", "number", "text"}
        Scored by the share of fakes in the category, a small decision tree, or a bag of words with logistic
        regression.
    n_boot, seed : int
        Resamples of the interval (images within class and fold); seed of folds and resamples.

    Returns
    -------
    auroc, low, high : float
        Mean over folds, weighted by their numbers of pairs, with a 95 % bootstrap interval; nan where no fold
        holds both classes.
    """
    score = {"category": _score_category, "number": _score_number, "text": _score_text}[kind]
    values = values.reset_index(drop=True)
    rng = np.random.default_rng(seed)
    folds = _folds(y, groups, rng)
    points, replicates, pairs = [], [], []
    for fold in range(FOLDS):
        test = folds == fold
        if len(np.unique(y[test])) < 2 or len(np.unique(y[~test])) < 2:
            continue
        scores = score(values[~test], y[~test], values[test])
        points.append(float(roc_auc_score(y[test], scores)))
        drawn = (
            metrics.stratified_weights(y[test], n, rng) for n in metrics.bootstrap_chunks(test.sum(), n_boot)
        )
        replicates.append(
            np.concatenate(
                [metrics.replicate(y[test], scores, weights, ["auroc"])["auroc"] for weights in drawn]
            )
        )
        pairs.append(int((y[test] == 0).sum()) * int((y[test] == 1).sum()))
    if not pairs:
        return np.nan, np.nan, np.nan
    low, high = metrics.percentile_interval(np.average(replicates, axis=0, weights=pairs))
    return float(np.average(points, weights=pairs)), low, high


def _folds(y: np.ndarray, groups: pd.Series, rng: np.random.Generator) -> np.ndarray:
    """Fold of each image: the groups of each class, shuffled, are dealt out in turn."""
    codes = pd.factorize(groups)[0]
    first = np.unique(codes, return_index=True)[1]
    fold_of_group = np.empty(len(first), dtype=np.int64)
    for label in (0, 1):
        members = np.flatnonzero(y[first] == label)
        fold_of_group[rng.permutation(members)] = np.arange(len(members)) % FOLDS
    return fold_of_group[codes]


def _score_category(train: pd.Series, y: np.ndarray, test: pd.Series) -> np.ndarray:
    counts = (
        pd.DataFrame({"value": train.fillna("-").to_numpy(), "y": y})
        .groupby("value")["y"]
        .agg(["sum", "count"])
    )
    rate = (counts["sum"] + y.mean()) / (counts["count"] + 1)  # one image's worth of prior
    return test.fillna("-").map(rate).fillna(y.mean()).to_numpy(dtype=float)


def _score_number(train: pd.Series, y: np.ndarray, test: pd.Series) -> np.ndarray:
    # a tree, not the rank: fakes of one fixed width in the middle of the photographs' widths are a leak too
    tree = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=max(5, len(y) // 100), random_state=0)
    return tree.fit(train.to_numpy()[:, None], y).predict_proba(test.to_numpy()[:, None])[:, 1]


def _score_text(train: pd.Series, y: np.ndarray, test: pd.Series) -> np.ndarray:
    words = bag_of_words()
    try:
        model = LogisticRegression(max_iter=1000).fit(words.fit_transform(train), y)
    except ValueError:  # empty vocabulary
        return np.full(len(test), y.mean())
    return model.predict_proba(words.transform(test))[:, 1]


def bag_of_words() -> CountVectorizer:
    """Presence of each word and punctuation mark: how a caption is punctuated is style, too."""
    return CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")
