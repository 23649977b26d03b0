"""The laboratory's files are what its code makes; its command line works on the laboratory it is given."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from itemkit.presets import mini_folder
from itemkit.protocols import get_protocol
from minilab import data, fakes
from minilab.__main__ import main
from minilab.build import Build, file_hashes
from minilab.world import SIZE

MINI = Path(__file__).resolve().parents[2] / "data" / "mini"


def test_committed_files_have_the_hashes_that_were_noted() -> None:
    assert file_hashes(MINI) == json.loads((MINI / "hashes.json").read_text())


@pytest.mark.parametrize("name", ["reals", "fresh"])
def test_committed_renders_are_made_by_this_code_to_the_byte(name: str, monkeypatch) -> None:
    committed = pd.read_parquet(MINI / f"{name}.parquet")
    assert (
        list(committed)
        == list(pd.read_parquet(MINI / "fakes.parquet"))
        == ["generator", "split", "prompt", "image"]
    )
    few = {split: 3 for split in committed.split.unique()}
    monkeypatch.setattr(data, "FRESH", few)
    monkeypatch.setattr(data, "COUNTS", few)
    monkeypatch.setattr(data, "REAL_FACTOR", 1)
    pd.testing.assert_frame_equal(
        getattr(data, name)(), committed.groupby("split", sort=False).head(3).reset_index(drop=True)
    )


def test_the_doctors_questions_are_told_apart_and_hold_their_thing() -> None:
    committed = pd.read_parquet(MINI / "cases.parquet")
    pd.testing.assert_frame_equal(data.cases(6), committed.head(6))
    assert committed.caption.is_unique
    assert all(case.phrase in case.caption for case in committed.itertuples())
    assert (committed.x0 < committed.x1).all() and (committed.y0 < committed.y1).all()
    assert committed[["x0", "y0"]].min().min() >= 0 and committed[["x1", "y1"]].max().max() <= SIZE


def test_every_generator_has_a_family_in_the_protocol() -> None:
    assert set(fakes.GENERATORS) <= set(get_protocol("mini").families)


def test_notes_of_parts_built_side_by_side_are_all_kept(tmp_path: Path) -> None:
    builds = [Build(tmp_path, tmp_path / "work") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: pair[1].note(f"part {pair[0]}", steps=pair[0]), enumerate(builds)))
    assert len(json.loads((tmp_path / "cards.json").read_text())) == 8


@pytest.fixture
def small_lab(tmp_path: Path) -> Path:
    """A laboratory of one's own: the committed models, a few images, no detector."""
    lab = tmp_path / "lab"
    shutil.copytree(MINI / "models", lab / "models", ignore=shutil.ignore_patterns("detector", "*_second"))
    for name in ("reals", "fakes", "fresh"):
        table = pd.read_parquet(MINI / f"{name}.parquet")
        table = table[table.generator.isin(["real", "flow"])]
        table.groupby(["generator", "split"]).head(12).to_parquet(lab / f"{name}.parquet")
    return lab


def test_the_detector_is_trained_on_and_written_to_the_laboratory_that_is_named(
    small_lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (MINI / "models" / "detector" / "detector.json").read_bytes()
    assert (
        main(["detector", "--data", str(small_lab), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    )
    record = (small_lab / "models" / "detector" / "detector.json").read_text()
    assert '"real": 12' in record and '"flow": 12' in record and "vae" not in record
    assert str(tmp_path) not in record
    assert (MINI / "models" / "detector" / "detector.json").read_bytes() == before
    assert main(["images", "--data", str(small_lab), "--out", str(tmp_path / "again")]) == 0
    assert len(list((tmp_path / "again" / "mini").rglob("*.jpeg"))) == 12 * 6
    assert mini_folder() == MINI, "afterwards itemkit uses its own laboratory again"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("build flo", "has no part flo; parts: parser, clip"),
        ("check flow", "check takes no parts, got flow"),
        ("check --data nowhere", "no laboratory in nowhere"),
        ("data --device cuda:99", "cuda:99"),
    ],
)
def test_wrong_words_end_with_one_line(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
