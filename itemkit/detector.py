"""From features to a verdict a person can use: representation, head, calibration, thresholds in one object.

Everything that turns embeddings into an answer is chosen on validation images, stored together, and refuses
features that were made otherwise than those it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.numpy
from sklearn.base import clone

from itemkit import schema
from itemkit._files import atomic_write, write_json
from itemkit.calibrate import (
    Calibrator,
    Threshold,
    because,
    check_fnr,
    conformal_p,
    fit_calibrator,
    split_validation,
    three_way,
    threshold_at_fpr,
)
from itemkit.errors import InputError, ModelNotFound
from itemkit.features import Features
from itemkit.head import MisalignmentMLP
from itemkit.metrics import bootstrap
from itemkit.misalignment import RepresentationConfig, cosines, get_representation, leave_one_out, represent

# Not part of a model's identity: where it ran and with how many bits (cosine above 0.999), and what was done
# to the images before it (a perturbed image is a legitimate question).
IGNORED_LEAVES = ("device", "dtype", "precision", "batch_size")
IGNORED_PARTS = ("transform", "decode")
OBJECT_PARTS = ("parser", "localiser")
# who ignores where captions came from ignores how they were cleaned, too
ENTAILED = {"captions": ("caption_cleaning",)}


def fingerprint_differences(
    trained: dict, given: dict, ignore: Collection[str] = (), _name: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Keys in which two fingerprints differ, as ``("encoder.weights_hash", trained, given)``.

    Parameters
    ----------
    trained, given : nested dict
        ``run["fingerprint"]`` of two feature stores.
    ignore : names
        Parts ("localiser"), dotted keys ("captioner.num_beams"); device and precision are always ignored.
    """
    ignore = {*ignore, *(name for part in ignore for name in ENTAILED.get(part, ()))}
    for key in sorted({*trained, *given}, key=str):
        name = f"{_name}.{key}" if _name else str(key)
        if name in ignore or key in IGNORED_LEAVES:
            continue
        a, b = trained.get(key), given.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from fingerprint_differences(a, b, ignore, name)
        elif a != b:
            yield name, a, b


def data_hash(features: Features) -> str:
    """Hash of which images with which labels, whatever their order."""
    columns = features.table[[schema.IMAGE_ID, schema.LABEL]].astype(str)
    lines = sorted(columns[schema.IMAGE_ID] + " " + columns[schema.LABEL])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def image_keys(features: Features) -> np.ndarray:
    """Eight bytes of the hash of each image's id, uint64, shape (n,): enough to know an image again."""
    ids = features.table[schema.IMAGE_ID].astype(str)
    digests = b"".join(hashlib.sha256(one.encode()).digest()[:8] for one in ids)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def where_seen(features: Features, keys: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each image "train", "val" or, for a new one, ""; ``keys`` has the `image_keys` of both parts."""
    where = np.full(len(features), "", dtype="<U5")
    here = image_keys(features)
    for part, known in keys.items():
        where[np.isin(here, known)] = part
    return where


def warn_of_seen(where: np.ndarray) -> None:
    """Warn if images that are evaluated had a part in making the detector; ``where`` as of `where_seen`."""
    uses = {"train": "trained this detector", "val": "stopped its training or calibrated it"}
    if known := [f"{n} {use}" for part, use in uses.items() if (n := int((where == part).sum()))]:
        warnings.warn(
            f"of the {len(where)} images evaluated here, {' and '.join(known)}: numbers on these are no test "
            "of it",
            stacklevel=3,
        )


def refuse_other_models(trained: dict | None, given: dict | None, ignore: Collection[str]) -> None:
    """Raise an InputError if two stores' fingerprints differ in more than ``ignore``, or only one has any."""
    if trained and given:
        different = list(fingerprint_differences(trained, given, ignore))
        if not different:
            return
        shown = "; ".join(f"{name} is {_short(b)}, was {_short(a)}" for name, a, b in different[:4])
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        captions = any(name == "captions" for name, *_ in different)
        source = (
            " and captions from the same source (extract --captions, detect --caption)" if captions else ""
        )
        raise InputError(
            f"these features were made otherwise than those the detector was trained on: {shown}{more}. "
            f"Extract them with the same preset{source * captions}, or train a detector on features "
            "like these"
        )
    if bool(trained) != bool(given):
        raise InputError(
            f"the {'features' if trained else 'detector'} carry no fingerprint of the models that made them, "
            "so it cannot be checked that both belong together; load the features with load_features()"
        )


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 48 else text[:45] + "..."


FORMAT = "itemkit detector 1"


class Detector:
    """Misalignment detector, ready to use: fit, score, verdict, explain, save, load.

    Parameters
    ----------
    representation : RepresentationConfig or name
        Which misalignment the head sees.
    head : MisalignmentMLP, optional
        Untrained; ``MisalignmentMLP(members=5)`` averages five seeds.
    calibration : str
        "temperature", "platt", "isotonic", "auto" or "none"; see `itemkit.calibrate.fit_calibrator`.
    selection_fraction : float
        Share of the validation images that stops the training; the rest calibrates, sets thresholds and is
        the reference of the conformal verdict, unseen by the training.

    Attributes
    ----------
    head_ : fitted MisalignmentMLP
    calibrator_ : Calibrator
    real_scores_, fake_scores_ : sorted logits of the calibration images
    trained_on_ : dict
        Fingerprint and configuration of the features, data hash, counts per generator.
    image_keys_ : dict
        By which `seen` knows the training and the validation images again.
    """

    def __init__(
        self,
        representation: RepresentationConfig | str = "absolute",
        head: MisalignmentMLP | None = None,
        calibration: str = "temperature",
        selection_fraction: float = 0.5,
    ) -> None:
        self.representation = get_representation(representation)
        self.head = head if head is not None else MisalignmentMLP()
        self.calibration = calibration
        self.selection_fraction = selection_fraction

    # ------------------------------------------------------------------------------------------ training

    def fit(self, train: Features, val: Features) -> Detector:
        """Train on one set of features, stop and calibrate on another.

        Parameters
        ----------
        train, val : Features
            Labelled images of both classes, without a common image.

        Returns
        -------
        Detector
            Itself.
        """
        self._check_dim(val, train.dim)
        ids = train.table[schema.IMAGE_ID]
        if (shared := val.table[schema.IMAGE_ID].isin(set(ids))).any():
            raise InputError(
                f"{int(shared.sum())} of {len(val)} validation images are also training images, the first is "
                f"{val.table.loc[shared.idxmax(), schema.PATH]}; thresholds from them would be too low"
            )
        y_train, y_val = train.labels, val.labels
        select, rest = split_validation(y_val, self.selection_fraction, self.head.seed)
        x_val = represent(val, self.representation)
        head = clone(self.head).set_params(**self.representation.head_options(train.dim))
        self.head_ = head.fit(represent(train, self.representation), y_train, x_val[select], y_val[select])
        logits, y = self.head_.decision_function(x_val[rest]).astype(np.float64), y_val[rest]
        self.calibrator_ = fit_calibrator(y, logits, self.calibration, self.head.seed)
        self.real_scores_, self.fake_scores_ = (np.sort(logits[y == c]) for c in (schema.REAL, schema.FAKE))
        self._remember_real_cosines(val)
        self.trained_on_ = {
            "fingerprint": train.run.get("fingerprint"),
            "preset": (train.run.get("config") or {}).get("name"),
            "dim": train.dim,
            "schema_version": schema.SCHEMA_VERSION,
            "train_hash": data_hash(train),
            "val_hash": data_hash(val),
            "train_images": train.table[schema.GENERATOR].value_counts().sort_index().to_dict(),
            "val_images": val.table[schema.GENERATOR].value_counts().sort_index().to_dict(),
        }
        self.image_keys_ = {"train": image_keys(train), "val": image_keys(val)}
        return self

    def _remember_real_cosines(self, val: Features) -> None:
        real = val.select(val.labels == schema.REAL)
        whole = cosines(real)["global_cosine"].to_numpy()
        local = np.einsum("ij,ij->i", real.region_emb, real.phrase_emb)
        grid = np.linspace(0, 1, 101)
        self.real_cosines_ = {
            "global": np.quantile(whole, grid),
            "local": np.quantile(local, grid) if len(local) else np.zeros(0),
        }

    # ------------------------------------------------------------------------------------------- scoring

    def check(self, features: Features, ignore: Sequence[str] = ()) -> None:
        """Refuse features that were not made like those this detector was trained on.

        Parameters
        ----------
        features : Features
        ignore : names
            Parts allowed to differ on purpose, e.g. ``("captions", "captioner")`` for a user's own captions.

        Raises
        ------
        InputError
            Names the differing keys with both values.
        """
        self._fitted()
        ignore = (*ignore, *IGNORED_PARTS, *(() if self.representation.uses_objects else OBJECT_PARTS))
        refuse_other_models(self.trained_on_["fingerprint"], features.run.get("fingerprint"), ignore)
        self._check_dim(features, self.trained_on_["dim"])

    @staticmethod
    def _check_dim(features: Features, dim: int) -> None:
        if features.dim != dim:
            raise InputError(
                f"embeddings have {features.dim} dimensions, expected {dim}: another encoder made them"
            )

    def _fitted(self) -> None:
        if not hasattr(self, "head_"):
            raise InputError("this detector is not trained: call fit(train, val), or Detector.load(folder)")

    def decision_function(self, features: Features, ignore: Sequence[str] = ()) -> np.ndarray:
        """Raw log-odds of fake before calibration, shape (n,); thresholds and conformal ranks use these."""
        self.check(features, ignore)
        return self.head_.decision_function(represent(features, self.representation)).astype(np.float64)

    def score(self, features: Features, ignore: Sequence[str] = ()) -> np.ndarray:
        """Calibrated p(fake), shape (n,), for a real and a fake image being equally likely beforehand."""
        logits = self.decision_function(features, ignore)
        return self.calibrator_(logits)

    def threshold(self, fpr: float = 0.05, guarantee: str = "average") -> Threshold:
        """Threshold on the raw log-odds at a false-positive rate, from the calibration reals."""
        self._fitted()
        return threshold_at_fpr(self.real_scores_, fpr, guarantee)

    def verdict(
        self, features: Features, fpr: float = 0.05, fnr: float = 0.05, ignore: Sequence[str] = ()
    ) -> pd.DataFrame:
        """Three answers by split-conformal prediction: real, fake, or unsure.

        Parameters
        ----------
        features : Features
        fpr : float
            At most this share of real images like the calibration ones is called fake.
        fnr : float
            At most this share of fakes *like the calibration ones* is called real; nothing is promised for
            generators that were not among them.
        ignore : names
            See `check`.

        Returns
        -------
        DataFrame, one row per image
            ``image_id, path, p_fake, verdict, like_real, like_fake, because``. ``like_real`` is the share of
            calibration reals that look at least as fake as this image, ``like_fake`` the share of calibration
            fakes that look at least as real (both count the image itself).
        """
        self._fitted()
        self.threshold(fpr)  # raises where there are too few reals for this rate
        check_fnr(fnr, len(self.fake_scores_))
        logits = self.decision_function(features, ignore)
        like_real = conformal_p(self.real_scores_, logits, schema.REAL)
        like_fake = conformal_p(self.fake_scores_, logits, schema.FAKE)
        answer = three_way(like_real, like_fake, fpr, fnr)
        return pd.DataFrame(
            {
                schema.IMAGE_ID: features.table[schema.IMAGE_ID].to_numpy(),
                schema.PATH: features.table[schema.PATH].to_numpy(),
                "p_fake": self.calibrator_(logits),
                "verdict": answer,
                "like_real": like_real,
                "like_fake": like_fake,
                "because": [because(*r, fpr, fnr) for r in zip(answer, like_real, like_fake, strict=True)],
            }
        )

    def explain(self, features: Features, row: int, ignore: Sequence[str] = ()) -> pd.DataFrame:
        """Evidence for one image: how well it fits its caption, and each region its phrase.

        Parameters
        ----------
        features : Features
        row : int
            Position of the image.
        ignore : names
            See `check`.

        Returns
        -------
        DataFrame
            First the whole image, then its objects from the worst aligned to the best: ``level`` ("global",
            "local"), ``text``, box ``x0, y0, x1, y1`` and localiser ``score`` (empty for the whole image),
            ``cosine``, ``real_below`` (share of validation reals, or of their objects, with a lower cosine:
            small means unusually misaligned), ``p_fake_without`` (p(fake) had this object not been found;
            empty for the whole image, and for an only object where the representation has empty="raise").
        """
        if not -len(features) <= row < len(features):
            raise InputError(f"row {row}: expected 0 to {len(features) - 1}")
        one = features.select([row % len(features)])
        p_fake = float(self.score(one, ignore)[0])
        whole = float(one.image_emb[0] @ one.caption_emb[0])
        top = {"text": one.table[schema.CAPTION].iloc[0], "real_below": self._real_below("global", whole)}
        rows: list[dict] = [{"level": "global", "cosine": whole} | top]
        cosine = np.einsum("ij,ij->i", one.region_emb, one.phrase_emb)
        # where an image without objects is refused, there is no p(fake) without the only one
        needed = 1 if self.representation.uses_objects and self.representation.empty == "raise" else 0
        without = np.full(len(cosine), np.nan)
        if len(cosine) > needed:
            without = self.score(leave_one_out(one), ignore)
        for i in np.argsort(cosine, kind="stable"):
            box, value = one.objects.iloc[i], float(cosine[i])
            found = {"text": box["phrase"], **{k: box[k] for k in ("x0", "y0", "x1", "y1", "score")}}
            evidence = {"real_below": self._real_below("local", value), "p_fake_without": float(without[i])}
            rows.append({"level": "local", "cosine": value} | found | evidence)
        columns = ["level", "text", "x0", "y0", "x1", "y1", "score", "cosine", "real_below", "p_fake_without"]
        table = pd.DataFrame(rows).reindex(columns=columns)
        table.attrs["p_fake"] = p_fake
        return table

    def _real_below(self, level: str, cosine: float) -> float:
        grid = self.real_cosines_[level]
        return float(np.interp(cosine, grid, np.linspace(0, 1, len(grid)))) if len(grid) else float("nan")

    def seen(self, features: Features) -> np.ndarray:
        """Which images this detector was made with.

        Parameters
        ----------
        features : Features

        Returns
        -------
        array of str, shape (n,)
            "train" for images it was trained on, "val" for those that stopped the training or calibrated it,
            "" for new ones.
        """
        self._fitted()
        return where_seen(features, self.image_keys_)

    def evaluate(
        self,
        features: Features,
        fpr: float = 0.05,
        n_boot: int = 1000,
        seed: int = 0,
        ignore: Sequence[str] = (),
    ) -> pd.DataFrame:
        """Metrics with bootstrap intervals, for all images and for each generator against all reals.

        Parameters
        ----------
        features : Features
            Labelled test images.
        fpr : float
            The threshold comes from the calibration reals at this rate; the rate realised on the test reals
            is one minus ``accuracy_real``.
        n_boot, seed
            See `itemkit.metrics.bootstrap`.
        ignore : names
            See `check`.

        Returns
        -------
        DataFrame
            ``generator, metric, value, low, high, n_real, n_fake``; generator "all" counts every real once.

        Warns
        -----
        UserWarning
            Some images trained, stopped or calibrated this detector; they are counted all the same.
        """
        logits, y = self.decision_function(features, ignore), features.labels
        warn_of_seen(self.seen(features))
        threshold = self.threshold(fpr).value
        generator = features.table[schema.GENERATOR].to_numpy()
        tables = []
        names = list(dict.fromkeys(generator[y == schema.FAKE]))
        for name in ["all", *names] if len(names) > 1 else ["all"]:
            rows = (y == schema.REAL) | (generator == name) if name != "all" else np.ones(len(y), bool)
            p = self.calibrator_(logits[rows])
            table = bootstrap(y[rows], logits[rows], threshold, p, n_boot=n_boot, seed=seed, balanced=True)
            tables.append(table.assign(generator=name))
        table = pd.concat(tables, ignore_index=True)
        return table[["generator", *table.columns.drop("generator")]]

    # ---------------------------------------------------------------------------------------------- disk

    def save(self, folder: str | Path) -> Path:
        """Write ``detector.json``, ``head.json`` and two safetensors files into a folder."""
        self._fitted()
        path = self.head_.save(folder)
        arrays = {"real_scores": self.real_scores_, "fake_scores": self.fake_scores_}
        arrays |= {f"real_cosines_{k}": np.asarray(v, np.float64) for k, v in self.real_cosines_.items()}
        arrays |= {f"{part}_keys": keys for part, keys in self.image_keys_.items()}
        data = safetensors.numpy.save(arrays)
        atomic_write(path / "calibration.safetensors", lambda file: file.write(data))
        thresholds = {}
        for fpr in (0.01, 0.05, 0.1):  # for the reader; any other rate follows from the stored scores
            try:
                thresholds[f"{fpr:g}"] = self.threshold(fpr).statement
            except InputError as reason:
                thresholds[f"{fpr:g}"] = str(reason)
        write_json(
            path / "detector.json",
            {
                "format": FORMAT,
                "representation": self.representation.to_dict(),
                "calibration": self.calibration,
                "calibrator": self.calibrator_.to_dict(),
                "selection_fraction": self.selection_fraction,
                "thresholds": thresholds,
                "trained_on": self.trained_on_,
            },
        )
        return path

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Detector:
        """Read a detector written by `save`."""
        folder = Path(folder)
        for name in ("detector.json", "calibration.safetensors"):
            if not (folder / name).is_file():
                raise ModelNotFound(
                    f"{folder} holds no detector: {name} is missing. Train one with `itemkit train`, or "
                    f"give its folder"
                )
        meta = json.loads((folder / "detector.json").read_text())
        if meta.get("format") != FORMAT:
            raise ModelNotFound(
                f"{folder}/detector.json has format {meta.get('format')!r}; expected {FORMAT!r}"
            )
        head = MisalignmentMLP.load(folder, device)
        detector = cls(
            RepresentationConfig.from_dict(meta["representation"]),
            clone(head),
            meta["calibration"],
            meta["selection_fraction"],
        )
        detector.head_ = head
        detector.calibrator_ = Calibrator.from_dict(meta["calibrator"])
        arrays = safetensors.numpy.load_file(folder / "calibration.safetensors")
        detector.real_scores_, detector.fake_scores_ = arrays["real_scores"], arrays["fake_scores"]
        detector.real_cosines_ = {level: arrays[f"real_cosines_{level}"] for level in ("global", "local")}
        detector.image_keys_ = {part: arrays[f"{part}_keys"] for part in ("train", "val")}
        detector.trained_on_ = meta["trained_on"]
        return detector
