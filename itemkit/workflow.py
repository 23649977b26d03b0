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
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit._files import folder_lock
from itemkit.errors import InputError, ItemkitError, StoreError
from itemkit.extraction import bad_rows, extract
from itemkit.features import Features
from itemkit.images import content_id, load_image, read_bytes
from itemkit.manifest import read_manifest, write_manifest
from itemkit.models import file_hash, tidy
from itemkit.presets import MINI_REMEDY, PRESETS, Preset, get_preset, mini_folder
from itemkit.splits import fill_splits
from itemkit.store import fingerprint_hash, load_features
from itemkit.text import count, did_you_mean, one_line, wide_table

if TYPE_CHECKING:
    from itemkit.detector import Detector

# the files of data/mini that hold the images of each part of the laboratory
LAB_PARTS = {"images": ("reals", "fakes"), "fresh": ("fresh",), "ladders": ("ladders",)}
SHOWN = ("auroc", "ap", "accuracy_real", "accuracy_fake", "tpr_at_fpr05", "called_fake", "above_half")


def lab_manifest(out_dir: str | Path, which: str = "images") -> pd.DataFrame:
    """Lay out images of the mini laboratory below ``out_dir/mini``, once, and read their manifest.

    They are the data set ("images"), new renders that nothing was trained on ("fresh"), or better and better
    fakes ("ladders"), each with the bytes that ``data/mini`` holds.
    """
    sources = [mini_folder() / f"{name}.parquet" for name in LAB_PARTS[which]]
    if missing := [tidy(source) for source in sources if not source.is_file()]:
        raise InputError(f"the mini laboratory's images are not in {', '.join(missing)}. {MINI_REMEDY}")
    folder = Path(out_dir, "mini", "" if which == "images" else which)
    made_from = hashlib.sha256("".join(map(file_hash, sources)).encode()).hexdigest()
    listed = folder / f"manifest-{made_from[:16]}.csv"
    if not listed.is_file():
        with folder_lock(folder):
            if not listed.is_file():  # else another process has laid them out meanwhile
                for old in folder.glob("manifest*.csv"):
                    old.unlink()
                table = pd.concat(map(pd.read_parquet, sources), ignore_index=True)
                label = (table[schema.GENERATOR] != schema.REAL_GENERATOR).astype(int)
                table = table.assign(label=label, source=schema.LAB_SOURCE)
                # it comes last, and so says that every image is there
                write_manifest(read_manifest(table, images_to=folder / "images"), listed)
    return read_manifest(listed)


def data_manifest(
    data: pd.DataFrame | str | Path | None, out_dir: str | Path, preset: str = "mini"
) -> pd.DataFrame:
    """Manifest of a data set: a CSV, Parquet or folder is read; None or "" stands for the mini laboratory."""
    if isinstance(data, pd.DataFrame) or data:
        return data if "report" in getattr(data, "attrs", ()) else read_manifest(data)
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
    **overrides: Any,
) -> Features:
    """Features of a data set, computed now or, without loading a model, read from ``out_dir/features``.

    Every labelled image has a split.

    Parameters
    ----------
    data : DataFrame, path or None
        See `data_manifest`.
    name : str
        Joins the store's name, for people; other models, captions or transforms have their own in any case.
    splits, generators : sequence of str
        Take images of these only; ``real`` is a generator here. What else the store holds stays in it.
    transform : callable with ``fingerprint()``, optional
        Applied to every image before the method sees it, e.g. a perturbation.
    captions : {"generate", "user"} or Series
        From the captioner, from the manifest, or from a Series indexed by path.
    **overrides
        Parts of the preset to replace, e.g. ``localiser="dense"``.
    """
    chosen = get_preset(preset, **overrides)
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
    folders = Path(out_dir, "features")
    store = folders / "-".join(filter(None, (chosen.name, name, digest if made_by else "")))
    there = {*schema.SPLITS, *manifest[schema.GENERATOR].dropna()}
    if unknown := sorted({*splits, *generators} - there):
        hint = did_you_mean(unknown[0], there)
        raise InputError(f"no image is of {unknown[0]!r}.{hint} There are: {', '.join(sorted(there))}")
    split_of = _known_splits(manifest, folders / chosen.name) if splits or generators else None
    if splits and split_of is not None:
        manifest = manifest[manifest[schema.PATH].map(split_of).isin(splits)]
    if generators:
        manifest = manifest[manifest[schema.GENERATOR].isin(generators)]
    extract(manifest, store, chosen, device=device, captions=captions, transform=transform, progress=progress)
    found = _divided(load_features(store, rows=manifest), manifest, split_of)
    return found.select(found.table[schema.SPLIT].isin(splits)) if splits else found


def _known_splits(manifest: pd.DataFrame, plain: Path) -> pd.Series | None:
    """Split of each path: as given, or as the images' content says; None where no store has read that."""
    given = manifest.loc[manifest[schema.LABEL].notna(), schema.SPLIT]
    if given.notna().all() and set(schema.SPLITS) <= set(given):
        return _split_of(manifest)
    with contextlib.suppress(StoreError):  # most data sets have been through the plain preset before
        return _split_of(_divided(load_features(plain, (), rows=manifest), manifest).table)
    return None


def _split_of(table: pd.DataFrame) -> pd.Series:
    return table.drop_duplicates(schema.PATH).set_index(schema.PATH)[schema.SPLIT]


def _divided(found: Features, manifest: pd.DataFrame, split_of: pd.Series | None = None) -> Features:
    """Features with the splits that their own data set says, whatever else the store holds."""
    given = _split_of(manifest) if split_of is None else split_of
    table, note = found.table.assign(split=found.table[schema.PATH].map(given)), found.run["splits"]
    if split_of is None:
        table, note = fill_splits(table)
    return dataclasses.replace(found, table=table, run=found.run | {"splits": note})


def add_pixels(
    features: Features, side_px: int = 48, transform: Callable[..., Any] | None = None, crop: bool = False
) -> Features:
    """Load ``pixels``, uint8 of shape (n, side_px, side_px, 3), for the controls that look at them.

    The ``transform`` is the one that the features were made with. ``crop`` takes the centre of larger images:
    scaling would remove what some controls look for.
    """
    pixels = np.empty((len(features), side_px, side_px, 3), np.uint8)
    names = features.table[[schema.PATH, schema.IMAGE_ID]]
    for row, (path, image_id) in enumerate(names.itertuples(index=False)):
        image = load_image(path)
        if transform is not None:
            image = transform(image, image_id)
        if crop:
            left, top = (max(0, (side - side_px) // 2) for side in image.size)
            right, bottom = min(image.width, left + side_px), min(image.height, top + side_px)
            image = image.crop((left, top, right, bottom))
        pixels[row] = np.asarray(image.resize((side_px, side_px)))
    return dataclasses.replace(features, pixels=pixels)


def train_detector(
    features: Features,
    representation: str = "absolute",
    generators: Sequence[str] | None = None,
    members: int = 5,
    device: str = "auto",
) -> Detector:
    """Train a detector on the train split, stop and calibrate it on the val split.

    With few images it withholds what it cannot promise; each class needs one training image. Fakes of
    ``generators`` only take part, in both splits. The ``representation`` is one of
    ``itemkit.misalignment.REPRESENTATIONS``; ``members`` are heads whose log-odds are averaged.
    """
    from itemkit.detector import Detector
    from itemkit.head import MisalignmentMLP

    if generators is not None:
        features = features.with_generators(generators)
    detector = Detector(representation, MisalignmentMLP(members=members, device=device))
    # a handful of images may have none of val, which is no reason not to train
    val = features.table[schema.LABEL].notna() & (features.table[schema.SPLIT] == "val").fillna(False)
    return detector.fit(features.split("train"), features.select(val.to_numpy(dtype=bool)))


def statements(detector: Detector, fpr: float, fnr: float) -> list[str]:
    """What is known of a detector beforehand: its notes, its threshold, why its verdicts are withheld."""
    lines = [*detector.notes, *(f"verdicts are withheld: {why}" for why in detector.lacking(fpr, fnr))]
    with contextlib.suppress(InputError):  # too few for this rate, which the other lines say
        lines.append(detector.threshold(fpr).statement)
    return lines


def evaluate(
    detector: Detector, test: Features, fpr: float = 0.05, fnr: float = 0.05
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """What a detector is worth on labelled images.

    Returns the table of `Detector.evaluate`; the chief metrics for people, a row per generator; and in words
    why a metric is not defined, which verdicts there are, and `statements`.
    """
    table = detector.evaluate(test, fpr)
    chief = table[table["metric"].isin(SHOWN)]
    lines = list(dict.fromkeys(chief["note"][chief["note"] != ""]))
    chief = chief[chief.groupby("metric")["value"].transform("count") > 0]
    counts = table[["generator", "n_real", "n_fake"]].drop_duplicates("generator")
    for label, answers in detector.verdict(test, fpr, fnr)["verdict"].groupby(test.labels):
        shares = ", ".join(f"{n:,} {answer}" for answer, n in answers.value_counts().items())
        lines.append(f"verdicts on {count(len(answers), f'{schema.LABEL_NAMES[label]} image')}: {shares}")
    wide = counts.merge(wide_table(chief, "generator", "metric"), on="generator")
    return table, wide, lines + statements(detector, fpr, fnr)


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
    detector : path, optional
        Folder of a trained detector; the mini preset has its own.
    caption : str, optional
        The user's caption, in place of a generated one.
    fpr, fnr : float
        At most these shares of real (fake) images like the validation ones are called fake (real).

    Yields
    ------
    dict
        Ready for JSON: ``path, image_id, seen`` ("train" or "val" if the detector was made with this image),
        ``verdict`` (real, fake, unsure, or withheld where the detector's images are too few for the promise),
        ``because, p_fake, caption, global_cosine, global_real_below, objects`` (phrase, box in pixels,
        cosine, real_below), ``relative`` beside each cosine if the detector goes by it, and
        `Features.provenance`. Or ``path, error`` of an image that cannot be judged.

    Raises
    ------
    InputError
        There is no detector for the preset, or it was trained on features of other models.
    """
    from itemkit.detector import Detector
    from itemkit.steps import Steps

    chosen = get_preset(preset)
    if detector is None and chosen.name != "mini":
        raise InputError(
            f"there is no detector for preset '{chosen.name}' yet: train one with `itemkit extract` and "
            "`itemkit train`, and name its folder with --detector"
        )
    judge = Detector.load(detector or mini_folder() / "models" / "detector", device)
    files = list(_image_files(paths))
    models = chosen.build(device)
    steps = Steps(models)
    parts = models.fingerprint() | {"transform": None, "decode": None}  # as in a store made with these models
    run = {"config": {"name": chosen.name}, "fingerprint": parts, "fingerprint_hash": fingerprint_hash(parts)}
    # a caption given here is another source of text on purpose; the check covers everything else
    ignore = ("captions", "captioner") if caption is not None else ()
    judge.check(cast("Features", SimpleNamespace(run=run)), ignore)
    for path in files:
        try:
            data = read_bytes(path)
            one = steps([load_image(data, name=path)], [caption])
            table = one.table.assign(image_id=content_id(data), path=path, source="")
            one = dataclasses.replace(one, table=table, run=run)
            if bad_rows(one).any():
                raise ItemkitError("a model gave no finite embedding for it; ask `itemkit doctor --deep`")
            answer = _answer(judge, one, fpr, fnr, ignore)
        except Exception as error:  # noqa: BLE001 - whatever a picture does to a decoder or a model
            answer = {"path": path, "error": one_line(error)}
        yield answer


def _image_files(paths: str | Path | Iterable[str | Path]) -> Iterator[str]:
    """Files as they are given, folders as the images below them; what is left out there is said."""
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        if not os.path.isdir(path):
            yield os.fspath(path)
            continue
        found = read_manifest(path, "unlabelled")
        if left := sum(found.attrs["report"]["files_left_out"].values()):
            what = f"{left} of {left + len(found)} files below {path} are no images and are left out"
            warnings.warn(f"{what}; name one to have it judged", stacklevel=3)
        yield from found[schema.PATH]


def _answer(judge: Detector, one: Features, fpr: float, fnr: float, ignore: Sequence[str]) -> dict[str, Any]:
    verdict = judge.verdict(one, fpr, fnr, ignore).iloc[0]
    whole, *local = judge.explain(one, 0, ignore=ignore).to_dict("records")
    sides = ("x0", "y0", "x1", "y1")
    fits = [name for name in ("cosine", "relative", "real_below") if name in whole]
    return {
        **verdict[["path", "image_id", "verdict", "because"]],
        "seen": str(judge.seen(one)[0]),
        "p_fake": _number(verdict["p_fake"]),
        "caption": whole["text"],
        **{f"global_{fit}": _number(whole[fit]) for fit in fits},
        "objects": [
            {"phrase": thing["text"], "box": [_number(thing[side], 1) for side in sides]}
            | {fit: _number(thing[fit]) for fit in fits}
            for thing in local
        ],
        **one.provenance,
    }


def _number(value: float, digits: int = 4) -> float | None:
    """A rounded number; None where there is none, since JSON knows no NaN."""
    return round(float(value), digits) if math.isfinite(value) else None
