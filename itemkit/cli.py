"""The command line: each command is a few lines over functions of the package.

Everything is used as ``itemkit.module.name``, which the package imports when it is first asked for: help is
quick, and loads no library.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import itemkit
from itemkit import schema
from itemkit.errors import InputError, ItemkitError

if TYPE_CHECKING:
    import pandas as pd

    from itemkit.features import Features
    from itemkit.presets import Preset

PARTS = {
    "captioner": "a name on the hub, a folder, or MODULE:OBJECT of your own",
    "parser": "a spaCy pipeline, a folder, or MODULE:OBJECT of your own",
    "encoder": "open_clip's NAME:TAG, e.g. ViT-B-16:openai; hf-hub:OWNER/NAME; or a folder",
    "localiser": "whole, grid, dense; owlv2, grounding_dino, object_detector (or NAME:FOLDER); MODULE:OBJECT",
}
STATUS = (
    "Exit status: 0 done; 1 done, but something was left out or failed in part (an image, a notebook); "
    "2 not done (an unusable input or option)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of the command line; returns the exit status (see `STATUS`)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a caption in any script ends no run, whatever the terminal knows
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest, **more: _say(f"itemkit: warning: {message}")
            if getattr(args, "threads", None):
                itemkit.devices.set_threads(args.threads)
            return int(args.command(args) or 0)
    except BrokenPipeError:  # e.g. `itemkit evaluate ... | head`
        sys.stderr.close()
        return 141
    except (ItemkitError, OSError) as error:  # the latter: a folder that may not be written, a full disk
        _say(f"itemkit: {error}")
    except MemoryError as error:
        _say(f"itemkit: the memory is full ({error}); close other programs, or take a smaller --batch-size")
    except KeyboardInterrupt:
        return 130
    return 2


def _print(*lines: object, file: Any = None) -> None:
    """Print lines of a result; what data wrote into them cannot act on the terminal, nor begin a new one."""
    for line in lines:
        print(itemkit.text.printable(line), file=file, flush=True)


def _say(*lines: object) -> None:
    """Print lines for the reader, not the result: on stderr, so that a pipe stays clean."""
    _print(*lines, file=sys.stderr)


# ------------------------------------------------------------------------------------------------ the options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse does, with words that cannot act on a terminal; a shell's ``*`` puts names there."""
        super().error(itemkit.text.printable(message))


class _Help(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Add an option's default where it has one."""
        shown = isinstance(action.default, (int, float, str, Path)) and action.nargs != 0
        return f"{action.help} (default: %(default)s)" if shown else action.help


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least 1")
    return int(text)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a share between 0 and 1, e.g. 0.05")


def _parser() -> argparse.ArgumentParser:
    about = "Detect generated images by their misalignment with their own captions."
    parser = _Parser(prog="itemkit", description=about, epilog=STATUS)
    parser.add_argument("--version", action="version", version=f"itemkit {itemkit.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    # options that several commands share
    parts, machine, images, rates, store = (argparse.ArgumentParser(add_help=False) for _ in range(5))
    store.add_argument("features", type=Path, help="feature store")
    for part, kinds in PARTS.items():
        parts.add_argument(f"--{part}", help=f"another {part}: {kinds}")
    option = machine.add_argument
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    option("--threads", type=_positive, metavar="N", help="of each process; 1 is quickest on a busy machine")
    models = argparse.ArgumentParser(add_help=False, parents=[machine, parts])
    models.add_argument("--preset", default="mini", help="mini, fast or paper")
    models.add_argument("--models", help="folder of models made by `itemkit download --to FOLDER`")
    option = images.add_argument
    option("--layout", default="auto", help="how the folder is laid out; auto finds out")
    option("--root", metavar="FOLDER", help="what a table's relative paths start from")
    option("--real-root", metavar="FOLDER", help="second tree, with the real images")
    option("--images-to", metavar="FOLDER", help="where to write images that a table holds inside")
    option = rates.add_argument
    option("--fpr", type=_share, default=0.05, help="share of real images that may be called fake")
    option("--fnr", type=_share, default=0.05, help="share of fake images that may be called real")

    def add(run: Callable[[argparse.Namespace], int | None], *shared: Any) -> Callable[..., Any]:
        about: dict[str, Any] = {"help": run.__doc__, "description": run.__doc__, "epilog": STATUS}
        command = commands.add_parser(run.__name__, parents=[*shared], formatter_class=_Help, **about)
        command.set_defaults(command=run)
        return command.add_argument

    option = add(doctor, models)
    option("--deep", action="store_true", help="also load the models and ask them known questions")

    option = add(run, images, rates, models)
    option("--data", help="CSV, Parquet or folder; without it the mini laboratory's images")
    option("--out", default="results", type=Path, help="folder for everything made")

    option = add(audit, images)
    option("manifest", help="CSV, Parquet or folder")
    option("--by", default="generator", choices=("generator", "source"), help="judge each by itself, too")
    option("--csv", type=Path, help="also write the table")
    option("--equalise", type=Path, metavar="FOLDER", help="write a copy with equal size and codec")
    option("--size", type=_positive, metavar="PX", help="side of the equalised squares; 224 without it")
    option(
        "--match", type=Path, metavar="CSV", help="list as many real as fake images, of equal size and codec"
    )

    option = add(extract, images, models)
    option("manifest", help="CSV, Parquet or folder")
    option("--out", required=True, type=Path, help="the feature store to make or to continue")
    option("--captions", default="generate", choices=("generate", "user"), help="whose captions")
    option("--missing", default="raise", choices=("raise", "generate", "error"), help="where there is none")
    option("--batch-size", type=_positive, help="images per batch; by device without it")
    option("--limit", type=_positive, help="first rows only")
    option("--engine", default="local", choices=("local", "ray"), help="this process, or Ray workers")
    option("--address", help="Ray cluster to join; without it one starts on this machine")
    option("--workers", type=_positive, default=2, help="Ray workers")
    option("--gpus-per-worker", type=float, default=0, help="GPUs of each Ray worker")
    option("--cpus-per-worker", type=float, default=1, help="processor cores of each Ray worker")
    option(
        "--scaled-jpeg", type=_positive, metavar="PX", help="decode JPEGs to a shorter side of at least PX"
    )
    option("--perturb", help="apply a perturbation first, e.g. jpeg_q50")
    option("--retry-errors", action="store_true", help="try images again that were found to be damaged")

    option = add(train, store, rates, machine)
    option("--out", required=True, type=Path, help="folder for the detector")
    option("--representation", default="absolute", help="which misalignment")
    option("--train-on", nargs="+", metavar="GENERATOR", help="fakes of these generators only")
    option("--members", type=_positive, default=5, help="heads whose answers are averaged")

    option = add(evaluate, store, rates, machine)
    option("--detector", required=True, type=Path, help="folder of a detector")
    option("--split", help="split to evaluate; without it test, or all of a set that came without splits")
    option("--csv", type=Path, help="also write all metrics, one row each")
    option("--report", type=Path, metavar="HTML", help="also write one page with figures and hard images")

    option = add(detect, rates, models)
    option("images", nargs="+", help="image files, or folders of them")
    option("--detector", type=Path, help="folder of a detector; without it the preset's own")
    option("--caption", help="use this caption instead of a generated one (one image)")
    option("--json", action="store_true", help="one JSON object per image and line")
    option(
        "--card", type=Path, metavar="FILE", help="also draw the evidence, .png or .pdf; several: a folder"
    )

    option = add(explore, store, machine)
    option("--out", required=True, type=Path, metavar="HTML", help="the file to write, for any browser")
    option("--detector", type=Path, help="folder of a detector, whose p(fake) is shown, too")

    option = add(export, store)
    option("--to", required=True, type=Path, metavar="FOLDER", help="a new or empty folder")
    option("--format", required=True, choices=("clip-retrieval", "numpy"), help="numpy holds objects, too")

    option = add(study, images, models)
    option("--protocol", help="genimage, ufd19, forensynths or mini; without it each generator against each")
    option("--data", metavar="ROOT", help="CSV, Parquet or folder; mini has images of its own")
    option("--out", default="results", type=Path, help="the study goes to a folder of its own in it")
    option("--captions", default="generate", choices=("generate", "user"), help="whose captions")
    option("--seeds", type=_positive, default=5, help="each draws other training images")
    option(
        "--from", dest="from_scores", metavar="SCORES", help="scores.parquet of a study, or mini: its tables"
    )
    option("--scores", action="append", default=[], metavar="NAME=CSV", help="of a detector run elsewhere")
    option("--without", action="append", default=[], metavar="CONTROL", help="leave out, e.g. cnn")
    option("--other-encoder", default="", metavar="NAME", help="for probes of the image alone; mini has one")
    option("--skip-missing", action="store_true", help="go on without test sets that are not there")
    option("--per-set", type=_positive, metavar="N", help="at most N images of a set, class and split")
    option("--jobs", type=_positive, default=os.cpu_count() or 1, help="processes that train side by side")

    option = add(download, parts)
    option("--preset", required=True, help="fast or paper")
    option("--to", type=Path, metavar="FOLDER", help="fill a folder for a machine without a network")
    return parser


def _preset(args: argparse.Namespace) -> Preset:
    parts = {part: getattr(args, part) for part in PARTS if getattr(args, part)}
    preset = itemkit.get_preset(args.preset, getattr(args, "models", None), **parts)
    for part in parts:  # of one's own: can it do what is asked of it?
        preset.given(part)
    return preset


def _manifest(args: argparse.Namespace, data: str) -> pd.DataFrame:
    """Read a manifest, and say what was found and what was left out before anything expensive begins."""
    roots = {name: getattr(args, name) for name in ("root", "real_root", "images_to")}
    manifest = itemkit.read_manifest(data, args.layout, **roots)
    _say(*itemkit.manifest.describe_manifest(manifest))
    return manifest


def _features(store: Path) -> Features:
    """Read a store, and say where its models know nothing of such images."""
    features = itemkit.load_features(store)
    if note := features.provenance["note"]:
        _say(f"note: {note}")
    return features


# ------------------------------------------------------------- the commands; their first lines are the help


def doctor(args: argparse.Namespace) -> int:
    """Is this machine ready: packages, devices, models; one line each, with a remedy."""
    checks = []
    for check in itemkit.doctor.run_doctor(_preset(args), args.device, args.deep):
        checks.append(check)
        _print(*str(check).splitlines())
    _print(itemkit.doctor.summary(checks))
    return int(any(check.status == itemkit.doctor.FAIL for check in checks))


def run(args: argparse.Namespace) -> int:
    """The whole method: features, a detector, all notebooks with their figures, a report."""
    manifest = None if args.data is None else _manifest(args, args.data)
    rates = {"fpr": args.fpr, "fnr": args.fnr}
    return int(bool(itemkit.run.run_all(_preset(args), manifest, args.out, args.device, **rates)))


def audit(args: argparse.Namespace) -> int:
    """What besides content tells the classes apart: format, size, quality, captions ..."""
    import pandas as pd

    if args.size and not args.equalise:
        raise InputError("--size goes with --equalise FOLDER, which says where to write")
    manifest = _manifest(args, args.manifest)
    first = itemkit.audit.audit(manifest, by=args.by, progress=True)
    _print(*first.to_text().split("\n"))
    reports = [first]
    if args.csv:
        itemkit.text.write_csv(pd.concat([first.table.assign(set="all"), first.parts]), args.csv)
    mended = {}
    if args.equalise:
        config = itemkit.images.EqualiseConfig(**({"size": args.size} if args.size else {}))
        copy = itemkit.audit.equalise_folder(manifest, args.equalise, config, progress=True)
        mended["equalised"] = copy, args.equalise
    if args.match:
        kept, left = itemkit.audit.match_classes(first.measurements)
        mended["matched"] = kept[list(schema.MANIFEST_COLUMNS)], args.match
        itemkit.manifest.write_manifest(*mended["matched"])
        lost = left[left["left_out"] > 0].assign(label=left["label"].map(schema.LABEL_NAMES))
        each, what = len(kept) // 2, ", ".join(itemkit.audit.MATCHED)
        _print("", f"{each:,} real and {each:,} fake images are alike in {what}; left out, most first:", "")
        _print(*lost.head(12).to_string(index=False, na_rep="-").split("\n"))
    for name, (images, where) in mended.items():
        reports.append(itemkit.audit.audit(images, by=args.by, progress=True))
        _print("", f"{name.capitalize()}, in {where}:", "")
        _print(*reports[-1].to_text(before=first).split("\n"))
    return int(any(len(report.errors) for report in reports))


def extract(args: argparse.Namespace) -> int:
    """Features of all images of a manifest; run it again to go on where it stopped."""
    preset = _preset(args)
    manifest = _manifest(args, args.manifest)
    if preset.name == "mini" and not (manifest[schema.SOURCE] == schema.LAB_SOURCE).all():
        _say(f"note: {schema.MINI_WARNING}")
    cluster = (args.address, args.workers, args.cpus_per_worker, args.gpus_per_worker)
    same = ("device", "captions", "missing", "batch_size", "retry_errors")
    report = itemkit.extract(
        manifest.iloc[: args.limit],
        args.out,
        preset,
        ray=itemkit.engine_ray.RayOptions(*cluster) if args.engine == "ray" else None,
        transform=itemkit.perturb.get_perturbation(args.perturb) if args.perturb else None,
        decode=itemkit.decode.DecodeConfig(threads=args.threads, least_side=args.scaled_jpeg),
        **{name: getattr(args, name) for name in same},
    )
    return int(bool(report.errors or report.left))


def train(args: argparse.Namespace) -> None:
    """Train a detector on the train split of a feature store, calibrate it on val."""
    features = _features(args.features)
    _say(f"splits: {features.run['splits']}")
    given = (args.representation, args.train_on, args.members, args.device)
    detector = itemkit.train_detector(features, *given)
    detector.save(args.out)
    _print(f"detector written to {args.out}", *itemkit.workflow.statements(detector, args.fpr, args.fnr))


def evaluate(args: argparse.Namespace) -> None:
    """Metrics with intervals on the test split, for each generator; and what was promised."""
    import pandas as pd

    features = _features(args.features)
    detector, made = itemkit.Detector.load(args.detector, args.device), features.provenance
    given = pd.read_parquet(args.features / itemkit.store.MANIFEST_FILE, columns=[schema.SPLIT])
    labelled = features.table[schema.LABEL].notna()
    if not args.split and given.isna().all(axis=None) and labelled.any() and not any(detector.seen(features)):
        which = "all, since they came without splits and the detector has seen none of them"
        test = features.select(labelled)
    else:
        split = args.split or "test"
        which, test = f"split '{split}' ({features.run['splits']})", features.split(split)
    table, shown, lines = itemkit.workflow.evaluate(detector, test, args.fpr, args.fnr)
    parts = itemkit.findings.slices(test, detector, args.fpr)
    try:
        kept = itemkit.calibrate.promise_sentences(detector.promises(test))
    except InputError as reason:  # the detector knows all of these images; their metrics stand all the same
        kept = [f"not checked: {reason}"]
    _print(
        f"{itemkit.text.count(len(test), 'image')}: {which}",
        f"made with itemkit {made['itemkit']}, preset {made['preset']}, models {made['models']}",
        f"95 % intervals over images; threshold and verdicts at --fpr {args.fpr:g} and --fnr {args.fnr:g}",
        *["", *shown.to_string(index=False).split("\n")],
        *["", *lines],
        *["", "Parts of the images:", *parts.round(2).to_string(index=False, na_rep="-").split("\n")],
        *["", "What was promised, and what happened:", *(f"  {line}" for line in kept)],
    )
    if args.report:
        kept = [f"promised: {line}" for line in kept]
        judged = {"fpr": args.fpr, "fnr": args.fnr, "evaluated": (table, shown, [*lines, *kept])}
        judged["more"] = [itemkit.report.Section("Which images does it serve worse?", [], table=parts)]
        itemkit.report.write_report(args.report, test, detector, test, **judged)
        _say(f"report: {args.report}")
    if args.csv:
        itemkit.text.write_csv(table.assign(about=made.pop("note"), **made), args.csv)


def explore(args: argparse.Namespace) -> None:
    """One HTML file in which to walk among the images of a store: map, search, threshold, pictures."""
    import pandas as pd

    features = _features(args.features)
    numbers = pd.DataFrame(itemkit.maps.umap_2d(itemkit.represent(features)), columns=["UMAP 1", "UMAP 2"])
    if args.detector:
        numbers["p_fake"] = itemkit.Detector.load(args.detector, args.device).score(features)
    _print(itemkit.explorer.write_explorer(features, args.out, numbers, progress=True))


def export(args: argparse.Namespace) -> None:
    """Embeddings of a feature store in the files of other tools."""
    features = _features(args.features)
    itemkit.export.export(features, args.to, args.format)
    _print(f"{itemkit.text.count(len(features), 'image')} written to {args.to}")


def study(args: argparse.Namespace) -> int:
    """Misalignment beside every control, raw and equalised: a protocol, or your images."""
    if args.from_scores:  # no image and no model is asked for
        if args.data or args.protocol:
            raise InputError("--from has its images and protocol: leave --data and --protocol out")
        report = itemkit.study.tables(args.from_scores, args.out / "study-from-scores", args.scores)
        return _studied(report)
    preset = _preset(args)
    given = ("captions", "seeds", "scores", "skip_missing", "per_set", "without", "other_encoder", "jobs")
    if args.protocol and args.layout == "auto":
        args.layout = itemkit.protocols.get_protocol(args.protocol).layout
    data = None if args.data is None else _manifest(args, args.data)
    options = {name: getattr(args, name) for name in given}
    return _studied(itemkit.study.run_study(args.protocol, data, args.out, preset, args.device, **options))


def _studied(report: Any) -> int:
    _print(*report.path.read_text(encoding="utf-8").split("\n"))
    _say(*(f"itemkit: warning: {failure}" for failure in report.failures))
    _print(f"written to {report.path}; all tables lie beside it")
    return int(bool(report.failures))


def detect(args: argparse.Namespace) -> int:
    """Answer for single images: p(fake), verdict, caption, and evidence per object."""
    several = len(args.images) > 1 or os.path.isdir(args.images[0])
    if args.caption is not None and several:
        raise InputError("--caption goes with one image, got several; run detect once for each")
    # Until the first answer nothing is garbage, and looking for some took a second. Not gc.disable(): spaCy's
    # reader of files enables it again. What is there by then is never looked at, not even at the end
    before, status, rates = gc.get_threshold(), 0, (args.fpr, args.fnr)
    gc.set_threshold(0)
    try:
        given = (args.images, _preset(args), args.detector, args.device, args.caption)
        for answer in itemkit.workflow.verdicts(*given, rates):
            if gc.get_threshold() != before:
                gc.freeze()
                gc.set_threshold(*before)
            status = int(bool(answer.error) or status)
            _print(*([json.dumps(answer.to_dict(), allow_nan=False)] if args.json else answer.lines()))
            if args.card and not answer.error:
                name = f"{Path(answer.path).stem[:80]}-{answer.image_id[:8]}.png"
                answer.card(args.card / name if several else args.card)
    finally:
        gc.set_threshold(*before)
    return status


def download(args: argparse.Namespace) -> None:
    """Fetch the models of a preset once, where a model hub can be reached."""
    os.environ.pop("ITEMKIT_MODELS", None)  # it may be set for later, to the folder that is to be filled
    itemkit.download.download(_preset(args), args.to, report=_print)
    if args.to:
        _print(f"use it with --models {args.to}")


if __name__ == "__main__":
    sys.exit(main())
