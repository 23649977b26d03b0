"""`itemkit run` on images of one's own: what concerns only the laboratory is left out, and said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from itemkit import presets
from itemkit import run as report

import fakes


@pytest.mark.parametrize("names", [("unknown",), ("gan", "flow")])
def test_own_images_leave_out_what_is_not_about_them(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: dict[str, dict] = {}
    monkeypatch.setattr(
        report.notebooks, "execute", lambda source, target, own: executed.update({source.stem: own})
    )
    stub = presets.Preset(
        name="stub", about="For these tests.", captioner=fakes.FakeCaptioner(), encoder=fakes.FakeEncoder(),
        parser=fakes.FakeParser(), localiser=fakes.FakeLocaliser(),
    )  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "stub", stub)
    table = fakes.make_images(tmp_path / "images", 160)
    pair = np.arange(160) // 2
    table["generator"] = np.where(table["label"] == 0, "real", np.array(names)[pair // 4 % len(names)])
    table["split"] = np.array(["train", "val", "val", "test"])[pair % 4]
    table.to_csv(tmp_path / "m.csv", index=False)
    text = report.run_all("stub", str(tmp_path / "m.csv"), tmp_path / "out", "cpu").read_text()
    expected = {"01_misalignment", "02_hierarchical_features", "04_umap", "05_robustness"}
    assert set(executed) == expected | ({"03_training"} if len(names) > 1 else set())
    assert all(Path(own["DATA"]).is_file() and own["PRESET"] == "stub" for own in executed.values())
    assert "- 00_the_mini_lab: left out, it is about the mini laboratory" in text
    assert ("second generator" in text) == (len(names) == 1)
