"""Files that an earlier run has met: recognised by path, size and time of change, without opening them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from itemkit import schema
from itemkit.store import ERRORS_FILE, FEATURE_ID, FILE_SIZE, MANIFEST_FILE, MTIME_NS

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
