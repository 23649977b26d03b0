"""The MLP head: a small network from a misalignment vector to the log-odds of fake, and how it is trained.

`Net` is the network, `MisalignmentMLP._train` its loop: the standardised features go to the device once, an
epoch is one permutation, a batch is one index. Nothing here touches torch's global random state or threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from itemkit._files import atomic_write, write_json
from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import InputError, ModelNotFound
from itemkit.metrics import average_precision
from itemkit.splits import split_validation
from itemkit.text import did_you_mean, one_line

# ------------------------------------------------------------------------------------------------ the network


@dataclass(frozen=True)
class Architecture:
    """Shape and training recipe of a head.

    Attributes
    ----------
    hidden : widths of the hidden layers
    activation : {"relu", "leaky_relu"}
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


class Net(nn.Module):
    """Linear, activation, dropout, again; at the end one number: the log-odds of fake.

    Every weight has the members first, ``(members, in, out)``: networks of one shape side by side on the same
    inputs. For one member it is the plain perceptron.
    """

    def __init__(self, n_in: int, arch: Architecture, members: int = 1) -> None:
        super().__init__()
        self.arch, self.members = arch, members
        widths = [n_in, *arch.hidden, 1]
        sizes = list(zip(widths, widths[1:], strict=False))
        self.weights = nn.ParameterList([torch.empty(members, a, b) for a, b in sizes])
        self.biases = nn.ParameterList([torch.empty(members, 1, b) for _, b in sizes])
        wide = [members * width for width in arch.hidden] if arch.batch_norm else []
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for width in wide])

    def forward(self, x: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Logits (members, rows) for x (rows, in); ``noise`` draws the dropout and means training."""
        x = x[None].expand(self.members, -1, -1)
        for i in range(len(self.arch.hidden)):
            x = linear(x, self.weights[i], self.biases[i])
            if self.arch.batch_norm:
                x = batch_norm(x, self.norms[i], training=noise is not None)
            x = F.relu(x) if self.arch.activation == "relu" else F.leaky_relu(x)
            if noise is not None:
                x = dropout(x, self.arch.dropout, noise)
        return linear(x, self.weights[-1], self.biases[-1])[..., 0].float()

    def start(self, seed: int) -> Net:
        """Draw start weights by torch's own rule for linear layers."""
        # one generator per member, on the CPU: a start depends neither on the others nor on the device
        generators = [torch.Generator().manual_seed(seed + 100_003 * i) for i in range(self.members)]
        with torch.no_grad():
            for weight, bias in zip(self.weights, self.biases, strict=True):
                _, a, b = weight.shape
                drawn = torch.stack([torch.rand(a + 1, b, generator=g) for g in generators])
                drawn = drawn * 2 * a**-0.5 - a**-0.5
                weight.copy_(drawn[:, :a])
                bias.copy_(drawn[:, a:])
        return self

    def tensors(self) -> list[Tensor]:
        """Everything that is learned, running statistics included, with the members first."""
        learned = (t for t in (*self.parameters(), *self.buffers()) if t.ndim)
        return [t.detach().view(self.members, -1) for t in learned]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight + bias`` for each member."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if len(weight) == 1:  # a product of matrices is quicker than a batch of one
        return torch.addmm(bias[0], x[0], weight[0])[None]
    return torch.baddbmm(bias, x, weight)


def dropout(x: Tensor, share: float, noise: torch.Generator) -> Tensor:
    """Silence a share of the units, and scale the others up so that the sum stays as large."""
    keep = 1 - share
    return x * torch.empty_like(x).bernoulli_(keep, generator=noise).div_(keep) if share else x


def batch_norm(x: Tensor, norm: nn.BatchNorm1d, training: bool) -> Tensor:
    """Normalise each unit of each member over the rows."""
    members, rows, width = x.shape
    flat = x.transpose(0, 1).reshape(rows, members * width)
    # a batch of one row has no spread to normalise by
    flat = F.batch_norm(
        flat, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=training and rows > 1
    )
    return flat.reshape(rows, members, width).transpose(0, 1)


class EarlyStopping:
    """Best weights of each member so far, and which members still have patience; see `MisalignmentMLP`."""

    def __init__(self, net: Net, patience: int, tol: float) -> None:
        self.net, self.patience, self.tol = net, patience, tol
        self.best = torch.full((net.members,), float("inf"))
        self.anchor = self.best.clone()  # loss at the last step worth waiting for
        self.best_epoch, self.last_step = torch.zeros((2, net.members), dtype=torch.long)
        self.alive = torch.ones(net.members, dtype=torch.bool)
        self.best_tensors = [t.clone() for t in net.tensors()]

    def update(self, epoch: int, losses: Tensor) -> None:
        """Note the validation loss of each member after an epoch; members without patience learn in vain."""
        better = self.alive & (losses < self.best)
        self.best[better], self.best_epoch[better] = losses[better], epoch
        for old, new in zip(self.best_tensors, self.net.tensors(), strict=True):
            old[better.to(new.device)] = new[better.to(new.device)]
        step = self.alive & (losses < self.anchor - self.tol)
        self.anchor[step], self.last_step[step] = losses[step], epoch
        self.alive &= epoch - self.last_step < self.patience

    def restore(self) -> None:
        """Give the network the best weights of each member."""
        for tensor, best in zip(self.net.tensors(), self.best_tensors, strict=True):
            tensor.copy_(best)


BLOCK = 256  # rows that stay in the processor's cache between two steps; five times quicker than whole arrays
LARGE = 5e7  # numbers in the training set from which precision="auto" considers bfloat16
PREDICT_ROWS = 65536


def moments(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, float32.

    A constant column has deviation 1: it stays zero instead of being divided by its rounding error.
    """
    x = torch.from_numpy(X)
    centre = x[:BLOCK].mean(0)  # near enough to the mean for a large mean to cost no digits
    total, square = torch.zeros((2, x.shape[1]), dtype=torch.float64)
    for block in x.split(BLOCK):
        off = block - centre
        total += off.sum(0)
        square += off.square_().sum(0)
    off = total / len(x)
    mean, scale = (off + centre).numpy(), (square / len(x) - off**2).clamp_min(0).sqrt().numpy()
    scale[scale <= 1e-6 * np.maximum(1e-6, np.abs(mean))] = 1
    return mean.astype(np.float32), scale.astype(np.float32)


# --------------------------------------------------------------------------------------------- the classifier

FORMAT = "itemkit head 2"
HISTORY = ("epoch", "train_loss", "val_loss", "val_ap", "seconds")
MAX_JSON = 2**24  # bytes
MAX_LAYERS = 16
# smallest and largest value of each number that a head is made with; whole where the smallest is written so
LIMITS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 2**31), "max_epochs": (1, 10**6), "patience": (1, 10**6), "members": (1, 1000),
    "seed": (0, 2**62), "dropout": (0.0, 0.99), "learning_rate": (1e-12, math.inf),
    "weight_decay": (0.0, math.inf), "tol": (0.0, math.inf), "validation_fraction": (0.0, 0.99),
}  # fmt: skip


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    kind: Any
    kind, what = (numbers.Integral, "whole number") if isinstance(low, int) else (numbers.Real, "number")
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{name}={value!r}: expected a {what} from {low:g} to {high:g}")


def cross_entropy(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Loss of each member: weighted mean of ``-log p`` of the true class, with p = sigmoid(logit)."""
    target = y.float().expand_as(logits)
    return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).mean(-1)


def balance(y: Tensor) -> Tensor:
    """Weight of each row by which both classes count the same, whatever their numbers; 1 on average."""
    counts = y.bincount(minlength=2)
    return (len(y) / (counts > 0).sum() / counts)[y].float()


@dataclass(eq=False, repr=False)
class MisalignmentMLP(ClassifierMixin, BaseEstimator):
    """Multi-layer perceptron from a misalignment vector to real or fake.

    A binary scikit-learn classifier: works in ``Pipeline``, ``cross_val_score``, ``GridSearchCV`` and
    ``CalibratedClassifierCV``. Standardises its input, weights the classes, stops early.

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
        which a member stops and goes back to the weights of its lowest loss.
    validation_fraction : float
        Share of the training rows held out, class by class, when ``fit`` is given no validation set. With 0
        there is no early stopping and the last weights stay.
    members : int
        Networks trained at once from different starts; their mean logit is the score.
    seed : int
        Of start weights, batches, dropout and the held-out split. On one CPU and one thread count, the same
        seed gives the same weights, bit for bit; another device has the same starts and batches.
    device : str
        "auto" (CUDA where there is one), "cpu", "cuda", ... Not stored with the head.
    precision : str
        Of the arithmetic in training; the weights are float32. "auto" is float32, and bfloat16 only for large
        training sets on hardware that is quick at it. ``precision_`` says what was used.

    Attributes
    ----------
    history_ : dict of lists
        ``epoch, train_loss, val_loss, val_ap, seconds`` (mean over members; AP of their mean logit).
    best_epoch_ : list of int
        Epoch whose weights each member has.
    classes_, n_features_in_
        As in scikit-learn; ``classes_[1]`` is the positive class.
    """

    architecture: str = "itemkit"
    hidden_sizes: tuple[int, ...] | None = None
    dropout: float | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    batch_size: int = 256
    max_epochs: int = 60
    patience: int = 8
    tol: float = 1e-3
    validation_fraction: float = 0.15
    members: int = 1
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that this classifier knows two classes only."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def resolved_architecture(self) -> Architecture:
        """The named architecture with the replaced numbers; every number of this head is checked here."""
        if self.architecture not in tuple(ARCHITECTURES):
            raise InputError(
                f"architecture={self.architecture!r}: expected one of {', '.join(ARCHITECTURES)}, "
                f"with hidden_sizes=... for other widths.{did_you_mean(self.architecture, ARCHITECTURES)}"
            )
        given = {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}
        for name, value in given.items():
            _check_number(name, value, *LIMITS[name])
        replaced = {k: v for k, v in given.items() if k in ("dropout", "learning_rate", "weight_decay")}
        if self.hidden_sizes is not None:
            if not isinstance(self.hidden_sizes, list | tuple) or len(self.hidden_sizes) > MAX_LAYERS:
                raise InputError(f"hidden_sizes: expected at most {MAX_LAYERS} widths, such as (256, 64)")
            for width in self.hidden_sizes:
                _check_number("hidden_sizes", width, 1, 65_536)
            replaced["hidden"] = tuple(self.hidden_sizes)
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
            Images to stop the training on; without them ``validation_fraction`` of the rows is held out.

        Raises
        ------
        InputError
            A number that no head can have, not two classes, too few rows to hold some out, or divergence.
        """
        arch = self.resolved_architecture()
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) != 2:
            raise InputError(
                f"Only binary classification is supported. The type of the target is {type_of_target(y)}: "
                f"{len(y)} labels of {len(self.classes_)} class(es), expected two, real and fake"
            )
        codes = (y == self.classes_[1]).astype(np.int64)
        if X_val is not None:
            X_val, y_val = validate_data(self, X_val, y_val, dtype=np.float32, reset=False)
            if not np.isin(y_val, self.classes_).all():
                raise InputError(f"y_val: expected labels out of {self.classes_.tolist()}")
            codes_val = (y_val == self.classes_[1]).astype(np.int64)
        elif self.validation_fraction:
            if min(counts := np.bincount(codes)) < 2:
                raise InputError(
                    f"class {self.classes_.tolist()[counts.argmin()]!r} has 1 row; holding some out for "
                    "early stopping needs 2. Give X_val and y_val, or validation_fraction=0"
                )
            held, rest = split_validation(codes, self.validation_fraction, int(self.seed))
            X_val, codes_val, X, codes = X[held], codes[held], X[rest], codes[rest]

        device = choose_device(self.device)
        small = self.precision == "auto" and X.size < LARGE
        dtype = choose_precision("float32" if small else self.precision, device)
        self.device_, self.precision_ = str(device), dtype_name(dtype)
        self.mean_, self.scale_ = moments(X)
        self.net_ = Net(X.shape[1], arch, int(self.members)).start(int(self.seed)).to(device)
        x, y = self._on_device(X, dtype), torch.as_tensor(codes, device=device)
        val = None
        if X_val is not None:
            val = self._on_device(X_val, torch.float32), torch.as_tensor(codes_val, device=device)
        self._train(arch, x, y, val)
        return self

    def _on_device(self, X: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Standardised copy of the features beside the network, written once in its number format."""
        device = next(self.net_.parameters()).device
        shift, factor = (torch.from_numpy(v).to(device) for v in (self.mean_, 1 / self.scale_))
        out = torch.empty(X.shape, dtype=dtype, device=device)
        for into, block in zip(out.split(BLOCK), torch.from_numpy(X).split(BLOCK), strict=True):
            into.copy_((block.to(device) - shift).mul_(factor))
        return out

    def _train(self, arch: Architecture, x: Tensor, y: Tensor, val: tuple[Tensor, Tensor] | None) -> None:
        net, device = self.net_, x.device
        weight = balance(y)
        order_rng = torch.Generator().manual_seed(int(self.seed))  # on the CPU: the same batches everywhere
        noise = torch.Generator(device).manual_seed(int(self.seed) + 1)
        # members do not share weights and AdamW works element by element, so one optimiser trains them apart
        rates = {"lr": arch.learning_rate, "weight_decay": arch.weight_decay}
        optimiser = torch.optim.AdamW(net.parameters(), **rates, fused=device.type != "mps")
        stopping = EarlyStopping(net, self.patience, self.tol)
        self.history_: dict[str, list[float]] = {name: [] for name in HISTORY}
        start = time.perf_counter()
        for epoch in range(1, self.max_epochs + 1):
            total = torch.zeros((), device=device)
            for rows in torch.randperm(len(x), generator=order_rng).to(device).split(self.batch_size):
                # index_select: x[rows] takes seven times as long in bfloat16
                logits = net(x.index_select(0, rows), noise)
                loss = cross_entropy(logits, y[rows], weight[rows]).sum()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                total += loss.detach() * len(rows)
            train_loss, val_loss, val_ap = float(total) / len(x) / net.members, math.nan, math.nan
            if val is not None:
                with torch.no_grad():
                    logits = net(val[0])
                losses = cross_entropy(logits, val[1], balance(val[1])).cpu()
                stopping.update(epoch, losses)
                val_loss, score = float(losses.mean()), logits.mean(0).cpu().numpy()
                # scores of a diverged training surface below with their own message
                if 0 < int(val[1].sum()) < len(score) and np.isfinite(score).all():
                    val_ap = average_precision(val[1].cpu().numpy(), score)
            record = (epoch, train_loss, val_loss, val_ap, time.perf_counter() - start)
            for name, value in zip(HISTORY, record, strict=True):
                self.history_[name].append(value)
            if not math.isfinite(train_loss):
                raise InputError(
                    f"the training diverged in epoch {epoch} (loss {train_loss}); "
                    f"try a learning_rate below {arch.learning_rate:g}"
                )
            if not stopping.alive.any():
                break
        self.best_epoch_ = [epoch] * net.members
        if val is not None:
            stopping.restore()
            self.best_epoch_ = stopping.best_epoch.tolist()

    def member_logits(self, X: np.ndarray) -> np.ndarray:
        """Logit of every member, shape (members, n): their spread shows what the seed alone does."""
        check_is_fitted(self, "net_")
        X = validate_data(self, X, dtype=np.float32, reset=False)
        pieces = np.split(X, range(PREDICT_ROWS, len(X), PREDICT_ROWS))
        with torch.no_grad():
            logits = [self.net_(self._on_device(piece, torch.float32)).cpu() for piece in pieces]
        return torch.cat(logits, dim=1).numpy()

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
        atomic_write(folder / "head.safetensors", data)
        # numbers of NumPy are no JSON; and where a head is used is for the user to say
        params = {k: getattr(v, "tolist", lambda v=v: v)() for k, v in self.get_params().items()}
        params["hidden_sizes"] = self.hidden_sizes and [int(width) for width in self.hidden_sizes]
        del params["device"]
        contents = {
            "params": params,
            # a name alone would be another network once its numbers change
            "network": asdict(self.net_.arch),
            "classes": self.classes_.tolist(),
            "n_features": self.n_features_in_,
            "best_epoch": self.best_epoch_,
            "history": {k: [None if math.isnan(v) else v for v in h] for k, h in self.history_.items()},
            "precision": self.precision_,
            "torch": str(torch.__version__),
        }
        write_description(folder, "head.json", FORMAT, contents, ("head.safetensors",))
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> MisalignmentMLP:
        """Read a head written by `save`, onto a device.

        Raises
        ------
        ModelNotFound
            There is none, or it is damaged; no size in its files is believed before it is checked.
        """
        folder, where = Path(folder), choose_device(device)
        meta = read_description(folder, "head.json", FORMAT, ("head.safetensors",))
        params = meta["params"]
        params["hidden_sizes"] = params["hidden_sizes"] and tuple(params["hidden_sizes"])
        head = cls(**params, device=device)
        try:
            head.resolved_architecture()  # refuses numbers that no head can have
            arch = Architecture(**meta["network"] | {"hidden": tuple(meta["network"]["hidden"])})
            tensors = load_file(folder / "head.safetensors")
            head.mean_, head.scale_ = tensors.pop("input_mean").numpy(), tensors.pop("input_scale").numpy()
            with torch.device("meta"):  # shapes without memory, to hold those of the file against
                head.net_ = Net(len(head.mean_), arch, head.members)
            # copies: where a number lies in memory changes the last bits of a product
            head.net_.load_state_dict({k: v.clone() for k, v in tensors.items()}, assign=True)
            if not all(torch.isfinite(t).all() for t in (*tensors.values(), torch.from_numpy(head.mean_))):
                raise InputError("head.safetensors holds a number that is not finite")
        except (InputError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
            raise damaged(folder, one_line(error)) from error
        head.net_.to(where)
        head.n_features_in_, head.classes_ = meta["n_features"], np.array(meta["classes"])
        head.history_ = {k: [math.nan if v is None else v for v in h] for k, h in meta["history"].items()}
        head.best_epoch_, head.device_, head.precision_ = meta["best_epoch"], str(where), meta["precision"]
        return head


# ------------------------------------------------------------------------------------ folders of detectors


def damaged(folder: Path, reason: str) -> ModelNotFound:
    """Error for a folder that was cut off or changed after it was written."""
    return ModelNotFound(str(folder), reason=f"is damaged ({reason}); train again")


def write_description(
    folder: Path, name: str, form: str, contents: dict[str, Any], files: Sequence[str]
) -> None:
    """Write a JSON file that knows its format, its own checksum and those of the files beside it."""
    meta = {"format": form} | contents | {"files": {file: _sha256(folder / file) for file in files}}
    write_json(folder / name, meta | {"sha256": _checksum(meta)})


def read_description(folder: Path, name: str, form: str, files: Sequence[str]) -> dict[str, Any]:
    """Read what `write_description` wrote, if neither it nor the files beside it have changed since.

    Raises
    ------
    ModelNotFound
        There is no such file, or something differs.
    """
    path = folder / name
    if not path.is_file():
        raise ModelNotFound(
            f"{folder} holds no detector: {name} is missing. Train one with `itemkit train`, or give the "
            "folder of one"
        )
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{name} is larger than any that itemkit writes")
        meta = json.loads(path.read_bytes())
        if not isinstance(meta, dict) or meta.get("format") != form:
            raise ValueError(f"{name} is not in the format {form!r}, which this version of itemkit reads")
        whole = meta.pop("sha256", None) == _checksum(meta)
        changed = [name] if not whole else [f for f in files if meta["files"][f] != _sha256(folder / f)]
        if changed:
            raise ValueError(f"{changed[0]} was changed after it was written")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(folder, one_line(error)) from error
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
