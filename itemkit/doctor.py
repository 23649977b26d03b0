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
from itemkit.models import PARTS, Models, tidy
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
    todo: str = ""

    def __str__(self) -> str:
        """One line, and the remedy on the next."""
        line = f"{f'[{self.status}]':<7}{self.name:<18} {self.detail}"
        return f"{line}\n{'':<26}do: {self.todo}" if self.todo else line


def run_doctor(preset: Preset, device: str = "auto", deep: bool = False) -> Iterator[Check]:
    """Look at everything a preset needs on a device; each check comes as soon as it is done.

    The ``deep`` test also builds the models and asks them questions; it takes as long as loading them.
    """
    yield check_python()
    yield from check_packages()
    yield from check_devices(device)
    yield check_threads()
    yield check_caches()
    models = list(check_models(preset))
    yield from models
    if deep and any(check.status == FAIL for check in models):
        yield Check("deep test", FAIL, "not run: a model is missing", "get the models named above first")
    elif deep:
        try:
            built = preset.build(device)
            cases = mini_cases() if preset.name == "mini" else photo_cases()
        except ItemkitError as error:
            detail = f"the models cannot be asked: {error}"
            yield Check("deep test", FAIL, detail, "fetch them again, then repeat")
        else:
            yield from ask_models(built, cases)


def summary(checks: Sequence[Check]) -> str:
    """Sum up in one line how many checks were fine."""
    n = {status: sum(check.status == status for check in checks) for status in (OK, WARN, FAIL)}
    verdict = "not ready" if n[FAIL] else "ready"
    return f"{verdict}: {n[OK]} fine, {n[WARN]} to look at, {n[FAIL]} failed"


# -- the machine ---------------------------------------------------------------------------------------------


def check_python() -> Check:
    """Compare the interpreter with the one everything was tested with."""
    tested = sys.version_info[:2] == (3, 11)
    todo = "" if tested else "tested with 3.11; use it if something is odd"
    return Check("python", OK if tested else WARN, platform.python_version(), todo)


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
    note = f"; {_torchvision.status}" if name == "torchvision" and _torchvision.status else ""
    # '2.13.0+cpu' and '2.13.0' are the same release
    if tested and Version(installed).public != Version(tested).public:
        odd = f"{install}, if something is odd"
        return Check(name, WARN, f"{installed}, tested with {tested}{note}", odd)
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
        detail = f"'{device}' does not compute: {one_line(error)}"
        yield Check("device", FAIL, detail, "see there, or `--device cpu`")


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
    from itemkit.maps import ready_numba_cache

    if ready_numba_cache() is None:
        return Check("caches", OK, "compiled code of UMAP is kept")
    todo = "set NUMBA_CACHE_DIR to a folder that can be written"
    return Check("caches", WARN, "neither environment nor home can be written: UMAP compiles anew", todo)


# -- the models ----------------------------------------------------------------------------------------------


def check_models(preset: Preset) -> Iterator[Check]:
    """Find every model of a preset, check and hash its files, without loading it."""
    try:
        places = preset.find()
        missing = any(isinstance(place, ModelNotFound) for place in places.values())
        made_of = {} if missing else preset.fingerprint()
    except ItemkitError as error:  # an unknown name, or a part of one's own that lacks a version
        yield Check("models", FAIL, str(error), "see above")
        return
    for part in PARTS:
        model, place = getattr(preset, part), places.get(part)
        if isinstance(place, ModelNotFound):
            yield Check(part, FAIL, place.fact, place.remedy)
        elif place is not None:
            # as in the run.json of a store
            says = made_of.get(part, {})
            digest = says.get("weights_sha256") or says.get("files_sha256") or "not computed"
            yield Check(part, OK, f"{tidy(place.path)}, sha256 {digest[:12]}")
        else:
            shown = f"'{model}'" if isinstance(model, str) else "given as an object"
            yield Check(part, OK, "left out" if model is None else shown)


# -- the deep test -------------------------------------------------------------------------------------------

# Share of the cases that must be right; our choice. A random encoder finds the right one of n captions in one
# of n cases. 0.9 leaves room for one odd image; a captioner may name a subject by a word that nobody listed.
# No localiser was ever measured on these photographs, so a weak one is told, not condemned.
NEEDED = {"encoder": 0.9, "captioner": 0.7, "localiser": 0.5}
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
    patches = getattr(localiser, "needs_patches", False)
    embedding = encoder.encode_images(pixels, patches=patches)
    cosine = embedding.pooled @ encoder.encode_texts(captions).T
    pairs = zip(captions, [captions[row] for row in cosine.argmax(dim=1).tolist()], strict=True)
    misses = [f"'{own}' loses against '{other}'" for own, other in pairs if own != other]
    yield _judge("encoder", "the right caption wins", len(cases), misses)
    if captioner is not None:
        said = [caption.text for caption in as_captions(captioner.caption(images), len(images))]
        misses = [
            f"'{case.caption}' is called '{text}', expected one of {', '.join(case.words)}"
            for case, text in zip(cases, said, strict=True)
            if not set(case.words) & set(re.findall(r"\w+", text.lower()))
        ]
        yield _judge("captioner", "the caption names the subject", len(cases), misses)
    if localiser is not None:
        owner = torch.tensor([i for i, case in enumerate(cases) if case.box])
        asked = [cases[i] for i in owner]
        phrases = [case.phrase for case in asked]
        found = localiser.locate(images, embedding, encoder.encode_texts(phrases), owner, phrases=phrases)
        misses = []
        for case, (left, top, right, bottom) in zip(asked, found.boxes.tolist(), strict=True):
            (x0, y0, x1, y1), x, y = case.box, (left + right) / 2, (top + bottom) / 2
            if not (x0 <= x <= x1 and y0 <= y <= y1):
                misses.append(f"'{case.phrase}' is placed at ({x:.0f}, {y:.0f})")
        yield _judge("localiser", "the box points at the object", len(asked), misses)


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
