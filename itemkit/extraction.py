"""Manifest in, feature store out: batched, cached by content, interruptible anywhere."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from itemkit import __version__, schema, store
from itemkit._files import write_json, write_quickly
from itemkit.captions import clean_caption
from itemkit.decode import DecodeConfig, Decoded, ImageReader, batches, one_line
from itemkit.errors import InputError, ItemkitError, StoreError
from itemkit.features import Features
from itemkit.steps import STAGES, Components, Profile, Stages, bad_rows, fingerprint
from itemkit.store import (
    ERRORS_FILE,
    FEATURE_ID,
    FILE_SIZE,
    MANIFEST_FILE,
    MTIME_NS,
    RUN_FILE,
    SHARD_FOLDER,
    StoreWriter,
    read_shard,
    shard_files,
    write_table,
)

if TYPE_CHECKING:
    from itemkit.engine_ray import RayOptions
    from itemkit.presets import Preset


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
        print(
            "\nfinishing the batch at hand, then stopping (Ctrl-C again: at once)",
            file=sys.stderr,
            flush=True,
        )

    def leave(self) -> None:
        """End the run the way the signal asked for."""
        if self.requested == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def is_fatal(error: Exception) -> bool:
    """Whether an error has broken the device, so that every later call would fail as well."""
    return not is_out_of_memory(error) and (
        type(error).__name__ == "AcceleratorError"
        or "CUDA error" in str(error)
        or "cuDNN error" in str(error)
    )


def free_memory() -> None:
    """Give back what a failed batch held."""
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def raise_malloc_thresholds() -> bool:
    """Let glibc keep large buffers between batches instead of fetching them from the system each time.

    Returns
    -------
    bool
        Whether it had any effect; False on systems without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # numbers from malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
    return all(libc.mallopt(option, size) for option, size in ((-3, 1 << 30), (-1, 1 << 30), (-2, 64 << 20)))


Error = tuple[str, str]  # stage, reason


class KnownFiles:
    """What a store knows about image files: 48 bytes for each, in sorted arrays.

    Parameters
    ----------
    folder : Path
        The store.
    shards : iterable of DataFrame
        Records of its shards.
    done : set of bytes
        Filled with the features the shards hold.
    forget_errors : bool
        Take files that could not be decoded as unknown.
    """

    def __init__(
        self, folder: Path, shards: Iterable[pd.DataFrame], done: set[bytes], forget_errors: bool
    ) -> None:
        keys, digests = [np.zeros(0, "S16")], [np.zeros(0, "S32")]

        def note(records: pd.DataFrame) -> None:
            columns = (records[schema.PATH], records[FILE_SIZE], records[MTIME_NS])
            keys.append(np.array([_key(*values) for values in zip(*columns, strict=True)], "S16"))
            digests.append(np.array([bytes.fromhex(i) for i in records[schema.IMAGE_ID]], "S32"))

        for records in shards:
            done.update(map(bytes.fromhex, records[FEATURE_ID]))
            note(records)
        for records in _rows(folder / MANIFEST_FILE):  # also knows the copies, which have no row in a shard
            note(records[records[schema.IMAGE_ID].notna()])
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys, kind="stable")
        self._keys, self._digests = all_keys[order], np.concatenate(digests)[order]
        self._errors: dict[bytes, tuple[bytes, Error]] = {}
        for records in () if forget_errors else _rows(folder / ERRORS_FILE):
            # only what lies in the file itself will be so again; a model's or the disk's trouble may be over
            for row in records[records["stage"] == "decode"].itertuples(index=False):
                key = _key(row.path, row.file_size, row.mtime_ns)
                self._errors[key] = (bytes.fromhex(row.image_id), (row.stage, row.reason))

    def find(self, path: str, size: int, mtime_ns: int) -> tuple[bytes, Error | None]:
        """SHA-256 of an unchanged file (empty if it is not known), and why it could not be decoded."""
        key = _key(path, size, mtime_ns)
        if key in self._errors:
            return self._errors[key]
        at = int(np.searchsorted(self._keys, np.bytes_(key)))
        if at < len(self._keys) and self._keys[at : at + 1].tobytes() == key:
            return self._digests[at : at + 1].tobytes(), None
        return b"", None


def _key(path: str, size: int, mtime_ns: int) -> bytes:
    text = f"{path}|{size}|{mtime_ns}"
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


def _rows(path: Path) -> Iterator[pd.DataFrame]:
    """Rows of a state file in pieces; none if there is none or it is damaged (it is only a short cut)."""
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield batch.to_pandas()
    except (OSError, pa.ArrowException):
        return


POSTED = "caption_posted"  # column of the manifest and of features: the caption as it came


def with_clean_captions(manifest: pd.DataFrame) -> pd.DataFrame:
    """Clean the captions of a manifest; the original stays beside each one that changed.

    Parameters
    ----------
    manifest : DataFrame

    Returns
    -------
    DataFrame
        ``caption`` as ``clean_caption`` gives it, missing where nothing is left; where any changed, also
        ``caption_posted``, empty where it did not.
    """
    if schema.CAPTION not in manifest:
        return manifest
    given = manifest[schema.CAPTION].astype(object)
    clean = given.map(lambda text: clean_caption(str(text)) or None, na_action="ignore")
    changed = given.notna() & (given != clean)
    manifest = manifest.assign(**{schema.CAPTION: clean})
    return manifest.assign(**{POSTED: given.where(changed, None)}) if changed.any() else manifest


def count_cut(folder: Path, run: dict[str, Any], features: np.ndarray) -> dict[str, Any]:
    """Count the captions of a store that are longer than its encoder reads.

    Read from the store, not counted on the way: so it holds for what earlier runs computed, too.

    Parameters
    ----------
    folder : Path
        A feature store, all shards written.
    run : dict
        Its ``run.json``; without a ``context_length`` in the encoder's fingerprint nothing can be told.
    features : bytes array
        Ids of the features that count.

    Returns
    -------
    dict
        ``cut`` (how many), ``room`` (tokens the encoder reads, start and end included), and where any is cut
        ``longest`` (in tokens) and ``first`` (path of its image).
    """
    room = (run["fingerprint"].get("encoder") or {}).get("context_length")
    if not room:
        return {}
    found = []
    for path in shard_files(folder):
        shard = read_shard(path, [FEATURE_ID, schema.PATH, schema.CAPTION_TOKENS])
        found.append(shard.filter(pc.greater(shard[schema.CAPTION_TOKENS], room)).to_pandas())
    long = pd.concat(found) if found else pd.DataFrame({FEATURE_ID: []})
    ids = np.array([bytes.fromhex(one) for one in long[FEATURE_ID]], "S32")
    long = long[np.isin(ids, features)]
    if not len(long):
        return {"cut": 0, "room": int(room)}
    longest = int(long[schema.CAPTION_TOKENS].max())
    return {"cut": len(long), "room": int(room), "longest": longest, "first": str(long[schema.PATH].iloc[0])}


def told(counts: dict[str, Any]) -> str:
    """Say in one line what `count_cut` found; "" where nothing was cut."""
    if not counts.get("cut"):
        return ""
    many = "s are" if counts["cut"] > 1 else " is"
    return (
        f"{counts['cut']} caption{many} longer than the {counts['room']} tokens the encoder reads, and cut "
        f"there for it (longest {counts['longest']}, first: {counts['first']}); objects were taken from "
        "whole captions"
    )


ALONE = "out of memory with this image alone"
NOT_FINITE = "a model gave no finite embedding for it"


@dataclass
class Failure:
    """An image on which a model failed, or which it answered with nonsense."""

    item: Decoded
    stage: str
    reason: str
    error: Exception | None = None


@dataclass
class Outcome:
    """What became of some decoded images: ``items[i]`` belongs to ``features[i]``, the others failed."""

    done: list[tuple[list[Decoded], Features]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Runner:
    """Runs the stages over decoded images.

    Parameters
    ----------
    stages : Stages
    batch_size : int
        Lowered by itself when memory runs out, unless for one image that does not fit even alone.
    on_error : {"row", "raise"}
    """

    def __init__(self, stages: Stages, batch_size: int, on_error: str = "row") -> None:
        self.stages, self.batch_size, self.on_error = stages, batch_size, on_error

    def run(self, items: list[Decoded]) -> Outcome:
        """Features of images; each item either has them or is among the failures."""
        outcome = Outcome()
        start = 0
        while start < len(items):
            # read once: it may be lower after the slice, and the rest is then cut smaller
            size, failed = self.batch_size, len(outcome.failures)
            self._run(items[start : start + size], outcome)
            if self.batch_size < size and any(f.reason == ALONE for f in outcome.failures[failed:]):
                # the others need not go slower for one that no size helps
                self._resize(size, "one image does not fit even alone")
            start += size
        return outcome

    def _run(self, items: list[Decoded], outcome: Outcome) -> None:
        try:
            images = [item.image for item in items if item.image is not None]
            features = self.stages(images, [item.caption for item in items], [item.pixels for item in items])
        except Exception as error:
            memory, stage, reason = is_out_of_memory(error), self.stages.profile.current, one_line(error)
            smaller = memory and len(items) > 1  # worth a try before anything is raised
            if is_fatal(error) or (self.on_error == "raise" and not smaller):
                raise
            # without its trace, which would keep the batch's tensors alive
            kept = error.with_traceback(None)
        else:
            self._check(items, features, outcome)
            return
        if len(items) == 1:
            outcome.failures.append(Failure(items[0], stage, ALONE if memory else reason, kept))
            return
        size = (len(items) + 1) // 2 if memory else 1
        if memory:
            free_memory()
            if size < self.batch_size:
                self._resize(size, f"out of memory in '{stage}'")
        for start in range(0, len(items), size):
            self._run(items[start : start + size], outcome)

    def _resize(self, size: int, why: str) -> None:
        tqdm.write(f"{why}: batch size {self.batch_size} -> {size}", file=sys.stderr)
        self.batch_size = size

    @staticmethod
    def _check(items: list[Decoded], features: Features, outcome: Outcome) -> None:
        bad = set(bad_rows(features).tolist())
        for i in sorted(bad):
            # shown only if no image at all fares better
            error = ItemkitError(
                "the models gave no finite embedding for any image: this is not the images' fault. Ask the "
                "models with `itemkit doctor --deep`; try another device or precision"
            )
            outcome.failures.append(Failure(items[i], "image", NOT_FINITE, error))
        if bad:
            good = np.array([i for i in range(len(items)) if i not in bad], dtype=np.int64)
            items, features = [items[i] for i in good], features.select(good)
        if items:
            outcome.done.append((items, features))


REUSED, COMPUTED, COPY = 1, 2, 3
# stages before the models in which our code runs, not a decoder on a user's file
OURS = ("transform", "preprocess")


class Engine(Protocol):
    """Where and how the models run."""

    def work(self, job: Extraction) -> Generator[int, None, None]:
        """Deal with the rows of ``job.todo``; yields how many after each batch."""


class Extraction:
    """State of one run. Per image it keeps some 300 bytes (digests, size and time), never an embedding."""

    def __init__(
        self,
        manifest: pd.DataFrame,
        writer: StoreWriter,
        captions: str,
        missing: str,
        on_error: str,
        retry_errors: bool,
    ) -> None:
        self.manifest, self.writer, self.on_error = manifest, writer, on_error
        self.profile = Profile()
        self.batch_size = 0  # in the end; the engine's affair
        self.root = str(store.store_root(writer.folder, writer.run))
        self.paths = manifest[schema.PATH].to_numpy(dtype=object)
        self.captions = _user_captions(manifest) if captions == "user" else None
        n = len(manifest)
        self.status = np.zeros(n, np.uint8)
        self.digest = np.zeros(n, "S32")  # SHA-256 of each file, once known
        self.feature = np.zeros(n, "S32")  # the same, joined by the user's caption
        self.size, self.mtime = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
        self.errors: dict[int, tuple[str, str]] = {}
        self.failed: dict[bytes, tuple[str, str]] = {}  # by feature: copies of a failed image fail with it
        self.stored: set[bytes] = set()  # features that an earlier run left in the store
        self.added: set[bytes] = set()  # features of this run, in the store or on their way there
        self.failures = 0
        self.first_error: Exception | None = None
        self.todo = self._plan(missing, retry_errors)

    def relative(self, row: int) -> str:
        """Path of a row as the store notes it."""
        path = store.relative_path(self.paths[row], self.root)
        return path if path != self.paths[row] else store.relative_path(os.path.abspath(path), self.root)

    def _feature_of(self, row: int, digest: bytes) -> bytes:
        caption = None if self.captions is None else self.captions[row]
        return digest if caption is None else hashlib.sha256(digest + caption.encode()).digest()

    def is_done(self, row: int, digest: bytes) -> bool:
        """Whether the features of a row whose file has this SHA-256 are in the store or on their way."""
        feature = self._feature_of(row, digest)
        return feature in self.added or feature in self.stored

    def _identify(self, row: int, digest: bytes) -> bytes:
        self.digest[row] = digest
        self.feature[row] = feature = self._feature_of(row, digest)
        return feature

    # ---- what is there already

    def _plan(self, missing: str, retry_errors: bool) -> array[int]:
        """Find the rows whose file is known by path, size and time; only the others are ever opened."""
        known = KnownFiles(self.writer.folder, self.writer.records(), self.stored, retry_errors)
        todo = array("q")
        for row, path in enumerate(self.paths):
            if missing == "error" and self.captions is not None and self.captions[row] is None:
                self.errors[row] = ("caption", "has no caption; add one or pass missing='generate'")
                continue
            try:
                stat = os.stat(path)
            except (OSError, ValueError):
                todo.append(row)  # reading it will say what is wrong
                continue
            self.size[row], self.mtime[row] = stat.st_size, stat.st_mtime_ns
            name = self.relative(row)
            digest, error = known.find(name, stat.st_size, stat.st_mtime_ns)
            if error is not None:
                self._identify(row, digest)
                self.errors[row] = error
            elif digest and self.is_done(row, digest):
                self._identify(row, digest)
                self.status[row] = REUSED
            else:
                todo.append(row)
        return todo

    # ---- the loop

    def compute(self, engine: Engine, stop: StopSignal, flush_seconds: float, progress: bool) -> None:
        """Let an engine work; returns early, with everything on disk, when asked to stop."""
        work = engine.work(self)
        bar = tqdm(total=len(self.todo), unit="image", file=sys.stderr, disable=not progress or not self.todo)
        last = time.monotonic()
        try:
            while not stop.requested:
                count = next(work, None)
                if count is None:
                    break
                self._check_that_anything_works(at_least=8)
                if time.monotonic() - last > flush_seconds:
                    with self.profile("write"):
                        self.writer.write_shard()
                    last = time.monotonic()
                bar.update(count)
                if self.errors:
                    bar.set_postfix(errors=len(self.errors), refresh=False)
        finally:
            bar.close()
            try:
                work.close()
            finally:  # whatever ended the loop: features that were paid for are kept
                with self.profile("write"):
                    self.writer.flush()
        self._check_that_anything_works(at_least=1)

    def sort(self, items: list[Decoded]) -> list[Decoded]:
        """Note what reading found out; return the images that are new."""
        fresh = []
        for item in items:
            self.size[item.row], self.mtime[item.row] = item.file_size, item.mtime_ns
            feature = self._identify(item.row, item.digest) if item.digest else b""
            if item.reason:
                self._fail(item, item.stage, item.reason, item.error if item.stage in OURS else None)
                if self.on_error == "raise":
                    raise item.error if isinstance(item.error, InputError) else InputError(item.reason)
            elif feature in self.added:
                self.status[item.row] = COPY
            elif feature in self.stored:
                self.status[item.row] = REUSED
            else:
                self.added.add(feature)
                item.caption = None if self.captions is None else self.captions[item.row]
                fresh.append(item)
        return fresh

    def take(self, outcome: Outcome) -> None:
        """Note what the models made of images that :meth:`sort` found to be new."""
        for failure in outcome.failures:
            self._fail(failure.item, failure.stage, failure.reason, failure.error)
        for items, features in outcome.done:
            self._add(items, features)

    def _add(self, items: list[Decoded], features: Features) -> None:
        features.table = features.table.assign(
            **{
                store.FEATURE_ID: [self._feature_of(item.row, item.digest).hex() for item in items],
                schema.IMAGE_ID: [item.digest.hex() for item in items],
                schema.PATH: [self.relative(item.row) for item in items],
                store.FILE_SIZE: [item.file_size for item in items],
                store.MTIME_NS: [item.mtime_ns for item in items],
            }
        )
        with self.profile("write"):
            if not (self.status == COMPUTED).any():
                # from here on the store is unfinished, and a reader can see what is to come; in this order:
                # cut short between the two, it must not look finished
                self.writer.write_run(complete=False)
                self.writer.write_tables(*self.tables())
            self.status[[item.row for item in items]] = COMPUTED
            self.writer.add(features)

    def _fail(self, item: Decoded, stage: str, reason: str, error: Exception | None) -> None:
        self.errors[item.row] = (stage, reason)
        if item.digest and stage != "read":  # what was short while it was read may do for a copy
            self.failed[self._feature_of(item.row, item.digest)] = (stage, reason)
        if error is not None:  # of our code or a model, not of a file
            self.failures += 1
            self.first_error = self.first_error or error

    def _check_that_anything_works(self, at_least: int) -> None:
        """Some images may upset a model; if all do, it is not the images: show the error itself."""
        if self.first_error is not None and self.failures >= at_least and not self.status.any():
            raise self.first_error

    # ---- the end

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """The manifest with the feature row of each file, and the files without."""
        for row in np.flatnonzero(np.isin(self.feature, list(self.failed))) if self.failed else ():
            self.errors.setdefault(int(row), self.failed[self.feature[row : row + 1].tobytes()])
        self._contradictions()
        own = (schema.IMAGE_ID, store.FEATURE_ID, store.FILE_SIZE, store.MTIME_NS, "stage", "reason")
        given = self.manifest.drop(columns=[c for c in own if c in self.manifest])
        bad = np.zeros(len(given), bool)
        bad[list(self.errors)] = True
        known = self.digest != b""
        has_features = (self.status > 0) & ~bad
        parts = []
        for start in range(0, len(given), 65536):  # the texts of a million rows are never in memory at once
            rows = range(start, min(start + 65536, len(given)))
            span = slice(rows.start, rows.stop)
            table = _to_arrow(given.iloc[span].assign(**{schema.PATH: [self.relative(i) for i in rows]}))
            table = table.append_column(schema.IMAGE_ID, _hex(self.digest[span], known[span]))
            table = table.append_column(store.FEATURE_ID, _hex(self.feature[span], has_features[span]))
            table = table.append_column(store.FILE_SIZE, pa.array(self.size[span]))
            parts.append(table.append_column(store.MTIME_NS, pa.array(self.mtime[span])))
        manifest = pa.concat_tables(parts, promote_options="permissive")
        failed = sorted(self.errors)
        errors = manifest.take(pa.array(failed, pa.int64())).drop_columns([store.FEATURE_ID])
        for i, name in enumerate(("stage", "reason")):
            errors = errors.append_column(
                name, pa.array([self.errors[row][i] for row in failed], pa.string())
            )
        return manifest, errors

    def _contradictions(self) -> None:
        """Files of one content that are labelled real here and fake there: none of them can be used."""
        if schema.LABEL not in self.manifest:
            return
        label = self.manifest[schema.LABEL].astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)
        rows = np.flatnonzero((self.digest != b"") & ~np.isnan(label))
        _, group = np.unique(self.digest[rows], return_inverse=True)
        low = np.full(group.max(initial=-1) + 1, np.inf)
        high = -low
        np.minimum.at(low, group, label[rows])
        np.maximum.at(high, group, label[rows])
        for number in np.flatnonzero(low < high):
            same = rows[group == number]
            for row in same:
                if row in self.errors:  # what keeps it from being used at all comes first
                    continue
                other = next(r for r in same if label[r] != label[row])
                names = [schema.LABEL_NAMES.get(int(label[r]), f"{label[r]:g}") for r in (row, other)]
                self.errors[int(row)] = (
                    "label",
                    f"{self.relative(row)}: labelled {names[0]}, but {self.relative(other)} has the same "
                    f"content and is labelled {names[1]}; correct one label or drop both rows",
                )


def _user_captions(manifest: pd.DataFrame) -> np.ndarray:
    column = manifest[schema.CAPTION] if schema.CAPTION in manifest else [None] * len(manifest)
    return np.array([None if pd.isna(c) or not str(c).strip() else str(c) for c in column], dtype=object)


def _hex(digests: np.ndarray, valid: np.ndarray) -> pa.Array:
    raw = digests.tobytes()  # with the zero bytes at the end that numpy's own items lose
    texts = [raw[32 * i : 32 * i + 32].hex() if ok else None for i, ok in enumerate(valid)]
    return pa.array(texts, pa.string())


def _to_arrow(table: pd.DataFrame) -> pa.Table:
    try:
        return pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        problem = f"a column of the manifest mixes kinds of values ({error})"
        raise InputError(f"{problem}; make it one kind") from error
    except UnicodeEncodeError as error:
        raise InputError(f"the manifest has the text {error.object!r}, which is not UTF-8") from error


JOURNAL_FILE = "decoding.json"  # names the images being decoded, so that one that kills the process is known
JOURNAL_ROWS = 256
CPU_BATCH, GPU_BATCH = 32, 256


class LocalEngine:
    """Runs the models in this process.

    Parameters
    ----------
    components : Components
    decode : DecodeConfig
    transform : callable, optional
    batch_size : int, optional
        Default 32 on a CPU, 256 on a GPU.
    """

    def __init__(
        self,
        components: Components,
        decode: DecodeConfig,
        transform: Callable[..., Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.components, self.decode, self.transform = components, decode, transform
        on_gpu = not str(getattr(components.encoder, "device", "cpu")).startswith("cpu")
        self.batch_size = batch_size or (GPU_BATCH if on_gpu else CPU_BATCH)
        self.prefetch = decode.prefetch if decode.prefetch is not None else (2 if on_gpu else 0)

    def work(self, job: Extraction) -> Generator[int, None, None]:
        """See :class:`itemkit.extraction.Engine`."""
        journal = job.writer.folder / JOURNAL_FILE
        suspects = _suspects(job, journal)
        runner = Runner(Stages(self.components, job.profile), self.batch_size, job.on_error)
        reader = ImageReader(self.decode, job.is_done, self.transform, self.components.encoder.preprocess)

        def read(row: int) -> Decoded:
            return reader.read(row, job.paths[row], job.relative(row), row in suspects)

        source = batches(
            _journalled(job, journal), read, lambda: runner.batch_size, self.decode, self.prefetch
        )
        interrupted = False
        with contextlib.closing(reader):
            try:
                while True:
                    with job.profile("decode"):
                        items = next(source, None)
                    if items is None:
                        break
                    fresh = job.sort(items)
                    if fresh:
                        job.take(runner.run(fresh))
                    job.batch_size = runner.batch_size
                    yield len(items)
            except KeyboardInterrupt as error:  # of the second Ctrl-C, perhaps because an image hangs
                interrupted = True
                with contextlib.suppress(KeyboardInterrupt):
                    source.throw(error)  # where close() would wait for that image
                raise
            finally:
                source.close()
                # never reached by a process that a decoder takes down: then the journal stays and tells
                if not interrupted:
                    journal.unlink(missing_ok=True)


def _suspects(job: Extraction, journal: Path) -> set[int]:
    """Images at hand when an earlier run died: decoded in a process of their own."""
    try:
        names = set(json.loads(journal.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()
    return {row for row in job.todo if job.relative(row) in names}


def _journalled(job: Extraction, journal: Path) -> Iterator[int]:
    """The rows to do; before a row is handed out, the journal on disk names it."""
    for i, row in enumerate(job.todo):
        if i % JOURNAL_ROWS == 0:
            # two spans, because the end of the previous one is still being decoded
            names = [job.relative(r) for r in job.todo[max(0, i - JOURNAL_ROWS) : i + JOURNAL_ROWS]]
            write_quickly(journal, json.dumps(names))
        yield row


PACKAGES = ("torch", "open_clip_torch", "transformers", "spacy", "numpy", "pandas", "pyarrow", "pillow")


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did; ``str(report)`` is the line shown at its end.

    Attributes
    ----------
    out : Path
        The feature store.
    n : int
        Rows of the manifest; each is one of the following.
    reused, computed, copies, errors : int
        Images with features from an earlier run; computed now; same content as an image computed now; without
        features (see ``errors.parquet``).
    left : int
        Images not reached, because the run was stopped.
    seconds : float
        Without loading the models.
    stages : dict
        Seconds per stage.
    batch_size : int
        At the end: halved each time memory ran out.
    captions : dict
        How many captions the encoder cut, see ``pipeline.user_captions.count_cut``.
    """

    out: Path
    n: int
    reused: int
    computed: int
    copies: int
    errors: int
    left: int
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    batch_size: int = 0
    captions: dict[str, Any] = field(default_factory=dict)

    @property
    def images_per_s(self) -> float:
        """Images computed per second."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        parts = [f"{self.computed} computed"]
        if self.copies:
            parts.append(f"{self.copies} copies of them")
        how = "--retry-errors also tries those known to be damaged"
        where = f" (see {self.out / store.ERRORS_FILE}; {how})" if self.errors else ""
        parts.append(f"{self.errors} errors{where}")
        if self.left:
            parts.append(f"{self.left} left to do")
        line = f"{self.n} images: {self.reused} reused, {', '.join(parts)}; {self.seconds:.1f} s"
        if self.computed:
            busy = {name: s for name, s in self.stages.items() if s > 0.005 * self.seconds}
            shares = ", ".join(f"{name} {s / self.seconds:.0%}" for name, s in busy.items())
            line += f", {self.images_per_s:.1f} images/s ({shares})"
        return "\n".join(filter(None, [line, told(self.captions)]))


def extract(
    manifest: pd.DataFrame,
    out: str | Path,
    components: Components | Preset | str = "mini",
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
    on_error: str = "row",
    retry_errors: bool = False,
    progress: bool = True,
    config: dict | None = None,
    engine: str = "local",
    ray: RayOptions | None = None,
) -> ExtractReport:
    """Compute the features of all images of a manifest that the store does not hold yet.

    Parameters
    ----------
    manifest : DataFrame
        With ``path`` and, where known, ``label, generator, source, split, caption``. A path may come more
        than once (with several captions); files of equal content share their features.
    out : path
        The feature store; made if missing, continued if made with the same models and options.
    components : Components, Preset or str
        The models, a preset, or the name of one.
    device : str
        For a preset.
    captions : {"generate", "user"}
        From the captioner, or from the manifest's ``caption`` column, cleaned by
        ``captions.cleaning.clean_caption``; the original stays as ``caption_posted`` where it changed.
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
        Threads, look-ahead, isolation.
    on_error : {"row", "raise"}
        An unusable image becomes a row in ``errors.parquet``, or ends the run.
    retry_errors : bool
        Try images again that were found unusable before and have not changed since.
    progress : bool
        Progress bar and closing line on stderr.
    config : dict, optional
        Noted in ``run.json`` for the reader, e.g. the preset's options; does not decide what is reused.
    engine : {"local", "ray"}
        Run the models in this process, or in the workers of a Ray cluster (a preset is needed for that, as
        the workers load the models themselves). The store is the same.
    ray : RayOptions, optional
        How many workers, and where; see :mod:`itemkit.engine_ray`.

    Returns
    -------
    ExtractReport

    Raises
    ------
    InputError
        The manifest is unusable.
    StoreError
        The folder is no store, was made otherwise, is in use, or cannot be written; what was finished is
        intact.
    KeyboardInterrupt
        After Ctrl-C, once everything computed is on disk.
    """
    manifest = _checked(manifest, captions, missing, limit)
    if captions not in ("generate", "user") or missing not in ("raise", "generate", "error"):
        raise InputError(
            f"got captions={captions!r}, missing={missing!r}; expected 'generate' or 'user', and for missing "
            "'raise', 'generate' or 'error'"
        )
    decode = decode or DecodeConfig()
    if on_error not in ("row", "raise"):
        raise InputError(f"got on_error={on_error!r}; choose 'row' or 'raise'")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"got batch_size={batch_size}; give at least 1, or None for the device's default")
    if engine not in ("local", "ray"):
        raise InputError(f"got engine={engine!r}; choose 'local' or 'ray'")
    if isinstance(components, str):
        from itemkit.presets import get_preset

        components = get_preset(components)
    if config is None and hasattr(components, "record"):
        config = components.record()
    chosen: Engine
    if engine == "ray":
        from itemkit.engine_ray import RayEngine, RayOptions, builder_of

        build = builder_of(components, device)
        chosen = RayEngine(build, ray or RayOptions(), decode, transform, batch_size)
        models = chosen.describe()
    else:
        models = components.build(device) if hasattr(components, "build") else components
        chosen = LocalEngine(models, decode, transform, batch_size)
    started = time.perf_counter()
    if models.captioner is None and (captions == "generate" or missing == "generate"):
        raise InputError("there is no captioner to make captions with; give one, or pass captions='user'")
    raise_malloc_thresholds()
    run = _run_head(manifest, Path(out), models, captions, transform, decode, config)
    with StoreWriter(out, run, shard_size) as writer, StopSignal() as stop:
        job = Extraction(manifest, writer, captions, missing, on_error, retry_errors)
        job.compute(chosen, stop, flush_seconds, progress)
        report = _finish(job, started, stop.requested is not None)
        if progress:
            print(report, file=sys.stderr, flush=True)
        if stop.requested is not None:
            print(
                f"stopped; everything computed so far is in {out}. Run the same command again to go on",
                file=sys.stderr,
                flush=True,
            )
            stop.leave()
    return report


def _checked(manifest: pd.DataFrame, captions: str, missing: str, limit: int | None) -> pd.DataFrame:
    if schema.PATH not in manifest:
        raise InputError(f"the manifest has no column '{schema.PATH}', only {list(manifest.columns)}")
    if limit is not None:
        if limit < 1:
            raise InputError(f"got limit={limit}; give a number of images of at least 1")
        manifest = manifest.iloc[:limit]
    if not len(manifest):
        raise InputError("the manifest has no rows; nothing to extract")
    if manifest[schema.PATH].isna().any():
        row = int(np.flatnonzero(manifest[schema.PATH].isna())[0])
        raise InputError(f"row {row} of the manifest has no path; give one or drop the row")
    manifest = manifest.assign(**{schema.PATH: _paths(manifest[schema.PATH])})
    if schema.LABEL in manifest:
        _check_labels(manifest[schema.LABEL])
    if captions == "user":
        manifest = with_clean_captions(manifest)
        nothing = pd.Series(pd.NA, manifest.index)
        column = manifest[schema.CAPTION] if schema.CAPTION in manifest else nothing
        without = column.isna() | (column.astype("string").str.strip() == "")
        if without.any() and missing == "raise":
            first = manifest[schema.PATH][without].iloc[0]
            raise InputError(
                f"{int(without.sum())} of {len(manifest)} images have no caption; first: {first}. Add it "
                "(one of links, mentions and emoji only counts as none), or pass missing='generate' (the "
                "captioner fills in) or missing='error' (an error row for each)"
            )
    return manifest.reset_index(drop=True)


def _paths(column: pd.Series) -> list[str]:
    """Paths as text that a store can hold."""
    paths = [os.fspath(path) if isinstance(path, os.PathLike) else path for path in column]
    for row, path in enumerate(paths):
        if not isinstance(path, str):
            kind = type(path).__name__
            raise InputError(f"row {row} of the manifest has {path!r} ({kind}) as its path; expected a text")
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"row {row} of the manifest has the path {path!r}, which is not UTF-8 and cannot be noted in "
                "a store; rename the file or drop the row"
            ) from None
    return paths


def _check_labels(column: pd.Series) -> None:
    missing = column.isna().to_numpy()
    for row, label in enumerate(column):
        if not missing[row] and label not in (schema.REAL, schema.FAKE):
            raise InputError(
                f"row {row} of the manifest has the label {label!r}; expected {schema.REAL} for real, "
                f"{schema.FAKE} for fake or nothing (itemkit.manifest.read_manifest also takes words)"
            )


def _run_head(
    manifest: pd.DataFrame,
    out: Path,
    components: Components,
    captions: str,
    transform: Callable[..., Any] | None,
    decode: DecodeConfig,
    config: dict | None,
) -> dict:
    if transform is not None and not hasattr(transform, "fingerprint"):
        raise InputError(
            f"transform {transform!r} has no fingerprint(), which the cache needs to tell it apart"
        )
    parts = fingerprint(components, captions)
    parts["transform"] = None if transform is None else transform.fingerprint()
    parts["decode"] = decode.loader
    parts = json.loads(json.dumps(parts))  # as it will be read back: tuples become lists
    paths = [os.path.abspath(path) for path in manifest[schema.PATH]]
    return {
        "kind": store.KIND,
        "schema_version": schema.SCHEMA_VERSION,
        "complete": False,
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        "dim": int(components.encoder.dim),
        "root": store.portable_root(store.common_root(paths), out),
        "fingerprint": parts,
        "fingerprint_hash": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16],
        "config": config,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    versions = {"itemkit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _finish(job: Extraction, started: float, stopped: bool) -> ExtractReport:
    """Write manifest, errors and run.json; say what was done."""
    with job.profile("write"):
        manifest, errors = job.tables()
        good = np.ones(len(job.status), bool)
        good[list(job.errors)] = False
        reused, computed, copies = (int((good & (job.status == s)).sum()) for s in (REUSED, COMPUTED, COPY))
        left = len(good) - reused - computed - copies - len(job.errors)
        before, complete = job.writer.run["complete"], not stopped and not left
        if before and not complete:
            # before the tables: whatever cuts this short, nobody takes a part for the whole
            job.writer.write_run(complete=False)
        changed = job.writer.write_tables(manifest, errors)
    captions = count_cut(job.writer.folder, job.writer.run, job.feature[good])
    report = ExtractReport(
        out=job.writer.folder,
        n=len(good),
        reused=reused,
        computed=computed,
        copies=copies,
        errors=len(job.errors),
        left=left,
        seconds=time.perf_counter() - started,
        stages={name: round(job.profile.seconds[name], 3) for name in STAGES},
        batch_size=job.batch_size,
        captions=captions,
    )
    if changed or computed or job.writer.moved or complete != before:
        skipped = ("out", "captions")
        last = {key: value for key, value in dataclasses.asdict(report).items() if key not in skipped}
        last |= {"images_per_s": round(report.images_per_s, 2), "seconds": round(report.seconds, 2)}
        counts = {
            "images": report.n,
            "errors": report.errors,
            "features": len(job.stored) + int((job.status == COMPUTED).sum()),
            "shards": len(store.shard_files(job.writer.folder)),
        }
        job.writer.write_run(complete=complete, counts=counts, captions=captions, last_run=last)
    return report


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
        The new store, with the rows of all parts in their order. An image file that several parts hold is
        there once; where one part could not use it and another could, it has its features.

    Raises
    ------
    StoreError
        A part is no store, unfinished, or made otherwise than the first.
    InputError
        No parts, ``out`` is not empty, or two parts label the same content differently.
    """
    folders, out = [Path(part) for part in parts], Path(out)
    if not folders:
        raise InputError("merge_stores() was given no stores")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; give a new folder for the merged store")
    runs = [store.read_run(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if not run["complete"]:
            raise StoreError(f"the extraction into {folder} is not finished; run it again, then merge")
        if run["fingerprint"] != runs[0]["fingerprint"]:
            raise StoreError(f"{folder} was made with other models or options than {folders[0]}")
    bases = [str(store.store_root(folder, run)) for folder, run in zip(folders, runs, strict=True)]
    root = store.common_root([os.path.join(base, "x") for base in bases])

    def moved(table: pa.Table, base: str) -> pa.Table:
        whole = [os.path.normpath(os.path.join(base, path)) for path in table[schema.PATH].to_pylist()]
        paths = pa.array([store.relative_path(path, str(root)) for path in whole], pa.string())
        return table.set_column(table.column_names.index(schema.PATH), schema.PATH, paths)

    both = []
    for name in (MANIFEST_FILE, ERRORS_FILE):
        tables = [moved(store.read_shard(f / name), b) for f, b in zip(folders, bases, strict=True)]
        both.append(pa.concat_tables(tables, promote_options="permissive"))
    _refuse_contradictions(both[0].to_pandas(), folders)
    manifest, errors = _each_once(*both)
    (out / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    # first and unfinished: whatever stops the copying, nobody takes what is there for the whole
    run = {**runs[0], "complete": False, "root": store.portable_root(root, out)}
    run |= {"captions": {}, "last_run": None}  # what was there told of the first part alone
    write_json(out / RUN_FILE, run)
    copied: set[str] = set()
    number = 0
    for folder, base in zip(folders, bases, strict=True):
        for path in store.shard_files(folder):
            shard = moved(store.read_shard(path), base)
            ids = shard[store.FEATURE_ID].to_pylist()
            shard = shard.filter(pa.array([one not in copied for one in ids], pa.bool_()))
            copied.update(ids)
            if len(shard):
                write_table(out / SHARD_FOLDER / f"part-{number:06d}.parquet", shard)
                number += 1
    write_table(out / MANIFEST_FILE, manifest)
    write_table(out / ERRORS_FILE, errors)
    counts = {"images": len(manifest), "errors": len(errors), "features": len(copied), "shards": number}
    used = [bytes.fromhex(one) for one in manifest[store.FEATURE_ID].to_pylist() if one]
    captions = count_cut(out, run, np.array(used, "S32"))
    write_json(out / RUN_FILE, {**run, "complete": True, "counts": counts, "captions": captions})
    return out


def _each_once(manifest: pa.Table, errors: pa.Table) -> tuple[pa.Table, pa.Table]:
    """One row for each image file and caption, in the order given: the one with features, if any has them.

    Only a label that contradicts another file's comes before that: it would if all were extracted at once.
    """
    names, failed = _keys(manifest), _keys(errors)
    contradicted = errors["stage"].to_pandas() == "label"
    has_features = manifest[store.FEATURE_ID].to_pandas().notna()
    rank = np.select([names.isin(failed[contradicted]) & ~has_features, has_features], [0, 1], 2)
    kept = _first_of_each(names, rank)
    done = set(names[kept & has_features])
    kept_errors = _first_of_each(failed, ~contradicted) & ~failed.isin(done)
    return manifest.filter(pa.array(kept)), errors.filter(pa.array(kept_errors))


def _keys(table: pa.Table) -> pd.Series:
    paths = table[schema.PATH].to_pandas()
    if schema.CAPTION not in table.column_names:
        return paths
    return paths + "\n" + table[schema.CAPTION].to_pandas().fillna("").astype(str)


def _first_of_each(keys: pd.Series, rank: np.ndarray | pd.Series) -> pd.Series:
    """Mark the row of lowest rank among those of one key, the first of them where several have it."""
    order = np.argsort(np.asarray(rank), kind="stable")
    return ~keys.iloc[order].duplicated().sort_index()


def _refuse_contradictions(manifest: pd.DataFrame, folders: Sequence[Path]) -> None:
    if schema.LABEL not in manifest:
        return
    known = manifest[manifest[schema.LABEL].notna() & manifest[store.FEATURE_ID].notna()]
    labels = known.groupby(schema.IMAGE_ID)[schema.LABEL].nunique()
    if (labels > 1).any():
        same = known[known[schema.IMAGE_ID] == labels.index[labels > 1][0]]
        names = ", ".join(f"{r.path} ({r.label})" for r in same.itertuples())
        raise InputError(
            f"files of the same content have different labels in the {len(folders)} stores: {names}; correct "
            "the manifests, extract again (nothing is computed twice), then merge"
        )
