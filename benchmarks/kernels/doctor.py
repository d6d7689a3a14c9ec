"""What is on this machine that a session needs? Prints one JSON object: versions, tools, which peers can be imported and why not.

FlashInfer's kernels may have been built ahead (`prebuild_flashinfer.py`); each library that does not load here is named.
"""

import importlib
import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PEERS = {
    "liger": "liger_kernel.chunked_loss",
    "trl": "trl.kernels.chunked_divergence",
    "cce": "cut_cross_entropy",
    "flashinfer": "flashinfer",
}
PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "flashinfer-python", "apache-tvm-ffi",
            "hypothesis")  # fmt: skip
TOOLS = ("nvcc", "ninja", "c++", "ncu", "compute-sanitizer", "cuobjdump", "nvidia-smi")
FAULTS = (ImportError, RuntimeError, OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError)


def main() -> int:
    """Print what was found."""
    found = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "versions": {name: _version(name) for name in PACKAGES},
        "tools": {name: shutil.which(name) or "" for name in TOOLS},
        "peers": {name: _fault(module) for name, module in PEERS.items()},
        "built": _built(),
    }
    print(json.dumps(found))
    return 0


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _fault(module: str) -> str:
    """Return why a module cannot be imported, or nothing."""
    try:
        importlib.import_module(module)
    except FAULTS as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    return ""


def _built() -> dict[str, str]:
    """Return each FlashInfer library that was built ahead and what is wrong with it."""
    try:
        import flashinfer_jit_cache
        import tvm_ffi
    except FAULTS:
        return {}
    found: dict[str, str] = {}
    for path in sorted(Path(flashinfer_jit_cache.get_jit_cache_dir()).glob("*/*.so")):
        try:
            tvm_ffi.load_module(str(path))
            found[path.stem] = ""
        except FAULTS as error:
            found[path.stem] = f"{type(error).__name__}: {str(error)[:200]}"
            path.unlink()  # it is compiled here instead
    return found


def report_of(found: dict[str, Any]) -> list[str]:
    """Return Markdown lines."""
    lines = [f"{found['gpu'] or 'no GPU'}, Python {found['python']}, {found['cores']} cores; "
             + ", ".join(f"{name} {number or 'missing'}" for name, number in found["versions"].items())]  # fmt: skip
    lines += [f"- tool {name}: {path or '**missing**'}" for name, path in found["tools"].items()]
    lines += [f"- peer {name}: {fault or 'imports'}" for name, fault in found["peers"].items()]
    lines += [f"- built ahead, {name[:60]}: {fault or 'loads'}" for name, fault in found["built"].items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
