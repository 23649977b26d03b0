"""The head as a scikit-learn citizen, its determinism, and its way to disk and back."""

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from itemkit.errors import InputError, ModelNotFound
from itemkit.head import ARCHITECTURES, SET_POOLINGS, MisalignmentMLP, moments
from itemkit.metrics import auroc

QUICK = {"max_epochs": 12, "patience": 4, "device": "cpu"}


def data(n=400, k=12, shift=1.0, seed=0):
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 3 == 0).astype(int)
    x = rng.normal(size=(n, k)) + shift * y[:, None] * np.linspace(-1, 1, k)
    return x.astype(np.float32), y


X, Y = data()
X_TEST, Y_TEST = data(seed=1)


@parametrize_with_checks(
    [MisalignmentMLP(max_epochs=40, patience=10, device="cpu")],
    expected_failed_checks=lambda _: {
        "check_sample_weight_equivalence_on_dense_data": "a repeated row changes the batches and the "
        "held-out rows"
    },
)
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("members", [1, 3])
def test_learns(architecture, members):
    head = MisalignmentMLP(architecture, members=members, max_epochs=8, device="cpu").fit(X, Y)
    assert auroc(Y_TEST, head.decision_function(X_TEST)) > 0.8
    p = head.predict_proba(X_TEST)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_array_equal(head.predict(X_TEST), (p[:, 1] > 0.5).astype(int))
    assert head.member_logits(X_TEST).shape == (members, len(X_TEST))


def test_in_scikit_learns_tools():
    head = MisalignmentMLP(**QUICK)
    assert clone(head).get_params() == head.get_params()
    assert cross_val_score(head, X, Y, cv=3, scoring="average_precision").mean() > 0.6
    assert cross_val_score(make_pipeline(StandardScaler(), head), X, Y, cv=3).mean() > 0.7
    grid = GridSearchCV(head, {"hidden_sizes": [(), (16,)], "learning_rate": [1e-2]}, cv=2).fit(X, Y)
    assert grid.best_score_ > 0.7
    calibrated = CalibratedClassifierCV(head, cv=2).fit(X, Y)
    assert auroc(Y_TEST, calibrated.predict_proba(X_TEST)[:, 1]) > 0.8


def make_sets(n=600, places=4, width=6, seed=0):
    """Fakes have one odd object among ordinary ones; the last columns are noise beside the set."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    count = rng.integers(0, places + 1, n)
    mask = (np.arange(places) < count[:, None]).astype(np.float32)
    objects = rng.normal(3.0, 2.0, size=(n, places, width))
    odd = (np.arange(places) == (rng.integers(0, 99, n) % np.maximum(count, 1))[:, None]) & (y == 1)[:, None]
    objects[odd, 0] += 12
    objects *= mask[..., None]
    return np.concatenate([objects.reshape(n, -1), mask, rng.normal(size=(n, 2))], axis=1).astype(
        np.float32
    ), y


@pytest.mark.parametrize("pooling", SET_POOLINGS)
@pytest.mark.parametrize("members", [1, 3])
def test_learned_pooling(pooling, members, tmp_path):
    x, y = make_sets()
    x_test, y_test = make_sets(seed=1)
    options = {"pooling": pooling, "slots": (4, 6), "members": members, "device": "cpu", "max_epochs": 40,
               "batch_size": 64, "learning_rate": 5e-3}  # fmt: skip
    head = MisalignmentMLP(**options).fit(x, y)
    score = head.decision_function(x_test)
    there = x_test[:, 24:28].any(1)
    assert auroc(y_test[there], score[there]) > 0.9
    # a set has no order, and what stands in an empty place is not looked at
    sets, mask = x_test[:, :24].reshape(-1, 4, 6), x_test[:, 24:28]
    order = np.random.default_rng(2).permuted(np.tile(np.arange(4), (len(x_test), 1)), axis=1)
    rubbish = np.where(mask[..., None] > 0, sets, 1e3)
    moved = np.take_along_axis(rubbish, order[..., None], axis=1).reshape(len(x_test), -1)
    mixed = np.concatenate([moved, np.take_along_axis(mask, order, axis=1), x_test[:, 28:]], axis=1)
    np.testing.assert_allclose(head.decision_function(mixed), score, atol=2e-4)
    again = MisalignmentMLP.load(head.save(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.decision_function(x_test), score)
    assert again.get_params() == head.get_params()
    pipe = GridSearchCV(clone(head), {"hidden_sizes": [(), (16,)]}, cv=2).fit(x, y)
    assert pipe.best_score_ > 0.7
    assert (
        auroc(y_test, CalibratedClassifierCV(clone(head), cv=2).fit(x, y).predict_proba(x_test)[:, 1]) > 0.7
    )


def test_empty_sets_are_finite():
    x, y = make_sets(60)
    x[:, :28] = 0
    for pooling in SET_POOLINGS:
        head = MisalignmentMLP(pooling=pooling, slots=(4, 6), **QUICK).fit(x, y)
        assert np.isfinite(head.decision_function(x)).all()


def test_layout_of_sets_is_checked():
    x, y = make_sets(60)
    for options in ({"pooling": "attention"}, {"slots": (4, 6)}, {"pooling": "max", "slots": (4, 6)}):
        with pytest.raises(InputError, match="expected None for both, or attention or deep_set with"):
            MisalignmentMLP(**options).fit(x, y)
    for slots in ((4, 5), (4, 60)):
        with pytest.raises(InputError, match="got 30 columns without them. represent\\(\\) with a learned"):
            MisalignmentMLP(pooling="attention", slots=slots).fit(x, y)


def test_standardisation_is_numpys_and_sets_share_theirs():
    x, _ = make_sets(700)
    x[:, 28] += 1e4  # a large mean costs no digits
    x[:, 29] = 7.3
    mean, scale = moments(x, None)
    np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scale[:29], x[:, :29].std(0, dtype=np.float64), rtol=1e-4)
    assert scale[29] == 1
    mean, scale = moments(x, (4, 6))
    objects = x[:, :24].reshape(-1, 6)[x[:, 24:28].reshape(-1) > 0]
    np.testing.assert_allclose(mean[:24].reshape(4, 6), np.tile(objects.mean(0), (4, 1)), rtol=1e-5)
    np.testing.assert_allclose(scale[:24].reshape(4, 6), np.tile(objects.std(0), (4, 1)), rtol=1e-5)
    np.testing.assert_array_equal(mean[24:28], 0)
    np.testing.assert_array_equal(scale[24:28], 1)


def test_members_at_once_are_the_members_trained_alone():
    # one batch per epoch and no dropout: nothing random is left but the start weights
    same = {"batch_size": len(X), "dropout": 0.0, "validation_fraction": 0, "max_epochs": 20, "device": "cpu"}
    both = MisalignmentMLP(members=2, seed=3, **same).fit(X, Y).member_logits(X_TEST)
    for i in (0, 1):
        alone = MisalignmentMLP(seed=3 + 100_003 * i, **same).fit(X, Y).decision_function(X_TEST)
        np.testing.assert_allclose(both[i], alone, atol=1e-3)


def test_same_seed_same_bits_other_seed_other_bits():
    first, again, other = (
        MisalignmentMLP(seed=seed, **QUICK).fit(X, Y).decision_function(X_TEST) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_global_torch_state_is_left_alone():
    torch.manual_seed(11)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    head = MisalignmentMLP(**QUICK).fit(X, Y)
    head.predict(X_TEST)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    torch.manual_seed(12)
    np.testing.assert_array_equal(
        MisalignmentMLP(**QUICK).fit(X, Y).decision_function(X_TEST), head.decision_function(X_TEST)
    )


def test_prediction_does_not_depend_on_the_batch():
    head = MisalignmentMLP("robust_clip", **QUICK).fit(X, Y)
    whole = head.decision_function(X_TEST)
    single = np.concatenate([head.decision_function(row[None]) for row in X_TEST])
    np.testing.assert_allclose(single, whole, atol=1e-5)


def test_early_stopping_keeps_the_best_weights():
    rng = np.random.default_rng(0)
    noise, labels = rng.normal(size=(60, 30)), np.arange(60) % 2  # nothing to learn: overfits at once
    x_val, y_val = rng.normal(size=(200, 30)), np.arange(200) % 2
    head = MisalignmentMLP(max_epochs=60, patience=5, device="cpu", class_weight=None, members=2)
    head.fit(noise, labels, x_val, y_val)
    losses = head.history_["val_loss"]
    assert len(losses) < 60 and 1 <= min(head.best_epoch_) <= max(head.best_epoch_) <= len(losses)
    logits = head.member_logits(x_val)
    kept = np.mean(np.logaddexp(0, logits) - y_val * logits, axis=1)
    assert kept.mean() <= min(losses) + 1e-6  # each member at its own best epoch, so not above the best mean
    assert set(head.history_) == {"epoch", "train_loss", "val_loss", "val_ap", "seconds"}


def test_class_weights_balance_the_classes():
    rng = np.random.default_rng(0)
    y = (np.arange(2000) % 10 == 0).astype(int)
    x = rng.normal(size=(2000, 2)) + y[:, None] * 0.8
    called = {
        weight: MisalignmentMLP("linear", class_weight=weight, max_epochs=30, device="cpu")
        .fit(x, y)
        .predict(x)
        for weight in ("balanced", None)
    }
    assert abs(called["balanced"][y == 1].mean() - (1 - called["balanced"][y == 0]).mean()) < 0.1
    assert called[None][y == 1].mean() < 0.4


def test_linear_head_agrees_with_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    whole = {"batch_size": len(X), "validation_fraction": 0, "max_epochs": 800, "learning_rate": 1e-2}
    head = MisalignmentMLP("linear", weight_decay=0.0, device="cpu", **whole)
    ours = head.fit(X, Y).decision_function(X_TEST)
    theirs = (
        LogisticRegression(C=1e6, class_weight="balanced", max_iter=500).fit(X, Y).decision_function(X_TEST)
    )
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9999


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_save_and_load(tmp_path, architecture):
    options = {"members": 2, "class_weight": {0: 1.0, 1: 2.0}, "max_epochs": 2, "device": "cpu"}
    head = MisalignmentMLP(architecture, **options).fit(X, Y)
    again = MisalignmentMLP.load(head.save(tmp_path / "head"), device="cpu")
    np.testing.assert_array_equal(again.decision_function(X_TEST), head.decision_function(X_TEST))
    assert again.get_params() == head.get_params() and again.history_ == head.history_
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]
    clone(again).fit(X, Y)


def test_string_labels():
    names = np.array(["real", "fake"])[Y]  # alphabetical order: the positive class is "real"
    head = MisalignmentMLP(**QUICK).fit(X, names)
    assert list(head.classes_) == ["fake", "real"] and set(head.predict(X_TEST)) == {"fake", "real"}


def test_constant_column_and_bfloat16():
    x = np.concatenate([X, np.full((len(X), 1), 7.3, np.float32)], axis=1)
    head = MisalignmentMLP(precision="bfloat16", **QUICK).fit(x, Y)
    assert head.precision_ == "bfloat16" and np.isfinite(head.decision_function(x)).all()
    assert auroc(Y, head.decision_function(x)) > 0.8


def test_errors(tmp_path):
    with pytest.raises(InputError, match="architecture='big': expected one of itemkit, linear"):
        MisalignmentMLP("big").fit(X, Y)
    with pytest.raises(InputError, match="all 400 labels are of one class"):
        MisalignmentMLP().fit(X, np.zeros(len(X)))
    with pytest.raises(InputError, match="has 1 row; holding some out for early stopping needs 2"):
        MisalignmentMLP().fit(X[:4], [0, 0, 0, 1])
    with pytest.raises(ValueError, match="expecting 12 features as input"):
        MisalignmentMLP(**QUICK).fit(X, Y).predict(X[:, :5])
    with pytest.raises(InputError, match="the training diverged in epoch"):
        MisalignmentMLP("linear", learning_rate=1e38, **QUICK).fit(X, Y)
    with pytest.raises(ModelNotFound, match="head.json is missing. Train one with `itemkit train`"):
        MisalignmentMLP.load(tmp_path)
    folder = MisalignmentMLP(**QUICK).fit(X, Y).save(tmp_path)
    meta = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(meta | {"format": "other"}))
    with pytest.raises(ModelNotFound, match="format 'other'; expected 'itemkit head 1'"):
        MisalignmentMLP.load(folder)


@pytest.mark.gpu
def test_on_the_accelerator_as_on_the_processor():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    scores = [
        MisalignmentMLP(**QUICK | {"device": d}).fit(X, Y).decision_function(X_TEST) for d in ("cpu", "cuda")
    ]
    assert np.corrcoef(*scores)[0, 1] > 0.98
