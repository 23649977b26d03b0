"""The feature store: embeddings on disk as Parquet shards, one row per image content.

In the folder lie ``run.json`` (configuration, fingerprint of every model, versions, counts, checksums),
``manifest.parquet`` (one row per image file: label, generator, ... and the feature row it belongs to),
``errors.parquet`` (those without features: stage and reason) and ``shards/part-*.parquet``.

Features are keyed by content (``feature_id``: hash of the file, joined by the user's caption where one is
used), labels by path. So a label can be corrected, and a copy of a file added, without computing anything.

The shard is the unit of everything: a worker makes whole shards, a run that goes on lists them, stores are
merged by putting their shards into one folder. It is never changed: its name ends in the SHA-256 of its
bytes, its schema names the models. ``run.json`` holds the checksums of the two tables, and its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from itemkit import schema, splits
from itemkit._files import atomic_write, write_json
from itemkit.errors import InputError, StoreError
from itemkit.features import ARRAYS, BOX_COLUMNS, FOUND, OBJECT_ARRAYS, Features, unit_rows
from itemkit.text import count, one_line, printable

SCHEMA_VERSION = 3
RUN_FILE, SHARD_FOLDER = "run.json", "shards"
MANIFEST_FILE, ERRORS_FILE = "manifest.parquet", "errors.parquet"
KIND = "itemkit feature store"

FEATURE_ID = "feature_id"
FILE_SIZE, MTIME_NS = "file_size", "mtime_ns"
STAGE, REASON = "stage", "reason"
FILE_KEY = [schema.PATH, FILE_SIZE, MTIME_NS]  # a file is known again by its path, size and time

# the scalar columns of a shard that describe its images
FEATURE_COLUMNS = {
    FEATURE_ID: pa.string(),
    schema.IMAGE_ID: pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    schema.CAPTION: pa.string(),
    "caption_source": pa.string(),
    schema.CAPTION_LOGPROB: pa.float32(),
    schema.CAPTION_TOKENS: pa.int32(),
    schema.N_OBJECTS: pa.int32(),
}
# ... and where each was found, by which a run that was killed knows it again
SHARD_COLUMNS = FEATURE_COLUMNS | dict(zip(FILE_KEY, (pa.string(), pa.int64(), pa.int64()), strict=True))
EMBEDDINGS = (schema.IMAGE_EMB, schema.CAPTION_EMB, schema.OBJECTS)
_FINGERPRINT = b"itemkit_fingerprint"
_UNFINISHED = "the extraction into {} is not finished. Run the same `itemkit extract` again: it goes on"
_SURROGATE = re.compile("[\ud800-\udfff]")


class DamagedError(StoreError):
    """A file of a store is not as it was written; ``path`` is which."""

    def __init__(self, path: Path, problem: str) -> None:
        again = "Run the same extraction again: only what was lost with it is computed"
        super().__init__(f"{path} is damaged ({problem}). {again}")
        self.path = path


# ---------------------------------------------------------------------------------------------- files


def read_run(folder: str | Path) -> dict:
    """Read ``run.json`` of a feature store and check that this version of itemkit can read the store."""
    path = Path(folder) / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        made = "make one with `itemkit extract`, or give the folder that was passed to it"
        raise StoreError(f"{folder} is no feature store: it has no {RUN_FILE}; {made}") from None
    except (OSError, ValueError) as error:
        raise DamagedError(path, one_line(error)) from error
    found = run.get("schema_version") if isinstance(run, dict) and run.get("kind") == KIND else None
    if found != SCHEMA_VERSION:
        raise StoreError(
            f"{folder} was written with store schema {found}, this itemkit reads schema {SCHEMA_VERSION}: "
            "extract again into another folder, or delete this one; or update itemkit if that is older"
        )
    if run.pop("checksum", None) != _checksum(run):
        raise DamagedError(path, "its checksum does not fit")
    return run


def write_run(folder: Path, run: dict) -> None:
    """Write ``run.json``, sealed by a checksum of its own."""
    write_json(folder / RUN_FILE, {**run, "checksum": _checksum(run)})


def _checksum(run: dict) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def fingerprint_hash(fingerprint: dict) -> str:
    """A fingerprint in 16 hex digits."""
    return _checksum(fingerprint)[:16]


def shard_files(folder: str | Path) -> list[Path]:
    """All shards of a store, in the order in which they were written."""
    return sorted((Path(folder) / SHARD_FOLDER).glob("part-*.parquet"))


def _read(path: Path, checksums: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table whose bytes must have one of these SHA-256 (or the beginning of one)."""
    try:
        data = path.read_bytes()
        if not hashlib.sha256(data).hexdigest().startswith(tuple(checksums)):
            raise DamagedError(path, "its checksum does not fit")
        return pq.read_table(pa.BufferReader(data), columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(path, one_line(error)) from error


def read_shard(path: Path, columns: Sequence[str], fingerprint: str) -> pa.Table:
    """Read some columns of a shard, after a look at all of its bytes and at what models made it."""
    table = _read(path, [path.stem.rpartition("-")[2]], list(columns))
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
        raise StoreError(f"{path} was made with other models or options than the store it lies in; remove it")
    return table.replace_schema_metadata()


def write_shard(folder: Path, features: Features, fingerprint: str) -> None:
    """Write features, in whose table are all scalar columns, as the next shard; embeddings become float16."""
    columns = {name: as_column(features.table[name], kind) for name, kind in SHARD_COLUMNS.items()}
    counts = np.bincount(features.owner, minlength=len(features))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    kinds = {"phrase": pa.string(), **dict.fromkeys(BOX_COLUMNS, pa.float32()), FOUND: pa.bool_()}
    fields = [as_column(features.objects[name], kind) for name, kind in kinds.items()]
    columns[schema.OBJECTS] = pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays(fields, list(kinds))
    )
    for name in ARRAYS:
        x = getattr(features, name)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float16).ravel()), x.shape[1])
        columns[name] = pa.ListArray.from_arrays(offsets, rows) if name in OBJECT_ARRAYS else rows
    data = _parquet(pa.table(columns).replace_schema_metadata({_FINGERPRINT: fingerprint}))
    # two workers may take the same number: the names differ all the same
    number = 1 + max((int(path.stem.split("-")[1]) for path in shard_files(folder)), default=-1)
    digest = hashlib.sha256(data).hexdigest()[:16]
    atomic_write(folder / SHARD_FOLDER / f"part-{number:06d}-{digest}.parquet", data)


def as_column(values: pd.Series, kind: pa.DataType | None = None) -> pa.Array:
    """A column as it is stored: of one kind, or else as texts; always UTF-8."""
    # pandas keeps texts in more than one way, some of which pyarrow answers with a chunked array
    plain = values.to_numpy(dtype=None if pd.api.types.is_numeric_dtype(values) else object)
    # NaN is a value of floats of a known kind; elsewhere it is how pandas writes that there is none
    missing = kind is None or not pa.types.is_floating(kind)
    try:
        return pa.array(plain, kind, from_pandas=missing)
    except (pa.ArrowException, TypeError, ValueError):
        texts = values.astype(object).map(lambda value: utf8(str(value)), na_action="ignore")
        return pa.array(texts.to_numpy(dtype=object), pa.string(), from_pandas=True)


def _parquet(table: pa.Table) -> pa.Buffer:
    texts = [f.name for f in table.schema if pa.types.is_string(f.type)]
    out = pa.BufferOutputStream()
    pq.write_table(table, out, compression="zstd", use_dictionary=texts)
    return out.getvalue()


def read_state(folder: Path, name: str, run: dict) -> pa.Table:
    """Read manifest.parquet or errors.parquet, to the bit as it was written."""
    return _read(folder / name, run["checksums"].get(name, ()))


def write_state(folder: Path, run: dict, manifest: pa.Table) -> None:
    """Replace both tables and ``run.json``: cut short anywhere, the store is as before or unfinished.

    The errors are the rows of the manifest with a reason. The ``checksums`` of ``run`` are updated.
    """
    errors = manifest.filter(manifest[REASON].is_valid()).drop_columns([FEATURE_ID])
    run["counts"] = {"images": len(manifest), "errors": len(errors)}
    data = {MANIFEST_FILE: _parquet(manifest), ERRORS_FILE: _parquet(errors)}
    new = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    # meanwhile each table may be the old or the new one
    both = {name: [*run["checksums"].get(name, []), digest] for name, digest in new.items()}
    write_run(folder, {**run, "complete": False, "checksums": both})
    for name, content in data.items():
        atomic_write(folder / name, content)
    run["checksums"] = {name: [digest] for name, digest in new.items()}
    write_run(folder, run)


# ---------------------------------------------------------------------------------------------- reading


def load_features(
    folder: str | Path,
    columns: Sequence[str] = EMBEDDINGS,
    *,
    rows: pd.DataFrame | Sequence[str] | None = None,
) -> Features:
    """Read a feature store into memory.

    Parameters
    ----------
    folder : path
        A folder written by :func:`itemkit.extraction.extract`.
    columns : sequence of {"image_emb", "caption_emb", "objects"}
        The embeddings to read; the others get width 0 (and no objects), and cost no memory.
    rows : DataFrame or sequence of paths, optional
        A manifest, or the paths of images: those only, in that order. Default: all that the store knows.

    Returns
    -------
    Features
        One row per image file, without those of ``errors.parquet``. Embeddings are float32, L2-normalised
        anew after their float16 storage. Every labelled image has a split (see `itemkit.splits.fill_splits`;
        ``run["splits"]`` says where those came from).
    """
    folder = Path(folder)
    if unknown := sorted(set(columns) - set(EMBEDDINGS)):
        raise InputError(f"unknown columns {unknown}; choose among {list(EMBEDDINGS)}")
    run, manifest = _read_tables(folder)
    base, unknown = store_root(folder, run), manifest[FEATURE_ID].isna()
    names = manifest[schema.PATH]
    if rows is not None:
        paths = rows[schema.PATH] if isinstance(rows, pd.DataFrame) else rows
        names = [stored_name(os.path.abspath(path), base) for path in paths]
    wanted = {name: i for i, name in enumerate(names)}
    if missing := wanted.keys() - set(manifest[schema.PATH]):
        some = f"{count(len(missing), 'image')} of {len(wanted):,} not in {folder}, first: "
        raise StoreError(
            f"{some}{printable(min(missing))}; run the extraction with all: it computes those only"
        )
    pending = manifest[schema.PATH][unknown & manifest[REASON].isna()]
    if pending.isin(wanted).any() if rows is not None else not run["complete"]:
        raise StoreError(_UNFINISHED.format(folder))
    # whose split is what does not depend on which rows are asked for
    table, run["splits"] = splits.fill_splits(manifest[~unknown].reset_index(drop=True))
    if rows is not None:
        place = table[schema.PATH].map(wanted).dropna().sort_values(kind="stable")
        table = table.loc[place.index].reset_index(drop=True)
    shards = shard_files(folder)
    tables = [read_shard(path, list(FEATURE_COLUMNS), run["fingerprint_hash"]) for path in shards]
    found = pa.concat_tables([pa.schema(list(FEATURE_COLUMNS.items())).empty_table(), *tables]).to_pandas()
    found["shard"] = np.repeat(np.arange(len(shards)), [len(part) for part in tables])
    found["row"] = found.groupby("shard").cumcount()
    # two workers may have met copies of one image, and a merged store may hold a row twice: the first counts
    found = found.drop_duplicates(FEATURE_ID)
    at = pd.Index(found[FEATURE_ID]).get_indexer(table[FEATURE_ID])
    if (at < 0).any():
        lost = f"{int((at < 0).sum())} of {len(at)} images of {folder} have lost their features"
        raise StoreError(f"{lost} (was a shard deleted?); run the extraction again: only those are computed")
    found = found.iloc[at].reset_index(drop=True)
    own = table.columns.difference([*FEATURE_COLUMNS, FILE_SIZE, MTIME_NS, STAGE, REASON], sort=False)
    table = pd.concat([table[own], found[list(FEATURE_COLUMNS)]], axis=1)
    table[schema.PATH] = [os.path.join(base, x) for x in table[schema.PATH]]
    table[schema.LABEL] = table[schema.LABEL].astype("Int8")  # also where no label is missing
    leading = [schema.IMAGE_ID, *schema.MANIFEST_COLUMNS, schema.N_OBJECTS]
    table = table[[*leading, *table.columns.difference(leading, sort=False)]]
    return _read_embeddings(table, found, shards, columns, run)


def _read_tables(folder: Path) -> tuple[dict, pd.DataFrame]:
    run = read_run(folder)
    if not run["checksums"]:
        raise StoreError(_UNFINISHED.format(folder))
    try:
        manifest, _ = (read_state(folder, name, run) for name in (MANIFEST_FILE, ERRORS_FILE))
    except DamagedError:
        if read_run(folder)["checksums"] == run["checksums"]:
            raise
        return _read_tables(folder)  # another run has just replaced them
    if REASON not in manifest.column_names:
        raise StoreError(f"{folder} has tables of an older form; extract again: no model has to run for it")
    return run, manifest.to_pandas()


def _read_embeddings(
    table: pd.DataFrame, found: pd.DataFrame, shards: list[Path], columns: Sequence[str], run: dict
) -> Features:
    """Embeddings of the images of a table, one shard in memory at a time."""
    dim, with_objects, place = int(run["dim"]), schema.OBJECTS in columns, found["row"].to_numpy()
    owner = np.repeat(np.arange(len(table)), table[schema.N_OBJECTS] * with_objects)
    wanted = [*columns, *(OBJECT_ARRAYS if with_objects else ())]
    arrays = {
        name: np.zeros((len(owner if name in OBJECT_ARRAYS else table), dim * (name in wanted)), np.float32)
        for name in ARRAYS
    }
    objects = {"phrase": np.empty(len(owner), dtype=object)}
    objects |= {name: np.zeros(len(owner), np.float32) for name in BOX_COLUMNS}
    objects[FOUND] = np.ones(len(owner), dtype=bool)
    for number, rows in found.groupby("shard").indices.items() if wanted else ():
        shard = read_shard(shards[number], wanted, run["fingerprint_hash"]).take(place[rows])
        those = np.isin(owner, rows)
        for name in set(ARRAYS) & set(wanted):
            values = shard[name].combine_chunks()
            while not pa.types.is_floating(values.type):
                values = values.flatten()
            arrays[name][those if name in OBJECT_ARRAYS else rows] = values.to_numpy().reshape(-1, dim)
        if with_objects:
            values = shard[schema.OBJECTS].combine_chunks().flatten()
            for name in objects:
                objects[name][those] = values.field(name).to_numpy(zero_copy_only=False)
    for x in arrays.values():
        if not np.isfinite(x).all():
            raise StoreError(f"{shards[0].parent} holds embeddings that are not finite; extract again")
        unit_rows(x)
    return Features(table, **arrays, owner=owner, objects=pd.DataFrame(objects), run=run)


# ---------------------------------------------------------------------------------------------- places


def portable_root(paths: Iterable[str], folder: Path) -> str:
    """Folder of all these images as a store notes it: relative to itself if both can be moved together."""
    with contextlib.suppress(ValueError):  # no images, or on different drives
        root = os.path.commonpath({os.path.dirname(path) for path in paths})
        store = os.path.abspath(folder)
        together = len(Path(os.path.commonpath([root, store])).parts) > 1
        return Path(os.path.relpath(root, store) if together else root).as_posix()
    return "."


def store_root(folder: Path, run: dict) -> str:
    """Absolute folder to which the paths of a store are relative."""
    return os.path.abspath(folder / run["root"])


def stored_name(path: str, root: str) -> str:
    """Absolute path as noted in a store: relative where below the root, with forward slashes; UTF-8."""
    return utf8(path.removeprefix(os.path.join(root, "")).replace(os.sep, "/"))


def utf8(text: str) -> str:
    r"""Text that can be stored: what is not UTF-8, as in a Latin-1 file name, is escaped: ``caf\xe9.jpg``."""
    return _SURROGATE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)
