"""Captions that come with the images: cleaned before anything is keyed by them, and none cut silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from itemkit import schema
from itemkit.captions.cleaning import clean_caption
from itemkit.store import FEATURE_ID, read_shard, shard_files

POSTED = "caption_posted"  # column of the manifest and of features: the caption as it came


def with_clean_captions(manifest: pd.DataFrame) -> pd.DataFrame:
    """Clean the captions of a manifest; the original stays beside each one that changed.

    Parameters
    ----------
    manifest : DataFrame

    Returns
    -------
    DataFrame
        ``caption`` as ``clean_caption`` gives it, missing where nothing is left; where any changed, also
        ``caption_posted``, empty where it did not.
    """
    if schema.CAPTION not in manifest:
        return manifest
    given = manifest[schema.CAPTION].astype(object)
    clean = given.map(lambda text: clean_caption(str(text)) or None, na_action="ignore")
    changed = given.notna() & (given != clean)
    manifest = manifest.assign(**{schema.CAPTION: clean})
    return manifest.assign(**{POSTED: given.where(changed, None)}) if changed.any() else manifest


def count_cut(folder: Path, run: dict[str, Any], features: np.ndarray) -> dict[str, Any]:
    """Count the captions of a store that are longer than its encoder reads.

    Read from the store, not counted on the way: so it holds for what earlier runs computed, too.

    Parameters
    ----------
    folder : Path
        A feature store, all shards written.
    run : dict
        Its ``run.json``; without a ``context_length`` in the encoder's fingerprint nothing can be told.
    features : bytes array
        Ids of the features that count.

    Returns
    -------
    dict
        ``cut`` (how many), ``room`` (tokens the encoder reads, start and end included), and where any is cut
        ``longest`` (in tokens) and ``first`` (path of its image).
    """
    room = (run["fingerprint"].get("encoder") or {}).get("context_length")
    if not room:
        return {}
    found = []
    for path in shard_files(folder):
        shard = read_shard(path, [FEATURE_ID, schema.PATH, schema.CAPTION_TOKENS])
        found.append(shard.filter(pc.greater(shard[schema.CAPTION_TOKENS], room)).to_pandas())
    long = pd.concat(found) if found else pd.DataFrame({FEATURE_ID: []})
    ids = np.array([bytes.fromhex(one) for one in long[FEATURE_ID]], "S32")
    long = long[np.isin(ids, features)]
    if not len(long):
        return {"cut": 0, "room": int(room)}
    longest = int(long[schema.CAPTION_TOKENS].max())
    return {"cut": len(long), "room": int(room), "longest": longest, "first": str(long[schema.PATH].iloc[0])}


def told(counts: dict[str, Any]) -> str:
    """Say in one line what `count_cut` found; "" where nothing was cut."""
    if not counts.get("cut"):
        return ""
    many = "s are" if counts["cut"] > 1 else " is"
    return (
        f"{counts['cut']} caption{many} longer than the {counts['room']} tokens the encoder reads, and cut "
        f"there for it (longest {counts['longest']}, first: {counts['first']}); objects were taken from "
        "whole captions"
    )
