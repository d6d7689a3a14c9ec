"""Probes of single operations: norms, linear, rope, attention, feed-forward, embedding."""

from collections.abc import Iterator

import numpy as np

from tessera_parity.mutants.battery import SIZES, Probe, calling
from tessera_shared.dims import shape_of
from tessera_shared.numerics import FLOAT64
from tessera_shared.spec import ModelSpec, RopeSpec

ROPES = {
    "plain": RopeSpec(theta=10000.0),
    "linear": RopeSpec(theta=500.0, scaling="linear", factor=3.0),
    "llama3": RopeSpec(theta=10.0, scaling="llama3", factor=8.0, original_max_positions=64),
    "yarn": RopeSpec(theta=10.0, scaling="yarn", factor=4.0, original_max_positions=64),
}


def drawn(rng: np.random.Generator, name: str, scale: float = 1.0) -> np.ndarray:
    """Return normal values of the shape that the name promises under `SIZES`."""
    return rng.standard_normal(shape_of(name, SIZES)) * scale


def op_probes(seed: int) -> Iterator[Probe]:
    """Yield the probes in forward order, so that a shared building block is named before what is built on it."""
    rng = np.random.default_rng((seed, 1))
    yield from _linear_and_norm(rng)
    yield from _rope(rng)
    yield from _attention(rng)
    yield from _rest(rng)


def _linear_and_norm(rng: np.random.Generator) -> Iterator[Probe]:
    x_BTD, weight_FD, bias_F = drawn(rng, "x_BTD"), drawn(rng, "weight_FD"), drawn(rng, "bias_F")
    yield Probe(subject="ops", op="linear", observe=calling("model.linear", "linear", x_BTD, weight_FD))
    yield Probe(subject="ops", op="linear", observe=calling("model.linear", "linear", x_BTD, weight_FD, bias_F))
    gain_D = 1.0 + drawn(rng, "gain_D", 0.3)
    rows = {"unit": x_BTD, "tiny": x_BTD * 1e-4, "large": x_BTD * 1e2, "offset": x_BTD + 1e3}
    for value in rows.values():
        observe = calling("model.norms", "rms_norm", value, gain_D, eps=1e-5, numerics=FLOAT64)
        yield Probe(subject="ops", op="rms_norm", observe=observe)


def _rope(rng: np.random.Generator) -> Iterator[Probe]:
    positions_BT = np.array([[0, 1, 2, 3, 500, 1023], [7, 8, 63, 64, 65, 4]], np.int32)
    for rope in ROPES.values():
        spec = ModelSpec(
            vocab_size=5, num_layers=1, width=12, ffn_width=10, num_heads=4, num_kv_heads=2, head_width=12,
            max_positions=2048, rope=rope,
        )  # fmt: skip
        observe = calling("model.rope", "rope_tables", positions_BT, spec=spec, numerics=FLOAT64)
        yield Probe(subject="ops", op="rope_tables", observe=observe)
    x_BTNH, angle_BTH = drawn(rng, "x_BTNH"), drawn(rng, "angle_BTH")
    observe = calling("model.rope", "apply_rope", x_BTNH, np.cos(angle_BTH), np.sin(angle_BTH))
    yield Probe(subject="ops", op="apply_rope", observe=observe)


def _attention(rng: np.random.Generator) -> Iterator[Probe]:
    key_positions_BS = np.array([[0, 1, 2, 3, 4, -1], [0, 1, 2, 0, 1, 2]], np.int32)
    key_segments_BS = np.array([[0, 0, 0, 0, -1, -1], [0, 0, 0, 1, 1, 1]], np.int32)
    for window in (None, 1, 2, 3):
        places = (key_positions_BS, key_positions_BS, key_segments_BS, key_segments_BS)
        observe = calling("model.attention", "attention_mask", *places, window=window)
        yield Probe(subject="ops", op="attention_mask", observe=observe)
    empty_BS = np.full_like(key_positions_BS, -1)
    observe = calling(
        "model.attention", "attention_mask", key_positions_BS, empty_BS, 0 * empty_BS, 0 * empty_BS, window=None
    )
    yield Probe(subject="ops", op="attention_mask", observe=observe)
    q_BTNH, k_BSKH, v_BSKH = drawn(rng, "q_BTNH"), drawn(rng, "k_BSKH"), drawn(rng, "v_BSKH")
    for softcap in (None, 2.5):
        observe = calling("model.attention", "attention_scores", q_BTNH, k_BSKH, softcap=softcap, numerics=FLOAT64)
        yield Probe(subject="ops", op="attention.scores", observe=observe)
    scores_BNTS = drawn(rng, "scores_BNTS", 3.0)
    mask_BTS = np.tril(np.ones(SIZES["T"], bool)[None] * np.ones((2, 6, 6), bool))
    mask_BTS[0, 3] = False
    mask_BTS[1, :, 0] = False
    for scores in (scores_BNTS, scores_BNTS * 300.0 + 500.0):
        observe = calling("model.attention", "attention_probs", scores, mask_BTS, numerics=FLOAT64)
        yield Probe(subject="ops", op="attention.probs", observe=observe)
    probs_BNTS = np.abs(drawn(rng, "probs_BNTS"))
    observe = calling("model.attention", "attention_mix", probs_BNTS / probs_BNTS.sum(-1, keepdims=True), v_BSKH)
    yield Probe(subject="ops", op="attention.mix", observe=observe)


def _rest(rng: np.random.Generator) -> Iterator[Probe]:
    for scale in (1.0, 30.0):
        observe = calling("model.mlp", "swiglu", drawn(rng, "gate_BTF", scale), drawn(rng, "up_BTF"), numerics=FLOAT64)
        yield Probe(subject="ops", op="mlp.act", observe=observe)
    token_ids_BT = rng.integers(0, SIZES["V"], (SIZES["B"], SIZES["T"])).astype(np.int32)
    table_VD = drawn(rng, "table_VD")
    yield Probe(subject="ops", op="embed", observe=calling("model.transformer", "embed", token_ids_BT, table_VD))
    for softcap in (None, 4.0):
        observe = calling(
            "model.transformer", "unembed", drawn(rng, "x_BTD"), table_VD, softcap=softcap, numerics=FLOAT64
        )
        yield Probe(subject="ops", op="logits", observe=observe)
