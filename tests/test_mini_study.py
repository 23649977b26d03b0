"""The committed scores of the mini study are those of models and images, and docs say what they say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from itemkit import study, workflow
from itemkit.controls import CONTROLS
from itemkit.presets import mini_folder
from itemkit.protocols import get_protocol
from itemkit.results import ONE, SEVERAL, headline, read_scores
from itemkit.text import markdown_table

REPO = Path(__file__).resolve().parents[1]
SCORES = mini_folder() / "study.parquet"


@pytest.fixture(scope="module")
def studies():
    return read_scores(SCORES, study.HEADLINE)


def test_the_file_is_small_and_whole(studies) -> None:
    assert SCORES.stat().st_size < 6e6
    plan = get_protocol("mini")
    assert list(studies) == plan.conditions
    for part in studies.values():
        assert part.options["made_by"]["note"] and part.options["protocol"] == "mini"
        assert part.options["train_generators"][: len(plan.each)] == plan.each
        assert part.options["n_boot"] >= 2000 and part.options["families"] == plan.families
        assert set(part.images["path"].str.count("/")) == {0}  # no folder of anybody's machine
    first = studies[plan.conditions[0]]
    assert set(study.HEADLINE) <= set(first.detectors)
    assert len(first.unseen("item", "auroc", ONE)) and len(first.unseen("item", "auroc", SEVERAL))


def test_untrained_scores_are_those_of_the_models_and_images(studies, tmp_path: Path) -> None:
    """A few images once more, through captioner, localiser and encoder."""
    first = next(iter(studies.values()))
    run = next(run for run in first.runs if run.detector == "cosine_mean_local")
    stored = first.test.assign(score=run.test_scores).set_index("image_id")["score"]
    manifest = workflow.lab_manifest(tmp_path)
    some = manifest[manifest["split"] == "test"].groupby("generator").head(2)
    features = workflow.features("mini", some, tmp_path, "cpu", progress=False)
    untrained = CONTROLS["cosine_mean_local"].build(0).fit(features)
    now = untrained.decision_function(features)
    assert len(features) >= 10
    # kept with few digits
    np.testing.assert_allclose(now, stored[features.table["image_id"]], atol=0.02 * stored.std())


def rows(table: pd.DataFrame) -> list[str]:
    return markdown_table(table.assign(**{"if it won": study.won(table["detector"])}))


def test_docs_and_readme_show_what_the_file_says(studies) -> None:
    """docs/mini_study.md is what `itemkit study --from mini` writes; README has its first table."""
    table = rows(headline(studies, study.HEADLINE))
    page = (REPO / "docs" / "mini_study.md").read_text("utf-8")
    assert "\n".join(table) in page
    block = re.search(
        r"<!-- study -->\n(.*?)<!-- /study -->", (REPO / "README.md").read_text("utf-8"), re.DOTALL
    )
    if block is None:
        pytest.skip("README has no table between <!-- study --> and <!-- /study -->")
    assert [line for line in block[1].splitlines() if line.startswith("|")] == table
