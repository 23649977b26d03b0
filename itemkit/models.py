"""Finding model files on this machine, hashing them, and loading them without network or surprises.

Loaders never download: they look in a folder or in the model hub's local cache, so a machine without a
network fails in seconds and a run never changes because somebody uploaded a newer file. `itemkit download`
fetches.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from itemkit.errors import InputError, ModelNotFound

ANY_PRESET = "NAME"  # stands for the preset's name in messages of loaders, which do not know it
REMEDY = (
    f" Fetch it once where a model hub can be reached with `itemkit download --preset {ANY_PRESET}`, name a "
    "folder that holds it (--models, or ITEMKIT_MODELS), or use the models that come with itemkit: preset "
    "'mini'."
)
# What the model libraries raise for damaged, cut off or foreign files.
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    SafetensorError,
    UnpicklingError,
)
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.\w+")
_MODEL_FILES = ("config.json", "open_clip_config.json", "config.cfg")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
# What else in a model folder changes the numbers: configuration, tokenizer, preprocessing.
_CONFIG_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# Keys that checkpoints written by older versions lack and that are no weights.
_HARMLESS_MISSING = re.compile(r"position_ids$|attn_mask$|\.attn\.(masked_)?bias$")


PARTS = ("captioner", "parser", "encoder", "localiser")


@dataclass(frozen=True)
class Models:
    """The models of a run. `presets.Preset.build` makes them; anything with the same methods will do.

    Attributes
    ----------
    encoder : Encoder
        Images and texts to the joint space.
    captioner : Captioner or None
        Images to captions; None where every image has one of its own.
    parser : Parser or None
        Captions to phrases; None, like no localiser, for global features only.
    localiser : Localiser or None
        Phrases to regions.
    """

    encoder: Any
    captioner: Any = None
    parser: Any = None
    localiser: Any = None

    def fingerprint(self, captions: str = "generate") -> dict[str, Any]:
        """Everything about the models that changes the numbers, JSON-ready.

        Parameters
        ----------
        captions : {"generate", "user"}
            Where captions come from.

        Returns
        -------
        dict
            A dict per part (None where it is left out), ``captions``, and with users' captions the version of
            the rules that clean them.
        """
        return run_fingerprint({name: getattr(self, name) for name in PARTS}, captions)


def run_fingerprint(parts: dict[str, Any], captions: str) -> dict[str, Any]:
    """Put together the fingerprints of the parts, given as objects or as fingerprints."""
    from itemkit.captions import CLEAN_VERSION

    found: dict[str, Any] = {}
    for name in PARTS:
        part = parts[name]
        found[name] = part if part is None or isinstance(part, dict) else part.fingerprint()
    found["captions"] = captions
    if captions == "user":
        found["caption_cleaning"] = CLEAN_VERSION
    return found


def differences(
    stored: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None, ignore: Collection[str] = ()
) -> list[str]:
    """Say in what two fingerprints differ.

    Parameters
    ----------
    stored, wanted : nested mapping, or None for an unknown one
    ignore : names
        Parts ("localiser"), dotted keys ("captioner.decoding") or keys at any depth ("precision"). Who ignores
        "captions" ignores how they were cleaned, too.

    Returns
    -------
    list of str
        Empty if they agree; else lines as ``encoder.files_sha256: 'ab...' there, 'cd...' here``.
    """
    skip = {*ignore, *(("caption_cleaning",) if "captions" in ignore else ())}

    def walk(there: Mapping[str, Any], here: Mapping[str, Any], above: str) -> Iterator[str]:
        for key in sorted({*there, *here}):
            name = above + key
            if key in skip or name in skip:
                continue
            a, b = there.get(key), here.get(key)
            if isinstance(a, Mapping) and isinstance(b, Mapping):
                yield from walk(a, b, name + ".")
            elif a != b:
                yield f"{name}: {_short(a)} there, {_short(b)} here"

    return list(walk(stored or {}, wanted or {}, ""))


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


@dataclass(frozen=True)
class Located:
    """Where a model was found.

    Attributes
    ----------
    what : str
        What was asked for, in words.
    path : Path
        The folder, or the one weights file, that will be read.
    revision : str
        Commit of the model hub, or "" for a folder that is not from the hub.
    """

    what: str
    path: Path
    revision: str = ""


def not_found(what: str, looked: str | Path, reason: str = "") -> ModelNotFound:
    """Build the one error for a model that is not on this machine.

    Parameters
    ----------
    what : str
        What was asked for.
    looked : str or Path
        Where it was looked for.
    reason : str
        What exactly is missing there.
    """
    where = f"{tidy(looked)}: {reason}" if reason else tidy(looked)
    return ModelNotFound(f"{what} is not on this machine (looked in {where}).{REMEDY}")


def tidy(path: str | Path) -> str:
    """Write the home folder as ``~``, so that no message carries somebody's user name."""
    text, home = str(path), str(Path.home())
    return "~" + text[len(home) :] if len(home) > 1 and text.startswith(home) else text


def looks_like_path(model: str | Path) -> bool:
    """Tell a folder from a model's name: a Path, a text written like one, or a folder that holds a model."""
    text = str(model)
    if isinstance(model, Path) or text.startswith((".", "/", "~", "\\")):
        return True
    return any((Path(text) / file).is_file() for file in _MODEL_FILES)


def hub_cache() -> Path:
    """Folder in which the Hugging Face hub keeps what was downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_folder(model: str | Path, what: str) -> Located:
    """Find a transformers model: a local folder, or a hub name in the local cache.

    Parameters
    ----------
    model : str or Path
        Folder, or name such as "Salesforce/blip-image-captioning-base".
    what : str
        Words for the error, e.g. "captioner".

    Raises
    ------
    ModelNotFound
        Neither a folder nor in the cache, or the folder holds no configuration or no weights.
    """
    called = f"{what} '{tidy(Path(model).expanduser() if looks_like_path(model) else model)}'"
    if looks_like_path(model):
        folder, revision = Path(model).expanduser(), ""
        if not folder.is_dir():
            raise not_found(called, folder, "no such folder")
    else:
        folder = cached_snapshot(str(model), called)
        revision = folder.name
    if not (folder / "config.json").is_file():
        raise not_found(called, folder, "no config.json")
    if not weight_files(folder):
        raise not_found(called, folder, "no weights (*.safetensors, *.bin)")
    if lost := missing_shards(folder):
        raise not_found(called, folder, f"the weights are not whole, e.g. {lost[0]} is missing")
    return Located(called, folder, revision)


def cached_snapshot(repository: str, called: str) -> Path:
    """Find the folder in which the hub's cache keeps a repository's main revision, whole or in part.

    ``snapshot_download(local_files_only=True)`` will not do: it refuses a snapshot that lacks any file of the
    repository, also one nobody needs (the same weights in another format), and takes one of which it knows no
    list of files, however little of it there is. What is needed is for the caller to check.

    Parameters
    ----------
    repository : str
        "owner/name".
    called : str
        Words for the error.

    Raises
    ------
    ModelNotFound
        Nothing of it is in the cache.
    """
    place = hub_cache() / f"models--{repository.replace('/', '--')}"
    try:
        folder = place / "snapshots" / (place / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise not_found(called, hub_cache()) from error
    if not folder.is_dir():
        raise not_found(called, place, "its files are missing")
    return folder


def missing_shards(folder: Path) -> list[str]:
    """Files that weights in several parts need and that are not there, their index included."""
    files = weight_files(folder)
    if not files or (folder / "model.safetensors").is_file():
        return []  # the one file is taken first
    if files[0].suffix == ".bin" and (folder / "pytorch_model.bin").is_file():
        return []
    needed: set[str] = set()
    for file in files:
        if part := _SHARD.fullmatch(file.name):
            needed.add(f"{part[1]}{file.suffix}.index.json")
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        with suppress(
            OSError, ValueError, KeyError, AttributeError
        ):  # transformers says what is wrong with it
            needed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(name for name in needed if not (folder / name).is_file())


def weight_files(folder: Path) -> list[Path]:
    """Weights in a folder; when there are safetensors, only those, because loaders prefer them."""
    files = sorted(f for f in folder.iterdir() if f.suffix in WEIGHT_SUFFIXES and f.is_file())
    safe = [f for f in files if f.suffix == ".safetensors"]
    return safe or files


def folder_hash(folder: Path, recursive: bool = False) -> str:
    """SHA-256 over names and contents of everything in a model folder that changes its numbers."""
    if recursive:  # spaCy: every file counts, except what Python or a reader leaves behind
        files = [f for f in folder.rglob("*") if f.is_file() and f.suffix not in (".pyc", ".py", ".md")]
    else:
        files = [f for f in folder.iterdir() if f.is_file() and f.suffix in _CONFIG_SUFFIXES]
        files += weight_files(folder)
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        digest.update(f"{file.relative_to(folder).as_posix()}={file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file; computed once per path, size and modification time."""
    path = Path(path).resolve()
    stat = path.stat()
    return _file_hash(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' and the hub's warnings and progress bars off the terminal and out of notebooks."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


@contextmanager
def from_disk_only() -> Iterator[None]:
    """Keep the model libraries off the network, and quiet, while a model loads.

    Set in the process rather than by HF_HUB_OFFLINE, which is read only once, when the hub's library is
    imported.
    """
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        with quiet():
            yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def load_transformer(auto_class: Any, located: Located, **options: Any) -> Any:
    """Load a transformers model from a folder, whole or not at all.

    ``from_pretrained`` fills weights that the file lacks with random numbers and only logs it; here that is
    an error. No code from the folder is run, and no pickle is read other than weights-only.

    Parameters
    ----------
    auto_class : transformers model class
        Anything with ``from_pretrained``.
    located : Located
        From `find_folder`.
    **options
        Passed on.
    """
    try:
        with from_disk_only():
            model, info = auto_class.from_pretrained(
                located.path,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except UNREADABLE as error:
        raise ModelNotFound(
            f"{located.what} was found in {tidy(located.path)} but cannot be loaded: {first_line(error)}"
        ) from error
    missing = [k for k in info["missing_keys"] if not _HARMLESS_MISSING.search(k)]
    wrong = [str(k[0] if isinstance(k, (tuple, list)) else k) for k in info["mismatched_keys"]]
    refuse_partial(located, missing, wrong)
    return model.eval()


def refuse_partial(located: Located, missing: Sequence[str], wrong_shape: Sequence[str]) -> None:
    """Raise if a checkpoint does not hold all weights of its model."""
    if missing or wrong_shape:
        kinds = [(len(missing), "missing"), (len(wrong_shape), "of another shape")]
        count = " and ".join(f"{n} {kind}" for n, kind in kinds if n)
        first = sorted([*missing, *wrong_shape])[0]
        raise InputError(
            f"{located.what}: the weights in {tidy(located.path)} do not fit the configuration beside them "
            f"({count}, e.g. '{first}'); random numbers would take their place. Fetch the model again."
        )


def first_line(error: BaseException) -> str:
    """First non-empty line of an error's text, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
