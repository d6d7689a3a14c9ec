"""The models that rounding is measured on: one shape per pool, fresh values in every case, so cases are exchangeable.

Question 1 varies shapes; here every case of a pool must have the same law, or a mean over a run could not be held
against a mean over a calibration. There are two pools with streams of their own: `rich` (one layer, Qwen-like: biases,
q/k norm, window, YaRN, untied) and `capped` (two layers, Gemma-like: soft caps, tied). Scales are drawn (embeddings
from 10^-3.5 up to 10^1.5, so that the norm's epsilon matters in some), gains are far from one (a gain of one rounds
nothing), rows start at positions up to a thousand, and one row is packed.

Two more pools have the shapes that people train, for runs that name them (`--model`): `tiny`, and `qwen3-0.6b` with
two of its layers and a sixteenth of its vocabulary. Their sums are as long as real ones; the vocabulary is cut because a
case is drawn and differentiated in float64 on the CPU, and its length enters one sum only (the head's gradient to the
final norm).

A `Reordering` is the same model with rows, tokens, heads, widths and vocabulary renumbered: mathematically nothing
changes, but every sum over any of them is taken in another order. Half of what is legal is just that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from tessera_shared.numerics import Numerics
from tessera_shared.presets import PRESETS
from tessera_shared.reference.rounding import round_to
from tessera_shared.spec import ModelSpec, RopeSpec
from tessera_shared.tensors import tensor_table

ROWS, TOKENS, LONGEST = 4, 31, 1024
CASES_VERSION = 1
"""Stored in every calibration: bands measured on other cases say nothing about these."""

POOLS: dict[str, ModelSpec] = {
    "rich": ModelSpec(
        architecture="qwen3", vocab_size=101, num_layers=1, width=60, ffn_width=88, num_heads=4, num_kv_heads=2,
        head_width=16, max_positions=2 * LONGEST, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True,
        sliding_window=7, rope=RopeSpec(theta=500.0, scaling="yarn", factor=4.0, original_max_positions=64),
    ),
    "capped": ModelSpec(
        vocab_size=101, num_layers=2, width=72, ffn_width=104, num_heads=6, num_kv_heads=2, head_width=12,
        max_positions=2 * LONGEST, norm_eps=1e-5, tie_embeddings=True, attention_softcap=4.0, logit_softcap=9.0,
    ),
}  # fmt: skip

_QWEN = PRESETS["qwen3-0.6b"]
SHAPES: dict[str, ModelSpec] = {
    "tiny": PRESETS["tiny"],
    "qwen3-0.6b": replace(_QWEN, num_layers=2, vocab_size=_QWEN.vocab_size // 16, bos_token_id=None, eos_token_id=None),
}
"""Pools of real shapes, by the preset's name."""

ALL_POOLS: dict[str, ModelSpec] = POOLS | SHAPES

TAP_LETTERS: dict[str, str] = {
    "embed": "BTD", "attention.norm": "BTD", "attention.q": "BTNH", "attention.k": "BTKH", "attention.v": "BTKH",
    "attention.q_norm": "BTNH", "attention.k_norm": "BTKH", "attention.q_rope": "BTNH", "attention.k_rope": "BTKH",
    "attention.scores": "BNTS", "attention.probs": "BNTS", "attention.mix": "BTNH", "attention.out": "BTD",
    "residual": "BTD", "mlp.norm": "BTD", "mlp.gate": "BTF", "mlp.up": "BTF", "mlp.act": "BTF", "mlp.down": "BTD",
    "out": "BTD", "final_norm": "BTD", "logits": "BTV",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RoundingCase:
    """One model with everything already rounded to what the policy stores, so that only operations err."""

    spec: ModelSpec
    params: dict[str, np.ndarray]  # values of the compute dtype, as float64
    token_ids_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    cotangent_BTV: np.ndarray  # d loss / d logits, values of the logits dtype


def tensor_class(name: str) -> str:
    """Return a tap or parameter without its layer: `layers.3.attention.q` -> `attention.q`, `model.layers.0.mlp.x` ->
    `mlp.x`.
    """
    parts = name.removeprefix("model.").split(".")
    return ".".join(parts[2:] if parts[0] == "layers" else parts)


def tap_dtype(name: str, numerics: Numerics) -> str:
    """Return the dtype that the policy gives a tapped value."""
    special = {"attention.scores": numerics.softmax, "logits": numerics.logits}
    return special.get(tensor_class(name), numerics.compute)


def held_wide(stream: str) -> bool:
    """Return whether a stream's tensor (`rich/grad attention.scores`) stays in a policy's wider dtype."""
    return stream.rpartition("/")[2].removeprefix("grad ") in ("attention.scores", "logits")


def case_rng(seed: int, pool: str, index: int) -> np.random.Generator:
    """Return the generator of one case of a run: replayable, and unlike that of any other run, pool or index."""
    return np.random.default_rng([seed, index, *pool.encode()])


def rounding_case(spec: ModelSpec, numerics: Numerics, rng: np.random.Generator) -> RoundingCase:
    """Draw one model's weights and batch."""
    params = {name: round_to(value, numerics.compute) for name, value in _draw_params(spec, rng).items()}
    shape = (ROWS, TOKENS)
    starts = np.concatenate([[0], rng.integers(1, LONGEST, ROWS - 1)])
    positions_BT = (starts[:, None] + np.arange(TOKENS)[None, :]).astype(np.int32)
    segments_BT = np.zeros(shape, np.int32)
    cut = int(rng.integers(3, TOKENS - 3))  # row 0 holds two documents
    positions_BT[0, cut:] = np.arange(TOKENS - cut)
    segments_BT[0, cut:] = 1
    cotangent = rng.standard_normal((*shape, spec.vocab_size)) * 10.0 ** rng.uniform(-2.0, 0.0)
    return RoundingCase(
        spec=spec, params=params, token_ids_BT=rng.integers(0, spec.vocab_size, shape).astype(np.int32),
        positions_BT=positions_BT, segments_BT=segments_BT, cotangent_BTV=round_to(cotangent, numerics.logits),
    )  # fmt: skip


def _draw_params(spec: ModelSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    params = {}
    for name, info in tensor_table(spec).items():
        if info.init == "ones":
            params[name] = np.exp(0.4 * rng.standard_normal(info.shape))
        elif info.init == "zeros":
            params[name] = 0.3 * rng.standard_normal(info.shape)
        elif info.letters == "VD":
            largest = -0.5 if spec.tie_embeddings else 1.5  # tied: larger logits would sit on the flat ends of the cap
            params[name] = rng.standard_normal(info.shape) * 10.0 ** rng.uniform(-3.5, largest)
        else:
            params[name] = rng.standard_normal(info.shape) * 2.0 ** rng.uniform(-1.0, 1.0) / np.sqrt(info.shape[-1])
    return params


class Reordering:
    """Renumber every axis of a case that a sum runs over, and carry tensors there and back. H is kept: it is pairs."""

    def __init__(self, spec: ModelSpec, rng: np.random.Generator) -> None:
        kv_heads = rng.permutation(spec.num_kv_heads)
        within = [rng.permutation(spec.group_size) for _ in range(spec.num_kv_heads)]
        heads = np.concatenate([kv * spec.group_size + within[kv] for kv in kv_heads])
        tokens = rng.permutation(TOKENS)
        self._order = {
            "B": rng.permutation(ROWS), "T": tokens, "S": tokens, "D": rng.permutation(spec.width),
            "F": rng.permutation(spec.ffn_width), "N": heads, "K": kv_heads, "V": rng.permutation(spec.vocab_size),
        }  # fmt: skip
        self._sizes = {letter: len(order) for letter, order in self._order.items()} | {"H": spec.head_width}
        self._letters = {name: info.letters for name, info in tensor_table(spec).items()}

    def case(self, case: RoundingCase) -> RoundingCase:
        """Return the renumbered case."""
        new_id = np.argsort(self._order["V"]).astype(np.int32)
        return replace(
            case,
            params={name: self._move(value, self._letters[name], back=False) for name, value in case.params.items()},
            token_ids_BT=new_id[self._move(case.token_ids_BT, "BT", back=False)],
            positions_BT=self._move(case.positions_BT, "BT", back=False),
            segments_BT=self._move(case.segments_BT, "BT", back=False),
            cotangent_BTV=self._move(case.cotangent_BTV, "BTV", back=False),
        )

    def taps(self, values: Mapping[str, np.ndarray], *, back: bool = False) -> dict[str, np.ndarray]:
        """Return tapped values renumbered, or brought back."""
        return {name: self._move(value, TAP_LETTERS[tensor_class(name)], back=back) for name, value in values.items()}

    def params(self, values: Mapping[str, np.ndarray], *, back: bool = False) -> dict[str, np.ndarray]:
        """Return parameters or their gradients renumbered, or brought back."""
        return {name: self._move(value, self._letters[name], back=back) for name, value in values.items()}

    def _move(self, value: np.ndarray, letters: str, *, back: bool) -> np.ndarray:
        out = value.reshape([self._sizes[letter] for letter in letters])
        for axis, letter in enumerate(letters):
            if letter in self._order:
                order = self._order[letter]
                out = np.take(out, np.argsort(order) if back else order, axis=axis)
        return out.reshape(value.shape)
