"""What people ask of features first: which images are hard, what betrays, whose captions serve, who pays."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from itemkit import calibrate, schema
from itemkit.errors import InputError
from itemkit.features import FOUND, Features
from itemkit.metrics import effect_size, interval, replicate, resample
from itemkit.misalignment import Representation, cosines
from itemkit.models import differences
from itemkit.text import count

if TYPE_CHECKING:
    from itemkit.detector import Detector

LEAST = 10  # objects or images of each class below which there is no AUROC; our choice
SMALL_PX = 224  # shorter side that image towers are shown at least; what is smaller is enlarged
TAGS = 20  # at most, the most frequent ones


def hardest(
    features: Features, detector: Detector, n: int = 8, *, by: str = "wrong", fpr: float = 0.05
) -> pd.DataFrame:
    """Find the images of each class that are hardest for a detector.

    Parameters
    ----------
    features : Features
        Labelled images.
    n : int
        At most so many of each class.
    by : {"wrong", "unsure"}
        Farthest on the wrong side of the threshold, or nearest to it on any side.
    fpr : float
        Rate of the threshold; where it cannot be promised, p(fake) = 1/2 takes its place.

    Returns
    -------
    DataFrame
        Reals first, the hardest of a class first: ``image_id, path, label, generator, caption, p_fake``,
        ``margin`` (calibrated log-odds by which an image is on its own side of the threshold; below 0 it is
        wrong) and ``phrase``: the object that fits worst, compared with what real ones among these images
        have with such a phrase (`itemkit.misalignment` says why); missing where no object is named.
    """
    if by not in ("wrong", "unsure"):
        raise InputError(f"by={by!r}: expected 'wrong' or 'unsure'")
    y, scores, cut = features.labels, detector.decision_function(features), 0.0
    with contextlib.suppress(InputError):  # too few calibration reals for this rate
        cut = float(detector.calibrator_.logit(np.array(detector.threshold(fpr).value)))
    margin = (detector.calibrator_.logit(scores) - cut) * np.where(y == schema.FAKE, 1, -1)
    given = [schema.IMAGE_ID, schema.PATH, schema.LABEL, schema.GENERATOR, schema.CAPTION]
    table = features.table[given].assign(p_fake=detector.calibrator_(scores), margin=margin)
    fits = Representation("cosines_relative" if (y == schema.REAL).sum() > 1 else "cosines").fit(features)
    order = np.argsort(np.abs(margin) if by == "unsure" else margin, kind="stable")
    some = table.iloc[order].groupby(schema.LABEL).head(n).sort_values(schema.LABEL, kind="stable")
    some = some.assign(phrase=fits.worst_phrase(features.select(some.index.to_numpy())).to_numpy())
    return some.reset_index(drop=True)


def by_phrase(features: Features, *, head: bool = False, least: int = LEAST) -> pd.DataFrame:
    """Find the objects that betray: phrases that fakes fit less well than real images do.

    Parameters
    ----------
    features : Features
        Labelled images. Objects for which no box was found take no part.
    head : bool
        Put phrases together by their last word, in English the noun: "a red ball" and "the ball".
    least : int
        Objects of each class that a phrase needs; with fewer, its AUROC is empty and it comes last.

    Returns
    -------
    DataFrame
        ``phrase, n_real, n_fake, real, fake`` (median cosines), ``auroc, low, high``: how well the cosine of
        this phrase alone tells the classes apart (above 1/2: real ones fit better), with its 95 % interval
        over objects (DeLong). Sorted by ``low``. Of many phrases some look good by luck: an interval is about
        one phrase chosen beforehand.
    """
    there = features.objects.get(FOUND, pd.Series(True, features.objects.index)).to_numpy(bool)
    words = features.objects["phrase"].astype(str).str.casefold().str.strip()
    if head:
        words = words.str.split().str[-1].fillna("")
    fit = np.einsum("ij,ij->i", features.region_emb, features.phrase_emb)
    table = pd.DataFrame({"phrase": words, "y": features.labels[features.owner], "fit": fit})[there]
    rows = []
    for phrase, objects in table.groupby("phrase"):
        real, fake = (objects["fit"][objects["y"] == label] for label in (schema.REAL, schema.FAKE))
        size = effect_size(real, fake) if min(len(real), len(fake)) >= least else {}
        about = [size.get(name, np.nan) for name in ("auroc", "auroc_low", "auroc_high")]
        rows.append((phrase, len(real), len(fake), real.median(), fake.median(), *about))
    columns = ["phrase", "n_real", "n_fake", "real", "fake", "auroc", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("low", ascending=False, ignore_index=True)


def slices(features: Features, detector: Detector, fpr: float = 0.05, *, least: int = LEAST) -> pd.DataFrame:
    """What a detector is worth on parts of the images that it may serve worse.

    Parameters
    ----------
    features : Features
        Labelled images. Where the manifest had a column ``tags`` ("text; face"), each of the most frequent
        tags is a part, too; without it nothing is known of what is written on images or who is on them.
    fpr : float
        Rate of the threshold.
    least : int
        Images of each class that an AUROC needs.

    Returns
    -------
    DataFrame
        ``part, n_real, n_fake, auroc, low, high`` (95 % over images, DeLong), ``false_alarms, alarms_low,
        alarms_high`` (share of its reals above the threshold, exact binomial) and ``note``: why a number is
        missing. Parts overlap; of many, some stand out by luck.
    """
    table, y = features.table.reset_index(drop=True), features.labels
    scores, parts = detector.decision_function(features), {"all": np.ones(len(table), bool)}
    lacking = calibrate.lacking(fpr, len(detector.real_scores_), schema.REAL)
    side = table.reindex(columns=["width", "height"]).astype(float).min(axis=1, skipna=False)
    parts["caption names no object"] = np.bincount(features.owner, minlength=len(table)) == 0
    parts[f"shorter side below {SMALL_PX} px"] = (side < SMALL_PX).to_numpy()
    column = table.get(schema.TAGS, pd.Series(index=table.index, dtype=object))
    tags = column.fillna("").astype(str).str.casefold().str.split(r"[;,|]").explode().str.strip()
    tags = tags[tags != ""]
    for tag in tags.value_counts().index[:TAGS]:
        parts[f"tag: {tag}"] = table.index.isin(tags.index[tags == tag])
    if (rarer := tags.nunique() - TAGS) > 0:
        warnings.warn(f"{count(rarer, 'rarer tag')} left out", stacklevel=2)
    rows = []
    for part, mine in parts.items():
        real, fake = (scores[mine & (y == label)] for label in (schema.REAL, schema.FAKE))
        size = effect_size(fake, real) if min(len(real), len(fake)) >= least else {}
        auroc = [size.get(name, np.nan) for name in ("auroc", "auroc_low", "auroc_high")]
        notes, alarms = [] if size else [f"AUROC needs {least} of each class"], [np.nan] * 3
        notes += [lacking] if lacking else [] if len(real) else ["no real image"]
        if len(real) and not lacking:
            k = int((real > detector.threshold(fpr).value).sum())
            alarms = [k / len(real), *calibrate.proportion_interval(k, len(real))]
        notes += ["no column 'tags'"] if part == "all" and schema.TAGS not in table else []
        rows.append((part, len(real), len(fake), *auroc, *alarms, "; ".join(notes)))
    names = "part n_real n_fake auroc low high false_alarms alarms_low alarms_high note"
    return pd.DataFrame(rows, columns=names.split())


def compare_captions(a: Features, b: Features, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Compare two sets of captions of the same images: users' and generated ones, or of two captioners.

    Parameters
    ----------
    a, b : Features
        Labelled, of the same encoder. Images that only one of them has are left out, with a warning.
    n_boot, seed : int
        Resamples of the images within each class, the same for both captions.

    Returns
    -------
    DataFrame
        ``measure`` (the columns of `itemkit.misalignment.cosines`), ``of`` ("real", "fake": mean cosine of
        that class; "auroc": of real against fake by this cosine alone), ``n, a, b, difference`` (b - a),
        ``low, high`` (95 % over images).
    """
    one, other = ((part.run.get("fingerprint") or {}).get("encoder") for part in (a, b))
    if different := differences(one, other):
        raise InputError(f"cosines of two encoders cannot be compared: {different[0]}")
    ids = [part.table[schema.IMAGE_ID] for part in (a, b)]
    if twice := next((x[x.duplicated()].iloc[0] for x in ids if x.duplicated().any()), ""):
        raise InputError(f"the image {twice} comes several times; compare one caption of each image")
    common = ids[0][ids[0].isin(ids[1])]
    if left := len(ids[0]) + len(ids[1]) - 2 * len(common):
        warnings.warn(f"{count(left, 'image')} that only one set has left out", stacklevel=2)
    if not len(common):
        raise InputError("the two sets have no image in common")
    pair = [part.select(pd.Index(x).get_indexer(common)) for part, x in zip((a, b), ids, strict=True)]
    y, fits = pair[0].labels, [cosines(part).drop(columns="n_objects") for part in pair]

    def replicates(weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        """Both sets' numbers under every column of image weights, each an array (2, b)."""
        found = {}
        for measure in fits[0]:
            x = np.stack([fit[measure].to_numpy(np.float64) for fit in fits])
            for label in np.unique(y):
                mine = y == label
                mean = x[:, mine] @ (weights[mine] / weights[mine].sum(axis=0))
                found[measure, schema.LABEL_NAMES[label]] = mean
            if len(np.unique(y)) == 2:
                parts = [replicate(y, -s, weights, metrics=["auroc"])["auroc"] for s in x]
                found[measure, "auroc"] = np.stack(parts)
        return found

    rng, size = np.random.default_rng(seed), max(1, int(4e6 // len(y)))  # resamples at a time bound memory
    draws = (resample(y, min(size, n_boot - start), rng) for start in range(0, n_boot, size))
    parts = [replicates(weights) for weights in (np.ones((len(y), 1)), *draws)]
    counts, rows = (
        {**dict(zip(("real", "fake"), np.bincount(y, minlength=2), strict=True)), "auroc": len(y)},
        [],
    )
    for measure, of in parts[0]:
        values = np.concatenate([part[measure, of] for part in parts], axis=1)
        change = values[1] - values[0]
        rows.append((measure, of, counts[of], *values[:, 0], change[0], *interval(change[1:])))
    return pd.DataFrame(rows, columns=["measure", "of", "n", "a", "b", "difference", "low", "high"])
