"""What a run depends on besides the code: versions, machine, threads, precision modes; and where the two sides differ.

Configuration is compared before numerics: a precision mode that differs explains more than any tensor does.
"""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("tessera-testbed", "numpy", "ml-dtypes", "torch", "jax", "jaxlib", "flax", "optax", "transformers")
SWITCHES = (
    "OMP_NUM_THREADS",
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)


def describe(*, torch: bool, jax: bool) -> dict[str, Any]:
    """Return the environment: common facts, a mapping a side, and `differences`, one line each. Imports what is asked
    for."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": machine_line(),
        "cpu flags": " ".join(cpu_flags()),
        "cores": os.cpu_count(),
        "commit": commit(),
        "versions": ", ".join(f"{name} {found}" for name in PACKAGES if (found := installed_version(name)) is not None),
        "switches": ", ".join(f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ) or "none set",
    }
    sides: dict[str, dict[str, Any]] = {}
    if torch and find_spec("torch"):
        sides["torch"] = torch_side()
    if jax and find_spec("jax"):
        sides["jax"] = jax_side()
    return facts | sides | {"differences": differences(sides)}


def torch_side() -> dict[str, Any]:
    """Return what decides how torch computes here."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "version": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "float64": True,
        "float32 matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32) if cuda else False,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if cuda
        else ["cpu"],
    }


def jax_side() -> dict[str, Any]:
    """Return what decides how JAX computes here."""
    import jax

    config: Any = jax.config
    return {
        "version": str(jax.__version__),
        "threads": str(xla_threads()),
        "float64": bool(config.jax_enable_x64),
        "float32 matmul": str(config.jax_default_matmul_precision or "the backend's default"),
        "deterministic": "xla_gpu_deterministic_ops" in os.environ.get("XLA_FLAGS", ""),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "compilation cache": str(config.jax_compilation_cache_dir or "none"),
    }


def xla_threads() -> int:
    """Return how many threads XLA may spread one product over on a CPU.

    XLA reads PJRT_NPROC, else NPROC, else counts the cores that the process may use; OMP_NUM_THREADS it does not read.
    """
    if "xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", ""):
        return 1
    for name in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(name, "").strip().isdigit():
            return max(1, int(os.environ[name]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def differences(sides: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line for every setting that both sides have and that differs in words: 1 is "1"."""
    if len(sides) < 2:
        return []
    torch, jax = sides["torch"], sides["jax"]
    common = [name for name in torch if name in jax and name != "version"]
    return [f"{name}: torch {torch[name]}, jax {jax[name]}" for name in common if str(torch[name]) != str(jax[name])]


def installed_version(package: str) -> str | None:
    """Return an installed package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine_line() -> str:
    """Return processor, architecture and system in one line."""
    model = platform.processor() or platform.machine()
    for line in _cpuinfo():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {platform.machine()}, {platform.system()} {platform.release()}"


def cpu_flags() -> list[str]:
    """Return the instruction sets that change how sums are done (vector widths, fused multiply-add), where Linux
    says."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            return sorted(
                flags & {"sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve"}
            )
    return []


def commit() -> str:
    """Return the commit of the source tree this package runs from, or why there is none."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "no git here"
    return found.stdout.strip() if found.returncode == 0 else "not a git checkout"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
