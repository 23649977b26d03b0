"""The mini CLIP: an open_clip ViT trained from scratch on renders and their captions.

Three losses share the towers: image against caption (contrastive, CLIP), crop against phrase, and patch
against phrase. The last two use the world's masks. They make the small model learn within minutes and make
its patch map meaningful; a CLIP trained on captions alone has a much weaker patch map, which the model card
says.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilab.formats import clip_config, vocabulary, word_tokenizer
from minilab.grammar import COLOURS, KINDS, SETTINGS, Facts, phrase, random_caption, sentence
from minilab.renders import GROUND, N_PHRASES, RenderSet, patch_owner, phrase_ids
from minilab.training import Schedule, autocast
from minilab.world import SIZE

PATCH = 6
SCHEDULE = Schedule(steps=2200, lr=1.5e-3, warmup=150, ema=0.997, weight_decay=0.05)
BATCH, CROPS = 112, 48

PHRASES = [phrase(c, k) for c in COLOURS for k in KINDS] + [f"the {s}" for s in SETTINGS]


def all_words() -> list[str]:
    """List every word the grammar can say."""
    facts = [Facts(((c, k),) * n, s) for c in COLOURS for k in KINDS for s in SETTINGS for n in (1, 2, 3)]
    return vocabulary(
        [" ".join(t.text for t in sentence(f, i)) for f in facts[::7] for i in range(8)] + PHRASES
    )


class ClipLesson(nn.Module):
    """The towers with their three losses."""

    def __init__(self, renders: RenderSet, device: str = "cpu"):
        super().__init__()
        import open_clip

        self.tokenizer = word_tokenizer(all_words(), 32)
        self.config = clip_config(len(self.tokenizer))
        self.clip = open_clip.model.CLIP(**self.config)
        # patches have their own class for what has no phrase: sky and wall
        self.no_phrase = nn.Parameter(torch.randn(self.config["embed_dim"]) * 0.1)
        self.renders, self.device = renders, device
        self.classes = phrase_ids(renders.facts)
        self.phrase_tokens = self.tokens(PHRASES).to(device)

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids of texts, padded to the longest of them."""
        return self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]

    def texts(self, tokens: Tensor) -> Tensor:
        """Normalised embeddings; the text tower runs on short rows, since padding follows the end token."""
        m = self.clip
        n = tokens.shape[1]
        x = m.token_embedding(tokens) + m.positional_embedding[:n]
        x = m.ln_final(m.transformer(x, attn_mask=m.attn_mask[:n, :n]))
        at_end = x[torch.arange(len(x)), (tokens == self.tokenizer.eos_token_id).int().argmax(1)]
        return F.normalize((at_end @ m.text_projection).float(), dim=-1)

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised embeddings of pictures and of their patches."""
        v = self.clip.visual
        out = v.forward_intermediates(pixels, indices=1, output_fmt="NLC", normalize_intermediates=True)
        patches = F.normalize((out["image_intermediates"][-1] @ v.proj).float(), dim=-1)
        return F.normalize(out["image_features"].float(), dim=-1), patches

    def forward(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """One step's loss and the numbers to log."""
        rows = rng.integers(len(self.renders), size=BATCH)
        raw, owner = self.renders.images[rows], self.renders.owner[rows]
        crops, crop_class = _crops(raw, owner, self.classes[rows], rng)
        raw, owner = shift(raw, owner, rng)
        pixels = to_pixels(camera_jitter(np.concatenate([raw, crops]), rng)).to(self.device)
        facts = [self.renders.facts[i] for i in rows]
        captions = self.tokens([random_caption(f, rng) for f in facts]).to(self.device)
        with autocast(self.device):
            image, patch = self.images(pixels)
            phrases, text = self.texts(self.phrase_tokens), self.texts(captions)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        same = torch.tensor([[a == b for b in facts] for a in facts], device=self.device)
        loss_caption = _contrast(scale * image[:BATCH] @ text.T, same)
        truth = torch.from_numpy(crop_class).to(self.device)
        loss_crop = F.cross_entropy(scale * image[BATCH:] @ phrases.T, truth)
        owners = patch_owner(owner, PATCH).reshape(BATCH, -1).astype(np.int64)
        patch_class = torch.from_numpy(np.take_along_axis(self.classes[rows], owners, axis=1)).to(self.device)
        table = torch.cat([phrases, F.normalize(self.no_phrase, dim=0)[None]])
        weight = torch.where(patch_class < len(PHRASES) - len(SETTINGS), 1.0, 0.25)
        per_patch = F.cross_entropy(
            (scale * patch[:BATCH] @ table.T).flatten(0, 1), patch_class.flatten(), reduction="none"
        )
        loss_patch = (per_patch * weight.flatten()).sum() / weight.sum()
        hit = (image[BATCH:] @ phrases.T).argmax(1).eq(truth).float().mean()
        numbers = {"caption": loss_caption, "crop": loss_crop, "patch": loss_patch, "crop_hit": hit}
        return loss_caption + loss_crop + loss_patch, {
            k: round(float(v.detach()), 3) for k, v in numbers.items()
        }


def _contrast(logits: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE; a pair that tells the same scene is not counted as a negative."""
    off = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(off, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def to_pixels(images: np.ndarray) -> Tensor:
    """Bytes to the [-1, 1] that both towers' preprocessing gives."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def shift(images: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Move the whole batch by up to three pixels, edges repeated."""
    dy, dx = rng.integers(-3, 4, size=2)
    y = np.clip(np.arange(SIZE) + dy, 0, SIZE - 1)
    x = np.clip(np.arange(SIZE) + dx, 0, SIZE - 1)
    return images[:, y][:, :, x], owner[:, y][:, :, x]


def camera_jitter(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary exposure and contrast of each picture a little."""
    n = len(images)
    gain, offset = rng.uniform(0.88, 1.12, (n, 1, 1, 1)), rng.uniform(-10, 10, (n, 1, 1, 1))
    noise = rng.normal(0, 1, images.shape).astype(np.float32) * rng.uniform(0, 5, (n, 1, 1, 1))
    return np.clip((images - 128.0) * gain + 128 + offset + noise, 0, 255).astype(np.uint8)


def _crops(
    images: np.ndarray, owner: np.ndarray, classes: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut squares around one thing each (or of bare ground), scaled to full size, with their phrase class."""
    from PIL import Image

    crops, labels = [], []
    for i in range(CROPS):
        present = [v for v in (1, 2, 3) if (owner[i] == v).sum() >= 8]
        value = GROUND if not present or rng.random() < 0.1 else int(rng.choice(present))
        ys, xs = np.nonzero(owner[i] == value)
        if value == GROUND:
            side = float(rng.uniform(12, 20))
            j = rng.integers(len(ys)) if len(ys) else None
            cy, cx = (ys[j], xs[j]) if j is not None else (SIZE / 2, SIZE / 2)
        else:
            extent = max(np.ptp(ys), np.ptp(xs)) + 1
            side = float(np.clip(extent * rng.uniform(1.0, 1.9), 12, SIZE))
            slack = max(0.0, side - extent) / 2 + 0.08 * extent
            cy = (ys.min() + ys.max() + 1) / 2 + rng.uniform(-slack, slack)
            cx = (xs.min() + xs.max() + 1) / 2 + rng.uniform(-slack, slack)
        x0, y0 = np.clip(cx - side / 2, 0, SIZE - side), np.clip(cy - side / 2, 0, SIZE - side)
        inside = owner[i][int(y0) : int(y0 + side) + 1, int(x0) : int(x0 + side) + 1]
        if value == GROUND and np.isin(inside, (1, 2, 3)).mean() > 0.1:
            value = int(np.bincount(inside[np.isin(inside, (1, 2, 3))]).argmax())
        picture = Image.fromarray(images[i]).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC, box=(x0, y0, x0 + side, y0 + side)
        )
        crops.append(np.asarray(picture))
        labels.append(classes[i, value])
    return np.stack(crops), np.array(labels)


assert N_PHRASES == len(PHRASES) + 1
