"""itemkit: how well does an image fit its own caption, as a whole and object by object.

Importing the package loads no model, no torch and no notebook library; each room is imported when first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from itemkit import _torchvision

__version__ = "0.1.0"

_torchvision.install()


def __getattr__(name: str) -> ModuleType:
    """Import a room on first use, so that ``itemkit.presets`` works after a bare ``import itemkit``."""
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"itemkit.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"itemkit.{name}":
                raise
    raise AttributeError(f"module 'itemkit' has no attribute {name!r}")
