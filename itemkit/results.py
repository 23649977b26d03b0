"""One table of a study: every contender in every condition, means, worst cells, published numbers apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from itemkit import schema
from itemkit._files import write_json
from itemkit.calibrate import best_threshold, fit_calibrator, threshold_at_fpr
from itemkit.controls import MisalignmentScorer, Scorer
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.metrics import (
    METRIC_TITLES,
    SMALLER_IS_BETTER,
    draw_weights,
    metric_interval,
    percentile_interval,
    replicate,
    two_sided_p,
)
from itemkit.misalignment import RepresentationConfig
from itemkit.protocols import Protocol


@dataclass
class Run:
    """Scores of one contender, trained on one generator with one seed.

    Attributes
    ----------
    detector, train_generator, seed : what was run
    threshold : on the score, from the calibration half of the validation images
    val_scores, val_labels : of that half
    test_scores : of every test image, in the order of ``Study.test``
    scale, offset : p(fake) = sigmoid(scale * score + offset), fitted on that half
    n_train, seconds, key, config : how it was made
    """

    detector: str
    train_generator: str
    seed: int
    threshold: float
    scale: float
    offset: float
    val_scores: list[float]
    val_labels: list[int]
    test_scores: list[float]
    n_train: int
    seconds: float
    key: str
    config: dict

    def probability(self) -> np.ndarray:
        """Calibrated p(fake) of every test image."""
        return expit(self.scale * np.asarray(self.test_scores) + self.offset)


def run_name(detector: str, train_generator: str, seed: int) -> str:
    """File name of a run; characters that a file system may not like are replaced."""
    return f"{_file_name(detector)}--{_file_name(train_generator)}--s{seed}.json"


def _file_name(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)
    # two names that lose the difference between them must not share a file
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def finish_run(
    detector: str,
    train_generator: str,
    seed: int,
    val_scores: np.ndarray,
    test_scores: np.ndarray,
    val_labels: np.ndarray,
    options: dict,
    config: dict,
    n_train: int = 0,
    seconds: float = 0.0,
    key: str = "",
) -> Run:
    """Choose threshold and calibration on validation scores, and make the record of a run."""
    # seven digits on disk and in memory alike, so that a run read back gives the same table to the last bit
    val, test = ([float(f"{v:.7g}") for v in scores] for scores in (val_scores, test_scores))
    arrays = np.asarray(val), np.asarray(val_labels, int)
    if options["threshold"] == "fpr":
        threshold = threshold_at_fpr(arrays[0][arrays[1] == schema.REAL], options["fpr"]).value
    else:
        threshold = best_threshold(arrays[1], arrays[0])
    platt = fit_calibrator(arrays[1], arrays[0], "platt")
    return Run(
        detector, train_generator, seed, float(threshold), platt.scale, platt.offset,
        val, arrays[1].tolist(), test, n_train, seconds, key, config,
    )  # fmt: skip


FUSIONS = ("mean", "max", "stack")


def late_fusion(
    val_scores: Sequence[np.ndarray], y_val: np.ndarray, scores: Sequence[np.ndarray], how: str = "mean"
) -> np.ndarray:
    """Join the scores of several detectors; whatever is fitted is fitted on validation images.

    Parameters
    ----------
    val_scores, y_val : one vector of scores per detector, and the labels of those images
    scores : one vector per detector for the images to be judged
    how : {"mean", "max", "stack"}
        Mean of the calibrated log-odds (Platt), so that no detector speaks louder for its scale; their
        maximum ("fake if anyone says so"); or logistic regression on them.

    Returns
    -------
    float64 array, one joint log-odds per image.
    """
    if how not in FUSIONS:
        raise InputError(f"how={how!r}: expected one of {', '.join(FUSIONS)}")
    if len(val_scores) != len(scores) or len(scores) < 2:
        raise InputError(
            f"{len(val_scores)} validation and {len(scores)} test score vectors; expected two or more each"
        )
    maps = [fit_calibrator(y_val, s, "platt") for s in val_scores]
    test = np.stack([m.logit(s) for m, s in zip(maps, scores, strict=True)], axis=1)
    if how == "mean":
        return test.mean(1)
    if how == "max":
        return test.max(1)
    val = np.stack([m.logit(s) for m, s in zip(maps, val_scores, strict=True)], axis=1)
    # few inputs that agree with each other: the usual strength of the penalty keeps both weights apart from
    # zero
    return LogisticRegression(class_weight="balanced").fit(val, y_val).decision_function(test)


class LateFusion:
    """Several scorers, each trained by itself, joined by `late_fusion` on the validation images.

    Parameters
    ----------
    parts : Scorers
        Untrained.
    how : str
        See `late_fusion`.
    """

    def __init__(self, parts: Sequence[Scorer], how: str = "mean") -> None:
        self.parts, self.how = list(parts), how

    def fit(self, train: Features, val: Features) -> LateFusion:
        """Train each part, and remember their scores on the validation images."""
        for part in self.parts:
            part.fit(train, val)
        self.val_scores_ = [part.decision_function(val) for part in self.parts]
        self.y_val_ = val.labels
        return self

    def decision_function(self, features: Features) -> np.ndarray:
        """Joint log-odds of fake."""
        scores = [part.decision_function(features) for part in self.parts]
        return late_fusion(self.val_scores_, self.y_val_, scores, self.how)


def early_fusion(
    representation: RepresentationConfig | str = "absolute", head: MisalignmentMLP | None = None
) -> MisalignmentScorer:
    """One head on the misalignment vector and the image embedding side by side."""
    head = head if head is not None else MisalignmentMLP()
    return MisalignmentScorer(representation, head, beside=lambda features: features.image_emb)


def fusion_report(
    study: Study, fused: Mapping[str, Sequence[str]], metric: str = "auroc"
) -> tuple[pd.DataFrame, list[str]]:
    """Is a fusion ever worse than the better of its parts? Judged by every unseen cell of the matrix.

    Parameters
    ----------
    study : Study
        Holds the fusions and their parts.
    fused : dict
        Fusion -> its parts.
    metric : str

    Returns
    -------
    tuple
        ``Study.fusion_gain`` of every fusion over the unseen cells, with the column ``fusion``; and one
        sentence per fusion that answers the question and compares worst cells.
    """
    tables, answers = [], []
    for name, parts in fused.items():
        gain = study.fusion_gain(name, parts, metric)
        gain = gain[~gain["seen"]].assign(fusion=name)
        if gain.empty:
            continue
        tables.append(gain)
        # how much worse, whichever direction is better
        sign = 1 if metric in SMALLER_IS_BETTER else -1
        loss, surely = sign * gain["difference"], gain["low" if sign > 0 else "high"] * sign > 0
        below = loss > 0
        worst = study.summary([metric]).set_index("detector")
        weakest = worst.loc[name]
        means = [f"{value:.3f}" for value in worst.loc[list(parts), "unseen_mean"]]
        kept = max(parts, key=lambda part: -sign * worst.loc[part, "worst"])
        answer = (
            f"{name}: worse than the better of its parts ({', '.join(parts)}) in {int(below.sum())} of "
            f"{len(gain)} unseen cells, in {int(surely.sum())} of them beyond its "
            f"{100 * study.options['level']:.0f} % interval"
        )
        if below.any():
            cell = gain.loc[loss.idxmax()]
            answer += (
                f", at most by {loss.max():.3f} ({cell['train_generator']} → "
                f"{cell['test_generator']}, better part {cell['best_part']})"
            )
        answers.append(
            f"{answer}. Worst cell {weakest['worst']:.3f} ({weakest['worst_train']} → "
            f"{weakest['worst_test']}); the part with the best worst cell, {kept}, has "
            f"{worst.loc[kept, 'worst']:.3f}. Mean over unseen cells {weakest['unseen_mean']:.3f}, "
            f"of its parts {', '.join(means)}."
        )
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return table, answers


FORMAT = "itemkit study 1"
POOLED = "pooled_unseen"
STUDY_METRICS: tuple[str, ...] = ("ap", "auroc", "balanced_accuracy", "accuracy_real", "accuracy_fake")
STUDY_METRICS += ("accuracy_oracle", "tpr_at_fpr01", "tpr_at_fpr05", "ece")


@dataclass
class Study:
    """Runs and what follows from them.

    Attributes
    ----------
    test : DataFrame
        The test images: ``image_id, path, label, generator, source``.
    runs : list of Run
    options : dict
        Everything that was asked for.
    table : DataFrame
        One row per contender, train generator, test generator, seed and metric: ``detector, train_generator,
        test_generator, seen, seed, metric, value, low, high, n_real, n_fake``. Test generator "pooled_unseen"
        holds all unseen fakes at once, with every real counted once.
    """

    test: pd.DataFrame
    runs: list[Run]
    options: dict
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    _replicates: dict[tuple[str, str, str, int, str], np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.table.empty:
            self._tabulate(self.runs)

    # ------------------------------------------------------------------------------------------- the table

    def _seen(self, train: str, test: str) -> bool:
        family = self.options["families"]
        return family.get(test, test) in {family.get(name, name) for name in train.split("+")}

    def _groups(self, train: str) -> dict[str, np.ndarray]:
        """Mask of the test images of every cell: the fakes of one generator with the reals they belong to."""
        y, generator = self.test[schema.LABEL].to_numpy(int), self.test[schema.GENERATOR].to_numpy()
        pair_by = self.options["pair_by"]
        groups, unseen = {}, np.zeros(len(y), bool)
        for name in self.options["test_generators"]:
            fake = (y == schema.FAKE) & (generator == name)
            real = y == schema.REAL
            if pair_by:
                real &= self.test[pair_by].isin(set(self.test.loc[fake, pair_by])).to_numpy()
                if not real.any():
                    raise InputError(f"no real test image shares its {pair_by} with the fakes of {name}")
            groups[name] = fake | real
            if not self._seen(train, name):
                unseen |= groups[name]
        if unseen.any():
            groups[POOLED] = unseen
        return groups

    def _weights(self) -> np.ndarray:
        """Bootstrap weights shared by all runs, so that contenders are compared on the same resamples."""
        rng = np.random.default_rng(self.options["boot_seed"])
        pair_by = self.options["pair_by"]
        # reals that are judged apart are drawn apart: a resample without a real of some cell has no AUROC
        real = self.test[pair_by].astype(str).radd("real ") if pair_by else schema.REAL_GENERATOR
        stratum = self.test[schema.GENERATOR].where(self.test[schema.LABEL] == schema.FAKE, real)
        weights = np.empty((len(self.test), self.options["n_boot"]), np.float32)
        for name in sorted(stratum.unique()):
            rows = (stratum == name).to_numpy()
            weights[rows] = draw_weights(int(rows.sum()), self.options["n_boot"], rng)
        return weights

    def _tabulate(self, runs: Sequence[Run]) -> None:
        y = self.test[schema.LABEL].to_numpy(int)
        metrics, weights = self.options["metrics"], self._weights()
        ones = np.ones((len(y), 1))
        rows: list[dict] = []
        for run in runs:
            s, p = np.asarray(run.test_scores), run.probability()
            for name, mask in self._groups(run.train_generator).items():
                given = (metrics, run.threshold, p[mask], True)
                point = replicate(y[mask], s[mask], ones[mask], *given)
                drawn = replicate(y[mask], s[mask], weights[mask], *given) if weights.shape[1] else {}
                cell = {
                    "detector": run.detector,
                    "train_generator": run.train_generator,
                    "test_generator": name,
                    "seen": name != POOLED and self._seen(run.train_generator, name),
                    "seed": run.seed,
                }
                count = {"n_real": int((y[mask] == 0).sum()), "n_fake": int((y[mask] == 1).sum())}
                for metric in metrics:
                    replicates = drawn.get(metric, np.zeros(0))
                    self._replicates[run.detector, run.train_generator, name, run.seed, metric] = replicates
                    value = float(point[metric][0])
                    low, high = metric_interval(metric, value, replicates, self.options["level"])
                    rows.append(cell | {"metric": metric, "value": value, "low": low, "high": high} | count)
        new = pd.DataFrame(rows)
        self.table = new if self.table.empty else pd.concat([self.table, new], ignore_index=True)

    # ------------------------------------------------------------------------------------------- summaries

    @property
    def detectors(self) -> list[str]:
        """Names of the contenders, in the order they were run."""
        return list(dict.fromkeys(run.detector for run in self.runs))

    def cells(self, detector: str, metric: str) -> pd.DataFrame:
        """Rows of `table` of one contender and metric; an unknown name lists those there are."""
        if detector not in self.detectors:
            raise InputError(
                f"no contender {detector!r} in this study; there are {', '.join(self.detectors)}"
            )
        if metric not in self.options["metrics"]:
            raise InputError(
                f"metric {metric!r} was not asked for; there are {', '.join(self.options['metrics'])}"
            )
        return self.table[(self.table["detector"] == detector) & (self.table["metric"] == metric)]

    def drawn(self, detector: str, metric: str, cells: pd.DataFrame) -> np.ndarray:
        """Bootstrap replicates of the mean over some cells; empty without bootstrap."""
        keys = cells[["train_generator", "test_generator", "seed"]].itertuples(index=False)
        parts = [self._replicates.get((detector, a, b, int(seed), metric)) for a, b, seed in keys]
        given = [p for p in parts if p is not None]
        return np.mean(given, axis=0) if given else np.zeros(0)

    def interval(self, detector: str, metric: str, cells: pd.DataFrame) -> tuple[float, float]:
        """Interval of the mean over some cells, by bootstrap over the test images."""
        drawn = self.drawn(detector, metric, cells)
        return metric_interval(metric, cells["value"].mean(), drawn, self.options["level"])

    def matrix(self, detector: str, metric: str = "auroc") -> pd.DataFrame:
        """Train generator × test generator, mean over seeds."""
        cells = self.cells(detector, metric)
        cells = cells[cells["test_generator"] != POOLED]
        out = cells.pivot_table(
            index="train_generator", columns="test_generator", values="value", aggfunc="mean"
        )
        trains = dict.fromkeys(cells["train_generator"])
        return out.reindex(index=list(trains), columns=self.options["test_generators"])

    def summary(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per contender and metric.

        Returns
        -------
        DataFrame
            ``detector, metric``; ``unseen_mean`` over all cells of generators not trained on and all seeds,
            with ``low, high`` by bootstrap over the test images (all cells resampled together) and
            ``seed_sd``, the standard deviation of that mean over seeds; ``worst``, the weakest unseen cell
            (mean over seeds) with its own interval and its ``worst_train, worst_test``; ``seen_mean``;
            ``pooled_unseen`` (all unseen fakes together, reals once); ``n_cells, n_seeds``.
        """
        rows = []
        for detector in self.detectors:
            for metric in metrics or self.options["metrics"]:
                cells = self.cells(detector, metric)
                pooled = cells[cells["test_generator"] == POOLED]["value"].mean()
                cells = cells[cells["test_generator"] != POOLED]
                unseen = cells[~cells["seen"]]
                row: dict = {"detector": detector, "metric": metric, "unseen_mean": unseen["value"].mean()}
                row["low"], row["high"] = self.interval(detector, metric, unseen)
                row["seed_sd"] = unseen.groupby("seed")["value"].mean().std()
                if len(unseen):
                    by_cell = unseen.groupby(["train_generator", "test_generator"])["value"].mean()
                    at = by_cell.idxmax() if metric in SMALLER_IS_BETTER else by_cell.idxmin()
                    same = (unseen["train_generator"] == at[0]) & (unseen["test_generator"] == at[1])
                    row["worst"] = by_cell[at]
                    row["worst_low"], row["worst_high"] = self.interval(detector, metric, unseen[same])
                    row["worst_train"], row["worst_test"] = at
                row["seen_mean"] = cells[cells["seen"]]["value"].mean()
                row["pooled_unseen"] = pooled
                row["n_cells"] = len(cells.drop_duplicates(["train_generator", "test_generator"]))
                row["n_seeds"] = cells["seed"].nunique()
                rows.append(row)
        return pd.DataFrame(rows)

    def compare(
        self, reference: str, metric: str = "auroc", others: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Paired comparison of one contender with others: difference of the means over unseen cells.

        Returns
        -------
        DataFrame
            ``reference, other, metric, difference, low, high, p_value, seed_sd``; positive: the reference
            has the larger value. Interval and p-value by bootstrap over the test images, the same resamples
            for both; ``seed_sd`` is the spread of the difference over seeds (empty for contenders without
            seeds).
        """
        mine = self._unseen(reference, metric)
        drawn = self.drawn(reference, metric, mine)
        rows = []
        for other in others or [name for name in self.detectors if name != reference]:
            theirs = self._unseen(other, metric)
            gap = drawn - self.drawn(other, metric, theirs)
            low, high = percentile_interval(gap, self.options["level"])
            by_seed = mine.groupby("seed")["value"].mean() - theirs.groupby("seed")["value"].mean()
            rows.append(
                {"reference": reference, "other": other, "metric": metric,
                 "difference": mine["value"].mean() - theirs["value"].mean(),
                 "low": low, "high": high, "p_value": two_sided_p(gap), "seed_sd": by_seed.std()}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def _unseen(self, detector: str, metric: str) -> pd.DataFrame:
        cells = self.cells(detector, metric)
        return cells[~cells["seen"] & (cells["test_generator"] != POOLED)]

    # --------------------------------------------------------------------------------------------- fusion

    def fuse(self, name: str, parts: Sequence[str], how: str = "mean") -> Study:
        """Add the late fusion of contenders that were run, from their stored scores.

        Parameters
        ----------
        name : str
            Of the new contender.
        parts : names
            Contenders to join, each run with the same train generators and seeds.
        how : str
            See `itemkit.results.late_fusion`.

        Returns
        -------
        Study
            Itself.
        """
        if name in self.detectors:
            raise InputError(f"the study has a contender {name!r} already")
        found = {(r.detector, r.train_generator, r.seed): r for r in self.runs}
        for part in parts:
            self.cells(part, self.options["metrics"][0])  # complains about an unknown name
        new = []
        for run in [r for r in self.runs if r.detector == parts[0]]:
            mine = [found[part, run.train_generator, run.seed] for part in parts]
            labels = np.asarray(run.val_labels)
            val = [np.asarray(r.val_scores) for r in mine]
            test = [np.asarray(r.test_scores) for r in mine]
            joint_val, joint_test = (late_fusion(val, labels, scores, how) for scores in (val, test))
            about = {"fuse": [r.config for r in mine], "how": how}
            chosen = finish_run(
                name, run.train_generator, run.seed, joint_val, joint_test, labels, self.options, about
            )
            new.append(replace(chosen, n_train=run.n_train))
        self.runs += new
        self._tabulate(new)
        return self

    def fusion_gain(self, fused: str, parts: Sequence[str], metric: str = "auroc") -> pd.DataFrame:
        """Is the fusion ever worse than the better of its parts? One row per pair of generators.

        Returns
        -------
        DataFrame
            ``train_generator, test_generator, seen, fused, best_part, best, difference, low, high``, means
            over seeds, the interval by bootstrap over the test images; sorted by difference.
        """
        rows = []
        sign = -1 if metric in SMALLER_IS_BETTER else 1
        cells = {name: self.cells(name, metric) for name in (fused, *parts)}
        cells = {name: c[c["test_generator"] != POOLED] for name, c in cells.items()}
        for (train, test), mine in cells[fused].groupby(["train_generator", "test_generator"], sort=False):
            there = {
                name: c[(c["train_generator"] == train) & (c["test_generator"] == test)]
                for name, c in cells.items()
            }
            best = max(parts, key=lambda name: sign * there[name]["value"].mean())
            gap = self.drawn(fused, metric, mine) - self.drawn(best, metric, there[best])
            low, high = percentile_interval(gap, self.options["level"])
            value, other = mine["value"].mean(), there[best]["value"].mean()
            rows.append(
                {"train_generator": train, "test_generator": test, "seen": bool(mine["seen"].iloc[0]),
                 "fused": value, "best_part": best, "best": other, "difference": value - other,
                 "low": low, "high": high}
            )  # fmt: skip
        return pd.DataFrame(rows).sort_values("difference", ascending=sign == 1, ignore_index=True)

    # ----------------------------------------------------------------------------------------------- disk

    def save(self, folder: str | Path) -> Path:
        """Write ``study.json``, one JSON per run under ``runs/``, ``table.csv`` and ``summary.csv``."""
        folder = Path(folder)
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        names = [run_name(run.detector, run.train_generator, run.seed) for run in self.runs]
        for name, run in zip(names, self.runs, strict=True):
            write_json(folder / "runs" / name, asdict(run))
        # last, so that it never names a file that is not there
        about = {"format": FORMAT, "options": self.options, "runs": names}
        write_json(folder / "study.json", about | {"test": self.test.to_dict(orient="list")})
        self.table.to_csv(folder / "table.csv", index=False)
        self.summary().to_csv(folder / "summary.csv", index=False)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """Read a study written by `save`, and compute its table again from the scores."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "study.json").read_text())
        except FileNotFoundError:
            raise InputError(f"{folder} holds no study.json; make one with train_on_test_on") from None
        if about.get("format") != FORMAT:
            raise InputError(f"{folder}/study.json has format {about.get('format')!r}; expected {FORMAT!r}")
        runs = [Run(**json.loads((folder / "runs" / name).read_text())) for name in about["runs"]]
        return cls(pd.DataFrame(about["test"]), runs, about["options"])


MEAN, WORST = "mean of cells", "worst cell"
OURS, THEIRS = "ours", "published, not ours"
COLUMNS = ("kind", "condition", "detector", "title", "metric", "row", "value", "low", "high", "seed_sd",
           "where", "n_seeds")  # fmt: skip


def study_table(
    studies: Mapping[str, Study], protocol: Protocol, titles: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Join the studies of several conditions and the published numbers into one long table.

    Parameters
    ----------
    studies : dict
        Condition ("raw", "equalised" ...) -> study.
    protocol : Protocol
        Where it names its training set, a cell is a test set and all of them count, the training generator's
        own as well, as the published means do. Where every generator trains in turn, a cell is a pair of
        generators of different families.
    titles : dict, optional
        Contender -> name to print.

    Returns
    -------
    DataFrame
        ``kind`` ("ours" or "published, not ours"), ``condition, detector, title, metric, row`` (a cell,
        "mean of cells" or "worst cell"), ``value`` (mean over seeds), ``low, high`` (bootstrap over the test
        images), ``seed_sd``, ``where`` (which cell is the worst), ``n_seeds``. All values are shares, also
        the published ones, which are printed in per cent.
    """
    rows: list[dict] = []
    for condition, study in studies.items():
        for detector in study.detectors:
            for metric in study.options["metrics"]:
                about = {"kind": OURS, "condition": condition, "detector": detector, "metric": metric}
                about["title"] = (titles or {}).get(detector, detector)
                rows += [about | row for row in _cells(study, detector, metric, protocol)]
    for published in protocol.published:
        for method, value in published.values:
            rows.append(
                {"kind": THEIRS, "condition": published.condition, "detector": method, "title": method,
                 "metric": published.metric, "row": MEAN, "value": value / 100, "where": published.what}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _cells(study: Study, detector: str, metric: str, protocol: Protocol) -> list[dict]:
    cells = study.cells(detector, metric)
    cells = cells[cells["test_generator"] != POOLED]
    names = protocol.titles()
    if protocol.train:
        cells = cells.assign(row=[names.get(name, name) for name in cells["test_generator"]])
    else:
        cells = cells[~cells["seen"]]
        pairs = zip(cells["train_generator"], cells["test_generator"], strict=True)
        cells = cells.assign(row=[f"{train} → {test}" for train, test in pairs])

    def about(name: str, part: pd.DataFrame, where: str = "") -> dict:
        low, high = study.interval(detector, metric, part)
        by_seed = part.groupby("seed")["value"].mean()
        return {"row": name, "value": part["value"].mean(), "low": low, "high": high,
                "seed_sd": by_seed.std(), "where": where, "n_seeds": len(by_seed)}  # fmt: skip

    rows = [about(name, part) for name, part in cells.groupby("row", sort=False)]
    if not rows:
        return []
    pick = max if metric in SMALLER_IS_BETTER else min
    worst = pick(rows, key=lambda row: row["value"])["row"]
    return [*rows, about(MEAN, cells), about(WORST, cells[cells["row"] == worst], worst)]


def to_markdown(table: pd.DataFrame, protocol: Protocol, notes: Sequence[str] = ()) -> str:
    """Print the table: means and worst cells of every contender, then cell by cell in the published order.

    Parameters
    ----------
    table : DataFrame
        Of `study_table`.
    protocol : Protocol
    notes : lines to print below the title

    Returns
    -------
    str
    """
    ours = table[table["kind"] == OURS]
    seeds = int(ours["n_seeds"].max())
    lines = [f"# {protocol.title}", "", *(part for note in notes if note for part in (note, ""))]
    lines += [
        f"Values in per cent: mean over {seeds} seeds (95 % interval over test images; ± standard deviation "
        "over seeds).",
        "",
    ]
    shown = [protocol.metric, *(p.metric for p in protocol.published)]
    # beside an accuracy, what the best threshold for the test images would have given: never a result
    shown += ["accuracy_oracle"] if protocol.train else ["auroc", "ap"]
    for metric in dict.fromkeys(shown):
        title = METRIC_TITLES[metric]
        lines += [f"## {title[0].upper()}{title[1:]}", "", *_means(table, metric), ""]
    lines += [f"## Cell by cell: {METRIC_TITLES[protocol.metric]}", ""]
    return "\n".join([*lines, *_by_cell(ours, protocol), ""])


def _percent(row: pd.Series, interval: bool = True) -> str:
    text = f"{100 * row['value']:.1f}"
    if interval and pd.notna(row["low"]):
        text += f" ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
    return text + (f" ± {100 * row['seed_sd']:.1f}" if interval and pd.notna(row["seed_sd"]) else "")


def _means(table: pd.DataFrame, metric: str) -> list[str]:
    part = table[table["metric"] == metric]
    conditions = list(dict.fromkeys(part.loc[part["kind"] == OURS, "condition"]))
    kinds = part.loc[part["kind"] == THEIRS, ["condition", "where"]].drop_duplicates()
    references = [c for c in dict.fromkeys(kinds["condition"])]
    header = ["detector", *(f"{c}: {what}" for c in conditions for what in ("mean", "worst cell"))]
    header += [f"PUBLISHED, NOT OURS: mean, {c}" for c in references]
    rows = []
    for (kind, title), own in part.groupby(["kind", "title"], sort=False):
        row = [str(title)]
        for condition in conditions:
            here = own[(own["condition"] == condition) & (kind == OURS)].set_index("row")
            mean, worst = (here.loc[r] if r in here.index else None for r in (MEAN, WORST))
            row.append("" if mean is None else _percent(mean))
            row.append("" if worst is None else f"{_percent(worst, False)} ({worst['where']})")
        for condition in references:
            here = own[(own["condition"] == condition) & (kind == THEIRS)]
            row.append("" if here.empty else _percent(here.iloc[0], False))
        rows.append(row)
    return _grid(header, rows)


def _by_cell(ours: pd.DataFrame, protocol: Protocol) -> list[str]:
    part = ours[ours["metric"] == protocol.metric]
    conditions = list(dict.fromkeys(part["condition"]))
    titles = list(dict.fromkeys(part["title"]))
    value = part.set_index(["row", "title", "condition"])["value"].to_dict()
    order = [test.title for test in protocol.test if test.title in set(part["row"])]
    order = order or [r for r in dict.fromkeys(part["row"]) if r not in (MEAN, WORST)]
    rows = []
    for name in [*order, MEAN, WORST]:
        shown = [[value.get((name, title, c)) for c in conditions] for title in titles]
        rows.append([name, *(" / ".join("-" if v is None else f"{100 * v:.1f}" for v in vs) for vs in shown)])
    return [f"Each entry: {' / '.join(conditions)}.", "", *_grid(["cell", *titles], rows)]


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]
