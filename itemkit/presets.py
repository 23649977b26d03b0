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
    FETCH,
    IMAGE_ALONE,
    LOCALISERS,
    PARTS,
    Located,
    Models,
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
# subfolder of each part in a folder of models, as `itemkit download --to FOLDER` writes it
FOLDERS = {"captioner": "captioner", "parser": "parser", "encoder": "encoder", "localiser": "detector"}
# localisers that are models of their own: object detectors
DETECTORS = tuple(name for name, options in LOCALISERS.items() if "model" in options)


@dataclass(frozen=True)
class Preset:
    """A named choice of models and their options.

    A part is the name or folder of a model, an object of one's own or its name as "module:object" (see
    `models.Models`), or None to leave it out.
    """

    name: str
    about: str  # what it is for, in one sentence
    captioner: Any  # transformers folder or hub name; None: all captions come with the images
    encoder: Any  # open_clip name, "hf-hub:owner/name" or folder
    parser: Any  # spaCy package or folder; None, like no localiser, gives global features only
    localiser: Any  # a name of `models.LOCALISERS`
    encoder_pretrained: str | None = None  # open_clip's tag
    captioner_options: Mapping[str, Any] = field(default_factory=dict)  # of `captions.Decoding`
    parser_options: Mapping[str, Any] = field(default_factory=dict)  # of `objects.ObjectRules`
    localiser_options: Mapping[str, Any] = field(default_factory=dict)  # see `models.LOCALISERS`
    # other defaults of localisers than there, by name: which object detector belongs to this preset
    localiser_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    precision: str = "auto"  # of captioner and encoder, see `devices.choose_precision`

    def __post_init__(self) -> None:
        from itemkit.captions import Decoding
        from itemkit.objects import ObjectRules

        for part, rules in (("captioner", Decoding), ("parser", ObjectRules)):
            names = [f.name for f in dataclasses.fields(rules)]
            for key in getattr(self, f"{part}_options"):
                if key not in names:
                    raise unknown(f"{part} '{getattr(self, part)}' has no option '{key}'", key, names)
        if isinstance(self.localiser, str) and not names_object(self.localiser):
            localiser_settings(self.localiser, self.located_by())

    def located_by(self) -> dict[str, Any]:
        """Options of the localiser that has a name."""
        return {**self.localiser_defaults.get(self.localiser, {}), **self.localiser_options}

    def given(self, part: str) -> Any:
        """A part as it was given: a name, an object or None; "module:object" is looked up."""
        value = getattr(self, part)
        return own_part(part, value) if names_object(value) and part != "encoder" else value

    def by_name(self) -> dict[str, str | Path]:
        """Name or folder of each part that has files to be found."""
        parts = {part: self.given(part) for part in PARTS}
        if isinstance(parts["localiser"], str):
            parts["localiser"] = {**LOCALISERS[self.localiser], **self.located_by()}.get("model")
        return {part: model for part, model in parts.items() if isinstance(model, (str, Path))}

    def replace(self, **overrides: Any) -> Preset:
        """The preset with other values of some fields, as of `get_preset`."""
        known = [f.name for f in dataclasses.fields(self)]
        for key in overrides:
            if key not in known:
                raise unknown(f"a preset has no field '{key}'", key, known)
        values = dict(overrides)
        for part in overrides.keys() & PARTS:  # options made for one model may be unknown to another
            values.setdefault(*("encoder_pretrained", None) if part == "encoder" else (f"{part}_options", {}))
        encoder, localiser = overrides.get("encoder"), overrides.get("localiser")
        if isinstance(encoder, str) and not encoder.startswith("hf-hub:") and not looks_like_path(encoder):
            values["encoder"], _, tag = encoder.partition(":")
            values["encoder_pretrained"] = tag or values["encoder_pretrained"]
        name, _, model = localiser.partition(":") if isinstance(localiser, str) else ("", "", "")
        if model and name in DETECTORS:
            values["localiser"] = name
            values["localiser_options"] = {**values["localiser_options"], "model": model}
        return dataclasses.replace(self, **values)

    def build(self, device: str | torch.device = "auto") -> Models:
        """Load all models from this machine, on a device as of `devices.choose_device`.

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
        named = self.require()
        captioner, parser, encoder, localiser = map(self.given, PARTS)
        if "encoder" in named:
            encoder = load_encoder(encoder, self.encoder_pretrained, chosen, self.precision)
        if "parser" in named:
            parser = load_parser(parser, **self.parser_options)
        if "captioner" in named:
            captioner = load_captioner(captioner, chosen, self.precision, **self.captioner_options)
        if isinstance(localiser, str):
            on = {"device": chosen} if localiser in DETECTORS else {}
            localiser = make_localiser(localiser, encoder, **on | self.located_by())
        return Models(encoder, captioner, parser, localiser)

    def fingerprint(self, captions: str = "generate", device: str | torch.device = "auto") -> dict[str, Any]:
        """What ``build(device).fingerprint(captions)`` says, from files alone; a device is only checked."""
        from itemkit.captions import Decoding
        from itemkit.objects import ObjectRules

        if str(device) not in ("auto", "cpu"):
            from itemkit.devices import choose_device

            choose_device(device)
        decoding, rules = Decoding(**self.captioner_options), ObjectRules(**self.parser_options)
        settings: dict[str, Any] = {
            "captioner": {"precision": self.precision, "decoding": dataclasses.asdict(decoding)},
            "parser": {"rules": rules.record()},
            "encoder": {"precision": self.precision},
        }
        parts = {part: self.given(part) for part in PARTS}
        if isinstance(parts["localiser"], str):
            settings["localiser"] = localiser_settings(self.localiser, self.located_by())
            parts["localiser"] = settings["localiser"]
        parts |= {part: located.fingerprint(**settings[part]) for part, located in self.require().items()}
        return run_fingerprint(parts, captions)

    def find(self) -> dict[str, Located | ModelNotFound]:
        """Where each part given by name is, checked but not loaded, or the error that says what it lacks."""
        from itemkit.encoder import find_encoder
        from itemkit.objects import find_parser

        finders: dict[str, Callable[[Any], Located]] = {
            "captioner": lambda model: find_folder(model, "captioner"),
            "parser": find_parser,
            "encoder": lambda model: find_encoder(model, self.encoder_pretrained),
            "localiser": lambda model: find_folder(
                model, "object detector", texts=self.localiser != IMAGE_ALONE
            ),
        }
        found: dict[str, Located | ModelNotFound] = {}
        for part, model in self.by_name().items():
            try:
                found[part] = finders[part](model)
            except ModelNotFound as error:
                found[part] = error
                if not error.reason:  # it is not here, and this preset's name says how to get it
                    shipped = self.name == "mini" and tidy(mini_folder()) in error.looked
                    how = f" --preset {self.name}"
                    if part == "localiser" and self.localiser != PRESETS.get(self.name, self).localiser:
                        how += f" --localiser {self.localiser}"
                    remedy = MINI_REMEDY if shipped else FETCH.format(how)
                    found[part] = ModelNotFound(error.what, looked=error.looked, remedy=remedy)
        return found

    def require(self) -> dict[str, Located]:
        """Find all files, or raise one `ModelNotFound` that names all models that are missing."""
        found = self.find()
        missing = [where for where in found.values() if isinstance(where, ModelNotFound)]
        if missing:
            remedies = dict.fromkeys(error.remedy for error in missing)
            raise ModelNotFound(". ".join(error.fact for error in missing), remedy=" ".join(remedies))
        return found  # type: ignore[return-value]

    def record(self) -> dict[str, Any]:
        """The choices as JSON-ready values without anybody's home folder, to be kept beside results."""
        return {f.name: _jsonable(getattr(self, f.name)) for f in dataclasses.fields(self)}


PRESETS: dict[str, Preset] = {
    "mini": Preset(
        name="mini",
        about="Small models trained on rendered scenes; they come with itemkit and fail on photographs.",
        captioner="captioner",  # folders of data/mini/models, see get_preset
        encoder="clip",
        parser="parser",
        parser_options={"keep_article": True},  # the mini CLIP learned "a red ball" and "the sand"
        localiser="object_detector",
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
        localiser_defaults={IMAGE_ALONE: {"model": "PekingU/rtdetr_v2_r101vd"}},
    ),
}


def get_preset(name: str | Preset = "mini", folder: str | Path | None = None, **overrides: Any) -> Preset:
    """Look up a preset and replace parts of it.

    Parameters
    ----------
    name : str or Preset
        "mini", "fast" or "paper"; or a preset put together by hand.
    folder : str or Path, optional
        Take the models from here, as `itemkit download --to FOLDER` writes them. For "fast" and "paper" the
        environment variable ITEMKIT_MODELS can name it too.
    **overrides
        Fields of `Preset`, e.g. ``localiser="whole"``, ``captioner=my_object``, ``encoder="./my-clip"``. A
        part that is replaced starts from its default options. In one text: ``encoder="ViT-B-16:openai"``
        (name and tag), ``localiser="owlv2:./my-owl"`` (object detector and its model). An object detector
        without a model gets the folder's, or else its default.

    >>> get_preset("fast", localiser="whole").localiser
    'whole'
    """
    if isinstance(name, Preset):
        return name.replace(**overrides)
    if name not in PRESETS:
        raise unknown(f"preset '{name}' is unknown", name, PRESETS)
    if folder is None and name != "mini":
        folder = os.environ.get("ITEMKIT_MODELS") or None
    preset = PRESETS[name]
    if folder is None and name != "mini":
        return preset.replace(**overrides)
    root = mini_folder() / "models" if folder is None else Path(folder).expanduser()
    if folder is not None and not root.is_dir():
        remedy = f"Make one with `itemkit download --preset {name} --to FOLDER`, and copy it here"
        raise ModelNotFound(f"there is no folder of models at {tidy(root)}", remedy=remedy)
    folders = FOLDERS | ({"encoder": "clip"} if folder is None else {})
    places: dict[str, Any] = {part: str(root / folders[part]) for part in PARTS[:3]}
    own: dict[str, Any] = {name: {"model": str(root / folders["localiser"])} for name in DETECTORS}
    if folder is None:
        own = {IMAGE_ALONE: {"model": str(root / IMAGE_ALONE), "precision": preset.precision}}
    options = {key: value for key, value in preset.localiser_options.items() if key != "model"}
    changed: dict[str, Any] = {"localiser_options": options, "localiser_defaults": own}
    preset = dataclasses.replace(preset, **places, encoder_pretrained=None, **changed)
    return preset.replace(**overrides)


def mini_folder() -> Path:
    """Models and images of the laboratory: under ITEMKIT_DATA, in the checkout, or installed."""
    if root := os.environ.get("ITEMKIT_DATA"):
        return Path(root).expanduser() / "mini"
    checkout = _CHECKOUT / "data" / "mini"
    shipped = Path(__file__).resolve().parent / "data" / "mini"
    return shipped if shipped.is_dir() and not checkout.is_dir() else checkout


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (str, Path)):
        mini = mini_folder()
        inside = Path(value).is_relative_to(mini)
        return f"data/mini/{Path(value).relative_to(mini).as_posix()}" if inside else tidy(value)
    if value is None or isinstance(value, (int, float, bool)):
        return value
    return type(value).__name__
