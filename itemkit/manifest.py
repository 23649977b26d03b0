"""The manifest: every image as one row of one table, whatever form the data set came in.

Files, folders and objects become raw rows with columns of any name; `_finish` makes the manifest's of them.
What is used of a data set and what is not is in ``manifest.attrs["report"]``; `describe_manifest` says it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from itemkit import _files, layouts, schema
from itemkit.errors import InputError
from itemkit.images import EXTENSIONS, ImageError, content_id, open_image
from itemkit.layouts import normalise, read_name
from itemkit.splits import plan_splits
from itemkit.text import count, did_you_mean, printable

# Names under which data sets of the field keep each column, in the order in which they are tried.
ALIASES: dict[str, tuple[str, ...]] = {
    schema.PATH: ("path", "filename", "file_name", "file", "filepath", "file_path", "image_path", "img_path",
                  "image", "img", "image_name", "image_file", "name", "filenames", "files", "images"),
    schema.LABEL: ("label", "labels"),
    schema.GENERATOR: ("generator", "model", "model_name"),
    schema.SOURCE: ("source", "real_source", "dataset"),
    schema.SPLIT: ("split", "subset", "partition", "set", "phase", "usage", "fold", "data_split"),
    schema.CAPTION: ("caption", "text", "prompt", "sentence", "captions", "description"),
}  # fmt: skip
# Columns that hold what this table calls a label, if their values are words for real and fake.
_LABEL_NAMES = re.compile(
    r"(.*_)?(labels?|class(es)?|category|target|truth|gt|typ|type|kind|y|verdict|annotation|answer)(_.*)?"
)
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "f": 0, "t": 1}
_IMAGE_COLUMNS = ("image", "img", "image_data", "image_bytes", "jpg", "png", "webp")
_TEXT, _ARROW = (".csv", ".tsv", ".jsonl", ".ndjson"), (".parquet", ".arrow")
LAYOUTS = ("auto", *layouts.FOLDER_LAYOUTS)


@dataclass
class _Data:
    """A data set on its way to the manifest."""

    what: str  # as messages call it
    base: Path  # where its relative paths start
    name: str  # the column `source`, where nothing else says it
    images_to: Any = None  # folder for images that it holds inside
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    written: Counter[str] = field(default_factory=Counter)  # images by name


def read_manifest(
    source: str | Path | pd.DataFrame | object,
    layout: str = "auto",
    *,
    root: str | Path | None = None,
    real_root: str | Path | None = None,
    images_to: str | Path | None = None,
) -> pd.DataFrame:
    """Read a data set into the manifest table.

    Parameters
    ----------
    source : path, DataFrame, or an object of the ``datasets`` library
        A CSV, TSV, JSON-lines or Parquet table; a folder tree in a layout of the field; a folder of Parquet
        files or one written by ``Dataset.save_to_disk``.
    layout : str
        Of a folder, one of `LAYOUTS`. ``auto`` decides from what it finds: folders named after real and fake
        go before a table beside them, more than one other answer is an error.
    root : path, optional
        Where the table's relative paths start; default is its own folder.
    real_root : path, optional
        Second tree with the photographs, where `source` holds only the fakes (DRCT-2M, Synthbuster).
    images_to : path, optional
        Folder for images that a table holds inside; they are written there once, byte for byte.

    Returns
    -------
    DataFrame
        Columns ``path`` (absolute), ``label`` (Int8: 0 real, 1 fake, missing when unknown), ``generator``,
        ``source``, ``split``, ``caption`` (of several the first); and ``tags`` where there are any. Paths are
        not opened: a missing file is an error row at extraction. ``attrs["report"]`` says what was found,
        used and left out.

    Raises
    ------
    InputError
        Nothing to read, columns missing, unknown or contradicting labels, a path twice, what is no text.
    """
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r};{did_you_mean(layout, LAYOUTS)} Known: {', '.join(LAYOUTS)}")
    if not isinstance(source, (str, os.PathLike)):
        data = _Data("the table", Path(root or os.curdir), "table", images_to)
        return _finish([source] if isinstance(source, pd.DataFrame) else _dataset_rows(source), data)
    path, reals = _absolute(source), None if real_root is None else _absolute(real_root)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a table, or a folder of images")
    if reals is not None and not reals.is_dir():
        raise InputError(f"real_root {reals} is not a folder")
    base = Path(root).absolute() if root is not None else path if path.is_dir() else path.parent
    data = _Data(path.name, base, path.name if path.is_dir() else path.stem, images_to)
    if path.is_dir():
        return _read_folder(path, layout, reals, data)
    if layout != "auto" or reals is not None:
        raise InputError(f"{path} is a table; layout={layout!r} and real_root= are for folders of images")
    return _read_tables([path], path, data)


def _absolute(path: Any) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _read_folder(path: Path, layout: str, reals: Path | None, data: _Data) -> pd.DataFrame:
    """Folder tree, or the table in it where no folder names a label."""
    tree = layouts.Tree(path)
    stored = _arrow_files(path, tree.tables)
    listing = tree.metadata if layout != "unlabelled" and not stored else []
    tables = list(dict.fromkeys([*stored, *tree.tables, *(() if listing else tree.metadata)]))
    if layout == "auto" and reals is None and not tree.labels:
        n = sum(map(len, tree.folders.values()))
        inside = stored and n and _image_column(next(_batches(stored[0]))) is not None
        if inside or (not n and (stored or len(tables) == 1)):
            data.notes += [f"{count(n, 'image file')} beside the table {tables[0].name}: not read"] * (n > 0)
            return _read_tables(stored or tables, path, data)
        if listing:
            layout = "unlabelled"
    raw, about = layouts.read_folder(tree, layout, reals)
    data.notes += about.pop("notes")
    if tables:
        names = ", ".join(t.name for t in tables[:3]) + (" ..." if len(tables) > 3 else "")
        data.notes.append(f"tables beside the images are not read: {names} (give the table itself to use it)")
    if listing:
        raw, about["labels"] = _add_metadata(raw, listing, about["labels"], data)
    data.report |= about | tree.skipped
    return _finish([raw], data)


def _add_metadata(raw: pd.DataFrame, files: list[Path], labels: str, data: _Data) -> tuple[pd.DataFrame, str]:
    """Fill in captions, and labels where the folders have none, from ``metadata`` files; say which labels."""
    parts = [_read_tables([file], file, _Data(file.name, file.parent, data.name)) for file in files]
    reports = [part.attrs["report"] for part in parts]
    data.notes += [f"{report['source']}: {note}" for report in reports for note in report["notes"]]
    raw = raw.set_index(schema.PATH)
    rows = pd.concat(parts).drop_duplicates(schema.PATH).set_index(schema.PATH).reindex(raw.index)
    listed = f"which list {rows.notna().any(axis=1).sum():,} of the images"
    data.notes.append(f"{count(len(files), 'metadata file')} read, {listed}")
    if raw[schema.LABEL].notna().any():
        paths, label = raw.index.to_series(), raw[schema.LABEL].astype("Int8")
        _must_agree(data.what, {"the folders": (label, paths), files[0].name: (rows[schema.LABEL], paths)})
    elif rows[schema.LABEL].notna().any():
        raw[[schema.GENERATOR, schema.SOURCE]] = None
        labels = f"{files[0].name}, {reports[0]['labels']}"
    return raw.combine_first(rows).reset_index(), labels


def write_manifest(df: pd.DataFrame, path: str | Path) -> None:
    """Write a manifest as CSV; paths below its folder are kept relative, so that both can move as a whole."""
    path = _absolute(path)
    prefix = str(path.parent) + os.sep
    df = df.assign(**{schema.PATH: [p.removeprefix(prefix).replace(os.sep, "/") for p in df[schema.PATH]]})
    path.parent.mkdir(parents=True, exist_ok=True)
    text = df.to_csv(index=False, lineterminator="\r\n")  # with it a carriage return in a caption is quoted
    _files.atomic_write(path, text.encode("utf-8", "surrogateescape"))


def require_two_classes(df: pd.DataFrame, purpose: str = "This step") -> None:
    """Raise an `InputError` that says what is there unless both real and fake images are."""
    real, fake = (int((df[schema.LABEL] == label).sum()) for label in (schema.REAL, schema.FAKE))
    if not (real and fake):
        there = f"{real:,} real, {fake:,} fake and {len(df) - real - fake:,} without a label"
        raise InputError(f"{purpose} needs real and fake images; the manifest has {there}: add the others")


def describe_manifest(manifest: pd.DataFrame) -> list[str]:
    """Say in lines what a manifest of `read_manifest` holds and what was left out."""
    report = dict(manifest.attrs["report"])
    n, where, real, fake = map(report.pop, ("images", "source", "real", "fake"))
    captions, notes = report.pop("captions"), report.pop("notes")
    labels = f"{real:,} real, {fake:,} fake, {n - real - fake:,} without a label"
    lines = [f"{count(n, 'image')} in {where}: {labels}; {captions:,} with a caption"]
    for key, value in report.items():
        items = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            items = [f"{v:,} {name}" if isinstance(v, int) else f"{name!r}: {v}" for name, v in value.items()]
        if value:
            more = f" and {len(items) - 8} more" if len(items) > 8 else ""
            lines.append(f"{key.replace('_', ' ')}: {', '.join(map(str, items[:8]))}{more}")
    return [printable(line) for line in [*lines, *(f"note: {note}" for note in notes)]]


# ---- tables: whatever they are stored as, data frames


def _read_tables(files: list[Path], top: Path, data: _Data) -> pd.DataFrame:
    """One table in one or several files; `top` is the file or the folder of them."""

    def parts() -> Iterator[pd.DataFrame]:
        for file in files:
            if file.suffix.lower() not in _ARROW:
                yield _read_text(file, data)
                continue
            places = [file.stem, *file.relative_to(top).parts[:-1]]  # train-00000-of-00002
            split = next((split for name in places if (split := read_name(name).split)), None)
            yield from _batches(file, split)

    return _finish(parts(), data)


def _arrow_files(path: Path, tables: list[Path]) -> list[Path]:
    """Parquet or Arrow files of a folder as the hub and ``datasets`` lay them out; none elsewhere."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        found = []
        for state in sorted(path.rglob("state.json")):  # it alone names the files: caches lie beside them
            try:
                found += [state.parent / f["filename"] for f in json.loads(state.read_text())["_data_files"]]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{state} cannot be read ({error}); save the data set again") from None
        return found
    places = ((path, ".parquet"), (path / "data", ".parquet"), (path, ".arrow"))
    lying = ([table for table in tables if (table.parent, table.suffix) == place] for place in places)
    return next(filter(None, lying), [])


def _batches(path: Path, split: str | None = None) -> Iterator[pd.DataFrame]:
    """Rows of a Parquet file, or of an Arrow file (stream as ``datasets`` writes it, or file)."""
    try:
        if path.suffix.lower() == ".parquet":
            batches = pq.ParquetFile(path).iter_batches(batch_size=256)
        else:
            with path.open("rb") as file:
                read = pa.ipc.open_file if file.read(6) == b"ARROW1" else pa.ipc.open_stream
            batches = read(pa.memory_map(str(path))).read_all().to_batches(max_chunksize=256)
        for batch in batches:
            yield _to_pandas(batch, split)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from None


def _dataset_rows(dataset: Any) -> Iterator[pd.DataFrame]:
    """Read an object of the ``datasets`` library, without needing it here: images stay the files' bytes."""
    parts = dataset if hasattr(dataset, "items") else {getattr(dataset, "split", None): dataset}
    for split, part in parts.items():
        if not hasattr(part, "with_format"):
            raise InputError(f"cannot read a {type(part).__name__}; give a path, DataFrame or data set")
        for batch in part.with_format("arrow").iter(batch_size=256):
            yield _to_pandas(batch, split and str(split))


def _to_pandas(batch: Any, split: str | None) -> pd.DataFrame:
    """Rows of an Arrow table or batch, with names of classes for their numbers, and the split of them all."""
    table = batch.to_pandas()
    stored = json.loads((batch.schema.metadata or {}).get(b"huggingface", b"{}"))
    for column, feature in stored.get("info", {}).get("features", {}).items():
        if column in table and isinstance(feature, dict) and "names" in feature:
            known = dict(enumerate(feature["names"]))  # class 0 may well be called 'fake'
            table[column] = [known.get(value, value) for value in table[column]]
    if split is not None and not {normalise(c) for c in table} & set(ALIASES[schema.SPLIT]):
        table[schema.SPLIT] = split
    return table


def _image_column(table: pd.DataFrame) -> Any:
    """Column that holds images as bytes, alone or with their path; None if there is none."""
    for column in table:
        if normalise(column) in _IMAGE_COLUMNS and len(values := table[column].dropna()):
            if all(isinstance(v, bytes) or (isinstance(v, dict) and "bytes" in v) for v in values):
                return column
    return None


def _unpack(table: pd.DataFrame, data: _Data) -> pd.DataFrame:
    """Rows with a path each: images that they hold inside are written as files."""
    if (image := _image_column(table)) is None:
        return table
    values = table[image].astype(object).where(table[image].notna(), None)
    rows = [value if isinstance(value, dict) else {"bytes": value} for value in values]
    if data.images_to is None and any(row["bytes"] for row in rows):
        advice = "name a folder to write them to, once, byte for byte: images_to='images'"
        raise InputError(f"{data.what} holds the images inside (column {image!r}); {advice}")
    paths = [c for c in table if c == image or normalise(c) in ALIASES[schema.PATH]]
    files = [_write_image(row["bytes"], row.get("path"), data) for row in rows]
    return table.drop(columns=paths).assign(**{schema.PATH: files})


def _write_image(content: bytes | None, path: str | None, data: _Data) -> str:
    """Write an image as a file named by its content, once; equal images are numbered, so no row is lost."""
    if content is None and path:
        return str(path)
    folder = _absolute(data.images_to or data.base)
    # a row without an image becomes a missing file, so an error row later on: nothing is dropped quietly
    name, ending = content_id(content)[:32] if content else "no-image-in-row", ""
    data.written[name] += 1
    number = f"-{data.written[name]}" if data.written[name] > 1 else ""
    if content:
        ending = ".img"  # unreadable: extraction will say why
        with contextlib.suppress(ImageError):
            ending = f".{open_image(content).format}".lower()
    target = folder / f"{name}{number}{ending}"
    if content and not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _files.atomic_write(target, content, sync=False)
    return str(target)


def _read_text(path: Path, data: _Data) -> pd.DataFrame:
    """CSV, TSV or JSON lines; values are text as it stands: a caption "None" or "NA" is a caption."""
    ending = path.suffix.lower()
    if ending not in _TEXT:
        raise InputError(f"{path.name} is no table known here: expected {', '.join((*_TEXT, *_ARROW))}")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    text = content.decode("utf-8", "surrogateescape")
    # names of files may be of any encoding; a table whose texts are of another one is a mistake
    odd = {f.strip('" \r') for f in re.split(r"[,;\t|\n]", text) if re.search("[\udc80-\udcff]", f)}
    if not all(os.path.lexists(os.path.join(data.base, name)) for name in odd):
        raise InputError(f"{path.name} is not UTF-8 text; save it as UTF-8")
    if ending in (".jsonl", ".ndjson"):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [dict(json.loads(line))] if line.strip() else []
            except (ValueError, TypeError):
                raise InputError(f"{path.name}: line {number} is not JSON; expected an object") from None
        return pd.DataFrame(rows)
    head = text.lstrip("\r\n").split("\n", 1)[0]
    separator = "\t" if ending == ".tsv" else max(",;\t|", key=head.count)
    try:
        table = pd.read_csv(io.BytesIO(content), sep=separator, header=None, dtype=str, keep_default_na=False,
                            encoding_errors="surrogateescape").fillna("")  # fmt: skip
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        advice = f"expected a header line with 'path', and quotes around texts that hold {separator!r}"
        raise InputError(f"{path.name} cannot be read as a table: {str(error).strip()}; {advice}") from None
    first = table.iloc[0].astype(str)
    files = first.index[first.str.lower().str.endswith(EXTENSIONS)]
    if not len(files):
        return table.iloc[1:].set_axis(first.str.strip().tolist(), axis=1)
    # the first line is an image already
    labels = [i for i in table if all(read_name(w).label is not None for w in set(table[i]) - {""})]
    names = {i: schema.LABEL for i in labels[:1]} | {files[0]: schema.PATH}
    data.notes.append(f"{path.name} has no header line: its column {files[0] + 1} is read as the path")
    return table.rename(columns=lambda i: names.get(i, f"column {i + 1}"))


# ---- raw columns of any name to the manifest's columns


def _finish(parts: Iterable[pd.DataFrame], data: _Data) -> pd.DataFrame:
    """Columns of any name to the manifest's, checked; the report says already whose labels a folder's are."""
    tables = [_unpack(part, data) for part in parts]
    raw = pd.concat(tables or [pd.DataFrame()], ignore_index=True).rename(columns=str)
    if not len(raw):
        raise InputError(f"{data.what} has no rows; expected one per image")
    again = pd.Series(raw.columns).groupby(raw.columns).cumcount()  # two columns "label" must agree, too
    raw.columns = [name + "'" * n for name, n in zip(raw.columns, again, strict=True)]
    found = _match_columns(raw, data)
    empty = pd.Series("", index=raw.index, dtype=object)
    text = {c: _texts(raw, found[c], data, c == schema.CAPTION) if c in found else empty for c in ALIASES}
    if (missing := text[schema.PATH] == "").any():
        row = int(missing.argmax()) + 1
        raise InputError(f"{data.what}: row {row} has no {found[schema.PATH]!r}; fill or drop it")
    paths = _resolve(text[schema.PATH], data)
    label, named = raw.get(schema.LABEL), text[schema.GENERATOR]
    if "labels" not in data.report:
        label, named = _find_labels(raw, found, text, paths, data)
    label = label.astype("Int8")
    is_real, is_fake = ((label == value).fillna(False).astype(bool) for value in (schema.REAL, schema.FAKE))
    generator = text[schema.GENERATOR].mask(text[schema.GENERATOR] == "", named)
    # "camera" or "LAION" in the generator column of a photograph is where it comes from, not what made it
    sure = generator.map(lambda word: read_name(word)[:2] == (schema.REAL, 2)).astype(bool)
    origin = generator.where(is_real & ~sure, "")
    origin = text[schema.SOURCE].where(text[schema.SOURCE] != "", origin)
    df = pd.DataFrame(
        {
            schema.PATH: paths,
            schema.LABEL: label,
            schema.GENERATOR: generator.mask(generator == "", "unknown").mask(is_real, schema.REAL_GENERATOR),
            schema.SOURCE: origin.mask(origin == "", data.name),
            schema.SPLIT: text[schema.SPLIT].map(lambda s: read_name(s).split or s.casefold() or None),
            schema.CAPTION: text[schema.CAPTION].where(text[schema.CAPTION] != "", None),
        }
    ).astype({schema.SPLIT: object, schema.CAPTION: object})
    if schema.TAGS in raw:
        given = raw[schema.TAGS].fillna("").tolist()
        df[schema.TAGS] = ["; ".join(map(str, v if pd.api.types.is_list_like(v) else [v])) for v in given]
    if (twice := df[schema.PATH].duplicated()).any():
        first = df[schema.PATH][twice].iloc[0]
        rows = ", ".join(str(i + 1) for i in df.index[df[schema.PATH] == first][:5])
        where = f"first: {printable(first)} (rows {rows}). Keep one row each"
        raise InputError(f"{data.what} lists {twice.sum()} paths more than once; {where}")
    if not any(map(os.path.lexists, paths)):
        raise InputError(
            f"none of the {len(df):,} images of {data.what} exists; first looked for: {printable(paths[0])}. "
            f"Relative paths start from {data.base.absolute()}: pass root= if they lie elsewhere. A table "
            "that should have the images inside holds no bytes: export it again with them embedded"
        )
    df.attrs["report"] = data.report | {
        "source": printable(data.what),
        "images": len(df),
        "real": int(is_real.sum()),
        "fake": int(is_fake.sum()),
        "generators": df.loc[is_fake, schema.GENERATOR].map(printable).value_counts().to_dict(),
        "splits": df[schema.SPLIT].dropna().map(printable).value_counts().to_dict(),
        "splits_planned": plan_splits(label, df[schema.SPLIT]).notes,
        "captions": int(df[schema.CAPTION].notna().sum()),
        "notes": list(map(printable, data.notes)),
    }
    return df


def _match_columns(raw: pd.DataFrame, data: _Data) -> dict[str, str]:
    """Manifest column -> the raw column that holds it."""
    original = {normalise(name): name for name in reversed(raw.columns)}
    there = {c: [original[a] for a in aliases if a in original] for c, aliases in ALIASES.items()}

    def holds_files(name: str) -> tuple[bool, bool]:
        some = raw[name].head(20).astype(str)
        exist = (v and os.path.isfile(os.path.join(data.base, v.replace("\\", "/"))) for v in some)
        return any(exist), any(v.lower().endswith(EXTENSIONS) for v in some)

    def holds_splits(name: str) -> bool:  # "set" or "fold" may hold anything
        words = set(raw[name].dropna().astype(str)) - {""}
        sure = normalise(name) in ALIASES[schema.SPLIT][:3]
        return sure or (bool(words) and all(read_name(word).split for word in words))

    there[schema.SPLIT] = list(filter(holds_splits, there[schema.SPLIT]))
    paths = there[schema.PATH]
    if not paths:
        raise InputError(
            f"{data.what} has no column 'path' (also read: {', '.join(ALIASES[schema.PATH][1:])}); "
            f"found {', '.join(map(printable, raw.columns))}. Rename the one that holds it"
        )
    there[schema.PATH] = [max(paths, key=holds_files)]  # of equals the first
    if len(paths) > 1:
        data.notes.append(f"of the columns {', '.join(paths)}, {there[schema.PATH][0]!r} is read as the path")
    return {column: names[0] for column, names in there.items() if names}


def _resolve(paths: pd.Series, data: _Data) -> pd.Series:
    """Make paths absolute; backslashes of Windows, and its drives, are read as they were meant."""

    def here(*parts: str) -> bool:
        return os.path.lexists(os.path.join(data.base, *parts))

    odd = paths[paths.str.contains("\\", regex=False)]
    odd = odd[[not here(path) for path in odd]].str.replace("\\", "/", regex=False)
    if os.sep == "/" and len(odd):
        data.notes.append(f"backslashes in {count(len(odd), 'path')} are read as slashes")
        drive = odd.str.match("[A-Za-z]:/")
        if drive.any():  # C:/somebody/data/fake/a.png: what of it lies here?
            parts = odd[drive].iloc[0].split("/")
            cut = next((i for i in range(1, len(parts)) if here(*parts[i:])), 1)
            data.notes.append(f"paths of another machine are read without {'/'.join(parts[:cut])}/")
            odd = odd.mask(drive, odd.str.split("/").str[cut:].str.join("/"))
        paths = odd.combine_first(paths)
    return paths.map(lambda path: os.path.abspath(os.path.join(data.base, path)))


def _texts(raw: pd.DataFrame, name: str, data: _Data, several: bool = False) -> pd.Series:
    """Values of one column as text, empty where missing; `several`: of a list the first that is not empty."""
    values = raw[name].astype(object)
    if several:
        each = values.map(lambda value: [value] if isinstance(value, dict) else value).explode()
        each = each[each.notna() & (each.map(str).str.strip() != "")]
        values = each[~each.index.duplicated()].reindex(raw.index)
    odd = values.map(lambda v: isinstance(v, bytes) or pd.api.types.is_list_like(v)).astype(bool)
    if odd.any():
        row = int(odd.to_numpy().argmax())
        got = f"row {row + 1} of column {name!r} holds {type(values[row]).__name__}"
        raise InputError(f"{data.what}: {got}; expected one text for each image. Convert the column first")
    return values.where(values.notna(), "").map(str).str.strip().astype(object)


# ---- labels of a table

_SAYS = ("flags", "words", "names")  # how a column may say labels, the surest first
_SAYS_NOT = {
    "unclear flags": "it holds 0 and 1 without saying which is fake; rename it to 'is_fake' or 'is_real'",
    "unnamed words": "its values look like labels; rename it to 'label' to use them",
    "other words": "its values are no words for real and fake",
}


def _read_label_column(name: str, text: pd.Series) -> tuple[str, pd.Series] | None:
    """How a column says labels (`_SAYS`, `_SAYS_NOT`), and which (0, 1, nan); None if none."""
    words = [w for w in text.unique() if w]
    plain = normalise(name)
    exact = plain in ALIASES[schema.LABEL]
    if not words or (len(words) > 2000 and not exact):
        return None
    like = bool(_LABEL_NAMES.fullmatch(plain) or difflib.get_close_matches(plain, ["label"], 1, 0.75))
    means = read_name(re.sub(r"^(is|was|isa)_", "", plain))
    flags = {w: _FLAGS[w.casefold()] for w in words if w.casefold() in _FLAGS}
    if len(flags) == len(words):
        values = text.map(flags).astype(float)
        if exact or (means.label is not None and means.sure and "label" not in plain):
            return "flags", 1 - values if means.label == schema.REAL else values
        return ("unclear flags", values * np.nan) if like or means.label is not None else None
    known = {w: n.label for w in words if (n := read_name(w)).label is not None and n.sure}
    known |= flags if exact else {}
    values = text.map(known).astype(float)
    if len(known) == len(words):
        like = like or "real" in plain or "fake" in plain
        return ("words" if like else "unnamed words", values) if like or values.nunique() > 1 else None
    if plain == "typ" or (plain in ALIASES[schema.GENERATOR] and schema.REAL in known.values()):
        return "names", values.mask((text != "") & values.isna(), schema.FAKE)
    return ("other words", values * np.nan) if exact else None


def _find_labels(
    raw: pd.DataFrame, found: dict[str, str], text: dict[str, pd.Series], paths: pd.Series, data: _Data
) -> tuple[pd.Series, pd.Series]:
    """Labels from the column that says them surest, and names of generators that stand among them.

    No other column and no folder may contradict it.
    """
    taken = [found[c] for c in (schema.PATH, schema.SPLIT, schema.CAPTION) if c in found]
    exact, readings = found.get(schema.LABEL), {}
    for name in raw.columns.difference(taken, sort=False):
        with contextlib.suppress(InputError):  # lists, bytes
            if reading := _read_label_column(name, _texts(raw, name, data)):
                readings[name] = reading
    usable = [name for name in readings if readings[name][0] in _SAYS]
    usable.sort(key=lambda name: (name != exact, _SAYS.index(readings[name][0])))
    unused = {c: _SAYS_NOT[r[0]] for c, r in readings.items() if c not in (*usable, found.get(schema.SOURCE))}
    if not usable and exact in unused:
        bad = ", ".join(map(repr, text[schema.LABEL].unique()[:8]))
        raise InputError(f"{data.what}: column {exact!r} holds {bad}; expected 0 or real, 1 or fake")
    data.report |= {
        "labels": "none found",
        "columns_not_used_as_labels": {printable(name): why for name, why in unused.items()},
        "columns_not_used": [
            printable(c) for c in raw if c not in {*found.values(), *usable, *unused, schema.TAGS}
        ],
    }
    if not usable:
        return pd.Series(pd.NA, index=raw.index), text[schema.GENERATOR]
    how, label = readings[name := usable[0]]
    said_by = {f"column {name!r}": (label, raw[name])}
    said_by |= {f"column {c!r}": (readings[c][1], raw[c]) for c in readings if c != name}
    if (column := found.get(schema.GENERATOR)) not in (None, name):
        said_by[f"column {column!r}"] = _said_by_generators(text[schema.GENERATOR], label), raw[column]
    folders = paths.map(os.path.dirname)
    folders = folders.map({folder: os.path.relpath(folder, data.base) for folder in folders.unique()})
    said: dict[str, float] = {}
    for folder in folders.unique():
        names = [name for name in map(read_name, Path(folder).parts) if name.sure == 2]
        labels = {name.label for name in names if name.label is not None}
        said[folder] = labels.pop() if len(labels) == 1 else np.nan
    values = folders.map(said).astype(float)
    if values.notna().all() and values.nunique() == 2 and (label != values)[label.notna()].all():
        said_by["the folders of the images"] = values, folders
    _must_agree(data.what, said_by)
    data.report["labels"] = f"column {printable(name)!r} ({how})"
    words = text[schema.GENERATOR] if how != "names" else _texts(raw, name, data)
    return label, words.mask(words.map(lambda word: read_name(word).label is not None).astype(bool), "")


def _must_agree(what: str, said_by: dict[str, tuple[pd.Series, pd.Series]]) -> None:
    """Raise an `InputError` where columns or folders say other labels (0, 1, missing) than the first."""
    (one, (label, words)), *others = said_by.items()
    for other, (values, said) in others:
        wrong = np.flatnonzero((label.notna() & values.notna() & (label != values)).fillna(False))
        if len(wrong):
            row = wrong[0]
            means, but = (schema.LABEL_NAMES[int(labels.iloc[row])] for labels in (label, values))
            raise InputError(
                f"{what}: {one} and {other} contradict each other in {count(len(wrong), 'row')}; first: row "
                f"{row + 1} has {words.iloc[row]!r} ({means}) and {said.iloc[row]!r} ({but}). Are the labels "
                "the other way round (1 is fake)? Rename the column to 'is_real' if 1 means real, or drop "
                "the one that is wrong"
            )


def _said_by_generators(text: pd.Series, label: pd.Series) -> pd.Series:
    """What the names of generators say: `real` real, a known one fake; all are if only "reals" have one."""
    real = text.map(lambda word: read_name(word).label == schema.REAL and read_name(word).sure > 0)
    known = text.map(lambda word: layouts.GENERATOR_NAMES.match(normalise(word)) is not None)
    if (text[label == schema.FAKE] == "").all() and text[label == schema.REAL].nunique() > 1:
        known, real = text != "", real & False
    return pd.Series(np.where(real, 0.0, np.where(known, 1.0, np.nan)), index=text.index)
