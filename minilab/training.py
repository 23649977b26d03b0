"""The one training loop of the laboratory: cosine schedule, EMA weights, resumable, deterministic by step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

LossFn = Callable[[nn.Module, np.random.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes
    ----------
    steps : int
        Optimiser steps.
    lr : float
        Peak learning rate of AdamW, after a linear warm-up.
    cosine : bool
        The rate falls to 2 % of its peak at the last step. Otherwise it stays, and the averaged weights of
        any step are a finished model: such a training may be cut off and prolonged.
    cool : int
        Over this many last steps a constant rate falls to 0, in a line: what a large step keeps blurred or
        noisy, small ones settle (Hu et al. 2024, arXiv 2404.06395). Cut off before, it can be prolonged.
    warmup : int
        Steps of warm-up.
    weight_decay : float
    ema : float
        Decay of the averaged weights that are kept in the end; ramps up from 0 so that early steps fade.
    seed : int
        Step k draws its data from a generator of (seed, k), so a resumed run sees what an undisturbed one
        sees.
    snapshots : tuple of int
        Steps whose averaged weights are kept as well (the quality ladder).
    betas : tuple of float
        Momentum of AdamW.
    max_norm : float
        Longer gradients are cut to this length.
    """

    steps: int
    lr: float = 1e-3
    cosine: bool = True
    cool: int = 0
    warmup: int = 100
    weight_decay: float = 0.02
    ema: float = 0.998
    seed: int = 0
    snapshots: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.99)
    max_norm: float = 1.0


@dataclass
class Trained:
    """What a training left: averaged weights, those of the snapshots, and how long it took."""

    model: nn.Module
    snapshots: dict[int, dict[str, Tensor]]
    seconds: float
    log: list[dict[str, float]]
    steps: int


def autocast(device: str) -> torch.autocast:
    """Bfloat16 arithmetic where weights stay float32, if the processor has units for it.

    With them it is 1.5-2 times faster; without them a CPU emulates it, ten times slower than float32.
    """
    kind = torch.device(device).type
    fast = kind != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


def train(
    name: str,
    model: nn.Module,
    loss_fn: LossFn,
    schedule: Schedule,
    folder: Path,
    device: str = "cpu",
    until: int | None = None,
) -> Trained:
    """Train a model, or go on where an interrupted run stopped.

    Parameters
    ----------
    name : str
        Name of the run; its checkpoint and log are ``folder/name.ckpt`` and ``folder/name.jsonl``.
    model : Module
        Trained in place; must hold everything that is learned.
    loss_fn : callable
        ``(model, rng) -> (loss, numbers to log)`` for one step.
    schedule : Schedule
    folder : Path
    device : str
    until : int, optional
        Stop before this step if the rate is constant: the averaged weights are a finished model, and a later
        call goes on from here. A falling rate is not cut off.

    Returns
    -------
    Trained
    """
    stop = schedule.steps if until is None or schedule.cosine else min(until, schedule.steps)
    folder.mkdir(parents=True, exist_ok=True)
    ckpt, log_file = folder / f"{name}.ckpt", folder / f"{name}.jsonl"
    model.to(device).train()
    averaged = deepcopy(model).requires_grad_(False)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": schedule.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, betas=schedule.betas)
    start, seconds, snapshots = 0, 0.0, {}
    if ckpt.exists():
        state = torch.load(ckpt, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        start, seconds, snapshots = state["step"], state["seconds"], state["snapshots"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "averaged": averaged.state_dict(), "step": step}
        state |= {"optimiser": optimiser.state_dict(), "seconds": seconds, "snapshots": snapshots}
        torch.save(state, ckpt.with_suffix(".tmp"))
        ckpt.with_suffix(".tmp").replace(ckpt)

    # fused attention in bfloat16 is slow backwards on a CPU for short sequences
    slow = device == "cpu" and autocast(device)._enabled
    attention = SDPBackend.MATH if slow else list(SDPBackend.__members__.values())
    began = saved = time.monotonic()
    before = seconds
    bar = tqdm(range(start, stop), initial=start, total=stop, desc=name, mininterval=30)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step, schedule)
        with sdpa_kernel(attention):
            torch.manual_seed(schedule.seed * 1_000_003 + step)
            loss, numbers = loss_fn(model, np.random.default_rng([schedule.seed, step]))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.max_norm)
        optimiser.step()
        _update_average(averaged, model, min(schedule.ema, (step + 1) / (step + 10)))
        seconds = before + time.monotonic() - began
        if step % 50 == 0 or step + 1 == stop:
            row = {
                "step": step,
                "seconds": round(seconds, 1),
                "loss": round(float(loss.detach()), 4),
                **numbers,
            }
            bar.set_postfix({k: v for k, v in row.items() if k not in ("step", "seconds")})
            with log_file.open("a") as f:
                f.write(json.dumps(row) + "\n")
        if step + 1 in schedule.snapshots:
            snapshots[step + 1] = {k: v.half().cpu() for k, v in averaged.state_dict().items()}
        if time.monotonic() - saved > 120:
            save(step + 1)
            saved = time.monotonic()
    if start < stop:
        save(stop)
    log = [json.loads(line) for line in log_file.read_text().splitlines()]
    return Trained(averaged.eval(), snapshots, seconds, log, max(start, stop))


def _learning_rate(step: int, s: Schedule) -> float:
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    if not s.cosine:
        return s.lr * min(1.0, (s.steps - step) / (s.cool or 1))
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def _update_average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    pairs = list(zip(averaged.parameters(), model.parameters(), strict=True))
    torch._foreach_lerp_([a for a, _ in pairs], [m.detach() for _, m in pairs], 1 - decay)
    for a, b in zip(averaged.buffers(), model.buffers(), strict=True):
        a.copy_(b)
