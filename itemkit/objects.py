"""Second step of the method: the semantic objects that a caption describes, as short phrases."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit.errors import InputError
from itemkit.models import (
    Located,
    check_file,
    find_place,
    folder_hash,
    looks_like_path,
    not_found,
    pairs,
    read_json,
    reading,
)

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Span, Token

RULES_VERSION = 1  # part of the fingerprint: raise it when the rules or word lists below change

# Heads that name no thing one could point at. They are dropped whatever stands before them ...
_NO_THING = frozenset(
    "photo photograph picture image pic shot snapshot screenshot painting drawing illustration rendering "
    "render portrait closeup close-up view scene style background foreground group pair couple bunch lot "
    "number piece part kind type sort variety collection series row way time moment air distance thing stuff "
    "something anything nothing everything someone somebody anyone anybody everyone everybody nobody one "
    "other".split()
)
# ... and these only when no noun stands before them: "the right side" goes, "street corner" stays.
_PLACE = frozenset(
    "left right top bottom front back rear side middle center centre edge end corner inside outside".split()
)
_NEGATION = {"no", "without"}
_PRONOUNS = {"PRP", "PRP$", "WP", "WP$", "WDT", "EX", "DT"}
# Cut from the beginning of a phrase: articles, possessives, question words, punctuation; and quantifiers.
_CUT_TAGS = frozenset("DT PDT PRP$ WDT WP$ POS EX , . : `` '' -LRB- HYPH SYM".split())
_ARTICLES = {"a", "an", "the"}
_CUT_WORDS = _ARTICLES.union(
    "some any several many few various other another such each every all both only just".split()
)


@dataclass(frozen=True)
class ObjectRules:
    """What becomes of a caption's noun chunks."""

    max_objects: int = 8  # from the beginning of the caption; generation prompts can name dozens
    drop_generic: bool = True  # what nobody could point at: "photo", "group", "the right side"
    drop_negated: bool = True  # what the caption says is absent: "without a shirt", "no people"
    keep_article: bool = False  # a leading "a", "an", "the": for an encoder that learned phrases with them
    # "chunk": "red ball"; "noun", as the authors draw it: "ball", with its compounds: "tennis racket"
    unit: str = "chunk"
    # keep each mention of equal phrases, which object detectors give boxes of their own; else the first
    repeats: bool = False

    def __post_init__(self) -> None:
        if self.max_objects < 1:
            raise InputError(f"max_objects is {self.max_objects}; it must be at least 1")
        if self.unit not in ("chunk", "noun"):
            raise InputError(f"unit is {self.unit!r}; it must be 'chunk' or 'noun'")

    def record(self) -> dict[str, Any]:
        """Everything that changes the objects, as JSON-ready values."""
        # the later ones only where they are not the default: fingerprints without them are in use
        later = ("unit", "repeats")
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in given.items() if k not in later or v != getattr(ObjectRules, k)}


class Parser:
    """A spaCy pipeline with the rules that turn noun chunks into phrases. Made by `load_parser`."""

    def __init__(
        self, nlp: Language, rules: ObjectRules = ObjectRules(), record: Mapping[str, Any] | None = None
    ) -> None:
        self.nlp, self.rules, self._record = nlp, rules, dict(record or {})

    def objects(self, captions: Sequence[str]) -> list[list[str]]:
        """Name the semantic objects of each caption, as lower-case phrases in its order."""
        unique = list(dict.fromkeys(captions))
        parsed = zip(unique, self.nlp.pipe(" ".join(text.split()) for text in unique), strict=True)
        found = {text: phrases(doc, self.rules) for text, doc in parsed}
        return [list(found[text]) for text in captions]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes the objects, as JSON-ready values."""
        return dict(self._record)


def phrases(doc: Doc, rules: ObjectRules) -> list[str]:
    """Clean the noun chunks of a parsed caption: see `ObjectRules` and `Parser.objects`."""
    chunks = [chunk for chunk in doc.noun_chunks if _is_object(chunk, rules)]
    named = [_noun(chunk) if rules.unit == "noun" else list(chunk) for chunk in chunks]
    found = [phrase for tokens in named if (phrase := _phrase(tokens, rules.keep_article))]
    return (found if rules.repeats else list(dict.fromkeys(found)))[: rules.max_objects]


def _noun(chunk: Span) -> list[Token]:
    """The article of a chunk, its head noun, and what it is compounded with: "traffic light"."""
    start = chunk.root.i
    while start > chunk.start and chunk.doc[start - 1].dep_ == "compound":
        start -= 1
    article = [token for token in chunk[:1] if token.i < start and token.lower_ in _ARTICLES]
    return [*article, *chunk.doc[start : chunk.root.i + 1]]


def _is_object(chunk: Span, rules: ObjectRules) -> bool:
    head, words = chunk.root, {token.lower_ for token in chunk}
    if head.tag_ in _PRONOUNS or head.pos_ == "PRON" or not any(c.isalnum() for c in head.text):
        return False
    if rules.drop_negated and (words | {head.head.lower_}) & _NEGATION:
        return False
    if not rules.drop_generic:
        return True
    names = {head.lower_, head.lower_.removesuffix("s")}
    nouns = [t for t in chunk if t.i < head.i and t.tag_.startswith("NN") and t.lower_ not in _PLACE]
    return not (names & _NO_THING or (names & _PLACE and not nouns))


def _phrase(tokens: list[Token], keep_article: bool) -> str:
    """Words of a chunk without what begins and ends it and names nothing."""
    kept = tokens[:1] if keep_article and len(tokens) > 1 and tokens[0].lower_ in _ARTICLES else []
    tokens = tokens[len(kept) :]
    while tokens and (tokens[0].tag_ in _CUT_TAGS or tokens[0].lower_ in _CUT_WORDS or tokens[0].is_punct):
        # "a few dogs", "all of": the article goes first, then the quantifier behind it
        tokens = tokens[1:]
    while tokens and (tokens[-1].is_punct or tokens[-1].tag_ == "POS"):
        tokens = tokens[:-1]
    phrase = " ".join(token.lower_ for token in [*kept, *tokens])
    # tokenised captions have spaces before 's, commas and around hyphens
    for loose, tight in ((" 's", "'s"), (" ' ", "' "), (" ,", ","), (" - ", "-")):
        phrase = phrase.replace(loose, tight)
    return phrase


def load_parser(model: str | Path = "en_core_web_sm", **rules: Any) -> Parser:
    """Load a spaCy pipeline, an installed package or a folder; ``rules`` are fields of `ObjectRules`.

    Raises
    ------
    ModelNotFound
        Neither installed nor a folder.
    InputError
        The pipeline gives no noun chunks.
    """
    import spacy

    located = find_parser(model)
    with reading(located):
        config = spacy.util.load_config(located.path / "config.cfg", interpolate=True)
    _refuse_code(located, config)
    with reading(located):
        nlp = spacy.load(located.path, exclude=["ner", "lemmatizer", "senter"])  # not used, and slow
    try:  # a pipeline without parts of speech gives no chunks and no error
        found, why = list(nlp("A red ball is on the green grass.").noun_chunks), ""
    except (ValueError, LookupError, NotImplementedError) as error:
        found, why = [], f" ({str(error).partition('. ')[0]})"
    if not found:
        raise InputError(
            f"{located.what} gives no noun chunks{why}: use an English pipeline with a tagger, a parser, and "
            "parts of speech (attribute_ruler or morphologizer)"
        )
    chosen = ObjectRules(**rules)
    return Parser(nlp, chosen, located.fingerprint(rules=chosen.record()))


class Pipeline(Located):
    """A spaCy pipeline on this machine."""

    def fingerprint(self, **settings: Any) -> dict[str, Any]:
        """See `Located.fingerprint`; the one setting is ``rules``."""
        meta = read_json(self.path / "meta.json")
        return {
            "kind": "spacy",
            "name": f"{meta.get('lang', '')}_{meta.get('name', '')}",
            "version": str(meta.get("version", "")),
            "files_sha256": folder_hash(self.path),
            "rules_version": RULES_VERSION,
        } | settings


def find_parser(model: str | Path) -> Pipeline:
    """Find a spaCy pipeline without loading it. Parameters and errors as in `load_parser`."""
    if looks_like_path(model):
        place = find_place(model, "parser")
        what, folder = place.what, place.path
    else:
        what = f"parser '{model}'"
        # not spacy.util.get_package_path, which imports the package to find it
        spec = importlib.util.find_spec(str(model)) if str(model).isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            own = f"no package '{model}'; `python -m spacy download {model}` is spaCy's own way"
            raise not_found(what, "the installed Python packages", own)
        folder = Path(next(iter(spec.submodule_search_locations)))
    # an installed package keeps its pipeline in <name>-<version>
    places = (folder / "config.cfg", *sorted(folder.glob("*/config.cfg")))
    config = next((file for file in places if file.is_file()), None)
    if config is None:
        raise not_found(what, folder, "no config.cfg, which a spaCy pipeline has")
    found = Pipeline(what, config.parent)
    for file in found.path.rglob("*"):
        if file.is_file():
            check_file(file, found)
    for name in ("vocab/strings.json", "vocab/lookups.bin"):  # spaCy would go on with empty ones
        if not (found.path / name).is_file():
            raise found.refuse(f"{name} is missing")
    return found


# What a pipeline may be built from: spaCy's own functions and components, which read nothing but the folder.
_OWN = re.compile(r"spacy(-legacy|-curated-transformers)?\.[\w.]+")
_COMPONENTS = frozenset(
    "tok2vec curated_transformer tagger morphologizer parser attribute_ruler lemmatizer senter sentencizer "
    "ner trainable_lemmatizer merge_entities merge_noun_chunks merge_subtokens".split()
)


def _refuse_code(located: Located, config: dict[str, Any]) -> None:
    """Refuse a pipeline whose configuration calls other functions than spaCy's, or loads another pipeline.

    When it loads, spaCy runs what these two sections name: functions registered by any installed package,
    callbacks, and (``source``) other packages, which are imported.
    """
    found = ""
    for key, value in pairs([config.get("nlp"), config.get("components")]):
        own = _OWN.fullmatch(str(value)) if key.startswith("@") else key != "factory" or value in _COMPONENTS
        if key in ("@callbacks", "source") or not own:
            found = f"config.cfg runs '{value}' ({key}) when it is loaded"
    if not re.fullmatch(r"[a-z]{2,3}", str(config.get("nlp", {}).get("lang"))):
        found = "config.cfg names no language"
    if found:
        remedy = "Give a pipeline of spaCy's own components, saved with nlp.to_disk(folder)."
        raise located.refuse(found, remedy)
