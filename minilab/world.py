"""The rendered world of the mini laboratory: scenes whose truth is known, and pictures of them.

A scene is drawn from (split, index) alone, so renders need not be stored and the splits are disjoint by
construction. Sprites are drawn four times too large and scaled down; ground, light and shadow are computed at
the final size, where they are cheap. A picture has neither lens nor sensor: :mod:`minilab.camera` adds both,
to renders and samples alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from minilab.grammar import COLOURS, KINDS, SETTINGS, Facts
from minilab.sprites import DRAW, RGB, UNNAMED, Rgb, Tile

SIZE = 48
SUPERSAMPLING = 4
WORLD_SEED = 20251126
SPLITS = {"models": 0, "models_val": 1, "train": 2, "val": 3, "test": 4, "spare": 5}
"""``models`` renders train every mini model; the detector's train, val and test are seen by none of them."""


@dataclass(frozen=True)
class Graft:
    """Part of another thing in the place of a thing's own: its right side, or its upper part.

    ``share`` of the thing's side is the other's; ``above`` says which of the two it is.
    """

    kind: str
    rgb: Rgb
    share: float
    above: bool


@dataclass(frozen=True)
class Thing:
    """One object of a scene; box sides and positions in pixels of the picture.

    The last four fields are at rest in every scene of the world; probes and shifted worlds set them.
    ``shadow`` is how dark the shadow is (0: there is none, below 0: it falls towards the light), ``angle`` in
    degrees.
    """

    kind: str
    colour: str
    x: float
    base_y: float
    size: float
    flip: bool = False
    hue: tuple[float, float, float] = (1.0, 1.0, 1.0)
    named: bool = True
    rgb: Rgb | None = None
    graft: Graft | None = None
    shadow: float = 1.0
    angle: float = 0.0

    @property
    def paint(self) -> Rgb:
        """Its colour as it is painted: around its name, unless ``rgb`` says another."""
        if self.rgb is not None:
            return self.rgb
        base = RGB.get(self.colour, (122, 112, 100))
        return tuple(int(np.clip(c * h, 0, 255)) for c, h in zip(base, self.hue, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Style:
    """How things are painted; the world's own style is the default, shifted worlds have others.

    ``outline`` darkens the edge of every thing by this share, ``texture`` is the depth of a rough pattern on
    things and ground.
    """

    outline: float = 0.0
    texture: float = 0.0


@dataclass(frozen=True)
class Scene:
    """All that a picture shows, and the seed of its grain and clouds."""

    things: tuple[Thing, ...]
    setting: str
    horizon: float
    light: float
    seed: int

    @property
    def facts(self) -> Facts:
        """The truth to tell: named things from left to right, and the setting."""
        named = sorted((t for t in self.things if t.named), key=lambda t: t.x)
        return Facts(tuple((t.colour, t.kind) for t in named), self.setting)


@dataclass(frozen=True)
class Render:
    """A picture with its truth.

    Attributes
    ----------
    image : uint8 array, shape (SIZE, SIZE, 3)
    masks : bool array, shape (n_named, SIZE, SIZE)
        Visible pixels of each named thing, in the order of ``scene.facts.things``.
    boxes : float array, shape (n_named, 4)
        x0, y0, x1, y1 of the visible pixels.
    visible : float array, shape (n_named,)
        Share of each named thing that is neither hidden by another nor outside the picture.
    scene : Scene
    """

    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    visible: np.ndarray
    scene: Scene


def scene_rng(split: str, index: int) -> np.random.Generator:
    """Random generator that belongs to one scene and no other."""
    return np.random.default_rng([WORLD_SEED, SPLITS[split], index])


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: one to three things, a setting, light.

    Some things are small or partly hidden, a few reach over the edge, colours vary around their name, and
    every fourth scene holds a stone or a stick that no caption mentions: the renders have a spread of
    alignment of their own, as photographs have.
    """
    setting = str(rng.choice(SETTINGS))
    horizon = SIZE * rng.uniform(0.36, 0.56)
    n = int(rng.choice([1, 2, 3], p=[0.36, 0.40, 0.24]))
    low, high = {1: (15, 30), 2: (13, 22), 3: (11, 16)}[n]
    sizes = rng.uniform(low, high, size=n)
    slots = (np.arange(n) + 0.5) / n * SIZE + rng.normal(0, SIZE * 0.045, size=n)
    if n == 1:
        slots = rng.uniform(0.14 * SIZE, 0.86 * SIZE, size=1)
    things = []
    for x, size in zip(np.sort(slots), sizes, strict=True):
        overhang = 0.22 * size if rng.random() < 0.12 else 0.0
        x = float(np.clip(x, size / 2 - overhang, SIZE - size / 2 + overhang))
        things.append(_thing(rng, str(rng.choice(KINDS)), str(rng.choice(COLOURS)), x, size, horizon))
    if rng.random() < 0.25:
        x, size = rng.uniform(3, SIZE - 3), rng.uniform(4, 8)
        name = str(rng.choice(list(UNNAMED)))
        things.append(replace(_thing(rng, name, "", x, size, horizon), named=False))
    return Scene(tuple(things), setting, horizon, float(rng.uniform(-1, 1)), int(rng.integers(2**31)))


def _thing(rng: np.random.Generator, kind: str, colour: str, x: float, size: float, horizon: float) -> Thing:
    lowest = SIZE - 2.0
    base = float(rng.uniform(min(max(horizon + 3, size + 2), lowest), lowest))
    red, green, blue = map(float, rng.normal(1.0, 0.06, size=3))
    return Thing(kind, colour, float(x), base, float(size), bool(rng.random() < 0.5), (red, green, blue))


def render(scene: Scene, style: Style = Style()) -> Render:
    """Paint a scene; the same scene gives the same bytes.

    Parameters
    ----------
    scene : Scene
    style : Style

    Returns
    -------
    Render
    """
    rng = np.random.default_rng(scene.seed)
    canvas = _ground(scene, rng)
    rough = 1 + style.texture * _noise(rng, 20)[..., None] if style.texture else None
    order = sorted(range(len(scene.things)), key=lambda i: scene.things[i].base_y)
    seen = np.zeros((len(scene.things), SIZE, SIZE), dtype=np.float32)
    whole = np.ones(len(scene.things))
    for i in order:
        thing = scene.things[i]
        canvas *= 1 - _shadow(thing, scene.light)[..., None]
        rgb, alpha, whole[i] = _sprite(thing, scene.light, style.outline)
        canvas = canvas * (1 - alpha[..., None]) + rgb
        seen *= 1 - alpha
        seen[i] = alpha
    if rough is not None:
        canvas *= rough
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    named = sorted((i for i, t in enumerate(scene.things) if t.named), key=lambda i: scene.things[i].x)
    masks = seen[named] > 0.5
    boxes = np.array([_box(m) for m in masks], dtype=np.float32).reshape(-1, 4)
    return Render(image, masks, boxes, seen[named].sum((1, 2)) / whole[named], scene)


def render_index(split: str, index: int) -> Render:
    """Render scene ``index`` of a split."""
    return render(sample_scene(scene_rng(split, index)))


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    ys, xs = np.nonzero(mask)
    if len(xs) == 0:
        return (0.0, 0.0, 0.0, 0.0)
    return (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))


_GROUND = {
    "grass": (98, 150, 56),
    "sand": (214, 186, 130),
    "snow": (226, 232, 240),
    "road": (92, 92, 98),
    "table": (138, 88, 52),
}
_GRAIN = {"grass": 20.0, "sand": 13.0, "snow": 6.0, "road": 11.0, "table": 8.0}


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth random field in about [-1, 1], ``cells`` knots to a side."""
    coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


_ROWS = np.arange(SIZE, dtype=np.float32)[:, None]
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Sky or wall above, the setting below; float RGB in 0..255."""
    y = _ROWS
    below = np.clip((y - scene.horizon) + 0.5, 0, 1)[..., None]
    up = y / SIZE
    if scene.setting == "table":
        wall = np.array([186, 176, 168]) + rng.normal(0, 14, 3)
        sky = wall * (1.04 - 0.25 * up[..., None]) + 3 * _noise(rng, 5)[..., None]
    else:
        zenith = np.array([92, 142, 206]) + rng.normal(0, 14, 3)
        haze = np.array([206, 220, 232]) + rng.normal(0, 8, 3)
        mix = np.clip(y / scene.horizon, 0, 1)[..., None]
        sky = zenith * (1 - mix) + haze * mix
        cloud = np.clip(0.5 * _noise(rng, 5) + 0.35 * _noise(rng, 12) - 0.15, 0, 1)[..., None] * 0.75
        sky = sky * (1 - cloud) + 246 * cloud
    base = np.array(_GROUND[scene.setting]) * rng.uniform(0.85, 1.12) + rng.normal(0, 5, 3)
    near = 0.82 + 0.3 * np.clip((y - scene.horizon) / (SIZE - scene.horizon), 0, 1)[..., None]
    grain = _GRAIN[scene.setting] * (0.7 * _noise(rng, 16) + 0.5 * _noise(rng, 7))[..., None]
    ground = base * near + grain
    if scene.setting == "table":
        ground = ground + 9 * np.sin(y * rng.uniform(0.9, 1.6) + 0.6 * _noise(rng, 4))[..., None]
    if scene.setting == "road":
        stripe = (np.abs(y - (scene.horizon + SIZE) / 2) < 0.9) & (
            (np.arange(SIZE) + int(rng.integers(12))) % 12 < 6
        )
        ground = np.where(stripe[..., None], 226.0, ground)
    return np.broadcast_to(sky * (1 - below) + ground * below, (SIZE, SIZE, 3)).astype(np.float32)


def _shadow(thing: Thing, light: float) -> np.ndarray:
    """Soft shadow on the ground, thrown away from the light (towards it if ``thing.shadow`` < 0)."""
    side = 0.22 if thing.shadow >= 0 else -0.45
    cx, cy = thing.x - side * light * thing.size, thing.base_y
    d = ((_X - cx) / (0.52 * thing.size)) ** 2 + ((_Y - cy) / (0.15 * thing.size + 0.6)) ** 2
    return 0.5 * abs(thing.shadow) * np.exp(-1.4 * d * d)


def _painted(thing: Thing, side: int) -> np.ndarray:
    """The thing on a tile of its own, uint8 RGBA; grafted and turned where it says so."""
    draw = DRAW if thing.named else UNNAMED
    tile = Tile(side)
    draw[thing.kind](tile, thing.paint)
    picture = tile.image
    if thing.graft is not None:
        other = Tile(side)
        DRAW[thing.graft.kind](other, thing.graft.rgb)
        cut = round(side * thing.graft.share)
        part = (0, 0, side, cut) if thing.graft.above else (side - cut, 0, side, side)
        picture.paste(other.image.crop(part), part[:2])
    if thing.angle:
        picture = picture.rotate(thing.angle, Image.Resampling.BICUBIC)
    array = np.asarray(picture)
    return array[:, ::-1] if thing.flip else array


def _sprite(thing: Thing, light: float, outline: float = 0.0) -> tuple[np.ndarray, np.ndarray, float]:
    """Shaded object on the full canvas: premultiplied RGB in 0..255, alpha, and the area of it all in px."""
    s = SUPERSAMPLING
    side = max(4, round(thing.size * s))
    picture = _painted(thing, side).astype(np.float32)
    v, u = np.mgrid[0:side, 0:side].astype(np.float32) / side - 0.5
    shade = 1.0 + 0.30 * light * u - 0.26 * v
    if thing.kind == "ball":
        r2 = (u - 0.16 * light) ** 2 + (v + 0.1) ** 2
        shade = 1.22 - 1.5 * r2
    alpha = picture[..., 3:] / 255
    if outline:
        inner = Image.fromarray(picture[..., 3].astype(np.uint8)).filter(ImageFilter.MinFilter(2 * s - 1))
        shade = shade * (1 - outline * (1 - np.asarray(inner, dtype=np.float32) / 255))
    rgb = np.clip(picture[..., :3] * shade[..., None], 0, 255) * alpha
    left, top = round((thing.x - thing.size / 2) * s), round((thing.base_y - thing.size) * s)
    # only the whole pixels that the tile touches are averaged down
    x0, y0, x1, y1 = left // s, top // s, -(-(left + side) // s), -(-(top + side) // s)
    big = np.zeros(((y1 - y0) * s, (x1 - x0) * s, 4), dtype=np.float32)
    dy, dx = top - y0 * s, left - x0 * s
    big[dy : dy + side, dx : dx + side, :3] = rgb
    big[dy : dy + side, dx : dx + side, 3:] = alpha
    local = big.reshape(y1 - y0, s, x1 - x0, s, 4).mean(axis=(1, 3))
    small = np.zeros((SIZE, SIZE, 4), dtype=np.float32)
    inside = np.s_[max(0, y0) : min(SIZE, y1), max(0, x0) : min(SIZE, x1)]
    small[inside] = local[
        inside[0].start - y0 : inside[0].stop - y0, inside[1].start - x0 : inside[1].stop - x0
    ]
    return small[..., :3], small[..., 3], float(local[..., 3].sum())
