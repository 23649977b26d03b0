"""Features in the layouts of other tools, and image embeddings made by them.

Two layouts: the one of clip-retrieval (``img_emb/``, ``text_emb/``, ``metadata/``), which index builders and
data set browsers read; and a NumPy archive beside pandas tables, which holds everything itemkit knows.
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
PARTITION_ROWS = 1_000_000
NPZ_FILE, TABLE_FILE, OBJECTS_FILE = "embeddings.npz", "table.parquet", "objects.parquet"


def export_clip_retrieval(
    features: Features, folder: str | Path, partition_rows: int = PARTITION_ROWS
) -> Path:
    """Write image and caption embeddings in the layout of clip-retrieval.

    Parameters
    ----------
    features : Features
        Regions and phrases have no place in this layout and are left out.
    folder : path
        New or empty.
    partition_rows : int
        Images per file.

    Returns
    -------
    Path
        The folder, with ``img_emb/img_emb_0.npy`` and ``text_emb/text_emb_0.npy`` (float16) and
        ``metadata/metadata_0.parquet`` (``image_path, caption`` and the other columns of the table).
    """
    folder = _empty(folder)
    starts = range(0, max(len(features), 1), partition_rows)
    digits = len(str(len(starts) - 1))
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, start in enumerate(starts):
        rows, tag = slice(start, start + partition_rows), f"{number:0{digits}d}"
        np.save(folder / "img_emb" / f"img_emb_{tag}.npy", features.image_emb[rows].astype(np.float16))
        np.save(folder / "text_emb" / f"text_emb_{tag}.npy", features.caption_emb[rows].astype(np.float16))
        table = features.table.iloc[rows].rename(columns={schema.PATH: IMAGE_PATH})
        table.to_parquet(folder / "metadata" / f"metadata_{tag}.parquet", index=False)
    return folder


def import_clip_retrieval(folder: str | Path) -> Features:
    """Read embeddings in the layout of clip-retrieval, made by it or by any other tool.

    Parameters
    ----------
    folder : path
        With ``img_emb/*.npy``; ``text_emb/*.npy`` and ``metadata/*.parquet`` are optional.

    Returns
    -------
    Features
        Without objects; caption embeddings have width 0 where there are none.

    Raises
    ------
    InputError
        No image embeddings, or the files do not belong together.
    """
    folder = Path(folder)
    image = _load_parts(folder / "img_emb")
    if image is None:
        raise InputError(f"{folder} has no img_emb/*.npy; give a folder in the layout of clip-retrieval")
    text = _load_parts(folder / "text_emb")
    files = sorted((folder / "metadata").glob("*.parquet"), key=_number)
    if files:
        table = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
        table = table.rename(columns={IMAGE_PATH: schema.PATH})
    else:
        table = pd.DataFrame({schema.PATH: [f"{folder.name}#{i}" for i in range(len(image))]})
    return from_arrays(image, table, text)


def import_npy(image_emb: str | Path, table: str | Path, caption_emb: str | Path | None = None) -> Features:
    """Read embeddings made elsewhere: NumPy arrays beside a CSV or Parquet table, row by row.

    Parameters
    ----------
    image_emb : path of an ``.npy`` file, float, shape (n, d)
    table : path of a ``.csv`` or ``.parquet`` file, n rows
        With any of ``path, label, generator, source, split, caption``; other columns are kept.
    caption_emb : path of an ``.npy`` file, shape (n, d), optional
        From the same joint space.

    Returns
    -------
    Features
        As :func:`from_arrays` makes them.

    Raises
    ------
    InputError
        A file is missing or of another kind, or they do not belong together.
    """
    image, caption = _load_array(image_emb), None if caption_emb is None else _load_array(caption_emb)
    path = Path(table)
    try:
        rows = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:  # also pyarrow's and pandas' own errors
        raise InputError(f"{path} is no table ({error}); give a .csv or .parquet file") from error
    return from_arrays(image, rows.rename(columns={IMAGE_PATH: schema.PATH}), caption)


def _load_array(path: str | Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no array ({error}); give a .npy file written by numpy.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        what = getattr(array, "dtype", "several arrays")
        raise InputError(f"{path} holds {what}, expected one array of floats")
    return array


def from_arrays(
    image_emb: np.ndarray, table: pd.DataFrame, caption_emb: np.ndarray | None = None
) -> Features:
    """Features from embeddings made elsewhere.

    Parameters
    ----------
    image_emb : float array, shape (n, d)
        Normalised here.
    table : DataFrame, n rows
        Whatever is known per image; missing columns (label, generator, ...) become empty. Labels are 0 or
        ``real``, 1 or ``fake``, or empty. Without ``image_id``, each row's embedding and path make one, so
        equal rows are one image.
    caption_emb : float array, shape (n, d), optional
        From the same joint space.

    Returns
    -------
    Features
        Without objects; caption embeddings have width 0 where there are none.

    Raises
    ------
    InputError
        Lengths or widths that do not belong together, an embedding that is not finite, an unknown label.
    """
    n = len(table)
    captions = np.zeros((n, 0), np.float32) if caption_emb is None else caption_emb
    for name, x in (("image", image_emb), ("caption", captions)):
        if x.ndim != 2 or len(x) != n:
            raise InputError(
                f"{name} embeddings have shape {x.shape}; the table has {n} rows, so ({n}, d) is needed"
            )
        if not np.isfinite(x).all():
            row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
            raise InputError(f"{name} embedding {row} is not finite; compute it again or drop the row")
    if captions.shape[1] not in (0, image_emb.shape[1]):
        raise InputError(
            f"image embeddings have {image_emb.shape[1]} dimensions and caption embeddings "
            f"{captions.shape[1]}; both must come from one joint space"
        )
    table = table.reset_index(drop=True).copy()
    for column in schema.MANIFEST_COLUMNS:
        if column not in table:
            table[column] = pd.array([pd.NA] * n, dtype="string")
    table[schema.LABEL] = _labels(table[schema.LABEL])
    if schema.IMAGE_ID not in table:
        table.insert(0, schema.IMAGE_ID, _image_ids(image_emb, table[schema.PATH]))
    table[schema.N_OBJECTS] = np.zeros(n, np.int32)
    d = image_emb.shape[1]
    return Features(
        table=table,
        image_emb=unit_rows(np.array(image_emb, dtype=np.float32)),
        caption_emb=unit_rows(np.array(captions, dtype=np.float32)),
        region_emb=np.zeros((0, d), np.float32),
        phrase_emb=np.zeros((0, d), np.float32),
        owner=np.zeros(0, np.int64),
        objects=pd.DataFrame(
            {"phrase": pd.Series(dtype=object), **{c: np.zeros(0, np.float32) for c in BOX_COLUMNS}}
        ),
    )


def _labels(column: pd.Series) -> pd.Series:
    """Labels as 0, 1 or missing, from these numbers or their names."""
    known = {**{str(k): k for k in schema.LABEL_NAMES}, **{name: k for k, name in schema.LABEL_NAMES.items()}}
    # a column of numbers with gaps comes as floats
    words = column.astype("string").str.strip().str.casefold().str.removesuffix(".0")
    labels = words.map(known).astype("Int8")
    unknown = labels.isna() & words.notna() & (words != "")
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise InputError(
            f"row {row} has the label '{column.iloc[row]}' ({int(unknown.sum())} unknown in all); expected "
            "0 or real, 1 or fake, or nothing"
        )
    return labels


def _image_ids(image_emb: np.ndarray, paths: pd.Series) -> list[str]:
    """What tells the images apart, in place of the hash of a file that is not here."""
    rows = np.ascontiguousarray(image_emb, dtype=np.float32)
    named = paths.fillna("").astype(str)
    return [
        hashlib.sha256(x.tobytes() + path.encode()).hexdigest() for x, path in zip(rows, named, strict=True)
    ]


def export_numpy(features: Features, folder: str | Path) -> Path:
    """Write everything as one NumPy archive and two pandas tables.

    Returns
    -------
    Path
        The folder, with ``embeddings.npz`` (``image_emb, caption_emb, region_emb, phrase_emb``, float32, and
        ``owner``), ``table.parquet`` (one row per image) and
        ``objects.parquet`` (one row per object).
    """
    folder = _empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / NPZ_FILE, owner=features.owner, **{name: getattr(features, name) for name in ARRAYS})
    features.table.to_parquet(folder / TABLE_FILE, index=False)
    features.objects.to_parquet(folder / OBJECTS_FILE, index=False)
    return folder


def import_numpy(folder: str | Path) -> Features:
    """Read what :func:`export_numpy` wrote; ``run`` is empty, as the models are not part of that layout."""
    folder = Path(folder)
    missing = [name for name in (NPZ_FILE, TABLE_FILE, OBJECTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}; give a folder written by export_numpy")
    with np.load(folder / NPZ_FILE, allow_pickle=False) as arrays:
        parts = {name: arrays[name] for name in (*ARRAYS, "owner")}
    table, objects = pd.read_parquet(folder / TABLE_FILE), pd.read_parquet(folder / OBJECTS_FILE)
    if len(table) != len(parts[schema.IMAGE_EMB]) or len(objects) != len(parts["owner"]):
        raise InputError(f"the files in {folder} do not belong together; export the features again")
    return Features(table=table, objects=objects, **parts)


def _empty(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder for the export")
    return folder


def _number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits else 0, path.name)


def _load_parts(folder: Path) -> np.ndarray | None:
    files = sorted(folder.glob("*.npy"), key=_number)
    if not files:
        return None
    return np.concatenate([np.load(file, allow_pickle=False).astype(np.float32) for file in files])
