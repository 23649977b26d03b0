"""Captioners of four families in their true folder formats, against transformers' own path."""

from __future__ import annotations

import models  # first: it repairs the torchvision import

# isort: split

import json
import math
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from itemkit.captions import (
    Captioner,
    Decoding,
    _mean_until_end,
    clean_caption,
    load_captioner,
)
from itemkit.errors import InputError, ModelNotFound
from itemkit.models import find_folder

WRITERS = {
    "blip": models.write_tiny_blip,
    "vit-gpt2": models.write_tiny_vit_gpt2,
    "git": models.write_tiny_git,
    "blip2": models.write_tiny_blip2,
}


def pictures(count: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 255, (50 + 9 * i, 80, 3), dtype=np.uint8)) for i in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("captioners")
    return {name: write(root / name) for name, write in WRITERS.items()}


def load(folder: Path, **options: object) -> Captioner:
    return load_captioner(folder, device="cpu", precision="float32", **{"max_new_tokens": 8, **options})


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_equals_transformers_itself(folders: dict[str, Path], name: str, beams: int) -> None:
    ours = load(folders[name], num_beams=beams).caption(pictures())
    model = transformers.AutoModelForImageTextToText.from_pretrained(folders[name]).eval()
    images = transformers.AutoImageProcessor.from_pretrained(folders[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    with torch.no_grad():
        ids = model.generate(
            **images(pictures(), return_tensors="pt"), max_new_tokens=8, num_beams=beams, do_sample=False
        )
    theirs = [" ".join(line.split()) for line in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert [caption.text for caption in ours] == theirs
    assert len(set(theirs)) > 2  # the images matter
    assert all(math.isfinite(caption.logprob) and caption.logprob < 0 for caption in ours)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("beams", [1, 2])
def test_batch_size_and_order_change_nothing(folders: dict[str, Path], name: str, beams: int) -> None:
    images = pictures()
    whole = load(folders[name], num_beams=beams).caption(images)
    captioner = load(folders[name], num_beams=beams)
    captioner.batch_size = 2
    parts = captioner.caption(images[::-1])[::-1]
    assert [c.text for c in whole] == [c.text for c in parts]
    assert np.allclose([c.logprob for c in whole], [c.logprob for c in parts], atol=1e-5)


@pytest.mark.parametrize(("name", "prompt"), [*((name, "") for name in WRITERS), ("git", "a photo of")])
def test_images_prepared_elsewhere_get_the_same_captions(
    folders: dict[str, Path], name: str, prompt: str
) -> None:
    captioner = load(folders[name], prompt=prompt)
    there = pickle.loads(pickle.dumps(captioner.preprocess))  # as a process that decodes has it
    images = [Image.new("L", (30, 40), 90), *pictures()]
    prepared = [there(image) for image in images]
    assert all(len(x) == 1 and not x.is_cuda for one in prepared for x in one.values())
    captioner.batch_size = 4
    assert captioner.caption(prepared) == captioner.caption(images)
    assert captioner.caption([]) == []


def test_images_are_prepared_in_the_models_type(folders: dict[str, Path]) -> None:
    low = load_captioner(folders["git"], device="cpu", precision="bfloat16", prompt="a photo of")
    inputs = low.preprocess(*pictures(2))
    assert inputs["pixel_values"].dtype is torch.bfloat16 and inputs["input_ids"].dtype is torch.int64


@pytest.mark.parametrize("name", WRITERS)
def test_beams_keep_what_they_see_in_its_place(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    original = transformers.cache_utils.DynamicLayer.reorder_cache

    def reorder(layer, beams) -> None:
        moved.append(layer.keys.shape[2])
        original(layer, beams)

    monkeypatch.setattr(transformers.cache_utils.DynamicLayer, "reorder_cache", reorder)
    captioner = load(folders[name], num_beams=3)
    ours = captioner.caption(pictures(3))
    steps = len(moved) // 2  # two layers
    assert steps >= 7 and moved == [k for k in range(moved[0], moved[0] + steps) for _ in range(2)]
    inputs = captioner.preprocess(*pictures(3))
    with torch.no_grad():  # as transformers does it
        ids = captioner.model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False)
    texts = captioner.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [c.text for c in ours] == [" ".join(text.split()) for text in texts]


def test_the_tower_of_blip_attends_by_the_fused_kernel(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = load(folders["blip"])
    inputs = captioner.preprocess(*pictures())
    plain = transformers.BlipForConditionalGeneration.from_pretrained(folders["blip"]).eval()
    fused: list[tuple[int, ...]] = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v: fused.append(tuple(q.shape)) or original(q, k, v),
    )
    with torch.no_grad():
        theirs = plain.vision_model(**inputs).last_hidden_state
        assert not fused
        ours = captioner.model.vision_model(**inputs).last_hidden_state
    assert fused == [(5, 4, 65, 16)] * 2
    assert torch.allclose(ours, theirs, atol=2e-5) and theirs.std() > 0.5


def test_logprob_is_the_mean_over_the_tokens_up_to_the_end(folders: dict[str, Path]) -> None:
    captioner = load(folders["blip"], max_new_tokens=20)
    caption = captioner.caption(pictures(1))[0]
    pixels = captioner.preprocess(*pictures(1))
    with torch.no_grad():
        ids = captioner.model.generate(**pixels, max_new_tokens=20, do_sample=False)
        logits = captioner.model(**pixels, input_ids=ids).logits[0].log_softmax(dim=-1)
    end = captioner.tokenizer.sep_token_id
    new = ids[0, 1:].tolist()
    new = new[: new.index(end) + 1] if end in new else new
    expected = sum(float(logits[i, token]) for i, token in enumerate(new)) / len(new)
    assert caption.logprob == pytest.approx(expected, abs=1e-5)


def test_mean_until_end_by_hand() -> None:
    tokens = torch.tensor([[5, 9, 9, 0], [5, 6, 7, 8], [9, 0, 0, 0]])
    values = torch.tensor([[-1.0, -3.0, -100.0, -math.inf], [-1.0, -2.0, -3.0, -4.0], [-0.5, 0.0, 0.0, 0.0]])
    assert _mean_until_end(tokens, values, [9]).tolist() == [-2.0, -2.5, -0.5]
    assert _mean_until_end(tokens, values, [9, 6])[1] == -1.5


def test_length_is_lowered_to_the_decoders_positions(folders: dict[str, Path]) -> None:
    captioner = load(folders["blip"], max_new_tokens=500)
    assert captioner.decoding.max_new_tokens == 39
    captioner.caption(pictures(1))


def test_prompt_is_continued_and_not_repeated(folders: dict[str, Path]) -> None:
    plain, prompted = (
        load(folders["git"], prompt=p).caption(pictures(1))[0].text for p in ("", "a photo of")
    )
    assert plain != prompted and not prompted.startswith("a photo of a photo of")
    with pytest.raises(InputError, match="with the prompt 'a photo'|takes no prompt"):
        load(folders["vit-gpt2"], prompt="a photo").caption(pictures(1))


def test_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    first = load(folders["blip"]).fingerprint()
    assert json.loads(json.dumps(first)) == first == load(folders["blip"]).fingerprint()
    found = find_folder(folders["blip"], "captioner")
    assert first == found.fingerprint(precision="float32", decoding=asdict(Decoding(1, 0, 8)))
    assert load(folders["blip"], num_beams=2).fingerprint() != first
    other = models.write_tiny_blip(tmp_path / "blip", seed=3)
    assert load(other).fingerprint()["files_sha256"] != first["files_sha256"]


def test_loading_is_silent(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load(folders["vit-gpt2"]).caption(pictures(2))
    assert capfd.readouterr() == ("", "")


def test_a_hub_name_that_is_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelNotFound, match="captioner 'Salesforce/blip-image-captioning-base' is not on this"
    ):
        load_captioner("Salesforce/blip-image-captioning-base")


@pytest.mark.parametrize("options", [{"num_beams": 0}, {"min_new_tokens": 9}, {"max_new_tokens": 0}])
def test_bad_decoding(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="decoding options do not fit together"):
        Decoding(**{"max_new_tokens": 8, **options})


@pytest.mark.slow
def test_true_size_blip_large(tmp_path: Path) -> None:
    """1.9 GB on disk: the captioner of the preset `paper`, random, through the same loader."""
    tokenizer = models.word_tokenizer([f"word{i}" for i in range(30000)], 512)
    sizes = {"image_size": 384, "patch_size": 16, "width": 768, "layers": 12, "text_layers": 12, "heads": 12}
    config = models.tiny_blip_config(tokenizer, max_length=512, **sizes)
    large = {"hidden_size": 1024, "intermediate_size": 4096}
    large |= {"num_hidden_layers": 24, "num_attention_heads": 16}
    config = transformers.BlipConfig(
        text_config=config.text_config.to_dict() | {"encoder_hidden_size": 1024},
        vision_config=config.vision_config.to_dict() | large,
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    processor = transformers.BlipImageProcessor(size={"height": 384, "width": 384})
    transformers.BlipProcessor(processor, tokenizer).save_pretrained(tmp_path)
    options = {"num_beams": 3, "min_new_tokens": 5, "max_new_tokens": 7}
    captions = load_captioner(tmp_path, device="cpu", **options).caption(pictures(1))
    assert len(captions) == 1 and math.isfinite(captions[0].logprob)


# -- captions as people post them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("posted", "cleaned"),
    [
        ("A black dog and a spotted dog are fighting .", "A black dog and a spotted dog are fighting."),
        ('"A boy , a girl . "', "A boy, a girl."),
        ("RT @joe.b: Sunset at the sea https://t.co/abc", "Sunset at the sea"),
        ("#GoldenHour_2024 at #NYC!!!", "Golden Hour 2024 at NYC!"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("beach\U0001f305\U0001f3fdday ❤️ \U0001f1e9\U0001f1ea", "beach day"),
        ("family \U0001f468‍\U0001f469‍\U0001f467 time", "family time"),
        ("write to a.b@c.de", "write to a.b@c.de"),
        ("café au lait", "café au lait"),
        ("ｆａｎｃｙ", "fancy"),
        ("犬がいる", "犬がいる"),
        ("#नमस्ते दुनिया", "नमस्ते दुनिया"),
        ("می‌خواهم", "می‌خواهم"),
        ("line\none\ttwo", "line one two"),
        ("&lt;b&gt;Tom &amp;amp; Jerry&lt;/b&gt;", "Tom & Jerry"),
        ("&amp;lt;i&amp;gt;a dog&amp;lt;/i&amp;gt;", "a dog"),
        ("a dog<script>alert('a cat')</script> runs", "a dog runs"),
        ("<STYLE>p {color: red}</STYLE ><p>one</p><p>two</p>", "one two"),
        ("<!-- a cat --> a dog <br/>on grass", "a dog on grass"),
        ("<img alt='1 > 0' src=\"a.png\">a dog", "a dog"),
        ('a dog <a href="http://x.y">here</a>, <b>now</b>', "a dog here, now"),
        ('a dog <a href="x', "a dog"),
        ("Tom & jerry</b", "Tom & jerry"),
        ("＜b＞a dog＜/b＞", "a dog"),
        ("a < b, c > d and I <3 dogs", "a < b, c > d and I <3 dogs"),
        ("a dog\0on the\x1b grass\u200b", "a dog on the grass"),
        ("\U0001f600\U0001f600", ""),
        ("   ", ""),
    ],
)
def test_clean_caption(posted: str, cleaned: str) -> None:
    assert clean_caption(posted) == cleaned
    assert clean_caption(cleaned) == cleaned


@pytest.mark.parametrize(
    "bit", ["<", "<a", "<a '", '<a "', "<!--", "<script", "<script>", "&lt;", "&amp;", "<b>", "a "]
)
def test_the_longest_posts_are_bounded(bit: str) -> None:
    clean = clean_caption(bit * 100_000 + "a dog")
    assert len(clean) <= 4000 and clean_caption(clean) == clean
