"""Splits: which images train, choose and test. The split of an image follows from its content alone.

An image's id is the SHA-256 of its file, so its first digits, read as a fraction, are a fair draw that never
changes: adding images moves none of the old ones, and copies of one picture stay on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.errors import InputError
from itemkit.text import count

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}
_HALF = {"val": 0.5, "test": 0.5}
_MOST = {"train": 0.85, "val": 0.15}
# the splits that labelled images have -> the one that is divided (None: nothing is), and into what
_CARVED: dict[frozenset[str], tuple[str, Mapping[str, float]] | None] = {
    frozenset(("train", "val", "test")): None,
    frozenset(("train", "test")): ("train", _MOST),
    frozenset(("train", "val")): ("val", _HALF),
    frozenset(("val", "test")): ("val", {"train": 0.7, "val": 0.3}),
    frozenset(("train",)): ("train", FRACTIONS),
    frozenset(("val",)): ("val", FRACTIONS),
    frozenset(("test",)): None,
}


def place(image_ids: Iterable[str], salt: str = "") -> np.ndarray:
    """Where each image stands between 0 and 1, by its content.

    Parameters
    ----------
    image_ids : iterable of str
        SHA-256 of the files, as hex digits; anything else is hashed first.
    salt : str
        Another salt gives another draw, independent of the first.

    Returns
    -------
    float64 array, each in [0, 1)
    """

    def digits(image_id: str) -> int:
        if salt or len(image_id) != 64:
            image_id = hashlib.sha256(f"{salt}\0{image_id}".encode("utf-8", "surrogateescape")).hexdigest()
        return int(image_id[:13], 16)

    return np.fromiter((digits(str(i)) for i in image_ids), np.float64) / 16**13


def by_content(
    image_ids: Iterable[str], fractions: Mapping[str, float] = FRACTIONS, salt: str = ""
) -> np.ndarray:
    """Split of each image from its content alone.

    Parameters
    ----------
    image_ids : iterable of str
        See `place`.
    fractions : mapping
        Share of each split; they add up to 1. The shares hold on average: with 1,000 images to about 1 %.
    salt : str
        See `place`.

    Returns
    -------
    object array of str
    """
    if set(fractions) - set(schema.SPLITS) or abs(sum(fractions.values()) - 1) > 1e-6:
        known = ", ".join(schema.SPLITS)
        raise InputError(f"fractions are {dict(fractions)}; give shares of {known} that add up to 1")
    return _divide(place(image_ids, salt), fractions)


def _divide(places: np.ndarray, fractions: Mapping[str, float]) -> np.ndarray:
    ends = np.cumsum(list(fractions.values()))[:-1]
    return np.array(list(fractions), dtype=object)[np.searchsorted(ends, places, side="right")]


@dataclass(frozen=True)
class Plan:
    """What `fill_splits` will do, known before any file is read.

    Attributes
    ----------
    rows : bool array
        Images that get a split or another one.
    fractions : mapping
        Into what they are divided; empty if they are not.
    salt : str
        Of the draw.
    notes : list of str
        The same in words.
    """

    rows: np.ndarray
    fractions: Mapping[str, float]
    salt: str
    notes: list[str]


def plan_splits(label: pd.Series, split: pd.Series) -> Plan:
    """Say what will be divided into what, from the labels and splits that a table has.

    Parameters
    ----------
    label, split : Series
        Columns of a manifest.

    Returns
    -------
    Plan
    """
    labelled = label.notna().to_numpy(dtype=bool)
    given = split.where(split.notna(), None).to_numpy(dtype=object)
    known = np.isin(given.astype(str), schema.SPLITS)
    there = {str(s) for s in given[labelled & known]}
    none = np.zeros(len(given), dtype=bool)
    if not labelled.any():
        return Plan(none, {}, "", ["no image has a label, so there is nothing to train or test on"])
    other = labelled & ~known & (given != None)  # noqa: E711 - element by element
    notes = []
    if other.any():
        names = ", ".join(sorted({repr(s) for s in given[other]})[:5])
        fate = "are left out of training and test" if there else "are divided as if they had none"
        notes.append(f"{count(int(other.sum()), 'image')} of split {names} (none of train, val, test) {fate}")
    if not there:
        notes.append("no splits given: train 70 %, val 15 %, test 15 % by the content of each file")
        return Plan(labelled, FRACTIONS, "", notes)
    carve = _CARVED[frozenset(there)]
    missing = labelled & ~known & ~other
    if carve is None:
        only = "; all labelled images are of split 'test': nothing here to train on"
        notes.append("splits as given" + only * (len(there) == 1))
        rows: np.ndarray = none
        fractions: Mapping[str, float] = {}
    else:
        source, fractions = carve
        new = [f"{share:.0%} {name}".replace("%", " %") for name, share in fractions.items()]
        absent = " and ".join(s for s in schema.SPLITS if s not in there)
        notes.append(f"no image has split {absent}: {source!r} is divided into {', '.join(new)} by content")
        rows = labelled & (given == source)
    if missing.any():
        n = count(int(missing.sum()), "labelled image")
        notes.append(f"{n} without a split beside others with one: filled by content (70 / 15 / 15 %)")
    return Plan(rows, fractions, "carve", notes)


def fill_splits(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Give every labelled image a split, and carve one that is missing.

    Splits that are given stay. With none at all, all images are divided 70 / 15 / 15 by their content; of two
    of the three, the third is carved (val from train, test from val, train from val); an image without a
    split beside others that have one gets that of its copy, or one by its content. Images without a label get
    none.

    Parameters
    ----------
    table : DataFrame
        Columns ``image_id`` (SHA-256 of the content), ``label``, ``split``.

    Returns
    -------
    table : DataFrame
        A copy with ``split`` filled.
    note : str
        What was done, in words.
    """
    label, ids = table[schema.LABEL], table[schema.IMAGE_ID].astype(str)
    plan = plan_splits(label, table[schema.SPLIT])
    split = table[schema.SPLIT].where(table[schema.SPLIT].notna(), None).to_numpy(dtype=object).copy()
    notes = list(plan.notes)
    if plan.rows.any():
        places = place(ids[plan.rows], plan.salt)
        split[plan.rows] = _divide(places, plan.fractions)
        moved = _complete(split, label, ids, plan, places)
        if moved:
            what = "was taken from its neighbour split" if moved == 1 else "were taken from neighbour splits"
            notes.append(f"{count(moved, 'image')} {what} so that each split has both classes")
    empty = label.notna().to_numpy(dtype=bool) & (split == None)  # noqa: E711
    if empty.any():
        known = pd.Series(split, index=ids)[~(split == None)]  # noqa: E711
        copies = ids[empty].map(known[~known.index.duplicated()])
        split[empty] = copies.where(copies.notna(), by_content(ids[empty])).to_numpy()
    pairs = pd.DataFrame({"id": ids, "label": label}).dropna().drop_duplicates()
    if n := int(pairs["id"].duplicated().sum()):
        notes.append(f"{count(n, 'picture')} labelled both real and fake: one of the labels is wrong")
    found = pd.Series(split)[label.notna().to_numpy()].value_counts()
    counts = ", ".join(f"{int(found[s]):,} {s}" for s in schema.SPLITS if s in found)
    return table.assign(**{schema.SPLIT: split}), "; ".join(notes) + (f" ({counts})" if counts else "")


def _complete(split: np.ndarray, label: pd.Series, ids: pd.Series, plan: Plan, places: np.ndarray) -> int:
    """Where a carved split lacks a class of which there are three images, move the one nearest to its border.

    Only so is a set of a dozen images usable; there the split of an image depends on the others after all.
    """
    ends = np.cumsum(list(plan.fractions.values()))
    parts = zip(plan.fractions.items(), ends, strict=True)
    spans = {name: (end - share, end) for (name, share), end in parts}
    rows, moved = np.flatnonzero(plan.rows), 0
    classes = label.to_numpy(dtype=np.float64, na_value=np.nan)[rows]
    for value in (schema.REAL, schema.FAKE):
        mine = classes == value
        if len(set(ids.iloc[rows[mine]])) < 3 or mine.sum() > 1000:  # hash draws never miss a large class
            continue
        for name, (low, high) in spans.items():
            here = split[rows]
            if (mine & (here == name)).any():
                continue
            distance = np.maximum(np.maximum(low - places, places - high), 0)
            spare = [s for s in spans if len(set(ids.iloc[rows[mine & (here == s)]])) > 1]
            able = mine & np.isin(here.astype(str), spare)
            if able.any():
                nearest = np.flatnonzero(able)[distance[able].argmin()]
                split[rows[ids.iloc[rows].to_numpy() == ids.iloc[rows[nearest]]]] = name
                moved += 1
    return moved


def split_validation(y: np.ndarray, fraction: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Divide validation rows into those that stop the training and those that calibrate, class by class.

    Early stopping picks the weights that look best on its images, so calibrating on the same ones would be
    optimistic and void the conformal guarantee.

    Parameters
    ----------
    y : int array
        Labels.
    fraction : float
        Share of each class for the first part.
    seed : int

    Returns
    -------
    tuple of int arrays
        Rows for selection (``fraction`` of each class) and rows for calibration.

    Raises
    ------
    InputError
        A class has fewer than two images.
    """
    y = np.asarray(y)
    chosen = []
    for label in (schema.REAL, schema.FAKE):
        rows = np.flatnonzero(y == label)
        if len(rows) < 2:
            raise InputError(
                f"{count(len(rows), f'{schema.LABEL_NAMES[label]} validation image')}; at least 2 of each "
                "class are needed (one to stop the training, one to calibrate), some hundreds for useful "
                "thresholds"
            )
        take = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        chosen.append(np.random.default_rng([seed, label]).permutation(rows)[:take])
    select = np.sort(np.concatenate(chosen))
    return select, np.setdiff1d(np.arange(len(y)), select)
