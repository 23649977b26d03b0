"""From images to features, a detector and verdicts, each in one call; for notebooks and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit._files import atomic_write, explain_write_error, folder_lock
from itemkit.errors import InputError, StoreError
from itemkit.extraction import extract
from itemkit.features import Features
from itemkit.images import EXTENSIONS, content_id, load_image, read_bytes
from itemkit.manifest import read_manifest
from itemkit.models import file_hash, tidy
from itemkit.presets import MINI_REMEDY, PRESETS, Preset, get_preset, mini_folder
from itemkit.splits import fill_splits
from itemkit.store import fingerprint_hash, load_features
from itemkit.text import did_you_mean, one_line

if TYPE_CHECKING:
    from itemkit.detector import Detector

# the files of data/mini that hold the images of each part of the laboratory
LAB_PARTS = {"images": ("reals", "fakes"), "fresh": ("fresh",), "ladders": ("ladders",)}
# which field of a preset holds the options of a part, and goes with it when the part is replaced
_OPTIONS = {
    "captioner": "captioner_options", "parser": "parser_options",
    "localiser": "localiser_options", "encoder": "encoder_pretrained",
}  # fmt: skip


def lab_manifest(out_dir: str | Path, which: str = "images") -> pd.DataFrame:
    """Lay out images of the mini laboratory as files, once, and read their manifest.

    Parameters
    ----------
    out_dir : path
        They go to ``out_dir/mini``, byte for byte as ``data/mini`` holds them. What is complete is left as it
        is, unless those files have changed since; two processes may do this at once.
    which : {"images", "fresh", "ladders"}
        The data set; new renders of its ``val`` and ``test`` that nothing was trained on; or the rungs of the
        two ladders of better fakes.

    Returns
    -------
    DataFrame
        As `itemkit.manifest.read_manifest` gives it, every image with label and split.

    Raises
    ------
    InputError
        ``data/mini`` lacks a file.
    """
    sources = [mini_folder() / f"{name}.parquet" for name in LAB_PARTS[which]]
    if missing := [tidy(source) for source in sources if not source.is_file()]:
        raise InputError(
            f"the mini laboratory's images are not in {', '.join(missing)}. {MINI_REMEDY.strip()}"
        )
    folder = Path(out_dir) / "mini" / ("" if which == "images" else which)
    manifest, stamp = folder / "manifest.csv", folder / "made_from.sha256"
    made_from = "\n".join(file_hash(source) for source in sources)

    def complete() -> bool:
        return manifest.is_file() and stamp.is_file() and stamp.read_text() == made_from

    if not complete():
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            if not complete():  # else another process has laid them out meanwhile
                table = pd.concat([_lay_out(pd.read_parquet(source), folder) for source in sources])
                atomic_write(manifest, table.to_csv(index=False).encode())
                # the stamp comes last: it says that everything before it is there
                atomic_write(stamp, made_from.encode())
    return read_manifest(manifest)


def _lay_out(pictures: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write ``images/<generator>/<split>-<index>.png`` from rows ``generator, split, prompt, png``."""
    group = pictures.groupby(["generator", "split"], sort=False)
    name = pictures["split"] + "-" + group.cumcount().map("{:04d}".format) + ".png"
    path = "images/" + pictures["generator"] + "/" + name
    for at, data in zip(path, pictures["png"], strict=True):
        try:
            (folder / at).parent.mkdir(parents=True, exist_ok=True)
            (folder / at).write_bytes(data)
        except OSError as error:
            raise StoreError(explain_write_error(error, folder / at)) from error
    return pd.DataFrame(
        {
            schema.PATH: path,
            schema.LABEL: (pictures["generator"] != schema.REAL_GENERATOR).astype(int),
            schema.GENERATOR: pictures["generator"],
            schema.SOURCE: schema.LAB_SOURCE,
            schema.SPLIT: pictures["split"],
            schema.CAPTION: pictures["prompt"],
        }
    )


def data_manifest(
    data: pd.DataFrame | str | Path | None, out_dir: str | Path, preset: str = "mini"
) -> pd.DataFrame:
    """Manifest of a data set; without one, that of the mini laboratory's images.

    Parameters
    ----------
    data : DataFrame, path or None
        A manifest, or CSV, Parquet or folder to read one from; None or empty stands for the mini laboratory.
    out_dir : path
        See `lab_manifest`.
    preset : str
        Which models are meant; only the mini ones go with the laboratory's images.
    """
    if isinstance(data, pd.DataFrame):
        return data if "report" in data.attrs else read_manifest(data)
    if data is not None and str(data) != "":
        return read_manifest(data)
    if preset != "mini":
        raise InputError(f"preset '{preset}' needs images: give a folder or a manifest (DATA, or --data)")
    return lab_manifest(out_dir)


def features(
    preset: str | Preset = "mini",
    data: pd.DataFrame | str | Path | None = None,
    out_dir: str | Path = "results",
    device: str = "auto",
    *,
    name: str = "",
    splits: Sequence[str] = (),
    generators: Sequence[str] = (),
    transform: Callable[..., Any] | None = None,
    captions: str | pd.Series = "generate",
    progress: bool = True,
    threads: int | None = None,
    **overrides: Any,
) -> Features:
    """Features of a data set, computed now or read back from ``out_dir/features``.

    Parameters
    ----------
    preset : str or Preset
        ``mini``, ``fast``, ``paper``, or a preset put together by hand.
    data, out_dir
        See `data_manifest`.
    device : str
    name : str
        Joins the name of the store's folder, for people who look into it. Other models, captions or
        transforms get a folder of their own in any case.
    splits, generators : sequence of str
        Take images of these only; all by default. ``real`` is a generator here. What else the store holds
        stays in it.
    transform : callable with ``fingerprint()``, optional
        Applied to every image before the method sees it, e.g. a perturbation.
    captions : {"generate", "user"} or Series
        From the captioner, from the manifest, or from a Series indexed by path.
    progress : bool
    threads : int, optional
        Of torch, see `itemkit.devices.set_threads`.
    **overrides
        Parts of the preset to replace, e.g. ``localiser="dense"``; also of one put together by hand.

    Returns
    -------
    Features
        Every labelled image has a split. Where all are there already, no model is loaded.
    """
    chosen = _replaced(preset, overrides)
    if threads is not None:
        from itemkit.devices import set_threads

        set_threads(threads)
    manifest = data_manifest(data, out_dir, chosen.name)
    made_by: list[Any] = []  # what else than the preset as it comes; names the folder
    if not isinstance(captions, str):
        manifest = manifest.assign(**{schema.CAPTION: manifest[schema.PATH].map(captions)})
        made_by.append(int(pd.util.hash_pandas_object(captions).sum()))
        captions = "user"
    if captions != "generate" or chosen.name not in PRESETS or chosen != get_preset(chosen.name):
        made_by.append(chosen.fingerprint(captions, device))
    if transform is not None:
        made_by.append(getattr(transform, "fingerprint", str)())
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()[:8]
    folders = Path(out_dir) / "features"
    store = folders / "-".join(part for part in (chosen.name, name, digest if made_by else "") if part)
    splits_of = None
    if splits or generators:
        manifest, splits_of = _part(manifest, splits, generators, folders / chosen.name)
    extract(manifest, store, chosen, device=device, captions=captions, transform=transform, progress=progress)
    found = _of(manifest, load_features(store, rows=manifest), splits_of)
    return found.select(found.table[schema.SPLIT].isin(splits)) if splits else found


def _replaced(preset: str | Preset, overrides: dict[str, Any]) -> Preset:
    """The preset with parts replaced, whether it is known by name or was put together by hand."""
    if isinstance(preset, str):
        return get_preset(preset, **overrides)
    if not overrides:
        return preset
    given = get_preset("mini", **overrides)  # checks the names and takes texts like NAME:TAG apart
    touched = {*overrides, *(_OPTIONS[part] for part in overrides if part in _OPTIONS)}
    return dataclasses.replace(preset, **{field: getattr(given, field) for field in touched})


def _part(
    manifest: pd.DataFrame, splits: Sequence[str], generators: Sequence[str], plain: Path
) -> tuple[pd.DataFrame, pd.Series | None]:
    """Rows of some splits and generators; and the split of each path of the whole data set, where known."""
    there = sorted(set(manifest[schema.GENERATOR]))
    if unknown := sorted(set(generators) - set(there)):
        hint = did_you_mean(unknown[0], there)
        raise InputError(f"no image of {', '.join(unknown)}.{hint} Generators there are: {', '.join(there)}")
    split, labelled = manifest[schema.SPLIT], manifest[schema.LABEL].notna()
    known = bool(split[labelled].notna().all()) and set(schema.SPLITS) <= set(split)
    if not known:  # splits follow from the images' content; most have been through the plain preset before
        with contextlib.suppress(StoreError):
            table = _of(manifest, load_features(plain, (), rows=manifest)).table
            stored = table.drop_duplicates(schema.PATH).set_index(schema.PATH)[schema.SPLIT]
            split, known = manifest[schema.PATH].map(stored), True
    asked = manifest[schema.GENERATOR].isin(generators) if generators else manifest[schema.PATH].notna()
    if splits and known:
        asked &= split.isin(splits)
    if not asked.any():
        counts = ", ".join(f"{k} ({v})" for k, v in split.value_counts().items())
        wanted = f"split in {list(splits) or 'any'} and generator in {list(generators) or 'any'}"
        raise InputError(f"no image with {wanted}; splits there are: {counts or 'none'}")
    splits_of = split.set_axis(manifest[schema.PATH])[~manifest[schema.PATH].duplicated().to_numpy()]
    return manifest[asked].reset_index(drop=True), splits_of if known else None


def _of(manifest: pd.DataFrame, found: Features, splits_of: pd.Series | None = None) -> Features:
    """Features with the splits that their own data set says, whatever else the store holds."""
    paths, table, run = found.table[schema.PATH], found.table, found.run
    if splits_of is not None:
        table = table.assign(**{schema.SPLIT: paths.map(splits_of)})
    else:
        given = manifest.drop_duplicates(schema.PATH).set_index(schema.PATH)[schema.SPLIT]
        table, note = fill_splits(table.assign(**{schema.SPLIT: paths.map(given)}))
        run = run | {"splits": note}
    return dataclasses.replace(found, table=table, run=run)


def add_pixels(
    features: Features, side_px: int = 48, transform: Callable[..., Any] | None = None, crop: bool = False
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
    table = features.table
    for row, (path, image_id) in enumerate(zip(table[schema.PATH], table[schema.IMAGE_ID], strict=True)):
        image = load_image(path)
        if transform is not None:
            image = transform(image, image_id)
        if crop:
            left, top = (max(0, (side - side_px) // 2) for side in image.size)
            right, bottom = min(image.width, left + side_px), min(image.height, top + side_px)
            image = image.crop((left, top, right, bottom))
        if image.size != (side_px, side_px):
            image = image.resize((side_px, side_px))
        pixels[row] = np.asarray(image)
    return dataclasses.replace(features, pixels=pixels)


def train_detector(
    features: Features,
    representation: str = "absolute",
    generators: Sequence[str] | None = None,
    members: int = 5,
    device: str = "auto",
) -> Detector:
    """Train a detector on the train split, stop and calibrate it on the val split.

    Parameters
    ----------
    features : Features
    representation : str
        See ``itemkit.misalignment.REPRESENTATIONS``.
    generators : sequence of str, optional
        Fakes of these only, in both splits; all by default.
    members : int
        Heads whose log-odds are averaged.
    device : str
        Where the heads are trained.

    Returns
    -------
    Detector
        Also with few images; then it withholds what it cannot promise.

    Raises
    ------
    InputError
        A class has no training image.
    """
    from itemkit.detector import Detector
    from itemkit.head import MisalignmentMLP

    if generators is not None:
        features = features.with_generators(generators)
    detector = Detector(representation, MisalignmentMLP(members=members, device=device))
    table = features.table  # a handful of images may have none of val, which is no reason not to train
    val = (table[schema.SPLIT] == "val").fillna(False) & table[schema.LABEL].notna()
    return detector.fit(features.split("train"), features.select(val.to_numpy(dtype=bool)))


def detect(
    paths: str | Path | Iterable[str | Path],
    preset: str | Preset = "mini",
    detector: str | Path | None = None,
    device: str = "auto",
    caption: str | None = None,
    fpr: float = 0.05,
    fnr: float = 0.05,
) -> Iterator[dict[str, Any]]:
    """Judge single images with all steps of the method.

    Parameters
    ----------
    paths : path or iterable of path
        Image files, or folders, whose images are judged in order.
    preset : str or Preset
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
        For each image, ready for JSON: ``path, image_id`` (SHA-256 of the file), ``seen`` ("train" or "val"
        if the detector was made with it), ``verdict`` (real, fake, unsure; withheld where the detector's
        images are too few for the promise), ``p_fake, because, caption, global_cosine, global_real_below,
        objects`` (phrase, box in pixels, cosine, real_below), and what made it: ``itemkit, preset, models,
        note``. Or ``path, error``: one image that cannot be judged ends nothing.

    Raises
    ------
    InputError
        There is no detector for the preset, or it was trained on features of other models.
    """
    from itemkit.detector import Detector
    from itemkit.steps import Steps

    chosen = get_preset(preset) if isinstance(preset, str) else preset
    if detector is None and chosen.name != "mini":
        raise InputError(
            f"there is no detector for preset '{chosen.name}' yet: train one with `itemkit extract` and "
            "`itemkit train`, and name its folder with --detector"
        )
    judge = Detector.load(detector if detector is not None else mini_folder() / "models" / "detector", device)
    files = list(_image_files(paths))
    models = chosen.build(device)
    steps = Steps(models)
    parts = models.fingerprint() | {"transform": None, "decode": None}  # as in a store made with these models
    run = {"config": {"name": chosen.name}, "fingerprint": parts, "fingerprint_hash": fingerprint_hash(parts)}
    # a caption given here is another source of text on purpose; the check covers everything else
    ignore = ("captions", "captioner") if caption is not None else ()
    checked = False
    for path in files:
        try:
            data = read_bytes(path)
            one = steps([load_image(data, name=path)], [caption])
        except Exception as error:  # noqa: BLE001 - whatever a picture does to a decoder or a model
            yield {"path": path, "error": one_line(error)}
            continue
        known = {schema.IMAGE_ID: content_id(data), schema.PATH: path, schema.SOURCE: ""}
        one = dataclasses.replace(one, table=one.table.assign(**known), run=run)
        if not checked:  # the same for every image: other models end it, with one message
            judge.check(one, ignore)
            checked = True
        try:
            yield _answer(judge, one, fpr, fnr, ignore)
        except Exception as error:  # noqa: BLE001
            yield {"path": path, "error": one_line(error)}


def _image_files(paths: str | Path | Iterable[str | Path]) -> Iterator[str]:
    """Files as they are given, folders as the images below them; what is left out there is said."""
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        name = os.fspath(path)
        if not os.path.isdir(name):
            yield name
            continue
        below = sorted(os.path.join(at, file) for at, _, files in os.walk(name) for file in files)
        images = [file for file in below if os.path.splitext(file)[1].lower() in EXTENSIONS]
        if len(images) < len(below):
            warnings.warn(
                f"{len(below) - len(images)} of {len(below)} files below {name} have no ending of an image "
                "and are left out; name one to have it judged",
                stacklevel=3,
            )
        yield from images


def _answer(judge: Detector, one: Features, fpr: float, fnr: float, ignore: Sequence[str]) -> dict[str, Any]:
    verdict = judge.verdict(one, fpr, fnr, ignore).iloc[0]
    evidence = judge.explain(one, 0, ignore=ignore)
    whole, local = evidence.iloc[0], evidence.iloc[1:]
    return {
        "path": one.table[schema.PATH].iloc[0],
        "image_id": one.table[schema.IMAGE_ID].iloc[0],
        "seen": str(judge.seen(one)[0]),
        "verdict": verdict["verdict"],
        "p_fake": _number(verdict["p_fake"]),
        "because": verdict["because"],
        "caption": whole["text"],
        "global_cosine": _number(whole["cosine"]),
        "global_real_below": _number(whole["real_below"]),
        "objects": [
            {
                "phrase": row["text"],
                "box": [_number(row[side], 1) for side in ("x0", "y0", "x1", "y1")],
                "cosine": _number(row["cosine"]),
                "real_below": _number(row["real_below"]),
            }
            for _, row in local.iterrows()
        ],
        **one.provenance,
    }


def _number(value: Any, digits: int = 4) -> float | None:
    """A rounded number; None where there is none, since JSON knows no NaN."""
    return round(float(value), digits) if math.isfinite(value) else None
