"""One self-contained HTML file in which to walk among thousands of images; it asks no network for anything.

Bokeh draws the points (WebGL), finds the one under the pointer, zooms and selects; ``explorer.html`` and
``explorer.js`` are the page around it. Needs the optional extra: ``pip install "itemkit[explore]"``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from itemkit import schema
from itemkit._files import atomic_write
from itemkit.errors import InputError, MissingExtra
from itemkit.features import Features
from itemkit.images import load_image
from itemkit.misalignment import Representation, cosines
from itemkit.plots import GREY, colours
from itemkit.text import count, did_you_mean, printable

MOST_IMAGES = 20_000  # more make a page that opens slowly and is hard to pass on
PICTURE_BYTES = 13_000_000  # of all thumbnails; as text of the page a third more
# side in pixels and WebP quality, the best first; the first with which all stay within these bytes is taken
LOOKS = ((160, 85), (128, 80), (96, 75), (64, 70), (64, 50), (48, 40), (32, 25))
SAMPLE = 64  # images whose thumbnails tell how large all will be
MOST_OBJECTS = 12  # of an image, in the page
WITHOUT_LABEL = "without label"


def write_explorer(
    features: Features, path: str | Path, numbers: pd.DataFrame | None = None, *,
    score: str = "", progress: bool = False,
) -> Path:  # fmt: skip
    """Write a page with a point for each image: hover, search, threshold, lasso.

    Parameters
    ----------
    features : Features
        At most `MOST_IMAGES` images. One that cannot be read keeps its point; the page says why.
    path : path
        The HTML file to write, about 25 MB at most: the more images, the smaller their thumbnails.
    numbers : DataFrame, optional
        One row per image, in order, shown beside those of `itemkit.misalignment.cosines`, e.g.
        ``pd.DataFrame(umap_2d(x), columns=["UMAP 1", "UMAP 2"]).assign(p_fake=detector.score(features))``.
        The first two columns are shown first.
    score : str
        Column of the threshold; by default ``p_fake`` or the global cosine.
    progress : bool
        Show a bar while thumbnails are made: a minute for some thousands of photographs.

    Raises
    ------
    InputError
        Too many images, a wrong number of rows, or no such column.
    MissingExtra
        Bokeh is not installed.
    """
    table = _numbers(features, numbers)
    score = score or ("p_fake" if "p_fake" in table else "global cosine")
    if score not in table:
        hint = did_you_mean(score, table)
        raise InputError(f"there is no column {score!r}.{hint} There are: {', '.join(table.columns)}")
    first = {"x": table.columns[0], "y": table.columns[1], "score": score}
    plot, scripts = _plot(len(features))
    scripts["page"] = Path(__file__).with_suffix(".js").read_text("utf-8")
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts.values()]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    # Only these scripts run, and nothing is fetched, whatever a caption holds. They may compile code
    # ('unsafe-eval'): else Bokeh has no WebGL.
    policy = (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(
        first | {"plot": plot} | _contents(features, table, progress), ensure_ascii=False, allow_nan=False
    )
    # "<" is all that could end the element; JSON knows another way to write it
    parts = scripts | {"policy": policy, "data": data.replace("<", "\\u003c")}
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page)  # one pass: data is not read again
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page.encode("utf-8"))
    return path


def _plot(n: int) -> tuple[Any, dict[str, str]]:
    """An empty plot for n points, as JSON, which the page's script fills; and the scripts that draw it."""
    try:
        from bokeh.embed import json_item
        from bokeh.models import ColumnDataSource, HoverTool, Range1d
        from bokeh.plotting import figure
        from bokeh.resources import Resources
    except ImportError as error:
        wanted = 'the explorer needs an optional package: pip install "itemkit[explore]"'
        raise MissingExtra(wanted) from error
    columns = ("x", "y", "colour", "fill", "line")
    plot = figure(
        name="plot", sizing_mode="stretch_both", output_backend="webgl", x_range=Range1d(), y_range=Range1d(),
        tools="pan,wheel_zoom,box_zoom,lasso_select,tap,reset,save", active_scroll="wheel_zoom",
    )  # fmt: skip
    drawn = plot.scatter(
        "x", "y", source=ColumnDataSource({name: [] for name in columns}, name="points"),
        size=5 if n > 3000 else 8, line_width=1.2, line_color="colour", line_alpha="line",
        fill_color="colour", fill_alpha="fill", hover_fill_color="colour", hover_fill_alpha="fill",
        hover_line_color="black", hover_line_alpha=1,
    )  # fmt: skip
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=None, visible=False))
    plot.toolbar.logo = None
    library = Resources(mode="inline", components=["bokeh", "bokeh-gl"], log_level="warn").js_raw
    return json_item(plot), dict(zip(("bokeh", "bokeh_gl", "level"), library, strict=True))


def _numbers(features: Features, numbers: pd.DataFrame | None) -> pd.DataFrame:
    if not 0 < len(features) <= MOST_IMAGES:
        raise InputError(
            f"got {count(len(features), 'image')}, a page holds 1 to {MOST_IMAGES:,}: select() some of them"
        )
    ours = cosines(features).rename(columns=lambda name: name.replace("_", " "))
    if numbers is None:
        return ours
    if len(numbers) != len(features):
        raise InputError(
            f"numbers has {len(numbers):,} rows, features {len(features):,} images; give a row for each"
        )
    if words := [name for name in numbers if not pd.api.types.is_numeric_dtype(numbers[name])]:
        raise InputError(f"column {words[0]!r} of numbers holds no numbers; leave it out")
    numbers = numbers.reset_index(drop=True).rename(columns=printable)
    return pd.concat([numbers, ours.drop(columns=numbers.columns, errors="ignore")], axis=1)


def _contents(features: Features, numbers: pd.DataFrame, progress: bool) -> dict[str, Any]:
    """All that the page shows, as JSON can hold it; texts without characters that rearrange others."""
    table = features.table
    name = table[schema.GENERATOR].where(table[schema.LABEL].notna(), WITHOUT_LABEL).fillna(WITHOUT_LABEL)
    palette = colours(list(name)) | {WITHOUT_LABEL: GREY}
    groups = [g for g in palette if (name == g).any()]
    label = {g: -1 if g == WITHOUT_LABEL else int(g != schema.REAL_GENERATOR) for g in groups}
    cosine = Representation("cosines").pair_cosines(features)["local"]
    objects: list[list] = [[] for _ in range(len(features))]
    for i in np.lexsort((cosine, features.owner)):
        if len(objects[features.owner[i]]) < MOST_OBJECTS:
            phrase = printable(features.objects["phrase"].iat[i])
            objects[features.owner[i]].append([phrase, round(float(cosine[i]), 3)])
    made = features.provenance
    by = "; ".join(f"{key} {made[key]}" for key in ("preset", "models", "itemkit") if made[key])
    thumb, missing = _thumbnails(list(table[schema.PATH]), progress)
    finite = numbers.astype(float).replace([np.inf, -np.inf], np.nan).round(5).astype(object)
    return {
        "made": printable(f"{count(len(features), 'image')}; {by}"),
        "note": printable(made["note"]),
        "numbers": {c: finite[c].where(finite[c].notna(), None).tolist() for c in finite},
        "groups": [{"name": printable(g), "colour": palette[g], "label": label[g]} for g in groups],
        "group": name.map({g: i for i, g in enumerate(groups)}).tolist(),
        "caption": table[schema.CAPTION].fillna("").map(printable).tolist(),
        # the folder and the file: a whole path tells of the machine
        "file": [printable("/".join(Path(path).parts[-2:])) for path in table[schema.PATH]],
        "objects": objects,
        "thumb": thumb,
        "missing": missing,
    }


def _thumbnails(paths: Sequence[str], progress: bool = False) -> tuple[list[str], dict[int, str]]:
    """WebP pictures in base64, "" where there is none, and why.

    Each stands by itself: one sheet of all would save an eighth of the bytes, and a browser would decode
    megabytes of it to show one.
    """

    def make(path: str, side: int, quality: int) -> bytes | str:
        try:
            image = load_image(path, least_side=2 * side)
            image.thumbnail((side, side))
            picture = io.BytesIO()
            image.save(picture, "WEBP", quality=quality)
            return picture.getvalue()
        except Exception as error:  # noqa: BLE001 - whatever a picture does to a decoder
            return getattr(error, "kind", type(error).__name__)  # its text has the whole path

    with ThreadPoolExecutor() as pool:
        some = paths[:: -(-len(paths) // SAMPLE)]
        for side, quality in LOOKS:
            tried = pool.map(make, some, repeat(side), repeat(quality))
            sizes = [len(picture) for picture in tried if isinstance(picture, bytes)]
            if sum(sizes) / max(1, len(sizes)) * len(paths) <= PICTURE_BYTES:
                break
        every = pool.map(make, paths, repeat(side), repeat(quality))
        made = list(tqdm(every, "thumbnails", len(paths), disable=not progress))
    pictures = [base64.b64encode(p).decode() if isinstance(p, bytes) else "" for p in made]
    return pictures, {i: p for i, p in enumerate(made) if isinstance(p, str)}
