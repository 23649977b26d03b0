"""Decoders with trouble that passes, by name as DecodeConfig takes them, without torch."""

from __future__ import annotations

import os

from PIL import Image

from itemkit.images import load_image


def load_or_no_memory(data: bytes, name: str = "") -> Image.Image:
    """Has no memory for any image while ITEMKIT_TEST_NO_MEMORY is set."""
    if "ITEMKIT_TEST_NO_MEMORY" in os.environ:
        raise MemoryError
    return load_image(data, name=name)
