"""JPEG: write with stated settings, and read the settings back from a file."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, JpegImagePlugin

from itemkit.errors import InputError

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")


def jpeg_bytes(image: Image.Image, quality: int, subsampling: str = "4:2:0") -> bytes:
    """Encode as baseline JPEG with the standard tables at `quality` and the given chroma subsampling."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=int(quality), subsampling=subsampling)
    return buffer.getvalue()


def jpeg_quality(image: Image.Image) -> int:
    """Estimate the quality of an opened JPEG from its quantisation tables.

    Parameters
    ----------
    image : PIL.Image.Image
        As `images.open_image` gives it for a JPEG file; its pixels are not looked at.

    Returns
    -------
    int
        The quality 1-100 whose standard tables (scaled as libjpeg does) lie nearest. Exact for files written
        by libjpeg; for cameras and editors with tables of their own, the nearest equivalent.
    """
    tables: dict[int, list[int]] = getattr(image, "quantization", {})
    if 0 not in tables:
        raise InputError(f"a {image.format or 'decoded'} image has no quantisation tables; open a JPEG file")
    found = np.concatenate([np.asarray(tables[i]) for i in (0, 1) if i in tables])  # luminance, chrominance
    return int(np.abs(_standard_tables()[:, : len(found)] - found).sum(axis=1).argmin()) + 1


@lru_cache(maxsize=1)
def _standard_tables() -> np.ndarray:
    """Tables of the JPEG standard (Annex K, luminance then chrominance) for qualities 1 to 100."""
    quality = np.arange(1, 101)[:, None]
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((np.array(_ANNEX_K)[None] * scale + 50) // 100, 1, 255)


_ANNEX_K = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
)  # fmt: skip


def jpeg_subsampling(image: Image.Image) -> str:
    """Chroma subsampling of an opened JPEG: one of `SUBSAMPLINGS`, ``grey`` or ``other``."""
    if len(getattr(image, "layer", ())) == 1:
        return "grey"
    code = JpegImagePlugin.get_sampling(image)
    return SUBSAMPLINGS[code] if code >= 0 else "other"
