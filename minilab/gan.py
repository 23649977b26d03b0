"""A conditional GAN without tricks: relativistic pairing loss with R1 and R2 penalties.

R3GAN (Huang et al. 2024): each fake competes with a real picture of the same facts (Jolicoeur-Martineau
2019), and the critic's gradient is penalised on both sides (Mescheder et al. 2018), which is what keeps a
plain convolutional GAN from collapsing. The condition enters the critic by projection (Miyato and Koyama
2018).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilab.conditions import Condition
from minilab.lessons import Lesson, Loss
from minilab.renders import RenderSet
from minilab.training import Schedule, autocast

SCHEDULE = Schedule(
    steps=40_000,
    lr=4e-4,
    cosine=False,
    warmup=100,
    ema=0.999,
    weight_decay=0.0,
    betas=(0.0, 0.99),
    max_norm=100.0,  # the lazy penalty is four times as long every fourth step
    snapshots=(1000, 3000),
)
BATCH = 32
NOISE = 64
PENALTY, PENALTY_EVERY = 0.5, 4
"""Weight of R1 + R2; taken every fourth step at four times the weight (lazy regularisation, StyleGAN2)."""


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity; scaled by a vector where one is given."""

    def __init__(self, channels: int, width: int = 0):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Linear(width, channels) if width else None
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, vector: Tensor | None = None) -> Tensor:
        """Residual update."""
        h = self.conv1(F.leaky_relu(x, 0.2))
        if self.scale is not None:
            h = h * (1 + self.scale(vector)[:, :, None, None])
        return x + self.conv2(F.leaky_relu(h, 0.2))


class Generator(nn.Module):
    """Noise and facts to a picture: 6 px, doubled twice, then unfolded to full size."""

    def __init__(self, channels: tuple[int, int, int] = (176, 128, 72), width: int = 128):
        super().__init__()
        self.condition = Condition(width)
        self.noise = nn.Linear(NOISE, width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, width))
        self.start = nn.Linear(width, channels[0] * 36)
        self.blocks = nn.ModuleList(Residual(c, width) for c in channels)
        self.widen = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(channels, channels[1:], strict=False))
        self.paint = nn.Conv2d(channels[-1], 12, 3, padding=1)

    def forward(self, z: Tensor, fields: Tensor) -> Tensor:
        """Pictures in about [-1, 1] for noise ``z`` of shape (n, NOISE)."""
        vector = self.condition(fields)[1] + self.noise(z)
        vector = vector + self.mix(vector)
        x = self.start(vector).unflatten(1, (-1, 6, 6)).contiguous(memory_format=torch.channels_last)
        for i, block in enumerate(self.blocks):
            x = block(x, vector)
            if i < len(self.widen):
                x = F.interpolate(self.widen[i](x), scale_factor=2, mode="bilinear")
        with torch.autocast(x.device.type, enabled=False):  # as in flow: no coarser lattice than renders
            return F.pixel_shuffle(self.paint(F.leaky_relu(x.float(), 0.2)), 2)


class Critic(nn.Module):
    """How real a picture of these facts looks: folded to 24 px, then down to 6, then one number."""

    def __init__(self, channels: tuple[int, int, int] = (48, 96, 160), width: int = 128):
        super().__init__()
        self.condition = Condition(width)
        self.stem = nn.Conv2d(12, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(Residual(c) for c in channels)
        self.widen = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(channels, channels[1:], strict=False))
        self.look = nn.Linear(channels[-1] * 36, width)
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor, fields: Tensor) -> Tensor:
        """Scores, shape (n,)."""
        h = self.stem(F.pixel_unshuffle(x, 2))
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i < len(self.widen):
                h = F.avg_pool2d(self.widen[i](h), 2)
        h = F.leaky_relu(self.look(F.leaky_relu(h, 0.2).flatten(1)), 0.2).float()
        return self.score(h)[:, 0] + (h * self.condition(fields)[1]).mean(1)


class GanLesson(Lesson):
    """Both players; each step moves both, from gradients taken at the same point."""

    def __init__(self, renders: RenderSet, device: str = "cpu"):
        super().__init__(renders, BATCH, device)
        self.generator = Generator().to(memory_format=torch.channels_last)
        self.critic = Critic().to(memory_format=torch.channels_last)

    def loss(self, x: Tensor, fields: Tensor, rng: np.random.Generator) -> Loss:
        """Losses of both players in one number."""
        penalise = rng.random() < 1 / PENALTY_EVERY
        with autocast(self.device):
            fake = self.generator(torch.randn(BATCH, NOISE, device=self.device), fields)
            left, right = x.requires_grad_(penalise), fake.detach().requires_grad_(penalise)
            on_real, on_fake = self.critic(left, fields), self.critic(right, fields)
            critic_loss = F.softplus(on_fake - on_real).mean()
            penalty = critic_loss.new_zeros(())
            if penalise:
                slopes = torch.autograd.grad((on_real + on_fake).sum(), [left, right], create_graph=True)
                penalty = sum((s.float() ** 2).sum((1, 2, 3)).mean() for s in slopes)
            self.critic.requires_grad_(False)  # the generator's loss must not move the critic
            judged = self.critic(fake, fields)
            self.critic.requires_grad_(True)
            generator_loss = F.softplus(on_real.detach() - judged).mean()
        loss = critic_loss + generator_loss + PENALTY * PENALTY_EVERY / 2 * penalty
        return loss, {
            "critic": critic_loss,
            "generator": generator_loss,
            "penalty": penalty,
            "spread": fake.std(0),
        }


@torch.no_grad()
def sample(generator: Generator, fields: Tensor, *, seed: int) -> Tensor:
    """Draw pictures, without truncation.

    Parameters
    ----------
    generator : Generator
    fields : int64 tensor, shape (n, 7)
    seed : int

    Returns
    -------
    float tensor, shape (n, 3, SIZE, SIZE)
        In [-1, 1], not yet clipped.
    """
    device = generator.paint.weight.device
    z = torch.randn((len(fields), NOISE), generator=torch.Generator().manual_seed(seed)).to(device)
    return generator(z, fields.to(device))
