"""What the benchmarks run on: models with random weights at true size, in folders, and images.

The folders are in the formats of the pretrained ones and are read by the loaders that everybody calls: it is
itemkit's own encoder, captioner and object detector that are measured. Random weights tell the speed and
nothing else.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from itemkit.captions import Captioner, load_captioner
from itemkit.encoder import load_encoder
from itemkit.models import Models
from itemkit.presets import mini_folder
from itemkit.regions import make_localiser

CAPTION_TOKENS = 20  # of a captioner with random weights, which would not stop by itself
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "grey")
KINDS = ("dog", "bench", "boat", "tree", "car", "child", "horse", "table", "bird", "ball", "house", "road")
DISTINCT = 256  # made-up pictures; more files are copies of them with other bytes behind the picture
TOY = "toy"  # in place of a size: the models of the preset mini


class GivenObjects:
    """Takes the place of a parser where captions are given with their objects: parts between "and"."""

    version = "1"

    def objects(self, captions: Sequence[str]) -> list[list[str]]:
        """Phrases of each caption."""
        return [list(dict.fromkeys(caption.split(" and "))) for caption in captions]


class MadeUpWords:
    """A captioner's tokenizer, but what tokens of random weights say is replaced by captions of objects."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.numbers = tokenizer, itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def batch_decode(self, tokens: Sequence[Any], **options: Any) -> list[str]:
        """One caption for each row of tokens."""
        return [caption_of(next(self.numbers)) for _ in tokens]


def caption_of(number: int) -> str:
    """A caption with three objects; captions repeat, as those of a real captioner do."""
    pick = np.random.default_rng(number % 4096)
    phrases = [
        f"a {COLOURS[pick.integers(len(COLOURS))]} {KINDS[i]}" for i in pick.permutation(len(KINDS))[:3]
    ]
    return " and ".join(phrases)


# -- models --------------------------------------------------------------------------------------------------


def once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder if it is not there; one that was cut off is never taken for whole."""
    if not folder.exists():
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        write(part)
        part.rename(folder)
    return folder


def save(model: torch.nn.Module, folder: Path, *processors: Any) -> None:
    """Write a transformers model in half the bytes, and what prepares its inputs."""
    model.to(torch.bfloat16)
    for part in (model, *processors):
        part.save_pretrained(folder)


def write_encoder(folder: Path, name: str, device: torch.device) -> None:
    """An open_clip model; its random numbers are drawn on the device."""
    import open_clip
    from safetensors.torch import save_file

    with torch.device(device):
        state = open_clip.create_model(name).state_dict()
    halves = {key: value.to(torch.bfloat16).cpu().contiguous() for key, value in state.items()}
    save_file(halves, folder / "open_clip_model.safetensors")
    body = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(body))


def write_captioner(folder: Path, size: str, device: torch.device) -> None:
    """A BLIP of size "base" or "large"."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    from minilab.formats import word_tokenizer

    tokenizer = word_tokenizer([f"word{i}" for i in range(30_000)], 512)
    ends = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "sep", "pad")
    }
    text = {"vocab_size": len(tokenizer), **ends}
    vision: dict[str, Any] = {"initializer_range": 0.02}  # its default is meant for weights that get loaded
    if size == "large":
        text["encoder_hidden_size"] = vision["hidden_size"] = 1024
        vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device(device):
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    images = BlipImageProcessor(size={"height": 384, "width": 384})
    save(model, folder, BlipProcessor(image_processor=images, tokenizer=tokenizer))


def write_grounding_dino(folder: Path, size: str, device: torch.device) -> None:
    """A Grounding DINO of size "base", or a toy."""
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    # the ids of [CLS], [SEP], "." and "?" are written into the model's code
    fixed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    names = [fixed.get(i) or f"[unused{i}]" for i in range(2000)] + ["a", "and", *COLOURS, *KINDS]
    names += [f"word{i}" for i in range(30_522 - len(names))]
    swin: dict[str, Any] = {"depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "embed_dim": 128}
    swin |= {"window_size": 12, "image_size": 384}
    text: dict[str, Any] = {"model_type": "bert"}
    sizes: dict[str, int] = {}
    side = 800
    if size == TOY:
        swin = {"depths": [1] * 4, "num_heads": [1, 2, 2, 2], "embed_dim": 16, "window_size": 4}
        text |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        sizes = {"d_model": 32, "num_queries": 20, "encoder_layers": 2, "decoder_layers": 2}
        sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
        side = 160
    backbone = SwinConfig(**swin, out_features=["stage2", "stage3", "stage4"])
    with torch.device(device):
        config = GroundingDinoConfig(backbone_config=backbone, text_config=text, **sizes)
        model = GroundingDinoForObjectDetection(config)
    images = GroundingDinoImageProcessor(size={"shortest_edge": side, "longest_edge": side * 5 // 3})
    tokenizer = BertTokenizer(vocab={name: i for i, name in enumerate(names)})
    save(model, folder, GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer))


def encoder_at(scratch: Path, name: str, device: torch.device, precision: str) -> Any:
    """An encoder of open_clip by name, or a toy."""
    folder = mini_folder() / "models" / "clip"
    if name != TOY:
        folder = once(scratch / name, lambda part: write_encoder(part, name, device))
    return load_encoder(folder, device=device, precision=precision)


def captioner_at(
    scratch: Path, size: str, device: torch.device, precision: str, **decoding: Any
) -> Captioner:
    """BLIP of a size, or a toy, that always says as many tokens."""
    folder = mini_folder() / "models" / "captioner"
    if size != TOY:
        folder = once(scratch / f"blip-{size}", lambda part: write_captioner(part, size, device))
    tokens = {"min_new_tokens": CAPTION_TOKENS, "max_new_tokens": CAPTION_TOKENS}
    captioner = load_captioner(folder, device, precision, **tokens | decoding)
    captioner.tokenizer = MadeUpWords(captioner.tokenizer)
    return captioner


def models_at(
    scratch: Path,
    encoder: str,
    captioner: str | None,
    device: torch.device,
    precision: str,
    localiser: str | None = "dense",
) -> Models:
    """Models of these sizes; captions name their objects, so the parser is a stand-in."""
    joint = encoder_at(scratch, encoder, device, precision)
    teller = captioner and captioner_at(scratch, captioner, device, precision)
    finder = localiser and make_localiser(localiser, joint)
    return Models(joint, teller or None, GivenObjects(), finder or None)


# -- images --------------------------------------------------------------------------------------------------


def read_images(folder: str | None, n: int, scratch: Path) -> list[str]:
    """Up to n image files of a folder, or n made-up JPEG files of 500 x 375 pixels."""
    if folder is not None:
        ends = (".jpg", ".jpeg", ".png", ".webp", ".ppm")
        paths = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in ends)
        if not paths:
            sys.exit(f"{folder} holds no images ({', '.join(ends)})")
        return paths[:n]

    def write(part: Path) -> None:
        rng = np.random.default_rng(0)
        for i in range(n):
            file = part / f"{i:06d}.jpg"
            if i >= DISTINCT:  # decoders stop at the end of the picture, hashes do not
                file.write_bytes((part / f"{i % DISTINCT:06d}.jpg").read_bytes() + i.to_bytes(4, "big"))
                continue
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            fine = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
            noise = rng.standard_normal(fine.shape, np.float32) * 6
            Image.fromarray(np.clip(fine + noise, 0, 255).astype(np.uint8)).save(file, quality=90)

    return sorted(str(p) for p in once(scratch / f"images-{n}", write).iterdir())


def as_manifest(paths: Sequence[str], user_captions: bool) -> pd.DataFrame:
    """A manifest of unlabelled images."""
    captions = [caption_of(i) if user_captions else None for i in range(len(paths))]
    return pd.DataFrame({"path": paths, "label": pd.array([pd.NA] * len(paths), "Int8"), "caption": captions})
