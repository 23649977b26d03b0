"""Runs that are cut short at any moment go on without loss or duplicates, and end with the same content."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from itemkit import _files, store
from itemkit.decode import DecodeConfig
from itemkit.errors import StoreError
from itemkit.extraction import extract
from itemkit.store import load_features

from fakes import FakeEncoder, FakeLocaliser, FakeParser, Models, fake_models, make_images

N = 40

# Runs in processes of their own, slow enough to be hit. They are forked from one that has imported torch, as
# that takes longer than all else here; a line of JSON on its stdin starts one.
ZYGOTE = """
import json, os, signal, sys
from pathlib import Path
import torch
import itemkit.extraction, itemkit.images
from itemkit.decode import DecodeConfig
from fakes import fake_models, manifest_of
torch.set_num_threads(1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    task = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    code = 0
    err = os.open(task["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(err, 2)
    os.setsid()
    try:
        images = sorted(Path(task["images"]).glob("*.png"))
        itemkit.extraction.extract(
            manifest_of(images), task["out"], fake_models(delay_s=task["delay"]), batch_size=2, shard_size=4,
            progress=False, decode=DecodeConfig(loader=task["loader"], threads=2))
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        code = 1
    sys.stderr.flush()
    Path(task["log"] + ".code").write_text(str(code))
    os._exit(code)
"""


@dataclass
class Run:
    """One extraction in a process of its own."""

    pid: int
    log: Path

    def wait(self) -> tuple[int | None, str]:
        """Its exit status (None if it was killed) and what it said."""
        deadline = time.monotonic() + 300
        while os.path.exists(f"/proc/{self.pid}"):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        code = Path(f"{self.log}.code")
        return int(code.read_text()) if code.exists() else None, self.log.read_text()

    def kill(self) -> None:
        """Without warning."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    if not os.path.exists("/proc/self"):
        pytest.skip("needs /proc to follow processes")
    logs = tmp_path_factory.mktemp("logs")
    here = Path(__file__).parent
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])},
    )

    def begin(images, out, delay=0.01, loader="itemkit.images:load_image"):
        log = logs / f"{len(list(logs.iterdir()))}.log"
        log.touch()  # a run may be killed before it can
        task = {"images": images, "out": out, "delay": delay, "loader": loader, "log": log}
        zygote.stdin.write(json.dumps(task, default=str) + "\n")
        zygote.stdin.flush()
        return Run(int(zygote.stdout.readline()), log)

    yield begin
    zygote.stdin.close()
    zygote.wait()


def wait_for_shards(out, n):
    deadline = time.monotonic() + 300
    while len(store.shard_files(out)) < n:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def truth(folder, n):
    """Manifest, images and features of a run that nothing disturbs; one image of n is unreadable."""
    manifest = make_images(folder / "images", n)
    (folder / "images" / "00007.png").write_bytes(b"not an image")
    extract(manifest, folder / "out", fake_models(), progress=False)
    return manifest, folder / "images", load_features(folder / "out")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return truth(tmp_path_factory.mktemp("undisturbed"), N)


def check(out, undisturbed):
    manifest, _, expected = undisturbed
    read = load_features(out)
    pd.testing.assert_frame_equal(read.table, expected.table)
    pd.testing.assert_frame_equal(read.objects, expected.objects, atol=1e-6)
    for name in ("image_emb", "caption_emb", "region_emb", "phrase_emb", "owner"):
        np.testing.assert_allclose(getattr(read, name), getattr(expected, name), atol=2e-4)
    ids = [i for path in store.shard_files(out) for i in pd.read_parquet(path)["feature_id"]]
    assert len(ids) == len(set(ids)) == len(manifest) - 1, "a feature was lost or stored twice"
    assert len(pd.read_parquet(out / "errors.parquet")) == 1
    assert not list(out.rglob("*tmp*")) and not (out / "decoding.json").exists()


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(start, undisturbed, tmp_path, seed):
    moment = random.Random(seed)
    for _ in range(2):
        run = start(undisturbed[1], tmp_path / "out")
        time.sleep(moment.uniform(0, 0.4))
        run.kill()
    extract(undisturbed[0], tmp_path / "out", fake_models(), batch_size=2, shard_size=4, progress=False)
    check(tmp_path / "out", undisturbed)


class PowerCut(BaseException):
    """Nothing may catch it to clean up."""


def test_stopped_at_every_single_write(tmp_path, monkeypatch):
    """As by a power cut in the middle of and after each file that a run writes."""
    expected = truth(tmp_path / "truth", 12)
    real = _files.atomic_write
    writes = 0

    def write(path, fill):
        nonlocal writes
        writes += 1
        step, kind = divmod(cut, 2)
        if writes != step + 1:
            return real(path, fill)
        if kind == 0:
            path.with_name(f".{path.name}.tmp-1").write_bytes(b"PAR1 half a file")
        else:
            real(path, fill)
        raise PowerCut

    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow on a busy disk, and no power is cut in truth
    for module in ("itemkit._files", "itemkit.store"):
        monkeypatch.setattr(f"{module}.atomic_write", write)
    cut, finished = 0, False
    while not finished:
        out, writes = tmp_path / str(cut), 0
        try:
            extract(expected[0], out, fake_models(), batch_size=4, shard_size=4, progress=False)
            finished = True
        except PowerCut:
            writes = -1000
        extract(expected[0], out, fake_models(), batch_size=4, shard_size=4, progress=False)
        check(out, expected)
        cut += 1
    assert cut > 2 * 10, "run.json; manifest, errors, run.json; 3 shards; manifest, errors, run.json"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_interrupt_keeps_everything_and_says_how_to_go_on(start, undisturbed, tmp_path, number, code):
    manifest, images, _ = undisturbed
    run = start(images, tmp_path / "out", delay=0.05)
    wait_for_shards(tmp_path / "out", 1)
    os.kill(run.pid, number)
    status, said = run.wait()
    assert "finishing the batch at hand" in said
    assert f"everything computed so far is in {tmp_path / 'out'}. Run the same command again" in said
    assert status == code and ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    with pytest.raises(StoreError, match=r"not finished. Run the same `itemkit extract` again"):
        load_features(tmp_path / "out")
    part = load_features(tmp_path / "out", partial=True)
    assert 4 <= len(part) < N and not list((tmp_path / "out").rglob("*tmp*"))
    assert not (tmp_path / "out" / "decoding.json").exists()
    models = fake_models()
    report = extract(manifest, tmp_path / "out", models, progress=False)
    assert report.reused == len(part) and models.encoder.images_encoded == N - 1 - len(part)
    check(tmp_path / "out", undisturbed)


def test_second_interrupt_stops_at_once(start, undisturbed, tmp_path):
    run = start(undisturbed[1], tmp_path / "out", delay=0.05)
    wait_for_shards(tmp_path / "out", 1)
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in run.wait()[1]
    extract(undisturbed[0], tmp_path / "out", fake_models(), progress=False)
    check(tmp_path / "out", undisturbed)


def test_partial_read_of_a_killed_run_with_user_captions(tmp_path):
    class Mortal(FakeEncoder):
        def encode_images(self, pixels, patches=False):
            if self.images_encoded >= 8:
                raise PowerCut
            return super().encode_images(pixels, patches)

    manifest = make_images(tmp_path / "images", 6)
    manifest = pd.concat([manifest, manifest]).assign(caption=[f"a {i} ball" for i in range(12)])
    models = Models(Mortal(), None, FakeParser(), FakeLocaliser())
    options = {"captions": "user", "batch_size": 4, "progress": False}
    with pytest.raises(PowerCut):
        extract(manifest, tmp_path / "out", models, **options)
    part = load_features(tmp_path / "out", partial=True)
    assert part.table["caption"].tolist() == [f"a {i} ball" for i in range(8)]


def test_two_runs_at_once_the_second_is_told(start, undisturbed, tmp_path):
    manifest, images, _ = undisturbed
    run = start(images, tmp_path / "out", delay=0.05)
    wait_for_shards(tmp_path / "out", 1)
    with pytest.raises(StoreError, match=rf"another run is writing to .*process {run.pid} "):
        extract(manifest, tmp_path / "out", fake_models(), progress=False)
    assert run.wait()[0] == 0
    check(tmp_path / "out", undisturbed)


def test_decoder_that_takes_the_process_down_is_isolated_by_the_next_run(start, tmp_path):
    manifest = make_images(tmp_path / "images", 12)
    os.rename(tmp_path / "images" / "00009.png", tmp_path / "images" / "crash.png")
    paths = [path.replace("00009", "crash") for path in manifest["path"]]
    loader = "loaders:load_or_crash"
    run = start(tmp_path / "images", tmp_path / "out", 0, loader)
    assert run.wait() == (None, ""), "died without a word"
    assert "crash.png" in json.loads((tmp_path / "out" / "decoding.json").read_text())
    decode = DecodeConfig(loader=loader)  # not isolated: in this process the image would be deadly
    report = extract(
        manifest.assign(path=paths), tmp_path / "out", fake_models(), decode=decode, progress=False
    )
    assert (report.n, report.errors, report.left) == (12, 1, 0)
    error = pd.read_parquet(tmp_path / "out" / "errors.parquet").iloc[0]
    assert error["path"] == "crash.png" and "crashed the decoder" in error["reason"]
    # known from now on
    report = extract(
        manifest.assign(path=paths), tmp_path / "out", fake_models(), decode=decode, progress=False
    )
    assert (report.reused, report.errors) == (11, 1)


def test_shards_are_written_after_a_while_even_if_small(tmp_path):
    manifest = make_images(tmp_path / "images", 6)
    extract(manifest, tmp_path / "out", fake_models(), batch_size=2, flush_seconds=0, progress=False)
    assert len(store.shard_files(tmp_path / "out")) == 3
