"""Execute notebooks in a clean kernel, and stamp what they made.

``python -m tools.notebooks write`` (`make notebooks`) is the only writer of committed outputs; ``run``
executes into another folder, with other parameters if wanted; ``check`` tells which rules a notebook breaks.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

import itemkit
from itemkit.devices import choose_device
from itemkit.errors import InputError, ItemkitError
from tools import rules

# whose versions the stamp records: those that can move a number
STAMPED_VERSIONS = (
    "torch", "open_clip_torch", "transformers", "spacy", "numpy", "scikit-learn", "umap-learn", "matplotlib",
)  # fmt: skip

_PROGRESS_BAR = re.compile(r"\d+%\||\d+(?:it|\.\d+s/it|\.\d+it/s)\b")
_KEPT_CELL_METADATA = ("tags", "jupyter")


class NotebookFailed(ItemkitError):
    """A cell of a notebook raised an error."""


def execute(
    source: Path, target: Path, parameters: Mapping[str, Any] | None = None, *, progress: bool = True
) -> Path:
    """Execute a notebook from a clean kernel, top to bottom, and write the scrubbed, stamped result.

    The kernel starts in the folder of ``source``, as it does when the notebook is opened by hand. Settings of
    the user (IPython profile, matplotlibrc) are left out: they change figures.

    Parameters
    ----------
    source, target : Path
        Notebook to read and notebook to write; they may be the same, which is replaced only after success.
    parameters : mapping, optional
        New values for names of the cell tagged ``parameters``.
    progress : bool
        Show a bar over the cells, with the time left.

    Returns
    -------
    Path
        ``target``.

    Raises
    ------
    InputError
        A parameter the notebook does not have.
    NotebookFailed
        A cell raised an error. What it made until then is kept beside ``target`` as ``*.failed.ipynb``.
    """
    import papermill

    source, target = Path(source), Path(target)
    overrides = dict(parameters or {})
    values = _parameters_of(source)
    if unknown := sorted(set(overrides) - set(values)):
        raise InputError(f"{source.name} has no parameter {', '.join(unknown)}; it has {', '.join(values)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = target.with_name(target.stem + rules.FAILED)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, _environment(_clean_settings(scratch)):
        half_done = Path(scratch, "notebook.ipynb")
        try:
            papermill.execute_notebook(
                str(source),
                str(half_done),
                parameters=overrides,
                kernel_name="python3",
                cwd=str(source.parent),
                progress_bar=progress,
            )
        except papermill.PapermillExecutionError as error:
            failed.write_bytes(half_done.read_bytes())
            raise NotebookFailed(
                f"{source.name} stopped in code cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                f"What it made until then is in {failed}"
            ) from error
        notebook = rules.read_notebook(half_done)
    seconds = time.perf_counter() - started
    root = source.resolve().parent.parent
    scrub(notebook, root)
    notebook.metadata[rules.STAMP] = stamp(notebook, values | overrides, source.parent, root, seconds)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    nbformat.write(notebook, temporary)
    os.replace(temporary, target)
    failed.unlink(missing_ok=True)
    return target


def execute_all(
    sources: Sequence[Path],
    folder: Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
) -> list[Path]:
    """Execute several notebooks into a folder, one after the other.

    Parameters
    ----------
    sources : sequence of Path
        The notebooks.
    folder : Path
        Where the executed ones go, under their own names.
    parameters : mapping, optional
        New values; each notebook takes those it has a name for. A value no notebook takes is an error.
    progress : bool
        Show a bar over the cells of each.

    Returns
    -------
    list of Path
        The executed notebooks.

    Raises
    ------
    InputError
        No notebook has one of the parameters.
    NotebookFailed
        A cell raised an error; later notebooks are not run.
    """
    wanted = dict(parameters or {})
    names = {source: set(_parameters_of(source)) for source in sources}
    if unknown := sorted(set(wanted) - set().union(*names.values())):
        raise InputError(f"no notebook has a parameter {', '.join(unknown)}")
    return [
        execute(
            source,
            Path(folder) / source.name,
            {name: value for name, value in wanted.items() if name in names[source]},
            progress=progress,
        )
        for source in sources
    ]


def stamp(
    notebook: Any, parameters: Mapping[str, Any], folder: Path, root: Path, seconds: float
) -> dict[str, Any]:
    """What a notebook's outputs were made from and with.

    Parameters
    ----------
    notebook : nbformat notebook
        The executed notebook.
    parameters : mapping
        The values it ran with.
    folder, root : Path
        Where the notebook lies, and the checkout.
    seconds : float
        How long it ran.

    Returns
    -------
    dict
        Parameters, device, versions, seconds and the hashes of code cells and data; goes into the metadata.
    """
    data = rules.data_of(dict(parameters), folder, root)
    return {
        "parameters": dict(parameters),
        "device": device_name(str(parameters.get("DEVICE") or "auto")),
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "itemkit": itemkit.__version__,
            **{name: metadata.version(name) for name in STAMPED_VERSIONS},
        },
        "code_sha256": rules.code_hash(notebook),
        "data_sha256": rules.data_hash(data) if data is not None and data.exists() else None,
    }


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
    for key in set(notebook.metadata) - {"kernelspec", rules.STAMP}:
        del notebook.metadata[key]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python", "file_extension": ".py"}
    folders = {f"{root}{os.sep}": "", str(root): ".", str(Path.home()): "~"}
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in _KEPT_CELL_METADATA if cell.metadata.get(key)}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
        for output in cell.outputs:
            output.get("metadata", {}).pop("papermill", None)
            if "text" in output:
                output["text"] = _relative(output["text"], folders)
            for mime, content in output.get("data", {}).items():
                if mime == "image/png":
                    output["data"][mime] = _in_256_colours(content)
                elif isinstance(content, str) and not mime.startswith("image/"):
                    output["data"][mime] = _relative(content, folders)


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


def _relative(text: str, folders: Mapping[str, str]) -> str:
    for folder, name in folders.items():
        text = text.replace(folder, name)
    return text


def _parameters_of(source: Path) -> dict[str, Any]:
    try:
        return rules.read_parameters(rules.read_notebook(source))
    except InputError as error:
        raise InputError(f"{source.name}: {error}") from error


def _clean_settings(scratch: str) -> dict[str, str]:
    import matplotlib

    return {
        "IPYTHONDIR": scratch,
        "MATPLOTLIBRC": str(Path(matplotlib.get_data_path(), "matplotlibrc")),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the kernel's debugger warns on each start
    }


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _parse_parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value  # a bare word is a string


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``check``, ``write`` or ``run``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks", description=__doc__)
    parser.add_argument("action", choices=("check", "write", "run"))
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebook files (default: notebooks/*.ipynb)")
    parser.add_argument("--out", type=Path, help="run: folder for the executed notebooks")
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], type=_parse_parameter, metavar="NAME=VALUE",
        help="run: another value for a name of the parameters cell; repeatable",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if (options.action == "run") != (options.out is not None):
        parser.error("run needs --out FOLDER, check and write do not take it")
    if options.parameter and options.action != "run":
        # committed pages show the parameters cell as it is; outputs of other values below it would mislead
        parser.error("other parameters are for run; to write with other values, edit the parameters cell")
    try:
        sources = options.notebooks or rules.find_notebooks(Path("notebooks"))
        if options.action == "run":
            made = execute_all(sources, options.out, dict(options.parameter))
        else:
            made = sources if options.action == "check" else [execute(source, source) for source in sources]
    except ItemkitError as error:
        print(error, file=sys.stderr)
        return 2
    broken = 0
    for path in made:
        found = rules.problems(path, committed=options.action != "run")
        broken += bool(found)
        print(f"[{'FAIL' if found else 'OK'}] {path}", *(f"       {problem}" for problem in found), sep="\n")
    return 1 if broken else 0
