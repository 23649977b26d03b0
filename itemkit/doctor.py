"""Is this machine ready for a preset: packages, devices, caches, models; one line each, with a remedy.

Nothing heavy is loaded, unless the deep test is asked for: then the models are built and asked questions with
known answers.
"""

from __future__ import annotations

import importlib
import io
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from itemkit import _torchvision
from itemkit.captions import as_captions
from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import ItemkitError, ModelNotFound
from itemkit.models import PARTS, Models, part_fingerprint, tidy
from itemkit.presets import MINI_REMEDY, Preset, mini_folder
from itemkit.text import one_line

if TYPE_CHECKING:
    from PIL import Image

OK, WARN, FAIL = "OK", "WARN", "FAIL"

# Packages whose import is tried, because an installed one may still be broken (binary mismatch, missing
# library). The others are only looked up: importing umap alone compiles for seconds.
_IMPORTED = {name: name for name in ("torch", "torchvision", "timm", "transformers", "spacy", "pyarrow")}
_IMPORTED |= {"open_clip_torch": "open_clip", "scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what it is, what was found, and what to do about it, if anything."""

    name: str
    status: str  # FAIL: the preset cannot run. WARN: it can, but not as it was tested.
    detail: str
    todo: str = ""  # unless it is OK

    def __str__(self) -> str:
        """One line, and the remedy on the next."""
        line = f"{f'[{self.status}]':<7}{self.name:<18} {self.detail}"
        return f"{line}\n{'':<26}do: {self.todo}" if self.todo and self.status != OK else line


def run_doctor(preset: Preset, device: str = "auto", deep: bool = False) -> Iterator[Check]:
    """Look at everything a preset needs on a device; the ``deep`` test also builds and asks its models."""
    python = OK if sys.version_info[:2] == (3, 11) else WARN
    yield Check(
        "python", python, platform.python_version(), "use 3.11, which was tested, if something is odd"
    )
    yield from check_packages()
    yield from check_devices(device)
    yield check_threads()
    yield check_caches()
    yield from check_models(preset)
    if deep:
        try:
            cases = mini_cases() if preset.name == "mini" else photo_cases()
            yield from ask_models(preset.build(device), cases)
        except ItemkitError as error:
            yield Check("deep test", FAIL, "the models cannot be asked", str(error))


def summary(checks: Sequence[Check]) -> str:
    """Sum up in one line how many checks were fine."""
    n = {status: sum(check.status == status for check in checks) for status in (OK, WARN, FAIL)}
    ready = "not ready" if n[FAIL] else "ready"
    return f"{ready}: {n[OK]} fine, {n[WARN]} to look at, {n[FAIL]} failed"


# -- the machine ---------------------------------------------------------------------------------------------


def tested_versions() -> dict[str, str]:
    """Versions tested together: constraints.txt of the checkout, or the copy an installation carries."""
    here = Path(__file__).parent
    files = [folder / "constraints.txt" for folder in (here, here.parent)]
    text = next((file.read_text() for file in files if file.is_file()), "")
    return dict(re.findall(r"^([\w.-]+)==([^\s#]+)", text, re.MULTILINE))


def check_packages() -> Iterator[Check]:
    """Compare each package that itemkit needs with what is declared and with what was tested."""
    tested = tested_versions()
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
    name, needed = requirement.name, requirement.specifier
    install = f"pip install '{name}{f'=={tested}' if tested else needed}'"
    try:
        installed = metadata.version(name)
        if name in _IMPORTED:
            importlib.import_module(_IMPORTED[name])
    except metadata.PackageNotFoundError:
        if optional:
            return Check(name, OK, f"not installed; optional, comes with `{install}`")
        return Check(name, FAIL, "not installed", install)
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(name, FAIL, f"{installed} cannot be imported: {one_line(error)}", install)
    if not needed.contains(installed, prereleases=True):
        return Check(name, FAIL, f"{installed}, needed is {needed}", install)
    note = f"; {_torchvision.status}" if name == "torchvision" and _torchvision.status else ""
    # '2.13.0+cpu' and '2.13.0' are the same release
    if tested and Version(installed).public != Version(tested).public:
        return Check(
            name, WARN, f"{installed}, tested with {tested}{note}", f"{install}, if something is odd"
        )
    return Check(name, OK, f"{installed}{note}")


def check_devices(device: str = "auto") -> Iterator[Check]:
    """Name every GPU, and compute something on the device that was asked for."""
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = (f"{size / 1e9:.0f}" for size in torch.cuda.mem_get_info(index))
        found = f"{torch.cuda.get_device_name(index)}, {free} of {total} GB free, CUDA {torch.version.cuda}"
        yield Check(f"gpu cuda:{index}", OK, found)
    if not torch.cuda.device_count() and shutil.which("nvidia-smi"):
        todo = "check nvidia-smi and CUDA_VISIBLE_DEVICES, or install a CUDA build of the same torch version"
        yield Check("gpu", WARN, f"a driver is here, but torch {torch.__version__} sees no device", todo)
    try:
        chosen = choose_device(device)
        torch.ones(8, 8, device=chosen).matmul(torch.ones(8, 8, device=chosen)).sum().item()
        precision = dtype_name(choose_precision("auto", chosen))
        yield Check("device", OK, f"'{device}' is {chosen}; precision 'auto' is {precision} there")
    except (ItemkitError, RuntimeError) as error:
        yield Check("device", FAIL, f"'{device}' does not compute: {one_line(error)}", "`--device cpu`")


def check_threads() -> Check:
    """Compare the threads torch takes with the cores that are free."""
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    # two processes of two threads on two cores: 2 instead of 40 images/s
    todo = "add `--threads 1` (in notebooks OMP_NUM_THREADS=1): busy threads wait for each other"
    found = f"{threads} on {cores} cores; load of the machine {load:.1f}"
    return Check("threads", WARN if threads > 1 and load > cores / 2 else OK, found, todo)


def check_caches() -> Check:
    """Look for a place where numba, which UMAP uses, may keep what it compiles."""
    from itemkit.maps import ready_numba_cache

    kept = ready_numba_cache() is None
    found = f"compiled code of UMAP is {'kept' if kept else 'made anew each time'}"
    todo = "neither environment nor home can be written: set NUMBA_CACHE_DIR to a folder that can"
    return Check("caches", OK if kept else WARN, found, todo)


# -- the models ----------------------------------------------------------------------------------------------


def check_models(preset: Preset) -> Iterator[Check]:
    """Find every model of a preset and check its files, without loading it."""
    try:
        places = preset.find()
        for part in PARTS:
            model, place = preset.given(part), places.get(part)
            if isinstance(place, ModelNotFound):
                yield Check(part, FAIL, place.fact, place.remedy)
            elif place is not None:
                yield Check(part, OK, tidy(place.path))
            elif model is None or isinstance(model, str):
                yield Check(part, OK, f"'{model}'" if model else "left out")
            else:
                part_fingerprint(part, model)
                yield Check(part, OK, "given as an object")
    except ItemkitError as error:  # an unknown name, or a part of one's own that lacks a version
        yield Check("models", FAIL, str(error))


# -- the deep test -------------------------------------------------------------------------------------------

# What is asked of a part, in what share of the cases it must be right (our choice), and what it is if not.
# 0.9 leaves room for one odd image; a captioner may name a subject by a word that nobody listed; no localiser
# was ever measured on these photographs.
QUESTIONS = {
    "encoder": ("the right caption wins", 0.9, FAIL),
    "captioner": ("the caption names the subject", 0.7, FAIL),
    "localiser": ("the box points at the object", 0.5, WARN),
}
PHOTOS_FILE = Path(__file__).with_name("photos.csv")  # boxes as fractions of the sides, marked by eye


class Case(NamedTuple):
    """An image whose content is known."""

    image: Image.Image
    caption: str  # fits it and none of the other cases
    words: Sequence[str]  # a generated caption should hold one of these
    phrase: str = ""  # an object to point at
    box: Sequence[float] = ()  # where it is, if that is known; pixels, x0, y0, x1, y1


def photo_cases() -> list[Case]:
    """Photographs that come with scikit-image and scikit-learn, with captions and a few boxes."""
    import pandas as pd
    import skimage
    import sklearn

    from itemkit.images import load_image

    folders = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    cases = []
    for row in pd.read_csv(PHOTOS_FILE, keep_default_na=False).itertuples(index=False):
        image = load_image(next(folder / row.file for folder in folders if (folder / row.file).is_file()))
        shares = zip(row[-4:], image.size * 2, strict=True)
        box = [float(share) * side for share, side in shares] if row.phrase else []
        cases.append(Case(image, row.caption, row.words.split(), row.phrase, box))
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


def ask_models(models: Models, cases: Sequence[Case]) -> Iterator[Check]:
    """Ask models questions with known answers."""
    import torch

    encoder, captioner, localiser = models.encoder, models.captioner, models.localiser
    captions, images = [case.caption for case in cases], [case.image for case in cases]
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    embedding = encoder.encode_images(pixels, patches=getattr(localiser, "needs_patches", False))
    best = (embedding.pooled @ encoder.encode_texts(captions).T).argmax(dim=1).tolist()
    wrong: dict[str, list[str]] = {"encoder": []}  # what is wrong in each case, "" if nothing
    for own, other in zip(captions, [captions[i] for i in best], strict=True):
        wrong["encoder"].append("" if own == other else f"'{own}' loses against '{other}'")
    if captioner is not None:
        wrong["captioner"] = []
        for case, said in zip(cases, as_captions(captioner.caption(images), len(images)), strict=True):
            right = set(case.words) & set(re.findall(r"\w+", said.text.lower()))
            missed = f"'{case.caption}' is called '{said.text}', expected one of {', '.join(case.words)}"
            wrong["captioner"].append("" if right else missed)
    if localiser is not None:
        wrong["localiser"] = []
        owner = torch.tensor([i for i, case in enumerate(cases) if case.box])
        asked = [cases[i] for i in owner]
        phrases = [case.phrase for case in asked]
        found = localiser.locate(images, embedding, encoder.encode_texts(phrases), owner, phrases=phrases)
        seen = found.found.tolist()
        for case, there, (left, top, right, bottom) in zip(asked, seen, found.boxes.tolist(), strict=True):
            (x0, y0, x1, y1), x, y = case.box, (left + right) / 2, (top + bottom) / 2
            missed = f"'{case.phrase}' is {f'placed at ({x:.0f}, {y:.0f})' if there else 'not found'}"
            wrong["localiser"].append("" if there and x0 <= x <= x1 and y0 <= y <= y1 else missed)
    todo = "compare weights, preprocessing and tokenizer with the model's source; do not extract with it"
    for part, answers in wrong.items():
        question, needed, otherwise = QUESTIONS[part]
        misses = [missed for missed in answers if missed]
        share = 1 - len(misses) / len(answers)
        detail = f"{question} in {len(answers) - len(misses)} of {len(answers)}, needed {needed:.0%}"
        shown = f" ({'; '.join(misses[:3])})" if misses else ""
        yield Check(f"deep {part}", OK if share >= needed else otherwise, detail + shown, todo)
