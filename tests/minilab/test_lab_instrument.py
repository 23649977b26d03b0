"""The laboratory's fakes, ladders, guards and model cards."""

from __future__ import annotations

import io
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import ndimage

from itemkit.errors import InputError
from minilab import build, cards, data, fakes, flow, guards, ladders, latent, painter, vq, world
from minilab.grammar import COLOURS, KINDS, SETTINGS
from minilab.renders import GROUND, RenderSet, make_renders
from minilab.world import SIZE

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def renders() -> RenderSet:
    return make_renders("models_val", 24)


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained generators in the files that the laboratory commits."""
    folder = tmp_path_factory.mktemp("generators")
    for seed, name in enumerate([*fakes.MAKERS, *(s for s in fakes.STAGE.values() if "@" in s)]):
        torch.manual_seed(seed)
        model = fakes.MAKERS[name.partition("@")[0]]()
        for weight in model.parameters():  # or the flows' last layer would answer zero to everything
            weight.data += 0.01 * torch.randn_like(weight)
        build._save_half(folder / f"{name}.safetensors", model.state_dict())
    return folder


@pytest.mark.parametrize("name", fakes.GENERATORS)
def test_every_generator_samples_from_its_file(
    name: str, generators: Path, renders: RenderSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes.flow, "sample", partial(flow.sample, steps=2))
    monkeypatch.setattr(fakes.latent, "sample", partial(latent.sample, steps=2))
    few = renders.part(slice(3))
    images = fakes.sample_fakes(name, generators, few, seed=7)
    assert images.shape == (3, SIZE, SIZE, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(fakes.sample_fakes(name, generators, few, seed=7), images)
    assert (fakes.sample_fakes(name, generators, few, seed=8) != images).any()
    if name == "edit":
        changed = (images != few.images).any(-1)
        assert not (changed & ~fakes.edit_masks(few.owner, 7 * 100_003)).any() and changed.any()


def test_what_the_decoder_paints_is_learned_from_its_own_codes(renders: RenderSet) -> None:
    torch.manual_seed(0)
    decoder = vq.VqVae().eval()
    latents = latent.encode_renders(decoder, renders)
    assert latents.shape == (24, vq.N_DIMS, vq.GRID, vq.GRID)
    np.testing.assert_allclose(latents.float().pow(2).mean(), 1, atol=0.01)
    lesson = painter.LayoutFlowLesson(renders, net=latent.make_unet(), latents=latents)
    loss, _ = lesson(np.random.default_rng(0))
    assert loss.item() > 1  # an untrained network answers zero: unit variance over the time that is left


def test_a_layout_tells_kind_and_colour_of_every_pixel(renders: RenderSet) -> None:
    layout = painter.layouts(renders).numpy()
    assert layout.shape == renders.owner.shape and layout.max() < painter.N_LABELS
    assert ((layout == 0) == (renders.owner == 0)).all()
    for labels, owner, facts in zip(layout, renders.owner, renders.facts, strict=True):
        for place, (colour, kind) in enumerate(facts.things, 1):
            label = 1 + KINDS.index(kind) * len(COLOURS) + COLOURS.index(colour)
            assert (labels[owner == place] == label).all()
        assert (labels[owner == GROUND] == 97 + SETTINGS.index(facts.setting)).all()


def test_the_energy_score_is_least_for_the_distribution_itself() -> None:
    torch.manual_seed(0)
    shape = (2000, 3, SIZE // 4, SIZE // 4)  # the truth: one grey of two for the whole picture

    def draw(spread: float) -> torch.Tensor:
        return spread * (torch.randint(2, (shape[0], 1, 1, 1)) * 2.0 - 1).expand(shape)

    truth = draw(1.0)
    scores = {s: float(painter.energy_score(truth, draw(s), draw(s))) for s in (0.0, 0.5, 1.0, 1.5)}
    assert min(scores, key=scores.get) == 1.0  # type: ignore[arg-type]
    assert scores[0.0] > scores[1.0], "the mean of both greys is no good answer"


def test_codes_follow_the_encoder_and_idle_ones_restart() -> None:
    torch.manual_seed(0)
    model = vq.VqVae()
    z = torch.nn.functional.normalize(torch.randn(4, vq.N_DIMS, vq.GRID, vq.GRID), dim=1)
    for _ in range(600):
        model.follow(z, model.nearest(z))
    quantised = model.look_up(model.nearest(z))
    assert (quantised * z).sum(1).mean() > 0.95
    torch.testing.assert_close(model.codes.norm(dim=1), torch.ones(vq.N_CODES))


def test_every_model_gets_a_card_with_its_own_measurements(tmp_path: Path) -> None:
    for name in ("clip", "clip_second"):
        (tmp_path / "models" / name).mkdir(parents=True)
    facts = {"steps": 1500, "batch": 64, "parameters": 1_255_297, "seconds": 60, "device": "cpu"}
    facts |= {"machine": "x", "torch": "2"}
    measured = {"clip_r_at_1_of_1000": 0.9, "clip_second_r_at_1_of_1000": 0.8}
    (tmp_path / "cards.json").write_text(
        json.dumps({"clip": facts, "clip_second": facts, "flow": facts, "measured": measured})
    )
    distances = {"frechet": 12.5, "frechet_low": 0.0, "frechet_high": 7.25}
    rows = [{"name": name, "n": 5, **distances, "scene": 0.4} for name in ("real", "flow")]
    pd.DataFrame(rows).to_csv(tmp_path / "quality.csv", index=False)
    cards.write_cards(tmp_path)
    first, second = ((tmp_path / "models" / n / "README.md").read_text() for n in ("clip", "clip_second"))
    assert "| r at 1 of 1000 | 0.9 |" in first and "0.8" not in first and "1,255,297" in first
    assert "| r at 1 of 1000 | 0.8 |" in second and "1,500 of 64" in second
    generators = (tmp_path / "generators.md").read_text()
    assert "## flow" in generators and "## vae" not in generators
    # samples are no unseen renders; a distance says its factor, and why it may lie outside its interval
    assert "| measured on 5 samples | |" in generators and "unseen renders" not in generators
    assert "| Fréchet distance × 1000 | 12.5 (95 %: 0.0 to 7.2) |" in generators
    assert "it may fall below 0; other renders, measured like samples, are at 12.5" in generators


def test_the_parser_was_measured_on_sentences(tmp_path: Path) -> None:
    (tmp_path / "models" / "parser").mkdir(parents=True)
    facts = {"device": "cpu", "machine": "x", "torch": "2", "held_out": {"tag_acc": 1.0}}
    (tmp_path / "cards.json").write_text(json.dumps({"parser": facts}))
    cards.write_cards(tmp_path)
    card = (tmp_path / "models" / "parser" / "README.md").read_text()
    assert "| measured on unseen sentences of the grammar | |" in card and "| tag acc | 1.0 |" in card


def test_the_detector_has_a_card(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "detector"
    folder.mkdir(parents=True)
    record = {
        "representation": {"level": "hierarchical", "kind": "absolute", "pooling": "mean_worst"},
        "calibration": "temperature",
        "selection_fraction": 0.5,
        "thresholds": {"0.05": "Of real images like these"},
        "trained_on": {
            "train_images": {"gan": 1000, "vae": 160, "real": 320},
            "val_images": {"gan": 6, "real": 9},
        },
    }
    (folder / "detector.json").write_text(json.dumps(record))
    (tmp_path / "cards.json").write_text("{}")
    cards.write_cards(tmp_path)
    card = (folder / "README.md").read_text()
    assert "320 renders and 1,160 fakes (`gan`, `vae`) of the train split" in card
    assert "temperature, on 9 renders and 6 fakes" in card and "photographs its output means nothing" in card
    assert "- 5% false positives: Of real images like these" in card


def test_committed_cards_are_those_that_were_noted(tmp_path: Path) -> None:
    mini = REPO / "data" / "mini"
    shutil.copytree(mini, tmp_path / "mini", ignore=shutil.ignore_patterns("*.parquet", "*.safetensors"))
    cards.write_cards(tmp_path / "mini")
    for card in (mini / "generators.md", *sorted(mini.glob("models/*/README.md"))):
        written = (tmp_path / "mini" / card.relative_to(mini)).read_text()
        assert card.read_text() == written, f"{card}: `python -m minilab build cards` writes it again"


def test_every_stage_that_is_kept_is_used() -> None:
    schedules = {"flow": flow.SCHEDULE, "latent_flow": latent.SCHEDULE, "vq": vq.SCHEDULE,
                 "layout_flow": painter.FLOW_SCHEDULE, "painter": painter.SCHEDULE}  # fmt: skip
    kept = {f"{name}@{step}" for name, schedule in schedules.items() for step in schedule.snapshots}
    used = {*fakes.STAGE.values(), *ladders.RUNGS} - set(ladders.SEMANTICS)
    assert kept == {name for name in used if "@" in name}


def test_rungs_start_where_they_should(generators: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = make_renders("spare", 3, start=ladders.FIRST_SCENE)
    asked: list[float] = []

    def sample(
        model: object, fields: torch.Tensor, *, seed: int, start: torch.Tensor, keep: float
    ) -> torch.Tensor:
        asked.append(keep)
        return start

    monkeypatch.setattr(fakes.flow, "sample", sample)
    for rung in ladders.SEMANTICS:
        pictures = ladders.sample_rung(rung, generators, scenes, seed=1)
        np.testing.assert_array_equal(pictures, scenes.images)
    assert asked == [0.2, 0.4, 0.6, 0.8, 0.9]
    assert {ladders.ladder_of(r) for r in ladders.RUNGS} == {*ladders.QUALITY, "keep"}


def test_the_frechet_distance_by_hand() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 5))
    assert ladders._plain_frechet(a, a) == pytest.approx(0, abs=1e-8)
    # equal covariance: the squared distance of the means
    assert ladders._plain_frechet(a, a + [3, 0, 4, 0, 0]) == pytest.approx(25)
    line = ladders._plain_frechet(np.array([[-1.0], [1.0]]), np.array([[-3.0], [3.0]]))
    assert line == pytest.approx(8.0)  # standard deviations sqrt 2 and 3 sqrt 2
    with pytest.raises(InputError, match=r"shapes \(4, 3\) and \(4, 2\)"):
        ladders.frechet_distance(np.zeros((4, 3)), np.zeros((4, 2)))


def test_the_frechet_distance_has_no_bias_and_its_interval_holds() -> None:
    rng, truth_ = np.random.default_rng(1), 20 * 0.5**2  # (1.5 - 1)^2 in each of 20 dimensions
    found, plain = [], []
    for seed in range(40):
        a, b = rng.normal(size=(200, 20)), 1.5 * rng.normal(size=(200, 20))
        found.append(ladders.frechet_distance(a, b, n_draws=20, seed=seed))
        plain.append(ladders._plain_frechet(a, b))
        assert found[-1]["low"] < found[-1]["value"] < found[-1]["high"]
    values = np.array([f["value"] for f in found])
    error = values.std() / 40**0.5
    assert abs(values.mean() - truth_) < 4 * error + 0.05 < np.mean(plain) - truth_
    held = np.mean([f["low"] <= truth_ <= f["high"] for f in found])
    assert held >= 0.85


def test_rungs_and_fakes_share_no_scene() -> None:
    used = len(fakes.GENERATORS) * sum(fakes.COUNTS.values())
    assert used <= ladders.FIRST_SCENE
    assert len(set(world.SPLITS.values())) == len(world.SPLITS), "one stream of scenes for each split"


def test_the_card_says_which_generators_are_a_fair_fight(tmp_path: Path) -> None:
    rows = [
        {"guard": guard, "classes": classes, "generator": name, "condition": condition, "value": value}
        for guard in guards.GUARDS
        for classes in (2, 1)
        for name, raw, shot in (("flow", 0.99, 0.55), ("vae", 1.0, 0.71))
        for condition, value in (("raw", raw), ("camera", shot), ("jpeg", 0.5))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "guards.csv", index=False)
    (tmp_path / "cards.json").write_text("{}")
    cards.write_cards(tmp_path)
    card = (tmp_path / "generators.md").read_text()
    assert "| spectrum | one | 0.99 | 1.00 |" in card and "| spectrum | two | 0.55 | 0.71 |" in card
    assert "(no guard above 0.60): `flow`. Not: `vae` (0.71)." in card


@pytest.fixture
def two_generators(monkeypatch: pytest.MonkeyPatch, generators: Path) -> Path:
    """A data set of a few pictures: a painter's, and edits by the flow."""
    monkeypatch.setattr(fakes, "GENERATORS", ("painter", "edit"))
    for module in (fakes, data):
        monkeypatch.setattr(module, "COUNTS", {"train": 8, "val": 4, "test": 6})
    monkeypatch.setattr(fakes.flow, "sample", partial(flow.sample, steps=2))
    return generators


def test_fakes_are_photographed_and_kept_as_they_were_painted(two_generators: Path) -> None:
    photos, raw = fakes.build_fakes(two_generators)
    assert photos.groupby(["generator", "split"], sort=False).size().tolist() == [8, 4, 6] * 2
    test = photos[photos.split == "test"].reset_index(drop=True)
    pd.testing.assert_frame_equal(photos.drop(columns="image"), raw.drop(columns="image"))
    assert not set(photos.image) & set(raw.image)
    originals = fakes.edit_originals()
    edits = test[test.generator == "edit"]
    assert originals.prompt.tolist() == edits.prompt.tolist()
    # one scene, one set of settings, one noise: outside the square (and its JPEG blocks) little differs
    scenes = make_renders("spare", 18, start=18).part(slice(12, 18))
    masks = fakes.edit_masks(make_renders("spare", 18, start=18).owner, 2 * 100_003)[12:]
    for before, after, mask, scene in zip(originals.image, edits.image, masks, scenes.images, strict=True):
        a, b = (np.asarray(Image.open(io.BytesIO(x))).astype(int) for x in (before, after))
        assert a.shape == scene.shape
        near = np.asarray(Image.fromarray(mask).resize((6, 6), Image.Resampling.BOX)) > 0
        near = np.kron(ndimage.binary_dilation(near, np.ones((3, 3))), np.ones((8, 8))) > 0
        if not near.all():
            assert np.abs(a - b)[~near].mean() < 2 < np.abs(a - b)[mask].mean()


def test_guards_are_tried_under_three_conditions(two_generators: Path) -> None:
    found = guards.three_conditions(two_generators)
    assert list(found) == ["guard", "classes", "generator", "value", "low", "high", "condition"]
    assert len(found) == 3 * len(guards.GUARDS) * 2 * 2
    assert found.groupby("condition").size().to_dict() == {"raw": 20, "camera": 20, "jpeg": 20}
    assert (found.low <= found.value).all() and (found.value <= found.high).all()


def test_guards_find_what_needs_no_content() -> None:
    images = make_renders("train", 120).images
    noise = np.random.default_rng(0).normal(0, 25, images[60:].shape)
    noisy = np.clip(images[60:] + noise, 0, 255).astype(np.uint8)
    splits = (["train"] * 30 + ["test"] * 30) * 2
    table = pd.DataFrame({"generator": ["real"] * 60 + ["noisy"] * 60, "split": splits})
    found = guards.leaks(table, np.concatenate([images[:60], noisy]), seeds=[0])
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()
    found = found.set_index(["guard", "classes"])["value"]
    assert found["noise level"].min() > 0.95 and found["file bytes"].min() > 0.95
    same = guards.leaks(table, np.concatenate([images[:60]] * 2), seeds=[0])["value"]
    assert same.between(0.3, 0.7).all(), "equal pictures give nothing away"
    assert guards.border(images[:2]).shape == (2, 24)
