"""The SwiGLU kernels in Triton's interpreter: halves of one buffer, what is kept for the backward, bad input."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tessera_kernels.reference import swiglu as plain
from tessera_kernels.triton import _gate_up
from tessera_kernels.triton import swiglu as fused
from tessera_shared.errors import KernelError

pytest.importorskip("triton")


class _Products(TorchDispatchMode):
    """Notes every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.name():
            self.made.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_halves_of_one_buffer_are_read_where_they_lie() -> None:
    buffer = torch.randn(5, 2, 40, dtype=torch.bfloat16)
    gate, up = buffer[:, 0], buffer[:, 1]
    assert torch.equal(fused.swiglu(gate, up), fused.swiglu(gate.contiguous(), up.contiguous()))
    assert fused._cut([], gate, up)[0] == 5  # rows are walked apart: nothing was copied


def test_bfloat16_rounds_once_as_the_reference_does() -> None:
    gate, up = (torch.randn(2, 3, 24, dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(fused.swiglu(gate, up), plain.swiglu(gate, up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy's, in the interpreter
def test_large_gates_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([[-6e4, -100.0, 0.0, 100.0, 6e4]], requires_grad=True)
    up = torch.ones(1, 5, requires_grad=True)
    act = fused.swiglu(gate, up)
    assert torch.equal(act, plain.swiglu(gate, up))
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(act.sum(), (gate, up)))


def test_products_are_kept_only_for_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    real = fused.gate_up_forward

    def spy(x: Any, gate: Any, up: Any, keep: bool, config: list[int]) -> Any:
        kept.append(keep)
        return real(x, gate, up, keep, config)

    monkeypatch.setattr(fused, "gate_up_forward", spy)
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    fused.gate_up_swiglu(x, weight, weight)
    with torch.no_grad():
        fused.gate_up_swiglu(x.requires_grad_(), weight, weight)
    fused.gate_up_swiglu(x, weight, weight)
    assert kept == [False, False, True]


def test_no_product_is_made_for_a_frozen_weight() -> None:
    x, gate, up = torch.randn(3, 16, requires_grad=True), torch.randn(8, 16), torch.randn(8, 16, requires_grad=True)
    act = fused.gate_up_swiglu(x, gate, up)
    with _Products() as products:
        act.sum().backward()
    assert products.made == ["aten::mm", "aten::addmm", "aten::mm"]  # twice for x, once for up
    assert gate.grad is None


# torch's own tracer makes an instance of every autograd.Function, which torch deprecates
@pytest.mark.unfenced
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_and_eager_give_the_same_bits() -> None:
    def layer(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return fused.swiglu(fused.gate_up_swiglu(x, gate, up), x[:, :8])

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = [torch.randn(3, 16, requires_grad=True), *(torch.randn(8, 16, requires_grad=True) for _ in range(2))]
    answers = [(y := f(*inputs), *torch.autograd.grad(y.sum(), inputs)) for f in (layer, compiled)]
    for eager, graph in zip(*answers, strict=True):
        assert torch.equal(eager, graph)


def test_what_does_not_fit_is_named() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(KernelError, match=r"up_XF.shape = \[2, 4\]: expected \[2, 8\]"):
        fused.swiglu(x, x[:, :4])
    with pytest.raises(KernelError, match=r"gate_FD.shape = \[4, 7\]: expected \[any, 8\]"):
        fused.gate_up_swiglu(x, weight[:, :7], weight)
    with pytest.raises(KernelError, match=r"up_FD.dtype = bfloat16"):
        fused.gate_up_swiglu(x, weight, weight.bfloat16())


def test_a_tiling_too_large_for_shared_memory_is_refused() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(KernelError, match=r"expected at most 232448 bytes of tiles"):
        fused.gate_up_swiglu(x, weight, weight, config=_gate_up.GateUpConfig(128, 128, 64, 8, 4, 8, 1, 1))
