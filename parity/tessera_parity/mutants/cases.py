"""The two models that every planted bug meets, and logits to lose on. Shapes are shared so that JAX compiles them
once."""

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_parity.mutants.battery import SIZES
from tessera_parity.shrink import seeded_params
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.spec import ModelSpec, RopeSpec

_PLAIN = ModelSpec(
    vocab_size=SIZES["V"], num_layers=SIZES["L"], width=SIZES["D"], ffn_width=SIZES["F"], num_heads=SIZES["N"],
    num_kv_heads=SIZES["K"], head_width=SIZES["H"], max_positions=2048, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
_RICH = ModelSpec(
    architecture="qwen3", vocab_size=SIZES["V"], num_layers=SIZES["L"], width=SIZES["D"], ffn_width=SIZES["F"],
    num_heads=SIZES["N"], num_kv_heads=SIZES["K"], head_width=SIZES["H"], max_positions=2048, norm_eps=1e-5,
    rope=RopeSpec(theta=500.0, scaling="yarn", factor=4.0, original_max_positions=64), qkv_bias=True, output_bias=True,
    qk_norm=True, sliding_window=3, window_from_layer=1, attention_softcap=3.0, logit_softcap=5.0,
)  # fmt: skip


def battery_cases(seed: int) -> list[ModelCase]:
    """Return a plain tied model on plain rows, and one with every feature on packed, padded, partly ignored rows."""
    rng = np.random.default_rng((seed, 3))
    shape = (SIZES["B"], SIZES["T"])
    token_ids_BT = rng.integers(0, SIZES["V"], shape).astype(np.int32)
    labels_BT = rng.integers(0, SIZES["V"], shape).astype(np.int32)
    labels_BT[0, 1] = labels_BT[1, 4] = IGNORE_INDEX
    positions_BT = np.tile(np.arange(SIZES["T"], dtype=np.int32), (SIZES["B"], 1))
    packed = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]], np.int32)
    segments = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, -1]], np.int32)
    labels_BT[1, 5] = IGNORE_INDEX  # padding
    return [
        ModelCase(
            spec=_PLAIN, params=seeded_params(_PLAIN, seed), token_ids_BT=token_ids_BT, labels_BT=labels_BT,
            positions_BT=positions_BT, segments_BT=np.zeros_like(positions_BT),
        ),
        ModelCase(
            spec=_RICH, params=seeded_params(_RICH, seed + 1), token_ids_BT=token_ids_BT, labels_BT=labels_BT,
            positions_BT=packed, segments_BT=segments,
        ),
    ]  # fmt: skip


def prepared_logits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return student and teacher logits (with ties) and labels, partly ignored."""
    rng = np.random.default_rng((seed, 4))
    shape = (SIZES["B"], SIZES["T"], SIZES["V"])
    student_BTV, teacher_BTV = 2.0 * rng.standard_normal(shape), np.round(2.0 * rng.standard_normal(shape)) / 2.0
    return student_BTV, teacher_BTV, battery_cases(seed)[0].labels_BT
