"""Execute the committed notebooks in a clean kernel, and stamp what they made.

``python -m tools.notebooks write`` (`make notebooks`) is the only writer of committed outputs; ``check``
tells which rules a notebook breaks (`tools.rules`).
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

import itemkit
from itemkit._files import atomic_write
from itemkit.devices import choose_device
from itemkit.errors import ItemkitError
from itemkit.run import execute
from tools import rules

# whose versions the stamp records: those that can move a number
STAMPED_VERSIONS = (
    "torch", "open_clip_torch", "transformers", "spacy", "numpy", "scikit-learn", "umap-learn", "matplotlib",
)  # fmt: skip

_PROGRESS_BAR = re.compile(r"\d+%\||\d+(?:it|\.\d+s/it|\.\d+it/s)\b")
_KEPT_CELL_METADATA = ("tags", "jupyter")
THUMBNAIL_TAG, THUMBNAIL_PX = "thumbnail", (320, 240)  # the figure that stands for its notebook in the README


class NotebookFailed(ItemkitError):
    """A cell of a notebook raised an error."""


def write(path: Path, *, progress: bool = True) -> None:
    """Execute a notebook from a clean kernel, top to bottom, and replace it by the scrubbed, stamped result.

    Parameters
    ----------
    path : Path
        Left as it is unless all cells run.
    progress : bool
        Show a bar over the cells, with the time left.

    Raises
    ------
    InputError
        The file is no notebook, or its parameters are more than literals.
    NotebookFailed
        A cell raised an error. What was made until then is kept beside the notebook as ``*.failed.ipynb``.
    """
    from papermill import PapermillExecutionError

    rules.read_parameters(rules.read_notebook(path))  # refused before minutes are spent
    failed = path.with_name(path.stem + rules.FAILED)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        half_done = Path(scratch, "notebook.ipynb")
        try:
            execute(path, half_done, progress=progress)
        except PapermillExecutionError as error:
            failed.write_bytes(half_done.read_bytes())
            raise NotebookFailed(
                f"{path.name} stopped in code cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                f"What it made until then is in {failed}"
            ) from error
        notebook = rules.read_notebook(half_done)
    scrub(notebook, path.resolve().parent.parent)
    notebook.metadata[rules.STAMP] = stamp(notebook, path.resolve().parent, time.perf_counter() - started)
    atomic_write(path, (nbformat.writes(notebook) + "\n").encode())
    failed.unlink(missing_ok=True)
    thumbnails = path.resolve().parent.parent / "docs" / "thumbnails"
    if thumbnails.is_dir() and (small := thumbnail(notebook)):
        atomic_write(thumbnails / f"{path.stem}.png", small)


def stamp(notebook: Any, folder: Path, seconds: float) -> dict[str, Any]:
    """What a notebook's outputs were made from and with.

    Parameters
    ----------
    notebook : nbformat notebook
        The executed notebook.
    folder : Path
        Where it lies, in a folder of the checkout.
    seconds : float
        How long it ran.

    Returns
    -------
    dict
        Parameters, device, versions, seconds and the hashes of code cells and data; goes into the metadata.
    """
    parameters = rules.read_parameters(notebook)
    return {
        "parameters": parameters,
        "device": device_name(str(parameters.get("DEVICE") or "auto")),
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "itemkit": itemkit.__version__,
            **{name: metadata.version(name) for name in STAMPED_VERSIONS},
        },
        "code_sha256": rules.code_hash(notebook),
        "data_sha256": rules.data_hash(rules.data_of(parameters, folder, folder.parent)),
    }


def thumbnail(notebook: Any) -> bytes | None:
    """A small PNG of the figure that is tagged for it, else of the first one; None if there is no figure."""
    cells = sorted(rules.code_cells(notebook), key=lambda c: THUMBNAIL_TAG not in c.metadata.get("tags", []))
    for output in (output for cell in cells for output in cell.outputs):
        if png := output.get("data", {}).get("image/png"):
            with Image.open(io.BytesIO(base64.b64decode(png))) as figure:
                small = figure.convert("RGB")
            small.thumbnail(THUMBNAIL_PX, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.quantize(128).save(buffer, format="PNG", optimize=True)
            return buffer.getvalue()
    return None


def device_name(device: str) -> str:
    """Name of the device that ``device`` (or the automatic choice) stands for."""
    import torch

    chosen = choose_device(device)
    if chosen.type == "cuda":
        return torch.cuda.get_device_name(chosen)
    return f"cpu, {os.cpu_count()} cores" if chosen.type == "cpu" else chosen.type


def scrub(notebook: Any, root: Path) -> None:
    """Remove, in place, what tells of the machine and not of the result.

    Execution times, papermill's notes, widget states and progress bars go; paths below ``root`` become
    relative and the home folder ``~``. Warnings on stderr stay: the check reports them, to be mended.
    """
    notebook.metadata = nbformat.NotebookNode(
        kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"},
        language_info={"name": "python", "file_extension": ".py"},
    )
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in _KEPT_CELL_METADATA if cell.metadata.get(key)}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
        for output in cell.outputs:
            output.get("metadata", {}).pop("papermill", None)
            if "text" in output:
                output["text"] = _without_machine(output["text"], root)
            for mime, content in output.get("data", {}).items():
                if mime == "image/png":
                    output["data"][mime] = _in_256_colours(content)
                elif isinstance(content, str) and not mime.startswith("image/"):
                    output["data"][mime] = _without_machine(content, root)


def _in_256_colours(png: str) -> str:
    """Store a figure with a palette: a third of the size where it shows noisy pictures, alike to the eye."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as figure:
        small = figure.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _is_progress(output: Any) -> bool:
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return True  # a live widget shows nothing without its kernel
    if output.get("name") != "stderr":
        return False
    return all(_PROGRESS_BAR.search(line) for line in re.split(r"[\r\n]+", output.text) if line.strip())


def _without_machine(text: str, root: Path) -> str:
    """Shorten the names of the checkout and of the home folder; "/" is neither, though HOME may say so."""
    for folder, inside, itself in ((root, "", "."), (Path.home(), "~/", "~")):
        if folder != folder.parent:
            name = rf"(?<![\w.-]){re.escape(str(folder))}"
            text = re.sub(rf"{name}(?![\w-]|\.\w)", itself, re.sub(rf"{name}[/\\]", inside, text))
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``check`` or ``write``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    parser.add_argument("action", choices=("check", "write"))
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebook files (default: notebooks/*.ipynb)")
    options = parser.parse_args(argv)
    broken = 0
    try:
        for path in options.notebooks or rules.find_notebooks(Path("notebooks")):
            if options.action == "write":
                write(path)
            found = rules.problems(path)
            broken += bool(found)
            print(f"[{'FAIL' if found else 'OK'}] {path}", *(f"       {line}" for line in found), sep="\n")
    except ItemkitError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
