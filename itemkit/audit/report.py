"""What the audit found: a ranked table, the sentence a reader needs, and the data of its figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from itemkit import schema

# Lower end of the interval from which a leak gets its name; our choice.
VERDICTS = ((0.9, "decides"), (0.7, "strong"), (0.55, "moderate"))


@dataclass
class AuditReport:
    """What the audit found.

    Attributes
    ----------
    table : DataFrame
        One row per property, ranked: ``property, kind, auroc, low, high, n_real, n_fake, verdict, sentence,
        advice``.
    duplicates : DataFrame
        Pairs of images that show the same picture; see `duplicates.find_duplicates`.
    measurements, errors : DataFrame
        One row per readable image with all that was measured; ``path, label, kind, reason`` of the others.
    notes : list of str
        What was left out, and why.
    """

    table: pd.DataFrame
    duplicates: pd.DataFrame
    measurements: pd.DataFrame
    errors: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    @property
    def leaks(self) -> pd.DataFrame:
        """Rows of the table whose property separates the classes."""
        return self.table[self.table["verdict"].isin([name for _, name in VERDICTS])]

    def to_text(self, before: AuditReport | None = None) -> str:
        """Give the report as plain text, for a terminal.

        Parameters
        ----------
        before : AuditReport, optional
            Of the same images before something was done to them; its AUROC stands beside the one now.
        """
        m = self.measurements
        n_real, n_fake = (int((m[schema.LABEL] == label).sum()) for label in (schema.REAL, schema.FAKE))
        old = {} if before is None else before.table.set_index("property")["auroc"].to_dict()
        was = f"{'before':>8}" if old else ""
        lines = [
            f"Audit of {len(m):,} images: {n_real:,} real, {n_fake:,} fake",
            self.headline(),
            "",
            "AUROC of each property alone, on images it was not fitted to (0.5 says nothing, 1 says all)",
            "",
            f"  {'property':<20}{was}{'AUROC':>8}  {'95 % interval':<16}{'real':>7}{'fake':>7}  verdict",
        ]
        for row in self.table.itertuples():
            was = f"{_three(old[row.property]):>8}" if old else ""
            interval = f"{row.low:.3f} - {row.high:.3f}" if np.isfinite(row.auroc) else ""
            lines.append(
                f"  {row.property:<20}{was}{_three(row.auroc):>8}  {interval:<16}{row.n_real:>7,}"
                f"{row.n_fake:>7,}  {row.verdict}"
            )
        told = [*self.leaks["sentence"], *self._duplicate_sentences(), *self.notes]
        lines += ["", *(f"- {sentence}" for sentence in told)]
        if len(self.leaks):
            lines += ["", "What to do", *(f"- {advice}" for advice in self.leaks["advice"].unique())]
        return "\n".join(lines)

    def headline(self) -> str:
        """Say in one or two sentences what all of it means for a detector's score on these images."""
        if not len(self.leaks):
            return "No property separates the classes."
        worst, n = self.leaks.iloc[0], len(self.leaks)
        return (
            f"{n} of {len(self.table)} properties separate{'s' * (n == 1)} the classes. The strongest, "
            f"'{worst['property']}', reaches AUROC {worst['auroc']:.3f} alone: a detector that sees it can "
            "score as much without having learnt anything about generated images."
        )

    def _duplicate_sentences(self) -> list[str]:
        found = []
        for kind, what in (("exact", "exact copies"), ("near", "near copies (perceptual hash)")):
            pairs = self.duplicates[self.duplicates["kind"] == kind]
            if len(pairs):
                first = pairs.sort_values(["across_classes", "across_splits"], ascending=False).iloc[0]
                splits, classes = int(pairs["across_splits"].sum()), int(pairs["across_classes"].sum())
                found.append(
                    f"Pairs of {what}: {len(pairs):,}, {splits:,} across splits, {classes:,} across classes; "
                    f"first: {first['path_a']} and {first['path_b']}. Keep one, or both in one split."
                )
        return found or ["No duplicates found."]


def ranking(reports: Mapping[str, AuditReport]) -> pd.DataFrame:
    """Rankings of one data set in several states, ready for `plots.intervals`.

    Parameters
    ----------
    reports : mapping
        Name of each state ("as they are", "equalised") to its report.

    Returns
    -------
    DataFrame
        ``property, data, value, low, high``; in the order of the first report, without what could not be
        measured.
    """
    parts = [
        report.table[["property", "auroc", "low", "high"]]
        .rename(columns={"auroc": "value"})
        .assign(data=name)
        for name, report in reports.items()
    ]
    table = pd.concat(parts, ignore_index=True).dropna(subset="value")
    order = list(dict.fromkeys(table["property"]))
    table = table.sort_values("property", key=lambda names: names.map(order.index), kind="stable")
    return table[["property", "data", "value", "low", "high"]].reset_index(drop=True)


def _three(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"
