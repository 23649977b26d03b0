"""Metrics: equal to scikit-learn, hand-worked, and intervals that cover as often as they say."""

import numpy as np
import pytest
from sklearn import metrics as sk

from itemkit.errors import InputError
from itemkit.metrics import (
    METRICS,
    auroc,
    average_precision,
    bootstrap,
    brier,
    compare,
    delong,
    effect_size,
    evaluate_scores,
    expected_calibration_error,
    frechet_distance,
    replicate,
    stratified_weights,
    tpr_at_fpr,
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


@pytest.mark.parametrize("seed", range(120))
def test_equal_to_scikit_learn(seed):
    y, s = random_case(seed)
    assert average_precision(y, s) == pytest.approx(sk.average_precision_score(y, s), abs=1e-12)
    assert auroc(y, s) == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
    for limit in (0.01, 0.05):
        assert tpr_at_fpr(y, s, limit) == pytest.approx(tpr[fpr <= limit + 1e-9].max(), abs=1e-12)
    p = 1 / (1 + np.exp(-s))
    row = evaluate_scores(y, s, threshold=0.3, probability=p)
    called = s > 0.3
    assert row["accuracy"] == pytest.approx(sk.accuracy_score(y, called))
    assert row["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, called))
    assert row["accuracy_fake"] == pytest.approx(sk.recall_score(y, called, pos_label=1))
    assert row["accuracy_real"] == pytest.approx(sk.recall_score(y, called, pos_label=0))
    assert row["brier"] == pytest.approx(sk.brier_score_loss(y, p))
    assert row["tpr_at_fpr05"] == pytest.approx(tpr_at_fpr(y, s, 0.05))
    best = max(sk.accuracy_score(y, s > t) for t in [-np.inf, *s])
    assert row["accuracy_oracle"] == pytest.approx(best) and best >= row["accuracy"] - 1e-12


def test_by_hand():
    # descending: 0.8 fake | 0.4 fake and real | 0.35 real | 0.1 real
    assert average_precision(Y, S) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert auroc(Y, S) == pytest.approx((3 + 2.5) / 6)
    assert tpr_at_fpr(Y, S, 0.05) == 0.5
    assert tpr_at_fpr(Y, S, 1.0) == 1.0
    row = evaluate_scores(Y, S, threshold=0.4)  # a score on the threshold is called real
    assert (row["accuracy_fake"], row["accuracy_real"], row["balanced_accuracy"]) == (0.5, 1.0, 0.75)
    assert (row["n_real"], row["n_fake"]) == (3, 2)
    assert brier([0, 1], [0.25, 0.5]) == pytest.approx((0.0625 + 0.25) / 2)
    # two bins: p 0.2 and 0.4 with no fake among two, p 0.6 with one fake among one
    assert expected_calibration_error([0, 0, 1], [0.2, 0.4, 0.6], n_bins=2) == pytest.approx((0.6 + 0.4) / 3)


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
    exact = replicate(y, s, once.astype(np.float64), ["auroc"])["auroc"][0]
    assert replicate(y, s, once, ["auroc"])["auroc"][0] == pytest.approx(exact, abs=1e-9) and exact <= 1


def test_balanced_calibration_does_not_depend_on_the_mix():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 4000)
    p = np.clip(0.5 + 0.3 * (2 * y - 1) + rng.normal(size=4000) * 0.3, 0, 1)
    few = np.flatnonzero(y == 1)[:200]
    rows = np.r_[np.flatnonzero(y == 0), few]
    plain = [expected_calibration_error(y[r], p[r]) for r in (slice(None), rows)]
    balanced = [expected_calibration_error(y[r], p[r], balanced=True) for r in (slice(None), rows)]
    assert abs(balanced[0] - balanced[1]) < 0.02 < abs(plain[0] - plain[1])


def test_weights_are_repeated_images():
    y, s = random_case(5)
    p = 1 / (1 + np.exp(-s))
    weights = stratified_weights(y, 20, np.random.default_rng(0))
    assert (weights[y == 1].sum(0) == (y == 1).sum()).all() and (
        weights[y == 0].sum(0) == (y == 0).sum()
    ).all()
    fast = replicate(y, s, weights, METRICS, 0.0, p)
    for b in range(20):
        rows = np.repeat(np.arange(len(y)), weights[:, b].astype(int))
        slow = evaluate_scores(y[rows], s[rows], 0.0, p[rows])
        for name in METRICS:
            assert fast[name][b] == pytest.approx(slow[name], abs=1e-5), name


def test_order_of_images_and_monotone_scores_change_nothing():
    y, s = random_case(7)
    shuffle = np.random.default_rng(1).permutation(len(y))
    for metric in (average_precision, auroc, tpr_at_fpr):
        assert metric(y[shuffle], s[shuffle]) == pytest.approx(metric(y, s), abs=1e-12)
        assert metric(y, np.exp(s)) == pytest.approx(metric(y, s), abs=1e-12)


def test_bootstrap_is_reproducible_and_brackets_the_value():
    y, s = random_case(11)
    table = bootstrap(y, s, threshold=0.0, n_boot=300, seed=3)
    assert table.equals(bootstrap(y, s, threshold=0.0, n_boot=300, seed=3))
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


def test_bootstrap_covers_the_truth_by_simulation():
    truth = 0.7602499  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    y = np.r_[np.zeros(80, int), np.ones(60, int)]
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        row = bootstrap(y, rng.normal(size=140) + y, metrics=["auroc"], n_boot=200, seed=trial).iloc[0]
        hits += row["low"] <= truth <= row["high"]
    assert 0.90 <= hits / 300 <= 0.98  # 95 % asked for; 4 standard errors of the simulation are 5 points


def test_paired_tests_agree_and_know_when_nothing_differs():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 400)
    good, poor = y * 2 + rng.normal(size=400), y * 0.5 + rng.normal(size=400)
    test, table = delong(y, good, poor), compare(y, good, poor, n_boot=500).set_index("metric")
    assert test["difference"] == pytest.approx(auroc(y, good) - auroc(y, poor))
    assert table.loc["auroc", "difference"] == pytest.approx(test["difference"])
    assert table.loc["auroc", "low"] == pytest.approx(test["low"], abs=0.015)
    assert table.loc["auroc", "high"] == pytest.approx(test["high"], abs=0.015)
    assert test["p_value"] < 1e-6 and table.loc["auroc", "p_value"] < 0.01
    assert delong(y, good, good * 3 + 1)["p_value"] == 1.0
    assert compare(y, good, good, n_boot=50).loc[0, "p_value"] == 1.0


def test_delong_variance_by_hand():
    # two fakes above 3 and 2 of three reals: components 1 and 2/3; per real 1/2 (tie with none), 1, 1
    y, s = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.2, 0.5, 0.9, 0.3])
    flat = np.zeros(5)  # constant second detector: AUROC 1/2 with no variance
    test = delong(y, s, flat)
    variance = np.var([1, 2 / 3], ddof=1) / 2 + np.var([1, 1, 1 / 2], ddof=1) / 3
    assert test["auroc_a"] == pytest.approx(5 / 6) and test["auroc_b"] == 0.5
    assert test["z"] == pytest.approx((5 / 6 - 1 / 2) / np.sqrt(variance))


def test_delong_false_alarms_by_simulation():
    rng = np.random.default_rng(4)
    y = np.r_[np.zeros(100, int), np.ones(100, int)]
    alarms = 0
    for _ in range(400):
        common = y + rng.normal(size=200)
        alarms += delong(y, common + rng.normal(size=200), common + rng.normal(size=200))["p_value"] < 0.05
    assert 0.01 <= alarms / 400 <= 0.09


def test_effect_size_by_hand_and_sign():
    row = effect_size(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0]))
    assert row["d"] == pytest.approx(1.0)  # means 2 and 1, both variances 1
    assert row["auroc"] == pytest.approx((6 + 2 * 0.5) / 9)  # 6 pairs won, 2 ties, 1 lost
    other = effect_size(np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert other["d"] == -row["d"] and other["auroc"] == pytest.approx(1 - row["auroc"])
    apart = effect_size(np.arange(10.0) + 100, np.arange(10.0))
    assert apart["auroc"] == apart["auroc_high"] == 1.0 and apart["auroc_low"] == pytest.approx(1 - 0.2995732)


def test_effect_size_intervals_cover():
    rng = np.random.default_rng(6)
    hits = np.zeros(2)
    for _ in range(300):
        row = effect_size(rng.normal(0.5, 1, 60), rng.normal(0, 1, 40))
        hits += [row["d_low"] <= 0.5 <= row["d_high"], row["auroc_low"] <= 0.6381632 <= row["auroc_high"]]
    assert (hits / 300 >= 0.90).all() and (hits / 300 <= 0.99).all()


def test_frechet_distance_by_hand():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 5))
    assert frechet_distance(a, a, n_boot=0)["value"] == pytest.approx(0, abs=1e-8)
    moved = frechet_distance(a, a + [3, 0, 4, 0, 0], n_boot=0)
    assert moved["value"] == pytest.approx(25)  # equal covariance: the squared distance of the means
    line = frechet_distance(np.array([[-1.0], [1.0]]), np.array([[-3.0], [3.0]]), n_boot=0)
    assert line["value"] == pytest.approx(8.0)  # standard deviations sqrt 2 and 3 sqrt 2
    wide = frechet_distance(a, 2 * rng.normal(size=(500, 5)), n_boot=40)
    assert wide["low"] <= 5.0 <= wide["high"]  # (2 - 1)^2 per dimension
    assert (wide["n_a"], wide["n_b"]) == (500, 500)


def test_degenerate_inputs_are_clear_errors():
    with pytest.raises(InputError, match="only fake images among 3; these metrics need both"):
        auroc([1, 1, 1], [0.1, 0.2, 0.3])
    with pytest.raises(InputError, match=r"1 of 2 scores are not finite, the first is row 1"):
        auroc([0, 1], [0.1, np.nan])
    with pytest.raises(InputError, match=r"labels are \[0, 2\]; expected 0"):
        auroc([0, 2], [0.1, 0.2])
    with pytest.raises(InputError, match=r"labels have shape \(3,\), scores \(2,\)"):
        auroc([0, 1, 1], [0.1, 0.2])
    with pytest.raises(InputError, match="probabilities run from 0.1 to 1.5; expected 0 to 1"):
        brier([0, 1], [0.1, 1.5])
    with pytest.raises(InputError, match="unknown metric 'f1'; expected one of ap, auroc"):
        bootstrap([0, 1], [0.1, 0.2], metrics=["f1"])
    with pytest.raises(InputError, match="accuracy needs a threshold, chosen on validation images"):
        bootstrap([0, 1], [0.1, 0.2], metrics=["accuracy"])
    with pytest.raises(InputError, match="1 real and 3 fake values; an effect size needs at least 2"):
        effect_size([1.0], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match=r"embeddings have shapes \(4, 3\) and \(4, 2\)"):
        frechet_distance(np.zeros((4, 3)), np.zeros((4, 2)))
