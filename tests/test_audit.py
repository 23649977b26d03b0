"""The audit finds the leaks that are there, invents none, and the equaliser closes them."""

from __future__ import annotations

import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin
from sklearn.metrics import roc_auc_score

from itemkit.audit import (
    MATCHED,
    audit,
    dhash,
    equalise_folder,
    find_duplicates,
    held_out_auroc,
    match_classes,
    measure,
)
from itemkit.errors import InputError
from itemkit.images import EqualiseConfig, ImageError, jpeg_bytes
from itemkit.manifest import read_manifest


def picture(seed: int, size=(60, 40)) -> Image.Image:
    """The same kind of picture for both classes, so that content tells nothing."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def manifest(folder: Path, n: int, make, captions=None) -> pd.DataFrame:
    """`make(number, label)` gives (image, extension, save options)."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(2 * n):
        label = number % 2
        image, extension, options = make(number, label)
        path = folder / f"{number}{extension}"
        image.save(path, **options)
        caption = captions(number, label) if captions else "A dog ."
        rows.append((str(path), label, "g" if label else "", caption))
    return read_manifest(pd.DataFrame(rows, columns=["path", "label", "generator", "caption"]))


def auroc_of(report) -> dict[str, float]:
    return report.table.set_index("property")["auroc"].to_dict()


def alike(number, label):
    size = ((60, 40), (40, 60), (64, 64))[number // 2 % 3]
    return picture(number, size), ".jpg", {"quality": (75, 90)[number // 6 % 2]}


def test_classes_that_are_alike_show_no_leak(tmp_path):
    report = audit(manifest(tmp_path, 120, alike))
    for name in ("format", "size", "width", "height", "aspect", "jpeg_quality", "metadata", "colour_mode"):
        row = report.table.set_index("property").loc[name]
        assert row["low"] <= 0.5 + 1e-9 and row["auroc"] < 0.6, row
    assert not len(report.leaks) and "No property separates the classes." in report.to_text()


def test_each_planted_leak_is_found_and_named(tmp_path):
    def make(number, label):
        if not label:
            size = ((50, 40), (80, 70), (60, 64))[number // 2 % 3]
            return picture(number, size), ".jpg", {"quality": 92, "subsampling": "4:4:4"}
        image = picture(number, (62, 62))  # one size, inside the range of the others
        if number % 20 == 1:
            return image, ".jpg", {"quality": 60, "subsampling": "4:2:0"}
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", "a prompt, 20 steps")
        return image, ".png", {"pnginfo": info}

    def captions(number, label):
        return f"highly detailed, {number}, artstation" if label else f"A dog is {number} running ."

    report = audit(manifest(tmp_path, 120, make, captions))
    found = auroc_of(report)
    for name in ("format", "size", "width", "height", "metadata", "caption_vocabulary"):
        assert found[name] > 0.9, (name, found[name])
    assert found["jpeg_quality"] == 1 and found["jpeg_subsampling"] == 1  # among the JPEG files alone
    rows = report.table.set_index("property")
    assert rows.loc["jpeg_quality", ["n_real", "n_fake"]].tolist() == [120, 12]
    assert rows.loc["format", "verdict"] == "decides"
    assert "fakes 'PNG' 90%, 'JPEG' 10%; real images 'JPEG' 100%" in rows.loc["format", "sentence"]
    assert "'artstation'" in rows.loc["caption_vocabulary", "sentence"]
    assert report.table["auroc"].dropna().is_monotonic_decreasing
    text = report.to_text()
    assert "240 images: 120 real, 120 fake" in text and "Equalise both classes before training" in text


def test_too_few_images_with_a_property_are_not_judged(tmp_path):
    def make(number, label):
        kind = ".png" if label and number > 10 else ".jpg"
        return picture(number), kind, {}

    row = audit(manifest(tmp_path, 40, make)).table.set_index("property").loc["jpeg_quality"]
    assert np.isnan(row["auroc"]) and row["verdict"] == "not measurable" and row["n_fake"] == 5


def test_unreadable_and_unlabelled_images_are_told(tmp_path):
    df = manifest(tmp_path, 20, alike)
    Path(df["path"][3]).write_bytes(b"not an image")
    Path(df["path"][7]).unlink()
    df.loc[5, "label"] = pd.NA
    report = audit(df)
    assert report.errors["path"].tolist() == df["path"][[3, 7]].tolist()
    assert report.errors["kind"].tolist() == ["not an image", "missing"]
    text = report.to_text()
    assert text.startswith("PARTIAL audit of 37 of 39 images (not read: 1 not an image, 1 missing): ")
    assert "2 images could not be read; first: " in text and "1 image without a label left out" in text


def test_one_class_is_described_and_none_readable_refused(tmp_path):
    df = manifest(tmp_path, 15, alike)
    for part in (df[df["label"] == 0], df.assign(label=pd.array([pd.NA] * 30, dtype="Int8"))):
        report = audit(part)
        text = report.to_text()
        for words in (
            "Nothing can be compared: that needs 10 images",
            "The file format: 'JPEG' 100%.",
            "The width: median",
        ):
            assert words in text
        assert report.table["auroc"].isna().all() and not len(report.leaks)
    for path in df["path"]:
        Path(path).unlink()
    with pytest.raises(InputError, match="none of the 30 images can be read; first: .*no such file"):
        audit(df)


def test_a_leak_of_one_generator_is_not_lost_in_the_whole(tmp_path):
    def make(number, label):
        odd = label and number % 8 == 1  # a quarter of the fakes
        return picture(number, (60, 40)), ".jpg", {"quality": 51 if odd else (75, 90)[number // 2 % 2]}

    df = manifest(tmp_path, 60, make)
    df["generator"] = [("real", "odd" if i % 8 == 1 else "plain")[i % 2] for i in range(120)]
    report = audit(df)
    pooled = report.table.set_index("property").loc["jpeg_quality", "auroc"]
    parts = report.parts.set_index(["set", "property"])["auroc"]
    assert parts["odd", "jpeg_quality"] == 1 and pooled < 0.75 and parts["plain", "jpeg_quality"] < 0.65
    assert report.parts.iloc[0]["set"] == "odd" and "in 'odd', reaches AUROC 1.000" in report.to_text()
    assert re.search(r"Worst of single sets.*\n\n *set .*\n *odd +\w+ +1\.000 .* decides", report.to_text())
    assert len(re.findall(r"\n *odd ", report.to_text())) == 1, "one line for each set"
    by_source = df.assign(source=["a" if i % 16 < 8 else "b" for i in range(120)])
    assert set(audit(by_source, by="source").parts["set"]) == {"a", "b"}


def test_names_that_are_not_utf8_and_broken_files_do_not_end_it(tmp_path):
    df = manifest(tmp_path, 12, alike)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    os.rename(df["path"][0], odd)
    df.loc[0, "path"] = odd
    df.loc[1, "path"] = os.fsdecode(os.fsencode(tmp_path) + b"/gone\xe9.jpg")
    report = audit(df)
    assert len(report.measurements) == 23 and report.to_text().encode()
    with pytest.warns(UserWarning, match="1 of 24 images cannot be read"):
        assert len(equalise_folder(df, tmp_path / "eq", EqualiseConfig(size=32))) == 23


def test_measure_by_hand(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    options = {"format": "JPEG", "quality": 81, "subsampling": 1, "exif": exif, "comment": b"hi"}
    picture(0, (30, 20)).save(tmp_path / "a.png", **options)
    found = measure(str(tmp_path / "a.png"))
    assert (found["format"], found["width"], found["height"], found["size"]) == ("JPEG", 30, 20, "30 x 20")
    assert (found["jpeg_quality"], found["jpeg_subsampling"]) == (81, "4:2:2")
    assert found["metadata"] == "comment+exif" and found["aspect"] == 1.5
    assert found["bytes_per_pixel"] == (tmp_path / "a.png").stat().st_size / 600
    picture(0).convert("L").save(tmp_path / "b.png")
    found = measure(str(tmp_path / "b.png"))
    assert np.isnan(found["jpeg_quality"]) and found["metadata"] == "none" and found["colour_mode"] == "L"
    with pytest.raises(ImageError):
        measure(str(tmp_path / "none.png"))


# ---- scores of one property


def auroc(values, y, groups, kind) -> tuple[float, float, float]:
    return held_out_auroc(pd.Series(values), y, pd.Series(groups), kind)


@pytest.mark.parametrize("kind", ["category", "number", "text"])
def test_a_property_without_meaning_scores_chance(kind):
    rng, y = np.random.default_rng(0), np.repeat([0, 1], [200, 100])
    draw = {
        "category": lambda: rng.integers(0, 40, 300).astype(str),  # rare ones: counting itself is optimistic
        "number": lambda: rng.normal(size=300),
        "text": lambda: [" ".join(rng.choice(list("abcdefg"), 3)) for _ in y],
    }[kind]
    points = [auroc(draw(), y, range(300), kind)[0] for _ in range(6)]
    assert abs(np.mean(points) - 0.5) < 3 * np.std(points) / np.sqrt(6) and np.std(points) < 0.07


def test_category_by_hand():
    # "png" occurs among fakes only, "jpg" among both: AUROC = P(png) + P(jpg) / 2 = 0.8 + 0.1
    values, y = ["png"] * 80 + ["jpg"] * 120, np.array([1] * 100 + [0] * 100)
    point, low, high = auroc(values, y, range(200), "category")
    assert point == pytest.approx(0.9, abs=1e-9) and low < 0.9 < high and 0.04 < high - low < 0.12


def test_many_rare_categories_of_a_large_set_are_found():
    y = np.arange(100_000) % 2
    # one in five is shared
    values = [f"{i % 5000 // 2 * 2 + (i % 2 if i % 10 else 0)}" for i in range(100_000)]
    assert auroc(values, y, range(100_000), "category")[0] > 0.85


def test_a_number_in_the_middle_of_the_others_is_found():
    width = np.r_[np.tile(np.arange(100, 400), 2), np.full(200, 256)]
    y = np.repeat([0, 1], [600, 200])
    assert roc_auc_score(y, width) == pytest.approx(0.5, abs=0.05)  # its rank says nothing
    assert auroc(width.astype(float), y, range(800), "number")[0] > 0.98


def test_groups_are_not_split_over_folds():
    # 40 prompts, 10 images of each: a prompt seen in fitting would give the class of the others away
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 6)) for _ in range(40)]
    captions = [f"{prompts[i // 10]} w{i // 10}" for i in range(400)]
    y = np.array([(i // 10) % 2 for i in range(400)])
    grouped, alone = auroc(captions, y, captions, "text")[0], auroc(captions, y, range(400), "text")[0]
    assert alone > 0.95 and grouped < 0.75


def test_captions_that_both_classes_share_are_dealt_by_themselves():
    # each class has five captions, all in one fold if they were dealt out among those of one class alone
    captions = [f"w{i} b" for i in range(200)]
    y = np.array([1] * 200 + [0] * 5)
    shared = [*captions, *captions[:5]]
    assert auroc(shared, y, shared, "text")[0] == pytest.approx(0.5, abs=0.3)


# ---- duplicates


def table(images: list[Image.Image], labels, splits, ids=None) -> pd.DataFrame:
    hashes = [dhash(image) for image in images]
    return pd.DataFrame(
        {
            "path": [f"{i}.png" for i in range(len(images))],
            "label": pd.array(labels, dtype="Int8"), "split": splits,
            "image_id": ids or [str(i) for i in range(len(images))],
            "dhash_x": [x for x, _ in hashes], "dhash_y": [y for _, y in hashes],
        }
    )  # fmt: skip


def test_exact_and_near_copies_within_and_across():
    a, b, c = picture(1), picture(2), picture(3)
    near = Image.open(BytesIO(jpeg_bytes(b.resize((40, 27)), 50)))
    df = table([a, b, c, a, near], [0, 0, 0, 1, 0], ["train", "train", "val", "train", "test"], list("abcan"))
    found = find_duplicates(df).drop(columns="distance").to_numpy().tolist()
    assert found[0] == ["exact", "0.png", "3.png", True, False]
    assert found[1:] == [["near", "1.png", "4.png", False, True]]


def test_many_copies_give_one_pair_each_and_flat_images_none():
    df = table([picture(1)] * 4, [0, 1, 0, 1], [None] * 4, ["same"] * 4)
    found = find_duplicates(df)
    assert found["path_a"].tolist() == ["0.png"] * 3 and not found["across_splits"].any()
    flat = table([Image.new("RGB", (9, 9), c) for c in ("red", "blue", "white")], [0, 1, 1], [None] * 3)
    assert not len(find_duplicates(flat))
    assert not len(find_duplicates(table([picture(i) for i in range(60)], [0, 1] * 30, [None] * 60)))


def test_duplicates_are_in_the_report(tmp_path):
    df = manifest(tmp_path, 15, alike)
    Path(df["path"][1]).write_bytes(Path(df["path"][0]).read_bytes())
    report = audit(df)
    assert "Pairs of exact copies: 1, 0 across splits, 1 across classes" in report.to_text()


# ---- match the classes


def overlapping(number, label):
    """Reals mostly large, fakes mostly small; qualities alike; every fifth fake a PNG."""
    size = ((60, 40), (32, 32))[number // 2 % 4 == 0 if not label else number // 2 % 4 != 0]
    if label and number // 2 % 5 == 0:
        return picture(number, size), ".png", {}
    return picture(number, size), ".jpg", {"quality": (75, 90)[number // 2 % 2]}


def test_matched_classes_agree_and_what_is_left_out_is_counted(tmp_path):
    df = manifest(tmp_path, 120, overlapping)
    report = audit(df)
    before = auroc_of(report)
    assert before["size"] > 0.7 and before["format"] > 0.55
    kept, left = match_classes(report.measurements)
    reals, fakes = (kept[kept["label"] == label] for label in (0, 1))
    assert 20 < len(reals) == len(fakes) < 120
    alike = reals.groupby([*MATCHED], dropna=False).size()
    assert alike.equals(fakes.groupby([*MATCHED], dropna=False).size())
    after = auroc_of(audit(kept))
    for name in ("format", "size", "width", "height", "jpeg_quality", "jpeg_subsampling"):
        assert after[name] < 0.55, name
    assert left[["images", "kept", "left_out"]].sum().tolist() == [240, len(kept), 240 - len(kept)]
    assert left["left_out"].is_monotonic_decreasing
    png = left[left["format"] == "PNG"]
    assert set(png["label"]) == {1} and (png["kept"] == 0).all() and png["left_out"].sum() == 24
    again, _ = match_classes(report.measurements.sample(frac=1, random_state=1))
    assert set(again["path"]) == set(kept["path"]), "the order of the rows does not matter"


def test_splits_are_matched_apart(tmp_path):
    df = manifest(tmp_path, 80, overlapping)
    df["split"] = ["train" if i % 5 else "test" for i in range(160)]
    kept, _ = match_classes(audit(df).measurements)
    counts = kept.groupby(["split", "size", "label"]).size().unstack()
    assert (counts.nunique(axis=1) == 1).all() and {*counts.index.get_level_values(0)} == {"train", "test"}


def test_what_cannot_be_matched_is_an_error(tmp_path):
    measured = audit(manifest(tmp_path, 12, different)).measurements
    with pytest.raises(
        InputError, match="format and size .* of real and fake images are never the same; equal"
    ):
        match_classes(measured)
    with pytest.raises(InputError, match="nothing to match"):
        match_classes(measured[measured["label"] == 1])


# ---- equalise a folder


def different(number, label):
    if label:
        return picture(number, (64, 64)), ".png", {}
    return picture(number, (80, 70)), ".jpg", {"quality": 70}


def test_equalised_folder_closes_the_leaks(tmp_path):
    df = manifest(tmp_path / "raw", 60, different)
    first = audit(df)
    before = auroc_of(first)
    config = EqualiseConfig(size=48, quality=88)
    copy = equalise_folder(df, tmp_path / "eq", config)
    report = audit(read_manifest(tmp_path / "eq" / "manifest.csv"))
    after = auroc_of(report)
    for name in ("format", "size", "width", "height", "aspect"):
        assert before[name] > 0.95 and abs(after[name] - 0.5) < 0.03
    assert after["jpeg_quality"] == after["jpeg_subsampling"] == 0.5
    assert set(report.measurements["jpeg_quality"]) == {88}
    text = report.to_text(before=first)
    assert re.search(r"property +before +auroc", text)
    assert re.search(rf"size +{before['size']:.3f} +0.500 +0.500 +0.500", text)
    assert f"'{first.leaks.iloc[0]['property']}', reaches AUROC 1.000 alone" in first.to_text()
    assert copy[["label", "caption"]].equals(df[["label", "caption"]])
    pd.testing.assert_frame_equal(copy, read_manifest(tmp_path / "eq" / "manifest.csv"))


def test_a_second_run_writes_nothing_and_another_config_is_refused(tmp_path):
    df = manifest(tmp_path / "raw", 5, different)
    copy = equalise_folder(df, tmp_path / "eq", EqualiseConfig(size=32))
    times = [Path(p).stat().st_mtime_ns for p in copy["path"]]
    again = equalise_folder(df, tmp_path / "eq", EqualiseConfig(size=32))
    assert again.equals(copy) and times == [Path(p).stat().st_mtime_ns for p in copy["path"]]
    with pytest.raises(
        InputError, match="eq holds .*'size': 32.* was equalised with .*'size': 24.* empty folder"
    ):
        equalise_folder(df, tmp_path / "eq", EqualiseConfig(size=24))
    with pytest.raises(InputError, match=r"raw holds \['.*jpg.* name an empty folder"):
        equalise_folder(df, tmp_path / "raw")


def test_unreadable_images_are_listed_and_equal_ones_kept(tmp_path):
    df = manifest(tmp_path / "raw", 5, different)
    Path(df["path"][2]).write_bytes(b"")
    Path(df["path"][1]).write_bytes(Path(df["path"][3]).read_bytes())
    with pytest.warns(UserWarning, match="1 of 10 images cannot be read; first: .*2.jpg: is empty"):
        copy = equalise_folder(df, tmp_path / "eq", EqualiseConfig(size=32))
    assert len(copy) == 9 and copy["path"].nunique() == 9


def test_enlarging_one_class_only_is_warned_about(tmp_path):
    df = manifest(tmp_path / "raw", 5, different)
    says = "0% of the real and 100% of the fake images were enlarged to 70 px.*choose a smaller size"
    with pytest.warns(UserWarning, match=says):
        equalise_folder(df, tmp_path / "eq", EqualiseConfig(size=70))


@pytest.mark.real
def test_real_images_leak_before_and_not_after(real_dir, tmp_path):
    df = read_manifest(real_dir / "index.csv")
    report = audit(df)
    found = auroc_of(report)
    # fakes are 256, 512 or 559 px squares, 89 % of them PNG; photographs are JPEG of other sizes
    assert found["size"] > 0.99 and found["width"] > 0.99 and 0.92 < found["format"] < 0.96
    assert found["caption_vocabulary"] > 0.97 and found["bytes_per_pixel"] > 0.9
    assert found["jpeg_quality"] == 0.5  # all 1,050 JPEG files were saved at quality 75 with 4:2:0
    assert len(report.duplicates) == 1 and report.duplicates["distance"].tolist() == [10]
    sample = pd.concat([df[df["label"] == 0].head(150), df[df["label"] == 1].iloc[::3]])
    equalise_folder(sample, tmp_path / "eq", EqualiseConfig(size=64))
    after = auroc_of(audit(read_manifest(tmp_path / "eq" / "manifest.csv")))
    for name in ("format", "size", "width", "height", "aspect", "jpeg_quality", "jpeg_subsampling"):
        assert abs(after[name] - 0.5) < 0.03
