"""Two ladders of fakes: generators stages of training, and pictures that keep ever more of a render.

The first asks how the method fares as fakes get better, the second how it fares as they keep more of the
truth. Every rung shows the same scenes, so rungs differ in their making only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import stats
from tqdm import tqdm

from itemkit import schema
from itemkit.captions import Captioner
from itemkit.encoder import Encoder
from itemkit.errors import InputError
from minilab import fakes, flow
from minilab.camera import decode, photo_files, photographs
from minilab.conditions import encode_facts
from minilab.grammar import caption
from minilab.renders import RenderSet, make_renders, to_pixels
from minilab.truth import caption_quality, encode_pictures

QUALITY = {
    "flow": ("flow@600", "flow@2400", "flow"),
    "latent_flow": ("latent_flow@600", "latent_flow"),
    "layout_flow": ("layout_flow@1500", "layout_flow"),
}
"""Stages of three generators, by optimiser steps; the last is the finished generator."""
KEEP = (20, 40, 60, 80, 90)
SEMANTICS = tuple(f"keep@{percent}" for percent in KEEP)
"""Image-to-image (SDEdit, Meng et al. 2021) with the finished flow: it starts this far, in %, on the path
from noise to a render."""
RUNGS = tuple(name for stages in QUALITY.values() for name in stages) + SEMANTICS
FIRST_SCENE = 10_000
"""Rungs show the scenes of the ``spare`` split from here on; the fakes of the data set lie before."""
N_COMMITTED, N_MEASURED = 40, 300
RUNG = 4
"""First number of the stream from which photographs of rungs draw their settings; all rungs share it."""


def ladder_of(rung: str) -> str:
    """Name of the ladder that a rung belongs to: a family of ``QUALITY``, or ``keep``."""
    return rung.partition("@")[0]


def sample_rung(rung: str, folder: Path, scenes: RenderSet, seed: int, device: str = "cpu") -> Any:
    """Pictures of one rung, uint8 array of shape (n, SIZE, SIZE, 3), one for each scene.

    Parameters
    ----------
    rung : str
        One of ``RUNGS``, or a generator.
    folder : Path
        Weights of the generators.
    scenes : RenderSet
        What to ask for; image-to-image also starts from these renders.
    seed : int
    device : str
    """
    name, _, stage = rung.partition("@")
    if name != "keep":
        return fakes.sample_fakes(rung, folder, scenes, seed, device)
    model, fields = fakes.load_generator("flow", folder, device), encode_facts(scenes.facts)
    start = to_pixels(scenes.images).to(device)
    return fakes.in_batches(
        len(scenes),
        seed,
        lambda part, s: flow.sample(model, fields[part], seed=s, start=start[part], keep=int(stage) / 100),
    )


def quality(
    encoder: Encoder, captioner: Captioner, pictures: Any, scenes: RenderSet, reference: Any
) -> dict[str, float]:
    """How close photographs of samples come to those of renders, and to the scenes that were asked for.

    Parameters
    ----------
    encoder : Encoder
        The mini CLIP.
    captioner : Captioner
        The mini captioner.
    pictures : uint8 array, shape (n, SIZE, SIZE, 3)
    scenes : RenderSet, length n
        What was asked for.
    reference : float array, shape (m, d)
        Image embeddings of other renders.

    Returns
    -------
    dict
        ``frechet, frechet_low, frechet_high`` (times 1000; embeddings have length 1), and of captions:
        ``scene`` (all claims right), ``f1`` of objects, ``setting``, ``invented``.
    """
    images = [Image.fromarray(x) for x in pictures]
    distance = frechet_distance(encode_pictures(encoder, images).numpy(), reference)
    told = caption_quality([c.text for c in captioner.caption(images)], scenes.facts)
    result = {
        f"frechet{end}": 1000 * distance[key]
        for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))
    }
    return result | {"scene": told["exact"], **{k: told[k] for k in ("f1", "setting", "invented")}}


def build_ladders(
    folder: Path, encoder: Encoder, captioner: Captioner, device: str = "cpu", n: int = N_MEASURED
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sample and measure every rung and every generator.

    Parameters
    ----------
    folder : Path
        Weights of the generators.
    encoder, captioner
        The mini models.
    device : str
    n : int
        Pictures of each that are measured; the first ``N_COMMITTED`` are kept.

    Returns
    -------
    images : DataFrame
        ``generator`` (or the rung), ``split`` (test), ``prompt, image``.
    table : DataFrame
        One row per rung or generator and one for renders: ``name, n`` and :func:`quality`.
    """
    scenes = make_renders("spare", n, start=FIRST_SCENE)
    other = make_renders("models_val", n)
    shots = photographs(other.images, (RUNG, 1))
    reference = encode_pictures(encoder, [Image.fromarray(x) for x in shots]).numpy()
    kept, rows = [], []
    for name, samples in _all_pictures(folder, scenes, device):
        files = photo_files(samples, (RUNG, 0))
        pictures = np.stack([decode(file) for file in files])
        rows.append({"name": name, "n": n, **quality(encoder, captioner, pictures, scenes, reference)})
        if name != schema.REAL_GENERATOR:
            prompts = [caption(facts) for facts in scenes.facts[:N_COMMITTED]]
            kept.append(fakes.picture_table(name, ["test"] * len(prompts), prompts, files[:N_COMMITTED]))
    return pd.concat(kept, ignore_index=True), pd.DataFrame(rows).round(4)


def frechet_distance(a: np.ndarray, b: np.ndarray, n_draws: int = 40, seed: int = 0) -> dict[str, float]:
    """Fréchet distance between two sets of embeddings, each summarised as a Gaussian, without its bias.

    The plain estimate is too large by about c / n (Chong and Forsyth 2020, arXiv 1911.07023). Halves drawn
    without replacement have twice that bias, so twice the whole's distance minus the mean of theirs has none
    of first order; it may fall below 0. The spread of the halves is the standard error of the whole
    (delete-half jackknife), and the interval of 95 % rests on the Student distribution.

    Parameters
    ----------
    a, b : float array, shape (n, d)
        Embeddings in one space, as many of each.
    n_draws, seed
        Halves to draw (at least 2), and their seed.

    Returns
    -------
    dict
        ``value, low, high, n``.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or a.shape != b.shape or len(a) < 4:
        raise InputError(f"embeddings have shapes {a.shape} and {b.shape}; expected (n, d) twice, n >= 4")
    rng, half = np.random.default_rng(seed), len(a) // 2
    draws = [(rng.permutation(len(a))[:half], rng.permutation(len(b))[:half]) for _ in range(n_draws)]
    halves = np.array([_plain_frechet(a[i], b[j]) for i, j in draws])
    value = 2 * _plain_frechet(a, b) - halves.mean()
    # the estimate doubles the whole and takes the halves' mean off, whose errors go the same way
    reach = stats.t.ppf(0.975, n_draws - 1) * halves.std(ddof=1)
    return {"value": float(value), "low": float(value - reach), "high": float(value + reach), "n": len(a)}


def _plain_frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # the eigenvalues of cov_a cov_b are those of the symmetric root cov_b root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    means = a.mean(0) - b.mean(0)
    return float((means**2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _all_pictures(folder: Path, scenes: RenderSet, device: str) -> Iterator[tuple[str, Any]]:
    yield schema.REAL_GENERATOR, scenes.images
    names = list(dict.fromkeys([*fakes.GENERATORS, *RUNGS]))
    for name in tqdm([n for n in names if n not in fakes.STAGE or n == "edit"], desc="ladders"):
        # one seed for all: the same noise where two rungs draw noise of one shape
        yield name, fakes.kept_samples(name, folder, scenes, FIRST_SCENE, 77, device, sample_rung)
