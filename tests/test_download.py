"""`itemkit download`: against a small hub on this machine, against none, and against one that is silent."""

from __future__ import annotations

import itemkit  # noqa: F401  (first: it repairs the torchvision import)

# isort: split

import hashlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

from itemkit import cli, download, presets
from itemkit import download as hub
from itemkit.encoder import load_encoder
from itemkit.errors import InputError, ModelNotFound, StoreError
from itemkit.presets import Preset, get_preset

import models

REPO = Path(__file__).resolve().parents[1]
COMMIT = "0123456789" * 4


class SmallHub(ThreadingHTTPServer):
    """What of the hub's interface huggingface_hub asks: a repository's list of files, and the files."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root = root  # root/owner/name/file
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answers)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> list[str]:
        return [path.replace("/resolve/main", "") for path in self.asked if "/resolve/" in path]


class _Answers(BaseHTTPRequestHandler):
    server: SmallHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").removesuffix("/revision/main")
            folder = self.server.root / repo
            if not folder.is_dir():
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            siblings = [self._sibling(folder, p) for p in files]
            return self._send(
                200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {}, body
            )
        repo, _, name = path.strip("/").partition("/resolve/")
        file = self.server.root / repo / name.partition("/")[2]
        if not file.is_file():
            absent = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return self._send(404, b"", absent, body)
        data = file.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

    @staticmethod
    def _sibling(folder: Path, path: Path) -> dict:
        entry: dict = {"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size}
        if path.suffix in (".safetensors", ".bin", ".h5"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": path.stat().st_size, "pointerSize": 130}
        return entry

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


TINY = "tiny-ViT"
TINY_TAG = {"hf_hub": "tiny/clip/", "quick_gelu": True, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4),
            "interpolation": "bicubic", "resize_mode": "shortest"}  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories in true formats, with what real ones hold besides: code, other weights, a card."""
    root = tmp_path_factory.mktemp("shelf")
    sizes = {"width": 32, "layers": 1, "text_layers": 1, "head_width": 16, "embed_dim": 16}
    models.write_tiny_clip(root / "tiny" / "clip", **sizes)
    models.write_tiny_blip(root / "tiny" / "blip", width=32, layers=1, text_layers=1, heads=2)
    models.write_tiny_grounding_dino(root / "tiny" / "dino")
    for repo in ("clip", "blip", "dino"):
        (root / "tiny" / repo / "README.md").write_text("a card")
        (root / "tiny" / repo / "modeling_own.py").write_text("raise SystemExit('code was run')")
        (root / "tiny" / repo / "onnx").mkdir()
        (root / "tiny" / repo / "onnx" / "model.safetensors").write_bytes(b"of another program")
    (root / "tiny" / "blip" / "tf_model.h5").write_bytes(b"of another library")
    (root / "tiny" / "blip" / "pytorch_model.bin").write_bytes(b"an old copy")
    return root


@pytest.fixture
def small_hub(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """The hub, an empty cache, an open_clip model whose weights lie there, and spaCy's own steps recorded."""
    server = SmallHub(shelf)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)  # as HF_ENDPOINT does in a fresh process
    files = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    body = json.loads((shelf / "tiny" / "clip" / "open_clip_config.json").read_text())
    config = body["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = "tiny/clip"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, TINY, config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, {"made_up": TINY_TAG})
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def parser_releases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """SpaCy's download, replaced by a pipeline in the layout that pip leaves behind."""
    import spacy

    calls: list[str] = []

    def install(model: str, target: Path | None = None) -> None:
        assert target is not None
        calls.append(model)
        inner = target / model / f"{model}-3.8.0"
        inner.parent.mkdir(parents=True)
        (inner.parent / "__init__.py").write_text("")
        nlp = spacy.blank("en")
        nlp.meta["name"], nlp.meta["version"] = "made_up", "3.8.0"
        nlp.to_disk(inner)

    monkeypatch.setattr(hub, "require_parser", lambda model, what: calls.append("looked up"))
    monkeypatch.setattr(hub, "install_parser", install)
    return calls


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> Preset:
    preset = Preset(
        name="tiny",
        about="For this test.",
        captioner="tiny/blip",
        encoder=TINY,
        encoder_pretrained="made_up",
        parser="en_made_up_sm",
        localiser="grounding_dino",
        localiser_options={"model": "tiny/dino"},
    )
    monkeypatch.setitem(presets.PRESETS, "tiny", preset)
    return preset


def test_a_folder_holds_everything_and_works_without_a_network(
    small_hub: SmallHub,
    parser_releases: list[str],
    tiny_preset: Preset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to, lines = tmp_path / "models", []
    notes = download.download("tiny", to, report=lines.append)
    assert sorted(p.name for p in to.iterdir()) == [
        "captioner",
        "detector",
        "encoder",
        "models.json",
        "parser",
    ]
    assert json.loads((to / "models.json").read_text()) == notes
    assert parser_releases == ["looked up", "en_made_up_sm"]
    # no code, no card, no weights but safetensors
    names = [p.name for p in to.rglob("*") if p.is_file() and "parser" not in p.parts]
    assert not [n for n in names if n.endswith((".py", ".md", ".bin", ".h5", ".pt"))]
    assert {"model.safetensors", "open_clip_model.safetensors"} <= set(names)
    assert [line.split()[0] for line in lines[::2]] == ["captioner", "parser", "localiser", "encoder"]
    for entry in notes["models"].values():
        for name, digest in entry["files"].items():
            assert hashlib.sha256((to / entry["folder"] / name).read_bytes()).hexdigest() == digest
    captioner, encoder = notes["models"]["captioner"], notes["models"]["encoder"]
    assert (captioner["model"], captioner["revision"]) == ("tiny/blip", COMMIT)
    assert (encoder["model"], encoder["pretrained"], encoder["repository"]) == (TINY, "made_up", "tiny/clip")
    assert notes["models"]["parser"]["revision"] == "3.8.0"

    # from here on without hub and cache
    small_hub.shutdown()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    found = get_preset("tiny", to).find()
    assert {part: place.path for part, place in found.items()} == {
        part: to / name for part, name in download.FOLDERS.items()
    }
    loaded = get_preset("tiny", to, parser=None).build("cpu")
    picture = Image.new("RGB", (64, 48), "red")
    assert loaded.captioner.caption([picture])[0].text is not None
    # the tag's preprocessing and activation travel with the folder
    assert loaded.encoder.fingerprint()["preprocess"]["mean"] == [0.4, 0.5, 0.6]
    config = json.loads((to / "encoder" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is True
    plain = load_encoder(small_hub.root / "tiny" / "clip", device="cpu")  # without QuickGELU
    assert not torch.allclose(plain.encode_texts(["a red ball"]), loaded.encoder.encode_texts(["a red ball"]))


def test_a_second_run_fetches_nothing_and_mends_what_is_damaged(
    small_hub: SmallHub, parser_releases: list[str], tiny_preset: Preset, tmp_path: Path
) -> None:
    to, lines = tmp_path / "models", []
    first = download.download("tiny", to)
    asked = len(small_hub.asked)
    assert download.download("tiny", to, report=lines.append) == first
    assert len(small_hub.asked) == asked and parser_releases == ["looked up", "en_made_up_sm"]
    assert len(lines) == 4 and all(line.endswith("there already") for line in lines)
    weights = to / "captioner" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert download.download("tiny", to)["models"] == first["models"]
    again = [path for path in small_hub.asked[asked:] if "/resolve/" in path]
    assert again and all("/tiny/blip/" in path for path in again)


def test_an_interrupted_run_goes_on(
    small_hub: SmallHub,
    parser_releases: list[str],
    tiny_preset: Preset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to, fetch, count = tmp_path / "models", hub.fetch_file, itertools.count()

    def cut(*args: object) -> Path:
        if next(count) == 3:
            raise KeyboardInterrupt
        return fetch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(hub, "fetch_file", cut)
    before = constants.HF_HUB_CACHE
    with pytest.raises(KeyboardInterrupt):
        download.download("tiny", to)
    assert constants.HF_HUB_CACHE == before
    assert not (to / "captioner").exists() and not (to / "models.json").exists()
    monkeypatch.setattr(hub, "fetch_file", fetch)
    early = small_hub.fetched()
    download.download("tiny", to)
    late = small_hub.fetched()[len(early) :]
    assert len(early) == 3 and "/tiny/blip/model.safetensors" in early
    assert late and not set(early) & set(late)
    assert not (to / ".fetching").exists() and (to / "models.json").exists()


def test_without_a_folder_the_cache_is_filled_and_the_loaders_find_it(
    small_hub: SmallHub, tiny_preset: Preset, tmp_path: Path
) -> None:
    preset = get_preset("tiny", parser=None)
    with pytest.raises(ModelNotFound, match="captioner 'tiny/blip', .* are not on this machine"):
        preset.build("cpu")
    notes = download.download(preset)
    assert set(notes["models"]) == {"captioner", "localiser", "encoder"}
    assert notes["models"]["captioner"]["files"]["model.safetensors"] == hub.sha256(
        small_hub.root / "tiny" / "blip" / "model.safetensors"
    )
    assert not list((tmp_path / "cache").rglob("*.py")) and not list((tmp_path / "cache").rglob("*.h5"))
    small_hub.shutdown()
    # a part of each repository was fetched; the loaders must not take that for half a download
    found = preset.find()
    assert found["captioner"].revision == found["encoder"].revision == COMMIT
    assert preset.build("cpu").encoder.pretrained == "made_up"


def test_a_repository_without_safetensors_is_rewritten(
    small_hub: SmallHub, shelf: Path, tiny_preset: Preset, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    old = small_hub.root / "tiny" / "oldblip"
    shutil.copytree(shelf / "tiny" / "blip", old, dirs_exist_ok=True)
    model = AutoModelForImageTextToText.from_pretrained(old)
    (old / "model.safetensors").unlink()
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    try:
        preset = get_preset("tiny", captioner="tiny/oldblip", encoder=shelf / "tiny" / "clip", parser=None,
                            localiser="whole")  # fmt: skip
        notes = download.download(preset, tmp_path / "models")
    finally:
        shutil.rmtree(old)
    made = tmp_path / "models" / "captioner"
    assert list(notes["models"]) == ["captioner"]  # an encoder given as a folder is left out
    assert (made / "model.safetensors").is_file() and not list(made.glob("*.bin"))
    expected, got = model.state_dict(), load_file(made / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_a_hub_repository_of_open_clip_is_taken_as_it_is(
    small_hub: SmallHub, tiny_preset: Preset, tmp_path: Path
) -> None:
    preset = get_preset("tiny", encoder="hf-hub:tiny/clip", captioner=None, parser=None, localiser="whole")
    download.download(preset, tmp_path / "models")
    ours = load_encoder(tmp_path / "models" / "encoder", device="cpu")
    theirs = load_encoder(small_hub.root / "tiny" / "clip", device="cpu")
    assert torch.equal(ours.encode_texts(["a red ball"]), theirs.encode_texts(["a red ball"]))
    assert ours.weights_hash == theirs.weights_hash


# -------------------------------------------------------------------------------------------------- refusals


def test_a_damaged_file_is_noticed_and_removed(
    small_hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = hub.list_repository("tiny/blip", "captioner 'tiny/blip'")
    assert listing.revision == COMMIT and listing.files["config.json"] == ""
    path = hub.fetch_file("tiny/blip", "model.safetensors", listing.files["model.safetensors"])
    assert path.is_file()
    with pytest.raises(ModelNotFound, match="'model.safetensors' of 'tiny/blip' arrived damaged"):
        hub.fetch_file("tiny/blip", "model.safetensors", "0" * 64)
    assert not path.exists() and not path.is_symlink()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"captioner": "tiny/nobody"}, ModelNotFound, "the hub has no repository 'tiny/nobody'"),
        ({"captioner": "not a name"}, ModelNotFound, "the hub has no repository 'not a name'"),
        ({"captioner": "tiny/clip"}, ModelNotFound, "'tiny/clip' holds no weights in a known format"),
        ({"encoder": "ViT-L-41", "encoder_pretrained": "x"}, InputError, "Did you mean"),
        ({"encoder": TINY, "encoder_pretrained": "made_op"}, InputError, "Did you mean 'made_up'"),
        ({"encoder": TINY, "encoder_pretrained": None}, InputError, "needs a tag"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_fetched(
    changes: dict, error: type, message: str, small_hub: SmallHub, tiny_preset: Preset, tmp_path: Path
) -> None:
    preset = get_preset("tiny", **{"parser": None, **changes})
    with pytest.raises(error, match=message):
        download.download(preset, tmp_path / "models")
    assert small_hub.fetched() == [] and not (tmp_path / "models").exists()


def test_a_folder_of_somebody_else_is_left_alone(
    small_hub: SmallHub, parser_releases: list[str], tiny_preset: Preset, tmp_path: Path
) -> None:
    mine = tmp_path / "models" / "encoder"
    mine.mkdir(parents=True)
    (mine / "precious").write_text("x")
    with pytest.raises(InputError, match="encoder was not made by `itemkit download`; choose another folder"):
        download.download("tiny", tmp_path / "models")
    assert (mine / "precious").read_text() == "x"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "models.json").write_text("[]")
    with pytest.raises(InputError, match="models.json is not what `itemkit download` writes"):
        download.download("tiny", tmp_path / "other")


def test_the_mini_models_are_not_on_a_hub() -> None:
    with pytest.raises(InputError, match="preset 'mini' has nothing to download.*data/mini"):
        download.download("mini")


def test_a_full_disk_is_told(
    small_hub: SmallHub, tiny_preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfile", full)
    with pytest.raises(StoreError, match="the disk is full"):
        download.download(get_preset("tiny", parser=None), tmp_path / "models")


# --------------------------------------------------------------------------------------------- no network


def test_no_network_is_one_message_in_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "itemkit.cli", "download", "--preset", "paper", "--to", str(tmp_path / "m")],
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)},
        cwd=REPO, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 2 and run.stdout == "" and time.monotonic() - began < 60
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith(
        "itemkit: captioner 'Salesforce/blip-image-captioning-large' cannot be fetched: no answer from "
        "http://127.0.0.1:1 ("
    )
    assert "`itemkit download --preset paper --to FOLDER` on a machine with a network" in line
    assert "`--models FOLDER`" in line and "preset 'mini'" in line
    assert not (tmp_path / "m").exists()


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(ModelNotFound, match="cannot be fetched: no answer from http://127.0.0.1"):
            download.download("paper", tmp_path / "models")
        assert time.monotonic() - began < 10


def test_offline_mode_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="offline mode is enabled.*`HF_HUB_OFFLINE`"):
        download.download("fast")


def test_spacy_s_releases_are_asked_with_a_time_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from spacy import about

    monkeypatch.setattr(about, "__compatibility__", "http://127.0.0.1:1/compatibility.json")
    with pytest.raises(
        ModelNotFound, match="parser 'x' cannot be fetched: no answer from http://127.0.0.1:1/"
    ):
        hub.require_parser("x", "parser 'x'")
    table = tmp_path / "compatibility.json"
    table.write_text(json.dumps({"spacy": {"3.8": {"en_core_web_sm": ["3.8.0"]}}}))
    monkeypatch.setattr(about, "__compatibility__", table.as_uri())
    hub.require_parser("en_core_web_sm", "parser")
    with pytest.raises(ModelNotFound, match="spaCy has no pipeline of that name"):
        hub.require_parser("en_core_web_xs", "parser 'en_core_web_xs'")


def test_a_failed_install_tells_what_spacy_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ModelNotFound, match="`python -m spacy download x` failed: silently"):
        hub.install_parser("x")
    slow = subprocess.TimeoutExpired("x", 900.0)
    monkeypatch.setattr(hub.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(slow))
    with pytest.raises(ModelNotFound, match="no end of the download in 900 s"):
        hub.install_parser("x")


def test_the_command_prints_what_it_fetched(
    small_hub: SmallHub,
    parser_releases: list[str],
    tiny_preset: Preset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = tmp_path / "models"
    assert cli.main(["download", "--preset", "tiny", "--to", str(to), "--localiser", "whole"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "captioner  fetching captioner 'tiny/blip' ..."
    assert lines[1].startswith(f"captioner  tiny/blip, revision {COMMIT[:12]}, ")
    assert lines[-1] == f"what was fetched is noted in {to / 'models.json'}; use it with --models {to}"
    assert not (to / "detector").exists()


def test_the_command_does_not_read_the_folder_that_it_is_to_fill(
    small_hub: SmallHub,
    parser_releases: list[str],
    tiny_preset: Preset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to = tmp_path / "models"
    monkeypatch.setenv("ITEMKIT_MODELS", str(to))  # set already for the runs to come
    for _ in range(2):  # not there yet, and there
        assert cli.main(["download", "--preset", "tiny", "--to", str(to)]) == 0
    assert get_preset("tiny").find()["localiser"].path == to / "detector"
