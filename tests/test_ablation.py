"""The ablation: paired differences on unseen families, and captions with wrong objects."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from itemkit.ablation import ablation, degrade_captions
from itemkit.errors import InputError
from itemkit.head import MisalignmentMLP
from itemkit.matrix import train_on_test_on
from itemkit.metrics import holm
from itemkit.recipes import item

from synthetic import make_features

HEAD = MisalignmentMLP(max_epochs=6, patience=3, device="cpu")
FEATURES = make_features(200, 80, generators=("gan", "flow", "edit"), misfit=0.6)
FAMILY = {"gan": "gan", "flow": "flow", "edit": "flow"}
QUESTIONS = {
    "level": {"both": item("cosines", HEAD), "global": item("global_cosine", HEAD)},
    "form": {"cosines": item("cosines", HEAD), "differences": item("difference", HEAD)},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    table = ablation(FEATURES, QUESTIONS, (0, 1, 2), families=FAMILY, out=folder)
    # the shared baseline is trained once: 3 contenders, 3 train generators, 3 seeds
    assert len(list((folder / "runs").glob("*.json"))) == 27
    again = ablation(FEATURES, QUESTIONS, (0, 1, 2), families=FAMILY, out=folder)
    pd.testing.assert_frame_equal(again, table)
    return table


def test_a_row_by_hand(table):
    pair = {"a": QUESTIONS["level"]["both"], "b": QUESTIONS["level"]["global"]}
    study = train_on_test_on(FEATURES, pair, (0, 1, 2), families=FAMILY, metrics=("auroc",), n_boot=2000)
    # trained on gan: flow and edit are unseen; trained on flow or edit: gan is
    cells = study.table[(study.table["train_generator"] == "gan") != (study.table["test_generator"] == "gan")]
    mean = cells.groupby("detector")["value"].mean()
    row = table[table["question"] == "level"].iloc[0]
    assert (row["option"], row["baseline"]) == ("global", "both")
    assert (row["auroc"], row["baseline_auroc"]) == pytest.approx((mean["b"], mean["a"]), abs=1e-12)
    assert row["value"] == pytest.approx(mean["b"] - mean["a"], abs=1e-12)
    turned = study.compare("a").iloc[0]  # the reference minus the other, of the same test images
    assert (row["low"], row["high"]) == pytest.approx((-turned["high"], -turned["low"]), abs=1e-12)
    assert row["low"] < row["value"] < row["high"]
    wide = cells.groupby(["train_generator", "test_generator", "detector"])["value"].mean().unstack()
    gap = wide["b"] - wide["a"]
    of_family = gap.groupby(gap.index.get_level_values(1).map(FAMILY)).mean()
    assert (row["family_low"], row["family_high"]) == pytest.approx((of_family.min(), of_family.max()))
    assert (row["n_cells"], row["n_families"]) == (4, 2)


def test_every_option_but_the_baselines_has_a_row(table):
    assert table[["question", "option", "baseline"]].values.tolist() == [
        ["level", "global", "both"], ["form", "differences", "cosines"],
    ]  # fmt: skip
    assert table["baseline_auroc"][0] == table["baseline_auroc"][1]  # one and the same recipe


def test_p_is_corrected_for_all_rows(table):
    alone = [
        ablation(FEATURES, {name: QUESTIONS[name]}, (0, 1, 2), families=FAMILY)["p_holm"][0]
        for name in QUESTIONS
    ]
    assert table["p_holm"].tolist() == pytest.approx(holm(np.array(alone)).tolist())


def test_errors():
    both = QUESTIONS["level"]["both"]
    for options in ({"both": both}, {"both": both, "again": both}):
        with pytest.raises(InputError, match="question 'level' has 'both'.*; expected a baseline and other"):
            ablation(FEATURES, {"level": options})
    with pytest.raises(
        InputError, match="every generator is of a family trained on; give images of a second"
    ):
        ablation(FEATURES, {"level": QUESTIONS["level"]}, (0,), families=dict.fromkeys(FAMILY, "one"))
    with pytest.raises(InputError, match="share=1.5 and 6 nouns; expected 0 to 1"):
        degrade_captions(IMAGES, 1.5, KINDS)


KINDS = ("car", "boat", "umbrella", "tree", "house", "apple")
N = 80 * len(KINDS)
IMAGES = pd.DataFrame(
    {
        "image_id": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(N)],
        "path": [f"images/{i}.png" for i in range(N)],
        "caption": [f"a car, an orange boat and a blue {KINDS[i // 80]} on the grass" for i in range(N)],
    }
)


def things(caption):
    return [word for word in caption.replace(",", "").split() if word in KINDS]


def changed(captions):
    """Of each object: is it named otherwise than in the undamaged captions?"""
    pairs = zip(IMAGES["caption"], captions, strict=True)
    return np.array([[a != b for a, b in zip(things(old), things(new), strict=True)] for old, new in pairs])


def test_degraded_captions():
    shares = {share: degrade_captions(IMAGES, share, KINDS) for share in (0, 0.1, 0.5, 1)}
    assert shares[0].tolist() == IMAGES["caption"].tolist() and list(shares[0].index) == list(IMAGES["path"])
    assert changed(shares[0.1]).mean() == pytest.approx(0.1, abs=0.025)
    assert changed(shares[0.5]).mean() == pytest.approx(0.5, abs=0.04)
    assert changed(shares[1]).all()
    assert (changed(shares[0.5]) | ~changed(shares[0.1])).all()  # wrong at a tenth: wrong at a half, too
    assert {thing for text in shares[1] for thing in things(text)} == set(KINDS)
    for text in shares[1]:
        assert text.split()[0] == ("an" if things(text)[0][0] in "aeiou" else "a")
        assert ", an orange " in text and text.endswith(" on the grass")  # nothing else is touched


def test_damage_follows_the_image_and_not_its_folder():
    here = degrade_captions(IMAGES, 0.5, KINDS)
    moved = IMAGES.assign(path=[f"/elsewhere/{i}.png" for i in range(N)]).sample(frac=0.5, random_state=1)
    there = degrade_captions(moved, 0.5, KINDS)
    assert there.tolist() == here.iloc[moved.index].tolist()
    assert (there != moved["caption"].to_numpy()).any() and list(there.index) == list(moved["path"])
