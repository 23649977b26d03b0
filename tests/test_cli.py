"""The command line: help, one-line errors with status 2, and each command's way through, with stand-ins."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from itemkit import cli, presets
from itemkit.export import import_clip_retrieval, import_numpy
from itemkit.presets import Preset
from itemkit.store import load_features

import fakes

REPO = Path(__file__).resolve().parents[1]
COMMANDS = "doctor run audit extract train evaluate export study detect download lab".split()


@pytest.fixture(autouse=True)
def no_mini_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not depend on whether the laboratory has been built."""
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path / "nothing"))


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """A preset whose models are cheap stand-ins."""
    preset = Preset(
        name="stub",
        about="For these tests.",
        captioner=fakes.FakeCaptioner(),
        encoder=fakes.FakeEncoder(),
        parser=fakes.FakeParser(),
        localiser=fakes.FakeLocaliser(),
    )
    monkeypatch.setitem(presets.PRESETS, "stub", preset)
    return preset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """160 pictures in a CSV: enough of each class in val for a rate of 5 %."""
    table = fakes.make_images(tmp_path / "images", 160)
    table["split"] = (["train"] * 2 + ["val"] * 2 + ["val"] * 2 + ["test"] * 2) * 20
    table["path"] = [f"images/{Path(p).name}" for p in table["path"]]
    table.to_csv(tmp_path / "manifest.csv", index=False)
    return tmp_path / "manifest.csv"


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must end with status 2 and one line; return the line."""

    def run(*words: str | Path) -> str:
        assert cli.main([str(w) for w in words]) == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        lines = shown.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("itemkit: "), shown.err
        return lines[0].removeprefix("itemkit: ")

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
    assert text.startswith(f"usage: itemkit {command} ")
    # each option says what it is for
    options = cli._parser()._subparsers._group_actions[0].choices[command]._actions  # type: ignore[union-attr]
    silent = [a.dest for a in options if not a.help and a.dest not in ("detector", "action", "device")]
    assert silent == []


@pytest.mark.parametrize("words", [[], ["unknown"], ["extract"], ["detect"], ["download"], ["lab", "paint"]])
def test_wrong_words_end_with_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: itemkit")


def test_help_is_quick_and_loads_no_model_library() -> None:
    code = (
        "import sys\nfrom itemkit import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'spacy', 'open_clip', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]" and run.stderr == ""


# -------------------------------------------------------------------------------------------- one-line errors


@pytest.mark.parametrize(
    "command", [["extract", "x", "--out", "y"], ["detect", "x.png"], ["run"], ["doctor"]]
)
def test_an_unknown_preset(command: list[str], fails: Fails) -> None:
    line = fails(*command, "--preset", "papre")
    assert line == "preset 'papre' is unknown. Did you mean 'paper'? Known: mini, fast, paper, stub."


def test_an_empty_folder(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words in (["audit"], ["extract", "--preset", "stub", "--out", tmp_path / "out"]):
        line = fails(*words[:1], tmp_path / "empty", *words[1:])
        assert "empty" in line and "image" in line
    assert not (tmp_path / "out").exists()
    assert "no such file or folder" in fails("audit", tmp_path / "absent")


def test_missing_mini_models(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["extract", str(data), "--out", str(tmp_path / "out")]) == 2
    note, line = capsys.readouterr().err.strip().splitlines()
    assert note.startswith("note: the mini models know rendered scenes only.")
    assert "is not on this machine" in line and "`git checkout data/mini`" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_of_models(data: Path, tmp_path: Path, fails: Fails) -> None:
    line = fails(
        "extract", data, "--out", tmp_path / "out", "--preset", "fast", "--models", tmp_path / "none"
    )
    assert (
        "there is no folder of models at" in line and "`itemkit download --preset fast --to FOLDER`" in line
    )


def test_a_missing_detector(data: Path, tmp_path: Path, fails: Fails) -> None:
    line = fails("detect", data.parent / "images" / "00000.png", "--preset", "stub")
    assert line.startswith("there is no detector for preset 'stub' yet: train one with `itemkit extract`")
    line = fails(
        "detect", data.parent / "images" / "00000.png", "--preset", "stub", "--detector", tmp_path / "none"
    )
    assert str(tmp_path / "none") in line
    assert str(tmp_path / "store") in fails("train", tmp_path / "store", "--out", tmp_path / "d")
    assert "store" in fails("evaluate", tmp_path / "store", "--detector", tmp_path / "d")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file_nam,label\na.png,0\n", "has no column 'path'"),
        (
            "path,label\nimages/00000.png,0\nimages/00001.png,maybe\n",
            "unknown values in column 'label': 'maybe'",
        ),
        ("path,label\nimages/00000.png,0\nimages/00000.png,1\n", "labels that contradict each other"),
        ("path,label\nnowhere.png,0\n", "none of the 1 images of bad.csv exists"),
        ("", "bad.csv is empty"),
    ],
)
def test_a_bad_manifest(table: str, message: str, data: Path, tmp_path: Path, fails: Fails) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text(table)
    assert message in fails("extract", bad, "--out", tmp_path / "out", "--preset", "stub")
    assert message in fails("audit", bad)


def test_one_class_only(data: Path, tmp_path: Path, fails: Fails) -> None:
    table = pd.read_csv(data)
    table[table["label"] == 0].to_csv(tmp_path / "reals.csv", index=False)
    assert "The audit needs real and fake images; the manifest has 80 real, 0 fake" in fails(
        "audit", tmp_path / "reals.csv"
    )


def test_options_that_need_another(data: Path, tmp_path: Path, fails: Fails) -> None:
    assert fails("audit", data, "--size", "64").startswith("--size goes with --equalise FOLDER")
    assert "JPEG quality is 300" in fails("audit", data, "--equalise", tmp_path / "e", "--quality", "300")
    line = fails("detect", "a.png", "b.png", "--preset", "stub", "--caption", "a red ball")
    assert line == "--caption goes with one image, got 2; run detect once for each"
    assert "real_root" in fails("audit", data, "--real-root", tmp_path)
    assert "no part paint; parts: parser, clip" in fails("lab", "build", "paint")


def test_a_laboratory_that_is_not_there(tmp_path: Path, fails: Fails) -> None:
    assert "no laboratory in" in fails("lab", "check")
    assert "fakes.parquet" in fails("lab", "images", "--out", tmp_path / "out")
    assert "nothing to download" in fails("download", "--preset", "mini")


def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails("extract", data, "--out", tmp_path / "file" / "store", "--preset", "stub")


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.do, "train", stopped)
    assert cli.main(["train", "x", "--out", "y"]) == 130 and capsys.readouterr().err == ""


def test_warnings_are_sentences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warning(args: object) -> int:
        warnings.warn("the classes differ in size; choose a smaller one", stacklevel=2)
        return 0

    shown = warnings.showwarning
    monkeypatch.setattr(cli.do, "train", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["train", "x", "--out", "y"]) == 0
    assert capsys.readouterr().err == "itemkit: warning: the classes differ in size; choose a smaller one\n"
    assert warnings.showwarning is shown


# ------------------------------------------------------------------------------------------- the way through


def test_extract_train_evaluate_detect(
    data: Path, tmp_path: Path, stub: Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str | Path) -> str:
        status = cli.main([str(w) for w in words])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return shown.out

    store, detector = tmp_path / "store", tmp_path / "detector"
    run("extract", data, "--out", store, "--preset", "stub", "--device", "cpu", "--batch-size", "16")
    assert stub.encoder.images_encoded == 160
    run("extract", data, "--out", store, "--preset", "stub", "--device", "cpu")
    assert stub.encoder.images_encoded == 160
    out = run("train", store, "--out", detector, "--seeds", "1", "--representation", "absolute")
    assert f"detector written to {detector}" in out and "its threshold at 5 % false positives: " in out
    out = run("evaluate", store, "--detector", detector, "--csv", tmp_path / "new" / "table.csv")
    table = pd.read_csv(tmp_path / "new" / "table.csv")
    assert {"generator", "metric", "value", "low", "high"} <= set(table.columns)
    assert "auroc" in out and set(table["generator"]) == {"all"}  # of one generator
    assert (
        "false positives at a requested 1%: not promised: a false-positive rate of 0.01 needs at least" in out
    )
    assert "real images covered at a requested 95%: " in out
    for split, use in (("train", "40 trained this detector"), ("val", "80 stopped its training")):
        words = ["evaluate", str(store), "--detector", str(detector), "--split", split]
        assert cli.main(words) == 0
        shown = capsys.readouterr()
        n = use.split()[0]
        assert shown.err.startswith(f"itemkit: warning: of the {n} images evaluated here, {use}")
        assert shown.err.count("\n") == 1 and "auroc" in shown.out
        tail = shown.out.partition("What was promised, and what happened:")[2]
        assert tail.strip().startswith(f"not checked: all {n} images trained or calibrated this detector")
        assert "covered" not in tail
    first, broken = data.parent / "images" / "00000.png", tmp_path / "broken.png"
    text = run("detect", first, "--detector", detector, "--preset", "stub", "--device", "cpu")
    lines = text.splitlines()
    assert lines[0] == str(first)
    assert [line.split()[0] for line in lines[1:4]] == ["verdict", "caption", "global"]
    assert {line.split()[0] for line in lines[4:]} == {"local"}
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    words = ["detect", first, broken, "--json", "--detector", detector, "--preset", "stub", "--device", "cpu"]
    assert cli.main([str(w) for w in words]) == 1  # done, but something was wrong with an image
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[0]["path"] == str(first) and answers[0]["verdict"] in ("real", "fake", "unsure")
    assert set(answers[1]) == {"path", "error"} and "broken.png" in answers[1]["error"]
    assert f"p(fake) = {answers[0]['p_fake']:.2f}" in text


def test_extract_ends_with_1_when_an_image_is_unusable(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.parent / "images" / "00003.png").write_bytes(b"")
    words = ["extract", data, "--out", tmp_path / "store", "--preset", "stub", "--limit", "8"]
    assert cli.main([str(w) for w in words]) == 1
    assert "8 images: 0 reused, 7 computed, 1 errors" in capsys.readouterr().err
    assert (tmp_path / "store" / "errors.parquet").is_file()


def test_export_for_other_tools(
    data: Path, tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert cli.main(["extract", str(data), "--out", str(store), "--preset", "stub", "--limit", "6"]) == 0
    features = load_features(store)
    for layout, back in (("clip-retrieval", import_clip_retrieval), ("numpy", import_numpy)):
        to = tmp_path / layout
        capsys.readouterr()
        assert cli.main(["export", str(store), "--to", str(to), "--format", layout]) == 0
        assert capsys.readouterr().out == f"6 images written to {to}\n"
        read = back(to)
        np.testing.assert_allclose(read.image_emb, features.image_emb, atol=1e-3)
        np.testing.assert_allclose(read.caption_emb, features.caption_emb, atol=1e-3)
        assert list(read.table["path"]) == list(features.table["path"])
        assert len(read.objects) == (len(features.objects) if layout == "numpy" else 0)
        assert "is not empty; give a new folder" in fails("export", store, "--to", to, "--format", layout)
    assert "is no feature store" in fails("export", tmp_path, "--to", tmp_path / "x", "--format", "numpy")
    assert not (tmp_path / "x").exists()


def test_options_of_the_data_reach_the_reader(data: Path, tmp_path: Path, stub: Preset) -> None:
    moved = tmp_path / "elsewhere" / "manifest.csv"
    moved.parent.mkdir()
    table = pd.read_csv(data).iloc[:6].drop(columns="split")
    table.to_csv(moved, index=False)
    common = ["--preset", "stub", "--device", "cpu"]
    words = ["extract", moved, "--root", tmp_path, "--out", tmp_path / "a", "--perturb", "jpeg_q50", *common]
    assert cli.main([str(w) for w in words]) == 0
    assert json.loads((tmp_path / "a" / "run.json").read_text())["fingerprint"]["transform"]
    inside = [{"image": {"bytes": fakes.png(i), "path": f"{i}.png"}, "label": i % 2} for i in range(4)]
    pd.DataFrame(inside).to_parquet(tmp_path / "inside.parquet")
    words = ["extract", tmp_path / "inside.parquet", "--images-to", tmp_path / "out", "--out", tmp_path / "b"]
    assert cli.main([str(w) for w in (*words, *common)]) == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4
    assert stub.encoder.images_encoded == 10


def test_user_captions_and_what_to_do_without(data: Path, tmp_path: Path, fails: Fails, stub: Preset) -> None:
    words = ["extract", data, "--out", tmp_path / "s", "--preset", "stub", "--captions", "user"]
    assert "160 of 160 images have no caption" in fails(*words)
    assert cli.main([str(w) for w in (*words, "--missing", "generate", "--limit", "3")]) == 0
    assert stub.captioner.batches == [3]


def test_a_part_given_by_name_replaces_the_preset_s(data: Path, tmp_path: Path, fails: Fails) -> None:
    line = fails("extract", data, "--out", tmp_path / "s", "--preset", "stub", "--parser", tmp_path / "none")
    assert "parser" in line and "none" in line


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


def test_audit_and_equalise(uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "equal"
    words = [
        "audit",
        uneven,
        "--csv",
        tmp_path / "audit.csv",
        "--equalise",
        to,
        "--size",
        "24",
        "--codec",
        "png",
        "--figure",
        tmp_path / "figure",
    ]
    assert cli.main([str(w) for w in words]) == 0
    before, after = capsys.readouterr().out.split(f"After equalising into {to}:")
    assert "Audit of 48 images: 24 real, 24 fake" in before and "What to do" in before
    worst = pd.read_csv(tmp_path / "audit.csv").iloc[0]
    assert worst["auroc"] > 0.99
    assert "'JPEG'" in before and "'JPEG'" not in after
    assert "before" in after and {p.name for p in (tmp_path / "figure").iterdir()} == {
        "audit.pdf",
        "audit.png",
        "audit.csv",
    }
    with Image.open(next((to / "images").iterdir())) as image:
        assert image.size == (24, 24) and image.format == "PNG"
    # another size into the same folder is refused
    words[words.index("24")] = "16"
    assert cli.main([str(w) for w in words]) == 2
    assert "was equalised with" in capsys.readouterr().err


def test_enlarging_one_class_is_warned_of_plainly(
    uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", uneven, "--equalise", tmp_path / "equal", "--size", "36"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main([str(w) for w in words]) == 0
    shown = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(shown) == 1 and shown[0].startswith(
        "itemkit: warning: 0% of the real and 100% of the fake images"
    )
    assert ".py" not in shown[0]


def test_doctor_prints_a_line_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--preset", "stub", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert status in (0, 1)  # a version that differs from its pin may be found here
    assert [line for line in lines[:-1] if not line.lstrip().startswith("[")] == []
    assert any("captioner" in line and "[OK]" in line for line in lines)
    assert lines[-1].split(":")[0] in ("ready", "not ready")


def test_run_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from itemkit import run as report

    seen: list[tuple] = []
    monkeypatch.setattr(report, "run_all", lambda *given: seen.append(given))
    assert cli.main(["run", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert cli.main(["run", "--preset", "fast", "--data", "photos"]) == 0
    assert seen == [("mini", None, tmp_path, "cpu"), ("fast", "photos", Path("results"), "auto")]
