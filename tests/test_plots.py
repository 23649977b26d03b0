"""Figures: every function draws onto the axes it is given; looks and files do not depend on the user."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image
from scipy.stats import gaussian_kde

from itemkit import _files, plots, schema
from itemkit.errors import StoreError

from synthetic import make_features

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
CLOUD = pd.DataFrame(
    {"generator": ["real"] * 40 + ["gan"] * 30 + ["flow"] * 30, "cosine": RNG.normal(size=100)}
)
ESTIMATES = pd.DataFrame(
    {
        "detector": ["global", "global", "local", "local"],
        "on": ["seen", "unseen"] * 2,
        "value": [0.9, 0.7, 0.8, 0.75],
        "low": [0.85, 0.6, 0.7, 0.7],
        "high": [0.95, 0.8, 0.9, 0.8],
    }
)
CURVES = pd.DataFrame(
    {"step": [0, 1, 2] * 2, "what": ["train"] * 3 + ["val"] * 3, "value": [3.0, 2, 1, 3, 2.5, 2]}
)
REGIONS = pd.DataFrame({"phrase": ["a red ball"], "x0": [2.0], "y0": [3.0], "x1": [6.0], "y1": [9.0]})

DRAW: dict[str, Callable[[Axes], Axes]] = {
    "ridges": lambda ax: plots.ridges(ax, CLOUD, "cosine", "cosine", {"gan": "AUROC 0.52"}),
    "intervals": lambda ax: plots.intervals(
        ax, ESTIMATES, y="detector", hue="on", xlabel="AUROC", reference=0.5
    ),
    "intervals in groups": lambda ax: plots.intervals(
        ax, ESTIMATES, y="on", group="detector", xlabel="difference", reference=0
    ),
    "intervals without hue": lambda ax: plots.intervals(ax, ESTIMATES[::2], y="detector", xlabel="AUROC"),
    "matrix": lambda ax: plots.matrix(ax, ESTIMATES, rows="detector", columns="on", label="AUROC"),
    "lines": lambda ax: plots.lines(ax, CURVES, x="step", hue="what", xlabel="step", ylabel="loss"),
    "lines with bands": lambda ax: plots.lines(
        ax,
        ESTIMATES,
        x="on",
        hue="detector",
        xlabel="tested on",
        ylabel="AUROC",
    ),
    "lines with names": lambda ax: plots.label_lines(
        plots.lines(ax, CURVES, x="step", hue="what", xlabel="step", ylabel="loss")
    ),
    "words": lambda ax: plots.words(
        plots.show_image(ax, PICTURE), "a red ball, in the snow", {"ball": plots.VERMILION}, width_pt=60
    ),
    "scatter": lambda ax: plots.scatter(ax, RNG.normal(size=(100, 2)), list(CLOUD["generator"]), "map"),
    "show_image": lambda ax: plots.show_image(ax, PICTURE, "a title\nof two lines"),
    "boxes": lambda ax: plots.boxes(plots.show_image(ax, PICTURE), REGIONS),
    "heat": lambda ax: plots.heat(ax, PICTURE, np.where(PICTURE[..., 0] > 99, 1.0, np.nan), "where"),
}


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    with mpl.rc_context():
        mpl.use("Agg")
        plots.style()
        yield
    plt.close("all")


@pytest.fixture
def ax() -> Axes:
    return plt.subplots(figsize=(3, 2))[1]


@pytest.mark.parametrize("name", DRAW)
def test_draws_onto_the_given_axes_and_returns_them(name: str) -> None:
    plt.close("all")  # whatever ran before in this process
    fig, (left, right) = plt.subplots(1, 2, figsize=(6, 2))
    plt.sca(left)  # the current axes are others
    assert DRAW[name](right) is right
    assert right.has_data() or right.patches
    assert not left.has_data() and plt.get_fignums() == [fig.number]
    fig.canvas.draw()


def test_no_plot_changes_its_data() -> None:
    before = [t.copy() for t in (CLOUD, ESTIMATES, CURVES, REGIONS)]
    for draw in DRAW.values():
        draw(plt.subplots()[1])
    for table, copy in zip((CLOUD, ESTIMATES, CURVES, REGIONS), before, strict=True):
        pd.testing.assert_frame_equal(table, copy)


def test_the_numbers_drawn_are_the_numbers_given(ax: Axes) -> None:
    plots.intervals(ax, ESTIMATES[::2], y="detector", xlabel="AUROC (test)")
    line = ax.containers[0].lines[0]
    assert list(line.get_xdata()) == [0.9, 0.8] and list(line.get_ydata()) == [0, 1]
    ((left, right),) = {tuple(s[:, 0]) for s in ax.containers[0].lines[2][0].get_segments()[:1]}
    assert (left, right) == pytest.approx((0.85, 0.95))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["global", "local"]
    assert ax.get_xlabel() == "AUROC (test)"
    assert ax.yaxis_inverted()  # the first name on top


def test_bands_stand_over_their_own_categories(ax: Axes) -> None:
    part = pd.concat([ESTIMATES.iloc[:2], ESTIMATES.iloc[3:]])  # the second line has the second category only
    plots.lines(ax, part, x="on", hue="detector", xlabel="", ylabel="")
    first, second = (c.get_paths()[0].vertices[:, 0] for c in ax.collections)
    assert set(first) == {0.0, 1.0} and set(second) == {1.0}


def test_ridges_have_a_row_for_each_generator_and_reals_behind(ax: Axes) -> None:
    plots.ridges(ax, CLOUD, "cosine", "cosine of image and caption", {"gan": "AUROC 0.5"})
    assert [t.get_text() for t in ax.get_yticklabels()] == ["gan", "flow"]
    real, gan, flow = CLOUD.groupby("generator")["cosine"].median()[["real", "gan", "flow"]]
    medians = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]
    assert medians == pytest.approx([real, gan, real, flow])
    assert [t.get_text() for t in ax.texts] == ["AUROC 0.5"]


def test_groups_are_headings_over_their_rows(ax: Axes) -> None:
    plots.intervals(ax, ESTIMATES, y="on", group="detector", xlabel="AUROC")
    shown = [t.get_text() for t in ax.get_yticklabels()]
    assert shown == ["global", "seen", "unseen", "local", "seen", "unseen"]
    assert list(ax.containers[0].lines[0].get_ydata()) == [1, 2, 4, 5]


def test_names_at_lines_do_not_cover_each_other(ax: Axes) -> None:
    close = CURVES.assign(value=[1, 1, 1, 1, 1, 1.001])
    plots.lines(ax, close, x="step", hue="what", xlabel="", ylabel="")
    plots.label_lines(ax)
    below, above = (text.get_window_extent() for text in ax.texts)
    assert below.y1 <= above.y0 + 1 and [t.get_text() for t in ax.texts] == ["train", "val"]


def test_marked_words_are_coloured_and_long_texts_wrapped(ax: Axes) -> None:
    plots.words(ax, "A red ball, and another RED ball.", {"red": plots.VERMILION}, width_pt=50)
    marked = [t.get_text() for t in ax.texts if t.get_color() == plots.VERMILION]
    assert marked == ["red", "RED"] and len({t.xyann[1] for t in ax.texts}) > 1
    right = max(t.get_window_extent().x1 for t in ax.texts)
    left = min(t.get_window_extent().x0 for t in ax.texts)
    assert (right - left) * 72 / ax.figure.dpi < 55


def test_cells_of_the_family_trained_on_are_hatched(ax: Axes) -> None:
    table = ESTIMATES.assign(seen=[True, False, True, False])
    plots.matrix(ax, table, rows="detector", columns="on", label="AUROC")
    assert sorted(p.get_xy() for p in ax.patches) == [(0, 0), (0, 1)]
    assert ax.collections[0].get_clim() == (0, 1)  # chance is white


def test_a_matrix_keeps_the_order_of_the_table(ax: Axes) -> None:
    plots.matrix(ax, ESTIMATES.iloc[::-1], rows="detector", columns="on", label="AUROC")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["local", "global"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["unseen", "seen"]
    assert [t.get_text() for t in ax.texts] == ["0.75", "0.80", "0.70", "0.90"]


def test_a_map_hides_its_ticks_and_mixes_its_classes(ax: Axes) -> None:
    xy = np.c_[np.arange(100.0), np.zeros(100)]
    plots.scatter(ax, xy, list(CLOUD["generator"]))
    assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0
    cloud = ax.collections[0]
    drawn = cloud.get_offsets()[:, 0].astype(int)
    assert sorted(drawn) == list(range(100)) and list(drawn) != sorted(drawn)
    palette = plots.colours(list(CLOUD["generator"]))
    expected = [palette[CLOUD["generator"][i]] for i in drawn]
    assert [to_hex(c).upper() for c in cloud.get_facecolors()] == [to_hex(c).upper() for c in expected]
    assert ax.get_legend_handles_labels()[1] == ["real", "gan", "flow"]


def test_a_box_goes_around_its_pixels(ax: Axes) -> None:
    plots.boxes(plots.show_image(ax, PICTURE), REGIONS)
    box, again = ax.patches  # white below its colour, to be seen on any picture
    assert box.get_bbox().bounds == again.get_bbox().bounds
    # imshow draws pixel (2, 3) from 1.5 to 2.5 and from 2.5 to 3.5
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (1.5, 2.5, 4, 6)
    assert [t.get_text() for t in ax.texts] == ["a red ball"]


# a formula that cannot be set, one that can, a legend's hidden entry, an escape
WILD = ["$x_$", "a$b^c$", "_hidden", "\x1b[2J"]


@pytest.mark.parametrize(
    "name", ["ridges", "intervals", "groups", "matrix", "lines", "scatter", "boxes", "words"]
)
def test_names_from_data_are_shown_as_they_stand(name: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"generator": WILD, "hue": WILD, "value": 0.7, "low": 0.6, "high": 0.8})
    cloud = pd.DataFrame({"generator": WILD * 9, "value": RNG.normal(size=36)})
    fig, ax = plt.subplots()
    match name:
        case "ridges":
            plots.ridges(ax, cloud, "value", WILD[0], {WILD[0]: WILD[1]})
        case "intervals":
            plots.intervals(ax, table, y="generator", hue="hue", xlabel=WILD[0])
        case "matrix":
            plots.matrix(ax, table, rows="generator", columns="hue", label=WILD[0])
        case "lines":
            plots.lines(ax, table, x="generator", hue="hue", xlabel=WILD[0], ylabel=WILD[0]).legend()
        case "scatter":
            plots.scatter(ax, RNG.normal(size=(36, 2)), list(cloud["generator"]), WILD[0])
            ax.legend()
        case "boxes":
            boxes = pd.DataFrame({"phrase": WILD, "x0": 1.0, "y0": 1.0, "x1": 5.0, "y1": 5.0})
            plots.label_row(plots.boxes(plots.show_image(ax, PICTURE, "\n".join(WILD)), boxes), WILD[0])
        case "groups":
            plots.intervals(ax, table, y="generator", group="hue", xlabel=WILD[0])
        case "words":
            plots.words(ax, " ".join(WILD), {WILD[0]: plots.GREEN}, width_pt=200)
    plots.save(fig, "wild", table, tmp_path, WILD[0])  # a formula that cannot be set would raise here
    legend = ax.get_legend()
    texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.title, ax.xaxis.label, ax.yaxis.label]
    texts += [*ax.texts, ax._left_title, *(legend.get_texts() if legend else [])]
    drawn = [text._preprocess_math(text.get_text()) for text in texts if text.get_text()]
    assert not any(is_formula for _, is_formula in drawn)
    shown = {text.strip() for text, _ in drawn}
    shown |= {line for text in shown for line in text.split("\n")} | {
        text.partition(" (n=")[0] for text in shown
    }
    assert {"$x_$", "a$b^c$", "_hidden", "\\x1b[2J"} <= shown


def test_large_pictures_are_thinned_and_keep_their_coordinates(ax: Axes) -> None:
    plots.show_image(ax, np.zeros((3000, 2000, 3), np.uint8))
    assert ax.images[0].get_array().shape[0] <= 1500
    assert ax.images[0].get_extent() == [-0.5, 1999.5, 2999.5, -0.5]


# -------------------------------------------------------------------------------------------------- colours


def test_colours_belong_to_names() -> None:
    assert plots.colours([]) == {"real": plots.BLUE}
    everything = plots.colours(["flow", "layout_flow", "painter", "edit", "real"])
    assert list(everything) == ["real", "flow", "layout_flow", "painter", "edit"]
    assert len(set(everything.values())) == 5
    # also where only some are shown, or in another order
    for some in (["painter"], ["edit", "real", "painter"], ["painter", "painter", "flow"]):
        assert plots.colours(some) == {k: everything[k] for k in plots.colours(some)}


def test_other_generators_get_colours_of_their_own() -> None:
    got = plots.colours(["sdxl", "painter", "midjourney", "real"])
    assert len(set(got.values())) == 4 and got["painter"] == plots.FIXED["painter"]
    assert plots.colours(["sdxl", "painter", "midjourney"]) == got
    assert len(plots.colours([f"g{i}" for i in range(12)])) == 13  # more than there are colours


# ---------------------------------------------------------------------------------------------------- files


def test_a_smooth_curve_is_that_of_the_library() -> None:
    at, values = np.linspace(-4, 4, 50), RNG.normal(size=30)
    np.testing.assert_allclose(plots.smooth(values, at), gaussian_kde(values)(at), rtol=1e-9)


def test_the_style_does_not_depend_on_the_user() -> None:
    plots.style()
    ours = dict(mpl.rcParams)
    mpl.rcParams.update({"axes.facecolor": "black", "font.size": 33, "lines.linewidth": 9, "axes.grid": True})
    plots.style()
    assert {k: v for k, v in mpl.rcParams.items() if k != "backend"} == {
        k: v for k, v in ours.items() if k != "backend"
    }
    first = mpl.rcParams["axes.prop_cycle"].by_key()["color"][0]
    assert to_hex(first).upper() == plots.VERMILION


def test_saving_writes_three_files_with_the_numbers(ax: Axes, tmp_path: Path) -> None:
    plots.lines(ax, CURVES, x="step", hue="what", xlabel="step", ylabel="loss")
    paths = plots.save(ax.figure, "03_curves", CURVES, tmp_path / "new" / "figures", "made in the mini lab")
    assert [p.name for p in paths] == ["03_curves.pdf", "03_curves.png", "03_curves.csv"]
    assert paths[0].read_bytes().startswith(b"%PDF") and b"CreationDate" not in paths[0].read_bytes()
    with Image.open(paths[1]) as image:
        assert image.format == "PNG" and image.size == (3 * 220, 2 * 220)
    pd.testing.assert_frame_equal(pd.read_csv(paths[2]), CURVES)
    assert ax.figure.texts[-1].get_text() == "made in the mini lab"


@pytest.mark.parametrize("name", DRAW)
def test_a_file_has_the_size_asked_for(name: str, tmp_path: Path) -> None:
    fig, ax = plt.subplots(figsize=(3.35, 2.2))
    DRAW[name](ax)
    note = "95 % over test images; n = 300; mini laboratory: rendered scenes and small generators"
    pdf, png, _ = plots.save(fig, "size", CURVES, tmp_path, note)
    with Image.open(png) as image:
        assert image.size == (737, 484)
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", pdf.read_bytes())
    assert box and [float(side) / 72 for side in box.groups()] == pytest.approx([3.35, 2.2])
    drawn = fig.get_tightbbox()  # with the note under it, nothing is cut off
    assert drawn.x0 >= -0.02 and drawn.y0 >= -0.02 and drawn.x1 <= 3.37 and drawn.y1 <= 2.22


def test_a_full_disk_is_called_that(ax: Axes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(StoreError, match="the disk is full"):
        plots.save(ax.figure, "figure", CURVES, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_made_the_numbers_stands_below_them(ax: Axes, tmp_path: Path) -> None:
    features = make_features(20, 10)
    features.run |= {"config": {"name": "mini"}, "fingerprint_hash": "0123456789abcdef"}
    said = plots.small_print(features)
    assert said.startswith("features of 40 images, preset mini, models 0123456789abcdef, itemkit ")
    assert said.endswith(schema.MINI_WARNING)
    features.table["source"] = schema.LAB_SOURCE
    assert plots.small_print(features).endswith(schema.LAB_NOTE)
    # what a figure shows is counted in its own table, whatever else there is
    table = ESTIMATES.assign(n_real=[9, 9, 9, 1200], n_fake=7)
    plots.save(ax.figure, "shown", table, tmp_path, said)
    shown = ax.figure.texts[-1].get_text().replace("\n", " ")
    assert shown.startswith("n = 7 fake and 9 to 1,200 real; features of 40 images")


def test_the_same_figure_gives_the_same_files(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        ax = plots.scatter(
            plt.subplots()[1], np.c_[np.arange(100.0), np.arange(100)], list(CLOUD["generator"])
        )
        made.append([p.read_bytes() for p in plots.save(ax.figure, "same", CLOUD, tmp_path / name)])
    assert made[0] == made[1]
