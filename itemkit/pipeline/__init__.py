"""Manifest in, feature store out: batched, cached by content, interruptible anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from itemkit import __version__, schema, store
from itemkit.errors import InputError
from itemkit.pipeline.decode import DecodeConfig
from itemkit.pipeline.engine_local import LocalEngine
from itemkit.pipeline.extraction import COMPUTED, COPY, REUSED, Engine, Extraction
from itemkit.pipeline.stages import STAGES, Components, fingerprint
from itemkit.pipeline.system import StopSignal, raise_malloc_thresholds
from itemkit.pipeline.user_captions import count_cut, told, with_clean_captions
from itemkit.pipeline.writer import StoreWriter

if TYPE_CHECKING:
    from itemkit.pipeline.engine_ray import RayOptions
    from itemkit.presets import Preset

PACKAGES = ("torch", "open_clip_torch", "transformers", "spacy", "numpy", "pandas", "pyarrow", "pillow")


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did; ``str(report)`` is the line shown at its end.

    Attributes
    ----------
    out : Path
        The feature store.
    n : int
        Rows of the manifest; each is one of the following.
    reused, computed, copies, errors : int
        Images with features from an earlier run; computed now; same content as an image computed now; without
        features (see ``errors.parquet``).
    left : int
        Images not reached, because the run was stopped.
    seconds : float
        Without loading the models.
    stages : dict
        Seconds per stage.
    batch_size : int
        At the end: halved each time memory ran out.
    captions : dict
        How many captions the encoder cut, see ``pipeline.user_captions.count_cut``.
    """

    out: Path
    n: int
    reused: int
    computed: int
    copies: int
    errors: int
    left: int
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    batch_size: int = 0
    captions: dict[str, Any] = field(default_factory=dict)

    @property
    def images_per_s(self) -> float:
        """Images computed per second."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        parts = [f"{self.computed} computed"]
        if self.copies:
            parts.append(f"{self.copies} copies of them")
        how = "--retry-errors also tries those known to be damaged"
        where = f" (see {self.out / store.ERRORS_FILE}; {how})" if self.errors else ""
        parts.append(f"{self.errors} errors{where}")
        if self.left:
            parts.append(f"{self.left} left to do")
        line = f"{self.n} images: {self.reused} reused, {', '.join(parts)}; {self.seconds:.1f} s"
        if self.computed:
            busy = {name: s for name, s in self.stages.items() if s > 0.005 * self.seconds}
            shares = ", ".join(f"{name} {s / self.seconds:.0%}" for name, s in busy.items())
            line += f", {self.images_per_s:.1f} images/s ({shares})"
        return "\n".join(filter(None, [line, told(self.captions)]))


def extract(
    manifest: pd.DataFrame,
    out: str | Path,
    components: Components | Preset | str = "mini",
    *,
    device: str = "auto",
    captions: str = "generate",
    missing: str = "raise",
    transform: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    shard_size: int = 4096,
    flush_seconds: float = 120.0,
    limit: int | None = None,
    decode: DecodeConfig | None = None,
    on_error: str = "row",
    retry_errors: bool = False,
    progress: bool = True,
    config: dict | None = None,
    engine: str = "local",
    ray: RayOptions | None = None,
) -> ExtractReport:
    """Compute the features of all images of a manifest that the store does not hold yet.

    Parameters
    ----------
    manifest : DataFrame
        With ``path`` and, where known, ``label, generator, source, split, caption``. A path may come more
        than once (with several captions); files of equal content share their features.
    out : path
        The feature store; made if missing, continued if made with the same models and options.
    components : Components, Preset or str
        The models, a preset, or the name of one.
    device : str
        For a preset.
    captions : {"generate", "user"}
        From the captioner, or from the manifest's ``caption`` column, cleaned by
        ``captions.cleaning.clean_caption``; the original stays as ``caption_posted`` where it changed.
    missing : {"raise", "generate", "error"}
        With ``captions="user"``, what to do about images without caption.
    transform : callable with ``fingerprint()``, optional
        ``(image, image_id) -> image`` applied after decoding, e.g. a perturbation; must be deterministic.
    batch_size : int, optional
        Images per batch; default 32 on a CPU, 256 on a GPU. Halved when memory runs out. Does not change the
        numbers beyond rounding.
    shard_size, flush_seconds : int, float
        A shard is written after this many images or seconds; a killed run loses no more than that.
    limit : int, optional
        Take the first rows of the manifest only.
    decode : DecodeConfig, optional
        Threads, look-ahead, isolation.
    on_error : {"row", "raise"}
        An unusable image becomes a row in ``errors.parquet``, or ends the run.
    retry_errors : bool
        Try images again that were found unusable before and have not changed since.
    progress : bool
        Progress bar and closing line on stderr.
    config : dict, optional
        Noted in ``run.json`` for the reader, e.g. the preset's options; does not decide what is reused.
    engine : {"local", "ray"}
        Run the models in this process, or in the workers of a Ray cluster (a preset is needed for that, as
        the workers load the models themselves). The store is the same.
    ray : RayOptions, optional
        How many workers, and where; see :mod:`itemkit.pipeline.engine_ray`.

    Returns
    -------
    ExtractReport

    Raises
    ------
    InputError
        The manifest is unusable.
    StoreError
        The folder is no store, was made otherwise, is in use, or cannot be written; what was finished is
        intact.
    KeyboardInterrupt
        After Ctrl-C, once everything computed is on disk.
    """
    manifest = _checked(manifest, captions, missing, limit)
    if captions not in ("generate", "user") or missing not in ("raise", "generate", "error"):
        raise InputError(
            f"got captions={captions!r}, missing={missing!r}; expected 'generate' or 'user', and for missing "
            "'raise', 'generate' or 'error'"
        )
    decode = decode or DecodeConfig()
    if on_error not in ("row", "raise"):
        raise InputError(f"got on_error={on_error!r}; choose 'row' or 'raise'")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"got batch_size={batch_size}; give at least 1, or None for the device's default")
    if engine not in ("local", "ray"):
        raise InputError(f"got engine={engine!r}; choose 'local' or 'ray'")
    if isinstance(components, str):
        from itemkit.presets import get_preset

        components = get_preset(components)
    if config is None and hasattr(components, "record"):
        config = components.record()
    chosen: Engine
    if engine == "ray":
        from itemkit.pipeline.engine_ray import RayEngine, RayOptions, builder_of

        build = builder_of(components, device)
        chosen = RayEngine(build, ray or RayOptions(), decode, transform, batch_size)
        models = chosen.describe()
    else:
        models = components.build(device) if hasattr(components, "build") else components
        chosen = LocalEngine(models, decode, transform, batch_size)
    started = time.perf_counter()
    if models.captioner is None and (captions == "generate" or missing == "generate"):
        raise InputError("there is no captioner to make captions with; give one, or pass captions='user'")
    raise_malloc_thresholds()
    run = _run_head(manifest, Path(out), models, captions, transform, decode, config)
    with StoreWriter(out, run, shard_size) as writer, StopSignal() as stop:
        job = Extraction(manifest, writer, captions, missing, on_error, retry_errors)
        job.compute(chosen, stop, flush_seconds, progress)
        report = _finish(job, started, stop.requested is not None)
        if progress:
            print(report, file=sys.stderr, flush=True)
        if stop.requested is not None:
            print(
                f"stopped; everything computed so far is in {out}. Run the same command again to go on",
                file=sys.stderr,
                flush=True,
            )
            stop.leave()
    return report


def _checked(manifest: pd.DataFrame, captions: str, missing: str, limit: int | None) -> pd.DataFrame:
    if schema.PATH not in manifest:
        raise InputError(f"the manifest has no column '{schema.PATH}', only {list(manifest.columns)}")
    if limit is not None:
        if limit < 1:
            raise InputError(f"got limit={limit}; give a number of images of at least 1")
        manifest = manifest.iloc[:limit]
    if not len(manifest):
        raise InputError("the manifest has no rows; nothing to extract")
    if manifest[schema.PATH].isna().any():
        row = int(np.flatnonzero(manifest[schema.PATH].isna())[0])
        raise InputError(f"row {row} of the manifest has no path; give one or drop the row")
    manifest = manifest.assign(**{schema.PATH: _paths(manifest[schema.PATH])})
    if schema.LABEL in manifest:
        _check_labels(manifest[schema.LABEL])
    if captions == "user":
        manifest = with_clean_captions(manifest)
        nothing = pd.Series(pd.NA, manifest.index)
        column = manifest[schema.CAPTION] if schema.CAPTION in manifest else nothing
        without = column.isna() | (column.astype("string").str.strip() == "")
        if without.any() and missing == "raise":
            first = manifest[schema.PATH][without].iloc[0]
            raise InputError(
                f"{int(without.sum())} of {len(manifest)} images have no caption; first: {first}. Add it "
                "(one of links, mentions and emoji only counts as none), or pass missing='generate' (the "
                "captioner fills in) or missing='error' (an error row for each)"
            )
    return manifest.reset_index(drop=True)


def _paths(column: pd.Series) -> list[str]:
    """Paths as text that a store can hold."""
    paths = [os.fspath(path) if isinstance(path, os.PathLike) else path for path in column]
    for row, path in enumerate(paths):
        if not isinstance(path, str):
            kind = type(path).__name__
            raise InputError(f"row {row} of the manifest has {path!r} ({kind}) as its path; expected a text")
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"row {row} of the manifest has the path {path!r}, which is not UTF-8 and cannot be noted in "
                "a store; rename the file or drop the row"
            ) from None
    return paths


def _check_labels(column: pd.Series) -> None:
    missing = column.isna().to_numpy()
    for row, label in enumerate(column):
        if not missing[row] and label not in (schema.REAL, schema.FAKE):
            raise InputError(
                f"row {row} of the manifest has the label {label!r}; expected {schema.REAL} for real, "
                f"{schema.FAKE} for fake or nothing (itemkit.manifest.read_manifest also takes words)"
            )


def _run_head(
    manifest: pd.DataFrame,
    out: Path,
    components: Components,
    captions: str,
    transform: Callable[..., Any] | None,
    decode: DecodeConfig,
    config: dict | None,
) -> dict:
    if transform is not None and not hasattr(transform, "fingerprint"):
        raise InputError(
            f"transform {transform!r} has no fingerprint(), which the cache needs to tell it apart"
        )
    parts = fingerprint(components, captions)
    parts["transform"] = None if transform is None else transform.fingerprint()
    parts["decode"] = decode.loader
    parts = json.loads(json.dumps(parts))  # as it will be read back: tuples become lists
    paths = [os.path.abspath(path) for path in manifest[schema.PATH]]
    return {
        "kind": store.KIND,
        "schema_version": schema.SCHEMA_VERSION,
        "complete": False,
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        "dim": int(components.encoder.dim),
        "root": store.portable_root(store.common_root(paths), out),
        "fingerprint": parts,
        "fingerprint_hash": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16],
        "config": config,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    versions = {"itemkit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _finish(job: Extraction, started: float, stopped: bool) -> ExtractReport:
    """Write manifest, errors and run.json; say what was done."""
    with job.profile("write"):
        manifest, errors = job.tables()
        good = np.ones(len(job.status), bool)
        good[list(job.errors)] = False
        reused, computed, copies = (int((good & (job.status == s)).sum()) for s in (REUSED, COMPUTED, COPY))
        left = len(good) - reused - computed - copies - len(job.errors)
        before, complete = job.writer.run["complete"], not stopped and not left
        if before and not complete:
            # before the tables: whatever cuts this short, nobody takes a part for the whole
            job.writer.write_run(complete=False)
        changed = job.writer.write_tables(manifest, errors)
    captions = count_cut(job.writer.folder, job.writer.run, job.feature[good])
    report = ExtractReport(
        out=job.writer.folder,
        n=len(good),
        reused=reused,
        computed=computed,
        copies=copies,
        errors=len(job.errors),
        left=left,
        seconds=time.perf_counter() - started,
        stages={name: round(job.profile.seconds[name], 3) for name in STAGES},
        batch_size=job.batch_size,
        captions=captions,
    )
    if changed or computed or job.writer.moved or complete != before:
        skipped = ("out", "captions")
        last = {key: value for key, value in dataclasses.asdict(report).items() if key not in skipped}
        last |= {"images_per_s": round(report.images_per_s, 2), "seconds": round(report.seconds, 2)}
        counts = {
            "images": report.n,
            "errors": report.errors,
            "features": len(job.stored) + int((job.status == COMPUTED).sum()),
            "shards": len(store.shard_files(job.writer.folder)),
        }
        job.writer.write_run(complete=complete, counts=counts, captions=captions, last_run=last)
    return report
