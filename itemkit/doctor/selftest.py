"""Do the configured models mean what they say? Images whose content is known, and three questions about them.

Broken weights, a wrong preprocessing or a foreign tokenizer give features that look like any others; only
their meaning tells. So each model is asked something with a known answer: the encoder to find the right
caption, the captioner to name the subject, the localiser to point at an object. The photographs come with
scikit-image and scikit-learn, so nothing is downloaded; the laboratory hands over renders instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit.images import load_image

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Box = tuple[float, float, float, float]

# Share of the cases that must be right; our choice. A random encoder finds the right one of n captions in one
# of n cases. 0.9 leaves room for one odd image; a captioner may name a subject by a word that nobody listed.
ENCODER_SHARE, CAPTIONER_SHARE, LOCALISER_SHARE = 0.9, 0.7, 0.5


@dataclass(frozen=True)
class Case:
    """An image whose content is known.

    Attributes
    ----------
    name : str
        Short name for messages.
    image : PIL image, RGB
        The image.
    caption : str
        A caption that fits it and none of the other cases.
    words : tuple of str
        A generated caption should hold one of these.
    parts : tuple of (phrase, box)
        Objects to point at; boxes in pixels of the image, x0, y0, x1, y1.
    """

    name: str
    image: Image.Image
    caption: str
    words: tuple[str, ...] = ()
    parts: tuple[tuple[str, Box], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How often a model was right.

    Attributes
    ----------
    model : str
        "encoder", "captioner" or "localiser".
    question : str
        What it was asked.
    right, total : int
        Correct answers, questions.
    needed : float
        Share of correct answers that counts as working.
    misses : tuple of str
        One sentence per wrong answer.
    """

    model: str
    question: str
    right: int
    total: int
    needed: float
    misses: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether enough answers were right; no question at all passes nothing."""
        return self.total > 0 and self.right >= self.needed * self.total


# file, caption, words, parts with boxes as fractions of width and height (marked by eye)
_PHOTOS: tuple[tuple[str, str, tuple[str, ...], tuple[tuple[str, Box], ...]], ...] = (
    (
        "astronaut.png",
        "a smiling astronaut in an orange space suit in front of an American flag",
        ("astronaut", "woman", "suit"),
        (("a space shuttle", (0.69, 0.0, 0.90, 0.54)), ("an American flag", (0.0, 0.0, 0.22, 0.95))),
    ),
    (
        "chelsea.png",
        "the face of a ginger cat",
        ("cat", "kitten"),
        (("the nose of a cat", (0.48, 0.74, 0.66, 0.90)),),
    ),
    (
        "coffee.png",
        "a cup of coffee on a wooden table",
        ("coffee", "cup", "espresso", "tea"),
        (("a metal spoon", (0.53, 0.58, 0.69, 0.82)),),
    ),
    (
        "rocket.jpg",
        "a rocket on its launch pad at night",
        ("rocket", "missile", "launch", "space"),
        (("a rocket", (0.46, 0.28, 0.56, 1.0)),),
    ),
    (
        "camera.png",
        "a black and white photo of a man looking through a camera on a tripod",
        ("man", "camera", "photographer", "tripod"),
        (("a camera on a tripod", (0.43, 0.25, 0.78, 1.0)),),
    ),
    ("coins.png", "rows of old coins", ("coin", "coins", "money"), ()),
    (
        "motorcycle_left.png",
        "a red motorcycle parked in a garage",
        ("motorcycle", "motorbike", "bike"),
        (("the front wheel of a motorcycle", (0.69, 0.56, 0.94, 0.93)),),
    ),
    (
        "hubble_deep_field.jpg",
        "distant galaxies and stars in the dark sky",
        ("galaxies", "galaxy", "stars", "space"),
        (),
    ),
    ("page.png", "a page of printed text", ("text", "page", "paper", "book", "document", "words"), ()),
    (
        "china.jpg",
        "a Chinese pagoda among trees beside a lake",
        ("pagoda", "temple", "tower", "building", "palace"),
        (("a pagoda", (0.10, 0.07, 0.58, 0.88)),),
    ),
    (
        "flower.jpg",
        "a close-up of an orange dahlia",
        ("flower", "dahlia", "petals"),
        (("an orange flower", (0.26, 0.19, 0.70, 0.84)),),
    ),
)


def photo_cases() -> list[Case]:
    """Photographs that come with scikit-image and scikit-learn, with captions and a few boxes."""
    import skimage
    import sklearn

    folders = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    )
    cases = []
    for file, caption, words, parts in _PHOTOS:
        image = load_image(next(folder / file for folder in folders if (folder / file).is_file()))
        width, height = image.size
        boxes = tuple(
            (phrase, (x0 * width, y0 * height, x1 * width, y1 * height)) for phrase, (x0, y0, x1, y1) in parts
        )
        cases.append(Case(Path(file).stem, image, caption, words, boxes))
    return cases


def ask_encoder(encoder: Any, cases: Sequence[Case]) -> Outcome:
    """Ask whether each image's own caption wins among the captions of all cases.

    Parameters
    ----------
    encoder : Encoder
        Anything with ``preprocess``, ``encode_images`` and ``encode_texts``.
    cases : sequence of Case
        At least two, with different captions.

    Returns
    -------
    Outcome
    """
    pooled = _embed(encoder, cases).pooled
    winners = (pooled @ encoder.encode_texts([case.caption for case in cases]).T).argmax(dim=1).tolist()
    misses = [
        f"{case.name} is closest to '{cases[winner].caption}'"
        for case, winner in zip(cases, winners, strict=True)
        if cases[winner].caption != case.caption
    ]
    return _outcome("encoder", "the right caption wins", len(cases), ENCODER_SHARE, misses)


def ask_captioner(captioner: Any, cases: Sequence[Case]) -> Outcome:
    """Ask whether each generated caption names the subject.

    Parameters
    ----------
    captioner : Captioner
        Anything with ``caption(images)`` that returns records with a ``text``.
    cases : sequence of Case
        Those without ``words`` are left out.

    Returns
    -------
    Outcome
    """
    asked = [case for case in cases if case.words]
    captions = [caption.text for caption in captioner.caption([case.image for case in asked])]
    misses = [
        f"{case.name} is called '{text}', expected one of {', '.join(case.words)}"
        for case, text in zip(asked, captions, strict=True)
        if not set(case.words) & set(text.lower().replace(".", " ").replace(",", " ").split())
    ]
    return _outcome("captioner", "the caption names the subject", len(asked), CAPTIONER_SHARE, misses)


def ask_localiser(localiser: Any, encoder: Any, cases: Sequence[Case]) -> Outcome:
    """Ask whether the centre of each located box lies on the object.

    Parameters
    ----------
    localiser : Localiser
        Anything with ``needs_patches`` and ``locate``.
    encoder : Encoder
        The encoder it works with.
    cases : sequence of Case
        Those without ``parts`` are left out.

    Returns
    -------
    Outcome
    """
    import torch

    asked = [case for case in cases if case.parts]
    parts = [(case, phrase, box) for case in asked for phrase, box in case.parts]
    owner = torch.tensor([row for row, case in enumerate(asked) for _ in case.parts])
    regions = localiser.locate(
        [case.image for case in asked],
        _embed(encoder, asked, patches=localiser.needs_patches),
        encoder.encode_texts([phrase for _, phrase, _ in parts]),
        owner,
        phrases=[phrase for _, phrase, _ in parts],
    )
    misses = []
    for (case, phrase, (x0, y0, x1, y1)), found in zip(parts, regions.boxes.tolist(), strict=True):
        x, y = (found[0] + found[2]) / 2, (found[1] + found[3]) / 2
        if not (x0 <= x <= x1 and y0 <= y <= y1):
            misses.append(f"'{phrase}' in {case.name} is placed at ({x:.0f}, {y:.0f})")
    return _outcome("localiser", "the box points at the object", len(parts), LOCALISER_SHARE, misses)


def _embed(encoder: Any, cases: Sequence[Case], patches: bool = False) -> Any:
    import torch

    pixels: Tensor = torch.stack([encoder.preprocess(case.image) for case in cases])
    return encoder.encode_images(pixels, patches=patches)


def _outcome(model: str, question: str, total: int, needed: float, misses: Sequence[str]) -> Outcome:
    return Outcome(model, question, total - len(misses), total, needed, tuple(misses))
