"""A card for every model of the laboratory, written from what was noted while it was built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from itemkit import schema

LIMITS = (
    "Trained on this project's renders only; on photographs its output means nothing. No photograph, no "
    "third-party weights, no personal data. MIT, as the code."
)

AGAIN = "The same as `{}`, from another seed and with half of the steps: is one model the reason?"
MODELS = {
    "clip": (
        "A small CLIP as an open_clip `local-dir`: a ViT with patches of 6 px and a word "
        "transformer, joint space of 128 dimensions. Image against caption, crop against phrase "
        "and patch against phrase are contrasted, the last two by the world's masks: its patch "
        "map is better than that of a CLIP trained on captions alone. Crops run from tight to loose, square "
        "or not, and show grounds too. Trained on a wide camera, as stock models are."
    ),
    "captioner": (
        "A small BLIP as a transformers folder: image to a sentence of the grammar, greedy decoding."
    ),
    "parser": "An English tagger and parser as a spaCy folder, for the grammar's sentences.",
    "object_detector": (
        "A small RT-DETRv2 as a transformers folder: boxes of twelve kinds and five settings from the image "
        "alone; a setting's box is the visible extent of its ground."
    ),
    "clip_second": AGAIN.format("clip"),
    "captioner_second": AGAIN.format("captioner"),
}
GENERATORS = {
    "flow": (
        "Conditional pixel flow matching (Lipman et al. 2022): a U-Net that predicts the picture (Li and He "
        "2025), classifier-free guidance 1.5, 20 Heun steps."
    ),
    "vq": ("VQ-VAE (van den Oord et al. 2017): 12 x 12 codes out of 512; the decoder of the next."),
    "latent_flow": (
        "`layout_flow` on the VQ-VAE's vectors (latent diffusion, Rombach et al. 2022): told where things "
        "stand, no guidance, 20 Heun steps."
    ),
    "layout_flow": (
        "Flow matching as `flow`, told for each pixel which thing or ground shows there (semantic image "
        "synthesis, Park et al. 2019); no guidance, 20 Heun steps. Layouts are those of the scenes asked for."
    ),
    "painter": (
        "The same network in one step from noise and layout to picture, trained by the energy score of "
        "patches (Gneiting and Raftery 2007; Shen and Meinshausen 2024)."
    ),
}
CAPTIONED = {
    "scene": "caption of the sample: every claim as asked",
    "f1": "objects, F1",
    "setting": "setting as asked",
    "invented": "told objects that were not asked for",
}
"""Columns of ``quality.csv`` in words."""
MEASURED = (
    "How samples are measured: they are photographed, the mini captioner tells the photographs, and its "
    "captions are held against the scenes that were asked for (shares of 1). The Fréchet distance is between "
    "the mini CLIP's embeddings of the samples and of as many renders of other scenes, times 1000, without "
    "the bias of small sets, so that it may fall below 0{floor}."
)
DETECTOR = (
    "The detector of the mini preset: five small MLPs on the misalignment of image and caption, averaged. It "
    "is used by `itemkit detect` where no other is named."
)


def write_cards(out: Path) -> None:
    """Write ``models/<name>/README.md`` for each model and ``generators.md`` for the generators.

    Parameters
    ----------
    out : Path
        Folder of the mini data, with ``cards.json`` and, where they are made already, ``quality.csv`` and
        ``models/detector``.
    """
    cards: dict[str, dict[str, Any]] = json.loads((out / "cards.json").read_text())
    measured = cards.get("measured", {})
    for name, what in MODELS.items():
        if (out / "models" / name).is_dir() and name in cards:
            results = {k.removeprefix(f"{name}_"): v for k, v in measured.items() if _owner(k) == name}
            on = "unseen renders"
            if "held_out" in cards[name]:
                results, on = cards[name]["held_out"], "unseen sentences of the grammar"
            table = _table({key.replace("_", " "): value for key, value in results.items()}, on)
            text = f"# {name}\n\n{what}\n\n{_training(cards[name])}\n\n{table}\n\n{LIMITS}\n"
            (out / "models" / name / "README.md").write_text(text)
    detector = out / "models" / "detector"
    if (detector / "detector.json").is_file():
        (detector / "README.md").write_text(
            _detector_card(json.loads((detector / "detector.json").read_text()))
        )
    quality = out / "quality.csv"
    found = pd.read_csv(quality).set_index("name") if quality.is_file() else pd.DataFrame()
    floor = ""
    if schema.REAL_GENERATOR in found.index:
        renders = _distance(found.loc[schema.REAL_GENERATOR])
        floor = f"; other renders, measured like samples, are at {renders}"
    leaks = out / "guards.csv"
    parts = [
        "# The generators\n\nTheir samples are committed (`fakes.parquet`, `ladders.parquet`), their weights "
        f"are not: `make lab` trains them again. {LIMITS}",
        MEASURED.format(floor=floor),
    ]
    for name, what in GENERATORS.items():
        if name in cards:
            table = _quality(found.loc[name]) if name in found.index else ""
            parts.append(f"## {name}\n\n{what}\n\n{_training(cards[name])}\n\n{table}".rstrip())
    if leaks.is_file():
        parts.append(_guards(pd.read_csv(leaks)))
    (out / "generators.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


FAIR = 0.60
"""A family is a fair fight if no guard reaches more than this through the camera."""
CONDITIONS = {"raw": "as painted", "camera": "through the camera", "jpeg": "camera and one random JPEG"}


def _guards(found: pd.DataFrame) -> str:
    """Tables of what each guard reaches, and which generators are a fair fight."""
    names = list(dict.fromkeys(found["generator"]))
    lines = [
        "## Leaks, measured",
        "What a detector reaches that sees no content: AUROC on the test split. *two*: boosted trees trained "
        "on renders and this very generator; *one*: the distance from training renders, no fake seen.",
    ]
    for condition, words in CONDITIONS.items():
        part = found[found["condition"] == condition]
        table = part.pivot(index=["guard", "classes"], columns="generator", values="value")[names]
        rows = [f"| {words} | | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
        for guard in dict.fromkeys(part["guard"]):
            for classes, word in ((2, "two"), (1, "one")):
                values = " | ".join(f"{v:.2f}" for v in table.loc[(guard, classes)])
                rows.append(f"| {guard} | {word} | {values} |")
        lines.append("\n".join(rows))
    worst = found[found["condition"] == "camera"].groupby("generator", sort=False)["value"].max()
    fair = [name for name in names if worst[name] <= FAIR]
    rest = [f"`{name}` ({worst[name]:.2f})" for name in names if name not in fair]
    lines.append(
        f"A fair fight through the camera (no guard above {FAIR:.2f}): "
        f"{', '.join(f'`{name}`' for name in fair) or 'none'}. Not: {', '.join(rest) or 'none'}."
    )
    return "\n\n".join(lines)


def _quality(row: pd.Series) -> str:
    """What is known of a generator's samples."""
    results = {"Fréchet distance × 1000": _distance(row)}
    results |= {words: row[key] for key, words in CAPTIONED.items() if key in row}
    return _table(results, f"{row['n']:.0f} samples")


def _distance(row: pd.Series) -> str:
    return f"{row['frechet']:.1f} (95 %: {row['frechet_low']:.1f} to {row['frechet_high']:.1f})"


def _detector_card(record: dict[str, Any]) -> str:
    """Card of the detector from its own ``detector.json``."""
    made, kind = record["trained_on"], record["representation"]
    counts = {part: made[f"{part}_images"] for part in ("train", "val")}
    real = {part: n[schema.REAL_GENERATOR] for part, n in counts.items()}
    fake = {part: sum(n.values()) - real[part] for part, n in counts.items()}
    names = ", ".join(f"`{name}`" for name in counts["train"] if name != schema.REAL_GENERATOR)
    share = record["selection_fraction"]
    facts = {
        "trained on": f"{real['train']:,} renders and {fake['train']:,} fakes ({names}) of the train split",
        "reads": f"{kind['level']} misalignment, {kind['kind']}, objects pooled by {kind['pooling']}",
        "calibration": f"{record['calibration']}, on {real['val']:,} renders and {fake['val']:,} fakes of "
        f"the val split; {share:.0%} of them stopped the training, the rest set p(fake) and the thresholds",
    }
    promises = {f"{float(rate):.0%} false positives": text for rate, text in record["thresholds"].items()}
    lines = "\n".join(f"- {key}: {value}" for key, value in (facts | promises).items())
    return (
        f"# detector\n\n{DETECTOR}\n\n{lines}\n\nNo generator is unseen by it: what a detector does on "
        "families it was not trained on is measured by `itemkit study --protocol mini`, with other detectors."
        f" {LIMITS}\n"
    )


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


def _table(results: dict[str, Any], on: str) -> str:
    if not results:
        return ""
    rows = [f"| {key} | {value} |" for key, value in results.items()]
    return "\n".join([f"| measured on {on} | |", "|---|---|", *rows])
