"""The frozen model that a student learns from."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_torch.model.transformer import forward


class Teacher(NamedTuple):
    """A model with its own spec and numerics policy; only its vocabulary must be the student's."""

    params: Mapping[str, Tensor]
    spec: ModelSpec
    numerics: Numerics


def teacher_logits(teacher: Teacher, batch: Batch) -> Tensor:
    """Return the teacher's logits `[B, T, V]` in its own logits dtype, without a graph."""
    device = next(iter(teacher.params.values())).device
    token_ids_BT, _, positions_BT, segments_BT = (torch.as_tensor(field, device=device) for field in batch)
    with torch.no_grad():
        return forward(
            teacher.params,
            token_ids_BT,
            spec=teacher.spec,
            numerics=teacher.numerics,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
        )
