"""The method on one page: caption, semantic objects, embeddings, regions.

``Steps(models)(images) -> Features`` runs them over a batch. The same object serves a million files
(`itemkit.extraction`), a few images in a notebook, and a single verdict, so their numbers agree.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.captions import as_captions, clean_caption
from itemkit.errors import InputError
from itemkit.features import BOX_COLUMNS, Features
from itemkit.models import Models

if TYPE_CHECKING:
    import torch
    from PIL import Image

STEPS = ("decode", "caption", "objects", "texts", "image", "regions", "write")
GENERATED, USER = "generated", "user"


class Steps:
    """The models in the order of the method, over batches of images.

    Parameters
    ----------
    models : Models
    clock : Clock, optional
        Collects seconds per step.
    """

    def __init__(self, models: Models, clock: Clock | None = None) -> None:
        self.models = models
        self.clock = clock or Clock()
        self.texts = TextCache(models.encoder)

    def __call__(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str | None] | None = None,
        pixels: Sequence[torch.Tensor] | None = None,
    ) -> Features:
        """Features of one batch.

        Parameters
        ----------
        images : sequence of n PIL images, RGB
        captions : sequence of str or None, optional
            The user's captions, cleaned by `captions.clean_caption`; where None, one is generated.
        pixels : sequence of n tensors, optional
            The images as preprocessed by the encoder; made here if not given.

        Returns
        -------
        Features
            The table holds what is known without the files: ``caption, caption_source, caption_logprob,
            caption_tokens, n_objects, width, height``.
        """
        import torch

        encoder, n = self.models.encoder, len(images)
        # 1. every image has a caption: its own, or one that the captioner reads off it
        with self.clock("caption"):
            texts, sources, logprobs = self.caption(images, captions)
        # 2. the caption names semantic objects; object k belongs to image owner[k]
        with self.clock("objects"):
            phrases, owner = self.objects(texts)
        # 3. captions and objects go to the joint space ...
        with self.clock("texts"):
            embedded = self.texts.embed([*texts, *phrases])
            caption_emb, phrase_emb = embedded[:n], embedded[n:]
            tokens = encoder.count_tokens(texts)
        # 4. ... and so does the image
        with self.clock("image"):
            if pixels is None:
                pixels = [encoder.preprocess(image) for image in images]
            patches = bool(phrases) and bool(getattr(self.models.localiser, "needs_patches", False))
            embedding = encoder.encode_images(torch.stack(list(pixels)), patches=patches)
            image_emb = as_numpy(embedding.pooled)
        # 5. each object is looked for in its image: a box, and the embedding of what lies in it
        with self.clock("regions"):
            boxes, scores, region_emb = self.regions(images, embedding, phrases, phrase_emb, owner)
        table = pd.DataFrame(
            {
                schema.CAPTION: texts,
                "caption_source": sources,
                schema.CAPTION_LOGPROB: np.asarray(logprobs, dtype=np.float32),
                schema.CAPTION_TOKENS: np.asarray(tokens, dtype=np.int32),
                schema.N_OBJECTS: np.bincount(owner, minlength=n).astype(np.int32),
                "width": np.array([image.width for image in images], dtype=np.int32),
                "height": np.array([image.height for image in images], dtype=np.int32),
            }
        )
        columns = dict(zip(BOX_COLUMNS, [*boxes.T, scores], strict=True))
        objects = pd.DataFrame({"phrase": np.array(phrases, dtype=object), **columns})
        return Features(table, image_emb, caption_emb, region_emb, phrase_emb, owner, objects)

    def caption(
        self, images: Sequence[Image.Image], given: Sequence[str | None] | None = None
    ) -> tuple[list[str], list[str], list[float]]:
        """Captions of images, whose they are (``user`` or ``generated``), and their mean log-probability.

        Parameters
        ----------
        images : sequence of PIL images
        given : sequence of str or None, optional
            The user's captions; where None, one is generated.

        Raises
        ------
        InputError
            Nothing is left of a user's caption, or one is missing and there is no captioner.
        """
        texts = [None if text is None else clean_caption(text) for text in given or [None] * len(images)]
        if "" in texts:
            raise InputError(
                f"nothing that can be read is left of the caption {(given or [])[texts.index('')]!r} without "
                "its links, mentions and emoji; give another, or none to have one generated"
            )
        sources = [GENERATED if text is None else USER for text in texts]
        logprobs = [float("nan")] * len(texts)
        missing = [i for i, text in enumerate(texts) if text is None]
        if missing and self.models.captioner is None:
            raise InputError(
                f"{len(missing)} of {len(texts)} images have no caption and there is no captioner: give "
                "captions, or models with a captioner"
            )
        made = self.models.captioner.caption([images[i] for i in missing]) if missing else []
        for i, caption in zip(missing, as_captions(made, len(missing)), strict=True):
            texts[i] = caption.text.encode("utf-8", "replace").decode()  # not all of Unicode can be stored
            logprobs[i] = getattr(caption, "logprob", float("nan"))
        return [str(text) for text in texts], sources, logprobs

    def objects(self, captions: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """Phrases that the captions name, image by image, and the image of each: int64, shape (m,)."""
        if self.models.parser is None or self.models.localiser is None:
            return [], np.zeros(0, np.int64)  # global features only
        of_each = self.models.parser.objects(captions)
        owner = np.repeat(np.arange(len(captions)), [len(phrases) for phrases in of_each])
        return [phrase for phrases in of_each for phrase in phrases], owner

    def regions(
        self,
        images: Sequence[Image.Image],
        embedding: Any,
        phrases: list[str],
        phrase_emb: np.ndarray,
        owner: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Box (m, 4) in pixels, score (m,) and embedding (m, d) of each object's region.

        Parameters
        ----------
        images : sequence of PIL images
        embedding : encoder.ImageEmbedding
            Of the whole images; with patches if the localiser needs them.
        phrases : list of str, length m
        phrase_emb : float32 array, shape (m, d)
        owner : int64 array, shape (m,)
            Image of each object.
        """
        import torch

        if not phrases:
            d = embedding.pooled.shape[1]
            return np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, d), np.float32)
        localiser, device = self.models.localiser, embedding.pooled.device
        asked: list[Any] = [torch.from_numpy(x).to(device) for x in (phrase_emb, owner)]
        if getattr(localiser, "needs_phrases", False):
            asked.append(phrases)  # an object detector reads the words themselves
        found = localiser.locate(list(images), embedding, *asked)
        return as_numpy(found.boxes), as_numpy(found.scores), as_numpy(found.emb)


class TextCache:
    """Embeddings of the texts met so far: each is encoded once per run, within a bound of memory."""

    def __init__(self, encoder: Any, max_bytes: int = 256 * 2**20) -> None:
        self._encoder = encoder
        # a row, its array object and the text itself
        self._most = max(1, max_bytes // (4 * int(encoder.dim) + 300))
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, float32, shape (n, d)."""
        unique = dict.fromkeys(texts)
        missing = [text for text in unique if text not in self._known]
        if missing:
            new = as_numpy(self._encoder.encode_texts(missing))
            # rows of their own, or one remembered row would keep its whole batch
            self._known.update((text, row.copy()) for text, row in zip(missing, new, strict=True))
        for text in unique:
            self._known.move_to_end(text)
        out = np.zeros((len(texts), self._encoder.dim), np.float32)
        for row, text in zip(out, texts, strict=True):
            row[:] = self._known[text]
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return out


class Clock:
    """Seconds per step; ``current`` is the step at work, so that an error can name where it arose."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STEPS, 0.0)
        self.current = ""

    @contextlib.contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Count the time spent inside towards a step."""
        self.current = step
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start


def as_numpy(x: Any) -> np.ndarray:
    """A float32 array from a tensor on any device or an array."""
    if hasattr(x, "detach"):
        x = x.detach().float().cpu().numpy()
    return np.asarray(x, dtype=np.float32)
