"""The matrix: what trains on what, honest thresholds, intervals, reuse, external scores and fusion."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from itemkit.calibrate import split_validation, threshold_at_fpr
from itemkit.controls import CONTROLS, FeatureScorer, logistic
from itemkit.errors import InputError
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import represent
from itemkit.study import Study, control, early, external, item, late, standard_detectors, train_on_test_on

from synthetic import make_features

HEAD = MisalignmentMLP(max_epochs=6, patience=3, device="cpu")
FEATURES = make_features(400, 120, generators=("gan", "flow", "vae"))


class Recorder:
    """A scorer without training that notes which images it was shown."""

    seen: list = []

    def __init__(self, seed):
        self.seed = seed

    def fit(self, train, val):
        Recorder.seen.append((self.seed, train.table, val.table))
        return self

    def decision_function(self, features):
        return -np.sum(features.image_emb * features.caption_emb, axis=1).astype(float)


@pytest.fixture(scope="module")
def study():
    recipes = {
        "item": item("cosines", HEAD),
        "image": control("image_linear"),
        "text": control("text_only", head=HEAD),
    }
    return train_on_test_on(FEATURES, recipes, seeds=(0, 1), n_boot=60)


def test_table_is_complete(study):
    table = study.table
    # 3 contenders, 3 train generators, 3 test generators and the pooled one, 2 seeds, 9 metrics
    assert len(table) == 3 * 3 * 4 * 2 * 9
    assert not table.duplicated(["detector", "train_generator", "test_generator", "seed", "metric"]).any()
    cells = table[table["test_generator"] != "pooled_unseen"]
    assert (cells["seen"] == (cells["train_generator"] == cells["test_generator"])).all()
    assert set(cells["n_real"]) == {100} and set(cells["n_fake"]) == {30}
    pooled = table[table["test_generator"] == "pooled_unseen"]
    assert set(pooled["n_real"]) == {100} and set(pooled["n_fake"]) == {60}  # the shared reals count once
    assert (table["low"] <= table["high"]).all() and table["value"].between(0, 1).all()
    ece = table[table["metric"] == "ece"]
    assert ((ece["low"] <= ece["value"]) & (ece["value"] <= ece["high"])).all()


def test_a_cell_by_hand(study):
    run = next(r for r in study.runs if (r.detector, r.train_generator, r.seed) == ("image", "gan", 1))
    split, generator = FEATURES.table["split"], FEATURES.table["generator"]
    y = FEATURES.labels
    rows = np.flatnonzero(((split == "train") & generator.isin(["real", "gan"])).to_numpy())
    kept = []
    for label in (0, 1):
        own = rows[y[rows] == label]
        kept.append(np.random.default_rng([1, label]).permutation(own)[: round(0.8 * len(own))])
    train = FEATURES.select(np.sort(np.concatenate(kept)))
    model = logistic().fit(train.image_emb, train.labels)
    test = FEATURES.select(((split == "test") & generator.isin(["real", "flow"])).to_numpy())
    score = model.decision_function(test.image_emb)
    cell = study.table.query(
        "detector == 'image' and train_generator == 'gan' and test_generator == 'flow' and seed == 1"
    ).set_index("metric")["value"]
    assert cell["auroc"] == pytest.approx(roc_auc_score(test.labels, score), abs=1e-9)
    # the threshold: from the half of the validation images that did not stop the training
    val = FEATURES.select(((split == "val") & generator.isin(["real", "gan"])).to_numpy())
    _, rest = split_validation(val.labels, seed=1)
    val = val.select(rest)
    threshold = threshold_at_fpr(model.decision_function(val.image_emb)[val.labels == 0], 0.05).value
    assert run.threshold == pytest.approx(threshold, rel=1e-5)
    assert cell["accuracy_real"] == pytest.approx(np.mean(score[test.labels == 0] <= threshold))


def test_unseen_generators_and_test_images_are_never_looked_at():
    Recorder.seen = []
    train_on_test_on(FEATURES, {"r": Recorder}, seeds=(0, 1), n_boot=0)
    assert len(Recorder.seen) == 6
    reals = {}
    for (seed, train, val), generator in zip(
        Recorder.seen, np.repeat(["gan", "flow", "vae"], 2), strict=True
    ):
        assert set(train["generator"]) == set(val["generator"]) == {"real", generator}
        assert set(train["split"]) == {"train"} and set(val["split"]) == {"val"}
        assert len(train) == round(0.8 * 200) + round(0.8 * 60) and len(val) == 50 + 15
        reals.setdefault(seed, set()).add(tuple(train.loc[train["label"] == 0, "image_id"]))
    assert (
        len(reals[0]) == len(reals[1]) == 1 and reals[0] != reals[1]
    )  # seeds draw anew, generators share the reals


def test_deterministic(study):
    again = train_on_test_on(FEATURES, {"item": item("cosines", HEAD)}, seeds=(0, 1), n_boot=60)
    pd.testing.assert_frame_equal(
        again.table, study.table[study.table["detector"] == "item"].reset_index(drop=True)
    )


def test_summary_by_hand(study):
    summary = study.summary(["auroc", "ece"]).set_index(["detector", "metric"])
    cells = study.table.query(
        "detector == 'image' and metric == 'auroc' and test_generator != 'pooled_unseen'"
    )
    unseen = cells[~cells["seen"]]
    row = summary.loc["image", "auroc"]
    assert row["unseen_mean"] == pytest.approx(unseen["value"].mean()) and row["n_cells"] == 9
    assert row["seed_sd"] == pytest.approx(unseen.groupby("seed")["value"].mean().std())
    by_cell = unseen.groupby(["train_generator", "test_generator"])["value"].mean()
    assert row["worst"] == pytest.approx(by_cell.min())
    assert (row["worst_train"], row["worst_test"]) == by_cell.idxmin()
    assert (
        row["low"] < row["unseen_mean"] < row["high"] and row["worst_low"] < row["worst"] < row["worst_high"]
    )
    # a mean over cells is known better than its weakest cell
    assert row["high"] - row["low"] < row["worst_high"] - row["worst_low"]
    ece = study.table.query("detector == 'image' and metric == 'ece' and test_generator != 'pooled_unseen'")
    ece = ece[~ece["seen"]].groupby(["train_generator", "test_generator"])["value"].mean()
    assert summary.loc["image", "ece"]["worst"] == pytest.approx(ece.max())  # the largest error is the worst
    matrix = study.matrix("image")
    assert matrix.loc["gan", "flow"] == pytest.approx(by_cell["gan", "flow"]) and matrix.shape == (3, 3)


def test_comparison_is_paired(study):
    table = study.compare("item", "auroc").set_index("other")
    summary = study.summary(["auroc"]).set_index("detector")
    expected = summary.loc["item", "unseen_mean"] - summary.loc["text", "unseen_mean"]
    assert table.loc["text", "difference"] == pytest.approx(expected)
    assert table.loc["text", "low"] > 0 and table.loc["text", "p_value"] < 0.05
    mirrored = study.compare("text", "auroc", ["item"]).iloc[0]
    assert mirrored["difference"] == pytest.approx(-expected)
    with pytest.raises(InputError, match="no contender 'x' in this study; there are item, image, text"):
        study.compare("x")
    with pytest.raises(InputError, match="metric 'brier' was not asked for"):
        study.summary(["brier"])


def test_families_and_pooled_train_generators():
    study = train_on_test_on(
        FEATURES,
        {"r": Recorder},
        seeds=(0,),
        train_generators=["gan+flow"],
        families={"vae": "flow"},
        n_boot=0,
    )
    assert study.table["seen"].all() and "pooled_unseen" not in set(study.table["test_generator"])
    assert np.isnan(study.summary(["auroc"])["unseen_mean"][0])
    study = train_on_test_on(FEATURES, {"r": Recorder}, seeds=(0,), train_generators=["gan+flow"], n_boot=0)
    assert set(study.table.loc[~study.table["seen"], "test_generator"]) == {"vae", "pooled_unseen"}


def test_reals_paired_by_source():
    features = replace(FEATURES, table=FEATURES.table.copy())
    half = np.arange(len(features)) % 2
    features.table["source"] = np.where(half, "a", "b")
    features.table.loc[features.table["generator"] == "gan", "source"] = "a"
    study = train_on_test_on(features, {"r": Recorder}, seeds=(0,), pair_by="source", n_boot=0)
    counts = study.table.drop_duplicates("test_generator").set_index("test_generator")["n_real"]
    test = features.table[(features.table["split"] == "test") & (features.table["label"] == 0)]
    assert counts["gan"] == (test["source"] == "a").sum() and counts["flow"] == len(test)


def test_kept_runs_are_reused_and_others_are_not(tmp_path):
    recipes = {"item": item("cosines", HEAD), "image": control("image_linear")}
    options = {"seeds": (0,), "train_generators": ["gan"], "n_boot": 20, "out": tmp_path}
    first = train_on_test_on(FEATURES, recipes, **options)
    assert first.options["runs_reused"] == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "image--gan--s0.json",
        "item--gan--s0.json",
    ]
    again = train_on_test_on(FEATURES, recipes, **options)
    assert again.options["runs_reused"] == 2
    pd.testing.assert_frame_equal(again.table, first.table)
    # another threshold is derived from the kept scores; another head, seed or data set is not
    best = train_on_test_on(FEATURES, recipes, **options, threshold="best")
    assert best.options["runs_reused"] == 2 and best.runs[0].threshold != first.runs[0].threshold
    other = {
        "item": item("cosines", MisalignmentMLP("linear", max_epochs=3, device="cpu")),
        "image": recipes["image"],
    }
    assert train_on_test_on(FEATURES, other, **options).options["runs_reused"] == 1
    moved = replace(
        FEATURES,
        image_emb=FEATURES.image_emb[:, ::-1].copy(),
        caption_emb=FEATURES.caption_emb[:, ::-1].copy(),
    )
    assert train_on_test_on(moved, other, **options).options["runs_reused"] == 0


def test_save_and_load(study, tmp_path):
    again = Study.load(study.save(tmp_path / "study"))
    pd.testing.assert_frame_equal(again.table, study.table)
    pd.testing.assert_frame_equal(again.summary(), study.summary())
    stored = pd.read_csv(tmp_path / "study" / "table.csv")
    np.testing.assert_allclose(stored["value"], study.table["value"])
    json.loads((tmp_path / "study" / "runs" / "item--gan--s1.json").read_text())
    with pytest.raises(InputError, match="holds no study.json"):
        Study.load(tmp_path)


def test_external_scores_join_by_id_or_path(tmp_path):
    score = Recorder(0).decision_function(FEATURES)
    by_id = tmp_path / "ids.csv"
    pd.DataFrame({"image_id": FEATURES.table["image_id"], "score": score}).sample(
        frac=1, random_state=0
    ).to_csv(by_id)
    here = replace(
        FEATURES, table=FEATURES.table.assign(path=[str(tmp_path / p) for p in FEATURES.table["path"]])
    )
    by_path = tmp_path / "paths.csv"
    pd.DataFrame({"path": FEATURES.table["path"], "score": score}).to_csv(by_path, index=False)
    recipes = {"mine": Recorder, "ids": external(by_id), "paths": external(by_path)}
    study = train_on_test_on(here, recipes, seeds=(0,), n_boot=10)
    values = study.table.pivot_table(
        index=["train_generator", "test_generator", "metric"], columns="detector", values="value"
    )
    np.testing.assert_allclose(values["ids"], values["mine"], atol=1e-6)
    np.testing.assert_allclose(values["paths"], values["mine"], atol=1e-6)
    gone = FEATURES.table["image_id"][(FEATURES.table["split"] == "test").to_numpy()].iloc[-1]
    pd.DataFrame({"image_id": FEATURES.table["image_id"], "score": score}).query("image_id != @gone").to_csv(
        by_id
    )
    with pytest.raises(
        InputError, match=rf"has no score for 1 of 190 images, the first is {gone}; score the val"
    ):
        train_on_test_on(FEATURES, {"ids": external(by_id)}, seeds=(0,), n_boot=0, train_generators=["vae"])


def test_a_corrected_file_of_scores_is_read_again(tmp_path):
    score, ids = Recorder(0).decision_function(FEATURES), FEATURES.table["image_id"]

    def auroc(names):
        pd.DataFrame({"image_id": names, "score": score}).to_csv(tmp_path / "s.csv", index=False)
        recipes = {"theirs": external(tmp_path / "s.csv")}
        study = train_on_test_on(FEATURES, recipes, seeds=(0,), n_boot=0, out=tmp_path / "out")
        return study.summary(["auroc"])["unseen_mean"][0]

    wrong = auroc(ids.sample(frac=1, random_state=0).to_numpy())  # the same numbers, in another order
    assert auroc(ids) == pytest.approx(
        train_on_test_on(FEATURES, {"mine": Recorder}, seeds=(0,), n_boot=0).summary(["auroc"])[
            "unseen_mean"
        ][0],
        abs=1e-6,
    )
    assert wrong < 0.6


def test_names_that_a_file_system_cannot_tell_apart(tmp_path):
    table = FEATURES.table.replace({"generator": {"gan": "生成器一", "flow": "生成器二"}})
    here = replace(FEATURES, table=table)
    study = train_on_test_on(here, {"n > 3": Recorder, "n < 3": Recorder}, seeds=(0,), n_boot=0, out=tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == len(study.runs) == 6
    pd.testing.assert_frame_equal(Study.load(study.save(tmp_path)).table, study.table)


def test_reals_judged_apart_are_drawn_apart():
    few = np.zeros(len(FEATURES), bool)
    rows = np.flatnonzero(((FEATURES.table["split"] == "test") & (FEATURES.table["label"] == 0)).to_numpy())
    few[rows[:3]] = True  # three reals of a source of their own, with all fakes of one generator
    few |= (FEATURES.table["generator"] == "gan").to_numpy()
    here = replace(FEATURES, table=FEATURES.table.assign(source=np.where(few, "small", "large")))
    study = train_on_test_on(here, {"a": Recorder}, seeds=(0,), n_boot=200, pair_by="source")
    assert study.table[["low", "high"]].notna().all(axis=None)
    assert study.table.query("test_generator == 'gan'")["n_real"].eq(3).all()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"file": ["a"], "score": [1]}, "has the columns file, score; expected image_id or path, and score"),
        ({"path": ["a", "b"], "score": [1, "x"]}, "row 3: score 'x' is not a finite number"),
        ({"image_id": ["a", "a"], "score": [1, 2]}, "gives two different scores to a; expected one"),
    ],
)
def test_external_scores_errors(tmp_path, table, message):
    pd.DataFrame(table).to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(InputError, match=message):
        external(tmp_path / "s.csv")
    with pytest.raises(InputError, match="cannot read scores from .*none.csv"):
        external(tmp_path / "none.csv")


def test_fusion_from_kept_scores_equals_fusion_by_training():
    parts = {"a": item("cosines", HEAD), "b": control("image_linear")}
    # Study.fuse may calibrate on the half that training never sees; the recipe calibrates on the other half
    study = train_on_test_on(FEATURES, parts | {"both": late(list(parts.values()))}, seeds=(0,), n_boot=40)
    study.fuse("fused", ["a", "b"])
    assert study.detectors == ["a", "b", "both", "fused"]
    summary = study.summary(["auroc"]).set_index("detector")["unseen_mean"]
    assert summary["fused"] == pytest.approx(summary["both"], abs=0.03)
    gain = study.fusion_gain("fused", ["a", "b"])
    cell = gain.iloc[0]
    matrices = {name: study.matrix(name).loc[cell["train_generator"], cell["test_generator"]]
                for name in ("a", "b", "fused")}  # fmt: skip
    assert cell["best"] == max(matrices["a"], matrices["b"]) and cell["best"] == matrices[cell["best_part"]]
    assert (
        cell["difference"] == pytest.approx(matrices["fused"] - cell["best"])
        and gain["difference"].is_monotonic_increasing
    )
    with pytest.raises(InputError, match="the study has a contender 'a' already"):
        study.fuse("a", ["a", "b"])


def test_recipes_on_other_features_of_the_same_images(study):
    """Another captioner or localiser: other embeddings, the same images in another order."""
    shuffle = np.random.default_rng(0).permutation(len(FEATURES))
    recipes = {
        "item": item("cosines", HEAD),
        "same": item("cosines", HEAD, features=FEATURES.select(shuffle)),
        "small": item("cosines", HEAD, train_images=40),
    }
    again = train_on_test_on(FEATURES, recipes, seeds=(0, 1), n_boot=0)
    values = again.table.pivot_table(index=["train_generator", "test_generator", "seed", "metric"],
                                     columns="detector", values="value")  # fmt: skip
    np.testing.assert_allclose(values["same"], values["item"], atol=1e-5)
    assert {r.n_train for r in again.runs if r.detector == "small"} == {40}
    with pytest.raises(InputError, match="the features of 'part' lack 10 of the study's 760 images"):
        train_on_test_on(
            FEATURES, {"part": item("cosines", features=FEATURES.select(np.arange(750)))}, seeds=(0,)
        )


def test_standard_detectors():
    recipes, lacking = standard_detectors(FEATURES, "cosines", HEAD, skip=["image_nearest"])
    assert list(recipes)[0] == "item" and set(lacking) == {
        "generic_caption",
        "spectrum",
        "noise_residual",
        "cnn",
    }
    assert set(recipes) == {"item", *CONTROLS} - set(lacking) - {"image_nearest"}
    json.dumps([recipe.config for recipe in recipes.values()])


def test_early_fusion_sees_both():
    scorer = early("cosines", HEAD).build(0)
    assert isinstance(scorer, FeatureScorer)
    x = scorer.vectors(FEATURES)
    np.testing.assert_array_equal(x[:, :3], represent(FEATURES, "cosines"))
    np.testing.assert_array_equal(x[:, 3:], FEATURES.image_emb)


def test_errors():
    one = {"r": Recorder}
    with pytest.raises(
        InputError, match="generator 'gna' has no fake image with the split 'train'; generators: flow, gan"
    ):
        train_on_test_on(FEATURES, one, train_generators=["gna"])
    with pytest.raises(InputError, match="threshold='oracle': expected one of fpr, best"):
        train_on_test_on(FEATURES, one, threshold="oracle")
    with pytest.raises(InputError, match="0 contenders and 5 seeds"):
        train_on_test_on(FEATURES, {})
    table = FEATURES.table.copy()
    table.loc[:3, "split"] = None
    with pytest.raises(InputError, match="4 of 760 images have no split; expected train, val or test"):
        train_on_test_on(replace(FEATURES, table=table), one)
    with pytest.raises(InputError, match="no fake image has the split 'test'"):
        train_on_test_on(FEATURES.select((FEATURES.table["split"] != "test").to_numpy()), one)
    with pytest.raises(
        InputError, match="false-positive rate of 0.01 needs at least 99 real validation images, got 50"
    ):
        train_on_test_on(FEATURES, one, fpr=0.01)
