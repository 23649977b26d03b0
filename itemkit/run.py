"""``itemkit run``: the whole method on one data set, from images to figures and a page that sums up.

What fails, or cannot be said of these images, is noted on that page; everything else is made all the same.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from itemkit import schema, workflow
from itemkit._files import atomic_write
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.manifest import describe_manifest, write_manifest
from itemkit.misalignment import cosines
from itemkit.presets import PRESETS, Preset, get_preset
from itemkit.text import count, markdown_table, one_line, printable

if TYPE_CHECKING:
    from itemkit.detector import Detector

COLUMNS = ("auroc", "ap", "accuracy_real", "accuracy_fake", "tpr_at_fpr05")
# a cell with this tag is about the laboratory's images; it does not stand below figures of other ones
LAB_TAG = "lab"
NOT_YOURS = "*(What stands here in the notebook is about the mini laboratory's images, not about yours.)*"


def run_all(
    preset: str | Preset = "mini",
    data: pd.DataFrame | str | Path | None = None,
    out: str | Path = "results",
    device: str = "auto",
    *,
    fpr: float = 0.05,
    fnr: float = 0.05,
) -> list[str]:
    """Extract, train, evaluate, execute the notebooks, and sum up on one page, ``out/summary.md``.

    On images of one's own, notebooks that ask about the laboratory, or about more generators than there are,
    are left out, and the summary says so.

    Parameters
    ----------
    preset : str or Preset
    data : DataFrame, path or None
        Manifest, or a file or folder to read one from; the mini laboratory's images by default.
    out : path
        Everything goes below it: ``features``, ``detector``, ``notebooks``, ``figures``, ``study``,
        ``summary.md``.
    device : str
    fpr, fnr : float
        Rates of the threshold and of the verdicts, see `itemkit.workflow.detect`.

    Returns
    -------
    list of str
        What failed, each with its reason; empty if all is well.
    """
    began, since = time.monotonic(), time.time()
    out = Path(out).resolve()
    chosen = get_preset(preset) if isinstance(preset, str) else preset
    own = data is not None and not (isinstance(data, str) and data == "")
    manifest = workflow.data_manifest(data if own else None, out, chosen.name)
    if not isinstance(data, pd.DataFrame):  # whoever read it has shown this already
        _say(*describe_manifest(manifest))
    features = workflow.features(chosen, manifest, out, device)
    lines, failed = _head(features), []
    try:
        detector = workflow.train_detector(features, device=device)
        detector.save(out / "detector")
        lines += _of_detector(detector, features, fpr, fnr)
    except InputError as reason:
        failed.append(f"detector: {one_line(reason)}")
        lines += ["", "## No detector", "", f"None could be trained or evaluated: {printable(reason)}."]
    left_out, broken = _notebooks(chosen, manifest if own else None, features, out, device)
    failed += broken
    lines += _of_figures(out / "figures", since)
    if left_out or failed:
        lines += ["", "## Not made", "", *(f"- failed: {line}" for line in failed)]
        lines += [f"- left out: {line}" for line in left_out]
    lines += ["", f"{(time.monotonic() - began) / 60:.1f} minutes."]
    page = "\n".join(lines) + "\n"
    atomic_write(out / "summary.md", page.encode("utf-8", "backslashreplace"))
    print(page)
    for name in ("figures", "notebooks", "detector", "summary.md"):
        print(f"{name:10s} {os.path.relpath(out / name)}")
    return failed


def _say(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- the summary


def _head(features: Features) -> list[str]:
    """What made the numbers, what they are about, and what can be said of any images: how well they fit."""
    made, table = features.provenance, features.table
    lines = ["# Summary", "", f"Made with preset {made['preset'] or 'of its own'}, models {made['models']}, "]
    lines[-1] += f"itemkit {made['itemkit']}; {count(len(features), 'image')}."
    lines += ["", f"**{made['note'][:1].upper()}{made['note'][1:]}.**"] if made["note"] else []
    if splits := features.run.get("splits"):
        lines += ["", f"Splits: {printable(splits)}."]
    if errors := (features.run.get("counts") or {}).get("errors"):
        lines += ["", f"{count(errors, 'image')} could not be used; errors.parquet of the store says why."]
    fit = pd.concat([table[[schema.GENERATOR]], cosines(features)], axis=1).groupby(
        schema.GENERATOR, sort=False, dropna=False
    )
    shown = fit[["global_cosine", "mean_local_cosine"]].median().round(3).astype(str)
    shown.insert(0, "images", fit.size())
    titles = {"global_cosine": "global cosine", "mean_local_cosine": "mean local cosine"}
    lines += ["", "## How well images fit their captions", "", "Medians; nothing is trained here.", ""]
    return lines + markdown_table(shown.rename(columns=titles).reset_index())


def _of_detector(detector: Detector, features: Features, fpr: float, fnr: float) -> list[str]:
    test = features.split("test")
    table = detector.evaluate(test, fpr)
    n = [int((test.labels == label).sum()) for label in (schema.REAL, schema.FAKE)]
    lines = ["", "## Detector trained on all generators, test split", ""]
    lines += [f"{n[0]:,} real and {n[1]:,} fake test images; 95 % intervals over test images.", ""]
    shown = [_interval(*row) for row in table[["value", "low", "high"]].itertuples(index=False)]
    wide = table.assign(shown=shown).pivot(index="generator", columns="metric", values="shown")
    wide = wide.loc[list(dict.fromkeys(table["generator"]))].reset_index()
    lines += markdown_table(wide[["generator", *(c for c in COLUMNS if c in wide)]])
    with contextlib.suppress(InputError):  # too few for this rate, which the last lines say
        lines += ["", detector.threshold(fpr).statement]
    counts = detector.verdict(test, fpr, fnr)["verdict"].value_counts()
    lines += ["", f"Verdicts: {', '.join(f'{n:,} {verdict}' for verdict, n in counts.items())}."]
    return lines + [f"Withheld: {printable(reason)}." for reason in detector.lacking(fpr, fnr)]


def _of_figures(folder: Path, since: float) -> list[str]:
    """The figures of this run; older ones in the folder may be of other data."""
    made = sorted(path for path in folder.glob("*.*") if path.stat().st_mtime >= since - 1)
    lines = []
    if (controls := folder / "03_controls.csv") in made:
        study = pd.read_csv(controls)
        study["shown"] = [_interval(*r) for r in study[["value", "low", "high"]].itertuples(index=False)]
        order = list(dict.fromkeys(study["detector_title"]))
        wide = study.pivot(index="detector_title", columns="cell", values="shown").loc[order].reset_index()
        lines += ["", "## Trained on one generator, tested on unseen families (AUROC, notebook 03)", ""]
        lines += markdown_table(wide.rename(columns={"detector_title": "detector"}))
    figures = [path for path in made if path.suffix == ".png"]
    return lines + ["", "## Figures", "", *(f"- [{f.stem}](figures/{f.name})" for f in figures)]


def _interval(value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return "not defined"
    return f"{value:.2f}" if pd.isna(low) or pd.isna(high) else f"{value:.2f} ({low:.2f}-{high:.2f})"


# -------------------------------------------------------------------------------------------- the notebooks


def _notebooks(
    preset: Preset, manifest: pd.DataFrame | None, features: Features, out: Path, device: str
) -> tuple[list[str], list[str]]:
    """Execute the notebooks that fit into ``out/notebooks``; returns those left out and those that failed."""
    folder = Path(__file__).resolve().parents[1] / "notebooks"
    sources = sorted(folder.glob("[0-9]*.ipynb"))
    if not sources:
        return ["the notebooks, which come with the repository and not with the installed package: clone it, "
                "`pip install -e .` there, and run this again"], []  # fmt: skip
    values: dict[str, Any] = {"PRESET": preset.name, "DATA": "", "OUT_DIR": str(out), "DEVICE": device}
    if manifest is not None:
        values["DATA"] = str(out / "manifest.parquet")
        write_manifest(manifest, values["DATA"])
    models = _as_literals(preset)
    labelled = features.table[features.table[schema.LABEL].notna()]
    fakes = set(labelled[schema.GENERATOR]) - {schema.REAL_GENERATOR}
    left_out, failed = [], []
    for source in sources:
        notebook, known = _read(source)
        why = ""
        if manifest is not None and "DATA" not in known:
            why = "it is about the mini laboratory"
        elif models is None or (models and "MODELS" not in known):
            why = "it cannot be given the models of this run"
        elif manifest is not None and source.stem.startswith("06"):
            why = "it asks for second models: open it, set CLIP_SECOND and CAPTIONER_SECOND"
        elif labelled[schema.LABEL].nunique() < 2:
            why = "it compares real and fake images"
        elif source.stem.startswith("03") and len(fakes) < 2:
            why = "it asks about a second generator (column `generator`)"
        if why:
            left_out.append(f"{source.stem}: {why}")
            continue
        _say(f"notebook {source.stem}")
        given = {name: value for name, value in (values | {"MODELS": models}).items() if name in known}
        try:
            _execute(notebook, out / "notebooks" / source.name, given, source.parent)
        except Exception as error:  # noqa: BLE001 - one notebook, in a process of its own, ends nothing else
            failed.append(f"notebook {source.stem}: {_reason(error)}")
            _say(failed[-1])
    return left_out, failed


def _as_literals(preset: Preset) -> dict[str, Any] | None:
    """What makes this preset of the one of its name, as a notebook's parameter; None if that cannot be."""
    if preset.name not in PRESETS:
        return None
    plain, changes = get_preset(preset.name), {}
    for field in dataclasses.fields(preset):
        value = getattr(preset, field.name)
        if value == getattr(plain, field.name):
            continue
        if isinstance(value, (str, Path)) and os.path.exists(value):
            value = os.path.abspath(value)  # the notebook runs in another folder
        if not (value is None or isinstance(value, (str, Mapping))):
            return None
        changes[field.name] = dict(value) if isinstance(value, Mapping) else value
    return changes


def _read(source: Path) -> tuple[Any, set[str]]:
    """A notebook, and the names that its cell of parameters sets."""
    import nbformat

    notebook = nbformat.read(source, as_version=4)
    names = set()
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            assigned = [s for s in ast.parse(cell.source).body if isinstance(s, ast.Assign)]
            names |= {target.id for s in assigned for target in s.targets if isinstance(target, ast.Name)}
    return notebook, names


def _execute(notebook: Any, target: Path, values: Mapping[str, Any], folder: Path) -> None:
    import matplotlib
    import nbformat
    import papermill
    import torch

    if values.get("DATA"):
        for cell in notebook.cells:
            if LAB_TAG in cell.metadata.get("tags", []):
                title = cell.source.split("\n")[0] if cell.source.startswith("#") else ""
                cell.source = f"{title}\n\n{NOT_YOURS}".strip()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "notebook.ipynb")
        nbformat.write(notebook, source)
        environment = {
            # settings of the user are left out, they change figures
            "IPYTHONDIR": scratch,
            "MATPLOTLIBRC": str(Path(matplotlib.get_data_path(), "matplotlibrc")),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        with _environment(environment):
            papermill.execute_notebook(
                str(source), str(target), parameters=dict(values), kernel_name="python3", cwd=str(folder),
                progress_bar=False,
            )  # fmt: skip


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _reason(error: Exception) -> str:
    if name := getattr(error, "ename", ""):  # papermill's own: the cell and its error
        cell, text = getattr(error, "exec_count", "?"), one_line(str(getattr(error, "evalue", "")))
        return f"code cell {cell} ends in {name}: {text}"
    return f"{type(error).__name__}: {one_line(error)}"
