"""Every layout of the field as a small tree of true images: each file gets its own label, and is readable.

The details of each layout (generators, splits, ambiguity) are in test_layouts; here the images are what they
are in use: renders of the laboratory beside their JPEG copies, and photographs beside generated images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from itemkit.extraction import extract
from itemkit.images import content_id
from itemkit.manifest import read_manifest
from itemkit.store import load_features
from minilab.renders import make_renders

from fakes import fake_models

Files = Sequence[tuple[bytes, str]]  # contents and ending; two for each class
Built = tuple[object, dict[str, object]]  # what read_manifest gets


def place(folder: Path, reals: Sequence[str], fakes: Sequence[str]) -> Callable[[Files, Files], Path]:
    """A tree: the i-th file of a class goes into the i-th of its folders."""

    def write(real: Files, fake: Files) -> Path:
        for names, files in ((reals, real), (fakes, fake)):
            for i, (data, ending) in enumerate(files):
                target = folder / names[i % len(names)] / f"{content_id(data)[:12]}{ending}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        return folder

    return write


def genimage(top: Path, real: Files, fake: Files) -> Built:
    folders = ("Midjourney/train/{}", "stable_diffusion_v_1_5/val/{}")
    nature, ai = ([f.format(name) for f in folders] for name in ("nature", "ai"))
    return place(top / "GenImage", nature, ai)(real, fake), {}


def genimage_as_downloaded(top: Path, real: Files, fake: Files) -> Built:
    inner = "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4"
    nature = [f"{inner}/train/nature", f"{inner}/val/nature"]
    return place(top / "GenImage", nature, [f"{inner}/train/ai", f"{inner}/val/ai"])(real, fake), {}


def forensynths(top: Path, real: Files, fake: Files) -> Built:
    folders = ("test/progan/airplane/{}", "test/biggan/{}")
    reals, fakes = ([f.format(name) for f in folders] for name in ("0_real", "1_fake"))
    return place(top / "CNNDetection", reals, fakes)(real, fake), {"layout": "forensynths"}


def ufd_shared_reals(top: Path, real: Files, fake: Files) -> Built:
    base = "test/diffusion_datasets"
    reals = [f"{base}/imagenet/0_real", f"{base}/laion/0_real"]
    fakes = [f"{base}/guided/1_fake", f"{base}/ldm_200/1_fake"]
    return place(top / "ufd", reals, fakes)(real, fake), {"layout": "ufd"}


def diffusionforensics(top: Path, real: Files, fake: Files) -> Built:
    reals = ["images/train/lsun_bedroom/real", "images/test/imagenet/real/n01440764"]
    fakes = ["images/train/lsun_bedroom/adm", "images/test/imagenet/sdv1"]
    return place(top / "DiffusionForensics", reals, fakes)(real, fake), {}


def drct(top: Path, real: Files, fake: Files) -> Built:
    place(top, ["MSCOCO/train2017", "MSCOCO/val2017"], ["DRCT-2M/sd-turbo/train2017"])(real, fake)
    return top / "DRCT-2M", {"real_root": top / "MSCOCO"}


def synthbuster(top: Path, real: Files, fake: Files) -> Built:
    place(top, ["RAISE-1k"], ["synthbuster/glide", "synthbuster/firefly"])(real, fake)
    (top / "synthbuster" / "prompts.txt").write_text("notes")
    return top / "synthbuster", {"real_root": top / "RAISE-1k"}


def aigibench(top: Path, real: Files, fake: Files) -> Built:
    reals, fakes = ([f"val/sdv3/{name}", f"test/flux/{name}"] for name in ("0_real", "1_fake"))
    return place(top / "AIGIBench", reals, fakes)(real, fake), {"layout": "aigibench"}


def plain(top: Path, real: Files, fake: Files) -> Built:
    return place(top / "photos", ["real"], ["fake/sdxl", "fake/dalle"])(real, fake), {}


def grip_csv(top: Path, real: Files, fake: Files) -> Built:
    folder = place(top / "grip", ["coco"], ["gen/a", "gen/b"])(real, fake)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in files]
    kinds = ["real" if name.startswith("coco") else "glide" for name in names]
    pd.DataFrame({"filename": names, "typ": kinds}).to_csv(folder / "list.csv", index=False)
    return folder / "list.csv", {"layout": "grip"}


def openfake(top: Path, real: Files, fake: Files) -> Built:
    rows = [(d, "real", "laion") for d, _ in real] + [(d, "fake", "flux.1-dev") for d, _ in fake]
    table = pa.table(
        {
            "image": [{"bytes": data, "path": None} for data, _, _ in rows],
            "prompt": ["a scene"] * len(rows),
            "label": [label for _, label, _ in rows],
            "model": [model for _, _, model in rows],
            "type": ["base"] * len(rows),
            "release_date": ["2024"] * len(rows),
        }
    )
    (top / "OpenFake").mkdir(parents=True)
    pq.write_table(table, top / "OpenFake" / "train-00000-of-00001.parquet")
    return top / "OpenFake", {"images_to": top / "out"}


def communityforensics(top: Path, real: Files, fake: Files) -> Built:
    rows = [(d, 0) for d, _ in real] + [(d, 1) for d, _ in fake]
    table = pa.table(
        {
            "image_name": [f"image {i}" for i in range(len(rows))],
            "image_data": [data for data, _ in rows],
            "model_name": ["sd-2" if label else "" for _, label in rows],
            "label": [label for _, label in rows],
        }
    )
    top.mkdir(exist_ok=True)
    pq.write_table(table, top / "part.parquet")
    return top / "part.parquet", {"images_to": top / "out"}


def saved_dataset(top: Path, real: Files, fake: Files) -> Built:
    folder = top / "ds" / "train"
    folder.mkdir(parents=True)
    rows = [(d, 0) for d, _ in real] + [(d, 1) for d, _ in fake]
    table = pa.table(
        {"image": [{"bytes": d, "path": None} for d, _ in rows], "label": [label for _, label in rows]}
    )
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text("{}")
    (top / "ds" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return top / "ds", {"images_to": top / "out"}


LAYOUTS = (
    genimage,
    genimage_as_downloaded,
    forensynths,
    ufd_shared_reals,
    diffusionforensics,
    drct,
    synthbuster,
    aigibench,
    plain,
    grip_csv,
    openfake,
    communityforensics,
    saved_dataset,
)


@pytest.fixture(scope="module")
def renders() -> tuple[Files, Files]:
    def encoded(array, kind: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, kind)
        return buffer.getvalue()

    scenes = make_renders("models_val", 4).images
    return (
        [
            (encoded(scene, "JPEG"), ending)
            for scene, ending in zip(scenes[:2], (".JPEG", ".jpg"), strict=True)
        ],
        [(encoded(scene, "PNG"), ".png") for scene in scenes[2:]],
    )


@pytest.fixture(scope="module")
def photographs(real_dir: Path) -> tuple[Files, Files]:
    index = pd.read_csv(real_dir / "index.csv")

    def some(label: str) -> Files:
        paths = index.loc[index["label"] == label, "path"].iloc[[0, -1]]
        return [((real_dir / path).read_bytes(), Path(path).suffix) for path in paths]

    return some("real"), some("fake")


def check(build: Callable[[Path, Files, Files], Built], folder: Path, files: tuple[Files, Files]) -> None:
    real, fake = files
    source, options = build(folder, real, fake)
    manifest = read_manifest(source, **options)  # type: ignore[arg-type]
    found = {content_id(Path(row.path).read_bytes()): row.label for row in manifest.itertuples()}
    assert found == {content_id(d): label for label, kind in enumerate(files) for d, _ in kind}
    assert (manifest["generator"] == "real").tolist() == (manifest["label"] == 0).tolist()
    report = extract(manifest, folder / "features", fake_models(), progress=False)
    assert (report.computed, report.errors) == (4, 0)
    features = load_features(folder / "features")
    assert sorted(features.labels.tolist()) == [0, 0, 1, 1]
    assert features.table["path"].tolist() == manifest["path"].tolist()


@pytest.mark.parametrize("build", LAYOUTS, ids=lambda build: build.__name__)
def test_of_renders(build, tmp_path: Path, renders: tuple[Files, Files]) -> None:
    check(build, tmp_path, renders)


@pytest.mark.real
@pytest.mark.parametrize("build", LAYOUTS, ids=lambda build: build.__name__)
def test_of_photographs(build, tmp_path: Path, photographs: tuple[Files, Files]) -> None:
    check(build, tmp_path, photographs)
