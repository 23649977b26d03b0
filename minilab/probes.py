"""Pictures that no generator made and whose truth is known: wrong but sharp, and right but shifted.

*Wrong*: a real scene in which one thing is not what a scene of this world can hold, painted by the world and
photographed by its camera. Pixels are as real as can be; only the meaning is off. *Shifted*: a real scene in
another light or style. Nothing is wrong with it, and no detector should call it fake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from minilab.camera import CAMERA, SHIFTS, Camera, photo_files
from minilab.fakes import picture_table
from minilab.grammar import COLOURS, KINDS, caption
from minilab.sprites import RGB, Rgb
from minilab.world import Graft, Scene, Style, Thing, render, sample_scene, scene_rng

Change = Callable[[Thing, int, np.random.Generator], Thing]

N_PROBES = 80
FIRST_SCENE = 200_000
"""Probes show scenes of the ``test`` split from here on, the same for all; nothing else shows them."""
PROBES = 3
"""First number of the stream from which their photographs draw their settings."""
STRANGE: tuple[Rgb, ...] = ((0, 190, 190), (112, 66, 28), (26, 26, 30), (150, 160, 30))
"""Turquoise, brown, black and olive: no thing of the world has such a colour."""


def _other(rng: np.random.Generator, names: tuple[str, ...], own: str) -> str:
    return str(rng.choice([name for name in names if name != own]))


def fused(thing: Thing, level: int, rng: np.random.Generator) -> Thing:
    """Its right side is another thing of another colour: a quarter, two fifths or half of it."""
    kind, colour = _other(rng, KINDS, thing.kind), _other(rng, COLOURS, thing.colour)
    return replace(thing, graft=Graft(kind, RGB[colour], (0.25, 0.4, 0.5)[level], above=False))


def swapped(thing: Thing, level: int, rng: np.random.Generator) -> Thing:
    """Its upper part is that of another kind, in its own colour: a fifth, a third or half of it."""
    kind = _other(rng, KINDS, thing.kind)
    return replace(thing, graft=Graft(kind, thing.paint, (0.2, 0.35, 0.5)[level], above=True))


def unlit(thing: Thing, level: int, rng: np.random.Generator) -> Thing:
    """Its shadow is weak, missing, or falls towards the light."""
    return replace(thing, shadow=(0.4, 0.0, -1.0)[level])


def recoloured(thing: Thing, level: int, rng: np.random.Generator) -> Thing:
    """Its colour moves a third, two thirds or all of the way to one that no thing of the world has."""
    own, strange = np.array(thing.paint), np.array(STRANGE[int(rng.integers(len(STRANGE)))])
    mixed = own + (strange - own) * (0.35, 0.65, 1.0)[level]
    return replace(thing, rgb=tuple(int(v) for v in mixed.round()))  # type: ignore[arg-type]


WRONG: dict[str, Change] = {"fused": fused, "swapped": swapped, "unlit": unlit, "recoloured": recoloured}
LEVELS = (0, 1, 2)


@dataclass(frozen=True)
class Shift:
    """A world that differs from the one that models know, without being wrong."""

    camera: Camera = CAMERA
    style: Style = Style()
    angle: float = 0.0


SHIFTED: dict[str, Shift] = {
    **{name: Shift(camera=camera) for name, camera in SHIFTS.items()},
    "outlines": Shift(style=Style(outline=0.75)),
    "rough texture": Shift(style=Style(texture=0.12)),
    "turned objects": Shift(angle=35.0),
}
UNTOUCHED = "untouched"


def largest(scene: Scene) -> int:
    """Place of the largest named thing."""
    return max((i for i, t in enumerate(scene.things) if t.named), key=lambda i: scene.things[i].size)


def changed(scene: Scene, change: Change, level: int, rng: np.random.Generator) -> Scene:
    """The scene with its largest thing changed."""
    at = largest(scene)
    things = [change(t, level, rng) if i == at else t for i, t in enumerate(scene.things)]
    return replace(scene, things=tuple(things))


def shifted(scene: Scene, shift: Shift) -> Scene:
    """The scene with its things turned, if the shift turns them."""
    return replace(scene, things=tuple(replace(t, angle=shift.angle) for t in scene.things))


def probe_files(name: str, scenes: list[Scene]) -> list[bytes]:
    """Photograph one probe.

    Parameters
    ----------
    name : str
        One of :func:`probe_names`.
    scenes : list of Scene, length n

    Returns
    -------
    list of bytes, length n
        Picture k of every probe has the same noise, and, under the plain camera, settings.
    """
    kind, _, level = name.rpartition(" ")
    shift = SHIFTED.get(name, Shift())
    painted = []
    for k, scene in enumerate(scenes):
        if kind in WRONG:
            rng = np.random.default_rng([PROBES, k])
            scene = changed(scene, WRONG[kind], int(level) - 1, rng)
        painted.append(render(shifted(scene, shift), shift.style).image)
    return photo_files(np.stack(painted), (PROBES,), shift.camera)


def probe_names() -> list[str]:
    """``untouched``, ``<change> <level from 1>`` for all that is wrong, and the shifts."""
    return [UNTOUCHED, *(f"{kind} {level + 1}" for kind in WRONG for level in LEVELS), *SHIFTED]


def build_probes(n: int = N_PROBES) -> pd.DataFrame:
    """Make all probes of the same n scenes.

    Parameters
    ----------
    n : int

    Returns
    -------
    DataFrame
        ``generator`` (the probe), ``split`` (test), ``prompt`` (the untouched scene), ``image``.
    """
    scenes = [sample_scene(scene_rng("test", FIRST_SCENE + k)) for k in range(n)]
    prompts = [caption(scene.facts) for scene in scenes]
    tables = [picture_table(name, ["test"] * n, prompts, probe_files(name, scenes)) for name in probe_names()]
    return pd.concat(tables, ignore_index=True)
