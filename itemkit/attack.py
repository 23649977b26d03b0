"""Attacks on the method: pixels within a budget of grey levels, captions within a budget of words.

What a gradient reaches is a module from pixels to a number for each image: `Pipeline` (encoder, misalignment,
head; caption, objects and boxes stay as they are), `Said` (the captioner and a sentence of the attacker's
choice), `Noticed` (an object detector). `pgd` lowers any such number, or a sum of them; `over` takes its mean
over what happens to images on their way. What no gradient reaches (decoding a sentence, parsing it, choosing
a box) is done anew between two rounds, and by whoever judges the result.

The loop of `pgd` is our own, 15 lines. Of the libraries, torchattacks 3.5.1 wants requests 2.25, six years
old; autoattack is in no package index; foolbox 3.3.4 brings GitPython. adversarial-robustness-toolbox 1.20.1
fits, with our number as two logits, and reached the same values on the same function; but the adapter is as
long as the loop, it returns the last point instead of the best, and its points are no whole grey levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from itemkit.encoder import Encoder
from itemkit.errors import InputError
from itemkit.features import BOX_COLUMNS, Features
from itemkit.images import load_image
from itemkit.misalignment import Representation, pool
from itemkit.regions import Dense, inside
from itemkit.steps import Steps, as_numpy

if TYPE_CHECKING:
    from itemkit.captions import Captioner
    from itemkit.detection import ImageAlone
    from itemkit.detector import Detector
    from itemkit.head import MisalignmentMLP
    from itemkit.models import Models
    from itemkit.network import TrainedHead

Loss = Callable[[Tensor], Tensor]  # pixels (n, 3, h, w) in [0, 1] -> a number for each image (n,)
Sizes = Sequence[tuple[int, int]]  # width and height of each image
Cut = tuple[int, tuple[int, int, int, int]]  # which image; left, top, right, bottom in its pixels

# -- images as numbers that have gradients ------------------------------------------------------------------


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """8-bit RGB images as float32 (n, 3, h, w) in [0, 1]; right of and below smaller ones are zeros."""
    height, width = max(image.height for image in images), max(image.width for image in images)
    pixels = torch.zeros(len(images), 3, height, width)
    for row, image in zip(pixels, images, strict=True):
        values = torch.from_numpy(np.array(image.convert("RGB")))
        row[:, : image.height, : image.width] = values.permute(2, 0, 1)
    return pixels / 255


def to_images(pixels: Tensor, sizes: Sizes) -> list[Image.Image]:
    """8-bit images of these widths and heights: the inverse of `to_pixels`, values rounded."""
    values = (pixels.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(x[:height, :width]) for x, (width, height) in zip(values, sizes, strict=True)]


def seen(
    pixels: Tensor,
    cuts: Sequence[Cut],
    prepare: Callable[[Image.Image], Tensor],
    deviation: Any,
    frame: Callable[[int, int], tuple[float, ...]] = lambda *size: (0, 0, *size),
) -> Tensor:
    """What a model is shown of some cuts of the images, (len(cuts), 3, h, w): exact, and with a gradient.

    The numbers are those that its own ``prepare`` makes of the 8-bit cut, bit for bit. As Pillow has no
    gradient, that of a bicubic resize of the same ``frame`` (`Encoder.frame`) and of the division by
    ``deviation`` stands in for it in the backward pass (Athalye et al. 2018, arXiv 1802.00420).
    """
    hard, soft = [], []
    for i, (left, top, right, bottom) in cuts:
        part, (width, height) = pixels[i : i + 1, :, top:bottom, left:right], (right - left, bottom - top)
        hard.append(prepare(*to_images(part, [(width, height)])))
        x0, y0, x1, y1 = map(round, frame(width, height))
        part = F.pad(part, (-x0, x1 - width, -y0, y1 - height))
        soft.append(F.interpolate(part, size=hard[-1].shape[-2:], mode="bicubic", antialias=True))
    smooth = torch.cat(soft) / torch.as_tensor(deviation, device=pixels.device).reshape(3, 1, 1)
    return smooth + (torch.stack(hard).to(smooth) - smooth).detach()


def wholes(sizes: Sizes) -> list[Cut]:
    """Cuts that are the images themselves."""
    return [(i, (0, 0, *size)) for i, size in enumerate(sizes)]


# -- the stages ---------------------------------------------------------------------------------------------

# `misalignment.FORMS` for tensors; the tests hold them against each other
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, b: (a * b).sum(1, keepdim=True),
    "distance": lambda a, b: 1 - (a * b).sum(1, keepdim=True),
    "difference": torch.sub,
    "absolute": lambda a, b: (a - b).abs(),
    "product": torch.mul,
    "concat": lambda a, b: torch.cat([a, b], dim=1),
}


def log_odds(head: MisalignmentMLP | TrainedHead, x: Tensor) -> Tensor:
    """Log-odds (n,) that a trained head gives for vectors (n, k), with their gradient."""
    mean, scale = (torch.from_numpy(values).to(x.device) for values in (head.mean_, head.scale_))
    return head.net_((x - mean) / scale).mean(0)


class Pipeline:
    """The method from pixels to log-odds of fake, (n,), with each image's caption, objects and boxes fixed.

    Parameters
    ----------
    models : Models
        The encoder must be one of `itemkit.encoder`.
    features : Features
        Of the images, with widths and heights; from `steps.Steps` or `read_with`.
    detector : Detector, optional
        Without it the number is minus the mean of the global and the mean local cosine: what an attacker can
        use who knows the method and no head.
    """

    def __init__(self, models: Models, features: Features, detector: Detector | None = None) -> None:
        if not isinstance(models.encoder, Encoder):
            kind = type(models.encoder).__name__
            raise InputError(f"the encoder is a {kind}; gradients need one that itemkit.encoder loaded")
        self.encoder, self.localiser, self.detector = models.encoder, models.localiser, detector
        self.sizes = _sizes(features)
        self.representation = Representation("cosines") if detector is None else detector.representation
        # an image without objects is its own only object: its region is the whole, its phrase the caption
        _, phrases, owner, kept = self.representation._objects(features)
        boxes = features.objects[list(BOX_COLUMNS[:4])].to_numpy(float)[kept]
        self.owner, self.own = owner, owner[len(boxes) :]
        self.wholes = wholes(self.sizes)
        self.cuts: list[Cut] = [
            (i, _whole_pixels(box, self.sizes[i])) for i, box in zip(owner.tolist(), boxes, strict=False)
        ]
        device = self.encoder.device
        self.caption_emb, self.phrase_emb = (
            torch.from_numpy(x).to(device) for x in (features.caption_emb, phrases)
        )

    def embed(self, pixels: Tensor, cuts: Sequence[Cut], patches: bool = False) -> Any:
        """Cuts of the images in the joint space, (len(cuts), d); with their patches if asked for."""
        encoder = self.encoder
        shown = seen(pixels, cuts, encoder.preprocess, encoder._scale[2], encoder.frame).to(encoder.dtype)
        if not patches:
            return F.normalize(encoder.model.encode_image(shown).float(), dim=-1)
        return [F.normalize(x.float(), dim=-1) for x in encoder._patch_pass(shown)]  # type: ignore[misc]

    def whole(self, pixels: Tensor) -> Tensor:
        """The images in the joint space, (n, d): all that a detector without captions looks at."""
        return self.embed(pixels, self.wholes)

    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Pipeline`."""
        n, many = len(self.wholes), len(self.cuts)
        if isinstance(self.localiser, Dense):
            whole, patches = self.embed(pixels, self.wholes, patches=True)
            regions = self._dense(patches, self.phrase_emb[:many])
        else:
            whole, regions = self.embed(pixels, [*self.wholes, *self.cuts]).split([n, many])
        x = self._represent(whole, torch.cat([regions, whole[self.own]]))
        if self.detector is None:  # global, mean local, worst local
            return -x[:, :2].mean(dim=1)
        return log_odds(self.detector.head_, x)

    def _dense(self, patches: Tensor, phrases: Tensor) -> Tensor:
        """Regions of localiser "dense": the patches, weighted by their cosines with the phrase."""
        grid, rows = self.encoder.patch_grid or (1, 1), self.owner[: len(phrases)]
        mask = torch.stack([inside(grid, self.encoder.frame(*size), size) for size in self.sizes])[rows]
        of_phrase = patches[rows]
        cosine = (of_phrase @ phrases[:, :, None])[..., 0].masked_fill(~mask.to(patches.device), -math.inf)
        weights = (cosine / self.localiser.temperature).softmax(dim=1)
        return F.normalize((weights[:, None] @ of_phrase)[:, 0], dim=1)

    def _misalign(self, level: str, a: Tensor, b: Tensor) -> Tensor:
        """Cosine and, behind it, misalignment of pairs, relative or not; as `Representation` has them."""
        config = self.representation.config
        pairs = torch.cat([FORMS["cosine"](a, b), FORMS[config.kind](a, b)], dim=1)
        if not config.relative:
            return pairs
        of_reals = torch.from_numpy(self.representation.reals[level]).to(b)
        expected = b @ of_reals[:-1] + of_reals[-1]
        return (pairs - expected[:, :-1]) / expected[:, -1:].exp()

    def _represent(self, whole: Tensor, regions: Tensor) -> Tensor:
        config, n, m = self.representation.config, len(whole), len(regions)
        of_whole = self._misalign("global", whole, self.caption_emb)[:, 1:]
        if config.level == "global":
            return of_whole
        local = self._misalign("local", regions, self.phrase_emb)
        # `pool` only weighs and adds, so of unit vectors it gives the weights; these have no gradient
        cosine = as_numpy(local[:, 0])
        weights = pool(np.eye(m, dtype=np.float32), self.owner, n, config.pooling, cosine=cosine)
        pooled = (torch.from_numpy(weights.reshape(n, -1, m)).to(local) @ local[:, 1:]).flatten(1)
        if config.level == "local":
            return pooled
        return of_whole + pooled if config.fuse == "sum" else torch.cat([of_whole, pooled], dim=1)


def _whole_pixels(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels that a box touches, at least one; as `regions.embed_boxes` cuts them out."""
    left, top = min(int(box[0]), size[0] - 1), min(int(box[1]), size[1] - 1)
    right, bottom = max(left + 1, math.ceil(box[2])), max(top + 1, math.ceil(box[3]))
    return left, top, min(right, size[0]), min(bottom, size[1])


class Said:
    """How unlikely a captioner finds a sentence for each image: mean of -log p of its tokens, (n,).

    Each token is asked for behind the true ones before it (teacher forcing), so the whole sentence has a
    gradient; minus this number is what `captions.Caption.logprob` is for a sentence that was generated.
    """

    def __init__(self, captioner: Captioner, captions: Sequence[str], sizes: Sizes) -> None:
        model = captioner.model
        if type(model).__name__ != "BlipForConditionalGeneration":
            raise InputError(f"the captioner is a {type(model).__name__}; this attack knows BLIP alone")
        self.captioner, self.wholes = captioner, wholes(sizes)
        most = model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        found = captioner.tokenizer(list(captions), **options).to(model.device)
        self.ids, self.mask = found.input_ids, found.attention_mask
        self.ids[:, 0] = model.config.text_config.bos_token_id  # BERT's tokenizer begins with another

    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Said`."""
        model, prepare = self.captioner.model, self.captioner.preprocess
        deviation = getattr(prepare.args[0], "image_processor", prepare.args[0]).image_std
        shown = seen(pixels, self.wholes, lambda image: prepare(image)["pixel_values"][0], deviation)
        states = model.vision_model(pixel_values=shown.to(model.device, model.dtype)).last_hidden_state
        asked = {"input_ids": self.ids, "attention_mask": self.mask, "encoder_hidden_states": states}
        logits = model.text_decoder(**asked).logits[:, :-1].float()
        surprise = F.cross_entropy(logits.transpose(1, 2), self.ids[:, 1:], reduction="none")
        counted = self.mask[:, 1:]
        return (surprise * counted).sum(1) / counted.sum(1)


class Noticed:
    """How sure a detector of `detection.ImageAlone` is of the best box of each object: mean log, (n,)."""

    def __init__(self, localiser: ImageAlone, features: Features) -> None:
        self.localiser, self.wholes = localiser, wholes(_sizes(features))
        phrases, emb = features.objects["phrase"].tolist(), torch.from_numpy(features.phrase_emb)
        known = localiser.classes_of(phrases, emb.to(localiser.encoder.device))
        self.classes: list[list[int]] = [[] for _ in self.wholes]
        for i, k in zip(features.owner.tolist(), known, strict=True):
            self.classes[i] += [] if k is None else [k]

    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Noticed`."""
        localiser, processor, found = self.localiser, self.localiser.processor, []

        def prepare(image: Image.Image) -> Tensor:
            return processor(images=[image], return_tensors="pt")["pixel_values"][0]

        for cut, classes in zip(self.wholes, self.classes, strict=True):
            shown = seen(pixels, [cut], prepare, processor.image_std)
            logits = localiser.model(pixel_values=shown.to(localiser.device, localiser.dtype)).logits[0]
            sure = localiser.confidence(logits.float(), classes or [0]).amax(dim=0)
            found.append(sure.clamp(min=1e-6).log().mean() * bool(classes))
        return torch.stack(found)


def _sizes(features: Features) -> Sizes:
    return list(features.table[["width", "height"]].itertuples(index=False, name=None))


# -- pixels -------------------------------------------------------------------------------------------------


@torch.enable_grad()
def pgd(loss: Loss, pixels: Tensor, eps: int, steps: int = 10, seed: int = 0) -> Tensor:
    """Lower a loss of each image by moving each of its values by at most ``eps`` grey levels of 255.

    Projected gradient descent from a random start, steps of 2.5 eps / steps (Madry et al. 2018, arXiv
    1706.06083). Only whole grey levels are ever tried, so that an 8-bit file keeps both budget and effect.

    Parameters
    ----------
    loss : callable
        See `Loss`; it may be random, as of `over`.
    pixels : float tensor, shape (n, 3, h, w)
        From `to_pixels`.

    Returns
    -------
    float tensor like ``pixels``
        The best that was met of each image, the original included.
    """
    start = (pixels * 255).round()
    low, high = (start - eps).clamp(min=0), (start + eps).clamp(max=255)
    noise = torch.rand(start.shape, generator=torch.Generator().manual_seed(seed)).to(start.device)
    best, least = start, torch.full((len(start),), math.inf, device=start.device)
    x = start
    for step in range(steps + 2):  # the original, then the random start and the steps from it
        x = x.detach().requires_grad_()
        whole = x + (x.round() - x).detach()  # rounded; the gradient passes straight through
        value = loss(whole / 255)
        better = value.detach().to(least) < least
        best = whole.detach().where(better[:, None, None, None], best)
        least = value.detach().to(least).where(better, least)
        if step == 0:
            x = start + eps * (2 * noise - 1)
        elif step <= steps:
            (slope,) = torch.autograd.grad(value.sum(), x)
            x = x.detach() - 2.5 * eps / steps * slope.sign()
        x = x.detach().clamp(low, high)
    return best / 255


def over(loss: Loss, transforms: Sequence[Callable[..., Image.Image]], sizes: Sizes) -> Loss:
    """Mean of a loss over transforms of the images, e.g. of `perturb`, which must keep their sizes.

    Each call draws anew. The forward pass is the real thing, JPEG included; as that has no gradient, the
    backward pass takes it for the identity (Athalye et al. 2018, arXiv 1707.07397 and 1802.00420).
    """
    calls = iter(range(2**62))

    def mean(pixels: Tensor) -> Tensor:
        total, call = torch.zeros(len(pixels), device=pixels.device), next(calls)
        for transform in transforms:
            shown = [transform(x, f"{call} {i}") for i, x in enumerate(to_images(pixels, sizes))]
            total = total + loss(pixels + (to_pixels(shown).to(pixels) - pixels).detach())
        return total / len(transforms)

    return mean


def signed(loss: Loss, sign: Tensor) -> Loss:
    """The same loss, turned round for the images whose sign (n,) is -1: a fake is to sink, a real to rise."""
    return lambda pixels: (value := loss(pixels)) * sign.to(value)


def escalate(
    make: Callable[[np.ndarray, list[Image.Image], int], Loss],
    images: Sequence[Image.Image],
    judge: Callable[[list[Image.Image], np.ndarray], pd.DataFrame],
    budgets: Sequence[int],
    steps: int,
    folder: Path,
    seed: int = 0,
) -> tuple[pd.DataFrame, list[Image.Image]]:
    """Attack images with growing budgets, each until it is won.

    What is won within a small budget is won within a larger one, so only the others are tried again.

    Parameters
    ----------
    make : callable
        From positions of images, the last attempts at them and the budget to what is to be lowered.
    judge : callable
        From attacked images, read from PNG files in ``folder``, and their positions to a table with a column
        ``won``, row by row.

    Returns
    -------
    DataFrame
        What ``judge`` said of every attempt, with ``image`` and ``eps``.
    list of images
        The last attempt at each.
    """
    left, tries, found = np.arange(len(images)), list(images), []
    folder.mkdir(parents=True, exist_ok=True)
    for eps in budgets:
        if not len(left):
            break
        some = [images[i] for i in left.tolist()]
        moved = pgd(make(left, [tries[i] for i in left.tolist()], eps), to_pixels(some), eps, steps, seed)
        for i, image in zip(left.tolist(), to_images(moved, [image.size for image in some]), strict=True):
            image.save(folder / f"{i}.png")
            tries[i] = load_image(folder / f"{i}.png")
        table = judge([tries[i] for i in left.tolist()], left)
        found.append(table.assign(image=left, eps=eps))
        left = left[~table["won"].to_numpy(bool)]
    return pd.concat(found, ignore_index=True), tries


# -- captions -----------------------------------------------------------------------------------------------


def read_with(models: Models, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> Features:
    """Features of each image with each of its captions, image by image: as from `steps.Steps`, but quicker.

    An image is embedded once, and searched once for all that its captions name.
    """
    texts = [text for of_one in captions for text in of_one]
    of_image = np.repeat(np.arange(len(images)), [len(of_one) for of_one in captions])
    whole = None in (models.parser, models.localiser)
    named = [()] * len(texts) if whole else models.parser.objects(texts)
    wanted = [(i, phrase) for i, phrases in zip(of_image.tolist(), named, strict=True) for phrase in phrases]
    of_each = [[phrase for i, phrase in dict.fromkeys(wanted) if i == k] for k in range(len(images))]
    parser = SimpleNamespace(objects=lambda texts: of_each)
    found = Steps(replace(models, parser=parser))(images, ["any"] * len(images))
    row = {key: k for k, key in enumerate(zip(found.owner.tolist(), found.objects["phrase"], strict=True))}
    at = np.array([row[key] for key in wanted], np.int64)
    owner = np.repeat(np.arange(len(texts)), [len(phrases) for phrases in named])
    table = found.table[["width", "height"]].iloc[of_image].reset_index(drop=True).assign(caption=texts)
    caption_emb, objects = as_numpy(models.encoder.encode_texts(texts)), found.objects.iloc[at]
    arrays = found.image_emb[of_image], caption_emb, found.region_emb[at], found.phrase_emb[at]
    return Features(table, *arrays, owner, objects.reset_index(drop=True))


def edit_captions(
    captions: Sequence[str],
    score: Callable[[list[list[str]]], Sequence[np.ndarray]],
    budget: int,
    swaps: Mapping[str, Sequence[str]] | Sequence[str] = (),
    drop: bool = True,
    tries: int = 60,
    seed: int = 0,
) -> list[list[str]]:
    """Search greedily for the captions with the lowest score, at most ``budget`` words away.

    Parameters
    ----------
    captions : sequence of str, one for each image
    score : callable
        From some captions for each image to an array of numbers for each.
    swaps : mapping or sequence of str
        Words that may take a word's place: for each word its own, or the same for all.
    drop : bool
        Whether words may be left out, one or several side by side, such as an object; each counts.
    tries : int
        Captions tried for each image and word of the budget, drawn from all that are possible.

    Returns
    -------
    list of budget + 1 lists of str
        The best captions at each budget, from 0, the captions as they are. One word is left out or replaced
        for each word of the budget: a word-level edit distance.
    """
    rng, best = np.random.default_rng(seed), [list(captions)]
    for k in range(1, budget + 1):
        asked = []
        for i in range(len(captions)):
            near = _one_word_away(best[-1][i], swaps)
            for cost in range(1, k + 1 if drop else 1):
                near += _without(best[k - cost][i], cost)
            near = sorted(set(near) - {best[-1][i]})
            some = rng.permutation(len(near))[: tries - 1]
            asked.append([best[-1][i], *(near[j] for j in sorted(some))])
        found = score(asked)
        best.append([texts[int(np.argmin(numbers))] for texts, numbers in zip(asked, found, strict=True)])
    return best


def _one_word_away(text: str, swaps: Mapping[str, Sequence[str]] | Sequence[str]) -> list[str]:
    words = text.split()
    of_word = swaps.get if isinstance(swaps, Mapping) else lambda word, _: swaps
    return [
        " ".join([*words[:i], other, *words[i + 1 :]])
        for i, word in enumerate(words)
        for other in of_word(word.lower(), ())
    ]


def _without(text: str, count: int) -> list[str]:
    words = text.split()
    starts = range(len(words) - count + 1) if len(words) > count else ()  # something must be left
    return [" ".join(words[:i] + words[i + count :]) for i in starts]
