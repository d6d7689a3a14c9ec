"""`tessera info`: what can be built and what this machine offers, without importing a framework."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tessera_shared.presets import PRESETS
from tessera_shared.tensors import num_parameters

PACKAGES = ("numpy", "torch", "triton", "jax", "flax", "optax", "transformers", "tokenizers", "safetensors")


def info() -> None:
    """Show the presets with their sizes, the versions of what is installed, the GPU and the kernels."""
    console = Console()
    console.print(preset_table())
    rows = {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES}
    rows |= {"gpu": gpu_names(), "triton kernels": kernel_names("triton"), "cuda kernels": kernel_names("cuda")}
    facts = Table(title="This machine", show_header=False, title_justify="left", box=box.SIMPLE, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts)


def preset_table() -> Table:
    """Return the presets with parameter counts and the bytes that their weights take in bfloat16."""
    table = Table(title="Presets (tessera init PRESET DIR)", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("preset", "family", "layers", "width", "heads", "vocab", "parameters", "bfloat16"):
        table.add_column(heading, justify="left" if heading in ("preset", "family") else "right", no_wrap=True)
    for name, spec in PRESETS.items():
        count = num_parameters(spec)
        heads = f"{spec.num_heads}/{spec.num_kv_heads}"
        shape = (str(spec.num_layers), str(spec.width), heads, str(spec.vocab_size))
        table.add_row(name, spec.architecture, *shape, f"{count:,}", size_text(2 * count))
    return table


def size_text(num_bytes: int) -> str:
    """Return a number of bytes as people write it, in powers of 1000: `"12.3 MB"`."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000.0:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000.0
    return f"{size:.1f} TB"


def installed_version(package: str) -> str:
    """Return the version that is installed, without importing the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def gpu_names() -> str:
    """Return the GPUs that NVIDIA's driver reports."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none found (no nvidia-smi)"
    return "; ".join(found.stdout.strip().splitlines()) if found.returncode == 0 else "none found"


def kernel_names(dialect: str) -> str:
    """Return the operations that have a kernel in `dialect`: the files that its folder and that of the references share."""
    room = find_spec("tessera_kernels")
    places = [Path(place) for place in (room.submodule_search_locations or [])] if room is not None else []
    names, plain = (
        {path.stem for place in places for path in (place / folder).glob("*.py")} for folder in (dialect, "reference")
    )
    return ", ".join(sorted(name for name in names & plain if not name.startswith("_"))) or "none"
