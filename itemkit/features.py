"""The table of features in memory: one row per image, one row per semantic object."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.errors import InputError

IMAGE_NORMS = (schema.IMAGE_NORM, schema.CAPTION_NORM)
OBJECT_NORMS = (schema.REGION_NORM, schema.PHRASE_NORM)


@dataclass
class Features:
    """Raw embeddings of a set of images, from which every misalignment is derived.

    Attributes
    ----------
    table : DataFrame, n rows
        ``image_id, path, label, generator, source, split, caption, caption_logprob, n_objects, ...``.
    image_emb, caption_emb : float32 array, shape (n, d)
        L2-normalised embeddings of each whole image and of its caption.
    region_emb, phrase_emb : float32 array, shape (m, d)
        L2-normalised embeddings of each semantic object's region and of its phrase.
    owner : int64 array, shape (m,)
        Row of ``table`` to which each object belongs; ascending.
    objects : DataFrame, m rows
        ``phrase, x0, y0, x1, y1, score``; boxes in pixels of the original image.
    run : dict
        The store's ``run.json``: configuration, model fingerprints, versions, counts.
    pixels : uint8 array, shape (n, h, w, 3), optional
        The images themselves, all of one size, for the pixel baselines only; never stored.
    image_norm, caption_norm : float32 array, shape (n,), optional
        Lengths of the embeddings before they were normalised, in the encoder's own scale. None where no row
        has one (an older store, embeddings made elsewhere), NaN where some rows have none.
    region_norm, phrase_norm : float32 array, shape (m,), optional
        The same of each object's region and phrase.
    """

    table: pd.DataFrame
    image_emb: np.ndarray
    caption_emb: np.ndarray
    region_emb: np.ndarray
    phrase_emb: np.ndarray
    owner: np.ndarray
    objects: pd.DataFrame
    run: dict = field(default_factory=dict)
    pixels: np.ndarray | None = None
    image_norm: np.ndarray | None = None
    caption_norm: np.ndarray | None = None
    region_norm: np.ndarray | None = None
    phrase_norm: np.ndarray | None = None

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
            raise InputError(
                f"{int(column.isna().sum())} of {len(column)} images have no label, the first is "
                f"{self.table.loc[column.isna(), schema.PATH].iloc[0]}; give labels in the manifest or "
                f"leave it out"
            )
        return column.to_numpy(dtype=np.int64)

    def select(self, rows: np.ndarray | pd.Series) -> Features:
        """Keep some images, with their objects.

        Parameters
        ----------
        rows : boolean mask of length n, or integer row positions (order is kept as given, no repeats).

        Returns
        -------
        Features
            The chosen rows in the given order.
        """
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        if len(np.unique(rows)) != len(rows):
            raise ValueError("select() was given a row twice; repeat rows on the arrays, not on Features")
        new_row = np.full(len(self), -1, dtype=np.int64)
        new_row[rows] = np.arange(len(rows))
        kept = np.flatnonzero(new_row[self.owner] >= 0)
        kept = kept[np.argsort(new_row[self.owner[kept]], kind="stable")]
        return Features(
            table=self.table.iloc[rows].reset_index(drop=True),
            image_emb=self.image_emb[rows],
            caption_emb=self.caption_emb[rows],
            region_emb=self.region_emb[kept],
            phrase_emb=self.phrase_emb[kept],
            owner=new_row[self.owner[kept]],
            objects=self.objects.iloc[kept].reset_index(drop=True),
            run=self.run,
            **{name: _take(getattr(self, name), rows) for name in ("pixels", *IMAGE_NORMS)},
            **{name: _take(getattr(self, name), kept) for name in OBJECT_NORMS},
        )


def norms_or_none(lengths: np.ndarray) -> np.ndarray | None:
    """The lengths, or None where not a single one is known."""
    return None if len(lengths) and np.isnan(lengths).all() else lengths


def _take(array: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[rows]
