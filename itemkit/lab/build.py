"""``make lab``: everything under data/mini from nothing but this code, part by part."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from itemkit.errors import InputError
from itemkit.lab import captioner, clip, fakes, flow, truth, vae
from itemkit.lab.formats import save_blip, save_clip
from itemkit.lab.parser import train_parser
from itemkit.lab.renders import RenderSet, cached_renders
from itemkit.lab.training import Trained, train
from itemkit.weights import tidy

N_RENDERS = 60_000
EARLY_STEP = flow.SCHEDULE.snapshots[1]


class Build:
    """Paths and settings of one build.

    Parameters
    ----------
    out : Path
        Folder of the mini data (``data/mini``).
    work : Path
        Folder for renders and checkpoints; an interrupted build goes on from here.
    device : str
        ``cpu`` or ``cuda``.
    """

    def __init__(self, out: Path, work: Path, device: str = "cpu"):
        self.out, self.work, self.device = Path(out), Path(work), device
        self.models, self.generators = self.out / "models", self.out / "generators"

    @property
    def renders(self) -> RenderSet:
        """The renders that all models learn from."""
        return cached_renders("models", N_RENDERS, self.work / "renders")

    def card(self, name: str, trained: Trained | None, **facts: Any) -> None:
        """Add a part's training facts and measurements to ``cards.json``."""
        path = self.out / "cards.json"
        cards = json.loads(path.read_text()) if path.exists() else {}
        card = {"device": self.device, "machine": platform.machine(), "torch": torch.__version__, **facts}
        if trained is not None:
            card["seconds"] = round(trained.seconds)
            card["last_log"] = trained.log[-1]
        cards[name] = card
        path.write_text(json.dumps(cards, indent=2, sort_keys=True) + "\n")

    def run(self, name: str, lesson: torch.nn.Module, schedule: Any) -> Trained:
        """Train one lesson in the work folder."""
        return train(name, lesson, lambda m, rng: m(rng), schedule, self.work / "runs", self.device)


def build_parser(b: Build) -> None:
    """Caption parser."""
    began = time.monotonic()
    shutil.rmtree(b.models / "parser", ignore_errors=True)
    scores = train_parser(b.models / "parser")
    b.card("parser", None, seconds=round(time.monotonic() - began), held_out=scores)


def build_clip(b: Build) -> None:
    """Mini CLIP."""
    torch.manual_seed(clip.SCHEDULE.seed)
    lesson = clip.ClipLesson(b.renders, b.device)
    trained = b.run("clip", lesson, clip.SCHEDULE)
    save_clip(b.models / "clip", trained.model.clip, lesson.config, lesson.tokenizer)
    _halve(b.models / "clip" / "open_clip_model.safetensors")
    b.card(
        "clip", trained, steps=clip.SCHEDULE.steps, batch=clip.BATCH, parameters=_count(trained.model.clip)
    )


def build_captioner(b: Build) -> None:
    """Mini captioner."""
    torch.manual_seed(captioner.SCHEDULE.seed)
    lesson = captioner.CaptionerLesson(b.renders, b.device)
    trained = b.run("captioner", lesson, captioner.SCHEDULE)
    save_blip(b.models / "captioner", trained.model.blip, lesson.tokenizer)
    _halve(b.models / "captioner" / "model.safetensors")
    facts = {
        "steps": captioner.SCHEDULE.steps,
        "batch": captioner.BATCH,
        "parameters": _count(trained.model.blip),
    }
    b.card("captioner", trained, **facts)


def build_flow(b: Build) -> None:
    """Flow generator, and its early stage."""
    torch.manual_seed(flow.SCHEDULE.seed)
    trained = b.run("flow", flow.FlowLesson(b.renders, b.device), flow.SCHEDULE)
    _save_half(b.generators / "flow.safetensors", trained.model.unet.state_dict())
    early = {k.removeprefix("unet."): v for k, v in trained.snapshots[EARLY_STEP].items()}
    _save_half(b.work / "flow_early.safetensors", early)  # not committed: its fakes are
    facts = {"steps": flow.SCHEDULE.steps, "early_steps": EARLY_STEP, "batch": flow.BATCH}
    b.card("flow", trained, **facts, parameters=_count(trained.model.unet))


def build_vae(b: Build) -> None:
    """VAE generator."""
    torch.manual_seed(vae.SCHEDULE.seed)
    trained = b.run("vae", vae.VaeLesson(b.renders, b.device), vae.SCHEDULE)
    _save_half(b.generators / "vae.safetensors", trained.model.vae.state_dict())
    b.card("vae", trained, steps=vae.SCHEDULE.steps, batch=vae.BATCH, parameters=_count(trained.model.vae))


def build_fakes(b: Build) -> None:
    """Fake images."""
    began = time.monotonic()
    table = fakes.build_fakes(
        {g: b.work if g == "flow_early" else b.generators for g in fakes.GENERATORS}, b.device
    )
    table.to_parquet(b.out / "fakes.parquet", index=False, compression="none")  # PNG is compressed already
    b.card("fakes", None, seconds=round(time.monotonic() - began), images=len(table))


def build_measure(b: Build) -> None:
    """What the models can do, measured against the truth; and hashes of all files."""
    b.card("measured", None, **truth.measure(b.models, device=b.device))
    (b.out / "hashes.json").write_text(json.dumps(file_hashes(b.out), indent=2) + "\n")


PARTS: dict[str, Callable[[Build], None]] = {
    "parser": build_parser,
    "clip": build_clip,
    "captioner": build_captioner,
    "flow": build_flow,
    "vae": build_vae,
    "fakes": build_fakes,
    "measure": build_measure,
}


def build(out: Path, work: Path, parts: list[str] | None = None, device: str = "cpu") -> None:
    """Build the laboratory, or some parts of it, in order.

    Parameters
    ----------
    out, work, device
        See :class:`Build`.
    parts : list of str, optional
        Keys of ``PARTS``; all of them by default.
    """
    b = Build(out, work, device)
    b.out.mkdir(parents=True, exist_ok=True)
    for name in PARTS if parts is None else parts:
        print(f"[{name}] {PARTS[name].__doc__}", file=sys.stderr, flush=True)
        PARTS[name](b)


def check(out: Path) -> list[str]:
    """Compare the committed files with their hashes and measure the models again.

    Parameters
    ----------
    out : Path
        Folder of the mini data.

    Returns
    -------
    list of str
        One line for every difference; empty when all is as the cards say.
    """
    if not (out / "hashes.json").is_file():
        raise InputError(f"there is no laboratory in {tidy(out)} (no hashes.json); `make lab` builds one")
    stored, found = json.loads((out / "hashes.json").read_text()), file_hashes(out)
    problems = [
        f"{k}: expected {stored.get(k, 'no such file')}, found {found.get(k, 'no such file')}"
        for k in sorted(stored.keys() | found.keys())
        if stored.get(k) != found.get(k)
    ]
    card = json.loads((out / "cards.json").read_text())["measured"]
    for key, value in truth.measure(out / "models").items():
        if isinstance(value, float) and abs(value - card[key]) > 0.005:
            problems.append(f"{key}: the card says {card[key]}, measured now {value}")
    return problems


def file_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every committed model and image file under the mini data."""
    files = [p for d in ("models", "generators") for p in sorted((out / d).rglob("*")) if p.is_file()]
    files = [p for p in files if p.parent.name != "detector"]  # trained from all the rest
    files += [p for p in (out / "fakes.parquet",) if p.is_file()]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _halve(path: Path) -> None:
    """Store weights in float16: half the size in the repository; they are loaded as float32 again."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})  # transformers asks for this note


def _save_half(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().cpu().contiguous() for k, v in state.items()}, path)
