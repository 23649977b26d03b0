"""The head as a scikit-learn citizen, its determinism, and its way to disk and back."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score as auroc
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from itemkit.errors import InputError, ModelNotFound
from itemkit.head import MisalignmentMLP
from itemkit.network import ARCHITECTURES, FILES, TrainedHead, write_sealed

QUICK = {"max_epochs": 12, "patience": 4, "device": "cpu"}


def data(n=400, k=12, shift=1.0, seed=0):
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 3 == 0).astype(int)
    x = rng.normal(size=(n, k)) + shift * y[:, None] * np.linspace(-1, 1, k)
    return x.astype(np.float32), y


X, Y = data()
X_TEST, Y_TEST = data(seed=1)


def member_logits(head, x):
    """Logits of each member apart, from the network itself."""
    x = torch.as_tensor((x - head.mean_) / head.scale_, dtype=torch.float32)
    return head.net_(x).detach().numpy()


@parametrize_with_checks(
    [MisalignmentMLP(max_epochs=10, patience=10, hidden_sizes=(16,), learning_rate=1e-2, device="cpu")]
)
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    ("architecture", "members"), [*((name, 1) for name in ARCHITECTURES), ("itemkit", 3)]
)
def test_learns(architecture, members):
    head = MisalignmentMLP(architecture, members=members, max_epochs=8, device="cpu").fit(X, Y)
    assert auroc(Y_TEST, head.decision_function(X_TEST)) > 0.8
    p = head.predict_proba(X_TEST)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_array_equal(head.predict(X_TEST), (p[:, 1] > 0.5).astype(int))


def test_in_scikit_learns_tools():
    head = MisalignmentMLP(**QUICK)
    assert cross_val_score(make_pipeline(StandardScaler(), head), X, Y, cv=3).mean() > 0.7
    grid = GridSearchCV(head, {"hidden_sizes": [(), (16,)], "learning_rate": [1e-2]}, cv=2).fit(X, Y)
    assert grid.best_score_ > 0.7
    calibrated = CalibratedClassifierCV(head, cv=2).fit(X, Y)
    assert auroc(Y_TEST, calibrated.predict_proba(X_TEST)[:, 1]) > 0.8


def test_the_network_is_the_plain_perceptron():
    head = MisalignmentMLP(validation_fraction=0, **QUICK).fit(X, Y)
    weights = head.net_.weights, head.net_.biases
    (w1, b1), (w2, b2), (w3, b3) = (
        (w[0].detach().numpy(), b[0].detach().numpy()) for w, b in zip(*weights, strict=True)
    )
    x = (X_TEST - X.mean(0)) / X.std(0)
    hidden = np.maximum(x @ w1 + b1, 0)
    hidden = np.maximum(hidden @ w2 + b2, 0)
    np.testing.assert_allclose((hidden @ w3 + b3)[:, 0], head.decision_function(X_TEST), atol=1e-4)


def test_members_at_once_are_the_members_trained_alone():
    # one batch per epoch and no dropout: nothing random is left but the start weights
    same = {"batch_size": len(X), "dropout": 0.0, "validation_fraction": 0, "max_epochs": 20, "device": "cpu"}
    both = member_logits(MisalignmentMLP(members=2, seed=3, **same).fit(X, Y), X_TEST)
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
    head = MisalignmentMLP(max_epochs=60, patience=5, device="cpu", members=2)
    head.fit(noise, labels, x_val, y_val)
    losses = head.history_["val_loss"]
    assert len(losses) < 60 and 1 <= min(head.best_epoch_) <= max(head.best_epoch_) <= len(losses)
    logits = member_logits(head, x_val)
    kept = np.mean(np.logaddexp(0, logits) - y_val * logits, axis=1)
    assert kept.mean() <= min(losses) + 1e-6  # each member at its own best epoch, so not above the best mean
    assert set(head.history_) == {"epoch", "train_loss", "val_loss", "val_ap", "seconds"}


def test_both_classes_count_the_same():
    rng = np.random.default_rng(0)
    y = (np.arange(2000) % 10 == 0).astype(int)
    x = rng.normal(size=(2000, 2)) + y[:, None] * 0.8
    called = MisalignmentMLP("linear", max_epochs=30, device="cpu").fit(x, y).predict(x)
    assert abs(called[y == 1].mean() - (1 - called[y == 0]).mean()) < 0.1


def test_linear_head_agrees_with_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    whole = {"batch_size": len(X), "validation_fraction": 0, "max_epochs": 400, "learning_rate": 2e-2}
    head = MisalignmentMLP("linear", weight_decay=0.0, device="cpu", **whole)
    ours = head.fit(X, Y).decision_function(X_TEST)
    theirs = (
        LogisticRegression(C=1e6, class_weight="balanced", max_iter=500).fit(X, Y).decision_function(X_TEST)
    )
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9999


@pytest.mark.parametrize("architecture", ["itemkit", "robust_clip"])
def test_save_and_load(tmp_path, architecture):
    options = {"members": np.int64(2), "seed": np.int64(5), "max_epochs": 2, "device": "cpu"}
    head = MisalignmentMLP(architecture, **options).fit(X, Y)
    again = TrainedHead.load(head.trained().save(tmp_path / "head"), device="cpu")
    np.testing.assert_array_equal(again.decision_function(X_TEST), head.decision_function(X_TEST))
    assert again.about["params"] | {"device": "cpu"} == head.get_params()
    assert again.about["history"] == head.history_
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]
    MisalignmentMLP(**again.about["params"]).fit(X, Y)


def test_a_constant_column_and_a_large_mean_cost_nothing():
    x = np.concatenate([X, np.full((len(X), 1), 7.3, np.float32), X[:, :1] + 1e4], axis=1)
    head = MisalignmentMLP(**QUICK).fit(x, Y)
    assert head.scale_[12] == 1 and head.scale_[13] == pytest.approx(head.scale_[0], rel=1e-3)
    assert auroc(Y, head.decision_function(x)) > 0.8


def test_errors():
    with pytest.raises(ValueError, match="'architecture' parameter .* must be a str among .*'linea' instead"):
        MisalignmentMLP("linea").fit(X, Y)
    with pytest.raises(InputError, match=r"400 labels of 1 class\(es\), expected two"):
        MisalignmentMLP().fit(X, np.zeros(len(X)))
    with pytest.raises(InputError, match="1 fake validation image; at least 2 of each"):
        MisalignmentMLP().fit(X[:4], [0, 0, 0, 1])
    with pytest.raises(ValueError, match="expecting 12 features as input"):
        MisalignmentMLP(**QUICK).fit(X, Y).predict(X[:, :5])
    with pytest.raises(InputError, match="the training diverged in epoch"):
        MisalignmentMLP("linear", learning_rate=1e38, **QUICK).fit(X, Y)


@pytest.mark.parametrize(
    ("name", "value"),
    [("members", 0), ("members", 2**40), ("members", 1.5), ("max_epochs", 0), ("seed", -1),
     ("batch_size", 0), ("patience", 0), ("dropout", 1.0), ("dropout", -0.1), ("learning_rate", 0.0),
     ("learning_rate", float("nan")), ("weight_decay", -1.0), ("tol", "small"), ("validation_fraction", 1.5),
     ("hidden_sizes", (64, 0)), ("hidden_sizes", (2**40,)), ("hidden_sizes", 64),
     ("hidden_sizes", (8,) * 99)],
)  # fmt: skip
def test_numbers_that_no_head_can_have(name, value):
    with pytest.raises(ValueError, match=f"{name}.* (must be|expected)"):
        MisalignmentMLP(**{name: value}).fit(X, Y)


def test_neither_the_device_nor_nan_is_stored(tmp_path):
    head = MisalignmentMLP(validation_fraction=0, max_epochs=2, device="cpu").fit(X, Y)
    text = (head.trained().save(tmp_path) / "head.json").read_text()
    assert "device" not in json.loads(text)["params"] and "NaN" not in text
    again = TrainedHead.load(tmp_path)
    assert again.about["history"]["val_loss"] == [None, None]
    expected = head.decision_function(X_TEST)
    # nor does it matter where it was trained, or that an older file says so
    for device in ("cuda", "cuda:7"):
        head.set_params(device=device).trained().save(tmp_path)
        meta = json.loads((tmp_path / "head.json").read_text())
        assert "cuda" not in json.dumps(meta)
        meta["params"]["device"] = device
        contents = {k: v for k, v in meta.items() if k not in ("sha256", "files")}
        write_sealed(tmp_path, FILES, contents, load_file(tmp_path / "head.safetensors"))
        again = TrainedHead.load(tmp_path, device="cpu")
        np.testing.assert_array_equal(again.decision_function(X_TEST), expected)


def test_starts_and_batches_are_drawn_on_the_processor(monkeypatch):
    drawn = []
    for name in ("randperm", "rand"):
        real = getattr(torch, name)

        def draw(*size, generator, real=real):
            drawn.append(generator.device.type)
            assert torch.get_default_device().type == "cpu"
            return real(*size, generator=generator)

        monkeypatch.setattr(torch, name, draw)
    MisalignmentMLP(**QUICK | {"max_epochs": 3}).fit(X, Y)
    assert drawn == ["cpu"] * (3 + 3), "three layers and three epochs"


def edit(change):
    """Damage of head.json: a function that is given its contents."""

    def damage(folder):
        meta = json.loads((folder / "head.json").read_text())
        change(meta)
        (folder / "head.json").write_text(json.dumps(meta))

    return damage


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def flip_a_bit(folder):
    data = bytearray((folder / "head.safetensors").read_bytes())
    data[-3] ^= 1  # a number that is as finite as before
    write("head.safetensors", bytes(data))(folder)


def nan_weight(folder):
    tensors = load_file(folder / "head.safetensors")
    tensors["weights.0"][0, 0, 0] = float("nan")
    save_file(tensors, folder / "head.safetensors")


DAMAGES = {
    "json cut off": cut("head.json", 300),
    "json not utf-8": write("head.json", b'{"format": "\xff"}'),
    "json is a list": write("head.json", b"[1]"),
    "json nested": write("head.json", b'{"a":' * 100_000),
    "json is large": write("head.json", b" " * 2**25),
    "another format": edit(lambda m: m.update(format="itemkit head 1")),
    "huge members": edit(lambda m: m["params"].update(members=2**40)),
    "a million layers": edit(lambda m: m["params"].update(hidden_sizes=[1] * 10**6)),
    "no checksum": edit(lambda m: m.pop("sha256")),
    "weights cut to 10 bytes": cut("head.safetensors", 10),
    "a header that promises much": write("head.safetensors", (2**50).to_bytes(8, "little") + b"{}"),
    "one bit": flip_a_bit,
    "nan weight": nan_weight,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return (
        MisalignmentMLP(members=2, hidden_sizes=(8,), **QUICK)
        .fit(X, Y)
        .trained()
        .save(tmp_path_factory.mktemp("head"))
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(trained, damage, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    DAMAGES[damage](folder)
    with pytest.raises(ModelNotFound, match=r"copy is damaged \(.*\); train again$") as caught:
        TrainedHead.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_files_made_to_look_whole_are_checked_as_well(trained, tmp_path):
    # whoever can write the checksums can still not make it allocate, or answer with NaN
    networks = ({"hidden": [2**31] * 2}, {"hidden": 3}, {"depth": 3})
    changes = [{"params": {"members": 1000}}, {"params": {"members": 2**40}}, {}]
    changes += [{"network": network} for network in networks]
    for number, change in enumerate(changes):
        folder = shutil.copytree(trained, tmp_path / str(number))
        if not change:
            nan_weight(folder)
        meta = json.loads((folder / "head.json").read_text())
        for part, values in change.items():
            meta[part] |= values
        contents = {k: v for k, v in meta.items() if k not in ("sha256", "files")}
        write_sealed(folder, FILES, contents, load_file(folder / "head.safetensors"))
        with pytest.raises(ModelNotFound, match=r"is damaged \(.*\); train again$"):
            TrainedHead.load(folder)


def test_a_saved_head_does_not_change_with_the_numbers_of_its_architecture(tmp_path, monkeypatch):
    head = MisalignmentMLP("robust_clip", **QUICK).fit(X, Y)
    head.trained().save(tmp_path)
    other = replace(ARCHITECTURES["robust_clip"], activation="relu", batch_norm=False)
    monkeypatch.setitem(ARCHITECTURES, "robust_clip", other)
    again = TrainedHead.load(tmp_path, device="cpu")
    np.testing.assert_array_equal(again.decision_function(X_TEST), head.decision_function(X_TEST))


def test_a_folder_without_a_head(tmp_path):
    with pytest.raises(ModelNotFound, match="head.json is missing. Train one with `itemkit train`"):
        TrainedHead.load(tmp_path)
