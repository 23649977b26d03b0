"""Extract features of N files with stand-ins; prints the highest resident memory in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from itemkit.decode import DecodeConfig
from itemkit.extraction import extract

from fakes import FakeCaptioner, FakeEncoder, FakeLocaliser, FakeParser, Models, Said, manifest_of


class FewWords(FakeCaptioner):
    """Says one thing of all images: the cache of texts, which has a bound of its own, stays small."""

    def caption(self, images):
        """Two objects."""
        return [Said("a red ball and a blue cup", -1.0) for _ in images]


def main(folder: Path, n: int) -> None:
    """Images lie in folder/images, numbered."""
    models = Models(FakeEncoder(dim=256), FewWords(), FakeParser(), FakeLocaliser())
    manifest = manifest_of([folder / "images" / f"{i}.bin" for i in range(n)])
    decode = DecodeConfig(loader="loaders:load_stub", threads=1)
    options = {"batch_size": 128, "shard_size": 500, "progress": False, "decode": decode}
    assert extract(manifest, folder / f"out{n}", models, **options).computed == n
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
