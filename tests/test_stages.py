"""The steps put together: what one step hands to the next."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from itemkit.steps import Models, Stages

from fakes import FakeCaptioner, FakeEncoder, FakeLocaliser, FakeParser


class AsksForWords(FakeLocaliser):
    """A localiser that reads the phrases themselves, as the detectors of transformers do."""

    needs_phrases = True
    asked: list[str] = []

    def locate(self, images, embedding, phrase_emb, owner, phrases=None):
        assert phrases is not None and len(phrases) == len(owner)
        self.asked = list(phrases)
        return super().locate(images, embedding, phrase_emb, owner)


def test_a_localiser_that_reads_words_gets_one_phrase_for_each_object() -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]
    localiser = AsksForWords()
    features = Stages(Models(FakeEncoder(), FakeCaptioner(), FakeParser(), localiser))(images)
    assert len(features.owner) and localiser.asked == features.objects["phrase"].tolist()
    assert torch.tensor(features.owner).diff().min() >= 0
