"""Robustness transforms: the field's grid of compression, blur, noise, size and crop, named and repeatable.

Both classes get the same transform, and captions, objects and regions are computed anew on the result.
Sizes are in pixels of the image as it is: blur of 1 px on a 48 px render takes away about as much as
5 px on a 256 px photograph. `GRID` is meant for photographs, `QUICK_GRID` for small pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter

from itemkit.errors import InputError
from itemkit.images import jpeg_bytes
from itemkit.text import did_you_mean

Step = Callable[[Image.Image, np.random.Generator], Image.Image]
VERSION = 1  # part of every cache key: raise it when any transform changes its pixels
_MIN_SIDE_PX = 8  # nothing is made smaller than this


@dataclass(frozen=True)
class Perturbation:
    """One named transform of an image; call it with the image and the image's id.

    Attributes
    ----------
    name : str
        As in figures and folders, e.g. ``jpeg_q50``.
    family : str
        ``clean, jpeg, webp, blur, noise, resize, resize_px, crop, chain``.
    strength : float
        How far from the clean image, ascending within a family, 0 for none: 100 - quality, sigma in px,
        standard deviation in 1/255, share of the side taken away, place in the list of chains.
    setting : str
        The same as people write it, for axes: ``q 50``, ``2 px``.
    apply : callable
        ``(image, random generator) -> image``.
    """

    name: str
    family: str
    strength: float
    setting: str
    apply: Step

    def __call__(self, image: Image.Image, image_id: str | None = None) -> Image.Image:
        """Apply the transform.

        Parameters
        ----------
        image : PIL.Image.Image, mode RGB
        image_id : str, optional
            Seeds what is random, together with the name, so that each image has its own noise, and the same
            on every run. Default: a hash of the pixels.

        Returns
        -------
        PIL.Image.Image
        """
        if image.mode != "RGB":
            raise InputError(
                f"{self.name} got an image of mode {image.mode}; convert it with load_image first"
            )
        if image_id is None:
            image_id = hashlib.sha256(image.tobytes()).hexdigest()
        seed = hashlib.sha256(f"{self.name}\0{image_id}".encode()).digest()
        return self.apply(image, np.random.default_rng(int.from_bytes(seed[:8], "little")))

    def fingerprint(self) -> dict[str, object]:
        """Everything that changes the pixels, for cache keys."""
        return {"name": self.name, "family": self.family, "strength": self.strength, "version": VERSION}


def _jpeg(image: Image.Image, rng: np.random.Generator, low: int, high: int) -> Image.Image:
    quality = low if low == high else int(rng.integers(low, high + 1))
    return Image.open(BytesIO(jpeg_bytes(image, quality))).convert("RGB")


def _webp(image: Image.Image, rng: np.random.Generator, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=False, method=4)
    return Image.open(buffer).convert("RGB")


def _blur(image: Image.Image, rng: np.random.Generator, sigma_px: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma_px))


def _noise(image: Image.Image, rng: np.random.Generator, std_255: float) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    noisy = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(std_255)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _resize(image: Image.Image, rng: np.random.Generator, factor: float) -> Image.Image:
    width, height = (max(min(_MIN_SIDE_PX, side), round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _resize_px(image: Image.Image, rng: np.random.Generator, side_px: int) -> Image.Image:
    factor = side_px / min(image.size)
    return image if factor >= 1 else _resize(image, rng, factor)  # never enlarged: that would be another test


def _crop(image: Image.Image, rng: np.random.Generator, fraction: float) -> Image.Image:
    width, height = (max(min(_MIN_SIDE_PX, side), round(side * fraction)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _chain(image: Image.Image, rng: np.random.Generator, steps: tuple[Step, ...]) -> Image.Image:
    for step in steps:
        image = step(image, rng)
    return image


def _social(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crop a little, scale and recompress, by amounts drawn per image, as sharing sites do. Our choice."""
    image = _crop(image, rng, rng.uniform(0.85, 1.0))
    image = _resize(image, rng, rng.uniform(0.6, 1.0))
    return _jpeg(image, rng, 65, 90)


def _check(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{what} is {value}; choose {low:g} to {high:g}")


def jpeg(quality: int) -> Perturbation:
    """JPEG at a quality of 1-100, chroma at half resolution as most sites store it."""
    _check("JPEG quality", quality, 1, 100)
    step = partial(_jpeg, low=int(quality), high=int(quality))
    return Perturbation(f"jpeg_q{quality}", "jpeg", 100 - quality, f"q {quality}", step)


def jpeg_random(low: int = 50, high: int = 95) -> Perturbation:
    """JPEG at a quality drawn for each image, the same on every run and for both classes."""
    _check("JPEG quality", low, 1, 100)
    _check("JPEG quality", high, low, 100)
    step = partial(_jpeg, low=low, high=high)
    return Perturbation(f"jpeg_random_{low}_{high}", "jpeg", 100 - high, f"q {low}-{high}", step)


def webp(quality: int) -> Perturbation:
    """Lossy WebP at a quality of 1-100."""
    _check("WebP quality", quality, 1, 100)
    step = partial(_webp, quality=int(quality))
    return Perturbation(f"webp_q{quality}", "webp", 100 - quality, f"q {quality}", step)


def blur(sigma_px: float) -> Perturbation:
    """Gaussian blur with a standard deviation in pixels; 0 changes nothing."""
    _check("blur sigma", sigma_px, 0, 100)
    step = partial(_blur, sigma_px=float(sigma_px))
    return Perturbation(f"blur_{sigma_px:g}px", "blur", float(sigma_px), f"{sigma_px:g} px", step)


def noise(std_255: float) -> Perturbation:
    """Gaussian noise per pixel and channel with a standard deviation in 1/255; 0 changes nothing."""
    _check("noise standard deviation", std_255, 0, 255)
    step = partial(_noise, std_255=float(std_255))
    return Perturbation(f"noise_{std_255:g}", "noise", float(std_255), f"{std_255:g}/255", step)


def resize(factor: float) -> Perturbation:
    """Scale both sides by a factor of at most 1, and leave the image so; 1 changes nothing."""
    _check("resize factor", factor, 0.01, 1)
    step = partial(_resize, factor=float(factor))
    return Perturbation(f"resize_x{factor:g}", "resize", 1 - factor, f"× {factor:g}", step)


def resize_px(side_px: int) -> Perturbation:
    """Scale the shorter side to a number of pixels; smaller images are left alone."""
    _check("side in px", side_px, _MIN_SIDE_PX, 4096)
    step = partial(_resize_px, side_px=int(side_px))
    # the strength is only there to be ascending: the share taken from a side of 4096 px
    return Perturbation(f"resize_{side_px}px", "resize_px", 1 - side_px / 4096, f"to {side_px} px", step)


def crop(fraction: float) -> Perturbation:
    """Keep the centre, a fraction of each side; 1 changes nothing."""
    _check("crop fraction", fraction, 0.01, 1)
    step = partial(_crop, fraction=float(fraction))
    return Perturbation(f"crop_{fraction:g}", "crop", 1 - fraction, f"{fraction:g} of side", step)


def chain(*parts: Perturbation, strength: float = 1.0) -> Perturbation:
    """Apply several perturbations one after the other."""
    name = "+".join(part.name for part in parts)
    return Perturbation(name, "chain", strength, name, partial(_chain, steps=tuple(p.apply for p in parts)))


CLEAN = Perturbation("clean", "clean", 0.0, "clean", partial(_chain, steps=()))
SOCIAL = Perturbation("social", "chain", 3.0, "social media", _social)

#: The union of the grids of GenImage, SIDBench, CNNDetection and SPAI.
GRID: tuple[Perturbation, ...] = (
    CLEAN,
    *map(jpeg, (95, 90, 75, 65, 50, 30)),
    *map(webp, (90, 75, 50)),
    *map(blur, (1, 2, 3, 5)),
    *map(noise, (2, 5, 10, 20)),
    *map(resize, (0.75, 0.5, 0.25)),
    *map(resize_px, (112, 64)),
    *map(crop, (0.9, 0.75, 0.5)),
    chain(resize(0.75), jpeg(75), strength=1.0),
    chain(jpeg(50), blur(2), strength=2.0),
    SOCIAL,
)

#: A shorter grid with steps that a picture of 48 px survives; our choice, for the mini laboratory.
QUICK_GRID: tuple[Perturbation, ...] = (
    CLEAN,
    *map(jpeg, (90, 75, 50)),
    *map(blur, (0.5, 1)),
    *map(noise, (5, 10)),
    *map(resize, (0.75, 0.5)),
    *map(crop, (0.9, 0.75)),
    chain(resize(0.75), jpeg(75), strength=1.0),
)

_BY_NAME = {p.name: p for p in (*GRID, *QUICK_GRID)}


def get_perturbation(name: str) -> Perturbation:
    """Find a perturbation of `GRID` or `QUICK_GRID` by its name, e.g. ``jpeg_q50``."""
    if name not in _BY_NAME:
        hint = did_you_mean(name, _BY_NAME)
        raise InputError(f"no perturbation {name!r};{hint} Known: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
