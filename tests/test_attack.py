"""Attacks: at budget 0 nothing changes, budgets are kept in the files, known optima are reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from itemkit import attack, misalignment, perturb
from itemkit.detector import Detector
from itemkit.encoder import Encoder
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.images import load_image
from itemkit.misalignment import RepresentationConfig
from itemkit.models import Models
from itemkit.presets import get_preset, mini_folder
from itemkit.regions import make_localiser
from itemkit.steps import Steps

from fakes import FakeEncoder, FakeParser, fake_models, png
from models import write_tiny_object_detector


def pictures(sizes: Sequence[tuple[int, int]] = ((12, 10), (9, 14), (12, 10))) -> list[Image.Image]:
    return [load_image(png(seed, size)) for seed, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def mini() -> Models:
    return get_preset("mini", localiser="grid").build("cpu")


@pytest.fixture(scope="module")
def renders() -> list[Image.Image]:
    """Real images of the laboratory, two of them of other sizes."""
    stored = pd.read_parquet(mini_folder() / "reals.parquet", columns=["image"])["image"].head(6)
    images = [load_image(data) for data in stored]
    return [images[0].resize((60, 40)), images[1].resize((33, 48)), *images[2:]]


# ---- images as numbers -------------------------------------------------------------------------------------


def test_images_come_back_as_they_were_whatever_their_sizes() -> None:
    images = pictures()
    pixels = attack.to_pixels(images)
    assert pixels.shape == (3, 3, 14, 12)
    back = attack.to_images(pixels, [image.size for image in images])
    assert [x.tobytes() for x in back] == [x.tobytes() for x in images]


def test_what_a_model_is_shown_is_exact_and_its_gradient_stays_in_the_cut() -> None:
    images = pictures()
    pixels = attack.to_pixels(images).requires_grad_()
    cuts = [(1, (2, 3, 8, 9)), (0, (0, 0, 12, 10))]
    encoder = FakeEncoder()
    shown = attack.seen(pixels, cuts, encoder.preprocess, [1.0, 1.0, 1.0])
    expected = torch.stack([encoder.preprocess(images[i].crop(box)) for i, box in cuts])
    torch.testing.assert_close(shown.detach(), expected, rtol=0, atol=1e-6)
    shown[0].sum().backward()
    reached = pixels.grad[1].abs().sum(0) > 0
    assert reached[3:9, 2:8].all() and reached.sum() == 36
    assert not pixels.grad[[0, 2]].any()


def test_a_frame_beyond_the_image_is_padding_and_one_within_is_a_crop() -> None:
    image = pictures([(10, 6)])
    pixels = attack.to_pixels(image).requires_grad_()
    for frame, reached in ((lambda w, h: (2, 0, 8, 6), 36), (lambda w, h: (0, -2, 10, 8), 60)):
        pixels.grad = None
        cut = [(0, (0, 0, 10, 6))]
        attack.seen(pixels, cut, lambda x: torch.zeros(3, 8, 8), [1.0] * 3, frame).sum().backward()
        assert (pixels.grad[0].abs().sum(0) > 0).sum() == reached


# ---- the stages --------------------------------------------------------------------------------------------


def test_forms_of_misalignment_are_those_of_the_library() -> None:
    a, b = torch.nn.functional.normalize(torch.randn(2, 5, 7), dim=-1)
    assert set(attack.FORMS) == set(misalignment.FORMS)
    for kind, form in attack.FORMS.items():
        np.testing.assert_allclose(form(a, b), misalignment.FORMS[kind](a.numpy(), b.numpy()), atol=1e-6)


def fitted(features: Features, config: RepresentationConfig) -> Detector:
    """A detector of these few images, for the numbers alone."""
    detector, y = Detector(config), np.arange(len(features)) % 2
    x = detector.representation.fit(with_labels(features, y))(features)
    detector.head_ = MisalignmentMLP(members=2, max_epochs=2, device="cpu").fit(x, y, x, y)
    detector.trained_on_ = {"fingerprint": None}
    return detector


def with_labels(features: Features, y: np.ndarray) -> Features:
    return dataclasses.replace(features, table=features.table.assign(label=y, image_id=range(len(y))))


CAPTIONS = [None, "a red ball on the sand", "there is", None, "a blue mug and a blue mug", "a tree"]


@pytest.mark.parametrize("localiser", ["grid", "dense", "whole"])
def test_at_budget_0_the_pipeline_says_what_the_detector_says(mini, renders, localiser: str) -> None:
    models = dataclasses.replace(mini, localiser=make_localiser(localiser, mini.encoder))
    features = Steps(models)(renders, CAPTIONS)
    assert 0 in features.table["n_objects"].tolist()  # its own only object
    features.objects["found"] = np.arange(len(features.objects)) % 3 > 0
    pixels = attack.to_pixels(renders)
    configs = [misalignment.REPRESENTATIONS[name] for name in ("absolute", "drawn", "cosines_relative")]
    configs += [
        RepresentationConfig(pooling="soft_worst", found_only=True, kind="concat"),
        RepresentationConfig(level="local", pooling="top_k"),
        RepresentationConfig(level="global"),
    ]
    for config in configs:
        detector = fitted(features, config)
        with torch.no_grad():
            found = attack.Pipeline(models, features, detector)(
                attack.pgd(lambda x: x.sum((1, 2, 3)), pixels, 0)
            )
        np.testing.assert_allclose(found, detector.decision_function(features), atol=1e-3)
    three = misalignment.represent(features, "cosines")
    with torch.no_grad():
        np.testing.assert_allclose(
            attack.Pipeline(models, features)(pixels), -three[:, :2].mean(1), atol=1e-5
        )


def test_the_gradient_of_the_pipeline_makes_real_images_fit_worse(mini, renders) -> None:
    features = Steps(mini)(renders)
    pipeline, pixels = attack.Pipeline(mini, features), attack.to_pixels(renders)
    worse = attack.pgd(lambda x: -pipeline(x), pixels, 4, steps=3)
    with torch.no_grad():
        assert (pipeline(worse) > pipeline(pixels) + 0.05).all()


def test_said_is_what_the_captioner_itself_holds_likely(mini, renders) -> None:
    captions = mini.captioner.caption(renders)
    said = attack.Said(mini.captioner, [c.text for c in captions], [x.size for x in renders])
    with torch.no_grad():
        np.testing.assert_allclose(-said(attack.to_pixels(renders)), [c.logprob for c in captions], atol=1e-4)


def test_the_captioner_can_be_made_to_say_a_sentence(mini, renders) -> None:
    wanted, pixels = ["a red ball on the snow"] * 4, attack.to_pixels(renders[2:])
    said = attack.Said(mini.captioner, wanted, [(48, 48)] * 4)
    with torch.no_grad():
        before, after = said(pixels), said(attack.pgd(said, pixels, 8, steps=4))
    assert (after < before).all()


def test_an_object_can_be_hidden_from_a_detector(tmp_path: Path, mini, renders) -> None:
    found = make_localiser("object_detector", mini.encoder, device="cpu", match=None, threshold=0.0,
                           model=write_tiny_object_detector(tmp_path))  # fmt: skip
    captions = ["a red ball on the sand", "a ball and a mug", "a tree"]
    features = Steps(dataclasses.replace(mini, localiser=found))(renders[2:5], captions)
    noticed, pixels = attack.Noticed(found, features), attack.to_pixels(renders[2:5])
    assert [len(classes) for classes in noticed.classes] == [1, 1, 0]
    with torch.no_grad():
        before, after = noticed(pixels), noticed(attack.pgd(noticed, pixels, 8, steps=3))
    np.testing.assert_allclose(before[0].exp(), features.objects["score"][0], rtol=1e-4)
    assert (after[:2] < before[:2]).all() and after[2] == before[2] == 0


def test_models_that_have_no_gradient_here_are_refused(mini) -> None:
    features = Steps(fake_models())(pictures(), ["a red ball"] * 3)
    with pytest.raises(InputError, match="the encoder is a FakeEncoder; gradients need one"):
        attack.Pipeline(fake_models(), features)
    assert isinstance(mini.encoder, Encoder)
    other = SimpleNamespace(model=object(), tokenizer=None)
    with pytest.raises(InputError, match="the captioner is a object; this attack knows BLIP alone"):
        attack.Said(other, ["a ball"], [(4, 4)])


# ---- pixels ------------------------------------------------------------------------------------------------


def test_at_budget_0_nothing_changes() -> None:
    pixels = attack.to_pixels(pictures())
    assert torch.equal(attack.pgd(lambda x: x.sum((1, 2, 3)), pixels, 0), pixels)


@pytest.mark.parametrize("eps", [1, 2, 8])
def test_on_a_linear_model_the_optimum_is_reached_and_the_files_keep_the_budget(tmp_path, eps: int) -> None:
    images = pictures([(12, 10)] * 3)
    pixels = attack.to_pixels(images)
    weight = torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(0))

    def linear(x: torch.Tensor) -> torch.Tensor:
        return (x * weight).sum((1, 2, 3))

    # each value goes as far as budget and range allow, against the sign of its weight
    best = (pixels - eps / 255 * weight.sign()).clamp(0, 1)
    found = attack.pgd(linear, pixels, eps, steps=10)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)
    for i, image in enumerate(attack.to_images(found, [(12, 10)] * 3)):
        image.save(tmp_path / f"{i}.png")
        moved = np.asarray(load_image(tmp_path / f"{i}.png"), int) - np.asarray(images[i], int)
        assert np.abs(moved).max() == eps


def test_the_best_point_is_kept_also_where_the_last_is_worse() -> None:
    pixels = attack.to_pixels(pictures())
    seen = []

    def rises(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().clone())
        return x.sum((1, 2, 3)) * 0 + len(seen)

    assert torch.equal(attack.pgd(rises, pixels, 4, steps=3), pixels)
    assert len(seen) == 5  # the original, the random start, three steps
    assert all(torch.equal(x, (x * 255).round() / 255) for x in seen)


def test_over_transforms_the_loss_is_a_mean_of_the_real_thing_and_has_a_gradient() -> None:
    images = pictures([(16, 16)] * 2)
    pixels, sizes = attack.to_pixels(images).requires_grad_(), [(16, 16)] * 2

    def total(x: torch.Tensor) -> torch.Tensor:
        return x.sum((1, 2, 3))

    mean = attack.over(total, [perturb.CLEAN, perturb.jpeg(50)], sizes)
    value = mean(pixels)
    jpegs = attack.to_pixels([perturb.jpeg(50)(image, "") for image in images])
    torch.testing.assert_close(value, (total(pixels) + total(jpegs)) / 2, rtol=1e-5, atol=1e-4)
    value.sum().backward()
    assert torch.equal(pixels.grad, torch.ones_like(pixels))
    noisy = attack.over(total, [perturb.noise(10)], sizes)
    assert not torch.equal(noisy(pixels), noisy(pixels)), "each call draws anew"


def test_budgets_grow_until_an_image_is_won_and_the_files_keep_them(tmp_path: Path) -> None:
    images, goals = pictures(), [1, 4, 99]  # grey levels by which the mean must fall
    asked: list[tuple[int, list[int]]] = []

    def make(rows: np.ndarray, tries: list[Image.Image], eps: int) -> attack.Loss:
        asked.append((eps, rows.tolist()))
        assert [x.size for x in tries] == [images[i].size for i in rows]
        return attack.signed(lambda x: -x.sum((1, 2, 3)), torch.tensor([-1.0] * len(rows)))

    def judge(files: list[Image.Image], rows: np.ndarray) -> pd.DataFrame:
        fell = [
            (np.asarray(images[i], int) - np.asarray(file, int)) for i, file in zip(rows, files, strict=True)
        ]
        assert all(0 <= x.min() and x.max() == asked[-1][0] for x in fell)
        return pd.DataFrame({"won": [x.max() >= goals[i] for i, x in zip(rows, fell, strict=True)]})

    table, last = attack.escalate(make, images, judge, [1, 2, 4, 8], 5, tmp_path)
    assert asked == [(1, [0, 1, 2]), (2, [1, 2]), (4, [1, 2]), (8, [2])]
    assert table.loc[table.won, ["image", "eps"]].values.tolist() == [[0, 1], [1, 4]]
    assert [x.tobytes() for x in last] == [load_image(tmp_path / f"{i}.png").tobytes() for i in range(3)]


# ---- captions ----------------------------------------------------------------------------------------------


def test_reading_with_many_captions_gives_what_the_steps_give(mini, renders) -> None:
    captions = [["a red ball on the sand", "there is"], ["a blue mug", "a blue mug on a red ball"]]
    found = attack.read_with(mini, renders[:2], captions)
    images = [renders[0], renders[0], renders[1], renders[1]]
    expected = Steps(mini)(images, [text for texts in captions for text in texts])
    for name in ("image_emb", "caption_emb", "region_emb", "phrase_emb", "owner"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
    pd.testing.assert_frame_equal(found.objects, expected.objects, check_dtype=False)
    same = ["caption", "width", "height"]
    pd.testing.assert_frame_equal(found.table[same], expected.table[same], check_dtype=False)
    alone = attack.read_with(dataclasses.replace(mini, localiser=None), renders[:1], [["a ball"]])
    assert len(alone.objects) == 0 and len(alone) == 1
    none = attack.read_with(dataclasses.replace(mini, parser=FakeParser()), renders[:1], [["nothing"]])
    assert len(none.objects) == 0


def words_apart(a: str, b: str) -> int:
    """Levenshtein's distance in words."""
    a_words, b_words = a.split(), b.split()
    row = list(range(len(b_words) + 1))
    for i, word in enumerate(a_words, 1):
        row, above = [i], row
        for j, other in enumerate(b_words, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1]


TEXTS = ["a red ball on the sand and a blue cup", "snow", "the tree"]


@pytest.mark.parametrize("swaps", [(), ["cat", "dog"], {"red": ["pink"], "tree": ["bush"]}])
def test_captions_keep_their_budget_and_get_no_worse(swaps) -> None:
    rng = np.random.default_rng(0)
    scores: dict[str, float] = {}

    def score(asked: list[list[str]]) -> list[np.ndarray]:
        assert all(texts[0] in best_so_far for texts in asked) and max(map(len, asked)) <= 20
        return [np.array([scores.setdefault(text, rng.random()) for text in texts]) for texts in asked]

    best_so_far = {*TEXTS}
    score_and_note = lambda asked: best_so_far.update(t for ts in asked for t in ts) or score(asked)  # noqa: E731
    found = attack.edit_captions(TEXTS, score_and_note, 4, swaps, tries=20)
    assert found[0] == TEXTS and len(found) == 5
    for k, texts in enumerate(found):
        assert all(words_apart(text, old) <= k and text for text, old in zip(texts, TEXTS, strict=True))
    for less, more in zip(found[1:], found[2:], strict=False):
        assert all(scores[b] <= scores[a] for a, b in zip(less, more, strict=True))


def test_the_search_finds_what_there_is_to_find() -> None:
    def reds(asked: list[list[str]]) -> list[np.ndarray]:
        return [np.array([-text.split().count("red") - (text == "a red ball") for text in t]) for t in asked]

    assert attack.edit_captions(["a b c"], reds, 3, ["red"])[-1] == ["red red red"]
    # an object of five words goes at once, when the budget has as many
    dropped = attack.edit_captions(["a red ball and a blue cup on"], reds, 5, tries=200)
    assert [texts[0] == "a red ball" for texts in dropped] == [False] * 5 + [True]
    swapped = attack.edit_captions(["a pink b"], reds, 2, {"pink": ["red"]}, drop=False)
    assert swapped == [["a pink b"], ["a red b"], ["a red b"]]
