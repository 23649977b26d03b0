"""The evidence card: what stands on it, whatever the picture, the caption and the detector are."""

from __future__ import annotations

import base64
import html
import re
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from itemkit import card, plots
from itemkit.errors import InputError
from itemkit.workflow import CARDS, Verdict, Verdicts

NOISE = np.random.default_rng(0)


def thing(phrase: str, below: float | None = 0.1, adds: float = 1.0, **more: Any) -> dict[str, Any]:
    box = [1.0, 2.0, 30.0, 40.0]
    return {
        "phrase": phrase,
        "box": box,
        "found": True,
        "cosine": 0.5,
        "real_below": below,
        "adds": adds,
    } | more


def verdict(size: tuple[int, int] = (64, 48), n: int = 100, **given: Any) -> Verdict:
    known = {label: np.sort(NOISE.normal(mean, 2, n)) for label, mean in (("real", -3), ("fake", 3))}
    answer = {
        "path": "x.png", "image_id": "a" * 64, "verdict": "fake", "because": "1% look this fake",
        "p_fake": 0.98, "log_odds": 4.0, "caption": "a dog on a chair", "global_cosine": 0.5,
        "global_real_below": 0.2, "global_adds": 1.5, "objects": [thing("a dog", 0.0), thing("a chair", 0.9)],
        "itemkit": "1", "preset": "mini", "models": "0123456789abcdef", "note": "of rendered scenes only",
        "detector": SimpleNamespace(real_scores_=known["real"], fake_scores_=known["fake"]),
        "pixels": Image.fromarray(NOISE.integers(0, 255, (size[1], size[0], 3), np.uint8)),
    }  # fmt: skip
    return Verdict(**(answer | given))


def drawn(one: Verdict) -> Figure:
    with mpl.rc_context():
        plots.style()
        return card.draw(one)


def texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    ticks = [t for ax in figure.axes for t in ax.get_xticklabels()]  # also of ticks beyond the limits
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t not in ticks]


def words(one: Verdict) -> str:
    return " ".join(t.get_text() for t in texts(drawn(one)))


def test_a_card_says_what_was_found_and_why() -> None:
    said = words(verdict())
    for part in ("fake", "p(fake) 0.98", "look this fake", "this image", "unsure", "100 real validation"):
        assert all(word in said for word in part.split())
    assert "1 a dog 0 %" in said and "2 a chair 90 %" in said  # in the caption, with their numbers
    assert "whole image alone" in said and "+1.5" in said and "5 % of reals above" in said
    assert "preset mini, models 0123456789abcdef" in said and "rendered scenes only" in said
    assert "unlike" not in said and "unlike anything" in words(verdict(unlike=0.002))
    assert "with this very image" in words(verdict(seen="train"))
    assert "camera: X" in words(verdict(marks={"camera": "X"}))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (600, 1900), (4000, 250), (30, 480), (1024, 1024)])
def test_any_size_and_shape_fits_a_column_with_no_type_under_6_pt(size: tuple[int, int]) -> None:
    figure = drawn(verdict(size))
    assert figure.get_figwidth() == pytest.approx(plots.COLUMN) and figure.get_figheight() < 6
    frame = figure.bbox.padded(1)
    for text in texts(figure):
        assert text.get_fontsize() >= 6
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text.get_text()


@pytest.mark.filterwarnings("error", "ignore:Glyph")
@pytest.mark.parametrize(
    "given",
    [
        {"caption": "many: " + ", ".join(f"a thing {i}" for i in range(50)),
         "objects": [thing(f"a thing {i}", i / 50, (-1) ** i * i) for i in range(50)]},
        {"caption": "", "objects": []},
        {"caption": "very " * 500},
        {"caption": "x" * 3000, "objects": [thing("x" * 300)]},
        {"objects": [thing("a dog", None, found=False, box=[None] * 4)]},
        {"caption": "كلب أحمر يجري", "objects": [thing("كلب أحمر")]},
        {"caption": "一只红色的狗在草地上奔跑" * 9, "objects": [thing("红色的狗")]},
        {"verdict": "withheld", "n": 0},
        {"verdict": "withheld", "n": 3, "because": "it needs more images " * 30},
        {"log_odds": 4e4, "global_adds": -3e4},
        {"unlike": 0.001, "seen": "val", "marks": {f"mark {i}": "words " * 60 for i in range(9)}},
    ],
)  # fmt: skip
def test_nothing_breaks_it_nor_leaves_the_page(given: dict[str, Any]) -> None:
    one = verdict(**given)
    figure = drawn(one)
    frame = figure.bbox.padded(1)
    outside = [t.get_text() for t in texts(figure) if not frame.fully_contains(*t.get_window_extent().min)]
    assert outside == [] and figure.get_figheight() < 8
    assert Image.open(BytesIO(card.render(one))).width == pytest.approx(plots.COLUMN * plots.DPI, abs=2)


def test_of_many_objects_those_that_add_most_are_shown_and_the_rest_counted() -> None:
    many = verdict(objects=[thing(f"thing {i}", adds=float(i)) for i in range(20)])
    said = words(many)
    assert "1 thing 12" in said and "8 thing 19" in said and "and 12 more" in said and "thing 11" not in said


def test_dark_is_alarming_also_in_grey() -> None:
    grey = [
        np.dot(mpl.colors.to_rgb(card._shade(below)), (0.3, 0.59, 0.11)) for below in np.linspace(0, 1, 21)
    ]
    assert all(np.diff(grey) > 0) and grey[-1] - grey[0] > 0.6
    assert card._ink(card._shade(0)) == "white" and card._ink(card._shade(1)) == "black"


def test_the_zones_are_those_of_the_verdict() -> None:
    one = verdict(rates=(0.1, 0.05))
    judge = one.detector
    low, high = card._cuts(one)
    assert np.mean(judge.real_scores_ > high) <= 0.1 and np.mean(judge.fake_scores_ < low) <= 0.05
    assert card._cuts(verdict(n=3)) == []


def test_text_is_data() -> None:
    evil = "<script>alert(1)</script> $\\frac{1}{2}$ \x1b[31m & _a dog_"
    one = verdict(caption=evil, objects=[thing("$\\frac{1}{2}$")], marks={"parameters": evil}, path="<b>.png")
    shown = one._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown and "\x1b" not in shown
    assert html.escape("<script>alert(1)</script>") in shown
    said = words(one)
    assert "<script>" in said and r"\$\frac{1}{2}\$" in said and "\x1b" not in said


def test_a_notebook_shows_a_picture_and_words_for_who_does_not_see_it() -> None:
    shown = verdict()._repr_html_()
    alt, data = re.search(r'alt="([^"]*)" src="data:image/png;base64,([^"]+)"', shown).groups()  # type: ignore[union-attr]
    assert "Verdict fake, p(fake) 0.98; caption: a dog on a chair" in alt and "a dog (0 %)" in alt
    assert Image.open(BytesIO(base64.b64decode(data))).info["Description"] == html.unescape(alt)
    assert "verdict  fake, p(fake) 0.98" in shown


def test_of_several_a_notebook_shows_the_first_few_and_counts_the_others() -> None:
    several = Verdicts([Verdict("bad.png", "is damaged"), *[verdict()] * (CARDS + 6)])
    shown = several._repr_html_()
    assert shown.count("<img") == CARDS - 1 and "not judged: is damaged" in shown
    assert f"... and {len(several) - CARDS} more images" in shown
    assert "more" not in Verdicts(several[:2])._repr_html_()


def test_a_card_is_written_as_its_name_says(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    png, pdf = (verdict().card(tmp_path / "new" / f"card.{ending}") for ending in ("png", "PDF"))
    assert png.read_bytes().startswith(b"\x89PNG") and pdf.read_bytes().startswith(b"%PDF")
    assert mpl.rcParams == before  # the user's own figures look as they did
    with pytest.raises(InputError, match=r"a card is a \.png or a \.pdf, got 'card\.jpg'"):
        verdict().card(tmp_path / "card.jpg")


def test_a_file_that_has_changed_since_is_not_shown_for_the_one_that_was_judged(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="has changed since it was judged"):
        card.render(verdict(pixels=None, path=str(tmp_path / "x.png")))
