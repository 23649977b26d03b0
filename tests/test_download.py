"""`itemkit download`: against a shelf of repositories in true formats, and against no network at all."""

from __future__ import annotations

import itemkit  # noqa: F401  (first: it repairs the torchvision import)

# isort: split

import json
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import open_clip
import pytest
import spacy
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from PIL import Image
from safetensors.torch import load_file

from itemkit import cli, download, presets
from itemkit.encoder import load_encoder
from itemkit.errors import InputError, ModelNotFound, StoreError
from itemkit.presets import Preset, get_preset

import models

COMMIT = "0123456789" * 4
TINY = "tiny-ViT"
TINY_TAG = {"hf_hub": "tiny/clip/", "quick_gelu": True, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4),
            "interpolation": "bicubic", "resize_mode": "shortest"}  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories in true formats, with what real ones hold besides: code, other weights, a card."""
    root = tmp_path_factory.mktemp("shelf") / "tiny"
    sizes = {"width": 32, "layers": 1, "text_layers": 1, "head_width": 16, "embed_dim": 16}
    models.write_tiny_clip(root / "clip", **sizes)
    models.write_tiny_blip(root / "blip", width=32, layers=1, text_layers=1, heads=2)
    models.write_tiny_grounding_dino(root / "dino")
    models.write_tiny_object_detector(root / "yolos", "yolos")
    for repo in ("clip", "blip", "dino", "yolos"):
        (root / repo / "README.md").write_text("a card")
        (root / repo / "modeling_own.py").write_text("raise SystemExit('code was run')")
        (root / repo / "onnx").mkdir()
        (root / repo / "onnx" / "model.safetensors").write_bytes(b"of another program")
    (root / "blip" / "tf_model.h5").write_bytes(b"of another library")
    (root / "blip" / "pytorch_model.bin").write_bytes(b"an old copy")
    return root.parent


class Hub:
    """Stands in for the hub's ``snapshot_download`` with its patterns and its cache."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache, self.fetched = root, cache, []

    def note_absent(self, repo: str, name: str) -> None:
        """As `hf_hub_download` does in its cache for a file that a repository lacks."""
        note = self.cache / f"models--{repo.replace('/', '--')}" / ".no_exist" / COMMIT / name
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()

    def repo_info(self, repo: str, timeout: float) -> Any:
        validate_repo_id(repo)
        folder = self.root / repo
        if not folder.is_dir():
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])

    def __call__(self, repo: str, local_dir: Path | None, **patterns: Any) -> Any:
        folder, place = self.root / repo, self.cache / f"models--{repo.replace('/', '--')}"
        there = [file.rfilename for file in self.repo_info(repo, 1).siblings]
        names = list(filter_repo_objects(there, **patterns))
        target = local_dir or place / "snapshots" / COMMIT
        (target / ".cache" if local_dir else place / "refs").mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        if local_dir is None:
            (place / "refs" / "main").write_text(COMMIT)
        for name in names:
            if (target / name).is_file() and (target / name).read_bytes() == (folder / name).read_bytes():
                continue
            self.fetched.append(f"{repo}/{name}")
            shutil.copyfile(folder / name, target / name)
        return str(target)


@pytest.fixture
def hub(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, an empty cache, an open_clip model whose weights lie there, and spaCy's own steps recorded."""
    hub = Hub(shelf, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.note_absent)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    body = json.loads((shelf / "tiny" / "clip" / "open_clip_config.json").read_text())
    body["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "tiny/clip"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, body["model_cfg"])
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, {"made_up": TINY_TAG})

    def install(what: str, model: str, target: Path | None) -> None:
        assert target is not None
        """What pip leaves behind: a package with code, around the pipeline's data."""
        hub.fetched.append(model)
        inner = target / model / f"{model}-3.8.0"
        inner.parent.mkdir(parents=True)
        (inner.parent / "__init__.py").write_text("")
        nlp = spacy.blank("en")
        nlp.meta["name"], nlp.meta["version"] = "made_up_sm", "3.8.0"
        nlp.to_disk(inner)

    monkeypatch.setattr(download, "_install_parser", install)
    return hub


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Preset:
    options = {
        "captioner": "tiny/blip",
        "encoder": TINY,
        "encoder_pretrained": "made_up",
        "parser": "en_made_up_sm",
    }
    preset = Preset(
        name="tiny",
        about="For this test.",
        localiser="grounding_dino",
        localiser_options={"model": "tiny/dino"},
        **options,
    )
    monkeypatch.setitem(presets.PRESETS, "tiny", preset)
    return preset


# ------------------------------------------------------------------------------------------------- a folder


def test_a_folder_holds_everything_and_works_without_a_network(
    hub: Hub, tiny: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to, lines = tmp_path / "models", []
    revisions = download.download(tiny, to, report=lines.append)
    assert {p.name for p in to.iterdir()} == set(presets.FOLDERS.values())
    assert revisions == {"captioner": COMMIT, "parser": "3.8.0", "localiser": COMMIT, "encoder": COMMIT}
    assert [line.split()[0] for line in lines[::2]] == list(revisions)
    # no code, no card, no weights but safetensors
    names = [p.relative_to(to).as_posix() for p in to.rglob("*") if p.is_file()]
    assert not [n for n in names if n.endswith((".py", ".md", ".h5")) or "onnx" in n]
    assert [n for n in names if n.endswith(".bin")] == ["parser/vocab/lookups.bin"]  # spaCy's own, no pickle
    assert {"captioner/model.safetensors", "encoder/open_clip_model.safetensors"} <= set(names)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    found = get_preset("tiny", to).find()
    assert {p: place.path for p, place in found.items()} == {p: to / n for p, n in presets.FOLDERS.items()}
    loaded = get_preset("tiny", to, parser=None).build("cpu")
    assert loaded.captioner.caption([Image.new("RGB", (64, 48), "red")])[0].text is not None
    # the tag's preprocessing and activation travel with the folder
    assert loaded.encoder.fingerprint()["preprocess"]["mean"] == [0.4, 0.5, 0.6]
    config = json.loads((to / "encoder" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is True
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    download.download(get_preset("tiny", captioner=None, parser=None, localiser="whole"))
    by_name = load_encoder(TINY, "made_up", "cpu", "float32")
    texts = ["a red ball", "a blue cup on the grass"]
    by_folder = load_encoder(to / "encoder", device="cpu", precision="float32")
    assert torch.equal(by_name.encode_texts(texts), by_folder.encode_texts(texts))
    pixels = torch.linspace(-1, 1, 3 * 48 * 48).view(1, 3, 48, 48)
    assert torch.equal(by_name.encode_images(pixels).pooled, by_folder.encode_images(pixels).pooled)


def test_an_object_detector_that_reads_no_words_is_fetched_too(
    hub: Hub, tiny: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"captioner": None, "parser": None}
    preset = get_preset("tiny", localiser="object_detector:tiny/yolos", **others)
    assert download.download(preset, tmp_path / "models")["localiser"] == COMMIT
    names = {path.name for path in (tmp_path / "models" / "detector").iterdir()} - {".cache"}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    there = get_preset("tiny", tmp_path / "models", localiser="object_detector", **others)
    assert there.build("cpu").localiser.fingerprint()["kind"] == "object_detector"


def test_a_second_run_fetches_only_what_is_damaged(hub: Hub, tiny: Preset, tmp_path: Path) -> None:
    to = tmp_path / "models"
    first = download.download(tiny, to)
    hub.fetched.clear()
    weights = to / "captioner" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert download.download(tiny, to) == first
    # and the encoder's settings, over which its tag's own are written
    assert hub.fetched == ["tiny/blip/model.safetensors", "tiny/clip/open_clip_config.json"]


def test_weights_of_the_model_before_do_not_stay(hub: Hub, tiny: Preset, tmp_path: Path) -> None:
    only = {"encoder": tmp_path, "parser": None, "localiser": "whole"}
    download.download(get_preset("tiny", **only), tmp_path / "models")
    other = hub.root / "tiny" / "old"
    shutil.copytree(hub.root / "tiny" / "blip", other)
    (other / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, other / "pytorch_model.bin")
    download.download(get_preset("tiny", captioner="tiny/old", **only), tmp_path / "models")
    shutil.rmtree(other)
    names = {p.name for p in (tmp_path / "models" / "captioner").iterdir()}
    assert "pytorch_model.bin" in names and "model.safetensors" not in names


def test_without_a_folder_the_cache_is_filled_and_the_loaders_find_it(hub: Hub, tiny: Preset) -> None:
    preset = get_preset("tiny", parser=None)
    with pytest.raises(ModelNotFound, match="'tiny/blip'"):
        preset.build("cpu")
    assert set(download.download(preset)) == {"captioner", "localiser", "encoder"}
    assert not list(hub.cache.rglob("*.py")) and not list(hub.cache.rglob("*.bin"))
    found = preset.find()
    assert found["captioner"].revision == found["encoder"].revision == COMMIT
    preset.build("cpu")


@pytest.mark.parametrize(
    ("part", "kind", "safe", "pickled"),
    [
        ("captioner", "blip", "model.safetensors", "pytorch_model.bin"),
        ("encoder", "clip", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_taken_only_where_there_is_nothing_else(
    hub: Hub, shelf: Path, tiny: Preset, tmp_path: Path, part: str, kind: str, safe: str, pickled: str
) -> None:
    hub.root = tmp_path / "shelf"
    old = shutil.copytree(shelf / "tiny" / kind, hub.root / "tiny" / kind)
    weights = load_file(old / safe)
    (old / safe).unlink()
    torch.save(weights, old / pickled)
    # an encoder given as a folder is left out
    parts: dict[str, Any] = {"captioner": None, "encoder": shelf / "tiny" / "clip", "parser": None}
    del parts[part]
    assert list(download.download(get_preset("tiny", localiser="whole", **parts), tmp_path / "m")) == [part]
    get_preset("tiny", tmp_path / "m", localiser="whole", **parts).build("cpu")


def test_a_hub_repository_of_open_clip_is_taken_as_it_is(hub: Hub, tiny: Preset, tmp_path: Path) -> None:
    preset = get_preset("tiny", encoder="hf-hub:tiny/clip", captioner=None, parser=None, localiser="whole")
    download.download(preset, tmp_path / "models")
    ours = load_encoder(tmp_path / "models" / "encoder", device="cpu")
    theirs = load_encoder(hub.root / "tiny" / "clip", device="cpu")
    assert torch.equal(ours.encode_texts(["a red ball"]), theirs.encode_texts(["a red ball"]))


def test_the_command_fills_a_folder_that_is_already_named_for_the_runs_to_come(
    hub: Hub,
    tiny: Preset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = tmp_path / "models"
    monkeypatch.setenv("ITEMKIT_MODELS", str(to))
    for _ in range(2):  # not there yet, and there
        assert cli.main(["download", "--preset", "tiny", "--to", str(to), "--localiser", "whole"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "captioner 'tiny/blip': fetching what is missing ..."
    assert lines[1] == f"captioner 'tiny/blip': revision {COMMIT[:12]} is there"
    assert lines[-1] == f"use it with --models {to}"
    assert not (to / "detector").exists()


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"captioner": "tiny/nobody"}, ModelNotFound, "fetched from 'tiny/nobody' at .*RepositoryNotFound"),
        ({"captioner": "not a name"}, ModelNotFound, "fetched from 'not a name' at .*HFValidationError"),
        ({"captioner": "tiny/clip"}, ModelNotFound, "'tiny/clip' holds no weights in a known format"),
        ({"encoder": "ViT-L-41", "encoder_pretrained": "x"}, InputError, "Did you mean"),
        ({"encoder": TINY, "encoder_pretrained": "made_op"}, InputError, "Did you mean 'made_up'"),
        ({"encoder": TINY, "encoder_pretrained": None}, InputError, "needs a tag"),
    ],
)
def test_what_is_not_there_is_one_error(
    changes: dict, error: type, message: str, hub: Hub, tiny: Preset, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        download.download(get_preset("tiny", parser=None, **changes), tmp_path / "models")
    assert hub.fetched == []


def test_a_pointer_of_git_lfs_is_no_model(hub: Hub, shelf: Path, tiny: Preset, tmp_path: Path) -> None:
    hub.root = tmp_path / "mirror"
    shutil.copytree(shelf / "tiny" / "blip", hub.root / "tiny" / "blip")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (hub.root / "tiny" / "blip" / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelNotFound, match="model.safetensors is a Git LFS pointer"):
        download.download(get_preset("tiny", parser=None), tmp_path / "models")


@pytest.mark.parametrize("part", ["captioner", "parser"])
def test_a_folder_of_somebody_else_is_left_alone(part: str, hub: Hub, tiny: Preset, tmp_path: Path) -> None:
    mine = tmp_path / "models" / part
    mine.mkdir(parents=True)
    (mine / "meta.json").write_text("[]")
    with pytest.raises(InputError, match=f"{part} was not made by this `itemkit download`; choose another"):
        download.download(tiny, tmp_path / "models")
    assert [p.name for p in mine.iterdir()] == ["meta.json"] and hub.fetched == []


def test_the_mini_models_are_not_on_a_hub() -> None:
    with pytest.raises(InputError, match="preset 'mini' has nothing to download"):
        download.download(get_preset("mini"))


def test_a_full_disk_is_called_that(
    hub: Hub, tiny: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreError, match="the disk is full"):
        download.download(get_preset("tiny", parser=None), tmp_path / "models")


# --------------------------------------------------------------------------------------------- no network


def test_no_network_is_one_message_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # as HF_ENDPOINT does in a fresh process
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cli.main(["download", "--preset", "paper", "--to", str(tmp_path / "m")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    name = "Salesforce/blip-image-captioning-large"
    assert line.startswith(
        f"itemkit: captioner '{name}' cannot be fetched from '{name}' at http://127.0.0.1:1 ("
    )
    assert "`--to FOLDER`" in line and "`--models FOLDER`" in line and "preset 'mini'" in line
    assert not (tmp_path / "m").exists()


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_S", 0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(ModelNotFound, match="cannot be fetched from .* at http://127.0.0.1"):
            download.download(get_preset("paper"), tmp_path / "models")
        assert time.monotonic() - began < 10


def test_a_failed_install_repeats_what_pip_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spacy.about, "__download_url__", "http://127.0.0.1:1")
    said = r"parser 'x_y' cannot be fetched from http://127.0.0.1:1/x_y-3\.\d+\.0/x_y-3.*whl \(.+\)"
    with pytest.raises(ModelNotFound, match=said):
        download._install_parser("parser 'x_y'", "x_y", tmp_path)
