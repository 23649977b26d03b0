"""The doctor finds what is wrong and says what to do; its deep test tells working models from random ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import spacy
import torch
from packaging.requirements import Requirement
from PIL import Image

from itemkit import doctor
from itemkit import doctor as machine
from itemkit import doctor as selftest
from itemkit.doctor import FAIL, OK, WARN, Check
from itemkit.encoder import load_encoder
from itemkit.presets import PARTS, Preset

from models import write_tiny_blip, write_tiny_clip


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with random weights in the true on-disk formats."""
    root = tmp_path_factory.mktemp("models")
    spacy.blank("en").to_disk(root / "parser")
    return {
        "captioner": write_tiny_blip(root / "captioner"),
        "parser": root / "parser",
        "encoder": write_tiny_clip(root / "clip"),
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the models only; packages and devices have tests of their own."""
    monkeypatch.setattr(machine, "check_packages", lambda: iter(()))
    monkeypatch.setattr(machine, "check_devices", lambda device: iter(()))


# ---- packages


def test_package_lines() -> None:
    here = machine.metadata.version("numpy")
    fine = machine._package(Requirement("numpy>=1"), here, optional=False)
    assert (fine.status, fine.detail, fine.todo) == (OK, here, "")
    older = machine._package(Requirement("numpy>=1"), "1.26.0", optional=False)
    assert (older.status, older.detail) == (WARN, f"{here}, tested with 1.26.0")
    assert "pip install 'numpy==1.26.0'" in older.todo
    too_old = machine._package(Requirement("numpy>=99"), "99.1", optional=False)
    assert (too_old.status, too_old.detail) == (FAIL, f"{here}, needed is >=99")
    assert too_old.todo == "pip install 'numpy==99.1'"
    absent = machine._package(Requirement("no-such-package[all]>=2"), None, optional=False)
    assert (absent.status, absent.todo) == (FAIL, "pip install 'no-such-package[all]>=2'")
    assert machine._package(Requirement("no-such-package"), None, optional=True).status == OK


def test_local_builds_count_as_the_tested_release() -> None:
    torch_here = machine.metadata.version("torch")
    release = torch_here.partition("+")[0]
    assert machine._package(Requirement("torch"), release, optional=False).status == OK


def test_a_package_that_cannot_be_imported_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(machine.importlib, "import_module", broken)
    check = machine._package(Requirement("torch"), None, optional=False)
    assert check.status == FAIL
    assert "cannot be imported: libcudart.so.13" in check.detail


def test_pins_and_requirements_are_found() -> None:
    assert machine.tested_versions()["torch"].startswith("2.")
    extras = {requirement.name: extra for requirement, extra in machine.requirements()}
    assert (extras["torch"], extras["pytest"], extras["ray"]) == ("", "dev", "ray")
    names = [check.name for check in machine.check_packages()]
    assert "torch" in names and "ray" in names and "pytest" not in names


# ---- machine


def test_device_lines() -> None:
    checks = {check.name: check for check in machine.check_devices("cpu")}
    assert checks["device"].status == OK
    assert "precision 'auto' is" in checks["device"].detail
    assert f"{torch.get_num_threads()} threads" in checks["cpu"].detail
    unknown = [check for check in machine.check_devices("tpu9") if check.name == "device"]
    assert unknown[0].status == FAIL


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_a_missing_gpu_fails_only_when_asked_for() -> None:
    assert {check.status for check in machine.check_devices("auto")} <= {OK, WARN}
    assert [check.status for check in machine.check_devices("cuda")][-1] == FAIL


def test_scarce_memory_and_disk_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.check_disk(tmp_path).detail.endswith("GB free in this folder")
    monkeypatch.setattr(machine, "_available_memory_gb", lambda: 0.4)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0.1e9))
    for check in (machine.check_memory(), machine.check_disk(tmp_path)):
        assert check.status == WARN and check.todo


def test_lines_and_exit_status() -> None:
    fine, odd, bad = Check("a", OK, "1.0"), Check("b", WARN, "2.0"), Check("c", FAIL, "not here", "get it")
    assert str(fine) == "[OK]   a                  1.0"
    assert str(bad).splitlines() == ["[FAIL] c                  not here", f"{'':<26}do: get it"]
    assert [doctor.exit_status(checks) for checks in ([fine], [fine, odd], [odd, bad])] == [0, 0, 1]
    assert doctor.summary([fine, odd, bad]) == "not ready: 1 fine, 1 to look at, 1 failed"


# ---- models


def preset_of(parts: dict[str, Any], name: str = "own", localiser: Any = "grid") -> Preset:
    return Preset(name=name, about="for a test", localiser=localiser, **parts)


def test_present_models_are_named_with_path_and_hash(quick: None, model_folders: dict[str, Path]) -> None:
    seen: list[Check] = []
    checks = doctor.run_doctor(preset_of(model_folders), report=seen.append)
    assert checks == seen
    models = {check.name: check for check in checks if check.name in PARTS}
    assert {check.status for check in models.values()} == {OK}
    for name, folder in model_folders.items():
        assert folder.name in models[name].detail and "sha256 " in models[name].detail
    assert models["localiser"].detail == "'grid', works with the encoder"
    assert doctor.exit_status(checks) == 0
    # the hash is the one that the feature store records
    recorded = load_encoder(model_folders["encoder"], device="cpu").fingerprint()["weights_sha256"]
    assert models["encoder"].detail.endswith(recorded[:12])


def test_parts_left_out_or_handed_over_are_told(quick: None, model_folders: dict[str, Path]) -> None:
    parts = {**model_folders, "captioner": None, "encoder": Oracle([])}
    found = {check.name: check.detail for check in doctor.run_doctor(preset_of(parts))}
    assert (found["captioner"], found["encoder"]) == ("left out", "given as an object")


def test_missing_and_damaged_models_fail_with_a_remedy(
    quick: None, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    damaged = write_tiny_clip(tmp_path / "clip")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (damaged / "open_clip_model.safetensors").write_text(pointer)
    parts = {"captioner": "nobody/no-such-captioner", "parser": tmp_path / "nowhere", "encoder": damaged}
    checks = doctor.run_doctor(preset_of(parts, name="paper"), deep=True)
    found = {check.name: check for check in checks}
    assert [found[name].status for name in parts] == [FAIL] * 3
    assert "itemkit download --preset paper" in found["captioner"].todo
    assert "is not whole" in found["encoder"].detail
    assert found["deep test"].status == FAIL  # nothing is built from missing models
    assert doctor.exit_status(checks) == 1

    mini = preset_of({**model_folders, "encoder": tmp_path / "nowhere"}, name="mini")
    encoder = next(check for check in doctor.run_doctor(mini) if check.name == "encoder")
    assert "download" not in str(encoder) and "git checkout data/mini" in encoder.todo


def test_an_unknown_preset_is_one_line(quick: None) -> None:
    checks = doctor.run_doctor("minni")
    assert checks[-1].name == "preset" and "Did you mean 'mini'?" in checks[-1].detail
    assert doctor.exit_status(checks) == 1


# ---- the deep test


class Oracle:
    """An encoder that knows each case by heart."""

    def __init__(self, cases: list[selftest.Case]) -> None:
        self.texts = {case.caption: row for row, case in enumerate(cases)}
        self.images = {case.image.tobytes(): row for row, case in enumerate(cases)}
        self.eye = torch.eye(len(cases))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.full((3, 1, 1), float(self.images[image.tobytes()]))

    def encode_images(self, pixels: torch.Tensor, patches: bool = False) -> Any:
        return SimpleNamespace(pooled=self.eye[pixels[:, 0, 0, 0].long()], patches=None)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.eye[self.texts.get(text, 0)] for text in texts])


class Teller:
    """A captioner that says what it was told to say."""

    def __init__(self, captions: list[str]) -> None:
        self.captions = captions

    def caption(self, images: list[Image.Image]) -> list[Any]:
        return [SimpleNamespace(text=text) for text in self.captions[: len(images)]]


class Pointer:
    """A localiser that always gives the same boxes."""

    needs_patches = False

    def __init__(self, boxes: list[list[float]]) -> None:
        self.boxes = boxes

    def locate(self, images: Any, embedding: Any, phrase_emb: Any, owner: Any, phrases: Any = None) -> Any:
        assert len(phrase_emb) == len(owner) == len(phrases) == len(self.boxes)
        return SimpleNamespace(boxes=torch.tensor(self.boxes))


@pytest.fixture(scope="module")
def photos() -> list[selftest.Case]:
    return selftest.photo_cases()


def test_photographs_are_distinct_and_their_boxes_lie_inside(photos: list[selftest.Case]) -> None:
    assert len(photos) >= 10
    assert len({case.caption for case in photos}) == len(photos)
    for case in photos:
        assert case.image.mode == "RGB" and case.words
        for _, (x0, y0, x1, y1) in case.parts:
            assert 0 <= x0 < x1 <= case.image.width and 0 <= y0 < y1 <= case.image.height
    assert sum(len(case.parts) for case in photos) >= 6


def test_an_encoder_that_knows_passes(photos: list[selftest.Case]) -> None:
    outcome = selftest.ask_encoder(Oracle(photos), photos)
    assert outcome.passed and (outcome.right, outcome.total) == (len(photos), len(photos))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_weights_fail(photos: list[selftest.Case], tmp_path: Path, seed: int) -> None:
    encoder = load_encoder(write_tiny_clip(tmp_path / "clip", seed=seed), device="cpu", precision="float32")
    outcome = selftest.ask_encoder(encoder, photos)
    assert not outcome.passed
    assert outcome.right <= 4  # one in eleven is expected
    assert len(outcome.misses) == outcome.total - outcome.right
    assert "is closest to '" in outcome.misses[0]


def test_captions_are_searched_for_whole_words() -> None:
    image = Image.new("RGB", (4, 4))
    cases = [selftest.Case(str(n), image, str(n), words=("cat", "kitten")) for n in range(3)]
    outcome = selftest.ask_captioner(Teller(["A cat, asleep.", "two cattle", "a KITTEN"]), cases)
    assert (outcome.right, outcome.total, outcome.passed) == (2, 3, False)
    assert outcome.misses == ("1 is called 'two cattle', expected one of cat, kitten",)
    assert not selftest.ask_captioner(Teller([]), []).passed  # nothing asked, nothing shown


def test_the_centre_of_a_box_has_to_lie_on_the_object() -> None:
    image = Image.new("RGB", (100, 50))
    cases = [selftest.Case("a", image, "a", parts=(("left", (0, 0, 50, 50)), ("right", (50, 0, 100, 50))))]
    right = selftest.ask_localiser(Pointer([[0, 0, 40, 40], [60, 0, 100, 50]]), Oracle(cases), cases)
    assert (right.right, right.total, right.passed) == (2, 2, True)
    whole = selftest.ask_localiser(Pointer([[0, 0, 98, 50], [0, 0, 98, 50]]), Oracle(cases), cases)
    assert whole.misses == ("'right' in a is placed at (49, 25)",)


def test_deep_checks_reach_the_report(
    quick: None, model_folders: dict[str, Path], photos: list[selftest.Case]
) -> None:
    boxes = [[-9.0, -9.0, -8.0, -8.0]] * sum(len(case.parts) for case in photos)
    parts = {"captioner": Teller(["noise"] * len(photos)), "parser": None, "encoder": Oracle(photos)}
    preset = preset_of(parts, localiser=Pointer(boxes))
    found = {check.name: check for check in doctor.run_doctor(preset, deep=True, cases=lambda: photos)}
    assert found["deep encoder"].status == OK
    assert found["deep captioner"].status == FAIL and "and 8 more" in found["deep captioner"].detail
    assert found["deep localiser"].status == WARN  # not calibrated on photographs: told, not condemned


def test_models_that_cannot_be_built_are_one_line(
    quick: None, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    misfit = write_tiny_clip(tmp_path / "clip")
    config = misfit / "open_clip_config.json"
    settings = json.loads(config.read_text())
    settings["model_cfg"]["embed_dim"] *= 2
    config.write_text(json.dumps(settings))
    checks = doctor.run_doctor(preset_of({**model_folders, "encoder": misfit}), device="cpu", deep=True)
    assert (checks[-1].name, checks[-1].status) == ("deep test", FAIL)
    assert "cannot be built" in checks[-1].detail


def test_doctor_without_deep_loads_no_model() -> None:
    code = (
        "import sys, itemkit.doctor\n"
        "assert 'minilab' not in sys.modules and 'transformers' not in sys.modules, sorted(sys.modules)"
    )
    repo = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=repo, check=True)
