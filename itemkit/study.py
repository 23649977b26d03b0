"""The study: every contender trained on each generator, tested on all, with honest thresholds and intervals.

Scores are computed once per (contender, train generator, seed) and kept, one JSON file per run. Everything
else (metrics, intervals, comparisons, fusion) is derived from those scores in seconds, see
`itemkit.results`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.utils.parallel import Parallel, delayed
from tqdm.auto import tqdm

import itemkit
from itemkit import schema
from itemkit._files import write_json
from itemkit.calibrate import split_validation
from itemkit.controls import CONTROLS, MisalignmentScorer, Scorer, get_control
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.metrics import METRICS
from itemkit.misalignment import RepresentationConfig, get_representation
from itemkit.results import FUSIONS, STUDY_METRICS, LateFusion, Run, Study, early_fusion, finish_run, run_name


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
    """Make a recipe of one of `itemkit.controls.CONTROLS`."""
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
    """Several recipes trained apart, their scores joined; see `itemkit.results.late_fusion`.

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


THRESHOLDS = ("fpr", "best")
TEST_COLUMNS = (schema.IMAGE_ID, schema.PATH, schema.LABEL, schema.GENERATOR, schema.SOURCE)


def train_on_test_on(
    features: Features,
    detectors: Mapping[str, Recipe | Callable[[int], Scorer]],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    train_generators: Sequence[str] | None = None,
    test_generators: Sequence[str] | None = None,
    train_fraction: float = 0.8,
    threshold: str = "fpr",
    fpr: float = 0.05,
    metrics: Sequence[str] = STUDY_METRICS,
    families: Mapping[str, str] | None = None,
    pair_by: str | None = None,
    n_boot: int = 200,
    level: float = 0.95,
    boot_seed: int = 0,
    out: str | Path | None = None,
    jobs: int = 1,
    progress: bool = False,
) -> Study:
    """Train every contender on real images and one generator, test it on every generator.

    For each train generator and seed: a random ``train_fraction`` of the training reals and fakes trains,
    one half of the validation images (reals and fakes of the same generator) stops the training, the other
    half sets threshold and calibration. Test images are scored once; nothing is chosen on them, and no image
    of an unseen generator is looked at before.

    Parameters
    ----------
    features : Features
        With the columns ``label``, ``generator`` and ``split`` (train, val, test).
    detectors : dict
        Name -> `Recipe` (see `item`, `control`, `early`, `late`, `external`), or a function from a seed to an
        untrained Scorer.
    seeds : ints
        Each draws other training images, another division of the validation images and another start.
    train_generators : names, optional
        Those with training images by default. "a+b" trains on both.
    test_generators : names, optional
        Those with test images by default.
    train_fraction : float
        Share of the training images drawn per seed, without replacement.
    threshold : {"fpr", "best"}
        For accuracies: the validation threshold at the false-positive rate ``fpr``, or the one with the best
        balanced accuracy on validation images.
    metrics : names
        Out of `itemkit.metrics.METRICS`.
    families : dict, optional
        Generator -> family. A test generator of a family trained on counts as seen: image-to-image with a
        flow is not unseen to a detector trained on that flow.
    pair_by : column, optional
        Judge each generator's fakes against the test reals that share this column ("source") instead of all.
    n_boot, level, boot_seed
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
        ``.table`` (long), ``.summary()``, ``.matrix()``, ``.compare()``, ``.fuse()``, ``.save()``.
    """
    recipes = {
        name: r if isinstance(r, Recipe) else Recipe(r, {"function": name}) for name, r in detectors.items()
    }
    if not recipes or not len(seeds):
        raise InputError(f"{len(recipes)} contenders and {len(seeds)} seeds; expected at least one of each")
    if threshold not in THRESHOLDS:
        raise InputError(f"threshold={threshold!r}: expected one of {', '.join(THRESHOLDS)}")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise InputError(f"unknown metric {unknown[0]!r}; expected one of {', '.join(METRICS)}")
    if not 0 < train_fraction <= 1:
        raise InputError(f"train_fraction={train_fraction}: expected more than 0 and at most 1")
    rows = _Rows(features)
    trains = list(train_generators or rows.generators("train"))
    tests = list(test_generators or rows.generators("test"))
    for name in trains:
        rows.require(name.split("+"), ("train", "val"))
    rows.require(tests, ("test",))
    options: dict = {
        "seeds": [int(seed) for seed in seeds], "detectors": list(recipes), "train_generators": trains,
        "test_generators": tests, "train_fraction": train_fraction, "threshold": threshold, "fpr": fpr,
        "metrics": list(metrics), "families": dict(families or {}), "pair_by": pair_by, "n_boot": n_boot,
        "level": level, "boot_seed": boot_seed,
    }  # fmt: skip
    test_rows = rows.of(tests, "test")
    folder = None if out is None else Path(out)
    if folder:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    # what all runs of a set of features share; threshold and metrics are derived later and not part of a run
    base = {"train_fraction": train_fraction, "tests": tests, "version": itemkit.__version__}
    hashes: dict[int, str] = {}
    found: dict[tuple[str, str, int], Run] = {}
    todo: list[tuple] = []
    for name, recipe in recipes.items():
        own = features if recipe.features is None else _aligned(features, recipe.features, name)
        if id(recipe.features) not in hashes:  # not id(own): an aligned copy may be freed and its id reused
            hashes[id(recipe.features)] = _hash_features(own)
        data = hashes[id(recipe.features)]
        about = base | {"data": data, "recipe": recipe.config, "limit": recipe.train_images}
        for train in trains:
            missing = []
            for seed in options["seeds"]:
                key = hashlib.sha256(
                    json.dumps([about, name, train, seed], sort_keys=True).encode()
                ).hexdigest()
                path = folder / "runs" / run_name(name, train, seed) if folder else None
                if run := _reuse(path, key, options):
                    found[name, train, seed] = run
                else:
                    missing.append((seed, key, path))
            if missing:
                todo.append((name, recipe, own, test_rows, rows, train, missing, options))
    reused = len(found)
    # one task is a contender on a generator with all its seeds, so that the features travel seldom
    work = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(_runs)(*task) for task in todo)
    total = len(recipes) * len(trains) * len(options["seeds"])
    with tqdm(total=total, initial=reused, disable=not progress, unit="run", dynamic_ncols=True) as bar:
        for done in work:
            found |= {(run.detector, run.train_generator, run.seed): run for run in done}
            bar.set_description(f"{done[0].detector} on {done[0].train_generator}")
            bar.update(len(done))
    runs = [found[name, train, seed] for name in recipes for train in trains for seed in options["seeds"]]
    columns = [c for c in TEST_COLUMNS if c in features.table] + ([pair_by] if pair_by else [])
    table = features.table.iloc[test_rows][list(dict.fromkeys(columns))].reset_index(drop=True)
    study = Study(table.astype({schema.LABEL: int}), runs, options | {"runs_reused": reused})
    if folder:
        study.save(folder)
    return study


class _Rows:
    """Positions of images by split and generator."""

    def __init__(self, features: Features) -> None:
        self.y = features.labels
        table = features.table
        if table[schema.SPLIT].isna().any():
            raise InputError(
                f"{int(table[schema.SPLIT].isna().sum())} of {len(table)} images have no split; "
                "expected train, val or test (see assign_splits)"
            )
        self.split = table[schema.SPLIT].to_numpy()
        self.generator = table[schema.GENERATOR].to_numpy()

    def generators(self, split: str) -> list[str]:
        found = dict.fromkeys(self.generator[(self.split == split) & (self.y == schema.FAKE)])
        if not found:
            raise InputError(
                f"no fake image has the split {split!r}; expected some in each of train, val and test"
            )
        return list(found)

    def of(self, generators: Sequence[str], split: str) -> np.ndarray:
        fake = (self.y == schema.FAKE) & np.isin(self.generator, list(generators))
        return np.flatnonzero((self.split == split) & (fake | (self.y == schema.REAL)))

    def require(self, generators: Sequence[str], splits: Sequence[str]) -> None:
        for split in splits:
            here = self.split == split
            if not (here & (self.y == schema.REAL)).any():
                raise InputError(f"no real image has the split {split!r}")
            for name in generators:
                if not (here & (self.y == schema.FAKE) & (self.generator == name)).any():
                    known = sorted(set(self.generator[self.y == schema.FAKE]))
                    raise InputError(
                        f"generator {name!r} has no fake image with the split {split!r}; "
                        f"generators: {', '.join(map(str, known))}"
                    )


def _draw(rows: np.ndarray, y: np.ndarray, seed: int, fraction: float, limit: int | None) -> np.ndarray:
    """Part of the training rows, without replacement; the same reals for every generator."""
    if limit is not None:
        fraction = min(fraction, limit / len(rows))
    parts = []
    for label in (schema.REAL, schema.FAKE):
        own = rows[y[rows] == label]
        take = max(2, round(fraction * len(own)))
        parts.append(np.random.default_rng([seed, label]).permutation(own)[:take])
    return np.sort(np.concatenate(parts))


def _runs(
    name: str,
    recipe: Recipe,
    features: Features,
    test_rows: np.ndarray,
    rows: _Rows,
    train: str,
    missing: Sequence[tuple[int, str, Path | None]],
    options: dict,
) -> list[Run]:
    """One contender on one generator with several seeds; each run is on disk as soon as it is done."""
    test, runs = features.select(test_rows), []
    for seed, key, path in missing:
        runs.append(_run(name, recipe, features, test, rows, train, seed, key, options))
        if path:
            write_json(path, asdict(runs[-1]))
    return runs


def _run(
    name: str,
    recipe: Recipe,
    features: Features,
    test: Features,
    rows: _Rows,
    train: str,
    seed: int,
    key: str,
    options: dict,
) -> Run:
    start = time.perf_counter()
    chosen = train.split("+")
    train_rows = _draw(rows.of(chosen, "train"), rows.y, seed, options["train_fraction"], recipe.train_images)
    val_rows = rows.of(chosen, "val")
    select, rest = split_validation(rows.y[val_rows], seed=seed)
    scorer = recipe.build(seed)
    scorer.fit(features.select(train_rows), features.select(val_rows[select]))
    val = scorer.decision_function(features.select(val_rows[rest]))
    scores = scorer.decision_function(test)
    labels = rows.y[val_rows[rest]]
    seconds = round(time.perf_counter() - start, 3)
    return finish_run(
        name, train, seed, val, scores, labels, options, recipe.config, len(train_rows), seconds, key
    )


def _reuse(path: Path | None, key: str, options: dict) -> Run | None:
    """Read the run kept in a file, if it is this very run; threshold and calibration are chosen anew."""
    if path is None or not path.is_file():
        return None
    try:
        old = Run(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return None  # another version's file: done again and replaced
    if old.key != key:
        return None
    scores = np.asarray(old.val_scores), np.asarray(old.test_scores), np.asarray(old.val_labels)
    where = (old.detector, old.train_generator, old.seed)
    return finish_run(*where, *scores, options, old.config, old.n_train, old.seconds, key)


def _aligned(base: Features, other: Features, name: str) -> Features:
    """Bring the other features into the row order of the study's."""
    mine, theirs = base.table[schema.PATH].astype(str), other.table[schema.PATH].astype(str)
    if mine.equals(theirs):
        return other
    where = dict(zip(theirs, range(len(theirs)), strict=True))
    missing = [path for path in mine if path not in where]
    if missing:
        raise InputError(
            f"the features of {name!r} lack {len(missing)} of the study's {len(mine)} images, the first is "
            f"{missing[0]}"
        )
    return other.select(np.array([where[path] for path in mine]))


def _hash_features(features: Features) -> str:
    digest = hashlib.sha256()
    arrays = [
        features.image_emb,
        features.caption_emb,
        features.region_emb,
        features.phrase_emb,
        features.owner,
    ]
    arrays += [features.objects["score"].to_numpy(float)] if len(features.objects) else []
    arrays += [features.pixels] if features.pixels is not None else []
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    columns = [schema.IMAGE_ID, schema.LABEL, schema.GENERATOR, schema.SPLIT, schema.CAPTION_LOGPROB]
    digest.update(features.table[columns].to_csv().encode())
    return digest.hexdigest()[:16]
