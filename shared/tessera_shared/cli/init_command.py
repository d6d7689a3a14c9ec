"""`tessera init`: a new model with random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tessera_shared.cli.convert import refuse_existing
from tessera_shared.cli.info import size_text
from tessera_shared.init import initial_weights
from tessera_shared.numerics import numerics_for
from tessera_shared.presets import preset
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import num_parameters
from tessera_shared.weights import save_model


def init(
    preset_name: Annotated[
        str, typer.Argument(metavar="PRESET", help="A name from `tessera info`.", show_default=False)
    ],
    directory: Annotated[Path, typer.Argument(help="The directory to write.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Seed of every tensor's random stream.")] = 0,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float32",
    vocab_from: Annotated[
        Path | None, typer.Option(help="A tokenizer.json: its vocabulary size replaces the preset's; it is copied in.")
    ] = None,
    replace_existing: Annotated[bool, typer.Option("--replace", help="Replace a model that is there.")] = False,
) -> None:
    """Make a model from a preset. The same seed gives the same weights for every framework."""
    spec = preset(preset_name)
    numerics = numerics_for(dtype)
    refuse_existing(directory, replace_existing)
    if vocab_from is not None:
        spec = fitted_to_tokenizer(spec, vocab_from)
    weights = initial_weights(spec, seed=seed, dtype=dtype)
    save_model(directory, spec, weights, tokenizer_file=vocab_from, numerics=numerics)
    size = size_text(sum(array.nbytes for array in weights.values()))
    typer.echo(f"wrote {directory}: {preset_name}, {num_parameters(spec):,} parameters, {dtype}, {size}, seed {seed}")


def fitted_to_tokenizer(spec: ModelSpec, tokenizer_file: Path) -> ModelSpec:
    """Return `spec` with a tokenizer's vocabulary size and end-of-text id, and no other special ids."""
    from tessera_shared.tokens import Tokenizer  # loads a native library that no other case needs

    tokenizer = Tokenizer.load(tokenizer_file)
    return replace(
        spec, vocab_size=tokenizer.vocab_size, bos_token_id=None, eos_token_id=tokenizer.end_id, pad_token_id=None
    )
