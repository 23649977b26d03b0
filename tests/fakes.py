"""Cheap deterministic stand-ins for the models, after the same protocols; and pictures to feed them."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from itemkit.features import ARRAYS, Features
from itemkit.models import Models

DIM = 16
COLOURS = ("red", "green", "blue")
KINDS = ("ball", "box", "cup", "dog", "tree")


def seeded(text: str, dim: int = DIM) -> np.ndarray:
    """A unit vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    x = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return x / np.linalg.norm(x)


class FakeEncoder:
    """Pools an 8 x 8 thumbnail through a fixed random matrix."""

    device = "cpu"

    def __init__(self, version: str = "1", dim: int = DIM) -> None:
        self.version, self.dim = version, dim
        self.images_encoded = 0
        self.texts_encoded: list[str] = []
        self._matrix = torch.from_numpy(
            np.random.default_rng(5).standard_normal((192, dim)).astype(np.float32)
        )

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Thumbnail, channels first, around 0."""
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32)
        return torch.from_numpy(small).permute(2, 0, 1) / 255 - 0.5

    def encode_images(self, pixels: torch.Tensor, patches: bool = False) -> Any:
        """Unit vectors; four equal "patches" per image."""
        self.images_encoded += len(pixels)
        pooled = torch.nn.functional.normalize(pixels.flatten(1) @ self._matrix + 1e-3, dim=1)
        return SimpleNamespace(pooled=pooled, patches=pooled[:, None].expand(-1, 4, -1) if patches else None)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """A unit vector per text."""
        self.texts_encoded += list(texts)
        return torch.from_numpy(np.stack([seeded(text, self.dim) for text in texts]))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Words."""
        return [len(text.split()) for text in texts]

    def fingerprint(self) -> dict:
        """Settable, to see two different encoders."""
        return {"name": "fake-encoder", "version": self.version}


class FakeCaptioner:
    """Names as many coloured things as the brightness says; pixels decide, order and batches do not."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.batches: list[int] = []

    def caption(self, images: Sequence[Image.Image]) -> list[Any]:
        """0 to 3 things per caption."""
        self.batches.append(len(images))
        time.sleep(self.delay_s * len(images))
        return [self._one(image) for image in images]

    @staticmethod
    def _one(image: Image.Image) -> Any:
        digest = hashlib.sha256(image.tobytes()).digest()
        things = [f"a {COLOURS[digest[i] % 3]} {KINDS[digest[i] % 5]}" for i in range(1, 1 + digest[0] % 4)]
        return SimpleNamespace(text=" and ".join(things) or "nothing", logprob=-digest[9] / 256)

    def fingerprint(self) -> dict:
        """Constant."""
        return {"name": "fake-captioner"}


class FakeParser:
    """Splits at "and"."""

    def objects(self, captions: Sequence[str]) -> list[list[str]]:
        """Phrases without article, once each."""
        return [
            list(dict.fromkeys(part.removeprefix("a ") for part in text.split(" and ") if part != "nothing"))
            for text in captions
        ]

    def fingerprint(self) -> dict:
        """Constant."""
        return {"name": "fake-parser"}


class FakeLocaliser:
    """The whole image, moved a little towards the phrase."""

    needs_patches = True
    needs_phrases = False

    def locate(
        self, images: Sequence[Image.Image], embedding: Any, phrase_emb: torch.Tensor, owner: torch.Tensor
    ) -> Any:
        """One region per phrase."""
        assert embedding.patches is not None
        whole = embedding.patches[:, 0][owner]
        emb = torch.nn.functional.normalize(whole + 0.5 * phrase_emb, dim=1)
        sizes = torch.tensor([(0.0, 0.0, float(i.width), float(i.height)) for i in images])
        scores = (whole * phrase_emb).sum(1)
        return SimpleNamespace(boxes=sizes[owner], scores=scores, emb=emb, found=scores > 0)

    def fingerprint(self) -> dict:
        """Constant."""
        return {"name": "fake-localiser"}


def fake_models(**captioner: Any) -> Models:
    """All four stand-ins."""
    return Models(FakeEncoder(), FakeCaptioner(**captioner), FakeParser(), FakeLocaliser())


class DeadlyCaptioner(FakeCaptioner):
    """Takes its process down when it sees a picture 31 pixels wide."""

    def caption(self, images: Sequence[Image.Image]) -> list[Any]:
        """As a bug in a model's native code would."""
        if any(image.width == 31 for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().caption(images)


def deadly_models() -> Models:
    """Stand-ins of which one is dangerous."""
    return Models(FakeEncoder(), DeadlyCaptioner(), FakeParser(), FakeLocaliser())


@dataclass
class Brightened:
    """A transform with a fingerprint; remembers whose image it saw."""

    by: int
    seen: list[str] = field(default_factory=list)

    def __call__(self, image: Image.Image, image_id: str) -> Image.Image:
        self.seen.append(image_id)
        return image.point(lambda v: min(255, v + self.by))

    def fingerprint(self) -> dict:
        """What it does."""
        return {"brightened": self.by}


def same_content(a: Features, b: Features) -> None:
    """Equal features, whatever the order of rows."""
    a, b = (f.select(np.argsort(f.table["path"].to_numpy(), kind="stable")) for f in (a, b))
    pd.testing.assert_frame_equal(a.table, b.table)
    pd.testing.assert_frame_equal(a.objects, b.objects, atol=1e-6)
    for name in (*ARRAYS, "owner"):
        # float32 sums in another order, then float16: one step of float16 at most
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=2e-4)


# ------------------------------------------------------------------------------------------------ pictures


def png(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A small noise picture as the bytes of a PNG."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def make_images(folder: Path, n: int, start: int = 0) -> pd.DataFrame:
    """Write n different pictures; return their manifest, real and fake in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + n):
        (folder / f"{i:05d}.png").write_bytes(png(i, (8 + i % 5, 8 + i % 3)))
    return manifest_of([folder / f"{i:05d}.png" for i in range(start, start + n)])


def manifest_of(paths: Sequence[Path]) -> pd.DataFrame:
    """A manifest in the form of read_manifest."""
    n = len(paths)
    return pd.DataFrame(
        {
            "path": [str(path) for path in paths],
            "label": pd.array([i % 2 for i in range(n)], dtype="Int8"),
            "generator": ["real" if i % 2 == 0 else "toy" for i in range(n)],
            "source": "test",
            "split": ["train" if i % 3 else "test" for i in range(n)],
            "caption": pd.array([pd.NA] * n, dtype="string"),
        }
    )
