"""Decoding: any file a user may bring gives RGB pixels, or an error with file, reason and next step."""

from __future__ import annotations

import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from itemkit import images
from itemkit.errors import InputError
from itemkit.images import (
    SUBSAMPLINGS,
    EqualiseConfig,
    ImageError,
    bound_aspect,
    equalise,
    equalised_bytes,
    jpeg_bytes,
    jpeg_quality,
    jpeg_subsampling,
    load_image,
    open_image,
    read_bytes,
)


def smooth(width=40, height=30, seed=0) -> Image.Image:
    """A picture with soft structure, so that lossy codecs stay close to it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def distance(a, b) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG", "JPEG2000", "AVIF", "GIF"])
def test_formats_decode_by_content_whatever_the_name_says(tmp_path, kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind in ("JPEG", "AVIF") else {}
    path = tmp_path / "wrongly_named.jpg"
    path.write_bytes(encode(smooth(), kind, **options))
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (40, 30) and not image.info
    exact = kind in ("PNG", "BMP", "TIFF", "PPM", "WEBP")
    assert distance(image, smooth()) <= (0 if exact else 12)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = load_image(encode(Image.fromarray(values), "PNG"))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_values_without_a_stated_range_are_refused():
    data = encode(Image.fromarray(np.linspace(-3, 7, 12, dtype=np.float32).reshape(3, 4)), "TIFF")
    with pytest.raises(ImageError, match=r"numbers from -3 to 7 .*store it with 8 or 16 bits") as error:
        load_image(data, name="f.tif")
    assert error.value.kind == "unsupported"


def test_transparency_is_laid_over_white():
    rgba = Image.fromarray(
        np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 51]]], dtype=np.uint8), "RGBA"
    )
    data = encode(rgba, "PNG")
    assert np.asarray(load_image(data))[0].tolist() == [[255, 255, 255], [200, 0, 0], [244, 204, 204]]
    grey = encode(Image.fromarray(np.array([[[10, 0], [10, 255]]], dtype=np.uint8), "LA"), "PNG")
    assert np.asarray(load_image(grey))[0].tolist() == [[255] * 3, [10] * 3]


def test_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for options, first in (({"transparency": 0}, [255] * 3), ({}, [255, 0, 0])):
        assert np.asarray(load_image(encode(image, "PNG", **options)))[0].tolist() == [first, [0, 0, 255]]


def test_cmyk_and_one_bit():
    cmyk = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert np.asarray(cmyk)[0, 0].tolist() == [255, 0, 0]
    assert distance(load_image(encode(smooth().convert("CMYK"), "JPEG", quality=95)), smooth()) < 8
    assert np.asarray(load_image(encode(Image.new("1", (3, 3), 1), "PNG"))).min() == 255


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 6), c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert distance(load_image(data), frames[0]) < 3, kind


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the top row of the picture is the right-hand column of the stored one
    image = load_image(encode(smooth(), "PNG", exif=exif))
    assert image.size == (30, 40)
    assert distance(image, smooth().transpose(Image.Transpose.ROTATE_270)) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow comments on broken tags
def test_broken_exif_does_not_lose_the_image():
    assert load_image(encode(smooth(), "PNG", exif=b"Exif\0\0II*\0garbage")).size == (40, 30)


def test_colour_profile_is_converted_to_srgb_and_a_broken_one_ignored():
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert distance(load_image(encode(smooth(), "PNG", icc_profile=lab_like)), smooth()) == 0
    assert distance(load_image(encode(smooth(), "PNG", icc_profile=b"not a profile")), smooth()) == 0
    # a profile whose red and blue primaries are exchanged: the conversion exchanges the channels
    swapped = load_image(encode(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", icc_profile=_swap(lab_like)))
    assert np.asarray(swapped)[0, 0].tolist() == [0, 0, 255]


def _swap(profile: bytes) -> bytes:
    """Exchange the tags of the red and the blue primary, and the profile's name."""
    swapped = profile.replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
    return swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(
        b"sRGB built", b"swap built"
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, *more: bytes, pixels: bytes | None = None, bits: int = 8) -> bytes:
    """A PNG of a few bytes, which may claim to be huge, with further chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    pixels = zlib.compress(bytes((3 * width + 1) * height)) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + b"".join((header, *more, chunk(b"IDAT", pixels), chunk(b"IEND", b"")))


def texts(n_bytes: int) -> dict[str, bytes]:
    """The kinds of chunk in which a text or a colour profile is stored compressed."""
    data = zlib.compress(b"a" * n_bytes)
    return {
        "zTXt": chunk(b"zTXt", b"prompt\0\0" + data),
        "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + data),
        "iCCP": chunk(b"iCCP", b"profile\0\0" + data),
    }


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_long_text_or_profile_does_not_cost_the_pixels(kind, behind):
    data = png(4, 4, texts(3 * 2**20)[kind])
    if behind and kind != "iCCP":  # behind the pixels
        data = png(4, 4)[:-12] + texts(3 * 2**20)[kind] + chunk(b"IEND", b"")
    assert load_image(data).size == (4, 4)


def test_metadata_without_end_is_called_that():
    more = {kind: [data] for kind, data in texts(80 * 2**20).items()} | {"many": [texts(2**23)["zTXt"]] * 9}
    for kind, chunks in more.items():
        with pytest.raises(ImageError, match=r"its metadata is too long: .*64 MiB; store it") as error:
            load_image(png(4, 4, *chunks), name=kind)
        assert error.value.kind == "too large"


def test_a_thin_strip_is_cropped_and_its_centre_square_stays():
    rng = np.random.default_rng(0)
    for width, height in ((1400, 3), (3, 1400), (20_000, 1)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        strip = load_image(encode(Image.fromarray(pixels), "PNG"))
        assert 16 <= max(strip.size) / min(strip.size) <= 18

        def centre(image: Image.Image) -> bytes:
            scale = 24 / min(image.size)
            image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
            left, top = ((side - 24) // 2 for side in image.size)
            return image.crop((left, top, left + 24, top + 24)).tobytes()

        assert centre(strip) == centre(Image.fromarray(pixels))
    same = smooth(320, 20)
    assert bound_aspect(same) is same


def test_a_large_image_with_alpha_takes_eight_bytes_a_pixel(tmp_path):
    Image.new("RGBA", (4000, 4000), (9, 8, 7, 100)).save(tmp_path / "a.png")
    code = (
        "import resource, sys; from itemkit.images import load_image; peak = lambda: "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); load_image(sys.argv[1]); print((peak() - before) / 16e6)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert float(done.stdout) < 11, done


# ---- sixty broken files


def broken() -> dict[str, bytes]:
    rng, files = np.random.default_rng(0), {}
    noise = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    kinds = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "JPEG2000", "AVIF")
    good = {kind: encode(noise, kind) for kind in kinds}
    good |= {f"TIFF {c}": encode(noise, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "jpeg")}
    for kind, data in good.items():
        for share in (0.03, 0.4, 0.9):
            files[f"{kind} cut at {share}"] = data[: max(12, int(share * len(data)))]
        bad = bytearray(data)
        for position in rng.integers(30, len(bad), 40):
            bad[position] ^= 0xFF
        files[f"{kind} with flipped bytes"] = bytes(bad)
    jpeg = good["JPEG"]
    return files | {
        "jpeg of 12 bits": jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        "lossless jpeg": jpeg.replace(b"\xff\xc0", b"\xff\xc3"),
        "bmp of 2 bits": good["BMP"][:28] + b"\2" + good["BMP"][29:],
        "bmp of unknown compression": good["BMP"][:30] + b"\x63" + good["BMP"][31:],
        "png of 3 bits": png(4, 4, bits=3),
        "bomb": png(60_000, 60_000, pixels=b"x"),
        "strip": png(89_000_000, 1, pixels=b"x"),
        "tall strip": png(1, 400_000, pixels=b"x"),
        "ppm bomb": b"P6 99999 99999 255\n",
        "nothing wide": png(0, 5, pixels=b"x"),
        "float": encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
        "negative": encode(Image.fromarray(np.array([[-5, 3]], np.int32)), "TIFF"),
        "page": b"<!DOCTYPE html><html>404</html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "json": b'{"error": "rate limit"}',
        "pdf": b"%PDF-1.7 ....",
        "zip": b"PK\3\4....",
        "film": b"\0\0\0\x18ftypmp42\0\0\0\0",
        "words": b"just some words",
        "zeros": bytes(1000),
        "noise": rng.bytes(1000),
        "empty": b"",
    }


JARGON = "decoder error|cannot load this image|max_pixels|broken data stream|not identified|Traceback|None"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow comments on broken tags
def test_sixty_broken_files_give_an_image_or_a_reason_in_plain_words(capfd):
    files = broken()
    assert len(files) >= 60
    kinds = {}
    for name, data in files.items():
        begun = time.process_time()
        try:
            image = load_image(data, name=name)
            assert image.mode == "RGB" and "flipped" in name, name
        except ImageError as error:
            kinds[name] = error.kind
            assert error.reason.startswith(f"{name}: ") and "; " in error.reason
            assert not re.search(JARGON, error.reason), error.reason
        assert time.process_time() - begun < 2, name
    assert capfd.readouterr().err == "", "a library wrote to the terminal"
    expected = {
        "not an image": "page pointer json pdf zip film words zeros noise",
        "too large": "bomb, strip, tall strip, ppm bomb",
        "unsupported": "jpeg of 12 bits, bmp of 2 bits, bmp of unknown compression, float, negative",
        "truncated": ", ".join(
            f"{kind} cut at {s}" for kind in ("PNG", "JPEG", "BMP") for s in (0.03, 0.4, 0.9)
        ),
        "empty": "empty",
    }
    for kind, names in expected.items():
        for name in names.split(", " if "," in names else " "):
            assert kinds[name] == kind, name
    for name in kinds:
        if "cut" in name:
            assert kinds[name] in ("truncated", "damaged"), name


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"<!DOCTYPE html><html>404</html>", "is a web page; fetch the image itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run 'git lfs pull'"),
        (b"just some words", "is plain text"),
        (b"\0\1\2\3", "is not an image of a known format; store it as one of JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", r'HEIC or HEIF photo.*pip install "itemkit\[heic\]"'),
    ],
)
def test_what_is_not_read_is_named(data, says, monkeypatch):
    without = tuple(kind for kind in images._formats() if kind != "HEIF")
    monkeypatch.setattr(images, "_formats", lambda: without)
    with pytest.raises(ImageError, match=says):
        load_image(data, name="x.jpg")


def test_names_that_are_not_utf8_have_printable_reasons(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b.png")
    with pytest.raises(ImageError) as error:
        load_image(path)
    assert r"caf\udce9\x1b.png: no such file" in error.value.reason and error.value.reason.encode()
    Path(path).write_bytes(encode(smooth(), "PNG"))
    assert load_image(path).size == (40, 30)


def test_empty_missing_folder_and_links(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "good.png").write_bytes(encode(smooth(), "PNG"))
    (tmp_path / "link.png").symlink_to(tmp_path / "good.png")
    assert load_image(tmp_path / "link.png").size == (40, 30)
    cases = {
        "empty.png": ("empty", "0 bytes"),
        "none.png": ("missing", "no such file; check the path or drop the row"),
        "gone.png": ("missing", "no such file"),
        "loop.png": ("no access", "cannot be opened .*links"),
        ".": ("not a file", "is a folder, pipe or device"),
        "a\0b": ("no access", "cannot be opened"),
        "x" * 300: ("no access", "cannot be opened"),
    }
    for name, (kind, says) in cases.items():
        with pytest.raises(ImageError, match=says) as error:
            load_image(f"{tmp_path}/{name}")
        assert error.value.kind == kind and error.value.reason.startswith(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    code = (
        "import sys; from itemkit.images import load_image, ImageError\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_image(path)\n"
        "    except ImageError as e: print(e.kind, '|', e)"
    )
    done = subprocess.run(  # in a process of its own: a hang must fail this test, not stop the others
        [sys.executable, "-c", code, str(tmp_path / "pipe.jpg"), "/dev/zero"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.count("not a file") == 2, done


def test_file_size_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 100)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 99)
    with pytest.raises(ImageError, match="has over 99 bytes; store it smaller"):
        read_bytes(path)


def test_errors_survive_pickling_and_are_input_errors():
    error = pickle.loads(pickle.dumps(ImageError("a.png", "empty", "is empty", "drop it")))
    assert isinstance(error, InputError) and str(error) == error.reason == "a.png: is empty; drop it"


NO_MEMORY = (MemoryError(), OSError("out of memory error when reading image file"))


@pytest.mark.parametrize(
    ("where", "error"),
    [
        *(("PIL.PngImagePlugin.PngImageFile._open", error) for error in NO_MEMORY),
        *(("PIL.ImageFile.ImageFile.load", error) for error in NO_MEMORY),
        ("PIL.ImageOps.exif_transpose", MemoryError()),
    ],
)
def test_no_memory_now_is_not_a_damaged_file(monkeypatch, where, error):
    def fail(*args, **options):
        raise error

    data = encode(smooth(), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(MemoryError):
            load_image(data)
    assert load_image(data).size == (40, 30)


# ---- JPEG settings and the equaliser


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 90, 100])
def test_jpeg_quality_and_subsampling_are_read_back(quality):
    for subsampling in SUBSAMPLINGS:
        image = open_image(jpeg_bytes(smooth(), quality, subsampling))
        assert jpeg_quality(image) == quality and jpeg_subsampling(image) == subsampling
    grey = open_image(encode(smooth().convert("L"), "JPEG", quality=quality))
    assert jpeg_quality(grey) == quality and jpeg_subsampling(grey) == "grey"


def test_jpeg_quality_of_foreign_tables_is_the_nearest():
    standard = open_image(jpeg_bytes(smooth(), 80)).quantization.values()
    tables = [[min(255, value + 1) for value in table] for table in standard]
    image = open_image(encode(smooth(), "JPEG", qtables=tables))
    assert abs(jpeg_quality(image) - 80) <= 3
    with pytest.raises(InputError, match="a PNG image has no quantisation tables"):
        jpeg_quality(open_image(encode(smooth(), "PNG")))


@pytest.mark.parametrize("size", [(40, 30), (30, 90), (24, 24), (300, 17)])
def test_equalised_files_have_one_size_and_codec(size):
    config = EqualiseConfig(size=24, quality=83, subsampling="4:2:0")
    file = open_image(equalised_bytes(smooth(*size), config))
    assert file.size == (24, 24) and file.format == "JPEG"
    assert jpeg_quality(file) == 83 and jpeg_subsampling(file) == "4:2:0"
    again = equalise(smooth(*size), config)
    assert distance(again, load_image(equalised_bytes(smooth(*size), config))) == 0


def test_equalise_crops_the_centre_and_png_is_exact():
    image = Image.new("RGB", (90, 30), "red")
    image.paste((0, 0, 255), (30, 0, 60, 30))
    centre = equalise(image, EqualiseConfig(size=30, codec="png"))
    assert np.asarray(centre).reshape(-1, 3).tolist() == [[0, 0, 255]] * 900
    assert distance(equalise(smooth(30, 30), EqualiseConfig(size=30, codec="png")), smooth(30, 30)) == 0
