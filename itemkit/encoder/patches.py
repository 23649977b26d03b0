"""Patch embeddings in the joint space, from the same forward pass that embeds the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def patch_pass(visual: torch.nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Return a function pixels -> (pooled, patches) into the joint space, or None if the tower has none."""
    if patch_grid(visual) is None:
        return None
    if hasattr(visual, "trunk"):
        trunk, head = visual.trunk, visual.head

        def timm_pass(pixels: Tensor) -> tuple[Tensor, Tensor]:
            tokens = trunk.forward_features(pixels)
            pooled = head(trunk.forward_head(tokens))
            patches = tokens[:, trunk.num_prefix_tokens :]
            if getattr(trunk, "attn_pool", None) is not None:
                # SigLIP, PE: what the attention pooling would return if the image had this one patch only.
                n, count, width = patches.shape
                patches = trunk.attn_pool(patches.reshape(n * count, 1, width)).reshape(n, count, -1)
            return pooled, head(trunk.head(trunk.fc_norm(patches)))

        return timm_pass

    def native_pass(pixels: Tensor) -> tuple[Tensor, Tensor]:
        # The final layer norm and projection, trained on the class token, applied to every patch.
        out = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return out["image_features"], out["image_intermediates"][-1] @ visual.proj

    return native_pass


def patch_grid(visual: torch.nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches; None for convolutional towers, Swin, CoCa's attention pooling."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        usable = hasattr(visual, "grid_size") and getattr(visual, "attn_pool", None) is None
        grid = visual.grid_size if usable and visual.proj is not None else None
    else:
        parts = ("num_prefix_tokens", "fc_norm", "head", "forward_head")
        grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
        grid = grid if all(hasattr(trunk, part) for part in parts) else None
    return None if grid is None else (int(grid[0]), int(grid[1]))
