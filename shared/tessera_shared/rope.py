"""Inverse frequencies of the rotary embedding, with the context-extension rules that Hugging Face's configs name.

Dimension pair j of a head of width H turns by `position * theta^(-2j/H)` (Su et al. 2021, arXiv 2104.09864, eq. 15).
The rules below change these frequencies as transformers' `modeling_rope_utils.py` does, but in float64.
"""

import math

import numpy as np

from tessera_shared.spec import ModelSpec, RopeSpec


def inverse_frequencies(spec: ModelSpec) -> tuple[np.ndarray, float]:
    """Return the float64 angles per position of each dimension pair, shape [H/2], and the factor on cosine and sine."""
    frequencies, attention_factor = frequency_list(spec)
    return np.array(frequencies, dtype=np.float64), attention_factor


def frequency_list(spec: ModelSpec) -> tuple[list[float], float]:
    """Return what `inverse_frequencies` returns as Python floats, which a compiler folds into constants."""
    rope, width = spec.rope, spec.head_width
    base = [1.0 / rope.theta ** (2 * pair / width) for pair in range(width // 2)]
    if rope.scaling == "linear":
        return [frequency / rope.factor for frequency in base], 1.0
    if rope.scaling == "llama3":
        return [_llama3(frequency, rope) for frequency in base], 1.0
    if rope.scaling == "yarn":
        return _yarn(base, rope, width), _yarn_attention_factor(rope)
    return base, 1.0


def _llama3(frequency: float, rope: RopeSpec) -> float:
    """Keep short wavelengths, divide long ones by the factor, blend between (Llama 3.1's `apply_scaling`)."""
    original = float(rope.original_max_positions or 1)
    wavelength = 2.0 * math.pi / frequency
    if wavelength < original / rope.high_freq_factor:
        return frequency
    if wavelength > original / rope.low_freq_factor:
        return frequency / rope.factor
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1.0 - smooth) * frequency / rope.factor + smooth * frequency


def _yarn(base: list[float], rope: RopeSpec, width: int) -> list[float]:
    """Interpolate pairs that turn less than beta_slow times, keep those above beta_fast (arXiv 2309.00071, 3.2)."""
    low, high = _correction_pair(rope.beta_fast, rope, width), _correction_pair(rope.beta_slow, rope, width)
    if rope.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, float(width - 1))
    if low == high:
        high += 0.001  # the published code's guard against a division by zero
    scaled = []
    for pair, frequency in enumerate(base):
        interpolated = min(max((pair - low) / (high - low), 0.0), 1.0)
        scaled.append(frequency / rope.factor * interpolated + frequency * (1.0 - interpolated))
    return scaled


def _correction_pair(rotations: float, rope: RopeSpec, width: int) -> float:
    """Return the (fractional) pair that makes this many turns within the original context."""
    original = float(rope.original_max_positions or 1)
    return width * math.log(original / (rotations * 2.0 * math.pi)) / (2.0 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
