"""The words of the mini world: what a scene may hold, how it is told, and what a caption claims.

Captions come from a grammar that also knows its own parse, so the same sentences train the caption parser,
and a caption can be read back into facts and compared with the truth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

KINDS = ("ball", "cube", "cone", "car", "house", "tree", "flower", "boat", "fish", "star", "mug", "lamp")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SETTINGS = ("grass", "sand", "snow", "road", "table")
MAX_OBJECTS = 3


@dataclass(frozen=True)
class Facts:
    """What a caption claims, or what is true of a scene.

    ``things`` are (colour, kind) pairs; from left to right where ``ordered``.
    """

    things: tuple[tuple[str, str], ...]
    setting: str | None
    ordered: bool = True


@dataclass
class Token:
    """One word with its tag and its place in the dependency tree (head is an index into the sentence)."""

    text: str
    tag: str
    dep: str
    head: int = 0


def phrase(colour: str, kind: str) -> str:
    """Words for one object: ``an orange car``."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"


def caption(facts: Facts) -> str:
    """Tell a scene in the one fixed way that the mini captioner learns.

    Parameters
    ----------
    facts : Facts
        One to three things, left to right, and a setting.

    Returns
    -------
    str
        ``a red ball on the grass``, ``a red ball to the left of a blue car on the grass`` or
        ``a red ball, a blue car and a green tree on the grass``.
    """
    return " ".join(t.text for t in sentence(facts, template=0)).replace(" ,", ",")


def random_caption(facts: Facts, rng: np.random.Generator) -> str:
    """Tell a scene by one of several templates; the mini CLIP reads all of them."""
    tokens = sentence(facts, template=int(rng.integers(N_TEMPLATES)))
    return " ".join(t.text for t in tokens).replace(" ,", ",")


N_TEMPLATES = 8


def sentence(facts: Facts, template: int) -> list[Token]:
    """Build the sentence of a scene, with tags and dependencies.

    Parameters
    ----------
    facts : Facts
        What to tell.
    template : int
        0 the plain one; 1 ``there is``; 2 ``a photo of``; 3 setting first; 4 from right to left;
        5 a full sentence with ``sits``; 6 ``the picture shows``; 7 without the relation.

    Returns
    -------
    list of Token
    """
    things = [_thing(c, k) for c, k in facts.things]
    if template == 4 and len(things) == 2:
        subject = _join(things[1], "right", things[0])
    elif len(things) == 2 and template != 7:
        subject = _join(things[0], "left", things[1])
    else:
        subject = _coordinate(things)
    where = _prep("on", _the(facts.setting)) if facts.setting else None
    if template == 1:
        tree = _verb("is", "VBZ", before=[(_word("there", "EX"), "expl")], after=[(subject, "attr")])
        return _finish(tree, where)
    if template == 2:
        return _finish(_attach(_noun("a", "photo"), _prep("of", subject), "prep"), where)
    if template == 3 and where:
        tree = _verb("is", "VBZ", before=[(where, "prep")], after=[(subject, "nsubj")])
        return _finish(tree, None)
    if template == 5 and len(things) == 1:
        return _finish(_verb("sits", "VBZ", before=[(subject, "nsubj")]), where)
    if template == 6:
        tree = _verb("shows", "VBZ", before=[(_noun("the", "picture"), "nsubj")], after=[(subject, "dobj")])
        return _finish(tree, where)
    return _finish(subject, where)


# A tree under construction is a list of tokens whose root has head -1.


def _word(text: str, tag: str) -> list[Token]:
    return [Token(text, tag, "ROOT", -1)]


def _root(tree: list[Token]) -> int:
    return next(i for i, t in enumerate(tree) if t.head == -1)


def _graft(parts: list[tuple[list[Token], str]], head: int) -> list[Token]:
    """Put parts in a row; the root of part ``head`` stays root, the others hang on it by their relation."""
    starts = np.cumsum([0] + [len(p) for p, _ in parts])
    root = int(starts[head]) + _root(parts[head][0])
    out = []
    for i, (tree, dep) in enumerate(parts):
        for t in tree:
            if t.head >= 0:
                out.append(Token(t.text, t.tag, t.dep, t.head + int(starts[i])))
            elif i == head:
                out.append(Token(t.text, t.tag, "ROOT", -1))
            else:
                out.append(Token(t.text, t.tag, dep, root))
    return out


def _noun(det: str, noun: str, *adjectives: str) -> list[Token]:
    parts = [(_word(det, "DT"), "det")] + [(_word(a, "JJ"), "amod") for a in adjectives]
    return _graft([*parts, (_word(noun, "NN"), "")], head=len(parts))


def _thing(colour: str, kind: str) -> list[Token]:
    return _noun("an" if colour[0] in "aeiou" else "a", kind, colour)


def _the(noun: str) -> list[Token]:
    return _noun("the", noun)


def _prep(word: str, noun: list[Token]) -> list[Token]:
    return _graft([(_word(word, "IN"), ""), (noun, "pobj")], head=0)


def _attach(tree: list[Token], part: list[Token], dep: str) -> list[Token]:
    return _graft([(tree, ""), (part, dep)], head=0)


def _join(first: list[Token], side: str, second: list[Token]) -> list[Token]:
    """``first to the left of second``."""
    to = _prep("to", _attach(_the(side), _prep("of", second), "prep"))
    return _attach(first, to, "prep")


def _coordinate(things: list[list[Token]]) -> list[Token]:
    """``x``, ``x and y`` or ``x, y and z``, each noun hanging on the one before as in spaCy's scheme."""
    tree = things[-1]
    for i, thing in enumerate(reversed(things[:-1])):
        link = (_word("and", "CC"), "cc") if i == 0 else (_word(",", ","), "punct")
        tree = _graft([(thing, ""), link, (tree, "conj")], head=0)
    return tree


def _verb(
    text: str,
    tag: str,
    before: list[tuple[list[Token], str]] | None = None,
    after: list[tuple[list[Token], str]] | None = None,
) -> list[Token]:
    before = before or []
    return _graft([*before, (_word(text, tag), ""), *(after or [])], head=len(before))


def _finish(tree: list[Token], where: list[Token] | None) -> list[Token]:
    tree = tree if where is None else _attach(tree, where, "prep")
    root = _root(tree)
    tree[root].head = root
    return tree


_THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})\b")
_SETTING = re.compile(rf"\bthe ({'|'.join(SETTINGS)})\b")


def read_caption(text: str) -> Facts:
    """Read what a caption of this world claims.

    Parameters
    ----------
    text : str
        Any caption; words outside the grammar are passed over.

    Returns
    -------
    Facts
        Things in left-to-right order where the caption tells the order.
    """
    text = text.lower()
    things = tuple((m[1], m[2]) for m in _THING.finditer(text))
    setting = _SETTING.search(text)
    if "to the right of" in text:
        things = things[::-1]
    ordered = len(things) != 2 or "to the left of" in text or "to the right of" in text
    return Facts(things, setting[1] if setting else None, ordered)
