"""Several stores become one: for a manifest that was divided among machines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from itemkit import schema, store
from itemkit._files import write_json
from itemkit.errors import InputError, StoreError
from itemkit.pipeline.user_captions import count_cut
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
        there once; where one part could not use it and another could, it has its features.

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
        both.append(pa.concat_tables(tables, promote_options="permissive"))
    _refuse_contradictions(both[0].to_pandas(), folders)
    manifest, errors = _each_once(*both)
    (out / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    # first and unfinished: whatever stops the copying, nobody takes what is there for the whole
    run = {**runs[0], "complete": False, "root": store.portable_root(root, out)}
    run |= {"captions": {}, "last_run": None}  # what was there told of the first part alone
    write_json(out / RUN_FILE, run)
    copied: set[str] = set()
    number = 0
    for folder, base in zip(folders, bases, strict=True):
        for path in store.shard_files(folder):
            shard = moved(store.read_shard(path), base)
            ids = shard[store.FEATURE_ID].to_pylist()
            shard = shard.filter(pa.array([one not in copied for one in ids], pa.bool_()))
            copied.update(ids)
            if len(shard):
                write_table(out / SHARD_FOLDER / f"part-{number:06d}.parquet", shard)
                number += 1
    write_table(out / MANIFEST_FILE, manifest)
    write_table(out / ERRORS_FILE, errors)
    counts = {"images": len(manifest), "errors": len(errors), "features": len(copied), "shards": number}
    used = [bytes.fromhex(one) for one in manifest[store.FEATURE_ID].to_pylist() if one]
    captions = count_cut(out, run, np.array(used, "S32"))
    write_json(out / RUN_FILE, {**run, "complete": True, "counts": counts, "captions": captions})
    return out


def _each_once(manifest: pa.Table, errors: pa.Table) -> tuple[pa.Table, pa.Table]:
    """One row for each image file and caption, in the order given: the one with features, if any has them.

    Only a label that contradicts another file's comes before that: it would if all were extracted at once.
    """
    names, failed = _keys(manifest), _keys(errors)
    contradicted = errors["stage"].to_pandas() == "label"
    has_features = manifest[store.FEATURE_ID].to_pandas().notna()
    rank = np.select([names.isin(failed[contradicted]) & ~has_features, has_features], [0, 1], 2)
    kept = _first_of_each(names, rank)
    done = set(names[kept & has_features])
    kept_errors = _first_of_each(failed, ~contradicted) & ~failed.isin(done)
    return manifest.filter(pa.array(kept)), errors.filter(pa.array(kept_errors))


def _keys(table: pa.Table) -> pd.Series:
    paths = table[schema.PATH].to_pandas()
    if schema.CAPTION not in table.column_names:
        return paths
    return paths + "\n" + table[schema.CAPTION].to_pandas().fillna("").astype(str)


def _first_of_each(keys: pd.Series, rank: np.ndarray | pd.Series) -> pd.Series:
    """Mark the row of lowest rank among those of one key, the first of them where several have it."""
    order = np.argsort(np.asarray(rank), kind="stable")
    return ~keys.iloc[order].duplicated().sort_index()


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
