"""How close is the extraction to what the models themselves cost?

In one run and on the same images: the bare forward pass of each model at its best batch size, the pipeline, a
second run over the same images, and a plain loop over single images as many repositories have it.

    python -m benchmarks.extract --preset mini --device cpu --images DIR
    python -m benchmarks.extract --random-true-size ViT-B-32 --images DIR

Random weights at true size tell the speed and nothing else. On a CPU decoding and models share the cores, so
the limit is the sum of both; on a GPU they overlap, so the limit is the slower of the two.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Result, page
from benchmarks.subjects import as_manifest, caption_of, models_at, read_images
from benchmarks.timing import SECONDS, best_batch, timed
from itemkit._files import write_json
from itemkit.decode import DecodeConfig, Item, Reader, batches
from itemkit.devices import choose_device, dtype_name
from itemkit.extraction import ExtractReport, extract, raise_malloc_thresholds
from itemkit.features import concat_features
from itemkit.images import load_image
from itemkit.models import Models
from itemkit.steps import Steps


def decode_all(paths: Sequence[str], models: Models, config: DecodeConfig) -> None:
    """Decode all images and prepare them for the models as the pipeline does, without any model."""
    reader = Reader(
        config, models.encoder.resize, look=getattr(models.captioner, "preprocess", None), keep=False
    )
    for _ in batches((Item(row, path, path) for row, path in enumerate(paths)), reader, lambda: 64):
        pass


def naive_loop(paths: Sequence[str], models: Any, captions: Sequence[str | None]) -> None:
    """One image after the other through all steps, nothing shared and nothing kept."""
    pairs = zip(paths, captions, strict=True)
    concat_features([Steps(models)([load_image(path)], [caption]) for path, caption in pairs])


def gflop_of(encoder: Any, pixels: torch.Tensor) -> float:
    """Arithmetic of the image tower for one image, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    one = pixels[:1].clone().requires_grad_(True)  # or a fused attention is chosen, which is not counted
    with FlopCounterMode(display=False) as counter:
        encoder.model.encode_image(one)
    return counter.get_total_flops() / 1e9


def run_benchmark(
    models: Any,
    paths: list[str],
    args: argparse.Namespace,
    scratch: Path,
    save: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Measure everything on the same images; ``save`` gets what is known so far, again and again."""
    encoder, device = models.encoder, torch.device(models.encoder.device)
    user, on_gpu = models.captioner is None, device.type == "cuda"
    manifest = as_manifest(paths, user)
    n, config = len(paths), DecodeConfig(threads=args.decode_threads)
    result = Result(
        model=_name(models, args),
        device=torch.cuda.get_device_name(device) if on_gpu else processor(),
        precision=dtype_name(encoder.dtype),
        threads=torch.get_num_threads(),
        images=n,
        weights="random (speed only)" if args.random_true_size else args.preset,
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
    raise_malloc_thresholds()  # for all ways alike

    def bare(name: str, run: Callable[[Sequence[Any]], object], items: Sequence[Any]) -> None:
        rate, size, timing = best_batch(run, items, args.batch_sizes, device, args.seconds)
        result.bare_per_s[name], result.bare_batch[name], result.spread[name] = rate, size, timing.spread
        save(result)

    decoding = timed(
        lambda: decode_all(paths, models, config.beside(device.type)), device, args.seconds, args.repeat
    )
    result.bare_per_s["decode"], result.spread["decode"] = n / decoding.median, decoding.spread
    some = [load_image(path) for path in paths[: args.bare_images]]
    # copied before: what the model alone takes
    pixels = torch.stack([encoder.preprocess(image) for image in some]).to(device, encoder.dtype)
    bare("image", encoder.encode_images, pixels)
    bare("text", encoder.encode_texts, [caption_of(i) for i in range(min(len(some), 256))])
    if not user:
        bare("caption", models.captioner.caption, [models.captioner.preprocess(image) for image in some])
    result.gflop_per_image = gflop_of(encoder, pixels)

    # the limit per image: decoding, each model once for each image, and each different caption once
    rate = result.bare_per_s
    seconds = {name: 1 / rate[name] for name in ("decode", "image", "caption") if name in rate}
    if user or args.random_captioner:
        seconds["text"] = len({caption_of(i) for i in range(n)}) / n / rate["text"]
    models_s = sum(s for name, s in seconds.items() if name != "decode")
    limit = max(models_s, seconds["decode"]) if on_gpu else models_s + seconds["decode"]
    result.per_s["models alone"] = 1 / models_s
    result.per_s["limit"] = 1 / limit

    options: dict[str, Any] = {"captions": "user" if user else "generate", "progress": False}
    options |= {"decode": config, "batch_size": args.batch_size or result.bare_batch["image"]}
    kinds = {"global": Models(encoder, models.captioner), "hierarchical": models}
    runs: dict[str, list[ExtractReport]] = {name: [] for name in kinds}
    for turn in range(args.repeat):  # in turns: a machine that slows down slows both
        for name, parts in kinds.items():
            runs[name].append(extract(manifest, scratch / f"{name}{turn}", parts, **options))
            by_time = sorted(runs[name], key=lambda report: report.seconds)
            middle = by_time[turn // 2]  # of two the quicker one: a first run also warms up
            result.per_s[f"pipeline, {name}"] = middle.computed / middle.seconds
            result.spread[f"pipeline, {name}"] = (by_time[-1].seconds - by_time[0].seconds) / middle.seconds
            result.stages_s[name], result.seconds[name] = middle.stages, middle.seconds
            save(result)
    if not args.first_runs_only:
        store = scratch / f"hierarchical{args.repeat - 1}"
        result.seconds["second run"] = extract(manifest, store, models, **options).seconds
        less = manifest.iloc[: n - max(1, n // 100)]
        extract(less, scratch / "less", models, **options)
        result.seconds["1 % more images"] = extract(manifest, scratch / "less", models, **options).seconds
        few = args.naive_images
        captions = manifest["caption"][:few]
        loop = timed(lambda: naive_loop(paths[:few], models, captions), device, 0.0, 1)
        result.per_s["one image at a time"] = few / loop.median
    _ratios(result, limit)
    _memory(result, device)
    save(result)
    return result


def processor() -> str:
    """Name of the CPU, with how it computes fast in bfloat16, if it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in found.get("flags", "").split()]
    return " ".join([found.get("model name", "cpu"), *fast[:1]])


def _name(models: Any, args: argparse.Namespace) -> str:
    captioner = f" with BLIP {args.random_captioner}" if args.random_captioner else ""
    kind = getattr(models.localiser, "kind", "none")
    return f"{args.random_true_size or 'preset ' + args.preset}{captioner}, regions {kind}"


def _ratios(result: Result, limit: float) -> None:
    first, per_s, seconds = result.seconds["hierarchical"], result.per_s, result.seconds
    result.ratios = {
        "pipeline (global) / limit": per_s["pipeline, global"] * limit,
        "pipeline (global) / models alone": per_s["pipeline, global"] / per_s["models alone"],
        "hierarchical / global, time": first / seconds["global"],
    }
    if "second run" in seconds:
        result.ratios |= {
            "one at a time / limit": per_s["one image at a time"] * limit,
            "second run / first, time": seconds["second run"] / first,
            "1 % more images / first, time": seconds["1 % more images"] / first,
        }


def _memory(result: Result, device: torch.device) -> None:
    try:
        import resource

        # kilobytes on Linux, bytes on a Mac
        result.memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 2**10
        )
    except ImportError:
        pass
    if device.type == "cuda":
        result.gpu_memory_mb = torch.cuda.max_memory_allocated(device) / 2**20


def build(args: argparse.Namespace, scratch: Path) -> Models:
    """The models to measure."""
    from itemkit.presets import get_preset

    device = choose_device(args.device)
    if args.random_true_size:
        sizes = args.random_true_size, args.random_captioner
        return models_at(scratch, *sizes, device, args.precision, args.localiser or "dense")
    preset = get_preset(args.preset, **({"localiser": args.localiser} if args.localiser else {}))
    if args.precision != "auto":
        preset = replace(preset, precision=args.precision)
    return preset.build(device)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="mini")
    parser.add_argument(
        "--random-true-size", metavar="NAME", help="open_clip model with random weights instead"
    )
    parser.add_argument(
        "--random-captioner", choices=("base", "large", "toy"), help="BLIP with random weights beside it"
    )
    parser.add_argument("--localiser", help="whole, grid or dense instead of the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--images", help="folder of images (default: made-up JPEG files of 500 x 375 pixels)")
    parser.add_argument("-n", type=int, default=512, help="number of images (default: 512)")
    parser.add_argument("--bare-images", type=int, default=256, help="for bare passes (default: 256)")
    parser.add_argument("--naive-images", type=int, default=64, help="for the plain loop (default: 64)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--batch-size", type=int, help="of the pipeline (default: the image tower's best)")
    parser.add_argument("--decode-threads", type=int, help="default: one per processor")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="least time of each bare measurement (default: 3)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of the pipeline: the median (default: 3)")
    parser.add_argument(
        "--first-runs-only", action="store_true", help="no second run, no 1 %% more, no plain loop"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = parser()
    args = options.parse_args(argv)
    if args.random_captioner and not args.random_true_size:
        options.error("--random-captioner goes with --random-true-size")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="itemkit-benchmark-") as folder:
        scratch = Path(folder)
        paths = read_images(args.images, args.n, scratch)
        save = (lambda result: write_json(args.json, vars(result))) if args.json else (lambda result: None)
        print(page(run_benchmark(build(args, scratch), paths, args, scratch, save)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
