"""Is the memory of an extraction flat in the number of images? A simulated manifest with stub models.

    python -m benchmarks.scale --rows 1000000

A thousand small files stand for all rows: each comes with a thousand captions, so every row is a feature of
its own, and nothing but the models is left out. Prints resident memory as the rows go by, then the times of a
second run and of reading one column back.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from itemkit import decode
from itemkit.extraction import extract
from itemkit.models import Models
from itemkit.store import load_features

DIM = 64
FILES = 1000


def load_stub(data: bytes, name: str = "", **options: object) -> Image.Image:
    """A picture of one colour instead of decoding."""
    return Image.new("RGB", (8, 8), (data[0], data[1], 0))


class Embedding:
    """As of an encoder."""

    def __init__(self, pooled: torch.Tensor) -> None:
        self.pooled, self.patches = pooled, None


class Stub:
    """Encoder, parser and localiser that cost next to nothing; notes the memory as it is called."""

    dim, device, needs_patches = DIM, "cpu", False

    def __init__(self, every: int) -> None:
        self.every, self.images = every, 0
        self.memory: list[tuple[int, float]] = []

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32)

    def encode_images(self, pixels: torch.Tensor, patches: bool = False) -> Embedding:
        before, self.images = self.images, self.images + len(pixels)
        if before // self.every != self.images // self.every:
            self.memory.append((self.images, resident_mb()))
            print(f"{self.images:>9} images {self.memory[-1][1]:7.0f} MB", flush=True)
        x = torch.zeros(len(pixels), DIM)
        x[:, :3] = pixels + 1
        return Embedding(torch.nn.functional.normalize(x, dim=1))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        x = torch.tensor([[float(hash(t) % 997 + 1), float(len(t))] for t in texts])
        return torch.nn.functional.normalize(torch.cat([x, torch.ones(len(texts), DIM - 2)], 1), dim=1)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [3] * len(texts)

    def objects(self, captions: Sequence[str]) -> list[list[str]]:
        return [["ball", "grass"]] * len(captions)

    def locate(self, images: Any, embedding: Embedding, phrase_emb: torch.Tensor, owner: torch.Tensor) -> Any:
        m = len(owner)
        return type("Found", (), {"boxes": torch.zeros(m, 4), "scores": torch.zeros(m), "emb": phrase_emb})

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "stub"}


def resident_mb() -> float:
    """Memory of this process that is in use now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args(argv)
    if not os.path.exists("/proc/self/statm"):
        sys.exit("needs /proc to read the memory of this process")
    with tempfile.TemporaryDirectory(prefix="itemkit-scale-") as folder:
        run(args.rows, Path(folder))
    return 0


def run(rows: int, scratch: Path) -> None:
    """Extract, extract again, read back."""
    for i in range(FILES):
        (scratch / f"{i:04d}.bin").write_bytes(bytes([i % 256, i // 256]))
    paths = [str(scratch / f"{i % FILES:04d}.bin") for i in range(rows)]
    manifest = pd.DataFrame({"path": paths, "caption": [f"the {i // FILES} ball" for i in range(rows)]})
    stub = Stub(every=max(rows // 10, 1000))
    models = Models(stub, None, stub, stub)
    print(f"        0 images {resident_mb():7.0f} MB, the manifest of {rows} rows in memory")
    decode.load_image = decode.open_image = load_stub
    options: dict[str, Any] = {"captions": "user", "batch_size": 512, "progress": False}
    print(extract(manifest, scratch / "out", models, **options))
    if len(stub.memory) > 1:
        images, memory = np.array(stub.memory).T
        half = len(images) // 2  # by then what is bounded has reached its bound
        slope = np.polyfit(images[half:], memory[half:], 1)[0] * 2**20
        print(f"growth over the second half: {slope:.0f} bytes per image")
    print(extract(manifest, scratch / "out", models, **options))
    for columns in (["image_emb"], ["image_emb", "caption_emb", "objects"]):
        start = time.perf_counter()
        features = load_features(scratch / "out", columns)
        arrays = sum(getattr(features, name).nbytes for name in ("image_emb", "caption_emb", "region_emb"))
        print(
            f"read {', '.join(columns)} of {len(features)} images in {time.perf_counter() - start:.1f} s, "
            f"{arrays / 2**20:.0f} MB of embeddings, resident {resident_mb():.0f} MB"
        )


if __name__ == "__main__":
    sys.exit(main())
