"""open_clip folders of every family, through the function a user calls, against open_clip's own path."""

from __future__ import annotations

import models  # first: it repairs the torchvision import

# isort: split

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from itemkit.encoder import Encoder, find_encoder, load_encoder, patch_tower, stack_pixels, text_tower
from itemkit.errors import InputError, ModelNotFound

TEXTS = ["a red ball on the grass", "a blue cup", "the dog and the green cube", "a blue cup"]


def pictures(count: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(60, 80), (48, 48), (90, 50), (20, 30), (64, 65)]
    return [Image.fromarray(rng.integers(0, 255, (*sizes[i % 5], 3), dtype=np.uint8)) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load_encoder(folder, device="cpu", precision="float32")


def test_equals_open_clip_itself(folder: Path, encoder: Encoder) -> None:
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}", device="cpu")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    theirs = torch.stack([preprocess(image) for image in pictures()])
    ours = stack_pixels(encoder.preprocess, pictures())
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        pooled = model.encode_image(theirs, normalize=True)
        texts = model.encode_text(tokenizer(TEXTS[:3]), normalize=True)
    # Not to the last bit: the weights lie elsewhere in memory, and a sum's order may depend on alignment.
    assert torch.allclose(encoder.encode_images(ours).pooled, pooled, atol=1e-6)
    assert torch.allclose(encoder.encode_texts(TEXTS[:3]), texts, atol=1e-6)
    assert (encoder.dim, encoder.context_length, encoder.image_size) == (128, 32, (48, 48))


@pytest.mark.parametrize(
    ("mode", "size"), [("squash", 48), ("shortest", 48), ("longest", 48), ("shortest", [40, 56])]
)
def test_pixels_are_normalised_on_the_device_to_the_same_numbers(
    folder: Path, tmp_path: Path, mode: str, size: object
) -> None:
    copied = shutil.copytree(folder, tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"resize_mode": mode, "fill_color": 9, "mean": [0.4, 0.5, 0.6]}
    config["model_cfg"]["vision_cfg"] |= {"image_size": size, "patch_size": 8}
    (copied / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.model.CLIP(**config["model_cfg"])
    save_file(model.state_dict(), copied / "open_clip_model.safetensors")
    encoder = load_encoder(copied, device="cpu", precision="float32")
    images = [*pictures(), Image.new("L", (9, 30), 70), Image.new("RGBA", (50, 50), (9, 90, 200, 99))]
    there = pickle.loads(pickle.dumps(encoder.resize))  # as a process that decodes has it
    arrays = np.stack([there(image) for image in images])
    assert arrays.dtype == np.uint8 and arrays.shape == (7, *encoder.image_size, 3)
    rows_first = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    floats = torch.stack([encoder.preprocess(image) for image in images])
    for small in (rows_first, rows_first.contiguous()):
        assert torch.equal(encoder.normalise(small), floats)
        assert torch.equal(encoder.encode_images(small).pooled, encoder.encode_images(floats).pooled)


def test_batch_size_changes_nothing(encoder: Encoder) -> None:
    pixels = torch.stack([encoder.preprocess(image) for image in pictures()])
    together = encoder.encode_images(pixels, patches=True)
    alone = [encoder.encode_images(p[None], patches=True) for p in pixels]
    assert torch.allclose(together.pooled, torch.cat([a.pooled for a in alone]), atol=2e-6)
    assert torch.allclose(together.patches, torch.cat([a.patches for a in alone]), atol=5e-6)


def test_patches_come_from_the_same_pass(encoder: Encoder) -> None:
    pixels = torch.stack([encoder.preprocess(image) for image in pictures(2)])
    both = encoder.encode_images(pixels, patches=True)
    assert torch.allclose(both.pooled, encoder.encode_images(pixels).pooled, atol=1e-6)
    visual = encoder.model.visual
    visual.output_tokens = True  # open_clip's own way to the tokens after the last layer norm
    _, tokens = visual(pixels)
    visual.output_tokens = False
    assert torch.allclose(both.patches, F.normalize(tokens @ visual.proj, dim=-1), atol=1e-6)
    assert encoder.patch_grid == (8, 8) and both.patches.shape == (2, 64, 128)
    assert torch.allclose(both.patches.norm(dim=-1), torch.ones(2, 64))


def test_results_can_take_part_in_training(encoder: Encoder) -> None:
    pooled = encoder.encode_images(torch.zeros(2, 3, 48, 48)).pooled
    weight = torch.ones(pooled.shape[1], requires_grad=True)
    (pooled * weight).sum().backward()
    assert weight.grad is not None


def watch(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Texts and positions of each pass of the text tower from now on."""
    seen: list[tuple[int, ...]] = []
    original = encoder.model.transformer.forward

    def forward(x, **mask):
        seen.append(tuple(x.shape[:2]))
        return original(x, **mask)

    monkeypatch.setattr(encoder.model.transformer, "forward", forward)
    return seen


def test_equal_texts_are_encoded_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(encoder, monkeypatch)
    rows = encoder.encode_texts(TEXTS)
    assert seen == [(3, 8)] and torch.equal(rows[1], rows[3]) and not torch.allclose(rows[0], rows[1])
    assert encoder.encode_texts([]).shape == (0, 128)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_text_costs_more_positions_than_it_has_tokens(
    folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(folder, device="cpu", precision=precision)
    texts = ["dog " * 40, *TEXTS, "dog " * 11, ""]
    whole = encoder.model.encode_text(encoder.tokenizer(texts))
    seen = watch(encoder, monkeypatch)
    found = encoder.encode_texts(texts)
    assert seen == [(4, 8), (1, 16), (1, 32)]  # of 32; the longest is cut by the tokenizer
    cosine = (found * F.normalize(whole.float(), dim=1)).sum(dim=1)
    assert cosine.min() > (1 - 1e-6 if precision == "float32" else 0.9999)


def test_the_mini_encoder_gives_the_same_numbers(repo: Path) -> None:
    encoder = load_encoder(repo / "data" / "mini" / "models" / "clip", device="cpu", precision="float32")
    texts = ["a red ball on the grass", "the dog", "a blue cup, left of a tree, on the beach", ""]
    with torch.no_grad():
        whole = encoder.model.encode_text(encoder.tokenizer(texts), normalize=True)
    assert torch.allclose(encoder.encode_texts(texts), whole, atol=1e-6)


TEXT = {"context_length": 20, "vocab_size": 60, "width": 32, "heads": 2, "layers": 3}
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
END = 50


def text_model(kind: str, **text: object) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "CoCa":
        return open_clip.CoCa(32, dict(TEXT, layers=1), TEXT | text, VISION | {"output_tokens": True})
    return getattr(open_clip.model, kind)(32, VISION, TEXT | text)


def hf_model(pooler: str, **config: object) -> torch.nn.Module:
    """An image tower with a text tower of transformers."""
    from open_clip.hf_model import HFTextEncoder
    from transformers import AutoConfig

    model = text_model("CustomTextCLIP")
    settings = AutoConfig.for_model(**config, vocab_size=60, max_position_embeddings=40, **models.SIZES)
    model.text = HFTextEncoder("", 32, settings, pooler, "linear")
    return model


TOWERS = {  # a model, and whether its texts are cut
    "argmax": (lambda: text_model("CLIP"), True),
    "eos": (lambda: text_model("CLIP", pool_type="eos", eos_id=END), True),
    "own text tower, argmax": (lambda: text_model("CustomTextCLIP"), True),
    "own text tower, eos": (lambda: text_model("CustomTextCLIP", pool_type="eos", eos_id=END), True),
    "last": (lambda: text_model("CLIP", pool_type="last"), False),
    "clipa": (lambda: text_model("CLIP", pool_type="last", no_causal_mask=True), False),
    "siglip": (lambda: text_model("CustomTextCLIP", pool_type="last", no_causal_mask=True), False),
    "a layer on top": (lambda: text_model("CLIP", proj_bias=True), True),
    "nothing on top": (lambda: text_model("CLIP", proj_type="none"), True),
    "both ways, eos": (lambda: text_model("CLIP", pool_type="eos", eos_id=END, no_causal_mask=True), False),
    "coca": (lambda: text_model("CoCa", embed_cls=True, output_tokens=True), False),
    "bert": (lambda: hf_model("mean_pooler", model_type="bert", pad_token_id=0), True),
    "roberta": (lambda: hf_model("cls_pooler", model_type="roberta", pad_token_id=0), True),
    "padded with another": (lambda: hf_model("mean_pooler", model_type="bert", pad_token_id=7), False),
}


@pytest.mark.parametrize("name", TOWERS)
def test_text_towers_are_cut_only_where_that_is_exact(name: str) -> None:
    make, cuts = TOWERS[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # at their initial scale, small towers map everything to nearly one point
        tokens = torch.randint(8, END, (6, 20))
        lengths = torch.tensor([2, 3, 7, 7, 12, 20])
        tokens[range(6), lengths - 1] = END  # greatest of all, too
        tokens[torch.arange(20) >= lengths[:, None]] = 0
        needed, embed = text_tower(model)
        assert needed(tokens).tolist() == (lengths.tolist() if cuts else [20] * 6)
        whole = F.normalize(model.encode_text(tokens), dim=1)
        for row, length in enumerate(lengths):
            alone = embed(tokens[row : row + 1, : length if cuts else 20])
            assert float((F.normalize(alone, dim=1) * whole[row]).sum()) > 1 - 1e-6
        assert float((whole[0] * whole[1]).sum()) < 0.999  # texts matter
        no_end = tokens.where(tokens != END, 9)  # nothing to read off: the rule of the model decides
        longest = int(needed(no_end).max())
        theirs = F.normalize(model.encode_text(no_end), dim=1)
        assert torch.allclose(F.normalize(embed(no_end[:, :longest]), dim=1), theirs, atol=1e-6)


def test_long_texts_are_counted_before_the_cut(encoder: Encoder) -> None:
    assert encoder.count_tokens(["a red ball", "", "dog " * 40]) == [5, 2, 42]
    cut = encoder.tokenizer(["dog " * 40])[0]
    assert (
        cut.shape == (32,) and cut[-1] == len(encoder.tokenizer.tokenizer) - 1
    )  # still ends with the end token


def test_clip_bpe_counts() -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    stub = Encoder.__new__(Encoder)
    stub.tokenizer = tokenizer
    text = "a photo of an astronaut"
    assert stub.count_tokens([text]) == [int((tokenizer([text]) != 0).sum())] == [7]


def test_fingerprint_follows_everything_that_changes_the_numbers(folder: Path, tmp_path: Path) -> None:
    def of(where: Path, precision: str = "float32") -> dict:
        return load_encoder(where, device="cpu", precision=precision).fingerprint()

    first = of(folder)
    assert json.loads(json.dumps(first)) == first == of(folder)
    assert of(shutil.copytree(folder, tmp_path / "a" / "clip")) == first  # the place does not matter
    low = load_encoder(folder, device="cpu", precision="bfloat16")
    assert low.fingerprint() == first | {"precision": "bfloat16"}
    assert low.logit_scale == load_encoder(folder, device="cpu", precision="float32").logit_scale != 14.25
    assert find_encoder(folder).fingerprint(precision="float32") == first
    other = models.write_tiny_clip(tmp_path / "b" / "clip", seed=1)
    assert of(other)["weights_sha256"] != first["weights_sha256"]
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = "shortest"
    moved = shutil.copytree(folder, tmp_path / "c" / "clip")
    (moved / "open_clip_config.json").write_text(json.dumps(config))
    assert of(moved)["preprocess"] != first["preprocess"]


def test_bfloat16_stays_close(folder: Path, encoder: Encoder) -> None:
    low = load_encoder(folder, device="cpu", precision="bfloat16")
    pixels = torch.stack([encoder.preprocess(image) for image in pictures()])
    cosine = (low.encode_images(pixels).pooled * encoder.encode_images(pixels).pooled).sum(dim=1)
    assert low.encode_images(pixels).pooled.dtype is torch.float32
    assert cosine.min() > 0.999


@pytest.mark.parametrize(
    ("mode", "size", "frame"),
    [
        ("squash", (96, 48), (0, 0, 96, 48)),
        ("shortest", (96, 48), (24, 0, 72, 48)),
        ("shortest", (30, 60), (0, 15, 30, 45)),
        ("longest", (96, 48), (0, -24, 96, 72)),
    ],
)
def test_frame(encoder: Encoder, mode: str, size: tuple[int, int], frame: tuple, monkeypatch) -> None:
    monkeypatch.setattr(encoder, "resize_mode", mode)
    assert encoder.frame(*size) == frame


# -- families ------------------------------------------------------------------------------------------------


def family(folder: Path, vision: dict, **top: object) -> Path:
    """A folder with another image tower."""
    folder.mkdir()
    tokenizer = models.word_tokenizer(models.WORDS, 32)
    config = models.tiny_clip_config(len(tokenizer), embed_dim=32, text_width=32, text_heads=2)
    config["text_cfg"] |= top.pop("text_cfg", {})  # type: ignore[operator]
    config |= top
    config["vision_cfg"] = {
        "image_size": 48,
        "patch_size": 12,
        "width": 64,
        "layers": 2,
        "head_width": 32,
    } | vision
    torch.manual_seed(0)
    kind = open_clip.model.CustomTextCLIP if config.pop("custom_text", False) else open_clip.model.CLIP
    model = kind(**config)
    if kind is open_clip.model.CustomTextCLIP:
        config["custom_text"] = True
    models.save_clip(folder, model, config, tokenizer)
    return folder


FAMILIES = {
    "clipa": ({"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, {}, (4, 4)),
    "siglip-like": (
        {"timm_model_name": "test_vit3", "image_size": 160, "timm_pool": "map", "timm_proj": "none"},
        {
            "custom_text": True,
            "embed_dim": 96,
            "init_logit_bias": -10,
            "text_cfg": {
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                "tokenizer_kwargs": {"clean": "canonicalize"},
            },
        },
        (10, 10),
    ),
    # the image towers of EVA02 and Perception Encoder models of open_clip, in the smallest true size
    "eva02": (
        {
            "timm_model_name": "eva02_tiny_patch14_224",
            "image_size": 224,
            "timm_pool": "token",
            "timm_proj": None,
        },
        {"custom_text": True},
        (16, 16),
    ),
    "pe": (
        {
            "timm_model_name": "vit_pe_core_tiny_patch16_384",
            "image_size": 384,
            "timm_pool": "map",
            "timm_proj": None,
        },
        {"custom_text": True},
        (24, 24),
    ),
    "eva-like": (
        {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": None},
        {"custom_text": True},
        (10, 10),
    ),
    "resnet": ({"layers": [1, 1, 1, 1], "width": 32, "image_size": 64, "patch_size": None}, {}, None),
    "convnext": (
        {"timm_model_name": "test_convnext", "image_size": 64, "timm_pool": "", "timm_proj": "linear"},
        {},
        None,
    ),
    "attentional pooling": ({"attentional_pool": True, "attn_pooler_heads": 2}, {}, None),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name: str, tmp_path: Path) -> None:
    vision, top, grid = FAMILIES[name]
    path = family(tmp_path / "model", vision, **top)
    encoder = load_encoder(path, device="cpu", precision="float32")
    pixels = torch.stack([encoder.preprocess(image) for image in pictures(2)])
    assert encoder.patch_grid == grid
    reference, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    theirs = json.loads(json.dumps(dict(reference.visual.preprocess_cfg)))
    assert encoder.fingerprint()["preprocess"] | {"size": theirs["size"]} == theirs
    tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
    texts = ["a red Ball", "A blue cup, on the grass!", "ball " * 99]
    with torch.no_grad():
        images = reference.eval().encode_image(
            torch.stack([transform(image) for image in pictures(2)]), normalize=True
        )
        words = reference.encode_text(tokenizer(texts), normalize=True)
    assert torch.allclose(encoder.encode_images(pixels).pooled, images, atol=1e-6)
    assert torch.allclose(encoder.encode_texts(texts), words, atol=1e-6)
    one_by_one = torch.cat([encoder.encode_images(pixels[i : i + 1]).pooled for i in range(2)])
    assert torch.allclose(one_by_one, images, atol=1e-5)
    assert encoder.count_tokens(texts)[2] > encoder.context_length  # so the cut can be reported
    if grid is None:
        assert encoder.encode_images(pixels).pooled.shape == (2, encoder.dim)
        with pytest.raises(
            InputError, match="'dense' is not available with it. Use localiser 'grid' or 'whole'"
        ):
            encoder.encode_images(pixels, patches=True)
    else:
        both = encoder.encode_images(pixels, patches=True)
        assert torch.allclose(both.pooled, encoder.encode_images(pixels).pooled, atol=1e-6)
        assert both.patches.shape == (2, grid[0] * grid[1], encoder.dim)
        assert torch.allclose(both.patches.norm(dim=-1), torch.ones(2, grid[0] * grid[1]), atol=1e-5)


def test_attention_pooling_of_one_patch() -> None:
    """SigLIP: an image of equal tokens pools to what each of its patches is mapped to."""
    visual = open_clip.timm_model.TimmModel(
        "test_vit3", embed_dim=96, image_size=160, pool="map", proj="none"
    ).eval()
    trunk = visual.trunk
    token = torch.randn(1, 1, trunk.embed_dim)
    trunk.forward_features = lambda pixels: token.expand(1, trunk.num_prefix_tokens + 100, -1)
    grid, run = patch_tower(visual)
    assert run is not None and grid == (10, 10)
    with torch.no_grad():
        pooled, patches = run(torch.zeros(1, 3, 160, 160))
    assert torch.allclose(patches[0], pooled.expand(100, -1), atol=1e-5)


# -- what is not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tag", "error", "message"),
    [
        ("ViT-L-14", None, InputError, "needs a tag that says which weights.*Known: openai, "),
        ("ViT-L14", "openai", InputError, "neither a folder nor known to open_clip. Did you mean 'ViT-L-14'"),
        ("ViT-L-14", "opennai", InputError, "that says which weights, not 'opennai'. Did you mean 'openai'"),
        ("./nowhere", None, ModelNotFound, "looked in nowhere: no such folder"),
        ("hf-hub:owner/name", None, ModelNotFound, "encoder 'hf-hub:owner/name' is not on this machine"),
        ("ViT-L-14", "/nowhere/weights.pt", ModelNotFound, "looked in /nowhere/weights.pt"),
    ],
)
def test_unknown_or_missing(model: str, tag: str | None, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load_encoder(model, tag)


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "hub"


def test_missing_weights_say_where_and_what_next(empty_hub: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        load_encoder("ViT-L-14", "openai")
    text = str(caught.value)
    assert text.startswith(
        "encoder 'ViT-L-14' (openai) from 'hf-hub:timm/vit_large_patch14_clip_224.openai' "
    )
    assert "is not on this machine (looked in ~/hub). " in text
    assert "`itemkit download`" in text


def test_cached_weights_are_found_with_the_activation_of_their_tag(empty_hub: Path) -> None:
    repo = empty_hub / "models--timm--vit_large_patch14_clip_224.openai"
    commit = "0123456789012345678901234567890123456789"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, snapshot / "open_clip_model.safetensors")
    source = find_encoder("ViT-L-14", "openai")
    # open_clip's "ViT-L-14" has plain GELU, OpenAI's weights were trained with QuickGELU; it only warns.
    assert source.quick_gelu and source.revision == commit and source.name == "ViT-L-14"
    assert source.weights[0].name == "open_clip_model.safetensors"
    assert source.preprocess["size"] == [224, 224] and source.preprocess["mean"][0] == pytest.approx(
        0.48145466
    )


def test_folder_without_configuration_or_weights(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "clip")
    (broken / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no weights"):
        load_encoder(broken)
    (broken / "open_clip_config.json").unlink()
    with pytest.raises(ModelNotFound, match="no open_clip_config.json"):
        load_encoder(broken)


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "clip")
    weights = load_file(broken / "open_clip_model.safetensors")
    weights.pop("visual.proj")
    save_file(weights, broken / "open_clip_model.safetensors")
    with pytest.raises(ModelNotFound, match='cannot be loaded: Error.* loading state_dict .*"visual.proj"'):
        load_encoder(broken)


def test_foreign_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "clip")
    config = json.loads((broken / "open_clip_config.json").read_text())
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    (broken / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFound, match="tokenizer has 49,408 entries and its text model 26"):
        load_encoder(broken)


@pytest.mark.slow
def test_true_size_vit_l_14(tmp_path: Path) -> None:
    """1.7 GB on disk: the encoder of the preset `paper`, random, through the same loader."""
    model = open_clip.create_model("ViT-L-14", force_quick_gelu=True)
    config = open_clip.get_model_config("ViT-L-14") | {"quick_gelu": True}
    body = {"model_cfg": config, "preprocess_cfg": {"mean": models.MEAN, "std": models.STD}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(body))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder = load_encoder(tmp_path, device="cpu")
    both = encoder.encode_images(torch.stack([encoder.preprocess(i) for i in pictures(2)]), patches=True)
    assert both.patches.shape == (2, 256, 768) and encoder.context_length == 77
    assert encoder.encode_texts(["a dog"]).shape == (1, 768)
