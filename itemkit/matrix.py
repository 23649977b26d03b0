"""The matrix: every contender trained on each generator and tested on all, with honest thresholds.

Scores are computed once per contender, train generator and seed, and kept as one JSON file each; metrics,
intervals, comparisons and fusions follow from them in seconds, see `itemkit.results`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils.parallel import Parallel, delayed
from tqdm.auto import tqdm

import itemkit
from itemkit import schema
from itemkit._files import write_json
from itemkit.controls import Scorer
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.metrics import METRICS
from itemkit.recipes import Recipe, array_hash
from itemkit.results import STUDY_METRICS, Run, Study, finish_run, run_name
from itemkit.splits import split_validation
from itemkit.text import count, did_you_mean, one_line

TEST_COLUMNS = (schema.IMAGE_ID, schema.PATH, schema.LABEL, schema.GENERATOR, schema.SOURCE)
TRAIN_SHARE = 0.8
"""Of the training images, drawn without replacement for each seed."""
LEAST = {"train": 2, "val": 2, "test": 1}
"""Images of each class a split needs; half of val stops the training, the other half sets the threshold."""


def train_on_test_on(
    features: Features,
    detectors: Mapping[str, Recipe | Callable[[int], Scorer]],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    train_generators: Sequence[str] | None = None,
    test_generators: Sequence[str] | None = None,
    threshold: str = "fpr",
    fpr: float = 0.05,
    metrics: Sequence[str] = STUDY_METRICS,
    families: Mapping[str, str] | None = None,
    pair_by: str | None = None,
    n_boot: int = 200,
    out: str | Path | None = None,
    jobs: int = 1,
    progress: bool = False,
) -> Study:
    """Train every contender on real images and one generator, test it on every generator.

    For each train generator and seed: a random 80 % of the training reals and fakes trains, one half of the validation images (reals and fakes of the same generator) stops the training, the other
    half sets threshold and calibration. Test images are scored once; nothing is chosen on them, and no image
    of an unseen generator is looked at before.

    Parameters
    ----------
    features : Features
        With the columns ``label``, ``generator`` and ``split`` (train, val, test).
    detectors : dict
        Name -> `Recipe` (see `itemkit.recipes`), or a function from a seed to an untrained Scorer, whose runs are
        not reused.
    seeds : ints
        Each draws other training images, another division of the validation images and another start.
    train_generators : names, optional
        By default those with at least two training and two validation images. "a+b" trains on both.
    test_generators : names, optional
        Those with test images by default.
    threshold : {"fpr", "best"}
        For accuracies: the validation threshold at the false-positive rate ``fpr``, or the one with the best
        balanced accuracy on validation images. Where the images are too few for ``fpr``, accuracies are NaN and
        ``Study.notes`` says so.
    metrics : names
        Out of `itemkit.metrics.METRICS`.
    families : dict, optional
        Generator -> family. A test generator of a family trained on counts as seen: image-to-image with a
        flow is not unseen to a detector trained on that flow.
    pair_by : column, optional
        Judge each generator's fakes against the test reals that share this column ("source") instead of all.
    n_boot : int
        Bootstrap over the test images; the same resamples for all contenders. 0 for none.
    out : folder, optional
        Keep one JSON per run there, and reuse those that fit.
    jobs : int
        Processes that train side by side; the scores do not depend on it.
    progress : bool
        Show a bar with the time left.

    Returns
    -------
    Study
        A contender that fails is left out, with the reason in ``Study.failures``.

    Raises
    ------
    InputError
        An option or a split does not fit, or no contender could be run.
    """
    recipes = {name: r if isinstance(r, Recipe) else Recipe(r, {}, name) for name, r in detectors.items()}
    if not recipes or not len(seeds):
        raise InputError(f"{len(recipes)} contenders and {len(seeds)} seeds; expected at least one of each")
    if threshold not in ("fpr", "best"):
        raise InputError(f"threshold={threshold!r}: expected fpr or best")
    if not 0 < fpr < 1:
        raise InputError(f"fpr={fpr}: expected a rate between 0 and 1, such as 0.05")
    if unknown := [name for name in metrics if name not in METRICS]:
        hint = did_you_mean(unknown[0], METRICS)
        raise InputError(f"unknown metric {unknown[0]!r}; expected one of {', '.join(METRICS)}.{hint}")
    trains, tests, notes = _generators(features, train_generators, test_generators)
    options: dict[str, Any] = {
        "seeds": [int(seed) for seed in seeds], "train_generators": trains, "test_generators": tests,
        "threshold": threshold, "fpr": fpr, "metrics": list(metrics), "families": dict(families or {}),
        "pair_by": pair_by, "n_boot": n_boot, "made_by": features.provenance,
    }  # fmt: skip
    folder = None if out is None else Path(out)
    found: dict[tuple[str, str, int], Run] = {}
    tasks: list[tuple] = []
    hashes: dict[int, str] = {}
    for name, recipe in recipes.items():
        own = features if recipe.features is None else _aligned(features, recipe.features, name)
        # by the recipe's features: an aligned copy may be freed and its id given to another
        data = hashes.setdefault(id(recipe.features), "") or _hash(own)
        hashes[id(recipe.features)] = data
        # threshold and metrics are derived from kept scores and no part of the key
        about = {"version": itemkit.__version__, "data": data, "recipe": recipe.config, "tests": tests,
                 "train_share": TRAIN_SHARE, "limit": recipe.train_images}  # fmt: skip
        for train in trains:
            missing = []
            for seed in options["seeds"]:
                text = json.dumps([about, name, train, seed], sort_keys=True)
                key = hashlib.sha256(text.encode()).hexdigest() if recipe.config else ""
                path = folder / "runs" / run_name(name, train, seed) if folder else None
                if run := _reuse(path, key, options):
                    found[name, train, seed] = run
                else:
                    missing.append((seed, key, path))
            if missing:
                tasks.append((name, recipe, own, train, missing, options))
    if folder:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    options["runs_reused"] = len(found)
    # one task is a contender on a generator with all its seeds, so that the features travel seldom
    work = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(_runs)(*task) for task in tasks)
    total = len(recipes) * len(trains) * len(seeds)
    with tqdm(total=total, initial=len(found), disable=not progress, unit="run", dynamic_ncols=True) as bar:
        for name, train, done, failure in work:
            found |= {(run.detector, run.train_generator, run.seed): run for run in done}
            if failure:
                failures.setdefault(name, f"trained on {train}: {failure}")
            bar.set_description(f"{name} on {train}")
            bar.update(len(done))
    kept = [name for name in recipes if name not in failures]
    if not kept:
        name, why = next(iter(failures.items()))
        raise InputError(f"no contender could be run; the first, {name}, {why}")
    runs = [found[name, train, seed] for name in kept for train in trains for seed in options["seeds"]]
    withheld = dict.fromkeys(run.withheld for run in runs if run.withheld)
    notes += [f"Accuracies are empty where {reason}." for reason in withheld]
    columns = dict.fromkeys(
        [*(c for c in TEST_COLUMNS if c in features.table), *([pair_by] if pair_by else [])]
    )
    test = features.table.iloc[_rows(features, "test", tests)][list(columns)].reset_index(drop=True)
    options |= {"detectors": kept, "failures": failures, "notes": notes}
    study = Study(test.astype({schema.LABEL: int}), runs, options)
    if folder:
        study.save(folder)
    return study


def _generators(
    features: Features, trains: Sequence[str] | None, tests: Sequence[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """Generators that train and that test, checked, and notes on those that cannot."""
    table = features.table[features.table[schema.LABEL].notna()]
    if lacking := int(table[schema.SPLIT].isna().sum()):
        raise InputError(f"{lacking} of {len(table)} images have no split; expected train, val or test")
    real = table[schema.LABEL] == schema.REAL
    reals = table.loc[real, schema.SPLIT].value_counts()
    for split, least in LEAST.items():
        if reals.get(split, 0) < least:
            raise InputError(
                f"{count(reals.get(split, 0), 'real image')} with the split {split!r}; at least {least} are needed"
            )
    fakes = table[~real].groupby([schema.SPLIT, schema.GENERATOR]).size()
    known = list(dict.fromkeys(table.loc[~real, schema.GENERATOR]))

    def lacks(name: str, splits: Sequence[str]) -> str:
        for split in splits:
            if (n := int(fakes.get((split, name), 0))) < LEAST[split]:
                return (
                    f"{count(n, 'fake image')} with the split {split!r}, at least {LEAST[split]} are needed"
                )
        return ""

    both = ("train", "val")
    notes = []
    if trains is None:
        reasons = {name: lacks(name, both) for name in known}
        trains = [name for name in known if not reasons[name]]
        notes = [
            f"Nothing is trained on {n}: {why}."
            for n, why in reasons.items()
            if why and (("train", n) in fakes)
        ]
        if not trains:
            first = next(iter(reasons.items()), ("", "there is no fake image"))
            raise InputError(f"no generator can be trained on; {': '.join(first).lstrip(': ')}")
    if tests is None:
        tests = [name for name in known if not lacks(name, ("test",))]
        if not tests:
            raise InputError(
                "no fake image has the split 'test'; expected some in each of train, val and test"
            )
    for name, splits in [(n, both) for t in trains for n in t.split("+")] + [(n, ("test",)) for n in tests]:
        if reason := lacks(name, splits):
            there = f"generators: {', '.join(map(str, known))}.{did_you_mean(name, known)}"
            raise InputError(f"generator {name!r} has {reason}; {there}")
    return list(trains), list(tests), notes


def _rows(features: Features, split: str, generators: Sequence[str]) -> np.ndarray:
    """Positions of the reals of one split and of these generators' fakes."""
    table = features.table
    fake = (table[schema.LABEL] == schema.FAKE) & table[schema.GENERATOR].isin(generators)
    here = (table[schema.SPLIT] == split) & (fake | (table[schema.LABEL] == schema.REAL))
    return np.flatnonzero(here.fillna(False).to_numpy(bool))


def _draw(rows: np.ndarray, y: np.ndarray, seed: int, limit: int | None) -> np.ndarray:
    """Part of the training rows, without replacement; the same reals for every generator."""
    fraction = TRAIN_SHARE if limit is None else min(TRAIN_SHARE, limit / len(rows))
    parts = []
    for label in (schema.REAL, schema.FAKE):
        own = rows[y == label]
        take = max(2, round(fraction * len(own)))
        parts.append(np.random.default_rng([seed, label]).permutation(own)[:take])
    return np.sort(np.concatenate(parts))


def _runs(
    name: str, recipe: Recipe, features: Features, train: str, missing: Sequence[tuple], options: dict
) -> tuple[str, str, list[Run], str]:
    """One contender on one generator with several seeds; each run is on disk as soon as it is done."""
    done: list[Run] = []
    try:
        generators = train.split("+")
        train_rows, val_rows = (_rows(features, split, generators) for split in ("train", "val"))
        test = features.select(_rows(features, "test", options["test_generators"]))
        y = {
            split: features.select(rows).labels for split, rows in (("train", train_rows), ("val", val_rows))
        }
        for seed, key, path in missing:
            start = time.perf_counter()
            drawn = _draw(train_rows, y["train"], seed, recipe.train_images)
            stop, rest = split_validation(y["val"], seed=seed)
            scorer = recipe.build(seed)
            scorer.fit(features.select(drawn), features.select(val_rows[stop]))
            val = scorer.decision_function(features.select(val_rows[rest]))
            scores = scorer.decision_function(test)
            about = {"n_train": len(drawn), "seconds": round(time.perf_counter() - start, 3), "key": key}
            run = finish_run(
                name, train, seed, val, y["val"][rest], scores, options, config=recipe.config, **about
            )
            if path:
                write_json(path, asdict(run))
            done.append(run)
    except Exception as error:  # whatever breaks in one contender must not cost the others
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return name, train, done, kind + one_line(error)
    return name, train, done, ""


def _reuse(path: Path | None, key: str, options: dict) -> Run | None:
    """Read the run kept in a file, if it is this very run; threshold and calibration are chosen anew."""
    if path is None or not key or not path.is_file():
        return None
    try:
        old = Run(**json.loads(path.read_text("utf-8")))
        if old.key != key:
            return None
        scores = (np.asarray(part) for part in (old.val_scores, old.val_labels, old.test_scores))
        about = {"n_train": old.n_train, "seconds": old.seconds, "key": key, "config": old.config}
        return finish_run(old.detector, old.train_generator, old.seed, *scores, options, **about)
    except (OSError, ValueError, TypeError):
        return None  # damaged, or another version's file: done again and replaced


def _aligned(base: Features, other: Features, name: str) -> Features:
    """Bring the other features into the row order of the study's."""
    mine, theirs = base.table[schema.PATH].astype(str), other.table[schema.PATH].astype(str)
    if mine.equals(theirs):
        return other
    where = dict(zip(theirs, range(len(theirs)), strict=True))
    if missing := [path for path in mine if path not in where]:
        raise InputError(
            f"the features of {name!r} lack {len(missing)} of the study's {len(mine)} images, the first is "
            f"{missing[0]}"
        )
    return other.select(np.array([where[path] for path in mine]))


def _hash(features: Features) -> str:
    """Everything in features that a score can depend on."""
    arrays = {f.name: getattr(features, f.name) for f in fields(features)}
    parts = [f"{k} {v.shape} {array_hash(v)}" for k, v in arrays.items() if isinstance(v, np.ndarray)]
    if len(features.objects):
        parts.append(array_hash(features.objects["score"].to_numpy(float)))
    columns = [schema.IMAGE_ID, schema.LABEL, schema.GENERATOR, schema.SPLIT, schema.CAPTION_LOGPROB]
    parts.append(features.table[columns].to_csv())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
