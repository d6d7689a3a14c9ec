"""The decoder: embedding, blocks, final norm, unembedding."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tessera_shared.errors import SpecError
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import EMBEDDING, FINAL_NORM, UNEMBEDDING
from tessera_torch.model.attention import attention_block, attention_mask
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.mlp import mlp_block
from tessera_torch.model.norms import rms_norm
from tessera_torch.model.params import Params, Remember, Tap, compute_params
from tessera_torch.model.rope import rope_tables


def embed(token_ids_BT: Tensor, table_VD: Tensor) -> Tensor:
    """Return the table's row of every token."""
    return functional.embedding(token_ids_BT, table_VD)


def unembed(x_BTD: Tensor, table_VD: Tensor, *, softcap: float | None, numerics: Numerics) -> Tensor:
    """Return x E^T, then softcap * tanh(logits / softcap) when given; operands are lifted to the logits dtype."""
    up = dtype_of(numerics.logits)
    logits_BTV = functional.linear(x_BTD.to(up), table_VD.to(up))
    return logits_BTV if softcap is None else softcap * torch.tanh(logits_BTV / softcap)


def block(
    params: Params,
    x_BTD: Tensor,
    cos_BTH: Tensor,
    sin_BTH: Tensor,
    mask_BTS: Tensor,
    *,
    layer: int,
    spec: ModelSpec,
    numerics: Numerics,
    remember: Remember | None = None,
    tap: Tap | None = None,
) -> Tensor:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""
    mixed_BTD = attention_block(
        params, x_BTD, cos_BTH, sin_BTH, mask_BTS, layer=layer, spec=spec, numerics=numerics, remember=remember, tap=tap
    )
    x_BTD = _see(tap, f"layers.{layer}.residual", x_BTD + mixed_BTD)
    fed_BTD = mlp_block(params, x_BTD, layer=layer, spec=spec, numerics=numerics, tap=tap)
    return _see(tap, f"layers.{layer}.out", x_BTD + fed_BTD)


def hidden_states(
    params: Params,
    token_ids_BT: Tensor,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    positions_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    tap: Tap | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return the activations after the final norm. Positions default to 0 .. T-1, segments to 0.

    `recompute` keeps only each block's input for the backward pass and computes the rest again (Chen et al. 2016, arXiv
    1604.06174). Raises SpecError when it meets a tap, which would see every value twice. Ids are not checked here: see
    `tessera_shared.validate`.
    """
    if recompute and tap is not None:
        raise SpecError(
            "recompute = True with a tap: expected one of them, because a recomputed block would be tapped twice; "
            "try recompute=False"
        )
    params = compute_params(params, numerics=numerics)
    if positions_BT is None:
        positions_BT = torch.arange(token_ids_BT.shape[1], dtype=torch.int32, device=token_ids_BT.device)
        positions_BT = positions_BT.expand(token_ids_BT.shape)
    if segments_BT is None:
        segments_BT = torch.zeros_like(positions_BT)
    masks = {
        window: attention_mask(positions_BT, positions_BT, segments_BT, segments_BT, window=window)
        for window in dict.fromkeys(spec.window_of(layer) for layer in range(spec.num_layers))
    }
    cos_BTH, sin_BTH = rope_tables(positions_BT, spec=spec, numerics=numerics)
    x_BTD = _see(tap, "embed", embed(token_ids_BT, params[EMBEDDING]))
    for layer in range(spec.num_layers):
        step = partial(block, params, layer=layer, spec=spec, numerics=numerics, tap=tap)
        mask_BTS = masks[spec.window_of(layer)]
        if recompute:
            x_BTD = checkpoint(step, x_BTD, cos_BTH, sin_BTH, mask_BTS, use_reentrant=False)
        else:
            x_BTD = step(x_BTD, cos_BTH, sin_BTH, mask_BTS)
    return _see(tap, "final_norm", rms_norm(x_BTD, params[FINAL_NORM], eps=spec.norm_eps, numerics=numerics))


def forward(
    params: Params,
    token_ids_BT: Tensor,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    positions_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    tap: Tap | None = None,
    recompute: bool = False,
) -> Tensor:
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


def _see(tap: Tap | None, name: str, value: Tensor) -> Tensor:
    return value if tap is None else tap(name, value)
