"""Wheels for a machine with a GPU and no network: downloaded, stripped, in a folder that git ignores.

    python -m tools.wheels
    python -m pip install --no-index --no-deps --target FOLDER build/wheels/*.whl      (there)

The versions are those installed here. Debug symbols, tests and sources of compiled modules are left out, and
RECORD lists what remains, so pip installs them like any other wheel. What a machine for PyTorch has anyway
(torch, transformers, timm, pandas, pyarrow, scikit-learn, seaborn, numba ...) is not among them.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath

from itemkit.errors import InputError

MISSING_THERE = (
    "open_clip_torch", "ftfy", "wcwidth", "spacy", "thinc", "blis", "srsly", "preshed", "cymem", "murmurhash",
    "catalogue", "confection", "wasabi", "weasel", "cloudpathlib", "smart_open", "spacy-legacy",
    "spacy-loggers", "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "umap-learn",
    "pynndescent",
)  # fmt: skip
# pip matches the number after "manylinux" exactly
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
# what no running program reads; .cu stays, thinc compiles those
SOURCES = {".pyx", ".pxd", ".pxi", ".c", ".cpp", ".h", ".hpp"}


def download(names: Sequence[str], python: str, folder: Path) -> None:
    """Fetch the wheel of each name, in the version installed here, for another Python on Linux."""
    wanted = [f"{name}=={metadata.version(name)}" for name in names]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, *platforms, "-d", str(folder)]
    if subprocess.run([*command, *wanted]).returncode:
        raise InputError(f"pip could not fetch all wheels for Python {python}; what it said stands above")


def slim(wheel: Path) -> None:
    """Take out of a wheel what no running program reads, and write its RECORD anew; its name stays."""
    with zipfile.ZipFile(wheel) as old:
        content = {name: old.read(name) for name in old.namelist() if not name.endswith("/")}
    content = {name: _stripped(data) for name, data in content.items() if _runs(PurePosixPath(name))}
    (record,) = (name for name in content if name.endswith(".dist-info/RECORD"))
    lines = io.StringIO()
    rows = [(name, digest(data), len(data)) for name, data in content.items() if name != record]
    csv.writer(lines, lineterminator="\n").writerows([*rows, (record, "", "")])
    content[record] = lines.getvalue().encode()
    # a third smaller than deflated, and Python's zipfile, with which pip unpacks, reads it
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_LZMA) as new:
        for name, data in content.items():
            new.writestr(name, data)


def _runs(path: PurePosixPath) -> bool:
    return path.suffix not in SOURCES and "tests" not in path.parts


def _stripped(data: bytes) -> bytes:
    """A compiled library without the symbols that only a debugger reads; any other file as it is."""
    if not data.startswith(b"\x7fELF"):
        return data
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        subprocess.run(["strip", "--strip-unneeded", file.name], check=True)
        return Path(file.name).read_bytes()


def digest(data: bytes) -> str:
    """Hash of a file as RECORD writes it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def problems(wheel: Path) -> list[str]:
    """In what a wheel and its RECORD differ; empty when all is well."""
    with zipfile.ZipFile(wheel) as opened:
        content = {name: opened.read(name) for name in opened.namelist() if not name.endswith("/")}
    (record,) = (name for name in content if name.endswith(".dist-info/RECORD"))
    listed = {name: rest for name, *rest in csv.reader(io.StringIO(content[record].decode()))}
    found = {name: [digest(data), str(len(data))] for name, data in content.items()} | {record: ["", ""]}
    return sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="packages (default: those that itemkit lacks there)")
    parser.add_argument("--python", default="3.12", help="of the other machine (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/wheels"), help="default: %(default)s")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if old := sorted(options.out.glob("*.whl")):
        raise InputError(f"{options.out} holds wheels already ({old[0].name} ...): remove them first")
    download(options.names or MISSING_THERE, options.python, options.out)
    before = after = 0
    for wheel in sorted(options.out.glob("*.whl")):
        was = wheel.stat().st_size
        slim(wheel)
        if wrong := problems(wheel):
            raise InputError(f"{wheel.name} does not agree with its RECORD: {wrong[0]}")
        before, after = before + was, after + wheel.stat().st_size
        print(f"{was / 2**20:6.1f} -> {wheel.stat().st_size / 2**20:5.1f} MiB  {wheel.name}")
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True).stdout.split("\0")
    own = sum(Path(name).stat().st_size for name in tracked if Path(name).is_file())
    print(f"{before / 2**20:6.1f} -> {after / 2**20:5.1f} MiB; with the files of the repository "
          f"{(after + own) / 2**20:.1f} MiB")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
