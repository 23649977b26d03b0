"""Latent flow matching: `layout_flow`'s recipe in the space of an autoencoder (Rombach et al. 2022).

The autoencoder is the VQ-VAE of :mod:`minilab.vq`; as in the VQ variant of latent diffusion, the flow
models the vectors before quantisation, and the decoder quantises what it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilab import flow, painter
from minilab.renders import RenderSet
from minilab.training import Schedule
from minilab.vq import GRID, N_DIMS, VqVae, read_renders

SCHEDULE = Schedule(
    steps=1500, lr=1e-3, cosine=False, warmup=200, ema=0.999, weight_decay=0.01, snapshots=(600,)
)
SCALE = N_DIMS**0.5
"""Unit vectors times this have a variance of about one in each dimension."""


def make_unet() -> painter.LayoutUNet:
    """The U-Net on a 12 x 12 grid of latent vectors, told where things stand."""
    return painter.LayoutUNet(grid=GRID, fold=1, c_image=N_DIMS)


def encode_renders(vq: VqVae, renders: RenderSet, device: str = "cpu") -> Tensor:
    """Scaled latent vectors of all renders, a float16 tensor of shape (n, N_DIMS, GRID, GRID)."""
    return read_renders(renders, device, lambda x: (SCALE * vq.encode(x)).half())


@torch.no_grad()
def sample(unet: nn.Module, fields: Tensor, vq: VqVae, *, seed: int, steps: int = 20) -> Tensor:
    """Draw latents with the flow's sampler and paint them.

    Parameters
    ----------
    unet : Module
    fields : uint8 tensor, shape (n, SIZE, SIZE)
        Layouts, see :func:`minilab.painter.layouts`.
    vq : VqVae
    seed, steps : int
        As in :func:`minilab.flow.sample`.

    Returns
    -------
    float tensor, shape (n, 3, SIZE, SIZE)
        In [-1, 1], not yet clipped.
    """
    shape = (N_DIMS, GRID, GRID)
    z = flow.sample(unet, fields, seed=seed, steps=steps, guidance=1, shape=shape, limit=None)
    z = z / SCALE
    return vq.decode(vq.look_up(vq.nearest(torch.nn.functional.normalize(z, dim=1))))
