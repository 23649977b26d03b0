"""The rules that a notebook of this project keeps, and what its stamp is compared with.

Readers meet the figures on GitHub without running anything, so a committed output must be what its code
makes: executed top to bottom in a clean kernel, without errors or warnings, and stamped with hashes of code
and data. `tools.notebooks` executes and stamps; this module only reads.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat

from itemkit.errors import InputError
from itemkit.models import file_hash

STAMP = "itemkit"  # key of the stamp in the notebook's metadata
PARAMETERS_TAG = "parameters"
FAILED = ".failed.ipynb"  # ending of what is kept of a notebook that stopped in an error

MAX_BYTES = 500_000
MAX_CELL_LINES = 14
EXERCISE_TAG = "exercise"  # its code is executed like all other

# a path from the root of a file system with at least one folder, or a Windows drive; no URL, no HTML tag
_ABSOLUTE_PATH = re.compile(r"(?<![\w/:.<~)\]}*-])/(?:[A-Za-z][\w.+-]+/)+[\w.+-]*|\b[A-Za-z]:\\\\?\w+")
_OBJECT_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
# no statement about a result: links, code, formulas, arXiv numbers, years, notebooks, settings; chance, and
# the level of every interval
_NO_RESULT = re.compile(
    r"\]\([^)]*\)|`[^`]*`|\${1,2}[^$]+\${1,2}|<[^>]+>|https?://\S+|\b\d{4}\.\d{5}\b|\b(?:19|20)\d\d\b"
    r"|^#+ .*|^\*\*Runs in.*|^\s*\d+\. |\b[Nn]otebooks? \d\d\b|\[\d\d\b|[A-Za-z]\w*[/-]\d+\b"
    r"|\bquality \d+|\b\d+ px\b|\b0\.5\b(?! ?%)|\b95 ?%",
    re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:\s?%)?")
_INSTALL = re.compile(r"^\s*[%!]\s*(?:pip|conda|mamba)\b", re.MULTILINE)


def find_notebooks(folder: Path) -> list[Path]:
    """All notebooks of a folder, sorted by name; InputError if there is none."""
    found = sorted(path for path in folder.glob("*.ipynb") if not path.name.endswith(FAILED))
    if not found:
        raise InputError(f"no notebook in '{folder}'; run this in the root of the checkout, or name files")
    return found


def read_notebook(path: Path) -> Any:
    """Read a notebook of format 4; InputError with its name if it is none."""
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise InputError(f"there is no notebook '{path}'; notebooks/ holds those of the project") from None
    except Exception as error:  # nbformat raises errors of several libraries for a broken file
        raise InputError(f"'{path}' is not a readable notebook ({type(error).__name__}: {error})") from error


def code_cells(notebook: Any) -> list[Any]:
    """Code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook: Any) -> str:
    """Hash of all code cells in order; prose and outputs do not count."""
    digest = hashlib.sha256()
    for cell in code_cells(notebook):
        digest.update(cell.source.rstrip().encode() + b"\0")
    return digest.hexdigest()


def read_parameters(notebook: Any) -> dict[str, Any]:
    """Name to value, in order, of the one cell tagged ``parameters``.

    Raises
    ------
    InputError
        There is not exactly one such cell, or it holds anything but ``NAME = literal``. Only literals can be
        overridden from outside; a derived value belongs in the next cell.
    """
    tagged = [cell for cell in code_cells(notebook) if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{len(tagged)} cells are tagged '{PARAMETERS_TAG}', expected one")
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(tagged[0].source).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = ast.literal_eval(value)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    values[name] = ast.literal_eval(value)
                case _:
                    raise ValueError(ast.unparse(statement))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"the cell tagged '{PARAMETERS_TAG}' holds more than literals: {error}") from error
    return values


def data_of(parameters: dict[str, Any], folder: Path, root: Path) -> Path | None:
    """The data a notebook reads: its DATA parameter, else the committed data of its preset, else nothing."""
    if data := parameters.get("DATA"):
        return folder / str(data)
    committed = root / "data" / str(parameters.get("PRESET", ""))
    return committed if parameters.get("PRESET") and committed.is_dir() else None


def data_hash(data: Path | None) -> str | None:
    """Hash of a file, or of the names and contents of a folder's files; None where there is nothing.

    Prose (``*.md``), the scores of a study (a result) and anything below a name that starts with a dot or an
    underscore (caches) do not count.
    """
    if data is None or not data.exists():
        return None
    digest = hashlib.sha256()
    for path in [data] if data.is_file() else sorted(data.rglob("*")):
        parts = path.relative_to(data).parts
        result = path.suffix == ".md" or path.name == "study.parquet"
        if path.is_file() and not result and not any(part[0] in "._" for part in parts):
            digest.update("/".join(parts).encode() + b"\0")
            digest.update(file_hash(path).encode())
    return digest.hexdigest()


def problems(path: Path, committed: bool = True) -> list[str]:
    """Check one notebook.

    Parameters
    ----------
    path : Path
        The notebook file, in a folder of the checkout.
    committed : bool
        Also the rules for what readers see: stamp, size, no path of a machine, the form of the page. A
        notebook executed into some other folder is only asked to have run cleanly.

    Returns
    -------
    list of str
        One sentence per broken rule, without the name of the notebook; empty when all is well.
    """
    try:
        notebook = read_notebook(path)
    except InputError as error:
        return [str(error)]
    found = [*_run_problems(notebook)]
    if committed:
        found += _form_problems(notebook)
        found += _text_problems(notebook, path.stat().st_size)
        found += _number_problems(notebook)
        found += _stamp_problems(notebook, path.resolve().parent)
    return found


def _run_problems(notebook: Any) -> Iterator[str]:
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"execution counts are {counts}, expected 1..{len(cells)}: not one run from top to bottom"
    for number, cell in enumerate(cells, start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"code cell {number} ends in an error: {output.ename}: {output.evalue}"
            elif output.get("name") == "stderr":
                line = output.text.strip().partition("\n")[0]
                yield f"code cell {number} writes to stderr: {line[:100]!r}"
    figures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    if not figures:
        yield "no figure (image/png) in the outputs"
    mute = sum(not figure.get("metadata", {}).get("image/png", {}).get("alt") for figure in figures)
    if mute:
        yield f"{mute} of {len(figures)} figures have no words for who cannot see them: plots.save(alt=...)"


def _form_problems(notebook: Any) -> Iterator[str]:
    first = notebook.cells[0].source if notebook.cells and notebook.cells[0].cell_type == "markdown" else ""
    title = first.strip().partition("\n")[0].strip()
    if not (title.startswith("# ") and title.endswith("?")):
        yield f"the first cell's title is not a question ('# ...?'): {title!r}"
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for wanted in ("Runs in", "What to notice"):
        if wanted not in prose:
            yield f"the prose has no '{wanted}'"
    cells = code_cells(notebook)
    if cells and PARAMETERS_TAG not in cells[0].metadata.get("tags", []):
        yield f"the first code cell is not tagged '{PARAMETERS_TAG}'"
    try:
        read_parameters(notebook)
    except InputError as error:
        yield str(error)
    if not any(EXERCISE_TAG in cell.metadata.get("tags", []) for cell in cells):
        yield f"no code cell is tagged '{EXERCISE_TAG}'"
    for number, cell in enumerate(cells, start=1):
        lines = len(cell.source.splitlines())
        if lines > MAX_CELL_LINES:
            yield f"code cell {number} has {lines} lines, at most {MAX_CELL_LINES}: move part to itemkit"
        if _INSTALL.search(cell.source):
            yield f"code cell {number} installs packages; the README's commands do that"


def _output_texts(notebook: Any) -> Iterator[str]:
    """All text that the outputs show; pictures are left out."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            for mime, content in output.get("data", {}).items():
                if isinstance(content, str) and (mime.startswith("text/") or mime == "image/svg+xml"):
                    yield content


def _text_problems(notebook: Any, size: int) -> Iterator[str]:
    if size > MAX_BYTES:
        yield f"{size / 1e3:.0f} KB, at most {MAX_BYTES / 1e3:.0f} KB: fewer or smaller figures"
    outputs = "\n".join(_output_texts(notebook))
    if address := _OBJECT_ADDRESS.search(outputs):
        yield f"an output shows an object's address ({address.group()!r}): end that cell's last line with ';'"
    sources = "\n".join(cell.source for cell in notebook.cells)
    for where, text in (("an output", outputs), ("the source", sources)):
        if match := _ABSOLUTE_PATH.search(text):
            yield f"{where} holds an absolute path: {match.group()!r}"


def _number_problems(notebook: Any) -> Iterator[str]:
    """Numbers in prose that stand neither in a text output above them, in their section, nor in its code.

    A section begins with a heading; the last one, which sums up, may use all outputs. Whole numbers below ten
    are words.
    """
    texts: list[str] = []  # of code and outputs
    parameters = [c.source for c in code_cells(notebook) if PARAMETERS_TAG in c.metadata.get("tags", [])]
    last = max((i for i, c in enumerate(notebook.cells) if c.source.startswith("## ")), default=0)
    begin = 0  # where the section begins among the texts
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            texts.append(cell.source)
            for output in cell.outputs:
                texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
            continue
        if cell.source.startswith("## "):
            begin = 0 if i == last else len(texts)
        for text in unsaid(cell.source, parameters + texts[begin:]):
            where = cell.source.find(text)
            around = " ".join(cell.source[max(0, where - 30) : where + 20].split())
            yield f"{text!r} stands in the prose and in no output above it: {around!r}"


def unsaid(prose: str, texts: Sequence[str]) -> list[str]:
    """Numbers in prose that none of the texts shows; whole numbers below ten are words."""
    known = _NUMBER.findall("\n".join(texts))
    told = [
        text
        for text in _NUMBER.findall(_NO_RESULT.sub(" ", prose))
        if not text.isdecimal() or int(text) >= 10
    ]
    return [text for text in told if not any(_says(text, other) for other in known)]


def shown(path: Path) -> list[str]:
    """Everything that the text outputs of a notebook show."""
    return [*_output_texts(read_notebook(path))]


def _says(text: str, shown: str) -> bool:
    """Whether a number in prose, perhaps rounded or as per cent, says what an output shows."""
    half = 0.5 * 10 ** -len(text.rstrip(" %").partition(".")[2]) + 1e-9  # of the last digit told
    scales = (
        (1,) if text.endswith("%") == shown.endswith("%") else (100, 1) if text.endswith("%") else (0.01,)
    )
    return any(abs(abs(_value(shown)) * scale - abs(_value(text))) <= half for scale in scales)


def _value(text: str) -> float:
    return float(text.rstrip(" %").replace(",", "").replace("−", "-"))


def _stamp_problems(notebook: Any, folder: Path) -> Iterator[str]:
    stamp = notebook.metadata.get(STAMP)
    if not stamp:
        yield "no stamp: run `make notebooks`"
        return
    if stamp.get("code_sha256") != code_hash(notebook):
        yield "the code was changed after the outputs were made: run `make notebooks`"
    try:
        parameters = read_parameters(notebook)
    except InputError:
        return  # reported with the form
    if stamp.get("parameters") != parameters:
        yield f"made with {stamp.get('parameters')}, the parameters are {parameters}: run `make notebooks`"
    data = data_of(parameters, folder, folder.parent)
    if data is not None and stamp.get("data_sha256") != data_hash(data):
        yield f"the data in {data.name}/ changed after the outputs were made: run `make notebooks`"
