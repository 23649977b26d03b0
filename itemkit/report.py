"""One page about a data set and a detector: a single HTML file that needs no network, and prints well.

What cannot be said of these images is said on the page, with the reason. Names and captions are data: all of
it is escaped, and nothing in the file runs.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from itemkit import audit, plots, schema, workflow
from itemkit._files import atomic_write
from itemkit.errors import InputError, ItemkitError
from itemkit.features import FOUND, Features
from itemkit.findings import LEAST, by_phrase, hardest
from itemkit.images import load_image
from itemkit.metrics import effect_size
from itemkit.misalignment import cosines
from itemkit.models import PARTS
from itemkit.text import count, one_line, printable

if TYPE_CHECKING:
    from itemkit.detector import Detector

AUDITED = 2000  # images at most whose files are opened for the audit, drawn at random
SIDE_PX = 320  # the longer side of a thumbnail; 16 of them are some 200 KB
ROWS = 24  # generators or words in one figure
LONGEST = 20  # characters of a name in a figure
WORDS = 30  # in the table of objects
METRICS = {  # columns of `workflow.evaluate`, as a reader calls them
    "n_real": "reals", "n_fake": "fakes", "auroc": "AUROC", "ap": "AP", "accuracy_real": "reals called real",
    "accuracy_fake": "fakes called fake", "tpr_at_fpr05": "TPR at 5 % FPR", "called_fake": "called fake",
    "above_half": "p(fake) above 1/2",
}  # fmt: skip
LEVELS = {"global_cosine": "whole image", "mean_local_cosine": "its objects"}


@dataclass
class Section:
    """A part of the page: sentences, points, figures, a table, links, groups of pictures, or some of them."""

    title: str
    lines: list[str]
    points: list[str] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)  # source, alt, caption
    table: pd.DataFrame | None = None
    links: list[str] = field(default_factory=list)  # to files beside the page
    groups: list[dict[str, Any]] = field(default_factory=list)  # title, cards

    def to_text(self) -> list[str]:
        """The section as lines for a terminal, without its pictures."""
        lines = ["", self.title, "", *map(printable, [*self.lines, *(f"- {point}" for point in self.points)])]
        if self.table is not None and len(self.table):
            lines += ["", *self.table.map(_shown).to_string(index=False).split("\n")]
        return lines


def write_report(
    path: str | Path,
    features: Features,
    detector: Detector | None = None,
    test: Features | None = None,
    *,
    fpr: float = 0.05,
    fnr: float = 0.05,
    evaluated: tuple[pd.DataFrame, pd.DataFrame, list[str]] | None = None,
    more: Sequence[Section] = (),
    left_out: Sequence[str] = (),
) -> list[Section]:
    """Write the page, and return its sections.

    Parameters
    ----------
    path : path
        Of the HTML file.
    features : Features
        Audited, and looked at for misalignment and phrases; nothing is trained on them.
    detector, test : Detector and Features, optional
        What is judged on which labelled images; by default all labelled ones of ``features``.
    fpr, fnr, evaluated
        Rates as of `itemkit.workflow.evaluate`, and what that returned if it has been asked already.
    more : sequence of Section
        To stand behind the detector's.
    left_out : sequence of str
        What was not made, with the reason, to stand among the limits.
    """
    labelled = features.select(features.table[schema.LABEL].notna().to_numpy(bool))
    test = labelled if test is None else test
    judged: list[Section] = []
    tiles: list[dict[str, str]] = []
    limits: list[str] = []
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the tables have names in any script
        plots.style()
        leak, first = _audit(labelled)
        sections = [first, _fits(features)]
        if detector is not None and len(test):
            table, wide, said = evaluated or workflow.evaluate(detector, test, fpr, fnr)
            tiles = _tiles(table, fpr)
            limits = [line for line in said if line.startswith("verdicts are withheld")]
            if known := int((detector.seen(test) != "").sum()):
                some = f"{known:,} of the {count(len(test), 'image')} judged here"
                limits.append(f"{some} made this detector: their numbers are no test of it")
            judged = [_metrics(detector, test, table, wide, said, fpr), *more, _hard(test, detector, fpr)]
        sections += [*(judged or more), _objects(labelled), _models(features)]
    shown = sum(len(group["cards"]) for section in sections for group in section.groups)
    sections.append(Section("Limits", [], [*limits, *left_out, *_limits(features, shown)]))
    made, label = features.provenance, features.table[schema.LABEL]
    generators = features.table.loc[label == schema.FAKE, schema.GENERATOR].nunique()
    what = f"{(label == schema.REAL).sum():,} real, {(label == schema.FAKE).sum():,} fake"
    by = f"preset {made['preset'] or 'unknown'}, models {made['models'] or 'unknown'}"
    about = f"{count(len(features), 'image')}: {what} of {count(generators, 'generator')}; {by}"
    note = made["note"]
    page = _environment().get_template("report.html")
    text = page.render(
        title="Do these images fit their captions?",
        about=f"{about}, itemkit {made['itemkit']}.",
        warning=note and f"{note[0].upper()}{note[1:]}.",
        tiles=[*tiles, leak],
        sections=sections,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(path), text.encode("utf-8", "backslashreplace"))
    return sections


# ------------------------------------------------------------------------------------------------- the page


def _environment() -> jinja2.Environment:
    """Templates that escape all they are given, for HTML and against characters that turn text around."""

    def shown(value: Any) -> Any:
        return value if hasattr(value, "__html__") else printable(value)  # the former is made by a template

    here = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=here, autoescape=True, undefined=jinja2.StrictUndefined, finalize=shown)
    made.filters |= {"shown": _shown, "numbers": pd.api.types.is_numeric_dtype}
    return made


def _shown(value: Any) -> str:
    """A cell of a table; a dash where nothing can be said."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, Real):
        return f"{value:,}" if float(value).is_integer() else f"{float(value):.3f}"
    return printable(value)


def _about(value: float, low: float, high: float) -> str | None:
    """An estimate with its interval, None where there is none."""
    return f"{value:.2f} ({low:.2f}-{high:.2f})" if value == value else None


def _figure(draw: Callable[[Axes], Any], height: float, alt: str, caption: str) -> dict[str, str]:
    """A figure of a column's width, which can be read on a phone; height in inches."""
    fig, drawn = Figure(figsize=(plots.COLUMN, height)), io.BytesIO()
    draw(ax := fig.subplots())
    names = [label.get_text() for label in ax.get_yticklabels()]  # a long one would leave no room
    short = [
        name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}" for name in names
    ]
    ax.set_yticks(ax.get_yticks(), short)
    fig.savefig(drawn, format="png")
    return {"source": _inline("png", drawn), "alt": alt, "caption": caption}


def _inline(kind: str, picture: io.BytesIO) -> str:
    """A picture as a part of the page."""
    return f"data:image/{kind};base64,{base64.b64encode(picture.getbuffer()).decode()}"


# --------------------------------------------------------------------------------------------- the sections


def _audit(labelled: Features) -> tuple[dict[str, str], Section]:
    """What besides content tells the classes apart, in the files as they are."""
    section = Section("What else tells the classes apart?", [])
    tile = {"name": "Strongest leak", "value": "–"}
    table = labelled.table.sample(min(len(labelled), AUDITED), random_state=0)
    if "caption_source" in table:  # a captioner's words are no property of the files
        own = table["caption_source"] == "user"
        table[schema.CAPTION] = table[schema.CAPTION].astype(object).where(own, None)
    try:
        if table.empty:
            raise InputError("no image has a label")
        found = audit.audit(table)
    except InputError as reason:
        why = one_line(reason).partition("; first: ")[0]  # what follows is a path of this machine
        section.lines.append(f"That cannot be told: {why}.")
        return {**tile, "about": "the files could not be audited"}, section
    section.lines += found.to_text().partition("\n\n")[0].split("\n")
    if len(labelled) > AUDITED:
        of = f"Drawn at random from {count(len(labelled), 'image')}"
        section.lines.append(f"{of}; the command itemkit audit looks at all.")
    if (labelled.run.get("fingerprint") or {}).get("transform"):
        section.lines.append("The features are of images that were changed after reading; the audit is not.")
    leaks = found.leaks.head(8)
    auroc = [_about(*row) for row in leaks[["auroc", "low", "high"]].itertuples(index=False)]
    section.table = leaks[["property", "set", "verdict"]].assign(AUROC=auroc)
    if len(leaks):
        first = leaks.iloc[0]
        where = "" if first["set"] == "all" else f", in {first['set']}"
        about = f"AUROC of '{first['property']}' alone{where}"
        return {**tile, "value": f"{first['auroc']:.2f}", "about": about}, section
    if found.table["auroc"].notna().any():
        return {**tile, "value": "none", "about": "no property of the files tells them apart"}, section
    return {**tile, "about": f"needs {audit.MIN_PER_CLASS} images of each class"}, section


def _fits(features: Features) -> Section:
    """How well images fit their captions, a row for each generator; nothing is trained."""
    names = features.table[schema.GENERATOR].astype(object).fillna("without label").astype(str)
    fit = cosines(features).assign(generator=names.to_numpy())
    real, rows = fit[fit["generator"] == schema.REAL_GENERATOR], []
    for name, part in fit.groupby("generator"):
        row: dict[str, Any] = {"generator": name, "images": len(part)}
        for column, what in LEVELS.items():
            size = effect_size(real[column], part[column]) if name != schema.REAL_GENERATOR else {}
            auroc = [size.get(key, math.nan) for key in ("auroc", "auroc_low", "auroc_high")]
            row[f"{what}: median cosine"] = part[column].median()
            row |= {f"{what}: AUROC": _about(*auroc), column: auroc[0]}
        rows.append(row)
    lines = [
        "Cosine of each image with its caption, and mean cosine of its objects with their phrases. Nothing "
        "is trained here. An AUROC above 1/2: real images fit better (95 % intervals over images)."
    ]
    section = Section("Do generated images fit their captions less well?", lines)
    if not rows:
        return Section(section.title, ["There is no image to look at."])
    table = pd.DataFrame(rows).sort_values("mean_local_cosine", ascending=False)
    first = table["generator"] == schema.REAL_GENERATOR
    fakes = table[~first]
    section.table = pd.concat([table[first], fakes]).drop(columns=list(LEVELS))
    if not (len(real) and len(fakes)):
        lines.append("There is nothing to compare: that needs real images, and others.")
        return section
    drawn = pd.concat([fit[fit["generator"] == name] for name in fakes["generator"][:ROWS]] + [real])
    for column, what in LEVELS.items():
        told = {name: f"{x:.2f}" for name, x in zip(fakes["generator"], fakes[column], strict=True) if x == x}
        xlabel = f"cosine with the text: {what}"

        def draw(ax: Axes, column: str = column, xlabel: str = xlabel, told: dict = told) -> None:
            plots.ridges(ax, drawn, column, xlabel, told)

        alt = (
            f"Distributions of the cosine with the text, {what}, of {count(len(fakes), 'generator')} and "
            f"behind each of real images; AUROC from {fakes[column].min():.2f} to {fakes[column].max():.2f}."
        )
        caption = "Grey: real images. Ticks: medians. At the right: AUROC."
        section.figures.append(_figure(draw, 0.75 + 0.3 * min(len(fakes), ROWS), alt, caption))
    return section


def _tiles(table: pd.DataFrame, fpr: float) -> list[dict[str, str]]:
    """The few numbers that are read first."""
    every = table[table["generator"] == "all"].set_index("metric")
    wanted = {
        "auroc": ("AUROC", "of the detector"),
        "accuracy_real": ("Reals called real", f"at a false-positive rate of {fpr:.0%}"),
        "accuracy_fake": ("Fakes called fake", "at the same threshold"),
    }
    if not every[["n_real", "n_fake"]].to_numpy().all():
        wanted = {"called_fake": ("Called fake", f"at a false-positive rate of {fpr:.0%}")}
    tiles = []
    for name, (title, about) in wanted.items():
        value, low, high, why = every.loc[name, ["value", "low", "high", "note"]]
        if value != value:
            tiles.append({"name": title, "value": "–", "about": why})
            continue
        value, low, high = (f"{x:.2f}" if name == "auroc" else f"{x:.0%}" for x in (value, low, high))
        tiles.append({"name": title, "value": value, "about": f"{low} to {high}; {about}"})
    return tiles


def _metrics(
    detector: Detector, test: Features, table: pd.DataFrame, wide: pd.DataFrame, said: list[str], fpr: float
) -> Section:
    """What the detector is worth, a row for each generator."""
    line = f"{count(len(test), 'image')}, over which the intervals are; threshold for --fpr {fpr:g}."
    section = Section("What is the detector worth?", [line], list(said), table=wide.rename(columns=METRICS))
    auroc = table[(table["metric"] == "auroc") & table["value"].notna()]
    if auroc.empty:
        return section
    auroc = auroc.sort_values("value", ascending=False, kind="stable")
    names = test.table[schema.GENERATOR].astype(object).fillna("").astype(str).to_numpy()
    every = auroc["generator"] == "all"
    few = list(auroc["generator"][~every] if not every.all() else pd.unique(names[test.labels == 1]))[:ROWS]
    order = pd.concat([auroc[every], auroc[auroc["generator"].isin(few)]])
    scores = pd.DataFrame({"score": detector.decision_function(test), schema.GENERATOR: names})
    parts = [scores[names == name] for name in few]
    parts.append(scores[test.labels == schema.REAL].assign(generator=schema.REAL_GENERATOR))
    promised = "accuracy_real" in wide

    def forest(ax: Axes) -> None:
        plots.intervals(ax, order, y="generator", xlabel="AUROC of the detector", reference=0.5)

    def ridges(ax: Axes) -> None:
        plots.ridges(ax, pd.concat(parts), "score", "log-odds of fake")
        if promised:
            ax.axvline(detector.threshold(fpr).value, color=plots.BLACK, lw=0.8, ls="--", zorder=99)

    of, height = count(len(few), "generator"), 0.75 + 0.3 * len(few)
    ends = f"{order['value'].min():.2f} to {order['value'].max():.2f}"
    alt = f"AUROC of the detector on all fakes and on those of {of}: {ends}."
    section.figures.append(_figure(forest, height, alt, "Bars: 95 % over images. Dotted: chance."))
    alt = f"Log-odds of fake that the detector gives to fakes of {of} and, behind each, to real images."
    caption = "Grey: real images." + " Dashed: the threshold, right of it is called fake." * promised
    section.figures.append(_figure(ridges, height, alt, caption))
    return section


def _hard(test: Features, detector: Detector, fpr: float) -> Section:
    """The images that are most wrong, as pictures."""
    lines = [
        "Marked: the object that fits worst, compared with what real images here have with such a phrase."
    ]
    section, hard = Section("Which images are hardest?", lines), hardest(test, detector, fpr=fpr)
    titles = {schema.REAL: "Real images that look most like fakes", schema.FAKE: "Fakes that look most real"}
    for label, rows in hard.groupby(schema.LABEL):
        title = f"{titles[label]} ({(rows['margin'] < 0).sum()} of these {len(rows)} on the wrong side)"
        section.groups.append({"title": title, "cards": [_card(row) for row in rows.itertuples()]})
    return section


def _card(row: Any) -> dict[str, Any]:
    """One image of `hardest`: a small copy, and its caption in pieces of which one is marked."""
    card: dict[str, Any] = {"p_fake": row.p_fake, "generator": row.generator, "picture": ""}
    card |= {"name": "/".join(Path(row.path).parts[-2:]), "alt": "the file can no longer be read"}
    try:
        image, copy = load_image(row.path), io.BytesIO()
        card["small"] = max(image.size) < SIDE_PX / 2
        image.thumbnail((SIDE_PX, SIDE_PX))
        kind = "png" if card["small"] else "jpeg"
        image.save(copy, kind, quality=80)
        card |= {"picture": _inline(kind, copy), "alt": f"{row.generator}: {row.caption}"}
    except (ItemkitError, OSError, MemoryError):
        pass
    phrase = row.phrase if isinstance(row.phrase, str) else ""
    pieces = (
        re.split(f"({re.escape(phrase)})", row.caption, maxsplit=1, flags=re.IGNORECASE) if phrase else []
    )
    # three pieces, or none where the phrase stands otherwise in the caption
    card["caption"] = pieces if len(pieces) == 3 else [f"{row.caption} ", phrase, ""]
    return card


def _objects(labelled: Features) -> Section:
    """Which objects betray a generator."""
    words = by_phrase(labelled, head=True)
    known = words.dropna(subset="auroc")
    section = Section("Which objects betray?", [])
    few = f"{LEAST} objects or more of each class"
    if not len(known):
        section.lines.append(f"That cannot be told: no word of the captions names {few}.")
        return section
    section.lines.append(
        f"Cosine of each object's region with its phrase, put together by its last word. {len(known):,} of "
        f"{count(len(words), 'word')} name {few}. AUROC above 1/2: in real images they fit better. Of many "
        "words some stand out by luck; an interval is about one word."
    )
    drawn = known.head(ROWS).rename(columns={"auroc": "value"})

    def draw(ax: Axes) -> None:
        plots.intervals(ax, drawn, y="phrase", xlabel="AUROC of an object's cosine", reference=0.5)

    first = f"{known['phrase'].iloc[0]}, {known['auroc'].iloc[0]:.2f}"
    alt = f"AUROC of the cosines of objects, {count(len(drawn), 'word')}; first {first}."
    section.figures.append(
        _figure(draw, 0.6 + 0.2 * len(drawn), alt, "Bars: 95 % over objects. Dotted: chance.")
    )
    auroc = [_about(*row) for row in known[["auroc", "low", "high"]].itertuples(index=False)]
    names = {"phrase": "word", "n_real": "reals", "n_fake": "fakes"}
    names |= {"real": "median cosine, reals", "fake": "median cosine, fakes"}
    section.table = known[list(names)].rename(columns=names).assign(AUROC=auroc).head(WORDS)
    return section


def _models(features: Features) -> Section:
    """The models used, by name and by the hashes of their files."""
    made, given = features.run.get("fingerprint") or {}, features.run.get("config") or {}
    section = Section("What made the numbers", [])
    if not made:
        section.lines.append("That is not known: the embeddings were made elsewhere.")
        return section
    rows = []
    for part in PARTS:
        known = made.get(part) or {}
        known = known if isinstance(known, dict) else {"name": known}
        which = [str(known[key]) for key in ("pretrained", "revision", "version") if known.get(key)]
        hashes = [str(value)[:12] for key, value in known.items() if key.endswith("sha256")]
        name = known.get("name") or known.get("class") or known.get("kind") or "none"
        rows.append((part, name, known.get("kind"), " ".join(which), given.get(part), ", ".join(hashes)))
    section.table = pd.DataFrame(
        rows, columns=["part", "name", "kind", "version", "given as", "files (SHA-256)"]
    )
    whose = "the users' own" if made.get("captions") == "user" else "made by the captioner"
    versions = [f"{name} {version}" for name, version in (features.run.get("versions") or {}).items()]
    section.lines += [f"Captions: {whose}.", f"With {', '.join(versions)}."]
    return section


def _limits(features: Features, shown: int) -> list[str]:
    """What these features do not tell; ``shown`` small copies of images are on the page."""
    points, n = list(filter(None, [features.provenance["note"]])), len(features)
    if errors := (features.run.get("counts") or {}).get("errors"):
        points.append(f"{count(errors, 'image')} could not be used; errors.parquet of the store says why")
    if unknown := int(features.table[schema.LABEL].isna().sum()):
        points.append(f"{count(unknown, 'image')} without a label: how well they fit is shown, nothing more")
    if bare := n - len(np.unique(features.owner)):
        points.append(f"{bare:,} of {count(n, 'image')} whose captions name no object: judged as a whole")
    if lost := int((~features.objects.get(FOUND, pd.Series(dtype=bool)).astype(bool)).sum()):
        points.append(
            f"{lost:,} of {count(len(features.objects), 'object')} were not found: a stand-in was taken"
        )
    if splits := features.run.get("splits"):
        points.append(f"splits: {splits}")
    points.append("intervals are over images like these and say nothing about other generators")
    if shown:
        points.append(
            f"small copies of {count(shown, 'image')} are in this file: share it as you would share them"
        )
    return points
