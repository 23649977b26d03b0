"""The extraction on a Ray cluster, or on several devices of one machine: the same stages, the same store.

Workers read, decode and run the models; this process alone plans, checks for copies and writes. Needs the
optional extra: ``pip install "itemkit[ray]"``. Images must lie where every worker can read them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from itemkit.decode import DecodeConfig, Decoded, ImageReader, batches
from itemkit.errors import InputError, MissingExtra
from itemkit.extraction import Extraction
from itemkit.features import Features
from itemkit.runner import Failure, Outcome, Runner
from itemkit.stages import STAGES, Components, Models, Profile, Stages
from itemkit.system import raise_malloc_thresholds


@dataclass(frozen=True)
class RayOptions:
    """How the work is spread."""

    address: str | None = None  # of a running cluster, "auto" for the one of this machine; None starts one
    workers: int = 2  # processes, each with its own copy of the models
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0  # 1 for a model on a GPU


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

    def describe(self) -> Components:
        """Let a worker load the models, and return what they say about themselves."""
        resources = {"num_cpus": self.options.cpus_per_worker, "num_gpus": self.options.gpus_per_worker}
        parts = self._ray.get(self._ray.remote(**resources)(_describe).remote(self.build))
        return Models(**{name: None if part is None else Described(**part) for name, part in parts.items()})

    def work(self, job: Extraction) -> Generator[int, None, None]:
        """See :class:`itemkit.extraction.Engine`."""
        if not job.todo:
            return
        from ray.data import ActorPoolStrategy, from_items

        rows = [
            {
                "row": row,
                "path": os.path.abspath(job.paths[row]),
                "name": job.relative(row),
                "caption": _caption(job, row),
            }
            for row in job.todo
        ]
        stored = self._ray.put(frozenset(job.stored))
        results = (
            from_items(rows)
            .repartition(target_num_rows_per_block=self.batch_size)
            .map_batches(
                Worker,
                fn_constructor_args=(
                    self.build,
                    self.decode,
                    self.transform,
                    self.batch_size,
                    job.on_error,
                    stored,
                ),
                batch_size=self.batch_size,
                compute=ActorPoolStrategy(size=self.options.workers),
                num_cpus=self.options.cpus_per_worker,
                num_gpus=self.options.gpus_per_worker or None,
            )
        )
        for line in results.iter_rows():
            items, outcome, seconds, batch_size = line["result"]
            for stage in STAGES:
                job.profile.seconds[stage] += seconds[stage]
            job.batch_size = batch_size
            fresh = {item.row: item for item in job.sort(items)}
            job.take(_only(outcome, fresh))
            yield len(items)


class Worker:
    """One process with its own models; called by Ray Data with a batch of rows."""

    def __init__(
        self,
        build: Callable[[], Components],
        decode: DecodeConfig,
        transform: Callable[..., Any] | None,
        batch_size: int,
        on_error: str,
        stored: Any,
    ) -> None:
        import ray

        raise_malloc_thresholds()
        models = build()
        self.decode, self.profile = decode, Profile()
        self.stored = ray.get(stored) if isinstance(stored, ray.ObjectRef) else stored
        self.runner = Runner(Stages(models, self.profile), batch_size, on_error)
        self.reader = ImageReader(decode, self._is_done, transform, models.encoder.preprocess)
        self.captions: list[str | None] = []

    def _is_done(self, row: int, digest: bytes) -> bool:
        # with a user's caption the key is another; then this process decides, after the work
        return self.captions[row] is None and digest in self.stored

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Read and run one batch."""
        self.profile.seconds = dict.fromkeys(STAGES, 0.0)
        self.captions = [None if caption == "" else str(caption) for caption in batch["caption"]]

        def read(i: int) -> Decoded:
            return self.reader.read(i, str(batch["path"][i]), str(batch["name"][i]))

        items, outcome = [], Outcome()
        source = batches(range(len(batch["row"])), read, lambda: self.runner.batch_size, self.decode, 0)
        while True:
            with self.profile("decode"):
                part = next(source, None)
            if part is None:
                break
            for item in part:
                item.caption = self.captions[item.row]
            done = self.runner.run([item for item in part if item.image is not None])
            outcome.done += done.done
            outcome.failures += done.failures
            items += part
        for item in items:  # pixels stay here, and the row becomes that of the manifest
            item.row, item.image, item.pixels = int(batch["row"][item.row]), None, None
        return {"result": [(items, outcome, self.profile.seconds, self.runner.batch_size)]}


def start_ray(options: RayOptions) -> Any:
    """Connect to a cluster or start one on this machine."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra(
            'the Ray engine needs an optional package: pip install "itemkit[ray]", or use engine="local"'
        ) from error
    if not ray.is_initialized():
        where: dict[str, Any] = {"address": options.address}
        if options.address is None:
            where = {
                "num_cpus": max(os.cpu_count() or 1, int(options.workers * options.cpus_per_worker)),
                "include_dashboard": False,
                # workers find the same modules as this process does
                "runtime_env": {
                    "env_vars": {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
                },
            }
        ray.init(**where, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


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


def _caption(job: Extraction, row: int) -> str:
    caption = None if job.captions is None else job.captions[row]
    return caption or ""


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
