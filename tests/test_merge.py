"""Stores of parts of a data set become the store of the whole."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from itemkit.errors import InputError, StoreError
from itemkit.extraction import extract, merge_stores
from itemkit.store import load_features

from fakes import FakeEncoder, Models, fake_models, make_images, manifest_of


@pytest.fixture
def made(tmp_path):
    """Two folders of images, a copy and a broken file among them; a store of each third and one of all."""
    a, b = make_images(tmp_path / "data" / "a", 7), make_images(tmp_path / "data" / "b" / "c", 12)
    (tmp_path / "data" / "bad.png").write_bytes(b"no image")
    shutil.copy(a["path"][2], tmp_path / "data" / "copy.png")
    extra = manifest_of([tmp_path / "data" / "bad.png", tmp_path / "data" / "copy.png"])
    manifest = pd.concat([a, b[7:], extra], ignore_index=True)
    manifest.loc[13, "label"] = manifest.loc[2, "label"]  # the copy's
    options = {"batch_size": 4, "shard_size": 4, "progress": False}
    extract(manifest, tmp_path / "whole", fake_models(), **options)
    parts = []
    for i in range(3):
        parts.append(tmp_path / "parts" / str(i))
        extract(manifest[i * 5 : (i + 1) * 5], parts[-1], fake_models(), **options)
    return manifest, parts, tmp_path / "whole"


def test_merged_is_as_extracted_at_once(made, tmp_path):
    manifest, parts, whole = made
    merged = merge_stores(parts, tmp_path / "merged")
    one, two = load_features(whole), load_features(merged)
    pd.testing.assert_frame_equal(one.table, two.table)
    pd.testing.assert_frame_equal(one.objects, two.objects, atol=1e-6)
    for name in ("image_emb", "caption_emb", "region_emb", "phrase_emb"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=2e-4)
    assert all(os.path.isfile(path) for path in two.table["path"])
    errors = [pd.read_parquet(out / "errors.parquet")[["path", "stage"]] for out in (whole, merged)]
    pd.testing.assert_frame_equal(*errors)
    models = fake_models()
    report = extract(manifest, merged, models, progress=False)
    assert (report.reused, report.computed, report.errors) == (13, 0, 1)
    assert models.encoder.images_encoded == 0


def test_overlapping_parts_keep_each_row_once(made, tmp_path):
    _, parts, _ = made
    read = load_features(merge_stores([*parts, parts[0]], tmp_path / "merged"))
    assert len(read) == 13 and read.table["path"].is_unique


def test_what_one_part_could_not_read_is_taken_from_another(tmp_path):
    manifest = make_images(tmp_path / "data", 6)
    late, content = tmp_path / "data" / "00001.png", (tmp_path / "data" / "00001.png").read_bytes()
    late.unlink()
    extract(manifest[:4], tmp_path / "a", fake_models(), progress=False)
    late.write_bytes(content)
    (tmp_path / "data" / "00005.png").write_bytes(b"no image")
    extract(manifest[1:], tmp_path / "b", fake_models(), progress=False)
    for parts in ("ab", "ba"):
        merged = merge_stores([tmp_path / part for part in parts], tmp_path / f"merged-{parts}")
        read = load_features(merged)
        assert sorted(os.path.basename(path) for path in read.table["path"]) == [
            f"0000{i}.png" for i in range(5)
        ]
        assert list(pd.read_parquet(merged / "errors.parquet")["path"]) == ["00005.png"]
        counts = json.loads((merged / "run.json").read_text())["counts"]
        assert counts == {"images": 6, "errors": 1, "features": 5, "shards": 2}
        models = fake_models()
        report = extract(manifest, merged, models, progress=False)
        assert (report.reused, report.errors, models.encoder.images_encoded) == (5, 1, 0)


def test_a_label_that_contradicts_another_stays_an_error(tmp_path):
    manifest = make_images(tmp_path / "data", 4)
    shutil.copy(manifest["path"][0], tmp_path / "data" / "copy.png")
    both = pd.concat([manifest, manifest[1:2].assign(path=str(tmp_path / "data" / "copy.png"))])
    extract(both, tmp_path / "a", fake_models(), progress=False)
    extract(manifest[:1], tmp_path / "b", fake_models(), progress=False)  # knows of no copy
    for parts in ("ab", "ba"):
        merged = merge_stores([tmp_path / part for part in parts], tmp_path / f"merged-{parts}")
        assert len(load_features(merged)) == 3
        errors = pd.read_parquet(merged / "errors.parquet")
        assert sorted(errors["path"]) == ["00000.png", "copy.png"] and set(errors["stage"]) == {"label"}


class ShortEncoder(FakeEncoder):
    """Reads four words."""

    def fingerprint(self) -> dict:
        return super().fingerprint() | {"context_length": 4}


def test_cut_captions_are_counted_over_all_parts(tmp_path):
    fakes = fake_models()
    models = Models(ShortEncoder(), fakes.captioner, fakes.parser, fakes.localiser)
    manifest = make_images(tmp_path / "data", 6).assign(caption=["a dog"] * 3 + ["a dog and a red ball"] * 3)
    options = {"captions": "user", "progress": False}
    for name, rows in (("whole", slice(6)), ("a", slice(4)), ("b", slice(3, 6))):
        extract(manifest[rows], tmp_path / name, models, **options)
    run = json.loads(
        (merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "ab") / "run.json").read_text()
    )
    expected = json.loads((tmp_path / "whole" / "run.json").read_text())["captions"]
    assert run["captions"] == expected == {"cut": 3, "room": 4, "longest": 6, "first": "00003.png"}
    report = extract(manifest, tmp_path / "ab", models, **options)
    assert (report.reused, report.captions) == (6, expected)


def test_what_does_not_belong_together_is_said(made, tmp_path):
    manifest, parts, _ = made
    with pytest.raises(InputError, match="no stores"):
        merge_stores([], tmp_path / "x")
    with pytest.raises(InputError, match="is not empty"):
        merge_stores(parts, parts[0])
    fakes = fake_models()
    other = Models(FakeEncoder("2"), fakes.captioner, fakes.parser, fakes.localiser)
    extract(manifest[:2], tmp_path / "other", other, progress=False)
    with pytest.raises(StoreError, match="other models or options than"):
        merge_stores([*parts, tmp_path / "other"], tmp_path / "x")
    turned = manifest[2:3].assign(label=1 - manifest["label"][2])
    extract(turned, tmp_path / "turned", fake_models(), progress=False)
    again = merge_stores([tmp_path / "turned", parts[1]], tmp_path / "fine")
    assert len(load_features(again)) == 6
    with pytest.raises(InputError, match=r"same content have different labels in the 2 stores: .*copy.png"):
        merge_stores([tmp_path / "turned", parts[2]], tmp_path / "x")
    run = json.loads((parts[1] / "run.json").read_text())
    (parts[1] / "run.json").write_text(json.dumps(run | {"complete": False}))
    with pytest.raises(StoreError, match="is not finished; run it again"):
        merge_stores(parts, tmp_path / "x")
    assert not (tmp_path / "x").exists()
