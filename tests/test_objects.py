"""Semantic objects: rules on hand-parsed sentences, the loader, real captions against a human reading."""

from __future__ import annotations

import models  # first: it repairs the torchvision import

# isort: split

import csv
import json
from pathlib import Path

import pytest
import spacy
from spacy.tokens import Doc

from itemkit.errors import InputError, ModelNotFound
from itemkit.objects import ObjectRules, Parser, find_parser, load_parser, phrases

POS = {"DT": "DET", "JJ": "ADJ", "NN": "NOUN", "NNS": "NOUN", "NNP": "PROPN", "PRP": "PRON", "PRP$": "PRON"}
POS |= {"IN": "ADP", "CC": "CCONJ", "CD": "NUM", "VBZ": "VERB", "POS": "PART", "RB": "ADV", ",": "PUNCT"}
VOCAB = spacy.blank("en").vocab


def parsed(text: str) -> Doc:
    """Build a parse from "word/TAG/head/dep" items; head is the index of the word it hangs on."""
    words, tags, heads, deps = zip(*(item.split("/") for item in text.split()), strict=True)
    pos, numbers = [POS[tag] for tag in tags], [int(head) for head in heads]
    return Doc(VOCAB, words=words, tags=tags, pos=pos, heads=numbers, deps=deps)


BALL = "a/DT/2/det red/JJ/2/amod ball/NN/2/ROOT on/IN/2/prep the/DT/5/det grass/NN/3/pobj"


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (BALL, ["red ball", "grass"]),
        ("The/DT/1/det photo/NN/1/ROOT of/IN/1/prep a/DT/4/det dog/NN/2/pobj", ["dog"]),
        ("She/PRP/1/nsubj holds/VBZ/1/ROOT it/PRP/1/dobj", []),
        ("his/PRP$/1/poss hat/NN/1/ROOT", ["hat"]),
        ("a/DT/1/det man/NN/1/ROOT without/IN/1/prep a/DT/4/det shirt/NN/2/pobj", ["man"]),
        ("a/DT/1/det room/NN/1/ROOT with/IN/1/prep no/DT/4/det people/NNS/2/pobj", ["room"]),
        ("the/DT/2/det right/JJ/2/amod side/NN/2/ROOT", []),
        ("the/DT/2/det street/NN/2/compound corner/NN/2/ROOT", ["street corner"]),
        ("a/DT/1/det group/NN/1/ROOT of/IN/1/prep two/CD/4/nummod dogs/NNS/2/pobj", ["two dogs"]),
        ("only/RB/2/advmod a/DT/2/det few/JJ/3/amod people/NNS/3/ROOT", ["people"]),
        (
            "a/DT/1/det dog/NN/1/ROOT and/CC/1/cc a/DT/4/det dog/NN/1/conj and/CC/4/cc Dog/NN/4/conj",
            ["dog"],
        ),
        ("a/DT/1/det man/NN/3/poss 's/POS/1/case face/NN/3/ROOT", ["man's face"]),
        ("huge/JJ/3/amod ,/,/3/punct ugly/JJ/3/amod ogre/NN/3/ROOT", ["huge, ugly ogre"]),
    ],
)
def test_rules(sentence: str, expected: list[str]) -> None:
    assert phrases(parsed(sentence), ObjectRules()) == expected


def test_options() -> None:
    photo = parsed("a/DT/1/det photo/NN/1/ROOT without/IN/1/prep people/NNS/2/pobj")
    assert phrases(photo, ObjectRules()) == []
    assert phrases(photo, ObjectRules(drop_generic=False)) == ["photo"]
    assert phrases(photo, ObjectRules(drop_generic=False, drop_negated=False)) == ["photo", "people"]
    assert phrases(parsed(BALL), ObjectRules(max_objects=1)) == ["red ball"]
    with pytest.raises(InputError, match="max_objects is 0; it must be at least 1"):
        ObjectRules(max_objects=0)


@pytest.mark.parametrize(
    ("sentence", "chunks", "nouns", "with_article"),
    [
        (BALL, ["red ball", "grass"], ["ball", "grass"], ["a ball", "the grass"]),
        (
            "the/DT/2/det old/JJ/3/amod tennis/NN/3/compound racket/NN/3/ROOT",
            ["old tennis racket"], ["tennis racket"], ["the tennis racket"],
        ),
        (
            "two/CD/3/nummod red/JJ/3/amod traffic/NN/3/compound lights/NNS/3/ROOT",
            ["two red traffic lights"], ["traffic lights"], ["traffic lights"],
        ),
        ("a/DT/1/det man/NN/3/poss 's/POS/1/case face/NN/3/ROOT", ["man's face"], ["face"], ["a face"]),
    ],
)  # fmt: skip
def test_bare_nouns(sentence: str, chunks: list[str], nouns: list[str], with_article: list[str]) -> None:
    doc = parsed(sentence)
    assert phrases(doc, ObjectRules()) == chunks
    assert phrases(doc, ObjectRules(unit="noun")) == nouns
    assert phrases(doc, ObjectRules(unit="noun", keep_article=True)) == with_article
    with pytest.raises(InputError, match="unit is 'word'; it must be 'chunk' or 'noun'"):
        ObjectRules(unit="word")


def test_repeats_are_mentions_of_their_own_where_asked_for() -> None:
    two = parsed(
        "a/DT/2/det red/JJ/2/amod ball/NN/2/ROOT and/CC/2/cc a/DT/6/det blue/JJ/6/amod ball/NN/2/conj"
    )
    assert phrases(two, ObjectRules(unit="noun")) == ["ball"]
    assert phrases(two, ObjectRules(unit="noun", repeats=True)) == ["ball", "ball"]
    assert phrases(two, ObjectRules(repeats=True)) == ["red ball", "blue ball"]


def test_fingerprints_of_rules_that_are_in_use_stay() -> None:
    first = {"max_objects": 8, "drop_generic": True, "drop_negated": True, "keep_article": False}
    assert ObjectRules().record() == first
    assert ObjectRules(unit="noun", repeats=True).record() == first | {"unit": "noun", "repeats": True}


class Counting:
    """A pipeline that counts what it parses."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def pipe(self, texts):
        for text in texts:
            self.seen.append(text)
            yield parsed(BALL) if text else Doc(VOCAB, words=[])


def test_equal_captions_are_parsed_once_and_order_is_kept() -> None:
    nlp = Counting()
    found = Parser(nlp).objects(["a  red ball", "", "a  red ball"])  # type: ignore[arg-type]
    assert found == [["red ball", "grass"], [], ["red ball", "grass"]]
    assert nlp.seen == ["a red ball", ""]
    found[0].append("changed")
    assert found[2] == ["red ball", "grass"]


def test_a_true_folder(tmp_path: Path) -> None:
    parser = load_parser(models.write_tiny_parser(tmp_path / "parser"), max_objects=3)
    captions = ["a red ball and a blue cup on the grass", ""]
    found = parser.objects(captions)
    assert "red ball" in found[0] and found[1] == []
    assert found == [parser.objects([caption])[0] for caption in captions]
    fingerprint = parser.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    found = find_parser(tmp_path / "parser")
    assert fingerprint == found.fingerprint(rules=ObjectRules(max_objects=3).record())
    assert fingerprint != load_parser(tmp_path / "parser").fingerprint()


def test_a_tokenizer_of_its_own_is_read(tmp_path: Path) -> None:
    folder = models.write_tiny_parser(tmp_path / "parser")
    nlp, saved = spacy.load(folder), (folder / "tokenizer").read_bytes()
    assert load_parser(folder).nlp.tokenizer.to_bytes(exclude=["vocab"]) == saved
    nlp.tokenizer.add_special_case("redball", [{"ORTH": "red"}, {"ORTH": "ball"}])
    nlp.to_disk(folder)
    assert [token.text for token in load_parser(folder).nlp.tokenizer("redball")] == ["red", "ball"]


def test_pipeline_without_parser_is_refused(tmp_path: Path) -> None:
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(InputError, match="gives no noun chunks.* a tagger, a parser"):
        load_parser(tmp_path / "blank")
    spacy.blank("xx").to_disk(tmp_path / "other")
    with pytest.raises(InputError, match="gives no noun chunks.*use an English pipeline"):
        load_parser(tmp_path / "other")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("en_core_web_nothing", r"no package 'en_core_web_nothing'.*spacy download en_core_web_nothing"),
        ("./nowhere", "looked in nowhere: no such folder"),
        (".", r"no config.cfg, which a spaCy pipeline has"),
    ],
)
def test_missing_parser(model: str, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=message):
        load_parser(model)


def test_damaged_parser(tmp_path: Path) -> None:
    folder = tmp_path / "parser"
    folder.mkdir()
    (folder / "config.cfg").write_text("[nlp]\nlang = 'xx-nonsense'\n")
    with pytest.raises(ModelNotFound, match="vocab/strings.json is missing"):
        load_parser(folder)


@pytest.fixture(scope="module")
def real_parser(real_dir: Path) -> Parser:
    return load_parser(real_dir / "spacy_en_port")


@pytest.mark.real
def test_agrees_with_a_human_reading(real_parser: Parser, real_dir: Path) -> None:
    """Fifty human captions and ten prompts, drawn at random; the objects were written down by hand.

    What is missed is mostly the parser's ("dressed in black" gives the object "black"), which here is a port
    of a small pipeline. Phrases count as found only when they are equal, adjectives included.
    """
    with open(Path(__file__).parent / "data" / "noun_chunks.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(real_dir / "index.csv", encoding="utf-8", newline="") as file:
        human = {row["caption"] for row in csv.DictReader(file) if row["label"] == "real"}
    assert len(rows) == 60 and sum(row["caption"] in human for row in rows) == 50
    found = real_parser.objects([row["caption"] for row in rows])
    expected = [[phrase for phrase in row["objects"].split("; ") if phrase] for row in rows]
    hits = sum(len(set(a) & set(b)) for a, b in zip(found, expected, strict=True))
    f1 = 2 * hits / (sum(map(len, found)) + sum(map(len, expected)))
    assert f1 > 0.92, f1  # 0.938 when this was written
