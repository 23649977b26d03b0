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
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

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


class Tree:
    """What lies below a folder, and the labels and splits that the folders' names say.

    Images are known by their ending or else by their first bytes. Links are followed: a folder that several
    lead to (reals shared by several sets) is listed under each of them.

    Attributes
    ----------
    folders : dict
        Folder (see `Parts`) -> sorted names of its images.
    children : dict
        Folder -> names of the folders in it.
    captions : dict
        Path of an image -> path of the text or JSON file of the same name beside it.
    metadata, tables : list of Path
        Files ``metadata.csv`` or ``.jsonl`` of an ImageFolder; other tables, at the top and in ``data/``.
    skipped : dict
        Numbers of files by ending that are no images (``left_out``) or are some although their name does not
        say so (``by_content``); folders and files that are ``unreadable``; numbers of ``hidden`` ones and of
        links that lead back to where they lie (``links_back``).
    reals : str or None
        Name of a second tree, which has the photographs.
    """

    def __init__(self, root: Path, reals: str | None = None) -> None:
        self.root, self.reals = root, reals
        self.folders: dict[Parts, list[str]] = {}
        self.children: dict[Parts, set[str]] = defaultdict(set)
        self.captions: dict[str, str] = {}
        self.metadata: list[Path] = []
        self.tables: list[Path] = []
        self.skipped: dict[str, Any] = {"left_out": Counter(), "by_content": Counter(), "unreadable": [],
                                        "hidden": 0, "links_back": 0}  # fmt: skip
        for folder, subfolders, files in os.walk(root, followlinks=True, onerror=self._shut):
            if _leads_back(Path(folder), root):
                self.skipped["links_back"] += 1
                subfolders.clear()
                continue
            visible = sorted(d for d in subfolders if not d.startswith(".") and d != "__MACOSX")
            self.skipped["hidden"] += len(subfolders) - len(visible)
            subfolders[:] = visible
            self._add(Path(folder), sorted(files))
        # img2dataset keeps the table 00000.parquet beside the folder 00000
        inside = set(map(normalise, self.children[()]))
        self.tables = [t for t in self.tables if t.suffix != ".parquet" or normalise(t.stem) not in inside]

    def _shut(self, error: OSError) -> None:
        self.skipped["unreadable"].append(printable(error.filename))

    def _add(self, here: Path, files: list[str]) -> None:
        parts = here.relative_to(self.root).parts
        images: list[str] = []
        others: dict[str, str] = {}  # name -> ending
        texts: dict[str, str] = {}  # stem -> name; of two the .txt, which comes last
        for name in files:
            stem, ending = os.path.splitext(name)
            ending = ending.lower()
            if name.startswith("."):
                self.skipped["hidden"] += name != ".DS_Store"
            elif ending in EXTENSIONS:
                images.append(name)
            elif ending not in _NO_IMAGES and self._sniff(here / name):
                images.append(name)
                self.skipped["by_content"][ending or "(no ending)"] += 1
            else:
                others[name] = ending or "(no ending)"
                if ending in (".json", ".txt"):
                    texts[stem] = name
                elif ending in TABLES and stem == "metadata":
                    self.metadata.append(here / name)
                elif ending in TABLES and parts in ((), ("data",)):
                    self.tables.append(here / name)
        for name in images:
            if text := texts.get(os.path.splitext(name)[0]):
                self.captions[str(here / name)] = str(here / text)
                others.pop(text, None)
        self.skipped["left_out"].update(others.values())
        if images:
            self.folders[parts] = images
            for i, part in enumerate(parts):
                self.children[parts[:i]].add(part)

    def _sniff(self, path: Path) -> bool:
        if not path.is_file():
            return False
        try:
            with path.open("rb") as file:
                return looks_like_image(file.read(64))
        except OSError as error:
            self._shut(error)
            return False

    def require_images(self) -> None:
        """Raise an `InputError` that says what is there if there is no image."""
        if not self.folders:
            left_out, unreadable = self.skipped["left_out"], self.skipped["unreadable"]
            there = ", ".join(f"{n:,} {e}" for e, n in left_out.most_common(5)) or "nothing"
            shut = f"; cannot look into {', '.join(unreadable[:3])}" if unreadable else ""
            raise InputError(
                f"no image below {self.root}: looked for {' '.join(EXTENSIONS)}; found {there}{shut}. "
                "Check the folder, or give a CSV or Parquet table"
            )

    @cached_property
    def labels(self) -> dict[Parts, tuple[int, int]]:
        """Folder with a label -> which of its parts says it, and the label."""
        names = map(read_name, set().union(*self.children.values()))
        words = {name.label for name in names if name.sure}
        found = {parts: at for parts in self.folders if (at := self._label(parts, words)) is not None}
        if not found:  # folders 0 and 1, if there are these two and no other
            for parts in self.folders:
                for i, part in enumerate(parts):
                    numbers = {name: read_name(name).number for name in self.children[parts[:i]]}
                    if sorted(numbers.values(), key=str) == ["0", "1"]:
                        found.setdefault(parts, (i, int(numbers[part] or 0)))
        return found

    def _label(self, parts: Parts, words: set[int | None]) -> tuple[int, int] | None:
        """Part that says the label; `words` are the labels that whole names of the tree have."""
        paired, single = [], []  # photos/fake beside photos/real: the part with its opposite beside it counts
        for i, part in enumerate(parts):
            name = read_name(part)
            if name.label is None or (name.sure < 2 and normalise(part) in _CONTAINERS):
                continue
            if any(read_name(n).label == 1 - name.label for n in self.children[parts[:i]]):
                paired.append((i, name.label))
            elif name.sure == 2 or (name.sure == 1 and 1 - name.label in words):
                single.append((i, name.label))
        at = paired or single
        if len({label for _, label in at}) > 1:
            names = ", ".join(parts[i] for i, _ in at)
            raise InputError(
                f"{self.root}: '{'/'.join(parts)}' has label folders of both classes ({names}). Move the "
                "images, choose another layout= or give a table"
            )
        return at[0] if at else None

    def split(self, parts: Parts) -> str | None:
        """Split of a folder; `train` beside `car` and `dog` is a class of pictures, no split."""
        splits: dict[str, str] = {}
        for i, part in enumerate(parts):
            name = read_name(part).split
            beside = [read_name(n).split is not None for n in self.children[parts[:i]]]
            if name and (all(beside) if splits else 2 * sum(beside) >= len(beside)):
                splits[name] = part
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
            names[parts[i]] += len(self.folders[parts])
        return dict(names.most_common())

    @cached_property
    def contest(self) -> list[Parts]:
        """Test images as contests hand them out: under no label folder, the others being of both classes."""
        loose = [parts for parts in self.folders if parts not in self.labels]
        both = {label for _, label in self.labels.values()} == {schema.REAL, schema.FAKE}
        return loose if both and all(self.split(parts) == "test" for parts in loose) else []

    def beside_real(self, parts: Parts) -> int | None:
        """Deepest part that stands beside a folder `real` (or is it)."""
        depths = range(len(parts) - 1, -1, -1)
        return next((i for i in depths if "real" in map(normalise, self.children[parts[:i]])), None)


def _leads_back(folder: Path, root: Path) -> bool:
    """Whether a folder is a link to one that it lies in itself: to follow it would never end."""
    if folder == root or not folder.is_symlink():
        return False
    target = folder.resolve()
    above = folder.parents[: len(folder.relative_to(root).parts)]
    return any(parent.resolve().is_relative_to(target) for parent in above)


# ---- layouts: what label, generator and source each folder's images have

Facts = dict[Parts, tuple[int | None, str, str]]


def _by_label(tree: Tree, namer: Callable[..., tuple[str, str]], words: tuple[str, ...] = ()) -> Facts:
    """Trees whose label is one folder, named by `words` (real, fake) or else by any word for them.

    `namer` finds generator and source from the root, the parts above the label, the label and those below.
    """
    facts: Facts = {}
    for parts in tree.folders:
        if words:
            names = [normalise(p) for p in parts]
            at = next(((i, words.index(n)) for i, n in enumerate(names) if n in words), None)
        else:
            at = tree.labels.get(parts)
        if at is not None:
            i, label = at
            facts[parts] = (label, *namer(tree.root, parts[:i], parts[i], parts[i + 1 :]))
        elif not words and parts in tree.contest:
            facts[parts] = (None, "unknown", tree.root.name)
        else:
            raise InputError(
                f"{tree.root}: '{'/'.join(parts) or '.'}' has no label folder. Each path needs one of "
                f"{', '.join(words) or 'real, fake or their likes'}; move it, choose another layout= or "
                "give a table"
            )
    return facts


def _names(parts: Iterable[str]) -> list[str]:
    """Names that may be those of generators or sources: no splits, no mere numbers."""
    return [p for p in parts if not (read_name(p).split or normalise(p) in _CONTAINERS or p.isdigit())]


def _name_plain(root: Path, before: Parts, own: str, after: Parts) -> tuple[str, str]:
    outer, inner = _names(before), _names(after)
    made = [name for name in outer if read_name(name).label != schema.REAL]  # photos/fake: not by "photos"
    may_say = [] if read_name(own).sure else [own]  # fake_sdxl
    return (inner[:1] or made[-1:] or may_say or ["unknown"])[0], (outer[-1:] or [root.name])[0]


def _name_genimage(root: Path, before: Parts, *_: object) -> tuple[str, str]:
    names = _names((root.parent.name, root.name, *before))
    wrapped = [m[1].lower() for m in map(_GENIMAGE_DOWNLOAD.fullmatch, names) if m]
    name = _GENIMAGE_NAMES.get(wrapped[-1], wrapped[-1]) if wrapped else (["unknown"] + names)[-1]
    return name, name


def _name_forensynths(root: Path, before: Parts, *_: object) -> tuple[str, str]:
    chain = (root.name, *before)
    known = [p for p in chain if normalise(p) in _CLASS_LEVEL]
    splits = [i for i, p in enumerate(chain) if read_name(p).split]
    after_split = _names(chain[splits[0] + 1 :]) if splits else []
    name = (known or after_split[:1] or _names(chain) or ["unknown"])[-1]
    return name, name


def _forensynths(tree: Tree) -> Facts:
    facts = _by_label(tree, _name_forensynths, ("0_real", "1_fake"))
    reals = {source for label, _, source in facts.values() if label == schema.REAL}
    for parts, (label, name, source) in facts.items():
        if source not in reals:  # UniversalFakeDetect: several diffusion sets share the reals of another
            shared = "imagenet" if name == "guided" else "laion"
            facts[parts] = (label, name, shared if shared in reals else source)
    return facts


def _generators(tree: Tree) -> Facts:
    """`real` beside one folder per generator, at any depth (DiffusionForensics)."""
    facts: Facts = {}
    for parts in tree.folders:
        depth = tree.beside_real(parts)
        if depth is None:
            raise InputError(
                f"{tree.root}: '{'/'.join(parts) or '.'}' lies beside no folder 'real'. Expected real and "
                "one folder per generator side by side; move it or give a table"
            )
        label = schema.REAL if read_name(parts[depth]).label == schema.REAL else schema.FAKE
        facts[parts] = (label, parts[depth], (_names(parts[:depth])[-1:] or [tree.root.name])[0])
    return facts


def _two_roots(tree: Tree) -> Facts:
    """Fakes, one folder per generator (DRCT-2M, Synthbuster); a folder named after a photo set is real."""
    facts: Facts = {}
    for parts in tree.folders:
        names = _names(parts) or [tree.root.name]
        photos = [n for n in names if normalise(n) in _PHOTO_SETS]
        fake = (schema.FAKE, names[-1], tree.reals or tree.root.name)
        facts[parts] = (schema.REAL, "", photos[0]) if photos else fake
    return facts


def _unlabelled(tree: Tree) -> Facts:
    return dict.fromkeys(tree.folders, (None, "unknown", tree.root.name))


FOLDER_LAYOUTS: dict[str, Callable[[Tree], Facts]] = {
    "folder": partial(_by_label, namer=_name_plain),
    "genimage": partial(_by_label, namer=_name_genimage, words=("nature", "ai")),
    **dict.fromkeys(("forensynths", "ufd", "cnndetection", "aigibench", "fatformer"), _forensynths),
    **dict.fromkeys(("generators", "diffusionforensics"), _generators),
    **dict.fromkeys(("two_roots", "drct", "synthbuster"), _two_roots),
    "unlabelled": _unlabelled,
}


def read_folder(tree: Tree, layout: str, real_root: Path | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a folder tree in one of :data:`FOLDER_LAYOUTS`; ``auto`` decides from the folder names.

    Parameters
    ----------
    tree : Tree
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

    Raises
    ------
    InputError
        No image; folder names that leave the layout, a label or a split open.
    """
    tree.require_images()
    notes: list[str] = []
    by_words = layout in ("auto", "folder")
    if layout == "auto":
        layout = _detect(tree, real_root, notes)
    reader = FOLDER_LAYOUTS[layout]
    if real_root is not None and reader is not _two_roots:
        raise InputError(
            f"layout {layout!r} has its photographs in the same tree, but real_root='{real_root}' was given "
            "too; leave real_root out, or pass layout='two_roots'"
        )
    tables = [_rows(tree, reader(tree))]
    labels = f"the folders, as layout {layout!r} has them"
    if reader is _unlabelled:
        labels = "none: no folder is named after real or fake, so the images are read without labels"
    elif real_root is not None:
        photos = Tree(real_root)
        photos.require_images()
        for key, value in photos.skipped.items():
            tree.skipped[key] += value
        tables.append(_rows(photos, dict.fromkeys(photos.folders, (schema.REAL, "", real_root.name))))
        labels = f"all of {tree.root.name} fake, all of {real_root.name} real"
    elif by_words and (used := tree.used()):
        labels = "folders " + ", ".join(f"{printable(name)} ({n:,})" for name, n in list(used.items())[:8])
        if set(used) == {"0", "1"}:
            notes.append("folders 0 and 1 are read as 0 = real and 1 = fake; give a table if it is otherwise")
    return pd.concat(tables, ignore_index=True), {"layout": layout, "labels": labels, "notes": notes}


def _rows(tree: Tree, facts: Facts) -> pd.DataFrame:
    """One row per image from the facts of its folder."""
    rows = []
    for parts, fact in facts.items():
        here, split = os.path.join(tree.root, *parts), tree.split(parts)
        rows += [(os.path.join(here, name), *fact, split) for name in tree.folders[parts]]
    names = [schema.PATH, schema.LABEL, schema.GENERATOR, schema.SOURCE, schema.SPLIT]
    table = pd.DataFrame(rows, columns=names, dtype=object)
    table[schema.CAPTION] = [_read_caption(tree.captions.get(path)) for path in table[schema.PATH]]
    # folder by folder: a/z before a.png
    return table.sort_values(schema.PATH, key=lambda p: p.str.replace(os.sep, "\0"), ignore_index=True)


def _read_caption(path: str | None) -> str | None:
    """Caption from a text beside an image (img2dataset and trainers keep them so)."""
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        text = Path(path).read_text("utf-8", "replace")
        if path.lower().endswith(".json"):
            kept = json.loads(text)
            kept = [kept.get(key) for key in _CAPTION_KEYS] if isinstance(kept, dict) else []
            text = next((value for value in kept if isinstance(value, str)), "")
        return " ".join(text[:10_000].split())
    return None


def _detect(tree: Tree, real_root: Path | None, notes: list[str]) -> str:
    """Find the layout of a tree from its folder names; several answers are an error, never a choice."""
    root, used = tree.root, tree.used()
    if real_root is not None:
        if used:
            what = ", ".join(f"{name} ({count(n, 'image')})" for name, n in used.items())
            raise InputError(
                f"{root} holds label folders of its own: {what}; but real_root='{real_root}' was given too. "
                "Pass layout='two_roots' to take all of the first as fake, or leave real_root out"
            )
        return "two_roots"
    if not used:
        return _detect_unlabelled(tree)
    loose = [parts for parts in tree.folders if parts not in tree.labels]
    n = sum(len(tree.folders[parts]) for parts in loose)
    if not loose:
        names = set(map(normalise, used))
        known = {"genimage": {"ai", "nature"}, "forensynths": {"0_real", "1_fake"}}
        return next((name for name, words in known.items() if names <= words), "folder")
    if tree.contest:
        notes.append(f"{count(n, 'image')} of split 'test' lie under no label folder: read without a label")
        return "folder"
    depths = {parts: tree.beside_real(parts) for parts in tree.folders}
    if all(depth is not None for depth in depths.values()):
        bases = {normalise(parts[d - 1] if d else root.name) for parts, d in depths.items()}
        if bases <= _DIFFUSION_FORENSICS:
            return "diffusionforensics"
        beside = sorted({parts[depths[parts] or 0] for parts in loose})
        listed = ", ".join(beside[:8])
        if all(GENERATOR_NAMES.match(normalise(name)) for name in beside):
            notes.append(f"folders beside 'real' are read as generators: {listed}")
            return "generators"
        raise InputError(
            f"{root}: beside 'real' there are {listed}, which are no label names. "
            "If they are generators, pass layout='generators'"
        )
    first = "/".join((*loose[0], tree.folders[loose[0]][0]))
    raise InputError(
        f"{root}: {sum(used.values()):,} images lie under {', '.join(used)} and {n:,} under no label folder "
        f"(first: {first}). Move them, or give a table"
    )


def _detect_unlabelled(tree: Tree) -> str:
    root = tree.root
    if all(_SYNTHBUSTER_FILE.fullmatch(name) for names in tree.folders.values() for name in names):
        return "synthbuster"
    names = {normalise(p) for parts in tree.folders for p in parts}
    names |= {normalise(root.name), normalise(root.parent.name)}
    if names & {"train2017", "val2017"}:
        if any(name.startswith("drct") for name in names):
            return "drct"
        raise InputError(
            f"{root} has train2017/val2017, as both DRCT-2M (fakes) and MSCOCO (photographs) do. Pass "
            "layout='drct' with real_root= the MSCOCO folder, or layout='unlabelled'"
        )
    if tree.tables:
        tables = ", ".join(t.name for t in tree.tables[:5])
        raise InputError(
            f"{root} has no label folders but holds {tables}: read that table instead, or pass "
            "layout='unlabelled'"
        )
    return "unlabelled"
