"""What a GPU computes is what the CPU computes: each step, the store, the heads; and what a full one does.

Without a CUDA device the tests skip. With ITEMKIT_TEST_DEVICE=cpu they hold the CPU against itself, which
shows that they run and that bfloat16 keeps its tolerances, and nothing about a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from itemkit.captions import load_captioner
from itemkit.encoder import Encoder, load_encoder
from itemkit.extraction import extract
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.models import Models
from itemkit.network import TrainedHead
from itemkit.presets import Preset, get_preset
from itemkit.steps import Steps
from itemkit.store import load_features
from itemkit.workflow import detect

import models as folders

DEVICE = os.environ.get("ITEMKIT_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="needs a CUDA device (ITEMKIT_TEST_DEVICE=cpu holds the CPU against itself)",
    ),
]
# largest cosine distance of an embedding from the CPU's in float32
CLOSE = {"float32": 1e-5, "bfloat16": 1e-3}
CAPTIONS = ("a red ball on the grass", "a blue cup and a green dog", "the sky", "a red cube in the sand")
WRITERS: dict[str, Callable[[Path], Path]] = {
    "clip": folders.write_tiny_clip,
    "blip": folders.write_tiny_blip,
    "blip2": folders.write_tiny_blip2,
    "git": folders.write_tiny_git,
    "vit_gpt2": folders.write_tiny_vit_gpt2,
    "owlv2": folders.write_tiny_owlv2,
    "grounding_dino": folders.write_tiny_grounding_dino,
    "object_detector": folders.write_tiny_object_detector,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a small random model, by name."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else WRITERS[name](root / name)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Twelve pictures of several sizes, with captions."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i:02d}.png" for i in range(12)]
    for i, path in enumerate(paths):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((64 + 8 * (i % 3), 56), Image.Resampling.BICUBIC).save(path)
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(len(paths))]
    return pd.DataFrame({"path": list(map(str, paths)), "label": [0, 1] * 6, "caption": captions})


def pictures(manifest: pd.DataFrame) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in manifest["path"]]


class Nouns:
    """Parts of a caption between its small words."""

    version = "1"

    def objects(self, captions: list[str]) -> list[list[str]]:
        parts = [text.replace(" on ", " and ").replace(" in ", " and ").split(" and ") for text in captions]
        return [list(dict.fromkeys(part)) for part in parts]


def distance(a: Any, b: Any) -> float:
    """Largest cosine distance of the rows of two arrays."""
    a, b = (np.asarray(x.cpu() if hasattr(x, "cpu") else x, dtype=np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float((1 - (a * b).sum(-1) / norms).max())


@pytest.mark.parametrize("precision", CLOSE)
def test_toy_embeddings(model: Callable, manifest: pd.DataFrame, precision: str) -> None:
    here = load_encoder(model("clip"), device="cpu", precision="float32")
    there = load_encoder(model("clip"), device=DEVICE, precision=precision)
    pixels = torch.stack([here.preprocess(image) for image in pictures(manifest)])
    expected, found = (encoder.encode_images(pixels, patches=True) for encoder in (here, there))
    assert found.pooled.device.type == DEVICE and found.pooled.dtype is torch.float32
    assert distance(found.pooled, expected.pooled) <= CLOSE[precision]
    assert distance(found.patches, expected.patches) <= CLOSE[precision]
    assert distance(there.encode_texts(CAPTIONS), here.encode_texts(CAPTIONS)) <= CLOSE[precision]
    # bytes are normalised where they are
    small = torch.stack([torch.from_numpy(here.resize(i)).permute(2, 0, 1) for i in pictures(manifest)])
    assert distance(there.encode_images(small).pooled, expected.pooled) <= CLOSE[precision]


def features(
    model: Callable, manifest: pd.DataFrame, out: Path, name: str, device: str, precision: str
) -> Features:
    """Extract with a localiser on a device."""
    options = {"model": str(model(name)), "threshold": 0.0} if name in WRITERS else {}
    preset = Preset(
        name="test", about="", captioner=None, encoder=str(model("clip")), parser=Nouns(), localiser=name,
        localiser_options=options, precision=precision,
    )  # fmt: skip
    extract(manifest, out, preset.build(device), captions="user", progress=False)
    return load_features(out)


@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize(
    "localiser", ["whole", "grid", "dense", "owlv2", "grounding_dino", "object_detector"]
)
def test_extraction(model, manifest, tmp_path, localiser: str, precision: str) -> None:
    expected = features(model, manifest, tmp_path / "a", localiser, "cpu", "float32")
    found = features(model, manifest, tmp_path / "b", localiser, DEVICE, precision)
    assert found.table["caption"].tolist() == expected.table["caption"].tolist()
    assert found.objects["phrase"].tolist() == expected.objects["phrase"].tolist()
    assert found.objects["found"].tolist() == expected.objects["found"].tolist()
    for name in ("image_emb", "caption_emb", "phrase_emb"):
        assert distance(getattr(found, name), getattr(expected, name)) <= CLOSE[precision]
    corners = ["x0", "y0", "x1", "y1"]
    off = np.abs(found.objects[corners].to_numpy() - expected.objects[corners].to_numpy()).max(axis=1)
    same = off < 1e-2
    # of two regions that are nearly as good, rounding may choose the other
    assert same.mean() >= (0.95 if precision == "float32" else 0.6)
    assert distance(found.region_emb[same], expected.region_emb[same]) <= CLOSE[precision]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["blip", "blip2", "git", "vit_gpt2"])
def test_captions(model: Callable, manifest: pd.DataFrame, name: str, beams: int) -> None:
    options = {"precision": "float32", "max_new_tokens": 8, "num_beams": beams}
    expected, found = (
        load_captioner(model(name), device, **options).caption(pictures(manifest))
        for device in ("cpu", DEVICE)
    )
    assert [caption.text for caption in found] == [caption.text for caption in expected]  # token by token
    scores = [[caption.logprob for caption in captions] for captions in (found, expected)]
    np.testing.assert_allclose(*scores, atol=1e-3)


def examples(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    return (rng.standard_normal((n, 8)) + 0.8 * y[:, None]).astype(np.float32), y


@pytest.mark.parametrize("members", [1, 3])
def test_toy_head_trained_there_and_used_here(tmp_path: Path, members: int) -> None:
    (x, y), (x_test, _) = examples(300, 0), examples(100, 1)
    options = {"members": members, "max_epochs": 6, "dropout": 0.0, "validation_fraction": 0}
    here, there = (MisalignmentMLP(device=d, **options).fit(x, y) for d in ("cpu", DEVICE))
    assert next(there.net_.parameters()).device.type == DEVICE
    scores = there.decision_function(x_test)
    # the same starts and the same batches
    np.testing.assert_allclose(scores, here.decision_function(x_test), atol=1e-2)
    loaded = TrainedHead.load(there.trained().save(tmp_path), device="cpu")
    assert (
        next(loaded.net_.parameters()).device.type == "cpu"
        and "cuda" not in (tmp_path / "head.json").read_text()
    )
    np.testing.assert_allclose(loaded.decision_function(x_test), scores, atol=1e-4)


@pytest.mark.parametrize(("first", "then"), [("cpu", DEVICE), (DEVICE, "cpu")])
def test_toy_store_begun_on_one_and_continued_on_the_other(tmp_path, manifest, first: str, then: str) -> None:
    mini = replace(get_preset("mini"), localiser="dense")
    extract(manifest[:6], tmp_path / "both", mini, device=first, progress=False)
    report = extract(manifest, tmp_path / "both", mini, device=then, progress=False)
    assert (report.reused, report.computed, report.errors) == (6, 6, 0)
    extract(manifest, tmp_path / "one", mini, device="cpu", progress=False)
    found, expected = load_features(tmp_path / "both"), load_features(tmp_path / "one")
    assert found.table["caption"].tolist() == expected.table["caption"].tolist()
    for name in ("image_emb", "caption_emb", "region_emb"):
        assert distance(getattr(found, name), getattr(expected, name)) <= CLOSE["float32"]


class Full:
    """An encoder that needs a fifth of the device's memory for each image."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.sizes = encoder, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode_images(self, pixels: torch.Tensor, patches: bool = False) -> Any:
        self.sizes.append(len(pixels))
        if DEVICE == "cuda":
            share = torch.cuda.get_device_properties(DEVICE).total_memory // 5
            torch.empty(share * len(pixels), dtype=torch.uint8, device=DEVICE)
        elif len(pixels) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return self.encoder.encode_images(pixels, patches=patches)


def test_toy_batches_are_halved_when_the_device_is_full(model, manifest, tmp_path, capsys) -> None:
    encoder = Full(load_encoder(model("clip"), device=DEVICE, precision="float32"))
    report = extract(manifest, tmp_path, Models(encoder), captions="user", batch_size=8, progress=False)
    assert (report.computed, report.errors) == (12, 0)
    assert encoder.sizes[0] == 8 and max(encoder.sizes[-2:]) <= 4
    assert "out of memory in 'image': batch size 8 -> 4" in capsys.readouterr().err
    expected = features(model, manifest, tmp_path / "whole", "whole", "cpu", "float32")
    assert distance(load_features(tmp_path).image_emb, expected.image_emb) <= CLOSE["float32"]


def test_verdicts(manifest: pd.DataFrame) -> None:
    paths = manifest["path"].tolist()[:3]
    expected, found = (list(detect(paths, device=device)) for device in ("cpu", DEVICE))
    for there, here in zip(found, expected, strict=True):
        assert there["caption"] == here["caption"] and there["verdict"] == here["verdict"]
        assert there["p_fake"] == pytest.approx(here["p_fake"], abs=1e-3)


def test_nothing_waits_for_the_image_tower(manifest: pd.DataFrame) -> None:
    """The features of a batch do not depend on what was asked of the device in between."""
    steps = Steps(get_preset("mini").build(DEVICE))
    images = pictures(manifest)
    expected = steps(images[:6]).image_emb
    first, second = (steps.in_two(part) for part in (images[:6], images[6:]))
    next(first), next(second)
    assert distance(next(first).image_emb, expected) <= CLOSE["float32"]
