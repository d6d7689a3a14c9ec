"""The RoPE kernel in Triton's interpreter: in place, autograd around it, bad input."""

import pytest
import torch

from tessera_kernels.reference import rope as plain
from tessera_kernels.triton import rope as fused
from tessera_shared.errors import KernelError

pytest.importorskip("triton")


def _inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = [(2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 8), (2, 3, 8)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_q_and_k_holds_the_answer_bit_for_bit(dtype: torch.dtype) -> None:
    q, k, cos, sin = _inputs(dtype)
    expected = plain.apply_rope_(q.clone(), k.clone(), cos, sin)
    turned = fused.apply_rope_(q, k, cos, sin)
    for argument, found, right in zip((q, k), turned, expected, strict=True):
        assert found.data_ptr() == argument.data_ptr()
        assert torch.equal(argument, right)


def test_heads_further_apart_than_32_bits_count_are_found(far_memory: torch.Tensor) -> None:
    _, k, cos, sin = _inputs(torch.float16)
    q = torch.randn(2, 3, 3, 8).half()
    far = far_memory.as_strided(q.shape, (24, 8, 2**30, 1), 2**31)
    far.copy_(q)
    assert torch.equal(fused.apply_rope_(far, k.clone(), cos, sin)[0], plain.apply_rope_(q, k, cos, sin)[0])


@pytest.mark.parametrize("view", [False, True])
def test_gradients_are_the_transpose_and_incoming_ones_stay_whole(view: bool) -> None:
    q, k, cos, sin = _inputs()
    leaves = q.requires_grad_(), k.requires_grad_()
    upstream = torch.randn_like(q), torch.randn_like(k)
    kept = [gradient.clone() for gradient in upstream]
    answers = []
    for module in (plain, fused):
        copies = [leaf * 1 for leaf in leaves]
        if view:
            copies = [copy.flatten(2).unflatten(2, copy.shape[2:]) for copy in copies]
        answers.append(torch.autograd.grad(module.apply_rope_(*copies, cos, sin), leaves, upstream))
    for expected, found in zip(*answers, strict=True):
        assert torch.equal(expected, found)
    assert all(torch.equal(before, after) for before, after in zip(kept, upstream, strict=True))


def test_a_gradient_for_one_of_the_two_is_enough() -> None:
    q, k, cos, sin = _inputs()
    q.requires_grad_()
    turned, _ = fused.apply_rope_(q * 1, k, cos, sin)
    upstream = torch.randn_like(q)
    expected = torch.autograd.grad(plain.apply_rope_(q * 1, k, cos, sin)[0], q, upstream)[0]
    assert torch.equal(torch.autograd.grad(turned, q, upstream)[0], expected)


@pytest.mark.parametrize("view", [False, True])
def test_whoever_needs_the_old_values_is_told(view: bool) -> None:
    q, k, cos, sin = _inputs()
    old = q.requires_grad_() * 1
    old = old.flatten(2).unflatten(2, old.shape[2:]) if view else old
    square = old.square()  # keeps `old` for its backward
    turned, _ = fused.apply_rope_(old, k, cos, sin)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        (square.sum() + turned.sum()).backward()


# torch's own tracer makes an instance of every autograd.Function, which torch deprecates
@pytest.mark.unfenced
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_and_eager_give_the_same_bits() -> None:
    q, k, cos, sin = _inputs()
    q.requires_grad_()

    def turn(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        a, b = fused.apply_rope_(q * 1, k * 1, cos, sin)
        return a.sum(2) + b.sum(2)

    compiled = torch.compile(turn, backend="aot_eager", fullgraph=True)
    upstream = torch.randn(2, 3, 8)
    answers = [(y := f(q, k), torch.autograd.grad(y, q, upstream)[0]) for f in (turn, compiled)]
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


def test_a_leaf_cannot_be_overwritten() -> None:
    q, k, cos, sin = _inputs()
    with pytest.raises(KernelError, match=r"q_BTNH.is_leaf = True"):
        fused.apply_rope_(q.requires_grad_(), k, cos, sin)


def test_what_does_not_fit_is_named() -> None:
    q, k, cos, sin = _inputs()
    with pytest.raises(KernelError, match=r"cos_BTH.shape = \[2, 3, 4\]: expected \[2, 3, 8\]"):
        fused.apply_rope_(q, k, cos[..., :4], sin)
    with pytest.raises(KernelError, match=r"sin_BTH.dtype = bfloat16"):
        fused.apply_rope_(q, k, cos, sin.bfloat16())
    with pytest.raises(KernelError, match=r"H = 7: expected a positive multiple of 2"):
        fused.apply_rope_(q[..., :7], k[..., :7], cos[..., :7], sin[..., :7])
    with pytest.raises(KernelError, match=r"cos_BTH.requires_grad = True"):
        fused.apply_rope_(q, k, cos.requires_grad_(), sin)
