"""Fetch the models of a preset once: into the hub's cache, or into a folder for machines without a network.

All of it is data: weights as safetensors (a .bin, which is read weights-only, where a repository has nothing
else), configuration and tokenizer; never code. The hub's library knows what is there already.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from itemkit._files import explain_write_error
from itemkit.encoder import CONFIG_FILE, of_hub
from itemkit.errors import InputError, ModelNotFound, StoreError
from itemkit.models import looks_like_path, read_json, tidy
from itemkit.objects import find_parser
from itemkit.presets import FOLDERS, Preset, get_preset
from itemkit.text import one_line

TIMEOUT_S = 10.0  # for an answer, not for a whole download

# kinds of weights, the first that a repository has is taken; and configuration and tokenizer beside them
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_SIDE = ("*.json", "*.txt", "*.model", "*.jinja")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # not the network


def download(
    preset: Preset, to: str | Path | None = None, report: Callable[[str], Any] = print
) -> dict[str, str]:
    """Fetch all models of a preset; gives the revision of each: the hub's commit, or a pipeline's version.

    What is there already, whole, is not fetched again; parts that are objects or local folders are left out.

    Parameters
    ----------
    preset : Preset
    to : path, optional
        Folder to fill, for ``get_preset(name, folder=to)`` without a network. Without it the models go where
        the loaders look by themselves: the hub's cache, and the Python environment for spaCy's.

    Raises
    ------
    ModelNotFound
        The hub cannot be reached or has no such model; said within seconds.
    InputError
        The preset has nothing to fetch or an unknown name, or the folder holds something else.
    StoreError
        The folder cannot be written, or the disk is full.
    """
    folder = None if to is None else Path(to).expanduser().absolute()
    tag = preset.encoder_pretrained or ""
    wanted = {part: str(model) for part, model in preset.by_name().items() if not looks_like_path(model)}
    if Path(tag).suffix:  # a file of weights
        wanted.pop("encoder", None)
    if not wanted:
        raise InputError(
            f"preset '{preset.name}' has nothing to download: its models are folders on this machine (the "
            "mini ones come with itemkit); `--preset fast` and `--preset paper` are fetched"
        )
    places = {} if folder is None else {part: folder / FOLDERS[part] for part in wanted}
    preset.find()  # an unknown name or tag is an error before anything large is fetched
    for part, place in places.items():
        if place.exists() and not (place / ".cache").is_dir() and not _version(place, wanted[part]):
            what = f"{tidy(place)} was not made by this `itemkit download`"
            raise InputError(f"{what}; choose another folder with --to")
    revisions = {}
    try:
        for part, model in wanted.items():
            what = f"{part} '{model}'" + (f" ({tag})" if part == "encoder" and tag else "")
            report(f"{what}: fetching what is missing ...")
            if part == "parser":
                revision = _fetch_parser(what, model, places.get(part))
            else:
                revision = _fetch_repositories(what, part, model, tag, places.get(part))
            there = preset if folder is None else get_preset(preset.name, folder, localiser=preset.localiser)
            if isinstance(error := there.find().get(part), ModelNotFound):  # the loader's own checks
                raise error
            revisions[part] = revision
            report(f"{what}: revision {revision[:12]} is there")
    except OSError as error:
        raise StoreError(explain_write_error(error, folder or Path())) from error
    return revisions


def _fetch_repositories(what: str, part: str, model: str, tag: str, place: Path | None) -> str:
    """A captioner, an object detector, an encoder; a tag's folder gets open_clip's local-dir settings."""
    if part != "encoder":
        return _fetch(what, place, model, _WEIGHTS, _SIDE)
    if model.startswith("hf-hub:"):
        return _fetch(what, place, model.removeprefix("hf-hub:"), _OPEN_CLIP_WEIGHTS, _SIDE)
    repo, weights, settings = of_hub(model.replace("/", "-"), tag)
    # tokenizers other than CLIP's own, and foreign text towers, lie in a repository that the model names
    text = settings["model_cfg"]["text_cfg"]
    texts = {text.get("hf_tokenizer_name"), text.get("hf_model_name")} - {None, ""}
    revision = _fetch(what, place, repo, weights, _SIDE if repo in texts else ())
    for other in sorted(texts - {repo}):
        _fetch(what, place, other, (), _SIDE)
    if place is not None:
        if settings.pop("quick_gelu"):
            settings["model_cfg"]["quick_gelu"] = True
        (place / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return revision


def _fetch(what: str, place: Path | None, repo: str, weights: Sequence[str], side: Sequence[str]) -> str:
    """Fetch side files and the first kind of weights that a repository has; returns the commit."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    try:
        found = HfApi().repo_info(repo, timeout=TIMEOUT_S)
        names = [file.rfilename for file in found.siblings]
        # in folders below lies the same model for other programs
        names = [name for name in names if "/" not in name and ".fp16." not in name]
        chosen = next(filter(None, (fnmatch.filter(names, kind) for kind in weights)), [])
        if weights and not chosen:
            raise ModelNotFound(f"{what}: the hub's repository '{repo}' holds no weights in a known format")
        snapshot_download(repo, allow_patterns=[*chosen, *side], ignore_patterns="*/*", local_dir=place)
        if place is None and side and "config.json" not in names:
            with contextlib.suppress(OSError):  # it notes that there is none: transformers asks for it
                hf_hub_download(repo, "config.json")
    except Exception as error:  # the hub's library raises errors of several others for a missing network
        if isinstance(error, ModelNotFound) or getattr(error, "errno", None) in _DISK:
            raise
        raise _failed(what, f"'{repo}' at {constants.ENDPOINT}", error) from error
    if place is not None and weights:  # another model's, which was here before, would be read first
        for file in place.iterdir():
            if file.suffix in (".safetensors", ".bin") and file.name not in chosen:
                file.unlink()
    return found.sha


def _fetch_parser(what: str, model: str, place: Path | None) -> str:
    """A spaCy pipeline: into the environment with pip, or its data alone, without code, into a folder."""
    with contextlib.suppress(ModelNotFound):
        return _version(find_parser(place or model).path, model)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        _install_parser(what, model, None if place is None else Path(scratch))
        found = find_parser(model if place is None else Path(scratch) / model).path
        if place is not None:
            unfinished = place.with_name(".parser")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(found, unfinished, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
            shutil.rmtree(place, ignore_errors=True)
            found = unfinished.rename(place)
        return _version(found, model)


def _install_parser(what: str, model: str, target: Path | None) -> None:
    """Let pip fetch the release of a pipeline for this spaCy, into the environment or a folder."""
    from spacy import about

    name = f"{model}-{about.__version__.rpartition('.')[0]}.0"
    address = f"{about.__download_url__}/{name}/{name}-py3-none-any.whl"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--retries=0",
        f"--timeout={TIMEOUT_S:.0f}",
    ]
    where = [] if target is None else ["--target", str(target)]
    done = subprocess.run([*command, *where, address], capture_output=True, text=True)
    if done.returncode:
        raise _failed(what, address, done.stderr.strip().rpartition("\n")[2] or "pip failed")


def _version(folder: Path, model: str) -> str:
    """Version of a pipeline; nothing where a folder holds another one, or none."""
    meta = read_json(folder / "meta.json")
    return str(meta.get("version")) if f"{meta.get('lang')}_{meta.get('name')}" == model else ""


def _failed(what: str, where: str, error: BaseException | str) -> ModelNotFound:
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return ModelNotFound(
        what,
        reason=f"cannot be fetched from {where} ({kind}{one_line(error)})",
        remedy="Check its name; where its page asks for consent, give it and log in with `hf auth login`; "
        "without a network fetch it elsewhere with `--to FOLDER`, copy FOLDER here and name it with "
        "`--models FOLDER`; or use preset 'mini'",
    )
