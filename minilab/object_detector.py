"""The mini object detector: an RT-DETRv2 trained from scratch on renders, which sees the image alone.

Its labels are the nouns of the world: twelve kinds and five settings; a setting's box is the visible extent
of its ground. It shares no weight with the mini CLIP, so its doubt is a control without CLIP and text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from minilab.camera import WIDE
from minilab.grammar import KINDS, SETTINGS
from minilab.renders import GROUND, RenderSet, to_pixels
from minilab.training import Schedule, autocast
from minilab.world import SIZE

LABELS = KINDS + SETTINGS
SIDE = 2 * SIZE
"""Pictures are enlarged to this: at their own size the finest features, at stride 8, were too coarse."""
SCHEDULE = Schedule(
    steps=3200, lr=6e-4, cosine=False, warmup=150, ema=0.998, weight_decay=0.01, seed=2, max_norm=0.5
)
BATCH = 32
LEAST_PX = 8
"""Things with fewer visible pixels than this have no box to learn."""


def make_detector() -> RTDetrV2ForObjectDetection:
    """Build an untrained object detector of 1.2 million parameters."""
    hidden = [64, 96, 128, 160]
    backbone = RTDetrResNetConfig(
        embedding_size=32, hidden_sizes=hidden, depths=[1, 1, 1, 1], layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrV2Config(
        backbone_config=backbone, freeze_backbone_batch_norms=False, encoder_hidden_dim=96,
        encoder_in_channels=hidden[1:], encoder_ffn_dim=192, encoder_attention_heads=4, d_model=96,
        decoder_in_channels=[96, 96, 96], decoder_layers=3, decoder_ffn_dim=192, decoder_attention_heads=4,
        num_queries=20, num_denoising=20, hidden_expansion=0.5,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    return RTDetrV2ForObjectDetection(config)


def true_boxes(owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of what a picture shows.

    Parameters
    ----------
    owner : uint8 array, shape (SIZE, SIZE)
        As in :class:`minilab.renders.RenderSet`.

    Returns
    -------
    values : int array, shape (k,)
        Owner values: things 1 to 3, then the ground.
    boxes : float array, shape (k, 4)
        x0, y0, x1, y1 in pixels.
    """
    values, boxes = [], []
    for value in (1, 2, 3, GROUND):
        ys, xs = np.nonzero(owner == value)
        if len(xs) >= LEAST_PX:
            values.append(value)
            boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return np.array(values, dtype=int), np.array(boxes, dtype=np.float32).reshape(-1, 4)


def label_ids(renders: RenderSet) -> np.ndarray:
    """Label of each owner value, int array of shape (n, 10), by rows of the renders."""
    table = np.full((len(renders), GROUND + 1), -1)
    for row, facts in zip(table, renders.facts, strict=True):
        row[1 : 1 + len(facts.things)] = [KINDS.index(kind) for _, kind in facts.things]
        row[GROUND] = len(KINDS) + SETTINGS.index(str(facts.setting))
    return table


class DetectorLesson(nn.Module):
    """The object detector with the losses of transformers: set matching, boxes, denoising."""

    def __init__(self, renders: RenderSet, device: str = "cpu"):
        super().__init__()
        self.detector = make_detector()
        self.renders, self.device = renders, device
        self.labels = label_ids(renders)

    def forward(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """One step's loss and the numbers to log."""
        images, owner, rows = self.renders.photographs(BATCH, rng, WIDE)
        targets = []
        for row, what in zip(rows, owner, strict=True):
            values, boxes = true_boxes(what)
            middle, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            targets.append({
                "class_labels": torch.from_numpy(self.labels[row, values]).to(self.device),
                "boxes": torch.from_numpy(np.concatenate([middle, sides], 1) / SIZE).to(self.device),
            })  # fmt: skip
        pixels = enlarge(to_pixels(images)).to(self.device)
        with autocast(self.device):
            found = self.detector(pixel_values=pixels, labels=targets)
        parts = {
            k: round(float(found.loss_dict[k].detach()), 3) for k in ("loss_vfl", "loss_bbox", "loss_giou")
        }
        return found.loss, parts


def enlarge(pixels: Tensor) -> Tensor:
    """Pictures at the size that the detector sees, as its processor enlarges them."""
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def save_object_detector(folder: Path, model: RTDetrV2ForObjectDetection) -> None:
    """Save the detector with its processor as a transformers folder for ``AutoModelForObjectDetection``.

    Parameters
    ----------
    folder : Path
    model : RTDetrV2ForObjectDetection
    """
    model.save_pretrained(folder)
    processor = RTDetrImageProcessor(
        size={"height": SIDE, "width": SIDE}, resample=2, do_normalize=True, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    processor.save_pretrained(folder)


def detect(model: nn.Module, images: np.ndarray, device: str = "cpu") -> list[dict[str, np.ndarray]]:
    """Find things and grounds in pictures.

    Parameters
    ----------
    model : RTDetrV2ForObjectDetection
    images : uint8 array, shape (n, SIZE, SIZE, 3)
    device : str

    Returns
    -------
    list of n dict
        ``scores``, ``labels`` and ``boxes`` (x0, y0, x1, y1 in px) of every query, best first.
    """
    found = []
    for start in range(0, len(images), 64):
        pixels = enlarge(to_pixels(images[start : start + 64])).to(device)
        with torch.inference_mode():
            out = model(pixel_values=pixels)
        scores, labels = out.logits.float().sigmoid().max(-1)
        cx, cy, w, h = out.pred_boxes.float().unbind(-1)
        boxes = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1) * SIZE
        for s, c, b in zip(scores.cpu(), labels.cpu(), boxes.cpu(), strict=True):
            order = s.argsort(descending=True)
            found.append({"scores": s[order].numpy(), "labels": c[order].numpy(), "boxes": b[order].numpy()})
    return found


def quality(
    model: nn.Module, renders: RenderSet, images: np.ndarray, device: str = "cpu"
) -> dict[str, float]:
    """Measure the detector against the truth.

    Parameters
    ----------
    model : RTDetrV2ForObjectDetection
    renders : RenderSet
    images : uint8 array, shape (n, SIZE, SIZE, 3)
        Photographs of them.
    device : str

    Returns
    -------
    dict
        ``recall`` (share of things at least half visible that have a box of IoU 0.5 among as many best boxes
        as the picture has true ones, settings counted apart), ``kind`` (share of those with the right label),
        ``iou`` (their mean), ``recall_all`` (of all things with a box), ``setting_iou``, ``setting_right``.
    """
    labels = label_ids(renders)
    rows: list[dict[str, float]] = []
    grounds: list[tuple[float, float]] = []
    for i, found in enumerate(detect(model, images, device)):
        values, boxes = true_boxes(renders.owner[i])
        is_thing = found["labels"] < len(KINDS)
        n_things = int((values < GROUND).sum())
        things = {k: v[is_thing][:n_things] for k, v in found.items()}
        for value, box in zip(values, boxes, strict=True):
            if value == GROUND:
                best = int(np.argmax(np.where(is_thing, -1, found["scores"])))
                grounds.append((
                    float(overlap(box[None], found["boxes"][best][None])[0, 0]),
                    float(found["labels"][best] == labels[i, GROUND]),
                ))  # fmt: skip
                continue
            iou = overlap(box[None], things["boxes"])[0]
            at = int(iou.argmax()) if len(iou) else -1
            rows.append({
                "visible": renders.visible[i][value - 1],
                "iou": float(iou[at]) if at >= 0 else 0.0,
                "kind": float(at >= 0 and things["labels"][at] == labels[i, value]),
            })  # fmt: skip
    visible, iou, kind = (np.array([r[k] for r in rows]) for k in ("visible", "iou", "kind"))
    clear, hit = visible >= 0.5, iou >= 0.5
    setting_iou, setting_right = np.array(grounds).mean(0)
    return {
        "recall": float(hit[clear].mean()),
        "kind": float(kind[clear & hit].mean()),
        "iou": float(iou[clear & hit].mean()),
        "recall_all": float(hit.mean()),
        "setting_iou": float(setting_iou),
        "setting_right": float(setting_right),
    }


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes, shape (len(a), len(b))."""
    inner = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = inner.clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return shared / np.maximum(area_a[:, None] + area_b - shared, 1e-9)
