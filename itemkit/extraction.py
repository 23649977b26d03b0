"""Manifest in, feature store out: batched, cached by content, interruptible anywhere.

`Job` plans: it lists what the store knows, without a model, a lock or a write. A `Worker` makes whole shards
of the rest, here or in a Ray cluster. `Job` then notes what became of every row.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from itemkit import __version__, schema, store
from itemkit._files import LOCK_FILE, folder_lock, remove_leftovers
from itemkit.captions import clean_caption
from itemkit.decode import DecodeConfig, Item, Reader, batches, feature_of, reason_of
from itemkit.devices import is_out_of_memory
from itemkit.errors import InputError, ItemkitError, StoreError
from itemkit.features import Features, bad_rows, concat_features
from itemkit.images import read_bytes
from itemkit.models import Models, differences
from itemkit.store import ERRORS_FILE, FEATURE_ID, FILE_KEY, MANIFEST_FILE, REASON, RUN_FILE, STAGE
from itemkit.text import count, printable

if TYPE_CHECKING:
    from itemkit.engine_ray import RayCluster, RayOptions
    from itemkit.presets import Preset

CPU_BATCH, GPU_BATCH = 32, 512
FLUSH_SECONDS = 120.0  # a shard is written after this time even if it is small
PACKAGES = ("torch", "open_clip_torch", "transformers", "spacy", "numpy", "pandas", "pyarrow", "pillow")
POSTED = "caption_posted"  # column of the manifest and of features: the caption as it came
NO_DEVICE = "AcceleratorError|CUDA error|cuDNN error"  # after which every later call fails as well
MANY = 64  # so many images in a row on which a model fails: it is not the images
NOT_FINITE = "no finite embedding came of it; ask `itemkit doctor --deep`, try another device or precision"
# what becomes of a row, see `ExtractReport`
STATUSES = ("reused", "computed", "copies", "errors", "left")
# what the plan, an `Item` and the outcome know of a row beside its name
FILE = [*FILE_KEY[1:], schema.IMAGE_ID, FEATURE_ID, "tokens", "status", STAGE, REASON]
# columns of the store's manifest; the user's own are of any kind
_TEXTS = dict.fromkeys([*schema.MANIFEST_COLUMNS, schema.IMAGE_ID, FEATURE_ID, STAGE, REASON], pa.string())
KINDS = _TEXTS | {schema.LABEL: pa.int8(), **dict.fromkeys(FILE_KEY[1:], pa.int64())}


# ---------------------------------------------------------------------------------------------- the worker


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker works; nothing of it but the transform and the decoding changes the numbers."""

    device: str
    decode: DecodeConfig
    transform: Callable[..., Any] | None = None
    batch_size: int | None = None
    shard_size: int = 4096


class Worker:
    """Turns image files into whole shards of a store, which holds ``stored`` features; one per process."""

    def __init__(
        self, folder: Path, run: dict, models: Models | Preset, stored: Iterable[str], options: WorkerOptions
    ) -> None:
        import torch

        from itemkit.steps import Steps

        models = models.build(options.device) if hasattr(models, "build") else models
        loaded = json.loads(json.dumps(models.fingerprint(run["fingerprint"]["captions"])))
        if wrong := differences(run["fingerprint"], loaded, ignore=("transform", "decode")):
            raise ItemkitError(f"the models that were loaded are not those of the plan: {wrong[0]}")
        raise_malloc_thresholds()
        self.folder, self.fingerprint, self.options = folder, run["fingerprint_hash"], options
        self.steps = Steps(models)
        self.seconds = self.steps.clock.seconds
        device = torch.device(getattr(models.encoder, "device", "cpu"))
        # for what is done with a batch while the next one is in the GPU's usual queue
        self._queue = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.batch_size = options.batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
        # feature to the status of another image that has the same one
        self._known = dict.fromkeys(stored, "reused")
        captioner, localiser = models.captioner, models.localiser
        look = getattr(captioner, "preprocess", None)
        read = captioner is not None and look is None
        self._reader = Reader(
            options.decode.beside(device.type),
            self.steps.prepare,
            options.transform,
            self._known,
            look,
            keep=read or bool(getattr(localiser, "needs_images", localiser is not None)),
        )
        self._waiting: list[Features] = []

    def run(self, items: Iterable[Item]) -> Generator[list[Item], None, None]:
        """Deal with items batch by batch; the shards of what was computed are on disk when it ends."""
        lag = int(self._queue is not None)  # of finishing a batch behind starting on one
        source = batches(items, self._reader, lambda: self.batch_size, lag)
        under_way: deque[tuple[list[Item], Iterator[None]]] = deque()
        last = time.monotonic()

        def decoded() -> list[Item] | None:
            with self.steps.clock("decode"):
                return next(source, None)

        try:
            for batch in iter(decoded, None):
                fresh = []
                for item in batch:
                    if not item.reason:
                        item.status = self._known.setdefault(item.feature_id, "computed")
                        if item.status == "computed":
                            self._known[item.feature_id] = "copies"
                            fresh.append(item)
                under_way.append((batch, self._compute(fresh)))
                next(under_way[-1][1], None)
                while len(under_way) > (lag if batch else 0):
                    done, rest = under_way.popleft()
                    for _ in rest:
                        pass
                    full = sum(map(len, self._waiting)) >= self.options.shard_size
                    if full or time.monotonic() - last > FLUSH_SECONDS:
                        self._write()
                        last = time.monotonic()
                    yield done
        finally:
            source.close()
            self._write()  # whatever ended the loop: features that were paid for are kept

    def _write(self) -> None:
        """Write what waits as one shard, if anything does."""
        parts, self._waiting = self._waiting, []
        if any(map(len, parts)):
            with self.steps.clock("write"):
                store.write_shard(self.folder, concat_features(parts), self.fingerprint)

    def _compute(self, items: list[Item]) -> Iterator[None]:
        """Run the models; where they fail, on halves, down to the image to blame.

        It pauses when a GPU has been set to work on the images, so that it can be given the next ones too.
        """
        import torch

        if not items:
            return
        images: list[Any] = [item.image for item in items]
        shown = None if self._reader.look is None else [item.shown for item in items]
        given = [item.caption for item in items], [item.pixels for item in items], shown
        try:
            steps = self.steps.in_two(images, *given)
            next(steps)
            ready = self._queue and torch.cuda.current_stream(self._queue.device).record_event()
            yield
            with torch.cuda.stream(self._queue):
                if self._queue is not None:
                    self._queue.wait_event(ready)
                features = next(steps)
        except Exception as error:
            # without its trace, which would keep the batch's tensors alive
            failed = error.with_traceback(None)
        else:
            self._take(items, features)
            return
        short = is_out_of_memory(failed)
        if not short and re.search(NO_DEVICE, f"{type(failed).__name__}: {failed}"):
            raise ItemkitError(
                f"the device is broken ({reason_of(failed)}); what was computed is kept: run the same again"
            ) from failed
        stage = self.steps.clock.current
        if len(items) == 1:
            why = "memory ran out in this step with this image alone" if short else reason_of(failed)
            items[0].fail(stage, f"{items[0].name}: {why}", model=True)
            return
        if short:
            gc.collect()
            torch.cuda.empty_cache()  # nothing happens where there is none
        half = (len(items) + 1) // 2
        yield from self._compute(items[:half])
        yield from self._compute(items[half:])
        # the others need not go slower for one that no size helps
        if short and half < self.batch_size and not any(item.model for item in items):
            tqdm.write(f"out of memory in '{stage}': batch size {self.batch_size} -> {half}", file=sys.stderr)
            self.batch_size = half

    def _take(self, items: list[Item], features: Features) -> None:
        bad = bad_rows(features)
        for row in np.flatnonzero(bad):
            items[row].fail("image", f"{items[row].name}: {NOT_FINITE}", model=True)
        done, features = [item for item in items if not item.reason], features.select(~bad)
        for item, tokens in zip(done, features.table[schema.CAPTION_TOKENS], strict=True):
            item.tokens = int(tokens)
        names = (FEATURE_ID, schema.IMAGE_ID, *FILE_KEY[1:])
        own = {name: [getattr(item, name) for item in done] for name in names}
        features.table = features.table.assign(**own, **{schema.PATH: [item.name for item in done]})
        self._waiting.append(features)


def raise_malloc_thresholds() -> None:
    """Let glibc keep the buffers of a batch; not those of huge images, nor in an arena for each thread."""
    if platform.libc_ver()[0] == "glibc":
        # numbers from malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
        for option, value in ((-3, 128 << 20), (-1, 512 << 20), (-2, 64 << 20), (-8, 2)):
            ctypes.CDLL(None).mallopt(option, value)


# ---------------------------------------------------------------------------------------------- the plan


class Job:
    """What is to be done in a store, and what became of every row; making one writes nothing."""

    def __init__(
        self, manifest: pd.DataFrame, folder: Path, run: dict, missing: str, retry_errors: bool
    ) -> None:
        self.manifest, self.folder, self.damaged = manifest, folder, list[store.DamagedError]()
        self.state = state_of(folder)
        found = (folder / RUN_FILE).exists()
        before = (self._unless_damaged(store.read_run, folder) if found else None) or {}
        if wrong := differences(before.get("fingerprint", run["fingerprint"]), run["fingerprint"]):
            raise StoreError(
                f"{folder} was extracted otherwise ({'; '.join(wrong[:4])}). Its features do not "
                "mix with these: give another folder, or delete that one first"
            )
        self.run = run | {k: before[k] for k in ("created", "root", "complete", "checksums") if k in before}
        self.paths = [os.path.abspath(path) for path in manifest[schema.PATH]]
        # a store that is new, or whose images lie elsewhere than it has noted
        self.placed = bool(before) and os.path.isdir(store.store_root(folder, before))
        if not self.placed:
            self.run["root"] = store.portable_root(self.paths, folder)
        root = store.store_root(folder, self.run)
        self.names = [store.stored_name(path, root) for path in self.paths]
        by_user = run["fingerprint"]["captions"] == "user"
        self.captions = manifest[schema.CAPTION].tolist() if by_user else [None] * len(manifest)
        columns = [FEATURE_ID, schema.IMAGE_ID, schema.CAPTION_TOKENS, *FILE_KEY]
        shards = [
            self._unless_damaged(store.read_shard, path, columns, run["fingerprint_hash"])
            for path in store.shard_files(folder)
        ]
        empty = pa.schema([(name, store.SHARD_COLUMNS[name]) for name in columns]).empty_table()
        stored = pa.concat_tables([empty, *filter(None, shards)]).to_pandas()
        self.tokens = stored.drop_duplicates(FEATURE_ID).set_index(FEATURE_ID)[schema.CAPTION_TOKENS]
        names = (MANIFEST_FILE, ERRORS_FILE) if before.get("checksums") else ()
        tables = [self._unless_damaged(store.read_state, folder, name, before) for name in names]
        empty = pa.schema(list(KINDS.items())).empty_table()
        self.before = tables[0] if tables and tables[0] else empty
        known = pa.concat_tables([empty, self.before], promote_options="permissive")
        self.known = known.to_pandas(integer_object_nulls=True)
        self.plan = self._plan(stored, by_user and missing == "error", retry_errors)
        self.todo = self.plan.index[self.plan["status"] == "left"]
        self.noted: list[tuple] = []
        self.worked = bool((self.plan["status"] == "reused").any())
        self._failed: list[Item] = []  # in a row
        self.settled = False
        if not len(self.todo):
            self.conclude()

    def _unless_damaged(self, read: Callable[..., Any], *given: Any) -> Any:
        try:
            return read(*given)
        except store.DamagedError as error:
            self.damaged.append(error)
            return None

    def _plan(self, stored: pd.DataFrame, caption_needed: bool, retry_errors: bool) -> pd.DataFrame:
        """What is known of each row by path, size and time of its file; only other files are ever opened."""
        unread = set(self.known[schema.PATH][self.known[STAGE] == "read"])
        found = []
        for path, name, caption in zip(self.paths, self.names, self.captions, strict=True):
            size, mtime, stage, reason = -1, -1, None, None
            with contextlib.suppress(OSError, ValueError):
                stat = os.stat(path)
                size, mtime = stat.st_size, stat.st_mtime_ns
            if caption_needed and caption is None:
                stage, reason = "caption", f"{name}: no caption; add one or pass missing='generate'"
            elif store.utf8(path) != path:
                stage, reason = "path", f"{name}: its name is not UTF-8 and cannot be stored; rename it"
            elif size < 0 or name in unread:
                try:
                    read_bytes(path)
                except InputError as error:
                    stage, reason = "read", reason_of(error, path, name)
            found.append((name, size, mtime, stage, reason and printable(reason), None))
        rows = pd.DataFrame(found, columns=[*FILE_KEY, STAGE, REASON, schema.IMAGE_ID])
        # only what lies in the file itself will be so again, a model's or the disk's trouble may be over;
        # but that could not be noted where nothing can be written
        stage = self.known[STAGE]
        final = stage.eq("decode") if os.access(self.folder, os.W_OK) else stage.ne("label")
        known = self.known.copy()
        known.loc[~final | retry_errors, [STAGE, REASON]] = None
        # the manifest also knows the copies, which have no row in a shard
        files = pd.concat([stored, known]).groupby(FILE_KEY)[[schema.IMAGE_ID, STAGE, REASON]].first()
        rows = rows.fillna(rows[FILE_KEY].join(files, on=FILE_KEY)).fillna("")
        rows[FEATURE_ID] = list(map(feature_of, self.captions, rows[schema.IMAGE_ID]))
        tokens = rows[FEATURE_ID].map(self.tokens)
        status = np.select([rows[REASON] != "", tokens.notna()], ["errors", "reused"], "left")
        return rows.assign(tokens=tokens.fillna(0).astype(np.int64), status=status.astype(object))

    def open(self) -> None:
        """Make the folder a store that is under way; damaged files are set aside. Needs the lock."""
        shards = self.folder / store.SHARD_FOLDER
        own = {LOCK_FILE, shards.name, MANIFEST_FILE, ERRORS_FILE}
        remove_leftovers(self.folder)
        names = {path.name for path in self.folder.iterdir() if path.suffix != ".damaged"}
        if RUN_FILE not in names and (others := sorted(names - own)):
            raise StoreError(
                f"{self.folder} holds other files ({printable(', '.join(others[:3]))}) and no {RUN_FILE}: "
                "give a new or empty folder for the features"
            )
        shards.mkdir(exist_ok=True)
        remove_leftovers(shards)
        for error in self.damaged:
            warnings.warn(f"{error.path} is damaged: set aside as {error.path.name}.damaged", stacklevel=2)
            with contextlib.suppress(FileNotFoundError):
                os.replace(error.path, error.path.with_name(error.path.name + ".damaged"))
        # whatever cuts this short, nobody takes a part for the whole
        if len(self.todo) or RUN_FILE not in names:
            self.run["complete"] = False
            store.write_run(self.folder, self.run)

    def note(self, items: list[Item]) -> None:
        """Note what became of some rows."""
        for item in items:
            self.noted.append((item.row, *(getattr(item, name) for name in FILE)))
            if item.status == "computed":
                self.worked, self._failed = True, []
            elif item.model:
                self._failed.append(item)
        self.give_up_after(MANY if self.worked else 8)

    def give_up_after(self, many: int) -> None:
        """Some images may upset a model; if so many in a row do, it is not the images."""
        if len(self._failed) < many:
            return
        item = self._failed[-1]
        raise ItemkitError(
            f"the step '{item.stage}' failed on {count(len(self._failed), 'image')} in a row (the last: "
            f"{item.reason}). Mend it, then run the same command again: what was computed is kept"
        )

    def conclude(self) -> None:
        """Set ``rows`` (what became of each), ``table`` (the store's manifest), ``complete`` and ``settled``.

        A store keeps the rows of all its runs. What this run's manifest says of a file, or of a file of the
        same content, stands; rows of other files stay. A settled one holds all of this already.
        """
        rows = self.plan.copy()
        new = pd.DataFrame(self.noted, columns=["row", *FILE]).set_index("row")
        rows.loc[new.index, FILE] = new
        # an image that was not tried, as a copy of one that then failed, fails with it
        failed = rows[rows["status"] == "errors"].drop_duplicates(FEATURE_ID).set_index(FEATURE_ID)
        lost = rows["status"].eq("copies") & rows[FEATURE_ID].isin(failed.index)
        rows.loc[lost, [STAGE, REASON]] = failed.loc[rows[FEATURE_ID][lost], [STAGE, REASON]].to_numpy()
        given = self.manifest.reindex(columns=list(dict.fromkeys([*schema.MANIFEST_COLUMNS, *self.manifest])))
        wrong = contradictions(rows.assign(label=given[schema.LABEL]))
        rows.loc[wrong.index, STAGE], rows.loc[wrong.index, REASON] = "label", wrong
        rows.loc[rows[REASON] != "", "status"] = "errors"
        mine = rows.drop(columns=["tokens", "status"]).replace("", None)
        mine.loc[rows["status"].isin(("errors", "left")), FEATURE_ID] = None
        mine = mine.join(given.drop(columns=list(mine), errors="ignore")).astype(object)
        other = self.known[~self.known[schema.PATH].isin(mine[schema.PATH])].astype(object)
        label = mine.dropna(subset=[schema.IMAGE_ID, schema.LABEL]).drop_duplicates(schema.IMAGE_ID)
        label = other[schema.IMAGE_ID].map(label.set_index(schema.IMAGE_ID)[schema.LABEL])
        other = other[label.isna() | other[schema.LABEL].isna() | (label == other[schema.LABEL])]
        table = pd.concat([mine, other], ignore_index=True)[list(dict.fromkeys([*self.known, *mine]))]
        self.table = pa.table({store.utf8(str(n)): store.as_column(table[n], KINDS.get(n)) for n in table})
        self.rows = rows
        self.complete = self.table[FEATURE_ID].null_count + self.table[REASON].null_count == len(table)
        order = [(schema.PATH, "ascending"), (schema.CAPTION, "ascending")]
        same = self.table.sort_by(order).equals(self.before.sort_by(order))
        # cut short just before its last write, a store is complete and does not say so
        noted = self.placed and same and self.complete == self.run["complete"]
        self.settled = noted and not len(self.todo) and not self.damaged


def state_of(folder: Path) -> list[tuple]:
    """What every run changes in a store that has work to do."""
    files = [file for file in (folder / RUN_FILE, *store.shard_files(folder)) if file.exists()]
    return [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in files]


def contradictions(table: pd.DataFrame) -> pd.Series:
    """Reasons of files of one content that are labelled real here and fake there: none can be used."""
    known = table[table[schema.IMAGE_ID].ne("") & table[schema.LABEL].notna() & table[REASON].eq("")]
    wrong = known[known.groupby(schema.IMAGE_ID)[schema.LABEL].transform("nunique") > 1]
    wrong = wrong[[schema.PATH, schema.IMAGE_ID, schema.LABEL]]
    first = {(image_id, label): path for path, image_id, label in wrong[::-1].itertuples(index=False)}
    reasons = [
        printable(
            f"{path}: labelled {schema.LABEL_NAMES[label]}, but {first[image_id, 1 - label]} has the same "
            f"content and is labelled {schema.LABEL_NAMES[1 - label]}; correct one label or drop both rows"
        )
        for path, image_id, label in wrong.itertuples(index=False)
    ]
    return pd.Series(reasons, wrong.index, dtype=object)


# ---------------------------------------------------------------------------------------------- the run


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Signals that came: one lets the batch at hand finish, a second Ctrl-C stops at once."""
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        print("\nfinishing the batch at hand, then stopping (Ctrl-C again: now)", file=sys.stderr, flush=True)

    # Python allows it in the main thread alone
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did; ``str(report)`` is what is shown at its end."""

    n: int  # rows of the manifest; each is one of the following
    reused: int  # features of an earlier run
    computed: int
    copies: int  # same content as an image computed now
    errors: int  # without features, see errors.parquet
    left: int  # not reached, as the run was stopped
    seconds: float
    stages: dict[str, float]  # seconds per step of the method; of workers, summed
    notes: list[str]  # where and why images failed, captions that were cut

    def __str__(self) -> str:
        line = (
            f"{count(self.n, 'image')}: {self.reused:,} reused, {self.computed:,} computed, "
            f"{count(self.errors, 'error')}, {count(self.copies, 'duplicate')}, {self.left:,} left to do; "
            f"{self.seconds:.1f} s"
        )
        if self.computed:
            busy = {name: s for name, s in self.stages.items() if s > 0.005 * self.seconds}
            shares = ", ".join(f"{name} {s / self.seconds:.0%}" for name, s in busy.items())
            line += f", {self.computed / self.seconds:.1f} images/s ({shares})"
        return "\n".join([line, *self.notes])


def _report(job: Job, started: float, worker: RayCluster | Worker | None) -> ExtractReport:
    failed = job.rows[job.rows["status"] == "errors"]
    notes = [
        f"{count(len(rows), 'image')} without features (step '{stage}'), the first: {rows[REASON].iloc[0]}"
        for stage, rows in failed.groupby(STAGE, sort=False)
    ]
    if notes:
        again = "run it again to try what a model failed on, with --retry-errors also what was damaged"
        notes.append(f"with their reasons in {ERRORS_FILE}; {again}")
    room = (job.run["fingerprint"].get("encoder") or {}).get("context_length")
    long = job.rows[job.rows["tokens"] > (room or math.inf)]
    if len(long):
        notes.append(
            f"{count(long[FEATURE_ID].nunique(), 'caption')} longer than the {room} tokens the encoder "
            f"reads, and cut there for it (longest {long['tokens'].max()}, first: "
            f"{printable(long[schema.PATH].iloc[0])})"
        )
    return ExtractReport(
        n=len(job.rows),
        **job.rows["status"].value_counts().reindex(STATUSES, fill_value=0).to_dict(),
        seconds=time.perf_counter() - started,
        stages=dict(worker.seconds) if worker else {},
        notes=notes,
    )


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
    decode: DecodeConfig | None = None,
    retry_errors: bool = False,
    progress: bool = True,
    ray: RayOptions | None = None,
) -> ExtractReport:
    """Compute the features of the images that a store does not hold yet; with none, it is only read.

    Parameters
    ----------
    manifest : DataFrame
        With ``path`` and, where known, ``label, generator, source, split, caption``. A path may come more
        than once (with several captions); files of equal content share their features. It may be a part of
        what the store holds: rows of earlier runs stay.
    out : path
        The feature store; made if missing, continued if made with the same models and options.
    models : Models, Preset or str
        The models, a preset (for which ``device`` is meant), or the name of one.
    captions : {"generate", "user"}
        From the captioner, or from the manifest's ``caption`` column, cleaned by `captions.clean_caption`;
        the original stays as ``caption_posted`` where it changed.
    missing : {"raise", "generate", "error"}
        With ``captions="user"``, what to do about images without caption.
    transform : callable with ``fingerprint()``, optional
        ``(image, image_id) -> image`` applied after decoding, e.g. a perturbation; must be deterministic.
    batch_size : int, optional
        Default 32 on a CPU, 512 on a GPU; halved when memory runs out. Changes the numbers by rounding only.
    shard_size : int
        A shard is written after this many images, or two minutes; a killed run loses no more than that.
    decode, ray : DecodeConfig and RayOptions, optional
        How images are read; in which workers of a Ray cluster the models run, by default in this process.
    retry_errors : bool
        Try images again that were found unusable before and have not changed since.
    progress : bool
        Progress bar and closing lines on stderr. Without, images that failed are a warning.

    Raises
    ------
    InputError, StoreError, ItemkitError
        The manifest or an option is unusable; the folder is no store, was made otherwise, or cannot be
        written; the models fail on everything. As after Ctrl-C, what was computed before is kept.
    """
    if captions not in ("generate", "user") or missing not in ("raise", "generate", "error"):
        raise InputError(
            f"got captions={captions!r}, missing={missing!r}; captions are 'generate' or 'user', missing "
            "ones 'raise', 'generate' or 'error'"
        )
    if batch_size is not None and batch_size < 1:
        raise InputError(f"got batch_size={batch_size}; give at least 1, or None for the device's default")
    if transform is not None and not hasattr(transform, "fingerprint"):
        raise InputError(f"transform {transform!r} has no fingerprint(), by which the cache tells it apart")
    manifest = _checked(manifest, captions, missing)
    if isinstance(models, str):
        from itemkit.presets import get_preset

        models = get_preset(models)
    if models.captioner is None and (captions == "generate" or missing == "generate"):
        raise InputError("there is no captioner to make captions with; give one, or pass captions='user'")
    started, folder, came = time.perf_counter(), Path(out), list[int]()
    worker: RayCluster | Worker | None = None
    options = WorkerOptions(device, decode or DecodeConfig(), transform, batch_size, shard_size)
    parts = models.fingerprint(captions)
    side = options.decode.least_side
    parts["decode"] = None if side is None else {"least_side": side}
    parts["transform"] = None if transform is None else transform.fingerprint()
    parts = json.loads(json.dumps(parts))  # as it will be read back: tuples become lists
    run = {
        "kind": store.KIND,
        "schema_version": store.SCHEMA_VERSION,
        "complete": False,
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        "fingerprint": parts,
        "fingerprint_hash": store.fingerprint_hash(parts),
        "dim": int(parts["encoder"].get("dim") or models.encoder.dim),
        "config": models.record() if hasattr(models, "record") else None,
        "versions": {"itemkit": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "manifest": manifest.attrs.get("report"),
        "checksums": {},
    }
    job = Job(manifest, folder, run, missing, retry_errors)
    while not job.settled:
        with folder_lock(folder):
            if job.state != state_of(folder):  # another run was quicker
                job = Job(manifest, folder, run, missing, retry_errors)
                continue
            job.open()
            if len(job.todo):
                if ray is None:
                    worker = Worker(folder, job.run, models, job.tokens.index, options)
                else:
                    from itemkit.engine_ray import RayCluster

                    worker = RayCluster(folder, job.run, models, job.tokens.index, options, ray)
                came = _compute(job, worker, progress)
            store.write_state(folder, job.run | {"complete": job.complete}, job.table)
            break
    report = _report(job, started, worker)
    if progress:
        print(report, file=sys.stderr, flush=True)
    elif report.errors:
        warnings.warn("; ".join(report.notes), stacklevel=2)
    if came:
        note = f"stopped; everything computed so far is in {out}. Run the same command again to go on"
        print(note, file=sys.stderr, flush=True)
        raise KeyboardInterrupt if came[0] == signal.SIGINT else SystemExit(128 + came[0])
    return report


def _compute(job: Job, worker: RayCluster | Worker, progress: bool) -> list[int]:
    """Let the workers work; returns early, with everything on disk, when signals ask for it."""
    items = (Item(row, job.paths[row], job.names[row], job.captions[row]) for row in job.todo.tolist())
    bar = tqdm(total=len(job.todo), unit="image", file=sys.stderr, disable=not progress)
    with stop_signals() as came, bar, contextlib.closing(worker.run(items)) as source:
        for batch in source:
            job.note(batch)
            bar.update(len(batch))
            if came:
                break
    if not job.worked:
        job.give_up_after(1)
    job.conclude()
    return came


def _checked(manifest: pd.DataFrame, captions: str, missing: str) -> pd.DataFrame:
    """The manifest with paths as text, and the user's captions cleaned beside what was posted."""
    if schema.PATH not in manifest:
        raise InputError(f"the manifest has no column '{schema.PATH}', only {list(manifest.columns)}")
    if not len(manifest):
        raise InputError("the manifest has no rows; nothing to extract")
    manifest = manifest.reset_index(drop=True)
    for row, path in enumerate(manifest[schema.PATH]):
        if not (isinstance(path, str | os.PathLike) and str(path)):
            raise InputError(f"row {row} of the manifest has the path {path!r}; give a text or drop the row")
    manifest[schema.PATH] = pd.Series(map(os.fspath, manifest[schema.PATH]), dtype=object)
    if schema.LABEL in manifest:
        known = manifest[schema.LABEL].dropna()
        for row, label in known[~known.isin(schema.LABEL_NAMES)].items():
            raise InputError(
                f"row {row} of the manifest has the label {label!r}; give 0 for real, 1 for fake"
            )
    if captions != "user":
        return manifest
    given = manifest.get(schema.CAPTION, pd.Series(None, manifest.index)).astype(object)
    clean = given.map(lambda text: clean_caption(store.utf8(str(text))) or None, na_action="ignore")
    clean = clean.astype(object).where(clean.notna(), None)
    without, changed = clean.isna(), given.notna() & (given != clean)
    if without.any() and missing == "raise":
        raise InputError(
            f"{int(without.sum())} of {len(manifest)} images have no caption (or of links, mentions and "
            f"emoji only); first: {printable(manifest[schema.PATH][without].iloc[0])}. Add it, or pass "
            "missing='generate' (the captioner fills in) or missing='error' (an error row for each)"
        )
    manifest[schema.CAPTION] = clean
    return manifest.assign(**{POSTED: given.where(changed, None)}) if changed.any() else manifest
