"""The joint space: open_clip models that turn images, texts and image patches into comparable vectors."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import InputError, ModelNotFound
from itemkit.models import (
    UNREADABLE,
    Located,
    cached_snapshot,
    file_hash,
    first_line,
    folder_hash,
    from_disk_only,
    hub_cache,
    looks_like_path,
    not_found,
    tidy,
    weight_files,
)

if TYPE_CHECKING:
    from PIL.Image import Image

TO_TENSOR = ("ToTensor", "MaybeToTensor")  # of torchvision and of open_clip


def stack_pixels(preprocess: Callable[[Image], Tensor], images: Sequence[Image]) -> Tensor:
    """Preprocess images into one batch, equal to ``torch.stack([preprocess(i) for i in images])``.

    Where the preprocessing is the usual chain (steps on the picture, to a tensor, steps on the tensor), only
    the first part runs image by image, in as many threads as torch uses; the rest runs once for all.
    """
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


def pooled_pass(visual: torch.nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a function pixels -> pooled embeddings, or None where the tower is of another build."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.attn_pool is not None or visual.pool_type != "tok":
        return None
    transformer = visual.transformer
    *blocks, last = transformer.resblocks
    if type(last) is not ResidualAttentionBlock or not transformer.batch_first or visual.output_tokens:
        return None

    def class_token_pass(pixels: Tensor) -> Tensor:
        x = visual._embeds(pixels)
        for block in blocks:
            x = block(x)
        token, normed = x[:, :1], last.ln_1(x)
        token = token + last.ls_1(last.attention(normed[:, :1], normed, normed))
        token = token + last.ls_2(last.mlp(last.ln_2(token)))
        pooled = visual.ln_post(token[:, 0])
        return pooled if visual.proj is None else pooled @ visual.proj

    return class_token_pass


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
    norm : float32 tensor, shape (n,), or None
        Lengths of the pooled embeddings before normalisation.
    patch_norm : float32 tensor, shape (n, h * w), or None
        Lengths of the patch embeddings before normalisation.
    """

    pooled: Tensor
    patches: Tensor | None = None
    norm: Tensor | None = None
    patch_norm: Tensor | None = None


class Encoder:
    """An open_clip model with its own preprocessing, tokenizer and geometry. Made by `load_encoder`.

    Attributes
    ----------
    name, pretrained, revision, weights_hash : str
        Which model this is.
    dim : int
        Width d of the joint space.
    device, dtype
        Where the weights are, and their number format. Results are always float32.
    context_length : int
        Tokens a text may have, start and end included; what is beyond is cut (see `count_tokens`).
    image_size : (int, int)
        Height and width of the image tower's input.
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
        pretrained: str = "",
        revision: str = "",
        weights_hash: str = "",
        record: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.name, self.pretrained = name, pretrained
        self.revision, self.weights_hash = revision, weights_hash
        self._record = dict(record or {})
        parameter = next(model.visual.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        size = model.visual.image_size
        rows, columns = (size, size) if isinstance(size, int) else size
        self.image_size = (int(rows), int(columns))
        # The tokenizer's own limit is what cuts a text; CoCa's model.context_length is of its decoder.
        self.context_length = int(getattr(tokenizer, "context_length", None) or model.context_length)
        self.logit_scale = float(model.logit_scale.detach().float().exp().max())
        self._patch_pass, self._pooled_pass = patch_pass(model.visual), pooled_pass(model.visual)
        probe = self.encode_images(torch.zeros(1, 3, *self.image_size), patches=self._patch_pass is not None)
        self.dim = int(probe.pooled.shape[1])
        self.patch_grid = patch_grid(model.visual)

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
            unit, norm = _unit((self._pooled_pass or self.model.encode_image)(pixels))
            return ImageEmbedding(unit, norm=norm)
        if self._patch_pass is None:
            raise InputError(
                f"encoder '{self.name}' has no patch embeddings in the joint space, so the localiser 'dense' "
                "is not available with it. Use localiser 'grid' or 'whole', a detector ('owlv2', "
                "'grounding_dino'), or a ViT encoder such as ViT-B-32, ViT-L-14, EVA02-B-16, ViT-B-16-SigLIP."
            )
        (unit, norm), (patch_unit, patch_norm) = map(_unit, self._patch_pass(pixels))
        return ImageEmbedding(unit, patch_unit, norm, patch_norm)

    def encode_images(self, pixels: Tensor, patches: bool = False) -> ImageEmbedding:
        """Embed preprocessed images without gradients. See `embed_pixels`."""
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
        return self.embed_texts(texts)[0]

    def embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed texts as `encode_texts` does, and give the lengths before normalisation, shape (n,)."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return torch.zeros(0, self.dim, device=self.device), torch.zeros(0, device=self.device)
        parts, lengths = [], []
        with torch.no_grad():
            for start in range(0, len(unique), TEXT_BATCH):
                tokens = self.tokenizer(unique[start : start + TEXT_BATCH]).to(self.device)
                unit, norm = _unit(self.model.encode_text(tokens))
                parts.append(unit)
                lengths.append(norm)
        row = {text: i for i, text in enumerate(unique)}
        index = torch.tensor([row[text] for text in texts], device=self.device)
        return torch.cat(parts)[index], torch.cat(lengths)[index]

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
        mode = self._record.get("preprocess", {}).get("resize_mode", "shortest")
        if mode == "squash":
            return 0.0, 0.0, float(width), float(height)
        rows, columns = self.image_size
        scales = (columns / width, rows / height)
        scale = max(scales) if mode == "shortest" else min(scales)
        half_w, half_h = columns / scale / 2, rows / scale / 2
        return width / 2 - half_w, height / 2 - half_h, width / 2 + half_w, height / 2 + half_h

    def fingerprint(self) -> dict[str, Any]:
        """Everything about this encoder that changes the numbers, as JSON-ready values."""
        return {
            "kind": "open_clip",
            "name": self.name,
            "pretrained": self.pretrained,
            "revision": self.revision,
            "weights_sha256": self.weights_hash,
            "precision": dtype_name(self.dtype),
            "context_length": self.context_length,
            "image_size": list(self.image_size),
            "dim": self.dim,
            **self._record,
        }

    def __repr__(self) -> str:
        tag = f" ({self.pretrained})" if self.pretrained else ""
        return f"<Encoder {self.name}{tag}: {self.dim}-d, {dtype_name(self.dtype)} on {self.device}>"


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length, as F.normalize gives them, and their lengths before."""
    x = x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(1e-12), norm.squeeze(-1)


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

    source = find_encoder(model, pretrained)
    chosen = choose_device(device)
    dtype = choose_precision(precision, chosen)
    try:
        with from_disk_only():
            network = open_clip.create_model(
                source.open_clip_name,
                pretrained=None if source.open_clip_name.startswith("local-dir:") else str(source.checkpoint),
                require_pretrained=True,
                force_quick_gelu=source.quick_gelu,
                force_preprocess_cfg=source.preprocess,
                weights_only=True,
            )
            tokenizer = open_clip.get_tokenizer(source.open_clip_name)
    except UNREADABLE as error:
        raise ModelNotFound(
            f"{source.located.what} was found in {tidy(source.located.path)} but cannot be loaded: "
            f"{first_line(error)}. If a tokenizer or a text tower is missing, fetch the model again with "
            "`itemkit download`; otherwise the weights do not fit the configuration."
        ) from error
    config = dict(network.visual.preprocess_cfg)
    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
    _refuse_foreign_tokens(source, network, tokenizer)
    local = source.open_clip_name.startswith("local-dir:")
    model_cfg = open_clip.get_model_config(source.open_clip_name)
    return Encoder(
        network.to(device=chosen, dtype=dtype),
        transform,
        tokenizer,
        name=Path(model).name if local else str(model),
        pretrained=source.pretrained or "",
        revision=source.located.revision,
        weights_hash=file_hash(source.checkpoint),
        record={
            "preprocess": json.loads(json.dumps(config)),
            "architecture_sha256": _json_hash({**model_cfg, "force_quick_gelu": source.quick_gelu}),
            "tokenizer": folder_hash(source.located.path) if local else type(tokenizer).__name__,
        },
    )


def _refuse_foreign_tokens(source: Source, network: torch.nn.Module, tokenizer: Any) -> None:
    """Catch a folder whose config forgets `hf_tokenizer_name`: it gets CLIP's 49,408 tokens."""
    size = getattr(tokenizer, "vocab_size", None)
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        size = len(inner)
    room = getattr(network, "vocab_size", None) or getattr(getattr(network, "text", None), "vocab_size", None)
    if size and room and size > room:
        raise InputError(
            f"{source.located.what}: its tokenizer has {size} tokens, its text tower only {room}. In "
            f"{CONFIG_FILE}, text_cfg needs a non-empty 'hf_tokenizer_name' for the folder's own tokenizer."
        )


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
