"""The two classes of the mini data set: renders for real, samples of the laboratory's generators for fake.

One camera photographs both, and both leave as JPEG files of the same size. Prompts of fakes and the renders
that are edited come from the
``spare`` split; no model has seen it, and no render of it is a real image of the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from itemkit.models import file_hash
from minilab import flow, latent, painter, vq
from minilab.camera import photo_files, png
from minilab.conditions import encode_facts
from minilab.grammar import caption
from minilab.renders import RenderSet, make_renders, to_pixels

COUNTS = {"train": 160, "val": 60, "test": 100}
"""Fakes of each generator; twice as many renders stand beside them."""
REAL_FACTOR = 2
FAKES, REALS = 1, 2
"""First numbers of the streams from which photographs of either class draw their settings."""
GENERATORS = ("flow", "latent_flow", "layout_flow", "painter", "edit")
"""``edit`` is a render in which ``layout_flow`` redrew one object (families: ``protocols/mini.toml``)."""
TOLD_WHERE = ("layout_flow", "latent_flow", "painter")
"""They are told what each pixel shows; ``flow`` is told the facts and has to find the places itself."""

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "flow": flow.UNet,
    "vq": vq.VqVae,
    "latent_flow": latent.make_unet,
    "layout_flow": painter.LayoutUNet,
    "painter": painter.LayoutUNet,
}
STAGE = {"edit": "layout_flow"}
"""Weights of the generator that is no training of its own."""


def load_generator(name: str, folder: Path, device: str = "cpu") -> nn.Module:
    """Load a generator from its safetensors file.

    Parameters
    ----------
    name : str
        Key of ``MAKERS``, or ``name@step`` for a stage of its training.
    folder : Path
        Folder that holds ``<name>.safetensors``.
    device : str

    Returns
    -------
    Module
        In evaluation mode, float32.
    """
    model = MAKERS[name.partition("@")[0]]()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()})
    return model.to(device).eval()


def sample_fakes(name: str, folder: Path, scenes: RenderSet, seed: int, device: str = "cpu") -> np.ndarray:
    """Sample one fake for each scene.

    Parameters
    ----------
    name : str
        One of ``GENERATORS``, or ``name@step`` for a stage; ``edit`` is a render in which
        ``layout_flow`` redraws one object.
    folder : Path
        Generator weights.
    scenes : RenderSet
        What to ask for; ``edit`` starts from the renders themselves.
    seed : int
    device : str

    Returns
    -------
    uint8 array, shape (n, SIZE, SIZE, 3)
    """
    stage = STAGE.get(name, name)
    model, kind = load_generator(stage, folder, device), stage.partition("@")[0]
    fields, sample = encode_facts(scenes.facts), cast(Callable[..., torch.Tensor], flow.sample)
    if kind in TOLD_WHERE:
        fields, sample = painter.layouts(scenes), partial(flow.sample, guidance=1)
    if kind == "latent_flow":
        sample = partial(latent.sample, vq=load_generator("vq", folder, device))
    elif kind == "painter":
        sample = painter.sample
    if name == "edit":
        masks = np.concatenate([edit_masks(scenes.owner[p], s) for p, s in _parts(len(scenes), seed)])
        start, mask = to_pixels(scenes.images).to(device), torch.from_numpy(masks[:, None]).float().to(device)
        redrawn = in_batches(
            len(scenes),
            seed,
            lambda p, s: sample(model, fields=fields[p], seed=s, start=start[p], mask=mask[p]),
        )
        # outside the mask the picture is the render's own bytes
        return np.where(masks[..., None], redrawn, scenes.images)
    return in_batches(len(scenes), seed, lambda p, s: sample(model, fields=fields[p], seed=s))


def _parts(n: int, seed: int) -> Iterator[tuple[slice, int]]:
    """Batches of 64, each with a seed of its own."""
    for start in range(0, n, 64):
        yield slice(start, start + 64), seed * 100_003 + start


def in_batches(n: int, seed: int, draw: Callable[[slice, int], torch.Tensor]) -> np.ndarray:
    """Draw n pictures in batches.

    Parameters
    ----------
    n, seed : int
    draw : callable
        From rows and a seed to pictures in [-1, 1], float tensor of shape (len(rows), 3, SIZE, SIZE).

    Returns
    -------
    uint8 array, shape (n, SIZE, SIZE, 3)
    """
    return np.concatenate([flow.to_bytes(draw(part, s)) for part, s in _parts(n, seed)])


def edit_masks(owner: np.ndarray, seed: int) -> np.ndarray:
    """Choose the object to redraw in each scene: a square around one thing, two pixels wider than it.

    The object keeps its words: only its pixels are the generator's, as in a well-made local forgery.

    Parameters
    ----------
    owner : uint8 array, shape (n, SIZE, SIZE)
    seed : int

    Returns
    -------
    bool array, shape (n, SIZE, SIZE)
    """
    rng = np.random.default_rng(seed)
    masks = np.zeros(owner.shape, dtype=bool)
    for mask, what in zip(masks, owner, strict=True):
        present = [v for v in (1, 2, 3) if (what == v).any()]
        ys, xs = np.nonzero(what == int(rng.choice(present)))
        mask[max(0, ys.min() - 2) : ys.max() + 3, max(0, xs.min() - 2) : xs.max() + 3] = True
    return masks


def kept_samples(
    name: str,
    folder: Path,
    scenes: RenderSet,
    start: int,
    seed: int,
    device: str,
    draw: Callable[..., np.ndarray],
) -> np.ndarray:
    """Samples of ``draw(name, folder, scenes, seed, device)``, kept on disk for an interrupted build.

    Parameters
    ----------
    name : str
    folder : Path
        Weights of the generators; samples are kept in ``folder/samples``.
    scenes : RenderSet
    start : int
        Index of the first scene.
    seed : int
    device : str
    draw : callable
        Such as :func:`sample_fakes`.

    Returns
    -------
    uint8 array, shape (n, SIZE, SIZE, 3)
    """
    weights = [_weights_of(name)]
    weights += ["vq"] if weights[0].startswith("latent_flow") else []
    state = "-".join(file_hash(folder / f"{w}.safetensors")[:8] for w in weights)
    path = folder / "samples" / f"{name}-{start}-{len(scenes)}-{seed}-{state}.npy"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        made = draw(name, folder, scenes, seed, device)
        np.save(path.with_suffix(".tmp.npy"), made)
        path.with_suffix(".tmp.npy").replace(path)
    return np.load(path)


def _weights_of(name: str) -> str:
    return "flow" if name.startswith("keep@") else STAGE.get(name, name)


def build_fakes(folder: Path, device: str = "cpu") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sample the fakes of every generator and split, and photograph them.

    Parameters
    ----------
    folder : Path
        Weights of the generators.
    device : str

    Returns
    -------
    photographs, raw : DataFrame
        ``generator, split, prompt, image``; the files of the camera, and the pictures as the generators left
        them.
    """
    photos, raw = [], []
    for i, (name, splits, prompts, images) in enumerate(samples(folder, device)):
        photos.append(picture_table(name, splits, prompts, photo_files(images, (FAKES, i))))
        raw.append(picture_table(name, splits, prompts, map(png, images)))
    return pd.concat(photos, ignore_index=True), pd.concat(raw, ignore_index=True)


def samples(folder: Path, device: str = "cpu") -> Iterator[tuple[str, list[str], list[str], np.ndarray]]:
    """Pictures of every generator for the data set, before the camera.

    Parameters
    ----------
    folder : Path
        Weights of the generators.
    device : str

    Yields
    ------
    name : str
    splits, prompts : list of str, length n
        The test split comes last.
    images : uint8 array, shape (n, SIZE, SIZE, 3)
    """
    splits = [s for s, k in COUNTS.items() for _ in range(k)]
    for i, name in enumerate(GENERATORS):
        scenes = make_renders("spare", len(splits), start=i * len(splits))
        images = kept_samples(name, folder, scenes, i * len(splits), i + 1, device, sample_fakes)
        yield name, splits, [caption(facts) for facts in scenes.facts], images


def edit_originals() -> pd.DataFrame:
    """The renders of the test split that ``edit`` changed, each photographed as its edit was.

    Returns
    -------
    DataFrame
        ``generator, split, prompt, image``, in the order of the edits.
    """
    n, i = sum(COUNTS.values()), GENERATORS.index("edit")
    scenes = make_renders("spare", n, start=i * n)
    files = photo_files(scenes.images, (FAKES, i))[-COUNTS["test"] :]
    prompts = [caption(facts) for facts in scenes.facts[-COUNTS["test"] :]]
    return picture_table("edit_original", ["test"] * len(prompts), prompts, files)


def picture_table(
    name: str, splits: Sequence[str], prompts: Sequence[str], files: Iterable[bytes]
) -> pd.DataFrame:
    """Make a table of pictures as the laboratory stores them: ``generator, split, prompt, image``."""
    table = pd.DataFrame({"split": splits, "prompt": prompts, "image": list(files)})
    table.insert(0, "generator", name)
    return table
