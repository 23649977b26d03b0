"""What follows from the scores of a study: metrics with intervals, comparisons, late fusions, one table.

A `Run` is one contender trained on one generator with one seed; a `Study` is all of them on the same
test images.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from itemkit import schema
from itemkit._files import write_json
from itemkit.calibrate import best_threshold, fit_calibrator, lacking, threshold_at_fpr
from itemkit.errors import InputError
from itemkit.metrics import (
    METRIC_TITLES,
    SMALLER_IS_BETTER,
    THRESHOLD_METRICS,
    draw_weights,
    metric_interval,
    percentile_interval,
    replicate,
    two_sided_p,
)
from itemkit.protocols import Protocol
from itemkit.text import count, did_you_mean, markdown_table, one_line, write_csv

FORMAT = "itemkit study 1"
POOLED = "pooled_unseen"
STUDY_METRICS: tuple[str, ...] = ("ap", "auroc", "balanced_accuracy", "accuracy_real", "accuracy_fake")
STUDY_METRICS += ("accuracy_oracle", "tpr_at_fpr01", "tpr_at_fpr05", "ece")
LEVEL, BOOT_SEED = 0.95, 0  # of all intervals over test images
PAIR = ("train_generator", "test_generator")
KEY = ("detector", *PAIR, "seed", "metric")


@dataclass
class Run:
    """Scores of one contender, trained on one generator with one seed.

    Attributes
    ----------
    detector, train_generator, seed
        What was run.
    val_scores, val_labels : lists
        Of the half of the validation images that calibrates.
    test_scores : list of float
        Of every test image, in the order of ``Study.test``.
    n_train, seconds, key, config
        How it was made.
    threshold : float or None
        On the score; None where the validation images are too few, with the reason in ``withheld``.
    scale, offset : float
        p(fake) = sigmoid(scale * score + offset).
    """

    detector: str
    train_generator: str
    seed: int
    val_scores: list[float]
    val_labels: list[int]
    test_scores: list[float]
    n_train: int = 0
    seconds: float = 0.0
    key: str = ""
    config: dict = field(default_factory=dict)
    threshold: float | None = None
    withheld: str = ""
    scale: float = 1.0
    offset: float = 0.0

    def calibrate(self, options: Mapping[str, Any]) -> Run:
        """Choose threshold and calibration on the validation scores; ``options`` as in `train_on_test_on`."""
        # seven digits on disk and in memory alike: a run read back gives the same table to the last bit
        self.val_scores = [float(f"{v:.7g}") for v in self.val_scores]
        self.test_scores = [float(f"{v:.7g}") for v in self.test_scores]
        self.val_labels = [int(label) for label in self.val_labels]
        s, y = np.array(self.val_scores), np.array(self.val_labels)
        self.threshold, self.withheld = None, ""
        if options["threshold"] == "best":
            self.threshold = float(best_threshold(y, s))
        elif reason := lacking(options["fpr"], int((y == schema.REAL).sum()), schema.REAL):
            self.withheld = reason
        else:
            self.threshold = float(threshold_at_fpr(s[y == schema.REAL], options["fpr"]).value)
        platt = fit_calibrator(y, s, "platt")
        self.scale, self.offset = platt.scale, platt.offset
        return self

    def probability(self) -> np.ndarray:
        """Calibrated p(fake) of every test image."""
        return expit(self.scale * np.asarray(self.test_scores) + self.offset)


def run_name(detector: str, train_generator: str, seed: int) -> str:
    """File name of a run; characters that a file system may not like are replaced."""

    def plain(name: str) -> str:
        short = re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)[:80]
        # two names that lose the difference between them must not share a file
        return short if short == name else f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    return f"{plain(detector)}--{plain(train_generator)}--s{seed}.json"


def late_fusion(
    val_scores: Sequence[np.ndarray], y_val: np.ndarray, scores: Sequence[np.ndarray]
) -> np.ndarray:
    """Mean of several detectors' log-odds, calibrated on validation images so that none speaks louder."""
    parts = zip(val_scores, scores, strict=True)
    return np.mean([fit_calibrator(y_val, val, "platt").logit(s) for val, s in parts], axis=0)


@dataclass
class Study:
    """Runs and what follows from them.

    Attributes
    ----------
    test : DataFrame
        The test images: ``image_id, path, label, generator, source``.
    runs : list of Run
    options : dict
        Everything that was asked for, and ``made_by``, `Features.provenance`.
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

    @property
    def detectors(self) -> list[str]:
        """Names of the contenders, in the order they were run."""
        return list(dict.fromkeys(run.detector for run in self.runs))

    @property
    def failures(self) -> dict[str, str]:
        """Contenders that could not be run, with the reason."""
        return self.options.get("failures", {})

    @property
    def notes(self) -> list[str]:
        """What is left out or empty, and why."""
        return self.options.get("notes", [])

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
        rng = np.random.default_rng(BOOT_SEED)
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
        y, metrics = self.test[schema.LABEL].to_numpy(int), self.options["metrics"]
        weights = np.c_[np.ones(len(y)), self._weights()]  # the sample itself, and its resamples
        rows: list[dict] = []
        for run in runs:
            s, p = np.asarray(run.test_scores), run.probability()
            # without a threshold its metrics stay empty; everything else does not need one
            defined = [m for m in metrics if run.threshold is not None or m not in THRESHOLD_METRICS]
            for name, mask in self._groups(run.train_generator).items():
                found = replicate(y[mask], s[mask], weights[mask], defined, run.threshold, p[mask], True)
                seen = name != POOLED and self._seen(run.train_generator, name)
                cell = dict(zip(KEY, (run.detector, run.train_generator, name, run.seed), strict=False))
                images = {"n_real": int((y[mask] == 0).sum()), "n_fake": int((y[mask] == 1).sum())}
                for metric in metrics:
                    value, *drawn = found.get(metric, [float("nan")])
                    self._replicates[(*cell.values(), metric)] = np.asarray(drawn)
                    low, high = metric_interval(metric, value, np.asarray(drawn), LEVEL)
                    about = {"metric": metric, "value": float(value), "low": low, "high": high}
                    rows.append(cell | {"seen": seen} | about | images)
        new = pd.DataFrame(rows)
        self.table = new if self.table.empty else pd.concat([self.table, new], ignore_index=True)

    # ------------------------------------------------------------------------------------------- summaries

    def cells(self, detector: str, metric: str, pooled: bool = False) -> pd.DataFrame:
        """Rows of `table` of one contender and metric: pairs of generators, or the pooled ones, and seeds."""
        known = {detector: self.detectors, metric: self.options["metrics"]}
        if unknown := [name for name, names in known.items() if name not in names]:
            name, names = unknown[0], known[unknown[0]]
            failed = (
                f" It failed, {self.failures[name]}" if name in self.failures else did_you_mean(name, names)
            )
            raise InputError(f"no {name!r} in this study; there are {', '.join(names)}.{failed}")
        rows = (self.table["detector"] == detector) & (self.table["metric"] == metric)
        return self.table[rows & ((self.table["test_generator"] == POOLED) == pooled)]

    def drawn(self, cells: pd.DataFrame) -> np.ndarray:
        """Bootstrap replicates of the mean over some rows of `table`; empty where there are none."""
        parts = [self._replicates[key] for key in cells[list(KEY)].itertuples(index=False, name=None)]
        whole = parts and all(len(part) == len(parts[0]) for part in parts)
        return np.mean(parts, axis=0) if whole else np.zeros(0)

    def mean(self, cells: pd.DataFrame) -> dict[str, float]:
        """Mean over some rows of `table` of one contender and metric.

        Returns
        -------
        dict
            ``value``; ``low, high`` by bootstrap over the test images, all cells resampled together;
            ``seed_sd``, standard deviation over seeds of the mean over cells; ``n_seeds``.
        """
        value = float(cells["value"].mean()) if len(cells) else float("nan")
        low, high = metric_interval(next(iter(cells["metric"]), ""), value, self.drawn(cells), LEVEL)
        by_seed = cells.groupby("seed")["value"].mean()
        return {"value": value, "low": low, "high": high, "seed_sd": by_seed.std(), "n_seeds": len(by_seed)}

    def worst(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Those of the rows that belong to the weakest pair of generators, by the mean over seeds."""
        by_cell = cells.groupby(list(PAIR), sort=False)["value"].mean().dropna()
        if by_cell.empty:
            return cells[:0]
        at = by_cell.idxmax() if cells["metric"].iloc[0] in SMALLER_IS_BETTER else by_cell.idxmin()
        return cells[(cells[PAIR[0]] == at[0]) & (cells[PAIR[1]] == at[1])]

    def matrix(self, detector: str, metric: str = "auroc") -> pd.DataFrame:
        """Train generator × test generator, mean over seeds."""
        mean = self.cells(detector, metric).groupby(list(PAIR))["value"].mean().unstack()
        return mean.reindex(index=self.options["train_generators"], columns=self.options["test_generators"])

    def summary(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per contender and metric.

        Returns
        -------
        DataFrame
            ``detector, metric``; ``unseen_mean`` over all cells of generators not trained on and all seeds,
            with ``low, high, seed_sd`` as in `mean`; ``worst``, the weakest unseen cell, with ``worst_low,
            worst_high, worst_train, worst_test``; ``seen_mean``; ``pooled_unseen`` (all unseen fakes
            together, reals once); ``n_cells, n_seeds``.
        """
        rows = []
        for detector in self.detectors:
            for metric in metrics or self.options["metrics"]:
                cells = self.cells(detector, metric)
                unseen = cells[~cells["seen"]]
                weakest = self.worst(unseen)
                mean, worst = self.mean(unseen), self.mean(weakest)
                row = {"detector": detector, "metric": metric, "unseen_mean": mean["value"]}
                row |= {key: mean[key] for key in ("low", "high", "seed_sd")}
                row |= {"worst": worst["value"], "worst_low": worst["low"], "worst_high": worst["high"]}
                row["worst_train"], row["worst_test"] = (next(iter(weakest[k]), None) for k in PAIR)
                row["seen_mean"] = cells[cells["seen"]]["value"].mean()
                row["pooled_unseen"] = self.cells(detector, metric, pooled=True)["value"].mean()
                row |= {"n_cells": len(cells.drop_duplicates(list(PAIR))), "n_seeds": cells["seed"].nunique()}
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
            for both; ``seed_sd`` is the spread of the difference over seeds.
        """

        def unseen(name: str) -> tuple[pd.Series, np.ndarray]:
            cells = self.cells(name, metric)
            cells = cells[~cells["seen"]]
            return cells.groupby("seed")["value"].mean(), self.drawn(cells)

        mine, drawn = unseen(reference)
        rows = []
        for other in others or [name for name in self.detectors if name != reference]:
            theirs, other_drawn = unseen(other)
            gap, by_seed = drawn - other_drawn, mine - theirs
            low, high = percentile_interval(gap, LEVEL)
            rows.append(
                {"reference": reference, "other": other, "metric": metric, "difference": by_seed.mean(),
                 "low": low, "high": high, "p_value": two_sided_p(gap), "seed_sd": by_seed.std()}
            )  # fmt: skip
        return pd.DataFrame(rows)

    # --------------------------------------------------------------------------------------------- fusion

    def fuse(self, name: str, parts: Sequence[str]) -> Study:
        """Add the `late_fusion` of contenders that were run, from their stored scores; returns itself."""
        if name in self.detectors:
            raise InputError(f"the study has a contender {name!r} already")
        for part in parts:
            self.cells(part, self.options["metrics"][0])  # complains about an unknown name
        found = {(r.detector, r.train_generator, r.seed): r for r in self.runs}
        new = []
        for run in [r for r in self.runs if r.detector == parts[0]]:
            mine = [found[part, run.train_generator, run.seed] for part in parts]
            val, test = (
                [np.asarray(getattr(r, which)) for r in mine] for which in ("val_scores", "test_scores")
            )
            y = np.asarray(run.val_labels)
            fused = replace(run, detector=name, val_scores=late_fusion(val, y, val).tolist(), key="")
            fused.test_scores, fused.config = (
                late_fusion(val, y, test).tolist(),
                {"fuse": [r.config for r in mine]},
            )
            new.append(fused.calibrate(self.options))
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
        sign = -1 if metric in SMALLER_IS_BETTER else 1
        cells = {
            name: dict(list(self.cells(name, metric).groupby(list(PAIR), sort=False)))
            for name in (fused, *parts)
        }
        rows = []
        for (train, test), mine in cells[fused].items():
            there = {name: cells[name][train, test] for name in parts}
            best = max(parts, key=lambda name: sign * there[name]["value"].mean())
            low, high = percentile_interval(self.drawn(mine) - self.drawn(there[best]), LEVEL)
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
        for name, table in (("table", self.table), ("summary", self.summary())):
            write_csv(table.assign(**self.options["made_by"]), folder / f"{name}.csv")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """Read a study written by `save`, and compute its table again from the scores."""
        folder = Path(folder)
        if not (folder / "study.json").is_file():
            raise InputError(f"{folder} holds no study.json; make one with train_on_test_on(..., out=...)")
        try:
            about = json.loads((folder / "study.json").read_text("utf-8"))
            runs = [Run(**json.loads((folder / "runs" / name).read_text("utf-8"))) for name in about["runs"]]
            return cls(pd.DataFrame(about["test"]), runs, about["options"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{folder} holds no study of this version ({one_line(error)}); run it again"
            ) from error


def fusion_report(study: Study, fused: Mapping[str, Sequence[str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Is a fusion ever worse than the better of its parts? Judged by the AUROC of every unseen cell.

    Parameters
    ----------
    study : Study
        Holds the fusions and their parts.
    fused : dict
        Fusion -> its parts.

    Returns
    -------
    tuple of DataFrame
        `Study.fusion_gain` of every fusion over the unseen cells, with the column ``fusion``; and one line
        per fusion to be printed.
    """
    tables, lines = [], []
    worst = study.summary(["auroc"]).set_index("detector")
    for name, parts in fused.items():
        gain = study.fusion_gain(name, parts)
        gain = gain[~gain["seen"]].assign(fusion=name)
        if gain.empty:
            continue
        tables.append(gain)
        below, least = gain["difference"] < 0, gain.iloc[0]
        where = f" ({least['train_generator']} → {least['test_generator']})"
        lines.append(
            {"fusion": f"{name} ({', '.join(parts)})",
             "cells below the better part": f"{below.sum()} of {len(gain)}",
             f"beyond the {LEVEL:.0%} interval": int((gain["high"] < 0).sum()),
             "largest loss": f"{-least['difference']:.3f}{where}" if below.any() else "",
             "worst cell": f"{worst.loc[name, 'worst']:.3f}",
             "best worst cell of a part": f"{worst.loc[list(parts), 'worst'].max():.3f}"}
        )  # fmt: skip
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(), pd.DataFrame(lines)


# ---------------------------------------------------------------------------- one table of several conditions

MEAN, WORST = "mean of cells", "worst cell"
OURS, THEIRS = "ours", "published, not ours"
COLUMNS = (
    "kind", "condition", "detector", "title", "metric", "row", "seen", "value", "low", "high", "interval",
    "seed_sd", "where", "n_seeds", "n_real", "n_fake", "preset", "models", "itemkit", "note",
)  # fmt: skip


def study_table(studies: Mapping[str, Study], protocol: Protocol, titles: Mapping[str, str]) -> pd.DataFrame:
    """Join the studies of several conditions and the published numbers into one long table.

    Parameters
    ----------
    studies : dict
        Condition ("raw", "equalised" ...) -> study.
    protocol : Protocol
        Where it names its training set, a cell is a test set and all of them count, the training generator's
        own as well, as the published means do. Where every generator trains in turn, a cell is a pair of
        generators; mean and worst are over pairs of different families, or over all where there are none.
    titles : dict
        Contender -> name to print.

    Returns
    -------
    DataFrame
        ``kind`` ("ours" or "published, not ours"), ``condition, detector, title, metric, row`` (a cell,
        "mean of cells" or "worst cell"), ``seen`` (was one of the tested family trained on?), ``value`` (mean
        over seeds), ``low, high`` and what they are an ``interval`` over, ``seed_sd``, ``where`` (which cell
        is the worst), ``n_seeds``, ``n_real, n_fake`` (test images), and ``preset, models, itemkit, note``:
        what made them. All values are shares, also the published ones, which are printed in per cent.
    """
    rows: list[dict] = []
    for condition, study in studies.items():
        made = {"kind": OURS, "condition": condition, "interval": f"{LEVEL:.0%}, test images"}
        made |= study.options["made_by"]
        for detector in study.detectors:
            for metric in study.options["metrics"]:
                about = made | {"detector": detector, "title": titles[detector], "metric": metric}
                rows += [about | row for row in _lines(study, study.cells(detector, metric), protocol)]
    for published in protocol.published:
        about = {"kind": THEIRS, "condition": published.condition, "metric": published.metric, "row": MEAN}
        for method, value in published.values:
            named = {"detector": method, "title": method, "value": value / 100, "where": published.what}
            rows.append(about | named)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _lines(study: Study, cells: pd.DataFrame, protocol: Protocol) -> list[dict]:
    """Every cell, their mean and the worst of them."""
    names = protocol.titles()

    def about(part: pd.DataFrame) -> dict:
        first = part.iloc[0]
        name = names.get(first["test_generator"], first["test_generator"])
        row = name if protocol.train else f"{first['train_generator']} → {name}"
        return {"row": row, "where": ""} | first[["seen", "n_real", "n_fake"]].to_dict() | study.mean(part)

    counted = cells if protocol.train or cells["seen"].all() else cells[~cells["seen"]]
    lines = [about(part) for _, part in cells.groupby(list(PAIR), sort=False)]
    lines.append({"row": MEAN, "where": ""} | study.mean(counted))
    if len(worst := study.worst(counted)):
        line = about(worst)
        lines.append(line | {"row": WORST, "where": line["row"]})
    return lines


def to_markdown(
    table: pd.DataFrame, studies: Mapping[str, Study], protocol: Protocol, notes: Sequence[str] = ()
) -> str:
    """Print the table: means and worst cells of every contender, then cell by cell in the published order.

    Parameters
    ----------
    table, studies
        Of `study_table`, and what it was made of.
    protocol : Protocol
    notes : sequence of str
        Paragraphs below the title.

    Returns
    -------
    str
    """
    study = next(iter(studies.values()))
    made, seeds, y = study.options["made_by"], study.options["seeds"], study.test[schema.LABEL]
    paragraphs = [f"# {protocol.title}", *notes, f"**Note: {made['note']}**" if made["note"] else ""]
    paragraphs += [
        f"Made by itemkit {made['itemkit']} with preset {made['preset'] or 'none'}, models "
        f"{made['models'] or 'unknown'}; {(y == schema.REAL).sum():,} real and {(y == schema.FAKE).sum():,} "
        f"fake test images; seeds {', '.join(map(str, seeds))}.",
        f"Values in per cent: mean over {count(len(seeds), 'seed')} ({100 * LEVEL:.0f} % interval over test "
        f"images, {study.options['n_boot']} resamples; ± standard deviation over seeds).",
    ]
    shown = [protocol.metric, *(p.metric for p in protocol.published)]
    # beside an accuracy, what the best threshold for the test images would have given: never a result
    shown += ["accuracy_oracle"] if protocol.train else ["auroc", "ap", "balanced_accuracy"]
    for metric in dict.fromkeys(shown):
        title = METRIC_TITLES[metric]
        paragraphs += [
            f"## {title[0].upper()}{title[1:]}",
            "\n".join(_means(table[table["metric"] == metric])),
        ]
    paragraphs += [f"## Cell by cell: {METRIC_TITLES[protocol.metric]}", *_by_cell(table, protocol)]
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def _percent(row: pd.Series, interval: bool = True) -> str:
    if pd.isna(row["value"]):
        return "-"
    text = f"{100 * row['value']:.1f}"
    if interval and pd.notna(row["low"]):
        text += f" ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
    return text + (f" ± {100 * row['seed_sd']:.1f}" if interval and pd.notna(row["seed_sd"]) else "")


def _means(part: pd.DataFrame) -> list[str]:
    rows: dict[tuple, dict[str, str]] = {}
    for _, row in part[part["row"].isin([MEAN, WORST])].iterrows():
        line = rows.setdefault((row["kind"], row["title"]), {"detector": row["title"]})
        if row["kind"] == THEIRS:
            line[f"PUBLISHED, NOT OURS: mean, {row['condition']}"] = _percent(row, False)
        elif row["row"] == MEAN:
            line[f"{row['condition']}: mean"] = _percent(row)
        else:
            line[f"{row['condition']}: worst cell"] = f"{_percent(row, False)} ({row['where']})"
    return markdown_table(pd.DataFrame(list(rows.values())))


def _by_cell(table: pd.DataFrame, protocol: Protocol) -> list[str]:
    part = table[(table["metric"] == protocol.metric) & (table["kind"] == OURS)]
    conditions = list(dict.fromkeys(part["condition"]))
    rows: dict[str, dict[str, list[str]]] = {}
    # unseen cells first, then mean and worst, then what the training generators' own families give
    rank = {MEAN: 1, WORST: 2}
    seen = part["seen"].eq(True) & (not protocol.train) & ~part["row"].isin(rank)
    for (_, row), known in zip(part.iterrows(), seen, strict=True):
        line = rows.setdefault(f"{row['row']} (seen)" if known else row["row"], {})
        line.setdefault(row["title"], ["-"] * len(conditions))[conditions.index(row["condition"])] = _percent(
            row, False
        )
    titles = {test.title: i - len(protocol.test) for i, test in enumerate(protocol.test)}
    order = sorted(
        rows, key=lambda name: rank.get(name, 3 if name.endswith(" (seen)") else titles.get(name, 0))
    )
    lines = [{"cell": name} | {title: " / ".join(v) for title, v in rows[name].items()} for name in order]
    return [f"Each entry: {' / '.join(conditions)}.", "\n".join(markdown_table(pd.DataFrame(lines)))]
