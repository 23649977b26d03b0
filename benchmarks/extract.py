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
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.report import Result, table
from benchmarks.subjects import as_manifest, build, caption_of, read_images
from itemkit.decode import DecodeConfig, Item, Reader, batches
from itemkit.devices import dtype_name
from itemkit.extraction import extract, raise_malloc_thresholds
from itemkit.features import concat_features
from itemkit.images import load_image
from itemkit.models import Models
from itemkit.steps import Steps

# Dense arithmetic of the data sheets in TFLOP/s, for the share of the peak; by device and precision.
PEAK_TFLOPS = {
    ("H100", "bfloat16"): 989.0,
    ("H100", "float32"): 67.0,
    ("H200", "bfloat16"): 989.0,
    ("H200", "float32"): 67.0,
    ("A100", "bfloat16"): 312.0,
    ("A100", "float32"): 19.5,
}


def seconds_of(run: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Least time of several runs, with the device's queue emptied before and after."""
    best = float("inf")
    for _ in range(repeat):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_batch(
    run: Callable[[Sequence[Any]], object],
    items: Sequence[Any],
    sizes: Sequence[int],
    device: torch.device,
    repeat: int,
) -> tuple[float, int]:
    """Items per second at the batch size that gives most, and that size."""
    found = []
    for size in sizes:
        if size > len(items) and found:
            break
        chunks = [items[i : i + size] for i in range(0, len(items) - len(items) % size or len(items), size)]
        run(chunks[0])  # warm up

        def once(chunks: list = chunks) -> None:
            for chunk in chunks:
                run(chunk)

        found.append((sum(map(len, chunks)) / seconds_of(once, device, repeat), size))
    return max(found)


def decode_all(paths: Sequence[str], preprocess: Callable[[Image.Image], Any], config: DecodeConfig) -> int:
    """Decode and preprocess all images as the pipeline does, without any model."""
    reader = Reader(config, preprocess=preprocess)
    items = (Item(row, path, path) for row, path in enumerate(paths))
    return sum(map(len, batches(items, reader, lambda: 64)))


def naive_loop(paths: Sequence[str], models: Any, captions: Sequence[str | None]) -> None:
    """One image after the other through all steps, nothing shared and nothing kept."""
    pairs = zip(paths, captions, strict=True)
    concat_features([Steps(models)([load_image(path)], [caption]) for path, caption in pairs])


def gflop_of(encoder: Any, pixels: torch.Tensor) -> float:
    """Arithmetic of the image tower for one image, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    one = pixels[:1].clone().requires_grad_(True)  # or a fused attention is chosen, which is not counted
    with FlopCounterMode(display=False) as counter:
        encoder.model.encode_image(one.to(encoder.device, encoder.dtype))
    return counter.get_total_flops() / 1e9


def run_benchmark(models: Any, paths: list[str], args: argparse.Namespace, scratch: Path) -> Result:
    """Measure everything on the same images."""
    encoder, device = models.encoder, torch.device(models.encoder.device)
    user = models.captioner is None
    manifest = as_manifest(paths, user)
    n, config = len(paths), DecodeConfig(threads=args.decode_threads)
    result = Result(
        model=_name(models, args),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        precision=dtype_name(encoder.dtype),
        threads=torch.get_num_threads(),
        images=n,
        weights="random (speed only)" if args.random_true_size or args.random_captioner else args.preset,
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
    raise_malloc_thresholds()  # for all ways alike

    rate = result.bare_per_s
    rate["decode"] = n / seconds_of(
        lambda: decode_all(paths, encoder.preprocess, config), device, args.repeat
    )
    some = [load_image(path) for path in paths[: args.bare_images]]
    pixels = torch.stack([encoder.preprocess(image) for image in some])
    sizes = args.batch_sizes
    rate["image"], batch = best_batch(encoder.encode_images, pixels, sizes, device, args.repeat)
    result.bare_batch["image"] = batch
    texts = [caption_of(i) for i in range(min(len(some), 256))]
    rate["text"], result.bare_batch["text"] = best_batch(
        encoder.encode_texts, texts, sizes, device, args.repeat
    )
    if not user:
        caption = models.captioner.caption
        rate["caption"], result.bare_batch["caption"] = best_batch(caption, some, sizes, device, args.repeat)
    result.gflop_per_image = gflop_of(encoder, pixels)

    # the limit per image: decoding, each model once for each image, and each different caption once
    seconds = {name: 1 / rate[name] for name in ("decode", "image", "caption") if name in rate}
    if user:
        seconds["text"] = manifest["caption"].nunique() / n / rate["text"]
    models_s = sum(s for name, s in seconds.items() if name != "decode")
    limit = models_s + seconds["decode"] if device.type == "cpu" else max(models_s, seconds["decode"])
    result.per_s["models alone"] = 1 / models_s
    result.per_s["limit"] = 1 / limit

    options: dict[str, Any] = {"captions": "user" if user else "generate", "progress": False}
    options |= {"decode": config, "batch_size": args.batch_size or batch}
    kinds = {"global": Models(encoder, models.captioner), "hierarchical": models}
    for name, parts in kinds.items():
        runs = [extract(manifest, scratch / f"{name}{i}", parts, **options) for i in range(args.repeat)]
        best = min(runs, key=lambda report: report.seconds)
        result.per_s[f"pipeline, {name}"] = best.computed / best.seconds
        result.stages_s[name] = best.stages
        result.seconds[name] = best.seconds
    store = scratch / f"hierarchical{args.repeat - 1}"
    result.seconds["second run"] = extract(manifest, store, models, **options).seconds
    less = manifest.iloc[: n - max(1, n // 100)]
    extract(less, scratch / "less", models, **options)
    result.seconds["1 % more images"] = extract(manifest, scratch / "less", models, **options).seconds

    few = slice(0, args.naive_images)
    loop = seconds_of(lambda: naive_loop(paths[few], models, manifest["caption"][few]), device)
    result.per_s["one image at a time"] = len(paths[few]) / loop
    _ratios(result, limit)
    _memory(result, device)
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
    kind = getattr(models.localiser, "fingerprint", dict)().get("kind", "none")
    return f"{args.random_true_size or 'preset ' + args.preset}{captioner}, regions {kind}"


def _ratios(result: Result, limit: float) -> None:
    hierarchical = result.seconds["hierarchical"]
    result.ratios = {
        "pipeline (global) / limit": result.per_s["pipeline, global"] * limit,
        "pipeline (global) / models alone": result.per_s["pipeline, global"] / result.per_s["models alone"],
        "one at a time / limit": result.per_s["one image at a time"] * limit,
        "hierarchical / global, time": hierarchical / result.seconds["global"],
        "second run / first, time": result.seconds["second run"] / hierarchical,
        "1 % more images / first, time": result.seconds["1 % more images"] / hierarchical,
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
        peak = next(
            (p for (n, d), p in PEAK_TFLOPS.items() if n in result.device and d == result.precision), None
        )
        if peak is not None:
            result.share_of_peak = result.bare_per_s["image"] * result.gflop_per_image / 1000 / peak


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="mini")
    parser.add_argument(
        "--random-true-size", metavar="NAME", help="open_clip model with random weights instead"
    )
    parser.add_argument(
        "--random-captioner", choices=("base", "large"), help="BLIP with random weights beside it"
    )
    parser.add_argument("--localiser", help="whole, grid or dense instead of the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--images", help="folder of images (default: made-up JPEG files of 500 x 375 pixels)")
    parser.add_argument("-n", type=int, default=512, help="number of images (default: 512)")
    parser.add_argument(
        "--bare-images", type=int, default=256, help="of these for the bare passes (default: 256)"
    )
    parser.add_argument(
        "--naive-images", type=int, default=64, help="of these for the plain loop (default: 64)"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--batch-size", type=int, help="of the pipeline (default: the image tower's best)")
    parser.add_argument("--decode-threads", type=int, help="default: one per processor")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--repeat", type=int, default=2, help="best of so many (default: 2)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.random_captioner and not args.random_true_size:
        parser.error("--random-captioner goes with --random-true-size")
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="itemkit-benchmark-") as folder:
        images = Path(folder, "images")
        images.mkdir()
        result = run_benchmark(build(args), read_images(args.images, args.n, images), args, Path(folder))
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
