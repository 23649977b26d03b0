"""What follows from the scores of a study: metrics with intervals, comparisons, late fusions, one table."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit._files import write_json
from itemkit.calibrate import Calibrator, best_threshold, fit_calibrator, lacking, threshold_at_fpr
from itemkit.errors import InputError
from itemkit.metrics import LEVEL, PROBABILITY_METRICS, interval, replicate, resample
from itemkit.protocols import Protocol
from itemkit.text import count, did_you_mean, markdown_table, write_csv

POOLED = "pooled_unseen"
STUDY_METRICS: tuple[str, ...] = ("ap", "auroc", "balanced_accuracy", "accuracy_real", "accuracy_fake")
STUDY_METRICS += ("accuracy_oracle", "tpr_at_fpr01", "tpr_at_fpr05", "ece")
BOOT_SEED = 0
PAIR = ["train_generator", "test_generator"]


@dataclass
class Run:
    """Scores of one contender, trained on one generator with one seed."""

    detector: str
    train_generator: str
    seed: int
    val_scores: list[float]  # of the half of the validation images that calibrates
    val_labels: list[int]
    test_scores: list[float]  # of every test image, in the order of ``Study.test``
    n_train: int = 0
    key: str = ""  # everything that changes the scores; empty where a run is not to be reused
    config: dict = field(default_factory=dict)
    threshold: float | None = None  # None where the validation images are too few
    withheld: str = ""  # why there is no threshold
    calibrator: Calibrator = Calibrator()  # from a score to p(fake)

    def calibrate(self, options: Mapping[str, Any]) -> Run:
        """Choose threshold and calibration on the validation scores; ``options`` as in `train_on_test_on`."""
        # seven digits on disk and in memory alike: a run read back gives the same table to the last bit
        self.val_scores = [float(f"{v:.7g}") for v in self.val_scores]
        self.test_scores = [float(f"{v:.7g}") for v in self.test_scores]
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


def run_path(folder: Path, detector: str, train_generator: str, seed: int) -> Path:
    """File of a run; the hash tells names apart of which a file system cannot take every character."""
    name = f"{detector}--{train_generator}--s{seed}"
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)[:120]
    return folder / "runs" / f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


@dataclass
class Study:
    """Runs and what follows from them."""

    test: pd.DataFrame  # the test images: image_id, path, label, generator, source
    runs: list[Run]
    options: dict  # everything that was asked for, and ``made_by``, `Features.provenance`
    table: pd.DataFrame = field(init=False)
    """One row per contender, train generator, test generator, seed and metric: ``detector, train_generator,
    test_generator, seed, seen, metric, value, low, high, n_real, n_fake``. "pooled_unseen" as test generator
    holds all unseen fakes at once, with every real counted once."""
    drawn: np.ndarray = field(init=False, repr=False)
    """Value of each row of ``table`` in every resample of the test images, shape (rows, n_boot)."""

    def __post_init__(self) -> None:
        self.table, self.drawn = self._evaluate(self.runs)

    @property
    def detectors(self) -> list[str]:
        """Names of the contenders, in the order they were run."""
        return list(dict.fromkeys(run.detector for run in self.runs))

    def _seen(self, train: str, test: str) -> bool:
        family = self.options["families"]
        return family.get(test, test) in {family.get(name, name) for name in train.split("+")}

    def _groups(self, train: str) -> dict[str, np.ndarray]:
        """Mask of the test images of every cell: the fakes of one generator with the reals they belong to."""
        real, pair_by = (self.test[schema.LABEL] == schema.REAL).to_numpy(bool), self.options["pair_by"]
        groups, unseen = {}, np.zeros(len(real), bool)
        for name in self.options["test_generators"]:
            fake, mine = ~real & (self.test[schema.GENERATOR] == name).to_numpy(bool), real
            if pair_by:
                mine = real & self.test[pair_by].isin(set(self.test.loc[fake, pair_by])).to_numpy()
                if not mine.any():
                    raise InputError(f"no real test image shares its {pair_by} with the fakes of {name}")
            groups[name] = fake | mine
            unseen |= groups[name] & (not self._seen(train, name))
        return groups | ({POOLED: unseen} if unseen.any() else {})

    def _evaluate(self, runs: Sequence[Run]) -> tuple[pd.DataFrame, np.ndarray]:
        """Rows of `table` and `drawn` for some runs."""
        y, metrics = self.test[schema.LABEL].to_numpy(int), self.options["metrics"]
        pair_by, rng = self.options["pair_by"], np.random.default_rng(BOOT_SEED)
        # reals that are judged apart are drawn apart: a resample without a real of some cell has no AUROC
        real = self.test[pair_by].astype(str).radd("real ") if pair_by else schema.REAL_GENERATOR
        strata = self.test[schema.GENERATOR].where(y == schema.FAKE, real).to_numpy(str)
        weights = np.c_[np.ones(len(y)), resample(strata, self.options["n_boot"], rng)]
        rows, values = [], []
        for run in runs:
            s = np.asarray(run.test_scores)
            p = run.calibrator(s)
            for name, mask in self._groups(run.train_generator).items():
                found = replicate(y[mask], s[mask], weights[mask], run.threshold, p[mask], True)
                n_fake = int(y[mask].sum())
                cell = {"detector": run.detector, "train_generator": run.train_generator,
                        "test_generator": name, "seed": run.seed,
                        "seen": name != POOLED and self._seen(run.train_generator, name)}  # fmt: skip
                for metric in metrics:  # without a threshold its metrics stay empty
                    both = found.get(metric, np.full(weights.shape[1], np.nan))
                    value, drawn = float(both[0]), both[1:]
                    low, high = interval(drawn, metric, value)
                    rows.append(cell | {"metric": metric, "value": value, "low": low, "high": high,
                                        "n_real": int(mask.sum()) - n_fake, "n_fake": n_fake})  # fmt: skip
                    values.append(drawn)
        return pd.DataFrame(rows), np.array(values)

    def cells(self, detector: str, metric: str, pooled: bool = False) -> pd.DataFrame:
        """Rows of `table` of one contender and metric: pairs of generators, or the pooled ones, and seeds."""
        failed = self.options["failures"]
        for name, known in ((detector, self.detectors), (metric, self.options["metrics"])):
            if name not in known:
                why = f" It failed, {failed[name]}" if name in failed else did_you_mean(name, known)
                raise InputError(f"no {name!r} in this study; there are {', '.join(known)}.{why}")
        rows = (self.table["detector"] == detector) & (self.table["metric"] == metric)
        return self.table[rows & ((self.table["test_generator"] == POOLED) == pooled)]

    def mean(self, cells: pd.DataFrame) -> dict[str, float]:
        """Mean over some rows of `table` of one contender and metric, with its ``seed_sd`` over seeds.

        ``low, high`` are by bootstrap over the test images, all rows resampled together.
        """
        value = cells["value"].mean()
        low, high = interval(self._drawn(cells), next(iter(cells["metric"]), ""), value)
        by_seed = cells.groupby("seed")["value"].mean()
        return {"value": value, "low": low, "high": high, "seed_sd": by_seed.std(), "n_seeds": len(by_seed)}

    def _drawn(self, cells: pd.DataFrame) -> np.ndarray:
        """Mean over some rows of `table` in every resample; empty for no rows."""
        return self.drawn[cells.index].mean(axis=0) if len(cells) else np.zeros(0)

    def worst(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Those of the rows that belong to the weakest pair of generators, by the mean over seeds."""
        by_cell = cells.groupby(PAIR, sort=False)["value"].mean().dropna()
        if by_cell.empty:
            return cells[:0]
        at = by_cell.idxmax() if cells["metric"].iloc[0] in PROBABILITY_METRICS else by_cell.idxmin()
        return cells[(cells[PAIR] == at).all(axis=1)]

    def matrix(self, detector: str, metric: str = "auroc") -> pd.DataFrame:
        """Train generator × test generator, mean over seeds."""
        mean = self.cells(detector, metric).groupby(PAIR)["value"].mean().unstack()
        return mean.reindex(index=self.options["train_generators"], columns=self.options["test_generators"])

    def summary(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per contender and metric.

        Columns: ``detector, metric``; ``unseen_mean`` over all cells of generators not trained on and all
        seeds, with ``low, high, seed_sd`` as in `mean`; ``worst``, the weakest unseen cell, with ``worst_low,
        worst_high, worst_train, worst_test``; ``seen_mean``; ``pooled_unseen``; ``n_cells, n_seeds``.
        """
        rows = []
        for detector in self.detectors:
            for metric in metrics or self.options["metrics"]:
                cells = self.cells(detector, metric)
                weakest = self.worst(cells[~cells["seen"]])
                mean, worst = self.mean(cells[~cells["seen"]]), self.mean(weakest)
                train, test = weakest[PAIR].iloc[0] if len(weakest) else (None, None)
                rows.append(
                    {"detector": detector, "metric": metric, "unseen_mean": mean["value"], "low": mean["low"],
                     "high": mean["high"], "seed_sd": mean["seed_sd"], "worst": worst["value"],
                     "worst_low": worst["low"], "worst_high": worst["high"], "worst_train": train,
                     "worst_test": test, "seen_mean": cells.loc[cells["seen"], "value"].mean(),
                     "pooled_unseen": self.cells(detector, metric, pooled=True)["value"].mean(),
                     "n_cells": cells.groupby(PAIR).ngroups, "n_seeds": cells["seed"].nunique()}
                )  # fmt: skip
        return pd.DataFrame(rows)

    def compare(self, reference: str, metric: str = "auroc") -> pd.DataFrame:
        """Paired comparison of one contender with all others: difference of the means over unseen cells.

        Columns: ``reference, other, metric, difference, low, high, p_value, seed_sd``; positive: the
        reference has the larger value. Interval and p-value by bootstrap over the test images, the same
        resamples for both (p: twice the smaller share on one side of zero, never below 1 / (n + 1)).
        """
        unseen = {name: self.cells(name, metric) for name in (reference, *self.detectors)}
        unseen = {name: cells[~cells["seen"]] for name, cells in unseen.items()}
        mine, rows = unseen.pop(reference), []
        for other, theirs in unseen.items():
            gap = mine.groupby("seed")["value"].mean() - theirs.groupby("seed")["value"].mean()
            drawn = self._drawn(mine) - self._drawn(theirs)
            low, high = interval(drawn)
            one_side = min((drawn <= 0).sum(), (drawn >= 0).sum())
            p_value = min(1.0, 2 * (1 + one_side) / (len(drawn) + 1)) if np.isfinite(low) else np.nan
            rows.append(
                {"reference": reference, "other": other, "metric": metric, "difference": gap.mean(),
                 "low": low, "high": high, "p_value": p_value, "seed_sd": gap.std()}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def fuse(self, name: str, parts: Sequence[str]) -> Study:
        """Add a late fusion: the mean of the log-odds of contenders that were run; returns itself.

        Each is calibrated on the validation images so that none speaks louder.
        """
        if name in self.detectors:
            raise InputError(f"the study has a contender {name!r} already")
        for part in parts:
            self.cells(part, self.options["metrics"][0])  # complains about an unknown name
        new = []
        runs = ([run for run in self.runs if run.detector == part] for part in parts)
        for mine in zip(*runs, strict=True):
            fused = replace(mine[0], detector=name, key="", config={"fuse": [run.config for run in mine]})
            for which in ("val_scores", "test_scores"):
                logits = [run.calibrator.logit(getattr(run, which)) for run in mine]
                setattr(fused, which, np.mean(logits, axis=0).tolist())
            new.append(fused.calibrate(self.options))
        self.options["titles"] |= {name: f"fusion, late: {name}"}
        table, drawn = self._evaluate(new)
        self.runs += new
        self.table, self.drawn = pd.concat([self.table, table], ignore_index=True), np.r_[self.drawn, drawn]
        return self

    def fusion_gain(self, fused: str, parts: Sequence[str]) -> pd.DataFrame:
        """Is the fusion's AUROC ever below that of the better of its parts? One row per pair of generators.

        Columns: ``train_generator, test_generator, seen, fused, best_part, best, difference, low, high``,
        means over seeds, the interval by bootstrap over the test images; sorted by difference.
        """
        rows = []
        cells = {n: dict(list(self.cells(n, "auroc").groupby(PAIR, sort=False))) for n in (fused, *parts)}
        for pair, mine in cells[fused].items():
            best = max(parts, key=lambda name: cells[name][pair]["value"].mean())
            theirs = cells[best][pair]
            low, high = interval(self._drawn(mine) - self._drawn(theirs))
            value, least = mine["value"].mean(), theirs["value"].mean()
            rows.append(
                dict(zip(PAIR, pair, strict=True))
                | {"seen": mine["seen"].iloc[0], "fused": value, "best_part": best, "best": least,
                   "difference": value - least, "low": low, "high": high}
            )  # fmt: skip
        return pd.DataFrame(rows).sort_values("difference", ignore_index=True)

    def save(self, folder: Path) -> None:
        """Write ``study.json``, one JSON per run under ``runs/``, ``table.csv`` and ``summary.csv``."""
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        for run in self.runs:
            write_json(run_path(folder, run.detector, run.train_generator, run.seed), asdict(run))
        about = {"options": self.options, "test": self.test.to_dict(orient="list")}
        write_json(folder / "study.json", about)
        for name, table in (("table", self.table), ("summary", self.summary())):
            write_csv(table.assign(**self.options["made_by"]), folder / f"{name}.csv")


MEAN, WORST = "mean of cells", "worst cell"
OURS, THEIRS = "ours", "published, not ours"
COLUMNS = [
    "kind", "condition", "detector", "title", "metric", "row", "seen", "value", "low", "high", "interval",
    "seed_sd", "where", "n_seeds", "n_real", "n_fake", "preset", "models", "itemkit", "note",
]  # fmt: skip
SHOWN = {
    "accuracy": "Accuracy",
    "auroc": "Area under the ROC curve",
    "ap": "Average precision",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy_oracle": "Accuracy at the oracle threshold (chosen on the test images: a bound, not a result)",
}


def study_table(studies: Mapping[str, Study], protocol: Protocol) -> pd.DataFrame:
    """Join the studies of several conditions and the published numbers into one long table.

    Where the protocol names its training set, a cell is a test set and all of them count, as in the published
    means. Where every generator trains in turn, a cell is a pair of generators; mean and worst are over pairs
    of different families, or over all where there are none.

    Returns
    -------
    DataFrame
        `COLUMNS`: ``row`` is a cell, "mean of cells" or "worst cell", ``where`` which cell is the worst,
        ``seen`` whether one of the tested family was trained on, ``value`` a share, the mean over seeds,
        ``low, high`` its ``interval``.
    """
    rows: list[dict] = []
    for condition, study in studies.items():
        made = {"kind": OURS, "condition": condition, "interval": f"{LEVEL:.0%}, test images"}
        made |= study.options["made_by"]
        for detector in study.detectors:
            for metric in study.options["metrics"]:
                made |= {"detector": detector, "title": study.options["titles"][detector], "metric": metric}
                rows += [made | row for row in _lines(study, study.cells(detector, metric), protocol)]
    for given in protocol.published:
        about = {"kind": THEIRS, "condition": given["condition"], "metric": given["metric"], "row": MEAN}
        for name, value in given["values"]:
            theirs = {"detector": name, "title": name, "value": value / 100, "where": given["what"]}
            rows.append(about | theirs)
    return pd.DataFrame(rows, columns=COLUMNS)


def _lines(study: Study, cells: pd.DataFrame, protocol: Protocol) -> list[dict]:
    """Every cell, their mean and the worst of them."""

    def about(part: pd.DataFrame) -> dict:
        first = part.iloc[0]
        name = protocol.test.get(first["test_generator"], first["test_generator"])
        row = name if protocol.train else f"{first['train_generator']} → {name}"
        return {"row": row, "where": ""} | first[["seen", "n_real", "n_fake"]].to_dict() | study.mean(part)

    counted = cells if protocol.train or cells["seen"].all() else cells[~cells["seen"]]
    lines = [about(part) for _, part in cells.groupby(PAIR, sort=False)]
    lines.append({"row": MEAN, "where": ""} | study.mean(counted))
    if len(worst := study.worst(counted)):
        line = about(worst)
        lines.append(line | {"row": WORST, "where": line["row"]})
    return lines


def to_markdown(
    table: pd.DataFrame, studies: Mapping[str, Study], protocol: Protocol, notes: Sequence[str] = ()
) -> str:
    """Print a `study_table`: means and worst cells of every contender, then cell by cell; ``notes`` first."""
    study = next(iter(studies.values()))
    made, seeds, y = study.options["made_by"], study.options["seeds"], study.test[schema.LABEL]
    paragraphs = [
        f"# {protocol.title}",
        *notes,
        f"**Note: {made['note']}**" if made["note"] else "",
        f"Made by itemkit {made['itemkit']} with preset {made['preset'] or 'none'}, models "
        f"{made['models'] or 'unknown'}; {(y == schema.REAL).sum():,} real and {(y == schema.FAKE).sum():,} "
        f"fake test images; seeds {', '.join(map(str, seeds))}.",
        f"Values in per cent: mean over {count(len(seeds), 'seed')} ({100 * LEVEL:.0f} % interval over test "
        f"images, {study.options['n_boot']} resamples; ± standard deviation over seeds).",
    ]
    shown = [protocol.metric, *(given["metric"] for given in protocol.published)]
    # beside an accuracy, what the best threshold for the test images would have given: never a result
    shown += ["accuracy_oracle"] if protocol.train else ["auroc", "ap", "balanced_accuracy"]
    for metric in dict.fromkeys(shown):
        paragraphs += [f"## {SHOWN[metric]}", "\n".join(_means(table[table["metric"] == metric]))]
    title = SHOWN[protocol.metric]
    paragraphs += [f"## Cell by cell: {title[0].lower()}{title[1:]}", *_by_cell(table, protocol)]
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def _percent(row: Mapping, interval: bool = True) -> str:
    if pd.isna(row["value"]):
        return "-"
    text = f"{100 * row['value']:.1f}"
    if interval and pd.notna(row["low"]):
        text += f" ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
    return text + (f" ± {100 * row['seed_sd']:.1f}" if interval and pd.notna(row["seed_sd"]) else "")


def _means(part: pd.DataFrame) -> list[str]:
    """A line for each contender, columns for mean and worst cell in each condition."""
    lines: dict[tuple, dict[str, str]] = {}
    for row in part[part["row"].isin([MEAN, WORST])].to_dict("records"):
        line = lines.setdefault((row["kind"], row["title"]), {"detector": row["title"]})
        if row["kind"] == THEIRS:
            line[f"PUBLISHED, NOT OURS: mean, {row['condition']}"] = _percent(row, False)
        elif row["row"] == MEAN:
            line[f"{row['condition']}: mean"] = _percent(row)
        else:
            line[f"{row['condition']}: worst cell"] = f"{_percent(row, False)} ({row['where']})"
    return markdown_table(pd.DataFrame(list(lines.values())))


def _by_cell(table: pd.DataFrame, protocol: Protocol) -> list[str]:
    """A line for each cell, a column for each contender, with the values of all conditions."""
    part = table[(table["metric"] == protocol.metric) & (table["kind"] == OURS)]
    conditions = list(dict.fromkeys(part["condition"]))
    # unseen cells first, then mean and worst, then what the training generators' own families give
    seen = part["seen"].eq(True) & ~part["row"].isin([MEAN, WORST]) & (not protocol.train)
    part = part.assign(
        cell=part["row"] + np.where(seen, " (seen)", ""),
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
