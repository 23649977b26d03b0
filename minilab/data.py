"""The parts of ``data/mini`` that are renders alone: real images, new renders, questions for the doctor.

They could be drawn again from their indices; they are kept as files, so that whoever uses them needs no
laboratory.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from itemkit import schema
from minilab.camera import photo_files, png
from minilab.fakes import COUNTS, REAL_FACTOR, REALS, picture_table
from minilab.grammar import caption, phrase
from minilab.renders import make_renders
from minilab.world import SPLITS, render_index

FRESH = {"val": 400, "test": 800}
FRESH_FROM = 100_000
"""First index of the renders that calibrate and test promises; the data set's own end long before."""
N_CASES = 24


def reals() -> pd.DataFrame:
    """Photograph the real scenes of the data set.

    Returns
    -------
    DataFrame
        ``generator, split, prompt, image``, as the fakes.
    """
    return _tables({split: range(REAL_FACTOR * n) for split, n in COUNTS.items()})


def raw_reals() -> pd.DataFrame:
    """Real scenes of the data set as the world paints them, before the camera."""
    return _tables({split: range(REAL_FACTOR * n) for split, n in COUNTS.items()}, camera=False)


def fresh() -> pd.DataFrame:
    """Photograph scenes that neither the data set nor any training holds, to calibrate and test promises.

    Returns
    -------
    DataFrame
        ``generator, split, prompt, image``; split ``val`` calibrates, ``test`` tests.
    """
    return _tables({split: range(FRESH_FROM, FRESH_FROM + n) for split, n in FRESH.items()})


def _tables(indices: dict[str, range], camera: bool = True) -> pd.DataFrame:
    tables = []
    for split, wanted in indices.items():
        scenes = make_renders(split, len(wanted), start=wanted.start)
        stream = (REALS, SPLITS[split], wanted.start)
        files = photo_files(scenes.images, stream) if camera else map(png, scenes.images)
        prompts = [caption(facts) for facts in scenes.facts]
        tables.append(picture_table(schema.REAL_GENERATOR, [split] * len(wanted), prompts, files))
    return pd.concat(tables, ignore_index=True)


def cases(n: int = N_CASES) -> pd.DataFrame:
    """Renders with their truth, as questions for ``itemkit doctor --deep``.

    Parameters
    ----------
    n : int
        Scenes of one thing, all told differently.

    Returns
    -------
    DataFrame
        ``image`` (a file), ``caption``, and of the one thing its ``phrase`` and box, ``x0, y0, x1, y1``.
    """
    rows: list[dict] = []
    index = 0
    while len(rows) < n:
        render = render_index("models_val", index)
        index += 1
        facts = render.scene.facts
        told = caption(facts)
        if len(facts.things) != 1 or any(row["caption"] == told for row in rows):
            continue
        box = dict(zip(("x0", "y0", "x1", "y1"), map(float, render.boxes[0]), strict=True))
        file = photo_files(render.image[None], (REALS, SPLITS["models_val"], index))[0]
        rows.append({"image": file, "caption": told, "phrase": phrase(*facts.things[0]), **box})
    return pd.DataFrame(rows)


FILES: dict[str, Callable[[], pd.DataFrame]] = {
    "reals.parquet": reals,
    "fresh.parquet": fresh,
    "cases.parquet": cases,
}
