"""Is this machine ready for a preset: packages, devices, caches, disk, models; one line each, with a remedy.

Nothing heavy is loaded, unless the deep test is asked for: then the models are built and asked questions with
known answers.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.version import Version

from itemkit import _torchvision
from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import ItemkitError, ModelNotFound
from itemkit.models import PARTS, fetch_remedy, tidy
from itemkit.presets import LOCALISERS, MINI_REMEDY, Preset, mini_folder
from itemkit.text import one_line

if TYPE_CHECKING:
    from PIL import Image

OK, WARN, FAIL = "OK", "WARN", "FAIL"

# Packages whose import is tried, because an installed one may still be broken (binary mismatch, missing
# library). The others are only looked up: importing umap alone compiles for seconds.
_IMPORTED = {name: name for name in ("torch", "torchvision", "timm", "transformers", "spacy", "pyarrow")}
_IMPORTED |= {"open_clip_torch": "open_clip", "scikit-learn": "sklearn"}
DISK_GB = 2.0  # features, figures and executed notebooks of mini, with room to spare


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name, detail, todo : str
        What it is, what was found, and what to do about it; the latter is empty when there is nothing to do.
    status : {"OK", "WARN", "FAIL"}
        FAIL: the preset cannot run. WARN: it can, but not as it was tested.
    """

    name: str
    status: str
    detail: str
    todo: str = ""

    def __str__(self) -> str:
        """One line, and the remedy on the next."""
        line = f"{f'[{self.status}]':<7}{self.name:<18} {self.detail}"
        return f"{line}\n{'':<26}do: {self.todo}" if self.todo else line


def run_doctor(preset: Preset, device: str = "auto", deep: bool = False) -> Iterator[Check]:
    """Look at everything a preset needs.

    Parameters
    ----------
    preset : Preset
        Whose models are looked for.
    device : str
        "auto", "cpu", "cuda", "cuda:1", ...
    deep : bool
        Also build the models and ask them questions with known answers; takes as long as loading them.

    Yields
    ------
    Check
        Each as soon as it is done.
    """
    yield check_python()
    yield from check_packages()
    yield from check_devices(device)
    yield check_threads()
    yield check_caches()
    yield check_disk(Path.cwd())
    models = list(check_models(preset))
    yield from models
    if deep and any(check.status == FAIL for check in models):
        yield Check("deep test", FAIL, "not run: a model is missing", "get the models named above first")
    elif deep:
        yield from ask_models(preset, device)


def summary(checks: Sequence[Check]) -> str:
    """Sum up in one line how many checks were fine."""
    n = {status: sum(check.status == status for check in checks) for status in (OK, WARN, FAIL)}
    verdict = "not ready" if n[FAIL] else "ready"
    return f"{verdict}: {n[OK]} fine, {n[WARN]} to look at, {n[FAIL]} failed"


# ----------------------------------------------------------------------------------------------- the machine


def check_python() -> Check:
    """Compare the interpreter with the one everything was tested with."""
    version = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        return Check("python", OK, version)
    return Check("python", WARN, f"{version}; tested with 3.11", "use 3.11 if something is odd")


def tested_versions() -> dict[str, str]:
    """Versions tested together: constraints.txt of the checkout, or the copy an installation carries."""
    here = Path(__file__).parent
    for path in (here / "constraints.txt", here.parent / "constraints.txt"):
        if path.is_file():
            lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
            return dict(line.split("==") for line in lines if "==" in line)
    return {}


def check_packages() -> Iterator[Check]:
    """Compare each package that itemkit needs with what is declared and with what was tested."""
    tested = tested_versions()
    if not tested:
        yield Check("tested versions", WARN, "constraints.txt is missing", "install itemkit again")
    try:
        needed = [Requirement(line) for line in metadata.requires("itemkit") or []]
    except metadata.PackageNotFoundError:
        yield Check("itemkit", WARN, "not installed: what it needs is not known here", "pip install -e .")
        return
    for requirement in needed:
        extra = str(requirement.marker or "")
        if "dev" not in extra:
            yield check_package(requirement, tested.get(requirement.name), bool(extra))


def check_package(requirement: Requirement, tested: str | None, optional: bool) -> Check:
    """Look for one package, and import it where a broken installation is known to happen."""
    name = requirement.name
    install = f"pip install '{f'{name}=={tested}' if tested else f'{name}{requirement.specifier}'}'"
    try:
        installed = metadata.version(name)
        if not requirement.specifier.contains(installed, prereleases=True):
            return Check(name, FAIL, f"{installed}, needed is {requirement.specifier}", install)
        if name in _IMPORTED:
            importlib.import_module(_IMPORTED[name])
    except metadata.PackageNotFoundError:
        if optional:
            return Check(name, OK, f"not installed; optional, comes with `{install}`")
        return Check(name, FAIL, "not installed", install)
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(name, FAIL, f"{installed} cannot be imported: {one_line(error)}", install)
    note = f"; {_torchvision.state()}" if name == "torchvision" else ""
    # '2.13.0+cpu' and '2.13.0' are the same release
    if tested and Version(installed).public != Version(tested).public:
        odd = f"{install}, if something is odd"
        return Check(name, WARN, f"{installed}, tested with {tested}{note}", odd)
    return Check(name, OK, f"{installed}{note}")


def check_devices(device: str = "auto") -> Iterator[Check]:
    """Name every GPU, and compute something on the device that was asked for."""
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        name, version = torch.cuda.get_device_name(index), torch.version.cuda
        yield Check(f"gpu cuda:{index}", OK, f"{name}, {memory}, CUDA {version}")
    if not torch.cuda.device_count() and shutil.which("nvidia-smi"):
        why = "sees no device" if torch.version.cuda else "is built without CUDA"
        todo = "check nvidia-smi and CUDA_VISIBLE_DEVICES, or install a CUDA build of the same torch version"
        yield Check("gpu", WARN, f"a driver is here, but torch {torch.__version__} {why}", todo)
    try:
        chosen = choose_device(device)
        torch.ones(8, 8, device=chosen).matmul(torch.ones(8, 8, device=chosen)).sum().item()
        precision = dtype_name(choose_precision("auto", chosen))
        yield Check("device", OK, f"'{device}' is {chosen}; precision 'auto' is {precision} there")
    except ItemkitError as error:
        yield Check("device", FAIL, str(error), "see above, or `--device cpu`")
    except RuntimeError as error:
        yield Check("device", FAIL, f"'{device}' does not compute: {one_line(error)}", "try `--device cpu`")


def check_threads() -> Check:
    """Compare the threads torch takes with the cores that are free."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = f"{torch.get_num_threads()} on {cores} cores; load of the machine {load:.1f}"
    if torch.get_num_threads() > 1 and load > cores / 2:
        # two processes of two threads on two cores: 2 instead of 40 images/s
        todo = "add `--threads 1` (in notebooks OMP_NUM_THREADS=1): busy threads wait for each other"
        return Check("threads", WARN, f"{found}: other programs are busy", todo)
    return Check("threads", OK, found)


def check_caches() -> Check:
    """Look for a place where numba, which UMAP uses, may keep what it compiles."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        places = [Path(chosen)]
    else:
        places = [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")]
        if (spec := find_spec("umap")) and spec.origin:
            places.insert(0, Path(spec.origin).parent)
    for place in places:
        there = next((folder for folder in (place, *place.parents) if folder.exists()), place)
        if os.access(there, os.W_OK):
            return Check("caches", OK, f"compiled code is kept in {tidy(place)}")
    todo = "set NUMBA_CACHE_DIR to a folder that can be written"
    return Check("caches", WARN, "neither environment nor home can be written: UMAP compiles anew", todo)


def check_disk(folder: Path) -> Check:
    """Compare the free disk space of a folder with what the mini preset takes."""
    free = shutil.disk_usage(folder).free / 1e9
    if not os.access(folder, os.W_OK):
        return Check("disk", WARN, "this folder cannot be written to", "give --out a folder of your own")
    if free < DISK_GB:
        return Check("disk", WARN, f"{free:.1f} GB free, mini takes up to {DISK_GB:.0f}", "free some space")
    return Check("disk", OK, f"{free:.0f} GB free in this folder")


# ------------------------------------------------------------------------------------------------ the models


def check_models(preset: Preset) -> Iterator[Check]:
    """Find every model of a preset, check and hash its files, without loading it."""
    try:
        places, made_of = preset.find(), {}
        if not any(isinstance(place, ModelNotFound) for place in places.values()):
            made_of = preset.fingerprint()
    except ItemkitError as error:  # an unknown name, or a part of one's own that lacks a version
        yield Check("models", FAIL, str(error), "see above")
        return
    for part in PARTS:
        model, place = getattr(preset, part), places.get(part)
        if isinstance(place, ModelNotFound):
            found = ModelNotFound(place.what, reason=place.reason, looked=place.looked)
            yield Check(part, FAIL, str(found), _remedy(preset, place))
        elif place is not None:
            # as in the run.json of a store
            digest = made_of.get(part, {}).get("weights_sha256") or made_of.get(part, {}).get("files_sha256")
            yield Check(part, OK, tidy(place.path) + (f", sha256 {digest[:12]}" if digest else ""))
        elif part == "localiser" and isinstance(model, str) and model in LOCALISERS:
            yield Check(part, OK, f"'{model}', works with the encoder")
        else:
            own = f"your own, {model}" if isinstance(model, str) else "given as an object"
            yield Check(part, OK, "left out" if model is None else own)


def _remedy(preset: Preset, error: ModelNotFound) -> str:
    if error.reason:  # it is there, and its loader knows what is wrong with it
        return error.remedy
    on_no_hub = preset.name == "mini" and tidy(mini_folder()) in error.looked
    return MINI_REMEDY if on_no_hub else fetch_remedy(preset.name)


# -------------------------------------------------------------------------------------------- the deep test

# Share of the cases that must be right; our choice. A random encoder finds the right one of n captions in one
# of n cases. 0.9 leaves room for one odd image; a captioner may name a subject by a word that nobody listed.
# No localiser was ever measured on these photographs, so a weak one is told, not condemned.
NEEDED = {"encoder": 0.9, "captioner": 0.7, "localiser": 0.5}
PHOTOS_FILE = Path(__file__).with_name("photos.csv")  # boxes as fractions of the sides, marked by eye


@dataclass(frozen=True)
class Case:
    """An image whose content is known."""

    image: Image.Image
    caption: str  # fits it and none of the other cases
    words: tuple[str, ...]  # a generated caption should hold one of these
    phrase: str = ""  # an object to point at
    box: tuple[float, ...] | None = None  # where it is; pixels, x0, y0, x1, y1


def photo_cases() -> list[Case]:
    """Photographs that come with scikit-image and scikit-learn, with captions and a few boxes."""
    import pandas as pd
    import skimage
    import sklearn

    from itemkit.images import load_image

    folders = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    cases = []
    for row in pd.read_csv(PHOTOS_FILE).itertuples(index=False):
        image = load_image(next(folder / row.file for folder in folders if (folder / row.file).is_file()))
        box = (row.x0 * image.width, row.y0 * image.height, row.x1 * image.width, row.y1 * image.height)
        part = () if math.isnan(row.x0) else (row.phrase, box)
        cases.append(Case(image, row.caption, tuple(row.words.split()), *part))
    return cases


def mini_cases() -> list[Case]:
    """Rendered scenes with their truth, for models that know nothing else; from the files of preset mini."""
    import pandas as pd
    from PIL import Image

    file = mini_folder() / "cases.parquet"
    if not file.is_file():
        raise ModelNotFound("the questions for the mini models", looked=tidy(file), remedy=MINI_REMEDY)
    cases = []
    for row in pd.read_parquet(file).itertuples(index=False):
        image, subject = Image.open(io.BytesIO(row.image)).convert("RGB"), row.phrase.split()[-1]
        cases.append(Case(image, row.caption, (subject,), row.phrase, (row.x0, row.y0, row.x1, row.y1)))
    return cases


def ask_models(preset: Preset, device: str = "auto") -> Iterator[Check]:
    """Build the models of a preset and ask them questions with known answers."""
    try:
        models = preset.build(device)
        cases = mini_cases() if preset.name == "mini" else photo_cases()
    except ItemkitError as error:
        again = "fetch them again, then repeat"
        yield Check("deep test", FAIL, f"the models cannot be asked: {error}", again)
        return
    yield ask_encoder(models.encoder, cases)
    if models.captioner is not None:
        yield ask_captioner(models.captioner, cases)
    if models.localiser is not None:
        yield ask_localiser(models.localiser, models.encoder, cases)


def ask_encoder(encoder: Any, cases: Sequence[Case]) -> Check:
    """Ask whether each image's own caption wins among the captions of all cases."""
    captions = [case.caption for case in cases]
    winners = (_embed(encoder, cases).pooled @ encoder.encode_texts(captions).T).argmax(dim=1).tolist()
    pairs = [(case.caption, captions[winner]) for case, winner in zip(cases, winners, strict=True)]
    misses = [f"'{own}' loses against '{other}'" for own, other in pairs if own != other]
    return _judge("encoder", "the right caption wins", len(cases), misses)


def ask_captioner(captioner: Any, cases: Sequence[Case]) -> Check:
    """Ask whether each generated caption names the subject."""
    texts = [caption.text for caption in captioner.caption([case.image for case in cases])]
    misses = [
        f"'{case.caption}' is called '{text}', expected one of {', '.join(case.words)}"
        for case, text in zip(cases, texts, strict=True)
        if not set(case.words) & set(text.lower().replace(".", " ").replace(",", " ").split())
    ]
    return _judge("captioner", "the caption names the subject", len(cases), misses)


def ask_localiser(localiser: Any, encoder: Any, cases: Sequence[Case]) -> Check:
    """Ask whether the centre of each located box lies on the object."""
    import torch

    cases = [case for case in cases if case.box is not None]
    phrases = [case.phrase for case in cases]
    regions = localiser.locate(
        [case.image for case in cases],
        _embed(encoder, cases, patches=localiser.needs_patches),
        encoder.encode_texts(phrases),
        torch.arange(len(cases)),
        phrases=phrases,
    )
    misses = []
    for case, (left, top, right, bottom) in zip(cases, regions.boxes.tolist(), strict=True):
        (x0, y0, x1, y1), x, y = case.box or (), (left + right) / 2, (top + bottom) / 2
        if not (x0 <= x <= x1 and y0 <= y <= y1):
            misses.append(f"'{case.phrase}' is placed at ({x:.0f}, {y:.0f})")
    return _judge("localiser", "the box points at the object", len(cases), misses)


def _embed(encoder: Any, cases: Sequence[Case], patches: bool = False) -> Any:
    import torch

    pixels = torch.stack([encoder.preprocess(case.image) for case in cases])
    return encoder.encode_images(pixels, patches=patches)


def _judge(part: str, question: str, total: int, misses: Sequence[str]) -> Check:
    right = total - len(misses)
    detail = f"{question} in {right} of {total}"
    if misses:
        more = f" and {len(misses) - 3} more" if len(misses) > 3 else ""
        detail += f" ({'; '.join(misses[:3])}{more})"
    if total and right >= NEEDED[part] * total:
        return Check(f"deep {part}", OK, detail)
    todo = "compare weights, preprocessing and tokenizer with the model's source; do not extract with it"
    status = WARN if part == "localiser" else FAIL
    return Check(f"deep {part}", status, f"{detail}, needed {NEEDED[part]:.0%}", todo)
