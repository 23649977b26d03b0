"""The matrix: every contender trained on each generator and tested on all, with honest thresholds.

Scores are computed once per contender, train generator and seed; what follows from them is `itemkit.results`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.parallel import Parallel, delayed
from tqdm.auto import tqdm

import itemkit
from itemkit import schema
from itemkit._files import write_json
from itemkit.errors import InputError, StoreError
from itemkit.features import FOUND, Features
from itemkit.metrics import METRICS
from itemkit.recipes import Recipe
from itemkit.results import IMAGE_COLUMNS, SHIFTED, STUDY_METRICS, Run, Study
from itemkit.splits import split_validation
from itemkit.text import count, did_you_mean, one_line

TRAIN_SHARE = 0.8  # of the training images, drawn without replacement for each seed
FPR = 0.05  # false-positive rate on validation images at which accuracies are given
FEW_SEEDS = 2  # on all families but one, and of a slow contender, which is not trained on these
# images of each class a split needs; half of val stops the training, the other half sets the threshold
LEAST = {"train": 2, "val": 2, "test": 1}


def train_on_test_on(
    features: Features,
    detectors: Mapping[str, Recipe],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    train_generators: Sequence[str] | None = None,
    test_generators: Sequence[str] | None = None,
    threshold: str = "fpr",
    metrics: Sequence[str] = STUDY_METRICS,
    families: Mapping[str, str] | None = None,
    leave_family_out: bool = False,
    pair_by: str | None = None,
    n_boot: int = 2000,
    out: str | Path | None = None,
    jobs: int = 1,
    progress: bool = False,
) -> Study:
    """Train every contender on real images and one generator, test it on every generator.

    For each training set and seed, 80 % of the training reals and fakes train, one half of the validation
    images (reals and fakes of the same generator) stops the training, the other half sets threshold and
    calibration. Nothing is chosen on test images, and no image of an unseen generator is looked at before.

    Parameters
    ----------
    features : Features
        Every image with label, generator and split.
    seeds : ints
        Each draws other training images, another division of the validation images and another start.
    train_generators, test_generators : names, optional
        By default those with enough images. "a+b" trains on both.
    leave_family_out : bool
        Also train on all train generators but those of one family, for each of three or more families, with
        the first `FEW_SEEDS` seeds.
    threshold : {"fpr", "best"}
        For accuracies, on validation images: 5 % false positives (NaN where too few can promise that), or the
        best balanced accuracy.
    metrics : names out of `itemkit.metrics.METRICS` and `itemkit.results.SHIFTED`
    families : dict, optional
        Generator -> family. A test generator of a family trained on counts as seen.
    pair_by : column, optional
        Judge each generator's fakes against the test reals that share this column ("source") instead of all.
    n_boot, jobs : int
        Bootstrap resamples of the test images, for AUROC (of other metrics at most 200); processes that train
        side by side.
    out : folder, optional
        Keep one JSON per run there, named by all that can change its scores, and reuse it.

    Returns
    -------
    Study
        Contenders that fail are left out; its options "failures" and "notes" say what is, and why.

    Raises
    ------
    InputError
        An option or a split does not fit, or no contender could be run.
    """
    if not detectors or not len(seeds):
        raise InputError(f"{len(detectors)} contenders and {len(seeds)} seeds; expected at least one of each")
    known = (*METRICS, *SHIFTED)
    if unknown := [*({threshold} - {"fpr", "best"}), *(name for name in metrics if name not in known)]:
        raise InputError(f"unknown {unknown[0]!r}; thresholds: fpr, best; metrics: {', '.join(known)}")
    trains, tests, notes = _generators(features.table, train_generators, test_generators)
    family = {name: (families or {}).get(name, name) for name in trains}
    sets = {name: name.split("+") for name in trains}
    if leave_family_out and len({*family.values()}) > 2:
        for left in dict.fromkeys(family.values()):
            sets[f"all but {left}"] = [name for name in trains if family[name] != left]
    options: dict[str, Any] = {
        "seeds": [int(seed) for seed in seeds], "train_generators": [*sets], "test_generators": tests,
        "training_sets": sets,
        "threshold": threshold, "fpr": FPR, "metrics": list(metrics), "families": dict(families or {}),
        "pair_by": pair_by, "n_boot": n_boot, "made_by": features.provenance,
        "titles": {name: recipe.title or name for name, recipe in detectors.items()},
    }  # fmt: skip
    folder = None if out is None else Path(out)
    few = count(len(seeds[:FEW_SEEDS]), "seed")
    notes += [f"Trained on all families but one: {few}."] if len(sets) > len(trains) else []
    slow = [options["titles"][name] for name, recipe in detectors.items() if recipe.slow]
    notes += [f"{title}: {few}, and no family left out, because it takes long." for title in slow]
    tasks, common = [], _hash(features)
    for name, recipe in detectors.items():
        own = features if recipe.features is None else _aligned(features, recipe.features, name)
        digest = common if own is features else _hash(own)
        # threshold and metrics are derived from kept scores and no part of the key
        about = [itemkit.__version__, digest, recipe.config, tests, TRAIN_SHARE]
        key = json.dumps(about, sort_keys=True)
        # one task is a contender on one training set with all its seeds, so that the features travel seldom;
        # who learns from reals alone learns the same on every set
        mine = [name for name in sets if name in trains or not recipe.slow]
        for some in [mine] if recipe.reals_only else [[train] for train in mine]:
            tasks.append(delayed(_runs)(name, recipe, own, some, key, folder, options))
    work = Parallel(n_jobs=jobs, return_as="generator")(tasks)
    done = list(tqdm(work, total=len(tasks), disable=not progress, dynamic_ncols=True))
    failures = {name: why for name, _, why in done if why}
    # a mean over fewer cells could not be compared with the others', so who fails once is out
    kept = [run for name, runs, _ in done if name not in failures for run in runs]
    if not kept:
        raise InputError("no contender could be run; {}, {}".format(*next(iter(failures.items()))))
    notes += [f"Accuracies are empty: {why}." for why in dict.fromkeys(run.withheld for run in kept) if why]
    options |= {"failures": failures, "notes": notes}
    images = features.table[IMAGE_COLUMNS].reset_index(drop=True)
    return Study(images.astype({schema.LABEL: int}), kept, options)


def _runs(
    name: str, recipe: Recipe, features: Features, trains: Sequence[str], key: str, folder: Path | None,
    options: dict,
) -> tuple[str, list[Run], str]:  # fmt: skip
    """One contender on training sets with every seed; each run is on disk as soon as it is done."""
    runs: list[Run] = []
    known: dict[int, np.ndarray] = {}
    try:
        for train, seed in product(trains, options["seeds"]):
            few = recipe.slow or len(options["training_sets"][train]) > train.count("+") + 1
            if few and seed not in options["seeds"][:FEW_SEEDS]:
                continue
            about = [key, name, train, options["training_sets"][train], seed]
            path = folder and folder / "runs" / f"{hashlib.sha256(str(about).encode()).hexdigest()[:32]}.json"
            if path and recipe.config and (kept := _kept(path, options)):
                runs.append(kept)
                continue
            runs.append(_run(name, recipe, features, train, seed, options, known))
            if path and recipe.config:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, asdict(runs[-1]))
    except StoreError:
        raise  # a full disk stops all of them
    except Exception as error:  # whatever breaks in one contender must not cost the others
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return name, runs, f"trained on {train}: {kind}{one_line(error)}"
    return name, runs, ""


def _run(
    name: str, recipe: Recipe, features: Features, train: str, seed: int, options: dict,
    known: dict[int, np.ndarray],
) -> Run:  # fmt: skip
    """Train one contender on one training set with one seed, and score the test images.

    ``known`` remembers, by seed, the scores of who learns from reals alone: they are the same in every set.
    """
    y, generators = features.labels, options["training_sets"][train]
    every, val = (_rows(features, split, generators) for split in ("train", "val"))
    own = [every[y[every] == label] for label in (schema.REAL, schema.FAKE)]
    # without replacement; the same reals for every generator
    drawn = [np.random.default_rng([seed, label]).permutation(part) for label, part in enumerate(own)]
    rows = np.sort(np.concatenate([part[: max(2, round(TRAIN_SHARE * len(part)))] for part in drawn]))
    stop, rest = (val[half] for half in split_validation(y[val], seed=seed))
    test = _rows(features, "test", options["test_generators"])
    if (scores := known.get(seed)) is None:
        scorer = recipe.build(seed)
        scorer.fit(features.select(rows), features.select(stop))
        all_val = np.flatnonzero((features.table[schema.SPLIT] == "val").to_numpy(bool))
        judged = np.r_[all_val if recipe.reals_only else rest, test]
        scores = np.full(len(features), np.nan)
        scores[judged] = scorer.decision_function(features.select(judged))
        if recipe.reals_only:
            known[seed] = scores
    # seven digits on disk and in memory alike: a run read back gives the same table to the last bit
    short = np.array([float(f"{value:.7g}") for value in scores.tolist()])
    about = (rest.tolist(), short[rest].tolist(), y[rest].tolist(), short[test].tolist())
    return Run(name, train, seed, *about).calibrate(options)


def _kept(path: Path, options: dict) -> Run | None:
    """Read a kept run; threshold and calibration are chosen anew."""
    with suppress(OSError, ValueError, TypeError):  # not there, or damaged
        return Run(**json.loads(path.read_text("utf-8"))).calibrate(options)
    return None


def _generators(
    table: pd.DataFrame, trains: Sequence[str] | None, tests: Sequence[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """Generators that train and that test, checked, and notes on those that cannot train."""
    if lacking := int((table[schema.SPLIT].isna() | table[schema.LABEL].isna()).sum()):
        raise InputError(f"{lacking} of {len(table)} images lack a label or a split")
    names = table[schema.GENERATOR].where(table[schema.LABEL] == schema.FAKE, schema.REAL_GENERATOR)
    known = [name for name in dict.fromkeys(names) if name != schema.REAL_GENERATOR]
    if not known:
        raise InputError("no image is fake")
    n = names.groupby([table[schema.SPLIT], names]).size()

    def lacks(name: str, *splits: str) -> str:
        for split in splits:
            if (there := int(n.get((split, name), 0))) < LEAST[split]:
                many = count(there, "image")
                return f"{many} of {name!r} in the split {split!r}; {LEAST[split]} or more are needed"
        return ""

    unfit = {name: why for name in known if (why := lacks(name, "train", "val"))}
    notes = [] if trains else [f"Nothing is trained on {name}: {why}." for name, why in unfit.items()]
    trains = list(trains or (name for name in known if name not in unfit))
    tests = list(tests or (name for name in known if not lacks(name, "test")))
    # where nothing is left, the first there is says why
    training = [(part, ("train", "val")) for name in trains or known[:1] for part in name.split("+")]
    testing = [(name, ("test",)) for name in tests or known[:1]]
    for name, splits in [(schema.REAL_GENERATOR, tuple(LEAST)), *training, *testing]:
        if reason := lacks(name, *splits):
            hint = did_you_mean(name, {*known} - {name})
            raise InputError(f"{reason}; generators: {', '.join(map(str, known))}.{hint}")
    return trains, tests, notes


def _rows(features: Features, split: str, generators: Sequence[str]) -> np.ndarray:
    """Positions of the reals of one split and of these generators' fakes."""
    table = features.table
    wanted = (table[schema.LABEL] == schema.REAL) | table[schema.GENERATOR].isin(generators)
    return np.flatnonzero((wanted & (table[schema.SPLIT] == split)).to_numpy(bool))


def _aligned(base: Features, other: Features, name: str) -> Features:
    """Bring the other features into the row order of the study's."""
    mine, theirs = (pd.Index(f.table[schema.PATH].astype(str)) for f in (base, other))
    where = theirs.get_indexer(mine)
    if len(missing := mine[where < 0]):
        raise InputError(f"the features of {name!r} lack {len(missing)} images, the first is {missing[0]}")
    return other.select(where)


def _hash(features: Features) -> str:
    """Everything in features that a score can depend on."""
    columns = [schema.IMAGE_ID, schema.LABEL, schema.GENERATOR, schema.SPLIT, schema.CAPTION_LOGPROB]
    digest = hashlib.sha256(features.table[columns].to_csv().encode("utf-8", "surrogateescape"))
    arrays = [array for array in vars(features).values() if isinstance(array, np.ndarray)]
    for array in (features.objects[["score", FOUND]].to_numpy(float), *arrays):
        digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
