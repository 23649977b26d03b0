"""Fetch the models of a preset once: into the hub's cache, or into a folder for machines without a network.

All of it is data: weights as safetensors (a .bin, which is read weights-only, where a repository has nothing
else), configuration and tokenizer; never code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import itemkit
from itemkit._files import explain_write_error, write_json
from itemkit.encoder import CONFIG_FILE, find_encoder
from itemkit.errors import InputError, ModelNotFound, StoreError
from itemkit.models import looks_like_path, names_object, tidy
from itemkit.objects import find_parser
from itemkit.presets import MODELS_VARIABLE, Preset, get_preset
from itemkit.text import count, one_line

TIMEOUT_S = 10.0  # for a first answer, not for a whole download
PARSER_TIMEOUT_S = 900.0  # a spaCy pipeline has 12 to 600 MB

MODELS_FILE = "models.json"
FOLDERS = {"captioner": "captioner", "parser": "parser", "localiser": "detector", "encoder": "encoder"}
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_SIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
Fetched = tuple[str, str, Path]  # repository, revision, and where its files are
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # not the network
_UNFINISHED = ".cache"  # the hub's notes on a folder, by which it resumes


def download(
    preset: Preset, to: str | Path | None = None, report: Callable[[str], Any] = print
) -> dict[str, Any]:
    """Fetch all models of a preset; what is there already, whole, is not fetched again.

    Parameters
    ----------
    preset : Preset
        Whose models; a part that is an object, a local folder or None is left out.
    to : path, optional
        Folder to fill: ``captioner``, ``parser``, ``encoder``, ``detector``, each complete and readable
        without a network, and ``models.json``; ``get_preset(name, folder=to)`` reads it. Without it the
        models go where the loaders look by themselves: the hub's cache, and the Python environment for
        spaCy's.
    report : callable
        Gets a line about each model.

    Returns
    -------
    dict
        As in ``models.json``: for each part the model, repository, revision, and files with their SHA-256.

    Raises
    ------
    ModelNotFound
        The hub cannot be reached or has no such model; said within seconds.
    InputError
        The preset has nothing to fetch, or the folder holds something else.
    StoreError
        The folder cannot be written, or the disk is full.
    """
    wanted = _wanted(preset)
    folder = None if to is None else Path(os.path.abspath(os.path.expanduser(to)))
    noted = _read_notes(folder)
    if "encoder" in wanted:  # an unknown name or tag is said before anything large is fetched
        with contextlib.suppress(ModelNotFound):
            find_encoder(*wanted["encoder"])
    places = {part: None if folder is None else folder / FOLDERS[part] for part in wanted}
    for part, place in places.items():
        if place is not None and place.exists() and part not in noted and not (place / _UNFINISHED).exists():
            again = "choose another folder with --to"
            raise InputError(f"{tidy(place)} was not made by `itemkit download`; {again}")
    done: dict[str, Any] = {}
    try:
        for part, (model, tag) in wanted.items():
            place, what = places[part], f"{part} '{model}'" + (f" ({tag})" if tag else "")
            if place is not None and _is_whole(place, noted.get(part), model, tag):
                done[part] = noted[part]
                report(f"{what}: there already")
                continue
            report(f"{what}: fetching ...")
            by_tag = part == "encoder" and not model.startswith("hf-hub:")
            fetch = _fetch_parser if part == "parser" else _fetch_tag if by_tag else _fetch_repository
            repo, revision, found = fetch(what, preset.name, model, tag, place)
            there = preset if folder is None else get_preset(preset.name, folder)
            if isinstance(error := there.find().get(part), ModelNotFound):  # the loader's own checks
                raise error
            if place is not None:
                shutil.rmtree(place / _UNFINISHED, ignore_errors=True)
            done[part] = {"model": model, "pretrained": tag, "repository": repo, "revision": revision,
                          "folder": FOLDERS[part], "files": _hashes(found)}  # fmt: skip
            report(f"{what}: revision {revision[:12] or '?'}, {count(len(done[part]['files']), 'file')}")
            if folder is not None:
                write_json(folder / MODELS_FILE, _notes(noted | done, preset.name))
    except OSError as error:
        raise StoreError(explain_write_error(error, folder or Path())) from error
    return _notes(done, preset.name)


def _wanted(preset: Preset) -> dict[str, tuple[str, str | None]]:
    """Model and tag of every part that is given by a hub's name."""
    asked: dict[str, tuple[Any, str | None]] = {
        "captioner": (preset.captioner, None),
        "parser": (preset.parser, None),
        "localiser": (preset.localiser_options.get("model"), None),
        "encoder": (preset.encoder, preset.encoder_pretrained),
    }
    wanted = {
        part: (model, tag)
        for part, (model, tag) in asked.items()
        if isinstance(model, str)
        and not looks_like_path(model)
        and not names_object(model)
        and not (tag and Path(tag).suffix)
    }
    if wanted:
        return wanted
    if os.environ.get(MODELS_VARIABLE):
        raise InputError(
            f"preset '{preset.name}' reads its models from {MODELS_VARIABLE}; unset it to fetch them"
        )
    raise InputError(
        f"preset '{preset.name}' has nothing to download: its models are folders on this machine (the mini "
        "ones come with itemkit); `--preset fast` and `--preset paper` are fetched"
    )


# ----------------------------------------------------------------------------------------------- repositories


def _snapshot(repo: str, **options: Any) -> Any:
    """The one place where the hub is asked; it resumes what was interrupted."""
    from huggingface_hub import snapshot_download

    return snapshot_download(repo, etag_timeout=TIMEOUT_S, **options)


def _fetch(
    what: str, preset: str, repo: str, place: Path | None, weights: Sequence[str], side: Sequence[str] = _SIDE
) -> tuple[Path, str]:
    """Fetch side files and the first kind of weights that a repository has; the folder, and the commit."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if not constants.HF_HUB_OFFLINE:
        _require_answer(what, preset, constants.ENDPOINT)
    # in folders below lies the same model for other programs
    options: dict[str, Any] = {"ignore_patterns": ["*/*", "*.fp16.*"]}
    if place is not None:
        options["local_dir"] = place
    try:
        listing = _snapshot(repo, allow_patterns=[*weights, *side], dry_run=True, **options)
        names = [file.filename for file in listing]
        kinds = [[name for name in names if Path(name).match(kind)] for kind in weights]
        chosen = next((kind for kind in kinds if kind), [])
        if not chosen and (weights or not names):
            raise ModelNotFound(f"{what}: the hub's repository '{repo}' holds no weights in a known format")
        chosen += [name for name in names if not any(name in kind for kind in kinds)]
        folder = Path(_snapshot(repo, allow_patterns=chosen, revision=listing[0].commit_hash, **options))
    except ModelNotFound:
        raise
    except Exception as error:  # the hub's library raises errors of several others for a missing network
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _DISK:
            raise cause from error
        if isinstance(cause, GatedRepoError):
            consent = "Give it on the model's page, log in with `hf auth login` and run the command again"
            reason = f"is given by the hub after consent only ('{repo}')"
            raise ModelNotFound(what, reason=reason, remedy=consent) from error
        if isinstance(cause, (RepositoryNotFoundError, HFValidationError)):
            raise ModelNotFound(f"{what}: the hub has no repository '{repo}' (or none for you)") from error
        raise _unreachable(what, preset, constants.ENDPOINT, cause) from error
    return folder, listing[0].commit_hash


def _fetch_repository(what: str, preset: str, model: str, tag: str | None, place: Path | None) -> Fetched:
    """A captioner, an object detector, or an encoder in open_clip's own layout; taken as it is."""
    repo = model.removeprefix("hf-hub:")
    weights = OPEN_CLIP_WEIGHTS if repo != model else _WEIGHTS
    folder, revision = _fetch(what, preset, repo, place, weights)
    return repo, revision, folder


def _fetch_tag(what: str, preset: str, model: str, tag: str | None, place: Path | None) -> Fetched:
    """An encoder that open_clip knows by name and tag; a folder gets open_clip's local-dir of it."""
    import open_clip

    name = model.replace("/", "-")
    known, config = open_clip.get_pretrained_cfg(name, tag), open_clip.get_model_config(name)
    repo, _, file = (known.get("hf_hub") or "").rpartition("/")
    if not repo:
        raise ModelNotFound(f"{what}: open_clip names no repository of the hub for these weights")
    # tokenizers other than CLIP's own, and foreign text towers, lie in a repository that the model names
    text = config.get("text_cfg", {})
    texts = {text.get("hf_tokenizer_name"), text.get("hf_model_name")} - {None, ""}
    # in the loader's order
    weights = (str(Path(file).with_suffix(".safetensors")), file) if file else OPEN_CLIP_WEIGHTS
    folder, revision = _fetch(what, preset, repo, place, weights, _SIDE if repo in texts else ())
    for other in sorted(texts):
        if other != repo:
            _fetch(what, preset, other, place, ())
        if place is None:
            _note_absent(other, "config.json")
    if place is not None:
        # a pickle keeps its ending, so that the loader knows to read it weights-only
        for name, own in zip(weights, OPEN_CLIP_WEIGHTS, strict=True):
            if (place / name).exists():
                (place / name).replace(place / own)
        settings = {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in known}
        if known.get("quick_gelu"):  # open_clip only warns where a tag has another activation than the name
            config["quick_gelu"] = True
        body = {"model_cfg": config, "preprocess_cfg": settings}
        (place / CONFIG_FILE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    return repo, revision, folder


def _note_absent(repo: str, name: str) -> None:
    """Let the cache note that a repository lacks a file: transformers asks for it beside every tokenizer."""
    from huggingface_hub import hf_hub_download

    with contextlib.suppress(OSError):
        hf_hub_download(repo, name, etag_timeout=TIMEOUT_S)


def _fetch_parser(what: str, preset: str, model: str, tag: str | None, place: Path | None) -> Fetched:
    """A spaCy pipeline: into the environment by spaCy's own command, or its data alone into a folder."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            found = find_parser(model).path
        except ModelNotFound:
            _install_parser(what, preset, model, None if place is None else Path(scratch))
            found = find_parser(model if place is None else Path(scratch) / model).path
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
            data_only = shutil.ignore_patterns("__pycache__", "*.py")
            (place / _UNFINISHED).mkdir(
                parents=True
            )  # should this end here, the next run knows its own folder
            found = Path(shutil.copytree(found, place, ignore=data_only, dirs_exist_ok=True))
        version = json.loads((found / "meta.json").read_text(encoding="utf-8")).get("version", "")
        return "", str(version), found


def _install_parser(what: str, preset: str, model: str, target: Path | None) -> None:
    """Let spaCy and pip fetch a pipeline, into the environment or, as a package, into a folder."""
    from spacy import about

    _require_answer(what, preset, about.__compatibility__)  # spaCy's own try may hang
    where = [] if target is None else ["--target", str(target)]
    command = [sys.executable, "-m", "spacy", "download", model, "--no-deps", *where]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PARSER_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(f"{what}: no end of the download in {error.timeout:.0f} s") from error
    if run.returncode:
        said = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        failed = f"`python -m spacy download {model}` failed: {said[-1] if said else 'silently'}"
        raise ModelNotFound(f"{what}: {failed}")


def _require_answer(what: str, preset: str, address: str) -> None:
    """Raise within seconds where a server cannot be reached: the libraries below may wait for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # an answer
    except (OSError, ValueError) as error:
        raise _unreachable(what, preset, address, error) from error


def _unreachable(what: str, preset: str, address: str, error: BaseException) -> ModelNotFound:
    return ModelNotFound(
        what,
        reason=f"cannot be fetched: no answer from {address} ({one_line(error)})",
        remedy=f"Run `itemkit download --preset {preset} --to FOLDER` on a machine with a network, copy "
        "FOLDER here and name it with `--models FOLDER`; or use preset 'mini', which comes with itemkit",
    )


# ------------------------------------------------------------------------------------------- what was fetched


def _notes(entries: dict[str, Any], preset: str) -> dict[str, Any]:
    order = {part: entries[part] for part in FOLDERS if part in entries}
    made = time.strftime("%Y-%m-%d")
    return {"itemkit": itemkit.__version__, "preset": preset, "fetched": made, "models": order}


def _read_notes(folder: Path | None) -> dict[str, Any]:
    file = None if folder is None else folder / MODELS_FILE
    if file is None or not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["models"])
    except (ValueError, KeyError, TypeError) as error:
        remedy = "choose another folder"
        raise InputError(f"{tidy(file)} is not what `itemkit download` writes; {remedy}") from error


def _is_whole(place: Path, entry: Any, model: str, tag: str | None) -> bool:
    """Whether a part was fetched before and all its files still have their hashes."""
    if not entry or (entry["model"], entry["pretrained"]) != (model, tag) or not place.is_dir():
        return False
    return _hashes(place) == entry["files"]


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file as it lies on the disk now."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    hashes = {}
    for path in files:
        with open(path, "rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
