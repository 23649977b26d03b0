"""The audit: what besides the picture itself tells real and fake apart in a data set, and how to close it.

Every property is given alone to a small classifier, and the AUROC it reaches on images it was not fitted to
is the leak: what a detector could score here without having learnt anything about generated images. The
sets of the single generators are judged too: pooled, a leak that decides in one of them may look harmless.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.tree import DecisionTreeClassifier
from tqdm import tqdm

from itemkit import _files, metrics, schema
from itemkit.errors import InputError
from itemkit.images import (
    EqualiseConfig,
    ImageError,
    content_id,
    equalised_bytes,
    jpeg_quality,
    jpeg_subsampling,
    load_image,
    open_image,
    read_bytes,
)
from itemkit.manifest import write_manifest
from itemkit.text import count, printable, write_csv

MIN_PER_CLASS = 10  # with fewer images a property is listed as not measurable
MAX_NEAR = 100_000  # every image is compared with every other: beyond this near copies are not looked for
# Lower end of the interval from which a leak gets its name; our choice.
VERDICTS = ((0.9, "decides"), (0.7, "strong"), (0.55, "moderate"))
_LARGE = threading.Lock()  # images of more than so many pixels are decoded one at a time, to bound memory
_LARGE_PIXELS = 20_000_000

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


@dataclass
class AuditReport:
    """What the audit found.

    Attributes
    ----------
    table : DataFrame
        One row per property over all images, ranked: ``property, kind, auroc, low, high, n_real, n_fake,
        verdict, sentence, advice``. With one class only there is no AUROC; the sentences describe it.
    parts : DataFrame
        The same for each generator (or source) by itself, in a column ``set``; the worst first. Empty if
        there is but one.
    duplicates : DataFrame
        Pairs of images that show the same picture; see `find_duplicates`.
    measurements, errors : DataFrame
        One row per readable image with all that was measured; ``path, label, kind, reason`` of the others.
    notes : list of str
        What was left out, and why.
    """

    table: pd.DataFrame
    parts: pd.DataFrame
    duplicates: pd.DataFrame
    measurements: pd.DataFrame
    errors: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> int:
        """Number of images that could not be read, and so were not judged."""
        return len(self.errors)

    @property
    def leaks(self) -> pd.DataFrame:
        """Rows of the table whose property separates the classes."""
        return self.table[self.table["verdict"].isin([name for _, name in VERDICTS])]

    def to_text(self, before: AuditReport | None = None) -> str:
        """Give the report as plain text, for a terminal.

        Parameters
        ----------
        before : AuditReport, optional
            Of the same images before something was done to them; its AUROC stands beside the one now.
        """
        old = {} if before is None else before.table.set_index("property")["auroc"].to_dict()
        was = f"{'before':>8}" if old else ""
        lines = [self.headline(), ""]
        if self.table["auroc"].notna().any():
            lines += ["AUROC of each property alone, on images it was not fitted to (0.5 is chance)", ""]
            lines.append(
                f"  {'property':<20}{was}{'AUROC':>8}  {'95 % interval':<16}{'real':>7}{'fake':>7}  verdict"
            )
        for row in self.table.itertuples() if len(lines) > 2 else ():
            was = f"{_three(old[row.property]):>8}" if old else ""
            interval = f"{row.low:.3f} - {row.high:.3f}" if np.isfinite(row.auroc) else ""
            lines.append(
                f"  {row.property:<20}{was}{_three(row.auroc):>8}  {interval:<16}{row.n_real:>7,}"
                f"{row.n_fake:>7,}  {row.verdict}"
            )
        worst = self.parts[self.parts["verdict"].isin([name for _, name in VERDICTS[:2]])]
        if len(worst):
            lines += ["", "Worst of single sets (each against the real images of its source)", ""]
            lines += [f"  {printable(row.set):<24} {row.property:<20}{row.auroc:>8.3f}  {row.verdict}"
                      for row in worst.head(12).itertuples()]  # fmt: skip
            lines += [f"  and {len(worst) - 12} more"] if len(worst) > 12 else []
        sentences = self.leaks if self.table["auroc"].notna().any() else self.table
        said = [*sentences["sentence"], *self._duplicate_sentences(), *self.notes]
        lines += ["", *(f"- {printable(sentence)}" for sentence in said if sentence)]
        advice = [*self.leaks["advice"], *worst["advice"]]
        if advice:
            lines += ["", "What to do", *(f"- {line}" for line in dict.fromkeys(advice))]
        return "\n".join(lines)

    def headline(self) -> str:
        """Say what was judged, and what it means for a detector's score on these images."""
        m = self.measurements
        real, fake = (int((m[schema.LABEL] == label).sum()) for label in (schema.REAL, schema.FAKE))
        n = len(m) + self.left_out
        what = f"Audit of {count(len(m), 'image')}: {real:,} real, {fake:,} fake"
        if self.left_out:
            kinds = ", ".join(f"{k:,} {kind}" for kind, k in self.errors["kind"].value_counts().items())
            what = (
                f"PARTIAL audit of {len(m):,} of {n:,} images: {self.left_out:,} could not be read "
                f"({kinds}); {real:,} real, {fake:,} fake"
            )
        if not (real and fake):
            return f"{what}\nOne class only: nothing can be compared; what the images are like is said below."
        worst = self.parts.iloc[0] if len(self.parts) and np.isfinite(self.parts["auroc"].iloc[0]) else None
        one = ""
        if worst is not None and worst["verdict"] in [name for _, name in VERDICTS]:
            one = f" In '{printable(worst['set'])}' alone '{worst['property']}' reaches {worst['auroc']:.3f}."
        if not len(self.leaks):
            return f"{what}\nNo property separates the classes{' as a whole' * bool(one)}.{one}"
        first, n = self.leaks.iloc[0], len(self.leaks)
        return (
            f"{what}\n{n} of {len(self.table)} properties separate{'s' * (n == 1)} the classes. The "
            f"strongest, '{first['property']}', reaches AUROC {first['auroc']:.3f} alone: a detector that "
            f"sees it can score as much without having learnt anything about generated images.{one}"
        )

    def _duplicate_sentences(self) -> list[str]:
        found = []
        for kind, what in (("exact", "exact copies"), ("near", "near copies (perceptual hash)")):
            pairs = self.duplicates[self.duplicates["kind"] == kind]
            if len(pairs):
                first = pairs.sort_values(["across_classes", "across_splits"], ascending=False).iloc[0]
                splits, classes = int(pairs["across_splits"].sum()), int(pairs["across_classes"].sum())
                wrong = " One label of each such pair is wrong." if kind == "exact" and classes else ""
                found.append(
                    f"Pairs of {what}: {len(pairs):,}, {splits:,} across splits, {classes:,} across classes; "
                    f"first: {first['path_a']} and {first['path_b']}. Keep one, or both in one split.{wrong}"
                )
        return found or ["No duplicates found."]


def _three(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


def audit(
    manifest: pd.DataFrame,
    *,
    by: str | None = schema.GENERATOR,
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
        As `read_manifest` gives it; rows without a label are left out where both classes are there.
    by : {"generator", "source", None}
        Judge these sets by themselves too: the fakes of each generator against the real images of the same
        source (all of them if it has none), or the images of each source.
    n_boot, seed : int
        Bootstrap resamples of the intervals, and the seed of folds and resamples.
    near : bool
        Look for near duplicates too.
    workers : int, optional
        Threads that read the images; default one per processor, at most 8.
    progress : bool
        Show a bar.

    Returns
    -------
    AuditReport

    Raises
    ------
    InputError
        No image can be read.
    """
    if by not in (None, schema.GENERATOR, schema.SOURCE):
        raise InputError(f"by={by!r}: expected 'generator', 'source' or None")
    known, notes = manifest[list(schema.MANIFEST_COLUMNS)].reset_index(drop=True), []
    labelled = known[schema.LABEL].notna()
    if set(known.loc[labelled, schema.LABEL]) == {schema.REAL, schema.FAKE} and not labelled.all():
        notes.append(f"{count(int((~labelled).sum()), 'image')} without a label left out.")
        known = known[labelled].reset_index(drop=True)
    measured = _each(measure, known[schema.PATH], workers, progress, "audit")
    failed = np.array([isinstance(m, tuple) for m in measured], dtype=bool)
    errors = known.loc[failed, [schema.PATH, schema.LABEL]].reset_index(drop=True)
    bad = [m for m in measured if isinstance(m, tuple)]
    errors = errors.assign(kind=[kind for kind, _ in bad], reason=[reason for _, reason in bad])
    if bad:
        notes.append(f"{count(len(bad), 'image')} could not be read; first: {bad[0][1]}.")
    if failed.all():
        raise InputError(f"none of the {count(len(known), 'image')} can be read; first: {bad[0][1]}")
    found = pd.DataFrame([m for m in measured if not isinstance(m, tuple)])
    table = _add_caption_columns(pd.concat([known.loc[~failed].reset_index(drop=True), found], axis=1))
    if near and len(table) > MAX_NEAR:
        near = False
        notes.append(f"Near copies were not looked for: more than {MAX_NEAR:,} images.")
    parts = [_rank(part, n_boot // 5 + 1, seed).assign(set=name) for name, part in _sets(table, by)]
    parts = _by_auroc(pd.concat(parts)) if parts else _rank(table.head(0), 1, seed).assign(set="").head(0)
    return AuditReport(_rank(table, n_boot, seed), parts, find_duplicates(table, near), table, errors, notes)


def _sets(table: pd.DataFrame, by: str | None) -> list[tuple[str, pd.DataFrame]]:
    """Single sets that hold both classes."""
    real = (table[schema.LABEL] == schema.REAL).fillna(False)
    if by is None or not real.any() or real.all():
        return []
    names = table[by] if by == schema.SOURCE else table.loc[~real, by]
    if names.nunique() < 2:
        return []
    sets = []
    for name in dict.fromkeys(names):
        part = table[table[by] == name]
        if by == schema.GENERATOR:
            own = real & table[schema.SOURCE].isin(part[schema.SOURCE])
            part = pd.concat([table[own if own.any() else real], part])
        if part[schema.LABEL].nunique() == 2:
            sets.append((str(name), part.reset_index(drop=True)))
    return sets


def _rank(table: pd.DataFrame, n_boot: int, seed: int) -> pd.DataFrame:
    return _by_auroc(pd.DataFrame([_judge(prop, table, n_boot, seed) for prop in PROPERTIES]))


def _by_auroc(table: pd.DataFrame) -> pd.DataFrame:
    table = table.sort_values("auroc", ascending=False, kind="stable", na_position="last")
    return table.reset_index(drop=True)


def ranking(reports: Mapping[str, AuditReport]) -> pd.DataFrame:
    """Rankings of one data set in several states, ready for `plots.intervals`.

    Parameters
    ----------
    reports : mapping
        Name of each state ("as they are", "equalised") to its report.

    Returns
    -------
    DataFrame
        ``property, data, value, low, high``; in the order of the first report, without what could not be
        measured.
    """
    parts = [
        report.table[["property", "auroc", "low", "high"]]
        .rename(columns={"auroc": "value"})
        .assign(data=name)
        for name, report in reports.items()
    ]
    table = pd.concat(parts, ignore_index=True).dropna(subset="value")
    order = list(dict.fromkeys(table["property"]))
    table = table.sort_values("property", key=lambda names: names.map(order.index), kind="stable")
    return table[["property", "data", "value", "low", "high"]].reset_index(drop=True)


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
    if getattr(image, "text", None):  # PNG: prompts and settings often stay in here
        kinds.add("text")
    large = image.width * image.height > _LARGE_PIXELS
    with _LARGE if large else contextlib.nullcontext():
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


def _each(work: Callable, paths: pd.Series, workers: int | None, progress: bool, what: str) -> list:
    """Results in order; (kind, reason) of its `ImageError` takes the place of an image's result."""

    def one(path: str) -> object:
        try:
            return work(path)
        except ImageError as error:
            return error.kind, error.reason
        except MemoryError:
            return "too large", printable(f"{path}: memory ran out; run again with more of it")

    results: list = []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        with tqdm(total=len(paths), desc=what, unit="image", disable=not progress) as bar:
            for start in range(0, len(paths), 4096):  # a million waiting tasks at once would cost a gigabyte
                for result in pool.map(one, paths.iloc[start : start + 4096]):
                    results.append(result)
                    bar.update()
    return results


def _add_caption_columns(table: pd.DataFrame) -> pd.DataFrame:
    captions = table[schema.CAPTION]
    return table.assign(
        caption_present=captions.notna().map({True: "with", False: "without"}),
        caption_words=captions.fillna("").str.split().str.len().astype(float),
        caption_vocabulary=captions,
    )


def _judge(prop: _Property, table: pd.DataFrame, n_boot: int, seed: int) -> dict[str, object]:
    """One row of the report's table."""
    if prop.only:
        table = table[table[prop.only].notna()]
    y = table[schema.LABEL].to_numpy(dtype=np.float64, na_value=np.nan)
    n_real, n_fake = int((y == schema.REAL).sum()), int((y == schema.FAKE).sum())
    row = {"property": prop.name, "kind": prop.kind, "auroc": np.nan, "low": np.nan, "high": np.nan}
    row |= {"n_real": n_real, "n_fake": n_fake, "verdict": "not measurable", "advice": prop.advice}
    # copies of one image, or fakes of one prompt, must not sit on both sides of a fold
    by_caption = prop.name in ("caption_words", "caption_vocabulary")
    groups, values = table[schema.CAPTION if by_caption else schema.IMAGE_ID], table[prop.name]
    few = min(n_real, n_fake)
    if not few:
        return row | {"sentence": _description(prop, values)}
    if few < MIN_PER_CLASS or min(groups[y == label].nunique() for label in (0, 1)) < FOLDS:
        why = f"which only {count(few, 'image')} of one class have, or too few unlike ones"
        return row | {"sentence": f"Not judged: {prop.what}, {why}."}
    auroc, low, high = held_out_auroc(values, y.astype(np.int64), groups, prop.kind, n_boot, seed)
    verdict = next((name for bound, name in VERDICTS if low >= bound), "slight" if low > 0.5 else "none")
    sentence = f"With nothing but {prop.what}, AUROC {auroc:.3f}: {_difference(prop, values, y)}."
    return row | {"auroc": auroc, "low": low, "high": high, "verdict": verdict, "sentence": sentence}


def _description(prop: _Property, values: pd.Series) -> str:
    """What the images of one class are like."""
    values = values.dropna()
    what = f"{prop.what[0].upper()}{prop.what[1:]}"
    if values.empty or prop.kind == "text":
        return ""
    if prop.kind == "number":
        low, middle, high = values.quantile([0.25, 0.5, 0.75])
        return f"{what}: median {middle:.3g}, middle half {low:.3g} to {high:.3g}."
    shares = values.value_counts(normalize=True).head(3)
    return f"{what}: {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}."


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


#: Pairs at most this far apart (of 128 bits) count as near copies. Measured on 1,450 photographs and fakes:
#: copies recompressed at JPEG 50, or scaled to a third and recompressed, lie within 9 bits in 99 % of cases.
#: Of different files one pair is as near (10 bits: one generator, one seed, two prompts), the next at 16.
NEAR_BITS = 10
_FLAT_BITS = 10  # a picture with fewer set (or unset) bits is all but empty: its hash says nothing
_COLUMNS = ("kind", "distance", "path_a", "path_b", "across_classes", "across_splits")


def dhash(image: Image.Image) -> tuple[int, int]:
    """Hash a picture by whether each of 8 x 8 places is darker than its right and its lower neighbour.

    Returns
    -------
    (int, int)
        Two 64-bit numbers, horizontal and vertical.
    """
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BILINEAR), dtype=np.int16)
    right, below = grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1] > grey[:-1, :-1]
    first, second = (int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in (right, below))
    return first, second


def find_duplicates(df: pd.DataFrame, near: bool = True, near_bits: int = NEAR_BITS) -> pd.DataFrame:
    """List pairs of images that show the same picture.

    Parameters
    ----------
    df : DataFrame
        Columns ``path, label, split, image_id, dhash_x, dhash_y``.
    near : bool
        Also compare the perceptual hashes, every image with every other: about 1 s for 10,000 images and
        2 min for 100,000.
    near_bits : int
        Largest distance of a near copy.

    Returns
    -------
    DataFrame
        ``kind`` (exact, near), ``distance`` in bits, ``path_a``, ``path_b``, and whether the pair crosses
        classes and splits. Of several equal images each is paired with the first one only.
    """
    df = df.reset_index(drop=True)
    first = df.groupby(schema.IMAGE_ID, sort=False)[schema.PATH].transform(lambda g: g.index[0])
    copies = np.flatnonzero(first.to_numpy() != np.arange(len(df)))
    pairs = [("exact", 0, int(first[i]), int(i)) for i in copies]
    if near:
        kept = np.setdiff1d(np.arange(len(df)), copies)
        hashes = df.loc[kept, ["dhash_x", "dhash_y"]].to_numpy(dtype=np.uint64)
        bits = np.bitwise_count(hashes).sum(axis=1)
        informative = (bits >= _FLAT_BITS) & (bits <= 128 - _FLAT_BITS)
        kept, hashes = kept[informative], hashes[informative]
        pairs += [("near", d, int(kept[a]), int(kept[b])) for a, b, d in _near_pairs(hashes, near_bits)]
    found = pd.DataFrame(pairs, columns=["kind", "distance", "a", "b"])
    a, b = df.loc[found["a"]].reset_index(drop=True), df.loc[found["b"]].reset_index(drop=True)
    found["path_a"], found["path_b"] = a[schema.PATH], b[schema.PATH]
    found["across_classes"] = _differ(a[schema.LABEL], b[schema.LABEL])
    found["across_splits"] = _differ(a[schema.SPLIT], b[schema.SPLIT])
    return found[list(_COLUMNS)]


def _near_pairs(hashes: np.ndarray, near_bits: int) -> list[tuple[int, int, int]]:
    pairs = []
    step = max(1, 2_000_000 // max(len(hashes), 1))  # rows at a time: 2 million distances, 16 MB
    for start in range(0, len(hashes), step):
        block, rest = hashes[start : start + step], hashes[start:]
        distance = np.bitwise_count(block[:, None, 0] ^ rest[None, :, 0])
        distance = distance + np.bitwise_count(block[:, None, 1] ^ rest[None, :, 1])
        for i, j in zip(*np.nonzero(distance <= near_bits), strict=True):
            if j > i:
                pairs.append((start + int(i), start + int(j), int(distance[i, j])))
    return pairs


def _differ(a: pd.Series, b: pd.Series) -> pd.Series:
    """Both known and not equal."""
    return (a.notna() & b.notna() & (a.astype(object) != b.astype(object))).astype(bool)


FOLDS = 5


def held_out_auroc(
    values: pd.Series, y: np.ndarray, groups: pd.Series, kind: str, n_boot: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """AUROC of "fake" that one property reaches on images which the scoring was not fitted to.

    Each fold is scored by what was fitted to the other folds, and images are compared within their fold only:
    pooled, a fold with more fakes of a category would lower their common score.

    Parameters
    ----------
    values, groups : Series
        The property; images of one group are kept in one fold.
    y : int array
        1 fake, 0 real.
    kind : {"category", "number", "text"}
        Scored by the share of fakes in the category, a small decision tree, or a bag of words with logistic
        regression.
    n_boot, seed : int
        Resamples of the interval (images within class and fold); seed of folds and resamples.

    Returns
    -------
    auroc, low, high : float
        Mean over folds, weighted by their numbers of pairs, with a 95 % bootstrap interval; nan where no fold
        holds both classes.
    """
    score = {"category": _score_category, "number": _score_number, "text": _score_text}[kind]
    values = values.reset_index(drop=True)
    rng = np.random.default_rng(seed)
    folds = _folds(y, groups, rng)
    points, replicates, pairs = [], [], []
    for fold in range(FOLDS):
        test = folds == fold
        if len(np.unique(y[test])) < 2 or len(np.unique(y[~test])) < 2:
            continue
        scores = score(values[~test], y[~test], values[test])
        points.append(float(roc_auc_score(y[test], scores)))
        drawn = (
            metrics.stratified_weights(y[test], n, rng) for n in metrics.bootstrap_chunks(test.sum(), n_boot)
        )
        draws = [metrics.replicate(y[test], scores, weights, ["auroc"])["auroc"] for weights in drawn]
        replicates.append(np.concatenate(draws))
        pairs.append(int((y[test] == 0).sum()) * int((y[test] == 1).sum()))
    if not pairs:
        return np.nan, np.nan, np.nan
    low, high = metrics.percentile_interval(np.average(replicates, axis=0, weights=pairs))
    return float(np.average(points, weights=pairs)), low, high


def _folds(y: np.ndarray, groups: pd.Series, rng: np.random.Generator) -> np.ndarray:
    """Fold of each image: the groups of each class, shuffled, are dealt out in turn."""
    codes = pd.factorize(groups)[0]
    first = np.unique(codes, return_index=True)[1]
    fold_of_group = np.empty(len(first), dtype=np.int64)
    for label in (0, 1):
        members = np.flatnonzero(y[first] == label)
        fold_of_group[rng.permutation(members)] = np.arange(len(members)) % FOLDS
    return fold_of_group[codes]


def _score_category(train: pd.Series, y: np.ndarray, test: pd.Series) -> np.ndarray:
    counts = pd.Series(y).groupby(train.fillna("-").to_numpy()).agg(["sum", "count"])
    rate = (counts["sum"] + y.mean()) / (counts["count"] + 1)  # one image's worth of prior
    return test.fillna("-").map(rate).fillna(y.mean()).to_numpy(dtype=float)


def _score_number(train: pd.Series, y: np.ndarray, test: pd.Series) -> np.ndarray:
    # a tree, not the rank: fakes of one fixed width in the middle of the photographs' widths are a leak too
    tree = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=max(5, len(y) // 100), random_state=0)
    return tree.fit(train.to_numpy()[:, None], y).predict_proba(test.to_numpy()[:, None])[:, 1]


def _score_text(train: pd.Series, y: np.ndarray, test: pd.Series) -> np.ndarray:
    words = bag_of_words()
    try:
        model = LogisticRegression(max_iter=1000).fit(words.fit_transform(train), y)
    except ValueError:  # empty vocabulary
        return np.full(len(test), y.mean())
    return model.predict_proba(words.transform(test))[:, 1]


def bag_of_words() -> CountVectorizer:
    """Presence of each word and punctuation mark: how a caption is punctuated is style, too."""
    return CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")


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
        target = out / "images" / (content_id(data + os.fsencode(path))[:32] + config.extension)
        image = load_image(data, name=path)
        if not target.exists():
            _files.atomic_write(target, lambda file: file.write(equalised_bytes(image, config)))
        return str(target), min(image.size)

    results = _each(write, manifest[schema.PATH], workers, progress, "equalise")
    # a result is (path, side), or (kind of error, reason)
    failed = np.array([isinstance(second, str) for _, second in results], dtype=bool)
    if failed.all():
        raise InputError(f"none of the {count(len(results), 'image')} can be read; first: {results[0][1]}")
    (out / "errors.csv").unlink(missing_ok=True)  # of an earlier run: those images may be mended by now
    if failed.any():
        reasons = [reason for _, reason in results if isinstance(reason, str)]
        write_csv(manifest.loc[failed, [schema.PATH]].assign(reason=reasons), out / "errors.csv")
        warnings.warn(
            f"{len(reasons):,} of {len(results):,} images cannot be read: {out / 'errors.csv'}", stacklevel=2
        )
    done = [r for r in results if not isinstance(r[1], str)]
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
