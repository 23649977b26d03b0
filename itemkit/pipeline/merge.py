"""Several stores become one: for a manifest that was divided among machines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from itemkit import schema, store
from itemkit._files import write_json
from itemkit.errors import InputError, StoreError
from itemkit.pipeline.writer import write_table
from itemkit.store import ERRORS_FILE, MANIFEST_FILE, RUN_FILE, SHARD_FOLDER


def merge_stores(parts: Sequence[str | Path], out: str | Path) -> Path:
    """Put finished stores, made with the same models and options, into a new one.

    Parameters
    ----------
    parts : sequence of paths
        Stores of different parts of a data set; their images must lie where the stores say.
    out : path
        A new or empty folder. It can be continued with ``extract`` like any other store.

    Returns
    -------
    Path
        The new store, with the rows of all parts in their order. An image file that several parts hold is
        there once.

    Raises
    ------
    StoreError
        A part is no store, unfinished, or made otherwise than the first.
    InputError
        No parts, ``out`` is not empty, or two parts label the same content differently.
    """
    folders, out = [Path(part) for part in parts], Path(out)
    if not folders:
        raise InputError("merge_stores() was given no stores")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; give a new folder for the merged store")
    runs = [store.read_run(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if not run["complete"]:
            raise StoreError(f"the extraction into {folder} is not finished; run it again, then merge")
        if run["fingerprint"] != runs[0]["fingerprint"]:
            raise StoreError(f"{folder} was made with other models or options than {folders[0]}")
    bases = [str(store.store_root(folder, run)) for folder, run in zip(folders, runs, strict=True)]
    root = store.common_root([os.path.join(base, "x") for base in bases])

    def moved(table: pa.Table, base: str) -> pa.Table:
        whole = [os.path.normpath(os.path.join(base, path)) for path in table[schema.PATH].to_pylist()]
        paths = pa.array([store.relative_path(path, str(root)) for path in whole], pa.string())
        return table.set_column(table.column_names.index(schema.PATH), schema.PATH, paths)

    both = []
    for name in (MANIFEST_FILE, ERRORS_FILE):
        tables = [moved(store.read_shard(f / name), b) for f, b in zip(folders, bases, strict=True)]
        table = pa.concat_tables(tables, promote_options="permissive")
        keys = [key for key in (schema.PATH, schema.CAPTION) if key in table.column_names]
        first = ~table.select(keys).to_pandas().duplicated()
        both.append(table.filter(pa.array(first)))
    manifest, errors = both
    _refuse_contradictions(manifest.to_pandas(), folders)
    (out / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    # first and unfinished: whatever stops the copying, nobody takes what is there for the whole
    run = {**runs[0], "complete": False, "root": store.portable_root(root, out), "last_run": None}
    write_json(out / RUN_FILE, run)
    number = features = 0
    for folder, base in zip(folders, bases, strict=True):
        for path in store.shard_files(folder):
            shard = moved(store.read_shard(path), base)
            write_table(out / SHARD_FOLDER / f"part-{number:06d}.parquet", shard)
            number, features = number + 1, features + len(shard)
    write_table(out / MANIFEST_FILE, manifest)
    write_table(out / ERRORS_FILE, errors)
    counts = {"images": len(manifest), "errors": len(errors), "features": features, "shards": number}
    write_json(out / RUN_FILE, {**run, "complete": True, "counts": counts})
    return out


def _refuse_contradictions(manifest: pd.DataFrame, folders: Sequence[Path]) -> None:
    if schema.LABEL not in manifest:
        return
    known = manifest[manifest[schema.LABEL].notna() & manifest[store.FEATURE_ID].notna()]
    labels = known.groupby(schema.IMAGE_ID)[schema.LABEL].nunique()
    if (labels > 1).any():
        same = known[known[schema.IMAGE_ID] == labels.index[labels > 1][0]]
        names = ", ".join(f"{r.path} ({r.label})" for r in same.itertuples())
        raise InputError(
            f"files of the same content have different labels in the {len(folders)} stores: {names}; correct "
            "the manifests, extract again (nothing is computed twice), then merge"
        )
