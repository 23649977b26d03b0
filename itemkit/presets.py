"""Which models a run uses, under one name: `mini`, `fast`, `paper`; each part can be replaced."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itemkit.errors import ModelNotFound
from itemkit.models import (
    LOCALISERS,
    PARTS,
    Located,
    Models,
    check_localiser,
    fetch_remedy,
    find_folder,
    localiser_settings,
    looks_like_path,
    names_object,
    own_part,
    run_fingerprint,
    tidy,
    unknown,
)

if TYPE_CHECKING:
    import torch

_CHECKOUT = Path(__file__).resolve().parents[1]
MINI_REMEDY = "The mini models come with itemkit: " + (
    "`git checkout data/mini` brings them back, or `git lfs pull` if they are pointers."
    if (_CHECKOUT / "pyproject.toml").is_file()
    else "`pip install --force-reinstall --no-deps itemkit` brings them back."
)
MINI_REMEDY += " If ITEMKIT_DATA is set, unset it, or let it name a folder that holds mini/models."
MODELS_VARIABLE = "ITEMKIT_MODELS"
DETECTORS = tuple(name for name, options in LOCALISERS.items() if "model" in options)
"""Localisers that are models of their own."""


def _by_name(part: Any) -> bool:
    return isinstance(part, (str, Path))


@dataclass(frozen=True)
class Preset:
    """A named choice of models and their options.

    Attributes
    ----------
    name, about : str
        How it is called, and what it is for, in one sentence.
    captioner : str, Path, object or None
        Transformers folder or hub name, or a captioner of one's own (see `models.Models`); None leaves it out
        (all captions then come with the images).
    captioner_options : mapping
        Of `captions.load_captioner`.
    parser : str, Path, object or None
        spaCy package or folder, or anything with ``objects``; None gives global features only.
    parser_options : mapping
        Fields of `objects.ObjectRules`.
    encoder, encoder_pretrained : str, Path or object
        open_clip name and tag, or a folder; or an `Encoder`.
    localiser : str, object or None
        Name for `regions.make_localiser`, or a localiser of one's own.
    localiser_options : mapping
        Of the localiser, for an object detector with ``model``.
    precision : str
        Of captioner and encoder, see `devices.choose_precision`.

    Captioner, parser and localiser may also be named as "module:object".
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

    def __post_init__(self) -> None:
        from itemkit.captions import Decoding
        from itemkit.objects import ObjectRules

        for part, rules in (("captioner", Decoding), ("parser", ObjectRules)):
            names = [f.name for f in dataclasses.fields(rules)]
            for key in getattr(self, f"{part}_options"):
                if _by_name(getattr(self, part)) and key not in names:
                    raise unknown(f"{part} '{getattr(self, part)}' has no option '{key}'", key, names)
        if _by_name(self.localiser) and not names_object(self.localiser):
            check_localiser(self.localiser, self.localiser_options)

    def part(self, name: str) -> Any:
        """A part as given: a model's name or folder, an object, or None; "module:object" is looked up."""
        value = getattr(self, name)
        return own_part(name, value) if names_object(value) and name != "encoder" else value

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
        captioner, parser, encoder, localiser = (self.part(name) for name in PARTS)
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
        return Models(encoder, captioner, parser, localiser)

    def fingerprint(self, captions: str = "generate", device: str | torch.device = "auto") -> dict[str, Any]:
        """What ``build(device).fingerprint(captions)`` says, from the files alone: no model is loaded.

        Parameters
        ----------
        captions : {"generate", "user"}
            Where captions come from.
        device : str or torch.device
            Only checked, where it is not "auto" or "cpu": a fingerprint is the same on every device.

        Raises
        ------
        ModelNotFound
            As of `build`.
        """
        from itemkit.captions import Decoding
        from itemkit.objects import ObjectRules

        if str(device) not in ("auto", "cpu"):
            from itemkit.devices import choose_device

            choose_device(device)
        found = self.require()
        parts = {name: self.part(name) for name in PARTS}
        settings: dict[str, Any] = {"encoder": {"precision": self.precision}}
        if "captioner" in found:
            decoding = dataclasses.asdict(Decoding(**self.captioner_options))
            settings["captioner"] = {"precision": self.precision, "decoding": decoding}
        if "parser" in found:
            settings["parser"] = {"rules": dataclasses.asdict(ObjectRules(**self.parser_options))}
        if _by_name(parts["localiser"]):
            parts["localiser"] = localiser_settings(self.localiser, self.localiser_options)
            settings["localiser"] = parts["localiser"]
        parts |= {name: located.fingerprint(**settings[name]) for name, located in found.items()}
        return run_fingerprint(parts, captions)

    def find(self) -> dict[str, Located | ModelNotFound]:
        """Look for the files of every part that is given by name, and check them, without loading any.

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
        from itemkit.objects import find_parser

        finders: dict[str, Callable[[], Located]] = {
            "captioner": lambda: find_folder(self.captioner, "captioner"),
            "parser": lambda: find_parser(self.parser),
            "localiser": lambda: find_folder(self.localiser_options["model"], "object detector"),
            "encoder": lambda: find_encoder(self.encoder, self.encoder_pretrained),
        }
        if "model" not in self.localiser_options:
            del finders["localiser"]
        found: dict[str, Located | ModelNotFound] = {}
        for part, find in finders.items():
            if not _by_name(self.part(part)):
                continue
            try:
                found[part] = find()
            except ModelNotFound as error:
                found[part] = error
        return found

    def require(self) -> dict[str, Located]:
        """Find all files, or raise one `ModelNotFound` that names all models that are missing."""
        found = self.find()
        missing = [where for where in found.values() if isinstance(where, ModelNotFound)]
        if not missing:
            return found  # type: ignore[return-value]
        absent = [error for error in missing if not error.reason]  # others are there and cannot be used
        models = tidy(mini_folder() / "models")
        if self.name == "mini" and absent == missing and all(models in error.looked for error in absent):
            parts = ", ".join(part for part, where in found.items() if where in absent)
            raise ModelNotFound(f"preset 'mini' ({parts})", looked=models, remedy=MINI_REMEDY)  # on no hub
        places: dict[str, list[str]] = {}  # models looked for in one place share a sentence
        for error in absent:
            places.setdefault(error.looked, []).append(error.what)
        facts = [str(error) for error in missing if error.reason]
        for place, names in places.items():
            verb = "are" if len(names) > 1 else "is"
            facts.append(f"{', '.join(names)} {verb} not on this machine (looked in {place}).")
        raise ModelNotFound(
            " ".join(facts), remedy=fetch_remedy(self.name, len(absent) > 1) if absent else ""
        )

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
        localiser_options={"model": LOCALISERS["grounding_dino"]["model"]},
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
        one text: ``encoder="ViT-B-16:openai"`` (name and tag), ``localiser="owlv2:./my-owl"`` (object
        detector and its model). An object detector without a model gets the folder's, or else its default.

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
        raise unknown(f"preset '{name}' is unknown", name, PRESETS)
    known = [f.name for f in dataclasses.fields(Preset)]
    for key in overrides:
        if key not in known:
            raise unknown(f"a preset has no field '{key}'", key, known)
    preset = PRESETS[name]
    if name == "mini":
        folders = {part: str(mini_folder() / "models" / getattr(preset, part)) for part in PARTS[:3]}
        preset = dataclasses.replace(preset, **folders)  # type: ignore[arg-type]
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
    localiser = preset.localiser
    if isinstance(localiser, str) and not names_object(localiser):
        if localiser in DETECTORS:
            model = str(folder / "detector") if folder is not None else LOCALISERS[localiser]["model"]
            preset = dataclasses.replace(
                preset, localiser_options={"model": model, **preset.localiser_options}
            )
    return preset


def mini_folder() -> Path:
    """Folder of the mini laboratory's models and images.

    Returns
    -------
    Path
        ``mini`` under ITEMKIT_DATA where that is set, else ``data/mini`` of the checkout, else the copy that
        an installed package carries. It need not exist: whoever reads from it says what is missing.
    """
    if root := os.environ.get("ITEMKIT_DATA"):
        return Path(root).expanduser() / "mini"
    checkout = _CHECKOUT / "data" / "mini"
    shipped = Path(__file__).resolve().parent / "data" / "mini"
    return shipped if shipped.is_dir() and not checkout.is_dir() else checkout


def _split_names(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Take NAME:TAG of an encoder and NAME:MODEL of an object detector apart."""
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
            f"there is no folder of models at {tidy(folder)}",
            remedy="Make one where a model hub can be reached: "
            f"`itemkit download --preset {preset.name} --to FOLDER`, and copy it here",
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


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (str, Path)):
        place = Path(value)
        mini = mini_folder()
        return (
            f"data/mini/{place.relative_to(mini).as_posix()}" if place.is_relative_to(mini) else tidy(value)
        )
    if value is None or isinstance(value, (int, float, bool)):
        return value
    return type(value).__name__
