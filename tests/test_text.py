"""Data text on its way out: terminal, spreadsheet, figure, Markdown."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from itemkit import text

# escape, bell, return, bidi override, zero width, line separator, lone surrogate, C1 control
HOSTILE = ["\x1b[2J", "\a", "\r", "\u202e", "\u200b", "\u2028", "\udcff", "\x9b31m"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_nothing_that_acts_on_a_terminal_gets_through(piece: str) -> None:
    for shown in (text.printable(f"a{piece}b"), text.plain(f"a{piece}b"), text.one_line(f"a{piece}b")):
        assert shown.startswith("a") and shown.isprintable() and piece not in shown
        shown.encode("utf-8")


def test_readable_text_stays_as_it_is() -> None:
    for words in ("a red ball", "ein Mädchen, 2 €", "犬と猫", "привет", "🙂 a\\b"):
        assert text.printable(words) == text.plain(words) == words


def test_one_line_is_the_first_with_something_in_it() -> None:
    assert text.one_line("\n  \n first \n second") == "first"
    assert text.one_line(ValueError()) == "ValueError"
    assert len(text.one_line("x" * 9999)) == 300


def test_hints_and_counts() -> None:
    assert text.did_you_mean("mimi", ["mini", "paper"]) == " Did you mean 'mini'?"
    assert text.did_you_mean("zzz", ["mini"]) == ""
    assert [text.count(n, "image") for n in (0, 1, 1200)] == ["0 images", "1 image", "1,200 images"]


def test_a_wide_table_keeps_the_order_and_says_what_is_undefined() -> None:
    table = pd.DataFrame(
        {"who": ["b", "b", "a"], "cell": ["y", "x", "y"], "value": [0.5, 0.25, float("nan")]}
    )
    wide = text.wide_table(table.assign(low=[0.4, float("nan"), 0], high=0.6), "who", "cell")
    assert list(wide.columns) == ["who", "y", "x"] and list(wide["y"]) == ["0.50 (0.40-0.60)", "-"]
    assert wide["x"][0] == "0.25" and pd.isna(wide["x"][1])


def test_a_table_for_a_spreadsheet_holds_no_formula(tmp_path: Path) -> None:
    wild = ["=cmd|'/C calc'!A0", "+1", "-2", "@x", "\t=1", "\r=1", "\n=1", "a\r=1", "\udcff"]
    table = pd.DataFrame({"=name": wild, "value": [-1.5] * 9, "kind": pd.Categorical(["=a"] * 9)})
    path = text.write_csv(table, tmp_path / "new" / "t.csv")
    back = pd.read_csv(path, encoding_errors="surrogateescape")
    assert len(back) == 9 and b"\r" not in path.read_bytes()
    assert list(back.columns) == ["'=name", "value", "kind"]
    assert all(cell.startswith("'") for cell in back["'=name"][:7]) and list(back["'=name"][7:]) == [
        "a\\r=1",
        "\udcff",
    ]
    assert (back["value"] == -1.5).all() and set(back["kind"]) == {"'=a"}
    assert list(table["=name"]) == wild  # the table itself is untouched


def test_markdown_cells_stay_cells() -> None:
    table = pd.DataFrame({"a|b": ["x|y", "<script>", "two\nlines"], "n": [1.5, None, 3]})
    lines = text.markdown_table(table)
    assert lines[:2] == ["| a\\|b | n |", "| --- | --- |"]
    assert lines[2:] == ["| x\\|y | 1.5 |", "| &lt;script> |  |", "| two\\nlines | 3.0 |"]
