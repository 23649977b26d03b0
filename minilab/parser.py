"""The mini caption parser: a spaCy pipeline (tags, dependencies) trained on the grammar's own parses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minilab.grammar import COLOURS, KINDS, N_TEMPLATES, SETTINGS, Facts, Token, sentence

POS = {
    "DT": "DET",
    "NN": "NOUN",
    "JJ": "ADJ",
    "IN": "ADP",
    "CC": "CCONJ",
    "VBZ": "VERB",
    "EX": "PRON",
    ",": "PUNCT",
}

OTHER_NOUNS = (
    "dog cat man woman boy girl bird horse cup chair bottle bus train plane bike street field beach kitchen"
    " room window door wall water sky cloud mountain river bridge plate pizza cake phone book clock"
).split()
OTHER_ADJECTIVES = "small big old young black brown grey wooden tall bright dark little round".split()
"""Words from outside the world, so that tags rest on the frame of a sentence and not only on known words."""


def random_facts(rng: np.random.Generator) -> Facts:
    """Draw facts for a training sentence; a third of the words come from outside the world."""

    def pick(inside: tuple[str, ...], outside: list[str]) -> str:
        return str(rng.choice(outside if rng.random() < 0.33 else inside))

    n = int(rng.integers(1, 4))
    things = tuple((pick(COLOURS, OTHER_ADJECTIVES), pick(KINDS, OTHER_NOUNS)) for _ in range(n))
    return Facts(things, pick(SETTINGS, OTHER_NOUNS))


def train_parser(folder: Path, n_sentences: int = 2400, epochs: int = 6, seed: int = 0) -> dict[str, float]:
    """Train and save the parser.

    Parameters
    ----------
    folder : Path
        Where the spaCy pipeline is written.
    n_sentences, epochs : int
        Size of the training; a tenth more is held out.
    seed : int

    Returns
    -------
    dict
        Held-out tag accuracy and labelled attachment score.
    """
    import spacy
    from spacy.tokens import Doc
    from spacy.training import Example
    from spacy.util import compounding, fix_random_seed, minibatch

    fix_random_seed(seed)
    rng = np.random.default_rng(seed)
    nlp = spacy.blank("en")
    # small hash-embedding towers: the defaults are four times as wide and serve open text
    tok2vec = {"@architectures": "spacy.HashEmbedCNN.v2", "pretrained_vectors": None, "width": 48, "depth": 2}
    tok2vec |= {"embed_size": 500, "window_size": 1, "maxout_pieces": 2, "subword_features": True}
    nlp.add_pipe("tagger", config={"model": {"@architectures": "spacy.Tagger.v2", "tok2vec": tok2vec}})
    state = {"state_type": "parser", "extra_state_tokens": False, "hidden_width": 48, "maxout_pieces": 2}
    nlp.add_pipe(
        "parser",
        config={"model": {"@architectures": "spacy.TransitionBasedParser.v2", "tok2vec": tok2vec, **state}},
    )

    def example(tokens: list[Token]) -> Example:
        words = [t.text for t in tokens]
        spaces = [i + 1 < len(words) and words[i + 1] != "," for i in range(len(words))]
        doc = Doc(nlp.vocab, words=words, spaces=spaces)
        gold = {
            "tags": [t.tag for t in tokens],
            "heads": [t.head for t in tokens],
            "deps": [t.dep for t in tokens],
        }
        return Example.from_dict(doc, gold)

    made = [
        example(sentence(random_facts(rng), int(rng.integers(N_TEMPLATES))))
        for _ in range(int(n_sentences * 1.1))
    ]
    training, held_out = made[:n_sentences], made[n_sentences:]
    optimiser = nlp.initialize(lambda: training)
    for _ in range(epochs):
        rng.shuffle(training)
        for batch in minibatch(training, size=compounding(16, 64, 1.01)):
            nlp.update(batch, sgd=optimiser, drop=0.1)
    scores = nlp.evaluate(held_out)
    rules = nlp.add_pipe("attribute_ruler")  # after initialize(), which would empty it
    for tag, pos in POS.items():
        rules.add(patterns=[[{"TAG": tag}]], attrs={"POS": pos})
    # the weights are NumPy arrays in msgpack; no pickle is written
    folder.parent.mkdir(parents=True, exist_ok=True)
    nlp.to_disk(folder)
    return {"tag_acc": float(scores["tag_acc"]), "las": float(scores["dep_las"])}
