"""Which models a run uses, under one name: `mini`, `fast`, `paper`; each part can be replaced."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit.errors import InputError, ModelNotFound
from itemkit.models import ANY_PRESET, PARTS, REMEDY, Located, Models, looks_like_path, tidy

if TYPE_CHECKING:
    import torch


MINI_REMEDY = (
    " The mini models come with the repository: `git checkout data/mini` brings them back, `make lab` trains "
    "them anew, and ITEMKIT_DATA names another data folder."
)
MODELS_VARIABLE = "ITEMKIT_MODELS"
DETECTORS = {
    "owlv2": "google/owlv2-base-patch16-ensemble",
    "grounding_dino": "IDEA-Research/grounding-dino-base",
}
"""Localisers that are models of their own; defaults as in `regions.grounding`, which is slow to import."""
LOCALISERS = ("whole", "grid", "dense", *DETECTORS)


@dataclass(frozen=True)
class Preset:
    """A named choice of models and their options.

    Attributes
    ----------
    name, about : str
        How it is called, and what it is for, in one sentence.
    captioner : str, Path, object or None
        Transformers folder or hub name, or anything with ``caption`` and ``fingerprint``; None leaves it out
        (all captions then come with the images).
    captioner_options : mapping
        Of `captions.load_captioner`.
    parser : str, Path, object or None
        spaCy package or folder, or anything with ``objects`` and ``fingerprint``; None gives global features
        only.
    parser_options : mapping
        Fields of `objects.ObjectRules`.
    encoder, encoder_pretrained : str, Path or object
        open_clip name and tag, or a folder; or an `Encoder`.
    localiser : str, object or None
        Name for `regions.make_localiser`, or anything with ``locate`` and ``fingerprint``.
    localiser_options : mapping
        Of the localiser, for a detector with ``model``.
    precision : str
        Of captioner and encoder, see `devices.choose_precision`.
    """

    name: str
    about: str
    captioner: Any
    encoder: Any
    parser: Any
    localiser: Any
    encoder_pretrained: str | None = None
    captioner_options: Mapping[str, Any] = field(default_factory=dict)
    parser_options: Mapping[str, Any] = field(default_factory=dict)
    localiser_options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "auto"

    def build(self, device: str | torch.device = "auto") -> Models:
        """Load all models from this machine.

        Parameters
        ----------
        device : str or torch.device
            See `devices.choose_device`.

        Raises
        ------
        ModelNotFound
            A model is not on this machine. Looked up for all parts before any is loaded, so it takes seconds.
        """
        from itemkit.captions import load_captioner
        from itemkit.devices import choose_device
        from itemkit.encoder import load_encoder
        from itemkit.objects import load_parser
        from itemkit.regions import make_localiser

        chosen = choose_device(device)
        self.require()
        try:
            encoder, parser = self.encoder, self.parser
            captioner, localiser = self.captioner, self.localiser
            if _by_name(encoder):
                encoder = load_encoder(encoder, self.encoder_pretrained, chosen, self.precision)
            if _by_name(parser):
                parser = load_parser(parser, **self.parser_options)
            if _by_name(captioner):
                captioner = load_captioner(captioner, chosen, self.precision, **self.captioner_options)
            if _by_name(localiser):
                options = dict(self.localiser_options)
                if "model" in options:
                    options.setdefault("device", chosen)
                localiser = make_localiser(localiser, encoder, **options)
        except ModelNotFound as error:
            # from the cause: in a notebook the same message would be shown twice
            raise ModelNotFound(str(error).replace(ANY_PRESET, self.name)) from error.__cause__
        return Models(encoder, captioner, parser, localiser)

    def fingerprint(self, captions: str = "generate", device: str | torch.device = "auto") -> dict[str, Any]:
        """As ``build(device).fingerprint(captions)``."""
        return self.build(device).fingerprint(captions)

    def find(self) -> dict[str, Located | ModelNotFound]:
        """Look for the files of every part that is given by name, without loading them.

        Returns
        -------
        dict
            Part ("captioner", "parser", "localiser", "encoder") to where it is, or to the error that says
            what is missing.

        Raises
        ------
        InputError
            A name or tag that nobody knows.
        """
        from itemkit.encoder import find_encoder
        from itemkit.models import find_folder
        from itemkit.objects import find_parser

        finders: dict[str, Callable[[], Located]] = {}
        if _by_name(self.captioner):
            finders["captioner"] = lambda: find_folder(self.captioner, "captioner")
        if _by_name(self.parser):
            finders["parser"] = lambda: find_parser(self.parser)
        if _by_name(self.localiser) and "model" in self.localiser_options:
            finders["localiser"] = lambda: find_folder(self.localiser_options["model"], "detector")
        if _by_name(self.encoder):
            finders["encoder"] = lambda: find_encoder(self.encoder, self.encoder_pretrained).located
        found: dict[str, Located | ModelNotFound] = {}
        for part, find in finders.items():
            try:
                found[part] = find()
            except ModelNotFound as error:
                found[part] = error
        return found

    def require(self) -> None:
        """Raise one `ModelNotFound` that names every model that is not on this machine, and what to do."""
        missing = [str(error) for error in self.find().values() if isinstance(error, ModelNotFound)]
        if not missing:
            return
        facts = _told_once([message.partition(REMEDY)[0] for message in missing])
        if self.name == "mini" and all(tidy(mini_folder()) in message for message in missing):
            remedy = MINI_REMEDY  # no hub has these
        else:
            remedy = REMEDY.replace(ANY_PRESET, self.name)
        if len(missing) > 1:
            remedy = remedy.replace("Fetch it", "Fetch them").replace("holds it", "holds them")
        raise ModelNotFound(facts + remedy)

    def record(self) -> dict[str, Any]:
        """The choices as JSON-ready values without anybody's home folder, to be kept beside results."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _jsonable(value) for name, value in values.items()}


PRESETS: dict[str, Preset] = {
    "mini": Preset(
        name="mini",
        about="Small models trained on rendered scenes; they come with itemkit and fail on photographs.",
        captioner="captioner",  # folders of data/mini/models
        encoder="clip",
        parser="parser",
        parser_options={"keep_article": True},  # the mini CLIP learned "a red ball" and "the sand"
        localiser="grid",
        # The same numbers on every machine, so that notebooks can assert them; the models are small anyway.
        precision="float32",
    ),
    "fast": Preset(
        name="fast",
        about="ViT-B/32, BLIP base and the encoder's own patch map: a first look on a modest GPU.",
        captioner="Salesforce/blip-image-captioning-base",
        captioner_options={"max_new_tokens": 40},
        encoder="ViT-B-32",
        encoder_pretrained="laion2b_s34b_b79k",
        parser="en_core_web_sm",
        localiser="dense",
    ),
    # The paper's own models are not public to us. This is our choice: the encoder most of the field uses,
    # and the captioner's decoding of DE-FAKE (beam 3, 5 to 60 tokens).
    "paper": Preset(
        name="paper",
        about="ViT-L/14 (OpenAI), BLIP large and a grounding detector: our reading of the method.",
        captioner="Salesforce/blip-image-captioning-large",
        captioner_options={"num_beams": 3, "min_new_tokens": 5, "max_new_tokens": 60},
        encoder="ViT-L-14",
        encoder_pretrained="openai",
        parser="en_core_web_sm",
        localiser="grounding_dino",
        localiser_options={"model": "IDEA-Research/grounding-dino-base"},
    ),
}


def get_preset(
    name: str = "mini", folder: str | Path | None = None, *, use_variable: bool = True, **overrides: Any
) -> Preset:
    """Look up a preset and replace parts of it.

    Parameters
    ----------
    name : str
        "mini", "fast" or "paper".
    folder : str or Path, optional
        Take the models from the subfolders ``encoder``, ``captioner``, ``parser`` and ``detector`` of this
        folder, as `itemkit download --to FOLDER` writes them. For "fast" and "paper" the environment variable
        ITEMKIT_MODELS can name it too, so that a notebook needs no change.
    use_variable : bool
        False: as if ITEMKIT_MODELS were not set.
    **overrides
        Fields of `Preset`, e.g. ``localiser="whole"``, ``captioner=my_object``, ``encoder="./my-clip"``. A
        captioner, encoder, parser or localiser that is replaced starts from that part's default options. In
        one text: ``encoder="ViT-B-16:openai"`` (name and tag), ``localiser="owlv2:./my-owl"`` (detector and
        its model). A detector without a model gets the folder's, or else its default.

    Returns
    -------
    Preset

    Raises
    ------
    InputError
        Unknown preset or field.

    >>> get_preset("fast", localiser="whole").localiser
    'whole'
    """
    if name not in PRESETS:
        raise InputError(f"preset '{name}' is unknown.{_hint(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    known = [f.name for f in dataclasses.fields(Preset) if f.name not in ("name", "about")]
    for key in overrides:
        if key not in known:
            raise InputError(f"a preset has no field '{key}'.{_hint(key, known)} Fields: {', '.join(known)}.")
    preset = PRESETS[name]
    if name == "mini":
        folders: dict[str, Any] = {
            part: str(mini_folder() / "models" / str(getattr(preset, part))) for part in PARTS[:3]
        }
        preset = dataclasses.replace(preset, **folders)
    elif folder is None and use_variable:
        folder = os.environ.get(MODELS_VARIABLE) or None
    folder = None if folder is None else Path(folder).expanduser()
    if folder is not None:
        preset = _from_folder(preset, folder)
    overrides = _split_names(overrides)
    for part, options in (
        ("captioner", "captioner_options"),
        ("parser", "parser_options"),
        ("localiser", "localiser_options"),
        ("encoder", "encoder_pretrained"),
    ):
        # Options made for one model may be unknown to another ("model" of a detector, a tag of weights).
        if part in overrides and options not in overrides:
            overrides[options] = None if part == "encoder" else {}
    preset = dataclasses.replace(preset, **overrides)
    if isinstance(preset.localiser, str) and preset.localiser not in LOCALISERS:
        hint = _hint(preset.localiser, LOCALISERS)
        raise InputError(f"localiser '{preset.localiser}' is unknown.{hint} Known: {', '.join(LOCALISERS)}.")
    if isinstance(preset.localiser, str) and preset.localiser in DETECTORS:
        model = str(folder / "detector") if folder is not None else DETECTORS[preset.localiser]
        preset = dataclasses.replace(preset, localiser_options={"model": model, **preset.localiser_options})
    return preset


def mini_folder() -> Path:
    """Folder of the mini laboratory's models and fakes: ``data/mini`` of the checkout, or under ITEMKIT_DATA.

    Returns
    -------
    Path
        It need not exist: whoever reads from it says what is missing.
    """
    root = os.environ.get("ITEMKIT_DATA")
    return Path(root).expanduser() / "mini" if root else Path(__file__).resolve().parents[1] / "data" / "mini"


def _split_names(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Take NAME:TAG of an encoder and NAME:MODEL of a detector apart, as the command line gives them."""
    parts = dict(overrides)
    encoder, localiser = parts.get("encoder"), parts.get("localiser")
    if isinstance(encoder, str) and not encoder.startswith("hf-hub:") and not looks_like_path(encoder):
        name, _, tag = encoder.partition(":")
        if tag:
            parts |= {"encoder": name, "encoder_pretrained": tag}
    if isinstance(localiser, str):
        name, _, model = localiser.partition(":")
        if model and name in DETECTORS:
            options = {**parts.get("localiser_options", {}), "model": model}
            parts |= {"localiser": name, "localiser_options": options}
    return parts


def _from_folder(preset: Preset, folder: Path) -> Preset:
    if not folder.is_dir():
        raise ModelNotFound(
            f"there is no folder of models at {tidy(folder)}. Make one where a model hub can be reached: "
            f"`itemkit download --preset {preset.name} --to FOLDER`, and copy it here"
        )
    changes: dict[str, Any] = {
        "encoder": str(folder / "encoder"),
        "encoder_pretrained": None,
        "captioner": str(folder / "captioner"),
        "parser": str(folder / "parser"),
    }
    if "model" in preset.localiser_options:
        changes["localiser_options"] = {**preset.localiser_options, "model": str(folder / "detector")}
    return dataclasses.replace(preset, **changes)


def _told_once(facts: list[str]) -> str:
    """Join what is missing; models that were looked for in one place share a sentence."""
    places: dict[str, list[str]] = {}
    for fact in facts:
        what, _, place = fact.partition(" is not on this machine ")
        places.setdefault(place, []).append(what)
    return " ".join(
        f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} not on this machine {place}"
        if place
        else names[0]
        for place, names in places.items()
    )


def _by_name(part: Any) -> bool:
    return isinstance(part, (str, Path))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (str, Path)):
        return tidy(str(value).replace(str(mini_folder()), "data/mini"))
    if value is None or isinstance(value, (int, float, bool)):
        return value
    return type(value).__name__


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
