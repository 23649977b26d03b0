"""Calibration, thresholds and conformal verdicts keep what they promise."""

import numpy as np
import pytest

from itemkit.calibrate import (
    Calibrator,
    best_threshold,
    check_promises,
    conformal_p,
    fit_calibrator,
    lacking,
    logit_shift,
    promise_sentences,
    proportion_interval,
    three_way,
    threshold_at_fpr,
)
from itemkit.errors import InputError
from itemkit.metrics import bootstrap


def overconfident(n, seed, factor=4.0):
    """Scores whose true log-odds are the score divided by ``factor``."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    return y, factor * (
        rng.normal(size=n) * np.sqrt(2) + (2 * y - 1)
    )  # log-odds of N(+-1, 2) are the value itself


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_calibration_repairs_overconfidence(method):
    y, s = overconfident(4000, 0)
    calibrator = fit_calibrator(y, s, method)
    y, s = overconfident(4000, 1)
    before, after = (
        bootstrap(y, s, probability=c(s), metrics=["ece"], n_boot=1)["value"][0]
        for c in (Calibrator(), calibrator)
    )
    assert before > 0.12 and after < 0.04
    p = calibrator(np.sort(s))
    assert (np.diff(p) >= 0).all() and p.min() > 0 and p.max() < 1


@pytest.mark.parametrize("numbers", [{"scale": np.nan}, {"offset": np.inf}, {"scale": -1.0}])
def test_a_calibration_that_is_no_number_is_refused(numbers):
    with pytest.raises(InputError, match="not finite, or turns scores upside down"):
        Calibrator(**numbers)


def test_temperature_and_platt_find_the_known_numbers():
    y, s = overconfident(20000, 2)
    assert 1 / fit_calibrator(y, s).scale == pytest.approx(4, rel=0.05)
    shifted = fit_calibrator(y, s + 6, "platt")
    assert shifted.scale == pytest.approx(1 / 4, rel=0.05) and shifted.offset == pytest.approx(
        -6 / 4, abs=0.06
    )


def test_class_mix_does_not_move_the_probability():
    y, s = overconfident(20000, 3)
    rows = np.r_[np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:1000]]
    assert fit_calibrator(y[rows], s[rows]).scale == pytest.approx(fit_calibrator(y, s).scale, rel=0.1)


def test_separable_scores_stay_modest():
    y, s = np.r_[np.zeros(20, int), np.ones(20, int)], np.r_[np.full(20, -1.0), np.full(20, 1.0)]
    for method in ("temperature", "platt"):
        p = fit_calibrator(y, s, method)(s)
        assert p[-1] == pytest.approx(21 / 22, abs=1e-3) and p[0] == pytest.approx(1 / 22, abs=1e-3)


def test_threshold_rank_by_hand():
    scores = np.arange(1, 100)  # 99 reals
    threshold = threshold_at_fpr(scores, 0.01)
    assert (threshold.value, threshold.n_real) == (99, 99)
    assert threshold_at_fpr(scores, 0.05).value == 95  # floor(0.05 * 100) = 5th largest; 4 of 99 lie above it
    message = (
        "0.01 needs at least 99 real validation images to calibrate on, got 98; --fpr 0.011 asks for less"
    )
    with pytest.raises(InputError, match=message):
        threshold_at_fpr(scores[1:], 0.01)
    with pytest.raises(InputError, match="got 0$"):
        threshold_at_fpr([], 0.05)
    for n in (1, 2, 18, 19, 500):  # what is said to be possible is
        least = float(lacking(1e-6, n, 0).split("--fpr ")[1].split()[0])
        assert threshold_at_fpr(np.arange(n), least).value == n - 1
    assert threshold.statement.startswith(
        "Of real images like the 99 validation ones, on average at most 1.00%"
    )
    with pytest.raises(InputError, match="fpr=5: expected a rate"):
        threshold_at_fpr(scores, 5)


def test_threshold_keeps_its_promise_by_simulation():
    rng = np.random.default_rng(0)
    rates, inside = [], 0
    for _ in range(1000):
        threshold = threshold_at_fpr(rng.random(150), 0.05)
        rate = 1 - threshold.value  # uniform scores: the true rate is known exactly
        rates.append(rate)
        inside += threshold.low <= rate <= threshold.high
    assert 0.93 <= inside / 1000 <= 0.97
    assert 0.044 <= np.mean(rates) <= 0.0475  # 7 / 151 = 0.0464


def test_conformal_p_by_hand():
    reals = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(conformal_p(reals, [0.0, 0.3, 0.35, 0.9], 0), [1.0, 0.6, 0.4, 0.2])
    np.testing.assert_allclose(conformal_p(reals, [0.0, 0.3, 0.35, 0.9], 1), [0.2, 0.8, 0.8, 1.0])
    verdict = three_way(np.array([0.01, 0.5, 0.5, 0.01]), np.array([0.5, 0.01, 0.5, 0.01]), 0.05, 0.05)
    assert list(verdict) == ["fake", "real", "unsure", "unsure"]


def test_conformal_coverage_by_simulation():
    rng = np.random.default_rng(1)
    wrong = []
    for _ in range(500):
        real, fake = rng.normal(size=60), rng.normal(size=40) + 1
        new_real, new_fake = rng.normal(size=50), rng.normal(size=50) + 1
        for new, bad in ((new_real, "fake"), (new_fake, "real")):
            verdict = three_way(conformal_p(real, new, 0), conformal_p(fake, new, 1), 0.1, 0.1)
            wrong.append(np.mean(verdict == bad))
    assert np.mean(wrong[::2]) <= 0.105 and np.mean(wrong[1::2]) <= 0.105
    assert np.mean(wrong[::2]) >= 0.05  # not vacuous either


def test_conformal_fake_verdict_is_the_threshold():
    rng = np.random.default_rng(2)
    real, new = rng.normal(size=200), rng.normal(size=1000) + 1
    above = new > threshold_at_fpr(real, 0.05).value
    np.testing.assert_array_equal(conformal_p(real, new, 0) <= 0.05, above)


def balanced_accuracy(y, s, threshold):
    return ((s[y == 0] <= threshold).mean() + (s[y == 1] > threshold).mean()) / 2


def test_best_threshold_by_hand():
    assert best_threshold([0, 0, 1, 1], [0.0, 1.0, 3.0, 4.0]) == 2.0
    assert best_threshold([0, 0, 0, 1], [0.0, 1.0, 3.0, 2.0]) == 1.5
    # two equally good cuts that are no neighbours: between them lies a worse one
    y, s = np.array([0, 1, 0, 1]), np.array([1.0, 2.0, 3.0, 4.0])
    assert balanced_accuracy(y, s, best_threshold(y, s)) == 0.75
    one = np.nextafter(1.0, 2.0)  # no number lies between these
    assert best_threshold([0, 1], [1.0, one]) == 1.0


def test_best_threshold_is_optimal_on_random_draws():
    rng = np.random.default_rng(4)
    for draw in range(2000):
        n = int(rng.integers(2, 12))
        y = np.r_[0, 1, rng.integers(0, 2, n - 2)]
        s = rng.normal(size=n) * 10.0 ** rng.integers(-3, 17)
        s = np.round(s) if draw % 3 == 0 else s
        best = max(balanced_accuracy(y, s, t) for t in [-np.inf, *s])
        assert balanced_accuracy(y, s, best_threshold(y, s)) == pytest.approx(best, abs=1e-12)


def test_proportion_interval_by_hand():
    assert proportion_interval(0, 0) == (0.0, 1.0)
    assert proportion_interval(0, 59) == pytest.approx((0, 1 - 0.025 ** (1 / 59)))
    assert proportion_interval(3, 3) == pytest.approx((0.025 ** (1 / 3), 1))


def test_promises_by_hand():
    reals, fakes = np.arange(1, 100), np.arange(1, 100) + 1000
    table = check_promises(reals, fakes, np.r_[np.zeros(96), np.full(4, 98.5)], np.full(50, 1000.5))
    rows = table.set_index(["label", "requested"])
    one = rows.loc["real", 0.05]
    # the threshold is the 5th largest of 99 reals, 95: four of a hundred new ones lie above
    assert (one["realised"], one["n_new"], one["n_calibration"], one["kept"]) == (0.04, 100, 99, True)
    assert (one["low"], one["high"]) == pytest.approx(proportion_interval(4, 100))
    assert one["likely_low"] < 0.05 < one["likely_high"] < 0.15
    assert rows.loc["real", 0.01]["realised"] == 0.0  # threshold 99
    # every new fake looks more real than all calibration fakes: p = 1 / 100
    lost = rows.loc["fake", 0.01]
    assert lost["realised"] == 1.0 and not lost["kept"] and lost["low"] > 0.9
    lines = promise_sentences(table)
    assert len(lines) == len(table) == 4
    assert lines[1].startswith("false positives at a requested 5%: 4.0% (1.1%-9.9%) of 100 new real images; ")
    assert "NOT KEPT: the new images are not like the calibration ones" in lines[-1]


def test_promises_that_cannot_be_made_say_so():
    table = check_promises(np.arange(50), np.arange(500), np.arange(10), np.zeros(0))
    table = table[table["requested"] == 0.01]
    assert table[["realised", "low", "likely_high"]].isna().all(axis=None)
    real, fake = promise_sentences(table)
    assert "not promised: a false-positive rate of 0.01 needs at least 99 real validation images" in real
    assert fake == "fakes ruled out at a requested 1%: no new images of this class"


def test_promises_are_judged_kept_as_often_as_they_say_by_simulation():
    rng = np.random.default_rng(3)
    kept, likely = [], []
    for _ in range(50):
        real, fake, new_real, new_fake = (rng.normal(size=n) for n in (99, 60, 200, 100))
        table = check_promises(real, fake + 1, new_real, new_fake + 1).iloc[[1, 3]]  # at 5 %
        kept.append(table["kept"].to_numpy())
        likely.append(table["realised"].between(table["likely_low"], table["likely_high"]).iloc[0])
    assert (np.mean(kept, axis=0) >= 0.9).all()  # 97.5 % asked for; 3 standard errors are 7 points
    assert np.mean(likely) >= 0.86
    shifted = check_promises(real, fake, rng.normal(size=400) + 1, fake)
    assert not shifted["kept"][1]


def test_a_shift_of_all_log_odds_is_found_again():
    y, known = overconfident(4000, 5, factor=1.0)
    other_y, other = overconfident(4000, 6, factor=1.0)
    moved = other - 3.0
    assert logit_shift(known, y, moved) == pytest.approx(3, abs=0.15)
    assert logit_shift(known, y, moved, other_y) == pytest.approx(3, abs=0.15)
    # other shares than half are told, not guessed
    few = np.r_[moved[other_y == 0], moved[other_y == 1][:500]]
    assert logit_shift(known, y, few, share_fake=500 / len(few)) == pytest.approx(3, abs=0.15)
    assert logit_shift(known, y, few) > 3.5


def test_a_few_labels_repair_a_threshold():
    y, known = overconfident(400, 7, factor=1.0)
    gained = []
    for draw in range(40):
        new_y, new = overconfident(400, 100 + draw, factor=1.0)
        new = new - 4.0
        few = np.r_[np.flatnonzero(new_y == 0)[:10], np.flatnonzero(new_y == 1)[:10]]
        shift = logit_shift(known, y, new[few], new_y[few])
        gained.append(balanced_accuracy(new_y, new + shift, 0.0) - balanced_accuracy(new_y, new, 0.0))
    assert np.mean(gained) > 0.15  # of the 0.76 that can be had, 0.5 is left without


def test_shift_errors():
    with pytest.raises(InputError, match="0 log-odds and share_fake=0.5; expected finite ones"):
        logit_shift([0.0, 1.0], [0, 1], [])
    with pytest.raises(InputError, match="share_fake=1"):
        logit_shift([0.0, 1.0], [0, 1], [0.5], share_fake=1)
    with pytest.raises(InputError, match="expected both 0"):
        logit_shift([0.0, 1.0], [0, 1], [0.5, 0.6], [1, 1])


@pytest.mark.parametrize("score", [0.0, 1e300, -1e-300])
def test_best_threshold_of_one_score_for_all(score):
    y = [0, 1, 0, 1]
    assert balanced_accuracy(np.array(y), np.full(4, score), best_threshold(y, [score] * 4)) == 0.5
