"""The GPU path proven and priced in a few minutes.

    python -m benchmarks.gpu --out DIR --seconds 450
    python -m benchmarks.gpu --out DIR --toy             (everything at toy size on the CPU)

The most important step comes first. Each is a process of its own with its own share of the time, and what is
measured is on disk at once (DIR/gpu.json): a step that fails, hangs or is cut off costs its own numbers only.
Models have random weights at true size: right for speed and for nothing else.
"""

from __future__ import annotations

import os

# so that a library's look for a device, while it is imported, lets this process fork
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import argparse
import contextlib
import json
import multiprocessing
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import extract, head, subjects
from benchmarks.report import Result, gpu_page
from benchmarks.timing import timed
from itemkit._files import atomic_write, write_json
from itemkit.decode import DecodeConfig
from itemkit.detection import load_detector
from itemkit.features import Features
from itemkit.images import load_image
from itemkit.metrics import average_precision
from itemkit.models import Models
from itemkit.presets import get_preset
from itemkit.steps import Steps
from itemkit.store import load_features

REPO = Path(__file__).resolve().parents[1]
FULL_SECONDS = 450  # that the shares of the steps below are meant for


@dataclass
class Bench:
    """Where a step runs, and where what it measures goes."""

    device: torch.device
    toy: bool
    scratch: Path
    out: Path
    note: Callable[[str, float | str], object]

    def size(self, full: int, toy: int) -> int:
        """How many, at full and at toy size."""
        return toy if self.toy else full

    def rate(self, name: str, run: Callable[[], object], amount: float, seconds: float = 1.0) -> None:
        """Note an amount over the time that a run takes."""
        timing = timed(run, self.device, 0.0 if self.toy else seconds)
        self.note(name, amount / timing.median)

    @property
    def precision(self) -> str:
        """Of models at true size."""
        return "float32" if self.toy else "bfloat16"

    def images(self, full: int, toy: int) -> list[str]:
        """Made-up JPEG files; all steps share them."""
        return subjects.read_images(None, self.size(6144, 8), self.scratch)[: self.size(full, toy)]

    def name(self, full: str) -> str:
        """A model's size, or the toy's."""
        return subjects.TOY if self.toy else full


# -- the steps -----------------------------------------------------------------------------------------------


def machine(b: Bench) -> None:
    """What the machine is, and what no program on it can exceed."""
    if b.device.type == "cuda":
        b.note("device", torch.cuda.get_device_name(b.device))
        b.note("device memory, GiB", torch.cuda.get_device_properties(b.device).total_memory / 2**30)
    else:
        b.note("device", extract.processor())
    b.note("versions", f"torch {torch.__version__}, Python {platform.python_version()}")
    b.note("processors", float(len(os.sched_getaffinity(0))))
    n = b.size(2**30, 2**20)
    here = torch.randint(0, 255, (n,), dtype=torch.uint8)
    there, other = here.to(b.device), torch.empty(n, dtype=torch.uint8, device=b.device)
    b.rate("copy on the device, GB/s read and written", lambda: other.copy_(there), 2 * n / 1e9)
    b.rate("copy to the device, GB/s", lambda: other.copy_(here), n / 1e9)
    if b.device.type == "cuda":
        pinned = here.pin_memory()
        b.rate("copy to the device, pinned, GB/s", lambda: other.copy_(pinned, non_blocking=True), n / 1e9)
    for dtype, side in ((torch.bfloat16, b.size(8192, 64)), (torch.float32, b.size(8192, 64))):
        x, y = (torch.randn(side, side, device=b.device, dtype=dtype) for _ in "xy")
        name = f"matrix product, {str(dtype).removeprefix('torch.')}, TFLOP/s"
        b.rate(name, lambda x=x, y=y: x @ y, 2 * side**3 / 1e12)


def tests(b: Bench) -> None:
    """The tests that need a GPU; at toy size on the CPU, against itself."""
    import pytest

    os.environ["ITEMKIT_TEST_DEVICE"] = b.device.type
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0.0)

    class Listener:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
                b.note(report.outcome, counts[report.outcome])
                if report.failed:
                    b.note(report.nodeid.partition("::")[2], report.longreprtext.splitlines()[-1][:120])

    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", *(["-k", "toy"] if b.toy else [])]
    files = [str(REPO / "tests" / f"test_{name}.py") for name in ("gpu", "devices")]
    pytest.main([*options, *files], plugins=[Listener()])
    if counts["failed"] or not counts["passed"]:
        raise RuntimeError("not all tests passed; what they said is in log.txt")


def extraction(b: Bench, encoder: str, captioner: str | None, paths: list[str]) -> None:
    """Bare models, and the pipeline with global and with dense local features."""
    words = ["--random-true-size", b.name(encoder), "--precision", b.precision, "--device", str(b.device)]
    if captioner:
        words += ["--random-captioner", b.name(captioner)]
    sizes = ["4", "8"] if b.toy else ["128", "256", "512"]
    words += ["--batch-sizes", *sizes, "--bare-images", sizes[-1], "--first-runs-only"]
    words += ["--repeat", "1" if b.toy else "2", "--seconds", "0" if b.toy else "1"]
    args = extract.parser().parse_args(words)

    def save(result: Result) -> None:
        for name, value in result.values.items():
            b.note(name, value)

    with tempfile.TemporaryDirectory(dir=b.scratch) as stores:
        extract.run_benchmark(extract.build(args, b.scratch), paths, args, Path(stores), save)


def encoder(b: Bench) -> None:
    """ViT-L/14 with users' captions."""
    extraction(b, "ViT-L-14", None, b.images(6144, 8))


def captioner_base(b: Bench) -> None:
    """BLIP base in front of ViT-L/14, then alone."""
    extraction(b, "ViT-L-14", "base", b.images(3072, 8))
    captions(b, "base")


def captioner_large(b: Bench) -> None:
    """BLIP large alone, then in front of ViT-L/14."""
    captions(b, "large")
    extraction(b, "ViT-L-14", "large", b.images(2048, 8))


def captions(b: Bench, size: str) -> None:
    """How quick a captioner is with its ways of decoding and sizes of batches, on preprocessed images."""
    model = subjects.captioner_at(b.scratch, b.name(size), b.device, b.precision)
    images = [model.preprocess(load_image(path)) for path in b.images(512, 4)]
    for beams in (1, 3):
        model.decoding = replace(model.decoding, num_beams=beams)
        for model.batch_size in (b.size(128, 2), b.size(512, 4)):
            way = f"{'greedy' if beams == 1 else f'beam {beams}'}, batch {model.batch_size}, images/s"
            b.rate(way, lambda: model.caption(images), len(images))


def decoding(b: Bench) -> None:
    """Threads and processes that decode and resize."""
    model = Models(subjects.encoder_at(b.scratch, b.name("ViT-L-14"), b.device, b.precision))
    paths, cores = b.images(4096, 8), len(os.sched_getaffinity(0))
    for threads in (1, 2, 4, 8, 16):
        for processes in (False, True):
            if threads <= cores:
                config = DecodeConfig(threads=threads, processes=processes)
                part = paths[: 256 * threads]
                name = f"{threads} {'processes' if processes else 'threads'}, images/s"
                b.rate(name, lambda part=part, c=config: extract.decode_all(part, model, c), len(part), 0.0)


def agreement(b: Bench) -> None:
    """The preset mini on the CPU and on the device: how far apart, and how quick."""
    manifest = subjects.as_manifest(b.images(128, 4), False)
    found: dict[str, Features] = {}
    ways = [("cpu", "float32"), (str(b.device), "float32"), (str(b.device), "bfloat16")]
    for name, precision in ways[: b.size(3, 2)]:
        preset, key = replace(get_preset("mini"), precision=precision), f"{name} {precision}"
        store = b.scratch / f"agreement {len(found)}"
        for _ in range(2):  # the first run warms up
            shutil.rmtree(store, ignore_errors=True)
            report = extract.extract(manifest, store, preset.build(name), progress=False)
        b.note(f"{key}, images/s", report.computed / report.seconds)
        found[f"{key} {len(found)}"] = load_features(store)
    first, *others = found
    for key in others:
        same = found[first].table["caption"].to_numpy() == found[key].table["caption"].to_numpy()
        b.note(f"{key}: share of equal captions", float(same.mean()))
        for array in ("image_emb", "caption_emb"):
            a, c = (np.asarray(getattr(found[k], array), np.float64)[same] for k in (first, key))
            cosine = (a * c).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(c, axis=1)
            b.note(f"{key}: largest cosine distance of {array}", float((1 - cosine).max(initial=0.0)))


def heads(b: Bench) -> None:
    """MLP heads on 100,000 features, networks of several seeds at once."""
    x, y, x_test, y_test = head.make_data(b.size(100_000, 500), b.size(1536, 16))
    head.make_head(1, str(b.device)).fit(x, y)  # what only a first call does
    for members in (1, 5, 20):
        start = time.perf_counter()
        model = head.make_head(b.size(20, 2), str(b.device), members).fit(x, y)
        b.note(f"members {members}, seconds", time.perf_counter() - start)
        b.note(f"members {members}, AP", average_precision(y_test, model.decision_function(x_test)))


def profile(b: Bench) -> None:
    """Where the device's time goes in one batch of the whole method: the thirty longest operations."""
    from torch.profiler import ProfilerActivity

    models = subjects.models_at(b.scratch, b.name("ViT-L-14"), b.name("base"), b.device, b.precision)
    images = [load_image(path) for path in b.images(256, 4)]
    steps = Steps(models)
    steps(images)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if b.device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as profiler:
        steps(images)
    where = "device" if b.device.type == "cuda" else "cpu"
    averages = profiler.key_averages()
    atomic_write(
        b.out / "profile.txt", averages.table(sort_by=f"self_{where}_time_total", row_limit=60).encode()
    )
    took = {event.key: getattr(event, f"self_{where}_time_total") for event in averages}
    b.note("all operations, ms", sum(took.values()) / 1000)
    for name in sorted(took, key=lambda key: -took[key])[:30]:
        b.note(f"{name[:90]}, ms".replace("|", "/"), took[name] / 1000)


def detector(b: Bench) -> None:
    """Grounding DINO on pictures of one size, three phrases each."""
    model = subjects.encoder_at(b.scratch, b.name("ViT-L-14"), b.device, b.precision)
    size = b.name("base")
    folder = subjects.once(
        b.scratch / "grounding-dino", lambda part: subjects.write_grounding_dino(part, size, b.device)
    )
    images = [load_image(path) for path in b.images(64, 2)]
    phrases = [phrase for i in range(len(images)) for phrase in subjects.caption_of(i).split(" and ")]
    owner = torch.arange(len(images), device=b.device).repeat_interleave(3)
    whole = model.encode_images(torch.stack([model.preprocess(image) for image in images]))
    emb = model.encode_texts(phrases)
    for precision in ("float32", "bfloat16"):
        finder = load_detector("grounding_dino", model, b.device, model=folder, precision=precision)
        run = lambda finder=finder: finder.locate(images, whole, emb, owner, phrases)  # noqa: E731
        b.rate(f"{precision}, images/s", run, len(images))


# `python -m minilab` with fewer renders: how quick a step is does not depend on their number
LABORATORY = """import sys, minilab.build as build
from minilab.__main__ import main, parser
build.N_RENDERS, steps = map(int, (sys.argv.pop(1), sys.argv.pop(1)))
sys.exit(main(sys.argv[1:] + (["--until", str(steps)] if "--until" in parser().format_help() else [])))"""
# in this order: the last two need the VQ-VAE, cut off where the laboratory can be
TRAININGS = ("clip", "captioner", "object_detector", "flow", "vq", "latent_flow", "layout_flow", "painter")


def laboratory(b: Bench) -> None:
    """The first hundred steps of each training of the mini laboratory."""
    steps, work = b.size(100, 1), b.scratch / "laboratory"
    command = [sys.executable, "-c", LABORATORY, str(b.size(4096, 16)), str(steps)]
    options = ["--data", str(work / "data"), "--work", str(work), "--device", str(b.device)]
    for part in TRAININGS[: b.size(len(TRAININGS), 1)]:
        process = subprocess.Popen([*command, "build", part, *options], cwd=REPO)
        log, rows = work / "runs" / f"{part}.jsonl", []
        while process.poll() is None and not (rows and rows[-1]["step"] >= steps - 1):
            time.sleep(0.1)
            with contextlib.suppress(OSError, ValueError):  # not there, or a line half written
                rows = [json.loads(line) for line in log.read_text().splitlines()]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20 if part == "vq" else 0)
        process.kill()
        if process.wait() > 0 or not rows:
            b.note(part, "failed or unknown: see log.txt")
            continue
        first, last = rows[0], rows[-1]
        if last["step"] > first["step"]:
            rate = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
            b.note(f"{part}, steps/s over {last['step'] + 1}", rate)
        b.note(f"{part}, seconds of the first step", first["seconds"])


# seconds of each at most, of `FULL_SECONDS`; what one leaves over is there for the next
STEPS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "machine": (machine, 30),
    "tests": (tests, 90),
    "encoder": (encoder, 80),
    "captioner base": (captioner_base, 90),
    "decoding": (decoding, 45),
    "head": (heads, 30),
    "agreement": (agreement, 45),
    "profile": (profile, 40),
    "captioner large": (captioner_large, 75),
    "detector": (detector, 45),
    "laboratory": (laboratory, 150),
}


# -- one process for each ------------------------------------------------------------------------------------


def _child(run: Callable[[Bench], None], bench: Bench, pipe: Any) -> None:
    os.setsid()  # so that whatever it starts ends with it
    with open(bench.out / "log.txt", "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    bench.note = lambda name, value: pipe.send(("value", name, value))
    print(f"\n== {run.__name__}", flush=True)
    try:
        run(bench)
        pipe.send(("done", ""))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"[:300]))
    sys.stdout.flush()


def run_step(
    run: Callable[[Bench], None],
    bench: Bench,
    limit: float,
    done: dict[str, Any],
    save: Callable,
    method: str,
) -> None:
    """Run a step in a process; what it measures and what became of it go into ``done``."""
    start, context = time.monotonic(), multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(run, bench, theirs))
    process.start()
    theirs.close()
    done |= {"status": "cut off", "note": f"it was given {limit:.0f} s"}
    try:
        while ours.poll(max(0.0, limit - (time.monotonic() - start))):
            kind, *rest = ours.recv()
            if kind != "value":
                done |= {"status": kind, "note": rest[0]}
                break
            done["values"][rest[0]] = rest[1]
            save()
    except EOFError:
        done |= {"status": "failed", "note": "its process died"}
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    done["seconds"] = time.monotonic() - start


def warm() -> None:
    """Import once, before the processes part, what all of them need."""
    import open_clip  # noqa: F401
    from transformers import BertTokenizer, BlipForConditionalGeneration  # noqa: F401


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of gpu.json, gpu.md, profile.txt, log.txt"
    )
    parser.add_argument(
        "--seconds", type=float, default=FULL_SECONDS, help="of all steps (default: %(default)s)"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP",
                        help=f"some of: {', '.join(STEPS)}")  # fmt: skip
    parser.add_argument(
        "--toy", action="store_true", help="at toy size on the CPU, to see that all of it runs"
    )
    args = parser.parse_args(argv)
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in STEPS if name in args.steps]
    steps = {name: {"status": "not begun", "seconds": 0.0, "note": "", "values": {}} for name in names}
    record: dict[str, Any] = {"device": "unknown", "versions": "", "toy": args.toy, "steps": steps}

    def save() -> None:
        record.update(
            {key: steps[names[0]]["values"].get(key, record[key]) for key in ("device", "versions")}
        )
        write_json(args.out / "gpu.json", record)
        atomic_write(args.out / "gpu.md", (gpu_page(record) + "\n").encode())

    save()
    warm()
    how = "fork"
    with tempfile.TemporaryDirectory(prefix="itemkit-gpu-") as folder:
        device = torch.device("cpu" if args.toy else "cuda")
        bench = Bench(device, args.toy, Path(folder), args.out, print)
        for name in names:
            run, share = STEPS[name]
            left = args.seconds - (time.monotonic() - start)
            limit = min(left, share * args.seconds / FULL_SECONDS)
            if limit < 0.05 * share:
                steps[name].update(status="skipped", note="no time was left")
            else:
                run_step(run, bench, limit, steps[name], save, how)
                if steps[name]["status"] == "failed" and name == names[0] and how == "fork":
                    how = "spawn"  # this process has touched the device after all
                    run_step(run, bench, limit, steps[name], save, how)
            save()
            print(f"{name}: {steps[name]['status']}, {steps[name]['seconds']:.0f} s", flush=True)
    print(gpu_page(record))
    return 0 if all(done["status"] == "done" for done in steps.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
