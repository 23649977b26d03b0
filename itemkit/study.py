"""The study: from images to one table of misalignment beside every control, raw and equalised.

Each contender is trained on each generator and tested on all (`itemkit.matrix`), once per condition. What the
contenders are stands in `itemkit.recipes`, what follows from their scores in `itemkit.results`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from itemkit import schema, workflow
from itemkit._files import atomic_write
from itemkit.calibrate import check_promises, promise_sentences
from itemkit.controls import CONTROLS
from itemkit.detector import Detector
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.images import EqualiseConfig, equalise
from itemkit.manifest import describe_manifest, read_manifest, require_two_classes
from itemkit.matrix import train_on_test_on
from itemkit.misalignment import KINDS, LEVELS, RepresentationConfig
from itemkit.perturb import Perturbation, jpeg_random
from itemkit.presets import Preset, get_preset
from itemkit.protocols import Protocol, get_protocol
from itemkit.recipes import DEFAULT, Recipe, control, early, external, item, standard_detectors
from itemkit.results import STUDY_METRICS, Study, study_table, to_markdown
from itemkit.text import count, did_you_mean, markdown_table, one_line, write_csv

__all__ = ["Recipe", "Study", "control", "early", "item", "run_study", "standard_detectors",
           "train_on_test_on"]  # fmt: skip

PIXELS_MINI, PIXELS = 48, 128
MAX_PIXEL_IMAGES = 40_000  # with more the controls on pixels are left out: all are held in memory (2 GB)
GENERIC_CAPTION = "a photo"
JPEG_QUALITIES = (50, 95)
LATE = {
    "item + caption likelihood": ("item", "caption_likelihood"),
    "item + image": ("item", "image_mlp"),
    "item + CNN": ("item", "cnn"),
    "item + noise residual": ("item", "noise_residual"),
    "item + spectrum": ("item", "spectrum"),
    "item + image + CNN": ("item", "image_mlp", "cnn"),
}


@dataclass(frozen=True)
class StudyReport:
    """What `run_study` made and wrote."""

    path: Path  # table.md; table.csv, manifest.csv and a folder per condition lie beside it
    table: pd.DataFrame  # see `itemkit.results.study_table`
    failures: list[str]  # contenders and sections that failed, with the reason


def equalised(config: EqualiseConfig) -> Perturbation:
    """A transform to one size and codec; its name tells everything that changes the pixels."""
    return Perturbation(str(config), "equalised", 0.0, "", lambda image, rng: equalise(image, config))


def run_study(
    protocol: str | None = None,
    data: str | Path | pd.DataFrame | None = None,
    out: str | Path = "results",
    preset: str | Preset = "mini",
    device: str = "auto",
    captions: str = "generate",
    seeds: int = 5,
    scores: Sequence[str] = (),
    skip_missing: bool = False,
    per_set: int | None = None,
    without: Sequence[str] = (),
    jobs: int = 1,
    n_boot: int = 200,
    progress: bool = True,
) -> StudyReport:
    """Features, contenders, matrix and one table for every condition; an interrupted study goes on.

    Parameters
    ----------
    protocol : str, optional
        See `itemkit.protocols`. By default "own" where there is ``data``: each generator trains in turn, raw
        and equalised; else "mini", the laboratory's images.
    data : path or DataFrame, optional
        Folder or table of the images, or a manifest of `read_manifest`, which has the options.
    out : path
        Features go to ``out/features``, all else to ``out/study-<protocol>``: ``table.csv``, ``table.md``,
        ``manifest.csv`` (the images with the splits they have here), and per condition one JSON per run.
    preset, device, captions
        See `itemkit.workflow.features`.
    seeds, jobs, n_boot, progress
        Number of seeds; the rest as in `itemkit.matrix.train_on_test_on`.
    scores : "name=scores.csv", or "name@condition=scores.csv"
        Detectors that ran elsewhere, on the images that ``manifest.csv`` lists as val and test; of the
        unchanged images if no condition is named. See `itemkit.recipes.ExternalScores`.
    skip_missing, per_set
        See `itemkit.protocols.Protocol.select`.
    without : names
        Controls to leave out, e.g. "cnn", the one that takes longest.

    Raises
    ------
    InputError
        Before anything is computed where an option is wrong or a training or test set is missing.
    """
    chosen = get_preset(preset) if isinstance(preset, str) else preset
    plan = get_protocol(protocol or ("mini" if data is None else "own"))
    if data is None and not plan.lab:
        raise InputError(f"protocol {plan.name!r} needs images: give the folder of the data set with --data")
    if seeds < 1:
        raise InputError(f"seeds={seeds}: expected at least 1")
    if unknown := sorted(set(without) - set(CONTROLS)):
        hint = did_you_mean(unknown[0], CONTROLS)
        raise InputError(f"no control {unknown[0]!r} to leave out; controls: {', '.join(CONTROLS)}.{hint}")
    if not plan.train and (per_set or skip_missing):
        raise InputError(f"--per-set and --skip-missing are for a data set's protocol, not for {plan.name!r}")
    elsewhere = _elsewhere(scores, plan.conditions)
    folder = Path(out) / f"study-{plan.name}"
    manifest, notes = _images(plan, data, out, skip_missing, per_set)
    if without:
        notes.append(f"Left out on request: {', '.join(CONTROLS[name].title for name in without)}.")
    failures: list[str] = []
    studies: dict[str, Study] = {}
    unchanged: Features | None = None
    for condition in plan.conditions:
        print(f"{plan.title}: {condition}", file=sys.stderr, flush=True)
        remarks: list[str] = []
        transform = _transform(condition, plan, unchanged, remarks)
        features = workflow.features(
            chosen, manifest, out, device, name=plan.name if plan.train else "", transform=transform,
            captions=captions, progress=progress,
        )  # fmt: skip
        features = _playing(features, plan, remarks)
        if unchanged is None:
            unchanged = features
            _write_manifest(features, manifest, folder)
        if len(features) > MAX_PIXEL_IMAGES:
            remarks.append(f"no controls on pixels above {MAX_PIXEL_IMAGES:,} images; choose fewer per set.")
        else:
            side = PIXELS_MINI if plan.lab else min(PIXELS, plan.equalise.size)
            features = workflow.add_pixels(features, side, transform, crop=not plan.lab)
        recipes = _contenders(features, chosen, device, without, plan, remarks)
        if taken := sorted(elsewhere[condition].keys() & {*recipes, *LATE}):
            raise InputError(f"--scores {taken[0]}=...: that name is a contender of ours; choose another")
        recipes |= elsewhere[condition]
        options: dict[str, Any] = {"families": plan.families}
        if plan.train:
            there = set(features.table.loc[features.table[schema.SPLIT] == "test", schema.GENERATOR])
            options = {"train_generators": ["+".join(plan.train)], "threshold": "best",
                       "test_generators": [name for name in plan.test if name in there],
                       "pair_by": schema.SOURCE}  # fmt: skip
        runs = folder / condition.replace(" ", "_").lower()
        study = train_on_test_on(
            features, recipes, range(seeds), metrics=("accuracy", *STUDY_METRICS), n_boot=n_boot, out=runs,
            jobs=jobs, progress=progress, **options,
        )  # fmt: skip
        if not plan.train:
            for fused, parts in LATE.items():
                if {*parts} <= {*study.detectors}:
                    study.fuse(fused, parts)
            study.save(runs)  # with the fusions
        studies[condition] = study
        notes += [f"{condition}: {remark}" for remark in (*remarks, *study.options["notes"])]
        failed = study.options["failures"].items()
        failures += [f"{condition}: {recipes[name].title} failed, {why}" for name, why in failed]
    assert unchanged is not None
    table = study_table(studies, plan)
    write_csv(table, folder / "table.csv")
    sections = []
    if not plan.train:
        fresh = workflow.lab_manifest(out, "fresh") if data is None else None
        try:
            sections = [*_fusions(studies, folder), *_promises(unchanged, chosen, out, folder, device, fresh)]
        except InputError as error:
            failures.append(f"fusions and promises: {one_line(error)}")
    notes += [f"**{failure}**" for failure in failures]
    text = "\n".join([to_markdown(table, studies, plan, notes), *sections])
    atomic_write(folder / "table.md", text.encode("utf-8", "replace"))
    return StudyReport(folder / "table.md", table, failures)


def _elsewhere(scores: Sequence[str], conditions: Sequence[str]) -> dict[str, dict[str, Recipe]]:
    """Recipes of detectors that ran elsewhere, by condition."""
    found: dict[str, dict[str, Recipe]] = {condition: {} for condition in conditions}
    for entry in scores:
        name, sign, path = entry.partition("=")
        name, _, condition = name.partition("@")
        condition = condition or conditions[0]
        if not (sign and name and path) or condition not in found:
            raise InputError(
                f"--scores {entry}: expected name=scores.csv, or name@condition=scores.csv with a "
                f"condition of {', '.join(conditions)}"
            )
        if name in found[condition]:
            raise InputError(f"--scores {entry}: {name} was given twice for {condition}")
        found[condition][name] = external(path, f"{name} (scores from elsewhere)")
    return found


def _images(
    plan: Protocol, data: Any, out: str | Path, skip_missing: bool, per_set: int | None
) -> tuple[pd.DataFrame, list[str]]:
    """Manifest of the images that play a part, and notes on those that do not."""
    notes, manifest = [plan.note], workflow.lab_manifest(out) if data is None else data
    if not isinstance(manifest, pd.DataFrame):
        manifest = read_manifest(manifest, plan.layout)
        print(*describe_manifest(manifest), sep="\n", file=sys.stderr)
    if plan.train:
        manifest, missing = plan.select(manifest, skip_missing, per_set)
        if missing:
            notes.append(
                f"**Left out, because they are not in the folder: {', '.join(missing)}.** Means over fewer "
                "sets than the published ones cannot be compared with them."
            )
        if per_set:
            notes.append(f"At most {per_set} images of each set, class and split, not the whole data set.")
    require_two_classes(manifest, "A study")
    return manifest, notes


def _transform(
    condition: str, plan: Protocol, unchanged: Features | None, remarks: list[str]
) -> Perturbation | None:
    """What is done to every image in a condition."""
    if condition == "random JPEG":
        return jpeg_random(*JPEG_QUALITIES)
    if condition != "equalised":
        return None
    config = plan.equalise
    if plan.name == "own" and unchanged is not None:  # enlarging would leave traces that tell sizes apart
        side = int(unchanged.table[["width", "height"]].min(axis=1).quantile(0.05))
        config = replace(config, size=max(32, min(config.size, side)))
    scaled = f"every image cropped and scaled to {config.size} px"
    remarks.append(f"{scaled}, then {config.codec} {config.quality}.")
    return equalised(config)


def _playing(features: Features, plan: Protocol, remarks: list[str]) -> Features:
    """Labelled images, without those of which a copy is in a later split."""
    table = features.table
    rank = table[schema.SPLIT].astype(object).map({name: i for i, name in enumerate(schema.SPLITS)})
    plays = (table[schema.LABEL].notna() & rank.notna()).to_numpy(bool)
    copied = (rank < rank.groupby(table[schema.IMAGE_ID]).transform("max")).to_numpy(bool)
    if features.run.get("splits"):
        remarks.append(str(features.run["splits"]))
    if n := int((~plays).sum()):
        remarks.append(f"{count(n, 'image')} without label or split left out.")
    if n := int((plays & copied).sum()):
        remarks.append(
            f"{count(n, 'training or validation image')} left out, because a copy of each is among the "
            "validation or test images."
        )
    fakes = plays & (table[schema.LABEL] == schema.FAKE).fillna(False).to_numpy(bool)
    names = sorted(set(table.loc[fakes, schema.GENERATOR].astype(str)))
    if not plan.train and len({plan.families.get(name, name) for name in names}) == 1:
        remarks.append(
            f"the fakes are of one family ({', '.join(names)}), so nothing is unseen: all numbers are about "
            "fakes like those trained on. Name a second generator in the column `generator` for more."
        )
    return features.select(plays & ~copied)


def _write_manifest(features: Features, manifest: pd.DataFrame, folder: Path) -> None:
    """List the images with the split they have here, and beside it the one that they came with."""
    names = [schema.PATH, schema.IMAGE_ID, schema.LABEL, schema.GENERATOR, schema.SOURCE, schema.SPLIT]
    table = features.table[names]
    came_with = manifest.drop_duplicates(schema.PATH).set_index(schema.PATH)[schema.SPLIT]
    path = write_csv(table.assign(split_given=table[schema.PATH].map(came_with)), folder / "manifest.csv")
    print(f"the images and their splits, for detectors that run elsewhere: {path}", file=sys.stderr)


def _contenders(
    features: Features,
    preset: Preset,
    device: str,
    without: Sequence[str],
    plan: Protocol,
    remarks: list[str],
) -> dict[str, Recipe]:
    """The misalignment in its forms and every control that these features allow."""
    head = MisalignmentMLP(device=device)
    encoder = replace(preset, captioner=None, parser=None, localiser=None).build(device).encoder
    generic = np.asarray(encoder.encode_texts([GENERIC_CAPTION])[0].cpu(), np.float32)
    controls, lacking = standard_detectors(features, head=head, generic_emb=generic, skip=without)
    remarks += [f"without {CONTROLS[name].title}, for want of {what}." for name, what in lacking.items()]
    chosen = {"item": replace(controls.pop("item"), title=f"ITEM: {DEFAULT.level}, {DEFAULT.kind}")}
    forms = (
        [(level, kind) for level in LEVELS for kind in KINDS]
        if plan.all_forms
        else [(DEFAULT.level, "cosine")]
    )
    for level, kind in forms:
        if (level, kind) != (DEFAULT.level, DEFAULT.kind):
            config = RepresentationConfig(level=level, kind=kind)
            chosen[f"{level}_{kind}"] = item(config, head, f"misalignment: {level}, {kind}")
    chosen |= {name: replace(recipe, title=f"control: {recipe.title}") for name, recipe in controls.items()}
    return chosen | {"early": early(head=head)}


def _fusions(studies: Mapping[str, Study], folder: Path) -> list[str]:
    """Is a fusion ever worse than the better of its parts? Judged by the AUROC of every unseen cell."""
    tables, lines = [], []
    for condition, study in studies.items():
        worst, rows = study.summary(["auroc"]).set_index("detector")["worst"], []
        for name, parts in (LATE | {"early": ("item", "image_mlp")}).items():
            if not {name, *parts} <= {*study.detectors}:
                continue
            gain = study.fusion_gain(name, parts)
            gain = gain[~gain["seen"]].assign(fusion=name, condition=condition)
            if gain.empty:
                continue
            tables.append(gain)
            below, least = gain["difference"] < 0, gain.iloc[0]
            loss = f"{-least['difference']:.3f} ({least['train_generator']} → {least['test_generator']})"
            rows.append(
                {"fusion": f"{name} ({', '.join(parts)})",
                 "cells below the better part": f"{below.sum()} of {len(gain)}",
                 "beyond the 95% interval": int((gain["high"] < 0).sum()),
                 "largest loss": loss if below.any() else "", "worst cell": f"{worst[name]:.3f}",
                 "best worst cell of a part": f"{worst[[*parts]].max():.3f}"}
            )  # fmt: skip
        if rows:
            lines += [f"{condition}:", "", *markdown_table(pd.DataFrame(rows)), ""]
    if lines:
        write_csv(pd.concat(tables, ignore_index=True), folder / "fusion.csv")
        lines = ["## Is a fusion ever worse than the better of its parts? (AUROC, unseen cells)", "", *lines]
    return lines


def _promises(
    features: Features, preset: Preset, out: str | Path, folder: Path, device: str, fresh: pd.DataFrame | None
) -> list[str]:
    """What thresholds and verdicts promise, against what happens; the laboratory has new renders for it."""
    detector = Detector(head=MisalignmentMLP(members=5, device=device)).fit(
        features.split("train"), features.split("val")
    )
    test = features.split("test")
    known, new = (detector.real_scores_, detector.fake_scores_), detector.decision_function(test)
    reals, fakes = (new[test.labels == label] for label in (schema.REAL, schema.FAKE))
    kinds = {"calibrated on the validation images, tried on the test images": (*known, reals, fakes)}
    if fresh is not None:
        renders = workflow.features(preset, fresh, out, device, name="fresh", progress=False)
        val, tried = (detector.decision_function(renders.split(name)) for name in ("val", "test"))
        what = f"{len(val)} new renders and the validation fakes, tried on {len(tried)} other new renders"
        kinds[f"calibrated on {what} and the test fakes"] = (val, known[1], tried, fakes)
    tables = {what: check_promises(*arrays) for what, arrays in kinds.items()}
    joined = pd.concat([table.assign(calibration=what) for what, table in tables.items()])
    write_csv(joined, folder / "promises.csv")
    lines = ["## Are the promises kept? (detector trained on all generators)", ""]
    for what, table in tables.items():
        lines += [
            f"{what[0].upper()}{what[1:]}:",
            "",
            *(f"- {line}" for line in promise_sentences(table)),
            "",
        ]
    return lines
