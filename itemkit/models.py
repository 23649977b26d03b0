"""The models of a run as one record with one fingerprint; and model folders: found, checked, hashed, loaded.

A model folder is data from anywhere. No code in it runs and nobody is asked; nothing is downloaded while
loading, and nothing that a folder lacks is replaced by a library's default or by random numbers. Whatever is
wrong is said before the weights are read, in one line with one remedy.

A fingerprint comes from files and settings alone; nothing that it needs imports torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pkgutil
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from itemkit.errors import InputError, ItemkitError, ModelNotFound
from itemkit.text import did_you_mean

# -- the models of a run -------------------------------------------------------------------------------------

METHODS = {  # the parts, and what each must be able to do
    "captioner": ("caption",),
    "parser": ("objects",),
    "encoder": ("preprocess", "encode_images", "encode_texts", "count_tokens"),
    "localiser": ("locate",),
}
PARTS = tuple(METHODS)
# Localisers by name, with the defaults of those options that change the regions; see `regions`.
LOCALISERS: dict[str, dict[str, Any]] = {
    "whole": {},
    "grid": {"scales": (1.0, 0.7, 0.45), "overlap": 0.5},
    "dense": {"temperature": None, "level": 0.5},
    "owlv2": {"model": "google/owlv2-base-patch16-ensemble", "threshold": 0.1, "precision": "auto"},
    "grounding_dino": {
        "model": "IDEA-Research/grounding-dino-base", "threshold": 0.25, "precision": "float32",
    },
    "object_detector": {
        "model": "PekingU/rtdetr_v2_r18vd", "threshold": 0.3, "precision": "auto", "match": 0.9,
        "boxes": "best", "without_box": "whole",
    },
}  # fmt: skip
IMAGE_ALONE = "object_detector"  # has classes of its own and is given no words
GRID_MAX_STEPS = 12  # windows per axis and scale of "grid"; bounds the work on panoramas


@dataclass(frozen=True)
class Models:
    """The models of a run: the encoder alone for images with captions, and more for objects and regions.

    Anything with the same methods will do. One's own captioner is a class with ``caption(images) -> list of
    str`` (or of `captions.Caption`); one's own localiser has ``boxes(image, phrases) -> list of (x0, y0, x1,
    y1, score) or None``, or all of `regions.Localiser`. Each says which answers it gives, by a ``version``
    that is raised whenever they change, or by ``fingerprint() -> dict``.

    >>> class Captions:
    ...     version = "1"
    ...     def caption(self, images):
    ...         return [f"a picture of {image.width} pixels" for image in images]
    >>> from itemkit.presets import get_preset
    >>> get_preset("mini", captioner=Captions()).captioner.version
    '1'

    On the command line such a class is named by module and name: ``--captioner my_module:Captions``.
    """

    encoder: Any
    captioner: Any = None
    parser: Any = None
    localiser: Any = None

    def __post_init__(self) -> None:
        if hasattr(self.localiser, "boxes") and not hasattr(self.localiser, "locate"):
            from itemkit.regions import BoxLocaliser

            object.__setattr__(self, "localiser", BoxLocaliser(self.encoder, self.localiser))
        for name in METHODS:
            if (part := getattr(self, name)) is not None:
                check_part(name, part)

    def fingerprint(self, captions: str = "generate") -> dict[str, Any]:
        """Everything that changes the numbers, JSON-ready; ``captions`` come from "generate" or "user"."""
        return run_fingerprint(vars(self), captions)


def check_part(name: str, part: Any) -> None:
    """Raise an `InputError` unless a part can do what is asked of it."""
    methods = ("boxes",) if name == "localiser" and hasattr(part, "boxes") else METHODS[name]
    lacks = [method for method in methods if not callable(getattr(part, method, None))]
    if lacks:
        kind = getattr(part, "__name__", type(part).__name__)
        needs = f"a {name} needs {', '.join(METHODS[name])}. itemkit.models.Models shows an example"
        raise InputError(f"the {name} {kind} has no method {lacks[0]}(); {needs}")


def run_fingerprint(parts: Mapping[str, Any], captions: str) -> dict[str, Any]:
    """Put together the fingerprints of the parts, each given as a model or as its fingerprint."""
    from itemkit.captions import CLEAN_VERSION

    cleaning = {"caption_cleaning": CLEAN_VERSION} if captions == "user" else {}
    return {name: part_fingerprint(name, parts[name]) for name in PARTS} | {"captions": captions} | cleaning


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
            f"the {name} {type(part).__name__} does not say which answers it gives: add `version = '1'` to "
            "it and raise that whenever they change, or a method fingerprint() that returns a dict"
        )
    return json.loads(json.dumps(found))


def differences(
    stored: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None, ignore: Collection[str] = ()
) -> list[str]:
    """Say in what two fingerprints differ, as ``encoder.files_sha256: 'ab...' there, 'cd...' here``.

    ``ignore`` names parts ("localiser"), dotted keys ("captioner.decoding") or keys at any depth
    ("precision"). Who ignores "captions" ignores how they were cleaned, too.
    """
    skip = {*ignore, *(("caption_cleaning",) if "captions" in ignore else ())}

    def walk(there: Any, here: Any, name: str) -> Iterator[str]:
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            for key in sorted({*there, *here}):
                inner = f"{name}.{key}".lstrip(".")
                if key not in skip and inner not in skip:
                    yield from walk(there.get(key), here.get(key), inner)
        elif there != here:
            yield f"{name}: {_short(there)} there, {_short(here)} here"

    return list(walk(stored or {}, wanted or {}, ""))


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 32 else text[:24] + "..."  # a hash need not be read to its end


def unknown(what: str, word: str, known: Iterable[str]) -> InputError:
    """Build the error for a word that is not among the known ones."""
    return InputError(f"{what}.{did_you_mean(word, known)} Known: {', '.join(known) or 'none'}.")


def names_object(text: Any) -> bool:
    """Whether a text is ``module:object``, for a part of the user's own."""
    return isinstance(text, str) and bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text))


@functools.cache
def own_part(name: str, text: str) -> Any:
    """The object that ``module:object`` names; a class is made an instance of. Looks in this folder, too."""
    module = text.partition(":")[0]
    sys.path.insert(0, os.getcwd())  # not there when the command line's script was started
    try:
        part = pkgutil.resolve_name(text)
        part = part() if isinstance(part, type) else part
    except Exception as error:  # whatever a module of the user's own does
        why = f"cannot be made: {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            hint = "; write it without .py" * module.endswith(".py")
            why = f"is neither in this folder nor installed: {error}{hint}"
        raise InputError(f"{name} '{text}' {why}") from error
    finally:
        sys.path.remove(os.getcwd())
    check_part(name, part)
    part_fingerprint(name, part)  # it must have one, which is better known before any image is opened
    return part


def localiser_settings(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What changes the regions of a localiser, its weights apart; refuses a name or option nobody knows."""
    if name not in LOCALISERS:
        known = [*LOCALISERS, "your own as module:object"]
        raise unknown(f"localiser '{name}' is unknown", name, known)
    defaults = LOCALISERS[name]
    for key in options:
        if key not in defaults and not (key == "device" and "model" in defaults):
            raise unknown(f"localiser '{name}' has no option '{key}'", key, defaults)
    settings = {key: options.get(key, value) for key, value in defaults.items() if key != "model"}
    more: dict[str, Any] = {"grid": {"max_steps": GRID_MAX_STEPS}, IMAGE_ALONE: {"mentions": "by fit"}}
    return {"kind": name, **settings, **more.get(name, {})}


# -- finding -------------------------------------------------------------------------------------------------

FETCH = (
    "Fetch what is missing once where a model hub can be reached with `itemkit download{}`, name a folder "
    "that holds it (--models, or ITEMKIT_MODELS), or use the models that come with itemkit: preset 'mini'."
)
COPY_WHOLE = "Copy the whole model folder, not only its weights, or fetch it again with `itemkit download`."


@dataclass(frozen=True)
class Located:
    """A model's files on this machine, before and after it is loaded."""

    what: str  # what was asked for, in words
    path: Path  # the folder, or the one file of weights, that will be read
    revision: str = ""  # commit of the model hub
    name: str = ""  # of the model on the hub, or of the folder
    weights: tuple[Path, ...] = ()  # the very files that will be loaded

    def fingerprint(self, **settings: Any) -> dict[str, Any]:
        """What changes the model's numbers: its files, and the settings it is used with; loaded or not."""
        files = files_hash(self.path, [*settings_files(self.path), *self.weights])
        found = {"kind": "transformers", "name": self.name, "revision": self.revision, "files_sha256": files}
        return found | settings

    def refuse(self, reason: str, remedy: str = COPY_WHOLE) -> ModelNotFound:
        """Build the error for a model that is here and cannot be used."""
        reason = f"cannot be used: {reason}"
        return ModelNotFound(self.what, reason=reason, looked=tidy(self.path), remedy=remedy)


def not_found(what: str, looked: str | Path, reason: str = "") -> ModelNotFound:
    """Build the one error for a model that is not on this machine; ``reason`` is what is missing there."""
    return ModelNotFound(what, looked=tidy(looked) + (reason and f": {reason}"), remedy=FETCH.format(""))


def tidy(path: str | Path) -> str:
    """Write the home folder as ``~``, so that no message carries somebody's user name."""
    place, home = Path(path), Path.home()
    if home == Path(home.anchor) or not place.is_relative_to(home):
        return str(path)
    return str(Path("~") / place.relative_to(home))


def looks_like_path(model: str | Path) -> bool:
    """Tell a folder from a model's name: a Path, a text written like one, or a folder that holds a model."""
    files = ("config.json", "open_clip_config.json", "config.cfg")
    written = isinstance(model, Path) or model.startswith((".", "/", "~", "\\"))
    return written or any((Path(model) / file).is_file() for file in files)


def find_place(model: str | Path, part: str) -> Located:
    """Find a folder of a model, given as such or by its name in the hub's cache; it is not checked."""
    if looks_like_path(model):
        folder = Path(model).expanduser()
        what = f"{part} '{tidy(folder)}'"
        if not folder.is_dir():
            raise not_found(what, folder, "no such folder")
        return Located(what, folder, "", folder.name)
    from huggingface_hub import constants

    # not its `snapshot_download`, which refuses a snapshot that lacks any file, also one that nobody needs
    what, name = f"{part} '{model}'", str(model).removeprefix("hf-hub:").replace("/", "--")
    place = Path(constants.HF_HUB_CACHE) / f"models--{name}"
    try:
        folder = place / "snapshots" / (place / "refs" / "main").read_text(encoding="utf-8").strip()
        folder.stat()
    except (OSError, ValueError):
        raise not_found(what, place.parent) from None
    return Located(what, folder, folder.name, str(model))


def find_folder(model: str | Path, what: str, texts: bool = True) -> Located:
    """Find the files of a transformers model (see `find_place`) and check them, or raise `ModelNotFound`.

    ``texts``: whether it reads or writes them, and so must have a tokenizer.
    """
    located = find_place(model, what)
    folder = located.path
    if not (folder / "config.json").is_file():
        raise not_found(located.what, folder, "no config.json")
    check_settings(located)
    # transformers' own order
    order = [name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
    located = replace(located, weights=choose_weights(located, order))
    if texts:
        require_tokenizer(located)
    images = "image_processor" in read_json(folder / "processor_config.json")
    if not images and not (folder / "preprocessor_config.json").is_file():
        raise located.refuse("preprocessor_config.json is missing, so its image size would be guessed")
    return located


def choose_weights(located: Located, order: Sequence[str]) -> tuple[Path, ...]:
    """The files of weights that a library loads, checked: the first of ``order``, and what it lists."""
    folder = located.path
    first = next((folder / name for name in order if (folder / name).is_file()), None)
    if first is None:
        raise not_found(located.what, folder, f"no weights ({order[0]}, or its index)")
    files = [first]
    if first.suffix == ".json":
        names = sorted(set(texts_in(read_json(first).get("weight_map"))))
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
    names = {file.name for file in settings_files(folder or located.path)}
    alone = {"tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
    if not names & alone and not {"vocab.json", "merges.txt"} <= names:
        raise located.refuse("its tokenizer is missing (tokenizer.json, or vocab.json and merges.txt)")


def require_vocabulary(located: Located, size: int, room: int | None) -> None:
    """Refuse a tokenizer of ``size`` entries for a model with ``room``; a few more or less do no harm."""
    if room and not 0.9 * room <= size <= 1.01 * room:
        reason = f"its tokenizer has {size:,} entries and its text model {room:,}: one is another's"
        raise located.refuse(reason)


# -- folders are not trusted ---------------------------------------------------------------------------------

_CONVERT = (
    "Convert it once, where you trust its source: load it with the program that wrote it, and save its "
    "tensors alone with safetensors.torch.save_file."
)
# keys that lead a library to code or weights from elsewhere, and the texts that are harmless as their values
_FORBIDDEN = {
    "auto_map|trust_remote_code|custom_pipelines|custom_generate|use_kernels|allow_all_kernels|kernel_config"
    "|quantization_config|transformers_weights|peft_type": None,
    "_?(attn|experts)_implementation(_internal)?": "eager|sdpa|flex_attention|(grouped|batched)_mm",
    "timm_model_name": r"[^:/\\]*",
}


def check_settings(located: Located) -> None:
    """Refuse a folder whose settings are Git LFS pointers, or lead a library to code.

    All JSON files are read, at any depth of nesting: which of them a library looks at is its own affair.
    """
    for file in settings_files(located.path):
        check_file(file, located)
        if file.suffix != ".json" or file.name in ("tokenizer.json", "vocab.json"):
            continue
        for key, value in pairs(read_json(file)):
            for keys, harmless in _FORBIDDEN.items():
                asked = value and re.fullmatch(keys, key)
                if asked and not (harmless and all(re.fullmatch(harmless, text) for text in texts_in(value))):
                    raise located.refuse(
                        f"'{key}' in {file.name} leads to code or weights that itemkit never takes",
                        "Use a model that the installed libraries know; if they know this one, remove it.",
                    )


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


def texts_in(value: Any) -> list[str]:
    """All texts among the values of nested JSON."""
    return [text for _, text in pairs(value) if isinstance(text, str)]


def read_json(file: Path) -> dict[str, Any]:
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
    if ends.startswith(b"version https://git-lfs.github.com/spec/"):
        remedy = "Run `git lfs pull` in that folder, or copy the file from where it is whole."
        raise located.refuse(f"{file.name} is a Git LFS pointer, not the file itself", remedy)
    if pickled and (b"constants.pkl" in ends or b"/code/" in ends):
        raise located.refuse(f"{file.name} is a TorchScript archive, which holds code", _CONVERT)
    # torch writes a zip archive, in older versions a pickle
    if pickled and not (ends.startswith(b"\x80") or (ends.startswith(b"PK") and b"PK\x05\x06" in ends)):
        raise located.refuse(f"{file.name} holds no weights, or only their beginning")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            safe_open(file, "np")  # reads the table of contents and compares it with the file's length
        except (SafetensorError, OSError, ValueError) as error:
            raise located.refuse(f"{file.name} is damaged ({error})") from None


# -- hashing -------------------------------------------------------------------------------------------------


def settings_files(folder: Path) -> list[Path]:
    """What besides weights changes a model's numbers: configuration, tokenizer, preprocessing."""
    endings = (".json", ".txt", ".model", ".jinja")
    return [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in endings]


def folder_hash(folder: Path) -> str:
    """SHA-256 of all files of a folder, at any depth, except what Python or a reader leaves behind."""
    left_behind = (".pyc", ".py", ".md")
    return files_hash(folder, [f for f in folder.rglob("*") if f.is_file() and f.suffix not in left_behind])


def files_hash(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        digest.update(f"{file.relative_to(folder).as_posix()}={file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file; computed once per path, size and modification time."""
    path = Path(path).resolve()
    return _file_hash(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
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
    """Turn what a library raises while it reads a model's files into one line, without any unsafe advice.

    Our own mistakes pass through. The library's error is not chained, as its text may hold that advice.
    """
    try:
        yield
    except Exception as error:
        places = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        called = places[2:]  # behind this generator and the body of the with statement
        ours = not called or any(place.startswith("itemkit.") for place in called)
        kind = type(error).__name__
        if ours or isinstance(error, (ItemkitError, MemoryError)) or kind == "OutOfMemoryError":
            raise
        if kind == "UnpicklingError":
            raise located.refuse("its weights are a pickle that holds more than tensors", _CONVERT) from None
        said = " ".join(str(error).split())[:300].replace(str(located.path), tidy(located.path))
        if not said or _ADVICE.search(said):
            said = f"{kind} while its files were read"
        raise located.refuse(f"it cannot be loaded: {said}") from None


@contextmanager
def from_disk_only() -> Iterator[None]:
    """Keep the libraries off the network and from running code of a folder, while a model loads.

    `check_settings` refuses what asks for code; this is for the way that nobody thought of.
    """
    from huggingface_hub import constants
    from transformers import dynamic_module_utils as dynamic
    from transformers.utils import logging

    logging.set_verbosity_error()  # and from here on: its models talk at work, too
    logging.disable_progress_bar()
    asks = InputError("a model folder asks for code of its own, which itemkit never runs")
    with (
        patch.object(constants, "HF_HUB_OFFLINE", True),
        patch.object(dynamic, "TIME_OUT_REMOTE_CODE", 0),  # no time for an answer, so it does not ask
        patch.object(dynamic, "get_class_in_module", side_effect=asks),
        warnings.catch_warnings(action="ignore"),  # of torch, about pickles
    ):
        yield


def load_transformer(auto_class: Any, located: Located, **options: Any) -> Any:
    """Load a transformers model, whole or not at all: it fills what is missing with random numbers."""
    fixed = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    with reading(located), from_disk_only():
        model, info = auto_class.from_pretrained(located.path, **fixed, **options)
    missing = [k for k in info["missing_keys"] if not _HARMLESS_MISSING.search(k)]
    wrong = [key for key, *_ in info["mismatched_keys"]]
    if missing or wrong:
        raise located.refuse(
            f"the weights do not fit the configuration beside them ({len(missing)} missing, {len(wrong)} of "
            f"another shape, e.g. '{min([*missing, *wrong])}'); random numbers would take their place"
        )
    return model.eval()


def load_processor(located: Located, room: int | None, texts: bool = True) -> tuple[Any, Any]:
    """Load what prepares images, and texts too where a folder has such a processor, and the tokenizer."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    with reading(located), from_disk_only():
        if not texts:
            return AutoImageProcessor.from_pretrained(located.path, **options), None
        processor: Any = AutoProcessor.from_pretrained(located.path, **options)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or not hasattr(processor, "image_processor"):
            processor = AutoImageProcessor.from_pretrained(located.path, **options)
            tokenizer = AutoTokenizer.from_pretrained(located.path, **options)
    require_vocabulary(located, len(tokenizer), room)
    return processor, tokenizer
