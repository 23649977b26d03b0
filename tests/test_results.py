"""What follows from scores: families left out, spread, comparisons, the file of scores, moved thresholds."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from itemkit.controls import CONTROLS
from itemkit.errors import InputError
from itemkit.matrix import train_on_test_on
from itemkit.protocols import get_protocol
from itemkit.recipes import ExternalScores, Recipe
from itemkit.results import (
    MEAN,
    ONE,
    PAIR,
    SEVERAL,
    SHIFTED,
    WORST,
    Run,
    Study,
    fusion_table,
    headline,
    read_scores,
    save_scores,
    study_table,
    to_markdown,
)

from synthetic import make_features

FAMILIES = {"flow": "f", "flow_early": "f", "gan": "g", "vae": "v"}
FEATURES = make_features(300, 80, generators=("flow", "flow_early", "gan", "vae"))
PLAN = replace(get_protocol("mini"), families=FAMILIES)


class Cosine:
    """One number without training; a seed adds its own noise."""

    def __init__(self, seed, noise=0.0):
        self.rng, self.noise = np.random.default_rng(seed), noise

    def fit(self, train, val):
        self.trained_on = set(train.table["generator"])
        return self

    def decision_function(self, features):
        s = -np.sum(features.image_emb * features.caption_emb, axis=1).astype(float)
        return s + self.noise * self.rng.normal(size=len(s))


def make_study(**options):
    recipes = {"cosine": Recipe(Cosine), "noisy": Recipe(lambda seed: Cosine(seed, 0.1)),
               "noise": Recipe(lambda seed: Cosine(seed, 100.0))}  # fmt: skip
    about = {"seeds": (0, 1), "n_boot": 400, "families": FAMILIES, "leave_family_out": True} | options
    return train_on_test_on(FEATURES, recipes, **about)


@pytest.fixture(scope="module")
def study():
    return make_study()


def test_a_family_is_left_out_beside_training_on_one(study):
    sets = study.options["training_sets"]
    assert sets["all but f"] == ["gan", "vae"] and sets["all but v"] == ["flow", "flow_early", "gan"]
    assert list(sets) == ["flow", "flow_early", "gan", "vae", "all but f", "all but g", "all but v"]
    one, several = (study.unseen("cosine", "auroc", training) for training in (ONE, SEVERAL))
    assert one.groupby(["train_generator", "test_generator"]).ngroups == 16 - 4 - 2
    pairs = set(zip(several["train_generator"], several["test_generator"], strict=True))
    assert pairs == {
        ("all but f", "flow"),
        ("all but f", "flow_early"),
        ("all but g", "gan"),
        ("all but v", "vae"),
    }
    assert [study.mean(part)["n_cells"] for part in (one, several)] == [10, 4]
    assert study.cells("cosine", "auroc").groupby(PAIR).ngroups == 7 * 4
    few = make_features(200, 60, generators=("gan", "vae"))
    study = train_on_test_on(few, {"c": Recipe(Cosine)}, (0,), leave_family_out=True, n_boot=0)
    assert list(study.options["training_sets"]) == ["gan", "vae"]  # without one there is but one


def test_all_images_of_the_families_train():
    seen = {}

    class Recorder(Cosine):
        def fit(self, train, val):
            seen.setdefault(tuple(sorted(set(train.table["generator"]))), (train, val))
            return self

    train_on_test_on(
        FEATURES, {"r": Recipe(Recorder)}, (0,), families=FAMILIES, leave_family_out=True, n_boot=0
    )
    train, val = seen["flow", "flow_early", "gan", "real"]
    assert "vae" not in set(val.table["generator"]) and len(train) == round(0.8 * 150) + round(0.8 * 120)


def test_mean_spread_and_interval_by_hand(study):
    cells = study.unseen("noisy", "auroc", ONE)
    mean = study.mean(cells)
    of_family = cells.groupby(cells["test_generator"].map(FAMILIES))["value"].mean()
    assert mean["n_families"] == 3 and mean["n_cells"] == 10 and mean["n_seeds"] == 2
    assert (mean["family_low"], mean["family_high"]) == (of_family.min(), of_family.max())
    assert mean["family_sd"] == pytest.approx(of_family.std())
    # the resamples of all rows at once are those of each row
    parts = [part for _, part in cells.groupby(["train_generator", "test_generator"])]
    drawn = np.mean([study._drawn(part) for part in parts], axis=0)
    np.testing.assert_allclose(study._drawn(cells), drawn, atol=1e-6)
    assert drawn[0] == pytest.approx(mean["value"], abs=1e-6) and mean["low"] < mean["value"] < mean["high"]
    one = study.mean(parts[0])
    assert np.isnan(one["family_low"]) and one["n_families"] == 1
    # one resample, image by image
    weights, run = study._weights[:, 7], next(r for r in study.runs if r.detector == "noisy")
    cell = study.cells("noisy", "auroc").iloc[[0]]
    rows = np.repeat(study._cells[cell["test_generator"].iloc[0]], weights[study._cells["flow"]])
    y, s = study.test["label"].to_numpy()[rows], np.array(run.test_scores)[rows]
    assert study._drawn(cell)[7] == pytest.approx(roc_auc_score(y, s), abs=1e-6)
    cell = study.cells("noisy", "ap").iloc[[0]]
    assert study._drawn(cell)[7] == pytest.approx(average_precision_score(y, s), abs=1e-6)
    assert len(study._drawn(cell)) == 201 and len(study._drawn(cells)) == 401


def test_comparisons_are_corrected_for_their_number(study):
    table = study.compare("cosine", training=ONE).set_index("other")
    assert list(table.index) == ["noisy", "noise"]
    assert (table["p_holm"] >= table["p_value"]).all() and table.loc["noise", "p_value"] == 2 / 401
    assert table.loc["noise", "p_holm"] == 4 / 401 and table.loc["noise", "low"] > 0.2


def test_a_better_part_is_not_chosen_where_it_is_judged():
    """Of many parts that are all the same, the luckiest would seem better than their fusion."""
    rng = np.random.default_rng(0)
    names = [f"part {i}" for i in range(12)]
    study = make_study(leave_family_out=False, train_generators=["vae"], seeds=(0,))
    signal = np.array(study.runs[0].test_scores)
    runs = []
    for name in names:
        noise = rng.normal(size=len(signal)) * signal.std()
        known = np.array(study.runs[0].val_scores)
        values = (study.runs[0].val_rows, (known + rng.normal(size=len(known)) * known.std()).tolist())
        run = Run(name, "vae", 0, *values, study.runs[0].val_labels, (signal + noise).tolist())
        runs.append(run.calibrate(study.options))
    study = Study(study.images, runs, study.options | {"titles": {}})
    study.fuse("same", ["part 0"])  # as good as an ordinary part
    gain = study.fusion_gain("same", names)
    auroc = study.table.query("metric == 'auroc' and not seen").pivot(
        index="test_generator", columns="detector", values="value"
    )
    naive = auroc["same"] - auroc[names].max(axis=1)
    assert np.mean(naive) < gain["difference"].mean() - 0.01
    assert (gain["p_holm"] >= gain["p_value"]).all()


def test_scores_travel(study, tmp_path):
    study = Study(study.images, list(study.runs), dict(study.options)).fuse("both", ["cosine", "noisy"])
    other = make_study(n_boot=50, seeds=(0,))
    path = save_scores({"clean": study, "random JPEG": other}, tmp_path / "scores.parquet")
    back = read_scores(path)
    assert list(back) == ["clean", "random JPEG"] and back["clean"].detectors == study.detectors
    same = ["detector", "train_generator", "test_generator", "seed", "metric"]
    for name, was in (("clean", study), ("random JPEG", other)):
        both = was.table.merge(back[name].table, on=same, suffixes=("", "_back"))
        assert len(both) == len(was.table) == len(back[name].table)
        auroc = both[both["metric"].eq("auroc") & both["detector"].ne("both")]
        np.testing.assert_allclose(auroc["value"], auroc["value_back"], atol=1e-3)
    again = save_scores(read_scores(path), tmp_path / "again.parquet")
    assert again.read_bytes() == path.read_bytes(), "written again, it is the same file"
    back, table = read_scores(path), study_table(read_scores(path), PLAN)
    pd.testing.assert_frame_equal(study_table(read_scores(path), PLAN), table)
    text = to_markdown(table, back, PLAN)
    assert "## clean, trained on one generator: unseen cells: 10, families: 3" in text
    assert "## random JPEG, trained on several generators: unseen cells: 4, families: 3" in text
    header = next(line for line in text.splitlines() if line.startswith("| detector | AUROC"))
    assert header == "| detector | AUROC | families | worst cell | AP | TPR at 5 % FPR | TPR at 1 % FPR |"
    row = next(line for line in text.splitlines() if line.startswith("| cosine |"))
    assert row.count("(") == 3 and "sd " in row and "→" in row  # each with its interval or spread
    assert "| shifted, no labels | shifted, 20 labels | balanced, oracle |" in text

    # one row per image and run, in plain words, without the folder of this machine; few bytes
    table = pd.read_parquet(path)
    assert list(table.columns) == ["condition", "detector", "train_generator", "seed", "image_id", "path",
                                   "label", "generator", "source", "split", "score"]  # fmt: skip
    assert set(table["split"]) == {"val", "test"} and "both" not in set(table["detector"])
    assert path.stat().st_size < 2.5 * len(table) + 30_000
    one = table[(table["condition"] == "clean") & (table["detector"] == "noisy") & (table["seed"] == 1)
                & (table["train_generator"] == "gan") & table["generator"].isin(["real", "vae"])
                & (table["split"] == "test")]  # fmt: skip
    value = study.table.query("detector == 'noisy' and seed == 1 and train_generator == 'gan' and "
                              "test_generator == 'vae' and metric == 'auroc'")["value"].item()  # fmt: skip
    assert roc_auc_score(one["label"], one["score"]) == pytest.approx(value, abs=1e-3)


def test_means_and_worst_cells_of_all_metrics_are_those_of_the_study(study):
    """Made for all contenders at once, they are what `Study.mean` and `Study.worst` say of each."""
    table = study_table({"clean": study}, PLAN)
    assert not table.duplicated(["metric", "detector", "training", "row"]).any()
    for metric in ("auroc", "accuracy_fake", "ece"):
        for training in (ONE, SEVERAL):
            of = table[(table["metric"] == metric) & (table["training"] == training)]
            of = of[of["detector"] == "noisy"].set_index("row")
            cells = study.unseen("noisy", metric, training)
            for row, part in ((MEAN, cells), (WORST, study.worst(cells))):
                expected = pd.Series(study.mean(part), dtype=float)
                if metric != "auroc":  # no interval
                    expected[["low", "high"]] = np.nan
                found = of.loc[row, expected.index].astype(float)
                pd.testing.assert_series_equal(found, expected, check_names=False)
            assert of.loc[WORST, "where"] == " → ".join(
                study.worst(cells)[["train_generator", "test_generator"]].iloc[0]
            )
            counted = of[of["seen"] == False]  # noqa: E712 - means are neither
            assert len(counted) - 1 == of.loc[MEAN, "n_cells"]


def test_the_headline_fits_a_page(study):
    table = headline({"clean": study, "random JPEG": study}, ["cosine", "no such contender", "noise"])
    assert list(table["detector"]) == ["cosine", "noise"]
    assert [name for name in table if name.startswith("clean: TPR")] == [
        "clean: TPR at 1 % FPR", "clean: TPR at 5 % FPR"]  # fmt: skip
    mean = study.mean(study.unseen("cosine", "auroc", ONE))
    assert table["clean: mean"][0] == "{value:.2f} ({low:.2f}-{high:.2f})".format(**mean)


def test_a_fusion_that_is_worse_than_its_parts_is_found_out(study):
    study = Study(study.images, list(study.runs), dict(study.options))
    study.fuse("same", ["cosine", "cosine"])
    parts = {"noise": ("cosine",), "same": ("cosine",), "lacking": ("cosine", "none")}
    found, cells = fusion_table({"clean": study}, parts)
    found = found.set_index("fusion")
    assert list(found.index) == ["noise", "same"] and len(cells) == 20
    assert found.loc["noise", "beyond"] >= 8 and found.loc["noise", "largest_loss"] > 0.1
    assert found.loc["same", ["below", "beyond", "largest_loss"]].tolist() == [0, 0, 0]
    assert found.loc["same", "mean"] == pytest.approx(
        study.mean(study.unseen("cosine", "auroc", ONE))["value"]
    )


def test_without_an_answer_where_parts_disagree_and_the_image_is_novel(study):
    found = study.unsure(("cosine", "noise"), "noise", ONE)
    cells = study.unseen("cosine", "auroc", ONE).groupby(["train_generator", "test_generator"])
    assert len(found) == cells.ngroups
    assert found["unsure_real"].between(0, 0.2).all() and found["unsure_fake"].max() > 0
    never = study.unsure(("cosine", "cosine"), "noise", ONE)  # it agrees with itself
    assert not never[["unsure_real", "unsure_fake"]].to_numpy().any()
    assert never["all"].equals(never["answered"])
    by_cell = (
        cells["value"].mean().reindex(pd.MultiIndex.from_frame(never[["train_generator", "test_generator"]]))
    )
    np.testing.assert_allclose(never["all"], by_cell)


def test_a_detector_joins_a_file_of_scores(study, tmp_path):
    """By content or by the names of its files, wherever they lie; the same numbers as in the study itself."""
    path = save_scores({"clean": study}, tmp_path / "s.parquet")
    own = study.images.assign(
        score=Cosine(0).decision_function(FEATURES), path="/elsewhere/" + study.images["path"]
    )
    for key in ("image_id", "path"):
        own[[key, "score"]].to_csv(tmp_path / "mine.csv", index=False)
        back = read_scores(path)["clean"].join("mine", ExternalScores(tmp_path / "mine.csv"))
        for training in (ONE, SEVERAL):
            mine, ours = (back.unseen(n, "auroc", training)["value"].mean() for n in ("mine", "cosine"))
            assert mine == pytest.approx(ours, abs=1e-3)
        assert (
            back.options["titles"]["mine"] == "mine (scores from elsewhere)"
            and len(back.compare("mine")) == 3
        )
    with pytest.raises(InputError, match="the study has a contender 'mine' already; choose another"):
        back.join("mine", ExternalScores(tmp_path / "mine.csv"))
    own.iloc[50:][["image_id", "score"]].to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(InputError, match="mine.csv has no score for [0-9]+ of [0-9]+ images"):
        read_scores(path)["clean"].join("mine", ExternalScores(tmp_path / "mine.csv"))


@pytest.mark.parametrize("scores", [np.geomspace(1e-12, 1, 60), 1 - np.geomspace(1e-6, 1e-3, 60),
                                    1e6 + np.arange(60.0), np.zeros(60)])  # fmt: skip
def test_scores_of_any_scale_keep_their_order(scores, tmp_path):
    study = make_study(seeds=(0,), leave_family_out=False, train_generators=["vae"], n_boot=0)
    rng, run = np.random.default_rng(0), study.runs[0]
    test, val = (rng.choice(scores, len(part)).tolist() for part in (run.test_scores, run.val_scores))
    runs = [replace(run, test_scores=test, val_scores=val).calibrate(study.options)]
    study = Study(study.images, runs, study.options)
    back = read_scores(save_scores({"clean": study}, tmp_path / "s.parquet"))["clean"]
    for a, b in zip(*(s.cells("cosine", "auroc")["value"] for s in (study, back)), strict=True):
        assert a == pytest.approx(b, abs=2e-3)


def test_a_file_that_holds_no_scores(tmp_path):
    pd.DataFrame({"score": [1.0]}).to_parquet(tmp_path / "s.parquet")
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    table = pd.DataFrame({"score": [1.0], "condition": "clean"})
    table.attrs["studies"] = {"clean": {}}
    table.to_parquet(tmp_path / "u.parquet")
    for name in ("s", "t", "u", "missing"):
        with pytest.raises(InputError, match=f"cannot read the scores of a study from .*{name}.parquet"):
            read_scores(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.assign(score=np.nan), "'score'. is missing or not a number"),
        (lambda t: t.assign(label=7), "a score or label is missing or not a number that it can be"),
        (lambda t: t.assign(split="train"), "images of the split 'train'; expected val and test"),
        (lambda t: t.drop(columns="seed"), "seed"),
        (lambda t: t.iloc[:-3], "the test images of noise, trained on"),
        (lambda t: t.assign(train_generator=t["train_generator"].astype(str).str.replace("gan", "x\n")),
         "nothing is told about cosine, trained on x"),
        (lambda t: t.attrs["studies"]["clean"].update(n_boot=10**9) or t, "n_boot=1000000000; expected"),
        (lambda t: t.attrs["studies"]["clean"].update(metrics=["x"]) or t, "unknown metric 'x'"),
    ],
)  # fmt: skip
def test_a_file_of_scores_from_anybody(damage, message, study, tmp_path):
    """What a study cannot have is refused in one line, whoever wrote it."""
    path = save_scores({"clean": study}, tmp_path / "s.parquet")
    table = pd.read_parquet(path)
    damage(table).to_parquet(path)
    with pytest.raises(InputError, match=f"cannot read the scores of a study from .*{message}") as error:
        read_scores(path)
    assert "\n" not in str(error.value)


def test_words_of_a_file_of_scores_act_on_nothing(study, tmp_path):
    options = study.options | {"titles": study.options["titles"] | {"cosine": "a\x1b[31m\n# b"}}
    path = save_scores({"clean": Study(study.images, list(study.runs), options)}, tmp_path / "s.parquet")
    text = to_markdown(study_table(back := read_scores(path), PLAN), back, PLAN)
    assert "\x1b" not in text and "\n# b" not in text


def test_shifted_thresholds_stand_between_the_stored_and_the_oracle_one(study):
    """Another world in which every score is higher: the stored threshold calls all of it fake."""
    runs = []
    for run in (r for r in study.runs if r.detector == "cosine"):
        moved = replace(run, test_scores=[s + 0.5 for s in run.test_scores])
        runs.append(moved.calibrate(study.options | {"threshold": "best"}))
    moved = Study(study.images, runs, study.options)
    value = moved.table[~moved.table["seen"]].groupby("metric")["value"].mean()
    assert value["balanced_accuracy"] < 0.55 < 0.65 < value[[*SHIFTED]].min()
    assert value[[*SHIFTED]].max() <= value["balanced_accuracy_oracle"] + 0.02
    assert "cosine" not in CONTROLS
