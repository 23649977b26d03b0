"""itemkit: how well does an image fit its own caption, as a whole and object by object.

Importing the package loads no model and no torch: a name, or a module, is fetched when it is first used.
README.md beside this file is the map.
"""

from __future__ import annotations

import importlib
from typing import Any

from itemkit import _torchvision

__version__ = "0.1.0"

_HOMES = {
    "Detector": "detector",
    "Features": "features",
    "Models": "models",
    "by_phrase": "findings",
    "compare_captions": "findings",
    "detect": "workflow",
    "extract": "extraction",
    "get_preset": "presets",
    "hardest": "findings",
    "load_features": "store",
    "read_manifest": "manifest",
    "represent": "misalignment",
    "train_detector": "workflow",
}

__all__ = ["__version__", *_HOMES]

_torchvision.install()


def __getattr__(name: str) -> Any:
    """Fetch a public name, or a module (``itemkit.presets`` after a bare ``import itemkit``)."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"itemkit.{_HOMES[name]}"), name)
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"itemkit.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"itemkit.{name}":
                raise
    raise AttributeError(f"module 'itemkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
