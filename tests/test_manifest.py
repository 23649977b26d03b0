"""The manifest: aliases, labels, checks and their messages, splits, writing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from itemkit import schema
from itemkit.errors import InputError
from itemkit.manifest import describe_manifest, read_manifest, require_two_classes, write_manifest


@pytest.fixture
def csv(tmp_path):
    """Write a table beside ten empty images a0.png ... a9.png."""
    for i in range(10):
        (tmp_path / f"a{i}.png").touch()

    def write(text: str, name: str = "t.csv", encoding: str = "utf-8") -> Path:
        (tmp_path / name).write_bytes(text.encode(encoding))
        return tmp_path / name

    return write


def test_columns_and_types(csv):
    df = read_manifest(csv("path,label,generator,caption\na0.png,0,,A dog\na1.png,1,sdxl,\na2.png,,,\n"))
    assert list(df.columns) == list(schema.MANIFEST_COLUMNS)
    assert str(df["label"].dtype) == "Int8" and df["label"].tolist() == [0, 1, pd.NA]
    assert df["generator"].tolist() == ["real", "sdxl", "unknown"]
    assert df["caption"].tolist() == ["A dog", None, None] and df["source"].tolist() == ["t"] * 3
    assert df["split"].isna().all() and all(os.path.isabs(p) for p in df["path"])


@pytest.mark.parametrize(
    "header",
    ["path,label,generator,caption", "filename,label,model,prompt", "file_name,target,model_name,text",
     "Image Path,LABEL,Generator, Caption ", "img,label,generator,sentence"],
)  # fmt: skip
def test_aliases(csv, header):
    df = read_manifest(csv(f"{header}\na0.png,real,,x\na1.png,fake,g,y\n"))
    assert df["label"].tolist() == [0, 1] and df["generator"].tolist() == ["real", "g"]
    assert df["caption"].tolist() == ["x", "y"]


@pytest.mark.parametrize(
    ("real", "fake"), [("0", "1"), ("real", "FAKE"), ("nature", "ai"), ("0_real", "1_fake"), ("0.0", "1.0"),
                       (" Photo ", "AI-generated")]
)  # fmt: skip
def test_label_words(csv, real, fake):
    assert read_manifest(csv(f"path,label\na0.png,{real}\na1.png,{fake}\n"))["label"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("column", "real", "fake"),
    [
        ("class", "real", "fake"), ("category", "photo", "AI"), ("target", "real", "ai"),
        ("type", "real", "generated"),
        ("ground_truth", "human", "AI"), ("label_name", "natural", "synthetic"),
        ("real_or_fake", "real", "fake"),
        ("is_ai", "0", "1"), ("isFake", "False", "True"), ("ai_generated", "no", "yes"),
        ("deepfake", "0", "1"),
        ("is_synthetic", "0.0", "1.0"), ("is_real", "1", "0"), ("human", "1", "0"),
        ("Authentic", "TRUE", "FALSE"),
        ("labels", "0", "1"), ("kind", "original", "manipulated"), ("generator", "real", "sdxl"),
    ],
)  # fmt: skip
def test_label_columns_of_other_names(csv, column, real, fake):
    df = read_manifest(csv(f"path,{column}\na0.png,{real}\na1.png,{fake}\na2.png,\n"))
    assert df["label"].tolist() == [0, 1, pd.NA]
    assert describe_manifest(df)[1].startswith(f"labels: column '{column}' (")


@pytest.mark.parametrize("column", ["class", "y", "target", "category", "ground_truth", "Label_A", "lable"])
def test_numbers_that_do_not_say_which_is_fake_are_not_used_but_named(csv, column):
    df = read_manifest(csv(f"path,{column}\na0.png,0\na1.png,1\n"))
    assert df["label"].isna().all()
    text = "\n".join(describe_manifest(df))
    assert f"columns not used as labels: '{column}': it holds 0 and 1" in text
    assert "rename it to 'is_fake'" in text and "no image has a label" in text


def test_labels_of_another_kind_give_way_and_unused_columns_are_named(csv):
    df = read_manifest(csv("path,label,is_ai,width,mood\na0.png,cat,0,3,\na1.png,dog,1,3,sad\n"))
    assert df["label"].tolist() == [0, 1]
    lines = describe_manifest(df)
    assert any("not used as labels: 'label': its values are no words" in line for line in lines)
    assert "columns not used: width, mood" in lines
    df = read_manifest(csv("path,author\na0.png,real\na1.png,ai\n"))
    assert "'author': its values look like labels; rename it to 'label'" in describe_manifest(df)[2]


@pytest.mark.parametrize(
    ("column", "real", "fake"),
    [
        ("generator", "real", "sdxl"), ("model", "nature", "my own"), ("generator", "", "sdxl"),
        ("source_type", "real", "ai"), ("real_or_fake", "real", "fake"), ("is_real", "1", "0"),
        ("human", "True", "False"), ("is_fake", "0", "1"), ("source", "real", "fake"),
        ("origin", "photo", "generated"),
    ],
)  # fmt: skip
def test_labels_that_another_column_contradicts_are_refused(csv, column, real, fake):
    rows = f"path,label,{column}\na0.png,{{}},{real}\na1.png,{{}},{fake}\na2.png,{{}},{fake}\n"
    assert read_manifest(csv(rows.format(0, 1, 1)))["label"].tolist() == [0, 1, 1]
    says = rf"column 'label' and column '{column}' contradict .*other way round .*'is_real' if 1 means real"
    with pytest.raises(InputError, match=says):
        read_manifest(csv(rows.format(1, 0, 0)))


def test_labels_that_the_folders_contradict_are_refused(csv, tmp_path):
    for name in ("REAL/x.png", "FAKE/y.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="'label' and the folders of the images contradict each other"):
        read_manifest(csv("path,label\nREAL/x.png,1\nFAKE/y.png,0\n"))
    assert read_manifest(csv("path,label\nREAL/x.png,0\nFAKE/y.png,1\n"))["label"].tolist() == [0, 1]


def test_of_several_path_columns_the_one_with_files_is_taken(csv):
    df = read_manifest(csv("image,filename,path,label\n17,a0.png,x,0\n18,a1.png,y,1\n"))
    assert [os.path.basename(p) for p in df["path"]] == ["a0.png", "a1.png"]
    assert "'filename' is read as the path" in "\n".join(describe_manifest(df))


@pytest.mark.parametrize("other", ["Label", "label"])
def test_columns_that_are_there_twice_must_agree(csv, other):
    with pytest.raises(InputError, match=f"column 'label' and column .{other}.* contradict each other"):
        read_manifest(csv(f"path,label,{other}\na0.png,0,1\na1.png,1,0\n"))
    df = read_manifest(csv(f"path,label,{other},path\na0.png,0,0,x\n"))
    assert len(df) == 1 and "columns not used: path'" in describe_manifest(df)


def test_paths_of_windows(csv, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "r.png").touch()
    for text in ("real\\r.png", "C:\\Users\\ann\\set\\real\\r.png"):
        df = read_manifest(csv(f"path,label\n{text},0\na0.png,1\n"))
        assert df["path"].tolist() == [str(tmp_path / "real/r.png"), str(tmp_path / "a0.png")]
        assert any("backslashes in 1 path" in line for line in describe_manifest(df))


def test_a_table_without_a_header_line(csv):
    df = read_manifest(csv("a0.png,real,7\na1.png,fake,8\n"))
    assert len(df) == 2 and df["label"].tolist() == [0, 1]
    assert "has no header line: its column 1 is read as the path" in "\n".join(describe_manifest(df))
    assert read_manifest(csv("0,a0.png\n1,a1.png\n"))["label"].isna().all()  # which is fake?


def test_json_lines(csv):
    text = '{"file_name": "a0.png", "label": 0, "text": "x"}\n\n{"file_name": "a1.png", "label": 1}\n'
    df = read_manifest(csv(text, "t.jsonl"))
    assert df["label"].tolist() == [0, 1] and df["caption"].tolist() == ["x", None]
    for line in ('{"path', "[1]"):
        with pytest.raises(InputError, match=r"t\.jsonl: line 2 is not JSON; expected an object"):
            read_manifest(csv('{"path": "a0.png"}\n' + line, "t.jsonl"))


def test_what_will_become_of_the_splits_is_said(csv):
    df = read_manifest(csv("path,label,set\na0.png,0,Training\na1.png,1,Training\na2.png,0,holdout\n"))
    assert df["split"].tolist() == ["train", "train", "test"]
    assert "splits planned: no image has split val: 'train' is divided" in "\n".join(describe_manifest(df))
    assert df.attrs["report"]["splits"] == {"train": 2, "test": 1} and df.attrs["report"]["splits_planned"]


def test_generators_among_the_labels(csv):  # as GRIP's tables have them
    df = read_manifest(csv("filename,typ\na0.png,real\na1.png,dalle3\na2.png,midjourney\n"))
    assert df["label"].tolist() == [0, 1, 1] and df["generator"].tolist() == ["real", "dalle3", "midjourney"]


@pytest.mark.parametrize(("name", "text"), [
    ("t.tsv", "path\tlabel\tcaption\na0.png\t1\ta, b\n"),
    ("t.csv", "path;label;caption\na0.png;1;a, b\n"),
    ("t.csv", '\ufeffpath,label,caption\na0.png,1,"a, b"\n'),
])  # fmt: skip
def test_separators_and_byte_order_mark(csv, name, text):
    df = read_manifest(csv(text, name))
    assert df["caption"].tolist() == ["a, b"] and df["label"].tolist() == [1]


def test_captions_are_text_as_they_stand(csv):
    df = read_manifest(csv("path,label,caption\na0.png,1,None\na1.png,0,NA\na2.png,0,007\na3.png,1,été ✓\n"))
    assert df["caption"].tolist() == ["None", "NA", "007", "été ✓"]


def test_of_several_captions_the_first_is_taken(csv, tmp_path):
    captions = [["a dog", "two dogs"], ["", "a cat"], [], None, "a bird"]
    table = pd.DataFrame({"path": [f"a{i}.png" for i in range(5)], "caption": captions})
    csv("")  # for the images
    expected = ["a dog", "a cat", None, None, "a bird"]
    assert read_manifest(table, root=tmp_path)["caption"].tolist() == expected
    table["caption"] = [np.array(c, dtype=object) if isinstance(c, list) else c for c in captions]
    assert read_manifest(table, root=tmp_path)["caption"].tolist() == expected
    table[:3].to_parquet(tmp_path / "t.parquet")
    assert read_manifest(tmp_path / "t.parquet")["caption"].tolist() == expected[:3]


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("caption", [{"raw": "a dog"}], "dict"),
        ("caption", {"raw": "a dog"}, "dict"),
        ("caption", np.array([["a", "b"], ["c", "d"]]), "ndarray"),
        ("caption", b"a dog", "bytes"),
        ("generator", ["sdxl"], "list"),
        ("label", np.array([1]), "ndarray"),
    ],
)
def test_what_is_no_text_is_told(csv, tmp_path, column, value, kind):
    csv("")
    table = pd.DataFrame({"path": ["a0.png", "a1.png"], column: [None, value]})
    with pytest.raises(InputError, match=rf"the table: row 2 of column '{column}' holds {kind}; expected"):
        read_manifest(table, root=tmp_path)


def test_origin_of_a_photograph_is_not_its_generator(csv):
    df = read_manifest(csv("path,label,generator\na0.png,0,camera\na1.png,1,sdxl\n"))
    assert df["generator"].tolist() == ["real", "sdxl"] and df["source"].tolist() == ["camera", "t"]


def test_splits_are_named_alike(csv):
    splits = ("Training", "validation", "test", "", "Fold7")
    df = read_manifest(csv("path,split\n" + "".join(f"a{i}.png,{s}\n" for i, s in enumerate(splits))))
    assert df["split"].tolist() == ["train", "val", "test", None, "fold7"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pth,label\na0.png,1\n", r"no column 'path' .*filename.*; found pth, label\. Rename"),
        ("path,label\na0.png,photoshopped\na1.png,2\na2.png,2\n",
         r"column 'label' holds 'photoshopped', '2'; expected 0 or real"),
        ("path,label\na0.png,1\na1.png,0\na0.png,1\n",
         r"lists 1 paths more than once; first: .*a0\.png \(rows 1, 3\)"),
        ("path,label\n,1\na0.png,0\n", r"row 1 has no 'path'"),
        ("path,label\n", r"t\.csv has no rows"),
        ("", r"t\.csv cannot be read as a table: No columns.*; expected a header line"),
        ("path,label\nno/b.png,1\nno/c.png,0\n",
         r"none of the 2 images of t\.csv exists; first looked for: .*no/b\.png.*root="),
        ("path,label\na0.png,1,a dog, a cat\na1.png,0,x,y\n", r"cannot be read .*line 2.*quote"),
        ("path,label\na0.png,1\na1.png,0,x,y\n", r"cannot be read as a table: .*line 3"),
    ],
)  # fmt: skip
def test_errors_name_got_expected_next_step(csv, text, says):
    with pytest.raises(InputError, match=says):
        read_manifest(csv(text))


def test_other_files(csv, tmp_path):
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_manifest(csv("path,caption\na0.png,é\n", encoding="latin-1"))
    with pytest.raises(InputError, match=r"no such file or folder"):
        read_manifest(tmp_path / "nothing.csv")
    with pytest.raises(
        InputError, match=r"a0\.png is no table known here: expected \.csv, \.tsv, .*\.parquet"
    ):
        read_manifest(tmp_path / "a0.png")
    with pytest.raises(InputError, match=r"no layout 'genimag'; Did you mean 'genimage'\?"):
        read_manifest(tmp_path, layout="genimag")
    with pytest.raises(InputError, match="is a table; layout='genimage'"):
        read_manifest(csv("path\na0.png\n"), layout="genimage")
    with pytest.raises(InputError, match="cannot read a int"):
        read_manifest(3)


def test_no_labels_is_fine_until_they_are_needed(csv):
    df = read_manifest(csv("path\na0.png\na1.png\n"))
    assert df["label"].isna().all()
    with pytest.raises(InputError, match="Training needs real and fake.* 0 real, 0 fake and 2 without"):
        require_two_classes(df, "Training")
    require_two_classes(read_manifest(csv("path,label\na0.png,0\na1.png,1\n")))


def test_root_and_dataframes(csv, tmp_path):
    path = csv("path,label\na0.png,1\n", name="t.csv")
    moved = tmp_path / "elsewhere" / "t.csv"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert read_manifest(moved, root=tmp_path)["path"].tolist() == [str(tmp_path / "a0.png")]
    df = read_manifest(pd.DataFrame({"file": ["a0.png"], "label": [0]}), root=tmp_path)
    assert df["path"].tolist() == [str(tmp_path / "a0.png")]


@pytest.mark.parametrize("name", ["m.csv", "sub/m.csv"])
def test_written_manifests_read_back(csv, tmp_path, name):
    df = read_manifest(csv('path,label,caption,split\na0.png,0,"x, ""y""",train\na1.png,1,,\na2.png,,z,\n'))
    write_manifest(df, tmp_path / name)
    back = read_manifest(tmp_path / name)
    pd.testing.assert_frame_equal(back, df)
    if name == "m.csv":  # relative: the folder can be moved
        assert (tmp_path / name).read_text().splitlines()[1].startswith("a0.png,0,")


@pytest.mark.real
def test_real_index_reads_directly(real_dir):
    df = read_manifest(real_dir / "index.csv")
    assert len(df) == 1450 and df["label"].value_counts().to_dict() == {0: 1000, 1: 450}
    assert df["caption"].isna().sum() == 50 and set(df.loc[df["label"] == 0, "generator"]) == {"real"}
    assert df["generator"].nunique() == 10 and all(os.path.isfile(p) for p in df["path"])
