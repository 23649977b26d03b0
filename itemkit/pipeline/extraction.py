"""One run of the extraction: what is there already, what is to be computed, what became of every row."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from array import array
from collections.abc import Generator
from typing import Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from itemkit import schema, store
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.pipeline.decode import Decoded
from itemkit.pipeline.known import KnownFiles
from itemkit.pipeline.runner import Outcome
from itemkit.pipeline.stages import Profile
from itemkit.pipeline.system import StopSignal
from itemkit.pipeline.writer import StoreWriter

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
