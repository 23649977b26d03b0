"""Ablation: one choice changed at a time, each answered by paired differences on unseen families."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.matrix import train_on_test_on
from itemkit.metrics import holm
from itemkit.recipes import Recipe
from itemkit.results import PAIR


def ablation(
    features: Features,
    questions: Mapping[str, Mapping[str, Recipe]],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    train_generators: Sequence[str] | None = None,
    families: Mapping[str, str] | None = None,
    n_boot: int = 2000,
    out: str | Path | None = None,
    jobs: int = 1,
) -> pd.DataFrame:
    """Answer questions about the method: train every option, compare its AUROC with that of the first one.

    A recipe that stands in several questions is trained once. Only cells of families not trained on count.

    Parameters
    ----------
    questions : dict of dict
        Question -> option -> `Recipe`; the first option is the baseline, usually the default.
    features, seeds, train_generators, families, n_boot, out, jobs
        See `itemkit.matrix.train_on_test_on`.

    Returns
    -------
    DataFrame, one row per question and option but the baseline
        ``question, option, baseline``; ``value, low, high``: mean over the unseen cells of the option's AUROC
        minus the baseline's, with a 95 % interval over the test images, resampled for both alike;
        ``family_low, family_high``: the same for that tested family where it is least, and largest;
        ``p_holm``: corrected for the number of rows; ``auroc, baseline_auroc, n_cells, n_families``.

    Raises
    ------
    InputError
        A question has no two different options, an option cannot be run, or nothing is unseen.
    """
    recipes: dict[str, Recipe] = {}
    names: dict[tuple[str, str], str] = {}  # one and the same recipe has one name, in whatever questions
    first: dict[tuple, str] = {}
    for question, options in questions.items():
        for option, recipe in options.items():
            same = (str(recipe.config or id(recipe)), id(recipe.features))
            name = names[question, option] = first.setdefault(same, f"{question}: {option}")
            recipes[name] = recipe
        if len({names[question, option] for option in options}) < max(2, len(options)):
            some = ", ".join(map(repr, options))
            raise InputError(f"question {question!r} has {some}; expected a baseline and other recipes")
    study = train_on_test_on(
        features, recipes, seeds, train_generators=train_generators, families=families, metrics=("auroc",),
        n_boot=n_boot, out=out, jobs=jobs,
    )  # fmt: skip
    for name, why in study.options["failures"].items():
        raise InputError(f"option {name!r} cannot be compared: {why}. Leave it out; what was trained is kept")
    if study.table["seen"].all():
        raise InputError("every generator is of a family trained on; give images of a second family")
    wide = study.table[~study.table["seen"]].pivot(index="seed", columns=["detector", *PAIR], values="value")
    baselines = {question: next(iter(options)) for question, options in questions.items()}
    against = {names[pair] for pair in baselines.items()}
    compared = {name: study.compare(name).set_index("other") for name in against}
    rows = []
    for (question, option), name in names.items():
        baseline = names[question, baselines[question]]
        if name == baseline:
            continue
        found, cells = compared[baseline].loc[name], (wide[name] - wide[baseline]).mean()
        by_family = cells.groupby(cells.index.get_level_values(PAIR[1]).map(study.family)).mean()
        rows.append(
            {"question": question, "option": option, "baseline": baselines[question],
             "value": -found["difference"], "low": -found["high"], "high": -found["low"],
             "family_low": by_family.min(), "family_high": by_family.max(), "p_holm": found["p_value"],
             "auroc": wide[name].mean(axis=None), "baseline_auroc": wide[baseline].mean(axis=None),
             "n_cells": len(cells), "n_families": len(by_family)}
        )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p_holm"].to_numpy()))


def degrade_captions(table: pd.DataFrame, share: float, nouns: Sequence[str]) -> pd.Series:
    """Captions by path in which some objects are named as another.

    Parameters
    ----------
    table : DataFrame
        With ``image_id, path, caption``. The damage follows from the image's content alone.
    share : float
        Probability that an object is made wrong; at a larger one it stays wrong in the same way.
    nouns : words that name objects; one takes the place of another
    """
    if not 0 <= share <= 1 or len(nouns) < 2:
        raise InputError(f"share={share} and {len(nouns)} nouns; expected 0 to 1, and two nouns or more")

    def degraded(text: str, image_id: str) -> str:
        rng = np.random.default_rng([0, int(hashlib.sha256(image_id.encode()).hexdigest()[:16], 16)])
        words = text.split(" ")
        for at, word in enumerate(words):
            if (noun := word.strip(",.")) not in nouns:
                continue
            # both are drawn whether used or not: the share decides how many objects, never how
            wrong, pick = rng.random() < share, rng.random()
            others = [other for other in nouns if other != noun]
            if wrong:
                chosen = others[int(pick * len(others))]
                words[at] = word.replace(noun, chosen)
                if at and words[at - 1] in ("a", "an"):
                    words[at - 1] = "an" if chosen[0] in "aeiou" else "a"
        return " ".join(words)

    rows = table[[schema.CAPTION, schema.IMAGE_ID]].astype(str).to_numpy()
    return pd.Series([degraded(*row) for row in rows], pd.Index(table[schema.PATH]), name=schema.CAPTION)
