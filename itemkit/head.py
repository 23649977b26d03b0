"""The MLP head: a scikit-learn classifier on torch, with its features on the device from start to end.

What makes it quick is what is left out: no DataLoader, no copies per batch. The standardised features go to
the device once, an epoch is one random permutation, a batch is one index. Several members (seeds) can be
trained at once as one batched network. Nothing here touches torch's global random state or thread settings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from torch import Tensor, nn

from itemkit._files import atomic_write, write_json
from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import InputError, ModelNotFound
from itemkit.metrics import average_precision

SET_POOLINGS = ("attention", "deep_set")
HIDDEN = {"attention": 64, "deep_set": 128}  # our choice


def draw_linear(n_in: int, n_out: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Start weights (members, in, out) and biases (members, 1, out) by torch's own rule for linear layers."""
    bound = n_in**-0.5
    drawn = torch.stack([torch.rand(n_in + 1, n_out, generator=g) for g in generators]) * 2 * bound - bound
    return drawn[:, :n_in].contiguous(), drawn[:, n_in:].contiguous()


class SetPooling(nn.Module):
    """Pool the objects at the front of each row; the columns behind them pass unchanged.

    Parameters
    ----------
    how : {"attention", "deep_set"}
        "attention": mean of the objects weighted by softmax(w tanh(V x)), Ilse et al. 2018
        (arXiv 1802.04712). "deep_set": mean of relu(V x), Zaheer et al. 2017 (arXiv 1703.06114); a mean
        instead of their sum, so that the number of objects alone says nothing. A row without objects gets
        zeros.
    slots : places for objects, and the width of one
    generators : one per member, for the start weights
    """

    def __init__(self, how: str, slots: tuple[int, int], generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.how, self.slots, self.members = how, slots, len(generators)
        weight, bias = draw_linear(slots[1], HIDDEN[how], generators)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        if how == "attention":
            # no bias: it would move all scores of a row alike, and softmax would take it out again
            self.score = nn.Parameter(draw_linear(HIDDEN[how], 1, generators)[0])

    def width(self, n_in: int) -> int:
        """Columns that leave, for ``n_in`` that enter."""
        places, width = self.slots
        return n_in - places * (width + 1) + (width if self.how == "attention" else HIDDEN[self.how])

    def forward(self, x: Tensor) -> Tensor:
        """Turn rows (rows, in) into (members, rows, width)."""
        rows, (places, width) = len(x), self.slots
        objects = x[:, : places * width].reshape(1, rows * places, width).expand(self.members, -1, -1)
        mask = x[:, places * width : places * (width + 1)]
        hidden = torch.baddbmm(self.bias.to(x.dtype), objects, self.weight.to(x.dtype))
        if self.how == "attention":
            score = torch.bmm(torch.tanh(hidden), self.score.to(x.dtype)).view(-1, rows, places)
            weight = torch.softmax(score + 1e4 * (mask - 1), dim=-1) * mask  # a row without objects: zeros
            values = objects
        else:
            weight, values = mask.expand(self.members, -1, -1), F.relu(hidden)
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)
        pooled = (weight[..., None] * values.view(self.members, rows, places, -1)).sum(2)
        rest = x[:, places * (width + 1) :].expand(self.members, -1, -1)
        return torch.cat([pooled, rest], dim=-1)


BLOCK = 256  # rows that stay in the processor's cache between two steps; five times quicker than whole arrays


def check_slots(pooling: str | None, slots: tuple[int, int] | None, X: np.ndarray) -> None:
    """Refuse a layout that the columns do not have."""
    if (pooling is None) != (slots is None) or pooling not in (None, *SET_POOLINGS):
        raise InputError(
            f"pooling={pooling!r} with slots={slots!r}; expected None for both, or "
            f"{' or '.join(SET_POOLINGS)} with (places, width): RepresentationConfig(...).head_options(dim) "
            "gives both"
        )
    if slots is None:
        return
    places, width = slots
    mask = X[:, places * width : places * (width + 1)]
    if X.shape[1] < places * (width + 1) or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"slots={tuple(slots)} says that {places * width} columns of objects are followed by {places} of "
            f"zeros and ones; got {X.shape[1]} columns without them. represent() with a learned pooling "
            "makes such features"
        )


def moments(X: np.ndarray, slots: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; all places of a set share those of the objects there are.

    Returns
    -------
    tuple of float32 arrays
        A constant column has deviation 1: it stays zero instead of being divided by its rounding error.
    """
    mean, scale = _column_moments(torch.from_numpy(X))
    if slots is not None:
        places, width = slots
        there = X[:, places * width : places * (width + 1)].reshape(-1) > 0
        objects = X[:, : places * width].reshape(-1, width)[there]
        if len(objects):
            one = _column_moments(torch.from_numpy(objects))
            mean[: places * width], scale[: places * width] = (np.tile(v, places) for v in one)
        mean[places * width : places * (width + 1)] = 0
        scale[places * width : places * (width + 1)] = 1
    scale[scale <= 1e-6 * np.maximum(1e-6, np.abs(mean))] = 1
    return mean.astype(np.float32), scale.astype(np.float32)


def _column_moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    centre = x[:BLOCK].mean(0)  # near enough to the mean for a large mean to cost no digits
    total, square = torch.zeros((2, x.shape[1]), dtype=torch.float64)
    for block in x.split(BLOCK):
        off = block - centre
        total += off.sum(0)
        square += off.square_().sum(0)
    mean = total / len(x)
    return (mean + centre).numpy(), (square / len(x) - mean**2).clamp_min(0).sqrt().numpy()


def place(
    X: np.ndarray, mean: np.ndarray, scale: np.ndarray, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Standardised copy of the features on a device, written once in the number format of the training."""
    shift, factor = torch.from_numpy(mean).to(device), torch.from_numpy(1 / scale).to(device)
    out = torch.empty(X.shape, dtype=dtype, device=device)
    for into, block in zip(out.split(BLOCK), torch.from_numpy(X).split(BLOCK), strict=True):
        into.copy_((block.to(device) - shift).mul_(factor))
    return out


def hold_out(codes: np.ndarray, fraction: float, seed: int, names: np.ndarray) -> np.ndarray:
    """Mask of the rows held out for early stopping, class by class, at least one of each."""
    held = np.zeros(len(codes), bool)
    rng = np.random.default_rng(seed)
    for label in (0, 1):
        rows = np.flatnonzero(codes == label)
        if len(rows) < 2:
            raise InputError(
                f"class {names[label]!r} has {len(rows)} row; holding some out for early "
                f"stopping needs 2. Give X_val and y_val, or validation_fraction=0"
            )
        take = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held[rng.permutation(rows)[:take]] = True
    return held


@dataclass(frozen=True)
class Architecture:
    """Shape and training recipe of a head.

    Attributes
    ----------
    hidden : widths of the hidden layers
    activation : {"relu", "leaky_relu", "gelu"}
    dropout : share of hidden units silenced in training
    batch_norm : normalise each hidden layer over the batch
    learning_rate, weight_decay : of AdamW
    source : where the numbers come from
    """

    hidden: tuple[int, ...] = (256, 64)
    activation: str = "relu"
    dropout: float = 0.2
    batch_norm: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    source: str = "our choice; the paper says MLP and no more"


ARCHITECTURES = {
    "itemkit": Architecture(),
    "linear": Architecture(
        hidden=(), dropout=0.0, learning_rate=5e-3, source="logistic regression by the same code"
    ),
    "defake": Architecture(
        hidden=(1024, 512, 256), dropout=0.5, learning_rate=3e-4, weight_decay=0.0, source="DE-FAKE's code"
    ),
    "robust_clip": Architecture(
        hidden=(512, 256, 128),
        activation="leaky_relu",
        dropout=0.335,
        batch_norm=True,
        source="Robust-CLIP's code (arXiv 2404.12908): three times linear, batch norm, leaky ReLU, dropout; "
        "the widths are our choice",
    ),
}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
}


class Net(nn.Module):
    """As many MLPs as there are members, side by side: weights (members, in, out), inputs shared.

    Parameters
    ----------
    n_in : width of the input
    arch : shape of every member
    members : how many
    seed : of the start weights
    pooling, slots : of the objects at the front of each row, see `itemkit.head.SetPooling`
    """

    def __init__(
        self,
        n_in: int,
        arch: Architecture,
        members: int,
        seed: int,
        pooling: str | None = None,
        slots: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.arch, self.members = arch, members
        # one generator per member: a member's start does not depend on how many others there are
        generators = [torch.Generator().manual_seed(seed + 100_003 * i) for i in range(members)]
        self.pool = SetPooling(pooling, slots, generators) if pooling and slots else None
        widths = [self.pool.width(n_in) if self.pool else n_in, *arch.hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in zip(widths, widths[1:], strict=False):
            weight, bias = draw_linear(a, b, generators)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))
        for i, width in enumerate(arch.hidden if arch.batch_norm else ()):
            size = members * width
            self.register_parameter(f"norm{i}_weight", nn.Parameter(torch.ones(size)))
            self.register_parameter(f"norm{i}_bias", nn.Parameter(torch.zeros(size)))
            self.register_buffer(f"norm{i}_mean", torch.zeros(size))
            self.register_buffer(f"norm{i}_var", torch.ones(size))

    def forward(self, x: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Logits (members, rows) for x (rows, in); with ``noise``, in training mode."""
        x = self.pool(x) if self.pool else x[None].expand(self.members, -1, -1)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            if self.members == 1:
                x = torch.addmm(bias[0], x[0], weight[0])[None]
            else:
                x = torch.baddbmm(bias, x, weight)
            if i == last:
                break
            if self.arch.batch_norm:
                x = self._normalise(x, i, noise is not None)
            x = _ACTIVATIONS[self.arch.activation](x)
            if noise is not None and self.arch.dropout:
                keep = 1 - self.arch.dropout
                x = x * torch.empty_like(x).bernoulli_(keep, generator=noise).div_(keep)
        return x[..., 0].float()

    def _normalise(self, x: Tensor, i: int, training: bool) -> Tensor:
        members, rows, width = x.shape
        flat = x.transpose(0, 1).reshape(rows, members * width)
        part = {name: getattr(self, f"norm{i}_{name}") for name in ("weight", "bias", "mean", "var")}
        # a batch of one row has no spread to normalise by
        flat = F.batch_norm(
            flat, part["mean"], part["var"], part["weight"], part["bias"], training=training and rows > 1
        )
        return flat.reshape(rows, members, width).transpose(0, 1)

    def tensors(self) -> list[Tensor]:
        """Everything that is learned, running statistics included, with the members first."""
        return [t.detach().view(self.members, -1) for t in (*self.parameters(), *self.buffers())]


class EarlyStopping:
    """Best weights of each member so far, and which members still have patience.

    Parameters
    ----------
    net : the network being trained
    patience : epochs in which the loss may fall by less than ``tol`` in all
    tol : the fall worth waiting for
    """

    def __init__(self, net: Net, patience: int, tol: float) -> None:
        self.net, self.patience, self.tol = net, patience, tol
        self.best = torch.full((net.members,), float("inf"))
        self.anchor = self.best.clone()  # loss at the last step worth waiting for
        self.best_epoch, self.last_step = torch.zeros((2, net.members), dtype=torch.long)
        self.alive = torch.ones(net.members, dtype=torch.bool)
        self.kept = [t.clone() for t in net.tensors()]

    def update(self, epoch: int, losses: Tensor) -> None:
        """Note the validation loss of each member after an epoch; members without patience learn in vain."""
        better = self.alive & (losses < self.best)
        self.best[better], self.best_epoch[better] = losses[better], epoch
        for old, new in zip(self.kept, self.net.tensors(), strict=True):
            old[better.to(new.device)] = new[better.to(new.device)]
        step = self.alive & (losses < self.anchor - self.tol)
        self.anchor[step], self.last_step[step] = losses[step], epoch
        self.alive &= epoch - self.last_step < self.patience

    def restore(self) -> None:
        """Give the network the best weights of each member."""
        for tensor, kept in zip(self.net.tensors(), self.kept, strict=True):
            tensor.copy_(kept)


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
        Learned pooling of the objects of each image, trained with the rest; see `itemkit.head`.
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
