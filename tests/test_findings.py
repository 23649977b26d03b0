"""Hardest images, phrases that betray, captions compared: each against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import itemkit
from itemkit.calibrate import proportion_interval
from itemkit.detector import Detector
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.findings import TAGS, by_phrase, compare_captions, hardest, slices
from itemkit.head import MisalignmentMLP

from synthetic import make_features


def with_cosines(cosine: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of unit vectors with these cosines."""
    c = np.array(cosine, np.float32)
    return np.stack([c, np.sqrt(1 - c**2)], axis=1), np.tile(np.float32([1, 0]), (len(c), 1))


def by_hand(labels: list[int], whole: list[float], local: list[float], phrases: list[str]) -> Features:
    """An image of each label, with one object in it."""
    names = {"image_id": [f"i{i}" for i in range(len(labels))], "path": "x.png", "caption": "a caption"}
    table = pd.DataFrame(names | {"label": labels, "generator": ["real", "toy"][0], "n_objects": 1})
    image, caption = with_cosines(whole)
    region, phrase = with_cosines(local)
    objects = pd.DataFrame({"phrase": phrases, "found": True})
    return Features(table, image, caption, region, phrase, np.arange(len(labels)), objects)


BALLS = [0.9, 0.8, 0.4, 0.5, 0.3, 0.2]  # of three real images, then of three fakes


def test_phrases_that_betray_by_hand() -> None:
    phrases = ["a red ball", "the ball", "A red ball", "a red ball", "a ball", "a red ball"]
    features = by_hand([0, 0, 0, 1, 1, 1], BALLS, BALLS, phrases)
    table = by_phrase(features, head=True, least=3)
    row = table.iloc[0]
    # of nine pairs of a real and a fake the real one has the higher cosine in eight
    assert row["phrase"] == "ball" and row["auroc"] == pytest.approx(8 / 9)
    assert (row["n_real"], row["n_fake"], row["low"] < 8 / 9 < row["high"]) == (3, 3, True)
    assert row[["real", "fake"]].tolist() == pytest.approx([0.8, 0.3])
    single = by_phrase(features, least=2).set_index("phrase")
    assert single.loc["a red ball", ["n_real", "n_fake"]].tolist() == [2, 2]
    assert single["auroc"].notna().to_dict() == {"a red ball": True, "a ball": False, "the ball": False}
    assert by_phrase(features)["auroc"].isna().all()  # too few by default, and still listed
    features.objects.loc[0, "found"] = False
    assert by_phrase(features, head=True)["n_real"].tolist() == [2]
    assert by_phrase(features.select(np.zeros(6, bool))).empty


def test_captions_compared_by_hand() -> None:
    a = by_hand([0, 0, 0, 1, 1, 1], BALLS, BALLS, ["x"] * 6)
    better = by_hand([0, 0, 0, 1, 1, 1], [0.9, 0.8, 0.6, 0.4, 0.3, 0.2], BALLS, ["x"] * 6)
    table = compare_captions(a, better.select(np.arange(5, -1, -1))).set_index(["measure", "of"])
    numbers = ["n", "a", "b", "difference"]
    assert table.loc[("global_cosine", "real"), numbers].tolist() == pytest.approx([3, 0.7, 2.3 / 3, 0.2 / 3])
    assert table.loc[("global_cosine", "fake"), "difference"] == pytest.approx(-0.1 / 3)
    assert table.loc[("global_cosine", "auroc"), numbers].tolist() == pytest.approx([6, 8 / 9, 1, 1 / 9])
    # each image's difference is 0, 0 or 0.2: so is the mean of any resample, three times
    assert table.loc[("global_cosine", "real"), ["low", "high"]].tolist() == pytest.approx([0, 0.2])
    assert (table.loc["mean_local_cosine", ["difference", "low", "high"]] == 0).all(axis=None)
    reals = compare_captions(a.select([0, 1, 2]), better.select([0, 1, 2]))
    assert set(reals["of"]) == {"real"}


def test_captions_that_cannot_be_compared() -> None:
    a = by_hand([0, 1], [0.5, 0.5], [0.5, 0.5], ["x", "x"])
    with pytest.warns(UserWarning, match="1 image that only one set has"):
        compare_captions(a, a.select([0]))
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no image in common"):
        compare_captions(a.select([1]), a.select([0]))
    again = replace(a, table=a.table.assign(image_id="i0"))
    with pytest.raises(InputError, match="i0 comes several times"):
        compare_captions(a, again)
    other = replace(a, run={"fingerprint": {"encoder": {"name": "other"}}})
    with pytest.raises(InputError, match="two encoders cannot be compared: name: nothing there, 'other'"):
        compare_captions(a, other)


@pytest.fixture(scope="module")
def judged() -> tuple[Features, Detector]:
    features = make_features(n_real=400, n_fake=200)
    detector = Detector(head=MisalignmentMLP(members=1, max_epochs=20, device="cpu"))
    return features.split("test"), detector.fit(features.split("train"), features.split("val"))


def test_the_hardest_images_are_those_farthest_on_the_wrong_side(judged: tuple[Features, Detector]) -> None:
    test, detector = judged
    table = hardest(test, detector, 5)
    assert table["label"].tolist() == [0] * 5 + [1] * 5
    p = pd.Series(detector.score(test), test.table["image_id"])
    reals, fakes = p[test.labels == 0], p[test.labels == 1]
    assert table["image_id"].tolist() == [*reals.nlargest(5).index, *fakes.nsmallest(5).index]
    assert table["p_fake"].tolist() == pytest.approx(p[table["image_id"]].tolist())
    # an image is wrong exactly where the threshold says so
    every = hardest(test, detector, len(test)).set_index("image_id").loc[test.table["image_id"]]
    called = detector.decision_function(test) > detector.threshold(0.05).value
    assert ((every["margin"] < 0).to_numpy() == (called != (test.labels == 1))).all()
    owners = test.table["image_id"].iloc[test.owner].to_numpy()
    named = every[every["phrase"].notna()]
    assert all(phrase in set(test.objects["phrase"][owners == i]) for i, phrase in named["phrase"].items())
    assert set(every.index[every["phrase"].isna()]) == set(
        test.table["image_id"][test.table["n_objects"] == 0]
    )


def test_the_nearest_to_the_threshold_and_rates_that_cannot_be_promised(judged) -> None:
    test, detector = judged
    near = hardest(test, detector, 3, by="unsure")
    every = hardest(test, detector, len(test))
    for label, rows in near.groupby("label"):
        mine = every.loc[every["label"] == label, "margin"].abs()
        assert rows["margin"].abs().tolist() == pytest.approx(mine.nsmallest(3).tolist())
    rough = hardest(test, detector, len(test), fpr=0.0001)  # p(fake) = 1/2 takes the threshold's place
    assert ((rough["margin"] < 0) == ((rough["p_fake"] > 0.5) != (rough["label"] == 1))).all()
    one = hardest(test.select(test.labels == 1), detector, 3)
    assert one["label"].tolist() == [1] * 3
    with pytest.raises(InputError, match="expected 'wrong' or 'unsure'"):
        hardest(test, detector, by="nearest")


def test_slices_by_hand(judged: tuple[Features, Detector]) -> None:
    test, detector = judged
    scores, y = detector.decision_function(test), test.labels
    sides = pd.DataFrame({"width": 300, "height": [100, 300] * (len(test) // 2)}, dtype=object)
    tags = np.where(np.arange(len(test)) % 5 == 0, "Text; face", np.where(y == 1, "face", None))
    tagged = replace(test, table=test.table.assign(**sides, tags=tags))
    table = slices(tagged, detector).set_index("part")
    bare = (test.table["n_objects"] == 0).to_numpy()
    small, text = np.arange(len(test)) % 2 == 0, np.arange(len(test)) % 5 == 0
    every = np.ones(len(test), bool)
    expected = {"all": every, "caption names no object": bare, "shorter side below 224 px": small}
    expected |= {"tag: face": text | (y == 1), "tag: text": text}
    assert list(table.index) == list(expected)
    cut = detector.threshold(0.05).value
    for part, mine in expected.items():
        real, fake = (scores[mine & (y == label)] for label in (0, 1))
        row = table.loc[part]
        assert row[["n_real", "n_fake"]].tolist() == [len(real), len(fake)] and row["note"] == ""
        above = (fake[:, None] > real).mean() + (fake[:, None] == real).mean() / 2
        assert row["auroc"] == pytest.approx(above) and row["low"] < above <= row["high"]
        assert row["false_alarms"] == (real > cut).mean()
        share = proportion_interval(int((real > cut).sum()), len(real))
        assert row[["alarms_low", "alarms_high"]].tolist() == pytest.approx(share)


def test_slices_say_what_they_cannot_tell(judged: tuple[Features, Detector]) -> None:
    test, detector = judged
    told = slices(test, detector, least=1000).set_index("part")["note"]
    assert told["all"] == "AUROC needs 1000 of each class; no column 'tags'"
    sides = slices(test, detector).set_index("part").loc["shorter side below 224 px"]  # nothing is known
    assert (sides["n_real"], sides["n_fake"]) == (0, 0) and "no real image" in sides["note"]
    rare = slices(test, detector, fpr=0.0001).set_index("part").loc["all"]
    assert "needs at least 9999 real validation images" in rare["note"] and rare["auroc"] > 0.5
    assert np.isnan(rare["false_alarms"])
    many = replace(test, table=test.table.assign(tags=[f"tag {i % (TAGS + 3)}" for i in range(len(test))]))
    with pytest.warns(UserWarning, match="3 rarer tags left out"):
        assert len(slices(many, detector)) == TAGS + 3


def test_tags_come_from_the_manifest() -> None:
    raw = pd.DataFrame({"path": [__file__, "b.png", "c.png"], "label": [0, 1, 1]})
    given = raw.assign(tags=[["text", "face"], "face", None], mood="good")
    manifest = itemkit.read_manifest(given)
    assert manifest["tags"].tolist() == ["text; face", "face", ""]
    assert manifest.attrs["report"]["columns_not_used"] == ["mood"]
    assert "tags" not in itemkit.read_manifest(raw)


def test_they_are_found_where_people_look() -> None:
    assert itemkit.hardest is hardest and itemkit.by_phrase is by_phrase
    assert itemkit.compare_captions is compare_captions
