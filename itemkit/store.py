"""The feature store: embeddings on disk as Parquet shards, one row per image content.

Layout of the folder::

    run.json            configuration, fingerprint of every model, versions, counts, schema version, checksums
    manifest.parquet    one row per image file: label, generator, ... and the feature row it belongs to
    errors.parquet      one row per image file without features: stage and reason
    shards/part-*.parquet

Features are keyed by content (``feature_id``: hash of the file, joined by the user's caption where one is
used), labels by path. So a label can be corrected, and a copy of a file added, without computing anything.

The shard is the unit of everything: a worker makes whole shards, a run that goes on lists them, stores are
merged by putting their shards together. A shard is never changed. Its name ends in the SHA-256 of its bytes
and its schema names the models, so whatever happens to it is found out. ``run.json`` holds the checksums of
the two tables, and its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from itemkit import schema, splits
from itemkit._files import atomic_write, write_json
from itemkit.errors import InputError, StoreError
from itemkit.features import ARRAYS, BOX_COLUMNS, OBJECT_ARRAYS, Features, unit_rows
from itemkit.models import differences
from itemkit.text import count, one_line, printable

SCHEMA_VERSION = 2
RUN_FILE, SHARD_FOLDER = "run.json", "shards"
MANIFEST_FILE, ERRORS_FILE = "manifest.parquet", "errors.parquet"
KIND = "itemkit feature store"

FEATURE_ID = "feature_id"
FILE_SIZE, MTIME_NS = "file_size", "mtime_ns"
STAGE, REASON = "stage", "reason"

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
FILE_COLUMNS = {schema.PATH: pa.string(), FILE_SIZE: pa.int64(), MTIME_NS: pa.int64()}
SHARD_COLUMNS = FEATURE_COLUMNS | FILE_COLUMNS
EMBEDDINGS = (schema.IMAGE_EMB, schema.CAPTION_EMB, schema.OBJECTS)
_FINGERPRINT = b"itemkit_fingerprint"
_SURROGATE = re.compile("[\ud800-\udfff]")


class DamagedError(StoreError):
    """A file of a store is not as it was written; ``path`` is which."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path} is damaged ({problem}). Run the same extraction again: it sets the file aside, and only "
            "what was lost with it is computed anew"
        )
        self.path = path


# ---------------------------------------------------------------------------------------------- files


def read_run(folder: str | Path) -> dict:
    """Read ``run.json`` of a feature store and check that this version of itemkit can read the store.

    Raises
    ------
    StoreError
        The folder is no feature store, one of another schema version, or the file is damaged.
    """
    path = Path(folder) / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            f"{folder} is no feature store: it has no {RUN_FILE}. Make one with `itemkit extract`, "
            "or give the folder that was passed to it as output"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedError(path, one_line(error)) from error
    found = run.get("schema_version") if isinstance(run, dict) and run.get("kind") == KIND else None
    if found == SCHEMA_VERSION and run.pop("checksum", None) != _checksum(run):
        raise DamagedError(path, "its checksum does not fit")
    if found != SCHEMA_VERSION:
        newer = isinstance(found, int) and found > SCHEMA_VERSION
        again = "extract again into another folder (the old one is left as it is)"
        raise StoreError(
            f"{folder} was written with store schema {found}, this itemkit reads schema {SCHEMA_VERSION}: "
            f"{'update itemkit' if newer else again}"
        )
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


def read_shard(path: Path, columns: Sequence[str], run: dict) -> pa.Table:
    """Read some columns of a shard, after a look at all of its bytes.

    Raises
    ------
    DamagedError
        Any bit of it changed since it was written.
    StoreError
        It was made by other models than those of ``run``.
    """
    table = _read(path, [path.stem.rpartition("-")[2]], list(columns))
    if (table.schema.metadata or {}).get(_FINGERPRINT) != run["fingerprint_hash"].encode():
        raise StoreError(f"{path} was made with other models or options than the store it lies in; remove it")
    return table.replace_schema_metadata()


def write_shard(folder: Path, number: int, features: Features, models: str) -> Path:
    """Write features as one shard; embeddings become float16.

    Parameters
    ----------
    folder : Path
        The store.
    number : int
        Says where the shard stands in the order; two of one number do not collide.
    features : Features
        The table has all scalar columns of a shard.
    models : str
        The fingerprint's hash.
    """
    columns = {
        # NaN is a value of floats; in a column of texts it is how pandas writes that there is none
        name: pa.array(_values(features.table[name]), kind, from_pandas=not pa.types.is_floating(kind))
        for name, kind in SHARD_COLUMNS.items()
    }
    counts = np.bincount(features.owner, minlength=len(features))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    fields = [pa.array(_values(features.objects["phrase"]), pa.string())]
    fields += [pa.array(features.objects[name].to_numpy(np.float32)) for name in BOX_COLUMNS]
    struct = pa.StructArray.from_arrays(fields, ["phrase", *BOX_COLUMNS])
    columns[schema.IMAGE_EMB] = _fixed(features.image_emb)
    columns[schema.CAPTION_EMB] = _fixed(features.caption_emb)
    columns[schema.OBJECTS] = pa.ListArray.from_arrays(offsets, struct)
    columns[schema.REGION_EMB] = pa.ListArray.from_arrays(offsets, _fixed(features.region_emb))
    columns[schema.PHRASE_EMB] = pa.ListArray.from_arrays(offsets, _fixed(features.phrase_emb))
    data = _parquet(pa.table(columns).replace_schema_metadata({_FINGERPRINT: models}))
    digest = hashlib.sha256(data).hexdigest()
    path = folder / SHARD_FOLDER / f"part-{number:06d}-{digest[:16]}.parquet"
    atomic_write(path, data)
    return path


def _values(column: pd.Series) -> np.ndarray:
    # pandas keeps texts in more than one way, some of which pyarrow answers with a chunked array
    return column.to_numpy() if pd.api.types.is_numeric_dtype(column) else column.to_numpy(dtype=object)


def _fixed(x: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float16).ravel()), x.shape[1])


def _parquet(table: pa.Table) -> pa.Buffer:
    texts = [f.name for f in table.schema if pa.types.is_string(f.type)]
    out = pa.BufferOutputStream()
    pq.write_table(table, out, compression="zstd", use_dictionary=texts)
    return out.getvalue()


def read_state(folder: Path, name: str, run: dict) -> pa.Table:
    """Read manifest.parquet or errors.parquet.

    Raises
    ------
    DamagedError
        It is missing, or any bit of it changed since it was written.
    """
    return _read(folder / name, run["checksums"].get(name, ()))


def write_state(folder: Path, run: dict, manifest: pa.Table, errors: pa.Table) -> None:
    """Replace both tables and ``run.json``: cut short anywhere, the store is as before or unfinished.

    Parameters
    ----------
    folder : Path
    run : dict
        To be written in the end; its ``checksums`` are updated.
    manifest, errors : Table
    """
    data = {name: _parquet(table) for name, table in ((MANIFEST_FILE, manifest), (ERRORS_FILE, errors))}
    new = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    # meanwhile each table may be the old or the new one
    both = {name: [*run["checksums"].get(name, []), new[name]] for name in data}
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
    root: str | Path | None = None,
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
    root : path, optional
        Where the images lie now, if they were moved; by default the place noted in the store.

    Returns
    -------
    Features
        One row per image file, without those that ended in ``errors.parquet``. Embeddings are float32 and
        L2-normalised anew after their float16 storage. Every labelled image has a split (see
        `itemkit.splits.fill_splits`; ``run["splits"]`` says where those came from).

    Raises
    ------
    StoreError
        No store, another schema, unfinished, or a file is damaged or missing.
    InputError
        Unknown columns.
    """
    folder = Path(folder)
    if unknown := sorted(set(columns) - set(EMBEDDINGS)):
        raise InputError(f"unknown columns {unknown}; choose among {list(EMBEDDINGS)}")
    run, manifest, errors = _read_tables(folder)
    there = manifest[FEATURE_ID].notna()
    pending = set(manifest[schema.PATH][~there]) - set(errors[schema.PATH])
    base, wanted = store_root(folder, run), None
    if rows is not None:
        paths = rows[schema.PATH] if isinstance(rows, pd.DataFrame) else rows
        wanted = {stored_name(os.fspath(path), str(base)): i for i, path in enumerate(paths)}
    if pending & wanted.keys() if wanted is not None else not run["complete"]:
        raise _unfinished(folder)
    for name in schema.MANIFEST_COLUMNS:
        if name not in manifest:
            manifest[name] = pd.Series(pd.NA, manifest.index, dtype="string")
    # whose split is what does not depend on which rows are asked for
    table, run["splits"] = splits.fill_splits(manifest[there].reset_index(drop=True))
    if wanted is not None:
        if missing := wanted.keys() - set(manifest[schema.PATH]):
            raise StoreError(
                f"{count(len(missing), 'image')} of {len(wanted):,} not in {folder}, first: "
                f"{printable(min(missing))}; run the extraction with all of them: it computes those only"
            )
        table = table[table[schema.PATH].isin(wanted)]
        table = table.iloc[np.argsort(table[schema.PATH].map(wanted), kind="stable")].reset_index(drop=True)
    shards = shard_files(folder)
    tables = [read_shard(path, list(FEATURE_COLUMNS), run) for path in shards]
    scalars = pa.concat_tables([pa.schema(list(FEATURE_COLUMNS.items())).empty_table(), *tables]).to_pandas()
    scalars["shard"] = np.repeat(np.arange(len(shards)), [len(found) for found in tables])
    scalars["row"] = scalars.groupby("shard").cumcount()
    # two workers may have met copies of one image, and a merged store may hold a row twice: the first counts
    scalars = scalars.drop_duplicates(FEATURE_ID)
    at = pd.Index(scalars[FEATURE_ID]).get_indexer(table[FEATURE_ID])
    if (at < 0).any():
        raise StoreError(
            f"{int((at < 0).sum())} of {len(at)} images of {folder} have lost their features (was a shard "
            "deleted?); run the extraction again: only those are computed"
        )
    own = [c for c in table.columns if c not in (*FEATURE_COLUMNS, FILE_SIZE, MTIME_NS)]
    scalars = scalars.iloc[at].reset_index(drop=True)
    table = pd.concat([table[own], scalars[list(FEATURE_COLUMNS)]], axis=1)
    base = Path(root) if root is not None else base
    table[schema.PATH] = [str(base / name) for name in table[schema.PATH]]
    table[schema.LABEL] = table[schema.LABEL].astype("Int8")  # also where no label is missing
    leading = [schema.IMAGE_ID, *schema.MANIFEST_COLUMNS, schema.N_OBJECTS]
    table = table[leading + [c for c in table.columns if c not in leading]]
    shard_of, row_of = scalars[["shard", "row"]].to_numpy().T
    return _read_embeddings(table, shards, shard_of, row_of, columns, run)


def _read_tables(folder: Path) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    run = read_run(folder)
    if not run["checksums"]:
        raise _unfinished(folder)
    try:
        manifest, errors = (read_state(folder, name, run) for name in (MANIFEST_FILE, ERRORS_FILE))
    except DamagedError:
        if read_run(folder)["checksums"] == run["checksums"]:
            raise
        return _read_tables(folder)  # another run has just replaced them
    return run, manifest.to_pandas(), errors.to_pandas()


def _unfinished(folder: Path) -> StoreError:
    return StoreError(
        f"the extraction into {folder} is not finished. Run the same `itemkit extract` again: it goes on "
        "where it stopped"
    )


def _read_embeddings(
    table: pd.DataFrame,
    shards: list[Path],
    shard_of: np.ndarray,
    row_of: np.ndarray,
    columns: Sequence[str],
    run: dict,
) -> Features:
    """Embeddings of the images of a table, one shard in memory at a time."""
    n, dim = len(table), int(run["dim"])
    with_objects = schema.OBJECTS in columns
    counts = table[schema.N_OBJECTS].to_numpy(np.int64) * with_objects
    owner = np.repeat(np.arange(n), counts)
    wanted = [*columns, *(OBJECT_ARRAYS if with_objects else ())]
    arrays = {
        name: np.zeros((len(owner if name in OBJECT_ARRAYS else table), dim * (name in wanted)), np.float32)
        for name in ARRAYS
    }
    objects = {"phrase": np.empty(len(owner), dtype=object)}
    objects |= {name: np.zeros(len(owner), np.float32) for name in BOX_COLUMNS}
    for number in np.unique(shard_of) if wanted else ():
        rows, those = shard_of == number, shard_of[owner] == number
        shard = read_shard(shards[number], wanted, run).take(row_of[rows])
        for name in set(ARRAYS) & set(wanted):
            found = shard[name].combine_chunks()
            while not pa.types.is_floating(found.type):
                found = found.flatten()
            arrays[name][those if name in OBJECT_ARRAYS else rows] = found.to_numpy().reshape(-1, dim)
        if with_objects:
            found = shard[schema.OBJECTS].combine_chunks().flatten()
            for i, name in enumerate(objects):
                objects[name][those] = found.field(i).to_numpy(zero_copy_only=False)
    for x in arrays.values():
        if not np.isfinite(x).all():
            raise StoreError(f"{shards[0].parent} holds embeddings that are not finite; extract again")
        unit_rows(x)
    return Features(table, **arrays, owner=owner, objects=pd.DataFrame(objects), run=run)


# ---------------------------------------------------------------------------------------------- places


def common_root(paths: Iterable[str]) -> Path:
    """The deepest folder that holds all the given files."""
    folders = {os.path.dirname(path) for path in paths}
    try:
        return Path(os.path.commonpath(folders)) if folders else Path()
    except ValueError:  # different drives, or relative beside absolute paths
        return Path()


def portable_root(root: Path, folder: Path) -> str:
    """How a store notes where its images lie: relative to itself if both can be moved together."""
    root, folder = Path(os.path.abspath(root)), Path(os.path.abspath(folder))
    shared = os.path.commonpath([root, folder]) if root.drive == folder.drive else ""
    if len(Path(shared).parts) > 1:
        return Path(os.path.relpath(root, folder)).as_posix()
    return root.as_posix()


def store_root(folder: Path, run: dict) -> Path:
    """Absolute folder to which the paths of a store are relative."""
    return Path(os.path.abspath(Path(folder) / run["root"]))


def absolute(path: str) -> str:
    """As ``os.path.abspath``, without its cost where there is nothing to do: a manifest has many paths."""
    done = path.startswith("/") and os.sep == "/" and "//" not in path and "/." not in path
    return path if done else os.path.abspath(path)


def stored_name(path: str, root: str) -> str:
    """Path as noted in a store: with forward slashes below the root, absolute elsewhere, always UTF-8."""
    path, prefix = absolute(path), root.rstrip(os.sep) + os.sep
    name = path[len(prefix) :].replace(os.sep, "/") if path.startswith(prefix) else path
    return utf8(name)


def utf8(text: str) -> str:
    r"""Text that can be stored: what is not UTF-8, such as a byte of a Latin-1 file name, is escaped.

    >>> utf8(b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    'caf\\xe9.jpg'
    """
    return _SURROGATE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)


# -------------------------------------------------------------------------------------- several stores


def stack(tables: Sequence[pa.Table]) -> pa.Table:
    """One table after the other; a column that one lacks is empty there, one of two kinds becomes text."""
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        kinds = {table.schema.field(name).type for table in tables if name in table.column_names}
        try:
            pa.unify_schemas([pa.schema([(name, kind)]) for kind in kinds], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            tables = [
                _replaced(table, name, table[name].cast(pa.string())) if name in table.column_names else table
                for table in tables
            ]
    return pa.concat_tables(tables, promote_options="permissive")


def _replaced(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def contradictions(table: pd.DataFrame) -> pd.Series:
    """Files of one content that are labelled real here and fake there, for none can be used.

    Parameters
    ----------
    table : DataFrame
        With ``path, image_id`` (missing where not known), and ``label`` where any is known.

    Returns
    -------
    Series of str
        A reason for each such row, by its index.
    """
    if schema.LABEL not in table:
        return pd.Series(dtype=object)
    known = table[[schema.PATH, schema.IMAGE_ID, schema.LABEL]].dropna()
    firsts = known.drop_duplicates([schema.IMAGE_ID, schema.LABEL])
    pairs = known.reset_index().merge(firsts, on=schema.IMAGE_ID, suffixes=("", "_other"))
    pairs = pairs[pairs[schema.LABEL] != pairs["label_other"]].set_index("index").sort_index()
    name = schema.LABEL_NAMES
    reasons = [
        f"{row.path}: labelled {name[int(row.label)]}, but {row.path_other} has the same content and is "
        f"labelled {name[int(row.label_other)]}; correct one label or drop both rows"
        for row in pairs.itertuples()
    ]
    return pd.Series(reasons, pairs.index, dtype=object)


def merge_stores(parts: Sequence[str | Path], out: str | Path) -> Path:
    """Put finished stores, made with the same models and options, into a new one.

    Parameters
    ----------
    parts : sequence of paths
        Stores of different parts of a data set; their images must lie where the stores say.
    out : path
        A new or empty folder. It can be continued with ``extract`` like any other store.

    Returns
    -------
    Path
        The new store: all shards, and the rows of all parts in their order. A file that several parts hold is
        there once; where one part could not use it and another could, with its features. Files of one content
        that are labelled differently end in ``errors.parquet``, as in one extraction of all.

    Raises
    ------
    StoreError
        A part is no store, unfinished, damaged, or made otherwise than the first.
    InputError
        No parts, or ``out`` is not empty.
    """
    folders, out = [Path(part) for part in parts], Path(out)
    if not folders:
        raise InputError("merge_stores() was given no stores")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; give a new folder for the merged store")
    runs = [read_run(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if not run["complete"]:
            raise StoreError(f"the extraction into {folder} is not finished; run it again, then merge")
        if different := differences(runs[0]["fingerprint"], run["fingerprint"]):
            raise StoreError(f"{folder} was made otherwise than {folders[0]} ({different[0]})")
    bases = [str(store_root(folder, run)) for folder, run in zip(folders, runs, strict=True)]
    root = common_root([os.path.join(base, "x") for base in bases])
    tables: dict[str, list[pa.Table]] = {name: [] for name in (MANIFEST_FILE, ERRORS_FILE)}
    (out / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for folder, run, base in zip(folders, runs, bases, strict=True):
        for name, found in tables.items():
            table = read_state(folder, name, run)
            names = [stored_name(os.path.join(base, p), str(root)) for p in table[schema.PATH].to_pylist()]
            found.append(_replaced(table, schema.PATH, pa.array(names, pa.string())))
        for path in shard_files(folder):
            read_shard(path, [FEATURE_ID], run)  # damage must not spread
            content = path.name.rpartition("-")[2]
            if content not in seen:
                shutil.copyfile(path, out / SHARD_FOLDER / f"part-{len(seen):06d}-{content}")
                seen.add(content)
    manifest = _first_of_each(stack(tables[MANIFEST_FILE]))
    frame = manifest.to_pandas()
    wrong = contradictions(frame)
    usable = frame[FEATURE_ID].where(~frame.index.isin(wrong.index), None)
    manifest = _replaced(manifest, FEATURE_ID, pa.array(usable, pa.string()))
    labels = manifest.take(wrong.index.to_numpy(np.int64)).drop_columns([FEATURE_ID])
    labels = labels.append_column(STAGE, pa.array(["label"] * len(wrong), pa.string()))
    labels = labels.append_column(REASON, pa.array(wrong, pa.string()))
    errors = _first_of_each(stack([labels, *tables[ERRORS_FILE]]))
    lost = manifest.filter(pc.is_null(manifest[FEATURE_ID]))[schema.PATH]
    errors = errors.filter(pc.is_in(errors[schema.PATH], lost))
    run = {**runs[0], "root": portable_root(root, out), "checksums": {}, "captions": {}, "last_run": None}
    run["counts"] = {"images": len(manifest), "errors": len(errors), "shards": len(seen)}
    write_state(out, run, manifest, errors)
    return out


def _first_of_each(table: pa.Table) -> pa.Table:
    """Of each file and caption the first row; the first with features where one has some."""
    keys = [name for name in (schema.PATH, schema.CAPTION) if name in table.column_names]
    frame = table.select([*keys, *({FEATURE_ID} & set(table.column_names))]).to_pandas()
    if FEATURE_ID in frame:
        frame = frame.sort_values(FEATURE_ID, key=pd.isna, kind="stable")
    return table.take(np.sort(frame.drop_duplicates(keys).index.to_numpy(np.int64)))
