"""First step of the method: one sentence per image, from a captioning model or from the user."""

from __future__ import annotations

import functools
import html
import math
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from itemkit.devices import choose_device, choose_precision, to_device
from itemkit.errors import InputError
from itemkit.models import find_folder, load_processor, load_transformer

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

# Belongs in the fingerprint of a run with users' captions: raise it when a rule below changes.
CLEAN_VERSION = 3
MAX_CHARACTERS = 4000  # of a posted text; what is beyond is no caption, and no encoder reads it

# Applied in this order. A tag is a "<" and then a letter, "/" or "!", so "a < b" and "<3" stay.
_MARKUP = [
    (re.compile(pattern, re.I | re.S), " ")
    for pattern in (
        r"<(script|style|template|noscript)\b[^>]*>.*?(?:</\1\s*>|\Z)",  # content that is no text
        r"<!--.*?(?:--!?>|\Z)",  # comments
        r"""<[/!?]?[A-Za-z](?:"[^"<]*"|'[^'<]*'|[^<>"'])*>"""  # tags; then those that the end cuts off
        r"""|</[A-Za-z][^<>]*\Z|<[A-Za-z][\w-]*\s[^<>]*=[^<>]*\Z""",
    )
]
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=\d)")
_POSTED: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"(?:https?://|www\.)\S+|\b(?:pic\.twitter|t\.co|bit\.ly|instagr\.am)\S*", re.I), " "),
    (re.compile(r"(?<![\w.])(?:RT\s+)?(?:@[\w.]+:?)+"), " "),  # mentions; not the middle of an e-mail address
    # hashtags; not \w+: vowel signs of many scripts are no \w
    (re.compile(r"#(?=\w)([^\s#.,!?;:]+)"), lambda tag: f" {_CAMEL.sub(' ', tag[1].replace('_', ' '))} "),
]
_JOINERS = "\u200c\u200d"  # needed inside words of Persian and Indic scripts; left over between removed emoji
_SPACING = [
    (re.compile(rf"(?:(?<=\s)|^)[{_JOINERS}]+|[{_JOINERS}]+(?=\s|$)"), ""),
    (re.compile(r"([!?.,;:*~_=-])\1+"), r"\1"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"\s([,.!?;:])"), r"\1"),
]
_QUOTES = {('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("\u2018", "\u2019"), ("\u00ab", "\u00bb")}
_EMOJI_PARTS = "\ufe0e\ufe0f\u20e3"  # variation selectors and keycap: marks (Mn), which other scripts need


def clean_caption(text: str) -> str:
    """Turn a caption as people post it into one that a text encoder can read.

    HTML, web addresses, @mentions, emoji and other pictographs go (CLIP's tokenizers split those into bytes);
    hashtags stay as words, fancy letters become plain, repeated punctuation, white space and quotation marks
    around the whole are reduced; again and again, so that a clean caption stays as it is. Of very long texts
    the first 4,000 characters are read. An empty result counts as a missing caption.

    >>> clean_caption("&lt;b&gt;Tom &amp; Jerry&lt;/b&gt; @joe #GoldenHour")
    'Tom & Jerry Golden Hour'
    """
    text = text[: 8 * MAX_CHARACTERS]  # tags and entities are longer than what they say
    # it ends: each round that changes something leaves fewer "&" or "<", or fewer letters, signs or spaces
    while (cleaner := _clean_once(text)) != text:
        text = cleaner
    return text


def _clean_once(text: str) -> str:
    while (plain := html.unescape(text)) != text:  # by itself, as it may be nested very deep
        text = plain
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    text = unicodedata.normalize("NFKC", _substitute(_MARKUP, text))
    text = "".join(map(_readable, _substitute(_POSTED, text)))
    text = _substitute(_SPACING, text).strip(" |·•-–—")[:MAX_CHARACTERS].rstrip()
    wrapped = len(text) > 1 and (text[0], text[-1]) in _QUOTES and not set(text[1:-1]) & {text[0], text[-1]}
    return text[1:-1].strip() if wrapped else text


def _substitute(rules: Sequence[tuple[re.Pattern[str], Any]], text: str) -> str:
    return functools.reduce(lambda text, rule: rule[0].sub(rule[1], text), rules, text)


def _readable(character: str) -> str:
    category = unicodedata.category(character)
    if character in _EMOJI_PARTS or category == "Sk" or (category == "Cf" and character not in _JOINERS):
        return ""  # parts of emoji, skin tones, invisible marks
    return " " if category in ("So", "Cs", "Co", "Cn", "Cc") else character


# BLIP base, 20 tokens, took 396 ms per image in batches of 4, 154 in 16 and 100 in 32 (bfloat16, 2 shared
# cores). More gains little, and the keys and values of 577 patches are 42 MB per image in float32. A GPU
# waits for Python between words, for many images no longer than for few; 21 MB per beam in bfloat16.
CPU_BATCH, GPU_BATCH = 32, 512


@dataclass(frozen=True)
class Caption:
    """A caption, perhaps empty, and how sure the captioner was."""

    text: str
    # Mean log-probability per generated token, the end token included; NaN for a user's caption. It needs no
    # joint space, so it is the control that tells whether the joint space adds anything.
    logprob: float = math.nan


def as_captions(made: Any, n: int) -> list[Caption]:
    """What a captioner returned for ``n`` images, texts or `Caption`; an InputError if not one for each."""
    given = list(made or ())
    if isinstance(made, str) or len(given) != n:
        got = "one text" if isinstance(made, str) else f"{len(given)} captions"
        raise InputError(f"the captioner returned {got} for {n} images; expected a list of one for each")
    found = []
    for item in given:
        text = getattr(item, "text", item)
        if not isinstance(text, str):
            raise InputError(f"the captioner returned {item!r:.60}; expected a text, or a Caption")
        text = text.encode("utf-8", "replace").decode()  # not all of Unicode can be stored
        found.append(Caption(text, getattr(item, "logprob", math.nan)))
    return found


@dataclass(frozen=True)
class Decoding:
    """How sentences are searched for. There is no sampling: the same image gives the same caption."""

    num_beams: int = 1  # 1 is greedy; more is slower and reads smoother
    min_new_tokens: int = 0
    max_new_tokens: int = 40  # lowered to what the text decoder has positions for
    prompt: str = ""  # that the caption continues, or a question; it is not part of the caption

    def __post_init__(self) -> None:
        least, most = self.min_new_tokens, self.max_new_tokens
        if min(self.num_beams, most) < 1 or not 0 <= least <= most:
            raise InputError(f"decoding options do not fit together: {asdict(self)}")


class Captioner:
    """An image-to-text model of transformers. Made by `load_captioner`.

    Attributes
    ----------
    preprocess : callable
        From PIL images to the model's inputs, a dict of CPU tensors with a row for each; `caption` takes that
        of one image in its place. It needs no model and can be sent to other processes.
    """

    def __init__(
        self, model: Any, processor: Any, tokenizer: Any, decoding: Decoding, record: Mapping[str, Any]
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device, self.dtype = model.device, model.dtype
        self.preprocess = functools.partial(_prepare, processor, decoding.prompt, model.dtype)
        self.batch_size = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH
        self._end_ids, room = _text_limits(model)
        least, most = min(decoding.min_new_tokens, room), min(decoding.max_new_tokens, room)
        self.decoding = replace(decoding, min_new_tokens=least, max_new_tokens=most)
        self._record = dict(record)
        if type(model).__name__ == "BlipForConditionalGeneration":
            for layer in model.vision_model.encoder.layers:
                layer.self_attn.forward = functools.partial(_attend, layer.self_attn)

    def caption(self, images: Sequence[Image | Mapping[str, Tensor]]) -> list[Caption]:
        """Caption PIL images, or what `preprocess` made of each, in batches and in their order."""
        captions: list[Caption] = []
        for start in range(0, len(images), self.batch_size):
            tokens, logprobs = self._generate(images[start : start + self.batch_size])
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            means = _mean_until_end(tokens, logprobs, self._end_ids).tolist()
            captions += [Caption(" ".join(t.split()), m) for t, m in zip(texts, means, strict=True)]
        return captions

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the captions, as JSON-ready values."""
        return dict(self._record)

    def _generate(self, images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Generate; return the new tokens (n, steps) and the raw log-probability of each (n, steps)."""
        import torch
        from transformers import EncoderDecoderCache

        if isinstance(images[0], Mapping):
            inputs = {key: torch.cat([image[key] for image in images]) for key in images[0]}
        else:
            inputs = self.preprocess(*images)
        options = asdict(self.decoding)
        del options["prompt"]
        # beams change places within an image, and all of them see the same: only their words must move along
        with patch.object(EncoderDecoderCache, "reorder_cache", _reorder_words):
            out = self.model.generate(
                **{key: to_device(value, self.device) for key, value in inputs.items()},
                **options,
                do_sample=False,
                max_length=None,  # a folder's generation settings may carry one; max_new_tokens is the limit
                return_dict_in_generate=True,
                output_logits=True,  # before length or repetition rules: what the model itself holds likely
            )
        beams = out.get("beam_indices")
        if beams is None:  # greedy: row i comes from row i
            beams = torch.arange(len(images), device=self.device)[:, None].expand(-1, len(out.logits))
        steps = min(beams.shape[1], len(out.logits), out.sequences.shape[1])
        tokens = out.sequences[:, -steps:]  # a prompt, if the model repeats it, stands before
        columns = [
            out.logits[i][beams[:, i].clamp(min=0)].float().log_softmax(-1).gather(1, tokens[:, i, None])
            for i in range(steps)
        ]
        return tokens, torch.cat(columns, dim=1)


def _prepare(processor: Any, prompt: str, dtype: torch.dtype, *images: Image) -> dict[str, Tensor]:
    """Inputs of a captioner with this processor for some images; floats are of the model's type."""
    text = {"text": [prompt] * len(images)} if prompt else {}
    try:
        inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt", **text)
    except (ValueError, TypeError) as error:
        raise InputError(f"this captioner takes no images with the prompt '{prompt}': {error}") from error
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def load_captioner(
    model: str | Path, device: str | torch.device = "auto", precision: str = "auto", **decoding: Any
) -> Captioner:
    """Load a captioning model from this machine: BLIP, BLIP-2, GIT, ViT-GPT2, or any other with `generate`.

    ``model`` is a transformers folder or a hub name, ``decoding`` are fields of `Decoding`.

    Raises
    ------
    ModelNotFound
        Not on this machine, not whole, or not a captioner; nothing is downloaded.
    """
    from transformers import AutoModelForImageTextToText

    located, options, chosen = find_folder(model, "captioner"), Decoding(**decoding), choose_device(device)
    dtype = choose_precision(precision, chosen)
    network = load_transformer(AutoModelForImageTextToText, located, dtype=dtype)
    room = getattr(network.config.get_text_config(decoder=True), "vocab_size", None)
    processor, tokenizer = load_processor(located, room)
    record = located.fingerprint(precision=precision, decoding=asdict(options))
    return Captioner(network.to(chosen), processor, tokenizer, options, record)


def _attend(attention: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """BLIP's attention among patches by torch's fused kernel, which transformers 5.23 does not use there."""
    from torch.nn.functional import scaled_dot_product_attention

    n, count, width = hidden_states.shape
    parts = attention.qkv(hidden_states).reshape(n, count, 3, attention.num_heads, -1)
    mixed = scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
    return attention.projection(mixed.transpose(1, 2).reshape(n, count, width)), None


def _reorder_words(cache: Any, beams: Tensor) -> None:
    cache.self_attention_cache.reorder_cache(beams)


def _mean_until_end(tokens: Tensor, logprobs: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Mean of each row up to its first end token, that included; what follows is padding."""
    ended = (tokens[..., None] == tokens.new_tensor(list(end_ids))).any(dim=-1)
    counted = ended.cumsum(dim=1) == ended  # no end token strictly before this position
    # where, not a product: an impossible padding token has -inf, and -inf * 0 is NaN
    return logprobs.where(counted, 0.0).sum(dim=1) / counted.sum(dim=1)


def _text_limits(model: Any) -> tuple[list[int], int]:
    """End tokens, and how many tokens fit behind the start token."""
    if type(model).__name__ == "BlipForConditionalGeneration":
        # it stops at BERT's separator, whatever its generation settings say
        text = model.config.text_config
        return [text.sep_token_id], text.max_position_embeddings - 1
    inner: Any = getattr(model, "language_model", None)  # BLIP-2 asks its language model
    end = (getattr(inner, "generation_config", None) or model.generation_config).eos_token_id
    return [end] if isinstance(end, int) else list(end or []), sys.maxsize
