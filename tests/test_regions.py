"""Localisers: hand-made maps and images with known answers; detectors against transformers' own boxes."""

from __future__ import annotations

import models  # first: it repairs the torchvision import

# isort: split

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from itemkit.detection import _prompt
from itemkit.encoder import Encoder, ImageEmbedding, load_encoder
from itemkit.errors import InputError
from itemkit.regions import embed_boxes, heatmap, inside, make_localiser, peak_boxes, windows

RED, GREEN, BLUE = torch.eye(3)


class Colours:
    """An encoder whose joint space is the mean colour; 4 x 4 patches."""

    patch_grid, image_size, logit_scale, dim = (4, 4), (8, 8), 100.0, 3
    device = "cpu"
    resize_mode = "squash"

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        small = image.resize((8, 8), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(small, dtype=np.float32).copy()).permute(2, 0, 1) / 255

    def encode_images(self, pixels: torch.Tensor, patches: bool = False) -> ImageEmbedding:
        pooled = F.normalize(pixels.mean(dim=(2, 3)) + 1e-4, dim=1)
        cells = F.avg_pool2d(pixels, 2).flatten(2).transpose(1, 2) + 1e-4
        return ImageEmbedding(pooled, F.normalize(cells, dim=2) if patches else None)

    frame = Encoder.frame


def scene(size: tuple[int, int], *parts: tuple[tuple[int, int, int, int], str]) -> Image.Image:
    """A blue image with coloured rectangles."""
    image = Image.new("RGB", size, "#0000ff")
    for box, colour in parts:
        image.paste(colour, box)
    return image


def embed(encoder, images: list[Image.Image], patches: bool = True) -> ImageEmbedding:
    return encoder.encode_images(torch.stack([encoder.preprocess(image) for image in images]), patches)


# -- geometry ----------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    assert windows((40, 40), [1.0, 0.5], 0.0)[:2] == [(0.0, 0.0, 40.0, 40.0), (0.0, 0.0, 20.0, 20.0)]
    assert windows((40, 20), [1.0], 0.5) == [(float(x), 0.0, float(x + 20), 20.0) for x in (0, 10, 20)]
    assert windows((1, 1), [0.3], 0.5) == [(0.0, 0.0, 1.0, 1.0)]


@pytest.mark.parametrize("size", [(37, 53), (400, 10), (10, 400), (3, 2)])
def test_windows_lie_inside_and_reach_the_edges(size: tuple[int, int]) -> None:
    found = windows(size, [1.0, 0.45], 0.5)
    assert all(0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] for x0, y0, x1, y1 in found)
    assert max(b[2] for b in found) == size[0] and max(b[3] for b in found) == size[1]
    assert len(found) == len(set(found)) <= 2 * 12 * 12


def test_peak_box_keeps_the_part_with_the_peak() -> None:
    two = [[0.9, 0.8, 0.0, 0.7], [0.8, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.7]]
    diagonal = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    snake = [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    flat, masked = np.zeros((3, 4)), np.full((3, 4), -math.inf)
    masked[1:, 2:] = 0.5
    boxes = peak_boxes(np.stack([two, diagonal, snake, flat, masked]), 0.5, (0, 0, 4, 3), (4, 3)).tolist()
    assert boxes == [[3, 0, 4, 3], [0, 0, 1, 1], [0, 0, 4, 3], [0, 0, 4, 3], [2, 1, 4, 3]]


def test_boxes_are_in_pixels_of_the_original() -> None:
    cells = np.zeros((1, 4, 4))
    cells[0, 1:3, 0:2] = 1
    assert peak_boxes(cells, 0.5, (0, 0, 80, 40), (80, 40)).tolist() == [[0, 10, 40, 30]]
    assert peak_boxes(cells, 0.5, (20, 0, 60, 40), (80, 40)).tolist() == [[20, 10, 40, 30]]
    assert peak_boxes(np.ones((1, 4, 4)), 0.5, (0, -20, 80, 60), (80, 40)).tolist() == [[0, 0, 80, 40]]
    seen = inside((4, 4), (0, -20, 80, 60), (80, 40)).reshape(4, 4)[:, 0]
    assert seen.tolist() == [False, True, True, False]


def test_crops_have_at_least_one_pixel() -> None:
    image = scene((10, 6), ((9, 5, 10, 6), "#ff0000"))
    boxes = [(9.0, 5.0, 10.0, 6.0), (9.9, 5.9, 10.0, 6.0), (10.0, 6.0, 10.0, 6.0)]
    emb = embed_boxes(Colours(), [image] * 3, boxes)  # type: ignore[arg-type]
    assert (emb @ RED > 0.99).all()


# -- whole, grid, dense ------------------------------------------------------------------------------------

IMAGES = [
    scene((80, 40), ((60, 0, 80, 20), "#ff0000"), ((0, 20, 20, 40), "#00ff00")),
    scene((40, 40), ((20, 20, 40, 40), "#00ff00")),
]
PHRASES, OWNER = torch.stack([RED, GREEN, GREEN]), torch.tensor([0, 0, 1])


def test_whole() -> None:
    embedding = embed(Colours(), IMAGES)
    regions = make_localiser("whole", Colours()).locate(IMAGES, embedding, PHRASES, OWNER)
    assert regions.boxes.tolist() == [[0, 0, 80, 40], [0, 0, 80, 40], [0, 0, 40, 40]]
    assert torch.equal(regions.emb, embedding.pooled[OWNER])
    assert torch.allclose(regions.scores, (embedding.pooled[OWNER] * PHRASES).sum(dim=1))


def test_grid_finds_the_coloured_squares() -> None:
    grid = make_localiser("grid", Colours(), scales=(1.0, 0.5), overlap=0.5)
    regions = grid.locate(IMAGES, embed(Colours(), IMAGES), PHRASES, OWNER)
    assert regions.boxes.tolist() == [[60, 0, 80, 20], [0, 20, 20, 40], [20, 20, 40, 40]]
    assert (regions.scores > 0.99).all()
    assert torch.allclose(regions.emb.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("mode", ["squash", "longest"])
def test_dense_finds_the_coloured_squares(mode: str) -> None:
    encoder = Colours()
    encoder.resize_mode = mode
    images = IMAGES
    if mode == "longest":  # what the tower sees: the image in the middle of a square
        images = [Image.new("RGB", (80, 80), "#ffffff"), IMAGES[1]]
        images[0].paste(IMAGES[0], (0, 20))
    regions = make_localiser("dense", encoder).locate(IMAGES, embed(encoder, images), PHRASES, OWNER)
    assert regions.boxes.tolist() == [[60, 0, 80, 20], [0, 20, 20, 40], [20, 20, 40, 40]]
    assert (regions.scores > 0.99).all() and torch.allclose(regions.emb.norm(dim=1), torch.ones(3))


def test_dense_ignores_the_padding() -> None:
    encoder = Colours()
    encoder.resize_mode = "longest"
    padded = Image.new("RGB", (80, 80), "#ff0000")  # the padding is redder than anything in the image
    padded.paste(IMAGES[0].crop((0, 0, 60, 40)), (0, 20))
    padded.paste("#0000ff", (60, 20, 80, 60))
    regions = make_localiser("dense", encoder).locate(
        [IMAGES[0]], embed(encoder, [padded]), RED[None], torch.tensor([0])
    )
    assert regions.scores[0] < 0.1


@pytest.mark.parametrize("name", ["whole", "grid", "dense"])
def test_order_of_images_and_phrases_changes_nothing(name: str) -> None:
    localiser = make_localiser(name, Colours())
    first = localiser.locate(IMAGES, embed(Colours(), IMAGES), PHRASES, OWNER)
    order = torch.tensor([2, 0, 1])
    back = localiser.locate(IMAGES[::-1], embed(Colours(), IMAGES[::-1]), PHRASES[order], 1 - OWNER[order])
    for field in ("boxes", "scores", "emb"):
        assert torch.allclose(getattr(first, field)[order], getattr(back, field), atol=1e-6)
    none = localiser.locate(IMAGES, embed(Colours(), IMAGES), PHRASES[:0], OWNER[:0])
    assert none.boxes.shape == (0, 4) and none.scores.shape == (0,) and none.emb.shape == (0, 3)


def test_heatmap() -> None:
    patches = embed(Colours(), IMAGES).patches
    assert patches is not None
    red = heatmap(patches[0], RED, Colours(), 80, 40)
    assert red.shape == (40, 80) and red.dtype == np.float32
    assert red[5, 75] > 0.99 and abs(red[35, 5]) < 0.01
    cropped = Colours()
    cropped.resize_mode = "shortest"
    sides = heatmap(patches[0], RED, cropped, 80, 40)
    assert (
        np.isnan(sides[:, :20]).all() and np.isnan(sides[:, 60:]).all() and np.isfinite(sides[:, 20:60]).all()
    )


def test_fingerprints_follow_the_options() -> None:
    options = [
        ("whole", {}),
        ("grid", {}),
        ("grid", {"scales": (0.5,)}),
        ("dense", {}),
        ("dense", {"level": 0.7}),
    ]
    made = [make_localiser(name, Colours(), **given).fingerprint() for name, given in options]
    assert len(set(map(json.dumps, made))) == len(options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("denes", {}, "localiser 'denes' is unknown. Did you mean 'dense'"),
        ("grid", {"size": 3}, "localiser 'grid' has no option 'size'.*Known: scales, overlap"),
        ("whole", {"size": 3}, "has no option 'size'. Known: none"),
        ("grid", {"scales": (2.0,)}, "expected scales in"),
        ("dense", {"temperature": 0.0}, "got temperature 0.0"),
    ],
)
def test_bad_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_localiser(name, Colours(), **options)  # type: ignore[arg-type]


def test_dense_needs_patches() -> None:
    with pytest.raises(InputError, match="embedded without patches"):
        make_localiser("dense", Colours()).locate(IMAGES, embed(Colours(), IMAGES, False), PHRASES, OWNER)


# -- object detectors --------------------------------------------------------------------------------------

TEXTS, TEXT_OWNER = ["red ball", "the grass", "blue cup", "dog"], torch.tensor([0, 0, 1, 2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("detectors")
    return {
        "clip": models.write_tiny_clip(root / "clip"),
        "owlv2": models.write_tiny_owlv2(root / "owlv2"),
        "grounding_dino": models.write_tiny_grounding_dino(root / "grounding_dino"),
    }


@pytest.fixture(scope="module")
def clip(folders: dict[str, Path]) -> Encoder:
    return load_encoder(folders["clip"], device="cpu", precision="float32")


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 255, (50 + 20 * i, 90, 3), dtype=np.uint8)) for i in range(3)]


def located(folders, clip, name: str, images, texts, owner, **options):
    options = {"device": "cpu", "precision": "float32", "threshold": 0.0} | options
    localiser = make_localiser(name, clip, model=folders[name], **options)
    return localiser.locate(images, embed(clip, images), clip.encode_texts(texts), owner, phrases=texts)


@pytest.mark.parametrize("name", ["owlv2", "grounding_dino"])
def test_detector_equals_transformers_own_boxes(folders, clip, name: str) -> None:
    image = pictures()[0]
    ours = located(folders, clip, name, [image], TEXTS[:2], torch.tensor([0, 0]))
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folders[name]).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders[name])
    text = {"owlv2": [TEXTS[:2]], "grounding_dino": "red ball. the grass."}[name]
    with torch.no_grad():
        output = model(**processor(images=image, text=text, return_tensors="pt"))
    (found,) = processor.post_process_grounded_object_detection(
        output, threshold=0.0, target_sizes=[(image.height, image.width)]
    )
    # the columns of each phrase; for Grounding DINO [CLS] red ball . the grass . [SEP]
    columns = {"owlv2": ([0], [1]), "grounding_dino": ([1, 2], [4, 5])}[name]
    for index, mine in enumerate(columns):
        confidence = output.logits[0].sigmoid()[:, mine].amax(dim=1)
        assert float(ours.scores[index]) == pytest.approx(float(confidence.max()), abs=1e-5)
        limit = torch.tensor([image.width, image.height] * 2)
        box = torch.minimum(found["boxes"][confidence.argmax()].clamp(min=0), limit)
        if bool(box[2] > box[0]) and bool(box[3] > box[1]):
            assert torch.allclose(ours.boxes[index], box, atol=1e-3)


@pytest.mark.parametrize("name", ["owlv2", "grounding_dino"])
def test_detector_does_not_mix_images(folders, clip, name: str) -> None:
    images = pictures()
    together = located(folders, clip, name, images, TEXTS, TEXT_OWNER)
    for row, owner in enumerate(TEXT_OWNER.tolist()):
        if (TEXT_OWNER == owner).sum() > 1:
            continue  # phrases of one image share a prompt
        alone = located(folders, clip, name, [images[owner]], [TEXTS[row]], torch.tensor([0]))
        assert torch.allclose(alone.boxes[0], together.boxes[row], atol=1e-3)
        assert torch.allclose(alone.emb[0], together.emb[row], atol=1e-5)
    assert torch.allclose(together.emb.norm(dim=1), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("name", ["owlv2", "grounding_dino"])
def test_nothing_found_is_the_whole_image_with_score_0(folders, clip, name: str) -> None:
    images = [*pictures()[:2], Image.new("RGB", (1, 40))]
    regions = located(folders, clip, name, images, TEXTS, TEXT_OWNER, threshold=1.1)
    assert regions.scores.tolist() == [0, 0, 0, 0]
    assert regions.boxes.tolist() == [[0, 0, 90, 50], [0, 0, 90, 50], [0, 0, 90, 70], [0, 0, 1, 40]]
    assert torch.allclose(regions.emb, embed(clip, images).pooled[TEXT_OWNER])


def test_detectors_ask_for_the_phrases(folders, clip) -> None:
    owl = make_localiser("owlv2", clip, model=folders["owlv2"])
    assert owl.needs_phrases and not owl.needs_patches
    with pytest.raises(InputError, match="Owlv2 reads the phrases: expected phrases= with 4 texts, got none"):
        owl.locate(pictures(), embed(clip, pictures()), clip.encode_texts(TEXTS), TEXT_OWNER)


def test_wrong_kind_of_detector(folders, clip) -> None:
    with pytest.raises(InputError, match="is of the kind 'owlv2', expected 'grounding_dino'"):
        make_localiser("grounding_dino", clip, model=folders["owlv2"])


def test_long_prompts_are_split_not_cut(folders, clip) -> None:
    dino = make_localiser(
        "grounding_dino", clip, model=folders["grounding_dino"], device="cpu", threshold=0.0
    )
    texts = [
        f"red ball and green cup {word}"
        for word in ("on", "in", "left", "right", "the", "a", "of", "and", "sky")
    ]
    image = pictures()[0]
    found = dino.boxes(image, texts)  # type: ignore[attr-defined]
    assert len(found) == 9 and found == dino.boxes(image, texts[:6]) + dino.boxes(image, texts[6:])  # type: ignore[attr-defined]


def test_prompt_spans() -> None:
    prompt, spans = _prompt(["Red ball", "St. Peter", " "])
    assert prompt == "red ball. st  peter. object."
    assert [prompt[a:b] for a, b in spans] == ["red ball", "st  peter", "object"]
