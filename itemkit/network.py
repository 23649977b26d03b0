"""The network of the head, and how a trained one is kept: all that a verdict needs, and no scikit-learn.

`Net` is the network. `TrainedHead` gives scores and goes to disk and back; `itemkit.head` trains one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from itemkit._files import atomic_write, write_json
from itemkit.devices import choose_device
from itemkit.errors import InputError, ModelNotFound
from itemkit.text import one_line


@dataclass(frozen=True)
class Architecture:
    """Shape and training recipe of a head; no other can be made or read from a file."""

    hidden: tuple[int, ...] = (256, 64)  # widths of the hidden layers
    activation: str = "relu"  # or leaky_relu
    dropout: float = 0.2  # share of hidden units silenced in training
    batch_norm: bool = False  # normalise each hidden layer over the batch
    learning_rate: float = 1e-3  # of AdamW
    weight_decay: float = 1e-2
    source: str = "our choice; the paper says MLP and no more"  # of these numbers

    def __post_init__(self) -> None:
        widths = [isinstance(width, Integral) and 1 <= width <= 65_536 for width in self.hidden]
        if len(widths) > 16 or not all(widths):
            raise InputError("hidden_sizes: expected at most 16 widths from 1 to 65,536, such as (256, 64)")


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

    Every weight has the members first, ``(members, in, out)``: networks of one shape on the same inputs.
    """

    def __init__(self, n_in: int, arch: Architecture, members: int = 1) -> None:
        super().__init__()
        self.arch, self.members = arch, members
        widths = [n_in, *arch.hidden, 1]
        sizes = list(zip(widths, widths[1:], strict=False))
        self.weights = nn.ParameterList([torch.empty(members, a, b) for a, b in sizes])
        self.biases = nn.ParameterList([torch.empty(members, 1, b) for _, b in sizes])
        self.norms = nn.ModuleList([nn.BatchNorm1d(members * b) for b in arch.hidden if arch.batch_norm])

    def forward(self, x: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Logits (members, rows) for x (rows, in); ``noise`` draws the dropout and means training."""
        x = x.expand(self.members, -1, -1)
        for i in range(len(self.arch.hidden)):
            x = torch.baddbmm(self.biases[i], x, self.weights[i])
            if self.arch.batch_norm:
                norm = self.norms[i].train(noise is not None and x.shape[1] > 1)  # one row has no spread
                x = norm(x.transpose(0, 1).flatten(1)).unflatten(1, (self.members, -1)).transpose(0, 1)
            x = F.relu(x) if self.arch.activation == "relu" else F.leaky_relu(x)
            if noise is not None and self.arch.dropout:
                kept = 1 - self.arch.dropout  # the others grow, so that the sum stays as large
                x = x * torch.empty_like(x).bernoulli_(kept, generator=noise) / kept
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])[..., 0]

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
        return [t.view(self.members, -1) for t in self.state_dict().values() if t.ndim]


FORMAT = "itemkit head 2"
FILES = ("head.json", "head.safetensors")


@dataclass(eq=False)
class TrainedHead:
    """A head that was trained: inputs are standardised, members averaged; see `itemkit.head`."""

    net_: Net
    mean_: np.ndarray  # of the inputs it was trained on, (k,)
    scale_: np.ndarray  # their deviation, (k,)
    about: dict[str, Any]  # how it was trained: params of `MisalignmentMLP`, classes, best_epoch, history

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of the positive class for float32 (n, k), mean over members, shape (n,)."""
        x = torch.from_numpy((X - self.mean_) / self.scale_).to(self.net_.weights[0].device)
        with torch.no_grad():
            parts = [self.net_(part).cpu() for part in x.split(65_536)]
        logits = torch.cat(parts, dim=1).numpy().mean(0)
        if not np.isfinite(logits).all():
            raise InputError(f"{int((~np.isfinite(logits)).sum())} of {len(logits)} scores are not finite")
        return logits

    def save(self, folder: str | Path) -> Path:
        """Write ``head.safetensors`` (weights) and ``head.json`` (everything else) into a folder."""
        # not the network's name alone: it would be another once its numbers change
        contents = {"format": FORMAT, "network": asdict(self.net_.arch), **self.about}
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.net_.state_dict().items()}
        arrays |= {"input_mean": self.mean_, "input_scale": self.scale_}
        return write_sealed(Path(folder), FILES, contents, arrays)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> TrainedHead:
        """Read what `save` wrote; ModelNotFound if there is none, or it is damaged."""
        where, (meta, arrays) = choose_device(device), read_sealed(Path(folder), FILES, FORMAT)
        with intact(Path(folder)):
            arch = Architecture(**meta["network"] | {"hidden": tuple(meta["network"]["hidden"])})
            mean, scale = arrays.pop("input_mean"), arrays.pop("input_scale")
            with torch.device("meta"):  # shapes without memory, to hold those of the file against
                net = Net(len(mean), arch, meta["params"]["members"])
            net.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()}, assign=True)
            about = {name: meta[name] for name in ("params", "classes", "best_epoch", "history")}
            return cls(net.to(where), mean, scale, about)


# ------------------------------------------------------------------------------------ folders of detectors


@contextlib.contextmanager
def intact(folder: Path) -> Iterator[None]:
    """Whatever fails inside says that the folder was cut off or changed after it was written."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelNotFound(str(folder), reason=f"is damaged ({one_line(error)}); train again") from error


def write_sealed(
    folder: Path, files: tuple[str, str], contents: dict, arrays: dict, beside: Sequence[str] = ()
) -> Path:
    """Write a JSON file and one of arrays; the first knows the checksum of itself and of all other files."""
    name, arrays_name = files
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / arrays_name, save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))
    sums = {file: _sha256(folder / file) for file in (*beside, arrays_name)}
    meta = json.loads(json.dumps(contents | {"files": sums}, default=lambda x: x.tolist()))
    write_json(folder / name, meta | {"sha256": _checksum(meta)})
    return folder


def read_sealed(
    folder: Path, files: tuple[str, str], form: str, beside: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `write_sealed` wrote, if neither it nor the files beside it have changed since."""
    name, arrays_name = files
    path = folder / name
    if not path.is_file():
        raise ModelNotFound(f"{folder} holds no detector: {name} is missing. Train one with `itemkit train`, "
                            "or give the folder of one")  # fmt: skip
    with intact(folder):
        if path.stat().st_size > 2**24:
            raise ValueError(f"{name} is larger than any that itemkit writes")
        meta = json.loads(path.read_bytes())
        if not isinstance(meta, dict) or meta.get("format") != form:
            raise ValueError(f"{name} is not in the format {form!r}, which this version of itemkit reads")
        if meta.pop("sha256", None) != _checksum(meta):
            raise ValueError(f"{name} was changed after it was written")
        for file in (*beside, arrays_name):
            if meta["files"][file] != _sha256(folder / file):
                raise ValueError(f"{file} was changed after it was written")
        arrays = load_file(folder / arrays_name)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(f"{arrays_name} holds a number that is not finite")
    return meta, arrays


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
