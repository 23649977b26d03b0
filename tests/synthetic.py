"""Made-up features whose truth is known, for tests of everything right of the embeddings."""

from __future__ import annotations

import numpy as np
import pandas as pd

from itemkit.features import Features


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_features(
    n_real: int = 300,
    n_fake: int = 150,
    generators: tuple[str, ...] = ("gan", "flow"),
    dim: int = 24,
    misfit: float = 0.9,
    style: float = 0.5,
    seed: int = 0,
    fingerprint: dict | None = None,
) -> Features:
    """Reals sit near their texts; fakes sit further away and carry a style of their generator."""
    rng = np.random.default_rng(seed)
    names = ["real"] * n_real + [g for g in generators for _ in range(n_fake)]
    n = len(names)
    fake = np.array([name != "real" for name in names])
    styles = {g: rng.normal(size=dim) * style for g in generators} | {"real": np.zeros(dim)}
    pull = np.stack([styles[name] for name in names])
    noise = np.where(fake, misfit, 0.5)[:, None]
    caption = unit(rng.normal(size=(n, dim)))
    image = unit(caption + (rng.normal(size=(n, dim)) * noise + pull) / np.sqrt(dim))
    n_objects = rng.integers(0, 4, n)
    owner = np.repeat(np.arange(n), n_objects)
    phrase = unit(rng.normal(size=(len(owner), dim)))
    region = unit(phrase + (rng.normal(size=phrase.shape) * noise[owner] + pull[owner]) / np.sqrt(dim))
    # about half for training, a quarter each for validation and test, within each generator
    split = np.empty(n, object)
    for name in dict.fromkeys(names):
        rows = rng.permutation(np.flatnonzero(np.array(names) == name))
        cut = (len(rows) // 2, 3 * len(rows) // 4)
        split[rows[: cut[0]]], split[rows[cut[0] : cut[1]]], split[rows[cut[1] :]] = "train", "val", "test"
    table = pd.DataFrame(
        {
            "image_id": [f"{i:08x}" for i in range(n)],
            "path": [f"images/{name}/{i:05d}.png" for i, name in enumerate(names)],
            "label": pd.array(fake.astype(int), dtype="Int8"),
            "generator": names,
            "source": "synthetic",
            "split": split,
            "caption": "a made-up thing",
            "caption_logprob": rng.normal(np.where(fake, -1.0, -0.5), 0.3),
            "n_objects": n_objects,
        }
    )
    objects = pd.DataFrame(
        {
            "phrase": [f"thing {i}" for i in range(len(owner))],
            **{side: 0.0 for side in ("x0", "y0")},
            **{side: 10.0 for side in ("x1", "y1")},
            "score": np.einsum("ij,ij->i", region, phrase),
            "found": np.ones(len(owner), bool),
        }
    )
    run = {"fingerprint": fingerprint or {"encoder": {"name": "made-up", "dim": dim}, "captioner": "none"}}
    return Features(table, image, caption, region, phrase, owner, objects, run)
