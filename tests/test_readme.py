"""Every command, every line of Python and every link of README.md is run or checked.

Commands in ``bash`` blocks are sorted by what runs them: `.ci/run` (make targets), the test marked `readme`
(what starts with ``itemkit`` or ``python``), or nothing, with a reason. A command that fits none of these
fails the quick test, so the README cannot drift.

The README may use these names as a reader's own data: ``photos/`` (with ``photos/real`` and ``photos/fake``)
and ``photo.jpg``; the test makes them. It may also read what is committed, e.g. ``data/mini``.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from PIL import ImageFilter

from itemkit.doctor import photo_cases

REPO = Path(__file__).resolve().parents[1]
README = REPO / "README.md"

NOT_RUN = {
    r"git clone \S+( \S+)?|cd \S+": "gets the checkout in which the tests run",
    r"make notebooks": "writes the committed notebooks; CI executes the same ones through `make run`",
    r"make lab|make lab-check": "takes long; tests/minilab runs its parts at a small size",
    r"make": "lists the targets: tests/test_project.py",
    r"make clean": "would remove what other tests have made",
    r"conda env create -f environment\.yml|conda activate itemkit": "tests/test_project.py compares the pins",
    r"(source|\.) \.venv/bin/activate": "the tests run inside the environment",
    r"(\S*pip|python -m pip) install .*": "the Makefile's own command, run by CI",
    r"(\.venv/bin/)?jupyter lab.*": "a server that waits for a reader",
    r"(\.venv/bin/)?itemkit download .*": "needs a model hub",
}
OWN_PROGRAMS = r"(?:\.venv/bin/)?(?:itemkit|python3?)\b"


def blocks(*languages: str) -> list[str]:
    """Fenced blocks of some languages, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands() -> list[str]:
    """Commands of all shell blocks: prompts, comments and continued lines are taken apart."""
    found = []
    for block in blocks("bash", "sh", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#\s.*$", "", line).strip().removeprefix("$ ")
            if line and not line.startswith("#"):
                found += [part.strip() for part in line.split("&&")]
    return found


def reason_not_to_run(command: str) -> str | None:
    return next((reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def made_by(command: str) -> set[str]:
    """Targets of a make command, without its variables."""
    return {word for word in command.split()[1:] if "=" not in word}


def ci_targets() -> set[str]:
    lines = re.findall(r"\bmake ([a-z -]+)", (REPO / ".ci" / "run").read_text())
    return {target for line in lines for target in line.split()}


@cache
def help_of(*program: str) -> str:
    """Help text of an itemkit command."""
    done = subprocess.run(
        [sys.executable, "-m", "itemkit", *program, "--help"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_shows_the_two_commands() -> None:
    assert {"make run", "make test"} <= set(commands())


def test_every_command_is_run_somewhere() -> None:
    rest = [c for c in commands() if reason_not_to_run(c) is None and not re.match(OWN_PROGRAMS, c)]
    unknown = [c for c in rest if not (c.startswith("make ") and made_by(c) <= ci_targets())]
    assert unknown == [], "run by no test and not by CI"


def test_every_make_target_exists() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    used = {target for command in commands() if command.startswith("make ") for target in made_by(command)}
    assert used <= set(phony.group(1).split())


def test_every_itemkit_command_and_option_exists() -> None:
    for command in commands():
        if not re.match(r"(?:\.venv/bin/)?itemkit ", command):
            continue
        words = shlex.split(command)[1:]
        text = help_of(words[0])
        missing = [word for word in words if word.startswith("--") and word.partition("=")[0] not in text]
        assert missing == [], command


def test_every_module_and_path_that_is_named_exists() -> None:
    text = README.read_text()
    modules = set(re.findall(r"python3? -m ((?:minilab|tools|benchmarks|itemkit)[\w.]*)", text))
    paths = [REPO / name.replace(".", "/") for name in modules]
    assert [p for p in paths if not (p.with_suffix(".py").is_file() or (p / "__main__.py").is_file())] == []
    for name in re.findall(r"`(itemkit\.\w+)`", text):
        assert (REPO / f"{name.replace('.', '/')}.py").is_file(), name


def test_python_blocks_compile() -> None:
    for number, block in enumerate(blocks("python"), start=1):
        compile(block, f"README.md, Python block {number}", "exec")


def test_links_and_figures_exist() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", README.read_text())
    local = [one or two for one, two in targets if not (one or two).startswith(("http", "#", "mailto:"))]
    assert local, "the first screen shows a figure"
    assert [name for name in local if not (REPO / name.partition("#")[0]).exists()] == []
    assert [name for name in local if name.endswith((".png", ".svg"))], "the first screen shows a figure"


def test_every_notebook_is_in_the_table() -> None:
    text = README.read_text()
    notebooks = sorted(path.name for path in (REPO / "notebooks").glob("*.ipynb"))
    assert notebooks and [name for name in notebooks if name not in text] == []


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with a reader's images, in which the README's commands are typed."""
    photos = [case.image for case in photo_cases()]
    for label in ("real", "fake"):
        (tmp_path / "photos" / label).mkdir(parents=True)
    for number in range(280):  # 5 % false positives takes 19 calibration reals, of 15 % and half of those
        image = photos[number % len(photos)]
        left, top = (number * 37) % (image.width - 128), (number * 53) % max(image.height - 128, 1)
        crop = image.crop((left, top, left + 128, top + 128))
        crop.save(tmp_path / "photos" / "real" / f"{number:02}.jpg", quality=90)
        fake = crop.filter(ImageFilter.GaussianBlur(2)).quantize(16).convert("RGB")
        fake.save(tmp_path / "photos" / "fake" / f"{number:02}.jpg", quality=90)
    photos[0].save(tmp_path / "photo.jpg")
    for name in ("data", "notebooks", "benchmarks", "README.md"):
        (tmp_path / name).symlink_to(REPO / name)
    return tmp_path


def at_desk(desk: Path, command: list[str]) -> None:
    """Run a command with the environment's programs in front, and itemkit importable from the checkout."""
    programs = desk / "bin"
    programs.mkdir(exist_ok=True)
    itemkit = programs / "itemkit"
    itemkit.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m itemkit "$@"\n')
    itemkit.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(REPO),
    }
    done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.readme
def test_the_commands_work_in_order(desk: Path) -> None:
    own = [c for c in commands() if re.match(OWN_PROGRAMS, c) and reason_not_to_run(c) is None]
    assert own, "the README shows no itemkit command"
    for command in own:
        at_desk(desk, ["bash", "-c", command.removeprefix(".venv/bin/")])
    # it may use what the commands have made
    at_desk(desk, [sys.executable, "-c", "\n".join(blocks("python"))])
