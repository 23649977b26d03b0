"""The store on disk: what is written comes back, and nothing that is not a whole store is taken for one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from itemkit import _files, schema, store
from itemkit.errors import InputError, StoreError
from itemkit.extraction import extract
from itemkit.steps import featurise
from itemkit.store import StoreWriter, load_features

from fakes import DIM, FakeEncoder, Models, fake_models, make_images


@pytest.fixture
def made(tmp_path):
    manifest = make_images(tmp_path / "data" / "images", 20)
    extract(manifest, tmp_path / "data" / "out", fake_models(), batch_size=8, shard_size=8, progress=False)
    return manifest, tmp_path / "data" / "out"


def test_what_is_written_comes_back(made):
    manifest, out = made
    read = load_features(out)
    direct = featurise([Image.open(path) for path in manifest["path"]], fake_models())
    assert list(read.table["path"]) == list(manifest["path"])
    assert list(read.labels) == list(manifest["label"]) and read.table["label"].dtype == "Int8"
    assert list(read.table["caption"]) == list(direct.table["caption"])
    np.testing.assert_array_equal(read.table["caption_logprob"], direct.table["caption_logprob"])
    np.testing.assert_array_equal(read.owner, direct.owner)
    assert list(read.objects["phrase"]) == list(direct.objects["phrase"])
    for name in ("image_emb", "caption_emb", "region_emb", "phrase_emb"):
        stored, exact = getattr(read, name), getattr(direct, name)
        assert stored.dtype == np.float32 and stored.shape == exact.shape
        # float16 has 11 bits: an element below 1 is off by at most 2^-12, the cosine by far less
        np.testing.assert_allclose(stored, exact, atol=2.0**-11)
        np.testing.assert_allclose((stored * exact).sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-6)
    for name in ("x0", "y0", "x1", "y1", "score"):
        np.testing.assert_array_equal(read.objects[name], direct.objects[name])
    assert 0 in set(read.table["n_objects"]), "the fakes should include an image without objects"


def test_embeddings_are_fixed_size_float16(made):
    found = pq.read_schema(store.shard_files(made[1])[0])
    assert found.field("image_emb").type == pa.list_(pa.field("item", pa.float16()), DIM)
    assert found.field("region_emb").type.value_type.list_size == DIM
    assert len(store.shard_files(made[1])) == 3  # 8 + 8 + 4 images


@pytest.mark.parametrize("columns", [("image_emb",), ("caption_emb",), ("objects",), ()])
def test_only_the_asked_columns_take_memory(made, columns):
    whole, part = load_features(made[1]), load_features(made[1], columns)
    pd.testing.assert_frame_equal(whole.table, part.table)
    for name in ("image_emb", "caption_emb"):
        expected = getattr(whole, name) if name in columns else np.zeros((20, 0), np.float32)
        np.testing.assert_array_equal(getattr(part, name), expected)
    n_objects = len(whole.objects) if "objects" in columns else 0
    assert len(part.objects) == len(part.owner) == len(part.region_emb) == n_objects


def test_unknown_column_is_named(made):
    with pytest.raises(InputError, match=r"unknown columns \['text_emb'\].*image_emb"):
        load_features(made[1], ["text_emb"])


def test_unit_rows_by_hand():
    x = np.array([[3, 4], [0, 2], [0, 0]], np.float32)
    np.testing.assert_allclose(store.unit_rows(x), [[0.6, 0.8], [0, 1], [0, 0]])


def test_ranges_by_hand():
    assert store._ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert store._ranges(np.array([], int), np.array([], int)).tolist() == []


def test_store_and_images_can_be_moved_together(made, tmp_path):
    run = json.loads((made[1] / "run.json").read_text())
    assert run["root"] == "../images"
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    read = load_features(tmp_path / "elsewhere" / "out")
    assert all(os.path.isfile(path) for path in read.table["path"])
    other = load_features(tmp_path / "elsewhere" / "out", root="/photos")
    assert other.table["path"][0] == os.path.join("/photos", "00000.png")


def test_moved_images_are_not_computed_again(made, tmp_path):
    manifest, out = made
    shutil.move(tmp_path / "data" / "images", tmp_path / "other")
    moved = manifest.assign(path=[path.replace("/data/images/", "/other/") for path in manifest["path"]])
    models = fake_models()
    report = extract(moved, out, models, progress=False)
    assert (report.reused, report.computed, models.encoder.images_encoded) == (20, 0, 0)
    assert list(load_features(out).table["path"]) == list(moved["path"])


@pytest.mark.parametrize(
    ("version", "advice"), [(0, "extract again into another folder"), (99, "update itemkit"), (None, "again")]
)
def test_another_schema_is_recognised(made, version, advice):
    path = made[1] / "run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"schema_version": version}))
    for use in (
        lambda: load_features(made[1]),
        lambda: extract(made[0], made[1], fake_models(), progress=False),
    ):
        with pytest.raises(StoreError, match=f"schema {version}, this itemkit reads schema .*{advice}"):
            use()
    assert len(store.shard_files(made[1])) == 3


def test_what_is_no_store_is_said_to_be_none(tmp_path):
    with pytest.raises(StoreError, match=r"no feature store: it has no run.json.*itemkit extract"):
        load_features(tmp_path)


def test_a_folder_with_other_things_is_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    manifest = make_images(tmp_path / "images", 2)
    with pytest.raises(StoreError, match=r"holds other files \(images, thesis.tex\).*new or empty folder"):
        extract(manifest, tmp_path, fake_models(), progress=False)
    assert sorted(os.listdir(tmp_path)) == [".lock", "images", "shards", "thesis.tex"]


def test_another_model_is_refused_and_named(made):
    other = Models(
        FakeEncoder("2"), *(getattr(fake_models(), n) for n in ("captioner", "parser", "localiser"))
    )
    with pytest.raises(StoreError, match=r'extracted otherwise \(encoder.version: "1" there, "2" here\)'):
        extract(made[0], made[1], other, progress=False)


def test_damaged_shard_is_named_and_computed_again(made):
    manifest, out = made
    before = load_features(out)
    shard = store.shard_files(out)[0]
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(StoreError, match=rf"{shard.name} is damaged.*only its images are computed anew"):
        load_features(out)
    models = fake_models()
    extract(manifest, out, models, progress=False)
    assert 0 < models.encoder.images_encoded < 20
    np.testing.assert_array_equal(load_features(out).image_emb, before.image_emb)


def test_lost_shard_is_noticed(made):
    store.shard_files(made[1])[0].unlink()
    with pytest.raises(StoreError, match=r"of 20 images of .* have lost their features"):
        load_features(made[1])


def test_leftovers_of_a_killed_run_are_removed(made):
    manifest, out = made
    for folder in (out, out / "shards"):
        (folder / ".x.parquet.tmp-123").write_bytes(b"half")
    extract(manifest, out, fake_models(), progress=False)
    assert not list(out.rglob("*tmp*"))


# ------------------------------------------------------------------------------------------------- the lock


def test_second_writer_is_told(made):
    manifest, out = made
    run = json.loads((out / "run.json").read_text())
    with StoreWriter(out, run):
        with pytest.raises(StoreError, match=rf"another run is writing to .*process {os.getpid()} on .*Wait"):
            extract(manifest, out, fake_models(), progress=False)
        load_features(out)  # reading is always possible
    extract(manifest, out, fake_models(), progress=False)


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from itemkit._files import FolderLock\n"
        "FolderLock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] != os.getpid()
    with _files.FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_without_file_locks_the_process_number_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "fcntl", None)
    me = _files._whoami()
    for changed, alive in [
        ({}, True),
        ({"boot": "another"}, False),  # the machine was started anew
        ({"started": "1"}, False),  # the number now belongs to another process
        ({"host": "another"}, True),  # cannot be asked
    ]:
        (tmp_path / ".lock").write_text(json.dumps(me | changed))
        if alive:
            with pytest.raises(StoreError, match="another run is writing"), _files.FolderLock(tmp_path):
                pass
        else:
            with _files.FolderLock(tmp_path):
                pass
    (tmp_path / ".lock").write_text("not json")
    with _files.FolderLock(tmp_path):
        pass


# ------------------------------------------------------------------------------------ disks that do not play


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_leaves_the_store_intact(tmp_path, small_disk):
    manifest, out = make_images(tmp_path / "images", 60), small_disk / "out"
    extract(manifest[:20], out, fake_models(), progress=False)
    before = load_features(out)
    (small_disk / "ballast").write_bytes(b"0" * 350_000)
    while True:  # fill what is left
        try:
            with open(small_disk / "ballast", "ab") as file:
                file.write(b"0" * 1024)
        except OSError:
            break
    with pytest.raises(StoreError, match=r"disk is full: could not write .*intact; free some space"):
        extract(manifest, out, fake_models(), progress=False)
    assert not list(out.rglob("*tmp*"))
    after = load_features(out, partial=True)
    np.testing.assert_array_equal(after.image_emb[:20], before.image_emb)
    (small_disk / "ballast").unlink()
    models = fake_models()
    assert extract(manifest, out, models, progress=False).reused >= 20
    assert len(load_features(out)) == 60 and models.encoder.images_encoded <= 40


def test_read_only_folder_is_a_clear_error(tmp_path, small_disk):
    manifest, out = make_images(tmp_path / "images", 3), small_disk / "out"
    extract(manifest[:2], out, fake_models(), progress=False)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for folder in (out, small_disk / "new"):
        with pytest.raises(StoreError, match=r"cannot write into .*choose a folder that you may write to"):
            extract(manifest, folder, fake_models(), progress=False)
    assert len(load_features(out)) == 2


def test_concat_keeps_owners(made):
    read = load_features(made[1])
    both = store.concat_features([read.select(np.arange(12)), read.select(np.arange(12, 20))])
    pd.testing.assert_frame_equal(both.table, read.table)
    np.testing.assert_array_equal(both.owner, read.owner)
    np.testing.assert_array_equal(both.region_emb, read.region_emb)
    with pytest.raises(InputError, match="no features"):
        store.concat_features([])


def test_run_json_says_what_made_the_store(made):
    run = json.loads((made[1] / "run.json").read_text())
    assert run["schema_version"] == schema.SCHEMA_VERSION and run["complete"]
    assert run["fingerprint"]["encoder"] == {"name": "fake-encoder", "version": "1"}
    assert run["counts"] == {"images": 20, "errors": 0, "features": 20, "shards": 3}
    assert {"itemkit", "torch", "pyarrow", "pillow"} <= set(run["versions"])
    assert str(made[1].parent) not in json.dumps(run), "a store must not carry a path of this machine"
