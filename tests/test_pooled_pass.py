"""The shortcut to the pooled embedding gives what the whole tower gives."""

from __future__ import annotations

import models  # first: it repairs the torchvision import

# isort: split

import open_clip
import pytest
import torch

from itemkit.encoder import pooled_pass

assert models


def tower(**vision):
    cfg = {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8, **vision}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=20,
        vision_cfg=cfg,
        text_cfg={"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1},
    )
    return model.visual.eval()


@pytest.mark.parametrize(
    "vision", [{}, {"layers": 1}, {"ls_init_value": 0.3}, {"final_ln_after_pool": True}, {"no_ln_pre": True}]
)
def test_same_as_the_whole_tower(vision):
    visual = tower(**vision)
    quick = pooled_pass(visual)
    assert quick is not None
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        whole, found = visual(pixels), quick(pixels)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)  # five different images
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_gradients_pass_through():
    visual = tower()
    grads = []
    for run in (visual, pooled_pass(visual)):
        pixels = torch.ones(1, 3, 32, 32).requires_grad_(True)
        run(pixels).square().sum().backward()
        grads.append(pixels.grad)
    assert grads[0].abs().max() > 1e-4
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "vision",
    [{"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 4}, {"output_tokens": True}],
)
def test_other_towers_take_the_long_way(vision):
    assert pooled_pass(tower(**vision)) is None
