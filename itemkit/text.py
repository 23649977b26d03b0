"""Data text on its way out, escaped for a terminal, a spreadsheet, a figure, a Markdown table."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from itemkit._files import atomic_write

# what a spreadsheet takes for the beginning of a formula
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
# control, format (bidi and zero-width), surrogate and line separator characters; all can rewrite a terminal
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: object) -> str:
    r"""Text for a terminal or a log: ``\x1b[31m`` and what else would act on it is shown as an escape."""
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(char) in _UNPRINTABLE
        else char
        for char in str(text)
    )


def plain(text: object) -> str:
    """Text for a figure: a dollar sign is a dollar sign, not the start of a formula; line breaks stay."""
    return "\n".join(printable(line) for line in str(text).split("\n")).replace("$", r"\$")


def probability(p: float | None) -> str:
    """Two digits of a probability; none is shown as certain, which no finite number of images can make it."""
    if p is None:
        return "unknown"
    return "> 0.99" if p >= 0.995 else "< 0.01" if p < 0.005 else f"{p:.2f}"


def one_line(error: BaseException | str) -> str:
    """First line with something in it of an error's text, shortened; its type where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0].rstrip())[:300]


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """A hint with the nearest of the known names, or nothing: `` Did you mean 'mini'?``."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def count(n: int, noun: str) -> str:
    """Number and noun: ``1 image``, ``1,200 images``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def wide_table(table: pd.DataFrame, rows: str, columns: str) -> pd.DataFrame:
    """One row for each of ``rows``; ``value, low, high`` as ``0.93 (0.90-0.95)``, a dash where undefined."""

    def cell(value: float, low: float, high: float) -> str:
        return f"{value:.2f}" + f" ({low:.2f}-{high:.2f})" * (low == low) if value == value else "-"

    cells = [cell(*row) for row in table[["value", "low", "high"]].itertuples(index=False)]
    wide = table.assign(value=cells).pivot(index=rows, columns=columns, values="value")
    return wide.loc[list(dict.fromkeys(table[rows])), list(dict.fromkeys(table[columns]))].reset_index()


def markdown_table(table: pd.DataFrame) -> list[str]:
    """Lines of a Markdown table; values are shown by ``str``, marks of Markdown and HTML are escaped."""

    def cell(value: object) -> str:
        return "" if pd.isna(value) else printable(value).replace("|", "\\|").replace("<", "&lt;")

    rows = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return ["| " + " | ".join(map(cell, row)) + " |" for row in rows]


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    """Write a table without its index; an apostrophe makes texts inert that look like a formula."""

    def inert(cell: object) -> object:
        if not isinstance(cell, str):
            return cell
        # pandas puts no quotes around a carriage return, so it would begin a row
        return ("'" if cell.startswith(_FORMULA) else "") + cell.replace("\r", "\\r")

    texts = [name for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    safe = table.assign(**{name: table[name].map(inert) for name in texts}).rename(columns=inert)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, safe.to_csv(index=False).encode("utf-8", "surrogateescape"))
    return path
