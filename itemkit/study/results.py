"""What a study found: scores per run, and the tables, comparisons and fusions that follow from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit._files import write_json
from itemkit.errors import InputError
from itemkit.metrics import (
    SMALLER_IS_BETTER,
    draw_weights,
    metric_interval,
    percentile_interval,
    replicate,
    two_sided_p,
)
from itemkit.study.fusion import late_fusion
from itemkit.study.runs import Run, finish_run, run_name

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
            See `itemkit.study.fusion.late_fusion`.

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
