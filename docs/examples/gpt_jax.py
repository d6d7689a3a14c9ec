"""The same small GPT in JAX, written by somebody else: kernels are (in, out), queries, keys and values stay packed."""

import jax
import jax.numpy as jnp

NUM_HEADS = 3


def rotate_half(x):
    """Rotate the first half of each head's dimensions by position; pairs are (i, i + half)."""
    size = x.shape[-1] // 2
    cos, sin = tables(x, size)
    turning = x[..., :size]
    turned = jnp.concatenate([-turning[..., size // 2 :], turning[..., : size // 2]], axis=-1)
    turning = turning * jnp.concatenate([cos, cos], -1) + turned * jnp.concatenate([sin, sin], -1)
    return jnp.concatenate([turning, x[..., size:]], axis=-1)


def tables(x, size):
    """Return cos and sin of position times frequency, (tokens, 1, size / 2)."""
    frequencies = 1.0 / 10000.0 ** (jnp.arange(0, size, 2, dtype=x.dtype) / size)
    angles = jnp.arange(x.shape[1], dtype=x.dtype)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def forward(params, inputs, tap, rotate=rotate_half):
    """Return next-token logits, (rows, tokens, vocabulary), from `inputs["token_ids"]`."""
    x = tap("embed", jnp.take(params["embed"], inputs["token_ids"], axis=0))
    for layer in range(len([name for name in params if name.endswith("qkv.kernel")])):
        at = f"layers.{layer}"
        residual = x
        x = tap(f"{at}.attention.norm", norm(params, f"{at}.attention.norm", residual))
        x = x @ params[f"{at}.attention.qkv.kernel"] + params[f"{at}.attention.qkv.bias"]
        mix = attention(x, f"{at}.attention", tap, rotate)
        out = mix @ params[f"{at}.attention.out.kernel"] + params[f"{at}.attention.out.bias"]
        out = tap(f"{at}.attention.out", out)
        x = tap(f"{at}.mlp.norm", norm(params, f"{at}.mlp.norm", residual))
        x = x @ params[f"{at}.mlp.up.kernel"] + params[f"{at}.mlp.up.bias"]
        x = tap(f"{at}.mlp.act", jax.nn.gelu(x, approximate=True))
        x = x @ params[f"{at}.mlp.down.kernel"] + params[f"{at}.mlp.down.bias"]
        x = tap(f"{at}.out", residual + out + tap(f"{at}.mlp.down", x))
    return tap("logits", tap("final_norm", norm(params, "final_norm", x)) @ params["embed"].T)


def attention(qkv, at, tap, rotate):
    """Causal softmax attention over `NUM_HEADS` heads."""
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = jnp.split(qkv.reshape(rows, tokens, 3 * NUM_HEADS, -1), 3, axis=2)
    q = tap(f"{at}.q_rope", rotate(tap(f"{at}.q", q)))
    k = tap(f"{at}.k_rope", rotate(tap(f"{at}.k", k)))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones((tokens, tokens), bool))
    probs = tap(f"{at}.probs", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1))
    return jnp.einsum("bnts,bsnh->btnh", probs, tap(f"{at}.v", v)).reshape(rows, tokens, width)


def norm(params, name, x):
    """LayerNorm over the last axis, two passes."""
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return x * params[f"{name}.scale"] + params[f"{name}.bias"]
