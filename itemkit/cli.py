"""The command line: each command is a few lines over one function of the package."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit import __version__
from itemkit.errors import InputError, ItemkitError

if TYPE_CHECKING:
    import pandas as pd

    from itemkit.presets import Preset


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
        "doctor", _doctor, "Is this machine ready: packages, devices, models; one line each, with a remedy."
    )
    _model_options(c)
    c.add_argument("--deep", action="store_true", help="also load the models and ask them known questions")

    c = add(
        "run", _run, "The whole method: features, a detector, all notebooks with their figures, a summary."
    )
    _preset_options(c)
    c.add_argument("--data", help="folder or manifest (default: the mini laboratory's images)")
    c.add_argument(
        "--out", default="results", type=Path, help="folder for everything made (default: results)"
    )

    c = add(
        "audit", _audit, "What besides content tells the classes apart: format, size, quality, captions ..."
    )
    _data_options(c)
    c.add_argument("--csv", type=Path, help="also write the table")
    c.add_argument("--equalise", type=Path, metavar="FOLDER", help="write a copy with equal size and codec")
    c.add_argument("--size", type=int, metavar="PX", help="side of the equalised squares (default: 224)")
    c.add_argument("--codec", choices=("jpeg", "png"), help="codec of the equalised images (default: jpeg)")
    c.add_argument("--quality", type=int, help="JPEG quality of the equalised images (default: 90)")

    c = add(
        "extract", _extract, "Features of all images of a manifest; run it again to go on where it stopped."
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
    c.add_argument("--perturb", help="apply a perturbation first, e.g. jpeg_q50")
    _model_options(c)

    c = add("train", _train, "Train a detector on the train split of a feature store, calibrate it on val.")
    c.add_argument("features", type=Path, help="feature store")
    c.add_argument("--out", required=True, type=Path, help="folder for the detector")
    c.add_argument("--representation", default="absolute", help="which misalignment (default: absolute)")
    c.add_argument("--train-on", nargs="+", metavar="GENERATOR", help="fakes of these generators only")
    c.add_argument("--seeds", type=int, default=5, help="heads that are averaged (default: 5)")

    c = add("evaluate", _evaluate, "Metrics with intervals on the test split, for each generator.")
    c.add_argument("features", type=Path, help="feature store")
    c.add_argument("--detector", required=True, type=Path)
    c.add_argument(
        "--fpr", type=float, default=0.05, help="false-positive rate of the threshold (default: 0.05)"
    )
    c.add_argument("--split", default="test", help="split to evaluate (default: test)")
    c.add_argument("--csv", type=Path, help="also write the table")

    c = add(
        "detect", _detect, "Answer for single images: p(fake), verdict, caption, and evidence per object."
    )
    c.add_argument("images", nargs="+", help="image files")
    c.add_argument("--detector", type=Path, help="folder of a detector (default: the preset's own)")
    c.add_argument("--caption", help="use this caption instead of a generated one (one image)")
    c.add_argument("--fpr", type=float, default=0.05, help="share of real images that may be called fake")
    c.add_argument("--fnr", type=float, default=0.05, help="share of fake images that may be called real")
    c.add_argument("--json", action="store_true", help="one JSON object per image and line")
    _model_options(c)

    c = add("download", _download, "Fetch the models of a preset once, where a model hub can be reached.")
    c.add_argument("--preset", required=True, help="fast or paper")
    c.add_argument("--to", type=Path, metavar="FOLDER", help="fill a folder for a machine without a network")
    _part_options(c)

    c = add(
        "lab",
        _lab,
        "The mini laboratory: build models and fakes, train its detector, check all, lay out images.",
    )
    c.add_argument("action", choices=("build", "detector", "check", "images"))
    c.add_argument("parts", nargs="*", help="build these parts only, e.g. clip captioner")
    c.add_argument("--data", type=Path, help="folder of the laboratory (default: data/mini)")
    c.add_argument("--work", default=Path("build/lab"), type=Path, help="renders and checkpoints")
    c.add_argument("--out", default=Path("results"), type=Path, help="where images and features go")
    c.add_argument("--device", default="cpu")
    return parser


PARTS = ("captioner", "parser", "encoder", "localiser")


def _preset_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("--preset", default="mini", help="mini, fast or paper (default: mini)")
    c.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")


def _part_options(c: argparse.ArgumentParser) -> None:
    for part in PARTS:
        c.add_argument(f"--{part}", help=f"another {part}: a name or a folder")


def _model_options(c: argparse.ArgumentParser) -> None:
    _preset_options(c)
    c.add_argument("--models", help="folder of models made by `itemkit download --to FOLDER`")
    _part_options(c)


def _preset(args: argparse.Namespace) -> Preset:
    from itemkit.presets import get_preset

    parts = {part: getattr(args, part) for part in PARTS if getattr(args, part)}
    return get_preset(args.preset, getattr(args, "models", None), **parts)


def _data_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("manifest", help="CSV, Parquet or folder")
    c.add_argument("--layout", default="auto", help="how the folder is laid out (default: found out)")
    c.add_argument("--root", metavar="FOLDER", help="what a table's relative paths start from")
    c.add_argument("--real-root", metavar="FOLDER", help="second tree, with the real images")
    c.add_argument("--images-to", metavar="FOLDER", help="where to write images that a table holds inside")


def _manifest(args: argparse.Namespace) -> pd.DataFrame:
    from itemkit.manifest import read_manifest

    options = {"root": args.root, "real_root": args.real_root, "images_to": args.images_to}
    return read_manifest(args.manifest, args.layout, **options)


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)


def _doctor(args: argparse.Namespace) -> int:
    from itemkit.doctor import exit_status, run_doctor, summary

    cases: Callable[[], Any] | None = None
    if args.deep and args.preset == "mini":
        from itemkit.lab.truth import doctor_cases

        cases = doctor_cases
    checks = run_doctor(_preset(args), args.device, args.deep, cases, report=print)
    print(summary(checks))
    return exit_status(checks)


def _run(args: argparse.Namespace) -> int:
    from itemkit.report import run_all

    run_all(args.preset, args.data, args.out, args.device)
    return 0


def _audit(args: argparse.Namespace) -> int:
    from itemkit.audit import audit, equalise_folder
    from itemkit.images import EqualiseConfig

    given = {k: getattr(args, k) for k in ("size", "codec", "quality") if getattr(args, k) is not None}
    if given and not args.equalise:
        raise InputError(f"--{next(iter(given))} goes with --equalise FOLDER, which says where to write")
    config = EqualiseConfig(**given)
    manifest = _manifest(args)
    report = audit(manifest, progress=True)
    print(report.to_text())
    if args.csv:
        _write_csv(report.table, args.csv)
    if args.equalise:
        equalised = equalise_folder(manifest, args.equalise, config, progress=True)
        print(f"\nAfter equalising into {args.equalise}:\n")
        print(audit(equalised, progress=True).to_text())
    return 0


def _extract(args: argparse.Namespace) -> int:
    from itemkit import schema
    from itemkit.lab.fakes import SOURCE
    from itemkit.perturb import get_perturbation
    from itemkit.pipeline import extract
    from itemkit.workflow import warn_if_foreign

    preset = _preset(args)
    manifest = _manifest(args)
    ray = None
    if args.engine == "ray":
        from itemkit.pipeline.engine_ray import RayOptions

        ray = RayOptions(address=args.address, workers=args.workers)
    if not (manifest[schema.SOURCE] == SOURCE).all():
        warn_if_foreign(preset.name, args.manifest)
    report = extract(
        manifest,
        args.out,
        preset,
        device=args.device,
        engine=args.engine,
        ray=ray,
        captions=args.captions,
        missing=args.missing,
        batch_size=args.batch_size,
        limit=args.limit,
        transform=get_perturbation(args.perturb) if args.perturb else None,
        config=preset.record(),
    )
    return 1 if report.errors else 0


def _train(args: argparse.Namespace) -> int:
    from itemkit.workflow import read_features, train_detector

    detector = train_detector(read_features(args.features), args.representation, args.train_on, args.seeds)
    detector.save(args.out)
    print(f"detector written to {args.out}")
    try:
        print(f"its threshold at 5 % false positives: {detector.threshold(0.05).statement}")
    except InputError as error:  # too few real images; the scores are as good as ever
        print(f"itemkit: warning: {error}", file=sys.stderr)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from itemkit.detector import Detector
    from itemkit.workflow import read_features, take_split

    test = take_split(read_features(args.features), args.split)
    table = Detector.load(args.detector).evaluate(test, args.fpr)
    print(table.round(3).to_string(index=False))
    if args.csv:
        _write_csv(table, args.csv)
    return 0


def _detect(args: argparse.Namespace) -> int:
    from itemkit.workflow import detect, warn_if_foreign

    if args.caption is not None and len(args.images) > 1:
        raise InputError(f"--caption goes with one image, got {len(args.images)}; run detect once for each")
    preset = _preset(args)
    warn_if_foreign(preset.name, args.images)
    failed = 0
    rates = {"fpr": args.fpr, "fnr": args.fnr}
    for answer in detect(args.images, preset, args.detector, args.device, args.caption, **rates):
        failed += "error" in answer
        print(json.dumps(answer) if args.json else _told(answer))
    return 1 if failed else 0


def _told(answer: dict[str, Any]) -> str:
    """One image's answer as text."""
    if "error" in answer:
        return f"{answer['path']}\n  not judged: {answer['error']}"
    lines = [
        f"{answer['path']}",
        f"  verdict  {answer['verdict']}, p(fake) = {answer['p_fake']:.2f} ({answer['because']})",
        f"  caption  {answer['caption']}",
        f"  global   cosine {answer['global_cosine']:.3f}; "
        f"{answer['global_real_below']:.0%} of validation reals fit their caption less well",
    ]
    for thing in answer["objects"]:
        box = ", ".join(f"{v:.0f}" for v in thing["box"])
        lines.append(
            f"  local    {thing['phrase']}: cosine {thing['cosine']:.3f} in box ({box}); "
            f"{thing['real_below']:.0%} of objects in validation reals fit less well"
        )
    if not answer["objects"]:
        lines.append("  local    the caption names no object; judged by the whole image")
    return "\n".join(lines)


def _download(args: argparse.Namespace) -> int:
    from itemkit.download import MODELS_FILE, download

    download(_preset(args), args.to, report=print)
    if args.to:
        print(f"what was fetched is noted in {args.to / MODELS_FILE}; use it with --models {args.to}")
    return 0


def _lab(args: argparse.Namespace) -> int:
    from itemkit.presets import mini_folder

    folder = args.data or mini_folder()
    if args.action == "images":
        from itemkit.lab.fakes import materialise

        print(materialise(folder / "fakes.parquet", args.out / "mini"))
        return 0
    from itemkit.lab.build import PARTS, build, check

    if unknown := [p for p in args.parts if p not in PARTS]:
        raise InputError(f"the laboratory has no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    if args.action == "build":
        build(folder, args.work, args.parts or None, args.device)
        return 0
    if args.action == "detector":
        from itemkit.workflow import save_mini_detector

        print(save_mini_detector(args.out))
        return 0
    problems = check(folder)
    print("\n".join(problems) or "all files and measurements are as the cards say")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
