"""Baselines that see pixels and no embedding: power spectrum, noise residual, a small CNN."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor, nn

from itemkit.devices import choose_device
from itemkit.errors import InputError
from itemkit.features import Features

CHUNK = 256  # images at a time
RESIDUAL_LIMIT = 3  # residuals are clipped to -3..3
RESIDUAL_STEP = 2  # grey levels per unit of residual


def pixels(features: Features) -> np.ndarray:
    """The images of a set of features, checked: uint8 array (n, h, w, 3)."""
    x = features.pixels
    if x is None:
        raise InputError(
            "these features carry no images; attach them with dataclasses.replace(features, pixels=array), "
            "a uint8 array of shape (n, h, w, 3)"
        )
    if x.ndim != 4 or x.shape[0] != len(features) or x.shape[3] != 3 or x.dtype != np.uint8:
        raise InputError(
            f"pixels are {x.dtype} of shape {x.shape}; expected uint8 of shape ({len(features)}, h, w, 3)"
        )
    return x


def spectrum(features: Features) -> np.ndarray:
    """Azimuthally averaged log power spectrum of the grey image.

    Returns
    -------
    float32 array, shape (n, r)
        log10 of the mean power in rings one frequency step wide, from the mean to the corner of the frequency
        plane (where the checkerboard of an upsampling sits, so rings do not end at the Nyquist frequency of
        the sides). A Hann window keeps the picture's borders from drawing a cross into it.
    """
    x = pixels(features)
    h, w = x.shape[1:3]
    size = min(h, w)
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    ring = np.rint(np.hypot(fy, fx) * size).astype(int)
    n_rings = int(ring.max()) + 1
    # the half plane of a real image: every column but the first (and the last of an even width) stands for
    # two
    double = np.full(ring.shape, 2.0)
    double[:, 0] = 1
    if w % 2 == 0:
        double[:, -1] = 1
    weight = np.zeros((ring.size, n_rings))
    weight[np.arange(ring.size), ring.ravel()] = double.ravel()
    weight /= np.maximum(weight.sum(0), 1e-12)
    window = np.hanning(h)[:, None] * np.hanning(w)[None]
    grey = np.array([0.299, 0.587, 0.114])
    out = np.empty((len(x), n_rings), np.float32)
    for i in range(0, len(x), CHUNK):
        image = x[i : i + CHUNK] @ grey / 255
        power = np.abs(np.fft.rfft2((image - image.mean((1, 2), keepdims=True)) * window)) ** 2
        out[i : i + CHUNK] = np.log10(power.reshape(len(power), -1) @ weight + 1e-8)
    return out


def noise_residual(features: Features) -> np.ndarray:
    """Co-occurrences of neighbouring second differences: what noise, demosaicking and decoders leave behind.

    Returns
    -------
    float32 array, shape (n, 98)
        Share of each pair of clipped residuals along the line (49) and across it (49), over both directions
        and all channels.
    """
    x = pixels(features)
    levels = 2 * RESIDUAL_LIMIT + 1
    out = np.zeros((len(x), 2 * levels**2), np.float32)
    for i in range(0, len(x), CHUNK):
        part = x[i : i + CHUNK].astype(np.int16)
        for image in (part, part.swapaxes(1, 2)):  # differences along rows, then along columns
            r = image[:, :, 2:] - 2 * image[:, :, 1:-1] + image[:, :, :-2]
            r = (
                np.clip(np.rint(r / RESIDUAL_STEP), -RESIDUAL_LIMIT, RESIDUAL_LIMIT).astype(np.int64)
                + RESIDUAL_LIMIT
            )
            pairs = (r[:, :, :-1] * levels + r[:, :, 1:], r[:, :-1] * levels + r[:, 1:])
            for k, pair in enumerate(pairs):
                flat = pair.reshape(len(part), -1) + np.arange(len(part))[:, None] * levels**2
                count = np.bincount(flat.ravel(), minlength=len(part) * levels**2).reshape(len(part), -1)
                out[i : i + CHUNK, k * levels**2 : (k + 1) * levels**2] += count / pair[0].size / 2
    return out


def augment(image: np.ndarray, rng: np.random.Generator, probability: float = 0.5) -> np.ndarray:
    """CNNDetection's training augmentation of one image: blur, then JPEG, each with the given probability.

    Blur sigma is uniform in 0-3 px, JPEG quality uniform in 30-100 (Wang et al. 2020, "Blur+JPEG (0.5)").
    """
    picture = Image.fromarray(image)
    if rng.random() < probability:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
    if rng.random() < probability:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(30, 101)))
        picture = Image.open(buffer)
    return np.asarray(picture.convert("RGB"))


class PixelCNN(ClassifierMixin, BaseEstimator):
    """Small convolutional network from pixels to real or fake, after CNNDetection's recipe.

    Random crop, flip, blur and JPEG in training, early stopping on validation images; full resolution in the
    first layer, because traces of a generator do not survive downsampling. No pretrained weights.

    Parameters
    ----------
    width : int
        Channels of the first layer; later ones have twice and four times as many.
    crop : int
        Side in pixels of the random crops in training; smaller images are used whole. In use the network,
        being fully convolutional, sees the whole image, or its centre where a side is longer than 8 crops.
    epochs, patience, batch_size, learning_rate : training
    max_images : int
        Training images used at most, class by class in proportion, so that a fit takes seconds on a CPU.
    seed, device : as in `MisalignmentMLP`
    """

    def __init__(
        self,
        width: int = 12,
        crop: int = 32,
        epochs: int = 12,
        patience: int = 4,
        batch_size: int = 64,
        learning_rate: float = 3e-3,
        max_images: int = 2000,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.width = width
        self.crop = crop
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.max_images = max_images
        self.seed = seed
        self.device = device

    def _network(self) -> nn.Module:
        widths = [3, self.width, 2 * self.width, 4 * self.width, 4 * self.width]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1, bias=False)]
            # quick running statistics: small sets have few steps, and stale ones would stop the training
            # early
            layers += [nn.BatchNorm2d(b, momentum=0.3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))

    def _tensor(self, images: np.ndarray) -> Tensor:
        device = next(self.net_.parameters()).device
        # stays in channels-last order, in which the network is quicker
        return (
            torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        )

    def _batch(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = self.crop
        top, left = (rng.integers(max(n - side, 0) + 1, size=len(images)) for n in images.shape[1:3])
        flip = rng.random(len(images)) < 0.5
        out = [
            augment(image[t : t + side, k : k + side][:, :: -1 if f else 1], rng)
            for image, t, k, f in zip(images, top, left, flip, strict=True)
        ]
        return np.stack(out)

    def fit(
        self, X: np.ndarray, y: np.ndarray, X_val: np.ndarray | None = None, y_val: np.ndarray | None = None
    ) -> PixelCNN:
        """Train on uint8 images (n, h, w, 3); without validation images the last weights are kept."""
        y = np.asarray(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) != 2:
            raise InputError(f"{len(self.classes_)} classes among {len(y)} images; expected real and fake")
        rng = np.random.default_rng(self.seed)
        codes = (y == self.classes_[1]).astype(np.float32)
        if len(y) > self.max_images:
            share = self.max_images / len(y)
            keep = [rng.permutation(np.flatnonzero(codes == c)) for c in (0, 1)]
            rows = np.concatenate([part[: max(1, round(share * len(part)))] for part in keep])
            X, codes = X[rows], codes[rows]
        # torch's initialisers draw from the global state: keep it as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net_ = self._network().to(choose_device(self.device), memory_format=torch.channels_last)
        weight = 0.5 / np.where(codes == 1, codes.mean(), 1 - codes.mean()).astype(np.float32)
        optimiser = torch.optim.AdamW(self.net_.parameters(), lr=self.learning_rate, weight_decay=1e-3)
        best, best_epoch, kept = float("inf"), 0, None
        self.history_: dict[str, list[float]] = {"epoch": [], "train_loss": [], "val_loss": []}
        for epoch in range(1, self.epochs + 1):
            self.net_.train()
            total = 0.0
            for rows in np.array_split(rng.permutation(len(X)), max(1, round(len(X) / self.batch_size))):
                loss = self._loss(
                    self.net_(self._tensor(self._batch(X[rows], rng))), codes[rows], weight[rows]
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(rows)
            record = {"epoch": epoch, "train_loss": total / len(X), "val_loss": float("nan")}
            if X_val is not None and y_val is not None:
                truth = (np.asarray(y_val) == self.classes_[1]).astype(np.float32)
                even = 0.5 / np.where(truth == 1, truth.mean(), 1 - truth.mean())
                score = self.decision_function(np.asarray(X_val))
                record["val_loss"] = float(np.mean(even * (np.logaddexp(0, score) - truth * score)))
                if record["val_loss"] < best:
                    best, best_epoch = record["val_loss"], epoch
                    kept = {k: v.clone() for k, v in self.net_.state_dict().items()}
            for name, values in self.history_.items():
                values.append(record[name])
            if X_val is not None and epoch - best_epoch >= self.patience:
                break
        if kept is not None:
            self.net_.load_state_dict(kept)
        self.net_.eval()
        return self

    @staticmethod
    def _loss(logits: Tensor, codes: np.ndarray, weight: np.ndarray) -> Tensor:
        target, scale = (torch.from_numpy(a).to(logits.device) for a in (codes, weight))
        return F.binary_cross_entropy_with_logits(logits[:, 0], target, weight=scale)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Log-odds of fake of each image."""
        self.net_.eval()
        side = 8 * self.crop
        top, left = (max(n - side, 0) // 2 for n in X.shape[1:3])
        X = X[:, top : top + side, left : left + side]
        with torch.no_grad():
            parts = [self.net_(self._tensor(X[i : i + CHUNK]))[:, 0].cpu() for i in range(0, len(X), CHUNK)]
        return torch.cat(parts).numpy().astype(np.float64)

    def predict(self, X: np.ndarray) -> Any:
        """More probable class of each image."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]
