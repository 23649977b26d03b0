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
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from itemkit.errors import InputError
from itemkit.images import jpeg_bytes
from itemkit.text import did_you_mean

VERSION = 1  # part of every cache key: raise it when any transform changes its pixels
_MIN_SIDE_PX = 8  # nothing is made smaller than this


@dataclass(frozen=True)
class Perturbation:
    """One named transform of an image; call it with the image and the image's id."""

    name: str  # as in figures and folders: jpeg_q50
    family: str  # clean, jpeg, webp, blur, noise, resize, resize_px, crop, chain
    strength: float  # how far from the clean image, ascending within a family, 0 for none
    setting: str  # the same as people write it, for axes: q 50, 2 px
    apply: Callable[[Image.Image, np.random.Generator], Image.Image]

    def __call__(self, image: Image.Image, image_id: str | None = None) -> Image.Image:
        """Apply the transform to an RGB image.

        `image_id` (default: a hash of the pixels) and the name seed what is random: each image has its own
        noise, and the same on every run.
        """
        if image.mode != "RGB":
            raise InputError(f"{self.name} got an image of mode {image.mode}; convert it with load_image")
        if image_id is None:
            image_id = hashlib.sha256(image.tobytes()).hexdigest()
        seed = hashlib.sha256(f"{self.name}\0{image_id}".encode()).digest()
        return self.apply(image, np.random.default_rng(int.from_bytes(seed[:8], "little")))

    def fingerprint(self) -> dict[str, object]:
        """Everything that changes the pixels, for cache keys."""
        return {"name": self.name, "family": self.family, "strength": self.strength, "version": VERSION}


def _jpeg(quality: int, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.open(BytesIO(jpeg_bytes(image, quality))).convert("RGB")


def _jpeg_random(low: int, high: int, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return _jpeg(int(rng.integers(low, high + 1)), image, rng)


def _webp(quality: int, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=False, method=4)
    return Image.open(buffer).convert("RGB")


def _blur(sigma_px: float, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma_px))


def _noise(std_255: float, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    noisy = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(std_255)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _scaled(image: Image.Image, factor: float) -> tuple[int, int]:
    width, height = (max(min(_MIN_SIDE_PX, side), round(side * factor)) for side in image.size)
    return width, height


def _resize(factor: float, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.resize(_scaled(image, factor), Image.Resampling.BICUBIC)


def _resize_px(side_px: int, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    factor = side_px / min(image.size)
    return image if factor >= 1 else _resize(factor, image, rng)  # never enlarged: that would be another test


def _crop(fraction: float, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = _scaled(image, fraction)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _chain(parts: tuple[Perturbation, ...], image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for part in parts:
        image = part.apply(image, rng)
    return image


def _social(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crop a little, scale and recompress, by amounts drawn per image, as sharing sites do. Our choice."""
    image = _crop(rng.uniform(0.85, 1.0), image, rng)
    image = _resize(rng.uniform(0.6, 1.0), image, rng)
    return _jpeg_random(65, 90, image, rng)


class _Family(NamedTuple):
    step: Callable[..., Image.Image]  # number, image, random generator -> image
    what: str  # the number in words, and its bounds
    low: float
    high: float
    name: str
    setting: str
    strength: Callable[[Any], float]


_FAMILIES = {
    "jpeg": _Family(_jpeg, "JPEG quality", 1, 100, "jpeg_q{}", "q {}", lambda q: 100 - q),
    "webp": _Family(_webp, "WebP quality", 1, 100, "webp_q{}", "q {}", lambda q: 100 - q),
    "blur": _Family(_blur, "blur sigma", 0, 100, "blur_{:g}px", "{:g} px", float),
    "noise": _Family(_noise, "noise standard deviation", 0, 255, "noise_{:g}", "{:g}/255", float),
    "resize": _Family(_resize, "resize factor", 0.01, 1, "resize_x{:g}", "× {:g}", lambda x: 1 - x),
    # the share taken from a side of 4096 px, only there to be ascending
    "resize_px": _Family(
        _resize_px, "side in px", 8, 4096, "resize_{}px", "to {} px", lambda x: 1 - x / 4096
    ),
    "crop": _Family(_crop, "crop fraction", 0.01, 1, "crop_{:g}", "{:g} of side", lambda x: 1 - x),
}


def _make(family: str, number: float) -> Perturbation:
    one = _FAMILIES[family]
    if not one.low <= number <= one.high:
        raise InputError(f"{one.what} is {number}; choose {one.low:g} to {one.high:g}")
    name, setting = one.name.format(number), one.setting.format(number)
    return Perturbation(name, family, one.strength(number), setting, partial(one.step, number))


jpeg = partial(_make, "jpeg")  # quality 1-100, chroma at half resolution as most sites store it
webp = partial(_make, "webp")  # lossy, quality 1-100
blur = partial(_make, "blur")  # Gaussian, standard deviation in pixels; 0 changes nothing
noise = partial(_make, "noise")  # Gaussian per pixel and channel, deviation in 1/255; 0 changes nothing
resize = partial(_make, "resize")  # both sides by a factor of at most 1, and left so; 1 changes nothing
resize_px = partial(_make, "resize_px")  # the shorter side to so many pixels; smaller images are left alone
crop = partial(_make, "crop")  # the centre, a fraction of each side; 1 changes nothing


def jpeg_random(low: int = 50, high: int = 95) -> Perturbation:
    """JPEG at a quality drawn for each image, the same on every run and for both classes."""
    step = partial(_jpeg_random, low, high)
    return Perturbation(f"jpeg_random_{low}_{high}", "jpeg", 100 - high, f"q {low}-{high}", step)


def chain(*parts: Perturbation, strength: float = 1.0) -> Perturbation:
    """Apply several perturbations one after the other."""
    name = "+".join(part.name for part in parts)
    return Perturbation(name, "chain", strength, name, partial(_chain, parts))


CLEAN = Perturbation("clean", "clean", 0.0, "clean", partial(_chain, ()))
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
