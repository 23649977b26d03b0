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
from PIL import Image
from torch import Tensor, nn

from minilab.camera import WIDE, Camera
from minilab.formats import clip_config, vocabulary, word_tokenizer
from minilab.grammar import COLOURS, KINDS, SETTINGS, Facts, phrase, random_caption, sentence
from minilab.renders import GROUND, N_PHRASES, RenderSet, patch_owner, phrase_ids, to_pixels
from minilab.training import Schedule, autocast
from minilab.world import SIZE

PATCH = 6
SCHEDULE = Schedule(steps=1400, lr=1.5e-3, cosine=False, warmup=150, ema=0.998, weight_decay=0.05)
BATCH, CROPS = 96, 64

PHRASES = [phrase(c, k) for c in COLOURS for k in KINDS] + [f"the {s}" for s in SETTINGS]


def all_words() -> list[str]:
    """List every word the grammar can say."""
    facts = [Facts(((c, k),) * n, s) for c in COLOURS for k in KINDS for s in SETTINGS for n in (1, 2, 3)]
    return vocabulary(
        [" ".join(t.text for t in sentence(f, i)) for f in facts[::7] for i in range(8)] + PHRASES
    )


class ClipLesson(nn.Module):
    """The towers with their three losses."""

    def __init__(self, renders: RenderSet, device: str = "cpu", camera: Camera = WIDE):
        super().__init__()
        import open_clip

        self.tokenizer = word_tokenizer(all_words(), 32)
        self.config = clip_config(len(self.tokenizer))
        self.clip = open_clip.model.CLIP(**self.config)
        # patches have their own class for what has no phrase: sky and wall
        self.no_phrase = nn.Parameter(torch.randn(self.config["embed_dim"]) * 0.1)
        self.renders, self.device, self.camera = renders, device, camera
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
        images, owner, rows = self.renders.photographs(BATCH, rng, self.camera)
        crops, crop_class = cut_out(images, owner, self.classes[rows], CROPS, rng)
        pixels = to_pixels(np.concatenate([images, crops])).to(self.device)
        facts = [self.renders.facts[i] for i in rows]
        captions = self.tokens([random_caption(f, rng) for f in facts]).to(self.device)
        with autocast(self.device):
            image, patch = self.images(pixels)
            phrases, text = self.texts(self.phrase_tokens), self.texts(captions)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        told = {f: i for i, f in enumerate(facts)}
        scene = torch.tensor([told[f] for f in facts], device=self.device)
        same = scene[:, None] == scene
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


def cut_out(
    images: np.ndarray, owner: np.ndarray, classes: np.ndarray, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut out one thing each, or a ground, from tight to loose, scaled to full size.

    A localiser asks about squares and about boxes of any shape, close around a thing or wide; a joint space
    that has not seen such crops cannot say how well they fit. A tenth are grounds: whole, or a piece of one.

    Parameters
    ----------
    images : uint8 array, shape (m, SIZE, SIZE, 3)
    owner : uint8 array, shape (m, SIZE, SIZE)
    classes : int array, shape (m, 10)
        From :func:`minilab.renders.phrase_ids`.
    n : int
        How many; crop i is of picture i modulo m.
    rng : Generator

    Returns
    -------
    crops : uint8 array, shape (n, SIZE, SIZE, 3)
    phrases : int array, shape (n,)
        Index into ``PHRASES``.
    """
    crops, labels = [], []
    for i in np.arange(n) % len(images):
        present = [v for v in (1, 2, 3) if (owner[i] == v).sum() >= 8]
        value = GROUND if not present or rng.random() < 0.12 else int(rng.choice(present))
        ys, xs = np.nonzero(owner[i] == value)
        if len(ys) == 0:  # a ground wholly behind things
            value, ys, xs = GROUND, *(np.array([SIZE // 2, SIZE - 1]),) * 2
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=float)
        if value == GROUND and rng.random() < 0.5:
            side, j = rng.uniform(10, 24), rng.integers(len(ys))
            box = np.array([xs[j] - side / 2, ys[j] - side / 2, xs[j] + side / 2, ys[j] + side / 2])
        elif value != GROUND:
            sides = (box[2:] - box[:2]).copy()
            if rng.random() < 0.5:
                sides[:] = sides.max()
            sides = np.maximum(sides * np.exp(rng.uniform(np.log(0.9), np.log(2.4))), 6)
            centre = (box[:2] + box[2:]) / 2 + rng.uniform(-0.1, 0.1, 2) * sides
            box = np.concatenate([centre - sides / 2, centre + sides / 2])
        x0, y0, x1, y1 = np.clip(np.rint(box), 0, SIZE).astype(int)
        x0, y0 = min(x0, SIZE - 4), min(y0, SIZE - 4)
        x1, y1 = max(x1, x0 + 4), max(y1, y0 + 4)
        inside = owner[i, y0:y1, x0:x1]
        things = inside[np.isin(inside, (1, 2, 3))]
        if value == GROUND and (len(things) > 0.3 * inside.size):
            value = int(np.bincount(things).argmax())
        crops.append(
            np.asarray(
                Image.fromarray(images[i, y0:y1, x0:x1]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            )
        )
        labels.append(classes[i, value])
    return np.stack(crops), np.array(labels)


assert N_PHRASES == len(PHRASES) + 1
