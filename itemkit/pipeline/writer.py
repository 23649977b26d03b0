"""Writing a feature store: one writer per folder, whole shards only, nothing rewritten in place."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from itemkit import schema
from itemkit._files import FolderLock, atomic_write, explain_write_error, remove_leftovers, write_json
from itemkit.errors import StoreError
from itemkit.features import IMAGE_NORMS, OBJECT_NORMS, Features
from itemkit.store import (
    BOX_COLUMNS,
    ERRORS_FILE,
    FEATURE_ID,
    FILE_SIZE,
    MANIFEST_FILE,
    MTIME_NS,
    OBJECT_FIELDS,
    RUN_FILE,
    SHARD_COLUMNS,
    SHARD_FOLDER,
    concat_features,
    read_run,
    read_shard,
    shard_files,
    store_root,
)

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
