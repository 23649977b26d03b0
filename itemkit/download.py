"""Fetch the models of a preset once: into the hub's cache, or into a folder for machines without a network.

Everything that is fetched is data: weights as safetensors (where a model has none, its .bin is read
weights-only and, in a folder, rewritten), configuration and tokenizer; never code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import itemkit
from itemkit._files import explain_write_error, write_json
from itemkit.encoder import CONFIG_FILE, find_encoder
from itemkit.errors import InputError, ModelNotFound, StoreError
from itemkit.models import ANY_PRESET, find_folder, first_line, load_transformer, looks_like_path, tidy
from itemkit.objects import find_parser
from itemkit.presets import MODELS_VARIABLE, Preset, get_preset

TIMEOUT_S = 10.0  # for a first answer, not for a whole download
PARSER_TIMEOUT_S = 900.0  # a spaCy pipeline has 12 to 600 MB
PIP_TIMEOUT_S = 15


@dataclass(frozen=True)
class Listing:
    """What a repository of the hub holds: its commit, and each file's SHA-256 ("" where it does not say)."""

    revision: str
    files: dict[str, str]


def list_repository(repo: str, what: str) -> Listing:
    """Ask the hub what a repository holds.

    Parameters
    ----------
    repo : str
        "owner/name".
    what : str
        What it is wanted for, to begin an error with.

    Raises
    ------
    ModelNotFound
        The hub cannot be reached, or has no such repository.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(repo, files_metadata=True, timeout=TIMEOUT_S)
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{what}: the hub asks for consent before '{repo}' can be fetched. Give it on the model's page, "
            "log in with `hf auth login` and run the command again"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(f"{what}: the hub has no repository '{repo}' (or none for you)") from error
    except Exception as error:  # the hub's library raises errors of several others for a missing network
        raise unreachable(what, constants.ENDPOINT, error) from error
    return Listing(info.sha or "", {f.rfilename: f.lfs.sha256 if f.lfs else "" for f in info.siblings or ()})


def fetch_file(repo: str, name: str, expected_sha256: str, cache: Path | None = None) -> Path:
    """Fetch one file of a repository into a cache; what is there already is not fetched again.

    File by file, never as a snapshot: for a snapshot the hub's library notes what else the repository holds,
    and from then on takes the cached one for incomplete.

    Parameters
    ----------
    repo, name : str
        Repository and file.
    expected_sha256 : str
        As the repository lists it; "" to go without.
    cache : Path, optional
        Instead of the hub's own cache.

    Returns
    -------
    Path
        Inside the cache, which keeps the hub's layout.

    Raises
    ------
    ModelNotFound
        No answer, or the file arrived damaged (it is removed then).
    """
    from huggingface_hub import constants, hf_hub_download

    try:
        path = Path(hf_hub_download(repo, name, cache_dir=cache, etag_timeout=TIMEOUT_S))
    except Exception as error:  # as above
        cause = error.__cause__ or error  # the library's own words are that something happened
        raise unreachable(f"'{name}' of '{repo}'", constants.ENDPOINT, cause) from error
    if expected_sha256 and sha256(path) != expected_sha256:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise ModelNotFound(
            f"'{name}' of '{repo}' arrived damaged (its SHA-256 is not the hub's); run the command again"
        )
    return path


def note_absent(repo: str, name: str, cache: Path | None = None) -> None:
    """Let the cache note that a repository lacks a file.

    transformers asks for ``config.json`` beside every tokenizer, and without a network only such a note lets
    it do without.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(repo, name, cache_dir=cache, etag_timeout=TIMEOUT_S)


def require_parser(model: str, what: str) -> None:
    """Raise unless spaCy's table of releases can be read and has a pipeline; spaCy's own try may hang."""
    from spacy import about

    try:
        with urllib.request.urlopen(about.__compatibility__, timeout=TIMEOUT_S) as answer:
            known = {name for table in json.load(answer)["spacy"].values() for name in table}
    except (OSError, ValueError, KeyError) as error:
        raise unreachable(what, about.__compatibility__, error) from error
    if model not in known:
        raise ModelNotFound(f"{what}: spaCy has no pipeline of that name; see https://spacy.io/models")


def install_parser(model: str, target: Path | None = None) -> None:
    """Let spaCy and pip fetch a pipeline, into the environment or, as a package, into a folder."""
    where = [] if target is None else ["--target", str(target)]
    command = [sys.executable, "-m", "spacy", "download", model, "--no-deps", *where]
    environment = os.environ | {"PIP_DEFAULT_TIMEOUT": str(PIP_TIMEOUT_S), "PIP_RETRIES": "1"}
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PARSER_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(f"parser '{model}': no end of the download in {error.timeout:.0f} s") from error
    if run.returncode:
        said = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        raise ModelNotFound(
            f"parser '{model}': `python -m spacy download {model}` failed: {said[-1] if said else 'silently'}"
        )


def unreachable(what: str, address: str, error: BaseException) -> ModelNotFound:
    """Build the one error for a missing network; ``ANY_PRESET`` in it stands for the preset's name."""
    return ModelNotFound(
        f"{what} cannot be fetched: no answer from {address} ({first_line(error)}). Run `itemkit download "
        f"--preset {ANY_PRESET} --to FOLDER` on a machine with a network, copy FOLDER here and name it with "
        "`--models FOLDER`; or use the models that come with itemkit: preset 'mini'."
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file as it lies on the disk now, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MODELS_FILE = "models.json"
FOLDERS = {"captioner": "captioner", "parser": "parser", "localiser": "detector", "encoder": "encoder"}
CLIP_WEIGHTS = "open_clip_model.safetensors"

_CACHE = ".fetching"  # inside the target folder: what an interrupted run has fetched, so that it can go on
_SIDE_FILES = (".json", ".txt", ".model", ".jinja")
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")


@dataclass(frozen=True)
class Plan:
    """What is to be fetched for one part: files of each repository, the part's own repository first."""

    part: str
    model: str
    pretrained: str | None = None
    repositories: dict[str, Listing] = field(default_factory=dict)
    """Of each repository the files to take, with their hashes."""

    @property
    def what(self) -> str:
        """The part in words, as the loaders name it."""
        kind = "detector" if self.part == "localiser" else self.part
        return f"{kind} '{self.model}'" + (f" ({self.pretrained})" if self.pretrained else "")

    @property
    def by_tag(self) -> bool:
        """Whether this is a model that open_clip knows by name and tag."""
        return self.part == "encoder" and not self.model.startswith("hf-hub:")


def download(
    preset: str | Preset, to: str | Path | None = None, report: Callable[[str], Any] | None = None
) -> dict[str, Any]:
    """Fetch all models of a preset.

    Parameters
    ----------
    preset : str or Preset
        Whose models; a part that is an object, a local folder or None is left out.
    to : path, optional
        Folder to fill: ``captioner``, ``parser``, ``encoder``, ``detector``, each complete and readable
        without a network, and ``models.json``; ``get_preset(name, folder=to)`` reads it. Without it the
        models go where the loaders look by themselves: the hub's cache, and the Python environment for
        spaCy's.
    report : callable, optional
        Gets a line about each model, e.g. ``print``.

    Returns
    -------
    dict
        As in ``models.json``: for each part the model, its revision, its files with their SHA-256.

    Raises
    ------
    ModelNotFound
        The hub cannot be reached or has no such model; told within seconds, before anything is fetched.
    InputError
        The preset has nothing to fetch, or the folder holds something else.
    """
    chosen = get_preset(preset) if isinstance(preset, str) else preset
    say = report or (lambda line: None)
    wanted = _wanted(chosen)
    folder = None if to is None else Path(os.path.abspath(os.path.expanduser(to)))
    noted = _read_notes(folder)
    done = {part: noted[part] for part, asked in wanted.items() if _is_whole(folder, noted.get(part), asked)}
    for part, entry in done.items():
        say(f"{part:10s} {_told(entry)}: there already")
    try:
        _refuse_foreign(folder, [part for part in wanted if part not in noted])
        plans = [_plan(part, *asked) for part, asked in wanted.items() if part not in done]
        with _cache_in(folder) as cache:
            for plan in plans:
                say(f"{plan.part:10s} fetching {plan.what} ...")
                done[plan.part] = _fetch(plan, folder, cache, noted | done, chosen.name)
                say(f"{plan.part:10s} {_told(done[plan.part])}")
    except OSError as error:
        raise StoreError(explain_write_error(error, folder or Path())) from error
    except ModelNotFound as error:
        raise ModelNotFound(str(error).replace(ANY_PRESET, chosen.name)) from error
    there = chosen if folder is None else get_preset(chosen.name, folder)
    lost = [str(e) for part, e in there.find().items() if part in done and isinstance(e, ModelNotFound)]
    if lost:
        raise ModelNotFound(" ".join(lost))
    if folder is not None:
        shutil.rmtree(folder / _CACHE, ignore_errors=True)
    return _notes(done, chosen.name)


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
        if isinstance(model, str) and not looks_like_path(model) and not (tag and Path(tag).suffix)
    }
    if not wanted:
        if os.environ.get(MODELS_VARIABLE):
            remedy = "unset that variable to fetch them"
            raise InputError(f"preset '{preset.name}' reads its models from {MODELS_VARIABLE}; {remedy}")
        raise InputError(
            f"preset '{preset.name}' has nothing to download: its models are folders on this machine. The "
            "mini models come with the repository (data/mini; `make lab` trains them anew); `--preset fast` "
            "and `--preset paper` are fetched"
        )
    return wanted


# ------------------------------------------------------------------------------------- what is to be fetched


def _plan(part: str, model: str, tag: str | None) -> Plan:
    plan = Plan(part, model, tag)
    if part == "parser":
        if not _is_installed(model):
            require_parser(model, plan.what)
    elif plan.by_tag:
        _plan_tag(plan)
    elif part == "encoder":
        _add(plan, model.removeprefix("hf-hub:"), _open_clip_files)
    else:
        _add(plan, model, _transformers_files)
    return plan


def _plan_tag(plan: Plan) -> None:
    import open_clip

    with contextlib.suppress(ModelNotFound):  # an unknown name or tag is told before any request
        find_encoder(plan.model, plan.pretrained)
    name = plan.model.replace("/", "-")
    place = open_clip.get_pretrained_cfg(name, plan.pretrained).get("hf_hub") or ""
    repo, _, file = place.rpartition("/")
    if not repo:
        raise ModelNotFound(f"{plan.what}: open_clip names no repository of the hub for these weights")
    # tokenizers other than CLIP's own, and foreign text towers, lie in a repository that the model names
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    text_repos = {text.get("hf_tokenizer_name"), text.get("hf_model_name")} - {None, ""}
    safe = Path(file).with_suffix(".safetensors").name if file else CLIP_WEIGHTS

    def own(names: Sequence[str]) -> list[str]:
        # in this order, as the loader looks for them
        weights = [n for n in (safe, file or "open_clip_pytorch_model.bin") if n in names]
        return weights[:1] + (_side_files(names) if weights and repo in text_repos else [])

    _add(plan, repo, own)
    for other in sorted(text_repos - {repo}):
        _add(plan, other, _side_files)


def _add(plan: Plan, repo: str, choose: Callable[[Sequence[str]], list[str]]) -> None:
    listing = list_repository(repo, plan.what)
    names = choose(list(listing.files))
    if not names:
        raise ModelNotFound(f"{plan.what}: the hub's repository '{repo}' holds no weights in a known format")
    plan.repositories[repo] = Listing(listing.revision, {n: listing.files[n] for n in sorted(names)})


def _transformers_files(names: Sequence[str]) -> list[str]:
    """Weights (safetensors where there are any), configuration and tokenizer of a repository; no code."""
    weights = [n for n in names if _WEIGHTS.fullmatch(n)]
    chosen = [n for n in weights if n.endswith(".safetensors")] or weights
    return [*chosen, *_side_files(names)] if chosen and "config.json" in names else []


def _open_clip_files(names: Sequence[str]) -> list[str]:
    weights = [n for n in (CLIP_WEIGHTS, "open_clip_pytorch_model.bin") if n in names]
    return [*weights[:1], *_side_files(names)] if weights and CONFIG_FILE in names else []


def _side_files(names: Sequence[str]) -> list[str]:
    return [n for n in names if "/" not in n and n.endswith(_SIDE_FILES)]


# --------------------------------------------------------------------------------- fetching and laying out


def _fetch(
    plan: Plan, folder: Path | None, cache: Path | None, noted: dict[str, Any], preset: str
) -> dict[str, Any]:
    fetched = {
        repo: {name: fetch_file(repo, name, digest, cache) for name, digest in listing.files.items()}
        for repo, listing in plan.repositories.items()
    }
    for repo, found in fetched.items():
        if plan.by_tag and "tokenizer_config.json" in found and "config.json" not in found:
            note_absent(repo, "config.json", cache)
    repo = next(iter(fetched), "")
    entry: dict[str, Any] = {"model": plan.model, "pretrained": plan.pretrained, "repository": repo}
    if folder is None or cache is None:
        if plan.part == "parser":
            if not _is_installed(plan.model):
                install_parser(plan.model)
            place = find_parser(plan.model).path
            return entry | {"revision": _version(place), "files": _hashes(place)}
        files = {name: sha256(path) for name, path in fetched[repo].items()}
        return entry | {"revision": plan.repositories[repo].revision, "files": files}
    target = folder / FOLDERS[plan.part]
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        if plan.part == "parser":
            _lay_out_parser(plan.model, made, Path(scratch))
        elif plan.by_tag:
            _lay_out_tag(plan, made)
        else:
            _lay_out_repository(plan, fetched[repo], made)
        revision = plan.repositories[repo].revision if repo else _version(made)
        entry |= {"revision": revision, "folder": target.name, "files": _hashes(made)}
        # noted first: should the run end here, the next one knows the folder for its own and replaces it
        write_json(folder / MODELS_FILE, _notes(noted | {plan.part: entry}, preset))
        if target.exists():
            shutil.rmtree(target)
        made.replace(target)
    return entry


def _lay_out_parser(model: str, made: Path, scratch: Path) -> None:
    if _is_installed(model):
        source = find_parser(model).path
    else:
        install_parser(model, scratch / "site")
        source = find_parser(scratch / "site" / model).path
    shutil.copytree(source, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.py"))


def _lay_out_repository(plan: Plan, fetched: dict[str, Path], made: Path) -> None:
    """Copy files as they are; a .bin is read weights-only and written as safetensors."""
    for name, path in fetched.items():
        shutil.copyfile(path, made / name)
    old = [p for p in made.iterdir() if p.suffix == ".bin"]
    if not old:
        return
    if plan.part == "encoder":
        import torch
        from safetensors.torch import save_file

        state = torch.load(old[0], map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        save_file({k: v.contiguous().clone() for k, v in state.items()}, made / CLIP_WEIGHTS)
    else:
        import transformers

        detector = plan.part == "localiser"
        kind = "AutoModelForZeroShotObjectDetection" if detector else "AutoModelForImageTextToText"
        located = find_folder(made, plan.what)
        load_transformer(getattr(transformers, kind), located).save_pretrained(made)
    for path in (*old, *made.glob("*.bin.index.json")):
        path.unlink()


def _lay_out_tag(plan: Plan, made: Path) -> None:
    """Write open_clip's local-dir of a named model; it has to give what the named model gives."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    from itemkit.encoder import load_encoder

    source = find_encoder(plan.model, plan.pretrained)
    encoder = load_encoder(plan.model, plan.pretrained, "cpu", "float32")
    config = open_clip.get_model_config(source.open_clip_name)
    if source.quick_gelu:
        config["quick_gelu"] = True
    own_tokenizer = getattr(encoder.tokenizer, "tokenizer", None)
    if own_tokenizer is not None:
        own_tokenizer.save_pretrained(made)
    known = encoder.model.visual.preprocess_cfg
    preprocess = {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in known}
    body = {"model_cfg": config, "preprocess_cfg": preprocess}
    (made / CONFIG_FILE).write_text(json.dumps(body, indent=2) + "\n")
    if source.checkpoint.suffix == ".safetensors":
        shutil.copyfile(source.checkpoint, made / CLIP_WEIGHTS)
    else:
        state = {k: v.contiguous() for k, v in encoder.model.state_dict().items()}
        save_file(state, made / CLIP_WEIGHTS)

    def answers(model: Any) -> torch.Tensor:
        height, width = model.image_size
        pixels = torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)
        return torch.cat([model.encode_images(pixels).pooled, model.encode_texts(["a photo of a dog"])])

    before, settings = answers(encoder), encoder.fingerprint()["preprocess"]
    del encoder  # two large towers at once are not needed
    copy = load_encoder(made, device="cpu", precision="float32")
    if not torch.equal(answers(copy), before) or copy.fingerprint()["preprocess"] != settings:
        raise ModelNotFound(
            f"{plan.what} gives other embeddings from a folder than by name; fetch it without --to"
        )


@contextlib.contextmanager
def _cache_in(folder: Path | None) -> Iterator[Path | None]:
    """Let the loaders look into a folder's own cache for as long as the folder is filled."""
    if folder is None:
        yield None
        return
    from huggingface_hub import constants

    cache, before = folder / _CACHE, constants.HF_HUB_CACHE
    cache.mkdir(parents=True, exist_ok=True)
    constants.HF_HUB_CACHE = str(cache)
    try:
        yield cache
    finally:
        constants.HF_HUB_CACHE = before


# ---------------------------------------------------------------------------------------- what was fetched


def _notes(entries: dict[str, Any], preset: str) -> dict[str, Any]:
    order = {part: entries[part] for part in FOLDERS if part in entries}
    made = time.strftime("%Y-%m-%d")
    return {"itemkit": itemkit.__version__, "preset": preset, "fetched": made, "models": order}


def _read_notes(folder: Path | None) -> dict[str, Any]:
    file = None if folder is None else folder / MODELS_FILE
    if file is None or not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text())["models"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{tidy(file)} is not what `itemkit download` writes; choose another folder"
        ) from error


def _is_whole(folder: Path | None, entry: Any, asked: tuple[str, str | None]) -> bool:
    """Whether a part was fetched before and all its files still have their hashes."""
    if folder is None or not entry or (entry["model"], entry["pretrained"]) != asked:
        return False
    place = folder / entry["folder"]
    return all((place / n).is_file() and sha256(place / n) == h for n, h in entry["files"].items())


def _refuse_foreign(folder: Path | None, parts: Sequence[str]) -> None:
    for part in parts:
        if folder is not None and (place := folder / FOLDERS[part]).exists():
            raise InputError(
                f"{tidy(place)} was not made by `itemkit download`; choose another folder with --to"
            )


def _is_installed(parser: str) -> bool:
    with contextlib.suppress(ModelNotFound):
        find_parser(parser)
        return True
    return False


def _version(parser: Path) -> str:
    return str(json.loads((parser / "meta.json").read_text()).get("version", ""))


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix(): sha256(p) for p in files}


def _told(entry: dict[str, Any]) -> str:
    tag = f" ({entry['pretrained']})" if entry["pretrained"] else ""
    return f"{entry['model']}{tag}, revision {entry['revision'][:12] or '?'}, {len(entry['files'])} files"
