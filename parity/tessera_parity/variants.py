"""Legal ways of computing one policy, and how to run a half in each. Calibration measures all, runs use the first.

Instruction sets and thread pools are fixed when a framework starts, so every variant runs in a process of its own
(`python -m tessera_parity.variants`), with the environment that the variant names.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera_parity.halves import Half
from tessera_parity.loading import Patch, load_half
from tessera_parity.resync import EAGER, FUSED, STRICT
from tessera_parity.rounding_cases import POOLS
from tessera_shared.errors import ParityError

FAITHFUL = "faithful"
"""Family of variants that round wherever the policy says. The other family is `resync.FUSED`."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One legal way of computing."""

    name: str
    half: str
    about: str
    mode: str = EAGER  # eager | strict | fused, see `resync`
    environment: tuple[tuple[str, str], ...] = ()
    threads: int = 1
    reorder: bool = False  # renumber rows, tokens, heads, widths and vocabulary: other orders of summation
    patches: tuple[Patch, ...] = ()
    gradients: bool = True

    @property
    def family(self) -> str:
        """Faithful or fused: a compiler that keeps digits where the policy rounds is legal, but no yardstick for
        eager.
        """
        return FUSED if self.mode == FUSED else FAITHFUL


_TORCH_CHUNKS = Patch(
    file="tessera_torch/model/linear.py",
    find="functional.linear(x_BTD, weight_FD)",
    replace=(
        "sum(functional.linear(x_BTD[..., part].to(up), weight_FD[:, part].to(up)) for up in"
        " [(x_BTD[:0].float() + x_BTD[:0]).dtype] for part in"
        " (slice(None, x_BTD.shape[-1] // 2), slice(x_BTD.shape[-1] // 2, None))).to(x_BTD.dtype)"
    ),
)
_JAX_CHUNKS = Patch(
    file="tessera_jax/model/linear.py",
    find='jnp.einsum("...d,fd->...f", x_BTD, weight_FD, precision=jax.lax.Precision.HIGHEST)',
    replace=(
        'sum(jnp.einsum("...d,fd->...f", x_BTD[..., part].astype(up), weight_FD[:, part].astype(up),'
        " precision=jax.lax.Precision.HIGHEST) for up in [jnp.promote_types(x_BTD.dtype, jnp.float32)] for part in"
        " (slice(None, x_BTD.shape[-1] // 2), slice(x_BTD.shape[-1] // 2, None))).astype(x_BTD.dtype)"
    ),
)


def usual(half: str) -> Variant:
    """Return the variant that runs are made of: torch eager; JAX compiled strictly, which rounds as eager JAX does."""
    if half == "torch":
        return Variant(name="eager", half=half, about="as written, one thread")
    return Variant(name="strict", half=half, about="jit without excess precision", mode=STRICT)


def variants_of(half: str, *, device: str = "cpu", compiled: bool = False) -> list[Variant]:
    """Return the legal variants of a half, the usual one first. `compiled` adds torch.compile, which takes minutes."""
    if half == "torch":
        found = _torch_cpu() if device == "cpu" else _torch_cuda()
        if compiled:
            about = "torch.compile as users call it; forward only"
            found.append(Variant(name="compile", half=half, mode=FUSED, about=about, gradients=False))
        return [usual(half), *found]
    if half == "jax":
        return [usual(half), *_jax_common(), *(_jax_cpu() if device == "cpu" else _jax_cuda())]
    raise ParityError(f"half = {half!r}: expected torch or jax, because the oracle is the yardstick; try 'torch'")


def _torch_cpu() -> list[Variant]:
    return [
        Variant(name="threads-2", half="torch", about="two threads", threads=2),
        Variant(name="reordered", half="torch", about="every axis renumbered", reorder=True),
        Variant(name="chunked", half="torch", about="projections summed in two chunks", patches=(_TORCH_CHUNKS,)),
        Variant(
            name="aten-default", half="torch", about="no vector kernels, oneDNN at SSE4.1",
            environment=(("ATEN_CPU_CAPABILITY", "default"), ("ONEDNN_MAX_CPU_ISA", "SSE41")),
        ),
        Variant(
            name="avx2", half="torch", about="AVX2 kernels, oneDNN and MKL at AVX2",
            environment=(
                ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
            ),
        ),
        Variant(
            name="mkl-compatible", half="torch", about="MKL's branch for any x86",
            environment=(("MKL_CBWR", "COMPATIBLE"),),
        ),
        Variant(
            name="avx2-reordered", half="torch", about="AVX2 and every axis renumbered", reorder=True,
            environment=(
                ("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
            ),
        ),
    ]  # fmt: skip


def _torch_cuda() -> list[Variant]:
    return [
        Variant(name="reordered", half="torch", about="every axis renumbered", reorder=True),
        Variant(name="chunked", half="torch", about="projections summed in two chunks", patches=(_TORCH_CHUNKS,)),
        Variant(
            name="cublaslt", half="torch", about="cuBLASLt for every product",
            environment=(("TORCH_BLAS_PREFER_CUBLASLT", "1"),),
        ),
        Variant(
            name="small-workspace", half="torch", about="cuBLAS without room for split sums",
            environment=(("CUBLAS_WORKSPACE_CONFIG", ":16:8"),),
        ),
    ]  # fmt: skip


def _jax_common() -> list[Variant]:
    return [
        Variant(name="eager", half="jax", about="operation by operation"),
        Variant(name="reordered", half="jax", about="every axis renumbered", mode=STRICT, reorder=True),
        Variant(
            name="chunked", half="jax", about="projections summed in two chunks", mode=STRICT, patches=(_JAX_CHUNKS,)
        ),
        Variant(name="jit", half="jax", about="jax.jit as users call it", mode=FUSED),
        Variant(name="jit-reordered", half="jax", about="jax.jit, every axis renumbered", mode=FUSED, reorder=True),
    ]


def _jax_cpu() -> list[Variant]:
    one_thread = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    avx2, sse = (("XLA_FLAGS", f"--xla_cpu_max_isa={isa}") for isa in ("AVX2", "SSE4_2"))
    return [
        Variant(
            name="threads-1", half="jax", about="one thread", mode=STRICT, environment=(("XLA_FLAGS", one_thread),)
        ),
        Variant(name="avx2", half="jax", about="XLA at AVX2", mode=STRICT, environment=(avx2,)),
        Variant(name="avx2-jit", half="jax", about="jax.jit at AVX2", mode=FUSED, environment=(avx2,)),
        Variant(name="sse", half="jax", about="XLA at SSE4.2", mode=STRICT, environment=(sse,)),
        Variant(
            name="avx2-reordered", half="jax", about="AVX2, renumbered", mode=STRICT, reorder=True, environment=(avx2,)
        ),
    ]


def _jax_cuda() -> list[Variant]:
    """XLA times algorithms and keeps the fastest, so a product's order of summation may change from run to run: the
    choices are forced here one by one, and drawn again.
    """
    flags = {
        "no-triton-gemm": ("cuBLAS instead of generated products", "--xla_gpu_enable_triton_gemm=false"),
        "no-autotune": ("first algorithm instead of the fastest", "--xla_gpu_autotune_level=0"),
        "triton-gemm": ("generated products only", "--xla_gpu_cublas_fallback=false"),
        "cublaslt": ("cuBLASLt for every product", "--xla_gpu_enable_cublaslt=true"),
    }
    again = [
        Variant(name=f"again-{number}", half="jax", about="algorithms timed and chosen anew", mode=STRICT)
        for number in (1, 2)
    ]
    return again + [
        Variant(name=name, half="jax", about=about, mode=STRICT, environment=(("XLA_FLAGS", flag),))
        for name, (about, flag) in flags.items()
    ]


def quiet(what: str) -> None:
    """Report no progress."""
    del what


def run_apart(
    variant: Variant,
    *,
    dtypes: Sequence[str],
    cases: int,
    seed: int,
    device: str,
    pools: Sequence[str] = tuple(POOLS),
    cores: int = 1,
    timeout_s: float | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Measure a variant in a process of its own: dtype -> stream -> log ratios by case.

    The losses and the update are measured with the pools that every run uses, not with real shapes (`SHAPES`) alone.
    `cores`: on a GPU, how many the float64 truth may use; on the CPU the variant says. ParityError when the process
    fails.
    """
    threads = variant.threads if device == "cpu" else cores
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **dict(variant.environment)}
    if device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "values.json"
        command = [
            sys.executable, "-m", "tessera_parity.variants", variant.half, variant.name, "--device", device,
            "--dtypes", ",".join(dtypes), "--cases", str(cases), "--seed", str(seed), "--output", str(output),
            "--pools", ",".join(pools),
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ParityError(
                f"variant = {variant.half} {variant.name}: expected measurements, because its process left with "
                f"{done.returncode} ({last}); try --skip {variant.name}"
            )
        result: dict[str, dict[str, list[float]]] = json.loads(output.read_text(encoding="utf-8"))
        return result


def measure(
    variant: Variant,
    *,
    dtypes: Sequence[str],
    cases: int,
    seed: int,
    device: str,
    pools: Sequence[str] = tuple(POOLS),
    advance: Callable[[str], None] = quiet,
) -> dict[str, dict[str, list[float]]]:
    """Measure a variant in this process, whose environment must be the variant's."""
    from tessera_parity.rounding_measure import collect

    half, clean = (
        load_half(variant.half, device=device, patches=variant.patches),
        load_half(variant.half, device=device),
    )
    if variant.half == "torch" and device == "cpu":
        import torch

        torch.set_num_threads(variant.threads)
    oracle = load_half("numpy")
    return {
        dtype: collect(
            oracle, half, variant, truth=_truth(clean), dtype=dtype, cases=cases, seed=seed, pools=pools,
            losses=set(pools) >= set(POOLS), advance=advance,
        )
        for dtype in dtypes
    }  # fmt: skip


def _truth(clean: Half) -> Half:
    """See `rounding_measure.gradient_truth`; imported here, because that module imports this one."""
    from tessera_parity.rounding_measure import gradient_truth

    return gradient_truth(clean)


def main() -> None:
    """Measure one variant and write a JSON file; `run_apart` calls this."""
    parser = argparse.ArgumentParser()
    parser.add_argument("half")
    parser.add_argument("variant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", required=True)
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    found = [one for one in variants_of(given.half, device=given.device, compiled=True) if one.name == given.variant]
    if not found:
        raise ParityError(f"variant = {given.variant!r}: expected a variant of {given.half}; try 'eager'")
    values = measure(
        found[0], dtypes=given.dtypes.split(","), cases=given.cases, seed=given.seed, device=given.device,
        pools=given.pools.split(","),
    )  # fmt: skip
    given.output.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
