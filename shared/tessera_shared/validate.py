"""Checks of token ids at the edge, where they are still NumPy arrays: inside a compiled step it is too late to look."""

import numpy as np

from tessera_shared.errors import DataError
from tessera_shared.spec import ModelSpec


def validate_token_ids(token_ids_BT: np.ndarray, spec: ModelSpec, positions: np.ndarray | None = None) -> None:
    """Raise DataError unless every id is a row of the embedding and every position is one that the model was made for.

    Without `positions` they are 0 .. T-1. A negative position marks padding and is legal; its id must still be a row.
    """
    if token_ids_BT.ndim != 2:
        raise DataError(
            f"token_ids_BT.shape = {token_ids_BT.shape}: expected [rows, positions], because sequences come in "
            "batches; try token_ids[None, :]"
        )
    if token_ids_BT.dtype.kind not in "iu":
        raise DataError(
            f"token_ids_BT.dtype = {token_ids_BT.dtype}: expected an integer type, because ids index the embedding; "
            "try .astype(np.int32)"
        )
    if token_ids_BT.size and not 0 <= int(token_ids_BT.min()) <= int(token_ids_BT.max()) < spec.vocab_size:
        row, column = np.argwhere((token_ids_BT < 0) | (token_ids_BT >= spec.vocab_size))[0]
        raise DataError(
            f"token_ids_BT[{row}, {column}] = {token_ids_BT[row, column]}: expected 0 to {spec.vocab_size - 1}, "
            f"because the vocabulary has {spec.vocab_size} rows; try the tokenizer that belongs to this model"
        )
    _validate_positions(token_ids_BT.shape, spec, positions)


def _validate_positions(shape: tuple[int, ...], spec: ModelSpec, positions: np.ndarray | None) -> None:
    if positions is None:
        if shape[1] > spec.max_positions:
            raise DataError(
                f"sequence length = {shape[1]}: expected at most {spec.max_positions}, because the spec's "
                f"max_positions is {spec.max_positions}; try a shorter sequence"
            )
        return
    if positions.shape != shape or positions.dtype.kind not in "iu":
        raise DataError(
            f"positions = {positions.dtype}{list(positions.shape)}: expected integers of shape {list(shape)}, because "
            "each token has one position; try np.broadcast_to(np.arange(T), (B, T))"
        )
    if positions.size and int(positions.max()) >= spec.max_positions:
        raise DataError(
            f"largest position = {int(positions.max())}: expected below {spec.max_positions}, because the spec's "
            f"max_positions is {spec.max_positions}; try a shorter sequence"
        )


def validate_generation(
    prompt_shape: tuple[int, ...],
    spec: ModelSpec,
    *,
    num_tokens: int,
    uniforms_shape: tuple[int, ...] | None,
    temperature: float,
) -> None:
    """Raise DataError unless the prompts, the new tokens and the uniforms [B, num_tokens] fit each other and the spec.

    The last token is returned without being fed back, so prompt + num_tokens - 1 positions are used.
    """
    rows, prompt = prompt_shape
    if prompt < 1 or num_tokens < 0:
        raise DataError(
            f"prompt length = {prompt}, num_tokens = {num_tokens}: expected at least 1 and 0, because the first new "
            "token follows the last of the prompt; try a prompt of the beginning-of-text token"
        )
    if prompt + num_tokens - 1 > spec.max_positions:
        raise DataError(
            f"prompt length + num_tokens - 1 = {prompt + num_tokens - 1}: expected at most {spec.max_positions}, "
            f"because the spec's max_positions is {spec.max_positions}; "
            f"try num_tokens={max(spec.max_positions - prompt + 1, 0)}"
        )
    if not temperature >= 0.0:
        raise DataError(f"temperature = {temperature}: expected >= 0, because logits are divided by it; try 0.0")
    if temperature > 0.0 and uniforms_shape is None:
        raise DataError(
            f"uniforms_BT = None with temperature = {temperature}: expected numbers in [0, 1), because nothing here "
            "draws random numbers; try temperature=0.0"
        )
    if uniforms_shape is not None and uniforms_shape != (rows, num_tokens):
        raise DataError(
            f"uniforms_BT.shape = {list(uniforms_shape)}: expected [{rows}, {num_tokens}], because each new token of "
            "each row takes one number; try uniforms of that shape"
        )
