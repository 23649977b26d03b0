"""Tables with the images inside: Parquet files, folders and objects of the ``datasets`` library.

The images are written out once as plain files, byte for byte, so that everything later deals with files only.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from itemkit import schema
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
