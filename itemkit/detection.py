"""Object detectors of transformers as localisers: with words (Owlv2, Grounding DINO) or from the image alone.

All give a confidence for every candidate box and every word; the best box of each word is taken, and for k
mentions of a word its k best. What is a word differs: phrases of the caption; or, for a detector that
knows nothing of it, the class whose name the phrase ends in.

Images share a forward pass only where they need no padding for it: padding changes the numbers.
"""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.ops import box_iou
from transformers import BatchFeature

from itemkit.devices import choose_device, choose_precision
from itemkit.errors import InputError
from itemkit.models import (
    IMAGE_ALONE,
    LOCALISERS,
    find_folder,
    load_processor,
    load_transformer,
    localiser_settings,
    read_json,
)
from itemkit.regions import BoxLocaliser, embed_boxes, make_localiser

if TYPE_CHECKING:
    from PIL.Image import Image

    from itemkit.encoder import Encoder

PREPARED = 64  # images that go through the image processor together
BATCH_PIXELS = 2**22  # of one forward pass: 4 images of 800 x 1300, 10 of 640 x 640, 450 of 96 x 96
APART = 0.5  # two boxes with a larger intersection over union show one thing


class ObjectDetector(BoxLocaliser):
    """An object detector; the base of all."""

    square = False  # whether the processor pads images to squares, at the bottom and on the right

    def __init__(
        self, encoder: Encoder, model: Any, processor: Any, options: dict[str, Any], record: dict[str, Any]
    ) -> None:
        super().__init__(encoder, self)
        self.model, self.processor, self.threshold = model, processor, options["threshold"]
        self.union = options.get("boxes") == "union"
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._record = dict(record)
        size = getattr(processor, "image_processor", processor).size
        self._one_size = bool(size.get("height") and size.get("width"))  # of whatever image

    def asked(self, words: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """What the processor is given besides some images: the words to look for in each."""
        return {}

    @abstractmethod
    def confidence(self, logits: Tensor, words: Sequence[Any]) -> Tensor:
        """Confidence of every candidate box (q, c) for every word (q, len(words))."""

    def parts(self, words: Sequence[Any]) -> list[list[Any]]:
        """Divide the words of an image into what goes into one forward pass."""
        return [list(words)]

    def find(self, images, phrases, phrase_emb):  # types: see BoxLocaliser
        """See `BoxLocaliser.find`. A phrase that is None is not looked for."""
        wanted = [Counter(word for word in words if word is not None) for words in phrases]
        jobs = [(i, part) for i, words in enumerate(wanted) if words for part in self.parts(list(words))]
        found: list[dict[Any, Iterator]] = [{} for _ in images]

        def size(job: tuple[int, Any]) -> tuple[int, int]:
            return (0, 0) if self._one_size else images[job[0]].size

        for _, group in groupby(sorted(jobs, key=size), key=size):
            alike = list(group)
            for start in range(0, len(alike), PREPARED):
                batch = alike[start : start + PREPARED]
                outputs = self.run([images[i] for i, _ in batch], [part for _, part in batch])
                for (i, part), (boxes, logits) in zip(batch, outputs, strict=True):
                    sides = [max(images[i].size)] * 2 if self.square else [*images[i].size]
                    boxes = boxes * boxes.new_tensor(sides * 2)

                    @functools.cache  # words of one image come back to the same boxes
                    def same(k: int, boxes: Tensor = boxes) -> Tensor:
                        return box_iou(boxes, boxes[k : k + 1])[:, 0] > APART

                    for word, scores in zip(part, self.confidence(logits, part).T, strict=True):
                        found[i][word] = iter(self.best(boxes, scores, wanted[i][word], same))
        return [
            [(None, 0.0) if word is None else next(found[i][word]) for word in words]
            for i, words in enumerate(phrases)
        ]

    def run(self, images: Sequence[Image], words: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of some images of one size: boxes x0, y0, x1, y1 as shares of the sides, and logits."""
        pictures, n = [image.convert("RGB") for image in images], len(images)
        inputs = self.processor(images=pictures, return_tensors="pt", **self.asked(words))
        step = max(1, BATCH_PIXELS // inputs["pixel_values"][0, 0].numel())
        for start in range(0, n, step):
            # Owlv2 has a row of tokens for each phrase, not for each image
            part = {k: x[start * len(x) // n : (start + step) * len(x) // n] for k, x in inputs.items()}
            with torch.no_grad():
                out = self.model(**BatchFeature(part).to(self.device, self.dtype))
            centre, size = out.pred_boxes.float().cpu().split(2, dim=-1)
            boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
            yield from zip(boxes, out.logits.float().cpu(), strict=True)

    def best(
        self, boxes: Tensor, scores: Tensor, count: int, same: Callable[[int], Tensor]
    ) -> list[tuple[list[float] | None, float]]:
        """The ``count`` best boxes that are not the ``same``, with confidence; None below the threshold.

        With ``boxes="union"`` all mentions get the box around all that are above it.
        """
        if self.union:
            above, top = boxes[scores >= self.threshold], float(scores.max())
            around = torch.cat([above[:, :2].amin(dim=0), above[:, 2:].amax(dim=0)]) if len(above) else None
            return [(None if around is None else around.tolist(), top)] * count
        answers: list[tuple[list[float] | None, float]] = []
        left = scores.clone()
        for _ in range(count):
            k = int(left.argmax())
            score = float(left[k])
            answers.append((boxes[k].tolist() if score >= max(self.threshold, 0) else None, max(score, 0.0)))
            left[same(k)] = left[k] = -1
        return answers

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the regions, as JSON-ready values."""
        return dict(self._record)


class Owlv2(ObjectDetector):
    """Owlv2: each phrase is a query of its own."""

    square = True

    def asked(self, words: Sequence[Sequence[str]]) -> dict[str, Any]:
        """See `ObjectDetector.asked`; the processor gives images with fewer phrases empty ones."""
        positions = self.model.config.text_config.max_position_embeddings  # 16
        return {"text": list(words), "padding": "max_length", "truncation": True, "max_length": positions}

    def confidence(self, logits: Tensor, words: Sequence[str]) -> Tensor:
        """See `ObjectDetector.confidence`."""
        return logits[:, : len(words)].sigmoid()


class GroundingDino(ObjectDetector):
    """Grounding DINO: one prompt for all phrases, "cat. red ball."; the best token speaks for its phrase."""

    def asked(self, words: Sequence[Sequence[str]]) -> dict[str, Any]:
        """See `ObjectDetector.asked`; padding of prompts, unlike that of images, changes nothing."""
        return {"text": [_prompt(phrases)[0] for phrases in words], "padding": True}

    def confidence(self, logits: Tensor, words: Sequence[str]) -> Tensor:
        """See `ObjectDetector.confidence`."""
        prompt, spans = _prompt(words)
        offsets = self.processor.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        logits = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)  # for a phrase without a token
        columns = []
        for start, end in spans:
            tokens = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
            columns.append(logits[:, [*tokens, -1]].sigmoid().amax(dim=1))
        return torch.stack(columns, dim=1)

    def parts(self, words: Sequence[str]) -> list[list[str]]:
        """As many prompts as the model's text length asks for: what is beyond it would be cut silently."""
        room, found = int(getattr(self.model.config, "max_text_len", 256)), []
        while words:
            count = len(words)
            while count > 1 and len(self.processor.tokenizer(_prompt(words[:count])[0]).input_ids) > room:
                count -= 1
            found.append(list(words[:count]))
            words = words[count:]
        return found


def _prompt(phrases: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Join phrases into one prompt; a full stop inside a phrase would split it. Also the span of each."""
    prompt, spans = "", []
    for phrase in phrases:
        clean = phrase.replace(".", " ").strip().lower() or "object"
        spans.append((len(prompt), len(prompt) + len(clean)))
        prompt += clean + ". "
    return prompt.strip(), spans


class ImageAlone(ObjectDetector):
    """A detector with classes of its own, as the method's authors draw it; phrases choose among its boxes.

    A phrase stands for the class whose name it ends in ("two red traffic lights" for "traffic light"); people
    of all kinds for "person", where a detector tells no kinds; else, with ``match``, for the class whose name
    has the nearest text embedding, if their cosine is at least that. Boxes that no phrase names are ignored.
    Of "a red ball and a blue ball" the detector sees two balls: which is which, the joint space says.
    """

    def __init__(self, encoder: Encoder, model: Any, processor: Any, options: Any, record: Any) -> None:
        super().__init__(encoder, model, processor, options, record)
        self.match, names = options["match"], model.config.id2label
        self.classes = {k: name for k, name in names.items() if name.upper() not in ("", "N/A")}
        # "Cabinet/shelf" is either; of classes of one name the first counts
        self._class_of: dict[tuple[str, ...], int] = {}
        for k, name in self.classes.items():
            for word in re.split("/|,| or ", name):
                self._class_of.setdefault(_words(word), k)
        self.instead = make_localiser(options["without_box"], encoder)

    def find(self, images, phrases, phrase_emb):  # types: see BoxLocaliser
        """See `BoxLocaliser.find`."""
        of_images = zip(phrases, phrase_emb, strict=True)
        classes = [self.classes_of(words, emb) for words, emb in of_images]
        found = super().find(images, classes, phrase_emb)
        if not self.union:  # there all mentions have one box
            self.share(found, images, classes, phrase_emb)
        return found

    def share(self, found: list[list], images: Sequence[Image], classes: Sequence, emb: Sequence) -> None:
        """Share the boxes of a class out among its mentions, so that crops fit phrases best in sum."""
        groups: dict[tuple[int, int], list[int]] = {}  # rows of each class in each image
        for i, of_image in enumerate(classes):
            for row, k in enumerate(of_image):
                if k is not None:
                    groups.setdefault((i, k), []).append(row)
        jobs = []
        for (i, _), rows in groups.items():
            answers = sorted((found[i][row] for row in rows), key=lambda answer: answer[0] is None)
            n = sum(answer[0] is not None for answer in answers)
            if len(rows) > 1 and n:
                jobs.append((i, rows, answers, n))
        if not jobs:
            return
        from scipy.optimize import linear_sum_assignment  # only here: it takes long to import

        of_box = [images[i] for i, _, _, n in jobs for _ in range(n)]
        boxes = torch.tensor([box for _, _, answers, n in jobs for box, _ in answers[:n]]).clamp(min=0)
        boxes = boxes.minimum(torch.tensor([[*image.size] * 2 for image in of_box]))
        crops = embed_boxes(self.encoder, of_box, boxes.tolist()).float().split([n for *_, n in jobs])
        for (i, rows, answers, _), of_job in zip(jobs, crops, strict=True):
            cosine = of_job @ emb[i][rows].to(of_job).T
            chosen = linear_sum_assignment(cosine.cpu().numpy(), maximize=True)[1].tolist()
            order = chosen + [m for m in range(len(rows)) if m not in chosen]
            for m, answer in zip(order, answers, strict=True):
                found[i][rows[m]] = answer

    def classes_of(self, phrases: Sequence[str], phrase_emb: Tensor) -> list[int | None]:
        """Which class each phrase stands for, see above; None where none does."""
        found: list[int | None] = []
        for phrase, emb in zip(phrases, phrase_emb, strict=True):
            words = _words(phrase)
            ends = [words[start:] for start in range(len(words))]  # the longest first
            ends += [("person",)] if words and words[-1] in _PEOPLE else []
            k = next((self._class_of[end] for end in ends if end in self._class_of), None)
            if k is None and self.match is not None:
                cosine = self._class_emb @ emb.to(self._class_emb)
                k = list(self.classes)[int(cosine.argmax())] if float(cosine.max()) >= self.match else None
            found.append(k)
        return found

    @functools.cached_property
    def _class_emb(self) -> Tensor:
        return self.encoder.encode_texts([name.lower() for name in self.classes.values()])

    def confidence(self, logits: Tensor, words: Sequence[int]) -> Tensor:
        """See `ObjectDetector.confidence`.

        All of it, where transformers' post-processing keeps each box's best class, or the best boxes of all
        classes: the doubt about a thing that is hardly there counts, too.
        """
        # a column more than classes is "no object", as DETR and YOLOS were trained with
        more = logits.shape[1] > len(self.model.config.id2label)
        return (logits.softmax(dim=1) if more else logits.sigmoid())[:, list(words)]


_PEOPLE = frozenset("man woman boy girl child kid baby toddler lady gentleman guy teenager adult".split())
_PLURALS = dict(
    pair.split(":")
    for pair in "men:man women:woman people:person children:child feet:foot teeth:tooth geese:goose "
    "mice:mouse knives:knife wolves:wolf leaves:leaf shelves:shelf scarves:scarf buses:bus".split()
)


def _words(text: str) -> tuple[str, ...]:
    """Words of a phrase or class name in lower case, each in the singular."""
    return tuple(map(_singular, re.findall(r"[^\W_]+", text.lower())))


@functools.cache
def _singular(word: str) -> str:
    """The singular, by simple rules: both sides of a comparison go through them."""
    if word in _PLURALS:
        return _PLURALS[word]
    for end, instead in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh"), ("xes", "x")):
        if word.endswith(end) and len(word) > len(end) + 1:
            return word.removesuffix(end) + instead
    return word if word.endswith(("ss", "us", "is")) or len(word) < 3 else word.removesuffix("s")


def load_detector(
    name: str, encoder: Encoder, device: str | torch.device = "auto", **options: Any
) -> ObjectDetector:
    """Load an object detector from this machine.

    ``name`` is a localiser of `models.LOCALISERS` that has a model; there are the defaults of its options:

    - ``model``: a transformers folder or hub name; for "object_detector" any `AutoModelForObjectDetection`
      whose configuration names its classes.
    - ``threshold``: least confidence of a box. That of "owlv2" and "grounding_dino" is the model's own; 0.3
      is our choice, below the usual 0.5, since a caption that names a thing is a reason to expect it.
    - ``precision``: see `devices.choose_precision`; on a CPU bfloat16 gains Grounding DINO nothing.
    - ``match``, like all that follow of "object_detector", see `ImageAlone`: least cosine of a phrase with
      the name of a class that is another word; None: none will do. 0.9 is our choice and was not measured: in
      stock CLIPs the texts of unlike nouns have cosines of 0.7 to 0.85.
    - ``boxes``: "best" or "union", see `ObjectDetector.best`.
    - ``without_box``: which region stands in for an object without a box: "whole", the whole image, which is
      quick and favours no place, or that of localiser "grid".
    """
    from transformers import AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    options = LOCALISERS[name] | options
    alone = name == IMAGE_ALONE
    if alone and (
        options["boxes"] not in ("best", "union") or options["without_box"] not in ("whole", "grid")
    ):
        got = f"got boxes {options['boxes']!r} and without_box {options['without_box']!r}"
        raise InputError(f"{name}: {got}; expected 'best' or 'union', and 'whole' or 'grid'")
    located = find_folder(options["model"], "object detector", texts=not alone)
    config = read_json(located.path / "config.json")
    kinds = [kind.replace("-", "_") for kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES] if alone else [name]
    if (found := str(config.get("model_type")).replace("-", "_")) not in kinds:
        expected = ", ".join(f"'{kind}'" for kind in kinds)
        raise InputError(f"{located.what} is of the kind '{found}', expected {expected}")
    chosen = choose_device(device)
    dtype = choose_precision(options["precision"], chosen)
    auto = AutoModelForObjectDetection if alone else AutoModelForZeroShotObjectDetection
    network = load_transformer(auto, located, dtype=dtype)
    classes = network.config.id2label
    if alone and all(re.fullmatch(r"LABEL_\d+", name) for name in classes.values()):
        raise located.refuse("config.json does not name its classes (id2label), so no phrase can be matched")
    room = None if alone else network.config.text_config.vocab_size
    processor, _ = load_processor(located, room, texts=not alone)
    record = located.fingerprint(**localiser_settings(name, options))
    made: dict[str, Any] = {"owlv2": Owlv2, "grounding_dino": GroundingDino, IMAGE_ALONE: ImageAlone}
    return made[name](encoder, network.to(chosen), processor, options, record)
