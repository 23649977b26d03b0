"""A sheet of samples to be named by somebody who has not seen what was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from minilab.camera import photographs
from minilab.fakes import sample_fakes
from minilab.grammar import Facts, read_caption
from minilab.renders import make_renders
from minilab.truth import compare_facts

FIRST_SCENE = 21_000
"""Sheets show scenes of the ``spare`` split from here on."""
SHEET = 6
"""First number of the stream from which their photographs draw their settings."""


def tile(images: np.ndarray, columns: int, scale: int = 3, labels: list[str] | None = None) -> Image.Image:
    """Lay pictures out in rows at a whole-number scale.

    Parameters
    ----------
    images : uint8 array, shape (n, side, side, 3)
    columns : int
    scale : int
    labels : list of str, optional
        One for each row, written at its left.

    Returns
    -------
    Image
    """
    step, left = images.shape[1] * scale + 2, 90 if labels else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (left + columns * step, rows * step), "white")
    for k, image in enumerate(images):
        large = Image.fromarray(image).resize((image.shape[1] * scale,) * 2, Image.Resampling.NEAREST)
        sheet.paste(large, (left + k % columns * step, k // columns * step))
    for row, label in enumerate(labels or []):
        ImageDraw.Draw(sheet).text((4, row * step + step // 2), label, fill="black")
    return sheet


def blind_sheet(
    folder: Path, name: str, first: int = FIRST_SCENE, n: int = 40, device: str = "cpu"
) -> tuple[Image.Image, list[Facts]]:
    """Photographed samples to be named by somebody who has not seen what was asked for.

    Parameters
    ----------
    folder : Path
    name : str
        A generator.
    first : int
        Number of the first scene in the ``spare`` split; who has named one sheet knows its scenes.
    n : int
    device : str

    Returns
    -------
    sheet : Image
        Eight to a row, at three times the size.
    facts : list of Facts
        What was asked for, in order; not to be looked at before the names are written down.
    """
    scenes = make_renders("spare", n, start=first)
    images = photographs(sample_fakes(name, folder, scenes, seed=2, device=device), (SHEET, 1))
    return tile(images, 8), scenes.facts


def named(told: list[str], facts: list[Facts]) -> dict[str, float]:
    """Shares of right kinds, colours and settings among names that were written down blind.

    Parameters
    ----------
    told : list of str, length n
        For each picture, in the grammar's words: ``a red ball, a blue car on the sand``.
    facts : list of Facts, length n

    Returns
    -------
    dict
        ``kinds``, ``colours``, ``setting``, ``f1``: means of :func:`minilab.truth.compare_facts`.
    """
    rows = [compare_facts(read_caption(t), f) for t, f in zip(told, facts, strict=True)]
    return {key: float(np.mean([r[key] for r in rows])) for key in ("kinds", "colours", "setting", "f1")}
