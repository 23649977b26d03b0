"""The mini captioner: a small BLIP trained from scratch on renders and the grammar's plain captions.

It shares no weight with the mini CLIP, so the confidence it has in a caption is a control without CLIP.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilab.camera import WIDE, Camera
from minilab.clip import PATCH, all_words
from minilab.formats import blip_model, word_tokenizer
from minilab.grammar import caption
from minilab.renders import N_PHRASES, RenderSet, patch_owner, phrase_ids, to_pixels
from minilab.training import Schedule, autocast

SCHEDULE = Schedule(steps=2600, lr=1.2e-3, cosine=False, warmup=100, ema=0.998, weight_decay=0.05, seed=1)
BATCH = 128


class CaptionerLesson(nn.Module):
    """BLIP with its language loss, and a patch classifier that is thrown away after training."""

    def __init__(self, renders: RenderSet, device: str = "cpu", camera: Camera = WIDE):
        super().__init__()
        self.tokenizer = word_tokenizer(all_words(), 40)
        self.blip = blip_model(self.tokenizer)
        self.patch_head = nn.Linear(self.blip.config.vision_config.hidden_size, N_PHRASES)
        self.renders, self.device, self.camera = renders, device, camera
        self.classes = phrase_ids(renders.facts)
        rows = self.tokenizer([caption(f) for f in renders.facts], padding=True, return_tensors="pt")
        self.captions = rows["input_ids"]

    def forward(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """One step's loss and the numbers to log."""
        images, owner, rows = self.renders.photographs(BATCH, rng, self.camera)
        pixels = to_pixels(images).to(self.device)
        ids = self.captions[torch.from_numpy(rows)].to(self.device)
        keep = (ids != self.tokenizer.pad_token_id).long()
        with autocast(self.device):
            seen = self.blip.vision_model(pixel_values=pixels).last_hidden_state
            words = self.blip.text_decoder(
                input_ids=ids[:, :-1], attention_mask=keep[:, :-1], encoder_hidden_states=seen
            ).logits
            patches = self.patch_head(seen[:, 1:])
        target = ids[:, 1:].masked_fill(keep[:, 1:] == 0, -100)
        # plain cross-entropy: the class's own loss smooths labels, which would blunt the caption likelihood
        loss_words = F.cross_entropy(words.float().flatten(0, 1), target.flatten(), ignore_index=-100)
        owners = patch_owner(owner, PATCH).reshape(BATCH, -1).astype(np.int64)
        truth = torch.from_numpy(np.take_along_axis(self.classes[rows], owners, axis=1)).to(self.device)
        loss_patch = F.cross_entropy(patches.float().flatten(0, 1), truth.flatten())
        exact = (words.argmax(-1).eq(target) | (target == -100)).all(1).float().mean()
        numbers = {"words": loss_words, "patch": loss_patch, "teacher_forced_exact": exact}
        return loss_words + 0.5 * loss_patch, {k: round(float(v.detach()), 3) for k, v in numbers.items()}
