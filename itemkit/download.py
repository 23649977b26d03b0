"""Fetch the models of a preset once: into the hub's cache, or into a folder for machines without a network.

All of it is data: weights as safetensors (a .bin, which is read weights-only, where a repository has nothing
else), configuration and tokenizer; never code. What is there already, and of which commit, the hub's library
notes in ``.cache`` beside the files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itemkit._files import explain_write_error
from itemkit.encoder import CONFIG_FILE, find_encoder
from itemkit.errors import InputError, ModelNotFound, StoreError
from itemkit.models import looks_like_path, names_object, tidy
from itemkit.objects import find_parser
from itemkit.presets import MODELS_VARIABLE, Preset, get_preset
from itemkit.text import one_line

TIMEOUT_S = 10.0  # for a first answer, not for a whole download
PARSER_TIMEOUT_S = 900.0  # a spaCy pipeline has 12 to 600 MB

FOLDERS = {"captioner": "captioner", "parser": "parser", "localiser": "detector", "encoder": "encoder"}
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_SIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # not the network


@dataclass(frozen=True)
class _Wanted:
    """A part that is given by a hub's name."""

    preset: str
    part: str
    model: str
    tag: str | None
    place: Path | None  # folder to fill; None: the hub's cache, or the Python environment for spaCy's

    def __str__(self) -> str:
        return f"{self.part} '{self.model}'" + (f" ({self.tag})" if self.tag else "")


def download(
    preset: Preset, to: str | Path | None = None, report: Callable[[str], Any] = print
) -> dict[str, str]:
    """Fetch all models of a preset; what is there already, whole, is not fetched again.

    Parameters
    ----------
    preset : Preset
        Whose models; a part that is an object, a local folder or None is left out.
    to : path, optional
        Folder to fill: ``captioner``, ``parser``, ``encoder``, ``detector``, each complete and readable
        without a network; ``get_preset(name, folder=to)`` reads it. Without it the models go where the
        loaders look by themselves: the hub's cache, and the Python environment for spaCy's.
    report : callable
        Gets a line before and after each model.

    Returns
    -------
    dict
        For each part its revision: the hub's commit, or the version of a spaCy pipeline.

    Raises
    ------
    ModelNotFound
        The hub cannot be reached or has no such model; said within seconds.
    InputError
        The preset has nothing to fetch, or the folder holds something else.
    StoreError
        The folder cannot be written, or the disk is full.
    """
    folder = None if to is None else Path(os.path.abspath(os.path.expanduser(to)))
    parts = _wanted(preset, folder)
    for wanted in parts:  # what can be said before anything large is fetched
        if wanted.part == "encoder":
            with contextlib.suppress(ModelNotFound):
                find_encoder(wanted.model, wanted.tag)
        if wanted.place is not None and wanted.place.exists() and not _is_ours(wanted, wanted.place):
            again = "choose another folder with --to"
            raise InputError(f"{tidy(wanted.place)} was not made by this `itemkit download`; {again}")
    revisions = {}
    try:
        for wanted in parts:
            report(f"{wanted}: fetching what is missing ...")
            by_tag = wanted.part == "encoder" and not wanted.model.startswith("hf-hub:")
            fetch = _fetch_parser if wanted.part == "parser" else _fetch_tag if by_tag else _fetch_repository
            revision = revisions[wanted.part] = fetch(wanted)
            there = preset if folder is None else get_preset(preset.name, folder)
            if isinstance(error := there.find().get(wanted.part), ModelNotFound):  # the loader's own checks
                raise error
            report(f"{wanted}: revision {revision[:12]} is there")
    except OSError as error:
        raise StoreError(explain_write_error(error, folder or Path())) from error
    return revisions


def _wanted(preset: Preset, folder: Path | None) -> list[_Wanted]:
    given: dict[str, tuple[Any, str | None]] = {
        "captioner": (preset.captioner, None),
        "parser": (preset.parser, None),
        "localiser": (preset.localiser_options.get("model"), None),
        "encoder": (preset.encoder, preset.encoder_pretrained),
    }
    wanted = [
        _Wanted(preset.name, part, model, tag, None if folder is None else folder / FOLDERS[part])
        for part, (model, tag) in given.items()
        if isinstance(model, str) and not looks_like_path(model) and not names_object(model)
        if not (tag and Path(tag).suffix)  # a file of weights
    ]
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


def _is_ours(wanted: _Wanted, place: Path) -> bool:
    """Whether a folder is one that may be gone on with: with the hub's notes, or this very pipeline."""
    return _version(wanted, place) != "" if wanted.part == "parser" else (place / ".cache").is_dir()


# ----------------------------------------------------------------------------------------------- repositories


def _fetch(wanted: _Wanted, repo: str, weights: Sequence[str], side: Sequence[str] = _SIDE) -> str:
    """Fetch side files and the first kind of weights that a repository has; returns the commit."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        _require_answer(wanted, constants.ENDPOINT)
    listing = _snapshot(wanted, repo, allow_patterns=[*weights, *side], dry_run=True)
    names = [file.filename for file in listing]
    kinds = [[name for name in names if Path(name).match(kind)] for kind in weights]
    chosen = next((kind for kind in kinds if kind), [])
    if not chosen and (weights or not names):
        raise ModelNotFound(f"{wanted}: the hub's repository '{repo}' holds no weights in a known format")
    chosen = chosen + [name for name in names if not any(name in kind for kind in kinds)]
    _snapshot(wanted, repo, allow_patterns=chosen, revision=listing[0].commit_hash)
    if wanted.place is not None and weights:  # another model's, which was here before, would be read first
        for file in wanted.place.iterdir():
            if file.suffix in (".safetensors", ".bin") and file.name not in chosen:
                file.unlink()
    return listing[0].commit_hash


def _snapshot(wanted: _Wanted, repo: str, **options: Any) -> Any:
    """The one place where the hub is asked; its library resumes what was interrupted, mends what changed."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    # in folders below lies the same model for other programs
    options |= {"ignore_patterns": ["*/*", "*.fp16.*"], "etag_timeout": TIMEOUT_S}
    if wanted.place is not None:
        options["local_dir"] = wanted.place
    try:
        return snapshot_download(repo, **options)
    except Exception as error:  # the hub's library raises errors of several others for a missing network
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _DISK:
            raise cause from error
        if isinstance(cause, GatedRepoError):
            consent = "Give it on the model's page, log in with `hf auth login` and run the command again"
            reason = f"is given by the hub after consent only ('{repo}')"
            raise ModelNotFound(str(wanted), reason=reason, remedy=consent) from error
        if isinstance(cause, (RepositoryNotFoundError, HFValidationError)):
            raise ModelNotFound(f"{wanted}: the hub has no repository '{repo}' (or none for you)") from error
        raise _unreachable(wanted, constants.ENDPOINT, cause) from error


def _fetch_repository(wanted: _Wanted) -> str:
    """A captioner, an object detector, or an encoder in open_clip's own layout; taken as it is."""
    repo = wanted.model.removeprefix("hf-hub:")
    return _fetch(wanted, repo, OPEN_CLIP_WEIGHTS if repo != wanted.model else _WEIGHTS)


def _fetch_tag(wanted: _Wanted) -> str:
    """An encoder that open_clip knows by name and tag; a folder gets open_clip's local-dir of it."""
    import open_clip

    name = wanted.model.replace("/", "-")
    known, config = open_clip.get_pretrained_cfg(name, wanted.tag), open_clip.get_model_config(name)
    repo, _, file = (known.get("hf_hub") or "").rpartition("/")
    if not repo:
        raise ModelNotFound(f"{wanted}: open_clip names no repository of the hub for these weights")
    # tokenizers other than CLIP's own, and foreign text towers, lie in a repository that the model names
    text = config.get("text_cfg", {})
    texts = {text.get("hf_tokenizer_name"), text.get("hf_model_name")} - {None, ""}
    # in the loader's order
    weights = (str(Path(file).with_suffix(".safetensors")), file) if file else OPEN_CLIP_WEIGHTS
    revision = _fetch(wanted, repo, weights, _SIDE if repo in texts else ())
    for other in sorted(texts):
        if other != repo:
            _fetch(wanted, other, ())
        if wanted.place is None:
            _note_absent(other, "config.json")
    if wanted.place is not None:
        settings = {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in known}
        if known.get("quick_gelu"):  # open_clip only warns where a tag has another activation than the name
            config["quick_gelu"] = True
        body = {"model_cfg": config, "preprocess_cfg": settings}
        (wanted.place / CONFIG_FILE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    return revision


def _note_absent(repo: str, name: str) -> None:
    """Let the cache note that a repository lacks a file: transformers asks for it beside every tokenizer."""
    from huggingface_hub import hf_hub_download

    with contextlib.suppress(OSError):
        hf_hub_download(repo, name, etag_timeout=TIMEOUT_S)


# ----------------------------------------------------------------------------------------------- the parser


def _fetch_parser(wanted: _Wanted) -> str:
    """A spaCy pipeline: into the environment by spaCy's own command, or its data alone into a folder."""
    place = wanted.place
    if place is not None and place.exists():  # renamed to this when it was whole
        return _version(wanted, place)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            found = find_parser(wanted.model).path
        except ModelNotFound:
            _install_parser(wanted, Path(scratch))
            found = find_parser(wanted.model if place is None else Path(scratch) / wanted.model).path
        if place is not None:
            unfinished = place.with_name(".parser")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(found, unfinished, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
            found = unfinished.rename(place)
        return _version(wanted, found)


def _install_parser(wanted: _Wanted, scratch: Path) -> None:
    """Let spaCy and pip fetch a pipeline, into the environment or, as a package, into a scratch folder."""
    from spacy import about

    _require_answer(wanted, about.__compatibility__)  # spaCy's own try may hang
    where = [] if wanted.place is None else ["--target", str(scratch)]
    command = [sys.executable, "-m", "spacy", "download", wanted.model, "--no-deps", *where]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PARSER_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(f"{wanted}: no end of the download in {error.timeout:.0f} s") from error
    if run.returncode:
        said = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        failed = f"`python -m spacy download {wanted.model}` failed: {said[-1] if said else 'silently'}"
        raise ModelNotFound(f"{wanted}: {failed}")


def _version(wanted: _Wanted, folder: Path) -> str:
    """Version of a pipeline; nothing where a folder holds another one, or none."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return str(meta["version"]) if f"{meta['lang']}_{meta['name']}" == wanted.model else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# ------------------------------------------------------------------------------------------------ no network


def _require_answer(wanted: _Wanted, address: str) -> None:
    """Raise within seconds where a server cannot be reached: the libraries below may wait for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # an answer
    except (OSError, ValueError) as error:
        raise _unreachable(wanted, address, error) from error


def _unreachable(wanted: _Wanted, address: str, error: BaseException) -> ModelNotFound:
    return ModelNotFound(
        str(wanted),
        reason=f"cannot be fetched: no answer from {address} ({one_line(error)})",
        remedy=f"Run `itemkit download --preset {wanted.preset} --to FOLDER` on a machine with a network, "
        "copy FOLDER here and name it with `--models FOLDER`; or use preset 'mini', which comes with itemkit",
    )
