"""The field's protocols as data files beside this module: what trains, what tests, in which order and metric.

A file says which sets of a user's folder play which part, and what others have published; the folder is read
by `itemkit.manifest`, and validation images that a data set lacks are carved by `itemkit.splits`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

from itemkit import schema
from itemkit.errors import InputError
from itemkit.images import EqualiseConfig
from itemkit.text import did_you_mean


@dataclass(frozen=True)
class TestSet:
    """One row of a published table.

    Attributes
    ----------
    name : str
        Generator in the manifest, in any case; ``alias`` lists other names people give the folder.
    title : str
        As tables print it.
    alias : tuple of str
    """

    __test__ = False  # no test of pytest's, whatever its name

    name: str
    title: str
    alias: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        """Every name it goes by, in lower case."""
        return {name.casefold() for name in (self.name, *self.alias)}


@dataclass(frozen=True)
class Published:
    """Numbers printed by others, kept apart from ours everywhere."""

    what: str
    condition: str
    metric: str
    values: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Protocol:
    """Which sets train and which test; made by `get_protocol` from a data file.

    Attributes
    ----------
    name, title, note : str
    metric : str
        The one its published table prints.
    layout : str
        How the folder is read, see `itemkit.manifest.read_manifest`.
    splits : dict
        Folder's split -> part it plays here. Images under no split folder are test images.
    train : tuple of str
        Sets of which the fakes train; empty where each generator trains in turn.
    train_is_all : bool
        Everything in the training split belongs to the one training set, whatever its folders are called.
    test : tuple of TestSet
        In the order of the published table; empty where each generator tests.
    conditions : tuple of str
        Columns of its table: "raw" or "clean" (images as they are), "equalised" (one size and codec for all),
        "random JPEG" (one at a quality drawn for each image).
    equalise : EqualiseConfig
        What "equalised" means.
    families : dict
        Generator -> family, where several share a network; a detector trained on one has seen the others.
    all_forms : bool
        Try every level and form of misalignment, not the default and its cosine alone.
    lab : bool
        About the mini laboratory's images, which come with the package; all others need images.
    published : tuple of Published
    """

    name: str
    title: str
    metric: str
    note: str = ""
    layout: str = "auto"
    splits: dict[str, str] = field(default_factory=dict)
    train: tuple[str, ...] = ()
    train_is_all: bool = False
    test: tuple[TestSet, ...] = ()
    conditions: tuple[str, ...] = ("raw", "equalised")
    equalise: EqualiseConfig = field(default_factory=EqualiseConfig)
    families: dict[str, str] = field(default_factory=dict)
    all_forms: bool = False
    lab: bool = False
    published: tuple[Published, ...] = ()

    def titles(self) -> dict[str, str]:
        """Generator -> title of its row."""
        return {test.name: test.title for test in self.test}

    def select(
        self, manifest: pd.DataFrame, skip_missing: bool = False, per_set: int | None = None
    ) -> tuple[pd.DataFrame, list[str]]:
        """Take the images that play a part, under the protocol's names and in its splits.

        Parameters
        ----------
        manifest : DataFrame
            Of `read_manifest`.
        skip_missing : bool
            Leave test sets out that are not there, instead of refusing.
        per_set : int, optional
            At most so many images of each set, class and split, drawn by path.

        Returns
        -------
        tuple
            The manifest, and the titles of the test sets that were left out.

        Raises
        ------
        InputError
            The training set is missing, or a test set and it may not be left out; both name what there is.
        """
        table = manifest[manifest[schema.LABEL].notna()].copy()
        table[schema.SPLIT] = table[schema.SPLIT].map(self.splits).fillna("test")
        fake = (table[schema.LABEL] == schema.FAKE).to_numpy(bool)
        training = (table[schema.SPLIT] != "test").to_numpy()
        names = table[schema.GENERATOR].astype(str).str.casefold()
        for test in self.test:
            table.loc[fake & names.isin(test.names).to_numpy(), schema.GENERATOR] = test.name
        if self.train_is_all:
            table.loc[training & fake, schema.GENERATOR] = self.train[0]

        def with_reals(part: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
            """Rows of these generators' fakes, and of the reals that belong to the same sources."""
            mine = part & fake & table[schema.GENERATOR].isin(names).to_numpy()
            sources = set(table.loc[mine, schema.SOURCE])
            return np.flatnonzero(mine | (part & ~fake & table[schema.SOURCE].isin(sources).to_numpy()))

        train = with_reals(training, self.train)
        tests = {test.title: with_reals(~training, (test.name,)) for test in self.test}
        missing = [title for title, rows in tests.items() if len(set(fake[rows])) < 2]
        there = _what_there_is(manifest)
        lacking = [schema.LABEL_NAMES[k] for k in (0, 1) if not (fake[train] == bool(k)).any()]
        if lacking:
            folders = ", ".join(k for k, v in self.splits.items() if v != "test")
            raise InputError(
                f"{self.title}: no {' and no '.join(lacking)} image of the training set "
                f"{', '.join(self.train)} under a folder {folders}. Found {there}. "
                "Give the folder that holds training and test sets"
            )
        if missing and (not skip_missing or len(missing) == len(tests)):
            raise InputError(
                f"{self.title}: {len(missing)} of {len(tests)} test sets are missing or lack one class: "
                f"{', '.join(missing)}. Found {there}. Add them, or leave them out with --skip-missing"
            )
        rows = [train, *(rows for title, rows in tests.items() if title not in missing)]
        table = table.iloc[np.unique(np.concatenate(rows))]
        return (table if per_set is None else _limit(table, per_set)).reset_index(drop=True), missing


def _what_there_is(manifest: pd.DataFrame) -> str:
    counts = manifest.assign(split=manifest[schema.SPLIT].fillna("no split folder"))
    counts = counts.groupby(["split", schema.GENERATOR]).size()
    there = "; ".join(f"{split}: {name} ({n:,})" for (split, name), n in counts.items()) or "nothing"
    return there if len(there) < 1500 else f"{there[:1500]} ..."


def _limit(table: pd.DataFrame, per_set: int) -> pd.DataFrame:
    if per_set < 4:
        raise InputError(f"at most {per_set} images of each set: expected at least 4")
    rng = np.random.default_rng(0)
    order = pd.Series(rng.permutation(len(table)), index=table.sort_values(schema.PATH).index)
    keys = [table[c] for c in (schema.SPLIT, schema.GENERATOR, schema.SOURCE)]
    rank = order.reindex(table.index).groupby([key.astype(str) for key in keys]).rank()
    return table[rank <= per_set]


def protocol_names() -> list[str]:
    """Names of the data files."""
    files = (resources.files(__package__) / "protocols").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def get_protocol(name: str) -> Protocol:
    """Read a protocol's data file; an unknown name lists those there are."""
    if name not in (known := protocol_names()):
        hint = did_you_mean(name, known)
        raise InputError(f"unknown protocol {name!r}; expected one of {', '.join(known)}.{hint}")
    file = resources.files(__package__) / "protocols" / f"{name}.toml"
    data: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    for key in ("train", "conditions"):
        if key in data:
            data[key] = tuple(data[key])
    data["test"] = tuple(
        TestSet(row["name"], row["title"], tuple(row.get("alias", ()))) for row in data.get("test", ())
    )
    data["equalise"] = EqualiseConfig(**data.get("equalise", {}))
    data["published"] = tuple(
        Published(**{**entry, "values": tuple((str(m), float(v)) for m, v in entry["values"])})
        for entry in data.get("published", ())
    )
    return Protocol(name=name, **data)
