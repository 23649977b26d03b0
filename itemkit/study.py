"""The study: from images to one table of misalignment beside every control, raw and equalised.

What the contenders are stands in `itemkit.recipes`, how they are trained and tested in `itemkit.matrix`, what
follows from their scores in `itemkit.results`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from itemkit import schema, workflow
from itemkit._files import atomic_write
from itemkit.captions import clean_caption
from itemkit.controls import CONTROLS, ENOUGH, OURS, VARIANTS, best_regions, get_control
from itemkit.errors import InputError
from itemkit.features import Features, select_objects
from itemkit.head import MisalignmentMLP
from itemkit.images import EqualiseConfig, equalise
from itemkit.manifest import require_two_classes
from itemkit.matrix import train_on_test_on
from itemkit.perturb import Perturbation, jpeg_random
from itemkit.presets import Preset, get_preset, mini_folder
from itemkit.protocols import Protocol, get_protocol
from itemkit.recipes import DEFAULT, ExternalScores, Recipe, control, item, standard_detectors
from itemkit.results import (
    IMAGE_COLUMNS,
    ONE,
    PAIR,
    STUDY_METRICS,
    Study,
    fusion_table,
    headline,
    read_scores,
    save_scores,
    study_table,
    to_markdown,
)  # fmt: skip
from itemkit.splits import place
from itemkit.text import count, markdown_table, one_line, write_csv

__all__ = [
    "control", "item", "make_variants", "run_study", "standard_detectors", "tables", "train_on_test_on",
]  # fmt: skip

PIXELS_MINI, PIXELS = 48, 128
MAX_PIXEL_IMAGES = 40_000  # with more the controls on pixels are left out: all are held in memory (2 GB)
BANK = 96  # phrases that are looked for in every image, whatever its caption ...
MAX_BANK_ROWS = 500_000  # ... and fewer of many images: phrases times images (2 GB at 512 numbers a region)
BANK_REGIONS = 4  # kept of each image

ITEM = f"ITEM: {DEFAULT.level}, {DEFAULT.kind}"
# two more forms of the misalignment; notebook 07 compares them all
FORMS = {
    "hierarchical_cosine": ("cosines", "misalignment: hierarchical, cosine"),
    "global_absolute": ("global_absolute", "misalignment: global, absolute"),
}
# what fits a page: README's rows
HEADLINE = (
    "item", "drawn", "cosine_mean_local", "concepts", "other_caption", "doubt_likelihood",
    "noise_residual_one_class", "image_linear",
)  # fmt: skip
LATE = {
    "item + caption likelihood": ("item", "caption_likelihood"),
    "item + doubt": ("item", "doubt"),
    "item + image": ("item", "image_mlp"),
    "item + noise residual": ("item", "noise_residual_one_class"),
}
# every fusion and the parts of which it should never be worse than the better one
COSINES = ("cosine_global", "cosine_mean_local", "cosine_worst_relative")
FUSIONS: dict[str, tuple[str, ...]] = LATE | {
    "early": ("item", "image_mlp"),
    "ranks_noise": ("cosine_mean_local", "noise_residual_one_class"),
    "stack": (*COSINES, "caption_likelihood", "noise_residual_one_class"),
}
FUSIONS |= {
    how + name: (*COSINES, *more)
    for how in ("few", "ranks")
    for name, more in {"": (), "_doubt": ("doubt",), "_likelihood": ("caption_likelihood",),
                       "_both": ("doubt", "caption_likelihood")}.items()
}  # fmt: skip
GOAL, UNDER = 0.90, "random JPEG"  # mean AUROC on unseen families that a fusion should reach, and where
UNSURE = (("item", "caption_likelihood"), "novelty_image_mahalanobis")  # parts, and what calls an image novel


@dataclass(frozen=True)
class StudyReport:
    """What a study made and wrote."""

    path: Path  # table.md; all other tables lie beside it
    table: pd.DataFrame  # see `itemkit.results.study_table`
    failures: list[str]  # contenders and sections that failed, with the reason


def run_study(
    protocol: str | None = None,
    data: pd.DataFrame | None = None,
    out: str | Path = "results",
    preset: str | Preset = "mini",
    device: str = "auto",
    captions: str = "generate",
    seeds: int = 5,
    scores: Sequence[str] = (),
    skip_missing: bool = False,
    per_set: int | None = None,
    without: Sequence[str] = (),
    other_encoder: str = "",
    jobs: int = 1,
    n_boot: int = 2000,
    progress: bool = True,
) -> StudyReport:
    """Features, contenders, matrix and one table for every condition; an interrupted study goes on.

    Parameters
    ----------
    protocol : str, optional
        See `itemkit.protocols`. By default "own" where there is ``data``: each generator trains in turn, raw
        and equalised; else "mini", the laboratory's images.
    data : DataFrame, optional
        A manifest of `read_manifest`.
    out : path
        Features go to ``out/features``, all else to ``out/study-<protocol>``: ``scores.parquet`` (every
        score), the tables that follow from it (see `tables`), ``manifest.csv`` (the images with the splits
        they have here), and per condition one JSON per run.
    preset, device, captions, jobs, n_boot, progress, skip_missing, per_set, other_encoder
        See `itemkit.workflow.features`, `itemkit.matrix.train_on_test_on`, `make_variants` and
        `itemkit.protocols.Protocol.select`.
    scores : "name=scores.csv", or "name@condition=scores.csv"
        Detectors that ran elsewhere, on the images that ``manifest.csv`` lists as val and test; of the
        unchanged images if no condition is named. See `itemkit.recipes.ExternalScores`.
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
    left_out = [get_control(name).title for name in without]
    if not plan.train and (per_set or skip_missing):
        raise InputError(f"--per-set and --skip-missing are for a data set's protocol, not for {plan.name!r}")
    elsewhere = _elsewhere(scores, plan.conditions)
    folder = Path(out) / f"study-{plan.name}"
    notes, manifest = [plan.note], workflow.lab_manifest(out) if data is None else data
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
    if without:
        notes.append(f"Left out on request: {', '.join(left_out)}.")
    head = MisalignmentMLP(device=device)
    wanted = {made.variant for name, made in CONTROLS.items() if name not in without}
    studies: dict[str, Study] = {}
    listed: list[pd.DataFrame] = []
    unchanged: Features | None = None
    name = plan.name if plan.train else ""
    for condition in plan.conditions:
        print(f"{plan.title}: {condition}", file=sys.stderr, flush=True)
        remarks: list[str] = []
        transform = _transform(condition, plan, unchanged, remarks)
        if part := plan.images.get(condition):
            manifest = workflow.lab_manifest(out, part)
        features = workflow.features(
            chosen, manifest, out, device, name=name, transform=transform, captions=captions,
            progress=progress,
        )  # fmt: skip
        features = _playing(features, plan, remarks)
        if unchanged is None or part:
            unchanged = unchanged or features
            came_with = manifest.drop_duplicates(schema.PATH).set_index(schema.PATH)[schema.SPLIT]
            new = features.table[IMAGE_COLUMNS].assign(condition=condition)
            listed.append(new.assign(split_given=new[schema.PATH].map(came_with)))
            path = write_csv(pd.concat(listed).drop_duplicates(schema.PATH), folder / "manifest.csv")
            print(f"the images and their splits, for detectors that run elsewhere: {path}", file=sys.stderr)
        if len(features) > MAX_PIXEL_IMAGES:
            remarks.append(f"no controls on pixels above {MAX_PIXEL_IMAGES:,} images; choose fewer per set.")
        else:
            side = PIXELS_MINI if plan.lab else min(PIXELS, plan.equalise.size)
            features = workflow.add_pixels(features, side, transform, crop=not plan.lab)
        try:
            variants = make_variants(
                features, chosen, out, device, name=name, transform=transform, wanted=wanted,
                other_encoder=other_encoder, progress=progress,
            )  # fmt: skip
        except InputError as error:  # e.g. of an empty caption, which cannot be given to another image
            variants = {}
            remarks.append(f"the images could not be extracted in other ways: {one_line(error)}")
        recipes, lacking = _contenders(features, head, variants, without)
        for what in dict.fromkeys(lacking.values()):
            titles = ", ".join((OURS | CONTROLS)[name].title for name in lacking if lacking[name] == what)
            remarks.append(f"for want of {what}, without: {titles}.")
        for theirs in elsewhere[condition].values():  # raises before anything is trained
            theirs.of(features.table[features.table[schema.SPLIT] != "train"])
        there = set(features.table.loc[features.table[schema.SPLIT] == "test", schema.GENERATOR])
        options: dict[str, Any] = {"families": plan.families, "leave_family_out": True}
        options["train_generators"] = [name for name in plan.each if name in there] or None
        if plan.train:
            options = {"train_generators": ["+".join(plan.train)], "threshold": "best",
                       "test_generators": [name for name in plan.test if name in there],
                       "pair_by": schema.SOURCE}  # fmt: skip
        runs = folder / condition.replace(" ", "_").lower()
        study = train_on_test_on(
            features, recipes, range(seeds), metrics=("accuracy", *STUDY_METRICS), n_boot=n_boot, out=runs,
            jobs=jobs, progress=progress, **options,
        )  # fmt: skip
        for fused, parts in {} if plan.train else LATE.items():
            if {*parts} <= {*study.detectors}:
                study.fuse(fused, parts)
        for theirs_name, theirs in elsewhere[condition].items():
            study.join(theirs_name, theirs)
        remarks += [*study.options["notes"], *_undertrained(study)]
        study.options |= {"protocol": plan.name, "about": notes, "notes": remarks}
        studies[condition] = study
    save_scores(studies, folder / "scores.parquet")
    return tables(folder / "scores.parquet", folder)  # what it says is what is there


def tables(scores: str | Path, folder: str | Path, elsewhere: Sequence[str] = ()) -> StudyReport:
    """Every table of a study from its file of scores, without a model.

    Parameters
    ----------
    scores : path
        A file that a study wrote; "mini" stands for the one of the mini laboratory that comes with itemkit.
    folder : path
        Gets ``table.csv`` (every number), ``table.md``, and, where generators train in turn,
        ``headline.csv``, ``differences.csv`` and ``fusion.csv``.
    elsewhere : "name=scores.csv", or "name@condition=scores.csv"
        Detectors to join, see `run_study`; images are known by ``image_id``, or by their files' names.
    """
    folder = Path(folder)
    path = mini_folder() / "study.parquet" if str(scores) == "mini" else scores
    studies = read_scores(path)
    for condition, scorers in _elsewhere(elsewhere, list(studies)).items():
        for name, theirs in scorers.items():
            studies[condition].join(name, theirs)
    first = next(iter(studies.values()))
    plan = get_protocol(first.options.get("protocol", "own"))
    failures = [
        f"{condition}: {study.options['titles'][name]} failed, {why}"
        for condition, study in studies.items() for name, why in study.options["failures"].items()
    ]  # fmt: skip
    notes = [*first.options.get("about", ())]
    notes += [
        f"{condition}: {note}" for condition, study in studies.items() for note in study.options["notes"]
    ]
    notes += [f"**{failure}**" for failure in failures]
    table = study_table(studies, plan)
    write_csv(table, folder / "table.csv")
    ours = {name for study in studies.values() for name in study.detectors}
    shown = [*HEADLINE, *(ours - {*OURS, *CONTROLS, *FORMS, *LATE})]
    sections = [] if plan.train else [*_headline(studies, shown, folder), *_differences(studies, folder)]
    sections += [] if plan.train else _fusions(studies, folder)
    text = to_markdown(table, studies, plan, notes, () if plan.train else shown, sections)
    atomic_write(folder / "table.md", "\n".join([text, *_meanings(studies)]).encode("utf-8", "replace"))
    return StudyReport(folder / "table.md", table, failures)


def _elsewhere(scores: Sequence[str], conditions: Sequence[str]) -> dict[str, dict[str, ExternalScores]]:
    """Scores of detectors that ran elsewhere, by condition."""
    found: dict[str, dict[str, ExternalScores]] = {condition: {} for condition in conditions}
    for entry in scores:
        name, sign, path = entry.partition("=")
        name, _, condition = name.partition("@")
        condition = condition or conditions[0]
        if not (sign and name and path) or condition not in found:
            form = "name=scores.csv, or name@condition=scores.csv with a condition of"
            raise InputError(f"--scores {entry}: expected {form} {', '.join(conditions)}")
        if name in {*found[condition], *OURS, *CONTROLS, *FORMS, *LATE}:
            raise InputError(
                f"--scores {entry}: {condition} has a contender {name!r} already; choose another"
            )
        found[condition][name] = ExternalScores(path)
    return found


def _transform(
    condition: str, plan: Protocol, unchanged: Features | None, remarks: list[str]
) -> Perturbation | None:
    """What is done to every image in a condition."""
    if condition.rpartition(" + ")[2] == "random JPEG":
        return jpeg_random()
    if condition != "equalised":
        return None
    config = plan.equalise
    if plan.name == "own" and unchanged is not None:  # enlarging would leave traces that tell sizes apart
        side = int(unchanged.table[["width", "height"]].min(axis=1).quantile(0.05))
        config = replace(config, size=max(32, min(config.size, side)))
    scaled = f"every image cropped and scaled to {config.size} px"
    remarks.append(f"{scaled}, then {config.codec} {config.quality}.")
    # its name, a part of the features' key, tells everything that changes the pixels
    return Perturbation(str(config), "equalised", 0.0, "", ((_equalised, config),))


def _equalised(image: Image.Image, rng: np.random.Generator, config: EqualiseConfig) -> Image.Image:
    return equalise(image, config)  # a name of its own: processes that decode must be able to load it


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
    features = features.select(plays & ~copied)
    names = sorted(set(features.table.loc[features.labels == schema.FAKE, schema.GENERATOR].astype(str)))
    if not plan.train and len({plan.families.get(name, name) for name in names}) == 1:
        remarks.append(
            f"the fakes are of one family ({', '.join(names)}), so nothing is unseen; name another generator "
            "in the column `generator` for more."
        )
    return features


def make_variants(
    features: Features,
    preset: str | Preset = "mini",
    out_dir: str | Path = "results",
    device: str = "auto",
    *,
    name: str = "",
    transform: Callable[..., Any] | None = None,
    wanted: Collection[str] = tuple(VARIANTS),
    other_encoder: str = "",
    progress: bool = False,
) -> dict[str, Features]:
    """The same images extracted in other ways, for the controls that need it: `itemkit.controls.VARIANTS`.

    One extraction looks in every image for the objects of another image's caption (its neighbour of the same
    split, in an order that follows from content), of one caption for all (the training reals' most typical)
    and of a bank of phrases (what the training reals' captions name most often). A second one embeds the
    images by ``other_encoder``, a name or folder as of `itemkit.presets.get_preset`; preset mini has its own.

    Parameters
    ----------
    features : Features
        Of the images, with splits, made with this preset and transform.
    preset, out_dir, device, name, transform, progress
        See `itemkit.workflow.features`.
    wanted : names out of `VARIANTS`; those that cannot be made are left out
    """
    chosen, table = get_preset(preset), features.table

    def again(what: str, captions: pd.Series, **models: Any) -> Features:
        of_path = pd.Series(captions.to_numpy(), table[schema.PATH])
        return workflow.features(
            chosen.replace(**models), table[list(schema.MANIFEST_COLUMNS)], out_dir, device,
            name="-".join(filter(None, (name, what))), transform=transform,
            captions=of_path[~of_path.index.duplicated()], progress=progress,
        )  # fmt: skip

    found: dict[str, Features] = {}
    if {"other_caption", "one_caption", "bank"} & {*wanted}:
        found |= _other_texts(features, again)
    if chosen.name == "mini":
        other_encoder = other_encoder or str(mini_folder() / "models" / "clip_second")
    if "other_encoder" in wanted and other_encoder:
        alone = dict.fromkeys(("captioner", "parser", "localiser"))
        found["other_encoder"] = again("encoder", table[schema.CAPTION], encoder=other_encoder, **alone)
    return {key: found[key] for key in wanted if key in found}


def _other_texts(features: Features, again: Callable[..., Features]) -> dict[str, Features]:
    """Look for the objects of three sets of texts in one extraction, and take it apart."""
    table = features.table.assign(caption=features.table[schema.CAPTION].map(clean_caption))
    objects: dict[str, list[str]] = {caption: [] for caption in table[schema.CAPTION]}
    for row, phrases in features.objects["phrase"].groupby(features.owner):
        objects[table[schema.CAPTION][row]] = list(phrases)
    reals = features.split("train")
    reals = reals.select(reals.labels == schema.REAL)
    typical = int(np.argmax(reals.caption_emb @ reals.caption_emb.mean(axis=0)))
    one = clean_caption(reals.table[schema.CAPTION][typical])
    often = reals.objects["phrase"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    bank = list(often.index[: min(BANK, MAX_BANK_ROWS // len(table))])
    order = table.iloc[np.argsort(place(table[schema.IMAGE_ID], "another image's caption"), kind="stable")]
    ring = order.drop_duplicates(schema.IMAGE_ID).set_index(schema.IMAGE_ID).groupby(schema.SPLIT)
    other = table[schema.IMAGE_ID].map(ring[schema.CAPTION].transform(lambda captions: np.roll(captions, 1)))
    asked = {text: list(dict.fromkeys([*own, *objects[one], *bank])) for text, own in objects.items()}
    version = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    parser = SimpleNamespace(objects=lambda texts: [asked[text] for text in texts], version=version)
    made = again("texts", other, parser=parser)
    phrase, text = made.objects["phrase"], made.table[schema.CAPTION].to_numpy()[made.owner]
    theirs = np.array([p in objects[t] for p, t in zip(phrase, text, strict=True)], bool)
    single = select_objects(made, phrase.isin(objects[one]).to_numpy(bool))
    caption_emb = np.tile(reals.caption_emb[typical], (len(made), 1))
    found = {
        "other_caption": select_objects(made, theirs),
        "one_caption": replace(single, table=single.table.assign(caption=one), caption_emb=caption_emb),
    }
    if bank:
        of_bank = select_objects(made, phrase.isin(bank).to_numpy(bool))
        found["bank"] = best_regions(of_bank, BANK_REGIONS)
    return found


def _contenders(
    features: Features, head: MisalignmentMLP, variants: Mapping[str, Features], without: Sequence[str]
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """The misalignment in three forms and every control that can be run; what the others lack."""
    standard, lacking = standard_detectors(features, head, variants, without)
    chosen = {"item": replace(standard.pop("item"), title=ITEM)}
    chosen |= {name: item(form, head, title) for name, (form, title) in FORMS.items()}
    for name, recipe in standard.items():
        chosen[name] = replace(recipe, title=f"control: {recipe.title}") if name in CONTROLS else recipe
    return chosen, lacking


def _undertrained(study: Study) -> list[str]:
    """Say where the network on pixels does not even know the generator that it was trained on."""
    if "cnn" not in study.detectors:
        return []
    cells = study.cells("cnn", "auroc")
    own = cells[cells["train_generator"] == cells["test_generator"]].groupby("test_generator")["value"].mean()
    less = [f"{name} ({value:.2f})" for name, value in own[own < ENOUGH].items()]
    about = "the CNN on pixels is too small or trained too little: AUROC on its own generator below"
    return [f"{about} {ENOUGH:g} for {', '.join(less)}."] if less else []


def _meanings(studies: Mapping[str, Study]) -> list[str]:
    """What would follow if a contender won."""
    names = dict.fromkeys(name for study in studies.values() for name in study.detectors)
    known = {name: (OURS | CONTROLS)[name] for name in names if name in OURS | CONTROLS}
    rows = [{"if this row were the best": made.title, "then": made.if_it_won} for made in known.values()]
    return ["## What each contender would mean", "", *markdown_table(pd.DataFrame(rows)), ""]


def _headline(studies: Mapping[str, Study], names: Sequence[str], folder: Path) -> list[str]:
    """The rows that fit a page, with what each decides."""
    table = headline(studies, names)
    table = table.assign(**{"if it won": won(table["detector"])})
    write_csv(table, folder / "headline.csv")
    about = f"Trained on {ONE}, AUROC over the unseen cells; the same as below, in shares."
    return ["## In short", "", about, "", *markdown_table(table), ""]


def won(titles: pd.Series) -> pd.Series:
    """What would follow if a contender of this title won."""
    known = {made.title: made.if_it_won for made in (OURS | CONTROLS).values()}
    known[ITEM] = OURS["item"].if_it_won
    return titles.map(lambda title: known.get(title.removeprefix("control: "), ""))


def _differences(studies: Mapping[str, Study], folder: Path) -> list[str]:
    """ITEM against all others, on the same resamples."""
    tables = {
        condition: study.compare("item", "auroc", ONE).assign(condition=condition)
        for condition, study in studies.items() if "item" in study.detectors
    }  # fmt: skip
    if not tables or not any(map(len, tables.values())):
        return []
    every = pd.concat(tables.values(), ignore_index=True)
    titles = {name: title for study in studies.values() for name, title in study.options["titles"].items()}
    write_csv(every.assign(title=every["other"].map(titles)), folder / "differences.csv")
    rows: dict[str, dict[str, str]] = {}
    for line in every.itertuples():
        text = f"{100 * line.difference:+.1f} ({100 * line.low:+.1f} to {100 * line.high:+.1f})"
        sure = " *" if line.p_holm < 0.05 else ""
        rows.setdefault(line.other, {"ITEM minus": titles[line.other]})[line.condition] = text + sure
    about = "Means over the unseen cells both have been run on, the same resamples for both, in per cent; "
    about += "\\*: p < 0.05 after Holm's correction for all rows of a condition."
    lines = markdown_table(pd.DataFrame(list(rows.values())))
    return ["## Paired differences (AUROC, unseen cells)", "", about, "", *lines, ""]


def _fusions(studies: Mapping[str, Study], folder: Path) -> list[str]:
    """What every fusion reaches of the goal: never below the better part, and `GOAL` under a common JPEG."""
    found, cells = fusion_table(studies, FUSIONS)
    if found.empty:
        return []
    write_csv(cells, folder / "fusion_cells.csv")
    write_csv(found := with_goal(found), folder / "fusion.csv")
    of = found.to_dict("records")
    shown = pd.DataFrame(
        {"condition": found["condition"], "fusion": found["title"],
         "mean": ["{mean:.3f} ({low:.3f}-{high:.3f})".format(**row) for row in of],
         "worst cell": ["{worst:.3f} ({worst_low:.3f}-{worst_high:.3f})".format(**row) for row in of],
         "cells below the better part": ["{below} of {n_cells}".format(**row) for row in of],
         "beyond the interval": found["beyond"], "after Holm": found["after_holm"],
         "largest loss": ["{largest_loss:.3f} ({where})".format(**row) for row in of],
         "the goal": found["goal"]}
    )  # fmt: skip
    about = (
        "The better part is chosen on one half of the test images and judged on the other. The goal: in no "
        f"cell below it after Holm's correction, in any condition, and a mean of {GOAL:.2f} under {UNDER}."
    )
    title = "## Is a fusion ever worse than the better of its parts? (AUROC, unseen cells)"
    lines, (parts, novelty) = [title, "", about, "", *markdown_table(shown), ""], UNSURE
    for condition, study in studies.items():
        if {*parts, novelty} <= {*study.detectors}:
            mean = study.unsure(parts, novelty, ONE).drop(columns=PAIR).mean()
            without = "{unsure_real:.1%} of reals, {unsure_fake:.1%} of fakes".format(**mean)
            gain = "AUROC {answered:.3f} on the others, {all:.3f} on all.".format(**mean)
            why = f"where {' and '.join(parts)} disagree and the image is novel"
            lines += [f"{condition}: without an answer {why}: {without}; {gain}", ""]
    return lines


def with_goal(found: pd.DataFrame) -> pd.DataFrame:
    """Say in a column ``goal`` of `fusion_table` what each fusion reaches of it, or by how much it misses."""
    lost = found.groupby("fusion")["after_holm"].transform("sum")
    jpeg = found[found["condition"].str.endswith(UNDER)].groupby("fusion")["mean"].min()
    short = (GOAL - found["fusion"].map(jpeg)).round(3)
    texts = []
    for cells, missing in zip(lost, short, strict=True):
        missed = [f"below the better part in {count(int(cells), 'cell')}"] if cells else []
        missed += [f"{missing:.3f} short of {GOAL:.2f}"] if missing > 0 else []
        texts.append("; ".join(missed) or ("reached" if missing == missing else "not measured"))
    return found.assign(goal=texts)
