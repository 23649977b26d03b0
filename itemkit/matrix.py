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
import pandas as pd
from sklearn.utils.parallel import Parallel, delayed
from tqdm.auto import tqdm

import itemkit
from itemkit import schema
from itemkit._files import write_json
from itemkit.controls import Scorer
from itemkit.errors import InputError, StoreError
from itemkit.features import Features
from itemkit.metrics import METRICS
from itemkit.recipes import Recipe, array_hash
from itemkit.results import STUDY_METRICS, Run, Study, run_name
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

    For each train generator and seed, 80 % of the training reals and fakes train, one half of the validation
    images (reals and fakes of the same generator) stops the training, the other half sets threshold and
    calibration. Test images are scored once; nothing is chosen on them, and no image of an unseen generator
    is looked at before.

    Parameters
    ----------
    features : Features
        Every image with label, generator and split.
    detectors : dict
        Name -> `Recipe`, or a function from a seed to an untrained Scorer, whose runs are not reused.
    seeds : ints
        Each draws other training images, another division of the validation images and another start.
    train_generators : names, optional
        By default those with at least two training and two validation images. "a+b" trains on both.
    test_generators : names, optional
        By default those with test images.
    threshold : {"fpr", "best"}
        For accuracies: the validation threshold at the false-positive rate ``fpr``, or the one with the best
        balanced accuracy on validation images. Where these are too few for ``fpr``, accuracies are NaN and
        ``Study.notes`` says so.
    metrics : names
        Out of `itemkit.metrics.METRICS`.
    families : dict, optional
        Generator -> family. A test generator of a family trained on counts as seen: image-to-image with a
        flow is not unseen to a detector trained on that flow.
    pair_by : column, optional
        Judge each generator's fakes against the test reals that share this column ("source") instead of all.
    n_boot : int
        Bootstrap over the test images, the same resamples for all contenders. 0 for none.
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
    for what, names, known in (("threshold", [threshold], ("fpr", "best")), ("metric", metrics, METRICS)):
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise InputError(f"{what} {name!r} is unknown; expected one of {', '.join(known)}.{hint}")
    trains, tests, notes = _generators(features.table, train_generators, test_generators)
    options: dict[str, Any] = {
        "seeds": [int(seed) for seed in seeds], "train_generators": trains, "test_generators": tests,
        "threshold": threshold, "fpr": fpr, "metrics": list(metrics), "families": dict(families or {}),
        "pair_by": pair_by, "n_boot": n_boot, "made_by": features.provenance,
    }  # fmt: skip
    folder = None if out is None else Path(out)
    if folder:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str, int], Run] = {}
    tasks: list[tuple] = []
    hashes: dict[int, str] = {}
    for name, recipe in recipes.items():
        own = features if recipe.features is None else _aligned(features, recipe.features, name)
        # by the recipe's features: an aligned copy may be freed and its id given to another
        if id(recipe.features) not in hashes:
            hashes[id(recipe.features)] = _hash(own)
        # threshold and metrics are derived from kept scores and no part of the key
        about = [itemkit.__version__, hashes[id(recipe.features)], recipe.config, recipe.train_images, tests]
        for train in trains:
            missing = []
            for seed in options["seeds"]:
                text = json.dumps([*about, TRAIN_SHARE, name, train, seed], sort_keys=True)
                key = hashlib.sha256(text.encode()).hexdigest() if recipe.config else ""
                path = folder / "runs" / run_name(name, train, seed) if folder else None
                if run := _reuse(path, key, options):
                    found[name, train, seed] = run
                else:
                    missing.append((seed, key, path))
            if missing:
                tasks.append((name, recipe, own, train, missing, options))
    failures: dict[str, str] = {}
    options["runs_reused"] = len(found)
    # one task is a contender on a generator with all its seeds, so that the features travel seldom
    work = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(_runs)(*task) for task in tasks)
    total = len(recipes) * len(trains) * len(seeds)
    with tqdm(total=total, initial=len(found), disable=not progress, unit="run", dynamic_ncols=True) as bar:
        for name, train, done, failure in work:
            found |= {(name, train, run.seed): run for run in done}
            if failure:
                failures.setdefault(name, f"trained on {train}: {failure}")
            bar.update(len(done))
    # a mean over fewer cells could not be compared with the others', so who fails once is out
    able = [name for name in recipes if name not in failures]
    if not able:
        name, reason = next(iter(failures.items()))
        raise InputError(f"no contender could be run; the first, {name}, {reason}")
    runs = [found[name, train, seed] for name in able for train in trains for seed in options["seeds"]]
    notes += [f"Accuracies are empty: {why}." for why in dict.fromkeys(run.withheld for run in runs) if why]
    columns = [c for c in dict.fromkeys((*TEST_COLUMNS, pair_by)) if c in features.table]
    test = features.table.iloc[_rows(features, "test", tests)][columns].reset_index(drop=True)
    options |= {"failures": failures, "notes": notes}
    study = Study(test.astype({schema.LABEL: int}), runs, options)
    if folder:
        study.save(folder)
    return study


def _generators(
    table: pd.DataFrame, trains: Sequence[str] | None, tests: Sequence[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """Generators that train and that test, checked, and notes on those that cannot train."""
    if lacking := int((table[schema.SPLIT].isna() | table[schema.LABEL].isna()).sum()):
        raise InputError(
            f"{lacking} of {len(table)} images lack a label or a split; expected train, val or test"
        )
    names = table[schema.GENERATOR].where(table[schema.LABEL] == schema.FAKE, schema.REAL_GENERATOR)
    known = [name for name in dict.fromkeys(names) if name != schema.REAL_GENERATOR]
    n = names.groupby([table[schema.SPLIT], names]).size()

    def lacks(name: str, *splits: str) -> str:
        for split in splits:
            if (there := int(n.get((split, name), 0))) < LEAST[split]:
                many = count(there, "image")
                return f"{many} of {name!r} in the split {split!r}; {LEAST[split]} or more are needed"
        return ""

    if reason := lacks(schema.REAL_GENERATOR, *LEAST):
        raise InputError(reason)
    unfit = {name: reason for name in known if (reason := lacks(name, "train", "val"))}
    notes = []
    if trains is None:
        trains = [name for name in known if name not in unfit]
        notes = [f"Nothing is trained on {name}: {why}." for name, why in unfit.items()]
    tests = [name for name in known if not lacks(name, "test")] if tests is None else tests
    if not trains or not tests:
        why = [*unfit.values()] if not trains else [lacks(name, "test") for name in known]
        raise InputError(f"nothing to {'test' if trains else 'train'} on: {[*why, 'no image is fake'][0]}")
    asked = {name: ("train", "val") for train in trains for name in train.split("+")}
    for name in {**asked, **dict.fromkeys(tests)}:
        if reason := lacks(name, *asked.get(name, ()), *(("test",) if name in tests else ())):
            hint = did_you_mean(name, known)
            raise InputError(f"{reason}; generators: {', '.join(map(str, known)) or 'none'}.{hint}")
    return list(trains), list(tests), notes


def _rows(features: Features, split: str, generators: Sequence[str]) -> np.ndarray:
    """Positions of the reals of one split and of these generators' fakes."""
    table = features.table
    wanted = (table[schema.LABEL] == schema.REAL) | table[schema.GENERATOR].isin(generators)
    return np.flatnonzero((wanted & (table[schema.SPLIT] == split)).to_numpy(bool))


def _draw(rows: np.ndarray, y: np.ndarray, seed: int, limit: int | None) -> np.ndarray:
    """Part of the training rows, without replacement; the same reals for every generator."""
    share = TRAIN_SHARE if limit is None else min(TRAIN_SHARE, limit / len(rows))
    parts = []
    for label in (schema.REAL, schema.FAKE):
        own = rows[y == label]
        take = max(2, round(share * len(own)))
        parts.append(np.random.default_rng([seed, label]).permutation(own)[:take])
    return np.sort(np.concatenate(parts))


def _runs(
    name: str, recipe: Recipe, features: Features, train: str, missing: Sequence[tuple], options: dict
) -> tuple[str, str, list[Run], str]:
    """One contender on one generator with several seeds; each run is on disk as soon as it is done."""
    done: list[Run] = []
    y, generators = features.labels, train.split("+")
    train_rows, val_rows = (_rows(features, split, generators) for split in ("train", "val"))
    test = features.select(_rows(features, "test", options["test_generators"]))
    try:
        for seed, key, path in missing:
            start = time.perf_counter()
            drawn = _draw(train_rows, y[train_rows], seed, recipe.train_images)
            stop, rest = (val_rows[half] for half in split_validation(y[val_rows], seed=seed))
            scorer = recipe.build(seed)
            scorer.fit(features.select(drawn), features.select(stop))
            val, scores = scorer.decision_function(features.select(rest)), scorer.decision_function(test)
            seconds = round(time.perf_counter() - start, 3)
            run = Run(
                name,
                train,
                seed,
                val.tolist(),
                y[rest].tolist(),
                scores.tolist(),
                len(drawn),
                seconds,
                key,
                recipe.config,
            )
            run.calibrate(options)
            if path:
                write_json(path, asdict(run))
            done.append(run)
    except StoreError:
        raise  # a full disk stops all of them
    except Exception as error:  # whatever breaks in one contender must not cost the others
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return name, train, done, kind + one_line(error)
    return name, train, done, ""


def _reuse(path: Path | None, key: str, options: dict) -> Run | None:
    """Read the run kept in a file, if it is this very run; threshold and calibration are chosen anew."""
    if path is None or not key or not path.is_file():
        return None
    try:
        run = Run(**json.loads(path.read_text("utf-8"))).calibrate(options)
    except (OSError, ValueError, TypeError, InputError):
        return None  # damaged, or another version's file: done again and replaced
    return run if run.key == key else None


def _aligned(base: Features, other: Features, name: str) -> Features:
    """Bring the other features into the row order of the study's."""
    mine, theirs = (pd.Index(f.table[schema.PATH].astype(str)) for f in (base, other))
    where = theirs.get_indexer(mine)
    if len(missing := mine[where < 0]):
        raise InputError(
            f"the features of {name!r} lack {len(missing)} of the study's {len(mine)} images, the first is "
            f"{missing[0]}"
        )
    return other.select(where)


def _hash(features: Features) -> str:
    """Everything in features that a score can depend on."""
    arrays = {f.name: getattr(features, f.name) for f in fields(features)}
    parts = [f"{k} {v.shape} {array_hash(v)}" for k, v in arrays.items() if isinstance(v, np.ndarray)]
    parts.append(array_hash(features.objects["score"].to_numpy(float)) if len(features.objects) else "")
    columns = [schema.IMAGE_ID, schema.LABEL, schema.GENERATOR, schema.SPLIT, schema.CAPTION_LOGPROB]
    parts.append(features.table[columns].to_csv())
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
