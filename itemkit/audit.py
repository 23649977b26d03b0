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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import rankdata
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.tree import DecisionTreeClassifier
from tqdm import tqdm

from itemkit import _files, schema
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

FOLDS = 5
MIN_PER_CLASS = 10  # with fewer images a property is listed as not measurable
MAX_NEAR = 100_000  # every image is compared with every other: beyond this near copies are not looked for
#: Pairs at most this far apart (of 128 bits) count as near copies. Measured on 1,450 photographs and fakes:
#: copies recompressed at JPEG 50, or scaled to a third and recompressed, lie within 9 bits in 99 % of cases.
#: Of different files one pair is as near (10 bits: one generator, one seed, two prompts), the next at 16.
NEAR_BITS = 10
_FLAT_BITS = 10  # a picture with fewer set (or unset) bits is all but empty: its hash says nothing
# Lower end of the interval from which a leak gets its name; our choice.
VERDICTS = {"decides": 0.9, "strong": 0.7, "moderate": 0.55}
_LARGE = threading.Lock()  # images of more than so many pixels are decoded one at a time, to bound memory
_LARGE_PIXELS = 20_000_000
_METADATA = {
    "exif": "exif", "icc_profile": "icc", "xmp": "xmp", "XML:com.adobe.xmp": "xmp", "photoshop": "iptc",
    "comment": "comment",
}  # fmt: skip
# Presence of each word and punctuation mark: how a caption is punctuated is style, too.
_WORDS = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")

_EQUALISE = "Equalise both classes before training, and report raw and equalised results."
_BYTES = "In files of one size and codec, what remains of the file size is content: detail and noise."
_CAPTIONS = "Caption both classes with the same captioner, and show the text-only control."


class _Property(NamedTuple):
    name: str
    kind: str  # category, number or text
    what: str  # as it stands in the sentence
    advice: str = _EQUALISE
    only: str = ""  # column that must hold a value for the image to take part
    group: str = schema.IMAGE_ID  # copies of one image, fakes of one prompt: never on both sides of a fold


_CAPTIONED = ("caption_vocabulary", schema.CAPTION)
PROPERTIES = (
    _Property("format", "category", "the file format"),
    _Property("size", "category", "the exact width and height"),
    _Property("width", "number", "the width"),
    _Property("height", "number", "the height"),
    _Property("aspect", "number", "the aspect ratio"),
    _Property("colour_mode", "category", "the colour mode (grey, RGB, alpha, palette)"),
    _Property("jpeg_quality", "number", "the JPEG quality", only="jpeg_quality"),
    _Property("jpeg_subsampling", "category", "the chroma subsampling", only="jpeg_subsampling"),
    _Property("metadata", "category", "the kinds of metadata (EXIF, colour profile, comment)"),
    _Property("bytes_per_pixel", "number", "the file size per pixel", _BYTES),
    _Property("caption_present", "category", "the presence of a caption", _CAPTIONS),
    _Property("caption_words", "number", "the length of the caption", _CAPTIONS, *_CAPTIONED),
    _Property("caption_vocabulary", "text", "the words of the caption", _CAPTIONS, *_CAPTIONED),
)


@dataclass(frozen=True)
class AuditReport:
    """What the audit found."""

    #: One row per property, ranked: ``property, kind, n_real, n_fake, auroc, low, high, verdict, sentence,
    #: advice``. With one class only there is no AUROC; the sentences describe it.
    table: pd.DataFrame
    parts: pd.DataFrame  # the same for each generator (or source), in a column ``set``; the worst first
    duplicates: pd.DataFrame  # see `find_duplicates`
    measurements: pd.DataFrame  # a row per readable image
    errors: pd.DataFrame  # ``path, label, kind, reason`` of the others
    notes: list[str]

    @property
    def left_out(self) -> int:
        """Number of images that could not be read, and so were not judged."""
        return len(self.errors)

    @property
    def leaks(self) -> pd.DataFrame:
        """Rows of the table whose property separates the classes."""
        return self.table[self.table["verdict"].isin(VERDICTS)]

    def to_text(self, before: AuditReport | None = None) -> str:
        """Give the report as plain text; `before` is one of the same images before something was done."""
        worst = self.parts[self.parts["verdict"].isin(["decides", "strong"])]
        said, lines = self.table["sentence"], [self._headline(), ""]
        if self.table["auroc"].notna().any():
            said = self.leaks["sentence"]
            lines += ["AUROC of each property alone, on images it was not fitted to (0.5 is chance)", ""]
            lines += [*_aligned(self.table, before), ""]
        if len(worst):
            lines += [f"Worst of single sets ({len(worst)}), against the real images of their source", ""]
            lines += [*_aligned(worst.head(12)), ""]
        sentences = [*said[said != ""], *self._duplicate_sentences(), *self.notes]
        lines += [f"- {printable(sentence)}" for sentence in sentences]
        if advice := dict.fromkeys([*self.leaks["advice"], *worst["advice"]]):
            lines += ["", "What to do", *(f"- {line}" for line in advice)]
        return "\n".join(lines)

    def _headline(self) -> str:
        """What was judged, and what it means for a detector's score on these images."""
        m, leaks = self.measurements, self.leaks
        real, fake = (int((m[schema.LABEL] == label).sum()) for label in (schema.REAL, schema.FAKE))
        what = f"Audit of {count(len(m), 'image')}"
        if self.left_out:
            kinds = ", ".join(f"{k:,} {kind}" for kind, k in self.errors["kind"].value_counts().items())
            what = f"PARTIAL audit of {len(m):,} of {len(m) + self.left_out:,} images (not read: {kinds})"
        what += f": {real:,} real, {fake:,} fake\n"
        if self.table["auroc"].isna().all():
            needed = f"that needs {MIN_PER_CLASS} images of each class"
            return f"{what}Nothing can be compared: {needed}; what these are like is said below."
        one = ""
        if len(self.parts) and (worst := self.parts.iloc[0])["verdict"] in VERDICTS:
            one = f" In '{printable(worst['set'])}' alone '{worst['property']}' reaches {worst['auroc']:.3f}."
        if not len(leaks):
            return f"{what}No property separates the classes{' as a whole' * bool(one)}.{one}"
        return (
            f"{what}The strongest of {count(len(leaks), 'leak')}, '{leaks.iloc[0]['property']}', reaches "
            f"AUROC {leaks.iloc[0]['auroc']:.3f} alone: a detector that sees it can score as much without "
            f"having learnt anything about generated images.{one}"
        )

    def _duplicate_sentences(self) -> list[str]:
        found = []
        for kind, pairs in self.duplicates.groupby("kind"):
            first = pairs.sort_values(["across_classes", "across_splits"], ascending=False).iloc[0]
            splits, classes = int(pairs["across_splits"].sum()), int(pairs["across_classes"].sum())
            found.append(
                f"Pairs of {kind} copies: {len(pairs):,}, {splits:,} across splits, {classes:,} across "
                f"classes; first: {first['path_a']} and {first['path_b']}. Keep one, or both in one split."
            )
        return found or ["No duplicates found."]


def _aligned(table: pd.DataFrame, before: AuditReport | None = None) -> list[str]:
    """Lines of a ranking with its columns below each other."""
    shown = table[["property", "auroc", "low", "high", "n_real", "n_fake", "verdict"]]
    if before is not None:
        shown.insert(1, "before", shown["property"].map(before.table.set_index("property")["auroc"]))
    if "set" in table:
        shown.insert(0, "set", table["set"].map(printable))
    return shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-").split("\n")


def audit(
    manifest: pd.DataFrame, *, by: str | None = schema.GENERATOR, progress: bool = False
) -> AuditReport:
    """Measure what besides content separates the classes of a data set.

    Parameters
    ----------
    manifest : DataFrame
        As `read_manifest` gives it; rows without a label are left out where both classes are there.
    by : {"generator", "source", None}
        Judge these sets by themselves too: the fakes of each generator against the real images of the same
        source (all of them if it has none), or the images of each source.
    progress : bool

    Raises
    ------
    InputError
        No image can be read.
    """
    if by not in (None, schema.GENERATOR, schema.SOURCE):
        raise InputError(f"by={by!r}: expected 'generator', 'source' or None")
    known, notes = manifest[list(schema.MANIFEST_COLUMNS)].reset_index(drop=True), []
    labelled = known[schema.LABEL].notna()
    if known[schema.LABEL].nunique() == 2 and not labelled.all():
        notes.append(f"{count(int((~labelled).sum()), 'image')} without a label left out.")
        known = known[labelled].reset_index(drop=True)
    measured, errors = _each(measure, known, progress, "audit")
    if len(errors):
        notes.append(f"{count(len(errors), 'image')} could not be read; first: {errors['reason'].iloc[0]}.")
    table = pd.concat([known.drop(index=errors.index).reset_index(drop=True), pd.DataFrame(measured)], axis=1)
    captions = table[schema.CAPTION].str.strip().replace("", pd.NA)
    table = table.assign(
        caption_present=captions.notna().map({True: "with", False: "without"}),
        caption_words=captions.fillna("").str.split().str.len().astype(float),
        caption_vocabulary=captions,
    )
    if len(table) > MAX_NEAR:
        notes.append(f"Near copies were not looked for: more than {MAX_NEAR:,} images.")
    whole = _rank(table, "all")
    parts = pd.concat([whole.head(0), *(_rank(part, name) for name, part in _sets(table, by))])
    parts = parts.sort_values("auroc", ascending=False, kind="stable").reset_index(drop=True)
    found = find_duplicates(table, near=len(table) <= MAX_NEAR)
    return AuditReport(whole.drop(columns="set"), parts, found, table, errors.reset_index(drop=True), notes)


def _sets(table: pd.DataFrame, by: str | None) -> list[tuple[str, pd.DataFrame]]:
    """Single sets that hold both classes."""
    real = (table[schema.LABEL] == schema.REAL).fillna(False)
    if by is None:
        return []
    names, sets = table.loc[~real | (by == schema.SOURCE), by].dropna().unique(), []
    for name in names if len(names) > 1 else ():
        part = table[table[by] == name]
        if by == schema.GENERATOR:
            own = real & table[schema.SOURCE].isin(part[schema.SOURCE])
            part = pd.concat([table[own if own.any() else real], part])
        if part[schema.LABEL].nunique() == 2:
            sets.append((str(name), part.reset_index(drop=True)))
    return sets


def _rank(table: pd.DataFrame, name: str) -> pd.DataFrame:
    rows = pd.DataFrame([_judge(prop, table) for prop in PROPERTIES]).assign(set=name)
    return rows.sort_values("auroc", ascending=False, kind="stable").reset_index(drop=True)


def measure(path: str) -> dict[str, object]:
    """Measure everything about one image file that is not its content, and its hashes."""
    data = read_bytes(path)
    image = open_image(data, path)
    is_jpeg, (width, height) = image.format in ("JPEG", "MPO"), image.size
    kinds = {name for key, name in _METADATA.items() if key in image.info}
    found: dict[str, object] = {
        schema.IMAGE_ID: content_id(data),
        "format": image.format,
        "width": width,
        "height": height,
        "size": f"{width} x {height}",
        "aspect": width / height,
        "colour_mode": image.mode,
        "jpeg_quality": float(jpeg_quality(image)) if is_jpeg else np.nan,
        "jpeg_subsampling": jpeg_subsampling(image) if is_jpeg else None,
        "bytes_per_pixel": len(data) / (width * height),
    }
    found["dhash_x"], found["dhash_y"] = dhash(_decoded(image, path))
    if getattr(image, "text", None):  # PNG: prompts and settings often stay in here, also behind the pixels
        kinds.add("text")
    return found | {"metadata": "+".join(sorted(kinds)) or "none"}


def _decoded(image: Image.Image, path: str) -> Image.Image:
    with _LARGE if image.width * image.height > _LARGE_PIXELS else contextlib.nullcontext():
        return load_image(image, path)


def _each(work: Callable, rows: pd.DataFrame, progress: bool, what: str) -> tuple[list, pd.DataFrame]:
    """Results for the images that can be read, in order; path, label, kind and reason of the others."""

    def one(path: str) -> object:
        try:
            return work(path)
        except ImageError as error:
            return error
        except MemoryError:
            return ImageError(path, "too large", "memory ran out", "run again with more of it")

    results: list = []
    paths = rows[schema.PATH]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        with tqdm(total=len(paths), desc=what, unit="image", disable=not progress) as bar:
            for start in range(0, len(paths), 1024):  # a million waiting tasks at once would cost a gigabyte
                results += pool.map(one, paths.iloc[start : start + 1024])
                bar.update(len(results) - bar.n)
    failed = [isinstance(result, ImageError) for result in results]
    bad = [result for result in results if isinstance(result, ImageError)]
    if all(failed):
        first = f"; first: {bad[0].reason}" if bad else ""
        raise InputError(f"none of the {count(len(results), 'image')} can be read{first}")
    errors = rows.loc[failed, [schema.PATH, schema.LABEL]]
    errors = errors.assign(kind=[error.kind for error in bad], reason=[error.reason for error in bad])
    return [result for result in results if not isinstance(result, ImageError)], errors


def _judge(prop: _Property, table: pd.DataFrame) -> dict[str, object]:
    """One row of the report's table."""
    if prop.only:
        table = table[table[prop.only].notna()]
    y = table[schema.LABEL].astype("Int8").fillna(-1).to_numpy(dtype=np.int64)
    groups, values = table[prop.group], table[prop.name]
    n_real, n_fake = int((y == schema.REAL).sum()), int((y == schema.FAKE).sum())
    (auroc, low, high), verdict, sentence = (np.nan,) * 3, "not measurable", ""
    if min(n_real, n_fake) >= MIN_PER_CLASS and min(groups[y == k].nunique() for k in (0, 1)) >= FOLDS:
        auroc, low, high = held_out_auroc(values, y, groups, prop.kind)
        verdict = next((name for name, bound in VERDICTS.items() if low >= bound), "none")
        verdict = "slight" if verdict == "none" and low > 0.5 else verdict
        if prop.kind == "text":
            found = _WORDS.fit_transform(values)
            gap = np.asarray(found[y == 1].mean(axis=0) - found[y == 0].mean(axis=0)).ravel().argsort()
            names = [f"'{name}'" for name in _WORDS.get_feature_names_out()[gap]]
            fake, real = (f"above all {', '.join(words)}" for words in (names[:-5:-1], names[:4]))
        else:
            fake, real = (_describe(prop, values[y == label]) for label in (schema.FAKE, schema.REAL))
        sentence = f"With nothing but {prop.what}, AUROC {auroc:.3f}: fakes {fake}; real images {real}."
    elif len(values) and prop.kind != "text":
        sentence = f"{prop.what[0].upper()}{prop.what[1:]}: {_describe(prop, values)}."
    row = {"property": prop.name, "kind": prop.kind, "n_real": n_real, "n_fake": n_fake, "auroc": auroc}
    return row | {"low": low, "high": high, "verdict": verdict, "sentence": sentence, "advice": prop.advice}


def _describe(prop: _Property, values: pd.Series) -> str:
    """What a property is like in some images."""
    if prop.kind == "number":
        low, middle, high = values.quantile([0.25, 0.5, 0.75])
        return f"median {middle:.3g} (middle half {low:.3g} to {high:.3g})"
    shares = values.value_counts(normalize=True).head(3)
    return ", ".join(f"'{name}' {share:.0%}" for name, share in shares.items())


def held_out_auroc(
    values: pd.Series, y: np.ndarray, groups: pd.Series, kind: str
) -> tuple[float, float, float]:
    """AUROC of "fake" that one property reaches on images which the scoring was not fitted to.

    Each fold is scored by what was fitted to the others (categories by how often each class has them, numbers
    by a small decision tree, texts by logistic regression on their words), and images are compared within
    their fold only: pooled, a fold with more fakes of a category would lower their common score. Images of
    one group are kept in one fold. With its 95 % interval (DeLong et al. 1988); nan where no fold holds both
    classes.
    """
    if kind == "text":
        x, model = values.to_numpy(), make_pipeline(_WORDS, LogisticRegression(max_iter=1000))
    elif kind == "category":
        x = values.fillna("-").to_numpy(dtype=object)[:, None]
        # in closed form: an optimiser stops before it has seen thousands of rare categories of a large set
        model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), MultinomialNB())
    else:
        # a tree, not the rank: fakes of one width in the middle of the photographs' widths are a leak too
        x, leaf = values.to_numpy(dtype=float)[:, None], max(5, len(y) // 125)
        model = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=leaf, random_state=0)
    # the groups of each class, shuffled, are dealt out in turn; StratifiedGroupKFold takes minutes at 100,000
    dealt = pd.DataFrame({"group": groups.to_numpy(), "y": y}).sample(frac=1, random_state=0)
    dealt = dealt.drop_duplicates("group")
    fold_of = (dealt.groupby("y").cumcount() % FOLDS).set_axis(dealt["group"])
    folds = groups.map(fold_of).to_numpy()
    placed = np.full(len(y), np.nan)  # share of the fold's other class below (fakes) or above (real images)
    for fold in range(FOLDS):
        test = folds == fold
        if len(np.unique(y[test])) < 2 or len(np.unique(y[~test])) < 2:
            continue
        scores = model.fit(x[~test], y[~test]).predict_proba(x[test])[:, 1]
        for label in (schema.REAL, schema.FAKE):
            mine = y[test] == label
            below = (rankdata(scores)[mine] - rankdata(scores[mine])) / (~mine).sum()
            placed[np.flatnonzero(test)[mine]] = below
    sides = [placed[(y == label) & ~np.isnan(placed)] for label in (schema.REAL, schema.FAKE)]
    if not len(sides[1]):
        return np.nan, np.nan, np.nan
    auroc = float(sides[1].mean())
    half = 1.96 * float(np.sqrt(sum(side.var() / len(side) for side in sides)))
    return auroc, max(0.0, auroc - half), min(1.0, auroc + half)


def dhash(image: Image.Image) -> tuple[int, int]:
    """Hash a picture by whether each of 8 x 8 places is darker than its right and its lower neighbour.

    Gives two 64-bit numbers, horizontal and vertical.
    """
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BILINEAR), dtype=np.int16)
    right, below = grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1] > grey[:-1, :-1]
    first, second = (int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in (right, below))
    return first, second


def find_duplicates(df: pd.DataFrame, near: bool = True) -> pd.DataFrame:
    """List pairs of images that show the same picture: exact copies, and `near` ones by their hashes.

    Every image is compared with every other: about 1 s for 10,000 images and 2 min for 100,000. Of several
    equal images each is paired with the first one only. Gives ``kind, distance`` (bits), ``path_a, path_b,
    across_classes, across_splits``.
    """
    df = df.reset_index(drop=True)
    first = df.groupby(schema.IMAGE_ID)[schema.PATH].transform(lambda group: group.index[0])
    pairs = [("exact", 0, int(first[i]), i) for i in df.index[first != df.index]]
    kept = np.unique(first.to_numpy(dtype=np.int64))
    hashes = df.loc[kept, ["dhash_x", "dhash_y"]].to_numpy(dtype=np.uint64)
    bits = np.bitwise_count(hashes).sum(axis=1)
    informative = (bits >= _FLAT_BITS) & (bits <= 128 - _FLAT_BITS)
    kept, hashes = kept[informative & near], hashes[informative & near]
    step = max(1, 2_000_000 // max(len(kept), 1))  # rows at a time: 2 million distances
    for start in range(0, len(kept), step):
        rows = hashes[start : start + step, None]
        distance = np.bitwise_count(rows ^ hashes[start:]).sum(axis=2)
        for i, j in zip(*np.nonzero(np.triu(distance <= NEAR_BITS, 1)), strict=True):
            pairs.append(("near", int(distance[i, j]), int(kept[start + i]), int(kept[start + j])))
    found = pd.DataFrame(pairs, columns=["kind", "distance", "a", "b"])
    a, b = (df.loc[found[side].astype(int)].reset_index(drop=True) for side in ("a", "b"))
    found = found.drop(columns=["a", "b"]).assign(path_a=a[schema.PATH], path_b=b[schema.PATH])
    for name, column in (("across_classes", schema.LABEL), ("across_splits", schema.SPLIT)):
        both = a[column].notna() & b[column].notna()
        found[name] = both & (a[column].astype(object) != b[column].astype(object))
    return found


def equalise_folder(
    manifest: pd.DataFrame, out: str | Path, config: EqualiseConfig | None = None, progress: bool = False
) -> pd.DataFrame:
    """Write a copy of a data set in which both classes have one size and one codec.

    Parameters
    ----------
    manifest : DataFrame
    out : path
        Gets ``images/``, ``manifest.csv``, ``equalise.json`` and, if some images cannot be read,
        ``errors.csv``. A folder begun with the same config is completed, any other is refused.
    config : EqualiseConfig, optional
    progress : bool

    Returns
    -------
    DataFrame
        Manifest of the equalised images; unreadable ones are missing, with a warning.
    """
    config = config or EqualiseConfig()
    out = Path(os.path.abspath(out))
    noted = out / "equalise.json"
    if out.exists() and any(out.iterdir()):
        found = json.loads(noted.read_text()) if noted.is_file() else "nothing known"
        if found != asdict(config):
            wanted = f"expected an empty folder or one of {asdict(config)}"
            raise InputError(f"{out} is not empty and was equalised with {found}; {wanted}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    _files.write_json(noted, asdict(config))

    # The name tells nothing about the class; the path is in it, so that equal images stay apart.
    def write(path: str) -> tuple[str, int]:
        data = read_bytes(path)
        target = out / "images" / f"{content_id(data + os.fsencode(path))[:32]}.{config.codec}"
        image = _decoded(open_image(data, path), path)
        if not target.exists():
            _files.atomic_write(target, equalised_bytes(image, config))
        return str(target), min(image.size)

    rows = manifest.reset_index(drop=True)
    done, errors = _each(write, rows, progress, "equalise")
    (out / "errors.csv").unlink(missing_ok=True)  # of an earlier run: those images may be mended by now
    if len(errors):
        write_csv(errors[[schema.PATH, "reason"]], out / "errors.csv")
        told = f"{len(errors):,} of {len(rows):,} images cannot be read: {out / 'errors.csv'}"
        warnings.warn(told, stacklevel=2)
    copy = rows.drop(index=errors.index).reset_index(drop=True)
    copy[schema.PATH] = [path for path, _ in done]
    small = pd.Series([side < config.size for _, side in done]).groupby(copy[schema.LABEL]).mean()
    if len(small) == 2 and np.ptp(small) > 0.02:
        warnings.warn(
            f"{small[schema.REAL]:.0%} of the real and {small[schema.FAKE]:.0%} of the fake images were "
            f"smaller than {config.size} px and were enlarged, which leaves traces that tell the classes "
            "apart; choose a smaller size",
            stacklevel=2,
        )
    write_manifest(copy, out / "manifest.csv")
    return copy
