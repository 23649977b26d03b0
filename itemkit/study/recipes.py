"""What enters a study: each contender as a recipe that makes an untrained scorer from a seed.

A recipe also carries its configuration as plain data, so that a finished run is recognised and not done
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone

from itemkit import schema
from itemkit.baselines import CONTROLS, MisalignmentScorer, Scorer, get_control
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import RepresentationConfig, get_representation
from itemkit.study.fusion import FUSIONS, LateFusion, early_fusion


@dataclass(frozen=True)
class Recipe:
    """How to make one contender.

    Attributes
    ----------
    build : seed -> untrained Scorer
    config : plain data that identifies it
    title : for figures
    features : features of the same images to use instead of the study's (another captioner, localiser,
    encoder)
    train_images : at most so many training images, both classes in proportion; None for all
    """

    build: Callable[[int], Scorer]
    config: dict
    title: str = ""
    features: Features | None = None
    train_images: int | None = None


def item(
    representation: RepresentationConfig | str = "absolute",
    head: MisalignmentMLP | None = None,
    title: str | None = None,
    features: Features | None = None,
    train_images: int | None = None,
) -> Recipe:
    """Misalignment detector: a representation and a head."""
    config, head = get_representation(representation), head if head is not None else MisalignmentMLP()

    def build(seed: int) -> Scorer:
        return MisalignmentScorer(config, clone(head).set_params(seed=seed))

    about = {"item": config.to_dict(), "head": _head_config(head)}
    return Recipe(build, about, title or "misalignment", features=features, train_images=train_images)


def control(
    name: str,
    representation: RepresentationConfig | str = "absolute",
    head: MisalignmentMLP | None = None,
    generic_emb: np.ndarray | None = None,
    features: Features | None = None,
    train_images: int | None = None,
) -> Recipe:
    """Make a recipe of one of `itemkit.baselines.CONTROLS`."""
    chosen, config = get_control(name), get_representation(representation)
    head = head if head is not None else MisalignmentMLP()
    about: dict[str, Any] = {"control": name, "item": config.to_dict(), "head": _head_config(head)}
    if "generic_emb" in chosen.needs:
        about["generic_emb"] = _hash(np.asarray(generic_emb, np.float32))

    def build(seed: int) -> Scorer:
        return chosen.build(seed, config, head, generic_emb)

    build(0)  # complain about missing inputs now, not after an hour
    return Recipe(build, about, chosen.title, features=features, train_images=train_images)


def early(
    representation: RepresentationConfig | str = "absolute", head: MisalignmentMLP | None = None
) -> Recipe:
    """One head on misalignment and image embedding side by side."""
    config, head = get_representation(representation), head if head is not None else MisalignmentMLP()
    about = {"early_fusion": config.to_dict(), "head": _head_config(head)}
    return Recipe(
        lambda seed: early_fusion(config, clone(head).set_params(seed=seed)),
        about,
        "misalignment + image, early",
    )


def late(parts: Sequence[Recipe], how: str = "mean", title: str | None = None) -> Recipe:
    """Several recipes trained apart, their scores joined; see `itemkit.study.fusion.late_fusion`.

    Where the parts are in the study anyway, ``Study.fuse`` joins their stored scores without training them
    again; it calibrates the parts on the half of the validation images that also sets the threshold, this on
    the half that stops the training.
    """
    if how not in FUSIONS:
        raise InputError(f"how={how!r}: expected one of {', '.join(FUSIONS)}")
    if any(part.features is not None for part in parts):
        raise InputError("late() joins recipes on the study's own features; use Study.fuse for the others")
    about = {"late_fusion": [part.config for part in parts], "how": how}
    name = title or " + ".join(part.title for part in parts) + f", late ({how})"
    return Recipe(lambda seed: LateFusion([part.build(seed) for part in parts], how), about, name)


class ExternalScores:
    """Scores of a detector that ran elsewhere: a table with ``image_id`` or ``path``, and ``score``.

    Parameters
    ----------
    path : CSV file
        A higher score means more likely fake. Relative paths are taken from the folder of the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            table = pd.read_csv(self.path)
        except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise InputError(f"cannot read scores from {self.path}: {error}") from error
        key = next((name for name in (schema.IMAGE_ID, schema.PATH) if name in table.columns), None)
        if key is None or "score" not in table.columns:
            raise InputError(
                f"{self.path} has the columns {', '.join(map(str, table.columns))}; expected image_id or "
                f"path, and score"
            )
        self.key = key
        score = pd.to_numeric(table["score"], errors="coerce")
        if not np.isfinite(score).all():
            bad = table.index[~np.isfinite(score)][0]
            raise InputError(
                f"{self.path}, row {bad + 2}: score {table['score'][bad]!r} is not a finite number"
            )
        names = table[key].astype(str)
        if key == schema.PATH:
            names = names.map(lambda name: str((self.path.parent / name).resolve()))
        self.scores = pd.Series(score.to_numpy(float), index=names)
        differing = self.scores.groupby(level=0).nunique() > 1
        if differing.any():
            raise InputError(f"{self.path} gives two different scores to {differing.idxmax()}; expected one")
        self.scores = self.scores[~self.scores.index.duplicated()]

    def fit(self, train: Features, val: Features) -> ExternalScores:
        """Do nothing: it was trained elsewhere."""
        return self

    def decision_function(self, features: Features) -> np.ndarray:
        """Look the score of each image up."""
        names = features.table[self.key].astype(str)
        if self.key == schema.PATH:
            names = names.map(lambda name: str(Path(name).resolve()))
        found = self.scores.reindex(names).to_numpy()
        if (missing := np.isnan(found)).any():
            raise InputError(
                f"{self.path} has no score for {int(missing.sum())} of {len(found)} images, the first is "
                f"{names.iloc[int(missing.argmax())]}; score the validation and the test images"
            )
        return found


def external(path: str | Path, title: str | None = None) -> Recipe:
    """Any other detector, by its scores; see `ExternalScores`.

    Validation images need scores too: threshold and calibration are chosen on them as for every contender.
    It was trained elsewhere and perhaps on anything, so "seen" says only whose validation images set its
    threshold.
    """
    scores = ExternalScores(path)
    about = {
        "external": Path(path).name,
        "scores": _hash(pd.util.hash_pandas_object(scores.scores).to_numpy()),
    }
    return Recipe(lambda seed: scores, about, title or Path(path).stem)


def standard_detectors(
    features: Features,
    representation: RepresentationConfig | str = "absolute",
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
    chosen, lacking = {"item": item(representation, head)}, {}
    for name, entry in CONTROLS.items():
        if name in skip:
            continue
        reason = entry.missing(features, generic_emb)
        if reason:
            lacking[name] = reason
        else:
            chosen[name] = control(name, representation, head, generic_emb)
    return chosen, lacking


def _head_config(head: MisalignmentMLP) -> dict:
    params = head.get_params()
    for name in ("seed", "device"):  # the study sets the seed; the device is no part of the method
        params.pop(name)
    return params


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
