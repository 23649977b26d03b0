"""What the benchmarks run on: models with random weights at true size, and images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from itemkit.devices import choose_device, choose_precision
from itemkit.models import Models

CAPTION_TOKENS = 20  # of a captioner with random weights, which would not stop by itself
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "grey")
KINDS = ("dog", "bench", "boat", "tree", "car", "child", "horse", "table", "bird", "ball", "house", "road")


class GivenObjects:
    """Takes the place of a parser where captions are given with their objects: parts between "and"."""

    def objects(self, captions: Sequence[str]) -> list[list[str]]:
        """Phrases of each caption."""
        return [list(dict.fromkeys(caption.split(" and "))) for caption in captions]

    def fingerprint(self) -> dict[str, Any]:
        """Constant."""
        return {"kind": "given objects"}


def random_encoder(name: str, device: torch.device, precision: str) -> Any:
    """An open_clip model of true size with random weights: for its speed only, never inside itemkit."""
    import open_clip

    from itemkit.encoder import Encoder

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=None)
    model = model.to(device=device, dtype=choose_precision(precision, device))
    return Encoder(model, preprocess, open_clip.get_tokenizer(name), {"name": f"{name} (random weights)"})


def random_captioner(size: str, device: torch.device, precision: str, tokens: int) -> Any:
    """A BLIP captioner of true size with random weights: for its speed only, never inside itemkit."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    from itemkit.captions import Caption

    vision = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    config = BlipConfig(
        text_config={"encoder_hidden_size": 1024 if size == "large" else 768},
        vision_config=vision if size == "large" else {},
    )
    torch.manual_seed(0)
    dtype = choose_precision(precision, device)
    model = BlipForConditionalGeneration(config).eval().to(device=device, dtype=dtype)
    side = config.vision_config.image_size

    class Captioner:
        """Resizes, encodes and decodes; the text is of no use, so a fixed one is returned."""

        def caption(self, images: Sequence[Image.Image]) -> list[Caption]:
            pixels = np.stack([np.asarray(i.resize((side, side), Image.Resampling.BICUBIC)) for i in images])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device=device, dtype=dtype) / 127.5 - 1
            with torch.no_grad():
                model.generate(x, min_new_tokens=tokens, max_new_tokens=tokens, num_beams=1, do_sample=False)
            return [Caption(caption_of(i), -1.0) for i in range(len(images))]

        def fingerprint(self) -> dict[str, Any]:
            return {"kind": f"BLIP {size} with random weights"}

    return Captioner()


def caption_of(number: int) -> str:
    """A caption with three objects; captions repeat, as those of a real captioner do."""
    pick = np.random.default_rng(number % 4096)
    phrases = [
        f"a {COLOURS[pick.integers(len(COLOURS))]} {KINDS[i]}" for i in pick.permutation(len(KINDS))[:3]
    ]
    return " and ".join(phrases)


def read_images(folder: str | None, n: int, scratch: Path) -> list[str]:
    """Up to n image files of a folder, or n made-up JPEG files of 500 x 375 pixels."""
    if folder is not None:
        ends = (".jpg", ".jpeg", ".png", ".webp", ".ppm")
        paths = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in ends)
        if not paths:
            sys.exit(f"{folder} holds no images ({', '.join(ends)})")
        return paths[:n]
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = np.clip(fine + rng.normal(0, 6, fine.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(scratch / f"{i:06d}.jpg", quality=90)
    return [str(scratch / f"{i:06d}.jpg") for i in range(n)]


def as_manifest(paths: Sequence[str], user_captions: bool) -> pd.DataFrame:
    """A manifest of unlabelled images."""
    captions = [caption_of(i) if user_captions else None for i in range(len(paths))]
    return pd.DataFrame({"path": paths, "label": pd.array([pd.NA] * len(paths), "Int8"), "caption": captions})


def build(args: argparse.Namespace) -> Any:
    """The models to measure."""
    device = choose_device(args.device)
    if args.random_true_size:
        from itemkit.regions import make_localiser

        encoder = random_encoder(args.random_true_size, device, args.precision)
        captioner = None
        if args.random_captioner:
            captioner = random_captioner(args.random_captioner, device, args.precision, CAPTION_TOKENS)
        return Models(encoder, captioner, GivenObjects(), make_localiser(args.localiser or "dense", encoder))
    from itemkit.presets import get_preset

    preset = get_preset(args.preset, **({"localiser": args.localiser} if args.localiser else {}))
    if args.precision != "auto":
        preset = replace(preset, precision=args.precision)
    return preset.build(device)
