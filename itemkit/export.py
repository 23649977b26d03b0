"""Features in the files of other tools, and embeddings made by them.

They leave in the layout of clip-retrieval (``img_emb/``, ``text_emb/``, ``metadata/``), which index builders
and data set browsers read; or as a NumPy archive beside pandas tables, with everything itemkit knows.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.errors import InputError
from itemkit.features import ARRAYS, BOX_COLUMNS, Features, unit_rows

IMAGE_PATH = "image_path"  # clip-retrieval's name of the path column


def export_clip_retrieval(features: Features, folder: str | Path) -> None:
    """Write image and caption embeddings into a new folder, in the layout of clip-retrieval.

    Regions and phrases have no place in it and are left out.
    """
    folder = _new(folder)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir()
    np.save(folder / "img_emb" / "img_emb_0.npy", features.image_emb.astype(np.float16))
    np.save(folder / "text_emb" / "text_emb_0.npy", features.caption_emb.astype(np.float16))
    table = features.table.rename(columns={schema.PATH: IMAGE_PATH})
    table.to_parquet(folder / "metadata" / "metadata_0.parquet", index=False)


def export_numpy(features: Features, folder: str | Path) -> None:
    """Write all arrays into ``embeddings.npz`` of a new folder, beside ``table`` and ``objects.parquet``."""
    folder = _new(folder)
    arrays = {name: getattr(features, name) for name in (*ARRAYS, "owner")}
    np.savez(folder / "embeddings.npz", **arrays)
    features.table.to_parquet(folder / "table.parquet", index=False)
    features.objects.to_parquet(folder / "objects.parquet", index=False)


def _new(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder for the export")
    return folder


def import_clip_retrieval(folder: str | Path) -> Features:
    """Read ``img_emb/*.npy`` and, where they are there, ``text_emb/*.npy`` and ``metadata/*.parquet``."""

    def files(pattern: str) -> list[Path]:  # in the order of their numbers
        return sorted(Path(folder).glob(pattern), key=lambda path: [*map(int, re.findall(r"\d+", path.stem))])

    image, text = ([_load(file) for file in files(f"{name}/*.npy")] for name in ("img_emb", "text_emb"))
    if not image:
        raise InputError(f"{folder} has no img_emb/*.npy; give a folder in the layout of clip-retrieval")
    names = pd.DataFrame({schema.PATH: [f"{Path(folder).name}#{i}" for i in range(sum(map(len, image)))]})
    tables = [pd.read_parquet(file) for file in files("metadata/*.parquet")]
    table = pd.concat(tables, ignore_index=True) if tables else names
    return from_arrays(np.concatenate(image), table, np.concatenate(text) if text else None)


def import_npy(image_emb: str | Path, table: str | Path, caption_emb: str | Path | None = None) -> Features:
    """Read ``.npy`` files beside a CSV or Parquet table, row by row; see `from_arrays`."""
    image, caption = _load(image_emb), None if caption_emb is None else _load(caption_emb)
    path = Path(table)
    try:
        rows = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:  # also pyarrow's and pandas' own errors
        raise InputError(f"{path} is no table ({error}); give a .csv or .parquet file") from error
    return from_arrays(image, rows, caption)


def _load(path: str | Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no array ({error}); give a .npy file written by numpy.save") from error
    if getattr(array, "dtype", np.dtype(int)).kind != "f":
        raise InputError(f"{path} does not hold one array of floats; give embeddings of shape (n, d)")
    return array


def from_arrays(
    image_emb: np.ndarray, table: pd.DataFrame, caption_emb: np.ndarray | None = None
) -> Features:
    """Features without objects, from embeddings made elsewhere.

    Parameters
    ----------
    image_emb : float array, shape (n, d)
        Normalised here.
    table : DataFrame, n rows
        Whatever is known of each image; ``image_path`` stands for ``path``, missing columns become empty.
        Labels are 0 or ``real``, 1 or ``fake``, or empty. Without ``image_id``, each row's embedding and path
        make one, so equal rows are one image.
    caption_emb : float array, shape (n, d), optional
        From the same joint space; of width 0 if not given.

    Raises
    ------
    InputError
        Shapes that do not belong together, an embedding that is not finite, an unknown label.
    """
    n, captions = len(table), np.zeros((len(table), 0)) if caption_emb is None else caption_emb
    for name, x in (("image", image_emb), ("caption", captions)):
        if x.ndim != 2 or len(x) != n or x.shape[1] not in (0, image_emb.shape[1]):
            raise InputError(f"{name} embeddings have shape {x.shape}, expected ({n}, d) with one d for both")
        if len(wrong := np.flatnonzero(~np.isfinite(x).all(axis=1))):
            raise InputError(f"{name} embedding {wrong[0]} is not finite; compute it again or drop the row")
    table = table.reset_index(drop=True).rename(columns={IMAGE_PATH: schema.PATH})
    for column in schema.MANIFEST_COLUMNS:
        if column not in table:
            table[column] = pd.array([pd.NA] * n, dtype="string")
    # a column of numbers with gaps comes as floats
    words = table[schema.LABEL].astype("string").str.strip().str.casefold().str.removesuffix(".0")
    known = {word: label for label, name in schema.LABEL_NAMES.items() for word in (str(label), name)}
    unknown = words[~words.isin([*known, ""]) & words.notna()]
    if len(unknown):
        raise InputError(f"row {unknown.index[0]} has the label '{unknown.iloc[0]}'; use real, fake, 0 or 1")
    table[schema.LABEL] = words.map(known).astype("Int8")
    image = np.array(image_emb, dtype=np.float32)
    if schema.IMAGE_ID not in table:
        rows = zip(image, table[schema.PATH].fillna("").astype(str), strict=True)
        table[schema.IMAGE_ID] = [hashlib.sha256(x.tobytes() + path.encode()).hexdigest() for x, path in rows]
    table[schema.N_OBJECTS] = np.zeros(n, np.int32)
    nothing, objects = np.zeros((0, image.shape[1]), np.float32), {"phrase": np.zeros(0, object)}
    objects |= {name: np.zeros(0, np.float32) for name in BOX_COLUMNS}
    caption, owner = unit_rows(np.array(captions, dtype=np.float32)), np.zeros(0, np.int64)
    return Features(table, unit_rows(image), caption, nothing, nothing, owner, pd.DataFrame(objects))
