"""``make lab``: everything under data/mini from nothing but this code, part by part."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from itemkit._files import atomic_write
from itemkit.captions import load_captioner
from itemkit.encoder import load_encoder
from itemkit.errors import InputError
from itemkit.models import tidy
from minilab import (
    captioner,
    choices,
    clip,
    data,
    fakes,
    flow,
    guards,
    ladders,
    latent,
    novelty,
    object_detector,
    painter,
    probes,
    truth,
    vq,
)
from minilab.camera import CAMERA, WIDE, Camera
from minilab.cards import write_cards
from minilab.detector import laboratory
from minilab.formats import save_blip, save_clip
from minilab.parser import train_parser
from minilab.renders import RenderSet, cached_renders
from minilab.training import Schedule, Trained, train

N_RENDERS = 60_000
SECOND_SEED, HALF = 100, 0.5
"""Of the second of each model: other first weights, another order of the same renders, half of the steps."""


class Build:
    """Paths and settings of one build.

    Parameters
    ----------
    out : Path
        Folder of the mini data (``data/mini``).
    work : Path
        Folder for renders and checkpoints; an interrupted build goes on from here.
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``.
    until : int, optional
        Cut trainings of a constant rate off at this step; a later build prolongs them.
    """

    def __init__(self, out: Path, work: Path, device: str = "cpu", until: int | None = None):
        self.out, self.work, self.device, self.until = Path(out), Path(work), device, until
        self.models, self.generators = self.out / "models", self.work / "generators"

    @property
    def renders(self) -> RenderSet:
        """The renders that all models learn from."""
        return cached_renders("models", N_RENDERS, self.work / "renders")

    def note(self, name: str, **facts: Any) -> None:
        """Write what is known of a part to ``cards.json``."""
        path = self.out / "cards.json"
        made = {"device": self.device, "machine": platform.machine(), "torch": torch.__version__, **facts}
        with FileLock(self.out / ".cards.lock"):  # parts may be built side by side
            cards = json.loads(path.read_text()) if path.exists() else {}
            text = json.dumps(cards | {name: made}, indent=2, sort_keys=True) + "\n"
            atomic_write(path, text.encode())

    def card(self, name: str, trained: Trained, batch: int, model: torch.nn.Module) -> None:
        """Write a training's facts to ``cards.json``."""
        self.note(
            name,
            steps=trained.steps,
            batch=batch,
            parameters=sum(p.numel() for p in model.parameters()),
            seconds=round(trained.seconds),
            last_log=trained.log[-1],
        )

    def run(self, name: str, lesson: torch.nn.Module, schedule: Schedule) -> Trained:
        """Train one lesson in the work folder."""
        return train(
            name, lesson, lambda m, rng: m(rng), schedule, self.work / "runs", self.device, self.until
        )

    def generator(
        self, name: str, make: Callable[[], torch.nn.Module], model: str, schedule: Schedule, batch: int
    ) -> None:
        """Train a generator; keep the weights of ``lesson.<model>``, and of its stages as ``name@step``."""
        torch.manual_seed(schedule.seed)
        trained = self.run(name, make(), schedule)
        _save_half(self.generators / f"{name}.safetensors", getattr(trained.model, model).state_dict())
        for step, state in trained.snapshots.items():
            stage = {k.removeprefix(f"{model}."): v for k, v in state.items() if k.startswith(f"{model}.")}
            _save_half(self.generators / f"{name}@{step}.safetensors", stage)
        self.card(name, trained, batch, getattr(trained.model, model))


def build_parser(b: Build) -> None:
    """Caption parser."""
    began = time.monotonic()
    shutil.rmtree(b.models / "parser", ignore_errors=True)
    scores = train_parser(b.models / "parser")
    b.note("parser", seconds=round(time.monotonic() - began), held_out=scores)


def build_clip(
    b: Build, name: str = "clip", seed: int = 0, camera: Camera = WIDE, share: float = 1.0
) -> None:
    """Mini CLIP."""
    torch.manual_seed(seed)
    lesson = clip.ClipLesson(b.renders, b.device, camera)
    trained = b.run(name, lesson, _part(clip.SCHEDULE, seed, share))
    models = b.models if camera == WIDE else b.work / "models"  # a control, not committed
    save_clip(models / name, trained.model.clip, lesson.config, lesson.tokenizer)
    _halve(models / name / "open_clip_model.safetensors")
    if camera == WIDE:
        b.card(name, trained, clip.BATCH + clip.CROPS, trained.model.clip)


def build_captioner(b: Build, name: str = "captioner", seed: int = 1, share: float = 1.0) -> None:
    """Mini captioner."""
    torch.manual_seed(seed)
    lesson = captioner.CaptionerLesson(b.renders, b.device)
    trained = b.run(name, lesson, _part(captioner.SCHEDULE, seed, share))
    save_blip(b.models / name, trained.model.blip, lesson.tokenizer)
    _halve(b.models / name / "model.safetensors")
    b.card(name, trained, captioner.BATCH, trained.model.blip)


def build_object_detector(b: Build) -> None:
    """Mini object detector."""
    name, schedule = "object_detector", replace(object_detector.SCHEDULE, seed=2)
    torch.manual_seed(schedule.seed)
    lesson = object_detector.DetectorLesson(b.renders, b.device)
    trained = b.run(name, lesson, schedule)
    object_detector.save_object_detector(b.models / name, trained.model.detector)
    _halve(b.models / name / "model.safetensors")
    b.card(name, trained, object_detector.BATCH, trained.model.detector)


def build_flow(b: Build) -> None:
    """Pixel flow."""
    b.generator(
        "flow", lambda: flow.FlowLesson(flow.UNet(), b.renders, b.device), "unet", flow.SCHEDULE, flow.BATCH
    )


def build_vq(b: Build) -> None:
    """VQ-VAE, the decoder of the next."""
    b.generator("vq", lambda: vq.VqLesson(b.renders, b.device), "vq", vq.SCHEDULE, vq.BATCH)


def build_latent_flow(b: Build) -> None:
    """Latent flow."""
    latents = latent.encode_renders(fakes.load_generator("vq", b.generators, b.device), b.renders, b.device)
    make = lambda: painter.LayoutFlowLesson(b.renders, b.device, latent.make_unet(), latents)  # noqa: E731
    b.generator("latent_flow", make, "net", latent.SCHEDULE, flow.BATCH)


def build_layout_flow(b: Build) -> None:
    """Pixel flow that is told where things stand."""
    make = partial(painter.LayoutFlowLesson, b.renders, b.device)
    b.generator("layout_flow", make, "net", painter.FLOW_SCHEDULE, flow.BATCH)


def build_painter(b: Build) -> None:
    """Layout to picture in one step."""
    b.generator(
        "painter", partial(painter.PainterLesson, b.renders, b.device), "net", painter.SCHEDULE, painter.BATCH
    )


def build_fakes(b: Build) -> None:
    """Fake images."""
    began = time.monotonic()
    table, raw = fakes.build_fakes(b.generators, b.device)
    raw = pd.concat([data.raw_reals(), raw], ignore_index=True)
    for name, rows in {"fakes": table, "raw": raw, "originals": fakes.edit_originals()}.items():
        path = b.out / f"{name}.parquet"
        rows.to_parquet(path, index=False, compression="none")  # PNG is compressed already
    b.note("fakes", seconds=round(time.monotonic() - began), images=len(table))


def build_data(b: Build) -> None:
    """Real images, new renders, the doctor's questions."""
    began = time.monotonic()
    for name, make in data.FILES.items():
        make().to_parquet(b.out / name, index=False, compression="none")
    b.note("data", seconds=round(time.monotonic() - began))


def build_probes(b: Build) -> None:
    """Probes and shifted worlds."""
    probes.build_probes().to_parquet(b.out / "probes.parquet", index=False, compression="none")


def build_guards(b: Build) -> None:
    """What gives each generator away without content, under all three conditions."""
    guards.three_conditions(b.generators, b.device).to_csv(b.out / "guards.csv", index=False)


def build_ladders(b: Build) -> None:
    """Ladders, and how close every generator comes to the renders."""
    began = time.monotonic()
    encoder = load_encoder(b.models / "clip", device=b.device)
    teller = load_captioner(b.models / "captioner", device=b.device)
    images, table = ladders.build_ladders(b.generators, encoder, teller, b.device)
    images.to_parquet(b.out / "ladders.parquet", index=False, compression="none")
    table.to_csv(b.out / "quality.csv", index=False)
    b.note("ladders", seconds=round(time.monotonic() - began), images=len(images))


def build_choices(b: Build) -> None:
    """What the defaults of preset mini rest on."""
    with laboratory(b.out):
        choices.choices(b.work / "choices", b.device).to_csv(b.out / "choices.csv", index=False)


def build_novelty(b: Build) -> None:
    """Whether misalignment is only novelty."""
    with laboratory(b.out):
        page = novelty.novelty(b.work / "models" / "clip_narrow", b.work / "choices", b.device)
    (b.out / "novelty.md").write_text(page)


def build_measure(b: Build) -> None:
    """What the models can do, measured against the truth."""
    b.note("measured", **truth.measure(b.models, device=b.device))


def build_cards(b: Build) -> None:
    """Cards of all models, from what was noted."""
    write_cards(b.out)


PARTS: dict[str, Callable[[Build], None]] = {
    "parser": build_parser,
    "clip": build_clip,
    "captioner": build_captioner,
    "object_detector": build_object_detector,
    "clip_second": partial(build_clip, name="clip_second", seed=SECOND_SEED, share=HALF),
    "captioner_second": partial(build_captioner, name="captioner_second", seed=SECOND_SEED, share=HALF),
    "clip_narrow": partial(build_clip, name="clip_narrow", camera=CAMERA),
    "flow": build_flow,
    "vq": build_vq,
    "latent_flow": build_latent_flow,
    "layout_flow": build_layout_flow,
    "painter": build_painter,
    "data": build_data,
    "fakes": build_fakes,
    "probes": build_probes,
    "guards": build_guards,
    "ladders": build_ladders,
    "measure": build_measure,
    "choices": build_choices,
    "novelty": build_novelty,
    "cards": build_cards,
}


def build(
    out: Path,
    work: Path,
    parts: list[str] | None = None,
    device: str = "cpu",
    until: int | None = None,
) -> None:
    """Build the laboratory, or some parts of it, in order; then hash all of its files.

    Parameters
    ----------
    out, work, device, until
        See :class:`Build`.
    parts : list of str, optional
        Keys of ``PARTS``; all of them by default.
    """
    b = Build(out, work, device, until)
    b.out.mkdir(parents=True, exist_ok=True)
    for name in PARTS if parts is None else parts:
        print(f"[{name}]", file=sys.stderr, flush=True)
        PARTS[name](b)
    (b.out / "hashes.json").write_text(json.dumps(file_hashes(b.out), indent=2) + "\n")


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
        if isinstance(value, float) and not abs(value - card.get(key, float("nan"))) <= 0.005:
            problems.append(f"{key}: the card says {card.get(key, 'nothing')}, measured now {value}")
    return problems


def file_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every committed model and image file under the mini data."""
    files = [p for p in sorted((out / "models").rglob("*")) if p.is_file()]
    # the detector is trained from all the rest; cards say what cards.json says
    files = [p for p in files if p.parent.name != "detector" and p.suffix != ".md"]
    files += [
        *sorted(out.glob("*.parquet")),
        *(out / name for name in ("guards.csv", "quality.csv", "choices.csv") if (out / name).is_file()),
    ]
    files = [p for p in files if p.name != "study.parquet"]  # scores of a study that has seen all the rest
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _part(schedule: Schedule, seed: int, share: float) -> Schedule:
    return replace(schedule, seed=seed, steps=round(share * schedule.steps))


def _halve(path: Path) -> None:
    """Store weights in float16: half the size in the repository; they are loaded as float32 again."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})  # transformers asks for this note


def _save_half(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().cpu().contiguous() for k, v in state.items()}, path)
