"""The laboratory's lessons, trainings, samplers and saved formats, at the smallest size that shows a bug."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from itemkit.captions import load_captioner
from itemkit.encoder import load_encoder
from itemkit.errors import InputError
from minilab import build, captioner, clip, flow, object_detector, painter, training, truth, vq
from minilab.conditions import Condition, encode_facts
from minilab.formats import save_blip, save_clip
from minilab.grammar import COLOURS, KINDS, SETTINGS, Facts, caption
from minilab.renders import GROUND, RenderSet, make_renders, reframe, to_pixels
from minilab.training import Schedule, train
from minilab.world import SIZE

LESSONS = {
    "clip": (clip, clip.ClipLesson),
    "captioner": (captioner, captioner.CaptionerLesson),
    "object_detector": (object_detector, object_detector.DetectorLesson),
    "flow": (flow, lambda renders: flow.FlowLesson(flow.UNet(), renders)),
    "layout_flow": (flow, painter.LayoutFlowLesson),
    "painter": (painter, painter.PainterLesson),
    "vq": (vq, vq.VqLesson),
}


@pytest.fixture(scope="module")
def renders() -> RenderSet:
    return make_renders("models_val", 24)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, _ in LESSONS.values():
        monkeypatch.setattr(module, "BATCH", 12)
    monkeypatch.setattr(clip, "CROPS", 6)


def make(name: str, renders: RenderSet, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LESSONS[name][1](renders)


def same_step(lesson: nn.Module) -> tuple[torch.Tensor, dict[str, float]]:
    """One step on the same pictures, words and noise each time."""
    torch.manual_seed(5)
    return lesson(np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------- lessons


@pytest.mark.parametrize(
    ("name", "least"), [("clip", 0.4), ("captioner", 0.4), ("flow", 0.05), ("painter", 0.1)]
)
def test_the_loss_falls_on_a_repeated_batch(name: str, least: float, renders: RenderSet) -> None:
    lesson = make(name, renders)
    optimiser = torch.optim.AdamW(lesson.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss, numbers = same_step(lesson)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        assert all(np.isfinite(v) for v in numbers.values())
    assert losses[-1] < losses[0] * (1 - least) and np.isfinite(losses).all()
    # nothing that is learned is left out of the loss
    idle = [n for n, p in lesson.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in idle if "bias" not in n] == []


def test_a_lesson_s_words_are_all_known(renders: RenderSet) -> None:
    lesson = make("clip", renders)
    unknown = lesson.tokenizer.unk_token_id
    assert not (lesson.phrase_tokens == unknown).any()
    assert not (lesson.tokens([caption(f) for f in renders.facts]) == unknown).any()
    assert (lesson.tokens(["a red dragon on the sand"]) == unknown).sum() == 1
    assert clip.PHRASES[12 + 11] == "an orange lamp" and clip.PHRASES[97] == "the sand"


def test_crops_show_the_thing_they_are_labelled_with(renders: RenderSet) -> None:
    images = np.zeros_like(renders.images[:6])
    owner = np.array(renders.owner[:6])
    for value, grey in ((1, 90), (2, 140), (3, 190)):  # each thing painted in a grey of its own
        images[owner == value] = grey
    classes = np.tile(np.arange(10), (6, 1))
    crops, labels = clip.cut_out(images, owner, classes, 30, np.random.default_rng(0))
    assert crops.shape == (30, SIZE, SIZE, 3) and {1, GROUND} <= set(labels)
    for crop, label in zip(crops, labels, strict=True):
        if label in (1, 2, 3):
            assert (np.abs(crop.astype(int) - (40 + 50 * label)) < 12).mean() > 0.08


def test_equal_scenes_are_no_negatives() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    same = torch.eye(3, dtype=torch.bool)
    plain = clip._contrast(logits, same)
    same[0, 1] = same[1, 0] = True
    told_apart = clip._contrast(logits, same)
    # rows 0 and 1 then choose between their own and the third only: log(1 + e^-2), as the third between three
    own = np.log1p(np.exp(-2.0))
    assert told_apart.item() == pytest.approx((2 * own + np.log1p(2 * np.exp(-2.0))) / 3, abs=1e-6)
    assert told_apart < plain


def test_pixels_by_hand() -> None:
    pixels = to_pixels(np.array([[[[0, 51, 255]]]], dtype=np.uint8))
    torch.testing.assert_close(pixels.flatten(), torch.tensor([-1.0, -0.6, 1.0]))


class Drawn:
    """Stands for a random generator whose numbers are known."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def uniform(self, low: float, high: float) -> float:
        return self.numbers.pop(0)


def test_a_new_frame_by_hand(renders: RenderSet) -> None:
    images, owner = renders.images[:2], renders.owner[:2]
    same = reframe(images, owner, Drawn(1.0, 0.0, 0.0))  # type: ignore[arg-type]
    np.testing.assert_array_equal(same[0], images)
    np.testing.assert_array_equal(same[1], owner)
    moved, whose = reframe(images, owner, Drawn(1.0, 2.0, -1.0))  # type: ignore[arg-type]
    np.testing.assert_array_equal(moved[:, :-2, 1:], images[:, 2:, :-1])
    np.testing.assert_array_equal(whose[:, -3:, 5], owner[:, [-1] * 3, 4])  # the last row is repeated
    between, _ = reframe(images, owner, Drawn(1.0, 0.5, 0.0))  # type: ignore[arg-type]
    mean = (images[:, :-1].astype(float) + images[:, 1:]) / 2
    assert np.abs(between[:, :-1] - mean).max() <= 0.5


# ------------------------------------------------------------------------------------------------ training


class Clock:
    """Time that leaps, so that every step is saved."""

    def __init__(self) -> None:
        self.ticks = itertools.count(step=200)

    def monotonic(self) -> float:
        return float(next(self.ticks))


def test_a_resumed_training_ends_where_an_undisturbed_one_does(
    renders: RenderSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(steps=5, lr=1e-3, warmup=2, seed=4, snapshots=(2,))

    def loss(model: nn.Module, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return model(rng)

    undisturbed = train("a", make("vq", renders), loss, schedule, tmp_path)
    monkeypatch.setattr(training, "time", Clock())
    steps = itertools.count()

    def cut(model: nn.Module, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return model(rng)

    with pytest.raises(KeyboardInterrupt):
        train("b", make("vq", renders), cut, schedule, tmp_path)
    assert torch.load(tmp_path / "b.ckpt", weights_only=True)["step"] == 3
    # other start weights: they must come from the checkpoint
    resumed = train("b", make("vq", renders, seed=9), loss, schedule, tmp_path)
    expected, got = undisturbed.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert list(resumed.snapshots) == [2]
    first, second = undisturbed.snapshots[2], resumed.snapshots[2]
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["vq.paint.weight"], expected["vq.paint.weight"].half())
    assert resumed.log[-1]["step"] == 4 and resumed.log[-1]["loss"] == undisturbed.log[-1]["loss"]
    # a finished run is only read back
    again = train("b", make("vq", renders, seed=9), cut, schedule, tmp_path)
    assert all(torch.equal(expected[k], again.model.state_dict()[k]) for k in expected)


def test_learning_rate_and_average_by_hand(tmp_path: Path) -> None:
    s = Schedule(steps=110, lr=1.0, warmup=10)
    rates = [training._learning_rate(step, s) for step in (0, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.51, 0.02])
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def to_one(m: nn.Module, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return (m.weight - 1).square().sum(), {}

    trained = train("line", model, to_one, Schedule(steps=2, lr=0.1, warmup=0, weight_decay=0.0), tmp_path)
    # step 1: Adam moves by lr = 0.1, average keeps 1/10 of the start: 0.09; step 2 as the schedule says
    second = float(model.weight.detach())
    assert float(trained.model.weight) == pytest.approx(2 / 11 * 0.09 + 9 / 11 * second, abs=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1] and rows[0]["loss"] == 1.0


def test_a_constant_rate_can_be_cut_off_and_prolonged(renders: RenderSet, tmp_path: Path) -> None:
    schedule = Schedule(steps=4, warmup=1, cosine=False)
    assert training._learning_rate(3, schedule) == training._learning_rate(1, schedule) == schedule.lr
    cools = Schedule(steps=10, lr=1.0, warmup=1, cosine=False, cool=4)
    assert [training._learning_rate(step, cools) for step in (5, 6, 8, 9)] == [1.0, 1.0, 0.5, 0.25]
    whole = train("whole", make("vq", renders), lambda m, rng: m(rng), schedule, tmp_path)
    part = train("part", make("vq", renders), lambda m, rng: m(rng), schedule, tmp_path, until=2)
    assert (part.steps, whole.steps, part.log[-1]["step"]) == (2, 4, 1)
    rest = train("part", make("vq", renders, seed=9), lambda m, rng: m(rng), schedule, tmp_path)
    expected, got = whole.model.state_dict(), rest.model.state_dict()
    assert rest.steps == 4 and all(torch.equal(expected[k], got[k]) for k in expected)


# ------------------------------------------------------------------------------------------- saved formats


def test_the_saved_clip_loads_with_equal_outputs(renders: RenderSet, tmp_path: Path) -> None:
    lesson = make("clip", renders).eval()
    save_clip(tmp_path / "clip", lesson.clip, lesson.config, lesson.tokenizer)
    encoder = load_encoder(tmp_path / "clip", device="cpu", precision="float32")
    assert encoder.dim == 128 and encoder.patch_grid == (8, 8) and encoder.context_length == 32
    pixels = torch.stack([encoder.preprocess(Image.fromarray(i)) for i in renders.images[:4]])
    torch.testing.assert_close(pixels, to_pixels(renders.images[:4]), atol=1e-6, rtol=0)
    texts = [caption(f) for f in renders.facts[:4]] + ["A Red Ball", "an unknown word"]
    with torch.no_grad():
        pooled, patches = lesson.images(pixels)
        words = lesson.texts(lesson.tokens(texts))
    got = encoder.encode_images(pixels, patches=True)
    torch.testing.assert_close(got.pooled, pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.patches, patches, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_texts(texts), words, atol=1e-5, rtol=0)


def test_the_saved_captioner_loads_with_equal_outputs(renders: RenderSet, tmp_path: Path) -> None:
    lesson = make("captioner", renders)
    optimiser = torch.optim.AdamW(lesson.parameters(), lr=1e-3)
    for _ in range(4):  # a few steps, or every word would be as likely as any other
        optimiser.zero_grad()
        same_step(lesson)[0].backward()
        optimiser.step()
    lesson.eval()
    save_blip(tmp_path / "captioner", lesson.blip, lesson.tokenizer)
    loaded = load_captioner(tmp_path / "captioner", device="cpu", precision="float32", max_new_tokens=12)
    images = [Image.fromarray(i) for i in renders.images[:3]]
    pixels = to_pixels(renders.images[:3])
    with torch.no_grad():
        ids = lesson.blip.generate(pixel_values=pixels, max_new_tokens=12)
    expected = lesson.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [c.text for c in loaded.caption(images)] == [" ".join(text.split()) for text in expected]


def test_the_saved_object_detector_loads_with_equal_outputs(renders: RenderSet, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    detector = make("object_detector", renders).detector.eval()
    object_detector.save_object_detector(tmp_path / "object_detector", detector)
    build._halve(tmp_path / "object_detector" / "model.safetensors")
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "object_detector").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "object_detector")
    assert [loaded.config.id2label[i] for i in (0, 11, 12, 16)] == ["ball", "lamp", "grass", "table"]
    pixels = processor([Image.fromarray(x) for x in renders.images[:2]], return_tensors="pt")["pixel_values"]
    # the processor rounds to bytes after it has enlarged
    own = object_detector.enlarge(to_pixels(renders.images[:2]))
    torch.testing.assert_close(pixels, own, atol=1.01 / 127.5, rtol=0)
    with torch.no_grad():
        a, b = detector(pixel_values=own), loaded(pixel_values=own)
    torch.testing.assert_close(a.pred_boxes, b.pred_boxes.float(), atol=0.02, rtol=0)  # weights in float16


def test_true_boxes_and_their_measure_by_hand() -> None:
    owner = np.zeros((SIZE, SIZE), dtype=np.uint8)
    owner[24:] = GROUND
    owner[20:30, 4:14] = 1
    owner[40:42, 0:3] = 2  # too few pixels for a box
    values, boxes = object_detector.true_boxes(owner)
    assert values.tolist() == [1, GROUND]
    assert boxes.tolist() == [[4, 20, 14, 30], [0, 24, 48, 48]]
    half = np.array([[4, 25, 14, 35]])
    assert object_detector.overlap(boxes[:1], half).tolist() == [[pytest.approx(1 / 3)]]


def test_a_parser_from_few_sentences_gives_noun_chunks(tmp_path: Path) -> None:
    from itemkit.objects import load_parser
    from minilab.parser import train_parser

    scores = train_parser(tmp_path / "parser", n_sentences=150)
    assert scores["tag_acc"] > 0.9 and scores["las"] > 0.7
    parser = load_parser(tmp_path / "parser")
    found = parser.objects(["a red ball to the left of an orange car on the sand", "a photo of a blue fish"])
    assert found == [["red ball", "orange car", "sand"], ["blue fish"]]


# ---------------------------------------------------------------------------------------------- conditions


def test_encoded_facts_by_hand() -> None:
    facts = [Facts((("orange", "car"), ("white", "ball")), "table"), Facts((), None)]
    got = encode_facts(facts)
    assert got.tolist() == [[2, 4, 8, 1, 0, 0, 5], [0] * 7]
    assert (COLOURS[1], KINDS[3], COLOURS[7], KINDS[0], SETTINGS[4]) == (
        "orange",
        "car",
        "white",
        "ball",
        "table",
    )


def test_the_condition_tells_order_and_number_apart() -> None:
    torch.manual_seed(0)
    condition = Condition(8)
    a, b = ("red", "ball"), ("blue", "car")
    tokens, vectors = condition(encode_facts([Facts(t, "sand") for t in ((a, b), (b, a), (a,), ())]))
    assert tokens.shape == (4, 4, 8) and vectors.shape == (4, 8)
    gaps = torch.cdist(vectors, vectors) + 9 * torch.eye(4)
    assert gaps.min() > 0.01


# ------------------------------------------------------------------------------------------------ samplers


class Straight(nn.Module):
    """Always predicts one picture; keeps what it was asked."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.target, self.seen = target, []

    def forward(self, x: torch.Tensor, t: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
        self.seen.append((float(t[0]), x.clone()))
        return self.target.expand_as(x)


def test_heun_steps_follow_a_straight_path_to_its_end() -> None:
    target = torch.linspace(-1, 1, 3 * SIZE * SIZE).view(1, 3, SIZE, SIZE)
    fields = torch.ones(2, 7, dtype=torch.int64)
    unet = Straight(target)
    drawn = flow.sample(unet, fields, seed=3, steps=4, guidance=1.0)
    torch.testing.assert_close(drawn, target.expand(2, -1, -1, -1), atol=1e-5, rtol=0)
    assert [round(t, 2) for t, _ in unet.seen] == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]  # the last by Euler
    again = flow.sample(Straight(target), fields, seed=3, steps=4, guidance=1.0)
    assert torch.equal(drawn, again)
    noise = flow.sample(Straight(target), fields, seed=4, steps=4, guidance=1.0)
    assert not torch.equal(noise, drawn)


def test_image_to_image_starts_on_the_real_picture_s_path() -> None:
    start = torch.zeros(1, 3, SIZE, SIZE)
    unet = Straight(torch.ones(1, 3, SIZE, SIZE))
    flow.sample(
        unet, torch.ones(1, 7, dtype=torch.int64), seed=0, steps=10, guidance=1.0, start=start, keep=0.8
    )
    t, x = unet.seen[0]
    assert t == pytest.approx(0.8) and len({round(t, 3) for t, _ in unet.seen}) == 2  # its share of ten steps
    assert float(x.std()) == pytest.approx(0.2, abs=0.01)  # 0.2 noise + 0.8 of a picture of zeros


def test_guidance_goes_beyond_the_condition() -> None:
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, t: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x) + (fields.sum(1) > 0).float()[:, None, None, None]

    fields = torch.ones(1, 7, dtype=torch.int64)
    none = flow.sample(Asked(), fields, seed=0, steps=2, guidance=1.0)
    more = flow.sample(Asked(), fields, seed=0, steps=2, guidance=1.5, limit=None)
    bounded = flow.sample(Asked(), fields, seed=0, steps=2, guidance=1.5)
    torch.testing.assert_close(none, torch.ones_like(none))
    torch.testing.assert_close(more, torch.full_like(none, 1.5))  # as far again, by half
    torch.testing.assert_close(bounded, none)  # but a picture has no values beyond 1


def test_the_loss_is_that_of_the_velocity() -> None:
    x1 = torch.full((2, 3, SIZE, SIZE), 0.5)
    fields, t = torch.ones(2, 7, dtype=torch.int64), torch.tensor([0.0, 0.8])
    torch.manual_seed(0)
    assert flow.flow_loss(Straight(x1), x1, t, fields) == 0
    # a picture off by 0.1 is a velocity off by 0.1 at the start and by 0.1 / 0.2 at t = 0.8
    loss = flow.flow_loss(Straight(x1 + 0.1), x1, t, fields)
    assert float(loss) == pytest.approx((0.1**2 + 0.5**2) / 2, rel=1e-4)


def test_an_edit_keeps_the_outside_on_the_real_path() -> None:
    start = torch.linspace(-1, 1, 3 * SIZE * SIZE).view(1, 3, SIZE, SIZE)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 10:20, 10:20] = 1
    unet = Straight(torch.zeros(1, 3, SIZE, SIZE))
    drawn = flow.sample(
        unet, torch.ones(1, 7, dtype=torch.int64), seed=2, steps=4, guidance=1.0, start=start, mask=mask
    )
    outside = (mask == 0).expand_as(start)
    assert torch.equal(drawn[outside], start[outside])
    assert float(drawn[~outside].abs().max()) < 0.05  # inside it is the sampler's
    noise = unet.seen[0][1]
    first_at = dict(reversed([(round(t, 3), x) for t, x in unet.seen]))  # before Heun's second look
    for t in (0.25, 0.5, 0.75):
        # the second look at time t comes before its step is put back on the path
        looks = [x for seen_t, x in unet.seen if round(seen_t, 3) == t]
        expected = (1 - t) * noise + t * start
        torch.testing.assert_close(looks[-1][outside], expected[outside], atol=1e-5, rtol=0)
    assert set(first_at) == {0.0, 0.25, 0.5, 0.75}


def test_bytes_come_back_exactly() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(flow.to_bytes(to_pixels(every)), every)
    x = torch.tensor([-1.2, -1.0, 0.0, 0.0039, 1.0, 1.3]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    # 127.5 + 0.5 is cut to 128; a two-hundredth of a step below stays
    assert flow.to_bytes(x)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


# ---------------------------------------------------------------------------------------------- the truth


def test_compared_facts_by_hand() -> None:
    a, b, c = ("red", "ball"), ("green", "car"), ("blue", "car")
    true = Facts((a, b), "sand")

    def score(*things: tuple[str, str], setting: str = "sand", ordered: bool = True) -> dict[str, float]:
        return truth.compare_facts(Facts(things, setting, ordered), true)

    assert score(a, b) == {
        "exact": 1, "f1": 1, "kinds": 1, "colours": 1, "setting": 1, "relation": 1, "invented": 0,
    }  # fmt: skip
    wrong = score(a, c, setting="snow")
    assert np.isnan(wrong.pop("relation"))  # the things differ, so their order says nothing
    assert wrong == {"exact": 0, "f1": 0.5, "kinds": 1, "colours": 0.5, "setting": 0, "invented": 0.5}
    swapped = score(b, a)
    assert (swapped["exact"], swapped["f1"], swapped["relation"]) == (0, 1, 0)
    assert score(b, a, ordered=False)["exact"] == 1  # no order was claimed
    left_out = score(a)
    assert left_out["f1"] == pytest.approx(2 / 3) and (left_out["exact"], left_out["invented"]) == (0, 0)
    twice = score(a, a)
    assert (twice["f1"], twice["kinds"], twice["invented"]) == (0.5, 0.5, 0.5)
    assert score()["f1"] == 0 and score()["invented"] == 0


def test_caption_quality_averages_over_pictures() -> None:
    facts = [Facts((("red", "ball"),), "sand"), Facts((("red", "ball"), ("blue", "cube")), "snow")]
    told = ["a red ball on the sand", "a blue cube to the left of a red ball on the snow"]
    got = truth.caption_quality(told, facts)
    assert got["exact"] == 0.5 and got["f1"] == 1 and got["relation"] == 0  # of the one picture that has any


def test_checking_names_every_file_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no laboratory in .* `make lab` builds one"):
        build.check(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.json").write_text("1")
    (tmp_path / "fakes.parquet").write_bytes(b"x")
    (tmp_path / "hashes.json").write_text(json.dumps(build.file_hashes(tmp_path)))
    (tmp_path / "cards.json").write_text(
        json.dumps({"measured": {"clip_r_at_1_of_1000": 0.9, "renders": 10}})
    )
    monkeypatch.setattr(truth, "measure", lambda models: {"clip_r_at_1_of_1000": 0.904, "renders": 10})
    assert build.check(tmp_path) == []
    (tmp_path / "models" / "a.json").write_text("2")
    (tmp_path / "fakes.parquet").unlink()
    monkeypatch.setattr(truth, "measure", lambda models: {"clip_r_at_1_of_1000": 0.8, "renders": 10})
    lines = build.check(tmp_path)
    assert len(lines) == 3
    assert "fakes.parquet: expected" in lines[0] and lines[0].endswith("found no such file")
    assert lines[1].startswith("models/a.json: expected")
    assert lines[2] == "clip_r_at_1_of_1000: the card says 0.9, measured now 0.8"
