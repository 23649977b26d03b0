"""The command line: each command is a few lines over one function of the package."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from itemkit import __version__
from itemkit import commands as do
from itemkit.commands import PARTS
from itemkit.errors import ItemkitError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Words after ``itemkit``; from the command line by default.

    Returns
    -------
    int
        Exit status: 0 done, 1 done but something was wrong (errors in some images, a failed check), 2 not
        done.
    """
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(args.command(args) or 0)
    except ItemkitError as error:
        print(f"itemkit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # e.g. `itemkit evaluate ... | head`
        sys.stderr.close()
        return 141
    except OSError as error:  # a folder that may not be written, a full disk
        print(f"itemkit: {error}", file=sys.stderr)
        return 2


def _show_warning(message: Warning | str, *rest: Any, **more: Any) -> None:
    """Print what a warning says; where in the code it arose is of no use here."""
    print(f"itemkit: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="itemkit", description="Detect generated images by their misalignment with their own captions."
    )
    parser.add_argument("--version", action="version", version=f"itemkit {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run)
        return command

    c = add(
        "doctor",
        do.doctor,
        "Is this machine ready: packages, devices, models; one line each, with a remedy.",
    )
    _model_options(c)
    c.add_argument("--deep", action="store_true", help="also load the models and ask them known questions")

    c = add(
        "run",
        do.run,
        "The whole method: features, a detector, all notebooks with their figures, a summary.",
    )
    _preset_options(c)
    c.add_argument("--data", help="folder or manifest (default: the mini laboratory's images)")
    c.add_argument(
        "--out", default="results", type=Path, help="folder for everything made (default: results)"
    )

    c = add(
        "audit",
        do.audit,
        "What besides content tells the classes apart: format, size, quality, captions ...",
    )
    _data_options(c)
    c.add_argument("--csv", type=Path, help="also write the table")
    c.add_argument("--figure", type=Path, metavar="FOLDER", help="also draw it: audit.pdf, .png and .csv")
    c.add_argument("--equalise", type=Path, metavar="FOLDER", help="write a copy with equal size and codec")
    c.add_argument("--size", type=int, metavar="PX", help="side of the equalised squares (default: 224)")
    c.add_argument("--codec", choices=("jpeg", "png"), help="codec of the equalised images (default: jpeg)")
    c.add_argument("--quality", type=int, help="JPEG quality of the equalised images (default: 90)")

    c = add(
        "extract",
        do.extract,
        "Features of all images of a manifest; run it again to go on where it stopped.",
    )
    _data_options(c)
    c.add_argument("--out", required=True, type=Path, help="the feature store to make or to continue")
    c.add_argument("--captions", default="generate", choices=("generate", "user"), help="whose captions")
    c.add_argument(
        "--missing", default="raise", choices=("raise", "generate", "error"), help="no user caption"
    )
    c.add_argument("--batch-size", type=int, help="images per batch (default: by device)")
    c.add_argument("--limit", type=int, help="first rows only")
    c.add_argument("--engine", default="local", choices=("local", "ray"), help="this process, or Ray workers")
    c.add_argument("--address", help="Ray cluster to join (default: start one on this machine)")
    c.add_argument("--workers", type=int, default=2, help="Ray workers (default: 2)")
    c.add_argument("--gpus-per-worker", type=float, default=0, help="GPUs of each Ray worker (default: 0)")
    c.add_argument(
        "--scaled-jpeg",
        type=int,
        metavar="PIXELS",
        help="decode large JPEG files at a fraction, shorter side at least PIXELS (e.g. 448): quicker, other "
        "pixels, another store",
    )
    c.add_argument("--perturb", help="apply a perturbation first, e.g. jpeg_q50")
    c.add_argument(
        "--retry-errors", action="store_true", help="try images again that were found to be damaged before"
    )
    c.add_argument(
        "--isolate", action="store_true", help="decode in processes of their own: slower, survives any file"
    )
    _model_options(c)

    c = add(
        "train",
        do.train,
        "Train a detector on the train split of a feature store, calibrate it on val.",
    )
    c.add_argument("features", type=Path, help="feature store")
    c.add_argument("--out", required=True, type=Path, help="folder for the detector")
    c.add_argument("--representation", default="absolute", help="which misalignment (default: absolute)")
    c.add_argument("--train-on", nargs="+", metavar="GENERATOR", help="fakes of these generators only")
    c.add_argument("--seeds", type=int, default=5, help="heads that are averaged (default: 5)")

    c = add("evaluate", do.evaluate, "Metrics with intervals on the test split, for each generator.")
    c.add_argument("features", type=Path, help="feature store")
    c.add_argument("--detector", required=True, type=Path)
    c.add_argument(
        "--fpr", type=float, default=0.05, help="false-positive rate of the threshold (default: 0.05)"
    )
    c.add_argument("--split", default="test", help="split to evaluate (default: test)")
    c.add_argument("--csv", type=Path, help="also write the table")

    c = add("export", do.export, "Embeddings of a feature store in the files of other tools.")
    c.add_argument("features", type=Path, help="feature store")
    c.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="a new or empty folder")
    c.add_argument(
        "--format",
        required=True,
        choices=("clip-retrieval", "numpy"),
        help="clip-retrieval: images and captions as it keeps them, float16; numpy: everything, with objects",
    )

    c = add(
        "study",
        do.study,
        "A protocol of the field: misalignment beside every control, raw and equalised.",
    )
    c.add_argument("--protocol", required=True, help="genimage, ufd19, forensynths or mini")
    c.add_argument("--data", metavar="ROOT", help="folder of the data set (mini: the laboratory's images)")
    c.add_argument(
        "--out", default="results", type=Path, help="goes to OUT/study-PROTOCOL (default: results)"
    )
    c.add_argument("--seeds", type=int, default=5, help="each draws other training images (default: 5)")
    c.add_argument(
        "--scores", action="append", default=[], metavar="NAME=CSV", help="scores of a detector run elsewhere"
    )
    c.add_argument("--without", action="append", default=[], metavar="CONTROL", help="leave out, e.g. cnn")
    c.add_argument("--skip-missing", action="store_true", help="go on without test sets that are not there")
    c.add_argument("--per-set", type=int, metavar="N", help="at most N images of a set, class and split")
    c.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    _model_options(c)

    c = add(
        "detect",
        do.detect,
        "Answer for single images: p(fake), verdict, caption, and evidence per object.",
    )
    c.add_argument("images", nargs="+", help="image files")
    c.add_argument("--detector", type=Path, help="folder of a detector (default: the preset's own)")
    c.add_argument("--caption", help="use this caption instead of a generated one (one image)")
    c.add_argument("--fpr", type=float, default=0.05, help="share of real images that may be called fake")
    c.add_argument("--fnr", type=float, default=0.05, help="share of fake images that may be called real")
    c.add_argument("--json", action="store_true", help="one JSON object per image and line")
    _model_options(c)

    c = add("download", do.download, "Fetch the models of a preset once, where a model hub can be reached.")
    c.add_argument("--preset", required=True, help="fast or paper")
    c.add_argument("--to", type=Path, metavar="FOLDER", help="fill a folder for a machine without a network")
    _part_options(c)

    c = add(
        "lab",
        do.lab,
        "The mini laboratory: build models and fakes, train its detector, check all, lay out images.",
    )
    c.add_argument("action", choices=("build", "detector", "check", "images"))
    c.add_argument("parts", nargs="*", help="build these parts only, e.g. clip captioner")
    c.add_argument("--data", type=Path, help="folder of the laboratory (default: data/mini)")
    c.add_argument("--work", default=Path("build/lab"), type=Path, help="renders and checkpoints")
    c.add_argument("--out", default=Path("results"), type=Path, help="where images and features go")
    c.add_argument("--device", default="cpu")
    return parser


def _preset_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("--preset", default="mini", help="mini, fast or paper (default: mini)")
    c.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")


def _part_options(c: argparse.ArgumentParser) -> None:
    kinds = {
        "captioner": "a name on the hub, or a folder",
        "parser": "a spaCy pipeline, or a folder",
        "encoder": "open_clip's NAME:TAG, e.g. ViT-B-16:openai; hf-hub:OWNER/NAME; or a folder",
        "localiser": "whole, grid, dense, owlv2 or grounding_dino; the last two also as NAME:FOLDER",
    }
    for part in PARTS:
        c.add_argument(f"--{part}", help=f"another {part}: {kinds[part]}")


def _model_options(c: argparse.ArgumentParser) -> None:
    _preset_options(c)
    c.add_argument("--models", help="folder of models made by `itemkit download --to FOLDER`")
    _part_options(c)


def _data_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("manifest", help="CSV, Parquet or folder")
    c.add_argument("--layout", default="auto", help="how the folder is laid out (default: found out)")
    c.add_argument("--root", metavar="FOLDER", help="what a table's relative paths start from")
    c.add_argument("--real-root", metavar="FOLDER", help="second tree, with the real images")
    c.add_argument("--images-to", metavar="FOLDER", help="where to write images that a table holds inside")
