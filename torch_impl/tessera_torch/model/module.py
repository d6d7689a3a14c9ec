"""The native face: a `torch.nn.Module` over the same functions, for users of torch alone."""

from collections.abc import Mapping

from torch import Tensor, nn

from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec
from tessera_torch.fast.transformer import forward as fast_forward
from tessera_torch.kernels import choose
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.params import Params
from tessera_torch.model.transformer import forward


class TesseraModel(nn.Module):
    """A decoder whose `state_dict` has the tensor table's names, hence Hugging Face's; a tied unembedding is not in it.

    Parameters are copies of `params` in the policy's parameter dtype. Train it as any module:
    `loss = cross_entropy(model(ids).flatten(0, 1), labels.flatten()); loss.backward(); optimizer.step()`.
    """

    def __init__(
        self, spec: ModelSpec, numerics: Numerics, params: Mapping[str, Tensor], *, kernels: str = "reference"
    ) -> None:
        """`kernels` is "reference" (the plain functions), "triton", "cuda" or "auto"; see `tessera_torch.kernels`."""
        super().__init__()
        device = next(iter(params.values())).device.type
        self.kernels = choose(kernels, device=device, numerics=numerics, spec=spec)
        self.spec = spec
        self.numerics = numerics
        for name, tensor in params.items():
            *path, leaf = name.split(".")
            weight = tensor.detach().to(dtype_of(numerics.param), copy=True)
            _child(self, path).register_parameter(leaf, nn.Parameter(weight))

    def forward(
        self,
        token_ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Return logits; see `tessera_torch.model.transformer.forward`.

        With kernels, documents packed into rows (`segments_BT`) wait for the device once, to see where they begin.
        """
        if self.kernels.ops is not None:
            return fast_forward(
                self.params(),
                token_ids_BT,
                spec=self.spec,
                numerics=self.numerics,
                ops=self.kernels.ops,
                positions_BT=positions_BT,
                segments_BT=segments_BT,
                recompute=recompute,
            )
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
        return dict(self.named_parameters())


def _child(module: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module
