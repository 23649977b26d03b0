"""The benchmark runs on the stand-in models' size and its rows reach the page."""

from __future__ import annotations

import json

import pytest

from benchmarks import extract, report

ARGS = ["--preset", "mini", "--device", "cpu", "-n", "12", "--bare-images", "8", "--naive-images", "2"]


@pytest.mark.slow
def test_a_run_gives_a_table_and_a_row(tmp_path, capsys):
    file = tmp_path / "results" / "mini.json"
    sizes = ["--batch-sizes", "4", "8", "--repeat", "1", "--json", str(file)]
    assert extract.main([*ARGS, *sizes]) == 0
    printed = capsys.readouterr().out
    assert "preset mini, regions grid: 12 images" in printed and "| bare decode |" in printed
    found = report.Result(**json.loads(file.read_text()))
    assert (
        found.images == 12
        and found.bare_per_s["image"] > 0
        and set(found.stages_s) == {"global", "hierarchical"}
    )
    # what a ratio is made of
    limit = 1 / sum(1 / found.bare_per_s[name] for name in ("decode", "image", "caption"))
    assert found.per_s["limit"] == pytest.approx(limit)
    assert found.ratios["pipeline (global) / limit"] == pytest.approx(found.per_s["pipeline, global"] / limit)


def example(model: str) -> report.Result:
    names = (
        "pipeline (global) / limit", "one at a time / limit", "hierarchical / global, time",
        "second run / first, time", "1 % more images / first, time",
    )  # fmt: skip
    return report.Result(
        model=model, device="a cpu", precision="float32", threads=2, images=9, weights="",
        versions={"torch": "2"},
        bare_per_s={"decode": 100.0, "image": 10.0}, per_s={"limit": 9.0, "pipeline, global": 8.9},
        ratios=dict.fromkeys(names, 0.5), memory_mb=2048.0,
    )  # fmt: skip


def test_rows_replace_rows_and_nothing_else(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"# before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_rows([example("A"), example("B")], page)
    text = page.read_text()
    assert text.startswith("# before\n") and text.endswith(f"{report.END}\nafter\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("| A") or line.startswith("| B")]
    assert len(rows) == 2 and "| 2.0 GB |" in rows[0]
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {rows[0].count("|")}
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has not the two marks"):
        report.write_rows([], page)


def test_the_page_has_the_marks():
    text = report.README.read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == text.count(report.END) == 1
