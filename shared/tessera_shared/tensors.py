"""The tensor table: for every weight its name, shape, initializer, decay and shard axis.

Names are Hugging Face's, layout is `(out, in)` in both frameworks and on disk, so nothing is ever transposed. Init,
loading, decay masks, sharding, quantization and checkpoints all derive from this one table.
"""

from dataclasses import dataclass

from tessera_shared.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
UNEMBEDDING = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One weight of the model."""

    name: str  # Hugging Face's name, the only name it has
    letters: str  # shape letters; fused axes are written with both: "ND" rows are N*H
    shape: tuple[int, ...]  # (out, in) for matrices
    init: str  # "normal" (standard deviation spec.init_std) | "ones" | "zeros"
    decay: bool  # does AdamW's weight decay apply? matrices yes; gains and biases no
    shard_axis: int = 0  # the axis that ranks divide


def layer_prefix(layer: int) -> str:
    """Return the prefix of a layer's weights: `model.layers.3.`."""
    return f"model.layers.{layer}."


def tensor_table(spec: ModelSpec) -> dict[str, TensorInfo]:
    """Return every weight of `spec` by name, in the order in which the forward pass meets them."""
    rows = [_matrix(EMBEDDING, "VD", (spec.vocab_size, spec.width))]
    for layer in range(spec.num_layers):
        rows += _layer_rows(spec, layer_prefix(layer))
    rows.append(_gain(FINAL_NORM, "D", spec.width))
    if not spec.tie_embeddings:
        rows.append(_matrix(UNEMBEDDING, "VD", (spec.vocab_size, spec.width)))
    return {row.name: row for row in rows}


def num_parameters(spec: ModelSpec) -> int:
    """Return the number of stored numbers (a tied unembedding counts once)."""
    total = 0
    for info in tensor_table(spec).values():
        size = 1
        for length in info.shape:
            size *= length
        total += size
    return total


def projection_names(spec: ModelSpec) -> list[str]:
    """Return the weights of every layer's seven projections, in the table's order: what formats of few bits replace."""
    tables = (EMBEDDING, UNEMBEDDING)
    return [name for name, info in tensor_table(spec).items() if len(info.shape) == 2 and name not in tables]


def _layer_rows(spec: ModelSpec, prefix: str) -> list[TensorInfo]:
    query_rows, kv_rows = spec.num_heads * spec.head_width, spec.num_kv_heads * spec.head_width
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    rows = [_gain(prefix + "input_layernorm.weight", "D", spec.width)]
    for name, letters, size in (("q_proj", "NH", query_rows), ("k_proj", "KH", kv_rows), ("v_proj", "KH", kv_rows)):
        rows.append(_matrix(f"{attention}{name}.weight", letters + "D", (size, spec.width)))
        if spec.qkv_bias:
            rows.append(_bias(f"{attention}{name}.bias", letters, size))
    if spec.qk_norm:
        rows.append(_gain(attention + "q_norm.weight", "H", spec.head_width))
        rows.append(_gain(attention + "k_norm.weight", "H", spec.head_width))
    rows.append(_matrix(attention + "o_proj.weight", "DNH", (spec.width, query_rows)))
    if spec.output_bias:
        rows.append(_bias(attention + "o_proj.bias", "D", spec.width))
    rows.append(_gain(prefix + "post_attention_layernorm.weight", "D", spec.width))
    for name, letters, shape in (
        ("gate_proj", "FD", (spec.ffn_width, spec.width)),
        ("up_proj", "FD", (spec.ffn_width, spec.width)),
        ("down_proj", "DF", (spec.width, spec.ffn_width)),
    ):
        rows.append(_matrix(f"{mlp}{name}.weight", letters, shape))
        if spec.mlp_bias:
            rows.append(_bias(f"{mlp}{name}.bias", letters[0], shape[0]))
    return rows


def _matrix(name: str, letters: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name=name, letters=letters, shape=shape, init="normal", decay=True)


def _gain(name: str, letters: str, size: int) -> TensorInfo:
    return TensorInfo(name=name, letters=letters, shape=(size,), init="ones", decay=False)


def _bias(name: str, letters: str, size: int) -> TensorInfo:
    return TensorInfo(name=name, letters=letters, shape=(size,), init="zeros", decay=False)
