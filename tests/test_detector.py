"""The detector: honest thresholds, three answers, evidence, and the refusal of features made otherwise."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score as auroc

from itemkit.detector import FILES, FORMAT, Detector
from itemkit.errors import InputError, ModelNotFound
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import Representation, RepresentationConfig
from itemkit.network import FILES as HEAD_FILES
from itemkit.network import read_sealed, write_sealed

from synthetic import make_features

FINGERPRINT = {
    "encoder": {"name": "tiny", "weights_hash": "aaaa", "device": "cpu"},
    "captioner": {"name": "blip", "num_beams": 3},
    "parser": {"name": "en"},
    "localiser": {"name": "grid"},
    "transform": None,
}


def parts(features):
    return [
        features.select((features.table["split"] == name).to_numpy()) for name in ("train", "val", "test")
    ]


@pytest.fixture(scope="module")
def features():
    return make_features(800, 300, fingerprint=FINGERPRINT)


@pytest.fixture(scope="module")
def detector(features):
    train, val, _ = parts(features)
    return Detector("cosines", MisalignmentMLP(max_epochs=15, device="cpu")).fit(train, val)


def test_scores(features, detector):
    test = parts(features)[2]
    p = detector.score(test)
    assert ((p > 0) & (p < 1)).all() and auroc(test.labels, p) > 0.85
    single = [detector.score(test.select([i]))[0] for i in range(10)]
    np.testing.assert_allclose(single, p[:10], atol=1e-6)


def test_thresholds_come_from_the_calibration_reals(features, detector):
    threshold = detector.threshold(0.05)
    n = len(detector.real_scores_)
    assert n == 100 and threshold.value == detector.real_scores_[-5]
    test = parts(features)[2]
    real = detector.decision_function(test)[test.labels == 0]
    assert threshold.low - 0.05 <= np.mean(real > threshold.value) <= threshold.high + 0.05
    for rate in (0, 1, 5, -0.1, float("nan")):
        for name in ("fpr", "fnr"):
            with pytest.raises(InputError, match=f"{name}={rate}: expected a rate between 0 and 1, such as"):
                detector.verdict(test, **{name: rate})


def test_three_answers(features, detector):
    test = parts(features)[2]
    table = detector.verdict(test, fpr=0.05, fnr=0.1)
    columns = ["image_id", "path", "p_fake", "verdict", "like_real", "like_fake", "because"]
    assert list(table.columns) == columns
    assert set(table["verdict"]) == {"real", "fake", "unsure"}
    above = detector.decision_function(test) > detector.threshold(0.05).value
    np.testing.assert_array_equal(table["like_real"] <= 0.05, above)
    wrong_real = (table["verdict"][test.labels == 0] == "fake").mean()
    wrong_fake = (table["verdict"][test.labels == 1] == "real").mean()
    assert (
        wrong_real <= 0.1 and wrong_fake <= 0.17
    )  # the bounds plus three standard errors of 200 and 150 images
    assert table["because"].str.contains("real validation images look at least this fake").any()


def test_an_answer_always_a_promise_when_it_can_be_kept(features, detector):
    test = parts(features)[2]
    for rates, word, counts in (
        ({"fpr": 0.001}, "false-positive rate of 0.001 needs at least 999 real", "got 100; --fpr 0.01 asks"),
        ({"fnr": 0.001}, "missed fakes of 0.001 needs at least 999 fake", "got 75; --fnr 0.014 asks"),
    ):
        table = detector.verdict(test, **rates)
        assert set(table["verdict"]) == {"withheld"}
        np.testing.assert_array_equal(table["p_fake"], detector.score(test))
        (reason,) = set(table["because"])
        assert word in reason and counts in reason and [reason] == detector.lacking(**rates)
    assert len(detector.lacking(0.001, 0.001)) == 2 and detector.lacking(0.01, 0.014) == []


def few(features, train, val):
    """So many real and fake training and validation images."""
    rows = [
        np.flatnonzero((features.table["split"] == split) & (features.labels == label))[:n]
        for split, counts in (("train", train), ("val", val)) for label, n in enumerate(counts)
    ]  # fmt: skip
    return features.select(np.concatenate(rows[:2])), features.select(np.concatenate(rows[2:]))


@pytest.mark.parametrize("val", [(3, 3), (1, 1), (3, 1), (0, 5), (40, 0), (0, 0)])
def test_a_handful_of_validation_images_is_enough_for_an_answer(features, val, tmp_path):
    train, few_val = few(features, (20, 20), val)
    detector = Detector("cosines", MisalignmentMLP(max_epochs=20, device="cpu")).fit(train, few_val)
    test = parts(features)[2]
    assert auroc(test.labels, detector.score(test)) > 0.7
    stopped = any("the training was stopped on a share of the tr" in note for note in detector.notes)
    assert stopped == (min(val) < 2)
    assert ("is rough" if min(val) else "is the head's own, not calibrated") in detector.notes[-1]
    assert (detector.calibrator_.method == "none") == (min(val) == 0)
    assert set(detector.verdict(test)["verdict"]) == {"withheld"}
    again = Detector.load(detector.save(tmp_path), device="cpu")
    pd.testing.assert_frame_equal(again.verdict(test), detector.verdict(test))
    assert again.notes == detector.notes and len(again.explain(test, 0)) >= 1
    table = again.evaluate(test, n_boot=20).set_index(["generator", "metric"])
    assert table.loc[("all", "auroc"), "value"] > 0.7
    if val[0] < 19:
        assert np.isnan(table.loc[("all", "accuracy"), "value"])
        assert "needs at least 19 real validation images" in table.loc[("all", "accuracy"), "note"]


def test_one_training_image_of_a_class(features):
    train, val = few(features, (5, 1), (0, 0))
    detector = Detector("cosines", MisalignmentMLP(max_epochs=3, device="cpu")).fit(train, val)
    assert "validation images: the training was stopped after the last" in detector.notes[0]
    assert np.isfinite(detector.score(parts(features)[2])).all()
    with pytest.raises(InputError, match="5 real and 0 fake training images; a detector needs both kinds"):
        Detector().fit(few(features, (5, 0), (1, 1))[0], val)


@pytest.mark.parametrize("label", [0, 1])
def test_a_test_set_of_one_class(features, detector, label):
    test = parts(features)[2]
    one, share = test.select(test.labels == label), ("accuracy_real", "accuracy_fake")[label]
    table = detector.evaluate(one).set_index(["generator", "metric"]).groupby(level=1, sort=False).first()
    called = detector.decision_function(one) > detector.threshold(0.05).value
    row = table.loc["called_fake"]
    assert row["value"] == called.mean() and row["low"] < row["value"] < row["high"]
    assert (row["over"], row["n_real"] + row["n_fake"]) == ("images, exact binomial", len(one))
    assert table.loc[share, "value"] == pytest.approx((called == label).mean())
    assert 0 <= table.loc["above_half", "value"] <= 1
    others = table.drop(["called_fake", "above_half", share])
    assert others[["value", "low", "high"]].isna().all(axis=None)
    assert others["note"].str.startswith("not defined: needs real and fake images, got").all()
    # and where no threshold can be promised, the share above one half is left
    table = detector.evaluate(one, fpr=0.001).query("generator == 'all'").set_index("metric")
    assert list(table.index[table["value"].notna()]) == ["above_half"]
    assert "999 real validation images" in table.loc["called_fake", "note"]


def test_explain(features, detector):
    test = parts(features)[2]
    row = int(np.flatnonzero(test.table["n_objects"] == 3)[0])
    table = detector.explain(test, row)
    assert list(table["level"]) == ["global", "local", "local", "local"]
    assert table["cosine"][1:].is_monotonic_increasing and table["real_below"].between(0, 1).all()
    worst = table["text"][1]
    mine = np.flatnonzero(test.owner == row)
    assert (
        test.objects["phrase"][mine[np.argmin(np.sum(test.region_emb[mine] * test.phrase_emb[mine], 1))]]
        == worst
    )
    assert table.loc[0, "text"] == "a made-up thing" and np.isnan(table.loc[0, "score"])
    reals = features.select(((features.table["split"] == "val") & (features.labels == 0)).to_numpy())
    whole = np.sum(reals.image_emb * reals.caption_emb, axis=1)
    assert table.loc[0, "real_below"] == pytest.approx((whole < table.loc[0, "cosine"]).mean(), abs=0.01)
    bare = int(np.flatnonzero(test.table["n_objects"] == 0)[0])
    assert list(detector.explain(test, bare)["level"]) == ["global"]


@pytest.fixture(scope="module")
def relative(features):
    train, val, _ = parts(features)
    return Detector("cosines_relative", MisalignmentMLP(max_epochs=15, device="cpu")).fit(train, val)


def test_relative_evidence(features, relative):
    train, val, test = parts(features)
    assert auroc(test.labels, relative.score(test)) > 0.8
    row = int(np.flatnonzero(test.table["n_objects"] == 3)[0])
    table = relative.explain(test, row)
    assert list(table.columns[-4:]) == ["found", "cosine", "relative", "real_below"]
    assert table["relative"][1:].is_monotonic_increasing and table["found"].all()
    # what reals have is learnt from training reals, and what is usual comes from validation reals
    known = Representation("cosines_relative").fit(train)
    mine = known.pair_cosines(test.select([row]))
    assert table["relative"][0] == pytest.approx(mine["global"][0], abs=1e-6)
    np.testing.assert_allclose(table["relative"][1:], np.sort(mine["local"]), atol=1e-6)
    usual = known.pair_cosines(val.select(val.labels == 0))["local"]
    expected = [(usual < number).mean() for number in table["relative"][1:]]
    np.testing.assert_allclose(table["real_below"][1:], expected, atol=0.01)
    plain = np.sum(test.image_emb[row] * test.caption_emb[row])
    assert table["cosine"][0] == pytest.approx(plain, abs=1e-6)


def test_a_relative_detector_is_stored_whole(features, relative, tmp_path):
    test = parts(features)[2]
    again = Detector.load(relative.save(tmp_path), device="cpu")
    assert again.representation.config == RepresentationConfig(kind="cosine", relative=True)
    pd.testing.assert_frame_equal(again.verdict(test), relative.verdict(test))
    pd.testing.assert_frame_equal(again.explain(test, 3), relative.explain(test, 3))
    meta, arrays = read_sealed(tmp_path, FILES, FORMAT, HEAD_FILES)
    del arrays["relative_to_local"]
    meta.pop("files")
    write_sealed(tmp_path, FILES, meta, arrays, HEAD_FILES)
    with pytest.raises(ModelNotFound, match=r"is damaged \(.*relative_to_local.*\); train again$"):
        Detector.load(tmp_path)


def test_an_older_detector_stays_readable(features, detector, tmp_path):
    test = parts(features)[2]
    meta, arrays = read_sealed(detector.save(tmp_path), FILES, FORMAT, HEAD_FILES)
    for name in ("fuse", "relative", "found_only"):
        del meta["representation"][name]
    meta["representation"] |= {"top_k": 3, "temperature": 0.05}  # as the shipped one says
    meta.pop("files")
    write_sealed(tmp_path, FILES, meta, arrays, HEAD_FILES)
    again = Detector.load(tmp_path, device="cpu")
    assert again.representation.config == detector.representation.config
    np.testing.assert_array_equal(again.score(test), detector.score(test))


def test_it_knows_the_images_it_was_made_with(features, detector, tmp_path):
    train, val, test = parts(features)
    part = features.table["split"].replace("test", "").to_numpy()
    np.testing.assert_array_equal(detector.seen(features), part)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = detector.evaluate(test, n_boot=2)
    with pytest.warns(UserWarning, match="700 of the 700 images evaluated here trained or calibrated this"):
        detector.evaluate(train, n_boot=2)
    some = features.select(np.r_[np.flatnonzero(part == "")[:300], np.flatnonzero(part == "val")[:7]])
    with pytest.warns(UserWarning, match="7 of the 307 images evaluated here trained or calibrated this"):
        detector.evaluate(some, n_boot=2)
    again = Detector.load(detector.save(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.seen(features), part)
    pd.testing.assert_frame_equal(again.evaluate(test, n_boot=2), expected)


def test_evaluate_counts_shared_reals_once(features, detector):
    test = parts(features)[2]
    table = detector.evaluate(test, n_boot=50)
    counts = table.drop_duplicates("generator").set_index("generator")[["n_real", "n_fake"]]
    assert counts.loc["all"].tolist() == [200, 150] and counts.loc["gan"].tolist() == [200, 75]
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).mean() > 0.9
    assert set(table["over"]) == {"images, 50 resamples within each class", "images, exact binomial"}
    json.loads(table.to_json(orient="records"))
    assert (table["note"] == "").all()


def test_save_and_load(features, detector, tmp_path):
    test = parts(features)[2]
    again = Detector.load(detector.save(tmp_path / "detector"), device="cpu")
    pd.testing.assert_frame_equal(again.verdict(test), detector.verdict(test))
    pd.testing.assert_frame_equal(again.explain(test, 3), detector.explain(test, 3))
    assert {p.suffix for p in (tmp_path / "detector").iterdir()} == {".json", ".safetensors"}
    meta = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert "at most 5.00%" in meta["thresholds"]["0.05"] and meta["calibration"] == "temperature"
    made = meta["trained_on"]
    assert made["train_images"] == {"flow": 150, "gan": 150, "real": 400}
    assert (made["seed"], made["members"], made["models"], made["note"]) == (0, 1, "", "")
    train, val, _ = parts(features)
    assert again.fit(train, val).score(test) == pytest.approx(detector.score(test))


def change(features, path, value):
    fingerprint = json.loads(json.dumps(features.run["fingerprint"]))
    *parents, leaf = path.split(".")
    part = fingerprint
    for name in parents:
        part = part[name]
    part[leaf] = value
    return type(features)(**{**vars(features), "run": {"fingerprint": fingerprint}})


def test_refuses_features_made_otherwise(features, detector):
    test = parts(features)[2]
    other = change(test, "encoder.weights_hash", "bbbb")
    with pytest.raises(InputError, match="images: encoder.weights_hash: 'aaaa' there, 'bbbb' here. Extract"):
        detector.score(other)
    detector.check(other, ignore=("encoder",))
    with pytest.raises(InputError, match="localiser.name: 'grid' there, 'dense' here"):
        detector.verdict(change(test, "localiser.name", "dense"))
    with pytest.raises(InputError, match="captioner: {'name': 'blip', 'num_beams': 3} there, nothing"):
        detector.explain(change(test, "captioner", None), 0)
    with pytest.raises(
        InputError, match="captions: nothing there, 'user' here. Extract .* captions from the same source"
    ):
        detector.score(change(test, "captions", "user"))
    with pytest.raises(InputError, match="captioner: {'name': 'blip', 'num_beams': 3} there, nothing here"):
        detector.score(type(test)(**{**vars(test), "run": {}}))
    # a perturbed image, another device: the same models, so the same detector
    np.testing.assert_array_equal(detector.score(change(test, "transform", "jpeg 50")), detector.score(test))
    np.testing.assert_array_equal(
        detector.score(change(test, "encoder.device", "cuda")), detector.score(test)
    )


def test_a_global_detector_does_not_mind_another_localiser(features):
    train, val, test = parts(features)
    config = RepresentationConfig(level="global", kind="cosine")
    detector = Detector(config, MisalignmentMLP(max_epochs=3, device="cpu")).fit(train, val)
    assert len(detector.score(change(test, "localiser.name", "dense"))) == len(test)


def test_fit_refuses_shared_images_and_missing_labels(features):
    train, val, _ = parts(features)
    with pytest.raises(
        InputError, match=r"350 of 350 validation images are also training images, the first is images/"
    ):
        Detector().fit(features, val)
    unknown = val.select(np.arange(len(val)))
    unknown.table.loc[2, "label"] = pd.NA
    with pytest.raises(InputError, match="1 of 350 images have no label, the first is images/"):
        Detector().fit(train, unknown)
    with pytest.raises(InputError, match="this detector is not trained"):
        Detector().score(val)


def make_nan(folder):
    meta = json.loads((folder / "detector.json").read_text())
    meta["calibrator"]["scale"] = float("nan")
    (folder / "detector.json").write_text(json.dumps(meta))


DAMAGES = {
    "cut off": lambda folder: (folder / "calibration.safetensors").write_bytes(b"\x08"),
    "missing": lambda folder: (folder / "head.json").unlink(),
    "nan calibrator": make_nan,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(detector, damage, tmp_path):
    folder = detector.save(tmp_path / "copy")
    DAMAGES[damage](folder)
    with pytest.raises(ModelNotFound, match=r"copy is damaged \(.*\); train again$") as caught:
        Detector.load(folder)
    assert "\n" not in str(caught.value)


def test_parts_of_two_detectors_are_not_one(detector, features, tmp_path):
    train, val, _ = parts(features)
    other = Detector("cosines", MisalignmentMLP(max_epochs=2, seed=1, device="cpu")).fit(train, val)
    folder = detector.save(tmp_path / "copy")
    other.head_.save(folder)
    with pytest.raises(ModelNotFound, match="head.json was changed after it was written"):
        Detector.load(folder)


def test_a_folder_without_a_detector(tmp_path):
    with pytest.raises(ModelNotFound, match="detector.json is missing. Train one with `itemkit train`"):
        Detector.load(tmp_path)


def test_promises_are_held_against_new_images_only(features, detector):
    train, _, test = parts(features)
    assert len(detector.promises(test)) == 4
    with pytest.warns(UserWarning, match="1050 of 1400 images trained or calibrated this detector"):
        assert detector.promises(features).equals(detector.promises(test))
    with pytest.raises(InputError, match="all 700 images trained or calibrated this detector"):
        detector.promises(train)
