"""Is this machine ready for a preset: packages, devices, memory, disk, models; one line each, with a remedy.

Nothing heavy is loaded, unless the deep test is asked for: then the models are built and asked questions with
known answers (`itemkit.doctor.selftest`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from itemkit import weights
from itemkit.doctor import machine, selftest
from itemkit.doctor.machine import FAIL, OK, WARN, Check
from itemkit.errors import ItemkitError, ModelNotFound
from itemkit.presets import MINI_REMEDY, PARTS, Preset, get_preset


def run_doctor(
    preset: str | Preset = "mini",
    device: str = "auto",
    deep: bool = False,
    cases: Callable[[], Sequence[selftest.Case]] | None = None,
    report: Callable[[Check], Any] | None = None,
) -> list[Check]:
    """Look at everything a preset needs.

    Parameters
    ----------
    preset : str or Preset
        Whose models are looked for.
    device : str
        "auto", "cpu", "cuda", "cuda:1", ...
    deep : bool
        Also build the models and ask them questions with known answers; takes as long as loading them.
    cases : callable, optional
        Makes the images and captions of the deep test; by default photographs (`selftest.photo_cases`). The
        mini models know renders only, so the caller hands over the laboratory's.
    report : callable, optional
        Gets each check as soon as it is done, e.g. ``print``.

    Returns
    -------
    list of Check
        In the order of looking; see `exit_status`.
    """
    checks = []
    for check in _look(preset, device, deep, cases):
        checks.append(check)
        if report is not None:
            report(check)
    return checks


def exit_status(checks: Sequence[Check]) -> int:
    """0 when nothing failed, else 1; warnings do not count."""
    return int(any(check.status == FAIL for check in checks))


def summary(checks: Sequence[Check]) -> str:
    """Sum up in one line how many checks were fine."""
    count = {status: sum(check.status == status for check in checks) for status in (OK, WARN, FAIL)}
    verdict = "not ready" if count[FAIL] else "ready"
    return f"{verdict}: {count[OK]} fine, {count[WARN]} to look at, {count[FAIL]} failed"


def _look(
    preset: str | Preset, device: str, deep: bool, cases: Callable[[], Sequence[selftest.Case]] | None
) -> Iterator[Check]:
    yield machine.check_python()
    yield from machine.check_packages()
    yield from machine.check_devices(device)
    yield machine.check_memory()
    yield machine.check_disk(Path.cwd())
    try:
        chosen = get_preset(preset) if isinstance(preset, str) else preset
    except ItemkitError as error:
        yield Check("preset", FAIL, str(error), "name another preset: `itemkit doctor --preset mini`")
        return
    models = list(_models(chosen))
    yield from models
    if deep and all(check.status != FAIL for check in models):
        yield from _deep(chosen, device, cases or selftest.photo_cases)
    elif deep:
        yield Check("deep test", FAIL, "not run: a model is missing", "get the models named above first")


def _models(preset: Preset) -> Iterator[Check]:
    """Find every model of a preset without loading it."""
    try:
        places = preset.find()
    except ItemkitError as error:
        yield Check("models", FAIL, str(error), "correct the name")
        return
    for part in PARTS:
        model, place = getattr(preset, part), places.get(part)
        if isinstance(place, ModelNotFound):
            remedy = MINI_REMEDY if preset.name == "mini" else weights.REMEDY
            found, _, more = str(place).partition(weights.REMEDY)
            todo = f"{remedy.replace(weights.ANY_PRESET, preset.name)}{more}".strip()
            yield Check(part, FAIL, found, todo)
        elif place is not None:
            yield _present(part, place)
        elif model is None:
            yield Check(part, OK, "left out")
        else:
            by_name = isinstance(model, str)
            yield Check(part, OK, f"'{model}', works with the encoder" if by_name else "given as an object")


def _present(part: str, place: weights.Located) -> Check:
    path = place.path
    files = [path] if path.is_file() else weights.weight_files(path)
    try:
        for file in files:
            _refuse_damaged(file)
    except ModelNotFound as error:
        return Check(part, FAIL, str(error), "fetch it again")
    # the same hashes as in the run.json of a feature store
    if part == "encoder":
        digest = weights.file_hash(files[0])
    else:
        digest = weights.folder_hash(path, recursive=part == "parser")
    return Check(part, OK, f"{weights.tidy(path)}, sha256 {digest[:12]}")


def _refuse_damaged(file: Path) -> None:
    """Read the table of contents of a weights file: a pointer of Git LFS or half a download has none."""
    if file.suffix != ".safetensors":
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ModelNotFound(
            f"{weights.tidy(file)} ({size} bytes) is not whole: {weights.first_line(error)}"
        ) from error


def _deep(preset: Preset, device: str, make_cases: Callable[[], Sequence[selftest.Case]]) -> Iterator[Check]:
    """Build the models and ask them questions with known answers."""
    try:
        parts = preset.build(device)
    except ItemkitError as error:
        yield Check(
            "deep test", FAIL, f"the models cannot be built: {error}", "fetch them again, then repeat"
        )
        return
    cases = make_cases()
    yield _judge(selftest.ask_encoder(parts.encoder, cases))
    if parts.captioner is not None:
        yield _judge(selftest.ask_captioner(parts.captioner, cases))
    if parts.localiser is not None:
        yield _judge(selftest.ask_localiser(parts.localiser, parts.encoder, cases))


def _judge(outcome: selftest.Outcome) -> Check:
    detail = f"{outcome.question} in {outcome.right} of {outcome.total}"
    if outcome.misses:
        more = f" and {len(outcome.misses) - 3} more" if len(outcome.misses) > 3 else ""
        detail += f" ({'; '.join(outcome.misses[:3])}{more})"
    if outcome.passed:
        return Check(f"deep {outcome.model}", OK, detail)
    # No localiser was ever measured on these photographs, so a weak one is told, not condemned.
    status = WARN if outcome.model == "localiser" else FAIL
    todo = (
        "compare weights, preprocessing and tokenizer with where the model comes from; do not extract with it"
    )
    return Check(f"deep {outcome.model}", status, f"{detail}, needed {outcome.needed:.0%}", todo)
