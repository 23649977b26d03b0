"""Many renders at once, kept on disk while the laboratory's models train."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minilab.camera import Camera, photograph
from minilab.grammar import COLOURS, KINDS, SETTINGS, Facts
from minilab.world import SIZE, WORLD_SEED, render_index

SKY, GROUND = 0, 9
"""Values of ``owner`` that are no thing; things are 1, 2, 3 from left to right."""


@dataclass
class RenderSet:
    """Renders of one split, in order of their index.

    Attributes
    ----------
    images : uint8 array, shape (n, SIZE, SIZE, 3)
    owner : uint8 array, shape (n, SIZE, SIZE)
        What each pixel shows: ``SKY``, ``GROUND``, or 1 + position of the thing in ``facts[i].things``.
    facts : list of Facts, length n
    visible : list of tuple of float, length n
        Share of each thing that is neither hidden nor outside the picture, in the order of the facts.
    """

    images: np.ndarray
    owner: np.ndarray
    facts: list[Facts]
    visible: list[tuple[float, ...]]

    def __len__(self) -> int:
        return len(self.facts)

    def __deepcopy__(self, memo: dict) -> RenderSet:
        return self  # never written to; a copied model must not copy its data

    def part(self, rows: slice) -> RenderSet:
        """Some of the renders."""
        return RenderSet(self.images[rows], self.owner[rows], self.facts[rows], self.visible[rows])

    def photographs(
        self, n: int, rng: np.random.Generator, camera: Camera
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw n renders, frame them anew and photograph them; what models of the world learn from.

        Parameters
        ----------
        n : int
        rng : Generator
        camera : Camera

        Returns
        -------
        images : uint8 array, shape (n, SIZE, SIZE, 3)
        owner : uint8 array, shape (n, SIZE, SIZE)
        rows : int array, shape (n,)
            Which renders they are.
        """
        rows = rng.integers(len(self), size=n)
        images, owner = reframe(self.images[rows], self.owner[rows], rng)
        return photograph(images, rng, camera), owner, rows


def reframe(images: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Move the whole batch by up to three pixels and scale it by up to an eighth; edges are repeated."""
    zoom = rng.uniform(0.88, 1.12)
    at = [np.arange(SIZE) - (SIZE - 1) / 2] * 2
    y, x = (np.clip(a * zoom + (SIZE - 1) / 2 + rng.uniform(-3, 3), 0, SIZE - 1) for a in at)
    iy, ix = np.rint(y).astype(int), np.rint(x).astype(int)
    owner = owner[:, iy][:, :, ix]
    for axis, place in ((1, y), (2, x)):
        low = np.minimum(place.astype(int), SIZE - 2)
        part = (place - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        images = np.take(images, low, axis) * (1 - part) + np.take(images, low + 1, axis) * part
    return (images + 0.5).astype(np.uint8), owner


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Bytes to the [-1, 1] that all models see, channels first."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _render(job: tuple[str, int]) -> tuple[np.ndarray, np.ndarray, Facts, tuple[float, ...]]:
    r = render_index(*job)
    owner = np.full((SIZE, SIZE), SKY, dtype=np.uint8)
    owner[round(r.scene.horizon) :] = GROUND
    for i, mask in enumerate(r.masks):
        owner[mask] = i + 1
    return r.image, owner, r.scene.facts, tuple(r.visible.round(3).tolist())


def make_renders(split: str, n: int, start: int = 0, workers: int = 1, progress: bool = False) -> RenderSet:
    """Render scenes ``start .. start + n`` of a split.

    Parameters
    ----------
    split : str
        One of ``minilab.world.SPLITS``.
    n, start : int
        How many, and the first index.
    workers : int
        Processes to use.
    progress : bool
        Show a bar.

    Returns
    -------
    RenderSet
    """
    jobs = [(split, i) for i in range(start, start + n)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            rows = list(tqdm(pool.map(_render, jobs, chunksize=200), total=n, disable=not progress))
    else:
        rows = [_render(j) for j in tqdm(jobs, disable=not progress, desc=f"render {split}")]
    images, owners, facts, visible = zip(*rows, strict=True)
    return RenderSet(np.stack(images), np.stack(owners), list(facts), list(visible))


def cached_renders(split: str, n: int, folder: Path, workers: int = 2) -> RenderSet:
    """Return renders from ``folder``, made there first if they are missing.

    Parameters
    ----------
    split, n, workers
        As in :func:`make_renders`.
    folder : Path
        Cache folder; a different world seed or number of renders is another file.

    Returns
    -------
    RenderSet
        Arrays are memory-mapped.
    """
    stem = folder / f"{split}-{WORLD_SEED}-{SIZE}px-{n}"
    done = stem.with_suffix(".json")
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = make_renders(split, n, workers=workers, progress=True)
        np.save(stem.with_suffix(".images.npy"), made.images)
        np.save(stem.with_suffix(".owner.npy"), made.owner)
        rows = [[f.things, f.setting, v] for f, v in zip(made.facts, made.visible, strict=True)]
        done.write_text(json.dumps(rows))
    rows = json.loads(done.read_text())
    facts = [Facts(tuple((c, k) for c, k in things), setting) for things, setting, _ in rows]
    images = np.load(stem.with_suffix(".images.npy"), mmap_mode="r")
    owner = np.load(stem.with_suffix(".owner.npy"), mmap_mode="r")
    return RenderSet(images, owner, facts, [tuple(visible) for _, _, visible in rows])


N_PHRASES = len(COLOURS) * len(KINDS) + len(SETTINGS) + 1
"""Things by colour and kind, then settings, then the sky or wall, which has no phrase of its own."""


def phrase_ids(facts: list[Facts]) -> np.ndarray:
    """Map each owner value to a phrase class.

    Parameters
    ----------
    facts : list of Facts, length n

    Returns
    -------
    int64 array, shape (n, 10)
        Row i turns ``owner`` values of picture i into classes of ``minilab.clip.PHRASES`` (last class: sky).
    """
    table = np.full((len(facts), 10), N_PHRASES - 1, dtype=np.int64)
    n_things = len(COLOURS) * len(KINDS)
    for i, f in enumerate(facts):
        for j, (colour, kind) in enumerate(f.things):
            table[i, j + 1] = COLOURS.index(colour) * len(KINDS) + KINDS.index(kind)
        table[i, GROUND] = n_things + SETTINGS.index(str(f.setting))
    return table


def patch_owner(owner: np.ndarray, patch: int) -> np.ndarray:
    """Owner of each square patch: the thing that covers most of it, if it covers a quarter; else the ground.

    Parameters
    ----------
    owner : uint8 array, shape (n, SIZE, SIZE)
    patch : int
        Side of a patch in pixels.

    Returns
    -------
    uint8 array, shape (n, SIZE // patch, SIZE // patch)
    """
    n, g = len(owner), SIZE // patch
    cells = owner.reshape(n, g, patch, g, patch).transpose(0, 1, 3, 2, 4).reshape(n, g, g, patch * patch)
    counts = np.stack([(cells == v).mean(-1) for v in (1, 2, 3)], axis=-1)
    background = np.where((cells == GROUND).mean(-1) > (cells == SKY).mean(-1), GROUND, SKY)
    return np.where(counts.max(-1) >= 0.25, counts.argmax(-1) + 1, background).astype(np.uint8)
