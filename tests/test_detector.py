"""The detector: honest thresholds, three answers, evidence, and the refusal of features made otherwise."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest

from itemkit.detector import Detector
from itemkit.errors import InputError, ModelNotFound
from itemkit.head import MisalignmentMLP
from itemkit.metrics import auroc
from itemkit.misalignment import RepresentationConfig

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
    assert n == 100 and threshold.rank == 5 and threshold.value == detector.real_scores_[-5]
    test = parts(features)[2]
    real = detector.decision_function(test)[test.labels == 0]
    assert threshold.low - 0.05 <= np.mean(real > threshold.value) <= threshold.high + 0.05
    with pytest.raises(InputError, match="0.001 needs at least 999 real validation images, got 100"):
        detector.verdict(test, fpr=0.001)
    with pytest.raises(
        InputError, match="missed fakes of 0.001 needs at least 999 fake calibration images, got 75"
    ):
        detector.verdict(test, fnr=0.001)
    for rate in (0, 1, 5, -0.1, float("nan")):
        for name in ("fpr", "fnr"):
            with pytest.raises(InputError, match=f"{name}={rate}: expected a rate between 0 and 1, such as"):
                detector.verdict(test, **{name: rate})


def test_three_answers(features, detector):
    test = parts(features)[2]
    table = detector.verdict(test, fpr=0.05, fnr=0.1)
    assert list(table.columns) == [
        "image_id",
        "path",
        "p_fake",
        "verdict",
        "like_real",
        "like_fake",
        "because",
    ]
    assert set(table["verdict"]) == {"real", "fake", "unsure"}
    above = detector.decision_function(test) > detector.threshold(0.05).value
    np.testing.assert_array_equal(table["like_real"] <= 0.05, above)
    wrong_real = (table["verdict"][test.labels == 0] == "fake").mean()
    wrong_fake = (table["verdict"][test.labels == 1] == "real").mean()
    assert (
        wrong_real <= 0.1 and wrong_fake <= 0.17
    )  # the bounds plus three standard errors of 200 and 150 images
    assert table["because"].str.contains("real validation images look at least this fake").any()


def test_conformal_bound_holds_over_many_draws():
    errors = []
    for seed in range(12):
        train, val, test = parts(make_features(400, 150, seed=seed, dim=12))
        detector = Detector("cosines", MisalignmentMLP(max_epochs=6, device="cpu")).fit(train, val)
        verdict = detector.verdict(test, fpr=0.1, fnr=0.1)["verdict"].to_numpy()
        errors.append(
            [(verdict[test.labels == 0] == "fake").mean(), (verdict[test.labels == 1] == "real").mean()]
        )
    assert (np.mean(errors, axis=0) <= 0.1 + 3 * np.std(errors, axis=0) / np.sqrt(12)).all()


def test_explain(features, detector):
    test = parts(features)[2]
    row = int(np.flatnonzero(test.table["n_objects"] == 3)[0])
    table = detector.explain(test, row)
    assert list(table["level"]) == ["global", "local", "local", "local"]
    assert table["cosine"][1:].is_monotonic_increasing and table["real_below"].between(0, 1).all()
    assert table.attrs["p_fake"] == pytest.approx(detector.score(test)[row])
    worst = table["text"][1]
    mine = np.flatnonzero(test.owner == row)
    assert (
        test.objects["phrase"][mine[np.argmin(np.sum(test.region_emb[mine] * test.phrase_emb[mine], 1))]]
        == worst
    )
    # leaving an object out is the same as never having found it
    gone = test.objects["phrase"].to_numpy() != worst
    fewer = type(test)(
        test.table, test.image_emb, test.caption_emb, test.region_emb[gone], test.phrase_emb[gone],
        test.owner[gone], test.objects[gone].reset_index(drop=True), test.run,
    )  # fmt: skip
    assert table["p_fake_without"][1] == pytest.approx(detector.score(fewer)[row], abs=1e-6)
    bare = int(np.flatnonzero(test.table["n_objects"] == 0)[0])
    assert list(detector.explain(test, bare)["level"]) == ["global"]
    with pytest.raises(InputError, match="row 100000: expected 0 to"):
        detector.explain(test, 100000)


def test_explain_where_images_without_objects_are_refused(features):
    train, val, test = (part.select((part.table["n_objects"] > 0).to_numpy()) for part in parts(features))
    head = MisalignmentMLP(max_epochs=3, device="cpu")
    strict = Detector(RepresentationConfig(empty="raise"), head).fit(train, val)
    single, pair = (int(np.flatnonzero(test.table["n_objects"] == n)[0]) for n in (1, 2))
    table = strict.explain(test, single)
    assert list(table["level"]) == ["global", "local"] and table["p_fake_without"].isna().all()
    assert table.attrs["p_fake"] == pytest.approx(strict.score(test)[single])
    assert strict.explain(test, pair)["p_fake_without"][1:].between(0, 1).all()
    # a detector that looks at no object does not mind their absence
    whole = Detector(RepresentationConfig(level="global", empty="raise"), head).fit(train, val)
    table = whole.explain(test, single)
    assert table["p_fake_without"][1] == pytest.approx(table.attrs["p_fake"])


def test_it_knows_the_images_it_was_made_with(features, detector, tmp_path):
    train, val, test = parts(features)
    part = features.table["split"].replace("test", "").to_numpy()
    np.testing.assert_array_equal(detector.seen(features), part)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = detector.evaluate(test, n_boot=2)
    with pytest.warns(UserWarning, match="of the 700 images evaluated here, 700 trained this detector: num"):
        detector.evaluate(train, n_boot=2)
    some = features.select(np.r_[np.flatnonzero(part == "")[:300], np.flatnonzero(part == "val")[:7]])
    with pytest.warns(UserWarning, match="of the 307 images evaluated here, 7 stopped its training or cali"):
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


def test_save_and_load(features, detector, tmp_path):
    test = parts(features)[2]
    again = Detector.load(detector.save(tmp_path / "detector"), device="cpu")
    pd.testing.assert_frame_equal(again.verdict(test), detector.verdict(test))
    pd.testing.assert_frame_equal(again.explain(test, 3), detector.explain(test, 3))
    assert {p.suffix for p in (tmp_path / "detector").iterdir()} == {".json", ".safetensors"}
    meta = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert "at most 5.00%" in meta["thresholds"]["0.05"]
    assert meta["trained_on"]["train_images"] == {"flow": 150, "gan": 150, "real": 400}
    train, val, _ = parts(features)
    assert again.fit(train, val).score(test) == pytest.approx(detector.score(test))


@pytest.mark.parametrize("pooling", ["attention", "deep_set"])
def test_learned_pooling_from_features_to_disk(features, pooling, tmp_path):
    train, val, test = parts(features)
    config = RepresentationConfig(pooling=pooling, max_objects=4)
    detector = Detector(config, MisalignmentMLP(max_epochs=10, device="cpu")).fit(train, val)
    assert detector.head_.slots == (4, 24) and auroc(test.labels, detector.decision_function(test)) > 0.8
    again = Detector.load(detector.save(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.decision_function(test), detector.decision_function(test))
    row = int(np.flatnonzero(test.table["n_objects"] == 3)[0])
    assert again.explain(test, row)["p_fake_without"][1:].between(0, 1).all()


@pytest.mark.parametrize("calibration", ["isotonic", "auto", "platt", "none"])
def test_other_calibrations(features, calibration, tmp_path):
    train, val, test = parts(features)
    detector = Detector("cosines", MisalignmentMLP(max_epochs=5, device="cpu"), calibration).fit(train, val)
    again = Detector.load(detector.save(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.score(test), detector.score(test))


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
    with pytest.raises(
        InputError, match=r"trained on: encoder.weights_hash is bbbb, was aaaa. Extract them with"
    ):
        detector.score(other)
    np.testing.assert_array_equal(detector.score(other, ignore=("encoder",)), detector.score(test))
    with pytest.raises(InputError, match="localiser.name is dense, was grid"):
        detector.verdict(change(test, "localiser.name", "dense"))
    with pytest.raises(InputError, match="captioner is absent, was {'name': 'blip', 'num_beams': 3}"):
        detector.explain(change(test, "captioner", None), 0)
    with pytest.raises(
        InputError, match=r"captions is user, was absent. Extract .* preset and captions from the same source"
    ):
        detector.score(change(test, "captions", "user"))
    with pytest.raises(InputError, match="the features carry no fingerprint"):
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


def test_another_encoder_is_refused_even_without_names(features):
    train, val, _ = parts(make_features(100, 50, dim=16, fingerprint={"encoder": "x"}))
    detector = Detector("cosines", MisalignmentMLP(max_epochs=2, device="cpu")).fit(train, val)
    with pytest.raises(InputError, match="embeddings have 24 dimensions, expected 16"):
        detector.score(change(features, "encoder", "x"), ignore=("captioner", "parser", "localiser"))


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


def test_load_errors(tmp_path):
    with pytest.raises(ModelNotFound, match="detector.json is missing. Train one with `itemkit train`"):
        Detector.load(tmp_path)


def test_fingerprint_differences():
    found = list(fingerprint_differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}))
    assert found == [("a.c", 2, 4), ("d", 3, None), ("e", None, 5)]
