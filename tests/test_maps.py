"""Maps and the measures of separation that stand beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from itemkit.maps import neighbours, separation, umap_2d


def two_classes(
    gap: float, n_real: int = 150, n_fake: int = 150, d: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_real + n_fake, d))
    x[n_real:] += gap / np.sqrt(d)
    return x, np.array(["real"] * n_real + ["gan"] * n_fake)


def measured(x: np.ndarray, names: np.ndarray, **options: int) -> dict[str, dict[str, float]]:
    table = separation(x, names, **options)
    return {row["measure"]: row for row in table.to_dict("records")}


def test_one_seed_gives_one_map() -> None:
    x, _ = two_classes(gap=30.0, n_real=40, n_fake=40)
    first = umap_2d(x, seed=1, n_neighbors=8)
    assert first.shape == (80, 2) and first.dtype == np.float32 and np.isfinite(first).all()
    np.testing.assert_array_equal(umap_2d(x, seed=1, n_neighbors=8), first)
    assert not np.array_equal(umap_2d(x, seed=2, n_neighbors=8), first)
    # two far clouds stay two: nobody's nearest neighbour on the map is of the other class
    distance = np.linalg.norm(first[:, None] - first[None], axis=-1) + 1e9 * np.eye(80)
    nearest = distance.argmin(1)
    assert ((nearest >= 40) == (np.arange(80) >= 40)).all()


@pytest.mark.parametrize("writable", [True, False])
def test_a_map_needs_no_folder_that_can_be_written(writable: bool, tmp_path: Path) -> None:
    script = "from numba.core import caching\n" + (
        # as in a read-only environment with a read-only home: only a place that numba was told of is left
        "" if writable else "caching.CacheImpl._locator_classes = [caching.UserProvidedCacheLocator]\n"
    )
    script += (
        "from itemkit import maps\nprint(maps.ready_numba_cache(), maps.ready_numba_cache())\n"
        "import numba; print(numba.config.CACHE_DIR)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    made, used = run.stdout.split("\n")[:2]
    if writable:
        assert (made, used) == ("None None", ""), run.stderr
    else:
        assert made == f"{used} None" and Path(used).parent == tmp_path and not Path(used).exists()


def test_a_twin_is_a_neighbour() -> None:
    # every point has a twin of the other class: of its one nearest neighbour none is of its own class
    x = np.repeat(np.random.default_rng(0).normal(size=(40, 6)), 2, axis=0)
    got = measured(x, np.array(["real", "gan"] * 40), k=1)
    assert got["neighbours of the same class"]["value"] == 0


def test_neighbours_are_others_and_the_nearest_comes_first() -> None:
    x = np.array([[0.0], [1.0], [3.0], [7.0], [7.0]])
    np.testing.assert_array_equal(neighbours(x, 1), [[1], [0], [1], [4], [3]])
    np.testing.assert_array_equal(neighbours(x[:4], 3)[1], [0, 2, 3])


def test_too_few_points_are_an_error() -> None:
    with pytest.raises(ValueError, match="got 10 points; more than n_neighbors=15 are needed"):
        umap_2d(np.zeros((10, 3)))


def test_what_is_apart_is_told_to_be_apart() -> None:
    got = measured(*two_classes(gap=12.0))
    assert got["neighbours of the same class"]["value"] > 0.99
    assert got["linear AUROC"]["value"] > 0.999 and got["linear AUROC"]["low"] > 0.95
    assert got["linear AUROC"]["n"] == 300


@pytest.mark.parametrize(("n_real", "n_fake"), [(150, 150), (150, 60), (60, 240)])
def test_one_distribution_is_at_chance(n_real: int, n_fake: int) -> None:
    got = measured(*two_classes(gap=0.0, n_real=n_real, n_fake=n_fake))
    assert got["neighbours of the same class"]["value"] == pytest.approx(0.5, abs=0.08)
    auroc = got["linear AUROC"]
    assert auroc["low"] < 0.5 < auroc["high"] and auroc["n"] == 2 * min(n_real, n_fake)


def test_a_generator_with_a_handful_of_images_is_named_and_not_measured() -> None:
    x, names = two_classes(gap=3.0, n_real=30, n_fake=30)
    table = separation(x[:34], names[:34])
    assert list(table["generator"]) == ["gan"] * 2 and list(table["n"]) == [8, 8]
    assert table["value"].isna().all()


def test_a_wide_space_with_few_images_works() -> None:
    x, names = two_classes(gap=12.0, n_real=20, n_fake=20, d=64)  # fewer images in a fold than dimensions
    assert measured(x, names)["linear AUROC"]["value"] > 0.9


def test_each_generator_is_measured_by_itself_and_by_the_seed() -> None:
    x, names = two_classes(gap=3.0)
    names = names.astype(object)
    names[200:] = "vae"
    table = separation(x, names, seed=3)
    assert list(table["generator"]) == ["gan", "gan", "vae", "vae"]
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert separation(x, names, seed=3).equals(table)
    # scaling a column is no information
    assert separation(x * np.linspace(1, 50, 12), names, seed=3)["value"].to_numpy() == pytest.approx(
        table["value"].to_numpy(), abs=1e-6
    )
