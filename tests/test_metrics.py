"""Metrics: equal to scikit-learn, hand-worked, and intervals that cover as often as they say."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn import metrics as sk

from itemkit.errors import InputError
from itemkit.metrics import (
    METRICS,
    average_precision,
    bootstrap,
    effect_size,
    holm,
    p_value,
    replicate,
    resample,
)

Y = np.array([0, 0, 0, 1, 1])
S = np.array([0.1, 0.4, 0.35, 0.8, 0.4])


def random_case(seed):
    """Random sizes, class balance and, in every third case, many ties or a constant score."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 200))
    y = (rng.random(n) < rng.uniform(0.05, 0.95)).astype(int)
    y[:2] = 0, 1
    s = rng.normal(size=n) + y * rng.uniform(-1, 3)
    if seed % 3 == 0:
        s = np.round(s)
    if seed % 30 == 0:
        s = np.zeros(n)
    return y, s


def metrics_of(y, s, threshold=0.3, probability=None, **options):
    """Every metric of one sample."""
    p = expit(s) if probability is None else probability
    found = replicate(y, s, np.ones((len(y), 1)), threshold, p, **options)
    return {name: float(values[0]) for name, values in found.items()}


@pytest.mark.parametrize("seed", range(0, 80, 2))
def test_equal_to_scikit_learn(seed):
    y, s = random_case(seed)
    p, row, called = 1 / (1 + np.exp(-s)), metrics_of(y, s), s > 0.3
    assert average_precision(y, s) == row["ap"] == pytest.approx(sk.average_precision_score(y, s), abs=1e-12)
    assert row["auroc"] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
    for name, limit in (("tpr_at_fpr01", 0.01), ("tpr_at_fpr05", 0.05)):
        assert row[name] == pytest.approx(tpr[fpr <= limit + 1e-9].max(), abs=1e-12)
    assert row["accuracy"] == pytest.approx(sk.accuracy_score(y, called))
    assert row["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, called))
    assert row["accuracy_fake"] == pytest.approx(sk.recall_score(y, called, pos_label=1))
    assert row["accuracy_real"] == pytest.approx(sk.recall_score(y, called, pos_label=0))
    assert row["brier"] == pytest.approx(sk.brier_score_loss(y, p))
    best = max(sk.accuracy_score(y, s > t) for t in [-np.inf, *s])
    assert row["accuracy_oracle"] == pytest.approx(best) and best >= row["accuracy"] - 1e-12
    best = max(sk.balanced_accuracy_score(y, s > t) for t in [-np.inf, *s])
    assert row["balanced_accuracy_oracle"] == pytest.approx(best)


@pytest.mark.parametrize(
    ("y", "s"),
    [([0, 1], [0.0, 0.0]), ([0, 1], [1.0, 0.0]), ([1, 0], [5e-324, 0.0]), ([0, 1, 1], [1e300, -1e300, 1e300]),
     ([1] * 50 + [0], [0.5] * 51), ([0] * 50 + [1], [*range(50), -1.0]), ([0, 1] * 20, [3, 3, 2, 2] * 10)],
)  # fmt: skip
def test_equal_to_scikit_learn_on_degenerate_inputs(y, s):
    y, s = np.array(y), np.array(s, float)
    row = metrics_of(y, s, threshold=0.5)
    assert row["ap"] == pytest.approx(sk.average_precision_score(y, s), abs=1e-12)
    assert row["auroc"] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
    assert row["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, s > 0.5))
    for name in ("accuracy", "balanced_accuracy"):
        score = getattr(sk, f"{name}_score")
        assert row[f"{name}_oracle"] == pytest.approx(max(score(y, s > t) for t in [-np.inf, *s]))


def test_images_of_no_weight_are_not_there():
    y, s = random_case(7)
    p, some = 1 / (1 + np.exp(-s)), np.arange(len(y)) % 3 > 0
    some[:2] = True
    whole = replicate(y, s, some[:, None], 0.3, p, True)
    part = metrics_of(y[some], s[some], 0.3, p[some], balanced=True)
    assert {name: float(value[0]) for name, value in whole.items()} == pytest.approx(part)
    for name in METRICS:
        alone = replicate(y, s, some[:, None], 0.3, p, True, (name,))
        assert list(alone) == [name] and alone[name][0] == whole[name][0]


def test_p_values_by_hand():
    drawn = np.r_[np.full(5, -1.0), np.full(1994, 1.0)]
    assert p_value(drawn) == p_value(-drawn) == 2 * 6 / 2000
    assert p_value(np.ones(1999)) == 2 / 2000 and p_value(np.zeros(9)) == 1.0
    assert np.isnan(p_value(np.zeros(0))) and np.isnan(p_value(np.array([1.0, np.nan])))
    # three comparisons: the least times 3, the next times 2, never below the one before
    np.testing.assert_allclose(holm([0.02, 0.01, 0.9, np.nan, 0.021]), [0.06, 0.04, 0.9, np.nan, 0.06])
    np.testing.assert_allclose(holm([0.4, 0.5]), [0.8, 0.8])
    assert len(holm([])) == 0


def test_by_hand():
    # descending: 0.8 fake | 0.4 fake and real | 0.35 real | 0.1 real
    row = metrics_of(Y, S, threshold=0.4)  # a score on the threshold is called real
    assert row["ap"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert row["auroc"] == pytest.approx((3 + 2.5) / 6)
    assert row["tpr_at_fpr05"] == 0.5
    assert (row["accuracy_fake"], row["accuracy_real"], row["balanced_accuracy"]) == (0.5, 1.0, 0.75)
    # three bins with one image each: p 0.2 and 0.4 of reals, p 0.6 of a fake
    y, p = np.array([0, 0, 1]), np.array([0.2, 0.4, 0.6])
    assert metrics_of(y, p, probability=p)["ece"] == pytest.approx((0.2 + 0.4 + 0.4) / 3)
    assert metrics_of(y, p, probability=p)["brier"] == pytest.approx((0.04 + 0.16 + 0.16) / 3)


def test_intervals_hold_the_value_they_belong_to():
    rng = np.random.default_rng(3)
    for _ in range(20):
        p = rng.random(300)
        y = (rng.random(300) < p).astype(int)  # perfectly calibrated
        row = bootstrap(y, p, probability=p, metrics=["ece"], n_boot=100).iloc[0]
        assert 0 <= row["low"] <= row["value"] <= row["high"]


def test_resamples_of_many_images_do_not_drift():
    y, s = np.arange(400_000) % 2, np.arange(400_000) % 2 + 0.1 * (np.arange(400_000) % 10)
    once = np.ones((len(y), 1), np.float32)
    assert replicate(y, s, once)["auroc"][0] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-9)


def test_balanced_calibration_does_not_depend_on_the_mix():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 4000)
    p = np.clip(0.5 + 0.3 * (2 * y - 1) + rng.normal(size=4000) * 0.3, 0, 1)
    few = np.flatnonzero(y == 1)[:200]
    rows = np.r_[np.flatnonzero(y == 0), few]
    plain, balanced = (
        [metrics_of(y[r], p[r], probability=p[r], balanced=even)["ece"] for r in (slice(None), rows)]
        for even in (False, True)
    )
    assert abs(balanced[0] - balanced[1]) < 0.02 < abs(plain[0] - plain[1])


def test_weights_are_repeated_images():
    y, s = random_case(5)
    p = 1 / (1 + np.exp(-s))
    weights = resample(y, 20, np.random.default_rng(0))
    assert all((weights[y == c].sum(0) == (y == c).sum()).all() for c in (0, 1))
    fast = replicate(y, s, weights, 0.0, p)
    for b in range(20):
        rows = np.repeat(np.arange(len(y)), weights[:, b].astype(int))
        slow = metrics_of(y[rows], s[rows], 0.0, p[rows])
        for name in METRICS:
            assert fast[name][b] == pytest.approx(slow[name], abs=1e-5), name


def test_intervals_cover_the_truth_by_simulation():
    truth = 0.7602499  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    y = np.r_[np.zeros(80, int), np.ones(60, int)]
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for trial in range(200):
        s = rng.normal(size=140) + y
        row = bootstrap(y, s, metrics=["auroc"], n_boot=200, seed=trial).iloc[0]
        delong = effect_size(s[y == 1], s[y == 0])
        hits += [row["low"] <= truth <= row["high"], delong["auroc_low"] <= truth <= delong["auroc_high"]]
    # 95 % asked for; 4 standard errors of the simulation are 6 points
    assert (hits / 200 >= 0.88).all() and (hits / 200 <= 0.99).all()
    pd.testing.assert_frame_equal(bootstrap(y, s, 0.0, seed=3), bootstrap(y, s, 0.0, seed=3))


def test_effect_size_by_hand_and_sign():
    row = effect_size(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0]))
    assert row["d"] == pytest.approx(1.0)  # means 2 and 1, both variances 1
    assert row["auroc"] == pytest.approx((6 + 2 * 0.5) / 9)  # 6 pairs won, 2 ties, 1 lost
    other = effect_size(np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert other["d"] == -row["d"] and other["auroc"] == pytest.approx(1 - row["auroc"])
    apart = effect_size(np.arange(10.0) + 100, np.arange(10.0))
    assert apart["auroc"] == apart["auroc_high"] == 1.0 and apart["auroc_low"] == pytest.approx(1 - 0.2995732)


def test_degenerate_inputs_are_clear_errors():
    with pytest.raises(InputError, match=r"labels are \[1\]; expected both 0 \(real\) and 1 \(fake\)"):
        average_precision([1, 1, 1], [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match=r"1 of 2 scores are not finite, the first is row 1"):
        average_precision([0, 1], [0.1, np.nan])
    with pytest.raises(InputError, match=r"labels are \[0, 2\]; expected both"):
        average_precision([0, 2], [0.1, 0.2])
    with pytest.raises(InputError, match=r"labels have shape \(3,\), scores \(2,\)"):
        average_precision([0, 1, 1], [0.1, 0.2])
    with pytest.raises(InputError, match="probabilities run from 0.1 to 1.5; expected 0 to 1"):
        bootstrap([0, 1], [0.1, 1.5], probability=[0.1, 1.5])
    with pytest.raises(InputError, match="no 'f1'; expected one of ap, auroc"):
        bootstrap([0, 1], [0.1, 0.2], metrics=["f1"])
    with pytest.raises(InputError, match="'accuracy'; .* accuracies need a threshold, chosen on validation"):
        bootstrap([0, 1], [0.1, 0.2], metrics=["accuracy"])


@pytest.mark.parametrize("real", [[1.0], [], [2.0, 2.0]])
def test_an_effect_that_nothing_can_be_said_of_is_nan_and_counted(real):
    size = effect_size(real, [1.0] * 3)
    assert (size.pop("n_real"), size.pop("n_fake")) == (len(real), 3)
    assert np.isnan(list(size.values())).all()
