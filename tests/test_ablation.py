"""The ablation grid: paired differences on unseen families, and the helpers that make its options."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from itemkit.ablation import ablation, degrade_captions, first_objects, what_matters
from itemkit.errors import InputError
from itemkit.head import MisalignmentMLP
from itemkit.matrix import train_on_test_on
from itemkit.misalignment import RepresentationConfig, represent
from itemkit.recipes import item

from synthetic import make_features

HEAD = MisalignmentMLP(max_epochs=6, patience=3, device="cpu")
FEATURES = make_features(200, 80, generators=("gan", "flow", "edit"), misfit=0.6)
FAMILY = {"gan": "gan", "flow": "flow", "edit": "flow"}
QUESTIONS = {
    "level": {"both": item("cosines", HEAD), "global": item("global_cosine", HEAD)},
    "images": {"all": item("cosines", HEAD), "20": item("cosines", HEAD, train_images=20)},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    table = ablation(FEATURES, QUESTIONS, (0, 1, 2), families=FAMILY, out=folder)
    # the shared reference is trained once: 3 contenders, 3 train generators, 3 seeds
    assert len(list((folder / "runs").glob("*.json"))) == 27
    again = ablation(FEATURES, QUESTIONS, (0, 1, 2), families=FAMILY, out=folder)
    pd.testing.assert_frame_equal(again, table)
    return table


def test_a_row_by_hand(table):
    study = train_on_test_on(
        FEATURES, {"a": QUESTIONS["level"]["both"], "b": QUESTIONS["level"]["global"]}, (0, 1, 2),
        families=FAMILY, metrics=("auroc",), n_boot=0,
    )  # fmt: skip
    cells = study.table.query("test_generator != 'pooled_unseen'")
    # trained on gan: flow and edit are unseen; trained on flow or edit: gan is
    cells = cells[(cells["train_generator"] == "gan") != (cells["test_generator"] == "gan")]
    by_seed = cells.groupby(["seed", "detector"])["value"].mean().unstack()
    gap = by_seed["b"] - by_seed["a"]
    row = table[(table["question"] == "level") & (table["option"] == "global")].iloc[0]
    assert row["difference"] == pytest.approx(gap.mean(), abs=1e-12) and row["n_cells"] == 4
    low, high = stats.t.interval(0.95, 2, gap.mean(), stats.sem(gap))
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high), abs=1e-12)
    assert row["value"] == pytest.approx(by_seed["b"].mean(), abs=1e-12)
    by_cell = cells.groupby(["train_generator", "test_generator", "detector"])["value"].mean().unstack()
    assert row["cells_better"] == (by_cell["b"] > by_cell["a"]).mean()


def test_references_and_order(table):
    assert table[["question", "option"]].values.tolist() == [
        ["level", "both"], ["level", "global"], ["images", "all"], ["images", "20"],
    ]  # fmt: skip
    assert list(table["reference"]) == [True, False, True, False]
    assert (table.loc[table["reference"], ["difference", "cells_better"]] == 0).all(axis=None)
    assert table["value"][0] == table["value"][2]  # one and the same recipe


def test_what_matters_widens_for_the_number_of_options():
    common = {"question": "q", "difference_sd": 0.01, "n_seeds": 5, "cells_better": 0.0, "value": 0.9}
    options = [("a", True, 0.0), ("b", False, -0.1), ("c", False, 0.02)]
    table = pd.DataFrame([{"option": o, "reference": r, "difference": d} | common for o, r, d in options])
    row = what_matters(table).iloc[0]
    half = stats.t.ppf(1 - 0.025 / 2, 4) * 0.01 / np.sqrt(5)
    assert row["option"] == "b" and row["reference"] == "a" and row["matters"] == "yes"
    assert (row["low"], row["high"]) == pytest.approx((-0.1 - half, -0.1 + half))
    two = table.iloc[[0, 2]]
    assert what_matters(two, least=0.05)["matters"][0] == "no"
    assert what_matters(two)["matters"][0] == "unclear"
    alike = two.assign(difference=0.0, difference_sd=0.0)  # the same models once more
    assert what_matters(alike)["matters"][0] == "no"
    assert what_matters(two.assign(n_seeds=1))["matters"][0] == "unclear"  # one seed has no spread


@pytest.mark.parametrize(
    ("gaps", "answer", "shown"),
    [
        ({"far": (-0.07, 0.08), "near": (-0.04, 0.002)}, "yes", "near"),  # the farthest is the least certain
        ({"far": (-0.005, 0.0005), "near": (-0.004, 0.1)}, "unclear", "far"),  # the nearer may be far away
    ],
)
def test_what_matters_asks_every_option(gaps, answer, shown):
    common = {"question": "q", "n_seeds": 5, "cells_better": 0.0}
    rows = [{"option": "a", "reference": True, "difference": 0.0, "difference_sd": 0.0}]
    rows += [
        {"option": name, "reference": False, "difference": d, "difference_sd": sd}
        for name, (d, sd) in gaps.items()
    ]
    row = what_matters(pd.DataFrame([row | common for row in rows])).iloc[0]
    assert (row["matters"], row["option"]) == (answer, shown)


def test_errors():
    with pytest.raises(InputError, match="question 'level' has one option or none"):
        ablation(FEATURES, {"level": {"both": item("cosines", HEAD)}})
    with pytest.raises(
        InputError, match="every generator is of a family trained on; give images of a second"
    ):
        ablation(FEATURES, {"level": QUESTIONS["level"]}, (0,), families=dict.fromkeys(FAMILY, "one"))
    with pytest.raises(InputError, match="share=1.5 and 6 kinds; expected 0 to 1"):
        degrade_captions(IMAGES, 1.5, KINDS)


COLOURS = ("red", "orange", "blue", "white", "green")
KINDS = ("car", "boat", "umbrella", "tree", "house", "apple")
N = 80 * len(KINDS)
IMAGES = pd.DataFrame(
    {
        "image_id": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(N)],
        "path": [f"images/{i}.png" for i in range(N)],
        "caption": [f"a red car, an orange boat and a blue {KINDS[i // 80]} on the grass" for i in range(N)],
    }
)


def changed(captions):
    """Of each object: is it named otherwise than in the undamaged captions?"""
    pairs = [(things(old), things(new)) for old, new in zip(IMAGES["caption"], captions, strict=True)]
    return np.array([[a != b for a, b in zip(*pair, strict=True)] for pair in pairs])


def things(caption):
    words = caption.replace(",", "").split()
    return [(words[i - 1], word) for i, word in enumerate(words) if word in KINDS]


def test_degraded_captions():
    shares = {share: degrade_captions(IMAGES, share, KINDS, COLOURS) for share in (0, 0.1, 0.5, 1)}
    assert shares[0].tolist() == IMAGES["caption"].tolist() and list(shares[0].index) == list(IMAGES["path"])
    assert changed(shares[0.1]).mean() == pytest.approx(0.1, abs=0.025)
    assert changed(shares[0.5]).mean() == pytest.approx(0.5, abs=0.04)
    assert changed(shares[1]).all()
    assert (changed(shares[0.5]) | ~changed(shares[0.1])).all()  # wrong at a tenth: wrong at a half, too
    pairs = zip(IMAGES["caption"], shares[1], strict=True)
    wrong = [pair for old, new in pairs for pair in zip(things(old), things(new), strict=True)]
    assert all((a[0] == b[0]) != (a[1] == b[1]) for a, b in wrong)  # either the colour or the kind
    assert {b[1] for _, b in wrong} == set(KINDS) and {b[0] for _, b in wrong} == set(COLOURS)
    for text in shares[1]:
        words = text.replace(",", "").split()
        articles = [(a, b) for a, b in zip(words, words[1:], strict=False) if a in ("a", "an")]
        assert all((a == "an") == (b[0] in "aeiou") for a, b in articles)


def test_damage_follows_the_image_and_not_its_folder():
    here = degrade_captions(IMAGES, 0.5, KINDS, COLOURS)
    moved = IMAGES.assign(path=[f"/elsewhere/{i}.png" for i in range(N)]).sample(frac=0.5, random_state=1)
    there = degrade_captions(moved, 0.5, KINDS, COLOURS)
    assert there.tolist() == here.iloc[moved.index].tolist()
    assert (there != moved["caption"].to_numpy()).any() and list(there.index) == list(moved["path"])


def test_first_objects():
    few = first_objects(FEATURES, 2)
    np.testing.assert_array_equal(
        np.bincount(few.owner, minlength=len(few)),
        np.minimum(np.bincount(FEATURES.owner, minlength=len(FEATURES)), 2),
    )
    row = int(np.flatnonzero(np.bincount(FEATURES.owner) == 3)[0])
    mine, kept = np.flatnonzero(FEATURES.owner == row), np.flatnonzero(few.owner == row)
    np.testing.assert_array_equal(few.region_emb[kept], FEATURES.region_emb[mine[:2]])
    np.testing.assert_array_equal(few.phrase_emb[kept], FEATURES.phrase_emb[mine[:2]])
    assert list(few.objects["phrase"][kept]) == list(FEATURES.objects["phrase"][mine[:2]])
    none = first_objects(FEATURES, 0)
    whole = represent(none, RepresentationConfig(level="global"))
    np.testing.assert_array_equal(represent(none, "absolute"), np.tile(whole, 3))
    assert len(first_objects(FEATURES, 99).owner) == len(FEATURES.owner)
