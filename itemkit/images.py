"""Images: decode anything a user has into 8-bit sRGB pixels, and bring both classes to one size and codec."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, PngImagePlugin

from itemkit.errors import InputError
from itemkit.text import printable

# Pillow's own warning bound: 256 MiB of RGB, more than any encoder here can use.
MAX_PIXELS = 89_478_485
MAX_SIDE = 100_000  # a longer strip is no picture
MAX_ASPECT = 16  # long side / short side; see `bound_aspect`
MAX_FILE_BYTES = 512 * 2**20
MAX_METADATA_BYTES = 64 * 2**20
_STRIP_PIXELS = 2**20  # converted at a time, so that no second and third copy of a large image is made

# Pillow takes a stored prompt or colour profile of over 1 MiB for an attack and gives up the pixels.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_METADATA_BYTES

# Only these decoders are tried: of the others that Pillow knows some start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff",
              ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".heic", ".heif", ".hif")  # fmt: skip

_BAD_EXIF = (ArithmeticError, AttributeError, LookupError, OSError, SyntaxError, TypeError, ValueError,
             struct.error)  # fmt: skip
_AGAIN = "fetch the file again or drop the row"
_PNG = "open it in an image program and store it as PNG"
# What the first bytes of a file say it is, and what to do then. The images come first.
_IMAGES = (
    (rb"\xff\xd8\xff|\x89PNG|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|BM....\0\0\0\0|\0\0\0\x0cjP  "
     rb"|\xff\x4f\xff\x51", "an image", ""),
    (rb"....ftypavi[fs]", "an AVIF image",
     "store it as JPEG or PNG, or update Pillow: pip install -U pillow"),
    (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "a HEIC or HEIF photo",
     'store it as JPEG or PNG, or install the reader: pip install "itemkit[heic]"'),
)  # fmt: skip
_OTHERS = (
    (rb"version https://git-lfs", "a Git LFS pointer", "run 'git lfs pull'"),
    (rb"%PDF|%!PS|8BPS", "a PDF, PostScript or Photoshop document", _PNG),
    (rb"PK\x03\x04|\x1f\x8b|Rar!|7z", "an archive", "unpack it"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI", "a film", "store single pictures of it"),
    (rb"\s*<(!doctype html|html|head|script)", "a web page", "fetch the image itself"),
    (rb"\s*[<{\[]|[\t\n\r -~\x80-\xff]{8,}\Z", "plain text, JSON or SVG", "fetch the image itself"),
    (rb"", "not an image of a known format", f"store it as one of {', '.join(FORMATS)}"),
)
# What decoders say, and what that means: pattern, kind, problem, next step; the first that fits is taken.
_TROUBLES = (
    (r"data too large|memory used", "too large",
     f"its metadata is too long: texts or colour profile of over {MAX_METADATA_BYTES // 2**20} MiB",
     "store it without metadata"),
    (r"truncated|unexpected end|not enough (image )?data|premature|EOF|end of file|buffer is not large",
     "truncated", "is truncated: the end of the file is missing", _AGAIN),
    (r"unsupported|not support|cannot handle|unknown (pixel|compression|raw|mode|data org|colou?r)"
     r"|cannot load this image|conversion from|unrecognized image mode|not available|bad configuration",
     "unsupported", "is a {format} of a variant that is not read here", _PNG),
    (r"", "damaged", "is a damaged or incomplete {format}, or of a rare variant", f"{_AGAIN}, or {_PNG}"),
)  # fmt: skip


class ImageError(InputError):
    """One image (``name``) cannot be used: ``kind`` in a word for counting, ``reason`` in a sentence.

    Kinds: ``missing``, ``not a file``, ``no access``, ``empty``, ``too large``, ``not an image``,
    ``unsupported`` (sound, but not read here), ``truncated``, ``damaged``.
    """

    def __init__(self, name: str, kind: str, problem: str, step: str) -> None:
        super().__init__(name, kind, problem, step)  # all four, so that the error survives pickling
        self.name, self.kind = name, kind
        self.reason = printable(f"{name}: {problem}; {step}")

    def __str__(self) -> str:
        return self.reason


# ---- files


def read_bytes(path: str | Path) -> bytes:
    """Read a regular file (or a link to one) whole; never hangs on a pipe or a device.

    Raises an `ImageError` where it is missing, no file, not readable or over `MAX_FILE_BYTES`.
    """
    name = str(path)
    try:
        found = os.stat(name)  # before opening, which can hang or have effects
        regular, size = stat.S_ISREG(found.st_mode), found.st_size
        data = Path(name).read_bytes() if regular and size <= MAX_FILE_BYTES else b""
    except FileNotFoundError:
        raise ImageError(name, "missing", "no such file", "check the path or drop the row") from None
    except (OSError, ValueError) as error:
        problem = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
        raise ImageError(name, "no access", problem, "check path and permissions") from None
    if not regular:
        raise ImageError(name, "not a file", "is a folder, pipe or device", "name the image itself")
    if size > MAX_FILE_BYTES:
        raise ImageError(name, "too large", f"has over {MAX_FILE_BYTES:,} bytes", "store it smaller")
    return data


def content_id(data: bytes) -> str:
    """Name of an image by its content: SHA-256 of the file's bytes, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def looks_like_image(head: bytes) -> bool:
    """Whether the first bytes of a file (32 are enough) are those of an image, whatever its name is."""
    return any(re.match(pattern, head, re.DOTALL) for pattern, _, _ in _IMAGES)


# ---- decoding


def open_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Open an image by its content, whatever its extension; header only, pixels are not decoded yet.

    `source` is a path or a file's bytes, `name` what messages call it. Raises an `ImageError` as `read_bytes`
    does, and where it is no image, damaged, or of more pixels than `MAX_PIXELS` or `MAX_SIDE`.
    """
    name = name or ("image bytes" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else read_bytes(source)
    if not data:
        raise ImageError(name, "empty", "is empty (0 bytes)", _AGAIN)
    image, trouble = None, None
    # `PIL.Image.open` says "cannot identify" whatever the decoder said, and warns about sizes
    for kind in _formats():
        factory, accept = Image.OPEN[kind]
        accepted = accept is None or accept(data[:16])
        usable = accepted and not isinstance(accepted, str)  # a text says that the decoder is not built in
        if usable and image is None:
            try:
                image = factory(BytesIO(data), "")
            except MemoryError:  # the machine's trouble, not the file's
                raise
            except Exception as error:  # noqa: BLE001 - bad data can fail in any way inside a decoder
                trouble = trouble or _trouble(name, error, kind)
    if image is None:
        rows = (*_IMAGES[1:], *_OTHERS)
        row = next(row for row in rows if re.match(row[0], data[:64], re.DOTALL | re.IGNORECASE))
        word = "unsupported" if row in _IMAGES else "not an image"
        raise trouble or ImageError(name, word, f"is {row[1]}", row[2])
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
        problem = f"has {width:,} x {height:,} pixels, the limit is {MAX_PIXELS:,}, or {MAX_SIDE:,} a side"
        raise ImageError(name, "too large" if width * height else "damaged", problem, "store it smaller")
    return image


def _trouble(name: str, error: Exception, kind: str) -> ImageError:
    text = str(error)
    if text.startswith("out of memory"):  # Pillow's decoders say it with an OSError
        raise MemoryError(text) from None
    _, word, problem, step = next(row for row in _TROUBLES if re.search(row[0], text, re.IGNORECASE))
    return ImageError(name, word, problem.format(format=kind), step)


def load_image(
    source: str | Path | bytes | Image.Image, name: str | None = None, least_side: int | None = None
) -> Image.Image:
    """Decode an image to upright 8-bit sRGB.

    EXIF orientation is applied, an ICC profile converted to sRGB, 16 bits scaled to 8, CMYK and palettes
    converted, transparency laid over white, of an animation the first frame taken, and of a very long strip
    the middle (`bound_aspect`). Needs at most 8 bytes of memory per pixel beside the file.

    `source` may be what `open_image` gave. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its shorter
    side then keeps `least_side` pixels: faster, but not the pixels that decoding and resizing give.

    Raises an `ImageError` where the image cannot be used, and a `MemoryError` where there is no room for it
    now, which says nothing about the file.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "image bytes")
    image = source if isinstance(source, Image.Image) else open_image(source, name)
    try:
        if least_side is not None:
            image.draft(None, (least_side, least_side))  # does nothing to other formats
        image.load()
        with contextlib.suppress(*_BAD_EXIF):  # only the turn of the pixels is unknown
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(bound_aspect(image), name)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - OSError, SyntaxError, struct.error, KeyError, ...
        raise _trouble(name, error, image.format or "image") from None


def bound_aspect(image: Image.Image) -> Image.Image:
    """Crop the ends off a strip of over `MAX_ASPECT` times its width, to between that and 2 more.

    Encoders resize the shorter side to theirs and keep the centre square; of 20,000 x 1 pixels that would
    make gigabytes on the way. Whole multiples of the shorter side go, so that the centre square stays.
    """
    width, height = image.size
    short, long = sorted(image.size)
    cut = short * max(0, (long - MAX_ASPECT * short) // (2 * short))
    if not cut:
        return image
    return image.crop((cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut))


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Names of the decoders that are there."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    # for one broken file libtiff writes hundreds of lines to the terminal, past Python
    folder = Path(Image.__file__).parent
    found = {*folder.parent.glob("pillow.libs/libtiff*"), *folder.glob(".dylibs/libtiff*")}
    with contextlib.suppress(OSError):  # Linux: the one that is loaded, be it Pillow's own or the system's
        found |= {Path(part) for part in Path("/proc/self/maps").read_text().split() if "/libtiff" in part}
    for library in found:
        with contextlib.suppress(OSError, AttributeError):
            loaded = ctypes.CDLL(str(library))
            loaded.TIFFSetErrorHandler(None)
            loaded.TIFFSetWarningHandler(None)
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a build of Pillow may lack AVIF


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert to 8-bit sRGB in strips. Metadata stays behind: a stale profile would be written later on."""
    if image.mode.startswith(("I", "F")):
        low, high = np.ravel(image.getextrema())
        if image.mode == "F" or not 0 <= low <= high <= 65535:
            problem = f"holds numbers from {low:g} to {high:g} as pixels, of no stated range"
            raise ImageError(name, "unsupported", problem, "store it with 8 or 16 bits per channel")
    transform = _colour_transform(image)
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        result.paste(_strip_to_rgb(image.crop(box), transform), box)
    return result


def _strip_to_rgb(strip: Image.Image, transform: tuple[str, Any] | None) -> Image.Image:
    if strip.mode.startswith("I"):
        values = np.asarray(strip).astype(np.uint32)
        info, strip = strip.info, Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        strip.info = info
    if strip.mode == "La":
        strip = strip.convert("LA")
    alpha = strip.convert("RGBA") if strip.has_transparency_data else None
    if transform is not None:
        strip = strip.convert(transform[0])
        strip = ImageCms.applyTransform(strip, transform[1]) or strip  # None only if done in place
        if alpha is not None:
            strip.putalpha(alpha.getchannel("A"))
            alpha = strip
    if alpha is None:
        return strip.convert("RGB")
    # white, as most viewers have it; our choice
    return Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), alpha).convert("RGB")


def _colour_transform(image: Image.Image) -> tuple[str, Any] | None:
    """Mode and transform of the embedded colour profile; a broken or unfit one is ignored, as viewers do."""
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(image.info.get("icc_profile", b"")))  # or none
        space = profile.profile.xcolor_space.strip()
        if space == "RGB" and "srgb" in (profile.profile.profile_description or "").lower():
            return None  # already there; a round trip would only add rounding
        fits = {"RGB": ("RGB", "RGBA", "P", "PA"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",)}
        if image.mode not in fits.get(space, ()):
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        return fits[space][0], ImageCms.buildTransform(profile, srgb, fits[space][0], "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


# ---- JPEG, and one size and codec for both classes

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")


def jpeg_bytes(image: Image.Image, quality: int, subsampling: str = "4:2:0") -> bytes:
    """Encode as baseline JPEG with the standard tables at `quality` and the given chroma subsampling."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=int(quality), subsampling=subsampling)
    return buffer.getvalue()


def jpeg_quality(image: Image.Image) -> int:
    """Estimate the quality (1 to 100) of an opened JPEG: that with the nearest standard tables."""
    tables: dict[int, list[int]] = getattr(image, "quantization", {})
    if 0 not in tables:
        raise InputError(f"a {image.format or 'decoded'} image has no quantisation tables; open a JPEG file")
    found = np.concatenate([np.asarray(tables[i]) for i in (0, 1) if i in tables])  # luminance, chrominance
    return int(np.abs(_standard_tables()[:, : len(found)] - found).sum(axis=1).argmin()) + 1


@lru_cache(maxsize=1)
def _standard_tables() -> np.ndarray:
    """Luminance and chrominance tables that libjpeg writes at the qualities 1 to 100, shape (100, 128)."""
    grey = Image.new("RGB", (8, 8))
    files: Iterable[Any] = (Image.open(BytesIO(jpeg_bytes(grey, quality))) for quality in range(1, 101))
    return np.array([[*file.quantization[0], *file.quantization[1]] for file in files])


def jpeg_subsampling(image: Image.Image) -> str:
    """Chroma subsampling of an opened JPEG: one of `SUBSAMPLINGS`, ``grey`` or ``other``."""
    if len(getattr(image, "layer", ())) == 1:
        return "grey"
    code = JpegImagePlugin.get_sampling(image)
    return SUBSAMPLINGS[code] if code >= 0 else "other"


@dataclass(frozen=True)
class EqualiseConfig:
    """What both classes are brought to, so that neither size nor codec tells them apart."""

    # Side of the square in pixels; more than the smallest images have leaves traces of enlargement in them.
    size: int = 224
    codec: str = "jpeg"  # or "png"
    quality: int = 90  # of a JPEG, 1-100
    subsampling: str = "4:2:0"  # of a JPEG

    def __post_init__(self) -> None:
        limits = (("equalise size", self.size, 8, 10_000), ("JPEG quality", self.quality, 1, 100))
        for what, number, low, high in limits:
            if not low <= number <= high:
                raise InputError(f"{what} is {number}; choose {low} to {high}")
        for value, known in ((self.codec, ("jpeg", "png")), (self.subsampling, SUBSAMPLINGS)):
            if value not in known:
                raise InputError(f"equalise got {value!r}; choose {' or '.join(known)}")


def equalise(image: Image.Image, config: EqualiseConfig) -> Image.Image:
    """Crop the centre square of an RGB image, resize it and send it through the codec."""
    return load_image(equalised_bytes(image, config), name="equalised image")


def equalised_bytes(image: Image.Image, config: EqualiseConfig) -> bytes:
    """Encode the equalised image as the bytes of a file; see :func:`equalise`."""
    square = ImageOps.fit(image, (config.size, config.size), Image.Resampling.BICUBIC)
    if config.codec == "jpeg":
        return jpeg_bytes(square, config.quality, config.subsampling)
    square.save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()
