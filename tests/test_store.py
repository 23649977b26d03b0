"""The feature store on disk: what is written comes back, damage is noticed, a full disk is survived."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from itemkit import _files, store
from itemkit.errors import InputError, StoreError
from itemkit.extraction import extract
from itemkit.features import unit_rows
from itemkit.models import Models
from itemkit.steps import Steps
from itemkit.store import load_features, shard_files

from fakes import (
    FakeCaptioner,
    FakeEncoder,
    FakeLocaliser,
    FakeParser,
    fake_models,
    make_images,
    same_content,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    manifest = make_images(folder / "images", 20)
    (folder / "images" / "bad.png").write_bytes(b"not an image")
    bad = manifest[:1].assign(path=str(folder / "images" / "bad.png"))
    manifest = pd.concat([manifest, bad], ignore_index=True)
    extract(manifest, folder / "out", fake_models(), shard_size=8, batch_size=4, progress=False)
    return manifest, folder


@pytest.fixture
def made(original, tmp_path):
    """Manifest with one unusable image, and its finished store of three shards."""
    manifest, before = original
    folder = shutil.copytree(before, tmp_path / "made")  # with its times
    return manifest.assign(
        path=[path.replace(str(before), str(folder)) for path in manifest["path"]]
    ), folder / "out"


def again(manifest, out, **options):
    """Extract once more; returns the report and how many images the models saw."""
    models = fake_models()
    return extract(manifest, out, models, progress=False, **options), models.encoder.images_encoded


pytestmark = pytest.mark.filterwarnings("ignore:.*without features", "ignore:.*set aside")


# ---------------------------------------------------------------------------------------- what comes back


def test_what_is_written_comes_back(made):
    from PIL import Image

    manifest, out = made
    read = load_features(out)
    images = [Image.open(path) for path in manifest["path"][:20]]
    direct = Steps(fake_models())(images)
    for name in ("image_emb", "caption_emb", "region_emb", "phrase_emb"):
        np.testing.assert_allclose(getattr(read, name), getattr(direct, name), atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(getattr(read, name), axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(read.owner, direct.owner)
    pd.testing.assert_frame_equal(read.objects, direct.objects)
    assert set(read.objects["found"]) == {True, False} and read.objects["found"].dtype == bool
    for column in direct.table:
        assert read.table[column].tolist() == direct.table[column].tolist(), column
    assert list(read.table["path"]) == list(manifest["path"][:20])
    field = pq.read_schema(shard_files(out)[0]).field("image_emb")
    assert str(field.type) == f"fixed_size_list<element: halffloat>[{FakeEncoder().dim}]"
    narrow = load_features(out, ["image_emb"])
    assert narrow.caption_emb.shape == (20, 0) and len(narrow.objects) == len(narrow.owner) == 0
    with pytest.raises(InputError, match=r"unknown columns \['regions'\]"):
        load_features(out, ["regions"])


def test_unit_rows_by_hand():
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0, 0]], np.float32)), [[0.6, 0.8], [0, 0]])


def test_store_and_images_move_together_or_apart(made, tmp_path):
    manifest, out = made
    shutil.copytree(out.parent, tmp_path / "new")
    read = load_features(tmp_path / "new" / "out")
    assert all(path.startswith(str(tmp_path / "new")) and os.path.isfile(path) for path in read.table["path"])
    os.rename(out.parent / "images", out.parent / "photos")
    moved = manifest.assign(path=[path.replace("/images/", "/photos/") for path in manifest["path"]])
    report, seen = again(moved, out)
    assert (report.reused, seen) == (20, 0)
    assert all(map(os.path.isfile, load_features(out).table["path"]))


# ----------------------------------------------------------------------------------------- what is refused


def test_what_is_no_store_of_these_models_is_said(made, tmp_path):
    manifest, out = made
    with pytest.raises(StoreError, match="is no feature store: it has no run.json"):
        load_features(tmp_path)
    run = json.loads((out / "run.json").read_text())
    for version in (2, 4):
        (tmp_path / "run.json").write_text(json.dumps(run | {"schema_version": version}))
        for use in (load_features, lambda folder: extract(manifest, folder, fake_models(), progress=False)):
            with pytest.raises(
                StoreError, match=rf"store schema {version}, this itemkit .*: extract again .*; or update"
            ):
                use(tmp_path)
    other = Models(FakeEncoder("2"), FakeCaptioner(), FakeParser(), FakeLocaliser())
    with pytest.raises(StoreError, match=r"extracted otherwise \(encoder.version: '1' there, '2' here\)"):
        extract(manifest, out, other, progress=False)
    extract(manifest[:3], tmp_path / "other", other, progress=False)
    shutil.copy(shard_files(tmp_path / "other")[0], out / "shards")
    with pytest.raises(StoreError, match="made with other models or options than the store it lies in"):
        load_features(out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(StoreError, match=r"holds other files \(thesis.txt\) and no run.json"):
        extract(manifest, tmp_path / "full", fake_models(), progress=False)


def test_tables_of_an_older_form_are_named_and_renewed_without_a_model(made):
    manifest, out = made
    path, run = out / "manifest.parquet", store.read_run(out)
    pq.write_table(pq.read_table(path)[:20].drop_columns(["stage", "reason"]), path)
    run["checksums"][path.name] = [hashlib.sha256(path.read_bytes()).hexdigest()]
    store.write_run(out, run)
    with pytest.raises(StoreError, match="tables of an older form; extract again"):
        load_features(out)
    assert again(manifest, out)[1] == 0 and len(load_features(out)) == 20


def test_every_flipped_bit_is_noticed_and_mended(made):
    manifest, out = made
    expected, draw = load_features(out), random.Random(0)
    files = [*shard_files(out), out / "manifest.parquet", out / "errors.parquet", out / "run.json"]
    content = {path: path.read_bytes() for path in files}
    for i in range(300):
        path = draw.choice(files[:3]) if i < 200 else draw.choice(files[3:])
        bit = draw.randrange(8 * len(content[path]))
        flipped = bytearray(content[path])
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            read = load_features(out)
        except StoreError as error:
            assert path.name in str(error) or "schema" in str(error) or str(path.parent) in str(error)
        else:  # a flip in the blanks between the words of run.json
            assert json.loads(bytes(flipped)) == json.loads(content[path])
            same_content(read, expected)
        if i % 60 == 0:
            report, seen = again(manifest, out)
            lost = 8 if path in files[:2] else 4 if path in files[:3] else 0
            assert (report.reused + report.computed, report.errors, seen) == (20, 1, lost)
            same_content(load_features(out), expected)
            assert any(p.name == f"{path.name}.damaged" for p in out.rglob("*.damaged"))
            shutil.rmtree(out / "shards")
            (out / "shards").mkdir()
        for name, data in content.items():
            name.write_bytes(data)


def test_damage_is_named_by_extract_too(made):
    manifest, out = made
    first = shard_files(out)[0]
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(StoreError, match=rf"{first.name} is damaged .*Run the same extraction again"):
        load_features(out)
    with pytest.warns(UserWarning, match=f"{first.name} is damaged: set aside as"):
        assert again(manifest, out)[1] == 8
    shard_files(out)[0].unlink()
    with pytest.raises(StoreError, match="8 images|of 20 images of .* have lost their features"):
        load_features(out)
    assert again(manifest, out)[1] in (4, 8) and len(load_features(out)) == 20


def test_embeddings_that_are_not_finite_are_refused(made):
    manifest, out = made
    read = load_features(out)
    read.region_emb[3, 2] = np.nan
    read.table = read.table.assign(file_size=0, mtime_ns=0)
    shutil.rmtree(out / "shards")
    (out / "shards").mkdir()
    store.write_shard(out, read, read.run["fingerprint_hash"])
    with pytest.raises(StoreError, match="not finite"):
        load_features(out)


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
    with open(small_disk / "ballast", "ab", buffering=0) as ballast:
        for size in (65536, 1024):
            try:
                while True:
                    ballast.write(b"0" * size)
            except OSError:
                continue
    with pytest.raises(StoreError, match=r"disk is full: could not write .*intact; free some space"):
        extract(manifest, out, fake_models(), progress=False)
    assert not list(out.rglob("*tmp*"))
    np.testing.assert_array_equal(load_features(out, rows=manifest[:20]).image_emb, before.image_emb)
    (small_disk / "ballast").unlink()
    report, seen = again(manifest, out)
    assert report.reused >= 20 and seen <= 40 and len(load_features(out)) == 60


def test_read_only_store_is_read_and_not_written(tmp_path, small_disk):
    manifest, out = make_images(tmp_path / "images", 3), small_disk / "out"
    extract(manifest[:2], out, fake_models(), progress=False)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert again(manifest[:2], out)[1] == 0 and len(load_features(out)) == 2
    for folder in (out, small_disk / "new"):
        with pytest.raises(StoreError, match=r"cannot write into .*choose a folder that you may write to"):
            extract(manifest, folder, fake_models(), progress=False)


def test_leftovers_of_a_killed_run_are_removed(made):
    manifest, out = made
    for folder in (out, out / "shards"):
        (folder / ".part-000009.parquet.tmp-77").write_bytes(b"half a file")
    again(pd.concat([manifest, make_images(out.parent / "images", 1, 50)]), out)
    assert not list(out.rglob("*tmp*"))


def test_lock_ends_with_its_holder(tmp_path):
    code = "import os, pathlib\nfrom itemkit._files import folder_lock\n"
    code += f"with folder_lock(pathlib.Path({str(tmp_path)!r})):\n    os._exit(3)"
    assert subprocess.run([os.sys.executable, "-c", code]).returncode == 3
    with _files.folder_lock(tmp_path):
        pass


# ------------------------------------------------------------------------------------------- several stores


def test_shards_of_several_stores_in_one_folder_are_one_store(tmp_path):
    """As docs/scaling.md says: each machine takes every third row; then all shards into one folder."""
    manifest = make_images(tmp_path / "data", 14)
    (tmp_path / "data" / "bad.png").write_bytes(b"no image")
    shutil.copy(manifest["path"][2], tmp_path / "data" / "copy.png")
    extra = [manifest[2:3].assign(path=str(tmp_path / "data" / name)) for name in ("bad.png", "copy.png")]
    manifest = pd.concat([manifest, *extra], ignore_index=True)
    options = {"batch_size": 4, "shard_size": 4, "progress": False}
    extract(manifest, tmp_path / "whole", fake_models(), **options)
    (tmp_path / "merged" / "shards").mkdir(parents=True)
    for i in range(3):
        extract(manifest[i::3], tmp_path / str(i), fake_models(), **options)
        for path in shard_files(tmp_path / str(i)):
            shutil.copy(path, tmp_path / "merged" / "shards")
    report, seen = again(manifest, tmp_path / "merged")
    assert (report.reused, report.computed, report.errors, seen) == (15, 0, 1, 0)
    one, two = (load_features(tmp_path / name) for name in ("whole", "merged"))
    assert list(one.table["path"]) == list(two.table["path"])
    same_content(one, two)
    assert all(os.path.isfile(path) for path in two.table["path"])
    turned = manifest.assign(label=[*manifest["label"][:15], 1 - manifest["label"][2]])
    assert again(turned, tmp_path / "merged")[0].errors == 3, "labels that contradict, as in one extraction"
