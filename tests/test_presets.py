"""Presets: names, overrides, true-format folders end to end, and failure in seconds without a network."""

from __future__ import annotations

import models  # first: it repairs the torchvision import

# isort: split

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from itemkit.errors import InputError, ModelNotFound
from itemkit.models import LOCALISERS
from itemkit.presets import PRESETS, get_preset, mini_folder
from itemkit.regions import make_localiser
from itemkit.steps import Steps


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `itemkit download --to` writes it."""
    root = tmp_path_factory.mktemp("fetched")
    models.write_tiny_clip(root / "encoder")
    models.write_tiny_blip(root / "captioner")
    models.write_tiny_parser(root / "parser")
    models.write_tiny_grounding_dino(root / "detector")
    return root


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty hub cache, and an error for whoever opens a connection."""
    from huggingface_hub import constants

    def refuse(*args: object) -> None:
        raise AssertionError("a loader opened a network connection")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", PRESETS)
def test_build_from_a_folder(name: str, fetched: Path, offline: None) -> None:
    other = {"localiser": "grid"} if name == "mini" else {}  # its object detector is nowhere else
    preset = get_preset(name, folder=fetched, precision="float32", **other)
    parts = preset.build("cpu")
    image = Image.new("RGB", (60, 40), "#40a060")
    caption = parts.captioner.caption([image])[0]
    phrases = ["red ball", "grass"]
    pixels = torch.stack([parts.encoder.preprocess(image)])
    embedding = parts.encoder.encode_images(pixels, patches=parts.localiser.needs_patches)
    regions = parts.localiser.locate(
        [image], embedding, parts.encoder.encode_texts(phrases), torch.tensor([0, 0]), phrases=phrases
    )
    assert isinstance(caption.text, str) and regions.boxes.shape == (2, 4)
    assert parts.parser.objects(["a red ball on the grass"])[0]
    fingerprint = parts.fingerprint()
    assert list(fingerprint) == ["captioner", "parser", "encoder", "localiser", "captions"]
    assert json.loads(json.dumps(fingerprint)) == fingerprint == preset.fingerprint()
    assert preset.fingerprint("user", "cpu") == parts.fingerprint("user")
    assert fingerprint["captioner"]["decoding"]["num_beams"] == (3 if name == "paper" else 1)


@pytest.mark.parametrize("name", ["fast", "paper"])
def test_offline_failure_takes_seconds_and_says_what_to_do(name: str, offline: None) -> None:
    started = time.perf_counter()
    with pytest.raises(ModelNotFound) as caught:
        get_preset(name).build("cpu")
    assert time.perf_counter() - started < 20
    text = str(caught.value)
    for part in ("captioner 'Salesforce/blip", "parser 'en_core_web_sm'", "encoder 'ViT-"):
        assert part in text
    assert text.count("Fetch what is missing once") == 1 and f"`itemkit download --preset {name}`" in text
    assert len(text) < 1000
    assert caught.value.__cause__ is None  # a notebook shows every link of a chain


def test_a_folder_of_models_can_be_named_outside(fetched: Path, offline: None, monkeypatch) -> None:
    monkeypatch.setenv("ITEMKIT_MODELS", str(fetched))
    assert get_preset("paper") == get_preset("paper", folder=fetched)
    assert get_preset("mini").encoder == str(mini_folder() / "models" / "clip")
    monkeypatch.setenv("ITEMKIT_MODELS", "/nowhere")
    with pytest.raises(
        ModelNotFound, match="no folder of models at /nowhere.*itemkit download --preset paper"
    ):
        get_preset("paper")


def test_missing_mini_models_name_their_own_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path))
    assert mini_folder() == tmp_path / "mini"
    expected = r"captioner .*parser .*encoder .*`git checkout data/mini` brings.*ITEMKIT_DATA"
    with pytest.raises(ModelNotFound, match=expected) as caught:
        get_preset("mini").build("cpu")
    assert "itemkit download" not in str(caught.value)


def test_an_installed_package_carries_the_mini_models(tmp_path: Path, repo: Path) -> None:
    """Beside an installed package there is no checkout: no advice that needs one."""
    shutil.copytree(
        repo / "itemkit", tmp_path / "itemkit", ignore=shutil.ignore_patterns("data", "__pycache__")
    )
    code = "from itemkit import presets as p; print(p.mini_folder(), p.MINI_REMEDY)"

    def run() -> str:
        env = {key: value for key, value in os.environ.items() if key != "ITEMKIT_DATA"}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=True
        ).stdout

    assert "git checkout" not in run() and "pip install" in run()
    (tmp_path / "itemkit" / "data" / "mini").mkdir(parents=True)
    assert run().startswith(str(tmp_path / "itemkit" / "data" / "mini"))


class Part:
    """Stands for any of the models."""

    caption = preprocess = encode_images = encode_texts = count_tokens = print

    def fingerprint(self) -> dict:
        return {"kind": "mine"}


def test_parts_can_be_objects_or_left_out(offline: None) -> None:
    mine = Part()
    preset = get_preset("paper", captioner=mine, encoder=mine, parser=None, localiser=None)
    parts = preset.build("cpu")
    assert parts.captioner is mine and parts.encoder is mine
    assert (
        parts.fingerprint()
        == {
            "captioner": {"kind": "mine"},
            "parser": None,
            "encoder": {"kind": "mine"},
            "localiser": None,
            "captions": "generate",
        }
        == preset.fingerprint()
    )
    assert json.loads(json.dumps(preset.record()))["captioner"] == "Part"


def test_replaced_part_starts_from_its_own_options() -> None:
    preset = get_preset("paper", localiser="whole", encoder="./clip")
    assert preset.localiser_options == {} and preset.encoder_pretrained is None
    assert preset.captioner_options == PRESETS["paper"].captioner_options
    kept = get_preset("paper", captioner="./blip", captioner_options={"num_beams": 2})
    assert kept.captioner_options == {"num_beams": 2}
    assert get_preset("fast", encoder="ViT-B-16", encoder_pretrained="openai").encoder_pretrained == "openai"


def test_a_detector_put_in_by_name_knows_its_model(fetched: Path, offline: None) -> None:
    preset = get_preset("paper", folder=fetched, localiser="grounding_dino")
    assert preset == get_preset("paper", folder=fetched)
    assert preset.find()["localiser"].path == fetched / "detector"
    found = get_preset("paper", localiser="owlv2").find()["localiser"]
    assert isinstance(found, ModelNotFound) and "object detector 'google/owlv2" in str(found)
    kept = get_preset("fast", localiser="owlv2", localiser_options={"threshold": 0.2, "model": "./owl"})
    assert kept.localiser_options == {"threshold": 0.2, "model": "./owl"}
    dino = get_preset("paper", localiser_options={"threshold": 0.3})
    assert dino.by_name()["localiser"] == "IDEA-Research/grounding-dino-base"


def test_each_preset_has_an_object_detector_put_in_by_name(
    tmp_path: Path, offline: None, monkeypatch
) -> None:
    fast, paper = (get_preset(name, localiser="object_detector") for name in ("fast", "paper"))
    assert fast.by_name()["localiser"] == "PekingU/rtdetr_v2_r18vd"
    assert paper.by_name()["localiser"] == "PekingU/rtdetr_v2_r101vd"
    assert "itemkit download --preset fast --localiser object_detector`" in str(fast.find()["localiser"])
    assert get_preset("fast", folder=tmp_path, localiser="object_detector").by_name()["localiser"] == str(
        tmp_path / "detector"
    )
    # mini has one of its own, whether it is named before or after
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "models").symlink_to(mini_folder() / "models")
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path))
    mini = get_preset("mini", localiser="object_detector", captioner=None)
    assert mini == get_preset(get_preset("mini"), localiser="object_detector", captioner=None)
    place = tmp_path / "mini" / "models" / "object_detector"
    assert mini.by_name()["localiser"] == str(place)
    if not place.is_dir():
        assert f"{place}: no such folder). The mini models come with itemkit" in str(mini.find()["localiser"])


def test_mini_takes_its_object_detector_from_its_folder(tmp_path: Path, offline: None, monkeypatch) -> None:
    models.write_tiny_object_detector(tmp_path / "mini" / "models" / "object_detector")
    for part in ("clip", "parser"):
        (tmp_path / "mini" / "models" / part).symlink_to(mini_folder() / "models" / part)
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path))
    options = {"threshold": 0.0, "boxes": "union"}
    preset = get_preset("mini", localiser="object_detector", localiser_options=options, captioner=None)
    parts = preset.build("cpu")
    assert parts.fingerprint("user") == preset.fingerprint("user")
    said = parts.fingerprint("user")["localiser"]
    assert (said["name"], said["precision"], said["boxes"]) == ("object_detector", "float32", "union")
    features = Steps(parts)([Image.new("RGB", (48, 48))], ["a red ball on the grass"])
    found = dict(zip(features.objects["phrase"], features.objects["found"], strict=True))
    assert found == {"a red ball": True, "the grass": False}
    with pytest.raises(InputError, match="localiser 'object_detector' has no option 'thresh'"):
        preset.replace(localiser_options={"thresh": 0.5})


def test_a_name_may_say_which_weights(fetched: Path, offline: None) -> None:
    preset = get_preset("paper", encoder="ViT-B-16:openai", localiser=f"grounding_dino:{fetched}/detector")
    assert (preset.encoder, preset.encoder_pretrained) == ("ViT-B-16", "openai")
    assert (preset.localiser, preset.localiser_options) == (
        "grounding_dino",
        {"model": f"{fetched}/detector"},
    )
    assert preset.find()["localiser"].path == fetched / "detector"
    options = {"encoder_pretrained": "openai", "localiser_options": {"threshold": 0.2}}
    both = get_preset("fast", encoder="ViT-B-16", localiser="owlv2:some/owl", **options)
    assert both.localiser_options == {"threshold": 0.2, "model": "some/owl"}
    for whole in ("hf-hub:owner/name", "./a:b", Path("a:b"), str(fetched / "encoder")):
        preset = get_preset("paper", encoder=whole)
        assert (preset.encoder, preset.encoder_pretrained) == (whole, None)
    assert get_preset("fast", localiser="whole").localiser_options == {}


@pytest.mark.parametrize(
    ("part", "options", "hint"),
    [
        ("captioner", {"num_beam": 3}, "num_beams"),
        ("parser", {"max_object": 3}, "max_objects"),
        ("localiser", {"treshold": 0.5}, "threshold"),
    ],
)
def test_unknown_options_are_named_before_anything_is_looked_for(part: str, options: dict, hint: str) -> None:
    with pytest.raises(InputError, match=f"{part} '.*' has no option .*Did you mean '{hint}'"):
        get_preset("mini", **{f"{part}_options": options})


def test_unknown_names() -> None:
    with pytest.raises(
        InputError, match="preset 'papre' is unknown. Did you mean 'paper'. Known: mini, fast, paper"
    ):
        get_preset("papre")
    with pytest.raises(InputError, match="a preset has no field 'localizer'. Did you mean 'localiser'"):
        get_preset("mini", localizer="whole")
    with pytest.raises(
        ModelNotFound, match="no folder of models at .*nowhere.*itemkit download --preset fast --to"
    ):
        get_preset("fast", folder="nowhere")


def test_record_is_free_of_machine_paths() -> None:
    record = get_preset("mini").record()
    assert record["encoder"] == "data/mini/models/clip" and record["precision"] == "float32"
    assert str(Path.home()) not in json.dumps(get_preset("fast", encoder=Path.home() / "clip").record())


def test_wrong_device_is_told_before_anything_is_loaded(fetched: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(InputError, match="device 'cuda' was asked for"):
        get_preset("fast", folder=fetched).build("cuda")


def test_an_unknown_localiser_is_named_before_anything_is_loaded() -> None:
    with pytest.raises(
        InputError, match=r"localiser 'gird' is unknown. Did you mean 'grid'\? Known: whole, grid"
    ):
        get_preset("mini", localiser="gird")
    for name in LOCALISERS:
        assert get_preset("mini", localiser=name).localiser == name
    with pytest.raises(InputError) as known:
        make_localiser("nothing", None)  # type: ignore[arg-type]
    assert f"Known: {', '.join(LOCALISERS)}, your own" in str(known.value)
