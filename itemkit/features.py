"""The table of features in memory: one row per image, one per semantic object, and all done to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from itemkit import __version__, schema, text
from itemkit.errors import InputError

IMAGE_ARRAYS = (schema.IMAGE_EMB, schema.CAPTION_EMB)
OBJECT_ARRAYS = (schema.REGION_EMB, schema.PHRASE_EMB)
ARRAYS = (*IMAGE_ARRAYS, *OBJECT_ARRAYS)
BOX_COLUMNS = ("x0", "y0", "x1", "y1", "score")  # float32
FOUND = "found"  # bool


@dataclass
class Features:
    """Embeddings of a set of images, from which every misalignment is derived.

    Embeddings are L2-normalised float32 rows of the joint space; n images have m semantic objects in all.
    """

    table: pd.DataFrame  # n rows: image_id, path, label, generator, source, split, caption, n_objects ...
    image_emb: np.ndarray  # (n, d), of each whole image
    caption_emb: np.ndarray  # (n, d), of its caption
    region_emb: np.ndarray  # (m, d), of each object's region
    phrase_emb: np.ndarray  # (m, d), of its phrase
    owner: np.ndarray  # (m,), int64: the row of `table` to which each object belongs; ascending
    # m rows: phrase; x0, y0, x1, y1 in pixels of the original image; score, an object detector's confidence,
    # NaN of other localisers; found, False where there was no box and a stand-in took its place
    objects: pd.DataFrame
    run: dict = field(default_factory=dict)  # the store's run.json
    pixels: np.ndarray | None = None  # (n, h, w, 3), uint8, for the pixel controls only; never stored

    def __len__(self) -> int:
        return len(self.table)

    @property
    def dim(self) -> int:
        """Width d of the joint space."""
        return int(self.image_emb.shape[1])

    @property
    def labels(self) -> np.ndarray:
        """Labels as an int64 array, 0 real and 1 fake; raises if some are unknown."""
        column = self.table[schema.LABEL]
        if column.isna().any():
            first = self.table.loc[column.isna(), schema.PATH].iloc[0]
            some = f"{int(column.isna().sum())} of {len(column)} images have no label"
            raise InputError(f"{some}, the first is {text.printable(first)}; give it one or leave it out")
        return column.to_numpy(dtype=np.int64)

    @property
    def provenance(self) -> dict[str, Any]:
        """What made these features, to be kept beside every number derived from them.

        ``models``: 16 hex digits of a fingerprint, "" for embeddings made elsewhere; ``note``: of mini.
        """
        preset = (self.run.get("config") or {}).get("name", "")
        note = ""
        if preset == "mini":
            ours = schema.SOURCE in self.table and (self.table[schema.SOURCE] == schema.LAB_SOURCE).all()
            note = schema.LAB_NOTE if ours else schema.MINI_WARNING
        version = (self.run.get("versions") or {}).get("itemkit", __version__)
        models = self.run.get("fingerprint_hash", "")
        return {"itemkit": version, "preset": preset, "models": models, "note": note}

    def select(self, rows: np.ndarray | pd.Series) -> Features:
        """Keep some images, with their objects.

        Parameters
        ----------
        rows : boolean mask of length n, or integer positions without repeats, which give the order
        """
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        if len(np.unique(rows)) != len(rows):
            raise ValueError("select() was given a row twice; repeat rows on the arrays, not on Features")
        new_row = np.full(len(self), -1, dtype=np.int64)
        new_row[rows] = np.arange(len(rows))
        those = np.flatnonzero(new_row[self.owner] >= 0)
        those = those[np.argsort(new_row[self.owner[those]], kind="stable")]
        return dataclasses.replace(
            self,
            table=self.table.iloc[rows].reset_index(drop=True),
            owner=new_row[self.owner[those]],
            objects=self.objects.iloc[those].reset_index(drop=True),
            pixels=None if self.pixels is None else self.pixels[rows],
            **{name: getattr(self, name)[rows] for name in IMAGE_ARRAYS},
            **{name: getattr(self, name)[those] for name in OBJECT_ARRAYS},
        )

    def split(self, name: str) -> Features:
        """Select the labelled images of split "train", "val" or "test"; raises if there is none."""
        split = self.table[schema.SPLIT].astype(object)
        split = split.where(self.table[schema.LABEL].notna(), "without label")
        rows = split.isin([name]).to_numpy()
        if not rows.any():
            there = ", ".join(f"{split} ({n:,})" for split, n in split.value_counts().items()) or "none"
            raise InputError(f"no labelled image has split '{name}'; splits there are: {there}")
        return self.select(rows)

    def with_generators(self, names: Sequence[str]) -> Features:
        """Select all real images and the fake ones of these generators; each must have some."""
        column = self.table[schema.GENERATOR]
        fakes = sorted(set(column.dropna()) - {schema.REAL_GENERATOR})
        for name in [name for name in names if name not in fakes]:
            hint, there = text.did_you_mean(name, fakes), ", ".join(map(text.printable, fakes)) or "none"
            raise InputError(f"no image of generator '{name}'.{hint} Generators there are: {there}")
        return self.select(column.isin([schema.REAL_GENERATOR, *names]).to_numpy(dtype=bool))


def select_objects(features: Features, kept: np.ndarray) -> Features:
    """Keep some objects, by a mask or ascending positions, of every image."""
    kept = np.flatnonzero(kept) if kept.dtype == bool else kept
    owner = features.owner[kept]
    counts = np.bincount(owner, minlength=len(features)).astype(np.int32)
    return dataclasses.replace(
        features,
        table=features.table.assign(**{schema.N_OBJECTS: counts}),
        owner=owner,
        objects=features.objects.iloc[kept].reset_index(drop=True),
        **{name: getattr(features, name)[kept] for name in OBJECT_ARRAYS},
    )


def concat_features(parts: Sequence[Features]) -> Features:
    """Put features of several sets of images, made the same way, one after the other.

    The result has the first one's ``run``, and ``pixels`` where all parts have them.
    """
    starts = np.cumsum([0] + [len(part) for part in parts])
    pixels = [part.pixels for part in parts if part.pixels is not None]
    return Features(
        table=pd.concat([part.table for part in parts], ignore_index=True),
        owner=np.concatenate([part.owner + start for part, start in zip(parts, starts, strict=False)]),
        objects=pd.concat([part.objects for part in parts], ignore_index=True),
        run=parts[0].run,
        pixels=np.concatenate(pixels) if len(pixels) == len(parts) else None,
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS},
    )


def bad_rows(features: Features) -> np.ndarray:
    """Mask of rows with an embedding not finite or not of unit length: a model broke down on that image."""
    bad = np.zeros(len(features), dtype=bool)
    for name in ARRAYS:
        off = ~(np.abs(np.linalg.norm(getattr(features, name), axis=1) - 1) < 1e-2)
        bad[np.flatnonzero(off) if name in IMAGE_ARRAYS else features.owner[off]] = True
    return bad


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Bring rows to unit length in place (float16 storage is off by up to 1e-3)."""
    step = 65536  # keeps the temporary square small for millions of rows
    for i in range(0, len(x) if x.shape[1] else 0, step):
        part = x[i : i + step]
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return x
