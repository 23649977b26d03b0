"""Manifest in, feature store out: batched, cached by content, interruptible anywhere.

`Job` plans: it lists what the store knows, without a model, a lock or a write. A `Worker` makes whole shards
of the rest, here or in a Ray cluster. `Job` then notes what became of every row.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from itemkit import __version__, schema, store
from itemkit._files import folder_lock, remove_leftovers
from itemkit.decode import DecodeConfig, Item, Reader, Task, batches, feature_of, reason_of
from itemkit.errors import InputError, ItemkitError, StoreError
from itemkit.features import ARRAYS, IMAGE_ARRAYS, OBJECT_ARRAYS, Features, concat_features
from itemkit.images import ImageError, read_bytes
from itemkit.models import Models, differences
from itemkit.store import ERRORS_FILE, FEATURE_ID, MANIFEST_FILE, REASON, RUN_FILE, STAGE
from itemkit.text import count, printable

if TYPE_CHECKING:
    from itemkit.engine_ray import RayOptions
    from itemkit.presets import Preset

CPU_BATCH, GPU_BATCH = 32, 256
PACKAGES = ("torch", "open_clip_torch", "transformers", "spacy", "numpy", "pandas", "pyarrow", "pillow")
REUSED, COMPUTED, COPY = "reused", "computed", "copy"  # the status of a row with features
POSTED = "caption_posted"  # column of the manifest and of features: the caption as it came
MANY = 64  # so many images in a row on which one model fails: it is not the images
FILE_KEY = list(store.FILE_COLUMNS)  # a file is known again by its path, size and time


# ---------------------------------------------------------------------------------------------- the worker


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker works; nothing of it but the transform and the decoding changes the numbers."""

    decode: DecodeConfig
    transform: Callable[..., Any] | None = None
    batch_size: int | None = None
    shard_size: int = 4096
    flush_seconds: float = 120.0


class Worker:
    """Turns image files into whole shards of a store; one per process.

    Parameters
    ----------
    folder : Path
        The store.
    run : dict
        Its ``run.json``.
    models : Models
    stored : iterable of str
        Features that are in the store already.
    options : WorkerOptions
    """

    def __init__(
        self, folder: Path, run: dict, models: Models, stored: Iterable[str], options: WorkerOptions
    ) -> None:
        from itemkit.steps import Steps

        loaded = json.loads(json.dumps(models.fingerprint(run["fingerprint"]["captions"])))
        if wrong := differences(run["fingerprint"], loaded, ignore=("transform", "decode")):
            raise ItemkitError(f"the models that were loaded are not those of the plan: {wrong[0]}")
        raise_malloc_thresholds()
        self.folder, self.models_hash, self.options = folder, run["fingerprint_hash"], options
        self.steps = Steps(models)
        self.seconds = self.steps.clock.seconds
        on_gpu = not str(getattr(models.encoder, "device", "cpu")).startswith("cpu")
        self.batch_size = options.batch_size or (GPU_BATCH if on_gpu else CPU_BATCH)
        prefetch = options.decode.prefetch
        self._prefetch = prefetch if prefetch is not None else (2 if on_gpu else 0)
        # feature to the status of an image that has the same one
        self._done = dict.fromkeys(stored, REUSED)
        self._read = Reader(options.decode, self._done, options.transform, models.encoder.preprocess)
        self._waiting: list[Features] = []

    def run(self, tasks: Iterable[Task], number: int) -> Generator[list[Item], None, None]:
        """Deal with tasks batch by batch; the shards of what was computed are on disk when it ends.

        Parameters
        ----------
        tasks : iterable of Task
        number : int
            Of the first shard that is written.
        """
        clock = self.steps.clock
        source = batches(tasks, self._read, lambda: self.batch_size, self.options.decode, self._prefetch)
        last = time.monotonic()
        try:
            while True:
                with clock("decode"):
                    items = next(source, None)
                if items is None:
                    break
                self._batch(items)
                for item in items:
                    item.free()
                full = sum(map(len, self._waiting)) >= self.options.shard_size
                if full or time.monotonic() - last > self.options.flush_seconds:
                    number += self._write(number)
                    last = time.monotonic()
                yield items
        finally:
            source.close()
            self._write(number)  # whatever ended the loop: features that were paid for are kept

    def _write(self, number: int) -> bool:
        """Write what waits as one shard, if anything does."""
        parts, self._waiting = self._waiting, []
        if parts:
            with self.steps.clock("write"):
                store.write_shard(self.folder, number, concat_features(parts), self.models_hash)
        return bool(parts)

    def _batch(self, items: list[Item]) -> None:
        fresh = []
        for item in items:
            if item.reason:
                if item.stage not in ("transform", "preprocess"):  # our code, not a decoder on a user's file
                    item.error = None
            elif item.feature_id in self._done:
                item.status = self._done[item.feature_id]
            else:
                self._done[item.feature_id] = COPY
                fresh.append(item)
        while fresh:
            size = self.batch_size
            alone = self._models(fresh[:size])
            if alone and self.batch_size < size:  # the others need not go slower for one that no size helps
                self._resize(size, "one image does not fit even alone")
            fresh = fresh[size:]  # cut smaller if memory ran out

    def _models(self, items: list[Item]) -> bool:
        """Run the models; returns whether an image was too large for the memory even alone."""
        try:
            images = [item.image for item in items if item.image is not None]
            features = self.steps(images, [item.task.caption for item in items], [i.pixels for i in items])
        except Exception as error:
            if is_fatal(error):
                raise ItemkitError(
                    f"the device is broken ({reason_of(error)}); what was computed before is kept: run the "
                    "same command again, on another device if it happens again"
                ) from error
            # without its trace, which would keep the batch's tensors alive
            failed = error.with_traceback(None)
        else:
            self._take(items, features)
            return False
        stage, memory = self.steps.clock.current, is_out_of_memory(failed)
        if len(items) == 1:
            reason = "memory ran out in this step with this image alone" if memory else reason_of(failed)
            items[0].stage, items[0].error = stage, failed
            items[0].reason = f"{items[0].task.name}: {reason}"
            return memory
        size = (len(items) + 1) // 2 if memory else 1
        if memory:
            gc.collect()
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size < self.batch_size:
                self._resize(size, f"out of memory in '{stage}'")
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        return any([self._models(part) for part in parts])  # all of them, not up to the first

    def _take(self, items: list[Item], features: Features) -> None:
        bad = bad_rows(features)
        for row in np.flatnonzero(bad):
            items[row].stage = "image"
            items[row].reason = f"{items[row].task.name}: a model gave no finite embedding for it"
            items[row].error = ItemkitError(
                "the models give no finite embeddings: this is not the images' fault. Ask the models with "
                "`itemkit doctor --deep`; try another device or precision"
            )
        if bad.all():
            return
        features = features.select(~bad)
        done = [item for item, wrong in zip(items, bad, strict=True) if not wrong]
        for item, tokens in zip(done, features.table[schema.CAPTION_TOKENS], strict=True):
            item.status, item.tokens = COMPUTED, int(tokens)
        own = {
            name: [getattr(i, name) for i in done] for name in (FEATURE_ID, schema.IMAGE_ID, *FILE_KEY[1:])
        }
        features.table = features.table.assign(**own, **{schema.PATH: [item.task.name for item in done]})
        # as it is stored: half the memory while it waits
        half = {name: getattr(features, name).astype(np.float16) for name in ARRAYS}
        self._waiting.append(dataclasses.replace(features, **half))

    def _resize(self, size: int, why: str) -> None:
        tqdm.write(f"{why}: batch size {self.batch_size} -> {size}", file=sys.stderr)
        self.batch_size = size


def bad_rows(features: Features) -> np.ndarray:
    """Mask of rows with an embedding not finite or not of unit length: a model broke down on that image."""

    def off(name: str) -> np.ndarray:
        return ~(np.abs(np.linalg.norm(getattr(features, name).astype(np.float32), axis=1) - 1) < 1e-2)

    bad = np.logical_or.reduce([off(name) for name in IMAGE_ARRAYS])
    np.logical_or.at(bad, features.owner, np.logical_or.reduce([off(name) for name in OBJECT_ARRAYS]))
    return bad


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def is_fatal(error: Exception) -> bool:
    """Whether an error has broken the device, so that every later call would fail as well."""
    broken = type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
    return not is_out_of_memory(error) and (broken or "cuDNN error" in str(error))


def raise_malloc_thresholds() -> bool:
    """Let glibc keep the buffers of a batch instead of fetching them from the system each time.

    Not those of huge images, and not in an arena for each decoding thread: what is kept there is lost.

    Returns
    -------
    bool
        Whether it had any effect; False on systems without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # numbers from malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
    options = ((-3, 128 << 20), (-1, 512 << 20), (-2, 64 << 20), (-8, 2))
    return all([libc.mallopt(option, value) for option, value in options])


# ---------------------------------------------------------------------------------------------- the plan


@dataclass
class Known:
    """What a store knows.

    Attributes
    ----------
    run : dict
        Its ``run.json``; empty where there is none.
    manifest, errors : Table
    files : DataFrame
        ``path, file_size, mtime_ns, image_id`` of files that were read, each once.
    tokens : Series of int
        Length of the caption of each stored feature, by feature.
    damaged : list of DamagedError
        Files that are not as they were written.
    """

    run: dict
    manifest: pa.Table
    errors: pa.Table
    files: pd.DataFrame
    tokens: pd.Series
    damaged: list[store.DamagedError]


def read_known(folder: Path, run: dict) -> Known:
    """List what a store knows; it need not be there.

    Raises
    ------
    StoreError
        It was made otherwise than ``run`` says.
    """
    damaged: list[store.DamagedError] = []

    def unless_damaged(read: Callable[..., Any], *given: Any) -> Any:
        try:
            return read(*given)
        except store.DamagedError as error:
            damaged.append(error)
            return None

    there = (unless_damaged(store.read_run, folder) if (folder / RUN_FILE).exists() else None) or {}
    if wrong := differences(there.get("fingerprint", run["fingerprint"]), run["fingerprint"]):
        shown = "; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else "")
        raise StoreError(
            f"{folder} was extracted otherwise ({shown}). Its features do not mix with these: give "
            "another folder, or delete that one first"
        )
    columns = [FEATURE_ID, schema.CAPTION_TOKENS, *FILE_KEY, schema.IMAGE_ID]
    shards = [unless_damaged(store.read_shard, path, columns, run) for path in store.shard_files(folder)]
    empty = pa.schema([(name, store.SHARD_COLUMNS[name]) for name in columns]).empty_table()
    features = pa.concat_tables([empty, *(t.select(columns) for t in shards if t is not None)]).to_pandas()
    state = [
        unless_damaged(store.read_state, folder, name, there) if there.get("checksums") else None
        for name in (MANIFEST_FILE, ERRORS_FILE)
    ]
    kinds = {name: store.SHARD_COLUMNS[name] for name in (*FILE_KEY, schema.IMAGE_ID)}
    more = ({FEATURE_ID: pa.string()}, {STAGE: pa.string(), REASON: pa.string()})
    manifest, errors = (
        pa.schema(list((kinds | own).items())).empty_table() if table is None else table
        for own, table in zip(more, state, strict=True)
    )
    # the manifest also knows the copies, which have no row in a shard
    files = [table[[*FILE_KEY, schema.IMAGE_ID]] for table in (features, manifest.to_pandas())]
    files = pd.concat(files).dropna().drop_duplicates(FILE_KEY)
    tokens = features.drop_duplicates(FEATURE_ID).set_index(FEATURE_ID)[schema.CAPTION_TOKENS]
    return Known(there, manifest, errors, files, tokens, damaged)


class Job:
    """What is to be done, and what became of every row; never an embedding.

    Parameters
    ----------
    manifest : DataFrame
        As `_checked` gives it.
    folder : Path
        The store; nothing is written.
    run : dict
        The head of ``run.json``.
    missing : {"raise", "generate", "error"}
    retry_errors : bool
    """

    def __init__(
        self, manifest: pd.DataFrame, folder: Path, run: dict, missing: str, retry_errors: bool
    ) -> None:
        self.manifest, self.folder = manifest, folder
        self.seen = _state(folder)
        self.known = read_known(folder, run)
        kept = ("created", "root", "complete", "checksums")
        self.run = run | {key: self.known.run[key] for key in kept if key in self.known.run}
        self.paths = manifest[schema.PATH].tolist()
        # the images lie elsewhere than the store has noted
        self.moved = bool(self.known.run) and not store.store_root(folder, self.run).is_dir()
        if self.moved or not self.known.run:
            whole = (store.absolute(path) for path in self.paths if store.utf8(path) == path)
            self.run["root"] = store.portable_root(store.common_root(whole), folder)
        root = str(store.store_root(folder, self.run))
        self.names = [store.stored_name(path, root) for path in self.paths]
        captions = manifest[schema.CAPTION].tolist() if schema.CAPTION in manifest else [None] * len(manifest)
        by_user = run["fingerprint"]["captions"] == "user"
        self.captions = [None if not by_user or pd.isna(c) or not str(c).strip() else c for c in captions]
        rows = self._plan(by_user and missing == "error", retry_errors)
        # as the fields of an `Item`; row i is that of the manifest
        self.rows = {name: rows[name].to_numpy(copy=True) for name in rows if name != schema.PATH}
        self.todo = np.flatnonzero((self.rows["status"] == "") & (self.rows[STAGE] == ""))
        self._in_a_row = 0
        self._failed: Item | None = None
        self.conclude()

    def _plan(self, caption_needed: bool, retry_errors: bool) -> pd.DataFrame:
        """Find the rows whose file is known by path, size and time; only the others are ever opened."""
        errors = self.known.errors.to_pandas()
        unread = set(errors[schema.PATH][errors[STAGE] == "read"])
        found = []
        for path, name, caption in zip(self.paths, self.names, self.captions, strict=True):
            size, mtime, stage, reason = -1, -1, "", ""
            if caption_needed and caption is None:
                stage, reason = "caption", f"{name}: no caption; add one or pass missing='generate'"
            elif store.utf8(path) != path:
                stage, reason = "path", f"{name}: its name is not UTF-8 and cannot be stored; rename it"
            else:
                try:
                    stat = os.stat(path)
                    size, mtime = stat.st_size, stat.st_mtime_ns
                    if name in unread:
                        read_bytes(path)
                except (OSError, ValueError) as error:
                    stage, reason = "read", _unreadable(path, name, error)
            found.append((name, size, mtime, stage, reason))
        rows = pd.DataFrame(found, columns=[*FILE_KEY, STAGE, REASON])
        rows = rows.merge(self.known.files, how="left", on=FILE_KEY)
        # only what lies in the file itself will be so again, a model's or the disk's trouble may be over;
        # but that could not be noted where nothing can be written
        again = errors[STAGE].eq("decode") & (not retry_errors)
        if self.known.run and not os.access(self.folder, os.W_OK) and not retry_errors:
            again = ~errors[STAGE].isin(("read", "label"))
        before = errors[again].drop_duplicates(FILE_KEY)[[*FILE_KEY, STAGE, REASON]]
        before = rows[FILE_KEY].merge(before, how="left", on=FILE_KEY)
        known = (rows[STAGE] == "") & before[STAGE].notna()
        rows.loc[known, [STAGE, REASON]] = before.loc[known, [STAGE, REASON]]
        rows[schema.IMAGE_ID] = rows[schema.IMAGE_ID].fillna("")
        rows[FEATURE_ID] = list(map(feature_of, self.captions, rows[schema.IMAGE_ID]))
        tokens = rows[FEATURE_ID].map(self.known.tokens)
        rows["status"] = np.where(tokens.notna() & (rows[STAGE] == ""), REUSED, "").astype(object)
        rows["tokens"] = tokens.fillna(0).astype(np.int64)
        return rows

    def tasks(self, rows: Iterable[int]) -> Iterator[Task]:
        """Rows of ``todo`` as a worker takes them."""
        for row in rows:
            yield Task(int(row), os.path.abspath(self.paths[row]), self.names[row], self.captions[row])

    @property
    def settled(self) -> bool:
        """Whether the store holds all of this already, as it stands here: nothing to compute or to note."""
        return not (len(self.todo) or self.moved or self.known.damaged or self.changed)

    def open(self) -> None:
        """Make the folder a store that is under way; damaged files are set aside. Needs the lock."""
        remove_leftovers(self.folder)
        own = {".lock", store.SHARD_FOLDER, MANIFEST_FILE, ERRORS_FILE, RUN_FILE}
        others = sorted(p.name for p in self.folder.iterdir() if p.name not in own and p.suffix != ".damaged")
        if others and not self.known.run:
            raise StoreError(
                f"{self.folder} holds other files ({printable(', '.join(others[:3]))}) and no {RUN_FILE}: "
                "give a new or empty folder for the features"
            )
        (self.folder / store.SHARD_FOLDER).mkdir(exist_ok=True)
        remove_leftovers(self.folder / store.SHARD_FOLDER)
        for error in self.known.damaged:
            warnings.warn(f"{error.path} is damaged: set aside as {error.path.name}.damaged", stacklevel=2)
            with contextlib.suppress(FileNotFoundError):
                os.replace(error.path, error.path.with_name(error.path.name + ".damaged"))
        # whatever cuts this short, nobody takes a part for the whole
        if len(self.todo) or not self.known.run:
            self.run["complete"] = False
            store.write_run(self.folder, self.run)

    @property
    def next_shard(self) -> int:
        """Number of the next shard."""
        return max((int(path.stem.split("-")[1]) for path in store.shard_files(self.folder)), default=-1) + 1

    def note(self, items: list[Item]) -> None:
        """Note what became of some rows.

        Raises
        ------
        ItemkitError
            The models fail on everything: it is not the images.
        """
        for item in items:
            item.reason = printable(item.reason)
            for name, values in self.rows.items():
                values[item.task.row] = getattr(item, name)
            if item.status == COMPUTED:
                self._in_a_row = 0
            if item.error is not None:
                self._in_a_row, self._failed = self._in_a_row + 1, item
                if self._in_a_row >= (MANY if self.any_features else 8):
                    self._give_up()

    @property
    def any_features(self) -> bool:
        """Whether any row has features."""
        return bool((self.rows["status"] != "").any())

    def check_that_anything_worked(self) -> None:
        """Some images may upset a model; if all do, it is not the images."""
        if self._failed is not None and not self.any_features:
            self._give_up()

    def _give_up(self) -> None:
        assert self._failed is not None and self._failed.error is not None
        error = self._failed.error
        if isinstance(error, ItemkitError):
            raise error
        raise ItemkitError(
            f"the step '{self._failed.stage}' failed on {count(self._in_a_row, 'image')} in a row "
            f"({reason_of(error)}), so this is not the images. Mend it, then run the same command "
            "again: what was computed before is kept"
        ) from error

    def conclude(self) -> None:
        """Set ``outcome`` (what became of each row), and the whole store's ``tables`` (manifest and errors).

        A store keeps the rows of all its runs. What this run's manifest says of a file, or of a file of the
        same content, stands; rows of other files stay. ``changed`` is whether the store says otherwise.
        """
        rows = pd.DataFrame(self.rows)
        rows.insert(0, schema.PATH, pd.Series(self.names, dtype=object))
        given = self.manifest.drop(columns=[name for name in rows if name in self.manifest])
        table = pd.concat([rows[[*FILE_KEY, schema.IMAGE_ID]], given], axis=1)
        table[schema.IMAGE_ID] = table[schema.IMAGE_ID].where(rows[schema.IMAGE_ID] != "", None)
        # an image that was not tried, as a copy of one that then failed, fails with it
        failed = rows[(rows[REASON] != "") & (rows[FEATURE_ID] != "")].drop_duplicates(FEATURE_ID)
        copies = rows.index[(rows["status"] == COPY) & rows[FEATURE_ID].isin(failed[FEATURE_ID])]
        same = failed.set_index(FEATURE_ID).loc[rows[FEATURE_ID][copies], [STAGE, REASON]]
        rows.loc[copies, [STAGE, REASON]] = same.to_numpy()
        wrong = store.contradictions(table)
        wrong = wrong[rows[STAGE][wrong.index] == ""]
        rows.loc[wrong.index, STAGE], rows.loc[wrong.index, REASON] = "label", wrong
        rows.loc[rows[STAGE] != "", "status"] = ""
        table[FEATURE_ID] = rows[FEATURE_ID].where(rows["status"] != "", None)
        table[STAGE], table[REASON] = rows[STAGE], rows[REASON]
        arrow, bad = _to_arrow(table), (rows[STAGE] != "").to_numpy()
        self.tables = [
            _with_other_rows(arrow.drop_columns([STAGE, REASON]), self.known.manifest, table),
            _with_other_rows(arrow.drop_columns([FEATURE_ID]).filter(bad), self.known.errors, table),
        ]
        self.outcome = rows
        self.complete = self.tables[0][FEATURE_ID].null_count == len(self.tables[1])
        old = (self.known.manifest, self.known.errors)
        self.changed = not all(map(_same_rows, old, self.tables)) or (
            self.complete and not self.run["complete"]  # cut short just before its last write
        )

    def finish(self) -> None:
        """Write manifest, errors and run.json."""
        self.run["complete"] = self.complete
        images, errors = map(len, self.tables)
        shards = len(store.shard_files(self.folder))
        self.run["counts"] = {"images": images, "errors": errors, "shards": shards}
        store.write_state(self.folder, self.run, *self.tables)

    def cut_captions(self) -> dict[str, Any]:
        """Count the captions that are longer than the encoder reads.

        Returns
        -------
        dict
            ``cut`` (how many), ``room`` (tokens the encoder reads, start and end included), and where any is
            cut ``longest`` (in tokens) and ``first`` (name of its image). Empty where the encoder is silent.
        """
        room = (self.run["fingerprint"].get("encoder") or {}).get("context_length")
        if not room:
            return {}
        long = self.outcome[self.outcome["tokens"] > room]
        found = {"cut": long[FEATURE_ID].nunique(), "room": int(room)}
        if len(long):
            found |= {"longest": int(long["tokens"].max()), "first": long[schema.PATH].iloc[0]}
        return found


def _unreadable(path: str, name: str, error: Exception) -> str:
    try:
        read_bytes(path)  # says it better than the system
    except ImageError as found:
        error = found
    return reason_of(error, path, name)


def _state(folder: Path) -> tuple:
    """What changes whenever a store changes."""
    with contextlib.suppress(OSError):
        stat = (folder / RUN_FILE).stat()
        return stat.st_mtime_ns, stat.st_size, [path.name for path in store.shard_files(folder)]
    return ()


def _with_other_rows(mine: pa.Table, old: pa.Table, table: pd.DataFrame) -> pa.Table:
    """Rows of this run, then those of other files, without those whose content has another label now."""
    before = old.to_pandas()
    other = ~before[schema.PATH].isin(table[schema.PATH])
    if schema.LABEL in before and schema.LABEL in table:
        known = table[[schema.IMAGE_ID, schema.LABEL]].dropna().drop_duplicates(schema.IMAGE_ID)
        now = before[schema.IMAGE_ID].map(known.set_index(schema.IMAGE_ID)[schema.LABEL])
        other &= now.isna() | before[schema.LABEL].isna() | (now == before[schema.LABEL]).fillna(False)
    return store.stack([mine, old.filter(other.to_numpy(bool))]) if other.any() else mine


def _same_rows(old: pa.Table, new: pa.Table) -> bool:
    """Whether two tables hold the same, in whatever order."""
    a, b = (store.stack([one, other.slice(0, 0)]) for one, other in ((old, new), (new, old)))
    order = [(name, "ascending") for name in (schema.PATH, schema.CAPTION) if name in a.column_names]
    return len(a) == len(b) and a.sort_by(order).equals(b.select(a.column_names).sort_by(order))


def _to_arrow(table: pd.DataFrame) -> pa.Table:
    texts = {
        name: table[name].map(store.utf8, na_action="ignore").astype(object)
        for name in table
        if pd.api.types.infer_dtype(table[name], skipna=True) == "string"
    }
    table = table.assign(**texts)
    try:
        found = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"a column of the manifest mixes kinds of values ({error}); make it one kind"
        ) from error
    kinds = {name: pa.string() for name in schema.MANIFEST_COLUMNS} | {schema.LABEL: pa.int8()}
    for i, name in enumerate(found.column_names):
        if name in kinds:  # whatever pandas makes of a column that is empty in this part
            found = found.set_column(i, name, found[name].cast(kinds[name]))
    return found


# ---------------------------------------------------------------------------------------------- the run


class StopSignal:
    """Ctrl-C (or a cluster's SIGTERM) lets the batch at hand finish; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        note = "\nfinishing the batch at hand, then stopping (Ctrl-C again: at once)"
        print(note, file=sys.stderr, flush=True)

    def leave(self) -> None:
        """End the run the way the signal asked for."""
        if self.requested == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did; ``str(report)`` is what is shown at its end.

    Attributes
    ----------
    n : int
        Rows of the manifest; each is one of the following.
    reused, computed, copies, errors : int
        Images with features from an earlier run; computed now; same content as an image computed now; without
        features (see ``errors.parquet``).
    left : int
        Images not reached, because the run was stopped.
    seconds : float
    stages : dict
        Seconds per step of the method; of workers, summed.
    batch_size : int
        At the end: halved each time memory ran out.
    notes : list of str
        What the user should know beyond the counts: where and why images failed, captions that were cut.
    """

    n: int
    reused: int
    computed: int
    copies: int
    errors: int
    left: int
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    batch_size: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.reused:,} reused, {self.computed:,} computed"]
        if self.copies:
            parts.append(count(self.copies, "copy of them" if self.copies == 1 else "copies of them"))
        parts.append(count(self.errors, "error"))
        if self.left:
            parts.append(f"{self.left:,} left to do")
        line = f"{count(self.n, 'image')}: {', '.join(parts)}; {self.seconds:.1f} s"
        if self.computed:
            busy = {name: s for name, s in self.stages.items() if s > 0.005 * self.seconds}
            shares = ", ".join(f"{name} {s / self.seconds:.0%}" for name, s in busy.items())
            line += f", {self.computed / self.seconds:.1f} images/s ({shares})"
        return "\n".join([line, *self.notes])


def _report(job: Job, started: float, stages: dict[str, float], batch_size: int) -> ExtractReport:
    status, failed = job.outcome["status"].value_counts(), job.outcome[job.outcome[STAGE] != ""]
    notes = [
        f"{count(len(rows), 'image')} without features (step '{stage}'), the first: {rows[REASON].iloc[0]}"
        for stage, rows in failed.groupby(STAGE, sort=False)
    ]
    if notes:
        damaged = "; --retry-errors also tries those known to be damaged"
        again = damaged if failed[STAGE].eq("decode").any() else ""
        notes.append(f"all of them with their reasons: {job.folder / ERRORS_FILE}{again}")
    captions = job.cut_captions()
    if captions.get("cut"):
        notes.append(
            f"{count(captions['cut'], 'caption')} longer than the {captions['room']} tokens the encoder "
            f"reads, and cut there for it (longest {captions['longest']}, first: {captions['first']}); "
            "objects were taken from whole captions"
        )
    return ExtractReport(
        n=len(job.outcome),
        **{name: int(status.get(kind, 0)) for name, kind in
           (("reused", REUSED), ("computed", COMPUTED), ("copies", COPY))},
        errors=len(failed),
        left=int(status.get("", 0)) - len(failed),
        seconds=round(time.perf_counter() - started, 3),
        stages={name: round(s, 3) for name, s in stages.items()},
        batch_size=batch_size,
        notes=notes,
    )  # fmt: skip


def extract(
    manifest: pd.DataFrame,
    out: str | Path,
    models: Models | Preset | str = "mini",
    *,
    device: str = "auto",
    captions: str = "generate",
    missing: str = "raise",
    transform: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    shard_size: int = 4096,
    flush_seconds: float = 120.0,
    limit: int | None = None,
    decode: DecodeConfig | None = None,
    retry_errors: bool = False,
    progress: bool = True,
    config: dict | None = None,
    engine: str = "local",
    ray: RayOptions | None = None,
) -> ExtractReport:
    """Compute the features of all images of a manifest that the store does not hold yet.

    Where the store holds all of them, no model is loaded, no lock taken and nothing written.

    Parameters
    ----------
    manifest : DataFrame
        With ``path`` and, where known, ``label, generator, source, split, caption``. A path may come more
        than once (with several captions); files of equal content share their features. It may be a part of
        what the store holds: rows of earlier runs stay.
    out : path
        The feature store; made if missing, continued if made with the same models and options.
    models : Models, Preset or str
        The models, a preset, or the name of one.
    device : str
        For a preset.
    captions : {"generate", "user"}
        From the captioner, or from the manifest's ``caption`` column, cleaned by `captions.clean_caption`;
        the original stays as ``caption_posted`` where it changed.
    missing : {"raise", "generate", "error"}
        With ``captions="user"``, what to do about images without caption.
    transform : callable with ``fingerprint()``, optional
        ``(image, image_id) -> image`` applied after decoding, e.g. a perturbation; must be deterministic.
    batch_size : int, optional
        Images per batch; default 32 on a CPU, 256 on a GPU. Halved when memory runs out. Does not change the
        numbers beyond rounding.
    shard_size, flush_seconds : int, float
        A shard is written after this many images or seconds; a killed run loses no more than that.
    limit : int, optional
        Take the first rows of the manifest only.
    decode : DecodeConfig, optional
        Threads, look-ahead, bounds of memory.
    retry_errors : bool
        Try images again that were found unusable before and have not changed since.
    progress : bool
        Progress bar and closing lines on stderr. Without, images that failed are a warning.
    config : dict, optional
        Noted in ``run.json`` for the reader, e.g. the preset's options; does not decide what is reused.
    engine : {"local", "ray"}
        Run the models in this process, or in the workers of a Ray cluster. The store is the same.
    ray : RayOptions, optional
        How many workers, and where; see :mod:`itemkit.engine_ray`.

    Returns
    -------
    ExtractReport

    Raises
    ------
    InputError
        The manifest or an option is unusable.
    StoreError
        The folder is no store, was made otherwise, or cannot be written; what was finished is intact.
    ItemkitError
        The models fail on everything; what was computed before is kept.
    KeyboardInterrupt
        After Ctrl-C, once everything computed is on disk.
    """
    for name, value, choices in (
        ("captions", captions, ("generate", "user")),
        ("missing", missing, ("raise", "generate", "error")),
        ("engine", engine, ("local", "ray")),
    ):
        if value not in choices:
            raise InputError(f"got {name}={value!r}; choose one of {', '.join(choices)}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"got batch_size={batch_size}; give at least 1, or None for the device's default")
    if transform is not None and not hasattr(transform, "fingerprint"):
        raise InputError(
            f"transform {transform!r} has no fingerprint(), which the cache needs to tell it apart"
        )
    told = manifest.attrs.get("report")
    manifest = _checked(manifest, captions, missing, limit)
    if isinstance(models, str):
        from itemkit.presets import get_preset

        models = get_preset(models)
    if config is None and hasattr(models, "record"):
        config = models.record()
    if models.captioner is None and (captions == "generate" or missing == "generate"):
        raise InputError("there is no captioner to make captions with; give one, or pass captions='user'")
    started, folder = time.perf_counter(), Path(out)
    decode = decode or DecodeConfig()
    options = WorkerOptions(decode, transform, batch_size, shard_size, flush_seconds)
    cluster = None
    if engine == "ray":
        from itemkit.engine_ray import RayCluster, RayOptions

        cluster = RayCluster(models, device, options, ray or RayOptions())
    parts = cluster.fingerprint(captions) if cluster else fingerprint_of(models, device, captions)
    parts["transform"] = None if transform is None else transform.fingerprint()
    parts["decode"] = None if decode.least_side is None else {"least_side": decode.least_side}
    run = _run_head(parts, config, told)
    run["dim"] = int(parts["encoder"].get("dim") or models.encoder.dim)

    job, worker, stop = Job(manifest, folder, run, missing, retry_errors), None, StopSignal()
    if not job.settled:
        with folder_lock(folder):
            if job.seen != _state(folder):  # somebody else was quicker
                job = Job(manifest, folder, run, missing, retry_errors)
            if not job.settled:
                job.open()
                if len(job.todo):
                    stored = job.known.tokens.index
                    worker = cluster or Worker(folder, job.run, build_models(models, device), stored, options)
                    _compute(job, worker, cluster, stop, progress)
                job.run["captions"] = job.cut_captions()
                last = dataclasses.asdict(_report(job, started, *_effort(worker)))
                job.run["last_run"] = {key: value for key, value in last.items() if key != "notes"}
                job.finish()
    report = _report(job, started, *_effort(worker))
    if progress:
        print(report, file=sys.stderr, flush=True)
    elif report.errors:
        warnings.warn("; ".join(report.notes), stacklevel=2)
    if stop.requested is not None:
        print(f"stopped; everything computed so far is in {out}. Run the same command again to go on",
              file=sys.stderr, flush=True)  # fmt: skip
        stop.leave()
    return report


def _effort(worker: Any) -> tuple[dict[str, float], int]:
    return ({}, 0) if worker is None else (worker.seconds, worker.batch_size)


def _compute(job: Job, worker: Any, cluster: Any, stop: StopSignal, progress: bool) -> None:
    """Let the workers work; returns early, with everything on disk, when asked to stop."""
    source = cluster.work(job) if cluster else worker.run(job.tasks(job.todo), job.next_shard)
    bar = tqdm(total=len(job.todo), unit="image", file=sys.stderr, disable=not progress)
    with stop, contextlib.closing(bar), contextlib.closing(source):
        for items in source:
            job.note(items)
            bar.update(len(items))
            if stop.requested:
                break
    job.check_that_anything_worked()
    job.conclude()


def build_models(models: Models | Preset, device: str) -> Models:
    """The models themselves, loaded if they are not yet."""
    return models.build(device) if hasattr(models, "build") else models


def fingerprint_of(models: Models | Preset, device: str, captions: str) -> dict[str, Any]:
    """What the models are; nothing is loaded for it."""
    if isinstance(models, Models):
        return models.fingerprint(captions)
    return models.fingerprint(captions, device)


def _checked(manifest: pd.DataFrame, captions: str, missing: str, limit: int | None) -> pd.DataFrame:
    if schema.PATH not in manifest:
        raise InputError(f"the manifest has no column '{schema.PATH}', only {list(manifest.columns)}")
    if limit is not None and limit < 1:
        raise InputError(f"got limit={limit}; give a number of images of at least 1")
    manifest = manifest.iloc[:limit].reset_index(drop=True)
    if not len(manifest):
        raise InputError("the manifest has no rows; nothing to extract")
    paths = [os.fspath(path) if isinstance(path, os.PathLike) else path for path in manifest[schema.PATH]]
    for row, path in enumerate(paths):
        if not isinstance(path, str) or not path:
            problem = (
                "no path" if pd.isna(path) or not path else f"{path!r} ({type(path).__name__}) as its path"
            )
            raise InputError(f"row {row} of the manifest has {problem}; give a text or drop the row")
    manifest = manifest.assign(**{schema.PATH: pd.Series(paths, dtype=object)})
    if schema.LABEL in manifest:
        known = manifest[schema.LABEL].dropna()
        for row, label in known[~known.isin((schema.REAL, schema.FAKE))].items():
            raise InputError(
                f"row {row} of the manifest has the label {label!r}; expected {schema.REAL} for real, "
                f"{schema.FAKE} for fake or nothing (itemkit.manifest.read_manifest also takes words)"
            )
    if captions != "user":
        return manifest
    manifest = with_clean_captions(manifest)
    without = manifest[schema.CAPTION].isna()
    if without.any() and missing == "raise":
        raise InputError(
            f"{int(without.sum())} of {len(manifest)} images have no caption; first: "
            f"{printable(manifest[schema.PATH][without].iloc[0])}. Add it (one of links, mentions and emoji "
            "only counts as none), or pass missing='generate' (the captioner fills in) or missing='error' "
            "(an error row for each)"
        )
    return manifest


def with_clean_captions(manifest: pd.DataFrame) -> pd.DataFrame:
    """Clean the captions of a manifest; the original stays beside each one that changed.

    Parameters
    ----------
    manifest : DataFrame

    Returns
    -------
    DataFrame
        ``caption`` as `captions.clean_caption` gives it, missing where nothing is left; where any changed,
        also ``caption_posted``, empty where it did not.
    """
    from itemkit.captions import clean_caption

    nothing = pd.Series(None, manifest.index, dtype=object)
    given = manifest.get(schema.CAPTION, nothing).astype(object)
    clean = given.map(lambda text: clean_caption(store.utf8(str(text))) or None, na_action="ignore")
    clean = clean.astype(object).where(clean.notna(), None)
    changed = given.notna() & (given != clean)
    manifest = manifest.assign(**{schema.CAPTION: clean})
    return manifest.assign(**{POSTED: given.where(changed, None)}) if changed.any() else manifest


def _run_head(parts: dict[str, Any], config: dict | None, report: dict | None) -> dict[str, Any]:
    parts = json.loads(json.dumps(parts))  # as it will be read back: tuples become lists
    versions = {"itemkit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "kind": store.KIND,
        "schema_version": store.SCHEMA_VERSION,
        "complete": False,
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        "fingerprint": parts,
        "fingerprint_hash": store.fingerprint_hash(parts),
        "config": config,
        "versions": versions,
        "manifest": report,
        "checksums": {},
    }
