"""Where the files of an open_clip model are: a folder, the hub's cache, or a file of weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itemkit.errors import InputError
from itemkit.weights import (
    Located,
    cached_snapshot,
    hub_cache,
    looks_like_path,
    not_found,
    tidy,
    weight_files,
)

CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True)
class Source:
    """Where an encoder's files are and how open_clip must be called to read them."""

    located: Located
    open_clip_name: str
    pretrained: str | None  # tag that was asked for, for the record
    checkpoint: Path
    quick_gelu: bool = False
    preprocess: dict[str, Any] | None = None


def find_encoder(model: str | Path, pretrained: str | None = None) -> Source:
    """Find an encoder's files without loading them. Parameters and errors as in `load_encoder`."""
    if looks_like_path(model):
        return _folder_source(Path(model).expanduser(), "", f"encoder '{tidy(model)}'")
    name = str(model)
    if name.startswith("hf-hub:"):
        folder = cached_snapshot(name.removeprefix("hf-hub:"), f"encoder '{name}'")
        return _folder_source(folder, folder.name, f"encoder '{name}'")
    return _named_source(name, pretrained)


def _folder_source(folder: Path, revision: str, what: str) -> Source:
    if not folder.is_dir():
        raise not_found(what, folder, "no such folder")
    if not (folder / CONFIG_FILE).is_file():
        raise not_found(what, folder, f"no {CONFIG_FILE}, which open_clip's local-dir format has")
    files = sorted(weight_files(folder), key=_preference)
    if not files:
        raise not_found(what, folder, "no weights (open_clip_model.safetensors)")
    located = Located(what, folder, revision)
    return Source(located, f"local-dir:{folder}", None, files[0])


def _preference(file: Path) -> tuple[int, str]:
    """Order weights as open_clip does, so that the hash is of the file that is loaded."""
    first = ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors"]
    first += [name.replace(".safetensors", ".bin") for name in first[1:2]]
    return (first.index(file.name) if file.name in first else len(first)), file.name


def _named_source(name: str, pretrained: str | None) -> Source:
    import open_clip

    known = open_clip.list_models()
    clean = name.replace("/", "-")
    if clean not in known:
        raise InputError(
            f"encoder '{name}' is neither a folder nor known to open_clip.{_did_you_mean(clean, known)} "
            "For a model of the hub write 'hf-hub:owner/name', for a folder './folder'."
        )
    tags = open_clip.list_pretrained_tags_by_model(clean)
    if not pretrained:
        raise InputError(
            f"encoder '{name}' needs a tag that says which weights; without one open_clip would use random "
            f"numbers. Known: {', '.join(tags) or 'none, pass a file'}."
        )
    what = f"encoder '{name}' ({pretrained if not looks_like_path(pretrained) else tidy(pretrained)})"
    tag = open_clip.get_pretrained_cfg(clean, pretrained)
    if not tag:
        file = Path(pretrained).expanduser()
        if file.is_file():
            return Source(Located(what, file), clean, tidy(pretrained), file)
        if looks_like_path(pretrained) or file.suffix:
            raise not_found(what, file)
        raise InputError(
            f"encoder '{name}' has no weights called '{pretrained}'.{_did_you_mean(pretrained, tags)} "
            f"Known: {', '.join(tags)}."
        )
    checkpoint, revision = _cached_checkpoint(tag, what)
    # open_clip only warns when a tag was trained with another activation than the named architecture has
    # (ViT-L-14 with "openai", "metaclip_400m", "dfn2b" ...) and then computes wrong embeddings.
    return Source(
        Located(what, checkpoint, revision),
        clean,
        pretrained,
        checkpoint,
        quick_gelu=bool(tag.get("quick_gelu")),
        preprocess={
            k: v for k, v in tag.items() if k in ("mean", "std", "interpolation", "resize_mode", "size")
        },
    )


def _cached_checkpoint(tag: dict[str, Any], what: str) -> tuple[Path, str]:
    """Look up a tag's weights where open_clip would have put them."""
    from huggingface_hub import try_to_load_from_cache

    if "file" in tag:
        return Path(tag["file"]), ""
    if tag.get("hf_hub"):
        repo, _, file = tag["hf_hub"].rpartition("/")
        file = file or "open_clip_pytorch_model.bin"
        safe = (
            "open_clip_model.safetensors"
            if file == "open_clip_pytorch_model.bin"
            else str(Path(file).with_suffix(".safetensors"))
        )
        for candidate in (safe, file):
            found = try_to_load_from_cache(repo, candidate)
            if isinstance(found, str):
                return Path(found), Path(found).parent.name
    if tag.get("url"):
        found_file = Path("~/.cache/clip").expanduser() / tag["url"].rpartition("/")[2]
        if found_file.is_file():
            return found_file, ""
    raise not_found(what, hub_cache())


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
