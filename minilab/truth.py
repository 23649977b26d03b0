"""What each step of the method gets right on pictures whose truth is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from transformers import AutoModelForObjectDetection

from itemkit.captions import load_captioner
from itemkit.encoder import Encoder, load_encoder
from itemkit.errors import InputError
from itemkit.images import content_id
from itemkit.presets import mini_folder
from itemkit.regions import Localiser, make_localiser
from minilab import fakes, object_detector
from minilab.camera import photographs
from minilab.clip import PHRASES
from minilab.grammar import COLOURS, KINDS, Facts, caption, phrase, random_caption, read_caption
from minilab.renders import GROUND, RenderSet, make_renders
from minilab.world import SPLITS

VALIDATION = 5
"""First number of the stream from which the photographs on which models are measured draw their settings."""


def compare_facts(told: Facts, true: Facts) -> dict[str, float]:
    """Score a caption's claims against the truth.

    Parameters
    ----------
    told, true : Facts

    Returns
    -------
    dict
        ``exact`` (all claims right, nothing left out), ``f1`` of coloured objects, ``kinds`` and ``colours``
        (share of true things whose kind, or whose colour, is told at all), ``setting``, ``relation``
        (left-to-right order; only where the same things are told), ``invented`` (share of told things that
        are not there).
    """
    told_things, true_things = list(told.things), list(true.things)
    hits = _matches(told_things, true_things)
    same_things = hits == len(told_things) == len(true_things)
    order = told_things == true_things if told.ordered else same_things
    return {
        "exact": float(order and told.setting == true.setting),
        "f1": 2 * hits / max(1, len(told_things) + len(true_things)),
        "kinds": _matches([k for _, k in told_things], [k for _, k in true_things]) / len(true_things),
        "colours": _matches([c for c, _ in told_things], [c for c, _ in true_things]) / len(true_things),
        "setting": float(told.setting == true.setting),
        "relation": float(order) if same_things and len(true_things) > 1 else float("nan"),
        "invented": (len(told_things) - hits) / max(1, len(told_things)),
    }


def _matches(told: list, true: list) -> int:
    left, hits = list(true), 0
    for item in told:
        if item in left:
            left.remove(item)
            hits += 1
    return hits


@dataclass(frozen=True)
class Original:
    """The scene of a real image or an edit: what is where, to the pixel."""

    image: np.ndarray  # uint8 (SIZE, SIZE, 3): its photograph before anything was redrawn
    owner: np.ndarray  # uint8 (SIZE, SIZE), see `RenderSet`
    facts: Facts
    redrawn: np.ndarray  # bool (SIZE, SIZE): the pixels that an edit gave to the generator

    def mask(self, phrase: str) -> np.ndarray:
        """Visible pixels, bool (SIZE, SIZE), of what a phrase names: "a red ball", "ball", "the sand".

        Of several things that it fits, the one that shows most; all False where it fits nothing.
        """
        words = set(phrase.lower().split())
        coloured = bool(words & set(COLOURS))
        named = [
            self.owner == j + 1
            for j, (colour, kind) in enumerate(self.facts.things)
            if kind in words and (colour in words or not coloured)
        ]
        named += [self.owner == GROUND] if self.facts.setting in words else []
        return max(named, key=np.sum, default=np.zeros(self.owner.shape, bool))


def originals(image_ids: Sequence[str]) -> list[Original | None]:
    """The scenes of images of the mini data set; None where there is none, as of a generator's sample.

    Parameters
    ----------
    image_ids : sequence of n str
        As in a manifest or in features.

    Raises
    ------
    InputError
        The world paints other scenes now than when the images were made.
    """
    found: dict[str, Original] = {}
    table = pd.concat([pd.read_parquet(mini_folder() / f"{name}.parquet") for name in ("reals", "fakes")])
    table = table[table["generator"].isin(["real", "edit"])]
    table["world"] = table["split"].where(table["generator"] == "real", "spare")
    for (name, split), part in table.groupby(["generator", "world"]):
        ids, prompts = part["image"].map(content_id).to_numpy(), part["prompt"].to_numpy()
        at = fakes.GENERATORS.index("edit") if name == "edit" else 0
        for rows, seed in fakes._parts(len(part), at + 1):  # the batches in which edits were drawn
            if not np.isin(ids[rows], image_ids).any():
                continue
            scenes = make_renders(split, len(ids[rows]), start=at * len(part) + rows.start)
            redrawn = fakes.edit_masks(scenes.owner, seed) & (name == "edit")
            # a scene and its edit share the settings and the noise of one photograph
            stream = (fakes.FAKES, at) if name == "edit" else (fakes.REALS, SPLITS[split], 0)
            photos = photographs(scenes.images, stream, start=rows.start)
            for facts, said in zip(scenes.facts, prompts[rows], strict=True):
                if caption(facts) != said:
                    raise InputError(
                        f"a scene of {split} is '{caption(facts)}', the image made of it shows '{said}': "
                        "they are of different versions of the world; rebuild data/mini (`make lab`)"
                    )
            each = zip(photos, scenes.owner, scenes.facts, redrawn, strict=True)
            found |= dict(zip(ids[rows], (Original(*one) for one in each), strict=True))
    return [found.get(image_id) for image_id in image_ids]


def caption_quality(captions: list[str], facts: list[Facts]) -> dict[str, float]:
    """Average :func:`compare_facts` over pictures.

    Parameters
    ----------
    captions : list of str, length n
    facts : list of Facts, length n

    Returns
    -------
    dict of str to float
    """
    rows = [compare_facts(read_caption(c), f) for c, f in zip(captions, facts, strict=True)]
    columns = {key: np.array([r[key] for r in rows]) for key in rows[0]}
    # not a number where no picture could show it, as the order of things where none was told rightly
    return {k: float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for k, v in columns.items()}


def retrieval(encoder: Encoder, renders: RenderSet, n: int = 1000, seed: int = 0) -> float:
    """Share of pictures whose nearest of n captions tells the picture's own scene (R@1).

    Parameters
    ----------
    encoder : Encoder
    renders : RenderSet
        At least n pictures.
    n : int
    seed : int
        Of the captions' wording.

    Returns
    -------
    float
    """
    rng = np.random.default_rng(seed)
    facts = renders.facts[:n]
    text = encoder.encode_texts([random_caption(f, rng) for f in facts]).cpu()
    image = encode_pictures(encoder, [Image.fromarray(x) for x in renders.images[:n]])
    best = (image @ text.T).argmax(1).tolist()
    return float(np.mean([facts[b] == facts[i] for i, b in enumerate(best)]))


def crop_accuracy(encoder: Encoder, renders: RenderSet) -> float:
    """Share of single objects, cut out with a margin, whose nearest of all 96 phrases is their own.

    Parameters
    ----------
    encoder : Encoder
    renders : RenderSet

    Returns
    -------
    float
    """
    n_things = len(COLOURS) * len(KINDS)
    text = encoder.encode_texts(PHRASES[:n_things]).cpu()
    crops, truth = [], []
    for image, owner, facts in zip(renders.images, renders.owner, renders.facts, strict=True):
        for j, (colour, kind) in enumerate(facts.things):
            ys, xs = np.nonzero(owner == j + 1)
            if len(xs) < 24:
                continue
            side = 1.25 * max(np.ptp(xs) + 1, np.ptp(ys) + 1)
            cx, cy = (xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2
            box = tuple(round(v) for v in (cx - side / 2, cy - side / 2, cx + side / 2, cy + side / 2))
            padded = np.pad(image, ((24, 24), (24, 24), (0, 0)), mode="edge")
            crops.append(Image.fromarray(padded).crop(tuple(v + 24 for v in box)))
            truth.append(COLOURS.index(colour) * len(KINDS) + KINDS.index(kind))
    hit = (encode_pictures(encoder, crops) @ text.T).argmax(1).numpy() == np.array(truth)
    return float(hit.mean())


def localiser_quality(localiser: Localiser, renders: RenderSet) -> dict[str, float]:
    """How well and how quickly a localiser finds what it is told the true phrases of: things and grounds.

    Parameters
    ----------
    localiser : Localiser
        Of `itemkit.regions`.
    renders : RenderSet

    Returns
    -------
    dict
        Of things: ``iou``, mean intersection over union with the true box; ``hit``, share with 0.5 or more;
        ``pointing``, share of boxes whose centre lies in the true one. ``setting_iou``: of grounds and
        their visible extent. ``ms``: milliseconds per picture, its own embedding not counted.
    """
    rows, seconds, encoder = [], 0.0, localiser.encoder
    for start in range(0, len(renders), 64):
        part = slice(start, start + 64)
        images = [Image.fromarray(x) for x in renders.images[part]]
        asked = [
            (i, value, box, phrase(*facts.things[value - 1]) if value < GROUND else f"the {facts.setting}")
            for i, (what, facts) in enumerate(zip(renders.owner[part], renders.facts[part], strict=True))
            for value, box in zip(*object_detector.true_boxes(what), strict=True)
        ]
        owner, values, true, phrases = zip(*asked, strict=True)
        pixels = torch.stack([encoder.preprocess(i) for i in images])
        embedding = encoder.encode_images(pixels, patches=localiser.needs_patches)
        text = encoder.encode_texts(phrases)
        began = time.perf_counter()
        found = localiser.locate(images, embedding, text, torch.tensor(owner), phrases)
        seconds += time.perf_counter() - began
        for value, box, answer in zip(values, true, found.boxes.cpu().numpy(), strict=True):
            centre = (answer[:2] + answer[2:]) / 2
            iou = float(object_detector.overlap(box[None], answer[None])[0, 0])
            rows.append((value, iou, bool((centre >= box[:2]).all() and (centre <= box[2:]).all())))
    value, iou, pointing = np.array(rows).T
    things = value < GROUND
    return {
        "iou": float(iou[things].mean()),
        "hit": float((iou[things] >= 0.5).mean()),
        "pointing": float(pointing[things].mean()),
        "setting_iou": float(iou[~things].mean()),
        "ms": 1000 * seconds / len(renders),
    }


def encode_pictures(encoder: Encoder, images: list[Image.Image]) -> torch.Tensor:
    """Image embeddings, shape (n, d), length 1."""
    batches = [images[i : i + 128] for i in range(0, len(images), 128)]
    return torch.cat(
        [encoder.encode_images(torch.stack([encoder.preprocess(i) for i in b])).pooled.cpu() for b in batches]
    )


def photographed(n: int) -> RenderSet:
    """Renders of the ``models_val`` split, no model's training, as the camera of the data set shows them."""
    renders = make_renders("models_val", n)
    return replace(renders, images=photographs(renders.images, (VALIDATION,)))


def measure(models: Path, n: int = 1000, device: str = "cpu") -> dict[str, Any]:
    """Measure the mini models on renders that none of them has seen.

    Parameters
    ----------
    models : Path
        Folder with ``clip``, ``captioner``, ``object_detector``, and seconds of them where they are there.
    n : int
        Renders of the ``models_val`` split, photographed as the data set is.
    device : str

    Returns
    -------
    dict of str to float
        Flat, for the model card.
    """
    renders = photographed(n)
    images = [Image.fromarray(x) for x in renders.images]
    few = renders.part(slice(300))
    result: dict[str, Any] = {"renders": n}
    for name in _present(models, "clip"):
        encoder = load_encoder(models / name, device=device)
        result[f"{name}_r_at_1_of_{n}"] = retrieval(encoder, renders, n)
        result[f"{name}_crop_to_phrase_of_96"] = crop_accuracy(encoder, renders)
        for kind in ("whole", "grid", "dense"):
            found = localiser_quality(make_localiser(kind, encoder), few)
            result |= {f"{name}_{kind}_{k}": v for k, v in found.items()}
        for kind in _present(models, "object_detector") if name == "clip" else ():
            finder = make_localiser("object_detector", encoder, model=models / kind, precision="float32")
            result |= {f"{name}_{kind}_{k}": v for k, v in localiser_quality(finder, few).items()}
    for name in _present(models, "captioner"):
        told = load_captioner(models / name, device=device).caption(images)
        quality = caption_quality([c.text for c in told], renders.facts)
        result |= {f"{name}_{k}": v for k, v in quality.items()}
    for name in _present(models, "object_detector"):
        finder = AutoModelForObjectDetection.from_pretrained(models / name).to(device).eval()
        found = object_detector.quality(finder, renders.part(slice(500)), renders.images[:500], device)
        result |= {f"{name}_{k}": v for k, v in found.items()}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}


def _present(models: Path, name: str) -> list[str]:
    return [n for n in (name, f"{name}_second") if (models / n).is_dir()]
