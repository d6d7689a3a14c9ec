"""Every launch of every Triton op at the shapes that the benches measure, compiled instead of run, on a machine without a GPU.

A driver that says "compute capability N" stands in for the GPU's, tensors lie on torch's `meta` device, which has shapes
and no memory, and what a launcher launches is compiled and kept. Import this module before any of `tessera_kernels.triton`.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no code

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parents[1] / room) for room in ("shared", "kernels"))]

import torch  # noqa: E402
import triton  # noqa: E402
from compiled_code import Code, read_code  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MULTIPROCESSORS = 132
PTXAS_OPTIONS = ("-lineinfo", "--regAllocOptLevel=2") if triton.__version__ >= "3.7" else ("-lineinfo",)
"""What Triton itself gives to ptxas."""

Make = Callable[..., object]


class StandIn:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass(frozen=True)
class Launch:
    """One call of an op: `run(config)` launches its kernels; None is the configuration that the op chooses."""

    op: str
    shape: str
    run: Callable[[Any], object]
    configs: Sequence[Any]


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel and where it came from."""

    op: str
    kernel: str
    shape: str
    config: str
    stages: int
    constants: str  # the compile-time arguments that are set
    code: Code
    sass: Callable[[], bytes]  # the machine code


@dataclass
class Recorder:
    """Compiles what is launched while it is installed; a kernel whose name lacks `only` is passed over."""

    arch: int = 90
    only: str = ""
    found: list[Compiled] = field(default_factory=list)
    place: tuple[str, str, str] = ("", "", "")  # op, shape, configuration of what is launched next
    seen: set[str] = field(default_factory=set)

    def install(self) -> "Recorder":
        """Stand in for the driver and for every launch, and let the launchers take tensors without a GPU."""
        driver.set_active(StandIn(self.arch))
        compiles = jit.JITFunction.run

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            del warmup
            if self.only not in kernel.fn.__name__:
                return None
            made = compiles(kernel, *args, grid=grid, warmup=True, **options)
            self._keep(kernel.fn.__name__, made)
            return made

        jit.JITFunction.run = run
        _accept_tensors_without_gpu(self.arch)
        return self

    def _keep(self, name: str, made: Any) -> None:
        if made.hash in self.seen:
            return
        self.seen.add(made.hash)
        metadata = made.metadata
        code = read_code(
            made.asm["ptx"], made.asm["cubin"], shared=metadata.shared, warps=metadata.num_warps, arch=self.arch,
            tools=TOOLS, options=PTXAS_OPTIONS,
        )  # fmt: skip
        op, shape, config = self.place
        constants = _constants(made)
        self.found.append(
            Compiled(op, name, shape, config, metadata.num_stages, constants, code, lambda: made.asm["cubin"])
        )


def _constants(made: Any) -> str:
    names, values = made.src.fn.arg_names, made.src.constants
    pairs = [(names[place[0]], value) for place, value in values.items() if len(place) == 1]
    words = [
        name if value is True else f"{name} {value}"
        for name, value in pairs
        if name.isupper() and value is not False and value is not None
    ]
    return " ".join(words)


def _accept_tensors_without_gpu(arch: int) -> None:
    """Replace what asks the device: whether there is one, how many multiprocessors it has, which instructions."""
    from tessera_kernels import checks

    checks.expect_triton_device = lambda what, tensor: None
    from tessera_kernels import launching

    launching.num_sms = lambda device: MULTIPROCESSORS
    from tessera_kernels.triton import quant_matmul

    quant_matmul._has_trick = lambda x: x.dtype == torch.bfloat16 and arch >= 90


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    """Return a tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return empty(*shape, dtype=dtype)


class NothingWrong(TorchDispatchMode):
    """Answers a question about the numbers of a tensor that has none: no, 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        return func(*args, **(kwargs or {}))


def launches(op: str) -> Iterator[Launch]:
    """Yield what the bench of `op` measures."""
    return LAUNCHES[op]()


def _backward(outputs: object, leaves: Sequence[Tensor]) -> None:
    outs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    torch.autograd.grad(outs, leaves, [torch.empty_like(x) for x in outs])


def _flash_attention() -> Iterator[Launch]:
    import bench_flash_attention as bench

    from tessera_kernels.triton import flash_attention as op

    def dense(config: Any, rows: int, heads: int, kv_heads: int, length: int, width: int, *, causal: bool) -> None:
        leaves = [empty(rows, length, n, width, grad=True) for n in (heads, kv_heads, kv_heads)]
        out, _ = op.flash_attention(*leaves, causal=causal, config=config)
        _backward(out, leaves)

    def packed(config: Any) -> None:
        leaves = [empty(sum(bench.UNITS), 16, 128, grad=True) for _ in "qkv"]
        starts, longest = _ints(len(bench.UNITS) + 1), max(bench.UNITS)
        out, _ = op.flash_attention_varlen(
            *leaves, starts, starts, longest_query=longest, longest_key=longest, config=config
        )
        _backward(out, leaves)

    for shape in bench.FULL:
        rows, heads, kv_heads, length, width = shape
        name = f"B{rows} N{heads}/{kv_heads} S{length} H{width}"
        yield Launch("flash_attention", f"{name} causal", _at(dense, *shape, causal=True), op.CONFIGS)
        if length == 1024 or width != 128:
            yield Launch("flash_attention", f"{name} full", _at(dense, *shape, causal=False), op.CONFIGS)
    yield Launch("flash_attention", "packed N16 H128 causal", packed, op.CONFIGS)


def _rms_norm() -> Iterator[Launch]:
    import bench_rms_norm as bench

    from tessera_kernels.triton import rms_norm as op

    def norm(config: Any, rows: int, width: int) -> None:
        leaves = [empty(rows, width, grad=True), empty(width, grad=True)]
        _backward(op.rms_norm(*leaves, eps=1e-6, config=config), leaves)

    def add(config: Any, rows: int, width: int) -> None:
        leaves = [empty(rows, width, grad=True), empty(rows, width, grad=True), empty(width, grad=True)]
        _backward(op.add_rms_norm(*leaves, eps=1e-6, config=config), leaves)

    for shape in bench.SHAPES:
        name = "x".join(map(str, shape))
        yield Launch("rms_norm", name, _at(norm, *shape), op.CONFIGS)
        yield Launch("rms_norm", f"add {name}", _at(add, *shape), op.CONFIGS)


def _rope() -> Iterator[Launch]:
    import bench_rope as bench

    from tessera_kernels.triton import rope as op

    def turn(config: Any, rows: int, positions: int, heads: int, kv_heads: int, width: int) -> None:
        q, k = (empty(rows, positions, n, width) for n in (heads, kv_heads))
        angles = empty(rows, positions, width), empty(rows, positions, width)
        op.apply_rope_(q, k, *angles, config=config)
        op._turn_anew(q, k, *angles, True, list(config or ()))

    for shape in bench.SHAPES:
        yield Launch("rope", "B{} T{} N{} K{} H{}".format(*shape), _at(turn, *shape), op.CONFIGS)


def _swiglu() -> Iterator[Launch]:
    import bench_swiglu as bench

    from tessera_kernels.triton import _gate_up
    from tessera_kernels.triton import swiglu as op

    def elementwise(config: Any, rows: int, width: int) -> None:
        leaves = [empty(rows, width, grad=True) for _ in range(2)]
        _backward(op.swiglu(*leaves, config=config), leaves)

    def product(config: Any, rows: int, depth: int, width: int, *, keep: bool) -> None:
        both = empty(2 * width, depth)
        _gate_up.gate_up_forward(empty(rows, depth), both[:width], both[width:], keep, list(config or ()))

    for shape in bench.ELEMENTWISE:
        yield Launch("swiglu", "x".join(map(str, shape)), _at(elementwise, *shape), op.CONFIGS)
    for shape in bench.GEMMS:
        for keep in (False, True):
            name = "gate-up {}x{}x2*{}".format(*shape) + " kept" * keep
            yield Launch("swiglu", name, _at(product, *shape, keep=keep), _gate_up.CONFIGS)


def _linear_cross_entropy() -> Iterator[Launch]:
    import bench_linear_cross_entropy as bench

    from tessera_kernels.triton import linear_cross_entropy as op

    def loss(config: Any, mode: str) -> None:
        leaves = [empty(bench.ROWS, bench.WIDTH, grad=True), empty(bench.VOCAB, bench.WIDTH, grad=True)]
        labels = _ints(bench.ROWS, dtype=torch.int64)
        _backward(op.linear_cross_entropy(*leaves, labels, mode=mode, config=config)[0], leaves)

    for mode in ("chunked", "no_logits"):
        name = f"{mode} {bench.ROWS} x {bench.WIDTH} x {bench.VOCAB}"
        yield Launch("linear_cross_entropy", name, _at(loss, mode), op.CONFIGS)


def _linear_distillation() -> Iterator[Launch]:
    import bench_linear_distillation as bench

    from tessera_kernels.triton import linear_distillation as op

    def loss(config: Any, divergence: str, mode: str, mix: dict[str, float]) -> None:
        leaves = [empty(bench.ROWS, bench.WIDTH, grad=True), empty(bench.VOCAB, bench.WIDTH, grad=True)]
        teacher = empty(bench.ROWS, bench.TEACHER), empty(bench.VOCAB, bench.TEACHER)
        labels = _ints(bench.ROWS, dtype=torch.int64)
        how = {"divergence": divergence, "mode": mode, "config": config}
        _backward(op.linear_distillation(*leaves, *teacher, labels, **how, **mix)[0], leaves)

    mixes: dict[str, dict[str, float]] = {"": {}, " labels 0.3": {"label_weight": 0.3, "temperature": 2.0}}

    for divergence in bench.DIVERGENCES:
        for mode in ("chunked", "no_logits") if divergence in ("forward_kl", "reverse_kl") else ("chunked",):
            for also, mix in mixes.items():
                name = f"{divergence}{also} {mode} {bench.ROWS} x ({bench.WIDTH}, {bench.TEACHER}) x {bench.VOCAB}"
                yield Launch("linear_distillation", name, _at(loss, divergence, mode, mix), op.CONFIGS)


def _adamw() -> Iterator[Launch]:
    from tessera_kernels.triton import adamw as op

    def update(config: Any, count: int, *, half: bool) -> None:
        state = [empty(count, dtype=torch.float32) for _ in range(3)]
        grad = empty(count, dtype=torch.bfloat16 if half else torch.float32)
        step, lr = _ints(dtype=torch.int64), empty(dtype=torch.float32)
        op.adamw_flat_(
            state[0], grad, *state[1:], step=step, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            copy=empty(count) if half else None, config=config,
        )  # fmt: skip

    for half in (False, True):
        name = f"{2**28} {'bfloat16 gradients and copy' if half else 'float32 gradients'}"
        yield Launch("adamw", name, _at(update, 2**28, half=half), op.CONFIGS)


def _quant_matmul() -> Iterator[Launch]:
    import bench_quant_matmul as bench

    from tessera_kernels.quant_weight import QuantWeight
    from tessera_kernels.triton import quant_matmul as op

    def multiply(config: Any, weight: QuantWeight, count: int) -> None:
        op.quant_matmul(empty(count, weight.width), weight, config=config)

    outputs, width = bench.SHAPES[0]
    for name, quantize in bench.FORMATS.items():
        with NothingWrong():
            weight = quantize(empty(outputs, width))
        for count in (*bench.FEW, *bench.MANY):
            label = f"{name} rows {count} F{outputs} D{width}"
            yield Launch("quant_matmul", label, _at(multiply, weight, count), op.CONFIGS)


def _fp8_matmul() -> Iterator[Launch]:
    import bench_fp8_matmul as bench

    from tessera_kernels.fp8_scaling import SCALINGS, quantize_fp8
    from tessera_kernels.triton import fp8_matmul as op

    def multiply(config: Any, given: Sequence[Tensor], scaling: str, accumulation: str) -> None:
        op.fp8_matmul(*given, scaling=scaling, accumulation=accumulation, config=config)

    for count, outputs, width in bench.SHAPES:
        for scaling in SCALINGS:
            a, scale_a = quantize_fp8(empty(count, width), scaling=scaling)
            b, scale_b = quantize_fp8(empty(outputs, width), scaling=scaling, block_rows=128)
            for accumulation in op.ACCUMULATIONS[: 1 if scaling == "block" else 2]:
                name = f"{scaling} {accumulation} X{count} F{outputs} D{width}"
                run = _at(multiply, (a, b, scale_a, scale_b), scaling, accumulation)
                yield Launch("fp8_matmul", name, run, op.CONFIGS)


def _paged_attention() -> Iterator[Launch]:
    import bench_paged_attention as bench

    from tessera_kernels.triton import paged_attention as op

    def attend(config: Any, shape: Any) -> None:
        width_M = -(-shape.S // shape.Z)
        pages = empty(shape.B * width_M, 2, shape.Z, shape.K, shape.H)
        q, table, lengths = empty(shape.B * shape.T, shape.N, shape.H), _ints(shape.B, width_M), _ints(shape.B)
        given = (q, pages[:, 0], pages[:, 1], table, lengths)
        if shape.T == 1:
            op.paged_attention(*given, config=config)
        else:
            op.paged_prefill(*given, _ints(shape.B + 1), longest_query=shape.T, config=config)

    for shape in (*bench.DECODE, *bench.PREFILL):
        yield Launch("paged_attention", str(shape), _at(attend, shape), op.CONFIGS)


def _sample() -> Iterator[Launch]:
    import bench_sample as bench

    from tessera_kernels.triton import sample as op

    def draw(config: Any, rows: int, vocab: int, how: dict[str, Any]) -> None:
        uniforms = empty(rows, dtype=torch.float32)
        op.sample(empty(rows, vocab, dtype=torch.float32), uniforms, config=config, **how)

    for shape in bench.FULL:
        for name, how in bench.SETTINGS.items():
            yield Launch("sample", "B{} V{} ".format(*shape) + name, _at(draw, *shape, how), op.CONFIGS)


def _at(make: Make, *args: Any, **options: Any) -> Callable[[Any], object]:
    """Bind all but the configuration, which comes first."""

    def run(config: Any) -> object:
        return partial(make, config, *args, **options)()

    return run


LAUNCHES: dict[str, Callable[[], Iterator[Launch]]] = {
    "adamw": _adamw,
    "flash_attention": _flash_attention,
    "fp8_matmul": _fp8_matmul,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_distillation": _linear_distillation,
    "paged_attention": _paged_attention,
    "quant_matmul": _quant_matmul,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "sample": _sample,
    "swiglu": _swiglu,
}
