"""The extraction on this machine: threads decode, one device runs the models."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from itemkit._files import write_quickly
from itemkit.pipeline.decode import DecodeConfig, Decoded, ImageReader, batches
from itemkit.pipeline.extraction import Extraction
from itemkit.pipeline.runner import Runner
from itemkit.pipeline.stages import Components, Stages

JOURNAL_FILE = "decoding.json"  # names the images being decoded, so that one that kills the process is known
JOURNAL_ROWS = 256
CPU_BATCH, GPU_BATCH = 32, 256


class LocalEngine:
    """Runs the models in this process.

    Parameters
    ----------
    components : Components
    decode : DecodeConfig
    transform : callable, optional
    batch_size : int, optional
        Default 32 on a CPU, 256 on a GPU.
    """

    def __init__(
        self,
        components: Components,
        decode: DecodeConfig,
        transform: Callable[..., Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.components, self.decode, self.transform = components, decode, transform
        on_gpu = not str(getattr(components.encoder, "device", "cpu")).startswith("cpu")
        self.batch_size = batch_size or (GPU_BATCH if on_gpu else CPU_BATCH)
        self.prefetch = decode.prefetch if decode.prefetch is not None else (2 if on_gpu else 0)

    def work(self, job: Extraction) -> Generator[int, None, None]:
        """See :class:`itemkit.pipeline.extraction.Engine`."""
        journal = job.writer.folder / JOURNAL_FILE
        suspects = _suspects(job, journal)
        runner = Runner(Stages(self.components, job.profile), self.batch_size, job.on_error)
        reader = ImageReader(self.decode, job.is_done, self.transform, self.components.encoder.preprocess)

        def read(row: int) -> Decoded:
            return reader.read(row, job.paths[row], job.relative(row), row in suspects)

        source = batches(
            _journalled(job, journal), read, lambda: runner.batch_size, self.decode, self.prefetch
        )
        interrupted = False
        with contextlib.closing(reader):
            try:
                while True:
                    with job.profile("decode"):
                        items = next(source, None)
                    if items is None:
                        break
                    fresh = job.sort(items)
                    if fresh:
                        job.take(runner.run(fresh))
                    job.batch_size = runner.batch_size
                    yield len(items)
            except KeyboardInterrupt as error:  # of the second Ctrl-C, perhaps because an image hangs
                interrupted = True
                with contextlib.suppress(KeyboardInterrupt):
                    source.throw(error)  # where close() would wait for that image
                raise
            finally:
                source.close()
                # never reached by a process that a decoder takes down: then the journal stays and tells
                if not interrupted:
                    journal.unlink(missing_ok=True)


def _suspects(job: Extraction, journal: Path) -> set[int]:
    """Images at hand when an earlier run died: decoded in a process of their own."""
    try:
        names = set(json.loads(journal.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()
    return {row for row in job.todo if job.relative(row) in names}


def _journalled(job: Extraction, journal: Path) -> Iterator[int]:
    """The rows to do; before a row is handed out, the journal on disk names it."""
    for i, row in enumerate(job.todo):
        if i % JOURNAL_ROWS == 0:
            # two spans, because the end of the previous one is still being decoded
            names = [job.relative(r) for r in job.todo[max(0, i - JOURNAL_ROWS) : i + JOURNAL_ROWS]]
            write_quickly(journal, json.dumps(names))
        yield row
