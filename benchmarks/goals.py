"""The goals on a CPU, in one run on one machine: this checkout alone, and in turns with an older one.

    git worktree add ../old ada3260
    python -m benchmarks.goals --old ../old

ViT-B/32 with random weights and users' captions, so almost all is matrix products. The older checkout works
on the same files with the same weights; both take turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.extract import processor
from benchmarks.subjects import TOY, as_manifest, encoder_at, read_images
from itemkit._files import write_json
from itemkit.presets import mini_folder

REPO = Path(__file__).resolve().parents[1]
# what is compared, in words that both checkouts understand
PACE = """
import json, os, sys
import itemkit, pandas, torch
from itemkit.encoder import load_encoder
try:
    from itemkit.extraction import extract
    from itemkit.models import Models
except ImportError:
    from itemkit.pipeline import extract
    from itemkit.pipeline.stages import Models
manifest, model, out, precision, threads, batch = sys.argv[1:]
if os.path.dirname(os.path.dirname(os.path.realpath(itemkit.__file__))) != os.path.realpath(os.getcwd()):
    sys.exit(f"itemkit of this checkout was not found, but {itemkit.__file__}")
torch.set_num_threads(int(threads))
models = Models(load_encoder(model, device="cpu", precision=precision))
options = {"captions": "user", "batch_size": int(batch), "progress": False}
report = extract(pandas.read_csv(manifest), out, models, **options)
print(json.dumps(report.computed / report.seconds))
"""


def pace(checkout: Path, *words: object) -> float:
    """Images per second of global features in another process, with the itemkit of a checkout."""
    command = [sys.executable, "-c", PACE, *map(str, words)]
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All four goals; each with what was measured, what is wanted, and whether it is met."""
    images, size = read_images(None, args.n, scratch), TOY if args.toy else "ViT-B-32"
    words = ["--random-true-size", size, "--precision", args.precision, "--device", "cpu"]
    words += ["--images", str(Path(images[0]).parent), "-n", str(args.n), "--threads", str(args.threads)]
    words += ["--naive-images", "4", "--repeat", str(args.repeat), "--seconds", "0" if args.toy else "3"]
    words += ["--batch-sizes", "32", "64", "128", "--json", str(scratch / "extract.json")]
    subprocess.run([sys.executable, "-m", "benchmarks.extract", *words], cwd=REPO, check=True)
    own = json.loads((scratch / "extract.json").read_text())

    encoder_at(scratch, size, torch.device("cpu"), args.precision)
    model = mini_folder() / "models" / "clip" if args.toy else scratch / size
    as_manifest(images, True).drop(columns="label").to_csv(scratch / "manifest.csv", index=False)
    rates: dict[str, list[float]] = {"old": [], "new": []}
    for turn in range(args.repeat):
        for name, checkout in (("old", args.old), ("new", REPO)):
            out = scratch / f"{name}{turn}"
            given = [scratch / "manifest.csv", model, out, args.precision, args.threads]
            rates[name].append(pace(checkout, *given, own["bare_batch"]["image"]))
            print(f"{name}: {rates[name][-1]:.2f} images/s", flush=True)
    old, new = (statistics.median(rates[name]) for name in ("old", "new"))
    ratios = own["ratios"]
    least, most = "at least", "at most"
    values = {
        "pipeline (global), images/s over the limit": (ratios["pipeline (global) / limit"], least, 0.95),
        "hierarchical (dense), time over global": (ratios["hierarchical / global, time"], most, 1.15),
        f"global, images/s over the older checkout's ({new:.1f} / {old:.1f})": (new / old, least, 1.4),
        "1 % more images, time over the first run": (ratios["1 % more images / first, time"], most, 0.03),
    }
    goals = {
        name: {"value": value, "wanted": f"{way} {goal}", "met": (value >= goal) == (way == least)}
        for name, (value, way, goal) in values.items()
    }
    return {"goals": goals, "images/s": rates, "extract": own}


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, required=True, help="an older checkout of this repository")
    parser.add_argument("--precision", default="float32", help="bfloat16 where the processor computes in it")
    parser.add_argument("-n", type=int, default=512, help="number of images (default: 512)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the median counts (default: 3)")
    parser.add_argument("--toy", action="store_true", help="with a toy encoder, to see that it runs")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="itemkit-goals-") as folder:
        found = measure(args, Path(folder))
    print(f"\n{processor()}, {args.threads} threads, {args.precision}, {args.n} images, "
          f"torch {torch.__version__}, load before: {load:.1f}\n")  # fmt: skip
    print("| goal | measured | wanted | met |\n|---|---:|---:|---|")
    for name, goal in found["goals"].items():
        print(f"| {name} | {goal['value']:.3f} | {goal['wanted']} | {'yes' if goal['met'] else '**no**'} |")
    for name, rates in found["images/s"].items():
        print(f"\n{name}: {', '.join(f'{rate:.2f}' for rate in rates)} images/s", end="")
    print()
    if args.json:
        write_json(args.json, found | {"load": load})
    return 0


if __name__ == "__main__":
    sys.exit(main())
