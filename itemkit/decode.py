"""From files to batches of decoded images: many threads at once, in order, within a bound of memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Container, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from itemkit.devices import THREADS_VARIABLE
from itemkit.errors import ItemkitError
from itemkit.images import load_image, open_image, read_bytes
from itemkit.text import one_line, printable

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class DecodeConfig:
    """How image files become pixels in memory."""

    threads: int | None = None  # None: as `devices.set_threads` says, else one per processor
    prefetch: int | None = None  # batches decoded ahead of the models; None: 0 on a CPU (shared), else 2
    # Pixels that are being decoded or wait for the models, in all threads together: with 3 to 7 bytes each,
    # no folder of allowed images takes 2 GB. One larger image goes alone.
    max_pixels: int = 150_000_000
    # Decode a JPEG at 1/2, 1/4 or 1/8 while its shorter side keeps so many pixels: 2-4 times as fast for
    # photographs of a camera's size, but other pixels, so another store. Twice the encoder's input is enough.
    least_side: int | None = None

    def n_threads(self) -> int:
        """Number of decoding threads."""
        if asked := self.threads or int(os.environ.get(THREADS_VARIABLE) or 0):
            return max(1, asked)
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, min(32, own or 1))


@dataclass(frozen=True, slots=True)
class Task:
    """One row of a manifest that has to be read."""

    row: int
    path: str
    name: str  # of the file, in messages and in the store
    caption: str | None = None  # the user's


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Item:
    """One row on its way: its file, its pixels for the models, and what became of it.

    A ``reason`` says why it has no features; else ``status`` says where they come from, once that is known.
    """

    task: Task
    image_id: str = ""  # SHA-256 of the file; "" if it could not be read
    feature_id: str = ""  # the same, joined by the user's caption
    file_size: int = -1
    mtime_ns: int = -1
    status: str = ""
    tokens: int = 0  # of the caption
    stage: str = ""
    reason: str = ""
    error: Exception | None = None
    image: Image.Image | None = None
    pixels: Any = None  # the encoder's input
    free: Callable[[], None] = _nothing  # to be called when the models are done with it


def feature_of(caption: str | None, image_id: str) -> str:
    """Key of an image's features: its content, joined by the user's caption where one is used."""
    if caption is None or not image_id:
        return image_id
    return hashlib.sha256(bytes.fromhex(image_id) + caption.encode()).hexdigest()


class Reader:
    """Reads, identifies and decodes single images; safe to call from many threads.

    Parameters
    ----------
    config : DecodeConfig
    known : container of str
        Features that need not be made: their images are not decoded.
    transform : callable, optional
        ``(image, image_id) -> image``, e.g. a perturbation; must depend on its arguments alone.
    preprocess : callable, optional
        The encoder's preprocessing, so that it too runs in the decoding threads.
    """

    def __init__(
        self,
        config: DecodeConfig,
        known: Container[str] = (),
        transform: Callable[[Image.Image, str], Image.Image] | None = None,
        preprocess: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self._config, self._known = config, known
        self._transform, self._preprocess = transform, preprocess

    def __call__(self, task: Task, admit: Callable[[int], None] = lambda pixels: None) -> Item:
        """Read one file; what fails is said in the result, nothing is raised.

        Parameters
        ----------
        task : Task
        admit : callable
            Gets the number of pixels before any is decoded; returns when there is room for them.
        """
        out, shape = Item(task, stage="read"), ""
        try:
            # before the bytes: a file changed between the two is then noticed by the next run
            with contextlib.suppress(OSError, ValueError):  # read_bytes says it better
                stat = os.stat(task.path)
                out.file_size, out.mtime_ns = stat.st_size, stat.st_mtime_ns
            data = read_bytes(task.path)
            out.image_id = hashlib.sha256(data).hexdigest()
            out.feature_id = feature_of(task.caption, out.image_id)
            if out.feature_id in self._known:
                out.stage = ""
                return out
            out.stage = "decode"
            width, height = open_image(data, task.name).size
            shape = f" of {width:,} x {height:,} pixels"
            admit(width * height)
            image = load_image(data, name=task.name, least_side=self._config.least_side)
            if self._transform is not None:
                out.stage = "transform"
                image = self._transform(image, out.image_id)
            if self._preprocess is not None:
                out.stage = "preprocess"
                out.pixels = self._preprocess(image)
            out.image, out.stage = image, ""
        except MemoryError as error:
            # the machine's trouble, not the file's: never remembered as what the file is like
            out.stage, out.error = "memory", error
            out.reason = (
                f"{task.name}: memory ran out for this image{shape}; free some memory, or store the image "
                "smaller, and run the same command again"
            )
        except Exception as error:  # whatever a broken file makes a decoder raise is this file's problem
            out.reason, out.error = reason_of(error, task.path, task.name), error
        return out


def reason_of(error: BaseException, path: str = "", name: str = "") -> str:
    """Reason of an exception as one printable line for a table, in which a file is called by its name."""
    text = str(error) or type(error).__name__
    if not isinstance(error, (ItemkitError, OSError)):
        text = f"{type(error).__name__}: {text}"
    for there in filter(None, (path, printable(path))):
        text = text.replace(there, name)
    return one_line(text)


class _Closed(BaseException):
    """Ends a decoding thread that waits for room when nobody needs its image any more."""


class _Decoders:
    """Threads that decode tasks; hands the results out in order.

    Room is given in order, too: so what the consumer needs next never waits for what comes after it.
    """

    def __init__(
        self, tasks: Iterable[Task], read: Callable[..., Item], threads: int, max_pixels: int
    ) -> None:
        self._tasks, self._read = enumerate(tasks), read
        self._window, self._max_pixels = 2 * threads, max_pixels
        self._change = threading.Condition()
        self._done: dict[int, Item] = {}
        self._asked: dict[int, int] = {}  # pixels for which a task waits
        self._settled: set[int] = set()  # tasks after `_turn` that need no room (any more)
        self._started = self._next = self._turn = self._used = 0
        self._ended = self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(self._may_start)
                number, task = (-1, None) if self._closed or self._ended else next(self._tasks, (-1, None))
                if task is None:
                    self._ended = True
                    self._change.notify_all()
                    return
                self._started += 1
            room: list[int] = []
            try:
                item = self._read(task, partial(self._admit, number, room))
            except _Closed:
                return
            item.free = partial(self._free, item, room)
            with self._change:
                if item.image is None:
                    self._used -= sum(room)
                    room.clear()
                self._settle(number)
                self._done[number] = item

    def _may_start(self) -> bool:
        return self._closed or self._ended or self._started - self._next < self._window

    def _fits(self, pixels: int) -> bool:
        return not self._used or self._used + pixels <= self._max_pixels

    def _admit(self, number: int, room: list[int], pixels: int) -> None:
        with self._change:
            self._asked[number] = pixels
            self._change.notify_all()
            self._change.wait_for(lambda: self._closed or (self._turn == number and self._fits(pixels)))
            del self._asked[number]
            if self._closed:
                raise _Closed
            self._used += pixels
            room.append(pixels)
            self._settle(number)

    def _settle(self, number: int) -> None:
        if number >= self._turn:
            self._settled.add(number)
        while self._turn in self._settled:
            self._settled.remove(self._turn)
            self._turn += 1
        self._change.notify_all()

    def _free(self, item: Item, room: list[int]) -> None:
        item.image, item.pixels, item.free = None, None, _nothing
        with self._change:
            self._used -= sum(room)
            room.clear()
            self._change.notify_all()

    def take(self, wait: bool) -> Item | None:
        """The next image; None at the end, and without ``wait`` also where room must be made for it first."""

        def ready() -> bool:
            blocked = self._turn == self._next and not self._fits(self._asked.get(self._next, 0))
            return self._next in self._done or (self._ended and self._next >= self._started) or (
                blocked and not wait
            )  # fmt: skip

        with self._change:
            self._change.wait_for(ready)
            item = self._done.pop(self._next, None)
            if item is not None:
                self._next += 1
                self._change.notify_all()
            return item

    def close(self) -> None:
        """End the threads; one that hangs in a decoder is left behind."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        deadline = time.monotonic() + 1
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def batches(
    tasks: Iterable[Task],
    read: Callable[..., Item],
    batch_size: Callable[[], int],
    config: DecodeConfig,
    prefetch: int = 0,
) -> Generator[list[Item], None, None]:
    """Read tasks in order, in batches; the consumer calls ``free`` of each item it is done with.

    Parameters
    ----------
    tasks : iterable of Task
    read : callable
        A `Reader`.
    batch_size : callable
        Asked before each batch: how many images it may hold. One of large images is cut shorter.
    config : DecodeConfig
    prefetch : int
        Batches made ahead of the consumer, by a thread. With 0 a batch is decoded while the consumer waits:
        fastest on a CPU, where decoders and models want the same cores.
    """
    source = _in_order(tasks, read, batch_size, config)
    return _ahead(source, prefetch) if prefetch else source


def _in_order(
    tasks: Iterable[Task], read: Callable[..., Item], batch_size: Callable[[], int], config: DecodeConfig
) -> Generator[list[Item], None, None]:
    decoders = _Decoders(tasks, read, config.n_threads(), config.max_pixels)
    try:
        while True:
            batch: list[Item] = []
            images, size = 0, batch_size()
            while images < size and len(batch) < 8 * size:
                item = decoders.take(wait=not batch)
                if item is None:
                    break
                batch.append(item)
                images += item.image is not None
            if not batch:
                return
            short = [item for item in batch if item.stage == "memory"]
            if fine := [item for item in batch if item.stage != "memory"]:
                yield fine
            for item in short:  # once more, one by one: a neighbour may have taken what it needed
                yield [read(item.task)]
    finally:
        decoders.close()


def _ahead(source: Generator[list[Item], None, None], depth: int) -> Generator[list[Item], None, None]:
    """Run an iterator in a thread, up to ``depth`` items ahead."""
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return items.put((kind, value), timeout=0.1)

    def run() -> None:
        try:
            for item in source:
                put("item", item)
                if stop.is_set():
                    break
            put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            source.close()

    thread = threading.Thread(target=run, name="itemkit-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join(2)  # not for ever: an image may hang, and be the reason why someone wants to leave
