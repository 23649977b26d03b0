"""Latent flow matching: the flow's recipe in the space of an autoencoder (Rombach et al. 2022).

The autoencoder is the VQ-VAE of :mod:`minilab.vq`; as in the VQ variant of latent diffusion, the flow
models the vectors before quantisation, and the decoder quantises what it is given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from minilab import flow
from minilab.conditions import encode_facts
from minilab.renders import RenderSet
from minilab.training import Schedule
from minilab.vq import GRID, N_DIMS, VqVae, read_renders

SCHEDULE = Schedule(
    steps=6000, lr=1e-3, warmup=200, ema=0.999, weight_decay=0.01, snapshots=(400, 1200, 3000)
)
BATCH = 64
SCALE = N_DIMS**0.5
"""Unit vectors times this have a variance of about one in each dimension."""


def make_unet() -> flow.UNet:
    """The flow's U-Net on a 12 x 12 grid of latent vectors."""
    return flow.UNet(channels=(64, 128, 192), fold=1, c_image=N_DIMS)


class LatentLesson(nn.Module):
    """The U-Net with the flow-matching loss on encoded renders; the VQ-VAE is given and frozen."""

    def __init__(self, renders: RenderSet, latents: Tensor, device: str = "cpu"):
        super().__init__()
        self.unet = make_unet().to(memory_format=torch.channels_last)
        self.latents, self.device = latents, device
        self.fields = encode_facts(renders.facts)

    def forward(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """One step's loss."""
        rows = torch.from_numpy(rng.integers(len(self.latents), size=BATCH))
        z = self.latents[rows].float().to(self.device)
        fields = self.fields[rows].clone()
        fields[torch.from_numpy(rng.random(BATCH) < flow.DROP_CONDITION)] = 0
        t = torch.sigmoid(torch.randn(BATCH, device=self.device))
        return flow.flow_loss(self.unet, z, t, fields.to(self.device)), {}


def encode_renders(vq: VqVae, renders: RenderSet, device: str = "cpu") -> Tensor:
    """Scaled latent vectors of all renders, a float16 tensor of shape (n, N_DIMS, GRID, GRID)."""
    return read_renders(renders, device, lambda x: (SCALE * vq.encode(x)).half())


@torch.no_grad()
def sample(unet: nn.Module, vq: VqVae, fields: Tensor, *, seed: int, steps: int = 20) -> Tensor:
    """Draw latents with the flow's sampler and paint them.

    Parameters
    ----------
    unet : Module
    vq : VqVae
    fields : int64 tensor, shape (n, 7)
    seed, steps : int
        As in :func:`minilab.flow.sample`.

    Returns
    -------
    float tensor, shape (n, 3, SIZE, SIZE)
        In [-1, 1], not yet clipped.
    """
    z = flow.sample(unet, fields, seed=seed, steps=steps, shape=(N_DIMS, GRID, GRID)) / SCALE
    return vq.decode(vq.look_up(vq.nearest(torch.nn.functional.normalize(z, dim=1))))
