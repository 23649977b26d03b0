"""Manifest in, feature store out: batched, cached by content, interruptible anywhere.

`Job` plans: it lists what the store knows, without a model, a lock or a write. A `Worker` makes whole shards
of the rest, here or in a Ray cluster. `Job` then notes what became of every image.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from itemkit import __version__, schema, store
from itemkit._files import folder_lock, remove_leftovers
from itemkit.decode import DecodeConfig, Decoded, Reader, Task, batches, reason_of
from itemkit.errors import InputError, ItemkitError, StoreError
from itemkit.features import ARRAYS, IMAGE_ARRAYS, OBJECT_ARRAYS, Features, concat_features
from itemkit.images import ImageError, read_bytes
from itemkit.models import Models, differences
from itemkit.store import ERRORS_FILE, FEATURE_ID, FILE_SIZE, MANIFEST_FILE, MTIME_NS, REASON, RUN_FILE, STAGE
from itemkit.text import count, printable

if TYPE_CHECKING:
    from itemkit.engine_ray import RayOptions
    from itemkit.presets import Preset

CPU_BATCH, GPU_BATCH = 32, 256
PACKAGES = ("torch", "open_clip_torch", "transformers", "spacy", "numpy", "pandas", "pyarrow", "pillow")
REUSED, COMPUTED, COPY = 1, 2, 3
POSTED = "caption_posted"  # column of the manifest and of features: the caption as it came
MANY = 64  # so many images in a row on which one model fails: it is not the images


# ---------------------------------------------------------------------------------------------- the worker


@dataclass(slots=True)
class Result:
    """What became of one row of the manifest; status 0 means that it has no features."""

    row: int
    digest: bytes = b""  # SHA-256 of the file, empty if it could not be read
    feature: bytes = b""
    size: int = -1
    mtime_ns: int = -1
    status: int = 0
    tokens: int = 0
    stage: str = ""
    reason: str = ""
    error: Exception | None = None  # of a model or of our own code, not of a file


class Worker:
    """Turns image files into whole shards of a store; one per process.

    Parameters
    ----------
    folder : Path
        The store.
    run : dict
        Its ``run.json``.
    models : Models
    stored : sorted bytes array, dtype S32
        Features that are in the store already.
    options : WorkerOptions
    """

    def __init__(
        self, folder: Path, run: dict, models: Models, stored: np.ndarray, options: WorkerOptions
    ) -> None:
        from itemkit.steps import Steps

        loaded = json.loads(json.dumps(models.fingerprint(run["fingerprint"]["captions"])))
        if wrong := differences(run["fingerprint"], loaded, ignore=("transform", "decode")):
            raise ItemkitError(f"the models that were loaded are not those of the plan: {wrong[0]}")
        raise_malloc_thresholds()
        self.folder, self.run_head, self.options, self._stored = folder, run, options, stored
        self.steps = Steps(models)
        on_gpu = not str(getattr(models.encoder, "device", "cpu")).startswith("cpu")
        self.batch_size = options.batch_size or (GPU_BATCH if on_gpu else CPU_BATCH)
        prefetch = options.decode.prefetch
        self._prefetch = prefetch if prefetch is not None else (2 if on_gpu else 0)
        self._read = Reader(options.decode, self._is_done, options.transform, models.encoder.preprocess)
        self._added: set[bytes] = set()  # features of this worker, on disk or on their way there
        self._waiting: list[Features] = []
        self._pending: Future | None = None

    def run(self, tasks: Iterable[Task], number: int) -> Generator[list[Result], None, None]:
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
        with ThreadPoolExecutor(1, thread_name_prefix="itemkit-write") as writer:
            try:
                while True:
                    with clock("decode"):
                        items = next(source, None)
                    if items is None:
                        break
                    results = self._batch(items)
                    for item in items:
                        item.free()
                    full = sum(map(len, self._waiting)) >= self.options.shard_size
                    if full or time.monotonic() - last > self.options.flush_seconds:
                        with clock("write"):
                            number += self._write(writer, number)
                        last = time.monotonic()
                    yield results
            finally:
                source.close()
                with clock("write"):  # whatever ended the loop: features that were paid for are kept
                    self._write(writer, number)
                    self._settle()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per step so far."""
        return self.steps.clock.seconds

    def _write(self, writer: ThreadPoolExecutor, number: int) -> bool:
        """Begin to write what waits as one shard; the one before is finished first."""
        self._settle()
        parts, self._waiting = self._waiting, []
        if parts:
            what = (self.folder, number, concat_features(parts), self.run_head["fingerprint_hash"])
            self._pending = writer.submit(store.write_shard, *what)
        return bool(parts)

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _is_done(self, task: Task, digest: bytes) -> bool:
        feature = feature_of(task.caption, digest)
        return feature in self._added or contains(self._stored, feature)

    def _batch(self, items: list[Decoded]) -> list[Result]:
        results, fresh = {}, []
        for item in items:
            feature = feature_of(item.task.caption, item.digest) if item.digest else b""
            result = Result(item.task.row, item.digest, feature, item.file_size, item.mtime_ns)
            results[item.task.row] = result
            if item.reason:
                result.stage, result.reason = item.stage, item.reason
                if item.stage in ("transform", "preprocess"):  # our code, not a decoder on a user's file
                    result.error = item.error
            elif feature in self._added:
                result.status = COPY
            elif contains(self._stored, feature):
                result.status = REUSED
            else:
                self._added.add(feature)
                fresh.append(item)
        start = 0
        while start < len(fresh):
            # read once: it may be lower after the slice, and the rest is then cut smaller
            size = self.batch_size
            alone = self._models(fresh[start : start + size], results)
            if alone and self.batch_size < size:  # the others need not go slower for one that no size helps
                self._resize(size, "one image does not fit even alone")
            start += size
        return list(results.values())

    def _models(self, items: list[Decoded], results: dict[int, Result]) -> bool:
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
            stage, memory, kept = (
                self.steps.clock.current,
                is_out_of_memory(error),
                error.with_traceback(None),
            )
        else:
            self._take(items, features, results)
            return False
        if len(items) == 1:
            task = items[0].task
            result = results[task.row]
            reason = "memory ran out in this step with this image alone" if memory else reason_of(kept)
            result.stage, result.reason, result.error = stage, f"{task.name}: {reason}", kept
            return memory
        size = (len(items) + 1) // 2 if memory else 1
        if memory:
            free_memory()
            if size < self.batch_size:
                self._resize(size, f"out of memory in '{stage}'")
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        return any([self._models(part, results) for part in parts])  # all of them, not up to the first

    def _take(self, items: list[Decoded], features: Features, results: dict[int, Result]) -> None:
        bad = set(bad_rows(features).tolist())
        for i in sorted(bad):
            result = results[items[i].task.row]
            result.stage, result.reason = (
                "image",
                f"{items[i].task.name}: a model gave no finite embedding for it",
            )
            result.error = ItemkitError(
                "the models give no finite embeddings: this is not the images' fault. Ask the models with "
                "`itemkit doctor --deep`; try another device or precision"
            )
        good = [i for i in range(len(items)) if i not in bad]
        if not good:
            return
        features = features.select(np.array(good))
        done = [results[items[i].task.row] for i in good]
        features.table = features.table.assign(
            **{
                FEATURE_ID: [result.feature.hex() for result in done],
                schema.IMAGE_ID: [result.digest.hex() for result in done],
                schema.PATH: [items[i].task.name for i in good],
                FILE_SIZE: [result.size for result in done],
                MTIME_NS: [result.mtime_ns for result in done],
            }
        )
        for result, tokens in zip(done, features.table[schema.CAPTION_TOKENS], strict=True):
            result.status, result.tokens = COMPUTED, int(tokens)
        # as it is stored: half the memory while it waits
        half = {name: getattr(features, name).astype(np.float16) for name in ARRAYS}
        self._waiting.append(dataclasses.replace(features, **half))

    def _resize(self, size: int, why: str) -> None:
        tqdm.write(f"{why}: batch size {self.batch_size} -> {size}", file=sys.stderr)
        self.batch_size = size


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker works; nothing of it but the transform and the decoding changes the numbers."""

    decode: DecodeConfig
    transform: Callable[..., Any] | None = None
    batch_size: int | None = None
    shard_size: int = 4096
    flush_seconds: float = 120.0


def feature_of(caption: str | None, digest: bytes) -> bytes:
    """Key of an image's features: its content, joined by the user's caption where one is used."""
    return digest if caption is None else hashlib.sha256(digest + caption.encode()).digest()


def contains(ids: np.ndarray, one: bytes) -> bool:
    """Whether a sorted array of 32-byte ids holds one."""
    at = int(np.searchsorted(ids, np.bytes_(one)))
    return at < len(ids) and ids[at : at + 1].tobytes() == one


def bad_rows(features: Features) -> np.ndarray:
    """Rows with an embedding that is not finite or not of unit length: a model broke down on that image."""

    def off(name: str) -> np.ndarray:
        return ~(np.abs(np.linalg.norm(getattr(features, name).astype(np.float32), axis=1) - 1) < 1e-2)

    bad = np.logical_or.reduce([off(name) for name in IMAGE_ARRAYS])
    np.logical_or.at(bad, features.owner, np.logical_or.reduce([off(name) for name in OBJECT_ARRAYS]))
    return np.flatnonzero(bad)


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


def free_memory() -> None:
    """Give back what a failed batch held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


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


class Known:
    """What a store knows of image files and features: about 100 bytes for each, in sorted arrays.

    Parameters
    ----------
    folder : Path
        The store; it need not be there.
    run : dict
        Of the run that asks.
    retry_errors : bool
        Take files that could not be decoded as unknown.
    """

    def __init__(self, folder: Path, run: dict, retry_errors: bool) -> None:
        self.damaged: list[store.DamagedError] = []
        self.run: dict = {}
        self.manifest = self.errors = pa.table({schema.PATH: pa.array([], pa.string())})
        try:
            self.run = store.read_run(folder) if (folder / RUN_FILE).exists() else {}
        except store.DamagedError as error:
            self.damaged.append(error)
        if wrong := differences(self.run.get("fingerprint", run["fingerprint"]), run["fingerprint"]):
            shown = "; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else "")
            raise StoreError(
                f"{folder} was extracted otherwise ({shown}). Its features do not mix with these: give "
                "another folder, or delete that one first"
            )
        columns = [FEATURE_ID, schema.IMAGE_ID, *store.FILE_COLUMNS, schema.CAPTION_TOKENS]
        tables = []
        for path in store.shard_files(folder):
            try:
                tables.append(store.read_shard(path, columns, run).select(columns))
            except store.DamagedError as error:
                self.damaged.append(error)
        if self.run.get("checksums"):
            for name in (MANIFEST_FILE, ERRORS_FILE):
                try:
                    setattr(self, name.partition(".")[0], store.read_state(folder, name, self.run))
                except store.DamagedError as error:
                    self.damaged.append(error)
        keys, digests, features, tokens = [], [], [], []
        for table in tables:
            features.append(_ids(table[FEATURE_ID]))
            tokens.append(table[schema.CAPTION_TOKENS].to_numpy())
        # the manifest also knows the copies, which have no row in a shard
        if self.manifest.num_columns > 1:
            tables.append(self.manifest.filter(pc.is_valid(self.manifest[schema.IMAGE_ID])))
        for table in tables:
            columns = [table[name].to_pylist() for name in store.FILE_COLUMNS]
            keys.append(np.array([_key(*values) for values in zip(*columns, strict=True)], "S16"))
            digests.append(_ids(table[schema.IMAGE_ID]))
        self._keys, self._digests = _sorted(keys, digests, "S16", "S32")
        self.features, self._tokens = _sorted(features, tokens, "S32", "i4")
        self.unread: set[str] = set()  # names of files that could not be read when a run tried last
        self._errors: dict[bytes, tuple[bytes, tuple[str, str]]] = {}
        if self.errors.num_columns > 1:
            read = self.errors.filter(pc.equal(self.errors[STAGE], "read"))
            self.unread = set(read[schema.PATH].to_pylist())
        if not retry_errors and self.errors.num_columns > 1:
            # only what lies in the file itself will be so again; a model's or the disk's trouble may be over
            for row in self.errors.filter(pc.equal(self.errors[STAGE], "decode")).to_pylist():
                key = _key(*(row[name] for name in store.FILE_COLUMNS))
                self._errors[key] = (bytes.fromhex(row[schema.IMAGE_ID]), (row[STAGE], row[REASON]))

    def find(self, name: str, size: int, mtime_ns: int) -> tuple[bytes, tuple[str, str] | None]:
        """SHA-256 of an unchanged file (empty if it is not known), and why it could not be decoded."""
        key = _key(name, size, mtime_ns)
        if key in self._errors:
            return self._errors[key]
        at = int(np.searchsorted(self._keys, np.bytes_(key)))
        if at < len(self._keys) and self._keys[at : at + 1].tobytes() == key:
            return self._digests[at : at + 1].tobytes(), None
        return b"", None

    def tokens(self, feature: bytes) -> int:
        """Length of the caption of a stored feature."""
        return int(self._tokens[np.searchsorted(self.features, np.bytes_(feature))])


def _key(name: str, size: int, mtime_ns: int) -> bytes:
    return hashlib.blake2b(f"{name}|{size}|{mtime_ns}".encode(), digest_size=16).digest()


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(column.to_pylist())), "S32")


def _sorted(keys: list, values: list, *kinds: str) -> tuple[np.ndarray, np.ndarray]:
    key, value = (
        np.concatenate([np.zeros(0, kind), *x]) for x, kind in zip((keys, values), kinds, strict=True)
    )
    order = np.argsort(key, kind="stable")
    return key[order], value[order]


class Job:
    """What is to be done, and what became of every row: some 300 bytes for each, never an embedding.

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
        self.known = Known(folder, run, retry_errors)
        kept = ("created", "root", "complete", "checksums")
        self.run = run | {key: self.known.run[key] for key in kept if key in self.known.run}
        self.paths = manifest[schema.PATH].tolist()
        # the images lie elsewhere than the store has noted
        self.moved = bool(self.known.run) and not store.store_root(folder, self.run).is_dir()
        if self.moved or not self.known.run:
            whole = (store.absolute(path) for path in self.paths if store.utf8(path) == path)
            self.run["root"] = store.portable_root(store.common_root(whole), folder)
        self.root = str(store.store_root(folder, self.run))
        self.names = [store.stored_name(path, self.root) for path in self.paths]
        captions = manifest[schema.CAPTION].tolist() if schema.CAPTION in manifest else [None] * len(manifest)
        by_user = run["fingerprint"]["captions"] == "user"
        self.captions = [None if not by_user or pd.isna(c) or not c.strip() else c for c in captions]
        n = len(manifest)
        self.status = np.zeros(n, np.uint8)
        self.digest = np.zeros(n, "S32")  # SHA-256 of each file, once known
        self.feature = np.zeros(n, "S32")  # the same, joined by the user's caption
        self.size, self.mtime = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
        self.tokens = np.zeros(n, np.int32)
        self.errors: dict[int, tuple[str, str]] = {}
        self.todo = array("q")  # rows
        self._failed: dict[bytes, tuple[str, str]] = {}  # by feature: copies of a failed image fail with it
        self._in_a_row = self._errors_of_models = 0
        self._plan(missing)

    def _plan(self, missing: str) -> None:
        """Find the rows whose file is known by path, size and time; only the others are ever opened."""
        unread = self.known.unread
        for row, (path, name) in enumerate(zip(self.paths, self.names, strict=True)):
            caption = self.captions[row]
            if missing == "error" and self.run["fingerprint"]["captions"] == "user" and caption is None:
                self.errors[row] = ("caption", f"{name}: no caption; add one or pass missing='generate'")
                continue
            if store.utf8(path) != path:
                self.errors[row] = ("path", f"{name}: its name is not UTF-8 and cannot be stored; rename it")
                continue
            try:
                if name in unread:
                    read_bytes(path)
                stat = os.stat(path)
                self.size[row], self.mtime[row] = stat.st_size, stat.st_mtime_ns
            except (OSError, ValueError):
                self.errors[row] = self._unreadable(path, name)
                continue
            digest, error = self.known.find(name, int(self.size[row]), int(self.mtime[row]))
            feature = feature_of(caption, digest) if digest else b""
            self.digest[row], self.feature[row] = digest, feature
            if error is not None:
                self.errors[row] = error
            elif digest and contains(self.known.features, feature):
                self.status[row], self.tokens[row] = REUSED, self.known.tokens(feature)
            else:
                self.todo.append(row)

    def tasks(self, rows: Iterable[int]) -> Iterator[Task]:
        """Rows of ``todo`` as a worker takes them."""
        for row in rows:
            yield Task(row, os.path.abspath(self.paths[row]), self.names[row], self.captions[row])

    @staticmethod
    def _unreadable(path: str, name: str) -> tuple[str, str]:
        try:
            read_bytes(path)
        except ImageError as error:
            return "read", reason_of(error, path, name)
        return "read", f"{name}: cannot be read; run the same command again"

    @property
    def settled(self) -> bool:
        """Whether the store holds all of this already, as it stands here: nothing to compute or to note."""
        return not (self.todo or self.moved or self.known.damaged) and not self._tables()[2]

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
        if self.todo or not self.known.run:
            self.run["complete"] = False
            store.write_run(self.folder, self.run)

    @property
    def next_shard(self) -> int:
        """Number of the next shard."""
        return max((int(path.stem.split("-")[1]) for path in store.shard_files(self.folder)), default=-1) + 1

    def note(self, results: Sequence[Result]) -> None:
        """Note what became of some rows.

        Raises
        ------
        ItemkitError
            The models fail on everything: it is not the images.
        """
        for result in results:
            row = result.row
            self.size[row], self.mtime[row] = result.size, result.mtime_ns
            self.digest[row], self.feature[row] = result.digest, result.feature
            self.status[row], self.tokens[row] = result.status, result.tokens
            if result.reason:
                self.errors[row] = (result.stage, printable(result.reason))
                if result.digest and result.stage not in ("read", "memory"):  # those may do for a copy
                    self._failed[result.feature] = self.errors[row]
            if result.error is not None:
                self._errors_of_models += 1
                self._in_a_row += 1
                computed = bool((self.status > 0).any())
                if self._in_a_row >= (MANY if computed else 8):
                    self._give_up(result)
                self._last = result
            elif result.status == COMPUTED:
                self._in_a_row = 0

    def check_that_anything_worked(self) -> None:
        """Some images may upset a model; if all do, it is not the images."""
        if self._errors_of_models and not (self.status > 0).any():
            self._give_up(self._last)

    def _give_up(self, result: Result) -> None:
        if isinstance(result.error, ItemkitError):
            raise result.error
        raise ItemkitError(
            f"the step '{result.stage}' failed on {count(self._in_a_row, 'image')} in a row "
            f"({reason_of(result.error)}), so this is not the images. Mend it, then run the same command "
            "again: what was computed before is kept"
        ) from result.error

    # ---- the end

    def _tables(self) -> tuple[pa.Table, pa.Table, bool]:
        """Manifest and errors of the whole store, and whether they are others than those that lie there.

        A store keeps the rows of all its runs. What this run's manifest says of a file, or of a file of the
        same content, stands; rows of other files stay as they are.
        """
        for row in np.flatnonzero(np.isin(self.feature, list(self._failed))) if self._failed else ():
            self.errors.setdefault(int(row), self._failed[self.feature[row : row + 1].tobytes()])
        own = (schema.PATH, schema.IMAGE_ID, FEATURE_ID, FILE_SIZE, MTIME_NS, STAGE, REASON)
        table = _to_arrow(self.manifest.drop(columns=[c for c in own if c in self.manifest]))
        known = np.array(self.digest != b"")
        found = {
            schema.PATH: pa.array(self.names, pa.string()),
            schema.IMAGE_ID: _hex(self.digest, known),
            FILE_SIZE: pa.array(self.size),
            MTIME_NS: pa.array(self.mtime),
        }
        table = pa.table(found | {name: table[name] for name in table.column_names})
        if schema.LABEL in table.column_names:
            labels = table.select([schema.PATH, schema.IMAGE_ID, schema.LABEL]).to_pandas()
            for row, reason in store.contradictions(labels).items():
                self.errors.setdefault(row, ("label", reason))
        bad = np.zeros(len(self.names), bool)
        bad[list(self.errors)] = True
        features = _hex(self.feature, (self.status > 0) & ~bad)
        manifest = table.append_column(FEATURE_ID, features)
        rows = sorted(self.errors)
        errors = table.take(pa.array(rows, pa.int64()))
        for i, name in enumerate((STAGE, REASON)):
            errors = errors.append_column(name, pa.array([self.errors[row][i] for row in rows], pa.string()))
        changed = False
        both = []
        for new, old in ((manifest, self.known.manifest), (errors, self.known.errors)):
            mine = pc.is_in(old[schema.PATH], found[schema.PATH])
            here, rest = old.filter(mine), old.filter(pc.invert(mine))
            if {schema.LABEL, schema.IMAGE_ID} <= set(rest.column_names) & set(table.column_names):
                rest = rest.filter(pa.array(~_relabelled(rest, table)))
            changed |= len(here) + len(rest) < len(old) or not _same_rows(here, new)
            both.append(store.stack([new, rest]) if len(rest) else new)
        manifest, errors = both
        # a run that was cut short just before its last write
        changed |= manifest[FEATURE_ID].null_count == len(errors) and not self.run["complete"]
        return manifest, errors, changed

    def finish(self) -> None:
        """Write manifest, errors and run.json."""
        manifest, errors, _ = self._tables()
        self.run["complete"] = manifest[FEATURE_ID].null_count == len(errors)
        self.run["counts"] = {
            "images": len(manifest),
            "errors": len(errors),
            "shards": len(store.shard_files(self.folder)),
        }
        store.write_state(self.folder, self.run, manifest, errors)

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
        long = np.flatnonzero(self.tokens > room)
        found = {"cut": len(np.unique(self.feature[long])), "room": int(room)}
        if len(long):
            found |= {"longest": int(self.tokens.max()), "first": self.names[long[0]]}
        return found


def _state(folder: Path) -> tuple:
    """What changes whenever a store changes."""
    with contextlib.suppress(OSError):
        stat = (folder / RUN_FILE).stat()
        return stat.st_mtime_ns, stat.st_size, [path.name for path in store.shard_files(folder)]
    return ()


def _hex(digests: np.ndarray, valid: np.ndarray) -> pa.Array:
    raw = digests.tobytes()  # with the zero bytes at the end that numpy's own items lose
    texts = [raw[32 * i : 32 * i + 32].hex() if ok else None for i, ok in enumerate(valid)]
    return pa.array(texts, pa.string())


def _relabelled(old: pa.Table, new: pa.Table) -> np.ndarray:
    """Rows of another run whose content has another label now."""
    frame = new.select([schema.IMAGE_ID, schema.LABEL]).to_pandas().dropna()
    label = frame.drop_duplicates(schema.IMAGE_ID).set_index(schema.IMAGE_ID)[schema.LABEL]
    before = old.select([schema.IMAGE_ID, schema.LABEL]).to_pandas()
    now = before[schema.IMAGE_ID].map(label)
    return (now.notna() & before[schema.LABEL].notna() & (now != before[schema.LABEL])).to_numpy(dtype=bool)


def _same_rows(old: pa.Table, new: pa.Table) -> bool:
    """Whether the rows of a run stand in the store already, in whatever order."""
    if len(old) != len(new):
        return False
    if not len(new):
        return True
    a, b = (store.stack([one, other.slice(0, 0)]) for one, other in ((old, new), (new, old)))
    order = [(name, "ascending") for name in (schema.PATH, schema.CAPTION) if name in a.column_names]
    return a.sort_by(order).equals(b.select(a.column_names).sort_by(order))


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
    stages : dict
        Seconds per step of the method; of workers, summed.
    batch_size : int
        At the end: halved each time memory ran out.
    captions : dict
        How many captions the encoder cut, see `Job.cut_captions`.
    reasons : dict
        Step to how many images failed there, and why the first of them did.
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
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def images_per_s(self) -> float:
        """Images computed per second."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        parts = [f"{self.reused:,} reused, {self.computed:,} computed"]
        parts += [count(self.copies, "copy of them" if self.copies == 1 else "copies of them")] * (
            self.copies > 0
        )
        parts.append(count(self.errors, "error"))
        parts += [f"{self.left:,} left to do"] * (self.left > 0)
        line = f"{count(self.n, 'image')}: {', '.join(parts)}; {self.seconds:.1f} s"
        if self.computed:
            busy = {name: s for name, s in self.stages.items() if s > 0.005 * self.seconds}
            shares = ", ".join(f"{name} {s / self.seconds:.0%}" for name, s in busy.items())
            line += f", {self.images_per_s:.1f} images/s ({shares})"
        return "\n".join([line, *self.notes()])

    def notes(self) -> list[str]:
        """What the user should know beyond the counts, a line each."""
        lines = []
        for stage, (n, first) in self.reasons.items():
            lines.append(f"{count(n, 'image')} without features (step '{stage}'), the first: {first}")
        if self.errors:
            again = (
                "; --retry-errors also tries those known to be damaged" if "decode" in self.reasons else ""
            )
            lines.append(f"all of them with their reasons: {self.out / ERRORS_FILE}{again}")
        if cut := self.captions.get("cut"):
            lines.append(
                f"{count(cut, 'caption')} longer than the {self.captions['room']} tokens the encoder reads, "
                f"and cut there for it (longest {self.captions['longest']}, first: "
                f"{self.captions['first']}); objects were taken from whole captions"
            )
        return lines


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
    report = manifest.attrs.get("report")
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
    run = _run_head(parts, config, report)
    run["dim"] = int(parts["encoder"].get("dim") or models.encoder.dim)

    def plan() -> Job:
        return Job(manifest, folder, run, missing, retry_errors)

    job, clock, size, stopped = plan(), {}, 0, None
    if not job.settled:
        with folder_lock(folder):
            if job.seen != _state(folder):  # somebody else was quicker
                job = plan()
            if not job.settled:
                job.open()
                clock, size, stopped = _compute(job, models, device, options, cluster, progress)
                job.run["captions"] = job.cut_captions()
                done = _report(job, started, clock, size)
                last = dataclasses.asdict(done)
                job.run["last_run"] = {key: last[key] for key in last if key not in ("out", "captions")}
                job.finish()
    done = _report(job, started, clock, size)
    if progress:
        print(done, file=sys.stderr, flush=True)
    elif done.errors:
        warnings.warn("; ".join(done.notes()), stacklevel=2)
    if stopped is not None:
        print(f"stopped; everything computed so far is in {out}. Run the same command again to go on",
              file=sys.stderr, flush=True)  # fmt: skip
        stopped.leave()
    return done


def _compute(
    job: Job, models: Models | Preset, device: str, options: WorkerOptions, cluster: Any, progress: bool
) -> tuple[dict[str, float], int, StopSignal | None]:
    """Let the workers work; returns early, with everything on disk, when asked to stop."""
    if not job.todo:
        return {}, 0, None
    if cluster is None:
        worker = Worker(job.folder, job.run, build_models(models, device), job.known.features, options)
        source = worker.run(job.tasks(job.todo), job.next_shard)
    else:
        worker = cluster
        source = cluster.work(job)
    bar = tqdm(total=len(job.todo), unit="image", file=sys.stderr, disable=not progress)
    with StopSignal() as stop, contextlib.closing(bar), contextlib.closing(source):
        for results in source:
            job.note(results)
            bar.update(len(results))
            if job.errors:
                bar.set_postfix(errors=len(job.errors), refresh=False)
            if stop.requested:
                break
    job.check_that_anything_worked()
    return worker.seconds, worker.batch_size, stop if stop.requested else None


def build_models(models: Models | Preset, device: str) -> Models:
    """The models themselves, loaded if they are not yet."""
    return models.build(device) if hasattr(models, "build") else models


def fingerprint_of(models: Models | Preset, device: str, captions: str) -> dict[str, Any]:
    """What the models are; nothing is loaded for it."""
    return models.fingerprint(captions, device) if hasattr(models, "build") else models.fingerprint(captions)


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


def _report(job: Job, started: float, seconds: dict[str, float], batch_size: int) -> ExtractReport:
    good = np.ones(len(job.status), bool)
    good[list(job.errors)] = False
    reused, computed, copies = (int((good & (job.status == s)).sum()) for s in (REUSED, COMPUTED, COPY))
    reasons: dict[str, tuple[int, str]] = {}
    for row in sorted(job.errors):
        stage, reason = job.errors[row]
        n, first = reasons.get(stage, (0, reason))
        reasons[stage] = (n + 1, first)
    return ExtractReport(
        out=job.folder,
        n=len(good),
        reused=reused,
        computed=computed,
        copies=copies,
        errors=len(job.errors),
        left=len(good) - reused - computed - copies - len(job.errors),
        seconds=round(time.perf_counter() - started, 3),
        stages={name: round(s, 3) for name, s in seconds.items()},
        batch_size=batch_size,
        captions=job.cut_captions(),
        reasons=reasons,
    )
