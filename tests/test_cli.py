"""The command line: help, one-line errors with status 2, and each command's way through, with stand-ins."""

from __future__ import annotations

import itemkit  # noqa: F401  (first: it repairs the torchvision import)

# isort: split

import gc
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.utils.parallel import Parallel, delayed

from itemkit import cli, presets
from itemkit.decode import DecodeConfig
from itemkit.presets import Preset
from itemkit.store import load_features
from itemkit.text import probability

import fakes

COMMANDS = "doctor run audit extract train evaluate detect explore export study download".split()
STUB = ["--preset", "stub", "--device", "cpu"]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(autouse=True)
def no_mini_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not depend on the mini models."""
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path / "nothing"))


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """A preset whose models are cheap stand-ins."""
    models = fakes.fake_models()
    parts = {name: getattr(models, name) for name in ("captioner", "encoder", "parser", "localiser")}
    preset = Preset(name="stub", about="For these tests.", **parts)
    monkeypatch.setitem(presets.PRESETS, "stub", preset)
    return preset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """160 pictures in a CSV: enough of each class in val for a rate of 5 %."""
    return write_data(tmp_path, 160)


def write_data(folder: Path, n: int, **columns: object) -> Path:
    """Write pictures, half of them fake, with splits, and their CSV."""
    table = fakes.make_images(folder / "images", n)
    table["split"] = ((["train"] * 2 + ["val"] * 4 + ["test"] * 2) * n)[:n]
    table["path"] = [f"images/{Path(p).name}" for p in table["path"]]
    table = table.assign(**columns).drop(columns="caption")
    table.to_csv(folder / "manifest.csv", index=False)
    return folder / "manifest.csv"


def named(name: str, function: Callable) -> Callable:
    """A stand-in for a command, whose name is what one types."""
    function.__name__ = name
    return function


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must end with this status; return stdout, or a failure's last line."""

    def run(*words: object, status: int = 0) -> str:
        capsys.readouterr()
        got = cli.main([str(word) for word in words])
        shown = capsys.readouterr()
        assert got == status, shown.err
        assert "Traceback" not in shown.err
        if status != 2:
            return shown.out
        last = shown.err.strip().splitlines()[-1]
        assert last.startswith("itemkit: "), shown.err
        return last.removeprefix("itemkit: ")

    return run


# ---------------------------------------------------------------------------------------------------- help


def test_these_are_all_commands() -> None:
    text = cli._parser().format_help()
    assert [c for c in COMMANDS if f"\n    {c} " not in text] == []
    assert text.count("\n    ") - text.count("\n        ") == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: itemkit {command} ") and "Exit status: 0 done; 1 done, but" in text
    options = cli._parser()._subparsers._group_actions[0].choices[command]._actions  # type: ignore[union-attr]
    assert [action.dest for action in options if not action.help] == []


def test_data_and_model_options_are_the_same_everywhere() -> None:
    commands = cli._parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    names = {name: {action.dest for action in commands[name]._actions} for name in COMMANDS}
    models = {"preset", "models", "device", "threads", *cli.PARTS}
    assert all(models <= names[name] for name in ("doctor", "run", "extract", "detect", "study"))
    images = {"layout", "root", "real_root", "images_to"}
    assert all(images <= names[name] for name in ("run", "audit", "extract", "study"))
    assert all({"fpr", "fnr"} <= names[name] for name in ("run", "train", "evaluate", "detect"))


@pytest.mark.parametrize(
    "words",
    [
        [], ["unknown"], ["extract"], ["detect"], ["download"],
        ["train", "x", "--out", "y", "--members", "0"], ["train", "x", "--out", "y", "--members", "-3"],
        ["train", "x", "--out", "y", "--seeds", "3"], ["detect", "x.png", "--threads", "0"],
        ["detect", "x.png", "--fpr", "5"], ["train", "x", "--out", "y", "--fnr", "0"],
        ["run", "--fpr", "nan"], ["study", "--seeds", "1.5"], ["study", "--per-set", "²"],
    ],
)  # fmt: skip
def test_wrong_words_end_with_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: itemkit")


def test_help_is_quick_and_loads_no_library() -> None:
    code = (
        "import sys\nfrom itemkit import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'pandas', 'spacy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.stderr == ""


def test_a_verdict_waits_for_no_library_that_it_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(fakes.png(3, (48, 40)))
    code = """
import gc, sys
from itemkit.cli import main
looks = []
gc.callbacks.append(lambda phase, about: looks.append(about["generation"]))
def heavy():
    names = ("sklearn", "scipy.stats", "scipy.ndimage", "matplotlib", "seaborn", "umap", "numba", "skimage",
             "pyarrow.dataset", "ray", "jupyter_client", "itemkit.extraction")
    return [name for name in names if name in sys.modules]
main(["detect", "a.png", "--device", "cpu"])
print(len(looks) < 50, gc.get_freeze_count() > 100_000, gc.get_threshold() == (700, 10, 10), heavy())
main(["detect", "a.png", "--card", "a card.png", "--device", "cpu"])
print(heavy())
"""
    settings = {name: value for name, value in os.environ.items() if name != "ITEMKIT_DATA"}
    words = {"cwd": tmp_path, "env": settings, "capture_output": True, "text": True, "check": True}
    out = subprocess.run([sys.executable, "-c", code], **words).stdout
    shown = [line for line in out.splitlines() if line.endswith("]")]
    assert shown == ["True True True []", "['matplotlib']"] and (tmp_path / "a card.png").is_file()


@pytest.mark.parametrize("module", ["itemkit", "itemkit.cli"])
def test_it_is_a_module_too(tmp_path: Path, module: str) -> None:
    words = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"itemkit {itemkit.__version__}\n"


# -------------------------------------------------------------------------------------------- one-line errors


@pytest.mark.parametrize(
    "command", [["extract", "x", "--out", "y"], ["detect", "x.png"], ["run"], ["doctor"], ["study"]]
)
def test_an_unknown_preset(command: list[str], run: Run) -> None:
    line = run(*command, "--preset", "papre", status=2)
    assert line.startswith("preset 'papre' is unknown. Did you mean 'paper'?")


def test_an_empty_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words in (["audit"], ["extract", "--preset", "stub", "--out", tmp_path / "out"]):
        line = run(words[0], tmp_path / "empty", *words[1:], status=2)
        assert "empty" in line and "image" in line
    assert not (tmp_path / "out").exists()
    assert "no such file or folder" in run("audit", tmp_path / "absent", status=2)


def test_missing_models(data: Path, tmp_path: Path, run: Run) -> None:
    words = ["extract", data, "--out", tmp_path / "out"]
    assert "mini models" in run(*words, status=2)
    line = run(*words, "--preset", "fast", "--models", tmp_path / "none", status=2)
    assert "there is no folder of models at" in line and "itemkit download --preset fast --to FOLDER" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_detector(data: Path, tmp_path: Path, run: Run) -> None:
    image = data.parent / "images" / "00000.png"
    line = run("detect", image, *STUB, status=2)
    assert line.startswith("there is no detector for preset 'stub' yet: train one with `itemkit extract`")
    line = run("detect", image, *STUB, "--detector", tmp_path / "none", status=2)
    assert str(tmp_path / "none") in line
    assert str(tmp_path / "store") in run("train", tmp_path / "store", "--out", tmp_path / "d", status=2)
    assert "store" in run("evaluate", tmp_path / "store", "--detector", tmp_path / "d", status=2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file_nam,label\na.png,0\n", "path"),
        ("path,label\nimages/00000.png,0\nimages/00001.png,maybe\n", "maybe"),
        ("path,label\nimages/00000.png,0\nimages/00000.png,1\n", "more than once"),
        ("", "expected a header line"),
    ],
)
def test_a_bad_manifest(table: str, message: str, data: Path, tmp_path: Path, run: Run) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text(table)
    assert message in run("extract", bad, "--out", tmp_path / "out", *STUB, status=2)
    assert message in run("audit", bad, status=2)


def test_options_that_need_another(data: Path, tmp_path: Path, run: Run) -> None:
    assert run("audit", data, "--size", "64", status=2).startswith("--size goes with --equalise FOLDER")
    for images in (["a.png", "b.png"], [data.parent / "images"]):
        line = run("detect", *images, *STUB, "--caption", "a red ball", status=2)
        assert line.startswith("--caption goes with one image")
    assert "nothing to download" in run("download", "--preset", "mini", status=2)


OWN = "class Mine:\n    version = '1'\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (f"{OWN}    def caption(self, images):\n        return ['a dog'] * len(images)\n", ""),
        (OWN, "has no method caption"),
        ("class Mine:\n    def caption(self, images): ...\n", "add `version = '1'`"),
        ("class Mine:\n    def __init__(self, key): ...\n", "'CODE:Mine' cannot be made: TypeError: "),
        ("class Mine(:\n", "'CODE:Mine' cannot be made: SyntaxError: "),
        ("", "module 'CODE' has no attribute 'Mine'"),
    ],
)  # fmt: skip
def test_a_captioner_of_ones_own_from_this_folder(
    code: str, said: str, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{abs(hash(code))}"  # imported once in a process
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    words = ["extract", data, "--out", "store", *STUB, "--captioner", f"{name}:Mine", "--localiser", "whole"]
    if said:
        assert said.replace("CODE", name) in run(*words, status=2) and not Path("store").exists()
    else:
        run(*words)
        assert set(load_features("store").table["caption"]) == {"a dog"}


def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in run("extract", data, "--out", tmp_path / "file" / "store", *STUB, status=2)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt, 130, ""),
        (MemoryError("Unable to allocate 8 GiB"), 2, "itemkit: the memory is full"),
    ],
)
def test_what_ends_a_command(
    raised: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stopped(args: object) -> int:
        raise raised

    monkeypatch.setattr(cli, "train", named("train", stopped))
    assert cli.main(["train", "x", "--out", "y"]) == status
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == bool(said)


def test_warnings_are_sentences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train(args: object) -> int:
        warnings.warn("the classes differ in size; choose \x1b[31ma smaller one", stacklevel=2)
        return 0

    shown = warnings.showwarning
    monkeypatch.setattr(cli, "train", train)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["train", "x", "--out", "y"]) == 0
    said = "itemkit: warning: the classes differ in size; choose \\x1b[31ma smaller one\n"
    assert capsys.readouterr().err == said and warnings.showwarning is shown


# ------------------------------------------------------------------------------------------- the way through


def test_extract_train_evaluate_detect(
    data: Path, tmp_path: Path, run: Run, stub: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    store, detector, csv = tmp_path / "store", tmp_path / "detector", tmp_path / "new" / "table.csv"
    run("extract", data, "--out", store, *STUB)
    encoded = stub.encoder.images_encoded
    run("extract", data, "--out", store, *STUB)
    assert stub.encoder.images_encoded == encoded == 160
    out = run("train", store, "--out", detector, "--members", "1", "--device", "cpu", "--threads", "1")
    assert f"detector written to {detector}" in out and "withheld" not in out
    head = json.loads((detector / "head.json").read_text())
    assert "cuda" not in json.dumps(head)

    report = tmp_path / "new" / "report.html"
    out = run("evaluate", store, "--detector", detector, "--csv", csv, "--report", report)
    page = report.read_text()
    assert (
        "40 images: 20 real, 20 fake of 1 generator; preset stub" in page and page.count('class="card"') == 16
    )
    assert "promised: false positives at a requested 1%: not promised" in page
    lines = out.splitlines()
    assert lines[0].startswith("40 images: split 'test' (splits as given (")
    table = pd.read_csv(csv)
    digest = load_features(store).provenance["models"]
    assert {"generator", "metric", "value", "low", "high", "n_real", "n_fake", "over"} <= set(table.columns)
    assert set(table["preset"]) == {"stub"} and set(table["models"]) == {digest} and digest in out
    row = next(line for line in lines if line.split()[:3] == ["all", "20", "20"])  # one row per generator
    assert len(re.findall(r"\d\.\d\d \(\d\.\d\d-\d\.\d\d\)", row)) >= 4
    assert "false positives at a requested 1%: not promised" in out
    assert "verdicts on 20 real images: " in out and "verdicts on 20 fake images: " in out
    assert cli.main(["evaluate", str(store), "--detector", str(detector), "--split", "train"]) == 0
    shown = capsys.readouterr()
    assert "itemkit: warning: 40 of the 40 images evaluated here " in shown.err
    tail = shown.out.partition("What was promised, and what happened:")[2]
    assert tail.strip().startswith("not checked: all 40 images trained or calibrated this detector")

    first, broken = data.parent / "images" / "00006.png", tmp_path / "broken.png"
    text = run("detect", first, "--detector", detector, *STUB)
    lines = text.splitlines()
    assert lines[0] == str(first)
    assert [line.split()[0] for line in lines[1:4]] == ["verdict", "caption", "global"]
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    out = run("detect", broken, first, "--json", "--detector", detector, *STUB, status=1)
    answers = [json.loads(line) for line in out.splitlines()]
    assert set(answers[0]) == {"path", "error"} and answers[0]["path"] == str(broken)
    assert answers[1]["path"] == str(first) and answers[1]["verdict"] in ("real", "fake", "unsure")
    assert len(answers[1]["models"]) == 16 and f"p(fake) {probability(answers[1]['p_fake'])}" in text
    assert "not judged: " in run("detect", broken, "--detector", detector, *STUB, status=1)

    run("detect", first, "--detector", detector, *STUB, "--card", tmp_path / "one.pdf")
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    run("detect", first, broken, "--detector", detector, *STUB, "--card", tmp_path / "cards", status=1)
    name = f"{first.stem}-{answers[1]['image_id'][:8]}.png"
    assert [file.name for file in (tmp_path / "cards").iterdir()] == [name]
    line = run("detect", first, "--detector", detector, *STUB, "--card", tmp_path / "one.gif", status=2)
    assert line == "a card is a .png or a .pdf, got 'one.gif'" and gc.get_threshold()[0]


def test_few_images_give_an_answer_without_a_promise(tmp_path: Path, run: Run) -> None:
    data, store, detector = write_data(tmp_path, 24), tmp_path / "store", tmp_path / "detector"
    run("extract", data, "--out", store, *STUB)
    out = run("train", store, "--out", detector, "--members", "1")
    assert "--fpr" in out and "--fnr" in out and "19" in out and (detector / "detector.json").is_file()
    out = run("evaluate", store, "--detector", detector)
    assert "withheld" in out and re.search(r"all +3 +3 +\d\.\d\d \(", out)
    image = data.parent / "images" / "00000.png"
    out = run("detect", image, "--detector", detector, *STUB)
    assert "verdict  withheld, p(fake) 0." in out and "--fpr" in out
    out = run("detect", image, "--detector", detector, *STUB, "--fpr", "0.4", "--fnr", "0.4")
    assert "withheld" not in out


def test_one_class_without_splits_is_taken_whole(data: Path, tmp_path: Path, run: Run) -> None:
    run("extract", data, "--out", tmp_path / "store", *STUB)
    run("train", tmp_path / "store", "--out", tmp_path / "detector", "--members", "1")
    fakes.make_images(tmp_path / "new", 7, start=500)
    (tmp_path / "photos" / "real").mkdir(parents=True)
    for file in (tmp_path / "new").iterdir():
        file.rename(tmp_path / "photos" / "real" / file.name)
    run("extract", tmp_path / "photos", "--out", tmp_path / "own", *STUB)
    out = run("evaluate", tmp_path / "own", "--detector", tmp_path / "detector")
    assert out.startswith("7 images: all, since they came without splits") and "called_fake" in out
    assert re.search(r"all +7 +0 ", out) and "verdicts on 7 real images: " in out and "nan" not in out.lower()


def test_extract_ends_with_1_when_an_image_is_unusable(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.parent / "images" / "00003.png").write_bytes(b"")
    words = ["extract", data, "--out", tmp_path / "store", *STUB, "--limit", "8"]
    assert cli.main([str(w) for w in words]) == 1
    err = capsys.readouterr().err
    assert "8 images: 0 reused, 7 computed, 1 error" in err and "160 images" in err
    assert (tmp_path / "store" / "errors.parquet").is_file()


def test_export_for_other_tools(data: Path, tmp_path: Path, run: Run) -> None:
    run("extract", data, "--out", tmp_path / "store", *STUB, "--limit", "6")
    for layout, made in (("clip-retrieval", "img_emb/img_emb_0.npy"), ("numpy", "embeddings.npz")):
        words = ["export", tmp_path / "store", "--to", tmp_path / layout, "--format", layout]
        assert run(*words) == f"6 images written to {tmp_path / layout}\n"
        assert (tmp_path / layout / made).is_file() and "is not empty" in run(*words, status=2)
    words = ["export", tmp_path, "--to", tmp_path / "x", "--format", "numpy"]
    assert "is no feature store" in run(*words, status=2)


def test_options_of_the_data_reach_the_reader(data: Path, tmp_path: Path, run: Run, stub: Preset) -> None:
    moved = tmp_path / "elsewhere" / "manifest.csv"
    moved.parent.mkdir()
    pd.read_csv(data).iloc[:6].drop(columns="split").to_csv(moved, index=False)
    run("extract", moved, "--root", tmp_path, "--out", tmp_path / "a", "--perturb", "jpeg_q50", *STUB)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["fingerprint"]["transform"]
    inside = [{"image": {"bytes": fakes.png(i), "path": f"{i}.png"}, "label": i % 2} for i in range(4)]
    table = tmp_path / "inside.parquet"
    pd.DataFrame(inside).to_parquet(table)
    run("extract", table, "--images-to", tmp_path / "out", "--out", tmp_path / "b", *STUB)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4
    assert stub.encoder.images_encoded == 10


def test_options_of_the_models_reach_them(data: Path, tmp_path: Path, run: Run, stub: Preset) -> None:
    words = ["extract", data, "--out", tmp_path / "s", *STUB]
    line = run(*words, "--parser", tmp_path / "none", status=2)
    assert "parser" in line and "none" in line
    words += ["--captions", "user"]
    assert "160 of 160 images have no caption" in run(*words, status=2)
    run(*words, "--missing", "generate", "--limit", "3")
    assert stub.captioner.batches == [3]


# --------------------------------------------------------------------------------------- text from elsewhere


NASTY = "evil\x1b]0;owned\x07\u202egnp\u200b"


def test_no_text_of_data_acts_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path, 160, generator=["real", NASTY] * 80)
    table = pd.read_csv(data)
    table.loc[table.index[7::16], "generator"] = "=cmd|'/C calc'!A0"
    table.to_csv(data, index=False)
    nasty = tmp_path / f"{NASTY}.png"
    nasty.write_bytes(fakes.png(999))
    (tmp_path / f"broken {NASTY}.png").write_bytes(b"\x89PNG")
    store, detector, csv = tmp_path / "store", tmp_path / "detector", tmp_path / "e.csv"
    for status, *words in (
        (0, "extract", data, "--out", store, *STUB),
        (0, "train", store, "--out", detector, "--members", "1"),
        (0, "evaluate", store, "--detector", detector, "--csv", csv, "--report", tmp_path / "r.html"),
        (1, "detect", nasty, tmp_path / f"broken {NASTY}.png", "--detector", detector, *STUB),
        (1, "detect", nasty, tmp_path / f"broken {NASTY}.png", "--detector", detector, *STUB, "--json"),
        (2, "detect", nasty, "--detector", tmp_path / NASTY, *STUB),
        (2, "train", store, "--out", detector, "--train-on", NASTY + "x"),
        (2, "evaluate", store, "--detector", detector, "--split", NASTY),
        (2, "extract", tmp_path / NASTY, "--out", store, *STUB),
        (2, "study", "--protocol", NASTY, *STUB),
        (0, "audit", data, "--csv", tmp_path / "a.csv"),
        (0, "export", store, "--to", tmp_path / f"to{NASTY}", "--format", "numpy"),
    ):
        assert cli.main([str(word) for word in words]) == status, (words, capsys.readouterr().err)
        shown = capsys.readouterr()
        assert CONTROL.findall(shown.out) == [] and CONTROL.findall(shown.err.replace("\r", "")) == [], words
    assert CONTROL.findall((tmp_path / "r.html").read_text()) == []
    with pytest.raises(SystemExit):
        cli.main(["detect", "x.png", f"--{NASTY}"])
    assert CONTROL.findall(capsys.readouterr().err) == []
    assert "=cmd" not in {cell[:4] for cell in pd.read_csv(csv)["generator"]}
    assert "'=cmd|'/C calc'!A0" in set(pd.read_csv(csv)["generator"])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_script_on_any_terminal(
    encoding: str, data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_csv(data).replace({"generator": {"toy": "生成器"}})
    table.to_csv(data, index=False)
    run("extract", data, "--out", tmp_path / "store", *STUB)
    run("train", tmp_path / "store", "--out", tmp_path / "d", "--members", "1")
    image = tmp_path / "真实.png"
    image.write_bytes(fakes.png(999))
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    detect = ["detect", image, "--detector", tmp_path / "d", *STUB]
    for status, *words in (
        (0, *detect, "--caption", "قطة على العشب"),
        (0, *detect),
        (1, "detect", tmp_path / "ない.png", "--detector", tmp_path / "d", *STUB),
        (0, "evaluate", tmp_path / "store", "--detector", tmp_path / "d"),
        (0, "audit", data),
        (2, "audit", tmp_path / "없음"),
    ):
        assert cli.main([str(word) for word in words]) == status
    shown = b"".join((stream.flush(), stream.buffer.getvalue())[1] for stream in (out, err))
    for text in ("真实", "ない", "生成器", "없음", "قطة"):
        assert text.encode(encoding, "backslashreplace") in shown


# ------------------------------------------------------------------------------------------ audit, run, study


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Photographs as JPEG of one size, fakes as PNG of another."""
    rng = np.random.default_rng(0)
    for label, size, ending in (("real", (48, 40), "jpg"), ("fake", (32, 32), "png")):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for i in range(24):
            low = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:02}.{ending}")
    return tmp_path / "photos"


def test_audit_and_equalise(uneven: Path, tmp_path: Path, run: Run) -> None:
    to = tmp_path / "equal"
    words = ["audit", uneven, "--csv", tmp_path / "audit.csv", "--equalise", to, "--size", "24"]
    before, after = run(*words).split(f"Equalised, in {to}:")
    assert "Audit of 48 images: 24 real, 24 fake" in before and "What to do" in before
    assert pd.read_csv(tmp_path / "audit.csv").iloc[0]["auroc"] > 0.99
    assert "'JPEG'" in before and "before" in after
    with Image.open(next((to / "images").iterdir())) as image:
        assert image.size == (24, 24) and image.format == "JPEG"
    words[words.index("24")] = "16"  # another size into the same folder is refused
    assert "was equalised with" in run(*words, status=2)
    (uneven / "real" / "00.jpg").write_bytes(b"")
    assert "audit of 47 of 48 images" in run("audit", uneven, status=1)


def test_audit_and_match(uneven: Path, tmp_path: Path, run: Run) -> None:
    line = run("audit", uneven, "--by", "generator", "--match", tmp_path / "m.csv", status=2)
    assert line.startswith("nothing to match: format") and not (tmp_path / "m.csv").exists()
    for i in range(6):  # real images that look like the fakes on disk
        (uneven / "fake" / f"{i:02}.png").rename(uneven / "real" / f"{i:02}.png")
    out = run("audit", uneven, "--match", tmp_path / "m.csv")
    assert "6 real and 6 fake images are alike in format, size, jpeg_quality" in out
    assert re.search(r"\n +\S+ +JPEG +48 x 40 .* real +24 +0 +24\n", out)
    assert re.search(r"\n +\S+ +PNG +32 x 32 .* fake +18 +6 +12\n", out)
    assert f"Matched, in {tmp_path / 'm.csv'}:" in out and "Audit of 12 images: 6 real, 6 fake" in out
    assert len(pd.read_csv(tmp_path / "m.csv")) == 12


def test_run_and_study_hand_their_options_on(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, run: Run
) -> None:
    seen: list[tuple] = []
    report = SimpleNamespace(path=tmp_path / "table.md", failures=["raw: cnn failed, no memory"])
    report.path.write_text("| a table |\n")

    def record(made: object) -> Callable[..., object]:
        return lambda *given, **more: seen.append((given, more)) or made

    monkeypatch.setattr("itemkit.run.run_all", record([]))
    monkeypatch.setattr("itemkit.study.run_study", record(report))
    run("run", "--out", tmp_path, *STUB)
    (mine, none, out, device), rates = seen[-1]
    assert (mine.name, none, out, device) == ("stub", None, tmp_path, "cpu")
    assert rates == {"fpr": 0.05, "fnr": 0.05}
    run("run", "--data", data, *STUB, "--fpr", "0.1", "--localiser", "whole")
    (mine, manifest, *_), rates = seen[-1]
    assert mine.localiser == "whole" and len(manifest) == 160 and rates["fpr"] == 0.1
    monkeypatch.setattr("itemkit.run.run_all", record(["02_geometry: it broke"]))
    run("run", *STUB, status=1)
    assert "| a table |" in run("study", "--data", data, *STUB, "--seeds", "2", status=1)
    (protocol, manifest, *_), options = seen[-1]
    assert protocol is None and len(manifest) == 160 and options["seeds"] == 2


@pytest.mark.parametrize(
    ("words", "expensive"),
    [
        (["extract", "--out", "s"], "extraction.extract"), (["audit"], "audit.audit"),
        (["run", "--data"], "run.run_all"), (["study", "--data"], "study.run_study"),
    ],
)  # fmt: skip
def test_the_manifest_is_described_before_anything_expensive(
    words: list[str], expensive: str, data: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"itemkit.{expensive}", stop)
    assert cli.main([*words, str(data), *(STUB if words[0] != "audit" else [])]) == 130
    assert "160 images" in capsys.readouterr().err


def test_threads_reach_torch_decoding_and_what_is_started(
    monkeypatch: pytest.MonkeyPatch, data: Path, run: Run
) -> None:
    for name in ("OMP_NUM_THREADS", "ITEMKIT_THREADS"):
        monkeypatch.setenv(name, "7")
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    for command in ("run", "study"):
        stand_in = named(command, lambda args: found.append(DecodeConfig().n_threads()))
        monkeypatch.setattr(cli, command, stand_in)
        run(command, "--threads", "3")
        joblib = Parallel(n_jobs=2)(delayed(os.environ.get)("OMP_NUM_THREADS") for _ in range(2))
        assert (found, joblib, os.environ["OMP_NUM_THREADS"]) == ([3, 3], ["3"] * 2, "3")
        found.clear()
