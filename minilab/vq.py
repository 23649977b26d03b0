"""A VQ-VAE (van den Oord et al. 2017), and an autoregressive transformer that writes its codes.

The codebook follows the encoder by moving averages (Razavi et al. 2019), in few normalised dimensions and
with unused codes restarted (Yu et al. 2022). The prior reads the scene's facts first, then predicts the 144
codes row by row. The latent flow of :mod:`minilab.latent` paints with the same decoder.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilab.conditions import Condition
from minilab.lessons import Lesson, Loss
from minilab.renders import RenderSet, to_pixels
from minilab.training import Schedule, autocast

SCHEDULE = Schedule(steps=1500, lr=1.5e-3, warmup=100, ema=0.998, weight_decay=0.0)
PRIOR_SCHEDULE = Schedule(
    steps=12_000, lr=1e-3, cosine=False, warmup=100, ema=0.999, weight_decay=0.05, snapshots=(1000,)
)
BATCH, PRIOR_BATCH = 64, 32
GRID = 12
N_CODES, N_DIMS = 512, 8
COMMITMENT, CODE_DECAY = 0.25, 0.99
DROP_CONDITION = 0.1


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


class Layer(nn.Module):
    """Causal self-attention and a two-layer perceptron, both beside the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = heads

    def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:
        """Residual update of (n, length, width); with a cache, x continues what was seen before."""
        qkv = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        if cache is not None:
            k, v = (torch.cat([cache[n], t], dim=2) if n in cache else t for n, t in (("k", k), ("v", v)))
            cache.update(k=k, v=v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2])
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Prior(nn.Module):
    """Next code from the facts and the codes before it."""

    def __init__(self, width: int = 192, depth: int = 4, heads: int = 6):
        super().__init__()
        self.condition = Condition(width)
        self.embed = nn.Embedding(N_CODES, width)
        self.row = nn.Parameter(0.02 * torch.randn(GRID, 1, width))
        self.column = nn.Parameter(0.02 * torch.randn(1, GRID, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, N_CODES)

    def asked(self, fields: Tensor) -> Tensor:
        """What is read before the first code: facts, and all of them together; shape (n, 5, width)."""
        facts, vector = self.condition(fields)
        return torch.cat([facts, vector[:, None]], dim=1)

    def told(self, codes: Tensor, start: int = 0) -> Tensor:
        """Codes at their places from ``start`` on; shape (n, k, width)."""
        place = (self.row + self.column).flatten(0, 1)
        return self.embed(codes) + place[start : start + codes.shape[1]]

    def forward(self, codes: Tensor, fields: Tensor) -> Tensor:
        """Logits of each of all GRID**2 codes, given those before it; shape (n, GRID**2, N_CODES)."""
        asked = self.asked(fields)
        x = torch.cat([asked, self.told(codes[:, :-1])], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, asked.shape[1] - 1 :]))

    def continued(self, x: Tensor, caches: list[dict[str, Tensor]]) -> Tensor:
        """Logits of the next code alone, after reading x behind what the caches hold; shape (n, N_CODES)."""
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache)
        return self.head(self.norm(x[:, -1]))


class PriorLesson(Lesson):
    """Cross-entropy of the codes of renders; the VQ-VAE is given and frozen."""

    def __init__(self, renders: RenderSet, codes: Tensor, device: str = "cpu"):
        super().__init__(renders, PRIOR_BATCH, device, codes, DROP_CONDITION)
        self.prior = Prior()

    def loss(self, x: Tensor, fields: Tensor, rng: np.random.Generator) -> Loss:
        """Nats per code."""
        codes = x.long()
        with autocast(self.device):
            logits = self.prior(codes, fields)
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten()), {}


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


def encode_renders(vq: VqVae, renders: RenderSet, device: str = "cpu") -> Tensor:
    """Codes of all renders, an int16 tensor of shape (n, GRID**2)."""
    return read_renders(renders, device, lambda x: vq.nearest(vq.encode(x)).flatten(1).short())


@torch.no_grad()
def sample(
    prior: Prior,
    vq: VqVae,
    fields: Tensor,
    *,
    seed: int,
    temperature: float = 1.0,
    guidance: float = 1.5,
) -> Tensor:
    """Write codes one after the other and paint them.

    Parameters
    ----------
    prior : Prior
    vq : VqVae
    fields : int64 tensor, shape (n, 7)
    seed : int
    temperature : float
    guidance : float
        Classifier-free, on the logits; 1 is none.
        1 samples the prior as it is.

    Returns
    -------
    float tensor, shape (n, 3, SIZE, SIZE)
        In [-1, 1], not yet clipped.
    """
    generator = torch.Generator().manual_seed(seed)
    device = vq.codes.device
    fields = fields.to(device)
    caches: list[dict[str, Tensor]] = [{} for _ in prior.layers]
    # the same codes are read twice: behind what was asked for, and behind nothing
    logits, codes = prior.continued(prior.asked(torch.cat([fields, torch.zeros_like(fields)])), caches), []
    for place in range(GRID * GRID):
        told, free = logits.float().chunk(2)
        p = ((free + guidance * (told - free)) / temperature).softmax(-1)
        codes.append(torch.multinomial(p.cpu(), 1, generator=generator).to(device))
        if place + 1 < GRID * GRID:
            logits = prior.continued(prior.told(codes[-1].repeat(2, 1), place), caches)
    return vq.decode(vq.look_up(torch.cat(codes, dim=1).unflatten(1, (GRID, GRID))))
