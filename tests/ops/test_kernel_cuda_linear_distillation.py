"""The linear distillation loss with its products in CUDA C++, run by the emulator: what its cases do not say."""

import os
import shutil

import pytest
import torch

pytest.importorskip("cuda.bindings")

from tessera_kernels.cuda._compile import build
from tessera_kernels.cuda.linear_distillation import linear_distillation, multiply_both, specializations
from tessera_kernels.triton import _logit_tiles as tiles
from tessera_kernels.triton import linear_distillation as triton
from tessera_parity.kernel_budget import kernel_limit
from tessera_shared.errors import KernelError, MissingDependency

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the kernels"),
]

X, V, D, F = 70, 300, 72, 200


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("inv_tau", [1.0, 0.4])
@pytest.mark.parametrize("X", [70, 130, 300], ids=["alone", "pair", "half a pair"])
def test_logits_and_sums_are_those_of_the_triton_product(hard: bool, inv_tau: float, X: int) -> None:
    """Both are held against float64; the teacher is the wider one and comes first."""
    student, teacher = (random(X, D), random(V, D, seed=1)), (random(X, F, seed=2), random(V, F, seed=3))
    labels = torch.arange(X) % 70 * 5 - 20  # some no id, some in the second tile
    found = {}
    for name, multiply in (("cuda", multiply_both), ("triton", tiles.multiply_both)):
        logits = torch.full((2, X, 320), torch.nan)
        found[name] = logits, multiply(student, teacher, logits, labels, inv_tau, hard)
    for index, (hidden, head) in enumerate((student, teacher)):
        truth = hidden.double() @ head.double().T
        limit = kernel_limit(
            0.0, torch.float32, magnitude=float((hidden.double().abs() @ head.double().abs().T).max()), length=F
        )
        assert float((found["cuda"][0][index, :, :V].double() - truth).abs().max()) <= limit
    ours, usual = found["cuda"][1], found["triton"][1]
    for number in (0, 1, *((2, 3) if hard else ()), 4, 5):
        size = float(usual[number].abs().max())
        limit = kernel_limit(0.0, torch.float32, magnitude=size, length=F)
        assert float((ours[number] - usual[number]).abs().max()) <= 2 * limit, (
            number
        )  # either may be that far from the truth


def test_equal_models_lose_nothing_and_learn_nothing() -> None:
    """Both models' sums are taken in one order, whether or not the label's are taken beside them."""
    student, head = random(X, D).requires_grad_(), random(V, D, seed=1).requires_grad_()
    loss, _ = linear_distillation(
        student, head, student.detach(), head.detach(), torch.arange(X), divergence="generalized_jsd", temperature=2.0
    )
    assert float(loss.detach()) == 0.0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (student, head)))


@pytest.mark.parametrize(("width", "expanded"), [(33, False), (40, True)])
def test_rows_that_only_the_copy_engine_likes_are_right(width: int, expanded: bool) -> None:
    """33 numbers in rows of 40 begin at multiples of 16 bytes; rows that lie one upon the other have a stride that is a
    multiple of anything."""
    student, head = (random(n, 40, seed=n)[:, :width].requires_grad_() for n in (X, V))
    teacher = random(1, D, seed=2).expand(X, D) if expanded else random(X, D, seed=2)
    given = student, head, teacher, random(V, D, seed=3), torch.arange(X)
    answers = [
        (loss.detach(), *torch.autograd.grad(loss, given[:2]))
        for loss in (
            op(*given, divergence="generalized_jsd")[0] for op in (linear_distillation, triton.linear_distillation)
        )
    ]
    for ours, theirs in zip(*answers, strict=True):
        assert float((ours - theirs).abs().max()) <= 2.0**-7 * float(theirs.abs().max())


def test_float32_takes_the_librarys_products() -> None:
    given = [random(5, 16, seed=seed).float() for seed in range(4)]
    loss, count = linear_distillation(*given, torch.arange(5))
    assert torch.isfinite(loss)
    assert int(count) == 5


def test_what_does_not_fit_is_the_ops_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [random(5, 16, seed=seed) for seed in range(4)]
    with pytest.raises(KernelError, match=r"temperature = 0.0: expected a positive number"):
        linear_distillation(*given, torch.arange(5), temperature=0.0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(MissingDependency, match=r"student_XD on device cpu: expected cuda, .*TESSERA_CUDA_EMULATE=1"):
        linear_distillation(*given, torch.arange(5))


def test_on_hopper_nothing_spills_and_products_overlap() -> None:
    for kernel in specializations():
        built = build(kernel, "sm_90a")
        assert (built.spill_bytes, built.stack_bytes, built.slow) == (0, 0, ""), kernel.title
