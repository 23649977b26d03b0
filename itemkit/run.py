"""``itemkit run``: the whole method on one data set, from images to figures and a report.

What fails, or cannot be said of these images, is noted on that page; everything else is made all the same.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

from itemkit import schema, workflow
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.manifest import write_manifest
from itemkit.models import names_object
from itemkit.presets import PRESETS, Preset, get_preset
from itemkit.report import Section, write_report
from itemkit.text import one_line

# the notebooks that lead through the method; the studies behind them take longer and are left to readers
WALK = "0[0-6]_*.ipynb"
# what one of them needs of images of one's own: generators, and validation and test images of each class
NEEDS = {
    "00_one_image": (0, 0, 0),
    "01_misalignment": (1, 0, 2),
    "02_hierarchical_features": (1, 0, 1),
    "03_training": (1, 2, 2),
    "04_umap": (1, 0, 8),
    "05_robustness": (1, 2, 2),
    "06_generalisation": (2, 2, 2),
}
# a cell with this tag is about the laboratory's images; it does not stand below figures of other ones
LAB_TAG = "lab"
NOT_YOURS = "*(What stands here in the notebook is about the mini laboratory's images, not about yours.)*"


def run_all(
    preset: str | Preset = "mini",
    data: pd.DataFrame | None = None,
    out: str | Path = "results",
    device: str = "auto",
    *,
    fpr: float = 0.05,
    fnr: float = 0.05,
) -> list[str]:
    """Extract, train, evaluate, execute the notebooks, write ``out/report.html``; returns what failed.

    Parameters
    ----------
    data : DataFrame, optional
        Manifest; the mini laboratory's images by default. Notebooks that ask for more than there is of one's
        own images are left out, and the report says so.
    out : path
        Everything goes below it: ``features``, ``detector``, ``notebooks``, ``figures``, ``study``.
    fpr, fnr : float
        Rates of the threshold and of the verdicts, see `itemkit.workflow.detect`.
    """
    began = time.time()
    out, chosen = Path(out).resolve(), get_preset(preset)
    features = workflow.features(chosen, data, out, device)
    detector, test, not_made = None, None, []
    try:
        detector = workflow.train_detector(features, device=device)
        detector.save(out / "detector")
        test = features.split("test")
    except InputError as reason:
        not_made.append(f"failed: detector: {one_line(reason)}")
    not_made += _notebooks(chosen, data, features, out, device)
    not_made.sort()
    more, judge = _more(out, features, began), None if test is None else detector
    sections = write_report(
        out / "report.html", features, judge, test, fpr=fpr, fnr=fnr, more=more, left_out=not_made
    )
    print(*(line for section in sections for line in section.to_text()), sep="\n")
    took = f"{(time.time() - began) / 60:.1f} minutes"
    print(f"\nEverything made is in {os.path.relpath(out)}; begin with report.html ({took})")
    return [line for line in not_made if line.startswith("failed")]


def _more(out: Path, features: Features, since: float) -> list[Section]:
    """Studies of these images, and the figures of this run; what else lies there may be of other data."""
    sections, known = [], set(features.table[schema.IMAGE_ID])
    for file in sorted(out.glob("study-*/headline.csv")):
        listed = file.with_name("manifest.csv")
        mine = file.stat().st_mtime >= since - 1
        if mine or (listed.is_file() and set(pd.read_csv(listed)[schema.IMAGE_ID].astype(str)) <= known):
            lines = [
                f"AUROC on generators that a detector was not trained on; all of it: {file.parent.name}."
            ]
            links = [path.relative_to(out).as_posix() for path in sorted(file.parent.glob("table.*"))]
            title = "Does it carry over to generators never seen?"
            sections.append(Section(title, lines, table=pd.read_csv(file), links=links))
    figures = sorted(path for path in (out / "figures").glob("*.png") if path.stat().st_mtime >= since - 1)
    if figures:
        lines = ["Beside this file, as PNG and PDF, with the table behind each as CSV."]
        links = [path.relative_to(out).as_posix() for path in figures]
        sections.append(Section("Figures of the notebooks", lines, links=links))
    return sections


# -------------------------------------------------------------------------------------------- the notebooks


def _notebooks(
    preset: Preset, manifest: pd.DataFrame | None, features: Features, out: Path, device: str
) -> list[str]:
    """Execute the walk's notebooks that fit, into ``out/notebooks``; returns which do not, or failed."""
    import papermill

    folder = Path(__file__).resolve().parents[1] / "notebooks"
    if not folder.is_dir():
        return ["left out: the notebooks: they come with the repository, not with the package"]
    values: dict[str, Any] = {"PRESET": preset.name, "DATA": "", "OUT_DIR": str(out), "DEVICE": device}
    values["MODELS"] = models = _as_literals(preset)
    if manifest is not None:
        values["DATA"] = str(out / "manifest.csv")
        write_manifest(manifest, values["DATA"])
    others = sorted(
        {path.stem for path in folder.glob("*.ipynb")} - {path.stem for path in folder.glob(WALK)}
    )
    not_made = [f"left out: {', '.join(others)}: longer studies; open them, or `make notebooks`"]
    for source in sorted(folder.glob(WALK)):
        parameters = set(papermill.inspect_notebook(source))
        why = _lacking(source.stem, features) if manifest is not None else ""
        if not why and (models is None or (models and "MODELS" not in parameters)):
            why = "it cannot be given the models of this run"
        if why:
            not_made.append(f"left out: {source.stem}: {why}")
            continue
        print(f"notebook {source.stem}", file=sys.stderr, flush=True)
        given = {name: value for name, value in values.items() if name in parameters}
        try:
            execute(source, out / "notebooks" / source.name, given)
        except Exception as error:  # noqa: BLE001 - one notebook, in a process of its own, ends nothing else
            not_made.append(f"failed: notebook {source.stem}: {_reason(error)}")
    return not_made


def _lacking(notebook: str, features: Features) -> str:
    """What a notebook needs and these images are not, or too few of; "" if it can be executed."""
    if not len(features):
        return "there is no image to look at"
    table = features.table[features.table[schema.LABEL].notna()]
    fakes = table.loc[table[schema.LABEL] == schema.FAKE, schema.GENERATOR].unique()
    first = table[schema.GENERATOR].isin([schema.REAL_GENERATOR, *fakes[:1]])  # notebooks train on this fake
    val, test = (
        min(int((rows[schema.LABEL] == label).sum()) for label in schema.LABEL_NAMES)
        for rows in (table[first & (table[schema.SPLIT] == "val")], table[table[schema.SPLIT] == "test"])
    )
    what = ("generators", "validation images of each class", "test images of each class")
    for name, n, there in zip(what, NEEDS[notebook], (len(fakes), val, test), strict=True):
        if there < n:
            return f"{name} needed: {n}, here: {there}"
    return ""


def _as_literals(preset: Preset) -> dict[str, Any] | None:
    """What makes this preset of the one of its name, as a notebook's parameter; None if that cannot be."""
    if preset.name not in PRESETS:
        return None
    plain, changes = vars(get_preset(preset.name)), {}
    for name, value in vars(preset).items():
        if value != plain[name]:
            changes[name] = dict(value) if isinstance(value, Mapping) else value
            if isinstance(value, (str, Path)):  # the notebook runs in another folder
                changes[name] = os.path.abspath(value) if os.path.exists(value) else str(value)
    return changes if all(isinstance(value, (dict, str, type(None))) for value in changes.values()) else None


def execute(
    source: Path, target: Path, values: Mapping[str, Any] | None = None, progress: bool = False
) -> None:
    """Execute a notebook in a clean kernel that starts in its folder, and write it to ``target``.

    The IPython profile is left out. Where ``values`` of its parameters name other DATA, prose about the
    laboratory does not stand below their figures.

    Raises
    ------
    papermill.PapermillExecutionError
        A cell raised an error; ``target`` holds what was made until then.
    """
    import nbformat
    import papermill

    notebook, values = nbformat.read(source, as_version=4), dict(values or {})
    for cell in notebook.cells if values.get("DATA") else ():
        if LAB_TAG in cell.metadata.get("tags", []):
            title = cell.source.split("\n")[0] if cell.source.startswith("#") else ""
            cell.source = f"{title}\n\n{NOT_YOURS}".strip()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # without the second, the kernel's debugger warns on each start
        settings = {"IPYTHONDIR": scratch, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        if any(map(names_object, (values.get("MODELS") or {}).values())):  # a part of one's own lies here
            there = filter(None, (os.getcwd(), os.environ.get("PYTHONPATH")))
            settings["PYTHONPATH"] = os.pathsep.join(there)
        options = {"kernel_name": "python3", "cwd": str(source.parent), "progress_bar": progress}
        with patch.dict(os.environ, settings):
            papermill.execute_notebook(notebook, str(target), values, **options)


def _reason(error: Any) -> str:
    if cell := getattr(error, "exec_count", None):  # papermill's own: the cell and its error
        return f"code cell {cell} ends in {error.ename}: {one_line(error.evalue)}"
    return f"{type(error).__name__}: {one_line(error)}"
