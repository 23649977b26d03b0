"""Boxes in images: what a localiser returns, how windows are laid, how a patch map becomes a box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from itemkit.encoder.pixels import stack_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

    from itemkit.encoder import Encoder, ImageEmbedding

Box = tuple[float, float, float, float]
MAX_STEPS = 12  # windows per axis and scale; bounds the work on panoramas


@dataclass(frozen=True)
class Regions:
    """One region per phrase.

    Attributes
    ----------
    boxes : float32 tensor, shape (m, 4)
        x0, y0, x1, y1 in pixels of the original image.
    scores : float32 tensor, shape (m,)
        Cosine with the phrase, or a detector's confidence; 0 for a detector's fallback.
    emb : float32 tensor, shape (m, d)
        L2-normalised embeddings of the regions in the joint space.
    norm : float32 tensor, shape (m,), or None
        Lengths of the regions' embeddings before normalisation.
    """

    boxes: Tensor
    scores: Tensor
    emb: Tensor
    norm: Tensor | None = None


class Localiser(Protocol):
    """Finds phrases in images.

    Attributes
    ----------
    needs_patches : bool
        Whether `embedding` must come with patches.
    needs_phrases : bool
        Whether the phrases themselves are read, not only their embeddings.
    """

    needs_patches: bool
    needs_phrases: bool

    def locate(
        self,
        images: Sequence[Image],
        embedding: ImageEmbedding,
        phrase_emb: Tensor,
        owner: Tensor,
        phrases: Sequence[str] | None = None,
    ) -> Regions:
        """Locate phrase j in image ``owner[j]``.

        Parameters
        ----------
        images : sequence of n PIL images
        embedding : ImageEmbedding of the n images
        phrase_emb : float tensor, shape (m, d), L2-normalised
        owner : int tensor, shape (m,)
        phrases : sequence of m str
            Needed by localisers with `needs_phrases`.

        Returns
        -------
        Regions, one per phrase in the given order
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the regions, as JSON-ready values."""
        ...


def windows(width: int, height: int, scales: Sequence[float], overlap: float) -> list[Box]:
    """Square windows that cover an image evenly.

    >>> windows(40, 40, [1.0, 0.5], 0.0)[1:]
    [(0.0, 0.0, 20.0, 20.0), (20.0, 0.0, 40.0, 20.0), (0.0, 20.0, 20.0, 40.0), (20.0, 20.0, 40.0, 40.0)]
    """
    found: list[Box] = []
    for scale in scales:
        side = max(1, round(scale * min(width, height)))
        for y in _starts(height, side, overlap):
            for x in _starts(width, side, overlap):
                found.append((float(x), float(y), float(x + side), float(y + side)))
    return list(dict.fromkeys(found))


def _starts(length: int, side: int, overlap: float) -> list[int]:
    step = max(1.0, side * (1 - overlap))
    count = min(math.ceil((length - side) / step) + 1, MAX_STEPS)
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def embed_boxes(
    encoder: Encoder, images: Sequence[Image], boxes: Sequence[Box], batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Embed one crop per image and box; a box has at least one pixel.

    Returns
    -------
    float tensors, shapes (len(boxes), d) and (len(boxes),)
        Embeddings, and their lengths before normalisation (NaN if the encoder tells none).
    """
    crops = []
    for image, (x0, y0, x1, y1) in zip(images, boxes, strict=True):
        left, top = min(int(x0), image.width - 1), min(int(y0), image.height - 1)
        right, bottom = max(left + 1, math.ceil(x1)), max(top + 1, math.ceil(y1))
        crops.append(image.crop((left, top, min(right, image.width), min(bottom, image.height))))
    emb, norms = [], []
    for start in range(0, len(crops), batch_size):
        pixels = stack_pixels(encoder.preprocess, crops[start : start + batch_size])
        found = encoder.encode_images(pixels)
        emb.append(found.pooled)
        norms.append(found.pooled.new_full((len(pixels),), math.nan) if found.norm is None else found.norm)
    if not emb:
        return torch.zeros(0, encoder.dim, device=encoder.device), torch.zeros(0, device=encoder.device)
    return torch.cat(emb), torch.cat(norms)


def peak_boxes(maps: Tensor, level: float) -> Tensor:
    """Draw a box around the connected part of each map that holds its peak.

    Parameters
    ----------
    maps : tensor, shape (m, h, w)
        Values of -inf are outside the image.
    level : float
        Cut between the least finite (0) and the greatest value (1) of each map.

    Returns
    -------
    float tensor, shape (m, 4)
        x0, y0, x1, y1 in cells; x1 and y1 are exclusive.
    """
    m, h, w = maps.shape
    flat = maps.reshape(m, -1)
    high = flat.max(dim=1, keepdim=True).values
    low = flat.masked_fill(flat.isinf(), math.inf).min(dim=1, keepdim=True).values
    above = (flat >= low + level * (high - low)).reshape(m, h, w).float()
    part = F.one_hot(flat.argmax(dim=1), h * w).reshape(m, h, w).float()
    for _ in range(h * w):  # grow from the peak to its four neighbours, as long as something is added
        rows = F.max_pool2d(part[:, None], (3, 1), 1, (1, 0))[:, 0]
        columns = F.max_pool2d(part[:, None], (1, 3), 1, (0, 1))[:, 0]
        grown = torch.maximum(rows, columns) * above
        if torch.equal(grown, part):
            break
        part = grown
    in_row, in_column = part.amax(dim=2), part.amax(dim=1)
    y0, x0 = in_row.argmax(dim=1), in_column.argmax(dim=1)
    y1, x1 = h - in_row.flip(1).argmax(dim=1), w - in_column.flip(1).argmax(dim=1)
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def cells_to_pixels(cells: Tensor, grid: tuple[int, int], frame: Box, width: int, height: int) -> Tensor:
    """Turn boxes in patches into boxes in pixels of the original image, clipped to it."""
    x0, y0, x1, y1 = frame
    size = cells.new_tensor([(x1 - x0) / grid[1], (y1 - y0) / grid[0]] * 2)
    pixels = cells * size + cells.new_tensor([x0, y0, x0, y0])
    limit = cells.new_tensor([width, height, width, height])
    return torch.minimum(pixels.clamp(min=0), limit)


def inside(grid: tuple[int, int], frame: Box, width: int, height: int) -> Tensor:
    """Patches whose centre lies in the image, not in the padding; shape (h * w,)."""
    x0, y0, x1, y1 = frame
    x = x0 + (torch.arange(grid[1]) + 0.5) * (x1 - x0) / grid[1]
    y = y0 + (torch.arange(grid[0]) + 0.5) * (y1 - y0) / grid[0]
    return (((y >= 0) & (y <= height))[:, None] & ((x >= 0) & (x <= width))[None, :]).flatten()
