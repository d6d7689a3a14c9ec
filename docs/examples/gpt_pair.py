"""Two GPTs that are not ours, one in PyTorch and one in JAX: `parity check docs/examples/gpt_pair.py`."""

import gpt_jax
import gpt_torch

frameworks = ("torch", "jax")
left, right = gpt_torch.forward, gpt_jax.forward
grad = True


def params(rng):
    """Two layers, width 24, 3 heads, 17 tokens; weights (out, in) as PyTorch has them."""
    sizes = {"attention.qkv": (72, 24), "attention.out": (24, 24), "mlp.up": (88, 24), "mlp.down": (24, 88)}
    linears = {f"layers.{i}.{name}": size for i in range(2) for name, size in sizes.items()}
    norms = ["final_norm", *(f"layers.{i}.{part}.norm" for i in range(2) for part in ("attention", "mlp"))]
    weights = {"embed": rng.normal(0, 1, (17, 24))}
    weights |= {f"{name}.weight": rng.normal(0, size[1] ** -0.5, size) for name, size in linears.items()}
    weights |= {f"{name}.weight": rng.normal(1, 0.2, 24) for name in norms}
    return weights | {f"{n}.bias": rng.normal(0, 0.2, linears.get(n, (24,))[0]) for n in [*linears, *norms]}


def inputs(rng, size):
    """Two rows of `size` token ids."""
    return {"token_ids": rng.integers(0, 17, (2, size))}


def to_right(params):
    """The JAX model says `kernel` and stores it (in, out), and calls a norm's gain `scale`."""
    renamed = {n: n.replace(".weight", ".scale" if "norm" in n else ".kernel") for n in params}
    return {renamed[n]: value.T if n.endswith(".weight") else value for n, value in params.items()}
