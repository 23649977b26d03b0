"""Controls and baselines see what they should see, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score as auroc

from itemkit.controls import (
    CONTROLS,
    FeatureScorer,
    NearestNeighbour,
    PixelCNN,
    augment,
    generic_texts,
    get_control,
    likelihood_and_confidence,
    noise_residual,
    shuffle_texts,
    spectrum,
)
from itemkit.errors import InputError
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import cosines, represent

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


@pytest.mark.parametrize("name", [n for n in CONTROLS if n != "cnn"])
def test_every_control_trains_and_scores(name):
    train, val, test = parts(FEATURES)
    scorer = CONTROLS[name].build(seed=3, head=QUICK, generic_emb=unit(np.ones(24)))
    score = scorer.fit(train, val).decision_function(test)
    assert score.shape == (len(test),) and np.isfinite(score).all()
    again = CONTROLS[name].build(seed=3, head=QUICK, generic_emb=unit(np.ones(24))).fit(train, val)
    np.testing.assert_array_equal(again.decision_function(test), score)
    if name in ("spectrum", "noise_residual"):
        assert auroc(test.labels, score) > 0.95
    if name == "text_only":  # the captions of the made-up fakes are like those of the reals
        assert 0.25 < auroc(test.labels, score) < 0.75


def test_cnn_finds_the_checkerboard_reproducibly_and_leaves_torch_alone():
    train, val, test = parts(picture_features(300, 150))
    state = torch.get_rng_state()
    cnn = PixelCNN(width=4, epochs=6, patience=6, batch_size=16, learning_rate=1e-2, seed=1, device="cpu")
    scorer = FeatureScorer(CONTROLS["cnn"].build().vectors, cnn).fit(train, val)
    score = scorer.decision_function(test)
    assert auroc(test.labels, score) > 0.9
    again = clone(cnn).fit(train.pixels, train.labels, val.pixels, val.labels)
    np.testing.assert_allclose(again.decision_function(test.pixels), score, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_is_applied():
    image = FEATURES.pixels[0]
    changed = [augment(image, np.random.default_rng(seed)) for seed in range(40)]
    assert all(c.shape == image.shape and c.dtype == np.uint8 for c in changed)
    same = np.mean([(c == image).all() for c in changed])
    assert 0.1 < same < 0.45  # blur and JPEG each leave one half as it is


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


def test_nearest_neighbour_by_hand():
    x = np.array([[1.0, 0.0], [0.0, 1.0]])
    model = NearestNeighbour().fit(x, [0, 1])
    np.testing.assert_allclose(
        model.decision_function([[3.0, 4.0], [5.0, 0.0]]), [0.8 - 0.6, -1.0], atol=1e-6
    )


def test_shuffling_leaves_no_text_in_place_and_keeps_them_all():
    features = make_features(50, 20)
    shuffled = shuffle_texts(features, seed=1)
    assert not (shuffled.caption_emb == features.caption_emb).all(1).any()
    assert not (shuffled.phrase_emb == features.phrase_emb).all(1).any()
    for name in ("caption_emb", "phrase_emb"):
        a, b = getattr(shuffled, name), getattr(features, name)
        np.testing.assert_array_equal(a[np.lexsort(a.T)], b[np.lexsort(b.T)])
    np.testing.assert_array_equal(shuffled.image_emb, features.image_emb)
    assert cosines(shuffled)["global_cosine"].mean() < 0.2 < cosines(features)["global_cosine"].mean()
    np.testing.assert_array_equal(shuffle_texts(features, 1).caption_emb, shuffled.caption_emb)
    with pytest.raises(InputError, match="one text alone cannot be shuffled"):
        shuffle_texts(features.select([0]))


def test_generic_text_is_one_for_all():
    features = make_features(20, 10)
    one = generic_texts(features, np.ones(24) * 7)
    assert len(np.unique(one.caption_emb, axis=0)) == len(np.unique(one.phrase_emb, axis=0)) == 1
    represent(one, "absolute")  # still normalised
    with pytest.raises(InputError, match=r"generic_emb has shape \(3,\); expected one embedding of width 24"):
        generic_texts(features, np.ones(3))


def test_likelihood_and_confidence_by_hand():
    features = make_features(30, 10)
    x = likelihood_and_confidence(features, fill=0.25)
    row = int(np.flatnonzero(features.table["n_objects"] == 2)[0])
    score = features.objects["score"].to_numpy()[features.owner == row]
    np.testing.assert_allclose(
        x[row], [features.table["caption_logprob"][row], score.mean(), score.min(), 2], rtol=1e-5
    )
    bare = int(np.flatnonzero(features.table["n_objects"] == 0)[0])
    assert x[bare, 1] == x[bare, 2] == 0.25 and x[bare, 3] == 0
    assert np.isnan(likelihood_and_confidence(features)[bare, 1:3]).all()


def test_the_score_of_an_image_without_objects_does_not_depend_on_its_company():
    train, val, test = parts(FEATURES)
    scorer = get_control("likelihood_confidence").build(head=QUICK).fit(train, val)
    together = scorer.decision_function(test)
    bare = np.flatnonzero(test.table["n_objects"] == 0)
    alone = [scorer.decision_function(test.select([row]))[0] for row in bare]
    np.testing.assert_allclose(alone, together[bare], rtol=1e-5)
    # what stands for the missing scores is the training images' mean, also after another training
    filled = scorer.vectors(test)[bare, 1]
    np.testing.assert_allclose(filled, train.objects["score"].mean(), rtol=1e-6)
    np.testing.assert_allclose(
        scorer.fit(val, train).vectors(test)[bare, 1], val.objects["score"].mean(), rtol=1e-6
    )


def test_no_object_in_any_image_leaves_the_likelihood():
    nothing = FEATURES.table["n_objects"].to_numpy() == 0
    train, val, test = parts(FEATURES.select(nothing))
    scorer = get_control("likelihood_confidence").build(head=QUICK).fit(train, val)
    assert np.isfinite(scorer.decision_function(test)).all()


def test_the_localiser_score_is_called_what_it_is():
    # the made-up localiser is like "grid" and "dense": its score is the cosine of region and phrase
    features = make_features(30, 10)
    local = cosines(features)[["mean_local_cosine", "worst_local_cosine"]].to_numpy()
    some = features.table["n_objects"].to_numpy() > 0
    np.testing.assert_allclose(likelihood_and_confidence(features)[some, 1:3], local[some], rtol=1e-5)
    assert "local cosine" in CONTROLS["likelihood_confidence"].title
    for texts in (shuffle_texts(features), generic_texts(features, np.ones(24))):
        np.testing.assert_array_equal(texts.region_emb, features.region_emb)  # the own phrase chose them


def test_what_is_missing_is_said():
    features = make_features(30, 10)
    features.table.loc[3, "caption_logprob"] = np.nan
    with pytest.raises(InputError, match="1 of 50 images lack caption likelihoods: .* from a captioner"):
        likelihood_and_confidence(features)
    with pytest.raises(InputError, match="pixels of 50 images: none; expected the images themselves"):
        spectrum(features)
    with pytest.raises(InputError, match=r"float64 of shape \(50, 8, 8, 3\); expected .*uint8 array"):
        spectrum(replace(features, pixels=np.zeros((50, 8, 8, 3))))
    with pytest.raises(InputError, match="'one caption for all' needs the embedding of a generic caption"):
        get_control("generic_caption").build()
    with pytest.raises(
        InputError, match="unknown control 'spectrm'; expected one of image_mlp.*mean 'spectrum'"
    ):
        get_control("spectrm")
