"""Linear distillation loss written out plainly: the reference of `tessera_kernels.triton.linear_distillation`.

p = softmax(teacher logits / tau), q = softmax(student logits / tau), both products in their inputs' dtype, all behind
them in at least float32; loss = sum over counted rows of (1 - label_weight) tau^2 D + label_weight CE (at tau = 1).
KL(a | b) is summed as a log(a/b) - a + b, whose terms are not negative.
"""

import math

import torch
from torch import Tensor


def linear_distillation(
    student_XD: Tensor,
    student_head_VD: Tensor,
    teacher_XF: Tensor,
    teacher_head_VF: Tensor,
    labels_X: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    label_weight: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    mode: str = "chunked",
    accumulate: str = "float32",
    config: object = None,
) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the number of labels that count (int32). The last four options change nothing."""
    del chunk_bytes, mode, accumulate, config
    student_XV = _lifted(student_XD @ student_head_VD[:vocab_size].T)
    teacher_XV = _lifted(teacher_XF @ teacher_head_VF[:vocab_size].T)
    log_p_XV = torch.log_softmax(teacher_XV / temperature, dim=-1)
    log_q_XV = torch.log_softmax(student_XV / temperature, dim=-1)
    loss_X = _divergence(log_p_XV, log_q_XV, divergence, beta, alpha)
    loss_X = (1.0 - label_weight) * (temperature**2 if temperature_squared else 1.0) * loss_X
    counts_X = labels_X != ignore_index
    if label_weight:
        safe_X1 = torch.where(counts_X, labels_X, 0).long().unsqueeze(-1)
        normalizer_X = torch.logsumexp(student_XV, dim=-1)
        hard_X = normalizer_X - student_XV.gather(-1, safe_X1).squeeze(-1) + z_loss * normalizer_X.square()
        loss_X = loss_X + label_weight * hard_X
    return torch.where(counts_X, loss_X, 0.0).sum(), counts_X.sum(dtype=torch.int32)


def _divergence(log_p: Tensor, log_q: Tensor, divergence: str, beta: float, alpha: float) -> Tensor:
    if divergence == "forward_kl":
        return _kl(log_p, log_q)
    if divergence == "reverse_kl":
        return _kl(log_q, log_p)
    if divergence == "skew_kl":
        return _kl(log_p, _mixture(log_p, log_q, alpha))
    if divergence == "skew_reverse_kl":
        return _kl(log_q, _mixture(log_q, log_p, alpha))
    if beta in (0.0, 1.0):
        return _kl(log_q, log_p) if beta else _kl(log_p, log_q)
    mixture = _mixture(log_p, log_q, beta)
    return beta * _kl(log_p, mixture) + (1.0 - beta) * _kl(log_q, mixture)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a, b = log_a.exp(), log_b.exp()
    return (a * (log_a - log_b) - a + b).sum(-1)


def _mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    if weight in (0.0, 1.0):
        return log_a + 0.0 * log_b if weight else log_b
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def _lifted(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
