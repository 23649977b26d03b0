"""How data sets lie on disk: folder trees, read into raw manifest rows.

What a folder's name says (real or fake, train or test, or nothing) is read off tables of words, from whole
names below the given root; a name that merely contains such a word counts only beside its opposite. `source`
names the set whose photographs an image is compared with, so that a reader can pair fakes with their reals.
"""

from __future__ import annotations

import contextlib
import io
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
_CONTAINERS = {"", "images", "image", "img", "imgs", "data", "dataset", "datasets", "diffusion_datasets"}
_CLASS_LEVEL = {"progan", "cyclegan", "stylegan", "stylegan2"}  # ForenSynths sets with one folder per class
_GENIMAGE_DOWNLOAD = re.compile(r"imagenet_(?:ai_\d+_)?(\w+)", re.IGNORECASE)
_GENIMAGE_NAMES = {
    "sdv4": "stable_diffusion_v_1_4", "sdv5": "stable_diffusion_v_1_5", "midjourney": "Midjourney",
    "adm": "ADM", "glide": "glide", "wukong": "wukong", "vqdm": "VQDM", "biggan": "BigGAN",
}  # fmt: skip
_DIFFUSION_FORENSICS = {"lsun_bedroom", "imagenet", "celebahq"}
_PHOTO_SETS = {"mscoco", "coco", "raise", "raise_1k", "raise1k"}  # reals of DRCT-2M and of Synthbuster

TABLES = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".ndjson")
# No images for sure: so that a million texts beside the images need not be opened to find out.
_NO_IMAGES = {*TABLES, ".txt", ".json", ".xml", ".yaml", ".npy", ".npz", ".py"}


class Name(NamedTuple):
    """What a name says: label (0, 1, None), how surely (2 sure, 1 paired, 0 contained), split, number."""

    label: int | None
    sure: int
    split: str | None
    number: str | None


@lru_cache(maxsize=100_000)
def read_name(text: str) -> Name:
    """Read the name of a folder or a column, or one value of a label column."""
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
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[Parts, list[str]] = {}  # folder -> sorted names of its images
        self.children: dict[Parts, set[str]] = defaultdict(set)  # folder -> names of the folders in it
        self.captions: dict[str, str] = {}  # image -> text or JSON file of the same name beside it
        self.metadata: list[Path] = []  # metadata.csv or .jsonl of an ImageFolder
        self.tables: list[Path] = []  # other tables, at the top and in data/
        self.skipped: dict[str, Any] = {"files_left_out": Counter(), "files_taken_by_content": Counter(),
                                        "not_readable": [], "hidden_files": 0,
                                        "links_that_lead_back": 0}  # fmt: skip
        for folder, subfolders, files in os.walk(root, followlinks=True, onerror=self._shut):
            if _leads_back(Path(folder), root):
                self.skipped["links_that_lead_back"] += 1
                subfolders.clear()
                continue
            visible = sorted(d for d in subfolders if not d.startswith(".") and d != "__MACOSX")
            self.skipped["hidden_files"] += len(subfolders) - len(visible)
            subfolders[:] = visible
            self._add(Path(folder), sorted(files))
        # img2dataset keeps the table 00000.parquet beside the folder 00000
        inside = set(map(normalise, self.children[()]))
        self.tables = [t for t in self.tables if t.suffix != ".parquet" or normalise(t.stem) not in inside]

    def _shut(self, error: OSError) -> None:
        self.skipped["not_readable"].append(printable(error.filename))

    def _add(self, here: Path, files: list[str]) -> None:
        parts = here.relative_to(self.root).parts
        images: dict[str, str] = {}  # name -> stem
        others: dict[str, str] = {}  # name -> ending
        for name in files:
            stem, ending = os.path.splitext(name)
            ending = ending.lower() or "(no ending)"
            if name.startswith("."):
                self.skipped["hidden_files"] += name != ".DS_Store"
            elif ending in EXTENSIONS:
                images[name] = stem
            elif ending not in _NO_IMAGES and self._sniff(here / name):
                images[name] = stem
                self.skipped["files_taken_by_content"][ending] += 1
            else:
                others[name] = ending
                if ending in TABLES and (stem == "metadata" or parts in ((), ("data",))):
                    (self.metadata if stem == "metadata" else self.tables).append(here / name)
        # of two the .txt, which comes last
        texts = {os.path.splitext(n)[0]: n for n, ending in others.items() if ending in (".json", ".txt")}
        texts = {name: texts[stem] for name, stem in images.items() if stem in texts}
        self.captions |= {str(here / name): str(here / text) for name, text in texts.items()}
        used = set(texts.values())
        self.skipped["files_left_out"].update(others[name] for name in others if name not in used)
        if images:
            self.folders[parts] = list(images)
            for i, part in enumerate(parts):
                self.children[parts[:i]].add(part)

    def _sniff(self, path: Path) -> bool:
        try:
            with path.open("rb") if path.is_file() else contextlib.nullcontext(io.BytesIO()) as file:
                return looks_like_image(file.read(64))
        except OSError as error:
            self._shut(error)
            return False

    def require_images(self) -> None:
        """Raise an `InputError` that says what is there if there is no image."""
        if not self.folders:
            found = [f"{n:,} {ending}" for ending, n in self.skipped["files_left_out"].most_common(5)]
            found += [f"{name}, which cannot be looked into" for name in self.skipped["not_readable"][:3]]
            wanted = f"looked for {' '.join(EXTENSIONS)}"
            raise InputError(f"no image below {self.root}: {wanted}; found {', '.join(found) or 'nothing'}")

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
            raise self.error(parts, f"has label folders of both classes ({names})")
        return at[0] if at else None

    def error(self, parts: Parts, problem: str) -> InputError:
        """What is wrong with a folder, and what can be done."""
        advice = "Move or rename it, choose another layout= or give a table"
        return InputError(f"{self.root}: '{'/'.join(parts) or '.'}' {problem}. {advice}")

    def split(self, parts: Parts) -> str | None:
        """Split of a folder; `train` beside `car` and `dog` is a class of pictures, no split."""
        splits: set[str] = set()
        for i, part in enumerate(parts):
            name = read_name(part).split
            beside = [read_name(n).split is not None for n in self.children[parts[:i]]]
            if name and (all(beside) if splits else 2 * sum(beside) >= len(beside)):
                splits.add(name)
        if len(splits) > 1:
            raise self.error(parts, f"lies under folders of several splits: {', '.join(sorted(splits))}")
        return next(iter(splits), None)

    @cached_property
    def used(self) -> Counter[str]:
        """Label folders by name, with their numbers of images."""
        return Counter(parts[i] for parts, (i, _) in self.labels.items() for _ in self.folders[parts])

    @cached_property
    def contest(self) -> set[Parts]:
        """Test images as contests hand them out: under no label folder, the others being of both classes."""
        loose = self.folders.keys() - self.labels.keys()
        both = {label for _, label in self.labels.values()} == {schema.REAL, schema.FAKE}
        return loose if both and all(self.split(parts) == "test" for parts in loose) else set()

    def beside_real(self, parts: Parts) -> int | None:
        """Deepest part that stands beside a folder `real` (or is it)."""
        depths = range(len(parts) - 1, -1, -1)
        return next((i for i in depths if "real" in map(normalise, self.children[parts[:i]])), None)


def _leads_back(folder: Path, root: Path) -> bool:
    """Whether a folder is a link to one that it lies in itself: to follow it would never end."""
    above = folder.parents[: len(folder.relative_to(root).parts)] if folder.is_symlink() else ()
    return any(parent.resolve().is_relative_to(folder.resolve()) for parent in above)


# ---- layouts: label, generator and source of a folder's images, or None where nothing says the label

Said = tuple[int | None, str, str] | None


def _names(parts: Iterable[str]) -> list[str]:
    """Names that may be those of generators or sources: no splits, no mere numbers."""
    return [p for p in parts if not (read_name(p).split or normalise(p) in _CONTAINERS or p.isdigit())]


def _plain(tree: Tree, parts: Parts) -> Said:
    if parts not in tree.labels:
        return (None, "unknown", tree.root.name) if parts in tree.contest else None
    i, label = tree.labels[parts]
    outer, inner = _names(parts[:i]), _names(parts[i + 1 :])
    made = [name for name in outer if read_name(name).label != schema.REAL]  # photos/fake: not by "photos"
    may_say = [] if read_name(parts[i]).sure else [parts[i]]  # fake_sdxl
    return label, (inner[:1] or made[-1:] or may_say or ["unknown"])[0], (outer[-1:] or [tree.root.name])[0]


def _named(tree: Tree, parts: Parts, real: str, fake: str) -> Said:
    """Folders of two names, in folders of one generator each (GenImage, ForenSynths and their like)."""
    i = next((i for i, name in enumerate(map(normalise, parts)) if name in (real, fake)), None)
    if i is None:
        return None
    chain = (tree.root.name, *parts[:i])
    names = _names(chain) or _names(tree.root.parts[-2:]) or ["unknown"]
    classes = [part for part in chain if normalise(part) in _CLASS_LEVEL]
    splits = [depth for depth, part in enumerate(chain) if read_name(part).split]
    below_split = _names(chain[splits[-1] + 1 :])[:1] if splits else []
    name = (classes or below_split or names)[-1]
    if wrapped := _GENIMAGE_DOWNLOAD.fullmatch(name):
        name = _GENIMAGE_NAMES.get(wrapped[1].lower(), wrapped[1].lower())
    return schema.FAKE if normalise(parts[i]) == fake else schema.REAL, name, name


def _beside_real(tree: Tree, parts: Parts) -> Said:
    """`real` beside one folder per generator, at any depth (DiffusionForensics)."""
    if (i := tree.beside_real(parts)) is None:
        return None
    label = schema.REAL if read_name(parts[i]).label == schema.REAL else schema.FAKE
    return label, parts[i], (_names(parts[:i])[-1:] or [tree.root.name])[0]


def _two_roots(tree: Tree, parts: Parts) -> Said:
    """Fakes, one folder per generator (DRCT-2M, Synthbuster); a folder named after a photo set is real."""
    photos = [part for part in parts if normalise(part) in _PHOTO_SETS]
    name = (_names(parts)[-1:] or [tree.root.name])[0]
    return schema.REAL if photos else schema.FAKE, name, (photos or [tree.root.name])[0]


_FORENSYNTHS = partial(_named, real="0_real", fake="1_fake")
FOLDER_LAYOUTS: dict[str, Callable[[Tree, Parts], Said]] = {
    "folder": _plain,
    "genimage": partial(_named, real="nature", fake="ai"),
    **dict.fromkeys(("forensynths", "ufd", "cnndetection", "aigibench", "fatformer"), _FORENSYNTHS),
    **dict.fromkeys(("generators", "diffusionforensics"), _beside_real),
    **dict.fromkeys(("two_roots", "drct", "synthbuster"), _two_roots),
    "unlabelled": lambda tree, parts: (None, "unknown", tree.root.name),
}


def read_folder(tree: Tree, layout: str, real_root: Path | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a folder tree in one of :data:`FOLDER_LAYOUTS`; ``auto`` decides from the folder names.

    Gives raw rows of the manifest's columns, sorted by path, and a report: ``layout``, ``labels`` (where they
    come from), ``notes``. Raises an `InputError` where the names leave layout, label or split open.
    """
    tree.require_images()
    notes: list[str] = []
    by_words = layout in ("auto", "folder")
    if layout == "auto":
        layout = _detect(tree, real_root, notes)
    rule = FOLDER_LAYOUTS[layout]
    if real_root is not None and rule is not _two_roots:
        raise InputError(f"layout {layout!r} has photographs of its own; leave real_root={real_root} out")
    table = _rows(tree, rule)
    labels = f"the folders, as layout {layout!r} has them"
    if layout == "unlabelled":
        labels = "none: no folder is named after real or fake, so the images are read without labels"
    elif real_root is not None:
        photos = Tree(real_root)
        photos.require_images()
        for key, value in photos.skipped.items():
            tree.skipped[key] += value
        reals = _rows(photos, lambda tree, parts: (schema.REAL, "", ""))
        table = pd.concat([table, reals], ignore_index=True).assign(**{schema.SOURCE: real_root.name})
        labels = f"all of {tree.root.name} fake, all of {real_root.name} real"
    elif by_words and tree.used:
        labels = "folders " + ", ".join(f"{printable(k)} ({n:,})" for k, n in tree.used.most_common(8))
        if set(tree.used) == {"0", "1"}:
            notes.append("folders 0 and 1 are read as 0 = real and 1 = fake; give a table if it is otherwise")
    # UniversalFakeDetect: several diffusion sets share the reals of another
    source = table[schema.SOURCE]
    with_reals = set(source[table[schema.LABEL] == schema.REAL])
    shared = table[schema.GENERATOR].map(lambda name: "imagenet" if name == "guided" else "laion")
    table[schema.SOURCE] = source.mask(~source.isin(with_reals) & shared.isin(with_reals), shared)
    return table, {"labels": labels, "layout": layout, "notes": notes}


def _rows(tree: Tree, rule: Callable[[Tree, Parts], Said]) -> pd.DataFrame:
    """One row per image."""
    rows = []
    for parts, names in tree.folders.items():
        if (said := rule(tree, parts)) is None:
            raise tree.error(parts, "has no folder that says its label")
        here, split = os.path.join(tree.root, *parts), tree.split(parts)
        paths = (os.path.join(here, name) for name in names)
        rows += [(path, *said, split, _read_caption(tree.captions.get(path, ""))) for path in paths]
    table = pd.DataFrame(rows, columns=list(schema.MANIFEST_COLUMNS), dtype=object)
    # folder by folder: a/z before a.png
    return table.sort_values(schema.PATH, key=lambda p: p.str.replace(os.sep, "\0"), ignore_index=True)


def _read_caption(path: str) -> str | None:
    """Caption from a text beside an image (img2dataset and trainers keep them so)."""
    if not path:
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        text = Path(path).read_text("utf-8", "replace")
        if path.lower().endswith(".json"):
            values = map(json.loads(text).get, ("caption", "prompt", "text"))
            text = next((value for value in values if isinstance(value, str)), "")
        return " ".join(text[:10_000].split())
    return None


def _detect(tree: Tree, real_root: Path | None, notes: list[str]) -> str:
    """Find the layout of a tree from its folder names; several answers are an error, never a choice."""
    root, used = tree.root, ", ".join(f"{name} ({count(n, 'image')})" for name, n in tree.used.items())
    if used and real_root is not None:
        advice = "pass layout='two_roots' to take all of it as fake, or leave real_root= out"
        raise InputError(f"{root} holds label folders of its own: {used}; {advice}")
    fakes_alone = any(re.match("drct|synthbuster", normalise(name)) for name in root.parts[-2:])
    if real_root is not None or (fakes_alone and not used):
        return "two_roots"
    if not used and tree.tables:
        tables = ", ".join(t.name for t in tree.tables[:5])
        advice = "read that table, or pass layout='unlabelled'"
        raise InputError(f"{root} has no label folders but holds {tables}: {advice}")
    if not used:
        return "unlabelled"
    loose = [parts for parts in tree.folders if parts not in tree.labels]
    if not loose:
        names = set(map(normalise, tree.used))
        known = {"genimage": {"ai", "nature"}, "forensynths": {"0_real", "1_fake"}}
        return next((name for name, words in known.items() if names <= words), "folder")
    n = count(sum(len(tree.folders[parts]) for parts in loose), "image")
    if tree.contest:
        notes.append(f"{n} of split 'test' lie under no label folder: read without a label")
        return "folder"
    depths = {parts: depth for parts in tree.folders if (depth := tree.beside_real(parts)) is not None}
    if len(depths) < len(tree.folders):
        name = tree.folders[loose[0]][0]
        problem = f"lies under no label folder (in all {n}), but others under {used}"
        raise tree.error((*loose[0], name), problem)
    beside = sorted({parts[depths[parts]] for parts in loose})
    listed = ", ".join(beside[:8])
    bases = {normalise(parts[depth - 1] if depth else root.name) for parts, depth in depths.items()}
    if not (all(GENERATOR_NAMES.match(normalise(name)) for name in beside) or bases <= _DIFFUSION_FORENSICS):
        advice = "which are no label names. If they are generators, pass layout='generators'"
        raise InputError(f"{root}: beside 'real' there are {listed}, {advice}")
    notes.append(f"folders beside 'real' are read as generators: {listed}")
    return "generators"
