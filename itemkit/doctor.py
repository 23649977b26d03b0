"""Is this machine ready for a preset: packages, devices, memory, disk, models; one line each, with a remedy.

Nothing heavy is loaded, unless the deep test is asked for: then the models are built and asked questions with
known answers (`itemkit.doctor`).
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.version import Version

from itemkit import _torchvision
from itemkit import models as weights
from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import ItemkitError, ModelNotFound
from itemkit.images import load_image
from itemkit.models import first_line
from itemkit.presets import MINI_REMEDY, PARTS, Preset, get_preset

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

OK, WARN, FAIL = "OK", "WARN", "FAIL"

# Packages whose import is tried, because an installed one may still be broken (binary mismatch, missing
# library). The others are only looked up: importing umap alone compiles for seconds.
_IMPORTED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip_torch": "open_clip",
    "timm": "timm",
    "transformers": "transformers",
    "spacy": "spacy",
    "pyarrow": "pyarrow",
    "scikit-learn": "sklearn",
}
_DEVELOPERS_EXTRA = "dev"

MEMORY_GB = 3.0  # what `itemkit run` on mini may take
DISK_GB = 2.0  # features, figures and executed notebooks of mini, with room to spare


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name, detail : str
        What it is and what was found.
    status : {"OK", "WARN", "FAIL"}
        FAIL: the preset cannot run. WARN: it can, but not as it was tested.
    todo : str
        What to do about it; empty when there is nothing to do.
    """

    name: str
    status: str
    detail: str
    todo: str = ""

    def __str__(self) -> str:
        """One line, and the remedy on the next."""
        line = f"{f'[{self.status}]':<7}{self.name:<18} {self.detail}"
        return f"{line}\n{'':<26}do: {self.todo}" if self.todo else line


def check_python() -> Check:
    """Compare the interpreter with the one everything was tested with."""
    version = platform.python_version()
    if sys.version_info[:2] != (3, 11):
        return Check(
            "python", WARN, f"{version}; everything was tested with 3.11", "use 3.11 if something is odd"
        )
    return Check("python", OK, version)


def tested_versions() -> dict[str, str]:
    """Versions tested together: constraints.txt of the checkout, or the copy an installation carries."""
    here = Path(__file__).parent
    for path in (here / "constraints.txt", here.parent / "constraints.txt"):
        if path.is_file():
            lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
            return dict(line.split("==") for line in lines if "==" in line)
    return {}


def requirements() -> list[tuple[Requirement, str]]:
    """What itemkit says it needs, each with the extra it belongs to ("" for the core).

    Read from the checkout's pyproject.toml, or from the metadata of an installed package.
    """
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text())["project"]
        groups = {"": table["dependencies"], **table["optional-dependencies"]}
        return [(Requirement(line), extra) for extra, lines in groups.items() for line in lines]
    own = metadata.metadata("itemkit")
    extras = ["", *(own.get_all("Provides-Extra") or [])]
    found = [Requirement(line) for line in metadata.requires("itemkit") or []]
    return [
        (one, next(extra for extra in extras if one.marker is None or one.marker.evaluate({"extra": extra})))
        for one in found
    ]


def check_packages() -> Iterator[Check]:
    """Compare each package that itemkit needs with what is declared and with what was tested."""
    tested = tested_versions()
    if not tested:
        yield Check(
            "tested versions", WARN, "constraints.txt is missing: nothing to compare with", "install again"
        )
    for requirement, extra in requirements():
        if extra != _DEVELOPERS_EXTRA:
            yield _package(requirement, tested.get(requirement.name), optional=bool(extra))


def _package(requirement: Requirement, tested: str | None, optional: bool) -> Check:
    name = requirement.name
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    install = f"pip install '{name}{extras}{f'=={tested}' if tested else requirement.specifier}'"
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        if optional:
            return Check(name, OK, f"not installed; optional, comes with `{install}`")
        return Check(name, FAIL, "not installed", install)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Check(name, FAIL, f"{installed}, needed is {requirement.specifier}", install)
    if name in _IMPORTED:
        try:
            importlib.import_module(_IMPORTED[name])
        except Exception as error:  # whatever a broken installation raises is the finding
            return Check(name, FAIL, f"{installed} cannot be imported: {first_line(error)}", install)
    note = f"; {_torchvision.state()}" if name == "torchvision" else ""
    # '2.13.0+cpu' and '2.13.0' are the same release
    if tested and Version(installed).public != Version(tested).public:
        return Check(
            name, WARN, f"{installed}, tested with {tested}{note}", f"{install}, if something is odd"
        )
    return Check(name, OK, f"{installed}{note}")


def check_devices(device: str = "auto") -> Iterator[Check]:
    """Name the processor and every GPU, and compute something on the device that was asked for."""
    import torch

    yield Check("cpu", OK, _cpu())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index)
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield Check(
            "gpu",
            WARN,
            f"a driver is here, but torch {torch.__version__} is built without CUDA",
            "install a CUDA build of the same torch version",
        )
    elif shutil.which("nvidia-smi"):
        yield Check(
            "gpu",
            WARN,
            "a driver is here, but torch sees no device",
            "check nvidia-smi, CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Check("gpu", OK, "none; everything runs on the CPU")
    try:
        chosen = choose_device(device)
        torch.ones(8, 8, device=chosen).matmul(torch.ones(8, 8, device=chosen)).sum().item()
        precision = dtype_name(choose_precision("auto", chosen))
        yield Check("device", OK, f"'{device}' is {chosen}; precision 'auto' is {precision} there")
    except ItemkitError as error:
        yield Check("device", FAIL, str(error), "see above, or `--device cpu`")
    except RuntimeError as error:
        yield Check("device", FAIL, f"'{device}' does not compute: {first_line(error)}", "try `--device cpu`")


def _cpu() -> str:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(
            (key.strip(), value.strip())
            for key, _, value in (line.partition(":") for line in info.read_text().splitlines())
        )
        name = fields.get("model name", name)
        flags = {"amx_bf16", "avx512_bf16"} & set(fields.get("flags", "").split())
    fast = f"bfloat16 by {' and '.join(sorted(flags))}" if flags else "no bfloat16 instructions"
    return f"{name}, {usable} cores, {torch.get_num_threads()} threads, {fast}"


def _gpu(index: int) -> Check:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    memory = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    detail = f"{torch.cuda.get_device_name(index)}, {memory}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    return Check(f"gpu cuda:{index}", OK, detail)


def check_memory() -> Check:
    """Compare the free memory with what the mini preset takes."""
    available = _available_memory_gb()
    if available is None:
        return Check("memory", OK, "unknown on this system")
    if available < MEMORY_GB:
        return Check(
            "memory",
            WARN,
            f"{available:.1f} GB free, {MEMORY_GB:.0f} GB is enough for mini",
            "close other programs, or use a smaller --batch-size",
        )
    return Check("memory", OK, f"{available:.1f} GB free")


def _available_memory_gb() -> float | None:
    found = []
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    # a container may be given less than the machine has
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found) / 1e9 if found else None


def check_disk(folder: Path) -> Check:
    """Compare the free disk space of a folder with what the mini preset takes."""
    free = shutil.disk_usage(folder).free / 1e9
    if not os.access(folder, os.W_OK):
        return Check("disk", WARN, "this folder cannot be written to", "give --out a folder of your own")
    if free < DISK_GB:
        return Check(
            "disk", WARN, f"{free:.1f} GB free here, {DISK_GB:.0f} GB is enough for mini", "free some space"
        )
    return Check("disk", OK, f"{free:.0f} GB free in this folder")


Box = tuple[float, float, float, float]

# Share of the cases that must be right; our choice. A random encoder finds the right one of n captions in one
# of n cases. 0.9 leaves room for one odd image; a captioner may name a subject by a word that nobody listed.
ENCODER_SHARE, CAPTIONER_SHARE, LOCALISER_SHARE = 0.9, 0.7, 0.5


@dataclass(frozen=True)
class Case:
    """An image whose content is known.

    Attributes
    ----------
    name : str
        Short name for messages.
    image : PIL image, RGB
        The image.
    caption : str
        A caption that fits it and none of the other cases.
    words : tuple of str
        A generated caption should hold one of these.
    parts : tuple of (phrase, box)
        Objects to point at; boxes in pixels of the image, x0, y0, x1, y1.
    """

    name: str
    image: Image.Image
    caption: str
    words: tuple[str, ...] = ()
    parts: tuple[tuple[str, Box], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How often a model was right.

    Attributes
    ----------
    model : str
        "encoder", "captioner" or "localiser".
    question : str
        What it was asked.
    right, total : int
        Correct answers, questions.
    needed : float
        Share of correct answers that counts as working.
    misses : tuple of str
        One sentence per wrong answer.
    """

    model: str
    question: str
    right: int
    total: int
    needed: float
    misses: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether enough answers were right; no question at all passes nothing."""
        return self.total > 0 and self.right >= self.needed * self.total


# file, caption, words, parts with boxes as fractions of width and height (marked by eye)
_PHOTOS: tuple[tuple[str, str, tuple[str, ...], tuple[tuple[str, Box], ...]], ...] = (
    (
        "astronaut.png",
        "a smiling astronaut in an orange space suit in front of an American flag",
        ("astronaut", "woman", "suit"),
        (("a space shuttle", (0.69, 0.0, 0.90, 0.54)), ("an American flag", (0.0, 0.0, 0.22, 0.95))),
    ),
    (
        "chelsea.png",
        "the face of a ginger cat",
        ("cat", "kitten"),
        (("the nose of a cat", (0.48, 0.74, 0.66, 0.90)),),
    ),
    (
        "coffee.png",
        "a cup of coffee on a wooden table",
        ("coffee", "cup", "espresso", "tea"),
        (("a metal spoon", (0.53, 0.58, 0.69, 0.82)),),
    ),
    (
        "rocket.jpg",
        "a rocket on its launch pad at night",
        ("rocket", "missile", "launch", "space"),
        (("a rocket", (0.46, 0.28, 0.56, 1.0)),),
    ),
    (
        "camera.png",
        "a black and white photo of a man looking through a camera on a tripod",
        ("man", "camera", "photographer", "tripod"),
        (("a camera on a tripod", (0.43, 0.25, 0.78, 1.0)),),
    ),
    ("coins.png", "rows of old coins", ("coin", "coins", "money"), ()),
    (
        "motorcycle_left.png",
        "a red motorcycle parked in a garage",
        ("motorcycle", "motorbike", "bike"),
        (("the front wheel of a motorcycle", (0.69, 0.56, 0.94, 0.93)),),
    ),
    (
        "hubble_deep_field.jpg",
        "distant galaxies and stars in the dark sky",
        ("galaxies", "galaxy", "stars", "space"),
        (),
    ),
    ("page.png", "a page of printed text", ("text", "page", "paper", "book", "document", "words"), ()),
    (
        "china.jpg",
        "a Chinese pagoda among trees beside a lake",
        ("pagoda", "temple", "tower", "building", "palace"),
        (("a pagoda", (0.10, 0.07, 0.58, 0.88)),),
    ),
    (
        "flower.jpg",
        "a close-up of an orange dahlia",
        ("flower", "dahlia", "petals"),
        (("an orange flower", (0.26, 0.19, 0.70, 0.84)),),
    ),
)


def photo_cases() -> list[Case]:
    """Photographs that come with scikit-image and scikit-learn, with captions and a few boxes."""
    import skimage
    import sklearn

    folders = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    )
    cases = []
    for file, caption, words, parts in _PHOTOS:
        image = load_image(next(folder / file for folder in folders if (folder / file).is_file()))
        width, height = image.size
        boxes = tuple(
            (phrase, (x0 * width, y0 * height, x1 * width, y1 * height)) for phrase, (x0, y0, x1, y1) in parts
        )
        cases.append(Case(Path(file).stem, image, caption, words, boxes))
    return cases


def ask_encoder(encoder: Any, cases: Sequence[Case]) -> Outcome:
    """Ask whether each image's own caption wins among the captions of all cases.

    Parameters
    ----------
    encoder : Encoder
        Anything with ``preprocess``, ``encode_images`` and ``encode_texts``.
    cases : sequence of Case
        At least two, with different captions.

    Returns
    -------
    Outcome
    """
    pooled = _embed(encoder, cases).pooled
    winners = (pooled @ encoder.encode_texts([case.caption for case in cases]).T).argmax(dim=1).tolist()
    misses = [
        f"{case.name} is closest to '{cases[winner].caption}'"
        for case, winner in zip(cases, winners, strict=True)
        if cases[winner].caption != case.caption
    ]
    return _outcome("encoder", "the right caption wins", len(cases), ENCODER_SHARE, misses)


def ask_captioner(captioner: Any, cases: Sequence[Case]) -> Outcome:
    """Ask whether each generated caption names the subject.

    Parameters
    ----------
    captioner : Captioner
        Anything with ``caption(images)`` that returns records with a ``text``.
    cases : sequence of Case
        Those without ``words`` are left out.

    Returns
    -------
    Outcome
    """
    asked = [case for case in cases if case.words]
    captions = [caption.text for caption in captioner.caption([case.image for case in asked])]
    misses = [
        f"{case.name} is called '{text}', expected one of {', '.join(case.words)}"
        for case, text in zip(asked, captions, strict=True)
        if not set(case.words) & set(text.lower().replace(".", " ").replace(",", " ").split())
    ]
    return _outcome("captioner", "the caption names the subject", len(asked), CAPTIONER_SHARE, misses)


def ask_localiser(localiser: Any, encoder: Any, cases: Sequence[Case]) -> Outcome:
    """Ask whether the centre of each located box lies on the object.

    Parameters
    ----------
    localiser : Localiser
        Anything with ``needs_patches`` and ``locate``.
    encoder : Encoder
        The encoder it works with.
    cases : sequence of Case
        Those without ``parts`` are left out.

    Returns
    -------
    Outcome
    """
    import torch

    asked = [case for case in cases if case.parts]
    parts = [(case, phrase, box) for case in asked for phrase, box in case.parts]
    owner = torch.tensor([row for row, case in enumerate(asked) for _ in case.parts])
    regions = localiser.locate(
        [case.image for case in asked],
        _embed(encoder, asked, patches=localiser.needs_patches),
        encoder.encode_texts([phrase for _, phrase, _ in parts]),
        owner,
        phrases=[phrase for _, phrase, _ in parts],
    )
    misses = []
    for (case, phrase, (x0, y0, x1, y1)), found in zip(parts, regions.boxes.tolist(), strict=True):
        x, y = (found[0] + found[2]) / 2, (found[1] + found[3]) / 2
        if not (x0 <= x <= x1 and y0 <= y <= y1):
            misses.append(f"'{phrase}' in {case.name} is placed at ({x:.0f}, {y:.0f})")
    return _outcome("localiser", "the box points at the object", len(parts), LOCALISER_SHARE, misses)


def _embed(encoder: Any, cases: Sequence[Case], patches: bool = False) -> Any:
    import torch

    pixels: Tensor = torch.stack([encoder.preprocess(case.image) for case in cases])
    return encoder.encode_images(pixels, patches=patches)


def _outcome(model: str, question: str, total: int, needed: float, misses: Sequence[str]) -> Outcome:
    return Outcome(model, question, total - len(misses), total, needed, tuple(misses))


def run_doctor(
    preset: str | Preset = "mini",
    device: str = "auto",
    deep: bool = False,
    cases: Callable[[], Sequence[Case]] | None = None,
    report: Callable[[Check], Any] | None = None,
) -> list[Check]:
    """Look at everything a preset needs.

    Parameters
    ----------
    preset : str or Preset
        Whose models are looked for.
    device : str
        "auto", "cpu", "cuda", "cuda:1", ...
    deep : bool
        Also build the models and ask them questions with known answers; takes as long as loading them.
    cases : callable, optional
        Makes the images and captions of the deep test; by default photographs (`photo_cases`). The
        mini models know renders only, so the caller hands over the laboratory's.
    report : callable, optional
        Gets each check as soon as it is done, e.g. ``print``.

    Returns
    -------
    list of Check
        In the order of looking; see `exit_status`.
    """
    checks = []
    for check in _look(preset, device, deep, cases):
        checks.append(check)
        if report is not None:
            report(check)
    return checks


def exit_status(checks: Sequence[Check]) -> int:
    """0 when nothing failed, else 1; warnings do not count."""
    return int(any(check.status == FAIL for check in checks))


def summary(checks: Sequence[Check]) -> str:
    """Sum up in one line how many checks were fine."""
    count = {status: sum(check.status == status for check in checks) for status in (OK, WARN, FAIL)}
    verdict = "not ready" if count[FAIL] else "ready"
    return f"{verdict}: {count[OK]} fine, {count[WARN]} to look at, {count[FAIL]} failed"


def _look(
    preset: str | Preset, device: str, deep: bool, cases: Callable[[], Sequence[Case]] | None
) -> Iterator[Check]:
    yield check_python()
    yield from check_packages()
    yield from check_devices(device)
    yield check_memory()
    yield check_disk(Path.cwd())
    try:
        chosen = get_preset(preset) if isinstance(preset, str) else preset
    except ItemkitError as error:
        yield Check("preset", FAIL, str(error), "name another preset: `itemkit doctor --preset mini`")
        return
    models = list(_models(chosen))
    yield from models
    if deep and all(check.status != FAIL for check in models):
        yield from _deep(chosen, device, cases or photo_cases)
    elif deep:
        yield Check("deep test", FAIL, "not run: a model is missing", "get the models named above first")


def _models(preset: Preset) -> Iterator[Check]:
    """Find every model of a preset without loading it."""
    try:
        places = preset.find()
    except ItemkitError as error:
        yield Check("models", FAIL, str(error), "correct the name")
        return
    for part in PARTS:
        model, place = getattr(preset, part), places.get(part)
        if isinstance(place, ModelNotFound):
            remedy = MINI_REMEDY if preset.name == "mini" else weights.REMEDY
            found, _, more = str(place).partition(weights.REMEDY)
            todo = f"{remedy.replace(weights.ANY_PRESET, preset.name)}{more}".strip()
            yield Check(part, FAIL, found, todo)
        elif place is not None:
            yield _present(part, place)
        elif model is None:
            yield Check(part, OK, "left out")
        else:
            by_name = isinstance(model, str)
            yield Check(part, OK, f"'{model}', works with the encoder" if by_name else "given as an object")


def _present(part: str, place: weights.Located) -> Check:
    path = place.path
    files = [path] if path.is_file() else weights.weight_files(path)
    try:
        for file in files:
            _refuse_damaged(file)
    except ModelNotFound as error:
        return Check(part, FAIL, str(error), "fetch it again")
    # the same hashes as in the run.json of a feature store
    if part == "encoder":
        digest = weights.file_hash(files[0])
    else:
        digest = weights.folder_hash(path, recursive=part == "parser")
    return Check(part, OK, f"{weights.tidy(path)}, sha256 {digest[:12]}")


def _refuse_damaged(file: Path) -> None:
    """Read the table of contents of a weights file: a pointer of Git LFS or half a download has none."""
    if file.suffix != ".safetensors":
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ModelNotFound(
            f"{weights.tidy(file)} ({size} bytes) is not whole: {weights.first_line(error)}"
        ) from error


def _deep(preset: Preset, device: str, make_cases: Callable[[], Sequence[Case]]) -> Iterator[Check]:
    """Build the models and ask them questions with known answers."""
    try:
        parts = preset.build(device)
    except ItemkitError as error:
        yield Check(
            "deep test", FAIL, f"the models cannot be built: {error}", "fetch them again, then repeat"
        )
        return
    cases = make_cases()
    yield _judge(ask_encoder(parts.encoder, cases))
    if parts.captioner is not None:
        yield _judge(ask_captioner(parts.captioner, cases))
    if parts.localiser is not None:
        yield _judge(ask_localiser(parts.localiser, parts.encoder, cases))


def _judge(outcome: Outcome) -> Check:
    detail = f"{outcome.question} in {outcome.right} of {outcome.total}"
    if outcome.misses:
        more = f" and {len(outcome.misses) - 3} more" if len(outcome.misses) > 3 else ""
        detail += f" ({'; '.join(outcome.misses[:3])}{more})"
    if outcome.passed:
        return Check(f"deep {outcome.model}", OK, detail)
    # No localiser was ever measured on these photographs, so a weak one is told, not condemned.
    status = WARN if outcome.model == "localiser" else FAIL
    todo = (
        "compare weights, preprocessing and tokenizer with where the model comes from; do not extract with it"
    )
    return Check(f"deep {outcome.model}", status, f"{detail}, needed {outcome.needed:.0%}", todo)
