"""Every limit of `parity`, with its derivation. No test and no subject types a tolerance of its own.

**Question 1, float64.** One rounding changes a number by at most u = 2^-53 relative to itself; n of them in a row, in
any order of summation, by gamma_n = n u / (1 - n u) relative to the sum of the terms' magnitudes (Higham 2002,
*Accuracy and Stability of Numerical Algorithms*, lemma 3.1 and section 3.1). Two implementations that are both right
differ by at most 2 gamma_n. The project's unit of 1e-12 is therefore 2 gamma_n at n = 4503: a sum of 64 terms (2
gamma_64 = 1.4e-14) may be followed by a function of condition number 70 before one operation uses up its unit.
Generated inputs keep below that, and what cancels more than that is divided by the size of the cancelling terms instead
of the result (`cancellation_floor`). Longer sums widen the unit in proportion; operations in sequence add theirs (first
order), so depth multiplies.

**Bits.** Integers, names and files have the limit 0.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tessera_shared.numerics import UNIT_ROUNDOFF
from tessera_shared.spec import ModelSpec

UNIT = 1e-12
"""What one operation on float64 may differ by, relative to the tensor's largest magnitude (design, section 4)."""

EXACT = 0.0
"""Limit where only equality will do."""

SLACK = 10.0
"""A limit this many times above what is seen is reported as slack."""

OPS_PER_LAYER = 4
"""Reductions in sequence through one block: norm, scores, probabilities and mix count as one each (the projections
between them are part of their sums' lengths); the MLP's norm, its products and its down projection repeat the pattern
on the residual stream, whose errors add to and do not multiply the attention's."""


def gamma(num_roundings: int, dtype: str = "float64") -> float:
    """Return Higham's gamma_n = n u / (1 - n u): the largest relative error of n roundings in sequence."""
    u = UNIT_ROUNDOFF[dtype]
    if num_roundings * u >= 1.0:
        return math.inf
    return num_roundings * u / (1.0 - num_roundings * u)


def mathematics_limit(depth: int = 1, *, length: int = 1) -> float:
    """Return the limit of question 1 for `depth` operations in sequence whose longest sum has `length` terms.

    UNIT * depth * max(1, 2 gamma_length / UNIT): sums longer than 4503 terms use up the unit by themselves.
    """
    return UNIT * max(1, depth) * max(1.0, 2.0 * gamma(length) / UNIT)


def model_depth(spec: ModelSpec) -> int:
    """Return how many operations follow one another from token ids to logits."""
    return OPS_PER_LAYER * spec.num_layers + 2  # final norm and unembedding


def longest_sum(spec: ModelSpec, num_positions: int) -> int:
    """Return the most terms that any one sum of a forward pass has."""
    return max(spec.width, spec.ffn_width, spec.num_heads * spec.head_width, spec.vocab_size, num_positions)


def model_limit(spec: ModelSpec, *, num_positions: int) -> float:
    """Return the limit of question 1 for logits, or any tap, of a whole forward pass."""
    return mathematics_limit(model_depth(spec), length=longest_sum(spec, num_positions))


def gradient_limit(spec: ModelSpec, *, num_positions: int) -> float:
    """Return the limit for gradients of parameters: the way there and back is twice the depth, and sums over
    positions."""
    return mathematics_limit(2 * model_depth(spec), length=longest_sum(spec, num_positions) + num_positions)


def law_limit(spec: ModelSpec, *, num_positions: int) -> float:
    """Return the limit for one side against itself in float64: two passes over the same mathematics, gradients
    included."""
    return gradient_limit(spec, num_positions=num_positions)


def witness_limit(spec: ModelSpec, *, num_positions: int) -> float:
    """Return the limit for float64 logits against Hugging Face transformers in float64."""
    return model_limit(spec, num_positions=num_positions)


def optimizer_limit(steps: int) -> float:
    """Return the limit for parameters and moments after `steps` updates from the same gradients.

    Each update is one operation of a dozen roundings on every number; moments carry theirs over, damped, so errors add.
    """
    return mathematics_limit(steps)


def directional_limit(spec: ModelSpec, *, num_positions: int) -> float:
    """Return the limit for <gradient, direction> against the oracle's complex-step derivative: one more sum."""
    return gradient_limit(spec, num_positions=num_positions) + mathematics_limit(1)


def cancellation_floor(function: str, inputs: Mapping[str, Any]) -> float:
    """Return the magnitude of the terms that cancel inside one operation, to divide by when the result itself is
    smaller.

    `function` is the dotted path (`model.linear.linear`). Contractions: the sum of the terms' absolute values,
    gamma_n's own denominator. Divergences and cross-entropy: a difference of log-probabilities, each as large as the
    logits over the temperature or log V. Cosine distance: 1 minus a cosine.
    """
    name = function.rpartition(".")[2]
    if name in ("linear", "unembed"):
        x, weight = _first(inputs, "x_"), _first(inputs, "weight_", "table_")
        return float(np.max(np.abs(x) @ np.abs(weight).T, initial=0.0))
    if name == "attention_scores":
        return _scores_floor(inputs["q_BTNH"], inputs["k_BSKH"])
    if name == "attention_mix":
        return float(np.max(np.abs(inputs["v_BSKH"]), initial=0.0))
    if name == "apply_rope":
        return float(np.max(np.abs(inputs["x_BTNH"]), initial=0.0))
    if name == "hidden_cosine":
        return 1.0
    if function.startswith("distil.losses."):
        return log_probability_scale(inputs)
    return 0.0


def log_probability_scale(inputs: Mapping[str, Any]) -> float:
    """Return how large a log-probability can be: max |logits| / temperature + log V over the logits in `inputs`."""
    options = inputs.get("options")
    temperature = min(1.0, float(inputs.get("temperature") or getattr(options, "temperature", 1.0) or 1.0))
    logits = [value for name, value in inputs.items() if name.endswith("_BTV") and value is not None]
    return max(
        (float(np.max(np.abs(x), initial=0.0)) / temperature + math.log(x.shape[-1]) for x in logits), default=0.0
    )


def _scores_floor(q_BTNH: np.ndarray, k_BSKH: np.ndarray) -> float:
    largest_q = np.sqrt(np.max(np.sum(np.square(q_BTNH), axis=-1), initial=0.0))
    largest_k = np.sqrt(np.max(np.sum(np.square(k_BSKH), axis=-1), initial=0.0))
    return float(largest_q * largest_k / np.sqrt(q_BTNH.shape[-1]))


def _first(inputs: Mapping[str, Any], *prefixes: str) -> np.ndarray:
    return next(np.asarray(value) for name, value in inputs.items() if name.startswith(prefixes))


LAMBDA = 6.0
"""Higham and Mary 2019 (SIAM J. Sci. Comput. 41, theorem 2.4): n roundings of random sign stay below lambda sqrt(n) u
except with probability 2 exp(-lambda^2 / 2) = 3e-8 for each result."""


def token_budget(spec: ModelSpec, *, num_positions: int, dtype: str, logits: np.ndarray) -> float:
    """Return how far a logit may legally be from its float64 value in `dtype`: lambda sqrt(n) u max|logit|.

    n counts the roundings on the way to a logit: the operations in sequence times the longest sum.
    """
    roundings = model_depth(spec) * longest_sum(spec, num_positions)
    return LAMBDA * math.sqrt(roundings) * UNIT_ROUNDOFF[dtype] * float(np.max(np.abs(logits)))


CHANCE = 1e-3
"""Probability that a sample of the law it is held against fails its check by bad luck; a test's seed is fixed, so it
is red always or never."""


def chance_limit(results: int = 1) -> float:
    """Return how many standard deviations the largest of `results` nearly normal results stays below.

    sqrt(2 log(2 results / CHANCE)): Chernoff's bound of the normal tail, both sides, summed over the results.
    """
    return math.sqrt(2.0 * math.log(2.0 * results / CHANCE))


def distribution_limit(size: int) -> float:
    """Return how far `size` numbers' empirical distribution function stays from the true one, everywhere.

    sqrt(log(2 / CHANCE) / (2 size)): Massart 1990, *The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality*.
    """
    return math.sqrt(math.log(2.0 / CHANCE) / (2.0 * size))


def loss_gradient_floor(function: str, inputs: Mapping[str, Any], weight_BT: np.ndarray) -> float:
    """Return the size of the terms that cancel in a loss's gradient by logits or hidden states.

    d/dz of a divergence at temperature tau is a difference of probabilities times log-probabilities over tau, times the
    largest factor that the options put in front (tau^2). The cosine's gradient is a projection: what it removes is as
    large as |W| / |W h|, and everything is removed when D = 1.
    """
    weight = float(np.max(np.abs(weight_BT), initial=0.0))
    if function.rpartition(".")[2] in ("hidden_cosine", "hidden_mse"):
        student, projection = inputs["student_BTD"], inputs["projection_FD"]
        mapped = student if projection is None else student @ projection.T
        norms = np.sqrt(np.sum(np.square(mapped), axis=-1))
        smallest = float(np.min(norms, initial=math.inf, where=norms > 0.0))
        spread = 1.0 if projection is None else float(np.max(np.sum(np.abs(projection), axis=0)))
        largest = float(max(np.max(np.abs(student), initial=0.0), spread))
        return weight * largest / smallest if function.endswith("cosine") and math.isfinite(smallest) else 0.0
    options = inputs.get("options") or getattr(inputs.get("objective"), "distil", None)
    tau = float(inputs["temperature"] if "temperature" in inputs else getattr(options, "temperature", 1.0))
    return weight * log_probability_scale(inputs) * max(tau, 1.0 / tau)


def trajectory_limit(steps: int) -> float:
    """Return the limit for float64 weights and losses after `steps` training steps: 1e-9 at 200.

    A step adds at most one unit to each side's gradient (2), numerator and root of Adam's ratio each carry it (2), and
    the update rounds (1): 5 units a step. Growth by feedback through the loss surface is not in the bound; it must fit
    under it.
    """
    return 5.0 * steps * UNIT


def moment_band(beta: float, roundings: int, dtype: str) -> float:
    """Return the flat band of a moment: the geometric sum of `roundings` u a step, damped by beta, relative to its
    largest value."""
    return roundings * UNIT_ROUNDOFF[dtype] / (1.0 - beta)


def drift_bounds(rates: list[float], *, beta1: float, beta2: float, largest_weight: float, dtype: str) -> list[float]:
    """Return after each step how far AdamW may drift from float64 on the same gradients, relative to the largest
    weight.

    A step rounds the decayed and the updated weight (2 u |p|) and adds lr times an update of size at most 1 whose
    relative error is the first moment's band, half the second's, and six roundings of the quotient. The sum is a
    straight line where lr is constant: its slope is what a systematic bias would exceed.
    """
    u = UNIT_ROUNDOFF[dtype]
    update = moment_band(beta1, 3, dtype) + 0.5 * moment_band(beta2, 4, dtype) + 6.0 * u
    steps = np.cumsum([2.0 * u + rate * update / largest_weight for rate in rates])
    return [float(value) for value in steps]
