"""The native face: a `flax.nnx.Module` over the same functions, for users of JAX alone."""

from collections.abc import Mapping

from flax import nnx
from jax import Array

from tessera_jax.model.dtypes import dtype_of
from tessera_jax.model.params import Params
from tessera_jax.model.transformer import forward
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec


class TesseraModel(nnx.Module):  # type: ignore[misc]
    """A decoder whose `weights` hold one `nnx.Param` per row of the tensor table, in the policy's parameter dtype.

    Train it as any module: `optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)`, `nnx.value_and_grad`,
    `optimizer.update(model, grads)`.
    """

    def __init__(self, spec: ModelSpec, numerics: Numerics, params: Mapping[str, Array]) -> None:
        self.spec = spec
        self.numerics = numerics
        stored = dtype_of(numerics.param)
        self.weights = nnx.Dict({name: nnx.Param(array.astype(stored)) for name, array in params.items()})

    def __call__(
        self,
        token_ids_BT: Array,
        *,
        positions_BT: Array | None = None,
        segments_BT: Array | None = None,
        recompute: bool = False,
    ) -> Array:
        """Return logits; see `tessera_jax.model.transformer.forward`."""
        return forward(
            self.params(),
            token_ids_BT,
            spec=self.spec,
            numerics=self.numerics,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            recompute=recompute,
        )

    def params(self) -> Params:
        """Return the live parameters by name, ready for the functions of this half."""
        return {name: weight[...] for name, weight in self.weights.items()}
