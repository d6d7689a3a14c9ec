"""The frozen model that a student learns from."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tessera_jax.model.transformer import forward
from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec


class Teacher(NamedTuple):
    """A model with its own spec and numerics policy; only its vocabulary must be the student's.

    As a pytree only the parameters are leaves, so a teacher can be an argument of a jitted function.
    """

    params: Mapping[str, Array]
    spec: ModelSpec
    numerics: Numerics


jax.tree_util.register_pytree_node(
    Teacher, lambda teacher: ((teacher.params,), teacher[1:]), lambda static, leaves: Teacher(*leaves, *static)
)


def teacher_logits(teacher: Teacher, batch: Batch) -> Array:
    """Return the teacher's logits `[B, T, V]` in its own logits dtype. No gradient flows into it."""
    token_ids_BT, _, positions_BT, segments_BT = (jnp.asarray(field) for field in batch)
    logits_BTV = forward(
        teacher.params,
        token_ids_BT,
        spec=teacher.spec,
        numerics=teacher.numerics,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
    )
    return jax.lax.stop_gradient(logits_BTV)
