"""Open-vocabulary object detectors as localisers: Owlv2 and Grounding DINO, from transformers.

Both give, for every candidate box and every phrase, a confidence; the best box of each phrase is taken.
Images go through one at a time: object detectors pad a batch to its largest image and its longest prompt, and
padding changes the numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature

from itemkit.devices import choose_device, choose_precision
from itemkit.errors import InputError
from itemkit.models import LOCALISERS, find_folder, load_processor, load_transformer, localiser_settings
from itemkit.regions import BoxLocaliser

if TYPE_CHECKING:
    from PIL.Image import Image

    from itemkit.encoder import Encoder


class ObjectDetector(BoxLocaliser):
    """An object detector that scores boxes for phrases; the base of both."""

    def __init__(
        self, encoder: Encoder, model: Any, processor: Any, threshold: float, record: dict[str, Any]
    ) -> None:
        super().__init__(encoder, self)
        self.model, self.processor, self.threshold = model, processor, threshold
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._record = dict(record)

    @abstractmethod
    def detect(self, image: Image, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Give every candidate box (q, 4) in pixels and its confidence for every phrase (q, len(phrases))."""

    def boxes(self, image: Image, phrases: Sequence[str]) -> list[tuple[float, ...] | None]:
        """The best box of each phrase with its confidence; None below the threshold."""
        candidates, confidence = self.detect(image, phrases)
        best_score, best = confidence.max(dim=0)
        answers = zip(candidates[best].tolist(), best_score.tolist(), strict=True)
        return [(*box, score) if score >= self.threshold else None for box, score in answers]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the regions, as JSON-ready values."""
        return dict(self._record)

    def run(self, image: Image, **text: Any) -> tuple[Tensor, Tensor]:
        """Candidate boxes as shares of the sides (x0, y0, x1, y1), and their confidences."""
        inputs = self.processor(images=image.convert("RGB"), return_tensors="pt", **text)
        with torch.no_grad():
            out = self.model(**BatchFeature(dict(inputs)).to(self.device, self.dtype))
        centre, size = out.pred_boxes[0].float().split(2, dim=-1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        return boxes, out.logits[0].float().sigmoid()


class Owlv2(ObjectDetector):
    """Owlv2: each phrase is a query of its own."""

    def detect(self, image: Image, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `ObjectDetector.detect`."""
        positions = self.model.config.text_config.max_position_embeddings  # 16
        cut = {"padding": "max_length", "truncation": True, "max_length": positions}
        boxes, scores = self.run(image, text=[list(phrases)], **cut)
        # The processor pads the image to a square at the bottom and on the right.
        return boxes * max(image.size), scores[:, : len(phrases)]


class GroundingDino(ObjectDetector):
    """Grounding DINO: one prompt for all phrases, "cat. red ball."; the best token speaks for its phrase."""

    def boxes(self, image: Image, phrases: Sequence[str]) -> list[tuple[float, ...] | None]:
        """See `ObjectDetector.boxes`; in as many prompts as the model's text length asks for."""
        found: list[tuple[float, ...] | None] = []
        while len(found) < len(phrases):
            rest = phrases[len(found) :]
            found += super().boxes(image, rest[: self._fit(rest)])
        return found

    def detect(self, image: Image, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `ObjectDetector.detect`."""
        prompt, spans = _prompt(phrases)
        boxes, scores = self.run(image, text=prompt)
        offsets = self.processor.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        columns = []
        for start, end in spans:
            tokens = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
            columns.append(scores[:, tokens].amax(dim=1) if tokens else scores.new_zeros(len(scores)))
        return boxes * boxes.new_tensor(image.size * 2), torch.stack(columns, dim=1)

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


def load_detector(
    name: str, encoder: Encoder, device: str | torch.device = "auto", **options: Any
) -> ObjectDetector:
    """Load an object detector from this machine.

    Options: ``model``, a transformers folder or hub name; ``threshold``, least confidence, below it the whole
    image is returned with score 0; ``precision``, see `devices.choose_precision`. Defaults in
    `models.LOCALISERS`: the threshold is the model's own; on a CPU bfloat16 gains Grounding DINO nothing.
    """
    from transformers import AutoModelForZeroShotObjectDetection

    options = LOCALISERS[name] | options
    located = find_folder(options["model"], "object detector")
    chosen = choose_device(device)
    dtype = choose_precision(options["precision"], chosen)
    network = load_transformer(AutoModelForZeroShotObjectDetection, located, dtype=dtype)
    if (found := network.config.model_type.replace("-", "_")) != name:
        raise InputError(f"{located.what} is of the kind '{found}', expected '{name}'")
    processor, _ = load_processor(located, network.config.text_config.vocab_size)
    record = located.fingerprint(**localiser_settings(name, options))
    kind = {"owlv2": Owlv2, "grounding_dino": GroundingDino}[name]
    return kind(encoder, network.to(chosen), processor, options["threshold"], record)
