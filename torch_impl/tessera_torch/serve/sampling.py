"""Choosing the next token: exact inverse of the cumulative distribution, uniforms given."""

import torch
from torch import Tensor


def greedy(logits_BV: Tensor) -> Tensor:
    """Return the likeliest token of each row, the lowest id on ties and the first NaN where there is one, as int32."""
    best_B1 = logits_BV.amax(dim=-1, keepdim=True)  # argmax promises no order among ties; a first match among ids does
    ids_V = torch.arange(logits_BV.shape[-1], dtype=torch.int32, device=logits_BV.device)
    is_best_BV = (logits_BV == best_B1) | logits_BV.isnan()
    return torch.where(is_best_BV, ids_V, logits_BV.shape[-1] - 1).amin(dim=-1).to(torch.int32)


def sample(
    logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Return an int32 token per row: first by (logit down, id up) whose cumulative probability exceeds u * total.

    Kept are the first `top_k` (0 = all), then of these the smallest prefix that holds `top_p` of their mass (as Hugging
    Face and vLLM chain the two), then those with probability >= `min_p` times the largest. `temperature` 0 is greedy.
    At least float32.
    """
    if temperature == 0.0:
        return greedy(logits_BV)
    lifted_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    sorted_BV, order_BV = lifted_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = torch.softmax((sorted_BV - sorted_BV[:, :1]) / temperature, dim=-1)
    cumulative_BV = probs_BV.cumsum(dim=-1)
    kept_BV = probs_BV >= min_p * probs_BV[:, :1]
    num_kept = min(top_k or lifted_BV.shape[-1], lifted_BV.shape[-1])
    kept_BV[:, num_kept:] = False
    if top_p < 1.0:
        kept_BV[:, 1:] &= cumulative_BV[:, :-1] < top_p * cumulative_BV[:, num_kept - 1 : num_kept]
    kept_BV[:, 0] = True
    last_B1 = kept_BV.sum(dim=-1, keepdim=True) - 1  # every rule keeps a prefix
    threshold_B1 = uniforms_B[:, None].to(lifted_BV.dtype) * cumulative_BV.gather(-1, last_B1)
    index_B1 = torch.minimum((cumulative_BV <= threshold_B1).sum(dim=-1, keepdim=True), last_B1)
    return order_BV.gather(-1, index_B1)[:, 0].to(torch.int32)
