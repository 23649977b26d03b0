"""Generators that are told where things stand: layout to picture, by flow matching and in one step.

What is asked for is a layout, as in semantic image synthesis (Park et al. 2019, SPADE): for each pixel the
kind and colour of the thing that shows there, or the setting's ground. So composition is given and only
painting is to be learned, which takes a fraction of the steps that a picture from words takes.

``layout_flow`` is the pixel flow with the layout beside the noisy picture (on latent vectors it is
:mod:`minilab.latent`). ``painter`` is one pass of the
same network from noise to picture, trained without a critic by the energy score, a strictly proper scoring
rule (Gneiting and Raftery 2007; for networks: Shen and Meinshausen 2024, engression).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilab import flow
from minilab.conditions import N_FIELDS
from minilab.grammar import COLOURS, KINDS, SETTINGS
from minilab.lessons import Lesson, Loss
from minilab.renders import GROUND, RenderSet
from minilab.sprites import RGB
from minilab.training import Schedule, autocast
from minilab.world import SIZE

FLOW_SCHEDULE = Schedule(
    steps=5000, lr=8e-4, cosine=False, warmup=200, ema=0.999, weight_decay=0.01, snapshots=(1500,)
)
SCHEDULE = Schedule(steps=5500, lr=6e-4, cosine=False, cool=1000, warmup=200, ema=0.999, weight_decay=0.01)
BATCH = 32
N_LABELS = 1 + len(KINDS) * len(COLOURS) + len(SETTINGS)
PATCHES = (3, 6, 12)
"""Sides in px of the patches whose joint values the energy score compares."""


def layouts(renders: RenderSet) -> Tensor:
    """What each pixel shows.

    Parameters
    ----------
    renders : RenderSet, length n

    Returns
    -------
    uint8 tensor, shape (n, SIZE, SIZE)
        0 is behind everything, then kinds in all colours, then the grounds.
    """
    labels = np.zeros((len(renders), GROUND + 1), dtype=np.uint8)
    for row, facts in zip(labels, renders.facts, strict=True):
        for place, (colour, kind) in enumerate(facts.things, 1):
            row[place] = 1 + KINDS.index(kind) * len(COLOURS) + COLOURS.index(colour)
        row[GROUND] = 1 + len(KINDS) * len(COLOURS) + SETTINGS.index(str(facts.setting))
    return torch.from_numpy(np.take_along_axis(labels, renders.owner.reshape(len(renders), -1), 1)).unflatten(
        1, (SIZE, SIZE)
    )


class LayoutUNet(nn.Module):
    """The flow's U-Net with a layout as further channels; nothing else is asked for.

    Channels are an embedding of what shows and, of things, the colour itself: 96 labels with an embedding
    each had not learned their colours after 550 steps. On a coarser ``grid`` than the picture's, each place
    is given all pixels that it stands for.
    """

    def __init__(self, width: int = 8, grid: int = SIZE, **unet: Any):
        super().__init__()
        behind, grounds = [len(KINDS)], [len(KINDS) + 1 + i for i in range(len(SETTINGS))]
        kinds = [kind for kind in range(len(KINDS)) for _ in COLOURS]
        colours = torch.tensor([RGB[name] for name in COLOURS]) / 127.5 - 1
        nothing = torch.zeros(len(SETTINGS), 3)
        self.register_buffer("kind_of", torch.tensor(behind + kinds + grounds), persistent=False)
        colour_of = torch.cat([nothing[:1], colours.repeat(len(KINDS), 1), nothing])
        self.register_buffer("colour_of", colour_of, persistent=False)
        self.embed = nn.Embedding(len(KINDS) + 1 + len(SETTINGS), width)
        self.fold = SIZE // grid
        self.unet = flow.UNet(c_given=(width + 3) * self.fold**2, **unet)

    def forward(self, x: Tensor, t: Tensor, layout: Tensor) -> Tensor:
        """Picture behind x at time t, for an integer layout of shape (n, SIZE, SIZE)."""
        layout = layout.long()
        given = torch.cat([self.embed(self.kind_of[layout]), self.colour_of[layout]], -1).permute(0, 3, 1, 2)
        given = F.pixel_unshuffle(given, self.fold)
        nothing = torch.zeros(len(x), N_FIELDS, dtype=torch.long, device=x.device)
        return self.unet(torch.cat([x, given], 1), t, nothing)


class _LayoutLesson(Lesson):
    """Batches of scenes, or of latent vectors of them, with their layouts in place of their facts."""

    def __init__(
        self, net: LayoutUNet, renders: RenderSet, batch: int, device: str, codes: Tensor | None = None
    ):
        super().__init__(renders, batch, device, codes)
        self.fields = layouts(renders)
        self.net = net.to(memory_format=torch.channels_last)


class LayoutFlowLesson(_LayoutLesson):
    """Flow matching, given the layout."""

    def __init__(
        self,
        renders: RenderSet,
        device: str = "cpu",
        net: LayoutUNet | None = None,
        latents: Tensor | None = None,
    ):
        super().__init__(net or LayoutUNet(), renders, flow.BATCH, device, latents)

    def loss(self, x: Tensor, fields: Tensor, rng: np.random.Generator) -> Loss:
        """See :func:`minilab.flow.flow_loss`."""
        t = torch.sigmoid(torch.randn(len(x), device=x.device))
        return flow.flow_loss(self.net, x.float(), t, fields), {}


class PainterLesson(_LayoutLesson):
    """Two pictures from two noises, compared with the scene by the energy score of their patches."""

    def __init__(self, renders: RenderSet, device: str = "cpu"):
        super().__init__(LayoutUNet(), renders, BATCH, device)

    def loss(self, x: Tensor, fields: Tensor, rng: np.random.Generator) -> Loss:
        """See :func:`energy_score`."""
        noise, t = torch.randn((2 * len(x), *x.shape[1:]), device=x.device), torch.zeros(2 * len(x))
        with autocast(self.device):
            one, other = self.net(noise, t.to(x.device), fields.repeat(2, 1, 1)).float().chunk(2)
        loss = energy_score(x, one, other)
        return loss, {"spread": (one - other).abs()}


def energy_score(x: Tensor, one: Tensor, other: Tensor) -> Tensor:
    r"""Mean energy score of patches: $\frac12(|x - a| + |x - b|) - \frac12 |a - b|$ for two samples a, b.

    It is least where samples are distributed as the patches of ``x`` are. A mean of all that is possible, as
    the mean square wants, would score worse: the last term rewards samples that differ.

    Parameters
    ----------
    x, one, other : float tensor, shape (n, 3, SIZE, SIZE)
    """
    score = x.new_zeros(())
    for side in PATCHES:
        a, b, c = (F.pixel_unshuffle(y, side) for y in (x, one, other))

        def far(p: Tensor, q: Tensor) -> Tensor:
            return ((p - q).square().sum(1) + 1e-6).sqrt().mean()

        score = score + (far(a, b) + far(a, c) - far(b, c)) / (2 * side)
    return score / len(PATCHES)


@torch.no_grad()
def sample(net: LayoutUNet, fields: Tensor, *, seed: int) -> Tensor:
    """Paint layouts in one step from noise; in [-1, 1], not yet clipped, shape (n, 3, SIZE, SIZE)."""
    noise = torch.randn((len(fields), 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    device = net.embed.weight.device
    return net(noise.to(device), torch.zeros(len(fields), device=device), fields.to(device)).float()
