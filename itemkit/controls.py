"""Controls and baselines: what the misalignment must beat before a number of it means something.

Each is a `Scorer`, the interface that the detector has too: ``fit(train, val)`` on features, then
``decision_function(features)``, higher for fake. One registry, `CONTROLS`, says which question each answers.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy.special import logit
from sklearn.base import BaseEstimator, ClassifierMixin, clone
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
    size = min(h, w)
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    ring = np.rint(np.hypot(fy, fx) * size).astype(int)
    n_rings = int(ring.max()) + 1
    # the half plane of a real image: every column but the first (and the last of an even width) stands for
    # two
    double = np.full(ring.shape, 2.0)
    double[:, 0] = 1
    if w % 2 == 0:
        double[:, -1] = 1
    weight = np.zeros((ring.size, n_rings))
    weight[np.arange(ring.size), ring.ravel()] = double.ravel()
    weight /= np.maximum(weight.sum(0), 1e-12)
    window = np.hanning(h)[:, None] * np.hanning(w)[None]
    grey = np.array([0.299, 0.587, 0.114])
    out = np.empty((len(x), n_rings), np.float32)
    for i in range(0, len(x), CHUNK):
        image = x[i : i + CHUNK] @ grey / 255
        power = np.abs(np.fft.rfft2((image - image.mean((1, 2), keepdims=True)) * window)) ** 2
        out[i : i + CHUNK] = np.log10(power.reshape(len(power), -1) @ weight + 1e-8)
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
            r = image[:, :, 2:] - 2 * image[:, :, 1:-1] + image[:, :, :-2]
            r = (
                np.clip(np.rint(r / RESIDUAL_STEP), -RESIDUAL_LIMIT, RESIDUAL_LIMIT).astype(np.int64)
                + RESIDUAL_LIMIT
            )
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


class PixelCNN(ClassifierMixin, BaseEstimator):
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
    epochs, patience, batch_size, learning_rate : training
    max_images : int
        Training images used at most, class by class in proportion, so that a fit takes seconds on a CPU.
    seed, device : as in `MisalignmentMLP`
    """

    def __init__(
        self,
        width: int = 12,
        crop: int = 32,
        epochs: int = 12,
        patience: int = 4,
        batch_size: int = 64,
        learning_rate: float = 3e-3,
        max_images: int = 2000,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.width = width
        self.crop = crop
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.max_images = max_images
        self.seed = seed
        self.device = device

    def _network(self) -> nn.Module:
        widths = [3, self.width, 2 * self.width, 4 * self.width, 4 * self.width]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1, bias=False)]
            # quick running statistics: small sets have few steps, and stale ones would stop the training
            # early
            layers += [nn.BatchNorm2d(b, momentum=0.3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))

    def _tensor(self, images: np.ndarray) -> Tensor:
        device = next(self.net_.parameters()).device
        # stays in channels-last order, in which the network is quicker
        return (
            torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        )

    def _batch(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = self.crop
        top, left = (rng.integers(max(n - side, 0) + 1, size=len(images)) for n in images.shape[1:3])
        flip = rng.random(len(images)) < 0.5
        out = [
            augment(image[t : t + side, k : k + side][:, :: -1 if f else 1], rng)
            for image, t, k, f in zip(images, top, left, flip, strict=True)
        ]
        return np.stack(out)

    def fit(
        self, X: np.ndarray, y: np.ndarray, X_val: np.ndarray | None = None, y_val: np.ndarray | None = None
    ) -> PixelCNN:
        """Train on uint8 images (n, h, w, 3); without validation images the last weights are kept."""
        y = np.asarray(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) != 2:
            raise InputError(f"{len(self.classes_)} classes among {len(y)} images; expected real and fake")
        rng = np.random.default_rng(self.seed)
        codes = (y == self.classes_[1]).astype(np.float32)
        if len(y) > self.max_images:
            share = self.max_images / len(y)
            keep = [rng.permutation(np.flatnonzero(codes == c)) for c in (0, 1)]
            rows = np.concatenate([part[: max(1, round(share * len(part)))] for part in keep])
            X, codes = X[rows], codes[rows]
        # torch's initialisers draw from the global state: keep it as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net_ = self._network().to(choose_device(self.device), memory_format=torch.channels_last)
        weight = 0.5 / np.where(codes == 1, codes.mean(), 1 - codes.mean()).astype(np.float32)
        optimiser = torch.optim.AdamW(self.net_.parameters(), lr=self.learning_rate, weight_decay=1e-3)
        best, best_epoch, kept = float("inf"), 0, None
        self.history_: dict[str, list[float]] = {"epoch": [], "train_loss": [], "val_loss": []}
        for epoch in range(1, self.epochs + 1):
            self.net_.train()
            total = 0.0
            for rows in np.array_split(rng.permutation(len(X)), max(1, round(len(X) / self.batch_size))):
                loss = self._loss(
                    self.net_(self._tensor(self._batch(X[rows], rng))), codes[rows], weight[rows]
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(rows)
            record = {"epoch": epoch, "train_loss": total / len(X), "val_loss": float("nan")}
            if X_val is not None and y_val is not None:
                truth = (np.asarray(y_val) == self.classes_[1]).astype(np.float32)
                even = 0.5 / np.where(truth == 1, truth.mean(), 1 - truth.mean())
                score = self.decision_function(np.asarray(X_val))
                record["val_loss"] = float(np.mean(even * (np.logaddexp(0, score) - truth * score)))
                if record["val_loss"] < best:
                    best, best_epoch = record["val_loss"], epoch
                    kept = {k: v.clone() for k, v in self.net_.state_dict().items()}
            for name, values in self.history_.items():
                values.append(record[name])
            if X_val is not None and epoch - best_epoch >= self.patience:
                break
        if kept is not None:
            self.net_.load_state_dict(kept)
        self.net_.eval()
        return self

    @staticmethod
    def _loss(logits: Tensor, codes: np.ndarray, weight: np.ndarray) -> Tensor:
        target, scale = (torch.from_numpy(a).to(logits.device) for a in (codes, weight))
        return F.binary_cross_entropy_with_logits(logits[:, 0], target, weight=scale)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of fake of each image."""
        self.net_.eval()
        side = 8 * self.crop
        top, left = (max(n - side, 0) // 2 for n in X.shape[1:3])
        X = X[:, top : top + side, left : left + side]
        with torch.no_grad():
            parts = [self.net_(self._tensor(X[i : i + CHUNK]))[:, 0].cpu() for i in range(0, len(X), CHUNK)]
        return torch.cat(parts).numpy().astype(np.float64)

    def predict(self, X: np.ndarray) -> Any:
        """More probable class of each image."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]


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
        if isinstance(self.estimator, MisalignmentMLP | PixelCNN):
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
    """The method itself: a representation and a head.

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


def generic_texts(features: Features, generic_emb: np.ndarray) -> Features:
    """Give every image and every region one and the same text, e.g. the embedding of "a photo".

    The regions stay those that the image's own phrases chose, so this is not free of the own caption either.
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


@dataclass(frozen=True)
class Inputs:
    """What the controls may be given besides features.

    Attributes
    ----------
    representation : the misalignment that the caption controls repeat with other texts
    head : untrained MLP for all controls that use one, the same as the detector's
    generic_emb : embedding of one generic caption
    seed : of head, shuffling and network
    """

    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    head: MisalignmentMLP = field(default_factory=MisalignmentMLP)
    generic_emb: np.ndarray | None = None
    seed: int = 0

    def seeded_head(self) -> MisalignmentMLP:
        """The head with the seed of this run."""
        return clone(self.head).set_params(seed=self.seed)


@dataclass(frozen=True)
class Control:
    """One control or baseline.

    Attributes
    ----------
    name : key in `CONTROLS` and in every table
    title : for figures
    question : what it answers
    source : where it comes from
    make : Inputs -> untrained Scorer
    needs : "pixels", "generic_emb" or "caption_logprob"
    """

    name: str
    title: str
    question: str
    source: str
    make: Callable[[Inputs], Scorer]
    needs: tuple[str, ...] = ()

    def build(
        self,
        seed: int = 0,
        representation: RepresentationConfig | str = "absolute",
        head: MisalignmentMLP | None = None,
        generic_emb: np.ndarray | None = None,
    ) -> Scorer:
        """Untrained scorer of this control."""
        if "generic_emb" in self.needs and generic_emb is None:
            raise InputError(
                f"{self.name} needs the embedding of one caption: generic_emb=encoder.encode_texts(['a "
                f"photo'])[0]"
            )
        head = head if head is not None else MisalignmentMLP()
        return self.make(Inputs(get_representation(representation), head, generic_emb, seed))

    def missing(self, features: Features, generic_emb: np.ndarray | None = None) -> str | None:
        """What this control lacks on these features; None if it can be run."""
        if "pixels" in self.needs and features.pixels is None:
            return "the images themselves: dataclasses.replace(features, pixels=array of shape (n, h, w, 3))"
        if "generic_emb" in self.needs and generic_emb is None:
            return "the embedding of a generic caption: generic_emb"
        if "caption_logprob" in self.needs and features.table[schema.CAPTION_LOGPROB].isna().any():
            return "caption likelihoods: captions from a captioner that reports them"
        return None


def _image(features: Features) -> np.ndarray:
    return features.image_emb


def _text(features: Features) -> np.ndarray:
    return features.caption_emb


def _shuffled(inputs: Inputs) -> Scorer:
    return MisalignmentScorer(
        inputs.representation, inputs.seeded_head(), lambda f: shuffle_texts(f, inputs.seed)
    )


def _generic(inputs: Inputs) -> Scorer:
    assert inputs.generic_emb is not None  # Control.build has asked for it
    emb = inputs.generic_emb
    return MisalignmentScorer(inputs.representation, inputs.seeded_head(), lambda f: generic_texts(f, emb))


_UNIVFD = "UnivFD (Ojha et al. 2023, arXiv 2302.10174)"
_OURS = "our control"
_ALL = (
    Control(
        "image_mlp", "image only, MLP", "Is the caption needed at all, with the same head?", _OURS,
        lambda i: FeatureScorer(_image, i.seeded_head()),
    ),
    Control(
        "image_linear", "image only, linear", "Does a linear probe on the image embedding do as well?",
        _UNIVFD, lambda i: FeatureScorer(_image, logistic()),
    ),
    Control(
        "image_nearest", "image only, nearest neighbour", "Does no training at all do as well?", _UNIVFD,
        lambda i: FeatureScorer(_image, NearestNeighbour()),
    ),
    Control(
        "text_only", "caption only", "Does the caption's style or content give the class away?", _OURS,
        lambda i: FeatureScorer(_text, i.seeded_head()),
    ),
    Control(
        "shuffled_captions", "another image's caption", "Must it be the image's own caption?", _OURS,
        _shuffled,
    ),
    Control(
        "generic_caption", "one caption for all", "Is the text more than a fixed point to measure from?",
        _OURS, _generic, ("generic_emb",),
    ),
    Control(
        "caption_likelihood", "caption likelihood", "Does the captioner's own doubt suffice?", _OURS,
        lambda i: FeatureScorer(caption_likelihood, logistic()), ("caption_logprob",),
    ),
    Control(
        "likelihood_confidence", "caption likelihood and localiser score (grid, dense: the local cosine)",
        "What do the captioner's doubt and the localiser's score say together?", _OURS,
        lambda i: ConfidenceScorer(i.seeded_head()), ("caption_logprob",),
    ),
    Control(
        "spectrum", "power spectrum", "Do the frequencies give the generator away?",
        "azimuthal power spectrum, Durall et al. 2020 (arXiv 2003.01826)",
        lambda i: FeatureScorer(spectrum, logistic()), ("pixels",),
    ),
    Control(
        "noise_residual", "noise residual", "Does the noise differ from a camera's?",
        "co-occurrences of residuals, after SPAM (Pevny et al. 2010) and Cozzolino et al. 2014",
        lambda i: FeatureScorer(noise_residual, logistic()), ("pixels",),
    ),
    Control(
        "cnn", "CNN on pixels", "What does a network find that sees every pixel?",
        "recipe of CNNDetection (Wang et al. 2020, arXiv 1912.11035) in a small network",
        lambda i: FeatureScorer(
            pixels, PixelCNN(seed=i.seed, device=i.head.device)
        ),
        ("pixels",),
    ),
)  # fmt: skip

CONTROLS: dict[str, Control] = {control.name: control for control in _ALL}


def get_control(name: str) -> Control:
    """Look a control up; an unknown name lists those there are."""
    if name not in CONTROLS:
        raise InputError(f"unknown control {name!r}; expected one of {', '.join(CONTROLS)}")
    return CONTROLS[name]
