"""``itemkit study``: a protocol from images to one table, in two conditions, with everything kept per run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from itemkit import schema, workflow
from itemkit.calibrate import check_promises, told
from itemkit.controls import CONTROLS
from itemkit.detector import Detector
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.images import EqualiseConfig, equalise
from itemkit.manifest import read_manifest, write_manifest
from itemkit.misalignment import KINDS, LEVELS, RepresentationConfig
from itemkit.perturb import jpeg_random
from itemkit.presets import Preset, get_preset
from itemkit.protocols import Protocol, get_protocol
from itemkit.results import fusion_report, study_table, to_markdown
from itemkit.study import STUDY_METRICS, Recipe, Study, early, external, item, standard_detectors
from itemkit.study import train_on_test_on as _train_on_test_on

PIXELS_MINI, PIXELS = 48, 128
MAX_PIXEL_IMAGES = 40_000
"""Above this the controls that look at pixels are left out: the images are held in memory (2 GB)."""
GENERIC_CAPTION = "a photo"
JPEG_QUALITIES = (50, 95)
FRESH = {"val": 400, "test": 800}
FRESH_FROM = 100_000
"""First index of the renders that calibrate and test promises; the data set's own end long before."""
LATE = {
    "item + caption likelihood": ("item", "caption_likelihood"),
    "item + image": ("item", "image_mlp"),
    "item + CNN": ("item", "cnn"),
    "item + noise residual": ("item", "noise_residual"),
    "item + spectrum": ("item", "spectrum"),
    "item + image + CNN": ("item", "image_mlp", "cnn"),
}


@dataclass(frozen=True)
class Equalised:
    """A transform that brings every image to one size and codec."""

    config: EqualiseConfig

    def __call__(self, image: Image.Image, image_id: str | None = None) -> Image.Image:
        """Equalise one image."""
        return equalise(image, self.config)

    def fingerprint(self) -> dict[str, object]:
        """Everything that changes the pixels, for cache keys."""
        return {"equalise": asdict(self.config)}


def run_study(
    protocol: str,
    data: str | Path | None = None,
    out: str | Path = "results",
    preset: str | Preset = "mini",
    device: str = "auto",
    *,
    seeds: int = 5,
    scores: Sequence[str] = (),
    skip_missing: bool = False,
    per_set: int | None = None,
    without: Sequence[str] = (),
    jobs: int = 1,
    n_boot: int = 200,
    progress: bool = True,
) -> Path:
    """Run a protocol; run it again to go on where it stopped.

    Parameters
    ----------
    protocol : str
        See `itemkit.protocols`.
    data : path, optional
        Folder of the data set; "mini" takes the laboratory's own images without it.
    out : path
        Features go to ``out/features``, all else to ``out/study-<protocol>``: ``table.csv``, ``table.md``,
        and for each condition one JSON per run.
    preset, device
        Models and where they run.
    seeds : int
        Each draws its training images anew.
    scores : "name=scores.csv", or "name@condition=scores.csv"
        Detectors that ran elsewhere; of the unchanged images if no condition is named.
    skip_missing : bool
        Leave test sets out that are not there, and say so in the table.
    per_set : int, optional
        At most so many images of each set, class and split.
    without : names
        Controls to leave out, e.g. "cnn", the one that takes longest.
    jobs : int
        Processes that train side by side.
    n_boot : int
        Bootstrap resamples of the test images.
    progress : bool

    Returns
    -------
    Path
        ``table.md``.
    """
    chosen = get_preset(preset) if isinstance(preset, str) else preset
    plan = get_protocol(protocol)
    if plan.train and not data:
        raise InputError(f"protocol {protocol!r} needs images: give the folder of the data set with --data")
    if seeds < 1:
        raise InputError(f"seeds={seeds}: expected at least 1")
    if unknown := sorted(set(without) - set(CONTROLS)):
        raise InputError(f"no control {unknown[0]!r} to leave out; controls: {', '.join(CONTROLS)}")
    workflow.warn_if_foreign(chosen.name, data)
    folder = Path(out) / f"study-{protocol}"
    notes = [plan.note.replace("\n", " ")]
    if without:
        notes.append(f"Left out on request: {', '.join(CONTROLS[name].title for name in without)}.")
    source: str | Path | None = data
    if plan.train:
        manifest, missing = plan.select(read_manifest(data, plan.layout), skip_missing, per_set)
        if missing:
            notes.append(
                f"**Left out, because they are not in the folder: {', '.join(missing)}.** Means over fewer "
                "sets than the published ones cannot be compared with them."
            )
        if per_set:
            notes.append(f"At most {per_set} images of each set, class and split, not the whole data set.")
        source = folder / "manifest.csv"
        write_manifest(manifest, source)
    elif per_set or skip_missing:
        raise InputError(f"--per-set and --skip-missing go with a data set's protocol, not with {protocol!r}")
    conditions: dict[str, Callable[..., Any] | None] = (
        {"raw": None, "equalised": Equalised(plan.equalise)}
        if plan.train
        else {"clean": None, "random JPEG": jpeg_random(*JPEG_QUALITIES)}
    )
    elsewhere = _elsewhere(scores, list(conditions))
    studies: dict[str, Study] = {}
    titles: dict[str, str] = {}
    clean: Features | None = None
    for condition, transform in conditions.items():
        print(f"{plan.title}: {condition}", file=sys.stderr, flush=True)
        kind = condition.replace(" ", "_").lower()
        name = "-".join([*([protocol] if plan.train else []), *([kind] if transform or plan.train else [])])
        features = workflow.features(
            chosen, source, out, device, name=name, transform=transform, progress=progress
        )
        features, told_leak = _without_leaks(features)
        _check_unseen(features, plan)
        features, told_pixels = _with_pixels(features, plan, transform)
        recipes, lacking = _contenders(features, chosen, device, without, grid=not plan.train)
        if taken := sorted(elsewhere[condition].keys() & {*recipes, *LATE}):
            raise InputError(f"--scores {taken[0]}=...: that name is a contender of ours; choose another")
        recipes |= elsewhere[condition]
        notes += [f"{condition}: {note}" for note in (told_leak, told_pixels) if note]
        notes += [f"{condition}: without {CONTROLS[k].title}, for want of {v}." for k, v in lacking.items()]
        titles |= {name: recipe.title or name for name, recipe in recipes.items()}
        study = _train_on_test_on(
            features, recipes, range(seeds), out=folder / kind, jobs=jobs, n_boot=n_boot, progress=progress,
            **_options(plan, features),
        )  # fmt: skip
        if not plan.train:
            for fused, parts in _possible(LATE, study).items():
                study.fuse(fused, parts)
                titles[fused] = f"fusion, late: {fused}"
            study.save(folder / kind)  # with the fusions
        studies[condition] = study
        clean = clean if clean is not None else features
    table = study_table(studies, plan, titles)
    table.to_csv(folder / "table.csv", index=False)
    text = to_markdown(table, plan, notes)
    if not plan.train:
        text += "\n".join(["", *_fusions(studies, folder)])
        assert clean is not None
        text += "\n".join(["", *_promises(clean, chosen, Path(out), folder, device, bool(data), progress)])
    path = folder / "table.md"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def _elsewhere(scores: Sequence[str], conditions: Sequence[str]) -> dict[str, dict[str, Recipe]]:
    """Recipes of detectors that ran elsewhere, by condition."""
    found: dict[str, dict[str, Recipe]] = {condition: {} for condition in conditions}
    for entry in scores:
        name, sign, path = entry.partition("=")
        name, _, condition = name.partition("@")
        condition = condition or conditions[0]
        if name in found.get(condition, {}):
            raise InputError(f"--scores {entry}: {name} was given twice for {condition}")
        if not (sign and name and path) or condition not in found:
            raise InputError(
                f"--scores {entry}: expected name=scores.csv, or name@condition=scores.csv with a "
                f"condition of {', '.join(conditions)}"
            )
        found[condition][name] = external(path, f"{name} (scores from elsewhere)")
    return found


def _options(plan: Protocol, features: Features) -> dict[str, Any]:
    if plan.train:
        there = set(features.table.loc[features.table[schema.SPLIT] == "test", schema.GENERATOR])
        return {
            "train_generators": ["+".join(plan.train)],
            "test_generators": [test.name for test in plan.test if test.name in there],
            "threshold": "best",
            "pair_by": schema.SOURCE,
            "metrics": ("accuracy", *STUDY_METRICS),
        }
    from minilab.fakes import FAMILY

    return {"families": FAMILY}


def _without_leaks(features: Features) -> tuple[Features, str]:
    """Drop images of which a copy is in a later split: train before val before test."""
    table = features.table
    ids = {split: set(table.loc[table[schema.SPLIT] == split, schema.IMAGE_ID]) for split in ("val", "test")}
    leak = (table[schema.SPLIT] != "test") & table[schema.IMAGE_ID].isin(ids["test"])
    leak |= (table[schema.SPLIT] == "train") & table[schema.IMAGE_ID].isin(ids["val"])
    if not leak.any():
        return features, ""
    return features.select(~leak.to_numpy()), (
        f"{int(leak.sum())} training and validation images left out, because a copy of each is among the "
        "test or validation images."
    )


def _check_unseen(features: Features, plan: Protocol) -> None:
    """Refuse, before anything is trained, images among which nothing is unseen."""
    from minilab.fakes import FAMILY

    names = {g for g in features.table[schema.GENERATOR] if g != schema.REAL_GENERATOR}
    if not plan.train and len({FAMILY.get(name, name) for name in names}) < 2:
        raise InputError(
            f"the fakes are of one family ({', '.join(sorted(names)) or 'none'}), so nothing is unseen; give "
            "images of a second generator, named in the column `generator`"
        )


def _with_pixels(
    features: Features, plan: Protocol, transform: Callable[..., Any] | None
) -> tuple[Features, str]:
    if len(features) > MAX_PIXEL_IMAGES:
        return features, f"no controls on pixels above {MAX_PIXEL_IMAGES:,} images; choose fewer per set."
    side = min(PIXELS, plan.equalise.size) if plan.train else PIXELS_MINI
    return workflow.add_pixels(features, side, transform, crop=bool(plan.train)), ""


def _contenders(
    features: Features, preset: Preset, device: str, without: Sequence[str], grid: bool
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """The misalignment in its forms and every control that these features allow."""
    head = MisalignmentMLP(device=device)
    generic = np.asarray(preset.build(device).encoder.encode_texts([GENERIC_CAPTION])[0].cpu(), np.float32)
    controls, lacking = standard_detectors(features, head=head, generic_emb=generic, skip=without)
    default = RepresentationConfig()
    chosen = {"item": replace(controls.pop("item"), title=f"ITEM: {default.level}, {default.kind}")}
    for level in LEVELS if grid else ("hierarchical",):
        for kind in KINDS if grid else ("cosine",):
            if (level, kind) != (default.level, default.kind):
                config = RepresentationConfig(level=level, kind=kind)
                chosen[f"{level}_{kind}"] = item(config, head, f"misalignment: {level}, {kind}")
    titled = {name: replace(recipe, title=f"control: {recipe.title}") for name, recipe in controls.items()}
    return chosen | titled | {
        "early": replace(early(head=head), title="fusion, early: item + image")
    }, lacking


def _possible(fusions: dict[str, tuple[str, ...]], study: Study) -> dict[str, tuple[str, ...]]:
    """Fusions of which the study holds all parts."""
    return {name: parts for name, parts in fusions.items() if set(parts) <= set(study.detectors)}


def _fusions(studies: dict[str, Study], folder: Path) -> list[str]:
    lines, tables = ["## Is a fusion ever worse than the better of its parts? (AUROC)", ""], []
    for condition, study in studies.items():
        table, answers = fusion_report(study, _possible(LATE | {"early": ("item", "image_mlp")}, study))
        tables.append(table.assign(condition=condition))
        lines += [f"- {condition}, {answer}" for answer in answers]
    pd.concat(tables, ignore_index=True).to_csv(folder / "fusion.csv", index=False)
    return [*lines, ""]


def _promises(
    features: Features, preset: Preset, out: Path, folder: Path, device: str, foreign: bool, progress: bool
) -> list[str]:
    """What thresholds and verdicts promise, against what happens; the laboratory has new renders for it."""
    detector = Detector(head=MisalignmentMLP(members=5, device=device)).fit(
        workflow.take_split(features, "train"), workflow.take_split(features, "val")
    )
    test = workflow.take_split(features, "test")
    new = detector.decision_function(test)
    known = detector.real_scores_, detector.fake_scores_
    fakes = new[test.labels == schema.FAKE]
    kinds = [("calibrated on the validation images, tried on the test images", *known,
              new[test.labels == schema.REAL], fakes)]  # fmt: skip
    if not foreign:
        fresh = workflow.features(
            preset, fresh_renders(out / "mini"), out, device, name="fresh", progress=progress
        )
        score, split = detector.decision_function(fresh), fresh.table[schema.SPLIT].to_numpy()
        real = {name: score[split == name] for name in FRESH}
        kinds.append(
            (f"calibrated on {FRESH['val']} new renders and the validation fakes, tried on {FRESH['test']} "
             "other new renders and the test fakes", real["val"], known[1], real["test"], fakes)
        )  # fmt: skip
    lines, tables = ["## Are the promises kept? (detector trained on all generators)", ""], []
    for what, *arrays in kinds:
        table = check_promises(*arrays)
        tables.append(table.assign(calibration=what))
        lines += [f"{what[0].upper()}{what[1:]}:", "", *(f"- {line}" for line in told(table)), ""]
    pd.concat(tables, ignore_index=True).to_csv(folder / "promises.csv", index=False)
    return lines


def fresh_renders(folder: Path) -> Path:
    """Render scenes that neither the data set nor any training holds; returns their manifest.

    Parameters
    ----------
    folder : Path
        They go to ``folder/fresh``; those that are there are kept.

    Returns
    -------
    Path
    """
    from minilab.fakes import SOURCE, png
    from minilab.world import render_index

    manifest = folder / "fresh" / "manifest.csv"
    rows = []
    for split, n in FRESH.items():
        for index in range(FRESH_FROM, FRESH_FROM + n):
            path = manifest.parent / f"{split}-{index}.png"
            rows.append({schema.PATH: path.name, schema.LABEL: schema.REAL, schema.GENERATOR: "real",
                         schema.SOURCE: SOURCE, schema.SPLIT: split})  # fmt: skip
            if not manifest.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(render_index(split, index).image))
    if not manifest.exists():
        pd.DataFrame(rows).to_csv(manifest, index=False)
    return manifest
