"""Pooling: a varying number of object vectors per image becomes one vector, or a padded set for the head."""

from __future__ import annotations

import numpy as np

from itemkit.errors import InputError

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
