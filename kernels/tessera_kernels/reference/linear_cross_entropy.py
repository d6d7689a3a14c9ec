"""Cross-entropy of a linear head written out plainly: the reference of `tessera_kernels.triton.linear_cross_entropy`.

loss = sum over rows whose label is not `ignore_index` of log(sum e^z) - z[label] + z_loss log(sum e^z)^2, where z is
h W^T, or cap tanh(h W^T / cap). The product is in the inputs' dtype; all behind it in at least float32.
"""

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden_XD: Tensor,
    head_VD: Tensor,
    labels_X: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    mode: str = "chunked",
    accumulate: str = "float32",
    config: object = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the number of labels that count (int32). The last four options change nothing."""
    del chunk_bytes, mode, accumulate, config
    logits_XV = hidden_XD @ head_VD[:vocab_size].T
    logits_XV = logits_XV.to(torch.promote_types(logits_XV.dtype, torch.float32))
    if softcap:
        logits_XV = softcap * torch.tanh(logits_XV / softcap)
    counts_X = labels_X != ignore_index
    safe_X1 = torch.where(counts_X, labels_X, 0).long().unsqueeze(-1)
    normalizer_X = torch.logsumexp(logits_XV, dim=-1)
    loss_X = normalizer_X - logits_XV.gather(-1, safe_X1).squeeze(-1) + z_loss * normalizer_X.square()
    return torch.where(counts_X, loss_X, 0.0).sum(), counts_X.sum(dtype=torch.int32)
