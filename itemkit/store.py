"""The feature store: raw embeddings on disk as Parquet shards, one row per image content.

Layout of the folder::

    run.json            configuration, fingerprint of every model, versions, counts, schema version
    manifest.parquet    one row per image file: label, generator, ... and the feature row it belongs to
    errors.parquet      one row per image file without features: stage and reason
    shards/part-*.parquet

Features are keyed by content (``feature_id``: hash of the file, joined by the user's caption where one is
used), labels by path. So a label can be corrected, and a copy of a file added, without computing anything.
Nothing is ever rewritten in place: every file is whole or absent, and a killed run loses no finished shard.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from itemkit import schema
from itemkit._files import FolderLock, atomic_write, explain_write_error, remove_leftovers, write_json
from itemkit.errors import InputError, StoreError
from itemkit.features import IMAGE_NORMS, OBJECT_NORMS, Features, norms_or_none

RUN_FILE, SHARD_FOLDER = "run.json", "shards"
MANIFEST_FILE, ERRORS_FILE = "manifest.parquet", "errors.parquet"
KIND = "itemkit feature store"

FEATURE_ID, CAPTION_SOURCE = "feature_id", "caption_source"
FILE_SIZE, MTIME_NS, WIDTH, HEIGHT = "file_size", "mtime_ns", "width", "height"

# the scalar columns of a shard, in order
SHARD_COLUMNS = {
    FEATURE_ID: pa.string(),
    schema.IMAGE_ID: pa.string(),
    schema.PATH: pa.string(),
    FILE_SIZE: pa.int64(),
    MTIME_NS: pa.int64(),
    WIDTH: pa.int32(),
    HEIGHT: pa.int32(),
    schema.CAPTION: pa.string(),
    CAPTION_SOURCE: pa.string(),
    schema.CAPTION_LOGPROB: pa.float32(),
    schema.CAPTION_TOKENS: pa.int32(),
    schema.N_OBJECTS: pa.int32(),
}
BOX_COLUMNS = ("x0", "y0", "x1", "y1", "score")
# of the objects, after the boxes; they and IMAGE_NORMS are missing in shards written before 0.2
OBJECT_FIELDS = ("phrase", *BOX_COLUMNS, *OBJECT_NORMS)
FILE = (schema.PATH, FILE_SIZE, MTIME_NS)  # tells one state of an image file
# columns of Features.table that come from the shards
FEATURE_COLUMNS = tuple(c for c in SHARD_COLUMNS if c not in FILE)
EMBEDDINGS = (schema.IMAGE_EMB, schema.CAPTION_EMB, schema.OBJECTS)


# ---------------------------------------------------------------------------------------------- reading


def read_run(folder: str | Path) -> dict:
    """Read ``run.json`` of a feature store and check that this version of itemkit can read the store.

    Raises
    ------
    StoreError
        The folder is no feature store, or one of another schema version.
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
        problem = f"{path} cannot be read ({error})"
        raise StoreError(f"{problem}; restore it, or extract into another folder") from error
    found = run.get("schema_version") if isinstance(run, dict) and run.get("kind") == KIND else None
    if found != schema.SCHEMA_VERSION:
        newer = isinstance(found, int) and found > schema.SCHEMA_VERSION
        again = "extract again into another folder (the old one is left as it is)"
        advice = "update itemkit" if newer else again
        raise StoreError(
            f"{folder} was written with store schema {found}, this itemkit reads schema "
            f"{schema.SCHEMA_VERSION}: {advice}"
        )
    return run


def shard_files(folder: str | Path) -> list[Path]:
    """All finished shards of a store, in the order in which they were written."""
    return sorted((Path(folder) / SHARD_FOLDER).glob("part-*.parquet"))


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read (some columns of) one shard; a damaged file raises StoreError with what to do."""
    try:
        if columns is not None and not set(IMAGE_NORMS).isdisjoint(columns):
            there = pq.read_schema(path).names
            columns = [name for name in columns if name in there or name not in IMAGE_NORMS]
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"{path} is damaged ({str(error).splitlines()[0]}). Delete it and run the extraction again: "
            "only its images are computed anew"
        ) from error


def load_features(
    folder: str | Path,
    columns: Sequence[str] = EMBEDDINGS,
    *,
    root: str | Path | None = None,
    partial: bool = False,
) -> Features:
    """Read a feature store into memory.

    Parameters
    ----------
    folder : path
        A folder written by :func:`itemkit.extraction.extract`.
    columns : sequence of {"image_emb", "caption_emb", "objects"}
        The embeddings to read; the others get width 0 (and no objects), and cost no memory.
    root : path, optional
        Where the images lie now, if they were moved; by default the place noted in the store.
    partial : bool
        Read what there is of an unfinished extraction instead of raising.

    Returns
    -------
    Features
        One row per image file of the last extraction's manifest, in its order, without those that ended
        in ``errors.parquet``. Embeddings are float32 and L2-normalised anew after their float16 storage.

    Raises
    ------
    StoreError
        No store, another schema, unfinished, or a shard is damaged or missing.
    """
    folder = Path(folder)
    unknown = sorted(set(columns) - set(EMBEDDINGS))
    if unknown:
        raise InputError(f"unknown columns {unknown}; choose among {list(EMBEDDINGS)}")
    run = read_run(folder)
    if not run["complete"] and not partial:
        raise StoreError(
            f"the extraction into {folder} is not finished. Run the same `itemkit extract` again (it goes "
            "on where it stopped), or read what there is with load_features(folder, partial=True)"
        )
    manifest = _read_table(folder / MANIFEST_FILE).to_pandas()
    shards = shard_files(folder)
    scalars, shard_of, row_of = _read_scalars(shards)
    if not run["complete"]:
        errors = folder / ERRORS_FILE
        failed = _read_table(errors).to_pandas() if errors.exists() else manifest[:0]
        manifest = _match_by_file(manifest, failed, scalars, run["fingerprint"]["captions"] == "user")
    manifest = manifest[manifest[FEATURE_ID].notna()].reset_index(drop=True)
    at = pd.Index(scalars[FEATURE_ID]).get_indexer(manifest[FEATURE_ID])
    if (at < 0).any():
        raise StoreError(
            f"{int((at < 0).sum())} of {len(at)} images of {folder} have lost their features (was a shard "
            "deleted?); run the extraction again: only those are computed"
        )
    kept = [c for c in manifest.columns if c not in (*FEATURE_COLUMNS, FILE_SIZE, MTIME_NS)]
    found = scalars.iloc[at][list(FEATURE_COLUMNS)].reset_index(drop=True)
    table = pd.concat([manifest[kept], found], axis=1)
    base = Path(root) if root is not None else store_root(folder, run)
    table[schema.PATH] = [str(base / p) for p in table[schema.PATH]]
    if schema.LABEL in table:
        table[schema.LABEL] = table[schema.LABEL].astype("Int8")  # also where no label is missing
    leading = [c for c in (schema.IMAGE_ID, *schema.MANIFEST_COLUMNS, schema.N_OBJECTS) if c in table]
    table = table[leading + [c for c in table.columns if c not in leading]]
    features = _fill(table, shards, shard_of[at], row_of[at], columns, run)
    for name in IMAGE_NORMS:
        setattr(features, name, norms_or_none(scalars[name].to_numpy(np.float32)[at]))
    return features


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        problem = f"{path} is missing or damaged"
        raise StoreError(f"{problem}; run the extraction again, it computes nothing twice") from error


def _read_scalars(shards: list[Path]) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    names = (*FEATURE_COLUMNS, *FILE, *IMAGE_NORMS)
    tables = [read_shard(path, names) for path in shards]
    sizes = [len(table) for table in tables]
    if not tables:
        empty = pa.schema([(c, SHARD_COLUMNS.get(c, pa.float32())) for c in names]).empty_table()
        return empty.to_pandas(), np.zeros(0, np.int64), np.zeros(0, np.int64)
    scalars = pa.concat_tables(tables, promote_options="default").to_pandas().reindex(columns=list(names))
    shard_of = np.repeat(np.arange(len(shards)), sizes)
    row_of = np.concatenate([np.arange(n) for n in sizes])
    # a merged or hand-copied store may hold a feature row twice: the first counts
    first = ~scalars[FEATURE_ID].duplicated().to_numpy()
    return scalars[first].reset_index(drop=True), shard_of[first], row_of[first]


def _match_by_file(
    manifest: pd.DataFrame, failed: pd.DataFrame, scalars: pd.DataFrame, user_captions: bool
) -> pd.DataFrame:
    # an unfinished run has noted what is to be done; what was done since is known from the shards alone
    def keys(table: pd.DataFrame, from_user: pd.Series) -> pd.Index:
        caption = table[schema.CAPTION] if user_captions else pd.Series(None, table.index, dtype=object)
        # with size and time: under the same path there may lie another picture by now
        parts = [table[name].astype(str) for name in FILE]
        return pd.Index(parts[0].str.cat([*parts[1:], caption.where(from_user, "").fillna("")], sep="\n"))

    done = scalars[FEATURE_ID].set_axis(keys(scalars, scalars[CAPTION_SOURCE] == "user"))
    done = done[~done.index.duplicated(keep="last")]
    wanted, unusable = (keys(table, table[schema.PATH].notna()) for table in (manifest, failed))
    noted = manifest[FEATURE_ID].astype(object)
    found = noted.where(noted.notna(), done.reindex(wanted).to_numpy(dtype=object))
    # such as files of one content with two labels: they have features, and can not be used
    return manifest.assign(**{FEATURE_ID: found.mask(wanted.isin(unusable), None)})


def _fill(
    table: pd.DataFrame,
    shards: list[Path],
    shard_of: np.ndarray,
    row_of: np.ndarray,
    columns: Sequence[str],
    run: dict,
) -> Features:
    n = len(table)
    dim = int(run["dim"] or 0)
    dims = {name: dim if name in columns else 0 for name in EMBEDDINGS}
    image = np.zeros((n, dims[schema.IMAGE_EMB]), np.float32)
    caption = np.zeros((n, dims[schema.CAPTION_EMB]), np.float32)
    counts = table[schema.N_OBJECTS].to_numpy(np.int64) * (schema.OBJECTS in columns)
    start = np.concatenate([[0], np.cumsum(counts)])
    region = np.zeros((start[-1], dims[schema.OBJECTS]), np.float32)
    phrase = np.zeros_like(region)
    phrases = np.empty(start[-1], dtype=object)
    boxes = np.zeros((start[-1], len(BOX_COLUMNS)), np.float32)
    norms = {name: np.full(start[-1], np.nan, np.float32) for name in OBJECT_NORMS}
    wanted = [c for c in (schema.IMAGE_EMB, schema.CAPTION_EMB) if c in columns]
    if schema.OBJECTS in columns:
        wanted += [schema.OBJECTS, schema.REGION_EMB, schema.PHRASE_EMB]
    for number, path in enumerate(shards):
        rows = np.flatnonzero(shard_of == number)
        if not len(rows) or not wanted:
            continue
        shard = read_shard(path, wanted)
        local = row_of[rows]
        if schema.IMAGE_EMB in columns:
            image[rows] = _vectors(shard[schema.IMAGE_EMB], dim)[local]
        if schema.CAPTION_EMB in columns:
            caption[rows] = _vectors(shard[schema.CAPTION_EMB], dim)[local]
        if schema.OBJECTS in columns:
            objects = shard[schema.OBJECTS].combine_chunks()
            offsets = objects.offsets.to_numpy()
            source = _ranges(offsets[local], counts[rows])
            target = _ranges(start[rows], counts[rows])
            fields = objects.values
            region[target] = _vectors(shard[schema.REGION_EMB], dim)[source - offsets[0]]
            phrase[target] = _vectors(shard[schema.PHRASE_EMB], dim)[source - offsets[0]]
            phrases[target] = fields.field("phrase").to_numpy(zero_copy_only=False)[source]
            for i, name in enumerate(BOX_COLUMNS):
                boxes[target, i] = fields.field(name).to_numpy(zero_copy_only=False)[source]
            for name in set(OBJECT_NORMS) & {field.name for field in fields.type}:
                norms[name][target] = fields.field(name).to_numpy(zero_copy_only=False)[source]
    objects = pd.DataFrame({"phrase": phrases, **{name: boxes[:, i] for i, name in enumerate(BOX_COLUMNS)}})
    return Features(
        table=table,
        image_emb=unit_rows(image),
        caption_emb=unit_rows(caption),
        region_emb=unit_rows(region),
        phrase_emb=unit_rows(phrase),
        owner=np.repeat(np.arange(n), counts),
        objects=objects,
        run=run,
        **{name: norms_or_none(lengths) for name, lengths in norms.items()},
    )


def _vectors(column: pa.ChunkedArray, dim: int) -> np.ndarray:
    array = column.combine_chunks()
    while not pa.types.is_floating(array.type):
        array = array.flatten()
    return array.to_numpy().reshape(-1, dim)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, ... of each range, one range after the other."""
    total = int(lengths.sum())
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.zeros(0, np.int64)
    return np.arange(total) - np.repeat(before, lengths) + np.repeat(starts, lengths)


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Bring rows back to unit length in place (float16 storage is off by up to 1e-3)."""
    step = 65536  # keeps the temporary square small for millions of rows
    for i in range(0, len(x) if x.shape[1] else 0, step):
        part = x[i : i + step]
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return x


# ---------------------------------------------------------------------------------------------- places


def common_root(paths: Sequence[str]) -> Path:
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


def relative_path(path: str, root: str) -> str:
    """Path as noted in a store: relative and with forward slashes below the root, absolute elsewhere."""
    prefix = root.rstrip(os.sep) + os.sep
    return path[len(prefix) :].replace(os.sep, "/") if path.startswith(prefix) else path


def concat_features(parts: Sequence[Features]) -> Features:
    """Put features of several sets of images, made the same way, one after the other."""
    if not parts:
        raise InputError("concat_features() was given no features")
    starts = np.cumsum([0] + [len(part) for part in parts])
    return Features(
        table=pd.concat([part.table for part in parts], ignore_index=True),
        image_emb=np.concatenate([part.image_emb for part in parts]),
        caption_emb=np.concatenate([part.caption_emb for part in parts]),
        region_emb=np.concatenate([part.region_emb for part in parts]),
        phrase_emb=np.concatenate([part.phrase_emb for part in parts]),
        owner=np.concatenate([part.owner + start for part, start in zip(parts, starts, strict=False)]),
        objects=pd.concat([part.objects for part in parts], ignore_index=True),
        run=parts[0].run,
        **{name: _concat_norms(parts, name) for name in (*IMAGE_NORMS, *OBJECT_NORMS)},
    )


def _concat_norms(parts: Sequence[Features], name: str) -> np.ndarray | None:
    lengths = []
    for part in parts:
        found = getattr(part, name)
        n = len(part) if name in IMAGE_NORMS else len(part.owner)
        lengths.append(np.full(n, np.nan, np.float32) if found is None else found)
    return norms_or_none(np.concatenate(lengths))


VECTORS = (schema.IMAGE_EMB, schema.CAPTION_EMB, schema.REGION_EMB, schema.PHRASE_EMB)


def to_arrow(features: Features) -> pa.Table:
    """Rows of a shard from features in memory; embeddings become float16."""
    columns = {
        name: pa.array(features.table[name].to_numpy(), type=kind, from_pandas=name != schema.CAPTION_LOGPROB)
        for name, kind in SHARD_COLUMNS.items()
    }
    counts = np.bincount(features.owner, minlength=len(features))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    fields = [pa.array(features.objects["phrase"], type=pa.string())]
    fields += [pa.array(features.objects[name].to_numpy(np.float32)) for name in BOX_COLUMNS]
    fields += [_lengths(getattr(features, name), len(features.owner)) for name in OBJECT_NORMS]
    struct = pa.StructArray.from_arrays(fields, list(OBJECT_FIELDS))
    for name in IMAGE_NORMS:
        columns[name] = _lengths(getattr(features, name), len(features))
    columns[schema.IMAGE_EMB] = _fixed(features.image_emb)
    columns[schema.CAPTION_EMB] = _fixed(features.caption_emb)
    columns[schema.OBJECTS] = pa.ListArray.from_arrays(offsets, struct)
    columns[schema.REGION_EMB] = pa.ListArray.from_arrays(offsets, _fixed(features.region_emb))
    columns[schema.PHRASE_EMB] = pa.ListArray.from_arrays(offsets, _fixed(features.phrase_emb))
    return pa.table(columns)


def _lengths(norms: np.ndarray | None, n: int) -> pa.Array:
    return pa.array(np.full(n, np.nan, np.float32) if norms is None else norms.astype(np.float32))


def _fixed(x: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float16).ravel()), x.shape[1])


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    text = [f.name for f in table.schema if pa.types.is_string(f.type)]
    atomic_write(path, lambda file: pq.write_table(table, file, compression="zstd", use_dictionary=text))


def as_stored(features: Features) -> Features:
    """The same features with float16 embeddings: half the memory while they wait to be written."""
    half = {name: getattr(features, name).astype(np.float16) for name in VECTORS}
    return dataclasses.replace(features, **half)


class StoreWriter:
    """The one writer of a store: locks the folder, collects rows, writes whole shards in the background.

    Parameters
    ----------
    folder : path
        A new or empty folder, or a store written with the same fingerprint.
    run : dict
        The head of ``run.json``; its ``fingerprint`` must equal that of the store on disk.
    shard_size : int
        Images per shard: a killed run loses at most this many.

    Raises
    ------
    StoreError
        The folder holds something else, a store made otherwise, or another run is writing to it.
    """

    def __init__(self, folder: str | Path, run: dict, shard_size: int = 4096) -> None:
        self.folder = Path(folder)
        self.shard_size = shard_size
        self.rows_waiting = 0
        self.shards_written = 0
        self.moved = False  # whether the images lie elsewhere than the store has noted
        self._run = run
        self._waiting: list[Features] = []
        self._pending: Future | None = None

    def __enter__(self) -> StoreWriter:
        try:
            (self.folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(explain_write_error(error, self.folder / SHARD_FOLDER)) from error
        self._lock = FolderLock(self.folder)
        self._lock.__enter__()
        try:
            self._open()
        except BaseException:
            self._lock.__exit__()
            raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="itemkit-write")
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._thread.shutdown(wait=True)
        finally:
            self._lock.__exit__()

    def _open(self) -> None:
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / SHARD_FOLDER)
        if (self.folder / RUN_FILE).exists():
            stored = read_run(self.folder)
            differences = list(_differences(stored["fingerprint"], self._run["fingerprint"]))
            if differences:
                shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
                raise StoreError(
                    f"{self.folder} was extracted otherwise ({shown}). Its features do not mix with these: "
                    "give another folder, or delete that one first"
                )
            kept = ("created", "dim", "root", "complete", "counts", "last_run")
            self.run = self._run | {key: stored[key] for key in kept if key in stored}
            if not store_root(self.folder, self.run).is_dir():
                self.run["root"] = self._run["root"]
                self.moved = True
        else:
            own = {".lock", SHARD_FOLDER}
            others = sorted(p.name for p in self.folder.iterdir() if p.name not in own)
            if others or shard_files(self.folder):
                raise StoreError(
                    f"{self.folder} holds other files ({', '.join(others[:3] or ['shards'])}) and no "
                    f"{RUN_FILE}: give a new or empty folder for the features"
                )
            self.run = dict(self._run)
            write_json(self.folder / RUN_FILE, self.run)
        numbers = [int(path.stem.rpartition("-")[2]) for path in shard_files(self.folder)]
        self._next = max(numbers, default=-1) + 1

    def records(self) -> Iterator[pd.DataFrame]:
        """``feature_id, image_id, path, file_size, mtime_ns`` of all rows, shard by shard."""
        names = [FEATURE_ID, schema.IMAGE_ID, schema.PATH, FILE_SIZE, MTIME_NS]
        for path in shard_files(self.folder):
            try:
                yield read_shard(path, names).to_pandas()
            except StoreError:
                # set aside, not deleted: its images are simply computed again
                os.replace(path, path.with_suffix(".damaged"))

    def add(self, features: Features) -> None:
        """Take the features of a batch; writes a shard when enough have come together."""
        if not len(features):
            return
        self._waiting.append(as_stored(features))
        self.rows_waiting += len(features)
        if self.rows_waiting >= self.shard_size:
            self.write_shard()

    def write_shard(self) -> None:
        """Start writing what is waiting as one shard; the previous one is finished first."""
        self.wait()
        if self._waiting:
            parts, self._waiting, self.rows_waiting = self._waiting, [], 0
            self._pending = self._thread.submit(self._write, parts, self._next)
            self._next += 1

    def _write(self, parts: list[Features], number: int) -> None:
        table = to_arrow(concat_features(parts))
        write_table(self.folder / SHARD_FOLDER / f"part-{number:06d}.parquet", table)
        self.shards_written += 1

    def wait(self) -> None:
        """Wait until the shard being written is on disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def flush(self) -> None:
        """Write everything that is waiting and wait for it."""
        self.write_shard()
        self.wait()

    def write_tables(self, manifest: pa.Table, errors: pa.Table) -> bool:
        """Write manifest and errors, each only if it changed; return whether any did."""
        changed = False
        for name, table in ((MANIFEST_FILE, manifest), (ERRORS_FILE, errors)):
            path = self.folder / name
            if not (path.exists() and _same_table(path, table)):
                write_table(path, table)
                changed = True
        return changed

    def write_run(self, **changes: object) -> None:
        """Write run.json with these entries changed."""
        self.run = {**self.run, **changes}
        write_json(self.folder / RUN_FILE, self.run)


def _same_table(path: Path, table: pa.Table) -> bool:
    try:
        return pq.read_table(path).equals(table)
    except (OSError, pa.ArrowException):
        return False


def _differences(old: object, new: object, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=str):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif old != new:
        yield f"{name}: {_short(old)} there, {_short(new)} here"


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
