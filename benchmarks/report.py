"""What a benchmark has measured, as a page, and as a row of the table in benchmarks/README.md.

    python -m benchmarks.report benchmarks/results/*.json

Results of `benchmarks.extract` become the rows of that table; those of `benchmarks.gpu` are printed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- rows: python -m benchmarks.report -->", "<!-- end of rows -->"
HEAD = (
    "| model | where | decode | bare | limit | pipeline | of the limit | one at a time, of the limit | "
    "hierarchical, time | second run, time | 1 % more, time | memory |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)


@dataclass
class Result:
    """Everything one run of the benchmark has measured."""

    model: str
    device: str
    precision: str
    threads: int
    images: int
    weights: str
    versions: dict[str, str]
    bare_per_s: dict[str, float] = field(default_factory=dict)
    bare_batch: dict[str, int] = field(default_factory=dict)
    per_s: dict[str, float] = field(default_factory=dict)
    # of each rate, largest less least time of its repetitions, over their median
    spread: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    stages_s: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: float = 0.0
    gpu_memory_mb: float = 0.0
    gflop_per_image: float = 0.0
    share_of_peak: float | None = None


def table(result: Result) -> str:
    """The result as a Markdown page."""
    lines = [
        f"{result.model}: {result.images} images, {result.device}, {result.precision}, "
        f"{result.threads} threads, weights: {result.weights}, torch {result.versions['torch']}",
        "",
        "| images/s | |",
        "|---|---:|",
    ]
    lines += [f"| {name} | {value:.1f}{_spread(result, name)} |" for name, value in rates(result).items()]
    lines += ["", "| ratio | |", "|---|---:|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in result.ratios.items()]
    names = list(result.stages_s["global"])
    lines += ["", f"| seconds | {' | '.join(names)} | all |", f"|---|{'---:|' * (len(names) + 1)}"]
    for kind, stages in result.stages_s.items():
        cells = " | ".join(f"{stages[name]:.2f}" for name in names)
        lines.append(f"| {kind} | {cells} | {result.seconds[kind]:.2f} |")
    lines += [
        "",
        f"Memory {result.memory_mb:.0f} MB; {result.gflop_per_image:.1f} GFLOP per image (image tower).",
    ]
    if result.gpu_memory_mb:
        lines.append(f"GPU memory {result.gpu_memory_mb:.0f} MB.")
    if result.share_of_peak is not None:
        lines.append(f"Bare image tower: {result.share_of_peak:.0%} of the data sheet's dense arithmetic.")
    return "\n".join(lines)


def rates(result: Result) -> dict[str, float]:
    """Images (or texts) per second by name; those of bare models with the size of their batches."""
    batches = {name: f" (batch {size})" for name, size in result.bare_batch.items()}
    bare = {f"bare {name}{batches.get(name, '')}": value for name, value in result.bare_per_s.items()}
    return bare | result.per_s


def _spread(result: Result, name: str) -> str:
    found = result.spread.get(name.removeprefix("bare ").partition(" (")[0])
    return "" if found is None else f" ± {found / 2:.0%}"


def row(result: Result) -> str:
    """The result as one row of the table."""
    ratios, per_s = result.ratios, result.per_s
    memory = f"{(result.gpu_memory_mb or result.memory_mb) / 1024:.1f} GB"
    bare = ", ".join(
        f"{name} {result.bare_per_s[name]:.1f}" for name in ("image", "caption") if name in result.bare_per_s
    )
    cells = [
        f"{result.model}, {result.precision}",
        f"{result.device}, {result.threads} threads, torch {result.versions['torch']}",
        f"{result.bare_per_s['decode']:.0f}",
        bare,
        f"{per_s['limit']:.1f}",
        f"{per_s['pipeline, global']:.1f}",
        f"{ratios['pipeline (global) / limit']:.3f}",
        f"{ratios.get('one at a time / limit', math.nan):.2f}",
        f"{ratios['hierarchical / global, time']:.2f}",
        f"{ratios['second run / first, time']:.4f}",
        f"{ratios.get('1 % more images / first, time', math.nan):.3f}",
        memory,
    ]
    return "| " + " | ".join(cells) + " |"


def write_rows(results: Sequence[Result], page: Path = README) -> None:
    """Put the results into the page, between its two marks."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{page} has not the two marks {BEGIN!r} and {END!r}, once each; put them around the table")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    lines = [BEGIN, "", *HEAD, *(row(result) for result in results), "", ""]
    page.write_text(before + "\n".join(lines) + after, encoding="utf-8")


# least values on one H100, by step and what was measured
GPU_GOALS = {
    ("encoder", "pipeline, global, images/s"): 2100.0,
    ("captioner base", "pipeline, global, images/s"): 800.0,
    ("captioner base", "pipeline, hierarchical, images/s"): 500.0,
}
HEAD_GOAL = ("head", "members 1, seconds"), 2.0  # at most


def gpu_page(record: dict[str, Any]) -> str:
    """What `benchmarks.gpu` has written, as a Markdown page."""
    toy = ", TOY SIZE: these numbers say only that it runs" if record["toy"] else ""
    lines = [f"{record['device']}, {record['versions']}{toy}", ""]
    lines += ["| step | measured | value | goal |", "|---|---|---:|---:|"]
    for step, done in record["steps"].items():
        state = done["status"] + (f", {done['seconds']:.0f} s" if done["seconds"] else "")
        lines.append(f"| **{step}** | {state}{': ' + done['note'] if done['note'] else ''} | | |")
        for name, value in done["values"].items():
            text = value if isinstance(value, str) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
            goal = f"≥ {GPU_GOALS[step, name]:g}" if (step, name) in GPU_GOALS else ""
            goal = f"≤ {HEAD_GOAL[1]:g}" if (step, name) == HEAD_GOAL[0] else goal
            lines.append(f"| | {name} | {text} | {goal} |".replace("\n", " "))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    files = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    if not files:
        sys.exit("give the JSON files that `python -m benchmarks.extract --json FILE` wrote")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for record in found:
        if "steps" in record:
            print(gpu_page(record))
    if results := [Result(**record) for record in found if "steps" not in record]:
        write_rows(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
