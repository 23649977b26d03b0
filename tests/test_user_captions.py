"""Captions that come with the images: cleaned before they are used, and none cut silently."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from itemkit.captions import CLEAN_VERSION, clean_caption
from itemkit.errors import InputError
from itemkit.extraction import POSTED, extract
from itemkit.models import Models
from itemkit.steps import Steps
from itemkit.store import load_features

from fakes import FakeEncoder, FakeLocaliser, FakeParser, fake_models, make_images

pytestmark = pytest.mark.filterwarnings("ignore:.*without features")

POST = "RT @joe: #GoldenHour at the sea \U0001f305 https://t.co/abc"


class ShortSighted(FakeEncoder):
    """Reads five words; says so, as open_clip encoders do."""

    context_length = 5

    def fingerprint(self) -> dict:
        return super().fingerprint() | {"context_length": self.context_length}


def readers(encoder=None) -> Models:
    return Models(encoder or FakeEncoder(), None, FakeParser(), FakeLocaliser())


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8))


def test_the_models_see_the_cleaned_caption():
    models = readers()
    features = Steps(models)([picture()], [POST])
    assert (
        features.table["caption"].tolist() == ["Golden Hour at the sea"] == models.encoder.texts_encoded[:1]
    )
    assert features.table["caption_source"].tolist() == ["user"]


def test_a_caption_of_emoji_only_is_an_error_not_an_empty_text():
    with pytest.raises(InputError, match="nothing that can be read is left of the caption '\U0001f600'"):
        Steps(fake_models())([picture()], ["\U0001f600"])


def test_the_rules_version_is_part_of_the_fingerprint_of_users_captions_only():
    models = fake_models()
    assert models.fingerprint("user")["caption_cleaning"] == CLEAN_VERSION
    assert "caption_cleaning" not in models.fingerprint("generate")


def test_the_manifest_keeps_what_was_posted(tmp_path):
    given = make_images(tmp_path / "images", 4).assign(caption=[POST, "a dog", None, "@joe \U0001f600"])
    options = {"captions": "user", "missing": "generate", "progress": False}
    extract(given, tmp_path / "out", fake_models(), **options)
    assert given["caption"][0] == POST, "the caller's table was changed"
    table = load_features(tmp_path / "out").table
    assert table["caption"][0] == "Golden Hour at the sea" and table["caption"][1] == "a dog"
    assert table["caption_source"].tolist() == ["user", "user", "generated", "generated"]
    assert table[POSTED].tolist() == [POST, None, None, "@joe \U0001f600"]
    assert extract(given, tmp_path / "out", fake_models(), **options).reused == 4
    extract(given[1:3], tmp_path / "b", fake_models(), **options)
    assert POSTED not in load_features(tmp_path / "b").table


@pytest.mark.parametrize(
    ("posted", "clean"),
    [
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("\"'hello'\"", "hello"),
        ("@a@b dog", "dog"),
        ("&amp;#64;joe a cat", "a cat"),
        ("a, , cat", "a, cat"),
    ],
)
def test_captions_that_needed_cleaning_twice(posted, clean):
    assert clean_caption(posted) == clean


def test_cleaning_twice_changes_nothing_and_ends():
    rng = np.random.default_rng(0)
    bits = [
        *"ab AB1#@&;.,!?_-~'\"«»“”‘’|·•–\n:/",
        "RT ",
        "\u200d",
        "\u200c",
        "\ufe0f",
        "\U0001f600",
        "\u0301",
        "\ud83d",
    ]
    bits += "&amp; &#64; &#xFDFA; ＆ ＠ @joe #GoldenDay_1 http://x.y t.co/ ´ e\u0301 ﬁ ①".split()
    for length in rng.integers(0, 15, 10_000):
        clean = clean_caption("".join(rng.choice(bits, length)))
        assert clean_caption(clean) == clean
    for long in ("&" + "amp;" * 20_000, "@a" * 20_000, "'" * 20_000, "#" * 20_000, ", " * 20_000):
        assert len(clean_caption(long)) <= 20_000


@pytest.mark.real
def test_cleaning_real_captions_twice_changes_nothing(real_dir):
    captions = pd.read_csv(real_dir / "index.csv")["caption"].dropna()
    clean = [clean_caption(text) for text in captions]
    assert clean == [clean_caption(text) for text in clean] and all(clean)


def test_the_captions_of_the_laboratory_are_clean():
    from minilab.grammar import random_caption
    from minilab.world import render_index

    rng = np.random.default_rng(0)
    facts = [render_index("models_val", i).scene.facts for i in range(20)]
    told_by_lab = [random_caption(f, rng) for f in facts for _ in range(20)]
    assert [clean_caption(text) for text in told_by_lab] == told_by_lab


def test_an_extraction_tells_what_it_cut_and_notes_it(tmp_path, capsys):
    captions = ["a red ball", "one two three four five six", "one two three four five", POST]
    manifest = make_images(tmp_path / "images", 4).assign(caption=captions)
    options = {"captions": "user", "batch_size": 2}
    report = extract(manifest, tmp_path / "out", readers(ShortSighted()), **options)
    line = "1 caption longer than the 5 tokens the encoder reads, and cut there for it (longest 6, "
    line += "first: 00001"
    assert line in capsys.readouterr().err and line in str(report)
    again = extract(manifest, tmp_path / "out", readers(ShortSighted()), **options)
    assert again.reused == 4 and line in capsys.readouterr().err  # a second run does not hush it up
    table = load_features(tmp_path / "out").table
    assert table["caption"].tolist() == [*captions[:3], "Golden Hour at the sea"]
    assert table[POSTED].tolist() == [None, None, None, POST]


def test_cut_captions_are_counted_for_the_rows_that_were_asked_for(tmp_path):
    captions = ["a red ball", "one two three four five", "one two three four five six", "a " * 9]
    manifest, out = make_images(tmp_path / "images", 4).assign(caption=captions), tmp_path / "out"
    for rows, cut in ((slice(4), 2), (slice(3, 4), 1), (slice(2), 0)):
        options = {"captions": "user", "progress": False}
        report = extract(manifest[rows], out, readers(ShortSighted()), **options)
        assert (f"{cut} caption" in str(report)) == bool(cut) == ("longer" in str(report))


def test_captions_of_which_nothing_is_left_count_as_missing(tmp_path):
    manifest = make_images(tmp_path / "images", 3).assign(caption=["a red ball", "\U0001f600", POST])
    with pytest.raises(InputError, match=r"1 of 3 images have no caption .*emoji only.* first: .*00001.png"):
        extract(manifest, tmp_path / "a", readers(), captions="user", progress=False)
    report = extract(manifest, tmp_path / "b", readers(), captions="user", missing="error", progress=False)
    assert (report.computed, report.errors) == (2, 1)
    assert pd.read_parquet(tmp_path / "b" / "errors.parquet")[["path", "stage"]].values.tolist() == [
        ["00001.png", "caption"]
    ]
    extract(manifest, tmp_path / "c", fake_models(), captions="user", missing="generate", progress=False)
    assert load_features(tmp_path / "c").table["caption_source"].tolist() == ["user", "generated", "user"]
