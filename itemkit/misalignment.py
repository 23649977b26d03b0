"""Misalignment of images and their captions: pure functions from stored embeddings to feature vectors.

The method's claim is that a generated image fits its own caption differently from a photograph, as a whole
(global) and object by object (local). Which *form* of that difference the authors give to their head is not
public, so `FORMS` has several, and all of them start from the same stored embeddings::

    image and caption, region and phrase --misalign--> one vector for each pair
    one vector, minus what real images with such a text have --> how unusual it is (only if relative)
    the vectors of an image's objects --pool--> one local vector
    global vector, local vector --fuse--> what the head sees (represent)

**Why relative.** Cosines of different phrases are not on one scale: a joint space is trained to rank images
for a text, and nothing in that makes two texts comparable. In real images of the mini laboratory a ball has
about 0.82 with "a red ball", the ground 0.58 with "the sand", however well it is boxed. So in 99 of 100 real
images the ground is the worst object, and "worst" says nothing about objects. Relative to what *real* images
with such a phrase have, 0.55 is usual for the sand and alarming for a ball.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from itemkit import schema
from itemkit.errors import InputError
from itemkit.features import FOUND, Features
from itemkit.text import did_you_mean

NORM_TOLERANCE = 1e-3  # float16 storage moves a norm by less than 5e-4

# One pair of embeddings, one vector. a: images or regions, b: captions or phrases, both (n, d), row by row.
FORMS = {
    # a . b, 1 = aligned: all that a retrieval metric sees, CLIPScore (Hessel et al. 2021, arXiv 2104.08718)
    "cosine": lambda a, b: np.einsum("ij,ij->i", a, b)[:, None],
    # 1 - a . b, 0 = aligned: the same turned round, so that more is worse. One "distance" of the figure
    "distance": lambda a, b: 1 - np.einsum("ij,ij->i", a, b)[:, None],
    # a - b: signed, so it keeps the direction and with it some of the content. Ours
    "difference": lambda a, b: a - b,
    # |a - b|: less of the content and of a generator's style leaks through. With the product it is how
    # InferSent compares two sentences (Conneau et al. 2017, arXiv 1705.02364)
    "absolute": lambda a, b: np.abs(a - b),
    # a * b, element by element: its sum is the cosine, so a head weights that. InferSent
    "product": lambda a, b: a * b,
    # [a, b]: the head must find the misalignment itself, and also sees everything else. As DE-FAKE (Sha et
    # al. 2023) and Robust-CLIP (arXiv 2404.12908) do
    "concat": lambda a, b: np.concatenate([a, b], axis=1),
}
KINDS = tuple(FORMS)


def misalign(image_emb: np.ndarray, text_emb: np.ndarray, kind: str = "absolute") -> np.ndarray:
    """Misalignment of each image (or region) and its text in the joint space.

    Parameters
    ----------
    image_emb, text_emb : float array, shape (n, d)
        L2-normalised, row by row: whole images and captions (global), or regions and phrases (local).
    kind : name in `FORMS`

    Returns
    -------
    float32 array, shape (n, 1), (n, d) or (n, 2 d)

    Raises
    ------
    InputError
        Shapes differ, or a row's norm is off 1 by more than 1e-3.
    """
    if kind not in FORMS:
        raise InputError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    image_emb, text_emb = np.asarray(image_emb, np.float32), np.asarray(text_emb, np.float32)
    if image_emb.ndim != 2 or image_emb.shape != text_emb.shape:
        raise InputError(
            f"image embeddings have shape {image_emb.shape}, text embeddings {text_emb.shape}; "
            "expected two arrays of one shape (n, d), row i of both being pair i"
        )
    for name, emb in (("image", image_emb), ("text", text_emb)):
        off = np.abs(np.sqrt(np.einsum("ij,ij->i", emb, emb)) - 1)
        if off.size and not off.max() <= NORM_TOLERANCE:  # "not <=" also catches NaN
            worst = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
            raise InputError(
                f"{name} embedding {worst} has norm {np.linalg.norm(emb[worst]):.4f}; expected 1 within "
                f"{NORM_TOLERANCE}. L2-normalise the rows first (Encoder does)"
            )
    return FORMS[kind](image_emb, text_emb)


TOP_K = 3
TEMPERATURE = 0.05  # cosine units; small values approach "worst", large ones "mean"

# How a varying number of objects becomes one vector: each entry weighs the objects of an image and adds them
# up; several entries stand side by side. count: objects of the image; rank: 0 for the least aligned object;
# excess: cosine above that object's.
POOLINGS = {
    # one bad object among many is diluted. Ours; what a reader would try first
    "mean": lambda count, rank, excess: [1 / count],
    # no dilution, but above all it counts objects: "drawn" with it has an AUROC of 0.82 instead of 0.91 (mini
    # laboratory, validation, seen families). One reading of the figure's Σ
    "sum": lambda count, rank, excess: [rank >= 0],
    # one bad object is enough, and so is one bad box: the max pooling of multiple-instance learning
    "worst": lambda count, rank, excess: [rank == 0],
    # both side by side. Ours, the default
    "mean_worst": lambda count, rank, excess: [1 / count, rank == 0],
    # the lowest cosines, lowest first, zeros where there are fewer; the head sees each. Ours
    "top_k": lambda count, rank, excess: [rank == k for k in range(TOP_K)],
    # softmax(-cosine / temperature), between mean and worst. Ours; normalised by `pool`
    "soft_worst": lambda count, rank, excess: [np.exp(-excess / TEMPERATURE)],
}


def pool(
    local: np.ndarray, owner: np.ndarray, n_images: int, how: str = "mean_worst", *, cosine: np.ndarray
) -> np.ndarray:
    """Turn a varying number of object vectors per image into one vector per image.

    Parameters
    ----------
    local : float array, shape (m, k)
        One vector per semantic object.
    owner : int array, shape (m,)
        Image of each object, in any order; images without objects get zeros.
    how : name in `POOLINGS`
    cosine : float array, shape (m,)
        Of each object's region and phrase; a relative representation gives the relative one.

    Returns
    -------
    float32 array, shape (n_images, k); 2 k wide for "mean_worst", TOP_K * k for "top_k"
    """
    # by image, least aligned object first; equal cosines keep their order, so results do not depend on luck
    order = np.lexsort((cosine, owner))
    local, owner, cosine = local[order], owner[order], cosine[order]
    counts = np.bincount(owner, minlength=n_images)
    first = (np.cumsum(counts) - counts)[owner]
    rank, rows = np.arange(len(owner)) - first, np.arange(len(owner))
    pooled = []
    for weight in POOLINGS[how](counts[owner].astype(np.float32), rank, cosine - cosine[first]):
        if how == "soft_worst":
            weight = weight / np.bincount(owner, weight, n_images)[owner]
        each = csr_array((weight.astype(np.float32), (owner, rows)), (n_images, len(owner)))
        pooled.append(each @ local)
    return np.concatenate(pooled, axis=1)


STACKED = ("mean_worst", "top_k")  # several blocks side by side: too wide to be added to the global one
LEVELS = ("global", "local", "hierarchical")
FUSIONS = ("concat", "sum")  # side by side, or added


@dataclass(frozen=True)
class RepresentationConfig:
    """Which misalignment vector the head is given.

    The paper's abstract (Zhang et al. 2025, arXiv 2511.00427) describes the hierarchical one, and no form.
    """

    level: str = "hierarchical"  # out of LEVELS
    kind: str = "absolute"  # of one pair's misalignment, out of FORMS; our choice
    pooling: str = "mean_worst"  # of a varying number of objects, out of POOLINGS; our choice
    fuse: str = "concat"  # how global and local part come together, out of FUSIONS
    relative: bool = False  # minus what real images with such a text have, see `Representation`
    found_only: bool = False  # nouns without a box (column ``found``) are not pooled

    def __post_init__(self) -> None:
        choices = (("level", LEVELS), ("kind", KINDS), ("pooling", POOLINGS), ("fuse", FUSIONS))
        for name, allowed in choices:
            if getattr(self, name) not in tuple(allowed):
                raise InputError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.fuse == "sum" and self.pooling in STACKED:
            raise InputError(
                f"fuse='sum' adds the local part to the global one, which pooling={self.pooling!r} makes "
                f"wider; expected pooling {', '.join(how for how in POOLINGS if how not in STACKED)}"
            )

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)


# As the authors draw it: images/arxiv_clip.png in the first author's public site, the GitHub repository
# Daisy-Zhang/daisy-zhang.github.io, added beside the paper's entry on 2025-11-14. That it is the paper's own
# figure is our inference.
# - settled there: only matching pairs are used. The whole image and its caption give one global distance, the
#   crops and their nouns together one local distance. Both enter a circled Σ, and its result the MLP.
# - open: what a distance is, a number or a vector; how many local pairs become one; whether Σ adds.
# - we chose: 1 - cosine or |a - b|; the mean over objects; the sum. Nouns and boxes come with the features.
_DRAWN = RepresentationConfig(pooling="mean", fuse="sum")

#: Named representations. The hierarchical ones go by their kind alone; "cosines" is three numbers: global,
#: mean local, worst local.
REPRESENTATIONS: dict[str, RepresentationConfig] = {
    "absolute": RepresentationConfig(),
    "cosines": RepresentationConfig(kind="cosine"),
    "cosines_relative": RepresentationConfig(kind="cosine", relative=True),
    "difference": RepresentationConfig(kind="difference"),
    "product": RepresentationConfig(kind="product"),
    "concat": RepresentationConfig(kind="concat"),
    "drawn": _DRAWN,
    "drawn_scalar": replace(_DRAWN, kind="distance"),
    **{f"global_{kind}": RepresentationConfig(level="global", kind=kind) for kind in KINDS},
    **{f"local_{kind}": RepresentationConfig(level="local", kind=kind) for kind in KINDS},
}


def get_representation(name: str | RepresentationConfig) -> RepresentationConfig:
    """Look a representation up by its name in `REPRESENTATIONS`; a configuration is returned as it is."""
    if isinstance(name, RepresentationConfig):
        return name
    if name not in REPRESENTATIONS:
        raise InputError(
            f"unknown representation {name!r}; expected one of {', '.join(REPRESENTATIONS)}."
            + did_you_mean(name, REPRESENTATIONS)
        )
    return REPRESENTATIONS[name]


class Representation:
    """From features to what the head sees; a relative one must learn first what real images have.

    An image whose caption names no object, or with ``found_only`` none that was found, counts as its own only
    object (our rule): the local part then says nothing new and stays in the range of its neighbours, where
    zeros would be a strong misalignment.

    Relative misalignment of image a and text b is ``(m(a, b) - E[m | b]) / s(b)``: E is what real images with
    such a text have, s how far they usually lie from it (1 for the average text, so a cosine keeps its unit).
    Both are ridge regressions from the text's embedding: a phrase never seen borrows from those near it.
    """

    def __init__(self, config: RepresentationConfig | str = "absolute") -> None:
        self.config = get_representation(config)
        self.reals: dict[str, np.ndarray] = {}
        """By level: coefficients of E of cosine and misalignment and of log s, (d + 1, 1 + k + 1)."""

    def fit(self, features: Features) -> Representation:
        """Learn from the real ones among labelled images; only a relative representation has to."""
        if self.config.relative:
            real = features.select(features.labels == schema.REAL)
            if len(real) < 2:
                raise InputError(
                    f"{len(real)} of {len(features)} images are real; a relative representation learns from "
                    "two or more"
                )
            absolute = Representation(replace(self.config, relative=False))
            pairs = {"global": (real.image_emb, real.caption_emb), "local": self._objects(real)[:2]}
            for level, (image_emb, text_emb) in pairs.items():
                self.reals[level] = _expected(text_emb, absolute._misalign(level, image_emb, text_emb))
        return self

    def __call__(self, features: Features) -> np.ndarray:
        """Misalignment vector of every image, see `represent`."""
        whole = self._misalign("global", features.image_emb, features.caption_emb)[:, 1:]
        if self.config.level == "global":
            return whole
        image_emb, text_emb, owner, _ = self._objects(features)
        local = self._misalign("local", image_emb, text_emb)
        pooled = pool(local[:, 1:], owner, len(features), self.config.pooling, cosine=local[:, 0])
        if self.config.level == "local":
            return pooled
        return whole + pooled if self.config.fuse == "sum" else np.hstack([whole, pooled])

    def pair_cosines(self, features: Features) -> dict[str, np.ndarray]:
        """Cosines of images and captions, "global", and of regions and phrases, "local".

        Relative ones if the representation is relative, whatever its form; of all objects, found or not.
        """
        pairs = {
            "global": (features.image_emb, features.caption_emb),
            "local": (features.region_emb, features.phrase_emb),
        }
        return {level: self._misalign(level, *pair)[:, 0] for level, pair in pairs.items()}

    def worst_phrase(self, features: Features) -> pd.Series:
        """Phrase of each image's least aligned object, missing where the image counts as its own.

        ``worst_phrase(reals).isin(settings).mean()`` tells whether the worst object is one, or the ground.
        """
        image_emb, text_emb, owner, kept = self._objects(features)
        worst = pd.Series(self._misalign("local", image_emb, text_emb)[:, 0]).groupby(owner).idxmin()
        phrases = pd.Series(features.objects["phrase"].to_numpy(object)[kept])
        return phrases.reindex(worst).reset_index(drop=True)

    def _misalign(self, level: str, image_emb: np.ndarray, text_emb: np.ndarray) -> np.ndarray:
        """Cosine of each pair and, behind it, its misalignment, relative or not: (n, 1 + k)."""
        pairs = np.hstack([misalign(image_emb, text_emb, kind) for kind in ("cosine", self.config.kind)])
        if not self.config.relative:
            return pairs
        if level not in self.reals:
            raise InputError(
                "this representation is relative to real images and was not fitted: call "
                "Representation(config).fit(training features) first, then it on any features"
            )
        expected = text_emb @ self.reals[level][:-1] + self.reals[level][-1]
        return (pairs - expected[:, :-1]) / np.exp(expected[:, -1:])

    def _objects(self, features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray, slice | np.ndarray]:
        """Regions, phrases and images of all that is pooled; which of the objects these begin with."""
        kept: slice | np.ndarray = slice(None)
        if self.config.found_only and FOUND in features.objects:
            kept = features.objects[FOUND].to_numpy(bool)
        owner = features.owner[kept]
        empty = np.flatnonzero(np.bincount(owner, minlength=len(features)) == 0)
        return (
            np.concatenate([features.region_emb[kept], features.image_emb[empty]]),
            np.concatenate([features.phrase_emb[kept], features.caption_emb[empty]]),
            np.concatenate([owner, empty]),
            kept,
        )


STRENGTHS = np.logspace(-3, 4, 15)  # of ridge regressions, tried by leave-one-out
LEAST_SPREAD = 1e-3  # of a cosine: a text whose reals fit exactly is not infinitely sure
MOST_PAIRS = 20_000  # evenly spaced: of 300,000 the rest would cost minutes and change no digit that counts


def _expected(text_emb: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Coefficients of what reals have, given the text: of ``pairs`` and of log s; the intercepts last."""
    from sklearn.linear_model import RidgeCV  # only here: a verdict does not wait for it

    some = slice(None, None, 1 + (len(pairs) - 1) // MOST_PAIRS)
    text, pairs = text_emb[some].astype(np.float64), pairs[some]  # few phrases: nearly singular
    mean = RidgeCV(STRENGTHS, alpha_per_target=True).fit(text, pairs)
    off = pairs[:, 0] - text @ mean.coef_[0] - mean.intercept_[0]
    log_off = np.log(np.abs(off) + LEAST_SPREAD)
    # One s for all columns, that of the cosine; one for each of 128 columns was no better. Worst local cosine
    # in the mini laboratory (validation, mean AUROC of generators): 0.705, minus E 0.872, divided by s 0.888
    spread = RidgeCV(STRENGTHS).fit(text, log_off - log_off.mean())
    intercepts = [*mean.intercept_, spread.intercept_]
    return np.vstack([np.vstack([mean.coef_, spread.coef_]).T, intercepts]).astype(np.float32)


def represent(features: Features, config: RepresentationConfig | str = "absolute") -> np.ndarray:
    """Misalignment vector of every image, as the head sees it: `Representation` for all that needs no fit.

    Returns
    -------
    float32 array, shape (n, k)
        Hierarchical: the global block first, then the pooled local blocks, or the sum of both.
    """
    return Representation(config)(features)


def cosines(features: Features) -> pd.DataFrame:
    """Three-number summary of every image, for looking at: absolute cosines.

    Returns
    -------
    DataFrame, one row per image
        ``global_cosine, worst_local_cosine, mean_local_cosine, n_objects``. An image without objects shows
        its global cosine in the local columns, see `Representation`.
    """
    numbers = represent(features, "cosines")[:, [0, 2, 1]]
    table = pd.DataFrame(numbers, columns=["global_cosine", "worst_local_cosine", "mean_local_cosine"])
    return table.assign(n_objects=np.bincount(features.owner, minlength=len(features)))
