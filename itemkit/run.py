"""``itemkit run``: the whole method on one data set, from images to figures and a one-page summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from itemkit import schema, workflow
from itemkit.errors import InputError
from tools import notebooks
from tools import rules as notebook_rules

SUMMARY_COLUMNS = ("generator", "auroc", "ap", "accuracy_real", "accuracy_fake", "tpr_at_fpr05")


def run_all(preset: str, data: str | None, out: Path, device: str = "auto") -> Path:
    """Extract, train, evaluate, execute the notebooks, and sum up on one page.

    On images of one's own, notebooks that ask about the laboratory, or about more generators than there are,
    are left out, and the summary says so.

    Parameters
    ----------
    preset, device : str
    data : path, optional
        Manifest or folder; the mini laboratory's images by default.
    out : Path
        Everything goes below it: ``features``, ``detector``, ``notebooks``, ``figures``, ``study``,
        ``summary.md``.

    Returns
    -------
    Path
        The summary.

    Raises
    ------
    InputError
        The notebooks are not where the package lies (it was installed without its repository).
    """
    began = time.monotonic()
    out = Path(out).resolve()
    sources = find_sources()
    workflow.warn_if_foreign(preset, data)
    features = workflow.features(preset, data, out, device)
    detector = workflow.train_detector(features)
    detector.save(out / "detector")
    table = detector.evaluate(workflow.take_split(features, "test"))
    parameters = {
        "PRESET": preset,
        "DATA": str(Path(data).resolve()) if data else "",
        "OUT_DIR": str(out),
        "DEVICE": device,
    }
    generators = set(features.table[schema.GENERATOR]) - {schema.REAL_GENERATOR}
    left_out = []
    for source in sources:
        known = notebook_rules.read_parameters(notebook_rules.read_notebook(source))
        if reason := _not_for(source.stem, known, foreign=bool(data), generators=len(generators)):
            left_out.append(f"{source.stem}: {reason}")
            print(f"notebook {left_out[-1]}", file=sys.stderr, flush=True)
            continue
        print(f"notebook {source.name}", file=sys.stderr, flush=True)
        own = {name: value for name, value in parameters.items() if name in known}
        notebooks.execute(source, out / "notebooks" / source.name, own)
    note = (
        workflow.LAB_NOTE
        if preset == "mini" and not data
        else f"preset {preset}, data {Path(str(data)).name}"
    )
    summary = write_summary(table, out, note, time.monotonic() - began, left_out)
    print(summary.read_text())
    for what, folder in (("figures", "figures"), ("notebooks", "notebooks"), ("detector", "detector")):
        print(f"{what:10s} {_shown(out / folder)}")
    print(f"{'summary':10s} {_shown(summary)}")
    return summary


def _not_for(name: str, parameters: Mapping[str, object], foreign: bool, generators: int) -> str:
    """Why a notebook has nothing to say about these images; empty if it has."""
    if not foreign:
        return ""
    if "DATA" not in parameters:
        return "left out, it is about the mini laboratory"
    if name == "06_ablations":
        return "left out, it asks for second models: open it, set CLIP_SECOND and CAPTIONER_SECOND"
    if name == "03_training" and generators < 2:
        return "left out, it asks about a second generator (column `generator`)"
    return ""


def find_sources() -> list[Path]:
    """The project's notebooks, beside the package; outside a checkout there are none."""
    folder = Path(__file__).resolve().parents[1] / "notebooks"
    if not folder.is_dir():
        raise InputError(
            "the notebooks are not installed with the package; run this in a clone of the repository, "
            "installed with `pip install -e .`"
        )
    return notebook_rules.find_notebooks(folder)


def write_summary(
    table: pd.DataFrame, out: Path, note: str, seconds: float, left_out: Sequence[str] = ()
) -> Path:
    """Write the one-page summary.

    Parameters
    ----------
    table : DataFrame
        Of ``Detector.evaluate``.
    out : Path
        Where the figures' tables are looked for and ``summary.md`` is written.
    note : str
        What the numbers were made with.
    seconds : float
        How long everything took.
    left_out : sequence of str
        Notebooks that were not executed, each with its reason.

    Returns
    -------
    Path
    """
    lines = ["# Summary", "", f"Made with: {note}. {seconds / 60:.1f} minutes.", ""]
    lines += ["## Detector trained on all generators, test split", ""]
    lines += ["Threshold from validation reals at 5 % false positives; 95 % intervals over test images.", ""]
    names = list(dict.fromkeys(table["generator"]))
    wide = table.assign(
        shown=[
            f"{v:.2f} ({a:.2f}-{b:.2f})" for v, a, b in zip(table.value, table.low, table.high, strict=True)
        ]
    ).pivot(index="generator", columns="metric", values="shown")
    wide = wide.loc[names].reset_index()
    lines += _markdown(wide[[c for c in SUMMARY_COLUMNS if c in wide]])
    controls = out / "figures" / "03_controls.csv"
    if controls.is_file():
        study = pd.read_csv(controls)
        study["shown"] = [f"{r.value:.2f} ({r.low:.2f}-{r.high:.2f})" for r in study.itertuples()]
        order = list(dict.fromkeys(study["detector_title"]))
        wide = study.pivot(index="detector_title", columns="cell", values="shown").loc[order].reset_index()
        lines += ["", "## Trained on one generator, tested on unseen families (AUROC, notebook 03)", ""]
        lines += _markdown(wide.rename(columns={"detector_title": "detector"}))
    figures = sorted((out / "figures").glob("*.png"))
    lines += ["", "## Figures", "", *(f"- [{f.stem}](figures/{f.name})" for f in figures), ""]
    if left_out:
        lines += ["## Notebooks", "", *(f"- {line}" for line in left_out), ""]
    path = out / "summary.md"
    path.write_text("\n".join(lines))
    return path


def _markdown(table: pd.DataFrame) -> list[str]:
    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _shown(path: Path) -> str:
    """A path as short as it can be told from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
