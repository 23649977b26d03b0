"""Writing that survives a crash, and one writer per folder: for everything that keeps results on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from itemkit.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows: the lock falls back to asking whether the writer of the lock file still lives
    fcntl = None  # type: ignore[assignment]

_TMP = ".tmp-"


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is either whole or absent, whatever happens in between.

    Parameters
    ----------
    path : Path
        The final name; an existing file is replaced only when the new one is safely on disk.
    write : callable
        Gets an open binary file and fills it.

    Raises
    ------
    StoreError
        The disk is full or the folder cannot be written; the temporary file is removed, no other is touched.
    """
    tmp = path.with_name(f".{path.name}{_TMP}{os.getpid()}")
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise StoreError(explain_write_error(error, path)) from error


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    atomic_write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def write_quickly(path: Path, text: str) -> None:
    """Write a small note that may be lost in a power cut."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(explain_write_error(error, path)) from error


def _sync_folder(folder: Path) -> None:
    # the rename itself is only on disk once the folder is; not every system lets a folder be opened
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def explain_write_error(error: OSError, path: Path) -> str:
    """Turn an operating-system error met while writing into what happened and what to do."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return (
            f"the disk is full: could not write {path}. Everything written before is intact; "
            "free some space and run the same command again, it goes on where it stopped"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write into {path.parent} ({error.strerror}); choose a folder that you may write to"
    return f"could not write {path}: {error.strerror or error}. Everything written before is intact"


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files of runs that were killed while writing; return how many there were."""
    leftovers = [path for path in folder.glob(f".*{_TMP}*") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


class FolderLock:
    """One writer per folder.

    The operating system's file lock ends with the process that held it, however that process ended, so a
    killed run leaves nothing to clean up. Where the system has no such lock, the process number and the boot
    noted in the lock file decide whether its writer can still be alive.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: BinaryIO | None = None

    def __enter__(self) -> FolderLock:
        try:
            file = open(self.path, "a+b", buffering=0)  # held open as long as the lock
        except OSError as error:
            raise StoreError(explain_write_error(error, self.path)) from error
        holder = self._read(file)
        if not self._free(file, holder):
            file.close()
            raise StoreError(self._message(holder))
        self._file = file
        # keep the text of the lock current; a full disk is met and explained at the first real write
        with contextlib.suppress(OSError):
            file.seek(0)
            file.truncate()
            file.write(json.dumps(_whoami()).encode())
            file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            # emptied, not deleted: a run that opened it meanwhile must find the same file
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None

    @staticmethod
    def _read(file: BinaryIO) -> dict:
        file.seek(0)
        try:
            holder = json.loads(file.read().decode() or "{}")
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _free(self, file: BinaryIO, holder: dict) -> bool:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False
            except OSError:
                pass  # a file system without locks
        return not may_be_alive(holder)

    def _message(self, holder: dict) -> str:
        who = "process {pid} on {host}, since {since}".format_map(
            {"pid": "?", "host": "?", "since": "?"} | holder
        )
        return (
            f"another run is writing to {self.path.parent} ({who}). Wait for it to end, or give another "
            f"folder; if no such run exists any more, delete {self.path}"
        )


def may_be_alive(holder: dict) -> bool:
    """Whether the process described in a lock file could still be running."""
    if not holder.get("pid"):
        return False
    me = _whoami()
    if holder.get("host") != me["host"]:
        return True  # another machine on a shared disk: cannot be asked
    if holder.get("boot") != me["boot"]:
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    started = _process_start(int(holder["pid"]))
    return started is None or holder.get("started") in (None, started)


def _whoami() -> dict:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "started": _process_start(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Start of a process in clock ticks since boot: tells a living process from one with a reused number."""
    try:
        # the command's name may hold blanks and brackets, so count the fields after its closing bracket
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
