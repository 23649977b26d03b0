"""From files to batches of decoded images: many at once, bounded memory, and a crash costs one image.

Images are decoded by threads of this process (Pillow releases the interpreter while it decodes). An image
that took the process down before, or every image with ``isolate=True``, is decoded in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from PIL import Image

from itemkit.errors import InputError
from itemkit.images import read_bytes


@dataclass(frozen=True)
class DecodeConfig:
    """How image files become pixels in memory."""

    # module:function, gets (bytes, name=...) and returns an RGB image; "?option=number" is handed on to it.
    # It is part of the fingerprint. `scaled_jpeg` names the one that decodes large JPEG files faster.
    loader: str = "itemkit.images:load_image"
    threads: int | None = None  # None: one per processor this process may use
    prefetch: int | None = None  # batches decoded ahead of the model; None: 0 on a CPU (shared), else 2
    isolate: bool = False  # decode in processes of their own: slower, but a crash or a hang costs one image
    timeout_s: float = 60.0  # per image, where isolated
    max_batch_pixels: int = 100_000_000  # 300 MB: a batch of large photographs is cut shorter

    def n_threads(self) -> int:
        """Number of decoding threads."""
        if self.threads is not None:
            return max(1, self.threads)
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, min(32, own or 1))


@dataclass
class Decoded:
    """One image on its way to the model: ``image``, or ``stage`` and ``reason`` why not, or neither."""

    row: int
    digest: bytes = b""  # SHA-256 of the file
    file_size: int = -1
    mtime_ns: int = -1
    image: Image.Image | None = None
    size: tuple[int, int] = (0, 0)  # of the file's image, before any transform
    pixels: Any = None  # the encoder's input, if a preprocess was given
    caption: str | None = None  # the user's
    stage: str = ""
    reason: str = ""
    error: Exception | None = None


def scaled_jpeg(least_side: int = 448) -> str:
    """Name the loader that decodes a JPEG at 1/2, 1/4 or 1/8 while its shorter side keeps ``least_side``.

    Much faster for large photographs, but the pixels are not those of decoding and then resizing, so a store
    made with it is another one. Twice the encoder's input (448 for 224) leaves the resizing its filter. Sizes
    and boxes in the store are then those of the scaled image.

    >>> DecodeConfig(loader=scaled_jpeg()).loader
    'itemkit.images:load_image?least_side=448'
    """
    if least_side < 8:
        raise InputError(f"got least_side={least_side} pixels; expected at least 8, e.g. 448")
    return f"itemkit.images:load_image?least_side={least_side}"


def resolve(loader: str) -> Callable[..., Image.Image]:
    """The function named by ``module:function``, with the numbers of ``?option=number&...`` bound."""
    target, _, query = loader.partition("?")
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    options = {key: int(value) for key, _, value in (o.partition("=") for o in query.split("&") if o)}
    return functools.partial(function, **options) if options else function


class ImageReader:
    """Reads, identifies and decodes single images; safe to call from many threads.

    Parameters
    ----------
    config : DecodeConfig
    known : callable, optional
        Gets a row and the file's digest; True where nothing needs to be decoded.
    transform : callable, optional
        ``(image, image_id) -> image``, e.g. a perturbation; must depend on its arguments alone.
    preprocess : callable, optional
        The encoder's preprocessing, so that it too runs in the decoding threads.
    """

    def __init__(
        self,
        config: DecodeConfig,
        known: Callable[[int, bytes], bool] | None = None,
        transform: Callable[[Image.Image, str], Image.Image] | None = None,
        preprocess: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self._config = config
        self._load = resolve(config.loader)
        self._known, self._transform, self._preprocess = known, transform, preprocess
        # all, and those without work; not one per thread, as threads come and go with each call of `batches`
        self._workers: list[IsolatedDecoder] = []
        self._idle: list[IsolatedDecoder] = []

    def read(self, row: int, path: str, name: str | None = None, isolate: bool = False) -> Decoded:
        """Read one file, called ``name`` in messages; what fails is told in the result, nothing is raised."""
        out = Decoded(row, stage="read")
        try:
            # before the bytes: a file changed between the two is then noticed by the next run
            with contextlib.suppress(OSError):  # read_bytes says it better
                stat = os.stat(path)
                out.file_size, out.mtime_ns = stat.st_size, stat.st_mtime_ns
            data = read_bytes(path)
            out.digest = hashlib.sha256(data).digest()
            if self._known is not None and self._known(row, out.digest):
                out.stage = ""
                return out
            out.stage = "decode"
            load = self._isolated if isolate or self._config.isolate else self._load
            image = load(data, name=name or path)
            out.size = image.size
            if self._transform is not None:
                out.stage = "transform"
                image = self._transform(image, out.digest.hex())
            if self._preprocess is not None:
                out.stage = "preprocess"
                out.pixels = self._preprocess(image)
            out.image, out.stage = image, ""
        except Exception as error:  # whatever a broken file makes a decoder raise is this file's problem
            out.reason, out.error = one_line(error).replace(path, name or path), error
            if isinstance(error, MemoryError) and out.stage == "decode":
                # but this is not: what is found out by decoding is remembered, so it must not be told as that
                out.stage = "read"
                out.reason = f"{name or path}: memory ran out while it was decoded; run again with more of it"
        return out

    def _isolated(self, data: bytes, name: str) -> Image.Image:
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = IsolatedDecoder(self._config.loader, self._config.timeout_s)
            self._workers.append(worker)
        try:
            return worker.decode(data, name)
        finally:
            self._idle.append(worker)

    def close(self) -> None:
        """End the decoding processes, if any were started."""
        for worker in self._workers:
            worker.close()


def one_line(error: BaseException) -> str:
    """Reason of an exception as one line for a table."""
    reason = getattr(error, "reason", None)
    text = reason if isinstance(reason, str) else str(error) or type(error).__name__
    if not isinstance(error, (InputError, OSError)) and not isinstance(reason, str):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


def batches(
    rows: Iterable[int],
    read: Callable[[int], Decoded],
    batch_size: Callable[[], int],
    config: DecodeConfig,
    prefetch: int,
) -> Generator[list[Decoded], None, None]:
    """Decode rows in order and yield them as batches.

    With ``prefetch=0`` a batch is decoded by all threads while the caller waits, and nothing is decoded while
    the model runs: on a CPU, where both want the same cores, this was measured to be fastest.
    """
    batch_iterator = _in_order(rows, read, batch_size, config)
    return _ahead(batch_iterator, prefetch) if prefetch else batch_iterator


def _in_order(
    rows: Iterable[int], read: Callable[[int], Decoded], batch_size: Callable[[], int], config: DecodeConfig
) -> Generator[list[Decoded], None, None]:
    threads = config.n_threads()
    window = 2 * threads  # bounds what is decoded and not yet counted against the batch's pixels
    source = iter(rows)
    running: deque[Future[Decoded]] = deque()
    todo: queue.SimpleQueue[tuple[int, Future] | None] = queue.SimpleQueue()
    # not a ThreadPoolExecutor: should a decoder hang for ever, its threads would not let the process end
    pool = [threading.Thread(target=_work, args=(read, todo), daemon=True) for _ in range(threads)]
    for thread in pool:
        thread.start()
    try:
        exhausted = False
        while not exhausted or running:
            batch: list[Decoded] = []
            images = pixels = 0
            size = batch_size()
            while images < size and pixels < config.max_batch_pixels and len(batch) < 8 * size:
                while not exhausted and len(running) < min(window, size - images):
                    row = next(source, None)
                    if row is None:
                        exhausted = True
                    else:
                        running.append(Future())
                        todo.put((row, running[-1]))
                if not running:
                    break
                item = running.popleft().result()
                batch.append(item)
                if item.image is not None:
                    images += 1
                    pixels += max(item.size[0] * item.size[1], item.image.width * item.image.height)
            if batch:
                yield batch
    except KeyboardInterrupt:
        pool = []  # nobody waits for it: an image may hang, and be the reason why someone wants to leave
        raise
    finally:
        for future in running:
            future.cancel()
        for _ in range(threads):
            todo.put(None)
        for thread in pool:
            thread.join()


def _work(read: Callable[[int], Decoded], todo: queue.SimpleQueue[tuple[int, Future] | None]) -> None:
    while task := todo.get():
        row, future = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(row))
            except BaseException as error:
                future.set_exception(error)


def _ahead(source: Generator[list[Decoded], None, None], depth: int) -> Generator[list[Decoded], None, None]:
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
    except BaseException as error:
        stop.set()
        if not isinstance(error, KeyboardInterrupt):
            thread.join()
        raise


class DecoderDied(InputError):
    """The process that decoded an image crashed or was stopped because it took too long."""


class IsolatedDecoder:
    """Decodes images in another process, which may crash or hang without harm; restarted when needed.

    A plain subprocess with pipes, not ``multiprocessing``: that would run the caller's main module again.
    """

    def __init__(self, loader: str, timeout_s: float) -> None:
        self._command = [sys.executable, "-c", "from itemkit.decode import _serve; _serve()", loader]
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def decode(self, data: bytes, name: str = "image") -> Image.Image:
        """Decode the bytes of a file; raises InputError or MemoryError as the loader does, or DecoderDied."""
        for last in (False, True):
            answer, raw, late = self._ask(data, name)
            if "reason" in answer:
                raise (MemoryError if answer["memory"] else InputError)(answer["reason"])
            if "size" in answer and len(raw) == answer["bytes"]:
                return Image.frombytes("RGB", tuple(answer["size"]), raw)
            code = self._end()
            # it may have been killed from outside: only an image that takes two of them down is to blame
            if late or last or self._closed:
                break
        slow = f"took longer than {self._timeout_s:g} s to decode and was stopped"
        problem = slow if late else f"crashed the decoder (exit status {code})"
        raise DecoderDied(f"{name}: {problem}; drop the row or save the image anew with another program")

    def _ask(self, data: bytes, name: str) -> tuple[dict[str, Any], bytes, bool]:
        """What the process answers, if it does, and whether it was stopped for taking too long."""
        process = self._process or self._start()
        timer, started = threading.Timer(self._timeout_s, process.kill), time.monotonic()
        timer.start()
        answer, raw = dict[str, Any](), b""
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({"name": name, "bytes": len(data)}).encode() + b"\n")
            process.stdin.write(data)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            raw = process.stdout.read(answer.get("bytes", 0))
        except (OSError, ValueError):  # it is gone, or its pipes were closed at the end of the run
            answer = {}
        except BaseException:  # such as no memory for its answer: half of that is still in the pipe
            self._end()
            raise
        finally:
            timer.cancel()
        return answer, raw, time.monotonic() - started >= self._timeout_s

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([p or os.getcwd() for p in sys.path])
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which then ends its decoders itself
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it is ready: its start does not count as the image's time
        return self._process

    def close(self) -> None:
        """End the process for good."""
        self._closed = True
        self._end()

    def _end(self) -> int | None:
        """End the process and tell its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]
        return code


def _serve() -> None:
    """Answer decoding requests on stdin/stdout; runs in the other process."""
    load = resolve(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    requests = sys.stdin.buffer
    answers.write(b"ready\n")
    answers.flush()
    while head := requests.readline():
        request = json.loads(head)
        data = requests.read(request["bytes"])
        raw = b""
        try:
            image = load(data, name=request["name"]).convert("RGB")
            raw = image.tobytes()
            answer: dict[str, Any] = {"size": image.size, "bytes": len(raw)}
        except Exception as error:
            answer = {"reason": one_line(error), "memory": isinstance(error, MemoryError)}
        answers.write(json.dumps(answer).encode() + b"\n" + raw)
        answers.flush()
