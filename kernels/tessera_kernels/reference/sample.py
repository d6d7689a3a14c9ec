"""Drawing the next token written out plainly: the reference of `tessera_kernels.triton.sample`.

Sort by (logit down, id up), p = softmax(logits / temperature) in that order, keep a prefix, invert its cumulative sum. On
float64 inputs this is the truth; on others the plain implementation in float32.
"""

import torch
from torch import Tensor


def sample(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    config: object = None,
) -> Tensor:
    """Return an int32 id per row: the first in order whose cumulative probability exceeds u times the kept mass.

    Kept are the first `top_k` (0 = all), of these the smallest prefix that holds `top_p` of their mass, then those with
    probability >= `min_p` times the largest; the first always. Temperature 0 gives the first, as does a row whose largest
    logit is not finite (a NaN is larger than any number).
    Each parameter is one number or one of each row. `config` is taken so that the signature is the kernel's.
    """
    del config
    x_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    num_ids = x_BV.shape[1]
    sorted_BV, order_BV = x_BV.sort(dim=-1, descending=True, stable=True)
    temperature_B1, top_p_B1, min_p_B1 = (_column(value, x_BV) for value in (temperature, top_p, min_p))
    top_k_B1 = _column(top_k, x_BV, torch.long)
    num_first_B1 = torch.where(top_k_B1 == 0, num_ids, top_k_B1.clamp(max=num_ids))

    heat_B1 = torch.where(temperature_B1 == 0.0, 1.0, temperature_B1)
    probs_BV = torch.softmax((sorted_BV - sorted_BV[:, :1]) / heat_B1, dim=-1)
    cumulative_BV = probs_BV.cumsum(dim=-1)
    kept_BV = (torch.arange(num_ids, device=x_BV.device) < num_first_B1) & (probs_BV >= min_p_B1 * probs_BV[:, :1])
    mass_B1 = cumulative_BV.gather(-1, num_first_B1 - 1)
    kept_BV[:, 1:] &= (cumulative_BV[:, :-1] < top_p_B1 * mass_B1) | (top_p_B1 >= 1.0)
    kept_BV[:, 0] = True

    last_B1 = kept_BV.sum(dim=-1, keepdim=True) - 1  # every rule keeps a prefix
    threshold_B1 = uniforms_B[:, None].to(x_BV.dtype) * cumulative_BV.gather(-1, last_B1)
    place_B1 = torch.minimum((cumulative_BV <= threshold_B1).sum(dim=-1, keepdim=True), last_B1)
    place_B1 = torch.where((temperature_B1 == 0.0) | ~sorted_BV[:, :1].isfinite(), 0, place_B1)
    return order_BV.gather(-1, place_B1)[:, 0].to(torch.int32)


def _column(value: float | Tensor, x_BV: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return one number of each row, [B, 1]."""
    wanted = dtype or x_BV.dtype
    if isinstance(value, Tensor):
        return value.to(wanted)[:, None]
    return torch.full((x_BV.shape[0], 1), value, dtype=wanted, device=x_BV.device)
