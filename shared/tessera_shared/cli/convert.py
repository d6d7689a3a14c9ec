"""`tessera convert`: rewrite a model in another dtype, shard size or family, with fresh checksums."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer

from tessera_shared.cli.info import size_text
from tessera_shared.errors import FormatError, SpecError
from tessera_shared.numerics import DTYPES
from tessera_shared.weights import load_model, save_model

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def convert(
    source: Annotated[Path, typer.Argument(help="A model directory.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="The directory to write.", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; as stored if left out.")] = None,
    max_shard_bytes: Annotated[str | None, typer.Option(help="Largest file, such as 2GB or 500MiB.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="llama, mistral, qwen2 or qwen3; as it is if left out.")
    ] = None,
    replace_existing: Annotated[bool, typer.Option("--replace", help="Replace a model at the destination.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinite weights.")
    ] = False,
) -> None:
    """Verify a model and write it again. Widening is exact; narrowing rounds to nearest and refuses to overflow."""
    refuse_existing(destination, replace_existing)
    shard_bytes = None if max_shard_bytes is None else parse_size(max_shard_bytes)
    model = load_model(source, allow_nonfinite=allow_nonfinite)
    spec = model.spec if architecture is None else replace(model.spec, architecture=architecture)
    arrays = {name: cast(name, array, dtype) for name, array in model.arrays.items()}
    save_model(
        destination,
        spec,
        arrays,
        tokenizer_file=model.tokenizer_file,
        max_shard_bytes=shard_bytes,
        numerics=model.numerics,
        companions=model.companions,
    )
    for note in model.notes:
        typer.echo(f"note: {note}")
    size = size_text(sum(array.nbytes for array in arrays.values()))
    typer.echo(f"wrote {destination}: {spec.architecture}, {len(arrays)} tensors, {size}")


def refuse_existing(directory: Path, replace_existing: bool) -> None:
    """Raise FormatError if `directory` exists, is not empty and may not be replaced."""
    if not replace_existing and (directory.is_file() or (directory.is_dir() and any(directory.iterdir()))):
        raise FormatError(
            f"{directory}: exists: expected a new or empty directory, because it would be replaced whole; try "
            "--replace if it holds a model that may go"
        )


def parse_size(text: str) -> int:
    """Return a number of bytes from `"2GB"` (powers of 1000), `"500MiB"` (powers of 1024) or `"123"`."""
    match = re.fullmatch(r"(\d+)\s*(k|m|g|ki|mi|gi)?b?", text.strip().lower())
    if match is None or int(match[1]) < 1:
        raise FormatError(f"max-shard-bytes = {text!r}: expected a size above 0, because files hold bytes; try 2GB")
    return int(match[1]) * _UNITS[match[2] or ""]


def cast(name: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """Return `array` in `dtype`, rounded to nearest. FormatError where a finite number would become infinite."""
    if dtype is None or array.dtype.name == dtype:
        return array
    if dtype not in DTYPES:
        raise SpecError(
            f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}, because weights are stored so; try 'float32'"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        lost = int(np.count_nonzero(np.isfinite(array) & ~np.isfinite(result)))
    if lost:
        raise FormatError(f"{name}: {lost} numbers are too large for {dtype}: expected them to fit; try a wider dtype")
    return result
