"""`tessera generate`: text from a model directory, in either half."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tessera_shared.cli.edge import remembered_interrupts
from tessera_shared.errors import DataError
from tessera_shared.half_loading import load_half_module
from tessera_shared.kernel_choice import check_kernels, tell_choice
from tessera_shared.numerics import Numerics, numerics_for
from tessera_shared.randomness import stream_key, uniforms
from tessera_shared.spec import ModelSpec
from tessera_shared.text_stream import stream_text
from tessera_shared.tokens import Tokenizer
from tessera_shared.validate import validate_generation
from tessera_shared.validate_text import check_vocabulary
from tessera_shared.weight_choice import check_weights
from tessera_shared.weights import LoadedModel, load_model

SAMPLING_STREAM = "generate"
"""New token t, counted from 0, takes uniform t of this stream of the seed, whatever the half and the prompt."""


def generate(
    model_dir: Annotated[Path, typer.Argument(help="A model directory with a tokenizer.json.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    backend: Annotated[str, typer.Option(help="torch or jax.")] = "torch",
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the fewest tokens with this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens with this share of the likeliest's probability.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random stream that sampling reads.")] = 0,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float32",
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json (default: the model's).")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kernels: Annotated[
        str | None, typer.Option(help="What the torch half computes with: triton, cuda, reference (default auto).")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Quantize the projections (torch half): w8, w8g128, w4 or fp8 (default: as stored). Embeddings, unembedding, "
            "norms and biases stay."
        ),
    ] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on past an end-of-text token.")] = False,
    as_ids: Annotated[bool, typer.Option("--ids", help="Print a JSON object of token ids instead of text.")] = False,
) -> None:
    """Print the prompt and what follows, as it comes. The same seed gives the same tokens; in float64 in both halves."""
    _check_sampling(temperature, top_p, min_p)
    model = load_model(model_dir)
    codec = _tokenizer(model, tokenizer)
    prompt_ids = _prompt_ids(codec, prompt, model.spec)
    stream = streamed_ids(
        model,
        prompt_ids,
        backend=backend,
        num_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        dtype=dtype,
        device=device,
        kernels=kernels,
        weights=weights,
    )
    ends = set() if ignore_end else {*model.end_token_ids, model.spec.eos_token_id}
    new_ids = takewhile(lambda token: token not in ends, stream)
    if as_ids:
        typer.echo(json.dumps({"prompt_ids": prompt_ids, "new_ids": list(new_ids)}))
    else:
        _print_as_it_comes(prompt, stream_text(codec, new_ids, context=prompt_ids, keep_special=ignore_end))


def _print_as_it_comes(prompt: str, pieces: Iterator[str]) -> None:
    """Print the prompt and each piece at once. Whatever ends it, Ctrl-C included, the line is ended first."""
    with remembered_interrupts() as is_interrupted:
        typer.echo(prompt, nl=False)
        try:
            for piece in pieces:
                typer.echo(piece, nl=False)
                if is_interrupted():
                    raise KeyboardInterrupt
        finally:
            typer.echo()


def streamed_ids(
    model: LoadedModel,
    prompt_ids: list[int],
    *,
    backend: str,
    num_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    dtype: str,
    device: str,
    kernels: str | None = "reference",
    weights: str | None = None,
) -> Iterator[int]:
    """Return an iterator over the ids that a half generates, each when it is known.

    Raises DataError, in the call itself, where prompt and new tokens exceed the model's positions.
    """
    numerics = numerics_for(dtype)
    check_kernels(kernels or "auto", backend=backend)
    check_weights(weights, backend=backend, dtype=dtype)
    shape = (1, num_tokens)  # checked before the framework is imported, which takes seconds
    validate_generation(
        (1, len(prompt_ids)), model.spec, num_tokens=num_tokens, uniforms_shape=shape, temperature=temperature
    )
    process = load_half_module(backend, "process")
    process.prepare_process(numerics, device=device)
    kind = "float64" if dtype == "float64" else "float32"
    uniforms_BT = uniforms(stream_key(seed, SAMPLING_STREAM), 0, num_tokens, dtype=kind)[None]
    stream_tokens = _stream_tokens(model, kernels, weights, backend=backend, device=device, numerics=numerics)
    stream = stream_tokens(
        process.array_from_numpy(np.array([prompt_ids], dtype=np.int32), device=device),
        spec=model.spec,
        numerics=numerics,
        num_tokens=num_tokens,
        uniforms_BT=process.array_from_numpy(uniforms_BT, device=device),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    return (int(process.array_to_numpy(ids_B)[0]) for ids_B in stream)


def _stream_tokens(
    model: LoadedModel, kernels: str | None, weights: str | None, *, backend: str, device: str, numerics: Numerics
) -> Callable[..., Iterator[Any]]:
    """Return the half's generator of tokens with the model's weights, or the one built of kernels; say once which was
    chosen and why, and what became of the weights."""
    say = partial(typer.echo, err=True)
    ops = None
    if backend == "torch":
        choice = load_half_module("torch", "kernels").choose(
            kernels or "auto", device=device, numerics=numerics, spec=model.spec, weights=weights
        )
        tell_choice(choice.why, kernels, device=device, say=say)
        ops = choice.ops
    if weights is not None:
        held = load_half_module("torch", "fast.packed_weights").pack_model(
            model.arrays, weights=weights, spec=model.spec, numerics=numerics, device=device
        )
        say(held.told)
        return partial(load_half_module("torch", "fast.decode").stream_tokens, held.params, packed=held.packed, ops=ops)
    params = load_half_module(backend, "model.params").params_from_numpy(
        model.arrays, dtype=numerics.compute, device=device
    )
    if ops is None:
        return partial(load_half_module(backend, "serve.decode").stream_tokens, params)
    return partial(load_half_module("torch", "fast.decode").stream_tokens, params, ops=ops)


def _tokenizer(model: LoadedModel, named: Path | None) -> Tokenizer:
    file = named or model.tokenizer_file
    if file is None:
        raise DataError(
            f"{model.directory}: no tokenizer.json: expected one, because a prompt becomes ids with it; try --tokenizer"
        )
    codec = Tokenizer.load(file)
    check_vocabulary(codec.vocab_size, model.spec.vocab_size, str(file))
    return codec


def _prompt_ids(codec: Tokenizer, prompt: str, spec: ModelSpec) -> list[int]:
    """Return the prompt's ids; an empty prompt is the token that begins, or else ends, a text."""
    ids = codec.encode_prompt(prompt)
    begin = spec.bos_token_id if spec.bos_token_id is not None else spec.eos_token_id
    if not ids and begin is not None:
        ids = [begin]
    if not ids:
        raise DataError(
            "prompt = '': expected some text, because the first new token follows the last of the prompt; try --prompt"
        )
    return ids


def _check_sampling(temperature: float, top_p: float, min_p: float) -> None:
    for name, value, low, high in (
        ("temperature", temperature, 0.0, float("inf")),
        ("top_p", top_p, 0.0, 1.0),
        ("min_p", min_p, 0.0, 1.0),
    ):
        if not (low <= value <= high and value != float("inf")):
            raise DataError(f"{name} = {value}: expected {low} to {high}, because of what it divides or keeps; try 1.0")
