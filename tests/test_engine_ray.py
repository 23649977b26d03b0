"""The Ray engine writes what the local engine writes."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from itemkit.decode import DecodeConfig
from itemkit.engine_ray import RayEngine, RayOptions, start_ray
from itemkit.errors import InputError, MissingExtra
from itemkit.extraction import extract
from itemkit.store import load_features

from fakes import Models, deadly_models, fake_models, make_images, manifest_of, png


def test_without_the_extra_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r'pip install "itemkit\[ray\]", or use engine="local"'):
        start_ray(RayOptions())


def test_unknown_engine(tmp_path):
    with pytest.raises(InputError, match="got engine='spark'; choose 'local' or 'ray'"):
        extract(make_images(tmp_path, 1), tmp_path / "out", fake_models(), engine="spark", progress=False)


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": -2}, {"gpus_per_worker": -1}])
def test_too_few_workers(options):
    with pytest.raises(InputError, match="at least 1 worker is needed"):
        RayOptions(**options)


class RayOfTwoMachines:
    """Stands in for a cluster: 8 CPUs and no GPU in all; a third machine is gone."""

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def nodes():
        gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [{"Alive": True, "Resources": {"CPU": n, "memory": 1e9}} for n in (6.0, 2.0)] + [gone]


def test_workers_without_room_are_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", RayOfTwoMachines)

    def engine(**options):
        return RayEngine(fake_models, RayOptions(**options), DecodeConfig())

    for fits in ({"workers": 8}, {"workers": 16, "cpus_per_worker": 0.5}, {"cpus_per_worker": 3}):
        assert engine(**fits).batch_size == 32
    with pytest.raises(InputError, match="asked for 16 .* 8 CPUs and 0 GPUs in all, with room for 8 such"):
        engine(workers=16)
    with pytest.raises(
        InputError, match="asked for 2 Ray workers with 1 CPUs and 1 GPUs each; .* for 0 such"
    ):
        engine(gpus_per_worker=1)
    with pytest.raises(InputError, match="8 CPUs and 0 GPUs in all, with room for 1 such"):
        engine(cpus_per_worker=4)  # a worker has to fit on one machine


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="needs the optional package ray")
    yield ray
    ray.shutdown()


def test_models_must_be_made_in_the_workers(ray, tmp_path):
    with pytest.raises(InputError, match="needs a preset .* not Models"):
        extract(make_images(tmp_path, 1), tmp_path / "out", fake_models(), engine="ray", progress=False)


@pytest.mark.slow
def test_two_workers_write_what_one_process_writes(ray, tmp_path):
    images = tmp_path / "images"
    manifest = make_images(images, 40)
    (images / "copy.png").write_bytes((images / "00004.png").read_bytes())
    (images / "bad.png").write_bytes(b"not an image")
    extra = manifest_of([images / "copy.png", images / "bad.png"])
    manifest = pd.concat([manifest, extra], ignore_index=True)
    options = {"batch_size": 8, "shard_size": 16, "progress": False}
    extract(manifest, tmp_path / "local", fake_models(), **options)
    first = extract(manifest[:20], tmp_path / "ray", fake_models, engine="ray", **options)
    assert (first.computed, first.left) == (20, 0)
    report = extract(manifest, tmp_path / "ray", fake_models, engine="ray", **options)
    assert (report.reused, report.computed, report.errors, report.left) == (21, 20, 1, 0)
    again = extract(manifest, tmp_path / "ray", fake_models(), **options)
    assert (again.reused, again.computed) == (41, 0), "the engines continue each other's stores"
    one, two = load_features(tmp_path / "local"), load_features(tmp_path / "ray")
    pd.testing.assert_frame_equal(one.table, two.table)
    pd.testing.assert_frame_equal(one.objects, two.objects, atol=1e-6)
    for name in ("image_emb", "caption_emb", "region_emb", "phrase_emb", "owner"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=2e-4)


@pytest.mark.slow
def test_image_that_kills_a_worker_costs_one_row(ray, tmp_path):
    manifest = make_images(tmp_path / "images", 10)
    (tmp_path / "images" / "00003.png").write_bytes(png(3, (31, 9)))
    report = extract(manifest, tmp_path / "out", deadly_models, engine="ray", batch_size=5, progress=False)
    assert (report.computed, report.errors, report.left) == (9, 1, 0)
    error = pd.read_parquet(tmp_path / "out" / "errors.parquet").iloc[0]
    assert error["path"] == "00003.png" and "the worker died on it" in error["reason"]


@pytest.mark.slow
def test_the_image_that_kills_a_worker_last_leaves_the_batch_size(ray, tmp_path):
    manifest = make_images(tmp_path / "images", 3)
    (tmp_path / "images" / "00002.png").write_bytes(png(3, (31, 9)))
    report = extract(manifest, tmp_path / "out", deadly_models, engine="ray", batch_size=5, progress=False)
    assert (report.computed, report.errors, report.batch_size) == (2, 1, 5)


def homeless_models() -> Models:
    """Load in a task, as when they are described, but not in a worker that stays."""
    import ray

    if ray.get_runtime_context().get_actor_id():
        raise OSError("no memory left for a second copy of the models")
    return fake_models()


@pytest.mark.slow
def test_worker_that_cannot_load_its_models_is_not_the_images_fault(ray, tmp_path):
    manifest = make_images(tmp_path / "images", 4)
    with pytest.raises(InputError, match=r"could not load the models \(OSError: no memory left for a second"):
        extract(manifest, tmp_path / "out", homeless_models, engine="ray", progress=False)
