"""Decoders that misbehave, by name as DecodeConfig takes them; without torch, so that they start quickly."""

from __future__ import annotations

import hashlib
import os
import signal
import time

from PIL import Image

from itemkit.images import load_image


def load_or_crash(data: bytes, name: str = "") -> Image.Image:
    """Dies like a decoder with a bug on files whose name says so; hangs on others."""
    if "crash" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in name:
        time.sleep(600)
    return load_image(data, name=name)


def load_stub(data: bytes, name: str = "") -> Image.Image:
    """No decoding at all: a picture of one colour that depends on the file."""
    red, green, blue = hashlib.sha256(data).digest()[:3]
    return Image.new("RGB", (8, 8), (red, green, blue))
