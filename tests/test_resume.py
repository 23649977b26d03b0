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

import pandas as pd
import pytest

from itemkit import _files, extraction, store
from itemkit.errors import StoreError
from itemkit.extraction import extract
from itemkit.store import load_features

from fakes import fake_models, make_images, same_content

pytestmark = pytest.mark.filterwarnings("ignore:.*without features", "ignore:.*set aside")

N = 40

# Runs in processes of their own, slow enough to be hit. They are forked from one that has imported torch, as
# that takes longer than all else here; a line of JSON on its stdin starts one.
ZYGOTE = """
import json, os, signal, sys
from pathlib import Path
import torch
import itemkit.decode, itemkit.extraction, itemkit.steps
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
    real = itemkit.decode.load_image
    def load(data, name="", **options):
        if "hang" in name:
            import time
            time.sleep(600)
        return real(data, name=name, **options)
    itemkit.decode.load_image = load
    try:
        images = sorted(Path(task["images"]).glob("*.png"))
        config = DecodeConfig(threads=2, prefetch=task["prefetch"], processes=task["processes"])
        itemkit.extraction.extract(
            manifest_of(images), task["out"], fake_models(delay_s=task["delay"]), batch_size=2, shard_size=4,
            progress=False, decode=config)
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        code = 1
    sys.stderr.flush()
    Path(task["log"] + ".code").write_text(str(code))
    sys.exit(code)  # as any program ends: what still hangs must not keep it
"""


def session_of(process: Path) -> int:
    """The session of a process: what a run started belongs to that of the run, and ends with it."""
    with contextlib.suppress(OSError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    return 0


@dataclass
class Run:
    """One extraction in a process of its own."""

    pid: int
    log: Path

    def wait(self) -> tuple[int | None, str]:
        """Its exit status (None if it was killed) and what it said."""
        deadline = time.monotonic() + 300
        while self.pid in (sessions := [session_of(path) for path in Path("/proc").glob("[0-9]*")]):
            assert time.monotonic() < deadline, sessions
            time.sleep(0.02)
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

    def begin(images, out, delay=0.01, prefetch=0, processes=False):
        log = logs / f"{len(list(logs.iterdir()))}.log"
        log.touch()  # a run may be killed before it can
        task = {"images": images, "out": out, "delay": delay, "prefetch": prefetch, "log": log}
        task["processes"] = processes
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
    same_content(load_features(out), expected)
    ids = [i for path in store.shard_files(out) for i in pd.read_parquet(path)["feature_id"]]
    assert len(ids) == len(set(ids)) == len(manifest) - 1, "a feature was lost or stored twice"
    assert len(pd.read_parquet(out / "errors.parquet")) == 1
    assert not list(out.rglob("*tmp*"))


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(start, undisturbed, tmp_path, seed):
    moment = random.Random(seed)
    for _ in range(2):
        run = start(undisturbed[1], tmp_path / "out", processes=seed > 1)
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
    for module in ("itemkit._files", "itemkit.store"):  # where it is used
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
    assert cut > 2 * 7, "run.json; 3 shards; run.json, manifest, errors, run.json"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_interrupt_keeps_everything_and_says_how_to_go_on(start, undisturbed, tmp_path, number, code):
    manifest, images, _ = undisturbed
    run = start(images, tmp_path / "out", delay=0.05, processes=number == signal.SIGINT)
    wait_for_shards(tmp_path / "out", 1)
    os.kill(run.pid, number)
    status, said = run.wait()
    assert "finishing the batch at hand" in said
    assert f"everything computed so far is in {tmp_path / 'out'}. Run the same command again" in said
    assert status == code and ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    with pytest.raises(StoreError, match=r"not finished. Run the same `itemkit extract` again"):
        load_features(tmp_path / "out")
    done = pd.read_parquet(tmp_path / "out" / "manifest.parquet").dropna(subset="feature_id")["path"]
    assert 4 <= len(done) < N and not list((tmp_path / "out").rglob("*tmp*"))
    assert len(load_features(tmp_path / "out", rows=[images / name for name in done])) == len(done)
    models = fake_models()
    report = extract(manifest, tmp_path / "out", models, progress=False)
    assert report.reused == len(done) and models.encoder.images_encoded == N - 1 - len(done)
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


@pytest.mark.parametrize(("prefetch", "processes"), [(0, False), (2, False), (2, True)])
def test_second_interrupt_escapes_a_decoder_that_hangs(start, tmp_path, prefetch, processes):
    manifest, images, expected = truth(tmp_path, 12)
    os.rename(images / "00009.png", images / "00009_hang.png")
    run = start(images, tmp_path / "cut", 0, prefetch, processes)
    wait_for_shards(tmp_path / "cut", 1)
    for _ in range(2):
        time.sleep(0.3)
        os.kill(run.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in run.wait()[1]
    os.rename(images / "00009_hang.png", images / "00009.png")
    assert extract(manifest, tmp_path / "cut", fake_models(), progress=False).reused >= 4
    check(tmp_path / "cut", (manifest, images, expected))


def test_shards_are_written_after_a_while_even_if_small(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "FLUSH_SECONDS", 0)
    manifest = make_images(tmp_path / "images", 6)
    extract(manifest, tmp_path / "out", fake_models(), batch_size=2, progress=False)
    assert len(store.shard_files(tmp_path / "out")) == 3
