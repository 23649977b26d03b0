"""The joint space: open_clip models that turn images, texts and image patches into comparable vectors."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from itemkit.devices import choose_device, choose_precision, to_device
from itemkit.errors import InputError
from itemkit.models import (
    Located,
    check_file,
    check_settings,
    choose_weights,
    file_hash,
    files_hash,
    find_place,
    from_disk_only,
    looks_like_path,
    not_found,
    read_json,
    reading,
    require_tokenizer,
    require_vocabulary,
    settings_files,
    tidy,
    unknown,
)
from itemkit.text import did_you_mean

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    PatchPass = Callable[[Tensor], tuple[Tensor, Tensor]]

# -- the two towers ------------------------------------------------------------------------------------------


def stack_pixels(preprocess: Callable[[Image], Tensor], images: Sequence[Image]) -> Tensor:
    """Preprocess images into one batch, in as many threads as torch uses."""
    import torch

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.stack(list(pool.map(preprocess, images)))


def patch_tower(visual: Any) -> tuple[tuple[int, int] | None, PatchPass | None]:
    """Rows and columns of patches, and a function pixels -> (pooled, patches) into the joint space.

    None for convolutional towers, Swin, CoCa's attention pooling.
    """
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        if not hasattr(visual, "grid_size") or getattr(visual, "attn_pool", None) or visual.proj is None:
            return None, None

        def native_pass(pixels: Tensor) -> tuple[Tensor, Tensor]:
            # The final layer norm and projection, trained on the class token, applied to every patch.
            options = {"indices": 1, "normalize_intermediates": True, "output_fmt": "NLC"}
            out = visual.forward_intermediates(pixels, **options)
            return out["image_features"], out["image_intermediates"][-1] @ visual.proj

        return _size(visual.grid_size), native_pass

    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    parts = ("num_prefix_tokens", "fc_norm", "head", "forward_head")
    if grid is None or not all(hasattr(trunk, part) for part in parts):
        return None, None

    def timm_pass(pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = trunk.forward_features(pixels)
        pooled = visual.head(trunk.forward_head(tokens))
        patches = tokens[:, trunk.num_prefix_tokens :]
        if getattr(trunk, "attn_pool", None) is not None:
            # SigLIP, PE: what the attention pooling would return if the image had this one patch only.
            n, count, width = patches.shape
            patches = trunk.attn_pool(patches.reshape(n * count, 1, width)).reshape(n, count, -1)
        return pooled, visual.head(trunk.head(trunk.fc_norm(patches)))

    return _size(grid), timm_pass


def text_tower(model: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions: token ids -> how many of them each text needs; token ids, cut there -> embeddings.

    Captions have some 14 tokens and phrases 3, so a tower of 77 positions works on padding most of the time.
    That changes nothing where no position reads a later one and the embedding is read off the end token, nor
    where padding is masked (towers of transformers). SigLIP, CLIPA and CoCa do read it: they get all of it.
    """
    import torch
    from open_clip.hf_model import HFTextEncoder

    text, prefix = (model.text, "") if hasattr(model, "text") else (model, "text_")
    pooling, eos = (getattr(text, prefix + name, None) for name in ("pool_type", "eos_id"))
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    cuts = causal and pooling in ("argmax", "eos")
    unread = text.config.pad_token_id if isinstance(text, HFTextEncoder) else -1

    def needed(tokens: Tensor) -> Tensor:
        if not cuts:
            return tokens.shape[1] - (tokens != unread).int().flip(1).argmax(dim=1)
        return (tokens if pooling == "argmax" else (tokens == eos).int()).argmax(dim=1) + 1

    def embed(tokens: Tensor) -> Tensor:  # open_clip's own `encode_text` takes no fewer positions
        n, project = tokens.shape[1], text.text_projection
        x = text.token_embedding(tokens) + text.positional_embedding[:n]
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:n, :n]))
        ends = x[torch.arange(len(x), device=x.device), needed(tokens) - 1]
        if project is None:
            return ends
        return project(ends) if isinstance(project, torch.nn.Linear) else ends @ project

    return needed, embed if cuts else model.encode_text


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    return int(rows), int(columns)


# -- finding -------------------------------------------------------------------------------------------------

CONFIG_FILE = "open_clip_config.json"
# What open_clip's own tokenizers take; any other option of a folder would reach transformers' loader.
_TOKENIZER_OPTIONS = frozenset({"clean", "strip_sep_token", "language", "additional_special_tokens"})
# open_clip's defaults for what a folder's preprocess_cfg leaves open
_PREPROCESS = {
    "mode": "RGB", "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
}  # fmt: skip
_OTHER_FORMAT = (
    "The encoder is read in open_clip's format, not in transformers': name a model of open_clip instead "
    "(ViT-B-32:openai, hf-hub:owner/name), or a folder that `itemkit download` wrote."
)


@dataclass(frozen=True, kw_only=True)
class Source(Located):
    """Where an encoder's files are and how open_clip must be called to read them."""

    open_clip_name: str  # as open_clip takes it: a name, or "local-dir:folder"
    pretrained: str  # tag that was asked for
    config: dict[str, Any]  # the architecture, "model_cfg"
    preprocess: dict[str, Any]  # defaults included
    quick_gelu: bool  # weights trained with another activation than the named architecture has
    folders: tuple[Path, ...]  # of its settings, its tokenizer and its text tower

    def fingerprint(self, **settings: Any) -> dict[str, Any]:
        """See `Located.fingerprint`."""
        architecture = json.dumps({**self.config, "force_quick_gelu": self.quick_gelu}, sort_keys=True)
        return {
            "kind": "open_clip",
            "name": self.name,
            "pretrained": self.pretrained,
            "revision": self.revision,
            "weights_sha256": file_hash(self.weights[0]),
            "context_length": self.config["text_cfg"].get("context_length", 77),
            "image_size": self.preprocess["size"],
            "dim": self.config["embed_dim"],
            "preprocess": self.preprocess,
            "architecture_sha256": hashlib.sha256(architecture.encode()).hexdigest(),
            "files_sha256": " ".join(files_hash(folder, settings_files(folder)) for folder in self.folders),
        } | settings


def find_encoder(model: str | Path, pretrained: str | None = None) -> Source:
    """Find an encoder's files and check them, without loading. Parameters and errors as in `load_encoder`."""
    in_folder = looks_like_path(model) or str(model).startswith("hf-hub:")
    located, settings = _in_folder(model) if in_folder else _by_tag(str(model), pretrained)
    try:
        config, given = settings["model_cfg"], settings.get("preprocess_cfg", {})
        text, size = dict(config["text_cfg"]), _size(config["vision_cfg"].get("image_size", 224))
        preprocess = {key: given.get(key, value) for key, value in _PREPROCESS.items()} | {"size": list(size)}
        foreign = {str(key) for key in text.get("tokenizer_kwargs") or ()} - _TOKENIZER_OPTIONS
        int(config["embed_dim"])
        # a folder holds its own tokenizer; a text tower of transformers always lies elsewhere
        outside = dict.fromkeys([not in_folder and text.get("hf_tokenizer_name"), text.get("hf_model_name")])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{CONFIG_FILE} is not as open_clip writes it ({type(error).__name__}: {error})"
        raise located.refuse(reason) from None
    if foreign:
        remedy = f"Remove it; tokenizer_kwargs may have {', '.join(sorted(_TOKENIZER_OPTIONS))}."
        raise located.refuse(f"{CONFIG_FILE} gives the tokenizer the option '{min(foreign)}'", remedy)
    folders = [located.path] if in_folder else []
    folders += [_outside(located, str(name)) for name in outside if name]
    if text.get("hf_tokenizer_name"):
        require_tokenizer(located, folders[0])
    with open(located.weights[0], "rb") as file:
        tensors = file.read(2**20)  # their names stand first in all formats
    if b"vision_model.embeddings" in tensors or b"text_model.embeddings" in tensors:
        raise located.refuse(f"{located.weights[0].name} is in transformers' format", _OTHER_FORMAT)
    return Source(
        **vars(located),
        open_clip_name=f"local-dir:{located.path}" if in_folder else str(model).replace("/", "-"),
        pretrained=tidy(pretrained) if pretrained and not in_folder else "",
        config=config,
        preprocess=json.loads(json.dumps(preprocess)),  # tuples become lists, as they are read back
        quick_gelu=bool(settings.get("quick_gelu")),
        folders=tuple(folders),
    )


def _in_folder(model: str | Path) -> tuple[Located, dict[str, Any]]:
    """Weights and settings of a folder in open_clip's local-dir format."""
    located = find_place(model, "encoder")
    if not (located.path / CONFIG_FILE).is_file():
        raise located.refuse(f"it has no {CONFIG_FILE}", _OTHER_FORMAT)
    check_settings(located)

    def order(file: Path) -> tuple[bool, bool, bool]:  # as open_clip chooses
        own, known = file.name.startswith("open_clip_"), file.stem in ("model", "pytorch_model")
        return not own, not known, file.suffix != ".safetensors"

    files = [f for f in sorted(located.path.iterdir()) if f.suffix in (".safetensors", ".bin", ".pth")]
    names = [file.name for file in sorted(files, key=order)]
    weights = choose_weights(located, names or ["open_clip_model.safetensors"])
    return replace(located, weights=weights), read_json(located.path / CONFIG_FILE)


def _by_tag(name: str, pretrained: str | None) -> tuple[Located, dict[str, Any]]:
    """Weights and settings of a model that open_clip knows by name and tag, or by name and a file."""
    import open_clip

    known, clean = open_clip.list_models(), name.replace("/", "-")
    if clean not in known:
        raise InputError(
            f"encoder '{name}' is neither a folder nor known to open_clip.{did_you_mean(clean, known)} "
            "For a model of the hub write 'hf-hub:owner/name', for a folder './folder'."
        )
    pretrained = pretrained or ""
    what, file = f"encoder '{name}' ({tidy(pretrained)})", Path(pretrained).expanduser()
    if open_clip.get_pretrained_cfg(clean, pretrained):
        repo, weights, settings = of_hub(clean, pretrained)
        located = find_place(f"hf-hub:{repo}", f"{what} from")
        return replace(located, name=name, weights=choose_weights(located, weights)), settings
    if not file.is_file():
        if looks_like_path(pretrained) or file.suffix:
            raise not_found(what, file)
        needs = f"encoder '{name}' needs a tag that says which weights, not '{pretrained}'"
        raise unknown(needs, pretrained, open_clip.list_pretrained_tags_by_model(clean))
    located = Located(what, file, "", name, (file,))
    check_file(file, located, weights=True)
    return located, {"model_cfg": open_clip.get_model_config(clean)}


def of_hub(name: str, tag: str) -> tuple[str, tuple[str, str], dict[str, Any]]:
    """Of a name and tag of open_clip: repository, files of weights, the safe one first, and the settings."""
    import open_clip

    known = open_clip.get_pretrained_cfg(name, tag)
    repo, _, file = known["hf_hub"].rpartition("/")
    safe = str(Path(file).with_suffix(".safetensors")) if file else "open_clip_model.safetensors"
    preprocess = {key: known[key] for key in _PREPROCESS if key in known}
    # open_clip only warns when a tag was trained with another activation than the named architecture has
    # (ViT-L-14 with "openai", "metaclip_400m", "dfn2b" ...) and then computes wrong embeddings.
    quick_gelu = bool(known.get("quick_gelu"))
    config = open_clip.get_model_config(name)
    settings = {"model_cfg": config, "preprocess_cfg": preprocess, "quick_gelu": quick_gelu}
    return repo, (safe, file or "open_clip_pytorch_model.bin"), settings


def _outside(located: Located, name: str) -> Path:
    """Folder, in the hub's cache alone, of a tokenizer or text tower that an encoder takes from elsewhere."""
    if looks_like_path(name) or Path(name).exists():
        raise located.refuse(f"it takes its text tower from the folder '{name}'", "Name a hub's model there.")
    other = find_place(name, f"{located.what}, its text model")
    check_settings(other)
    return other.path


# -- the encoder ---------------------------------------------------------------------------------------------

TEXT_BATCH = 256


@dataclass(frozen=True)
class ImageEmbedding:
    """What one forward pass of the image tower gives: L2-normalised float32 tensors in the joint space."""

    pooled: Tensor  # of whole images, shape (n, d)
    patches: Tensor | None = None  # shape (n, h * w, d), row by row from the top left


class Encoder:
    """An open_clip model with its own preprocessing, tokenizer and geometry. Made by `load_encoder`.

    Attributes
    ----------
    dim : int
        Width d of the joint space.
    context_length : int
        Tokens a text may have, start and end included; what is beyond is cut.
    image_size, patch_grid : (int, int)
        Rows and columns of the tower's input, and of its patches; None without patches in the joint space.
    logit_scale : float
        The factor on cosines that the model was trained with.
    preprocess, resize : callables
        From a PIL image to the tower's input, float (3, h, w); and to what it is before it is normalised,
        uint8 (h, w, 3). Both can be sent to other processes.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Any,
        tokenizer: Any,
        record: dict[str, Any],
        logit_scale: float = 100.0,
    ) -> None:
        import torch
        from torchvision.transforms import Compose

        self.model = model.eval().requires_grad_(False)
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.logit_scale, self._record = logit_scale, dict(record)
        self.resize_mode = record.get("preprocess", _PREPROCESS)["resize_mode"]
        parameter = next(model.visual.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        *shape, _, last = preprocess.transforms  # at the end: to a tensor of 0 to 1, and that normalised
        self.resize = Compose([*shape, np.array])
        self._scale = torch.tensor([[255.0] * 3, last.mean, last.std], device=self.device)[..., None, None]
        self.image_size = _size(model.visual.image_size)
        # The tokenizer's own limit is what cuts a text; CoCa's model.context_length is of its decoder.
        self.context_length = int(getattr(tokenizer, "context_length", None) or model.context_length)
        self._needed, self._embed_tokens = text_tower(model)
        self.patch_grid, self._patch_pass = patch_tower(model.visual)
        probe = self.encode_images(torch.zeros(1, 3, *self.image_size), patches=self._patch_pass is not None)
        self.dim = int(probe.pooled.shape[1])

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn stacked results of `resize` into those of `preprocess`, both (n, 3, h, w), on the device."""
        import torch

        # the operations of `preprocess`, in their order; CUDA would multiply by the inverse of a plain 255
        white, mean, deviation = self._scale
        pixels = to_device(pixels, self.device).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(white).sub_(mean).div_(deviation)

    def encode_images(self, pixels: Tensor, patches: bool = False) -> ImageEmbedding:
        """Embed images; also their patches, in the same forward pass.

        Parameters
        ----------
        pixels : tensor, shape (n, 3, h, w)
            Stacked results of `preprocess`; or, as uint8, of `resize`, which are normalised on the device.
        """
        import torch

        # no_grad, not inference_mode: moving weights inside the latter breaks them, and its results refuse
        # to take part in training later.
        with torch.no_grad():
            whole = pixels.dtype == torch.uint8
            pixels = (self.normalise(pixels) if whole else to_device(pixels, self.device)).to(self.dtype)
            if not patches:
                return ImageEmbedding(_unit(self.model.encode_image(pixels)))
            if self._patch_pass is not None:
                return ImageEmbedding(*map(_unit, self._patch_pass(pixels)))
        raise InputError(
            f"encoder '{self._record['name']}' has no patch embeddings in the joint space, so the localiser "
            "'dense' is not available with it. Use localiser 'grid' or 'whole', an object detector, or a ViT "
            "encoder such as ViT-B-32, ViT-L-14, EVA02-B-16, ViT-B-16-SigLIP."
        )

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, equal ones once: float32 tensor, shape (n, d), rows L2-normalised."""
        import torch

        row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        found = torch.zeros(len(row), self.dim, device=self.device)
        if row:
            tokens = self.tokenizer(list(row))
            lengths = (self._needed(tokens) + 7) // 8 * 8  # few sizes, and such as processors like
            for length in lengths.unique().tolist():
                for rows in (lengths == length).nonzero().squeeze(1).split(TEXT_BATCH):
                    with torch.no_grad():
                        found[rows] = _unit(self._embed_tokens(tokens[rows, :length].to(self.device)))
        return found[[row[text] for text in texts]]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count tokens, start and end included; more than `context_length` means that a text is cut."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is None:  # CLIP's own byte-pair tokenizer
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        clean = getattr(self.tokenizer, "clean_fn", lambda text: text)
        return [len(inner(clean(text), truncation=False, verbose=False).input_ids) for text in texts]

    def frame(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Which part of an image the tower sees: x0, y0, x1, y1 in its pixels; beyond them is padding."""
        if self.resize_mode == "squash":
            return 0.0, 0.0, float(width), float(height)
        rows, columns = self.image_size
        scales = (columns / width, rows / height)
        scale = max(scales) if self.resize_mode == "shortest" else min(scales)
        half_w, half_h = columns / scale / 2, rows / scale / 2
        return width / 2 - half_w, height / 2 - half_h, width / 2 + half_w, height / 2 + half_h

    def fingerprint(self) -> dict[str, Any]:
        """Everything about this encoder that changes the numbers, as JSON-ready values."""
        return dict(self._record)


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32."""
    import torch

    return torch.nn.functional.normalize(x.float(), dim=-1)


def load_encoder(
    model: str | Path,
    pretrained: str | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Encoder:
    """Load an open_clip model from this machine, with its weights; device and precision: see `devices`.

    Parameters
    ----------
    model : str or Path
        Name known to open_clip ("ViT-L-14"), a folder in open_clip's local-dir format, or
        "hf-hub:owner/name".
    pretrained : str, optional
        Tag ("openai", "laion2b_s32b_b82k") or file of weights; needed with a name, unused with a folder.

    Raises
    ------
    ModelNotFound
        The weights are not on this machine, or do not fit. Never random weights, never a download.
    InputError
        Unknown name or tag, or no tag given.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    source = find_encoder(model, pretrained)
    chosen = choose_device(device)
    options = {"load_weights": False, "pretrained_text": False, "force_quick_gelu": source.quick_gelu}
    # open_clip warns, in the root's name, of the random numbers that are replaced here
    with reading(source), from_disk_only(), patch.object(logging.root, "disabled", True):
        network = open_clip.create_model(source.open_clip_name, **options)
        # the very file that was hashed: left to itself, open_clip chooses one
        open_clip.load_checkpoint(network, str(source.weights[0]), weights_only=True)
        tokenizer = open_clip.get_tokenizer(source.open_clip_name)
        tokenizer(["a text"])  # it may lack what it needs to pad
        transform = image_transform_v2(PreprocessCfg(**source.preprocess), is_train=False)
    inner = getattr(tokenizer, "tokenizer", None)
    size = getattr(tokenizer, "vocab_size", 0) if inner is None else len(inner)
    require_vocabulary(source, size, getattr(getattr(network, "text", network), "vocab_size", None))
    scale = float(network.logit_scale.detach().float().exp().max())  # before it is rounded to fewer bits
    network = network.to(device=chosen, dtype=choose_precision(precision, chosen))
    return Encoder(network, transform, tokenizer, source.fingerprint(precision=precision), scale)
