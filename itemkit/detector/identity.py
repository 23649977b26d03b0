"""Do these features and that detector belong together? Fingerprints of models, and a hash of the data."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from itemkit import schema
from itemkit.errors import InputError
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


def where_seen(features: Features, keys: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each image "train", "val" or, for a new one, ""; ``keys`` has the `image_keys` of both parts."""
    where = np.full(len(features), "", dtype="<U5")
    here = image_keys(features)
    for part, known in keys.items():
        where[np.isin(here, known)] = part
    return where


def warn_of_seen(where: np.ndarray) -> None:
    """Warn if images that are evaluated had a part in making the detector; ``where`` as of `where_seen`."""
    uses = {"train": "trained this detector", "val": "stopped its training or calibrated it"}
    if known := [f"{n} {use}" for part, use in uses.items() if (n := int((where == part).sum()))]:
        warnings.warn(
            f"of the {len(where)} images evaluated here, {' and '.join(known)}: numbers on these are no test "
            "of it",
            stacklevel=3,
        )


def refuse_other_models(trained: dict | None, given: dict | None, ignore: Collection[str]) -> None:
    """Raise an InputError if two stores' fingerprints differ in more than ``ignore``, or only one has any."""
    if trained and given:
        different = list(fingerprint_differences(trained, given, ignore))
        if not different:
            return
        shown = "; ".join(f"{name} is {_short(b)}, was {_short(a)}" for name, a, b in different[:4])
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        captions = any(name == "captions" for name, *_ in different)
        source = (
            " and captions from the same source (extract --captions, detect --caption)" if captions else ""
        )
        raise InputError(
            f"these features were made otherwise than those the detector was trained on: {shown}{more}. "
            f"Extract them with the same preset{source * captions}, or train a detector on features "
            "like these"
        )
    if bool(trained) != bool(given):
        raise InputError(
            f"the {'features' if trained else 'detector'} carry no fingerprint of the models that made them, "
            "so it cannot be checked that both belong together; load the features with load_features()"
        )


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 48 else text[:45] + "..."
