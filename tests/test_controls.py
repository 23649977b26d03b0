"""Controls and baselines see what they should see, and nothing else."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.base import clone
from sklearn.metrics import roc_auc_score as auroc
from sklearn.utils.parallel import Parallel, delayed

from itemkit.controls import (
    CONTROLS,
    OURS,
    VARIANTS,
    Doubt,
    FeatureScorer,
    GeneratorLeftOut,
    Mahalanobis,
    NearestNeighbour,
    NearestReals,
    Novelty,
    PixelCNN,
    RankSum,
    best_regions,
    caption_likelihood,
    concepts,
    detector_doubt,
    file_length,
    get_control,
    histogram,
    logistic,
    noise_level,
    noise_residual,
    spectrum,
)
from itemkit.errors import InputError
from itemkit.features import select_objects
from itemkit.head import MisalignmentMLP
from itemkit.matrix import train_on_test_on
from itemkit.misalignment import Representation, represent
from itemkit.recipes import Recipe, control
from itemkit.study import _undertrained

from synthetic import make_features, unit

QUICK = MisalignmentMLP(max_epochs=10, patience=3, device="cpu")


def picture_features(n_real=120, n_fake=60, size=32, seed=0):
    """Smooth random pictures with noise; the fakes carry the checkerboard of a careless upsampling."""
    features = make_features(n_real, n_fake, generators=("gan",), seed=seed, style=0.0)
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(len(features), 3, 4, 4)))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").permute(0, 2, 3, 1).numpy()
    x = 128 + 30 * smooth + rng.normal(size=smooth.shape) * 4
    board = (np.indices((size, size)).sum(0) % 2 * 2 - 1)[None, :, :, None]
    x = x + 8 * board * features.labels[:, None, None, None]
    return replace(features, pixels=np.clip(x, 0, 255).astype(np.uint8))


def parts(features):
    return [
        features.select((features.table["split"] == name).to_numpy()) for name in ("train", "val", "test")
    ]


FEATURES = picture_features()


EVERYTHING = OURS | CONTROLS


@pytest.mark.parametrize("name", [n for n in EVERYTHING if n != "cnn"])
def test_every_contender_trains_and_scores(name):
    train, val, test = parts(FEATURES)
    scorer = EVERYTHING[name].build(seed=3, head=QUICK)
    score = scorer.fit(train, val).decision_function(test)
    assert score.shape == (len(test),) and np.isfinite(score).all()
    again = EVERYTHING[name].build(seed=3, head=QUICK).fit(train, val)
    np.testing.assert_array_equal(again.decision_function(test), score)
    # nobody's score depends on the company it is given in
    alone = np.concatenate([scorer.decision_function(test.select([row])) for row in range(3)])
    np.testing.assert_allclose(alone, score[:3], rtol=1e-4, atol=1e-5)
    if name in ("spectrum", "noise_residual"):
        assert auroc(test.labels, score) > 0.95
    if name.startswith(("cosine_", "few", "ranks", "noise_residual_one")):
        assert auroc(test.labels, score) > 0.6  # higher for fakes, also where nothing was trained
    if name == "text_only":  # the captions of the made-up fakes are like those of the reals
        assert 0.25 < auroc(test.labels, score) < 0.75


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_contender_says_what_it_would_mean(name):
    made = EVERYTHING[name]
    assert made.if_it_won.endswith(".") and made.if_it_won[0].isupper() and len(made.if_it_won) < 110
    assert not made.variant or made.variant in VARIANTS
    assert [m.title for m in EVERYTHING.values()].count(made.title) == 1


@pytest.mark.parametrize("name", [n for n, made in EVERYTHING.items() if "one-class" in made.title])
def test_one_class_controls_never_look_at_a_fake(name):
    train, val, test = parts(FEATURES)
    reals = [part.select(part.labels == 0) for part in (train, val)]
    score = get(name).fit(train, val).decision_function(test)
    np.testing.assert_allclose(get(name).fit(*reals).decision_function(test), score, rtol=1e-6)


def get(name):
    return EVERYTHING[name].build(head=QUICK)


def test_a_one_class_control_finds_what_the_two_class_one_has_learned_the_wrong_way_round():
    """Trained on a rough generator, asked about a smooth one: only distance from real images helps."""
    features = make_features(120, 60, generators=("rough", "smooth"), style=0.0)
    generator, rng = features.table["generator"].to_numpy(), np.random.default_rng(0)
    sigma = pd.Series(generator).map({"real": 8.0, "rough": 12.0, "smooth": 5.0}).to_numpy()
    x = 128 + rng.normal(size=(len(features), 32, 32, 3)) * sigma[:, None, None, None]
    features = replace(features, pixels=np.clip(np.rint(x), 0, 255).astype(np.uint8))
    train, val, test = parts(features)
    train, test = (
        part.select(part.table["generator"].isin(["real", name]).to_numpy())
        for part, name in ((train, "rough"), (test, "smooth"))
    )
    for name in ("noise_level", "noise_residual", "file_length"):
        two, one = (get(n).fit(train, val).decision_function(test) for n in (name, f"{name}_one_class"))
        assert auroc(test.labels, two) < 0.1 and auroc(test.labels, one) > 0.9


def test_cnn_learns_its_own_generator_and_leaves_torch_alone():
    train, val, test = parts(picture_features(300, 150))
    state = torch.get_rng_state()
    cnn = PixelCNN(width=4, steps=200, batch_size=16, crop=24, seed=1, device="cpu")
    scorer = FeatureScorer(CONTROLS["cnn"].numbers, cnn).fit(train, val)
    assert scorer.learner_.auroc_ >= 0.95
    score = scorer.decision_function(test)
    assert auroc(test.labels, score) > 0.9
    again = clone(cnn).fit(train.pixels, train.labels, val.pixels, val.labels)
    np.testing.assert_allclose(again.decision_function(test.pixels), score, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    # what is kept is what was best on the validation images
    assert auroc(val.labels, again.decision_function(val.pixels)) == pytest.approx(again.auroc_)


def test_spectrum_by_hand():
    rng = np.random.default_rng(0)
    wave = np.sin(2 * np.pi * 8 * np.arange(64) / 64)
    images = np.stack([wave[None] + np.zeros((64, 1)), wave[:, None] + np.zeros((1, 64))])
    x = np.clip(127 + 100 * images[..., None].repeat(3, axis=3), 0, 255).astype(np.uint8)
    features = replace(make_features(1, 1, generators=("gan",)), pixels=x)
    s = spectrum(features)
    assert s.shape == (2, 46) and (s.argmax(1) == 8).all()
    np.testing.assert_allclose(s[0], s[1], atol=0.02)  # the direction of the wave does not matter
    noise = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    flat = spectrum(replace(features, pixels=noise))[:, 3:]
    assert flat.std(1).max() < 0.25  # white noise has a flat spectrum


def test_noise_residual_by_hand():
    features = make_features(1, 1, generators=("gan",))
    x = np.zeros((2, 16, 16, 3), np.uint8)
    x[1] = np.arange(16, dtype=np.uint8)[None, :, None] * 5  # a ramp has no second difference either
    r = noise_residual(replace(features, pixels=x))
    middle = 3 * 7 + 3  # the pair (0, 0)
    assert r.shape == (2, 98) and np.allclose(r[:, [middle, 49 + middle]], 1) and np.allclose(r.sum(1), 2)


def test_noise_level_by_hand():
    x = np.random.default_rng(0).normal(128, [2, 4, 8], size=(2, 64, 64, 3))
    x[1] += np.arange(64)[:, None, None]  # a ramp is no noise
    levels = noise_level(
        replace(make_features(1, 1, generators=("gan",)), pixels=np.rint(x).astype(np.uint8))
    )
    np.testing.assert_allclose(np.exp(levels), [[2, 4, 8]] * 2, rtol=0.1)


def test_file_length_and_histogram_by_hand():
    x = np.full((2, 16, 16, 3), 255, np.uint8)
    x[1, :8] = 0
    features = replace(make_features(1, 1, generators=("gan",)), pixels=x)
    h = histogram(features)
    np.testing.assert_allclose((h**2).sum(1), 1, rtol=1e-6)
    assert h[0, -1] == 1 and h[1, 0] == h[1, -1] == pytest.approx(0.5**0.5)
    noise = np.random.default_rng(0).integers(0, 256, x.shape).astype(np.uint8)
    longer = file_length(replace(features, pixels=noise))
    assert longer.shape == (2, 2) and (longer > file_length(features) + 0.2).all()


def test_an_image_is_looked_at_once(monkeypatch):
    train, _, test = parts(picture_features(seed=5))
    first = file_length(train)
    monkeypatch.setattr("itemkit.controls.jpeg_bytes", None)
    np.testing.assert_array_equal(file_length(train.select([3, 1])), first[[3, 1]])
    with pytest.raises(TypeError):
        file_length(test)


def test_nearest_neighbour_by_hand():
    x = np.array([[1.0, 0.0], [0.0, 1.0]])
    model = NearestNeighbour().fit(x, [0, 1])
    np.testing.assert_allclose(
        model.decision_function(np.array([[3.0, 4.0], [5.0, 0.0]])), [0.8 - 0.6, -1.0], atol=1e-6
    )


def test_distances_from_reals_by_hand():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5000, 3)) * [1, 10, 1] + [0, 0, 5], np.repeat([0, 1], [4999, 1])
    far = Mahalanobis().fit(x, y).decision_function(np.array([[0, 0, 5.0], [0, 20, 5], [3, 0, 5]]))
    np.testing.assert_allclose(far, [0, 2, 3], atol=0.1)
    reals = unit(np.array([[1.0, 0], [1, 0.1], [1, 0.2]]))
    near = NearestReals(k=2).fit(reals, np.zeros(3)).decision_function(np.array([[7.0, 0.0]]))
    assert near[0] == pytest.approx(np.linalg.norm([1, 0] - reals[1]), rel=1e-6)


def test_rank_sum_by_hand():
    reals = np.arange(99.0)[:, None].repeat(2, 1)
    model = RankSum().fit(reals, np.zeros(99))
    inside = model.decision_function(np.array([[49.0, 49.0], [9.25, 49.0]]))
    np.testing.assert_allclose(inside, [0, norm.ppf(10.5 / 100)], atol=1e-9)
    # above all reals ranks are equal, and the scale goes on
    above = model.decision_function(np.array([[98.5, 49.0], [150.0, 49.0], [1e4, 49.0]]))
    assert (np.diff(above) > 1).all() and np.isfinite(model.decision_function(np.array([[-9.0, -9.0]]))).all()


def test_doubt_by_hand():
    features = make_features(30, 10)
    row = int(np.flatnonzero(features.table["n_objects"] == 2)[0])
    bare = int(np.flatnonzero(features.table["n_objects"] == 0)[0])
    mine = features.owner == row
    features.objects.loc[mine, "score"] = [0.5, 0.0]
    features.objects.loc[mine, "found"] = [True, False]
    doubt = detector_doubt(features)
    # half of the objects have no box, the least score is 0, and below 0.001 a score says nothing more
    np.testing.assert_allclose(doubt[row], [0.5, 0, -(np.log(0.5) + np.log(1e-3)) / 2], rtol=1e-5)
    assert np.isnan(doubt[bare]).all()
    reals = features.select(features.labels == 0)
    typical = np.nanmean(detector_doubt(reals), axis=0)
    np.testing.assert_allclose(Doubt().fit(features)(features)[bare], typical, rtol=1e-5)
    nothing = features.select((features.table["n_objects"] == 0).to_numpy())
    assert (Doubt().fit(nothing)(nothing) == 0).all()


def test_controls_without_clip_are_free_of_it():
    """Doubt and caption likelihood do not change with the embeddings; a cosine as a score is refused."""
    rng = np.random.default_rng(0)
    names = ("image_emb", "caption_emb", "region_emb", "phrase_emb")
    other = replace(FEATURES, **{n: unit(rng.normal(size=getattr(FEATURES, n).shape)) for n in names})
    for name in ("caption_likelihood", "doubt", "doubt_likelihood"):
        (train, val, test), (train2, val2, test2) = parts(FEATURES), parts(other)
        score = get(name).fit(train, val).decision_function(test)
        np.testing.assert_array_equal(get(name).fit(train2, val2).decision_function(test2), score)
    grid = replace(FEATURES, objects=FEATURES.objects.assign(score=np.nan))  # as of whole, grid and dense
    why = get_control("doubt").lacks(grid, {})
    assert "the localisers whole, grid and dense have cosines only" in why
    assert get_control("doubt").lacks(FEATURES, {}) == get_control("caption_likelihood").lacks(grid, {}) == ""
    assert OURS["few_both"].lacks(grid, {}) and not OURS["few_likelihood"].lacks(grid, {})
    with pytest.raises(InputError, match=r"objects lack an object detector's scores: the localisers whole"):
        detector_doubt(grid)


def test_concept_matching_by_hand():
    """Each distinct region counts once, with the phrase that fits it best."""
    features = make_features(2, 0, generators=()).select([0])
    phrase = unit(np.eye(24)[:3])
    cosine = np.array([0.9, 0.8, 0.7, 0.4])
    region = np.zeros((4, 24))
    for i, (which, value) in enumerate(zip((0, 1, 2, 0), cosine, strict=True)):
        region[i, which], region[i, 20] = value, np.sqrt(1 - value**2)
    boxes = pd.DataFrame({"phrase": list("abca"), "x0": [0, 0, 5, 5.0], "score": np.nan, "found": True})
    features = replace(
        features,
        owner=np.zeros(4, np.int64),
        objects=boxes.assign(y0=0.0, x1=9.0, y1=9.0),
        region_emb=region.astype(np.float32),
        phrase_emb=phrase[[0, 1, 2, 0]],
    )
    np.testing.assert_allclose(concepts(features), [[1 - 0.9]], atol=1e-6)
    best = best_regions(features, 4)
    assert list(best.objects["phrase"]) == ["a", "c"] and best.table["n_objects"].tolist() == [2]
    np.testing.assert_allclose(concepts(best), [[0.1]], atol=1e-6)
    assert concepts(select_objects(features, np.zeros(4, bool))).tolist() == [[1.0]]


def test_some_objects_of_every_image():
    features = make_features(30, 10)
    kept = features.objects["phrase"].str.endswith(("1", "4")).to_numpy(bool)
    some = select_objects(features, kept)
    np.testing.assert_array_equal(some.region_emb, features.region_emb[kept])
    np.testing.assert_array_equal(np.bincount(some.owner, minlength=50), some.table["n_objects"])
    assert list(some.objects["phrase"]) == list(features.objects["phrase"][kept])
    np.testing.assert_array_equal(some.image_emb, features.image_emb)
    represent(some, "absolute")


def test_novelty_of_regions():
    train, _, test = parts(FEATURES)
    worst, mean = (Novelty(NearestReals(), how).fit(train)(test)[:, 0] for how in ("max", "mean"))
    bare = test.table["n_objects"].to_numpy() == 0
    assert (worst >= mean - 1e-9).all() and (worst > mean + 1e-9).any() and np.isfinite(worst[bare]).all()
    np.testing.assert_allclose(worst[bare], mean[bare])  # the image itself is the one region


def test_what_is_fitted_is_fitted_on_training_features_each_time():
    train, val, test = parts(FEATURES)
    scorer = get("few_doubt").fit(train, val)
    first = scorer.decision_function(test)
    scorer.fit(val, train)
    assert not np.allclose(scorer.decision_function(test), first)
    np.testing.assert_array_equal(scorer.fit(train, val).decision_function(test), first)
    relative = FeatureScorer((Representation("cosines_relative"),), logistic()).fit(train)
    by_hand = Representation("cosines_relative").fit(train)
    np.testing.assert_array_equal(relative.vectors(test), by_hand(test))


def test_what_is_missing_is_said():
    features = make_features(30, 10)
    features.table.loc[3, "caption_logprob"] = np.nan
    with pytest.raises(InputError, match="1 of 50 images lack caption likelihoods: .* from a captioner"):
        caption_likelihood(features)
    with pytest.raises(InputError, match="pixels of 50 images: none; expected the images themselves"):
        spectrum(features)
    with pytest.raises(InputError, match=r"float64 of shape \(50, 8, 8, 3\); expected .*uint8 array"):
        spectrum(replace(features, pixels=np.zeros((50, 8, 8, 3))))
    assert "another image's caption" in get_control("other_caption").lacks(features, {})
    assert not get_control("other_caption").lacks(features, {"other_caption": features})
    with pytest.raises(
        InputError, match="unknown control 'spectrm'; expected one of caption_like.*mean 'spectrum'"
    ):
        get_control("spectrm")


@pytest.mark.parametrize("name", ["item", "early", "few_both", "spectrum_one_class"])
def test_a_contender_is_the_same_in_another_process(name):
    train, val, test = parts(FEATURES)
    build = control(name, head=QUICK).build

    def score():
        return build(0).fit(train, val).decision_function(test)

    np.testing.assert_array_equal(Parallel(n_jobs=2)([delayed(score)()] * 2), [score()] * 2)


class Guess:
    """Knows the label of a share of the images."""

    def __init__(self, share):
        self.share = share

    def fit(self, train, val):
        return self

    def decision_function(self, features):
        known, chance = np.random.default_rng(0).random((2, len(features)))
        return np.where(known < self.share, features.labels, chance)


def test_a_network_that_does_not_know_its_own_generator_is_said_to():
    features = make_features(300, 120, generators=("gan", "flow", "vae"))
    options = {"seeds": (0,), "train_generators": ["gan", "vae"], "n_boot": 0}
    knows, guesses = (
        _undertrained(train_on_test_on(features, {"cnn": Recipe(lambda seed, s=s: Guess(s))}, **options))
        for s in (0.99, 0.5)
    )
    assert knows == [] and len(guesses) == 1
    assert "trained too little: AUROC on its own generator below 0.95 for gan (0." in guesses[0]
    assert "vae (0." in guesses[0] and "flow" not in guesses[0]


def test_the_stack_is_weighted_for_generators_left_out():
    """A number that tells one generator perfectly and misleads about the others gets less of a say."""
    rng = np.random.default_rng(0)
    y, groups = np.repeat([0, 1], 300), np.r_[np.full(300, "real"), np.tile(["a", "b", "c"], 100)]
    fair, own = rng.normal(size=600) + 1.5 * y, rng.normal(size=600)
    own += np.select([groups == "a", groups == "b", groups == "c"], [6, -2, -2])
    x = np.c_[fair, own]
    stack = GeneratorLeftOut().fit(x, y, groups)
    dealt = np.r_[np.tile(["a", "b", "c"], 100), groups[300:]]  # reals take part in every fold
    worth = {}
    for penalty in np.logspace(-4, 1, 6):
        model = logistic().set_params(logisticregression__C=penalty)
        worth[penalty] = np.mean([
            auroc(y[dealt == out], clone(model).fit(x[dealt != out], y[dealt != out])
                  .decision_function(x[dealt == out])) for out in ("a", "b", "c")])  # fmt: skip
    assert stack.search_.best_params_["logisticregression__C"] == max(worth, key=worth.get)
    one = GeneratorLeftOut().fit(
        x[groups != "c"], y[groups != "c"], np.where(y == 1, "a", "real")[groups != "c"]
    )
    assert np.isfinite(one.decision_function(x)).all()
    features = make_features(80, 30, generators=("gan", "flow"))
    scorer = FeatureScorer((lambda features: features.image_emb,), GeneratorLeftOut()).fit(features)
    assert scorer.decision_function(features).shape == (len(features),)
