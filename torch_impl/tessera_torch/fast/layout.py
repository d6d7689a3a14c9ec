"""How the rows of a batch lie in memory for attention: dense rows, or documents one after another."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera_shared.errors import KernelError


class Layout(NamedTuple):
    """`starts` is None where every row is one document from its first position to its last."""

    positions_BT: Tensor  # int32
    starts: Tensor | None  # int32 [documents + 1]: where each begins among the B * T positions, and the end
    longest: int  # positions of the longest document


def layout_of(positions_BT: np.ndarray, segments_BT: np.ndarray, *, device: torch.device | str) -> Layout:
    """Return the layout of a batch's positions and segments, which lie on the host.

    A document begins with each row and wherever the segment changes. Padding becomes a document of its own, which no
    other sees. Raises `KernelError` unless positions go up by one inside a document: the kernels see order, not
    positions.
    """
    begins_BT = np.ones(segments_BT.shape, dtype=bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    steps = np.diff(positions_BT, axis=1) == 1
    if not np.all(steps | begins_BT[:, 1:] | (segments_BT[:, 1:] < 0)):
        raise KernelError(
            "positions_BT = steps other than 1 inside a document: expected consecutive positions, because the attention "
            "kernels see order alone; try kernels='reference'"
        )
    where = torch.as_tensor(positions_BT, dtype=torch.int32).to(device, non_blocking=True)
    rows, length = segments_BT.shape
    if begins_BT[:, 1:].any():
        starts = np.append(np.flatnonzero(begins_BT), rows * length).astype(np.int32)
        return Layout(where, torch.from_numpy(starts).to(device, non_blocking=True), int(np.diff(starts).max()))
    return Layout(where, None, length)


def dense_layout(rows: int, length: int, *, device: torch.device | str) -> Layout:
    """Return the layout of rows that are one document each."""
    positions_T = torch.arange(length, dtype=torch.int32, device=device)
    return Layout(positions_T.expand(rows, -1), None, length)
