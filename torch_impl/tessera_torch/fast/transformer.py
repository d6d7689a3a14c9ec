"""The decoder's forward pass built of kernels: the residual add is part of the next norm, heads never move in memory.

The same mathematics as `tessera_torch.model.transformer`; where it rounds differs, as the kernels' docstrings say.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import EMBEDDING, FINAL_NORM, UNEMBEDDING, layer_prefix
from tessera_torch.fast.layout import Layout, dense_layout, layout_of
from tessera_torch.fast.projections import Project, projections
from tessera_torch.kernels import Ops
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.params import Params, compute_params
from tessera_torch.model.rope import rope_tables
from tessera_torch.model.transformer import embed

Norm = Callable[[Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]
"""See `norm_of`."""


def unembedding(params: Params, spec: ModelSpec) -> Tensor:
    """Return the table that logits are products with, `[V, D]`."""
    return params[EMBEDDING if spec.tie_embeddings else UNEMBEDDING]


def logits(params: Params, hidden_BTD: Tensor, *, spec: ModelSpec, numerics: Numerics) -> Tensor:
    """Return logits in the logits dtype. On a GPU half-precision operands are not lifted: their products are exact in
    float32, in which they are summed."""
    table_VD, up = unembedding(params, spec), dtype_of(numerics.logits)
    if hidden_BTD.is_cuda and up is torch.float32 and hidden_BTD.dtype in (torch.bfloat16, torch.float16):
        flat_XV = torch.mm(hidden_BTD.flatten(0, -2), table_VD.T, out_dtype=torch.float32)
        logits_BTV = flat_XV.view(*hidden_BTD.shape[:-1], -1)
    else:
        logits_BTV = torch.nn.functional.linear(hidden_BTD.to(up), table_VD.to(up))
    return (
        logits_BTV if spec.logit_softcap is None else spec.logit_softcap * torch.tanh(logits_BTV / spec.logit_softcap)
    )


def forward(
    params: Params,
    token_ids_BT: Tensor,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    ops: Ops,
    positions_BT: Tensor | None = None,
    segments_BT: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return the logits of every position; arguments as in `tessera_torch.model.transformer.forward`.

    With positions or segments given, waits for the device to read them.
    """
    params = compute_params(params, numerics=numerics)
    device, (rows, length) = token_ids_BT.device, token_ids_BT.shape
    layout = dense_layout(rows, length, device=device)
    if positions_BT is not None or segments_BT is not None:
        positions_BT = layout.positions_BT if positions_BT is None else positions_BT
        segments_BT = torch.zeros_like(positions_BT) if segments_BT is None else segments_BT
        layout = layout_of(positions_BT.cpu().numpy(), segments_BT.cpu().numpy(), device=device)
    hidden_BTD = hidden_states(params, token_ids_BT, layout, spec=spec, numerics=numerics, ops=ops, recompute=recompute)
    return logits(params, hidden_BTD, spec=spec, numerics=numerics)


def hidden_states(
    params: Params,
    token_ids_BT: Tensor,
    layout: Layout,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    ops: Ops,
    recompute: bool = False,
) -> Tensor:
    """Return the activations after the final norm, `[B, T, D]`, in the compute dtype; `params` are in it already.

    `recompute` keeps each block's input alone for the backward pass.
    """
    cos_BTH, sin_BTH = rope_tables(layout.positions_BT, spec=spec, numerics=numerics)
    normed, project = norm_of(spec, numerics, ops), projections(params)
    stream_BTD = embed(token_ids_BT, params[EMBEDDING])
    change_BTD: Tensor | None = None  # what the next norm adds to the residual stream
    for layer in range(spec.num_layers):
        step = partial(_block, params, layer=layer, layout=layout, spec=spec, ops=ops, normed=normed, project=project)
        if recompute:
            change_BTD, stream_BTD = checkpoint(step, change_BTD, stream_BTD, cos_BTH, sin_BTH, use_reentrant=False)
        else:
            change_BTD, stream_BTD = step(change_BTD, stream_BTD, cos_BTH, sin_BTH)
    return normed(change_BTD, stream_BTD, params[FINAL_NORM])[0]


def qkv(
    params: Params, x_BTD: Tensor, *, layer: int, spec: ModelSpec, normed: Norm, project: Project
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values `[B, T, N|K, H]` before the rotation."""
    prefix = layer_prefix(layer) + "self_attn."
    q, k, v = (_heads(y, spec.head_width) for y in project(x_BTD, *(f"{prefix}{which}_proj" for which in "qkv")))
    if spec.qk_norm:
        q, _ = normed(None, q, params[prefix + "q_norm.weight"])
        k, _ = normed(None, k, params[prefix + "k_norm.weight"])
    return q, k, v


def attention_out(mix_BTNH: Tensor, *, layer: int, project: Project) -> Tensor:
    """Return the output projection of the heads' mixes."""
    return project(mix_BTNH.flatten(-2), layer_prefix(layer) + "self_attn.o_proj")[0]


def mlp(x_BTD: Tensor, *, layer: int, ops: Ops, project: Project) -> Tensor:
    """Gate and up projections, SwiGLU and down projection of one layer, the norm before them left out."""
    prefix = layer_prefix(layer) + "mlp."
    gate_BTF, up_BTF = project(x_BTD, prefix + "gate_proj", prefix + "up_proj")
    return project(ops.swiglu(gate_BTF, up_BTF), prefix + "down_proj")[0]


def norm_of(spec: ModelSpec, numerics: Numerics, ops: Ops) -> Norm:
    """Return (change or None, stream, gain) -> (normed sum, sum): the residual add and the norm in one kernel."""
    eps, after = spec.norm_eps, numerics.norm_gain_after_cast

    def normed(change: Tensor | None, stream: Tensor, gain_D: Tensor) -> tuple[Tensor, Tensor]:
        if change is None:
            return ops.rms_norm(stream, gain_D, eps=eps, gain_after_cast=after), stream
        y, total = ops.add_rms_norm(change, stream, gain_D, eps=eps, gain_after_cast=after)
        return y, total

    return normed


def _block(
    params: Params,
    change_BTD: Tensor | None,
    stream_BTD: Tensor,
    cos_BTH: Tensor,
    sin_BTH: Tensor,
    *,
    layer: int,
    layout: Layout,
    spec: ModelSpec,
    ops: Ops,
    normed: Norm,
    project: Project,
) -> tuple[Tensor, Tensor]:
    """One layer; what it would add to the stream comes back apart, for the next norm to add."""
    prefix = layer_prefix(layer)
    x_BTD, stream_BTD = normed(change_BTD, stream_BTD, params[prefix + "input_layernorm.weight"])
    q, k, v = qkv(params, x_BTD, layer=layer, spec=spec, normed=normed, project=project)
    q, k = ops.apply_rope_(q, k, cos_BTH, sin_BTH)
    mix_BTNH = _attend(q, k, v, layout, window=spec.window_of(layer), spec=spec, ops=ops)
    mixed_BTD = attention_out(mix_BTNH, layer=layer, project=project)
    x_BTD, stream_BTD = normed(mixed_BTD, stream_BTD, params[prefix + "post_attention_layernorm.weight"])
    return mlp(x_BTD, layer=layer, ops=ops, project=project), stream_BTD


def _attend(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, layout: Layout, *, window: int | None, spec: ModelSpec, ops: Ops
) -> Tensor:
    softcap = spec.attention_softcap
    if layout.starts is None:
        mix_BTNH: Tensor = ops.flash_attention(q_BTNH, k_BTKH, v_BTKH, window=window, softcap=softcap)[0]
        return mix_BTNH
    mix_XNH: Tensor = ops.flash_attention_varlen(
        q_BTNH.flatten(0, 1), k_BTKH.flatten(0, 1), v_BTKH.flatten(0, 1), layout.starts, layout.starts,
        longest_query=layout.longest, longest_key=layout.longest, window=window, softcap=softcap,
    )[0]  # fmt: skip
    return mix_XNH.view(q_BTNH.shape)


def _heads(y: Tensor, head_width: int) -> Tensor:
    return y.view(*y.shape[:-1], -1, head_width)
