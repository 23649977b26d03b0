"""The joint space: open_clip models that turn images, texts and image patches into comparable vectors."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit.errors import InputError
from itemkit.models import (
    Located,
    check_file,
    check_settings,
    choose_weights,
    file_hash,
    find_place,
    folder_hash,
    from_disk_only,
    looks_like_path,
    not_found,
    reading,
    require_tokenizer,
    require_vocabulary,
    tidy,
    unknown,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image
    from torch import Tensor

# -- pixels and patches --------------------------------------------------------------------------------------

TO_TENSOR = ("ToTensor", "MaybeToTensor")  # of torchvision and of open_clip


def stack_pixels(preprocess: Callable[[Image], Tensor], images: Sequence[Image]) -> Tensor:
    """Preprocess images into one batch, equal to ``torch.stack([preprocess(i) for i in images])``.

    Where the preprocessing is the usual chain (steps on the picture, to a tensor, steps on the tensor), only
    the first part runs image by image, in as many threads as torch uses; the rest runs once for all.
    """
    import numpy as np
    import torch

    steps: list[Any] = list(getattr(preprocess, "transforms", ()))
    names = [type(step).__name__ for step in steps]
    at = next((i for i, name in enumerate(names) if name in TO_TENSOR), None)
    if at is None or names[at + 1 :] not in ([], ["Normalize"]):
        return torch.stack([preprocess(image) for image in images])

    def on_picture(part: Sequence[Image]) -> list[np.ndarray]:
        arrays = []
        for image in part:
            for step in steps[:at]:
                image = step(image)
            arrays.append(np.asarray(image))
        return arrays

    threads = min(torch.get_num_threads(), len(images))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(on_picture, [images[i::threads] for i in range(threads)]))
        arrays = [parts[i % threads][i // threads] for i in range(len(images))]
    else:
        arrays = on_picture(images)
    if any(array.dtype != np.uint8 or array.ndim != 3 for array in arrays):
        return torch.stack([preprocess(image) for image in images])
    # as torchvision's ToTensor does it
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
    for step in steps[at + 1 :]:
        x = step(x)
    return x


def patch_pass(visual: torch.nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Return a function pixels -> (pooled, patches) into the joint space, or None if the tower has none."""
    if patch_grid(visual) is None:
        return None
    if hasattr(visual, "trunk"):
        trunk, head = visual.trunk, visual.head

        def timm_pass(pixels: Tensor) -> tuple[Tensor, Tensor]:
            tokens = trunk.forward_features(pixels)
            pooled = head(trunk.forward_head(tokens))
            patches = tokens[:, trunk.num_prefix_tokens :]
            if getattr(trunk, "attn_pool", None) is not None:
                # SigLIP, PE: what the attention pooling would return if the image had this one patch only.
                n, count, width = patches.shape
                patches = trunk.attn_pool(patches.reshape(n * count, 1, width)).reshape(n, count, -1)
            return pooled, head(trunk.head(trunk.fc_norm(patches)))

        return timm_pass

    def native_pass(pixels: Tensor) -> tuple[Tensor, Tensor]:
        # The final layer norm and projection, trained on the class token, applied to every patch.
        out = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return out["image_features"], out["image_intermediates"][-1] @ visual.proj

    return native_pass


def patch_grid(visual: torch.nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches; None for convolutional towers, Swin, CoCa's attention pooling."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        usable = hasattr(visual, "grid_size") and getattr(visual, "attn_pool", None) is None
        grid = visual.grid_size if usable and visual.proj is not None else None
    else:
        parts = ("num_prefix_tokens", "fc_norm", "head", "forward_head")
        grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
        grid = grid if all(hasattr(trunk, part) for part in parts) else None
    return None if grid is None else (int(grid[0]), int(grid[1]))


# -- finding -------------------------------------------------------------------------------------------------

CONFIG_FILE = "open_clip_config.json"
# open_clip's own order among the weights of a folder, which it continues with safetensors, then the alphabet
_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
# What open_clip's own tokenizers take; any other option of a folder would reach transformers' loader.
_TOKENIZER_OPTIONS = frozenset({"clean", "strip_sep_token", "language", "additional_special_tokens"})
# open_clip's defaults for what a folder's preprocess_cfg leaves open
_PREPROCESS = {
    "mode": "RGB", "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source(Located):
    """Where an encoder's files are and how open_clip must be called to read them."""

    open_clip_name: str  # as open_clip takes it: a name, or "local-dir:folder"
    pretrained: str = ""  # tag that was asked for, for the record
    config: dict[str, Any]  # the architecture, "model_cfg"
    preprocess: dict[str, Any]  # defaults included
    quick_gelu: bool = False  # weights trained with another activation than the named architecture has
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
            "files_sha256": " ".join(folder_hash(folder, ()) for folder in self.folders),
        } | settings


def find_encoder(model: str | Path, pretrained: str | None = None) -> Source:
    """Find an encoder's files and check them, without loading. Parameters and errors as in `load_encoder`."""
    if looks_like_path(model) or str(model).startswith("hf-hub:"):
        source = _folder_source(find_place(model, "encoder"))
    else:
        source = _named_source(str(model), pretrained)
    with open(source.weights[0], "rb") as file:
        names = file.read(2**20)  # of the tensors: they stand first in all formats
    if b"vision_model.embeddings" in names or b"text_model.embeddings" in names:
        raise source.refuse(f"{source.weights[0].name} is in transformers' format", _TRANSFORMERS_REMEDY)
    return source


_TRANSFORMERS_REMEDY = (
    "The encoder is read in open_clip's format: name a model of open_clip instead (ViT-B-32:openai, "
    "hf-hub:owner/name), or a folder that `itemkit download` wrote."
)


def _folder_source(located: Located) -> Source:
    folder, what = located.path, located.what
    if not (folder / CONFIG_FILE).is_file():
        if (folder / "config.json").is_file():
            reason = f"it is a transformers folder, which has no {CONFIG_FILE}"
            raise located.refuse(reason, _TRANSFORMERS_REMEDY)
        raise not_found(what, folder, f"no {CONFIG_FILE}, which open_clip's local-dir format has")
    check_settings(located)
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config, preprocess = settings["model_cfg"], settings.get("preprocess_cfg", {})
        vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
        size, _ = _size(vision.get("image_size", 224)), int(config["embed_dim"])
        preprocess = {key: preprocess.get(key, value) for key, value in _PREPROCESS.items()} | {"size": size}
        [[float(number) for number in preprocess[key]] for key in ("mean", "std")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{CONFIG_FILE} is not as open_clip writes it ({type(error).__name__}: {error})"
        raise located.refuse(reason) from None
    if foreign := set(text.get("tokenizer_kwargs") or ()) - _TOKENIZER_OPTIONS:
        raise located.refuse(
            f"{CONFIG_FILE} gives the tokenizer the option '{min(foreign)}'",
            f"Remove it; tokenizer_kwargs may have {', '.join(sorted(_TOKENIZER_OPTIONS))}.",
        )
    others = (_outside(located, str(text["hf_model_name"])),) if text.get("hf_model_name") else ()
    rest = [f.name for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin", ".pth")]
    rest.sort(key=lambda name: not name.endswith(".safetensors"))
    weights = choose_weights(located, [*_WEIGHTS, *rest])
    if text.get("hf_tokenizer_name"):
        require_tokenizer(located)
    return Source(
        **{**asdict(located), "weights": weights},
        open_clip_name=f"local-dir:{folder}",
        config=config,
        preprocess=preprocess,
        folders=(folder, *others),
    )


def _size(size: int | Sequence[int]) -> list[int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    return [int(rows), int(columns)]


def _outside(located: Located, name: str) -> Path:
    """Folder, in the hub's cache alone, of a tokenizer or text tower that an encoder takes from elsewhere."""
    if looks_like_path(name) or Path(name).exists():
        raise located.refuse(
            f"it takes its text tower from the folder '{name}'", "Name a model of a hub there."
        )
    other = find_place(name, f"{located.what}, its text model")
    check_settings(other)
    return other.path


def _named_source(name: str, pretrained: str | None) -> Source:
    import open_clip

    from itemkit.text import did_you_mean

    known = open_clip.list_models()
    clean = name.replace("/", "-")
    if clean not in known:
        raise InputError(
            f"encoder '{name}' is neither a folder nor known to open_clip.{did_you_mean(clean, known)} "
            "For a model of the hub write 'hf-hub:owner/name', for a folder './folder'."
        )
    tags = open_clip.list_pretrained_tags_by_model(clean)
    if not pretrained:
        raise InputError(
            f"encoder '{name}' needs a tag that says which weights; without one open_clip would use random "
            f"numbers. Known: {', '.join(tags) or 'none, pass a file'}."
        )
    what = f"encoder '{name}' ({pretrained if not looks_like_path(pretrained) else tidy(pretrained)})"
    tag = open_clip.get_pretrained_cfg(clean, pretrained) or {}
    revision, file = "", Path(pretrained).expanduser()
    if tag:
        file, revision = _cached_checkpoint(tag, what)
    elif not file.is_file():
        if looks_like_path(pretrained) or file.suffix:
            raise not_found(what, file)
        raise unknown(f"encoder '{name}' has no weights called '{pretrained}'", pretrained, tags)
    located = Located(what, file, revision, name, (file,))
    check_file(file, located, weights=True)
    config = open_clip.get_model_config(clean)
    text = config["text_cfg"]
    words = text.get("hf_tokenizer_name")
    outside = [other for other in dict.fromkeys((words, text.get("hf_model_name"))) if other]
    others = tuple(_outside(located, other) for other in outside)
    if words:
        require_tokenizer(located, others[0])
    settings = {k: v for k, v in tag.items() if k in ("mean", "std", "interpolation", "resize_mode")}
    settings = json.loads(json.dumps(_PREPROCESS | settings))  # tuples become lists, as they are read back
    settings["size"] = _size(config["vision_cfg"].get("image_size", 224))
    # open_clip only warns when a tag was trained with another activation than the named architecture has
    # (ViT-L-14 with "openai", "metaclip_400m", "dfn2b" ...) and then computes wrong embeddings.
    return Source(
        **asdict(located),
        open_clip_name=clean,
        pretrained=tidy(pretrained),
        config=config,
        preprocess=settings,
        quick_gelu=bool(tag.get("quick_gelu")),
        folders=others,
    )


def _cached_checkpoint(tag: dict[str, Any], what: str) -> tuple[Path, str]:
    """Look up a tag's weights where open_clip would have put them."""
    from huggingface_hub import constants, try_to_load_from_cache

    if "file" in tag:
        return Path(tag["file"]), ""
    if tag.get("hf_hub"):
        repo, _, file = tag["hf_hub"].rpartition("/")
        safe = str(Path(file).with_suffix(".safetensors")) if file else "open_clip_model.safetensors"
        if file == "open_clip_pytorch_model.bin":
            safe = "open_clip_model.safetensors"
        for candidate in (safe, file or "open_clip_pytorch_model.bin"):
            found = try_to_load_from_cache(repo, candidate)
            if isinstance(found, str):
                return Path(found), Path(found).parent.name
    if tag.get("url"):
        found_file = Path("~/.cache/clip").expanduser() / tag["url"].rpartition("/")[2]
        if found_file.is_file():
            return found_file, ""
    raise not_found(what, constants.HF_HUB_CACHE)


# -- the encoder ---------------------------------------------------------------------------------------------

TEXT_BATCH = 256


@dataclass(frozen=True)
class ImageEmbedding:
    """What one forward pass of the image tower gives.

    Attributes
    ----------
    pooled : float32 tensor, shape (n, d)
        L2-normalised embeddings of whole images.
    patches : float32 tensor, shape (n, h * w, d), or None
        L2-normalised embeddings of the patches in the same joint space, row by row from the top left.
    """

    pooled: Tensor
    patches: Tensor | None = None


class Encoder:
    """An open_clip model with its own preprocessing, tokenizer and geometry. Made by `load_encoder`.

    Attributes
    ----------
    name : str
        Which model this is.
    dim : int
        Width d of the joint space.
    device, dtype
        Where the weights are, and their number format. Results are always float32.
    context_length : int
        Tokens a text may have, start and end included; what is beyond is cut (see `count_tokens`).
    image_size : (int, int)
        Height and width of the image tower's input.
    resize_mode : {"shortest", "longest", "squash"}
        How an image is brought to that size; see `frame`.
    patch_grid : (int, int) or None
        Rows and columns of patches, or None where the tower has no patch embeddings in the joint space.
    logit_scale : float
        The factor on cosines that the model was trained with.
    model, tokenizer
        The open_clip objects, for what itemkit does not wrap (gradients, attention).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Callable[[Image], Tensor],
        tokenizer: Any,
        *,
        name: str,
        logit_scale: float = 100.0,
        record: dict[str, Any] | None = None,
    ) -> None:
        import torch

        self.model = model.eval().requires_grad_(False)
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.name, self.logit_scale, self._record = name, logit_scale, dict(record or {})
        self.resize_mode = self._record.get("preprocess", _PREPROCESS)["resize_mode"]
        parameter = next(model.visual.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        rows, columns = _size(model.visual.image_size)
        self.image_size = (rows, columns)
        # The tokenizer's own limit is what cuts a text; CoCa's model.context_length is of its decoder.
        self.context_length = int(getattr(tokenizer, "context_length", None) or model.context_length)
        self.patch_grid, self._patch_pass = patch_grid(model.visual), patch_pass(model.visual)
        probe = self.encode_images(torch.zeros(1, 3, *self.image_size), patches=self._patch_pass is not None)
        self.dim = int(probe.pooled.shape[1])

    def embed_pixels(self, pixels: Tensor, patches: bool = False) -> ImageEmbedding:
        """Embed preprocessed images; differentiable with respect to `pixels` (used by attacks).

        Parameters
        ----------
        pixels : tensor, shape (n, 3, height, width)
            Stacked results of `preprocess`.
        patches : bool
            Also embed the patches, in the same forward pass.
        """
        pixels = pixels.to(device=self.device, dtype=self.dtype)
        if not patches:
            return ImageEmbedding(_unit(self.model.encode_image(pixels)))
        if self._patch_pass is None:
            raise InputError(
                f"encoder '{self.name}' has no patch embeddings in the joint space, so the localiser 'dense' "
                "is not available with it. Use localiser 'grid' or 'whole', a detector ('owlv2', "
                "'grounding_dino'), or a ViT encoder such as ViT-B-32, ViT-L-14, EVA02-B-16, ViT-B-16-SigLIP."
            )
        return ImageEmbedding(*map(_unit, self._patch_pass(pixels)))

    def encode_images(self, pixels: Tensor, patches: bool = False) -> ImageEmbedding:
        """Embed preprocessed images without gradients. See `embed_pixels`."""
        import torch

        # no_grad, not inference_mode: moving weights inside the latter breaks them, and its results refuse
        # to take part in training later.
        with torch.no_grad():
            return self.embed_pixels(pixels, patches)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts; equal texts are encoded once.

        Returns
        -------
        float32 tensor, shape (n, d)
            L2-normalised; row i belongs to text i.
        """
        import torch

        unique = list(dict.fromkeys(texts))
        if not unique:
            return torch.zeros(0, self.dim, device=self.device)
        parts = []
        with torch.no_grad():
            for start in range(0, len(unique), TEXT_BATCH):
                tokens = self.tokenizer(unique[start : start + TEXT_BATCH]).to(self.device)
                parts.append(_unit(self.model.encode_text(tokens)))
        row = {text: i for i, text in enumerate(unique)}
        return torch.cat(parts)[[row[text] for text in texts]]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count tokens, start and end included; more than `context_length` means that a text is cut."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is None:  # CLIP's own byte-pair tokenizer
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        clean = getattr(self.tokenizer, "clean_fn", lambda text: text)
        return [len(inner(clean(text), truncation=False, verbose=False).input_ids) for text in texts]

    def frame(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Say which part of an original image the tower sees: x0, y0, x1, y1 in its pixels.

        With CLIP's usual resizing ("shortest") the sides of a wide image are cut off; with "squash" the
        frame is the whole image; with "longest" it reaches beyond the image, into the padding.
        """
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

    def __repr__(self) -> str:
        return (
            f"<Encoder {self.name}: {self.dim}-d, {str(self.dtype).removeprefix('torch.')} on {self.device}>"
        )


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
    """Load an open_clip model with pretrained weights from this machine.

    Parameters
    ----------
    model : str or Path
        Name known to open_clip ("ViT-L-14"), a folder in open_clip's local-dir format, or
        "hf-hub:owner/name".
    pretrained : str, optional
        Tag ("openai", "laion2b_s32b_b82k") or file of weights; needed with a name, unused with a folder.
    device, precision
        See `itemkit.devices`.

    Returns
    -------
    Encoder

    Raises
    ------
    ModelNotFound
        The weights are not on this machine. Never random weights, never a download.
    InputError
        Unknown name or tag, no tag given, or weights that do not fit the configuration.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from itemkit.devices import choose_device, choose_precision

    source = find_encoder(model, pretrained)
    chosen = choose_device(device)
    logging.disable(logging.WARNING)  # open_clip warns of the random numbers that are replaced below
    try:
        with reading(source), from_disk_only():
            # filled from the very file that was hashed: left to itself, open_clip chooses one
            network = open_clip.create_model(
                source.open_clip_name,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=source.quick_gelu,
            )
            open_clip.load_checkpoint(network, str(source.weights[0]), weights_only=True)
            tokenizer = open_clip.get_tokenizer(source.open_clip_name)
            tokenizer(["a text"])  # it may lack what it needs to pad
            preprocess = PreprocessCfg(**source.preprocess | {"size": tuple(source.preprocess["size"])})
            transform = image_transform_v2(preprocess, is_train=False)
    finally:
        logging.disable(logging.NOTSET)
    inner = getattr(tokenizer, "tokenizer", None)
    size = getattr(tokenizer, "vocab_size", 0) if inner is None else len(inner)
    require_vocabulary(source, size, getattr(getattr(network, "text", network), "vocab_size", None))
    scale = float(network.logit_scale.detach().float().exp().max())  # before it is rounded to fewer bits
    return Encoder(
        network.to(device=chosen, dtype=choose_precision(precision, chosen)),
        transform,
        tokenizer,
        name=source.name,
        logit_scale=scale,
        record=source.fingerprint(precision=precision),
    )
