"""Robustness transforms: the field's grid of compression, blur, noise, size and crop, named and repeatable.

Both classes get the same transform, and captions, objects and regions are computed anew on the result.

What has a scale is measured by the picture: blur, resizing and cropping go by its sides, so they mean the
same to the models in a picture of 48 px and in one of 4,000. JPEG, WebP and noise work on the pixels as they
are, as in a file that travels, so they harm a small picture more; `grid_for` leaves out what would erase it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from itemkit.errors import InputError
from itemkit.images import jpeg_bytes
from itemkit.text import did_you_mean

VERSION = 1  # part of every cache key: raise it when any transform changes its pixels


@dataclass(frozen=True)
class Perturbation:
    """One named transform of an image; call it with the image and the image's id."""

    name: str  # as in figures and folders: jpeg_q50
    family: str  # clean, jpeg, webp, blur, noise, resize, resize_px, crop, chain
    strength: float  # how far from the clean image, ascending within a family, 0 for none
    setting: str  # the same as people write it, for axes: q 50, 2 px
    steps: tuple[tuple[Any, ...], ...]  # each a function of image and random generator, and its numbers

    def __call__(self, image: Image.Image, image_id: str) -> Image.Image:
        """Apply the transform to an RGB image.

        Its id and the name seed what is random: each image has its own noise, and the same on every run.
        """
        seed = hashlib.sha256(f"{self.name}\0{image_id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(seed[:8], "little"))
        for step, *numbers in self.steps:
            image = step(image, rng, *numbers)
        return image

    def fingerprint(self) -> dict[str, object]:
        """Everything that changes the pixels, for cache keys."""
        return {"name": self.name, "family": self.family, "strength": self.strength, "version": VERSION}


def _jpeg(image: Image.Image, rng: np.random.Generator, quality: int) -> Image.Image:
    return Image.open(BytesIO(jpeg_bytes(image, quality))).convert("RGB")


def _jpeg_random(image: Image.Image, rng: np.random.Generator, low: int, high: int) -> Image.Image:
    return _jpeg(image, rng, int(rng.integers(low, high + 1)))


def _webp(image: Image.Image, rng: np.random.Generator, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=False, method=4)
    return Image.open(buffer).convert("RGB")


def _blur(image: Image.Image, rng: np.random.Generator, sigma_px: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma_px))


def _blur_share(image: Image.Image, rng: np.random.Generator, percent: float) -> Image.Image:
    return _blur(image, rng, percent / 100 * min(image.size))


def _noise(image: Image.Image, rng: np.random.Generator, std_255: float) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    noisy = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(std_255)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _scaled(image: Image.Image, factor: float) -> tuple[int, int]:
    width, height = (max(min(8, side), round(side * factor)) for side in image.size)  # never below 8 px
    return width, height


def _resize(image: Image.Image, rng: np.random.Generator, factor: float) -> Image.Image:
    return image.resize(_scaled(image, factor), Image.Resampling.BICUBIC)


def _resize_px(image: Image.Image, rng: np.random.Generator, side_px: int) -> Image.Image:
    factor = side_px / min(image.size)
    return image if factor >= 1 else _resize(image, rng, factor)  # never enlarged: that would be another test


def _crop(image: Image.Image, rng: np.random.Generator, fraction: float) -> Image.Image:
    width, height = _scaled(image, fraction)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _social(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crop a little, scale and recompress, by amounts drawn per image, as sharing sites do. Our choice."""
    image = _crop(image, rng, rng.uniform(0.85, 1.0))
    image = _resize(image, rng, rng.uniform(0.6, 1.0))
    return _jpeg_random(image, rng, 65, 90)


def _family(
    family: str, step: Callable[..., Image.Image], name: str, setting: str, strength: Callable[[Any], float]
) -> Callable[[float], Perturbation]:
    """Make the function from a number to its perturbation."""

    def make(number: float) -> Perturbation:
        label, axis = name.format(number), setting.format(number)
        return Perturbation(label, family, strength(number), axis, ((step, number),))

    return make


# quality 1-100, chroma at half resolution as most sites store it
jpeg = _family("jpeg", _jpeg, "jpeg_q{}", "q {}", lambda quality: 100 - quality)
webp = _family("webp", _webp, "webp_q{}", "q {}", lambda quality: 100 - quality)  # lossy, quality 1-100
blur = _family("blur", _blur, "blur_{:g}px", "{:g} px", float)  # Gaussian, standard deviation in pixels
blur_share = _family("blur", _blur_share, "blur_{:g}%", "{:g} %", float)  # the same, of the shorter side
noise = _family("noise", _noise, "noise_{:g}", "{:g}/255", float)  # Gaussian per pixel and channel
# both sides by a factor of at most 1, and left so
resize = _family("resize", _resize, "resize_x{:g}", "× {:g}", lambda factor: 1 - factor)
# the shorter side; smaller images are left alone. Its strength, a share of 4096 px, is only to be ascending
resize_px = _family("resize_px", _resize_px, "resize_{}px", "to {} px", lambda side_px: 1 - side_px / 4096)
crop = _family("crop", _crop, "crop_{:g}", "{:g} of side", lambda fraction: 1 - fraction)  # the centre


def jpeg_random(low: int = 50, high: int = 95) -> Perturbation:
    """JPEG at a quality drawn for each image, the same on every run and for both classes."""
    step = (_jpeg_random, low, high)
    return Perturbation(f"jpeg_random_{low}_{high}", "jpeg", 100 - high, f"q {low}-{high}", (step,))


def chain(*parts: Perturbation, strength: float = 1.0) -> Perturbation:
    """Apply several perturbations one after the other."""
    name, setting = "+".join(p.name for p in parts), " + ".join(p.setting for p in parts)
    return Perturbation(name, "chain", strength, setting, tuple(step for p in parts for step in p.steps))


CLEAN = Perturbation("clean", "clean", 0.0, "clean", ())
SOCIAL = Perturbation("social", "chain", 3.0, "social media", ((_social,),))

#: The union of the grids of GenImage, SIDBench, CNNDetection and SPAI. Theirs have blur in px, of pictures of
#: about 256 px: 1, 2, 3 and 5 px are these shares of the side.
GRID: tuple[Perturbation, ...] = (
    CLEAN,
    *map(jpeg, (95, 90, 75, 65, 50, 30)),
    *map(webp, (90, 75, 50)),
    *map(blur_share, (0.4, 0.8, 1.2, 2)),
    *map(noise, (2, 5, 10, 20)),
    *map(resize, (0.75, 0.5, 0.25)),
    *map(resize_px, (112, 64)),
    *map(crop, (0.9, 0.75, 0.5)),
    chain(resize(0.75), jpeg(75), strength=1.0),
    chain(jpeg(50), blur_share(0.8), strength=2.0),
    SOCIAL,
)
SMALL_PX = (
    128  # shorter side below which blocks of 8 px and a quarter of the pixels hold no object. Our choice
)
ERASING = ("jpeg_q30", "resize_x0.25")  # in such a picture


def grid_for(side_px: float) -> tuple[Perturbation, ...]:
    """Steps of `GRID` that say something about pictures with this shorter side.

    Left out are what erases a small picture, and sizes in pixels that it does not exceed.
    """
    useless = {resize_px(side).name for side in (112, 64) if side_px <= side}
    useless |= {*ERASING} if side_px < SMALL_PX else set()
    return tuple(p for p in GRID if p.name not in useless)


def get_perturbation(name: str) -> Perturbation:
    """Find a perturbation of `GRID` by its name, e.g. ``jpeg_q50``."""
    known = {perturbation.name: perturbation for perturbation in GRID}
    if name not in known:
        raise InputError(f"no perturbation {name!r};{did_you_mean(name, known)} Known: {', '.join(known)}")
    return known[name]
