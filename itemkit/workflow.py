"""From a preset and a data folder to features in one call: what notebooks and the command line share."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.calibrate import check_promises
from itemkit.detector import Detector
from itemkit.errors import InputError
from itemkit.extraction import extract
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.images import ImageError, load_image
from itemkit.manifest import assign_splits, read_manifest
from itemkit.presets import Preset, get_preset, mini_folder
from itemkit.steps import Stages, fingerprint
from itemkit.store import concat_features, load_features

LAB_NOTE = "mini laboratory: rendered scenes and small generators, not photographs"
MINI_ON_FOREIGN_IMAGES = (
    "note: the mini models know rendered scenes only. On other images the path is real, the numbers mean "
    "nothing; use --preset fast or paper for results."
)


def data_manifest(data: str | Path | None, out_dir: str | Path, preset: str = "mini") -> pd.DataFrame:
    """Read a data set's manifest; without one, lay out the mini laboratory's images and read theirs.

    Parameters
    ----------
    data : path or None
        CSV, Parquet or folder; None or empty stands for the mini laboratory.
    out_dir : path
        The mini images are written to ``out_dir/mini`` the first time.
    preset : str
        Only to tell what is missing.

    Returns
    -------
    DataFrame
        Every labelled image has a split.
    """
    if data is None or str(data) == "":
        if preset != "mini":
            raise InputError(f"preset '{preset}' needs images: give a folder or a manifest (DATA, or --data)")
        # the one place outside its own command where the laboratory is used: it is the default data set
        from minilab.fakes import materialise

        data = materialise(mini_folder() / "fakes.parquet", Path(out_dir) / "mini")
    manifest = read_manifest(data)
    labelled = manifest[schema.LABEL].notna()
    if (labelled & manifest[schema.SPLIT].isna()).any():
        manifest = assign_splits(manifest)
    return manifest


def features(
    preset: str | Preset = "mini",
    data: str | Path | None = None,
    out_dir: str | Path = "results",
    device: str = "auto",
    *,
    name: str = "",
    splits: tuple[str, ...] = (),
    generators: tuple[str, ...] = (),
    transform: Callable[..., Any] | None = None,
    captions: str | pd.Series = "generate",
    progress: bool = True,
    **overrides: Any,
) -> Features:
    """Features of a data set, computed now or read back from ``out_dir/features``.

    Parameters
    ----------
    preset : str or Preset
        ``mini``, ``fast``, ``paper``, or a preset put together by hand.
    data, out_dir
        See :func:`data_manifest`.
    device : str
    name : str
        Of the feature store, beside the preset's own; needed where another transform or other models make it.
    splits, generators : tuple of str
        Take images of these only; all by default. ``real`` is a generator here.
    transform : callable, optional
        Applied to every image before the method sees it, e.g. a perturbation.
    captions : {"generate", "user"} or Series
        From the captioner, from the manifest, or from a Series indexed by path.
    progress : bool
    **overrides
        Parts of the preset to replace, e.g. ``localiser="dense"``.

    Returns
    -------
    Features
    """
    chosen = get_preset(preset, **overrides) if isinstance(preset, str) else preset
    manifest = data_manifest(data, out_dir, chosen.name)
    for column, wanted in ((schema.SPLIT, splits), (schema.GENERATOR, generators)):
        if wanted:
            manifest = manifest[manifest[column].isin(wanted)].reset_index(drop=True)
    if not isinstance(captions, str):
        manifest = manifest.assign(**{schema.CAPTION: manifest[schema.PATH].map(captions)})
        captions = "user"
    store = Path(out_dir) / "features" / "-".join(p for p in (chosen.name, name) if p)
    extract(
        manifest,
        store,
        chosen.build(device),
        captions=captions,
        transform=transform,
        progress=progress,
        config=chosen.record(),
    )
    return load_features(store)


def add_pixels(
    features: Features,
    side_px: int = 48,
    transform: Callable[..., Any] | None = None,
    crop: bool = False,
) -> Features:
    """Load the images themselves beside their features, for the controls that look at pixels.

    Parameters
    ----------
    features : Features
    side_px : int
        Images are scaled to this size if they have another.
    transform : callable, optional
        The one the features were made with, applied first.
    crop : bool
        Take the centre instead of scaling, which would remove what these controls look for; only images that
        are smaller are scaled.

    Returns
    -------
    Features
        With ``pixels``, uint8, shape (n, side_px, side_px, 3).
    """
    pixels = np.empty((len(features), side_px, side_px, 3), np.uint8)
    for row, (path, image_id) in enumerate(
        zip(features.table[schema.PATH], features.table[schema.IMAGE_ID], strict=True)
    ):
        image = load_image(path)
        if transform is not None:
            image = transform(image, image_id)
        if crop:
            left, top = (max(0, (side - side_px) // 2) for side in image.size)
            image = image.crop(
                (left, top, min(image.width, left + side_px), min(image.height, top + side_px))
            )
        if image.size != (side_px, side_px):
            image = image.resize((side_px, side_px))
        pixels[row] = np.asarray(image)
    return dataclasses.replace(features, pixels=pixels)


def warn_if_foreign(preset: str, data: str | Path | None) -> None:
    """Say on stderr that the mini models mean nothing on images from elsewhere."""
    if preset == "mini" and data:
        print(MINI_ON_FOREIGN_IMAGES, file=sys.stderr)


def warn_about_features(features: Features) -> None:
    """Say the same of stored features that the mini models made from images other than the laboratory's."""
    from minilab.fakes import SOURCE

    config = features.run.get("config") or {}
    if config.get("name") == "mini" and not (features.table[schema.SOURCE] == SOURCE).all():
        print(MINI_ON_FOREIGN_IMAGES, file=sys.stderr)


def read_features(store: str | Path) -> Features:
    """Read a feature store; labelled images without any split are split here, always in the same way.

    Parameters
    ----------
    store : path

    Returns
    -------
    Features
    """
    features = load_features(store)
    table = features.table
    labelled = table[schema.LABEL].notna()
    if labelled.any() and table.loc[labelled, schema.SPLIT].isna().all():
        split = assign_splits(table.loc[labelled])[schema.SPLIT]
        table = table.assign(**{schema.SPLIT: split.reindex(table.index)})
        counts = ", ".join(f"{k} {v}" for k, v in split.value_counts().items())
        print(f"note: the images have no splits; divided by generator with seed 0: {counts}", file=sys.stderr)
    return dataclasses.replace(features, table=table)


def take_split(features: Features, split: str) -> Features:
    """Select the labelled images of one split.

    Parameters
    ----------
    features : Features
    split : str

    Returns
    -------
    Features

    Raises
    ------
    InputError
        The split is empty; says which there are.
    """
    table = features.table
    rows = (table[schema.SPLIT] == split) & table[schema.LABEL].notna()
    if not rows.any():
        there = ", ".join(f"{k} ({v})" for k, v in table[schema.SPLIT].value_counts().items()) or "none"
        raise InputError(f"no labelled image has split '{split}'; splits there are: {there}")
    return features.select(rows.to_numpy())


def train_detector(
    features: Features,
    representation: str = "absolute",
    generators: Sequence[str] | None = None,
    seeds: int = 5,
) -> Detector:
    """Train a detector on the train split, stop and calibrate it on the val split.

    Parameters
    ----------
    features : Features
    representation : str
        See ``itemkit.misalignment.REPRESENTATIONS``.
    generators : sequence of str, optional
        Fakes of these only, in both splits; all by default.
    seeds : int
        Heads whose log-odds are averaged.

    Returns
    -------
    Detector
    """
    name = features.table[schema.GENERATOR]
    if generators is not None:
        if unknown := sorted(set(generators) - set(name)):
            raise InputError(
                f"no image of {', '.join(unknown)}; generators there are: {', '.join(sorted(set(name)))}"
            )
        features = features.select(name.isin([schema.REAL_GENERATOR, *generators]).to_numpy())
    detector = Detector(representation, MisalignmentMLP(members=seeds))
    return detector.fit(take_split(features, "train"), take_split(features, "val"))


def promises(detector: Detector, test: Features) -> pd.DataFrame:
    """Hold what the detector's thresholds and verdicts promise against labelled images it has not seen.

    Parameters
    ----------
    detector : Detector
    test : Features
        Images that neither trained nor calibrated it are used; the others are left out, with a warning.

    Returns
    -------
    DataFrame
        See `itemkit.calibrate.check_promises`.

    Raises
    ------
    InputError
        All of the images trained, stopped or calibrated the detector.
    """
    new = detector.seen(test) == ""
    if not new.any():
        raise InputError(
            f"all {len(test)} images trained or calibrated this detector, and what it promises is about new "
            "ones; take a split that it has not seen"
        )
    if not new.all():
        warnings.warn(
            f"{int((~new).sum())} of {len(test)} images trained or calibrated this detector; its promises "
            f"are held against the other {int(new.sum())}",
            stacklevel=2,
        )
        test = test.select(new)
    score, y = detector.decision_function(test), test.labels
    known = detector.real_scores_, detector.fake_scores_
    return check_promises(*known, score[y == schema.REAL], score[y == schema.FAKE])


def save_mini_detector(out_dir: str | Path) -> Path:
    """Train the detector that comes with the mini preset, on all of its generators.

    The data set's 120 validation reals are too few for a rate of 1 %: half of them calibrate, 99 are needed.
    So the validation renders that `itemkit study` makes anew join them; its test renders stay unseen.

    Parameters
    ----------
    out_dir : path
        Where the images and features go.

    Returns
    -------
    Path
        Folder of the detector, beside the mini models.
    """
    from itemkit.study_run import fresh_renders  # which imports this module

    known = features("mini", None, out_dir, "cpu")
    # the same store as the study's, so whichever comes second finds it made
    fresh = features("mini", fresh_renders(Path(out_dir) / "mini"), out_dir, "cpu", name="fresh")
    detector = train_detector(concat_features([known, take_split(fresh, "val")]))
    return detector.save(_mini_detector())


def _mini_detector() -> Path:
    return mini_folder() / "models" / "detector"


def detect(
    paths: Sequence[str | Path],
    preset: Preset,
    detector: str | Path | None = None,
    device: str = "auto",
    caption: str | None = None,
    fpr: float = 0.05,
    fnr: float = 0.05,
) -> Iterator[dict[str, Any]]:
    """Judge single images with all steps of the method.

    Parameters
    ----------
    paths : sequence of path
    preset : Preset
    detector : path, optional
        Folder of a trained detector; the mini preset has its own.
    device : str
    caption : str, optional
        The user's caption; generated if not given.
    fpr : float
        At most this share of real images like the validation ones is called fake.
    fnr : float
        At most this share of fake images like the validation ones is called real.

    Yields
    ------
    dict
        For each image, ready for JSON: ``path, verdict, p_fake, because, caption, global_cosine,
        global_real_below, objects`` (phrase, box in pixels, cosine, real_below), or ``path, error``.
    """
    folder = Path(detector) if detector is not None else _mini_detector()
    if detector is None and preset.name != "mini":
        raise InputError(
            f"there is no detector for preset '{preset.name}' yet: train one with `itemkit extract` and "
            "`itemkit train`, and name its folder with --detector"
        )
    judge = Detector.load(folder, device)
    components = preset.build(device)
    stages = Stages(components)
    # a caption given here is another source of text on purpose; the check covers everything else
    ignore = ("captions", "captioner") if caption is not None else ()
    for path in paths:
        try:
            image = load_image(path)
        except ImageError as error:
            yield {"path": str(path), "error": str(error)}
            continue
        one = stages([image], [caption])
        one.table[schema.IMAGE_ID], one.table[schema.PATH] = str(path), str(path)
        one.run = {"fingerprint": fingerprint(components)}
        verdict = judge.verdict(one, fpr, fnr, ignore).iloc[0]
        evidence = judge.explain(one, 0, ignore=ignore)
        whole, local = evidence.iloc[0], evidence.iloc[1:]
        yield {
            "path": str(path),
            "verdict": verdict["verdict"],
            "p_fake": round(float(verdict["p_fake"]), 4),
            "because": verdict["because"],
            "caption": whole["text"],
            "global_cosine": round(float(whole["cosine"]), 4),
            "global_real_below": round(float(whole["real_below"]), 4),
            "objects": [
                {
                    "phrase": row["text"],
                    "box": [round(float(row[k]), 1) for k in ("x0", "y0", "x1", "y1")],
                    "cosine": round(float(row["cosine"]), 4),
                    "real_below": round(float(row["real_below"]), 4),
                }
                for _, row in local.iterrows()
            ],
        }
