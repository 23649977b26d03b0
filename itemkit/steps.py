"""The method on one page: caption, semantic objects, embeddings, regions.

``Steps(models)(images) -> Features`` runs them over a batch. The same object serves a million files
(`itemkit.extraction`), a few images in a notebook, and a single verdict, so their numbers agree.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.captions import Caption, as_captions, clean_caption
from itemkit.errors import InputError
from itemkit.features import BOX_COLUMNS, FOUND, Features
from itemkit.models import Models

if TYPE_CHECKING:
    import torch
    from PIL import Image

STEPS = ("decode", "caption", "objects", "texts", "image", "regions", "write")


class Steps:
    """The models in the order of the method, over batches of images; ``clock`` has the seconds of each."""

    def __init__(self, models: Models) -> None:
        self.models, self.clock, self.texts = models, Clock(), TextCache(models.encoder)
        # an image as the encoder takes it: normalised, or before that if it has `resize`
        self.prepare = getattr(models.encoder, "resize", None) or models.encoder.preprocess

    def __call__(
        self, images: Sequence[Image.Image], captions: Sequence[str | None] | None = None
    ) -> Features:
        """Features of one batch.

        Parameters
        ----------
        images : sequence of n PIL images, RGB
        captions : sequence of str or None, optional
            The user's, cleaned by `captions.clean_caption`; where None, one is generated.

        Returns
        -------
        Features
            The table holds what is known without the files: ``caption, caption_source, caption_logprob,
            caption_tokens, n_objects, width, height``.

        Raises
        ------
        InputError
            Nothing is left of a user's caption, or one is missing and there is no captioner.
        """
        *_, features = self.in_two(images, captions)
        return features

    def in_two(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str | None] | None = None,
        pixels: Sequence[Any] | None = None,
        shown: Sequence[Any] | None = None,
    ) -> Iterator[Any]:
        """Pause once the image tower is set to work: a GPU can be given the next batch before the rest of it.

        Yields None, then the features. ``pixels`` and ``shown`` are the images as `prepare` and the
        captioner's ``preprocess`` make them; made here if not given.
        """
        import torch

        encoder, localiser, n = self.models.encoder, self.models.localiser, len(images)
        captions = captions or [None] * n
        # 1. every image has a caption: its own, or one that the captioner reads off it
        with self.clock("caption"):
            sentences = self._captions(shown or images, captions)
            texts = [caption.text for caption in sentences]
        # 2. the image goes to the joint space
        with self.clock("image"):
            pixels = [self.prepare(image) for image in images] if pixels is None else pixels
            patches = bool(getattr(localiser, "needs_patches", False))
            whole = encoder.encode_images(stack(pixels), patches=patches)
        yield None
        # 3. the caption names semantic objects; object k belongs to image owner[k]
        with self.clock("objects"):
            parser = None if localiser is None else self.models.parser  # for global features no objects
            named = [()] * n if parser is None else parser.objects(texts)
            phrases = [phrase for of_image in named for phrase in of_image]
            owner = np.repeat(np.arange(n), [len(of_image) for of_image in named])
        # 4. ... and so do the caption and the objects
        with self.clock("texts"):
            embedded = self.texts.embed([*texts, *phrases])
            caption_emb, phrase_emb = embedded[:n], embedded[n:]
            tokens = encoder.count_tokens(texts)
        # 5. each object is looked for in its image: a box, a confidence, and the embedding of what lies in it
        with self.clock("regions"):
            found = np.zeros((0, 4)), np.zeros(0), np.zeros((0, encoder.dim)), np.zeros(0)
            if phrases:
                wanted = [torch.from_numpy(x).to(whole.pooled.device) for x in (phrase_emb, owner)]
                words = [phrases] if getattr(localiser, "needs_phrases", False) else []  # also read
                regions = localiser.locate(list(images), whole, *wanted, *words)
                found = regions.boxes, regions.scores, regions.emb, regions.found
            boxes, scores, region_emb, seen = map(as_numpy, found)
        table = pd.DataFrame(
            {
                schema.CAPTION: texts,
                "caption_source": ["generated" if text is None else "user" for text in captions],
                schema.CAPTION_LOGPROB: np.array([caption.logprob for caption in sentences], np.float32),
                schema.CAPTION_TOKENS: np.asarray(tokens, dtype=np.int32),
                schema.N_OBJECTS: np.bincount(owner, minlength=n).astype(np.int32),
                "width": np.array([image.width for image in images], dtype=np.int32),
                "height": np.array([image.height for image in images], dtype=np.int32),
            }
        )
        columns = dict(zip(BOX_COLUMNS, [*boxes.T, scores], strict=True)) | {FOUND: seen.astype(bool)}
        objects = pd.DataFrame({"phrase": np.array(phrases, dtype=object), **columns})
        yield Features(table, as_numpy(whole.pooled), caption_emb, region_emb, phrase_emb, owner, objects)

    def _captions(self, images: Sequence[Image.Image], given: Sequence[str | None]) -> list[Caption]:
        missing = [image for image, text in zip(images, given, strict=True) if text is None]
        if missing and self.models.captioner is None:
            raise InputError(f"{len(missing)} of {len(images)} images have no caption; there is no captioner")
        made = self.models.captioner.caption(missing) if missing else []
        generated = iter(as_captions(made, len(missing)))
        found = [next(generated) if text is None else Caption(clean_caption(text)) for text in given]
        for caption, text in zip(found, given, strict=True):
            if text is not None and not caption.text:
                raise InputError(
                    f"nothing that can be read is left of the caption {text!r} without its links, mentions "
                    "and emoji; give another, or none to have one generated"
                )
        return found


class TextCache:
    """Embeddings of the texts met so far: each is encoded once, until the bound of memory is reached."""

    def __init__(self, encoder: Any, max_bytes: int = 256 * 2**20) -> None:
        self._encoder, self._known = encoder, dict[str, np.ndarray]()
        self._most = max_bytes // (4 * int(encoder.dim) + 300)  # a row, its array object and the text itself

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, float32, shape (n, d)."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            new = as_numpy(self._encoder.encode_texts(missing))
            # rows of their own, or one remembered row would keep its whole batch
            self._known |= {text: row.copy() for text, row in zip(missing, new, strict=True)}
        rows = [self._known[text] for text in texts]
        if len(self._known) > self._most:
            self._known.clear()
        return np.array(rows, np.float32).reshape(len(texts), self._encoder.dim)


class Clock:
    """Seconds per step; ``current`` is the step at work, so that an error can name where it arose."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self.current = ""

    @contextlib.contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Count the time spent inside towards a step."""
        self.current, start = step, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start


def stack(pixels: Sequence[Any]) -> torch.Tensor:
    """One batch (n, 3, h, w) of what `Steps.prepare` made: float (3, h, w) or, as uint8, (h, w, 3)."""
    import torch

    if isinstance(pixels[0], np.ndarray):
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return torch.stack(list(pixels))


def as_numpy(x: Any) -> np.ndarray:
    """A float32 array from a tensor on any device or an array."""
    if hasattr(x, "detach"):
        x = x.detach().float().cpu().numpy()
    return np.asarray(x, dtype=np.float32)
