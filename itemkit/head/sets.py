"""Learned pooling inside the head: the objects of an image come as a padded set with its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
