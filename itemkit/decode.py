"""From files to batches of decoded images: many at once, in order, within a bound of memory.

Threads decode, or processes at their service: a thread holds Python's lock for 0.66 ms of each image, so no
number of them decodes more than 1,500 images/s, which a GPU outruns. With a process for each thread, a fifth
of the work stays in this one (JPEGs of 500 x 375: 1.2 of 6.4 ms of a busy core), though the sum grows by a
quarter; and what crashes or hangs a decoder costs that image alone.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from PIL import Image

from itemkit.devices import THREADS_VARIABLE
from itemkit.errors import ItemkitError
from itemkit.images import content_id, load_image, open_image, read_bytes
from itemkit.text import one_line, printable

HANG_SECONDS = 300  # a process that works longer on one image is taken to hang


@dataclass(frozen=True)
class DecodeConfig:
    """How image files become pixels in memory."""

    threads: int | None = None  # None: as `devices.set_threads` says, else one per processor
    processes: bool | None = None  # one for each thread; None: beside a CUDA device, for more than 4
    prefetch: int | None = None  # batches decoded ahead; None: 2 for a GPU, 0 on a CPU (the same cores)
    # Pixels decoded or waiting, of all threads together: with 3 to 7 bytes each, no folder of allowed images
    # takes 2 GB. One larger image goes alone.
    max_pixels: int = 150_000_000
    # Decode a JPEG at 1/2, 1/4 or 1/8 while its shorter side keeps so many pixels (twice the encoder's input
    # is enough): 2-4 times as fast for a camera's photographs, but other pixels, so another store.
    least_side: int | None = None

    def n_threads(self) -> int:
        """Number of decoding threads."""
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.threads or int(os.environ.get(THREADS_VARIABLE) or min(32, own or 1))

    def beside(self, device: str) -> DecodeConfig:
        """These options for models on a device, with what was left open chosen."""
        prefetch, processes = self.prefetch, self.processes
        if prefetch is None:
            prefetch = 0 if device == "cpu" else 2
        if processes is None:
            processes = device == "cuda" and self.n_threads() > 4 and sys.platform == "linux"
        return replace(self, prefetch=prefetch, processes=processes)


@dataclass(slots=True)
class Item:
    """One row of a manifest on its way: its file, its pixels for the models, and what became of it."""

    row: int
    path: str
    name: str  # of the file, in messages and in the store
    caption: str | None = None  # the user's
    image_id: str = ""  # SHA-256 of the file; "" if it could not be read
    feature_id: str = ""  # the same, joined by the user's caption
    file_size: int = -1
    mtime_ns: int = -1
    tokens: int = 0  # of the caption
    status: str = "left"
    stage: str = ""  # where it failed
    reason: str = ""
    model: bool = False  # a model failed, or a transform: not the file
    n_pixels: int = 0  # by the file's header; 0 where none have to be decoded
    data: bytes | None = None  # the file, until it is decoded
    image: Any = None  # or what has its size alone, where no model looks at its pixels
    pixels: Any = None  # the encoder's input
    shown: Any = None  # the captioner's

    def fail(self, stage: str, reason: str, model: bool = False) -> None:
        """Note why it has no features."""
        self.status, self.stage, self.model = "errors", stage, model
        self.reason, self.data = printable(reason), None

    def free(self) -> None:
        """Let go of the pixels."""
        self.image = self.pixels = self.shown = None


def feature_of(caption: str | None, image_id: str) -> str:
    """Key of an image's features: its content, joined by the user's caption where one is used."""
    if caption is None or not image_id:
        return image_id
    return hashlib.sha256(bytes.fromhex(image_id) + caption.encode()).hexdigest()


def reason_of(error: BaseException, path: str = "", name: str = "") -> str:
    """Reason of an exception as one printable line for a table, in which a file is called by its name."""
    text = str(error) or type(error).__name__
    if not isinstance(error, (ItemkitError, OSError)):
        text = f"{type(error).__name__}: {text}"
    for there in filter(None, (path, printable(path))):
        text = text.replace(there, name)
    return one_line(text)


@dataclass(frozen=True)
class Reader:
    """Reads, identifies and decodes single images; nothing is raised: what fails is noted in the item."""

    config: DecodeConfig
    preprocess: Callable[[Image.Image], Any]  # of the encoder
    transform: Callable[[Image.Image, str], Image.Image] | None = None  # before that, e.g. a perturbation
    known: Container[str] = ()  # features whose images are not decoded
    look: Callable[[Image.Image], Any] | None = None  # preprocessing of the captioner
    keep: bool = True  # whether a model also needs the image itself

    def __call__(self, step: str, item: Item) -> Item:
        """Take one of the two steps, "open" or "decode"."""
        try:
            getattr(self, step)(item)
        except MemoryError:
            # the machine's trouble, not the file's: never remembered as what the file is like
            size = f"this image of {item.n_pixels:,} pixels" if item.n_pixels else "this file"
            item.fail("memory", f"{item.name}: memory ran out for {size}; free some and run the same again")
        except Exception as error:  # whatever a broken file makes a decoder raise is this file's problem
            reason = reason_of(error, item.path, item.name)
            item.fail(item.stage, reason, item.stage in ("transform", "preprocess"))
        return item

    def open(self, item: Item) -> None:
        """Read and identify a file; its bytes are kept."""
        item.stage = "read"
        # before the bytes: a file changed between the two is then noticed by the next run
        with contextlib.suppress(OSError, ValueError):  # read_bytes says it better
            stat = os.stat(item.path)
            item.file_size, item.mtime_ns = stat.st_size, stat.st_mtime_ns
        data = read_bytes(item.path)
        item.image_id = content_id(data)
        item.feature_id = feature_of(item.caption, item.image_id)
        item.stage = "decode"
        width, height = open_image(data, item.name).size
        item.n_pixels, item.data, item.stage = width * height, data, ""

    def decode(self, item: Item) -> None:
        """Decode a file that was read, and prepare its pixels for the models."""
        if item.data is None:
            return
        item.stage = "decode"
        image = load_image(item.data, name=item.name, least_side=self.config.least_side)
        if self.transform is not None:
            item.stage = "transform"
            image = self.transform(image, item.image_id)
        item.stage = "preprocess"
        item.pixels = self.preprocess(image)
        if self.look is not None and item.caption is None:
            item.shown = self.look(image)
        size = SimpleNamespace(size=image.size, width=image.width, height=image.height)
        item.image, item.data, item.stage = image if self.keep else size, None, ""


class Readers:
    """A `Reader` in each of several processes; a thread that calls it waits for one of them.

    They are forked: within milliseconds each has what the reader is made of, a notebook's functions as well,
    and no script is run again. They touch no device.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader, self._lock, self._closed = reader, threading.Lock(), False
        self._processes: list[Any] = []
        self._idle: SimpleQueue[tuple[Any, Connection]] = SimpleQueue()
        for _ in range(reader.config.n_threads()):
            self._idle.put(self._start())

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._closed = True
        for process in self._processes:
            process.kill()
            process.join()

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = multiprocessing.Pipe()
        given = self._reader, theirs, os.getpid()
        process = multiprocessing.get_context("fork").Process(target=_serve, args=given, daemon=True)
        process.start()
        theirs.close()  # at once: as no other process inherits it, its end tells of this one's death
        self._processes.append(process)
        return process, ours

    def __call__(self, step: str, item: Item) -> Item:
        """Have a process take a step of `Reader`; if that kills it, it is this image's fault."""
        process, pipe = self._idle.get()
        try:
            pipe.send((step, item))
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join()
            why = f"exit code {process.exitcode}"
            if process.exitcode == -signal.SIGALRM:
                why = f"it took over {HANG_SECONDS} s"
            # not noted as what the file is like: memory may have run out
            item.fail("worker", f"{item.name}: the process that decodes images died on it ({why})")
            with self._lock:
                if not self._closed:
                    process, pipe = self._start()
            return item
        finally:
            self._idle.put((process, pipe))


def _serve(reader: Reader, pipe: Connection, parent: int) -> None:
    """Life of one process of `Readers`."""
    gc.freeze()  # what the parent has made, on a GPU perhaps, is not this process's to free
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            while not pipe.poll(1):  # processes that started later keep the parent's end open
                if os.getppid() != parent:
                    return
            step, item = pipe.recv()
            signal.alarm(HANG_SECONDS)  # ends also what hangs in a decoder's own code
            item = reader(step, item)
            try:
                answer = pickle.dumps(item)  # not pipe.send, by which torch gives each tensor a file
            except Exception as error:  # a preprocessing of the user's may return anything
                item.free()
                item.fail("preprocess", reason_of(error, item.path, item.name), model=True)
                answer = pickle.dumps(item)
            pipe.send_bytes(answer)
            signal.alarm(0)


def batches(
    items: Iterable[Item], reader: Reader, batch_size: Callable[[], int], lag: int = 0
) -> Generator[list[Item], None, None]:
    """Read and decode items in order, in batches.

    Files are read somewhat ahead, so that the size of an image is known before it is decoded; that is done
    once there is room for its pixels, so batches of large images are shorter. ``batch_size`` is asked before
    each batch. The pixels of a batch are gone when the next is asked for, or ``lag`` batches later; an empty
    one asks to have done with those.
    """
    config, source = reader.config, iter(items)
    opened: deque[Any] = deque()
    ahead: deque[list[Any]] = deque()
    given: deque[list[Item]] = deque()
    used = 0  # pixels of the batches in memory

    def start_batch() -> list[Any]:
        nonlocal used
        batch: list[Any] = []
        images, size = 0, batch_size()
        while images < size and len(batch) < 8 * size:  # what is known already has no pixels
            more = islice(source, 2 * config.n_threads() - len(opened))
            opened.extend([pool.apply_async(read, ("open", item)) for item in more])
            if not opened:
                break
            item = opened[0].get()
            if item.feature_id in reader.known:
                item.n_pixels, item.data = 0, None
            if used and used + item.n_pixels > config.max_pixels:
                break
            used += item.n_pixels
            images += item.n_pixels > 0
            opened.popleft()
            batch.append(pool.apply_async(read, ("decode", item)))
        return batch

    chosen = Readers(reader) if config.processes else contextlib.nullcontext(reader)
    # daemons: a thread that hangs in a decoder keeps nobody from leaving
    with chosen as read, ThreadPool(config.n_threads()) as pool:
        while True:
            while len(ahead) <= (config.prefetch or 0) and (started := start_batch()):
                ahead.append(started)
            if not ahead and not given:
                return
            batch = [result.get() for result in ahead.popleft()] if ahead else []
            yield [item for item in batch if item.stage != "memory"]
            given.append(batch)
            while len(given) > (lag if batch else 0):
                done = given.popleft()
                for item in done:
                    item.free()
                for item in done:
                    if item.stage == "memory":  # once more, alone: a neighbour may have taken what it needed
                        again = Item(item.row, item.path, item.name, item.caption)
                        yield [read("decode", read("open", again))]
                used -= sum(item.n_pixels for item in done)
