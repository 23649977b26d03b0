"""Finding models in the hub's cache: what is whole where it counts is taken, what is not is told."""

from __future__ import annotations

import models  # first: it repairs the torchvision import

# isort: split

import json
import os
import shutil
from pathlib import Path

import pytest
import transformers

from itemkit.captions import load_captioner
from itemkit.encoder import find_encoder
from itemkit.errors import ModelNotFound
from itemkit.models import find_folder

COMMIT = "0123456789012345678901234567890123456789"
NAME = "owner/name"


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


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_tiny_blip(tmp_path_factory.mktemp("blip") / "model")


@pytest.fixture(scope="module")
def sharded(blip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(blip, tmp_path_factory.mktemp("sharded") / "model")
    (folder / "model.safetensors").unlink()
    model = transformers.BlipForConditionalGeneration.from_pretrained(blip)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    return folder


def test_a_cache_filled_by_a_choice_of_files_is_taken(snapshot: Path, blip: Path) -> None:
    """`snapshot_download(name, allow_patterns=...)` leaves a list of all files and only some of them."""
    from huggingface_hub import _tree_cache, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fill(snapshot, blip)
    names = [*os.listdir(snapshot), "pytorch_model.bin", "README.md"]
    entries = {name: _tree_cache.TreeCacheEntry(size=1, blob_id="0" * 40) for name in names}
    _tree_cache.write_tree_cache(str(snapshot.parents[1]), COMMIT, entries)
    with pytest.raises(LocalEntryNotFoundError):  # the reason why it is not asked
        snapshot_download(NAME, local_files_only=True)
    located = find_folder(NAME, "captioner")
    assert (located.path, located.revision) == (snapshot, COMMIT)
    assert load_captioner(NAME, "cpu", max_new_tokens=3).fingerprint()["revision"] == COMMIT


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", r"no weights \(\*.safetensors, \*.bin\)"),
    ],
)
def test_an_interrupted_download_is_told(snapshot: Path, blip: Path, gone: str, message: str) -> None:
    fill(snapshot, blip)
    (snapshot.parents[1] / "blobs" / gone).unlink()  # a link to nothing stays behind
    with pytest.raises(
        ModelNotFound, match=rf"captioner 'owner/name' is not on this.*{message}.*itemkit download"
    ):
        find_folder(NAME, "captioner")


def test_a_reference_without_files_is_told(snapshot: Path) -> None:
    snapshot.rmdir()
    with pytest.raises(
        ModelNotFound, match="captioner 'owner/name' .*its files are missing.*itemkit download"
    ):
        find_folder(NAME, "captioner")
    with pytest.raises(ModelNotFound, match="encoder 'hf-hub:owner/name' .*its files are missing"):
        find_encoder(f"hf-hub:{NAME}")


def test_weights_in_parts_are_taken_only_if_all_are_there(snapshot: Path, sharded: Path) -> None:
    fill(snapshot, sharded)
    assert load_captioner(NAME, "cpu", max_new_tokens=3).fingerprint()["name"] == NAME
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    (snapshot / last).unlink()
    with pytest.raises(
        ModelNotFound, match=rf"the weights are not whole, e.g. {last} is missing.*itemkit download"
    ):
        find_folder(NAME, "captioner")
    (snapshot / last).symlink_to(sharded / last)
    (snapshot / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelNotFound, match=r"e.g. model.safetensors.index.json is missing"):
        find_folder(snapshot, "captioner")


def test_the_index_is_of_no_matter_beside_the_one_file(snapshot: Path, blip: Path) -> None:
    fill(snapshot, blip)
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert find_folder(NAME, "captioner").path == snapshot


@pytest.mark.parametrize("name", ["owner", "a/b/c", "owner/with space", "nul\0byte/x"])
def test_odd_names_are_not_found_and_no_crash(snapshot: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match="captioner '.*' is not on this machine"):
        find_folder(name, "captioner")
