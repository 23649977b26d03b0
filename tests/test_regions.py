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

from itemkit.detection import ImageAlone, ObjectDetector, _prompt, _words
from itemkit.encoder import Encoder, ImageEmbedding, load_encoder
from itemkit.errors import InputError, ItemkitError
from itemkit.models import Models, localiser_settings, part_fingerprint
from itemkit.regions import Regions, embed_boxes, heatmap, inside, make_localiser, peak_boxes, windows
from itemkit.steps import Steps

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
    two = peak_boxes(
        np.concatenate([cells] * 2), 0.5, [(0, 0, 80, 40), (20, 0, 60, 40)], [(80, 40), (50, 20)]
    )
    assert two.tolist() == [[0, 10, 40, 30], [20, 10, 40, 20]]
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


def cosines(regions: Regions, phrases: torch.Tensor = PHRASES) -> torch.Tensor:
    return (regions.emb * phrases).sum(dim=1)


def test_whole() -> None:
    embedding = embed(Colours(), IMAGES)
    regions = make_localiser("whole", Colours()).locate(IMAGES, embedding, PHRASES, OWNER)
    assert regions.boxes.tolist() == [[0, 0, 80, 40], [0, 0, 80, 40], [0, 0, 40, 40]]
    assert torch.equal(regions.emb, embedding.pooled[OWNER])
    assert regions.found.all()


def test_grid_finds_the_coloured_squares() -> None:
    grid = make_localiser("grid", Colours(), scales=(1.0, 0.5), overlap=0.5)
    regions = grid.locate(IMAGES, embed(Colours(), IMAGES), PHRASES, OWNER)
    assert regions.boxes.tolist() == [[60, 0, 80, 20], [0, 20, 20, 40], [20, 20, 40, 40]]
    assert (cosines(regions) > 0.99).all()
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
    assert (cosines(regions) > 0.99).all() and torch.allclose(regions.emb.norm(dim=1), torch.ones(3))


def test_dense_takes_all_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Colours()
    encoder.resize_mode = "longest"
    images = [*IMAGES, scene((30, 90), ((0, 0, 10, 40), "#ff0000")), IMAGES[0], scene((80, 40))]
    seen = [Image.new("RGB", (max(image.size),) * 2, "#ffffff") for image in images]
    for square, image in zip(seen, images, strict=True):
        square.paste(image, [(side - own) // 2 for side, own in zip(square.size, image.size, strict=True)])
    embedding = embed(encoder, seen)
    owner = torch.tensor([2, 0, 3, 0, 2, 1, 0, 2, 2])  # none in the last image, four in another
    phrases = F.normalize(torch.rand(9, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    calls: list[str] = []
    for one in (inside, peak_boxes):

        def counted(*args, one=one):
            calls.append(one.__name__)
            return one(*args)

        monkeypatch.setattr(f"itemkit.regions.{one.__name__}", counted)
    dense = make_localiser("dense", encoder)
    found = dense.locate(images, embedding, phrases, owner)
    assert calls == ["inside"] * 3 + ["peak_boxes"]  # once for each size, once for all maps
    for row, i in enumerate(owner.tolist()):
        whole = ImageEmbedding(embedding.pooled[[i]], embedding.patches[[i]])
        alone = dense.locate([images[i]], whole, phrases[[row]], torch.tensor([0]))
        assert torch.equal(alone.boxes[0], found.boxes[row])
        assert torch.allclose(alone.emb[0], found.emb[row], atol=1e-6)
        mask = inside((4, 4), encoder.frame(*images[i].size), images[i].size)
        patches = embedding.patches[i][mask]
        weight = ((patches @ phrases[row]) * encoder.logit_scale).softmax(dim=0)
        assert torch.allclose(found.emb[row], F.normalize(weight @ patches, dim=0), atol=1e-6)
    monkeypatch.setattr(
        "itemkit.regions.DENSE_CELLS", 2 * 4 * 19
    )  # two images at a time: 16 patches, 3 numbers
    parts = dense.locate(images, embedding, phrases, owner)
    assert torch.equal(parts.boxes, found.boxes) and torch.allclose(parts.emb, found.emb, atol=1e-6)


def test_dense_ignores_the_padding() -> None:
    encoder = Colours()
    encoder.resize_mode = "longest"
    padded = Image.new("RGB", (80, 80), "#ff0000")  # the padding is redder than anything in the image
    padded.paste(IMAGES[0].crop((0, 0, 60, 40)), (0, 20))
    padded.paste("#0000ff", (60, 20, 80, 60))
    regions = make_localiser("dense", encoder).locate(
        [IMAGES[0]], embed(encoder, [padded]), RED[None], torch.tensor([0])
    )
    assert cosines(regions, RED[None])[0] < 0.1


@pytest.mark.parametrize("name", ["whole", "grid", "dense"])
def test_order_of_images_and_phrases_changes_nothing(name: str) -> None:
    localiser = make_localiser(name, Colours())
    first = localiser.locate(IMAGES, embed(Colours(), IMAGES), PHRASES, OWNER)
    order = torch.tensor([2, 0, 1])
    back = localiser.locate(IMAGES[::-1], embed(Colours(), IMAGES[::-1]), PHRASES[order], 1 - OWNER[order])
    for field in ("boxes", "emb"):
        assert torch.allclose(getattr(first, field)[order], getattr(back, field), atol=1e-6)
    # no confidence of their own: their cosine follows from the embeddings
    assert first.scores.isnan().all() and first.found.all() and first.found.dtype == torch.bool
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
def test_a_batch_gives_the_numbers_of_one_image_at_a_time(folders, clip, name: str) -> None:
    # images of two sizes, with one to three phrases of several lengths
    images = [picture for picture in pictures() for _ in range(2)]
    texts = [["red ball", "the grass", "a blue cup on the sand"][: 1 + i % 3] for i in range(6)]
    phrases = [text for of_image in texts for text in of_image]
    owner = torch.tensor([i for i, of_image in enumerate(texts) for _ in of_image])
    passes = Passes(folders, clip, name)
    together = passes.locate(images, phrases, owner)
    assert len(passes.sizes) == {"owlv2": 1, "grounding_dino": 3}[name] and sum(passes.sizes) == 6
    for i, of_image in enumerate(texts):
        alone, rows = passes.locate([images[i]], of_image, torch.zeros(len(of_image), dtype=int)), owner == i
        assert torch.allclose(alone.scores, together.scores[rows], atol=1e-5)
        assert torch.allclose(alone.boxes, together.boxes[rows], atol=1e-2)
        assert torch.allclose(alone.emb, together.emb[rows], atol=1e-4)
    assert torch.allclose(together.emb.norm(dim=1), torch.ones(len(owner)), atol=1e-5)


class Passes:
    """A detector that writes down how many images went through each forward pass."""

    def __init__(self, folders, clip, name: str, **options) -> None:
        options = {"device": "cpu", "precision": "float32", "threshold": 0.0} | options
        self.localiser = make_localiser(name, clip, model=folders[name], **options)
        self.clip, self.sizes = clip, list[int]()
        assert isinstance(self.localiser, ObjectDetector)
        model = self.localiser.model
        model.register_forward_hook(lambda *call: self.sizes.append(len(call[2].pred_boxes)))

    def locate(self, images, texts, owner) -> Regions:
        text_emb = self.clip.encode_texts(texts)
        return self.localiser.locate(images, embed(self.clip, images), text_emb, owner, phrases=texts)


@pytest.mark.parametrize("name", ["owlv2", "grounding_dino"])
def test_nothing_found_is_the_whole_image_and_the_doubt_is_kept(folders, clip, name: str) -> None:
    images = [*pictures()[:2], Image.new("RGB", (1, 40))]
    sure = located(folders, clip, name, images, TEXTS, TEXT_OWNER)
    regions = located(folders, clip, name, images, TEXTS, TEXT_OWNER, threshold=1.1)
    assert torch.equal(regions.scores, sure.scores) and (sure.scores[:3] > 0).all() and sure.scores[3] == 0
    assert not regions.found.any()
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
    image, emb = pictures()[0], torch.zeros(9, 0)
    (found,) = dino.find([image], [texts], [emb])  # type: ignore[attr-defined]
    (one,), (two,) = (dino.find([image], [part], [emb]) for part in (texts[:6], texts[6:]))  # type: ignore[attr-defined]
    assert len(found) == 9 and np.allclose(*([box for box, _ in x] for x in (found, one + two)))


def test_prompt_spans() -> None:
    prompt, spans = _prompt(["Red ball", "St. Peter", " "])
    assert prompt == "red ball. st  peter. object."
    assert [prompt[a:b] for a, b in spans] == ["red ball", "st  peter", "object"]


# -- object detectors that see the image alone -------------------------------------------------------------


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: models.write_tiny_object_detector(root / kind, kind) for kind in models.DETECTORS}


def sees(family: Path, clip: Encoder, **options) -> Passes:
    return Passes({"object_detector": family}, clip, "object_detector", **options)


@pytest.mark.parametrize("kind", models.DETECTORS)
def test_every_family_gives_its_own_best_boxes_in_batches(families, clip, kind: str) -> None:
    images = [picture for picture in pictures() for _ in range(2)]
    texts, owner = ["a red ball", "two traffic lights"] * 6, torch.arange(6).repeat_interleave(2)
    passes = sees(families[kind], clip)
    found = passes.locate(images, texts, owner)
    one_size = kind in ("rt_detr", "rt_detr_v2", "d_fine")
    assert passes.sizes == ([6] if one_size else [2, 2, 2])
    model = transformers.AutoModelForObjectDetection.from_pretrained(families[kind]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(families[kind])
    for i, image in enumerate(images):
        with torch.no_grad():
            output = model(**processor(images=image, return_tensors="pt"))
        sides = [(image.height, image.width)]
        (own,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sides)
        for row, k in ((2 * i, 0), (2 * i + 1, 2)):  # where its post-processing keeps a box of that class
            if len(mine := (own["labels"] == k).nonzero().flatten()):
                top = mine[own["scores"][mine].argmax()]
                assert float(found.scores[row]) == pytest.approx(float(own["scores"][top]), abs=1e-5)
                limit = torch.tensor([image.width, image.height] * 2)
                box = torch.minimum(own["boxes"][top].clamp(min=0), limit)
                assert torch.allclose(found.boxes[row], box, atol=1e-2) or not found.found[row]


def test_half_precision_and_fingerprint(families, clip) -> None:
    half = sees(families["rt_detr_v2"], clip, precision="bfloat16")
    regions = half.locate(pictures(), ["ball"] * 3, torch.arange(3))
    assert half.localiser.dtype == torch.bfloat16 and regions.boxes.dtype == torch.float32
    said = part_fingerprint("localiser", half.localiser)
    assert said["kind"] == "object_detector" and said["files_sha256"] and "model" not in said
    planned = localiser_settings("object_detector", {"precision": "bfloat16", "threshold": 0.0})
    assert said.items() >= planned.items(), "else a plan never fits the model that is loaded"
    assert {key: said[key] for key in ("precision", "match", "boxes", "without_box", "threshold")} == {
        "precision": "bfloat16", "match": 0.9, "boxes": "best", "without_box": "whole", "threshold": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("ball", "ball"), ("a big red Ball", "ball"), ("two traffic lights", "traffic light"),
        ("a light", None), ("dogs", "dog"), ("a hot-dog stand", None), ("three young women", "person"),
        ("people", "person"), ("a man's dog", "dog"), ("n/a", None), ("", None),
    ],
)  # fmt: skip
def test_which_class_a_phrase_stands_for(families, clip, phrase: str, name: str | None) -> None:
    detector = sees(families["detr"], clip, match=None).localiser
    assert isinstance(detector, ImageAlone)
    (k,) = detector.classes_of([phrase], torch.zeros(1, clip.dim))
    assert (None if k is None else models.CLASSES[k]) == name


def test_plurals() -> None:
    pairs = "cherries cherry,glasses glass,benches bench,boxes box,horses horse,buses bus,knives knife"
    for pair in pairs.split(","):
        many, one = pair.split()
        assert _words(many) == _words(one) == (one,)
    assert _words("Traffic-Lights, grass!") == ("traffic", "light", "grass")


def test_other_words_are_matched_by_their_text_embedding(families, clip, monkeypatch) -> None:
    encoded: list[list[str]] = []
    encode = clip.encode_texts
    monkeypatch.setattr(clip, "encode_texts", lambda texts: encoded.append(list(texts)) or encode(texts))
    detector = sees(families["detr"], clip, match=0.999).localiser
    assert detector.classes_of(["pup", "stone"], encode(["dog", "sand"])) == [3, None]  # type: ignore[attr-defined]
    assert detector.classes_of(["pup"], encode(["cup"])) == [1]  # type: ignore[attr-defined]
    assert encoded == [["ball", "cup", "traffic light", "dog", "person"]]  # once, without N/A


class Made(ImageAlone):
    """An object detector whose boxes are given: q boxes as shares of the sides, and their class and score."""

    def run(self, images, words):
        boxes = torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.45], [0.5, 0.5, 1, 1], [0.5, 0, 1, 0.5]])
        scores = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.6, 0.1], [0.1, 0.2]])
        yield from [(boxes, scores.logit())] * len(images)


def made(**options) -> ImageAlone:
    config = type("config", (), {"id2label": {0: "ball", 1: "cup"}})
    model = torch.nn.Linear(1, 1)
    model.config = config  # type: ignore[assignment]
    processor = type("processor", (), {"size": {"height": 8, "width": 8}})
    options = {"threshold": 0.3, "match": None, "boxes": "best", "without_box": "whole"} | options
    return Made(Colours(), model, processor, options, {})  # type: ignore[arg-type]


def test_mentions_of_one_class_share_its_boxes_by_fit() -> None:
    """The more certain ball is the green one here; the phrase that comes first asks for the red one."""
    image = scene((80, 40), ((0, 0, 40, 20), "#00ff00"), ((40, 20, 80, 40), "#ff0000"))
    emb, embedding = torch.stack([BLUE, RED, GREEN]), embed(Colours(), [image])
    texts, owner = ["blue ball", "red ball", "green ball"], torch.zeros(3, dtype=int)
    found = made().locate([image], embedding, emb, owner, texts)
    assert found.boxes.tolist() == [[0, 0, 80, 40], [40, 20, 80, 40], [0, 0, 40, 20]]
    assert found.found.tolist() == [False, True, True]
    assert found.scores.tolist() == pytest.approx([0.1, 0.6, 0.9], abs=1e-6)


def test_the_kth_mention_gets_the_kth_best_box_that_lies_apart() -> None:
    texts, owner = ["red ball", "cup", "green ball", "a ball", "sky"], torch.zeros(5, dtype=int)
    emb = torch.stack([RED, RED, GREEN, RED, RED])
    found = made().locate([IMAGES[0]], embed(Colours(), IMAGES[:1]), emb, owner, texts)
    whole = [0, 0, 80, 40]
    # the second box of the ball is the first one again; the third mention has no box above the threshold
    assert found.boxes.tolist() == [[0, 0, 40, 20], whole, [40, 20, 80, 40], whole, whole]
    assert found.found.tolist() == [True, False, True, False, False]
    assert found.scores.tolist() == pytest.approx([0.9, 0.2, 0.6, 0.1, 0.0], abs=1e-6)


def test_a_large_batch_goes_in_parts(families, clip, monkeypatch) -> None:
    passes = sees(families["rt_detr_v2"], clip)
    texts, owner = ["ball"] * 3, torch.arange(3)
    together = passes.locate(pictures(), texts, owner)
    monkeypatch.setattr("itemkit.detection.BATCH_PIXELS", 2 * 64 * 64 + 1)
    parts = passes.locate(pictures(), texts, owner)
    assert passes.sizes == [3, 2, 1]
    assert torch.allclose(parts.boxes, together.boxes, atol=1e-3)


def test_union_and_grid_as_stand_in() -> None:
    texts, owner = ["two balls", "the red cup"], torch.zeros(2, dtype=int)
    embedding, emb = embed(Colours(), IMAGES[:1]), torch.stack([RED, RED])
    found = made(boxes="union", without_box="grid").locate([IMAGES[0]], embedding, emb, owner, texts)
    grid = make_localiser("grid", Colours()).locate([IMAGES[0]], embedding, emb[1:], owner[1:])
    assert found.boxes.tolist() == [[0, 0, 80, 40], grid.boxes[0].tolist()]
    assert found.found.tolist() == [True, False]
    assert found.scores.tolist() == pytest.approx([0.9, 0.2], abs=1e-6) and torch.equal(
        found.emb[1], grid.emb[0]
    )


def test_features_say_what_was_found(families, clip) -> None:
    class Named:
        version = "1"

        def objects(self, captions):
            return [["ball", "nothing of that"] for _ in captions]

    localiser = sees(families["rt_detr_v2"], clip, threshold=0.0, match=None).localiser
    features = Steps(Models(clip, None, Named(), localiser))(pictures(), ["a ball"] * 3)
    assert features.objects["found"].tolist() == [True, False] * 3
    assert features.objects["found"].dtype == bool and (features.objects["score"][1::2] == 0).all()
    grid = Steps(Models(clip, None, Named(), make_localiser("grid", clip)))(pictures()[:1], ["a ball"])
    assert grid.objects["score"].isna().all() and grid.objects["found"].all()


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("owlv2", {}, "is of the kind 'owlv2', expected 'conditional_detr', 'd_fine', .*'yolos'"),
        ("nameless", {}, "does not name its classes"),
        ("detr", {"boxes": "all"}, "got boxes 'all' and without_box 'whole'; expected 'best' or 'union'"),
        ("detr", {"without_box": "drop"}, "and without_box 'drop'; expected .* and 'whole' or 'grid'"),
        ("detr", {"labels": 3}, "has no option 'labels'"),
    ],
)
def test_what_is_no_object_detector(folders, families, clip, tmp_path, folder, options, message) -> None:
    places = folders | families | {"nameless": tmp_path / "nameless"}
    if folder == "nameless":
        models.write_tiny_object_detector(places[folder], "yolos", [f"LABEL_{k}" for k in range(3)])
    with pytest.raises(ItemkitError, match=message):
        make_localiser("object_detector", clip, model=places[folder], **options)
