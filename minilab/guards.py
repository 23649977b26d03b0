"""What a detector reaches that sees no content: file bytes, border, noise level, histogram, spectrum.

Real and fake go through one camera and leave through one codec at one size. What is left in these is the
generators' own doing; it is reported, so that nobody takes it for an effect of misalignment. Each guard is a
pair of detectors: one has seen the fakes it is asked about, the other has seen real images alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import unwrap
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier

from itemkit import controls, schema
from itemkit.metrics import bootstrap
from minilab import fakes
from minilab.camera import jpeg, photographs
from minilab.renders import make_renders
from minilab.world import SPLITS

BORDER_PX = 2


def border(pictures: np.ndarray) -> np.ndarray:
    """Mean and spread of the frame of pixels along each edge, for each channel.

    Parameters
    ----------
    pictures : uint8 array, shape (n, side, side, 3)

    Returns
    -------
    float array, shape (n, 24)
    """
    x, k = pictures.astype(float), BORDER_PX
    edges = (x[:, :k], x[:, -k:], x[:, :, :k], x[:, :, -k:])
    return np.concatenate([f(e, axis=(1, 2)) for e in edges for f in (np.mean, np.std)], axis=1)


# pictures go in, not features: the controls of a study measure the same
GUARDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "file bytes": unwrap(controls.file_length),
    "border pixels": border,
    "noise level": unwrap(controls.noise_level),
    "histogram": unwrap(controls.histogram),
    "spectrum": unwrap(controls.spectrum),
}


def leaks(
    table: pd.DataFrame,
    pictures: np.ndarray,
    seeds: Sequence[int] = range(5),
    names: Sequence[str] = tuple(GUARDS),
) -> pd.DataFrame:
    """Try guards on every generator of a data set.

    Parameters
    ----------
    table : DataFrame, n rows
        With ``generator`` and ``split``.
    pictures : uint8 array, shape (n, side, side, 3)
    seeds : sequence of int
        Of the boosted trees; their probabilities are averaged.
    names : sequence of str
        Guards to try.

    Returns
    -------
    DataFrame
        ``guard, classes, generator, value, low, high``: AUROC on the test split with its 95 % bootstrap
        interval; ``classes`` is 2 for trees trained on reals and this generator, 1 for the distance from
        training reals.
    """
    name, split = table[schema.GENERATOR].to_numpy(), table[schema.SPLIT].to_numpy()
    real, known, test = name == schema.REAL_GENERATOR, np.isin(split, ("train", "val")), split == "test"
    rows = []
    for guard in names:
        x = GUARDS[guard](pictures)
        far = controls.Mahalanobis().fit(x[known], ~real[known]).decision_function(x)
        for generator in dict.fromkeys(name[~real]):
            of = real | (name == generator)
            at = of & test
            told = [
                HistGradientBoostingClassifier(max_iter=60, random_state=seed)
                .fit(x[of & known], ~real[of & known])
                .predict_proba(x[at])[:, 1]
                for seed in seeds
            ]
            for classes, score in ((2, np.mean(told, axis=0)), (1, far[at])):
                found = bootstrap((~real[at]).astype(int), score, metrics=("auroc",)).iloc[0]
                rows.append(
                    {"guard": guard, "classes": classes, "generator": generator}
                    | dict(found[["value", "low", "high"]])
                )
    return pd.DataFrame(rows)


def three_conditions(folder: Path, device: str = "cpu", quality: tuple[int, int] = (50, 95)) -> pd.DataFrame:
    """Guards on samples as they are, through the camera, and after one random JPEG on top.

    Parameters
    ----------
    folder : Path
        Weights of the generators; their samples for the data set are drawn, or taken from where they are
        kept.
    device : str
    quality : tuple of int
        Range of the JPEG's quality.

    Returns
    -------
    DataFrame
        As of :func:`leaks`, with ``condition``: ``raw``, ``camera``, ``jpeg``.
    """
    tables, raw, shots = [], [], []
    for split, n in fakes.COUNTS.items():
        scenes = make_renders(split, fakes.REAL_FACTOR * n)
        tables.append(
            pd.DataFrame({schema.SPLIT: [split] * len(scenes), schema.GENERATOR: schema.REAL_GENERATOR})
        )
        raw.append(scenes.images)
        shots.append(photographs(scenes.images, (fakes.REALS, SPLITS[split], 0)))
    for i, (name, splits, _, images) in enumerate(fakes.samples(folder, device)):
        tables.append(pd.DataFrame({schema.SPLIT: splits, schema.GENERATOR: name}))
        raw.append(images)
        shots.append(photographs(images, (fakes.FAKES, i)))
    table = pd.concat(tables, ignore_index=True)
    camera = np.concatenate(shots)
    rng = np.random.default_rng(0)
    pressed = np.stack([jpeg(x, int(rng.integers(quality[0], quality[1] + 1))) for x in camera])
    found = {"raw": np.concatenate(raw), "camera": camera, "jpeg": pressed}
    return pd.concat([leaks(table, x).assign(condition=name) for name, x in found.items()], ignore_index=True)
