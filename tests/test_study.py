"""The matrix: what trains on what, honest thresholds, intervals, reuse, failures, external scores, fusion."""

import hashlib
import json
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from itemkit import head, matrix, workflow
from itemkit.calibrate import threshold_at_fpr
from itemkit.controls import CONTROLS, OURS, VARIANTS, NearestReals, logistic
from itemkit.errors import InputError
from itemkit.head import MisalignmentMLP
from itemkit.images import load_image
from itemkit.matrix import train_on_test_on
from itemkit.misalignment import represent
from itemkit.presets import Preset
from itemkit.recipes import ExternalScores, Recipe, control, item, standard_detectors
from itemkit.results import ONE, SEVERAL, SHIFTED, STUDY_METRICS, Study
from itemkit.splits import split_validation
from itemkit.steps import Steps
from itemkit.study import _differences, make_variants

import fakes
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


RECORDER = Recipe(Recorder)


@pytest.fixture
def trained(monkeypatch):
    """Name, generator and seed of every run that is trained and not read back."""
    done, run = [], matrix._run
    monkeypatch.setattr(matrix, "_run", lambda *args: done.append((args[0], *args[3:5])) or run(*args))
    return done


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
    # 3 contenders, 3 train generators, 3 test generators, 2 seeds
    assert len(table) == 3 * 3 * 3 * 2 * len(STUDY_METRICS)
    assert not table.duplicated(["detector", "train_generator", "test_generator", "seed", "metric"]).any()
    assert (table["seen"] == (table["train_generator"] == table["test_generator"])).all()
    assert set(table["n_real"]) == {100} and set(table["n_fake"]) == {30} and set(table["training"]) == {ONE}
    # with labels of the tested set or without, a threshold is moved for generators not trained on
    unset = table["value"].isna()
    assert (unset == (table["seen"] & table["metric"].isin(SHIFTED))).all()
    assert table.loc[~unset, "value"].between(0, 1).all()
    wide = table[~table["seen"]].pivot_table(index="detector", columns="metric", values="value")
    assert (wide["balanced_accuracy_oracle"] > wide[[*SHIFTED, "balanced_accuracy"]].max(axis=1)).all()


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
    train_on_test_on(FEATURES, {"r": RECORDER}, seeds=(0, 1), n_boot=0)
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


def test_mean_and_worst_cell_by_hand(study):
    unseen = study.table.query("detector == 'image' and metric == 'auroc' and not seen")
    pd.testing.assert_frame_equal(study.unseen("image", "auroc"), unseen)
    mean, worst = study.mean(unseen), study.mean(study.worst(unseen))
    assert mean["value"] == pytest.approx(unseen["value"].mean()) and mean["n_cells"] == 6
    of_family = unseen.groupby("test_generator")["value"].mean()
    assert [mean[f"family_{end}"] for end in ("low", "high", "sd")] == [
        of_family.min(), of_family.max(), pytest.approx(of_family.std())]  # fmt: skip
    assert mean["seed_sd"] == pytest.approx(unseen.groupby("seed")["value"].mean().std())
    by_cell = unseen.groupby(["train_generator", "test_generator"])["value"].mean()
    assert worst["value"] == pytest.approx(by_cell.min())
    assert mean["low"] < mean["value"] < mean["high"] and worst["low"] < worst["value"] < worst["high"]
    # a mean over cells is known better than its weakest cell
    assert mean["high"] - mean["low"] < worst["high"] - worst["low"]
    ece = study.unseen("image", "ece")
    by_cell = ece.groupby(["train_generator", "test_generator"])["value"].mean()
    assert study.mean(study.worst(ece))["value"] == pytest.approx(by_cell.max())  # the largest is the worst


def test_comparison_is_paired(study):
    table = study.compare("item", "auroc").set_index("other")
    expected = study.unseen("item", "auroc")["value"].mean() - study.unseen("text", "auroc")["value"].mean()
    assert table.loc["text", "difference"] == pytest.approx(expected)
    assert table.loc["text", "low"] > 0 and table.loc["text", "p_value"] < 0.05
    mirrored = study.compare("text").set_index("other")
    assert mirrored.loc["item", "difference"] == pytest.approx(-expected)
    with pytest.raises(InputError, match="no 'imag' in this study.* Did you mean 'image'"):
        study.compare("imag")
    with pytest.raises(InputError, match="no 'brier' in this study; there are ap, auroc"):
        study.cells("image", "brier")


def test_a_difference_of_which_no_p_is_known_has_no_star(tmp_path):
    study = train_on_test_on(FEATURES, {"item": RECORDER, "same": RECORDER}, seeds=(0,), n_boot=0)
    *_, row, _ = _differences({"raw": study}, tmp_path)
    assert row.startswith("| same | +0.0") and "*" not in row


def test_families_and_pooled_train_generators():
    study = train_on_test_on(
        FEATURES,
        {"r": RECORDER},
        seeds=(0,),
        train_generators=["gan+flow"],
        families={"vae": "flow"},
        n_boot=0,
    )
    assert study.table["seen"].all() and set(study.table["training"]) == {SEVERAL}
    assert np.isnan(study.mean(study.unseen("r", "auroc"))["value"])
    study = train_on_test_on(FEATURES, {"r": RECORDER}, seeds=(0,), train_generators=["gan+flow"], n_boot=0)
    assert set(study.table.loc[~study.table["seen"], "test_generator"]) == {"vae"}


def test_kept_runs_are_reused_and_others_are_not(tmp_path, trained):
    recipes = {"item": item("cosines", HEAD), "image": control("image_linear")}
    options = {"seeds": (0,), "train_generators": ["gan"], "n_boot": 20, "out": tmp_path}
    first = train_on_test_on(FEATURES, recipes, **options)
    assert trained == [("item", "gan", 0), ("image", "gan", 0)]
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    again = train_on_test_on(FEATURES, recipes, **options)
    pd.testing.assert_frame_equal(again.table, first.table)
    # another threshold is derived from the kept scores
    best = train_on_test_on(FEATURES, recipes, **options, threshold="best")
    assert len(trained) == 2 and best.runs[0].threshold != first.runs[0].threshold
    # another head or data set is not, and a damaged file is written again
    recipes["item"] = item("cosines", MisalignmentMLP("linear", max_epochs=3, device="cpu"))
    train_on_test_on(FEATURES, recipes, **options)
    assert trained[2:] == [("item", "gan", 0)]
    flipped = {name: getattr(FEATURES, name)[:, ::-1].copy() for name in ("image_emb", "caption_emb")}
    train_on_test_on(replace(FEATURES, **flipped), recipes, **options)
    assert len(trained) == 5
    for path in (tmp_path / "runs").iterdir():
        if json.loads(path.read_text())["detector"] == "image":
            path.write_text("{")
    train_on_test_on(replace(FEATURES, **flipped), recipes, **options)
    assert trained[5:] == [("image", "gan", 0)]


def test_external_scores_join_by_id_or_path(tmp_path):
    score = Recorder(0).decision_function(FEATURES)
    here = replace(
        FEATURES, table=FEATURES.table.assign(path=[str(tmp_path / p) for p in FEATURES.table["path"]])
    )
    table = FEATURES.table[["image_id", "path"]].assign(score=score).sample(frac=1, random_state=0)
    study = train_on_test_on(here, {"mine": RECORDER}, seeds=(0,), n_boot=10)
    for name, key in (("ids", "image_id"), ("paths", "path")):
        table[[key, "score"]].to_csv(tmp_path / f"{name}.csv", index=False)
        study.join(name, ExternalScores(tmp_path / f"{name}.csv"))
    values = study.table.pivot_table(
        index=["train_generator", "test_generator", "metric"], columns="detector", values="value"
    )
    np.testing.assert_allclose(values["ids"], values["mine"], atol=1e-6)
    np.testing.assert_allclose(values["paths"], values["mine"], atol=1e-6)
    gone = FEATURES.table["image_id"][(FEATURES.table["split"] == "test").to_numpy()].iloc[-1]
    table.query("image_id != @gone").to_csv(tmp_path / "ids.csv")
    with pytest.raises(InputError, match=f"has no score for 1 of .*{gone}.*all images that manifest.csv"):
        study.join("less", ExternalScores(tmp_path / "ids.csv"))


def test_names_that_a_file_system_cannot_tell_apart(tmp_path):
    table = FEATURES.table.replace({"generator": {"gan": "生成器一", "flow": "生成器二"}})
    here = replace(FEATURES, table=table)
    recipes = {"n > 3": control("image_nearest"), "n < 3": control("image_nearest")}
    study = train_on_test_on(here, recipes, seeds=(0,), n_boot=0, out=tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == len(study.runs) == 6


def test_reals_judged_apart_are_drawn_apart():
    few = np.zeros(len(FEATURES), bool)
    rows = np.flatnonzero(((FEATURES.table["split"] == "test") & (FEATURES.table["label"] == 0)).to_numpy())
    few[rows[:3]] = True  # three reals of a source of their own, with all fakes of one generator
    few |= (FEATURES.table["generator"] == "gan").to_numpy()
    here = replace(FEATURES, table=FEATURES.table.assign(source=np.where(few, "small", "large")))
    study = train_on_test_on(here, {"a": RECORDER}, seeds=(0,), n_boot=200, pair_by="source")
    assert np.isfinite(study.mean(study.unseen("a", "auroc"))["low"])
    assert study.table.query("test_generator == 'gan'")["n_real"].eq(3).all()
    assert study.table.query("test_generator == 'flow'")["n_real"].eq(97).all()


def test_external_scores_in_other_peoples_files(tmp_path):
    """Other names, other separators, a byte order mark, columns beside: all read as they are meant."""
    score = Recorder(0).decision_function(FEATURES)
    table = pd.DataFrame({"note": "x, y", "Filename": FEATURES.table["path"], "P_fake": score, "label": 1})
    table.to_csv(tmp_path / "s.csv", sep=";", index=False, encoding="utf-8-sig")
    here = replace(
        FEATURES, table=FEATURES.table.assign(path=[str(tmp_path / p) for p in FEATURES.table["path"]])
    )
    np.testing.assert_allclose(ExternalScores(tmp_path / "s.csv").of(here.table), score)
    digits = FEATURES.table["image_id"].str.replace(
        "[a-f]", "0", regex=True
    )  # an id is text, also if it is digits
    digits = digits.where(~digits.duplicated(), FEATURES.table["image_id"])
    pd.DataFrame({"sha256": digits, "score": score}).to_csv(tmp_path / "t.tsv", sep="\t")
    here = replace(FEATURES, table=FEATURES.table.assign(image_id=digits))
    np.testing.assert_allclose(ExternalScores(tmp_path / "t.tsv").of(here.table), score)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": ["a"], "score": [1]}, "has the columns name, score; expected image_id or path, and score"),
        ({"path": ["a"], "label": [1]}, "has the columns path, label; expected image_id or path, and score"),
        ({"path": ["a", "b"], "score": [1, "x"]}, "row 3: score 'x' is not a finite number"),
        ({"image_id": ["a", "a"], "score": [1, 2]}, "gives two different scores to a; expected one"),
    ],
)
def test_external_scores_errors(tmp_path, table, message):
    pd.DataFrame(table).to_csv(tmp_path / "s.csv", index=False)
    with pytest.raises(InputError, match=message):
        ExternalScores(tmp_path / "s.csv")
    for name, content in (("none.csv", None), ("empty.csv", b""), ("binary.csv", bytes(range(256)))):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"cannot read scores from .*{name}"):
            ExternalScores(tmp_path / name)


def test_late_fusion_from_kept_scores(study):
    parts = ("image", "text")
    new = Study(study.images, list(study.runs), dict(study.options)).fuse("both", parts)
    runs = {r.detector: r for r in new.runs if (r.train_generator, r.seed) == ("gan", 0)}
    y = np.array(runs["text"].val_labels)
    odds = []
    for part in parts:  # the mean of what each says after its own calibration
        fit = runs[part].calibrator
        odds.append(fit.scale * np.array(runs[part].test_scores) + fit.offset)
    np.testing.assert_allclose(runs["both"].test_scores, np.mean(odds, axis=0), rtol=1e-5)
    assert runs["both"].val_labels == y.tolist()
    gain = new.fusion_gain("both", parts)
    assert len(gain) == 6 and gain["difference"].is_monotonic_increasing
    cell = gain.iloc[0]
    train, test = cell["train_generator"], cell["test_generator"]
    half = np.array([hashlib.sha256(name.encode()).digest()[0] % 2 for name in new.test["image_id"]])
    cell_y, values = new.test["label"].to_numpy(), {}
    for name in (*parts, "both"):
        mine = [np.array(r.test_scores) for r in new.runs if (r.detector, r.train_generator) == (name, train)]
        for h in (0, 1):
            rows = (half == h) & new.test["generator"].isin(["real", test]).to_numpy()
            values[name, h] = np.mean([roc_auc_score(cell_y[rows], s[rows]) for s in mine])
    # chosen on one half, judged on the other
    best = {h: max(parts, key=lambda part: values[part, 1 - h]) for h in (0, 1)}
    assert cell["best_part"] == " / ".join(dict.fromkeys([best[0], best[1]]))
    assert cell["best"] == pytest.approx((values[best[0], 0] + values[best[1], 1]) / 2)
    assert cell["fused"] == pytest.approx((values["both", 0] + values["both", 1]) / 2)
    assert cell["difference"] == pytest.approx(cell["fused"] - cell["best"])
    with pytest.raises(InputError, match="the study has a contender 'image' already"):
        new.fuse("image", parts)


def test_recipes_on_other_features_of_the_same_images(study):
    """Another captioner or localiser: other embeddings, the same images in another order."""
    shuffle = np.random.default_rng(0).permutation(len(FEATURES))
    recipes = {
        "item": item("cosines", HEAD),
        "same": item("cosines", HEAD, features=FEATURES.select(shuffle)),
    }
    again = train_on_test_on(FEATURES, recipes, seeds=(0, 1), n_boot=0)
    values = again.table.pivot_table(index=["train_generator", "test_generator", "seed", "metric"],
                                     columns="detector", values="value")  # fmt: skip
    np.testing.assert_allclose(values["same"], values["item"], atol=1e-5)
    with pytest.raises(InputError, match="the features of 'part' lack 10 images, the first is images/"):
        train_on_test_on(
            FEATURES, {"part": item("cosines", features=FEATURES.select(np.arange(750)))}, seeds=(0,)
        )


def test_standard_detectors():
    """What can be run is, with the variants that it needs; of the others it is said what they lack."""
    table = FEATURES.table.copy()
    table.loc[3, "caption_logprob"] = np.nan
    recipes, lacking = standard_detectors(replace(FEATURES, table=table), HEAD, skip=["image_nearest"])
    known = OURS | CONTROLS
    expected = {n for n, c in known.items() if c.variant or {"pixels", "caption_logprob"} & {*c.needs}}
    assert set(lacking) == expected and {"cnn", "few_both", "spectrum_one_class", "concepts"} <= expected
    assert "the images themselves" in lacking["cnn"] and "bank of phrases" in lacking["concepts"]
    assert list(recipes) == [n for n in known if n not in {*lacking, "image_nearest"}]
    variants = {name: FEATURES.select(np.arange(i, len(FEATURES))) for i, name in enumerate(VARIANTS)}
    recipes, lacking = standard_detectors(FEATURES, HEAD, variants)
    assert all("pixels" in known[name].needs for name in lacking)
    for name, recipe in recipes.items():
        assert recipe.features is variants.get(known[name].variant)
    with pytest.raises(InputError, match=r"needs variants\['bank'\].*make_variants makes them"):
        control("concepts")
    both = control("early", "cosines", HEAD).build(0).fit(FEATURES, FEATURES).vectors(FEATURES)
    np.testing.assert_array_equal(both, np.hstack([represent(FEATURES, "cosines"), FEATURES.image_emb]))


def test_a_recipe_says_every_number_that_it_is_made_of():
    """Its description is the key of its runs: plain data, and another number is another key."""
    variants = dict.fromkeys(VARIANTS, FEATURES)
    about = {n: json.dumps(control(n, head=HEAD, variants=variants).config) for n in OURS | CONTROLS}
    assert not [text for text in about.values() if " at 0x" in text or '"device"' in text]
    made_of = [json.dumps(json.loads(text)["made_of"]) + str(CONTROLS.get(n)) for n, text in about.items()]
    assert len(set(made_of)) == len(made_of)
    assert '"k": 5' in about["novelty_worst_knn"] and '"relative": true' in about["few"]
    assert '"steps": 400' in about["cnn"] and '"hidden": [256, 64]' in about["item"]


def stub(**parts):
    made = {"captioner": fakes.FakeCaptioner(), "encoder": fakes.FakeEncoder(), "parser": fakes.FakeParser(),
            "localiser": fakes.FakeLocaliser()}  # fmt: skip
    return Preset(name="stub", about="For these tests.", **made | parts)


def test_other_texts_choose_their_own_regions(tmp_path):
    """An image with another's caption, one for all or a bank is extracted as if that were its own."""
    preset, manifest = stub(), fakes.make_images(tmp_path / "images", 40)
    manifest["split"] = np.where(np.arange(40) % 4, "train", "test")
    features = workflow.features(preset, manifest, tmp_path / "out", "cpu", progress=False)
    found = make_variants(features, preset, tmp_path / "out", "cpu")
    assert list(found) == ["other_caption", "one_caption", "bank"]
    steps, parser = Steps(preset.build("cpu")), preset.parser
    own = features.table.set_index("path")["caption"]
    for name in ("other_caption", "one_caption"):
        part = found[name]
        assert set(part.table["path"]) == set(features.table["path"])
        for row in range(0, len(part), 7):
            caption, one = part.table["caption"][row], part.select([row])
            by_hand = steps([load_image(part.table["path"][row])], [caption])
            assert list(one.objects["phrase"]) == parser.objects([caption])[0]
            for array in ("image_emb", "caption_emb", "region_emb", "phrase_emb"):
                np.testing.assert_allclose(getattr(one, array), getattr(by_hand, array), atol=2e-3)
    swapped = found["other_caption"].table
    for _, part in swapped.groupby("split"):  # every caption goes once to another image of its split
        assert sorted(part["caption"]) == sorted(own[part["path"]])
    assert (swapped["caption"] != swapped["path"].map(own)).mean() > 0.8  # some captions are equal
    (one,) = found["one_caption"].table["caption"].unique()
    reals = features.table[(features.table["label"] == 0) & (features.table["split"] == "train")]
    assert one in set(reals["caption"])
    # the stand-in localiser has one box, the whole image: one region, with the phrase that fits it best
    bank = found["bank"]
    assert (bank.table["n_objects"] == 1).all() and len(set(bank.objects["phrase"])) > 3
    assert set(bank.objects["phrase"]) <= set(features.objects["phrase"])
    image = bank.select([5])
    cosine = fakes.FakeEncoder().encode_texts(sorted(set(features.objects["phrase"]))).numpy()
    assert image.image_emb @ image.phrase_emb.T == pytest.approx((image.image_emb @ cosine.T).max(), abs=0.15)


def test_other_texts_follow_from_content_and_are_made_once(tmp_path):
    preset, manifest = stub(), fakes.make_images(tmp_path / "here", 24)
    manifest["split"] = "train"

    def captions(manifest, out):
        features = workflow.features(preset, manifest, tmp_path / out, "cpu", progress=False)
        made = make_variants(features, preset, tmp_path / out, "cpu", other_encoder=fakes.FakeEncoder("2"))
        assert made["other_encoder"].owner.size == 0 and len(made["other_encoder"]) == len(features)
        return made["other_caption"].table.set_index("image_id")["caption"].sort_index()

    first, seen = captions(manifest, "a"), preset.encoder.images_encoded
    pd.testing.assert_series_equal(captions(manifest, "a"), first)
    assert preset.encoder.images_encoded == seen
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = manifest.assign(path=manifest["path"].str.replace("here", "there")).sample(frac=1, random_state=0)
    pd.testing.assert_series_equal(captions(moved.reset_index(drop=True), "b"), first)


def test_what_cannot_be_made_otherwise_is_left_out(tmp_path):
    preset, manifest = stub(parser=None, localiser=None), fakes.make_images(tmp_path / "images", 24)
    manifest["split"] = "train"
    features = workflow.features(preset, manifest, tmp_path / "out", "cpu", progress=False)
    assert list(make_variants(features, preset, tmp_path / "out", "cpu")) == ["other_caption", "one_caption"]
    assert make_variants(features, preset, tmp_path / "out", "cpu", wanted=("other_encoder",)) == {}
    recipes, lacking = standard_detectors(features, HEAD)
    assert "another frozen encoder" in lacking["other_mlp"] and "doubt" in lacking


def test_another_architecture_of_the_same_name_is_run_again(tmp_path, monkeypatch, trained):
    """The key of a run holds an architecture's numbers, not its name."""

    def run():
        recipes = {"item": item("cosines", HEAD), "text": control("text_only", head=HEAD)}
        train_on_test_on(FEATURES, recipes, (0,), train_generators=["gan"], n_boot=0, out=tmp_path)
        return len(trained)

    assert run() == run() == 2
    wider = replace(head.ARCHITECTURES["itemkit"], hidden=(48, 8))
    monkeypatch.setitem(head.ARCHITECTURES, "itemkit", wider)
    assert run() == 4


class Broken(Recorder):
    def decision_function(self, features):
        raise {"flow": RuntimeError("out of\nmemory"), "gan": InputError("no")}[self.name]

    def fit(self, train, val):
        self.name = next(name for name in train.table["generator"] if name != "real")
        return self if self.name != "vae" else Recorder(0)


def test_one_failing_contender_costs_no_other(tmp_path):
    study = train_on_test_on(
        FEATURES, {"bad": Recipe(Broken), "good": RECORDER}, seeds=(0,), n_boot=0, out=tmp_path
    )
    assert study.detectors == ["good"] and len({run.train_generator for run in study.runs}) == 3
    assert set(study.options["failures"]) == {"bad"}
    with pytest.raises(InputError, match="no 'bad'.*It failed, trained on"):
        study.cells("bad", "auroc")
    with pytest.raises(InputError, match="no contender could be run; bad, trained on "):
        train_on_test_on(
            FEATURES, {"bad": Recipe(Broken)}, seeds=(0,), n_boot=0, train_generators=["gan", "flow"]
        )


def test_who_learns_from_reals_alone_is_fitted_once_for_all_training_sets(monkeypatch):
    """The same reals train in every set; another fit could only give the same scores."""
    fitted = []
    learn = NearestReals._learn
    monkeypatch.setattr(
        NearestReals, "_learn", lambda self, real: fitted.append(len(real)) or learn(self, real)
    )
    recipes = {"novel": control("novelty_image_knn"), "cosine": control("cosine_mean_local"),
               "linear": control("image_linear")}  # fmt: skip
    assert [recipe.reals_only for recipe in recipes.values()] == [True, True, False]
    study = train_on_test_on(FEATURES, recipes, (0, 1), n_boot=0)
    assert fitted == [160, 160]  # one for each seed
    of = {(run.detector, run.train_generator, run.seed): run for run in study.runs}
    one, two = of["novel", "gan", 1], of["novel", "vae", 1]
    assert one.test_scores == two.test_scores and one.val_rows != two.val_rows
    assert of["linear", "gan", 1].test_scores != of["linear", "vae", 1].test_scores
    train = FEATURES.split("train")
    reals = train.select(train.labels == 0)
    drawn = reals.select(np.sort(np.random.default_rng([1, 0]).permutation(200)[:160]))
    by_hand = control("novelty_image_knn").build(1).fit(drawn)
    val = FEATURES.select(one.val_rows)
    np.testing.assert_allclose(one.val_scores, by_hand.decision_function(val), rtol=1e-5)


def test_a_slow_contender_has_fewer_seeds_and_no_family_left_out():
    recipes = {"slow": replace(control("image_linear"), slow=True), "linear": control("image_linear")}
    study = train_on_test_on(FEATURES, recipes, (0, 1, 2), n_boot=200, leave_family_out=True)
    sets = {(run.detector, run.train_generator, run.seed) for run in study.runs}
    one, left = ("gan", "flow", "vae"), ("all but gan", "all but flow", "all but vae")
    assert sets == {*product(["linear"], one, range(3)), *product(["linear"], left, range(2)),
                    *product(["slow"], one, range(2))}  # fmt: skip
    assert study.options["notes"] == [
        "Trained on all families but one: 2 seeds.",
        "image only, linear: 2 seeds, and no family left out, because it takes long."]  # fmt: skip
    # compared are the runs that both have: they are the same ones
    pair = study.compare("linear", training=ONE)
    assert pair["difference"].item() == pair["low"].item() == pair["high"].item() == 0
    assert study.compare("linear", training=SEVERAL).empty


def test_two_processes_give_the_scores_of_one():
    recipes = {"image": control("image_linear"), "bad": Recipe(Broken)}
    one, two = (train_on_test_on(FEATURES, recipes, (0, 1), n_boot=60, jobs=jobs) for jobs in (1, 2))
    pd.testing.assert_frame_equal(one.table, two.table)
    assert set(one.options["failures"]) == set(two.options["failures"]) == {"bad"}


def test_functions_without_a_description_are_not_reused(tmp_path, trained):
    for _ in range(2):
        train_on_test_on(FEATURES, {"r": RECORDER}, (0,), train_generators=["gan"], n_boot=0, out=tmp_path)
    assert len(trained) == 2


def test_few_images_withhold_the_threshold_and_nothing_else():
    few = make_features(60, 20, generators=("gan", "flow"))
    study = train_on_test_on(few, {"r": RECORDER}, seeds=(0, 1), n_boot=20)
    value = study.table.groupby("metric")["value"]
    assert value.count()[["accuracy_real", "accuracy_fake", "balanced_accuracy"]].eq(0).all()
    assert value.count()[["auroc", "ap", "ece", "tpr_at_fpr05"]].eq(8).all()
    assert (
        len(study.options["notes"]) == 1
        and "needs at least 19 real validation images" in study.options["notes"][0]
    )
    cells = study.unseen("r", "balanced_accuracy")
    mean = study.mean(cells)
    assert np.isnan([mean["value"], mean["low"]]).all() and study.worst(cells).empty


def test_generators_too_small_to_train_on_are_still_tested():
    rows = np.flatnonzero((FEATURES.table["generator"] == "vae") & (FEATURES.table["split"] != "test"))
    small = FEATURES.select(np.setdiff1d(np.arange(len(FEATURES)), rows[1:]))
    study = train_on_test_on(small, {"r": RECORDER}, seeds=(0,), n_boot=0)
    assert {run.train_generator for run in study.runs} == {"gan", "flow"}
    assert set(study.table["test_generator"]) == {"gan", "flow", "vae"}
    assert len(study.options["notes"]) == 1 and study.options["notes"][0].startswith(
        "Nothing is trained on vae: "
    )
    one = train_on_test_on(FEATURES.with_generators(["gan"]), {"r": RECORDER}, seeds=(0,), n_boot=0)
    assert one.table["seen"].all()


def test_errors():
    one = {"r": RECORDER}
    with pytest.raises(
        InputError,
        match="0 images of 'gna' in the split 'train'.*generators: gan, flow, vae. Did you mean 'gan'",
    ):
        train_on_test_on(FEATURES, one, train_generators=["gna"])
    with pytest.raises(InputError, match="unknown 'oracle'; thresholds: fpr, best; metrics: ap, auroc"):
        train_on_test_on(FEATURES, one, threshold="oracle")
    with pytest.raises(InputError, match="0 contenders and 5 seeds"):
        train_on_test_on(FEATURES, {})
    table = FEATURES.table.copy()
    table.loc[:3, "split"] = None
    with pytest.raises(InputError, match="4 of 760 images lack a label or a split"):
        train_on_test_on(replace(FEATURES, table=table), one)
    with pytest.raises(InputError, match="0 images of 'gan' in the split 'test'"):
        rows = (FEATURES.table["split"] != "test") | (FEATURES.table["label"] == 0)
        train_on_test_on(FEATURES.select(rows.to_numpy(bool)), one)
    with pytest.raises(InputError, match="0 images of 'real' in the split 'val'; 2 or more are needed"):
        train_on_test_on(FEATURES.select((FEATURES.table["split"] != "val").to_numpy(bool)), one)
    with pytest.raises(InputError, match="no image is fake"):
        train_on_test_on(FEATURES.select((FEATURES.table["label"] == 0).to_numpy(bool)), one)
