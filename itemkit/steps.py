"""What happens to a batch of decoded images: caption, objects, texts, image, regions.

The same code serves a million files (``pipeline.extract``), a few images in a notebook (``featurise``) and a
single verdict, so their numbers agree.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.captions import CLEAN_VERSION, clean_caption
from itemkit.errors import InputError
from itemkit.features import Features, norms_or_none
from itemkit.store import BOX_COLUMNS, CAPTION_SOURCE, HEIGHT, WIDTH, concat_features

if TYPE_CHECKING:
    import torch
    from PIL import Image

STAGES = ("decode", "caption", "parse", "text", "image", "localise", "write")
GENERATED, USER = "generated", "user"


class Components(Protocol):
    """The models of a run; ``presets.Preset.build`` makes them, a test hands over fakes.

    ``captioner`` may be None where every image has a caption of its own, ``parser`` and ``localiser`` may be
    None for global features only.
    """

    @property
    def captioner(self) -> Any:
        """Images to captions."""

    @property
    def parser(self) -> Any:
        """Captions to phrases."""

    @property
    def encoder(self) -> Any:
        """Images and texts to the joint space."""

    @property
    def localiser(self) -> Any:
        """Phrases to regions."""


@dataclass(frozen=True)
class Models:
    """Components put together by hand."""

    encoder: Any
    captioner: Any = None
    parser: Any = None
    localiser: Any = None


def fingerprint(components: Components, captions: str = "generate") -> dict:
    """Everything about the models that changes the numbers.

    Parameters
    ----------
    components : Components
    captions : {"generate", "user"}
        Where captions come from; with ``"user"`` and no captioner, none is noted. The version of the rules
        that clean users' captions is noted with ``"user"`` only: generated captions are not cleaned.

    Returns
    -------
    dict
        The fingerprint of each component (None where there is none), ready for JSON.
    """
    names = ("captioner", "parser", "encoder", "localiser")
    parts = {name: getattr(components, name, None) for name in names}
    told = {name: None if part is None else part.fingerprint() for name, part in parts.items()}
    told["captions"] = captions
    if captions == USER:
        told["caption_cleaning"] = CLEAN_VERSION
    return told


class Profile:
    """Seconds per stage; ``current`` is the stage at work, so that an error can be told where it arose."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.current = ""

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time spent inside towards a stage."""
        self.current = stage
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


class TextCache:
    """Embeddings of the texts met so far: each is encoded once per run, within a bound of memory."""

    def __init__(self, encoder: Any, max_bytes: int = 256 * 2**20) -> None:
        self._encoder = encoder
        self._max_bytes = max_bytes
        # each row is followed by its length before normalisation
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()
        self.encoded = 0

    def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of texts, shape (n, d), and their lengths before normalisation, (n,); both float32."""
        unique = list(dict.fromkeys(texts))
        missing = [text for text in unique if text not in self._known]
        if missing:
            new = self._encode(missing)
            self.encoded += len(missing)
            # rows of their own, or one kept row would keep its whole batch
            self._known.update((text, row.copy()) for text, row in zip(missing, new, strict=True))
        for text in unique:
            self._known.move_to_end(text)
        out = np.zeros((len(texts), self._encoder.dim + 1), np.float32)
        for row, text in zip(out, texts, strict=True):
            row[:] = self._known[text]
        per_text = 4 * self._encoder.dim + 300  # the row, its array object and the text itself
        while len(self._known) * per_text > self._max_bytes:
            self._known.popitem(last=False)
        return np.ascontiguousarray(out[:, :-1]), out[:, -1].copy()

    def _encode(self, texts: list[str]) -> np.ndarray:
        if hasattr(self._encoder, "embed_texts"):
            unit, norm = map(as_numpy, self._encoder.embed_texts(texts))
        else:  # an encoder of the user's own need not tell lengths
            unit = as_numpy(self._encoder.encode_texts(texts))
            norm = np.full(len(texts), np.nan, np.float32)
        return np.column_stack([unit, norm])


class Stages:
    """The models in the order of the method, over batches.

    Parameters
    ----------
    components : Components
    profile : Profile, optional
        Collects seconds per stage.
    """

    def __init__(self, components: Components, profile: Profile | None = None) -> None:
        self.components = components
        self.profile = profile or Profile()
        self.texts = TextCache(components.encoder)

    def __call__(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str | None] | None = None,
        pixels: Sequence[torch.Tensor] | None = None,
    ) -> Features:
        """Features of one batch.

        Parameters
        ----------
        images : sequence of PIL images, RGB
        captions : sequence of str or None, optional
            The user's captions, see ``captions.cleaning.clean_caption``; where None, one is generated.
        pixels : sequence of tensors, optional
            The images as preprocessed by the encoder; made here if not given.

        Returns
        -------
        Features
            Float32 embeddings; the table holds what is known without the files
            (``caption, caption_source, caption_logprob, caption_tokens, n_objects, width, height``).
        """
        import torch

        models, timed = self.components, self.profile
        n = len(images)
        with timed("caption"):
            texts, sources, logprobs = self._captions(images, captions)
        with timed("parse"):
            hierarchical = models.parser is not None and models.localiser is not None
            phrases = models.parser.objects(texts) if hierarchical else [[] for _ in texts]
            flat = [phrase for of_image in phrases for phrase in of_image]
            counts = np.array([len(of_image) for of_image in phrases], dtype=np.int64)
            owner = np.repeat(np.arange(n), counts)
        with timed("text"):
            # captions and phrases in one go: fewer, larger batches
            both, lengths = self.texts.embed([*texts, *flat])
            caption_emb, phrase_emb = both[:n], both[n:]
            tokens = models.encoder.count_tokens(texts)
        with timed("image"):
            if pixels is None:
                pixels = [models.encoder.preprocess(image) for image in images]
            patches = bool(len(flat)) and bool(getattr(models.localiser, "needs_patches", False))
            embedding = models.encoder.encode_images(torch.stack(list(pixels)), patches=patches)
            image_emb = as_numpy(embedding.pooled)
            image_norm = _norms(embedding, n)
        with timed("localise"):
            boxes, scores = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
            region_emb, region_norm = np.zeros((0, image_emb.shape[1]), np.float32), np.zeros(0, np.float32)
            if flat:
                device = embedding.pooled.device
                asked = [torch.from_numpy(x).to(device) for x in (phrase_emb, owner)]
                if getattr(models.localiser, "needs_phrases", False):
                    asked.append(flat)  # a detector reads the words themselves
                found = models.localiser.locate(list(images), embedding, *asked)
                boxes, scores, region_emb = (as_numpy(x) for x in (found.boxes, found.scores, found.emb))
                region_norm = _norms(found, len(flat))
        table = pd.DataFrame(
            {
                schema.CAPTION: texts,
                CAPTION_SOURCE: sources,
                schema.CAPTION_LOGPROB: np.asarray(logprobs, dtype=np.float32),
                schema.CAPTION_TOKENS: np.asarray(tokens, dtype=np.int32),
                schema.N_OBJECTS: counts.astype(np.int32),
                WIDTH: np.array([image.width for image in images], dtype=np.int32),
                HEIGHT: np.array([image.height for image in images], dtype=np.int32),
            }
        )
        objects = pd.DataFrame({"phrase": np.array(flat, dtype=object)})
        for i, name in enumerate(BOX_COLUMNS):
            objects[name] = boxes[:, i] if i < 4 else scores
        return Features(
            *(table, image_emb, caption_emb, region_emb, phrase_emb, owner, objects),
            image_norm=norms_or_none(image_norm),
            caption_norm=norms_or_none(lengths[:n]),
            region_norm=norms_or_none(region_norm),
            phrase_norm=norms_or_none(lengths[n:]),
        )

    def _captions(
        self, images: Sequence[Image.Image], given: Sequence[str | None] | None
    ) -> tuple[list[str], list[str], list[float]]:
        texts: list[str | None] = list(given) if given is not None else [None] * len(images)
        for i, text in enumerate(texts):
            # a manifest's captions come cleaned already, and cleaning twice changes nothing
            texts[i] = None if text is None else clean_caption(text)
            if texts[i] == "":
                raise InputError(
                    f"nothing that can be read is left of the caption {text!r} without its links, mentions "
                    "and emoji; give another, or none to have one generated"
                )
        missing = [i for i, text in enumerate(texts) if text is None]
        logprobs = [float("nan")] * len(texts)
        sources = [GENERATED if text is None else USER for text in texts]
        if missing:
            if self.components.captioner is None:
                raise InputError(
                    f"{len(missing)} of {len(texts)} images have no caption and there is no captioner: "
                    "give captions, or components with a captioner"
                )
            made = self.components.captioner.caption([images[i] for i in missing])
            for i, caption in zip(missing, made, strict=True):
                texts[i], logprobs[i] = caption.text, caption.logprob
        return [str(text) for text in texts], sources, logprobs


def featurise(
    images: Iterable[Image.Image],
    components: Components,
    captions: Sequence[str | None] | None = None,
    batch_size: int = 32,
) -> Features:
    """Features of images in memory, without a store: for single verdicts, perturbations and experiments.

    Parameters
    ----------
    images : iterable of PIL images, RGB
        Taken batch by batch, so a generator over many images needs little memory.
    components : Components
    captions : sequence of str or None, optional
        The user's captions, one per image; where None, one is generated.
    batch_size : int
        Images per batch; does not change the numbers.

    Returns
    -------
    Features
        Row i is image i.
    """
    stages = Stages(components)
    parts: list[Features] = []
    batch: list[Image.Image] = []
    start = 0

    def run() -> None:
        nonlocal start
        given = None if captions is None else captions[start : start + len(batch)]
        if given is not None and len(given) != len(batch):
            raise InputError(f"got {len(captions or ())} captions for more images; give one per image")
        parts.append(stages(batch, given))
        start += len(batch)

    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            run()
            batch = []
    if batch:
        run()
    if captions is not None and start != len(captions):
        raise InputError(f"got {len(captions)} captions for {start} images; give one per image")
    return concat_features(parts)


def as_numpy(x: Any) -> np.ndarray:
    """A float32 array from a tensor on any device or an array."""
    if hasattr(x, "detach"):
        x = x.detach().float().cpu().numpy()
    return np.asarray(x, dtype=np.float32)


def _norms(source: Any, n: int) -> np.ndarray:
    """Lengths from a model's answer; NaN where it tells none."""
    found = getattr(source, "norm", None)
    return np.full(n, np.nan, np.float32) if found is None else as_numpy(found)


def bad_rows(features: Features) -> np.ndarray:
    """Rows with an embedding that is not finite or not of unit length: a model broke down on that image."""

    def off(x: np.ndarray) -> np.ndarray:
        return ~(np.abs(np.linalg.norm(x.astype(np.float32), axis=1) - 1) < 1e-2)

    bad = off(features.image_emb) | off(features.caption_emb)
    np.logical_or.at(bad, features.owner, off(features.region_emb) | off(features.phrase_emb))
    return np.flatnonzero(bad)
