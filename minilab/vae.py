"""A convolutional VAE: the blurry classic (Kingma and Welling 2014), conditioned on a scene's facts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilab.conditions import Condition
from minilab.lessons import Lesson, Loss
from minilab.renders import RenderSet
from minilab.training import Schedule, autocast

SCHEDULE = Schedule(steps=6000, lr=1e-3, cosine=False, warmup=100, ema=0.998, weight_decay=0.0)
BATCH = 64
LATENT = 96
BETA = 1.0


class Vae(nn.Module):
    """Encoder to a Gaussian latent, decoder with the condition; pixel noise of one learned scale."""

    def __init__(self, base: int = 32, width: int = 64):
        super().__init__()
        self.condition = Condition(width)
        a, b, c = base, 2 * base, 4 * base
        self.encode_image = nn.Sequential(
            nn.Conv2d(3, a, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(8, b), nn.SiLU(),
            nn.Conv2d(b, c, 4, 2, 1), nn.GroupNorm(8, c), nn.SiLU(), nn.Flatten(),
        )  # fmt: skip
        self.to_latent = nn.Linear(c * 36 + width, 2 * LATENT)
        self.from_latent = nn.Linear(LATENT + width, c * 36)
        self.decode_image = nn.Sequential(
            nn.Unflatten(1, (c, 6, 6)), nn.SiLU(),
            nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(8, c), nn.SiLU(),
            nn.ConvTranspose2d(c, b, 4, 2, 1), nn.GroupNorm(8, b), nn.SiLU(),
            nn.ConvTranspose2d(b, a, 4, 2, 1), nn.GroupNorm(8, a), nn.SiLU(),
            nn.ConvTranspose2d(a, 3, 4, 2, 1),
        )  # fmt: skip
        self.log_sigma = nn.Parameter(torch.tensor(-1.0))

    def decode(self, z: Tensor, fields: Tensor) -> Tensor:
        """Mean picture in [-1, 1] of latents."""
        return self.decode_image(self.from_latent(torch.cat([z, self.condition(fields)[1]], dim=1))).float()

    def forward(self, x: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Negative evidence bound per picture, split in reconstruction and divergence (nats)."""
        h = torch.cat([self.encode_image(x), self.condition(fields)[1]], dim=1)
        mean, log_var = self.to_latent(h).float().clamp(-8, 8).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        error = F.mse_loss(self.decode(z, fields), x, reduction="none").sum((1, 2, 3))
        # one learned pixel noise (sigma-VAE, Rybkin et al. 2021) instead of a hand-set weight
        n_pixels = x[0].numel()
        nll = error / (2 * (2 * self.log_sigma).exp()) + n_pixels * self.log_sigma
        divergence = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1)
        return nll, divergence


class VaeLesson(Lesson):
    """The VAE with its bound on scenes."""

    def __init__(self, renders: RenderSet, device: str = "cpu"):
        super().__init__(renders, BATCH, device)
        self.vae = Vae()

    def loss(self, x: Tensor, fields: Tensor, rng: np.random.Generator) -> Loss:
        """Negative evidence bound in nats per pixel value."""
        with autocast(self.device):
            nll, divergence = self.vae(x, fields)
        return (nll + BETA * divergence).mean() / x[0].numel(), {"kl_nats": divergence}


@torch.no_grad()
def sample(vae: Vae, fields: Tensor, *, seed: int) -> Tensor:
    """Draw pictures: prior latents, mean decoder output; the learned pixel noise is left out, as is usual.

    Parameters
    ----------
    vae : Vae
    fields : int64 tensor, shape (n, 7)
    seed : int

    Returns
    -------
    float tensor, shape (n, 3, SIZE, SIZE)
        In [-1, 1], not yet clipped.
    """
    generator = torch.Generator().manual_seed(seed)
    device = vae.log_sigma.device
    z = torch.randn((len(fields), LATENT), generator=generator).to(device)
    return vae.decode(z, fields.to(device))
