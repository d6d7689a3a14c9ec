"""When may two correct decoders choose different tokens? Only where rounding can decide: the near-tie rule.

A flip is *explained* when, in float64 on the same prefix, the two choices are closer than the rounding of a whole
forward pass in the working dtype: for greedy choice in their logits, for sampling in how far the uniform lies from
either token's interval. Anything else is a divergence.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Logits = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def greedy_gap(logits_V: Logits, left: int, right: int) -> float:
    """Return how far below the best logit the worse of the two choices lies: both must be near the top to be
    explained."""
    return float(logits_V.max() - min(logits_V[left], logits_V[right]))


def sampled_gap(logits_V: Logits, uniform: float, left: int, right: int, *, how: Sampling, logit_error: float) -> float:
    """Return how far, in cumulative probability, the uniform lies outside the intervals that rounding can give the two
    tokens.

    Logits off by `logit_error` move every probability by a factor exp(+-2 error / temperature), may swap tokens whose
    logits are closer than twice the error, and may move the cuts of top-k, top-p and min-p; the interval of a token is
    its widest over these. 0 means explained.
    """
    return max(_outside(logits_V, uniform, token, how, logit_error) for token in (left, right))


def _outside(logits_V: Logits, uniform: float, token: int, how: Sampling, error: float) -> float:
    below = logits_V > logits_V[token] + 2.0 * error  # surely sorted before the token
    level = np.abs(logits_V - logits_V[token]) <= 2.0 * error  # itself and what may change places with it
    weights = np.exp((logits_V - logits_V.max()) / how.temperature)
    probs = weights / weights.sum()
    widen = float(np.expm1(4.0 * error / how.temperature))  # relative error of a ratio of two sums of exponentials
    largest = _kept_mass(logits_V, probs, how, +error)
    smallest = _kept_mass(logits_V, probs, how, -error)
    low = float(probs[below].sum()) / largest * (1.0 - widen)
    high = float(probs[below | level].sum()) / smallest * (1.0 + widen)
    return max(0.0, low - uniform, uniform - high)


def _kept_mass(logits_V: Logits, probs: Logits, how: Sampling, error: float) -> float:
    """Return the mass that the filters keep when every cut is decided generously (error > 0) or strictly (error < 0).

    Top-k keeps k tokens whatever happens: a near-tie at its edge swaps two of nearly equal mass.
    """
    sorted_probs = probs[np.argsort(-logits_V, kind="stable")]
    kept = np.arange(len(sorted_probs)) < (how.top_k or len(sorted_probs))
    slack = 4.0 * error / how.temperature
    if how.top_p < 1.0:
        top_p = how.top_p * (1.0 + slack) * float(sorted_probs[kept].sum())
        kept &= np.concatenate([[0.0], np.cumsum(sorted_probs)[:-1]]) < top_p
    if how.min_p > 0.0:
        kept &= sorted_probs >= how.min_p * sorted_probs[0] * (1.0 - slack)
    kept[0] = True
    return float(sorted_probs[kept].sum())
