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
from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
_SEPARATED, _JSON_LINES, _ARROW = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".parquet", ".arrow")
# layout of a table -> endings of its files, by which they are found in a folder
TABLE_LAYOUTS = {
    **dict.fromkeys(("csv", "grip"), (*_SEPARATED, *_JSON_LINES)),
    **dict.fromkeys(("parquet", "openfake", "communityforensics", "datasets"), _ARROW),
}
LAYOUTS = ("auto", *TABLE_LAYOUTS, *layouts.FOLDER_LAYOUTS)
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
        table that lies beside them; more than one other answer is an error that lists them. Any other name
        decides instead.
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
    if isinstance(source, (str, os.PathLike)):
        return _read_path(_absolute(source), layout, root, real_root, images_to)
    base, notes = Path(root or os.curdir), list[str]()
    if isinstance(source, pd.DataFrame):
        return _finish(source, "the table", base, "table", notes)
    raw = _unpack(_dataset_parts(source), "the data set", base, images_to, notes)
    return _finish(raw, "the data set", base, "dataset", notes)


def _absolute(path: Any) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _read_path(path: Path, layout: str, root: Any, real_root: Any, images_to: Any) -> pd.DataFrame:
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; give a CSV, TSV or Parquet table, or a folder of images"
        )
    folder = path.is_dir()
    if (not folder or layout in TABLE_LAYOUTS) and (
        layout in layouts.FOLDER_LAYOUTS or real_root is not None
    ):
        raise InputError(f"{path} is a table; layout={layout!r} and real_root= are for folders of images")
    base = Path(root).absolute() if root is not None else path if folder else path.parent
    read = partial(
        _read_table, top=path, base=base, source=path.name if folder else path.stem, images_to=images_to
    )
    if not folder:
        return read([path])
    stored = _arrow_files(path)
    if layout in TABLE_LAYOUTS:
        endings = TABLE_LAYOUTS[layout]
        files = stored if endings is _ARROW else [p for p in path.iterdir() if p.suffix.lower() in endings]
        if not files or (len(files) > 1 and files is not stored):
            there = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix.lower() in layouts.TABLES))
            raise InputError(
                f"layout {layout!r} reads a table ({', '.join(endings)}); {path} holds {there or 'none'}: "
                "name the table itself"
            )
        return read(files)
    reals = None if real_root is None else _absolute(real_root)
    if reals is not None and not reals.is_dir():
        raise InputError(f"real_root {reals} is not a folder")
    return _read_folder(path, layout, reals, stored, read)


def _read_folder(
    path: Path, layout: str, real_root: Path | None, stored: list[Path], read: Callable[..., pd.DataFrame]
) -> pd.DataFrame:
    """Folder tree, or the table in it where no folder names a label."""
    tree = layouts.Tree(path)
    listing = [] if stored else tree.metadata
    tables = list(dict.fromkeys([*stored, *tree.tables]))
    notes: list[str] = []
    use_labels = layout != "unlabelled"
    if layout == "auto" and real_root is None and not tree.labels:
        if stored and (not tree.folders or _image_column(_open_arrow(stored[0])[0]) is not None):
            n = sum(map(len, tree.folders.values()))
            return read(
                stored,
                notes=[f"{count(n, 'image file')} beside the table {stored[0].name}: not read"] * (n > 0),
            )
        if not tree.folders and len(tables) == 1:
            return read(tables)
        if listing:
            layout = "unlabelled"
    raw, about = layouts.read_folder(tree, layout, real_root)
    notes += about["notes"]
    if tables:
        names = ", ".join(t.name for t in tables[:3]) + (" ..." if len(tables) > 3 else "")
        notes.append(f"tables beside the images are not read: {names} (give the table itself to use it)")
    labels = (_add_metadata(raw, listing, path, use_labels, notes) if listing else None) or about["labels"]
    if closed := sum(not reads(path) for path in raw[schema.PATH]):
        notes.append(
            f"{count(closed, 'image')} in HEIC, HEIF or AVIF cannot be read here and will be error rows: "
            'pip install "itemkit[heic]"'
        )
    df = _finish(raw, str(path), path, path.name, notes, labels)
    df.attrs["report"] |= {"left_out": tree.skipped, "layout": about["layout"]}
    return df


def _add_metadata(
    raw: pd.DataFrame, files: list[Path], top: Path, use_labels: bool, notes: list[str]
) -> str | None:
    """Fill in captions, and labels where the folders have none, from ``metadata`` files; say which labels."""
    parts = [_read_table([file], file, file.parent, top.name) for file in files]
    for file, part in zip(files, parts, strict=True):
        notes += [f"{file.name}: {line}" for line in part.attrs["report"]["notes"]]
    rows = pd.concat(parts).drop_duplicates(schema.PATH).set_index(schema.PATH)
    rows = rows.reindex(raw[schema.PATH]).reset_index(drop=True)
    n = int(rows.notna().any(axis=1).sum())
    notes.append(f"{count(len(files), 'metadata file')} read, which list {n:,} of the images")
    for column in (schema.CAPTION, schema.SPLIT):
        raw[column] = raw[column].where(raw[column].notna(), rows[column])
    if not rows[schema.LABEL].notna().any():
        return None
    if not use_labels:
        notes.append(f"labels of {files[0].name} are not used, as layout 'unlabelled' was asked for")
        return None
    if raw[schema.LABEL].isna().all():
        raw[schema.LABEL] = rows[schema.LABEL]
        for column in (schema.GENERATOR, schema.SOURCE):
            raw[column] = rows[column].where(rows[column].notna(), raw[column])
        return f"{files[0].name}, {parts[0].attrs['report']['labels']}"
    differ = (raw[schema.LABEL].astype("Int8") != rows[schema.LABEL]).fillna(False)
    if differ.any():
        raise InputError(
            f"{top}: the folders and {files[0].name} give {count(int(differ.sum()), 'image')} different "
            f"labels; first: {raw[schema.PATH][int(differ.to_numpy().argmax())]}. Mend one or remove it"
        )
    return None


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
    if path.suffix.lower() not in (*_SEPARATED, ".parquet"):
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
        data = df.to_csv(index=False, sep="\t" if path.suffix.lower() == ".tsv" else ",").encode(
            "utf-8", "surrogateescape"
        )
        _files.atomic_write(path, data)


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
            listed = ", ".join(f"{n:,} {ending}" for ending, n in Counter(found[key]).most_common())
            lines.append(f"{words}: {listed}")
    if shut := found.get("unreadable"):
        lines.append(f"could not be read: {count(len(shut), 'folder or file')}: {', '.join(shut[:5])}")
    for key, words in (("hidden", "hidden and skipped"), ("links_back", "links that lead back, skipped")):
        if found.get(key):
            lines.append(f"{words}: {found[key]:,}")
    return [printable(line) for line in [*lines, *(f"note: {note}" for note in report.get("notes", []))]]


# ---- tables: whatever they are stored as, a data frame


class _Part(NamedTuple):
    """Some rows of a table, the column that holds images if one does, the split that its file's name says."""

    table: pd.DataFrame
    images: str | None = None
    split: str | None = None


def _read_table(
    files: list[Path], top: Path, base: Path, source: str, images_to: Any = None, notes: Iterable[str] = ()
) -> pd.DataFrame:
    """One table in one or several files; `top` is the file or the folder of them."""
    notes = list(notes)

    def parts() -> Iterator[_Part]:
        for file in files:
            if file.suffix.lower() in _ARROW:
                yield from _arrow_parts(file, top)
            else:
                yield _Part(_read_text(file, base, notes))

    return _finish(_unpack(parts(), top.name, base, images_to, notes), top.name, base, source, notes)


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


def _open_arrow(path: Path) -> tuple[Any, Iterable[Any]]:
    """Schema and record batches of a Parquet file, or of an Arrow file (stream as ``datasets``, or file)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            file = pq.ParquetFile(path)
            return file.schema_arrow, file.iter_batches(batch_size=256)
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return table.schema, table.to_batches(max_chunksize=256)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from None


def _image_column(columns: Any) -> str | None:
    """Column of an Arrow schema that holds images as bytes, alone or with their path."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    inside = (c.name for c in columns if normalise(c.name) in _IMAGE_COLUMNS and holds_bytes(c.type))
    return next(inside, None)


def _arrow_parts(path: Path, top: Path) -> Iterator[_Part]:
    columns, batches = _open_arrow(path)
    stored = json.loads((columns.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    names = {c: f["names"] for c, f in features.items() if isinstance(f, dict) and "names" in f}
    shard = _SHARD.match(path.stem)
    places = [shard[1] if shard else path.stem, *path.relative_to(top).parts[:-1]]
    split = next((split for name in places if (split := read_name(name).split)), None)
    try:
        for batch in batches:
            yield _Part(_name_classes(batch.to_pandas(), names), _image_column(columns), split)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from None


def _dataset_parts(dataset: Any) -> Iterator[_Part]:
    """Read a ``Dataset`` or ``DatasetDict`` object without needing the library, each part with its split."""
    if not hasattr(dataset, "__iter__"):
        raise InputError(
            f"cannot read a {type(dataset).__name__}; give a path, a DataFrame or a datasets object"
        )
    single = [(getattr(dataset, "split", None), dataset)]
    for split, part in dataset.items() if hasattr(dataset, "items") else single:
        features = getattr(part, "features", None) or {}
        first: dict[str, Any] = next(iter(part), {})
        inside = (c for c in first if normalise(c) in _IMAGE_COLUMNS and not isinstance(first[c], str))
        column = next(inside, None)
        if hasattr(features.get(column), "decode") and hasattr(part, "cast_column"):
            # the file's own bytes, not decoded pixels
            part = part.cast_column(column, type(features[column])(decode=False))
        names = {c: f.names for c, f in features.items() if getattr(f, "names", None)}
        rows = pd.DataFrame([dict(row) for row in part])
        yield _Part(_name_classes(rows, names), column, None if split is None else str(split))


def _name_classes(table: pd.DataFrame, names: dict[str, list[str]]) -> pd.DataFrame:
    """Numbers of classes to their names: class 0 may well be called 'fake'."""
    for column in table.columns.intersection(list(names)):
        known = dict(enumerate(names[column]))
        table[column] = [known.get(value, value) for value in table[column]]
    return table


def _unpack(parts: Iterable[_Part], what: str, base: Path, images_to: Any, notes: list[str]) -> pd.DataFrame:
    """Rows of tables that may hold images inside; these are written to `images_to`."""
    tables, seen, without = [], Counter[str](), 0
    for table, column, split in parts:
        if column is not None:
            values = [v if isinstance(v, dict) else {"bytes": v} for v in table[column]]
            rows = [(v.get("bytes"), v.get("path")) for v in values]
            inside = [data for data, _ in rows if data is not None]
            if odd := [type(data).__name__ for data in inside if not isinstance(data, bytes)]:
                raise InputError(
                    f"column {column!r} holds {odd[0]}; expected the bytes of image files. "
                    "Cast the column of a datasets object to Image(decode=False)"
                )
            if inside and images_to is None:
                raise InputError(
                    f"{what} holds the images inside (column {column!r}); name a folder to write them "
                    "to: images_to='images' (each is written once, byte for byte)"
                )
            without += sum(data is None and path is not None for data, path in rows)
            table = table.drop(
                columns=[c for c in table if c == column or normalise(c) in ALIASES[schema.PATH]]
            )
            table[schema.PATH] = [
                str(path) if data is None and path else _write_image(data, images_to or base, seen)
                for data, path in rows
            ]
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
        _files.atomic_write(target, data)
    return str(target)


def _read_text(path: Path, base: Path, notes: list[str]) -> pd.DataFrame:
    """CSV, TSV or JSON lines; values are text as it stands: a caption "None" or "NA" is a caption."""
    suffix = path.suffix.lower()
    if suffix not in (*_SEPARATED, *_JSON_LINES):
        raise InputError(
            f"{path.name} is no table known here: expected .csv, .tsv, .parquet, .jsonl, or a folder"
        )
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        # names of files may be of any encoding; a table whose texts are of another one is a mistake
        text = data.decode("utf-8", "surrogateescape")
        fields = (f.strip('" \r') for f in re.split(r"[,;\t|\n]", text) if re.search("[\udc80-\udcff]", f))
        if suffix in _JSON_LINES or not all(os.path.lexists(os.path.join(base, field)) for field in fields):
            raise InputError(f"{path.name} is not UTF-8 text ({error}); save it as UTF-8") from None
    if suffix in _JSON_LINES:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [dict(json.loads(line))] if line.strip() else []
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{path.name}: line {number} is not JSON ({error}); expected an object per line, mend it"
                ) from None
        return pd.DataFrame(rows)
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
        what = f"its column {files[0] + 1} is read as the path"
        notes.append(f"{path.name} has no header line: {what}; add one (path,label,...)")
        return table
    table = table.iloc[1:].reset_index(drop=True).fillna("")
    table.columns = [name.strip() for name in first]
    return table


# ---- raw columns of any name to the manifest's columns


def _finish(
    raw: pd.DataFrame, what: str, base: Path, source: str, notes: list[str], labels: str | None = None
) -> pd.DataFrame:
    """Columns of any name to the manifest's, checked; `labels` says where those of a folder come from."""
    if not len(raw):
        raise InputError(f"{what} has no rows; expected one per image")
    raw = _drop_copies(raw.reset_index(drop=True).rename(columns=str), what)
    found = _match_columns(raw, what, base, notes)
    empty = pd.Series("", index=raw.index, dtype=object)
    text = {c: _texts(raw, found[c], what, c == schema.CAPTION) if c in found else empty for c in ALIASES}
    if (text[schema.PATH] == "").any():
        row = int((text[schema.PATH] == "").argmax()) + 1
        raise InputError(f"{what}: row {row} has no {found[schema.PATH]!r}; fill or drop it")
    paths = _resolve(text[schema.PATH], base, notes)
    if labels is None:
        read = _find_labels(raw, found, text[schema.GENERATOR], paths, base, what)
    else:
        read = _Labels(raw[schema.LABEL].astype("Int8"), labels, (schema.LABEL,), {})
    is_real = (read.values == schema.REAL).fillna(False).astype(bool)
    generator = text[schema.GENERATOR].where(text[schema.GENERATOR] != "", read.generator)
    # "camera" or "LAION" in the generator column of a photograph is where it comes from, not what made it
    origin = generator.where(is_real & ~generator.map(_is_real_word).astype(bool), "")
    origin = text[schema.SOURCE].where(text[schema.SOURCE] != "", origin)
    df = pd.DataFrame(
        {
            schema.PATH: paths,
            schema.LABEL: read.values,
            schema.GENERATOR: generator.mask(generator == "", "unknown").mask(is_real, schema.REAL_GENERATOR),
            schema.SOURCE: origin.mask(origin == "", source),
            schema.SPLIT: text[schema.SPLIT].map(lambda s: read_name(s).split or s.casefold() or None),
            schema.CAPTION: text[schema.CAPTION].where(text[schema.CAPTION] != "", None),
        }
    ).astype({schema.SPLIT: object, schema.CAPTION: object})
    if schema.IMAGE_ID in found:
        df[schema.IMAGE_ID] = text[schema.IMAGE_ID].where(text[schema.IMAGE_ID] != "", None)
    _check_paths(df, what, base, notes)
    df.attrs["report"] = {
        "source": printable(what),
        "images": len(df),
        "real": int((df[schema.LABEL] == schema.REAL).sum()),
        "fake": int((df[schema.LABEL] == schema.FAKE).sum()),
        "labels": read.where,
        "not_used_as_labels": {printable(name): why for name, why in read.unused.items()},
        "splits": {str(name): int(n) for name, n in df[schema.SPLIT].value_counts().items()},
        "splits_then": plan_splits(df[schema.LABEL], df[schema.SPLIT]).notes,
        "captions": int(df[schema.CAPTION].notna().sum()),
        "unused_columns": [printable(c) for c in raw if c not in {*found.values(), *read.used, *read.unused}],
        "notes": [printable(note) for note in notes],
    }
    return df


def _is_real_word(value: str) -> bool:
    name = read_name(value)
    return name.label == schema.REAL and name.sure == 2


def _drop_copies(raw: pd.DataFrame, what: str) -> pd.DataFrame:
    """Of columns with one name, the first; it is an error if they differ and this table might read them."""
    names = np.array([normalise(c) for c in raw.columns])
    for name in {*(a for aliases in ALIASES.values() for a in aliases), schema.LABEL}:
        alike = raw.loc[:, names == name].astype(str)
        if alike.shape[1] > 1 and alike.ne(alike.iloc[:, 0], axis=0).any(axis=None):
            twice = " and ".join(map(repr, alike.columns))
            raise InputError(f"{what} has the columns {twice} with different values; rename or drop one")
    return raw.loc[:, ~raw.columns.duplicated()]


def _match_columns(raw: pd.DataFrame, what: str, base: Path, notes: list[str]) -> dict[str, str]:
    """Manifest column -> the raw column that holds it."""
    original = {normalise(name): name for name in reversed(raw.columns)}

    def holds_files(name: str) -> tuple[bool, bool]:
        some = raw[name].head(20).astype(str)
        exist = (v and os.path.isfile(os.path.join(base, v.replace("\\", "/"))) for v in some)
        return any(exist), any(v.lower().endswith(EXTENSIONS) for v in some)

    def holds_splits(name: str) -> bool:  # "set" or "fold" may hold anything
        words = set(raw[name].dropna().astype(str)) - {""}
        sure = normalise(name) in ALIASES[schema.SPLIT][:3]
        return sure or (bool(words) and all(read_name(word).split for word in words))

    found = {}
    for column, aliases in ALIASES.items():
        there = [original[a] for a in aliases if a in original]
        if column == schema.PATH and len(there) > 1:
            best = max(there, key=holds_files)  # of equals the first
            notes.append(f"of the columns {', '.join(there)}, {best!r} is read as the path")
            there = [best]
        if column == schema.SPLIT:
            there = list(filter(holds_splits, there))
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


def _texts(raw: pd.DataFrame, name: str, what: str, several: bool = False) -> pd.Series:
    """Values of one column as text, empty where missing; `several`: of a list the first that is not empty."""
    values = raw[name].astype(object)
    if several:
        values = values.map(_first)
    odd = values.map(lambda v: isinstance(v, bytes) or pd.api.types.is_list_like(v)).astype(bool)
    if odd.any():
        row = int(odd.to_numpy().argmax())
        more = ", or a list of texts" if several else ""
        raise InputError(
            f"{what}: row {row + 1} of column {name!r} holds {type(values[row]).__name__}; expected one "
            f"text for each image{more}. Convert the column first"
        )
    return values.where(values.notna(), "").map(str).str.strip().astype(object)


def _first(captions: object) -> object:
    """First caption of a list or array that is not empty; anything else as it is."""
    if not isinstance(captions, (list, tuple, np.ndarray)):
        return captions
    return next((c for c in captions if c is not None and not (isinstance(c, str) and not c.strip())), None)


# ---- labels of a table


class _Labels(NamedTuple):
    """Labels of a table, where they come from, columns read for them, columns that are not and why."""

    values: pd.Series
    where: str
    used: tuple[str, ...]
    unused: dict[str, str]
    generator: Any = ""  # names of generators that stand among the labels


# How a column may say labels, the surest first.
_HOW = ("flags", "words", "names", "unclear flags", "unnamed words")
_UNUSED = {
    "unclear flags": "it holds 0 and 1 without saying which is fake; rename it to 'is_fake' or 'is_real'",
    "unnamed words": "its values look like labels; rename it to 'label' to use them",
}


def _read_label_column(name: str, text: pd.Series) -> tuple[str, pd.Series] | None:
    """How a column says labels (one of `_HOW`), and which (0, 1, nan); None if it says none without doubt."""
    words = [w for w in text.unique() if w]
    if not words or len(words) > 2000:
        return None
    plain = normalise(name)
    exact = plain in ("label", "labels")
    like = exact or _LABEL_NAMES.fullmatch(plain) is not None
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
    return None


def _find_labels(
    raw: pd.DataFrame, found: dict[str, str], generators: pd.Series, paths: pd.Series, base: Path, what: str
) -> _Labels:
    """Labels from the column that says them without doubt.

    Raises an `InputError` where another column, or the folders of the images, say the contrary.
    """
    taken = {found.get(c) for c in (schema.PATH, schema.SPLIT, schema.CAPTION, schema.IMAGE_ID)}
    readings = {}
    for name in raw.columns:
        with contextlib.suppress(InputError):  # lists, bytes
            if name not in taken and (reading := _read_label_column(name, _texts(raw, name, what))):
                readings[name] = reading
    exact = next((c for c in raw.columns if normalise(c) in ("label", "labels")), None)
    order = sorted(readings, key=lambda c: (c != exact, _HOW.index(readings[c][0])))
    usable = [c for c in order if readings[c][0] not in _UNUSED]
    unused = {c: _UNUSED[readings[c][0]] for c in order if c not in (*usable, found.get(schema.SOURCE))}
    if exact is not None and exact not in readings:
        values = pd.Series("") if usable else _texts(raw, exact, what)
        counts = values[values != ""].value_counts()
        bad = [v for v in counts.index if v.casefold() not in _FLAGS and read_name(v).label is None]
        if bad:
            listed = ", ".join(f"{value!r} ({counts[value]} rows)" for value in bad[:8])
            raise InputError(
                f"{what}: {len(bad)} unknown values in column {exact!r}: {listed}. "
                "Expected 0 or real or nature, 1 or fake or ai, or empty where unknown"
            )
        unused[exact] = "its values are no words for real and fake"
    if not usable:
        near = [c for c in raw.columns if c not in found.values()
                and difflib.get_close_matches(normalise(c), [schema.LABEL], 1, 0.75)]  # fmt: skip
        if near and not unused:
            there = ", ".join(map(printable, raw.columns))
            raise InputError(
                f"{what} has no column 'label'; found {there}. Is {near[0]!r} meant? Rename it to 'label'."
            )
        return _Labels(pd.Series(pd.NA, index=raw.index, dtype="Int8"), "none found", (), unused)
    name, *others = usable
    how, label = readings[name]
    # what says labels too -> which, and the words by which it does
    says = {f"column {c!r}": (values, raw[c]) for c, (_, values) in readings.items() if c != name}
    if found.get(schema.GENERATOR) not in (None, name):
        values = _said_by_generators(generators, label)
        says[f"column {found[schema.GENERATOR]!r}"] = (values, generators)
    folders = paths.map(os.path.dirname).map(lambda folder: os.path.relpath(folder, base))
    values = folders.map({folder: _said_by_folder(folder) for folder in folders.unique()})
    if values.notna().all() and values.nunique() == 2 and (label != values)[label.notna()].all():
        says["the folders of the images"] = (values, folders)
    for other, (values, shown) in says.items():
        wrong = np.flatnonzero(label.notna() & values.notna() & (label != values))
        if len(wrong):
            row = wrong[0]
            read, contrary = (schema.LABEL_NAMES[int(v[row])] for v in (label, values))
            raise InputError(
                f"{what}: column {name!r} and {other} contradict each other in {count(len(wrong), 'row')} of "
                f"{len(raw):,}; first: row {row + 1} has {name} {raw[name][row]!r}, read as {read}, but "
                f"{shown[row]!r} of {other} is read as {contrary}. Are the labels the other way round (here "
                "0 is real and 1 is fake)? Rename the column to 'is_real' if 1 means real; drop the other "
                "column if that one is wrong"
            )
    where = f"column {printable(name)!r} ({how})" + (f", as does {printable(others[0])!r}" if others else "")
    named: Any = ""
    if how == "names":
        words = _texts(raw, name, what)
        named = words.mask(words.map(lambda word: read_name(word).label is not None).astype(bool), "")
    return _Labels(label.astype("Int8"), where, tuple(usable), unused, named)


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


def _said_by_folder(folder: str) -> float:
    names = map(read_name, Path(folder).parts)
    labels = {name.label for name in names if name.sure == 2 and name.label is not None}
    return float(labels.pop()) if len(labels) == 1 else np.nan
