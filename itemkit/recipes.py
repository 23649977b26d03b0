"""The contenders of a study as recipes: misalignment, its controls, and detectors that ran elsewhere."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.controls import CONTROLS, OURS, VARIANTS, get_control
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import RepresentationConfig, get_representation

DEFAULT = RepresentationConfig()
# what tables of scores call their columns; the first that is there counts
COLUMNS = {
    schema.IMAGE_ID: ("image_id", "sha256"),
    schema.PATH: ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "score": ("score", "p_fake", "fake_score", "prob_fake", "probability", "prob", "logit", "prediction"),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to make one contender."""

    build: Callable[[int], Any]  # seed -> untrained scorer, see `itemkit.controls`
    config: dict = field(default_factory=dict)
    """Every number that changes its scores, as plain data: the key of its runs. Without it none is reused."""
    title: str = ""
    features: Features | None = None
    """Of the same images, to be used instead of the study's: another captioner, localiser, encoder."""
    reals_only: bool = False  # learns from real images alone, or not at all: one fit serves every set
    slow: bool = False  # takes long: fewer seeds, and not trained on all families but one


def item(
    representation: RepresentationConfig | str = DEFAULT,
    head: MisalignmentMLP | None = None,
    title: str = OURS["item"].title,
    features: Features | None = None,
) -> Recipe:
    """Misalignment detector: a representation and a head."""
    return replace(control("item", representation, head), title=title, features=features)


def control(
    name: str,
    representation: RepresentationConfig | str = DEFAULT,
    head: MisalignmentMLP | None = None,
    variants: Mapping[str, Features] | None = None,
) -> Recipe:
    """One of `OURS` or of `itemkit.controls.CONTROLS`, beside a detector of this representation and head.

    ``variants`` are other features of the same images, see `itemkit.controls.VARIANTS`.
    """
    made, config = OURS.get(name) or get_control(name), get_representation(representation)
    own = (variants or {}).get(made.variant)
    if made.variant and own is None:
        raise InputError(f"the control {made.title!r} needs variants[{made.variant!r}]: "
                         f"{VARIANTS[made.variant]}; itemkit.study.make_variants makes them")  # fmt: skip
    about = {"contender": name, "item": config.to_dict(), "made_of": described(made.build(0, config, head))}
    build = partial(made.build, representation=config, head=head)
    return Recipe(build, about, made.title, own, made.reals_only, made.slow)


def described(part: Any) -> Any:
    """What an untrained scorer is made of, as plain data: every number that can change its scores."""
    if isinstance(part, (str, int, float, type(None))):
        return part
    if isinstance(part, (tuple, list)):
        return [described(item) for item in part]
    if inspect.isroutine(part) or isinstance(part, attrgetter):
        return getattr(part, "__name__", repr(part))
    numbers = part if isinstance(part, dict) else {"class": type(part).__name__} | vars(part)
    if isinstance(part, MisalignmentMLP):  # a name of an architecture alone would hide its numbers
        numbers |= {"architecture": part.resolved_architecture()}
    # the study sets the seed; the device is no part of the method
    return {key: described(value) for key, value in numbers.items() if key not in ("seed", "device")}


def standard_detectors(
    features: Features,
    head: MisalignmentMLP | None = None,
    variants: Mapping[str, Features] | None = None,
    skip: Sequence[str] = (),
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Recipes of `OURS` and every control that can be run, and what each of the others lacks, in words."""
    given = variants or {}
    wanted = {name: made for name, made in (OURS | CONTROLS).items() if name not in skip}
    lacking = {name: words for name, made in wanted.items() if (words := made.lacks(features, given))}
    return {name: control(name, DEFAULT, head, given) for name in wanted if name not in lacking}, lacking


class ExternalScores:
    """Scores of a detector that ran elsewhere: a CSV file with one row per image.

    Its columns are ``image_id`` or ``path`` (relative ones start at the folder of the file), and ``score``,
    higher for fakes; common other names are understood, further columns are ignored.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                separator = max(",;\t", key=file.readline().count)
            table = pd.read_csv(self.path, sep=separator, encoding="utf-8-sig", dtype=str, index_col=False)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read scores from {self.path}: {error}") from error
        there = {str(name).strip().casefold(): name for name in table.columns}
        column = {what: there[n] for what, names in COLUMNS.items() for n in reversed(names) if n in there}
        self.key = next((key for key in (schema.IMAGE_ID, schema.PATH) if key in column), "")
        if not self.key or "score" not in column:
            names = ", ".join(map(str, table.columns))
            raise InputError(f"{self.path} has the columns {names}; expected image_id or path, and score")
        given = table[column["score"]]
        score = pd.to_numeric(given, errors="coerce")
        for row, bad in given[~np.isfinite(score)].items():
            raise InputError(f"{self.path}, row {row + 2}: score {bad!r} is not a finite number")
        score.index = self._names(table[column[self.key]], self.path.parent)
        if (differing := score.groupby(level=0).nunique() > 1).any():
            raise InputError(f"{self.path} gives two different scores to {differing.idxmax()}; expected one")
        self.scores = score[~score.index.duplicated()]

    def _names(self, column: pd.Series, base: Path = Path()) -> pd.Series:
        names = column.astype(str)
        return names if self.key == schema.IMAGE_ID else names.map(lambda name: str((base / name).resolve()))

    def of(self, images: pd.DataFrame) -> np.ndarray:
        """Score of each image of a table with the columns ``image_id, path``.

        Where no path fits as it is, file names do: tables of scores leave out the folder that all share.
        """
        names = self._names(images[self.key])
        found = self.scores.reindex(names)
        if self.key == schema.PATH and found.isna().all():
            by_name = self.scores.set_axis(self.scores.index.map(os.path.basename))
            if by_name.index.is_unique and not (mine := names.map(os.path.basename)).duplicated().any():
                found = by_name.reindex(mine)
        if (missing := found.isna()).any():
            raise InputError(
                f"{self.path} has no score for {missing.sum()} of {len(found)} images, the first is "
                f"{missing.idxmax()} (the file's own first: {self.scores.index[0]}); score all images that "
                "manifest.csv in the study's folder lists as val or test"
            )
        return found.to_numpy(float)
