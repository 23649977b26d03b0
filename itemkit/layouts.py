"""How data sets lie on disk: folder trees, read into raw manifest rows.

What a folder's name says (real or fake, train or test, or nothing) is read off tables of words, from whole
names below the given root; a name that merely contains such a word counts only beside its opposite. `source`
names the set whose photographs an image is compared with, so that a reader can pair fakes with their reals.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.errors import InputError
from itemkit.images import EXTENSIONS, looks_like_image
from itemkit.text import count, printable

Parts = tuple[str, ...]  # a folder relative to the root, component by component

# Words of a name, as patterns. A sure word labels a tree by itself (a set of fakes alone); a word of a pair
# only where the other class is there too, since "original" or "human" alone says nothing of the kind.
_WORDS = {
    "no_fake": r"(?:non|not|no)_?(?:ai|fakes?|generated|synthetic)|human_?(?:generated|drawn)",
    "no_real": r"(?:non|not|no)_?real",
    "sure_real": r"reals?|nature|authentic|genuine|photograph(?:s|y)?|photos?",
    "sure_fake": r"fakes?|deep_?fakes?|ai_?generated|generated|synthetic|aigc|aigi|ai",
    "pair_real": r"naturals?|originals?|pristine|bona_?fide|humans?|camera|untampered|unmanipulated",
    "pair_fake": r"manipulated|manipulations?|tampered|forged|forger(?:y|ies)|altered|edited|artificial"
                 r"|machine|computer|synthesi[sz]ed|synthesis|diffusion|gans?|spoof(?:ed)?",
    "test": r"test(?:ing)?|tst|hold_?out|evaluation",
    "train": r"train(?:ing)?|tr(?=_|\d|$)",
    "val": r"val(?:id(?:ation)?)?|dev(?:elopment)?|eval",
    "filler": r"images?|imgs?|pics?|pictures?|data(?:sets?)?|sets?|files?|folder|class|label|art(?:s|works?)?"
              r"|faces?|samples?|crop(?:ped)?|resized|sequences|scenes?|and|or|vs|versus|by|of|the|made"
              r"|created|content|is|was|all|png|jpe?g",
    "gap": r"[\d_]+",
}  # fmt: skip
_TOKEN = re.compile("|".join(f"(?P<{name}>{words})" for name, words in _WORDS.items()))
_MEANS = {"no_fake": schema.REAL, "sure_real": schema.REAL, "pair_real": schema.REAL,
          "no_real": schema.FAKE, "sure_fake": schema.FAKE, "pair_fake": schema.FAKE}  # fmt: skip
_SURE = {kind: re.compile(_WORDS[f"sure_{kind}"]) for kind in ("real", "fake")}
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
#: Names of generators, as far as they are needed to take an unknown folder beside `real` for one.
GENERATOR_NAMES = re.compile(
    r"(?:stable_?diffusion|sdxl|sd_?[v\d]|sd_|flux|midjourney|dall_?e|imagen|firefly|glide|adm|i?ddpm|pndm"
    r"|ldm|latent|vq|wukong|pixart|kandinsky|playground|deepfloyd|cogview|hunyuan|ideogram|recraft|gpt"
    r"|face_?swap|face2face|neural_?textures|deep_?fakes?|\w*gan\d?(?:_|$))"
)

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
_PHOTO_SETS = {"mscoco", "coco", "raise", "raise_1k", "raise1k"}  # reals of DRCT-2M and of Synthbuster

TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".ndjson")
# Endings of what is no image for sure, so that a million of them need not be opened to find out.
_NO_IMAGES = {*TABLES, ".txt", ".json", ".md", ".html", ".xml", ".yaml", ".yml", ".py", ".ipynb",
              ".npy", ".npz", ".pt", ".pth", ".zip", ".tar", ".gz", ".7z", ".rar", ".mp4", ".mov", ".avi",
              ".webm", ".pdf", ".svg", ".log", ".db", ".ini"}  # fmt: skip
_CAPTION_KEYS = ("caption", "prompt", "text")


class Name(NamedTuple):
    """What a name says: label (0, 1, None), how surely (2 sure, 1 paired, 0 contained), split, number."""

    label: int | None
    sure: int
    split: str | None
    number: str | None


@lru_cache(maxsize=100_000)
def read_name(text: str) -> Name:
    """Read one folder's or column's name, or one value of a label column.

    >>> read_name("training_real"), read_name("AiArtData").label, read_name("unreal_engine").label
    (Name(label=0, sure=2, split='train', number=None), 1, None)
    """
    name = normalise(text)
    tokens = list(_TOKEN.finditer(name))
    if "".join(m[0] for m in tokens) != name:  # other words too: only a sure word that stands by itself
        words = name.split("_")
        found = {i for i, kind in enumerate(("real", "fake")) if any(map(_SURE[kind].fullmatch, words))}
        return Name(found.pop() if len(found) == 1 else None, 0, None, None)
    kinds = {m.lastgroup for m in tokens}
    labels = {label for kind, label in _MEANS.items() if kind in kinds}
    splits = kinds & set(schema.SPLITS)
    digits = name.strip("_") if kinds == {"gap"} else "".join(m[0] for m in tokens if m.lastgroup == "gap")
    number = digits.strip("_") if kinds <= {"gap", "filler"} else None
    sure = 2 if any(str(kind).startswith(("sure", "no")) for kind in kinds) else 1
    label = labels.pop() if len(labels) == 1 else None
    return Name(label, sure, splits.pop() if len(splits) == 1 else None, number)


def normalise(text: object) -> str:
    """Small letters, words joined by underscores: ``RealArt`` and ``real-art`` are ``real_art``."""
    return re.sub(r"[\W_]+", "_", _CAMEL.sub("_", str(text).strip())).casefold().strip("_")


# ---- looking


@dataclass
class Scan:
    """What lies below a folder.

    Attributes
    ----------
    root : Path
    folders : dict
        Folder (see `Parts`) -> sorted names of its images.
    captions : dict
        Folder -> names, less the ending, of images with a text of the same name beside; and the ending.
    metadata : list of Path
        ``metadata.csv`` or ``.jsonl`` files as the ImageFolder layout of ``datasets`` has them.
    tables : list of Path
        Other tables, at the top and in ``data/``.
    left_out, by_content : Counter
        Files that are no images, and images taken although their name does not say so, by ending.
    unreadable : list of str
        Folders and files that could not be looked into.
    hidden, links_back : int
        Hidden files and folders, and links that lead back to where they lie; both are skipped.
    """

    root: Path
    folders: dict[Parts, list[str]] = field(default_factory=dict)
    captions: dict[Parts, dict[str, str]] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    by_content: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    hidden: int = 0
    links_back: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.folders.values()))

    def counts(self) -> dict[str, object]:
        """Give what was not taken, for the report."""
        counted = {name: dict(getattr(self, name).most_common()) for name in ("left_out", "by_content")}
        rest = {"unreadable": self.unreadable, "hidden": self.hidden, "links_back": self.links_back}
        return {**counted, **rest}

    def require_images(self) -> None:
        """Raise an `InputError` that says what is there if there is no image."""
        if not self.folders:
            there = ", ".join(f"{n:,} {e}" for e, n in self.left_out.most_common(5)) or "nothing"
            shut = f"; cannot look into {', '.join(self.unreadable[:3])}" if self.unreadable else ""
            raise InputError(
                f"no image below {self.root}: looked for {' '.join(EXTENSIONS)}; found {there}{shut}. "
                "Check the folder, or give a CSV or Parquet table"
            )


def scan(root: Path) -> Scan:
    """List the images below a folder, by ending or else by their first bytes; links are followed.

    A folder that several links lead to (reals shared by several sets) is listed under each of them.
    """
    found = Scan(root)

    def shut(error: OSError) -> None:
        found.unreadable.append(printable(error.filename))

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=shut):
        here = Path(folder)
        if _leads_back(here, root):
            found.links_back += 1
            subfolders.clear()
            continue
        visible = sorted(d for d in subfolders if not d.startswith(".") and d != "__MACOSX")
        found.hidden += len(subfolders) - len(visible)
        subfolders[:] = visible
        _scan_files(found, here, here.relative_to(root).parts, sorted(files))
    inside = {normalise(parts[0]) for parts in found.folders if parts}
    # img2dataset keeps the table 00000.parquet beside the folder 00000
    found.tables = [t for t in found.tables if t.suffix != ".parquet" or normalise(t.stem) not in inside]
    return found


def _scan_files(found: Scan, here: Path, parts: Parts, files: list[str]) -> None:
    images: list[str] = []
    texts: dict[str, str] = {}
    for name in files:
        stem, ending = os.path.splitext(name)
        ending = ending.lower()
        if name.startswith("."):
            found.hidden += name != ".DS_Store"
        elif ending in EXTENSIONS:
            images.append(name)
        elif ending in _NO_IMAGES or not (looks := _sniff(found, here / name)):
            if ending in (".txt", ".json"):
                texts[stem] = min(ending, texts.get(stem, ending), key=(".txt", ".json").index)
            if stem == "metadata" and ending in TABLES:
                found.metadata.append(here / name)
            elif ending in TABLES and parts in ((), ("data",)):
                found.tables.append(here / name)
            found.left_out[ending or "(no ending)"] += 1
        elif looks:
            images.append(name)
            found.by_content[ending or "(no ending)"] += 1
    if images:
        found.folders[parts] = images
        beside = {stem: texts[stem] for stem in (os.path.splitext(n)[0] for n in images) if stem in texts}
        if beside:
            found.captions[parts] = beside
            found.left_out.subtract(beside.values())
            found.left_out = +found.left_out


def _sniff(found: Scan, path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return looks_like_image(file.read(64))
    except OSError:
        found.unreadable.append(printable(path))
        return False


def _leads_back(folder: Path, root: Path) -> bool:
    """Whether a folder is a link to one that it lies in itself: to follow it would never end."""
    if folder == root or not folder.is_symlink():
        return False
    target = folder.resolve()
    above = folder.parents[: len(folder.relative_to(root).parts)]
    return any(parent.resolve().is_relative_to(target) for parent in above)


def read_captions(found: Scan) -> dict[str, str]:
    """Captions from texts beside the images (img2dataset and trainers keep them so): path -> caption."""
    captions = {}
    for parts, beside in found.captions.items():
        here = found.root.joinpath(*parts)
        for name in found.folders[parts]:
            stem = os.path.splitext(name)[0]
            if stem not in beside:
                continue
            with contextlib.suppress(OSError, ValueError):
                text = (here / (stem + beside[stem])).read_text("utf-8", "replace")[:10_000]
                if beside[stem] == ".json":
                    kept = json.loads(text)
                    text = next((kept[k] for k in _CAPTION_KEYS if isinstance(kept.get(k), str)), "")
                captions[str(here / name)] = " ".join(text.split())
    return captions


# ---- labels and splits of folders


class Tree:
    """The folders of a scan, with their labels and splits."""

    def __init__(self, found: Scan) -> None:
        self.root, self.found = found.root, found
        self.children: dict[Parts, set[str]] = defaultdict(set)
        for parts in found.folders:
            for i, name in enumerate(parts):
                self.children[parts[:i]].add(name)
        self.splits = {parts: self._split(parts) for parts in found.folders}

    @cached_property
    def labels(self) -> dict[Parts, tuple[int, int]]:
        """Of each folder with a label: which component says it, and the label."""
        found = {parts: at for parts in self.found.folders if (at := self._label(parts)) is not None}
        if not found:  # folders 0 and 1, if there are these two and no other
            for parts in self.found.folders:
                for i in range(len(parts)):
                    numbers = {name: read_name(name).number for name in self.children[parts[:i]]}
                    if sorted(numbers.values(), key=str) == ["0", "1"]:
                        found.setdefault(parts, (i, int(numbers[parts[i]] or 0)))
        return found

    def _beside(self, parts: Parts, i: int, label: int) -> bool:
        """Whether the other label's word stands beside a component."""
        return any(read_name(n).label == 1 - label for n in self.children[parts[:i]])

    def _counts(self, parts: Parts, i: int) -> bool:
        name = read_name(parts[i])
        if name.label is None or name.sure == 2 or normalise(parts[i]) in _CONTAINERS:
            return name.label is not None and name.sure == 2
        return (name.sure == 1 and (1 - name.label) in self._words) or self._beside(parts, i, name.label)

    @cached_property
    def _words(self) -> set[int | None]:
        """Labels that some whole name of the tree has."""
        names = {name for children in self.children.values() for name in children}
        return {read_name(name).label for name in names if read_name(name).sure}

    def _label(self, parts: Parts) -> tuple[int, int] | None:
        at = [(i, int(read_name(name).label or 0)) for i, name in enumerate(parts) if self._counts(parts, i)]
        # photos/fake beside photos/real, gan/fake beside gan/real: the one with its opposite beside it counts
        at = [(i, label) for i, label in at if self._beside(parts, i, label)] or at
        if len({label for _, label in at}) > 1:
            names = ", ".join(parts[i] for i, _ in at)
            raise InputError(
                f"{self.root}: '{'/'.join(parts)}' has label folders of both classes ({names}). Move the "
                "images, choose another layout= or give a table"
            )
        return at[0] if at else None

    def _split(self, parts: Parts) -> str | None:
        """Split from the folders; `train` beside `car` and `dog` is a class of pictures, no split."""
        splits: dict[str, str] = {}
        for i, name in enumerate(parts):
            split = read_name(name).split
            beside = [read_name(n).split is not None for n in self.children[parts[:i]]]
            if split and (all(beside) if splits else 2 * sum(beside) >= len(beside)):
                splits[split] = name
        if len(splits) > 1:
            raise InputError(
                f"{self.root}: '{'/'.join(parts)}' lies under folders of several splits: "
                f"{', '.join(sorted(splits))}. Rename one of them or give a table"
            )
        return next(iter(splits), None)

    def used(self) -> dict[str, int]:
        """Label folders by name, with their numbers of images."""
        names: Counter[str] = Counter()
        for parts, (i, _) in self.labels.items():
            names[parts[i]] += len(self.found.folders[parts])
        return dict(names.most_common())


# ---- layouts: what label, generator and source each folder's images have

Facts = tuple[int | None, str, str]  # label, generator, source


def _name_genimage(root: Path, before: Parts, _: Parts) -> tuple[str, str]:
    names = _names((root.parent.name, root.name, *before))
    wrapped = [m[1].lower() for m in map(_GENIMAGE_DOWNLOAD.fullmatch, names) if m]
    name = _GENIMAGE_NAMES.get(wrapped[-1], wrapped[-1]) if wrapped else (["unknown"] + names)[-1]
    return name, name


def _name_forensynths(root: Path, before: Parts, _: Parts) -> tuple[str, str]:
    chain = (root.name, *before)
    known = [p for p in chain if normalise(p) in _CLASS_LEVEL]
    splits = [i for i, p in enumerate(chain) if read_name(p).split]
    after_split = _names(chain[splits[0] + 1 :]) if splits else []
    name = (known or after_split[:1] or _names(chain) or ["unknown"])[-1]
    return name, name


def _name_plain(root: Path, before: Parts, after: Parts) -> tuple[str, str]:
    outer, inner = _names(before), _names(after)
    made = [name for name in outer if read_name(name).label != schema.REAL]  # photos/fake: not by "photos"
    return (inner[:1] or made[-1:] or ["unknown"])[0], (outer[-1:] or [root.name])[0]


def _names(parts: Iterable[str]) -> list[str]:
    """Names that may be those of generators or sources: no splits, no mere numbers."""
    return [p for p in parts if not (read_name(p).split or normalise(p) in _CONTAINERS or p.isdigit())]


def _by_label(namer: Callable, words: tuple[str, ...] = ()) -> Callable[[Tree], dict[Parts, Facts]]:
    """Build a reader of trees whose label is one folder, named by `words` (real, fake) if they are given.

    `namer` finds generator and source around it.
    """

    def reader(tree: Tree) -> dict[Parts, Facts]:
        facts: dict[Parts, Facts] = {}
        for parts in tree.found.folders:
            at = tree.labels.get(parts)
            if words:
                names = [normalise(p) for p in parts]
                at = next(((i, words.index(n)) for i, n in enumerate(names) if n in words), None)
            if at is None:
                raise InputError(
                    f"{tree.root}: '{'/'.join(parts) or '.'}' has no label folder. Each path needs one of "
                    f"{', '.join(words) or 'real, fake or their likes'}; move it, choose another layout= or "
                    "give a table"
                )
            name, source = namer(tree.root, parts[: at[0]], parts[at[0] + 1 :])
            if namer is _name_plain and name == "unknown" and read_name(parts[at[0]]).sure == 0:
                name = parts[at[0]]  # fake_sdxl: its name may well say which
            facts[parts] = (at[1], name, source)
        return facts

    return reader


_FORENSYNTHS = _by_label(_name_forensynths, ("0_real", "1_fake"))


def _forensynths(tree: Tree) -> dict[Parts, Facts]:
    facts = _FORENSYNTHS(tree)
    reals = {source for label, _, source in facts.values() if label == schema.REAL}
    for parts, (label, name, source) in facts.items():
        if source not in reals:  # UniversalFakeDetect: several diffusion sets share the reals of another
            shared = "imagenet" if name == "guided" else "laion"
            facts[parts] = (label, name, shared if shared in reals else source)
    return facts


def _generators(tree: Tree) -> dict[Parts, Facts]:
    """`real` beside one folder per generator, at any depth (DiffusionForensics)."""
    facts: dict[Parts, Facts] = {}
    for parts in tree.found.folders:
        depth = _beside_real(tree, parts)
        if depth is None:
            raise InputError(
                f"{tree.root}: '{'/'.join(parts) or '.'}' lies beside no folder 'real'. Expected real and "
                "one folder per generator side by side; move it or give a table"
            )
        label = schema.REAL if read_name(parts[depth]).label == schema.REAL else schema.FAKE
        facts[parts] = (label, parts[depth], (_names(parts[:depth])[-1:] or [tree.root.name])[0])
    return facts


def _beside_real(tree: Tree, parts: Parts) -> int | None:
    """Deepest component that stands beside a folder `real` (or is it)."""
    depths = range(len(parts) - 1, -1, -1)
    return next((i for i in depths if "real" in map(normalise, tree.children[parts[:i]])), None)


def _two_roots(tree: Tree, source: str | None = None) -> dict[Parts, Facts]:
    """Fakes, one folder per generator (DRCT-2M, Synthbuster); a folder named after a photo set is real."""
    facts: dict[Parts, Facts] = {}
    for parts in tree.found.folders:
        names = _names(parts) or [tree.root.name]
        photos = [n for n in names if normalise(n) in _PHOTO_SETS]
        fake = (schema.FAKE, names[-1], source or tree.root.name)
        facts[parts] = (schema.REAL, "", photos[0]) if photos else fake
    return facts


def _unlabelled(tree: Tree) -> dict[Parts, Facts]:
    return dict.fromkeys(tree.found.folders, (None, "unknown", tree.root.name))


FOLDER_LAYOUTS: dict[str, Callable[..., dict[Parts, Facts]]] = {
    "folder": _by_label(_name_plain),
    "genimage": _by_label(_name_genimage, ("nature", "ai")),
    **dict.fromkeys(("forensynths", "ufd", "cnndetection", "aigibench", "fatformer"), _forensynths),
    **dict.fromkeys(("generators", "diffusionforensics"), _generators),
    **dict.fromkeys(("two_roots", "drct", "synthbuster"), _two_roots),
    "unlabelled": _unlabelled,
}


def read_folder(found: Scan, layout: str, real_root: Path | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a folder tree in one of :data:`FOLDER_LAYOUTS`; ``auto`` decides from the folder names.

    Parameters
    ----------
    found : Scan
        Of the folder of all images, or of the fakes when `real_root` is given.
    layout : str
    real_root : Path, optional
        Folder of the photographs, for sets that keep them apart.

    Returns
    -------
    table : DataFrame
        Raw rows ``path, label, generator, source, split, caption``, sorted by path.
    report : dict
        ``layout``, ``labels`` (where they come from) and ``notes``.
    """
    found.require_images()
    tree = Tree(found)
    notes: list[str] = []
    if layout == "auto":
        layout, facts = _detect(tree, real_root, notes)
    elif FOLDER_LAYOUTS[layout] is _two_roots:
        facts = _two_roots(tree, real_root.name if real_root else None)
    elif real_root is None:
        facts = FOLDER_LAYOUTS[layout](tree)
    else:
        raise InputError(
            f"layout {layout!r} has its photographs in the same tree, but real_root='{real_root}' was given "
            "too; leave real_root out, or pass layout='two_roots'"
        )
    tables = [_rows(tree, facts)]
    none = "none: no folder is named after real or fake, so the images are read without labels"
    labels = none if layout == "unlabelled" else f"the folders, as layout {layout!r} has them"
    if used := tree.used() if FOLDER_LAYOUTS[layout] not in (_two_roots, _unlabelled) else {}:
        labels = "folders " + ", ".join(f"{printable(name)} ({n:,})" for name, n in list(used.items())[:8])
        if set(used) == {"0", "1"}:
            notes.append("folders 0 and 1 are read as 0 = real and 1 = fake; give a table if it is otherwise")
    if real_root is not None:
        photos = scan(real_root)
        photos.require_images()
        for name in ("left_out", "by_content"):
            getattr(found, name).update(getattr(photos, name))
        found.unreadable += photos.unreadable
        facts = dict.fromkeys(photos.folders, (schema.REAL, "", real_root.name))
        tables.append(_rows(Tree(photos), facts))
        labels = f"all of {found.root.name} fake, all of {real_root.name} real"
    return pd.concat(tables, ignore_index=True), {"layout": layout, "labels": labels, "notes": notes}


def _rows(tree: Tree, facts: dict[Parts, Facts]) -> pd.DataFrame:
    """One row per image from the facts of its folder."""
    folders = tree.found.folders
    sizes = [len(folders[parts]) for parts in facts]
    paths = [os.path.join(tree.root, *parts, name) for parts in facts for name in folders[parts]]
    columns: list[Any] = [paths]
    for values in (*zip(*facts.values(), strict=True), [tree.splits[parts] for parts in facts]):
        columns.append(np.repeat(np.array(values, dtype=object), sizes))
    names = (schema.PATH, schema.LABEL, schema.GENERATOR, schema.SOURCE, schema.SPLIT)
    table = pd.DataFrame(dict(zip(names, columns, strict=True)))
    captions = read_captions(tree.found)
    table[schema.CAPTION] = table[schema.PATH].map(captions).astype(object)
    order = np.argsort(table[schema.PATH].str.replace(os.sep, "\0").to_numpy(dtype=object), kind="stable")
    return table.iloc[order].reset_index(drop=True)


def _detect(tree: Tree, real_root: Path | None, notes: list[str]) -> tuple[str, dict[Parts, Facts]]:
    """Find the layout of a tree from its folder names; several answers are an error, never a choice."""
    root, used = tree.root, tree.used()
    what = ", ".join(f"{name} ({count(n, 'image')})" for name, n in used.items())
    if real_root is not None:
        if used:
            raise InputError(
                f"{root} holds label folders of its own: {what}; but real_root='{real_root}' was given too. "
                "Pass layout='two_roots' to take all of the first as fake, or leave real_root out"
            )
        return "two_roots", _two_roots(tree, real_root.name)
    if not used:
        layout = _detect_unlabelled(tree)
        return layout, FOLDER_LAYOUTS[layout](tree)
    loose = [parts for parts in tree.found.folders if parts not in tree.labels]
    if not loose:
        names = set(map(normalise, used))
        known = {"genimage": {"ai", "nature"}, "forensynths": {"0_real", "1_fake"}}
        layout = next((name for name, words in known.items() if names <= words), "folder")
        return layout, FOLDER_LAYOUTS[layout](tree)
    n = sum(len(tree.found.folders[parts]) for parts in loose)
    both = {label for _, label in tree.labels.values()} == {schema.REAL, schema.FAKE}
    if both and all(tree.splits[parts] == "test" for parts in loose):  # as contests hand them out
        notes.append(f"{count(n, 'image')} of split 'test' lie under no label folder: read without a label")
        facts = dict.fromkeys(loose, (None, "unknown", root.name))
        labelled = Tree(Scan(root, {p: f for p, f in tree.found.folders.items() if p not in facts}))
        return "folder", {**FOLDER_LAYOUTS["folder"](labelled), **facts}
    depths = {parts: _beside_real(tree, parts) for parts in tree.found.folders}
    if all(depth is not None for depth in depths.values()):
        bases = {normalise((*parts[:d],)[-1] if d else root.name) for parts, d in depths.items()}
        beside = {parts[depths[parts] or 0] for parts in loose}
        if bases <= _DIFFUSION_FORENSICS:
            return "diffusionforensics", _generators(tree)
        if all(GENERATOR_NAMES.match(normalise(name)) for name in beside):
            notes.append(f"folders beside 'real' are read as generators: {', '.join(sorted(beside)[:8])}")
            return "generators", _generators(tree)
        raise InputError(
            f"{root}: beside 'real' there are {', '.join(sorted(beside)[:8])}, which are no label names. "
            "If they are generators, pass layout='generators'"
        )
    first = "/".join((*loose[0], tree.found.folders[loose[0]][0]))
    raise InputError(
        f"{root}: {sum(used.values()):,} images lie under {', '.join(used)} and {n:,} under no label folder "
        f"(first: {first}). Move them, or give a table"
    )


def _detect_unlabelled(tree: Tree) -> str:
    root = tree.root
    if all(_SYNTHBUSTER_FILE.fullmatch(name) for names in tree.found.folders.values() for name in names):
        return "synthbuster"
    names = {normalise(p) for parts in tree.found.folders for p in parts}
    names |= {normalise(root.name), normalise(root.parent.name)}
    if names & {"train2017", "val2017"}:
        if any(name.startswith("drct") for name in names):
            return "drct"
        raise InputError(
            f"{root} has train2017/val2017, as both DRCT-2M (fakes) and MSCOCO (photographs) do. Pass "
            "layout='drct' with real_root= the MSCOCO folder, or layout='unlabelled'"
        )
    if tree.found.tables:
        tables = ", ".join(t.name for t in tree.found.tables[:5])
        raise InputError(
            f"{root} has no label folders but holds {tables}: read that table instead, or pass "
            "layout='unlabelled'"
        )
    return "unlabelled"
