"""`import itemkit` is quick and silent, and torchvision works beside a CPU-only torch."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import itemkit
from itemkit import _torchvision


def run(code: str, repo) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo)


def test_import_loads_nothing_and_prints_nothing(repo) -> None:
    heavy = ("torch", "torchvision", "numpy", "pandas", "spacy", "transformers", "open_clip", "matplotlib")
    done = run(f"import sys, itemkit; print([m for m in {heavy} if m in sys.modules])", repo)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_asking_for_torchvision_loads_no_torch(repo) -> None:
    code = (
        "import sys, itemkit, importlib.util; assert importlib.util.find_spec('torchvision') is not None;"
        "print('torch' in sys.modules, itemkit._torchvision.status)"
    )
    assert run(code, repo).stdout == "False \n"


def test_torchvision_and_its_users_import(repo) -> None:
    code = (
        "import itemkit, torchvision, open_clip, timm\n"
        "from transformers import BlipForConditionalGeneration, BlipProcessor\n"
        "from torchvision.transforms import Resize; from PIL import Image\n"
        "print(Resize(8)(Image.new('RGB', (16, 16))).size, itemkit._torchvision.status)"
    )
    done = run(code, repo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(8, 8) ") and done.stdout.strip()[7:] in ("", _torchvision.REPAIRED)


@pytest.fixture
def torch_double(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A torch whose library loading can be made to fail, and which counts what was defined."""
    defined: list[str] = []
    double = types.SimpleNamespace(defined=defined, fails=False, present=False)

    class Library:
        def __init__(self, name: str, kind: str) -> None:
            assert (name, kind) == ("torchvision", "DEF")

        def define(self, schema: str) -> None:
            defined.append(schema.split("(")[0])
            double.present = True

    def load_library(path: str) -> None:
        if double.fails:
            raise OSError("libcudart.so.13: cannot open shared object file")

    class Operators:
        def __getattr__(self, name: str):
            if double.present:
                return object()
            raise AttributeError(name)

    module = types.ModuleType("torch")
    module.ops = types.SimpleNamespace(load_library=load_library, torchvision=Operators())
    module.library = types.SimpleNamespace(Library=Library)
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setattr(_torchvision, "status", "")
    monkeypatch.setattr(_torchvision, "_library", None)
    return double


def test_whole_torchvision_is_left_alone(torch_double, tmp_path) -> None:
    (tmp_path / "_C.so").touch()
    _torchvision.repair(tmp_path)
    assert torch_double.defined == [] and _torchvision.status == ""


def test_missing_operators_are_defined_once(torch_double, tmp_path) -> None:
    (tmp_path / "_C.so").touch()
    torch_double.fails = True
    _torchvision.repair(tmp_path)
    _torchvision.repair(tmp_path)
    assert torch_double.defined == ["nms", "qnms"] and _torchvision.status == _torchvision.REPAIRED
    assert _torchvision._library is not None  # a collected Library would take its definitions along


def test_operators_defined_by_somebody_else_stay(torch_double, tmp_path) -> None:
    torch_double.present = True
    _torchvision.repair(tmp_path)
    assert torch_double.defined == []


def test_rooms_are_found_by_attribute_and_others_are_not() -> None:
    assert itemkit.schema.FAKE == 1
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        itemkit.nonsense  # noqa: B018
