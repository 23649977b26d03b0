"""Controls and baselines: what the misalignment must beat before a number of it means something.

Each is a `Scorer`, the interface that the detector has too: ``fit(train, val)`` on features, then
``decision_function(features)``, higher for fake. One registry, `CONTROLS`, says which question each answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from sklearn.base import clone

from itemkit import schema
from itemkit.baselines import pixels as pixel_baselines
from itemkit.baselines.scorers import (
    ConfidenceScorer,
    FeatureScorer,
    MisalignmentScorer,
    NearestNeighbour,
    Scorer,
    caption_likelihood,
    generic_texts,
    likelihood_and_confidence,
    logistic,
    shuffle_texts,
)
from itemkit.errors import InputError
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.misalignment import RepresentationConfig, get_representation

__all__ = [
    "CONTROLS", "Control", "FeatureScorer", "Inputs", "MisalignmentScorer", "NearestNeighbour", "Scorer",
    "caption_likelihood", "generic_texts", "get_control", "likelihood_and_confidence", "logistic",
    "shuffle_texts",
]  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What the controls may be given besides features.

    Attributes
    ----------
    representation : the misalignment that the caption controls repeat with other texts
    head : untrained MLP for all controls that use one, the same as the detector's
    generic_emb : embedding of one generic caption
    seed : of head, shuffling and network
    """

    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    head: MisalignmentMLP = field(default_factory=MisalignmentMLP)
    generic_emb: np.ndarray | None = None
    seed: int = 0

    def seeded_head(self) -> MisalignmentMLP:
        """The head with the seed of this run."""
        return clone(self.head).set_params(seed=self.seed)


@dataclass(frozen=True)
class Control:
    """One control or baseline.

    Attributes
    ----------
    name : key in `CONTROLS` and in every table
    title : for figures
    question : what it answers
    source : where it comes from
    make : Inputs -> untrained Scorer
    needs : "pixels", "generic_emb" or "caption_logprob"
    """

    name: str
    title: str
    question: str
    source: str
    make: Callable[[Inputs], Scorer]
    needs: tuple[str, ...] = ()

    def build(
        self,
        seed: int = 0,
        representation: RepresentationConfig | str = "absolute",
        head: MisalignmentMLP | None = None,
        generic_emb: np.ndarray | None = None,
    ) -> Scorer:
        """Untrained scorer of this control."""
        if "generic_emb" in self.needs and generic_emb is None:
            raise InputError(
                f"{self.name} needs the embedding of one caption: generic_emb=encoder.encode_texts(['a "
                f"photo'])[0]"
            )
        head = head if head is not None else MisalignmentMLP()
        return self.make(Inputs(get_representation(representation), head, generic_emb, seed))

    def missing(self, features: Features, generic_emb: np.ndarray | None = None) -> str | None:
        """What this control lacks on these features; None if it can be run."""
        if "pixels" in self.needs and features.pixels is None:
            return "the images themselves: dataclasses.replace(features, pixels=array of shape (n, h, w, 3))"
        if "generic_emb" in self.needs and generic_emb is None:
            return "the embedding of a generic caption: generic_emb"
        if "caption_logprob" in self.needs and features.table[schema.CAPTION_LOGPROB].isna().any():
            return "caption likelihoods: captions from a captioner that reports them"
        return None


def _image(features: Features) -> np.ndarray:
    return features.image_emb


def _text(features: Features) -> np.ndarray:
    return features.caption_emb


def _shuffled(inputs: Inputs) -> Scorer:
    return MisalignmentScorer(
        inputs.representation, inputs.seeded_head(), lambda f: shuffle_texts(f, inputs.seed)
    )


def _generic(inputs: Inputs) -> Scorer:
    assert inputs.generic_emb is not None  # Control.build has asked for it
    emb = inputs.generic_emb
    return MisalignmentScorer(inputs.representation, inputs.seeded_head(), lambda f: generic_texts(f, emb))


_UNIVFD = "UnivFD (Ojha et al. 2023, arXiv 2302.10174)"
_OURS = "our control"
_ALL = (
    Control(
        "image_mlp", "image only, MLP", "Is the caption needed at all, with the same head?", _OURS,
        lambda i: FeatureScorer(_image, i.seeded_head()),
    ),
    Control(
        "image_linear", "image only, linear", "Does a linear probe on the image embedding do as well?",
        _UNIVFD, lambda i: FeatureScorer(_image, logistic()),
    ),
    Control(
        "image_nearest", "image only, nearest neighbour", "Does no training at all do as well?", _UNIVFD,
        lambda i: FeatureScorer(_image, NearestNeighbour()),
    ),
    Control(
        "text_only", "caption only", "Does the caption's style or content give the class away?", _OURS,
        lambda i: FeatureScorer(_text, i.seeded_head()),
    ),
    Control(
        "shuffled_captions", "another image's caption", "Must it be the image's own caption?", _OURS,
        _shuffled,
    ),
    Control(
        "generic_caption", "one caption for all", "Is the text more than a fixed point to measure from?",
        _OURS, _generic, ("generic_emb",),
    ),
    Control(
        "caption_likelihood", "caption likelihood", "Does the captioner's own doubt suffice?", _OURS,
        lambda i: FeatureScorer(caption_likelihood, logistic()), ("caption_logprob",),
    ),
    Control(
        "likelihood_confidence", "caption likelihood and localiser score",
        "Is misalignment more than the doubt of captioner and localiser?", _OURS,
        lambda i: ConfidenceScorer(i.seeded_head()), ("caption_logprob",),
    ),
    Control(
        "spectrum", "power spectrum", "Do the frequencies give the generator away?",
        "azimuthal power spectrum, Durall et al. 2020 (arXiv 2003.01826)",
        lambda i: FeatureScorer(pixel_baselines.spectrum, logistic()), ("pixels",),
    ),
    Control(
        "noise_residual", "noise residual", "Does the noise differ from a camera's?",
        "co-occurrences of residuals, after SPAM (Pevny et al. 2010) and Cozzolino et al. 2014",
        lambda i: FeatureScorer(pixel_baselines.noise_residual, logistic()), ("pixels",),
    ),
    Control(
        "cnn", "CNN on pixels", "What does a network find that sees every pixel?",
        "recipe of CNNDetection (Wang et al. 2020, arXiv 1912.11035) in a small network",
        lambda i: FeatureScorer(
            pixel_baselines.pixels, pixel_baselines.PixelCNN(seed=i.seed, device=i.head.device)
        ),
        ("pixels",),
    ),
)  # fmt: skip

CONTROLS: dict[str, Control] = {control.name: control for control in _ALL}


def get_control(name: str) -> Control:
    """Look a control up; an unknown name lists those there are."""
    if name not in CONTROLS:
        raise InputError(f"unknown control {name!r}; expected one of {', '.join(CONTROLS)}")
    return CONTROLS[name]
