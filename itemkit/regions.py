"""Third step of the method: where in the image each semantic object is, and the embedding of that region.

Rule for an object that is not there: `whole`, `grid` and `dense` always return their best region; its cosine
with the phrase says how good it is. An object detector that finds nothing above its threshold returns a
stand-in, the whole image, and says so (`Regions.found`). So every phrase has exactly one region; a caption
without objects has none, and what that means is decided where features are pooled (`misalignment`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from itemkit.encoder import stack_pixels
from itemkit.errors import InputError
from itemkit.models import GRID_MAX_STEPS, LOCALISERS, localiser_settings, part_fingerprint

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL.Image import Image

    from itemkit.encoder import Encoder, ImageEmbedding

Box = tuple[float, float, float, float]
DENSE_CELLS = 2**24  # numbers that "dense" holds at once for its maps, and for its embeddings


@dataclass(frozen=True)
class Regions:
    """One region per phrase."""

    boxes: Tensor  # float32 (m, 4): x0, y0, x1, y1 in pixels of the original image
    scores: Tensor  # float32 (m,): confidence of an object detector; NaN of localisers that have none
    emb: Tensor  # float32 (m, d): L2-normalised, in the joint space
    found: Tensor  # bool (m,): False where no box was found and the region is a stand-in


class Localiser(ABC):
    """Finds phrases in images, with the options of `models.LOCALISERS`; the base of all localisers."""

    kind = ""
    needs_patches = False  # whether `embedding` must come with patches
    needs_phrases = False  # whether the phrases themselves are read, not only their embeddings
    needs_images = True  # whether the pixels of images are looked at, not only their sizes

    def __init__(self, encoder: Encoder, **options: Any) -> None:
        self.encoder, self.settings = encoder, localiser_settings(self.kind, options)

    @abstractmethod
    def locate(
        self,
        images: Sequence[Image],
        embedding: ImageEmbedding,
        phrase_emb: Tensor,
        owner: Tensor,
        phrases: Sequence[str] | None = None,
    ) -> Regions:
        """Locate phrase j, with embedding ``phrase_emb[j]`` of norm 1, in image ``owner[j]``.

        ``embedding`` is that of the images; ``phrases`` are given to localisers with `needs_phrases`.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the regions, as JSON-ready values."""
        return dict(self.settings)


def windows(size: tuple[int, int], scales: Sequence[float], overlap: float) -> list[Box]:
    """Square windows that cover an image of this width and height evenly.

    >>> windows((40, 40), [1.0, 0.5], 0.0)[1:]
    [(0.0, 0.0, 20.0, 20.0), (20.0, 0.0, 40.0, 20.0), (0.0, 20.0, 20.0, 40.0), (20.0, 20.0, 40.0, 40.0)]
    """
    found: list[Box] = []
    for scale in scales:
        side = max(1, round(scale * min(size)))
        step = max(1.0, side * (1 - overlap))
        starts = []
        for length in size:
            count = min(math.ceil((length - side) / step) + 1, GRID_MAX_STEPS)
            starts.append([float(round(i * (length - side) / max(1, count - 1))) for i in range(count)])
        found += [(x, y, x + side, y + side) for y in starts[1] for x in starts[0]]
    return list(dict.fromkeys(found))


def embed_boxes(encoder: Encoder, images: Sequence[Image], boxes: Sequence[Box]) -> Tensor:
    """Embed what each box of an image holds, at least one pixel: float32 tensor, shape (len(boxes), d)."""
    size = 32 if torch.device(encoder.device).type == "cpu" else 256  # on a CPU more was slower
    emb = [torch.zeros(0, encoder.dim, device=encoder.device)]
    for start in range(0, len(boxes), size):  # cut out batch by batch: all at once would be large
        crops = []
        part = slice(start, start + size)
        for image, (x0, y0, x1, y1) in zip(images[part], boxes[part], strict=True):
            left, top = min(int(x0), image.width - 1), min(int(y0), image.height - 1)
            right, bottom = max(left + 1, math.ceil(x1)), max(top + 1, math.ceil(y1))
            crops.append(image.crop((left, top, min(right, image.width), min(bottom, image.height))))
        emb.append(encoder.encode_images(stack_pixels(encoder.preprocess, crops)).pooled)
    return torch.cat(emb)


def peak_boxes(maps: np.ndarray, level: float, frame: ArrayLike, size: ArrayLike) -> np.ndarray:
    """Draw a box around the connected part of each map that holds its peak.

    In ``maps``, shape (m, h, w), values of -inf are outside the image; ``level`` is the cut between the least
    finite (0) and the greatest value (1) of each. ``frame`` is what they cover, see `Encoder.frame`, ``size``
    width and height of the image: of each, or of all. Gives x0, y0, x1, y1 in pixels of the image, clipped to
    it, float32 (m, 4).
    """
    flat = maps.reshape(len(maps), math.prod(maps.shape[1:]))
    high = flat.max(axis=1, keepdims=True)
    low = flat.min(axis=1, keepdims=True, where=np.isfinite(flat), initial=np.inf)
    above = (flat >= low + level * (high - low)).reshape(maps.shape)
    within = np.zeros((3, 3, 3))
    within[1] = scipy.ndimage.generate_binary_structure(2, 1)  # four neighbours, and none in other maps
    parts, _ = scipy.ndimage.label(above, within)
    peaks = parts.reshape(flat.shape)[np.arange(len(maps)), flat.argmax(axis=1)]
    slices = scipy.ndimage.find_objects(parts)
    cells = [(x.start, y.start, x.stop, y.stop) for _, y, x in (slices[peak - 1] for peak in peaks)]
    start, end = np.split(np.asarray(frame, float), 2, axis=-1)
    patch = (end - start) / maps.shape[:0:-1]
    patch, corner, limit = (np.concatenate([x, x], -1).astype(np.float32) for x in (patch, start, size))
    return np.clip(np.array(cells, np.float32).reshape(-1, 4) * patch + corner, 0, limit)


def inside(grid: tuple[int, int], frame: Box, size: tuple[int, int]) -> Tensor:
    """Patches whose centre lies in the image, not in the padding; shape (h * w,)."""
    x0, y0, x1, y1 = frame
    x = x0 + (torch.arange(grid[1]) + 0.5) * (x1 - x0) / grid[1]
    y = y0 + (torch.arange(grid[0]) + 0.5) * (y1 - y0) / grid[0]
    return (((y >= 0) & (y <= size[1]))[:, None] & ((x >= 0) & (x <= size[0]))[None, :]).flatten()


class Whole(Localiser):
    """The whole image for every object: local and global misalignment then differ in the text only."""

    kind = "whole"
    needs_images = False

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):  # types: see Localiser
        """See `Localiser.locate`."""
        found = _empty(len(owner), phrase_emb.shape[1], embedding.pooled.device)
        found.emb[:] = embedding.pooled[owner]
        sides = torch.tensor([(0, 0, *image.size) for image in images], dtype=torch.float32)
        found.boxes[:] = sides.reshape(-1, 4)[owner.cpu()].to(found.boxes)
        return found


class Grid(Localiser):
    """Square windows of several sizes slid over the image; the one with the highest cosine wins.

    ``scales`` are their sides as fractions of the image's shorter side, ``overlap`` is the least share of a
    window that the next one covers again.
    """

    kind = "grid"

    def __init__(self, encoder: Encoder, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.scales, self.overlap = self.settings["scales"], self.settings["overlap"]
        if not self.scales or not all(0 < s <= 1 for s in self.scales) or not 0 <= self.overlap < 1:
            raise InputError(f"grid: got scales {self.scales} and overlap {self.overlap}; expected scales in "
                             "(0, 1] and an overlap in [0, 1)")  # fmt: skip

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):  # types: see Localiser
        """See `Localiser.locate`."""
        laid = {i: windows(images[i].size, self.scales, self.overlap) for i in owner.unique().tolist()}
        crops = [images[i] for i, boxes in laid.items() for _ in boxes]
        emb = embed_boxes(self.encoder, crops, [box for boxes in laid.values() for box in boxes])
        found = _empty(len(owner), phrase_emb.shape[1], emb.device)
        counts = [len(boxes) for boxes in laid.values()]
        for (i, boxes), of_image in zip(laid.items(), emb.split(counts), strict=True):
            rows = owner == i
            best = (phrase_emb[rows].float() @ of_image.T).argmax(dim=1)
            found.boxes[rows], found.emb[rows] = emb.new_tensor(boxes)[best], of_image[best]
        return found


class Dense(Localiser):
    """The encoder's own patch map: one forward pass gives the image and all its regions.

    The region's embedding is the mean of the patch embeddings, weighted by the softmax of their cosines with
    the phrase; its ``temperature``, if not given, is one over the encoder's logit scale, with which its
    cosines were trained. The box is drawn around the connected part of the map that holds the best patch, cut
    at ``level`` between its least (0) and greatest value (1). A CLIP trained on captions alone has a weak
    patch map: look at `heatmap` before trusting the boxes.
    """

    kind = "dense"
    needs_patches, needs_images = True, False

    def __init__(self, encoder: Encoder, **options: Any) -> None:
        # the temperature as it was given: the encoder's own goes with the encoder's fingerprint
        super().__init__(encoder, **options)
        if encoder.patch_grid is None:
            # Raises the error that names the ways out.
            encoder.encode_images(torch.zeros(1, 3, *encoder.image_size), patches=True)
        temperature, self.level = self.settings["temperature"], self.settings["level"]
        if (temperature is not None and temperature <= 0) or not 0 <= self.level < 1:
            raise InputError(f"dense: got temperature {temperature} and level {self.level}; expected > 0 and "
                             "[0, 1)")  # fmt: skip
        self.temperature = 1 / encoder.logit_scale if temperature is None else temperature

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):  # types: see Localiser
        """See `Localiser.locate`."""
        if embedding.patches is None:
            raise InputError("dense: the images were embedded without patches; use patches=True")
        found = _empty(len(owner), phrase_emb.shape[1], embedding.pooled.device)
        grid, sizes = self.encoder.patch_grid or (1, 1), [image.size for image in images]
        frames = {size: self.encoder.frame(*size) for size in set(sizes)}
        masks = {size: inside(grid, frame, size) for size, frame in frames.items()}
        seen = torch.stack([masks[size] for size in sizes]).to(found.emb.device)
        # image by image, as many phrases side by side for each: patches are not repeated for every phrase
        owner = owner.cpu()
        order, counts = owner.argsort(stable=True), owner.bincount(minlength=len(images))
        step = max(1, DENSE_CELLS // (int(counts.max()) * sum(embedding.patches.shape[1:]) or 1))
        parts = counts.split(step)
        rows_of = order.split([int(part.sum()) for part in parts])
        split = zip(rows_of, parts, embedding.patches.split(step), seen.split(step), strict=True)
        for rows, many, patches, mask in split:
            if not len(rows):
                continue
            asked = pad_sequence(phrase_emb[rows].float().split(many.tolist()), batch_first=True)
            real = torch.arange(asked.shape[1]) < many[:, None]
            cosine = (asked @ patches.mT).masked_fill(~mask[:, None], -math.inf)
            emb = (cosine / self.temperature).softmax(dim=2) @ patches
            found.emb[rows] = F.normalize(emb[real], dim=1)
            maps = cosine[real].reshape(-1, *grid).cpu().numpy()
            size = [sizes[i] for i in owner[rows]]
            boxes = peak_boxes(maps, self.level, [frames[x] for x in size], size)
            found.boxes[rows] = torch.from_numpy(boxes).to(found.boxes)
        return found


class BoxLocaliser(Localiser):
    """Regions from boxes: of object detectors, and of what a user writes, see `itemkit.models.Models`.

    An object without a box gets the region of the localiser ``instead``, at first the whole image.
    """

    needs_phrases = True

    def __init__(self, encoder: Encoder, finder: Any) -> None:
        self.encoder, self.finder = encoder, finder
        self.instead: Localiser = Whole(encoder)

    def find(
        self, images: Sequence[Image], phrases: Sequence[Sequence[str]], phrase_emb: Sequence[Tensor]
    ) -> list[list[tuple[Sequence[float] | None, float]]]:
        """Look for some phrases, with their embeddings, in each image: a box or None, and a confidence."""
        kind, found = type(self.finder).__name__, []
        for image, texts in zip(images, phrases, strict=True):
            answers = list(self.finder.boxes(image, list(texts)))
            if len(answers) != len(texts):
                raise InputError(
                    f"{kind}.boxes() was given {len(texts)} phrases and returned {len(answers)} boxes"
                )
            if wrong := [answer for answer in answers if answer is not None and len(answer) != 5]:
                expected = "expected (x0, y0, x1, y1, score), or None where there is none"
                raise InputError(f"{kind}.boxes() returned {wrong[0]!r:.60}; {expected}")
            found.append([(None, 0.0) if answer is None else (answer[:4], answer[4]) for answer in answers])
        return found

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):  # types: see Localiser
        """See `Localiser.locate`."""
        if phrases is None:
            kind = type(self.finder).__name__
            raise InputError(f"{kind} reads the phrases: expected phrases= with {len(owner)} texts, got none")
        rows_of: dict[int, list[int]] = {}
        for row, i in enumerate(owner.tolist()):
            if min(images[i].size) > 1:  # image processors fail on a line of pixels
                rows_of.setdefault(i, []).append(row)
        words = [[phrases[row] for row in rows] for rows in rows_of.values()]
        answers = self.find([images[i] for i in rows_of], words, [phrase_emb[x] for x in rows_of.values()])
        boxes, scores = dict[int, Box](), torch.zeros(len(owner))
        for (i, rows), of_image in zip(rows_of.items(), answers, strict=True):
            for row, (box, score) in zip(rows, of_image, strict=True):
                scores[row] = float(score)
                if box is not None:
                    x0, y0, x1, y1 = np.clip([*map(float, box)], 0, [*images[i].size] * 2).tolist()
                    if x1 > x0 and y1 > y0:
                        boxes[row] = x0, y0, x1, y1
        found, there = _empty(len(owner), phrase_emb.shape[1], embedding.pooled.device), list(boxes)
        found.scores[:], found.found[:] = scores, False
        found.found[there] = True
        found.boxes[there] = torch.tensor([*boxes.values()]).reshape(-1, 4).to(found.boxes)
        crops = [images[i] for i in owner[there].tolist()]
        found.emb[there] = embed_boxes(self.encoder, crops, list(boxes.values()))
        if len(boxes) < len(owner):
            without = ~found.found
            other = self.instead.locate(images, embedding, phrase_emb[without], owner[without])
            found.boxes[without], found.emb[without] = other.boxes, other.emb
        return found

    def fingerprint(self) -> dict[str, Any]:
        """See `Localiser.fingerprint`."""
        return part_fingerprint("localiser", self.finder) or {}


def _empty(m: int, d: int, device: torch.device) -> Regions:
    """Regions to be filled in: of a localiser that has no confidence and finds everything."""
    boxes, emb = torch.zeros(m, 4, device=device), torch.zeros(m, d, device=device)
    scores = torch.full((m,), math.nan, device=device)
    return Regions(boxes, scores, emb, torch.ones(m, dtype=torch.bool, device=device))


def heatmap(patches: Tensor, phrase_emb: Tensor, encoder: Encoder, width: int, height: int) -> np.ndarray:
    """Cosine of every place of an image with a phrase, for drawing.

    Parameters
    ----------
    patches : float tensor, shape (h * w, d)
        Of one image of this width and height, from `Encoder.encode_images`.
    phrase_emb : float tensor, shape (d,)

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
    """Make a localiser by name, with the options that `models.LOCALISERS` has for it.

    Raises
    ------
    InputError
        Unknown name or option, or the encoder has no patches for "dense".
    """
    localiser_settings(name, options)  # refuses what nobody knows
    if "model" in LOCALISERS[name]:
        from itemkit.detection import load_detector

        return load_detector(name, encoder, **options)
    kinds: dict[str, type] = {kind.kind: kind for kind in (Whole, Grid, Dense)}
    return kinds[name](encoder, **options)
