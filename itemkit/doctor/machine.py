"""What this machine has: packages beside the tested versions, devices, memory and disk."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from itemkit import _torchvision
from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import ItemkitError
from itemkit.weights import first_line

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
    here = Path(__file__).parents[1]
    for path in (here / "constraints.txt", here.parent / "constraints.txt"):
        if path.is_file():
            lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
            return dict(line.split("==") for line in lines if "==" in line)
    return {}


def requirements() -> list[tuple[Requirement, str]]:
    """What itemkit says it needs, each with the extra it belongs to ("" for the core).

    Read from the checkout's pyproject.toml, or from the metadata of an installed package.
    """
    project = Path(__file__).parents[2] / "pyproject.toml"
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
