"""`itemkit run` on images of one's own: what fails or does not fit is noted, everything else is made."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import pytest

from itemkit import plots, presets, run
from itemkit.presets import Preset, get_preset

import fakes


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Preset:
    preset = Preset(
        name="stub", about="For these tests.", captioner=fakes.FakeCaptioner(), encoder=fakes.FakeEncoder(),
        parser=fakes.FakeParser(), localiser=fakes.FakeLocaliser(),
    )  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "stub", preset)
    return preset


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Notebooks that would have been executed, with their parameters; 05 fails."""
    given: dict[str, dict[str, Any]] = {}

    def execute(source: Path, target: Path, values: dict[str, Any]) -> None:
        given[target.stem] = values
        if target.stem.startswith("05"):
            raise ValueError("no such thing")

    monkeypatch.setattr(run, "execute", execute)
    return given


def text_of(folder: Path) -> str:
    """The text of a report, without its tags and pictures."""
    page = (folder / "report.html").read_text()
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "\n", page))


def photos(folder: Path, n: int, generators: tuple[str, ...] = ("toy",)) -> pd.DataFrame:
    table = fakes.make_images(folder, n)
    fake = table["label"] == 1
    table.loc[fake, "generator"] = [generators[i % len(generators)] for i in range(int(fake.sum()))]
    return table.assign(split=None)


@pytest.mark.parametrize("generators", [("toy",), ("gan", "flow")])
def test_what_does_not_fit_is_left_out_and_what_fails_is_noted(
    generators: tuple[str, ...], stub: Preset, executed: dict, tmp_path: Path
) -> None:
    failed = run.run_all(stub, photos(tmp_path / "images", 200, generators), tmp_path / "out", "cpu")
    expected = {"00_one_image", "01_misalignment", "02_hierarchical_features", "04_umap", "05_robustness"}
    more = {"06_generalisation"} if len(generators) > 1 else set()
    assert set(executed) == expected | {"03_training"} | more
    for values in executed.values():
        assert Path(values["DATA"]).is_file() and values["PRESET"] == "stub" and values["MODELS"] == {}
    assert failed == ["failed: notebook 05_robustness: ValueError: no such thing"]
    page = text_of(tmp_path / "out")
    assert failed[0] in page
    assert "left out: 07_ablations, 08_better_fakes, " in page and "or `make notebooks`" in page
    assert ("06_generalisation: generators needed: 2, here: 1" in page) == (len(generators) == 1)
    assert (tmp_path / "out" / "detector" / "detector.json").is_file()


def test_few_photographs_get_all_that_can_be_said(stub: Preset, executed: dict, tmp_path: Path) -> None:
    run.run_all(stub, photos(tmp_path / "images", 82), tmp_path / "out", "cpu")
    page = text_of(tmp_path / "out")
    assert "82 images: 41 real, 41 fake of 1 generator; preset stub, models " in page
    assert "splits: no splits given" in page
    assert "whole image: median cosine" in page and "95 % intervals" in page and "\nall\n" in page
    # a map of a handful of points says nothing, and the promise alone is withheld, with what it takes
    assert "left out: 04_umap: test images of each class needed: 8, here: " in page
    assert "04_umap" not in executed
    assert "withheld" in page and "--fpr" in page and "nan" not in page and "p(fake) is rough" in page


def test_one_class_gets_a_report_too(stub: Preset, executed: dict, tmp_path: Path) -> None:
    table = photos(tmp_path / "images", 20)
    failed = run.run_all(stub, table[table["label"] == 0], tmp_path / "out", "cpu")
    page = text_of(tmp_path / "out")
    assert set(executed) == {"00_one_image"} and len(failed) == 1
    assert failed[0].startswith("failed: detector: ")
    assert failed[0] in page and "\nreal\n\n10\n" in page and "There is nothing to compare" in page
    assert "01_misalignment: generators needed: 1, here: 0" in page


def test_images_of_which_none_can_be_used_get_a_report_too(
    stub: Preset, executed: dict, tmp_path: Path
) -> None:
    table = photos(tmp_path / "images", 6)
    for path in table["path"]:
        Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")
    failed = run.run_all(stub, table, tmp_path / "out", "cpu")
    page = text_of(tmp_path / "out")
    assert len(failed) == 1 and failed[0] in page and executed == {}
    assert "There is no image to look at" in page and "6 images could not be used" in page


def test_names_from_data_do_not_break_the_page(stub: Preset, executed: dict, tmp_path: Path) -> None:
    run.run_all(stub, photos(tmp_path / "images", 60, ("a|b<i>\x1b[2J",)), tmp_path / "out", "cpu")
    page = (tmp_path / "out" / "report.html").read_text()
    assert ">a|b&lt;i&gt;\\x1b[2J</td>" in page and "\x1b" not in page and "<i>" not in page


def test_an_installed_package_without_notebooks_says_where_they_are(
    stub: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "__file__", str(tmp_path / "site-packages" / "itemkit" / "run.py"))
    failed = run.run_all(stub, photos(tmp_path / "images", 60), tmp_path / "out", "cpu")
    page = text_of(tmp_path / "out")
    assert failed == [] and "left out: the notebooks: they come with the repository" in page
    assert "What is the detector worth?" in page


def test_the_study_of_this_run_stands_in_its_report_and_figures_are_linked(
    stub: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "old.png").write_bytes(b"")
    os.utime(out / "figures" / "old.png", (0, 0))

    for name, image in (("study-own", "made below"), ("study-other", "x"), ("study-new", "x")):
        (out / name).mkdir()
        pd.DataFrame({"detector": [f"row of {name}"], "clean": ["0.90 (0.80-1.00)"]}).to_csv(
            out / name / "headline.csv"
        )
        pd.DataFrame({"image_id": [image]}).to_csv(out / name / "manifest.csv")
        os.utime(out / name / "headline.csv", (0, 0))

    def notebooks(preset: Any, manifest: Any, features: Any, *_: Any) -> list[str]:
        features.table[["image_id"]].to_csv(out / "study-own" / "manifest.csv")
        os.utime(out / "study-new" / "headline.csv")
        (out / "figures" / "06 controls.png").write_bytes(b"")
        return []

    monkeypatch.setattr(run, "_notebooks", notebooks)
    run.run_all(stub, photos(tmp_path / "images", 60), out, "cpu")
    page = (out / "report.html").read_text()
    assert "row of study-own" in page and "row of study-new" in page and "row of study-other" not in page
    assert 'href="figures/06%20controls.png"' in page and "old.png" not in page
    said = capsys.readouterr().out
    assert "What is the detector worth?" in said and "begin with report.html" in said


def test_models_of_a_run_reach_the_notebooks(
    stub: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run._as_literals(get_preset("mini")) == {}
    folder = tmp_path / "clip"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    changed = get_preset("mini", localiser="dense", encoder="clip")
    values = run._as_literals(changed)
    assert values is not None and get_preset("mini", **values).encoder == str(folder)
    assert json.loads(json.dumps(values))["localiser"] == "dense"
    assert run._as_literals(get_preset("mini", captioner=fakes.FakeCaptioner())) is None


def test_a_part_of_ones_own_is_found_by_the_notebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = "class Mine:\n    version, caption, word = '1', print, 7\n"
    (tmp_path / "own_part_of_a_run.py").write_text(mine)
    code = "from itemkit.models import own_part\nprint(own_part('captioner', MODELS['captioner']).word)"
    parameters = nbformat.v4.new_code_cell("MODELS = {}", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    notebook.cells = [parameters, nbformat.v4.new_code_cell(code)]
    (tmp_path / "elsewhere").mkdir()
    nbformat.write(notebook, tmp_path / "elsewhere" / "made.ipynb")
    monkeypatch.chdir(tmp_path)
    models = {"captioner": "own_part_of_a_run:Mine"}
    run.execute(tmp_path / "elsewhere" / "made.ipynb", tmp_path / "n.ipynb", {"MODELS": models})
    made = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    assert made.cells[-1].outputs[0].text == "7\n"


def test_prose_about_the_laboratory_does_not_stand_below_other_figures(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    lab = nbformat.v4.new_markdown_cell("## Recap\n\nNo interval touches 0.5.", metadata={"tags": ["lab"]})
    code = nbformat.v4.new_code_cell("DATA = ''", metadata={"tags": ["parameters"]})
    shown = nbformat.v4.new_code_cell("print(DATA)")
    notebook.cells = [nbformat.v4.new_markdown_cell("# A question?"), code, shown, lab]
    nbformat.write(notebook, tmp_path / "made.ipynb")
    run.execute(tmp_path / "made.ipynb", tmp_path / "n" / "made.ipynb", {"DATA": "mine"})
    made = nbformat.read(tmp_path / "n" / "made.ipynb", as_version=4)
    assert made.cells[0].source == "# A question?" and made.cells[-2].outputs[0].text == "mine\n"
    assert made.cells[-1].source == f"## Recap\n\n{run.NOT_YOURS}"


def test_notebooks_say_what_they_need_and_which_prose_is_about_the_laboratory(repo: Path) -> None:
    walk = {path.stem: path for path in (repo / "notebooks").glob(run.WALK)}
    assert set(run.NEEDS) == set(walk)
    theirs = re.compile(rf"laborator|\b({'|'.join(plots.FIXED)})\b")
    for path in walk.values():
        assert {"DATA", "MODELS"} <= set(papermill.inspect_notebook(path))
        for cell in nbformat.read(path, as_version=4).cells[1:]:
            if cell.cell_type == "markdown" and run.LAB_TAG not in cell.metadata.get("tags", []):
                prose = re.sub(r"`[^`]*`", "", cell.source.partition("What to notice")[2])
                assert not theirs.search(prose), (path.stem, prose[:80])
