"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo() -> Path:
    """Root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def real_dir() -> Path:
    """Folder of real images for trials (not part of the project); skips where it is absent."""
    folder = Path(os.environ.get("ITEMKIT_REAL", REPO.parent / "shared" / "real"))
    if not (folder / "index.csv").is_file():
        pytest.skip("needs the folder of real images: set ITEMKIT_REAL to a folder with index.csv")
    return folder
