"""The decoder: embedding, blocks, final norm, unembedding."""

import numpy as np

from tessera_shared.errors import SpecError
from tessera_shared.numerics import Numerics
from tessera_shared.reference.attention import attention_block, attention_mask
from tessera_shared.reference.mlp import mlp_block
from tessera_shared.reference.norms import rms_norm
from tessera_shared.reference.params import Params, Remember, Tap, compute_params
from tessera_shared.reference.rope import rope_tables
from tessera_shared.reference.rounding import round_to
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import EMBEDDING, FINAL_NORM, UNEMBEDDING


def embed(token_ids_BT: np.ndarray, table_VD: np.ndarray) -> np.ndarray:
    """Return the table's row of every token."""
    return np.asarray(table_VD[token_ids_BT])


def unembed(x_BTD: np.ndarray, table_VD: np.ndarray, *, softcap: float | None, numerics: Numerics) -> np.ndarray:
    """Return logits x E^T, then softcap * tanh(logits / softcap) when given, in the logits dtype."""
    logits_BTV = x_BTD @ table_VD.T
    if softcap is not None:
        logits_BTV = softcap * np.tanh(logits_BTV / softcap)
    return round_to(logits_BTV, numerics.logits)


def block(
    params: Params,
    x_BTD: np.ndarray,
    cos_BTH: np.ndarray,
    sin_BTH: np.ndarray,
    mask_BTS: np.ndarray,
    *,
    layer: int,
    spec: ModelSpec,
    numerics: Numerics,
    remember: Remember | None = None,
    tap: Tap | None = None,
) -> np.ndarray:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""
    mixed = attention_block(
        params, x_BTD, cos_BTH, sin_BTH, mask_BTS, layer=layer, spec=spec, numerics=numerics, remember=remember, tap=tap
    )
    x_BTD = _see(tap, f"layers.{layer}.residual", round_to(x_BTD + mixed, numerics.compute))
    fed = mlp_block(params, x_BTD, layer=layer, spec=spec, numerics=numerics, tap=tap)
    return _see(tap, f"layers.{layer}.out", round_to(x_BTD + fed, numerics.compute))


def hidden_states(
    params: Params,
    token_ids_BT: np.ndarray,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    positions_BT: np.ndarray | None = None,
    segments_BT: np.ndarray | None = None,
    tap: Tap | None = None,
    recompute: bool = False,
) -> np.ndarray:
    """Return the activations after the final norm. Positions default to 0 .. T-1, segments to 0.

    `recompute` changes nothing here. Raises SpecError when it meets a tap, as the halves do.
    """
    if recompute and tap is not None:
        raise SpecError(
            "recompute = True with a tap: expected one of them, because a recomputed block would be tapped twice; "
            "try recompute=False"
        )
    params = compute_params(params, numerics=numerics)
    positions_BT = (
        np.arange(token_ids_BT.shape[1])[None, :] + 0 * token_ids_BT if positions_BT is None else positions_BT
    )
    segments_BT = 0 * token_ids_BT if segments_BT is None else segments_BT
    cos_BTH, sin_BTH = rope_tables(positions_BT, spec=spec, numerics=numerics)
    x_BTD = _see(tap, "embed", embed(token_ids_BT, params[EMBEDDING]))
    for layer in range(spec.num_layers):
        window = spec.window_of(layer)
        mask_BTS = attention_mask(positions_BT, positions_BT, segments_BT, segments_BT, window=window)
        x_BTD = block(params, x_BTD, cos_BTH, sin_BTH, mask_BTS, layer=layer, spec=spec, numerics=numerics, tap=tap)
    return _see(tap, "final_norm", rms_norm(x_BTD, params[FINAL_NORM], eps=spec.norm_eps, numerics=numerics))


def forward(
    params: Params,
    token_ids_BT: np.ndarray,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    positions_BT: np.ndarray | None = None,
    segments_BT: np.ndarray | None = None,
    tap: Tap | None = None,
    recompute: bool = False,
) -> np.ndarray:
    """Return the logits of every position in the logits dtype. See `hidden_states`."""
    params = compute_params(params, numerics=numerics)
    x_BTD = hidden_states(
        params,
        token_ids_BT,
        spec=spec,
        numerics=numerics,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        tap=tap,
        recompute=recompute,
    )
    table_VD = params[EMBEDDING if spec.tie_embeddings else UNEMBEDDING]
    return _see(tap, "logits", unembed(x_BTD, table_VD, softcap=spec.logit_softcap, numerics=numerics))


def _see(tap: Tap | None, name: str, value: np.ndarray) -> np.ndarray:
    return value if tap is None else tap(name, value)
