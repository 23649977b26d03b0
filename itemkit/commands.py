"""What each command does: a few lines over one function of the package, which is imported only then."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from itemkit.presets import Preset

PARTS = ("captioner", "parser", "encoder", "localiser")


def _preset(args: argparse.Namespace, use_variable: bool = True) -> Preset:
    from itemkit.presets import get_preset

    parts = {part: getattr(args, part) for part in PARTS if getattr(args, part)}
    return get_preset(args.preset, getattr(args, "models", None), use_variable=use_variable, **parts)


def _manifest(args: argparse.Namespace) -> pd.DataFrame:
    from itemkit.manifest import read_manifest

    options = {"root": args.root, "real_root": args.real_root, "images_to": args.images_to}
    return read_manifest(args.manifest, args.layout, **options)


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)


def doctor(args: argparse.Namespace) -> int:
    """Say whether this machine is ready."""
    from itemkit.doctor import exit_status, run_doctor, summary

    cases: Callable[[], Any] | None = None
    if args.deep and args.preset == "mini":
        from minilab.truth import doctor_cases

        cases = doctor_cases
    checks = run_doctor(_preset(args), args.device, args.deep, cases, report=print)
    print(summary(checks))
    return exit_status(checks)


def run(args: argparse.Namespace) -> int:
    """Run the whole method."""
    from itemkit.run import run_all

    run_all(args.preset, args.data, args.out, args.device)
    return 0


def audit(args: argparse.Namespace) -> int:
    """Print the audit of a data set, and equalise it if asked to."""
    from itemkit.audit import audit, equalise_folder
    from itemkit.images import EqualiseConfig

    given = {k: getattr(args, k) for k in ("size", "codec", "quality") if getattr(args, k) is not None}
    if given and not args.equalise:
        raise InputError(f"--{next(iter(given))} goes with --equalise FOLDER, which says where to write")
    config = EqualiseConfig(**given)
    manifest = _manifest(args)
    report = audit(manifest, progress=True)
    print(report.to_text())
    reports = {"as they are": report}
    if args.csv:
        _write_csv(report.table, args.csv)
    if args.equalise:
        equalised = equalise_folder(manifest, args.equalise, config, progress=True)
        print(f"\nAfter equalising into {args.equalise}:\n")
        reports["equalised"] = audit(equalised, progress=True)
        print(reports["equalised"].to_text(before=report))
    if args.figure:
        _draw_audit(reports, args.figure)
    return 0


def _draw_audit(reports: dict[str, Any], folder: Path) -> None:
    from matplotlib.figure import Figure

    from itemkit import plots
    from itemkit.audit import ranking

    plots.style()
    table = ranking(reports)
    n_rows = table["property"].nunique()
    fig = Figure(figsize=(5.5, 0.8 + 0.25 * n_rows))
    plots.intervals(
        fig.add_subplot(),
        table,
        y="property",
        hue="data" if len(reports) > 1 else None,
        xlabel="AUROC of this property alone (95 % interval; 0.5 is chance)",
        reference=0.5,
    )
    n = ", ".join(f"{name}: n = {len(report.measurements):,}" for name, report in reports.items())
    plots.save(fig, "audit", table, folder, n)


def extract(args: argparse.Namespace) -> int:
    """Compute features of a manifest's images."""
    from dataclasses import replace

    from itemkit import schema
    from itemkit.decode import DecodeConfig, scaled_jpeg
    from itemkit.extraction import extract
    from itemkit.perturb import get_perturbation
    from itemkit.workflow import warn_if_foreign
    from minilab.fakes import SOURCE

    preset = _preset(args)
    manifest = _manifest(args)
    ray = None
    if args.engine == "ray":
        from itemkit.engine_ray import RayOptions

        ray = RayOptions(address=args.address, workers=args.workers, gpus_per_worker=args.gpus_per_worker)
    if not (manifest[schema.SOURCE] == SOURCE).all():
        warn_if_foreign(preset.name, args.manifest)
    decode = DecodeConfig(isolate=args.isolate)
    if args.scaled_jpeg:
        decode = replace(decode, loader=scaled_jpeg(args.scaled_jpeg))
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
        decode=decode,
        retry_errors=args.retry_errors,
        config=preset.record(),
    )
    return 1 if report.errors or report.left else 0


def train(args: argparse.Namespace) -> int:
    """Train a detector on stored features."""
    from itemkit.workflow import read_features, train_detector, warn_about_features

    features = read_features(args.features)
    warn_about_features(features)
    detector = train_detector(features, args.representation, args.train_on, args.seeds)
    detector.save(args.out)
    print(f"detector written to {args.out}")
    try:
        print(f"its threshold at 5 % false positives: {detector.threshold(0.05).statement}")
    except InputError as error:  # too few real images; the scores are as good as ever
        print(f"itemkit: warning: {error}", file=sys.stderr)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Print a detector's metrics, and whether its promises are kept."""
    from itemkit.calibrate import told
    from itemkit.detector import Detector
    from itemkit.workflow import promises, read_features, take_split, warn_about_features

    features = read_features(args.features)
    warn_about_features(features)
    detector, test = Detector.load(args.detector), take_split(features, args.split)
    table = detector.evaluate(test, args.fpr)
    print(table.round(3).to_string(index=False))
    try:
        lines = told(promises(detector, test))
    except InputError as reason:  # the detector knows all of these images; their metrics stand all the same
        lines = [f"not checked: {reason}"]
    print("\nWhat was promised, and what happened:", *lines, sep="\n  ")
    if args.csv:
        _write_csv(table, args.csv)
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a store's embeddings in another layout."""
    from itemkit import schema
    from itemkit.export import export_clip_retrieval, export_numpy
    from itemkit.store import EMBEDDINGS, load_features

    if args.format == "clip-retrieval":  # it has no place for objects, so they are not even read
        features = load_features(args.features, (schema.IMAGE_EMB, schema.CAPTION_EMB))
        export_clip_retrieval(features, args.to)
    else:
        features = load_features(args.features, EMBEDDINGS)
        export_numpy(features, args.to)
    print(f"{len(features):,} images written to {args.to}")
    return 0


def study(args: argparse.Namespace) -> int:
    """Run a protocol and print its table."""
    from itemkit.study_run import run_study

    given = ("seeds", "scores", "skip_missing", "per_set", "without", "jobs")
    options = {name: getattr(args, name) for name in given}
    path = run_study(args.protocol, args.data, args.out, _preset(args), args.device, **options)
    print(path.read_text(encoding="utf-8"))
    print(f"written to {path} and table.csv beside it")
    return 0


def detect(args: argparse.Namespace) -> int:
    """Judge single images."""
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


def download(args: argparse.Namespace) -> int:
    """Fetch a preset's models."""
    from itemkit.download import MODELS_FILE, download

    # ITEMKIT_MODELS may be set already, for the runs to come, and name the very folder that is to be filled
    download(_preset(args, use_variable=False), args.to, report=print)
    if args.to:
        print(f"what was fetched is noted in {args.to / MODELS_FILE}; use it with --models {args.to}")
    return 0


def lab(args: argparse.Namespace) -> int:
    """Build, check or lay out the mini laboratory."""
    from itemkit.presets import mini_folder

    folder = args.data or mini_folder()
    if args.action == "images":
        from minilab.fakes import materialise

        print(materialise(folder / "fakes.parquet", args.out / "mini"))
        return 0
    from minilab.build import PARTS, build, check

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
