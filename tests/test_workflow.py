"""From a data folder to features, a detector and verdicts, with stand-ins for the models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from itemkit import presets, schema, workflow
from itemkit.detector import Detector
from itemkit.errors import InputError, ModelNotFound
from itemkit.features import Features, select_objects
from itemkit.images import ImageError
from itemkit.network import TrainedHead
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


def run(preset: Preset, data: Path | pd.DataFrame, out: Path, **options: object) -> Features:
    return workflow.features(preset, data, out, "cpu", progress=False, **options)


@pytest.fixture
def features(data: Path, tmp_path: Path) -> Features:
    return run(stand_ins(), data, tmp_path / "out")


# ------------------------------------------------------------------------------------------- the laboratory


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of the laboratory's form, with six images."""
    folder = tmp_path / "data" / "mini"
    folder.mkdir(parents=True)
    splits = ["train", "val", "test"]
    for name, generator in (("reals", "real"), ("fakes", "flow"), ("fresh", "real")):
        pictures = [fakes.png(i + 10 * len(generator)) for i in range(3)]
        table = pd.DataFrame({"generator": generator, "split": splits, "prompt": "a ball", "image": pictures})
        table.to_parquet(folder / f"{name}.parquet")
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path / "data"))
    return folder


def test_the_laboratory_is_laid_out_once_and_byte_for_byte(lab: Path, tmp_path: Path) -> None:
    manifest = workflow.lab_manifest(tmp_path / "out")
    assert list(manifest["generator"]) == ["real"] * 3 + ["flow"] * 3
    assert list(manifest["split"]) == ["train", "val", "test"] * 2 and set(manifest["caption"]) == {"a ball"}
    assert set(manifest["source"]) == {schema.LAB_SOURCE}
    images = pd.concat([pd.read_parquet(lab / f"{name}.parquet") for name in ("reals", "fakes")])["image"]
    assert [Path(path).read_bytes() for path in manifest["path"]] == list(images)
    before = [Path(path).stat().st_mtime_ns for path in manifest["path"]]
    again = workflow.lab_manifest(tmp_path / "out")
    pd.testing.assert_frame_equal(again, manifest)
    assert [Path(path).stat().st_mtime_ns for path in again["path"]] == before
    fresh = workflow.lab_manifest(tmp_path / "out", "fresh")
    assert len(fresh) == 3 and not set(fresh["path"]) & set(manifest["path"])


def test_changed_files_are_laid_out_anew(lab: Path, tmp_path: Path) -> None:
    workflow.lab_manifest(tmp_path / "out")
    table = pd.read_parquet(lab / "reals.parquet")
    table["image"] = [fakes.png(99 + i) for i in range(3)]
    table.to_parquet(lab / "reals.parquet")
    manifest = workflow.lab_manifest(tmp_path / "out")
    assert [Path(path).read_bytes() for path in manifest["path"][:3]] == list(table["image"])


def test_two_processes_may_lay_it_out_at_once(lab: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        lengths = pool.map(_count, [tmp_path / "out"] * 3)
    assert lengths == [6] * 3


def _count(out: Path) -> int:
    manifest = workflow.lab_manifest(out)
    return sum(Path(path).stat().st_size > 0 for path in manifest["path"])


def test_without_data_another_preset_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset 'paper' needs images: give a folder or a manifest"):
        workflow.data_manifest(None, tmp_path, "paper")


def test_mini_without_its_files_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path))
    with pytest.raises(InputError, match="reals.parquet"):
        workflow.data_manifest("", tmp_path / "out")


# ------------------------------------------------------------------------------------------------- features


def test_features_are_computed_once(data: Path, tmp_path: Path) -> None:
    preset = stand_ins()
    first = run(preset, data, tmp_path / "out")
    assert len(first) == 60 and first.dim == fakes.DIM and first.provenance["preset"] == "stub"
    seen = preset.encoder.images_encoded
    again = run(preset, pd.read_csv(data), tmp_path / "out")
    assert preset.encoder.images_encoded == seen == 60
    np.testing.assert_array_equal(again.image_emb, first.image_emb)
    pd.testing.assert_frame_equal(again.table, first.table)


def test_a_cached_call_builds_no_model_and_writes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = stand_ins()
    run(preset, data, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(Preset, "build", lambda *_: pytest.fail("a model was loaded"))
    assert len(run(preset, data, tmp_path / "out")) == 60
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_asking_for_features_imports_no_torch() -> None:
    script = (
        "import sys; from itemkit import workflow; print({'torch', 'sklearn', 'spacy'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def stores(out: Path) -> set[str]:
    return {path.name for path in (out / "features").iterdir()}


def test_a_store_is_named_by_what_made_it(data: Path, tmp_path: Path) -> None:
    plain = run(stand_ins(), data, tmp_path / "out")
    one = stores(tmp_path / "out")
    # without any name given: other models, another transform, other captions
    other = run(stand_ins("2"), data, tmp_path / "out")
    bright = run(stand_ins(), data, tmp_path / "out", transform=fakes.Brightened(40))
    brighter = run(stand_ins(), data, tmp_path / "out", transform=fakes.Brightened(80))
    user = run(stand_ins(), data, tmp_path / "out", captions="user", name="by-people")
    assert len(one) == 1 and len(stores(tmp_path / "out")) == 5
    assert sum(name.startswith("stub-by-people-") for name in stores(tmp_path / "out")) == 1
    assert not np.allclose(bright.image_emb, plain.image_emb)
    assert not np.allclose(bright.image_emb, brighter.image_emb)
    assert user.table[schema.CAPTION][0] == "a red ball" and len(other) == 60


def test_a_preset_put_together_by_hand_takes_other_parts(data: Path, tmp_path: Path) -> None:
    preset = stand_ins()
    whole = run(preset, data, tmp_path / "out")
    second = run(preset, data, tmp_path / "out", encoder=fakes.FakeEncoder("2"), localiser=None)
    assert len(whole.owner) and not len(second.owner)
    assert second.run["fingerprint"]["encoder"]["version"] == "2"
    with pytest.raises(InputError, match="no field 'localizer'.*localiser"):
        run(preset, data, tmp_path / "out", localizer="dense")


def test_a_part_is_read_from_the_shared_store_and_cuts_nothing_off(data: Path, tmp_path: Path) -> None:
    preset = stand_ins()
    some = run(preset, data, tmp_path / "out", splits=("test",), generators=("real",))
    assert preset.encoder.images_encoded == len(some) == 10
    assert set(some.table[schema.SPLIT]) == {"test"} and set(some.table[schema.GENERATOR]) == {"real"}
    assert len(run(preset, data, tmp_path / "out")) == 60 == preset.encoder.images_encoded
    assert len(run(preset, data, tmp_path / "out", splits=("val",))) == 20
    assert len(run(preset, data, tmp_path / "out")) == 60 == preset.encoder.images_encoded
    assert len(stores(tmp_path / "out")) == 1
    with pytest.raises(InputError, match="no image is of 'tyo'. Did you mean 'toy'"):
        run(preset, data, tmp_path / "out", generators=("tyo",))
    with pytest.raises(InputError, match="no image is of 'tset'. Did you mean 'test'"):
        run(preset, data, tmp_path / "out", splits=("tset",))


@pytest.mark.parametrize("given", [None, "train and test"])
def test_parts_of_data_without_splits_are_parts_of_the_whole(
    given: str | None, data: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(data)
    table["split"] = None if given is None else table["split"].replace("val", "train")
    preset = stand_ins()
    for out in (tmp_path / "first", tmp_path / "second"):
        if out.name == "first":  # the part asked for last, or first
            whole = run(preset, table, out).table.set_index("image_id")["split"]
        for split in schema.SPLITS:
            part = run(preset, table, out, splits=(split,), transform=fakes.Brightened(5))
            assert set(part.table["image_id"]) == set(whole.index[whole == split])
            assert set(part.table["split"]) == {split}
    assert set(whole) == set(schema.SPLITS)


def test_other_data_in_the_same_folder_changes_no_split(data: Path, tmp_path: Path) -> None:
    # the first has all three splits, so a store that holds both would carve none from the second
    run(stand_ins(), data, tmp_path / "out")
    table = fakes.make_images(tmp_path / "more", 60, start=100)
    table["split"] = ["train", "train", "test"] * 20
    assert set(run(stand_ins(), table, tmp_path / "out").table["split"]) == set(schema.SPLITS)


def test_captions_can_come_from_elsewhere(data: Path, tmp_path: Path) -> None:
    preset = stand_ins()
    own = run(preset, data, tmp_path / "out", captions="user")
    assert list(own.table[schema.CAPTION][:3]) == ["a red ball", "a green ball", "a blue ball"]
    assert preset.captioner.batches == []
    paths = own.table[schema.PATH]
    other = run(preset, data, tmp_path / "out", captions=pd.Series("a red dog", index=paths))
    assert set(other.table[schema.CAPTION]) == {"a red dog"}
    np.testing.assert_array_equal(other.image_emb, own.image_emb)
    with pytest.raises(InputError, match="1 of 60 images have no caption.*00005.png"):
        run(preset, data, tmp_path / "out", captions=pd.Series("a red dog", index=paths).drop(paths[5]))


def test_pixels_of_a_transform_and_of_the_centre(features: Features) -> None:
    first = np.asarray(Image.open(features.table[schema.PATH][0]).convert("RGB"))
    crop = workflow.add_pixels(features, 6, crop=True).pixels
    top, left = ((side - 6) // 2 for side in first.shape[:2])
    np.testing.assert_array_equal(crop[0], first[top : top + 6, left : left + 6])
    bright = workflow.add_pixels(features, 6, fakes.Brightened(40), crop=True).pixels
    np.testing.assert_array_equal(bright, np.minimum(255, crop.astype(int) + 40))
    # smaller ones are scaled, whole images too
    assert workflow.add_pixels(features, 30, crop=True).pixels.shape[1:] == (30, 30, 3)
    exact = [i for i, p in enumerate(features.table[schema.PATH]) if Image.open(p).size == (10, 10)]
    whole = workflow.add_pixels(features, 10).pixels[exact[0]]
    np.testing.assert_array_equal(whole, Image.open(features.table[schema.PATH][exact[0]]).convert("RGB"))


# ---------------------------------------------------------------------------------------------- the detector


def test_training_on_some_generators_leaves_out_the_others() -> None:
    features = make_features(60, 30)
    both = workflow.train_detector(features, members=1)
    one = workflow.train_detector(features, generators=["gan"], members=1, device="cpu")
    assert set(both.trained_on_["train_images"]) == {"real", "gan", "flow"}
    assert set(one.trained_on_["train_images"]) == {"real", "gan"} == set(one.trained_on_["val_images"])
    with pytest.raises(InputError, match="gann.*Did you mean 'gan'"):
        workflow.train_detector(features, generators=["gann"])


def test_a_handful_of_images_is_enough_to_train_on() -> None:
    features = make_features(4, 4, generators=("gan",))
    features.table[schema.SPLIT] = "train"
    detector = workflow.train_detector(features, members=1, device="cpu")
    assert detector.verdict(features)["p_fake"].between(0, 1).all()
    assert set(detector.verdict(features)["verdict"]) == {"withheld"}


# -------------------------------------------------------------------------------------------------- verdicts


# 5 of the 10 real and of the 10 fake validation images set the bounds, so only rates from 1/6 on can be had
RATES = {"fpr": 0.2, "fnr": 0.2}


@pytest.fixture
def detector(features: Features, tmp_path: Path) -> Path:
    workflow.train_detector(features, members=1).save(tmp_path / "detector")
    return tmp_path / "detector"


def judge(paths: object, detector: Path, preset: Preset | None = None, **options: object) -> list[dict]:
    paths = [paths] if isinstance(paths, str) else paths  # one alone would be no list
    found = workflow.detect(paths, preset or stand_ins(), detector, "cpu", **(RATES | options))
    assert isinstance(found, workflow.Verdicts)
    return [one.to_dict() for one in found]


def test_detect_answers_for_every_file_also_for_broken_ones(
    detector: Path, data: Path, tmp_path: Path
) -> None:
    good = sorted((data.parent / "images").iterdir())[:3]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    paths = [good[0], bad, good[1], tmp_path / "absent.png", good[2]]
    answers = judge(paths, detector)
    assert [a["path"] for a in answers] == [str(p) for p in paths]
    assert [sorted(a) for a in (answers[1], answers[3])] == [["error", "path"]] * 2
    assert "bad.jpg" in answers[1]["error"] and "no such file" in answers[3]["error"]
    for answer, file in zip((answers[0], answers[2], answers[4]), good, strict=True):
        assert answer["image_id"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert answer["verdict"] in ("real", "fake", "unsure") and 0 <= answer["p_fake"] <= 1
        assert -1 <= answer["global_cosine"] <= 1 and 0 <= answer["global_real_below"] <= 1
        named = [] if answer["caption"] == "nothing" else answer["caption"].replace("a ", "").split(" and ")
        assert sorted(thing["phrase"] for thing in answer["objects"]) == sorted(set(named))
        cosines = [thing["cosine"] for thing in answer["objects"]]
        assert cosines == sorted(cosines)  # the worst fit first
        assert all(len(thing["box"]) == 4 for thing in answer["objects"])
        json.dumps(answer, allow_nan=False)


class Trouble(fakes.FakeCaptioner):
    """Fails in a way of its own for every picture of one width."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def caption(self, images: list[Image.Image]) -> list[fakes.Said]:
        if images[0].width == 31:
            raise self.error
        return super().caption(images)


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("too deep"), KeyError(), KeyboardInterrupt()]
)
def test_whatever_one_image_does_the_next_one_is_judged(
    error: BaseException, detector: Path, tmp_path: Path
) -> None:
    for name, width in (("a", 12), ("b", 31), ("c", 13)):
        (tmp_path / f"{name}.png").write_bytes(fakes.png(5, (width, 10)))
    preset, paths = stand_ins().replace(captioner=Trouble(error)), [tmp_path / f"{n}.png" for n in "abc"]
    if isinstance(error, KeyboardInterrupt):  # no fault of an image
        with pytest.raises(KeyboardInterrupt):
            judge(paths, detector, preset)
        return
    answers = judge(paths, detector, preset)
    assert [sorted(a) == ["error", "path"] for a in answers] == [False, True, False]
    assert answers[1]["error"]


def test_folders_copies_and_names_that_are_no_text(detector: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "below"
    folder.mkdir(parents=True)
    name = os.fsdecode(b"caf\xe9.PNG")  # not UTF-8
    for file in (folder / name, folder / "copy.jpeg", folder / "no-ending"):
        file.write_bytes(fakes.png(3))
    (folder / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match="1 of 4 files below .* left out"):
        answers = judge(tmp_path / "photos", detector)
    assert sorted(Path(a["path"]).name for a in answers) == sorted([name, "copy.jpeg", "no-ending"])
    assert len({a["image_id"] for a in answers}) == len({a["p_fake"] for a in answers}) == 1
    json.dumps(answers)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image below"):
        judge(tmp_path / "empty", detector)


def test_an_image_that_the_detector_knows_is_called_seen(
    detector: Path, features: Features, tmp_path: Path
) -> None:
    rows = {split: features.table.index[features.table["split"] == split][0] for split in schema.SPLITS}
    moved = []
    for split, row in rows.items():  # known by its content, wherever it lies
        moved.append(tmp_path / f"{split}.dat")
        moved[-1].write_bytes(Path(features.table[schema.PATH][row]).read_bytes())
    assert [answer["seen"] for answer in judge(moved, detector)] == ["train", "val", ""]


def test_answers_carry_what_made_them(detector: Path, features: Features, tmp_path: Path) -> None:
    (answer,) = judge(features.table[schema.PATH][0], detector)
    assert {key: answer[key] for key in ("itemkit", "preset", "models", "note")} == features.provenance
    mini = stand_ins().replace(name="mini")
    assert judge(features.table[schema.PATH][0], detector, mini)[0]["note"] == schema.MINI_WARNING


def test_one_image_gets_the_score_its_features_give(detector: Path, features: Features) -> None:
    expected = Detector.load(detector).score(features)
    answers = judge(list(features.table[schema.PATH][:4]), detector)
    # features on disk are half precision
    assert [a["p_fake"] for a in answers] == pytest.approx(expected[:4].tolist(), abs=5e-3)


def test_a_caption_of_the_user_takes_the_place_of_the_generated_one(detector: Path, data: Path) -> None:
    image = next(iter(sorted((data.parent / "images").iterdir())))
    preset = stand_ins()
    (answer,) = judge([image], detector, preset, caption="a red dog and a blue cup")
    assert answer["caption"] == "a red dog and a blue cup" and preset.captioner.batches == []
    assert sorted(thing["phrase"] for thing in answer["objects"]) == ["blue cup", "red dog"]


def test_a_detector_of_users_captions_wants_one(data: Path, tmp_path: Path) -> None:
    theirs = run(stand_ins(), data, tmp_path / "out", captions="user")
    folder = workflow.train_detector(theirs, members=1).save(tmp_path / "detector")
    image = theirs.table[schema.PATH][0]
    with pytest.raises(InputError, match=r"captions.*--caption"):
        judge([image], folder)
    (answer,) = judge([image], folder, caption="a red ball")
    assert answer["p_fake"] == pytest.approx(Detector.load(folder).score(theirs)[0], abs=5e-3)


def test_a_detector_refuses_other_models_once(detector: Path, data: Path) -> None:
    with pytest.raises(InputError, match=r"encoder.version"):
        judge(data.parent / "images", detector, stand_ins("2"))


def test_a_promise_may_be_withheld_an_answer_not(detector: Path, data: Path) -> None:
    image = next(iter(sorted((data.parent / "images").iterdir())))
    (kept,) = judge([image], detector)
    for rates, option in (({"fpr": 0.05}, "--fpr"), ({"fnr": 0.05}, "--fnr")):
        (answer,) = judge([image], detector, **rates)
        assert answer["verdict"] == "withheld" and option in answer["because"] and "19" in answer["because"]
        same = {key: value for key, value in kept.items() if key not in ("verdict", "because")}
        assert {key: answer[key] for key in same} == same


def test_one_image_of_any_kind_is_one_verdict(detector: Path, data: Path) -> None:
    file = min((data.parent / "images").iterdir())
    picture, options = Image.open(file), (stand_ins(), detector, "cpu")
    of_file, of_bytes = (workflow.detect(given, *options, **RATES) for given in (file, file.read_bytes()))
    of_pixels = [workflow.detect(given, *options, **RATES) for given in (picture, np.asarray(picture))]
    assert of_file.path == str(file) and of_bytes.path == of_bytes.image_id == of_file.image_id
    for one in (of_bytes, *of_pixels):
        same = ("p_fake", "log_odds", "caption", "objects", "verdict", "because", "global_adds")
        assert {key: getattr(one, key) for key in same} == {key: getattr(of_file, key) for key in same}
    assert {one.path for one in of_pixels} == {of_pixels[0].image_id} != {of_file.image_id}
    grey = workflow.detect(np.asarray(picture.convert("L")), *options, **RATES)
    (in_list, again) = workflow.detect(np.stack([np.asarray(picture)] * 2), *options, **RATES)
    assert grey.image_id != in_list.image_id == again.image_id == of_pixels[0].image_id
    json.dumps([grey.to_dict(), in_list.to_dict()], allow_nan=False)


def test_one_image_that_cannot_be_judged_is_an_error_and_in_a_list_a_verdict(
    detector: Path, tmp_path: Path
) -> None:
    options = (stand_ins(), detector, "cpu")
    with pytest.raises(ImageError, match="no such file"):
        workflow.detect(tmp_path / "absent.png", *options)
    for wrong, words in (
        (np.zeros((4, 4, 3)), "float64 and shape"), (np.zeros((4, 4, 2), np.uint8), "shape .4, 4, 2."),
        (b"no picture", "image bytes: is"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            workflow.detect(wrong, *options)
        (one,) = workflow.detect([wrong], *options)
        assert re.search(words, one.error) and one.to_dict() == {"path": "image 1", "error": one.error}
        assert one.error in str(one) and "<pre>" in one._repr_html_() and "img" not in one._repr_html_()
        with pytest.raises(InputError, match="was not judged"):
            one.card(tmp_path / "card.png")
    (one,) = workflow.detect([7], *options)
    assert "got int, expected a path, a PIL image" in one.error


def test_verdicts_come_one_by_one(detector: Path, data: Path) -> None:
    files = sorted(map(str, (data.parent / "images").iterdir()))[:3]
    preset = stand_ins()
    found = workflow.verdicts(files, preset, detector, "cpu", None, (0.1, 0.1))
    assert next(found).path == files[0] and len(preset.captioner.batches) == 1  # the others are not touched
    assert [one.path for one in found] == files[1:]


def test_what_an_object_adds_is_what_is_lost_without_it(detector: Path, features: Features) -> None:
    judge = Detector.load(detector)
    row = int(features.table["n_objects"].to_numpy().argmax())
    one, table = features.select([row]), judge.explain(features, row)
    assert len(one.objects) > 1
    all_of_it = judge.decision_function(one)[0]
    for phrase, adds in table.loc[table["level"] == "local", ["text", "adds"]].itertuples(index=False):
        kept = (one.objects["phrase"] != phrase).to_numpy()
        without = select_objects(one, kept)
        assert adds == pytest.approx(all_of_it - judge.decision_function(without)[0], abs=1e-4)
    none = select_objects(one, np.zeros(len(one.objects), bool))
    assert table["adds"][0] == pytest.approx(judge.decision_function(none)[0], abs=1e-4)


def test_the_head_is_asked_once_for_a_verdict(
    detector: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = list[int](), TrainedHead.decision_function

    def counted(head: TrainedHead, X: np.ndarray) -> np.ndarray:
        asked.append(len(X))
        return real(head, X)

    monkeypatch.setattr(TrainedHead, "decision_function", counted)
    (answer,) = judge([min((data.parent / "images").iterdir())], detector)
    assert asked == [len(answer["objects"]) + 2]  # as it is, without each object, without any


def test_an_image_unlike_all_that_made_the_detector_is_told(detector: Path, features: Features) -> None:
    judge = Detector.load(detector)
    shares = judge.unlike(features)
    assert shares.min() >= 1 / 21 and shares.max() <= 1  # 20 validation images promise no less
    judge.known_["known_far"] = np.linspace(0, judge.known_["known_far"].max(), 200)
    odd = dataclasses.replace(features.select([0]), image_emb=-9 * features.image_emb[:1])
    assert judge.unlike(odd)[0] < workflow.NEW < judge.unlike(features).mean()
    judge.known_ = {}  # a detector that an older version wrote
    assert np.isnan(judge.unlike(odd)).all()
    known = workflow.Verdict("x", unlike=0.004), workflow.Verdict("x", unlike=0.4), workflow.Verdict("x")
    assert [bool(one.novelty) for one in known] == [True, False, False]


def test_a_file_s_own_words_about_its_origin(detector: Path, data: Path, tmp_path: Path) -> None:
    picture, texts, exif = Image.open(min((data.parent / "images").iterdir())), PngInfo(), Image.Exif()
    texts.add_text("parameters", "a red ball \x1b[31m\nSteps: 20")
    exif[0x0110], exif[0x0131] = "Camera 7", "Editor <b>"
    picture.save(tmp_path / "a.png", pnginfo=texts)
    picture.save(tmp_path / "b.jpg", exif=exif)
    marked = (tmp_path / "b.jpg").read_bytes() + workflow.FILE_MARKS["C2PA"][0] + b"trainedAlgorithmicMedia"
    (tmp_path / "c.jpg").write_bytes(marked)
    files = [tmp_path / name for name in ("a.png", "b.jpg", "c.jpg")]
    found = [one["marks"] for one in judge(files, detector)]
    assert found[0] == {"parameters": "a red ball \\x1b[31m\\nSteps: 20"}
    assert found[1] == {"camera": "Camera 7", "software": "Editor <b>"}
    assert found[2] == found[1] | {name: says for name, (_, says) in workflow.FILE_MARKS.items()}


def test_without_a_detector_it_says_which_to_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no detector for preset 'stub' yet: train one with"):
        workflow.detect(["x.png"], stand_ins())
    with pytest.raises(ModelNotFound, match="nowhere"):
        workflow.detect(["x.png"], stand_ins(), tmp_path / "nowhere")
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path))
    with pytest.raises(ModelNotFound, match="mini/models/detector"):
        workflow.detect(["x.png"], presets.get_preset("mini"))
