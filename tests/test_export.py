"""Features leave for other tools and come back."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from itemkit import export as io
from itemkit.detector import Detector
from itemkit.errors import InputError
from itemkit.extraction import extract
from itemkit.features import ARRAYS
from itemkit.head import MisalignmentMLP
from itemkit.store import load_features

from fakes import fake_models, make_images


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    extract(make_images(folder / "images", 7), folder / "out", fake_models(), progress=False)
    return load_features(folder / "out")


def test_clip_retrieval_layout_there_and_back(features, tmp_path):
    io.export(features, tmp_path, "clip-retrieval")
    metadata = pd.read_parquet(tmp_path / "metadata" / "metadata_0.parquet")
    assert list(metadata["image_path"]) == list(features.table["path"])
    assert list(metadata["caption"]) == list(features.table["caption"])
    assert np.load(tmp_path / "img_emb" / "img_emb_0.npy").dtype == np.float16
    back = io.import_clip_retrieval(tmp_path)
    np.testing.assert_allclose(back.image_emb, features.image_emb, atol=1e-3)
    np.testing.assert_allclose(back.caption_emb, features.caption_emb, atol=1e-3)
    assert list(back.labels) == list(features.labels) and back.dim == features.dim
    assert len(back.objects) == 0 and set(back.table["n_objects"]) == {0}


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "img_emb").mkdir()
    for i in range(12):  # as text, 10 would come before 2
        x = np.zeros((1, 12), np.float32)
        x[0, i] = 5
        np.save(tmp_path / "img_emb" / f"img_emb_{i}.npy", x)
    back = io.import_clip_retrieval(tmp_path)
    np.testing.assert_array_equal(back.image_emb, np.eye(12))
    assert back.caption_emb.shape == (12, 0) and back.table["label"].isna().all()


def test_numpy_holds_everything(features, tmp_path):
    io.export(features, tmp_path / "x", "numpy")
    for name in ("table", "objects"):
        there = pd.read_parquet(tmp_path / "x" / f"{name}.parquet")
        pd.testing.assert_frame_equal(there, getattr(features, name))
    with np.load(tmp_path / "x" / "embeddings.npz") as arrays:
        for name in (*ARRAYS, "owner"):
            np.testing.assert_array_equal(arrays[name], getattr(features, name))


def test_what_does_not_fit_is_said(features, tmp_path):
    with pytest.raises(InputError, match=r"no img_emb/\*.npy"):
        io.import_clip_retrieval(tmp_path)
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        io.export(features, tmp_path, "numpy")
    table = pd.DataFrame({"path": ["a", "b"]})
    for image, text, message in [
        (np.ones((3, 4)), None, r"shape \(3, 4\), expected floats of shape \(2, d\)"),
        (np.full((2, 4), np.nan), None, "image embedding 0 is not finite"),
        (np.ones((2, 4)), np.ones((2, 5)), r"caption embeddings are float64 of shape \(2, 5\), expected"),
    ]:
        with pytest.raises(InputError, match=message):
            io.from_arrays(image, table, text)


def test_arrays_beside_a_table(tmp_path):
    x = np.array([[3, 4], [0, 2]], np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "t.npy", np.eye(2, dtype=np.float16))
    table = pd.DataFrame({"image_path": ["a.png", "b.png"], "label": [1, 0], "model": ["sd", ""]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet", index=False)
    for name in ("t.csv", "t.parquet"):
        back = io.import_npy(tmp_path / "x.npy", tmp_path / name, tmp_path / "t.npy")
        np.testing.assert_allclose(back.image_emb, [[0.6, 0.8], [0, 1]])
        assert list(back.table["path"]) == ["a.png", "b.png"] and list(back.labels) == [1, 0]
        assert list(back.table["model"])[0] == "sd"
    assert io.import_npy(tmp_path / "x.npy", tmp_path / "t.csv").caption_emb.shape == (2, 0)


def test_imported_features_train_a_detector(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(120) % 2
    text = rng.standard_normal((120, 8)).astype(np.float32)
    image = text + 0.3 * y[:, None]
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(120)], "label": np.where(y, "Fake", "real")})
    made = io.from_arrays(image, table, text)
    assert list(made.labels) == list(y) and made.table["image_id"].is_unique
    assert list(made.table.columns).count("path") == 1
    detector = Detector(head=MisalignmentMLP(max_epochs=5))
    detector.fit(made.select(np.arange(60)), made.select(np.arange(60, 120)))
    assert detector.score(made).shape == (120,)
    with pytest.raises(InputError, match="validation images are also training images"):
        detector.fit(made.select(np.arange(60)), made.select(np.arange(40, 120)))
    io.export(made, tmp_path / "x", "clip-retrieval")
    back = io.import_clip_retrieval(tmp_path / "x")
    assert list(back.table["image_id"]) == list(made.table["image_id"]), "ids that are there are kept"


def test_labels_of_a_table(tmp_path):
    def labels(*given):
        table = pd.DataFrame({"label": pd.Series(given)})
        return io.from_arrays(np.eye(len(given)), table).table["label"].to_list()

    assert labels("real", " FAKE ", "1", "0.0", "", None) == [0, 1, 1, 0, pd.NA, pd.NA]
    assert labels(1.0, np.nan, 0.0) == [1, pd.NA, 0] and labels(0, 1) == [0, 1]
    with pytest.raises(InputError, match="row 1 has the label 'maybe'; use real, fake, 0 or 1"):
        labels("real", "maybe", "perhaps")
    with pytest.raises(InputError, match="row 2 has the label '2'"):
        labels(0, 1, 2)


def test_files_that_are_no_arrays_are_named(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(3))
    (tmp_path / "x.npy").write_text("0.1, 0.2")
    (tmp_path / "t.csv").write_text("path\na\nb\nc\n")
    for image, table, message in [
        ("x.npy", "t.csv", "x.npy cannot be read"),
        ("missing.npy", "t.csv", "missing.npy cannot be read .*give a .npy"),
        ("ids.npy", "t.csv", r"image embeddings are int64 of shape \(3,\), expected floats"),
        ("ids.npy", "nothing.csv", "nothing.csv cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            io.import_npy(tmp_path / image, tmp_path / table)
