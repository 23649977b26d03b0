"""What the laboratory is for: the method before and after the camera, on probes, and in shifted worlds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from itemkit import schema
from itemkit.controls import Mahalanobis
from itemkit.detector import Detector
from itemkit.features import Features
from itemkit.manifest import read_manifest
from itemkit.metrics import effect_size
from itemkit.misalignment import cosines
from minilab import guards, probes

COLUMNS = ("global_cosine", "mean_local_cosine", "worst_local_cosine")


def lay_out(file: Path, folder: Path) -> pd.DataFrame:
    """Write the pictures of one of the laboratory's Parquet files, and read them as a manifest.

    Parameters
    ----------
    file : Path
        With ``generator, split, prompt, png``.
    folder : Path
        Where the pictures and ``manifest.csv`` go.

    Returns
    -------
    DataFrame
        A manifest. ``untouched`` and shifted probes and originals of edits are real, so ``source`` keeps the
        file's names: a manifest calls every real image's generator ``real``.
    """
    table = pd.read_parquet(file)
    count = table.groupby(["generator", "split"]).cumcount().map("{:04d}".format)
    table["path"] = "images/" + table["generator"] + "/" + table["split"] + "-" + count + ".png"
    for path, data in zip(table["path"], table["png"], strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    right = [schema.REAL_GENERATOR, "edit_original", probes.UNTOUCHED, *probes.SHIFTED]
    manifest = pd.DataFrame(
        {
            schema.PATH: table["path"],
            schema.LABEL: (~table["generator"].isin(right)).astype(int),
            schema.GENERATOR: table["generator"],
            schema.SOURCE: table["generator"],
            schema.SPLIT: table["split"],
            schema.CAPTION: table["prompt"],
        }
    )
    manifest.to_csv(folder / "manifest.csv", index=False)
    return read_manifest(folder / "manifest.csv")


def observation(
    features: Features, against: Features | None = None, by: str = schema.GENERATOR
) -> pd.DataFrame:
    """How well each generator's test images are told from reals by one untrained cosine.

    Parameters
    ----------
    features : Features
        Of reals and fakes, or of fakes or probes alone.
    against : Features, optional
        Holds the reals; by default ``features`` does.
    by : str
        Column of the table that names the groups; ``source`` for what :func:`lay_out` made.

    Returns
    -------
    DataFrame
        ``generator, cosine`` and the AUROC that a real fits better, with its interval, and ``d``, as of
        :func:`itemkit.metrics.effect_size`.
    """
    test = features.split("test")
    reals = test if against is None else against.split("test")
    mine, theirs = cosines(test), cosines(reals)
    of, real = test.table[by].to_numpy(), reals.table[schema.GENERATOR] == schema.REAL_GENERATOR
    rows = []
    for name in dict.fromkeys(of[of != schema.REAL_GENERATOR]):
        for column in COLUMNS:
            found = effect_size(
                theirs[column][real.to_numpy()].to_numpy(), mine[column][of == name].to_numpy()
            )
            rows.append({"generator": name, "cosine": column, **found})
    return pd.DataFrame(rows)


def called_fake(
    detector: Detector, features: Features, fpr: float = 0.05, by: str = schema.SOURCE
) -> pd.DataFrame:
    """Share of each probe, or generator, that a detector calls fake at its threshold.

    Parameters
    ----------
    detector : Detector
    features : Features
    fpr : float
        Rate of the threshold.
    by : str
        Column of the table that names the groups.

    Returns
    -------
    DataFrame
        ``name, n, called_fake, low, high``: the share with its exact 95 % interval.
    """
    fake = detector.decision_function(features) > detector.threshold(fpr).value
    rows = []
    for name, group in pd.Series(fake).groupby(features.table[by].to_numpy(), sort=False):
        share = binomtest(int(group.sum()), len(group)).proportion_ci()
        found = {"called_fake": group.mean(), "low": share.low, "high": share.high}
        rows.append({"name": name, "n": len(group), **found})
    return pd.DataFrame(rows)


def pixels_on_probes(known: np.ndarray, reals: np.ndarray, pictures: dict[str, np.ndarray]) -> pd.DataFrame:
    """What one-class guards see of probes.

    Parameters
    ----------
    known : uint8 array, shape (m, side, side, 3)
        Photographs of training reals.
    reals : uint8 array
        Photographs of test reals.
    pictures : dict of str to uint8 array
        Photographs of each probe.

    Returns
    -------
    DataFrame
        ``guard, generator`` and of :func:`itemkit.metrics.effect_size` the AUROC of the guard's distance.
    """
    rows = []
    for guard, measure in guards.GUARDS.items():
        of_reals = Mahalanobis().fit(measure(known), np.zeros(len(known)))
        near = of_reals.decision_function(measure(reals))
        for name, images in pictures.items():
            # effect_size asks by how much reals exceed: a distance counts with its sign turned
            found = effect_size(-near, -of_reals.decision_function(measure(images)))
            rows.append({"guard": guard, "generator": name, **found})
    return pd.DataFrame(rows)
