"""The only place that asks a network for models: the Hugging Face hub, and spaCy's own releases."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from itemkit.errors import ModelNotFound
from itemkit.weights import ANY_PRESET, first_line

TIMEOUT_S = 10.0  # for a first answer, not for a whole download
PARSER_TIMEOUT_S = 900.0  # a spaCy pipeline has 12 to 600 MB
PIP_TIMEOUT_S = 15


@dataclass(frozen=True)
class Listing:
    """What a repository of the hub holds: its commit, and each file's SHA-256 ("" where it does not say)."""

    revision: str
    files: dict[str, str]


def list_repository(repo: str, what: str) -> Listing:
    """Ask the hub what a repository holds.

    Parameters
    ----------
    repo : str
        "owner/name".
    what : str
        What it is wanted for, to begin an error with.

    Raises
    ------
    ModelNotFound
        The hub cannot be reached, or has no such repository.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(repo, files_metadata=True, timeout=TIMEOUT_S)
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{what}: the hub asks for consent before '{repo}' can be fetched. Give it on the model's page, "
            "log in with `hf auth login` and run the command again"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(f"{what}: the hub has no repository '{repo}' (or none for you)") from error
    except Exception as error:  # the hub's library raises errors of several others for a missing network
        raise unreachable(what, constants.ENDPOINT, error) from error
    return Listing(info.sha or "", {f.rfilename: f.lfs.sha256 if f.lfs else "" for f in info.siblings or ()})


def fetch_file(repo: str, name: str, expected_sha256: str, cache: Path | None = None) -> Path:
    """Fetch one file of a repository into a cache; what is there already is not fetched again.

    File by file, never as a snapshot: for a snapshot the hub's library notes what else the repository holds,
    and from then on takes the cached one for incomplete.

    Parameters
    ----------
    repo, name : str
        Repository and file.
    expected_sha256 : str
        As the repository lists it; "" to go without.
    cache : Path, optional
        Instead of the hub's own cache.

    Returns
    -------
    Path
        Inside the cache, which keeps the hub's layout.

    Raises
    ------
    ModelNotFound
        No answer, or the file arrived damaged (it is removed then).
    """
    from huggingface_hub import constants, hf_hub_download

    try:
        path = Path(hf_hub_download(repo, name, cache_dir=cache, etag_timeout=TIMEOUT_S))
    except Exception as error:  # as above
        cause = error.__cause__ or error  # the library's own words are that something happened
        raise unreachable(f"'{name}' of '{repo}'", constants.ENDPOINT, cause) from error
    if expected_sha256 and sha256(path) != expected_sha256:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise ModelNotFound(
            f"'{name}' of '{repo}' arrived damaged (its SHA-256 is not the hub's); run the command again"
        )
    return path


def note_absent(repo: str, name: str, cache: Path | None = None) -> None:
    """Let the cache note that a repository lacks a file.

    transformers asks for ``config.json`` beside every tokenizer, and without a network only such a note lets
    it do without.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(repo, name, cache_dir=cache, etag_timeout=TIMEOUT_S)


def require_parser(model: str, what: str) -> None:
    """Raise unless spaCy's table of releases can be read and has a pipeline; spaCy's own try may hang."""
    from spacy import about

    try:
        with urllib.request.urlopen(about.__compatibility__, timeout=TIMEOUT_S) as answer:
            known = {name for table in json.load(answer)["spacy"].values() for name in table}
    except (OSError, ValueError, KeyError) as error:
        raise unreachable(what, about.__compatibility__, error) from error
    if model not in known:
        raise ModelNotFound(f"{what}: spaCy has no pipeline of that name; see https://spacy.io/models")


def install_parser(model: str, target: Path | None = None) -> None:
    """Let spaCy and pip fetch a pipeline, into the environment or, as a package, into a folder."""
    where = [] if target is None else ["--target", str(target)]
    command = [sys.executable, "-m", "spacy", "download", model, "--no-deps", *where]
    environment = os.environ | {"PIP_DEFAULT_TIMEOUT": str(PIP_TIMEOUT_S), "PIP_RETRIES": "1"}
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PARSER_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(f"parser '{model}': no end of the download in {error.timeout:.0f} s") from error
    if run.returncode:
        said = [line.strip() for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        raise ModelNotFound(
            f"parser '{model}': `python -m spacy download {model}` failed: {said[-1] if said else 'silently'}"
        )


def unreachable(what: str, address: str, error: BaseException) -> ModelNotFound:
    """Build the one error for a missing network; ``ANY_PRESET`` in it stands for the preset's name."""
    return ModelNotFound(
        f"{what} cannot be fetched: no answer from {address} ({first_line(error)}). Run `itemkit download "
        f"--preset {ANY_PRESET} --to FOLDER` on a machine with a network, copy FOLDER here and name it with "
        "`--models FOLDER`; or use the models that come with itemkit: preset 'mini'."
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file as it lies on the disk now, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
