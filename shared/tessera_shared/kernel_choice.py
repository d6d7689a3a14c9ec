"""`--kernels`: the names of the choice, known before any framework is loaded. What they mean: `tessera_torch.kernels`."""

from collections.abc import Callable

from tessera_shared.errors import KernelError

KERNELS = ("auto", "triton", "cuda", "reference")


def tell_choice(why: str, kernels: str | None, *, device: str, say: Callable[[str], None]) -> None:
    """Say once what was chosen and why; nothing where nobody asked and a CPU leaves no choice."""
    if why and (kernels is not None or device != "cpu"):
        say(why)


def check_kernels(kernels: str, *, backend: str) -> None:
    """Raise `KernelError` for an unknown choice, or one that asks the JAX half for kernels of the torch half."""
    if kernels not in KERNELS:
        raise KernelError(
            f"kernels = {kernels!r}: expected one of {', '.join(KERNELS)}, because these exist; try 'auto'"
        )
    if backend != "torch" and kernels in ("triton", "cuda"):
        raise KernelError(
            f"kernels = {kernels!r} with backend {backend}: expected auto or reference, because the kernels belong to the "
            "torch half; try --backend torch"
        )
