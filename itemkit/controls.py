"""Controls and baselines: what the misalignment must beat before a number of it means something.

Each is a scorer, as the detector is: ``fit(train, val)`` on features, where ``val`` is for early stopping
only, then ``decision_function(features)``, one number per image, higher for fake. A control is one entry of
`CONTROLS`: numbers of each image, what learns from them, and what it would mean if it won. What learns looks
at both classes, at real images alone ("one-class"), or does not learn at all ("untrained").
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import norm
from sklearn.base import BaseEstimator, clone
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut, StratifiedKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.validation import has_fit_parameter
from torch import Tensor, nn

from itemkit import schema
from itemkit.devices import choose_device
from itemkit.errors import InputError
from itemkit.features import BOX_COLUMNS, FOUND, Features, select_objects
from itemkit.head import MisalignmentMLP
from itemkit.images import jpeg_bytes
from itemkit.misalignment import Representation, RepresentationConfig, get_representation
from itemkit.text import did_you_mean

CHUNK = 256  # images at a time
RESIDUAL_LIMIT = 3  # residuals are clipped to -3..3
RESIDUAL_STEP = 2  # grey levels per unit of residual
LEAST_SCORE = 1e-3  # of an object detector: how unsure it is below says nothing more
JPEG_QUALITY = 90  # at which the length of an image as a JPEG is taken
ENOUGH = 0.95  # AUROC on its own generator below which a network on pixels was trained too little


class FeatureScorer:
    """Numbers of each image, and an untrained scikit-learn classifier or one-class learner on them.

    Each of ``numbers`` turns features into an array of shape (n, ...): a function, or an object that has
    ``fit(train)`` too, which is called first. Several stand side by side. With the learner None nothing is
    trained: the one number is the score.
    """

    def __init__(self, numbers: Sequence[Callable[[Features], np.ndarray]], learner: Any) -> None:
        self.numbers, self.learner = tuple(numbers), learner

    def fit(self, train: Features, val: Features | None = None) -> FeatureScorer:
        """Train on ``train``, stop on ``val`` where the learner can."""
        self.numbers_ = copy.deepcopy(self.numbers)
        for number in self.numbers_:
            if hasattr(number, "fit"):
                number.fit(train)
        if self.learner is not None:
            parts = [train]
            if val is not None and has_fit_parameter(self.learner, "X_val"):
                parts.append(val)
            arrays = [array for part in parts for array in (self.vectors(part), part.labels)]
            if has_fit_parameter(self.learner, "groups"):
                arrays.append(train.table[schema.GENERATOR].to_numpy(str))
            self.learner_ = clone(self.learner).fit(*arrays)
        return self

    def vectors(self, features: Features) -> np.ndarray:
        """What the learner sees of each image."""
        found = [number(features) for number in self.numbers_]
        return found[0] if len(found) == 1 else np.hstack(found)

    def decision_function(self, features: Features) -> np.ndarray:
        """Log-odds, margin or distance of fake."""
        vectors = self.vectors(features)
        score = vectors[:, 0] if self.learner is None else self.learner_.decision_function(vectors)
        return np.asarray(score, np.float64)

    def __call__(self, features: Features) -> np.ndarray:
        """The same as a column: one scorer's answer can be another one's number."""
        return self.decision_function(features)[:, None]


# -- what learns ---------------------------------------------------------------------------------------------


def logistic() -> Any:
    """Standardised logistic regression with balanced classes."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))


class GeneratorLeftOut(BaseEstimator):
    """`logistic` with the penalty that serves generators best that were left out of its training in turn.

    Of one generator alone, with the penalty that serves other images of it.
    """

    def fit(self, X: np.ndarray, y: np.ndarray, groups: np.ndarray) -> GeneratorLeftOut:
        """Train on labels (1 fake) and the generator of each row; reals are dealt out to the generators."""
        fakes, groups = np.unique(groups[y == schema.FAKE]), groups.copy()
        groups[y == schema.REAL] = np.resize(fakes, int(np.sum(y == schema.REAL)))
        several = len(fakes) > 1
        folds = LeaveOneGroupOut().split(X, y, groups) if several else StratifiedKFold(3).split(X, y)
        penalties = {"logisticregression__C": np.logspace(-4, 1, 6)}
        self.search_ = GridSearchCV(logistic(), penalties, scoring="roc_auc", cv=list(folds)).fit(X, y)
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of fake."""
        return self.search_.decision_function(X)


def in_chunks(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """What a function gives for rows, a few at a time, to bound memory."""
    return np.concatenate([function(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)])


class NearestNeighbour(BaseEstimator):
    """Cosine to the nearest fake minus that to the nearest real image of the training set; no training."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> NearestNeighbour:
        """Remember the embeddings of both classes (labels 0 and 1)."""
        banks = (X[np.asarray(y) == label] for label in (schema.REAL, schema.FAKE))
        self.banks_ = [NearestNeighbors(n_neighbors=1, metric="cosine").fit(bank) for bank in banks]
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Nearest fake minus nearest real cosine."""
        from_real, from_fake = (bank.kneighbors(X)[0][:, 0] for bank in self.banks_)
        return from_real - from_fake


class OneClass(BaseEstimator):
    """Learns from real images alone; the number of each image is how far it lies from them."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> OneClass:
        """Look at the real images (label 0) only."""
        self._learn(X[np.asarray(y) == schema.REAL].astype(np.float64))
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """How far each row lies from the real images."""
        return in_chunks(self._far, X.astype(np.float64))


class Mahalanobis(OneClass):
    """Distance from the reals' mean in units of their spread, in every direction.

    The covariance is shrunk after Ledoit and Wolf (2004), so there may be more numbers than images.
    """

    def _learn(self, real: np.ndarray) -> None:
        self.scaler_ = StandardScaler().fit(real)
        self.spread_ = LedoitWolf().fit(self.scaler_.transform(real))

    def _far(self, x: np.ndarray) -> np.ndarray:
        return np.sqrt(self.spread_.mahalanobis(self.scaler_.transform(x)))


class NearestReals(OneClass):
    """Distance to the k-th nearest real, both at unit length (Sun et al. 2022, arXiv 2204.06507)."""

    def __init__(self, k: int = 5) -> None:
        self.k = k

    def _learn(self, real: np.ndarray) -> None:
        self.reals_ = NearestNeighbors(n_neighbors=min(self.k, len(real))).fit(normalize(real))

    def _far(self, x: np.ndarray) -> np.ndarray:
        return self.reals_.kneighbors(normalize(x))[0][:, -1]


class RankSum(OneClass):
    """Sum over the numbers, higher for fakes, of z: where each ranks among the reals', as a normal quantile.

    Above all reals, where ranks are equal, z grows on in units of the reals' upper spread (from their median
    to the 84th percentile).
    """

    def _learn(self, real: np.ndarray) -> None:
        self.reals_ = np.sort(real, axis=0)

    def _far(self, x: np.ndarray) -> np.ndarray:
        total, n = np.zeros(len(x)), len(self.reals_)
        for real, number in zip(self.reals_.T, x.T, strict=True):
            rank = (np.searchsorted(real, number) + np.searchsorted(real, number, "right")) / 2
            middle, upper = np.quantile(real, [0.5, 0.84])
            beyond = np.maximum(number - real[-1], 0) / max(upper - middle, 1e-9)
            total += norm.ppf((rank + 0.5) / (n + 1)) + beyond
        return total


@dataclass(eq=False, repr=False)
class PixelCNN(BaseEstimator):
    """Small convolutional network from pixels to real or fake, after CNNDetection (arXiv 1912.11035).

    Random crops and mirroring; full resolution in the first layer, because traces of a generator do not
    survive downsampling. No pretrained weights. Trained until it knows its own generator: ``auroc_`` is what
    it reached on the validation images, whose best weights are kept.
    """

    width: int = 16  # channels of the first layer; later ones have twice and four times as many
    crop: int = 40  # side in pixels of the crops in training; in use images are seen whole
    steps: int = 400  # the budget, whatever the number of images: seconds on a CPU
    check: int = 25  # steps after which the validation images are looked at
    batch_size: int = 32
    learning_rate: float = 3e-3
    enough: float = 0.98  # AUROC on the validation images at which the training ends
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

    def fit(self, X: np.ndarray, y: np.ndarray, X_val: np.ndarray, y_val: np.ndarray) -> PixelCNN:
        """Train on uint8 images (n, h, w, 3) and labels (1 fake), stop on others."""
        rng, half = np.random.default_rng(self.seed), self.batch_size // 2
        classes = [np.flatnonzero(np.asarray(y) == label) for label in (schema.REAL, schema.FAKE)]
        # torch's initialisers draw from the global state: leave it as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net_ = self._network().to(choose_device(self.device), memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(self.net_.parameters(), lr=self.learning_rate, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.learning_rate, self.steps)
        self.auroc_, best = -1.0, self.net_
        for step in range(1, self.steps + 1):
            self.net_.train()
            rows = np.concatenate([rng.choice(rows, half) for rows in classes])
            top, left = (rng.integers(max(side - self.crop, 0) + 1) for side in X.shape[1:3])
            crops = X[rows, top : top + self.crop, left : left + self.crop][:, :, :: rng.choice((-1, 1))]
            logits = self._logits(crops)
            target = torch.arange(2, dtype=torch.float32, device=logits.device).repeat_interleave(half)
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(logits, target).backward()
            optimiser.step()
            schedule.step()
            if step % self.check and step < self.steps:
                continue
            if (auroc := roc_auc_score(y_val, self.decision_function(X_val))) > self.auroc_:
                self.auroc_, best = float(auroc), copy.deepcopy(self.net_)
            if auroc >= self.enough:
                break
        self.net_ = best
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of fake of each image."""
        self.net_.eval()
        with torch.no_grad():
            return in_chunks(lambda part: self._logits(part).cpu().double().numpy(), X)


# -- numbers without CLIP ------------------------------------------------------------------------------------


def caption_likelihood(features: Features) -> np.ndarray:
    """Minus the mean log-probability per token of each caption under its captioner, shape (n, 1)."""
    value = features.table[schema.CAPTION_LOGPROB]
    if missing := value.isna().sum():
        raise InputError(f"{missing} of {len(value)} images lack {NEEDS[schema.CAPTION_LOGPROB][0]}")
    return -value.to_numpy(np.float32)[:, None]


def detector_doubt(features: Features) -> np.ndarray:
    """How unsure the object detector is of what the caption names, shape (n, 3), higher for more doubt.

    Share of the objects without a box, minus the least score, minus the mean log score; NaN for an image
    without objects. A cosine in place of a score would be the local misalignment again, and is refused.
    """
    score = features.objects["score"].astype(float)
    if score.isna().any():
        raise InputError(f"{score.isna().sum()} of {len(score)} objects lack {NEEDS['score'][0]}")
    each = pd.DataFrame(
        {"without": ~features.objects[FOUND].astype(bool), "least": -score,
         "log": -np.log(score.clip(lower=LEAST_SCORE))}
    )  # fmt: skip
    doubt = each.groupby(features.owner).agg({"without": "mean", "least": "max", "log": "mean"})
    return doubt.reindex(range(len(features))).to_numpy(np.float32)


class Doubt:
    """`detector_doubt`, in which images without objects have the mean of the training reals."""

    def fit(self, train: Features) -> Doubt:
        """Take that mean: one over the images being scored would let them set each other's numbers."""
        reals = pd.DataFrame(detector_doubt(train.select(train.labels == schema.REAL)))
        self.typical_ = reals.mean().fillna(0).to_numpy(np.float32)
        return self

    def __call__(self, features: Features) -> np.ndarray:
        """Shape (n, 3)."""
        doubt = detector_doubt(features)
        return np.where(np.isnan(doubt), self.typical_, doubt)


# -- numbers of embeddings -----------------------------------------------------------------------------------


IMAGE, CAPTION = attrgetter(schema.IMAGE_EMB), attrgetter(schema.CAPTION_EMB)
# one minus a cosine, one number: used untrained, or among a handful
DISTANCES = {
    name: Representation(RepresentationConfig(level, "distance", pooling, relative=relative))
    for name, level, pooling, relative in (
        ("global", "global", "mean", False), ("mean_local", "local", "mean", False),
        ("worst_local", "local", "worst", False), ("worst_relative", "local", "worst", True),
    )
}  # fmt: skip


@dataclass
class Novelty:
    """How far an image's regions lie from those of the training reals; whole images where it has none."""

    novelty: Any  # Mahalanobis or NearestReals
    pooling: str  # of an image's regions: "max" or "mean"

    @staticmethod
    def _all(features: Features) -> tuple[np.ndarray, np.ndarray]:
        bare = np.flatnonzero(np.bincount(features.owner, minlength=len(features)) == 0)
        emb = np.concatenate([features.region_emb, features.image_emb[bare]])
        return emb, np.concatenate([features.owner, bare])

    def fit(self, train: Features) -> Novelty:
        """Fit on the regions of real images."""
        emb, owner = self._all(train)
        self.novelty_ = clone(self.novelty).fit(emb, train.labels[owner])
        return self

    def __call__(self, features: Features) -> np.ndarray:
        """Shape (n, 1)."""
        emb, owner = self._all(features)
        far = pd.Series(self.novelty_.decision_function(emb))
        return far.groupby(owner).agg(self.pooling).to_numpy()[:, None]


def best_regions(features: Features, k: int) -> Features:
    """Keep the k regions of each image that fit any phrase best, each once, with the phrase it fits best."""
    cosine = np.einsum("ij,ij->i", features.region_emb, features.phrase_emb)
    order = np.lexsort((-cosine, features.owner))
    boxes = features.objects[list(BOX_COLUMNS[:4])].iloc[order].assign(owner=features.owner[order])
    best = order[~boxes.duplicated().to_numpy()]
    owner = pd.Series(features.owner[best])
    return select_objects(features, np.sort(best[owner.groupby(owner).cumcount() < k]))


def concepts(features: Features) -> np.ndarray:
    """Maximum concept matching, (n, 1): one minus the largest cosine of a region and any phrase; 1 without.

    After MCM (Ming et al. 2022, arXiv 2211.13445), without its softmax and with regions; for features of
    which a fixed bank of phrases was asked, not the image's own caption. Means of the 2 or 4 largest were
    worse on the mini laboratory's validation images: AUROC of flow 0.71 and 0.61 instead of 0.79.
    """
    cosine = pd.Series(np.einsum("ij,ij->i", features.region_emb, features.phrase_emb))
    largest = cosine.groupby(features.owner).max().reindex(range(len(features)), fill_value=0.0)
    return 1 - largest.to_numpy()[:, None]


# -- numbers of pixels ---------------------------------------------------------------------------------------


def pixels(features: Features) -> np.ndarray:
    """The images of a set of features, checked: uint8 array (n, h, w, 3)."""
    x = features.pixels
    if x is None or x.ndim != 4 or len(x) != len(features) or x.shape[3] != 3 or x.dtype != np.uint8:
        got = "none" if x is None else f"{x.dtype} of shape {x.shape}"
        raise InputError(f"pixels of {len(features)} images: {got}; expected {NEEDS['pixels'][0]}")
    return x


MEMORY = 200_000  # vectors of images that each function below remembers


def of_pixels(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Features], np.ndarray]:
    """Let a function of images take features, and look at each image once: a study comes back to it often."""
    known: dict[tuple, np.ndarray] = {}

    @functools.wraps(function)
    def remembered(features: Features) -> np.ndarray:
        images = pixels(features)
        keys = [(image.shape, hashlib.blake2b(image.tobytes()).digest()) for image in images]
        if len(known) > MEMORY:
            known.clear()
        if new := {key: row for row, key in enumerate(keys) if key not in known}:
            known.update(zip(new, in_chunks(function, images[list(new.values())]), strict=True))
        return np.stack([known[key] for key in keys]).astype(np.float32)

    return remembered


@of_pixels
def spectrum(x: np.ndarray) -> np.ndarray:
    """Azimuthally averaged log10 power of the grey image (Durall et al. 2020, arXiv 2003.01826).

    One number for each ring of the frequency plane, from the mean to the corner (where the checkerboard of an
    upsampling sits) in steps of one frequency. A Hann window keeps the borders from drawing a cross.
    """
    h, w = x.shape[1:3]
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    ring = np.rint(frequency * min(h, w)).astype(int).ravel()
    mean_of_ring = np.eye(ring.max() + 1)[ring] / np.maximum(np.bincount(ring), 1)
    window = np.hanning(h)[:, None] * np.hanning(w)[None]
    grey = x @ np.array([0.299, 0.587, 0.114]) / 255
    power = np.abs(np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2
    return np.log10(power.reshape(len(x), -1) @ mean_of_ring + 1e-8)


@of_pixels
def noise_residual(x: np.ndarray) -> np.ndarray:
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

    return np.array([shares(image) + shares(image.swapaxes(0, 1)) for image in x])


@of_pixels
def noise_level(x: np.ndarray) -> np.ndarray:
    """Log of the noise's deviation in each channel, in grey levels, after Immerkaer (1996)."""
    residual = np.diff(np.diff(x.astype(np.float32), 2, axis=1), 2, axis=2)  # a Laplacian without its edges
    return np.log(np.abs(residual).mean((1, 2)) * np.sqrt(np.pi / 2) / 6 + 1e-2)


@of_pixels
def file_length(x: np.ndarray) -> np.ndarray:
    """Log of the bytes of each image as a PNG and as a JPEG of quality 90."""

    def lengths(image: np.ndarray) -> tuple[int, int]:
        picture, png = Image.fromarray(image), io.BytesIO()
        picture.save(png, "PNG")
        return len(png.getvalue()), len(jpeg_bytes(picture, JPEG_QUALITY))

    return np.log([lengths(image) for image in x])


# grey levels at which a bin of the histogram begins: the ends, where values are clipped, are seen closely
BIN_STARTS = np.array([0, 1, 3, 6, *range(16, 240, 16), 240, 250, 253, 255])


@of_pixels
def histogram(x: np.ndarray) -> np.ndarray:
    """Root of the share of all values in each bin of `BIN_STARTS`: brightness, contrast and clipping."""
    bin_of = np.searchsorted(BIN_STARTS, np.arange(256), "right") - 1
    counts = [np.bincount(bin_of[image.ravel()], minlength=len(BIN_STARTS)) for image in x]
    return np.sqrt(np.array(counts) / x[0].size)


# -- the table -----------------------------------------------------------------------------------------------

# what a control may need beside embeddings: in words, and whether features lack it
NEEDS: dict[str, tuple[str, Callable[[Features], bool]]] = {
    "pixels": (
        "the images themselves: dataclasses.replace(features, pixels=uint8 array (n, h, w, 3))",
        lambda features: features.pixels is None,
    ),
    "caption_logprob": (
        "caption likelihoods: captions from a captioner that reports them",
        lambda features: bool(features.table[schema.CAPTION_LOGPROB].isna().any()),
    ),
    "score": (
        "an object detector's scores: the localisers whole, grid and dense have cosines only",
        lambda features: not len(features.objects) or bool(features.objects["score"].isna().any()),
    ),
}
# features of the same images made in another way, which some controls are given instead
VARIANTS = {
    "other_caption": "features of each image with another image's caption, whose objects are looked for",
    "one_caption": "features of each image with one and the same caption, whose objects are looked for",
    "bank": "features of each image for which a fixed bank of phrases was looked for",
    "other_encoder": "features by another frozen encoder: give its name or folder",
}
ITEM, HEAD = "item", "head"  # stand for the representation and the head of the detector beside a control


@dataclass(frozen=True)
class Control:
    """One contender: numbers and what learns from them, what would follow if it won, what it needs."""

    title: str
    numbers: tuple[Any, ...]  # as of `FeatureScorer`, or ITEM
    learner: Any  # as of `FeatureScorer`, or HEAD
    if_it_won: str  # one sentence, printed below the tables
    needs: tuple[str, ...] = ()  # of `NEEDS`
    variant: str = ""  # of `VARIANTS`: what it is given in place of the study's features
    slow: bool = False  # see `itemkit.recipes.Recipe`

    @property
    def reals_only(self) -> bool:
        """Whether fakes of the training set change nothing: every number of ours is fitted on reals."""
        return self.learner is None or isinstance(self.learner, OneClass)

    def build(
        self,
        seed: int = 0,
        representation: RepresentationConfig | str = "absolute",
        head: MisalignmentMLP | None = None,
    ) -> FeatureScorer:
        """Untrained scorer, beside a detector of this representation and untrained head."""
        head = clone(head or MisalignmentMLP()).set_params(seed=seed)
        item = Representation(get_representation(representation))
        learner = head if self.learner == HEAD else copy.deepcopy(self.learner)
        if isinstance(learner, PixelCNN):
            learner.set_params(seed=seed, device=head.device)
        return FeatureScorer([item if number == ITEM else number for number in self.numbers], learner)

    def lacks(self, features: Features, variants: Mapping[str, Features]) -> str:
        """What features and variants lack for it, in words; empty where it can be run."""
        if self.variant and self.variant not in variants:
            return VARIANTS[self.variant]
        own = variants.get(self.variant, features)
        return "; ".join(NEEDS[need][0] for need in self.needs if NEEDS[need][1](own))


LOGPROB, SCORE, PIXELS = ("caption_logprob",), ("score",), ("pixels",)
# the misalignment itself, as vectors and as a handful of numbers, and what it may be joined with
OURS: dict[str, Control] = {
    "item": Control("misalignment", (ITEM,), HEAD, "The fit with its own caption tells a fake."),
    "drawn": Control("misalignment as drawn by its authors, vectors", (Representation("drawn"),), HEAD,
        "The sum of global and local distance, as in the authors' figure, is the better reading."),
    "drawn_scalar": Control("misalignment as drawn by its authors, scalars",
        (Representation("drawn_scalar"),), HEAD, "The sum of two distances is all that a head needs."),
    "cosines_relative": Control("misalignment: cosines relative to the phrase",
        (Representation("cosines_relative"),), HEAD, "Cosines of different phrases need one scale."),
    "early": Control("fusion, early: item + image", (ITEM, IMAGE), HEAD,
        "The image embedding is of use beside the misalignment."),
    "ranks_noise": Control("ranks, one-class: mean local cosine, noise residual",
        (DISTANCES["mean_local"], FeatureScorer((noise_residual,), Mahalanobis())), RankSum(),
        "Meaning and noise complement each other, and no fake is needed.", PIXELS),
}  # fmt: skip
HANDFUL = tuple(DISTANCES[name] for name in ("global", "mean_local", "worst_relative"))
OURS |= {
    how + name: Control(f"{title}: misalignment{words}", HANDFUL + more, learner, if_it_won, needs)
    for how, title, learner, if_it_won in (
        ("few", "few numbers", logistic(), "A handful of numbers says what vectors say and overfits less."),
        ("ranks", "ranks, one-class", RankSum(), "Real images alone say what is usual; no fake is needed."),
    )
    for name, words, more, needs in (
        ("", "", (), ()),
        ("_doubt", ", doubt", (Doubt(),), SCORE),
        ("_likelihood", ", caption likelihood", (caption_likelihood,), LOGPROB),
        ("_both", ", doubt, caption likelihood", (Doubt(), caption_likelihood), SCORE + LOGPROB),
    )
}
OURS["stack"] = Control("stack: misalignment, caption likelihood, noise residual",
    (*HANDFUL, caption_likelihood, FeatureScorer((noise_residual,), Mahalanobis())), GeneratorLeftOut(),
    "Parts that were weighted for a family left out serve the next one, too.", LOGPROB + PIXELS)  # fmt: skip
CONTROLS: dict[str, Control] = {
    # neither a joint space nor embedded text
    "caption_likelihood": Control("caption likelihood", (caption_likelihood,), logistic(),
        "The captioner's own doubt is enough; no joint space is needed.", LOGPROB),
    "doubt": Control("object detector's doubt", (Doubt(),), logistic(),
        "That a detector is unsure of its objects is enough; no joint space is needed.", SCORE),
    "doubt_likelihood": Control("object detector's doubt and caption likelihood",
        (Doubt(), caption_likelihood), logistic(),
        "Doubt of any models of real images is enough, and misalignment is one form of it.", SCORE + LOGPROB),
    # other texts
    "concepts": Control("maximum matching in a bank of phrases, untrained", (concepts,), None,
        "Text is needed as an anchor; the image's own caption is not.", variant="bank"),
    "other_caption": Control("another image's caption", (ITEM,), HEAD,
        "It need not be the image's own caption.", variant="other_caption"),
    "one_caption": Control("one caption for all", (ITEM,), HEAD,
        "Text is no more than a fixed point to measure from.", variant="one_caption"),
    "text_only": Control("caption only", (CAPTION,), HEAD,
        "What the captions say or how gives the classes away; the data are at fault."),
    # the image alone
    "image_mlp": Control("image only, MLP", (IMAGE,), HEAD, "The same head needs no caption."),
    "image_linear": Control("image only, linear", (IMAGE,), logistic(),  # UnivFD, arXiv 2302.10174
        "A linear probe of the image embedding is enough."),
    "image_nearest": Control("image only, nearest neighbour", (IMAGE,), NearestNeighbour(),
        "Image embeddings are enough, and nothing needs to be trained on them."),
    "other_mlp": Control("another encoder, image only, MLP", (IMAGE,), HEAD,
        "A better image encoder does more than captions do.", variant="other_encoder"),
    "other_linear": Control("another encoder, image only, linear", (IMAGE,), logistic(),
        "A better image encoder does more than captions do.", variant="other_encoder"),
    "cnn": Control("CNN on pixels", (pixels,), PixelCNN(),
        "Generators share traces that a network sees in pixels.", PIXELS, slow=True),
}  # fmt: skip
CONTROLS |= {
    f"cosine_{name}": Control(f"one cosine, {name.replace('_', ' ')}, untrained", (number,), None,
        "A head learns nothing that one cosine does not say.")
    for name, number in DISTANCES.items()
}  # fmt: skip
CONTROLS |= {
    f"novelty_{where}_{name}": Control(f"novelty of the {words}, {title}, one-class", (number,), learner,
        "Fakes are novel to the image encoder; no text is needed.")
    for name, title, far in (
        ("mahalanobis", "Mahalanobis", Mahalanobis()), ("knn", "nearest reals", NearestReals())
    )
    for where, words, number, learner in (
        ("image", "image", IMAGE, far), ("mean", "mean region", Novelty(far, "mean"), None),
        ("worst", "worst region", Novelty(far, "max"), None),
    )
}  # fmt: skip
CONTROLS |= {
    name + end: Control(f"{title}, {classes}", (number,), learner,
        f"Pixels give fakes away whatever they show: {why}.", PIXELS)
    for name, title, number, why in (
        ("noise_residual", "noise residual", noise_residual, "their noise is not a camera's"),
        ("spectrum", "power spectrum", spectrum, "their frequencies are those of an upsampling"),
        ("file_length", "file length", file_length, "they compress better or worse"),
        ("noise_level", "noise level", noise_level, "they are smoother or rougher"),
        ("histogram", "histogram and clipping", histogram, "brightness, contrast or clipping differ"),
    )
    for end, classes, learner in (("", "two-class", logistic()), ("_one_class", "one-class", Mahalanobis()))
}  # fmt: skip


def get_control(name: str) -> Control:
    """Look a control up; an unknown name lists those there are."""
    if name not in CONTROLS:
        known = ", ".join(CONTROLS)
        raise InputError(f"unknown control {name!r}; expected one of {known}.{did_you_mean(name, CONTROLS)}")
    return CONTROLS[name]
