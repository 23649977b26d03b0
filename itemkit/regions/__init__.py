"""Third step of the method: where in the image each semantic object is, and the embedding of that region.

Rule for an object that is not there: `whole`, `grid` and `dense` always return their best region, and the
score (its cosine with the phrase) says how good it is. A detector that finds nothing above its threshold
falls back to the whole image with score 0. So every phrase has exactly one region; a caption without objects
has none, and what that means is decided where features are pooled (`misalignment`).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from itemkit.errors import InputError
from itemkit.regions.boxes import (
    MAX_STEPS,
    Box,
    Localiser,
    Regions,
    cells_to_pixels,
    embed_boxes,
    inside,
    peak_boxes,
    windows,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from itemkit.encoder import Encoder, ImageEmbedding


class Whole:
    """The whole image for every object: local and global misalignment then differ in the text only."""

    needs_patches = needs_phrases = False

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def locate(
        self,
        images: Sequence[Image],
        embedding: ImageEmbedding,
        phrase_emb: Tensor,
        owner: Tensor,
        phrases: Sequence[str] | None = None,
    ) -> Regions:
        """See `Localiser.locate`."""
        emb = embedding.pooled[owner]
        size = torch.tensor([image.size for image in images], dtype=torch.float32, device=emb.device)
        boxes = torch.cat([torch.zeros_like(size), size], dim=1)[owner]
        norm = None if embedding.norm is None else embedding.norm[owner]
        return Regions(boxes, (emb * phrase_emb).sum(dim=1), emb, norm)

    def fingerprint(self) -> dict[str, Any]:
        """See `Localiser.fingerprint`."""
        return {"kind": "whole"}


class Grid:
    """Square windows of several sizes slid over the image; the one with the highest cosine wins.

    Parameters
    ----------
    encoder : Encoder
    scales : sequence of float
        Sides of the windows as fractions of the image's shorter side.
    overlap : float
        Least share of a window that the next one covers again.
    batch_size : int, optional
        Windows encoded at a time; by default 256 on a GPU and 32 on a CPU, where more was slower.
    """

    needs_patches = needs_phrases = False

    def __init__(
        self,
        encoder: Encoder,
        scales: Sequence[float] = (1.0, 0.7, 0.45),
        overlap: float = 0.5,
        batch_size: int | None = None,
    ) -> None:
        if not scales or not all(0 < s <= 1 for s in scales) or not 0 <= overlap < 1:
            raise InputError(
                f"grid: got scales {tuple(scales)} and overlap {overlap}; expected scales in (0, 1] and an "
                "overlap in [0, 1)"
            )
        self.encoder, self.scales, self.overlap = encoder, tuple(scales), overlap
        self.batch_size = batch_size or (32 if torch.device(encoder.device).type == "cpu" else 256)

    def locate(
        self,
        images: Sequence[Image],
        embedding: ImageEmbedding,
        phrase_emb: Tensor,
        owner: Tensor,
        phrases: Sequence[str] | None = None,
    ) -> Regions:
        """See `Localiser.locate`."""
        device = embedding.pooled.device
        boxes, scores, emb = _empty(len(owner), phrase_emb.shape[1], device)
        norm = torch.full_like(scores, math.nan)
        for group in self._groups(images, owner.unique().tolist()):
            found = [box for _, of_image in group for box in of_image]
            sources = [images[index] for index, of_image in group for _ in of_image]
            crops, lengths = embed_boxes(self.encoder, sources, found, self.batch_size)
            start = 0
            for index, of_image in group:
                mine = slice(start, start + len(of_image))
                start += len(of_image)
                emb_of, norm_of = crops[mine], lengths[mine]
                laid = torch.tensor(of_image, dtype=torch.float32, device=device).reshape(-1, 4)
                if self._sees_whole(images[index]):  # this window is embedded already
                    emb_of = torch.cat([embedding.pooled[index : index + 1], emb_of])
                    whole = norm.new_tensor([math.nan]) if embedding.norm is None else embedding.norm[[index]]
                    norm_of = torch.cat([whole, norm_of])
                    laid = torch.cat([laid.new_tensor([[0, 0, *images[index].size]]), laid])
                rows = (owner == index).nonzero().squeeze(1)
                scores[rows], best = (phrase_emb[rows].float() @ emb_of.T).max(dim=1)
                boxes[rows], emb[rows], norm[rows] = laid[best], emb_of[best], norm_of[best]
        return Regions(boxes, scores, emb, norm)

    def _sees_whole(self, image: Image) -> bool:
        """Whether the first window is the image itself."""
        return image.width == image.height and self.scales[0] == 1

    def _groups(self, images: Sequence[Image], indices: list[int]) -> Iterator[list[tuple[int, list[Box]]]]:
        """Lay the windows, in groups of images that fill a batch but do not hold all crops in memory."""
        group: list[tuple[int, list[Box]]] = []
        for index in indices:
            width, height = images[index].size
            laid = windows(width, height, self.scales, self.overlap)
            group.append((index, laid[self._sees_whole(images[index]) :]))
            if sum(len(boxes) for _, boxes in group) >= self.batch_size:
                yield group
                group = []
        if group:
            yield group

    def fingerprint(self) -> dict[str, Any]:
        """See `Localiser.fingerprint`."""
        return {"kind": "grid", "scales": list(self.scales), "overlap": self.overlap, "max_steps": MAX_STEPS}


class Dense:
    """The encoder's own patch map: one forward pass gives the image and all its regions.

    The region's embedding is the mean of the patch embeddings, weighted by the softmax of their cosines with
    the phrase; its length is the same mean of theirs. The box is drawn around the connected part of the map
    that holds the best patch. A CLIP trained on captions alone has a weak patch map: look at `heatmap` before
    trusting the boxes.

    Parameters
    ----------
    encoder : Encoder
        With a patch grid.
    temperature : float, optional
        Of the softmax; by default one over the encoder's own logit scale, with which its cosines were
        trained.
    level : float
        Height at which the map is cut for the box, between its least (0) and its greatest value (1).
    """

    needs_patches, needs_phrases = True, False

    def __init__(self, encoder: Encoder, temperature: float | None = None, level: float = 0.5) -> None:
        if encoder.patch_grid is None:
            # Raises the error that names the ways out.
            encoder.embed_pixels(torch.zeros(1, 3, *encoder.image_size), patches=True)
        if (temperature is not None and temperature <= 0) or not 0 <= level < 1:
            raise InputError(
                f"dense: got temperature {temperature} and level {level}; expected > 0 and [0, 1)"
            )
        self.encoder, self.level = encoder, level
        self.temperature = 1 / encoder.logit_scale if temperature is None else temperature

    def locate(
        self,
        images: Sequence[Image],
        embedding: ImageEmbedding,
        phrase_emb: Tensor,
        owner: Tensor,
        phrases: Sequence[str] | None = None,
    ) -> Regions:
        """See `Localiser.locate`."""
        if embedding.patches is None:
            raise InputError(
                "dense: the images were embedded without patches; use encode_images(..., patches=True)"
            )
        grid = self.encoder.patch_grid or (1, 1)
        device = embedding.pooled.device
        boxes, scores, emb = _empty(len(owner), phrase_emb.shape[1], device)
        norm = torch.full_like(scores, math.nan)
        for index in owner.unique().tolist():  # by image: patches repeated for each phrase would be large
            rows = (owner == index).nonzero().squeeze(1)
            width, height = images[index].size
            frame = self.encoder.frame(width, height)
            patches = embedding.patches[index]
            cosine = phrase_emb[rows].float() @ patches.T
            cosine = cosine.masked_fill(~inside(grid, frame, width, height).to(device), -math.inf)
            weight = (cosine / self.temperature).softmax(dim=1)
            emb[rows] = F.normalize(weight @ patches, dim=1)
            if embedding.patch_norm is not None:
                norm[rows] = weight @ embedding.patch_norm[index]
            scores[rows] = (emb[rows] * phrase_emb[rows]).sum(dim=1)
            cells = peak_boxes(cosine.reshape(-1, *grid), self.level)
            boxes[rows] = cells_to_pixels(cells, grid, frame, width, height)
        return Regions(boxes, scores, emb, norm)

    def fingerprint(self) -> dict[str, Any]:
        """See `Localiser.fingerprint`."""
        return {"kind": "dense", "temperature": self.temperature, "level": self.level}


def _empty(m: int, d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(m, 4, device=device), torch.zeros(m, device=device), torch.zeros(m, d, device=device)


def heatmap(patches: Tensor, phrase_emb: Tensor, encoder: Encoder, width: int, height: int) -> np.ndarray:
    """Cosine of every place of an image with a phrase, for drawing.

    Parameters
    ----------
    patches : float tensor, shape (h * w, d)
        Of one image, from `Encoder.encode_images`.
    phrase_emb : float tensor, shape (d,)
    encoder : Encoder
        For its patch grid and frame.
    width, height : int
        Of the original image.

    Returns
    -------
    float32 array, shape (height, width)
        NaN where the encoder does not see the image (cropped sides).
    """
    grid = encoder.patch_grid or (1, 1)
    cosine = (patches.float() @ phrase_emb.float().to(patches.device)).reshape(1, 1, *grid).cpu()
    x0, y0, x1, y1 = encoder.frame(width, height)
    # Sample at pixel centres; -1 and 1 are the outer edges of the first and last patch.
    x = (torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    values = F.grid_sample(cosine, places[None], padding_mode="border", align_corners=False)[0, 0]
    values[(places.abs() > 1).any(dim=-1)] = math.nan
    return values.numpy()


def make_localiser(name: str, encoder: Encoder, **options: Any) -> Localiser:
    """Make a localiser by name.

    Parameters
    ----------
    name : {"whole", "grid", "dense", "owlv2", "grounding_dino"}
        The last two are detectors of transformers: pass ``model=`` a folder or hub name.
    encoder : Encoder
        Embeds the regions.
    **options
        Of the localiser's class.

    Raises
    ------
    InputError
        Unknown name or option, or the encoder has no patches for "dense".
    """
    classes: dict[str, Any] = {"whole": Whole, "grid": Grid, "dense": Dense}
    detectors = ("owlv2", "grounding_dino")
    if name in detectors:
        from itemkit.regions import grounding  # transformers only when a detector is wanted

        classes = {"owlv2": grounding.load_owlv2, "grounding_dino": grounding.load_grounding_dino}
    elif name not in classes:
        known = [*classes, *detectors]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise InputError(f"localiser '{name}' is unknown.{hint} Known: {', '.join(known)}.")
    taken = list(inspect.signature(classes[name]).parameters)[1:]
    unknown = sorted(set(options) - set(taken))
    if unknown:
        raise InputError(
            f"localiser '{name}' has no option {unknown[0]!r}; it takes: {', '.join(taken) or 'none'}"
        )
    return classes[name](encoder, **options)
