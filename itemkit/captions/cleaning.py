"""Captions as people post them, made readable for a text encoder."""

from __future__ import annotations

import html
import re
import unicodedata

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
