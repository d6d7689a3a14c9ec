"""RoPE on queries and keys in place, forward and backward, beside the compiled plain formula and Liger."""

from collections.abc import Callable, Iterator

import torch
from harness import Function, Row, available, choose, device, measure, turn
from torch import Tensor

from tessera_kernels.triton import rope as ours

SHAPES = ((4, 4096, 32, 8, 128), (8, 2048, 32, 32, 64), (2, 8192, 64, 8, 128))


def rows() -> Iterator[Row]:
    for batch, positions, heads, kv_heads, width in turn(choose(SHAPES, ((1, 3, 4, 2, 8),))):
        q = torch.randn(batch, positions, heads, width, device=device(), dtype=torch.bfloat16)
        k = torch.randn(batch, positions, kv_heads, width, device=device(), dtype=torch.bfloat16)
        angles = torch.rand(batch, positions, width // 2, device=device()).repeat(1, 1, 2) * 6.28
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        moved = 4.0 * (q.numel() + k.numel()) + 4.0 * cos.numel()
        shape = f"B{batch} T{positions} N{heads} K{kv_heads} H{width} bfloat16"
        for name, backward, function in (
            ("forward in place", False, lambda: ours.apply_rope_(q, k, cos, sin)),  # noqa: B023 - timed before the next turn
            ("backward", True, lambda: ours._turn_anew(q, k, cos, sin, True, [])),  # noqa: B023
        ):
            times = measure({"ours": function, **available(_peers(q, k, cos, sin, backward))})
            peers = {peer: timing for peer, timing in times.items() if peer != "ours"}
            yield Row(
                op="rope", shape=f"{name} {shape}", ours=times["ours"], peers=peers, bytes_moved=moved,
                must={"compiled": 1.0, "share": 0.8},
            )  # fmt: skip


def _peers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> dict[str, Callable[[], Function]]:
    """Return the compiled formula, which writes new tensors, and Liger, which turns q and k where they lie as ours does."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        across = torch.cat([second, -first] if backward else [-second, first], dim=-1)
        return x * cos[:, :, None] + across * sin[:, :, None]

    def plain() -> tuple[Tensor, Tensor]:
        return turned(q), turned(k)

    def compiled() -> Function:
        return torch.compile(plain)

    def liger() -> Function:
        from liger_kernel.ops.rope import rope_backward, rope_forward

        run = rope_backward if backward else rope_forward
        return lambda: run(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return {"compiled": compiled, "liger": liger}
