"""The field's protocols on trees laid out like their data sets: what trains, what tests, one table."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from itemkit import cli, presets, study
from itemkit import study_run as command
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.manifest import read_manifest
from itemkit.perturb import jpeg_random
from itemkit.presets import Preset
from itemkit.protocols import get_protocol, protocol_names
from itemkit.results import MEAN, OURS, THEIRS, WORST
from minilab.world import render_index

import fakes

PIXELS = ("cnn", "spectrum", "noise_residual")
QUICK = {"device": "cpu", "seeds": 1, "n_boot": 20, "progress": False}


@pytest.fixture(scope="session")
def renders() -> list[Image.Image]:
    return [Image.fromarray(render_index("spare", 50_000 + i).image) for i in range(24)]


def picture(renders: list[Image.Image], number: int, fake: bool) -> bytes:
    """A render as a JPEG; for a fake, blurred and with its colours exchanged, as a PNG."""
    image = renders[number % len(renders)].rotate(number // len(renders), resample=Image.Resampling.BILINEAR)
    buffer = BytesIO()
    if fake:
        red, green, blue = image.split()
        image = Image.merge("RGB", (blue, red, green)).filter(ImageFilter.GaussianBlur(0.6))
    image.save(buffer, "PNG" if fake else "JPEG")
    return buffer.getvalue()


@pytest.fixture
def grow(tmp_path: Path, renders: list[Image.Image]):
    """Write n images into each folder; "ai" and "1_fake" hold fakes."""
    number = iter(range(10_000))

    def write(*folders: tuple[str, int], root: str = "data") -> Path:
        for folder, n in folders:
            fake = folder.rsplit("/", 1)[-1] in ("ai", "1_fake")
            path = tmp_path / root / folder
            path.mkdir(parents=True, exist_ok=True)
            for _ in range(n):
                i = next(number)
                (path / f"{i:05d}{'.png' if fake else '.JPEG'}").write_bytes(picture(renders, i, fake))
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
    return preset


# ------------------------------------------------------------------------------------------------ data files


def test_every_protocol_can_be_read() -> None:
    assert protocol_names() == ["forensynths", "genimage", "mini", "ufd19"]
    for name in protocol_names():
        plan = get_protocol(name)
        names = [alias for test in plan.test for alias in test.names]
        assert len(names) == len(set(names)) and plan.title and plan.note
        assert set(plan.train) <= {test.name for test in plan.test}
    assert [len(get_protocol(name).test) for name in protocol_names()] == [11, 8, 0, 19]
    with pytest.raises(InputError, match="unknown protocol 'gen'; expected one of forensynths, genimage"):
        get_protocol("gen")


def test_published_numbers_are_those_on_record_and_no_others() -> None:
    found = {
        (name, p.condition, p.metric, method): value
        for name in protocol_names() for p in get_protocol(name).published for method, value in p.values
    }  # fmt: skip
    raw = {"ResNet-50": 72.1, "UnivFD": 79.5, "DE-FAKE (captions)": 84.7, "NPR": 88.6, "FatFormer": 88.9,
           "DRCT": 89.5, "Effort": 91.1, "C2P-CLIP (rerun)": 93.3}  # fmt: skip
    jpeg = {"SAFE": 50.3, "NPR": 51.5, "UnivFD": 64.1, "C2P-CLIP": 74.4, "DRCT": 84.7, "DDA": 91.7}
    accuracy = {"UnivFD": 81.4, "C2P-CLIP": 93.8, "Effort": 95.2, "Effort, oracle thresholds": 97.9}
    expected = {("genimage", "raw", "accuracy", m): v for m, v in raw.items()}
    expected |= {("genimage", "fakes at JPEG q96", "accuracy", m): v for m, v in jpeg.items()}
    expected |= {("ufd19", "raw", "accuracy", m): v for m, v in accuracy.items()}
    expected |= {("ufd19", "raw", "ap", m): v for m, v in
                 {"UnivFD": 90.1, "C2P-CLIP": 98.7, "Effort": 99.3}.items()}  # fmt: skip
    assert found == expected


# --------------------------------------------------------------------------------------- who plays which part


def test_genimage_trains_on_one_generator_with_its_own_reals(grow) -> None:
    table, missing = get_protocol("genimage").select(read_manifest(genimage(grow)))
    assert missing == []
    counts = table.groupby(["split", "label", "generator", "source"]).size()
    sd = "stable_diffusion_v_1_4"
    assert counts["train", 1].to_dict() == {(sd, sd): 15} and counts["train", 0].to_dict() == {
        ("real", sd): 15
    }
    assert counts["val", 1].sum() == counts["val", 0].sum() == 15  # carved out: GenImage has none of its own
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


def test_genimage_from_one_command(grow, stub: Preset, tmp_path: Path, capsys) -> None:
    root = genimage(grow, ("stable_diffusion_v_1_4", "ADM", "BigGAN"), train=24)
    images = [str(p.relative_to(tmp_path)) for p in root.rglob("*.*")]
    rng = np.random.default_rng(0)
    pd.DataFrame({"path": images, "score": rng.normal(size=len(images))}).to_csv(tmp_path / "s.csv")
    words = ["study", "--protocol", "genimage", "--data", str(root), "--out", str(tmp_path / "out")]
    words += ["--preset", "stub", "--device", "cpu", "--seeds", "1", "--jobs", "1"]
    words += ["--scores", f"other={tmp_path / 's.csv'}"]
    assert cli.main(words) == 2
    assert "5 of 8 test sets are missing" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*words, "--skip-missing"]) == 0
    text = capsys.readouterr().out
    assert "Left out, because they are not in the folder: Midjourney, SD v1.5, GLIDE, Wukong, VQDM" in text
    assert "PUBLISHED, NOT OURS: mean, raw" in text and "| ResNet-50 |" in text
    order = [text.index(f"\n| {name} |") for name in ("SD v1.4", "ADM", "BigGAN", MEAN, WORST)]
    assert order == sorted(order)  # the published rows' order, not the alphabet's

    table = pd.read_csv(tmp_path / "out" / "study-genimage" / "table.csv")
    ours, theirs = table[table["kind"] == OURS], table[table["kind"] == THEIRS]
    assert set(ours["condition"]) == {"raw", "equalised"} and len(theirs) == 14
    assert set(theirs["row"]) == {MEAN} and theirs["low"].isna().all()
    raw = ours[ours["condition"] == "raw"]
    assert {"item", "early", "other", *study.recipes.CONTROLS} <= set(raw["detector"])
    assert "other" not in set(ours.loc[ours["condition"] == "equalised", "detector"])
    cells = raw[(raw["detector"] == "image_mlp") & (raw["metric"] == "accuracy")].set_index("row")["value"]
    assert set(cells.index) == {"SD v1.4", "ADM", "BigGAN", MEAN, WORST}
    assert cells[MEAN] == pytest.approx(cells[["SD v1.4", "ADM", "BigGAN"]].mean())
    assert cells[WORST] == cells[["SD v1.4", "ADM", "BigGAN"]].min()
    # the raw classes differ in codec and blur, which pixels must show
    spectrum = raw[(raw["detector"] == "spectrum") & (raw["metric"] == "auroc")].set_index("row")["value"]
    assert spectrum[MEAN] > 0.9

    # the table can be made again from the runs alone, and nothing is computed twice
    kept = study.Study.load(tmp_path / "out" / "study-genimage" / "raw")
    value = kept.table.query("detector == 'image_mlp' and metric == 'accuracy' and test_generator == 'ADM'")
    assert value["value"].mean() == pytest.approx(cells["ADM"])
    assert set(value["n_real"]) == {6}  # its own reals only
    seen = stub.encoder.images_encoded
    assert cli.main([*words, "--skip-missing"]) == 0
    assert stub.encoder.images_encoded == seen
    about = json.loads((tmp_path / "out" / "study-genimage" / "raw" / "study.json").read_text())
    assert about["options"]["runs_reused"] == len(about["runs"]) == len(kept.detectors)
    again = pd.read_csv(tmp_path / "out" / "study-genimage" / "table.csv")
    pd.testing.assert_frame_equal(again, table)


def test_an_interrupted_study_goes_on(grow, stub: Preset, tmp_path: Path, monkeypatch) -> None:
    root = forensynths(grow)
    done, run = [], study._run

    def stopped(name: str, *rest: object) -> object:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        return run(name, *rest)

    monkeypatch.setattr(study, "_run", stopped)
    options = QUICK | {"without": PIXELS}
    with pytest.raises(KeyboardInterrupt):
        command.run_study("forensynths", root, tmp_path / "out", "stub", **options)
    kept = sorted((tmp_path / "out" / "study-forensynths" / "raw" / "runs").iterdir())
    assert len(kept) == 5 and not (tmp_path / "out" / "study-forensynths" / "table.md").exists()
    stamps = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.setattr(study, "_run", run)
    text = command.run_study("forensynths", root, tmp_path / "out", "stub", **options).read_text()
    about = json.loads((tmp_path / "out" / "study-forensynths" / "raw" / "study.json").read_text())
    assert about["options"]["runs_reused"] == 5
    assert len(stamps) == 5 and "PUBLISHED" not in text and "no reference column" in text
    assert "Left out on request: CNN on pixels, power spectrum, noise residual." in text


def test_copies_between_train_and_test_are_left_out(grow, stub: Preset, tmp_path: Path) -> None:
    root = genimage(grow, ("stable_diffusion_v_1_4",))
    base = root / "stable_diffusion_v_1_4" / "imagenet_ai_0419_sdv4"
    source = next((base / "val" / "nature").iterdir())
    (base / "train" / "nature" / "copy.JPEG").write_bytes(source.read_bytes())
    text = command.run_study(
        "genimage", root, tmp_path / "out", "stub", skip_missing=True, without=PIXELS, **QUICK
    ).read_text()
    assert (
        "raw: 1 training and validation images left out, because a copy of each is among the test or" in text
    )


def test_equalised_means_one_size_and_codec_for_all(grow, tmp_path: Path) -> None:
    plan = get_protocol("genimage")
    transform = command.Equalised(plan.equalise)
    sides = {transform(Image.new("RGB", size), "x").size for size in ((48, 48), (300, 200), (128, 500))}
    assert sides == {(128, 128)}
    assert transform.fingerprint() == {
        "equalise": {"size": 128, "codec": "jpeg", "quality": 96, "subsampling": "4:2:0"}
    }
    jpeg = jpeg_random()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    first, again, other = (np.asarray(jpeg(noise, name)) for name in ("a", "a", "b"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_mini_study_with_its_answers(stub: Preset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "KINDS", ("cosine", "absolute"))
    monkeypatch.setattr(command, "LEVELS", ("global", "hierarchical"))
    monkeypatch.setattr(command, "FRESH", {"val": 5, "test": 4})
    table = fakes.make_images(tmp_path / "images", 228)
    table["generator"] = np.where(
        table["label"] == 0, "real", np.where(np.arange(228) % 4 == 1, "gan", "flow")
    )
    kind = np.arange(228) // 4 % 3
    table["split"] = np.array(["train", "val", "test"])[kind]
    table.to_csv(tmp_path / "m.csv", index=False)
    options = QUICK | {"without": ("cnn", "image_nearest"), "seeds": 2}
    path = command.run_study("mini", tmp_path / "m.csv", tmp_path / "out", "stub", **options)
    text = path.read_text()
    found = pd.read_csv(path.parent / "table.csv")
    assert set(found["condition"]) == {"clean", "random JPEG"} and set(found["kind"]) == {OURS}
    assert {"item", "global_cosine", "global_absolute", "hierarchical_cosine", "text_only", "early",
            "item + image", "item + spectrum"} <= set(found["detector"])  # fmt: skip
    assert set(found["row"]) == {"gan → flow", "flow → gan", MEAN, WORST} and set(found["n_seeds"]) == {2}
    fusion = pd.read_csv(path.parent / "fusion.csv")
    joined = {"caption likelihood", "image", "noise residual", "spectrum"}
    assert set(fusion["fusion"]) == {f"item + {part}" for part in joined} | {"early"}
    assert len(fusion) == 2 * 5 * 2
    low = fusion[(fusion["fusion"] == "early") & (fusion["condition"] == "clean")]["difference"]
    assert (
        f"clean, early: worse than the better of its parts (item, image_mlp) in {(low < 0).sum()} of 2"
        in text
    )
    promises = pd.read_csv(path.parent / "promises.csv")
    assert len(promises) == 6  # foreign images: no new renders
    assert "needs at least 99 real validation images" in promises["note"].fillna("").str.cat()
    kept = json.loads((path.parent / "clean" / "study.json").read_text())["runs"]
    assert any(name.startswith("item_+_image") for name in kept)  # fusions are kept like all others
    pd.DataFrame({"image_id": ["a"], "score": [0.5]}).to_csv(tmp_path / "s.csv", index=False)
    taken = {"scores": [f"item={tmp_path / 's.csv'}"]}
    with pytest.raises(InputError, match="that name is a contender of ours"):
        command.run_study("mini", tmp_path / "m.csv", tmp_path / "out", "stub", **options | taken)
    twice = {"scores": [f"a={tmp_path / 's.csv'}"] * 2}
    with pytest.raises(InputError, match="given twice for clean"):
        command.run_study("mini", tmp_path / "m.csv", tmp_path / "out", "stub", **options | twice)
    table[table["generator"] != "gan"].to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(InputError, match="of one family \\(flow\\), so nothing is unseen"):
        command.run_study("mini", tmp_path / "one.csv", tmp_path / "out1", "stub", **options)
    with pytest.raises(InputError, match="--per-set and --skip-missing go with a data set's protocol"):
        command.run_study("mini", tmp_path / "m.csv", tmp_path, "stub", per_set=5)


def test_new_renders_are_in_no_split_of_the_data_set(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "FRESH", {"val": 2, "test": 3})
    manifest = read_manifest(command.fresh_renders(tmp_path))
    assert manifest["split"].value_counts().to_dict() == {"test": 3, "val": 2}
    assert set(manifest["label"]) == {0}
    expected = render_index("test", command.FRESH_FROM + 2).image
    last = np.asarray(Image.open(manifest["path"].iloc[-1]))
    np.testing.assert_array_equal(last, expected)
    stamp = Path(manifest["path"].iloc[0]).stat().st_mtime_ns
    command.fresh_renders(tmp_path)
    assert Path(manifest["path"].iloc[0]).stat().st_mtime_ns == stamp


def test_errors_before_anything_is_computed(stub: Preset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="protocol 'genimage' needs images: give the folder"):
        command.run_study("genimage", None, tmp_path, "stub")
    with pytest.raises(InputError, match="seeds=0: expected at least 1"):
        command.run_study("mini", None, tmp_path, "stub", seeds=0)
    with pytest.raises(InputError, match="no control 'cnm' to leave out; controls: image_mlp"):
        command.run_study("mini", None, tmp_path, "stub", without=["cnm"])
    for wrong in ("scores.csv", "a@raw=s.csv"):
        with pytest.raises(
            InputError, match=f"--scores {wrong}: expected name=scores.csv.*clean, random JPEG"
        ):
            command._elsewhere([wrong], ["clean", "random JPEG"])


@pytest.mark.real
def test_genimage_of_real_photographs(real_dir: Path, stub: Preset, tmp_path: Path) -> None:
    """Photographs and fakes of 2022 under GenImage's names: the files' format alone is found, raw."""
    index = pd.read_csv(real_dir / "index.csv")
    sets = {"stable_diffusion_v_1_4": "latent_diffusion", "glide": "glid_3_xl", "Midjourney": "dalle_mini"}
    reals = iter(index[index["label"] == "real"]["path"])
    for name, generator in sets.items():
        own = index[index["generator"] == generator]["path"].tolist()
        train = 60 if name == "stable_diffusion_v_1_4" else 0
        parts = {("train", "ai"): own[:train], ("val", "ai"): own[train : train + 30]}
        parts |= {("train", "nature"): [next(reals) for _ in range(train)]}
        parts |= {("val", "nature"): [next(reals) for _ in range(30)]}
        for (split, label), paths in parts.items():
            folder = tmp_path / "tree" / name / split / label
            folder.mkdir(parents=True)
            for path in paths:
                (folder / Path(path).name).symlink_to(real_dir / path)
    path = command.run_study(
        "genimage", tmp_path / "tree", tmp_path / "out", "stub", skip_missing=True, without=["cnn"], **QUICK
    )
    table = pd.read_csv(path.parent / "table.csv").query("metric == 'auroc' and row == 'mean of cells'")
    value = table.set_index(["detector", "condition"])["value"]
    assert value["spectrum", "raw"] > 0.8
    assert table["value"].between(0, 1).all() and value["spectrum", "equalised"] < value["spectrum", "raw"]


def test_features_join_in_any_process(grow, stub: Preset, tmp_path: Path) -> None:
    """Two processes give the scores that one gives."""
    from synthetic import make_features

    features: Features = make_features(80, 40, generators=("gan", "flow"))
    recipes = {"item": study.item("cosines"), "image": study.control("image_linear")}
    one, two = (
        study.train_on_test_on(features, recipes, (0,), n_boot=0, fpr=0.1, jobs=jobs).table for jobs in (1, 2)
    )
    pd.testing.assert_frame_equal(one, two)
