"""What goes wrong while an extraction runs: no image is lost or blamed for it, no half looks whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

from itemkit import _files, cli, commands
from itemkit import extraction as pipeline
from itemkit import extraction as system
from itemkit.decode import DecodeConfig, DecoderDied, ImageReader, IsolatedDecoder, batches
from itemkit.errors import InputError, ItemkitError, StoreError
from itemkit.extraction import ExtractReport, extract
from itemkit.steps import Models
from itemkit.store import load_features

from fakes import (
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


def with_encoder(encoder) -> Models:
    return Models(encoder, FakeCaptioner(), FakeParser(), FakeLocaliser())


# --------------------------------------------------------------------------------------- memory that runs out


class Tightening(FakeEncoder):
    """Runs out of memory above a number of images, and after a while above a smaller one."""

    def __init__(self, most: int, later: int, after: int = 0) -> None:
        super().__init__()
        self.most, self.later, self.after = most, later, after

    def encode_images(self, pixels, patches=False):
        if len(pixels) > (self.most if self.images_encoded < self.after else self.later):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().encode_images(pixels, patches)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_no_image_is_lost_when_memory_runs_out_again(tmp_path, prefetch):
    manifest = make_images(tmp_path / "images", 96)
    report = extract(
        manifest,
        tmp_path / "out",
        with_encoder(Tightening(8, 4, after=16)),
        batch_size=16,
        decode=DecodeConfig(prefetch=prefetch),
        progress=False,
    )
    assert (report.computed, report.errors, report.left, report.batch_size) == (96, 0, 0, 4)


class NoRoomFor(FakeCaptioner):
    """Has no memory for a picture 31 pixels wide."""

    def caption(self, images):
        said = super().caption(images)
        if any(image.width == 31 for image in images):
            raise MemoryError
        return said


def test_one_image_that_never_fits_does_not_slow_down_the_others(tmp_path, capsys):
    manifest = make_images(tmp_path / "images", 40)
    (tmp_path / "images" / "00002.png").write_bytes(png(2, (31, 9)))
    models = Models(FakeEncoder(), NoRoomFor(), FakeParser(), FakeLocaliser())
    report = extract(manifest, tmp_path / "out", models, batch_size=8, progress=False)
    assert (report.computed, report.errors, report.batch_size) == (39, 1, 8)
    assert models.captioner.batches[-4:] == [8] * 4
    assert "one image does not fit even alone: batch size 1 -> 8" in capsys.readouterr().err


def test_running_out_of_memory_is_no_reason_to_raise_while_a_smaller_batch_may_do(tmp_path):
    manifest = make_images(tmp_path / "images", 20)
    options = {"batch_size": 8, "on_error": "raise", "progress": False}
    assert extract(manifest, tmp_path / "a", with_encoder(Tightening(3, 3)), **options).computed == 20
    with pytest.raises(torch.OutOfMemoryError):
        extract(manifest, tmp_path / "b", with_encoder(Tightening(0, 0)), **options)


class Broken(FakeEncoder):
    """Has no number for any picture."""

    def encode_images(self, pixels, patches=False):
        out = super().encode_images(pixels, patches)
        out.pooled[:] = float("nan")
        return out


def test_nonsense_for_every_image_is_not_blamed_on_the_images(tmp_path):
    manifest = make_images(tmp_path / "images", 40)
    encoder = Broken()
    with pytest.raises(
        ItemkitError, match="no finite embedding for any image: this is not the images' fault"
    ):
        extract(manifest, tmp_path / "out", with_encoder(encoder), batch_size=10, progress=False)
    assert encoder.images_encoded == 10, "should give up after the first batch"


# ------------------------------------------------------------------------------- reading what there is so far


class Cut(BaseException):
    """As by a power cut; nothing may catch it."""


class Mortal(FakeEncoder):
    """Ends the run after a number of images: at once, or as Ctrl-C does it."""

    def __init__(self, most: int, signal: int | None = None) -> None:
        super().__init__()
        self.most, self.signal = most, signal

    def encode_images(self, pixels, patches=False):
        if self.images_encoded >= self.most and self.signal is None:
            raise Cut
        out = super().encode_images(pixels, patches)
        if self.images_encoded >= self.most and self.signal is not None:
            os.kill(os.getpid(), self.signal)
        return out


def test_partial_read_does_not_give_a_replaced_file_the_old_features(tmp_path):
    manifest = make_images(tmp_path / "images", 8)
    extract(manifest[:6], tmp_path / "out", fake_models(), progress=False)
    (tmp_path / "images" / "00003.png").write_bytes(png(777))
    with pytest.raises(Cut):
        extract(manifest[::-1], tmp_path / "out", with_encoder(Mortal(2)), batch_size=2, progress=False)
    part = load_features(tmp_path / "out", partial=True)
    assert [os.path.basename(path)[4] for path in part.table["path"]] == list("7654210")


def test_partial_read_leaves_out_what_is_labelled_both_ways(tmp_path):
    manifest = make_images(tmp_path / "images", 8)
    shutil.copy(manifest["path"][0], manifest["path"][1])  # one real, one fake
    with pytest.raises(KeyboardInterrupt):
        models = with_encoder(Mortal(4, signal.SIGINT))
        extract(manifest, tmp_path / "out", models, batch_size=2, progress=False)
    assert errors_of(tmp_path / "out")["path"].tolist() == ["00000.png", "00001.png"]
    part = load_features(tmp_path / "out", partial=True)
    assert len(part) and not part.table["path"].str.contains("0000[01].png").any()


def test_partial_read_of_a_first_run_warns_of_nothing(tmp_path):
    manifest = make_images(tmp_path / "images", 6)
    with pytest.raises(Cut):
        extract(manifest, tmp_path / "out", with_encoder(Mortal(2)), batch_size=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_features(tmp_path / "out", partial=True)) == 2
        for shard in (tmp_path / "out" / "shards").iterdir():  # killed before it had written any
            shard.unlink()
        assert len(load_features(tmp_path / "out", partial=True)) == 0


# ------------------------------------------------------------------------------- a half never looks whole


@pytest.mark.parametrize("stopped", [False, True])
def test_a_continued_store_cut_at_any_write_never_looks_complete(tmp_path, monkeypatch, stopped):
    """After each file that the run writes; ``stopped`` before it could compute anything."""
    manifest = make_images(tmp_path / "images", 8)
    real, writes = _files.atomic_write, 0

    def write(path, fill):
        nonlocal writes
        writes += 1
        real(path, fill)
        if writes == cut:
            raise Cut

    class Stopped(system.StopSignal):
        def __enter__(self):
            self.requested = signal.SIGINT
            return self

    cut, finished = 0, False
    while not finished:
        cut, out = cut + 1, tmp_path / str(cut)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda file: None)
            extract(manifest[:4], out, fake_models(), progress=False)
            writes = 0
            for module in ("itemkit._files", "itemkit.store"):
                patch.setattr(f"{module}.atomic_write", write)
            if stopped:
                patch.setattr("itemkit.extraction.StopSignal", Stopped)
            try:
                extract(manifest, out, fake_models(), batch_size=2, shard_size=2, progress=False)
                finished = True
            except KeyboardInterrupt:
                finished = True
            except Cut:
                pass
        try:
            assert len(load_features(out)) == 8 and not stopped
        except StoreError:
            pass
    assert cut == (4 if stopped else 7), (
        "run.json, manifest, run.json; between them 2 shards and the manifest"
    )


# --------------------------------------------------------------------------------------- trouble that passes


@pytest.mark.parametrize("isolate", [False, True])
def test_memory_that_was_short_once_is_not_a_property_of_the_file(tmp_path, monkeypatch, isolate):
    manifest = make_images(tmp_path / "images", 4)
    extract(manifest[:1], tmp_path / "out", fake_models(), progress=False, decode=DecodeConfig(LOADER))
    decode = DecodeConfig(LOADER, isolate=isolate)
    with monkeypatch.context() as patch:
        patch.setenv("ITEMKIT_TEST_NO_MEMORY", "1")
        report = extract(manifest, tmp_path / "out", fake_models(), decode=decode, progress=False)
    assert report.errors == 3 and "--retry-errors" in str(report)
    row = errors_of(tmp_path / "out").iloc[0]
    assert row["stage"] == "read"
    assert row["reason"] == "00001.png: memory ran out while it was decoded; run again with more of it"
    assert extract(manifest, tmp_path / "out", fake_models(), decode=decode, progress=False).errors == 0


LOADER = "bad_loaders:load_or_no_memory"


def test_a_decoder_killed_from_outside_is_not_the_next_image_s_fault():
    decoder = IsolatedDecoder("loaders:load_or_crash", 60)
    assert decoder.decode(png(1)).size == (12, 10)
    decoder._process.kill()
    assert decoder.decode(png(2)).size == (12, 10)
    with pytest.raises(DecoderDied, match=r"crash.png: crashed the decoder \(exit status -11\)"):
        decoder.decode(png(3), "crash.png")
    assert decoder.decode(png(4)).size == (12, 10)
    decoder.close()


def test_decoders_are_used_again_by_later_batches(tmp_path):
    paths = make_images(tmp_path / "images", 6)["path"]
    config = DecodeConfig(isolate=True, threads=2)
    reader = ImageReader(config)
    for _ in range(3):  # as a Ray worker calls it for each batch
        found = list(batches(range(6), lambda i: reader.read(i, paths[i]), lambda: 6, config, 0))
        assert [item.image is not None for item in found[0]] == [True] * 6
    assert len(reader._workers) <= 2
    reader.close()


def run_extract_command(monkeypatch, manifest, left=0, **options):
    """Options that the command hands on, and its exit status."""
    handed = {}

    def fake_extract(manifest, out, preset, **given):
        handed.update(given)
        return ExtractReport(out, 3, 0, 3 - left, 0, 0, left, 1.0)

    args = cli._parser().parse_args(["extract", str(manifest), "--out", "out"])
    for name, value in options.items():
        setattr(args, name, value)
    monkeypatch.setattr(pipeline, "extract", fake_extract)
    return handed, commands.extract(args)


def test_the_command_hands_on_retry_errors_and_isolate(tmp_path, monkeypatch):
    make_images(tmp_path / "images" / "real", 3)
    handed, status = run_extract_command(monkeypatch, tmp_path / "images")
    assert (handed["retry_errors"], handed["decode"], status) == (False, DecodeConfig(), 0)
    options = {"retry_errors": True, "isolate": True, "scaled_jpeg": 448}
    handed, status = run_extract_command(monkeypatch, tmp_path / "images", **options)
    assert handed["retry_errors"] and handed["decode"].isolate and "448" in handed["decode"].loader


def test_the_command_fails_when_images_are_left(tmp_path, monkeypatch):
    make_images(tmp_path / "images" / "real", 3)
    assert run_extract_command(monkeypatch, tmp_path / "images", left=1)[1] == 1


# --------------------------------------------------------------------------------------- a decoder that hangs

HANGING = """
import sys
from pathlib import Path
from itemkit.extraction import extract
from itemkit.decode import DecodeConfig
from fakes import fake_models, manifest_of
images, out, prefetch = sys.argv[1:]
decode = DecodeConfig("loaders:load_or_crash", threads=2, prefetch=int(prefetch))
manifest = manifest_of(sorted(Path(images).glob("*.png")))
extract(manifest, out, fake_models(), batch_size=2, shard_size=2, decode=decode, progress=False)
"""


@pytest.mark.parametrize("prefetch", [0, 2])
def test_second_interrupt_escapes_a_decoder_that_hangs(tmp_path, prefetch):
    make_images(tmp_path / "images", 9)
    os.rename(tmp_path / "images" / "00006.png", tmp_path / "images" / "00006_hang.png")
    out, here = tmp_path / "out", Path(__file__).parent
    run = subprocess.Popen(
        [sys.executable, "-c", HANGING, tmp_path / "images", out, str(prefetch)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])},
    )
    try:
        while len(list((out / "shards").glob("part-*"))) < 3:  # all before the image that hangs
            assert run.poll() is None
            time.sleep(0.05)
        for _ in range(2):
            time.sleep(0.5)
            run.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert "00006_hang.png" in json.loads((out / "decoding.json").read_text())
    # which the next run decodes in a process of its own
    manifest = manifest_of(sorted((tmp_path / "images").glob("*.png")))
    decode = DecodeConfig("loaders:load_or_crash", timeout_s=2)
    report = extract(manifest, out, fake_models(), decode=decode, progress=False)
    assert (report.reused, report.computed, report.errors) == (6, 2, 1)
    assert "took longer than 2 s" in errors_of(out)["reason"][0] and not (out / "decoding.json").exists()


# ------------------------------------------------------------------------------------- manifests and options


def test_paths_may_be_path_objects(tmp_path):
    manifest = make_images(tmp_path / "images", 3)
    extract(manifest.assign(path=manifest["path"].map(Path)), tmp_path / "out", fake_models(), progress=False)
    assert load_features(tmp_path / "out").table["path"].tolist() == manifest["path"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ["a.png", os.fsdecode(b"caf\xe9.png")]}, r"row 1 .* 'caf\\udce9.png', which is not UTF-8"),
        ({"path": ["a.png", 7]}, r"row 1 of the manifest has 7 \(int\) as its path"),
        ({"path": [b"a.png", "b.png"]}, r"row 0 of the manifest has b'a.png' \(bytes\) as its path"),
        (
            {"label": ["real", "fake"]},
            "row 0 of the manifest has the label 'real'; expected 0 for real, 1 for",
        ),
        ({"label": [1, 2]}, "row 1 of the manifest has the label 2;"),
    ],
)
def test_a_value_no_store_can_hold_is_told_before_any_work(tmp_path, change, message):
    manifest = make_images(tmp_path / "images", 2).assign(**change)
    with pytest.raises(InputError, match=message):
        extract(manifest, tmp_path / "out", fake_models(), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [[True, False], [0.0, None], pd.array([1, None], "Int8"), [None, None]])
def test_other_kinds_of_labels_are_taken(tmp_path, labels):
    manifest = make_images(tmp_path / "images", 2).assign(label=labels)
    assert extract(manifest, tmp_path / "out", fake_models(), progress=False).computed == 2
    read = load_features(tmp_path / "out").table["label"]
    assert [None if pd.isna(x) else x for x in read] == [None if pd.isna(x) else x for x in labels]


def test_other_columns_that_are_not_utf_8_are_told(tmp_path):
    manifest = make_images(tmp_path / "images", 2).assign(generator=os.fsdecode(b"caf\xe9"))
    with pytest.raises(InputError, match=r"the text 'caf\\udce9', which is not UTF-8"):
        extract(manifest, tmp_path / "out", fake_models(), progress=False)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(tmp_path, size):
    manifest = make_images(tmp_path / "images", 2)
    with pytest.raises(InputError, match=f"got batch_size={size}; give at least 1"):
        extract(manifest, tmp_path / "out", fake_models(), batch_size=size, progress=False)
