"""Misalignment of images and their captions: pure functions from stored embeddings to feature vectors.

The method's claim is that a generated image fits its own caption differently from a photograph, as a whole
(global) and object by object (local). Which *form* of that difference the authors feed to their head is not
public, so each form is a named option here and all of them are derived from the same stored embeddings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from itemkit.errors import InputError
from itemkit.features import IMAGE_NORMS, OBJECT_NORMS, Features

FIXED = ("mean", "worst", "mean_worst", "top_k", "soft_worst")
LEARNED = ("attention", "deep_set")
POOLINGS = (*FIXED, *LEARNED)


def pool(
    local: np.ndarray,
    owner: np.ndarray,
    n_images: int,
    how: str = "mean_worst",
    *,
    cosine: np.ndarray,
    top_k: int = 3,
    temperature: float = 0.05,
    max_objects: int = 8,
) -> np.ndarray:
    """Turn a varying number of object vectors per image into one vector per image.

    Parameters
    ----------
    local : float array, shape (m, k)
        One vector per semantic object.
    owner : int array, shape (m,)
        Image to which each object belongs; any order.
    n_images : int
        Images; those without objects get zeros, and a mask of zeros.
    how : str
        - ``"mean"``: average; one bad object among many is diluted. Ours; what a reader would try first.
        - ``"worst"``: the object with the lowest cosine; one bad object is enough, and so is one bad box. The
          max pooling of multiple-instance learning (one positive instance makes the bag positive).
        - ``"mean_worst"``: both side by side. Ours, the default.
        - ``"top_k"``: the ``top_k`` lowest cosines, lowest first, zero padded; a later MLP sees each of them.
          Ours.
        - ``"soft_worst"``: average weighted by softmax(-cosine / temperature), between mean and worst,
          without parameters. Ours.
        - ``"attention"``: nothing is pooled here. The objects are kept as a padded set with its mask, and the
          head learns their weights: softmax of w tanh(V x), Ilse et al. 2018 (arXiv 1802.04712).
        - ``"deep_set"``: kept likewise; the head learns a layer that every object passes before they are
          averaged, Zaheer et al. 2017 (arXiv 1703.06114).
    cosine : float array, shape (m,)
        Cosine of each object's region and phrase: the order for all rules but the mean.
    top_k, temperature, max_objects
        See `RepresentationConfig`.

    Returns
    -------
    float32 array
        Shape (n_images, k); (n_images, 2 k) for "mean_worst"; (n_images, top_k * k) for "top_k"; and
        (n_images, max_objects * k + max_objects) for the learned ones: the objects, least aligned first, then
        ones and zeros for which of them are there.
    """
    local, owner, cosine = (
        np.asarray(local, np.float32),
        np.asarray(owner, np.int64),
        np.asarray(cosine, np.float32),
    )
    if local.ndim != 2 or not len(local) == len(owner) == len(cosine):
        raise InputError(
            f"local has shape {local.shape}, owner {owner.shape}, cosine {cosine.shape}; "
            "expected one row, one owner and one cosine per object"
        )
    if len(owner) and not 0 <= owner.min() <= owner.max() < n_images:
        raise InputError(f"owner runs from {owner.min()} to {owner.max()}; expected 0 to {n_images - 1}")
    # by image, least aligned object first; equal cosines keep their order, so results do not depend on luck
    order = np.lexsort((cosine, owner))
    local, owner, cosine = local[order], owner[order], cosine[order]
    counts = np.bincount(owner, minlength=n_images)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    filled = np.flatnonzero(counts)

    def weighted(weights: np.ndarray) -> np.ndarray:
        out = np.zeros((n_images, local.shape[1]), np.float32)
        if len(filled):
            out[filled] = np.add.reduceat(local * weights[:, None], starts[filled], axis=0)
        return out

    def first(slots: int) -> np.ndarray:
        out = np.zeros((n_images, slots, local.shape[1]), np.float32)
        rank = np.arange(len(owner)) - starts[owner]
        kept = rank < slots
        out[owner[kept], rank[kept]] = local[kept]
        return out.reshape(n_images, -1)

    if how == "mean":
        return weighted(1 / counts[owner].astype(np.float32))
    if how == "worst":
        return first(1)
    if how == "mean_worst":
        return np.concatenate([weighted(1 / counts[owner].astype(np.float32)), first(1)], axis=1)
    if how == "top_k":
        return first(top_k)
    if how == "soft_worst":
        worst = cosine[starts[owner]] if len(owner) else cosine
        weight = np.exp((worst - cosine) / temperature)  # largest weight 1: no overflow
        total = np.bincount(owner, weight, minlength=n_images)
        return weighted((weight / total[owner]).astype(np.float32))
    if how in LEARNED:
        mask = np.arange(max_objects) < counts[:, None]
        return np.concatenate([first(max_objects), mask.astype(np.float32)], axis=1)
    raise InputError(f"pooling={how!r}: expected one of {', '.join(POOLINGS)}")


KINDS = ("cosine", "difference", "absolute", "product", "concat")
LEVELS = ("global", "local", "hierarchical")
SCALES = ("normalised", "raw")
EMPTY_RULES = ("global", "zero", "raise")

IMAGE_ARRAYS = ("image_emb", "caption_emb", "pixels", *IMAGE_NORMS)
OBJECT_ARRAYS = ("region_emb", "phrase_emb", *OBJECT_NORMS)

NORM_TOLERANCE = 1e-3  # float16 storage moves a norm by less than 5e-4


@dataclass(frozen=True)
class RepresentationConfig:
    """Which misalignment vector the head is given.

    Attributes
    ----------
    level : {"hierarchical", "global", "local"}
        The whole image against its caption, its regions against their phrases, or both side by side. The
        paper's abstract (Zhang et al. 2025, arXiv 2511.00427) describes the hierarchical one.
    kind : {"absolute", "cosine", "difference", "product", "concat"}
        Form of one pair's misalignment, see `misalign`. The paper's form is unknown; the default is our
        choice.
    pooling : {"mean_worst", "mean", "worst", "top_k", "soft_worst", "attention", "deep_set"}
        How a varying number of objects becomes one vector, see `pool`. Our choice as well. The last two are
        learned: the head does it, given `head_options`.
    top_k : int
        Objects kept by pooling "top_k", least aligned first.
    temperature : float
        Cosine units; small values approach "worst", large ones "mean". Used by pooling "soft_worst".
    max_objects : int
        Places for objects in a learned pooling; an image with more keeps its least aligned ones. As many as a
        parser keeps by default.
    scale : {"normalised", "raw"}
        Unit vectors, as CLIP compares them and the abstract's "joint space" suggests; or the embeddings with
        the lengths the encoder gave them, as DE-FAKE feeds them. Length is no part of any alignment, but may
        tell a generator; needs a store that kept the lengths.
    empty : {"global", "zero", "raise"}
        Rule for an image whose caption names no object. "global" treats the whole image and its caption as
        the only object, so the local part says nothing new and stays in the range of its neighbours; "zero"
        writes zeros (for a cosine that is a *strong* misalignment) and an empty set for a learned pooling;
        "raise" refuses.
    """

    level: str = "hierarchical"
    kind: str = "absolute"
    pooling: str = "mean_worst"
    top_k: int = 3
    temperature: float = 0.05
    max_objects: int = 8
    scale: str = "normalised"
    empty: str = "global"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("level", LEVELS),
            ("kind", KINDS),
            ("pooling", POOLINGS),
            ("scale", SCALES),
            ("empty", EMPTY_RULES),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name in ("top_k", "temperature", "max_objects"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)}: expected a positive number")

    @property
    def uses_objects(self) -> bool:
        """Whether the vector depends on the semantic objects at all."""
        return self.level != "global"

    def _pair_width(self, dim: int) -> int:
        return {"cosine": 1, "concat": 2 * dim}.get(self.kind, dim)

    def width(self, dim: int) -> int:
        """Length of the vector for embeddings of width ``dim``."""
        one = self._pair_width(dim)
        local = one * {"mean_worst": 2, "top_k": self.top_k}.get(self.pooling, 1)
        if self.pooling in LEARNED:
            local = self.max_objects * (one + 1)
        return {"global": one, "local": local, "hierarchical": one + local}[self.level]

    def head_options(self, dim: int) -> dict[str, Any]:
        """Parameters by which a `MisalignmentMLP` finds the objects in this vector.

        Parameters
        ----------
        dim : int
            Width of the embeddings.

        Returns
        -------
        dict
            ``pooling`` and ``slots`` for ``head.set_params``; both None where nothing is left to be pooled.
        """
        if not (self.uses_objects and self.pooling in LEARNED):
            return {"pooling": None, "slots": None}
        return {"pooling": self.pooling, "slots": (self.max_objects, self._pair_width(dim))}

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> RepresentationConfig:
        """Inverse of `to_dict`; unknown keys are an error."""
        data = dict(data)
        if "attention_temperature" in data:  # of detectors saved before the learned poolings
            data["temperature"] = data.pop("attention_temperature")
            if data.get("pooling") == "attention":
                data["pooling"] = "soft_worst"
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise InputError(
                f"unknown representation option {unknown[0]!r}; expected {', '.join(sorted(known))}"
            )
        return cls(**data)


#: Named representations, used by notebooks, the command line and the study. "cosines" is three numbers:
#: global, mean local, worst local. The hierarchical ones come first and go by their kind alone.
REPRESENTATIONS: dict[str, RepresentationConfig] = {
    "absolute": RepresentationConfig(),
    "cosines": RepresentationConfig(kind="cosine"),
    "difference": RepresentationConfig(kind="difference"),
    "product": RepresentationConfig(kind="product"),
    "concat": RepresentationConfig(kind="concat"),
    **{f"global_{kind}": RepresentationConfig(level="global", kind=kind) for kind in KINDS},
    **{f"local_{kind}": RepresentationConfig(level="local", kind=kind) for kind in KINDS},
    "attention": RepresentationConfig(pooling="attention"),
    "deep_set": RepresentationConfig(pooling="deep_set"),
    # what DE-FAKE's head reads: both embeddings with their lengths; Robust-CLIP reads "global_concat"
    "defake": RepresentationConfig(level="global", kind="concat", scale="raw"),
}


def get_representation(name: str | RepresentationConfig) -> RepresentationConfig:
    """Look a representation up by its name in `REPRESENTATIONS`; a configuration is returned as it is."""
    if isinstance(name, RepresentationConfig):
        return name
    if name not in REPRESENTATIONS:
        raise InputError(f"unknown representation {name!r}; expected one of {', '.join(REPRESENTATIONS)}")
    return REPRESENTATIONS[name]


def _check_pair(image_emb: np.ndarray, text_emb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    return image_emb, text_emb


def misalign(
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    kind: str = "absolute",
    image_norm: np.ndarray | None = None,
    text_norm: np.ndarray | None = None,
) -> np.ndarray:
    """Misalignment of each image (or region) and its text in the joint space.

    Parameters
    ----------
    image_emb, text_emb : float array, shape (n, d)
        L2-normalised; row i of both is pair i. Whole images with captions give the global misalignment,
        regions with phrases the local one.
    kind : str
        - ``"cosine"``: one number, the cosine similarity (1 = aligned). All that a retrieval metric sees:
          CLIPScore (Hessel et al. 2021, arXiv 2104.08718).
        - ``"difference"``: image minus text, signed. Keeps the direction, thus some of the content. Ours.
        - ``"absolute"``: its absolute value. Forgets the sign, so less of the content and of the generator's
          style leaks through. Together with the product it is how InferSent compares two sentences (Conneau
          et al. 2017, arXiv 1705.02364).
        - ``"product"``: element-wise; its sum is the cosine, so the head learns a weighted cosine. InferSent.
        - ``"concat"``: image and text side by side, as DE-FAKE (Sha et al. 2023) and Robust-CLIP
          (arXiv 2404.12908) do. The head must find the misalignment itself and also sees everything else.
    image_norm, text_norm : float array, shape (n,), optional
        Lengths that the encoder gave the embeddings. With them both sides get their lengths back before they
        are compared; "cosine" is then the inner product.

    Returns
    -------
    float32 array, shape (n, 1), (n, d) or (n, 2 d).

    Raises
    ------
    InputError
        Shapes differ, or a row's norm is off 1 by more than 1e-3.

    References
    ----------
    Zhang et al. 2025 (arXiv 2511.00427), abstract: misalignment "in pre-trained CLIP's joint space". The form
    is not stated there; every kind is our reading.
    """
    a, b = _check_pair(image_emb, text_emb)
    if image_norm is not None and text_norm is not None:
        a, b = (emb * np.asarray(n, np.float32)[:, None] for emb, n in ((a, image_norm), (b, text_norm)))
    if kind == "cosine":
        return np.einsum("ij,ij->i", a, b)[:, None]
    if kind == "difference":
        return a - b
    if kind == "absolute":
        return np.abs(a - b)
    if kind == "product":
        return a * b
    if kind == "concat":
        return np.concatenate([a, b], axis=1)
    raise InputError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")


def represent(features: Features, config: RepresentationConfig | str = "absolute") -> np.ndarray:
    """Misalignment vector of every image, as the head sees it.

    Parameters
    ----------
    features : Features
        Raw embeddings; see `itemkit.features`.
    config : RepresentationConfig or name
        Level, kind, pooling and the rule for images without objects.

    Returns
    -------
    float32 array, shape (n, config.width(d))
        Hierarchical: the global block first, then the pooled local blocks. For a learned pooling the padded
        objects, their mask, then the global block; see `RepresentationConfig.head_options`.
    """
    config = get_representation(config)
    raw = config.scale == "raw"
    lengths = _lengths(features, "image_norm", "caption_norm") if raw else (None, None)
    whole = misalign(features.image_emb, features.caption_emb, config.kind, *lengths)
    if not config.uses_objects:
        return whole
    raw = raw and len(features.owner) > 0  # without any object there is no length to be asked for
    lengths = _lengths(features, "region_norm", "phrase_norm") if raw else (None, None)
    local = misalign(features.region_emb, features.phrase_emb, config.kind, *lengths)
    cosine = np.einsum("ij,ij->i", features.region_emb, features.phrase_emb)
    owner = np.asarray(features.owner, np.int64)
    empty = np.flatnonzero(np.bincount(owner, minlength=len(features)) == 0)
    if len(empty) and config.empty == "raise":
        raise InputError(
            f"{len(empty)} of {len(features)} images have no semantic object, the first is row {empty[0]} "
            f'({features.table.iloc[empty[0]].get("path", "")}); choose empty="global" or "zero"'
        )
    if len(empty) and config.empty == "global":
        local = np.concatenate([local, whole[empty]])
        whole_cosine = np.einsum("ij,ij->i", features.image_emb[empty], features.caption_emb[empty])
        cosine, owner = np.concatenate([cosine, whole_cosine]), np.concatenate([owner, empty])
    pooled = pool(
        local,
        owner,
        len(features),
        config.pooling,
        cosine=cosine,
        top_k=config.top_k,
        temperature=config.temperature,
        max_objects=config.max_objects,
    )
    if config.level == "local":
        return pooled
    # objects that the head shall pool come first, where it looks for them whatever stands behind
    blocks = (pooled, whole) if config.pooling in LEARNED else (whole, pooled)
    return np.ascontiguousarray(np.concatenate(blocks, axis=1))


def _lengths(features: Features, *names: str) -> tuple[np.ndarray, ...]:
    found = tuple(getattr(features, name) for name in names)
    for name, values in zip(names, found, strict=True):
        if values is None or np.isnan(values).any():
            raise InputError(
                f"these features have no {name} for {'all' if values is None else 'some'} embeddings, which "
                'scale="raw" needs; extract the images again (stores before 0.2 kept unit vectors only), or '
                'use scale="normalised"'
            )
    return found


def cosines(features: Features) -> pd.DataFrame:
    """Three-number summary of every image, for looking at.

    Returns
    -------
    DataFrame, one row per image in the order of ``features``
        ``global_cosine, worst_local_cosine, mean_local_cosine, n_objects``. An image without objects shows
        its global cosine in the local columns (the rule ``empty="global"``) and ``n_objects`` 0.
    """
    numbers = represent(features, "cosines")  # global, mean local, worst local
    return pd.DataFrame(
        {
            "global_cosine": numbers[:, 0],
            "worst_local_cosine": numbers[:, 2],
            "mean_local_cosine": numbers[:, 1],
            "n_objects": np.bincount(features.owner, minlength=len(features)),
        }
    )


def leave_one_out(one: Features) -> Features:
    """One image with m objects -> m copies of it, copy i without object i."""
    m = len(one.owner)
    copy, item = np.nonzero(~np.eye(m, dtype=bool))

    def repeated(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values.repeat(m, axis=0)

    def without(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[item]

    per_image: dict[str, Any] = {name: repeated(getattr(one, name)) for name in IMAGE_ARRAYS}
    per_object: dict[str, Any] = {name: without(getattr(one, name)) for name in OBJECT_ARRAYS}
    return replace(
        one,
        table=one.table.iloc[[0] * m].reset_index(drop=True),
        owner=copy.astype(np.int64),
        objects=one.objects.iloc[item].reset_index(drop=True),
        **per_image,
        **per_object,
    )
