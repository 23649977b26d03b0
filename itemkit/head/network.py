"""The network inside the head: named architectures, and several MLPs in one batched module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itemkit.head.sets import SetPooling, draw_linear


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
    pooling, slots : of the objects at the front of each row, see `itemkit.head.sets.SetPooling`
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
