"""The manifest: every image as one row of one table, whatever form the data set came in.

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from itemkit import _files, layouts, schema
from itemkit.errors import InputError
from itemkit.images import EXTENSIONS, ImageError, content_id, open_image, reads
from itemkit.layouts import normalise, read_name
from itemkit.splits import plan_splits
from itemkit.text import count, did_you_mean, printable

# Names under which data sets of the field keep each column, in the order in which they are tried.
ALIASES: dict[str, tuple[str, ...]] = {
    schema.PATH: ("path", "filename", "file_name", "file", "filepath", "file_path", "image_path", "img_path",
                  "image", "img", "image_name", "image_file", "name", "filenames", "files", "images"),
    schema.GENERATOR: ("generator", "model", "model_name"),
    schema.SOURCE: ("source", "real_source", "dataset"),
    schema.SPLIT: ("split", "subset", "partition", "set", "phase", "usage", "fold", "data_split"),
    schema.CAPTION: ("caption", "text", "prompt", "sentence", "captions", "description"),
    schema.IMAGE_ID: ("image_id",),
}  # fmt: skip
# Columns that hold what this table calls a label, if their values are words for real and fake.
_LABEL_NAMES = re.compile(
    r"(.*_)?(labels?|class(es)?|category|target|truth|gt|typ|type|kind|y|verdict|annotation|answer)(_.*)?"
)
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "f": 0, "t": 1}
_IMAGE_COLUMNS = ("image", "img", "image_data", "image_bytes", "jpg", "png", "webp")
_ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
TABLE_LAYOUTS = ("csv", "grip", "parquet", "openfake", "communityforensics", "datasets")
LAYOUTS = ("auto", *TABLE_LAYOUTS, *layouts.FOLDER_LAYOUTS)
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
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
        A CSV, TSV, JSON-lines or Parquet table; a folder tree in a layout of the field; a folder of Parquet
        files or one written by ``Dataset.save_to_disk``.
    layout : str
        One of `LAYOUTS`. ``auto`` decides from what it finds: folders named after real and fake go before a
        table that lies beside them; more than one other answer is an error that lists them.
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
        taken. ``attrs["report"]`` says what was found, used and left out; splits are filled in later, by
        `splits.fill_splits`, since they follow from the content of the files.

    Raises
    ------
    InputError
        Nothing to read, several possible layouts, columns missing, unknown or contradicting labels, a path
        twice, values that are no text.
    """
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r};{did_you_mean(layout, LAYOUTS)} Known: {', '.join(LAYOUTS)}")
    if not isinstance(source, (str, os.PathLike)):
        base = Path(root or os.curdir)
        if isinstance(source, pd.DataFrame):
            return _finish(source, "the table", base, "table")
        notes: list[str] = []
        raw = _unpack(_dataset_parts(source), "the data set", images_to, base, notes)
        return _finish(raw, "the data set", base, "dataset", notes=notes)

    path = _absolute(source)
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; give a CSV, TSV or Parquet table, or a folder of images"
        )
    if not path.is_dir():
        if layout in layouts.FOLDER_LAYOUTS or real_root is not None:
            raise InputError(f"{path} is a table; layout={layout!r} and real_root= are for folders of images")
        return _read_table([path], path, root, images_to)
    stored = _arrow_files(path)
    if layout in TABLE_LAYOUTS:
        tables = stored or [p for p in sorted(path.iterdir()) if p.suffix.lower() in layouts.TABLES]
        if not stored and len(tables) != 1:
            there = ", ".join(p.name for p in tables) or "none"
            raise InputError(f"layout {layout!r} reads a table; {path} holds {there}: name the table itself")
        return _read_table(tables, path, root, images_to)
    reals = None if real_root is None else _absolute(real_root)
    if reals is not None and not reals.is_dir():
        raise InputError(f"real_root {reals} is not a folder")
    return _read_folder(path, layout, reals, stored, root, images_to)


def _read_folder(
    path: Path, layout: str, real_root: Path | None, stored: list[Path], root: Any, images_to: Any
) -> pd.DataFrame:
    """Folder tree, or the table in it where no folder names a label."""
    found = layouts.scan(path)
    listing = found.metadata if not stored else []
    tables = [*stored, *(t for t in found.tables if t not in stored)]
    notes = []
    if layout == "auto":
        labelled = bool(found.folders) and bool(layouts.Tree(found).labels)
        if not labelled and real_root is None and stored and (not found.folders or _holds_images(stored)):
            n = len(found)
            notes = [f"{count(n, 'image file')} beside the table {stored[0].name}: not read"] if n else []
            return _read_table(stored, path, root, images_to, notes)
        if not found.folders and len(tables) == 1:
            return _read_table(tables, path, root, images_to)
        if not labelled and listing:
            layout = "unlabelled"
    raw, about = layouts.read_folder(found, layout, real_root)
    if tables:
        names = ", ".join(t.name for t in tables[:3]) + (" ..." if len(tables) > 3 else "")
        notes.append(f"tables beside the images are not read: {names} (give the table itself to use it)")
    raw, known = _add_metadata(raw, listing, path, notes)
    extra = {"left_out": found.counts(), "layout": about["layout"]}
    if closed := sum(not reads(path) for path in raw[schema.PATH]):
        notes.append(
            f"{count(closed, 'image')} in HEIC, HEIF or AVIF cannot be read here and will be error rows: "
            'pip install "itemkit[heic]"'
        )
    notes = [*list(about.pop("notes")), *notes]
    return _finish(raw, str(path), path, path.name, known or about["labels"], notes, extra)


def _add_metadata(
    raw: pd.DataFrame, files: list[Path], top: Path, notes: list[str]
) -> tuple[pd.DataFrame, str | None]:
    """Captions, and labels where the folders have none, from the ``metadata`` files of an ImageFolder."""
    parts = []
    for file in files:
        table = _read_text_table(file) if file.suffix != ".parquet" else next(_arrow_parts(file)).table
        table = _finish(table, file.name, file.parent, top.name, notes=[])
        parts.append(table)
        notes += [f"{file.name}: {line}" for line in table.attrs["report"]["notes"]]
    if not parts:
        return raw, None
    known = pd.concat(parts).drop_duplicates(schema.PATH).set_index(schema.PATH)
    rows = known.reindex(raw[schema.PATH]).reset_index(drop=True)
    n = int(rows.notna().any(axis=1).sum())
    notes.append(f"{count(len(files), 'metadata file')} read, which list {n:,} of the images")
    for column in (schema.CAPTION, schema.SPLIT):
        raw[column] = raw[column].where(raw[column].notna(), rows[column])
    if not rows[schema.LABEL].notna().any():
        return raw, None
    if raw[schema.LABEL].notna().any():
        differ = (raw[schema.LABEL].astype("Int8") != rows[schema.LABEL]).fillna(False)
        if differ.any():
            raise InputError(
                f"{top}: the folders and {files[0].name} give {count(int(differ.sum()), 'image')} different "
                f"labels; first: {raw[schema.PATH][int(differ.to_numpy().argmax())]}. Mend one or remove it"
            )
        return raw, None
    raw[schema.LABEL] = rows[schema.LABEL]
    for column in (schema.GENERATOR, schema.SOURCE):
        raw[column] = rows[column].where(rows[column].notna(), raw[column])
    return raw, f"{files[0].name}, {parts[0].attrs['report']['labels']}"


def write_manifest(df: pd.DataFrame, path: str | Path) -> None:
    """Write a manifest as CSV, TSV or Parquet, by the extension; paths below its folder are kept relative.

    Parameters
    ----------
    df : DataFrame
        As `read_manifest` gives it.
    path : path
        A folder made of this file and the images beside it can be moved as a whole.
    """
    path = _absolute(path)
    if path.suffix.lower() not in (*_SEPARATORS, ".parquet"):
        raise InputError(f"cannot write a manifest as {path.name!r}; end the name in .csv, .tsv or .parquet")
    prefix = str(path.parent) + os.sep
    df = df.assign(**{schema.PATH: [p.removeprefix(prefix).replace(os.sep, "/") for p in df[schema.PATH]]})
    df.attrs = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".parquet":
        try:
            _files.atomic_write(path, lambda file: df.to_parquet(file, index=False))
        except UnicodeEncodeError:
            raise InputError(f"{path.name}: a file name is not UTF-8; write .csv, which holds it") from None
    else:
        data = df.to_csv(index=False, sep=_SEPARATORS[path.suffix.lower()]).encode("utf-8", "surrogateescape")
        _files.atomic_write(path, lambda file: file.write(data))


def require_two_classes(df: pd.DataFrame, purpose: str = "This step") -> None:
    """Raise an `InputError` that says what is there unless both real and fake images are."""
    counts = df[schema.LABEL].value_counts()
    real, fake = int(counts.get(schema.REAL, 0)), int(counts.get(schema.FAKE, 0))
    if not (real and fake):
        raise InputError(
            f"{purpose} needs real and fake images; the manifest has {real:,} real, {fake:,} fake and "
            f"{len(df) - real - fake:,} without a label. Add the missing class or fill the column 'label'"
        )


# ---- what was found, in words


def describe_manifest(manifest: pd.DataFrame) -> list[str]:
    """Say what a manifest holds and what was left out, before anything slow begins.

    Parameters
    ----------
    manifest : DataFrame
        Of `read_manifest`, whole or in part.

    Returns
    -------
    list of str
        Lines: images, labels, generators, splits, captions, what was left out, notes.
    """
    report = manifest.attrs.get("report", {})
    label = manifest[schema.LABEL]
    real, fake = (int((label == value).sum()) for value in (schema.REAL, schema.FAKE))
    none = len(label) - real - fake
    where = f" in {report['source']}" if report.get("source") else ""
    n = len(manifest)
    lines = [f"{count(n, 'image')}{where}: {real:,} real, {fake:,} fake, {none:,} without a label"]
    lines.append(f"labels: {report.get('labels') or ('column' if real + fake else 'none')}")
    for name, why in report.get("not_used_as_labels", {}).items():
        lines.append(f"  column {name!r} is not used as label: {why}")
    generators = manifest.loc[(label == schema.FAKE).fillna(False), schema.GENERATOR].value_counts()
    if len(generators):
        listed = ", ".join(f"{name} ({n:,})" for name, n in generators.head(8).items())
        more = f" and {len(generators) - 8} more" if len(generators) > 8 else ""
        lines.append(f"generators: {listed}{more}")
    splits = manifest[schema.SPLIT].value_counts()
    there = [", ".join(f"{n:,} {name}" for name, n in splits.items())] if len(splits) else []
    lines.append(f"splits: {'; '.join([*there, *plan_splits(label, manifest[schema.SPLIT]).notes])}")
    lines.append(f"captions: {int(manifest[schema.CAPTION].notna().sum()):,} of {n:,} images have one")
    if unused := report.get("unused_columns"):
        lines.append(f"columns not used: {', '.join(unused)}")
    found = report.get("left_out", {})
    for key, words in (("left_out", "left out, no image by ending or content"),
                       ("by_content", "taken by their content, whatever the ending says")):  # fmt: skip
        if found.get(key):
            listed = ", ".join(f"{n:,} {ending}" for ending, n in found[key].items())
            lines.append(f"{words}: {listed}")
    if found.get("unreadable"):
        shut = found["unreadable"]
        lines.append(f"could not be read: {count(len(shut), 'folder or file')}: {', '.join(shut[:5])}")
    for key, words in (("hidden", "hidden and skipped"), ("links_back", "links that lead back, skipped")):
        if found.get(key):
            lines.append(f"{words}: {found[key]:,}")
    return [printable(line) for line in [*lines, *(f"note: {note}" for note in report.get("notes", []))]]


# ---- tables with images inside, and tables on disk


class _Part(NamedTuple):
    """Some rows of a table: its columns less the images, the images, the split that its file name says."""

    table: pd.DataFrame
    images: list[Any] | None
    split: str | None
    column: str | None = None


def _absolute(path: Any) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _arrow_files(path: Path) -> list[Path]:
    """Parquet or Arrow files of a folder as the hub and ``datasets`` lay them out; none elsewhere."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        folders = sorted({p.parent for name in ("state.json", "*.arrow") for p in path.rglob(name)})
        return [file for folder in folders for file in _saved_files(folder)]
    places = ("*.parquet", "data/*.parquet", "*.arrow")
    found = next((files for place in places if (files := sorted(path.glob(place)))), [])
    # img2dataset keeps its own table 00000.parquet beside the folder 00000
    return [file for file in found if not file.with_suffix("").is_dir()]


def _saved_files(folder: Path) -> list[Path]:
    """Files of one saved data set, in its own order; what ``map`` and ``filter`` left there is none."""
    state = folder / "state.json"
    try:
        stored = json.loads(state.read_text()) if state.is_file() else {}
    except ValueError as error:
        raise InputError(f"{state} cannot be read ({error}); save the data set again") from None
    named = [folder / file["filename"] for file in stored.get("_data_files") or ()]
    return named or sorted(p for p in folder.glob("*.arrow") if not p.name.startswith("cache-"))


def _open_arrow(path: Path) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of a Parquet file, or of an Arrow file (stream as ``datasets``, or file)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            file = pq.ParquetFile(path)
            return file.schema_arrow, file.iter_batches(batch_size=256)
        try:
            stream = pa.ipc.open_stream(pa.memory_map(str(path)))
            return stream.schema, iter(stream)
        except pa.ArrowInvalid:
            whole = pa.ipc.open_file(pa.memory_map(str(path)))
            return whole.schema, (whole.get_batch(i) for i in range(whole.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from None


def _image_column(columns: Iterable[str]) -> str | None:
    return next((c for c in columns if normalise(c) in _IMAGE_COLUMNS), None)


def _arrow_image_column(columns: Any) -> str | None:
    import pyarrow as pa

    def holds_bytes(name: str) -> bool:
        kind = columns.field(name).type
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    return _image_column(filter(holds_bytes, columns.names))


def _holds_images(files: list[Path]) -> bool:
    return _arrow_image_column(_open_arrow(files[0])[0]) is not None


def _arrow_parts(path: Path, top: Path | None = None) -> Iterator[_Part]:
    columns, batches = _open_arrow(path)
    column = _arrow_image_column(columns)
    stored = json.loads((columns.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    names = {c: f["names"] for c, f in features.items() if isinstance(f, dict) and "names" in f}
    try:
        for batch in batches:
            images = batch.column(column).to_pylist() if column else None
            kept = batch.drop_columns([column]) if column else batch
            table = _name_classes(kept.to_pandas(), names)
            yield _Part(table, images, _split_of_file(path, top or path), column)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from None


def _dataset_parts(dataset: Any) -> Iterator[_Part]:
    """Read a ``Dataset`` or ``DatasetDict`` object without needing the library, each part with its split."""
    if hasattr(dataset, "items"):
        parts: list[tuple[Any, str | None]] = [(part, str(split)) for split, part in dataset.items()]
    elif hasattr(dataset, "__iter__"):
        split = getattr(dataset, "split", None)
        parts = [(dataset, str(split) if split is not None else None)]
    else:
        raise InputError(
            f"cannot read a {type(dataset).__name__}; give a path, a DataFrame or a datasets object"
        )
    for part, split in parts:
        features = getattr(part, "features", None) or {}
        first: dict[str, Any] = next(iter(part), {})
        column = _image_column([c for c in first if not isinstance(first[c], str)])
        kind = type(features[column]) if column in features else None
        if kind is not None and hasattr(part, "cast_column"):
            part = part.cast_column(column, kind(decode=False))  # the file's own bytes, not decoded pixels
        rows = [dict(row) for row in part]
        images = [row.pop(column) for row in rows] if column else None
        names = {c: f.names for c, f in features.items() if getattr(f, "names", None)}
        yield _Part(_name_classes(pd.DataFrame(rows), names), images, split, column)


def _name_classes(table: pd.DataFrame, names: dict[str, list[str]]) -> pd.DataFrame:
    """Numbers of classes to their names: class 0 may well be called 'fake'."""
    for column, words in names.items():
        if column in table:
            known = dict(enumerate(words))
            table[column] = [known.get(value, value) for value in table[column]]
    return table


def _unpack(
    parts: Iterable[_Part], what: str, images_to: Any, base: Path, notes: list[str]
) -> pd.DataFrame:
    """Rows of tables that may hold images inside; these are written to `images_to`."""
    tables, seen, without = [], Counter[str](), 0
    for table, images, split, column in parts:
        if images is not None:
            paths = []
            for value in images:
                data, path = value, None
                if isinstance(value, dict):
                    data, path = value.get("bytes"), value.get("path")
                if data is not None and not isinstance(data, bytes):
                    raise InputError(
                        f"column {column!r} holds {type(data).__name__}; expected the bytes of image files. "
                        "Cast the column of a datasets object to Image(decode=False)"
                    )
                if data is not None and images_to is None:
                    raise InputError(
                        f"{what} holds the images inside (column {column!r}); name a folder to write them "
                        "to: images_to='images' (each is written once, byte for byte)"
                    )
                without += data is None and path is not None
                inside = data is not None or not path
                paths.append(_write_image(data, images_to or base, seen) if inside else str(path))
            table = table.drop(columns=[c for c in table if normalise(c) in ALIASES[schema.PATH]])
            table[schema.PATH] = paths
        if split is not None and not {normalise(c) for c in table} & set(ALIASES[schema.SPLIT]):
            table[schema.SPLIT] = split
        tables.append(table)
    if without:
        notes.append(
            f"{what} holds no bytes in {count(without, 'row')}, only paths on the machine where it was made: "
            "if those files are not here, export the table again with the images inside (embedded)"
        )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _write_image(data: bytes | None, folder: Any, seen: Counter[str]) -> str:
    """Write an image as a file named by its content, once; equal images are numbered, so no row is lost."""
    folder = _absolute(folder)
    # a row without an image becomes a missing file, so an error row later on: nothing is dropped quietly
    name = content_id(data)[:32] if data else "no-image-in-row"
    seen[name] += 1
    number = f"-{seen[name]}" if seen[name] > 1 else ""
    if not data:
        return str(folder / f"{name}{number}")
    ending = ".img"  # unreadable: extraction will say why
    with contextlib.suppress(ImageError):
        kind = open_image(data).format or ""
        ending = _ENDINGS.get(kind, f".{kind.lower()}")
    target = folder / f"{name}{number}{ending}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _files.atomic_write(target, lambda file: file.write(data))
    return str(target)


def _split_of_file(file: Path, top: Path) -> str | None:
    match = _SHARD.match(file.stem)
    names = [match[1] if match else file.stem, *(file.parent.relative_to(top).parts if top.is_dir() else ())]
    return next((split for name in names if (split := read_name(name).split)), None)


def _read_table(
    files: list[Path], top: Path, root: Any, images_to: Any, notes: list[str] | None = None
) -> pd.DataFrame:
    """One table in one or several files."""
    base = Path(root).absolute() if root is not None else top if top.is_dir() else top.parent
    notes = list(notes or [])
    if files[0].suffix.lower() in (".parquet", ".arrow"):
        parts = (part for file in files for part in _arrow_parts(file, top))
        raw = _unpack(parts, top.name, images_to, base, notes)
    else:
        raw = _read_text_table(files[0], notes)
    return _finish(raw, top.name, base, top.stem if not top.is_dir() else top.name, notes=notes)


def _read_text_table(path: Path, notes: list[str] | None = None) -> pd.DataFrame:
    """CSV, TSV or JSON lines; values are text as it stands: a caption "None" or "NA" is a caption."""
    suffix = path.suffix.lower()
    if suffix not in (*_SEPARATORS, ".jsonl", ".ndjson"):
        known = ", ".join((*_SEPARATORS, ".parquet"))
        raise InputError(f"{path.name} is no table known here: expected {known}, .jsonl, or a folder")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "surrogateescape")
        # names of files may be of any encoding; a table whose texts are of another one is a mistake
        if not _only_names_are_odd(text, suffix, path.parent):
            raise InputError(f"{path.name} is not UTF-8 text ({error}); save it as UTF-8") from None
    if suffix not in _SEPARATORS:
        return _read_json_lines(text, path.name)
    head = text.lstrip("\r\n").split("\n", 1)[0]
    separator = "\t" if suffix == ".tsv" else max(",;\t|", key=head.count)
    try:
        table = pd.read_csv(io.BytesIO(data), sep=separator, header=None, dtype=str, keep_default_na=False,
                            encoding_errors="surrogateescape")  # fmt: skip
    except pd.errors.EmptyDataError:
        raise InputError(f"{path.name} is empty; expected a header line with at least 'path'") from None
    except pd.errors.ParserError as error:
        match = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if match and match[2] == "2":
            raise InputError(
                f"{path.name}: its rows have more fields than the header; quote texts that hold {separator!r}"
            ) from None
        problem = str(error).strip()
        raise InputError(f"{path.name} cannot be read as a table: {problem}; mend that line") from None
    first = [str(value) for value in table.iloc[0].fillna("")]
    files = [i for i, name in enumerate(first) if name.lower().endswith(EXTENSIONS)]
    if files:  # the first line is an image already
        table = table.fillna("")
        labels = [i for i in table if all(read_name(w).label is not None for w in set(table[i]) - {""})]
        names = {i: schema.LABEL for i in labels[:1]} | {files[0]: schema.PATH}
        table.columns = [names.get(i, f"column {i + 1}") for i in table]
        if notes is not None:
            what = f"its column {files[0] + 1} is read as the path"
            notes.append(f"{path.name} has no header line: {what}; add one (path,label,...)")
        return table
    table = table.iloc[1:].reset_index(drop=True).fillna("")
    table.columns = [name.strip() for name in first]
    return table


def _only_names_are_odd(text: str, suffix: str, base: Path) -> bool:
    """Whether what is not UTF-8 in a table are names of files that exist."""
    if suffix not in _SEPARATORS:
        return False
    odd = re.compile(r"[\udc80-\udcff]")
    fields = [f.strip('" \r') for f in re.split(r"[,;\t|\n]", text) if odd.search(f)]
    return all(os.path.lexists(os.path.join(base, field)) for field in fields)


def _read_json_lines(text: str, what: str) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{what}: line {number} is not JSON ({error}); mend that line") from None
        if not isinstance(row, dict):
            raise InputError(f"{what}: line {number} holds {type(row).__name__}; expected an object per line")
        rows.append(row)
    return pd.DataFrame(rows)


# ---- raw columns of any name to the manifest's columns


def _finish(
    raw: pd.DataFrame,
    what: str,
    base: Path,
    source: str,
    labels: Any = None,
    notes: list[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """Columns of any name to the manifest's, checked; `labels` says where those of a folder come from."""
    if not len(raw):
        raise InputError(f"{what} has no rows; expected one per image")
    notes = list(notes or [])
    raw = raw.reset_index(drop=True)
    raw.columns = [str(c) for c in raw.columns]
    found = _match_columns(raw, what, base, notes)
    text = {column: _texts(raw, name, column, what) for column, name in found.items()}
    paths = text[schema.PATH]
    if (paths == "").any():
        row = int((paths == "").argmax()) + 1
        raise InputError(f"{what}: row {row} has no {found[schema.PATH]!r}; fill or drop it")
    paths = _resolve(paths, base, notes)
    empty = pd.Series("", index=raw.index)
    generator = text.get(schema.GENERATOR, empty)
    unused: dict[str, str] = {}
    if labels is None:
        label, named, labels, read = _find_labels(raw, found, paths, base, what, unused)
        generator = generator.where(generator != "", named)
    else:
        label, read = raw[schema.LABEL].astype("Int8"), (schema.LABEL,)
    is_real = (label == schema.REAL).fillna(False).astype(bool)
    origin = text.get(schema.SOURCE, empty)
    # "camera" or "LAION" in the generator column of a photograph is where it comes from, not what made it
    plain = {name: _is_real_word(name) for name in generator.unique()}
    kept = generator.where(is_real & ~generator.map(plain).astype(bool), "")
    origin = origin.where(origin != "", kept)
    df = pd.DataFrame(
        {
            schema.PATH: paths,
            schema.LABEL: label,
            schema.GENERATOR: generator.mask(generator == "", "unknown").mask(is_real, schema.REAL_GENERATOR),
            schema.SOURCE: origin.mask(origin == "", source),
            schema.SPLIT: text.get(schema.SPLIT, empty).map(_split),
            schema.CAPTION: text.get(schema.CAPTION, empty).map(lambda s: s or None),
        }
    ).astype({schema.SPLIT: object, schema.CAPTION: object})
    if schema.IMAGE_ID in text:
        df[schema.IMAGE_ID] = text[schema.IMAGE_ID].map(lambda s: s or None)
    _check_paths(df, what, base, notes)
    used = {*found.values(), *read, *unused}
    df.attrs["report"] = {
        "source": printable(what),
        "images": len(df),
        "real": int((df[schema.LABEL] == schema.REAL).sum()),
        "fake": int((df[schema.LABEL] == schema.FAKE).sum()),
        "labels": labels,
        "not_used_as_labels": unused,
        "splits": {str(name): int(n) for name, n in df[schema.SPLIT].value_counts().items()},
        "splits_then": plan_splits(df[schema.LABEL], df[schema.SPLIT]).notes,
        "captions": int(df[schema.CAPTION].notna().sum()),
        "unused_columns": [printable(c) for c in dict.fromkeys(raw.columns) if c not in used],
        "notes": [printable(note) for note in notes],
        **(extra or {}),
    }
    return df


def _is_real_word(value: str) -> bool:
    name = read_name(value)
    return name.label == schema.REAL and name.sure == 2


def _split(value: str) -> str | None:
    return read_name(value).split or value.casefold() or None


def _match_columns(raw: pd.DataFrame, what: str, base: Path, notes: list[str]) -> dict[str, str]:
    """Manifest column -> the raw column that holds it."""
    names: dict[str, list[int]] = {}
    for i, name in enumerate(raw.columns):
        names.setdefault(normalise(name), []).append(i)
    wanted = {*(a for aliases in ALIASES.values() for a in aliases), schema.LABEL}
    for name, places in names.items():
        if len(places) > 1 and name in wanted:
            first, *others = (raw.iloc[:, i].astype(str).to_numpy() for i in places)
            if not all((first == other).all() for other in others):
                twice = " and ".join(repr(raw.columns[i]) for i in places)
                raise InputError(f"{what} has the columns {twice} with different values; rename or drop one")
    original = {name: raw.columns[places[0]] for name, places in names.items()}
    found = {}
    for column, aliases in ALIASES.items():
        there = [original[a] for a in aliases if a in original]
        if column == schema.PATH and len(there) > 1:
            there = _best_paths(raw, there, base, notes)
        if column == schema.SPLIT:  # "set" or "fold" may hold anything
            there = [c for c in there if normalise(c) in aliases[:3] or _all_splits(_column(raw, c))]
        if there:
            found[column] = there[0]
    if schema.PATH not in found:
        near = [m for a in ALIASES[schema.PATH] for m in difflib.get_close_matches(a, original, 1, 0.75)]
        hint = f" Is {original[near[0]]!r} meant? Rename it to 'path'." if near else ""
        raise InputError(
            f"{what} has no column 'path' (also read: {', '.join(ALIASES[schema.PATH][1:])}); "
            f"found {', '.join(map(printable, raw.columns))}.{hint}"
        )
    return found


def _column(raw: pd.DataFrame, name: str) -> pd.Series:
    column = raw[name]
    return column.iloc[:, 0] if isinstance(column, pd.DataFrame) else column


def _all_splits(values: pd.Series) -> bool:
    words = {str(v) for v in values.dropna().unique() if str(v)}
    return bool(words) and all(read_name(word).split for word in words)


def _best_paths(raw: pd.DataFrame, columns: list[str], base: Path, notes: list[str]) -> list[str]:
    """Of several columns that may hold paths, one whose files exist, or else whose texts end like images."""

    def there(name: str) -> tuple[bool, bool]:
        some = [str(v) for v in _column(raw, name).head(20)]
        exist = any(v and os.path.isfile(os.path.join(base, v.replace("\\", "/"))) for v in some)
        return exist, any(v.lower().endswith(EXTENSIONS) for v in some)

    best = max(columns, key=there)  # of equals the first
    notes.append(f"of the columns {', '.join(columns)}, {best!r} is read as the path")
    return [best]


def _resolve(paths: pd.Series, base: Path, notes: list[str]) -> pd.Series:
    """Make paths absolute; backslashes of Windows, and its drives, are read as they were meant."""
    if os.sep == "/" and paths.str.contains("\\", regex=False).any():
        odd = paths.str.contains("\\", regex=False)
        odd &= ~paths.map(lambda p: os.path.lexists(os.path.join(base, p)))
        meant = paths[odd].str.replace("\\", "/", regex=False)
        drive = meant.str.match(r"[A-Za-z]:/")
        if drive.any():  # C:/somebody/data/fake/a.png: what of it lies here?
            parts = meant[drive].iloc[0].split("/")
            here = (i for i in range(1, len(parts)) if os.path.lexists(os.path.join(base, *parts[i:])))
            cut = next(here, 1)
            meant = meant.mask(drive, meant.map(lambda p: "/".join(p.split("/")[cut:])))
            notes.append(f"paths of another machine are read without {'/'.join(parts[:cut])}/")
        if odd.any():
            notes.append(f"backslashes in {count(int(odd.sum()), 'path')} are read as slashes")
            paths = paths.mask(odd, meant)
    return paths.map(lambda p: os.path.abspath(os.path.join(base, p)))


# ---- labels of a table


class _Labels(NamedTuple):
    """Labels, the generators that the same column names, where they come from, and the columns used."""

    values: pd.Series
    generator: pd.Series
    where: str
    used: tuple[str, ...] = ()


class _Reading(NamedTuple):
    """What a column says about each row (0, 1, nan), how (a key of `_HOW`), and whether of both classes."""

    values: pd.Series
    how: str
    both: bool
    text: pd.Series


# How a column may say labels, the surest first.
_HOW = ("flags", "words", "names", "unclear flags", "unnamed words")
_UNUSED = {
    "unclear flags": "it holds 0 and 1 without saying which is fake; rename it to 'is_fake' or 'is_real'",
    "unnamed words": "its values look like labels; rename it to 'label' to use them",
}


def _read_label_column(name: str, text: pd.Series) -> _Reading | None:
    """Read a column as labels, as far as its name and its values say so without doubt."""
    words = [w for w in text.unique() if w]
    if not words or len(words) > 2000:
        return None
    plain, key = normalise(name), {w: w.casefold() for w in words}
    exact = plain in ("label", "labels")
    means = read_name(re.sub(r"^(is|was|isa)_", "", plain))
    if all(key[w] in _FLAGS for w in words):
        flag = text.map(lambda w: _FLAGS.get(w.casefold(), np.nan)).astype(float)
        if exact or (means.label is not None and means.sure and "label" not in plain):
            flag = 1 - flag if means.label == schema.REAL else flag
            return _Reading(flag, "flags", flag.nunique() > 1, text)
        like = _LABEL_NAMES.fullmatch(plain) or means.label is not None
        return _Reading(flag * np.nan, "unclear flags", False, text) if like else None
    known = {w: n.label for w in words if (n := read_name(w)).label is not None and n.sure}
    known |= {w: _FLAGS[key[w]] for w in words if exact and key[w] in _FLAGS}
    values, both = text.map(known).astype(float), len(set(known.values())) > 1
    if len(known) == len(words):
        like = exact or _LABEL_NAMES.fullmatch(plain) or "real" in plain or "fake" in plain
        named = "words" if like else "unnamed words"
        return _Reading(values, named, both, text) if like or both else None
    if plain == "typ" or (plain in ALIASES[schema.GENERATOR] and schema.REAL in known.values()):
        return _Reading(values.mask((text != "") & values.isna(), schema.FAKE), "names", True, text)
    return None


def _find_labels(
    raw: pd.DataFrame, found: dict[str, str], paths: pd.Series, base: Path, what: str, unused: dict[str, str]
) -> _Labels:
    """Labels from the column that says them without doubt; what may be some but is not used goes to `unused`.

    Raises an `InputError` where another column, or the folders of the images, say the contrary.
    """
    taken = {found.get(c) for c in (schema.PATH, schema.SPLIT, schema.CAPTION, schema.IMAGE_ID)}
    readings = {}
    for name in dict.fromkeys(raw.columns):
        with contextlib.suppress(InputError):  # lists, bytes
            reading = _read_label_column(name, _texts(raw, name, name, what)) if name not in taken else None
            if reading is not None:
                readings[name] = reading
    exact = next((c for c in raw.columns if normalise(c) in ("label", "labels")), None)
    order = sorted(readings, key=lambda c: (c != exact, _HOW.index(readings[c].how)))
    usable = [c for c in order if readings[c].how not in _UNUSED]
    odd = [c for c in order if c not in usable and c != found.get(schema.SOURCE)]
    unused |= {printable(c): _UNUSED[readings[c].how] for c in odd}
    if exact is not None and exact not in readings:
        if not usable:
            _refuse_values(_texts(raw, exact, schema.LABEL, what), exact, what)
        unused[printable(exact)] = "its values are no words for real and fake"
    if not usable:
        near = [c for c in raw.columns if c not in found.values() and c not in unused
                and difflib.get_close_matches(normalise(c), [schema.LABEL], 1, 0.75)]  # fmt: skip
        if near and not unused:
            there = ", ".join(map(printable, raw.columns))
            raise InputError(
                f"{what} has no column 'label'; found {there}. Is {near[0]!r} meant? Rename it to 'label'."
            )
        missing = pd.Series(pd.NA, index=raw.index, dtype="Int8")
        return _Labels(missing, pd.Series("", index=raw.index), "none found")
    name, *others = usable
    reading = readings[name]
    label = reading.values
    says = {c: r.values for c, r in readings.items() if c != name}
    generator = found.get(schema.GENERATOR)
    if generator not in (None, name):
        says[generator] = _said_by_generators(_texts(raw, generator, generator, what), label)
    for other, values in says.items():
        wrong = label.notna() & values.notna() & (label != values)
        if wrong.any():
            _contradict(raw, name, other, wrong, label, what)
    by_folder = _said_by_folders(paths, base)
    if by_folder.notna().all() and by_folder.nunique() == 2 and (label != by_folder)[label.notna()].all():
        _contradict(raw, name, None, label.notna(), label, what)
    named = pd.Series("", index=raw.index)
    if reading.how == "names":
        names = {w: "" if read_name(w).label is not None else w for w in reading.text.unique()}
        named = reading.text.map(names)
    where = f"column {printable(name)!r} ({reading.how})"
    where += f", as does {printable(others[0])!r}" if others else ""
    return _Labels(label.astype("Int8"), named, where, tuple(usable))


def _said_by_generators(text: pd.Series, label: pd.Series) -> pd.Series:
    """What the names of generators say: `real` real, a known one fake; all are if only "reals" have one."""
    said = {}
    for word in text.unique():
        name, known = read_name(word), layouts.GENERATOR_NAMES.match(normalise(word))
        said[word] = 0.0 if name.label == schema.REAL and name.sure else 1.0 if known else np.nan
    says = text.map(said)
    if not (text[label == schema.FAKE] != "").any() and text[label == schema.REAL].nunique() > 1:
        return says.mask(text != "", 1.0)
    return says


def _said_by_folders(paths: pd.Series, base: Path) -> pd.Series:
    folders, said = paths.map(os.path.dirname), {}
    for folder in folders.unique():
        names = map(read_name, Path(os.path.relpath(folder, base)).parts)
        labels = {name.label for name in names if name.sure == 2 and name.label is not None}
        said[folder] = float(labels.pop()) if len(labels) == 1 else np.nan
    return folders.map(said)


def _refuse_values(values: pd.Series, name: str, what: str) -> None:
    counts = values[values != ""].value_counts()
    bad = {v: n for v, n in counts.items() if v.casefold() not in _FLAGS and read_name(v).label is None}
    if bad:
        listed = ", ".join(f"{value!r} ({n} rows)" for value, n in list(bad.items())[:8])
        raise InputError(
            f"{what}: {len(bad)} unknown values in column {name!r}: {listed}. "
            "Expected 0 or real or nature, 1 or fake or ai, or empty where unknown"
        )


def _contradict(
    raw: pd.DataFrame, name: str, other: str | None, wrong: pd.Series, label: pd.Series, what: str
) -> None:
    row = int(wrong.to_numpy().argmax())
    read = schema.LABEL_NAMES[int(label.iloc[row])]
    contrary = schema.LABEL_NAMES[1 - int(label.iloc[row])]
    known = "the folders of the images" if other is None else f"column {printable(other)!r}"
    beside = f"{known} say {contrary}" if other is None else f"{known} has {_column(raw, other).iloc[row]!r}"
    raise InputError(
        f"{what}: column {name!r} and {known} contradict each other in {count(int(wrong.sum()), 'row')} of "
        f"{len(raw):,}; first: row {row + 1} has {name} {_column(raw, name).iloc[row]!r}, read as {read}, "
        f"but {beside}. Are the labels the other way round (here 0 is real and 1 is fake)? Rename the column "
        "to 'is_real' if 1 means real; drop the other column if that one is wrong"
    )


def _check_paths(df: pd.DataFrame, what: str, base: Path, notes: list[str]) -> None:
    twice = df[df[schema.PATH].duplicated(keep=False)]
    if len(twice):
        labels = twice.groupby(schema.PATH)[schema.LABEL].nunique(dropna=False)
        clash = labels[labels > 1]
        n, first = (len(clash), clash.index[0]) if len(clash) else (len(labels), twice[schema.PATH].iloc[0])
        rows = ", ".join(str(i + 1) for i in df.index[df[schema.PATH] == first][:5])
        problem = "with labels that contradict each other" if len(clash) else "more than once"
        raise InputError(
            f"{what} lists {n} paths {problem}; first: {printable(first)} (rows {rows}). Keep one row each"
        )
    if not any(os.path.lexists(p) for p in df[schema.PATH]):
        hint = " ".join(f"{note}." for note in notes if "holds no bytes" in note)
        where = f"Relative paths are read against {base.absolute()}: pass root= if they lie elsewhere"
        first = printable(df[schema.PATH].iloc[0])
        hint = f"first looked for: {first}. {hint or where}"
        raise InputError(f"none of the {len(df):,} images of {what} exists; {hint}")


def _texts(raw: pd.DataFrame, name: str, column: str, what: str) -> pd.Series:
    """Values of one column as text, empty where missing; of several captions the first that is not empty."""
    values, several = _column(raw, name), column == schema.CAPTION
    texts = []
    for number, value in enumerate(map(_first, values) if several else values, 1):
        if isinstance(value, str):
            texts.append(value.strip())
            continue
        if pd.api.types.is_list_like(value) or isinstance(value, bytes):
            more = ", or a list of texts" if several else ""
            raise InputError(
                f"{what}: row {number} of column {name!r} holds {type(value).__name__}; expected one "
                f"text for each image{more}. Convert the column first"
            )
        texts.append("" if value is None or pd.isna(value) else str(value).strip())
    return pd.Series(texts, index=raw.index, dtype=object)


def _first(captions: object) -> object:
    """First caption of a list or array that is not empty; anything else as it is."""
    if not isinstance(captions, (list, tuple, np.ndarray)):
        return captions
    for caption in captions:
        if caption is not None and not (isinstance(caption, str) and not caption.strip()):
            return caption
    return None
