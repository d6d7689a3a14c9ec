"""RMSNorm of two rooms: the forward's bits are Triton's, the backward's are those of CUDA C++ on what that forward saved."""

import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera_kernels import fastest_rms_norm as fastest
from tessera_kernels.cuda import rms_norm as in_cuda
from tessera_kernels.norm_rule import RunBackward
from tessera_kernels.triton import rms_norm as in_triton
from tessera_torch.kernels import fastest_ops

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the kernels"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.sampled_from([1, 40, 199, 520]),
    dtype=st.sampled_from(DTYPES),
    after_cast=st.booleans(),
    adds=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_direction_is_its_room_s(rows, width, dtype, after_cast, adds, seed) -> None:
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    x, residual, dy, dtotal = (drawn(rows, width) for _ in range(4))
    gain = drawn(width)
    given_ = [one.requires_grad_() for one in ([x, residual, gain] if adds else [x, gain])]
    name = "add_rms_norm" if adds else "rms_norm"
    found = getattr(fastest, name)(*given_, eps=1e-6, gain_after_cast=after_cast)
    wanted = getattr(in_triton, name)(*given_, eps=1e-6, gain_after_cast=after_cast)
    found, wanted = (answer if adds else (answer,) for answer in (found, wanted))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    grads = torch.autograd.grad(found, given_, [dy, dtotal][: len(found)])
    assert [grad.shape for grad in grads] == [one.shape for one in given_]
    if rows:
        with torch.no_grad():
            _, total, rstd = in_triton.run_forward(x, residual if adds else None, gain, 1e-6, after_cast, [])
            run: RunBackward = in_cuda.run_backward
            dx, dgain = run(dy, total if adds else x, gain, rstd, dtotal if adds else None, after_cast, [])
        for one, other in zip(grads, [dx, dx, dgain] if adds else [dx, dgain], strict=True):
            assert torch.equal(one, other)


def test_auto_takes_it() -> None:
    ops = fastest_ops()
    assert (ops.rms_norm, ops.add_rms_norm) == (fastest.rms_norm, fastest.add_rms_norm)
