"""One table of a study: every contender in every condition, means, worst cells, published numbers apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from itemkit.metrics import METRIC_TITLES, SMALLER_IS_BETTER
from itemkit.study.protocols import Protocol
from itemkit.study.results import POOLED, Study

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
