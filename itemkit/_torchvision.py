"""Lets ``import torchvision`` succeed beside a CPU-only torch.

The torchvision wheel of the package index is built for CUDA. Beside a CPU-only torch its library ``_C``
cannot be loaded, so the operators ``nms`` and ``qnms`` are never registered, and ``import torchvision``
(with it open_clip, timm and half of transformers) stops with ``operator torchvision::nms does not exist``.
Once the two *schemas* are defined, the transforms that the model libraries want work as usual;
``torchvision.ops.nms`` and ``torchvision.io``, which itemkit does not use, stay unusable.

The repair waits for the first import of torchvision, so ``import itemkit`` loads no torch. Where torchvision
is whole, nothing is changed.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

REPAIRED = "torchvision has no compiled operators here (CUDA wheel beside CPU torch); import repaired"
_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: Any = None  # a torch.library.Library takes its definitions along when it is collected: keep it
status = ""  # what was done in this process, for `doctor`


class _Finder:
    """Meta-path finder that only ever answers for the name ``torchvision``."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or spec.origin is None:
            return None
        # Wrapped at exec_module, not done here: `importlib.util.find_spec("torchvision")`, a mere question
        # whether it is installed, must not load torch.
        loader, folder = spec.loader, Path(spec.origin).parent
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            repair(folder)
            original(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the finder in place; does nothing when torchvision is imported already or the finder is there."""
    if "torchvision" not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def repair(folder: Path) -> None:
    """Define the two operator schemas if the own library of torchvision, in ``folder``, cannot be loaded."""
    global _library, status
    import torch

    for library in folder.glob("_C.*"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(library))
            return
    if not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _MISSING_SCHEMAS:
            _library.define(schema)
    status = REPAIRED
