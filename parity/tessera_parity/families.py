"""Generated configurations of the four families that Hugging Face and Tessera both describe.

Sizes come from a small pool, because JAX compiles each new shape; what varies freely is what families differ in:
biases, tying, windows, head widths, rope bases and scalings, epsilons.
"""

from typing import Any

import numpy as np

from tessera_shared.init import initial_weights
from tessera_shared.spec import ARCHITECTURES, ModelSpec, RopeSpec

_SIZES = (
    # width, ffn, heads, kv heads, head width; transformers wants a Llama's width to be a multiple of its heads
    (24, 40, 4, 2, 8),
    (18, 28, 3, 1, 6),
    (16, 48, 4, 4, 4),
    (12, 20, 6, 2, 10),
)


def family_spec(family: str, rng: np.random.Generator) -> ModelSpec:
    """Return a random small spec that `family`'s config.json can express."""
    if family not in ARCHITECTURES:
        raise ValueError(f"family = {family!r}: expected one of {', '.join(ARCHITECTURES)}")
    width, ffn_width, num_heads, num_kv_heads, head_width = _SIZES[rng.integers(len(_SIZES))]
    num_layers = int(rng.integers(1, 4))
    window = int(rng.integers(2, 9)) if family != "llama" and rng.random() < 0.6 else None
    biased = bool(rng.random() < 0.5)
    return ModelSpec(
        architecture=family,
        vocab_size=37,
        num_layers=num_layers,
        width=width,
        ffn_width=ffn_width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=head_width,
        max_positions=64,
        norm_eps=float(10.0 ** rng.uniform(-7, -4)),
        rope=_rope(rng),
        qkv_bias={"llama": biased, "mistral": False, "qwen2": True, "qwen3": biased}[family],
        output_bias=biased if family in ("llama", "qwen3") else False,
        mlp_bias=bool(rng.random() < 0.5) if family == "llama" else False,
        qk_norm=family == "qwen3",
        sliding_window=window,
        window_from_layer=int(rng.integers(0, num_layers)) if window and family.startswith("qwen") else 0,
        tie_embeddings=bool(rng.random() < 0.5),
    )


def _rope(rng: np.random.Generator) -> RopeSpec:
    theta = float(10.0 ** rng.uniform(1, 6))
    kind = ("none", "linear", "llama3", "yarn")[rng.integers(4)]
    factor = float(rng.uniform(1.5, 8.0))
    if kind == "none":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, scaling=kind, factor=factor)
    return RopeSpec(theta=theta, scaling=kind, factor=factor, original_max_positions=int(rng.integers(4, 33)))


def random_weights(spec: ModelSpec, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Return float64 weights whose biases and gains are not the trivial zeros and ones of an initialization."""
    arrays = initial_weights(spec, seed=int(rng.integers(2**31)), dtype="float64")
    return {name: value + 0.2 * rng.standard_normal(value.shape) for name, value in arrays.items()}
