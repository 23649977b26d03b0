"""Batches through the models: memory that runs out halves them, one bad image costs one row."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from itemkit.errors import ItemkitError
from itemkit.features import Features
from itemkit.pipeline.decode import Decoded, one_line
from itemkit.pipeline.stages import Stages, bad_rows
from itemkit.pipeline.system import free_memory, is_fatal, is_out_of_memory

ALONE = "out of memory with this image alone"
NOT_FINITE = "a model gave no finite embedding for it"


@dataclass
class Failure:
    """An image on which a model failed, or which it answered with nonsense."""

    item: Decoded
    stage: str
    reason: str
    error: Exception | None = None


@dataclass
class Outcome:
    """What became of some decoded images: ``items[i]`` belongs to ``features[i]``, the others failed."""

    done: list[tuple[list[Decoded], Features]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Runner:
    """Runs the stages over decoded images.

    Parameters
    ----------
    stages : Stages
    batch_size : int
        Lowered by itself when memory runs out, unless for one image that does not fit even alone.
    on_error : {"row", "raise"}
    """

    def __init__(self, stages: Stages, batch_size: int, on_error: str = "row") -> None:
        self.stages, self.batch_size, self.on_error = stages, batch_size, on_error

    def run(self, items: list[Decoded]) -> Outcome:
        """Features of images; each item either has them or is among the failures."""
        outcome = Outcome()
        start = 0
        while start < len(items):
            # read once: it may be lower after the slice, and the rest is then cut smaller
            size, failed = self.batch_size, len(outcome.failures)
            self._run(items[start : start + size], outcome)
            if self.batch_size < size and any(f.reason == ALONE for f in outcome.failures[failed:]):
                # the others need not go slower for one that no size helps
                self._resize(size, "one image does not fit even alone")
            start += size
        return outcome

    def _run(self, items: list[Decoded], outcome: Outcome) -> None:
        try:
            images = [item.image for item in items if item.image is not None]
            features = self.stages(images, [item.caption for item in items], [item.pixels for item in items])
        except Exception as error:
            memory, stage, reason = is_out_of_memory(error), self.stages.profile.current, one_line(error)
            smaller = memory and len(items) > 1  # worth a try before anything is raised
            if is_fatal(error) or (self.on_error == "raise" and not smaller):
                raise
            # without its trace, which would keep the batch's tensors alive
            kept = error.with_traceback(None)
        else:
            self._check(items, features, outcome)
            return
        if len(items) == 1:
            outcome.failures.append(Failure(items[0], stage, ALONE if memory else reason, kept))
            return
        size = (len(items) + 1) // 2 if memory else 1
        if memory:
            free_memory()
            if size < self.batch_size:
                self._resize(size, f"out of memory in '{stage}'")
        for start in range(0, len(items), size):
            self._run(items[start : start + size], outcome)

    def _resize(self, size: int, why: str) -> None:
        tqdm.write(f"{why}: batch size {self.batch_size} -> {size}", file=sys.stderr)
        self.batch_size = size

    @staticmethod
    def _check(items: list[Decoded], features: Features, outcome: Outcome) -> None:
        bad = set(bad_rows(features).tolist())
        for i in sorted(bad):
            # shown only if no image at all fares better
            error = ItemkitError(
                "the models gave no finite embedding for any image: this is not the images' fault. Ask the "
                "models with `itemkit doctor --deep`; try another device or precision"
            )
            outcome.failures.append(Failure(items[i], "image", NOT_FINITE, error))
        if bad:
            good = np.array([i for i in range(len(items)) if i not in bad], dtype=np.int64)
            items, features = [items[i] for i in good], features.select(good)
        if items:
            outcome.done.append((items, features))
