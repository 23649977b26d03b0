"""The extraction on a Ray cluster, or on several devices of one machine: the same workers, the same store.

Each Ray task is a shard: a worker reads, decodes, runs the models, writes it; this process plans and lists.
A lost worker costs the shard it was at, which Ray gives to another. Needs the optional extra:
``pip install "itemkit[ray]"``. Images and store must lie where every worker can reach them.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit.decode import Item, reason_of
from itemkit.errors import InputError, ItemkitError, MissingExtra, StoreError
from itemkit.extraction import GPU_BATCH, Worker, WorkerOptions
from itemkit.models import Models
from itemkit.text import one_line

if TYPE_CHECKING:
    from itemkit.presets import Preset

RETRIES = 1  # of a shard whose worker died, before it is halved to find the image to blame


@dataclass(frozen=True)
class RayOptions:
    """How the work is spread."""

    address: str | None = None  # of a running cluster, "auto" for the one of this machine; None starts one
    workers: int = 2  # processes, each with its own copy of the models
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0  # 1 for a model on a GPU

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise InputError(f"got {self}; at least 1 worker is needed, with no less than 0 CPUs and GPUs")


class RayCluster:
    """Workers on a cluster: as `itemkit.extraction.Worker`, whose place it takes.

    A preset is loaded in the workers; models put together by hand are sent to them.
    """

    def __init__(
        self,
        folder: Path,
        run: dict,
        models: Models | Preset,
        stored: Iterable[str],
        options: WorkerOptions,
        spread: RayOptions,
    ) -> None:
        self.seconds: Counter[str] = Counter()
        # threads, if not asked otherwise: each worker has a Python lock of its own, and Ray's threads in it
        decode = replace(options.decode, processes=bool(options.decode.processes))
        self._options, self._spread = replace(options, decode=decode), spread
        self._ray = start_ray(spread)
        check_room(self._ray, spread)
        needs = {"num_cpus": spread.cpus_per_worker, "num_gpus": spread.gpus_per_worker}
        actor = self._ray.remote(_Maker).options(**needs, max_restarts=-1, max_task_retries=RETRIES)
        same = [self._ray.put(value) for value in (models, stored)]
        given = folder.absolute(), run, *same, self._options
        self._makers = [actor.remote(*given) for _ in range(spread.workers)]
        try:  # workers that cannot load the models would seem to die on every image
            for maker in self._makers:
                self._ray.get(maker.make.remote([]))
        except self._ray.exceptions.RayError as error:
            self._close()
            why = str(error).strip().splitlines()[-1]  # before it stands where in Ray it happened
            raise ItemkitError(f"a Ray worker failed to start ({one_line(why)})") from error

    def run(self, items: Iterable[Item]) -> Generator[list[Item], None, None]:
        """Let the workers make the shards of these items."""
        ray, workers, todo = self._ray, self._spread.workers, list(items)
        # shards of full size, but several for each worker, so that they end together
        size = min(self._options.shard_size, math.ceil(len(todo) / (4 * workers)))
        size = max(size, self._options.batch_size or (GPU_BATCH if self._spread.gpus_per_worker else 1))
        shards = [todo[start : start + size] for start in range(0, len(todo), size)][::-1]
        pending: dict[Any, tuple[Any, list[Item]]] = {}
        try:
            while shards or pending:
                busy = [maker for maker, _ in pending.values()]
                for maker in [maker for maker in self._makers if maker not in busy][: len(shards)]:
                    shard = shards.pop()
                    pending[maker.make.remote(shard)] = (maker, shard)
                # wakes up now and then, so that Ctrl-C is heard while workers work
                for ready in ray.wait(list(pending), timeout=0.5)[0]:
                    _, shard = pending.pop(ready)
                    try:
                        results, seconds = ray.get(ready)
                    except ray.exceptions.RayTaskError as error:
                        why = f"a Ray worker failed ({reason_of(error.cause)}); what was computed is kept"
                        raise ItemkitError(why) from error
                    except ray.exceptions.RayError as error:  # the worker died, again and again
                        if len(shard) > 1:
                            half = len(shard) // 2
                            shards += [shard[half:], shard[:half]]
                            continue
                        why = f"the worker died on it ({reason_of(error)[:200]})"
                        shard[0].fail("worker", f"{shard[0].name}: {why}")
                        results, seconds = shard, {}
                    self.seconds.update(seconds)  # adds
                    yield results
                yield []
        finally:
            self._close()

    def _close(self) -> None:
        for maker in self._makers:
            self._ray.kill(maker)


class _Maker:
    """One worker process with its own models."""

    def __init__(self, folder: Path, *given: Any) -> None:
        if not (folder / "run.json").exists():
            raise StoreError(f"a Ray worker does not see {folder}; give a folder that all machines share")
        self._worker = Worker(folder, *given)

    def make(self, items: list[Item]) -> tuple[list[Item], dict[str, float]]:
        """Write the shard of these items; what became of each, and seconds per step."""
        before = dict(self._worker.seconds)
        results = [result for part in self._worker.run(items) for result in part]
        return results, {step: s - before[step] for step, s in self._worker.seconds.items()}


def start_ray(spread: RayOptions) -> Any:
    """Connect to a cluster or start one on this machine."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra(
            'the Ray engine needs an optional package: pip install "itemkit[ray]", or run without Ray'
        ) from error
    if not ray.is_initialized():
        where: dict[str, Any] = {"address": spread.address}
        if spread.address is None:
            # workers find the same modules as this process does
            modules = os.pathsep.join(p or os.getcwd() for p in sys.path)
            where = {
                "num_cpus": max(os.cpu_count() or 1, math.ceil(spread.workers * spread.cpus_per_worker)),
                "include_dashboard": False,
                "runtime_env": {"env_vars": {"PYTHONPATH": modules}},
            }
        ray.init(**where, log_to_driver=False, logging_level="error")
    return ray


def check_room(ray: Any, spread: RayOptions) -> None:
    """Refuse workers without room, for which Ray would wait in silence; warn where they leave GPUs unused."""
    need = {"CPU": spread.cpus_per_worker, "GPU": spread.gpus_per_worker}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = {kind: sum(node.get(kind, 0) for node in nodes) for kind in need}
    rooms = [
        min((int(node.get(kind, 0) / n + 1e-6) for kind, n in need.items() if n), default=spread.workers)
        for node in nodes  # one by one: a worker has to fit on one of them
    ]
    if sum(rooms) < spread.workers:
        raise InputError(
            f"asked for {spread.workers} Ray workers with {need['CPU']:g} CPUs and {need['GPU']:g} GPUs "
            f"each; there are {there['CPU']:g} CPUs and {there['GPU']:g} GPUs in all, with room for "
            f"{sum(rooms)} such workers. Ask for fewer or smaller ones"
        )
    if there["GPU"] and not need["GPU"]:
        warnings.warn(
            f"the cluster has {there['GPU']:g} GPUs and the workers get none of them: their models run on "
            "the CPU. Pass --gpus-per-worker 1 (gpus_per_worker=1)",
            stacklevel=2,
        )
