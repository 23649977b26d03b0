"""Is misalignment only novelty? A joint space that has seen more is asked again, and one that has seen less.

If fakes fit their captions less well merely because CLIP has not seen their like, a CLIP trained on a wide
camera should find fewer of them, and accuse fewer innocents, than one that has seen this camera alone. Both
learn from the same scenes for the same number of steps; captioner and object detector are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from itemkit import schema, workflow
from itemkit.calibrate import proportion_interval
from itemkit.manifest import read_manifest
from itemkit.matrix import train_on_test_on
from itemkit.presets import mini_folder
from itemkit.protocols import get_protocol
from itemkit.recipes import control, item
from itemkit.text import markdown_table
from minilab import probes
from minilab.detector import train_shipped

FPR = 0.05
HEADS = {"misalignment, trained": item(), "mean local cosine, untrained": control("cosine_mean_local")}
ABOUT = """# Is misalignment only novelty?

{question}

Narrow: a CLIP trained on photographs of the data set's own camera alone; wide: the one of the preset.
The narrow one is made by `python -m minilab build clip_narrow novelty` and is not committed. One of
each, from one seed.

## Real scenes called fake

The detector of the preset, and the same detector trained and calibrated through the narrow CLIP: share
of real images above the threshold that promises {fpr:.0%}, in brackets 95 % over scenes, exact. Exposure
and warm light lie within the wide camera's range; the others do not.

{alarms}

## Fakes of unseen families

Trained on one generator of each family in turn, {seeds} seeds; mean AUROC over the unseen cells, in
brackets 95 % over images.

{found}
"""


def novelty(narrow: Path, out: Path, device: str = "cpu", seeds: Sequence[int] = range(5)) -> str:
    """Measure both, and tell it as a page.

    Parameters
    ----------
    narrow : Path
        Folder of the narrow CLIP.
    out : Path
        Gets features and runs; what is there is not made again.
    device : str
    seeds : sequence of int

    Returns
    -------
    str
        Markdown.
    """
    shown = pd.read_parquet(mini_folder() / "probes.parquet")[["image", "generator"]]
    shown = read_manifest(shown, images_to=Path(out) / "mini" / "probes")
    plan, alarms, found = get_protocol("mini"), {}, {}
    for seen, models in {"wide": {}, "narrow": {"encoder": str(narrow)}}.items():
        known = workflow.features("mini", None, out, device, **models)
        probed = workflow.features("mini", shown, out, device, name="probes", **models)
        detector = train_shipped(out, device, **models)
        fake = detector.decision_function(probed) > detector.threshold(FPR).value
        by = pd.Series(fake).groupby(probed.table[schema.GENERATOR].to_numpy())
        alarms[seen] = by.agg(["sum", "count"])
        study = train_on_test_on(
            known, HEADS, seeds, train_generators=plan.each, metrics=("auroc",), families=plan.families,
            out=Path(out) / "novelty" / seen,
        )  # fmt: skip
        found[seen] = {name: study.mean(study.unseen(name, "auroc")) for name in HEADS}
    shares = {
        seen: [_share(*table.loc[shift]) for shift in (probes.UNTOUCHED, *probes.SHIFTED)]
        for seen, table in alarms.items()
    }
    shifts = pd.DataFrame({"shift": [probes.UNTOUCHED, *probes.SHIFTED], **shares})
    means = {
        seen: ["{value:.3f} ({low:.3f}-{high:.3f})".format(**row) for row in of.values()]
        for seen, of in found.items()
    }
    return ABOUT.format(
        question=" ".join(__doc__.split("\n\n")[1].split()), fpr=FPR, seeds=len(seeds),
        alarms="\n".join(markdown_table(shifts)),
        found="\n".join(markdown_table(pd.DataFrame({"detector": list(HEADS), **means}))),
    )  # fmt: skip


def _share(fake: int, n: int) -> str:
    low, high = proportion_interval(int(fake), int(n))
    return f"{fake / n:.0%} ({low:.0%}-{high:.0%})"
