"""Misalignment of images and their captions: pure functions from stored embeddings to feature vectors.

The method's claim is that a generated image fits its own caption differently from a photograph, as a whole
(global) and object by object (local). Which *form* of that difference the authors feed to their head is not
public, so each form is a named option here and all of them are derived from the same stored embeddings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np
import pandas as pd

from itemkit.errors import InputError
from itemkit.features import Features

KINDS = ("cosine", "difference", "absolute", "product", "concat")
LEVELS = ("global", "local", "hierarchical")
POOLINGS = ("mean", "worst", "mean_worst", "top_k", "attention")
EMPTY_RULES = ("global", "zero", "raise")

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
    pooling : {"mean_worst", "mean", "worst", "top_k", "attention"}
        How a varying number of objects becomes one vector, see `pool`. Our choice as well.
    top_k : int
        Objects kept by pooling "top_k", least aligned first.
    attention_temperature : float
        Cosine units; small values approach "worst", large ones "mean". Used by pooling "attention".
    empty : {"global", "zero", "raise"}
        Rule for an image whose caption names no object. "global" treats the whole image and its caption as
        the only object, so the local part says nothing new and stays in the range of its neighbours; "zero"
        writes zeros (for a cosine that is a *strong* misalignment); "raise" refuses.
    """

    level: str = "hierarchical"
    kind: str = "absolute"
    pooling: str = "mean_worst"
    top_k: int = 3
    attention_temperature: float = 0.05
    empty: str = "global"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("level", LEVELS),
            ("kind", KINDS),
            ("pooling", POOLINGS),
            ("empty", EMPTY_RULES),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.top_k < 1 or self.attention_temperature <= 0:
            raise InputError(
                f"top_k={self.top_k} and attention_temperature={self.attention_temperature} must be positive"
            )

    @property
    def uses_objects(self) -> bool:
        """Whether the vector depends on the semantic objects at all."""
        return self.level != "global"

    def width(self, dim: int) -> int:
        """Length of the vector for embeddings of width ``dim``."""
        one = {"cosine": 1, "concat": 2 * dim}.get(self.kind, dim)
        slots = {"mean_worst": 2, "top_k": self.top_k}.get(self.pooling, 1)
        return one * {"global": 1, "local": slots, "hierarchical": 1 + slots}[self.level]

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> RepresentationConfig:
        """Inverse of `to_dict`; unknown keys are an error."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise InputError(
                f"unknown representation option {unknown[0]!r}; expected {', '.join(sorted(known))}"
            )
        return cls(**data)


#: Named representations, used by notebooks, the command line and the study.
REPRESENTATIONS: dict[str, RepresentationConfig] = {
    "absolute": RepresentationConfig(),
    "cosines": RepresentationConfig(kind="cosine"),  # three numbers: global, mean local, worst local
    "difference": RepresentationConfig(kind="difference"),
    "product": RepresentationConfig(kind="product"),
    "concat": RepresentationConfig(kind="concat"),
    "global_absolute": RepresentationConfig(level="global"),
    "global_cosine": RepresentationConfig(level="global", kind="cosine"),
    "global_concat": RepresentationConfig(level="global", kind="concat"),  # DE-FAKE's and Robust-CLIP's input
    "local_absolute": RepresentationConfig(level="local"),
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


def misalign(image_emb: np.ndarray, text_emb: np.ndarray, kind: str = "absolute") -> np.ndarray:
    """Misalignment of each image (or region) and its text in the joint space.

    Parameters
    ----------
    image_emb, text_emb : float array, shape (n, d)
        L2-normalised; row i of both is pair i. Whole images with captions give the global misalignment,
        regions with phrases the local one.
    kind : str
        - ``"cosine"``: one number, the cosine similarity (1 = aligned). All that a retrieval metric sees.
        - ``"difference"``: image minus text, signed. Keeps the direction, thus some of the content.
        - ``"absolute"``: its absolute value. Forgets the sign, so less of the content and of the generator's
          style leaks through: in our mini laboratory it travels best to unseen generators.
        - ``"product"``: element-wise; its sum is the cosine, so the head learns a weighted cosine.
        - ``"concat"``: image and text side by side, as DE-FAKE (Sha et al. 2023) and Robust-CLIP
          (arXiv 2404.12908) do. The head must find the misalignment itself and also sees everything else.

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


def pool(
    local: np.ndarray,
    owner: np.ndarray,
    n_images: int,
    how: str = "mean_worst",
    *,
    cosine: np.ndarray,
    top_k: int = 3,
    attention_temperature: float = 0.05,
) -> np.ndarray:
    """Turn a varying number of object vectors per image into one vector per image.

    Parameters
    ----------
    local : float array, shape (m, k)
        One vector per semantic object.
    owner : int array, shape (m,)
        Image to which each object belongs; any order.
    n_images : int
        Images; those without objects get zeros.
    how : str
        - ``"mean"``: average; one bad object among many is diluted.
        - ``"worst"``: the object with the lowest cosine; one bad object is enough, and so is one bad box.
        - ``"mean_worst"``: both side by side.
        - ``"top_k"``: the ``top_k`` lowest cosines, lowest first, zero padded; a later MLP sees each of them.
        - ``"attention"``: average weighted by softmax(-cosine / temperature), a soft "worst" without
          parameters.
    cosine : float array, shape (m,)
        Cosine of each object's region and phrase: the order for all rules but the mean.
    top_k, attention_temperature
        See `RepresentationConfig`.

    Returns
    -------
    float32 array, shape (n_images, k), (n_images, 2 k) or (n_images, top_k * k).
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

    def nth(rank: int) -> np.ndarray:
        out = np.zeros((n_images, local.shape[1]), np.float32)
        has = np.flatnonzero(counts > rank)
        out[has] = local[starts[has] + rank]
        return out

    if how == "mean":
        return weighted(1 / counts[owner].astype(np.float32))
    if how == "worst":
        return nth(0)
    if how == "mean_worst":
        return np.concatenate([weighted(1 / counts[owner].astype(np.float32)), nth(0)], axis=1)
    if how == "top_k":
        return np.concatenate([nth(rank) for rank in range(top_k)], axis=1)
    if how == "attention":
        worst = cosine[starts[owner]] if len(owner) else cosine
        weight = np.exp((worst - cosine) / attention_temperature)  # largest weight 1: no overflow
        total = np.bincount(owner, weight, minlength=n_images)
        return weighted((weight / total[owner]).astype(np.float32))
    raise InputError(f"pooling={how!r}: expected one of {', '.join(POOLINGS)}")


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
        Hierarchical: the global block first, then the pooled local blocks.
    """
    config = get_representation(config)
    blocks = []
    whole = misalign(features.image_emb, features.caption_emb, config.kind)
    if config.level != "local":
        blocks.append(whole)
    if config.uses_objects:
        local = misalign(features.region_emb, features.phrase_emb, config.kind)
        cosine = np.einsum("ij,ij->i", features.region_emb, features.phrase_emb)
        owner = np.asarray(features.owner, np.int64)
        empty = np.flatnonzero(np.bincount(owner, minlength=len(features)) == 0)
        if len(empty) and config.empty == "raise":
            raise InputError(
                f"{len(empty)} of {len(features)} images have no semantic object, the first is row "
                f"{empty[0]} "
                f'({features.table.iloc[empty[0]].get("path", "")}); choose empty="global" or "zero"'
            )
        if len(empty) and config.empty == "global":
            local = np.concatenate([local, whole[empty]])
            whole_cosine = np.einsum("ij,ij->i", features.image_emb[empty], features.caption_emb[empty])
            cosine, owner = np.concatenate([cosine, whole_cosine]), np.concatenate([owner, empty])
        blocks.append(
            pool(
                local,
                owner,
                len(features),
                config.pooling,
                cosine=cosine,
                top_k=config.top_k,
                attention_temperature=config.attention_temperature,
            )
        )
    return np.ascontiguousarray(np.concatenate(blocks, axis=1))


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
    return Features(
        table=one.table.iloc[[0] * m].reset_index(drop=True),
        image_emb=one.image_emb.repeat(m, axis=0),
        caption_emb=one.caption_emb.repeat(m, axis=0),
        region_emb=one.region_emb[item],
        phrase_emb=one.phrase_emb[item],
        owner=copy.astype(np.int64),
        objects=one.objects.iloc[item].reset_index(drop=True),
        run=one.run,
    )
