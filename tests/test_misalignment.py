"""Misalignment vectors against hand-worked numbers, and what must not change them."""

import numpy as np
import pytest

from itemkit import misalignment
from itemkit.errors import InputError
from itemkit.misalignment import (
    KINDS,
    LEVELS,
    POOLINGS,
    RepresentationConfig,
    cosines,
    get_representation,
    misalign,
    pool,
    represent,
)

from synthetic import make_features

A = np.array([[1.0, 0.0], [0.6, 0.8]])
B = np.array([[0.6, 0.8], [0.8, -0.6]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [[0.6], [0.0]]),
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


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_width_and_image_order(level, kind, pooling):
    features = make_features(20, 10, dim=8)
    config = RepresentationConfig(level=level, kind=kind, pooling=pooling)
    x = represent(features, config)
    assert len(x) == len(features) and np.isfinite(x).all()
    rows = np.random.default_rng(1).permutation(len(features))[:17]
    np.testing.assert_allclose(represent(features.select(rows), config), x[rows], atol=1e-6)


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
    with pytest.raises(InputError, match="kind='angle': expected one of cosine, difference"):
        misalign(A, B, "angle")
    with pytest.raises(InputError, match="pooling='max': expected one of mean"):
        RepresentationConfig(pooling="max")
    with pytest.raises(
        InputError, match="unknown representation 'cosine'; expected one of absolute.*mean 'cosines'"
    ):
        get_representation("cosine")
