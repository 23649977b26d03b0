"""Misalignment of images and their captions: pure functions from stored embeddings to feature vectors.

The method's claim is that a generated image fits its own caption differently from a photograph, as a whole
(global) and object by object (local). Which *form* of that difference the authors give to their head is not
public, so `FORMS` has several, and all of them start from the same stored embeddings::

    image and caption, region and phrase --misalign--> one vector for each pair
    the vectors of an image's objects --pool--> one local vector
    global vector | local vector --> what the head sees (represent)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.text import did_you_mean

NORM_TOLERANCE = 1e-3  # float16 storage moves a norm by less than 5e-4

# One pair of embeddings, one vector. a: images or regions, b: captions or phrases, both (n, d), row by row.
FORMS = {
    # a . b, 1 = aligned: all that a retrieval metric sees, CLIPScore (Hessel et al. 2021, arXiv 2104.08718)
    "cosine": lambda a, b: np.einsum("ij,ij->i", a, b)[:, None],
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
        Of each object's region and phrase.

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


LEVELS = ("global", "local", "hierarchical")


@dataclass(frozen=True)
class RepresentationConfig:
    """Which misalignment vector the head is given.

    The paper's abstract (Zhang et al. 2025, arXiv 2511.00427) describes the hierarchical one, and no form.
    """

    level: str = "hierarchical"  # out of LEVELS
    kind: str = "absolute"  # of one pair's misalignment, out of FORMS; our choice
    pooling: str = "mean_worst"  # of a varying number of objects, out of POOLINGS; our choice

    def __post_init__(self) -> None:
        for name, allowed in (("level", LEVELS), ("kind", KINDS), ("pooling", POOLINGS)):
            if getattr(self, name) not in tuple(allowed):
                raise InputError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)


#: Named representations. The hierarchical ones go by their kind alone; "cosines" is three numbers: global,
#: mean local, worst local.
REPRESENTATIONS: dict[str, RepresentationConfig] = {
    "absolute": RepresentationConfig(),
    "cosines": RepresentationConfig(kind="cosine"),
    "difference": RepresentationConfig(kind="difference"),
    "product": RepresentationConfig(kind="product"),
    "concat": RepresentationConfig(kind="concat"),
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


def represent(features: Features, config: RepresentationConfig | str = "absolute") -> np.ndarray:
    """Misalignment vector of every image, as the head sees it.

    An image whose caption names no object counts as its own only object (our rule): the local part then says
    nothing new and stays in the range of its neighbours, where zeros would be a strong misalignment.

    Returns
    -------
    float32 array, shape (n, k)
        Hierarchical: the global block first, then the pooled local blocks.
    """
    config = get_representation(config)
    whole = misalign(features.image_emb, features.caption_emb, config.kind)
    if config.level == "global":
        return whole
    empty = np.flatnonzero(np.bincount(features.owner, minlength=len(features)) == 0)
    pairs = (
        np.concatenate([features.region_emb, features.image_emb[empty]]),
        np.concatenate([features.phrase_emb, features.caption_emb[empty]]),
    )
    pooled = pool(
        misalign(*pairs, config.kind),
        np.concatenate([features.owner, empty]),
        len(features),
        config.pooling,
        cosine=misalign(*pairs, "cosine")[:, 0],
    )
    return pooled if config.level == "local" else np.concatenate([whole, pooled], axis=1)


def cosines(features: Features) -> pd.DataFrame:
    """Three-number summary of every image, for looking at.

    Returns
    -------
    DataFrame, one row per image
        ``global_cosine, worst_local_cosine, mean_local_cosine, n_objects``. An image without objects shows
        its global cosine in the local columns, see `represent`.
    """
    numbers = represent(features, "cosines")[:, [0, 2, 1]]
    table = pd.DataFrame(numbers, columns=["global_cosine", "worst_local_cosine", "mean_local_cosine"])
    return table.assign(n_objects=np.bincount(features.owner, minlength=len(features)))
