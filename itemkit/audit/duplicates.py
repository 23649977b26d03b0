"""The same picture twice: exact copies by content, near copies by a perceptual hash."""

from __future__ import annotations

import numpy as np
import pandas as pd
from PIL import Image

from itemkit import schema

#: Pairs at most this far apart (of 128 bits) count as near copies. Measured on 1,450 photographs and fakes:
#: copies recompressed at JPEG 50, or scaled to a third and recompressed, lie within 9 bits in 99 % of cases.
#: Of different files one pair is as near (10 bits: one generator, one seed, two prompts), the next at 16.
NEAR_BITS = 10
_FLAT_BITS = 10  # a picture with fewer set (or unset) bits is all but empty: its hash says nothing
_COLUMNS = ("kind", "distance", "path_a", "path_b", "across_classes", "across_splits")


def dhash(image: Image.Image) -> tuple[int, int]:
    """Hash a picture by whether each of 8 x 8 places is darker than its right and its lower neighbour.

    Returns
    -------
    (int, int)
        Two 64-bit numbers, horizontal and vertical.
    """
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BILINEAR), dtype=np.int16)
    right, below = grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1] > grey[:-1, :-1]
    first, second = (int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in (right, below))
    return first, second


def find_duplicates(df: pd.DataFrame, near: bool = True, near_bits: int = NEAR_BITS) -> pd.DataFrame:
    """List pairs of images that show the same picture.

    Parameters
    ----------
    df : DataFrame
        Columns ``path, label, split, image_id, dhash_x, dhash_y``.
    near : bool
        Also compare the perceptual hashes, every image with every other: about 1 s for 10,000 images and
        2 min for 100,000.
    near_bits : int
        Largest distance of a near copy.

    Returns
    -------
    DataFrame
        ``kind`` (exact, near), ``distance`` in bits, ``path_a``, ``path_b``, and whether the pair crosses
        classes and splits. Of several equal images each is paired with the first one only.
    """
    df = df.reset_index(drop=True)
    first = df.groupby(schema.IMAGE_ID, sort=False)[schema.PATH].transform(lambda g: g.index[0])
    copies = np.flatnonzero(first.to_numpy() != np.arange(len(df)))
    pairs = [("exact", 0, int(first[i]), int(i)) for i in copies]
    if near:
        kept = np.setdiff1d(np.arange(len(df)), copies)
        hashes = df.loc[kept, ["dhash_x", "dhash_y"]].to_numpy(dtype=np.uint64)
        bits = np.bitwise_count(hashes).sum(axis=1)
        informative = (bits >= _FLAT_BITS) & (bits <= 128 - _FLAT_BITS)
        kept, hashes = kept[informative], hashes[informative]
        pairs += [("near", d, int(kept[a]), int(kept[b])) for a, b, d in _near_pairs(hashes, near_bits)]
    found = pd.DataFrame(pairs, columns=["kind", "distance", "a", "b"])
    a, b = df.loc[found["a"]].reset_index(drop=True), df.loc[found["b"]].reset_index(drop=True)
    found["path_a"], found["path_b"] = a[schema.PATH], b[schema.PATH]
    found["across_classes"] = _differ(a[schema.LABEL], b[schema.LABEL])
    found["across_splits"] = _differ(a[schema.SPLIT], b[schema.SPLIT])
    return found[list(_COLUMNS)]


def _near_pairs(hashes: np.ndarray, near_bits: int) -> list[tuple[int, int, int]]:
    pairs = []
    step = max(1, 2_000_000 // max(len(hashes), 1))  # rows at a time: 2 million distances, 16 MB
    for start in range(0, len(hashes), step):
        block, rest = hashes[start : start + step], hashes[start:]
        distance = np.bitwise_count(block[:, None, 0] ^ rest[None, :, 0])
        distance = distance + np.bitwise_count(block[:, None, 1] ^ rest[None, :, 1])
        for i, j in zip(*np.nonzero(distance <= near_bits), strict=True):
            if j > i:
                pairs.append((start + int(i), start + int(j), int(distance[i, j])))
    return pairs


def _differ(a: pd.Series, b: pd.Series) -> pd.Series:
    """Both known and not equal."""
    return (a.notna() & b.notna() & (a.astype(object) != b.astype(object))).astype(bool)
