"""The contenders of a study as recipes: misalignment, its controls, and detectors that ran elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone

from itemkit import schema
from itemkit.controls import CONTROLS, FeatureScorer, Scorer, get_control
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import RepresentationConfig, get_representation, represent

DEFAULT = RepresentationConfig()
# what tables of scores call their columns; the first that is there counts
COLUMNS = {
    schema.IMAGE_ID: ("image_id", "sha256"),
    schema.PATH: ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "score": ("score", "p_fake", "fake_score", "prob_fake", "probability", "prob", "logit", "prediction"),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to make one contender.

    Attributes
    ----------
    build : callable
        Seed -> untrained Scorer.
    config : dict
        Plain data with every number that changes its scores: the key under which runs are kept. Runs of a
        recipe without it are not reused.
    title : str
        For figures and tables.
    features : Features, optional
        Of the same images, to be used instead of the study's (another captioner, localiser, encoder).
    train_images : int, optional
        At most so many training images, both classes in proportion.
    """

    build: Callable[[int], Scorer]
    config: dict
    title: str = ""
    features: Features | None = None
    train_images: int | None = None


def item(
    representation: RepresentationConfig | str = DEFAULT,
    head: MisalignmentMLP | None = None,
    title: str = "misalignment",
    features: Features | None = None,
    train_images: int | None = None,
) -> Recipe:
    """Misalignment detector: a representation and a head."""
    config, head = get_representation(representation), head or MisalignmentMLP()

    def build(seed: int) -> Scorer:
        return FeatureScorer(lambda f: represent(f, config), clone(head).set_params(seed=seed))

    return Recipe(build, {"item": config.to_dict(), "head": _numbers(head)}, title, features, train_images)


def early(
    representation: RepresentationConfig | str = DEFAULT, head: MisalignmentMLP | None = None
) -> Recipe:
    """Early fusion: one head on the misalignment vector and the image embedding side by side."""
    config, head = get_representation(representation), head or MisalignmentMLP()

    def vectors(features: Features) -> np.ndarray:
        return np.concatenate([represent(features, config), features.image_emb], axis=1)

    def build(seed: int) -> Scorer:
        return FeatureScorer(vectors, clone(head).set_params(seed=seed))

    about = {"early_fusion": config.to_dict(), "head": _numbers(head)}
    return Recipe(build, about, "misalignment + image, early")


def control(
    name: str,
    representation: RepresentationConfig | str = DEFAULT,
    head: MisalignmentMLP | None = None,
    generic_emb: np.ndarray | None = None,
) -> Recipe:
    """One of `itemkit.controls.CONTROLS`, with the representation and head of the detector beside it."""
    chosen, config, head = get_control(name), get_representation(representation), head or MisalignmentMLP()

    def build(seed: int) -> Scorer:
        return chosen.build(seed, config, head, generic_emb)

    scorer = build(0)  # complains about missing inputs now, not after an hour
    about = {
        "control": name,
        "item": config.to_dict(),
        "estimator": _numbers(getattr(scorer, "estimator", None)),
    }
    if chosen.needs == "generic_emb":
        about["generic_emb"] = array_hash(np.asarray(generic_emb, np.float32))
    return Recipe(build, about, chosen.title)


def standard_detectors(
    features: Features,
    representation: RepresentationConfig | str = DEFAULT,
    head: MisalignmentMLP | None = None,
    generic_emb: np.ndarray | None = None,
    skip: Sequence[str] = (),
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """Make recipes of the misalignment detector and of every control that these features allow.

    Returns
    -------
    tuple
        Recipes by name ("item" first), and what each left-out control lacks.
    """
    reasons = {name: c.missing(features, generic_emb) for name, c in CONTROLS.items() if name not in skip}
    able = [name for name, reason in reasons.items() if not reason]
    recipes = {name: control(name, representation, head, generic_emb) for name in able}
    return {"item": item(representation, head)} | recipes, {n: r for n, r in reasons.items() if r}


def external(path: str | Path, title: str | None = None) -> Recipe:
    """A detector that ran elsewhere; see `ExternalScores`.

    Threshold and calibration are chosen on its scores of the validation images as for every contender. It was
    trained on whatever it was, so "seen" says only whose validation images set its threshold.
    """
    scores = ExternalScores(path)
    about = {"external": array_hash(pd.util.hash_pandas_object(scores.scores).to_numpy())}
    return Recipe(lambda seed: scores, about, title or Path(path).stem)


class ExternalScores:
    """Scores of a detector that ran elsewhere: a CSV file with one row per image.

    Parameters
    ----------
    path : CSV file
        With a column ``image_id`` or ``path`` (relative ones start at the folder of the file) and a column
        ``score``, higher for fakes; common other names are understood, further columns are ignored.

    Raises
    ------
    InputError
        A column is missing, a score is no finite number, or one image has two scores.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                separator = max(",;\t", key=file.readline().count)
            table = pd.read_csv(self.path, sep=separator, encoding="utf-8-sig", dtype=str, index_col=False)
        except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise InputError(f"cannot read scores from {self.path}: {error}") from error
        there = {str(name).strip().casefold(): name for name in table.columns}
        column = {what: there[n] for what, names in COLUMNS.items() for n in reversed(names) if n in there}
        self.key = next((key for key in (schema.IMAGE_ID, schema.PATH) if key in column), "")
        if not self.key or "score" not in column:
            raise InputError(
                f"{self.path} has the columns {', '.join(map(str, table.columns))}; expected image_id or "
                "path, and score (higher: more likely fake)"
            )
        score = pd.to_numeric(table[column["score"]], errors="coerce").to_numpy(float)
        if not np.isfinite(score).all():
            row = int(np.flatnonzero(~np.isfinite(score))[0])
            value = table[column["score"]][row]
            raise InputError(f"{self.path}, row {row + 2}: score {value!r} is not a finite number")
        names = self._names(table[column[self.key]], self.path.parent)
        self.scores = pd.Series(score, index=names)
        if (differing := self.scores.groupby(level=0).nunique() > 1).any():
            raise InputError(f"{self.path} gives two different scores to {differing.idxmax()}; expected one")
        self.scores = self.scores[~self.scores.index.duplicated()]

    def _names(self, column: pd.Series, base: Path = Path()) -> pd.Series:
        names = column.astype(str)
        return names if self.key == schema.IMAGE_ID else names.map(lambda name: str((base / name).resolve()))

    def fit(self, train: Features, val: Features) -> ExternalScores:
        """Do nothing: it was trained elsewhere."""
        return self

    def decision_function(self, features: Features) -> np.ndarray:
        """Look the score of each image up."""
        names = self._names(features.table[self.key])
        found = self.scores.reindex(names).to_numpy()
        if (missing := np.isnan(found)).any():
            raise InputError(
                f"{self.path} has no score for {int(missing.sum())} of {len(found)} images, the first is "
                f"{names.iloc[int(missing.argmax())]} (the file's own first: {self.scores.index[0]}); score "
                "all images that manifest.csv in the study's folder lists as val or test"
            )
        return found


def array_hash(array: np.ndarray) -> str:
    """16 hex digits of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _numbers(estimator: Any) -> dict:
    """Every number that changes a classifier's scores, also those behind the name of an architecture."""
    params = dict(estimator.get_params(deep=False)) if hasattr(estimator, "get_params") else {}
    for name in ("seed", "device"):  # the study sets the seed; the device is no part of the method
        params.pop(name, None)
    if isinstance(estimator, MisalignmentMLP):
        return params | {"architecture": asdict(estimator.resolved_architecture())}
    return {"class": type(estimator).__name__} | {name: repr(value) for name, value in params.items()}
