"""Images: decode anything a user has into 8-bit sRGB pixels, and bring both classes to one size and codec."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, UnidentifiedImageError

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


# Pillow's own warning bound: 256 MiB of RGB, more than any encoder here can use.
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 512 * 2**20
WHITE = (255, 255, 255)

# Only these decoders are tried: of the others that Pillow knows some start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
              ".pgm", ".jp2", ".avif")  # fmt: skip

# First bytes of what people most often find behind an image's name: (bytes, offset, name, is it readable?)
_SIGNATURES = (
    (b"\xff\xd8\xff", 0, "a JPEG", True),
    (b"\x89PNG", 0, "a PNG", True),
    (b"GIF8", 0, "a GIF", True),
    (b"WEBP", 8, "a WebP", True),
    (b"II*\0", 0, "a TIFF", True),
    (b"MM\0*", 0, "a TIFF", True),
    (b"BM", 0, "a BMP", True),
    (b"ftypheic", 4, "a HEIC photo", False),
    (b"ftypmif1", 4, "a HEIF photo", False),
    (b"version https://git-lfs", 0, "a Git LFS pointer (run 'git lfs pull')", False),
    (b"%PDF", 0, "a PDF", False),
    (b"PK\x03\x04", 0, "a zip archive", False),
    (b"<", 0, "a web page, SVG or XML", False),
    (b"{", 0, "a JSON text", False),
)


class ImageError(InputError):
    """One image cannot be used.

    Attributes
    ----------
    name : str
        The file.
    kind : str
        Short class for counting: ``missing, not a file, no access, empty, too large, unknown, truncated,
        damaged, range``.
    reason : str
        The whole sentence: file, problem, next step (also ``str(error)``).
    """

    def __init__(self, name: str, kind: str, problem: str, step: str) -> None:
        super().__init__(name, kind, problem, step)  # all four, so that the error survives pickling
        self.name, self.kind = name, kind
        self.reason = f"{name}: {problem}; {step}"

    def __str__(self) -> str:
        return self.reason


def read_bytes(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a regular file (or a link to one) whole; never hangs on a pipe or a device.

    Parameters
    ----------
    path : str or Path
    max_bytes : int
        Larger files are refused before they are read.

    Returns
    -------
    bytes

    Raises
    ------
    ImageError
        The file is missing, not a regular file, not readable, empty or too large.
    """
    name = str(path)
    try:
        # the type is looked at before opening: opening a device can already have effects
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode):
            kind = next((text for test, text in _FILE_KINDS if test(mode)), "not a regular file")
            raise ImageError(name, "not a file", f"is {kind}, not an image file", "name the image itself")
        with open(name, "rb", opener=_open_at_once) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise ImageError(name, "too large", f"has {size:,} bytes, the limit is {max_bytes:,}",
                                 "store it smaller or pass max_bytes")  # fmt: skip
            data = file.read(max_bytes)
    except FileNotFoundError:
        broken = os.path.islink(name)
        problem = f"links to {os.readlink(name)}, which does not exist" if broken else "no such file"
        raise ImageError(name, "missing", problem, "check the path or drop the row") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        loop = isinstance(error, OSError) and error.errno == errno.ELOOP
        problem = "is a link that points to itself" if loop else f"cannot be opened ({_short(error)})"
        raise ImageError(name, "no access", problem, "check path and permissions") from None
    if not data:
        raise ImageError(name, "empty", "is empty (0 bytes)", "fetch the file again or drop the row")
    return data


def content_id(data: bytes) -> str:
    """Name of an image by its content: SHA-256 of the file's bytes, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def content_hash(path: str | Path) -> str:
    """Give the content name (see `content_id`) of a file; `ImageError` where it cannot be read."""
    return content_id(read_bytes(path))


def open_image(
    source: str | Path | bytes, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open an image by its content, whatever its extension; header only, pixels are not decoded yet.

    Parameters
    ----------
    source : path, or the file's bytes
    name : str, optional
        What messages call it; default is the path.
    max_pixels : int
        A larger width x height is refused before any pixel is decoded (decompression bombs).
        Pillow itself refuses more than twice the default.

    Returns
    -------
    PIL.Image.Image
        As Pillow opens it: format, size, mode and metadata are known.

    Raises
    ------
    ImageError
        See :func:`read_bytes`; or not an image, damaged, or too many pixels.
    """
    name = name or ("image bytes" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else read_bytes(source)
    if not data:
        raise ImageError(name, "empty", "is empty (0 bytes)", "fetch the file again or drop the row")
    try:
        image = Image.open(BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        raise _unknown(name, data) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, "too large", _short(error), "store it smaller") from None
    except MemoryError:  # the machine's trouble, not the file's
        raise
    except Exception as error:  # noqa: BLE001 - bad data can fail in any way inside a decoder
        raise _damaged(name, error) from None
    if image.width * image.height > max_pixels:
        problem = f"has {image.width:,} x {image.height:,} pixels, the limit is {max_pixels:,} in all"
        raise ImageError(name, "too large", problem, "store it smaller or pass max_pixels")
    return image


def load_image(
    source: str | Path | bytes,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
    name: str | None = None,
    least_side: int | None = None,
) -> Image.Image:
    """Decode an image to upright 8-bit sRGB.

    EXIF orientation is applied, an ICC profile converted to sRGB, 16 bits scaled to 8, CMYK and palettes
    converted, transparency laid over `background`, and of an animation the first frame taken.

    Parameters
    ----------
    source : path, or the file's bytes
    max_pixels : int
        See :func:`open_image`.
    background : (red, green, blue)
        Colour behind transparent pixels; white is what most viewers show. Our choice.
    name : str, optional
        What messages call it.
    least_side : int, optional
        Decode a JPEG at 1/2, 1/4 or 1/8 of its size where its shorter side then keeps at least so many
        pixels: faster for large photographs, but other pixels than decoding and resizing give.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, without metadata.

    Raises
    ------
    ImageError
        The image cannot be used; ``str(error)`` names file, reason and next step.
    MemoryError
        There is no room for it now, which says nothing about the file.
    """
    name = name or ("image bytes" if isinstance(source, bytes) else str(source))
    image = open_image(source, name, max_pixels)
    try:
        if least_side is not None:
            image.draft(None, (least_side, least_side))  # does nothing to other formats
        image.load()
        image = _upright(image)
        if image.mode.startswith(("I", "F")):
            image = _to_8_bits(image, name)
        rgb = _flatten(_to_srgb(image), background)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - OSError, SyntaxError, struct.error, KeyError, ...
        raise _damaged(name, error) from None
    rgb.info = {}  # or a stale colour profile would be written with the converted pixels
    return rgb


@dataclass(frozen=True)
class EqualiseConfig:
    """What both classes are brought to, so that neither size nor codec tells them apart.

    Attributes
    ----------
    size : int
        Side of the square in pixels. Choose no more than the shorter side of the smallest images: an
        enlarged picture carries traces of its enlargement, which then tell the classes apart again.
    codec : {"jpeg", "png"}
    quality : int
        JPEG quality, 1-100; unused for PNG.
    subsampling : {"4:4:4", "4:2:2", "4:2:0"}
        JPEG colour resolution; unused for PNG.
    """

    size: int = 224
    codec: str = "jpeg"
    quality: int = 90
    subsampling: str = "4:2:0"

    def __post_init__(self) -> None:
        if self.size < 8:
            raise InputError(f"equalise size is {self.size} px; choose at least 8")
        if self.codec not in ("jpeg", "png"):
            raise InputError(f"equalise codec is {self.codec!r}; choose 'jpeg' or 'png'")
        if not 1 <= self.quality <= 100:
            raise InputError(f"JPEG quality is {self.quality}; choose 1 to 100")
        if self.subsampling not in SUBSAMPLINGS:
            raise InputError(f"chroma subsampling is {self.subsampling!r}; choose {', '.join(SUBSAMPLINGS)}")

    @property
    def extension(self) -> str:
        """File extension of the codec."""
        return ".jpg" if self.codec == "jpeg" else ".png"


def equalise(image: Image.Image, config: EqualiseConfig | None = None) -> Image.Image:
    """Crop the centre square, resize it and send it through the codec.

    Parameters
    ----------
    image : PIL.Image.Image, mode RGB
    config : EqualiseConfig, optional

    Returns
    -------
    PIL.Image.Image
        ``config.size`` square, as a reader of the equalised file would see it.
    """
    return load_image(equalised_bytes(image, config or EqualiseConfig()), name="equalised image")


def equalised_bytes(image: Image.Image, config: EqualiseConfig) -> bytes:
    """Encode the equalised image as the bytes of a file; see :func:`equalise`."""
    square = ImageOps.fit(image, (config.size, config.size), Image.Resampling.BICUBIC)
    if config.codec == "jpeg":
        return jpeg_bytes(square, config.quality, config.subsampling)
    buffer = BytesIO()
    square.save(buffer, "PNG")
    return buffer.getvalue()


_FILE_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # a build of Pillow may lack AVIF


def _open_at_once(path: str, flags: int) -> int:
    # should the file have become a pipe since it was looked at, opening it still returns at once
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _short(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().rstrip(".")[:160]


def _unknown(name: str, data: bytes) -> ImageError:
    kind, readable = next(
        ((k, ok) for sign, at, k, ok in _SIGNATURES if data[at:].startswith(sign)), (None, False)
    )
    if readable:
        return ImageError(name, "damaged", f"begins like {kind} but its header is truncated or damaged",
                          "fetch the file again or drop the row")  # fmt: skip
    problem = f"looks like {kind}, not an image" if kind else "is not an image in any format known here"
    return ImageError(name, "unknown", problem, f"convert it to one of {', '.join(FORMATS)}")


def _damaged(name: str, error: Exception) -> ImageError:
    if str(error).startswith("out of memory"):  # Pillow's decoders say it with an OSError
        raise MemoryError(str(error)) from None
    kind = "truncated" if "truncated" in str(error).lower() else "damaged"
    return ImageError(name, kind, f"is {kind} ({_short(error)})", "fetch the file again or drop the row")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - unreadable EXIF: the pixels are whole, only their rotation is unknown
        return image


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.max() > 65535 or values.min() < 0:
        problem = f"holds {values.dtype} values from {values.min():g} to {values.max():g}, of no stated range"
        raise ImageError(name, "range", problem, "convert it to 8 or 16 bits per channel")
    grey = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    grey.info = image.info
    return grey


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply the embedded colour profile; a broken one, or one for other pixels, is ignored, as viewers do."""
    data = image.info.get("icc_profile")
    if not data:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        if space == "RGB" and "srgb" in (profile.profile.profile_description or "").lower():
            return image  # already there; a round trip would only add rounding
        fits = {"RGB": ("RGB", "RGBA", "P", "PA"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",)}
        if image.mode not in fits.get(space, ()):
            return image
        colours = image.convert({"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[space])
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        result = ImageCms.profileToProfile(colours, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    if result is None:  # only when asked to work in place
        return image
    if image.has_transparency_data:
        result.putalpha(image.convert("RGBA").getchannel("A"))
    return result


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    backdrop = Image.new("RGBA", rgba.size, (*background, 255))
    return Image.alpha_composite(backdrop, rgba).convert("RGB")
