"""How data sets lie on disk: folder trees, read into raw manifest rows.

Labels come from whole path components below the given root, in any case, never from a part of a name.
`source` names the set whose photographs an image is compared with, so that a reader can pair
fakes with the reals of their own set.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from itemkit import schema
from itemkit.errors import InputError
from itemkit.images import EXTENSIONS

REAL_WORDS = ("real", "reals", "real_images", "photo", "photos", "photographs", "authentic")
FAKE_WORDS = ("fake", "fakes", "fake_images", "generated", "ai_generated", "synthetic", "aigc")
LABEL_FAMILIES: dict[str, dict[str, int]] = {
    "genimage": {"nature": 0, "ai": 1},
    "forensynths": {"0_real": 0, "1_fake": 1},
    "folder": {**dict.fromkeys(REAL_WORDS, 0), **dict.fromkeys(FAKE_WORDS, 1)},
}
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "train2014", "train2017"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "val2014", "val2017"), "val"),
    **dict.fromkeys(("test", "testing", "test2014", "test2017"), "test"),
}
# Folders that only hold others; they name neither a generator nor a source.
_CONTAINERS = {"images", "image", "img", "imgs", "data", "dataset", "datasets", "diffusion_datasets"}
_CLASS_LEVEL = {"progan", "cyclegan", "stylegan", "stylegan2"}  # ForenSynths sets with one folder per class
_GENIMAGE_DOWNLOAD = re.compile(r"imagenet_(?:ai_\d+_)?(\w+)", re.IGNORECASE)
_GENIMAGE_NAMES = {
    "sdv4": "stable_diffusion_v_1_4", "sdv5": "stable_diffusion_v_1_5", "midjourney": "Midjourney",
    "adm": "ADM", "glide": "glide", "wukong": "wukong", "vqdm": "VQDM", "biggan": "BigGAN",
}  # fmt: skip
_SYNTHBUSTER_FILE = re.compile(r"r[0-9a-f]{6,}t\.png", re.IGNORECASE)
_DIFFUSION_FORENSICS = {"lsun_bedroom", "imagenet", "celebahq"}
# reals of DRCT-2M and of Synthbuster
_PHOTO_SETS = {"mscoco", "coco", "raise", "raise-1k", "raise_1k", "raise1k"}

Row = dict[str, object]
Parts = tuple[str, ...]  # path of one image relative to the root, component by component


def scan(root: Path) -> list[Parts]:
    """List the images below a folder by extension, sorted; hidden files are skipped, links followed.

    A folder that several links lead to (reals shared by several sets) is listed under each of them.
    """
    found: list[Parts] = []
    others: Counter[str] = Counter()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if _leads_back(Path(folder), root):
            subfolders.clear()
            continue
        subfolders[:] = sorted(d for d in subfolders if not d.startswith(".") and d != "__MACOSX")
        prefix = Path(folder).relative_to(root).parts
        for name in files:
            if name.startswith("."):
                continue
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS:
                found.append((*prefix, name))
            else:
                others[extension or "(no extension)"] += 1
    if not found:
        there = ", ".join(f"{n} {e}" for e, n in others.most_common(5)) or "nothing"
        raise InputError(
            f"no image below {root}: looked for {' '.join(EXTENSIONS)}; found {there}. "
            "Check the folder, or give a CSV or Parquet table"
        )
    return sorted(found)


def _leads_back(folder: Path, root: Path) -> bool:
    """Whether a folder is a link to one that it lies in itself: to follow it would never end."""
    if folder == root or not folder.is_symlink():
        return False
    target = folder.resolve()
    above = folder.parents[: len(folder.relative_to(root).parts)]
    return any(parent.resolve().is_relative_to(target) for parent in above)


def read_folder(root: Path, layout: str, real_root: Path | None) -> pd.DataFrame:
    """Read a folder tree in one of :data:`FOLDER_LAYOUTS`; ``auto`` decides from the folder names.

    Parameters
    ----------
    root : Path
        Folder of all images, or of the fakes when `real_root` is given.
    layout : str
    real_root : Path, optional
        Folder of the photographs, for sets that keep them apart.

    Returns
    -------
    DataFrame
        Raw rows ``path, label, generator, source, split``.
    """
    files = scan(root)
    if layout == "auto":
        layout = _detect(root, files, real_root)
    if real_root is None:
        return pd.DataFrame(FOLDER_LAYOUTS[layout](root, files, None))
    if FOLDER_LAYOUTS[layout] is not _two_roots:
        raise InputError(
            f"layout {layout!r} has its photographs in the same tree, but real_root='{real_root}' was given "
            "too; leave real_root out, or pass layout='two_roots'"
        )
    return pd.DataFrame([*_two_roots(root, files, real_root.name), *_photographs(real_root)])


def _detect(root: Path, files: list[Parts], real_root: Path | None) -> str:
    """Name the layout of a tree from its folder names; several answers are an error, never a choice."""
    folders = [tuple(map(_norm, parts[:-1])) for parts in files]
    found: dict[str, int] = {}
    for family, words in LABEL_FAMILIES.items():
        if n := sum(any(p in words for p in parts) for parts in folders):
            found[family] = n
    what = "; ".join(f"{_used(folders, f)} ({n:,} images, layout {f!r})" for f, n in found.items())
    if real_root is not None:
        if found:
            raise InputError(
                f"{root} holds label folders of its own: {what}; but real_root='{real_root}' was given too. "
                "Pass layout='two_roots' to take all of the first as fake, or leave real_root out"
            )
        return "two_roots"
    if len(found) > 1:
        raise InputError(f"{root} mixes label folders of several layouts: {what}. Name one with layout=")
    if found:
        family, n = next(iter(found.items()))
        return family if n == len(files) else _detect_mixed(root, files, folders, family, n)
    return _detect_unlabelled(root, files, folders)


def _detect_mixed(root: Path, files: list[Parts], folders: list[Parts], family: str, n: int) -> str:
    """Name the layout where some images lie under label folders and some do not."""
    words = LABEL_FAMILIES[family]
    bases = _bases(folders)
    if family == "folder" and all(_base(parts, bases) is not None for parts in folders):
        if all((base[-1] if base else _norm(root.name)) in _DIFFUSION_FORENSICS for base in bases):
            return "diffusionforensics"
        beside = {parts[len(_base(parts, bases) or ())] for parts in folders} - set(words)
        raise InputError(
            f"{root}: beside 'real' there are {', '.join(sorted(beside)[:8])}, which are no label names. "
            "If they are generators, pass layout='generators'"
        )
    first = next(parts for parts, low in zip(files, folders, strict=True) if not any(p in words for p in low))
    raise InputError(
        f"{root}: {n:,} images lie under {_used(folders, family)} and {len(files) - n:,} under no label "
        f"folder (first: {'/'.join(first)}). Move them, or give a table"
    )


def _detect_unlabelled(root: Path, files: list[Parts], folders: list[Parts]) -> str:
    if all(_SYNTHBUSTER_FILE.fullmatch(parts[-1]) for parts in files):
        return "synthbuster"
    names = {p for parts in folders for p in parts} | {_norm(root.name), _norm(root.parent.name)}
    if names & {"train2017", "val2017"}:
        if any(name.startswith("drct") for name in names):
            return "drct"
        raise InputError(
            f"{root} has train2017/val2017, as both DRCT-2M (fakes) and MSCOCO (photographs) do. Pass "
            "layout='drct' with real_root= the MSCOCO folder, or layout='unlabelled'"
        )
    tables = [p.name for p in sorted(root.iterdir()) if p.suffix.lower() in (".csv", ".tsv", ".parquet")]
    if tables:
        raise InputError(
            f"{root} has no label folders but holds {', '.join(tables[:5])}: read that table instead, "
            "or pass layout='unlabelled'"
        )
    return "unlabelled"


def _by_components(words: dict[str, int], namer: Callable) -> Callable:
    """Build a reader for trees whose label is one folder; `namer` finds generator and source around it."""

    def reader(root: Path, files: list[Parts], _: str | None) -> list[Row]:
        rows = []
        for parts in files:
            folders = tuple(map(_norm, parts[:-1]))
            at = [i for i, p in enumerate(folders) if p in words]
            labels = {words[folders[i]] for i in at}
            if len(labels) != 1:
                both = f"label folders of both classes ({', '.join(parts[i] for i in at)})"
                raise InputError(
                    f"{root}: '{'/'.join(parts)}' has {both if at else 'no label folder'}. Each path needs "
                    f"exactly one of {', '.join(words)}; move it, choose another layout= or give a table"
                )
            name, source = namer(root, parts[: at[0]], parts[at[0] + 1 : -1])
            rows.append(_row(root, parts, labels.pop(), name, source))
        return rows

    return reader


def _name_genimage(root: Path, before: Parts, _: Parts) -> tuple[str, str]:
    names = _names((root.parent.name, root.name, *before))
    wrapped = [m[1].lower() for m in map(_GENIMAGE_DOWNLOAD.fullmatch, names) if m]
    name = _GENIMAGE_NAMES.get(wrapped[-1], wrapped[-1]) if wrapped else (["unknown"] + names)[-1]
    return name, name


def _name_forensynths(root: Path, before: Parts, _: Parts) -> tuple[str, str]:
    chain = (root.name, *before)
    known = [p for p in chain if _norm(p) in _CLASS_LEVEL]
    splits = [i for i, p in enumerate(chain) if _norm(p) in SPLIT_WORDS]
    after_split = _names(chain[splits[-1] + 1 :]) if splits else []
    name = (known or after_split[:1] or _names(chain) or ["unknown"])[-1]
    return name, name


def _name_plain(root: Path, before: Parts, after: Parts) -> tuple[str, str]:
    outer, inner = _names(before), _names(after)
    return (inner[:1] or outer[-1:] or ["unknown"])[0], (outer[-1:] or [root.name])[0]


def _forensynths(root: Path, files: list[Parts], _: str | None) -> list[Row]:
    rows = _by_components(LABEL_FAMILIES["forensynths"], _name_forensynths)(root, files, None)
    reals = {r[schema.SOURCE] for r in rows if r[schema.LABEL] == schema.REAL}
    for row in rows:  # UniversalFakeDetect: several diffusion sets share the photographs of one other set
        if row[schema.SOURCE] not in reals:
            shared = "imagenet" if row[schema.GENERATOR] == "guided" else "laion"
            row[schema.SOURCE] = shared if shared in reals else row[schema.SOURCE]
    return rows


def _generators(root: Path, files: list[Parts], _: str | None) -> list[Row]:
    """`real` beside one folder per generator, at any depth (DiffusionForensics)."""
    lowered = [tuple(map(_norm, parts[:-1])) for parts in files]
    bases = _bases(lowered)
    rows = []
    for parts, folders in zip(files, lowered, strict=True):
        base = _base(folders, bases)
        if base is None:
            raise InputError(
                f"{root}: '{'/'.join(parts)}' lies beside no folder 'real'. Expected real and one folder per "
                "generator side by side; move it or give a table"
            )
        label = schema.REAL if folders[len(base)] == "real" else schema.FAKE
        source = (_names(parts[: len(base)])[-1:] or [root.name])[0]
        rows.append(_row(root, parts, label, parts[len(base)], source))
    return rows


def _two_roots(root: Path, files: list[Parts], source: str | None) -> list[Row]:
    """Fakes, one folder per generator (DRCT-2M, Synthbuster); a folder named after a photo set is real."""
    rows = []
    for parts in files:
        names = _names(parts[:-1]) or [root.name]
        photos = [n for n in names if _norm(n) in _PHOTO_SETS]
        if photos:
            rows.append(_row(root, parts, schema.REAL, "", photos[0]))
        else:
            rows.append(_row(root, parts, schema.FAKE, names[-1], source or root.name))
    return rows


def _photographs(root: Path) -> list[Row]:
    return [_row(root, parts, schema.REAL, "", root.name) for parts in scan(root)]


def _unlabelled(root: Path, files: list[Parts], _: str | None) -> list[Row]:
    return [_row(root, parts, None, "unknown", root.name) for parts in files]


FOLDER_LAYOUTS: dict[str, Callable[[Path, list[Parts], str | None], list[Row]]] = {
    "folder": _by_components(LABEL_FAMILIES["folder"], _name_plain),
    "genimage": _by_components(LABEL_FAMILIES["genimage"], _name_genimage),
    "forensynths": _forensynths,
    "generators": _generators,
    "two_roots": _two_roots,
    "unlabelled": _unlabelled,
}
FOLDER_LAYOUTS |= {
    **dict.fromkeys(("ufd", "cnndetection", "aigibench", "fatformer"), FOLDER_LAYOUTS["forensynths"]),
    "diffusionforensics": _generators,
    **dict.fromkeys(("drct", "synthbuster"), _two_roots),
}


def _norm(name: str) -> str:
    return name.casefold().replace(" ", "_")


def _names(parts: Iterable[str]) -> list[str]:
    return [p for p in parts if _norm(p) not in SPLIT_WORDS and _norm(p) not in _CONTAINERS]


def _used(folders: list[Parts], family: str) -> str:
    return "|".join(sorted({p for parts in folders for p in parts} & set(LABEL_FAMILIES[family])))


def _bases(folders: list[Parts]) -> set[Parts]:
    """Folders that hold a folder `real`."""
    return {parts[: parts.index("real")] for parts in folders if "real" in parts}


def _base(folders: Parts, bases: set[Parts]) -> Parts | None:
    """Deepest of `bases` that holds the folder of this image."""
    return next((folders[:n] for n in range(len(folders) - 1, -1, -1) if folders[:n] in bases), None)


def _row(root: Path, parts: Parts, label: int | None, generator: str, source: str) -> Row:
    splits = {SPLIT_WORDS[p] for p in map(_norm, parts[:-1]) if p in SPLIT_WORDS}
    if len(splits) > 1:
        raise InputError(
            f"{root}: '{'/'.join(parts)}' lies under folders of several splits: {', '.join(sorted(splits))}. "
            "Rename one of them or give a table"
        )
    return {
        schema.PATH: str(root.joinpath(*parts)),
        schema.LABEL: label,
        schema.GENERATOR: schema.REAL_GENERATOR if label == schema.REAL else generator,
        schema.SOURCE: source,
        schema.SPLIT: splits.pop() if splits else None,
    }
