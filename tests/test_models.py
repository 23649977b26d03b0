"""Model folders come from anywhere: whole or refused in one line, no code runs; and what a run is made of."""

from __future__ import annotations

import models as written  # first: it repairs the torchvision import

# isort: split

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from itemkit import models
from itemkit.captions import as_captions, load_captioner
from itemkit.encoder import find_encoder, load_encoder
from itemkit.errors import InputError, ModelNotFound
from itemkit.models import Models, differences, find_folder, tidy
from itemkit.objects import load_parser
from itemkit.presets import get_preset
from itemkit.regions import make_localiser

COMMIT = "0123456789012345678901234567890123456789"
NAME = "owner/name"
WRITERS = {
    "blip": written.write_tiny_blip, "vit-gpt2": written.write_tiny_vit_gpt2, "git": written.write_tiny_git,
    "blip2": written.write_tiny_blip2, "owlv2": written.write_tiny_owlv2,
    "grounding_dino": written.write_tiny_grounding_dino, "clip": written.write_tiny_clip,
    "parser": written.write_tiny_parser, "object_detector": written.write_tiny_object_detector,
}  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
# what no message of ours may pass on
ADVICE = re.compile(r"weights_only|trust_remote_code=|allow_pickle|\[y/N\]|Please pass|pip install")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind that is in order."""
    root = tmp_path_factory.mktemp("whole")
    return {kind: write(root / kind) for kind, write in WRITERS.items()}


@pytest.fixture
def copy(whole: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(whole[kind], tmp_path / kind)


def load(kind: str, folder: Path, whole: dict[str, Path]) -> object:
    """Load a folder as a user does."""
    if kind == "clip":
        return load_encoder(folder, device="cpu", precision="float32")
    if kind == "parser":
        return load_parser(folder)
    if kind in ("owlv2", "grounding_dino", "object_detector"):
        return make_localiser(kind, load_encoder(whole["clip"], device="cpu"), model=folder, device="cpu")
    return load_captioner(folder, "cpu", "float32", max_new_tokens=5)


def refused(kind: str, folder: Path, whole: dict[str, Path], message: str) -> None:
    with pytest.raises(ModelNotFound, match=message) as caught:
        load(kind, folder, whole)
    assert not ADVICE.search(str(caught.value)) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.remedy


def edit(file: Path, *path: str, value: object) -> None:
    """Set one key of nested JSON; the file may be new."""
    body = inner = json.loads(file.read_text()) if file.exists() else {}
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    file.write_text(json.dumps(body))


# -- a folder that lacks something ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind not in ("parser", "object_detector")])
def test_no_tokenizer_is_no_model(kind: str, whole, copy) -> None:
    """transformers invents a tokenizer of five words; every caption is then empty."""
    folder = copy(kind)
    vocabulary = (folder / "tokenizer.json").read_text()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(kind, folder, whole, "cannot be used: its tokenizer is missing .*Copy the whole model folder")
    body = json.loads(vocabulary)
    keep = (0, 1, 2, 3, 25, 100, 101, 102, 103)
    body["model"]["vocab"] = {word: i for word, i in body["model"]["vocab"].items() if i in keep}
    shutil.copyfile(whole[kind] / "tokenizer_config.json", folder / "tokenizer_config.json")
    (folder / "tokenizer.json").write_text(json.dumps(body))
    refused(kind, folder, whole, r"its tokenizer has \d+ entries and its text model [\d,]+|cannot be loaded")


def test_a_byte_pair_vocabulary_needs_its_merges(whole, copy) -> None:
    folder = copy("vit-gpt2")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    refused("vit-gpt2", folder, whole, "tokenizer is missing .*vocab.json and merges.txt")


@pytest.mark.parametrize(
    "kind", ["blip", "vit-gpt2", "git", "blip2", "owlv2", "grounding_dino", "object_detector"]
)
def test_an_image_size_is_not_guessed(kind: str, whole, copy) -> None:
    folder = copy(kind)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    refused(kind, folder, whole, "preprocessor_config.json is missing, so its image size would be guessed")


def test_an_encoder_whose_tokenizer_cannot_pad(whole, copy) -> None:
    folder = copy("clip")
    (folder / "tokenizer_config.json").unlink()
    refused("clip", folder, whole, "encoder .* cannot be loaded")


@pytest.mark.parametrize(
    "gone", ["tagger", "attribute_ruler", "tokenizer", "vocab", "vocab/lookups.bin", "meta.json"]
)
def test_a_parser_that_lacks_a_part(gone: str, whole, copy) -> None:
    folder = copy("parser")
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    refused("parser", folder, whole, "cannot be")


def test_missing_weights_are_never_random(whole, copy) -> None:
    folder = copy("blip")
    weights = load_file(folder / "model.safetensors")
    weights.pop("vision_model.post_layernorm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("blip", folder, whole, r"1 missing, .* e.g. 'vision_model.post_layernorm.weight'")


# -- the file that is loaded is the file that is hashed ------------------------------------------------------


def test_an_encoders_hash_follows_the_file_that_open_clip_takes(whole, copy) -> None:
    folder = copy("clip")
    tensors = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    save_file({"text_model.embeddings.x": torch.zeros(2)}, folder / "model.safetensors")  # of transformers

    def seen() -> tuple:
        encoder = load_encoder(folder, device="cpu", precision="float32")
        return encoder.fingerprint()["weights_sha256"], encoder.encode_texts(["a red ball"])

    first, words = seen()
    save_file({"text_model.embeddings.x": torch.ones(2)}, folder / "model.safetensors")
    assert seen()[0] == first
    noise = {k: v + torch.randn_like(v) if v.is_floating_point() else v for k, v in tensors.items()}
    torch.save(noise, folder / "open_clip_pytorch_model.bin")
    other, changed = seen()
    assert other != first and not torch.allclose(words, changed)
    save_file(tensors, folder / "aaa.safetensors")  # no name of open_clip's: it stands back
    assert seen()[0] == other
    save_file(tensors, folder / "open_clip_model.safetensors")
    assert seen()[0] == find_encoder(whole["clip"]).fingerprint(precision="float32")["weights_sha256"]


@pytest.fixture(scope="module")
def sharded(whole, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(whole["blip"], tmp_path_factory.mktemp("sharded") / "model")
    (folder / "model.safetensors").unlink()
    model = transformers.BlipForConditionalGeneration.from_pretrained(whole["blip"])
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    return folder


def test_of_several_formats_the_one_transformers_loads_is_hashed(whole, copy, sharded: Path) -> None:
    folder = copy("blip")

    def weights() -> list[str]:
        return [file.name for file in find_folder(folder, "captioner").weights]

    tensors = load_file(folder / "model.safetensors")
    torch.save({k: v * 0 for k, v in tensors.items()}, folder / "pytorch_model.bin")
    save_file(tensors, folder / "adapter_or_other.safetensors")
    assert weights() == ["model.safetensors"]
    text = load("blip", folder, whole).caption([Image.new("RGB", (48, 48), "red")])[0].text  # type: ignore[attr-defined]
    for file in sharded.glob("model*"):
        shutil.copyfile(file, folder / file.name)
    assert weights() == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert weights()[0] == "model.safetensors.index.json" and len(weights()) > 2
    again = load("blip", folder, whole).caption([Image.new("RGB", (48, 48), "red")])[0].text  # type: ignore[attr-defined]
    assert text == again  # the same tensors, not the zeros beside them
    for file in folder.glob("model-*"):
        file.unlink()
    refused("blip", folder, whole, "the weights are not whole, e.g. model-00001-of-.* is missing")
    (folder / "model.safetensors.index.json").unlink()
    assert weights() == ["pytorch_model.bin"]
    edit(folder / "config.json", "transformers_weights", value="adapter_or_other.safetensors")
    refused("blip", folder, whole, "'transformers_weights' in config.json leads to")


def test_an_index_names_files_of_its_folder_only(whole, copy) -> None:
    folder = copy("blip")
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    for listed in ({"a": "../model.safetensors"}, ["a"], {"a": 1}, 7):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        refused("blip", folder, whole, "does not list files of this folder|is not on this machine")


# -- files that are none -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("blip", "model.safetensors"), ("blip", "tokenizer.json"), ("blip", "config.json"),
        ("blip", "pytorch_model.bin"), ("owlv2", "config.json"), ("grounding_dino", "tokenizer.json"),
        ("clip", "open_clip_model.safetensors"), ("clip", "open_clip_config.json"),
        ("clip", "tokenizer.json"),
        ("clip", "open_clip_pytorch_model.bin"), ("parser", "tagger/model"), ("parser", "vocab/strings.json"),
    ],
)  # fmt: skip
def test_a_git_lfs_pointer_is_called_that(kind: str, name: str, whole, copy) -> None:
    folder = copy(kind)
    if name.endswith(".bin"):
        for file in folder.glob("*.safetensors"):
            file.unlink()
    (folder / name).write_text(POINTER)
    refused(kind, folder, whole, f"{Path(name).name} is a Git LFS pointer.*Run `git lfs pull`")


class Harmful:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch RAN",)


def script(file: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))


def zipped(file: Path) -> None:
    torch.save({"weight": Harmful()}, file)


def old(file: Path) -> None:
    torch.save({"weight": Harmful()}, file, _use_new_zipfile_serialization=False)


def page(file: Path) -> None:
    file.write_text("<!DOCTYPE html> Access denied")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (script, "is a TorchScript archive, which holds code.*Convert it once"),
        (zipped, "a pickle that holds more than tensors.*Convert it once, where you trust its source"),
        (old, "a pickle that holds more than tensors.*Convert it once, where you trust its source"),
        (page, "holds no weights, or only their beginning"),
    ],
)
@pytest.mark.parametrize("kind", ["blip", "clip", "owlv2", "object_detector"])
def test_weights_that_could_run_code(
    kind: str, write, message: str, whole, copy, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy(kind)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write(folder / ("open_clip_pytorch_model.bin" if kind == "clip" else "pytorch_model.bin"))
    refused(kind, folder, whole, message)
    assert not Path("RAN").exists()


def test_a_checkpoint_given_with_a_name(tmp_path: Path, whole) -> None:
    script(tmp_path / "ViT-B-32.pt")
    torch.save({"vision_model.embeddings.class_embedding": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "a.ckpt").write_text(POINTER)
    for name, message in (
        ("ViT-B-32.pt", "TorchScript archive"),
        ("pytorch_model.bin", "is in transformers' format.*name a model of open_clip"),
        ("a.ckpt", "Git LFS pointer"),
    ):
        with pytest.raises(ModelNotFound, match=message):
            load_encoder("ViT-B-32", str(tmp_path / name), "cpu")
    with pytest.raises(ModelNotFound, match="it has no open_clip_config.json.*not in transformers'"):
        load_encoder(whole["blip"])


@pytest.mark.parametrize("kind", ["blip", "clip"])
def test_safetensors_that_are_cut_off(kind: str, whole, copy) -> None:
    folder = copy(kind)
    file = next(folder.glob("*.safetensors"))
    whole_bytes = file.read_bytes()
    file.write_bytes(whole_bytes[:-7])
    refused(kind, folder, whole, r"is damaged \(.*not fully covered\)")
    for damaged in (b"", b"<html>" * 9, (2**60).to_bytes(8, "little") + b"{}", whole_bytes[:20] + b"\0" * 9):
        file.write_bytes(damaged)
        refused(kind, folder, whole, "is damaged")


# -- code in a folder ----------------------------------------------------------------------------------------

MAP = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"), "harm.X")
MAP |= {"AutoTokenizer": ["harm.X", "harm.X"], "AutoImageProcessor": "harm.X"}


@pytest.mark.parametrize(
    ("kind", "file", "path", "value"),
    [
        ("blip", "config.json", ["auto_map"], MAP),
        ("blip", "config.json", ["text_config", "auto_map"], MAP),
        ("blip", "processor_config.json", ["auto_map"], MAP),
        ("git", "preprocessor_config.json", ["auto_map"], MAP),
        ("vit-gpt2", "tokenizer_config.json", ["auto_map"], MAP),
        ("blip2", "generation_config.json", ["trust_remote_code"], True),
        ("grounding_dino", "tokenizer_config.json", ["auto_map"], MAP),
        ("owlv2", "config.json", ["vision_config", "_attn_implementation"], "somebody/kernel"),
        ("blip", "config.json", ["attn_implementation"], {"text_config": "kernels-community/flash"}),
        ("blip", "config.json", ["quantization_config"], {"quant_method": "fp8"}),
        ("clip", "tokenizer_config.json", ["auto_map"], MAP),
        (
            "clip",
            "open_clip_config.json",
            ["model_cfg", "text_cfg", "tokenizer_kwargs"],
            {"trust_remote_code": 1},
        ),
        ("clip", "open_clip_config.json", ["model_cfg", "text_cfg", "tokenizer_kwargs"], {"subfolder": "x"}),
        ("clip", "open_clip_config.json", ["model_cfg", "text_cfg", "hf_model_name"], "./clip"),
        ("clip", "open_clip_config.json", ["model_cfg", "text_cfg", "hf_model_name"], "owner/unknown"),
        ("clip", "open_clip_config.json", ["model_cfg", "vision_cfg", "timm_model_name"], "hf-hub:owner/x"),
        ("clip", "open_clip_config.json", ["model_cfg", "vision_cfg", "timm_model_name"], "local-dir:./clip"),
    ],
)
def test_no_code_of_a_folder_runs_and_nobody_is_asked(
    kind, file, path, value, whole, copy, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("somebody was asked"))
    folder = copy(kind)
    for name in ("harm.py", "__init__.py"):
        (folder / name).write_text("open('RAN', 'w')\nclass X: pass\n")
    load(kind, folder, whole)  # Python files that nothing names do no harm
    edit(folder / file, *path, value=value)
    refused(kind, folder, whole, " ")
    assert not Path("RAN").exists()


def test_code_on_a_way_that_nobody_thought_of(copy, tmp_path, monkeypatch) -> None:
    """Behind the checks stands a bar: transformers can neither import a folder's file nor ask."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("somebody was asked"))
    folder = copy("vit-gpt2")
    (folder / "harm.py").write_text("open('RAN', 'w')\nclass X: pass\n")
    edit(folder / "config.json", "auto_map", value=MAP)
    edit(folder / "config.json", "model_type", value="harm")
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(ValueError), models.from_disk_only():
            transformers.AutoConfig.from_pretrained(folder, **options)
    assert not Path("RAN").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("before_creation = null", 'before_creation = {"@callbacks": "harm"}'),
        (
            "after_creation = null",
            'after_creation = {"@callbacks":"spacy.copy_from_base_model.v1","vocab":"harm"}',
        ),
        ('factory = "tagger"', 'source = "harm"'),
        ('factory = "tagger"', 'factory = "llm"'),
        ('"spacy.Tagger.v2"', '"harm.Tagger.v1"'),
        ('"spacy.Tagger.v2"', '"PyTorchWrapper.v1"'),
        ('"spacy.Tokenizer.v1"', '"harm.v1"'),
        ('lang = "en"', 'lang = "..harm"'),
    ],
)
def test_a_pipeline_calls_spacys_own_functions_only(
    before: str, after: str, whole, copy, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "harm.py").write_text("open('RAN', 'w')\n")
    folder = copy("parser")
    config = (folder / "config.cfg").read_text()
    assert before in config
    (folder / "config.cfg").write_text(config.replace(before, after, 1))
    refused("parser", folder, whole, "config.cfg (runs|names)")
    assert not Path("RAN").exists()


TOKENIZER = '{"model_cfg": {"embed_dim": 1, "vision_cfg": {}, "text_cfg": {"tokenizer_kwargs": 7}}}'


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "{}", "{", '{"model_cfg": []}', TOKENIZER, '{"model_cfg": {"text_cfg": 1}}']
)
def test_settings_that_are_none(text: str, whole, copy) -> None:
    for kind, name in (
        ("clip", "open_clip_config.json"),
        ("blip", "config.json"),
        ("blip", "tokenizer_config.json"),
    ):
        folder = copy(kind)
        (folder / name).write_text(text)
        if (name, text) == ("tokenizer_config.json", "{}") or (kind == "blip" and "model_cfg" in text):
            text = "["
            (folder / name).write_text(text)
        refused(kind, folder, whole, "cannot be")
        shutil.rmtree(folder)


def test_our_own_mistakes_are_not_called_the_folders(whole) -> None:
    located = find_folder(whole["blip"], "captioner")
    with pytest.raises(TypeError), models.reading(located):
        models.tidy(None)  # type: ignore[arg-type]

    def library(error: Exception) -> None:
        raise error

    for error in (ValueError("Please set the option trust_remote_code=True"), KeyError("weights_only")):
        with pytest.raises(ModelNotFound, match="cannot be loaded: .*Error while its files were read"):
            with models.reading(located):
                library(error)
    with pytest.raises(torch.OutOfMemoryError), models.reading(located):
        library(torch.OutOfMemoryError())


# -- the hub's cache -----------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty snapshot in a hub's cache of its own, as `snapshot_download` lays it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return repo / "snapshots" / COMMIT


def fill(snapshot: Path, source: Path) -> None:
    """Link the files of a model folder into the snapshot, from the blobs, as the hub's library does."""
    blobs = snapshot.parents[1] / "blobs"
    for file in source.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / file.name, snapshot))


def test_a_cache_filled_by_a_choice_of_files_is_taken(snapshot: Path, whole) -> None:
    """`snapshot_download(name, allow_patterns=...)` leaves a list of all files and only some of them."""
    from huggingface_hub import _tree_cache, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fill(snapshot, whole["blip"])
    names = [*os.listdir(snapshot), "pytorch_model.bin", "README.md"]
    entries = {name: _tree_cache.TreeCacheEntry(size=1, blob_id="0" * 40) for name in names}
    _tree_cache.write_tree_cache(str(snapshot.parents[1]), COMMIT, entries)
    with pytest.raises(LocalEntryNotFoundError):  # the reason why it is not asked
        snapshot_download(NAME, local_files_only=True)
    located = find_folder(NAME, "captioner")
    assert (located.path, located.revision, located.name) == (snapshot, COMMIT, NAME)
    assert load_captioner(NAME, "cpu", max_new_tokens=3).fingerprint()["revision"] == COMMIT


@pytest.mark.parametrize(
    ("gone", "message"), [("config.json", "no config.json"), ("model.safetensors", "no weights")]
)
def test_an_interrupted_download_is_told(snapshot: Path, whole, gone: str, message: str) -> None:
    fill(snapshot, whole["blip"])
    (snapshot.parents[1] / "blobs" / gone).unlink()  # a link to nothing stays behind
    expected = rf"captioner 'owner/name' is not on this.*{message}.*itemkit download"
    with pytest.raises(ModelNotFound, match=expected):
        find_folder(NAME, "captioner")


def test_a_reference_without_files_is_told(snapshot: Path) -> None:
    snapshot.rmdir()
    with pytest.raises(ModelNotFound, match="captioner 'owner/name' is not on this machine"):
        find_folder(NAME, "captioner")
    with pytest.raises(ModelNotFound, match="encoder 'hf-hub:owner/name' is not on this machine"):
        find_encoder(f"hf-hub:{NAME}")


def test_an_encoder_of_the_hub_is_its_snapshot(snapshot: Path, whole) -> None:
    fill(snapshot, whole["clip"])
    encoder = load_encoder(f"hf-hub:{NAME}", device="cpu", precision="float32")
    assert encoder.fingerprint() == find_encoder(f"hf-hub:{NAME}").fingerprint(precision="float32")
    assert encoder.fingerprint()["revision"] == COMMIT and encoder.fingerprint()["name"] == f"hf-hub:{NAME}"


@pytest.mark.parametrize("name", ["owner", "a/b/c", "owner/with space", "nul\0byte/x"])
def test_odd_names_are_not_found_and_no_crash(snapshot: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match="captioner '.*' is not on this machine"):
        find_folder(name, "captioner")


# -- the models of a run -------------------------------------------------------------------------------------


def test_differences_by_hand() -> None:
    stored = {"encoder": {"name": "a", "precision": "auto"}, "captions": "user", "caption_cleaning": 2}
    wanted = {"encoder": {"name": "b", "precision": "float32"}, "captions": "generate", "parser": None}
    assert differences(stored, wanted) == [
        "caption_cleaning: 2 there, nothing here",
        "captions: 'user' there, 'generate' here",
        "encoder.name: 'a' there, 'b' here",
        "encoder.precision: 'auto' there, 'float32' here",
    ]
    assert differences(stored, wanted, ["captions", "precision"]) == ["encoder.name: 'a' there, 'b' here"]
    assert differences(stored, wanted, ["captions", "encoder"]) == differences(stored, stored) == []
    assert differences(stored, wanted, ["captions", "encoder.name", "encoder.precision"]) == []
    assert differences(None, {"a": 1}) == ["a: nothing there, 1 here"]


class Says:
    version = "2"

    def caption(self, images: list) -> list[str]:
        return [f"a picture of {image.width} pixels" for image in images]


class Halves:
    """Finds everything in the left half, but no dogs."""

    version = 1

    def boxes(self, image: Image.Image, phrases: list[str]) -> list:
        return [None if "dog" in p else (-5, 0, image.width / 2, image.height, 0.7) for p in phrases]


class Unsure(Halves):
    """Forgets the score."""

    def boxes(self, image: Image.Image, phrases: list[str]) -> list:
        return [(0, 0, 9, 9)] * len(phrases)


def test_parts_of_ones_own(whole) -> None:
    encoder = load_encoder(whole["clip"], device="cpu", precision="float32")
    run = Models(encoder, Says(), load_parser(whole["parser"]), Halves())
    image = Image.new("RGB", (40, 20))
    assert as_captions(run.captioner.caption([image]), 1)[0].text == "a picture of 40 pixels"
    embedding = encoder.encode_images(encoder.preprocess(image)[None])
    owner, phrases = torch.tensor([0, 0]), ["red ball", "dog"]
    found = run.localiser.locate([image], embedding, encoder.encode_texts(phrases), owner, phrases)
    assert found.boxes.tolist() == [[0, 0, 20, 20], [0, 0, 40, 20]]
    assert found.scores.tolist() == pytest.approx([0.7, 0]) and found.found.tolist() == [True, False]
    assert torch.allclose(found.emb[1], embedding.pooled[0])
    unsure = Models(encoder, Says(), load_parser(whole["parser"]), Unsure())
    with pytest.raises(InputError, match=r"Unsure.boxes\(\) returned \(0, 0, 9, 9\); expected .*score\)"):
        unsure.localiser.locate([image], embedding, encoder.encode_texts(phrases), owner, phrases)
    fingerprint = run.fingerprint("user")
    assert fingerprint["captioner"] == {"kind": "own", "class": f"{__name__}.Says", "version": "2"}
    assert fingerprint["localiser"]["class"] == f"{__name__}.Halves" and fingerprint["caption_cleaning"]
    assert json.loads(json.dumps(fingerprint)) == fingerprint


def test_what_a_part_lacks_is_said_at_once(whole) -> None:
    encoder = load_encoder(whole["clip"], device="cpu")
    with pytest.raises(InputError, match=r"the captioner Halves has no method caption\(\)"):
        Models(encoder, Halves())
    with pytest.raises(InputError, match=r"the localiser Says has no method locate\(\)"):
        Models(encoder, None, None, Says())

    class Nameless:
        caption = Says.caption

    with pytest.raises(InputError, match=r"captioner Nameless does not say .*add `version = '1'`"):
        Models(encoder, Nameless()).fingerprint()


@pytest.mark.parametrize("made", ["one text", [], ["a", "b"], [None], None, [3]])
def test_captions_that_are_none(made: object) -> None:
    with pytest.raises(InputError, match="the captioner returned .*expected a"):
        as_captions(made, 1)


def test_a_part_named_by_module_and_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        "class Mine:",
        "    version = '1'",
        "    def caption(self, images):",
        "        return ['x'] * len(images)",
    ]
    lines += ["    def boxes(self, image, phrases):", "        return [None] * len(phrases)"]
    lines += ["class Nameless:", "    caption = Mine.caption"]
    (tmp_path / "needy_parts.py").write_text("import not_there")
    (tmp_path / "my_parts.py").write_text("\n".join(lines))
    preset = get_preset("mini", captioner="my_parts:Mine", localiser="my_parts:Mine")
    assert (
        preset.given("captioner") is preset.given("captioner")
        and preset.record()["captioner"] == "my_parts:Mine"
    )
    made = preset.fingerprint()
    assert made["captioner"]["class"] == made["localiser"]["class"] == "my_parts.Mine"
    assert made == preset.build("cpu").fingerprint()
    for text, message in (
        ("my_parts:Mein", "module 'my_parts' has no attribute 'Mein'"),
        ("no_parts:Mine", "neither in this folder nor installed: No module named 'no_parts'"),
        ("my_parts.py:Mine", "neither in this folder nor installed: .*; write it without .py"),
        ("needy_parts:Mine", "cannot be made: ModuleNotFoundError: No module named 'not_there'"),
        ("my_parts:Nameless", "captioner Nameless does not say which answers it gives"),
    ):
        with pytest.raises(InputError, match=message):
            get_preset("mini", captioner=text).fingerprint()


def test_a_fingerprint_loads_nothing_and_is_that_of_the_loaded_models(repo: Path) -> None:
    code = (
        "import sys; from itemkit.presets import get_preset; print(get_preset('mini').fingerprint());"
        "print([m for m in ('torch', 'transformers', 'open_clip', 'spacy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo)
    made, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    built = get_preset("mini").build("cpu")
    assert made == str(built.fingerprint())
    encoder = built.fingerprint()["encoder"]
    assert (encoder["dim"], encoder["context_length"]) == (built.encoder.dim, built.encoder.context_length)
    assert encoder["image_size"] == list(built.encoder.image_size)


def test_home_is_written_as_a_tilde_by_whole_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for home, path, expected in (
        ("/home/ann", "/home/ann/models", "~/models"),
        ("/home/ann", "/home/anna/models", "/home/anna/models"),
        ("/home/ann", "/home/ann", "~"),
        ("/", "/data/models", "/data/models"),
        ("/home/ann/", "models", "models"),
    ):
        monkeypatch.setenv("HOME", home)
        assert tidy(path) == expected
