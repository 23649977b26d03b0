"""Where to look, what to name, how to join: the table that the defaults of preset ``mini`` rest on.

Every localiser with whole phrases and with bare nouns, read by every recipe, under the camera and after one
random JPEG. What is *chosen* is chosen by the AUROC on validation images of the generator trained on; what is
*reported* beside it, on test images of families not trained on, decides nothing.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from itemkit import schema, workflow
from itemkit.features import Features
from itemkit.matrix import train_on_test_on
from itemkit.perturb import jpeg_random
from itemkit.presets import get_preset
from itemkit.protocols import get_protocol
from itemkit.recipes import item
from minilab.grammar import SETTINGS

LOCALISERS = ("whole", "grid", "dense", "object_detector")
OBJECTS = ("chunk", "noun")
HEADS = {
    "global alone": "global_absolute",
    "vectors, side by side": "absolute",
    "cosines, side by side": "cosines",
    "relative cosines, side by side": "cosines_relative",
    "vectors, Σ": "drawn",
    "numbers, Σ": "drawn_scalar",
}
"""Name in the table: recipe of `itemkit.misalignment`."""
CONDITIONS = {"camera": None, "camera + random JPEG": jpeg_random()}
TRAIN_ON = ("flow", "latent_flow")
"""The best generator of two families."""
SEEDS = range(5)


def choices(out: Path, device: str = "cpu", jobs: int = 2) -> pd.DataFrame:
    """Train and judge every combination.

    Parameters
    ----------
    out : Path
        Gets features and runs; what is there is not made again.
    device : str
    jobs : int
        Heads trained side by side.

    Returns
    -------
    DataFrame
        ``condition, localiser, objects, fusion``; ``seen``: mean AUROC on those validation images of the
        generators trained on that did not stop the training; ``unseen``: mean AUROC on test images of unseen
        families, with ``low, high`` (95 % over images); ``worst``: the weakest of these cells; ``ground``:
        share of real test images whose worst object is a setting.
    """
    rows = []
    for condition, transform in CONDITIONS.items():
        plain = workflow.features("mini", None, out, device, transform=transform)
        told = plain.table.set_index(schema.PATH)[schema.CAPTION]  # the captioner is the same for all
        found = {
            (where, what): workflow.features(
                "mini", None, out, device, name="choices", transform=transform, captions=told,
                localiser=where, parser_options=dict(get_preset("mini").parser_options) | {"unit": what},
            )
            for where, what in product(LOCALISERS, OBJECTS)
        }  # fmt: skip
        recipes = {
            f"{where}, {what}, {name}": item(recipe, features=found[where, what])
            for (where, what), (name, recipe) in product(found, HEADS.items())
        }
        study = train_on_test_on(
            plain, recipes, SEEDS, train_generators=TRAIN_ON, jobs=jobs, metrics=("auroc",),
            families=get_protocol("mini").families, out=Path(out) / "choices" / condition, progress=True,
        )  # fmt: skip
        for (where, what), (name, _) in product(found, HEADS.items()):
            full = f"{where}, {what}, {name}"
            seen = [roc_auc_score(r.val_labels, r.val_scores) for r in study.runs if r.detector == full]
            cells = study.unseen(full, "auroc")
            mean, worst = study.mean(cells), study.mean(study.worst(cells))
            rows.append(
                {"condition": condition, "localiser": where, "objects": what, "fusion": name,
                 "seen": np.mean(seen), "unseen": mean["value"], "low": mean["low"], "high": mean["high"],
                 "worst": worst["value"], "worst_low": worst["low"], "worst_high": worst["high"],
                 "ground": worst_is_ground(found[where, what])}
            )  # fmt: skip
    return pd.DataFrame(rows).round(4)


def worst_is_ground(features: Features) -> float:
    """Share of real test images whose worst object, by its cosine, is the setting."""
    real = features.split("test")
    real = real.select(real.labels == schema.REAL)
    fit = (real.region_emb * real.phrase_emb).sum(1)
    objects = real.objects.assign(fit=fit, owner=real.owner)
    worst = objects.loc[objects.groupby("owner")["fit"].idxmin(), "phrase"]
    return float(worst.str.split().str[-1].isin(SETTINGS).mean())
