"""The Ray engine writes what the local engine writes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from itemkit import engine_ray
from itemkit.decode import DecodeConfig
from itemkit.engine_ray import RayOptions, check_room, start_ray
from itemkit.errors import InputError, ItemkitError, MissingExtra
from itemkit.extraction import extract
from itemkit.models import Models
from itemkit.store import load_features

from fakes import (
    FakeCaptioner,
    FakeEncoder,
    FakeLocaliser,
    FakeParser,
    deadly_models,
    fake_models,
    make_images,
    manifest_of,
    png,
    same_content,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*without features")


def test_without_the_extra_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r'pip install "itemkit\[ray\]", or run without Ray'):
        start_ray(RayOptions())


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": -2}, {"gpus_per_worker": -1}])
def test_too_few_workers(options):
    with pytest.raises(InputError, match="at least 1 worker is needed"):
        RayOptions(**options)


class Cluster:
    """Two machines of 6 and 2 CPUs; a third is gone."""

    def __init__(self, gpus: float = 0) -> None:
        self.gpus = gpus

    def nodes(self):
        gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        there = [{"Alive": True, "Resources": {"CPU": n, "GPU": self.gpus}} for n in (6.0, 2.0)]
        return [*there, gone]


def test_workers_without_room_are_refused_at_once():
    for fits in ({"workers": 8}, {"workers": 16, "cpus_per_worker": 0.5}, {"cpus_per_worker": 3}):
        check_room(Cluster(), RayOptions(**fits))
    for spread, message in (
        ({"workers": 16}, "asked for 16 .* 8 CPUs and 0 GPUs in all, with room for 8 such"),
        ({"gpus_per_worker": 1}, "asked for 2 Ray workers with 1 CPUs and 1 GPUs each; .* for 0 such"),
        ({"cpus_per_worker": 4}, "with room for 1 such"),  # a worker has to fit on one machine
    ):
        with pytest.raises(InputError, match=message):
            check_room(Cluster(), RayOptions(**spread))


def test_gpus_that_no_worker_gets_are_pointed_out(recwarn):
    check_room(Cluster(1), RayOptions(gpus_per_worker=1))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="has 2 GPUs and the workers get none .*--gpus-per-worker 1"):
        check_room(Cluster(1), RayOptions())


class Dies(BaseException):
    """Takes a worker of the stand-in below down."""


class OneProcess(Cluster):
    """Stands in for Ray, in this process and one call after the other."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})

    def put(self, value):
        return value

    def kill(self, actor):
        pass

    def wait(self, refs, timeout):
        return refs[:1], refs[1:]

    def get(self, ref):
        try:
            return ref.call()
        except Dies as error:
            raise self.exceptions.RayError("The actor died unexpectedly") from error
        except self.exceptions.RayError:
            raise
        except Exception as error:
            failed = self.exceptions.RayTaskError(str(error))
            failed.cause = error
            raise failed from error

    def remote(self, target=None, **needs):
        if target is None:
            return self.remote
        if not isinstance(target, type):
            return SimpleNamespace(remote=lambda *args: SimpleNamespace(call=lambda: target(*args)))

        def actor(*args):
            made = []  # when first asked, as Ray does: an actor that fails then fails its calls

            def make(*more):
                try:
                    made or made.append(target(*args))
                except Exception as error:
                    cause = f"{type(error).__name__}: {error}"
                    text = (
                        f"The actor died because of an error raised in its creation task\n  File ...\n{cause}"
                    )
                    raise self.exceptions.RayError(text) from error
                try:
                    return made[0].make(*more)
                except Dies:
                    made.clear()  # it is started anew
                    raise

            return SimpleNamespace(make=SimpleNamespace(remote=lambda *more: Ref(lambda: make(*more))))

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=actor))


class Ref:
    """A reference that can be a key."""

    def __init__(self, call):
        self.call = call


def test_what_is_planned_for_workers_is_all_there_in_the_end(monkeypatch, tmp_path):
    class Deadly(FakeCaptioner):
        def caption(self, images):
            if any(image.width == 31 for image in images):
                raise Dies
            return super().caption(images)

    monkeypatch.setattr(engine_ray, "start_ray", lambda spread: OneProcess())
    chosen, beside = set(), DecodeConfig.beside

    def noted(config, device):
        chosen.add(config.processes)
        return beside(config, device)

    monkeypatch.setattr(DecodeConfig, "beside", noted)
    manifest = make_images(tmp_path / "images", 20)
    (tmp_path / "images" / "00003.png").write_bytes(png(3, (31, 9)))
    (tmp_path / "images" / "00009.png").write_bytes(b"not an image")
    models = Models(FakeEncoder(), Deadly(), FakeParser(), FakeLocaliser())
    options = {"ray": RayOptions(), "progress": False, "batch_size": 2, "shard_size": 8}
    report = extract(manifest, tmp_path / "out", models, **options)
    assert (report.computed, report.errors, report.left) == (18, 2, 0)
    assert report.stages["image"] > 0 and chosen == {False}, "workers decode in threads"
    errors = pd.read_parquet(tmp_path / "out" / "errors.parquet")
    assert errors["stage"].tolist() == ["worker", "decode"]
    assert "00003.png: the worker died on it" in errors["reason"][0]
    extract(manifest, tmp_path / "local", fake_models(), progress=False)
    local = load_features(tmp_path / "local")
    same_content(load_features(tmp_path / "out"), local.select(np.delete(np.arange(19), 3)))
    assert extract(manifest, tmp_path / "out", fake_models(), progress=False).computed == 1
    with pytest.raises(ItemkitError, match="a Ray worker failed to start .*no memory left for a second copy"):
        extract(manifest, tmp_path / "new", Homeless(), **options)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="needs the optional package ray")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_write_what_one_process_writes(ray, tmp_path):
    images = tmp_path / "images"
    manifest = make_images(images, 40)
    (images / "copy.png").write_bytes((images / "00004.png").read_bytes())
    (images / "bad.png").write_bytes(b"not an image")
    extra = manifest_of([images / "copy.png", images / "bad.png"])
    manifest = pd.concat([manifest, extra], ignore_index=True)
    options = {"batch_size": 4, "shard_size": 16, "progress": False}
    extract(manifest, tmp_path / "local", fake_models(), **options)
    first = extract(manifest[:20], tmp_path / "ray", fake_models(), ray=RayOptions(), **options)
    assert (first.computed, first.left) == (20, 0)
    report = extract(manifest, tmp_path / "ray", fake_models(), ray=RayOptions(), **options)
    assert (report.reused, report.computed, report.errors, report.left) == (21, 20, 1, 0)
    again = extract(manifest, tmp_path / "ray", fake_models(), **options)
    assert (again.reused, again.computed) == (41, 0), "the engines continue each other's stores"
    same_content(load_features(tmp_path / "local"), load_features(tmp_path / "ray"))


@pytest.mark.slow
def test_image_that_kills_a_worker_costs_one_row(ray, tmp_path):
    manifest = make_images(tmp_path / "images", 10)
    (tmp_path / "images" / "00003.png").write_bytes(png(3, (31, 9)))
    report = extract(
        manifest, tmp_path / "out", deadly_models(), ray=RayOptions(), batch_size=5, progress=False
    )
    assert (report.computed, report.errors, report.left) == (9, 1, 0)
    error = pd.read_parquet(tmp_path / "out" / "errors.parquet").iloc[0]
    assert error["path"] == "00003.png" and "the worker died on it" in error["reason"]


class Homeless:
    """A preset whose models cannot be loaded."""

    captioner = "a name"

    def fingerprint(self, captions="generate", device="auto"):
        return fake_models().fingerprint(captions) | {"encoder": {"dim": 16}}

    def build(self, device="auto"):
        raise OSError("no memory left for a second copy of the models")
