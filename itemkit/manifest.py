"""The manifest: every image as one row of one table, whatever form the data set came in."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from itemkit import _files, layouts, schema
from itemkit.errors import InputError
from itemkit.images import ImageError, content_id, open_image, read_bytes

_IMAGE_COLUMNS = ("image", "img", "image_data", "image_bytes", "jpg", "png", "webp")
_EXTENSIONS = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}

Row = dict[str, Any]
# rows, names of the integer classes per column, name of the column that holds encoded images
Part = tuple[Iterable[Row], dict[str, list[str]], str | None]


def arrow_files(path: Path) -> list[Path]:
    """Parquet or Arrow files behind a path; none if it is another file, or a folder of images."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        folders = sorted({p.parent for name in ("state.json", "*.arrow") for p in path.rglob(name)})
        return [file for folder in folders for file in _saved_files(folder)]
    return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))


def _saved_files(folder: Path) -> list[Path]:
    """Files of one saved data set, in its own order; what ``map`` and ``filter`` left there is none."""
    state = folder / "state.json"
    try:
        stored = json.loads(state.read_text()) if state.is_file() else {}
    except ValueError as error:
        raise InputError(f"{state} cannot be read ({error}); save the data set again") from None
    named = [folder / file["filename"] for file in stored.get("_data_files") or ()]
    return named or sorted(p for p in folder.glob("*.arrow") if not p.name.startswith("cache-"))


def arrow_rows(path: Path) -> Part:
    """Open a Parquet file, or an Arrow file written by ``datasets``; rows are read as they are asked for."""
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            file = pq.ParquetFile(path)
            columns, batches = file.schema_arrow, file.iter_batches(batch_size=64)
        else:
            batches = pyarrow.ipc.open_stream(pa.memory_map(str(path)))
            columns = batches.schema
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from None

    def holds_bytes(name: str) -> bool:
        kind = columns.field(name).type
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    stored = json.loads((columns.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    names = {c: f["names"] for c, f in features.items() if isinstance(f, dict) and "names" in f}
    rows = (row for batch in batches for row in batch.to_pylist())
    return rows, names, _image_column(columns.names, holds_bytes)


def dataset_parts(dataset: Any) -> Iterator[tuple[Part, str | None]]:
    """Read a ``Dataset`` or ``DatasetDict`` object without needing the library, each part with its split."""
    if hasattr(dataset, "items"):
        for split, part in dataset.items():
            yield _dataset_rows(part), str(split)
    elif hasattr(dataset, "__iter__"):
        split = getattr(dataset, "split", None)
        yield _dataset_rows(dataset), str(split) if split is not None else None
    else:
        raise InputError(
            f"cannot read a {type(dataset).__name__}; give a path, a DataFrame or a datasets object"
        )


def _dataset_rows(dataset: Any) -> Part:
    features = getattr(dataset, "features", None) or {}
    first: Row = next(iter(dataset), {})
    column = _image_column(first, lambda name: not isinstance(first[name], str))
    kind = type(features[column]) if column in features else None
    if kind is not None and hasattr(dataset, "cast_column"):
        dataset = dataset.cast_column(column, kind(decode=False))  # the file's own bytes, not decoded pixels
    names = {c: f.names for c, f in features.items() if getattr(f, "names", None)}
    return dataset, names, column


def _image_column(columns: Iterable[str], holds_bytes: Callable[[str], bool]) -> str | None:
    return next((c for c in columns if c.lower() in _IMAGE_COLUMNS and holds_bytes(c)), None)


def unpack_images(
    rows: Iterable[Row], column: str, folder: Path, base: Path, seen: Counter[str]
) -> Iterator[Row]:
    """Write the images of a table as files named by their content; give the rows with paths instead.

    Parameters
    ----------
    rows : iterable of dict
    column : str
        Holds bytes, or ``{"bytes": ..., "path": ...}``.
    folder : Path
        Where to. Files that are there already are kept, so that a second run writes nothing.
    base : Path
        Folder against which a path without bytes is read.
    seen : Counter
        Names used so far; an equal image gets a number behind its name, so that no row is lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        row = dict(row)
        value = row.pop(column)
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and path and (base / path).is_file():
            data = read_bytes(base / path)
        if data is not None and not isinstance(data, bytes):
            raise InputError(
                f"column {column!r} holds {type(value).__name__}; expected the bytes of image files. "
                "Cast the column of a datasets object to Image(decode=False)"
            )
        # a row without an image becomes a missing file, so an error row later on: nothing is dropped quietly
        name = content_id(data)[:32] if data else "no-image-in-row"
        seen[name] += 1
        number = f"-{seen[name]}" if seen[name] > 1 else ""
        target = folder / f"{name}{number}{_extension(data) if data else ''}"
        if data and not target.exists():
            part = target.with_name(target.name + ".part")
            part.write_bytes(data)
            part.replace(target)
        yield {**row, schema.PATH: str(target)}


def _extension(data: bytes) -> str:
    with contextlib.suppress(ImageError):
        kind = open_image(data).format or ""
        return _EXTENSIONS.get(kind, f".{kind.lower()}")
    return ".img"  # unreadable: extraction will say why


# Names under which data sets of the field keep each column; the first one found is taken.
ALIASES: dict[str, tuple[str, ...]] = {
    schema.PATH: ("path", "filename", "file_name", "file", "filepath", "file_path", "image_path", "img_path",
                  "image", "img", "image_name"),
    schema.LABEL: ("label", "typ", "is_fake", "target"),
    schema.GENERATOR: ("generator", "model", "model_name"),
    schema.SOURCE: ("source", "real_source", "dataset"),
    schema.SPLIT: ("split", "subset", "partition"),
    schema.CAPTION: ("caption", "text", "prompt", "sentence"),
    schema.IMAGE_ID: ("image_id",),
}  # fmt: skip
LABEL_VALUES = {
    **{word: label for words in layouts.LABEL_FAMILIES.values() for word, label in words.items()},
    **{"0": 0, "0.0": 0, "natural": 0, "1": 1, "1.0": 1},
}
_TRUTH = {"true": 1, "yes": 1, "false": 0, "no": 0}
TABLE_LAYOUTS = ("csv", "grip", "parquet", "openfake", "communityforensics", "datasets")
LAYOUTS = ("auto", *TABLE_LAYOUTS, *layouts.FOLDER_LAYOUTS)
_SEPARATORS = {".csv": None, ".tsv": "\t"}
_SHARD = re.compile(r"(\w+?)-\d{5}-of-\d{5}")  # how hub data sets name their files: train-00000-of-00002


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
        A CSV, TSV or Parquet table; a folder tree in a layout of the field; a folder of Parquet files or one
        written by ``Dataset.save_to_disk``.
    layout : str
        One of `LAYOUTS`. ``auto`` decides from what it finds; more than one answer is an error that lists it.
    root : path, optional
        Folder against which the table's relative paths are read; default is the table's own folder.
    real_root : path, optional
        Second tree with the photographs, where `source` holds only the fakes (DRCT-2M, Synthbuster).
    images_to : path, optional
        Folder for the images of a table that holds them inside; they are written there once, byte for byte.

    Returns
    -------
    DataFrame
        Columns ``path`` (absolute), ``label`` (Int8: 0 real, 1 fake, missing when unknown), ``generator``,
        ``source``, ``split``, ``caption``, and ``image_id`` if the source had it. A table keeps its order,
        a folder is sorted by path. Paths are not opened: a missing file becomes an error row at extraction.
        Where a table has several captions for an image (a list, as in Flickr30k and COCO), the first is
        taken.

    Raises
    ------
    InputError
        Nothing to read, several possible layouts, columns missing, unknown label values, a path twice,
        values that are no text.
    """
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, LAYOUTS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"no layout {layout!r};{hint} Known: {', '.join(LAYOUTS)}")
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, pd.DataFrame):
            return _finish(source, "the table", Path(root or os.curdir), "table")
        raw = _unpack(dataset_parts(source), "the data set", images_to, Path(root or os.curdir))
        return _finish(raw, "the data set", Path(root or os.curdir), "dataset")

    path = Path(os.path.abspath(os.path.expanduser(source)))
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; give a CSV, TSV or Parquet table, or a folder of images"
        )
    parts = arrow_files(path)
    if path.is_dir() and not (parts and layout in ("auto", *TABLE_LAYOUTS)):
        if layout in TABLE_LAYOUTS:
            raise InputError(
                f"layout {layout!r} reads a table, but {path} is a folder without Parquet or Arrow files"
            )
        reals = Path(os.path.abspath(os.path.expanduser(real_root))) if real_root is not None else None
        if reals is not None and not reals.is_dir():
            raise InputError(f"real_root {reals} is not a folder")
        raw = layouts.read_folder(path, layout, reals)
        return _finish(raw, str(path), path, path.name)

    if layout in layouts.FOLDER_LAYOUTS or real_root is not None:
        raise InputError(f"{path} is a table; layout={layout!r} and real_root= are for folders of images")
    base = Path(root).absolute() if root is not None else path if path.is_dir() else path.parent
    if parts:
        tables = ((arrow_rows(p), _split_of_file(p, path)) for p in parts)
        raw = _unpack(tables, path.name, images_to, base)
    else:
        raw = _read_csv(path)
    return _finish(raw, path.name, base, path.stem)


def write_manifest(df: pd.DataFrame, path: str | Path) -> None:
    """Write a manifest as CSV, TSV or Parquet, by the extension; paths below its folder are kept relative.

    Parameters
    ----------
    df : DataFrame
        As `read_manifest` gives it.
    path : path
        A folder made of this file and the images beside it can be moved as a whole.
    """
    path = Path(os.path.abspath(path))
    if path.suffix.lower() not in (*_SEPARATORS, ".parquet"):
        raise InputError(f"cannot write a manifest as {path.name!r}; end the name in .csv, .tsv or .parquet")
    prefix = str(path.parent) + os.sep
    df = df.assign(**{schema.PATH: [p.removeprefix(prefix).replace(os.sep, "/") for p in df[schema.PATH]]})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".parquet":
        _files.atomic_write(path, lambda file: df.to_parquet(file, index=False))
    else:
        text = df.to_csv(index=False, sep=_SEPARATORS[path.suffix.lower()] or ",")
        _files.atomic_write(path, lambda file: file.write(text.encode()))


def require_two_classes(df: pd.DataFrame, purpose: str = "This step") -> None:
    """Raise an `InputError` that says what is there unless both real and fake images are."""
    counts = df[schema.LABEL].value_counts()
    real, fake = int(counts.get(schema.REAL, 0)), int(counts.get(schema.FAKE, 0))
    if not (real and fake):
        raise InputError(
            f"{purpose} needs real and fake images; the manifest has {real:,} real, {fake:,} fake and "
            f"{len(df) - real - fake:,} without a label. Add the missing class or fill the column 'label'"
        )


def assign_splits(
    df: pd.DataFrame,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    group: str | None = None,
) -> pd.DataFrame:
    """Give a split to the rows that have none; rows that have one keep it.

    Parameters
    ----------
    df : DataFrame
        A manifest.
    fractions : mapping, optional
        Share of each split; default 0.7 train, 0.15 val, 0.15 test. Each generator, and the reals, are split
        in these shares. The result depends on the seed and on the paths below their common folder, not on
        the order of rows or the machine.
    seed : int
    group : column name, optional
        Rows with the same value stay in one split across all generators, e.g. ``"caption"`` where several
        fakes were made from one prompt. The shares then hold on average only.

    Returns
    -------
    DataFrame
        A copy with ``split`` filled.
    """
    fractions = dict(fractions or {"train": 0.7, "val": 0.15, "test": 0.15})
    if (
        set(fractions) - set(schema.SPLITS)
        or min(fractions.values()) < 0
        or abs(sum(fractions.values()) - 1) > 1e-6
    ):
        raise InputError(
            f"fractions are {fractions}; give shares of {', '.join(schema.SPLITS)} that add up to 1"
        )
    if group is not None and group not in df:
        raise InputError(f"no column {group!r} to group by; the manifest has {', '.join(df.columns)}")
    df = df.copy()
    folder = os.path.commonpath([os.path.dirname(p) for p in df[schema.PATH]]) if len(df) else ""
    keys = pd.Series([os.path.relpath(p, folder) for p in df[schema.PATH]], index=df.index)
    if group is not None:
        keys = df[group].where(df[group].notna(), keys).astype(str)
    place = keys.map(lambda key: int(hashlib.sha256(f"{seed}\0{key}".encode()).hexdigest()[:13], 16) / 16**13)
    todo = df[schema.SPLIT].isna()
    if group is None:  # exact shares: the place in the generator's own order, instead of the number itself
        place = place[todo].groupby(df.loc[todo, schema.GENERATOR]).rank(method="first", pct=True)
        place -= 0.5 / df.loc[todo].groupby(schema.GENERATOR)[schema.PATH].transform("size")
    bins = [0.0, *pd.Series(fractions).cumsum()]
    bins[-1] = 2.0
    chosen = pd.cut(place[todo], bins, right=False, labels=list(fractions), ordered=False).astype(object)
    df.loc[todo, schema.SPLIT] = chosen
    return df


def _read_csv(path: Path) -> pd.DataFrame:
    suffix = path.suffix.lower()
    if suffix not in _SEPARATORS:
        known = ", ".join((*_SEPARATORS, ".parquet"))
        raise InputError(f"{path.name} is no table known here: expected {known}, or a folder of images")
    try:
        with open(path, encoding="utf-8-sig") as file:
            head = file.readline()
        separator = _SEPARATORS[suffix] or max(",;\t", key=head.count)
        # text as it stands: a caption "None" or "NA" is a caption, not a missing one
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 text ({error}); save it as UTF-8") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path.name} is empty; expected a header line with at least 'path'") from None
    except pd.errors.ParserError as error:
        problem = str(error).strip()
        raise InputError(f"{path.name} cannot be read as a table: {problem}; mend that line") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas took the surplus field for row names
        raise InputError(
            f"{path.name}: its rows have more fields than the header; quote the texts that hold {separator!r}"
        )
    return table


def _unpack(tables: Iterable, what: str, images_to: str | Path | None, base: Path) -> pd.DataFrame:
    """Rows of tables that may hold images inside; these are written to `images_to`."""
    rows: list[dict] = []
    seen: Counter[str] = Counter()
    for (found, class_names, column), split in tables:
        if column is not None:
            if images_to is None:
                raise InputError(
                    f"{what} holds the images inside (column {column!r}); name a folder to write them to: "
                    "images_to='images' (each is written once, byte for byte)"
                )
            found = unpack_images(found, column, Path(os.path.abspath(images_to)), base, seen)
        for row in found:
            row = dict(row)
            for name, names in class_names.items():  # class 0 may well be called 'fake': go by the name
                if row.get(name) is not None and 0 <= int(row[name]) < len(names):
                    row[name] = names[int(row[name])]
            if split is not None:
                row.setdefault(schema.SPLIT, split)
            rows.append(row)
    return pd.DataFrame(rows)


def _split_of_file(file: Path, top: Path) -> str | None:
    match = _SHARD.match(file.stem)
    names = [match[1] if match else file.stem, *(file.parent.relative_to(top).parts if top.is_dir() else ())]
    return next((layouts.SPLIT_WORDS[n.lower()] for n in names if n.lower() in layouts.SPLIT_WORDS), None)


def _finish(raw: pd.DataFrame, what: str, base: Path, source: str) -> pd.DataFrame:
    """Raw columns of any name to the manifest's columns, checked."""
    if not len(raw):
        raise InputError(f"{what} has no rows; expected one per image")
    found = _match_columns(raw, what)
    text = {column: _texts(raw[name], column, what) for column, name in found.items()}
    index = raw.index
    paths = text[schema.PATH]
    if (paths == "").any():
        raise InputError(
            f"{what}: row {int((paths == '').argmax()) + 1} has no {found[schema.PATH]!r}; fill or drop it"
        )
    empty = pd.Series("", index=index)
    generator = text.get(schema.GENERATOR, empty)
    if schema.LABEL in text:
        label, named = _labels(text[schema.LABEL], found[schema.LABEL], what)
        generator = generator.where(generator != "", named)
    else:
        label = pd.Series(pd.NA, index=index, dtype="Int8")
    is_real = (label == schema.REAL).fillna(False)
    origin = text.get(schema.SOURCE, empty)
    # "camera" or "LAION" in the generator column of a photograph is where it comes from, not what made it
    kept = generator.where(is_real & (generator.str.casefold() != schema.REAL_GENERATOR), "")
    origin = origin.where(origin != "", kept)
    split = text.get(schema.SPLIT, empty).str.casefold()
    df = pd.DataFrame(
        {
            schema.PATH: [os.path.abspath(os.path.join(base, p)) for p in paths],
            schema.LABEL: label,
            schema.GENERATOR: generator.mask(generator == "", "unknown").mask(is_real, schema.REAL_GENERATOR),
            schema.SOURCE: origin.mask(origin == "", source),
            schema.SPLIT: split.map(lambda s: layouts.SPLIT_WORDS.get(s, s or None)),
            schema.CAPTION: text.get(schema.CAPTION, empty).map(lambda s: s or None),
        }
    ).astype({schema.SPLIT: object, schema.CAPTION: object})
    if schema.IMAGE_ID in text:
        df[schema.IMAGE_ID] = text[schema.IMAGE_ID].map(lambda s: s or None)
    df = df.reset_index(drop=True)
    _check_paths(df, what, base)
    return df


def _match_columns(raw: pd.DataFrame, what: str) -> dict[str, str]:
    names = {_column(c): c for c in reversed(list(raw.columns))}
    found = {
        column: next((names[a] for a in aliases if a in names), None) for column, aliases in ALIASES.items()
    }
    for column in (schema.PATH, schema.LABEL):
        if found[column] is not None:
            continue
        unused = [n for n, original in names.items() if original not in found.values()]
        near = sorted({m for a in ALIASES[column] for m in difflib.get_close_matches(a, unused, 1, 0.75)})
        if (
            near or column == schema.PATH
        ):  # without labels a manifest is still good for extraction and detection
            hint = f" Is {names[near[0]]!r} meant? Rename it to {column!r}." if near else ""
            raise InputError(
                f"{what} has no column {column!r} (also read: {', '.join(ALIASES[column][1:])}); "
                f"found {', '.join(map(str, raw.columns))}.{hint}"
            )
    return {column: name for column, name in found.items() if name is not None}


def _labels(values: pd.Series, name: str, what: str) -> tuple[pd.Series, pd.Series]:
    """Labels as 0, 1 or missing; and the generator, where the label column names it (GRIP's `typ`)."""
    known = LABEL_VALUES | (_TRUTH if _column(name) == "is_fake" else {})
    words = values.map(_column)
    label = words.map(lambda w: known.get(w, pd.NA)).astype("Int8")
    unknown = (words != "") & label.isna()
    named = pd.Series("", index=values.index)
    if _column(name) == "typ":
        return label.mask(unknown, schema.FAKE), values.where(unknown, "")
    if unknown.any():
        counts = values[unknown].value_counts()
        listed = ", ".join(f"{value!r} ({n} rows)" for value, n in counts.head(8).items())
        raise InputError(
            f"{what}: {len(counts)} unknown values in column {name!r}: {listed}. "
            "Expected 0 or real or nature, 1 or fake or ai, or empty where unknown"
        )
    return label, named


def _check_paths(df: pd.DataFrame, what: str, base: Path) -> None:
    twice = df[df[schema.PATH].duplicated(keep=False)]
    if len(twice):
        labels = twice.groupby(schema.PATH)[schema.LABEL].nunique(dropna=False)
        clash = labels[labels > 1]
        n, first = (len(clash), clash.index[0]) if len(clash) else (len(labels), twice[schema.PATH].iloc[0])
        rows = ", ".join(str(i + 1) for i in df.index[df[schema.PATH] == first][:5])
        problem = "with labels that contradict each other" if len(clash) else "more than once"
        raise InputError(
            f"{what} lists {n} paths {problem}; first: {first} (rows {rows}). Keep one row per image"
        )
    if not any(os.path.lexists(p) for p in df[schema.PATH]):
        raise InputError(
            f"none of the {len(df):,} images of {what} exists; first looked for: {df[schema.PATH].iloc[0]}. "
            f"Relative paths are read against {base.absolute()}: pass root= if they lie elsewhere"
        )


def _texts(values: pd.Series, column: str, what: str) -> pd.Series:
    """Values of one column as text, empty where missing; of several captions the first that is not empty."""
    several = column == schema.CAPTION
    texts = []
    for number, value in enumerate(map(_first, values) if several else values, 1):
        if pd.api.types.is_list_like(value) or isinstance(value, bytes):
            more = ", or a list of texts" if several else ""
            raise InputError(
                f"{what}: row {number} of column {values.name!r} holds {type(value).__name__}; expected one "
                f"text for each image{more}. Convert the column first"
            )
        texts.append("" if value is None or pd.isna(value) else str(value).strip())
    return pd.Series(texts, index=values.index)


def _first(captions: object) -> object:
    """First caption of a list or array that is not empty; anything else as it is."""
    if not isinstance(captions, (list, tuple, np.ndarray)):
        return captions
    for caption in captions:
        if caption is not None and not (isinstance(caption, str) and not caption.strip()):
            return caption
    return None


def _column(name: object) -> str:
    return str(name).strip().casefold().replace(" ", "_").replace("-", "_")


def describe_manifest(manifest: pd.DataFrame) -> list[str]:
    """Lines that say what was found before anything slow begins."""
    return [f"{len(manifest):,} images"]
