"""Do these features and that detector belong together? Fingerprints of models, and a hash of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

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
