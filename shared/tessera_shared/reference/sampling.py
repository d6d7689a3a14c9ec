"""Choosing the next token: exact inverse of the cumulative distribution, uniforms given."""

import numpy as np


def greedy(logits_BV: np.ndarray) -> np.ndarray:
    """Return the likeliest token of each row, the lowest id on ties and the first NaN where there is one, as int32."""
    return np.asarray(np.argmax(logits_BV, axis=-1), np.int32)


def sample(
    logits_BV: np.ndarray, uniforms_B: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Return an int32 token per row: first by (logit down, id up) whose cumulative probability exceeds u * total.

    Kept are the first `top_k` (0 = all), then of these the smallest prefix that holds `top_p` of their mass (as Hugging
    Face and vLLM chain the two), then those with probability >= `min_p` times the largest. `temperature` 0 is greedy.
    """
    if temperature == 0.0:
        return greedy(logits_BV)
    ids = [
        _sample_row(row, float(uniform), temperature, top_k, top_p, min_p)
        for row, uniform in zip(np.asarray(logits_BV, np.float64), uniforms_B, strict=True)
    ]
    return np.array(ids, np.int32)


def _sample_row(
    logits_V: np.ndarray, uniform: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    order = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))
    weights = np.exp((logits_V[order] - logits_V[order[0]]) / temperature)
    probs = weights / weights.sum()
    probs = probs[:top_k] if top_k > 0 else probs
    kept = 0
    mass = 0.0
    for index, prob in enumerate(probs):
        full = (top_p < 1.0 and mass >= top_p * probs.sum()) or prob < min_p * probs[0]
        if full and index > 0:
            break
        mass += prob
        kept = index + 1
    cumulative = np.cumsum(probs[:kept])
    index = int(np.sum(cumulative <= uniform * cumulative[-1]))
    return order[min(index, kept - 1)]
