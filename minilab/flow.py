"""Pixel flow matching: a caption-conditioned U-Net that turns noise into pictures along straight lines.

Rectified flow / flow matching (Liu et al. 2022, Lipman et al. 2022) with logit-normal times (Esser et al.
2024), classifier-free guidance (Ho and Salimans 2022) and Heun steps. Image-to-image is SDEdit (Meng et al.
2021), local editing keeps the outside of a mask on the real picture's own path (RePaint without resampling,
Lugmayr et al. 2022).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilab.conditions import Condition
from minilab.lessons import Lesson, Loss
from minilab.renders import RenderSet
from minilab.training import Schedule, autocast
from minilab.world import SIZE

SCHEDULE = Schedule(
    steps=4000, lr=8e-4, cosine=False, warmup=200, ema=0.9993, weight_decay=0.01, snapshots=(600, 2400)
)
BATCH = 64
DROP_CONDITION = 0.1


class Block(nn.Module):
    """Two 3x3 convolutions, modulated by time and condition."""

    def __init__(self, c_in: int, c_out: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, c_in), nn.GroupNorm(8, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.modulate = nn.Linear(width, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Residual update."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(vector)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Every position looks at every other and at the condition's tokens."""

    def __init__(self, channels: int, width: int, heads: int = 4):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.kv_tokens, self.out = nn.Linear(width, 2 * channels), nn.Linear(channels, channels)
        self.heads = heads
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Residual update."""
        n, c, h, w = x.shape
        y = self.norm(x).flatten(2).transpose(1, 2)
        k, v = torch.cat([self.kv(y), self.kv_tokens(tokens)], dim=1).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(y), k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y).transpose(1, 2).reshape(n, c, h, w)


class UNet(nn.Module):
    """From a noisy picture, folded into channels, and its time to the picture behind it.

    ``c_given`` channels beside the picture are told, and not painted.
    """

    def __init__(
        self,
        channels: tuple[int, int, int] = (64, 128, 192),
        width: int = 128,
        fold: int = 4,
        c_image: int = 3,
        c_given: int = 0,
    ):
        super().__init__()
        a, b, c = channels
        self.fold, self.c_image = fold, c_image
        self.condition = Condition(width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.stem = nn.Conv2d((c_image + c_given) * fold * fold, a, 3, padding=1)
        self.down_a, self.down_b = Block(a, a, width), Block(b, b, width)
        self.to_b, self.to_c = nn.Conv2d(a, b, 3, 2, 1), nn.Conv2d(b, c, 3, 2, 1)
        self.attend_b, self.attend_c = Attention(b, width), Attention(c, width)
        self.mid1, self.mid2 = Block(c, c, width), Block(c, c, width)
        self.from_c, self.from_b = nn.Conv2d(c, b, 1), nn.Conv2d(b, a, 1)
        self.up_b1, self.up_b2, self.attend_up = (
            Block(2 * b, b, width),
            Block(b, b, width),
            Attention(b, width),
        )
        self.up_a1, self.up_a2 = Block(2 * a, a, width), Block(a, a, width)
        self.norm = nn.GroupNorm(8, a)
        self.head = nn.Conv2d(a, c_image * fold * fold, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, t: Tensor, fields: Tensor) -> Tensor:
        """Picture behind x at time t for encoded facts; a row of zeros asks for nothing in particular."""
        tokens, vector = self.condition(fields)
        angles = 1000 * t[:, None] * torch.exp(-math.log(10_000) * torch.arange(32, device=t.device) / 32)
        vector = F.silu(vector + self.time(torch.cat([angles.sin(), angles.cos()], dim=1)))
        h0 = self.down_a(self.stem(F.pixel_unshuffle(x, self.fold)), vector)
        h1 = self.attend_b(self.down_b(self.to_b(h0), vector), tokens)
        h = self.mid2(self.attend_c(self.mid1(self.to_c(h1), vector), tokens), vector)
        h = F.interpolate(self.from_c(h), scale_factor=2)
        h = self.up_b2(self.attend_up(self.up_b1(torch.cat([h, h1], dim=1), vector), tokens), vector)
        h = F.interpolate(self.from_b(h), scale_factor=2)
        h = self.up_a2(self.up_a1(torch.cat([h, h0], dim=1), vector), vector)
        # the last layer in float32: in bfloat16 it would leave a coarser pixel lattice than renders have
        with torch.autocast(x.device.type, enabled=False):
            return F.pixel_shuffle(self.head(F.silu(self.norm(h.float()))), self.fold)


class FlowLesson(Lesson):
    """The U-Net with the flow-matching loss on scenes."""

    def __init__(self, unet: UNet, renders: RenderSet, device: str = "cpu"):
        super().__init__(renders, BATCH, device, drop=DROP_CONDITION)
        self.unet = unet.to(memory_format=torch.channels_last)

    def loss(self, x: Tensor, fields: Tensor, rng: np.random.Generator) -> Loss:
        """See :func:`flow_loss`; times are logit-normal."""
        t = torch.sigmoid(torch.randn(len(x), device=x.device))
        return flow_loss(self.unet, x, t, fields), {}


NEAREST = 0.05
"""Times nearer to the picture than this count as this near, where a picture becomes a velocity."""


def flow_loss(unet: nn.Module, x1: Tensor, t: Tensor, fields: Tensor) -> Tensor:
    """Mean squared error of the velocity x1 - x0 at x_t = (1 - t) x0 + t x1.

    The network predicts the picture x1, and the velocity follows from it (Li and He 2025, arXiv 2511.13720):
    a picture lies on a surface of few dimensions that narrow layers can hold, noise fills all of them. And
    the sampler's last step leaves a predicted picture, not the noise that a velocity could not cancel.
    """
    x0 = torch.randn_like(x1)
    w = t[:, None, None, None]
    with autocast(x1.device.type):
        predicted = unet((1 - w) * x0 + w * x1, t, fields)
    error = (predicted.float() - x1) / (1 - w).clamp_min(NEAREST)
    return (error**2).mean()


@torch.no_grad()
def sample(
    unet: nn.Module,
    fields: Tensor,
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 1.5,
    start: Tensor | None = None,
    keep: float = 0.0,
    mask: Tensor | None = None,
    shape: tuple[int, int, int] = (3, SIZE, SIZE),
    limit: float | None = 1.0,
) -> Tensor:
    """Draw pictures with Heun steps.

    Parameters
    ----------
    unet : Module
    fields : int64 tensor, shape (n, 7)
        Encoded facts to ask for.
    seed : int
        Of the noise.
    steps : int
        Heun steps from noise to picture; image-to-image takes its share of them.
    guidance : float
        1 is none.
    start : float tensor, shape (n, 3, SIZE, SIZE), optional
        Real pictures in [-1, 1] to start from or to edit.
    keep : float in [0, 1)
        Time at which to start on ``start``'s path: 0 keeps nothing of it.
    mask : float tensor, shape (n, 1, SIZE, SIZE), optional
        1 where a picture may change; elsewhere it stays on the real picture's path.
    shape : tuple of int
        Of one sample.
    limit : float, optional
        No predicted value is larger than this: guidance overshoots, and what is cut only in the end has more
        black and white than any scene. None for latent vectors, which have no such bounds.

    Returns
    -------
    float tensor, shape (n, *shape)
        In [-1, 1], not yet clipped.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(unet.parameters()).device
    fields = fields.to(device)
    noise = torch.randn((len(fields), *shape), generator=generator).to(device)
    x = noise if start is None else (1 - keep) * noise + keep * start
    times = torch.linspace(keep, 1, max(2, round(steps * (1 - keep))) + 1).tolist()

    def velocity(x: Tensor, t: float) -> Tensor:
        at = torch.full((len(x),), t, device=device)
        with autocast(device.type):
            picture = unet(x, at, fields).float()
            if guidance != 1:
                free = unet(x, at, torch.zeros_like(fields)).float()
                picture = free + guidance * (picture - free)
            if limit is not None:
                picture = picture.clamp(-limit, limit)
        return (picture - x) / max(1 - t, NEAREST)

    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity(x, t)
        guess = x + (t_next - t) * v
        if t_next < 1:
            guess = x + (t_next - t) * (v + velocity(guess, t_next)) / 2
        x = guess
        if mask is not None and start is not None:
            x = mask * x + (1 - mask) * ((1 - t_next) * noise + t_next * start)
    return x


def to_bytes(x: Tensor) -> np.ndarray:
    """Pictures in [-1, 1] to bytes, by the same rounding as a render's."""
    x = ((x + 1) * 127.5 + 0.5).clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
