"""Splits: which images train, choose and test. The split of an image follows from its content alone.

An image's id is the SHA-256 of its file. Hashed once more with a salt and read as a fraction it is a fair
draw that never changes: adding images moves none of the old ones, and copies of one picture stay on one side.
The salt is for data sets whose files are named by their hash: their first by name would all be of one split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.errors import InputError
from itemkit.text import count

FRACTIONS: Mapping[str, float] = {"train": 0.7, "val": 0.15, "test": 0.15}
# The splits that labelled images have -> the one that is divided, and into what. Of others none is: images
# to calibrate or to test on are never turned into images to train on.
_CARVED: dict[tuple[str, ...], tuple[str, Mapping[str, float]]] = {
    ("train",): ("train", FRACTIONS),
    ("train", "test"): ("train", {"train": 0.85, "val": 0.15}),
    ("train", "val"): ("val", {"val": 0.5, "test": 0.5}),
}


def place(image_ids: Iterable[str], salt: str = "split") -> np.ndarray:
    """Where each image stands between 0 and 1, by the SHA-256 (hex digits) of its content; float64.

    Another salt gives another draw, independent of the first.
    """

    def digits(image_id: str) -> int:
        salted = f"{salt}\0{image_id}".encode("utf-8", "surrogateescape")
        return int(hashlib.sha256(salted).hexdigest()[:13], 16)

    return np.fromiter((digits(str(i)) for i in image_ids), np.float64) / 16**13


def divide(places: np.ndarray, fractions: Mapping[str, float] = FRACTIONS) -> np.ndarray:
    """Split of each image from its `place`, an object array; ``fractions`` of the splits add up to 1."""
    ends = np.cumsum(list(fractions.values()))[:-1]
    return np.array(list(fractions), dtype=object)[np.searchsorted(ends, places, side="right")]


class Plan(NamedTuple):
    """What `fill_splits` will do, known before any file is read."""

    rows: np.ndarray  # bool: images that get a split or another one
    fractions: Mapping[str, float]  # into what they are divided
    salt: str  # of the draw: a given split may itself be one, so another is needed to divide it
    notes: list[str]  # the same in words


def plan_splits(label: pd.Series, split: pd.Series) -> Plan:
    """Say what will be divided into what, from the columns ``label`` and ``split`` of a manifest."""
    labelled, known, absent = label.notna().to_numpy(), split.isin(schema.SPLITS), split.isna().to_numpy()
    there = tuple(name for name in schema.SPLITS if (labelled & (split == name).fillna(False)).any())
    rows, fractions, salt, notes = np.zeros(len(label), dtype=bool), FRACTIONS, "split", []
    if not labelled.any():
        return Plan(rows, fractions, salt, ["no image has a label, so there is nothing to train or test on"])
    if (other := labelled & ~known.to_numpy() & ~absent).any():
        names = ", ".join(sorted(map(repr, split[other].unique()))[:5])
        fate = "are left out of training and test" if there else "are divided as if they had none"
        notes.append(f"{count(int(other.sum()), 'image')} of split {names} (none of train, val, test) {fate}")
    if not there:
        notes.append("no splits given: train 70 %, val 15 %, test 15 % by the content of each file")
        return Plan(labelled, fractions, salt, notes)
    missing = int((labelled & absent).sum())
    if there in _CARVED and label.nunique() == 2:
        source, fractions = _CARVED[there]
        rows, salt = labelled & (split == source).fillna(False).to_numpy(dtype=bool), "carve"
        new = ", ".join(f"{100 * share:.0f} % {name}" for name, share in fractions.items())
        lacking = " and ".join(name for name in schema.SPLITS if name not in there)
        notes.append(f"no image has split {lacking}: {source!r} is divided into {new} by content")
    elif there in _CARVED:
        notes.append("splits as given: with labels of one class only, none is divided")
    elif "train" in there or missing:
        notes.append("splits as given")
    else:
        notes.append(f"splits as given: only {' and '.join(there)} here, so nothing trains")
    if missing:
        notes.append(f"{count(missing, 'labelled image')} without a split beside others: filled by content")
    return Plan(rows, fractions, salt, notes)


def fill_splits(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Give every labelled image a split, and carve a val or test split that is missing.

    Splits that are given stay. With none at all, all images are divided 70 / 15 / 15 by their content. With
    labels of both classes and a train split, a missing val is carved from train and a missing test from val;
    train is never carved. An image without a split beside others that have one gets that of its copy, or one
    by its content. Images without a label get none.

    The table has the columns ``image_id`` (SHA-256 of the content), ``label``, ``split``. Gives a copy with
    ``split`` filled, and what was done in words.
    """
    plain = table.reset_index(drop=True)
    label, ids = plain[schema.LABEL], plain[schema.IMAGE_ID].astype(str)
    split = plain[schema.SPLIT].astype(object)
    plan = plan_splits(label, split)
    notes = list(plan.notes)
    split[plan.rows], moved = _draw(ids[plan.rows], label[plan.rows], plan)
    if moved:
        notes.append(f"{count(moved, 'image')} taken from neighbour splits so that each has both classes")
    empty = label.notna() & split.isna()
    if empty.any():
        copies = split.set_axis(ids).dropna()
        drawn = pd.Series(divide(place(ids[empty])), index=ids.index[empty])
        split[empty] = ids[empty].map(copies[~copies.index.duplicated()]).fillna(drawn)
    pairs = pd.DataFrame({"id": ids, "label": label}).dropna().drop_duplicates()
    if wrong := int(pairs["id"].duplicated().sum()):
        notes.append(f"{count(wrong, 'picture')} labelled both real and fake: one of the labels is wrong")
    found = split[label.notna()].value_counts()
    counts = ", ".join(f"{found[s]:,} {s}" for s in schema.SPLITS if s in found)
    filled = split.where(split.notna(), None).to_numpy()
    return table.assign(**{schema.SPLIT: filled}), "; ".join(notes) + (f" ({counts})" if counts else "")


def _draw(ids: pd.Series, label: pd.Series, plan: Plan) -> tuple[pd.Series, int]:
    """Split of each of these images, and how many pictures had to move.

    A class of three pictures or more is in every split: where the draw has left it out of one, the picture
    nearest to that split's border moves. Only so is a set of a dozen images usable; there the split of an
    image depends on the others after all.
    """
    one = pd.DataFrame({"id": ids, "label": label}).drop_duplicates("id").set_index("id")
    one["place"] = place(one.index, plan.salt)
    one["split"], moved = divide(one["place"].to_numpy(), plan.fractions), 0
    for _, mine in one.groupby("label"):
        high = 0.0
        for name, share in plan.fractions.items():
            low, high = high, high + share
            now = one.loc[mine.index, "split"]
            if len(mine) >= 3 and name not in set(now):
                distance = np.maximum(low - mine["place"], mine["place"] - high)
                one.loc[distance[now.duplicated(keep=False)].idxmin(), "split"] = name
                moved += 1
    return ids.map(one["split"]), moved


def split_validation(y: np.ndarray, fraction: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Divide validation rows into those that stop the training and those that calibrate, class by class.

    Early stopping picks the weights that look best on its images, so calibrating on the same ones would be
    optimistic and void the conformal guarantee.

    Gives the rows for selection (``fraction`` of each class) and those for calibration. Raises an
    `InputError` where a class of the labels `y` has fewer than two images.
    """
    y = np.asarray(y)
    chosen = []
    for label in (schema.REAL, schema.FAKE):
        rows = np.flatnonzero(y == label)
        if len(rows) < 2:
            there = count(len(rows), f"{schema.LABEL_NAMES[label]} validation image")
            raise InputError(f"{there}; at least 2 of each class are needed, some hundreds for thresholds")
        take = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        chosen.append(np.random.default_rng([seed, label]).permutation(rows)[:take])
    select = np.sort(np.concatenate(chosen))
    return select, np.setdiff1d(np.arange(len(y)), select)
