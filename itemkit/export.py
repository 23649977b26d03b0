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
from itemkit.features import ARRAYS, BOX_COLUMNS, FOUND, Features, unit_rows

IMAGE_PATH = "image_path"  # clip-retrieval's name of the path column


def export(features: Features, folder: str | Path, layout: str) -> None:
    """Write features into a new folder, in the layout of "clip-retrieval" or of "numpy".

    Regions and phrases have no place in the former; its embeddings are float16.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder for the export")
    if layout == "numpy":
        np.savez(folder / "embeddings.npz", **{name: getattr(features, name) for name in (*ARRAYS, "owner")})
        features.table.to_parquet(folder / "table.parquet", index=False)
        features.objects.to_parquet(folder / "objects.parquet", index=False)
        return
    for name, array in (("img_emb", features.image_emb), ("text_emb", features.caption_emb)):
        (folder / name).mkdir()
        np.save(folder / name / f"{name}_0.npy", array.astype(np.float16))
    (folder / "metadata").mkdir()
    table = features.table.rename(columns={schema.PATH: IMAGE_PATH})
    table.to_parquet(folder / "metadata" / "metadata_0.parquet", index=False)


def import_clip_retrieval(folder: str | Path) -> Features:
    """Read ``img_emb/*.npy`` and, where they are there, ``text_emb/*.npy`` and ``metadata/*.parquet``."""

    def files(pattern: str) -> list[Path]:  # in the order of their numbers
        return sorted(Path(folder).glob(pattern), key=lambda path: [*map(int, re.findall(r"\d+", path.stem))])

    image, text = ([_read(file) for file in files(f"{name}/*.npy")] for name in ("img_emb", "text_emb"))
    if not image:
        raise InputError(f"{folder} has no img_emb/*.npy; give a folder in the layout of clip-retrieval")
    names = [f"{Path(folder).name}#{i}" for i in range(sum(map(len, image)))]
    tables = [_read(file) for file in files("metadata/*.parquet")] or [pd.DataFrame({schema.PATH: names})]
    text_emb = np.concatenate(text) if text else None
    return from_arrays(np.concatenate(image), pd.concat(tables, ignore_index=True), text_emb)


def import_npy(image_emb: str | Path, table: str | Path, caption_emb: str | Path | None = None) -> Features:
    """Read ``.npy`` files beside a CSV or Parquet table, row by row; see `from_arrays`."""
    return from_arrays(_read(image_emb), _read(table), None if caption_emb is None else _read(caption_emb))


def _read(path: str | Path) -> np.ndarray | pd.DataFrame:
    kinds = {".npy": np.load, ".parquet": pd.read_parquet, ".csv": pd.read_csv}
    try:
        return kinds[Path(path).suffix](path)
    except (OSError, ValueError, KeyError) as error:  # also pyarrow's and pandas' own errors
        raise InputError(f"{path} cannot be read ({error}); give a .npy, .csv or .parquet file") from error


def from_arrays(
    image_emb: np.ndarray, table: pd.DataFrame, caption_emb: np.ndarray | None = None
) -> Features:
    """Features without objects, from embeddings made elsewhere.

    Parameters
    ----------
    image_emb, caption_emb : float array, shape (n, d)
        Of one joint space, normalised here; captions are of width 0 if not given.
    table : DataFrame, n rows
        Whatever is known of each image; ``image_path`` stands for ``path``, missing columns become empty.
        Labels are 0 or ``real``, 1 or ``fake``, or empty. Without ``image_id``, each row's embedding and path
        make one, so equal rows are one image.

    Raises
    ------
    InputError
        Shapes that do not belong together, an embedding that is not finite, an unknown label.
    """
    n, image_emb = len(table), np.asarray(image_emb)
    captions = np.zeros((n, 0)) if caption_emb is None else np.asarray(caption_emb)
    for name, x in (("image", image_emb), ("caption", captions)):
        if x.dtype.kind != "f" or x.ndim != 2 or len(x) != n or x.shape[1] not in (0, image_emb.shape[1]):
            expected = f"expected floats of shape ({n}, d), one d for both"
            raise InputError(f"{name} embeddings are {x.dtype} of shape {x.shape}, {expected}")
        if len(wrong := np.flatnonzero(~np.isfinite(x).all(axis=1))):
            raise InputError(f"{name} embedding {wrong[0]} is not finite; compute it again or drop the row")
    table = table.reset_index(drop=True).rename(columns={IMAGE_PATH: schema.PATH})
    for column in schema.MANIFEST_COLUMNS:
        if column not in table:
            table[column] = pd.array([pd.NA] * n, dtype="string")
    # a column of numbers with gaps comes as floats
    words = table[schema.LABEL].astype("string").str.strip().str.casefold().str.removesuffix(".0")
    known = {word: label for label, name in schema.LABEL_NAMES.items() for word in (str(label), name)}
    if len(unknown := words[~words.isin([*known, ""]) & words.notna()]):
        raise InputError(f"row {unknown.index[0]} has the label '{unknown.iloc[0]}'; use real, fake, 0 or 1")
    table[schema.LABEL] = words.map(known).astype("Int8")
    image, caption = (np.array(x, dtype=np.float32) for x in (image_emb, captions))
    if schema.IMAGE_ID not in table:
        rows = zip(image, table[schema.PATH].fillna("").astype(str), strict=True)
        table[schema.IMAGE_ID] = [hashlib.sha256(x.tobytes() + path.encode()).hexdigest() for x, path in rows]
    table[schema.N_OBJECTS] = np.zeros(n, np.int32)
    nothing, owner = np.zeros((0, image.shape[1]), np.float32), np.zeros(0, np.int64)
    objects = {"phrase": np.zeros(0, object)} | {name: np.zeros(0, np.float32) for name in BOX_COLUMNS}
    objects[FOUND] = np.zeros(0, bool)
    embeddings = unit_rows(image), unit_rows(caption), nothing, nothing
    return Features(table, *embeddings, owner, pd.DataFrame(objects))
