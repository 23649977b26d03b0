"""The committed notebooks keep the rules; the tool that executes and checks them does what it says."""

from __future__ import annotations

import ast
import base64
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from itemkit.doctor import photo_cases
from itemkit.errors import InputError
from itemkit.run import execute
from tools import notebooks, rules

REPO = Path(__file__).resolve().parents[1]
COMMITTED = sorted((REPO / "notebooks").glob("*.ipynb"))
WHERE_IT_LOSES = REPO / "docs" / "where_it_loses.md"

TOLD = {"image/png": {"alt": "one pixel"}}
# the smallest PNG there is: one transparent pixel
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


# ---- the committed notebooks -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook_keeps_the_rules(path: Path) -> None:
    assert rules.problems(path) == []


def library_calls(path: Path) -> Iterator[tuple[ast.Call, Any]]:
    """Calls in a notebook of what it imports from the library, with what is called."""
    tree = ast.parse("\n".join(cell.source for cell in rules.code_cells(rules.read_notebook(path))))
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("itemkit", "minilab"):
            for alias in node.names:
                module = importlib.import_module(str(node.module))
                if hasattr(module, "__path__") and find_spec(f"{node.module}.{alias.name}"):
                    importlib.import_module(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)

    def meant(node: ast.expr) -> Any:
        if isinstance(node, ast.Attribute) and inspect.ismodule(owner := meant(node.value)):
            return getattr(owner, node.attr)
        return names.get(node.id) if isinstance(node, ast.Name) else None

    yield from ((node, meant(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_calls_of_the_library_fit_its_signatures(path: Path) -> None:
    for node, called in library_calls(path):
        spread = any(isinstance(a, ast.Starred) for a in node.args) or any(not k.arg for k in node.keywords)
        if called is not None and not spread:
            try:
                inspect.signature(called).bind(*node.args, **{str(k.arg): 0 for k in node.keywords})
            except TypeError as error:
                pytest.fail(f"{ast.unparse(node)}: {error}")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `itemkit run` makes on mini, here or before (ITEMKIT_RESULTS), and the notebooks it leaves."""
    if made := os.environ.get("ITEMKIT_RESULTS"):
        out = Path(made)
    else:
        out = tmp_path_factory.mktemp("results")
        subprocess.run([sys.executable, "-m", "itemkit", "run", "--out", str(out)], cwd=REPO, check=True)
    for path in COMMITTED:
        if not (target := out / "notebooks" / path.name).is_file():
            execute(path, target, {"OUT_DIR": str(out)})
    return out


@pytest.mark.notebooks
def test_all_notebooks_run_on_mini(results: Path) -> None:
    executed = {path.name: path for path in results.rglob("*.ipynb")}
    assert set(executed) == {path.name for path in COMMITTED}
    assert [rules.problems(path, committed=False) for path in executed.values()] == [[]] * len(executed)


@pytest.mark.notebooks
def test_each_figure_has_its_print_version_and_its_data(results: Path) -> None:
    figures = sorted(path for path in results.rglob("*.png") if "figures" in path.parts)
    assert len(figures) >= len(COMMITTED)
    beside = [path.with_suffix(suffix) for path in figures for suffix in (".pdf", ".csv")]
    assert [path.name for path in beside if not path.is_file()] == []


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty cuts of photographs, of many sizes and shapes; "fakes" are reduced to a few colours."""
    folder = tmp_path_factory.mktemp("photographs")
    pictures, rng = [case.image for case in photo_cases()], np.random.default_rng(0)
    for label in ("real", "fake"):
        (folder / label).mkdir()
        for number in range(30):
            whole = pictures[number % len(pictures)]
            size = [int(side * rng.uniform(0.3, 1)) for side in whole.size]
            left, top = (int(rng.uniform(0, a - b)) for a, b in zip(whole.size, size, strict=True))
            cut = whole.crop((left, top, left + size[0], top + size[1]))
            cut = cut if label == "real" else cut.quantize(12).convert("RGB")
            cut.save(folder / label / f"{number}.jpg", quality=90)
    return folder


@pytest.mark.notebooks
@pytest.mark.parametrize("name", ["01_misalignment", "02_hierarchical_features", "05_robustness"])
def test_a_notebook_runs_on_photographs_of_mixed_sizes(name: str, photographs: Path, tmp_path: Path) -> None:
    given = {"DATA": str(photographs), "OUT_DIR": str(photographs.parent / "results")}
    execute(REPO / "notebooks" / f"{name}.ipynb", tmp_path / f"{name}.ipynb", given)
    assert rules.problems(tmp_path / f"{name}.ipynb", committed=False) == []


# ---- the rules ---------------------------------------------------------------------------------------------


def figure() -> nbformat.NotebookNode:
    return new_output("display_data", data={"image/png": PIXEL, "text/plain": "<Figure>"}, metadata=TOLD)


def good_notebook() -> nbformat.NotebookNode:
    """A page that keeps every rule, apart from its stamp."""
    parameters = new_code_cell(
        'PRESET = "mini"\nSEED = 0\nDEVICE: str = "cpu"\nDATA = None\nRATES = [-1, 0.5]',
        metadata={"tags": ["parameters"]},
        execution_count=1,
    )
    work = new_code_cell(
        "import base64\nSEED + 1", metadata={"tags": ["exercise"]}, execution_count=2, outputs=[figure()]
    )
    return new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        cells=[
            new_markdown_cell("# Does it work?\nNeeds nothing. Runs in: 1 s CPU (mini)"),
            parameters,
            work,
            new_markdown_cell("**What to notice**: it is short."),
        ],
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "notebooks"
    folder.mkdir(parents=True)
    data = tmp_path / "checkout" / "data" / "mini"
    data.mkdir(parents=True)
    (data / "table.csv").write_text("a,b\n1,2\n")
    return folder / "page.ipynb"


def save(notebook: nbformat.NotebookNode, path: Path, stamped: bool = True) -> Path:
    if stamped:
        notebook.metadata[rules.STAMP] = notebooks.stamp(notebook, path.parent, 1.0)
    nbformat.write(notebook, path)
    return path


def test_a_good_notebook_has_no_problems(page: Path) -> None:
    assert rules.problems(save(good_notebook(), page)) == []


def source(cell: int, text: str) -> Callable:
    """Replace the source of a cell; with a leading + add to it."""

    def edit(notebook: nbformat.NotebookNode) -> None:
        old = notebook.cells[cell].source
        notebook.cells[cell].source = old + text[1:] if text.startswith("+") else text

    return edit


def output(kind: str, **content: object) -> Callable:
    return lambda notebook: notebook.cells[2].outputs.append(new_output(kind, **content))


def value(cell: int, name: str, of_it: object) -> Callable:
    return lambda notebook: notebook.cells[cell].__setitem__(name, of_it)


def late_parameters(notebook: nbformat.NotebookNode) -> None:
    notebook.cells[1], notebook.cells[2] = notebook.cells[2], notebook.cells[1]
    notebook.cells[1].execution_count, notebook.cells[2].execution_count = 1, 2


HOME, DATA = ("/".join(["", *names]) for names in (["home", "me", "features"], ["data", "genimage", "i.csv"]))
BIG = base64.b64encode(bytes(400_000)).decode()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (source(0, "# It works\nRuns in: 1 s"), "title is not a question"),
        (source(3, "The end."), "no 'What to notice'"),
        (value(2, "execution_count", 7), "execution counts are [1, 7]"),
        (output("error", ename="ValueError", evalue="no such image", traceback=[]),
         "code cell 2 ends in an error: ValueError: no such image"),
        (output("stream", name="stderr", text="FutureWarning: soon\n"),
         "code cell 2 writes to stderr: 'FutureWarning: soon'"),
        (value(2, "outputs", []), "no figure"),
        (output("stream", name="stdout", text=f"written to {HOME}\n"), "an output holds an absolute path"),
        (source(2, f'open("{DATA}")'), "the source holds an absolute path"),
        (output("stream", name="stdout", text="C:\\Users\\me\n"), "an output holds an absolute path: 'C:"),
        (output("execute_result", data={"text/plain": "<Axes at 0x7f12ab34cd>"}), "object's address"),
        (source(2, "\n".join(f"a{i} = {i}" for i in range(15))), "code cell 2 has 15 lines, at most 14"),
        (lambda notebook: notebook.cells[2].outputs[0].metadata.clear(), "1 of 1 figures have no words"),
        (value(2, "metadata", {}), "no code cell is tagged 'exercise'"),
        (source(3, "+\nIts AUROC is 0.84."), "'0.84' stands in the prose and in no output above it"),
        (output("display_data", data={"image/png": BIG}, metadata=TOLD), " KB, at most 500 KB"),
        (source(2, "%pip install itemkit"), "installs packages"),
        (value(1, "metadata", {}), "0 cells are tagged 'parameters'"),
        (late_parameters, "first code cell is not tagged"),
        (source(1, "+\nOUT_DIR = PRESET + '/out'"), "more than literals"),
        (source(1, "import os\nPRESET = 'mini'"), "more than literals: import os"),
    ],
)  # fmt: skip
def test_each_broken_rule_is_named(page: Path, edit: Callable, words: str) -> None:
    notebook = good_notebook()
    edit(notebook)
    parameters = any(part in words for part in ("literals", "tagged"))  # a stamp records them
    found = rules.problems(save(notebook, page, stamped=not parameters))
    assert [problem for problem in found if words in problem], found
    assert parameters or len(found) == 1, found


def test_numbers_in_prose_are_those_of_the_outputs_of_their_section(page: Path) -> None:
    notebook = good_notebook()
    notebook.cells[2].outputs.append(
        new_output("stream", name="stdout", text="auroc 0.8437, share 0.667, n 1,200, 12.5% of -0.031")
    )
    said = "0.84 of 1,200 (66.7 %, 67 %, 13 %), −0.03; 9 of them, seed `77`, rates of 0.5; 95 % intervals. "
    no_result = "At quality 50 and 48 px, in [05](05_x.ipynb), notebook 07, 2511.00427, $x^{12}$, Guo 2017."
    notebook.cells[3].source = f"**What to notice**: {said}{no_result}"
    assert rules.problems(save(notebook, page)) == []
    for wrong in ("0.83", "68 %", "1,201", "0.04", "12"):
        notebook.cells[3].source = f"**What to notice**: {wrong} of them"
        assert [wrong in problem for problem in rules.problems(save(notebook, page))] == [True]
    # another section has its own outputs; the last one sums up
    notebook.cells += [
        new_markdown_cell("## More\nIt was 0.84."),
        new_markdown_cell("## Recap\nIt was 0.84."),
    ]
    assert len([problem for problem in rules.problems(save(notebook, page)) if "'0.84'" in problem]) == 1


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_wrong_number_planted_in_a_committed_notebook_is_found(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    told = [
        cell for cell in notebook.cells if cell.cell_type == "markdown" and "What to notice" in cell.source
    ]
    told[-1].source += " In all 98,765 of them, 0.98765 on average."
    nbformat.write(notebook, tmp_path / path.name)
    found = [problem for problem in rules.problems(tmp_path / path.name) if "in the prose" in problem]
    assert len(found) == 2


def test_where_it_loses_says_what_the_notebooks_show() -> None:
    lines = [line for line in WHERE_IT_LOSES.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 10
    for line in lines:
        sources = re.findall(r"\(\.\./(notebooks/[\w.]+)\)", line)
        texts = [text for source in sources for text in rules.shown(REPO / source)]
        assert sources and rules.unsaid(re.sub(r"\[.*?\]\(.*?\)", "", line), texts) == [], line


def test_urls_fractions_and_html_are_no_absolute_paths(page: Path) -> None:
    notebook = good_notebook()
    text = "see https://example.org/a/b/c, 120/240 images/s, and/or ../results/a/b.csv, ./a/b/c"
    html = "<table><tr><td>real/fake/other</td></tr></table>"
    notebook.cells[2].outputs += [
        new_output("stream", name="stdout", text=text),
        new_output("execute_result", data={"text/html": html, "text/plain": "1 / 2 / 3"}),
    ]
    assert rules.problems(save(notebook, page)) == []


def test_the_stamp_notices_changed_code_parameters_and_data(page: Path) -> None:
    save(good_notebook(), page)
    table = page.parent.parent / "data" / "mini" / "table.csv"
    (table.parent / "README.md").write_text("prose does not count")
    (table.parent / ".cache").mkdir()
    (table.parent / ".cache" / "x").write_text("caches do not count")
    assert rules.problems(page) == []

    table.write_text("a,b\n1,3\n")
    assert ["the data in mini/ changed" in problem for problem in rules.problems(page)] == [True]

    save(good_notebook(), page)
    notebook = nbformat.read(page, as_version=4)
    notebook.cells[0].source += "\nMore prose."
    assert rules.problems(save(notebook, page, stamped=False)) == []
    notebook.cells[2].source = "SEED + 2"
    found = rules.problems(save(notebook, page, stamped=False))
    assert ["the code was changed" in problem for problem in found] == [True]

    notebook.metadata.pop(rules.STAMP)
    assert rules.problems(save(notebook, page, stamped=False)) == ["no stamp: run `make notebooks`"]


def test_unreadable_files_are_problems_with_a_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{")
    assert ["not a readable notebook" in problem for problem in rules.problems(broken)] == [True]
    assert ["there is no notebook" in problem for problem in rules.problems(tmp_path / "no.ipynb")] == [True]
    (tmp_path / "half.failed.ipynb").write_text("{}")
    with pytest.raises(InputError, match="no notebook in"):
        rules.find_notebooks(tmp_path / "elsewhere")


# ---- scrubbing and executing -------------------------------------------------------------------------------


def test_scrub_removes_the_machine_and_keeps_warnings(tmp_path: Path) -> None:
    notebook = good_notebook()
    notebook.metadata["papermill"] = {"input_path": "x"}
    cell = notebook.cells[2]
    cell.metadata = {"papermill": {"duration": 1}, "tags": [], "execution": {"t": 1}}
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "HBox()"}
    bar = "\r 40%|####      | 4/10 [00:01<00:02, 3.1it/s]\r100%|##########| 10/10 [00:03<00:00]\n"
    cell.outputs += [
        new_output("display_data", data=widget),
        new_output("stream", name="stderr", text=bar),
        new_output("stream", name="stderr", text="UserWarning: small sample\n"),
        new_output("stream", name="stdout", text=f"{tmp_path / 'results' / 'a.csv'} and {Path.home()}"),
    ]
    notebooks.scrub(notebook, tmp_path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert dict(cell.metadata) == {}
    assert notebook.cells[1].metadata == {"tags": ["parameters"]}
    texts = [output.get("text") for output in cell.outputs[1:]]
    assert texts == ["UserWarning: small sample\n", f"{Path('results', 'a.csv')} and ~"]


@pytest.mark.parametrize(
    ("home", "text", "shown"),
    [
        ("/", "1/2 of /data/x", "1/2 of /data/x"),
        ("/home/ann", "/home/anna/x, /home/ann-b, /home/ann.", "/home/anna/x, /home/ann-b, ~."),
        ("/home/ann", "'/home/ann/x' and (/home/ann)", "'~/x' and (~)"),
    ],
)
def test_only_the_home_folder_itself_becomes_a_tilde(home: str, text: str, shown: str, monkeypatch) -> None:
    monkeypatch.setenv("HOME", home)
    notebook = good_notebook()
    notebook.cells[2].outputs.append(new_output("stream", name="stdout", text=text))
    notebooks.scrub(notebook, Path("/"))
    assert notebook.cells[2].outputs[-1].text == shown


def runnable(source: str) -> nbformat.NotebookNode:
    notebook = good_notebook()
    notebook.cells[2].source = source
    for cell in notebook.cells[1:3]:
        cell.execution_count, cell.outputs = None, []
    return notebook


def test_write_executes_in_place_and_passes_the_check(page: Path, monkeypatch, capsys) -> None:
    source = (
        "import base64\nfrom pathlib import Path\nfrom IPython.display import Image, display\n"
        f"assert Path.cwd().name == 'notebooks'\nprint(SEED, RATES)\n"
        f'display(Image(base64.b64decode("{PIXEL}")), metadata={TOLD})'
    )
    save(runnable(source), page, stamped=False)
    monkeypatch.chdir(page.parent.parent)
    Path("docs", "thumbnails").mkdir(parents=True)
    assert notebooks.main(["check"]) == 1  # no outputs, no stamp
    assert notebooks.main(["write"]) == 0, capsys.readouterr().out
    notebook = nbformat.read(page, as_version=4)
    assert notebook.cells[2].outputs[0].text == "0 [-1, 0.5]\n"
    assert Path("docs", "thumbnails", "page.png").read_bytes().startswith(b"\x89PNG")
    stamp = notebook.metadata[rules.STAMP]
    assert stamp["parameters"]["PRESET"] == "mini"
    assert stamp["device"].startswith("cpu")
    assert stamp["versions"]["python"].startswith("3.")
    assert len(stamp["code_sha256"]) == len(stamp["data_sha256"]) == 64


def test_a_failing_notebook_is_left_untouched_and_named(page: Path, monkeypatch, capsys) -> None:
    save(runnable("raise RuntimeError('no features yet')"), page, stamped=False)
    before = page.read_bytes()
    monkeypatch.chdir(page.parent.parent)
    assert notebooks.main(["write"]) == 2
    told = capsys.readouterr().err
    assert "page.ipynb stopped in code cell 2: RuntimeError: no features yet" in told
    assert page.read_bytes() == before
    assert page.with_name("page.failed.ipynb").is_file()
    assert rules.find_notebooks(page.parent) == [page]
