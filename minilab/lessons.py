"""What all generators share in training: batches of pictures, or of their codes, with the facts they show."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from minilab.conditions import encode_facts
from minilab.renders import RenderSet, to_pixels

Loss = tuple[Tensor, dict[str, Tensor]]


class Lesson(nn.Module):
    """Draws batches for a generator; what is learned from them stands in its own ``loss``.

    Generators paint scenes as the world does, before the camera: sensor noise would be one thing more to
    imitate, and one that gives away every decoder that averages.

    Parameters
    ----------
    renders : RenderSet
    batch : int
    device : str
    codes : tensor of n rows, optional
        What is learned instead of pixels, row by row: latent vectors or codes of the same renders.
    drop : float
        Share of the batch whose facts are left out, for classifier-free guidance.
    """

    def __init__(
        self,
        renders: RenderSet,
        batch: int,
        device: str = "cpu",
        codes: Tensor | None = None,
        drop: float = 0.0,
    ):
        super().__init__()
        self.renders, self.batch, self.device, self.drop = renders, batch, device, drop
        self.codes, self.fields = codes, encode_facts(renders.facts)

    def forward(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """One step's loss and the numbers to log."""
        rows = rng.integers(len(self.renders), size=self.batch)
        at = torch.from_numpy(rows)
        x = to_pixels(self.renders.images[rows]) if self.codes is None else self.codes[at]
        fields = self.fields[at]
        fields[torch.from_numpy(rng.random(self.batch) < self.drop)] = 0
        loss, numbers = self.loss(x.to(self.device), fields.to(self.device), rng)
        return loss, {name: round(float(value.detach().mean()), 4) for name, value in numbers.items()}

    @abstractmethod
    def loss(self, x: Tensor, fields: Tensor, rng: np.random.Generator) -> Loss:
        """Loss of one batch and what to log of it."""
