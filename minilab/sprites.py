"""Twelve kinds of object, each drawn on a transparent tile with Pillow; shading is added by the renderer.

Every function draws into the unit square (x to the right, y down, the object standing on y = 1).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

RGB: dict[str, Rgb] = {
    "red": (208, 32, 36),
    "orange": (238, 128, 24),
    "yellow": (238, 214, 40),
    "green": (16, 138, 70),
    "blue": (34, 84, 200),
    "purple": (124, 44, 164),
    "pink": (244, 136, 180),
    "white": (240, 240, 236),
}


def tint(colour: Rgb, factor: float) -> Rgb:
    """Darken (factor < 1) or move towards white (factor > 1, 2 is white)."""
    c = np.array(colour, dtype=float)
    c = c * factor if factor <= 1 else c + (255 - c) * (factor - 1)
    return tuple(int(round(v)) for v in c)  # type: ignore[return-value]


class Tile:
    """A square RGBA canvas addressed in units of its side."""

    def __init__(self, side_px: int):
        self.side = side_px
        self.image = Image.new("RGBA", (side_px, side_px), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)

    def poly(self, points: list[tuple[float, float]], colour: Rgb) -> None:
        """Fill a polygon."""
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=(*colour, 255))

    def oval(self, x0: float, y0: float, x1: float, y1: float, colour: Rgb) -> None:
        """Fill an ellipse."""
        s = self.side
        self.draw.ellipse((x0 * s, y0 * s, x1 * s, y1 * s), fill=(*colour, 255))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Rgb, radius: float = 0.0) -> None:
        """Fill a rectangle with rounded corners."""
        s = self.side
        self.draw.rounded_rectangle((x0 * s, y0 * s, x1 * s, y1 * s), radius * s, fill=(*colour, 255))

    def ring(self, x0: float, y0: float, x1: float, y1: float, colour: Rgb, width: float) -> None:
        """Draw an ellipse's outline."""
        s = self.side
        self.draw.ellipse(
            (x0 * s, y0 * s, x1 * s, y1 * s), outline=(*colour, 255), width=max(1, round(width * s))
        )


def ball(t: Tile, c: Rgb) -> None:
    """A beach ball: a sphere with a pale band."""
    t.oval(0.06, 0.12, 0.94, 1.0, c)
    s = t.side
    t.draw.arc(
        (0.2 * s, -0.1 * s, 1.5 * s, 0.8 * s), 95, 190, fill=(*tint(c, 1.5), 255), width=round(0.09 * s)
    )


def cube(t: Tile, c: Rgb) -> None:
    """A box seen from a corner: three faces of unequal light."""
    t.poly([(0.06, 0.3), (0.62, 0.36), (0.62, 1.0), (0.06, 0.92)], c)
    t.poly([(0.62, 0.36), (0.94, 0.26), (0.94, 0.84), (0.62, 1.0)], tint(c, 0.68))
    t.poly([(0.06, 0.3), (0.4, 0.2), (0.94, 0.26), (0.62, 0.36)], tint(c, 1.3))


def cone(t: Tile, c: Rgb) -> None:
    """A traffic cone with a white belt and a foot."""
    t.poly([(0.46, 0.04), (0.54, 0.04), (0.8, 0.9), (0.2, 0.9)], c)
    t.poly([(0.4, 0.36), (0.6, 0.36), (0.67, 0.56), (0.33, 0.56)], (244, 244, 240))
    t.box(0.08, 0.88, 0.92, 1.0, tint(c, 0.8), 0.03)


def car(t: Tile, c: Rgb) -> None:
    """A small car from the side: cabin, windows, two wheels."""
    t.poly([(0.22, 0.56), (0.34, 0.34), (0.7, 0.34), (0.84, 0.56)], c)
    t.poly([(0.3, 0.55), (0.38, 0.4), (0.5, 0.4), (0.5, 0.55)], (176, 208, 226))
    t.poly([(0.54, 0.55), (0.54, 0.4), (0.67, 0.4), (0.76, 0.55)], (176, 208, 226))
    t.box(0.03, 0.54, 0.97, 0.84, c, 0.09)
    t.box(0.9, 0.6, 0.97, 0.68, (250, 240, 170), 0.02)
    for x in (0.26, 0.74):
        t.oval(x - 0.15, 0.7, x + 0.15, 1.0, (28, 28, 30))
        t.oval(x - 0.065, 0.785, x + 0.065, 0.915, (180, 180, 184))


def house(t: Tile, c: Rgb) -> None:
    """A house: walls, a darker roof, a door and two windows."""
    t.box(0.68, 0.1, 0.8, 0.4, tint(c, 0.5))
    t.poly([(0.5, 0.06), (0.98, 0.5), (0.02, 0.5)], tint(c, 0.62))
    t.box(0.12, 0.48, 0.88, 1.0, c)
    t.box(0.42, 0.66, 0.6, 1.0, (92, 60, 36))
    for x in (0.19, 0.67):
        t.box(x, 0.58, x + 0.16, 0.76, (214, 232, 244))


def tree(t: Tile, c: Rgb) -> None:
    """A tree: a brown trunk under a cloud of coloured leaves."""
    t.poly([(0.43, 0.5), (0.57, 0.5), (0.6, 1.0), (0.4, 1.0)], (104, 70, 40))
    for x, y, r in ((0.3, 0.46, 0.24), (0.7, 0.46, 0.24), (0.5, 0.28, 0.26), (0.5, 0.5, 0.24)):
        t.oval(x - r, y - r, x + r, y + r, c)
    for x, y in ((0.36, 0.3), (0.6, 0.22), (0.68, 0.5), (0.3, 0.54)):
        t.oval(x - 0.06, y - 0.05, x + 0.06, y + 0.05, tint(c, 1.3))


def flower(t: Tile, c: Rgb) -> None:
    """A flower: six petals round a heart of another colour, on a stalk with leaves."""
    t.box(0.47, 0.5, 0.53, 1.0, (52, 112, 44))
    t.oval(0.24, 0.78, 0.5, 0.9, (60, 128, 48))
    t.oval(0.5, 0.7, 0.76, 0.82, (60, 128, 48))
    for k in range(6):
        a = np.pi * k / 3 + 0.3
        x, y = 0.5 + 0.22 * np.cos(a), 0.34 + 0.22 * np.sin(a)
        t.oval(x - 0.15, y - 0.15, x + 0.15, y + 0.15, c if k % 2 else tint(c, 0.9))
    heart = (120, 72, 20) if c[0] > 225 and c[1] > 190 else (246, 206, 60)
    t.oval(0.38, 0.22, 0.62, 0.46, heart)


def boat(t: Tile, c: Rgb) -> None:
    """A sailing boat: a coloured hull, a mast, a large and a small sail."""
    t.poly([(0.04, 0.72), (0.96, 0.72), (0.8, 1.0), (0.2, 1.0)], c)
    t.box(0.47, 0.02, 0.52, 0.74, (84, 60, 40))
    t.poly([(0.55, 0.06), (0.92, 0.66), (0.55, 0.66)], (246, 246, 242))
    t.poly([(0.44, 0.16), (0.44, 0.66), (0.14, 0.66)], tint(c, 1.45))


def fish(t: Tile, c: Rgb) -> None:
    """A fish from the side: body, tail, fins, an eye."""
    t.poly([(0.24, 0.64), (0.0, 0.4), (0.06, 0.66), (0.0, 0.92)], tint(c, 0.8))
    t.poly([(0.42, 0.46), (0.6, 0.26), (0.72, 0.46)], tint(c, 0.8))
    t.poly([(0.46, 0.84), (0.5, 1.0), (0.64, 0.84)], tint(c, 0.8))
    t.oval(0.14, 0.4, 0.98, 0.92, c)
    t.oval(0.74, 0.52, 0.86, 0.64, (250, 250, 250))
    t.oval(0.785, 0.55, 0.845, 0.61, (16, 16, 18))


def star(t: Tile, c: Rgb) -> None:
    """A five-pointed star whose rays have a light and a dark side."""
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2, 0.21, 0.52)
    xy = [(0.5 + r * np.cos(a), 0.53 + r * np.sin(a)) for a, r in zip(angles, radius, strict=True)]
    for k in range(10):
        t.poly([(0.5, 0.53), xy[k], xy[(k + 1) % 10]], c if k % 2 else tint(c, 0.74))


def mug(t: Tile, c: Rgb) -> None:
    """A mug with a handle and coffee in it."""
    t.ring(0.6, 0.36, 0.98, 0.82, tint(c, 0.85), 0.09)
    t.box(0.1, 0.2, 0.74, 0.94, c, 0.06)
    t.oval(0.1, 0.84, 0.74, 1.0, c)
    t.oval(0.1, 0.1, 0.74, 0.3, tint(c, 1.25))
    t.oval(0.16, 0.14, 0.68, 0.27, (64, 40, 26))


def lamp(t: Tile, c: Rgb) -> None:
    """A table lamp: a coloured shade on a dark stand."""
    t.box(0.46, 0.46, 0.54, 0.94, (64, 60, 58))
    t.oval(0.26, 0.88, 0.74, 1.0, (64, 60, 58))
    t.poly([(0.32, 0.06), (0.68, 0.06), (0.94, 0.54), (0.06, 0.54)], c)
    t.poly([(0.32, 0.06), (0.42, 0.06), (0.34, 0.54), (0.06, 0.54)], tint(c, 1.25))


def pebble(t: Tile, c: Rgb) -> None:
    """Something the grammar has no word for: a stone."""
    t.poly([(0.1, 0.9), (0.2, 0.55), (0.5, 0.42), (0.84, 0.6), (0.94, 0.92), (0.5, 1.0)], c)
    t.poly([(0.2, 0.55), (0.5, 0.42), (0.6, 0.6), (0.34, 0.68)], tint(c, 1.25))


def stick(t: Tile, c: Rgb) -> None:
    """Something the grammar has no word for: a forked stick."""
    t.poly([(0.04, 0.92), (0.92, 0.7), (0.94, 0.78), (0.06, 1.0)], c)
    t.poly([(0.5, 0.82), (0.7, 0.55), (0.76, 0.6), (0.58, 0.84)], c)


DRAW: dict[str, Callable[[Tile, Rgb], None]] = {
    f.__name__: f for f in (ball, cube, cone, car, house, tree, flower, boat, fish, star, mug, lamp)
}
UNNAMED: dict[str, Callable[[Tile, Rgb], None]] = {"pebble": pebble, "stick": stick}
