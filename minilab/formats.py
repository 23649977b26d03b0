"""How the mini models are stored: the same on-disk formats as the pretrained ones, so one loader serves all.

An open_clip ``local-dir`` (config, safetensors, own tokenizer) and a transformers BLIP folder. What had to be
found out about either format stands beside the line that needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as PreSequence
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    PreTrainedTokenizerFast,
)

MEAN = STD = (0.5, 0.5, 0.5)


def word_tokenizer(words: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer: pad, unknown, start, the words, and the end token with the highest id.

    Parameters
    ----------
    words : iterable of str
        The vocabulary; lower-cased.
    max_length : int
        Longest text in tokens, start and end included.

    Returns
    -------
    PreTrainedTokenizerFast
    """
    # Lower-casing must sit inside: open_clip only cleans white space before it calls a folder's own
    # tokenizer. Start and end come from the post-processor, so a cut text still ends with the end token.
    vocab = ["<pad>", "<unk>", "<start>", *dict.fromkeys(w.lower() for w in words), "<end>"]
    ids = {word: i for i, word in enumerate(vocab)}
    core = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = PreSequence([WhitespaceSplit(), Punctuation()])
    core.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(t, ids[t]) for t in ("<start>", "<end>")]
    )
    core.decoder = WordPiece(prefix="##", cleanup=True)  # "a red tree, a blue star": no space before a comma
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        cls_token="<start>",
        eos_token="<end>",
        sep_token="<end>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def clip_config(
    vocab_size: int,
    *,
    image_size: int = 48,
    patch_size: int = 6,
    width: int = 128,
    layers: int = 4,
    head_width: int = 32,
    embed_dim: int = 128,
    context_length: int = 32,
    text_layers: int = 2,
) -> dict[str, Any]:
    """Configure a small ViT and a small text tower for open_clip.

    Parameters
    ----------
    vocab_size, image_size, patch_size, width, layers, head_width, embed_dim, context_length, text_layers
        As open_clip names them; both towers have the same width and head width.

    Returns
    -------
    dict
        ``model_cfg`` of an open_clip folder.
    """
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "layers": layers,
            "head_width": head_width,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": vocab_size,
            "width": width,
            "layers": text_layers,
            "heads": width // head_width,
            # Any non-empty name makes open_clip take the folder's own tokenizer; without it the 49,408-token
            # BPE is taken silently and its ids run past this small table.
            "hf_tokenizer_name": "own",
            # Pool at the first end token. The causal mask stays: open_clip has no padding mask, so only
            # causality keeps the padding after the end token from changing the embedding.
            "pool_type": "eos",
            "eos_id": vocab_size - 1,
        },
    }


def save_clip(
    folder: Path, model: torch.nn.Module, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Save an open_clip model as a ``local-dir`` that loads with equal outputs.

    Parameters
    ----------
    folder : Path
    model : open_clip CLIP
    config : dict
        From :func:`clip_config`.
    tokenizer : PreTrainedTokenizerFast
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    # "squash" keeps the whole picture; the default "shortest" crops the sides of wide images
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    body = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(body, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def blip_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_size: int = 48,
    patch_size: int = 6,
    width: int = 128,
    layers: int = 4,
    text_layers: int = 2,
    head_width: int = 32,
    max_length: int = 40,
) -> BlipConfig:
    """Configure a BLIP for a small vocabulary.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    image_size, patch_size, width, layers, text_layers, head_width, max_length : int
        Sizes of the towers; both have the same width.

    Returns
    -------
    BlipConfig
    """
    # generate() starts from bos and stops at sep, whatever eos is; unset, they keep BERT's ids (30522, 102)
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        encoder_hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=text_layers,
        num_attention_heads=width // head_width,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # the default initializer_range of 1e-10 is meant for towers that get loaded, not trained from scratch
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // head_width,
        image_size=image_size,
        patch_size=patch_size,
        initializer_range=0.02,
    )
    return BlipConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=width,
        image_text_hidden_size=width,
    )


def blip_model(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> BlipForConditionalGeneration:
    """Build an untrained BLIP for a small vocabulary.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    **sizes
        Of :func:`blip_config`.

    Returns
    -------
    BlipForConditionalGeneration
    """
    return BlipForConditionalGeneration(blip_config(tokenizer, **sizes))


def save_blip(
    folder: Path,
    model: BlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    image_size: int = 48,
) -> None:
    """Save a BLIP with its processor as a transformers folder.

    Parameters
    ----------
    folder : Path
    model : BlipForConditionalGeneration
    tokenizer : PreTrainedTokenizerFast
    image_size : int
        Side in pixels to which the processor resizes.
    """
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    image_processor = BlipImageProcessor(size=size, image_mean=MEAN, image_std=STD)
    BlipProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)


def vocabulary(sentences: Sequence[str]) -> list[str]:
    """List the distinct words of some sentences, sorted."""
    return sorted({w for s in sentences for w in s.lower().replace(",", " , ").split()})
