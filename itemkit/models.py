"""The models of a run as one record with one fingerprint; and model folders: found, checked, hashed, loaded.

A model folder is data from anywhere. No code in it runs and nobody is asked; nothing is downloaded
while loading (`itemkit download` fetches), and nothing that a folder lacks is replaced by a library's default
or by random numbers. Whatever is wrong is said before the weights are read, in one line with one remedy.

Nothing that a fingerprint needs imports torch: to know what would be loaded takes no loading.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from itemkit.errors import InputError, ItemkitError, ModelNotFound

# -- the models of a run -------------------------------------------------------------------------------------

METHODS = {
    "captioner": ("caption",),
    "parser": ("objects",),
    "encoder": ("preprocess", "encode_images", "encode_texts", "count_tokens"),
    "localiser": ("locate",),
}
"""The parts, and what each must be able to do."""
PARTS = tuple(METHODS)
LOCALISERS: dict[str, dict[str, Any]] = {
    "whole": {},
    "grid": {"scales": (1.0, 0.7, 0.45), "overlap": 0.5},
    "dense": {"temperature": None, "level": 0.5},
    "owlv2": {"model": "google/owlv2-base-patch16-ensemble", "threshold": 0.1, "precision": "auto"},
    "grounding_dino": {
        "model": "IDEA-Research/grounding-dino-base", "threshold": 0.25, "precision": "float32",
    },
}  # fmt: skip
"""Localisers by name, with the defaults of those options that change the regions; see `regions`."""
GRID_MAX_STEPS = 12  # windows per axis and scale of "grid"; bounds the work on panoramas


@dataclass(frozen=True)
class Models:
    """The models of a run. `presets.Preset.build` makes them; anything with the same methods will do.

    One's own captioner is a class with ``caption(images) -> list of str`` (or of `captions.Caption`); one's
    own localiser has ``boxes(image, phrases) -> list of (x0, y0, x1, y1, score) or None``, or all of
    `regions.Localiser`. Each says which answers it gives, so that features of different ones are never mixed
    up: by a ``version`` that is raised whenever the answers change, or by ``fingerprint() -> dict``.

    >>> class Captions:
    ...     version = "1"
    ...     def caption(self, images):
    ...         return [f"a picture of {image.width} pixels" for image in images]
    >>> from itemkit.presets import get_preset
    >>> get_preset("mini", captioner=Captions()).captioner.version
    '1'

    On the command line such a class is named by module and name: ``--captioner my_module:Captions``.

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

    Raises
    ------
    InputError
        A part lacks a method.
    """

    encoder: Any
    captioner: Any = None
    parser: Any = None
    localiser: Any = None

    def __post_init__(self) -> None:
        if hasattr(self.localiser, "boxes") and not hasattr(self.localiser, "locate"):
            from itemkit.regions import BoxLocaliser

            object.__setattr__(self, "localiser", BoxLocaliser(self.encoder, self.localiser))
        for name, methods in METHODS.items():
            part = getattr(self, name)
            lacks = [method for method in methods if not callable(getattr(part, method, None))]
            if part is not None and lacks:
                kind = part.__name__ if isinstance(part, type) else type(part).__name__
                raise InputError(
                    f"the {name} {kind} has no method {lacks[0]}(); a {name} needs {', '.join(methods)}. "
                    "itemkit.models.Models shows an example"
                )

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
            the rules that clean them. The same on every device.
        """
        return run_fingerprint({name: getattr(self, name) for name in PARTS}, captions)


def run_fingerprint(parts: Mapping[str, Any], captions: str) -> dict[str, Any]:
    """Put together the fingerprints of the parts, each given as a model or as its fingerprint."""
    from itemkit.captions import CLEAN_VERSION

    found: dict[str, Any] = {name: part_fingerprint(name, parts[name]) for name in PARTS}
    found["captions"] = captions
    if captions == "user":
        found["caption_cleaning"] = CLEAN_VERSION
    return found


def part_fingerprint(name: str, part: Any) -> dict[str, Any] | None:
    """What a part says of itself, as it will be read back from JSON; its class and ``version`` if no more."""
    if part is None or isinstance(part, dict):
        found = part
    elif callable(getattr(part, "fingerprint", None)):
        found = part.fingerprint()
    elif getattr(part, "version", None) is not None:
        kind = type(part)
        found = {"kind": "own", "class": f"{kind.__module__}.{kind.__qualname__}", "version": part.version}
    else:
        raise InputError(
            f"the {name} {type(part).__name__} does not say which answers it gives, and features made with "
            "different ones must not be mixed up: add `version = '1'` to it and raise that whenever its "
            "answers change, or a method fingerprint() that returns a dict"
        )
    try:
        return json.loads(json.dumps(found))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the fingerprint of the {name} {type(part).__name__} is not JSON: {error}"
        ) from None


def differences(
    stored: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None, ignore: Collection[str] = ()
) -> list[str]:
    """Say in what two fingerprints differ.

    Parameters
    ----------
    stored, wanted : nested mapping, or None for an unknown one
    ignore : names
        Parts ("localiser"), dotted keys ("captioner.decoding") or keys at any depth ("precision"). Who
        ignores "captions" ignores how they were cleaned, too.

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
    return text if len(text) <= 32 else text[:24] + "..."  # a hash need not be read to its end


def unknown(what: str, word: str, known: Iterable[str]) -> InputError:
    """Build the error for a word that is not among the known ones."""
    from itemkit.text import did_you_mean

    return InputError(f"{what}.{did_you_mean(word, known)} Known: {', '.join(known) or 'none'}.")


def names_object(text: Any) -> bool:
    """Whether a text is ``module:object``, for a part of the user's own."""
    return isinstance(text, str) and bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text))


@functools.cache
def own_part(name: str, text: str) -> Any:
    """The object that ``module:object`` names; a class is made an instance of. Looks in this folder, too.

    Raises
    ------
    InputError
        No such module or object.
    """
    module, _, attribute = text.partition(":")
    sys.path.insert(0, os.getcwd())  # not there when the command line's script was started
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{name} '{text}': no module '{error.name}' in this folder or among the installed packages"
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    if not hasattr(found, attribute):
        names = [key for key in vars(found) if not key.startswith("_")]
        raise unknown(f"{name} '{text}': module '{module}' has no '{attribute}'", attribute, names)
    part = getattr(found, attribute)
    return part() if isinstance(part, type) else part


def check_localiser(name: str, options: Iterable[str]) -> None:
    """Refuse a localiser's name, or an option of it, that nobody knows."""
    if name not in LOCALISERS:
        known = [*LOCALISERS, "your own as module:object"]
        raise unknown(f"localiser '{name}' is unknown", name, known)
    known = [*LOCALISERS[name], *(["device"] if "model" in LOCALISERS[name] else [])]
    for key in options:
        if key not in known:
            raise unknown(f"localiser '{name}' has no option '{key}'", key, known)


def localiser_settings(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What of a localiser given by name and options changes the regions, its weights apart."""
    settings = {key: options.get(key, value) for key, value in LOCALISERS[name].items() if key != "model"}
    steps = {"max_steps": GRID_MAX_STEPS} if name == "grid" else {}
    return {"kind": name, **settings, **steps}


# -- finding -------------------------------------------------------------------------------------------------

_MODEL_FILES = ("config.json", "open_clip_config.json", "config.cfg")
# transformers' own order
_TRANSFORMERS_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
# What else in a model folder changes the numbers: configuration, tokenizer, preprocessing.
_CONFIG_SUFFIXES = (".json", ".txt", ".model", ".jinja")
COPY_WHOLE = "Copy the whole model folder, not only its weights, or fetch it again with `itemkit download`."


@dataclass(frozen=True)
class Located:
    """A model's files on this machine, and what can be said of the model before it is loaded."""

    what: str  # what was asked for, in words
    path: Path  # the folder, or the one file of weights, that will be read
    revision: str = ""  # commit of the model hub
    name: str = ""  # of the model on the hub, or of the folder
    weights: tuple[Path, ...] = ()  # the very files that will be loaded

    def fingerprint(self, **settings: Any) -> dict[str, Any]:
        """Everything that changes the model's numbers: its files, and the settings it is used with.

        The one source, before and after loading: the loaded model keeps what this returns.
        """
        files = folder_hash(self.path, self.weights)
        found = {"kind": "transformers", "name": self.name, "revision": self.revision, "files_sha256": files}
        return found | settings

    def refuse(self, reason: str, remedy: str = COPY_WHOLE) -> ModelNotFound:
        """Build the error for a model that is here and cannot be used."""
        reason = f"cannot be used: {reason}"
        return ModelNotFound(self.what, reason=reason, looked=tidy(self.path), remedy=remedy)


def fetch_remedy(preset: str = "", several: bool = False) -> str:
    """What to do about models that are not on this machine; names the preset where it is known."""
    it, folder = ("them", "holds them") if several else ("it", "holds it")
    command = f"itemkit download --preset {preset}" if preset else "itemkit download"
    return (
        f"Fetch {it} once where a model hub can be reached with `{command}`, name a folder that {folder} "
        "(--models, or ITEMKIT_MODELS), or use the models that come with itemkit: preset 'mini'."
    )


def not_found(what: str, looked: str | Path, reason: str = "") -> ModelNotFound:
    """Build the one error for a model that is not on this machine; ``reason`` is what is missing there."""
    where = f"{tidy(looked)}: {reason}" if reason else tidy(looked)
    return ModelNotFound(what, looked=where, remedy=fetch_remedy())


def tidy(path: str | Path) -> str:
    """Write the home folder as ``~``, so that no message carries somebody's user name."""
    place, home = Path(path), Path.home()
    if home == Path(home.anchor) or not place.is_relative_to(home):
        return str(path)
    return str(Path("~") / place.relative_to(home))


def looks_like_path(model: str | Path) -> bool:
    """Tell a folder from a model's name: a Path, a text written like one, or a folder that holds a model."""
    text = str(model)
    if isinstance(model, Path) or text.startswith((".", "/", "~", "\\")):
        return True
    return any((Path(text) / file).is_file() for file in _MODEL_FILES)


def find_place(model: str | Path, part: str) -> Located:
    """Find the folder of a model, given as such or by its hub name; what is in it is for the caller to check.

    A hub name is looked up in the hub's local cache, main revision, be it whole or in part.
    ``snapshot_download(local_files_only=True)`` will not do: it refuses a snapshot that lacks any file of the
    repository, also one nobody needs (the same weights in another format), and takes one of which it knows no
    list of files, however little of it there is.
    """
    if looks_like_path(model):
        folder = Path(model).expanduser()
        what = f"{part} '{tidy(folder)}'"
        if not folder.is_dir():
            raise not_found(what, folder, "a file, not a folder" if folder.exists() else "no such folder")
        return Located(what, folder, "", folder.name)
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    what = f"{part} '{model}'"
    place = cache / f"models--{str(model).removeprefix('hf-hub:').replace('/', '--')}"
    try:
        folder = place / "snapshots" / (place / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        raise not_found(what, cache) from None
    if not folder.is_dir():
        raise not_found(what, place, "its files are missing")
    return Located(what, folder, folder.name, str(model))


def find_folder(model: str | Path, what: str) -> Located:
    """Find a transformers model, in a folder or under its hub name in the local cache, and check its files.

    Parameters
    ----------
    model : str or Path
        Folder, or name such as "Salesforce/blip-image-captioning-base".
    what : str
        Words for the error, e.g. "captioner".

    Raises
    ------
    ModelNotFound
        Neither a folder nor in the cache, or the folder is not whole, damaged, or asks for code of its own.
    """
    located = find_place(model, what)
    folder = located.path
    if (folder / "adapter_config.json").is_file():
        raise located.refuse("it is an adapter of another model", "Merge both, and give the merged folder.")
    if not (folder / "config.json").is_file():
        raise not_found(located.what, folder, "no config.json")
    check_settings(located)
    weights = choose_weights(located, _TRANSFORMERS_WEIGHTS)
    require_tokenizer(located)
    if not (folder / "preprocessor_config.json").is_file():
        if "image_processor" not in _read_json(folder / "processor_config.json"):
            raise located.refuse("preprocessor_config.json is missing, so its image size would be guessed")
    return replace(located, weights=weights)


def choose_weights(located: Located, order: Sequence[str]) -> tuple[Path, ...]:
    """The files of weights that a library loads: the first of ``order`` that is there, and what it lists.

    Raises
    ------
    ModelNotFound
        None, not whole, damaged, or of a kind that is not loaded.
    """
    folder = located.path
    first = next((folder / name for name in order if (folder / name).is_file()), None)
    if first is None:
        raise not_found(located.what, folder, f"no weights ({order[0]}, or its index)")
    files = [first]
    if first.suffix == ".json":
        parts = _read_json(first).get("weight_map")
        names = sorted({str(part) for part in parts.values()}) if isinstance(parts, dict) else []
        if not names or any(part != Path(part).name for part in names):
            raise located.refuse(f"{first.name} does not list files of this folder")
        if lost := [part for part in names if not (folder / part).is_file()]:
            raise not_found(located.what, folder, f"the weights are not whole, e.g. {lost[0]} is missing")
        files += [folder / part for part in names]
    for file in files:
        check_file(file, located, weights=True)
    return tuple(files)


def require_tokenizer(located: Located, folder: Path | None = None) -> None:
    """Refuse a folder without a vocabulary: transformers would invent one of five words."""
    folder = folder or located.path
    alone = ("tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not pair and not any((folder / name).is_file() for name in alone):
        names = "tokenizer.json, or vocab.txt, or vocab.json and merges.txt"
        raise located.refuse(f"its tokenizer is missing ({names})")


def require_vocabulary(located: Located, size: int, room: int | None, reads_text: bool = True) -> None:
    """Refuse a tokenizer of ``size`` entries that cannot be the own one of a model with room for ``room``.

    A model's table of words is often rounded up, never by a tenth. Where a model only writes, a few entries
    too many do no harm.
    """
    if room and not 0.9 * room <= size <= (room if reads_text else room * 1.01):
        raise located.refuse(
            f"its tokenizer has {size:,} entries and its text model {room:,}: one is another's"
        )


# -- folders are not trusted ---------------------------------------------------------------------------------

_CONVERT = (
    "Convert it once, where you trust its source: load it with the program that wrote it, and save its "
    "tensors alone with safetensors.torch.save_file."
)
# keys of settings, the texts that are harmless as their values (None: no value but an empty one), what they
# make a library do, and what to do about it
_FORBIDDEN = (
    (
        "auto_map|trust_remote_code|custom_pipelines|custom_generate|use_kernels|allow_all_kernels"
        "|kernel_config", None, "asks for code of the folder's own, which itemkit never runs",
        "Use a model that the installed libraries know; if they know this one, remove the key.",
    ),
    (
        "_?(attn|experts)_implementation(_internal)?", "eager|sdpa|flex_attention|(grouped|batched)_mm",
        "asks for code from a model hub", "Remove the key.",
    ),
    (
        "timm_model_name", r"[^:/\\]*", "takes the image tower from outside of the folder",
        "Name a model of timm itself there.",
    ),
    ("quantization_config", None, "says that the weights are quantised", "Use it in full precision."),
    (
        "transformers_weights", None, "says that the weights have another name",
        "Name them model.safetensors, and remove the key.",
    ),
)  # fmt: skip
# whether only in weights, what stands at a file's beginning or end, what that means, what to do about it
_SIGNATURES = (
    (
        False, rb"\Aversion https://git-lfs\.github\.com/spec/", "is a Git LFS pointer, not the file itself",
        "Run `git lfs pull` in that folder, or copy the file from where it is whole.",
    ),
    (True, rb"constants\.pkl|/code/", "is a TorchScript archive, which holds code", _CONVERT),
    # torch writes a zip archive, in older versions a pickle
    (True, rb"\A(?!\x80|PK.*PK\x05\x06)", "holds no weights, or only their beginning", COPY_WHOLE),
)  # fmt: skip


def check_settings(located: Located, folder: Path | None = None) -> None:
    """Refuse a folder whose settings are Git LFS pointers, or lead a library to code.

    All JSON files are read, at any depth of nesting: which of them a library looks at is its own affair.
    Python files beside them do no harm as long as nothing names them.
    """
    for file in sorted((folder or located.path).iterdir()):
        if file.suffix not in _CONFIG_SUFFIXES or not file.is_file():
            continue
        check_file(file, located)
        if file.suffix != ".json" or file.name in ("tokenizer.json", "vocab.json"):
            continue
        for key, value in pairs(_read_json(file)):
            for keys, harmless, reason, remedy in _FORBIDDEN:
                if value and re.fullmatch(keys, key):
                    texts = [x for _, x in pairs(value) if isinstance(x, str)]
                    if harmless is None or not all(re.fullmatch(harmless, text) for text in texts):
                        raise located.refuse(f"{file.name} {reason} ('{key}')", remedy)


def pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """A value of nested JSON and all values in it, with their keys; the key of a list's items is ""."""
    waiting = [("", value)]  # no recursion: how deep it is is the file's choice
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend(("", item) for item in value)


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none: the library that needs it says what is wrong."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_file(file: Path, located: Located, weights: bool = False) -> None:
    """Refuse a file of settings or weights that is a pointer, cut off, or an archive of code."""
    size, part = file.stat().st_size, 2**20
    with open(file, "rb") as opened:
        ends = opened.read(part)
        opened.seek(max(part, size - part))
        ends += opened.read()
    pickled = weights and file.suffix not in (".safetensors", ".json", ".npz", ".npy")
    for in_pickles, pattern, reason, remedy in _SIGNATURES:
        if (pickled or not in_pickles) and re.search(pattern, ends, re.DOTALL):
            raise located.refuse(f"{file.name} {reason}", remedy)
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "np"):  # reads the table of contents and compares it with the file's length
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise located.refuse(f"{file.name} is damaged ({error})") from None


# -- hashing -------------------------------------------------------------------------------------------------


def folder_hash(folder: Path, weights: Iterable[Path] | None = None) -> str:
    """SHA-256 over names and contents of everything in a model folder that changes its numbers.

    These are the given files of weights and the settings beside them; or, without ``weights``, every file at
    any depth except what Python or a reader leaves behind.
    """
    if weights is None:
        files = [f for f in folder.rglob("*") if f.is_file() and f.suffix not in (".pyc", ".py", ".md")]
    else:
        files = [f for f in folder.iterdir() if f.is_file() and f.suffix in _CONFIG_SUFFIXES]
        files += weights
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


# -- loading -------------------------------------------------------------------------------------------------

# Words of a library's error that advise what nobody should do here.
_ADVICE = re.compile(
    r"weights_only|trust_remote_code|allow_pickle|torch\.load|arbitrary code|custom code|ignore_mismatched|"
    r"use_safetensors|from_tf|from_flax|unsafe|TORCH_|HF_|TRANSFORMERS_",
    re.IGNORECASE,
)
# Keys that checkpoints written by older versions lack and that are no weights.
_HARMLESS_MISSING = re.compile(r"position_ids$|attn_mask$|\.attn\.(masked_)?bias$")


@contextmanager
def reading(located: Located) -> Iterator[None]:
    """Turn what a library raises while it reads a model's files into one line; our own mistakes pass through.

    Stands around the library's call alone. The library's error is not chained: its text may advise to lower
    the guard.
    """
    try:
        yield
    except ItemkitError:
        raise
    except Exception as error:
        places = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        called = places[2:]  # behind this generator and the body of the with statement
        ours = not called or any(place.partition(".")[0] == "itemkit" for place in called)
        if ours or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        if type(error).__name__ == "UnpicklingError":
            raise located.refuse("its weights are a pickle that holds more than tensors", _CONVERT) from None
        reason = f"cannot be loaded: {_cause(error)}"
        raise ModelNotFound(
            located.what, reason=reason, looked=tidy(located.path), remedy=COPY_WHOLE
        ) from None


def _cause(error: Exception) -> str:
    """What a library's error says, shortly, without its advice and without the home folder."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:300]
    if not text or _ADVICE.search(text):
        return f"{type(error).__name__} while its files were read"
    home = str(Path.home())
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' and the hub's warnings and progress bars off the terminal and out of notebooks."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
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
    """Keep the libraries off the network, quiet, and from running code of a folder, while a model loads.

    Set in the process rather than by HF_HUB_OFFLINE, which is read only once, when the hub's library is
    imported. `check_settings` refuses what asks for code; this is for the way that nobody thought of. With no
    time for an answer transformers does not ask its question.
    """
    from huggingface_hub import constants
    from transformers import dynamic_module_utils as dynamic

    def refuse(*args: object, **options: object) -> None:
        raise ValueError("it asks for code of its own, which itemkit never runs")

    settings: list[tuple[Any, str, Any]] = [
        (constants, "HF_HUB_OFFLINE", True),
        (dynamic, "TIME_OUT_REMOTE_CODE", 0),
    ]
    settings += [(dynamic, "get_class_in_module", refuse)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    for owner, name, value in settings:
        setattr(owner, name, value)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickles
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def load_transformer(auto_class: Any, located: Located, **options: Any) -> Any:
    """Load a transformers model with ``auto_class.from_pretrained``, whole or not at all.

    It fills weights that the file lacks with random numbers and only logs it; here that is an error.
    """
    fixed = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    with reading(located), from_disk_only():
        model, info = auto_class.from_pretrained(located.path, **fixed, **options)
    missing = [k for k in info["missing_keys"] if not _HARMLESS_MISSING.search(k)]
    wrong = [str(k[0] if isinstance(k, (tuple, list)) else k) for k in info["mismatched_keys"]]
    if missing or wrong:
        kinds = ((missing, "missing"), (wrong, "of another shape"))
        count = " and ".join(f"{len(keys)} {kind}" for keys, kind in kinds if keys)
        raise located.refuse(
            f"the weights do not fit the configuration beside them ({count}, e.g. "
            f"'{min([*missing, *wrong])}'); random numbers would take their place"
        )
    return model.eval()


def load_processor(
    located: Located, room: int | None, reads_text: bool = True
) -> tuple[Any | None, Any, Any]:
    """Load processor (None where a folder has no such thing), image processor and tokenizer.

    ``room`` and ``reads_text``: see `require_vocabulary`.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    # folders written before transformers 4.4x name their processor in preprocessor_config.json
    files = [located.path / f"{name}_config.json" for name in ("processor", "preprocessor")]
    named = any("processor_class" in _read_json(file) for file in files)
    with reading(located), from_disk_only():
        processor: Any = AutoProcessor.from_pretrained(located.path, **options) if named else None
        if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
            images, tokenizer = processor.image_processor, processor.tokenizer
        else:
            processor, images = None, AutoImageProcessor.from_pretrained(located.path, **options)
            tokenizer = AutoTokenizer.from_pretrained(located.path, **options)
    require_vocabulary(located, len(tokenizer), room, reads_text)
    return processor, images, tokenizer
