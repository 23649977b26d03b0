"""Controls and baselines: what the misalignment must beat before a number of it means something.

Each is a scorer, as the detector is: ``fit(train, val)`` on features, where ``val`` is for early stopping
only, then ``decision_function(features)``, one number per image, higher for fake. One table, `CONTROLS`, says
which question each answers.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from itemkit import schema
from itemkit.devices import choose_device
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.images import jpeg_bytes
from itemkit.misalignment import RepresentationConfig, get_representation, represent
from itemkit.text import did_you_mean

CHUNK = 256  # images at a time
RESIDUAL_LIMIT = 3  # residuals are clipped to -3..3
RESIDUAL_STEP = 2  # grey levels per unit of residual
NEEDS = {
    "pixels": "the images themselves: dataclasses.replace(features, pixels=uint8 array (n, h, w, 3))",
    "generic_emb": "the embedding of a generic caption: generic_emb",
    "caption_logprob": "caption likelihoods: captions from a captioner that reports them",
}


class FeatureScorer:
    """A vector of each image, or its pixels, and an untrained scikit-learn classifier on them."""

    def __init__(self, vectors: Callable[[Features], np.ndarray], estimator: Any) -> None:
        self.vectors, self.estimator = vectors, estimator

    def fit(self, train: Features, val: Features) -> FeatureScorer:
        """Train on ``train``, stop on ``val`` where the classifier can."""
        parts = (train, val) if isinstance(self.estimator, MisalignmentMLP | PixelCNN) else (train,)
        arrays = [array for part in parts for array in (self.vectors(part), part.labels)]
        self.estimator_ = clone(self.estimator).fit(*arrays)
        return self

    def decision_function(self, features: Features) -> np.ndarray:
        """Log-odds or margin of fake."""
        return np.asarray(self.estimator_.decision_function(self.vectors(features)), np.float64)


def logistic() -> Any:
    """Standardised logistic regression with balanced classes."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))


def in_chunks(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """What a function gives for rows, a few at a time, to bound memory."""
    return np.concatenate([function(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)])


class NearestNeighbour(BaseEstimator):
    """Cosine to the nearest fake minus that to the nearest real image of the training set; no training."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> NearestNeighbour:
        """Remember the embeddings of both classes (labels 0 and 1)."""
        X = X / np.linalg.norm(X, axis=1, keepdims=True)
        self.banks_ = tuple(X[np.asarray(y) == c] for c in (schema.REAL, schema.FAKE))
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Nearest fake minus nearest real cosine."""
        X = X / np.linalg.norm(X, axis=1, keepdims=True)
        cosines = in_chunks(lambda part: np.stack([(part @ bank.T).max(1) for bank in self.banks_], 1), X)
        return cosines[:, 1] - cosines[:, 0]


def pixels(features: Features) -> np.ndarray:
    """The images of a set of features, checked: uint8 array (n, h, w, 3)."""
    x = features.pixels
    if x is None or x.ndim != 4 or len(x) != len(features) or x.shape[3] != 3 or x.dtype != np.uint8:
        got = "none" if x is None else f"{x.dtype} of shape {x.shape}"
        raise InputError(f"pixels of {len(features)} images: {got}; expected {NEEDS['pixels']}")
    return x


def spectrum(features: Features) -> np.ndarray:
    """Azimuthally averaged log10 power of the grey image (Durall et al. 2020, arXiv 2003.01826).

    One number for each ring of the frequency plane, from the mean to the corner (where the checkerboard of an
    upsampling sits) in steps of one frequency. A Hann window keeps the borders from drawing a cross.
    """
    x = pixels(features)
    h, w = x.shape[1:3]
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    ring = np.rint(frequency * min(h, w)).astype(int).ravel()
    mean_of_ring = np.eye(ring.max() + 1)[ring] / np.maximum(np.bincount(ring), 1)
    window = np.hanning(h)[:, None] * np.hanning(w)[None]

    def powers(part: np.ndarray) -> np.ndarray:
        grey = part @ np.array([0.299, 0.587, 0.114]) / 255
        power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
        return np.log10(power.reshape(len(part), -1) @ mean_of_ring + 1e-8).astype(np.float32)

    return in_chunks(powers, x)


def noise_residual(features: Features) -> np.ndarray:
    """Co-occurrences of neighbouring second differences: what noise, demosaicking and decoders leave behind.

    After SPAM (Pevny et al. 2010) and Cozzolino et al. 2014: the share of each pair of clipped residuals
    along the line (49 numbers) and across it (49), over both directions and all channels.
    """
    levels = 2 * RESIDUAL_LIMIT + 1

    def shares(image: np.ndarray) -> np.ndarray:
        r = np.rint(np.diff(image.astype(np.int16), 2, axis=1) / RESIDUAL_STEP)
        r = np.clip(r, -RESIDUAL_LIMIT, RESIDUAL_LIMIT).astype(int) + RESIDUAL_LIMIT
        pairs = (r[:, :-1] * levels + r[:, 1:], r[:-1] * levels + r[1:])
        return np.concatenate([np.bincount(p.ravel(), minlength=levels**2) / p.size / 2 for p in pairs])

    rows_and_columns = ((image, image.swapaxes(0, 1)) for image in pixels(features))
    return np.array([shares(a).astype(np.float32) + shares(b) for a, b in rows_and_columns], np.float32)


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """CNNDetection's training augmentation of one image: blur, then JPEG, each for every other image.

    Blur sigma is uniform in 0-3 px, JPEG quality uniform in 30-100 (Wang et al. 2020, "Blur+JPEG (0.5)").
    """
    picture = Image.fromarray(image)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
    if rng.random() < 0.5:
        picture = Image.open(io.BytesIO(jpeg_bytes(picture, int(rng.integers(30, 101)))))
    return np.asarray(picture.convert("RGB"))


@dataclass(eq=False, repr=False)
class PixelCNN(BaseEstimator):
    """Small convolutional network from pixels to real or fake, after CNNDetection (arXiv 1912.11035).

    Random crop, flip, blur and JPEG in training, early stopping on validation images; full resolution in the
    first layer, because traces of a generator do not survive downsampling. No pretrained weights.
    """

    width: int = 12  # channels of the first layer; later ones have twice and four times as many
    crop: int = 32  # side in pixels of the random crops in training; in use images are seen whole
    epochs: int = 12
    patience: int = 4
    batch_size: int = 64
    learning_rate: float = 3e-3
    max_images: int = 2000  # training images used, class by class, so that a fit takes seconds on a CPU
    seed: int = 0
    device: str = "auto"

    def _network(self) -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in pairwise([3, self.width, 2 * self.width, 4 * self.width, 4 * self.width]):
            layers += [
                nn.Conv2d(a, b, 3, stride=2 if layers else 1, padding=1, bias=False),
                # quick running statistics: few steps are made, and stale ones would stop the training early
                nn.BatchNorm2d(b, momentum=0.3),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * self.width, 1))

    def _logits(self, images: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(choose_device(self.device))
        # stays in channels-last order, in which the network is quicker
        return self.net_(x.permute(0, 3, 1, 2).float() / 127.5 - 1)[:, 0]

    def _batch(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = self.crop
        top, left = (rng.integers(max(n - side, 0) + 1, size=len(images)) for n in images.shape[1:3])
        step = np.where(rng.random(len(images)) < 0.5, -1, 1)  # to the left: mirrored
        crops = (x[t : t + side, k : k + side] for x, t, k in zip(images, top, left, strict=True))
        return np.stack([augment(x[:, ::s], rng) for x, s in zip(crops, step, strict=True)])

    def fit(self, X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray) -> PixelCNN:
        """Train on uint8 images (n, h, w, 3) and labels (1 fake), stop on others."""
        y, y_val = np.asarray(y, np.float32), np.asarray(y_val, np.float32)
        if len(y) > self.max_images:
            X, _, y, _ = train_test_split(
                X, y, train_size=self.max_images, stratify=y, random_state=self.seed
            )
        rng = np.random.default_rng(self.seed)
        # torch's initialisers draw from the global state: leave it as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net_ = self._network().to(choose_device(self.device), memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(self.net_.parameters(), lr=self.learning_rate, weight_decay=1e-3)
        weight, least, best, best_epoch = _even(y), float("inf"), self.net_, 0
        for epoch in range(1, self.epochs + 1):
            self.net_.train()
            for rows in np.array_split(rng.permutation(len(X)), max(1, round(len(X) / self.batch_size))):
                logits = self._logits(self._batch(X[rows], rng))
                target, scale = (torch.from_numpy(v[rows]).to(logits.device) for v in (y, weight))
                loss = F.binary_cross_entropy_with_logits(logits, target, weight=scale)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            score = self.decision_function(X_val)
            loss_val = float(np.mean(_even(y_val) * (np.logaddexp(0, score) - y_val * score)))
            if loss_val < least:
                least, best, best_epoch = loss_val, copy.deepcopy(self.net_), epoch
            if epoch - best_epoch >= self.patience:
                break
        self.net_ = best
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of fake of each image."""
        self.net_.eval()
        with torch.no_grad():
            return in_chunks(lambda part: self._logits(part).cpu().double().numpy(), X)


def _even(y: np.ndarray) -> np.ndarray:
    """Weights that give both classes one half."""
    return (0.5 / np.where(y == 1, y.mean(), 1 - y.mean())).astype(np.float32)


def shuffle_texts(features: Features, seed: int = 0) -> Features:
    """Give every image the caption of another one, and every region the phrase of another region.

    The swap goes across the classes, and an image's score depends on the company it is given in. It is not
    free of its own caption, though: the regions stay those that its own phrases chose.
    """
    rng = np.random.default_rng(seed)

    def swap(texts: np.ndarray) -> np.ndarray:
        if len(texts) == 1:
            raise InputError("one text alone cannot be shuffled; score at least two images together")
        ring, swapped = rng.permutation(len(texts)), np.empty_like(texts)
        swapped[ring] = texts[np.roll(ring, 1)]  # one ring through all rows: nobody keeps the own text
        return swapped

    return replace(features, caption_emb=swap(features.caption_emb), phrase_emb=swap(features.phrase_emb))


def generic_texts(features: Features, generic_emb: np.ndarray) -> Features:
    """Give every image and every region one and the same text; the regions stay those of its own phrases."""
    emb = np.asarray(generic_emb, np.float32).reshape(-1)
    if emb.shape != (features.dim,):
        raise InputError(f"generic_emb has shape {emb.shape}; expected one embedding of width {features.dim}")
    one = (emb / np.linalg.norm(emb))[None]
    captions, phrases = one.repeat(len(features), axis=0), one.repeat(len(features.owner), axis=0)
    return replace(features, caption_emb=captions, phrase_emb=phrases)


def caption_likelihood(features: Features) -> np.ndarray:
    """Mean log-probability per token of each caption under its captioner, shape (n, 1)."""
    value = features.table[schema.CAPTION_LOGPROB]
    if missing := value.isna().sum():
        raise InputError(f"{missing} of {len(value)} images lack {NEEDS[schema.CAPTION_LOGPROB]}")
    return value.to_numpy(np.float32)[:, None]


def likelihood_and_confidence(features: Features, fill: float = float("nan")) -> np.ndarray:
    """Caption likelihood, mean and lowest localiser score, number of objects; shape (n, 4).

    With the localisers "grid" and "dense" the score *is* the cosine of region and phrase, so this control
    then contains the local misalignment. ``fill`` stands for both scores of an image without objects.
    """
    score = features.objects["score"].astype(float).groupby(features.owner).agg(["mean", "min"])
    score = score.reindex(range(len(features))).fillna(fill)
    count = np.bincount(features.owner, minlength=len(features))
    return np.column_stack([caption_likelihood(features), score, count]).astype(np.float32)


class ConfidenceScorer(FeatureScorer):
    """A classifier on `likelihood_and_confidence`."""

    def fit(self, train: Features, val: Features) -> FeatureScorer:
        """Train on ``train``, whose mean score stands for missing objects from here on; stop on ``val``."""
        # a mean over the images being scored would let them set each other's features
        score = train.objects["score"].to_numpy(float)
        self.vectors = partial(likelihood_and_confidence, fill=score.mean() if len(score) else 0.0)
        return super().fit(train, val)


@dataclass(frozen=True)
class Control:
    """One control or baseline: how to make it, and what it needs beside embeddings."""

    title: str
    question: str
    # representation, untrained head, embedding of a generic caption or None
    make: Callable[[RepresentationConfig, MisalignmentMLP, Any], FeatureScorer]
    needs: str = ""  # one of `NEEDS`

    def build(
        self,
        seed: int = 0,
        representation: RepresentationConfig | str = "absolute",
        head: MisalignmentMLP | None = None,
        generic_emb: np.ndarray | None = None,
    ) -> FeatureScorer:
        """Untrained scorer; ``generic_emb`` embeds one caption: ``encoder.encode_texts(["a photo"])[0]``."""
        if self.needs == "generic_emb" and generic_emb is None:
            raise InputError(f"the control {self.title!r} needs {NEEDS[self.needs]}")
        head = clone(head or MisalignmentMLP()).set_params(seed=seed)
        return self.make(get_representation(representation), head, generic_emb)


CONTROLS: dict[str, Control] = {
    "image_mlp": Control(
        "image only, MLP", "Is the caption needed at all, with the same head?",
        lambda item, head, emb: FeatureScorer(lambda f: f.image_emb, head),
    ),
    "image_linear": Control(  # UnivFD, Ojha et al. 2023, arXiv 2302.10174
        "image only, linear", "Does a linear probe on the image embedding do as well?",
        lambda item, head, emb: FeatureScorer(lambda f: f.image_emb, logistic()),
    ),
    "image_nearest": Control(
        "image only, nearest neighbour", "Does no training at all do as well?",
        lambda item, head, emb: FeatureScorer(lambda f: f.image_emb, NearestNeighbour()),
    ),
    "text_only": Control(
        "caption only", "Does the caption's style or content give the class away?",
        lambda item, head, emb: FeatureScorer(lambda f: f.caption_emb, head),
    ),
    "shuffled_captions": Control(
        "another image's caption", "Must it be the image's own caption?",
        lambda item, head, emb: FeatureScorer(lambda f: represent(shuffle_texts(f, head.seed), item), head),
    ),
    "generic_caption": Control(
        "one caption for all", "Is the text more than a fixed point to measure from?",
        lambda item, head, emb: FeatureScorer(lambda f: represent(generic_texts(f, emb), item), head),
        "generic_emb",
    ),
    "caption_likelihood": Control(
        "caption likelihood", "Does the captioner's own doubt suffice?",
        lambda item, head, emb: FeatureScorer(caption_likelihood, logistic()), "caption_logprob",
    ),
    "likelihood_confidence": Control(
        "caption likelihood and localiser score (grid, dense: the local cosine)",
        "What do the captioner's doubt and the localiser's score say together?",
        lambda item, head, emb: ConfidenceScorer(likelihood_and_confidence, head), "caption_logprob",
    ),
    "spectrum": Control(
        "power spectrum", "Do the frequencies give the generator away?",
        lambda item, head, emb: FeatureScorer(spectrum, logistic()), "pixels",
    ),
    "noise_residual": Control(
        "noise residual", "Does the noise differ from a camera's?",
        lambda item, head, emb: FeatureScorer(noise_residual, logistic()), "pixels",
    ),
    "cnn": Control(
        "CNN on pixels", "What does a network find that sees every pixel?",
        lambda item, head, emb: FeatureScorer(pixels, PixelCNN(seed=head.seed, device=head.device)), "pixels",
    ),
}  # fmt: skip


def get_control(name: str) -> Control:
    """Look a control up; an unknown name lists those there are."""
    if name not in CONTROLS:
        known = ", ".join(CONTROLS)
        raise InputError(f"unknown control {name!r}; expected one of {known}.{did_you_mean(name, CONTROLS)}")
    return CONTROLS[name]
