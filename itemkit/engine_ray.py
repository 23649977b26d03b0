"""The extraction on a Ray cluster, or on several devices of one machine: the same stages, the same store.

Workers read, decode and run the models; this process alone plans, checks for copies and writes. Needs the
optional extra: ``pip install "itemkit[ray]"``. Images must lie where every worker can read them.

Actors, not Ray Data: one process must write the shards, whichever worker answers first, and the death of a
worker must cost the one image that kills it, not a block of them.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from itemkit.decode import DecodeConfig, Decoded, ImageReader, batches, one_line
from itemkit.errors import InputError, MissingExtra
from itemkit.extraction import Extraction, Failure, Outcome, Runner, raise_malloc_thresholds
from itemkit.features import Features
from itemkit.steps import STAGES, Components, Models, Profile, Stages

DEATHS = 2  # of a worker with nothing but this image at hand, until the image is to blame


@dataclass(frozen=True)
class RayOptions:
    """How the work is spread."""

    address: str | None = None  # of a running cluster, "auto" for the one of this machine; None starts one
    workers: int = 2  # processes, each with its own copy of the models
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0  # 1 for a model on a GPU

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise InputError(
                f"got {self.workers} workers with {self.cpus_per_worker:g} CPUs and {self.gpus_per_worker:g} "
                "GPUs each; at least 1 worker is needed, and no less than 0 of the others"
            )


@dataclass(frozen=True)
class Described:
    """A model that lives in the workers: what this process has to know of it."""

    record: dict[str, Any]
    dim: int = 0
    device: str = "cpu"

    def fingerprint(self) -> dict[str, Any]:
        """As the model itself gave it."""
        return self.record


class RayEngine:
    """Runs the models in Ray workers.

    Parameters
    ----------
    build : callable
        Makes the components in each worker, e.g. a preset's ``build``.
    options : RayOptions
    decode : DecodeConfig
        Images are decoded isolated here, as a crash would take a worker and its models down.
    transform : callable, optional
    batch_size : int, optional
        Default 32 on a CPU, 256 on a GPU.
    """

    def __init__(
        self,
        build: Callable[[], Components],
        options: RayOptions,
        decode: DecodeConfig,
        transform: Callable[..., Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.build, self.options, self.transform = build, options, transform
        self.decode = replace(
            decode, isolate=True, threads=decode.threads or max(1, int(options.cpus_per_worker))
        )
        self.batch_size = batch_size or (256 if options.gpus_per_worker else 32)
        self._ray = start_ray(options)
        _check_room(self._ray, options)

    def describe(self) -> Components:
        """Let a worker load the models, and return what they say about themselves."""
        resources = {"num_cpus": self.options.cpus_per_worker, "num_gpus": self.options.gpus_per_worker}
        parts = self._ray.get(self._ray.remote(**resources)(_describe).remote(self.build))
        return Models(**{name: None if part is None else Described(**part) for name, part in parts.items()})

    def work(self, job: Extraction) -> Generator[int, None, None]:
        """See :class:`itemkit.extraction.Engine`."""
        if not job.todo:
            return
        ray = self._ray
        stored = ray.put(frozenset(job.stored))
        worker = ray.remote(Worker).options(
            num_cpus=self.options.cpus_per_worker, num_gpus=self.options.gpus_per_worker
        )
        what = (self.build, self.decode, self.transform, self.batch_size, job.on_error, stored)
        workers = [worker.remote(*what) for _ in range(self.options.workers)]
        todo = _in_batches(job, self.batch_size)
        pending: dict[Any, tuple[int, Any, list[Task]]] = {}
        running = [0] * len(workers)
        # of each worker: what it was given when it died, to be tried again one by one with nothing beside it
        suspects: list[deque[Task]] = [deque() for _ in workers]
        deaths: Counter[int] = Counter()

        def feed(i: int) -> None:
            while running[i] < (1 if suspects[i] else 2):  # two batches each, so that none waits
                tasks = [suspects[i].popleft()] if suspects[i] else next(todo, None)
                if tasks is None:
                    return
                pending[workers[i].run.remote(tasks)] = (i, workers[i], tasks)
                running[i] += 1

        try:
            for i in range(len(workers)):
                feed(i)
            while pending:
                ready = ray.wait(list(pending), timeout=0.5)[0]
                if not ready:
                    yield 0  # lets a Ctrl-C be noticed
                    continue
                i, one, tasks = pending.pop(ready[0])
                running[i] -= 1
                try:
                    yield self._take(job, ray.get(ready[0]))
                except ray.exceptions.RayActorError as error:
                    if getattr(error, "actor_init_failed", False):  # so would the next one, on any image
                        raise InputError(
                            f"a Ray worker could not load the models ({_last_line(error)}). Each loads its "
                            "own copy: see that every node has the models and the memory for its workers, or "
                            "ask for fewer workers. What was computed so far is kept"
                        ) from error
                    if one is workers[i]:
                        workers[i] = worker.remote(*what)
                    alone = len(tasks) == 1 and running[i] == 0
                    deaths[tasks[0].row] += alone
                    if deaths[tasks[0].row] >= DEATHS:
                        yield self._take(job, _died(tasks[0], error, job.batch_size or self.batch_size))
                    else:
                        suspects[i].extend(tasks)
                feed(i)
        finally:
            for one in workers:
                ray.kill(one)

    @staticmethod
    def _take(job: Extraction, answer: Answer) -> int:
        for stage in STAGES:
            job.profile.seconds[stage] += answer.seconds.get(stage, 0.0)
        job.batch_size = answer.batch_size
        fresh = {item.row: item for item in job.sort(answer.items)}
        job.take(_only(answer.outcome, fresh))
        return len(answer.items)


@dataclass(frozen=True)
class Task:
    """One row of the manifest for a worker."""

    row: int
    path: str
    name: str
    caption: str | None


@dataclass
class Answer:
    """What a worker made of its tasks."""

    items: list[Decoded]
    outcome: Outcome
    seconds: dict[str, float]
    batch_size: int


class Worker:
    """One process with its own models."""

    def __init__(
        self,
        build: Callable[[], Components],
        decode: DecodeConfig,
        transform: Callable[..., Any] | None,
        batch_size: int,
        on_error: str,
        stored: frozenset[bytes],
    ) -> None:
        raise_malloc_thresholds()
        models = build()
        self.decode, self.profile, self.stored = decode, Profile(), stored
        self.runner = Runner(Stages(models, self.profile), batch_size, on_error)
        self.reader = ImageReader(decode, self._is_done, transform, models.encoder.preprocess)
        self.captions: list[str | None] = []

    def _is_done(self, row: int, digest: bytes) -> bool:
        # with a user's caption the key is another; then this process decides, after the work
        return self.captions[row] is None and digest in self.stored

    def run(self, tasks: list[Task]) -> Answer:
        """Read the images and run the models on them."""
        self.profile.seconds = dict.fromkeys(STAGES, 0.0)
        self.captions = [task.caption for task in tasks]

        def read(i: int) -> Decoded:
            return self.reader.read(i, tasks[i].path, tasks[i].name)

        items, outcome = [], Outcome()
        source = batches(range(len(tasks)), read, lambda: self.runner.batch_size, self.decode, 0)
        while True:
            with self.profile("decode"):
                part = next(source, None)
            if part is None:
                break
            for item in part:
                item.caption = tasks[item.row].caption
            done = self.runner.run([item for item in part if item.image is not None])
            outcome.done += done.done
            outcome.failures += done.failures
            for item in part:
                item.image = item.pixels = None  # they stay here
            items += part
        for item in items:
            item.row = tasks[item.row].row  # the row in the manifest, not in this batch
        return Answer(items, outcome, self.profile.seconds, self.runner.batch_size)


def start_ray(options: RayOptions) -> Any:
    """Connect to a cluster or start one on this machine."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra(
            'the Ray engine needs an optional package: pip install "itemkit[ray]", or use engine="local"'
        ) from error
    if not ray.is_initialized():
        where: dict[str, Any] = {"address": options.address}
        if options.address is None:
            where = {
                "num_cpus": max(os.cpu_count() or 1, math.ceil(options.workers * options.cpus_per_worker)),
                "include_dashboard": False,
                # workers find the same modules as this process does
                "runtime_env": {
                    "env_vars": {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
                },
            }
        ray.init(**where, log_to_driver=False, logging_level="error")
    return ray


def _check_room(ray: Any, options: RayOptions) -> None:
    """Refuse workers for which there is no room: Ray would wait for it without end and without a word."""
    need = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [
        min((int(node.get(kind, 0) / n + 1e-6) for kind, n in need.items() if n), default=options.workers)
        for node in nodes  # one by one: a worker has to fit on one of them
    ]
    if sum(rooms) < options.workers:
        there = {kind: sum(node.get(kind, 0) for node in nodes) for kind in need}
        raise InputError(
            f"asked for {options.workers} Ray workers with {need['CPU']:g} CPUs and {need['GPU']:g} GPUs "
            f"each; there are {there['CPU']:g} CPUs and {there['GPU']:g} GPUs in all, with room for "
            f"{sum(rooms)} such workers. Ask for fewer or smaller ones, or name a larger cluster (address)"
        )


def builder_of(components: Any, device: str) -> Callable[[], Components]:
    """What makes the models in a worker: a preset, or a function without arguments."""
    if hasattr(components, "build"):
        return lambda: components.build(device)
    if callable(components):
        return components
    raise InputError(
        f"the Ray engine loads the models in its workers, so it needs a preset (or a function that makes the "
        f"components), not {type(components).__name__}"
    )


def _describe(build: Callable[[], Components]) -> dict[str, dict[str, Any] | None]:
    models = build()
    parts: dict[str, dict[str, Any] | None] = {}
    for name in ("captioner", "parser", "encoder", "localiser"):
        part = getattr(models, name, None)
        parts[name] = None if part is None else {"record": part.fingerprint()}
    encoder = models.encoder
    parts["encoder"] = {
        "record": encoder.fingerprint(),
        "dim": int(encoder.dim),
        "device": str(getattr(encoder, "device", "cpu")),
    }
    return parts


def _in_batches(job: Extraction, size: int) -> Iterator[list[Task]]:
    for start in range(0, len(job.todo), size):
        yield [
            Task(
                row,
                os.path.abspath(job.paths[row]),
                job.relative(row),
                None if job.captions is None else job.captions[row],
            )
            for row in job.todo[start : start + size]
        ]


def _died(task: Task, error: Exception, batch_size: int) -> Answer:
    """The answer for an image that takes its worker down even alone."""
    reason = (
        f"{task.name}: the worker died on it ({one_line(error)[:200]}); drop the row or look at the image"
    )
    item = Decoded(task.row, stage="worker", reason=reason)
    return Answer([item], Outcome(), {}, batch_size)


def _last_line(error: Exception) -> str:
    """What happened in a worker; the lines before it are Ray's account of where."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__


def _only(outcome: Outcome, fresh: dict[int, Decoded]) -> Outcome:
    """Drop what turned out to be a copy of an image that another worker has dealt with."""
    return Outcome(
        [part for part in (_select(items, features, fresh) for items, features in outcome.done) if part[0]],
        [
            Failure(fresh[f.item.row], f.stage, f.reason, f.error)
            for f in outcome.failures
            if f.item.row in fresh
        ],
    )


def _select(
    items: list[Decoded], features: Features, fresh: dict[int, Decoded]
) -> tuple[list[Decoded], Features]:
    kept = [i for i, item in enumerate(items) if item.row in fresh]
    if len(kept) == len(items):
        return items, features
    return [items[i] for i in kept], features.select(np.array(kept, dtype=np.int64))
