"""What a benchmark has measured, as a page, and as a row of the table in benchmarks/README.md.

    python -m benchmarks.report benchmarks/results/*.json

Results of `benchmarks.extract` become the rows of that table; those of `benchmarks.gpu` are printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
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
# what `benchmarks.gpu` should measure on one H100, by step and name
GPU_GOALS = {
    ("encoder", "pipeline, global, per s"): "≥ 2,100",
    ("captioner base", "pipeline, global, per s"): "≥ 800",
    ("captioner base", "pipeline, hierarchical, per s"): "≥ 500",
    ("head", "members 1, seconds"): "≤ 2",
}


@dataclass
class Result:
    """Everything one run of `benchmarks.extract` has measured."""

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

    @property
    def values(self) -> dict[str, float | str]:
        """Everything measured so far, by name."""
        found: dict[str, float | str] = {}
        for name, value in (self.bare_per_s | self.per_s).items():
            bare, batch = "bare " * (name in self.bare_per_s), self.bare_batch.get(name)
            found[f"{bare}{name}, per s{f', batch {batch}' if batch else ''}"] = value
        found |= {f"{name}: spread": value for name, value in self.spread.items()} | self.ratios
        for kind, stages in self.stages_s.items():
            busy = [f"{name} {seconds:.2f}" for name, seconds in stages.items() if seconds > 0.01]
            found[f"seconds of {kind}"] = f"{self.seconds[kind]:.2f}: {', '.join(busy)}"
        others = {"memory, MB": self.memory_mb, "GPU memory, MB": self.gpu_memory_mb}
        others["GFLOP per image of the image tower"] = self.gflop_per_image
        return found | {name: value for name, value in others.items() if value}


def rows(values: Mapping[str, float | str], step: str = "") -> list[str]:
    """Lines of a Markdown table: what was measured, the value, the goal."""
    found = []
    for name, value in values.items():
        text = value if isinstance(value, str) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        found.append(f"| {name} | {text} | {GPU_GOALS.get((step, name), '')} |".replace("\n", " "))
    return found


def page(result: Result) -> str:
    """What `benchmarks.extract` has measured, as a Markdown page."""
    where = f"{result.device}, {result.precision}, {result.threads} threads"
    title = f"{result.model}: {result.images} images, {where}, weights: {result.weights}"
    table = ["| measured | value | |", "|---|---:|---|", *rows(result.values)]
    return "\n".join([f"{title}, torch {result.versions['torch']}", "", *table])


def gpu_page(record: dict[str, Any]) -> str:
    """What `benchmarks.gpu` has written, as a Markdown page."""
    toy = ", TOY SIZE: these numbers say only that it runs" if record["toy"] else ""
    lines = [f"{record['device']}, {record['versions']}{toy}", ""]
    lines += ["| measured | value | goal |", "|---|---:|---|"]
    for step, done in record["steps"].items():
        note = f": {done['note']}" if done["note"] else ""
        lines += [f"| **{step}** | {done['status']}, {done['seconds']:.0f} s{note} | |".replace("\n", " ")]
        lines += rows(done["values"], step)
    return "\n".join(lines)


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
        f"{ratios['one at a time / limit']:.2f}",
        f"{ratios['hierarchical / global, time']:.2f}",
        f"{ratios['second run / first, time']:.4f}",
        f"{ratios['1 % more images / first, time']:.3f}",
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
