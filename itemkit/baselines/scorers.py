"""The interface of everything that trains and scores, and the scorers that stand beside misalignment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from scipy.special import logit
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from itemkit import schema
from itemkit.baselines import pixels as pixel_baselines
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import RepresentationConfig, get_representation, represent


class Scorer(Protocol):
    """Anything that learns from features and gives each image a score."""

    def fit(self, train: Features, val: Features) -> Any:
        """Learn; ``val`` is for early stopping only."""

    def decision_function(self, features: Features) -> np.ndarray:
        """Score of each image, higher for fake."""


class FeatureScorer:
    """A vector of each image and a classifier on it.

    Parameters
    ----------
    vectors : callable
        Features -> array (n, k), or (n, h, w, 3) for pixels.
    estimator : scikit-learn classifier
        Untrained; one whose ``fit`` takes ``X_val, y_val`` is stopped on the validation images.
    """

    def __init__(self, vectors: Callable[[Features], np.ndarray], estimator: Any) -> None:
        self.vectors, self.estimator = vectors, estimator

    def fit(self, train: Features, val: Features) -> FeatureScorer:
        """Train on ``train``, stop on ``val`` where the classifier can."""
        self.estimator_ = clone(self.estimator)
        x, y = self.vectors(train), train.labels
        if isinstance(self.estimator, MisalignmentMLP | pixel_baselines.PixelCNN):
            self.estimator_.fit(x, y, self.vectors(val), val.labels)
        else:
            self.estimator_.fit(x, y)
        return self

    def decision_function(self, features: Features) -> np.ndarray:
        """Log-odds or margin of fake."""
        x = self.vectors(features)
        if hasattr(self.estimator_, "decision_function"):
            return np.asarray(self.estimator_.decision_function(x), np.float64)
        return logit(np.clip(self.estimator_.predict_proba(x)[:, 1], 1e-9, 1 - 1e-9))


class MisalignmentScorer(FeatureScorer):
    """A representation and a head that knows where in it the objects stand.

    Parameters
    ----------
    representation : RepresentationConfig or name
    head : MisalignmentMLP
        Untrained.
    prepare : callable, optional
        Features -> Features, before they are represented: other texts, for the controls.
    beside : callable, optional
        Features -> array (n, k), further columns for the head, for early fusion.
    """

    def __init__(
        self,
        representation: RepresentationConfig | str,
        head: MisalignmentMLP,
        prepare: Callable[[Features], Features] | None = None,
        beside: Callable[[Features], np.ndarray] | None = None,
    ) -> None:
        config = get_representation(representation)

        def vectors(features: Features) -> np.ndarray:
            x = represent(prepare(features) if prepare else features, config)
            return np.concatenate([x, beside(features)], axis=1) if beside else x

        super().__init__(vectors, head)
        self.representation = config

    def fit(self, train: Features, val: Features) -> MisalignmentScorer:
        """Train on ``train``, stop on ``val``."""
        self.estimator = clone(self.estimator).set_params(**self.representation.head_options(train.dim))
        super().fit(train, val)
        return self


class NearestNeighbour(ClassifierMixin, BaseEstimator):
    """UnivFD's nearest neighbour (Ojha et al. 2023, arXiv 2302.10174): no training, two banks of embeddings.

    The score is the cosine to the nearest fake minus the cosine to the nearest real image.
    """

    def fit(self, X: np.ndarray, y: np.ndarray) -> NearestNeighbour:
        """Remember the embeddings of both classes."""
        X, y = np.asarray(X, np.float32), np.asarray(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) != 2:
            raise InputError(f"{len(self.classes_)} classes among {len(y)} images; expected real and fake")
        X = X / np.linalg.norm(X, axis=1, keepdims=True)
        self.banks_ = tuple(X[y == c] for c in self.classes_)
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Nearest fake minus nearest real cosine."""
        X = np.asarray(X, np.float32)
        X = X / np.linalg.norm(X, axis=1, keepdims=True)
        out = np.empty(len(X), np.float32)
        for i in range(0, len(X), 1024):
            real, fake = ((X[i : i + 1024] @ bank.T).max(1) for bank in self.banks_)
            out[i : i + 1024] = fake - real
        return out

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Class of the nearer bank."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]


def logistic() -> Any:
    """Standardised logistic regression with balanced classes."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))


# ---------------------------------------------------------------------------------- other texts for an image


def shuffle_texts(features: Features, seed: int = 0) -> Features:
    """Give every image the caption of another one, and every region the phrase of another region.

    The swap goes across the classes and has no fixed points, so whatever a detector still finds cannot come
    from the fit between an image and *its own* caption. An image's score then depends on the company it is
    given in.
    """
    rng = np.random.default_rng(seed)

    def swap(n: int, what: str) -> np.ndarray:
        if n == 1:
            raise InputError(f"one {what} alone cannot be shuffled; score at least two images together")
        ring = rng.permutation(n)  # one ring through all rows: nobody keeps the own text
        source = np.empty(n, np.int64)
        source[ring] = np.roll(ring, 1)
        return source

    caption = swap(len(features), "caption")
    phrase = swap(len(features.owner), "phrase") if len(features.owner) else features.owner
    return replace(
        features,
        caption_emb=features.caption_emb[caption],
        phrase_emb=features.phrase_emb[phrase],
        caption_norm=None if features.caption_norm is None else features.caption_norm[caption],
        phrase_norm=None if features.phrase_norm is None else features.phrase_norm[phrase],
    )


def generic_texts(features: Features, generic_emb: np.ndarray) -> Features:
    """Give every image and every region one and the same text, e.g. the embedding of "a photo".

    Where lengths are known, it gets the mean length of the captions and of the phrases it stands for.
    """
    emb = np.asarray(generic_emb, np.float32).reshape(-1)
    if emb.shape != (features.dim,):
        raise InputError(
            f"generic_emb has shape {np.shape(generic_emb)}; expected one embedding of width {features.dim}"
        )
    emb = emb / np.linalg.norm(emb)
    return replace(
        features,
        caption_emb=np.tile(emb, (len(features), 1)),
        phrase_emb=np.tile(emb, (len(features.owner), 1)),
        caption_norm=_flat(features.caption_norm),
        phrase_norm=_flat(features.phrase_norm),
    )


def _flat(norm: np.ndarray | None) -> np.ndarray | None:
    return norm if norm is None or not len(norm) else np.full_like(norm, norm.mean())


def caption_likelihood(features: Features) -> np.ndarray:
    """Mean log-probability per token of each caption under its captioner, shape (n, 1)."""
    value = features.table[schema.CAPTION_LOGPROB].to_numpy(dtype=np.float64, na_value=np.nan)
    if (missing := np.isnan(value)).any():
        raise InputError(
            f"{int(missing.sum())} of {len(value)} captions have no likelihood: they were given by the "
            f"user, or the captioner reports none. Extract with a captioner to use this control"
        )
    return value[:, None].astype(np.float32)


def likelihood_and_confidence(features: Features, fill: float = float("nan")) -> np.ndarray:
    """Caption likelihood, mean and lowest localiser score, number of objects; shape (n, 4).

    No CLIP and no text embedding in it if the localiser uses none.

    Parameters
    ----------
    features : Features
    fill : float
        Both scores of an image without objects. `ConfidenceScorer` gives the mean of its training images', so
        that the number of objects alone tells such an image apart.
    """
    score = features.objects["score"].to_numpy(np.float64)
    count = np.bincount(features.owner, minlength=len(features))
    mean = np.bincount(features.owner, score, minlength=len(features)) / np.maximum(count, 1)
    lowest = np.full(len(features), np.inf)
    np.minimum.at(lowest, features.owner, score)
    mean[count == 0] = lowest[count == 0] = fill
    return np.column_stack([caption_likelihood(features), mean, lowest, count]).astype(np.float32)


class ConfidenceScorer(FeatureScorer):
    """A classifier on `likelihood_and_confidence`.

    Parameters
    ----------
    estimator : scikit-learn classifier
        Untrained.
    """

    def __init__(self, estimator: Any) -> None:
        super().__init__(likelihood_and_confidence, estimator)

    def fit(self, train: Features, val: Features) -> ConfidenceScorer:
        """Train on ``train``, whose mean score stands for missing objects from here on; stop on ``val``."""
        # a mean over the images being scored would let them set each other's features
        score = train.objects["score"].to_numpy(np.float64)
        fill = float(score.mean()) if len(score) else 0.0
        self.vectors = partial(likelihood_and_confidence, fill=fill)
        super().fit(train, val)
        return self
