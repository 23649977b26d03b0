"""What is known of the images of the laboratory: which render is behind them, and where its things are."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from itemkit.errors import InputError
from itemkit.images import content_id
from itemkit.presets import mini_folder
from minilab import truth
from minilab.grammar import Facts, caption
from minilab.renders import GROUND


def images(name: str, generator: str, n: int = 4) -> pd.DataFrame:
    table = pd.read_parquet(mini_folder() / f"{name}.parquet")
    table = table[(table["generator"] == generator) & (table["split"] == "test")].tail(n)
    return table.assign(image_id=table["image"].map(content_id))


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def edits() -> tuple[pd.DataFrame, list]:
    table = images("fakes", "edit")
    return table, truth.originals(table["image_id"])


def test_the_render_behind_a_real_image_shows_what_the_image_shows() -> None:
    table = images("reals", "real")
    found = truth.originals(table["image_id"])
    for original, prompt, data in zip(found, table["prompt"], table["image"], strict=True):
        assert caption(original.facts) == prompt
        assert not original.redrawn.any()
        assert (original.image == decode(data)).all()


def test_an_edit_differs_from_its_render_where_it_was_redrawn(edits) -> None:
    table, found = edits
    for original, data in zip(found, table["image"], strict=True):
        off = np.abs(decode(data) - original.image).mean(axis=2)
        square = original.redrawn
        assert 0 < square.mean() < 0.9
        assert off[square].mean() > 2 * off[~square].mean()
        things = [original.mask(f"a {colour} {kind}") for colour, kind in original.facts.things]
        assert any(square[thing].all() for thing in things if thing.any())


def test_samples_and_strangers_have_no_original(edits) -> None:
    table, found = edits
    sample = images("fakes", "flow", 1)["image_id"].iloc[0]
    answers = truth.originals([sample, table["image_id"].iloc[0], "none"])
    assert [answer is None for answer in answers] == [True, False, True]
    assert (answers[1].image == found[0].image).all()


def test_a_phrase_finds_its_thing_by_kind_and_colour() -> None:
    owner = np.zeros((6, 6), np.uint8)
    owner[3:] = GROUND
    owner[0, 0], owner[4, 1:3], owner[5, 5] = 1, 2, 3
    facts = Facts((("red", "ball"), ("blue", "ball"), ("blue", "cube")), "sand")
    original = truth.Original(np.zeros((6, 6, 3), np.uint8), owner, facts, np.zeros((6, 6), bool))
    assert (original.mask("a red ball") == (owner == 1)).all()
    assert (original.mask("ball") == (owner == 2)).all()  # of two the one that shows most
    assert (original.mask("Blue cube") == (owner == 3)).all()
    assert (original.mask("the sand") == (owner == GROUND)).all()
    for absent in ("a green ball", "the snow", "a ballroom", ""):
        assert not original.mask(absent).any()


def test_images_of_another_world_are_refused(monkeypatch) -> None:
    table = images("reals", "real", 1)
    monkeypatch.setattr(truth, "caption", lambda facts: "a red ball on the moon")
    with pytest.raises(InputError, match="is 'a red ball on the moon', the image made of it shows '"):
        truth.originals(table["image_id"])
