"""Decoding: any file a user may bring gives RGB pixels, or an error with file, reason and next step."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from itemkit.errors import InputError
from itemkit.images import (
    SUBSAMPLINGS,
    EqualiseConfig,
    ImageError,
    content_id,
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
    with pytest.raises(ImageError, match=r"float32 values from -3 to 7.*convert it to 8 or 16 bits") as error:
        load_image(data, name="f.tif")
    assert error.value.kind == "range"


def test_transparency_is_laid_over_the_background():
    rgba = Image.fromarray(
        np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 51]]], dtype=np.uint8), "RGBA"
    )
    data = encode(rgba, "PNG")
    assert np.asarray(load_image(data))[0].tolist() == [[255, 255, 255], [200, 0, 0], [244, 204, 204]]
    assert np.asarray(load_image(data, background=(0, 0, 0)))[0, 0].tolist() == [0, 0, 0]
    grey = encode(Image.fromarray(np.array([[[10, 0], [10, 255]]], dtype=np.uint8), "LA"), "PNG")
    assert np.asarray(load_image(grey))[0].tolist() == [[255] * 3, [10] * 3]


def test_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert np.asarray(load_image(encode(image, "PNG", transparency=0)))[0].tolist() == [
        [255] * 3,
        [0, 0, 255],
    ]
    assert np.asarray(load_image(encode(image, "PNG")))[0].tolist() == [[255, 0, 0], [0, 0, 255]]


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


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_600, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding(side):
    with pytest.raises(ImageError, match=r"^big\.png: .*store it smaller") as error:
        load_image(bomb(side, side), name="big.png")
    assert error.value.kind == "too large"


def test_max_pixels_is_the_callers_choice():
    data = encode(smooth(40, 30), "PNG")
    assert load_image(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(ImageError, match=r"has 40 x 30 pixels, the limit is 1,199 in all"):
        load_image(data, max_pixels=1199)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files(kind):
    data = encode(smooth(200, 200), kind)
    for share in (0.02, 0.5):
        with pytest.raises(ImageError, match=r"^cut: .*(truncated|damaged).*fetch the file again") as error:
            load_image(data[: max(12, int(len(data) * share))], name="cut")
        assert error.value.kind in ("truncated", "damaged")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"<!DOCTYPE html><html>404</html>", "looks like a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b'{"error": "rate limit"}', "JSON"),
        (b"%PDF-1.7 ....", "a PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"just some words", "not an image in any format known here"),
    ],
)
def test_what_is_not_an_image_is_named(data, says):
    with pytest.raises(ImageError, match=says) as error:
        load_image(data, name="x.jpg")
    assert error.value.kind == "unknown" and "convert it to one of JPEG" in error.value.reason


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow comments on broken tags
def test_random_bytes_never_escape_as_another_error():
    rng = np.random.default_rng(0)
    good = [
        encode(smooth(), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "JPEG2000")
    ]
    for data in good:
        for _ in range(30):
            bad = bytearray(data)
            for position in rng.integers(0, len(bad), 8):
                bad[position] = rng.integers(256)
            try:
                load_image(bytes(bad))
            except ImageError:
                pass


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
        "gone.png": ("missing", "links to .*nowhere.png, which does not exist"),
        "loop.png": ("no access", "a link that points to itself"),
        ".": ("not a file", "is a folder, not an image file"),
        "a\0b": ("no access", "cannot be opened"),
        "x" * 300: ("no access", "cannot be opened"),
    }
    for name, (kind, says) in cases.items():
        with pytest.raises(ImageError, match=says) as error:
            load_image(f"{tmp_path}/{name}")
        assert error.value.kind == kind and error.value.reason.startswith(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_file_without_permission(tmp_path):
    path = tmp_path / "locked.png"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        read_bytes(path)


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
    assert "is a named pipe" in done.stdout and "is a device" in done.stdout, done


def test_file_size_is_bounded(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ImageError, match="has 100 bytes, the limit is 99"):
        read_bytes(path, max_bytes=99)


def test_errors_survive_pickling_and_are_input_errors():
    error = pickle.loads(pickle.dumps(ImageError("a.png", "empty", "is empty", "drop it")))
    assert isinstance(error, InputError) and str(error) == error.reason == "a.png: is empty; drop it"


NO_MEMORY = (MemoryError(), OSError("out of memory error when reading image file"))


@pytest.mark.parametrize(
    ("where", "error"),
    [
        *(("PIL.Image.open", error) for error in NO_MEMORY),
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


def test_text_bombs_in_a_png_are_refused_or_ignored():
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "a" * 50_000_000, zip=True)
    try:
        assert load_image(encode(smooth(), "PNG", pnginfo=info)).size == (40, 30)
    except ImageError as error:
        assert "damaged" in str(error)


def test_content_id_is_sha256():
    assert content_id(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# ---- JPEG settings and the equaliser


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 90, 100])
def test_jpeg_quality_and_subsampling_are_read_back(quality):
    for subsampling in SUBSAMPLINGS:
        image = open_image(jpeg_bytes(smooth(), quality, subsampling))
        assert jpeg_quality(image) == quality and jpeg_subsampling(image) == subsampling
    grey = open_image(encode(smooth().convert("L"), "JPEG", quality=quality))
    assert jpeg_quality(grey) == quality and jpeg_subsampling(grey) == "grey"


def test_jpeg_quality_of_foreign_tables_is_the_nearest():
    tables = [
        [min(255, value + 1) for value in t]
        for t in open_image(jpeg_bytes(smooth(), 80)).quantization.values()
    ]
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


@pytest.mark.parametrize(
    ("options", "says"),
    [({"size": 4}, "at least 8"), ({"codec": "gif"}, "'jpeg' or 'png'"), ({"quality": 0}, "1 to 100"),
     ({"subsampling": "4:1:1"}, "4:4:4, 4:2:2, 4:2:0")],
)  # fmt: skip
def test_equalise_config_is_checked(options, says):
    with pytest.raises(InputError, match=says):
        EqualiseConfig(**options)
