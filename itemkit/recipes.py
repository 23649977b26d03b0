"""The contenders of a study as recipes: misalignment, its controls, and detectors that ran elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.controls import CONTROLS, NEEDS, Control, FeatureScorer, get_control
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import RepresentationConfig, get_representation, represent

DEFAULT = RepresentationConfig()
OURS = {
    "item": Control(
        "misalignment", "Does the image fit its caption?",
        lambda item, head, emb: FeatureScorer(lambda f: represent(f, item), head),
    ),
    "early": Control(
        "fusion, early: item + image", "Is the image embedding of use beside the misalignment?",
        lambda item, head, emb: FeatureScorer(lambda f: np.hstack([represent(f, item), f.image_emb]), head),
    ),
}  # fmt: skip
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
    train_images: int | None = None  # at most so many, both classes in proportion


def item(
    representation: RepresentationConfig | str = DEFAULT,
    head: MisalignmentMLP | None = None,
    title: str = OURS["item"].title,
    features: Features | None = None,
    train_images: int | None = None,
) -> Recipe:
    """Misalignment detector: a representation and a head."""
    recipe = control("item", representation, head)
    return replace(recipe, title=title, features=features, train_images=train_images)


def control(
    name: str,
    representation: RepresentationConfig | str = DEFAULT,
    head: MisalignmentMLP | None = None,
    generic_emb: np.ndarray | None = None,
) -> Recipe:
    """One of `itemkit.controls.CONTROLS`, with the representation and head of the detector beside it.

    Or "item", that detector itself, or "early", one head on its vector and the image embedding side by side.
    """
    made, config = OURS.get(name) or get_control(name), get_representation(representation)

    # built once now, so that what is missing is said before anything is trained
    estimator = made.build(0, config, head, generic_emb).estimator
    numbers = {"class": type(estimator).__name__} | estimator.get_params(deep=False)
    if isinstance(estimator, MisalignmentMLP):  # a name of an architecture alone would hide its numbers
        numbers["architecture"] = estimator.resolved_architecture()
    # the study sets the seed; the device is no part of the method
    about: dict[str, Any] = {k: repr(v) for k, v in numbers.items() if k not in ("seed", "device")}
    about |= {"contender": name, "item": config.to_dict()}
    if made.needs == "generic_emb":
        about["generic_emb"] = array_hash(np.asarray(generic_emb, np.float32))
    return Recipe(lambda seed: made.build(seed, config, head, generic_emb), about, made.title)


def standard_detectors(
    features: Features,
    head: MisalignmentMLP | None = None,
    generic_emb: np.ndarray | None = None,
    skip: Sequence[str] = (),
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Recipes of "item" and every control that these features allow, and what each of the others lacks."""
    lacks = {
        "pixels": features.pixels is None,
        "generic_emb": generic_emb is None,
        "caption_logprob": features.table[schema.CAPTION_LOGPROB].isna().any(),
    }
    wanted = {name: made.needs for name, made in CONTROLS.items() if name not in skip}
    lacking = {name: NEEDS[needs] for name, needs in wanted.items() if lacks.get(needs)}
    names = ("item", *(name for name in wanted if name not in lacking))
    return {name: control(name, DEFAULT, head, generic_emb) for name in names}, lacking


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

    def fit(self, train: Features, val: Features) -> ExternalScores:
        """Do nothing: it was trained elsewhere."""
        return self

    def decision_function(self, features: Features) -> np.ndarray:
        """Look the score of each image up."""
        found = self.scores.reindex(self._names(features.table[self.key]))
        if (missing := found.isna()).any():
            raise InputError(
                f"{self.path} has no score for {missing.sum()} of {len(found)} images, the first is "
                f"{missing.idxmax()} (the file's own first: {self.scores.index[0]}); score all images that "
                "manifest.csv in the study's folder lists as val or test"
            )
        return found.to_numpy(float)


def external(path: str | Path, title: str = "") -> Recipe:
    """A detector that ran elsewhere; "seen" says only whose validation images its threshold comes from."""
    scores = ExternalScores(path)
    about = {"external": array_hash(pd.util.hash_pandas_object(scores.scores).to_numpy())}
    return Recipe(lambda seed: scores, about, title)


def array_hash(*arrays: np.ndarray) -> str:
    """16 hex digits of the types, shapes and bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
