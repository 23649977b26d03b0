"""Figures from ready data: every function takes axes, draws, returns the axes, and computes nothing else.

Names and captions are data: they are shown as they stand, a dollar sign starts no formula. Estimates come as
tables with the columns ``value, low, high``; pictures as uint8 arrays of shape (h, w, 3).
"""

from __future__ import annotations

import io
import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from itemkit import schema
from itemkit._files import atomic_write
from itemkit.text import count, plain, write_csv

if TYPE_CHECKING:
    from itemkit.features import Features

# Okabe and Ito (2008): told apart with any colour vision, and in grey
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY, INK = "#8C8C8C", "0.15"  # small print and grounds; text and axes
COLUMN, PAGE = 3.35, 6.9  # inches: what a column and a page of a paper are wide
CYCLE = (VERMILION, ORANGE, GREEN, PURPLE, BLACK, YELLOW, SKY)
# the mini laboratory's generators look the same in every figure, also where only some of them are shown
FIXED = {"flow": VERMILION, "layout_flow": ORANGE, "painter": GREEN, "edit": PURPLE, "latent_flow": SKY}
# detectors are no generators: colours of Tol's "muted" set, each with a marker of its own
DETECTORS = ("#882255", "#44AA99", "#332288", "#B0912F", "#CC6677", "#117733", "#999933", "#AA4499")
MARKERS = "osD^vPX*"
DPI = 220


def style() -> None:
    """Set the one look of all figures; starts from matplotlib's defaults, so user settings change nothing.

    Figures have the size they are printed at (``figsize`` of `COLUMN` or `PAGE`), with type of 6 to 8 points.
    """
    mpl.rcdefaults()
    mpl.rc("figure", dpi=120)
    mpl.rc("figure.constrained_layout", use=True)  # makes room, so that a file has the size asked for
    mpl.rc("savefig", dpi=DPI)
    mpl.rc("pdf", fonttype=42)
    mpl.rc("font", size=7)
    mpl.rc("text", color=INK)
    mpl.rc("axes", titlesize=8, titleweight="bold", titlelocation="left", labelsize=7.5, labelcolor=INK)
    mpl.rc("axes", linewidth=0.7, edgecolor=INK, axisbelow=True, prop_cycle=plt.cycler(color=CYCLE))
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc(("xtick", "ytick"), labelsize=7, color=INK)
    mpl.rc(("xtick.major", "ytick.major"), width=0.7, size=2.5)
    mpl.rc("legend", fontsize=7, frameon=False)
    mpl.rc("lines", linewidth=1.2, markersize=4, solid_capstyle="round")
    mpl.rc("patch", linewidth=0.8, edgecolor="white", force_edgecolor=True)


def colours(generators: Sequence[str]) -> dict[str, str]:
    """Give each generator a colour, without a fixed one what is left; real images come first, in blue."""
    fakes = [g for g in dict.fromkeys(generators) if g != schema.REAL_GENERATOR]
    taken = {FIXED.get(g) for g in fakes}
    left = itertools.cycle([c for c in CYCLE if c not in taken] or CYCLE)
    return {schema.REAL_GENERATOR: BLUE} | {g: FIXED.get(g) or next(left) for g in fakes}


def save(
    fig: Figure, name: str, table: pd.DataFrame, folder: str | Path, note: str = "", alt: str = ""
) -> list[Path]:
    """Save a figure as PDF and PNG, with the table behind it as CSV; in a notebook, show it.

    Parameters
    ----------
    name : str
        File name without ending.
    table : DataFrame
        The numbers that are drawn; from columns ``n_real, n_fake`` or ``n`` the note says how many images.
    note : str
        Small print under the figure: what an interval is over, what made it (`small_print`).
    alt : str
        What is to be seen, in a sentence, for readers who do not see it; kept in the files, too.

    Raises
    ------
    StoreError
        The disk is full or the folder may not be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = []
    for column, kind in {"n": "", "n_fake": " fake", "n_real": " real"}.items():
        if column in table and "n = " not in note:
            ends = sorted({int(table[column].min()), int(table[column].max())})
            counts.append(" to ".join(f"{end:,}" for end in ends) + kind)
    if note := "; ".join(filter(None, (f"n = {' and '.join(counts)}" * bool(counts), note))):
        width = int(fig.get_figwidth() * 19)  # characters of this size that fit
        lines = textwrap.fill(note, width, break_long_words=False)
        fig.supxlabel(plain(lines), fontsize=6, color=GREY, x=0.995, ha="right")
    for ending in ("pdf", "png"):
        drawn = io.BytesIO()
        # no date inside, so the same figure gives the same file
        about = {"CreationDate": None, "Subject": alt} if ending == "pdf" else {"Description": alt}
        fig.savefig(drawn, format=ending, metadata=about)
        atomic_write(folder / f"{name}.{ending}", drawn.getbuffer())
    write_csv(table, folder / f"{name}.csv")
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        sys.modules["IPython"].display.display(fig, metadata={"image/png": {"alt": alt}})
        plt.close(fig)  # else it would be shown a second time, without words
    return [folder / f"{name}.{ending}" for ending in ("pdf", "png", "csv")]


def small_print(features: Features) -> str:
    """What stands under every figure made from features: what made them, and the laboratory's warning."""
    made = features.provenance
    known = [f"features of {count(len(features), 'image')}"]
    known += [f"{key} {made[key]}" for key in ("preset", "models", "itemkit") if made[key]]
    return "; ".join(filter(None, (", ".join(known), made["note"])))


def smooth(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Density of numbers at some places, as of ``scipy.stats.gaussian_kde``: normal, width by Scott's rule.

    Its import would take longer than the card of a verdict.
    """
    width = np.std(values, ddof=1) * len(values) ** -0.2
    kernels = [np.exp(-0.5 * ((place - values) / width) ** 2).mean() for place in at]
    return np.array(kernels) / (width * np.sqrt(2 * np.pi))


def _label(text: object) -> str:
    """Text of a legend; matplotlib leaves out those that begin with an underscore."""
    shown = plain(text)
    return f" {shown}" if shown.startswith("_") else shown


def ridges(
    ax: Axes, table: pd.DataFrame, value: str, xlabel: str, told: Mapping[str, str] | None = None
) -> Axes:
    """Draw the column ``value`` smoothed, a row for each ``generator`` with the real images grey behind it.

    A tick marks the median; ``told`` is written at the right of a generator's row, e.g. its AUROC. The rows
    keep the order of the table; real images have none of their own.
    """
    of = {name: part[value].dropna().to_numpy() for name, part in table.groupby(schema.GENERATOR, sort=False)}
    palette, real = colours(list(of)), of.pop(schema.REAL_GENERATOR, np.zeros(0))
    every = np.concatenate([*of.values(), real, np.zeros(0)])
    low, high = (every.min(), every.max()) if len(every) else (0.0, 1.0)
    at = np.linspace(low, high, 400)
    for row, (name, x) in enumerate(of.items()):
        for part, colour, alpha in ((real, GREY, 0.35), (x, palette[name], 0.6)):
            if len(part) < 2 or np.ptp(part) == 0:
                continue
            height = smooth(part, at)
            height = row - 0.85 * height / height.max()
            ax.fill_between(at, row, height, color=colour, alpha=alpha, lw=0, zorder=row)
            ax.plot(at, height, color=colour, lw=0.8, zorder=row)
            ax.plot([np.median(part)] * 2, [row, row - 0.16], color=colour, lw=1.6, zorder=row + 0.5)
        if told and name in told:
            where = (1.01, row - 0.08)
            ax.text(*where, plain(told[name]), transform=ax.get_yaxis_transform(), fontsize=7, va="bottom")
    ax.set(xlabel=plain(xlabel), yticks=range(len(of)), yticklabels=[plain(name) for name in of])
    ax.set_ylim(len(of) - 0.9, -1.0)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    return ax


def intervals(
    ax: Axes, table: pd.DataFrame, *, y: str, xlabel: str, hue: str | None = None, group: str | None = None,
    reference: float | None = None, palette: Mapping[str, str] | None = None,
) -> Axes:  # fmt: skip
    """Draw estimates with their intervals: a row for each name in column ``y``, side by side for each hue.

    ``group`` is a column whose names become headings over their rows; ``reference`` is a vertical line, e.g.
    at chance; ``palette`` may give hues colours (generators have theirs in `colours`).
    """
    groups = list(dict.fromkeys(table[group])) if group else [None]
    keys: list[tuple[Any, Any]] = []  # of each line of the figure: a heading has no name
    for title in groups:
        part = table[table[group] == title] if group else table
        keys += [(title, None)] * bool(group) + [(title, name) for name in dict.fromkeys(part[y])]
    hues = list(dict.fromkeys(table[hue])) if hue else [""]
    for j, h in enumerate(hues):
        part = table[table[hue] == h] if hue else table
        rows = zip(part[group] if group else [None] * len(part), part[y], strict=True)
        at = np.array([keys.index(key) for key in rows]) + (j - (len(hues) - 1) / 2) * 0.7 / len(hues)
        error = np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(min=0)
        look: dict[str, Any] = {"color": (palette or {}).get(str(h), DETECTORS[j % 8]), "fmt": MARKERS[j % 8]}
        look |= {"label": _label(h) if hue else None, "ms": 3.5, "lw": 1.1, "capsize": 0}
        ax.errorbar(part["value"], at, xerr=error, **look)
    if reference is not None:
        ax.axvline(reference, color=GREY, lw=0.8, ls=":", zorder=0)
    names = [plain(title if name is None else name) for title, name in keys]
    ax.set(yticks=range(len(keys)), yticklabels=names, xlabel=plain(xlabel))
    for (_, name), tick in zip(keys, ax.get_yticklabels(), strict=False):
        tick.set_fontweight("bold" if group and name is None else "normal")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(keys) - 0.5, -0.5)
    ax.locator_params(axis="x", nbins=5)
    if hue:
        ax.legend(loc="best")
    return ax


def matrix(ax: Axes, table: pd.DataFrame, *, rows: str, columns: str, label: str) -> Axes:
    """Draw a heat map of ``value``, 0 to 1, with the number in each cell; white is 0.5, which is chance.

    Cells that are True in a column ``seen`` (a generator of the family trained on) are hatched.
    """
    import seaborn as sns  # only here: it takes a second, and a card has no matrix

    order = {"index": list(dict.fromkeys(table[rows])), "columns": list(dict.fromkeys(table[columns]))}
    wide = table.pivot(index=rows, columns=columns, values="value").reindex(**order)
    sns.heatmap(
        wide.rename(index=plain, columns=plain), ax=ax, cmap="RdBu", vmin=0, vmax=1, square=True,
        linewidths=1, annot=True, fmt=".2f", annot_kws={"size": 7},
        cbar_kws={"label": plain(label), "shrink": 0.8},
    )  # fmt: skip
    if "seen" in table:
        seen = table.pivot(index=rows, columns=columns, values="seen").reindex(**order)
        for i, j in np.argwhere((seen == True).to_numpy()):  # noqa: E712 - a cell without a row is not seen
            ax.add_patch(Rectangle((j, i), 1, 1, fill=False, hatch="////", ec="white", lw=0, alpha=0.55))
    ax.set(xlabel=plain(columns.replace("_", " ")), ylabel=plain(rows.replace("_", " ")))
    ax.tick_params(length=0)
    plt.setp(ax.get_yticklabels(), rotation=0)
    plt.setp(ax.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
    return ax


def lines(ax: Axes, table: pd.DataFrame, *, x: str, hue: str, xlabel: str, ylabel: str) -> Axes:
    """Draw one line for each hue, with a band where there is ``low``.

    Add `label_lines` or a legend when the axes have their limits.
    """
    for i, (name, part) in enumerate(table.groupby(hue, sort=False)):
        colour = DETECTORS[i % 8]
        at = part[x] if pd.api.types.is_numeric_dtype(part[x]) else part[x].map(plain)
        ax.plot(at, part["value"], marker=MARKERS[i % 8], ms=3, color=colour, label=_label(name))
        if "low" in part and part["low"].notna().any():
            ax.fill_between(at, part["low"], part["high"], color=colour, alpha=0.15, lw=0)
    ax.set(xlabel=plain(xlabel), ylabel=plain(ylabel))
    return ax


def label_lines(ax: Axes, apart_pt: float = 7.5) -> Axes:
    """Write the name of each line at its right end, in its colour, ``apart_pt`` points from the next name.

    Call it when the axes have their limits.
    """
    ends = []
    for line in ax.lines:
        xy, name = np.asarray(line.get_xydata(), float), str(line.get_label())
        if len(xy) and not name.startswith("_"):
            ends.append((xy[-1, 1], xy[-1, 0], name, line.get_color()))
    (low, high), points = ax.get_ylim(), ax.get_window_extent().height / ax.figure.dpi * 72
    lowest = -np.inf
    for y, x, name, colour in sorted(ends, key=lambda end: end[0]):
        wanted = (y - low) / (high - low) * points
        lowest = max(wanted, lowest + apart_pt)
        where: dict[str, Any] = {"xytext": (5, lowest - wanted), "textcoords": "offset points"}
        ax.annotate(name, (x, y), color=colour, fontsize=7, va="center", annotation_clip=False, **where)
    return ax


def scatter(ax: Axes, xy: np.ndarray, generators: Sequence[str], title: str = "") -> Axes:
    """Draw a two-dimensional embedding, shape (n, 2); ticks are hidden, since its axes have no unit."""
    names = list(generators)
    palette = colours(names)
    # one shuffled cloud: drawn class by class, the last class would cover the others
    order = np.random.default_rng(0).permutation(len(xy))
    colour_of = [palette[names[i]] for i in order]
    ax.scatter(xy[order, 0], xy[order, 1], s=5, lw=0, alpha=0.8, c=colour_of, rasterized=True)
    for name, colour in palette.items():
        if name in names:
            ax.scatter([], [], s=18, color=colour, label=_label(name))
    ax.set(xticks=[], yticks=[], title=plain(title))
    ax.spines[:].set_visible(False)
    return ax


def show_image(ax: Axes, image: np.ndarray, title: str = "", colour: str | None = None) -> Axes:
    """Show a picture without ticks, framed in a colour if one is given; the title may hold line breaks."""
    _imshow(ax, image)
    ax.set(xticks=[], yticks=[])
    ax.set_title(plain(title), fontsize=7, fontweight="normal", loc="center")
    ax.spines[:].set(visible=colour is not None, color=colour, linewidth=2)
    return ax


def _imshow(ax: Axes, image: np.ndarray, **options: Any) -> None:
    """Draw in the picture's own pixel coordinates; of a large one no more points than a figure shows.

    The pixels of a small one are enlarged by a whole number, so that all look alike.
    """
    height, width = image.shape[:2]
    step, times = max(1, max(height, width) // 1000), max(1, 400 // max(height, width))
    shown = image[::step, ::step].repeat(times, axis=0).repeat(times, axis=1)
    ax.imshow(shown, extent=(-0.5, width - 0.5, height - 0.5, -0.5), **options)


def blank(axes: np.ndarray) -> None:
    """Hide ticks and frames of an array of axes, so that those on which nothing is shown leave no trace."""
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)


def label_row(ax: Axes, name: str) -> Axes:
    """Write a name at the left of a row of pictures, whose first axes are given."""
    ax.set_ylabel(plain(name), rotation=0, ha="right", va="center", fontsize=7.5)
    return ax


def words(
    ax: Axes, text: str, marked: Mapping[str, str] | None = None, *, width_pt: float, size: float = 6
) -> Axes:
    """Write a text below the axes, in lines of at most ``width_pt`` points, centred.

    ``marked`` gives words a colour, e.g. those that are wrong; they are bold, too, to be seen in grey. A word
    is compared without case and punctuation.
    """
    colour = {word.lower(): value for word, value in (marked or {}).items()}
    bold, plainly = FontProperties(weight="bold"), FontProperties()
    lines: list[list[tuple[str, str | None, float]]] = [[]]
    for word in plain(text).split():
        hit = colour.get(word.strip(".,;:!?\"'()").lower())
        wide = TextPath((0, 0), word, size=size, prop=bold if hit else plainly).get_extents()
        long = wide.width + 0.35 * size  # with a space
        if lines[-1] and sum(w for *_, w in lines[-1]) + long > width_pt:
            lines.append([])
        lines[-1].append((word, hit, long))
    for i, line in enumerate(lines):
        left = -sum(long for *_, long in line) / 2
        for word, hit, long in line:
            look: dict[str, Any] = {
                "color": hit or BLACK,
                "fontsize": size,
                "fontweight": "bold" if hit else "normal",
            }
            at = (left, -(i + 1) * 1.25 * size)
            ax.annotate(word, (0.5, 0), at, "axes fraction", "offset points", annotation_clip=False, **look)
            left += long
    return ax


def boxes(ax: Axes, table: pd.DataFrame) -> Axes:
    """Draw regions on a picture: columns ``phrase, x0, y0, x1, y1``, in pixels of the picture.

    Each phrase stands in its box's upper left corner, on a ground that makes it readable on any picture.
    """
    for i, row in enumerate(table.itertuples()):
        colour = DETECTORS[i % 8]
        # half a pixel: imshow puts the centre of a pixel, not its corner, on whole numbers
        corner, size = (row.x0 - 0.5, row.y0 - 0.5), (row.x1 - row.x0, row.y1 - row.y0)
        ax.add_patch(Rectangle(corner, *size, fill=False, ec="white", lw=2.2))
        ax.add_patch(Rectangle(corner, *size, fill=False, ec=colour, lw=1.4))
        ground: dict[str, Any] = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        look: dict[str, Any] = {"fontsize": 6, "color": "white", "va": "top", "bbox": ground, "clip_on": True}
        ax.text(corner[0], corner[1], plain(row.phrase), **look)
    return ax


def heat(ax: Axes, image: np.ndarray, heatmap: np.ndarray, title: str = "") -> Axes:
    """Lay a map with one number for each pixel, shape (h, w), over a picture; nothing where it is NaN."""
    show_image(ax, image.mean(axis=2, keepdims=True).astype(np.uint8).repeat(3, axis=2), title)
    _imshow(ax, heatmap, cmap="magma", alpha=0.65)
    return ax
