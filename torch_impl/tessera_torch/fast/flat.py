"""Weights, moments and gradients as flat buffers, and the tensors by name as views of them: one launch an update."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 128
"""Elements between the starts of two tensors are a multiple of this: 16-byte loads, and TMA, of every view."""


class Flat(NamedTuple):
    """Tensors of one kind in one buffer; the gaps between them are zero and stay it."""

    buffer: Tensor
    views: dict[str, Tensor]


def flat_like(shapes: Mapping[str, Sequence[int]], *, dtype: torch.dtype, device: torch.device) -> Flat:
    """Return zeros for all shapes, in their order."""
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-torch.Size(shape).numel() // ALIGNMENT) * ALIGNMENT
    buffer = torch.zeros(end, dtype=dtype, device=device)
    views = {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        views[name] = buffer[starts[name] : starts[name] + count].view(tuple(shape))
    return Flat(buffer, views)


def flat_copy(tensors: Mapping[str, Tensor], *, dtype: torch.dtype) -> Flat:
    """Return a copy of all tensors in one buffer."""
    device = next(iter(tensors.values())).device
    flat = flat_like({name: tensor.shape for name, tensor in tensors.items()}, dtype=dtype, device=device)
    for name, tensor in tensors.items():
        flat.views[name].copy_(tensor)
    return flat
