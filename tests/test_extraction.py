"""The extraction: every row is accounted for, nothing is computed twice, how it is run changes nothing."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from itemkit import _files, decode, extraction
from itemkit.decode import DecodeConfig, Item, Reader, batches
from itemkit.errors import InputError, ItemkitError, StoreError
from itemkit.extraction import extract
from itemkit.models import Models
from itemkit.steps import Steps, TextCache
from itemkit.store import load_features, read_run

from fakes import (
    Brightened,
    FakeCaptioner,
    FakeEncoder,
    FakeLocaliser,
    FakeParser,
    fake_models,
    make_images,
    manifest_of,
    png,
    same_content,
)


def errors_of(out):
    return pd.read_parquet(out / "errors.parquet")


def with_(captioner=None, encoder=None):
    return Models(encoder or FakeEncoder(), captioner or FakeCaptioner(), FakeParser(), FakeLocaliser())


# -------------------------------------------------------------------------------- nothing depends on it


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    manifest = make_images(folder / "images", 23)
    extract(manifest, folder / "out", fake_models(), progress=False)
    return manifest, load_features(folder / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 7, "shard_size": 3},
        {"batch_size": 500, "decode": DecodeConfig(threads=4)},
        {"batch_size": 4, "decode": DecodeConfig(threads=3, prefetch=2)},
        {"batch_size": 4, "decode": DecodeConfig(threads=3, max_pixels=200)},
        {"batch_size": 4, "decode": DecodeConfig(threads=3, max_pixels=1, prefetch=1)},
        {"batch_size": 4, "decode": DecodeConfig(threads=2, processes=True)},
        {"batch_size": 4, "decode": DecodeConfig(threads=2, processes=True, max_pixels=200, prefetch=2)},
    ],
)
def test_how_it_is_run_changes_nothing(reference, tmp_path, options):
    manifest, expected = reference
    assert extract(manifest, tmp_path, fake_models(), progress=False, **options).computed == 23
    same_content(load_features(tmp_path), expected)


def test_order_changes_nothing(reference, tmp_path):
    manifest, expected = reference
    turned = manifest[::-1]
    extract(turned, tmp_path, fake_models(), batch_size=5, progress=False)
    read = load_features(tmp_path)
    assert list(read.table["path"]) == list(turned["path"])
    same_content(read, expected)
    asked = load_features(tmp_path, rows=manifest)
    assert list(asked.table["path"]) == list(manifest["path"])


def test_texts_are_encoded_once_within_a_bound(tmp_path):
    models = fake_models()
    extract(make_images(tmp_path / "images", 40), tmp_path / "out", models, batch_size=3, progress=False)
    texts = models.encoder.texts_encoded
    assert len(texts) == len(set(texts)) > 10
    encoder = FakeEncoder()
    cache = TextCache(encoder, max_bytes=3 * (4 * encoder.dim + 300))
    for texts in (list("abc"), list("da"), list("abcdef"), ["f"]):
        expected = FakeEncoder().encode_texts(texts).numpy()
        np.testing.assert_array_equal(cache.embed(texts), expected)
    assert encoder.texts_encoded == list("abcdabcdeff")


def test_a_localiser_that_reads_words_gets_one_phrase_for_each_object():
    class Reads(FakeLocaliser):
        needs_phrases = True

        def locate(self, images, embedding, phrase_emb, owner, phrases):
            assert len(phrases) == len(owner) == len(phrase_emb)
            self.read = list(phrases)
            return super().locate(images, embedding, phrase_emb, owner)

    localiser = Reads()
    models = Models(FakeEncoder(), FakeCaptioner(), FakeParser(), localiser)
    image = Image.new("RGB", (9, 9))
    features = Steps(models)([image] * 2, ["a red ball and a cup", "a dog"])
    assert localiser.read == features.objects["phrase"].tolist() == ["red ball", "cup", "dog"]
    assert features.owner.tolist() == [0, 0, 1]


def test_a_captioner_may_answer_with_plain_texts(tmp_path):
    class Plain:
        def caption(self, images):
            return ["a dog and half a \ud83d character" for _ in images]

        def fingerprint(self):
            return {"name": "plain"}

    report = extract(make_images(tmp_path / "i", 2), tmp_path / "out", with_(Plain()), progress=False)
    read = load_features(tmp_path / "out")
    assert report.computed == 2 and read.table["caption"][0] == "a dog and half a ? character"
    assert read.table["caption_logprob"].isna().all()


# ------------------------------------------------------------------------------------- nothing is done twice


class Counted:
    """A preset: knows its fingerprint, counts how often its models are loaded."""

    def __init__(self):
        self.loaded, self.captioner = 0, "a name"

    def fingerprint(self, captions="generate", device="auto"):
        found = fake_models().fingerprint(captions)
        return found | {"encoder": found["encoder"] | {"dim": FakeEncoder().dim}}

    def record(self):
        return {"name": "counted"}

    def build(self, device="auto"):
        self.loaded += 1
        models = fake_models()
        plain = models.encoder.fingerprint()
        models.encoder.fingerprint = lambda: plain | {"dim": models.encoder.dim}
        return models


def test_a_hit_loads_no_model_takes_no_lock_opens_no_image_and_writes_nothing(tmp_path, monkeypatch):
    manifest = make_images(tmp_path / "images", 12)
    shutil.copy(manifest["path"][0], tmp_path / "images" / "copy.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"not an image")
    lost = tmp_path / "images" / "lost.png"
    extra = manifest_of([tmp_path / "images" / "copy.png", tmp_path / "images" / "bad.png", lost])
    manifest = pd.concat([manifest, extra], ignore_index=True)
    out, preset = tmp_path / "out", Counted()
    with pytest.warns(UserWarning, match="1 image without"):
        extract(manifest, out, preset, progress=False)
    assert preset.loaded == 1

    def refuse(*args, **kwargs):
        raise AssertionError("a hit must not do that")

    def listing():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [out, *out.rglob("*")]}

    before, mode = listing(), out.stat().st_mode
    os.chmod(out, 0o555)
    for module, name in ((extraction, "folder_lock"), (_files, "atomic_write"), (decode, "open_image")):
        monkeypatch.setattr(module, name, refuse)
    for rows in (manifest, manifest[3:7], manifest[::-1], manifest[12:13]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = extract(rows, out, preset, progress=False)
        assert (report.n, report.computed, report.reused + report.errors) == (len(rows), 0, len(rows))
    assert preset.loaded == 1 and listing() == before
    assert load_features(out).provenance["preset"] == "counted"
    os.chmod(out, mode)


def test_two_notebooks_at_once_compute_everything_once(tmp_path, capfd):
    manifest, out = make_images(tmp_path / "images", 20), tmp_path / "out"
    models = [fake_models(delay_s=0.02) for _ in range(2)]
    reports = [None, None]

    def run(i):
        reports[i] = extract(manifest, out, models[i], batch_size=4, progress=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((r.computed, r.reused) for r in reports) == [(0, 20), (20, 0)]
    assert sum(m.encoder.images_encoded for m in models) == 20 == len(load_features(out))
    assert f"another run is writing to {out}: waiting" in capfd.readouterr().err


def test_only_new_and_changed_images_are_computed(tmp_path, monkeypatch):
    manifest, out = make_images(tmp_path / "images", 100), tmp_path / "out"
    extract(manifest, out, fake_models(), progress=False)
    assert extract(manifest, out, fake_models(), progress=False).reused == 100
    (tmp_path / "images" / "00003.png").write_bytes(png(99))
    grown = pd.concat([manifest, make_images(tmp_path / "images", 1, 100)], ignore_index=True)
    models, made = fake_models(), []
    for name in ("_plan", "conclude"):
        real = getattr(extraction.Job, name)

        def noted(job, *args, name=name, real=real):
            made.append(name.strip("_"))
            return real(job, *args)

        monkeypatch.setattr(extraction.Job, name, noted)
    report = extract(grown, out, models, progress=False)
    assert (report.reused, report.computed, models.encoder.images_encoded) == (99, 2, 2)
    assert made == ["plan", "conclude"], "not planned again under the lock, where nothing has happened since"
    os.utime(manifest["path"][5])  # touched, not changed: read, and known again
    assert extract(grown, out, models, progress=False).reused == 101 and models.encoder.images_encoded == 2


def test_images_added_later_move_no_split(tmp_path):
    manifest = make_images(tmp_path / "images", 40).drop(columns="split")
    extract(manifest[:30], tmp_path / "out", fake_models(), progress=False)
    before = load_features(tmp_path / "out").table.set_index("path")["split"]
    extract(manifest[::-1], tmp_path / "out", fake_models(), progress=False)
    after = load_features(tmp_path / "out").table.set_index("path")["split"]
    assert set(before) == {"train", "val", "test"} and (after[before.index] == before).all()


def test_a_part_of_the_manifest_cuts_nothing_off(tmp_path):
    manifest, out = make_images(tmp_path / "images", 12), tmp_path / "out"
    extract(manifest, out, fake_models(), progress=False)
    extract(manifest[manifest["split"] == "test"], out, fake_models(), progress=False)
    assert list(load_features(out).table["path"]) == list(manifest["path"])
    more = pd.concat([manifest[4:6], make_images(tmp_path / "images", 2, 20)])
    assert extract(more, out, fake_models(), progress=False).computed == 2
    assert len(load_features(out)) == 14
    assert list(load_features(out, rows=more).table["path"]) == list(more["path"])
    assert len(load_features(out, ["image_emb"], rows=manifest["path"][:3])) == 3
    with pytest.raises(StoreError, match=r"1 image of 1 not in .*, first: /x/y.png; run the extraction"):
        load_features(out, rows=["/x/y.png"])


def test_labels_are_corrected_without_computing(tmp_path):
    manifest, out = make_images(tmp_path / "images", 4), tmp_path / "out"
    extract(manifest, out, fake_models(), progress=False)
    models = fake_models()
    turned = manifest[:1].assign(label=1, source="corrected")
    assert extract(turned, out, models, progress=False).reused == 1
    read = load_features(out, rows=manifest).table
    assert models.encoder.images_encoded == 0
    assert read["label"].tolist() == [1, 1, 0, 1] and read["source"].tolist() == ["corrected"] + ["test"] * 3


def test_copies_share_features_and_contradicting_labels_name_both(tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    manifest = make_images(folder, 4)
    shutil.copy(folder / "00000.png", folder / "copy.png")
    both = pd.concat([manifest, manifest[:1].assign(path=str(folder / "copy.png"))])
    report = extract(both, out, fake_models(), progress=False)
    assert (report.computed, report.copies) == (4, 1)
    read = load_features(out)
    np.testing.assert_array_equal(read.image_emb[0], read.image_emb[4])
    assert read.table["image_id"].nunique() == 4
    turned = both.assign(label=[0, 1, 0, 1, 1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert extract(turned, out, fake_models(), progress=False).errors == 2
    assert "00000.png: labelled real, but copy.png has the same content and is labelled fake" in str(said[0])
    assert len(load_features(out)) == 3 and set(errors_of(out)["stage"]) == {"label"}
    # what a later run says of a content stands
    extract(turned[4:], out, fake_models(), progress=False)
    read = load_features(out).table
    assert {Path(p).name: label for p, label in zip(read["path"], read["label"], strict=True)} == {
        "copy.png": 1, "00001.png": 1, "00002.png": 0, "00003.png": 1,
    }  # fmt: skip


# ------------------------------------------------------------------------------ every row is accounted for


def odd_files(folder):
    """File name to (what makes it, stage of its error, a word of the reason); names may be bytes."""
    folder.mkdir()
    whole = png(1, (40, 40))
    files = {
        b"text.jpg": (b"hello", "decode", "image"),
        b"empty.png": (b"", "decode", "empty"),
        b"cut.png": (whole[: len(whole) // 2], "decode", "truncated"),
        b"caf\xe9.png": (whole, "path", "not UTF-8"),
        "日本語 ☃.png".encode(): (whole, None, ""),
        b"esc\x1b[31m.png": (b"hello", "decode", "image"),
        b"line\nbreak.png": (b"hello", "decode", "image"),
    }
    for name, (content, _, _) in files.items():
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(content)
    (folder / "folder.png").mkdir()
    files[b"folder.png"] = (None, "read", "folder")
    files[b"gone.png"] = (None, "read", "no such file")
    files[b"nul\0byte.png"] = (None, "read", "cannot be")
    files[b"C:\\photos\\a.png"] = (None, "read", "no such file")
    return files


@pytest.mark.skipif(os.name == "nt", reason="such names do not exist there")
def test_every_row_is_a_feature_or_an_error(tmp_path):
    files, out = odd_files(tmp_path / "images"), tmp_path / "out"
    paths = [os.fsdecode(os.path.join(os.fsencode(tmp_path / "images"), name)) for name in files]
    with pytest.warns(UserWarning, match="without features"):
        report = extract(manifest_of(paths).assign(note="\udce9"), out, fake_models(), progress=False)
    assert (report.n, report.computed, report.errors) == (11, 1, 10)
    errors = errors_of(out).set_index("path")
    for name, (_, stage, word) in files.items():
        told = name.decode("utf-8", "backslashreplace")
        if stage is None:
            assert told not in errors.index
            continue
        row = errors.loc[told]
        assert row["stage"] == stage and word in row["reason"], row["reason"]
        assert row["reason"].isprintable() and "  " not in row["reason"]
        assert str(tmp_path) not in row["reason"]
    assert load_features(out).table["note"].tolist() == ["\\xe9"]
    models = fake_models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = extract(manifest_of(paths).assign(note="\udce9"), out, models, progress=False)
    assert (again.reused, again.errors) == (1, 10)


def test_errors_are_tried_again_when_asked_or_when_the_file_changed(tmp_path, monkeypatch):
    manifest, out = make_images(tmp_path / "images", 3), tmp_path / "out"
    bad = tmp_path / "images" / "00001.png"
    bad.write_bytes(b"not an image")
    reads = []
    real = decode.read_bytes
    monkeypatch.setattr(decode, "read_bytes", lambda path: reads.append(path) or real(path))
    options = {"progress": False}
    with pytest.warns(UserWarning, match="--retry-errors"):
        extract(manifest, out, fake_models(), **options)
    reads.clear()
    with pytest.warns(UserWarning):
        assert extract(manifest, out, fake_models(), **options).errors == 1 and not reads
        assert extract(manifest, out, fake_models(), retry_errors=True, **options).errors == 1
    assert len(reads) == 1
    bad.write_bytes(png(50))
    assert extract(manifest, out, fake_models(), **options).computed == 1
    assert len(errors_of(out)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.drop(columns="path"), "no column 'path'"),
        (lambda m: m[:0], "no rows"),
        (lambda m: m.assign(path=[None, *m["path"][1:]]), "row 0 of the manifest has the path None"),
        (lambda m: m.assign(path=7), "row 0 of the manifest has the path 7"),
        (lambda m: m.assign(label=2), "row 0 of the manifest has the label 2"),
        (lambda m: m.assign(label="real"), "row 0 of the manifest has the label 'real'; give 0 for"),
    ],
)
def test_unusable_manifest(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        extract(change(make_images(tmp_path / "i", 2)), tmp_path / "out", fake_models(), progress=False)
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_values_are_taken(tmp_path):
    manifest = make_images(tmp_path / "i", 3)
    mixed = manifest.assign(
        path=[Path(p) for p in manifest["path"]], label=[0.0, np.nan, 1.0], year=[1, "two", None]
    )
    mixed["generator"] = pd.Series(["a", None, "b"], dtype="category")
    extract(mixed, tmp_path / "out", fake_models(), progress=False)
    read = load_features(tmp_path / "out").table
    assert read["label"].tolist() == [0, pd.NA, 1]
    assert read["year"].tolist() == ["1", "two", None], "what mixes kinds becomes text"
    # so does another run's column of the same name and another kind
    extract(
        make_images(tmp_path / "i", 1, 5).assign(year=1999), tmp_path / "out", fake_models(), progress=False
    )
    assert load_features(tmp_path / "out").table["year"].tolist() == ["1999", "1", "two", None]


def test_texts_as_arrow_keeps_them(tmp_path):
    with pd.option_context("future.infer_string", True):
        manifest = make_images(tmp_path / "i", 3)
        manifest["caption"] = ["a dog", "a cat and a red ball", "nothing"]
        for captions in ("user", "generate"):
            extract(manifest, tmp_path / captions, fake_models(), captions=captions, progress=False)
            assert len(load_features(tmp_path / captions, rows=manifest)) == 3
        assert (
            extract(manifest, tmp_path / "user", fake_models(), captions="user", progress=False).reused == 3
        )


@pytest.mark.parametrize(
    "option",
    [{"captions": "none"}, {"missing": "skip"}, {"batch_size": 0}],
)
def test_unknown_options(tmp_path, option):
    with pytest.raises(InputError, match=f"got .*{next(iter(option))}="):
        extract(make_images(tmp_path / "i", 1), tmp_path / "out", fake_models(), progress=False, **option)


def test_what_the_run_was_stands_in_run_json(tmp_path):
    manifest = make_images(tmp_path / "images", 6)
    manifest.attrs["report"] = {"images": 6, "left out": {".txt": 2}}
    extract(manifest[:5], tmp_path / "out", Counted(), progress=False)
    run = read_run(tmp_path / "out")
    assert run["manifest"] == {"images": 6, "left out": {".txt": 2}} and run["complete"]
    assert run["counts"] == {"images": 5, "errors": 0} and run["config"] == {"name": "counted"}
    assert {"itemkit", "torch", "pyarrow", "pillow"} <= set(run["versions"])
    assert str(tmp_path) not in str(run), "a store must not carry a path of this machine"


def test_global_features_alone(tmp_path):
    models = Models(FakeEncoder(), FakeCaptioner())
    extract(make_images(tmp_path / "images", 3), tmp_path / "out", models, progress=False)
    read = load_features(tmp_path / "out")
    assert len(read.objects) == 0 and read.region_emb.shape == (0, read.dim)


def test_transform_sees_the_content_id_and_is_part_of_the_fingerprint(tmp_path):
    manifest, transform = make_images(tmp_path / "images", 3), Brightened(40)
    extract(manifest, tmp_path / "out", fake_models(), transform=transform, progress=False)
    assert sorted(transform.seen) == sorted(load_features(tmp_path / "out").table["image_id"])
    with pytest.raises(StoreError, match=r"extracted otherwise \(transform"):
        extract(manifest, tmp_path / "out", fake_models(), progress=False)
    with pytest.raises(InputError, match="no fingerprint"):
        extract(manifest, tmp_path / "b", fake_models(), transform=lambda image, name: image, progress=False)


def test_jpeg_at_a_fraction_is_another_store(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    small = Image.open(make_images(tmp_path / "i", 1)["path"][0])
    for name, size in (("large.jpg", (240, 200)), ("small.jpg", (30, 25)), ("large.png", (240, 200))):
        small.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    manifest, decoded = manifest_of(sorted(folder.iterdir())), DecodeConfig(least_side=60)
    extract(manifest, tmp_path / "out", fake_models(), decode=decoded, progress=False)
    # 240 x 200 halved is 120 x 100, its shorter side above 60; a quarter would be below
    assert load_features(tmp_path / "out").table["width"].tolist() == [120, 240, 30]
    with pytest.raises(StoreError, match=r"extracted otherwise \(decode"):
        extract(manifest, tmp_path / "out", fake_models(), progress=False)


# ------------------------------------------------------------------------------------- decoding processes


class Hungry(FakeEncoder):
    """Runs out of memory above a number of images."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error = most, error

    def encode_images(self, pixels, patches=False):
        if len(pixels) > self.most:
            raise self.error
        return super().encode_images(pixels, patches)


class Split(FakeEncoder):
    """Its preprocessing ends before the pixels are normalised, as that of `itemkit.encoder`."""

    def resize(self, image):
        return np.array(image.resize((8, 8), Image.Resampling.BOX))

    def encode_images(self, pixels, patches=False):
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
        return super().encode_images(pixels.float() / 255 - 0.5, patches)


def decoded(paths, config, lag=0, **options):
    """Items of all batches, with the pixels that they had."""
    reader = Reader(config, Split().resize, known={"": 0}, **options)
    items = (Item(row, str(path), Path(path).name) for row, path in enumerate(paths))
    return [replace(item) for batch in batches(items, reader, lambda: 3, lag) for item in batch]


@pytest.mark.parametrize("lag", [0, 1])
def test_processes_decode_what_threads_decode(tmp_path, lag):
    make_images(tmp_path / "good", 9)
    odd_files(tmp_path / "odd")
    paths = [*sorted((tmp_path / "good").iterdir()), *sorted((tmp_path / "odd").iterdir()), tmp_path / "gone"]
    transform = {"transform": Brightened(7), "look": lambda image: np.asarray(image)[::2]}
    threads, processes = (
        decoded(paths, DecodeConfig(threads=2, processes=on, max_pixels=700), lag, **transform)
        for on in (False, True)
    )
    assert [item.row for item in threads] == [item.row for item in processes] == list(range(len(paths)))
    assert sum(item.pixels is not None for item in threads) >= 10
    for a, b in zip(threads, processes, strict=True):
        for name in ("pixels", "shown", "image"):
            x, y = getattr(a, name), getattr(b, name)
            np.testing.assert_array_equal(*(None if v is None else np.asarray(v) for v in (x, y)))
        plain = {name: None for name in ("pixels", "shown", "image")}
        assert replace(a, **plain) == replace(b, **plain)


def test_where_no_model_looks_at_an_image_its_size_stands_for_it(tmp_path):
    make_images(tmp_path, 2)
    (item, _) = decoded(sorted(tmp_path.iterdir()), DecodeConfig(threads=1, processes=True), keep=False)
    assert item.image.size == (item.image.width, item.image.height) == (8, 8) and item.pixels is not None


def test_the_captioners_preprocessing_is_done_where_images_are_decoded(reference, tmp_path):
    manifest, expected = reference

    class Prepared(FakeCaptioner):
        def preprocess(self, image):
            return image, os.getpid()

        def caption(self, shown):
            assert all(pid != os.getpid() for _, pid in shown)
            return super().caption([image for image, _ in shown])

    models = with_(Prepared(), Split())
    extract(manifest, tmp_path, models, decode=DecodeConfig(threads=2, processes=True), progress=False)
    same_content(load_features(tmp_path), expected)


@pytest.mark.parametrize(
    ("end", "why"),
    [(lambda: os.kill(os.getpid(), signal.SIGKILL), "exit code -9"), (lambda: time.sleep(600), "over 1 s")],
)
def test_an_image_that_crashes_or_hangs_a_decoder_costs_one_row(tmp_path, monkeypatch, end, why):
    manifest, out = make_images(tmp_path / "images", 12), tmp_path / "out"
    real, there = decode.load_image, multiprocessing.active_children()

    def load(data, name, **options):
        if name in ("00002.png", "00007.png"):
            end()
        return real(data, name=name, **options)

    monkeypatch.setattr(decode, "load_image", load)
    monkeypatch.setattr(decode, "HANG_SECONDS", 1)
    config = DecodeConfig(threads=2, processes=True)
    with pytest.warns(UserWarning, match="2 images without features .step 'worker'"):
        report = extract(manifest, out, fake_models(), decode=config, batch_size=4, progress=False)
    assert (report.computed, report.errors) == (10, 2)
    assert errors_of(out)["reason"].str.contains(f"the process that decodes images died on it .*{why}").all()
    assert {*multiprocessing.active_children()} <= {*there}
    monkeypatch.undo()  # it may have been short of memory: the next run tries again
    assert extract(manifest, out, fake_models(), progress=False).computed == 2


def test_what_no_process_can_hand_over_is_the_preprocessings_fault(tmp_path):
    class Odd(FakeCaptioner):
        def preprocess(self, image):
            return lambda: image

    with pytest.raises(ItemkitError, match="step 'preprocess' failed on 9 images in a row .*pickle"):
        extract(
            make_images(tmp_path / "i", 9), tmp_path / "out", with_(Odd()), progress=False,
            decode=DecodeConfig(threads=1, processes=True),
        )  # fmt: skip


def test_processes_are_for_gpus_with_many_cores(monkeypatch):
    monkeypatch.setattr(decode.sys, "platform", "linux")
    for device, threads, expected in (("cuda", 5, True), ("cuda", 4, False), ("cpu", 64, False)):
        assert DecodeConfig(threads=threads).beside(device).processes is expected
    assert DecodeConfig(processes=True, prefetch=0).beside("cpu") == DecodeConfig(processes=True, prefetch=0)
    assert DecodeConfig().beside("cpu").prefetch == 0 and DecodeConfig().beside("cuda").prefetch == 2


@pytest.fixture
def gpu(monkeypatch):
    """Queues of a GPU that is not there; the encoder says it is on it, and notes what is begun when."""
    begun = []
    queue = SimpleNamespace(device="cuda", record_event=lambda: "an event", wait_event=begun.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: queue)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queue)
    monkeypatch.setattr(torch.cuda, "stream", lambda queue: nullcontext())

    class OnGpu(Hungry):
        device = "cuda"

        def encode_images(self, pixels, patches=False):
            begun.append(len(pixels))
            return super().encode_images(pixels, patches)

    return OnGpu, begun


def test_a_gpu_is_given_the_next_batch_before_the_rest_of_one(reference, tmp_path, gpu):
    (manifest, expected), (kind, begun) = reference, gpu
    options = {"batch_size": 6, "progress": False}
    for number, pixels in enumerate((10**9, 700, 1)):  # also where there is room for one batch, or one image
        begun.clear()
        config = DecodeConfig(threads=2, max_pixels=pixels)
        extract(manifest, tmp_path / str(number), with_(encoder=kind(99, None)), decode=config, **options)
        same_content(load_features(tmp_path / str(number)), expected)
        if number == 0:
            assert begun == [6, 6, "an event", 6, "an event", 5, "an event", "an event"]


def test_batches_of_a_gpu_are_halved_when_memory_runs_out(reference, tmp_path, gpu, capsys, monkeypatch):
    (manifest, expected), (kind, _) = reference, gpu
    monkeypatch.setattr(extraction, "GPU_BATCH", 16)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert extract(manifest, tmp_path, with_(encoder=kind(5, error)), progress=False).errors == 0
    assert "out of memory in 'image': batch size 16 -> 4" in capsys.readouterr().err
    same_content(load_features(tmp_path), expected)


# ---------------------------------------------------------------------------- when a model has trouble


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_batch_is_halved_when_memory_runs_out(reference, tmp_path, capsys, error):
    manifest, expected = reference
    options = {"batch_size": 16, "progress": False, "decode": DecodeConfig(prefetch=2)}
    report = extract(manifest, tmp_path, with_(encoder=Hungry(5, error)), **options)
    assert report.errors == 0
    assert "out of memory in 'image': batch size 16 -> 4" in capsys.readouterr().err
    same_content(load_features(tmp_path), expected)


class Moody(FakeCaptioner):
    """Fails on pictures 31 pixels wide."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    def caption(self, images):
        if self.error and any(image.width == 31 for image in images):
            raise self.error
        return super().caption(images)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "00002.png: memory ran out in this step with this image alone"),
        (RuntimeError("the tower\nfell"), "00002.png: RuntimeError: the tower"),
    ],
)
def test_image_that_upsets_a_model_costs_one_row(tmp_path, capsys, error, reason):
    manifest, out = make_images(tmp_path / "images", 9), tmp_path / "out"
    (tmp_path / "images" / "00002.png").write_bytes(png(2, (31, 9)))
    with pytest.warns(UserWarning, match=r"1 image without features \(step 'caption'\)"):
        report = extract(manifest, out, with_(Moody(error)), batch_size=4, progress=False)
    assert (report.computed, report.errors) == (8, 1) and "batch size" not in capsys.readouterr().err
    assert errors_of(out)[["path", "stage", "reason"]].values.tolist() == [["00002.png", "caption", reason]]
    # the trouble was the model's, so the next run tries again
    assert extract(manifest, out, fake_models(), progress=False).computed == 1


def test_nonsense_of_a_model_is_never_stored(tmp_path):
    class Nan(FakeEncoder):
        def encode_images(self, pixels, patches=False):
            out = super().encode_images(pixels, patches)
            out.pooled[pixels.mean(dim=(1, 2, 3)) < -0.4] = float("nan")
            return out

    manifest = make_images(tmp_path / "images", 6)
    Image.new("RGB", (9, 9)).save(manifest["path"][4])
    with pytest.warns(UserWarning, match="no finite embedding"):
        report = extract(manifest, tmp_path / "out", with_(encoder=Nan()), progress=False)
    assert (report.computed, report.errors) == (5, 1)
    with pytest.raises(ItemkitError, match="'image' failed on 1 image .*ask `itemkit doctor --deep`"):
        extract(manifest[4:5], tmp_path / "b", with_(encoder=Nan()), progress=False)


class Dying(FakeCaptioner):
    """A service whose quota ends."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def caption(self, images):
        if self.left < len(images):
            raise ConnectionError("429 quota exceeded")
        self.left -= len(images)
        return super().caption(images)


@pytest.mark.parametrize("left", [0, 40])
def test_captioner_that_fails_for_good_ends_the_run_and_keeps_what_is_there(tmp_path, left):
    manifest, out = make_images(tmp_path / "images", 150), tmp_path / "out"
    with pytest.raises(ItemkitError, match=r"step 'caption' failed on \d+ images in a row .*429 quota"):
        extract(manifest, out, with_(Dying(left)), batch_size=8, progress=False)
    models = fake_models()
    assert extract(manifest, out, models, progress=False).reused == left
    assert models.encoder.images_encoded == 150 - left


def test_broken_device_ends_the_run(tmp_path):
    broken = Hungry(0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(ItemkitError, match="the device is broken .*illegal memory access"):
        extract(make_images(tmp_path / "i", 3), tmp_path / "out", with_(encoder=broken), progress=False)


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("prefetch", [0, 2])
def test_pixels_that_wait_are_bounded_over_all_threads(tmp_path, monkeypatch, prefetch):
    folder, lock, now, most = tmp_path / "images", threading.Lock(), [0], [0]
    folder.mkdir()
    for i in range(24):
        Image.new("RGB", (100, 100) if i % 6 else (200, 190), (i, 2 * i, 0)).save(folder / f"{i:02d}.png")
    real = decode.load_image

    def change(pixels):
        with lock:
            now[0] += pixels
            most[0] = max(most[0], now[0])

    def load(data, **options):
        image = real(data, **options)
        change(image.width * image.height)
        weakref.finalize(image, change, -image.width * image.height)
        return image

    monkeypatch.setattr(decode, "load_image", load)
    config = DecodeConfig(threads=6, max_pixels=40_000, prefetch=prefetch)
    manifest = manifest_of(sorted(folder.iterdir()))
    report = extract(manifest, tmp_path / "out", fake_models(), decode=config, progress=False)
    assert report.computed == 24 and 30_000 <= most[0] <= 40_000 and now[0] == 0


def test_memory_that_is_short_for_one_image_costs_its_row_now_and_nobody_elses(tmp_path, monkeypatch):
    manifest, out = make_images(tmp_path / "images", 6), tmp_path / "out"
    real, tries = decode.load_image, []

    def load(data, **options):
        tries.append(options["name"])
        if options["name"] == "00003.png" or (
            options["name"] == "00004.png" and tries.count("00004.png") == 1
        ):
            raise MemoryError
        return real(data, **options)

    monkeypatch.setattr(decode, "load_image", load)
    with pytest.warns(UserWarning, match="memory ran out"):
        report = extract(manifest, out, fake_models(), progress=False)
    assert (report.computed, report.errors) == (5, 1)
    reason = errors_of(out)["reason"][0]
    assert reason.startswith("00003.png: memory ran out for this image of 88 pixels; free some and")
    monkeypatch.undo()  # which says nothing about the file
    assert extract(manifest, out, fake_models(), progress=False).computed == 1


def test_a_store_that_cannot_be_written_takes_failed_rows_as_known(tmp_path, monkeypatch):
    manifest, out = make_images(tmp_path / "images", 5), tmp_path / "out"
    (tmp_path / "images" / "00002.png").write_bytes(png(2, (31, 9)))
    with pytest.warns(UserWarning, match="step 'caption'"):
        extract(manifest, out, with_(Moody(RuntimeError("fell"))), progress=False)
    monkeypatch.setattr(extraction.os, "access", lambda path, mode: False)
    monkeypatch.setattr(extraction, "folder_lock", None)
    with pytest.warns(UserWarning, match="step 'caption'"):
        report = extract(manifest, out, fake_models(), progress=False)
    assert (report.reused, report.errors, report.computed) == (4, 1, 0)
