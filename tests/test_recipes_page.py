"""Every block of docs/recipes.md is run, in order, as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import ImageFilter

from itemkit.doctor import photo_cases

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "recipes.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_blocks_are_short_enough_to_copy() -> None:
    lengths = [len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS]
    assert len(BLOCKS) > 12 and max(lengths) <= 8


def test_options_of_the_command_line_exist() -> None:
    for command, words in re.findall(r"`itemkit (\w+) ([^`]*)`", PAGE):
        shown = subprocess.run(
            [sys.executable, "-m", "itemkit", command, "--help"], capture_output=True, text=True, cwd=REPO
        ).stdout
        assert [word for word in re.findall(r"--[\w-]+", words) if word not in shown] == []


def test_every_block_runs(tmp_path: Path) -> None:
    photo = photo_cases()[0].image
    for label in ("real", "fake"):
        (tmp_path / "photos" / label).mkdir(parents=True)
    for i in range(24):
        left, top = (i * 37) % (photo.width - 64), (i * 53) % max(photo.height - 64, 1)
        crop = photo.crop((left, top, left + 64, top + 64))
        crop.save(tmp_path / "photos" / "real" / f"{i:02}.png")
        crop.filter(ImageFilter.GaussianBlur(2)).save(tmp_path / "photos" / "fake" / f"{i:02}.png")
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "\n".join(BLOCKS)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    assert (tmp_path / "report.html").is_file() and (tmp_path / "exported" / "embeddings.npz").is_file()
