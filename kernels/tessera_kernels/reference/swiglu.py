"""SwiGLU written out plainly: the reference of `tessera_kernels.triton.swiglu`.

act = silu(gate) * up with silu(g) = g / (1 + exp(-g)) (Shazeer 2020, arXiv 2002.05202), in at least float32, rounded once.
"""

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(gate_XF: Tensor, up_XF: Tensor, *, config: object = None) -> Tensor:
    """Return silu(gate) * up in their dtype. `config` is taken so that the signature is the kernel's."""
    del config
    up = torch.promote_types(gate_XF.dtype, torch.float32)
    return (functional.silu(gate_XF.to(up)) * up_XF.to(up)).to(gate_XF.dtype)


def gate_up_swiglu(x_XD: Tensor, gate_FD: Tensor, up_FD: Tensor, *, config: object = None) -> Tensor:
    """Return silu(x gate^T) * (x up^T); both products round to x's dtype before the activation."""
    del config
    return swiglu(functional.linear(x_XD, gate_FD), functional.linear(x_XD, up_FD))
