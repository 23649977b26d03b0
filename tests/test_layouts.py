"""Every layout of the field, built as a small tree: labels, generators, sources and splits come out right."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from itemkit.errors import InputError
from itemkit.images import content_id, load_image
from itemkit.layouts import read_name
from itemkit.manifest import describe_manifest, read_manifest, write_manifest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour % 256, colour // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path):
    """Build a tree from paths; every image has a content of its own."""

    def build(*paths: str, root: str = "set") -> Path:
        for number, path in enumerate(paths):
            file = tmp_path / root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(number) if file.suffix != ".txt" else b"notes")
        return tmp_path / root

    return build


def table(df: pd.DataFrame, root: Path) -> dict[str, tuple]:
    """Relative path -> (label, generator, source, split)."""
    rows = df[["label", "generator", "source", "split"]].astype(object).itertuples(index=False, name=None)
    return {
        os.path.relpath(p, root).replace(os.sep, "/"): row for p, row in zip(df["path"], rows, strict=True)
    }


GENIMAGE = (
    "Midjourney/train/ai/a.png", "Midjourney/train/nature/b.JPEG",
    "stable_diffusion_v_1_4/val/ai/c.png", "stable_diffusion_v_1_4/val/nature/n01440764/d.jpg",
)  # fmt: skip


def test_genimage_as_documented(tree):
    root = tree(*GENIMAGE)
    assert table(read_manifest(root), root) == {
        "Midjourney/train/ai/a.png": (1, "Midjourney", "Midjourney", "train"),
        "Midjourney/train/nature/b.JPEG": (0, "real", "Midjourney", "train"),
        "stable_diffusion_v_1_4/val/ai/c.png": (1, "stable_diffusion_v_1_4", "stable_diffusion_v_1_4", "val"),
        "stable_diffusion_v_1_4/val/nature/n01440764/d.jpg": (0, "real", "stable_diffusion_v_1_4", "val"),
    }


@pytest.mark.parametrize(
    ("folder", "generator"),
    [
        ("stable_diffusion_v_1_4/imagenet_ai_0419_sdv4", "stable_diffusion_v_1_4"),
        ("imagenet_ai_0424_sdv5", "stable_diffusion_v_1_5"),  # without the outer folder, as some keep it
        ("Midjourney/imagenet_midjourney", "Midjourney"),
        ("BigGAN/imagenet_ai_0419_biggan", "BigGAN"),
        ("Glide/imagenet_glide", "glide"),
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_genimage_as_downloaded_from_any_depth(tree, folder, generator, depth):
    root = tree(f"{folder}/train/ai/a.png", f"{folder}/train/nature/b.png")
    for name in folder.split("/")[:depth]:
        root = root / name
    df = read_manifest(root)
    assert df["generator"].tolist() == [generator, "real"] and df["label"].tolist() == [1, 0]
    assert set(df["source"]) == {generator} and set(df["split"]) == {"train"}


def test_forensynths_with_class_level(tree):
    root = tree(
        "test/progan/airplane/0_real/a.png", "test/progan/airplane/1_fake/a.png",
        "test/progan/cat/1_fake/a.png", "test/biggan/0_real/a.png", "test/biggan/1_fake/a.png",
        "train/progan/cat/1_fake/a.png",
    )  # fmt: skip
    found = table(read_manifest(root), root)
    assert found["test/progan/airplane/1_fake/a.png"] == (1, "progan", "progan", "test")
    assert found["test/progan/airplane/0_real/a.png"] == (0, "real", "progan", "test")
    assert found["test/biggan/1_fake/a.png"] == (1, "biggan", "biggan", "test")
    assert found["train/progan/cat/1_fake/a.png"] == (1, "progan", "progan", "train")
    inner = read_manifest(root / "test" / "progan", layout="forensynths")
    assert set(inner["generator"]) == {"real", "progan"}
    inner = read_manifest(root / "test" / "biggan")
    assert set(inner["generator"]) == {"real", "biggan"}


def test_ufd_diffusion_sets_are_paired_with_the_reals_they_share(tree):
    base = "test/diffusion_datasets"
    names = ("imagenet/0_real", "guided/1_fake", "laion/0_real", "ldm_200/1_fake", "dalle/1_fake")
    root = tree(*(f"{base}/{name}/a.png" for name in names))
    for start in (root, root / "test", root / base):
        df = read_manifest(start, layout="ufd")
        fakes = df[df["label"] == 1].set_index("generator")["source"].to_dict()
        assert fakes == {"guided": "imagenet", "ldm_200": "laion", "dalle": "laion"}
        assert sorted(df[df["label"] == 0]["source"]) == ["imagenet", "laion"]


def test_diffusionforensics(tree):
    root = tree(
        "images/train/lsun_bedroom/real/a.png", "images/train/lsun_bedroom/adm/b.png",
        "images/test/imagenet/real/n01440764/c.png", "images/test/imagenet/sdv1/d.png",
        "images/test/celebahq/real/e.png", "images/test/celebahq/dalle2/f.png",
    )  # fmt: skip
    found = table(read_manifest(root), root)
    assert found["images/train/lsun_bedroom/adm/b.png"] == (1, "adm", "lsun_bedroom", "train")
    assert found["images/test/imagenet/real/n01440764/c.png"] == (0, "real", "imagenet", "test")
    assert found["images/test/imagenet/sdv1/d.png"] == (1, "sdv1", "imagenet", "test")
    one = read_manifest(root / "images" / "train" / "lsun_bedroom")
    assert one["generator"].tolist() == ["adm", "real"]


def test_real_beside_unknown_folders_asks(tree):
    root = tree("real/a.png", "alpha/b.png", "beta/c.png")
    with pytest.raises(InputError, match=r"beside 'real' there are alpha, beta.*layout='generators'"):
        read_manifest(root)
    df = read_manifest(root, layout="generators")
    assert df["generator"].tolist() == ["alpha", "beta", "real"] and df["label"].tolist() == [1, 1, 0]
    df = read_manifest(tree("real/a.png", "sdxl/b.png", "flux/c.png", root="known"))
    assert df["generator"].tolist() == ["flux", "real", "sdxl"] and df["label"].tolist() == [1, 0, 1]
    assert "note: folders beside 'real' are read as generators: flux, sdxl" in describe_manifest(df)


def test_drct_with_two_roots(tree):
    fakes = tree("ldm-text2im/train2017/a.png", "sd-turbo/val2017/b.png", root="DRCT-2M")
    reals = tree("train2017/c.jpg", "val2017/d.jpg", root="MSCOCO")
    for layout in ("auto", "drct"):
        df = read_manifest(fakes, layout=layout, real_root=reals)
        assert df["label"].tolist() == [1, 1, 0, 0]
        assert df["generator"].tolist() == ["ldm-text2im", "sd-turbo", "real", "real"]
        assert df["split"].tolist() == ["train", "val", "train", "val"] and set(df["source"]) == {"MSCOCO"}
    assert set(read_manifest(fakes)["label"]) == {1}  # the folder's name says what it is
    both = read_manifest(fakes.parent, layout="drct")
    assert both["label"].tolist() == [1, 1, 0, 0]


def test_synthbuster_and_raise(tree):
    fakes = tree("dalle2/r0a1b2c3dt.png", "glide/r0d1e2f3at.png", "prompts.txt", root="synthbuster")
    reals = tree("r000da54ft.TIF", root="RAISE-1k")
    df = read_manifest(fakes, real_root=reals)
    assert df["generator"].tolist() == ["dalle2", "glide", "real"] and df["label"].tolist() == [1, 1, 0]
    assert set(df["source"]) == {"RAISE-1k"}
    assert set(read_manifest(fakes)["label"]) == {1}


def test_two_plain_roots(tree):
    fakes, reals = tree("sdxl/a.png", root="mine"), tree("b.jpg", root="camera")
    df = read_manifest(fakes, real_root=reals)
    assert df["generator"].tolist() == ["sdxl", "real"]
    with pytest.raises(InputError, match="real_root .*nowhere is not a folder"):
        read_manifest(fakes, real_root=fakes / "nowhere")
    with pytest.raises(InputError, match="holds label folders of its own: fake"):
        read_manifest(tree("fake/a.png", root="other"), real_root=reals)
    with pytest.raises(InputError, match="has photographs of its own; leave real_root="):
        read_manifest(fakes, layout="genimage", real_root=reals)


def test_plain_folder(tree):
    root = tree("real/a.png", "fake/sdxl/b.png", "fake/flux/0001/c.png", "fake/d.png")
    assert table(read_manifest(root), root) == {
        "real/a.png": (0, "real", "set", None),
        "fake/sdxl/b.png": (1, "sdxl", "set", None),
        "fake/flux/0001/c.png": (1, "flux", "set", None),
        "fake/d.png": (1, "unknown", "set", None),
    }
    root = tree("sdxl/test/Real/a.png", "sdxl/test/Fake/b.png", root="second")
    assert table(read_manifest(root), root)["sdxl/test/Fake/b.png"] == (1, "sdxl", "sdxl", "test")


REAL = ("real", "REAL", "natural", "authentic", "original", "genuine", "pristine", "human", "photos",
        "realart", "RealArt", "0_real", "training_real", "Real-Images", "non_ai", "celeba_real")  # fmt: skip
FAKE = ("fake", "AI", "aigc", "generated", "synthetic", "manipulated", "forged", "deepfake", "AiArtData",
        "gan", "diffusion", "1_fake", "training_fake", "fake images", "AI-generated", "x_fake")  # fmt: skip


@pytest.mark.parametrize("number", range(len(REAL)))
def test_any_word_for_real_beside_any_for_fake_is_a_labelled_tree(tree, number):
    real = REAL[number]
    for fake in FAKE[number % 4 :: 4]:  # what a name says does not depend on its neighbour
        pattern = ("{}/{}.png", "a set/{}/cats/{}.png", "Train/{}/{}.png")[(number + len(fake)) % 3]
        df = read_manifest(tree(pattern.format(real, "r"), pattern.format(fake, "f"), root=fake + " set"))
        labels = {Path(p).stem: label for p, label in zip(df["path"], df["label"], strict=True)}
        assert labels == {"r": 0, "f": 1}, (real, fake, pattern)
        assert set(df["split"]) <= {None, "train"}


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (("0/a.png", "1/b.png"), [0, 1]),
        (("train/0/a.png", "train/1/b.png", "test/0/c.png", "test/1/d.png"), [0, 1, 0, 1]),
        (("class_0/a.png", "class_1/b.png"), [0, 1]),
        (("0/a.png", "1/b.png", "2/c.png"), None),  # classes of pictures
        (("0/a.png",), None),
        (("original/a.png", "resized/b.png"), None),
        (("real/0/a.png", "real/1/b.png", "fake/0/c.png", "fake/1/d.png"), [1, 1, 0, 0]),  # shards
        (("human/real/a.png", "human/fake/b.png", "animal/real/c.png", "animal/fake/d.png"), [1, 0, 1, 0]),
        (("gan/real/a.png", "gan/fake/b.png", "diffusion/real/c.png", "diffusion/fake/d.png"), [1, 0, 1, 0]),
        (("real/a.png", "fake/gan/b.png", "fake/diffusion/c.png"), [1, 1, 0]),
        (("photos/real/a.png", "photos/fake/b.png"), [1, 0]),
        (("original_sequences/a.png", "manipulated_sequences/Deepfakes/b.png"), [1, 0]),
        (("real-vs-fake/train/real/a.png", "real-vs-fake/train/fake/b.png"), [1, 0]),
        (("real/a.png", "ai/b.png", "nature/c.png"), [1, 0, 0]),
        (("fake/sdxl/a.png",), [1]),  # fakes alone
    ],
)
def test_numbers_pairs_and_words_at_several_depths(tree, paths, labels):
    df = read_manifest(tree(*paths))
    assert df["label"].tolist() == (labels or [pd.NA] * len(paths))
    said = describe_manifest(df)[1]
    assert ("labels: folders" in said) if labels else ("none: no folder is named after real or fake" in said)


@pytest.mark.parametrize(
    ("words", "split"),
    [
        ("train Training TR train2017 training_set training_real", "train"),
        ("val valid Validation dev eval val_images", "val"),
        ("test Testing holdout hold-out evaluation test_set test_fake", "test"),
        ("value trainer testament devices trait images", None),
    ],
)
def test_words_for_splits(words, split):
    assert {read_name(word).split for word in words.split()} == {split}


def test_a_class_called_train_is_no_split(tree):
    names = [f"test/progan/{c}/{y}/a.png" for c in ("train", "car", "dog") for y in ("0_real", "1_fake")]
    assert set(read_manifest(tree(*names))["split"]) == {"test"}
    assert set(read_manifest(tree(*names) / "test" / "progan")["split"]) == {None}


def test_test_images_of_a_contest_have_no_label(tree):
    df = read_manifest(tree("train/real/a.png", "train/fake/b.png", "test/c.png"))
    assert df["label"].tolist() == [pd.NA, 1, 0] and df["split"].tolist() == ["test", "train", "train"]
    assert any("1 image of split 'test' lie under no label folder" in line for line in describe_manifest(df))


def test_labels_come_from_whole_components_below_the_root_only(tree):
    # neither 'unreal_engine', nor 'real.png', nor the root's own parents may label an image
    root = tree("unreal_engine/real_01.png", "surreal/fake.png", root="real/fake/1_fake/pictures")
    df = read_manifest(root)
    assert df["label"].isna().all() and set(df["generator"]) == {"unknown"}


def test_unlabelled_folder_is_sorted(tree):
    df = read_manifest(tree("b.png", "a/z.png", "a.png", ".hidden.png", "__MACOSX/a.png"))
    assert [Path(p).name for p in df["path"]] == ["z.png", "a.png", "b.png"]  # by folder, then by name
    assert len(df) == 3 and df["label"].isna().all()


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (
            ("fake/a.png", "loose.png"),
            r"'loose.png' lies under no label folder \(in all 1 image\), but others under fake",
        ),
        (("fake/real/a.png",), r"'fake/real' has label folders of both classes \(fake, real\)"),
        (("train/test/fake/a.png", "real/b.png"), "folders of several splits: test, train"),
        (
            ("ai/a.png", "x/b.png"),
            r"'x/b.png' lies under no label folder \(in all 1 image\), but others under ai",
        ),
    ],
)
def test_ambiguity_is_an_error_that_lists_what_was_found(tree, paths, says):
    with pytest.raises(InputError, match=says):
        read_manifest(tree(*paths))


def test_folder_with_a_table_and_no_labels_points_to_the_table(tree):
    root = tree("images/a.png")
    (root / "index.csv").write_text("path,label\nimages/a.png,1\n")
    with pytest.raises(InputError, match=r"holds index.csv: read that table"):
        read_manifest(root)
    assert len(read_manifest(root, layout="unlabelled")) == 1


@pytest.mark.parametrize("name", ["scores.parquet", "scores.arrow", "scores.csv", "x.tsv", "y.jsonl",
                                  "data/train-00000-of-00001.parquet"])  # fmt: skip
def test_a_table_beside_label_folders_does_not_replace_them(tree, name):
    root = tree("real/a.png", "fake/b.png")
    columns = {"image": [png(7), png(8), png(9)], "label": [1, 1, 1]}
    file = root / name
    if name.endswith("parquet"):
        parquet(file, columns)
    elif name.endswith("arrow"):
        arrow(file, columns)
    else:
        file.write_text("path,label\nreal/a.png,1\n")
    df = read_manifest(root)
    assert [Path(p).name for p in df["path"]] == ["b.png", "a.png"] and df["label"].tolist() == [1, 0]
    assert f"tables beside the images are not read: {file.name}" in "\n".join(describe_manifest(df))


def test_an_explicit_layout_decides(tree):
    root = tree("real/ai/a.png", "x/nature/b.png")
    with pytest.raises(InputError, match=r"label folders of both classes \(real, ai\)"):
        read_manifest(root)
    df = read_manifest(root, layout="genimage")
    assert df["label"].tolist() == [1, 0] and df.attrs["report"]["labels"].endswith("'genimage' has them")
    parquet(root / "t.parquet", {"image": [png(7), png(8), png(9)], "label": [1, 1, 1]})
    assert read_manifest(root / "t.parquet", images_to=root.parent / "out")["label"].tolist() == [1] * 3
    root = tree("a.png", root="plain")
    (root / "metadata.csv").write_text("file_name,label,text\na.png,ai,a dog\n")
    df = read_manifest(root, layout="unlabelled")
    assert df["label"].isna().all() and df["caption"].tolist() == [None]
    assert "not read: metadata.csv (give the table" in "\n".join(describe_manifest(df))


def test_images_beside_a_hub_data_set_are_counted(tree):
    root = tree("assets/teaser.png")
    parquet(root / "t.parquet", {"image": [png(8), png(9)], "label": [1, 0]})
    df = read_manifest(root, images_to=root.parent / "out")
    assert df["label"].tolist() == [1, 0]
    assert "note: 1 image file beside the table t.parquet: not read" in describe_manifest(df)
    parquet(root / "t.parquet", {"path": ["assets/teaser.png"], "label": [1]})
    with pytest.raises(InputError, match=r"no label folders but holds t\.parquet: .*layout='unlabelled'"):
        read_manifest(root)


def test_what_is_left_out_or_taken_by_its_content_is_counted(tree, monkeypatch):
    root = tree("real/a.png", "fake/b.png", "fake/.hidden.png")
    (root / "real" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    for name in ("real/noending", "fake/z.jpg_large"):
        (root / name).write_bytes(png(5))
    for name in ("fake/readme.md", "fake/words"):
        (root / name).write_text("words")
    (root / "fake" / "dead.png").symlink_to("nowhere")
    (root / "fake" / "dead").symlink_to("nowhere")
    (root / "locked").mkdir()
    (root / "up").symlink_to(root)
    real_scandir = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    df = read_manifest(root)
    names = [Path(p).name for p in df["path"]]
    assert names == ["b.png", "dead.png", "z.jpg_large", "IMG_1.HEIC", "a.png", "noending"]
    found = df.attrs["report"]
    assert found["files_left_out"] == {"(no ending)": 2, ".md": 1}
    assert found["files_taken_by_content"] == {".jpg_large": 1, "(no ending)": 1}
    assert found["not_readable"] == [str(root / "locked")]
    assert found["hidden_files"] == found["links_that_lead_back"] == 1
    text = "\n".join(describe_manifest(df))
    for line in ("files left out: 2 (no ending), 1 .md", "1 .jpg_large", "not readable: "):
        assert line in text
    assert json.loads(json.dumps(df.attrs["report"])) == df.attrs["report"]


def test_names_that_are_not_utf8_are_kept(tree):
    root = tree("real/a.png", "fake/b.png")
    odd = os.fsencode(root) + b"/fake/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(png(3))
    df = read_manifest(root)
    assert os.fsencode(df["path"][1]) == odd and df["label"].tolist() == [1, 1, 0]
    assert all(line.isprintable() and line.encode() for line in describe_manifest(df))
    assert load_image(df["path"][1]).size == (8, 8)
    write_manifest(df, root / "m.csv")
    assert read_manifest(root / "m.csv")["path"].tolist() == df["path"].tolist()


def test_texts_beside_the_images_are_their_captions(tree):
    root = tree("00000/000000000.jpg", "00000/000000001.jpg", "00001/000010000.jpg")
    (root / "00000/000000000.txt").write_text("a dog\n")
    (root / "00000/000000000.json").write_text('{"caption": "other"}')
    (root / "00000/000000001.json").write_text('{"caption": "a cat", "width": 8}')
    (root / "00001/000010000.txt").write_text(" ")
    (root / "00000_stats.json").write_text("{}")
    parquet(root / "00000.parquet", {"url": ["u"], "caption": ["c"], "key": ["000000000"]})
    df = read_manifest(root)
    assert df["caption"].tolist() == ["a dog", "a cat", None] and df["label"].isna().all()


def test_metadata_of_an_imagefolder(tree):
    root = tree("train/a.png", "train/b.png", "train/c.png")
    rows = [{"file_name": "a.png", "label": "real", "text": "a dog"}, {"file_name": "b.png", "label": "ai"}]
    (root / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    df = read_manifest(root)
    assert df["label"].tolist() == [0, 1, pd.NA] and df["caption"].tolist() == ["a dog", None, None]
    assert set(df["split"]) == {"train"} and "metadata.jsonl, column 'label'" in describe_manifest(df)[1]
    root = tree("real/a.png", "fake/b.png", root="other")
    (root / "metadata.csv").write_text("file_name,text\nreal/a.png,a dog\n")
    df = read_manifest(root)
    assert df["label"].tolist() == [1, 0] and df["caption"].tolist() == [None, "a dog"]
    (root / "metadata.csv").write_text("file_name,label\nreal/a.png,ai\n")
    with pytest.raises(InputError, match="the folders and metadata.csv contradict each other in 1 row"):
        read_manifest(root)


def test_empty_folder_says_what_it_looked_for(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(InputError, match=r"looked for \.jpg .*\.webp.*; found 1 \.txt"):
        read_manifest(tmp_path)


def test_links_are_followed_once(tree):
    root = tree("real/a.png", "fake/b.png")
    (root / "fake" / "up").symlink_to(root)
    assert len(read_manifest(root)) == 2
    (root / "fake" / "out").symlink_to(root.parent)  # above the root: the loop is entered there
    assert len(read_manifest(root)) == 2


def test_shared_reals_may_be_links(tree):
    sets = ("dalle", "ldm_100", "ldm_200")
    root = tree("laion/0_real/a.png", "laion/0_real/more/b.png", *(f"{name}/1_fake/c.png" for name in sets))
    for name in sets:
        (root / name / "0_real").symlink_to(Path("../laion/0_real"))
    df = read_manifest(root, layout="ufd")
    reals = df[df["label"] == 0]
    assert reals["source"].value_counts().to_dict() == {"laion": 2, "dalle": 2, "ldm_100": 2, "ldm_200": 2}
    assert sorted(df[df["label"] == 1]["source"]) == list(sets)


def test_links_that_lead_to_each_other_end(tree):
    root = tree("real/a.png", "fake/b.png")
    (root / "real" / "other").symlink_to(root / "fake")
    (root / "fake" / "other").symlink_to(root / "real")
    df = read_manifest(root, layout="unlabelled")
    names = [os.path.relpath(p, root) for p in df["path"]]
    assert names == ["fake/b.png", "fake/other/a.png", "real/a.png", "real/other/b.png"]


# ---- tables with the images inside


def parquet(path: Path, columns: dict, features: dict | None = None) -> Path:
    data = pa.table(columns)
    if features:
        data = data.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data, path)
    return path


def arrow(path: Path, columns: dict) -> None:
    data = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)


def test_openfake(tmp_path):
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(3)]
    columns = {
        "image": images, "prompt": ["a dog", None, "a cat"], "label": ["fake", "real", "fake"],
        "model": ["flux.1-dev", "laion", "sdxl"], "type": ["base", None, "base"],
        "release_date": ["2024", None, "2023"],
    }  # fmt: skip
    parquet(tmp_path / "OpenFake/data/train-00000-of-00002.parquet", columns)
    parquet(tmp_path / "OpenFake/data/test-00000-of-00001.parquet", columns)
    with pytest.raises(InputError, match=r"holds the images inside \(column 'image'\).*images_to="):
        read_manifest(tmp_path / "OpenFake")
    df = read_manifest(tmp_path / "OpenFake", images_to=tmp_path / "out")
    assert df["split"].tolist() == ["test"] * 3 + ["train"] * 3
    assert df["generator"].tolist()[:3] == ["flux.1-dev", "real", "sdxl"]
    assert df["label"].tolist()[:3] == [1, 0, 1]
    assert df["source"].tolist()[:3] == ["OpenFake", "laion", "OpenFake"]
    assert df["caption"].tolist()[:3] == ["a dog", None, "a cat"]
    assert Path(df["path"][0]).read_bytes() == png(0) and Path(df["path"][0]).suffix == ".png"
    times = {p: os.stat(p).st_mtime_ns for p in df["path"]}
    pd.testing.assert_frame_equal(df, read_manifest(tmp_path / "OpenFake", images_to=tmp_path / "out"))
    assert times == {p: os.stat(p).st_mtime_ns for p in df["path"]}, "written a second time"


def test_communityforensics(tmp_path):
    path = parquet(
        tmp_path / "cf.parquet",
        {
            "image_name": ["a", "b", "c"], "format": ["PNG"] * 3, "image_data": [png(1), png(2), None],
            "model_name": ["sd-2", "", "sd-2"], "real_source": [None, "coco", None],
            "split": ["Systematic"] * 3, "label": [1, 0, 1], "architecture": ["LDM"] * 3,
            "prompt": ["x", "", ""],
        },
    )  # fmt: skip
    df = read_manifest(path, images_to=tmp_path / "out")
    assert df["label"].tolist() == [1, 0, 1] and df["generator"].tolist() == ["sd-2", "real", "sd-2"]
    assert df["source"].tolist() == ["cf", "coco", "cf"] and set(df["split"]) == {"systematic"}
    assert list(map(os.path.exists, df["path"])) == [True, True, False]  # an error row later, not a lost one


def test_rows_with_a_path_but_no_bytes(tmp_path):
    images = [{"bytes": None, "path": f"/data/{i}.png"} for i in range(2)]
    path = parquet(tmp_path / "t.parquet", {"image": images, "label": [0, 1]})
    with pytest.raises(InputError, match=r"/data/0\.png\. .*holds no bytes: export it again"):
        read_manifest(path)
    (tmp_path / "a.png").write_bytes(png(1))
    inside = {"a.png": None, "b.png": png(2), "c": None}
    images = [{"bytes": data, "path": name} for name, data in inside.items()]
    path = parquet(tmp_path / "t.parquet", {"image": images, "label": [0, 1, 1]})
    df = read_manifest(path, images_to=tmp_path / "out")
    assert [os.path.relpath(p, tmp_path) for p in df["path"]][::2] == ["a.png", "c"]


def test_equal_images_in_a_table_keep_their_rows(tmp_path):
    path = parquet(tmp_path / "t.parquet", {"image": [png(1), png(1)], "label": [0, 1]})
    df = read_manifest(path, images_to=tmp_path / "out")
    stem = content_id(png(1))[:32]
    assert [Path(p).name for p in df["path"]] == [f"{stem}.png", f"{stem}-2.png"]


def test_a_data_frame_may_hold_the_images_too(tmp_path):
    table = pd.DataFrame({"png": [png(1), float("nan"), png(2)], "generator": ["real", "flow", "flow"]})
    with pytest.raises(InputError, match=r"the table holds the images inside \(column 'png'\).*images_to="):
        read_manifest(table)
    df = read_manifest(table, images_to=tmp_path / "out")
    assert df["label"].tolist() == [0, 1, 1] and Path(df["path"][2]).read_bytes() == png(2)
    assert list(map(os.path.exists, df["path"])) == [True, False, True]
    table = pd.DataFrame({"image": [None, None], "path": df["path"][[0, 2]].tolist()})
    assert read_manifest(table)["path"].tolist() == table["path"].tolist()


def test_class_names_of_a_hub_set_decide_not_their_numbers(tmp_path):
    features = {"label": {"names": ["fake", "real"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    path = parquet(tmp_path / "t.parquet", {"image": [png(1), png(2)], "label": [0, 1]}, features)
    assert read_manifest(path, images_to=tmp_path / "out")["label"].tolist() == [1, 0]


def test_plain_parquet_and_broken_parquet(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = parquet(tmp_path / "t.parquet", {"path": ["a.png"], "label": [1.0]})
    assert read_manifest(path)["label"].tolist() == [1]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="bad.parquet cannot be read"):
        read_manifest(tmp_path / "bad.parquet")


def saved(folder: Path, *names: str, state: str = "", **files: dict) -> Path:
    """A part of what ``Dataset.save_to_disk`` leaves: Arrow files, and the names of those that count."""
    folder.mkdir(parents=True)
    (folder.parent / "dataset_dict.json").write_text("{}")
    named = json.dumps({"_data_files": [{"filename": f"{name}.arrow"} for name in names]})
    (folder / "state.json").write_text(state or named)
    for name, columns in files.items():
        arrow(folder / f"{name}.arrow", columns)
    return folder


def test_folder_of_save_to_disk(tmp_path):
    for split, labels in (("train", [0, 1]), ("test", [1, 0])):
        images = [{"bytes": png(i + 5 * len(split)), "path": None} for i in range(2)]
        saved(tmp_path / "ds" / split, "data", data={"image": images, "label": labels})
    df = read_manifest(tmp_path / "ds", images_to=tmp_path / "out")
    assert df["split"].tolist() == ["test", "test", "train", "train"] and df["label"].tolist() == [1, 0, 0, 1]


def test_caches_of_a_saved_data_set_are_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    files = {name: {"path": [f"{name}.png"], "label": [0]} for name in "abc"}
    part = saved(tmp_path / "ds" / "train", "b", "a", **files)
    df = read_manifest(tmp_path / "ds", root=tmp_path)
    assert [Path(p).name for p in df["path"]] == ["b.png", "a.png"]  # what state.json names, in its order
    (part / "a.arrow").unlink()
    with pytest.raises(InputError, match=r"a\.arrow cannot be read"):
        read_manifest(tmp_path / "ds", root=tmp_path)
    saved(tmp_path / "odd" / "train", state="{", **files)
    with pytest.raises(InputError, match=r"state\.json cannot be read"):
        read_manifest(tmp_path / "odd", root=tmp_path)


class FakeDataset:
    """What is needed of datasets.Dataset: batches as Arrow tables, with its features in their metadata."""

    def __init__(self, table, split=None):
        self.table, self.split = table, split

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def iter(self, batch_size):
        yield from (self.table[i : i + 3] for i in range(0, len(self.table), 3))


def test_datasets_objects(tmp_path):
    features = {"label": {"names": ["synthetic", "photo"], "_type": "ClassLabel"}}
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    table = pq.read_table(parquet(tmp_path / "t.parquet", columns | {"text": list("abcd")}, features))
    df = read_manifest(FakeDataset(table), images_to=tmp_path / "one")
    assert df["label"].tolist() == [1, 0, 1, 0] and df["caption"].tolist()[0] == "a"
    assert load_image(df["path"][3]).tobytes() == load_image(png(3)).tobytes()
    both = {"train": FakeDataset(table[:2]), "validation": FakeDataset(table[2:])}
    assert read_manifest(both, images_to=tmp_path / "two")["split"].tolist() == ["train"] * 2 + ["val"] * 2
