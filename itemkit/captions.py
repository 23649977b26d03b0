"""First step of the method: one sentence per image, from a captioning model."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from itemkit.devices import choose_device, choose_precision, dtype_name
from itemkit.errors import InputError, ModelNotFound
from itemkit.models import (
    UNREADABLE,
    Located,
    find_folder,
    first_line,
    folder_hash,
    from_disk_only,
    load_transformer,
    quiet,
    tidy,
)

if TYPE_CHECKING:
    from PIL.Image import Image

# Belongs in the fingerprint of a run with users' captions: raise it when a rule below changes.
CLEAN_VERSION = 2
_URL = re.compile(r"(?:https?://|www\.)\S+|\b(?:pic\.twitter|t\.co|bit\.ly|instagr\.am)\S*", re.IGNORECASE)
_MENTION = re.compile(r"(?<![\w.])(?:RT\s+)?(?:@[\w.]+:?)+")  # not the middle of an e-mail address
_HASHTAG = re.compile(
    r"#(?=\w)([^\s#.,!?;:]+)"
)  # not \w+: in many scripts vowel signs are no "word" characters
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=\d)")
_JOINERS = "\u200c\u200d"  # needed inside words of Persian and Indic scripts; left over between removed emoji
_LOOSE_JOINERS = re.compile(rf"(?:(?<=\s)|^)[{_JOINERS}]+|[{_JOINERS}]+(?=\s|$)")
_QUOTES = {('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("\u2018", "\u2019"), ("\u00ab", "\u00bb")}
_EMOJI_PARTS = "\ufe0e\ufe0f\u20e3"  # variation selectors and keycap: marks (Mn), which other scripts need


def clean_caption(text: str) -> str:
    """Turn a caption as people post it into one that a text encoder can read.

    In this order: HTML entities decoded; Unicode compatibility forms unified (fancy letters become plain);
    web addresses and @mentions removed; hashtags kept as words ("#GoldenHour_2024" becomes "Golden Hour
    2024"); emoji, flags and other pictographs removed, since CLIP's tokenizers split them into bytes;
    repeated punctuation and white space reduced to one; quotation marks around the whole dropped. Other
    languages are left as they are: whether the encoder reads them is a property of the encoder (most CLIP
    models read English only). All this is repeated until nothing changes ("&amp;amp;" is an "&"), so that
    cleaning a clean caption changes nothing. The result may be empty; that counts as a missing caption.
    """
    # it ends: each round that changes something leaves fewer "&", or else fewer letters and signs, or spaces
    while (cleaner := _clean_once(text)) != text:
        text = cleaner
    return text


def _clean_once(text: str) -> str:
    while (plain := html.unescape(text)) != text:  # by itself, as it may be nested very deep
        text = plain
    text = unicodedata.normalize("NFKC", text)
    text = _MENTION.sub(" ", _URL.sub(" ", text))
    text = _HASHTAG.sub(lambda match: " " + _CAMEL.sub(" ", match.group(1).replace("_", " ")) + " ", text)
    text = "".join(_readable(character) for character in text)
    text = _LOOSE_JOINERS.sub("", text)
    text = re.sub(r"([!?.,;:*~_=-])\1+", r"\1", text)
    text = re.sub(r"\s+([,.!?;:])", r"\1", " ".join(text.split())).strip(" |·•-–—")
    wrapped = len(text) > 1 and (text[0], text[-1]) in _QUOTES and not set(text[1:-1]) & {text[0], text[-1]}
    return text[1:-1].strip() if wrapped else text


def _readable(character: str) -> str:
    category = unicodedata.category(character)
    if character in _EMOJI_PARTS or category == "Sk":  # skin tones
        return ""
    if category == "Cf":
        return character if character in _JOINERS else ""
    return " " if category in ("So", "Cs", "Co", "Cn", "Cc") else character


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
            self.num_beams < 1
            or self.max_new_tokens < 1
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
        batch_size: int | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.image_processor, self.tokenizer = image_processor, tokenizer
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.batch_size = batch_size or (CPU_BATCH if self.device.type == "cpu" else GPU_BATCH)
        self.room = _room(model)
        if self.room is not None and decoding.max_new_tokens > self.room:
            least = min(decoding.min_new_tokens, self.room)
            decoding = replace(decoding, min_new_tokens=least, max_new_tokens=self.room)
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

    def score(self, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
        """Mean log-probability per token of given texts, the end token included.

        The same decoding as `caption`, with each step forced to the given token, so it works for every model
        that can caption, and gives a model's own greedy caption the value that `caption` gave it.

        Returns
        -------
        list of float; NaN for an empty text.
        """
        if len(images) != len(texts):
            raise InputError(
                f"score() was given {len(images)} images and {len(texts)} texts; it needs one per image"
            )
        if not self._end_ids:
            raise InputError(
                "this captioner has no end token, so texts cannot be scored; use the captions' own logprob"
            )
        end = self._end_ids[0]
        values: list[float] = []
        for start in range(0, len(images), self.batch_size):
            batch = texts[start : start + self.batch_size]
            ids = [[*self.tokenizer(text, add_special_tokens=False).input_ids, end] for text in batch]
            longest = max(map(len, ids))
            if self.room is not None and longest > self.room:
                raise InputError(
                    f"a text of {longest} tokens cannot be scored: this captioner has room for {self.room}. "
                    f"It begins: '{batch[[len(i) for i in ids].index(longest)][:40]}'"
                )
            forced = torch.full((len(ids), longest), end, device=self.device)
            for row, tokens in enumerate(ids):
                forced[row, : len(tokens)] = torch.tensor(tokens, device=self.device)
            generated, logprobs = self._generate(images[start : start + self.batch_size], forced)
            means = _mean_until_end(generated, logprobs, [end])
            values += [m if len(t) > 1 else math.nan for m, t in zip(means.tolist(), ids, strict=True)]
        return values

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the captions, as JSON-ready values."""
        return {
            "kind": "transformers",
            "class": type(self.model).__name__,
            "precision": dtype_name(self.dtype),
            "decoding": asdict(self.decoding),
            **self._record,
        }

    def _generate(self, images: Sequence[Image], forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Generate; return the new tokens (n, steps) and the raw log-probability of each (n, steps)."""
        inputs = self._inputs(images)
        options: dict[str, Any] = asdict(self.decoding)
        del options["prompt"]
        if forced is not None:
            steps = forced.shape[1]
            options = {"num_beams": 1, "min_new_tokens": steps, "max_new_tokens": steps}
            options["logits_processor"] = [_Forced(forced)]
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
        if self.processor is not None:
            kwargs: dict[str, Any] = {"images": rgb, "return_tensors": "pt"}
            if self.decoding.prompt:
                kwargs["text"] = [self.decoding.prompt] * len(rgb)
            try:
                inputs = dict(self.processor(**kwargs))
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{type(self.model).__name__} takes no images with the prompt '{self.decoding.prompt}' "
                    f"({first_line(error)}). Set the captioner option prompt= as its model card describes"
                ) from error
        else:
            if self.decoding.prompt:
                raise InputError(
                    f"{type(self.model).__name__} takes no prompt; leave the option prompt empty"
                )
            inputs = dict(self.image_processor(rgb, return_tensors="pt"))
        return {
            k: v.to(self.device, self.dtype) if v.is_floating_point() else v.to(self.device)
            for k, v in inputs.items()
            if isinstance(v, Tensor)
        }


def load_captioner(
    model: str | Path,
    device: str | torch.device = "auto",
    precision: str = "auto",
    *,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    prompt: str = "",
    batch_size: int | None = None,
) -> Captioner:
    """Load a captioning model from this machine.

    Parameters
    ----------
    model : str or Path
        A transformers folder or a hub name: BLIP, BLIP-2, GIT, ViT-GPT2 (VisionEncoderDecoder), or any other
        model with a processor and `generate`.
    device, precision
        See `itemkit.devices`.
    max_new_tokens, min_new_tokens, num_beams, prompt
        See `Decoding`.
    batch_size : int, optional
        Images at a time; default 32 on a CPU and 128 on a GPU. Does not change the captions in float32.

    Raises
    ------
    ModelNotFound
        Not on this machine. Nothing is downloaded and nothing is filled with random numbers.
    """
    import transformers

    located = find_folder(model, "captioner")
    decoding = Decoding(num_beams, min_new_tokens, max_new_tokens, prompt)
    chosen = choose_device(device)
    dtype = choose_precision(precision, chosen)
    network = load_transformer(transformers.AutoModelForImageTextToText, located, dtype=dtype)
    processor, image_processor, tokenizer = _load_processor(located)
    return Captioner(
        network.to(chosen),
        image_processor,
        tokenizer,
        processor,
        decoding=decoding,
        batch_size=batch_size,
        record={
            "name": located.path.name if located.revision == "" else str(model),
            "revision": located.revision,
            "files_sha256": folder_hash(located.path),
        },
    )


def _load_processor(located: Located) -> tuple[Any | None, Any, Any]:
    """Load what turns pictures into pixels and ids into text; as one processor where the folder has one."""
    import transformers

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with from_disk_only():
            if (located.path / "processor_config.json").is_file() or _names_processor(located.path):
                processor = transformers.AutoProcessor.from_pretrained(located.path, **options)
                if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
                    return processor, processor.image_processor, processor.tokenizer
            image_processor = transformers.AutoImageProcessor.from_pretrained(located.path, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(located.path, **options)
    except UNREADABLE as error:
        raise ModelNotFound(
            f"{located.what}: the processor or tokenizer in {tidy(located.path)} cannot be loaded: "
            f"{first_line(error)}. Copy the whole model folder, not only its weights."
        ) from error
    return None, image_processor, tokenizer


def _names_processor(folder: Path) -> bool:
    # Folders written before transformers 4.4x name their processor in preprocessor_config.json.
    file = folder / "preprocessor_config.json"
    return file.is_file() and '"processor_class"' in file.read_text(encoding="utf-8")


class _Forced:
    """Logits processor that leaves one token possible at each step."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -math.inf)
        forced.scatter_(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return forced


def _mean_until_end(tokens: Tensor, logprobs: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Mean of each row up to its first end token, that included; what follows is padding."""
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
