"""A small GPT in PyTorch, as somebody has it: LayerNorm, GELU, RoPE on half of each head, parallel residual."""

import math

import torch
from torch.nn import functional

NUM_HEADS = 3
EPS = 1e-5


def forward(params, inputs, tap):
    """Return next-token logits, (rows, tokens, vocabulary), from `inputs["token_ids"]`."""
    x = tap("embed", params["embed"][inputs["token_ids"]])
    for layer in range(sum(name.endswith("qkv.weight") for name in params)):
        x = block(params, x, f"layers.{layer}", tap)
    x = tap("final_norm", layer_norm(params, "final_norm", x))
    return tap("logits", x @ params["embed"].T)


def block(params, x, at, tap):
    """Attention and MLP side by side, both on the residual stream (GPT-NeoX)."""
    rows, tokens, width = x.shape
    qkv = linear(
        params, f"{at}.attention.qkv", tap(f"{at}.attention.norm", layer_norm(params, f"{at}.attention.norm", x))
    )
    q, k, v = (part.reshape(rows, tokens, NUM_HEADS, -1) for part in qkv.chunk(3, dim=-1))
    q = tap(f"{at}.attention.q_rope", rotate(tap(f"{at}.attention.q", q)))
    k = tap(f"{at}.attention.k_rope", rotate(tap(f"{at}.attention.k", k)))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    probs = tap(f"{at}.attention.probs", scores.masked_fill(future, -torch.inf).softmax(-1))
    mix = torch.einsum("bnts,bsnh->btnh", probs, tap(f"{at}.attention.v", v)).reshape(rows, tokens, width)
    attended = tap(f"{at}.attention.out", linear(params, f"{at}.attention.out", mix))
    hidden = linear(params, f"{at}.mlp.up", tap(f"{at}.mlp.norm", layer_norm(params, f"{at}.mlp.norm", x)))
    hidden = tap(f"{at}.mlp.act", functional.gelu(hidden, approximate="tanh"))
    return tap(f"{at}.out", x + attended + tap(f"{at}.mlp.down", linear(params, f"{at}.mlp.down", hidden)))


def rotate(x):
    """Rotate the first half of each head's dimensions by position; pairs are (i, i + half)."""
    turning, still = x.chunk(2, dim=-1)
    pairs = turning.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=x.dtype) / pairs)
    angles = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequencies)[:, None, :]
    first, second = turning[..., :pairs], turning[..., pairs:]
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat([*turned, still], dim=-1)


def layer_norm(params, name, x):
    """Zero mean, unit variance, then gain and bias."""
    return functional.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"], EPS)


def linear(params, name, x):
    """Weights are (out, in)."""
    return functional.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])
