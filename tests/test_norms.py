"""The lengths of embeddings before normalisation: from the models through the store and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from itemkit import export, store
from itemkit.extraction import extract
from itemkit.features import IMAGE_NORMS, OBJECT_NORMS
from itemkit.presets import get_preset
from itemkit.steps import featurise
from itemkit.store import load_features

from fakes import Embedding, FakeEncoder, FakeLocaliser, Located, Models, fake_models, make_images

NORMS = (*IMAGE_NORMS, *OBJECT_NORMS)


@dataclass
class LongEmbedding(Embedding):
    norm: torch.Tensor | None = None


@dataclass
class LongLocated(Located):
    norm: torch.Tensor | None = None


class TellingEncoder(FakeEncoder):
    """Tells lengths: of an image 10 + its mean, of a text its number of letters."""

    def encode_images(self, pixels, patches=False):
        plain = super().encode_images(pixels, patches)
        return LongEmbedding(plain.pooled, plain.patches, 10 + pixels.mean(dim=(1, 2, 3)))

    def embed_texts(self, texts):
        return self.encode_texts(texts), torch.tensor([float(len(text)) for text in texts])


class TellingLocaliser(FakeLocaliser):
    """Twice the image's length."""

    def locate(self, images, embedding, phrase_emb, owner):
        plain = super().locate(images, embedding, phrase_emb, owner)
        return LongLocated(plain.boxes, plain.scores, plain.emb, 2 * embedding.norm[owner])


def telling():
    plain = fake_models()
    return Models(TellingEncoder(), plain.captioner, plain.parser, TellingLocaliser())


def without_norms(out):
    """Make a store look as if it had been written before there were lengths."""
    for path in store.shard_files(out):
        table = pq.read_table(path).drop_columns(list(IMAGE_NORMS))
        objects = table["objects"].combine_chunks()
        kept = ["phrase", *store.BOX_COLUMNS]
        struct = pa.StructArray.from_arrays([objects.values.field(name) for name in kept], kept)
        at = table.column_names.index("objects")
        pq.write_table(
            table.set_column(at, "objects", pa.ListArray.from_arrays(objects.offsets, struct)), path
        )


def test_lengths_come_back_from_the_store(tmp_path):
    manifest = make_images(tmp_path / "images", 20)
    extract(manifest, tmp_path / "out", telling(), batch_size=8, shard_size=8, progress=False)
    read = load_features(tmp_path / "out")
    direct = featurise([Image.open(path) for path in manifest["path"]], telling())
    for name in NORMS:
        assert getattr(read, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(read, name), getattr(direct, name))
    np.testing.assert_array_equal(read.caption_norm, [len(c) for c in read.table["caption"]])
    np.testing.assert_array_equal(read.phrase_norm, [len(p) for p in read.objects["phrase"]])
    np.testing.assert_array_equal(read.region_norm, 2 * read.image_norm[read.owner])
    few = load_features(tmp_path / "out", ["image_emb"])
    np.testing.assert_array_equal(few.image_norm, read.image_norm)
    assert len(few.region_norm) == 0


def test_lengths_follow_their_rows(tmp_path):
    read = featurise([Image.open(p) for p in make_images(tmp_path, 9)["path"]], telling())
    rows = np.array([7, 2, 5])
    part = read.select(rows)
    np.testing.assert_array_equal(part.image_norm, read.image_norm[rows])
    np.testing.assert_array_equal(part.phrase_norm, [len(p) for p in part.objects["phrase"]])
    both = store.concat_features([part, read])
    np.testing.assert_array_equal(both.phrase_norm, [len(p) for p in both.objects["phrase"]])
    half = store.concat_features([part, featurise([Image.open(tmp_path / "00000.png")], fake_models())])
    np.testing.assert_array_equal(np.isnan(half.image_norm), [False, False, False, True])


def test_models_that_tell_no_lengths_leave_none(tmp_path):
    manifest = make_images(tmp_path / "images", 5)
    assert featurise([Image.open(manifest["path"][0])], fake_models()).image_norm is None
    extract(manifest, tmp_path / "out", fake_models(), progress=False)
    read = load_features(tmp_path / "out")
    assert [getattr(read, name) for name in NORMS] == [None] * 4
    assert read.select(np.arange(3)).image_norm is None


def test_an_older_store_loads_and_goes_on(tmp_path):
    manifest = make_images(tmp_path / "images", 12)
    extract(manifest[:8], tmp_path / "out", telling(), progress=False)
    before = load_features(tmp_path / "out")
    without_norms(tmp_path / "out")
    old = load_features(tmp_path / "out")
    assert [getattr(old, name) for name in NORMS] == [None] * 4
    np.testing.assert_array_equal(old.region_emb, before.region_emb)
    assert list(old.objects["phrase"]) == list(before.objects["phrase"])
    report = extract(manifest, tmp_path / "out", telling(), progress=False)
    assert (report.reused, report.computed) == (8, 4)
    mixed = load_features(tmp_path / "out")
    np.testing.assert_array_equal(np.isnan(mixed.image_norm), [True] * 8 + [False] * 4)
    np.testing.assert_array_equal(np.isnan(mixed.phrase_norm), mixed.owner < 8)
    assert list(mixed.table.columns) == list(old.table.columns)


def test_export_keeps_lengths(tmp_path):
    read = featurise([Image.open(p) for p in make_images(tmp_path / "images", 4)["path"]], telling())
    back = export.import_numpy(export.export_numpy(read, tmp_path / "x"))
    for name in NORMS:
        np.testing.assert_array_equal(getattr(back, name), getattr(read, name))
    none = featurise([Image.open(tmp_path / "images" / "00000.png")], fake_models())
    assert export.import_numpy(export.export_numpy(none, tmp_path / "y")).image_norm is None


@pytest.mark.parametrize("localiser", ["whole", "grid", "dense"])
def test_the_encoder_tells_its_own_lengths(localiser):
    models = get_preset("mini", localiser=localiser).build("cpu")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(3)]
    found = featurise(images, models, ["a red ball and the sand", "a tree", "a blue ball"])
    pixels = torch.stack([models.encoder.preprocess(image) for image in images])
    with torch.no_grad():
        raw = models.encoder.model.encode_image(pixels).numpy()
        words = models.encoder.model.encode_text(models.encoder.tokenizer(list(found.objects["phrase"])))
    np.testing.assert_allclose(raw, found.image_emb * found.image_norm[:, None], atol=1e-5)
    np.testing.assert_allclose(words, found.phrase_emb * found.phrase_norm[:, None], atol=1e-5)
    if localiser == "whole":
        np.testing.assert_array_equal(found.region_norm, found.image_norm[found.owner])
    assert len(found.owner) and (found.region_norm > 0).all()
