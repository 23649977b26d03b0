"""Third step of the method: where in the image each semantic object is, and the embedding of that region.

Rule for an object that is not there: `whole`, `grid` and `dense` always return their best region, and the
score (its cosine with the phrase) says how good it is. An object detector that finds nothing above its
threshold falls back to the whole image with score 0. So every phrase has exactly one region; a caption
without objects has none, and what that means is decided where features are pooled (`misalignment`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from itemkit.encoder import stack_pixels
from itemkit.errors import InputError
from itemkit.models import (
    GRID_MAX_STEPS,
    LOCALISERS,
    check_localiser,
    localiser_settings,
    part_fingerprint,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from itemkit.encoder import Encoder, ImageEmbedding

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Regions:
    """One region per phrase.

    Attributes
    ----------
    boxes : float32 tensor, shape (m, 4)
        x0, y0, x1, y1 in pixels of the original image.
    scores : float32 tensor, shape (m,)
        Cosine with the phrase, or an object detector's confidence; 0 for its fallback.
    emb : float32 tensor, shape (m, d)
        L2-normalised embeddings of the regions in the joint space.
    """

    boxes: Tensor
    scores: Tensor
    emb: Tensor


class Localiser(ABC):
    """Finds phrases in images: the base of all localisers; one of the user's own need only look like it.

    Attributes
    ----------
    needs_patches : bool
        Whether `embedding` must come with patches.
    needs_phrases : bool
        Whether the phrases themselves are read, not only their embeddings.
    """

    needs_patches = needs_phrases = False

    def __init__(self, encoder: Encoder, record: Mapping[str, Any]) -> None:
        self.encoder, self._record = encoder, dict(record)

    @abstractmethod
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

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the regions, as JSON-ready values."""
        return dict(self._record)


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
    count = min(math.ceil((length - side) / step) + 1, GRID_MAX_STEPS)
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def embed_boxes(
    encoder: Encoder, images: Sequence[Image], boxes: Sequence[Box], batch_size: int | None = None
) -> Tensor:
    """Embed one crop per image and box; a box has at least one pixel.

    By default 256 at a time on a GPU and 32 on a CPU, where more was slower.

    Returns
    -------
    float32 tensor, shape (len(boxes), d)
    """
    batch_size = batch_size or (32 if torch.device(encoder.device).type == "cpu" else 256)
    emb = [torch.zeros(0, encoder.dim, device=encoder.device)]
    for start in range(0, len(boxes), batch_size):  # cut out batch by batch: all at once would be large
        crops = []
        part = slice(start, start + batch_size)
        for image, (x0, y0, x1, y1) in zip(images[part], boxes[part], strict=True):
            left, top = min(int(x0), image.width - 1), min(int(y0), image.height - 1)
            right, bottom = max(left + 1, math.ceil(x1)), max(top + 1, math.ceil(y1))
            crops.append(image.crop((left, top, min(right, image.width), min(bottom, image.height))))
        emb.append(encoder.encode_images(stack_pixels(encoder.preprocess, crops)).pooled)
    return torch.cat(emb)


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


class Whole(Localiser):
    """The whole image for every object: local and global misalignment then differ in the text only."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, localiser_settings("whole", {}))

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):  # types: see Localiser
        """See `Localiser.locate`."""
        emb = embedding.pooled[owner]
        size = torch.tensor([image.size for image in images], dtype=torch.float32, device=emb.device)
        boxes = torch.cat([torch.zeros_like(size), size], dim=1)[owner]
        return Regions(boxes, (emb * phrase_emb).sum(dim=1), emb)


class Grid(Localiser):
    """Square windows of several sizes slid over the image; the one with the highest cosine wins.

    Parameters
    ----------
    encoder : Encoder
    scales : sequence of float
        Sides of the windows as fractions of the image's shorter side.
    overlap : float
        Least share of a window that the next one covers again.
    """

    def __init__(
        self,
        encoder: Encoder,
        scales: Sequence[float] = LOCALISERS["grid"]["scales"],
        overlap: float = LOCALISERS["grid"]["overlap"],
    ) -> None:
        if not scales or not all(0 < s <= 1 for s in scales) or not 0 <= overlap < 1:
            raise InputError(
                f"grid: got scales {tuple(scales)} and overlap {overlap}; expected scales in (0, 1] and an "
                "overlap in [0, 1)"
            )
        super().__init__(encoder, localiser_settings("grid", {"scales": tuple(scales), "overlap": overlap}))
        self.scales, self.overlap = tuple(scales), overlap

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):  # types: see Localiser
        """See `Localiser.locate`."""
        boxes, scores, emb = _empty(len(owner), phrase_emb.shape[1], embedding.pooled.device)
        laid = {
            i: windows(images[i].width, images[i].height, self.scales, self.overlap)
            for i in owner.unique().tolist()
        }
        # the first window of a square image is the image itself, which is embedded already
        known = {i: int(images[i].width == images[i].height and self.scales[0] == 1) for i in laid}
        new = [(images[i], box) for i in laid for box in laid[i][known[i] :]]
        crops = embed_boxes(self.encoder, [image for image, _ in new], [box for _, box in new])
        start = 0
        for i, of_image in laid.items():
            count = len(of_image) - known[i]
            emb_of = torch.cat([embedding.pooled[i : i + known[i]], crops[start : start + count]])
            start += count
            rows = (owner == i).nonzero().squeeze(1)
            scores[rows], best = (phrase_emb[rows].float() @ emb_of.T).max(dim=1)
            boxes[rows], emb[rows] = boxes.new_tensor(of_image)[best], emb_of[best]
        return Regions(boxes, scores, emb)


class Dense(Localiser):
    """The encoder's own patch map: one forward pass gives the image and all its regions.

    The region's embedding is the mean of the patch embeddings, weighted by the softmax of their cosines with
    the phrase. The box is drawn around the connected part of the map that holds the best patch. A CLIP
    trained on captions alone has a weak patch map: look at `heatmap` before trusting the boxes.

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

    needs_patches = True

    def __init__(
        self, encoder: Encoder, temperature: float | None = None, level: float = LOCALISERS["dense"]["level"]
    ) -> None:
        if encoder.patch_grid is None:
            # Raises the error that names the ways out.
            encoder.embed_pixels(torch.zeros(1, 3, *encoder.image_size), patches=True)
        if (temperature is not None and temperature <= 0) or not 0 <= level < 1:
            raise InputError(
                f"dense: got temperature {temperature} and level {level}; expected > 0 and [0, 1)"
            )
        # as it was given: the encoder's own temperature goes with the encoder's fingerprint
        settings = localiser_settings("dense", {"temperature": temperature, "level": level})
        super().__init__(encoder, settings)
        self.level = level
        self.temperature = 1 / encoder.logit_scale if temperature is None else temperature

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):  # types: see Localiser
        """See `Localiser.locate`."""
        if embedding.patches is None:
            raise InputError(
                "dense: the images were embedded without patches; use encode_images(..., patches=True)"
            )
        grid = self.encoder.patch_grid or (1, 1)
        device = embedding.pooled.device
        boxes, scores, emb = _empty(len(owner), phrase_emb.shape[1], device)
        for index in owner.unique().tolist():  # by image: patches repeated for each phrase would be large
            rows = (owner == index).nonzero().squeeze(1)
            width, height = images[index].size
            frame = self.encoder.frame(width, height)
            patches = embedding.patches[index]
            cosine = phrase_emb[rows].float() @ patches.T
            cosine = cosine.masked_fill(~inside(grid, frame, width, height).to(device), -math.inf)
            weight = (cosine / self.temperature).softmax(dim=1)
            emb[rows] = F.normalize(weight @ patches, dim=1)
            scores[rows] = (emb[rows] * phrase_emb[rows]).sum(dim=1)
            cells = peak_boxes(cosine.reshape(-1, *grid), self.level)
            boxes[rows] = cells_to_pixels(cells, grid, frame, width, height)
        return Regions(boxes, scores, emb)


class BoxLocaliser(Localiser):
    """Localiser from boxes: the base of the object detectors, and of what a user writes.

    Parameters
    ----------
    encoder : Encoder
        Embeds what is in the boxes.
    finder : object
        With ``boxes(image, phrases)``, which returns for each phrase ``(x0, y0, x1, y1, score)`` in pixels of
        the image, or None where it is not found: then the whole image stands for it with score 0. And with a
        ``version`` or ``fingerprint()``, see `itemkit.models.Models`.
    """

    needs_phrases = True

    def __init__(self, encoder: Encoder, finder: Any) -> None:
        self.encoder, self.finder = encoder, finder

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):  # types: see Localiser
        """See `Localiser.locate`."""
        kind = type(self.finder).__name__
        if phrases is None or len(phrases) != len(owner):
            got = "none" if phrases is None else str(len(phrases))
            raise InputError(
                f"{kind} reads the phrases: expected phrases= with {len(owner)} texts, got {got}"
            )
        boxes, scores, _ = _empty(len(owner), 0, embedding.pooled.device)
        emb = embedding.pooled[owner].clone()  # the fallback: the whole image
        found: list[int] = []
        for index in owner.unique().tolist():
            rows = (owner == index).nonzero().squeeze(1).tolist()
            image = images[index]
            boxes[rows] = boxes.new_tensor([0, 0, *image.size])
            if min(image.size) < 2:  # image processors fail on a line of pixels
                continue
            answers = list(self.finder.boxes(image, [phrases[row] for row in rows]))
            if len(answers) != len(rows):
                raise InputError(
                    f"{kind}.boxes() was given {len(rows)} phrases and returned {len(answers)} boxes"
                )
            for row, answer in zip(rows, answers, strict=True):
                if answer is None:
                    continue
                *corners, score = (float(value) for value in answer)
                limits = (*image.size, *image.size)
                x0, y0, x1, y1 = (
                    min(max(value, 0.0), limit) for value, limit in zip(corners, limits, strict=True)
                )
                if x1 > x0 and y1 > y0:
                    boxes[row], scores[row] = boxes.new_tensor([x0, y0, x1, y1]), score
                    found.append(row)
        if found:
            crops = [images[int(owner[row])] for row in found]
            emb[found] = embed_boxes(self.encoder, crops, [tuple(boxes[row].tolist()) for row in found])
        return Regions(boxes, scores, emb)

    def fingerprint(self) -> dict[str, Any]:
        """See `Localiser.fingerprint`."""
        return part_fingerprint("localiser", self.finder) or {}


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
        The last two are object detectors of transformers: pass ``model=`` a folder or hub name.
    encoder : Encoder
        Embeds the regions.
    **options
        Of the localiser's class.

    Raises
    ------
    InputError
        Unknown name or option, or the encoder has no patches for "dense".
    """
    check_localiser(name, options)
    if "model" in LOCALISERS[name]:
        from itemkit.detection import load_detector

        return load_detector(name, encoder, **options)
    return {"whole": Whole, "grid": Grid, "dense": Dense}[name](encoder, **options)
