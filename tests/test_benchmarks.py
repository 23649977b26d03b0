"""The benchmarks run at toy size, keep what they have measured when they are cut off, and reach the page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import extract, gpu, report, subjects, timing
from itemkit.captions import Caption
from tools import wheels

REPO = Path(__file__).resolve().parents[1]
ARGS = ["--preset", "mini", "--device", "cpu", "-n", "12", "--bare-images", "8", "--naive-images", "2"]


def toy(out: Path, *steps: str) -> dict:
    """Results of `benchmarks.gpu` at toy size, in a process that has computed nothing before."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--seconds", "9000", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--steps", *steps], cwd=REPO, env=environment, capture_output=True)
    record = json.loads((out / "gpu.json").read_text())
    assert done.returncode == 0, record
    return record


def test_the_gpu_benchmark_runs_at_toy_size(tmp_path):
    steps = ["machine", "encoder", "captioner base", "decoding", "head", "profile", "detector"]
    record = toy(tmp_path, *steps)
    assert list(record["steps"]) == steps and record["toy"]
    assert {done["status"] for done in record["steps"].values()} == {"done"}
    values = {name: done["values"] for name, done in record["steps"].items()}
    assert record["device"] == values["machine"]["device"]
    goals = [(step, name) for step, name in report.GPU_GOALS if step in values]
    assert len(goals) == 4 and all(values[step][name] > 0 for step, name in goals)
    assert values["captioner base"]["greedy, batch 2, images/s"] > 0
    assert {"1 threads, images/s", "1 processes, images/s"} <= set(values["decoding"])
    assert len(values["profile"]) == 31 and "Self CPU" in (tmp_path / "profile.txt").read_text()
    page = (tmp_path / "gpu.md").read_text()
    assert "TOY SIZE" in page and "| ≥ 800 |" in page
    assert {line.count("|") for line in page.splitlines() if line.startswith("|")} == {4}


@pytest.mark.slow
def test_the_rest_of_it(tmp_path):
    """Minutes where bfloat16 is emulated: a first step of the laboratory alone takes one."""
    record = toy(tmp_path, "tests", "agreement", "captioner large", "laboratory")
    values = {name: done["values"] for name, done in record["steps"].items()}
    assert values["tests"]["passed"] >= 7 and "failed" not in values["tests"]
    assert values["agreement"]["cpu float32 1: largest cosine distance of image_emb"] <= 1e-6
    assert values["laboratory"]["clip, seconds of the first step"] > 0


def steady(bench: gpu.Bench) -> None:
    bench.note("before", 1.0)
    time.sleep(0.01)


def hangs(bench: gpu.Bench) -> None:
    bench.note("before", 2.0)
    subprocess.run(["sleep", "600"])


def breaks(bench: gpu.Bench) -> None:
    bench.note("before", 3.0)
    raise RuntimeError("CUDA is gone")


def dies(bench: gpu.Bench) -> None:
    bench.note("before", 4.0)
    time.sleep(0.2)
    os._exit(7)


def test_what_was_measured_stays_whatever_ends_a_step(tmp_path, monkeypatch, capsys):
    steps = {"steady": (steady, 100), "hangs": (hangs, 3), "breaks": (breaks, 100), "dies": (dies, 100)}
    monkeypatch.setattr(gpu, "STEPS", steps | {"late": (steady, 10**9)})
    monkeypatch.setattr(gpu, "warm", lambda: None)
    seen = []

    def write(path, record):
        seen.append({name: dict(done["values"]) for name, done in record["steps"].items()})
        path.write_text(json.dumps(record))

    monkeypatch.setattr(gpu, "write_json", write)
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert [done["status"] for done in found.values()] == ["done", "cut off", "failed", "failed", "skipped"]
    assert [done["values"].get("before") for done in found.values()] == [1.0, 2.0, 3.0, 4.0, None]
    assert found["breaks"]["note"] == "RuntimeError: CUDA is gone" and found["late"]["note"]
    # on disk before the step had ended
    assert any(values["hangs"] and not values["breaks"] for values in seen) and len(seen) >= 10
    assert (
        "| **late** | skipped" in (tmp_path / "gpu.md").read_text()
        and "hangs: cut off" in capsys.readouterr().out
    )


def test_a_folder_that_was_cut_off_is_not_taken_for_whole(tmp_path):
    def breaks(part: Path) -> None:
        (part / "half").write_text("")
        raise OSError

    with pytest.raises(OSError):
        subjects.once(tmp_path / "model", breaks)
    assert not (tmp_path / "model").exists()
    made = subjects.once(tmp_path / "model", lambda part: (part / "whole").write_text("a"))
    assert subjects.once(made, breaks) == made and [file.name for file in made.iterdir()] == ["whole"]


def test_made_up_images_are_all_different_to_the_store_and_the_captioner_is_the_real_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(subjects, "DISTINCT", 2)
    paths = subjects.read_images(None, 5, tmp_path)
    assert len({Path(path).read_bytes() for path in paths}) == 5
    images = [extract.load_image(path) for path in paths]
    assert images[0].size == (500, 375) and images[0].tobytes() == images[2].tobytes()
    captioner = subjects.captioner_at(tmp_path, subjects.TOY, torch.device("cpu"), "float32")
    found = captioner.caption(images[:2])
    assert [type(caption) for caption in found] == [Caption] * 2
    assert [caption.text for caption in found] == [subjects.caption_of(0), subjects.caption_of(1)]
    assert all(caption.logprob < 0 for caption in found)  # of the tokens that were made


def test_times_are_repeated_and_their_spread_is_told(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 3.0, 3.0, 4.0])  # runs of 1, 2 and 1 seconds
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    ran = []
    found = timing.timed(lambda: ran.append(1), torch.device("cpu"), seconds=3.5)
    assert (found.median, found.spread, found.runs, len(ran)) == (1.0, 1.0, 3, 4)


@pytest.mark.slow
def test_a_run_gives_a_table_and_a_row(tmp_path, capsys):
    file = tmp_path / "results" / "mini.json"
    sizes = ["--batch-sizes", "4", "8", "--repeat", "1", "--seconds", "0", "--json", str(file)]
    assert extract.main([*ARGS, *sizes]) == 0
    printed = capsys.readouterr().out
    assert "preset mini, regions grid: 12 images" in printed and "| bare decode, per s |" in printed
    found = report.Result(**json.loads(file.read_text()))
    assert found.images == 12 and set(found.stages_s) == {"global", "hierarchical"}
    assert found.bare_per_s["image"] > 0 and set(found.bare_per_s) <= set(found.spread)
    # what a ratio is made of
    limit = 1 / sum(1 / found.bare_per_s[name] for name in ("decode", "image", "caption"))
    assert found.per_s["limit"] == pytest.approx(limit)
    assert found.ratios["pipeline (global) / limit"] == pytest.approx(found.per_s["pipeline, global"] / limit)


def example(model: str) -> report.Result:
    names = (
        "pipeline (global) / limit", "one at a time / limit", "hierarchical / global, time",
        "second run / first, time", "1 % more images / first, time",
    )  # fmt: skip
    return report.Result(
        model=model, device="a cpu", precision="float32", threads=2, images=9, weights="",
        versions={"torch": "2"},
        bare_per_s={"decode": 100.0, "image": 10.0}, per_s={"limit": 9.0, "pipeline, global": 8.9},
        ratios=dict.fromkeys(names, 0.5), memory_mb=2048.0,
    )  # fmt: skip


def test_rows_replace_rows_and_nothing_else(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"# before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_rows([example("A"), example("B")], page)
    text = page.read_text()
    assert text.startswith("# before\n") and text.endswith(f"{report.END}\nafter\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| A") or line.startswith("| B")]
    assert len(rows) == 2 and "| 2.0 GB |" in rows[0]
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {rows[0].count("|")}
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has not the two marks"):
        report.write_rows([], page)


def test_the_page_has_the_marks_and_the_results_behind_its_rows():
    text = report.README.read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    for file in (REPO / "benchmarks" / "results").glob("*.json"):
        record = json.loads(file.read_text())
        assert "steps" in record or report.row(report.Result(**record)).startswith("|")


# ---- wheels


@pytest.fixture
def wheel(tmp_path) -> Path:
    """As an index has them, with a compiled library where this machine can compile one."""
    content = {"thing/__init__.py": b"x = 1\n", "thing/fast.pyx": b"y", "thing/tests/test_x.py": b"z"}
    content["thing-1.0.dist-info/METADATA"] = b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
    content["thing-1.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    if shutil.which("cc") and shutil.which("strip"):
        (tmp_path / "fast.c").write_text("int answer(void) { return 42; }")
        subprocess.run(["cc", "-g", "-shared", "-o", "fast.so", "fast.c"], cwd=tmp_path, check=True)
        content["thing/fast.so"] = (tmp_path / "fast.so").read_bytes()
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
        file.writestr("thing-1.0.dist-info/RECORD", "thing/__init__.py,sha256=wrong,6\n")
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_a_stripped_wheel_installs_and_agrees_with_its_record(wheel, tmp_path):
    assert "thing/__init__.py" in wheels.problems(wheel)
    before = contents(wheel)
    wheels.slim(wheel)
    assert wheels.problems(wheel) == []
    after = contents(wheel)
    assert before.keys() - after.keys() == {"thing/fast.pyx", "thing/tests/test_x.py"}
    if "thing/fast.so" in after:
        assert len(after["thing/fast.so"]) < len(before["thing/fast.so"])
    options = ["--quiet", "--no-index", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    assert (tmp_path / "site" / "thing" / "__init__.py").read_bytes() == b"x = 1\n"
