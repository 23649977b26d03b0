"""Splits follow from the content: nothing moves, copies stay together, what is missing is carved."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest

from itemkit.errors import InputError
from itemkit.splits import divide, fill_splits, place, split_validation


def table(n: int, splits: tuple[str | None, ...] = (None,), first: int = 0, labels=(0, 1)) -> pd.DataFrame:
    """Images by turns real and fake; the splits by turns, two images each."""
    ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(first, first + n)]
    label = pd.array([labels[i % len(labels)] for i in range(n)], dtype="Int8")
    split = [splits[i // 2 % len(splits)] for i in range(n)]
    return pd.DataFrame({"image_id": ids, "label": label, "split": pd.Series(split, dtype=object)})


def sizes(filled: pd.DataFrame) -> dict[str, int]:
    return filled["split"].value_counts().to_dict()


def test_adding_images_moves_none_and_order_does_not_matter():
    old, _ = fill_splits(table(2000))
    new, note = fill_splits(pd.concat([table(500, first=9000), table(2000)], ignore_index=True))
    assert new["split"][500:].tolist() == old["split"].tolist()
    assert "no splits given: train 70 %, val 15 %, test 15 %" in note
    shares = old["split"].value_counts(normalize=True)
    assert [shares[s] for s in ("train", "val", "test")] == pytest.approx([0.7, 0.15, 0.15], abs=0.04)
    mixed = table(2000).sample(frac=1, random_state=0)
    assert fill_splits(mixed)[0]["split"].loc[range(2000)].tolist() == old["split"].tolist()


def test_the_split_is_a_salted_hash_of_the_content_hash():
    ids = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
    by_hand = [int(hashlib.sha256(f"split\0{one}".encode()).hexdigest()[:13], 16) / 16**13 for one in ids]
    assert place(ids).tolist() == by_hand
    df = pd.DataFrame({"image_id": ids, "label": [0, 1] * 100, "split": None})
    expected = ["train" if p < 0.7 else "val" if p < 0.85 else "test" for p in by_hand]
    assert fill_splits(df)[0]["split"].tolist() == expected


def test_the_first_files_by_name_are_of_every_split_where_names_are_hashes():
    ids = sorted(hashlib.sha256(str(i).encode()).hexdigest() for i in range(2000))[:600]
    split = fill_splits(pd.DataFrame({"image_id": ids, "label": 1, "split": None}))[0]["split"]
    assert split.value_counts()["test"] > 60 and split.value_counts()["val"] > 60


@pytest.mark.parametrize(
    ("given", "kept", "carved", "share"),
    [
        (("train", "test"), {"test": 500}, "val", 0.15),
        (("train", "val"), {"train": 500}, "test", 0.5),
    ],
)
def test_of_two_splits_the_third_is_carved_and_said(given, kept, carved, share):
    filled, note = fill_splits(table(1000, given))
    found = sizes(filled)
    assert {s: found[s] for s in kept} == kept and sum(found.values()) == 1000
    assert found[carved] == pytest.approx(500 * share, abs=45)
    assert f"no image has split {carved}" in note and "is divided into" in note and str(found[carved]) in note
    again, _ = fill_splits(table(3000, given))
    assert again["split"][:1000].tolist() == filled["split"].tolist(), "carving moves none either"
    untouched = table(1000, given)["split"] == next(iter(kept))
    assert (filled.loc[untouched, "split"] == next(iter(kept))).all()


def test_train_alone_is_divided():
    assert sizes(fill_splits(table(400, ("train",)))[0]).keys() == {"train", "val", "test"}


@pytest.mark.parametrize("given", [("val",), ("test",), ("val", "test")])
@pytest.mark.parametrize("labels", [(0, 1), (0,), (1,)])
def test_train_is_never_carved(given, labels):
    df = table(400, given, labels=labels)
    filled, note = fill_splits(df)
    assert filled["split"].tolist() == df["split"].tolist() and "nothing trains" in note


@pytest.mark.parametrize("given", [("train",), ("train", "test"), ("train", "val")])
def test_of_one_class_nothing_is_carved(given):
    df = table(400, given, labels=(0, pd.NA))
    filled, note = fill_splits(df)
    has_label = df["label"].notna()
    assert filled.loc[has_label, "split"].tolist() == df.loc[has_label, "split"].tolist()
    assert note.startswith("splits as given: with labels of one class only, none is divided (")


def test_complete_splits_stay_as_they_are_and_gaps_are_filled():
    full = table(600, ("train", "val", "test"))
    filled, note = fill_splits(full)
    assert (
        filled["split"].tolist() == full["split"].tolist()
        and note == "splits as given (200 train, 200 val, 200 test)"
    )
    some, note = fill_splits(table(800, ("train", "val", "test", None)))
    assert some["split"].notna().all() and "200 labelled images without a split" in note


def test_copies_stay_together():
    df = table(300, (None,))
    df["image_id"] = df["image_id"].iloc[:100].tolist() * 3
    assert (fill_splits(df)[0].groupby("image_id")["split"].nunique() == 1).all()
    given = table(6, ("train", "val", "test"))
    copies = given.assign(split=None)
    filled, _ = fill_splits(pd.concat([given, copies], ignore_index=True))
    assert filled["split"][6:].tolist() == given["split"].tolist(), "a copy follows the one that has a split"
    carved, _ = fill_splits(pd.concat([table(40, ("train", "test"))] * 2, ignore_index=True))
    assert (carved.groupby("image_id")["split"].nunique() == 1).all()


def test_without_a_label_no_split():
    df = table(40, labels=(0, 1, pd.NA, pd.NA))
    filled, _ = fill_splits(df)
    assert filled["split"].notna().tolist() == df["label"].notna().tolist()
    filled, note = fill_splits(table(4, labels=(pd.NA,)))
    assert filled["split"].isna().all() and "no image has a label" in note
    assert df["split"].isna().all(), "the input was changed"


@pytest.mark.parametrize("given", [(None,), ("train",), ("train", "test"), ("train", "val")])
@pytest.mark.parametrize("seed", range(5))
def test_a_dozen_images_have_both_classes_in_every_split(given, seed):
    filled, note = fill_splits(table(24, given, first=1000 * seed))
    assert filled.groupby("split")["label"].nunique().to_dict() == {"train": 2, "val": 2, "test": 2}
    moved = given == (None,) and (divide(place(filled["image_id"])) != filled["split"]).any()
    assert not moved or "so that each has both classes" in note


def test_other_words_than_train_val_test():
    filled, note = fill_splits(table(60, ("fold1", "systematic")))
    assert sizes(filled).keys() == {"train", "val", "test"} and "'fold1', 'systematic' (none of train" in note
    filled, note = fill_splits(table(80, ("train", "val", "test", "extra")))
    assert sizes(filled)["extra"] == 20 and "left out of training and test" in note


def test_one_content_with_two_labels_is_said():
    df = table(10)
    df.loc[1, "image_id"] = df.loc[0, "image_id"]
    assert "1 picture labelled both real and fake" in fill_splits(df)[1]


def test_validation_images_are_divided_class_by_class():
    y = np.repeat([0, 1], [30, 11])
    select, rest = split_validation(y, seed=3)
    assert sorted([*select, *rest]) == list(range(41)) and np.bincount(y[select]).tolist() == [15, 6]
    assert (
        split_validation(y, seed=3)[0].tolist() == select.tolist() != split_validation(y, seed=4)[0].tolist()
    )
    with pytest.raises(InputError, match="1 real validation image; at least 2 of each class"):
        split_validation([0, 1, 1])
