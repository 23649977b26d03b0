"""Small random models in the true on-disk formats, so that tests load them through the loaders a user calls.

The mini models of the laboratory are written in the same formats; what had to be found out is noted where it
matters. Everything here is random: these folders test code paths, never quality.
"""

from __future__ import annotations

import itemkit  # noqa: F401  (first: it repairs the torchvision import, which open_clip and transformers need)

# isort: split

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, PreTrainedTokenizerFast

from minilab.formats import (  # the one place where these formats are written
    MEAN,
    STD,
    blip_config,
    clip_config,
    save_blip,
    save_clip,
    word_tokenizer,
)

__all__ = ["MEAN", "STD", "save_clip", "word_tokenizer"]

WORDS = (
    "a an the red blue green ball cube cup on in left right of and grass sand photo picture dog sky ,".split()
)


def tiny_clip_config(
    vocab_size: int, *, text_width: int | None = None, text_heads: int | None = None, **sizes: int
) -> dict[str, Any]:
    """``model_cfg`` of an open_clip folder; the text tower may have a width of its own."""
    config = clip_config(vocab_size, **sizes)
    own = {"width": text_width, "heads": text_heads}
    config["text_cfg"] |= {key: value for key, value in own.items() if value is not None}
    return config


def write_tiny_clip(folder: str | Path, words: Sequence[str] = WORDS, *, seed: int = 0, **sizes: int) -> Path:
    """Write an open_clip ``local-dir``: config, safetensors weights, and the folder's own fast tokenizer."""
    folder = Path(folder)
    tokenizer = word_tokenizer(words, sizes.get("context_length", 32))
    model_cfg = tiny_clip_config(len(tokenizer), **sizes)
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**model_cfg)
    with torch.no_grad():  # at their initial scale, tiny random towers map everything to nearly one point
        for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
            block.mlp.c_proj.weight.mul_(4)
        model.token_embedding.weight.mul_(50)
    save_clip(folder, model, model_cfg, tokenizer)
    return folder


def tiny_blip_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int = 64,
    layers: int = 2,
    text_layers: int = 2,
    heads: int = 4,
    **sizes: int,
) -> BlipConfig:
    """BLIP configuration for a small vocabulary, smaller than the laboratory's."""
    return blip_config(
        tokenizer, width=width, layers=layers, text_layers=text_layers, head_width=width // heads, **sizes
    )


def write_tiny_blip(
    folder: str | Path,
    words: Sequence[str] = WORDS,
    *,
    seed: int = 0,
    image_size: int = 48,
    max_length: int = 40,
    **sizes: int,
) -> Path:
    """Write a transformers folder of BLIP for captions, with its processor and its own small vocabulary."""
    folder = Path(folder)
    tokenizer = word_tokenizer(words, max_length)
    config = tiny_blip_config(tokenizer, image_size=image_size, max_length=max_length, **sizes)
    model = BlipForConditionalGeneration(config)
    randomise(model, seed)
    save_blip(folder, model, tokenizer, image_size)
    return folder


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.3) -> None:
    """Give all weights a spread at which different inputs give visibly different outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def write_tiny_vit_gpt2(folder: str | Path, words: Sequence[str] = WORDS) -> Path:
    """Write a VisionEncoderDecoder folder laid out as nlpconnect/vit-gpt2-image-captioning."""
    from transformers import (
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    tokenizer = word_tokenizer(words, 40)
    text = GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True,
        is_decoder=True, **_token_ids(tokenizer),
    )  # fmt: skip
    vision = ViTConfig(**SIZES, image_size=48, patch_size=6)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id = tokenizer.bos_token_id
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    images = ViTImageProcessor(size={"height": 48, "width": 48})  # no processor_config
    return _save(folder, VisionEncoderDecoderModel(config=config), images, tokenizer)


def write_tiny_git(folder: str | Path, words: Sequence[str] = WORDS) -> Path:
    """Write a GIT folder (microsoft/git-base)."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    tokenizer = word_tokenizer(words, 60)
    config = GitConfig(
        vision_config={**SIZES, "image_size": 48, "patch_size": 12}, vocab_size=len(tokenizer),
        max_position_embeddings=60, **SIZES, **_token_ids(tokenizer),
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    return _save(folder, GitForCausalLM(config), GitProcessor(image_processor=images, tokenizer=tokenizer))


def write_tiny_blip2(folder: str | Path, words: Sequence[str] = WORDS) -> Path:
    """Write a BLIP-2 folder with an OPT language model (Salesforce/blip2-opt-2.7b)."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

    tokenizer = word_tokenizer(words, 60)
    images = BlipImageProcessor(size={"height": 48, "width": 48})
    processor = Blip2Processor(images, tokenizer, num_query_tokens=4)  # adds "<image>"
    config = Blip2Config(
        vision_config={**SIZES, "image_size": 48, "patch_size": 12},
        qformer_config={**SIZES, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)},
        text_config={
            "model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 32, "ffn_dim": 64,
            "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 60, **_token_ids(tokenizer),
        },
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return _save(folder, Blip2ForConditionalGeneration(config), processor)


def write_tiny_owlv2(folder: str | Path, words: Sequence[str] = WORDS) -> Path:
    """Write an Owlv2 folder (google/owlv2-base-patch16-ensemble)."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    tokenizer = word_tokenizer(words, 16)
    config = Owlv2Config(
        text_config={
            **SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 16, **_token_ids(tokenizer),
        },
        vision_config={**SIZES, "image_size": 48, "patch_size": 12},
        projection_dim=32,
    )  # fmt: skip
    images = Owlv2ImageProcessor(size={"height": 48, "width": 48})
    return _save(
        folder, Owlv2ForObjectDetection(config), Owlv2Processor(image_processor=images, tokenizer=tokenizer)
    )


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _save(folder: str | Path, model: torch.nn.Module, *processors: Any) -> Path:
    randomise(model, seed=0)
    for part in (model, *processors):
        part.save_pretrained(folder)
    return Path(folder)


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def write_tiny_grounding_dino(folder: str | Path, words: Sequence[str] = WORDS) -> Path:
    """Write a Grounding DINO folder (IDEA-Research/grounding-dino-tiny), with the BERT tokenizer it needs."""
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Ids 101, 102, 1012 of [CLS], [SEP] and "." are written into the model's code: they split the prompt.
    vocab = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, "?": 1029, ".": 1012}
    vocab |= {f"[unused{i}]": i for i in range(1040) if i not in vocab.values()}
    vocab |= {word: 1040 + i for i, word in enumerate(dict.fromkeys(words)) if word not in vocab}
    tokenizer = BertTokenizer(vocab=vocab)
    backbone = SwinConfig(
        image_size=160, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2],
        window_size=4, out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = {
        "model_type": "bert", "vocab_size": len(vocab), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        num_queries=20, max_text_len=48,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    model.save_pretrained(folder)
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 160, "longest_edge": 240})
    GroundingDinoProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


# Object detectors that see the image alone, by kind: the names that transformers gives their classes and
# their image processors, and their backbones.
DETECTORS = {
    "detr": ("Detr", "Detr", "resnet"),
    "conditional_detr": ("ConditionalDetr", "ConditionalDetr", "resnet"),
    "deformable_detr": ("DeformableDetr", "DeformableDetr", "resnet"),
    "yolos": ("Yolos", "Yolos", ""),
    "rt_detr": ("RTDetr", "RTDetr", "rt_detr_resnet"),
    "rt_detr_v2": ("RTDetrV2", "RTDetr", "rt_detr_resnet"),
    "d_fine": ("DFine", "RTDetr", "hgnet_v2"),
}
CLASSES = ("ball", "cup", "traffic light", "dog", "person", "N/A")


def write_tiny_object_detector(
    folder: str | Path, kind: str = "rt_detr_v2", classes: Sequence[str] = CLASSES
) -> Path:
    """Write a transformers folder of an object detector with classes of its own (`DETECTORS`)."""
    import transformers

    name, processor, backbone = DETECTORS[kind]
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    sizes |= {"d_model": 32, "num_queries": 12, "id2label": dict(enumerate(classes))}
    sizes["label2id"] = {label: k for k, label in enumerate(classes)}
    hidden = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4}
    stages = ["stage4"] if kind in ("detr", "conditional_detr") else ["stage2", "stage3", "stage4"]
    size = {"shortest_edge": 96, "longest_edge": 144}
    if kind == "yolos":
        sizes |= {**SIZES, "image_size": [96, 144], "patch_size": 16, "num_detection_tokens": 12}
    elif backbone == "resnet":
        sizes["backbone_config"] = transformers.ResNetConfig(
            **hidden, layer_type="basic", out_features=stages
        )
    else:
        size = {"height": 64, "width": 64}
        sizes["backbone_config"] = {"model_type": backbone, "out_features": stages, **hidden}
        if backbone == "hgnet_v2":
            blocks = {
                "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 24, 32],
                "stage_mid_channels": [8] * 4,
                "stage_out_channels": [16, 24, 32, 48], "stage_num_blocks": [1] * 4,
                "stage_light_block": [False] * 4, "stage_kernel_size": [3] * 4,
                "stage_numb_of_layers": [1] * 4, "stage_downsample": [False, True, True, True],
            }  # fmt: skip
            sizes["backbone_config"] |= {**blocks, "embedding_size": 8}
        sizes |= {"encoder_hidden_dim": 32, "encoder_in_channels": [24, 32, 48], "num_denoising": 0}
        sizes["decoder_in_channels"] = [32] * 3
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    images = getattr(transformers, f"{processor}ImageProcessor")(size=size)
    for part in (model, images):
        part.save_pretrained(folder)
    return Path(folder)


def write_tiny_parser(folder: str | Path, epochs: int = 3) -> Path:
    """Train and write a spaCy pipeline that parses "a red ball and a blue cup on the grass"; takes seconds.

    - Noun chunks need parts of speech besides tags and a parse, so an attribute_ruler maps tags to them. Its
      patterns go in after ``initialize``, which clears them.
    - ``tok2vec`` inside tagger and parser: no vectors, no pretrained weights.
    """
    import random

    import spacy
    from spacy.training import Example

    nlp = spacy.blank("en")
    for name in ("tagger", "parser"):
        nlp.add_pipe(name)
    ruler = nlp.add_pipe("attribute_ruler")
    # words, tags, heads, dependencies of three shapes of sentence; "#": a colour, "@": a thing
    shapes = [
        ("a # @ on the @", "DT JJ NN IN DT NN", [2, 2, 2, 2, 5, 3], "det amod ROOT prep det pobj"),
        (
            "a # @ and a # @ on the @", "DT JJ NN CC DT JJ NN IN DT NN", [2, 2, 2, 2, 6, 6, 2, 2, 9, 7],
            "det amod ROOT cc det amod conj prep det pobj",
        ),
        (
            "A # @ is on the # @ .", "DT JJ NN VBZ IN DT JJ NN .", [2, 2, 3, 3, 3, 7, 7, 4, 3],
            "det amod nsubj ROOT prep det amod pobj punct",
        ),
    ]  # fmt: skip
    rng = random.Random(0)
    examples = []
    for index in range(60):
        words, tags, heads, deps = shapes[index % len(shapes)]
        choices = {"#": ["red", "blue", "green"], "@": ["ball", "cup", "grass"]}
        text = "".join(rng.choice(choices.get(c, [c])) for c in words)
        annotations = {"words": text.split(), "tags": tags.split(), "heads": heads, "deps": deps.split()}
        examples.append(Example.from_dict(nlp.make_doc(text), annotations))
    spacy.util.fix_random_seed(0)
    optimizer = nlp.initialize(lambda: examples)
    kinds = {"DT": "DET", "JJ": "ADJ", "NN": "NOUN", "IN": "ADP", "CC": "CCONJ", ".": "PUNCT", "VBZ": "AUX"}
    for tag, pos in kinds.items():
        ruler.add([[{"TAG": tag}]], {"POS": pos})  # type: ignore[attr-defined]
    for _ in range(epochs):
        for start in range(0, len(examples), 6):
            nlp.update(examples[start : start + 6], sgd=optimizer)
    nlp.to_disk(folder)
    return Path(folder)
