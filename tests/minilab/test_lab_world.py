"""The rendered world: its truth, its words, its splits, and what must not tell the splits apart."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from itemkit import schema
from minilab import camera, fakes, world
from minilab.grammar import (
    COLOURS,
    KINDS,
    MAX_OBJECTS,
    N_TEMPLATES,
    SETTINGS,
    Facts,
    Token,
    caption,
    phrase,
    random_caption,
    read_caption,
    sentence,
)
from minilab.renders import (
    GROUND,
    N_PHRASES,
    SKY,
    cached_renders,
    make_renders,
    patch_owner,
    phrase_ids,
)
from minilab.world import SIZE, SPLITS, Scene, Thing, render, render_index, sample_scene, scene_rng


def scenes(n: int, split: str = "spare") -> list[Scene]:
    return [sample_scene(scene_rng(split, i)) for i in range(n)]


@pytest.fixture(scope="module")
def pictures() -> list[world.Render]:
    return [render_index("spare", i) for i in range(60)]


# --------------------------------------------------------------------------------------------- determinism


def test_a_scene_gives_the_same_bytes_whatever_was_rendered_before() -> None:
    first = render_index("spare", 7)
    render_index("spare", 8)
    again = render_index("spare", 7)
    assert first.image.tobytes() == again.image.tobytes() and first.scene == again.scene
    assert first.image.shape == (SIZE, SIZE, 3) and first.image.dtype == np.uint8
    np.testing.assert_array_equal(first.masks, again.masks)


def test_a_render_set_is_addressed_by_index_not_by_order() -> None:
    whole, tail = make_renders("spare", 6), make_renders("spare", 2, start=4)
    np.testing.assert_array_equal(whole.images[4:], tail.images)
    np.testing.assert_array_equal(whole.owner[4:], tail.owner)
    assert whole.facts[4:] == tail.facts


def test_cached_renders_come_back_as_they_were_made(tmp_path: Path) -> None:
    made = cached_renders("spare", 4, tmp_path, workers=1)
    written = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = cached_renders("spare", 4, tmp_path, workers=1)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == written
    direct = make_renders("spare", 4)
    for got in (made, again):
        np.testing.assert_array_equal(got.images, direct.images)
        np.testing.assert_array_equal(got.owner, direct.owner)
        assert got.facts == direct.facts and got.visible == direct.visible


# -------------------------------------------------------------------------------------------------- splits


def test_splits_draw_from_streams_of_their_own() -> None:
    assert len(set(SPLITS.values())) == len(SPLITS)
    # one stream for each (split, index): no number of one is met again at the same place of another
    draws = {(s, i): tuple(scene_rng(s, i).integers(2**63, size=4)) for s in SPLITS for i in range(50)}
    assert len(set(draws.values())) == len(draws)
    assert len({a for four in draws.values() for a in four}) == 4 * len(draws)


def test_no_render_is_in_two_splits() -> None:
    seen: dict[bytes, tuple[str, int]] = {}
    for split in SPLITS:
        for index in range(40):
            data = render_index(split, index).image.tobytes()
            assert data not in seen, f"{split} {index} is {seen.get(data)}"
            seen[data] = (split, index)


def test_the_detector_s_images_are_not_those_of_the_models_or_prompts() -> None:
    # what the mini models learn from, and what fakes are asked for, are splits of their own
    assert set(fakes.COUNTS) == set(schema.SPLITS)
    assert not {"models", "models_val", "spare"} & set(fakes.COUNTS)


# --------------------------------------------------------------------------------------------------- truth


def test_masks_boxes_and_facts_agree(pictures: list[world.Render]) -> None:
    for picture in pictures:
        things = picture.scene.facts.things
        assert picture.masks.shape == (len(things), SIZE, SIZE) and picture.boxes.shape == (len(things), 4)
        assert 1 <= len(things) <= MAX_OBJECTS
        for mask, (x0, y0, x1, y1) in zip(picture.masks, picture.boxes.astype(int), strict=True):
            if not mask.any():
                assert (x0, y0, x1, y1) == (0, 0, 0, 0)
                continue
            inside = np.zeros_like(mask)
            inside[y0:y1, x0:x1] = True
            assert not (mask & ~inside).any()
            # the tightest box: each side touches the mask
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
        assert picture.masks.sum(0).max() <= 1  # a pixel shows one thing


def test_facts_are_told_from_left_to_right_without_the_unnamed() -> None:
    left = Thing("cube", "red", x=10, base_y=40, size=12)
    right = Thing("ball", "blue", x=38, base_y=40, size=12)
    stone = Thing("pebble", "", x=24, base_y=44, size=6, named=False)
    scene = Scene((right, stone, left), "sand", horizon=20, light=0.2, seed=3)
    assert scene.facts == Facts((("red", "cube"), ("blue", "ball")), "sand")
    picture = render(scene)
    assert len(picture.masks) == 2
    assert picture.boxes[0, 2] <= 18 and picture.boxes[1, 0] >= 30


def test_the_nearer_thing_hides_the_farther_one() -> None:
    far = Thing("house", "white", x=24, base_y=34, size=20)
    near = Thing("cube", "red", x=24, base_y=45, size=20)
    alone = render(Scene((far,), "grass", horizon=20, light=0.0, seed=1))
    both = render(Scene((far, near), "grass", horizon=20, light=0.0, seed=1))
    swapped = render(Scene((near, far), "grass", horizon=20, light=0.0, seed=1))
    hidden, whole = both.masks[0].sum(), alone.masks[0].sum()
    assert 0 < hidden < 0.8 * whole  # sorted by x with ties: the house comes first in both
    assert both.masks[1].sum() == render(Scene((near,), "grass", 20, 0.0, 1)).masks[0].sum()
    assert not (both.masks[0] & both.masks[1]).any()
    # nearness is the foot on the ground, not the order in which things are listed
    assert {m.sum() for m in swapped.masks} == {m.sum() for m in both.masks}


def test_how_much_is_visible_by_hand() -> None:
    half = Thing("cube", "red", x=0, base_y=40, size=16)  # its middle stands on the picture's edge
    front = Thing("cube", "blue", x=30, base_y=44, size=16)
    behind = Thing("cube", "green", x=30, base_y=40, size=16)
    picture = render(Scene((half, front, behind), "road", horizon=20, light=0.0, seed=1))
    seen = dict(zip([kind for kind, _ in picture.scene.facts.things], picture.visible, strict=True))
    assert seen["blue"] == pytest.approx(1) and seen["red"] == pytest.approx(0.5, abs=0.06)
    assert 0.15 < seen["green"] < 0.6


def test_the_world_paints_no_noise() -> None:
    plain = render(Scene((), "table", horizon=24, light=0.0, seed=2)).image[:20].astype(float)
    assert np.abs(np.diff(plain, n=2, axis=1)).max() <= 3  # a wall is smooth, to the byte


def test_an_unnamed_thing_hides_but_is_not_told() -> None:
    cube = Thing("cube", "red", x=24, base_y=40, size=16)
    stone = Thing("pebble", "", x=24, base_y=42, size=8, named=False)
    bare = render(Scene((cube,), "road", horizon=20, light=0.0, seed=1))
    behind = render(Scene((cube, stone), "road", horizon=20, light=0.0, seed=1))
    assert len(behind.masks) == 1 and behind.masks[0].sum() < bare.masks[0].sum()


def test_all_words_of_the_world_occur() -> None:
    seen: Counter[str] = Counter()
    counts: Counter[int] = Counter()
    for scene in scenes(1500):
        counts[len(scene.facts.things)] += 1
        seen[scene.setting] += 1
        for colour, kind in scene.facts.things:
            seen[colour] += 1
            seen[kind] += 1
        seen.update(t.kind for t in scene.things if not t.named)
    assert len(KINDS) >= 12 and len(COLOURS) >= 8 and len(SETTINGS) >= 5
    assert set(seen) == {*KINDS, *COLOURS, *SETTINGS, "pebble", "stick"}
    # drawn evenly: 1500 scenes hold about 2,800 things, 235 of each kind
    for words, share in ((KINDS, 0.6), (COLOURS, 0.7), (SETTINGS, 0.8)):
        mean = np.mean([seen[w] for w in words])
        assert min(seen[w] for w in words) > share * mean
    assert set(counts) == {1, 2, 3}
    assert counts[1] / 1500 == pytest.approx(0.36, abs=0.05)
    assert counts[3] / 1500 == pytest.approx(0.24, abs=0.05)


def test_scenes_have_what_makes_photographs_hard() -> None:
    drawn = scenes(600)
    things = [t for s in drawn for t in s.things if t.named]
    cropped = sum(t.x - t.size / 2 < -1 or t.x + t.size / 2 > SIZE + 1 for t in things)
    distracted = sum(any(not t.named for t in s.things) for s in drawn)
    assert cropped >= 5  # about one thing in a hundred reaches over the edge
    assert 0.18 < distracted / 600 < 0.32
    masks = [m.sum() for i in range(150) for m in render_index("spare", i).masks]
    assert np.quantile(masks, 0.1) < 0.6 * np.quantile(masks, 0.5)  # small and partly hidden ones


# --------------------------------------------------------------------------------------------------- words

SOME_THINGS = (("red", "ball"), ("orange", "car"), ("green", "tree"))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("template", range(N_TEMPLATES))
@pytest.mark.parametrize("setting", ["grass", None])
def test_facts_survive_being_told(template: int, n: int, setting: str | None) -> None:
    facts = Facts(SOME_THINGS[:n], setting)
    told = read_caption(" ".join(t.text for t in sentence(facts, template)))
    assert told.setting == setting
    if told.ordered:
        assert told.things == facts.things
    else:  # "a red ball and an orange car" leaves open which is left
        assert template == 7 and n == 2 and sorted(told.things) == sorted(facts.things)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_phrase_is_read_back(colour: str, kind: str) -> None:
    assert read_caption(phrase(colour, kind)).things == ((colour, kind),)


def test_the_fixed_caption_by_hand() -> None:
    a, b, c = SOME_THINGS
    assert caption(Facts((a,), "sand")) == "a red ball on the sand"
    assert caption(Facts((a, b), "table")) == "a red ball to the left of an orange car on the table"
    assert caption(Facts((a, b, c), "snow")) == "a red ball, an orange car and a green tree on the snow"
    assert phrase("orange", "car") == "an orange car"


def test_random_captions_use_every_template_and_depend_on_the_seed() -> None:
    facts = Facts(SOME_THINGS[:2], "road")
    told = {random_caption(facts, np.random.default_rng(seed)) for seed in range(80)}
    # a full sentence with "sits" is for one thing only, so two things have one wording less
    assert len(told) == N_TEMPLATES - 1
    assert random_caption(facts, np.random.default_rng(3)) == random_caption(facts, np.random.default_rng(3))


def test_reading_passes_over_foreign_words_and_keeps_repeats() -> None:
    facts = read_caption("Two dogs look at a Red Ball and a red ball near the pool, on the grass")
    assert facts == Facts((("red", "ball"), ("red", "ball")), "grass", ordered=False)
    assert read_caption("") == Facts((), None)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("template", range(N_TEMPLATES))
def test_heads_form_one_tree(template: int, n: int) -> None:
    tokens = sentence(Facts(SOME_THINGS[:n], "grass"), template)
    roots = [i for i, t in enumerate(tokens) if t.head == i]
    assert len(roots) == 1 and tokens[roots[0]].dep == "ROOT"
    assert [t.dep for t in tokens].count("ROOT") == 1
    for start in range(len(tokens)):
        at, steps = start, 0
        while tokens[at].head != at:
            at, steps = tokens[at].head, steps + 1
            assert steps <= len(tokens), "a circle of heads"
    # no arcs cross, so spaCy's transition parser can learn them
    arcs = [(min(i, t.head), max(i, t.head)) for i, t in enumerate(tokens) if t.head != i]
    assert not [(a, b) for a in arcs for b in arcs if a[0] < b[0] < a[1] < b[1]]


def test_a_parse_by_hand() -> None:
    assert sentence(Facts((("red", "ball"),), "sand"), 0) == [
        Token("a", "DT", "det", 2),
        Token("red", "JJ", "amod", 2),
        Token("ball", "NN", "ROOT", 2),
        Token("on", "IN", "prep", 2),
        Token("the", "DT", "det", 5),
        Token("sand", "NN", "pobj", 3),
    ]


# ------------------------------------------------------------------------------- truth for the lessons


def test_phrase_ids_by_hand() -> None:
    table = phrase_ids([Facts((("red", "ball"), ("orange", "lamp")), "sand")])
    expected = np.full(10, N_PHRASES - 1)  # sky, and things that are not there
    expected[1] = 0  # red is the first colour, ball the first kind
    expected[2] = 12 + 11  # orange the second, lamp the last of twelve
    expected[GROUND] = 96 + 1  # after 96 things the settings; sand is the second
    np.testing.assert_array_equal(table, expected[None])
    assert N_PHRASES == 102 and table[0, SKY] == 101


def test_patch_owner_by_hand() -> None:
    owner = np.full((1, SIZE, SIZE), SKY, dtype=np.uint8)
    owner[:, 24:] = GROUND
    owner[0, 0:3, 0:3] = 1  # 9 of 36 pixels: exactly a quarter
    owner[0, 0:2, 6:10] = 2  # 8 of 36: less
    owner[0, 6:12, 0:6] = 3
    owner[0, 6:8, 0:6] = 2  # 12 of 36 against 24: the larger one
    owner[0, 21:24, 12:18] = GROUND  # half a patch: the sky keeps ties
    got = patch_owner(owner, 6)[0]
    assert got.shape == (8, 8)
    assert got[0, 0] == 1 and got[0, 1] == SKY and got[1, 0] == 3 and got[3, 2] == SKY
    assert (got[4:] == GROUND).all()
    rest = np.ones((8, 8), bool)
    rest[0, 0] = rest[1, 0] = False
    assert (got[:4][rest[:4]] == SKY).all()


def test_owner_shows_what_the_masks_say(pictures: list[world.Render]) -> None:
    made = make_renders("spare", 5)
    for owner, picture in zip(made.owner, pictures[:5], strict=True):
        for i, mask in enumerate(picture.masks):
            np.testing.assert_array_equal(owner == i + 1, mask)
        bare = ~picture.masks.any(0)
        horizon = round(picture.scene.horizon)
        assert set(np.unique(owner[:horizon][bare[:horizon]])) <= {SKY}
        assert set(np.unique(owner[horizon:][bare[horizon:]])) <= {GROUND}


# --------------------------------------------------------------------------------------------------- leaks


def file_facts(data: bytes) -> list[float]:
    """What a detector that never decodes a picture could go by."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256) / len(data)
    with Image.open(io.BytesIO(data)) as image:
        header = [image.format == "JPEG", *image.size, len(image.getbands()), len(image.info)]
    return [len(data), *header, *counts]


def test_files_of_two_splits_cannot_be_told_apart() -> None:
    n = 120
    shots = [camera.photo_files(make_renders(s, n).images, (k,)) for k, s in enumerate(("train", "test"))]
    rows = [file_facts(file) for file in shots[0] + shots[1]]
    x, y = np.array(rows, float), np.repeat([0, 1], n)
    assert (x[:, 1:6] == x[0, 1:6]).all()  # one format, size, number of channels, metadata
    assert 0.4 < roc_auc_score(y, x[:, 0]) < 0.6  # file size alone; its standard error is 0.037
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    score = cross_val_predict(LogisticRegression(C=0.01), x, y, cv=5, method="decision_function")
    assert 0.37 < roc_auc_score(y, score) < 0.63


def test_an_edit_touches_a_square_around_one_thing() -> None:
    owner = np.zeros((2, SIZE, SIZE), dtype=np.uint8)
    owner[0, 10:20, 30:34] = 1
    owner[1, 46:48, 0:5] = 3  # at the border the two pixels of margin are cut
    masks = fakes.edit_masks(owner, seed=0)
    expected = np.zeros_like(masks)
    expected[0, 8:22, 28:36] = True
    expected[1, 44:48, 0:7] = True
    np.testing.assert_array_equal(masks, expected)
    owner[0, 30:40, 5:9] = 2
    both = {fakes.edit_masks(owner, seed)[0, 9, 29] for seed in range(12)}
    assert both == {True, False}  # either thing, by the seed
    np.testing.assert_array_equal(fakes.edit_masks(owner, 5), fakes.edit_masks(owner, 5))
