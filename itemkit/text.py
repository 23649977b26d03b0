"""Text on its way out: to a terminal, a spreadsheet, a figure, a Markdown table.

Captions, file names and generator names come from anywhere. They are kept as they are in stores and escaped
here, in the one place where each of them leaves.
"""

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
    r"""Text for a terminal or a log: characters that would act on it are shown as escapes.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(char) in _UNPRINTABLE
        else char
        for char in str(text)
    )


def plain(text: object) -> str:
    r"""Text for a figure: a dollar sign is a dollar sign, not the start of a formula; line breaks stay.

    >>> plain("a$b")
    'a\\$b'
    """
    return "\n".join(printable(line) for line in str(text).split("\n")).replace("$", r"\$")


def one_line(error: BaseException | str) -> str:
    """First line with something in it of an error's text, shortened; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0] if lines else type(error).__name__)[:300]


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """A hint with the nearest of the known names, or nothing: `` Did you mean 'mini'?``."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def count(n: int, noun: str) -> str:
    """Number and noun: ``1 image``, ``1,200 images``."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def markdown_table(table: pd.DataFrame) -> list[str]:
    """Lines of a Markdown table; values are shown by ``str``, marks of Markdown and HTML are escaped."""

    def cell(value: object) -> str:
        return "" if pd.isna(value) else printable(value).replace("|", "\\|").replace("<", "&lt;")

    rows = [[cell(name) for name in table.columns], ["---"] * table.shape[1]]
    rows += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def write_csv(table: pd.DataFrame, path: str | Path) -> Path:
    """Write a table for people and spreadsheets, atomically; texts that look like a formula are made inert.

    Parameters
    ----------
    table : DataFrame
        Its index is left out. Texts, also column names, that begin with ``= + - @``, a tab or a line break
        get a leading apostrophe.
    path : path
        Missing folders are made.

    Returns
    -------
    Path
    """

    def inert(cell: object) -> object:
        if not isinstance(cell, str):
            return cell
        # pandas puts no quotes around a carriage return, so it would begin a row
        return ("'" if cell.startswith(_FORMULA) else "") + cell.replace("\r", "\\r")

    texts = [name for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    safe = table.assign(**{name: table[name].map(inert) for name in texts}).rename(columns=inert)
    data = safe.to_csv(index=False).encode("utf-8", "surrogateescape")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)
    return path
