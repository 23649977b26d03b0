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
class Protocol:
    """Which sets train and which test: the fields of a data file."""

    name: str
    title: str
    note: str
    metric: str  # the one its published table prints
    layout: str = "auto"  # how the folder is read, see `itemkit.manifest.read_manifest`
    splits: dict[str, str] = field(default_factory=dict)
    """Folder's split -> part it plays here. Images under no split folder are test images."""
    train: list[str] = field(default_factory=list)  # whose fakes train; empty: each generator in turn
    each: list[str] = field(default_factory=list)  # those that train in turn; empty: all that can
    train_is_all: bool = False  # all of the training split is the one training set, whatever its folders
    test: dict[str, str] = field(default_factory=dict)
    """Generator -> title of its row, in the published order; empty where each generator tests."""
    one_source: bool = False  # every set is judged against all reals, whatever their column source says
    alias: dict[str, list[str]] = field(default_factory=dict)
    """Generator -> other names that people give its folder; case does not matter."""
    conditions: list[str] = field(default_factory=lambda: ["raw", "equalised"])
    """Parts of its table: "equalised" (one size and codec for all), "random JPEG" (one at a quality drawn for
    each image; also behind another name: "camera + random JPEG"); any other name: images as they are."""
    images: dict[str, str] = field(default_factory=dict)
    """Condition -> which of the laboratory's images it looks at (`itemkit.workflow.LAB_PARTS`), if others."""
    equalise: EqualiseConfig = field(default_factory=EqualiseConfig)
    families: dict[str, str] = field(default_factory=dict)
    """Generator -> family, where several share a network; a detector trained on one has seen the others."""
    lab: bool = False  # the mini laboratory's own images
    published: list[dict[str, Any]] = field(default_factory=list)
    """Numbers of others: ``what`` they are, ``condition, metric``, ``values`` (method and per cent)."""

    def select(
        self, manifest: pd.DataFrame, skip_missing: bool = False, per_set: int | None = None
    ) -> tuple[pd.DataFrame, list[str]]:
        """Take the images that play a part, under the protocol's names and in its splits.

        Parameters
        ----------
        skip_missing : bool
            Leave test sets out that are not there, instead of refusing.
        per_set : int, optional
            At most so many images of each set, class and split, drawn by path.

        Returns
        -------
        The manifest, and the titles of the test sets that were left out.

        Raises
        ------
        InputError
            The training set is missing, or a test set that may not be left out.
        """
        table = manifest[manifest[schema.LABEL].notna()].copy()
        table[schema.SPLIT] = table[schema.SPLIT].map(self.splits).fillna("test")
        if self.one_source:
            table[schema.SOURCE] = self.name
        fake = (table[schema.LABEL] == schema.FAKE).to_numpy(bool)
        training = (table[schema.SPLIT] != "test").to_numpy()
        names = {alias.casefold(): n for n in self.test for alias in (n, *self.alias.get(n, []))}
        known = table[schema.GENERATOR].astype(str).str.casefold().map(names)
        table[schema.GENERATOR] = known.where(fake).fillna(table[schema.GENERATOR])
        if self.train_is_all:
            table.loc[training & fake, schema.GENERATOR] = self.train[0]

        def with_reals(part: np.ndarray, names: list[str]) -> np.ndarray:
            """Rows of these generators' fakes, and of the reals that belong to the same sources."""
            mine = part & fake & table[schema.GENERATOR].isin(names).to_numpy()
            sources = set(table.loc[mine, schema.SOURCE])
            return np.flatnonzero(mine | (part & ~fake & table[schema.SOURCE].isin(sources).to_numpy()))

        train = with_reals(training, self.train)
        named = self.test or {name: name for name in sorted({*table.loc[~training & fake, schema.GENERATOR]})}
        tests = {title: with_reals(~training, [name]) for name, title in named.items()}
        missing = [title for title, rows in tests.items() if len(set(fake[rows])) < 2]
        sets = manifest[schema.SPLIT].fillna("no split folder") + ": " + manifest[schema.GENERATOR]
        there = "; ".join(f"{name} ({n:,})" for name, n in sets.value_counts().sort_index().items())
        found = f"Found {there[:1500] or 'nothing'}"
        if len(set(fake[train])) < 2:
            folders = ", ".join(folder for folder, part in self.splits.items() if part != "test")
            lacking = " and ".join(f"no {schema.LABEL_NAMES[k]}" for k in (0, 1) if k not in fake[train])
            raise InputError(
                f"{self.title}: {lacking} image of the training set {', '.join(self.train)} under a folder "
                f"{folders}. {found}. Give the folder that holds training and test sets"
            )
        if missing and (not skip_missing or len(missing) == len(tests)):
            raise InputError(
                f"{self.title}: {len(missing)} of {len(tests)} test sets are missing or lack one class: "
                f"{', '.join(missing)}. {found}. Add them, or leave them out with --skip-missing"
            )
        rows = [train, *(rows for title, rows in tests.items() if title not in missing)]
        table = table.iloc[np.unique(np.concatenate(rows))]
        if per_set is not None:
            if per_set < 4:
                raise InputError(f"at most {per_set} images of each set: expected at least 4")
            table = table.sort_values(schema.PATH)
            table = table.iloc[np.argsort(np.random.default_rng(0).permutation(len(table)))]
            each = table.groupby([schema.SPLIT, schema.GENERATOR, schema.SOURCE], dropna=False)
            table = each.head(per_set).sort_index()
        return table.reset_index(drop=True), missing


def protocol_names() -> list[str]:
    """Names of the data files."""
    files = (resources.files(__package__) / "protocols").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def get_protocol(name: str) -> Protocol:
    """Read a protocol's data file; an unknown name lists those there are."""
    if name not in (known := protocol_names()):
        hint = did_you_mean(name, known)
        raise InputError(f"unknown protocol {name!r}; expected one of {', '.join(known)}.{hint}")
    data = tomllib.loads((resources.files(__package__) / "protocols" / f"{name}.toml").read_text("utf-8"))
    data["equalise"] = EqualiseConfig(**data.get("equalise", {}))
    return Protocol(name=name, **data)
