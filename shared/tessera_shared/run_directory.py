"""A training run on disk, the same for both halves, so that either resumes what the other began.

    run.json             settings, and what they were pinned to: corpus, tokenizer, spec, teacher
    tokenizer.json
    model/               the weights of the last save, a Hugging Face directory
    state/step-00000020/ moments.safetensors (first/NAME and second/NAME) and state.json of that save
    metrics.jsonl        one object an update, and one a held-out evaluation
    tokens/              the encoded corpus

A save writes the new state beside the old, replaces the model, then drops the old state. `state.json` has the checksum
of every weight it belongs to, so that whatever a crash leaves, one state fits the model that is there.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera_shared.atomic import recover, replace_file, replaced_directory, write_file
from tessera_shared.checksums import checksum_array, checksum_bytes
from tessera_shared.errors import FormatError, SpecError
from tessera_shared.run_settings import RunSettings, check_settings, numerics_of
from tessera_shared.spec import ModelSpec
from tessera_shared.tensor_file import TensorFile, parse_json, write_tensors
from tessera_shared.weights import load_model, save_model

RUN, TOKENIZER, MODEL, STATE, METRICS = "run.json", "tokenizer.json", "model", "state", "metrics.jsonl"
MOMENTS, STATE_JSON = "moments.safetensors", "state.json"
FORMAT_VERSION = 1

_STATE_NAME = re.compile(r"step-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """Everything that the next update depends on. Arrays by the tensor table's names."""

    spec: ModelSpec
    params: Mapping[str, np.ndarray]
    first: Mapping[str, np.ndarray]
    second: Mapping[str, np.ndarray]
    step: int  # updates made


def create_run(directory: Path, settings: RunSettings, pinned: Mapping[str, Any], tokenizer_text: str) -> None:
    """Make a run directory. FormatError if something is there already."""
    refuse_existing_run(directory)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / TOKENIZER, tokenizer_text.encode())
    write_settings(directory, settings, pinned)


def refuse_existing_run(directory: Path) -> None:
    """Raise FormatError unless `directory` is new or empty."""
    if (directory / RUN).exists():
        raise FormatError(
            f"{directory}: a run already: expected a new or empty directory, because a run is never overwritten; try "
            "--resume to go on with it"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FormatError(
            f"{directory}: not empty and not a run: expected a new or empty directory, because nothing is overwritten; "
            "try another name"
        )


def write_settings(directory: Path, settings: RunSettings, pinned: Mapping[str, Any]) -> None:
    """Write `run.json`, whole or not at all."""
    content = {"format": "tessera-run", "version": FORMAT_VERSION, "settings": asdict(settings), "pinned": dict(pinned)}
    replace_file(directory / RUN, _json_bytes(content))


def read_settings(directory: Path) -> tuple[RunSettings, dict[str, Any]]:
    """Return a run's settings and what they were pinned to. FormatError where `directory` is not a run."""
    content = _read_json(directory / RUN, f"{directory}: not a run")
    if content.get("format") != "tessera-run" or content.get("version") != FORMAT_VERSION:
        raise FormatError(
            f"{directory / RUN}: format {content.get('format')!r}, version {content.get('version')!r}: expected "
            f"'tessera-run', {FORMAT_VERSION}, because fields change with the version; try the Tessera that wrote it"
        )
    values, pinned = content.get("settings"), content.get("pinned")
    known = {field.name for field in fields(RunSettings)}
    if not isinstance(values, dict) or not isinstance(pinned, dict) or values.keys() != known:
        raise FormatError(
            f"{directory / RUN}: fields are missing or unknown: expected {', '.join(sorted(known))}; try a new run"
        )
    try:
        return RunSettings(**values | {"data": tuple(values["data"])}), pinned
    except TypeError as error:
        raise FormatError(
            f"{directory / RUN}: {str(error)[:80]}: expected the settings as they were written; try a new run"
        ) from None


def resumed_settings(recorded: RunSettings, given: Mapping[str, Any], *, steps_made: int) -> RunSettings:
    """Return the recorded settings with `steps` raised or lowered as `given` asks.

    SpecError for any other flag that differs from the record, and for fewer steps than were made.
    """
    for name, value in given.items():
        if name != "steps" and value != getattr(recorded, name):
            raise SpecError(
                f"{name} = {value!r}: expected {getattr(recorded, name)!r}, because the run began with it; try leaving "
                "the flag out, or a new run"
            )
    settings = replace(recorded, steps=given.get("steps", recorded.steps))
    if settings.steps < steps_made:
        raise SpecError(
            f"steps = {settings.steps}: expected >= {steps_made}, because the run has made that many updates; try "
            f"--steps {steps_made + recorded.steps}"
        )
    check_settings(settings)
    return settings


@contextmanager
def locked_run(directory: Path) -> Iterator[None]:
    """Hold a run for this process. FormatError if another one has it; the lock goes when the process does."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FormatError(
                f"{directory}: another process is training here: expected one, because both would save; try again "
                "when it has finished"
            ) from None
        yield
    finally:
        os.close(descriptor)


def save_state(directory: Path, state: SavedState, settings: RunSettings, pinned: Mapping[str, Any]) -> None:
    """Save weights and moments. An interrupted save leaves the one before it."""
    content = {
        "format": "tessera-train-state",
        "version": FORMAT_VERSION,
        "step": state.step,
        "seed": settings.seed,
        "settings": asdict(settings),
        "data_cursor": {"samples": state.step * settings.batch_size, "corpus_xxh3_128": pinned["corpus"]["xxh3_128"]},
        "weights": {name: checksum_array(array) for name, array in state.params.items()},
    }
    moments = {f"first/{name}": array for name, array in state.first.items()}
    moments |= {f"second/{name}": array for name, array in state.second.items()}
    name = f"step-{state.step:08d}"
    with replaced_directory(directory / STATE / name) as staged:
        content["moments"] = write_tensors(staged / MOMENTS, moments).tensor_checksums
        content["xxh3_128"] = checksum_bytes(_json_bytes(content))
        write_file(staged / STATE_JSON, [_json_bytes(content)])
    save_model(
        directory / MODEL,
        state.spec,
        state.params,
        tokenizer_file=directory / TOKENIZER,
        numerics=numerics_of(settings),
    )
    for other in (directory / STATE).iterdir():  # what a killed process was writing, too
        if other.name != name:
            shutil.rmtree(other)


def load_state(directory: Path) -> SavedState | None:
    """Return the last save, verified, or None where none was made. FormatError names what is torn or does not fit."""
    recover(directory / MODEL)
    if not (directory / MODEL).exists():
        return None
    model = load_model(directory / MODEL)
    weights = {name: checksum_array(array) for name, array in model.arrays.items()}
    for folder in _states(directory):
        content = _read_state(folder)
        if content["weights"] == weights:
            first, second = _read_moments(folder, content, model.arrays)
            return SavedState(spec=model.spec, params=model.arrays, first=first, second=second, step=content["step"])
    raise FormatError(
        f"{directory / STATE}: no state of the weights in {MODEL}: expected the one that was saved with them, because "
        "moments belong to their weights; try putting both back, or a new run with --model"
    )


def append_metrics(directory: Path, record: Mapping[str, Any]) -> None:
    """Add one line to `metrics.jsonl`."""
    with (directory / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(record)) + "\n")


def forget_metrics_after(directory: Path, step: int) -> None:
    """Drop the lines of updates later than `step`, which will be made again, and a torn last line."""
    path = directory / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            record = parse_json(line, str(path))
        except FormatError:
            continue
        if record.get("step", 0) <= step:
            kept.append(line + b"\n")
    replace_file(path, b"".join(kept))


def _states(directory: Path) -> list[Path]:
    """Return the folders of saved states, newest first."""
    folder = directory / STATE
    found = [path for path in folder.iterdir() if _STATE_NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_JSON
    content = _read_json(path, str(path))
    checksum = content.pop("xxh3_128", None)
    if checksum != checksum_bytes(_json_bytes(content)):
        raise FormatError(f"{path}: altered: expected its checksum {checksum}, because a state is used whole or not")
    return content


def _read_moments(
    folder: Path, content: dict[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    file = TensorFile(folder / MOMENTS)
    found: dict[str, dict[str, np.ndarray]] = {"first": {}, "second": {}}
    for kind, moments in found.items():
        for name in arrays:
            key = f"{kind}/{name}"
            if key not in file.entries or key not in content["moments"]:
                raise FormatError(f"{file.path}: {key}: missing: expected both moments of every weight; try a backup")
            moments[name] = file.array(key)
            if checksum_array(moments[name]) != content["moments"][key]:
                raise FormatError(
                    f"{file.path}: {key}: altered: expected checksum {content['moments'][key]}, because it was taken "
                    "before the write; try a backup"
                )
    return found["first"], found["second"]


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(
            f"{what}: {path.name} is not there: expected a directory that `tessera train` made; try it without --resume"
        ) from None
    return parse_json(data, str(path))


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
