"""The field's protocols on trees laid out like their data sets: what trains, what tests, one table."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from itemkit import cli, matrix, presets, study, workflow
from itemkit.controls import CONTROLS, NearestNeighbour
from itemkit.errors import InputError
from itemkit.manifest import read_manifest
from itemkit.presets import Preset
from itemkit.protocols import get_protocol, protocol_names
from itemkit.results import MEAN, OURS, THEIRS, WORST

import fakes

QUICKEST = ("caption_likelihood", "image_linear", "image_nearest")
SLOW = tuple(name for name in CONTROLS if name not in QUICKEST)
QUICK = {"device": "cpu", "seeds": 1, "n_boot": 20, "progress": False}


def picture(number: int, fake: bool, side: int = 64) -> bytes:
    """Coloured blobs as a JPEG; for a fake, blurred as a PNG."""
    rng = np.random.default_rng(number)
    blobs = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side - number % 9))
    image = Image.fromarray(
        (np.asarray(blobs) * 0.9 + rng.integers(0, 25, (*blobs.size[::-1], 3))).astype("uint8")
    )
    buffer = BytesIO()
    image = image.filter(ImageFilter.GaussianBlur(0.8)) if fake else image
    image.save(buffer, "PNG" if fake else "JPEG")
    return buffer.getvalue()


@pytest.fixture
def grow(tmp_path: Path):
    """Write n images into each folder; "ai" and "1_fake" hold fakes."""
    number = iter(range(10_000))

    def write(*folders: tuple[str, int], root: str = "data") -> Path:
        for folder, n in folders:
            fake = folder.rsplit("/", 1)[-1] in ("ai", "1_fake")
            path = tmp_path / root / folder
            path.mkdir(parents=True, exist_ok=True)
            for _ in range(n):
                i = next(number)
                (path / f"{i:05d}{'.png' if fake else '.JPEG'}").write_bytes(picture(i, fake))
        return tmp_path / root

    return write


GENIMAGE = {
    "Midjourney": "imagenet_midjourney", "stable_diffusion_v_1_4": "imagenet_ai_0419_sdv4",
    "stable_diffusion_v_1_5": "imagenet_ai_0424_sdv5", "ADM": "imagenet_ai_0508_adm",
    "glide": "imagenet_glide", "wukong": "imagenet_ai_0424_wukong", "VQDM": "imagenet_ai_0419_vqdm",
    "BigGAN": "imagenet_ai_0419_biggan",
}  # fmt: skip


def genimage(grow, names: tuple[str, ...] = tuple(GENIMAGE), train: int = 30, test: int = 6) -> Path:
    """GenImage as downloaded; other generators bring training images too, which must not be used."""
    folders = []
    for name in names:
        base = f"{name}/{GENIMAGE[name]}"
        n = train if name == "stable_diffusion_v_1_4" else 2
        folders += [(f"{base}/train/{c}", n) for c in ("ai", "nature")]
        folders += [(f"{base}/val/{c}", test) for c in ("ai", "nature")]
    return grow(*folders)


def forensynths(grow, train: int = 10) -> Path:
    """ForenSynths: a training tree of classes, test sets with and without a class level."""
    both = ("0_real", "1_fake")
    folders = [(f"train/{kind}/{c}", train) for kind in ("car", "cat") for c in both]
    folders += [(f"val/cat/{c}", 6) for c in both]
    for name in ("progan", "cyclegan", "stylegan"):
        folders += [(f"test/{name}/{kind}/{c}", 3) for kind in ("horse", "cat") for c in both]
    for name in ("biggan", "gaugan", "stargan", "deepfake", "seeingdark", "san", "crn", "imle"):
        folders += [(f"test/{name}/{c}", 5) for c in both]
    return grow(*folders)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Preset:
    monkeypatch.setenv("ITEMKIT_DATA", str(tmp_path / "nothing"))
    preset = Preset(
        name="stub", about="For these tests.", captioner=fakes.FakeCaptioner(), encoder=fakes.FakeEncoder(),
        parser=fakes.FakeParser(), localiser=fakes.FakeLocaliser(),
    )  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "stub", preset)
    monkeypatch.setattr(study, "MisalignmentMLP", partial(study.MisalignmentMLP, max_epochs=4))
    return preset


# ------------------------------------------------------------------------------------------------ data files


def test_every_protocol_can_be_read() -> None:
    every = ["aigibench", "communityforensics", "forensynths", "genimage", "mini", "openfake", "own",
             "synthbuster", "ufd19"]  # fmt: skip
    assert protocol_names() == every
    for name in protocol_names():
        plan = get_protocol(name)
        names = [name.casefold() for name in (*plan.test, *sum(plan.alias.values(), []))]
        assert len(names) == len(set(names)) and plan.title and plan.note
        assert not plan.test or set(plan.train) | set(plan.alias) <= set(plan.test)
    assert [len(get_protocol(name).test) for name in every] == [0, 0, 11, 8, 0, 0, 0, 0, 19]
    with pytest.raises(InputError, match="unknown protocol 'genimag'; expected.* Did you mean 'genimage'"):
        get_protocol("genimag")


# --------------------------------------------------------------------------------------- who plays which part


def test_genimage_trains_on_one_generator_with_its_own_reals(grow) -> None:
    table, missing = get_protocol("genimage").select(read_manifest(genimage(grow)))
    assert missing == []
    counts = table.groupby(["split", "label", "generator", "source"]).size()
    sd = "stable_diffusion_v_1_4"
    # it has no validation images: they are carved from train by content, once the files are read
    assert counts["train", 1].to_dict() == {(sd, sd): 30}
    assert counts["train", 0].to_dict() == {("real", sd): 30}
    assert counts["test", 1].to_dict() == {(name, name): 6 for name in GENIMAGE}
    assert counts["test", 0].to_dict() == {("real", name): 6 for name in GENIMAGE}


def test_forensynths_trains_on_all_classes_of_its_training_tree(grow) -> None:
    table, _ = get_protocol("forensynths").select(read_manifest(forensynths(grow)))
    counts = table[table["label"] == 1].groupby(["split", "generator"]).size()
    assert counts["train"].to_dict() == {"progan": 20} and counts["val"].to_dict() == {"progan": 6}
    assert counts["test"].to_dict() | {"progan": 6, "biggan": 5} == counts["test"].to_dict()
    assert (table[table["label"] == 0]["split"] == "train").sum() == 20


def test_ufd_sets_share_reals_and_each_keeps_its_own(grow) -> None:
    root = forensynths(grow)
    base = "test/diffusion_datasets"
    shared = ("ldm_200", "ldm_200_cfg", "ldm_100", "glide_100_27", "glide_50_27", "glide_100_10", "dalle")
    grow((f"{base}/imagenet/0_real", 5), (f"{base}/laion/0_real", 7), (f"{base}/guided/1_fake", 4),
         *((f"{base}/{name}/1_fake", 4) for name in shared))  # fmt: skip
    plan = get_protocol("ufd19")
    table, missing = plan.select(read_manifest(root, plan.layout))
    assert missing == []
    test = table[table["split"] == "test"]
    reals = test[test["label"] == 0].groupby("source").size()
    assert reals["imagenet"] == 5 and reals["laion"] == 7  # once, however many sets share them
    sources = test[test["label"] == 1].groupby("generator")["source"].unique()
    assert sources["guided"].tolist() == ["imagenet"] and sources["dalle"].tolist() == ["laion"]


def test_aigibench_tests_whatever_is_in_its_test_tree(grow) -> None:
    both = ("0_real", "1_fake")
    root = grow(*((f"train/{name}/{c}", 6) for name in ("progan", "sd14") for c in both),
                *((f"test/{name}/{c}", 4) for name in ("progan", "flux", "swap") for c in both))  # fmt: skip
    plan = get_protocol("aigibench")
    table, missing = plan.select(read_manifest(root, plan.layout))
    counts = table[table["label"] == 1].groupby(["split", "generator"]).size()
    assert missing == [] and counts["train"].to_dict() == {"training set": 12}
    assert counts["test"].to_dict() == {"flux": 4, "progan": 4, "swap": 4}
    assert table[table["label"] == 0].groupby("split").size().to_dict() == {"test": 12, "train": 12}
    with pytest.raises(InputError, match="no real and no fake image of the training set"):
        plan.select(read_manifest(root / "test"))


@pytest.mark.parametrize(
    ("name", "model", "image", "real_source", "training"),
    [("openfake", "model", "image", None, "train"),
     ("communityforensics", "model_name", "image_data", "real_source", "Systematic")],
)  # fmt: skip
def test_sets_with_images_inside_train_on_all_models(
    name: str, model: str, image: str, real_source: str | None, training: str, tmp_path: Path
) -> None:
    rows = []
    for i in range(24):
        fake, test = i % 2 == 1, i >= 12
        made = {image: picture(i, fake, 32), "label": "fake" if fake else "real", "prompt": "a dog",
                "split": "test" if test else training}  # fmt: skip
        made[model] = ("flux", "sdxl")[i // 2 % 2] if fake else "laion" if not real_source else ""
        rows.append(made | ({real_source: None if fake else "coco"} if real_source else {}))
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    plan = get_protocol(name)
    table, missing = plan.select(read_manifest(tmp_path / "t.parquet", plan.layout, images_to=tmp_path / "i"))
    assert missing == [] and table["source"].nunique() == 1
    counts = table.groupby(["split", "generator"]).size()
    assert counts["train"].to_dict() == {"real": 6, "training set": 6}
    assert counts["test"].to_dict() == {"flux": 3, "real": 6, "sdxl": 3}


def test_synthbuster_takes_its_reals_from_another_folder(grow, tmp_path: Path) -> None:
    fakes = grow(("glide", 4), ("dalle2", 4), root="synthbuster")
    reals = grow((".", 6), root="RAISE-1k")
    plan = get_protocol("synthbuster")
    table = read_manifest(fakes, plan.layout, real_root=reals)
    assert table.groupby("generator").size().to_dict() == {"dalle2": 4, "glide": 4, "real": 6}
    assert not plan.train and plan.conditions == ["raw", "equalised"]


def test_names_in_any_case_and_by_alias(grow) -> None:
    both = ("ai", "nature")
    root = grow(*((f"sd14/train/{c}", 20) for c in both), *((f"SD14/val/{c}", 4) for c in both),
                *((f"midjourney/val/{c}", 4) for c in both))  # fmt: skip
    table, missing = get_protocol("genimage").select(read_manifest(root), skip_missing=True)
    assert set(table["generator"]) == {"real", "stable_diffusion_v_1_4", "Midjourney"}
    assert missing == ["SD v1.5", "ADM", "GLIDE", "Wukong", "VQDM", "BigGAN"]


def test_what_is_missing_is_named(grow) -> None:
    plan = get_protocol("genimage")
    root = genimage(grow, ("stable_diffusion_v_1_4", "ADM", "glide"))
    with pytest.raises(InputError) as error:
        plan.select(read_manifest(root))
    assert "5 of 8 test sets are missing or lack one class: Midjourney, SD v1.5, Wukong, VQDM, BigGAN" in str(
        error.value
    )
    assert "train: stable_diffusion_v_1_4 (30)" in str(error.value) and "--skip-missing" in str(error.value)
    with pytest.raises(
        InputError, match="no real and no fake image of the training set stable_diff.*val: ADM"
    ):
        plan.select(read_manifest(grow(("ADM/val/ai", 2), ("ADM/val/nature", 2), root="other")))
    for path in (root / "ADM").rglob("val/nature/*"):
        path.unlink()
    assert "ADM" in plan.select(read_manifest(root), skip_missing=True)[1]  # fakes without their reals


def test_a_share_of_each_set(grow) -> None:
    plan = get_protocol("genimage")
    manifest = read_manifest(genimage(grow, ("stable_diffusion_v_1_4", "ADM")))
    table, _ = plan.select(manifest, skip_missing=True, per_set=5)
    counts = table.groupby(["split", "generator", "source"]).size()
    assert counts["test"].max() == counts["test"].min() == 5
    assert (table["split"] != "test").sum() == 10
    again, _ = plan.select(manifest.sample(frac=1, random_state=1), skip_missing=True, per_set=5)
    assert set(again["path"]) == set(table["path"])
    with pytest.raises(InputError, match="at most 3 images of each set: expected at least 4"):
        plan.select(manifest, skip_missing=True, per_set=3)


# --------------------------------------------------------------------------------------------- the whole way


def test_genimage_from_one_command(grow, stub: Preset, tmp_path: Path, capsys, monkeypatch) -> None:
    root = genimage(grow, ("stable_diffusion_v_1_4", "ADM", "BigGAN"), train=40)
    copy = next((root / "stable_diffusion_v_1_4").rglob("val/nature/*"))
    next((root / "stable_diffusion_v_1_4").rglob("train/nature")).joinpath("copy.JPEG").write_bytes(
        copy.read_bytes()
    )
    images = [str(p.relative_to(tmp_path)) for p in root.rglob("*.*")]
    rng = np.random.default_rng(0)
    pd.DataFrame({"path": images, "score": rng.normal(size=len(images))}).to_csv(tmp_path / "s.csv")
    words = ["study", "--protocol", "genimage", "--data", str(root), "--out", str(tmp_path / "out")]
    words += ["--preset", "stub", "--device", "cpu", "--seeds", "1", "--jobs", "1"]
    words += ["--scores", f"other={tmp_path / 's.csv'}"]
    words += [f"--without={name}" for name in SLOW if name not in ("spectrum", "image_mlp")]
    assert cli.main(words) == 2
    assert "5 of 8 test sets are missing" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*words, "--skip-missing"]) == 0
    text = capsys.readouterr().out
    assert "Left out, because they are not in the folder: Midjourney, SD v1.5, GLIDE, Wukong, VQDM" in text
    assert "| PUBLISHED, NOT OURS: ResNet-50 | 72.1 |" in text and "mean accuracy of 8 sets" in text
    assert "PUBLISHED, NOT OURS, fakes at JPEG q96 (mean accuracy, only the fakes encoded anew" in text
    assert re.search("Left out on request: .*CNN on pixels", text)
    assert "raw: 1 training or validation image left out, because a copy of each is among" in text
    order = [text.index(f"\n| {name} |") for name in ("SD v1.4", "ADM", "BigGAN", MEAN, WORST)]
    assert order == sorted(order)  # the published rows' order, not the alphabet's

    folder = tmp_path / "out" / "study-genimage"
    table = pd.read_csv(folder / "table.csv")
    ours, theirs = table[table["kind"] == OURS], table[table["kind"] == THEIRS]
    assert set(ours["condition"]) == {"raw", "equalised"} and len(theirs) == 14
    assert set(theirs["row"]) == {MEAN} and theirs["low"].isna().all()
    # what made it, and what stands behind it
    assert set(ours["preset"]) == {"stub"} and ours["itemkit"].notna().all()
    assert ours["models"].str.fullmatch("[0-9a-f]{16}").all() and ours["models"][0] in text
    cell = ours[ours["row"] == "ADM"]
    assert set(cell["n_real"]) == set(cell["n_fake"]) == {6} and set(cell["interval"]) == {"95% over images"}
    raw = ours[ours["condition"] == "raw"]
    assert {"item", "early", "other", "spectrum"} <= set(raw["detector"])
    assert "other" not in set(ours.loc[ours["condition"] == "equalised", "detector"])
    cells = raw[(raw["detector"] == "image_mlp") & (raw["metric"] == "accuracy")].set_index("row")["value"]
    assert set(cells.index) == {"SD v1.4", "ADM", "BigGAN", MEAN, WORST}
    assert cells[MEAN] == pytest.approx(cells[["SD v1.4", "ADM", "BigGAN"]].mean())
    assert cells[WORST] == cells[["SD v1.4", "ADM", "BigGAN"]].min()
    # the raw classes differ in codec and blur, which pixels must show
    spectrum = raw[(raw["detector"] == "spectrum") & (raw["metric"] == "auroc")].set_index("row")["value"]
    assert spectrum[MEAN] > 0.9

    # the images to score elsewhere are listed, and which of them were carved from the training images
    listed = pd.read_csv(folder / "manifest.csv")
    carved = listed[listed["split"] == "val"]
    assert set(carved["split_given"]) == {"train"} and set(carved["label"]) == {0, 1}
    same = listed[listed["split"] != "val"]
    assert (same["split_given"] == same["split"]).all() and listed["image_id"].str.len().eq(64).all()

    # nothing is computed twice
    seen = stub.encoder.images_encoded
    monkeypatch.setattr(matrix, "_run", None)
    assert cli.main([*words, "--skip-missing"]) == 0
    assert stub.encoder.images_encoded == seen
    pd.testing.assert_frame_equal(pd.read_csv(folder / "table.csv"), table)


def own_images(folder: Path, n: int, generators: tuple[str, ...] = ("gan", "flow")) -> Path:
    """A manifest without splits: as many fakes of each generator as reals, sizes of all kinds."""
    rows = []
    for i in range(n):
        name = ("real", *generators)[i % (1 + len(generators))]
        folder.mkdir(exist_ok=True)
        suffix = ".jpg" if name == "real" else ".png"
        (folder / f"{i}{suffix}").write_bytes(picture(i, name != "real", 40 + 7 * (i % 11)))
        rows.append({"path": f"{i}{suffix}", "label": int(name != "real"), "generator": name})
    pd.DataFrame(rows).to_csv(folder / "m.csv", index=False)
    return folder / "m.csv"


def test_own_images_without_a_protocol(stub: Preset, tmp_path: Path, monkeypatch) -> None:
    """Each generator trains and each tests, raw and equalised; one contender breaks, the others go on."""
    data = own_images(tmp_path / "images", 150)
    broken = CONTROLS["image_linear"]

    class Broken(NearestNeighbour):
        def fit(self, *parts):
            raise ValueError("singular\nmatrix")

    monkeypatch.setitem(CONTROLS, "image_linear", replace(broken, learner=Broken()))
    report = study.run_study(None, read_manifest(data), tmp_path / "out", "stub", without=SLOW, **QUICK)
    assert report.path == tmp_path / "out" / "study-own" / "table.md"
    assert [failure.partition(" failed, ")[::2] for failure in report.failures] == [
        (f"{condition}: control: image only, linear", "trained on flow: ValueError: singular")
        for condition in ("raw", "equalised")
    ]
    text = report.path.read_text()
    assert "**raw: control: image only, linear failed, trained on flow: ValueError: singular**" in text
    table = report.table
    assert set(table["condition"]) == {"raw", "equalised"} and "image_linear" not in set(table["detector"])
    assert {"item", "hierarchical_cosine", "early", "item + caption likelihood"} <= set(table["detector"])
    pairs = {"gan → flow", "flow → gan", "gan → gan", "flow → flow"}
    assert set(table["row"]) == {*pairs, MEAN, WORST}
    seen = table[table["seen"] == True]  # noqa: E712 - means are neither
    assert set(seen["row"]) == {"gan → gan", "flow → flow"}
    one = table.query("detector == 'item' and metric == 'auroc' and condition == 'raw'").set_index("row")
    assert one.loc[MEAN, "value"] == pytest.approx(one.loc[["gan → flow", "flow → gan"], "value"].mean())
    for condition in ("raw", "equalised"):
        assert f"## {condition}, trained on one generator: unseen cells: 2, families: 2" in text
    for title in ("AUROC", "families", "worst cell", "AP", "TPR at 1 % FPR", "of real", "balanced, oracle"):
        assert f"| {title} |" in text
    # too few reals to promise 5 %: said, empty, and nothing else is missing
    accuracy = table[table["metric"] == "balanced_accuracy"]
    assert accuracy["value"].isna().all() and table[table["metric"] == "ap"]["value"].notna().all()
    assert "raw: Accuracies are empty: a false-positive rate of 0.05 needs at least 19 real" in text
    assert "train 70 %" in text  # the images came without splits
    listed = pd.read_csv(report.path.parent / "manifest.csv")
    assert set(listed["split"]) == {"train", "val", "test"} and listed["split_given"].isna().all()
    side = int(re.search(r"equalised: every image cropped and scaled to (\d+) px", text)[1])
    assert 32 <= side <= 40  # of images of 32 to 110 px: few are enlarged


def test_own_images_of_one_generator(stub: Preset, tmp_path: Path) -> None:
    manifest = read_manifest(own_images(tmp_path / "images", 80, ("gan",)))
    manifest.loc[:3, "label"] = pd.NA
    report = study.run_study(None, manifest, tmp_path / "out", "stub", without=SLOW, **QUICK)
    text = report.path.read_text()
    assert not report.failures
    assert "the fakes are of one family (gan), so nothing is unseen" in text
    assert "raw: 4 images without label or split left out." in text
    assert set(report.table["row"]) == {"gan → gan", MEAN, WORST} and "| gan → gan (seen) |" in text
    with pytest.raises(
        InputError, match="A study needs real and fake images; the manifest has 40 real, 0 fake"
    ):
        reals = read_manifest(own_images(tmp_path / "images", 80, ("gan",)))
        study.run_study(None, reals[reals["label"] == 0], tmp_path / "out", "stub", without=SLOW, **QUICK)


def test_an_interrupted_study_goes_on(grow, stub: Preset, tmp_path: Path, monkeypatch) -> None:
    root = forensynths(grow)
    done = []

    class Stopped(NearestNeighbour):
        def fit(self, *parts):
            if not done:
                done.append(parts)
                raise KeyboardInterrupt
            return super().fit(*parts)

    control = CONTROLS["image_nearest"]
    monkeypatch.setitem(CONTROLS, "image_nearest", replace(control, learner=Stopped()))
    options = QUICK | {"without": SLOW}
    with pytest.raises(KeyboardInterrupt):
        study.run_study(
            "forensynths", read_manifest(root, "forensynths"), tmp_path / "out", "stub", **options
        )
    folder = tmp_path / "out" / "study-forensynths"
    kept = sorted(path.name for path in (folder / "raw" / "runs").iterdir())
    assert kept and not (folder / "table.md").exists()
    trained, run = [], matrix._run
    monkeypatch.setattr(matrix, "_run", lambda *args: trained.append(args[0]) or run(*args))
    text = study.run_study(
        "forensynths", read_manifest(root, "forensynths"), tmp_path / "out", "stub", **options
    ).path.read_text()
    assert len(trained) == 2 * len(list((folder / "raw" / "runs").iterdir())) - len(kept)  # raw and equalised
    assert "PUBLISHED" not in text and "no reference column" in text


def test_equalised_means_one_size_and_codec_for_all() -> None:
    transform = study._transform("equalised", get_protocol("genimage"), None, [])
    sides = {transform(Image.new("RGB", size), "x").size for size in ((48, 48), (300, 200), (128, 500))}
    assert sides == {(128, 128)}
    assert "size=128, codec='jpeg', quality=96, subsampling='4:2:0'" in transform.fingerprint()["name"]


def test_the_mini_study_and_its_tables_from_the_scores(
    stub: Preset, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The laboratory's path, with other images: families, headline, differences, fusions; then no model."""
    own = pd.read_csv(own_images(tmp_path / "images", 200, ("painter", "flow", "edit", "flow")))
    own["split"] = np.array(["train", "val", "test"])[np.arange(200) // 5 % 3]
    own.to_csv(tmp_path / "images" / "m.csv", index=False)
    asked = []

    def laid_out(out, which="images"):
        asked.append(which)
        return read_manifest(tmp_path / "images" / "m.csv")

    monkeypatch.setattr(workflow, "lab_manifest", laid_out)
    plan = get_protocol("mini")
    more = replace(
        plan, conditions=["clean", "camera + random JPEG"], images={"camera + random JPEG": "camera"}
    )
    monkeypatch.setattr(study, "get_protocol", lambda name: more)
    unneeded = set(CONTROLS) - {"image_mlp", "caption_likelihood", "cosine_mean_local"}
    options = QUICK | {"without": sorted(unneeded)}
    report = study.run_study(out=tmp_path / "out", preset="stub", **options)
    text, found = report.path.read_text(), report.table
    assert report.failures == [] and report.path.parent.name == "study-mini"
    # a condition may look at other images, and is one more name in the protocol's file
    assert set(found["condition"]) == {"clean", "camera + random JPEG"} and "camera" in asked
    assert {"item", "global_absolute", "hierarchical_cosine", "early", "item + image"} <= {*found["detector"]}
    counted = found[found["seen"] == False]  # noqa: E712 - means are neither
    # one generator of each family trains; edit and flow are of one, so neither is unseen to the other
    assert set(counted["row"]) - {WORST} == {"painter → flow", "painter → edit", "flow → painter"}
    assert "## What each contender would mean" in text and CONTROLS["image_mlp"].if_it_won in text
    fusion = pd.read_csv(report.path.parent / "fusion.csv")
    assert set(fusion["fusion"]) == {"item + caption likelihood", "item + image", "early"}
    assert len(fusion) == 2 * 3 and set(fusion["n_cells"]) == {3}
    reached = fusion["goal"] == "reached"
    assert reached.any() or fusion["goal"].str.contains("short of 0.90|below the better part in").all()
    headline = pd.read_csv(report.path.parent / "headline.csv")
    assert len(headline) == 3 and f"| {headline['detector'][0]} | {headline['clean: mean'][0]} |" in text
    differences = pd.read_csv(report.path.parent / "differences.csv")
    assert (
        set(differences["reference"]) == {"item"} and (differences["p_holm"] >= differences["p_value"]).all()
    )

    # every table again from the file of scores: no image, no model
    for name in ("lab_manifest", "features"):
        monkeypatch.setattr(workflow, name, None)
    monkeypatch.setattr(study, "MisalignmentMLP", None)
    scores = report.path.parent / "scores.parquet"
    words = ["study", "--from", str(scores), "--out", str(tmp_path / "again")]
    assert cli.main(words) == 0
    again = tmp_path / "again" / "study-from-scores"
    assert (again / "table.md").read_text() == text
    for name in ("table", "headline", "fusion", "fusion_cells", "differences"):
        assert (again / f"{name}.csv").read_bytes() == (report.path.parent / f"{name}.csv").read_bytes()
    # a detector that ran elsewhere joins there, in the same terms
    listed = pd.read_csv(report.path.parent / "manifest.csv")
    assert set(listed["condition"]) == {"clean"}  # here both conditions have the same images
    listed.assign(score=listed["label"])[["path", "score"]].to_csv(tmp_path / "mine.csv", index=False)
    assert cli.main([*words, "--scores", f"mine={tmp_path / 'mine.csv'}"]) == 0
    capsys.readouterr()
    joined = pd.read_csv(again / "headline.csv").set_index("detector")
    assert joined.loc["mine (scores from elsewhere)", "clean: mean"] == "1.00 (1.00-1.00)"
    assert cli.main([*words, "--data", "photos"]) == 2
    assert "--from has its images and protocol" in capsys.readouterr().err
    assert cli.main([*words, "--scores", f"item={tmp_path / 'mine.csv'}"]) == 2
    assert "clean has a contender 'item' already; choose another" in capsys.readouterr().err


def test_errors_before_anything_is_computed(stub: Preset, tmp_path: Path) -> None:
    pd.DataFrame({"image_id": ["a"], "score": [0.5]}).to_csv(tmp_path / "s.csv", index=False)
    wrong = [
        ({"protocol": "genimage"}, "protocol 'genimage' needs images: give the folder"),
        ({"protocol": "own"}, "protocol 'own' needs images"),
        ({"without": ["cnm"]}, "unknown control 'cnm'; .* Did you mean 'cnn'"),
        ({"per_set": 5}, "--per-set and --skip-missing are for a data set's protocol, not for 'mini'"),
        (
            {"scores": ["scores.csv"]},
            "--scores scores.csv: expected name=scores.csv.*camera, camera . random JPEG, raw",
        ),
        ({"scores": ["a@blur=s.csv"]}, "--scores a@blur=s.csv: expected name=scores.csv"),
        ({"scores": [f"a={tmp_path / 's.csv'}"] * 2}, "camera has a contender 'a' already"),
        ({"scores": ["a=none.csv"]}, "cannot read scores from none.csv"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            study.run_study(out=tmp_path, preset="stub", **options)
