"""What has to hold for the repository as a whole: pins, targets, versions, and what is never committed."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

import itemkit
from itemkit import doctor as machine

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
PINS = machine.tested_versions()
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["optional-dependencies"].items()
}

# needed, but imported by no line of this project
USED_INDIRECTLY = {
    "torchvision": "open_clip's preprocessing",
    "timm": "open_clip's towers of other families",
    "ipykernel": "the kernel that executes notebooks",
    "ipywidgets": "progress bars in notebooks",
    "jupyterlab": "where a reader opens the notebooks",
    "nbclient": "papermill's engine; its version moves outputs",
}


# ---- pins


def test_environment_yml_has_the_same_pins() -> None:
    environment = yaml.safe_load((REPO / "environment.yml").read_text())
    assert "python=3.11" in environment["dependencies"]
    lines = next(entry for entry in environment["dependencies"] if isinstance(entry, dict))["pip"]
    pins = dict(line.split("==") for line in lines if "==" in line)
    optional = {requirement.name for requirement in EXTRAS["ray"]}
    assert pins == {name: version for name, version in PINS.items() if name not in optional}


@pytest.mark.parametrize("requirement", [*CORE, *EXTRAS["dev"], *EXTRAS["explore"], *EXTRAS["ray"]], ids=str)
def test_each_dependency_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.name in PINS, "not in constraints.txt"
    assert requirement.specifier.contains(PINS[requirement.name])


def test_the_tests_run_with_the_pins() -> None:
    wrong = {}
    for name in (requirement.name for requirement in [*CORE, *EXTRAS["dev"]]):
        if Version(metadata.version(name)).public != PINS[name]:
            wrong[name] = (metadata.version(name), PINS[name])
    assert wrong == {}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_imports_and_declared_dependencies_agree() -> None:
    distributions = metadata.packages_distributions()
    modules = {module for path in tracked(".py", ".ipynb") for module in third_party_imports(path)}
    imported = {normal(name) for module in modules for name in distributions.get(module, [module])}
    declared = {normal(requirement.name) for requirement in [*CORE, *sum(EXTRAS.values(), [])]}
    assert imported - declared == set(), "imported, but not in pyproject.toml"
    unused = {requirement.name for requirement in CORE if normal(requirement.name) not in imported}
    assert unused - set(USED_INDIRECTLY) == set(), "in pyproject.toml, but never imported"


def third_party_imports(path: Path) -> set[str]:
    source = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(source)["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    own = {"itemkit", "minilab", "tools", "benchmarks", "tests"}
    return found - set(sys.stdlib_module_names) - own - {test.stem for test in (REPO / "tests").glob("*.py")}


def test_versions_agree_and_numbers_changed_is_told() -> None:
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["version"] == itemkit.__version__
    sections = re.split(r"^## ", (REPO / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert sections[0].startswith(itemkit.__version__)
    assert [section.split()[0] for section in sections if "**Numbers changed**" not in section] == []


# ---- the house


PACKAGE = REPO / "itemkit"


@pytest.mark.parametrize("package", ["itemkit", "minilab"])
def test_the_map_lists_exactly_the_modules_that_exist(package: str) -> None:
    page = (REPO / package / "README.md").read_text()
    cells = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ")]
    listed = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    there = {path.stem for path in (REPO / package).glob("*.py")} - {"__init__", "__main__"}
    assert sorted(listed) == sorted(there)


def test_the_map_fits_a_screen_and_starts_with_the_flow() -> None:
    page = (PACKAGE / "README.md").read_text()
    assert len(page.splitlines()) <= 68
    assert page.index("manifest ─►") < page.index("| module |")


def test_the_package_is_thin_and_flat() -> None:
    modules = list(PACKAGE.rglob("*.py"))
    lines = sum(len(path.read_text().splitlines()) for path in modules)
    # the aim is 12,000; what people look at (card, explorer, report), attacks, object detectors, the missing
    # controls and the path to a GPU are not paid back yet
    assert lines <= 15_450
    assert {path.parent for path in modules} == {PACKAGE}
    nodes = ast.parse((PACKAGE / "__init__.py").read_text()).body
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert defined == {"__getattr__", "__dir__"}, "code has a module of its own"


def test_the_package_does_not_name_the_laboratory() -> None:
    texts = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".md", ".toml")]
    assert [path.name for path in texts if "minilab" in path.read_text()] == []


def test_every_public_name_is_there_and_others_are_told() -> None:
    assert {"detect", "extract", "represent", "Detector"} <= set(dir(itemkit))
    assert [name for name in dir(itemkit) if not hasattr(itemkit, name)] == []
    assert itemkit.presets.get_preset is itemkit.get_preset
    with pytest.raises(AttributeError, match="has no attribute 'detekt'"):
        itemkit.detekt  # noqa: B018


def test_import_is_quick_and_silent() -> None:
    code = (
        "import time; began = time.process_time(); import itemkit, sys; spent = time.process_time() - began\n"
        "print(spent < 0.3, sorted({'torch', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True []\n", "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel holds, laid out as an installation has it: nothing of the checkout is beside it."""
    wheel = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folder = tmp_path_factory.mktemp("installed")
    contents = {name: name for name in wheel["packages"]} | wheel["force-include"]
    for source, target in contents.items():
        if (REPO / source).is_dir():
            shutil.copytree(REPO / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPO / source, folder / target)
    return folder


def test_an_installation_answers_without_the_checkout(site: Path, tmp_path: Path) -> None:
    picture = io.BytesIO(pd.read_parquet(REPO / "data" / "mini" / "reals.parquet").image[0])
    Image.open(picture).save(tmp_path / "picture.png")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ITEMKIT")}
    command = [sys.executable, "-m", "itemkit", "detect", "picture.png", "--json"]
    options: dict = {"env": environment | {"PYTHONPATH": str(site)}, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert 0 <= answer["p_fake"] <= 1 and answer["caption"]


# ---- make and CI


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    ours = ("MAKEFLAGS", "MAKELEVEL", "VENV")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", *arguments, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)


def targets() -> set[str]:
    phony = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    return set(phony.group(1).split())


def test_make_lists_every_target() -> None:
    listed = re.findall(r"^  make (\S+) +\S", make().stdout, flags=re.MULTILINE)
    assert set(listed) == targets()
    assert {"run", "test", "notebooks", "lab", "lab-check", "lint", "clean"} <= set(listed)


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_creates_the_environment_when_it_is_missing(target: str, tmp_path: Path) -> None:
    plan = make("-n", target, VENV=str(tmp_path / "new")).stdout
    made, installed = plan.find("-m venv"), plan.find("-m pip install")
    assert -1 < made < installed < plan.rfind(str(tmp_path / "new" / "bin"))
    assert "-c constraints.txt" in plan


def test_make_says_what_to_do_without_python(tmp_path: Path) -> None:
    done = make("test", VENV=str(tmp_path / "new"), PYTHON="")
    assert done.returncode != 0
    assert "Python of version 3.11 or newer" in done.stdout
    assert not (tmp_path / "new").exists()


def test_ci_runs_lint_and_the_test_command() -> None:
    script = REPO / ".ci" / "run"
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert re.findall(r"\bmake ([a-z-]+)", text)[:3] == ["lint", "test", "run"]


# ---- what is committed


def tracked(*suffixes: str) -> list[Path]:
    """Files that are, or would be, committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True
    )
    if listing.returncode:
        pytest.skip("needs the git checkout, to know what is committed")
    paths = [REPO / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def texts() -> list[tuple[str, str]]:
    found = []
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" not in raw[:8192] and path.suffix != ".ipynb":  # notebooks have rules of their own
            found.append((path.relative_to(REPO).as_posix(), raw.decode("utf-8", errors="replace")))
    assert len(found) > 20
    return found


def offenders(pattern: str, only: str = "") -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts()
        if name.endswith(only)
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line)
    ]


def test_no_absolute_path_of_a_machine() -> None:
    folders = "|".join(["work", "farm", "root", "home", "Users"])
    found = offenders(rf"(?<![\w.:/])/(?:{folders})/\w")
    made_up = "/".join(["", "home", ""])  # tests may speak of somebody's home
    assert [line for line in found if not (line.startswith("tests/") and made_up in line)] == []


def test_no_registry_host() -> None:
    # written apart, so that this line is no offender itself
    hosts = ["pypi" + ".org", "python" + "hosted", "registry.npm" + "js", "download.py" + "torch"]
    assert offenders("(?i)" + "|".join(map(re.escape, hosts))) == []


def test_nothing_unfinished() -> None:
    marks = ["TO" + "DO", "FIX" + "ME", "X" + "XX", "raise NotImplemented" + "Error"]
    assert offenders(rf"\b(?:{'|'.join(marks)})\b", ".py") == []


def test_no_pickles_and_no_large_files() -> None:
    pickles = tracked(".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib")
    assert pickles == []
    sizes = {path.relative_to(REPO).as_posix(): path.stat().st_size for path in tracked()}
    assert [name for name, size in sizes.items() if size > 1_000_000 and not name.startswith("data/")] == []
    mini = [size for name, size in sizes.items() if name.startswith("data/mini/")]
    assert sum(mini) <= 40e6 and max(mini) < 10.1e6
