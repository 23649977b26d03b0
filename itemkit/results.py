"""What follows from the scores of a study: metrics with intervals, comparisons, fusions, tables, a file.

One cell is a training set and a test generator. **Unseen cells** are those whose test generator is of a
family that is not in the training set: `Study.unseen`, in every table, in notebooks and in docs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from itemkit import schema
from itemkit._files import atomic_write
from itemkit.calibrate import (
    Calibrator,
    best_threshold,
    fit_calibrator,
    lacking,
    logit_shift,
    threshold_at_fpr,
)
from itemkit.errors import InputError
from itemkit.metrics import (
    LEVEL,
    METRICS,
    PROBABILITY_METRICS,
    holm,
    interval,
    p_value,
    replicate,
    resample,
)  # fmt: skip
from itemkit.protocols import Protocol
from itemkit.text import count, did_you_mean, markdown_table, one_line, printable

if TYPE_CHECKING:
    from itemkit.recipes import ExternalScores

# balanced accuracy where one number, from images of the tested set, shifts the log-odds: `logit_shift`
SHIFTED = {f"balanced_accuracy_{n or 'no'}_labels": n for n in (0, 20)}
STUDY_METRICS: tuple[str, ...] = (
    "ap", "auroc", "tpr_at_fpr01", "tpr_at_fpr05", "accuracy_real", "accuracy_fake", "accuracy_oracle",
    "balanced_accuracy", *SHIFTED, "balanced_accuracy_oracle", "ece",
)  # fmt: skip
BOOT_SEED = 0
RATES = ("tpr_at_fpr01", "tpr_at_fpr05")
FEW = 200  # resamples for the intervals of all but AUROC, whose mean over seeds takes one matrix product
MOST_RESAMPLES, MOST_ROWS = 20_000, 50_000_000  # that a file of scores may ask for, or hold
PAIR = ["train_generator", "test_generator"]
BY = ["detector", "train_generator", "seed"]  # what tells runs apart
SCORES = ("val_scores", "test_scores")  # what a run has
ONE, SEVERAL = "one generator", "several generators"
IMAGE_COLUMNS = [
    schema.IMAGE_ID, schema.PATH, schema.LABEL, schema.GENERATOR, schema.SOURCE, schema.SPLIT,
]  # fmt: skip
SCORE_COLUMNS = ["condition", *BY, *IMAGE_COLUMNS, "score"]


@dataclass
class Run:
    """Scores of one contender, trained on one training set with one seed."""

    detector: str
    train_generator: str
    seed: int
    val_rows: list[int]  # positions in ``Study.images`` of the half of the validation images that calibrates
    val_scores: list[float]
    val_labels: list[int]
    test_scores: list[float]  # of every test image, in the order of ``Study.test``
    threshold: float | None = None  # None where the validation images are too few
    withheld: str = ""  # why there is no threshold
    calibrator: Calibrator = Calibrator()  # from a score to p(fake)

    def calibrate(self, options: Mapping[str, Any]) -> Run:
        """Choose threshold and calibration on the validation scores; ``options`` as in `train_on_test_on`."""
        s, y = np.array(self.val_scores), np.array(self.val_labels)
        self.threshold, self.withheld = None, ""
        if options["threshold"] == "best":
            self.threshold = float(best_threshold(y, s))
        elif reason := lacking(options["fpr"], int((y == schema.REAL).sum()), schema.REAL):
            self.withheld = reason
        else:
            self.threshold = float(threshold_at_fpr(s[y == schema.REAL], options["fpr"]).value)
        self.calibrator = fit_calibrator(y, s, "platt")
        return self

    def shifted(self, y: np.ndarray, s: np.ndarray) -> dict[str, float]:
        """`SHIFTED` for the images of one cell; labelled ones are drawn by the seed and not judged."""
        rng, scale = np.random.default_rng(self.seed), self.calibrator.scale
        reals, fakes = (s[rng.permutation(np.flatnonzero(y == k))] for k in (schema.REAL, schema.FAKE))
        known, found = self.calibrator.logit(np.array(self.val_scores)), dict.fromkeys(SHIFTED, np.nan)
        for name, n in SHIFTED.items():
            k = n // 2
            if self.threshold is None or min(len(reals), len(fakes)) <= k:
                continue
            # without labels all images are taken, and the share of fakes is held to be known
            target = self.calibrator.logit(np.r_[reals[:k], fakes[:k]] if n else s)
            told = {"target_y": np.repeat([0, 1], k)} if n else {"share_fake": len(fakes) / len(s)}
            shift = logit_shift(known, np.array(self.val_labels), target, **told)
            least = self.threshold - (shift / scale if scale else 0)  # a constant has nothing to shift
            found[name] = (np.mean(reals[k:] <= least) + np.mean(fakes[k:] > least)) / 2
        return found


@dataclass
class Study:
    """Runs and what follows from them."""

    images: pd.DataFrame  # `IMAGE_COLUMNS`
    runs: list[Run]
    options: dict  # everything that was asked for, and ``made_by``, `Features.provenance`
    test: pd.DataFrame = field(init=False)  # the test images among them
    table: pd.DataFrame = field(init=False)
    """One row per contender, training set, test generator, seed and metric: ``detector, train_generator,
    training`` (`ONE` or `SEVERAL`), ``test_generator, seed, seen, n_real, n_fake, metric, value``."""

    def __post_init__(self) -> None:
        label, generator = self.images[schema.LABEL], self.images[schema.GENERATOR]
        plays = (label == schema.REAL) | generator.isin(self.options["test_generators"])
        self._tests = np.flatnonzero(plays & (self.images[schema.SPLIT] == "test"))
        self.test = self.images.iloc[self._tests]
        self.table = self._evaluate(self.runs)
        self._resampled: dict[tuple, np.ndarray] = {}  # what `_drawn` has found

    @property
    def detectors(self) -> list[str]:
        """Names of the contenders, in the order they were run."""
        return list(dict.fromkeys(run.detector for run in self.runs))

    def family(self, generator: str) -> str:
        """Family of a generator; by itself where none is named."""
        return self.options["families"].get(generator, generator)

    @cached_property
    def _cells(self) -> dict[str, np.ndarray]:
        """Test images of every generator: its fakes and the reals that they are judged against."""
        real, pair_by = (self.test[schema.LABEL] == schema.REAL).to_numpy(bool), self.options["pair_by"]
        cells = {}
        for name in self.options["test_generators"]:
            fake, mine = ~real & (self.test[schema.GENERATOR] == name).to_numpy(bool), real
            if pair_by:
                mine = real & self.test[pair_by].isin(set(self.test.loc[fake, pair_by])).to_numpy()
                if not mine.any():
                    raise InputError(f"no real test image shares its {pair_by} with the fakes of {name}")
            cells[name] = np.flatnonzero(fake | mine)
        return cells

    def _evaluate(self, runs: Sequence[Run]) -> pd.DataFrame:
        """Rows of `table` for some runs."""
        y, metrics, rows = self.test[schema.LABEL].to_numpy(int), self.options["metrics"], []
        weights = np.stack([np.bincount(mine, minlength=len(y)) for mine in self._cells.values()], axis=1)
        for run in runs:
            s, sets = np.asarray(run.test_scores), self.options["training_sets"][run.train_generator]
            every = replicate(y, s, weights, run.threshold, run.calibrator(s), True, metrics)
            families = {self.family(name) for name in sets}
            for i, (name, mine) in enumerate(self._cells.items()):
                found = {metric: float(values[i]) for metric, values in every.items()}
                seen = self.family(name) in families
                if not seen and not SHIFTED.keys().isdisjoint(metrics):
                    found |= run.shifted(y[mine], s[mine])
                n_fake = int(y[mine].sum())
                rows.append(
                    {"detector": run.detector, "train_generator": run.train_generator,
                     "training": SEVERAL if len(sets) > 1 else ONE, "test_generator": name, "seed": run.seed,
                     "seen": seen, "n_real": len(mine) - n_fake, "n_fake": n_fake}
                    | {metric: found.get(metric, np.nan) for metric in metrics}  # empty without a threshold
                )  # fmt: skip
        return pd.DataFrame(rows).melt([*rows[0]][: -len(metrics)], var_name="metric")

    @cached_property
    def _halves(self) -> np.ndarray:
        """Which of two halves each test image belongs to, by its content."""
        digests = (hashlib.sha256(name.encode()).digest() for name in self.test[schema.IMAGE_ID].astype(str))
        return np.array([digest[0] % 2 for digest in digests])

    @cached_property
    def _weights(self) -> np.ndarray:
        """How often each test image occurs, as it is and in every resample, shape (images, 1 + n_boot)."""
        # reals that are judged apart are drawn apart: a resample without a real of some cell has no AUROC
        pair_by, fake = self.options["pair_by"], self.test[schema.LABEL] == schema.FAKE
        real = self.test[pair_by].astype(str).radd("real ") if pair_by else schema.REAL_GENERATOR
        strata = self.test[schema.GENERATOR].where(fake, real).astype(str) + self._halves.astype(str)
        drawn = resample(strata.to_numpy(str), self.options["n_boot"], np.random.default_rng(BOOT_SEED))
        return np.c_[np.ones((len(drawn), 1), np.uint8), drawn]

    def _drawn(self, cells: pd.DataFrame, half: int | None = None) -> np.ndarray:
        """Mean over some rows of `table` of one metric, for the test images as they are and every resample.

        Of AUROC, the mean over runs is taken of who is above whom, so that all runs are resampled at once.
        """
        if cells.empty or cells["value"].isna().any() or cells["metric"].iloc[0] in SHIFTED:
            return np.full(1, np.nan)
        name, metric = cells[["detector", "metric"]].iloc[0]
        columns = 1 + (FEW if metric != "auroc" else self.options["n_boot"])
        key = (name, metric, half, *zip(*(cells[by] for by in (*PAIR, "seed")), strict=True))
        if key in self._resampled:  # comparisons and fusions come back to the same ones
            return self._resampled[key]
        known = {(run.train_generator, run.seed): run for run in self.runs if run.detector == name}
        y, total = self.test[schema.LABEL].to_numpy(int), np.zeros(1)
        for test, part in cells.groupby("test_generator", sort=False):
            runs = [known[key] for key in zip(part["train_generator"], part["seed"], strict=True)]
            mine = self._cells[test]
            mine = mine if half is None else mine[self._halves[mine] == half]
            if len(set(y[mine])) < 2:
                return np.full(1, np.nan)
            if metric != "auroc":
                for run in runs:
                    s, weights = np.asarray(run.test_scores)[mine], self._weights[mine, :columns]
                    about = (run.threshold, run.calibrator(s), True, (metric,))
                    total = total + replicate(y[mine], s, weights, *about)[metric]
                continue
            fakes, reals = mine[y[mine] == schema.FAKE], mine[y[mine] == schema.REAL]
            weights, won = self._weights[reals, :columns].astype(np.float32), np.zeros(1)
            for some in np.array_split(fakes, 1 + len(fakes) * len(reals) // 4_000_000):  # bounds the memory
                above = np.zeros((len(some), len(reals)), np.float32)
                for s in (np.asarray(run.test_scores) for run in runs):
                    above += np.sign(s[some, None] - s[reals])
                won = won + np.sum((above @ weights) * self._weights[some, :columns], axis=0, dtype=float)
            total = total + len(runs) / 2 + won / (2 * len(fakes) * len(reals))
        self._resampled[key] = total / len(cells)
        return self._resampled[key]

    def cells(self, detector: str, metric: str, training: str | None = None) -> pd.DataFrame:
        """Rows of `table` of one contender and metric, and of training sets of one kind if one is named."""
        failed = self.options["failures"]
        for name, known in ((detector, self.detectors), (metric, self.options["metrics"])):
            if name not in known:
                why = f" It failed, {failed[name]}" if name in failed else did_you_mean(name, known)
                raise InputError(f"no {name!r} in this study; there are {', '.join(known)}.{why}")
        table = self.table[(self.table["metric"] == metric) & (self.table["detector"] == detector)]
        return table if training is None else table[table["training"] == training]

    def unseen(self, detector: str, metric: str, training: str | None = None) -> pd.DataFrame:
        """Those of `cells` whose test generator is of a family that is not in the training set."""
        cells = self.cells(detector, metric, training)
        return cells[~cells["seen"]]

    def mean(self, cells: pd.DataFrame) -> dict[str, float]:
        """Mean over some rows of `table` of one contender and metric, and how sure it is.

        ``low, high``: 95 % by bootstrap over the test images, all rows resampled together, "n_boot" times for
        AUROC and `FEW` times else. ``family_low, family_high, family_sd, n_families``: lowest, highest and
        standard deviation of the means of each tested family, where there are two or more. ``seed_sd,
        n_seeds``: over seeds. ``n_cells``.
        """
        found = self.means(cells, ["detector", "metric"]).iloc[:, 2:].reindex([0]).to_dict("records")[0]
        low, high = self._interval(cells)
        return {"value": found.pop("value"), "low": low, "high": high, **found}

    def means(self, rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
        """What `mean` says of each group of rows of `table`, but for the interval."""
        by, rows = list(by), rows.assign(family=rows["test_generator"].map(self.family))
        family, seed = (
            rows.groupby([*by, name], sort=False)["value"].mean().groupby(by, sort=False)
            for name in ("family", "seed")
        )
        spread = family.agg(family_low="min", family_high="max", family_sd="std", n_families="size")
        spread.loc[spread["n_families"] == 1, ["family_low", "family_high"]] = np.nan
        cells = rows.drop_duplicates([*by, *PAIR]).groupby(by, sort=False).size().rename("n_cells")
        mean = rows.groupby(by, sort=False)["value"].mean().to_frame()
        return mean.join([spread, seed.agg(seed_sd="std", n_seeds="size"), cells]).reset_index()

    def _interval(self, cells: pd.DataFrame) -> tuple[float, float]:
        return interval(self._drawn(cells)[1:], next(iter(cells["metric"]), ""), cells["value"].mean())

    def worst(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Those of the rows that belong to the weakest cell, by the mean over seeds."""
        by_cell = cells.groupby(PAIR, sort=False)["value"].mean().dropna()
        if by_cell.empty:
            return cells[:0]
        at = by_cell.idxmax() if cells["metric"].iloc[0] in PROBABILITY_METRICS else by_cell.idxmin()
        return cells[(cells[PAIR] == at).all(axis=1)]

    def compare(self, reference: str, metric: str = "auroc", training: str | None = None) -> pd.DataFrame:
        """Paired comparison of one contender with all others: difference of the means over unseen cells.

        Columns: ``reference, other, metric, difference, low, high, p_value, p_holm, seed_sd``; positive: the
        reference has the larger value. Intervals and p by bootstrap over the test images, the same resamples
        for both; ``p_holm`` corrects for the number of rows. No p is below 2 / (n_boot + 1).
        """
        mine, rows = self.unseen(reference, metric, training), []
        runs = pd.MultiIndex.from_frame(mine[[*PAIR, "seed"]])
        for other in self.detectors:
            if other == reference:
                continue
            theirs = self.unseen(other, metric, training)
            # a slow contender has fewer seeds and training sets: the same runs of both
            there = pd.MultiIndex.from_frame(theirs[[*PAIR, "seed"]])
            if not len(both := runs.intersection(there)):
                continue
            ours, theirs = mine[runs.isin(both)], theirs[there.isin(both)]
            gap = ours.groupby("seed")["value"].mean() - theirs.groupby("seed")["value"].mean()
            drawn = (self._drawn(ours) - self._drawn(theirs))[1:]
            low, high = interval(drawn)
            rows.append(
                {"reference": reference, "other": other, "metric": metric, "difference": gap.mean(),
                 "low": low, "high": high, "p_value": p_value(drawn), "p_holm": np.nan, "seed_sd": gap.std()}
            )  # fmt: skip
        names = "reference, other, metric, difference, low, high, p_value, p_holm, seed_sd"
        table = pd.DataFrame(rows, columns=names.split(", "))
        return table.assign(p_holm=holm(table["p_value"].to_numpy()))

    def fuse(self, name: str, parts: Sequence[str]) -> Study:
        """Add a late fusion: the mean of the log-odds of contenders that were run; returns itself.

        Each is calibrated on the validation images so that none speaks louder.
        """
        for part in parts:
            self.cells(part, self.options["metrics"][0])  # complains about an unknown name
        runs = [[run for run in self.runs if run.detector == part] for part in parts]
        scores = (
            [np.mean([run.calibrator.logit(getattr(run, which)) for run in mine], axis=0) for which in SCORES]
            for mine in zip(*runs, strict=True)
        )
        self._add(name, f"fusion, late: {name}", runs[0], scores)
        self.options["fused"] = {**self.options.get("fused", {}), name: list(parts)}
        return self

    def _add(
        self, name: str, title: str, like: Iterable[Run], scores: Iterable[Sequence[np.ndarray]]
    ) -> None:
        """Add a contender by its scores of the validation and test images, for runs with the same images."""
        if name in self.detectors:
            raise InputError(f"the study has a contender {name!r} already; choose another name")
        new = [
            replace(run, detector=name, val_scores=val.tolist(), test_scores=test.tolist())
            for run, (val, test) in zip(like, scores, strict=True)
        ]
        self.options["titles"] |= {name: title}
        new = [run.calibrate(self.options) for run in new]
        self.table = pd.concat([self.table, self._evaluate(new)], ignore_index=True)
        self.runs += new

    def fusion_gain(self, fused: str, parts: Sequence[str], training: str | None = None) -> pd.DataFrame:
        """Is the fusion's AUROC ever below that of the better of its parts? One row per unseen cell.

        The better part is chosen on one half of the test images and judged on the other, then the other way
        round; halves follow the images' content. Columns: ``train_generator, test_generator, best_part``
        (both, where the halves differ), ``fused, best, difference, low, high, p_value, p_holm``, means over
        halves and seeds; intervals and p as in `compare`; sorted by difference.
        """
        rows = []
        cells = {n: dict(list(self.unseen(n, "auroc", training).groupby(PAIR))) for n in (fused, *parts)}
        for pair in cells[fused]:
            drawn = {n: [self._drawn(of[pair], half) for half in (0, 1)] for n, of in cells.items()}
            best = [max(parts, key=lambda name: drawn[name][half][0]) for half in (1, 0)]
            value, least = ((drawn[a][0] + drawn[b][1]) / 2 for a, b in ((fused, fused), best))
            gap, names = value - least, " / ".join(dict.fromkeys(best))
            rows.append((*pair, names, value[0], least[0], gap[0], *interval(gap[1:]), p_value(gap[1:])))
        columns = [*PAIR, "best_part", "fused", "best", "difference", "low", "high", "p_value"]
        table = pd.DataFrame(rows, columns=columns).sort_values("difference", ignore_index=True)
        return table.assign(p_holm=holm(table["p_value"].to_numpy()))

    def unsure(
        self, parts: Sequence[str], novelty: str, training: str | None = None, share: float = 0.1
    ) -> pd.DataFrame:
        """Give no answer where two parts disagree and the image is novel; what is gained on the others.

        Disagreement is how far the two log-odds lie apart; both it and the score of ``novelty`` must be above
        what a ``share`` of the validation reals have. One row per unseen cell, means over seeds:
        ``train_generator, test_generator``, AUROC of the mean log-odds on ``all`` images and on those
        ``answered``, and which share of reals and fakes is not: ``unsure_real, unsure_fake``.
        """
        known = {(run.detector, run.train_generator, run.seed): run for run in self.runs}
        y, rows = self.test[schema.LABEL].to_numpy(int), []
        for key, part in self.unseen(parts[0], "auroc", training).groupby(["train_generator", "seed"]):
            first, second, third = (known[name, *key] for name in (*parts, novelty))
            measures = []
            for which in SCORES:
                a, b = (run.calibrator.logit(np.array(getattr(run, which))) for run in (first, second))
                measures.append(np.stack([np.abs(a - b), getattr(third, which)]))
            real = np.array(first.val_labels) == schema.REAL
            usual = np.quantile(measures[0][:, real], 1 - share, axis=1)
            silent = (measures[1] > usual[:, None]).all(axis=0)
            for test in part["test_generator"]:
                mine = self._cells[test]
                answered, fake = mine[~silent[mine]], y[mine] == schema.FAKE
                auroc = [
                    roc_auc_score(y[at], (a + b)[at]) if len(set(y[at])) == 2 else np.nan
                    for at in (mine, answered)
                ]
                rows.append((key[0], test, *auroc, silent[mine][~fake].mean(), silent[mine][fake].mean()))
        columns = [*PAIR, "all", "answered", "unsure_real", "unsure_fake"]
        return pd.DataFrame(rows, columns=columns).groupby(PAIR, sort=False).mean().reset_index()

    def join(self, name: str, theirs: ExternalScores) -> Study:
        """Add a detector that ran elsewhere; returns itself."""
        like = {(run.train_generator, run.seed): run for run in self.runs}.values()  # who has the same images
        rows = np.unique(np.concatenate([self._tests, *(run.val_rows for run in like)]))
        scores = np.full(len(self.images), np.nan)
        scores[rows] = theirs.of(self.images.iloc[rows])
        self._add(
            name, f"{name} (scores from elsewhere)", like,
            ((scores[run.val_rows], scores[self._tests]) for run in like),
        )  # fmt: skip
        return self


def save_scores(studies: Mapping[str, Study], path: Path) -> Path:
    """Write every score of the studies of several conditions as one Parquet file; `read_scores` reads it.

    One row per condition, contender, training set, seed and image: ``condition, detector, train_generator,
    seed, score``, and ``image_id, path, label, generator, source, split`` of the image (paths without the
    folder that all share). Scores have as few binary digits as leave the AUROC as it is to 0.0001. Late
    fusions are made again on reading. What a study was asked for lies in the file's metadata.
    """
    tables = []
    for condition, study in studies.items():
        top = os.path.commonpath([os.path.dirname(name) for name in study.images[schema.PATH]])
        named = [os.path.relpath(name, top or None) for name in study.images[schema.PATH]]
        images = study.images.assign(path=named)
        images = images.astype(dict.fromkeys(images.select_dtypes(exclude="number"), "category"))
        for run in study.runs:
            if run.detector not in study.options.get("fused", {}):
                part = images.iloc[np.r_[run.val_rows, study._tests]]
                score = _short(part[schema.LABEL].to_numpy(), np.r_[run.val_scores, run.test_scores])
                about = {"condition": condition} | {name: getattr(run, name) for name in BY}
                tables.append(part.assign(**about, score=score))
    table = pd.concat(tables, ignore_index=True)[SCORE_COLUMNS]
    texts = table.select_dtypes(exclude="number").astype("category")  # with those of images that only train
    table = table.assign(**{name: texts[name].cat.remove_unused_categories() for name in texts})
    table.attrs["studies"] = {condition: study.options for condition, study in studies.items()}
    content = table.to_parquet(
        index=False, compression="zstd", compression_level=19, use_dictionary=SCORE_COLUMNS[:-1],
        column_encoding={"score": "BYTE_STREAM_SPLIT"}, row_group_size=MOST_ROWS,
    )  # fmt: skip
    atomic_write(path, content)
    return path


def _short(y: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Scores with few binary digits, which compress to a third; with more where ties would change AUROC."""
    if (s == s.astype(np.float32)).all():  # they come from such a file: written again, it is the same
        return s.astype(np.float32)
    fake = y == schema.FAKE
    rank, least = rankdata(s)[fake].mean(), 1e-4 * np.sum(~fake)  # AUROC: this mean, by the number of reals
    for digits in range(7, 24):
        step = 2.0 ** (np.floor(np.log2(s.std() or 1)) - digits)
        short = (np.round(s / step) * step).astype(np.float32)
        if abs(rankdata(short)[fake].mean() - rank) < least:
            return short
    return s.astype(np.float32)


def read_scores(path: str | Path, detectors: Sequence[str] | None = None) -> dict[str, Study]:
    """Studies of several conditions from a file of `save_scores`: every table again, without any model.

    The file may come from anybody: what a study cannot have is refused before anything is computed.
    ``detectors`` are the contenders to be read, all by default.
    """
    try:
        if (n := pq.read_metadata(path).num_rows) > MOST_ROWS:
            raise ValueError(f"{n:,} rows; at most {MOST_ROWS:,} are read")
        some = None if detectors is None else [("detector", "in", list(detectors))]
        table = pd.read_parquet(path, columns=SCORE_COLUMNS, filters=some)
        asked = _shown(table.attrs.pop("studies"))
        wrong = [name for name in SCORE_COLUMNS if table[name].isna().any()]
        if wrong or not np.isfinite(table["score"]).all() or not set(table["label"]) <= {0, 1}:
            raise ValueError(f"{wrong or 'a score or label'} is missing or not a number that it can be")
        if other := sorted({*table["split"]} - {"val", "test"}):
            raise ValueError(f"images of the split {other[0]!r}; expected val and test")
        texts = table.select_dtypes(exclude="number").columns
        table = table.assign(**{name: table[name].astype("category") for name in texts})
        return {name: _study(table[table["condition"] == name], options) for name, options in asked.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        expected = "expected a file that `itemkit study` wrote"
        raise InputError(f"cannot read the scores of a study from {path}: {what}; {expected}") from error


def _shown(asked: Any) -> Any:
    """What a file says of itself, with texts that can act on no terminal and begin no new line."""
    if isinstance(asked, dict):
        return {printable(key): _shown(value) for key, value in asked.items()}
    if isinstance(asked, list):
        return [_shown(value) for value in asked]
    return printable(asked) if isinstance(asked, str) else asked


def _study(table: pd.DataFrame, options: dict) -> Study:
    if not 0 <= int(options["n_boot"]) <= MOST_RESAMPLES:
        raise ValueError(f"n_boot={options['n_boot']}; expected at most {MOST_RESAMPLES}")
    if unknown := [name for name in options["metrics"] if name not in (*METRICS, *SHIFTED)]:
        raise ValueError(f"unknown metric {unknown[0]!r}")
    images = table[IMAGE_COLUMNS].drop_duplicates(schema.PATH).reset_index(drop=True)
    images = images.astype({name: object for name in IMAGE_COLUMNS if name != schema.LABEL})
    fused, runs = options.pop("fused", {}), []
    tests = np.flatnonzero(images[schema.SPLIT] == "test")
    path = table[schema.PATH].cat
    at = pd.Index(images[schema.PATH]).get_indexer(path.categories)[path.codes]
    table = table.assign(at=at, val=(table[schema.SPLIT] == "val").to_numpy())
    for key, part in table.groupby(BY, sort=False, observed=True):
        val, rows, scores = (part[name].to_numpy() for name in ("val", "at", "score"))
        scores = scores.astype(float)
        if not np.array_equal(rows[~val], tests):
            raise ValueError(f"the test images of {key[0]}, trained on {key[1]}, are not those of the others")
        if str(key[1]) not in options["training_sets"] or str(key[0]) not in options["titles"]:
            raise ValueError(f"nothing is told about {key[0]}, trained on {key[1]}")
        labels = part[schema.LABEL].to_numpy(int)[val].tolist()
        if len({*labels}) < 2:
            raise ValueError(f"{key[0]}, trained on {key[1]}, lacks validation images of a class")
        known = (rows[val].tolist(), scores[val].tolist(), labels)
        run = Run(str(key[0]), str(key[1]), int(key[2]), *known, scores[~val].tolist())
        runs.append(run.calibrate(options))
    study = Study(images, runs, options)
    for name, parts in fused.items():
        if {*parts} <= {*study.detectors}:
            study.fuse(name, parts)
    return study


MEAN, WORST = "mean of cells", "worst cell"
OURS, THEIRS = "ours", "published, not ours"
OVER = f"{LEVEL:.0%} over images"
COLUMNS = [
    "kind", "condition", "detector", "title", "metric", "training", "row", "seen", "value", "low", "high",
    "interval", "family_low", "family_high", "family_sd", "n_families", "seed_sd", "n_seeds", "n_cells",
    "where", "n_real", "n_fake", "preset", "models", "itemkit", "note",
]  # fmt: skip
SHOWN = {
    "auroc": "AUROC",
    "accuracy": "Accuracy",
    "ap": "AP",
    "tpr_at_fpr05": "TPR at 5 % FPR",
    "tpr_at_fpr01": "TPR at 1 % FPR",
}
AT_THRESHOLDS = {
    "accuracy_real": "of real",
    "accuracy_fake": "of fake",
    "accuracy": "all",
    "accuracy_oracle": "all, oracle",
    "balanced_accuracy": "balanced",
    "balanced_accuracy_no_labels": "shifted, no labels",
    "balanced_accuracy_20_labels": "shifted, 20 labels",
    "balanced_accuracy_oracle": "balanced, oracle",
}
ABOUT = f"""\
A cell is a training set and a test generator; **unseen**: of a family that is not in the training set. In \
brackets {OVER}: the same images drawn anew, not other families. Families: lowest and highest mean of a \
tested family, and standard deviation. ±: standard deviation over seeds. The worst cell is chosen on the \
images that it is judged on. TPR at a FPR: at the threshold that these test reals would have asked for."""
THRESHOLDS = """\
Accuracies. Without a remark: at the threshold from validation images. Shifted: one number is added to all \
log-odds, chosen on images of the tested set: so that their median is that of the validation images mixed in \
the same shares (no labels, shares known), or by likelihood on a few labelled ones, which are not judged. \
Oracle: at the best threshold for the test images, a bound and not a result."""


def study_table(studies: Mapping[str, Study], protocol: Protocol) -> pd.DataFrame:
    """Join the studies of several conditions and the published numbers into one long table.

    Where the protocol names its training set, all cells count, as in the published means. Where every
    generator trains in turn, the unseen cells do, or all where there are none.

    Returns
    -------
    DataFrame
        `COLUMNS`: ``row`` is a cell, "mean of cells" or "worst cell", ``where`` which cell is the worst,
        ``seen`` whether one of the tested family was trained on, ``value`` a share, the mean over seeds,
        ``low, high`` its ``interval``, the others as in `Study.mean`.
    """
    tables = []
    for condition, study in studies.items():
        lines = _lines(study, protocol)
        about = {"kind": OURS, "condition": condition, "interval": OVER} | study.options["made_by"]
        tables.append(lines.assign(title=lines["detector"].map(study.options["titles"]), **about))
    for given in protocol.published:
        about = {"kind": THEIRS, "condition": given["condition"], "metric": given["metric"], "row": MEAN}
        names, values = zip(*given["values"], strict=True)
        theirs = pd.DataFrame({"detector": names, "title": names, "value": np.array(values) / 100})
        tables.append(theirs.assign(where=given["what"], **about))
    return pd.concat(tables, ignore_index=True).reindex(columns=COLUMNS)


def _lines(study: Study, protocol: Protocol) -> pd.DataFrame:
    """Every cell; of every contender, metric and kind of training set the mean of cells and the worst."""
    by, runs = ["metric", "detector", "training"], study.table
    row = runs["test_generator"].map(lambda name: protocol.test.get(name, name))
    row = row if protocol.train else runs["train_generator"] + " → " + row
    counts = ~runs["seen"] | runs.groupby(by)["seen"].transform("all") | bool(protocol.train)
    runs = runs.assign(row=row, counts=counts)
    cells = study.means(runs, [*by, *PAIR, "row", "seen", "counts", "n_real", "n_fake"]).assign(where="")
    counted = runs[runs["counts"]]
    mean = study.means(counted, by).assign(row=MEAN, where="")
    known = cells[cells["counts"] & cells["value"].notna()]
    badness = known["value"].where(known["metric"].isin(PROBABILITY_METRICS), -known["value"])
    worst = known.loc[badness.groupby([known[name] for name in by], sort=False).idxmax()]
    summed = pd.concat([mean, worst.assign(where=worst["row"], row=WORST)], ignore_index=True)
    for key, part in counted.groupby(by, sort=False):
        if key[0] in (protocol.metric, "auroc"):  # the others' are in `headline`, or asked for
            mine = (summed[by] == key).all(axis=1)
            for name, cells_of in ((MEAN, part), (WORST, study.worst(part))):
                summed.loc[mine & (summed["row"] == name), ["low", "high"]] = study._interval(cells_of)
    return pd.concat([cells, summed], ignore_index=True)


def headline(studies: Mapping[str, Study], names: Sequence[str]) -> pd.DataFrame:
    """Some contenders in a table that fits a page: `ONE`, unseen cells, AUROC unless another metric is named.

    Columns, of every condition: mean and worst cell, each with its interval over images; of the first one
    also lowest and highest family, and TPR at 1 % and 5 % FPR.
    """
    rows: dict[str, dict[str, str]] = {}
    for condition, study in studies.items():
        for name in (name for name in names if name in study.detectors):
            cells = study.unseen(name, "auroc", ONE)
            cells = cells if len(cells) else study.cells(name, "auroc", ONE)
            mean, worst = study.mean(cells), study.mean(study.worst(cells))
            found = {"mean": _share(mean), "worst cell": _share(worst)}
            if condition == next(iter(studies)):
                found["families"] = "{family_low:.2f}-{family_high:.2f}".format(**mean)
                for metric in RATES:
                    part = study.cells(name, metric, ONE)
                    part = part[part["seen"] == cells["seen"].iloc[0]]
                    found[SHOWN[metric]] = _share(study.mean(part))
            row = rows.setdefault(study.options["titles"][name], {})
            row |= {f"{condition}: {what}": text for what, text in found.items()}
    return pd.DataFrame.from_dict(rows, "index").rename_axis("detector").reset_index().fillna("")


def _share(mean: Mapping[str, float]) -> str:
    return "{value:.2f} ({low:.2f}-{high:.2f})".format(**mean)


def fusion_table(
    studies: Mapping[str, Study], fusions: Mapping[str, Sequence[str]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Is a fusion ever worse than the better of its parts? By the AUROC of unseen cells, trained on `ONE`.

    Parameters
    ----------
    fusions : dict
        Contender -> its parts; those that are not in a study are left out.

    Returns
    -------
    One row per condition and fusion: ``condition, fusion, title, parts, mean, low, high, worst, worst_low,
    worst_high, n_cells``, how many are ``below`` the better part, ``beyond`` the interval of the difference,
    below ``after_holm``, and the ``largest_loss`` in the cell ``where``. And `Study.fusion_gain` of all.
    """
    rows, gains = [], []
    for condition, study in studies.items():
        for name, parts in fusions.items():
            if not {name, *parts} <= {*study.detectors}:
                continue
            about = {"condition": condition, "fusion": name, "title": study.options["titles"][name]}
            gain, cells = study.fusion_gain(name, parts, ONE), study.unseen(name, "auroc", ONE)
            if gain.empty:
                continue
            mean, worst, least = study.mean(cells), study.mean(study.worst(cells)), gain.iloc[0]
            gains.append(gain.assign(**about))
            rows.append(
                about | {"parts": ", ".join(parts), "mean": mean["value"], "low": mean["low"],
                         "high": mean["high"], "worst": worst["value"], "worst_low": worst["low"],
                         "worst_high": worst["high"], "n_cells": len(gain),
                         "below": int((gain["difference"] < 0).sum()),
                         "beyond": int((gain["high"] < 0).sum()),
                         "after_holm": int(((gain["difference"] < 0) & (gain["p_holm"] < 0.05)).sum()),
                         "largest_loss": max(-least["difference"], 0.0),
                         "where": f"{least['train_generator']} → {least['test_generator']}"}
            )  # fmt: skip
    return pd.DataFrame(rows), pd.concat(gains, ignore_index=True) if gains else pd.DataFrame()


def to_markdown(
    table: pd.DataFrame, studies: Mapping[str, Study], protocol: Protocol, notes: Sequence[str] = (),
    by_cell: Sequence[str] = (), sections: Sequence[str] = (),
) -> str:  # fmt: skip
    """Print a `study_table`: ``notes``, ``sections``, every condition's means and worst cells, each cell.

    The latter of the contenders ``by_cell`` only, if any is named; `study_table` has all.
    """
    study = next(iter(studies.values()))
    made, seeds, y = study.options["made_by"], study.options["seeds"], study.test[schema.LABEL]
    paragraphs = [
        f"# {protocol.title}",
        *notes,
        f"**Note: {made['note']}**" if made["note"] else "",
        f"Made by itemkit {made['itemkit']} with preset {made['preset'] or 'none'}, models "
        f"{made['models'] or 'unknown'}; {(y == schema.REAL).sum():,} real and {(y == schema.FAKE).sum():,} "
        f"fake test images; values in per cent, means over {count(len(seeds), 'seed')}; "
        f"{study.options['n_boot']} resamples for AUROC, at most {FEW} for the rest.",
        ABOUT,
        "\n".join(sections).strip(),
    ]
    first = [protocol.metric, *(metric for metric in SHOWN if metric != protocol.metric)]
    for (condition, training), part in table[table["kind"] == OURS].groupby(
        ["condition", "training"], sort=False
    ):
        n = part.loc[part["row"] == MEAN, ["n_cells", "n_families"]].iloc[0]
        unseen = "" if protocol.train else "unseen "
        cells = f"{unseen}cells: {n['n_cells']:.0f}, families: {n['n_families']:.0f}"
        theirs = table[(table["kind"] == THEIRS) & (table["condition"] == condition)]
        paragraphs += [f"## {condition}, trained on {training}: {cells}", _table(part, first, theirs)]
        paragraphs += [THRESHOLDS, _table(part, list(AT_THRESHOLDS))]
    left = table[(table["kind"] == THEIRS) & ~table["condition"].isin(list(studies))]
    for (condition, what), part in left.groupby(["condition", "where"], sort=False):
        values = ", ".join(f"{row.title} {100 * row.value:.1f}" for row in part.itertuples())
        paragraphs += [f"PUBLISHED, NOT OURS, {condition} ({what}): {values}."]
    shown = table[table["detector"].isin(by_cell)] if by_cell else table
    paragraphs += [f"## Cell by cell: {SHOWN[protocol.metric]}", *_by_cell(shown, protocol)]
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def _percent(row: Mapping, interval: bool = True) -> str:
    if pd.isna(row["value"]):
        return "-"
    text = f"{100 * row['value']:.1f}"
    if interval and pd.notna(row["low"]):
        text += f" ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
    return text


def _table(part: pd.DataFrame, metrics: Sequence[str], published: pd.DataFrame | None = None) -> str:
    """A line for each contender; of a first metric that is shown alone also families and the worst cell."""
    titles, lines = SHOWN | AT_THRESHOLDS, dict[Any, dict[str, str]]()
    for row in part[part["row"].isin([MEAN, WORST])].to_dict("records"):
        line = lines.setdefault(row["title"], {"detector": row["title"]})
        leads = row["metric"] == metrics[0] and published is not None
        if row["row"] == WORST and leads:
            line["worst cell"] = f"{_percent(row)} {row['where']}"
        elif row["row"] == MEAN and row["metric"] in metrics:
            line[titles[row["metric"]]] = _percent(row, published is not None)
            if leads and pd.notna(row["seed_sd"]):
                line[titles[row["metric"]]] += f" ± {100 * row['seed_sd']:.1f}"
            if leads and pd.notna(row["family_low"]):
                spread = (100 * row[f"family_{end}"] for end in ("low", "high", "sd"))
                line["families"] = "{:.1f}-{:.1f} (sd {:.1f})".format(*spread)
    for row in [] if published is None else published.to_dict("records"):
        line = {"detector": f"PUBLISHED, NOT OURS: {row['title']}", titles[row["metric"]]: _percent(row)}
        lines[row["title"], row["where"]] = line | {"worst cell": row["where"]}
    order = ["detector", titles[metrics[0]], "families", "worst cell", *map(titles.get, metrics[1:])]
    shown = pd.DataFrame(list(lines.values()))
    return "\n".join(markdown_table(shown[[name for name in order if name in shown]]))


def _by_cell(table: pd.DataFrame, protocol: Protocol) -> list[str]:
    """A line for each cell, a column for each contender, with the values of all conditions."""
    part = table[(table["metric"] == protocol.metric) & (table["kind"] == OURS)]
    conditions, summed = list(dict.fromkeys(part["condition"])), part["row"].isin([MEAN, WORST])
    which = ", " + part["training"] if part["training"].nunique() > 1 else ""
    # unseen cells first, then mean and worst, then what the training sets' own families give
    seen = part["seen"].eq(True) & ~summed & (not protocol.train)
    part = part.assign(
        cell=part["row"] + np.where(seen, " (seen)", "") + np.where(summed, which, ""),
        rank=np.select([seen, part["row"] == MEAN, part["row"] == WORST], [3, 1, 2], 0),
        text=[_percent(row, False) for row in part.to_dict("records")],
    )
    text = part.set_index(["cell", "title", "condition"])["text"].to_dict()
    lines = [
        {"cell": cell}
        | {title: " / ".join(text.get((cell, title, c), "-") for c in conditions) for title in part["title"]}
        for cell in part.sort_values("rank", kind="stable")["cell"].unique()
    ]
    return [f"Each entry: {' / '.join(conditions)}.", "\n".join(markdown_table(pd.DataFrame(lines)))]
