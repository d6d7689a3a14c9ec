"""Settings of a `parity` process: one thread, full float32 products in torch, compiled JAX primitives kept between
runs."""

import hashlib
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tessera_parity.environment import cpu_flags, machine_line


def settle_process() -> None:
    """Fix what would otherwise differ between two runs or two sides. Shown in the environment.

    JAX's matmul precision is left alone: its half must ask for the highest in every product, and a global switch would
    hide where it does not.
    """
    if find_spec("torch"):
        settle_torch()
    if find_spec("jax"):
        keep_compiled_primitives()


def settle_torch() -> None:
    """One thread, and float32 products in full float32."""
    import torch

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")


def keep_compiled_primitives() -> None:
    """Let JAX keep its compiled primitives on disk: eager JAX compiles one program per primitive and shape, thousands a
    run.

    The directory is named by JAX version and machine, and JAX keys each program by its whole text and options.
    `JAX_COMPILATION_CACHE_DIR` wins; an unwritable cache is no error, JAX compiles then.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_directory()))  # type: ignore[no-untyped-call]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # type: ignore[no-untyped-call]
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # type: ignore[no-untyped-call]


def cache_directory() -> Path:
    """Return where compiled primitives of this JAX on this machine are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = hashlib.sha256(f"{machine_line()} {cpu_flags()}".encode()).hexdigest()[:12]
    return base / "tessera-parity" / f"jax-{version('jaxlib')}-{machine}"
