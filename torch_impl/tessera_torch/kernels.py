"""Which implementation of the heavy operations the torch half uses: a plain, explicit choice, told once.

`reference` is the plain model of this half, the one that parity pairs. `triton` and `cuda` are the kernels of
`tessera_kernels`, reached through `tessera_torch.fast`. `auto` takes the kernels where they can run and says why or why
not; a choice that was asked for by name and cannot run raises.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tessera_kernels.checks import is_interpreting
from tessera_kernels.quant_weight import QuantWeight
from tessera_shared.errors import KernelError, MissingDependency
from tessera_shared.kernel_choice import check_kernels
from tessera_shared.numerics import Numerics
from tessera_shared.objectives import Divergence, Objective
from tessera_shared.spec import ModelSpec

WIDEST_HEAD = 256

HOPPER = (9, 0)
FIRST_WITH_E4M3 = (8, 9)

IN_CUDA = ("flash_attention", "rms_norm")
"""Operations that `cuda` takes in CUDA C++."""

IN_CUDA_ON_HOPPER = (*IN_CUDA, "linear_distillation", "quant_matmul")
"""The same on a Hopper GPU. Not `fp8_matmul`, which sums in one way that the torch half does not use."""

FASTER_IN_CUDA = ("flash_attention", "linear_distillation", "quant_matmul")
"""Operations whose CUDA C++ kernels an H200 ran faster than the Triton ones (docs/kernels.md, section 4): what `auto` takes,
and the backward alone of `rms_norm`."""


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The operations that `tessera_torch.fast` is built of; signatures as in `tessera_kernels.reference`."""

    name: str
    flash_attention: Callable[..., Any]
    flash_attention_varlen: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    apply_rope_: Callable[..., Any]
    swiglu: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    linear_distillation: Callable[..., Any]
    adamw_flat_: Callable[..., Any]
    decode: Callable[[], "DecodeOps"]  # imports what only generation needs
    packed: Callable[[], "PackedOps"]  # imports what only packed weights need


@dataclass(frozen=True, kw_only=True)
class DecodeOps:
    """The operations of a decoding step beside those of `Ops`."""

    paged_attention: Callable[..., Any]
    sample: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class PackedOps:
    """The products with packed weights: see `tessera_torch.fast.packed_weights`."""

    quant_matmul: Callable[..., Any]
    fp8_matmul: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen: the operations, or None for the plain model; and one line that says why."""

    ops: Ops | None
    why: str


def choose(
    kernels: str,
    *,
    device: str,
    numerics: Numerics,
    spec: ModelSpec,
    objective: Objective | None = None,
    teacher: ModelSpec | None = None,
    compiled: bool = False,
    weights: str | None = None,
) -> Choice:
    """Return what `kernels` ("auto", "triton", "cuda", "reference") means here; `why` is for a person to read, once.

    The plain model has no packed weights: with a format in `weights`, `reference` is the kernels' references.
    Raises `KernelError` for an unknown choice or one that this model or objective rules out, and `MissingDependency`
    where the compiler or the GPU is missing. `auto` never raises.
    """
    check_kernels(kernels, backend="torch")
    plain = None if weights is None else reference_ops()
    if kernels == "reference":
        return Choice(ops=plain, why="kernels: reference (plain torch), as asked")
    found = obstacles(
        device=device, numerics=numerics, spec=spec, objective=objective, teacher=teacher, compiled=compiled,
        weights=weights, interpreter=kernels != "auto",
    )  # fmt: skip
    obstacle = next(found, None)
    if kernels == "cuda" and obstacle is None:
        obstacle = next(_cuda_obstacles(device, numerics), None)
    if kernels == "auto":
        if obstacle is not None:
            return Choice(ops=plain, why=f"kernels: auto took reference (plain torch), because {_reason(obstacle)}")
        return _fastest(device, numerics)
    if obstacle is not None:
        raise obstacle
    return Choice(ops=cuda_ops(device) if kernels == "cuda" else triton_ops(), why=f"kernels: {kernels}, as asked")


def _fastest(device: str, numerics: Numerics) -> Choice:
    """Return what `auto` takes where kernels can run: Triton's, and CUDA C++ where that was measured to be faster."""
    suits = f"because {device} and {numerics.compute} suit it"
    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) != HOPPER:
        return Choice(ops=triton_ops(), why=f"kernels: auto took triton, {suits}")
    obstacle = next(_cuda_obstacles(device, numerics), None)
    names = f"{', '.join(FASTER_IN_CUDA)} and the backward of rms_norm"
    if obstacle is not None:
        without = f"without CUDA C++ for {names}, because {_reason(obstacle)}"
        return Choice(ops=triton_ops(), why=f"kernels: auto took triton, {suits}; {without}")
    why = f"kernels: auto took triton, {suits}; CUDA C++ for {names}, because that is faster on a Hopper GPU"
    return Choice(ops=fastest_ops(), why=why)


def obstacles(
    *,
    device: str,
    numerics: Numerics,
    spec: ModelSpec,
    objective: Objective | None = None,
    teacher: ModelSpec | None = None,
    compiled: bool = False,
    weights: str | None = None,
    interpreter: bool = False,
) -> Iterator[MissingDependency | KernelError]:
    """Yield every reason why the kernels cannot run this model here, as the error to raise.

    Triton's interpreter, where it is switched on, counts as a device only with `interpreter`: it is for looking closely.
    """
    if find_spec("triton") is None:
        yield MissingDependency(
            "triton = not installed: expected the package, because the kernels are written in it; try kernels='reference'"
        )
    if not device.startswith("cuda") and not (interpreter and is_interpreting()):
        yield MissingDependency(
            f"device = {device!r}: expected cuda, because kernels are compiled for a GPU; try kernels='reference'"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        yield MissingDependency("device = 'cuda': expected a GPU, because torch sees none here; try --device cpu")
    if numerics.compute not in ("bfloat16", "float32"):
        yield _refusal("dtype", numerics.compute, "bfloat16 or float32", "the kernels compute in float32 inside")
    if weights == "fp8" and _is_before(device, FIRST_WITH_E4M3):
        name = torch.cuda.get_device_name(device)
        yield _refusal("weights", "fp8", "another format", f"the tensor cores of {name} have no products of E4M3")
    if compiled:
        yield _refusal("compile", True, "--no-compile", "the fused step writes its state in place")
    for name, model in (("head_width", spec), ("the teacher's head_width", teacher)):
        if model is not None and (model.head_width % 16 or model.head_width > WIDEST_HEAD):
            wanted = f"a multiple of 16 up to {WIDEST_HEAD}"
            yield _refusal(name, model.head_width, wanted, "tensor cores take tiles of 16")
    if objective is not None:
        yield from _objective_obstacles(objective, spec, teacher)


def _cuda_obstacles(device: str, numerics: Numerics) -> Iterator[MissingDependency | KernelError]:
    """Yield what stands against CUDA C++ where Triton could run."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        yield MissingDependency(
            "cuda-bindings = not installed: expected the package, because it compiles the CUDA sources; try kernels='triton'"
        )
    if numerics.compute != "bfloat16":
        yield KernelError(
            f"dtype = {numerics.compute} with kernels = 'cuda': expected bfloat16, because its attention is a product of "
            "16-bit numbers; try kernels='triton'"
        )
    if _is_before(device, (8, 0)):
        yield MissingDependency(
            f"device = {torch.cuda.get_device_name(device)!r}: expected compute capability 8.0 or newer, because the sources "
            "use its instructions; try kernels='reference'"
        )


def _is_before(device: str, capability: tuple[int, int]) -> bool:
    """Is it a GPU of an older compute capability?"""
    return device.startswith("cuda") and torch.cuda.get_device_capability(device) < capability


def _objective_obstacles(objective: Objective, spec: ModelSpec, teacher: ModelSpec | None) -> Iterator[KernelError]:
    options = objective.distil
    if options is None:
        return
    fused = (
        Divergence.FORWARD_KL, Divergence.REVERSE_KL, Divergence.GENERALIZED_JSD, Divergence.SKEW_KL,
        Divergence.SKEW_REVERSE_KL,
    )  # fmt: skip
    if options.divergence not in fused:
        names = ", ".join(one.value for one in fused)
        yield _refusal(
            "divergence", options.divergence.value, f"one of {names}", "these are fused with the unembedding"
        )
    if options.top_k is not None:
        yield _refusal("top_k", options.top_k, "None", "the fused loss sums over the whole vocabulary")
    if options.detach_mixture:
        yield _refusal("detach_mixture", True, "False", "the fused loss differentiates through the mixture")
    if any(model is not None and model.logit_softcap is not None for model in (spec, teacher)):
        yield _refusal("logit_softcap", spec.logit_softcap, "None", "the fused distillation loss has no soft cap")


def triton_ops() -> Ops:
    """Return the Triton kernels. Imports triton."""
    return _ops("triton", "triton")


def cuda_ops(device: str = "cpu") -> Ops:
    """Return the Triton kernels, but CUDA C++ for the operations of `IN_CUDA`, or `IN_CUDA_ON_HOPPER`. Imports triton.

    A CPU emulates a Hopper GPU.
    """
    is_hopper = not device.startswith("cuda") or torch.cuda.get_device_capability(device) == HOPPER
    return _ops("cuda", "triton", in_cuda=IN_CUDA_ON_HOPPER if is_hopper else IN_CUDA)


def fastest_ops() -> Ops:
    """Return the Triton kernels, but CUDA C++ for `FASTER_IN_CUDA` and the backward of the norms. Imports triton."""
    from tessera_kernels import fastest_rms_norm as norm

    ops = _ops("triton", "triton", in_cuda=FASTER_IN_CUDA)
    return replace(ops, rms_norm=norm.rms_norm, add_rms_norm=norm.add_rms_norm, packed=_fastest_packed)


def _fastest_packed() -> PackedOps:
    """Return packed products that go by the rows of x and the outputs."""
    from tessera_kernels.cuda.quant_matmul import is_faster
    from tessera_kernels.cuda.quant_matmul import quant_matmul as in_cuda
    from tessera_kernels.triton.fp8_matmul import fp8_matmul
    from tessera_kernels.triton.quant_matmul import quant_matmul as in_triton

    def quant_matmul(x: Tensor, weight: QuantWeight) -> Tensor:
        rows = x.numel() // weight.width if weight.width else 0
        return in_cuda(x, weight) if is_faster(rows, weight.num_outputs) else in_triton(x, weight)

    return PackedOps(quant_matmul=quant_matmul, fp8_matmul=fp8_matmul)


def reference_ops() -> Ops:
    """Return the kernels' references: the same structure in plain torch, on any device, float64 included.

    This is what the wiring of `tessera_torch.fast` is held against the oracle with.
    """
    return _ops("reference", "reference")


def _ops(name: str, room: str, *, in_cuda: Sequence[str] = ()) -> Ops:
    """Return the operations of this room of `tessera_kernels`, but those of `in_cuda` from the room `cuda`."""

    def file(op: str) -> Any:
        return import_module(f"tessera_kernels.{'cuda' if op in in_cuda else room}.{op}")

    attention, norm = file("flash_attention"), file("rms_norm")
    return Ops(
        name=name,
        flash_attention=attention.flash_attention,
        flash_attention_varlen=attention.flash_attention_varlen,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        apply_rope_=file("rope").apply_rope_,
        swiglu=file("swiglu").swiglu,
        linear_cross_entropy=file("linear_cross_entropy").linear_cross_entropy,
        linear_distillation=file("linear_distillation").linear_distillation,
        adamw_flat_=file("adamw").adamw_flat_,
        decode=lambda: DecodeOps(paged_attention=file("paged_attention").paged_attention, sample=file("sample").sample),
        packed=lambda: PackedOps(
            quant_matmul=file("quant_matmul").quant_matmul, fp8_matmul=file("fp8_matmul").fp8_matmul
        ),
    )


def _refusal(what: str, value: object, wanted: str, because: str) -> KernelError:
    return KernelError(f"{what} = {value}: expected {wanted}, because {because}; try kernels='reference'")


def _reason(obstacle: Exception) -> str:
    return str(obstacle).partition("; try ")[0]
