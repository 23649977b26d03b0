"""``python -m minilab``: build the mini laboratory, check it, train its detector, lay its images out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from itemkit.devices import choose_device
from itemkit.errors import InputError, ItemkitError
from itemkit.presets import mini_folder
from itemkit.workflow import lab_manifest
from minilab.detector import laboratory, save_detector

ACTIONS = {
    "build": "train the models and generators and sample the fakes, or only the PARTS that are named",
    "data": "render the real images, the new renders and the doctor's questions again (`build data`)",
    "detector": "train the detector of the mini preset on all generators",
    "check": "compare all files with their hashes and measure the models again",
    "images": "lay the data set out as files, with a manifest",
}


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="python -m minilab",
        description=__doc__.splitlines()[0].partition(": ")[2],
        epilog="\n".join(f"{name:<9} {what}" for name, what in ACTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("action", choices=ACTIONS)
    p.add_argument("parts", nargs="*", metavar="PART", help="of build; a wrong name lists them")
    p.add_argument("--data", type=Path, help="folder of the laboratory (default: data/mini)")
    p.add_argument(
        "--work", type=Path, default=Path("build/lab"), help="renders and checkpoints: %(default)s"
    )
    p.add_argument("--out", type=Path, default=Path("results"), help="images, features: %(default)s")
    p.add_argument(
        "--until",
        type=int,
        metavar="STEP",
        help="cut trainings off at this step; a later build prolongs them",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        return run(options)
    except ItemkitError as error:
        print(f"minilab: error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Do what the options ask for; returns the exit status."""
    if options.parts and options.action != "build":
        raise InputError(f"{options.action} takes no parts, got {', '.join(options.parts)}")
    folder, device = options.data or mini_folder(), str(choose_device(options.device))
    if options.action == "images":
        with laboratory(options.data):
            print(f"{len(lab_manifest(options.out)):,} images laid out in {options.out / 'mini'}")
        return 0
    if options.action == "detector":
        with laboratory(options.data):
            save_detector(options.out, device)
        print(f"detector written to {folder / 'models' / 'detector'}")
        return 0
    from minilab.build import PARTS, build, check

    if options.action == "check":
        problems = check(folder)
        print("\n".join(problems) or "all files and measurements are as the cards say")
        return 1 if problems else 0
    parts = ["data"] if options.action == "data" else options.parts
    if unknown := [p for p in parts if p not in PARTS]:
        raise InputError(f"the laboratory has no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    build(folder, options.work, parts or None, device, options.until)
    return 0


if __name__ == "__main__":
    sys.exit(main())
