"""The extraction: every row is accounted for, nothing is computed twice, how it is run changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from itemkit import extraction as engine_local
from itemkit import extraction as system
from itemkit.decode import DecodeConfig, scaled_jpeg
from itemkit.errors import InputError, StoreError
from itemkit.extraction import extract
from itemkit.steps import Models, TextCache, featurise
from itemkit.store import load_features

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
)


def errors_of(out):
    return pd.read_parquet(out / "errors.parquet")


def same_content(a, b):
    """Equal features, whatever the order of rows."""
    a, b = (f.select(np.argsort(f.table["path"].to_numpy(), kind="stable")) for f in (a, b))
    pd.testing.assert_frame_equal(a.table, b.table)
    pd.testing.assert_frame_equal(a.objects, b.objects, atol=1e-6)
    for name in ("image_emb", "caption_emb", "region_emb", "phrase_emb", "owner"):
        # float32 sums in another order, then float16: one step of float16 at most
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=2e-4)


# -------------------------------------------------------------------------------- nothing depends on it


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    manifest = make_images(folder / "images", 23)
    extract(manifest, folder / "out", fake_models(), progress=False)
    return manifest, load_features(folder / "out")


@pytest.mark.parametrize("batch_size", [1, 2, 7, 23, 500])
@pytest.mark.parametrize("threads", [1, 4])
def test_batch_size_and_threads_change_nothing(reference, tmp_path, batch_size, threads):
    manifest, expected = reference
    decode = DecodeConfig(threads=threads)
    extract(manifest, tmp_path, fake_models(), batch_size=batch_size, decode=decode, progress=False)
    same_content(load_features(tmp_path), expected)


@pytest.mark.parametrize("decode", [DecodeConfig(prefetch=2), DecodeConfig(max_batch_pixels=150)])
def test_look_ahead_and_pixel_bound_change_nothing(reference, tmp_path, decode):
    manifest, expected = reference
    models = fake_models()
    extract(manifest, tmp_path, models, batch_size=8, decode=decode, progress=False)
    same_content(load_features(tmp_path), expected)
    # pictures have 64 to 120 pixels, and a batch ends with the picture that passes the bound
    assert max(models.captioner.batches) == (8 if decode.prefetch else 3)


def test_order_changes_nothing(reference, tmp_path):
    manifest, expected = reference
    shuffled = manifest.sample(frac=1, random_state=3)
    extract(shuffled, tmp_path, fake_models(), batch_size=4, progress=False)
    read = load_features(tmp_path)
    assert list(read.table["path"]) == list(shuffled["path"])
    same_content(read, expected)


def test_isolated_decoding_changes_nothing(reference, tmp_path):
    manifest, expected = reference
    extract(manifest, tmp_path, fake_models(), decode=DecodeConfig(isolate=True, threads=2), progress=False)
    same_content(load_features(tmp_path), expected)


def test_each_text_is_encoded_once(reference, tmp_path):
    models = fake_models()
    extract(reference[0], tmp_path, models, batch_size=2, progress=False)
    texts = models.encoder.texts_encoded
    assert len(texts) == len(set(texts)) > 20


def test_text_cache_keeps_its_bound():
    encoder = FakeEncoder()
    cache = TextCache(encoder, max_bytes=3 * (4 * encoder.dim + 300))
    first, lengths = cache.embed(["a", "b", "a"])
    assert np.isnan(lengths).all()  # the stand-in tells none
    np.testing.assert_array_equal(first[0], first[2])
    cache.embed(["c", "d", "a"])  # "a" stays, "b" is the one longest unused
    cache.embed(["a", "c", "d"])
    assert encoder.texts_encoded == ["a", "b", "c", "d"]
    assert [x.shape for x in cache.embed([])] == [(0, encoder.dim), (0,)]
    big, _ = cache.embed(list("efghij"))  # more than it may keep: still answered
    assert big.shape == (6, encoder.dim) and not np.array_equal(big[0], big[1])


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_true_models_agree_whatever_the_batch(tmp_path, precision, tolerance):
    """Loaded as by a user, with random weights: 1 - cosine between batch sizes stays below what is stated."""
    from PIL import Image

    from itemkit.captions import load_captioner
    from itemkit.encoder import load_encoder
    from itemkit.regions import make_localiser

    import models

    encoder = load_encoder(models.write_tiny_clip(tmp_path / "clip"), device="cpu", precision=precision)
    captioner = load_captioner(models.write_tiny_blip(tmp_path / "blip"), "cpu", "float32", batch_size=64)
    paths = make_images(tmp_path / "images", 9)["path"]
    for localiser in ("dense", "grid"):
        parts = Models(encoder, captioner, FakeParser(), make_localiser(localiser, encoder))
        runs = [featurise([Image.open(p) for p in paths], parts, batch_size=n) for n in (1, 4, 9)]
        for run in runs[:-1]:
            assert list(run.table["caption"]) == list(runs[-1].table["caption"])
            np.testing.assert_allclose(
                run.table["caption_logprob"], runs[-1].table["caption_logprob"], atol=1e-5
            )
            for name in ("image_emb", "caption_emb", "region_emb", "phrase_emb"):
                cosine = (getattr(run, name) * getattr(runs[-1], name)).sum(1)
                assert len(cosine) >= 9 and (1 - cosine).max() < tolerance


@pytest.mark.real
def test_every_real_image_becomes_a_row(real_dir, tmp_path):
    from itemkit.manifest import read_manifest

    manifest = read_manifest(real_dir / "index.csv")
    report = extract(manifest, tmp_path, fake_models(), progress=False)
    assert report.computed + report.copies + report.errors == len(manifest) == 1450
    read = load_features(tmp_path)
    assert len(read) + len(errors_of(tmp_path)) == len(manifest)
    index = pd.read_csv(real_dir / "index.csv").set_index("sha256").loc[read.table["image_id"]]
    assert (read.table["width"].to_numpy() == index["width"].to_numpy()).all()


# ----------------------------------------------------------------------------------------- nothing done twice


def test_second_run_opens_no_image(tmp_path, monkeypatch):
    manifest = make_images(tmp_path / "images", 12)
    (tmp_path / "images" / "bad.png").write_bytes(b"not an image")
    manifest = pd.concat([manifest, manifest_of([tmp_path / "images" / "bad.png"])], ignore_index=True)
    first = extract(manifest, tmp_path / "out", fake_models(), progress=False)
    assert (first.reused, first.computed, first.errors) == (0, 12, 1)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("[!.]*") if p.is_file()}
    monkeypatch.setattr(engine_local.ImageReader, "read", lambda *a: pytest.fail("an image was opened"))
    second = extract(manifest, tmp_path / "out", fake_models(), progress=False)
    assert (second.reused, second.computed, second.errors) == (12, 0, 1)
    assert {p: p.stat().st_mtime_ns for p in files} == files, "a run without work must not touch the store"


def test_only_new_and_changed_images_are_computed(tmp_path):
    manifest = make_images(tmp_path / "images", 10)
    extract(manifest[:8], tmp_path / "out", fake_models(), progress=False)
    (tmp_path / "images" / "00003.png").write_bytes(png(777))  # other content under the same name
    os.utime(tmp_path / "images" / "00005.png", ns=(1, 1))  # same content, other time
    models = fake_models()
    report = extract(manifest, tmp_path / "out", models, progress=False)
    assert (report.reused, report.computed, models.encoder.images_encoded) == (7, 3, 3)
    extract(manifest, tmp_path / "fresh", fake_models(), progress=False)
    same_content(load_features(tmp_path / "out"), load_features(tmp_path / "fresh"))


def test_labels_are_corrected_without_computing(tmp_path):
    manifest = make_images(tmp_path / "images", 6)
    extract(manifest, tmp_path / "out", fake_models(), progress=False)
    models = fake_models()
    turned = manifest.assign(label=1 - manifest["label"])
    extract(turned, tmp_path / "out", models, progress=False)
    assert models.encoder.images_encoded == 0
    assert list(load_features(tmp_path / "out").labels) == list(turned["label"])


def test_a_smaller_manifest_shows_its_own_rows_only(tmp_path):
    manifest = make_images(tmp_path / "images", 6)
    extract(manifest, tmp_path / "out", fake_models(), progress=False)
    assert extract(manifest, tmp_path / "out", fake_models(), limit=2, progress=False).n == 2
    assert len(load_features(tmp_path / "out")) == 2
    models = fake_models()
    extract(manifest, tmp_path / "out", models, progress=False)
    assert len(load_features(tmp_path / "out")) == 6 and models.encoder.images_encoded == 0


def test_copies_share_features_and_keep_their_rows(tmp_path):
    manifest = make_images(tmp_path / "images", 6)
    copies = []
    for i in (0, 2, 4):
        copies.append(tmp_path / "images" / f"copy{i}.png")
        shutil.copy(manifest["path"][i], copies[-1])
    rows = manifest_of(copies).assign(label=pd.array([0, 0, 0], dtype="Int8"), split="val")
    manifest = pd.concat([manifest, rows], ignore_index=True)
    models = fake_models()
    report = extract(manifest, tmp_path / "out", models, progress=False)
    assert (report.computed, report.copies, models.encoder.images_encoded) == (6, 3, 6)
    read = load_features(tmp_path / "out")
    assert list(read.table["path"]) == list(manifest["path"])
    assert list(read.table["split"]) == list(manifest["split"])
    np.testing.assert_array_equal(read.image_emb[[0, 2, 4]], read.image_emb[6:])
    again = extract(manifest, tmp_path / "out", fake_models(), progress=False)
    assert (again.reused, again.copies) == (9, 0)


# ------------------------------------------------------------------------------------------- every row ends


def test_every_row_is_a_feature_or_an_error(tmp_path):
    images = tmp_path / "images"
    manifest = make_images(images, 5)
    bad = {
        "text.jpg": b"hello",
        "empty.png": b"",
        "cut.png": png(1, (60, 60))[:500],
        "again_cut.png": png(1, (60, 60))[:500],
    }
    for name, data in bad.items():
        (images / name).write_bytes(data)
    rows = manifest_of([images / name for name in bad] + [images / "gone.png", images])
    manifest = pd.concat([manifest, rows], ignore_index=True).sample(frac=1, random_state=0)
    report = extract(manifest, tmp_path / "out", fake_models(), batch_size=2, progress=False)
    assert (report.n, report.computed, report.errors, report.left) == (11, 5, 6, 0)
    read, errors = load_features(tmp_path / "out"), errors_of(tmp_path / "out")
    assert len(read) + len(errors) == len(manifest)
    reasons = errors.set_index("path")["reason"]
    assert reasons["images/empty.png"].startswith("images/empty.png: is empty (0 bytes)")
    assert "truncated" in reasons["images/cut.png"]
    assert reasons["images/gone.png"] == "images/gone.png: no such file; check the path or drop the row"
    assert reasons["images"].startswith("images: is a folder, not an image file")
    assert "5 computed, 6 errors (see" in str(report)


def test_unusable_image_can_end_the_run(tmp_path):
    (tmp_path / "x.png").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"x.png: is not an image"):
        extract(
            manifest_of([tmp_path / "x.png"]),
            tmp_path / "out",
            fake_models(),
            on_error="raise",
            progress=False,
        )


def test_errors_are_tried_again_when_asked(tmp_path):
    (tmp_path / "images").mkdir()
    bad = tmp_path / "images" / "bad.png"
    bad.write_bytes(b"hello")
    manifest = manifest_of([bad])
    extract(manifest, tmp_path / "out", fake_models(), progress=False)
    stat = bad.stat()
    bad.write_bytes(png(1, (2, 2))[:5])
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time: only a retry can notice
    report = extract(manifest, tmp_path / "out", fake_models(), retry_errors=True, progress=False)
    assert report.errors == 1
    assert "begins like a PNG" in errors_of(tmp_path / "out")["reason"][0]


def test_contradicting_labels_name_both_files(tmp_path):
    manifest = make_images(tmp_path / "images", 4)
    shutil.copy(manifest["path"][0], tmp_path / "images" / "copy.png")
    row = manifest_of([tmp_path / "images" / "copy.png"]).assign(label=pd.array([1], dtype="Int8"))
    manifest = pd.concat([manifest, row], ignore_index=True)
    report = extract(manifest, tmp_path / "out", fake_models(), progress=False)
    assert (report.computed, report.errors) == (3, 2)
    reasons = dict(errors_of(tmp_path / "out")[["path", "reason"]].to_numpy())
    assert reasons["00000.png"].startswith("00000.png: labelled real, but copy.png has the same content")
    assert reasons["copy.png"].startswith("copy.png: labelled fake, but 00000.png has the same content")
    # corrected, both come back without computing
    models = fake_models()
    manifest.loc[4, "label"] = 0
    assert extract(manifest, tmp_path / "out", models, progress=False).errors == 0
    assert len(load_features(tmp_path / "out")) == 5 and models.encoder.images_encoded == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.drop(columns="path"), r"no column 'path', only \['label'"),
        (lambda m: m[:0], "has no rows"),
        (lambda m: m.assign(path=[None, "b"]), "row 0 of the manifest has no path"),
    ],
)
def test_unusable_manifest(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        extract(change(make_images(tmp_path / "images", 2)), tmp_path / "out", fake_models(), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [{"captions": "users"}, {"missing": "skip"}, {"on_error": "x"}, {"limit": 0}]
)
def test_unknown_options(tmp_path, option):
    with pytest.raises(InputError, match=next(iter(option))):
        extract(make_images(tmp_path, 1), tmp_path / "out", fake_models(), progress=False, **option)


# -------------------------------------------------------------------------------------------------- captions


def test_user_captions_are_used_and_are_part_of_the_key(tmp_path):
    manifest = make_images(tmp_path / "images", 4)
    manifest["caption"] = ["a red ball", "a box", "a red ball", "a cup and a dog"]
    second = manifest[:1].assign(caption="a blue ball")  # a second caption of the same picture
    manifest = pd.concat([manifest, second], ignore_index=True)
    models = Models(FakeEncoder(), None, FakeParser(), FakeLocaliser())
    report = extract(manifest, tmp_path / "out", models, captions="user", progress=False)
    read = load_features(tmp_path / "out")
    assert report.computed == 5
    assert list(read.table["caption"]) == list(manifest["caption"])
    assert read.table["caption_logprob"].isna().all() and set(read.table["caption_source"]) == {"user"}
    assert read.table["image_id"][0] == read.table["image_id"][4]
    np.testing.assert_allclose(read.image_emb[0], read.image_emb[4], atol=1e-6)
    assert read.objects["phrase"].tolist() == ["red ball", "box", "red ball", "cup", "dog", "blue ball"]
    manifest.loc[1, "caption"] = "a tree"
    again = extract(manifest, tmp_path / "out", models, captions="user", progress=False)
    assert (again.reused, again.computed) == (4, 1)


def test_missing_captions(tmp_path):
    manifest = make_images(tmp_path / "images", 3)
    manifest["caption"] = pd.array(["a box", None, " "], dtype="string")
    with pytest.raises(
        InputError, match=r"2 of 3 images have no caption; first: .*00001.png.*missing='generate'"
    ):
        extract(manifest, tmp_path / "out", fake_models(), captions="user", progress=False)
    extract(manifest, tmp_path / "a", fake_models(), captions="user", missing="generate", progress=False)
    assert load_features(tmp_path / "a").table["caption_source"].tolist() == [
        "user",
        "generated",
        "generated",
    ]
    report = extract(
        manifest, tmp_path / "b", fake_models(), captions="user", missing="error", progress=False
    )
    assert (report.computed, report.errors) == (1, 2)
    assert "has no caption" in errors_of(tmp_path / "b")["reason"][0]
    with pytest.raises(InputError, match="no captioner"):
        extract(manifest, tmp_path / "c", Models(FakeEncoder()), progress=False)


def test_global_features_alone(tmp_path):
    models = Models(FakeEncoder(), FakeCaptioner())
    extract(make_images(tmp_path / "images", 3), tmp_path / "out", models, progress=False)
    read = load_features(tmp_path / "out")
    assert len(read.objects) == 0 and read.image_emb.shape == (3, 16) and set(read.table["n_objects"]) == {0}


def test_transform_sees_the_content_id_and_is_part_of_the_fingerprint(tmp_path):
    manifest = make_images(tmp_path / "images", 3)
    bright = Brightened(60)
    extract(manifest, tmp_path / "out", fake_models(), transform=bright, progress=False)
    read = load_features(tmp_path / "out")
    assert sorted(bright.seen) == sorted(read.table["image_id"])
    extract(manifest, tmp_path / "plain", fake_models(), progress=False)
    assert not np.allclose(read.image_emb, load_features(tmp_path / "plain").image_emb, atol=1e-2)
    with pytest.raises(Exception, match=r"transform.brightened: 60 there, 10 here"):
        extract(manifest, tmp_path / "out", fake_models(), transform=Brightened(10), progress=False)
    with pytest.raises(InputError, match=r"no fingerprint\(\)"):
        extract(manifest, tmp_path / "new", fake_models(), transform=lambda image, _: image, progress=False)


def test_featurise_checks_the_number_of_captions(tmp_path):
    from PIL import Image

    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
    assert (
        featurise(images, fake_models(), ["a box", None, "a cup"], batch_size=2).table["caption"][2]
        == "a cup"
    )
    for captions in (["a"], ["a"] * 4):
        with pytest.raises(InputError, match=f"got {len(captions)} captions"):
            featurise(images, fake_models(), captions, batch_size=2)


# ---------------------------------------------------------------------------- when a model has trouble


class Hungry(FakeEncoder):
    """Runs out of memory above a number of images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def encode_images(self, pixels, patches=False):
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().encode_images(pixels, patches)


def test_batch_is_halved_when_memory_runs_out(reference, tmp_path, capsys):
    manifest, expected = reference
    models = Models(Hungry(5), FakeCaptioner(), FakeParser(), FakeLocaliser())
    report = extract(manifest, tmp_path, models, batch_size=16, progress=False)
    assert report.batch_size == 4 and report.errors == 0
    assert "out of memory in 'image': batch size 16 -> 8" in capsys.readouterr().err
    same_content(load_features(tmp_path), expected)


def test_one_image_too_many_for_memory_is_an_error_of_that_image(tmp_path):
    class Once(FakeCaptioner):
        def caption(self, images):
            if any(image.width == 31 for image in images):
                raise MemoryError
            return super().caption(images)

    manifest = make_images(tmp_path / "images", 5)
    (tmp_path / "images" / "00002.png").write_bytes(png(2, (31, 9)))
    models = Models(FakeEncoder(), Once(), FakeParser(), FakeLocaliser())
    report = extract(manifest, tmp_path / "out", models, progress=False)
    assert (report.computed, report.errors) == (4, 1)
    row = errors_of(tmp_path / "out").iloc[0]
    assert (row["path"], row["stage"], row["reason"]) == (
        "00002.png",
        "caption",
        "out of memory with this image alone",
    )


class Moody(FakeEncoder):
    """Fails on, or answers with nonsense to, chosen images."""

    def __init__(self, bad: float, how: str) -> None:
        super().__init__()
        self.bad, self.how = bad, how

    def encode_images(self, pixels, patches=False):
        upset = pixels.mean(dim=(1, 2, 3)) < self.bad
        if self.how == "raise" and upset.any():
            raise RuntimeError("the tower fell")
        out = super().encode_images(pixels, patches)
        out.pooled[upset] = float("nan")
        return out


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_image_that_upsets_a_model_costs_one_row(tmp_path, how):
    manifest = make_images(tmp_path / "images", 6)
    black = tmp_path / "images" / "00004.png"
    from PIL import Image

    Image.new("RGB", (9, 9)).save(black)
    models = Models(Moody(-0.4, how), FakeCaptioner(), FakeParser(), FakeLocaliser())
    report = extract(manifest, tmp_path / "out", models, progress=False)
    assert (report.computed, report.errors) == (5, 1)
    row = errors_of(tmp_path / "out").iloc[0]
    assert (row["path"], row["stage"]) == ("00004.png", "image")
    assert row["reason"] == (
        "RuntimeError: the tower fell" if how == "raise" else "a model gave no finite embedding for it"
    )
    # the trouble was the model's, so the next run tries again
    assert extract(manifest, tmp_path / "out", fake_models(), progress=False).errors == 0


def test_model_that_fails_on_everything_is_not_blamed_on_the_images(tmp_path):
    manifest = make_images(tmp_path / "images", 40)
    models = Models(Moody(9.0, "raise"), FakeCaptioner(), FakeParser(), FakeLocaliser())
    with pytest.raises(RuntimeError, match="the tower fell"):
        extract(manifest, tmp_path / "out", models, batch_size=10, progress=False)
    assert len(models.captioner.batches) == 11, "should give up after the first batch"


def test_broken_device_ends_the_run(tmp_path):
    assert system.is_fatal(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not system.is_fatal(RuntimeError("CUDA out of memory"))
    assert system.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"))


# ----------------------------------------------------------------------------------- decoders that misbehave


def test_crash_and_hang_of_a_decoder_cost_one_image_each(tmp_path):
    images = tmp_path / "images"
    manifest = make_images(images, 6)
    os.rename(images / "00002.png", images / "crash.png")
    os.rename(images / "00004.png", images / "hang.png")
    manifest = manifest_of(sorted(images.glob("*.png")))
    decode = DecodeConfig(loader="loaders:load_or_crash", isolate=True, threads=2, timeout_s=2)
    report = extract(manifest, tmp_path / "out", fake_models(), decode=decode, progress=False)
    assert (report.computed, report.errors) == (4, 2)
    reasons = errors_of(tmp_path / "out").set_index("path")["reason"]
    assert reasons["crash.png"].startswith("crash.png: crashed the decoder (exit status -11); drop the row")
    assert reasons["hang.png"].startswith("hang.png: took longer than 2 s to decode and was stopped")


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc to watch memory")
def test_memory_stays_flat(tmp_path):
    """What grows with the number of images is their bookkeeping, far less than one embedding each."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(10000):
        (images / f"{i}.bin").write_bytes(i.to_bytes(4, "big"))
    # a process of its own for each size: what one holds depends on what ran in it before
    peaks = [
        int(
            subprocess.run(
                [sys.executable, os.path.join(os.path.dirname(__file__), "peak.py"), str(tmp_path), str(n)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for n in (2000, 10000)
    ]
    grown = (peaks[1] - peaks[0]) / (10000 - 2000)
    # 1,500 to 2,200 is the manifest and the text of its tables, which are made 65,536 rows at a time (beyond
    # that `python -m benchmarks.scale` sees 180); kept embeddings would add (2 + 2 * 2 objects) * 256 * 2
    assert grown < 3000, f"{grown:.0f} bytes per image"


# ------------------------------------------------------------------------------- JPEG files at a fraction


def test_scaled_jpeg_is_another_store_and_smaller_pictures(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (25, 30, 3), dtype=np.uint8))
    for name, size in (("large.jpg", (240, 200)), ("small.jpg", (30, 25)), ("large.png", (240, 200))):
        small.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    manifest = manifest_of(sorted(folder.iterdir()))
    widths = {}
    for loader in (DecodeConfig().loader, scaled_jpeg(60)):
        for isolate in (False, True):
            out = tmp_path / f"out{len(widths)}"
            decode = DecodeConfig(loader=loader, isolate=isolate)
            extract(manifest, out, fake_models(), decode=decode, progress=False)
            read = load_features(out)
            assert read.run["fingerprint"]["decode"] == loader
            names = [os.path.basename(path) for path in read.table["path"]]
            widths[loader, isolate] = dict(zip(names, read.table["width"], strict=True))
    # 240 x 200 halved is 120 x 100, its shorter side above 60; a quarter would be below
    assert widths[scaled_jpeg(60), False] == {"large.jpg": 120, "large.png": 240, "small.jpg": 30}
    assert widths[DecodeConfig().loader, False] == {"large.jpg": 240, "large.png": 240, "small.jpg": 30}
    for loader in (DecodeConfig().loader, scaled_jpeg(60)):
        assert widths[loader, False] == widths[loader, True]
    with pytest.raises(StoreError, match=r"extracted otherwise \(decode: .*least_side=60"):
        extract(manifest, tmp_path / "out0", fake_models(), decode=decode, progress=False)
    with pytest.raises(InputError, match="got least_side=0 pixels"):
        scaled_jpeg(0)
