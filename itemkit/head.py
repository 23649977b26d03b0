"""How the MLP head is trained: from a misalignment vector to the log-odds of fake.

The network is `itemkit.network.Net`, its loop `MisalignmentMLP._train`. Nothing here touches torch's global
random state or threads.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from itemkit.devices import choose_device
from itemkit.errors import InputError
from itemkit.metrics import average_precision
from itemkit.network import ARCHITECTURES, Architecture, Net, TrainedHead
from itemkit.splits import split_validation


def cross_entropy(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Loss of each member: weighted mean of ``-log p`` of the true class, with p = sigmoid(logit)."""
    target = y.float().expand_as(logits)
    return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).mean(-1)


def balance(y: Tensor) -> Tensor:
    """Weight of each row by which both classes count the same, whatever their numbers; 1 on average."""
    counts = y.bincount(minlength=2)
    return (len(y) / (counts > 0).sum() / counts)[y].float()


class EarlyStopping:
    """Best weights of each member so far, and which members still have patience; see `MisalignmentMLP`."""

    def __init__(self, net: Net, patience: int, tol: float) -> None:
        self.net, self.patience, self.tol = net, patience, tol
        self.best = self.anchor = torch.full((net.members,), math.inf)  # anchor: a step worth waiting for
        self.best_epoch = self.last_step = torch.zeros(net.members, dtype=torch.long)
        self.best_tensors = [t.clone() for t in net.tensors()]

    def update(self, epoch: int, losses: Tensor) -> bool:
        """Note the validation loss of each member after an epoch; False when all have lost patience."""
        alive = epoch - self.last_step <= self.patience  # the others learn on in vain
        better, step = alive & (losses < self.best), alive & (losses < self.anchor - self.tol)
        self.best, self.anchor = losses.where(better, self.best), losses.where(step, self.anchor)
        self.best_epoch = self.best_epoch.masked_fill(better, epoch)
        self.last_step = self.last_step.masked_fill(step, epoch)
        for best, now in zip(self.best_tensors, self.net.tensors(), strict=True):
            best[better] = now[better]
        return bool((epoch - self.last_step < self.patience).any())


# --------------------------------------------------------------------------------------------- the classifier


@dataclass(eq=False, repr=False)
class MisalignmentMLP(ClassifierMixin, BaseEstimator):
    """Multi-layer perceptron from a misalignment vector to real or fake: a binary scikit-learn classifier.

    Standardises its input, weights the classes, stops early. On one CPU and one thread count the same seed
    gives the same weights, bit for bit; another device has the same starts and batches. ``history_`` has
    lists of ``epoch, train_loss, val_loss, val_ap, seconds`` (mean over members; AP of their mean logit),
    ``best_epoch_`` the epoch whose weights each member has.
    """

    architecture: str = "itemkit"  # name in `ARCHITECTURES`; the next four replace that one number of it
    hidden_sizes: tuple[int, ...] | None = None
    dropout: float | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    batch_size: int = 256  # rows per step
    max_epochs: int = 60
    patience: int = 8  # a member stops after so many epochs in which its validation loss ...
    tol: float = 1e-3  # ... falls by less than this in all, and takes the weights of its lowest loss
    # held out of each class if `fit` is given no validation set; with 0 the last weights stay
    validation_fraction: float = 0.15
    members: int = 1  # networks trained at once from different starts; their mean logit is the score
    seed: int = 0  # of start weights, batches, dropout and the held-out split
    device: str = "auto"  # CUDA where there is one; not stored with the head

    _parameter_constraints: ClassVar[dict[str, list]] = {
        "architecture": [StrOptions(set(ARCHITECTURES))],
        "hidden_sizes": ["array-like", None],
        "dropout": [Interval(Real, 0, 1, closed="left"), None],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), None],
        "weight_decay": [Interval(Real, 0, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, 2**31, closed="both")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "members": [Interval(Integral, 1, 1000, closed="both")],
        "seed": [Interval(Integral, 0, 2**62, closed="both")],
    }

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that this classifier knows two classes only."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def resolved_architecture(self) -> Architecture:
        """The named architecture with the replaced numbers; every number of this head is checked here."""
        self._validate_params()
        given = {name: getattr(self, name) for name in ("dropout", "learning_rate", "weight_decay")}
        given["hidden"] = None if self.hidden_sizes is None else tuple(self.hidden_sizes)
        replaced = {name: value for name, value in given.items() if value is not None}
        return replace(ARCHITECTURES[self.architecture], **replaced)

    def fit(
        self, X: np.ndarray, y: np.ndarray, X_val: np.ndarray | None = None, y_val: np.ndarray | None = None
    ) -> MisalignmentMLP:
        """Train.

        Parameters
        ----------
        X, y : arrays, shape (n, k) and (n,)
            Features and labels of two classes.
        X_val, y_val : arrays, optional
            To stop the training on.

        Raises
        ------
        ValueError
            A number that no head can have, not two classes, too few rows to hold some out, or divergence.
        """
        arch = self.resolved_architecture()
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        labels = LabelEncoder().fit(y)
        self.classes_, codes = labels.classes_, labels.transform(y)
        if len(self.classes_) != 2:
            raise InputError(
                f"Only binary classification is supported. The type of the target is {type_of_target(y)}: "
                f"{len(y)} labels of {len(self.classes_)} class(es), expected two, real and fake"
            )
        codes_val = None
        if X_val is not None:
            X_val, y_val = validate_data(self, X_val, y_val, dtype=np.float32, reset=False)
            codes_val = labels.transform(y_val)  # refuses other labels
        elif self.validation_fraction:
            held, rest = split_validation(codes, self.validation_fraction, int(self.seed))
            X_val, codes_val, X, codes = X[held], codes[held], X[rest], codes[rest]

        mean, scale = X.mean(0, dtype=np.float64), X.std(0, dtype=np.float64)
        scale[scale <= 1e-6 * np.maximum(1e-6, np.abs(mean))] = 1  # a constant column stays zero
        self.mean_, self.scale_ = mean.astype(np.float32), scale.astype(np.float32)
        device = choose_device(self.device)
        self.net_ = Net(X.shape[1], arch, int(self.members)).start(int(self.seed)).to(device)
        val = None if X_val is None else (self._standardise(X_val), torch.as_tensor(codes_val, device=device))
        self._train(arch, self._standardise(X), torch.as_tensor(codes, device=device), val)
        return self

    def _standardise(self, X: np.ndarray) -> Tensor:
        """Features of mean 0 and deviation 1 in training, beside the network."""
        return torch.from_numpy((X - self.mean_) / self.scale_).to(self.net_.weights[0].device)

    def _train(self, arch: Architecture, x: Tensor, y: Tensor, val: tuple[Tensor, Tensor] | None) -> None:
        net, weight = self.net_, balance(y)
        order = torch.Generator().manual_seed(int(self.seed))  # on the CPU: the same batches everywhere
        noise = torch.Generator(x.device).manual_seed(int(self.seed) + 1)
        # members do not share weights and AdamW works element by element, so one optimiser trains them apart
        rates = {"lr": arch.learning_rate, "weight_decay": arch.weight_decay}
        optimiser = torch.optim.AdamW(net.parameters(), **rates, fused=True)
        stopping, history, start = EarlyStopping(net, self.patience, self.tol), [], time.perf_counter()
        for epoch in range(1, self.max_epochs + 1):
            total, patient, val_loss, val_ap = torch.zeros(()), True, None, None
            for rows in torch.randperm(len(x), generator=order).to(x.device).split(self.batch_size):
                loss = cross_entropy(net(x[rows], noise), y[rows], weight[rows]).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total = total + loss.detach() * len(rows)
            train_loss = float(total) / len(x) / net.members
            if not math.isfinite(train_loss):
                hint = f"try a learning_rate below {arch.learning_rate:g}"
                raise InputError(f"the training diverged in epoch {epoch} (loss {train_loss}); {hint}")
            if val is not None:
                with torch.no_grad():
                    logits = net(val[0])
                losses = cross_entropy(logits, val[1], balance(val[1])).cpu()
                patient, val_loss = stopping.update(epoch, losses), float(losses.mean())
                val_ap = average_precision(val[1].cpu().numpy(), logits.mean(0).cpu().numpy())
            history.append((epoch, train_loss, val_loss, val_ap, time.perf_counter() - start))
            if not patient:
                break
        if val is not None:
            for tensor, best in zip(net.tensors(), stopping.best_tensors, strict=True):
                tensor.copy_(best)
        self.best_epoch_ = [epoch] * net.members if val is None else stopping.best_epoch.tolist()
        names = ("epoch", "train_loss", "val_loss", "val_ap", "seconds")
        self.history_ = dict(zip(names, map(list, zip(*history, strict=True)), strict=True))

    def trained(self) -> TrainedHead:
        """What is kept of this head once it is trained, to be saved or to give scores."""
        check_is_fitted(self, "net_")
        params = self.get_params()
        del params["device"]  # where a head is used is for the user to say
        about = {"params": params, "classes": self.classes_, "best_epoch": self.best_epoch_}
        return TrainedHead(self.net_, self.mean_, self.scale_, about | {"history": self.history_})

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of the positive class, mean over members, shape (n,)."""
        head = self.trained()
        return head.decision_function(validate_data(self, X, dtype=np.float32, reset=False))

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Probability of both classes, shape (n, 2), in the order of ``classes_``."""
        p = expit(self.decision_function(X).astype(np.float64))
        return np.stack([1 - p, p], axis=1)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """More probable class of each row."""
        positive = self.decision_function(X) > 0  # first: an unfitted head says so here
        return self.classes_[positive.astype(int)]
