"""A VQ-VAE (van den Oord et al. 2017): the decoder with which :mod:`minilab.latent` paints.

The codebook follows the encoder by moving averages (Razavi et al. 2019), in few normalised dimensions and
with unused codes restarted (Yu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilab.lessons import Lesson, Loss
from minilab.renders import RenderSet, to_pixels
from minilab.training import Schedule, autocast

SCHEDULE = Schedule(steps=1500, lr=1.5e-3, warmup=100, ema=0.998, weight_decay=0.0)
BATCH = 64
GRID = 12
N_CODES, N_DIMS = 512, 8
COMMITMENT, CODE_DECAY = 0.25, 0.99


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Residual update."""
        return x + self.body(x)


class VqVae(nn.Module):
    """Pictures to a grid of codes and back; each code stands for 4 x 4 px."""

    def __init__(self, base: int = 48):
        super().__init__()
        a, b = base, 2 * base
        # full resolution is folded into channels at both ends: most of the work happens at 24 and 12 px
        self.encode_image = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, a, 3, padding=1), ResBlock(a), nn.Conv2d(a, b, 4, 2, 1),
            ResBlock(b), nn.Conv2d(b, N_DIMS, 1),
        )  # fmt: skip
        self.decode_image = nn.Sequential(
            nn.Conv2d(N_DIMS, b, 3, padding=1), ResBlock(b), ResBlock(b), nn.Upsample(scale_factor=2),
            nn.Conv2d(b, a, 3, padding=1), ResBlock(a), nn.GroupNorm(8, a), nn.SiLU(),
        )  # fmt: skip
        self.paint = nn.Conv2d(a, 12, 3, padding=1)
        self.register_buffer("codes", F.normalize(torch.randn(N_CODES, N_DIMS), dim=1))
        self.register_buffer("counts", torch.ones(N_CODES))
        self.register_buffer("sums", self.codes.clone())

    def encode(self, x: Tensor) -> Tensor:
        """Unit vectors before quantisation, shape (n, N_DIMS, GRID, GRID)."""
        return F.normalize(self.encode_image(x).float(), dim=1)

    def nearest(self, z: Tensor) -> Tensor:
        """Code of each position, shape (n, GRID, GRID)."""
        return torch.einsum("ndhw,kd->nhwk", z, self.codes).argmax(-1)

    def look_up(self, indices: Tensor) -> Tensor:
        """Vectors of codes, shape (n, N_DIMS, GRID, GRID)."""
        return self.codes[indices].permute(0, 3, 1, 2)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures in about [-1, 1] of quantised vectors."""
        h = self.decode_image(z)
        with torch.autocast(z.device.type, enabled=False):  # as in flow: no coarser lattice than renders
            return F.pixel_shuffle(self.paint(h.float()), 2)

    @torch.no_grad()
    def follow(self, z: Tensor, indices: Tensor) -> None:
        """Move the codes after the encoder; codes that nothing uses jump to a vector of this batch."""
        flat, at = z.permute(0, 2, 3, 1).reshape(-1, N_DIMS), indices.flatten()
        counts = torch.bincount(at, minlength=N_CODES).float()
        sums = torch.zeros_like(self.sums).index_add_(0, at, flat)
        self.counts.lerp_(counts, 1 - CODE_DECAY)
        self.sums.lerp_(sums, 1 - CODE_DECAY)
        idle = self.counts < 0.03 * counts.mean()
        fresh = flat[torch.randint(len(flat), (N_CODES,), device=flat.device)]
        self.sums[idle], self.counts[idle] = fresh[idle], 1.0
        self.codes.copy_(F.normalize(self.sums / self.counts[:, None].clamp_min(1e-5), dim=1))


class VqLesson(Lesson):
    """Reconstruction of scenes through the codes."""

    def __init__(self, renders: RenderSet, device: str = "cpu"):
        super().__init__(renders, BATCH, device)
        self.vq = VqVae().to(memory_format=torch.channels_last)

    def loss(self, x: Tensor, fields: Tensor, rng: np.random.Generator) -> Loss:
        """Error of pixels and of their slopes, and the commitment of encoder to codes."""
        with autocast(self.device):
            z = self.vq.encode(x)
            indices = self.vq.nearest(z.detach())
            quantised = self.vq.look_up(indices)
            y = self.vq.decode(z + (quantised - z).detach())  # straight through
        self.vq.follow(z.detach(), indices)
        error, distance = (y - x).abs().mean(), F.mse_loss(z, quantised)
        # absolute errors of values and slopes: the mean square prefers smears to edges
        slopes = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
        p = torch.bincount(indices.flatten(), minlength=N_CODES).float() / indices.numel()
        perplexity = torch.exp(-(p * (p + 1e-9).log()).sum())
        return error + slopes + COMMITMENT * distance, {"error": error, "perplexity": perplexity}


@torch.no_grad()
def read_renders(renders: RenderSet, device: str, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``read`` to all renders, in batches; the rows are kept on the CPU.

    Parameters
    ----------
    renders : RenderSet
    device : str
    read : callable
        From pixels, shape (b, 3, SIZE, SIZE), to b rows.

    Returns
    -------
    tensor of n rows
    """
    rows = []
    for start in range(0, len(renders), 256):
        x = to_pixels(renders.images[start : start + 256]).to(device)
        with autocast(device):
            rows.append(read(x).cpu())
    return torch.cat(rows)
