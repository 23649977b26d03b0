"""The detector of the mini preset, trained on all generators of the laboratory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from itemkit.detector import Detector
from itemkit.features import concat_features
from itemkit.presets import mini_folder
from itemkit.workflow import features, lab_manifest, train_detector


@contextmanager
def laboratory(folder: Path | None) -> Iterator[None]:
    """Make a folder the mini laboratory of this process: its models are the mini preset, its images the data.

    Parameters
    ----------
    folder : Path or None
        Like ``data/mini``; None leaves the one that itemkit finds by itself.
    """
    if folder is None:
        yield
        return
    before = os.environ.get("ITEMKIT_DATA")
    with tempfile.TemporaryDirectory() as root:
        Path(root, "mini").symlink_to(folder.resolve(), target_is_directory=True)
        os.environ["ITEMKIT_DATA"] = root  # under which itemkit looks for a folder called mini
        try:
            yield
        finally:
            if before is None:
                del os.environ["ITEMKIT_DATA"]
            else:
                os.environ["ITEMKIT_DATA"] = before


def train_shipped(out: Path, device: str = "auto", **models: Any) -> Detector:
    """Train the detector as it is shipped.

    The data set's 120 validation reals are too few for a rate of 1 %: half of them calibrate, 99 are needed.
    So the new renders of the val split join them; those of the test split stay unseen.

    Parameters
    ----------
    out : Path
        Where the images and features go.
    device : str
    models : parts of the preset to replace, as of `itemkit.get_preset`
    """
    known = features("mini", None, out, device, **models)
    # the same store as the study's, so whichever comes second finds it made
    renders = lab_manifest(out, "fresh")
    fresh = features("mini", renders, out, device, name="fresh", **models)
    # all 400 of the val split: none of them is to be carved off for training, which has reals enough
    chosen = fresh.table["path"].isin(renders.loc[renders["split"] == "val", "path"])
    val = fresh.select(chosen.to_numpy())
    val = replace(val, table=val.table.assign(split="val"))
    return train_detector(concat_features([known, val]), device=device)


def save_detector(out: Path, device: str = "auto") -> Path:
    """Train it and save it beside the laboratory's models; returns its folder."""
    return Path(train_shipped(out, device).save(mini_folder() / "models" / "detector"))
