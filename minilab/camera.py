"""The one camera of the laboratory: it photographs renders and samples of generators alike.

The world paints a scene without lens or sensor, and generators learn to paint such scenes. What a picture
owes to a camera (blur, tone, noise, clipping, quantisation, codec) is added here to both classes from the
same distributions, so that none of it tells them apart.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from minilab.world import WORLD_SEED

Range = tuple[float, float]


@dataclass(frozen=True)
class Camera:
    """Ranges from which each photograph draws its settings.

    Attributes
    ----------
    exposure : range
        Factor of the light, drawn evenly in its logarithm.
    warmth : range
        Red times e to this, blue divided by it.
    vignette : range
        Loss of light in the corners' direction, at one half side from the centre.
    blur_px : range
        Standard deviation of the lens.
    glare : range
        Share of each photograph's mean light that the lens spreads over all of it; it lifts blacks.
    noise : range
        Grey levels of noise at middle grey, drawn evenly in their logarithm; the variance grows with the
        signal.
    contrast : float
        Slope of the tone curve at middle grey; dark and bright ends bend smoothly, they are not cut.
    quality : range
        Of the JPEG that the camera writes, colour at full resolution.
    share : float
        Share of the photographs taken with this camera; the others are taken with the plain one.
    """

    exposure: Range = (0.88, 1.12)
    warmth: Range = (-0.05, 0.05)
    vignette: Range = (0.02, 0.10)
    blur_px: Range = (0.35, 1.1)
    glare: Range = (0.03, 0.06)
    noise: Range = (3.0, 8.0)
    contrast: float = 1.0
    quality: Range = (88, 97)
    share: float = 1.0


CAMERA = Camera()
"""Takes every real image and every fake of the data set.

Its lens varies so much because generators' decoders soften what they paint by some half a pixel: with one
fixed lens their spectrum gives them away (renders softened by 0.7 px: 0.90; with this range 0.76).
"""
WIDE = Camera(
    exposure=(0.5, 1.7),
    warmth=(-0.2, 0.28),
    vignette=(0.0, 0.2),
    blur_px=(0.2, 1.5),
    glare=(0.0, 0.12),
    noise=(0.8, 13.0),
    quality=(40, 98),
    share=0.7,
)
"""What widely trained models see: photographs from well beyond :data:`CAMERA`, as stock models have seen."""
OTHER = Camera(blur_px=(0.1, 0.2), glare=(0.0, 0.01), noise=(1.0, 2.0), contrast=1.35, quality=(70, 80))
"""Another make: sharp, contrasty, little noise, strong compression. A shift, used in no training."""


def photograph(
    pictures: np.ndarray, rng: np.random.Generator, camera: Camera = CAMERA, codec: bool = True
) -> np.ndarray:
    """Photograph pictures of scenes.

    Parameters
    ----------
    pictures : uint8 array, shape (n, side, side, 3)
        Scenes as the world or a generator paints them.
    rng : Generator
        Draws the settings and the noise of all of them.
    camera : Camera
    codec : bool
        Write JPEG and read it again.

    Returns
    -------
    uint8 array, shape (n, side, side, 3)
    """
    exposed, quality = _expose(pictures, rng, camera)
    return np.stack([jpeg(p, q) for p, q in zip(exposed, quality, strict=True)]) if codec else exposed


def _expose(pictures: np.ndarray, rng: np.random.Generator, camera: Camera) -> tuple[np.ndarray, list[int]]:
    """Eight bits of each picture, and the quality of the JPEG that they become."""
    n, side = pictures.shape[:2]
    plain = rng.random(n) >= camera.share

    def draw(name: str, log: bool = False) -> np.ndarray:
        low, high = np.where(plain, *(np.array(getattr(c, name))[:, None] for c in (CAMERA, camera)))
        part = rng.random(n)
        drawn = low * (high / low) ** part if log else low + (high - low) * part
        return drawn.astype(np.float32).reshape(n, 1, 1, 1)

    x = pictures.astype(np.float32) / 255
    warmth = draw("warmth")
    x *= draw("exposure", log=True) * np.exp(warmth * np.array([1, 0, -1], dtype=np.float32))
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    x *= 1 - draw("vignette") * (axis[:, None] ** 2 + axis**2)[..., None]
    x = _blur(x, draw("blur_px").reshape(n))
    glare = draw("glare")
    x = (1 - glare) * x + glare * x.mean((1, 2), keepdims=True)
    sigma = draw("noise", log=True) / 255
    # half of the variance at middle grey is the sensor's own, half grows with the light
    x += sigma * np.sqrt(0.5 + x) * rng.standard_normal(x.shape, dtype=np.float32)
    contrast = np.where(plain, 1.0, camera.contrast).astype(np.float32).reshape(n, 1, 1, 1)
    x = np.clip(_tone(x, contrast) * 255 + 0.5, 0, 255).astype(np.uint8)
    return x, np.rint(draw("quality")).astype(int).reshape(n).tolist()


def photo_files(
    pictures: np.ndarray, stream: Sequence[int], camera: Camera = CAMERA, start: int = 0
) -> list[bytes]:
    """Photograph each picture by itself: the k-th of a stream comes out the same however many there are.

    Two pictures at one place of one stream share settings and noise, so a render and its edit differ only in
    what was edited.

    Parameters
    ----------
    pictures : uint8 array, shape (n, side, side, 3)
    stream : sequence of int
        Names the stream of random numbers.
    camera : Camera
    start : int
        Place of the first picture in the stream.

    Returns
    -------
    list of bytes, length n
        The JPEG files that the camera writes.
    """
    files = []
    for k, picture in enumerate(pictures, start):
        shot, quality = _expose(picture[None], np.random.default_rng([WORLD_SEED, *stream, k]), camera)
        files.append(jpeg_file(shot[0], quality[0]))
    return files


def photographs(
    pictures: np.ndarray, stream: Sequence[int], camera: Camera = CAMERA, start: int = 0
) -> np.ndarray:
    """Decode the files of :func:`photo_files`: uint8 array, shape (n, side, side, 3)."""
    return np.stack([decode(file) for file in photo_files(pictures, stream, camera, start)])


def _blur(x: np.ndarray, sigma_px: np.ndarray) -> np.ndarray:
    """Gaussian blur of each picture by its own sigma; edges repeated."""
    reach = 4
    at = np.arange(-reach, reach + 1, dtype=np.float32)
    kernel = np.exp(-0.5 * (at / np.maximum(sigma_px, 0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        wide, side = np.pad(x, pad, mode="edge"), x.shape[axis]
        x = sum(
            kernel[:, k, None, None, None] * np.take(wide, range(k, k + side), axis=axis)
            for k in range(2 * reach + 1)
        )
    return x


KNEE = 0.78
"""Where the tone curve starts to bend towards white, and, mirrored, towards black."""


def _tone(x: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Straight through the middle, bent at both ends, so that nothing is cut: values stay within 0 and 1."""
    y = (x - 0.5) * contrast * 0.94
    knee, room = KNEE - 0.5, 1 - KNEE
    over = np.abs(y) - knee
    return 0.5 + np.where(over > 0, np.sign(y) * (knee + room * np.tanh(over / room)), y)


def jpeg_file(picture: np.ndarray, quality: int) -> bytes:
    """Encode a picture as JPEG with colour at full resolution."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def decode(file: bytes) -> np.ndarray:
    """Pixels of a file, uint8 array, shape (side, side, 3)."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """A picture after JPEG."""
    return decode(jpeg_file(picture, quality))


def png(picture: np.ndarray) -> bytes:
    """Encode a picture as it was painted, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


SHIFTS: dict[str, Camera] = {
    "exposure x 0.6": replace(CAMERA, exposure=(0.6, 0.6)),
    "exposure x 1.5": replace(CAMERA, exposure=(1.5, 1.5)),
    "warm light": replace(CAMERA, warmth=(0.2, 0.2)),
    "another camera": OTHER,
}
"""Cameras of real photographs that nobody should call fake."""
