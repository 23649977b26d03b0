"""The audit: what besides the picture itself tells real and fake apart in a data set, and how to close it.

Every property is given alone to a small classifier, and the AUROC it reaches on images it was not fitted to
is the leak: what a detector could score here without having learnt anything about generated images.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from itemkit import _files, schema
from itemkit.audit.duplicates import dhash, find_duplicates
from itemkit.audit.leakage import FOLDS, bag_of_words, held_out_auroc
from itemkit.audit.report import VERDICTS, AuditReport, ranking
from itemkit.errors import InputError
from itemkit.images import (
    EqualiseConfig,
    ImageError,
    content_id,
    equalised_bytes,
    load_image,
    open_image,
    read_bytes,
)
from itemkit.images.jpeg import jpeg_quality, jpeg_subsampling
from itemkit.manifest import require_two_classes, write_manifest

__all__ = ["AuditReport", "audit", "equalise_folder", "find_duplicates", "measure", "ranking"]

MIN_PER_CLASS = 10  # with fewer images a property is listed as not measurable
MAX_NEAR = 100_000  # every image is compared with every other: beyond this near copies are not looked for

_EQUALISE = "Equalise both classes before training, and report raw and equalised results."
_BYTES = "In files of one size and codec, what remains of the file size is content: detail and noise."
_CAPTIONS = "Caption both classes with the same captioner, and show the text-only control."


@dataclass(frozen=True)
class _Property:
    name: str
    kind: str  # category, number or text
    what: str  # as it stands in the sentence
    advice: str
    only: str = ""  # column that must hold a value for the image to take part


PROPERTIES = (
    _Property("format", "category", "the file format", _EQUALISE),
    _Property("size", "category", "the exact width and height", _EQUALISE),
    _Property("width", "number", "the width", _EQUALISE),
    _Property("height", "number", "the height", _EQUALISE),
    _Property("aspect", "number", "the aspect ratio", _EQUALISE),
    _Property("colour_mode", "category", "the colour mode (grey, RGB, alpha, palette)", _EQUALISE),
    _Property("jpeg_quality", "number", "the JPEG quality", _EQUALISE, only="jpeg_quality"),
    _Property("jpeg_subsampling", "category", "the chroma subsampling", _EQUALISE, only="jpeg_subsampling"),
    _Property("metadata", "category", "the kinds of metadata (EXIF, colour profile, comment)", _EQUALISE),
    _Property("bytes_per_pixel", "number", "the file size per pixel", _BYTES),
    _Property("caption_present", "category", "the presence of a caption", _CAPTIONS),
    _Property("caption_words", "number", "the length of the caption", _CAPTIONS, only="caption"),
    _Property("caption_vocabulary", "text", "the words of the caption", _CAPTIONS, only="caption"),
)


def audit(
    manifest: pd.DataFrame,
    *,
    n_boot: int = 1000,
    seed: int = 0,
    near: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> AuditReport:
    """Measure what besides content separates the classes of a data set.

    Parameters
    ----------
    manifest : DataFrame
        As `read_manifest` gives it; rows without a label are left out.
    n_boot, seed : int
        Bootstrap resamples of the intervals, and the seed of folds and resamples.
    near : bool
        Look for near duplicates too.
    workers : int, optional
        Threads that read the images; default one per processor.
    progress : bool
        Show a bar.

    Returns
    -------
    AuditReport

    Raises
    ------
    InputError
        One class only, or no readable image of one class.
    """
    require_two_classes(manifest, "The audit")
    known = manifest.loc[manifest[schema.LABEL].notna(), list(schema.MANIFEST_COLUMNS)].reset_index(drop=True)
    notes = []
    if left_out := len(manifest) - len(known):
        notes.append(f"{left_out:,} images without a label were left out.")
    measured = _each(measure, known[schema.PATH], workers, progress, "audit")
    failed = np.array([isinstance(m, ImageError) for m in measured])
    bad = [m for m in measured if isinstance(m, ImageError)]
    errors = known.loc[failed, [schema.PATH, schema.LABEL]].reset_index(drop=True)
    errors = errors.assign(kind=[e.kind for e in bad], reason=[e.reason for e in bad])
    usable = known.loc[~failed].reset_index(drop=True)
    if bad:
        notes.append(f"{len(bad):,} images cannot be read; first: {bad[0]}.")
        require_two_classes(usable, "The audit (of the readable images)")
    found = pd.DataFrame([m for m in measured if not isinstance(m, ImageError)])
    table = _add_caption_columns(pd.concat([usable, found], axis=1))
    if near and len(table) > MAX_NEAR:
        near = False
        notes.append(f"Near copies were not looked for: more than {MAX_NEAR:,} images.")
    rows = [_audit_property(prop, table, n_boot, seed) for prop in PROPERTIES]
    ranked = pd.DataFrame(rows).sort_values("auroc", ascending=False, kind="stable", na_position="last")
    return AuditReport(ranked.reset_index(drop=True), find_duplicates(table, near), table, errors, notes)


_METADATA = {
    "exif": "exif", "icc_profile": "icc", "xmp": "xmp", "XML:com.adobe.xmp": "xmp", "photoshop": "iptc",
    "comment": "comment",
}  # fmt: skip


def measure(path: str | Path) -> dict[str, object]:
    """Measure everything about one image file that is not its content, and its hashes.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict
        ``image_id, bytes, format, width, height, size, aspect, colour_mode, jpeg_quality, jpeg_subsampling,
        metadata, bytes_per_pixel, dhash_x, dhash_y``; the JPEG properties are missing for other formats.
    """
    data = read_bytes(path)
    image = open_image(data, str(path))
    is_jpeg = image.format in ("JPEG", "MPO")
    kinds = {name for key, name in _METADATA.items() if key in image.info}
    kinds |= (
        {"text"} if getattr(image, "text", None) else set()
    )  # PNG: prompts and settings often stay in here
    x, y = dhash(load_image(data, name=str(path)))
    return {
        schema.IMAGE_ID: content_id(data),
        "bytes": len(data),
        "format": image.format,
        "width": image.width,
        "height": image.height,
        "size": f"{image.width} x {image.height}",
        "aspect": image.width / image.height,
        "colour_mode": image.mode,
        "jpeg_quality": float(jpeg_quality(image)) if is_jpeg else np.nan,
        "jpeg_subsampling": jpeg_subsampling(image) if is_jpeg else None,
        "metadata": "+".join(sorted(kinds)) or "none",
        "bytes_per_pixel": len(data) / (image.width * image.height),
        "dhash_x": x,
        "dhash_y": y,
    }


def equalise_folder(
    manifest: pd.DataFrame,
    out: str | Path,
    config: EqualiseConfig | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Write a copy of a data set in which both classes have one size and one codec.

    Parameters
    ----------
    manifest : DataFrame
    out : path
        Gets ``images/``, ``manifest.csv``, ``equalise.json`` and, if some images cannot be read,
        ``errors.csv``. A folder begun with the same config is completed, any other is refused.
    config : EqualiseConfig, optional
    workers, progress
        See `audit`.

    Returns
    -------
    DataFrame
        Manifest of the equalised images; unreadable ones are missing, with a warning.

    Raises
    ------
    InputError
        `out` holds something else, or no image can be read.
    """
    config = config or EqualiseConfig()
    out = Path(os.path.abspath(out))
    wanted = asdict(config)
    noted = out / "equalise.json"
    if noted.is_file():
        if (found := json.loads(noted.read_text())) != wanted:
            raise InputError(f"{out} was equalised with {found}, not {wanted}; choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and was not made by equalise; choose an empty folder")
    (out / "images").mkdir(parents=True, exist_ok=True)
    _files.write_json(noted, wanted)

    # The name tells nothing about the class; the path is in it, so that equal images stay apart.
    def write(path: str) -> tuple[str, int]:
        data = read_bytes(path)
        target = out / "images" / (content_id(data + path.encode())[:32] + config.extension)
        image = load_image(data, name=path)
        if not target.exists():
            _files.atomic_write(target, lambda file: file.write(equalised_bytes(image, config)))
        return str(target), min(image.size)

    results = _each(write, manifest[schema.PATH], workers, progress, "equalise")
    failed = np.array([isinstance(r, ImageError) for r in results], dtype=bool)
    if failed.all():
        raise InputError(f"none of the {len(results):,} images can be read; first: {results[0]}")
    (out / "errors.csv").unlink(missing_ok=True)  # of an earlier run: those images may be mended by now
    if failed.any():
        reasons = [str(r) for r in results if isinstance(r, ImageError)]
        errors = manifest.loc[failed, [schema.PATH]].assign(reason=reasons)
        _files.atomic_write(out / "errors.csv", lambda f: f.write(errors.to_csv(index=False).encode()))
        warnings.warn(
            f"{len(errors):,} of {len(results):,} images cannot be read: {out / 'errors.csv'}", stacklevel=2
        )
    done = [r for r in results if not isinstance(r, ImageError)]
    copy = manifest.loc[~failed].drop(columns=schema.IMAGE_ID, errors="ignore").reset_index(drop=True)
    copy[schema.PATH] = [path for path, _ in done]
    _warn_if_enlarged(copy[schema.LABEL], np.array([side for _, side in done]), config.size)
    write_manifest(copy, out / "manifest.csv")
    return copy


def _warn_if_enlarged(labels: pd.Series, shorter_side: np.ndarray, size: int) -> None:
    classes = [(labels == label).fillna(False).to_numpy() for label in (schema.REAL, schema.FAKE)]
    if not all(chosen.any() for chosen in classes):
        return
    real, fake = (float((shorter_side[chosen] < size).mean()) for chosen in classes)
    if abs(real - fake) > 0.02:
        fits = min(int(np.quantile(shorter_side[chosen], 0.01)) for chosen in classes)
        warnings.warn(
            f"{real:.0%} of the real and {fake:.0%} of the fake images were smaller than {size} px and were "
            f"enlarged, which leaves traces that tell the classes apart; size {fits} enlarges at most 1 % of "
            "either",
            stacklevel=3,
        )


def _each(work: Callable, paths: pd.Series, workers: int | None, progress: bool, what: str) -> list:
    """Results in order; an `ImageError` takes the place of its image's result."""

    def one(path: str) -> object:
        try:
            return work(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        bar = tqdm(pool.map(one, paths), total=len(paths), desc=what, unit="image", disable=not progress)
        return list(bar)


def _add_caption_columns(table: pd.DataFrame) -> pd.DataFrame:
    captions = table[schema.CAPTION]
    return table.assign(
        caption_present=captions.notna().map({True: "with", False: "without"}),
        caption_words=captions.fillna("").str.split().str.len().astype(float),
        caption_vocabulary=captions,
    )


def _audit_property(prop: _Property, table: pd.DataFrame, n_boot: int, seed: int) -> dict[str, object]:
    if prop.only:
        table = table[table[prop.only].notna()]
    y = table[schema.LABEL].to_numpy(dtype=np.int64)
    row = {"property": prop.name, "kind": prop.kind, "auroc": np.nan, "low": np.nan, "high": np.nan,
           "n_real": int((y == 0).sum()), "n_fake": int((y == 1).sum()), "advice": prop.advice}  # fmt: skip
    # copies of one image, or fakes of one prompt, must not sit on both sides of a fold
    by_caption = prop.name in ("caption_words", "caption_vocabulary")
    groups = table[schema.CAPTION if by_caption else schema.IMAGE_ID]
    values = table[prop.name]
    few = int(min((y == 0).sum(), (y == 1).sum()))
    if few < MIN_PER_CLASS or min(groups[y == label].nunique() for label in (0, 1)) < FOLDS:
        sentence = (
            f"Not judged: {prop.what}, which only {few} images of one class have, or too few unlike ones."
        )
        return row | {"verdict": "not measurable", "sentence": sentence}
    auroc, low, high = held_out_auroc(values, y, groups, prop.kind, n_boot, seed)
    faint = "slight" if low > 0.5 else "none"
    verdict = next((name for bound, name in VERDICTS if low >= bound), faint)
    sentence = f"With nothing but {prop.what}, AUROC {auroc:.3f}: {_difference(prop, values, y)}."
    return row | {"auroc": auroc, "low": low, "high": high, "verdict": verdict, "sentence": sentence}


def _difference(prop: _Property, values: pd.Series, y: np.ndarray) -> str:
    """Say in words where the classes differ most."""
    if prop.kind == "number":
        real, fake = (values[y == label].quantile([0.25, 0.5, 0.75]).tolist() for label in (0, 1))
        return f"median {fake[1]:.3g} (middle half {fake[0]:.3g} to {fake[2]:.3g}) in fakes, {real[1]:.3g} " \
               f"({real[0]:.3g} to {real[2]:.3g}) in real images"  # fmt: skip
    if prop.kind == "text":
        counts = bag_of_words()
        present = counts.fit_transform(values)
        gap = np.asarray(present[y == 1].mean(axis=0) - present[y == 0].mean(axis=0)).ravel()
        words, order = counts.get_feature_names_out(), np.argsort(gap)
        fake, real = words[order[::-1][:4]], words[order[:4]]
        return f"most typical of fakes {_quoted(fake)}, of real images {_quoted(real)}"
    shares = pd.crosstab(values.fillna("-").to_numpy(), y, normalize="columns")
    gap = (shares[1] - shares[0]).abs()
    top = gap.idxmax()
    return f"'{top}' in {shares.loc[top, 1]:.0%} of fakes and {shares.loc[top, 0]:.0%} of real images"


def _quoted(words: np.ndarray) -> str:
    return ", ".join(f"'{word}'" for word in words)
