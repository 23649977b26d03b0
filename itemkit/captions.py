"""First step of the method: one sentence per image, from a captioning model or from the user."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit.errors import InputError
from itemkit.models import find_folder, load_processor, load_transformer, quiet

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

# -- captions of the user's ----------------------------------------------------------------------------------

# Belongs in the fingerprint of a run with users' captions: raise it when a rule below changes.
CLEAN_VERSION = 3
MAX_CHARACTERS = 4000  # of a posted text; what is beyond is no caption, and no encoder reads it
# Content that is no text, comments, tags: a "<" and then a letter, "/" or "!", so "a < b" and "<3" stay.
_HIDDEN = re.compile(r"<(script|style|template|noscript)\b[^>]*>.*?(?:</\1\s*>|\Z)", re.I | re.S)
_COMMENT = re.compile(r"<!--.*?(?:--!?>|\Z)", re.DOTALL)
_TAG = re.compile(
    r"""<[/!?]?[A-Za-z](?:"[^"<]*"|'[^'<]*'|[^<>"'])*>"""
    r"""|</[A-Za-z][^<>]*\Z|<[A-Za-z][\w-]*\s[^<>]*=[^<>]*\Z"""  # cut off at the end of the text
)
_URL = re.compile(r"(?:https?://|www\.)\S+|\b(?:pic\.twitter|t\.co|bit\.ly|instagr\.am)\S*", re.IGNORECASE)
_MENTION = re.compile(r"(?<![\w.])(?:RT\s+)?(?:@[\w.]+:?)+")  # not the middle of an e-mail address
_HASHTAG = re.compile(r"#(?=\w)([^\s#.,!?;:]+)")  # not \w+: vowel signs of many scripts are no \w
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=\d)")
_JOINERS = "\u200c\u200d"  # needed inside words of Persian and Indic scripts; left over between removed emoji
_LOOSE_JOINERS = re.compile(rf"(?:(?<=\s)|^)[{_JOINERS}]+|[{_JOINERS}]+(?=\s|$)")
_QUOTES = {('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("\u2018", "\u2019"), ("\u00ab", "\u00bb")}
_EMOJI_PARTS = "\ufe0e\ufe0f\u20e3"  # variation selectors and keycap: marks (Mn), which other scripts need


def clean_caption(text: str) -> str:
    """Turn a caption as people post it into one that a text encoder can read.

    In this order: HTML entities decoded, control characters (NUL among them) taken for blanks; scripts,
    styles, comments and tags of HTML removed; Unicode compatibility forms unified (fancy letters become
    plain); web addresses and @mentions removed; hashtags kept as words ("#GoldenHour_2024" becomes "Golden
    Hour 2024"); emoji, flags and other pictographs removed, since CLIP's tokenizers split them into bytes;
    repeated punctuation and white space reduced to one; quotation marks around the whole dropped. Other
    languages are left as they are: whether the encoder reads them is a property of the encoder (most CLIP
    models read English only). All this is repeated until nothing changes ("&amp;lt;b&amp;gt;" is a tag), so
    that cleaning a clean caption changes nothing. Of very long texts the first 4,000 characters are read.
    The result may be empty; that counts as a missing caption.

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
    for markup in (_HIDDEN, _COMMENT, _TAG):
        text = markup.sub(" ", text)
    text = unicodedata.normalize("NFKC", text)
    text = _MENTION.sub(" ", _URL.sub(" ", text))
    text = _HASHTAG.sub(lambda match: " " + _CAMEL.sub(" ", match.group(1).replace("_", " ")) + " ", text)
    text = "".join(_readable(character) for character in text)
    text = _LOOSE_JOINERS.sub("", text)
    text = re.sub(r"([!?.,;:*~_=-])\1+", r"\1", text)
    text = re.sub(r"\s+([,.!?;:])", r"\1", " ".join(text.split())).strip(" |·•-–—")
    text = text[:MAX_CHARACTERS].rstrip()
    wrapped = len(text) > 1 and (text[0], text[-1]) in _QUOTES and not set(text[1:-1]) & {text[0], text[-1]}
    return text[1:-1].strip() if wrapped else text


def _readable(character: str) -> str:
    category = unicodedata.category(character)
    if character in _EMOJI_PARTS or category == "Sk":  # skin tones
        return ""
    if category == "Cf":
        return character if character in _JOINERS else ""
    return " " if category in ("So", "Cs", "Co", "Cn", "Cc") else character


# -- captions of a model -------------------------------------------------------------------------------------

DEFAULT_MAX_NEW_TOKENS = 40
# Each step of the decoder reads all its weights once for the whole batch: BLIP base, 20 tokens, took 396 ms
# per image in batches of 4, 154 in 16 and 100 in 32 (bfloat16, 2 shared cores); its image tower took about
# 470 beside that. More gains little, and the keys and values of 577 patches are 42 MB per image in float32.
CPU_BATCH, GPU_BATCH = 32, 128


@dataclass(frozen=True)
class Caption:
    """A caption and how sure the captioner was.

    Attributes
    ----------
    text : str
        The caption; may be empty.
    logprob : float
        Mean log-probability per generated token, the end token included; NaN for a user's caption. It needs
        no joint space, so it is the control that tells whether the joint space adds anything.
    """

    text: str
    logprob: float = math.nan


def as_captions(made: Any, n: int) -> list[Caption]:
    """What a captioner returned for ``n`` images, checked; a plain string is a caption, its logprob unknown.

    Raises
    ------
    InputError
        Not one text for each image.
    """
    found = [Caption(item) if isinstance(item, str) else item for item in made or ()]
    if isinstance(made, str) or len(found) != n:
        got = "one text" if isinstance(made, str) else f"{len(found)} captions"
        raise InputError(f"the captioner returned {got} for {n} images; expected a list of one for each")
    for caption in found:
        if not isinstance(getattr(caption, "text", None), str):
            raise InputError(f"the captioner returned {caption!r:.60}; expected a text, or a Caption")
    return found


@dataclass(frozen=True)
class Decoding:
    """How sentences are searched for. There is no sampling: the same image gives the same caption.

    Attributes
    ----------
    num_beams : int
        1 is greedy; more is slower and reads smoother.
    min_new_tokens, max_new_tokens : int
        Bounds of the length; `max_new_tokens` is lowered to what the text decoder has positions for.
    prompt : str
        Text that the caption continues, or the question for a model that wants one; "" for none. It is not
        part of the caption.
    """

    num_beams: int = 1
    min_new_tokens: int = 0
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    prompt: str = ""

    def __post_init__(self) -> None:
        if (
            min(self.num_beams, self.max_new_tokens) < 1
            or not 0 <= self.min_new_tokens <= self.max_new_tokens
        ):
            raise InputError(f"decoding options do not fit together: {asdict(self)}")


class Captioner:
    """An image-to-text model of transformers. Made by `load_captioner`."""

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        tokenizer: Any,
        processor: Any | None = None,
        *,
        decoding: Decoding = Decoding(),
        record: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.image_processor, self.tokenizer = image_processor, tokenizer
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.batch_size = CPU_BATCH if self.device.type == "cpu" else GPU_BATCH
        room = _room(model)
        if room is not None and decoding.max_new_tokens > room:
            least = min(decoding.min_new_tokens, room)
            decoding = replace(decoding, min_new_tokens=least, max_new_tokens=room)
        self.decoding = decoding
        self._record = dict(record or {})
        self._end_ids = _end_ids(model)

    def caption(self, images: Sequence[Image]) -> list[Caption]:
        """Caption images, in batches.

        Parameters
        ----------
        images : sequence of PIL images, RGB

        Returns
        -------
        list of Caption, in the order of the images.
        """
        captions: list[Caption] = []
        for start in range(0, len(images), self.batch_size):
            generated, logprobs = self._generate(images[start : start + self.batch_size])
            lines = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
            means = _mean_until_end(generated, logprobs, self._end_ids)
            captions += [
                Caption(" ".join(line.split()), value)
                for line, value in zip(lines, means.tolist(), strict=True)
            ]
        return captions

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the captions, as JSON-ready values."""
        return dict(self._record)

    def _generate(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Generate; return the new tokens (n, steps) and the raw log-probability of each (n, steps)."""
        import torch

        inputs = self._inputs(images)
        options: dict[str, Any] = asdict(self.decoding)
        del options["prompt"]
        with quiet(), torch.no_grad():
            out = self.model.generate(
                **inputs,
                **options,
                do_sample=False,
                max_length=None,  # a folder's generation settings may carry one; max_new_tokens is the limit
                return_dict_in_generate=True,
                output_logits=True,  # before length or repetition rules: what the model itself holds likely
            )
        beams = getattr(out, "beam_indices", None)
        steps = len(out.logits) if beams is None else beams.shape[1]
        steps = min(steps, len(out.logits), out.sequences.shape[1])
        generated = out.sequences[:, -steps:]  # a prompt, if the model repeats it, stands before
        rows = torch.arange(len(generated), device=generated.device)
        columns = []
        for step in range(steps):
            source = rows if beams is None else beams[:, step].clamp(min=0)
            scores = out.logits[step][source].float().log_softmax(dim=-1)
            columns.append(scores.gather(1, generated[:, step : step + 1]))
        return generated, torch.cat(columns, dim=1)

    def _inputs(self, images: Sequence[Image]) -> dict[str, Tensor]:
        rgb = [image.convert("RGB") for image in images]
        prompt, kind = self.decoding.prompt, type(self.model).__name__
        if self.processor is None:
            if prompt:
                raise InputError(f"{kind} takes no prompt; leave the option prompt empty")
            inputs = self.image_processor(rgb, return_tensors="pt")
        else:
            text = {"text": [prompt] * len(rgb)} if prompt else {}
            try:
                inputs = self.processor(images=rgb, return_tensors="pt", **text)
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{kind} takes no images with the prompt '{prompt}' ({error}). Set the captioner option "
                    "prompt= as its model card describes"
                ) from error
        return {
            k: v.to(self.device, self.dtype) if v.is_floating_point() else v.to(self.device)
            for k, v in dict(inputs).items()
            if hasattr(v, "is_floating_point")
        }


def load_captioner(
    model: str | Path,
    device: str | torch.device = "auto",
    precision: str = "auto",
    **decoding: Any,
) -> Captioner:
    """Load a captioning model from this machine.

    Parameters
    ----------
    model : str or Path
        A transformers folder or a hub name: BLIP, BLIP-2, GIT, ViT-GPT2 (VisionEncoderDecoder), or any other
        model with a processor and `generate`.
    device, precision
        See `itemkit.devices`.
    **decoding
        Fields of `Decoding`: num_beams, min_new_tokens, max_new_tokens, prompt.

    Raises
    ------
    ModelNotFound
        Not on this machine, not whole, or not a captioner. Nothing is downloaded and nothing is filled with
        random numbers.
    """
    from transformers import AutoModelForImageTextToText

    from itemkit.devices import choose_device, choose_precision

    located = find_folder(model, "captioner")
    options = Decoding(**decoding)
    chosen = choose_device(device)
    network = load_transformer(
        AutoModelForImageTextToText, located, dtype=choose_precision(precision, chosen)
    )
    room = getattr(network.config.get_text_config(decoder=True), "vocab_size", None)
    processor, image_processor, tokenizer = load_processor(located, room, reads_text=False)
    return Captioner(
        network.to(chosen),
        image_processor,
        tokenizer,
        processor,
        decoding=options,
        record=located.fingerprint(precision=precision, decoding=asdict(options)),
    )


def _mean_until_end(tokens: Tensor, logprobs: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Mean of each row up to its first end token, that included; what follows is padding."""
    import torch

    ended = torch.isin(tokens, torch.tensor(list(end_ids), device=tokens.device))
    before = ended.cumsum(dim=1) - ended.long()  # end tokens strictly before this position
    counted = (before == 0).float()
    # where, not a product: an impossible padding token has -inf, and -inf * 0 is NaN
    return torch.where(counted > 0, logprobs, 0.0).sum(dim=1) / counted.sum(dim=1)


def _end_ids(model: Any) -> list[int]:
    # BLIP stops at BERT's separator, whatever its generation settings say. BLIP-2 asks its language model.
    if type(model).__name__ == "BlipForConditionalGeneration":
        return [model.config.text_config.sep_token_id]
    inner: Any = getattr(model, "language_model", None)
    settings: Any = getattr(inner, "generation_config", None) or model.generation_config
    end = settings.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _room(model: Any) -> int | None:
    """Tokens a BLIP decoder can add to its start token; others can add hundreds, or share with the image."""
    if type(model).__name__ == "BlipForConditionalGeneration":
        return int(model.config.text_config.max_position_embeddings) - 1
    return None
