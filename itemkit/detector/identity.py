"""Do these features and that detector belong together? Fingerprints of models, and a hash of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from itemkit import schema
from itemkit.features import Features

# Not part of a model's identity: where it ran and with how many bits (cosine above 0.999), and what was done
# to the images before it (a perturbed image is a legitimate question).
IGNORED_LEAVES = ("device", "dtype", "precision", "batch_size")
IGNORED_PARTS = ("transform", "decode")
OBJECT_PARTS = ("parser", "localiser")
# who ignores where captions came from ignores how they were cleaned, too
ENTAILED = {"captions": ("caption_cleaning",)}


def fingerprint_differences(
    trained: dict, given: dict, ignore: Collection[str] = (), _name: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Keys in which two fingerprints differ, as ``("encoder.weights_hash", trained, given)``.

    Parameters
    ----------
    trained, given : nested dict
        ``run["fingerprint"]`` of two feature stores.
    ignore : names
        Parts ("localiser"), dotted keys ("captioner.num_beams"); device and precision are always ignored.
    """
    ignore = {*ignore, *(name for part in ignore for name in ENTAILED.get(part, ()))}
    for key in sorted({*trained, *given}, key=str):
        name = f"{_name}.{key}" if _name else str(key)
        if name in ignore or key in IGNORED_LEAVES:
            continue
        a, b = trained.get(key), given.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from fingerprint_differences(a, b, ignore, name)
        elif a != b:
            yield name, a, b


def data_hash(features: Features) -> str:
    """Hash of which images with which labels, whatever their order."""
    columns = features.table[[schema.IMAGE_ID, schema.LABEL]].astype(str)
    lines = sorted(columns[schema.IMAGE_ID] + " " + columns[schema.LABEL])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def image_keys(features: Features) -> np.ndarray:
    """Eight bytes of the hash of each image's id, uint64, shape (n,): enough to know an image again."""
    ids = features.table[schema.IMAGE_ID].astype(str)
    digests = b"".join(hashlib.sha256(one.encode()).digest()[:8] for one in ids)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def where_seen(
    features: Features, keys: Mapping[str, np.ndarray], hashes: Mapping[str, object]
) -> np.ndarray:
    """For each image "train", "val", or "" for a new one, shape (n,).

    Parameters
    ----------
    features : Features
    keys : dict
        "train", "val" -> `image_keys` of that part.
    hashes : dict
        "train_hash", "val_hash" -> `data_hash`, for a part without keys: it is known as a whole only.
    """
    where = np.full(len(features), "", dtype="<U5")
    here = image_keys(features)
    for part in ("train", "val"):
        if part in keys:
            where[np.isin(here, keys[part])] = part
        elif hashes.get(f"{part}_hash") == data_hash(features):
            where[:] = part
    return where
