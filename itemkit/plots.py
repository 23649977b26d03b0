"""Figures from ready data: every function takes axes, draws, returns the axes, and computes nothing else.

Names and captions are data: they are shown as they stand, a dollar sign starts no formula. Estimates come as
tables with the columns ``value, low, high``; pictures as uint8 arrays of shape (h, w, 3).
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from itemkit import schema
from itemkit._files import atomic_write
from itemkit.text import count, plain, write_csv

if TYPE_CHECKING:
    from itemkit.features import Features

# Okabe and Ito (2008): told apart with any colour vision, and in grey
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#8C8C8C"
CYCLE = (VERMILION, ORANGE, GREEN, PURPLE, BLACK, YELLOW, SKY)
# the mini laboratory's generators look the same in every figure, also where only some of them are shown
FIXED = {
    "flow": VERMILION, "flow_early": ORANGE, "vae": GREEN, "edit": PURPLE,
    "gan": BLACK, "latent_flow": SKY, "vq_prior": YELLOW,
}  # fmt: skip


def style() -> None:
    """Set the one look of all figures; starts from matplotlib's defaults, so user settings change nothing."""
    mpl.rcdefaults()
    ours = {
        "savefig.dpi": 220,
        "figure.constrained_layout.use": True,  # makes room, so that a file has the size asked for
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "image.interpolation": "nearest",
        "pdf.fonttype": 42,
    }
    sns.set_theme(context="paper", style="ticks", palette=CYCLE, font="DejaVu Sans", rc=ours)


def colours(generators: Sequence[str]) -> dict[str, str]:
    """Give each generator a colour, without a fixed one what is left; real images come first, in blue."""
    fakes = [g for g in dict.fromkeys(generators) if g != schema.REAL_GENERATOR]
    taken = {FIXED.get(g) for g in fakes}
    left = itertools.cycle([c for c in CYCLE if c not in taken] or CYCLE)
    return {schema.REAL_GENERATOR: BLUE} | {g: FIXED.get(g) or next(left) for g in fakes}


def save(fig: Figure, name: str, table: pd.DataFrame, folder: str | Path, note: str = "") -> list[Path]:
    """Save a figure as PDF and PNG, with the table behind it as CSV.

    Parameters
    ----------
    name : str
        File name without ending.
    table : DataFrame
        The numbers that are drawn; from columns ``n_real, n_fake`` or ``n`` the note says how many images.
    note : str
        Small print under the figure: what an interval is over, what made it (`small_print`).

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
        width = int(fig.get_figwidth() * 17)  # characters of this size that fit
        lines = textwrap.fill(note, width, break_long_words=False)
        fig.supxlabel(plain(lines), fontsize=6.5, color=GREY, x=0.995, ha="right")
    for ending in ("pdf", "png"):
        drawn = io.BytesIO()
        # no date inside, so the same figure gives the same file
        fig.savefig(drawn, format=ending, metadata={"CreationDate": None} if ending == "pdf" else None)
        atomic_write(folder / f"{name}.{ending}", drawn.getbuffer())
    write_csv(table, folder / f"{name}.csv")
    return [folder / f"{name}.{ending}" for ending in ("pdf", "png", "csv")]


def small_print(features: Features) -> str:
    """What stands under every figure made from features: what made them, and the laboratory's warning."""
    made = features.provenance
    known = [f"features of {count(len(features), 'image')}"]
    known += [f"{key} {made[key]}" for key in ("preset", "models", "itemkit") if made[key]]
    return "; ".join(filter(None, (", ".join(known), made["note"])))


def _label(text: object) -> str:
    """Text of a legend; matplotlib leaves out those that begin with an underscore."""
    shown = plain(text)
    return f" {shown}" if shown.startswith("_") else shown


def distributions(ax: Axes, table: pd.DataFrame, value: str, xlabel: str) -> Axes:
    """Draw the column ``value`` smoothed, for real images and each ``generator``, with the median marked."""
    palette = colours(list(table[schema.GENERATOR]))
    for name, colour in palette.items():
        x = table.loc[table[schema.GENERATOR] == name, value]
        if len(x) < 2:
            continue
        real = name == schema.REAL_GENERATOR
        shown = {"fill": real, "alpha": 0.25 if real else 1.0, "label": _label(f"{name} (n={len(x)})")}
        sns.kdeplot(x=x, ax=ax, color=colour, lw=1.8, cut=0, **shown)
        ax.plot(x.median(), 0, marker="^", color=colour, ms=6, clip_on=False, zorder=5)
    ax.set(xlabel=plain(xlabel), ylabel="density", yticks=[])
    ax.spines["left"].set_visible(False)
    ax.legend(loc="upper left")
    return ax


def intervals(
    ax: Axes, table: pd.DataFrame, *, y: str, xlabel: str, hue: str | None = None,
    reference: float | None = None,
) -> Axes:  # fmt: skip
    """Draw estimates with their intervals: a row for each name in column ``y``, side by side for each hue.

    ``reference`` is a vertical line, e.g. at chance.
    """
    names = list(dict.fromkeys(table[y]))
    hues = list(dict.fromkeys(table[hue])) if hue else [""]
    for j, h in enumerate(hues):
        part = table[table[hue] == h] if hue else table
        at = np.array([names.index(n) for n in part[y]]) + (j - (len(hues) - 1) / 2) * 0.7 / len(hues)
        error = np.stack([part["value"] - part["low"], part["high"] - part["value"]]).clip(min=0)
        look: dict[str, Any] = {"color": (BLUE, *CYCLE)[j % 8], "label": _label(h) if hue else None}
        ax.errorbar(part["value"], at, xerr=error, fmt="o", ms=4.5, lw=1.4, capsize=0, **look)
    if reference is not None:
        ax.axvline(reference, color=GREY, lw=1, ls=":", zorder=0)
    ax.set(yticks=range(len(names)), yticklabels=[plain(n) for n in names], xlabel=plain(xlabel))
    ax.set_ylim(len(names) - 0.5, -0.5)
    if hue:
        ax.legend(loc="best")
    return ax


def matrix(
    ax: Axes, table: pd.DataFrame, *, rows: str, columns: str, label: str, chance: float = 0.5
) -> Axes:
    """Draw a heat map of ``value`` with the number in each cell; colours begin at ``chance``."""
    wide = table.pivot(index=rows, columns=columns, values="value")
    wide = wide.loc[list(dict.fromkeys(table[rows])), list(dict.fromkeys(table[columns]))]
    wide = wide.rename(index=plain, columns=plain)
    sns.heatmap(
        wide, ax=ax, annot=True, fmt=".2f", cmap="cividis", vmin=chance, vmax=1, linewidths=1.5, square=True,
        cbar_kws={"label": plain(label), "shrink": 0.8}, annot_kws={"size": 9},
    )  # fmt: skip
    ax.set(xlabel=plain(columns.replace("_", " ")), ylabel=plain(rows.replace("_", " ")))
    ax.tick_params(length=0)
    plt.setp(ax.get_yticklabels(), rotation=0)
    plt.setp(ax.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
    return ax


def lines(
    ax: Axes, table: pd.DataFrame, *, x: str, hue: str, xlabel: str, ylabel: str,
    palette: Mapping[str, str] | None = None,
) -> Axes:  # fmt: skip
    """Draw one line for each hue, with a band where there is ``low``; ``palette`` may give hues colours."""
    for i, (name, part) in enumerate(table.groupby(hue, sort=False)):
        colour = (palette or {}).get(str(name), (BLUE, *CYCLE)[i % 8])
        at = part[x] if pd.api.types.is_numeric_dtype(part[x]) else part[x].map(plain)
        ax.plot(at, part["value"], marker="o", ms=3.5, lw=1.5, color=colour, label=_label(name))
        if "low" in part and part["low"].notna().any():
            ax.fill_between(at, part["low"], part["high"], color=colour, alpha=0.15, lw=0)
    ax.set(xlabel=plain(xlabel), ylabel=plain(ylabel))
    ax.legend(loc="best")
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
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def show_image(ax: Axes, image: np.ndarray, title: str = "", colour: str | None = None) -> Axes:
    """Show a picture without ticks, framed in a colour if one is given; the title may hold line breaks."""
    _imshow(ax, image)
    ax.set(xticks=[], yticks=[])
    ax.set_title(plain(title), fontsize=7.5, fontweight="normal", loc="center")
    for spine in ax.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=2)
    return ax


def _imshow(ax: Axes, image: np.ndarray, **options: Any) -> None:
    """Draw in the picture's own pixel coordinates; of a large one no more points than a figure shows."""
    height, width = image.shape[:2]
    step = max(1, max(height, width) // 1000)
    ax.imshow(image[::step, ::step], extent=(-0.5, width - 0.5, height - 0.5, -0.5), **options)


def blank(axes: np.ndarray) -> None:
    """Hide ticks and frames of an array of axes, so that those on which nothing is shown leave no trace."""
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)


def label_row(ax: Axes, name: str) -> Axes:
    """Write a name at the left of a row of pictures, whose first axes are given."""
    ax.set_ylabel(plain(name), rotation=0, ha="right", va="center", fontsize=9)
    return ax


def boxes(ax: Axes, table: pd.DataFrame) -> Axes:
    """Draw regions on a picture: columns ``phrase, x0, y0, x1, y1``, in pixels of the picture."""
    for i, row in enumerate(table.itertuples()):
        colour = CYCLE[i % len(CYCLE)]
        # half a pixel: imshow puts the centre of a pixel, not its corner, on whole numbers
        corner, size = (row.x0 - 0.5, row.y0 - 0.5), (row.x1 - row.x0, row.y1 - row.y0)
        ax.add_patch(Rectangle(corner, *size, fill=False, ec=colour, lw=1.8))
        ax.plot([], [], color=colour, lw=2, label=_label(row.phrase))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=7, ncols=1)
    return ax


def heat(ax: Axes, image: np.ndarray, heatmap: np.ndarray, title: str = "") -> Axes:
    """Lay a map with one number for each pixel, shape (h, w), over a picture; nothing where it is NaN."""
    show_image(ax, image.mean(axis=2, keepdims=True).astype(np.uint8).repeat(3, axis=2), title)
    _imshow(ax, heatmap, cmap="magma", alpha=0.65)
    return ax


def options(ax: Axes, table: pd.DataFrame, xlabel: str) -> Axes:
    """Draw the options of one question from `itemkit.ablation.ablation`.

    Blue: the reference, also dotted. Vermilion: the interval of the paired difference leaves out zero.
    """
    for i, row in enumerate(table.itertuples()):
        certain = row.difference_low > 0 or row.difference_high < 0
        colour = BLUE if row.reference else VERMILION if certain else GREY
        ax.plot([row.low, row.high], [i, i], color=colour, lw=1.4)
        ax.plot(row.value, i, marker="o", ms=4.5, color=colour)
    ax.axvline(table.loc[table["reference"], "value"].iloc[0], color=GREY, lw=1, ls=":", zorder=0)
    ax.set(yticks=range(len(table)), yticklabels=table["option"].map(plain), xlabel=plain(xlabel))
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_title(plain(table["question"].iloc[0]))
    return ax
