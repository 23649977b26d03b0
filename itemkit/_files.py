"""Writing that survives a crash, and one writer per folder: for everything that keeps results on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from itemkit.errors import StoreError

LOCK_FILE = ".lock"
_TMP = ".tmp-"


def atomic_write(path: Path, content: bytes | memoryview, sync: bool = True) -> None:
    """Write a buffer as a file that is either whole or absent; an old one is replaced only by a whole one.

    Without ``sync`` that holds for a killed process, not for a machine that loses its power: for thousands of
    small files, each of which would wait for the disk.
    """
    tmp = path.with_name(f".{path.name}{_TMP}{os.getpid()}")
    try:
        with open(tmp, "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(tmp, path)
        if not sync:
            return
        # the rename itself is only on disk once the folder is; not every system lets a folder be opened
        with contextlib.suppress(OSError):
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise StoreError(explain_write_error(error, path)) from error


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    atomic_write(path, (json.dumps(value, indent=1) + "\n").encode())


def explain_write_error(error: OSError, path: Path) -> str:
    """Turn an operating-system error met while writing into what happened and what to do."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return (
            f"the disk is full: could not write {path}. Everything written before is intact; free some "
            "space and run the same command again, it goes on where it stopped"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write into {path.parent} ({error.strerror}); choose a folder that you may write to"
    return f"could not write {path}: {error.strerror or error}. Everything written before is intact"


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of runs that were killed while writing."""
    for path in folder.glob(f".*{_TMP}*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One writer per folder: a second one waits until the first has ended, and says so.

    Where the operating system locks files, the lock ends with the process that held it, however that ended.
    """
    from filelock import FileLock, Timeout  # only here: a store that is merely read takes no lock

    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            advice = f"(Ctrl-C leaves). If there is none any more, delete {folder / LOCK_FILE}"
            note = f"another run is writing to {folder}: waiting until it ends {advice}"
            print(note, file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        raise StoreError(explain_write_error(error, folder / LOCK_FILE)) from error
    try:
        yield
    finally:
        lock.release()
