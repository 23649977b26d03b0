"""Controls and baselines: what the misalignment must beat before a number of it means something.

Each is a `Scorer`, the interface that the detector has too: ``fit(train, val)`` on features, then
``decision_function(features)``, higher for fake. One registry, `CONTROLS`, says which question each answers.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from itemkit import schema
from itemkit.devices import choose_device
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import RepresentationConfig, get_representation, represent
from itemkit.text import did_you_mean

CHUNK = 256  # images at a time
RESIDUAL_LIMIT = 3  # residuals are clipped to -3..3
RESIDUAL_STEP = 2  # grey levels per unit of residual


def pixels(features: Features) -> np.ndarray:
    """The images of a set of features, checked: uint8 array (n, h, w, 3)."""
    x = features.pixels
    if x is None:
        raise InputError(
            "these features carry no images; attach them with dataclasses.replace(features, pixels=array), "
            "a uint8 array of shape (n, h, w, 3)"
        )
    if x.ndim != 4 or x.shape[0] != len(features) or x.shape[3] != 3 or x.dtype != np.uint8:
        raise InputError(
            f"pixels are {x.dtype} of shape {x.shape}; expected uint8 of shape ({len(features)}, h, w, 3)"
        )
    return x


def spectrum(features: Features) -> np.ndarray:
    """Azimuthally averaged log power spectrum of the grey image.

    Returns
    -------
    float32 array, shape (n, r)
        log10 of the mean power in rings one frequency step wide, from the mean to the corner of the frequency
        plane (where the checkerboard of an upsampling sits, so rings do not end at the Nyquist frequency of
        the sides). A Hann window keeps the picture's borders from drawing a cross into it.
    """
    x = pixels(features)
    h, w = x.shape[1:3]
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    ring = np.rint(frequency * min(h, w)).astype(int).ravel()
    mean_of_ring = np.eye(ring.max() + 1)[ring] / np.maximum(np.bincount(ring), 1)
    window = np.hanning(h)[:, None] * np.hanning(w)[None]
    out = np.empty((len(x), ring.max() + 1), np.float32)
    for i in range(0, len(x), CHUNK):
        grey = x[i : i + CHUNK] @ np.array([0.299, 0.587, 0.114]) / 255
        power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
        out[i : i + CHUNK] = np.log10(power.reshape(len(power), -1) @ mean_of_ring + 1e-8)
    return out


def noise_residual(features: Features) -> np.ndarray:
    """Co-occurrences of neighbouring second differences: what noise, demosaicking and decoders leave behind.

    Returns
    -------
    float32 array, shape (n, 98)
        Share of each pair of clipped residuals along the line (49) and across it (49), over both directions
        and all channels.
    """
    x = pixels(features)
    levels = 2 * RESIDUAL_LIMIT + 1
    out = np.zeros((len(x), 2 * levels**2), np.float32)
    for i in range(0, len(x), CHUNK):
        part = x[i : i + CHUNK].astype(np.int16)
        for image in (part, part.swapaxes(1, 2)):  # differences along rows, then along columns
            r = np.rint((image[:, :, 2:] - 2 * image[:, :, 1:-1] + image[:, :, :-2]) / RESIDUAL_STEP)
            r = np.clip(r, -RESIDUAL_LIMIT, RESIDUAL_LIMIT).astype(np.int64) + RESIDUAL_LIMIT
            pairs = (r[:, :, :-1] * levels + r[:, :, 1:], r[:, :-1] * levels + r[:, 1:])
            for k, pair in enumerate(pairs):
                flat = pair.reshape(len(part), -1) + np.arange(len(part))[:, None] * levels**2
                count = np.bincount(flat.ravel(), minlength=len(part) * levels**2).reshape(len(part), -1)
                out[i : i + CHUNK, k * levels**2 : (k + 1) * levels**2] += count / pair[0].size / 2
    return out


def augment(image: np.ndarray, rng: np.random.Generator, probability: float = 0.5) -> np.ndarray:
    """CNNDetection's training augmentation of one image: blur, then JPEG, each with the given probability.

    Blur sigma is uniform in 0-3 px, JPEG quality uniform in 30-100 (Wang et al. 2020, "Blur+JPEG (0.5)").
    """
    picture = Image.fromarray(image)
    if rng.random() < probability:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
    if rng.random() < probability:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(30, 101)))
        picture = Image.open(buffer)
    return np.asarray(picture.convert("RGB"))


@dataclass(eq=False, repr=False)
class PixelCNN(BaseEstimator):
    """Small convolutional network from pixels to real or fake, after CNNDetection's recipe.

    Random crop, flip, blur and JPEG in training, early stopping on validation images; full resolution in the
    first layer, because traces of a generator do not survive downsampling. No pretrained weights.

    Parameters
    ----------
    width : int
        Channels of the first layer; later ones have twice and four times as many.
    crop : int
        Side in pixels of the random crops in training; smaller images are used whole. In use the network,
        being fully convolutional, sees the whole image, or its centre where a side is longer than 8 crops.
    max_images : int
        Training images used at most, class by class in proportion, so that a fit takes seconds on a CPU.
    """

    width: int = 12
    crop: int = 32
    epochs: int = 12
    patience: int = 4
    batch_size: int = 64
    learning_rate: float = 3e-3
    max_images: int = 2000
    seed: int = 0
    device: str = "auto"

    def _network(self) -> nn.Module:
        widths = [3, self.width, 2 * self.width, 4 * self.width, 4 * self.width]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1, bias=False)]
            # quick running statistics: few steps are made, and stale ones would stop the training early
            layers += [nn.BatchNorm2d(b, momentum=0.3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))

    def _logits(self, images: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).to(next(self.net_.parameters()).device)
        # stays in channels-last order, in which the network is quicker
        return self.net_(x.permute(0, 3, 1, 2).float() / 127.5 - 1)[:, 0]

    def _batch(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = self.crop
        top, left = (rng.integers(max(n - side, 0) + 1, size=len(images)) for n in images.shape[1:3])
        flip = rng.random(len(images)) < 0.5
        out = [
            augment(image[t : t + side, k : k + side][:, :: -1 if f else 1], rng)
            for image, t, k, f in zip(images, top, left, flip, strict=True)
        ]
        return np.stack(out)

    def fit(self, X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray) -> PixelCNN:
        """Train on uint8 images (n, h, w, 3) and labels (1 fake), stop on others."""
        codes, truth = np.asarray(y, np.float32), np.asarray(y_val, np.float32)
        rng = np.random.default_rng(self.seed)
        if len(codes) > self.max_images:
            share = self.max_images / len(codes)
            by_class = [rng.permutation(np.flatnonzero(codes == c)) for c in (0, 1)]
            rows = np.concatenate([part[: max(1, round(share * len(part)))] for part in by_class])
            X, codes = X[rows], codes[rows]
        # torch's initialisers draw from the global state: leave it as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net_ = self._network().to(choose_device(self.device), memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(self.net_.parameters(), lr=self.learning_rate, weight_decay=1e-3)
        weight, best, best_epoch = _even(codes), float("inf"), 0
        for epoch in range(1, self.epochs + 1):
            self.net_.train()
            for rows in np.array_split(rng.permutation(len(X)), max(1, round(len(X) / self.batch_size))):
                logits = self._logits(self._batch(X[rows], rng))
                target, scale = (torch.from_numpy(v[rows]).to(logits.device) for v in (codes, weight))
                loss = F.binary_cross_entropy_with_logits(logits, target, weight=scale)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            score = self.decision_function(np.asarray(X_val))
            loss_val = float(np.mean(_even(truth) * (np.logaddexp(0, score) - truth * score)))
            if loss_val < best:
                best, best_epoch = loss_val, epoch
                weights = {k: v.clone() for k, v in self.net_.state_dict().items()}
            if epoch - best_epoch >= self.patience:
                break
        if best_epoch:
            self.net_.load_state_dict(weights)
        self.net_.eval()
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of fake of each image."""
        self.net_.eval()
        side = 8 * self.crop
        top, left = (max(n - side, 0) // 2 for n in X.shape[1:3])
        X = X[:, top : top + side, left : left + side]
        with torch.no_grad():
            parts = [self._logits(X[i : i + CHUNK]).cpu() for i in range(0, len(X), CHUNK)]
        return torch.cat(parts).numpy().astype(np.float64)


def _even(codes: np.ndarray) -> np.ndarray:
    """Weights that give both classes one half; one class alone has all."""
    share = np.where(codes == 1, codes.mean(), 1 - codes.mean())
    return (0.5 / share).astype(np.float32)


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
    estimator : scikit-learn classifier with a ``decision_function``
        Untrained; one whose ``fit`` takes ``X_val, y_val`` is stopped on the validation images.
    """

    def __init__(self, vectors: Callable[[Features], np.ndarray], estimator: Any) -> None:
        self.vectors, self.estimator = vectors, estimator

    def fit(self, train: Features, val: Features) -> FeatureScorer:
        """Train on ``train``, stop on ``val`` where the classifier can."""
        self.estimator_ = clone(self.estimator)
        x, y = self.vectors(train), train.labels
        if len(np.unique(y)) < 2:
            raise InputError(f"{len(y)} training images of one class; expected real and fake ones")
        if isinstance(self.estimator, MisalignmentMLP | PixelCNN):
            self.estimator_.fit(x, y, self.vectors(val), val.labels)
        else:
            self.estimator_.fit(x, y)
        return self

    def decision_function(self, features: Features) -> np.ndarray:
        """Log-odds or margin of fake."""
        return np.asarray(self.estimator_.decision_function(self.vectors(features)), np.float64)


class NearestNeighbour(BaseEstimator):
    """UnivFD's nearest neighbour (Ojha et al. 2023, arXiv 2302.10174): no training, two banks of embeddings.

    The score is the cosine to the nearest fake minus the cosine to the nearest real image.
    """

    def fit(self, X: np.ndarray, y: np.ndarray) -> NearestNeighbour:
        """Remember the embeddings of both classes (labels 0 and 1)."""
        X = X / np.linalg.norm(X, axis=1, keepdims=True)
        self.banks_ = tuple(X[np.asarray(y) == c] for c in (schema.REAL, schema.FAKE))
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Nearest fake minus nearest real cosine."""
        X = X / np.linalg.norm(X, axis=1, keepdims=True)
        out = np.empty(len(X), np.float32)
        for i in range(0, len(X), 1024):
            real, fake = ((X[i : i + 1024] @ bank.T).max(1) for bank in self.banks_)
            out[i : i + 1024] = fake - real
        return out


def logistic() -> Any:
    """Standardised logistic regression with balanced classes."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))


# ---------------------------------------------------------------------------------- other texts for an image


def shuffle_texts(features: Features, seed: int = 0) -> Features:
    """Give every image the caption of another one, and every region the phrase of another region.

    The swap goes across the classes and has no fixed points, so what a detector still finds does not come
    from the fit between an image and *its own* caption. It is not free of that caption, though: the regions
    stay those that its own phrases chose. An image's score depends on the company it is given in.
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
        features, caption_emb=features.caption_emb[caption], phrase_emb=features.phrase_emb[phrase]
    )


def generic_texts(features: Features, generic_emb: np.ndarray | None) -> Features:
    """Give every image and every region one and the same text, e.g. the embedding of "a photo".

    The regions stay those that the image's own phrases chose, so this is not free of the own caption either.
    """
    emb = np.asarray(generic_emb, np.float32).reshape(-1)
    if emb.shape != (features.dim,):
        raise InputError(f"generic_emb has shape {emb.shape}; expected one embedding of width {features.dim}")
    emb = emb / np.linalg.norm(emb)
    return replace(
        features,
        caption_emb=np.tile(emb, (len(features), 1)),
        phrase_emb=np.tile(emb, (len(features.owner), 1)),
    )


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

    With the localisers "grid" and "dense" the score *is* the cosine of region and phrase, so this control
    then contains the local misalignment, mean and worst, and is no control without text. Only with an object
    detector as localiser is the score something else: its own confidence.

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
    """A classifier on `likelihood_and_confidence`."""

    def __init__(self, estimator: Any) -> None:
        super().__init__(likelihood_and_confidence, estimator)

    def fit(self, train: Features, val: Features) -> ConfidenceScorer:
        """Train on ``train``, whose mean score stands for missing objects from here on; stop on ``val``."""
        # a mean over the images being scored would let them set each other's features
        score = train.objects["score"].to_numpy(np.float64)
        self.vectors = partial(likelihood_and_confidence, fill=float(score.mean()) if len(score) else 0.0)
        super().fit(train, val)
        return self


@dataclass(frozen=True)
class Control:
    """One control or baseline.

    Attributes
    ----------
    name : key in `CONTROLS` and in every table
    title : for figures
    question : what it answers
    source : where it comes from
    make : (representation, untrained head, embedding of a generic caption or None) -> untrained Scorer
    needs : "pixels", "generic_emb", "caption_logprob" or nothing
    """

    name: str
    title: str
    question: str
    source: str
    make: Callable[[RepresentationConfig, MisalignmentMLP, np.ndarray | None], Scorer]
    needs: str = ""

    def build(
        self,
        seed: int = 0,
        representation: RepresentationConfig | str = "absolute",
        head: MisalignmentMLP | None = None,
        generic_emb: np.ndarray | None = None,
    ) -> Scorer:
        """Untrained scorer of this control.

        Parameters
        ----------
        seed : int
            Of head, shuffling and network.
        representation : RepresentationConfig or name
            The misalignment that the caption controls repeat with other texts.
        head : MisalignmentMLP, optional
            Untrained: the detector's.
        generic_emb : vector, optional
            Embedding of one caption for all.
        """
        if self.needs == "generic_emb" and generic_emb is None:
            raise InputError(
                f"{self.name} needs the embedding of one caption: "
                "generic_emb=encoder.encode_texts(['a photo'])[0]"
            )
        head = clone(head if head is not None else MisalignmentMLP()).set_params(seed=seed)
        return self.make(get_representation(representation), head, generic_emb)

    def missing(self, features: Features, generic_emb: np.ndarray | None = None) -> str | None:
        """What this control lacks on these features; None if it can be run."""
        if self.needs == "pixels" and features.pixels is None:
            return "the images themselves: dataclasses.replace(features, pixels=array of shape (n, h, w, 3))"
        if self.needs == "generic_emb" and generic_emb is None:
            return "the embedding of a generic caption: generic_emb"
        if self.needs == "caption_logprob" and features.table[schema.CAPTION_LOGPROB].isna().any():
            return "caption likelihoods: captions from a captioner that reports them"
        return None


_UNIVFD = "UnivFD (Ojha et al. 2023, arXiv 2302.10174)"
_OURS = "our control"
_ALL = (
    Control(
        "image_mlp", "image only, MLP", "Is the caption needed at all, with the same head?", _OURS,
        lambda item, head, generic: FeatureScorer(lambda f: f.image_emb, head),
    ),
    Control(
        "image_linear", "image only, linear", "Does a linear probe on the image embedding do as well?",
        _UNIVFD, lambda item, head, generic: FeatureScorer(lambda f: f.image_emb, logistic()),
    ),
    Control(
        "image_nearest", "image only, nearest neighbour", "Does no training at all do as well?", _UNIVFD,
        lambda item, head, generic: FeatureScorer(lambda f: f.image_emb, NearestNeighbour()),
    ),
    Control(
        "text_only", "caption only", "Does the caption's style or content give the class away?", _OURS,
        lambda item, head, generic: FeatureScorer(lambda f: f.caption_emb, head),
    ),
    Control(
        "shuffled_captions", "another image's caption", "Must it be the image's own caption?", _OURS,
        lambda item, head, generic: FeatureScorer(
            lambda f: represent(shuffle_texts(f, head.seed), item), head
        ),
    ),
    Control(
        "generic_caption", "one caption for all", "Is the text more than a fixed point to measure from?",
        _OURS,
        lambda item, head, emb: FeatureScorer(lambda f: represent(generic_texts(f, emb), item), head),
        "generic_emb",
    ),
    Control(
        "caption_likelihood", "caption likelihood", "Does the captioner's own doubt suffice?", _OURS,
        lambda item, head, generic: FeatureScorer(caption_likelihood, logistic()), "caption_logprob",
    ),
    Control(
        "likelihood_confidence", "caption likelihood and localiser score (grid, dense: the local cosine)",
        "What do the captioner's doubt and the localiser's score say together?", _OURS,
        lambda item, head, generic: ConfidenceScorer(head), "caption_logprob",
    ),
    Control(
        "spectrum", "power spectrum", "Do the frequencies give the generator away?",
        "azimuthal power spectrum, Durall et al. 2020 (arXiv 2003.01826)",
        lambda item, head, generic: FeatureScorer(spectrum, logistic()), "pixels",
    ),
    Control(
        "noise_residual", "noise residual", "Does the noise differ from a camera's?",
        "co-occurrences of residuals, after SPAM (Pevny et al. 2010) and Cozzolino et al. 2014",
        lambda item, head, generic: FeatureScorer(noise_residual, logistic()), "pixels",
    ),
    Control(
        "cnn", "CNN on pixels", "What does a network find that sees every pixel?",
        "recipe of CNNDetection (Wang et al. 2020, arXiv 1912.11035) in a small network",
        lambda item, head, generic: FeatureScorer(pixels, PixelCNN(seed=head.seed, device=head.device)),
        "pixels",
    ),
)  # fmt: skip

CONTROLS: dict[str, Control] = {control.name: control for control in _ALL}


def get_control(name: str) -> Control:
    """Look a control up; an unknown name lists those there are."""
    if name not in CONTROLS:
        known = ", ".join(CONTROLS)
        raise InputError(f"unknown control {name!r}; expected one of {known}.{did_you_mean(name, CONTROLS)}")
    return CONTROLS[name]
