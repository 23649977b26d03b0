"""A card for every model of the laboratory, written from what was noted while it was built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

LIMITS = (
    "Trained on this project's renders only; on photographs its output means nothing. No photograph, no "
    "third-party weights, no personal data. MIT, as the code."
)

AGAIN = "The same as `{}`, from another seed and with fewer steps: is one model the reason?"
MODELS = {
    "clip": (
        "A small CLIP as an open_clip `local-dir`: a ViT with patches of 6 px and a word "
        "transformer, joint space of 128 dimensions. Image against caption, crop against phrase "
        "and patch against phrase are contrasted, the last two by the world's masks: its patch "
        "map is better than that of a CLIP trained on captions alone."
    ),
    "captioner": (
        "A small BLIP as a transformers folder: image to a sentence of the grammar, greedy decoding."
    ),
    "parser": "An English tagger and parser as a spaCy folder, for the grammar's sentences.",
    "clip_second": AGAIN.format("clip"),
    "captioner_second": AGAIN.format("captioner"),
}
GENERATORS = {
    "flow": (
        "Conditional pixel flow matching (Lipman et al. 2022): U-Net, classifier-free guidance "
        "1.5, 20 Heun steps."
    ),
    "vae": (
        "Convolutional conditional VAE (Kingma and Welling 2014) with sigma-VAE likelihood "
        "(Rybkin et al. 2021)."
    ),
    "gan": (
        "Conditional GAN: relativistic loss with R1 and R2 penalties (R3GAN, Huang et al. 2024), "
        "projection critic (Miyato and Koyama 2018)."
    ),
    "vq": ("VQ-VAE (van den Oord et al. 2017): 12 x 12 codes out of 512; the decoder of the next two."),
    "latent_flow": (
        "Flow matching on the VQ-VAE's vectors (latent diffusion, Rombach et al. 2022), guidance "
        "1.5, 20 Heun steps."
    ),
    "vq_prior": "Autoregressive transformer over the VQ-VAE's codes, temperature 1.",
}


def write_cards(out: Path) -> None:
    """Write ``models/<name>/README.md`` for each model and ``generators.md`` for the generators.

    Parameters
    ----------
    out : Path
        Folder of the mini data, with ``cards.json`` and, for the generators, ``quality.csv``.
    """
    cards: dict[str, dict[str, Any]] = json.loads((out / "cards.json").read_text())
    measured = cards.get("measured", {})
    for name, what in MODELS.items():
        if (out / "models" / name).is_dir() and name in cards:
            results = {k.removeprefix(f"{name}_"): v for k, v in measured.items() if _owner(k) == name}
            results |= cards[name].get("held_out", {})
            text = f"# {name}\n\n{what}\n\n{_training(cards[name])}\n\n{_table(results)}\n\n{LIMITS}\n"
            (out / "models" / name / "README.md").write_text(text)
    quality = out / "quality.csv"
    found = pd.read_csv(quality).set_index("name") if quality.is_file() else pd.DataFrame()
    parts = [
        "# The generators\n\nTheir samples are committed (`fakes.parquet`, `ladders.parquet`), their weights "
        f"are not: `make lab` trains them again. {LIMITS}"
    ]
    for name, what in GENERATORS.items():
        if name in cards:
            results = found.loc[name].drop("n").to_dict() if name in found.index else {}
            parts.append(f"## {name}\n\n{what}\n\n{_training(cards[name])}\n\n{_table(results)}".rstrip())
    (out / "generators.md").write_text("\n\n".join(parts) + "\n")


def _owner(key: str) -> str:
    """Model that a measurement belongs to: the longest name that begins it."""
    return max((n for n in MODELS if key.startswith(f"{n}_")), key=len, default="")


def _training(card: dict[str, Any]) -> str:
    facts = {
        "data": "60,000 renders of the split `models`" if "batch" in card else "sentences of the grammar",
        "steps": f"{card['steps']:,} of {card['batch']} images" if "batch" in card else "",
        "parameters": f"{card['parameters']:,}" if "parameters" in card else "",
        "seconds": f"{card['seconds']:,} (other work ran on the same machine)" if "seconds" in card else "",
        "device": f"{card['device']} ({card['machine']}), torch {card['torch']}",
        "note": card.get("note", ""),
    }
    return "\n".join(f"- {key}: {value}" for key, value in facts.items() if value)


def _table(results: dict[str, Any]) -> str:
    if not results:
        return ""
    rows = [f"| {key.replace('_', ' ')} | {value} |" for key, value in results.items()]
    return "\n".join(["| measured on unseen renders | |", "|---|---|", *rows])
