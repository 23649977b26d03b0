"""The MLP head: a scikit-learn classifier on torch, with its features on the device from start to end.

What makes it quick is what is left out: no DataLoader, no copies per batch. The standardised features go to
the device once, an epoch is one random permutation, a batch is one index. Several members (seeds) can be
trained at once as one batched network. Nothing here touches torch's global random state or thread settings.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from itemkit._files import atomic_write, write_json
from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import InputError, ModelNotFound
from itemkit.head.inputs import check_slots, hold_out, moments, place
from itemkit.head.network import ARCHITECTURES, Architecture, EarlyStopping, Net
from itemkit.metrics import average_precision

LARGE = 5e7  # numbers in the training set from which precision="auto" considers bfloat16
PREDICT_ROWS = 65536


class MisalignmentMLP(ClassifierMixin, BaseEstimator):
    """Multi-layer perceptron from a misalignment vector to real or fake.

    A binary scikit-learn classifier: works in ``Pipeline``, ``cross_val_score``, ``GridSearchCV`` and
    ``CalibratedClassifierCV``. Standardises its input, weights the classes, stops early and keeps the best
    weights.

    Parameters
    ----------
    architecture : str
        Name in `ARCHITECTURES`: "itemkit", "linear", "defake", "robust_clip".
    hidden_sizes, dropout, learning_rate, weight_decay : optional
        Replace that one number of the architecture.
    batch_size : int
        Rows per step.
    max_epochs, patience, tol : int, int, float
        Epochs at most, and epochs in which the validation loss falls by less than ``tol`` in all, after
        which a member stops. The weights of its lowest loss are kept, however small the step to it was.
    validation_fraction : float
        Share of the training rows held out, class by class, when ``fit`` is given no validation set. With 0
        there is no early stopping and the last weights are kept.
    class_weight : {"balanced"}, dict or None
        As in scikit-learn. "balanced": both classes count the same whatever their numbers.
    standardise : bool
        Subtract the mean and divide by the standard deviation of each column of the training rows.
    pooling : {"attention", "deep_set"}, optional
        Learned pooling of the objects of each image, trained with the rest; see `itemkit.head.sets`.
    slots : (int, int), optional
        Places for objects and the width of one, where ``pooling`` is set: the first places * width columns
        are objects, the next ``places`` say by ones and zeros which of them are there. A
        `RepresentationConfig` knows both: ``head.set_params(**config.head_options(dim))``.
    members : int
        Networks trained at once from different starts; their mean logit is the score.
    seed : int
        Of start weights, batches, dropout and the held-out split. On one CPU and one thread count, the same
        seed gives the same weights, bit for bit.
    device : str
        "auto" (CUDA where there is one), "cpu", "cuda", ...
    precision : str
        Of the arithmetic in training; the weights are float32. "auto" is float32, and bfloat16 only for large
        training sets on hardware that is quick at it. ``precision_`` says what was used.

    Attributes
    ----------
    history_ : dict of lists
        ``epoch, train_loss, val_loss, val_ap, seconds`` (mean over members; AP of their mean logit).
    best_epoch_ : list of int
        Epoch whose weights each member kept.
    classes_, n_features_in_
        As in scikit-learn; ``classes_[1]`` is the positive class.

    Examples
    --------
    >>> head = MisalignmentMLP(seed=1).fit(x_train, y_train, x_val, y_val)   # doctest: +SKIP
    >>> p_fake = head.predict_proba(x_test)[:, 1]                            # doctest: +SKIP
    """

    def __init__(
        self,
        architecture: str = "itemkit",
        hidden_sizes: tuple[int, ...] | None = None,
        dropout: float | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        batch_size: int = 256,
        max_epochs: int = 60,
        patience: int = 8,
        tol: float = 1e-3,
        validation_fraction: float = 0.15,
        class_weight: str | dict | None = "balanced",
        standardise: bool = True,
        pooling: str | None = None,
        slots: tuple[int, int] | None = None,
        members: int = 1,
        seed: int = 0,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.architecture = architecture
        self.hidden_sizes = hidden_sizes
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.tol = tol
        self.validation_fraction = validation_fraction
        self.class_weight = class_weight
        self.standardise = standardise
        self.pooling = pooling
        self.slots = slots
        self.members = members
        self.seed = seed
        self.device = device
        self.precision = precision

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that this classifier knows two classes only."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def resolved_architecture(self) -> Architecture:
        """The named architecture with the replaced numbers."""
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"architecture={self.architecture!r}: expected one of {', '.join(ARCHITECTURES)}, "
                "with hidden_sizes=... for other widths"
            )
        changes: dict[str, Any] = {
            "dropout": self.dropout,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "hidden": None if self.hidden_sizes is None else tuple(int(w) for w in self.hidden_sizes),
        }
        return replace(
            ARCHITECTURES[self.architecture], **{k: v for k, v in changes.items() if v is not None}
        )

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        X_val: np.ndarray | None = None,
        y_val: np.ndarray | None = None,
        sample_weight: np.ndarray | None = None,
    ) -> MisalignmentMLP:
        """Train.

        Parameters
        ----------
        X, y : arrays, shape (n, k) and (n,)
            Features and labels of two classes.
        X_val, y_val : arrays, optional
            Images to stop the training on; without them ``validation_fraction`` of the rows is held out.
        sample_weight : array, shape (n,), optional
            Weight of each row, multiplied with the class weight.

        Returns
        -------
        MisalignmentMLP
            Itself.
        """
        X, y = validate_data(self, X, y, dtype=np.float32)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
        check_slots(self.pooling, self.slots, X)
        codes = self._encode(y)
        arch = self.resolved_architecture()
        if X_val is not None:
            X_val = validate_data(self, X_val, dtype=np.float32, reset=False)
            codes_val = self._codes(np.asarray(y_val))
            if len(codes_val) != len(X_val):
                raise InputError(f"X_val has {len(X_val)} rows, y_val {len(codes_val)}; expected as many")
        elif self.validation_fraction:
            held = hold_out(codes, self.validation_fraction, int(self.seed), self.classes_)
            X_val, codes_val = X[held], codes[held]
            X, codes, weight = X[~held], codes[~held], weight[~held]
        weight = weight * self._class_weights(codes)
        if not weight.sum() > 0:
            raise InputError("all sample weights are zero")
        weight /= weight.mean()

        device = choose_device(self.device)
        precision = self.precision
        if precision == "auto" and X.size < LARGE:
            precision = "float32"
        dtype = choose_precision(precision, device)
        self.device_, self.precision_ = str(device), dtype_name(dtype)
        self.mean_, self.scale_ = np.zeros(X.shape[1], np.float32), np.ones(X.shape[1], np.float32)
        if self.standardise:
            self.mean_, self.scale_ = moments(X, self.slots)
        self.net_ = self._make_net(X.shape[1], device)
        stats = self.mean_, self.scale_
        data = place(X, *stats, device, dtype), torch.as_tensor(codes, dtype=torch.float32, device=device)
        val = None if X_val is None else (place(X_val, *stats, device, torch.float32), codes_val)
        self._train(arch, *data, torch.as_tensor(weight, dtype=torch.float32, device=device), val)
        return self

    def _make_net(self, n_in: int, device: torch.device) -> Net:
        arch = self.resolved_architecture()
        return Net(n_in, arch, int(self.members), int(self.seed), self.pooling, self.slots).to(device)

    def _encode(self, y: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        if type_of_target(y, input_name="y") != "binary":
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {type_of_target(y)}: "
                f"got {len(np.unique(y))} classes, expected real and fake."
            )
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise InputError(
                f"all {len(y)} labels are of one class ({self.classes_[0]!r}); expected real and fake"
            )
        return self._codes(y)

    def _codes(self, y: np.ndarray) -> np.ndarray:
        if unknown := sorted(set(np.unique(y)) - set(self.classes_)):
            raise InputError(
                f"validation label {unknown[0]!r} is not among the classes {list(self.classes_)}"
            )
        return (y == self.classes_[1]).astype(np.int64)

    def _class_weights(self, codes: np.ndarray) -> np.ndarray:
        if self.class_weight is None or len(np.unique(codes)) < 2:
            return np.ones(len(codes))
        labels = self.classes_[codes]
        return compute_class_weight(self.class_weight, classes=self.classes_, y=labels)[codes]

    def _train(
        self, arch: Architecture, x: Tensor, y: Tensor, weight: Tensor, val: tuple[Tensor, np.ndarray] | None
    ) -> None:
        net, device, members = self.net_, x.device, int(self.members)
        order_rng = torch.Generator(device).manual_seed(int(self.seed))
        noise = torch.Generator(device).manual_seed(int(self.seed) + 1)
        # members do not share weights and AdamW works element by element, so one optimiser trains them apart
        optimiser = torch.optim.AdamW(
            net.parameters(),
            lr=arch.learning_rate,
            weight_decay=arch.weight_decay,
            fused=device.type != "mps",
        )
        self.history_: dict[str, list[float]] = {
            name: [] for name in ("epoch", "train_loss", "val_loss", "val_ap", "seconds")
        }
        stopping = EarlyStopping(net, self.patience, self.tol)
        if val is not None:
            y_val = torch.as_tensor(val[1], dtype=torch.float32, device=device)
            w_val = torch.as_tensor(self._class_weights(val[1]), dtype=torch.float32, device=device)
        start = time.perf_counter()
        for epoch in range(1, self.max_epochs + 1):
            total = torch.zeros((), device=device)
            for rows in torch.randperm(len(x), generator=order_rng, device=device).split(self.batch_size):
                # index_select: x[rows] takes seven times as long in bfloat16
                loss = self._loss(net(x.index_select(0, rows), noise), y[rows], weight[rows]).sum()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                total += loss.detach() * len(rows)
            record = {"epoch": epoch, "train_loss": float(total) / len(x) / members}
            if val is not None:
                with torch.no_grad():
                    logits = net(val[0])
                losses = self._loss(logits, y_val, w_val).cpu()
                stopping.update(epoch, losses)
                record["val_loss"] = float(losses.mean())
                both = 0 < val[1].sum() < len(val[1])
                score = logits.mean(0).cpu().numpy()
                # NaN scores (a diverged training) surface below with their own message
                finite = bool(np.isfinite(score).all())
                record["val_ap"] = average_precision(val[1], score) if both and finite else float("nan")
            record["seconds"] = time.perf_counter() - start
            for name, values in self.history_.items():
                values.append(record.get(name, float("nan")))
            if not np.isfinite(record["train_loss"]):
                raise InputError(
                    f"the training diverged in epoch {epoch} (loss {record['train_loss']}); "
                    f"try a learning_rate below {arch.learning_rate:g}"
                )
            if not stopping.alive.any():
                break
        if val is not None:
            stopping.restore()
        self.best_epoch_ = stopping.best_epoch.tolist() if val is not None else [self.max_epochs] * members

    @staticmethod
    def _loss(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Weighted binary cross-entropy of each member."""
        each = F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
        return (each * weight).mean(-1)

    def member_logits(self, X: np.ndarray) -> np.ndarray:
        """Logit of every member, shape (members, n): their spread shows what the seed alone does."""
        check_is_fitted(self, "net_")
        X = validate_data(self, X, dtype=np.float32, reset=False)
        device = next(self.net_.parameters()).device
        with torch.no_grad():
            parts = [
                self.net_(
                    place(X[i : i + PREDICT_ROWS], self.mean_, self.scale_, device, torch.float32)
                ).cpu()
                for i in range(0, len(X), PREDICT_ROWS)
            ]
        return torch.cat(parts, dim=1).numpy()

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of the positive class, mean over members, shape (n,)."""
        return self.member_logits(X).mean(0)

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probability of both classes, shape (n, 2), in the order of ``classes_``."""
        p = expit(self.decision_function(X).astype(np.float64))
        return np.stack([1 - p, p], axis=1)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """More probable class of each row."""
        positive = self.decision_function(X) > 0  # first: an unfitted head says so here
        return self.classes_[positive.astype(int)]

    def save(self, folder: str | Path) -> Path:
        """Write ``head.safetensors`` (weights) and ``head.json`` (everything else) into a folder."""
        check_is_fitted(self, "net_")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.net_.state_dict().items()}
        tensors |= {"input_mean": torch.from_numpy(self.mean_), "input_scale": torch.from_numpy(self.scale_)}
        data = save(tensors)
        atomic_write(folder / "head.safetensors", lambda file: file.write(data))
        write_json(
            folder / "head.json",
            {
                "format": "itemkit head 1",
                "params": self.get_params(),
                "classes": self.classes_.tolist(),
                "n_features": self.n_features_in_,
                "best_epoch": self.best_epoch_,
                "history": self.history_,
                "device": self.device_,
                "precision": self.precision_,
                "torch": str(torch.__version__),
            },
        )
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> MisalignmentMLP:
        """Read a head written by `save`, onto a device."""
        folder = Path(folder)
        for name in ("head.json", "head.safetensors"):
            if not (folder / name).is_file():
                raise ModelNotFound(
                    f"{folder} holds no head: {name} is missing. Train one with `itemkit train`"
                )
        meta = json.loads((folder / "head.json").read_text())
        if meta.get("format") != "itemkit head 1":
            raise ModelNotFound(
                f"{folder}/head.json has format {meta.get('format')!r}; expected 'itemkit head 1'"
            )
        params = meta["params"]
        for name in ("hidden_sizes", "slots"):  # JSON has made lists of them
            params[name] = tuple(params[name]) if params.get(name) is not None else None
        if isinstance(params["class_weight"], dict):  # JSON has turned the class labels into strings
            by_text = {str(c): c for c in meta["classes"]}
            params["class_weight"] = {by_text[k]: v for k, v in params["class_weight"].items()}
        head = cls(**params)
        tensors = load_file(folder / "head.safetensors")
        head.mean_, head.scale_ = tensors.pop("input_mean").numpy(), tensors.pop("input_scale").numpy()
        head.classes_, head.n_features_in_ = np.array(meta["classes"]), int(meta["n_features"])
        head.history_, head.best_epoch_ = meta["history"], meta["best_epoch"]
        head.device_, head.precision_ = str(choose_device(device)), meta["precision"]
        head.net_ = head._make_net(head.n_features_in_, choose_device(device))
        head.net_.load_state_dict(tensors)
        return head
