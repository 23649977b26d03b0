"""From files to batches of decoded images: many threads at once, in order, within a bound of memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import Any

from PIL import Image

from itemkit.devices import THREADS_VARIABLE
from itemkit.errors import ItemkitError
from itemkit.images import content_id, load_image, open_image, read_bytes
from itemkit.text import one_line, printable


@dataclass(frozen=True)
class DecodeConfig:
    """How image files become pixels in memory."""

    threads: int | None = None  # None: as `devices.set_threads` says, else one per processor
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
    error: Exception | None = None  # where it was not the file's fault
    n_pixels: int = 0  # by the file's header; 0 where none have to be decoded
    data: bytes | None = None  # the file, until it is decoded
    image: Image.Image | None = None
    pixels: Any = None  # the encoder's input

    def fail(self, stage: str, reason: str, error: Exception | None = None) -> None:
        """Note why it has no features."""
        self.status, self.stage, self.error = "errors", stage, error
        self.reason = printable(reason)


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

    def open(self, item: Item) -> Item:
        """Read and identify a file; its bytes are kept if they have to be decoded."""
        with _noting(item, "read"):
            # before the bytes: a file changed between the two is then noticed by the next run
            with contextlib.suppress(OSError, ValueError):  # read_bytes says it better
                stat = os.stat(item.path)
                item.file_size, item.mtime_ns = stat.st_size, stat.st_mtime_ns
            data = read_bytes(item.path)
            item.image_id = content_id(data)
            item.feature_id = feature_of(item.caption, item.image_id)
            if item.feature_id not in self.known:
                item.stage = "decode"
                width, height = open_image(data, item.name).size
                item.n_pixels, item.data = width * height, data
        return item

    def decode(self, item: Item) -> Item:
        """Decode a file that was read, and prepare its pixels for the encoder."""
        if item.data is None:
            return item
        with _noting(item, "decode"):
            image = load_image(item.data, name=item.name, least_side=self.config.least_side)
            if self.transform is not None:
                item.stage = "transform"
                image = self.transform(image, item.image_id)
            item.stage = "preprocess"
            item.pixels, item.image = self.preprocess(image), image
        item.data = None
        return item


@contextlib.contextmanager
def _noting(item: Item, stage: str) -> Iterator[None]:
    item.stage = stage
    try:
        yield
    except MemoryError:
        # the machine's trouble, not the file's: never remembered as what the file is like
        size = f"this image of {item.n_pixels:,} pixels" if item.n_pixels else "this file"
        item.fail("memory", f"{item.name}: memory ran out for {size}; free some and run the same again")
    except Exception as error:  # whatever a broken file makes a decoder raise is this file's problem
        reason = reason_of(error, item.path, item.name)
        item.fail(item.stage, reason, error if item.stage in ("transform", "preprocess") else None)
    else:
        item.stage = ""


def batches(
    items: Iterable[Item], reader: Reader, batch_size: Callable[[], int], prefetch: int = 0
) -> Generator[list[Item], None, None]:
    """Read and decode items in order, in batches; the pixels of a batch are gone when the next is asked for.

    Files are read somewhat ahead, so that the size of an image is known before it is decoded; that is done
    once there is room for its pixels, so batches of large images are shorter. ``batch_size`` is asked before
    each batch; ``prefetch`` of them are decoded while the consumer works on one.
    """
    config, source = reader.config, iter(items)
    pool = ThreadPool(config.n_threads())  # daemons: one that hangs in a decoder keeps nobody from leaving
    opened: deque[Any] = deque()
    ahead: deque[list[Any]] = deque()
    used = 0  # pixels of the batches in memory

    def start_batch() -> list[Any]:
        nonlocal used
        batch: list[Any] = []
        images, size = 0, batch_size()
        while images < size and len(batch) < 8 * size:  # what is known already has no pixels
            more = islice(source, 2 * config.n_threads() - len(opened))
            opened.extend([pool.apply_async(reader.open, (item,)) for item in more])
            if not opened:
                break
            item = opened[0].get()
            if used and used + item.n_pixels > config.max_pixels:
                break
            used += item.n_pixels
            images += item.n_pixels > 0
            opened.popleft()
            batch.append(pool.apply_async(reader.decode, (item,)))
        return batch

    with pool:
        while True:
            while len(ahead) <= prefetch and (started := start_batch()):
                ahead.append(started)
            if not ahead:
                return
            batch = [result.get() for result in ahead.popleft()]
            yield [item for item in batch if item.stage != "memory"]
            for item in batch:
                item.image = item.pixels = None
            for item in batch:
                if item.stage == "memory":  # once more, alone: a neighbour may have taken what it needed
                    yield [reader.decode(reader.open(Item(item.row, item.path, item.name, item.caption)))]
            used -= sum(item.n_pixels for item in batch)
