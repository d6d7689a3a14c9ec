"""The flat AdamW kernel in Triton's interpreter: the torch half's formula, device counters, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tessera_kernels.reference import adamw as plain
from tessera_kernels.triton import adamw as fused
from tessera_parity.kernel_budget import kernel_limit
from tessera_shared.errors import KernelError
from tessera_shared.objectives import AdamWOptions
from tessera_torch.train import optim

pytest.importorskip("triton")

OPTIONS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def _state(count: int = 70) -> list[Tensor]:
    return [torch.randn(count), torch.randn(count), torch.randn(count) * 0.1, torch.rand(count) * 0.01]


def _scalars(step: int = 3) -> dict[str, Tensor]:
    return {"step": torch.tensor(step), "lr": torch.tensor(1e-2)}


def test_three_updates_follow_the_torch_half() -> None:
    param, grad, first, second = _state()
    first.zero_()
    second.zero_()
    options = AdamWOptions(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    params, state = {"w": param.double()}, optim.adamw_init({"w": param.double()}, options=options)
    usual, usual_state = {"w": param.clone()}, optim.adamw_init({"w": param}, options=options)
    step = torch.tensor(0)
    for _ in range(3):
        fused.adamw_flat_(param, grad, first, second, step=step, lr=torch.tensor(1e-2), **OPTIONS)
        step += 1
        mask: dict[str, Any] = {"options": options, "decay_mask": {"w": True}}
        params, state = optim.adamw_update(params, {"w": grad.double()}, state, lr=1e-2, **mask)
        usual, usual_state = optim.adamw_update(usual, {"w": grad}, usual_state, lr=1e-2, **mask)
    for found, own, truth in ((param, usual["w"], params["w"]), (first, usual_state.first["w"], state.first["w"])):
        limit = kernel_limit(
            float((own - truth).abs().max()), torch.float32, magnitude=float(truth.abs().max()), length=3
        )
        assert float((found - truth).abs().max()) <= limit


def test_moments_have_the_plain_formulas_bits() -> None:
    ours, theirs = _state(), []
    theirs = [tensor.clone() for tensor in ours]
    fused.adamw_flat_(*ours, **_scalars(), **OPTIONS)
    plain.adamw_flat_(*theirs, **_scalars(), **OPTIONS)
    assert torch.equal(ours[2], theirs[2])
    assert torch.equal(ours[3], theirs[3])


def test_the_copy_is_the_new_parameter_rounded() -> None:
    state, copy = _state(), torch.empty(70, dtype=torch.bfloat16)
    fused.adamw_flat_(*state, **_scalars(), **OPTIONS, copy=copy)
    assert torch.equal(copy, state[0].bfloat16())


def test_a_clipping_factor_rounds_to_the_gradients_dtype() -> None:
    ours = _state()
    ours[1] = ours[1].bfloat16()
    factor = torch.tensor(0.37)
    scaled = [ours[0].clone(), (ours[1].float() * factor).bfloat16(), ours[2].clone(), ours[3].clone()]
    fused.adamw_flat_(*ours, **_scalars(), **OPTIONS, grad_scale=factor)
    fused.adamw_flat_(*scaled, **_scalars(), **OPTIONS)
    assert all(torch.equal(ours[i], scaled[i]) for i in (0, 2, 3))


def test_the_counter_and_the_rate_are_read_and_left_alone() -> None:
    state, scalars = _state(), _scalars(step=5)
    later = [tensor.clone() for tensor in state]
    fused.adamw_flat_(*state, **scalars, **OPTIONS)
    assert int(scalars["step"]) == 5
    fused.adamw_flat_(*later, **_scalars(step=6), **OPTIONS)
    assert not torch.equal(state[0], later[0])


@pytest.mark.unfenced
def test_an_update_inside_a_compiled_function_writes_the_same_bits() -> None:
    ours = _state()
    theirs = [tensor.clone() for tensor in ours]
    scalars = _scalars()

    def update(param: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> None:
        fused.adamw_flat_(param, grad, first, second, **scalars, **OPTIONS)

    torch.compile(update, backend="aot_eager", fullgraph=True)(*ours)
    update(*theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.unfenced
def test_a_compiler_is_told_of_every_write() -> None:
    param, grad, first, second = _state()
    copy, scalars = torch.empty(70, dtype=torch.bfloat16), _scalars()
    arguments = (param, grad, first, second, copy, scalars["step"], scalars["lr"], None, 0.9, 0.95, 1e-8, 0.1, [])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tessera.adamw_flat_.default, arguments, test_utils=checks)


def test_what_does_not_fit_is_named() -> None:
    param, grad, first, second = _state()
    with pytest.raises(KernelError, match=r"grad.shape = \[60\]: expected \[70\]"):
        fused.adamw_flat_(param, grad[:60], first, second, **_scalars(), **OPTIONS)
    with pytest.raises(KernelError, match=r"second.dtype = float64: expected float32"):
        fused.adamw_flat_(param, grad, first, second.double(), **_scalars(), **OPTIONS)
    with pytest.raises(KernelError, match=r"step.dtype = int32: expected int64"):
        fused.adamw_flat_(param, grad, first, second, step=torch.tensor(1).int(), lr=torch.tensor(1.0), **OPTIONS)
    with pytest.raises(KernelError, match=r"first.* expected a contiguous tensor"):
        fused.adamw_flat_(param, grad, torch.randn(140)[::2], second, **_scalars(), **OPTIONS)
    with pytest.raises(KernelError, match=r"beta2 = 1.0: expected 0.0 to 0.9999"):
        fused.adamw_flat_(param, grad, first, second, **_scalars(), **(OPTIONS | {"beta2": 1.0}))
