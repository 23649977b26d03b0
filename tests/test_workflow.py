"""From a data folder to features, a detector and verdicts, with stand-ins for the models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from itemkit import presets, schema, workflow
from itemkit import run as report
from itemkit import study_run as study_of_files
from itemkit.detector import Detector
from itemkit.errors import InputError, ModelNotFound
from itemkit.extraction import extract
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.manifest import read_manifest
from itemkit.misalignment import RepresentationConfig
from itemkit.presets import Preset

import fakes
from synthetic import make_features


def stand_ins(version: str = "1") -> Preset:
    return Preset(
        name="stub",
        about="For this test.",
        captioner=fakes.FakeCaptioner(),
        encoder=fakes.FakeEncoder(version),
        parser=fakes.FakeParser(),
        localiser=fakes.FakeLocaliser(),
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """60 pictures, real and fake in turn, in three splits, as a CSV beside them."""
    table = fakes.make_images(tmp_path / "images", 60)
    table["split"] = ["train", "train", "val", "val", "test", "test"] * 10
    table["caption"] = [f"a {fakes.COLOURS[i % 3]} ball" for i in range(60)]
    table.to_csv(tmp_path / "manifest.csv", index=False)
    return tmp_path / "manifest.csv"


@pytest.fixture
def features(data: Path, tmp_path: Path) -> Features:
    return workflow.features(stand_ins(), data, tmp_path / "out", "cpu", progress=False)


# ----------------------------------------------------------------------------------------------------- data


def test_without_data_another_preset_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset 'paper' needs images: give a folder or a manifest"):
        workflow.data_manifest(None, tmp_path, "paper")


def test_mini_without_its_files_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path))
    with pytest.raises(InputError, match="`git checkout data/mini`"):
        workflow.data_manifest("", tmp_path / "out")


def test_missing_splits_are_filled_and_given_ones_kept(data: Path, tmp_path: Path) -> None:
    table = pd.read_csv(data)
    assert list(workflow.data_manifest(data, tmp_path)[schema.SPLIT]) == list(table["split"])
    table.loc[10:, "split"] = None
    table.to_csv(data, index=False)
    filled = workflow.data_manifest(data, tmp_path)[schema.SPLIT]
    assert list(filled[:10]) == list(table["split"][:10]) and set(filled) == set(schema.SPLITS)


def test_unlabelled_images_need_no_split(tmp_path: Path) -> None:
    table = fakes.make_images(tmp_path / "images", 4)[["path"]]
    table.to_csv(tmp_path / "m.csv", index=False)
    assert workflow.data_manifest(tmp_path / "m.csv", tmp_path)[schema.SPLIT].isna().all()


# ------------------------------------------------------------------------------------------------- features


def test_features_are_computed_once(data: Path, tmp_path: Path) -> None:
    preset = stand_ins()
    first = workflow.features(preset, data, tmp_path / "out", "cpu", progress=False)
    assert len(first) == 60 and first.dim == fakes.DIM
    assert first.run["config"]["name"] == "stub" and first.run["config"]["encoder"] == "FakeEncoder"
    assert (tmp_path / "out" / "features" / "stub" / "run.json").is_file()
    seen = preset.encoder.images_encoded
    again = workflow.features(preset, data, tmp_path / "out", "cpu", progress=False)
    assert preset.encoder.images_encoded == seen == 60
    np.testing.assert_array_equal(again.image_emb, first.image_emb)
    pd.testing.assert_frame_equal(again.table, first.table)


def test_splits_and_generators_can_be_chosen(data: Path, tmp_path: Path) -> None:
    some = workflow.features(
        stand_ins(), data, tmp_path / "out", "cpu", name="some", splits=("test",), generators=("real",),
        progress=False,
    )  # fmt: skip
    assert set(some.table[schema.SPLIT]) == {"test"} and set(some.table[schema.GENERATOR]) == {"real"}
    assert len(some) == 10 and (tmp_path / "out" / "features" / "stub-some").is_dir()


def test_captions_can_come_from_elsewhere(data: Path, tmp_path: Path) -> None:
    preset = stand_ins()
    own = workflow.features(
        preset, data, tmp_path / "out", "cpu", name="user", captions="user", progress=False
    )
    assert list(own.table[schema.CAPTION][:3]) == ["a red ball", "a green ball", "a blue ball"]
    assert preset.captioner.batches == []
    paths = own.table[schema.PATH]
    swapped = pd.Series("a red dog", index=paths)
    other = workflow.features(
        preset, data, tmp_path / "out", "cpu", name="swapped", captions=swapped, progress=False
    )
    assert set(other.table[schema.CAPTION]) == {"a red dog"}
    np.testing.assert_array_equal(other.image_emb, own.image_emb)
    with pytest.raises(InputError, match="1 of 60 images have no caption; first: .*00005.png"):
        workflow.features(
            preset, data, tmp_path / "out", "cpu", name="gap", captions=swapped.drop(paths[5]), progress=False
        )


def test_a_transform_is_applied_before_the_method(data: Path, tmp_path: Path) -> None:
    plain = workflow.features(stand_ins(), data, tmp_path / "out", "cpu", progress=False)
    bright = workflow.features(
        stand_ins(),
        data,
        tmp_path / "out",
        "cpu",
        name="bright",
        transform=fakes.Brightened(40),
        progress=False,
    )
    assert list(bright.table[schema.IMAGE_ID]) == list(plain.table[schema.IMAGE_ID])
    assert not np.allclose(bright.image_emb, plain.image_emb)


def test_pixels_come_in_the_order_of_the_features(features: Features) -> None:
    with_pixels = workflow.add_pixels(features, 10)
    assert features.pixels is None and with_pixels.pixels.shape == (60, 10, 10, 3)
    exact = [i for i, p in enumerate(features.table[schema.PATH]) if Image.open(p).size == (10, 10)]
    assert exact
    for i in exact[:3]:
        expected = np.asarray(Image.open(features.table[schema.PATH][i]).convert("RGB"))
        np.testing.assert_array_equal(with_pixels.pixels[i], expected)


# ---------------------------------------------------------------------------------------------- the detector


def test_a_split_holds_its_labelled_images() -> None:
    features = make_features(n_real=40, n_fake=20)
    test = workflow.take_split(features, "test")
    assert set(test.table[schema.SPLIT]) == {"test"}
    features.table.loc[features.table[schema.SPLIT] == "val", schema.LABEL] = pd.NA
    with pytest.raises(
        InputError, match=r"no labelled image has split 'val'; splits there are: .*val \(\d+\)"
    ):
        workflow.take_split(features, "val")
    with pytest.raises(
        InputError, match=r"no labelled image has split 'tset'; splits there are: train \(\d+\)"
    ):
        workflow.take_split(features, "tset")
    features.table[schema.SPLIT] = None
    with pytest.raises(InputError, match="splits there are: none"):
        workflow.take_split(features, "train")


def test_training_on_some_generators_leaves_out_the_others() -> None:
    features = make_features()
    both = workflow.train_detector(features, seeds=1)
    one = workflow.train_detector(features, generators=["gan"], seeds=1)
    assert set(both.trained_on_["train_images"]) == {"real", "gan", "flow"}
    assert set(one.trained_on_["train_images"]) == {"real", "gan"} == set(one.trained_on_["val_images"])
    with pytest.raises(InputError, match="no image of gann; generators there are: flow, gan, real"):
        workflow.train_detector(features, generators=["gann"])


def test_the_trained_detector_tells_the_made_up_classes_apart() -> None:
    features = make_features()
    table = workflow.train_detector(features, seeds=2).evaluate(workflow.take_split(features, "test"))
    auroc = table.loc[table["metric"] == "auroc"].set_index("generator")["value"]
    assert (auroc > 0.85).all()


def test_promises_are_held_against_new_images_only() -> None:
    features = make_features(200, 100)
    detector = workflow.train_detector(features, seeds=1)
    test = workflow.take_split(features, "test")
    expected = workflow.promises(detector, test)
    for split, n in (("train", 200), ("val", 100)):
        with pytest.raises(InputError, match=f"all {n} images trained or calibrated this detector, and what"):
            workflow.promises(detector, workflow.take_split(features, split))
    some = features.select((features.table[schema.SPLIT] != "train").to_numpy())
    with pytest.warns(UserWarning, match="100 of 200 images trained .* held against the other 100"):
        pd.testing.assert_frame_equal(workflow.promises(detector, some), expected)


def test_the_mini_detector_calibrates_on_new_validation_renders_and_sees_no_test_render(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, fresh = make_features(240, 100), make_features(640, 0, generators=(), seed=1)
    fresh.table[schema.IMAGE_ID] = "fresh " + fresh.table[schema.IMAGE_ID]
    fresh.table[schema.SPLIT] = ["val"] * 200 + ["test"] * 440
    asked = []

    def features(preset: str, data: Path | None, out_dir: Path, device: str, name: str = "") -> Features:
        asked.append((preset, data, name))
        return fresh if data else known

    monkeypatch.setattr(workflow, "features", features)
    monkeypatch.setattr(workflow, "_mini_detector", lambda: tmp_path / "detector")
    monkeypatch.setattr(study_of_files, "fresh_renders", lambda folder: folder / "fresh" / "manifest.csv")
    detector = Detector.load(workflow.save_mini_detector(tmp_path), "cpu")
    assert asked == [("mini", None, ""), ("mini", tmp_path / "mini" / "fresh" / "manifest.csv", "fresh")]
    assert set(detector.seen(fresh)[:200]) == {"val"} and set(detector.seen(fresh)[200:]) == {""}
    assert set(detector.seen(workflow.take_split(known, "test"))) == {""}
    # 60 validation reals of the data set and 200 new ones, 50 fakes: half of each calibrates
    assert (len(detector.real_scores_), len(detector.fake_scores_)) == (130, 25)
    assert detector.threshold(0.01).rank == 1
    # five reals for each fake do not draw p(fake) down: it is for equal shares
    plain = workflow.train_detector(known)
    test = workflow.take_split(known, "test")
    means = [[one.score(test)[test.labels == label].mean() for label in (0, 1)] for one in (detector, plain)]
    np.testing.assert_allclose(*means, atol=0.08)


# -------------------------------------------------------------------------------------------------- verdicts


# 5 of the 10 real and of the 10 fake validation images set the bounds, so only rates from 1/6 on can be had
RATES = {"fpr": 0.2, "fnr": 0.2}


@pytest.fixture
def detector(features: Features, tmp_path: Path) -> Path:
    workflow.train_detector(features, seeds=1).save(tmp_path / "detector")
    return tmp_path / "detector"


def test_detect_answers_for_every_file_also_for_broken_ones(
    detector: Path, data: Path, tmp_path: Path
) -> None:
    good = sorted((data.parent / "images").iterdir())[:3]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    paths = [good[0], bad, good[1], tmp_path / "absent.png", good[2]]
    answers = list(workflow.detect(paths, stand_ins(), detector, "cpu", **RATES))
    assert [a["path"] for a in answers] == [str(p) for p in paths]
    assert [sorted(a) for a in (answers[1], answers[3])] == [["error", "path"]] * 2
    assert "bad.jpg: is not an image" in answers[1]["error"] and "no such file" in answers[3]["error"]
    for answer in (answers[0], answers[2], answers[4]):
        assert answer["verdict"] in ("real", "fake", "unsure") and 0 <= answer["p_fake"] <= 1
        assert -1 <= answer["global_cosine"] <= 1 and 0 <= answer["global_real_below"] <= 1
        named = [] if answer["caption"] == "nothing" else answer["caption"].replace("a ", "").split(" and ")
        assert sorted(thing["phrase"] for thing in answer["objects"]) == sorted(set(named))
        cosines = [thing["cosine"] for thing in answer["objects"]]
        assert cosines == sorted(cosines)  # the worst fit first
        assert all(len(thing["box"]) == 4 for thing in answer["objects"])


def test_one_image_gets_the_score_its_features_give(detector: Path, features: Features, data: Path) -> None:
    expected = Detector.load(detector).score(features)
    answers = list(
        workflow.detect(list(features.table[schema.PATH][:4]), stand_ins(), detector, "cpu", **RATES)
    )
    # features on disk are half precision
    assert [a["p_fake"] for a in answers] == pytest.approx(expected[:4].tolist(), abs=5e-3)


def test_a_caption_of_the_user_takes_the_place_of_the_generated_one(detector: Path, data: Path) -> None:
    image = next(iter(sorted((data.parent / "images").iterdir())))
    preset = stand_ins()
    (answer,) = workflow.detect([image], preset, detector, "cpu", "a red dog and a blue cup", **RATES)
    assert answer["caption"] == "a red dog and a blue cup" and preset.captioner.batches == []
    assert sorted(thing["phrase"] for thing in answer["objects"]) == ["blue cup", "red dog"]


def test_a_detector_of_users_captions_wants_one(data: Path, tmp_path: Path) -> None:
    theirs = workflow.features(
        stand_ins(), data, tmp_path / "out", "cpu", name="user", captions="user", progress=False
    )
    folder = workflow.train_detector(theirs, seeds=1).save(tmp_path / "detector")
    image = theirs.table[schema.PATH][0]
    with pytest.raises(
        InputError, match=r"captions is generate, was user. Extract .* \(.*, detect --caption\)"
    ):
        list(workflow.detect([image], stand_ins(), folder, "cpu", **RATES))
    (answer,) = workflow.detect([image], stand_ins(), folder, "cpu", "a red ball", **RATES)
    assert answer["p_fake"] == pytest.approx(Detector.load(folder).score(theirs)[0], abs=5e-3)


def test_detect_where_images_without_objects_are_refused(features: Features, tmp_path: Path) -> None:
    there = features.select((features.table[schema.N_OBJECTS] > 0).to_numpy())
    strict = Detector(RepresentationConfig(empty="raise"), MisalignmentMLP(max_epochs=2))
    folder = strict.fit(workflow.take_split(there, "train"), workflow.take_split(there, "val")).save(tmp_path)
    image = there.table.loc[there.table[schema.N_OBJECTS] == 1, schema.PATH].iloc[0]
    (answer,) = workflow.detect([image], stand_ins(), folder, "cpu", fpr=0.3, fnr=0.3)
    assert len(answer["objects"]) == 1 and 0 <= answer["p_fake"] <= 1


def test_a_detector_refuses_other_models(detector: Path, data: Path) -> None:
    image = next(iter(sorted((data.parent / "images").iterdir())))
    with pytest.raises(InputError, match="encoder.version is 2, was 1"):
        list(workflow.detect([image], stand_ins("2"), detector, "cpu", **RATES))


def test_too_few_validation_images_for_a_rate_are_told(detector: Path, data: Path) -> None:
    image = next(iter(sorted((data.parent / "images").iterdir())))
    with pytest.raises(InputError, match="false-positive rate of 0.05 needs at least 19 real .* got 5"):
        list(workflow.detect([image], stand_ins(), detector, "cpu", fnr=0.2))
    with pytest.raises(InputError, match="missed fakes of 0.05 needs at least 19 fake .* got 5"):
        list(workflow.detect([image], stand_ins(), detector, "cpu", fpr=0.2))


def test_without_a_detector_it_says_which_to_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no detector for preset 'stub' yet: train one with"):
        list(workflow.detect(["x.png"], stand_ins()))
    with pytest.raises(ModelNotFound, match="nowhere"):
        list(workflow.detect(["x.png"], stand_ins(), tmp_path / "nowhere"))
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path))
    with pytest.raises(ModelNotFound, match="mini/models/detector"):
        list(workflow.detect(["x.png"], presets.get_preset("mini")))


def test_foreign_images_get_a_note_with_the_mini_models_only(capsys: pytest.CaptureFixture[str]) -> None:
    workflow.warn_if_foreign("mini", "photos")
    assert capsys.readouterr().err.count("\n") == 1
    workflow.warn_if_foreign("mini", None)
    workflow.warn_if_foreign("paper", "photos")
    assert capsys.readouterr().err == ""


def test_stored_features_of_foreign_images_get_the_note_too(capsys: pytest.CaptureFixture[str]) -> None:
    features = make_features()
    features.run = {"config": {"name": "mini"}}
    workflow.warn_about_features(features)
    assert capsys.readouterr().err == workflow.MINI_ON_FOREIGN_IMAGES + "\n"
    features.table[schema.SOURCE] = "mini laboratory"
    workflow.warn_about_features(features)
    features.table[schema.SOURCE], features.run = "photos", {"config": {"name": "paper"}}
    workflow.warn_about_features(features)
    features.run = {}
    workflow.warn_about_features(features)
    assert capsys.readouterr().err == ""


def test_pixels_of_a_transform_and_of_the_centre(features: Features) -> None:
    plain = workflow.add_pixels(features, 6, crop=True).pixels
    first = np.asarray(Image.open(features.table[schema.PATH][0]).convert("RGB"))
    top, left = ((side - 6) // 2 for side in first.shape[:2])
    np.testing.assert_array_equal(plain[0], first[top : top + 6, left : left + 6])
    bright = workflow.add_pixels(features, 6, fakes.Brightened(40), crop=True).pixels
    np.testing.assert_array_equal(bright, np.minimum(255, plain.astype(int) + 40))
    assert workflow.add_pixels(features, 30, crop=True).pixels.shape[1:] == (
        30,
        30,
        3,
    )  # smaller ones are scaled


# --------------------------------------------------------------------------------------------------- summary


def test_the_summary_holds_every_metric_it_names(tmp_path: Path) -> None:
    features = make_features()
    table = workflow.train_detector(features, seeds=1).evaluate(workflow.take_split(features, "test"))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "01_cosines.png").write_bytes(b"")
    text = report.write_summary(table, tmp_path, workflow.LAB_NOTE, 90.0).read_text()
    assert text.startswith(f"# Summary\n\nMade with: {workflow.LAB_NOTE}. 1.5 minutes.")
    assert f"| {' | '.join(report.SUMMARY_COLUMNS)} |" in text  # none is missing under another name
    auroc = table[(table["metric"] == "auroc") & (table["generator"] == "gan")].iloc[0]
    shown = f"{auroc['value']:.2f} ({auroc['low']:.2f}-{auroc['high']:.2f})"
    assert f"| gan | {shown} |" in text
    assert "- [01_cosines](figures/01_cosines.png)" in text and "nan" not in text


def test_a_store_without_splits_is_divided_in_the_same_way_each_time(tmp_path, capsys):
    paths = []
    for i in range(40):
        path = tmp_path / ("real" if i % 2 else "fake") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(path)
        paths.append(path)
    extract(read_manifest(tmp_path), tmp_path / "store", fakes.fake_models(), progress=False)
    first, second = (workflow.read_features(tmp_path / "store").table for _ in range(2))
    assert first["split"].tolist() == second["split"].tolist()
    assert set(first["split"]) == {"train", "val", "test"}
    assert "no splits" in capsys.readouterr().err
