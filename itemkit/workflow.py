"""From images to features, a detector and verdicts, each in one call; for notebooks and the command line."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import html
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from PIL import Image

from itemkit import schema
from itemkit._files import atomic_write, folder_lock
from itemkit.errors import InputError, ItemkitError, StoreError
from itemkit.features import Features, bad_rows
from itemkit.images import content_id, load_image, open_image, read_bytes
from itemkit.manifest import read_manifest, write_manifest
from itemkit.models import file_hash, tidy
from itemkit.presets import MINI_REMEDY, PRESETS, Preset, get_preset, mini_folder
from itemkit.splits import fill_splits
from itemkit.store import fingerprint_hash, load_features
from itemkit.text import count, did_you_mean, one_line, printable, probability, wide_table

if TYPE_CHECKING:
    from itemkit.detector import Detector

# the files of data/mini that hold the images of each part of the laboratory
LAB_PARTS = {"images": ("reals", "fakes"), "raw": ("raw",), "fresh": ("fresh",), "ladders": ("ladders",)}
SHOWN = ("auroc", "ap", "accuracy_real", "accuracy_fake", "tpr_at_fpr05", "called_fake", "above_half")
NEW = 0.01  # share of validation images as far off at which an image is called unlike all of them; our choice
CARDS = 4  # of several images that a notebook shows
# What files say of their origin: texts of PNG, where programs keep a prompt; fields of EXIF; and bytes
# anywhere: the type of a C2PA manifest store (ISO 19566-5 UUID) and IPTC's word for "made by a model".
TEXT_MARKS = "parameters prompt workflow sd-metadata invokeai_metadata Software Description".split()
EXIF_MARKS = {"camera maker": 0x010F, "camera": 0x0110, "software": 0x0131}
FILE_MARKS = {
    "C2PA": (
        b"c2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71",
        "content credentials are there; not verified",
    ),
    "IPTC": (b"trainedAlgorithmicMedia", "the file says that a model made it"),
}


def lab_manifest(out_dir: str | Path, which: str = "images") -> pd.DataFrame:
    """Lay out images of the mini laboratory below ``out_dir/mini``, once, and read their manifest.

    They are the data set ("images"), the same before the camera ("raw"), new renders that nothing was
    trained on ("fresh"), or better and better fakes ("ladders"), with the bytes that ``data/mini`` holds.
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
    from itemkit.extraction import extract  # only here: a verdict does not wait for it

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


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """The answer for one image with its evidence, as numbers, words and a picture; ``error`` says why not."""

    path: str  # as it was given; pixels without a file are named by their content
    error: str = ""
    image_id: str = ""
    verdict: str = ""  # real, fake, unsure; withheld where there are too few images for the promise
    because: str = ""
    seen: str = ""  # "train" or "val" if the detector was made with this very image
    p_fake: float | None = None
    log_odds: float | None = None  # before calibration, as thresholds are
    caption: str = ""
    global_cosine: float | None = None
    global_relative: float | None = None  # of detectors that go by it, see `Detector.explain`
    global_real_below: float | None = None
    global_adds: float | None = None
    # phrase, box, found, and as above
    objects: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unlike: float | None = None  # see `Detector.unlike`
    marks: dict[str, str] = dataclasses.field(default_factory=dict)  # what the file says of its origin
    itemkit: str = ""
    preset: str = ""
    models: str = ""
    note: str = ""
    # what else the card shows: calibration images and rates; the pixels, where they are in no file
    detector: Detector | None = None
    rates: tuple[float, float] = (0.05, 0.05)
    pixels: Image.Image | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything said about the image, ready for JSON."""
        if self.error:
            return {"path": self.path, "error": self.error}
        beside = ("error", "detector", "rates", "pixels")
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in beside}
        return {k: v for k, v in found.items() if k != "global_relative" or v is not None}

    def lines(self) -> list[str]:
        """The answer in words. They hold data: escape them where they leave (`itemkit.text.printable`)."""
        if self.error:
            return [self.path, f"  not judged: {self.error}"]

        def fit(cosine: Any, below: float | None, which: str) -> str:
            share = "an unknown share" if below is None else f"{below:.0%}"
            return f"cosine {cosine:.3f}; {share} of {which} less well"

        seen = {"train": " (trained with this very image)", "val": " (calibrated with this very image)"}
        whole = fit(self.global_cosine, self.global_real_below, "validation reals fit their caption")
        lines = [
            self.path + seen.get(self.seen, ""),
            f"  verdict  {self.verdict}, p(fake) {probability(self.p_fake)} ({self.because})",
            f"  caption  {self.caption}",
            f"  global   {whole}",
        ]
        for thing in self.objects:
            box = ", ".join(f"{side:.0f}" for side in thing["box"])
            how = fit(thing["cosine"], thing["real_below"], "objects in validation reals fit")
            lines.append(f"  local    {thing['phrase']} in box ({box}): {how}")
        if not self.objects:
            lines.append("  local    the caption names no object; judged by the whole image")
        lines += [f"  novelty  {text}" for text in filter(None, [self.novelty])]
        lines += [f"  file     {name}: {text}" for name, text in self.marks.items()]
        return lines + [f"  note     {self.note}"] * bool(self.note)

    @property
    def novelty(self) -> str:
        """What there is to say of an image unlike those that made the detector; "" if it is like them."""
        if self.unlike is None or self.unlike > NEW:
            return ""
        return f"unlike anything this was trained on ({self.unlike:.1%} of validation images lie as far off)"

    def __repr__(self) -> str:
        return "\n".join(map(printable, self.lines()))

    def _repr_html_(self) -> str:
        """The card, and the answer in words for those who do not see it."""
        text = html.escape(repr(self))
        if self.error:
            return f"<pre>{text}</pre>"
        from itemkit.card import alt, render

        source = base64.b64encode(render(self)).decode()
        image = f'<img width="420" alt="{html.escape(alt(self))}" src="data:image/png;base64,{source}">'
        return f"<div>{image}<details><summary>in words</summary><pre>{text}</pre></details></div>"

    def card(self, path: str | Path) -> Path:
        """Write the evidence card as PNG or PDF, as the name of the file ends."""
        if self.error:
            raise InputError(f"there is no card of an image that was not judged: {self.error}")
        path = Path(path)
        if path.suffix.lower() not in (".png", ".pdf"):
            raise InputError(f"a card is a .png or a .pdf, got '{path.name}'")
        from itemkit.card import render

        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, render(self, path.suffix[1:].lower()))
        return path


class Verdicts(list[Verdict]):
    """Verdicts of several images; a notebook shows the cards of the first few."""

    def _repr_html_(self) -> str:
        shown = "".join(one._repr_html_() for one in self[:CARDS])
        more = f"<p>... and {count(len(self) - CARDS, 'more image')}</p>" * (len(self) > CARDS)
        return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{shown}</div>{more}'


def detect(
    images: Any,
    preset: str | Preset = "mini",
    detector: str | Path | None = None,
    device: str = "auto",
    caption: str | None = None,
    fpr: float = 0.05,
    fnr: float = 0.05,
) -> Verdict | Verdicts:
    """Judge images with all steps of the method; a notebook shows the evidence as cards.

    Parameters
    ----------
    images : path, PIL image, uint8 array of shape (h, w), (h, w, 3) or (h, w, 4), or bytes of a file
        One image; or a folder, or a sequence of all these. Several at once load the models once.
    detector : path, optional
        Folder of a trained detector; the mini preset has its own.
    caption : str, optional
        The user's caption, in place of a generated one.
    fpr, fnr : float
        At most these shares of real (fake) images like the validation ones are called fake (real).

    Returns
    -------
    Verdict, or Verdicts (a list of them) for a folder or several images
        Where one of several cannot be judged, its ``error`` says why, and the others are.

    Raises
    ------
    InputError
        There is no detector for the preset, or it was trained on features of other models; or the one image
        that was given cannot be used.

    >>> detect("photo.jpg").card("card.png")  # doctest: +SKIP
    """
    single = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    single = single or isinstance(images, bytes)
    single = single or (isinstance(images, (str, Path)) and not os.path.isdir(images))
    found = verdicts([images] if single else images, preset, detector, device, caption, (fpr, fnr), single)
    return next(found) if single else Verdicts(found)


def verdicts(
    images: Any, preset: str | Preset, detector: str | Path | None, device: str, caption: str | None,
    rates: tuple[float, float], strict: bool = False,
) -> Iterator[Verdict]:  # fmt: skip
    """Yield each verdict as soon as it is there; parameters as of `detect`, ``strict`` raises its error."""
    from itemkit.detector import Detector
    from itemkit.steps import Steps

    chosen = get_preset(preset)
    if detector is None and chosen.name != "mini":
        raise InputError(
            f"there is no detector for preset '{chosen.name}' yet: train one with `itemkit extract` and "
            "`itemkit train`, and name its folder with --detector"
        )
    judge = Detector.load(detector or mini_folder() / "models" / "detector", device)
    given = list(_images(images))
    models = chosen.build(device)
    steps = Steps(models)
    parts = models.fingerprint() | {"transform": None, "decode": None}  # as in a store made with these models
    run = {"config": {"name": chosen.name}, "fingerprint": parts, "fingerprint_hash": fingerprint_hash(parts)}
    # a caption given here is another source of text on purpose; the check covers everything else
    ignore = ("captions", "captioner") if caption is not None else ()
    judge.check(cast("Features", SimpleNamespace(run=run)), ignore)
    run["fingerprint"] = judge.trained_on_["fingerprint"]  # checked here, once for all images
    for number, each in enumerate(given, 1):
        name = each if isinstance(each, str) else f"image {number}"
        try:
            image_id, pixels, marks = _opened(each)
            name = name if isinstance(each, str) else image_id
            one = steps([pixels], [caption])
            table = one.table.assign(image_id=image_id, path=name, source="")
            one = dataclasses.replace(one, table=table, run=run)
            if bad_rows(one).any():
                raise ItemkitError("a model gave no finite embedding for it; ask `itemkit doctor --deep`")
            kept = None if isinstance(each, str) else pixels
            answer = _answer(judge, one, rates, marks=marks, pixels=kept)
        except Exception as error:  # noqa: BLE001 - whatever a picture does to a decoder or a model
            if strict:
                raise
            answer = Verdict(name, one_line(error))
        yield answer


def _images(images: Any) -> Iterator[Any]:
    """Paths and pixels as they are given, folders as the images below; what is left out there is said."""
    for each in [images] if isinstance(images, (str, Path)) else images:
        if not isinstance(each, (str, Path)) or not os.path.isdir(each):
            yield os.fspath(each) if isinstance(each, Path) else each
            continue
        found = read_manifest(each, "unlabelled")
        if left := sum(found.attrs["report"]["files_left_out"].values()):
            what = f"{left} of {left + len(found)} files below {each} are no images and are left out"
            warnings.warn(f"{what}; name one to have it judged", stacklevel=4)
        yield from found[schema.PATH]


def _opened(given: Any) -> tuple[str, Image.Image, dict[str, str]]:
    """Content id of an image, its pixels as all models take them, and what its file says of its origin."""
    if isinstance(given, (str, bytes)):
        data, name = (read_bytes(given), given) if isinstance(given, str) else (given, "image bytes")
        opened = open_image(data, name)
        marks = _marks(opened, data)
        return content_id(data), load_image(opened, name), marks
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim not in (2, 3) or given.shape[2:] not in ((), (3,), (4,)):
            raise InputError(
                f"got an array of {given.dtype} and shape {given.shape}; expected uint8 (0 to 255) of shape "
                "(height, width), (height, width, 3) or (height, width, 4)"
            )
        given = Image.fromarray(np.ascontiguousarray(given))
    if not isinstance(given, Image.Image):
        expected = "a path, a PIL image, a uint8 array or the bytes of a file"
        raise InputError(f"got {type(given).__name__}, expected {expected}")
    pixels = load_image(given.copy(), "the PIL image")  # a copy: it is turned in place
    return content_id(repr(pixels.size).encode() + pixels.tobytes()), pixels, _marks(given, b"")


def _marks(image: Image.Image, data: bytes) -> dict[str, str]:
    """What a file says of its origin. Anybody can write or remove that: it proves nothing."""
    found: dict[str, Any] = {name: image.info.get(name) for name in TEXT_MARKS}
    with contextlib.suppress(Exception):  # a broken header can fail in any way
        found |= {name: image.getexif().get(tag) for name, tag in EXIF_MARKS.items()}
    found |= {name: says for name, (sign, says) in FILE_MARKS.items() if sign in data}
    return {name: printable(text.strip(" \0"))[:300] for name, text in found.items() if isinstance(text, str)}


def _answer(judge: Detector, one: Features, rates: tuple[float, float], **about: Any) -> Verdict:
    evidence = judge.explain(one, 0)  # the head is asked once: of the image, and of it without each object
    log_odds = evidence.attrs["log_odds"]
    verdict = judge.answers(np.array([log_odds]), *rates).iloc[0]
    whole, *local = evidence.to_dict("records")
    fits = [name for name in ("cosine", "relative", "real_below", "adds") if name in whole]
    of_whole: dict[str, Any] = {f"global_{fit}": _number(whole[fit]) for fit in fits}
    boxes = [[_number(thing[side], 1) for side in ("x0", "y0", "x1", "y1")] for thing in local]
    return Verdict(
        **one.table[[schema.PATH, schema.IMAGE_ID]].iloc[0],
        **verdict[["verdict", "because"]],
        seen=str(judge.seen(one)[0]),
        p_fake=_number(verdict["p_fake"]),
        log_odds=_number(log_odds),
        caption=whole["text"],
        **of_whole,
        objects=[
            {"phrase": thing["text"], "box": box, "found": bool(thing["found"])}
            | {fit: _number(thing[fit]) for fit in fits}
            for thing, box in zip(local, boxes, strict=True)
        ],
        unlike=_number(judge.unlike(one)[0]),
        detector=judge,
        rates=rates,
        **one.provenance,
        **about,
    )


def _number(value: float, digits: int = 4) -> float | None:
    """A rounded number; None where there is none, since JSON knows no NaN."""
    return round(float(value), digits) if math.isfinite(value) else None
