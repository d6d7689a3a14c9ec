"""Named model shapes. `nano` for tests, `tiny` the student, `small` the teacher, and real shapes for measurements."""

from tessera_shared.errors import SpecError
from tessera_shared.spec import ModelSpec, RopeSpec

PRESETS: dict[str, ModelSpec] = {
    "nano": ModelSpec(
        vocab_size=512, num_layers=2, width=64, ffn_width=176, num_heads=4, num_kv_heads=2, head_width=16,
        max_positions=1024, tie_embeddings=True,
    ),
    "tiny": ModelSpec(
        vocab_size=8192, num_layers=5, width=256, ffn_width=704, num_heads=4, num_kv_heads=2, head_width=64,
        max_positions=2048, tie_embeddings=True,
    ),
    "small": ModelSpec(
        vocab_size=8192, num_layers=12, width=512, ffn_width=1408, num_heads=8, num_kv_heads=4, head_width=64,
        max_positions=2048, tie_embeddings=True,
    ),
    "llama-1b": ModelSpec(
        vocab_size=128256, num_layers=16, width=2048, ffn_width=8192, num_heads=32, num_kv_heads=8, head_width=64,
        max_positions=131072, norm_eps=1e-5, tie_embeddings=True, bos_token_id=128000, eos_token_id=128001,
        rope=RopeSpec(theta=500000.0, scaling="llama3", factor=32.0, original_max_positions=8192),
    ),
    "llama-8b": ModelSpec(
        vocab_size=128256, num_layers=32, width=4096, ffn_width=14336, num_heads=32, num_kv_heads=8, head_width=128,
        max_positions=131072, norm_eps=1e-5, bos_token_id=128000, eos_token_id=128001,
        rope=RopeSpec(theta=500000.0, scaling="llama3", factor=8.0, original_max_positions=8192),
    ),
    "qwen3-0.6b": ModelSpec(
        architecture="qwen3", vocab_size=151936, num_layers=28, width=1024, ffn_width=3072, num_heads=16,
        num_kv_heads=8, head_width=128, max_positions=40960, qk_norm=True, tie_embeddings=True,
        rope=RopeSpec(theta=1000000.0), bos_token_id=151643, eos_token_id=151645,
    ),
}  # fmt: skip


def preset(name: str) -> ModelSpec:
    """Return the preset called `name`."""
    if name not in PRESETS:
        raise SpecError(
            f"preset = {name!r}: expected one of {', '.join(PRESETS)}, because these are the shapes with names; try 'nano'"
        )
    return PRESETS[name]
