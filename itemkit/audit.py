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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.parallel import Parallel, delayed
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
from itemkit.splits import place
from itemkit.text import count, printable

FOLDS = 5
MIN_PER_CLASS = 10  # with fewer images a property is listed as not measurable
MAX_NEAR = 100_000  # every image is compared with every other: beyond this near copies are not looked for
#: Pairs at most this far apart (of 128 bits) count as near copies. Of 1,450 photographs and fakes, copies at
#: JPEG 50, or a third of the size, lie within 9 bits in 99 % of cases, different files from 16.
NEAR_BITS = 10
_FLAT_BITS = 10  # a picture with fewer set (or unset) bits is all but empty: its hash says nothing
_SHOWN = ["property", "auroc", "low", "high", "n_real", "n_fake", "verdict"]
# Lower end of the interval from which a leak gets its name; our choice.
VERDICTS = {"decides": 0.9, "strong": 0.7, "moderate": 0.55}
_LARGE_PIXELS, _LARGE = 20_000_000, threading.Lock()  # larger ones are decoded one at a time: bounded memory
_METADATA = {"exif", "icc_profile", "xmp", "photoshop", "comment"}  # as Pillow names them
# Presence of each word and punctuation mark: how a caption is punctuated is style, too.
_WORDS = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")

_EQUALISE = "Equalise both classes before training, or match them; report raw and equalised results."
_BYTES = "In files of one size and codec, what remains of the file size is content: detail and noise."
_CAPTIONS = "Caption both classes with the same captioner, and show the text-only control."


class _Property(NamedTuple):
    name: str  # column of the measurements; images without a value do not take part
    kind: str  # category, number or text
    what: str  # as it stands in the sentence
    advice: str = _EQUALISE
    group: str = schema.IMAGE_ID  # copies of one image, fakes of one prompt: never on both sides of a fold


PROPERTIES = (
    _Property("format", "category", "the file format"),
    _Property("size", "category", "the exact width and height"),
    _Property("width", "number", "the width"),
    _Property("height", "number", "the height"),
    _Property("aspect", "number", "the aspect ratio"),
    _Property("colour_mode", "category", "the colour mode (grey, RGB, alpha, palette)"),
    _Property("jpeg_quality", "number", "the JPEG quality"),
    _Property("jpeg_subsampling", "category", "the chroma subsampling"),
    _Property("metadata", "category", "the kinds of metadata (EXIF, colour profile, comment)"),
    _Property("bytes_per_pixel", "number", "the file size per pixel", _BYTES),
    _Property("caption_present", "category", "the presence of a caption", _CAPTIONS),
    _Property("caption_words", "number", "the length of the caption", _CAPTIONS, schema.CAPTION),
    _Property("caption_vocabulary", "text", "the words of the caption", _CAPTIONS, schema.CAPTION),
)


MATCHED = ("format", "size", "jpeg_quality", "jpeg_subsampling")  # what `match_classes` makes agree


@dataclass(frozen=True)
class AuditReport:
    """What the audit found."""

    #: One row per property, ranked: ``property, n_real, n_fake, auroc, low, high, verdict, sentence, advice,
    #: set``. With one class only there is no AUROC; the sentences describe it.
    table: pd.DataFrame
    parts: pd.DataFrame  # the same for the ``set`` of each generator (or source); the worst first
    duplicates: pd.DataFrame  # see `find_duplicates`
    measurements: pd.DataFrame  # a row per readable image
    errors: pd.DataFrame  # ``path, label, kind, reason`` of the others
    notes: list[str]

    @property
    def leaks(self) -> pd.DataFrame:
        """Rows of both tables whose property separates the classes, the strongest first."""
        both = pd.concat([self.table, self.parts])
        return both[both["verdict"].isin(VERDICTS)].sort_values("auroc", ascending=False, kind="stable")

    def to_text(self, before: AuditReport | None = None) -> str:
        """Give the report as plain text; `before` is one of the same images before something was done."""
        leaks, shown = self.leaks, self.table[_SHOWN]
        if before is not None:
            earlier = before.table.set_index("property")["auroc"]
            shown.insert(1, "before", shown["property"].map(earlier))
        title = "AUROC of each property alone, on images it was not fitted to (0.5 is chance)"
        lines = [self._headline(), "", title, "", _aligned(shown), ""]
        if len(worst := leaks[leaks["set"] != "all"]):
            leaking = worst["set"].value_counts()
            shown = worst.drop_duplicates("set")[["set", *_SHOWN]].assign(
                leaks=lambda t: t["set"].map(leaking)
            )
            title = "Worst of single sets, each by its strongest leak, against the real images of its source"
            lines += [title, "", _aligned(shown.head(20).assign(set=shown["set"].map(printable))), ""]
            lines += [f"... and {len(shown) - 20} more sets", ""] * (len(shown) > 20)
        said = self.table.loc[(self.table["verdict"] != "none") & (self.table["sentence"] != ""), "sentence"]
        lines += [f"- {printable(sentence)}" for sentence in [*said, *self.notes]]
        if len(leaks):
            lines += ["", "What to do", *(f"- {line}" for line in leaks["advice"].unique())]
        return "\n".join(lines)

    def _headline(self) -> str:
        """What was judged, and what it means for a detector's score on these images."""
        label, n, n_bad = self.measurements[schema.LABEL], len(self.measurements), len(self.errors)
        kinds = ", ".join(f"{k:,} {kind}" for kind, k in self.errors["kind"].value_counts().items())
        part = f"PARTIAL audit of {n:,} of {n + n_bad:,} images (not read: {kinds})"
        what = part if n_bad else f"Audit of {count(n, 'image')}"
        what += f": {(label == schema.REAL).sum():,} real, {(label == schema.FAKE).sum():,} fake\n"
        if self.table["auroc"].isna().all():
            return f"{what}Nothing can be compared: that needs {MIN_PER_CLASS} images of each class."
        if not len(leaks := self.leaks):
            return f"{what}No property separates the classes."
        first = leaks.iloc[0]
        where = "" if first["set"] == "all" else f" in '{printable(first['set'])}'"
        return (
            f"{what}The strongest leak, '{first['property']}'{where}, reaches AUROC {first['auroc']:.3f} "
            "alone: a detector that sees it can score as much without knowing a thing about generated images."
        )


def _aligned(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format="{:.3f}".format, na_rep="-")


def audit(manifest: pd.DataFrame, *, by: str = schema.GENERATOR, progress: bool = False) -> AuditReport:
    """Measure what besides content separates the classes of a data set.

    Parameters
    ----------
    manifest : DataFrame
        As `read_manifest` gives it; rows without a label are left out where both classes are there.
    by : {"generator", "source"}
        Judge these sets by themselves too: the fakes of each generator against the real images of the same
        source (all of them if it has none), or the images of each source.
    progress : bool

    Raises
    ------
    InputError
        No image can be read.
    """
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
        caption_words=captions.str.split().str.len().astype(float),
        caption_vocabulary=captions,
    )
    whole = _rank(table, "all")
    parts = pd.concat([whole.head(0), *(_rank(part, name) for name, part in _sets(table, by))])
    parts = parts.sort_values("auroc", ascending=False, kind="stable").reset_index(drop=True)
    copies = find_duplicates(table)
    for kind, pairs in copies.groupby("kind"):
        first = pairs.sort_values(["across_classes", "across_splits"], ascending=False).iloc[0]
        notes.append(
            f"Pairs of {kind} copies: {len(pairs):,}, {pairs['across_splits'].sum():,} across splits, "
            f"{pairs['across_classes'].sum():,} across classes; first: {first['path_a']} and "
            f"{first['path_b']}. Keep one, or both in one split."
        )
    if len(table) > MAX_NEAR:
        notes.append(f"Near copies were not looked for: more than {MAX_NEAR:,} images.")
    elif not len(copies):
        notes.append("No duplicates found.")
    return AuditReport(whole, parts, copies, table, errors.reset_index(drop=True), notes)


def _sets(table: pd.DataFrame, by: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Single sets that hold both classes."""
    real = (table[schema.LABEL] == schema.REAL).fillna(False)
    names = table.loc[~real | (by == schema.SOURCE), by].dropna().unique()
    for name in names if len(names) > 1 else ():
        mine = table[by] == name
        if by == schema.GENERATOR:
            own = real & table[schema.SOURCE].isin(table.loc[mine, schema.SOURCE])
            mine |= own if own.any() else real
        if table.loc[mine, schema.LABEL].nunique() == 2:
            yield str(name), table[mine].reset_index(drop=True)


def _rank(table: pd.DataFrame, name: str) -> pd.DataFrame:
    rows = pd.DataFrame([_judge(prop, table) for prop in PROPERTIES]).assign(set=name)
    return rows.sort_values("auroc", ascending=False, kind="stable").reset_index(drop=True)


def measure(path: str) -> dict[str, object]:
    """Measure everything about one image file that is not its content, and its hashes."""
    data = read_bytes(path)
    image = open_image(data, path)
    is_jpeg, (width, height) = image.format in ("JPEG", "MPO"), image.size
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
    kinds = _METADATA & image.info.keys()
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

    jobs = Parallel(min(8, os.cpu_count() or 1), prefer="threads", return_as="generator")
    running = jobs(delayed(one)(path) for path in rows[schema.PATH])
    results = list(tqdm(running, desc=what, total=len(rows), unit="image", disable=not progress))
    bad = {i: result for i, result in enumerate(results) if isinstance(result, ImageError)}
    if len(bad) == len(rows):
        raise InputError(f"none of the {count(len(bad), 'image')} can be read; first: {bad[0].reason}")
    errors = rows.loc[list(bad), [schema.PATH, schema.LABEL]]
    errors = errors.assign(kind=[e.kind for e in bad.values()], reason=[e.reason for e in bad.values()])
    return [result for i, result in enumerate(results) if i not in bad], errors


def _judge(prop: _Property, table: pd.DataFrame) -> dict[str, object]:
    """One row of the report's table."""
    table = table[table[prop.name].notna()]
    real, fake = (table[(table[schema.LABEL] == k).fillna(False)] for k in (schema.REAL, schema.FAKE))
    (auroc, low, high), verdict, sentence = (np.nan,) * 3, "not measurable", ""
    if all(len(side) >= MIN_PER_CLASS and side[prop.group].nunique() >= FOLDS for side in (real, fake)):
        y = table[schema.LABEL].to_numpy(dtype=np.int64)
        auroc, low, high = held_out_auroc(table[prop.name], y, table[prop.group], prop.kind)
        verdict = next((name for name, bound in VERDICTS.items() if low >= bound), "none")
        fakes, reals = _describe(prop, fake, real), _describe(prop, real, fake)
        sentence = f"With nothing but {prop.what}, AUROC {auroc:.3f}: fakes {fakes}; real images {reals}."
    elif len(table) and prop.kind != "text":
        sentence = f"{prop.what[0].upper()}{prop.what[1:]}: {_describe(prop, table, table)}."
    row = {"property": prop.name, "n_real": len(real), "n_fake": len(fake), "auroc": auroc, "low": low}
    return row | {"high": high, "verdict": verdict, "sentence": sentence, "advice": prop.advice}


def _describe(prop: _Property, mine: pd.DataFrame, others: pd.DataFrame) -> str:
    """What a property is like in some images; of texts what they have and the others have not."""
    if prop.kind == "number":
        low, middle, high = mine[prop.name].quantile([0.25, 0.5, 0.75])
        return f"median {middle:.3g} (middle half {low:.3g} to {high:.3g})"
    if prop.kind == "text":
        found = _WORDS.fit_transform([*mine[prop.name], *others[prop.name]])
        gap = np.ravel(found[: len(mine)].mean(axis=0) - found[len(mine) :].mean(axis=0))
        return f"above all {', '.join(map(repr, _WORDS.get_feature_names_out()[(-gap).argsort()[:4]]))}"
    shares = mine[prop.name].value_counts(normalize=True).head(3)
    return ", ".join(f"'{name}' {share:.0%}" for name, share in shares.items())


def held_out_auroc(
    values: pd.Series, y: np.ndarray, groups: pd.Series, kind: str
) -> tuple[float, float, float]:
    """AUROC of "fake" that one property reaches on images which the scoring was not fitted to.

    Each fold is scored by what was fitted to the others; images are compared within their fold only: pooled,
    a fold with more fakes of a category would lower their common score. Images of one group are in one fold.
    With its 95 % interval (DeLong et al. 1988); nan where no fold holds both classes.
    """
    x = values.to_numpy(dtype=float if kind == "number" else object)
    if kind == "text":
        model = make_pipeline(_WORDS, LogisticRegression(max_iter=1000))
    elif kind == "category":
        # in closed form: an optimiser stops before it has seen thousands of rare categories of a large set
        x, model = x[:, None], make_pipeline(OneHotEncoder(handle_unknown="ignore"), MultinomialNB())
    else:
        # a tree, not the rank: fakes of one width in the middle of the photographs' widths are a leak too
        x, leaf = x[:, None], max(5, len(y) // 125)
        model = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=leaf, random_state=0)
    # the groups of each class, shuffled, are dealt out in turn; StratifiedGroupKFold takes minutes at 100,000
    dealt = pd.DataFrame({"group": groups.to_numpy(), "y": y})
    dealt["classes"] = dealt.groupby("group")["y"].transform("nunique")
    dealt = dealt.sample(frac=1, random_state=0).drop_duplicates("group")
    fold_of = (dealt.groupby(["y", "classes"]).cumcount() % FOLDS).set_axis(dealt["group"])
    fold = groups.map(fold_of).to_numpy()
    score = cross_val_predict(model, x, y, cv=PredefinedSplit(fold), method="predict_proba")[:, 1]
    table = pd.DataFrame({"fold": fold, "y": y, "score": score})
    # of each fake the share of real images below it in its fold, of each real image the share of fakes
    folds, classes = (table.groupby(by)["score"] for by in ("fold", ["fold", "y"]))
    others = folds.transform("size") - classes.transform("size")
    placed = ((folds.rank() - classes.rank()) / others).groupby(table["y"])
    auroc = placed.mean().get(schema.FAKE, np.nan)
    half = 1.96 * np.sqrt((placed.var(ddof=0) / placed.count()).sum())
    low, high = np.clip([auroc - half, auroc + half], 0, 1)
    return float(auroc), float(low), float(high)


def dhash(image: Image.Image) -> tuple[int, int]:
    """Hash a picture by whether each of 8 x 8 places is darker than its right and its lower neighbour.

    Gives two 64-bit numbers, horizontal and vertical.
    """
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BILINEAR), dtype=np.int16)
    right, below = grey[:-1, 1:] > grey[:-1, :-1], grey[1:, :-1] > grey[:-1, :-1]
    first, second = (int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in (right, below))
    return first, second


def find_duplicates(df: pd.DataFrame) -> pd.DataFrame:
    """List pairs of images that show the same picture: exact copies, and near ones by their hashes.

    Every image is compared with every other: about 1 s for 10,000 images and 2 min for `MAX_NEAR`; of more,
    only exact copies are found. Of several equal images each is paired with the first one only. Gives
    ``kind, distance`` (bits), ``path_a, path_b, across_classes, across_splits``.
    """
    df = df.reset_index(drop=True)
    first = df.groupby(schema.IMAGE_ID)[schema.PATH].transform(lambda group: group.index[0])
    pairs = [("exact", 0, int(first[i]), i) for i in df.index[first != df.index]]
    kept = np.unique(first.to_numpy(dtype=np.int64))
    hashes = df.loc[kept, ["dhash_x", "dhash_y"]].to_numpy(dtype=np.uint64)
    bits = np.bitwise_count(hashes).sum(axis=1)
    compared = (bits >= _FLAT_BITS) & (bits <= 128 - _FLAT_BITS) & (len(df) <= MAX_NEAR)
    kept, hashes = kept[compared], hashes[compared]
    step = max(1, 2_000_000 // max(len(kept), 1))  # rows at a time: 2 million distances
    for start in range(0, len(kept), step):
        rows = hashes[start : start + step, None]
        distance = np.bitwise_count(rows ^ hashes[start:]).sum(axis=2)
        for i, j in zip(*np.nonzero(np.triu(distance <= NEAR_BITS, 1)), strict=True):
            pairs.append(("near", int(distance[i, j]), int(kept[start + i]), int(kept[start + j])))
    found = pd.DataFrame(pairs, columns=["kind", "distance", "a", "b"])
    a, b = (df.loc[found.pop(side).astype(int)].reset_index(drop=True) for side in ("a", "b"))
    found = found.assign(path_a=a[schema.PATH], path_b=b[schema.PATH])
    for name, column in (("across_classes", schema.LABEL), ("across_splits", schema.SPLIT)):
        both = a[column].notna() & b[column].notna()
        found[name] = both & (a[column].astype(object) != b[column].astype(object))
    return found


def match_classes(measured: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Choose as many real as fake images that agree in `MATCHED`; no pixel is changed.

    What `equalise_folder` reaches by re-encoding, this reaches by leaving images out: of each split, and each
    combination of properties, both classes keep as many images as the smaller of them has. The images'
    content decides which, so the choice is the same on every run.

    Parameters
    ----------
    measured : DataFrame
        ``measurements`` of an `AuditReport`; images without a label are left out.

    Returns
    -------
    (DataFrame, DataFrame)
        Rows of ``measured`` that are kept; and of each combination and label ``images, kept, left_out``, the
        largest loss first.

    Raises
    ------
    InputError
        No combination is found in both classes.
    """
    alike, label = [schema.SPLIT, *MATCHED], schema.LABEL
    known = measured[measured[label].notna()]
    known = known.assign(stratum=known.groupby(alike, dropna=False).ngroup())
    smaller = known.groupby(["stratum", label]).size().unstack(fill_value=0).min(axis=1)
    drawn = known.assign(place=place(known[schema.IMAGE_ID], "match")).sort_values("place", kind="stable")
    turn = drawn.groupby(["stratum", label]).cumcount()
    known["kept"] = turn.reindex(known.index) < known["stratum"].map(smaller)
    left = known.groupby([*alike, label], dropna=False)["kept"].agg(images="size", kept="sum").reset_index()
    left = left.assign(left_out=left["images"] - left["kept"])
    left = left.sort_values("left_out", ascending=False, kind="stable", ignore_index=True)
    if known[label].nunique() < 2 or not known["kept"].any():
        there = f"{' and '.join(MATCHED)} of real and fake images are never the same"
        raise InputError(f"nothing to match: {there}; equalise the images instead")
    return measured.loc[known.index[known["kept"]]].reset_index(drop=True), left


def equalise_folder(
    manifest: pd.DataFrame, out: str | Path, config: EqualiseConfig | None = None, progress: bool = False
) -> pd.DataFrame:
    """Write a copy of a data set in which both classes have one size and one codec.

    Fills ``out`` with ``images/``, ``manifest.csv`` and ``equalise.json``, or completes what the same config
    has begun there; any other folder is refused. Gives the manifest of the equalised images; unreadable ones
    are missing, with a warning.
    """
    config, out = config or EqualiseConfig(), Path(os.path.abspath(out))
    noted, wanted = out / "equalise.json", asdict(config)
    found = json.loads(noted.read_text()) if noted.is_file() else [path.name for path in out.glob("*")][:3]
    if found not in ([], wanted):
        raise InputError(f"{out} holds {found}, not what was equalised with {wanted}; name an empty folder")
    (out / "images").mkdir(parents=True, exist_ok=True)
    _files.write_json(noted, wanted)

    # The name tells nothing about the class; the path is in it, so that equal images stay apart.
    def write(path: str) -> tuple[str, bool]:
        data = read_bytes(path)
        target = out / "images" / f"{content_id(data + os.fsencode(path))[:32]}.{config.codec}"
        image = _decoded(open_image(data, path), path)
        if not target.exists():
            _files.atomic_write(target, equalised_bytes(image, config), sync=False)
        return str(target), min(image.size) < config.size

    rows = manifest.reset_index(drop=True)
    done, errors = _each(write, rows, progress, "equalise")
    if len(errors):
        told = f"{len(errors):,} of {len(rows):,} images cannot be read; first: {errors['reason'].iloc[0]}"
        warnings.warn(told, stacklevel=2)
    copy = rows.drop(index=errors.index).reset_index(drop=True)
    copy[schema.PATH], small = zip(*done, strict=True)
    enlarged = pd.Series(small).groupby(copy[schema.LABEL]).mean()
    if len(enlarged) == 2 and np.ptp(enlarged) > 0.02:
        warnings.warn(
            f"{enlarged[schema.REAL]:.0%} of the real and {enlarged[schema.FAKE]:.0%} of the fake images "
            f"were enlarged to {config.size} px, which leaves traces; choose a smaller size",
            stacklevel=2,
        )
    write_manifest(copy, out / "manifest.csv")
    return copy
