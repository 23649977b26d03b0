"""Perturbations: applied at the strength their name says, repeatable, the identity at strength 0."""

from __future__ import annotations

import pickle
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from itemkit import perturb
from itemkit.errors import InputError
from itemkit.images import jpeg_bytes, jpeg_quality, load_image
from itemkit.perturb import GRID, get_perturbation, grid_for


def picture(size=64, seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def test_names_are_unique_and_found():
    assert len({p.name for p in GRID}) == len({str(p.fingerprint()) for p in GRID}) == len(GRID)
    assert all(get_perturbation(p.name) is p for p in GRID)
    assert get_perturbation("jpeg_q50").setting == "q 50"
    assert {p.family for p in GRID} == {
        "clean", "jpeg", "webp", "blur", "noise", "resize", "resize_px", "crop", "chain",
    }  # fmt: skip


def test_strength_ascends_within_a_family():
    for family in {p.family for p in GRID}:
        strengths = [p.strength for p in GRID if p.family == family]
        assert strengths == sorted(strengths) and len(set(strengths)) == len(strengths)


def test_a_grid_fits_the_size_of_the_pictures():
    names = {side: [p.name for p in grid_for(side)] for side in (48, 100, 128, 4000)}
    assert names[4000] == [p.name for p in GRID]
    assert {p.name for p in GRID} - {*names[48]} == {
        "jpeg_q30",
        "resize_x0.25",
        "resize_112px",
        "resize_64px",
    }
    assert "resize_64px" in names[100] and "resize_112px" not in names[100]
    assert "jpeg_q30" in names[128] and {"social", "resize_x0.75+jpeg_q75"} <= {*names[48]}


@pytest.mark.parametrize("p", GRID, ids=lambda p: p.name)
def test_same_image_same_result_and_rgb(p):
    image = picture(48)
    before = image.tobytes()
    first, second = p(image, "an id"), pickle.loads(pickle.dumps(p))(image, "an id")
    assert first.tobytes() == second.tobytes() and first.mode == "RGB" and min(first.size) >= 8
    assert image.tobytes() == before, "the input was changed"


@pytest.mark.parametrize(
    "p",
    [
        perturb.CLEAN,
        perturb.blur(0),
        perturb.blur_share(0),
        perturb.noise(0),
        perturb.resize(1),
        perturb.crop(1),
    ],
)
def test_strength_zero_is_the_identity(p):
    assert p.strength == 0 and p(picture(), "x").tobytes() == picture().tobytes()


@pytest.mark.parametrize("quality", [95, 75, 30])
def test_jpeg_applies_its_quality(quality, monkeypatch):
    written = []

    def spy(*args):
        written.append(jpeg_bytes(*args))
        return written[-1]

    monkeypatch.setattr(perturb, "jpeg_bytes", spy)
    out = perturb.jpeg(quality)(picture(), "x")
    assert jpeg_quality(Image.open(BytesIO(written[0]))) == quality  # from the quantisation tables
    assert out.tobytes() == load_image(written[0]).tobytes()


def test_noise_has_the_stated_deviation_and_is_the_images_own():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    for std in (2, 5, 20):
        noisy = pixels(perturb.noise(std)(grey, "a")) - 128
        assert abs(noisy.mean()) < 0.1 * std
        assert noisy.std() == pytest.approx(
            np.sqrt(std**2 + 1 / 12), rel=0.02
        )  # 1/12: rounding to whole numbers
    assert perturb.noise(5)(grey, "a").tobytes() != perturb.noise(5)(grey, "b").tobytes()


def test_blur_has_the_stated_sigma():
    point = Image.new("RGB", (61, 61))
    point.putpixel((30, 30), (255, 255, 255))
    for sigma in (2, 3):
        weight = pixels(perturb.blur(sigma)(point, "x"))[:, :, 0].sum(axis=0)
        spread = np.sqrt((weight * (np.arange(61) - 30) ** 2).sum() / weight.sum())
        assert spread == pytest.approx(sigma, rel=0.2)  # 8-bit rounding cuts the tails


def test_blur_goes_by_the_side_of_the_picture():
    for size, sigma in ((100, 1), (400, 4)):
        assert (
            perturb.blur_share(1)(picture(size), "x").tobytes()
            == perturb.blur(sigma)(picture(size), "x").tobytes()
        )
    wide = picture(100).resize((300, 100))
    assert perturb.blur_share(2)(wide, "x").tobytes() == perturb.blur(2)(wide, "x").tobytes()


def test_sizes():
    image = Image.new("RGB", (400, 200))
    assert perturb.resize(0.25)(image, "x").size == (100, 50)
    assert perturb.resize_px(64)(image, "x").size == (128, 64)
    assert perturb.crop(0.75)(image, "x").size == (300, 150)
    small = Image.new("RGB", (48, 48))
    assert perturb.resize_px(64)(small, "x") is small  # never enlarged
    assert perturb.resize(0.05)(small, "x").size == (8, 8)
    assert perturb.resize(0.5)(Image.new("RGB", (6, 100)), "x").size == (6, 50)


def test_a_chain_is_its_parts_in_order():
    p = perturb.chain(perturb.resize(0.5), perturb.jpeg(60))
    by_hand = perturb.jpeg(60)(perturb.resize(0.5)(picture(), "x"), "x")
    assert p(picture(), "x").tobytes() == by_hand.tobytes() and p.name == "resize_x0.5+jpeg_q60"


def test_social_differs_between_images():
    social = get_perturbation("social")
    assert len({social(picture(200), f"id{i}").size for i in range(5)}) > 1


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(InputError, match="no perturbation 'jpeg_q51'; Did you mean 'jpeg_q"):
        get_perturbation("jpeg_q51")
