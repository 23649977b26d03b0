"""Two-dimensional maps of a space (UMAP); neighbours and measures of separation in the space itself."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
import warnings
from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from itemkit import schema
from itemkit.metrics import effect_size

PCA_DIMENSIONS, FOLDS = 50, 5


def ready_numba_cache() -> str | None:
    """Give numba a temporary folder for compiled code where it finds no other place, and UMAP no import."""
    import numba

    scope: dict[str, Any] = {"config": numba.config}
    file = str(importlib.util.find_spec("umap").origin)  # type: ignore[union-attr]
    exec(compile("def probe(): pass", file, "exec"), scope)
    try:
        numba.njit(cache=True)(scope["probe"])  # looks for a place beside UMAP's own files, and at home
    except RuntimeError:
        # a folder of our own: whoever may write into a cache may run code in this process
        scope["config"].CACHE_DIR = folder = tempfile.mkdtemp(prefix="itemkit-numba-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    return None


def umap_2d(x: np.ndarray, *, seed: int = 0, n_neighbors: int = 15, min_dist: float = 0.1) -> np.ndarray:
    """Draw a space in two dimensions.

    Neighbours are found exactly after PCA: in a fresh process this takes a fraction of the time of UMAP's own
    approximate search, most of which is compilation, at equal trustworthiness.

    Parameters
    ----------
    x : float array, shape (n, d)
        Columns are used as they are, without scaling.
    seed : int
        The same seed gives the same map, shape (n, 2), on one machine.
    n_neighbors, min_dist : int, float
        As in UMAP.
    """
    ready_numba_cache()
    import umap

    if len(x) <= n_neighbors:
        raise ValueError(f"got {len(x)} points; more than n_neighbors={n_neighbors} are needed")
    reduced = PCA(min(PCA_DIMENSIONS, *x.shape), random_state=0).fit_transform(np.asarray(x, np.float32))
    reduced = np.ascontiguousarray(reduced, dtype=np.float32)
    distances, indices = NearestNeighbors(n_neighbors=n_neighbors).fit(reduced).kneighbors(reduced)
    near = (indices.astype(np.int32), distances.astype(np.float32))
    options = {"n_neighbors": n_neighbors, "min_dist": min_dist, "random_state": seed, "n_jobs": 1}
    # of what is wanted: one thread for the sake of the seed, no transform of new points
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        layout = umap.UMAP(**options, init="pca", precomputed_knn=near)
        return layout.fit_transform(reduced).astype(np.float32)


def neighbours(x: np.ndarray, k: int = 5) -> np.ndarray:
    """Find the k other rows nearest to each row of a space, the nearest first: int array, shape (n, k).

    Distances are Euclidean, columns are used as they are. A twin is a neighbour, a row itself is none.
    """
    # asked without points it leaves out each point itself, and not a twin of it
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors(return_distance=False)


def separation(x: np.ndarray, generator: np.ndarray, *, seed: int = 0, k: int = 10) -> pd.DataFrame:
    """Measure in a space itself how far real images and those of each generator are apart.

    Parameters
    ----------
    x, generator : arrays of float, shape (n, d), and of str, shape (n,)
    seed, k : int
        Of the folds; neighbours to look at.

    Returns
    -------
    DataFrame
        ``measure, generator, value, low, high, n``; as many images of a generator as real ones (n in all), so
        that chance is one half; empty where they are too few. ``neighbours of the same class``: mean share of
        the k nearest images; ``linear AUROC``: five-fold cross-validated logistic regression.
    """
    generator, rows = np.asarray(generator), []
    x = StandardScaler().fit_transform(np.asarray(x, np.float64))
    real = generator == schema.REAL_GENERATOR
    for name in dict.fromkeys(generator[~real]):
        fake = generator == name
        rng, each = np.random.default_rng(seed), min(real.sum(), fake.sum())
        used = np.concatenate([rng.permutation(np.flatnonzero(c))[:each] for c in (real, fake)])
        y, part = fake[used].astype(int), x[used]
        near, linear = (np.nan,) * 3, (np.nan,) * 3
        if len(y) > k and each >= FOLDS:
            same = (y[neighbours(part, k)] == y[:, None]).mean(axis=1)
            error = 1.96 * same.std(ddof=1) / np.sqrt(len(same))
            near = (same.mean(), same.mean() - error, same.mean() + error)
            folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
            width = min(PCA_DIMENSIONS, part.shape[1], 4 * len(part) // 5 - 1)  # four folds of five
            model = make_pipeline(PCA(width, random_state=seed), LogisticRegression(C=0.1, max_iter=500))
            score = cross_val_predict(model, part, y, cv=folds, method="decision_function")
            size = effect_size(score[y == 1], score[y == 0])
            linear = (size["auroc"], size["auroc_low"], size["auroc_high"])
        rows.append(("neighbours of the same class", name, *near, len(y)))
        rows.append(("linear AUROC", name, *linear, len(y)))
    return pd.DataFrame(rows, columns=["measure", "generator", "value", "low", "high", "n"])
