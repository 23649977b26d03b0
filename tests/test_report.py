"""The report: one file that asks for nothing, escapes everything, and says what it cannot say."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from itemkit import report
from itemkit.detector import Detector
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.report import Section, write_report

import fakes
from synthetic import make_features

SECTIONS = [
    "What else tells the classes apart?", "Do generated images fit their captions less well?",
    "What is the detector worth?", "Which images are hardest?", "Which objects betray?",
    "What made the numbers", "Limits",
]  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser takes it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return "\n".join(filter(None, self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


pytestmark = pytest.mark.filterwarnings("ignore:.*trained or calibrated this detector")


@pytest.fixture(scope="module")
def detector() -> Detector:
    features = make_features(n_real=400, n_fake=200)
    made = Detector(head=MisalignmentMLP(members=1, max_epochs=15, device="cpu"))
    return made.fit(features.split("train"), features.split("val"))


def with_files(features: Features, folder: Path, side: int = 20) -> Features:
    """The same features of pictures that are there."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:04}.png" for i in range(len(features))]
    for i, path in enumerate(paths):
        path.write_bytes(fakes.png(i, (side, side)))
    return replace(features, table=features.table.assign(path=[str(path) for path in paths]))


def no_requests(page: Page) -> None:
    """Nothing is fetched, nothing runs, whatever a browser does with the tags."""
    policy = page.all("meta")[2]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    tags = {name for name, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        assert str(attrs.get("src", "data:image/")).startswith("data:image/")
        assert str(attrs.get("href", "#")).startswith(("#", "figures/"))
    assert "url(" not in page.source and "@import" not in page.source


def test_one_page_says_it_all(detector: Detector, tmp_path: Path) -> None:
    test = with_files(make_features(n_real=120, n_fake=80, seed=1), tmp_path / "images")
    test.table.loc[0, "label"] = pd.NA
    test.objects["phrase"] = np.where(test.owner % 2, "a red ball", "the Ball")
    more = [Section("Figures", ["Beside."], links=["figures/a b.png"])]
    sections = write_report(tmp_path / "new" / "r.html", test, detector, more=more, left_out=["left out: x"])
    assert [section.title for section in sections] == [*SECTIONS[:3], "Figures", *SECTIONS[3:]]
    page = Page(tmp_path / "new" / "r.html")
    no_requests(page)
    assert (
        page.all("html") == [{"lang": "en"}] and "viewport" in page.source and "@media print" in page.source
    )
    pictures = page.all("img")
    assert len(pictures) == 5 + 16 and all(picture["alt"] for picture in pictures)
    for line in ("280 images: 119 real, 160 fake of 2 generators", "left out: x", "gan", "flow",
                 "1 image without a label: how well they fit is shown, nothing more",
                 "small copies of 16 images are in this file"):  # fmt: skip
        assert line in page.text
    # the terminal is told the same
    text = "\n".join(line for section in sections for line in section.to_text())
    assert "whole image: AUROC" in text and "left out: x" in text and "\nball" in text.replace(" ", "")
    write_report(tmp_path / "again.html", test, detector, more=more, left_out=["left out: x"])
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "new" / "r.html").read_bytes()


@pytest.mark.filterwarnings("error:constrained_layout")
def test_text_of_data_is_text(detector: Detector, tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=http://x onerror=alert(1)>{{ 7 * 7 }}\u202egnp'
    test = make_features(n_real=40, n_fake=20, generators=("gan", evil), seed=1)
    caption = f"a ball and <b>a dog</b> {evil}"
    test = replace(test, table=test.table.assign(caption=caption, path=f"/home/anna/photos/{evil}.png"))
    test.objects["phrase"] = "<B>a dog</B>"
    write_report(tmp_path / "r.html", test, detector, left_out=[evil])
    page = Page(tmp_path / "r.html")
    no_requests(page)
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text  # to be read, not to run
    assert "\u202e" not in page.source and "\\u202e" in page.source
    marked = re.findall(r"<mark>(.+?)</mark>", page.source)
    assert set(marked) == {"&lt;b&gt;a dog&lt;/b&gt;"}
    assert "anna" not in page.source  # of a path no more than file and folder
    assert "the file can no longer be read" in page.text and "That cannot be told: none of the" in page.text


def test_pictures_are_bounded(detector: Detector, tmp_path: Path) -> None:
    test = make_features(n_real=8, n_fake=8, generators=("gan",), seed=1)
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    test.table["path"] = str(tmp_path / "large.png")
    write_report(tmp_path / "r.html", test, detector)
    page = Page(tmp_path / "r.html")
    cards = [picture for picture in page.all("img") if str(picture["src"]).startswith("data:image/jpeg")]
    assert len(cards) == 16 and max(len(str(card["src"])) for card in cards) < 80_000


@pytest.mark.parametrize("rows", ["real", "fake", "unlabelled", "none", "no objects", "three"])
def test_it_says_what_it_cannot_say(rows: str, detector: Detector, tmp_path: Path) -> None:
    every = make_features(n_real=30, n_fake=30, generators=("gan",), seed=1)
    y = every.labels
    kept = {"real": y == 0, "fake": y == 1, "none": y > 1, "three": np.arange(60) % 20 == 3}.get(rows, y >= 0)
    test = every.select(kept)
    if rows == "unlabelled":
        unknown = pd.array([pd.NA] * 60, dtype="Int8")
        test = replace(test, table=test.table.assign(label=unknown, generator=None))
    if rows == "no objects":
        nothing = np.zeros(0, int)
        parts = {"region_emb": every.region_emb[:0], "phrase_emb": every.phrase_emb[:0]}
        test = replace(every, owner=nothing, objects=every.objects.head(0), **parts)
    sections = write_report(tmp_path / "r.html", test, detector)
    page = Page(tmp_path / "r.html")
    no_requests(page)
    judged = rows not in ("none", "unlabelled")
    assert [section.title for section in sections] == [
        title for title in SECTIONS if judged or title not in SECTIONS[2:4]
    ]
    assert "That cannot be told" in page.text and "nan" not in page.text.lower()
    if rows == "three":
        assert sections[1].table is not None and sections[1].table["generator"].iloc[0] == "real"
    said = {
        "real": "Called fake", "fake": "needs real and fake images", "none": "There is no image to look at",
        "unlabelled": "60 images without a label",
        "no objects": "60 of 60 images whose captions name no object",
        "three": "no word of the captions names 10 objects or more of each class",
    }  # fmt: skip
    assert said[rows] in page.text


def test_many_generators_are_all_in_the_table(tmp_path: Path) -> None:
    names = tuple(f"generator {i}" for i in range(40))
    sections = write_report(tmp_path / "r.html", make_features(40, 6, names), None)
    table = sections[1].table
    assert table is not None and set(names) < set(table["generator"])
    assert Page(tmp_path / "r.html").source.count("data:image/png") == 2


def test_numbers_are_rounded_where_they_are_shown() -> None:
    values = [None, pd.NA, float("nan"), 3, np.int64(1200), 0.12345, 2.0, "a\x1b"]
    assert [report._shown(value) for value in values] == [
        "–",
        "–",
        "–",
        "3",
        "1,200",
        "0.123",
        "2.0",
        "a\\x1b",
    ]
