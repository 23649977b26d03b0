"""Ablation: one choice changed at a time, each answered by paired differences on unseen families."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from itemkit import schema
from itemkit.controls import select_objects
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.matrix import train_on_test_on
from itemkit.metrics import LEVEL
from itemkit.recipes import Recipe
from itemkit.results import PAIR


def ablation(
    features: Features,
    questions: Mapping[str, Mapping[str, Recipe]],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    train_generators: Sequence[str] | None = None,
    families: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
) -> pd.DataFrame:
    """Answer questions about the method: train every option, compare its AUROC with that of the first one.

    A recipe that stands in several questions is trained once. Only cells of families not trained on count.

    Parameters
    ----------
    questions : dict of dict
        Question -> option -> `Recipe`; the first option is the reference, usually the default.
    features, seeds, train_generators, families, out, jobs
        See `itemkit.matrix.train_on_test_on`.

    Returns
    -------
    DataFrame, one row per question and option
        ``question, option, reference`` (is it the first?), ``value, low, high``: mean over the unseen cells,
        with a t-interval over seeds; ``difference, difference_low, difference_high, difference_sd``: the same
        for option minus reference, paired by seed; ``cells_better``, share of the unseen (train, test) cells
        in which the option's mean over seeds is higher; ``n_cells, n_seeds``.

    Raises
    ------
    InputError
        A question has no two options, an option cannot be run, or nothing is unseen.
    """
    if lonely := [name for name, options in questions.items() if len(options) < 2]:
        raise InputError(f"question {lonely[0]!r} has one option or none; expected a reference and others")
    recipes: dict[str, Recipe] = {}
    names: dict[tuple[str, str], str] = {}  # one and the same recipe has one name, in whatever questions
    first: dict[tuple, str] = {}
    for question, options in questions.items():
        for option, recipe in options.items():
            same = (str(recipe.config or id(recipe)), recipe.train_images, id(recipe.features))
            name = names[question, option] = first.setdefault(same, f"{question}: {option}")
            recipes[name] = recipe
    study = train_on_test_on(
        features, recipes, seeds, train_generators=train_generators, families=families, metrics=("auroc",),
        n_boot=0, out=out, jobs=jobs,
    )  # fmt: skip
    for name, why in study.options["failures"].items():
        raise InputError(f"option {name!r} cannot be compared: {why}. Leave it out; what was trained is kept")
    unseen = ~study.table["seen"]
    if not unseen.any():
        raise InputError("every generator is of a family trained on; give images of a second family")
    wide = study.table[unseen].pivot(index="seed", columns=["detector", *PAIR], values="value")
    rows = []
    for question, options in questions.items():
        reference = next(iter(options))
        for option in options:
            mine = wide[names[question, option]]
            gap = mine - wide[names[question, reference]]
            value, difference = mine.mean(axis=1), gap.mean(axis=1)
            (low, high), (gap_low, gap_high) = _t_interval(value), _t_interval(difference)
            rows.append(
                {"question": question, "option": option, "reference": option == reference,
                 "value": value.mean(), "low": low, "high": high,
                 "difference": difference.mean(), "difference_low": gap_low, "difference_high": gap_high,
                 "difference_sd": difference.std(), "cells_better": float((gap.mean() > 0).mean()),
                 "n_cells": gap.shape[1], "n_seeds": len(gap)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _t_interval(values: pd.Series) -> tuple[float, float]:
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.sem() if len(values) > 1 else float("nan")
    return values.mean() - half, values.mean() + half


def what_matters(table: pd.DataFrame, least: float = 0.01) -> pd.DataFrame:
    """Sum tables of `ablation` up: whether any option of a question differs by more than ``least``.

    Every option's interval is widened for as many comparisons as the question has (Bonferroni), so that "yes"
    is not the luck of the farthest of several.

    Returns
    -------
    DataFrame, one row per question, largest effect first
        ``question, reference, option, difference, low, high, cells_better, matters``: "yes" if some option's
        whole interval is farther from zero than ``least`` (shown: the farthest of those), "no" if the
        intervals of all are nearer, else "unclear" (shown: the farthest of all). Intervals are over seeds.
    """
    rows = []
    for question, part in table.groupby("question", sort=False):
        reference, others = part.loc[part["reference"], "option"].iloc[0], part[~part["reference"]]
        n, tail = others["n_seeds"], (1 - LEVEL) / 2 / len(others)
        half = stats.t.ppf(1 - tail, (n - 1).clip(lower=1)) * others["difference_sd"] / np.sqrt(n)
        half = half.where(n > 1, np.inf)
        others = others.assign(low=others["difference"] - half, high=others["difference"] + half)
        surely = others[(others["low"] > least) | (others["high"] < -least)]
        nearer = (others["low"] > -least) & (others["high"] < least)
        shown = surely if len(surely) else others
        far = shown.loc[shown["difference"].abs().idxmax()]
        rows.append(
            {"question": question, "reference": reference}
            | far[["option", "difference", "low", "high", "cells_better"]].to_dict()
            | {"matters": "yes" if len(surely) else "no" if nearer.all() else "unclear"}
        )
    return pd.DataFrame(rows).sort_values("difference", key=np.abs, ascending=False, ignore_index=True)


def degrade_captions(
    table: pd.DataFrame, share: float, kinds: Sequence[str], colours: Sequence[str] = ()
) -> pd.Series:
    """Captions by path in which some objects are wrong: another kind, or another colour before it.

    Parameters
    ----------
    table : DataFrame
        With ``image_id, path, caption``. The damage follows from the image's content alone.
    share : float
        Probability that an object is made wrong; at a larger one it stays wrong in the same way.
    kinds, colours
        Words of objects, and words that may stand before them.
    """
    if not 0 <= share <= 1 or len(kinds) < 2:
        raise InputError(f"share={share} and {len(kinds)} kinds; expected 0 to 1, and two kinds or more")

    def degraded(text: str, image_id: str) -> str:
        rng = np.random.default_rng([0, int(hashlib.sha256(image_id.encode()).hexdigest()[:16], 16)])
        words = text.split(" ")
        plain = [word.strip(",.") for word in words]
        for i, word in enumerate(plain):
            if word not in kinds:
                continue
            # all numbers are drawn whether used or not: the share decides how many objects, never how
            wrong, which, pick = rng.random() < share, rng.random() < 0.5, rng.random()
            if not wrong:
                continue
            at, group = (i - 1, colours) if which and i and plain[i - 1] in colours else (i, kinds)
            others = [other for other in group if other != plain[at]]
            chosen = others[int(pick * len(others))]
            words[at] = words[at].replace(plain[at], chosen)
            if at and plain[at - 1] in ("a", "an"):
                words[at - 1] = "an" if chosen[0] in "aeiou" else "a"
        return " ".join(words)

    rows = table[[schema.CAPTION, schema.IMAGE_ID]].astype(str).to_numpy()
    return pd.Series([degraded(*row) for row in rows], pd.Index(table[schema.PATH]), name=schema.CAPTION)


def first_objects(features: Features, at_most: int) -> Features:
    """Keep the first objects of each image, in the order in which its caption names them; 0: whole images."""
    place = pd.Series(features.owner).groupby(features.owner).cumcount()
    return select_objects(features, (place < at_most).to_numpy())
