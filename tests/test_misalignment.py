"""Misalignment vectors against hand-worked numbers, and what must not change them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from itemkit import misalignment
from itemkit.errors import InputError
from itemkit.misalignment import (
    KINDS,
    LEVELS,
    POOLINGS,
    STACKED,
    Representation,
    RepresentationConfig,
    cosines,
    get_representation,
    misalign,
    pool,
    represent,
)

from synthetic import make_features, unit

A = np.array([[1.0, 0.0], [0.6, 0.8]])
B = np.array([[0.6, 0.8], [0.8, -0.6]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [[0.6], [0.0]]),
        ("distance", [[0.4], [1.0]]),
        ("difference", [[0.4, -0.8], [-0.2, 1.4]]),
        ("absolute", [[0.4, 0.8], [0.2, 1.4]]),
        ("product", [[0.6, 0.0], [0.48, -0.48]]),
        ("concat", [[1.0, 0.0, 0.6, 0.8], [0.6, 0.8, 0.8, -0.6]]),
    ],
)
def test_kinds_by_hand(kind, expected):
    out = misalign(A, B, kind)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-6)


# three objects of image 0 (cosines 0.9, 0.1, 0.5), one of image 2, none of image 1
LOCAL = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0], [7.0, 70.0]])
OWNER = np.array([0, 0, 0, 2])
COSINE = np.array([0.9, 0.1, 0.5, 0.3])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [[3, 30], [0, 0], [7, 70]]),
        ("sum", [[9, 90], [0, 0], [7, 70]]),
        ("worst", [[2, 20], [0, 0], [7, 70]]),
        ("mean_worst", [[3, 30, 2, 20], [0, 0, 0, 0], [7, 70, 7, 70]]),
        ("top_k", [[2, 20, 6, 60, 1, 10], [0] * 6, [7, 70, 0, 0, 0, 0]]),
    ],
)
def test_pooling_by_hand(how, expected):
    np.testing.assert_allclose(pool(LOCAL, OWNER, 3, how, cosine=COSINE), expected, atol=1e-5)


def test_soft_worst_lies_between_worst_and_mean_and_reaches_both(monkeypatch):
    def pooled(temperature):
        monkeypatch.setattr(misalignment, "TEMPERATURE", temperature)
        return pool(LOCAL, OWNER, 3, "soft_worst", cosine=COSINE)

    np.testing.assert_allclose(pooled(1e-4), pool(LOCAL, OWNER, 3, "worst", cosine=COSINE), atol=1e-4)
    np.testing.assert_allclose(pooled(1e6), pool(LOCAL, OWNER, 3, "mean", cosine=COSINE), atol=1e-4)
    weights = np.exp(-COSINE[:3] / 0.4)
    np.testing.assert_allclose(pooled(0.4)[0], weights @ LOCAL[:3] / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("how", POOLINGS)
def test_order_of_objects_does_not_matter(how):
    shuffle = np.array([3, 1, 0, 2])
    np.testing.assert_allclose(
        pool(LOCAL, OWNER, 3, how, cosine=COSINE),
        pool(LOCAL[shuffle], OWNER[shuffle], 3, how, cosine=COSINE[shuffle]),
        atol=1e-5,
    )


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_width_and_image_order(level, kind, pooling, relative):
    features = make_features(20, 10, dim=8)
    config = RepresentationConfig(level=level, kind=kind, pooling=pooling, relative=relative)
    representation = Representation(config).fit(features)
    x = representation(features)
    assert len(x) == len(features) and np.isfinite(x).all() and x.dtype == np.float32
    rows = np.random.default_rng(1).permutation(len(features))[:17]
    np.testing.assert_allclose(representation(features.select(rows)), x[rows], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_fused_by_a_sum(kind, pooling):
    features = make_features(20, 10, dim=8)
    if pooling in STACKED:
        with pytest.raises(
            InputError, match=f"pooling='{pooling}' makes wider; expected pooling mean, sum, w"
        ):
            RepresentationConfig(pooling=pooling, fuse="sum")
        return
    whole, local = (
        represent(features, RepresentationConfig(level=level, kind=kind, pooling=pooling))
        for level in ("global", "local")
    )
    both = represent(features, RepresentationConfig(kind=kind, pooling=pooling, fuse="sum"))
    np.testing.assert_array_equal(both, whole + local)


def test_drawn_by_hand():
    features = make_features(40, 10, dim=8)
    row = int(np.flatnonzero(features.table["n_objects"] == 3)[0])
    mine = np.flatnonzero(features.owner == row)
    whole, regions = features.image_emb[row], features.region_emb[mine]
    caption, phrases = features.caption_emb[row], features.phrase_emb[mine]
    one = 1 - whole @ caption + np.mean([1 - a @ b for a, b in zip(regions, phrases, strict=True)])
    np.testing.assert_allclose(represent(features, "drawn_scalar")[row], [one], atol=1e-6)
    vector = np.abs(whole - caption) + np.abs(regions - phrases).mean(axis=0)
    np.testing.assert_allclose(represent(features, "drawn")[row], vector, atol=1e-6)


def ground_and_balls(n=200, seed=0):
    """Every image has a ground, whose cosine is 0.5 ± 0.1 in reals, and a ball with 0.8 ± 0.02.

    In the second half, fakes, both are 0.06 lower: little for the ground, much for the ball.
    """
    rng = np.random.default_rng(seed)
    features = make_features(n, n, generators=("gan",), dim=16, seed=seed)
    ground, ball = np.tile([True, False], 2 * n), np.tile([False, True], 2 * n)
    words = unit(rng.normal(size=(2, 16)))
    phrase = words[ball.astype(int)]
    cosine = np.where(ground, 0.5, 0.8) + rng.normal(size=4 * n) * np.where(ground, 0.1, 0.02)
    cosine -= 0.06 * (np.arange(4 * n) >= 2 * n)
    aside = rng.normal(size=phrase.shape)
    aside = unit(aside - np.sum(aside * phrase, axis=1, keepdims=True) * phrase)
    region = cosine[:, None] * phrase + np.sqrt(1 - cosine[:, None] ** 2) * aside
    objects = features.objects.iloc[np.zeros(4 * n, int)].reset_index(drop=True)
    return replace(
        features,
        phrase_emb=phrase.astype(np.float32),
        region_emb=region.astype(np.float32),
        owner=np.arange(4 * n) // 2,
        objects=objects.assign(phrase=np.where(ground, "the ground", "a ball")),
    )


def test_relative_cosines_are_on_one_scale():
    features = ground_and_balls()
    real, fake = (features.select(features.labels == label) for label in (0, 1))
    absolute, relative = Representation("cosines"), Representation("cosines_relative").fit(features)
    assert absolute.worst_phrase(real).eq("the ground").mean() > 0.97
    assert relative.worst_phrase(real).eq("the ground").mean() == pytest.approx(0.5, abs=0.1)
    # by hand: minus the mean of its phrase, divided by how far its reals lie from it, as geometric means
    cosine, phrase = absolute.pair_cosines(real)["local"], real.objects["phrase"]
    mean = {word: cosine[phrase == word].mean() for word in set(phrase)}
    off = cosine - phrase.map(mean).to_numpy()
    usual = {word: stats.gmean(np.abs(off[phrase == word]) + misalignment.LEAST_SPREAD) for word in mean}
    expected = off / phrase.map(usual).to_numpy() * stats.gmean(list(usual.values()))
    np.testing.assert_allclose(relative.pair_cosines(real)["local"], expected, atol=0.003)
    # the fakes' balls stand out now, and the worst object is one
    assert absolute.worst_phrase(fake).eq("the ground").mean() > 0.97
    assert relative.worst_phrase(fake).eq("a ball").mean() > 0.8


@pytest.mark.parametrize("kind", ["absolute", "product", "distance"])
def test_relative_vectors_of_reals_are_centred(kind):
    features = ground_and_balls()
    config = RepresentationConfig(level="local", kind=kind, pooling="mean", relative=True)
    real = features.select(features.labels == 0)
    x, absolute = Representation(config).fit(features)(real), represent(real, replace(config, relative=False))
    assert np.abs(x.mean(axis=0)).max() < 0.01 < np.abs(absolute.mean(axis=0)).max()


def test_pooling_ranks_by_the_relative_cosine():
    features = ground_and_balls()
    config = RepresentationConfig(level="local", kind="cosine", pooling="worst", relative=True)
    representation = Representation(config).fit(features)
    lowest = representation.pair_cosines(features)["local"].reshape(-1, 2).min(axis=1)
    np.testing.assert_allclose(representation(features)[:, 0], lowest, atol=1e-6)


def test_only_the_reals_given_to_fit_are_learnt_from():
    features = ground_and_balls()
    half, rest = (features.select(features.table.index % 2 == i) for i in (0, 1))
    known = Representation("cosines_relative").fit(half)
    alone = Representation("cosines_relative").fit(half.select(half.labels == 0))
    np.testing.assert_array_equal(known(rest), alone(rest))
    assert np.abs(known(rest) - Representation("cosines_relative").fit(rest)(rest)).max() > 1e-4


def test_relative_with_few_reals_or_one_text():
    features = ground_and_balls(n=20)
    for few in (features.select([0, 1]), features.select([0, 1, 2, 30])):
        assert np.isfinite(Representation("cosines_relative").fit(few)(features)).all()
    with pytest.raises(InputError, match="1 of 3 images are real; a relative representation learns from two"):
        Representation("cosines_relative").fit(features.select([0, 30, 31]))
    one = replace(
        features,
        caption_emb=np.tile(features.caption_emb[:1], (len(features), 1)),
        phrase_emb=np.tile(features.phrase_emb[:1], (len(features.owner), 1)),
    )
    x, reals = Representation("cosines_relative").fit(one)(one), one.labels == 0
    np.testing.assert_allclose(x[reals].mean(axis=0)[:2], 0, atol=1e-3)
    nothing = make_features(60, 30, dim=8)
    nothing = nothing.select(np.flatnonzero(nothing.table["n_objects"] == 0))
    assert np.isfinite(Representation("cosines_relative").fit(nothing)(make_features(20, 10, dim=8))).all()


def test_a_relative_representation_must_be_fitted():
    features = make_features(20, 10, dim=8)
    with pytest.raises(InputError, match=r"was not fitted: call Representation\(config\)\.fit"):
        represent(features, "cosines_relative")
    np.testing.assert_array_equal(
        Representation("drawn").fit(features)(features), represent(features, "drawn")
    )


def test_nouns_without_a_box_are_not_pooled():
    features = make_features(40, 10, dim=8)
    row = int(np.flatnonzero(features.table["n_objects"] == 3)[0])
    bare = int(np.flatnonzero(features.table["n_objects"] == 1)[0])
    mine = np.flatnonzero(features.owner == row)
    found = np.ones(len(features.owner), bool)
    found[[mine[1], *np.flatnonzero(features.owner == bare)]] = False
    marked = replace(features, objects=features.objects.assign(found=found))
    config = RepresentationConfig(pooling="sum", level="local", kind="cosine", found_only=True)
    x, cosine = represent(marked, config)[:, 0], Representation("cosines").pair_cosines(features)
    assert x[row] == pytest.approx(cosine["local"][mine[0]] + cosine["local"][mine[2]], abs=1e-6)
    assert x[bare] == pytest.approx(cosine["global"][bare], abs=1e-6)
    others = np.delete(np.arange(len(features)), [row, bare])
    everything = represent(features, replace(config, found_only=False))[:, 0]
    np.testing.assert_array_equal(x[others], everything[others])
    without = replace(features, objects=features.objects.drop(columns="found", errors="ignore"))
    np.testing.assert_array_equal(represent(without, config)[:, 0], everything)  # no column: all were found
    np.testing.assert_array_equal(represent(marked, replace(config, found_only=False))[:, 0], everything)
    assert (
        Representation(config).worst_phrase(marked)[row] in features.objects["phrase"][mine[[0, 2]]].tolist()
    )


def test_worst_phrase():
    features = make_features(40, 10, dim=8)
    phrases, table = Representation("absolute").worst_phrase(features), cosines(features)
    assert phrases.isna().tolist() == (table["n_objects"] == 0).tolist()
    local = features.objects.assign(cosine=Representation("cosines").pair_cosines(features)["local"])
    found = local.set_index("phrase")["cosine"].reindex(phrases.dropna()).to_numpy()
    np.testing.assert_allclose(found, table.loc[phrases.notna(), "worst_local_cosine"], atol=1e-6)


def test_an_image_without_objects_is_its_own_only_object():
    features = make_features(30, 10, dim=8)
    empty = int(np.flatnonzero(features.table["n_objects"] == 0)[0])
    whole = misalign(features.image_emb, features.caption_emb, "absolute")[empty]
    np.testing.assert_allclose(represent(features)[empty], np.tile(whole, 3))
    nothing = features.select(np.flatnonzero(features.table["n_objects"] == 0))
    assert len(nothing.owner) == 0 and len(nothing) > 0
    for pooling in POOLINGS:
        x = represent(nothing, RepresentationConfig(level="local", kind="cosine", pooling=pooling))
        expected = misalign(nothing.image_emb, nothing.caption_emb, "cosine")[:, 0]
        np.testing.assert_allclose(x[:, 0], expected, atol=1e-6)


def test_cosines_table_by_hand():
    features = make_features(40, 10, dim=8)
    table = cosines(features)
    row = int(np.flatnonzero(features.table["n_objects"] == 3)[0])
    mine = np.flatnonzero(features.owner == row)
    local = [float(features.region_emb[i] @ features.phrase_emb[i]) for i in mine]
    assert table.loc[row, "worst_local_cosine"] == pytest.approx(min(local), abs=1e-6)
    assert table.loc[row, "mean_local_cosine"] == pytest.approx(np.mean(local), abs=1e-6)
    whole = float(features.image_emb[row] @ features.caption_emb[row])
    assert table.loc[row, "global_cosine"] == pytest.approx(whole, abs=1e-6)
    assert list(table["n_objects"]) == list(features.table["n_objects"])


def test_errors_quote_what_was_got():
    with pytest.raises(InputError, match=r"shape \(2, 2\), text embeddings \(1, 2\); expected"):
        misalign(A, B[:1])
    with pytest.raises(InputError, match=r"text embedding 1 has norm 2.0000; expected 1 within"):
        misalign(A, B * [[1], [2]])
    with pytest.raises(InputError, match="image embedding 0 has norm nan"):
        misalign(np.full((2, 2), np.nan), B)
    with pytest.raises(InputError, match="kind='angle': expected one of cosine, distance"):
        misalign(A, B, "angle")
    for name in ("pooling", "level", "fuse"):
        with pytest.raises(InputError, match=f"{name}='max': expected one of "):
            RepresentationConfig(**{name: "max"})
    with pytest.raises(
        InputError, match="unknown representation 'cosine'; expected one of absolute.*mean 'cosines'"
    ):
        get_representation("cosine")


def test_what_reals_have_is_learnt_from_so_many_pairs_at_most(monkeypatch):
    rng = np.random.default_rng(0)
    text, pairs = rng.normal(size=(900, 4)), rng.normal(size=(900, 2))
    monkeypatch.setattr(misalignment, "MOST_PAIRS", 300)
    np.testing.assert_array_equal(
        misalignment._expected(text, pairs), misalignment._expected(text[::3], pairs[::3])
    )
