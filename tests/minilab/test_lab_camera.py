"""The one camera, what it hides, and the pictures that no generator made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from minilab import camera, guards, probes, sheets
from minilab.camera import CAMERA, WIDE, Camera, decode, photograph, photographs
from minilab.grammar import Facts
from minilab.renders import make_renders
from minilab.world import SIZE, Style, render, sample_scene, scene_rng

STILL = Camera((1, 1), (0, 0), (0, 0), (0.01, 0.01), (0, 0), (1e-6, 1e-6))
"""Changes nothing but tone."""


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    return make_renders("spare", 120).images


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


# ---------------------------------------------------------------------------------------------- the camera


def test_a_photograph_depends_on_its_place_in_a_stream_alone(scenes: np.ndarray) -> None:
    five = photographs(scenes[:5], (1, 2))
    np.testing.assert_array_equal(photographs(scenes[:3], (1, 2)), five[:3])
    assert (photographs(scenes[:3], (1, 3)) != five[:3]).any()
    assert five.dtype == np.uint8 and five.shape == (5, SIZE, SIZE, 3)
    # the same settings and the same noise on a picture that differs in one corner
    edited = scenes[:1].copy()
    edited[0, :8, :8] = 255 - edited[0, :8, :8]
    before, after = five[0].astype(int), photographs(edited, (1, 2))[0].astype(int)
    assert np.abs(before - after)[24:, 24:].mean() < 2 < np.abs(before - after)[:8, :8].mean()


def test_each_setting_by_hand() -> None:
    grey = np.full((1, SIZE, SIZE, 3), 128, dtype=np.uint8)

    def mean(x: np.ndarray = grey, **settings: object) -> np.ndarray:
        shot = photograph(x, rng(), replace(STILL, **settings), codec=False)  # type: ignore[arg-type]
        return shot.astype(float).mean((0, 1, 2))

    assert mean() == pytest.approx([127.9] * 3, abs=1)
    assert (mean(exposure=(0.5, 0.5)) < 0.6 * 128).all()
    red, green, blue = mean(warmth=(0.2, 0.2))
    assert red > 1.15 * green > 1.3 * blue * 0.99
    black = np.zeros_like(grey)
    black[:, : SIZE // 2] = 255
    assert mean(x=black, glare=(0.2, 0.2)) == pytest.approx(
        mean(x=black), abs=3
    )  # light moves, it is not lost
    dark = photograph(black, rng(), replace(STILL, glare=(0.2, 0.2)), codec=False)[0, -1]
    assert dark.mean() > photograph(black, rng(), STILL, codec=False)[0, -1].mean() + 15
    noisy = photograph(grey, rng(), replace(STILL, noise=(6, 6)), codec=False)
    assert noisy.std() == pytest.approx(6, rel=0.1)
    corner = photograph(grey, rng(), replace(STILL, vignette=(0.2, 0.2)), codec=False)[0]
    assert corner[0, 0].mean() < 0.75 * corner[SIZE // 2, SIZE // 2].mean()


def test_tones_are_bent_not_cut() -> None:
    x = np.linspace(0, 1, 256, dtype=np.float32)
    y = camera._tone(x, np.float32(1))
    assert (np.diff(y) > 0).all() and y[0] > 0.01 and y[-1] < 0.99
    assert y[128] == pytest.approx(0.5, abs=0.01)
    far = camera._tone(np.array([-1.0, 3.0]), np.float32(1))
    assert 0 <= far[0] and far[1] <= 1


def test_blur_keeps_light_and_spreads_a_point() -> None:
    point = np.zeros((2, 21, 21, 1), dtype=np.float32)
    point[:, 10, 10] = 1
    spread = camera._blur(point, np.array([0.01, 1.0], dtype=np.float32))
    assert spread.sum((1, 2, 3)) == pytest.approx([1, 1], abs=1e-4)
    assert spread[0, 10, 10, 0] == pytest.approx(1, abs=1e-4)
    assert spread[1, 10, 10, 0] == pytest.approx(1 / (2 * np.pi), rel=0.02)


def test_some_photographs_of_the_wide_camera_are_plain(scenes: np.ndarray) -> None:
    def spread(c: Camera) -> float:
        return float(photograph(scenes, rng(), c, codec=False).mean((1, 2, 3)).std())

    assert spread(WIDE) > 1.4 * spread(CAMERA)
    plain = photograph(scenes, rng(), replace(WIDE, share=0.0))
    np.testing.assert_array_equal(plain, photograph(scenes, rng(), replace(CAMERA, share=0.0)))


# ---------------------------------------------------------------------------------------------- the guards


def spoiled(scenes: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    """Half of the scenes as they are, half with the noise that a sampler leaves."""
    noise = np.random.default_rng(0).normal(0, 4, scenes[60:].shape)
    split = (["train"] * 35 + ["test"] * 25) * 2
    table = pd.DataFrame({"generator": ["real"] * 60 + ["noisy"] * 60, "split": split})
    return table, np.concatenate([scenes[:60], np.clip(scenes[60:] + noise, 0, 255).astype(np.uint8)])


def test_the_camera_hides_what_gives_samples_away(scenes: np.ndarray) -> None:
    table, pictures = spoiled(scenes)
    kept = ["noise level", "file bytes"]
    raw = guards.leaks(table, pictures, seeds=[0]).set_index(["guard", "classes"])["value"].loc[kept]
    assert (raw > 0.85).all()
    shots = np.concatenate([photographs(pictures[:60], (1,)), photographs(pictures[60:], (2,))])
    found = guards.leaks(table, shots, seeds=[0]).set_index(["guard", "classes"])["value"].loc[kept]
    assert found.between(0.3, 0.7).all()  # the standard error of 25 against 25 is 0.08


# ---------------------------------------------------------------------------------------------- the probes


def test_a_wrong_thing_is_all_that_differs() -> None:
    scene = sample_scene(scene_rng("test", probes.FIRST_SCENE + 1))
    at = probes.largest(scene)
    thing, plain = scene.things[at], render(scene).image.astype(int)
    for kind, change in probes.WRONG.items():
        gaps = []
        for level in probes.LEVELS:
            wrong = probes.changed(scene, change, level, rng())
            assert wrong.facts == scene.facts, "the caption stays that of the untouched scene"
            assert [t for i, t in enumerate(wrong.things) if i != at] == [
                t for i, t in enumerate(scene.things) if i != at
            ]
            gap = np.abs(render(wrong).image.astype(int) - plain).sum(-1)
            ys, xs = np.nonzero(gap > 6)  # a soft shadow has no end
            reach = 1.2 * thing.size if kind == "unlit" else thing.size / 2
            assert xs.min() >= thing.x - reach - 2 and xs.max() <= thing.x + reach + 2
            assert ys.min() >= thing.base_y - thing.size - 2
            gaps.append(gap.sum())
        assert gaps[0] < gaps[-1], f"{kind} grows with its level"


SHOWN = ("untouched", "exposure x 0.6", "exposure x 1.5")


def test_probes_share_scenes_and_noise() -> None:
    table = probes.build_probes(2)
    assert list(table) == ["generator", "split", "prompt", "image"] and set(table.split) == {"test"}
    assert list(dict.fromkeys(table.generator)) == probes.probe_names()
    assert table.groupby("generator").prompt.apply(tuple).nunique() == 1
    assert table.image.nunique() == len(table), "no probe is the untouched picture"
    scenes = [sample_scene(scene_rng("test", probes.FIRST_SCENE + k)) for k in range(2)]
    plain = photographs(np.stack([render(s).image for s in scenes]), (probes.PROBES,))
    shown = {name: np.stack([decode(file) for file in probes.probe_files(name, scenes)]) for name in SHOWN}
    np.testing.assert_array_equal(shown["untouched"], plain)
    dark, light = (shown[f"exposure x {f}"].mean() for f in (0.6, 1.5))
    assert dark < 0.75 * plain.mean() and light > 1.15 * plain.mean()


def test_styles_by_hand() -> None:
    scene = sample_scene(scene_rng("test", 3))
    plain, outlined = (render(scene, Style(outline=o)).image.astype(int) for o in (0.0, 0.8))
    assert (outlined <= plain + 1).all() and (outlined < plain - 10).any()
    rough = render(scene, Style(texture=0.1)).image.astype(int)
    assert np.abs(rough - plain).mean() > 2 and rough.mean() == pytest.approx(plain.mean(), rel=0.05)
    turned = probes.shifted(scene, probes.Shift(angle=35.0))
    assert turned.facts == scene.facts and (render(turned).image != plain).any()


# ---------------------------------------------------------------------------------------------- the sheets


def test_sheets_and_blind_names_by_hand() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    sheet = np.asarray(sheets.tile(images, columns=2, scale=3))
    assert sheet.shape == (28, 28, 3) and (sheet[:12, 14:26] == 1).all() and (sheet[14:26, :12] == 2).all()
    assert (sheet[14:, 14:] == 255).all()
    facts = [Facts((("red", "ball"), ("blue", "car")), "sand"), Facts((("pink", "mug"),), "snow")]
    found = sheets.named(["a red ball on the sand", "a pink lamp on the snow"], facts)
    assert found == {"kinds": 0.25, "colours": 0.75, "setting": 1.0, "f1": pytest.approx(1 / 3)}
