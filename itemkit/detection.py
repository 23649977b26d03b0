"""Open-vocabulary detectors as localisers: Owlv2 and Grounding DINO, from transformers.

Both give, for every candidate box and every phrase, a confidence; the best box of each phrase is taken.
Images go through one at a time: the detectors pad a batch to its largest image and its longest prompt, and
padding changes the numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import InputError, ModelNotFound
from itemkit.models import (
    UNREADABLE,
    find_folder,
    first_line,
    folder_hash,
    from_disk_only,
    load_transformer,
    quiet,
    tidy,
)
from itemkit.regions import Regions, embed_boxes

if TYPE_CHECKING:
    from PIL.Image import Image

    from itemkit.encoder import Encoder, ImageEmbedding


class ObjectDetector(ABC):
    """A detector that scores boxes for phrases; the base of both localisers."""

    needs_patches, needs_phrases = False, True
    kind = ""

    def __init__(
        self,
        encoder: Encoder,
        model: Any,
        processor: Any,
        threshold: float,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.encoder, self.model, self.processor, self.threshold = encoder, model, processor, threshold
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._record = dict(record or {})

    @abstractmethod
    def detect(self, image: Image, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Give every candidate box (q, 4) in pixels and its confidence for every phrase (q, len(phrases))."""

    def locate(
        self,
        images: Sequence[Image],
        embedding: ImageEmbedding,
        phrase_emb: Tensor,
        owner: Tensor,
        phrases: Sequence[str] | None = None,
    ) -> Regions:
        """See `itemkit.regions.Localiser.locate`."""
        if phrases is None or len(phrases) != len(owner):
            got = "none" if phrases is None else str(len(phrases))
            raise InputError(
                f"{self.kind} reads the phrases: expected phrases= with {len(owner)} texts, got {got}"
            )
        device = embedding.pooled.device
        boxes, scores = torch.zeros(len(owner), 4, device=device), torch.zeros(len(owner), device=device)
        emb = embedding.pooled[owner].clone()  # the fallback: the whole image
        norm = torch.full_like(scores, math.nan) if embedding.norm is None else embedding.norm[owner].clone()
        found: list[int] = []
        for index in owner.unique().tolist():
            rows = (owner == index).nonzero().squeeze(1).tolist()
            width, height = images[index].size
            boxes[rows] = torch.tensor([0.0, 0.0, width, height], device=device)
            if min(width, height) < 2:  # the image processors fail on a line of pixels
                continue
            candidates, confidence = self.detect(images[index], [phrases[row] for row in rows])
            best_score, best = confidence.max(dim=0)
            for row, score, box in zip(rows, best_score.tolist(), candidates[best], strict=True):
                limit = box.new_tensor([width, height, width, height])
                box = torch.minimum(box.clamp(min=0), limit)
                if score >= self.threshold and bool(box[2] > box[0]) and bool(box[3] > box[1]):
                    boxes[row], scores[row] = box.to(device), score
                    found.append(row)
        if found:
            crops = [images[int(owner[row])] for row in found]
            chosen = [tuple(boxes[row].tolist()) for row in found]
            emb[found], norm[found] = embed_boxes(self.encoder, crops, chosen)
        return Regions(boxes, scores, emb, norm)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the regions, as JSON-ready values."""
        return {
            "kind": self.kind,
            "threshold": self.threshold,
            "precision": dtype_name(self.dtype),
            **self._record,
        }

    def _to_device(self, inputs: Any) -> dict[str, Tensor]:
        return {
            k: v.to(self.device, self.dtype) if v.is_floating_point() else v.to(self.device)
            for k, v in inputs.items()
        }


class Owlv2(ObjectDetector):
    """Owlv2: each phrase is a query of its own."""

    kind = "owlv2"

    def detect(self, image: Image, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `ObjectDetector.detect`."""
        with quiet():
            inputs = self.processor(
                images=image.convert("RGB"),
                text=[list(phrases)],
                return_tensors="pt",
                padding="max_length",
                truncation=True,  # its text tower has 16 positions
                max_length=self.model.config.text_config.max_position_embeddings,
            )
        with torch.no_grad():
            out = self.model(**self._to_device(inputs))
        # The processor pads the image to a square at the bottom and on the right.
        side = max(image.size)
        boxes = _corners(out.pred_boxes[0].float()) * side
        return boxes, out.logits[0].float().sigmoid()[:, : len(phrases)]


class GroundingDino(ObjectDetector):
    """Grounding DINO: one prompt for all phrases, "cat. red ball."; the best token speaks for its phrase."""

    kind = "grounding_dino"

    def detect(self, image: Image, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `ObjectDetector.detect`."""
        parts = [
            self._detect(image, phrases[start : start + self._fit(phrases[start:])])
            for start in self._chunks(phrases)
        ]
        # Candidates of different prompts are different boxes: stacked, with no confidence for other prompts.
        total = sum(boxes.shape[0] for boxes, _ in parts)
        confidence = torch.zeros(total, len(phrases), device=self.device)
        row = column = 0
        for _, scores in parts:
            confidence[row : row + scores.shape[0], column : column + scores.shape[1]] = scores
            row, column = row + scores.shape[0], column + scores.shape[1]
        return torch.cat([boxes for boxes, _ in parts]), confidence

    def _detect(self, image: Image, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        prompt, spans = _prompt(phrases)
        with quiet():
            inputs = self.processor(images=image.convert("RGB"), text=prompt, return_tensors="pt")
            offsets = self.processor.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        with torch.no_grad():
            out = self.model(**self._to_device(inputs))
        scores = out.logits[0].float().sigmoid()
        columns = []
        for start, end in spans:
            tokens = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
            columns.append(scores[:, tokens].amax(dim=1) if tokens else scores.new_zeros(len(scores)))
        width, height = image.size
        boxes = _corners(out.pred_boxes[0].float())
        return boxes * boxes.new_tensor([width, height, width, height]), torch.stack(columns, dim=1)

    def _chunks(self, phrases: Sequence[str]) -> list[int]:
        starts, start = [], 0
        while start < len(phrases):
            starts.append(start)
            start += self._fit(phrases[start:])
        return starts

    def _fit(self, phrases: Sequence[str]) -> int:
        """How many phrases fit one prompt; what is beyond the model's text length would be cut silently."""
        room = int(getattr(self.model.config, "max_text_len", 256))
        count = len(phrases)
        while count > 1 and len(self.processor.tokenizer(_prompt(phrases[:count])[0]).input_ids) > room:
            count -= 1
        return count


def _prompt(phrases: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Join phrases into one prompt; a full stop inside a phrase would split it. Also the span of each."""
    prompt, spans = "", []
    for phrase in phrases:
        clean = phrase.replace(".", " ").strip().lower() or "object"
        spans.append((len(prompt), len(prompt) + len(clean)))
        prompt += clean + ". "
    return prompt.strip(), spans


def _corners(boxes: Tensor) -> Tensor:
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def load_owlv2(
    encoder: Encoder,
    model: str | Path = "google/owlv2-base-patch16-ensemble",
    threshold: float = 0.1,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Owlv2:
    """Load Owlv2 from this machine; parameters as in `load_grounding_dino`."""
    network, processor, record = _load(model, device, precision, "owlv2")
    return Owlv2(encoder, network, processor, threshold, record)


def load_grounding_dino(
    encoder: Encoder,
    model: str | Path = "IDEA-Research/grounding-dino-base",
    threshold: float = 0.25,
    device: str | torch.device = "auto",
    precision: str = "float32",
) -> GroundingDino:
    """Load Grounding DINO from this machine.

    Parameters
    ----------
    encoder : Encoder
        Embeds the regions found.
    model : str or Path
        Transformers folder or hub name.
    threshold : float
        Least confidence; below it the whole image is returned with score 0. Default: the detector's own.
    device, precision
        See `itemkit.devices`. The default precision is float32: on a CPU bfloat16 gains this model nothing.

    Raises
    ------
    ModelNotFound
        Not on this machine.
    """
    network, processor, record = _load(model, device, precision, "grounding-dino")
    return GroundingDino(encoder, network, processor, threshold, record)


def _load(model: str | Path, device: Any, precision: str, kind: str) -> tuple[Any, Any, dict[str, Any]]:
    import transformers

    located = find_folder(model, "detector")
    chosen = choose_device(device)
    dtype = choose_precision(precision, chosen)
    options = {"local_files_only": True, "trust_remote_code": False}
    network = load_transformer(transformers.AutoModelForZeroShotObjectDetection, located, dtype=dtype)
    if network.config.model_type != kind:
        raise InputError(f"{located.what} is of the kind '{network.config.model_type}', expected '{kind}'")
    try:
        with from_disk_only():
            processor = transformers.AutoProcessor.from_pretrained(located.path, **options)
    except UNREADABLE as error:
        raise ModelNotFound(
            f"{located.what}: the processor in {tidy(located.path)} cannot be loaded: {first_line(error)}. "
            "Copy the whole model folder, not only its weights."
        ) from error
    name = located.path.name if located.revision == "" else str(model)
    record = {"name": name, "revision": located.revision, "files_sha256": folder_hash(located.path)}
    return network.to(chosen), processor, record
